//! Outputs that are class ids or class names: how often each was given.

use std::sync::{Arc, Mutex};

use super::elements::{Visit, chunks, visit};
use super::sample::Sample;
use super::{Look, Tally};
use crate::monitor::lock;
use crate::monitor::names::MAX_CLASS_SERIES;
use crate::tensor::{DataType, Tensor};

/// Bytes of a label that tell it from others.
const MAX_LABEL_BYTES: usize = 256;

#[derive(Clone, Default)]
pub(super) struct Labels {
    /// The first that any thread saw, in the order of appearance; at most [`MAX_CLASS_SERIES`].
    known: Arc<Mutex<Vec<Label>>>,
    /// Of the first of those.
    pub(super) rows: Vec<(Label, u64)>,
    pub(super) other: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Label {
    Integer(i128),
    /// The bits of an f64 that is no integer.
    Float(u64),
    /// At most [`MAX_LABEL_BYTES`].
    Text(Box<[u8]>),
}

impl Label {
    #[inline]
    fn of(number: f64) -> Label {
        // Integers of an f64 beyond 2^127 saturate, which merges labels that no model gives.
        if number.fract() == 0.0 { Label::Integer(number as i128) } else { Label::Float(number.to_bits()) }
    }
}

impl Labels {
    pub(super) fn fold(&mut self, tensor: &Tensor, look: Look, tally: &mut Tally) {
        let elements = tensor.shape().elements();
        let sample = Sample::new(elements, look.most, look.turn);
        tally.add_looked_at(sample.count(), elements);
        match tensor.dtype() {
            DataType::Bytes => sample.of(tensor.strings()).for_each(|text| self.add_text(text)),
            // Ids of 64 bits don't fit an f64.
            DataType::Int64 => {
                sample.of(chunks(tensor.data()).iter()).for_each(|id| self.add_id(i64::from_le_bytes(*id).into()));
            }
            DataType::Uint64 => {
                sample.of(chunks(tensor.data()).iter()).for_each(|id| self.add_id(u64::from_le_bytes(*id).into()));
            }
            _ => visit(tensor, Fold { labels: self, sample, tally }),
        }
    }

    fn add_id(&mut self, id: i128) {
        self.add(Label::Integer(id));
    }

    #[inline]
    fn add(&mut self, label: Label) {
        self.add_if(|known| *known == label, || label.clone());
    }

    /// Without an allocation for texts that are known already.
    fn add_text(&mut self, text: &[u8]) {
        let text = text.get(..MAX_LABEL_BYTES).unwrap_or(text);
        self.add_if(|known| matches!(known, Label::Text(known) if **known == *text), || Label::Text(text.into()));
    }

    fn add_if(&mut self, is: impl Fn(&Label) -> bool, label: impl FnOnce() -> Label) {
        match self.find(0, &is).or_else(|| self.learn(is, label)) {
            Some(position) => self.rows[position].1 += 1,
            None => self.other += 1,
        }
    }

    fn find(&self, from: usize, is: impl Fn(&Label) -> bool) -> Option<usize> {
        self.rows[from..].iter().position(|(known, _)| is(known)).map(|position| from + position)
    }

    /// Where a label that is new to this thread is from now on. `None`: it is not among the first.
    fn learn(&mut self, is: impl Fn(&Label) -> bool, label: impl FnOnce() -> Label) -> Option<usize> {
        let had = self.rows.len();
        if had == MAX_CLASS_SERIES {
            return None;
        }
        let known = Arc::clone(&self.known);
        let mut known = lock(&known);
        self.rows.extend(known[had..].iter().map(|label| (label.clone(), 0)));
        self.find(had, is).or_else(|| {
            (known.len() < MAX_CLASS_SERIES).then(|| {
                known.push(label());
                self.rows.push((known[known.len() - 1].clone(), 0));
                self.rows.len() - 1
            })
        })
    }

    pub(super) fn merge(&mut self, other: &Labels) {
        let more = other.rows.get(self.rows.len()..).unwrap_or_default();
        self.rows.extend(more.iter().map(|(label, _)| (label.clone(), 0)));
        self.rows.iter_mut().zip(&other.rows).for_each(|((_, mine), (_, theirs))| *mine += theirs);
        self.other += other.other;
    }
}

struct Fold<'a> {
    labels: &'a mut Labels,
    sample: Sample,
    tally: &'a mut Tally,
}

impl Visit for Fold<'_> {
    fn visit<const N: usize>(self, elements: &[[u8; N]], read: impl Fn([u8; N]) -> f64 + Copy) {
        let Fold { labels, sample, tally } = self;
        for element in sample.of(elements.iter()) {
            let number = read(*element);
            if number.is_finite() { labels.add(Label::of(number)) } else { tally.add_unusable(number) }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::OutputMonitor;
    use super::super::tests::{AGES, classes, counts, tensor};
    use super::*;
    use crate::monitor::names::OTHER;
    use crate::tensor::{OutputKind, Shape};

    #[test]
    fn labels_are_named_bounded_and_merged() {
        let ids = [i64::MAX, i64::MAX - 1, 0, 1, 1, -3];
        let names: Arc<[String]> = ["cat".into(), "cat".into()].into();
        let output = OutputMonitor::new("y".into(), OutputKind::Labels, Some(names));
        output.fold(&tensor(&[6], ids.to_vec()), AGES);
        assert_eq!(
            output.class_counts(&output.snapshot()),
            counts(&[("9223372036854775807", 1), ("9223372036854775806", 1), ("cat", 3), ("-3", 1)])
        );
        let texts: Vec<String> = (0..30).map(|i| format!("t{i}")).collect();
        let t = Tensor::from_strings(Shape::new([30]).unwrap(), &texts).unwrap();
        let all = classes(OutputKind::Labels, &[t.clone(), t]);
        assert_eq!((all.len(), all[0].1, all.last().unwrap()), (21, 2, &(OTHER.to_owned(), 20)));
        let other = Tensor::from_strings(Shape::new([1]).unwrap(), [OTHER]).unwrap();
        let all = classes(OutputKind::Labels, &[other, tensor(&[40], (0..40i32).collect())]);
        assert_eq!(all[0], (OTHER.to_owned(), 1 + 21));
        assert_eq!(classes(OutputKind::Labels, &[tensor(&[2], vec![0.5f32, f32::NAN])]), counts(&[("0.5", 1)]));
    }
}
