//! The operations of [`ops`](super::ops) and [`product`](super::product), composed of candle's own, for devices that these
//! cannot compute on. The same semantics: not-a-numbers go through, variances are computed in two passes, pools have
//! padding. Written for any device, so that tests hold them against the others on the CPU.

use candle_core::{D, Result, Tensor};

use crate::backend::safetensors::layers::{Activation, Conv, Pool, Pooled};

/// A tensor of that number only, like another one.
fn full(value: f32, like: &Tensor) -> Result<Tensor> {
    Tensor::full(value, like.shape(), like.device())
}

// candle's own minimum and maximum lose a NaN on GPUs; a comparison that it fails hands it on.
fn at_least(x: &Tensor, least: f32) -> Result<Tensor> {
    x.lt(least)?.where_cond(&full(least, x)?, x)
}

fn at_most(x: &Tensor, most: f32) -> Result<Tensor> {
    x.gt(most)?.where_cond(&full(most, x)?, x)
}

/// The greater elements; NaN where either is.
fn greater(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let nan = y.ne(y)?;
    let greater = y.gt(x)?;
    // A NaN in `x` fails the comparison and stays.
    (nan + greater)?.where_cond(y, x)
}

pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let x = &x.contiguous()?;
    match activation {
        Activation::Relu => at_least(x, 0.0),
        Activation::Relu6 => relu6(x),
        Activation::LeakyRelu { slope } => x.gt(0f32)?.where_cond(x, &(x * slope)?),
        Activation::Elu { alpha } => x.elu(alpha),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Silu => x * sigmoid(x)?,
        Activation::Mish => x * softplus(x)?.tanh()?,
        Activation::Sigmoid => sigmoid(x),
        Activation::HardSigmoid => relu6(&(x + 3.0)?)? / 6.0,
        Activation::HardSwish => (x * relu6(&(x + 3.0)?)?)? / 6.0,
        Activation::Tanh => x.tanh(),
        Activation::Softplus => softplus(x),
    }
}

fn relu6(x: &Tensor) -> Result<Tensor> {
    at_most(&at_least(x, 0.0)?, 6.0)
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

/// The identity from 20 on.
fn softplus(x: &Tensor) -> Result<Tensor> {
    x.gt(20f32)?.where_cond(x, &(x.exp()? + 1.0)?.log()?)
}

pub fn softmax(x: &Tensor, axis: usize, log: bool) -> Result<Tensor> {
    let x = x.contiguous()?;
    let shifted = x.broadcast_sub(&x.max_keepdim(axis)?)?;
    let scores = shifted.exp()?;
    let sum = scores.sum_keepdim(axis)?;
    if log { shifted.broadcast_sub(&sum.log()?) } else { scores.broadcast_div(&sum) }
}

pub fn layer_norm(
    x: &Tensor,
    width: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let rows = x.contiguous()?.reshape(((), width.max(1)))?;
    let centred = rows.broadcast_sub(&rows.mean_keepdim(1)?)?;
    let variance = centred.sqr()?.mean_keepdim(1)?;
    let mut y = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    if let Some(weight) = weight {
        y = y.broadcast_mul(&weight.flatten_all()?)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.flatten_all()?)?;
    }
    y.reshape(x.shape())
}

pub fn normalize(x: &Tensor, least: f32) -> Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    x.broadcast_div(&at_least(&length, least)?)
}

pub fn pool(x: &Tensor, pool: &Pool, windows: [usize; 2]) -> Result<Tensor> {
    let (_, _, height, width) = x.dims4()?;
    let rows = pool_along(&x.contiguous()?, 0, pool, windows[0])?;
    let pooled = pool_along(&rows, 1, pool, windows[1])?;
    let Pooled::Average { count_padding } = pool.of else { return Ok(pooled) };
    let counts = [height, width].into_iter().enumerate().map(|(axis, extent)| {
        let count = |at| counted(pool, axis, at, extent, count_padding) as f32;
        (0..windows[axis]).map(count).collect::<Vec<_>>()
    });
    let counts: Vec<Vec<f32>> = counts.collect();
    let areas: Vec<f32> = counts[0].iter().flat_map(|row| counts[1].iter().map(move |column| row * column)).collect();
    pooled.broadcast_div(&Tensor::from_vec(areas, (windows[0], windows[1]), x.device())?)
}

/// The greatest elements or the sums of the windows along one of the last two axes.
fn pool_along(x: &Tensor, axis: usize, pool: &Pool, windows: usize) -> Result<Tensor> {
    let (kernel, stride, dilation) = (pool.kernel[axis], pool.stride[axis], pool.dilation(axis));
    let (before, place) = (pool.padding[axis], 2 + axis);
    // The last window may reach beyond the padding where extents are rounded up.
    let reach = windows.saturating_sub(1) * stride + (kernel - 1) * dilation + 1;
    let after = reach.saturating_sub(before + x.dim(place)?);
    let maximum = matches!(pool.of, Pooled::Maximum { .. });
    let padded = padded(x, place, before, after, if maximum { f32::NEG_INFINITY } else { 0.0 })?;
    let part = |step: usize| every(&padded, place, step * dilation, stride, windows);
    (1..kernel).try_fold(part(0)?, |pooled, step| match maximum {
        true => greater(&pooled, &part(step)?),
        false => pooled + part(step)?,
    })
}

/// By how much of a window a sum along one axis is divided.
fn counted(pool: &Pool, axis: usize, at: usize, extent: usize, count_padding: bool) -> usize {
    let (kernel, padding, begin) = (pool.kernel[axis], pool.padding[axis], at * pool.stride[axis]);
    if count_padding {
        return kernel.min(extent + 2 * padding - begin);
    }
    let inside = |step: &usize| (begin + step).checked_sub(padding).is_some_and(|position| position < extent);
    (0..kernel).filter(inside).count()
}

fn padded(x: &Tensor, axis: usize, before: usize, after: usize, with: f32) -> Result<Tensor> {
    let side = |extent: usize| {
        let mut dims = x.dims().to_vec();
        dims[axis] = extent;
        Tensor::full(with, dims, x.device())
    };
    let mut parts = vec![x.clone()];
    if before > 0 {
        parts.insert(0, side(before)?);
    }
    if after > 0 {
        parts.push(side(after)?);
    }
    if parts.len() == 1 { Ok(x.clone()) } else { Tensor::cat(&parts, axis)?.contiguous() }
}

/// `count` positions of an axis, each `step` after the one before.
fn every(x: &Tensor, axis: usize, first: usize, step: usize, count: usize) -> Result<Tensor> {
    if step == 1 {
        return x.narrow(axis, first, count)?.contiguous();
    }
    let places: Vec<u32> = (0..count).map(|at| (first + at * step) as u32).collect();
    x.index_select(&Tensor::from_vec(places, count, x.device())?, axis)
}

/// `x` [.., m, k] times `y` [.., k, n]; their leading axes are the same.
pub fn product(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    x.contiguous()?.matmul(&y.contiguous()?)
}

/// `x` [.., m, k] times the transpose of `y` [.., n, k].
pub fn product_transposed(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    x.contiguous()?.matmul(&y.contiguous()?.t()?)
}

pub fn convolve(x: &Tensor, weight: &Tensor, conv: &Conv, extents: [usize; 2]) -> Result<Tensor> {
    let mut x = x.contiguous()?;
    for axis in [0, 1] {
        let (before, after) = conv.padding(axis);
        x = padded(&x, 2 + axis, before, after, 0.0)?;
        if extents[axis] == 1 {
            // One position, whatever the stride.
            x = x.narrow(2 + axis, 0, conv.dilation * (conv.kernel[axis] - 1) + 1)?.contiguous()?;
        }
    }
    // candle has one stride for both axes. Where they differ every position is computed, and those wanted are kept.
    let strides: Vec<usize> =
        [0, 1].into_iter().filter(|axis| extents[*axis] > 1).map(|axis| conv.stride[axis]).collect();
    let stride = match strides[..] {
        [stride] => stride,
        [height, width] if height == width => height,
        _ => 1,
    };
    let mut y = x.conv2d(&weight.contiguous()?, 0, stride, conv.dilation, conv.groups)?;
    for axis in [0, 1] {
        if extents[axis] > 1 && conv.stride[axis] != stride {
            y = every(&y, 2 + axis, 0, conv.stride[axis], extents[axis])?;
        }
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::super::{ops, product as own};
    use super::*;
    use crate::backend::safetensors::layers::Axes;

    fn tensor(values: Vec<f32>, dims: &[usize]) -> Tensor {
        Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
    }

    /// Numbers from -4 to 4 that differ from place to place.
    fn numbers(dims: &[usize]) -> Tensor {
        let values = (0..dims.iter().product()).map(|i: usize| (i * 7919 % 997) as f32 / 124.0 - 4.0);
        tensor(values.collect(), dims)
    }

    /// NaN where the other is NaN, equal infinities, and numbers that differ by rounding only.
    fn same(found: &Tensor, expected: &Tensor, what: &str) {
        assert_eq!(found.dims(), expected.dims(), "{what}");
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (found, expected) in values(found).into_iter().zip(values(expected)) {
            let near = (found - expected).abs() <= 1e-6 + 1e-5 * expected.abs();
            assert!(near || found == expected || found.is_nan() && expected.is_nan(), "{what}: {found}, {expected}");
        }
    }

    #[test]
    fn activations_are_those_of_the_cpu() {
        let edges = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 20.0, 20.5, 88.0, -88.0, 3.0, -3.0, 6.0];
        let x = tensor(edges.into_iter().chain((-60..60).map(|i| i as f32 / 8.0)).collect(), &[12, 11]);
        for activation in [
            Activation::Relu,
            Activation::Relu6,
            Activation::LeakyRelu { slope: 0.01 },
            Activation::Elu { alpha: 1.5 },
            Activation::Gelu,
            Activation::Silu,
            Activation::Mish,
            Activation::Sigmoid,
            Activation::HardSigmoid,
            Activation::HardSwish,
            Activation::Tanh,
            Activation::Softplus,
            Activation::GeluTanh,
        ] {
            let (found, expected) = (activate(&x, activation).unwrap(), ops::activate(&x, activation).unwrap());
            same(&found, &expected, &format!("{activation:?}"));
        }
    }

    #[test]
    fn norms_and_softmaxes_are_those_of_the_cpu() {
        let x = numbers(&[3, 4, 6]);
        let (weight, bias) = (numbers(&[4, 6]), numbers(&[4, 6]));
        for axis in 0..3 {
            for log in [false, true] {
                same(&softmax(&x, axis, log).unwrap(), &ops::softmax(&x, axis, log).unwrap(), "softmax");
            }
        }
        for (weight, bias) in [(None, None), (Some(&weight), None), (Some(&weight), Some(&bias))] {
            let (found, expected) =
                (layer_norm(&x, 24, weight, bias, 1e-5), ops::layer_norm(&x, 24, weight, bias, 1e-5));
            same(&found.unwrap(), &expected.unwrap(), "layer norm");
        }
        let rows = tensor(vec![3.0, 4.0, 0.0, 0.0, f32::NAN, 1.0], &[3, 2]);
        same(&normalize(&rows, 1e-12).unwrap(), &ops::normalize(&rows, 1e-12).unwrap(), "normalize");
    }

    #[test]
    fn products_are_those_of_the_cpu() {
        let (x, y) = (numbers(&[2, 3, 4, 5]), numbers(&[2, 3, 5, 7]));
        same(&product(&x, &y).unwrap(), &own::product(&x, &y).unwrap(), "product");
        let y = y.transpose(2, 3).unwrap();
        same(&product_transposed(&x, &y).unwrap(), &own::product_transposed(&x, &y).unwrap(), "transposed");
    }

    proptest! {
        #[test]
        fn pools_are_those_of_the_cpu(
            kernel in [1usize..4, 1..4], stride in [1usize..4, 1..4], padding in [0usize..3, 0..3],
            dilation in [1usize..3, 1..3], extents in [1usize..8, 1..8], ceil: bool, maximum: bool, count_padding: bool,
            nan in proptest::option::of(0usize..9),
        ) {
            let of = if maximum { Pooled::Maximum { dilation } } else { Pooled::Average { count_padding } };
            let padding = [0, 1].map(|axis| padding[axis].min(kernel[axis] / 2));
            let pool = Pool { axes: Axes::Two, kernel, stride, padding, ceil, of };
            let windows = |axis: usize| pool.windows(axis, extents[axis]);
            let (Ok(rows), Ok(columns)) = (windows(0), windows(1)) else { return Ok(()) };
            let dims = [2, 3, extents[0], extents[1]];
            let mut values = numbers(&dims).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            if let Some(value) = nan.and_then(|place| values.get_mut(place)) {
                *value = f32::NAN;
            }
            let x = tensor(values, &dims);
            let found = super::pool(&x, &pool, [rows, columns]).unwrap();
            same(&found, &ops::pool(&x, &pool, [rows, columns]).unwrap(), &format!("{pool:?} of {dims:?}"));
        }

        #[test]
        fn convolutions_are_those_of_the_cpu(
            kernel in [1usize..4, 1..4], stride in [1usize..4, 1..4], dilation in 1usize..3,
            padding in proptest::option::of([0usize..3, 0..3]), extents in [1usize..9, 1..9], groups in 1usize..3,
        ) {
            let stride = if padding.is_none() { [1, 1] } else { stride };
            let (axes, inputs, outputs, bias) = (Axes::Two, None, 2 * groups, false);
            let conv = Conv { axes, inputs, outputs, kernel, stride, padding, dilation, groups, bias };
            let extent = |axis: usize| conv.extent(axis, extents[axis]);
            let (Ok(rows), Ok(columns)) = (extent(0), extent(1)) else { return Ok(()) };
            let x = numbers(&[2, 3 * groups, extents[0], extents[1]]);
            let weight = numbers(&[outputs, 3, kernel[0], kernel[1]]);
            let found = convolve(&x, &weight, &conv, [rows, columns]).unwrap();
            let expected = own::convolve(&x, &weight, &conv, [rows, columns]).unwrap();
            let largest = expected.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            let off = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            prop_assert!(off.to_scalar::<f32>().unwrap() <= 1e-5 * largest.max(1.0), "{conv:?}: off by {off}");
        }
    }
}
