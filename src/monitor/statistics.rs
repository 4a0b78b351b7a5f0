//! What clients ask of one version over the protocols: counts and durations since it was loaded, as Triton counts them.
//!
//! Written by the same events as the metrics, of which these are the sums that a client can read without Prometheus.
//! Requests and executions are counted apart: requests that share a batch each count its durations in full.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::request::Timings;

/// Batch sizes that are counted apart, by each thread and in what is told; executions of other sizes are in the totals only.
const MAX_BATCH_SIZES: usize = 128;

/// So many, and how long they took together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    pub count: u64,
    pub ns: u64,
}

impl Total {
    fn add(&mut self, duration: Duration) {
        self.count += 1;
        self.ns = self.ns.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    fn merge(&mut self, other: Total) {
        self.count += other.count;
        self.ns = self.ns.saturating_add(other.ns);
    }
}

/// One execution's phases: before the engine, the engine (which gathers its inputs itself), after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compute {
    pub input: Total,
    pub infer: Total,
    pub output: Total,
}

impl Compute {
    fn add(&mut self, input: Duration, infer: Duration, output: Duration) {
        self.input.add(input);
        self.infer.add(infer);
        self.output.add(output);
    }

    fn merge(&mut self, other: &Compute) {
        self.input.merge(other.input);
        self.infer.merge(other.infer);
        self.output.merge(other.output);
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// When the last successful execution ended, in milliseconds since the epoch; 0 before the first.
    pub last_inference_ms: u64,
    /// Rows of successful executions.
    pub inferences: u64,
    /// Successful ones: a failed batch counts once its parts succeed.
    pub executions: u64,
    /// Requests that were answered, from admission to the answer.
    pub success: Total,
    /// Requests that this version was chosen for and that ended otherwise, for whatever reason.
    pub fail: Total,
    /// Of answered requests.
    pub queue: Total,
    /// Of answered requests.
    pub compute: Compute,
    /// Of successful executions, by rows.
    pub batches: BTreeMap<usize, Compute>,
}

impl Statistics {
    pub(super) fn answered(&mut self, duration: Duration, timings: &Timings) {
        self.success.add(duration);
        self.queue.add(timings.queue);
        self.compute.add(timings.input, timings.compute, timings.split);
    }

    pub(super) fn failed(&mut self, duration: Duration) {
        self.fail.add(duration);
    }

    /// `now_ms` is since the epoch. A clock that is set back does not take the last inference back.
    pub(super) fn executed(&mut self, rows: usize, [input, infer, output]: [Duration; 3], now_ms: u64) {
        self.last_inference_ms = self.last_inference_ms.max(now_ms);
        self.inferences += rows as u64;
        self.executions += 1;
        if let Some(batches) = self.of_size(rows) {
            batches.add(input, infer, output);
        }
    }

    /// Those that another thread counted.
    pub(super) fn merge(&mut self, other: &Statistics) {
        self.last_inference_ms = self.last_inference_ms.max(other.last_inference_ms);
        self.inferences += other.inferences;
        self.executions += other.executions;
        self.success.merge(other.success);
        self.fail.merge(other.fail);
        self.queue.merge(other.queue);
        self.compute.merge(&other.compute);
        for (rows, compute) in &other.batches {
            if let Some(batches) = self.of_size(*rows) {
                batches.merge(compute);
            }
        }
    }

    fn of_size(&mut self, rows: usize) -> Option<&mut Compute> {
        let counted = self.batches.len() < MAX_BATCH_SIZES || self.batches.contains_key(&rows);
        counted.then(|| self.batches.entry(rows).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn requests_and_executions_are_counted_apart() {
        let mut statistics = Statistics::default();
        statistics.executed(3, [us(1), us(20), us(3)], 1000);
        let timings =
            Timings { queue: us(5), input: us(1), compute: us(20), split: us(3), batch_rows: 3, ..Timings::default() };
        statistics.answered(us(40), &timings);
        statistics.answered(us(50), &timings);
        statistics.failed(us(7));
        statistics.executed(1, [us(1), us(10), us(0)], 900);
        statistics.executed(3, [us(1), us(30), us(3)], 1100);
        let total = |count, micros: u64| Total { count, ns: micros * 1000 };
        assert_eq!((statistics.inferences, statistics.executions, statistics.last_inference_ms), (7, 3, 1100));
        assert_eq!((statistics.success, statistics.fail, statistics.queue), (total(2, 90), total(1, 7), total(2, 10)));
        assert_eq!(
            statistics.compute,
            Compute { input: total(2, 2), infer: total(2, 40), output: total(2, 6) },
            "each request counts its batch's durations"
        );
        let batches = [
            (1, Compute { input: total(1, 1), infer: total(1, 10), output: total(1, 0) }),
            (3, Compute { input: total(2, 2), infer: total(2, 50), output: total(2, 6) }),
        ];
        assert_eq!(statistics.batches, batches.into());
        let mut sum = statistics.clone();
        sum.merge(&statistics);
        assert_eq!((sum.inferences, sum.executions, sum.last_inference_ms), (14, 6, 1100));
        assert_eq!((sum.success, sum.fail, sum.queue), (total(4, 180), total(2, 14), total(4, 20)));
        assert_eq!((sum.compute.infer, sum.batches[&3].infer), (total(4, 80), total(4, 100)));
    }

    #[test]
    fn batch_sizes_are_bounded_and_totals_are_not() {
        let mut statistics = Statistics::default();
        for rows in (1..=MAX_BATCH_SIZES + 10).chain([1]) {
            statistics.executed(rows, [Duration::MAX; 3], 0);
        }
        assert_eq!(statistics.executions, MAX_BATCH_SIZES as u64 + 11);
        assert_eq!(statistics.batches.len(), MAX_BATCH_SIZES);
        assert_eq!(statistics.batches[&1].infer, Total { count: 2, ns: u64::MAX });
    }
}
