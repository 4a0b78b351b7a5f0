//! Which jobs run together, and when: a queue that is cut into batches. Pure and generic: no clock, no threads, no
//! knowledge of models; the standard library only.
//!
//! Invariants: every entry leaves exactly once, in a batch or by [`Batcher::remove`], unless it is put back: then it
//! stands where it stood. A batch holds entries of one key and at most the preferred rows, or as many as its caller
//! wants, save a single entry that is larger. It starts with the head of the queue (smallest
//! priority, then arrival) and continues in that order within its key, up to the first entry that does not fit: small
//! entries never overtake a large one. Nothing is held back once it has waited `max_delay`.
//!
//! How many rows of a key are a full batch is told with every entry, and the latest word counts: it decides what need not
//! wait for more, and how many batches the queue will make.
//!
//! Callers hand in instants that never go back. Push, remove and taking an entry cost O(log n).

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::ops::Bound;
use std::time::{Duration, Instant};

/// A longer `max_delay` is cut to this: nobody means it, and adding it to an instant cannot overflow.
pub const MAX_DELAY: Duration = Duration::from_secs(3600);

/// More rows than any batch: an entry's rows are counted up to here, so that sums over a queue cannot overflow.
pub(super) const MOST_ROWS: usize = u32::MAX as usize;

/// One waiting job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<K, P, T> {
    /// Only entries with equal keys share a batch.
    pub key: K,
    /// Smaller goes first.
    pub priority: P,
    /// What it takes of a batch's budget; 0 counts as 1.
    pub rows: usize,
    /// Rows of a full batch of its key; more than the preferred ones are these.
    pub full: usize,
    /// What it takes of memory while it waits.
    pub bytes: usize,
    pub arrived: Instant,
    pub item: T,
}

impl<K, P, T> Entry<K, P, T> {
    /// The same entry with another item, and the one it had.
    pub fn replace<U>(self, item: U) -> (Entry<K, P, U>, T) {
        let Entry { key, priority, rows, full, bytes, arrived, item: replaced } = self;
        (Entry { key, priority, rows, full, bytes, arrived, item }, replaced)
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
    rows: usize,
    /// Sum over lanes of their rows in full batches, rounded up.
    batches: usize,
    /// Lanes that hold a full batch.
    full_lanes: usize,
}

#[derive(Debug)]
struct Lane<P> {
    order: BTreeMap<Ticket<P>, usize>,
    rows: usize,
    /// Rows of a full batch, as the last entry had it.
    full: usize,
}

impl<P> Lane<P> {
    /// Batches that its rows make, and whether one of them is full.
    fn counts(&self, preferred_rows: usize) -> (usize, usize) {
        let full = self.full.min(preferred_rows);
        (self.rows.div_ceil(full), usize::from(self.rows >= full))
    }
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
            rows: 0,
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

    /// Rows of the waiting entries.
    pub fn rows(&self) -> usize {
        self.rows
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
        let (rows, full) = (counted(entry.rows), counted(entry.full));
        self.rows += rows;
        if let Some(lane) = self.lanes.get_mut(&entry.key) {
            let before = lane.counts(self.preferred_rows);
            lane.order.insert(ticket, rows);
            lane.rows += rows;
            lane.full = full;
            let after = lane.counts(self.preferred_rows);
            self.recount(before, after);
        } else {
            let lane = Lane { order: BTreeMap::from([(ticket, rows)]), rows, full };
            self.recount((0, 0), lane.counts(self.preferred_rows));
            self.lanes.insert(entry.key.clone(), lane);
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

    /// The entry that the next batch begins with, and the rows that wait with its key.
    pub fn head(&self) -> Option<(&Entry<K, P, T>, usize)> {
        let (_, head) = self.queue.first_key_value()?;
        Some((head, self.lanes.get(&head.key)?.rows))
    }

    /// One that waits.
    pub fn get(&self, ticket: Ticket<P>) -> Option<&Entry<K, P, T>> {
        self.queue.get(&ticket)
    }

    /// At most `rows` of them, and `fits` says whether an entry joins so many rows.
    pub fn poll(
        &mut self,
        now: Instant,
        rows: usize,
        fits: impl FnMut(usize, &Entry<K, P, T>) -> bool,
    ) -> Poll<K, P, T> {
        match self.readiness(now) {
            Readiness::Idle => Poll::Idle,
            Readiness::At(due) => Poll::Wait(due),
            Readiness::Ready => {
                let tickets = self.head_batch(rows.min(self.preferred_rows), fits);
                Poll::Batch(tickets.into_iter().filter_map(|ticket| Some((ticket, self.take(ticket)?))).collect())
            }
        }
    }

    /// Changes the budget for batches not yet taken.
    pub fn set_preferred_rows(&mut self, preferred_rows: usize) {
        self.preferred_rows = counted(preferred_rows);
        let counts = self.lanes.values().map(|lane| lane.counts(self.preferred_rows));
        (self.batches, self.full_lanes) = counts.fold((0, 0), |sum, lane| (sum.0 + lane.0, sum.1 + lane.1));
    }

    pub fn set_max_delay(&mut self, max_delay: Duration) {
        self.max_delay = max_delay.min(MAX_DELAY);
    }

    fn head_batch(&self, most: usize, mut fits: impl FnMut(usize, &Entry<K, P, T>) -> bool) -> Vec<Ticket<P>> {
        let Some(lane) = self.queue.first_key_value().and_then(|(_, head)| self.lanes.get(&head.key)) else {
            return Vec::new();
        };
        let mut rows = 0;
        let mut batch = Vec::new();
        for (ticket, more) in &lane.order {
            let mut joins = || rows + more <= most && self.queue.get(ticket).is_some_and(|entry| fits(rows, entry));
            if !batch.is_empty() && !joins() {
                break;
            }
            rows += more;
            batch.push(*ticket);
        }
        batch
    }

    fn take(&mut self, ticket: Ticket<P>) -> Option<Entry<K, P, T>> {
        let entry = self.queue.remove(&ticket)?;
        self.bytes = self.bytes.saturating_sub(entry.bytes);
        let rows = counted(entry.rows);
        self.rows -= rows;
        if let Some(lane) = self.lanes.get_mut(&entry.key) {
            let before = lane.counts(self.preferred_rows);
            lane.order.remove(&ticket);
            lane.rows -= rows;
            let after = lane.counts(self.preferred_rows);
            if lane.order.is_empty() {
                self.lanes.remove(&entry.key);
            }
            self.recount(before, after);
        }
        Some(entry)
    }

    /// Keeps the sums in step with one lane's change.
    fn recount(&mut self, before: (usize, usize), after: (usize, usize)) {
        self.batches = self.batches + after.0 - before.0;
        self.full_lanes = self.full_lanes + after.1 - before.1;
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
        Entry { key, priority: 0, rows, full: usize::MAX, bytes: 10, arrived, item }
    }

    /// What is given to a worker that takes whatever there is.
    fn all(batcher: &mut TestBatcher, now: Instant) -> Poll<u8, u8, usize> {
        batcher.poll(now, usize::MAX, |_, _| true)
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
        assert_eq!(items(all(&mut batcher, now)), [0, 2], "3 would be a fifth row, and 4 does not overtake it");
        assert_eq!(items(all(&mut batcher, now)), [1, 6]);
        assert_eq!(items(all(&mut batcher, now)), [3, 4]);
        assert_eq!(items(all(&mut batcher, now)), [5], "larger than a batch: alone");
        assert_eq!((all(&mut batcher, now), batcher.bytes(), batcher.batches()), (Poll::Idle, 0, 0));
    }

    #[test]
    fn priority_goes_before_arrival() {
        let now = Instant::now();
        let mut batcher = TestBatcher::new(2, Duration::ZERO);
        for (item, priority) in [9, 5, 9, 1].into_iter().enumerate() {
            batcher.push(Entry { priority, ..entry(item, 0, 1, now) });
        }
        assert_eq!(items(all(&mut batcher, now)), [3, 1]);
        assert_eq!(items(all(&mut batcher, now)), [0, 2]);
    }

    #[test]
    fn a_batch_leaves_when_it_is_full_or_its_time_has_come() {
        let start = Instant::now();
        let mut batcher = TestBatcher::new(2, 5 * MS);
        batcher.push(entry(0, 1, 1, start));
        assert_eq!(all(&mut batcher, start + 4 * MS), Poll::Wait(start + 5 * MS));
        assert_eq!(items(all(&mut batcher, start + 5 * MS)), [0]);
        batcher.push(entry(1, 1, 1, start));
        batcher.push(entry(2, 1, 1, start + MS));
        assert_eq!(items(all(&mut batcher, start + MS)), [1, 2]);
        // An old entry of low priority makes the urgent ones leave early rather than wait behind them.
        batcher.push(Entry { priority: 9, ..entry(3, 1, 1, start) });
        batcher.push(Entry { priority: 1, ..entry(4, 2, 1, start + 4 * MS) });
        assert_eq!(batcher.readiness(start + 4 * MS), Readiness::At(start + 5 * MS));
        assert_eq!(items(all(&mut batcher, start + 5 * MS)), [4]);
        assert_eq!(items(all(&mut batcher, start + 5 * MS)), [3]);
        // A full lane behind a lone head sends the head off too.
        for (item, key) in [(5, 1), (6, 2), (7, 2)] {
            batcher.push(entry(item, key, 1, start));
        }
        assert_eq!(items(all(&mut batcher, start)), [5]);
        assert_eq!(items(all(&mut batcher, start)), [6, 7]);
    }

    #[test]
    fn an_absurd_delay_neither_overflows_nor_outlives_its_cut() {
        let start = Instant::now();
        let mut batcher = TestBatcher::new(2, Duration::MAX);
        for item in [0, 0] {
            batcher.push(entry(item, 1, usize::MAX, start));
        }
        assert_eq!((items(all(&mut batcher, start)), items(all(&mut batcher, start))), (vec![0], vec![0]));
        batcher.push(entry(1, 1, 1, start));
        assert_eq!(all(&mut batcher, start), Poll::Wait(start + MAX_DELAY));
        batcher.set_max_delay(Duration::ZERO);
        assert_eq!(items(all(&mut batcher, start)), [1]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push {
            key: u8,
            priority: u8,
            rows: usize,
            full: usize,
        },
        Remove(usize),
        /// At most so many rows, and of entries with more than so many rows only one.
        Poll(usize, usize),
        PutBack,
        Advance(u32),
        Prefer(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0u8..3, 0u8..3, 0usize..7, 0usize..9)
                .prop_map(|(key, priority, rows, full)| Step::Push { key, priority, rows, full }),
            2 => (0usize..64).prop_map(Step::Remove),
            3 => (1usize..9, 0usize..7).prop_map(|(rows, small)| Step::Poll(rows, small)),
            1 => Just(Step::PutBack),
            2 => (0u32..4).prop_map(Step::Advance),
            1 => (1usize..6).prop_map(Step::Prefer),
        ]
    }

    /// The queue as a plain list, in arrival order.
    struct Model {
        waiting: Vec<(Ticket<u8>, Entry<u8, u8, usize>)>,
        /// By key, as last told.
        full: BTreeMap<u8, usize>,
        preferred: usize,
        max_delay: Duration,
    }

    impl Model {
        /// What the documented rules say the next batch is.
        fn batch(&self, most: usize, small: usize) -> Vec<usize> {
            let mut order: Vec<&Entry<u8, u8, usize>> = self.waiting.iter().map(|(_, entry)| entry).collect();
            order.sort_by_key(|entry| (entry.priority, entry.item));
            let Some(head) = order.first() else { return Vec::new() };
            let mut rows = 0;
            let of_key = order.iter().filter(|entry| entry.key == head.key);
            let fitting = of_key.take_while(|entry| {
                let first = rows == 0;
                rows += entry.rows.max(1);
                first || (rows <= self.preferred.min(most) && entry.rows <= small)
            });
            fitting.map(|entry| entry.item).collect()
        }

        /// With the rows of a full batch.
        fn lane_rows(&self) -> Vec<(usize, usize)> {
            let keys: BTreeSet<u8> = self.waiting.iter().map(|(_, entry)| entry.key).collect();
            let rows = |key| self.waiting.iter().filter(|(_, e)| e.key == key).map(|(_, e)| e.rows.max(1)).sum();
            keys.into_iter().map(|key| (rows(key), self.full[&key].min(self.preferred).max(1))).collect()
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
            let mut model = Model { waiting: Vec::new(), full: BTreeMap::new(), preferred, max_delay };
            let mut gone: Vec<Ticket<u8>> = Vec::new();
            for (item, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Push { key, priority, rows, full } => {
                        let entry = Entry { priority, full, ..entry(item, key, rows, now) };
                        model.full.insert(key, full);
                        model.waiting.push((batcher.push(entry.clone()), entry));
                    }
                    Step::Remove(which) if !model.waiting.is_empty() => {
                        let (ticket, entry) = model.waiting.remove(which % model.waiting.len());
                        prop_assert_eq!(batcher.remove(ticket), Some(entry.item));
                        gone.push(ticket);
                    }
                    Step::Remove(_) => {}
                    Step::PutBack => {
                        if let Poll::Batch(batch) = all(&mut batcher, now) {
                            for (ticket, entry) in batch.into_iter().rev() {
                                model.full.insert(entry.key, entry.full);
                                batcher.put_back(ticket, entry);
                            }
                        }
                    }
                    Step::Poll(most, small) => match batcher.poll(now, most, |_, entry| entry.rows <= small) {
                        Poll::Idle => prop_assert!(model.waiting.is_empty()),
                        Poll::Wait(until) => {
                            prop_assert_eq!(Some(until), model.due());
                            prop_assert!(until > now && model.lane_rows().iter().all(|(rows, full)| rows < full));
                        }
                        Poll::Batch(batch) => {
                            let batch: Vec<_> = batch.into_iter().map(|(_, entry)| entry).collect();
                            prop_assert!(batch.iter().all(|entry| entry.key == batch[0].key));
                            let rows: usize = batch.iter().map(|entry| entry.rows.max(1)).sum();
                            prop_assert!(batch.len() == 1 || rows <= model.preferred.min(most));
                            let taken: Vec<usize> = batch.iter().map(|entry| entry.item).collect();
                            prop_assert_eq!(&taken, &model.batch(most, small));
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
                let batches: usize = model.lane_rows().iter().map(|(rows, full)| rows.div_ceil(*full)).sum();
                prop_assert_eq!(batcher.batches(), batches);
                prop_assert_eq!(batcher.rows(), model.lane_rows().iter().map(|(rows, _)| rows).sum::<usize>());
            }
            prop_assert!(gone.into_iter().all(|ticket| batcher.remove(ticket).is_none()));
            let left: BTreeSet<usize> = batcher.drain().into_iter().collect();
            prop_assert_eq!(left, model.waiting.iter().map(|(_, entry)| entry.item).collect());
            prop_assert!(batcher.is_empty() && batcher.lanes.is_empty() && batcher.full_lanes == 0);
        }
    }
}
