//! What requests and runs told of one version: durations and sizes on their way to the exporter, and the statistics.
//!
//! Kept by thread, since threads that count in one place hand its cache lines to and fro, which takes longer than
//! counting. Invariants: a thread's share holds at most [`MOST`] of each before it is handed on, or
//! [`MOST_DURING_SCRAPE`] while a scrape is written, and nothing is lost: all is handed on before a scrape, every few
//! seconds, and when the version goes.
//!
//! Threads: any. A share's lock is taken by its thread, or the few that have one together, and by those who read.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use super::export::Recording;
use super::latency::{Handles, PROTOCOLS};
use super::lock;
use super::statistics::Statistics;
use crate::request::{Protocol, Timings};

/// As many threads as read requests on a large machine, and more workers than run at once on a small one.
const SHARES: usize = 8;
/// Small enough that nobody waits for them to be handed on.
const MOST: usize = 64;
/// Few enough not to be noticed, and more than come in the milliseconds that a scrape takes.
const MOST_DURING_SCRAPE: usize = 16 * MOST;

#[derive(Default)]
pub(super) struct Pending([Share; SHARES]);

/// On cache lines of its own; processors fetch them in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Share(Mutex<Told>);

#[derive(Default)]
struct Told {
    answered: Vec<Answered>,
    executed: Vec<Executed>,
    /// Since the version was loaded: these stay.
    statistics: Statistics,
}

struct Answered {
    protocol: Protocol,
    duration: Duration,
    queue: Duration,
}

/// One run.
pub(super) struct Executed {
    pub(super) rows: usize,
    /// Positions of sequences: as sent, and filled up.
    pub(super) positions: [usize; 2],
    pub(super) phases: [Duration; 3],
    pub(super) failed: bool,
}

impl Pending {
    pub(super) fn answered(&self, handles: &Handles, protocol: Protocol, duration: Duration, timings: &Timings) {
        let mut told = self.mine();
        told.statistics.answered(duration, timings);
        told.answered.push(Answered { protocol, duration, queue: timings.queue });
        let kept = told.answered.len();
        told.hand_on_enough(kept, handles);
    }

    pub(super) fn failed(&self, duration: Duration) {
        self.mine().statistics.failed(duration);
    }

    /// `now_ms` is since the epoch.
    pub(super) fn executed(&self, handles: &Handles, run: Executed, now_ms: u64) {
        let mut told = self.mine();
        if !run.failed {
            told.statistics.executed(run.rows, run.phases, now_ms);
        }
        told.executed.push(run);
        let kept = told.executed.len();
        told.hand_on_enough(kept, handles);
    }

    pub(super) fn hand_on(&self, handles: &Handles) {
        self.0.iter().for_each(|share| lock(&share.0).hand_on(handles, &handles.exporter.recording()));
    }

    pub(super) fn statistics(&self) -> Statistics {
        let mut sum = Statistics::default();
        // As of one moment. Nobody else holds more than one.
        let all = self.0.each_ref().map(|share| lock(&share.0));
        all.iter().for_each(|told| sum.merge(&told.statistics));
        sum
    }

    /// The calling thread's share.
    fn mine(&self) -> MutexGuard<'_, Told> {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local!(static MINE: Cell<usize> = Cell::new(THREADS.fetch_add(1, Ordering::Relaxed) % SHARES));
        lock(&self.0[MINE.get()].0)
    }
}

impl Told {
    /// Where so many are kept that it is worth it.
    fn hand_on_enough(&mut self, kept: usize, handles: &Handles) {
        let recording = match kept {
            0..MOST => None,
            MOST..MOST_DURING_SCRAPE => handles.exporter.try_recording(),
            _ => Some(handles.exporter.recording()),
        };
        if let Some(recording) = recording {
            self.hand_on(handles, &recording);
        }
    }

    fn hand_on(&mut self, handles: &Handles, _: &Recording) {
        for protocol in PROTOCOLS {
            let of_it = self.answered.iter().filter(|answered| answered.protocol as usize == protocol as usize);
            let mut count = 0;
            for answered in of_it {
                count += 1;
                handles.request_duration(protocol).record(answered.duration.as_secs_f64());
                handles.queue_duration().record(answered.queue.as_secs_f64());
            }
            if count > 0 {
                handles.requests(protocol, None).increment(count);
            }
        }
        self.answered.clear();
        for Executed { rows, positions: [data, padding], phases: [_, compute, _], failed } in self.executed.drain(..) {
            handles.executions.increment(1);
            if failed {
                handles.execution_failures.increment(1);
            } else {
                handles.inferences.increment(rows as u64);
            }
            handles.batch_size().record(rows as f64);
            if data > 0 {
                let [sent, filled] = handles.positions();
                sent.increment(data as u64);
                filled.increment(padding as u64);
            }
            handles.infer_duration().record(compute.as_secs_f64());
        }
    }
}
