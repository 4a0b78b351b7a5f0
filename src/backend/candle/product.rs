//! Matrix products and convolutions, on the library that candle multiplies with.
//!
//! candle's own ask the system how many cores there are with every product, which on Linux reads a file for as long as a
//! small product takes, and its convolutions have one stride and one padding for both axes. These take the threads of the
//! pool that they run in; on another device than the CPU they are [`composed`] of candle's own.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use gemm::Parallelism;
use rayon::prelude::*;

use super::composed;
use super::ops::elements;
use crate::backend::safetensors::layers::Conv;

/// Elements of the patches that one image's convolution lays out at a time, if not a single patch has more.
const PATCH_ELEMENTS: usize = 1 << 18;

/// How many of the output's positions are computed at a time, with a patch of `inner` elements for each.
fn band(inner: usize, positions: usize) -> usize {
    (PATCH_ELEMENTS / inner.max(1)).clamp(1, positions.max(1))
}

/// A matrix by its extents and by how far its next row and its next column are.
struct Matrix<'a> {
    elements: &'a [f32],
    rows: usize,
    columns: usize,
    row_step: usize,
    column_step: usize,
}

impl<'a> Matrix<'a> {
    fn new(elements: &'a [f32], rows: usize, columns: usize) -> Matrix<'a> {
        Matrix { elements, rows, columns, row_step: columns, column_step: 1 }
    }

    /// The same elements with rows for columns.
    fn transposed(self) -> Matrix<'a> {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_step: self.column_step,
            column_step: self.row_step,
            ..self
        }
    }
}

/// Writes the product row by row, each row `step` elements after the one before.
fn multiply(x: &Matrix, y: &Matrix, target: &mut [f32], step: usize) {
    let last = |matrix: &Matrix| (matrix.rows - 1) * matrix.row_step + (matrix.columns - 1) * matrix.column_step;
    let (rows, inner, columns) = (x.rows, x.columns, y.columns);
    if rows == 0 || columns == 0 || inner == 0 {
        return;
    }
    assert!(inner == y.rows && last(x) < x.elements.len() && last(y) < y.elements.len(), "matrices fit their elements");
    assert!(columns <= step && (rows - 1) * step + columns <= target.len(), "the product fits its target");
    let threads = match rayon::current_num_threads() {
        1 => Parallelism::None,
        threads => Parallelism::Rayon(threads),
    };
    // Steps are below the lengths of slices, and those below `isize::MAX`.
    let [to, x_row, x_column, y_row, y_column] =
        [step, x.row_step, x.column_step, y.row_step, y.column_step].map(|step| step as isize);
    // SAFETY: the last element of each matrix was seen to lie in its slice, steps are not negative, and the target is
    // borrowed by nobody else; its rows do not overlap.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            target.as_mut_ptr(),
            1,
            to,
            false,
            x.elements.as_ptr(),
            x_column,
            x_row,
            y.elements.as_ptr(),
            y_column,
            y_row,
            0f32,
            1f32,
            false,
            false,
            false,
            threads,
        );
    }
}

/// `x` [.., m, k] times `y` [.., k, n]; their leading axes are the same.
pub fn product(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::product(x, y);
    }
    x.contiguous()?.apply_op2_no_bwd(&y.contiguous()?, &Product { transposed: false })
}

/// `x` [.., m, k] times the transpose of `y` [.., n, k]; their leading axes are the same.
pub fn product_transposed(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::product_transposed(x, y);
    }
    x.contiguous()?.apply_op2_no_bwd(&y.contiguous()?, &Product { transposed: true })
}

struct Product {
    transposed: bool,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, y) = (elements(x, x_layout)?, elements(y, y_layout)?);
        let ([batch @ .., rows, inner], [others @ .., first, second]) = (x_layout.dims(), y_layout.dims()) else {
            bail!("a product of {:?} and {:?}, expected matrices", x_layout.dims(), y_layout.dims());
        };
        let (also_inner, columns) = if self.transposed { (second, first) } else { (first, second) };
        if batch != others || inner != also_inner {
            bail!("a product of {:?} and {:?}, expected extents that agree", x_layout.dims(), y_layout.dims());
        }
        let (rows, inner, columns) = (*rows, *inner, *columns);
        let mut target = vec![0f32; batch.iter().product::<usize>() * rows * columns];
        let sizes = [rows * columns, rows * inner, inner * columns].map(|size| size.max(1));
        let parts = target.par_chunks_mut(sizes[0]).zip(x.par_chunks(sizes[1])).zip(y.par_chunks(sizes[2]));
        parts.for_each(|((target, x), y)| {
            let y = match self.transposed {
                true => Matrix::new(y, columns, inner).transposed(),
                false => Matrix::new(y, inner, columns),
            };
            multiply(&Matrix::new(x, rows, inner), &y, target, columns);
        });
        let dims: Vec<usize> = batch.iter().copied().chain([rows, columns]).collect();
        Ok((CpuStorage::F32(target), Shape::from_dims(&dims)))
    }
}

/// `x` [batch, channels, height, width], `weight` [outputs, channels / groups, kernel height, kernel width], to
/// [batch, outputs, `extents`].
pub fn convolve(x: &Tensor, weight: &Tensor, conv: &Conv, extents: [usize; 2]) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return composed::convolve(x, weight, conv, extents);
    }
    x.contiguous()?.apply_op2_no_bwd(&weight.contiguous()?, &Convolution { conv, extents })
}

struct Convolution<'a> {
    conv: &'a Conv,
    /// Of the output.
    extents: [usize; 2],
}

impl CustomOp2 for Convolution<'_> {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (images, weight) = (elements(x, x_layout)?, elements(weight, weight_layout)?);
        let (batch, channels, height, width) = x_layout.shape().dims4()?;
        let (outputs, groups, [rows, columns]) = (self.conv.outputs, self.conv.groups, self.extents);
        let mut target = vec![0f32; batch * outputs * rows * columns];
        let sizes = [outputs * rows * columns, channels * height * width].map(|size| size.max(1));
        target.par_chunks_mut(sizes[0]).zip(images.par_chunks(sizes[1])).for_each(|(target, image)| {
            let parts = [target.len(), image.len(), weight.len()].map(|size| (size / groups).max(1));
            let grouped = target.chunks_mut(parts[0]).zip(image.chunks(parts[1])).zip(weight.chunks(parts[2]));
            for ((target, image), weight) in grouped {
                self.one(image, [height, width], weight, target);
            }
        });
        Ok((CpuStorage::F32(target), Shape::from_dims(&[batch, outputs, rows, columns])))
    }
}

impl Convolution<'_> {
    /// One image's channels of one group: the patches under the kernel as columns, some of the output's positions at a time.
    fn one(&self, image: &[f32], extents: [usize; 2], weight: &[f32], target: &mut [f32]) {
        let positions = self.extents[0] * self.extents[1];
        let outputs = self.conv.outputs / self.conv.groups;
        let inner = weight.len() / outputs;
        let band = band(inner, positions);
        let mut patches = vec![0f32; inner * band];
        for first in (0..positions).step_by(band) {
            let count = band.min(positions - first);
            let patches = &mut patches[..inner * count];
            for (element, patches) in patches.chunks_mut(count).enumerate() {
                self.patch(image, extents, element, first, patches);
            }
            let (weight, patches) = (Matrix::new(weight, outputs, inner), Matrix::new(patches, inner, count));
            multiply(&weight, &patches, &mut target[first..], positions);
        }
    }

    /// What one element of the kernel meets, from the output's position `first` on, row by row; zero in the padding.
    fn patch(&self, image: &[f32], [height, width]: [usize; 2], element: usize, first: usize, patches: &mut [f32]) {
        let conv = self.conv;
        let [kernel_height, kernel_width] = conv.kernel;
        let (channel, within) = (element / (kernel_height * kernel_width), element % (kernel_height * kernel_width));
        let plane = &image[channel * height * width..][..height * width];
        let offsets = [within / kernel_width, within % kernel_width].map(|step| step * conv.dilation);
        let source = |axis: usize, at: usize, extent: usize| {
            (at * conv.stride[axis] + offsets[axis]).checked_sub(conv.padding(axis).0).filter(|at| *at < extent)
        };
        let columns = self.extents[1];
        let (mut row, mut left, mut rest) = (first / columns, first % columns, patches);
        while !rest.is_empty() {
            let (patches, below) = rest.split_at_mut(rest.len().min(columns - left));
            match source(0, row, height) {
                None => patches.fill(0.0),
                Some(y) => {
                    for (column, value) in (left..).zip(patches) {
                        *value = source(1, column, width).map_or(0.0, |x| plane[y * width + x]);
                    }
                }
            }
            (row, left, rest) = (row + 1, 0, below);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::backend::safetensors::layers::Axes;

    #[test]
    fn patches_are_laid_out_within_the_limit() {
        for (inner, positions) in [(1024, 16 << 20), (1, 16 << 20), (576, 660), (PATCH_ELEMENTS, 9), (7, 1), (0, 0)] {
            let laid_out = inner * band(inner, positions);
            assert!(laid_out <= PATCH_ELEMENTS, "{inner} × {positions}: {laid_out}");
        }
        assert_eq!(band(4, 10), 10, "no more than there are positions");
        assert_eq!(band(2 * PATCH_ELEMENTS, 10), 1, "a patch is not taken apart");
    }

    /// Convolves one image in several bands and compares every position with the sum that defines it.
    fn compare(channels: usize, kernel: [usize; 2], input: [usize; 2], padding: [usize; 2]) {
        let conv = Conv {
            axes: Axes::Two,
            inputs: None,
            outputs: 2,
            kernel,
            stride: [1, 1],
            padding: Some(padding),
            dilation: 1,
            groups: 1,
            bias: false,
        };
        let extents = [0, 1].map(|axis| conv.extent(axis, input[axis]).unwrap());
        let inner = channels * kernel[0] * kernel[1];
        assert!(band(inner, extents[0] * extents[1]) < extents[0] * extents[1], "one band is no test");
        // Small whole numbers: sums are exact in any order.
        let number = |i: usize| (i * 7919 % 13) as f32 - 6.0;
        let numbers = |dims: [usize; 4]| {
            let values: Vec<f32> = (0..dims.iter().product()).map(number).collect();
            Tensor::from_vec(values, dims.to_vec(), &Device::Cpu).unwrap()
        };
        let x = numbers([1, channels, input[0], input[1]]);
        let weight = numbers([2, channels, kernel[0], kernel[1]]);
        let y = convolve(&x, &weight, &conv, extents).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (i, y) in y.iter().enumerate() {
            let (output, row, column) = (i / (extents[0] * extents[1]), i / extents[1] % extents[0], i % extents[1]);
            let mut expected = 0.0;
            for element in 0..inner {
                let (channel, within) = (element / (kernel[0] * kernel[1]), element % (kernel[0] * kernel[1]));
                let at = [row + within / kernel[1], column + within % kernel[1]];
                let [Some(v), Some(h)] =
                    [0, 1].map(|axis| at[axis].checked_sub(padding[axis]).filter(|at| *at < input[axis]))
                else {
                    continue;
                };
                expected += number(output * inner + element) * number((channel * input[0] + v) * input[1] + h);
            }
            assert_eq!(*y, expected, "output {output} at {row}, {column}");
        }
    }

    #[test]
    fn bands_that_end_within_a_row_are_computed_as_one() {
        compare(1, [1, 1024], [1, 1700], [0, 3]);
        compare(64, [3, 3], [20, 33], [1, 1]);
    }
}
