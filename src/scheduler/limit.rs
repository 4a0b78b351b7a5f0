//! How many rows a batch is filled up to: as many as give the most rows a second, by what runs cost, and no more.
//!
//! Pure: no clock, no threads, no queue. One [`Limits`] for each layout that a version runs in.
//!
//! A batch of the rows that wait is cut to the smallest size whose rows a second are within [`SLACK`] of the best that
//! these rows allow, or to one row within [`ALONE_SLACK`]: where a bigger batch costs more per row, it stops growing.
//! Nothing known: batches are filled up. Sizes beyond the largest known one are entered one doubling at a time, while the
//! last one paid. Neighbours of the size in use are tried again now and then, for at most [`TRIED`] of the time that runs
//! take, and only with rows that wait anyway.

use std::collections::BTreeMap;
use std::time::Duration;

use super::company::PATIENCE;
use super::cost::{CostModel, Curve, OLD, Sample, class, size};

/// Rows a second that are given up for a smaller batch, which answers earlier.
const SLACK: f64 = 0.02;
/// The same for batches of one row, which copy nothing. With 2 % a model that only moves 1 MiB answered 64 clients at 0.95
/// of what it did unbatched, with 4 % at 1.00.
const ALONE_SLACK: f64 = 0.04;
/// The same while other versions compute, where the run takes longer than [`SLICE`].
const SHARING_SLACK: f64 = 0.10;
/// What a run takes that keeps nobody waiting.
const SLICE: f64 = 0.005;
/// What a batch costs besides its run, in seconds: the hand-over to a worker, the lock, and the wake-ups.
const HAND_OVER: f64 = 10e-6;
/// Share of the time of runs that trials may take.
const TRIED: f64 = 0.02;
/// Runs of a length before the first trial.
const TRIED_FROM: u64 = 32;
/// A trial takes at most so many times as long as the batch in its place, as far as is known and was true lately.
const LONGEST_TRIAL: f64 = 2.5;
/// So many times the latest run is what trials may save up for.
const SAVED_UP: f64 = 10.0;
/// Of the goal's quantile, one turn's step up or down, and how far it may go.
const QUANTILE_STEP: f64 = 0.05;
const MOST_SLOWDOWN: f64 = 100.0;
/// Saved by splitting a batch over an idle core, in seconds, at least: another worker must be woken for it.
const SPLIT_SAVES: f64 = 30e-6;

/// What there is to be batched, seen by the worker that is about to.
#[derive(Clone, Copy, Debug)]
pub struct Queued {
    /// Of the first request.
    pub length: Option<usize>,
    /// Rows that may join it.
    pub rows: usize,
    /// Rows of a fair share: where other cores are idle, what this one should leave to them.
    pub share: usize,
    /// Other versions compute, too.
    pub contended: bool,
}

/// What to seal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sealing {
    /// At most.
    pub rows: usize,
    /// To learn what so many cost: no matter how long they are.
    pub trial: bool,
}

#[derive(Clone, Debug)]
pub struct Limits {
    costs: CostModel,
    /// Rows, at most.
    most: usize,
    /// False: always `most`.
    tuned: bool,
    goal: Option<LatencyGoal>,
    /// How many times as long as expected a turn takes, with its wait for a core, at the goal's quantile.
    slowdown: f64,
    /// Of the latest run.
    latest: Option<usize>,
    /// By class of length.
    classes: BTreeMap<usize, Class>,
}

/// What batches must leave time for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatencyGoal {
    /// How many of 10,000 requests are to be answered within that time.
    pub of_10_000: u16,
    pub within: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Class {
    /// Seconds that trials may take now: of each class, since the cheap ones would leave nothing to the others.
    credit: f64,
    /// What [`Limits::in_force`] said, until more is known.
    in_force: Option<usize>,
}

impl Limits {
    pub fn new(most: usize, tuned: bool, goal: Option<LatencyGoal>, samples: &[Sample]) -> Limits {
        let (costs, classes) = (CostModel::new(samples), BTreeMap::new());
        let latest = samples.last().and_then(|sample| sample.length);
        Limits { costs, most: most.max(1), tuned, goal, slowdown: 1.0, latest, classes }
    }

    pub fn costs(&self) -> &CostModel {
        &self.costs
    }

    pub fn set_most(&mut self, most: usize) {
        self.most = most.max(1);
        self.classes.clear();
    }

    /// A run took so long; `turn` is that, the wait for a core, and what came after it.
    pub fn learn(&mut self, rows: usize, length: Option<usize>, compute: Duration, turn: Duration) {
        if let Some((goal, expected)) = self.goal.zip(self.costs.predict(rows, length)) {
            let (share, slowdown) = (f64::from(goal.of_10_000) / 1e4, turn.as_secs_f64() / expected.as_secs_f64());
            let step = if slowdown > self.slowdown { share } else { share - 1.0 };
            self.slowdown = (self.slowdown * (1.0 + QUANTILE_STEP * step)).clamp(1.0, MOST_SLOWDOWN);
        }
        self.costs.learn(rows, length, compute);
        self.latest = length;
        let seconds = compute.as_secs_f64();
        // Enough for any one trial, and not much more than that.
        let Class { credit, in_force } = self.classes.entry(class(length)).or_default();
        *in_force = None;
        *credit = (*credit + TRIED * seconds).min(SAVED_UP * seconds);
    }

    /// Of the length that ran last: the rows in force, and what a run of so many is expected to take.
    pub fn latest(&mut self) -> (usize, Option<Duration>) {
        let rows = self.in_force(self.latest);
        (rows, self.costs.predict(rows, self.latest))
    }

    /// How long a request may wait for company: what the goal leaves beside two turns.
    pub fn patience(&mut self) -> Duration {
        let Some(goal) = self.goal else { return Duration::MAX };
        let turn = self.latest().1.map(|time| time.mul_f64(self.slowdown));
        goal.within.saturating_sub(turn.unwrap_or_default() * 2)
    }

    /// What a run may take, in seconds: one is waited for and one is run in.
    fn longest(&self) -> Option<f64> {
        Some(self.goal?.within.as_secs_f64() / 2.0 / self.slowdown)
    }

    /// Rows that a batch is filled up to where there is no end of them.
    pub fn in_force(&mut self, length: Option<usize>) -> usize {
        let known = self.classes.get(&class(length)).and_then(|class| class.in_force);
        known.unwrap_or_else(|| {
            let rows = self.best(length, self.most, SLACK);
            self.classes.entry(class(length)).or_default().in_force = Some(rows);
            rows
        })
    }

    /// The next batch.
    pub fn seal(&mut self, waiting: &Queued) -> Sealing {
        let Queued { length, rows, share, contended } = *waiting;
        let most = rows.min(self.most);
        if most <= 1 {
            return Sealing { rows: 1, trial: false };
        }
        let best = self.best(length, most, SLACK);
        let plain = |rows| Sealing { rows, trial: false };
        if self.tuned && share < best && self.saves(length, best, share) {
            return plain(self.best(length, share, SLACK));
        }
        if contended && self.seconds(best, length).is_some_and(|seconds| seconds > SLICE) {
            return plain(self.best(length, most, SHARING_SLACK));
        }
        let trial = self.trial(length, best, most);
        trial.map_or(plain(best), |rows| Sealing { rows, trial: true })
    }

    /// Whether two requests side by side in a batch of `rows` cost no more than they would apart.
    pub fn fits(&self, rows: usize, longest: Option<usize>, more: usize, length: Option<usize>) -> bool {
        let known = self.costs.curve(longest.max(length)).and_then(|curve| curve.known().next_back());
        // What is not known yet must be tried to be.
        if longest == length || !self.tuned || known.is_none_or(|(edge, _)| edge < rows + more) {
            return true;
        }
        let together = self.seconds(rows + more, longest.max(length));
        let apart = self.seconds(rows, longest).zip(self.seconds(more, length));
        together.zip(apart).is_none_or(|(together, (first, second))| together <= first + second + HAND_OVER)
    }

    /// Of so many rows that may come, those that make more rows a second than waiting for them takes.
    pub fn worth_waiting_for(&self, length: Option<usize>, rows: usize) -> usize {
        self.best(length, rows.min(self.most), PATIENCE)
    }

    /// What a run of `rows` and `more` takes less than a run of `rows`, and the others in one of their own or in one that
    /// takes as long a row as this: they would share it with those that come next.
    pub fn saved(&self, length: Option<usize>, rows: usize, more: usize) -> Duration {
        if more == 0 {
            return Duration::ZERO;
        }
        let takes = |rows| self.costs.predict(rows, length).unwrap_or_default();
        let alone = takes(rows);
        let others = takes(more).min(alone.mul_f64(more as f64 / rows.max(1) as f64));
        (alone + others).saturating_sub(takes(rows + more))
    }

    fn seconds(&self, rows: usize, length: Option<usize>) -> Option<f64> {
        self.costs.predict(rows, length).map(|time| time.as_secs_f64())
    }

    fn best(&self, length: Option<usize>, most: usize, slack: f64) -> usize {
        let most = most.max(1);
        let known = self.costs.nearest(length).filter(|_| self.tuned && most > 1);
        known.map_or(most, |(curve, factor)| best_of(curve, self.bounded(curve, factor, most), slack))
    }

    /// Cut to what takes no longer than a run may.
    fn bounded(&self, curve: &Curve, factor: f64, most: usize) -> usize {
        let Some(longest) = self.longest() else { return most };
        let fits = |rows: &usize| curve.at(*rows).is_none_or(|seconds| seconds * factor <= longest);
        if fits(&most) {
            return most;
        }
        sizes(most).filter(fits).last().unwrap_or(1)
    }

    fn saves(&self, length: Option<usize>, rows: usize, share: usize) -> bool {
        let times = self.seconds(rows, length).zip(self.seconds(share, length));
        times.is_some_and(|(whole, part)| whole - part > SPLIT_SAVES)
    }

    /// A neighbour of the best size, if one is due: the one that was not run for longest.
    fn trial(&mut self, length: Option<usize>, best: usize, most: usize) -> Option<usize> {
        let curve = self.costs.curve(length).filter(|curve| self.tuned && curve.runs() >= TRIED_FROM)?;
        let usual = curve.at(best)?;
        let longest = LONGEST_TRIAL * usual;
        // What is not known, or was long ago, is taken for no longer than that.
        let takes = |rows: usize| {
            let seconds = curve.at(rows).unwrap_or(longest);
            if curve.age(rows).is_none_or(|age| age > OLD) { seconds.min(longest) } else { seconds }
        };
        let longest = self.longest().map_or(longest, |most| longest.min(most));
        let allowed = |rows: &usize| *rows != best && *rows <= most && takes(*rows) <= longest;
        let step = (best / 4).max(1);
        let around = [size(best + step), size(best * 2), size(best - step.min(best - 1)), size(best.div_ceil(2)), 1];
        let rows = around.into_iter().filter(allowed).max_by_key(|rows| curve.age(*rows).unwrap_or(u64::MAX))?;
        let seconds = takes(rows);
        let class = self.classes.get_mut(&class(length)).filter(|class| class.credit >= seconds)?;
        class.credit -= seconds;
        Some(rows)
    }
}

/// Rows that batches of a tuned version are filled up to at first, of the shortest sequences that were timed.
pub fn rows_at_first(most: usize, costs: &[Sample]) -> usize {
    let shortest = costs.first().and_then(|sample| sample.length);
    Limits::new(most, true, None, costs).in_force(shortest)
}

fn sizes(most: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |rows| Some(size(rows + 1))).take_while(move |rows| *rows <= most)
}

/// At most `most` rows; `curve` knows at least one size.
fn best_of(curve: &Curve, most: usize, slack: f64) -> usize {
    let rate = |rows: usize, seconds: f64| rows as f64 / (seconds + HAND_OVER);
    let edge = curve.known().next_back().map_or(0, |(rows, _)| rows);
    let whole = curve.at(most).filter(|_| most <= edge).map(|seconds| (most, seconds));
    let candidates = || curve.known().filter(|(rows, _)| *rows < most).chain(whole);
    let best = candidates().map(|(rows, seconds)| rate(rows, seconds)).fold(0.0, f64::max);
    let slack = |rows: usize| if rows == 1 { slack.max(ALONE_SLACK) } else { slack };
    let good = |(rows, seconds): &(usize, f64)| rate(*rows, *seconds) >= (1.0 - slack(*rows)) * best;
    if most > edge && grows(curve, best) {
        return most.min(edge * 2);
    }
    candidates().find(good).map_or(most, |(rows, _)| rows)
}

/// Whether more rows than any known size may be worth it: the largest is among the best, and either it is better than
/// the one before it, or twice as many would keep nobody waiting.
fn grows(curve: &Curve, best: f64) -> bool {
    let rate = |(rows, seconds): (usize, f64)| rows as f64 / (seconds + HAND_OVER);
    let mut known = curve.known().rev();
    let Some(edge) = known.next() else { return true };
    let improves = known.next().is_none_or(|before| rate(edge) > (1.0 + SLACK / 2.0) * rate(before));
    rate(edge) >= (1.0 - SLACK) * best && (improves || 2.0 * edge.1 <= SLICE)
}

#[cfg(test)]
mod tests;
