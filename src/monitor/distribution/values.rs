//! Outputs that are numbers of their own meaning: a histogram, and the sums that give exact mean and variance.

use super::elements::{Visit, visit};
use super::histogram::{Histogram, Sum};
use super::sample::Sample;
use super::{Look, Tally};
use crate::monitor::names::VALUE_BUCKETS;
use crate::tensor::Tensor;

/// Larger magnitudes count as infinite: their squares would overflow and spoil the moments for good.
const LARGEST: f64 = 1e150;

/// Elements that lie side by side are looked at together: of a large output each that lies alone would be waited for, since
/// its caller has the answer by then and the caches have something else.
const BLOCK: usize = 16;

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
        for element in sample.of(blocks).flatten() {
            seen += 1;
            let value = read(*element);
            if value.abs() <= LARGEST {
                values.histogram.count(value);
                sum += value;
                squares += value * value;
            } else {
                tally.add_unusable(value);
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
    fn bucket_bounds_are_inclusive_and_signed() {
        let values = vec![-2e6f64, -1e6, -1e-7, 0.0, -0.0, 1e-6, 0.02, 1e6, 2e6];
        let (_, d) = folded(OutputKind::Values, &[tensor(&[9], values.clone())]);
        assert_eq!(d.values().unwrap().counts, bucketed(&values, VALUE_BUCKETS));
        assert_eq!(d.values().unwrap().counts.last(), Some(&1));
    }
}
