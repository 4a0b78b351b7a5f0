//! Dense tensors as they travel through the server: a datatype, a checked shape, and a reference-counted buffer.
//!
//! Owns shape arithmetic (always checked), the OIP datatypes and their binary layout, row slices and row splits by
//! reference count, and model signatures. Knows nothing of requests, engines or serialisation formats beyond the
//! OIP's two ways to write elements: the binary layout (little-endian, row-major, unpadded; BYTES elements prefixed by a
//! 4-byte little-endian length), and `json`, which is read here and written by `protocol`.
//!
//! Invariant: a [`Tensor`]'s buffer holds exactly the elements its shape names. It is checked once, at construction.
//! A buffer may sit at any address: [`Tensor::as_slice`] is `None` where it is misaligned for the element type.

mod dtype;
pub mod json;
mod number;
mod ragged;
mod shape;
mod signature;
pub mod strings;
#[allow(clippy::module_inception)]
mod tensor;

pub use dtype::{DataType, Element};
pub use ragged::{Ragged, SequenceAxis, Uneven, bucket};
pub use shape::{MAX_RANK, Shape, ShapeError};
pub use signature::{Dim, OutputKind, Signature, TensorSpec, wire_shape};
pub use tensor::{Tensor, TensorError};
