//! Shapes of actual tensors: every dimension known, the element count checked against overflow once.

use std::fmt;

/// The most dimensions a tensor may have.
pub const MAX_RANK: usize = 16;

/// The most elements: so many that the byte length of the widest fixed-size type still fits in `isize`.
const MAX_ELEMENTS: usize = isize::MAX as usize / 8;

/// A shape whose element count is known to fit in `usize`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: Vec<usize>,
    elements: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    #[error("shape has {found} dimensions, expected at most {MAX_RANK}")]
    Rank { found: usize },
    #[error("shape has dimension {found}, expected a number from 0 up")]
    Negative { found: i64 },
    #[error("shape {dims:?} has more elements than memory can address")]
    Overflow { dims: Vec<usize> },
}

impl Shape {
    pub fn new(dims: impl Into<Vec<usize>>) -> Result<Shape, ShapeError> {
        let dims = dims.into();
        if dims.len() > MAX_RANK {
            return Err(ShapeError::Rank { found: dims.len() });
        }
        // Zero dimensions are left out of the first product so that [0, 2^63, 2] is refused like [1, 2^63, 2]:
        // any part of a legal shape must be legal too (row lengths are products of a part).
        let magnitude = dims.iter().filter(|d| **d != 0).try_fold(1usize, |product, d| product.checked_mul(*d));
        match magnitude.filter(|m| *m <= MAX_ELEMENTS) {
            None => Err(ShapeError::Overflow { dims }),
            Some(magnitude) => Ok(Shape { elements: if dims.contains(&0) { 0 } else { magnitude }, dims }),
        }
    }

    /// From dimensions as protocols carry them.
    pub fn from_wire(dims: &[i64]) -> Result<Shape, ShapeError> {
        if dims.len() > MAX_RANK {
            return Err(ShapeError::Rank { found: dims.len() });
        }
        let dims = dims
            .iter()
            .map(|d| usize::try_from(*d).map_err(|_| ShapeError::Negative { found: *d }))
            .collect::<Result<Vec<_>, _>>()?;
        Shape::new(dims)
    }

    pub fn scalar() -> Shape {
        Shape { dims: Vec::new(), elements: 1 }
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub fn rank(&self) -> usize {
        self.dims.len()
    }

    pub fn elements(&self) -> usize {
        self.elements
    }

    /// The leading dimension; `None` for a scalar.
    pub fn rows(&self) -> Option<usize> {
        self.dims.first().copied()
    }

    /// Elements in one row: the product of all dimensions but the leading one.
    pub fn row_elements(&self) -> usize {
        // Cannot overflow: `new` checked the product of all non-zero dimensions.
        self.dims.iter().skip(1).product()
    }

    /// This shape with another number of rows. A scalar has none to replace and is an error.
    pub fn with_rows(&self, rows: usize) -> Result<Shape, ShapeError> {
        let mut dims = self.dims.clone();
        match dims.first_mut() {
            Some(leading) => *leading = rows,
            None => return Err(ShapeError::Rank { found: 0 }),
        }
        Shape::new(dims)
    }

    /// Dimensions as protocols carry them.
    pub fn to_wire(&self) -> Vec<i64> {
        // Cannot wrap: every dimension is at most the product checked against `MAX_ELEMENTS`.
        self.dims.iter().map(|d| *d as i64).collect()
    }
}

/// `[1,29]`: without spaces, as the well-known messages print shapes.
impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, dim) in self.dims.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{dim}")?;
        }
        f.write_str("]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_sizes_are_refused() {
        for dims in [
            &[16, (1 << 60) + 2][..],
            &[4, (1 << 60) + 2],
            &[1 << 32, 1 << 32],
            &[i64::MAX, 2],
            &[0, i64::MAX, 2],
            &[i64::MAX, 2, 0],
        ] {
            assert!(matches!(Shape::from_wire(dims), Err(ShapeError::Overflow { .. })), "{dims:?}");
        }
        assert_eq!(Shape::from_wire(&[-1]), Err(ShapeError::Negative { found: -1 }));
        assert_eq!(Shape::from_wire(&[1; 17]), Err(ShapeError::Rank { found: 17 }));
        assert!(Shape::from_wire(&[2; 16]).is_ok());
    }

    #[test]
    fn scalars_and_empty_tensors() {
        assert_eq!(Shape::scalar().elements(), 1);
        assert_eq!(Shape::scalar().rows(), None);
        let empty = Shape::from_wire(&[3, 0]).unwrap();
        assert_eq!((empty.elements(), empty.rows(), empty.row_elements()), (0, Some(3), 0));
        assert_eq!(empty.to_string(), "[3,0]");
    }
}
