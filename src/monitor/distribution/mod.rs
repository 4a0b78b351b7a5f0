//! What a version predicts: one [`OutputMonitor`] for each of its outputs. Its workers fold whole batches into them after
//! they have replied; a scrape reads them.
//!
//! An output's kind decides what is kept of it: `classes` (by way of `judge`, what one row says), `labels` or `values`.
//! `elements` reads the numbers of a buffer, `sample` picks those of a large output that are looked at.
//!
//! Every number is converted to f64 straight from the buffer's bytes, wherever they lie, so a fold allocates nothing
//! and alignment does not matter. Memory and series are bounded by constants; work per fold by
//! [`MAX_FOLDED_ELEMENTS`] and by the time of the run. What runs once per element is `#[inline]`: calls from file to file would take half as long
//! as the fold itself.
//!
//! Threads: any thread may fold; it holds the lock of its own share of the output's counts, which are put together when
//! they are read.

mod classes;
mod elements;
mod judge;
mod labels;
mod sample;
mod values;

use std::sync::Arc;
use std::time::Duration;

use super::histogram::Histogram;
use super::names::OTHER;
use super::shares::Shares;
use crate::error::quoted;
use crate::tensor::{DataType, OutputKind, Tensor};
use classes::Classes;
use labels::{Label, Labels};
use values::Values;

/// Elements of one output that one fold looks at, of larger outputs a sample at even distances: as many as take
/// [`FOLDED_SHARE`] of the time of the run that gave them, between these bounds.
pub(super) const MIN_FOLDED_ELEMENTS: usize = 1_024;
pub(super) const MAX_FOLDED_ELEMENTS: usize = 16_384;
const FOLDED_SHARE: f64 = 0.01;
/// About what one element takes.
const ELEMENT_SECONDS: f64 = 7e-9;

/// Widest row of classes that is looked at (one row always is, however many elements it has).
pub(super) const MAX_CLASSES: usize = 262_144;

/// One output of a version and what was seen of it.
pub(super) struct OutputMonitor {
    pub(super) name: Arc<str>,
    labels: Option<Arc<[String]>>,
    shares: Shares<Distribution>,
    /// What a share begins with.
    empty: Distribution,
}

impl OutputMonitor {
    pub(super) fn new(name: Arc<str>, kind: OutputKind, labels: Option<Arc<[String]>>) -> OutputMonitor {
        let body = match kind {
            OutputKind::Probabilities
            | OutputKind::LogProbabilities
            | OutputKind::Logits
            | OutputKind::BinaryProbability => Body::Classes(Classes::new(kind)),
            OutputKind::Labels => Body::Labels(Labels::default()),
            OutputKind::Values => Body::Values(Values::default()),
        };
        let empty = Distribution { turn: 0, tally: Tally::default(), body };
        OutputMonitor { name, labels, shares: Shares::default(), empty }
    }

    /// Adds one batch's output, which a run of that time gave. Returns how many rows were counted as `other`.
    pub(super) fn fold(&self, tensor: &Tensor, run: Duration) -> u64 {
        self.shares.count(
            || self.empty.clone(),
            |mine| {
                let before = mine.body.others();
                mine.fold(tensor, most(run));
                mine.body.others() - before
            },
        )
    }

    pub(super) fn snapshot(&self) -> Distribution {
        let mut all = self.empty.clone();
        self.shares.for_each(|share| all.merge(share));
        all
    }

    /// Rows by class, as label values: distinct, `other` last where the bound was reached.
    pub(super) fn class_counts(&self, distribution: &Distribution) -> Vec<(String, u64)> {
        let mut counts: Vec<(String, u64)> = Vec::new();
        let mut add = |class: String, rows: u64| match counts.iter_mut().find(|(name, _)| *name == class) {
            // Labels that are equal, or equal as far as they are shown, are one series.
            Some((_, sum)) => *sum += rows,
            None => counts.push((class, rows)),
        };
        match &distribution.body {
            Body::Classes(classes) => {
                for (index, rows) in classes.rows.iter().enumerate() {
                    add(self.class_name(index as i128), *rows);
                }
                if classes.truncated {
                    add(OTHER.to_owned(), classes.other);
                }
            }
            Body::Labels(labels) => {
                for (label, rows) in &labels.rows {
                    add(self.label_name(label), *rows);
                }
                if labels.other > 0 {
                    add(OTHER.to_owned(), labels.other);
                }
            }
            Body::Values(_) => {}
        }
        counts
    }

    fn class_name(&self, index: i128) -> String {
        let label = usize::try_from(index).ok().and_then(|index| self.labels.as_ref()?.get(index));
        label.map_or_else(|| index.to_string(), |label| quoted(label))
    }

    fn label_name(&self, label: &Label) -> String {
        match label {
            Label::Integer(id) => self.class_name(*id),
            Label::Float(bits) => f64::from_bits(*bits).to_string(),
            Label::Text(bytes) => quoted(&String::from_utf8_lossy(bytes)),
        }
    }
}

/// What was seen of one output so far, by one thread or by all.
#[derive(Clone)]
pub(super) struct Distribution {
    /// Folds so far: where the next sample of a large output begins.
    turn: usize,
    pub(super) tally: Tally,
    body: Body,
}

fn most(run: Duration) -> usize {
    let affordable = run.as_secs_f64() * FOLDED_SHARE / ELEMENT_SECONDS;
    (affordable as usize).clamp(MIN_FOLDED_ELEMENTS, MAX_FOLDED_ELEMENTS)
}

/// Which elements one fold looks at.
#[derive(Clone, Copy)]
struct Look {
    most: usize,
    turn: usize,
}

#[derive(Clone)]
enum Body {
    Classes(Classes),
    Labels(Labels),
    Values(Values),
}

impl Body {
    fn others(&self) -> u64 {
        match self {
            Body::Classes(classes) => classes.other,
            Body::Labels(labels) => labels.other,
            Body::Values(_) => 0,
        }
    }
}

impl Distribution {
    pub(super) fn confidence(&self) -> Option<&Histogram> {
        self.classes().map(|classes| &classes.confidence)
    }

    pub(super) fn entropy(&self) -> Option<&Histogram> {
        self.classes().map(|classes| &classes.entropy)
    }

    pub(super) fn values(&self) -> Option<&Histogram> {
        if let Body::Values(values) = &self.body { Some(&values.histogram) } else { None }
    }

    pub(super) fn squares(&self) -> Option<f64> {
        if let Body::Values(values) = &self.body { Some(values.squares.value()) } else { None }
    }

    fn classes(&self) -> Option<&Classes> {
        if let Body::Classes(classes) = &self.body { Some(classes) } else { None }
    }

    /// What another thread saw of the same output.
    fn merge(&mut self, other: &Distribution) {
        self.tally.merge(other.tally);
        match (&mut self.body, &other.body) {
            (Body::Classes(mine), Body::Classes(theirs)) => mine.merge(theirs),
            (Body::Labels(mine), Body::Labels(theirs)) => mine.merge(theirs),
            (Body::Values(mine), Body::Values(theirs)) => mine.merge(theirs),
            // No output is of two kinds.
            _ => {}
        }
    }

    fn fold(&mut self, tensor: &Tensor, most: usize) {
        let Distribution { turn, tally, body } = self;
        let look = Look { most, turn: *turn };
        match body {
            Body::Labels(labels) => labels.fold(tensor, look, tally),
            Body::Values(_) | Body::Classes(_) if tensor.dtype() == DataType::Bytes => {
                tally.elements += tensor.shape().elements() as u64;
            }
            Body::Values(values) => values.fold(tensor, look, tally),
            Body::Classes(classes) => classes.fold(tensor, look, tally),
        }
        *turn = turn.wrapping_add(1);
    }
}

/// Elements, by what can be said of every datatype.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) elements: u64,
    pub(super) nan: u64,
    pub(super) infinite: u64,
    pub(super) sampled_out: u64,
}

impl Tally {
    fn add_looked_at(&mut self, seen: usize, total: usize) {
        self.elements += seen as u64;
        self.sampled_out += (total - seen) as u64;
    }

    fn merge(&mut self, other: Tally) {
        self.elements += other.elements;
        self.nan += other.nan;
        self.infinite += other.infinite;
        self.sampled_out += other.sampled_out;
    }

    /// A number that is not finite, or too large to be of use.
    #[inline]
    fn add_unusable(&mut self, number: f64) {
        if number.is_nan() {
            self.nan += 1;
        } else {
            self.infinite += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::names::MAX_CLASS_SERIES;
    use super::*;
    use crate::tensor::{Element, Shape};

    /// A run that leaves time to look at everything.
    pub(super) const AGES: Duration = Duration::from_secs(60);

    #[test]
    fn how_much_is_looked_at_follows_from_the_run() {
        let most = |micros| most(Duration::from_micros(micros));
        assert_eq!([0, 100, 1_400, 7_000, 60_000].map(most), [1_024, 1_024, 2_000, 10_000, 16_384]);
        let output = output(OutputKind::Values);
        output.fold(&tensor(&[4096], vec![0f32; 4096]), Duration::ZERO);
        let tally = output.snapshot().tally;
        assert_eq!((tally.elements, tally.sampled_out), (1024, 3072));
    }

    pub(super) fn tensor<T: Element + Send + 'static>(dims: &[usize], elements: Vec<T>) -> Tensor {
        Tensor::from_vec(Shape::new(dims).unwrap(), elements).unwrap()
    }

    pub(super) fn raw(dtype: DataType, dims: &[usize], data: Vec<u8>) -> Tensor {
        Tensor::new(dtype, Shape::new(dims).unwrap(), data.into()).unwrap()
    }

    pub(super) fn output(kind: OutputKind) -> OutputMonitor {
        OutputMonitor::new("y".into(), kind, None)
    }

    pub(super) fn folded(kind: OutputKind, tensors: &[Tensor]) -> (OutputMonitor, Distribution) {
        let output = output(kind);
        for tensor in tensors {
            output.fold(tensor, AGES);
        }
        let distribution = output.snapshot();
        (output, distribution)
    }

    pub(super) fn classes(kind: OutputKind, tensors: &[Tensor]) -> Vec<(String, u64)> {
        let (output, distribution) = folded(kind, tensors);
        output.class_counts(&distribution)
    }

    pub(super) fn counts(expected: &[(&str, u64)]) -> Vec<(String, u64)> {
        expected.iter().map(|(class, rows)| (class.to_string(), *rows)).collect()
    }

    /// `(values at or below each bound, and all)`, the plain way.
    pub(super) fn bucketed(values: &[f64], bounds: &[f64]) -> Vec<u64> {
        let mut below = f64::NEG_INFINITY;
        let mut counts: Vec<u64> = Vec::new();
        for bound in bounds.iter().copied().chain([f64::INFINITY]) {
            counts.push(values.iter().filter(|value| **value > below && **value <= bound).count() as u64);
            below = bound;
        }
        counts
    }

    fn fold_in_threads(output: &OutputMonitor, tensors: &[Tensor]) {
        std::thread::scope(|scope| {
            for tensor in tensors {
                scope.spawn(|| output.fold(tensor, AGES));
            }
        });
    }

    #[test]
    fn whichever_threads_fold_the_same_is_told() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let rows = [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.25, nan, 0.5], [inf, 0.5, 0.25]];
        let tensors: Vec<Tensor> = (0..12).map(|i| tensor(&[1, 3], rows[i % rows.len()].to_vec())).collect();
        for kind in OutputKind::ALL {
            let (alone, one) = folded(kind, &tensors);
            let output = output(kind);
            fold_in_threads(&output, &tensors);
            let all = output.snapshot();
            assert_eq!(all.tally, one.tally, "{kind:?}");
            let sorted = |mut counts: Vec<(String, u64)>| {
                counts.sort();
                counts
            };
            assert_eq!(sorted(output.class_counts(&all)), sorted(alone.class_counts(&one)), "{kind:?}");
            for of in [Distribution::confidence, Distribution::entropy, Distribution::values] {
                let counts = |d| of(d).map(|histogram| histogram.counts.clone());
                assert_eq!(counts(&all), counts(&one), "{kind:?}");
                assert!(of(&all).is_none_or(|histogram| close(histogram.sum(), of(&one).unwrap().sum())), "{kind:?}");
            }
            assert!(all.squares().is_none_or(|squares| close(squares, one.squares().unwrap())));
        }
    }

    #[test]
    fn the_labels_with_series_are_the_same_for_all_threads_and_no_count_goes_back() {
        const LABELS: i64 = MAX_CLASS_SERIES as i64 + 10;
        const THREADS: i64 = 12;
        const TURNS: usize = 300;
        let output = output(OutputKind::Labels);
        std::thread::scope(|scope| {
            for first in 0..THREADS {
                let ids = tensor(&[LABELS as usize], (0..LABELS).map(|id| (id + 7 * first) % LABELS).collect());
                scope.spawn({
                    let output = &output;
                    move || {
                        for _ in 0..TURNS {
                            output.fold(&ids, AGES);
                        }
                    }
                });
            }
            let mut before: Vec<(String, u64)> = Vec::new();
            for _ in 0..50 {
                let now = output.class_counts(&output.snapshot());
                for (class, rows) in &before {
                    assert!(now.iter().any(|(name, count)| name == class && count >= rows), "{now:?} after {before:?}");
                }
                before = now;
            }
        });
        let all = output.class_counts(&output.snapshot());
        let each = THREADS as u64 * TURNS as u64;
        assert!(all[..MAX_CLASS_SERIES].iter().all(|(_, rows)| *rows == each), "{all:?}");
        assert_eq!(all[MAX_CLASS_SERIES..], [(OTHER.to_owned(), 10 * each)]);
    }

    pub(super) fn close(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= 1e-9 * expected.abs().max(1.0)
    }

    #[test]
    fn large_outputs_are_sampled_evenly_and_the_rest_is_counted() {
        let total = MAX_FOLDED_ELEMENTS * 3 - 1;
        let output = output(OutputKind::Values);
        for turn in 1..=3 {
            output.fold(&tensor(&[total], (0..total).map(|i| i as f32).collect()), AGES);
            let tally = output.snapshot().tally;
            assert_eq!(tally.elements + tally.sampled_out, (total * turn) as u64);
            assert!(tally.elements <= (MAX_FOLDED_ELEMENTS * turn) as u64);
        }
        // Three turns of every third element have seen each element once.
        let d = output.snapshot();
        assert_eq!(d.tally.elements, total as u64);
        assert_eq!(d.values().unwrap().sum(), (0..total).map(|i| i as f64).sum::<f64>());

        let width = MAX_FOLDED_ELEMENTS + 1;
        let (_, d) = folded(OutputKind::Logits, &[tensor(&[3, width], vec![0u8; 3 * width])]);
        assert_eq!((d.tally.elements, d.tally.sampled_out), (width as u64, 2 * width as u64));
        let width = MAX_CLASSES + 1;
        let (_, d) = folded(OutputKind::Logits, &[tensor(&[1, width], vec![0u8; width])]);
        assert_eq!((d.tally.elements, d.tally.sampled_out), (0, width as u64));
        let (_, d) = folded(OutputKind::Labels, &[tensor(&[total], vec![0i64; total])]);
        assert_eq!(d.tally.elements + d.tally.sampled_out, total as u64);
    }

    proptest! {
        #[test]
        fn any_row_gives_a_probability_and_an_entropy(
            row in proptest::collection::vec(prop_oneof![any::<f32>(), -1e3f32..1e3, Just(-100.0), Just(0.0)], 1..40),
        ) {
            for kind in OutputKind::ALL {
                let (output, d) = folded(kind, &[tensor(&[row.len()], row.clone())]);
                if let (OutputKind::Logits, Some(confidence)) = (kind, d.confidence()) {
                    prop_assert!(confidence.sum() >= 0.0 && confidence.sum() <= 1.0);
                    let count: u64 = confidence.counts.iter().sum();
                    let finite_max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max).is_finite();
                    prop_assert_eq!(count == 1, finite_max && !row.iter().any(|x| x.is_nan()));
                }
                for histogram in [d.entropy(), d.values()].into_iter().flatten() {
                    prop_assert!(histogram.sum().is_finite());
                }
                prop_assert_eq!(d.tally.elements, row.len() as u64);
                prop_assert_eq!(d.tally.nan, row.iter().filter(|x| x.is_nan()).count() as u64);
                prop_assert!(output.class_counts(&d).len() <= MAX_CLASS_SERIES + 1);
            }
        }
    }
}
