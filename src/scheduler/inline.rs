//! Runs requests on the thread that submits them, where handing them to a worker and back would take longer than the run.
//!
//! A request that comes alone runs at once. Where they come so fast that several are there whenever a thread looks, the
//! first of them, the collector, lets the thread read the others before it runs all that are queued as one batch: a run of
//! many takes little longer than a run of one.
//!
//! Owns whether it may be, and the run. Invariants: nothing is overtaken: what runs at once finds an empty queue, and a
//! collector takes what a worker would; nothing is waited for, since the instance is idle and promised to nobody; the
//! thread is held for about [`Config::longest_inline`], and by a large request for as much again as by reading it. What a
//! collector finds that takes longer, or fails together, it leaves to a worker. The compute gate is for workers: I/O
//! threads share the cores with them anyway, and spend more on a JSON body than on such a run.
//!
//! Runs on the caller's thread, an I/O thread mostly. What the caller is not told of the instance, a panic for one, is
//! settled by the guard that holds it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[cfg(doc)]
use super::Config;
use super::cost::CostModel;
use super::{Answer, Job, Positions, Shared, State, Ticket, Worker, blame, extent_of, lock};
use crate::backend::Instance;
use crate::error::Result;
use crate::monitor::events::BatchExecuted;
use crate::request::{Permit, Prepared, Timings};

/// Inputs of so many bytes or more are a worker's.
const MOST_BYTES: usize = 1 << (SIZES - 1);
const SIZES: usize = 22;
/// Reading so many bytes takes a thread a nanosecond at least.
const READ_IN_A_NANOSECOND: usize = 4;
/// Of the way down to what a run took, in one step. The way up takes one step: most that is slow was only interrupted, but
/// a model that is slow now and then must not be taken for quick.
const FALL: u64 = 2;

pub(super) enum Inline {
    Answered(Answer),
    NotNow(Prepared, Permit),
}

/// The longest that a request's run took lately, by the size of its inputs: models whose time depends on more than that
/// are judged by their slow runs.
#[derive(Default)]
pub(super) struct Quickness {
    /// Nanoseconds, 0 where nothing has run yet, by the binary digits of the inputs' bytes.
    longest: [AtomicU64; SIZES],
}

impl Quickness {
    /// What a run of one request with so many bytes may take. `None`: not known, or too large to ask.
    fn expect(&self, bytes: usize) -> Option<Duration> {
        let nanos = self.longest[size(bytes)?].load(Ordering::Relaxed);
        (nanos > 0).then(|| Duration::from_nanos(nanos))
    }

    /// A run took that long; with other requests, one of so many bytes alone takes no longer. One that failed may have
    /// ended early: it proves nothing but that it took so long.
    pub(super) fn learn(&self, bytes: usize, took: Duration, whole: bool) {
        let Some(size) = size(bytes) else { return };
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        let before = self.longest[size].load(Ordering::Relaxed);
        let down = if whole { before.saturating_sub(took).div_ceil(FALL) } else { 0 };
        // What two threads learn at once may be lost: more is learned all the time.
        self.longest[size].store(took.max(before - down), Ordering::Relaxed);
    }
}

/// Whether requests come so fast that it pays to collect them.
pub(super) struct Pace {
    /// Requests that ran at once since others were last looked for; as many as `patience` while it pays.
    alone: AtomicU32,
    /// Requests until the next look: more after each that found nobody.
    patience: AtomicU32,
}

/// Looking for others costs a turn of the thread's scheduler.
const LEAST_PATIENCE: u32 = 32;
const MOST_PATIENCE: u32 = 512;
/// Requests in a batch that pay for queueing them and waking their callers.
const WORTH_COLLECTING: usize = 3;

impl Default for Pace {
    fn default() -> Pace {
        Pace { alone: AtomicU32::new(0), patience: AtomicU32::new(LEAST_PATIENCE) }
    }
}

impl Pace {
    fn collects(&self) -> bool {
        let (alone, patience) = (self.alone.load(Ordering::Relaxed), self.patience.load(Ordering::Relaxed));
        self.alone.store((alone + 1).min(patience), Ordering::Relaxed);
        alone >= patience
    }

    pub(super) fn collected(&self, requests: usize) {
        let before = self.patience.load(Ordering::Relaxed);
        let (alone, patience) = match requests {
            WORTH_COLLECTING.. => (LEAST_PATIENCE, LEAST_PATIENCE),
            // Company that does not pay yet.
            2 => (0, LEAST_PATIENCE),
            1 => (0, (before * 2).min(MOST_PATIENCE)),
            // A worker was there first.
            0 => (0, before),
        };
        self.patience.store(patience, Ordering::Relaxed);
        self.alone.store(alone, Ordering::Relaxed);
    }
}

fn size(bytes: usize) -> Option<usize> {
    (bytes < MOST_BYTES).then(|| bytes.checked_ilog2().map_or(0, |digits| digits as usize + 1))
}

impl Shared {
    /// Errors: what the engine says of this request.
    pub(super) fn run_inline(self: &Arc<Self>, prepared: Prepared, permit: Permit) -> Result<Inline> {
        let (bytes, started) = (prepared.input_bytes(), Instant::now());
        let expired = prepared.deadline.is_some_and(|deadline| deadline <= started);
        let at_once = !expired && self.runs_at_once(bytes);
        let Some(mut turn) = at_once.then(|| self.inline_turn(&prepared, bytes)).flatten() else {
            return Ok(Inline::NotNow(prepared, permit));
        };
        let result = self.run_engine(&mut turn.instance, &[&prepared.inputs]);
        let compute = started.elapsed();
        drop(turn);
        self.report(&prepared, compute, result.is_err());
        if let Ok(outputs) = &result {
            self.monitor.fold(outputs, compute);
        }
        // What keeps the thread, all of it.
        self.quickness.learn(bytes, started.elapsed(), result.is_ok());
        let outputs = result.map_err(|error| blame(&error))?;
        let outputs = prepared.outputs.iter().map(|position| outputs[*position].clone()).collect();
        let timings = Timings { compute, batch_rows: prepared.rows, ..Timings::default() };
        Ok(Inline::Answered(Answer { outputs, timings, permit }))
    }

    fn report(&self, prepared: &Prepared, compute: Duration, failed: bool) {
        let Positions { data, padding } = Positions::alone(prepared.rows, prepared.length);
        let none = Duration::ZERO;
        let (version, rows) = (&self.monitor, prepared.rows);
        let (input, gather_and_compute, split) = (none, compute, none);
        BatchExecuted { version, requests: 1, rows, data, padding, input, gather_and_compute, split, failed }.emit();
    }

    /// One that may run alone only is not one of those that are collected.
    pub(super) fn runs_at_once(&self, bytes: usize) -> bool {
        if self.ran_within(bytes, self.config.longest_inline) {
            !self.pace.collects()
        } else {
            self.ran_within(bytes, self.longest_alone(bytes))
        }
    }

    /// By what such requests took lately, on whatever they brought.
    fn ran_within(&self, bytes: usize, longest: Duration) -> bool {
        self.quickness.expect(bytes).is_some_and(|expected| expected <= longest)
    }

    /// For a request that runs alone: no longer than any may take, and what reading it took the thread before.
    fn longest_alone(&self, bytes: usize) -> Duration {
        let longest = self.config.longest_inline;
        let reading = Duration::from_nanos((bytes / READ_IN_A_NANOSECOND) as u64);
        if longest.is_zero() { longest } else { longest.saturating_add(reading) }
    }

    /// By what such requests took lately, and by what runs of so many rows of such an extent cost.
    pub(super) fn is_quick(&self, costs: &CostModel, job: &Job) -> bool {
        let longest = self.config.longest_inline;
        self.ran_within(job.bytes(), longest) && runs_within(costs, job.rows, job.extent, longest)
    }

    /// As many as a run may have that keeps a thread for no longer than may be.
    pub(super) fn quick_rows(&self, costs: &CostModel, rows: usize, extent: Option<usize>) -> usize {
        let longest = self.config.longest_inline;
        let halved = std::iter::successors(Some(rows.max(1)), |rows| Some(rows / 2).filter(|rows| *rows > 0));
        halved.into_iter().find(|rows| runs_within(costs, *rows, extent, longest)).unwrap_or(1)
    }

    /// The group that is asked first, if it computes on one core and has an instance for a thread that is not its own.
    /// Versions whose owners want company for their requests lend none.
    fn lends(&self, state: &State) -> Option<usize> {
        let group = state.front();
        let lends = self.config.max_delay.is_zero() && self.engines[group].cores == 1;
        (lends && !state.closed && state.has_spare(group)).then_some(group)
    }

    /// For the request that was just queued there: a worker to run it and what comes until then, here, where none is on
    /// its way.
    pub(super) fn collector(self: &Arc<Self>, state: &mut State, ticket: Ticket) -> Option<Worker> {
        let group = self.lends(state)?;
        let nobody_comes = state.slots.iter().all(|slots| slots.heading == 0);
        let quick =
            state.batcher.get(ticket).is_some_and(|entry| self.is_quick(state.limits[group].costs(), &entry.item));
        (nobody_comes && quick).then(|| Worker::lend(self, state, group))
    }

    /// Lets this thread look after its other connections, and then runs what they have brought, too. A task of its own: the
    /// caller's may be left alone by a client that reads nothing, and others wait for this run.
    pub(super) fn collect(self: &Arc<Self>, collector: Worker) {
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            tokio::task::yield_now().await;
            shared.pace.collected(collector.one_turn());
        });
    }

    /// An instance of one thread on the CPU, if it is this request's turn.
    fn inline_turn(self: &Arc<Self>, prepared: &Prepared, bytes: usize) -> Option<Turn<'_>> {
        let mut state = lock(&self.state);
        let group = self.lends(&state).filter(|_| state.batcher.is_empty())?;
        if !runs_within(state.limits[group].costs(), prepared.rows, extent_of(prepared), self.longest_alone(bytes)) {
            return None;
        }
        let instance = state.take_idle(group);
        state.inline += 1;
        Some(Turn { shared: self, group, instance })
    }
}

/// As far as it is known what so many rows of such an extent cost.
fn runs_within(costs: &CostModel, rows: usize, extent: Option<usize>, longest: Duration) -> bool {
    costs.predict(rows, extent).is_none_or(|expected| expected <= longest)
}

/// An instance on loan to the thread that runs its request itself.
struct Turn<'a> {
    shared: &'a Arc<Shared>,
    group: usize,
    /// `None` after a panic.
    instance: Option<Box<dyn Instance>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.inline -= 1;
        match self.instance.take() {
            Some(instance) => state.instances.push((self.group, instance)),
            None => state.vacate(self.group, false),
        }
        let call = self.shared.summon(&mut state);
        let closed = state.closed;
        drop(state);
        self.shared.wake(call, None);
        if closed {
            self.shared.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::DEFAULT_LONGEST_INLINE;

    #[test]
    fn others_are_looked_for_more_seldom_where_none_come() {
        let pace = Pace::default();
        let until_the_next_look = || (0..).take_while(|_| !pace.collects()).count();
        for expected in [32, 64, 128, 256, 512, 512] {
            assert_eq!(until_the_next_look(), expected);
            pace.collected(1);
        }
        assert_eq!(until_the_next_look(), 512);
        pace.collected(WORTH_COLLECTING);
        assert_eq!([until_the_next_look(), until_the_next_look()], [0, 0], "as long as it pays");
        pace.collected(2);
        for requests in [0, 0, 1] {
            assert_eq!(until_the_next_look(), 32);
            pace.collected(requests);
        }
        assert_eq!(until_the_next_look(), 64);
    }

    #[test]
    fn a_size_is_judged_by_its_slow_runs_until_they_are_long_past() {
        let micros = Duration::from_micros;
        let quickness = Quickness::default();
        assert_eq!(quickness.expect(120), None, "nothing has run");
        quickness.learn(120, micros(4), true);
        assert_eq!(quickness.expect(127), Some(micros(4)));
        assert_eq!((quickness.expect(128), quickness.expect(0)), (None, None), "other sizes");
        quickness.learn(120, micros(800), true);
        quickness.learn(120, micros(4), true);
        assert!(quickness.expect(120) > Some(DEFAULT_LONGEST_INLINE), "one quick run proves little");
        (0..64).for_each(|_| quickness.learn(120, micros(4), true));
        assert!(quickness.expect(120) < Some(micros(5)));
        quickness.learn(120, micros(70), false);
        (0..9).for_each(|_| quickness.learn(120, micros(1), false));
        assert_eq!(quickness.expect(120), Some(micros(70)), "what failed may have ended early");
        quickness.learn(MOST_BYTES, micros(1), true);
        assert_eq!(quickness.expect(MOST_BYTES), None, "too large whatever it took");
        quickness.learn(0, Duration::ZERO, true);
        assert_eq!(quickness.expect(0), Some(Duration::from_nanos(1)));
    }
}
