//! Outputs that score classes: how often each was predicted, and how surely.

use super::elements::{Visit, visit};
use super::judge::{Judgement, Sureness, judge};
use super::sample::Sample;
use super::{Look, MAX_CLASSES, Tally};
use crate::monitor::histogram::Histogram;
use crate::monitor::names::{CONFIDENCE_BUCKETS, ENTROPY_BUCKETS, MAX_CLASS_SERIES};
use crate::tensor::{OutputKind, Tensor};

#[derive(Clone)]
pub(super) struct Classes {
    kind: OutputKind,
    /// By index; at most [`MAX_CLASS_SERIES`].
    pub(super) rows: Vec<u64>,
    pub(super) other: u64,
    /// There are more classes than series.
    pub(super) truncated: bool,
    pub(super) confidence: Histogram,
    pub(super) entropy: Histogram,
}

impl Classes {
    pub(super) fn new(kind: OutputKind) -> Classes {
        let (confidence, entropy) = (Histogram::new(CONFIDENCE_BUCKETS), Histogram::new(ENTROPY_BUCKETS));
        Classes { kind, rows: Vec::new(), other: 0, truncated: false, confidence, entropy }
    }

    pub(super) fn fold(&mut self, tensor: &Tensor, look: Look, tally: &mut Tally) {
        let last = tensor.shape().dims().last().copied().unwrap_or(1);
        let (width, classes) = if self.kind == OutputKind::BinaryProbability { (1, 2) } else { (last, last) };
        self.resize(classes);
        visit(tensor, Fold { classes: self, width, look, tally });
    }

    /// Classes that were never predicted are shown as 0, once their number is known.
    fn resize(&mut self, classes: usize) {
        let shown = classes.min(MAX_CLASS_SERIES);
        if shown > self.rows.len() {
            self.rows.resize(shown, 0);
        }
        self.truncated |= classes > MAX_CLASS_SERIES;
    }

    pub(super) fn merge(&mut self, other: &Classes) {
        self.rows.resize(self.rows.len().max(other.rows.len()), 0);
        self.rows.iter_mut().zip(&other.rows).for_each(|(mine, theirs)| *mine += theirs);
        self.other += other.other;
        self.truncated |= other.truncated;
        self.confidence.merge(&other.confidence);
        self.entropy.merge(&other.entropy);
    }

    fn add(&mut self, judgement: Judgement) {
        if let Some(class) = judgement.class {
            *self.rows.get_mut(class).unwrap_or(&mut self.other) += 1;
        }
        if let Some(Sureness { confidence, entropy, classes }) = judgement.sureness {
            self.confidence.add(confidence);
            let most = if classes > 1 { (classes as f64).ln() } else { 1.0 };
            self.entropy.add((entropy / most).clamp(0.0, 1.0));
        }
    }
}

struct Fold<'a> {
    classes: &'a mut Classes,
    /// Elements per row.
    width: usize,
    look: Look,
    tally: &'a mut Tally,
}

impl Visit for Fold<'_> {
    fn visit<const N: usize>(self, elements: &[[u8; N]], read: impl Fn([u8; N]) -> f64 + Copy) {
        let Fold { classes, width, look, tally } = self;
        if elements.is_empty() {
            return;
        }
        if width > MAX_CLASSES {
            return tally.add_looked_at(0, elements.len());
        }
        // The width is not zero: there are elements.
        let sample = Sample::new(elements.len() / width, look.most / width, look.turn);
        for row in sample.of(elements.chunks_exact(width)) {
            let numbers = row.iter().map(|element| read(*element));
            classes.add(judge(classes.kind, numbers, tally));
        }
        tally.add_looked_at(sample.count() * width, elements.len());
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{AGES, classes, counts, output, tensor};
    use super::*;
    use crate::monitor::names::OTHER;

    #[test]
    fn leading_axes_are_rows_and_a_vector_is_one_row() {
        let values: Vec<f32> = (0..24).map(|i| (i % 4) as f32).collect();
        assert_eq!(
            classes(OutputKind::Logits, &[tensor(&[2, 3, 4], values.clone())]),
            counts(&[("0", 0), ("1", 0), ("2", 0), ("3", 6)])
        );
        assert_eq!(classes(OutputKind::Logits, &[tensor(&[4], values[..4].to_vec())])[3].1, 1);
        assert_eq!(
            classes(OutputKind::Logits, &[tensor::<f32>(&[0, 4], vec![])]),
            counts(&[("0", 0), ("1", 0), ("2", 0), ("3", 0)])
        );
        assert_eq!(classes(OutputKind::Logits, &[tensor::<f32>(&[4, 0], vec![])]), []);
    }

    #[test]
    fn class_series_are_bounded_by_index() {
        let mut logits = vec![0f32; 25 * 25];
        (0..25).for_each(|row| logits[row * 25 + row] = 1.0);
        let output = output(OutputKind::Logits);
        assert_eq!(output.fold(&tensor(&[25, 25], logits), AGES), 5);
        let counts = output.class_counts(&output.snapshot());
        assert_eq!(counts.len(), MAX_CLASS_SERIES + 1);
        assert_eq!(counts.last(), Some(&(OTHER.to_owned(), 5)));
        assert!(counts[..MAX_CLASS_SERIES].iter().all(|(_, rows)| *rows == 1));
    }
}
