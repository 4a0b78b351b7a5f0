//! Which elements, or rows, of a large output one fold looks at.

use std::iter::{Skip, StepBy};

/// Every `step`-th of `total` from `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    total: usize,
    start: usize,
    step: usize,
}

impl Sample {
    /// Of `total`, about `limit`; the start moves with `turn`, so that over many folds every position is seen.
    pub(super) fn new(total: usize, limit: usize, turn: usize) -> Sample {
        let step = total.div_ceil(limit.max(1)).max(1);
        Sample { total, start: turn % step, step }
    }

    /// How many it picks.
    pub(super) fn count(self) -> usize {
        self.total.saturating_sub(self.start).div_ceil(self.step)
    }

    #[inline]
    pub(super) fn of<I: Iterator>(self, all: I) -> StepBy<Skip<I>> {
        all.skip(self.start).step_by(self.step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_seen_in_turn_and_what_is_picked_is_counted() {
        for (total, limit) in [(0, 4), (1, 4), (4, 4), (5, 4), (11, 4), (3, 0)] {
            let mut seen = vec![0; total];
            let step = Sample::new(total, limit, 0).step;
            for turn in 0..step {
                let sample = Sample::new(total, limit, turn);
                let picked: Vec<usize> = sample.of(0..total).collect();
                assert_eq!(picked.len(), sample.count(), "{sample:?}");
                assert!(picked.len() <= limit.max(1), "{sample:?}");
                picked.into_iter().for_each(|at| seen[at] += 1);
            }
            assert_eq!(seen, vec![1; total], "{total} {limit}");
        }
    }
}
