//! What runs cost: the time of a run by its rows and by the length of its sequences, learned from runs.
//!
//! Pure: no clock, no threads. Knows nothing of queues, and decides nothing.
//!
//! Wall time is what can be measured, and it grows when others compute, too. So an estimate follows shorter times fast
//! and longer ones slowly: what a size costs when it is not disturbed can be compared with another size that was
//! measured at another load. Sizes that have not been seen lie on the line between those that have.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::tensor::bucket;

/// Runs after which an estimate counts.
pub const ENOUGH: u32 = 4;
/// How much of the difference an estimate takes over from a shorter time, and from a longer one.
const FALL: f64 = 1.0 / 4.0;
const RISE: f64 = 1.0 / 64.0;
/// From longer ones where the estimate is old, or so many in a row were longer by that factor: the model is slower now.
const SLOWED: f64 = 1.0 / 8.0;
const SLOWED_RUNS: u32 = 8;
const SLOWED_BY: f64 = 1.25;
/// A longer time counts as so many times the estimate: a thread that was not scheduled says nothing.
const OUTLIER: f64 = 4.0;
/// So many runs of a length later an estimate of one of its sizes is old.
pub const OLD: u64 = 1024;

/// One run's time, measured before or learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    pub rows: usize,
    /// Of the longest sequence, or what else the time of a row depends on: see [`super::extent`].
    pub length: Option<usize>,
    pub compute: Duration,
}

/// Of one model on one device, in one layout.
#[derive(Clone, Debug, Default)]
pub struct CostModel {
    /// By the longest length of the bucket; 0 for what has none.
    curves: BTreeMap<usize, Curve>,
}

/// Of one length.
#[derive(Clone, Debug, Default)]
pub struct Curve {
    /// By size; see [`size`].
    cells: BTreeMap<usize, Cell>,
    /// So far.
    runs: u64,
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    /// Of a run of exactly this size and of the bucket's longest length.
    seconds: f64,
    samples: u32,
    /// The latest ones in a row that took longer by [`SLOWED_BY`].
    slower: u32,
    /// The curve's run that was the last one of this size.
    last: u64,
}

/// Numbers of rows that are told apart: all up to 16, from there on in steps of about a quarter. The smallest one that
/// is not below `rows`.
pub fn size(rows: usize) -> usize {
    let rows = rows.clamp(1, 1 << 30);
    if rows <= 16 {
        return rows;
    }
    let whole = rows.next_power_of_two();
    [whole / 8 * 5, whole / 32 * 25].into_iter().find(|size| *size >= rows).unwrap_or(whole)
}

/// The class that a length falls into: few, since each is up to half again as long as the one before.
pub fn class(length: Option<usize>) -> usize {
    length.map_or(0, |length| bucket(length.max(1)))
}

impl CostModel {
    pub fn new(samples: &[Sample]) -> CostModel {
        let mut model = CostModel::default();
        for sample in samples {
            model.learn(sample.rows, sample.length, sample.compute);
            let cell =
                model.curves.get_mut(&class(sample.length)).and_then(|curve| curve.cells.get_mut(&size(sample.rows)));
            // A measurement made on purpose needs no confirmation.
            cell.into_iter().for_each(|cell| cell.samples = cell.samples.max(ENOUGH));
        }
        model
    }

    pub fn learn(&mut self, rows: usize, length: Option<usize>, compute: Duration) {
        self.curves.entry(class(length)).or_default().learn(size(rows), seconds(rows, length, compute));
    }

    /// `None` where nothing is known.
    pub fn predict(&self, rows: usize, length: Option<usize>) -> Option<Duration> {
        let (curve, factor) = self.nearest(length)?;
        Duration::try_from_secs_f64(curve.at(rows)? * factor).ok()
    }

    /// Of this length, if enough is known of it.
    pub fn curve(&self, length: Option<usize>) -> Option<&Curve> {
        self.curves.get(&class(length)).filter(|curve| curve.known().next().is_some())
    }

    /// Of this length, or else of the one nearest to it, with the factor by which its times differ.
    pub fn nearest(&self, length: Option<usize>) -> Option<(&Curve, f64)> {
        let wanted = class(length);
        if let Some(curve) = self.curve(length) {
            return Some((curve, 1.0 / stretch(length)));
        }
        let known = |(_, curve): &(&usize, &Curve)| curve.known().next().is_some();
        let (above, below) = (self.curves.range(wanted..), self.curves.range(..wanted).rev());
        let (of, curve) = below.chain(above).find(known)?;
        let factor = length.map_or(1.0, |length| length.max(1) as f64 / (*of).max(1) as f64);
        Some((curve, factor))
    }

    /// What is known, so that a later model may begin with it.
    #[cfg(test)]
    pub fn samples(&self) -> Vec<Sample> {
        let of = |(length, curve): (&usize, &Curve)| {
            let length = (*length > 0).then_some(*length);
            let sample =
                |(rows, seconds)| Some(Sample { rows, length, compute: Duration::try_from_secs_f64(seconds).ok()? });
            curve.known().filter_map(sample).collect::<Vec<_>>()
        };
        self.curves.iter().flat_map(of).collect()
    }
}

/// Of a run of the largest that are of its size and class, going by this one: these can be compared with each other.
pub fn seconds(rows: usize, length: Option<usize>, compute: Duration) -> f64 {
    compute.as_secs_f64() * size(rows) as f64 / rows.max(1) as f64 * stretch(length)
}

/// From a run of this length to one of its bucket's longest.
fn stretch(length: Option<usize>) -> f64 {
    length.map_or(1.0, |length| class(Some(length)) as f64 / length.max(1) as f64)
}

impl Curve {
    fn learn(&mut self, size: usize, seconds: f64) {
        self.runs += 1;
        let runs = self.runs;
        let cell = self.cells.entry(size).or_insert(Cell { seconds, samples: 0, slower: 0, last: runs });
        cell.slower = if seconds > SLOWED_BY * cell.seconds { cell.slower.saturating_add(1) } else { 0 };
        let old = runs - cell.last > OLD;
        let weight = match seconds < cell.seconds {
            // The first ones may pay for memory that later ones find.
            true if old || cell.samples < ENOUGH => 1.0,
            true => FALL,
            false if old || cell.slower >= SLOWED_RUNS => SLOWED,
            false => RISE,
        };
        cell.seconds += weight * (seconds.min(OUTLIER * cell.seconds) - cell.seconds);
        cell.samples = cell.samples.saturating_add(1);
        cell.last = runs;
        let now = cell.seconds;
        if cell.samples < ENOUGH {
            return;
        }
        // More rows take no less time, whatever was measured when.
        self.cells.range_mut(..size).for_each(|(_, fewer)| fewer.seconds = fewer.seconds.min(now));
        self.cells.range_mut(size + 1..).for_each(|(_, more)| more.seconds = more.seconds.max(now));
    }

    /// Sizes of which enough is known, with the seconds that they take.
    pub fn known(&self) -> impl DoubleEndedIterator<Item = (usize, f64)> {
        self.cells.iter().filter(|(_, cell)| cell.samples >= ENOUGH).map(|(size, cell)| (*size, cell.seconds))
    }

    /// How many runs ago the last one of that size was.
    pub fn age(&self, size: usize) -> Option<u64> {
        self.cells.get(&size).map(|cell| self.runs - cell.last)
    }

    /// So far.
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// Seconds of a run of the bucket's longest length. `None` where nothing is known.
    pub fn at(&self, rows: usize) -> Option<f64> {
        let rows = rows.max(1);
        let mut below =
            self.known().take_while(|(size, _)| *size <= rows).fold([None; 2], |last, known| [last[1], Some(known)]);
        let above = self.known().find(|(size, _)| *size >= rows);
        let line = |(a, at_a): (usize, f64), (b, at_b): (usize, f64)| {
            at_a + (at_b - at_a) * (rows as f64 - a as f64) / (b as f64 - a as f64)
        };
        match (below[1].take(), above) {
            (Some((exact, seconds)), _) if exact == rows => Some(seconds),
            (Some(below), Some(above)) => Some(line(below, above)),
            (None, Some((size, seconds))) => Some(seconds * rows as f64 / size as f64),
            (Some(last), None) => match below[0] {
                Some(before) => Some(line(before, last).max(last.1)),
                None => Some(last.1 * rows as f64 / last.0 as f64),
            },
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    fn known(samples: &[(usize, Option<usize>, u32)]) -> CostModel {
        let sample = |(rows, length, ms): &(usize, Option<usize>, u32)| Sample {
            rows: *rows,
            length: *length,
            compute: MS * *ms,
        };
        CostModel::new(&samples.iter().map(sample).collect::<Vec<_>>())
    }

    /// In milliseconds.
    fn predicted(model: &CostModel, rows: usize, length: Option<usize>) -> f64 {
        model.predict(rows, length).unwrap().as_secs_f64() * 1e3
    }

    #[test]
    fn sizes_are_exact_and_then_in_steps() {
        let expected = [1, 1, 2, 15, 16, 20, 20, 20, 25, 25, 32, 40, 64, 80, 128];
        assert_eq!([0, 1, 2, 15, 16, 17, 19, 20, 21, 25, 26, 33, 64, 65, 101].map(size), expected);
        for rows in 1..5000 {
            assert!(size(rows) >= rows && size(size(rows)) == size(rows) && size(rows) <= size(rows + 1), "{rows}");
            assert!(size(rows) * 25 <= (rows + 1) * 32, "{rows}");
        }
        assert_eq!(size(usize::MAX), 1 << 30);
    }

    #[test]
    fn what_was_not_measured_lies_on_the_line() {
        assert_eq!(CostModel::default().predict(1, None), None);
        let model = known(&[(1, None, 10), (4, None, 22), (16, None, 100)]);
        assert_eq!(
            [1, 2, 4, 10, 16, 28].map(|rows| predicted(&model, rows, None).round()),
            [10.0, 14.0, 22.0, 61.0, 100.0, 178.0]
        );
        let one = known(&[(4, None, 20)]);
        assert_eq!([1, 8].map(|rows| predicted(&one, rows, None).round()), [5.0, 40.0]);
    }

    #[test]
    fn lengths_do_not_mix_and_the_nearest_stands_in() {
        let mut model = known(&[(1, Some(16), 2), (1, Some(64), 40)]);
        let rounded = |model: &CostModel, length| predicted(model, 1, Some(length)).round();
        assert_eq!([16, 14, 64, 32, 128, 4].map(|length| rounded(&model, length)), [2.0, 2.0, 40.0, 4.0, 80.0, 1.0]);
        (0..100).for_each(|_| model.learn(1, Some(60), 10 * MS));
        assert_eq!([16, 60].map(|length| rounded(&model, length)), [2.0, 10.0]);
    }

    #[test]
    fn shorter_times_count_at_once_and_longer_ones_slowly() {
        let mut model = known(&[(1, None, 10)]);
        model.learn(1, None, 1000 * MS);
        assert!(predicted(&model, 1, None) < 10.5, "one outlier");
        (0..20).for_each(|run| model.learn(1, None, MS * if run % 2 == 0 { 10 } else { 14 }));
        assert!(predicted(&model, 1, None) < 10.6, "disturbed every other time");
        (0..50).for_each(|_| model.learn(1, None, 30 * MS));
        assert!(predicted(&model, 1, None) > 24.0, "slower from now on");
        (0..12).for_each(|_| model.learn(1, None, 10 * MS));
        assert!(predicted(&model, 1, None) < 11.0, "and fast again");
    }

    #[test]
    fn a_size_counts_once_it_was_seen_often_enough_and_its_first_runs_may_be_slow() {
        let mut model = CostModel::default();
        for compute in [900, 30, 10, 11] {
            assert_eq!(model.predict(2, None), None);
            model.learn(2, None, MS * compute);
        }
        assert!((9.9..10.5).contains(&predicted(&model, 2, None)));
    }

    proptest! {
        #[test]
        fn more_rows_take_no_less_and_what_is_known_can_be_handed_on(
            runs in proptest::collection::vec((1usize..70, proptest::option::of(1usize..300), 1u32..1000), 1..200),
        ) {
            let mut model = CostModel::default();
            runs.iter().for_each(|(rows, length, ms)| (0..4).for_each(|_| model.learn(*rows, *length, MS * *ms)));
            let again = CostModel::new(&model.samples());
            for (_, length, _) in &runs {
                let times: Vec<f64> = (1..80).map(|rows| predicted(&model, rows, *length)).collect();
                prop_assert!(times.is_sorted(), "{times:?}");
                let others: Vec<f64> = (1..80).map(|rows| predicted(&again, rows, *length)).collect();
                prop_assert!(times.iter().zip(&others).all(|(a, b)| (a - b).abs() <= 1e-3 * a), "{times:?} {others:?}");
            }
        }
    }
}
