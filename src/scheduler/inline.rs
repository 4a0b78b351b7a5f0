//! Runs a request on the thread that submits it, where handing it to a worker and back would take longer than the run.
//!
//! Owns whether it may, and the run. Invariants: nothing is overtaken, since the queue is empty; nothing is waited for,
//! since the instance is idle and promised to nobody; the thread is held for about [`Config::longest_inline`]. The compute
//! gate is for workers: I/O threads share the cores with them anyway, and spend more on a JSON body than on such a run.
//!
//! Runs on the caller's thread, an I/O thread mostly. What the caller is not told of the instance, a panic for one, is
//! settled by the guard that holds it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[cfg(doc)]
use super::Config;
use super::{Answer, Positions, Shared, blame, lock};
use crate::backend::Instance;
use crate::error::Result;
use crate::monitor::events::BatchExecuted;
use crate::request::{Permit, Prepared, Timings};

/// Inputs of so many bytes or more are a worker's.
const MOST_BYTES: usize = 1 << (SIZES - 1);
const SIZES: usize = 20;
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

    /// A run took that long; with other requests, one of so many bytes alone takes no longer.
    pub(super) fn learn(&self, bytes: usize, took: Duration) {
        let Some(size) = size(bytes) else { return };
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        let before = self.longest[size].load(Ordering::Relaxed);
        // What two threads learn at once may be lost: more is learned all the time.
        self.longest[size].store(took.max(before - before.saturating_sub(took).div_ceil(FALL)), Ordering::Relaxed);
    }
}

fn size(bytes: usize) -> Option<usize> {
    (bytes < MOST_BYTES).then(|| bytes.checked_ilog2().map_or(0, |digits| digits as usize + 1))
}

impl Shared {
    /// Errors: what the engine says of this request.
    pub(super) fn run_inline(self: &Arc<Self>, prepared: Prepared, permit: Permit) -> Result<Inline> {
        let bytes = prepared.input_bytes();
        let started = Instant::now();
        let expired = prepared.deadline.is_some_and(|deadline| deadline <= started);
        let expected =
            self.quickness.expect(bytes).filter(|expected| *expected <= self.config.longest_inline && !expired);
        let Some(mut turn) = expected.and_then(|_| self.inline_turn()) else {
            return Ok(Inline::NotNow(prepared, permit));
        };
        let result = self.run_engine(&mut turn.instance, &[&prepared.inputs]);
        let compute = started.elapsed();
        self.quickness.learn(bytes, compute);
        drop(turn);
        self.report(&prepared, compute, result.is_err());
        let outputs = result.map_err(|error| blame(&error))?;
        self.monitor.fold(&outputs);
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

    /// An instance of one thread on the CPU, if it is this request's turn.
    fn inline_turn(self: &Arc<Self>) -> Option<Turn<'_>> {
        let mut state = lock(&self.state);
        let waits = !self.config.max_delay.is_zero();
        if waits || state.closed || !state.batcher.is_empty() {
            return None;
        }
        let group = self.engines.iter().position(|engine| engine.cores == 1)?;
        if !state.has_spare(group) {
            return None;
        }
        let instance = state.take_idle(group);
        state.inline += 1;
        Some(Turn { shared: self, group, instance })
    }
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
    fn a_size_is_judged_by_its_slow_runs_until_they_are_long_past() {
        let micros = Duration::from_micros;
        let quickness = Quickness::default();
        assert_eq!(quickness.expect(120), None, "nothing has run");
        quickness.learn(120, micros(4));
        assert_eq!(quickness.expect(127), Some(micros(4)));
        assert_eq!((quickness.expect(128), quickness.expect(0)), (None, None), "other sizes");
        quickness.learn(120, micros(800));
        quickness.learn(120, micros(4));
        assert!(quickness.expect(120) > Some(DEFAULT_LONGEST_INLINE), "one quick run proves little");
        (0..64).for_each(|_| quickness.learn(120, micros(4)));
        assert!(quickness.expect(120) < Some(micros(5)));
        quickness.learn(MOST_BYTES, micros(1));
        assert_eq!(quickness.expect(MOST_BYTES), None, "too large whatever it took");
        quickness.learn(0, Duration::ZERO);
        assert_eq!(quickness.expect(0), Some(Duration::from_nanos(1)));
    }
}
