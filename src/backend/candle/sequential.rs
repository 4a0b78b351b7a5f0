//! A `torch.nn.Sequential` computed layer by layer.

use candle_core::{Result, Tensor};

use super::tensors::Tensors;
use super::{ops, product};
use crate::backend::LoadError;
use crate::backend::safetensors::layers::{Activation, Axes, Conv, Kind, Layer, Pool, Sequential};
use crate::tensor::Dim;

/// The layers with their weights, immutable.
pub struct Network(Vec<Step>);

enum Step {
    Linear {
        weight: Tensor,
        bias: Option<Tensor>,
    },
    Conv {
        conv: Conv,
        weight: Tensor,
        bias: Option<Tensor>,
    },
    /// Subtracts the mean, multiplies, adds: each [channels, 1, …].
    BatchNorm {
        mean: Tensor,
        scale: Tensor,
        bias: Option<Tensor>,
    },
    LayerNorm {
        width: usize,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        eps: f64,
    },
    Pool(Pool),
    GlobalAveragePool(Axes),
    Embedding(Tensor),
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
}

impl Network {
    /// The weights are known to be there in their shapes.
    pub fn load(sequential: &Sequential, tensors: &Tensors) -> std::result::Result<Network, LoadError> {
        let mut steps = Vec::new();
        for layer in &sequential.layers {
            steps.extend(step(layer, tensors)?);
        }
        Ok(Network(steps))
    }

    /// The input's shape is known to pass through all layers; indices to embed are known to be in range.
    pub fn forward(&self, input: Tensor) -> Result<Tensor> {
        self.0.iter().try_fold(input, |x, step| step.forward(&x))
    }
}

fn step(layer: &Layer, tensors: &Tensors) -> std::result::Result<Option<Step>, LoadError> {
    let tensor = |part: &str| tensors.tensor(&layer.tensor(part));
    Ok(Some(match &layer.kind {
        Kind::Linear { bias, .. } => {
            let weight = tensors.transposed(&layer.tensor("weight"))?;
            Step::Linear { weight, bias: bias.then(|| tensor("bias")).transpose()? }
        }
        Kind::Conv(conv) => Step::Conv {
            conv: conv.clone(),
            weight: tensor("weight")?,
            bias: conv.bias.then(|| tensor("bias")).transpose()?,
        },
        Kind::BatchNorm { eps, affine, .. } => {
            let mut scale: Vec<f32> = tensors
                .vector(&layer.tensor("running_var"))?
                .iter()
                .map(|v| (1.0 / (f64::from(*v) + eps).sqrt()) as f32)
                .collect();
            if *affine {
                let weight = tensors.vector(&layer.tensor("weight"))?;
                scale.iter_mut().zip(weight).for_each(|(scale, weight)| *scale *= weight);
            }
            let channels = scale.len();
            let scale = tensors.placed(scale, &[channels], "running_var")?;
            Step::BatchNorm { mean: tensor("running_mean")?, scale, bias: affine.then(|| tensor("bias")).transpose()? }
        }
        Kind::LayerNorm { shape, eps, weight, bias } => Step::LayerNorm {
            width: shape.iter().product(),
            weight: weight.then(|| tensor("weight")).transpose()?,
            bias: bias.then(|| tensor("bias")).transpose()?,
            eps: *eps,
        },
        Kind::Pool(pool) => Step::Pool(pool.clone()),
        Kind::GlobalAveragePool(axes) => Step::GlobalAveragePool(*axes),
        Kind::Embedding { .. } => Step::Embedding(tensor("weight")?),
        Kind::Flatten { from, to } => Step::Flatten { from: *from, to: *to },
        Kind::Unflatten { axis, sizes } => Step::Unflatten { axis: *axis, sizes: sizes.clone() },
        Kind::Softmax { axis, log } => Step::Softmax { axis: *axis, log: *log },
        Kind::Activation(activation) => Step::Activation(*activation),
        Kind::Identity => return Ok(None),
    }))
}

impl Step {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Step::Linear { weight, bias } => linear(x, weight, bias.as_ref()),
            Step::Conv { conv, weight, bias } => convolve(x, conv, weight, bias.as_ref()),
            Step::BatchNorm { mean, scale, bias } => {
                let spread = |vector: &Tensor| along_channels(vector, x.rank());
                let scaled = x.broadcast_sub(&spread(mean)?)?.broadcast_mul(&spread(scale)?)?;
                match bias {
                    Some(bias) => scaled.broadcast_add(&spread(bias)?),
                    None => Ok(scaled),
                }
            }
            Step::LayerNorm { width, weight, bias, eps } => {
                ops::layer_norm(x, *width, weight.as_ref(), bias.as_ref(), *eps)
            }
            Step::Pool(pool) => pooled(x, pool),
            Step::GlobalAveragePool(axes) => match axes {
                Axes::One => x.mean_keepdim(2),
                Axes::Two => x.mean_keepdim((2, 3)),
            },
            Step::Embedding(weight) => embed(weight, x),
            Step::Flatten { from, to } => x.flatten(at(x, *from), at(x, *to)),
            Step::Unflatten { axis, sizes } => {
                let mut dims = x.dims().to_vec();
                let axis = at(x, *axis);
                dims.splice(axis..=axis, sizes.iter().copied());
                x.reshape(dims)
            }
            Step::Softmax { axis, log } => ops::softmax(x, at(x, *axis), *log),
            Step::Activation(activation) => ops::activate(x, *activation),
        }
    }
}

/// An axis that the shapes were seen to have.
fn at(x: &Tensor, axis: i64) -> usize {
    let dims: Vec<Dim> = x.dims().iter().map(|extent| Dim::Fixed(*extent)).collect();
    crate::backend::safetensors::layers::axis(&dims, axis).unwrap_or_default()
}

/// `x` [.., in], `weight` [in, out], `bias` [out].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (inputs, outputs) = weight.dims2()?;
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = outputs;
    }
    let product = product::product(&x.contiguous()?.reshape(((), inputs))?, weight)?;
    let sum = match bias {
        Some(bias) => product.broadcast_add(bias)?,
        None => product,
    };
    sum.reshape(dims)
}

/// Rows of `weight` by indices of any shape.
pub fn embed(weight: &Tensor, indices: &Tensor) -> Result<Tensor> {
    let mut dims = indices.dims().to_vec();
    dims.extend(weight.dims().last());
    weight.index_select(&indices.flatten_all()?, 0)?.reshape(dims)
}

/// A vector of the channels' as [channels, 1, …], to be spread over a tensor of that rank.
fn along_channels(vector: &Tensor, rank: usize) -> Result<Tensor> {
    let mut dims = vec![vector.elem_count()];
    dims.resize(rank.saturating_sub(1).max(1), 1);
    vector.reshape(dims)
}

fn convolve(x: &Tensor, conv: &Conv, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let x = in_two_axes(x, conv.axes)?;
    let (_, _, height, width) = x.dims4()?;
    let extent = |axis, extent| conv.extent(axis, extent).map_err(candle_core::Error::msg);
    let y = product::convolve(&x, weight, conv, [extent(0, height)?, extent(1, width)?])?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&along_channels(bias, y.rank())?)?,
        None => y,
    };
    out_of_two_axes(y, conv.axes)
}

fn pooled(x: &Tensor, pool: &Pool) -> Result<Tensor> {
    let x = in_two_axes(x, pool.axes)?;
    let (_, _, height, width) = x.dims4()?;
    let windows = |axis, extent| pool.windows(axis, extent).map_err(candle_core::Error::msg);
    out_of_two_axes(ops::pool(&x, pool, [windows(0, height)?, windows(1, width)?])?, pool.axes)
}

/// One axis behind the channels is the second of two, the first of extent 1.
fn in_two_axes(x: &Tensor, axes: Axes) -> Result<Tensor> {
    match axes {
        Axes::One => x.unsqueeze(2),
        Axes::Two => Ok(x.clone()),
    }
}

fn out_of_two_axes(x: Tensor, axes: Axes) -> Result<Tensor> {
    match axes {
        Axes::One => x.squeeze(2),
        Axes::Two => Ok(x),
    }
}
