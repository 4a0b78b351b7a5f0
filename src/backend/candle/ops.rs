//! Operations that candle has not, or has with other semantics than PyTorch's: not-a-numbers go through, variances are
//! computed in two passes, pools have padding. Each works on contiguous FP32 and shares its work out among the threads of
//! the pool that it runs in; on another device than the CPU it is [`composed`] of candle's own.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::composed;
use crate::backend::safetensors::layers::{Activation, Pool, Pooled};

/// Elements that one thread takes at a time.
const CHUNK: usize = 4096;

/// The elements, which every operation here wants in one piece.
pub fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&storage.as_slice::<f32>()?[from..to]),
        None => bail!("a tensor in pieces, expected it contiguous"),
    }
}

/// The same of a tensor that is on the CPU.
pub fn held<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(storage) => elements(storage, layout),
        _ => bail!("a tensor elsewhere than on the CPU"),
    }
}

/// A function of each element.
struct Each<F>(F);

impl<F: Fn(f32) -> f32 + Sync> CustomOp1 for Each<F> {
    fn name(&self) -> &'static str {
        "each"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let source = elements(storage, layout)?;
        let mut target = vec![0f32; source.len()];
        target.par_chunks_mut(CHUNK).zip(source.par_chunks(CHUNK)).for_each(|(target, source)| {
            for (to, from) in target.iter_mut().zip(source) {
                *to = (self.0)(*from);
            }
        });
        Ok((CpuStorage::F32(target), layout.shape().clone()))
    }
}

/// A function of each row, where rows are what the last axis counts.
struct EachRow<F> {
    width: usize,
    of: F,
}

impl<F: Fn(&[f32], &mut [f32]) + Sync> CustomOp1 for EachRow<F> {
    fn name(&self) -> &'static str {
        "each row"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let source = elements(storage, layout)?;
        let mut target = vec![0f32; source.len()];
        let chunk = self.width * CHUNK.div_ceil(self.width);
        target.par_chunks_mut(chunk).zip(source.par_chunks(chunk)).for_each(|(target, source)| {
            for (to, from) in target.chunks_mut(self.width).zip(source.chunks(self.width)) {
                (self.of)(from, to);
            }
        });
        Ok((CpuStorage::F32(target), layout.shape().clone()))
    }
}

fn each(x: &Tensor, function: impl Fn(f32) -> f32 + Sync) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&Each(function))
}

/// `width` is at least 1 and divides the number of elements.
fn each_row(x: &Tensor, width: usize, of: impl Fn(&[f32], &mut [f32]) + Sync) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&EachRow { width, of })
}

// Comparisons are written so that a NaN fails them and is handed on.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::activate(x, activation);
    }
    match activation {
        Activation::Relu => each(x, |x| if x < 0.0 { 0.0 } else { x }),
        Activation::Relu6 => each(x, relu6),
        Activation::LeakyRelu { slope } => {
            let slope = slope as f32;
            each(x, move |x| if x > 0.0 { x } else { x * slope })
        }
        Activation::Elu { alpha } => {
            let alpha = alpha as f32;
            each(x, move |x| if x > 0.0 { x } else { alpha * x.exp_m1() })
        }
        Activation::Gelu => {
            each(x, |x| 0.5 * x * (1.0 + candle_core::cpu::erf::erf_f32(x * std::f32::consts::FRAC_1_SQRT_2)))
        }
        Activation::GeluTanh => each(x, |x| {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }),
        Activation::Silu => each(x, |x| x * sigmoid(x)),
        Activation::Mish => each(x, |x| x * softplus(x).tanh()),
        Activation::Sigmoid => each(x, sigmoid),
        Activation::HardSigmoid => each(x, |x| relu6(x + 3.0) / 6.0),
        Activation::HardSwish => each(x, |x| x * relu6(x + 3.0) / 6.0),
        Activation::Tanh => each(x, f32::tanh),
        Activation::Softplus => each(x, softplus),
    }
}

fn relu6(x: f32) -> f32 {
    x.clamp(0.0, 6.0)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The identity from 20 on, as in PyTorch.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// Over the last axis.
pub fn softmax_last(x: &Tensor, log: bool) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::softmax(x, x.rank().saturating_sub(1), log);
    }
    let width = x.dims().last().copied().unwrap_or(1).max(1);
    each_row(x, width, move |from, to| {
        let greatest = from.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0f64;
        for (to, from) in to.iter_mut().zip(from) {
            *to = (from - greatest).exp();
            sum += f64::from(*to);
        }
        if log {
            let shift = sum.ln() as f32;
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from - greatest - shift);
        } else {
            let scale = (1.0 / sum) as f32;
            to.iter_mut().for_each(|to| *to *= scale);
        }
    })
}

pub fn softmax(x: &Tensor, axis: usize, log: bool) -> Result<Tensor> {
    let last = x.rank().saturating_sub(1);
    if axis == last {
        softmax_last(x, log)
    } else {
        softmax_last(&x.transpose(axis, last)?, log)?.transpose(axis, last)
    }
}

/// Scales each row of `width` elements to mean 0 and variance 1, then by `weight`, and adds `bias`, where there are any.
pub fn layer_norm(
    x: &Tensor,
    width: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::layer_norm(x, width, weight, bias, eps);
    }
    let parts = [weight, bias].map(|part| part.map(Tensor::storage_and_layout));
    let [weight, bias] = parts.each_ref().map(|part| part.as_ref().map(|(storage, layout)| held(storage, layout)));
    let (weight, bias) = (weight.transpose()?, bias.transpose()?);
    each_row(x, width.max(1), move |from, to| {
        let mean = from.iter().map(|x| f64::from(*x)).sum::<f64>() / width as f64;
        let variance = from.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / width as f64;
        let (mean, scale) = (mean as f32, (1.0 / (variance + eps).sqrt()) as f32);
        for (i, (to, from)) in to.iter_mut().zip(from).enumerate() {
            let scaled = (from - mean) * scale;
            *to = scaled * weight.map_or(1.0, |weight| weight[i]) + bias.map_or(0.0, |bias| bias[i]);
        }
    })
}

/// Scales each row of the last axis to length 1; what is shorter than `least` is divided by that.
pub fn normalize(x: &Tensor, least: f32) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::normalize(x, least);
    }
    let width = x.dims().last().copied().unwrap_or(1).max(1);
    each_row(x, width, move |from, to| {
        let length = from.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
        let length = if length < least { least } else { length };
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from / length);
    })
}

/// Pools the last two axes of [batch, channels, height, width] into `windows`.
pub fn pool(x: &Tensor, pool: &Pool, windows: [usize; 2]) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::pool(x, pool, windows);
    }
    x.contiguous()?.apply_op1_no_bwd(&Windows { pool, windows })
}

struct Windows<'a> {
    pool: &'a Pool,
    windows: [usize; 2],
}

impl CustomOp1 for Windows<'_> {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let source = elements(storage, layout)?;
        let (batch, channels, height, width) = layout.shape().dims4()?;
        let [rows, columns] = self.windows;
        let mut target = vec![0f32; batch * channels * rows * columns];
        // An empty plane has no window, nor a place in the output.
        let (from, to) = ((height * width).max(1), (rows * columns).max(1));
        target.par_chunks_mut(to).zip(source.par_chunks(from)).for_each(|(target, plane)| {
            for (i, target) in target.iter_mut().enumerate() {
                *target = self.window([i / columns, i % columns], plane, [height, width]);
            }
        });
        Ok((CpuStorage::F32(target), Shape::from_dims(&[batch, channels, rows, columns])))
    }
}

impl Windows<'_> {
    fn window(&self, at: [usize; 2], plane: &[f32], extents: [usize; 2]) -> f32 {
        let pool = self.pool;
        // Positions count the padding in front; `inside` is what is left of them without it.
        let begin = [0, 1].map(|axis| at[axis] * pool.stride[axis]);
        let inside = |axis: usize| {
            let (dilation, padding, extent) = (pool.dilation(axis), pool.padding[axis], extents[axis]);
            (0..pool.kernel[axis])
                .map(move |step| begin[axis] + step * dilation)
                .filter_map(move |position| position.checked_sub(padding).filter(move |position| *position < extent))
        };
        let values = inside(0).flat_map(|row| inside(1).map(move |column| plane[row * extents[1] + column]));
        match pool.of {
            Pooled::Maximum { .. } => {
                values.fold(f32::NEG_INFINITY, |most, x| if x > most || x.is_nan() { x } else { most })
            }
            Pooled::Average { count_padding } => {
                let counted = |axis: usize| match count_padding {
                    // A window that begins in the padding after the input ends with that padding.
                    true => pool.kernel[axis].min(extents[axis] + 2 * pool.padding[axis] - begin[axis]),
                    false => inside(axis).count(),
                };
                values.sum::<f32>() / (counted(0) * counted(1)) as f32
            }
        }
    }
}
