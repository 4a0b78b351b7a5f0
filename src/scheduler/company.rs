//! Whether a worker waits a moment for those that were just answered to ask again.
//!
//! Callers that wait for their answers come back one by one after a batch. A worker that takes the first of them at once
//! runs it alone, and the batches stay small for good, although a bigger one would cost each of them less. So the worker
//! waits for a small part of what the run that it hopes for takes ([`PATIENCE`]), until as many are here as were lately, or as many as its
//! batch may have.
//!
//! Pure: no clock, no threads, no queue. What waiting cost and what it saved is counted: where it does not pay, as with callers
//! that come when they like, one run in [`TRIED`] tries it again.

use std::time::Duration;

/// Of the run with all that might come.
pub(super) const PATIENCE: f64 = 0.05;
/// Shorter runs are not waited for: waking up takes as long.
const SHORTEST: Duration = Duration::from_millis(2);
/// Of what was saved on the whole, what one more wait adds.
const NEWS: f64 = 0.125;
/// Waits that were left out since they don't pay, until the next one.
const TRIED: u32 = 16;

#[derive(Debug)]
pub(super) struct Company {
    /// False: nobody is waited for.
    wanted: bool,
    /// Rows that were here at once, lately.
    together: usize,
    /// Seconds that a wait saves, less what it takes.
    saves: f64,
    /// Since the last wait.
    left_out: u32,
}

impl Company {
    pub(super) fn new(wanted: bool) -> Company {
        Company { wanted, together: 0, saves: 0.0, left_out: 0 }
    }

    /// So many rows wait or run.
    pub(super) fn seen(&mut self, rows: usize) {
        self.together = self.together.max(rows);
    }

    /// Rows for each of so many workers, if those that were here lately come back.
    pub(super) fn share(&self, workers: usize) -> usize {
        if self.wanted { self.together.div_ceil(workers.max(1)) } else { 0 }
    }

    /// For how long a worker waits for more rows, where a run with them is expected to take that long.
    pub(super) fn patience(&mut self, run: Duration) -> Option<Duration> {
        if run < SHORTEST {
            return None;
        }
        self.left_out += 1;
        if self.saves < 0.0 && self.left_out < TRIED {
            return None;
        }
        self.left_out = 0;
        Some(run.mul_f64(PATIENCE))
    }

    /// A wait has ended, and so many rows wait or run.
    pub(super) fn waited(&mut self, rows: usize) {
        self.together = rows;
    }

    /// The wait took so long, and the rows that came save so much.
    pub(super) fn learn(&mut self, took: Duration, saved: Duration) {
        self.saves += NEWS * (saved.as_secs_f64() - took.as_secs_f64() - self.saves);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_wait_is_a_small_part_of_the_run_and_short_runs_are_not_waited_for() {
        let mut company = Company::new(true);
        assert_eq!(company.patience(MS * 20), Some(MS));
        assert_eq!(company.patience(MS * 2 - Duration::from_nanos(1)), None);
    }

    #[test]
    fn what_does_not_pay_is_tried_now_and_then_and_done_again_once_it_pays() {
        let mut company = Company::new(true);
        let waits = |company: &mut Company| (0..TRIED * 4).filter(|_| company.patience(MS * 20).is_some()).count();
        company.learn(MS, MS * 3);
        assert_eq!(waits(&mut company), 4 * TRIED as usize);
        (0..8).for_each(|_| company.learn(MS, Duration::ZERO));
        assert_eq!(waits(&mut company), 4);
        (0..8).for_each(|_| company.learn(MS, MS * 3));
        assert_eq!(waits(&mut company), 4 * TRIED as usize);
    }

    #[test]
    fn as_many_are_expected_as_were_here_until_they_stay_away() {
        let mut company = Company::new(true);
        [3, 8, 5].into_iter().for_each(|rows| company.seen(rows));
        assert_eq!([1, 2, 3].map(|workers| company.share(workers)), [8, 4, 3]);
        company.waited(2);
        assert_eq!(company.share(1), 2);
        company.seen(4);
        assert_eq!(company.share(1), 4);
        company = Company::new(false);
        company.seen(4);
        assert_eq!(company.share(1), 0);
    }
}
