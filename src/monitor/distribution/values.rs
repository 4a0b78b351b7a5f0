//! Outputs that are numbers of their own meaning: a histogram, and the sums that give exact mean and variance.

use super::elements::{Visit, visit};
use super::sample::Sample;
use super::{Look, Tally};
use crate::monitor::histogram::{Histogram, Sum};
use crate::monitor::names::VALUE_BUCKETS;
use crate::tensor::Tensor;

/// Larger magnitudes count as infinite: their squares would overflow and spoil the moments for good.
const LARGEST: f64 = 1e150;

/// Elements that lie side by side are looked at together: of a large output each that lies alone would be waited for,
/// since its caller has the answer by then and the caches have something else.
const BLOCK: usize = 16;

/// Bits of an f64 below its sign and exponent.
const FRACTION_BITS: u32 = f64::MANTISSA_DIGITS - 1;

/// By sign and exponent, the bucket of the least value that has them: no binary power holds more than a bound or two.
static FIRST_BUCKETS: [u8; 1 << (u64::BITS - FRACTION_BITS)] = {
    let mut first = [0; 1 << (u64::BITS - FRACTION_BITS)];
    let mut head = 0;
    while head < first.len() {
        let (nearest_zero, farthest) = ((head as u64) << FRACTION_BITS, (1 << FRACTION_BITS) - 1);
        let negative = head >= first.len() / 2;
        let least = f64::from_bits(if negative { nearest_zero | farthest } else { nearest_zero });
        while (first[head] as usize) < VALUE_BUCKETS.len() && VALUE_BUCKETS[first[head] as usize] < least {
            first[head] += 1;
        }
        head += 1;
    }
    first
};

/// The first bucket whose upper bound is not below the value; at most the number of bounds. Of finite values.
#[inline]
fn bucket(value: f64) -> usize {
    let mut bucket = usize::from(FIRST_BUCKETS[(value.to_bits() >> FRACTION_BITS) as usize]);
    while VALUE_BUCKETS.get(bucket).is_some_and(|bound| *bound < value) {
        bucket += 1;
    }
    bucket
}

#[derive(Clone)]
pub(super) struct Values {
    pub(super) histogram: Histogram,
    pub(super) squares: Sum,
}

impl Default for Values {
    fn default() -> Self {
        Values { histogram: Histogram::new(VALUE_BUCKETS), squares: Sum::default() }
    }
}

impl Values {
    pub(super) fn fold(&mut self, tensor: &Tensor, look: Look, tally: &mut Tally) {
        visit(tensor, Fold { values: self, look, tally });
    }

    pub(super) fn merge(&mut self, other: &Values) {
        self.histogram.merge(&other.histogram);
        self.squares.merge(other.squares);
    }
}

struct Fold<'a> {
    values: &'a mut Values,
    look: Look,
    tally: &'a mut Tally,
}

impl Visit for Fold<'_> {
    fn visit<const N: usize>(self, elements: &[[u8; N]], read: impl Fn([u8; N]) -> f64 + Copy) {
        let Fold { values, look, tally } = self;
        let blocks = elements.chunks(BLOCK);
        let sample = Sample::new(blocks.len(), look.most / BLOCK, look.turn);
        let (mut sum, mut squares, mut seen) = (0.0, 0.0, 0);
        for block in sample.of(blocks) {
            seen += block.len();
            for element in block {
                let value = read(*element);
                if value.abs() <= LARGEST {
                    values.histogram.counts[bucket(value)] += 1;
                    sum += value;
                    squares += value * value;
                } else {
                    tally.add_unusable(value);
                }
            }
        }
        values.histogram.add_to_sum(sum);
        values.squares.add(squares);
        tally.add_looked_at(seen, elements.len());
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bucketed, folded, tensor};
    use super::*;
    use crate::tensor::OutputKind;

    #[test]
    fn values_keep_exact_moments_without_nan_and_infinity() {
        let values: Vec<f64> = (0..1000).map(|i| 1e4 + f64::from(i * 7919 % 1000) / 10.0).collect();
        let mut with_bad = values.clone();
        with_bad.extend([f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e200]);
        let (_, d) = folded(OutputKind::Values, &[tensor(&[1004], with_bad)]);
        let histogram = d.values().unwrap();
        assert_eq!(histogram.counts, bucketed(&values, VALUE_BUCKETS));
        assert_eq!(d.tally, Tally { elements: 1004, nan: 1, infinite: 3, sampled_out: 0 });
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
        let found_mean = histogram.sum() / n;
        let found_variance = d.squares().unwrap() / n - found_mean * found_mean;
        assert!((found_mean / mean - 1.0).abs() < 1e-12);
        assert!((found_variance / variance - 1.0).abs() < 1e-6, "{found_variance} {variance}");
    }

    #[test]
    fn every_bound_and_its_neighbours_are_found_in_their_buckets() {
        let edges = VALUE_BUCKETS.iter().flat_map(|bound| [bound.next_down(), *bound, bound.next_up()]);
        let powers = (-500..500).map(|power| 2f64.powi(power));
        for value in edges.chain(powers).chain([LARGEST, f64::MIN_POSITIVE, f64::from_bits(1)]) {
            for value in [value, -value] {
                let expected = VALUE_BUCKETS.partition_point(|bound| *bound < value);
                assert_eq!(bucket(value), expected, "{value:e}");
            }
        }
    }

    #[test]
    fn bucket_bounds_are_inclusive_and_signed() {
        let values = vec![-2e6f64, -1e6, -1e-7, 0.0, -0.0, 1e-6, 0.02, 1e6, 2e6];
        let (_, d) = folded(OutputKind::Values, &[tensor(&[9], values.clone())]);
        assert_eq!(d.values().unwrap().counts, bucketed(&values, VALUE_BUCKETS));
        assert_eq!(d.values().unwrap().counts.last(), Some(&1));
    }
}
