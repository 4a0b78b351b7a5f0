//! What a model takes and gives: names, datatypes and dimensions, in the model's own order.

use std::sync::Arc;

use super::{DataType, Shape};

/// One dimension of a signature.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    Fixed(usize),
    /// Free, with the symbol the model file gives it, if any (`batch`, `sequence`).
    Free(Option<Arc<str>>),
}

impl Dim {
    pub fn is_free(&self) -> bool {
        matches!(self, Dim::Free(_))
    }

    /// -1 for a free dimension, as protocols print it.
    pub fn to_wire(&self) -> i64 {
        match self {
            Dim::Fixed(n) => i64::try_from(*n).unwrap_or(i64::MAX),
            Dim::Free(_) => -1,
        }
    }

    pub fn accepts(&self, n: usize) -> bool {
        match self {
            Dim::Fixed(expected) => *expected == n,
            Dim::Free(_) => true,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: Arc<str>,
    pub dtype: DataType,
    /// `None`: the model file does not say even the rank; any shape is passed on.
    pub dims: Option<Vec<Dim>>,
}

impl TensorSpec {
    pub fn accepts(&self, shape: &Shape) -> bool {
        match &self.dims {
            None => true,
            Some(dims) => dims.len() == shape.rank() && dims.iter().zip(shape.dims()).all(|(dim, n)| dim.accepts(*n)),
        }
    }

    /// The leading dimension exists and is free.
    pub fn has_free_rows(&self) -> bool {
        self.dims.as_ref().and_then(|dims| dims.first()).is_some_and(Dim::is_free)
    }

    /// The shape as protocols carry it, -1 for free dimensions; `[-1]` where the rank is unknown.
    pub fn to_wire(&self) -> Vec<i64> {
        match &self.dims {
            None => vec![-1],
            Some(dims) => dims.iter().map(Dim::to_wire).collect(),
        }
    }
}

/// `[-1,30]`: a signature's shape as the well-known messages print it.
pub fn wire_shape(dims: &[i64]) -> String {
    let dims: Vec<String> = dims.iter().map(i64::to_string).collect();
    format!("[{}]", dims.join(","))
}

/// What an output's numbers mean, as far as monitoring needs to know. Inferred from the graph, overridable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutputKind {
    /// The last axis is a distribution over classes (a softmax, a tree ensemble's votes).
    Probabilities,
    /// The last axis is the logarithm of a distribution (a log-softmax).
    LogProbabilities,
    /// The last axis is unnormalised class scores; a softmax makes them probabilities.
    Logits,
    /// One probability per row, of the positive class (a sigmoid over a last axis of 1).
    BinaryProbability,
    /// Class ids or class names, one per row.
    Labels,
    /// Anything else: numbers of their own meaning.
    Values,
}

impl OutputKind {
    pub const ALL: [OutputKind; 6] = [
        OutputKind::Probabilities,
        OutputKind::LogProbabilities,
        OutputKind::Logits,
        OutputKind::BinaryProbability,
        OutputKind::Labels,
        OutputKind::Values,
    ];

    /// As written in `model.toml` and shown by `inspect`.
    pub fn name(self) -> &'static str {
        match self {
            OutputKind::Probabilities => "probabilities",
            OutputKind::LogProbabilities => "log_probabilities",
            OutputKind::Logits => "logits",
            OutputKind::BinaryProbability => "binary_probability",
            OutputKind::Labels => "labels",
            OutputKind::Values => "values",
        }
    }

    pub fn parse(name: &str) -> Option<OutputKind> {
        OutputKind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Signature {
    pub inputs: Vec<TensorSpec>,
    pub outputs: Vec<TensorSpec>,
}

impl Signature {
    pub fn input(&self, name: &str) -> Option<(usize, &TensorSpec)> {
        self.inputs.iter().enumerate().find(|(_, spec)| &*spec.name == name)
    }

    pub fn output(&self, name: &str) -> Option<(usize, &TensorSpec)> {
        self.outputs.iter().enumerate().find(|(_, spec)| &*spec.name == name)
    }
}
