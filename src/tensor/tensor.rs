use bytes::Bytes;

use super::strings::{self, StringsError};
use super::{DataType, Element, Shape, ShapeError};

/// A dense, row-major, little-endian tensor over a shared buffer. Cloning and slicing bump a reference count.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    dtype: DataType,
    shape: Shape,
    data: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error("{found} bytes of data, expected {expected} for {dtype} {shape}")]
    Length { found: usize, expected: usize, dtype: DataType, shape: Shape },
    #[error("byte {found} at element {index} of a BOOL tensor, expected 0 or 1")]
    Bool { found: u8, index: usize },
    #[error("BYTES data holds {0}")]
    Strings(#[from] StringsError),
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

impl Tensor {
    /// Checks the buffer against the shape; see the module's invariant.
    pub fn new(dtype: DataType, shape: Shape, data: Bytes) -> Result<Tensor, TensorError> {
        match dtype.size() {
            None => strings::check(&data, shape.elements())?,
            Some(size) => {
                let expected = shape.elements().checked_mul(size).ok_or_else(|| overflow(&shape))?;
                if data.len() != expected {
                    return Err(TensorError::Length { found: data.len(), expected, dtype, shape });
                }
            }
        }
        if dtype == DataType::Bool
            && let Some(index) = data.iter().position(|byte| *byte > 1)
        {
            return Err(TensorError::Bool { found: data[index], index });
        }
        Ok(Tensor { dtype, shape, data })
    }

    /// From typed elements, without copying them.
    pub fn from_vec<T: Element + Send + 'static>(shape: Shape, elements: Vec<T>) -> Result<Tensor, TensorError> {
        Tensor::new(T::DTYPE, shape, Bytes::from_owner(TypedVec(elements)))
    }

    /// From `BYTES` elements.
    pub fn from_strings<S: AsRef<[u8]>>(
        shape: Shape,
        elements: impl IntoIterator<Item = S>,
    ) -> Result<Tensor, TensorError> {
        let mut data = Vec::new();
        for element in elements {
            strings::push(&mut data, element.as_ref()).ok_or_else(|| overflow(&shape))?;
        }
        Tensor::new(DataType::Bytes, shape, data.into())
    }

    pub fn dtype(&self) -> DataType {
        self.dtype
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// The leading dimension; `None` for a scalar.
    pub fn rows(&self) -> Option<usize> {
        self.shape.rows()
    }

    /// The elements where the buffer is aligned for `T` and holds that type; `None` otherwise. Never a transmute.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        if T::DTYPE != self.dtype {
            return None;
        }
        bytemuck::try_cast_slice(&self.data).ok()
    }

    /// The elements of any fixed-size type, copied, whatever the buffer's alignment. `None` for another datatype.
    pub fn to_vec<T: Element>(&self) -> Option<Vec<T>> {
        (T::DTYPE == self.dtype).then(|| bytemuck::allocation::pod_collect_to_vec(&self.data))
    }

    /// The elements of a `BYTES` tensor; none for another datatype.
    pub fn strings(&self) -> impl Iterator<Item = &[u8]> {
        strings::iter(if self.dtype == DataType::Bytes { &self.data } else { &[] })
    }

    /// The same elements under another shape of as many.
    pub fn reshaped(self, shape: Shape) -> Result<Tensor, TensorError> {
        Tensor::new(self.dtype, shape, self.data)
    }

    /// Cuts the tensor along its leading dimension into parts of `counts` rows each, sharing the buffer.
    ///
    /// `None` where there is no leading dimension or the counts don't add up to it.
    pub fn split_rows(&self, counts: &[usize]) -> Option<Vec<Tensor>> {
        let total = counts.iter().try_fold(0usize, |sum, n| sum.checked_add(*n))?;
        if self.rows()? != total {
            return None;
        }
        let mut start = 0;
        counts
            .iter()
            .map(|count| {
                let shape = self.shape.with_rows(*count).ok()?;
                let length = match self.dtype.size() {
                    Some(size) => shape.elements() * size,
                    None => strings::byte_length(&self.data[start..], shape.elements()),
                };
                let data = self.data.slice(start..start + length);
                start += length;
                Some(Tensor { dtype: self.dtype, shape, data })
            })
            .collect()
    }

    /// The first `extent` positions along `axis`, sharing the buffer where they lie together. `None` where there are not
    /// as many.
    pub fn truncated(&self, axis: usize, extent: usize) -> Option<Tensor> {
        let found = *self.shape.dims().get(axis).filter(|found| **found >= extent)?;
        if found == extent {
            return Some(self.clone());
        }
        let mut dims = self.shape.dims().to_vec();
        let (outer, inner) = (dims[..axis].iter().product::<usize>(), dims[axis + 1..].iter().product::<usize>());
        dims[axis] = extent;
        let shape = Shape::new(dims).ok()?;
        let Some(size) = self.dtype.size() else {
            let kept = |(index, _): &(usize, &[u8])| index % (found * inner) < extent * inner;
            let elements = self.strings().enumerate().filter(kept).map(|(_, element)| element);
            return Tensor::from_strings(shape, elements).ok();
        };
        let (kept, step) = (extent * inner * size, found * inner * size);
        let data = if outer == 1 {
            self.data.slice(..kept)
        } else {
            let starts = (0..outer).map(|index| index * step);
            starts.flat_map(|start| &self.data[start..start + kept]).copied().collect::<Vec<u8>>().into()
        };
        Some(Tensor { dtype: self.dtype, shape, data })
    }

    /// Rows `start..start + count`, sharing the buffer. `None` where they are not all there.
    pub fn slice_rows(&self, start: usize, count: usize) -> Option<Tensor> {
        let after = self.rows()?.checked_sub(start.checked_add(count)?)?;
        self.split_rows(&[start, count, after])?.into_iter().nth(1)
    }
}

/// Lets [`Bytes`] own a vector of any element type, so that its memory is freed with the layout it was made with.
struct TypedVec<T>(Vec<T>);

impl<T: Element> AsRef<[u8]> for TypedVec<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn overflow(shape: &Shape) -> TensorError {
    ShapeError::Overflow { dims: shape.dims().to_vec() }.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shape(dims: &[usize]) -> Shape {
        Shape::new(dims).unwrap()
    }

    #[test]
    fn lengths_are_checked_once_and_exactly() {
        let bytes = |n| Bytes::from(vec![0u8; n]);
        for dtype in DataType::ALL.into_iter().filter(|d| d.size().is_some()) {
            let size = dtype.size().unwrap();
            assert!(Tensor::new(dtype, shape(&[2, 3]), bytes(6 * size)).is_ok());
            assert!(Tensor::new(dtype, shape(&[2, 3]), bytes(6 * size + 1)).is_err());
            assert!(Tensor::new(dtype, shape(&[2, 3]), bytes(6 * size - 1)).is_err());
            assert!(Tensor::new(dtype, shape(&[2, 0]), bytes(0)).is_ok());
        }
        assert!(matches!(
            Tensor::new(DataType::Bool, shape(&[2]), Bytes::from_static(&[1, 2])),
            Err(TensorError::Bool { found: 2, index: 1 })
        ));
    }

    #[test]
    fn misaligned_buffers_are_refused_as_slices_and_still_read() {
        let values = [1.5f32, -2.0];
        let mut raw = vec![0u8; 9];
        let base = raw.as_ptr() as usize;
        let skip = if base.is_multiple_of(4) { 1 } else { 0 };
        raw[skip..skip + 8].copy_from_slice(bytemuck::cast_slice(&values));
        let tensor = Tensor::new(DataType::Fp32, shape(&[2]), Bytes::from(raw).slice(skip..skip + 8)).unwrap();
        assert_eq!(tensor.as_slice::<f32>(), None);
        assert_eq!(tensor.to_vec::<f32>(), Some(values.to_vec()));
        assert_eq!(tensor.to_vec::<i32>(), None);
    }

    #[test]
    fn rows_out_of_range_are_none() {
        let tensor = Tensor::from_vec(shape(&[3, 2]), vec![0i64; 6]).unwrap();
        assert!(tensor.slice_rows(2, 2).is_none() && tensor.slice_rows(usize::MAX, 2).is_none());
        assert_eq!(tensor.slice_rows(3, 0).unwrap().shape().dims(), [0, 2]);
        assert!(tensor.split_rows(&[1, 1]).is_none() && tensor.split_rows(&[usize::MAX, 4]).is_none());
        assert!(Tensor::from_vec(Shape::scalar(), vec![1i64]).unwrap().split_rows(&[1]).is_none());
    }

    proptest! {
        #[test]
        fn split_parts_concatenate_to_the_whole(
            counts in proptest::collection::vec(0usize..4, 1..6), width in 0usize..4, strings in any::<bool>(), offset in 0usize..9,
        ) {
            let rows: usize = counts.iter().sum();
            let elements = rows * width;
            let whole = if strings {
                Tensor::from_strings(shape(&[rows, width]), (0..elements).map(|i| "x".repeat(i % 5))).unwrap()
            } else {
                let mut raw = vec![0u8; offset];
                raw.extend((0..elements).flat_map(|i| (i as u16).to_le_bytes()));
                Tensor::new(DataType::Uint16, shape(&[rows, width]), Bytes::from(raw).slice(offset..)).unwrap()
            };
            let parts = whole.split_rows(&counts).unwrap();
            let joined: Vec<u8> = parts.iter().flat_map(|part| part.data().to_vec()).collect();
            prop_assert_eq!(&joined[..], &whole.data()[..]);
            for (part, count) in parts.iter().zip(&counts) {
                prop_assert_eq!(part.shape().dims(), [*count, width]);
                prop_assert!(Tensor::new(part.dtype(), part.shape().clone(), part.data().clone()).is_ok());
            }
        }
    }
}
