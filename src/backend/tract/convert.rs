//! Tensors handed over: inputs are copied once into tract's memory, outputs stay there and are shared.

use bytes::Bytes;
use tract_onnx::prelude::{DatumType, TValue};

use super::{run_error, text_of};
use crate::backend::{BatchInput, RunError};
use crate::tensor::{DataType, Shape, Tensor, TensorSpec};

/// The shape of an input with its rows made up to `padded`.
pub(super) fn padded_shape(input: &BatchInput, padded: Option<usize>) -> Result<Shape, RunError> {
    let shape = input.shape();
    match padded {
        Some(rows) => shape.with_rows(rows).map_err(|error| RunError::Failed(error.to_string())),
        None => Ok(shape),
    }
}

/// The first `rows` of an output that has `padded`; another output as it is, for the caller to judge.
pub(super) fn cut(output: Tensor, padded: usize, rows: usize) -> Tensor {
    if output.rows() == Some(padded) { output.slice_rows(0, rows).unwrap_or(output) } else { output }
}

/// One copy into tract's own memory; padding repeats the last row, which the model is known to accept.
pub(super) fn import(input: &BatchInput, spec: &TensorSpec, padded: Option<usize>) -> Result<TValue, RunError> {
    let dtype = to_tract(input.dtype()).ok_or_else(|| {
        RunError::Failed(format!("input {:?} is {}, which tract does not have", spec.name, input.dtype()))
    })?;
    let shape = padded_shape(input, padded)?;
    if dtype == DatumType::String {
        return import_strings(input, spec, shape);
    }
    let mut tensor = tract_onnx::prelude::Tensor::zero_dt(dtype, shape.dims()).map_err(run_error)?;
    let bytes = tensor.as_bytes_mut();
    let given = input.byte_length();
    input.gather_into(&mut bytes[..given]);
    let row = input.shape().rows().filter(|rows| *rows > 0).map_or(0, |rows| given / rows);
    let mut filled = given;
    while row > 0 && filled < bytes.len() {
        bytes.copy_within(given - row..given, filled);
        filled += row;
    }
    Ok(tensor.into())
}

fn import_strings(input: &BatchInput, spec: &TensorSpec, shape: Shape) -> Result<TValue, RunError> {
    let utf8 = |element: &[u8]| match std::str::from_utf8(element) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(RunError::InvalidArgument(format!(
            "input {:?} holds bytes that are not UTF-8, which tract expects of a string",
            spec.name
        ))),
    };
    let mut strings = input.strings().map(utf8).collect::<Result<Vec<_>, _>>()?;
    let row = shape.row_elements();
    while row > 0 && strings.len() >= row && strings.len() < shape.elements() {
        strings.extend_from_within(strings.len() - row..);
    }
    let array = tract_onnx::prelude::tract_ndarray::ArrayD::from_shape_vec(shape.dims(), strings);
    let array = array.map_err(|error| RunError::Failed(error.to_string()))?;
    Ok(tract_onnx::prelude::Tensor::from(array).into())
}

/// Wraps tract's memory; strings are copied.
pub(super) fn export(value: TValue, spec: &TensorSpec) -> Result<Tensor, RunError> {
    let failed = |text: String| RunError::Failed(format!("output {:?}: {text}", spec.name));
    let shape = Shape::new(value.shape()).map_err(|error| failed(error.to_string()))?;
    let dtype = from_tract(value.datum_type()).filter(|dtype| *dtype == spec.dtype);
    let Some(dtype) = dtype.filter(|_| value.is_plain_ram()) else {
        return Err(failed(format!("tract gave {:?}, expected {}", value.datum_type(), spec.dtype)));
    };
    let tensor = match dtype {
        DataType::Bytes => {
            let strings = value.to_plain_array_view::<String>().map_err(|error| failed(text_of(&error)))?;
            Tensor::from_strings(shape, strings.iter().map(String::as_bytes))
        }
        _ => Tensor::new(dtype, shape, Bytes::from_owner(Owned(value))),
    };
    tensor.map_err(|error| failed(error.to_string()))
}

/// Keeps tract's tensor alive as long as its bytes are read. Only ever made of a plain tensor of numbers.
struct Owned(TValue);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// tract's counterpart of a datatype; `None` for BF16.
pub(super) fn to_tract(dtype: DataType) -> Option<DatumType> {
    PAIRS.into_iter().find(|(ours, _)| *ours == dtype).map(|(_, theirs)| theirs)
}

fn from_tract(dtype: DatumType) -> Option<DataType> {
    let plain = dtype.unquantized();
    PAIRS.into_iter().find(|(_, theirs)| *theirs == plain).map(|(ours, _)| ours)
}

const PAIRS: [(DataType, DatumType); 13] = [
    (DataType::Bool, DatumType::Bool),
    (DataType::Uint8, DatumType::U8),
    (DataType::Uint16, DatumType::U16),
    (DataType::Uint32, DatumType::U32),
    (DataType::Uint64, DatumType::U64),
    (DataType::Int8, DatumType::I8),
    (DataType::Int16, DatumType::I16),
    (DataType::Int32, DatumType::I32),
    (DataType::Int64, DatumType::I64),
    (DataType::Fp16, DatumType::F16),
    (DataType::Fp32, DatumType::F32),
    (DataType::Fp64, DatumType::F64),
    (DataType::Bytes, DatumType::String),
];
