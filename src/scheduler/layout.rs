//! Which of two layouts answers a lone request sooner: a group's own threads, or all cores.
//!
//! Pure: no clock, no threads, no instances. One [`Contest`] for each length and number of rows; see [`key`].
//!
//! Both are measured on requests, and what one took is compared with what the other took next to it: what either took
//! at another load, or in another phase of the machine, says nothing. A trial is several runs in a row, since the first
//! one finds nothing in the caches and its threads asleep. Trials become rare while they change nothing, but never so
//! rare that a wrong choice would last.

use super::cost::{class, size};

/// A run on all cores takes less than this part of the time of one on fewer, or it is not worth them.
pub(super) const SAVES: f64 = 0.95;
/// Runs in the other layout, of which the first does not count.
const TRIAL_RUNS: usize = 1 + COMPARED;
/// Their median is compared with that of as many runs before the trial.
const COMPARED: usize = 3;
/// Lone runs until the next trial, and by how much each that changes nothing multiplies them: 0.8 % of the runs are trials
/// in the end.
pub(super) const FIRST_TRIAL: u32 = 8;
const GROWTH: u32 = 4;
const MOST_UNTIL_TRIAL: u32 = 512;
const _: () = assert!(FIRST_TRIAL as usize >= COMPARED);

/// Of the runs that are compared with each other; there are no more keys than times of runs are kept.
pub(super) fn key(rows: usize, length: Option<usize>) -> (usize, usize) {
    (class(length), size(rows))
}

#[derive(Debug)]
pub(super) struct Contest {
    /// All cores are the usual layout.
    wide: bool,
    interval: u32,
    /// Runs until the next trial; 0 during one.
    left: u32,
    /// The latest ones in the usual layout.
    usual: [f64; COMPARED],
    /// Of this trial.
    tried: Vec<f64>,
}

impl Contest {
    /// Begins with what seems faster.
    pub(super) fn new(wide: bool) -> Contest {
        Contest { wide, interval: FIRST_TRIAL, left: FIRST_TRIAL, usual: [0.0; COMPARED], tried: Vec::new() }
    }

    /// Whether the next lone run is one on all cores.
    pub(super) fn chooses_wide(&self) -> bool {
        self.wide != (self.left == 0)
    }

    /// The seconds that a lone run took; infinite where it failed.
    pub(super) fn learn(&mut self, wide: bool, took: f64) {
        if wide == self.wide {
            self.usual.rotate_left(1);
            self.usual[COMPARED - 1] = took;
            self.left = self.left.saturating_sub(1);
            // What was tried before is not next to it.
            self.tried.clear();
        } else if self.left == 0 {
            self.tried.push(took);
            if self.tried.len() == TRIAL_RUNS {
                self.decide();
            }
        }
    }

    fn decide(&mut self) {
        let tried = median(&self.tried[TRIAL_RUNS - COMPARED..]);
        let usual = median(&self.usual);
        let (on_all, on_fewer) = if self.wide { (usual, tried) } else { (tried, usual) };
        let pays = on_all < SAVES * on_fewer;
        self.interval = if pays == self.wide { (GROWTH * self.interval).min(MOST_UNTIL_TRIAL) } else { FIRST_TRIAL };
        self.wide = pays;
        self.left = self.interval;
        self.tried.clear();
    }
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lone runs of which each takes what `took` says of its number and layout; the layouts, all cores as `true`.
    fn runs(contest: &mut Contest, count: usize, took: impl Fn(usize, bool) -> f64) -> Vec<bool> {
        let run = |number| {
            let wide = contest.chooses_wide();
            contest.learn(wide, took(number, wide));
            wide
        };
        (0..count).map(run).collect()
    }

    fn lengths(runs: &[bool]) -> Vec<(bool, usize)> {
        runs.chunk_by(|a, b| a == b).map(|same| (same[0], same.len())).collect()
    }

    #[test]
    fn trials_become_rare_where_they_change_nothing() {
        for wide in [true, false] {
            let chosen = runs(&mut Contest::new(wide), 3000, |_, on_all| if on_all == wide { 1.0 } else { 2.0 });
            let usual: Vec<usize> =
                lengths(&chosen).into_iter().filter(|(on_all, _)| *on_all == wide).map(|(_, runs)| runs).collect();
            assert_eq!(usual[..6], [8, 32, 128, 512, 512, 512]);
            assert!(lengths(&chosen).iter().all(|(on_all, runs)| *on_all == wide || *runs == TRIAL_RUNS));
        }
    }

    #[test]
    fn the_first_run_of_a_trial_may_be_slow_and_one_more() {
        let slow = [8, 10];
        let took = |number: usize, wide: bool| if slow.contains(&number) || !wide { 4.0 } else { 3.0 };
        let chosen = runs(&mut Contest::new(false), 8 + TRIAL_RUNS + 4, took);
        assert_eq!(lengths(&chosen), [(false, 8), (true, TRIAL_RUNS + 4)]);
    }

    #[test]
    fn a_gain_too_small_for_the_cores_is_none() {
        for (on_all, expected) in [(0.96, false), (0.94, true)] {
            for first in [true, false] {
                let mut contest = Contest::new(first);
                runs(&mut contest, 100, |_, wide| if wide { on_all } else { 1.0 });
                assert_eq!(contest.wide, expected, "{on_all}, from {first}");
            }
        }
    }

    /// A machine that gave one core only for a while, in which everything took twice the time.
    #[test]
    fn a_choice_made_in_a_bad_phase_does_not_outlast_it() {
        let mut contest = Contest::new(true);
        runs(&mut contest, 2000, |_, wide| if wide { 3.0 } else { 4.0 });
        runs(&mut contest, 2000, |_, wide| if wide { 8.0 } else { 6.0 });
        assert!(!contest.wide);
        let after = runs(&mut contest, 2000, |_, wide| if wide { 3.0 } else { 4.0 });
        let until = after.iter().position(|wide| *wide).unwrap();
        assert!(contest.wide && until <= MOST_UNTIL_TRIAL as usize, "{until}");
    }

    #[test]
    fn a_trial_that_was_interrupted_begins_anew() {
        let mut contest = Contest::new(false);
        runs(&mut contest, FIRST_TRIAL as usize, |_, _| 4.0);
        runs(&mut contest, TRIAL_RUNS - 1, |_, _| 3.0);
        contest.learn(false, 4.0);
        runs(&mut contest, TRIAL_RUNS - 1, |_, _| 3.0);
        assert!(!contest.wide && contest.chooses_wide(), "still due");
        runs(&mut contest, 1, |_, _| 3.0);
        assert!(contest.wide);
        contest.learn(false, 1.0);
        assert_eq!(contest.tried.len(), 0, "no trial is due: chosen before the last one ended");
    }

    #[test]
    fn a_layout_that_fails_is_the_slower_one() {
        for wide in [true, false] {
            let mut contest = Contest::new(wide);
            runs(&mut contest, 100, |_, on_all| if on_all { f64::INFINITY } else { 1.0 });
            assert!(!contest.wide);
        }
    }
}
