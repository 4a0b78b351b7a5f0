//! What rounds say together: medians, and how far they can be trusted. Pure.
//!
//! The interval around a median is made of order statistics: between which two of the sorted rounds the median of all
//! rounds that could be made lies in at least 95 of 100 cases, whatever their distribution is. Fewer than six rounds
//! cannot say that; then it is the whole range, and `confidence` says what that is worth.

use hdrhistogram::Histogram;
use serde::Serialize;

const CONFIDENCE: f64 = 0.95;

/// What a latency may be, in nanoseconds, and the decimal digits that are kept of it.
const SHORTEST: u64 = 100;
const LONGEST: u64 = 3_600_000_000_000;
const DIGITS: u8 = 3;

/// A median over rounds with its interval.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Estimate {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
    /// How often an interval made like this holds the median.
    pub(super) confidence: f64,
    /// In the order in which they were made.
    pub(super) rounds: Vec<f64>,
}

impl Estimate {
    /// `None` without a number.
    pub(super) fn of(rounds: Vec<f64>) -> Option<Estimate> {
        let mut sorted: Vec<f64> = rounds.iter().copied().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let middle = *sorted.get(count / 2)?;
        let median = if count.is_multiple_of(2) { (sorted[count / 2 - 1] + middle) / 2.0 } else { middle };
        let (below, confidence) = interval(count);
        Some(Estimate { median, low: sorted[below], high: sorted[count - 1 - below], confidence, rounds })
    }

    /// Round by round.
    pub(super) fn ratio(over: &Estimate, under: &Estimate) -> Option<Estimate> {
        Estimate::of(over.rounds.iter().zip(&under.rounds).map(|(over, under)| over / under).collect())
    }
}

/// How many of `count` sorted values may be left out at either end, and what the interval between the others is worth.
fn interval(count: usize) -> (usize, f64) {
    // The median lies outside where at most `below` of the rounds fell on one of its sides.
    let mut probability = 0.5f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let (mut outside, mut below) = (probability, 0);
    loop {
        probability *= (count - below) as f64 / (below + 1) as f64;
        if below + 1 > count / 2 || 1.0 - 2.0 * (outside + probability) < CONFIDENCE {
            return (below, 1.0 - 2.0 * outside);
        }
        outside += probability;
        below += 1;
    }
}

/// Latencies in nanoseconds.
pub(super) fn histogram() -> Histogram<u64> {
    #[expect(clippy::expect_used, reason = "the bounds are constants that the crate takes, as every test shows")]
    Histogram::new_with_bounds(SHORTEST, LONGEST, DIGITS).expect("valid bounds")
}

/// The latency, in milliseconds, that `quantile` of 0 to 1 of all stay within.
pub(super) fn millis(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1e6
}

/// Points on a curve of latencies by quantile: eight for each factor of ten by which fewer are slower, as far as
/// there are any.
pub(super) fn curve(histogram: &Histogram<u64>) -> Vec<(f64, f64)> {
    let count = histogram.len() as f64;
    let slower = (0..).map(|step| 10f64.powf(-f64::from(step) / 8.0)).take_while(|slower| slower * count >= 1.0);
    slower.map(|slower| (1.0 - slower, millis(histogram, 1.0 - slower))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_hold_the_median_as_often_as_they_say() {
        // Conover, Practical Nonparametric Statistics, table of the sign test: ranks of the 95 % interval.
        for (count, rank) in [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8)] {
            let (below, confidence) = interval(count);
            assert_eq!(below + 1, rank, "{count} rounds");
            assert!((0.95..1.0).contains(&confidence), "{count} rounds: {confidence}");
        }
        for (count, expected) in [(1, 0.0), (2, 0.5), (5, 0.9375)] {
            assert_eq!(interval(count), (0, expected), "{count} rounds cannot say more");
        }
        // By the normal approximation, of the most rounds that may be asked for: (1001 - 1.96 √1001) / 2.
        assert!((467..=471).contains(&interval(1001).0), "{:?}", interval(1001));
    }

    #[test]
    fn estimates_are_of_the_sorted_and_keep_the_order() {
        let estimate = Estimate::of(vec![3.0, 1.0, 2.0, 9.0]).unwrap();
        assert_eq!((estimate.median, estimate.low, estimate.high), (2.5, 1.0, 9.0));
        assert_eq!(estimate.rounds, [3.0, 1.0, 2.0, 9.0]);
        assert_eq!(Estimate::of(vec![]), None);
        assert_eq!(Estimate::of(vec![f64::NAN]), None);
        let eleven = Estimate::of((1..=11).map(f64::from).collect()).unwrap();
        assert_eq!((eleven.median, eleven.low, eleven.high), (6.0, 2.0, 10.0));
    }

    #[test]
    fn ratios_are_of_rounds_not_of_medians() {
        let (a, b) = (Estimate::of(vec![10.0, 40.0, 20.0]).unwrap(), Estimate::of(vec![5.0, 10.0, 20.0]).unwrap());
        assert_eq!(Estimate::ratio(&a, &b).unwrap().rounds, [2.0, 4.0, 1.0]);
    }

    #[test]
    fn a_curve_ends_where_there_are_no_more_latencies() {
        let mut latencies = histogram();
        (1..=1000u64).for_each(|i| latencies.record(i * 1_000_000).unwrap());
        let curve = curve(&latencies);
        assert_eq!(curve.len(), 25);
        assert!(curve.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1));
        let (_, p90) = curve[8];
        assert!((899.0..902.0).contains(&p90), "{p90}");
        assert!(super::curve(&histogram()).is_empty());
    }
}
