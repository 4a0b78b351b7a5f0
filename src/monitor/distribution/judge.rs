//! What one row of class scores says: the class, and how sure. Pure.

use super::Tally;
use crate::tensor::OutputKind;

/// Probabilities above 1 by no more than this come from rounding.
const ROUNDING: f64 = 1e-3;

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Judgement {
    /// The first of the largest; `None` for a row with a NaN, or without anything above -Inf.
    pub(super) class: Option<usize>,
    /// `None` where the largest is not finite.
    pub(super) sureness: Option<Sureness>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sureness {
    pub(super) confidence: f64,
    /// In nats.
    pub(super) entropy: f64,
    pub(super) classes: usize,
}

/// Judges a row by what its numbers mean, and counts those that are not finite.
pub(super) fn judge(kind: OutputKind, row: impl Iterator<Item = f64> + Clone, tally: &mut Tally) -> Judgement {
    let (mut class, mut largest, mut nan) = (None, f64::NEG_INFINITY, false);
    for (index, number) in row.clone().enumerate() {
        if number > largest {
            (class, largest) = (Some(index), number);
        }
        if !number.is_finite() {
            tally.add_unusable(number);
            nan |= number.is_nan();
        }
    }
    if nan {
        return Judgement::default();
    }
    if !largest.is_finite() {
        let binary = (kind == OutputKind::BinaryProbability).then(|| usize::from(largest > 0.0));
        return Judgement { class: binary.or(class), sureness: None };
    }
    match kind {
        OutputKind::BinaryProbability => binary(largest),
        OutputKind::Probabilities => Judgement { class, sureness: Some(probabilities(row, largest)) },
        // A softmax gives log probabilities back as probabilities.
        _ => Judgement { class, sureness: Some(softmax(row, largest)) },
    }
}

fn binary(p: f64) -> Judgement {
    let sureness = probabilities([p, 1.0 - p].into_iter(), p.max(1.0 - p));
    Judgement { class: Some(usize::from(p >= 0.5)), sureness: Some(sureness) }
}

/// Entropy -Σ p ln p. Numbers outside 0..1 (an output of another kind) are left out of it.
fn probabilities(row: impl Iterator<Item = f64>, largest: f64) -> Sureness {
    let (mut entropy, mut classes) = (0.0, 0);
    for p in row {
        if p > 0.0 && p < 1.0 {
            entropy -= p * p.ln();
        }
        classes += 1;
    }
    let confidence = if largest <= 1.0 + ROUNDING { largest.min(1.0) } else { largest };
    Sureness { confidence, entropy, classes }
}

/// Of scores x, with d = x - max(x) so that no exponential overflows, and z = Σ e^d: the largest probability is 1/z,
/// and since ln p = d - ln z, the entropy is ln z - Σ d e^d / z.
fn softmax(row: impl Iterator<Item = f64>, largest: f64) -> Sureness {
    let (mut z, mut weighted, mut classes) = (0.0, 0.0, 0);
    for x in row {
        let d = x - largest;
        let e = d.exp();
        z += e;
        // Where e underflows to 0, d may be -Inf.
        if e > 0.0 {
            weighted += d * e;
        }
        classes += 1;
    }
    Sureness { confidence: 1.0 / z, entropy: z.ln() - weighted / z, classes }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{bucketed, close, counts, folded, tensor};
    use super::*;
    use crate::monitor::names::{CONFIDENCE_BUCKETS, ENTROPY_BUCKETS};

    #[test]
    fn probabilities_give_class_confidence_and_entropy() {
        let rows = [[0.5f64, 0.25, 0.25], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]];
        let t = tensor(&[3, 3], rows.concat());
        let (output, d) = folded(OutputKind::Probabilities, &[t]);
        assert_eq!(output.class_counts(&d), counts(&[("0", 1), ("1", 1), ("2", 1)]));
        let confidence = d.confidence().unwrap();
        assert_eq!(confidence.counts, bucketed(&[0.5, 1.0, 0.6], CONFIDENCE_BUCKETS));
        assert!(close(confidence.sum(), 2.1));
        let entropies = rows.map(|row| row.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum::<f64>() / 3f64.ln());
        assert_eq!(d.entropy().unwrap().counts, bucketed(&entropies, ENTROPY_BUCKETS));
        assert!(close(d.entropy().unwrap().sum(), entropies.iter().sum()));
        assert_eq!(d.tally, Tally { elements: 9, ..Tally::default() });
    }

    #[test]
    fn logits_and_log_probabilities_pass_a_softmax_that_never_overflows() {
        for kind in [OutputKind::Logits, OutputKind::LogProbabilities] {
            let rows = vec![-100.0, 0.0, 3e38, -3e38, -1e4, -1e4, 7.0, f32::NEG_INFINITY];
            let (output, d) = folded(kind, &[tensor(&[4, 2], rows)]);
            assert_eq!(output.class_counts(&d), counts(&[("0", 3), ("1", 1)]));
            assert!(close(d.confidence().unwrap().sum(), 1.0 + 1.0 + 0.5 + 1.0));
            assert!(close(d.entropy().unwrap().sum(), 1.0), "{}", d.entropy().unwrap().sum());
            assert_eq!(d.tally.infinite, 1);
        }
    }

    #[test]
    fn a_binary_probability_is_its_own_row() {
        let (output, d) = folded(OutputKind::BinaryProbability, &[tensor(&[4, 1], vec![0.5f64, 0.25, 1.0, f64::NAN])]);
        assert_eq!(output.class_counts(&d), counts(&[("0", 1), ("1", 2)]));
        assert_eq!(d.confidence().unwrap().counts, bucketed(&[0.5, 0.75, 1.0], CONFIDENCE_BUCKETS));
        let (output, infinite) =
            folded(OutputKind::BinaryProbability, &[tensor(&[2, 1], vec![f64::INFINITY, -f64::INFINITY])]);
        assert_eq!(output.class_counts(&infinite), counts(&[("0", 1), ("1", 1)]));
        let quarter = -(0.25 * 0.25f64.ln() + 0.75 * 0.75f64.ln()) / 2f64.ln();
        assert!(close(d.entropy().unwrap().sum(), 1.0 + quarter));
        assert_eq!((d.tally.elements, d.tally.nan), (4, 1));
    }

    #[test]
    fn a_row_with_a_nan_has_no_class_and_infinities_are_counted() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let t = tensor(&[5, 2], vec![nan, 1.0, 0.0, inf, -inf, 2.0, -inf, -inf, 1.0, 0.0]);
        let (output, d) = folded(OutputKind::Logits, &[t]);
        assert_eq!(output.class_counts(&d), counts(&[("0", 1), ("1", 2)]));
        assert_eq!(d.tally, Tally { elements: 10, nan: 1, infinite: 4, sampled_out: 0 });
        assert_eq!(d.confidence().unwrap().counts.iter().sum::<u64>(), 2);
        assert!(d.confidence().unwrap().sum().is_finite() && d.entropy().unwrap().sum().is_finite());
    }

    proptest! {
        #[test]
        fn softmax_agrees_with_the_definition(row in proptest::collection::vec(-20f64..20.0, 2..30)) {
            let (_, d) = folded(OutputKind::Logits, &[tensor(&[row.len()], row.clone())]);
            let z: f64 = row.iter().map(|x| x.exp()).sum();
            let p: Vec<f64> = row.iter().map(|x| x.exp() / z).collect();
            let confidence = p.iter().copied().fold(0.0, f64::max);
            let entropy = -p.iter().map(|p| p * p.ln()).sum::<f64>() / (row.len() as f64).ln();
            prop_assert!(close(d.confidence().unwrap().sum(), confidence));
            prop_assert!(close(d.entropy().unwrap().sum(), entropy));
        }
    }
}
