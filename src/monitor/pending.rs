//! What requests and runs told of one version: counts, durations and sizes on their way to the exporter, and the
//! statistics.
//!
//! Invariants: nothing is lost, and nothing shown twice: all is handed on before a scrape, and when the version goes.
//! What is kept until then is counts, whose number does not grow.
//!
//! Threads: any; each counts in its own share.

use std::time::Duration;

use super::export::Histograms;
use super::histogram::Histogram;
use super::latency::{Handles, PROTOCOLS};
use super::names::{self, BATCH_BUCKETS, DURATION_BUCKETS};
use super::shares::Shares;
use super::statistics::Statistics;
use crate::request::{Protocol, Timings};

#[derive(Default)]
pub(super) struct Pending(Shares<Told>);

#[derive(Default)]
struct Told {
    counted: Counted,
    /// Since the version was loaded: these stay.
    statistics: Statistics,
}

/// Since it was last handed on.
struct Counted {
    /// By protocol.
    request_duration: [Histogram; PROTOCOLS.len()],
    queue_duration: Histogram,
    infer_duration: Histogram,
    batch_size: Histogram,
    failures: u64,
    inferences: u64,
    /// Of sequences: as sent, and filled up.
    positions: [u64; 2],
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
    pub(super) fn answered(&self, protocol: Protocol, duration: Duration, timings: &Timings) {
        self.0.count(Told::default, |told| {
            told.statistics.answered(duration, timings);
            told.counted.request_duration[protocol as usize].add(duration.as_secs_f64());
            told.counted.queue_duration.add(timings.queue.as_secs_f64());
        });
    }

    pub(super) fn failed(&self, duration: Duration) {
        self.0.count(Told::default, |told| told.statistics.failed(duration));
    }

    /// `now_ms` is since the epoch.
    pub(super) fn executed(&self, run: &Executed, now_ms: u64) {
        self.0.count(Told::default, |told| {
            if !run.failed {
                told.statistics.executed(run.rows, run.phases, now_ms);
            }
            told.counted.executed(run);
        });
    }

    pub(super) fn hand_on(&self, handles: &Handles) {
        let mut histograms = handles.exporter.histograms();
        let mut all = Counted::default();
        self.0.for_each(|told| all.take(&mut told.counted));
        all.hand_on(handles, &mut histograms);
    }

    pub(super) fn statistics(&self) -> Statistics {
        let mut sum = Statistics::default();
        self.0.for_each_at_once(|told| sum.merge(&told.statistics));
        sum
    }
}

impl Default for Counted {
    fn default() -> Counted {
        let durations = || Histogram::new(DURATION_BUCKETS);
        Counted {
            request_duration: PROTOCOLS.map(|_| durations()),
            queue_duration: durations(),
            infer_duration: durations(),
            batch_size: Histogram::new(BATCH_BUCKETS),
            failures: 0,
            inferences: 0,
            positions: [0; 2],
        }
    }
}

impl Counted {
    fn executed(&mut self, run: &Executed) {
        let Executed { rows, positions, phases: [_, compute, _], failed } = *run;
        self.batch_size.add(rows as f64);
        self.infer_duration.add(compute.as_secs_f64());
        if failed {
            self.failures += 1;
        } else {
            self.inferences += rows as u64;
        }
        self.positions[0] += positions[0] as u64;
        self.positions[1] += positions[1] as u64;
    }

    /// Adds what another counted, which begins anew where it is: its memory is its thread's.
    fn take(&mut self, other: &mut Counted) {
        let mine = self.histograms_mut();
        mine.into_iter().zip(other.histograms_mut()).for_each(|(mine, theirs)| mine.take(theirs));
        let counts = self.counts_mut();
        counts.into_iter().zip(other.counts_mut()).for_each(|(mine, theirs)| *mine += std::mem::take(theirs));
    }

    fn histograms_mut(&mut self) -> [&mut Histogram; 5] {
        let [http, grpc] = &mut self.request_duration;
        [http, grpc, &mut self.queue_duration, &mut self.infer_duration, &mut self.batch_size]
    }

    fn counts_mut(&mut self) -> [&mut u64; 4] {
        let [data, padding] = &mut self.positions;
        [&mut self.failures, &mut self.inferences, data, padding]
    }

    fn hand_on(&self, handles: &Handles, histograms: &mut Histograms) {
        let (model, version) = (&*handles.model, &*handles.version);
        for (protocol, durations) in PROTOCOLS.into_iter().zip(&self.request_duration) {
            handles.requests(protocol, None).increment(durations.count());
            histograms.add(&names::REQUEST_DURATION, &[model, version, protocol.label()], durations);
        }
        histograms.add(&names::QUEUE_DURATION, &[model, version], &self.queue_duration);
        histograms.add(&names::INFER_DURATION, &[model, version], &self.infer_duration);
        histograms.add(&names::BATCH_SIZE, &[model, version], &self.batch_size);
        handles.executions.increment(self.batch_size.count());
        handles.execution_failures.increment(self.failures);
        handles.inferences.increment(self.inferences);
        if self.positions[0] > 0 {
            let [sent, filled] = handles.positions();
            sent.increment(self.positions[0]);
            filled.increment(self.positions[1]);
        }
    }
}
