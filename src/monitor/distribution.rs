//! What a version predicts: accumulators per output, folded once per batch by its workers, read at scrape.
//!
//! Every number is converted to f64 straight from the buffer's bytes, wherever they lie, so a fold allocates nothing
//! and alignment does not matter. Memory and series are bounded by constants; work per fold by
//! [`MAX_FOLDED_ELEMENTS`].
//!
//! Threads: any worker of the version may fold; each output has its own lock, held for the fold of that output.

use std::sync::{Arc, Mutex, PoisonError};

use super::names::{CONFIDENCE_BUCKETS, ENTROPY_BUCKETS, MAX_CLASS_SERIES, OTHER, VALUE_BUCKETS};
use crate::error::quoted;
use crate::tensor::{DataType, OutputKind, Tensor};

/// Elements of one output that one fold looks at; of larger outputs, a sample at even distances. So many because they
/// cost about 0.1 ms, less than computing and sending 16384 elements does.
pub(super) const MAX_FOLDED_ELEMENTS: usize = 16_384;

/// Widest row of classes that is looked at (one row always is, however many elements it has).
pub(super) const MAX_CLASSES: usize = 262_144;

/// Bytes of a label that tell it from others.
const MAX_LABEL_BYTES: usize = 256;

/// Larger magnitudes count as infinite: their squares would overflow and spoil the moments for good.
const LARGEST: f64 = 1e150;

/// Probabilities above 1 by no more than this come from rounding.
const ROUNDING: f64 = 1e-3;

/// One output of a version and what was seen of it.
pub(super) struct OutputMonitor {
    pub(super) name: Arc<str>,
    kind: OutputKind,
    labels: Option<Arc<[String]>>,
    state: Mutex<Distribution>,
}

impl OutputMonitor {
    pub(super) fn new(name: Arc<str>, kind: OutputKind, labels: Option<Arc<[String]>>) -> OutputMonitor {
        let body = match kind {
            OutputKind::Probabilities
            | OutputKind::LogProbabilities
            | OutputKind::Logits
            | OutputKind::BinaryProbability => Body::Classes(Classes::default()),
            OutputKind::Labels => Body::Labels(Labels::default()),
            OutputKind::Values => Body::Values(Values::default()),
        };
        let state = Distribution { turn: 0, tally: Tally::default(), body };
        OutputMonitor { name, kind, labels, state: Mutex::new(state) }
    }

    /// Adds one batch's output. Returns how many rows were counted as `other`.
    pub(super) fn fold(&self, tensor: &Tensor) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.body.others();
        state.fold(self.kind, tensor);
        state.turn = state.turn.wrapping_add(1);
        state.body.others() - before
    }

    pub(super) fn snapshot(&self) -> Distribution {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

/// Everything seen of one output so far.
#[derive(Clone)]
pub(super) struct Distribution {
    /// Folds so far: where the next sample of a large output begins.
    turn: usize,
    pub(super) tally: Tally,
    body: Body,
}

/// Elements, by what can be said of every datatype.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) elements: u64,
    pub(super) nan: u64,
    pub(super) infinite: u64,
    pub(super) sampled_out: u64,
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
        match &self.body {
            Body::Classes(classes) => Some(&classes.confidence),
            Body::Labels(_) | Body::Values(_) => None,
        }
    }

    pub(super) fn entropy(&self) -> Option<&Histogram> {
        match &self.body {
            Body::Classes(classes) => Some(&classes.entropy),
            Body::Labels(_) | Body::Values(_) => None,
        }
    }

    pub(super) fn values(&self) -> Option<&Histogram> {
        match &self.body {
            Body::Values(values) => Some(&values.histogram),
            Body::Labels(_) | Body::Classes(_) => None,
        }
    }

    pub(super) fn squares(&self) -> Option<f64> {
        match &self.body {
            Body::Values(values) => Some(values.squares.value()),
            Body::Labels(_) | Body::Classes(_) => None,
        }
    }

    fn fold(&mut self, kind: OutputKind, tensor: &Tensor) {
        let Distribution { turn, tally, body } = self;
        match body {
            Body::Labels(labels) => labels.fold(tensor, *turn, tally),
            Body::Values(_) | Body::Classes(_) if tensor.dtype() == DataType::Bytes => {
                tally.elements += tensor.shape().elements() as u64;
            }
            Body::Values(values) => visit(tensor, FoldValues { values, turn: *turn, tally }),
            Body::Classes(classes) => {
                let width = match kind {
                    OutputKind::BinaryProbability => 1,
                    _ => tensor.shape().dims().last().copied().unwrap_or(1),
                };
                classes.resize(if kind == OutputKind::BinaryProbability { 2 } else { width });
                visit(tensor, FoldRows { classes, kind, width, turn: *turn, tally });
            }
        }
    }
}

/// Something done with all elements of a tensor: as raw little-endian bytes, with the way to read one.
trait Visit {
    fn visit<const N: usize>(self, elements: &[[u8; N]], read: impl Fn([u8; N]) -> f64 + Copy);
}

/// Calls `visitor` with the elements of a tensor of numbers. `BYTES` has none.
fn visit(tensor: &Tensor, visitor: impl Visit) {
    let data: &[u8] = tensor.data();
    match tensor.dtype() {
        DataType::Bool | DataType::Uint8 => visitor.visit(chunks(data), |b| f64::from(u8::from_le_bytes(b))),
        DataType::Uint16 => visitor.visit(chunks(data), |b| f64::from(u16::from_le_bytes(b))),
        DataType::Uint32 => visitor.visit(chunks(data), |b| f64::from(u32::from_le_bytes(b))),
        DataType::Uint64 => visitor.visit(chunks(data), |b| u64::from_le_bytes(b) as f64),
        DataType::Int8 => visitor.visit(chunks(data), |b| f64::from(i8::from_le_bytes(b))),
        DataType::Int16 => visitor.visit(chunks(data), |b| f64::from(i16::from_le_bytes(b))),
        DataType::Int32 => visitor.visit(chunks(data), |b| f64::from(i32::from_le_bytes(b))),
        DataType::Int64 => visitor.visit(chunks(data), |b| i64::from_le_bytes(b) as f64),
        DataType::Fp16 => visitor.visit(chunks(data), |b| half_to_f64(u16::from_le_bytes(b))),
        DataType::Bf16 => visitor.visit(chunks(data), |[low, high]| f64::from(f32::from_le_bytes([0, 0, low, high]))),
        DataType::Fp32 => visitor.visit(chunks(data), |b| f64::from(f32::from_le_bytes(b))),
        DataType::Fp64 => visitor.visit(chunks(data), f64::from_le_bytes),
        DataType::Bytes => {}
    }
}

fn chunks<const N: usize>(data: &[u8]) -> &[[u8; N]] {
    data.as_chunks().0
}

/// IEEE 754 binary16: 1 sign bit, 5 of exponent (bias 15), 10 of fraction.
fn half_to_f64(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
    let magnitude = match exponent {
        0 => fraction * f64::from(2f32.powi(-24)),
        0x1f if fraction == 0.0 => f64::INFINITY,
        0x1f => f64::NAN,
        _ => (1.0 + fraction / 1024.0) * f64::from(2f32.powi(exponent - 15)),
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}

/// The elements (or rows) that one fold looks at: every `step`-th from `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    start: usize,
    step: usize,
}

impl Sample {
    /// Of `total`, about `limit`; the start moves with `turn`, so that over many folds every position is seen.
    fn new(total: usize, limit: usize, turn: usize) -> Sample {
        let step = total.div_ceil(limit.max(1)).max(1);
        Sample { start: turn % step, step }
    }
}

struct FoldValues<'a> {
    values: &'a mut Values,
    turn: usize,
    tally: &'a mut Tally,
}

impl Visit for FoldValues<'_> {
    fn visit<const N: usize>(self, elements: &[[u8; N]], read: impl Fn([u8; N]) -> f64 + Copy) {
        let FoldValues { values, turn, tally } = self;
        let Sample { start, step } = Sample::new(elements.len(), MAX_FOLDED_ELEMENTS, turn);
        let (mut seen, mut sum, mut squares) = (0, 0.0, 0.0);
        for element in elements.iter().skip(start).step_by(step) {
            let value = read(*element);
            seen += 1;
            if value.abs() <= LARGEST {
                values.histogram.count(value);
                sum += value;
                squares += value * value;
            } else if value.is_nan() {
                tally.nan += 1;
            } else {
                tally.infinite += 1;
            }
        }
        values.histogram.sum.add(sum);
        values.squares.add(squares);
        tally.elements += seen;
        tally.sampled_out += elements.len() as u64 - seen;
    }
}

struct FoldRows<'a> {
    classes: &'a mut Classes,
    kind: OutputKind,
    /// Classes per row.
    width: usize,
    turn: usize,
    tally: &'a mut Tally,
}

impl Visit for FoldRows<'_> {
    fn visit<const N: usize>(self, elements: &[[u8; N]], read: impl Fn([u8; N]) -> f64 + Copy) {
        let FoldRows { classes, kind, width, turn, tally } = self;
        if elements.is_empty() {
            return;
        }
        if width > MAX_CLASSES {
            tally.sampled_out += elements.len() as u64;
            return;
        }
        // Not zero: there are elements.
        let rows = elements.len() / width;
        let Sample { start, step } = Sample::new(rows, MAX_FOLDED_ELEMENTS / width, turn);
        let mut seen = 0;
        for row in elements.chunks_exact(width).skip(start).step_by(step) {
            seen += width as u64;
            classes.add(judge(kind, row, read, tally));
        }
        tally.elements += seen;
        tally.sampled_out += elements.len() as u64 - seen;
    }
}

/// What one row says: the class, and how sure.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Judgement {
    class: Option<usize>,
    sureness: Option<Sureness>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Sureness {
    confidence: f64,
    /// In nats.
    entropy: f64,
    classes: usize,
}

fn judge<const N: usize>(
    kind: OutputKind,
    row: &[[u8; N]],
    read: impl Fn([u8; N]) -> f64 + Copy,
    tally: &mut Tally,
) -> Judgement {
    let numbers = row.iter().map(|element| read(*element));
    let (mut class, mut largest, mut nan) = (None, f64::NEG_INFINITY, 0);
    for (index, number) in numbers.clone().enumerate() {
        if number > largest {
            (class, largest) = (Some(index), number);
        }
        nan += u64::from(number.is_nan());
        tally.infinite += u64::from(number.is_infinite());
    }
    tally.nan += nan;
    if nan > 0 {
        return Judgement::default();
    }
    if !largest.is_finite() {
        return Judgement { class, sureness: None };
    }
    match kind {
        OutputKind::BinaryProbability => binary(largest),
        OutputKind::Probabilities => Judgement { class, sureness: Some(probabilities(numbers, largest)) },
        // A softmax gives log probabilities back as probabilities.
        _ => Judgement { class, sureness: Some(softmax(numbers, largest)) },
    }
}

fn binary(p: f64) -> Judgement {
    let sureness = probabilities([p, 1.0 - p].into_iter(), p.max(1.0 - p));
    Judgement { class: Some(usize::from(p >= 0.5)), sureness: Some(sureness) }
}

/// Entropy -Σ p ln p. Numbers outside 0..1 (an output of another kind) are left out of it.
fn probabilities(numbers: impl Iterator<Item = f64>, largest: f64) -> Sureness {
    let (mut entropy, mut classes) = (0.0, 0);
    for p in numbers {
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
fn softmax(numbers: impl Iterator<Item = f64>, largest: f64) -> Sureness {
    let (mut z, mut weighted, mut classes) = (0.0, 0.0, 0);
    for x in numbers {
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

#[derive(Clone)]
struct Classes {
    /// By index; at most [`MAX_CLASS_SERIES`].
    rows: Vec<u64>,
    other: u64,
    /// There are more classes than series.
    truncated: bool,
    confidence: Histogram,
    entropy: Histogram,
}

impl Default for Classes {
    fn default() -> Self {
        let (confidence, entropy) = (Histogram::new(CONFIDENCE_BUCKETS), Histogram::new(ENTROPY_BUCKETS));
        Classes { rows: Vec::new(), other: 0, truncated: false, confidence, entropy }
    }
}

impl Classes {
    /// Classes that were never predicted are shown as 0, once their number is known.
    fn resize(&mut self, classes: usize) {
        let shown = classes.min(MAX_CLASS_SERIES);
        if shown > self.rows.len() {
            self.rows.resize(shown, 0);
        }
        self.truncated |= classes > MAX_CLASS_SERIES;
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

#[derive(Clone, Default)]
struct Labels {
    /// In the order of appearance; at most [`MAX_CLASS_SERIES`].
    rows: Vec<(Label, u64)>,
    other: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Label {
    Integer(i128),
    /// The bits of an f64 that is no integer.
    Float(u64),
    /// At most [`MAX_LABEL_BYTES`].
    Text(Box<[u8]>),
}

impl Label {
    fn of(number: f64) -> Label {
        // Integers of an f64 beyond 2^127 saturate, which merges labels that no model gives.
        if number.fract() == 0.0 { Label::Integer(number as i128) } else { Label::Float(number.to_bits()) }
    }
}

impl Labels {
    fn fold(&mut self, tensor: &Tensor, turn: usize, tally: &mut Tally) {
        let elements = tensor.shape().elements();
        let sample = Sample::new(elements, MAX_FOLDED_ELEMENTS, turn);
        let Sample { start, step } = sample;
        let seen = elements.saturating_sub(start).div_ceil(step) as u64;
        tally.elements += seen;
        tally.sampled_out += elements as u64 - seen;
        match tensor.dtype() {
            DataType::Bytes => {
                for text in tensor.strings().skip(start).step_by(step) {
                    self.add_text(text);
                }
            }
            // Ids of 64 bits don't fit an f64.
            DataType::Int64 => {
                for id in chunks(tensor.data()).iter().skip(start).step_by(step) {
                    self.add(Label::Integer(i64::from_le_bytes(*id).into()));
                }
            }
            DataType::Uint64 => {
                for id in chunks(tensor.data()).iter().skip(start).step_by(step) {
                    self.add(Label::Integer(u64::from_le_bytes(*id).into()));
                }
            }
            _ => visit(tensor, FoldLabels { labels: self, sample, tally }),
        }
    }

    fn add(&mut self, label: Label) {
        self.add_if(|known| *known == label, || label.clone());
    }

    /// Without an allocation for texts that are known already.
    fn add_text(&mut self, text: &[u8]) {
        let text = text.get(..MAX_LABEL_BYTES).unwrap_or(text);
        self.add_if(|known| matches!(known, Label::Text(known) if **known == *text), || Label::Text(text.into()));
    }

    fn add_if(&mut self, is: impl Fn(&Label) -> bool, label: impl FnOnce() -> Label) {
        if let Some((_, rows)) = self.rows.iter_mut().find(|(known, _)| is(known)) {
            *rows += 1;
        } else if self.rows.len() < MAX_CLASS_SERIES {
            self.rows.push((label(), 1));
        } else {
            self.other += 1;
        }
    }
}

struct FoldLabels<'a> {
    labels: &'a mut Labels,
    sample: Sample,
    tally: &'a mut Tally,
}

impl Visit for FoldLabels<'_> {
    fn visit<const N: usize>(self, elements: &[[u8; N]], read: impl Fn([u8; N]) -> f64 + Copy) {
        for element in elements.iter().skip(self.sample.start).step_by(self.sample.step) {
            let number = read(*element);
            if number.is_finite() {
                self.labels.add(Label::of(number));
            } else if number.is_nan() {
                self.tally.nan += 1;
            } else {
                self.tally.infinite += 1;
            }
        }
    }
}

#[derive(Clone)]
struct Values {
    histogram: Histogram,
    squares: Sum,
}

impl Default for Values {
    fn default() -> Self {
        Values { histogram: Histogram::new(VALUE_BUCKETS), squares: Sum::default() }
    }
}

/// Counts per bucket and the sum of what was counted.
#[derive(Clone)]
pub(super) struct Histogram {
    pub(super) bounds: &'static [f64],
    /// One more than bounds: the last counts what is above them all.
    pub(super) counts: Vec<u64>,
    sum: Sum,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: vec![0; bounds.len() + 1], sum: Sum::default() }
    }

    fn count(&mut self, value: f64) {
        // The first bucket whose upper bound is not below the value; at most `bounds.len()`, the last index.
        self.counts[self.bounds.partition_point(|bound| *bound < value)] += 1;
    }

    fn add(&mut self, value: f64) {
        self.count(value);
        self.sum.add(value);
    }

    pub(super) fn sum(&self) -> f64 {
        self.sum.value()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.counts.iter().all(|count| *count == 0)
    }
}

/// A compensated sum (Neumaier 1974): its error does not grow with the number of terms.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    sum: f64,
    compensation: f64,
}

impl Sum {
    fn add(&mut self, term: f64) {
        let next = self.sum + term;
        self.compensation +=
            if self.sum.abs() >= term.abs() { (self.sum - next) + term } else { (term - next) + self.sum };
        self.sum = next;
    }

    fn value(self) -> f64 {
        self.sum + self.compensation
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Shape;
    use proptest::prelude::*;

    fn tensor<T: crate::tensor::Element + Send + 'static>(dims: &[usize], elements: Vec<T>) -> Tensor {
        Tensor::from_vec(Shape::new(dims).unwrap(), elements).unwrap()
    }

    fn raw(dtype: DataType, dims: &[usize], data: Vec<u8>) -> Tensor {
        Tensor::new(dtype, Shape::new(dims).unwrap(), data.into()).unwrap()
    }

    fn output(kind: OutputKind) -> OutputMonitor {
        OutputMonitor::new("y".into(), kind, None)
    }

    fn folded(kind: OutputKind, tensors: &[Tensor]) -> (OutputMonitor, Distribution) {
        let output = output(kind);
        for tensor in tensors {
            output.fold(tensor);
        }
        let distribution = output.snapshot();
        (output, distribution)
    }

    fn classes(kind: OutputKind, tensors: &[Tensor]) -> Vec<(String, u64)> {
        let (output, distribution) = folded(kind, tensors);
        output.class_counts(&distribution)
    }

    fn counts(expected: &[(&str, u64)]) -> Vec<(String, u64)> {
        expected.iter().map(|(class, rows)| (class.to_string(), *rows)).collect()
    }

    /// `(values at or below each bound, and all)`, the plain way.
    fn bucketed(values: &[f64], bounds: &[f64]) -> Vec<u64> {
        let mut below = f64::NEG_INFINITY;
        let mut counts: Vec<u64> = Vec::new();
        for bound in bounds.iter().copied().chain([f64::INFINITY]) {
            counts.push(values.iter().filter(|value| **value > below && **value <= bound).count() as u64);
            below = bound;
        }
        counts
    }

    fn close(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= 1e-9 * expected.abs().max(1.0)
    }

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
    fn a_binary_probability_is_its_own_row() {
        let (output, d) = folded(OutputKind::BinaryProbability, &[tensor(&[4, 1], vec![0.5f64, 0.25, 1.0, f64::NAN])]);
        assert_eq!(output.class_counts(&d), counts(&[("0", 1), ("1", 2)]));
        assert_eq!(d.confidence().unwrap().counts, bucketed(&[0.5, 0.75, 1.0], CONFIDENCE_BUCKETS));
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

    #[test]
    fn every_number_type_is_read_at_any_address() {
        let one = |dtype| match dtype {
            DataType::Bool | DataType::Uint8 | DataType::Int8 => vec![1],
            DataType::Uint16 | DataType::Int16 => vec![1, 0],
            DataType::Uint32 | DataType::Int32 => vec![1, 0, 0, 0],
            DataType::Uint64 | DataType::Int64 => vec![1, 0, 0, 0, 0, 0, 0, 0],
            DataType::Fp16 => 0x3c00u16.to_le_bytes().to_vec(),
            DataType::Bf16 => 0x3f80u16.to_le_bytes().to_vec(),
            DataType::Fp32 => 1f32.to_le_bytes().to_vec(),
            DataType::Fp64 => 1f64.to_le_bytes().to_vec(),
            DataType::Bytes => vec![1, 0, 0, 0, b'1'],
        };
        for dtype in DataType::ALL {
            for offset in 0..8 {
                let mut padded = vec![0; offset];
                padded.extend(one(dtype).repeat(3));
                let holder = raw(DataType::Uint8, &[padded.len()], padded);
                let t = Tensor::new(dtype, Shape::new([3]).unwrap(), holder.data().slice(offset..)).unwrap();
                let (_, d) = folded(OutputKind::Values, std::slice::from_ref(&t));
                let expected = if dtype == DataType::Bytes { 0.0 } else { 3.0 };
                assert_eq!((d.values().unwrap().sum(), d.squares().unwrap()), (expected, expected), "{dtype}");
                assert_eq!(d.tally, Tally { elements: 3, ..Tally::default() });
                assert_eq!(classes(OutputKind::Labels, &[t]), counts(&[("1", 3)]), "{dtype}");
            }
        }
    }

    #[test]
    fn half_precision_is_exact() {
        for (bits, expected) in [
            (0u16, 0.0),
            (0x8000, -0.0),
            (1, 2f64.powi(-24)),
            (0x0400, 2f64.powi(-14)),
            (0xc100, -2.5),
            (0x7bff, 65504.0),
        ] {
            assert_eq!(half_to_f64(bits).to_bits(), expected.to_bits(), "{bits:x}");
        }
        assert_eq!((half_to_f64(0x7c00), half_to_f64(0xfc00)), (f64::INFINITY, f64::NEG_INFINITY));
        assert!(half_to_f64(0x7e01).is_nan());
    }

    #[test]
    fn class_series_are_bounded_by_index() {
        let mut logits = vec![0f32; 25 * 25];
        (0..25).for_each(|row| logits[row * 25 + row] = 1.0);
        let output = output(OutputKind::Logits);
        assert_eq!(output.fold(&tensor(&[25, 25], logits)), 5);
        let counts = output.class_counts(&output.snapshot());
        assert_eq!(counts.len(), MAX_CLASS_SERIES + 1);
        assert_eq!(counts.last(), Some(&(OTHER.to_owned(), 5)));
        assert!(counts[..MAX_CLASS_SERIES].iter().all(|(_, rows)| *rows == 1));
    }

    #[test]
    fn labels_are_named_bounded_and_merged() {
        let ids = [i64::MAX, i64::MAX - 1, 0, 1, 1, -3];
        let names: Arc<[String]> = ["cat".into(), "cat".into()].into();
        let output = OutputMonitor::new("y".into(), OutputKind::Labels, Some(names));
        output.fold(&tensor(&[6], ids.to_vec()));
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

    #[test]
    fn large_outputs_are_sampled_evenly_and_the_rest_is_counted() {
        let total = MAX_FOLDED_ELEMENTS * 3 - 1;
        let output = output(OutputKind::Values);
        for turn in 1..=3 {
            output.fold(&tensor(&[total], (0..total).map(|i| i as f32).collect()));
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

    #[test]
    fn compensated_sums_do_not_drift() {
        let mut sum = Sum::default();
        sum.add(1e16);
        (0..10_000).for_each(|_| sum.add(1.0));
        sum.add(-1e16);
        assert_eq!(sum.value(), 10_000.0);
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
