//! Tensors handed over: inputs are lent or gathered once, outputs shared; strings are copied both ways.

use std::fmt;

use bytes::Bytes;
use half::{bf16, f16};
use ort::memory::Allocator;
use ort::session::SessionInputValue;
use ort::value::{DynTensor, DynTensorValueType, DynValue, PrimitiveTensorElementType, TensorElementType, TensorRef};
use ort::{AsPointer, ErrorCode};

use super::clean;
use crate::backend::{BatchInput, RunError};
use crate::tensor::{DataType, Shape, Tensor, TensorSpec, strings};

macro_rules! element_types {
    ($($element:ident => $dtype:ident),* $(,)?) => {
        pub(super) fn datatype(ty: TensorElementType) -> Option<DataType> {
            match ty {
                $(TensorElementType::$element => Some(DataType::$dtype),)*
                _ => None,
            }
        }
    };
}
element_types! {
    Bool => Bool, Uint8 => Uint8, Uint16 => Uint16, Uint32 => Uint32, Uint64 => Uint64, Int8 => Int8, Int16 => Int16,
    Int32 => Int32, Int64 => Int64, Float16 => Fp16, Bfloat16 => Bf16, Float32 => Fp32, Float64 => Fp64,
    String => Bytes,
}

pub(super) fn run_error(error: &ort::Error) -> RunError {
    match error.code() {
        ErrorCode::InvalidArgument => RunError::InvalidArgument(clean(error.message())),
        _ => RunError::Failed(clean(error.message())),
    }
}

pub(super) fn failed(spec: &TensorSpec, what: impl fmt::Display) -> RunError {
    RunError::Failed(format!("output `{}` {what}", spec.name))
}

/// What an input's address is a multiple of. It suits every element type, and is where the engine's vectorised sums begin:
/// at an address between, the same numbers are added in another order, and an answer's last bits would tell over which
/// protocol its request came.
pub(super) type Aligned = u128;

/// The input's bytes at an address that suits [`Aligned`]: where they lie, or gathered into `scratch`.
pub(super) fn bytes_of<'a>(input: &BatchInput<'a>, scratch: &'a mut Vec<Aligned>) -> &'a [u8] {
    if let Some(bytes) = input.contiguous(align_of::<Aligned>()) {
        return bytes;
    }
    let length = input.byte_length();
    scratch.resize(length.div_ceil(size_of::<Aligned>()), 0);
    let bytes = &mut bytemuck::cast_slice_mut(scratch)[..length];
    input.gather_into(bytes);
    bytes
}

/// A tensor over `bytes`, which it borrows.
pub(super) fn borrowed_value<'a>(input: &BatchInput<'a>, bytes: &'a [u8]) -> ort::Result<SessionInputValue<'a>> {
    let shape = input.shape().to_wire();
    match input.dtype() {
        DataType::Bool => {
            let elements = bytemuck::checked::try_cast_slice(bytes).map_err(unlendable)?;
            Ok(TensorRef::<bool>::from_array_view((shape, elements))?.into())
        }
        DataType::Uint8 => view::<u8>(shape, bytes),
        DataType::Uint16 => view::<u16>(shape, bytes),
        DataType::Uint32 => view::<u32>(shape, bytes),
        DataType::Uint64 => view::<u64>(shape, bytes),
        DataType::Int8 => view::<i8>(shape, bytes),
        DataType::Int16 => view::<i16>(shape, bytes),
        DataType::Int32 => view::<i32>(shape, bytes),
        DataType::Int64 => view::<i64>(shape, bytes),
        DataType::Fp16 => view::<f16>(shape, bytes),
        DataType::Bf16 => view::<bf16>(shape, bytes),
        DataType::Fp32 => view::<f32>(shape, bytes),
        DataType::Fp64 => view::<f64>(shape, bytes),
        DataType::Bytes => Err(ort::Error::new("a BYTES tensor has no fixed-size elements")),
    }
}

fn view<'a, T>(shape: Vec<i64>, bytes: &'a [u8]) -> ort::Result<SessionInputValue<'a>>
where
    T: bytemuck::Pod + PrimitiveTensorElementType + fmt::Debug,
{
    // An empty buffer may lie anywhere.
    let elements: &'a [T] = if bytes.is_empty() { &[] } else { bytemuck::try_cast_slice(bytes).map_err(unlendable)? };
    Ok(TensorRef::from_array_view((shape, elements))?.into())
}

fn unlendable(error: impl fmt::Display) -> ort::Error {
    ort::Error::new(format!("the input's buffer cannot be lent to the engine: {error}"))
}

/// A string tensor of the engine's own, filled by length: the crate's way goes through C strings, which end at the
/// first NUL, and demands UTF-8.
pub(super) fn string_value<'a>(input: &BatchInput) -> ort::Result<SessionInputValue<'a>> {
    let shape = input.shape();
    let mut tensor = DynTensor::new(&Allocator::default(), TensorElementType::String, shape.to_wire())?;
    for (index, element) in input.strings().take(shape.elements()).enumerate() {
        let mut buffer = std::ptr::null_mut();
        // SAFETY: `tensor` is a live string tensor with more than `index` elements, and nobody else refers to it.
        let status = unsafe {
            (ort::api().GetResizedStringTensorElementBuffer)(tensor.ptr_mut(), index, element.len(), &mut buffer)
        };
        // SAFETY: the status comes from the call above and is consumed once.
        unsafe { ort::Error::result_from_status(status) }?;
        if !element.is_empty() {
            // SAFETY: on success `buffer` points at `element.len()` writable bytes inside the tensor.
            unsafe { std::ptr::copy_nonoverlapping(element.as_ptr(), buffer.cast(), element.len()) };
        }
    }
    Ok(tensor.into())
}

/// An output as a tensor over the engine's memory. `lent` are the inputs' buffers, which the engine must not keep.
pub(super) fn tensor_of(value: DynValue, spec: &TensorSpec, lent: &[&[u8]]) -> Result<Tensor, RunError> {
    let value = value.downcast::<DynTensorValueType>().map_err(|_| failed(spec, "is not a tensor"))?;
    let dtype = datatype(*value.data_type()).filter(|dtype| *dtype == spec.dtype);
    let dtype = dtype.ok_or_else(|| failed(spec, format!("is of another datatype than {}", spec.dtype)))?;
    let shape =
        Shape::from_wire(value.shape()).map_err(|error| failed(spec, format!("has no usable shape: {error}")))?;
    if !value.memory_info().is_cpu_accessible() {
        return Err(failed(spec, "was left in the device's memory"));
    }
    let data = match dtype.size() {
        None => string_data(&value, shape.elements()).map_err(|error| run_error(&error))?.into(),
        Some(size) => engine_data(value, shape.elements() * size, lent),
    };
    Tensor::new(dtype, shape, data).map_err(|error| failed(spec, format!("is malformed: {error}")))
}

/// Lets [`Bytes`] own an engine's tensor.
struct EngineBuffer {
    tensor: DynTensor,
    length: usize,
}

impl AsRef<[u8]> for EngineBuffer {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the tensor holds `length` initialised bytes in host memory at that address (dense, by the engine's
        // contract; not null, since `length` is not 0) for as long as it lives, and nobody writes to them.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast(), self.length) }
    }
}

fn engine_data(tensor: DynTensor, length: usize, lent: &[&[u8]]) -> Bytes {
    if length == 0 {
        return Bytes::new();
    }
    let start: *const u8 = tensor.data_ptr().cast();
    let buffer = EngineBuffer { tensor, length };
    // A graph may name an input as its output; the engine then returns our own buffer, which only the run borrows.
    if lent.iter().any(|input| input.as_ptr_range().contains(&start)) {
        return Bytes::copy_from_slice(buffer.as_ref());
    }
    Bytes::from_owner(buffer)
}

/// The elements of a string tensor in the protocol's encoding; any byte may occur in them.
fn string_data(tensor: &DynTensor, elements: usize) -> ort::Result<Vec<u8>> {
    let mut length = 0;
    // SAFETY: `tensor` is a live string tensor; the status is consumed once.
    unsafe {
        ort::Error::result_from_status((ort::api().GetStringTensorDataLength)(tensor.ptr(), &mut length))?;
    }
    let mut content = vec![0u8; length];
    let mut offsets = vec![0usize; elements];
    if elements > 0 {
        // SAFETY: the buffers are as long as the lengths passed with them; the status is consumed once.
        unsafe {
            ort::Error::result_from_status((ort::api().GetStringTensorContent)(
                tensor.ptr(),
                content.as_mut_ptr().cast(),
                content.len(),
                offsets.as_mut_ptr(),
                offsets.len(),
            ))?;
        }
    }
    let mut encoded = Vec::with_capacity(length + elements * strings::PREFIX);
    let ends = offsets.iter().skip(1).copied().chain([length]);
    for (start, end) in offsets.iter().zip(ends) {
        let element = content.get(*start..end).ok_or_else(|| ort::Error::new("the string offsets do not ascend"))?;
        strings::push(&mut encoded, element).ok_or_else(|| ort::Error::new("a string is longer than 4 GiB"))?;
    }
    Ok(encoded)
}
