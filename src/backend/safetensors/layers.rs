//! A `torch.nn.Sequential` as a typed list: what each layer makes of a shape, which tensors it needs, what the last one's
//! numbers mean. PyTorch's semantics and key names, in evaluation mode.
//!
//! Shapes lead with a free batch axis, and no layer here mixes it with another, but for a softmax over it: rows are
//! independent by construction.

use std::sync::Arc;

use super::weights::{Needed, Weights, listed};
use super::{Architecture, Description, bad};
use crate::backend::LoadError;
use crate::error::quoted;
use crate::problem::nearest;
use crate::tensor::{DataType, Dim, OutputKind, Shape, Signature, TensorSpec};

/// The most layers of one model.
pub const MAX_LAYERS: usize = 1024;

/// The whole model: one input, one output of FP32.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequential {
    /// FP32, or integers for an embedding; the leading dimension is free.
    pub input: TensorSpec,
    pub output: Arc<str>,
    pub layers: Vec<Layer>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// What its tensors' names begin with: `3` for `3.weight`.
    pub key: String,
    pub kind: Kind,
}

/// One of `torch.nn`'s classes. Sizes that follow from the layer before are `None` where they were not stated.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Linear {
        inputs: Option<usize>,
        outputs: usize,
        bias: bool,
    },
    Conv(Conv),
    BatchNorm {
        axes: Axes,
        features: Option<usize>,
        eps: f64,
        affine: bool,
    },
    LayerNorm {
        shape: Vec<usize>,
        eps: f64,
        weight: bool,
        bias: bool,
    },
    Pool(Pool),
    /// The mean over all axes after the channels.
    GlobalAveragePool(Axes),
    Embedding {
        rows: usize,
        width: usize,
    },
    /// Axes `from..=to`, counted from the end where negative.
    Flatten {
        from: i64,
        to: i64,
    },
    Unflatten {
        axis: i64,
        sizes: Vec<usize>,
    },
    Softmax {
        axis: i64,
        log: bool,
    },
    Activation(Activation),
    /// `Identity`, and what does nothing in evaluation mode.
    Identity,
}

/// How many axes follow batch and channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axes {
    One,
    Two,
}

impl Axes {
    pub fn count(self) -> usize {
        match self {
            Axes::One => 1,
            Axes::Two => 2,
        }
    }
}

/// Sizes are given for two axes; those of one have 1, and no padding, for the first.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv {
    pub axes: Axes,
    pub inputs: Option<usize>,
    pub outputs: usize,
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    /// Before and after, for each axis; `None`: so that the extent stays the same.
    pub padding: Option<[usize; 2]>,
    pub dilation: usize,
    pub groups: usize,
    pub bias: bool,
}

impl Conv {
    /// Zeros before and after the extent of an axis.
    pub fn padding(&self, axis: usize) -> (usize, usize) {
        match self.padding {
            Some(padding) => (padding[axis], padding[axis]),
            None => {
                let total = self.dilation * (self.kernel[axis] - 1);
                (total / 2, total - total / 2)
            }
        }
    }

    /// What becomes of an axis of that extent.
    pub fn extent(&self, axis: usize, extent: usize) -> Result<usize, String> {
        Ok(free_steps(extent, self.padding(axis), self.kernel[axis], self.dilation)? / self.stride[axis] + 1)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    pub axes: Axes,
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub padding: [usize; 2],
    pub ceil: bool,
    pub of: Pooled,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Pooled {
    Maximum { dilation: [usize; 2] },
    Average { count_padding: bool },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    Relu,
    Relu6,
    LeakyRelu {
        slope: f64,
    },
    Elu {
        alpha: f64,
    },
    Gelu,
    /// The approximation by a hyperbolic tangent.
    GeluTanh,
    Silu,
    Mish,
    Sigmoid,
    HardSigmoid,
    HardSwish,
    Tanh,
    Softplus,
}

impl Pool {
    pub fn dilation(&self, axis: usize) -> usize {
        match self.of {
            Pooled::Maximum { dilation } => dilation[axis],
            Pooled::Average { .. } => 1,
        }
    }

    /// How many windows there are along an axis of that extent.
    pub fn windows(&self, axis: usize, extent: usize) -> Result<usize, String> {
        let (kernel, stride, padding) = (self.kernel[axis], self.stride[axis], self.padding[axis]);
        let steps = free_steps(extent, (padding, padding), kernel, self.dilation(axis))?;
        if !self.ceil {
            return Ok(steps / stride + 1);
        }
        let windows = steps.div_ceil(stride) + 1;
        // The last window must begin inside the input or the padding before it.
        Ok(if (windows - 1) * stride >= extent + padding { windows - 1 } else { windows })
    }
}

fn fixed(shape: &Shape) -> Vec<Dim> {
    shape.dims().iter().map(|extent| Dim::Fixed(*extent)).collect()
}

/// How far a window can move along an axis; an error where it does not fit at all.
fn free_steps(extent: usize, padding: (usize, usize), kernel: usize, dilation: usize) -> Result<usize, String> {
    let window = dilation * (kernel - 1) + 1;
    let padded = extent + padding.0 + padding.1;
    padded.checked_sub(window).ok_or_else(|| format!("an extent of {padded}, expected at least the window's {window}"))
}

impl Sequential {
    /// The shape after each layer, beginning with `input`'s own. The error names the layer.
    pub fn shapes(&self, input: &[Dim]) -> Result<Vec<Vec<Dim>>, String> {
        let mut shapes = vec![input.to_vec()];
        for (position, layer) in self.layers.iter().enumerate() {
            // One more than the layers passed so far.
            let after = layer.kind.output(&shapes[position]).map_err(|reason| layer.complaint(position, &reason))?;
            shapes.push(after);
        }
        Ok(shapes)
    }

    /// The elements of the largest tensor on the way from an input of that shape to the output, both among them.
    pub fn most_elements(&self, input: &Shape) -> Result<usize, String> {
        let elements = |dims: &Vec<Dim>| dims.iter().map(|dim| extent(Some(dim))).fold(1, usize::saturating_mul);
        Ok(self.shapes(&fixed(input))?.iter().map(elements).max().unwrap_or(0))
    }

    /// The output's shape for an input of that shape.
    pub fn output_shape(&self, input: &Shape) -> Result<Shape, String> {
        let shapes = self.shapes(&fixed(input))?;
        let fixed = |dim: &Dim| match dim {
            Dim::Fixed(extent) => Some(*extent),
            Dim::Free(_) => None,
        };
        let dims: Option<Vec<usize>> = shapes.last().and_then(|dims| dims.iter().map(fixed).collect());
        // Fixed extents give fixed extents.
        let dims = dims.ok_or("a shape that cannot be computed")?;
        Shape::new(dims).map_err(|error| error.to_string())
    }
}

impl Layer {
    fn complaint(&self, position: usize, reason: &str) -> String {
        format!("layer {position} (`{}`): {reason}", quoted(&self.key))
    }

    pub fn tensor(&self, part: &str) -> String {
        format!("{}.{part}", self.key)
    }
}

impl Kind {
    /// What the layer makes of an input of that shape; the error says what was found and what was expected.
    pub fn output(&self, input: &[Dim]) -> Result<Vec<Dim>, String> {
        let mut dims = input.to_vec();
        match self {
            Kind::Linear { inputs, outputs, .. } => {
                ranked(input, 2..)?;
                last_features(input, *inputs)?;
                replace_last(&mut dims, *outputs);
            }
            Kind::Conv(conv) => {
                let channels = channels(input, conv.axes)?;
                agree("in_channels", conv.inputs, channels)?;
                if channels % conv.groups != 0 || conv.outputs % conv.groups != 0 {
                    let (found, groups) = (format!("{channels} channels to {}", conv.outputs), conv.groups);
                    return Err(format!("{found}, expected multiples of groups = {groups}"));
                }
                dims[1] = Dim::Fixed(conv.outputs);
                over_axes(&mut dims, conv.axes, |axis, extent| conv.extent(axis, extent))?;
            }
            Kind::BatchNorm { axes, features, .. } => {
                let found = match axes {
                    Axes::One if input.len() == 2 => last_features(input, None)?,
                    axes => channels(input, *axes)?,
                };
                agree("num_features", *features, found)?;
            }
            Kind::LayerNorm { shape, .. } => {
                ranked(input, shape.len() + 1..)?;
                let expected: Vec<Dim> = shape.iter().map(|extent| Dim::Fixed(*extent)).collect();
                if !input.ends_with(&expected) {
                    return Err(format!("an input of {}, expected one that ends in {shape:?}", shown(input)));
                }
            }
            Kind::Pool(pool) => {
                channels(input, pool.axes)?;
                over_axes(&mut dims, pool.axes, |axis, extent| pool.windows(axis, extent))?;
            }
            Kind::GlobalAveragePool(axes) => {
                channels(input, *axes)?;
                if input[2..].contains(&Dim::Fixed(0)) {
                    return Err(format!("an input of {}, expected something to average", shown(input)));
                }
                dims[2..].fill(Dim::Fixed(1));
            }
            Kind::Embedding { width, .. } => dims.push(Dim::Fixed(*width)),
            Kind::Flatten { from, to } => {
                let (from, to) = (axis(input, *from)?, axis(input, *to)?);
                if from == 0 || to < from {
                    return Err(format!("axes {from} to {to}, expected axes in order after the batch's, 0"));
                }
                dims.splice(from..=to, [product(&input[from..=to])]);
            }
            Kind::Unflatten { axis: at, sizes } => {
                let at = axis(input, *at)?;
                let whole = sizes.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
                match (&input[at], whole) {
                    (Dim::Fixed(extent), Some(whole)) if at > 0 && *extent == whole => {}
                    _ => return Err(format!("axis {at} of {}, expected one of {sizes:?} multiplied", shown(input))),
                }
                dims.splice(at..=at, sizes.iter().map(|size| Dim::Fixed(*size)));
            }
            Kind::Softmax { axis: at, .. } => {
                axis(input, *at)?;
            }
            Kind::Activation(_) | Kind::Identity => {}
        }
        Ok(dims)
    }

    /// The tensors it needs for an input of that shape, which [`Kind::output`] has accepted: their last names and shapes.
    fn needs(&self, input: &[Dim]) -> Vec<(&'static str, Vec<usize>)> {
        let (width, channels) = (extent(input.last()), extent(input.get(1)));
        match self {
            Kind::Linear { outputs, bias, .. } => with_bias(vec![*outputs, width], *outputs, *bias),
            Kind::Conv(conv) => {
                let mut shape = vec![conv.outputs, channels / conv.groups];
                shape.extend(&conv.kernel[2 - conv.axes.count()..]);
                with_bias(shape, conv.outputs, conv.bias)
            }
            Kind::BatchNorm { affine, .. } => {
                let mut needs = vec![("running_mean", vec![channels]), ("running_var", vec![channels])];
                if *affine {
                    needs.extend([("weight", vec![channels]), ("bias", vec![channels])]);
                }
                needs
            }
            Kind::LayerNorm { shape, weight, bias, .. } => {
                let parts = [("weight", *weight), ("bias", *bias)].into_iter().filter(|(_, there)| *there);
                parts.map(|(part, _)| (part, shape.clone())).collect()
            }
            Kind::Embedding { rows, width } => vec![("weight", vec![*rows, *width])],
            _ => Vec::new(),
        }
    }

    /// Whether a tensor of that last name may lie in the file and is not used.
    fn tolerates(&self, part: &str) -> bool {
        matches!(self, Kind::BatchNorm { .. }) && part == "num_batches_tracked"
    }

    /// Whether it leaves every number as it was.
    fn moves_only(&self) -> bool {
        matches!(self, Kind::Identity)
    }
}

fn with_bias(weight: Vec<usize>, outputs: usize, bias: bool) -> Vec<(&'static str, Vec<usize>)> {
    let mut needs = vec![("weight", weight)];
    if bias {
        needs.push(("bias", vec![outputs]));
    }
    needs
}

/// 0 for a free one, where [`Kind::output`] has refused the input.
fn extent(dim: Option<&Dim>) -> usize {
    match dim {
        Some(Dim::Fixed(extent)) => *extent,
        _ => 0,
    }
}

fn ranked(input: &[Dim], ranks: std::ops::RangeFrom<usize>) -> Result<(), String> {
    if ranks.contains(&input.len()) {
        return Ok(());
    }
    Err(format!("an input of {}, expected {} dimensions or more, the batch first", shown(input), ranks.start))
}

fn last_features(input: &[Dim], stated: Option<usize>) -> Result<usize, String> {
    match input.last() {
        Some(Dim::Fixed(features)) => agree("in_features", stated, *features),
        _ => Err(format!("an input of {}, expected a fixed last dimension", shown(input))),
    }
}

fn replace_last(dims: &mut [Dim], extent: usize) {
    if let Some(last) = dims.last_mut() {
        *last = Dim::Fixed(extent);
    }
}

/// The channels of `[batch, channels, …]`.
fn channels(input: &[Dim], axes: Axes) -> Result<usize, String> {
    match input {
        [_, Dim::Fixed(channels), rest @ ..] if rest.len() == axes.count() => Ok(*channels),
        _ => {
            let rank = 2 + axes.count();
            Err(format!("an input of {}, expected {rank} dimensions: batch, fixed channels, …", shown(input)))
        }
    }
}

fn agree(name: &str, stated: Option<usize>, found: usize) -> Result<usize, String> {
    match stated {
        Some(stated) if stated != found => Err(format!("{name} = {stated}, expected the {found} that come in")),
        _ => Ok(found),
    }
}

/// Replaces the extents after the channels; free ones stay free. The second of two axes is axis 1, as is an only one.
fn over_axes(
    dims: &mut [Dim],
    axes: Axes,
    after: impl Fn(usize, usize) -> Result<usize, String>,
) -> Result<(), String> {
    for (axis, dim) in (2 - axes.count()..2).zip(&mut dims[2..]) {
        *dim = match dim {
            Dim::Fixed(extent) => Dim::Fixed(after(axis, *extent)?),
            Dim::Free(_) => Dim::Free(None),
        };
    }
    Ok(())
}

/// An axis by its number, from the end where negative.
pub fn axis(input: &[Dim], at: i64) -> Result<usize, String> {
    let rank = input.len() as i64;
    let axis = if at < 0 { at + rank } else { at };
    match usize::try_from(axis) {
        Ok(axis) if axis < input.len() => Ok(axis),
        _ => Err(format!("axis {at}, expected one of an input of {}", shown(input))),
    }
}

fn product(dims: &[Dim]) -> Dim {
    let fixed = dims.iter().map(|dim| if let Dim::Fixed(extent) = dim { Some(*extent) } else { None });
    let product = fixed.collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().try_fold(1, usize::checked_mul));
    product.map_or(Dim::Free(None), Dim::Fixed)
}

fn shown(dims: &[Dim]) -> String {
    crate::tensor::wire_shape(&dims.iter().map(Dim::to_wire).collect::<Vec<_>>())
}

/// Compares the layers with each other and with the tensors, and says what they make together.
pub(super) fn describe(sequential: Sequential, weights: Weights) -> Result<Description, LoadError> {
    let input = &sequential.input;
    let dims = input.dims.as_deref().unwrap_or_default();
    if !input.has_free_rows() {
        return Err(bad(format!("input `{}` of {}, expected -1, the batch, first", quoted(&input.name), shown(dims))));
    }
    check_input_type(&sequential).map_err(bad)?;
    let shapes = sequential.shapes(dims).map_err(bad)?;
    let needed = needed(&sequential, &shapes).map_err(bad)?;
    let unused: Vec<String> =
        weights.check(&needed)?.into_iter().filter(|name| !tolerated(&sequential, name)).collect();
    if !unused.is_empty() {
        let names = || needed.iter().map(|needed| &*needed.name);
        return Err(bad(listed(&unused, |name| match nearest(name, names()) {
            Some(near) => format!("tensor `{}` is used by no layer; the nearest that is: `{near}`", quoted(name)),
            None => format!("tensor `{}` is used by no layer", quoted(name)),
        })));
    }
    let after = shapes.last().cloned().unwrap_or_default();
    let output = TensorSpec { name: Arc::clone(&sequential.output), dtype: DataType::Fp32, dims: Some(after) };
    Ok(Description {
        output_kinds: vec![kind(&sequential, &output)],
        couples_rows: coupled(&sequential, &shapes),
        signature: Signature { inputs: vec![input.clone()], outputs: vec![output] },
        architecture: Architecture::Sequential(sequential),
        labels: None,
        producer: if weights.format.as_deref() == Some("pt") { "pytorch".into() } else { String::new() },
        warnings: Vec::new(),
        places: weights.places,
    })
}

fn check_input_type(sequential: &Sequential) -> Result<(), String> {
    let integers = [DataType::Int64, DataType::Int32];
    let first = sequential.layers.iter().position(|layer| !layer.kind.moves_only());
    let embeds = |position: usize| matches!(sequential.layers[position].kind, Kind::Embedding { .. });
    let (name, dtype) = (quoted(&sequential.input.name), sequential.input.dtype);
    if let Some(late) = (0..sequential.layers.len()).find(|position| embeds(*position) && Some(*position) != first) {
        return Err(
            sequential.layers[late].complaint(late, "an embedding of floats, expected it to be the first layer")
        );
    }
    match first.is_some_and(embeds) {
        true if !integers.contains(&dtype) => {
            Err(format!("input `{name}` is {dtype}, expected INT64 or INT32 to embed"))
        }
        false if dtype != DataType::Fp32 => Err(format!("input `{name}` is {dtype}, expected FP32")),
        _ => Ok(()),
    }
}

fn needed(sequential: &Sequential, shapes: &[Vec<Dim>]) -> Result<Vec<Needed>, String> {
    let mut needed: Vec<Needed> = Vec::new();
    for (layer, input) in sequential.layers.iter().zip(shapes) {
        for (part, dims) in layer.kind.needs(input) {
            let name = layer.tensor(part);
            if needed.iter().any(|other| other.name == name) {
                return Err(format!("two layers have the key `{}`, expected one", quoted(&layer.key)));
            }
            needed.push(Needed { name, dims });
        }
    }
    Ok(needed)
}

fn tolerated(sequential: &Sequential, name: &str) -> bool {
    let Some((key, part)) = name.rsplit_once('.') else { return false };
    sequential.layers.iter().any(|layer| layer.key == key && layer.kind.tolerates(part))
}

fn coupled(sequential: &Sequential, shapes: &[Vec<Dim>]) -> Option<String> {
    let over_rows = |(layer, input): (&Layer, &Vec<Dim>)| match layer.kind {
        Kind::Softmax { axis: at, .. } => axis(input, at) == Ok(0),
        _ => false,
    };
    sequential.layers.iter().zip(shapes).any(over_rows).then(|| "Softmax over axis 0 couples rows".to_string())
}

/// What the last layer that computes says of the numbers; a guess for monitoring, as it is for ONNX graphs.
fn kind(sequential: &Sequential, output: &TensorSpec) -> OutputKind {
    let dims = output.dims.as_deref().unwrap_or_default();
    let over_last = |at: i64| axis(dims, at).is_ok_and(|axis| axis > 0 && axis + 1 == dims.len());
    let classes = if dims.len() > 1 { extent(dims.last()) } else { 0 };
    let last = sequential.layers.iter().rev().map(|layer| &layer.kind).find(|kind| !kind.moves_only());
    match last {
        Some(Kind::Softmax { axis, log: false }) if over_last(*axis) => OutputKind::Probabilities,
        Some(Kind::Softmax { axis, log: true }) if over_last(*axis) => OutputKind::LogProbabilities,
        Some(Kind::Activation(Activation::Sigmoid)) if dims.len() == 2 && classes == 1 => OutputKind::BinaryProbability,
        _ if classes >= 2 && output.name.to_ascii_lowercase().contains("logit") => OutputKind::Logits,
        _ => OutputKind::Values,
    }
}

#[cfg(test)]
mod tests {
    use super::super::weights::tests::floats;
    use super::super::{Declared, MODEL_FILE};
    use super::*;

    fn layer(key: &str, kind: Kind) -> Layer {
        Layer { key: key.into(), kind }
    }

    fn dims(wire: &[i64]) -> Vec<Dim> {
        wire.iter().map(|extent| usize::try_from(*extent).map_or(Dim::Free(None), Dim::Fixed)).collect()
    }

    fn spec(wire: &[i64], dtype: DataType) -> TensorSpec {
        TensorSpec { name: "x".into(), dtype, dims: Some(dims(wire)) }
    }

    fn linear(outputs: usize) -> Kind {
        Kind::Linear { inputs: None, outputs, bias: true }
    }

    fn perceptron() -> Sequential {
        let layers = vec![
            layer("0", linear(3)),
            layer("1", Kind::Activation(Activation::Relu)),
            layer("2", Kind::Identity),
            layer("3", linear(2)),
            layer("4", Kind::Softmax { axis: -1, log: false }),
        ];
        Sequential { input: spec(&[-1, 4], DataType::Fp32), output: "y".into(), layers }
    }

    fn read(sequential: Sequential, tensors: &[(&str, &[usize])]) -> Result<Description, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(MODEL_FILE), floats(tensors)).unwrap();
        Description::read(folder.path(), &Declared::Sequential(sequential)).map_err(|error| error.to_string())
    }

    const TENSORS: [(&str, &[usize]); 4] =
        [("0.weight", &[3, 4]), ("0.bias", &[3]), ("3.weight", &[2, 3]), ("3.bias", &[2])];

    #[test]
    fn a_perceptron_is_described() {
        let description = read(perceptron(), &TENSORS).unwrap();
        assert_eq!(description.signature.outputs[0].dims, Some(dims(&[-1, 2])));
        assert_eq!(description.output_kinds, [OutputKind::Probabilities]);
        assert_eq!((description.couples_rows, description.producer.as_str()), (None, ""));
    }

    #[test]
    fn a_renamed_key_is_a_refusal_that_names_it() {
        let mut renamed = TENSORS;
        renamed[2].0 = "3.weights";
        assert_eq!(
            read(perceptron(), &renamed).unwrap_err(),
            "tensor `3.weight` is missing, expected [2, 3]; `3.weights`, perhaps, which nothing uses"
        );
        let extra = [&TENSORS[..], &[("5.weight", &[1])]].concat();
        assert_eq!(
            read(perceptron(), &extra).unwrap_err(),
            "tensor `5.weight` is used by no layer; the nearest that is: `0.weight`"
        );
        let mut misshapen = TENSORS;
        misshapen[0].1 = &[4, 3];
        assert_eq!(read(perceptron(), &misshapen).unwrap_err(), "tensor `0.weight` has shape [4, 3], expected [3, 4]");
    }

    #[test]
    fn inputs_that_cannot_be_are_refused() {
        let with = |change: &dyn Fn(&mut Sequential)| {
            let mut sequential = perceptron();
            change(&mut sequential);
            read(sequential, &TENSORS).unwrap_err()
        };
        assert!(with(&|s| s.input = spec(&[1, 4], DataType::Fp32)).contains("expected -1, the batch, first"));
        assert!(with(&|s| s.input = spec(&[-1, -1], DataType::Fp32)).contains("expected a fixed last dimension"));
        assert!(with(&|s| s.input = spec(&[-1], DataType::Fp32)).contains("expected 2 dimensions or more"));
        assert!(with(&|s| s.input = spec(&[-1, 4], DataType::Int64)).contains("is INT64, expected FP32"));
        let embedding = || layer("e", Kind::Embedding { rows: 5, width: 4 });
        assert!(with(&|s| s.layers.insert(0, embedding())).contains("expected INT64 or INT32"));
        assert!(with(&|s| s.layers.insert(1, embedding())).contains("layer 1 (`e`): an embedding of floats"));
        assert!(with(&|s| s.layers[3].key = "0".into()).contains("two layers have the key `0`"));
        let stated = Kind::Linear { inputs: Some(5), outputs: 3, bias: true };
        assert!(with(&|s| s.layers[0].kind = stated.clone()).contains("in_features = 5, expected the 4 that come in"));
    }

    #[test]
    fn what_the_last_layer_means() {
        let ending = |output: &str, kinds: &[Kind]| {
            let mut sequential = perceptron();
            sequential.output = output.into();
            sequential.layers.truncate(4);
            sequential.layers.extend(kinds.iter().map(|kind| layer("z", kind.clone())));
            read(sequential, &TENSORS).map(|description| (description.output_kinds[0], description.couples_rows))
        };
        let softmax = |axis, log| Kind::Softmax { axis, log };
        assert_eq!(ending("y", &[]).unwrap().0, OutputKind::Values);
        assert_eq!(ending("logits", &[]).unwrap().0, OutputKind::Logits);
        assert_eq!(ending("y", &[softmax(1, true), Kind::Identity]).unwrap().0, OutputKind::LogProbabilities);
        assert_eq!(
            ending("y", &[softmax(-1, false), Kind::Activation(Activation::Relu)]).unwrap().0,
            OutputKind::Values
        );
        let coupled = Some("Softmax over axis 0 couples rows".to_string());
        assert_eq!(ending("y", &[softmax(0, false)]).unwrap(), (OutputKind::Values, coupled));
        assert!(ending("y", &[softmax(2, false)]).unwrap_err().contains("layer 4 (`z`): axis 2, expected one of"));
    }

    #[test]
    fn shapes_follow_pytorch() {
        let conv = Conv {
            axes: Axes::Two,
            inputs: None,
            outputs: 6,
            kernel: [3, 2],
            stride: [2, 1],
            padding: Some([1, 0]),
            dilation: 2,
            groups: 2,
            bias: false,
        };
        let pool = |ceil, of| Pool { axes: Axes::One, kernel: [1, 3], stride: [1, 2], padding: [0, 1], ceil, of };
        let maximum = || Pooled::Maximum { dilation: [1, 1] };
        let after = |kind: Kind, input: &[i64]| kind.output(&dims(input)).map(|dims| shown(&dims));
        let told = |kind: Kind, input: &[i64]| after(kind, input).unwrap();
        assert_eq!(told(Kind::Conv(conv.clone()), &[-1, 4, 9, 7]), "[-1,6,4,5]");
        assert_eq!(
            told(Kind::Conv(Conv { padding: None, stride: [1, 1], ..conv.clone() }), &[-1, 4, 9, 7]),
            "[-1,6,9,7]"
        );
        assert_eq!(told(Kind::Conv(conv.clone()), &[-1, 4, -1, 7]), "[-1,6,-1,5]");
        assert!(
            after(Kind::Conv(conv.clone()), &[-1, 4, 2, 7]).unwrap_err().contains("extent of 4, expected at least")
        );
        assert!(after(Kind::Conv(conv.clone()), &[-1, 3, 9, 7]).unwrap_err().contains("multiples of groups = 2"));
        assert!(after(Kind::Conv(conv), &[-1, 4, 9]).unwrap_err().contains("expected 4 dimensions"));
        assert_eq!(told(Kind::Pool(pool(false, maximum())), &[-1, 2, 6]), "[-1,2,3]");
        assert_eq!(told(Kind::Pool(pool(true, maximum())), &[-1, 2, 6]), "[-1,2,4]");
        assert_eq!(told(Kind::Pool(pool(true, Pooled::Average { count_padding: true })), &[-1, 2, 5]), "[-1,2,3]");
        assert_eq!(told(Kind::GlobalAveragePool(Axes::Two), &[-1, 2, -1, 5]), "[-1,2,1,1]");
        assert_eq!(told(Kind::Flatten { from: 1, to: -1 }, &[-1, 2, 3, 4]), "[-1,24]");
        assert_eq!(told(Kind::Flatten { from: 1, to: 2 }, &[-1, 2, -1, 4]), "[-1,-1,4]");
        assert!(after(Kind::Flatten { from: 0, to: -1 }, &[-1, 2]).unwrap_err().contains("after the batch's"));
        assert_eq!(told(Kind::Unflatten { axis: 1, sizes: vec![1, 8, 8] }, &[-1, 64]), "[-1,1,8,8]");
        assert!(after(Kind::Unflatten { axis: 1, sizes: vec![2, 8] }, &[-1, 64]).is_err());
        assert!(after(Kind::Unflatten { axis: 0, sizes: vec![1] }, &[1, 64]).is_err());
        assert_eq!(told(Kind::Embedding { rows: 9, width: 3 }, &[-1, -1]), "[-1,-1,3]");
        let norm = Kind::LayerNorm { shape: vec![3, 4], eps: 1e-5, weight: true, bias: true };
        assert_eq!(told(norm.clone(), &[-1, 3, 4]), "[-1,3,4]");
        assert!(after(norm, &[-1, 4]).is_err());
    }
}
