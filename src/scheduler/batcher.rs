//! Which jobs run together, and when: a queue that is cut into batches. Pure and generic: no clock, no threads, no
//! knowledge of models; the standard library only.
//!
//! Invariants: every entry leaves exactly once, in a batch or by [`Batcher::remove`], unless it is put back: then it
//! stands where it stood. A batch holds entries of one key
//! and at most the preferred rows, save a single entry that is larger. It starts with the head of the queue (smallest
//! priority, then arrival) and continues in that order within its key, up to the first entry that does not fit: small
//! entries never overtake a large one. Nothing is held back once it has waited `max_delay`.
//!
//! Callers hand in instants that never go back. Push, remove and taking an entry cost O(log n).

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::ops::Bound;
use std::time::{Duration, Instant};

/// A longer `max_delay` is cut to this: nobody means it, and adding it to an instant cannot overflow.
pub const MAX_DELAY: Duration = Duration::from_secs(3600);

/// More rows than any batch: an entry's rows are counted up to here, so that sums over a queue cannot overflow.
const MOST_ROWS: usize = u32::MAX as usize;

/// One waiting job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<K, P, T> {
    /// Only entries with equal keys share a batch.
    pub key: K,
    /// Smaller goes first.
    pub priority: P,
    /// What it takes of a batch's budget; 0 counts as 1.
    pub rows: usize,
    /// What it takes of memory while it waits.
    pub bytes: usize,
    pub arrived: Instant,
    pub item: T,
}

impl<K, P, T> Entry<K, P, T> {
    /// The same entry with another item, and the one it had.
    pub fn replace<U>(self, item: U) -> (Entry<K, P, U>, T) {
        let Entry { key, priority, rows, bytes, arrived, item: replaced } = self;
        (Entry { key, priority, rows, bytes, arrived, item }, replaced)
    }
}

/// Where a waiting entry stands in the queue, and its name while it waits there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket<P> {
    priority: P,
    sequence: u64,
}

/// What a free worker should do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Poll<K, P, T> {
    /// Run these. Never empty. A ticket puts its entry back.
    Batch(Vec<(Ticket<P>, Entry<K, P, T>)>),
    /// Nothing before then, unless more arrives.
    Wait(Instant),
    Idle,
}

/// Whether a batch would be given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// At that moment, or earlier if more arrives.
    At(Instant),
    Idle,
}

#[derive(Debug)]
pub struct Batcher<K, P, T> {
    preferred_rows: usize,
    max_delay: Duration,
    queue: BTreeMap<Ticket<P>, Entry<K, P, T>>,
    /// Per key, the rows of its entries in queue order. Never holds an empty lane.
    lanes: HashMap<K, Lane<P>>,
    next_sequence: u64,
    bytes: usize,
    /// Sum over lanes of their rows in preferred batches, rounded up.
    batches: usize,
    /// Lanes that hold a full batch.
    full_lanes: usize,
}

#[derive(Debug)]
struct Lane<P> {
    order: BTreeMap<Ticket<P>, usize>,
    rows: usize,
}

impl<K: Clone + Eq + Hash, P: Copy + Ord, T> Batcher<K, P, T> {
    /// `preferred_rows`: what a batch is filled up to; 1 means no batching.
    pub fn new(preferred_rows: usize, max_delay: Duration) -> Self {
        Batcher {
            preferred_rows: counted(preferred_rows),
            max_delay: max_delay.min(MAX_DELAY),
            queue: BTreeMap::new(),
            lanes: HashMap::new(),
            next_sequence: 0,
            bytes: 0,
            batches: 0,
            full_lanes: 0,
        }
    }

    /// Waiting entries.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes of the waiting entries.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many batches the queue will make, at least: entries that don't fit side by side make it more.
    pub fn batches(&self) -> usize {
        self.batches
    }

    pub fn push(&mut self, entry: Entry<K, P, T>) -> Ticket<P> {
        let ticket = Ticket { priority: entry.priority, sequence: self.next_sequence };
        self.next_sequence += 1;
        self.put_back(ticket, entry);
        ticket
    }

    /// Puts an entry that was taken back where it stood.
    pub fn put_back(&mut self, ticket: Ticket<P>, entry: Entry<K, P, T>) {
        self.bytes = self.bytes.saturating_add(entry.bytes);
        let rows = counted(entry.rows);
        if let Some(lane) = self.lanes.get_mut(&entry.key) {
            let before = lane.rows;
            lane.order.insert(ticket, rows);
            lane.rows += rows;
            let after = lane.rows;
            self.recount(before, after);
        } else {
            let lane = Lane { order: BTreeMap::from([(ticket, rows)]), rows };
            self.lanes.insert(entry.key.clone(), lane);
            self.recount(0, rows);
        }
        self.queue.insert(ticket, entry);
    }

    /// Takes an entry out of the queue; `None` if it has left already.
    pub fn remove(&mut self, ticket: Ticket<P>) -> Option<T> {
        self.take(ticket).map(|entry| entry.item)
    }

    /// Empties the queue, in order.
    pub fn drain(&mut self) -> Vec<T> {
        let tickets: Vec<Ticket<P>> = self.queue.keys().copied().collect();
        tickets.into_iter().filter_map(|ticket| self.remove(ticket)).collect()
    }

    /// Whether [`Self::poll`] would give out a batch.
    pub fn readiness(&self, now: Instant) -> Readiness {
        if self.queue.is_empty() {
            return Readiness::Idle;
        }
        // A full lane behind a head that still waits for company sends the head off early: one rare key must not keep
        // workers idle while a busy key piles up behind it.
        if self.max_delay.is_zero() || self.full_lanes > 0 {
            return Readiness::Ready;
        }
        match self.oldest_arrival().map(|arrived| arrived + self.max_delay) {
            Some(due) if due > now => Readiness::At(due),
            _ => Readiness::Ready,
        }
    }

    pub fn poll(&mut self, now: Instant) -> Poll<K, P, T> {
        match self.readiness(now) {
            Readiness::Idle => Poll::Idle,
            Readiness::At(due) => Poll::Wait(due),
            Readiness::Ready => {
                let tickets = self.head_batch();
                Poll::Batch(tickets.into_iter().filter_map(|ticket| Some((ticket, self.take(ticket)?))).collect())
            }
        }
    }

    /// Changes the budget for batches not yet taken.
    pub fn set_preferred_rows(&mut self, preferred_rows: usize) {
        self.preferred_rows = counted(preferred_rows);
        let per_batch = self.preferred_rows;
        self.batches = self.lanes.values().map(|lane| lane.rows.div_ceil(per_batch)).sum();
        self.full_lanes = self.lanes.values().filter(|lane| lane.rows >= per_batch).count();
    }

    pub fn set_max_delay(&mut self, max_delay: Duration) {
        self.max_delay = max_delay.min(MAX_DELAY);
    }

    fn head_batch(&self) -> Vec<Ticket<P>> {
        let Some(lane) = self.queue.first_key_value().and_then(|(_, head)| self.lanes.get(&head.key)) else {
            return Vec::new();
        };
        let mut rows = 0;
        let mut batch = Vec::new();
        for (ticket, more) in &lane.order {
            rows += more;
            if rows > self.preferred_rows && !batch.is_empty() {
                break;
            }
            batch.push(*ticket);
        }
        batch
    }

    fn take(&mut self, ticket: Ticket<P>) -> Option<Entry<K, P, T>> {
        let entry = self.queue.remove(&ticket)?;
        self.bytes = self.bytes.saturating_sub(entry.bytes);
        let rows = counted(entry.rows);
        if let Some(lane) = self.lanes.get_mut(&entry.key) {
            let before = lane.rows;
            lane.order.remove(&ticket);
            lane.rows -= rows;
            let after = lane.rows;
            if lane.order.is_empty() {
                self.lanes.remove(&entry.key);
            }
            self.recount(before, after);
        }
        Some(entry)
    }

    /// Keeps the sums in step with one lane's change.
    fn recount(&mut self, before: usize, after: usize) {
        let per_batch = self.preferred_rows;
        self.batches = self.batches + after.div_ceil(per_batch) - before.div_ceil(per_batch);
        self.full_lanes = self.full_lanes + usize::from(after >= per_batch) - usize::from(before >= per_batch);
    }

    /// The earliest arrival: that of the first entry of one of the priorities, of which there are few.
    fn oldest_arrival(&self) -> Option<Instant> {
        let mut oldest: Option<Instant> = None;
        let mut from = Bound::Unbounded;
        while let Some((ticket, entry)) = self.queue.range((from, Bound::Unbounded)).next() {
            oldest = Some(oldest.map_or(entry.arrived, |oldest| oldest.min(entry.arrived)));
            from = Bound::Excluded(Ticket { priority: ticket.priority, sequence: u64::MAX });
        }
        oldest
    }
}

fn counted(rows: usize) -> usize {
    rows.clamp(1, MOST_ROWS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    type TestBatcher = Batcher<u8, u8, usize>;

    const MS: Duration = Duration::from_millis(1);

    fn entry(item: usize, key: u8, rows: usize, arrived: Instant) -> Entry<u8, u8, usize> {
        Entry { key, priority: 0, rows, bytes: 10, arrived, item }
    }

    fn items(poll: Poll<u8, u8, usize>) -> Vec<usize> {
        match poll {
            Poll::Batch(taken) => taken.into_iter().map(|(_, entry)| entry.item).collect(),
            other => panic!("expected a batch, got {other:?}"),
        }
    }

    #[test]
    fn batches_fill_in_order_within_the_key_up_to_the_first_that_does_not_fit() {
        let now = Instant::now();
        let mut batcher = TestBatcher::new(4, Duration::ZERO);
        for (item, (key, rows)) in [(1, 2), (2, 1), (1, 1), (1, 2), (1, 1), (1, 9), (2, 0)].into_iter().enumerate() {
            batcher.push(entry(item, key, rows, now));
        }
        assert_eq!((batcher.len(), batcher.bytes()), (7, 70));
        assert_eq!(items(batcher.poll(now)), [0, 2], "3 would be a fifth row, and 4 does not overtake it");
        assert_eq!(items(batcher.poll(now)), [1, 6]);
        assert_eq!(items(batcher.poll(now)), [3, 4]);
        assert_eq!(items(batcher.poll(now)), [5], "larger than a batch: alone");
        assert_eq!((batcher.poll(now), batcher.bytes(), batcher.batches()), (Poll::Idle, 0, 0));
    }

    #[test]
    fn priority_goes_before_arrival() {
        let now = Instant::now();
        let mut batcher = TestBatcher::new(2, Duration::ZERO);
        for (item, priority) in [9, 5, 9, 1].into_iter().enumerate() {
            batcher.push(Entry { priority, ..entry(item, 0, 1, now) });
        }
        assert_eq!(items(batcher.poll(now)), [3, 1]);
        assert_eq!(items(batcher.poll(now)), [0, 2]);
    }

    #[test]
    fn a_batch_leaves_when_it_is_full_or_its_time_has_come() {
        let start = Instant::now();
        let mut batcher = TestBatcher::new(2, 5 * MS);
        batcher.push(entry(0, 1, 1, start));
        assert_eq!(batcher.poll(start + 4 * MS), Poll::Wait(start + 5 * MS));
        assert_eq!(items(batcher.poll(start + 5 * MS)), [0]);
        batcher.push(entry(1, 1, 1, start));
        batcher.push(entry(2, 1, 1, start + MS));
        assert_eq!(items(batcher.poll(start + MS)), [1, 2]);
        // An old entry of low priority makes the urgent ones leave early rather than wait behind them.
        batcher.push(Entry { priority: 9, ..entry(3, 1, 1, start) });
        batcher.push(Entry { priority: 1, ..entry(4, 2, 1, start + 4 * MS) });
        assert_eq!(batcher.readiness(start + 4 * MS), Readiness::At(start + 5 * MS));
        assert_eq!(items(batcher.poll(start + 5 * MS)), [4]);
        assert_eq!(items(batcher.poll(start + 5 * MS)), [3]);
        // A full lane behind a lone head sends the head off too.
        for (item, key) in [(5, 1), (6, 2), (7, 2)] {
            batcher.push(entry(item, key, 1, start));
        }
        assert_eq!(items(batcher.poll(start)), [5]);
        assert_eq!(items(batcher.poll(start)), [6, 7]);
    }

    #[test]
    fn an_absurd_delay_neither_overflows_nor_outlives_its_cut() {
        let start = Instant::now();
        let mut batcher = TestBatcher::new(2, Duration::MAX);
        for item in [0, 0] {
            batcher.push(entry(item, 1, usize::MAX, start));
        }
        assert_eq!((items(batcher.poll(start)), items(batcher.poll(start))), (vec![0], vec![0]));
        batcher.push(entry(1, 1, 1, start));
        assert_eq!(batcher.poll(start), Poll::Wait(start + MAX_DELAY));
        batcher.set_max_delay(Duration::ZERO);
        assert_eq!(items(batcher.poll(start)), [1]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push { key: u8, priority: u8, rows: usize },
        Remove(usize),
        Poll,
        PutBack,
        Advance(u32),
        Prefer(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0u8..3, 0u8..3, 0usize..7).prop_map(|(key, priority, rows)| Step::Push { key, priority, rows }),
            2 => (0usize..64).prop_map(Step::Remove),
            3 => Just(Step::Poll),
            1 => Just(Step::PutBack),
            2 => (0u32..4).prop_map(Step::Advance),
            1 => (1usize..6).prop_map(Step::Prefer),
        ]
    }

    /// The queue as a plain list, in arrival order.
    struct Model {
        waiting: Vec<(Ticket<u8>, Entry<u8, u8, usize>)>,
        preferred: usize,
        max_delay: Duration,
    }

    impl Model {
        /// What the documented rules say the next batch is.
        fn batch(&self) -> Vec<usize> {
            let mut order: Vec<&Entry<u8, u8, usize>> = self.waiting.iter().map(|(_, entry)| entry).collect();
            order.sort_by_key(|entry| (entry.priority, entry.item));
            let Some(head) = order.first() else { return Vec::new() };
            let mut rows = 0;
            let of_key = order.iter().filter(|entry| entry.key == head.key);
            let fitting = of_key.take_while(|entry| {
                let first = rows == 0;
                rows += entry.rows.max(1);
                first || rows <= self.preferred
            });
            fitting.map(|entry| entry.item).collect()
        }

        fn lane_rows(&self) -> Vec<usize> {
            let keys: BTreeSet<u8> = self.waiting.iter().map(|(_, entry)| entry.key).collect();
            let rows = |key| self.waiting.iter().filter(|(_, e)| e.key == key).map(|(_, e)| e.rows.max(1)).sum();
            keys.into_iter().map(rows).collect()
        }

        fn due(&self) -> Option<Instant> {
            self.waiting.iter().map(|(_, entry)| entry.arrived + self.max_delay).min()
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_rules(
            steps in proptest::collection::vec(step(), 1..80), preferred in 1usize..6, delay in 0u32..4,
        ) {
            let mut now = Instant::now();
            let max_delay = MS * delay;
            let mut batcher = TestBatcher::new(preferred, max_delay);
            let mut model = Model { waiting: Vec::new(), preferred, max_delay };
            let mut gone: Vec<Ticket<u8>> = Vec::new();
            for (item, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Push { key, priority, rows } => {
                        let entry = Entry { priority, ..entry(item, key, rows, now) };
                        model.waiting.push((batcher.push(entry.clone()), entry));
                    }
                    Step::Remove(which) if !model.waiting.is_empty() => {
                        let (ticket, entry) = model.waiting.remove(which % model.waiting.len());
                        prop_assert_eq!(batcher.remove(ticket), Some(entry.item));
                        gone.push(ticket);
                    }
                    Step::Remove(_) => {}
                    Step::PutBack => {
                        if let Poll::Batch(batch) = batcher.poll(now) {
                            batch.into_iter().rev().for_each(|(ticket, entry)| batcher.put_back(ticket, entry));
                        }
                    }
                    Step::Poll => match batcher.poll(now) {
                        Poll::Idle => prop_assert!(model.waiting.is_empty()),
                        Poll::Wait(until) => {
                            prop_assert_eq!(Some(until), model.due());
                            prop_assert!(until > now && model.lane_rows().iter().all(|rows| *rows < model.preferred));
                        }
                        Poll::Batch(batch) => {
                            let batch: Vec<_> = batch.into_iter().map(|(_, entry)| entry).collect();
                            prop_assert!(batch.iter().all(|entry| entry.key == batch[0].key));
                            let rows: usize = batch.iter().map(|entry| entry.rows.max(1)).sum();
                            prop_assert!(batch.len() == 1 || rows <= model.preferred);
                            let taken: Vec<usize> = batch.iter().map(|entry| entry.item).collect();
                            prop_assert_eq!(&taken, &model.batch());
                            gone.extend(model.waiting.iter().filter(|(_, e)| taken.contains(&e.item)).map(|(t, _)| *t));
                            model.waiting.retain(|(_, entry)| !taken.contains(&entry.item));
                        }
                    },
                    Step::Advance(by) => now += MS * by,
                    Step::Prefer(rows) => {
                        batcher.set_preferred_rows(rows);
                        model.preferred = rows;
                    }
                }
                prop_assert_eq!(batcher.len(), model.waiting.len());
                prop_assert_eq!(batcher.bytes(), model.waiting.len() * 10);
                let batches: usize = model.lane_rows().iter().map(|rows| rows.div_ceil(model.preferred)).sum();
                prop_assert_eq!(batcher.batches(), batches);
            }
            prop_assert!(gone.into_iter().all(|ticket| batcher.remove(ticket).is_none()));
            let left: BTreeSet<usize> = batcher.drain().into_iter().collect();
            prop_assert_eq!(left, model.waiting.iter().map(|(_, entry)| entry.item).collect());
            prop_assert!(batcher.is_empty() && batcher.lanes.is_empty() && batcher.full_lanes == 0);
        }
    }
}
