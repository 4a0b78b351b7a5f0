//! The inputs of a message to tensors: typed contents by datatype, raw contents by reference. Pure.
//!
//! The errors' texts are those that Triton's users match on, where Triton has one.

use std::sync::Arc;

use bytes::Bytes;

use super::convert::check_parameters;
use super::proto::InferTensorContents;
use super::proto::model_infer_request::InferInputTensor;
use crate::error::{Error, Quoted, Result, quoted};
use crate::protocol::common::{Strings, check_length, check_longest, datatype};
use crate::request::NamedTensor;
use crate::tensor::{DataType, Element, Shape, Tensor};

/// One tensor per input, in order. Raw contents, where there are any, belong to the inputs in that order.
pub(super) fn tensors(inputs: Vec<InferInputTensor>, raw: Vec<Bytes>, model: &str) -> Result<Vec<NamedTensor>> {
    let is_raw = !raw.is_empty();
    let (sent, expected) = (raw.len(), inputs.len());
    let mut raw = raw.into_iter();
    let mut strings = Strings::default();
    let tensors = inputs
        .into_iter()
        .map(|input| {
            let place = Place { input: &input.name, model };
            check_length("an input's name", &input.name)?;
            check_parameters(&input.parameters, place)?;
            let (dtype, shape) = declared(&input, place)?;
            strings.count(dtype, &shape)?;
            let tensor = match (input.contents, raw.next()) {
                (Some(_), _) if is_raw => Err(Error::invalid(format!(
                    "contents field must not be specified when using raw_input_contents for {}",
                    place.short()
                ))),
                (Some(contents), _) => typed(dtype, shape, contents, place),
                (None, Some(data)) => Tensor::new(dtype, shape, data).map_err(|error| place.error(&error.to_string())),
                (None, None) => {
                    Err(Error::invalid(format!("unable to find data for input tensor {} in request.", place.short())))
                }
            }?;
            check_longest(Quoted(&input.name), &tensor)?;
            Ok(NamedTensor { name: Arc::from(input.name), tensor })
        })
        .collect::<Result<Vec<_>>>()?;
    if raw.next().is_some() {
        return Err(Error::invalid(format!(
            "request has {sent} entries in raw_input_contents for {expected} inputs of model '{}'",
            quoted(model)
        )));
    }
    Ok(tensors)
}

fn declared(input: &InferInputTensor, place: Place<'_>) -> Result<(DataType, Shape)> {
    let dtype = datatype(Quoted(&input.name), &input.datatype)?;
    let shape = Shape::from_wire(&input.shape).map_err(|error| place.error(&error.to_string()))?;
    Ok((dtype, shape))
}

/// From the typed field of the tensor's datatype, which must be the only one that is filled.
fn typed(dtype: DataType, shape: Shape, contents: InferTensorContents, place: Place<'_>) -> Result<Tensor> {
    let Some(field) = field_of(dtype) else {
        return Err(place.error(&format!("{dtype} has no typed field, send it in raw_input_contents")));
    };
    let lengths = [
        ("bool_contents", contents.bool_contents.len()),
        ("int_contents", contents.int_contents.len()),
        ("int64_contents", contents.int64_contents.len()),
        ("uint_contents", contents.uint_contents.len()),
        ("uint64_contents", contents.uint64_contents.len()),
        ("fp32_contents", contents.fp32_contents.len()),
        ("fp64_contents", contents.fp64_contents.len()),
        ("bytes_contents", contents.bytes_contents.len()),
    ];
    if let Some((found, _)) = lengths.iter().find(|(name, length)| *length > 0 && *name != field) {
        return Err(place.error(&format!("data is in `{found}`, expected `{field}` for {dtype}")));
    }
    let found: usize = lengths.iter().map(|(_, length)| length).sum();
    if found != shape.elements() {
        let expected = shape.elements();
        return Err(place.error(&format!("`{field}` has {found} elements, expected {expected} for shape {shape}")));
    }
    let tensor = match dtype {
        DataType::Bool => {
            let bytes: Vec<u8> = contents.bool_contents.into_iter().map(u8::from).collect();
            Tensor::new(dtype, shape, bytes.into())
        }
        DataType::Int8 => Tensor::from_vec(shape, narrowed::<i8, _>(contents.int_contents, field, place)?),
        DataType::Int16 => Tensor::from_vec(shape, narrowed::<i16, _>(contents.int_contents, field, place)?),
        DataType::Int32 => Tensor::from_vec(shape, contents.int_contents),
        DataType::Int64 => Tensor::from_vec(shape, contents.int64_contents),
        DataType::Uint8 => Tensor::from_vec(shape, narrowed::<u8, _>(contents.uint_contents, field, place)?),
        DataType::Uint16 => Tensor::from_vec(shape, narrowed::<u16, _>(contents.uint_contents, field, place)?),
        DataType::Uint32 => Tensor::from_vec(shape, contents.uint_contents),
        DataType::Uint64 => Tensor::from_vec(shape, contents.uint64_contents),
        DataType::Fp32 => Tensor::from_vec(shape, contents.fp32_contents),
        DataType::Fp64 => Tensor::from_vec(shape, contents.fp64_contents),
        DataType::Bytes => Tensor::from_strings(shape, contents.bytes_contents),
        // Refused above: they have no field.
        DataType::Fp16 | DataType::Bf16 => return Err(Error::internal(format!("{dtype} reached its typed field"))),
    };
    tensor.map_err(|error| place.error(&error.to_string()))
}

/// The one field that carries a datatype; `None` for those that travel raw only.
fn field_of(dtype: DataType) -> Option<&'static str> {
    match dtype {
        DataType::Bool => Some("bool_contents"),
        DataType::Int8 | DataType::Int16 | DataType::Int32 => Some("int_contents"),
        DataType::Int64 => Some("int64_contents"),
        DataType::Uint8 | DataType::Uint16 | DataType::Uint32 => Some("uint_contents"),
        DataType::Uint64 => Some("uint64_contents"),
        DataType::Fp32 => Some("fp32_contents"),
        DataType::Fp64 => Some("fp64_contents"),
        DataType::Bytes => Some("bytes_contents"),
        DataType::Fp16 | DataType::Bf16 => None,
    }
}

/// Small integers out of 32-bit fields: a value that does not fit is refused, never wrapped.
fn narrowed<T, W>(elements: Vec<W>, field: &str, place: Place<'_>) -> Result<Vec<T>>
where
    T: Element + TryFrom<W>,
    W: Copy + std::fmt::Display,
{
    let narrow = elements.into_iter().enumerate().map(|(index, element)| {
        T::try_from(element).map_err(|_| {
            place.error(&format!("`{field}` has {element} at element {index}, which does not fit {}", T::DTYPE))
        })
    });
    narrow.collect()
}

/// Names an input in errors.
#[derive(Clone, Copy)]
struct Place<'a> {
    input: &'a str,
    model: &'a str,
}

impl Place<'_> {
    fn short(&self) -> String {
        format!("'{}' for model '{}'", quoted(self.input), quoted(self.model))
    }

    fn error(&self, what: &str) -> Error {
        Error::invalid(format!("{self}: {what}"))
    }
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "input {}", self.short())
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;
    use crate::tensor::strings;

    fn input(datatype: &str, shape: &[i64], contents: Option<InferTensorContents>) -> InferInputTensor {
        let (name, datatype) = ("x".into(), datatype.into());
        InferInputTensor { name, datatype, shape: shape.to_vec(), contents, ..Default::default() }
    }

    fn refused(inputs: Vec<InferInputTensor>, raw: Vec<Bytes>) -> String {
        let error = tensors(inputs, raw, "m").unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidInput);
        error.message().to_string()
    }

    fn one(input: InferInputTensor, raw: Option<Vec<u8>>) -> Tensor {
        tensors(vec![input], raw.into_iter().map(Bytes::from).collect(), "m").unwrap().remove(0).tensor
    }

    /// For every datatype two elements, typed (where it can be) and raw.
    fn table() -> Vec<(DataType, Option<InferTensorContents>, Vec<u8>)> {
        let none = InferTensorContents::default;
        let le = |words: [&[u8]; 2]| words.concat();
        vec![
            (DataType::Bool, Some(InferTensorContents { bool_contents: vec![true, false], ..none() }), vec![1, 0]),
            (DataType::Uint8, Some(InferTensorContents { uint_contents: vec![0, 255], ..none() }), vec![0, 255]),
            (
                DataType::Uint16,
                Some(InferTensorContents { uint_contents: vec![1, 65535], ..none() }),
                vec![1, 0, 255, 255],
            ),
            (
                DataType::Uint32,
                Some(InferTensorContents { uint_contents: vec![1, u32::MAX], ..none() }),
                le([&1u32.to_le_bytes(), &u32::MAX.to_le_bytes()]),
            ),
            (
                DataType::Uint64,
                Some(InferTensorContents { uint64_contents: vec![1, u64::MAX], ..none() }),
                le([&1u64.to_le_bytes(), &u64::MAX.to_le_bytes()]),
            ),
            (DataType::Int8, Some(InferTensorContents { int_contents: vec![-128, 127], ..none() }), vec![128, 127]),
            (
                DataType::Int16,
                Some(InferTensorContents { int_contents: vec![-32768, 1], ..none() }),
                le([&i16::MIN.to_le_bytes(), &1i16.to_le_bytes()]),
            ),
            (
                DataType::Int32,
                Some(InferTensorContents { int_contents: vec![i32::MIN, 1], ..none() }),
                le([&i32::MIN.to_le_bytes(), &1i32.to_le_bytes()]),
            ),
            (
                DataType::Int64,
                Some(InferTensorContents { int64_contents: vec![i64::MIN, 1], ..none() }),
                le([&i64::MIN.to_le_bytes(), &1i64.to_le_bytes()]),
            ),
            (
                DataType::Fp32,
                Some(InferTensorContents { fp32_contents: vec![1.5, f32::INFINITY], ..none() }),
                le([&1.5f32.to_le_bytes(), &f32::INFINITY.to_le_bytes()]),
            ),
            (
                DataType::Fp64,
                Some(InferTensorContents { fp64_contents: vec![1.5, -0.0], ..none() }),
                le([&1.5f64.to_le_bytes(), &(-0.0f64).to_le_bytes()]),
            ),
            (
                DataType::Bytes,
                Some(InferTensorContents {
                    bytes_contents: vec![Bytes::from_static(&[0xff, 0]), Bytes::new()],
                    ..none()
                }),
                vec![2, 0, 0, 0, 0xff, 0, 0, 0, 0, 0],
            ),
            (DataType::Fp16, None, le([&f16::ONE.to_le_bytes(), &f16::NEG_ONE.to_le_bytes()])),
            (DataType::Bf16, None, le([&bf16::ONE.to_le_bytes(), &bf16::NEG_ONE.to_le_bytes()])),
        ]
    }

    #[test]
    fn every_datatype_is_taken_typed_and_raw_alike() {
        assert_eq!(table().len(), DataType::ALL.len());
        for (dtype, contents, raw) in table() {
            let raw = one(input(dtype.name(), &[2, 1], None), Some(raw));
            assert_eq!((raw.dtype(), raw.shape().dims()), (dtype, &[2, 1][..]));
            match contents {
                Some(_) => {
                    let typed = one(input(dtype.name(), &[2, 1], contents), None);
                    assert_eq!(typed, raw, "{dtype}");
                }
                None => {
                    let text = refused(vec![input(dtype.name(), &[0], Some(InferTensorContents::default()))], vec![]);
                    assert!(text.ends_with("has no typed field, send it in raw_input_contents"), "{dtype}");
                }
            }
        }
    }

    #[test]
    fn a_field_of_another_datatype_is_refused() {
        for (sent, contents, _) in table() {
            let Some(contents) = contents else { continue };
            for dtype in DataType::ALL.into_iter().filter(|dtype| field_of(*dtype) != field_of(sent)) {
                refused(vec![input(dtype.name(), &[2], Some(contents.clone()))], vec![]);
            }
        }
        let contents = InferTensorContents { fp32_contents: vec![1.0], ..Default::default() };
        assert_eq!(
            refused(vec![input("INT64", &[1], Some(contents))], vec![]),
            "input 'x' for model 'm': data is in `fp32_contents`, expected `int64_contents` for INT64"
        );
    }

    #[test]
    fn small_integers_are_checked_not_wrapped() {
        let ints = |values| Some(InferTensorContents { int_contents: values, ..Default::default() });
        let uints = |values| Some(InferTensorContents { uint_contents: values, ..Default::default() });
        for (datatype, contents) in [
            ("INT8", ints(vec![0, 300])),
            ("INT8", ints(vec![0, -129])),
            ("INT16", ints(vec![0, 32768])),
            ("UINT8", uints(vec![0, 256])),
            ("UINT16", uints(vec![0, 65536])),
        ] {
            let text = refused(vec![input(datatype, &[2], contents)], vec![]);
            assert!(text.ends_with(&format!("at element 1, which does not fit {datatype}")), "{text}");
        }
    }

    #[test]
    fn the_well_known_texts_are_verbatim() {
        let contents = || Some(InferTensorContents { fp32_contents: vec![1.0], ..Default::default() });
        let raw = || Bytes::from_static(&[0; 4]);
        assert_eq!(
            refused(vec![input("FP32", &[1], contents())], vec![raw()]),
            "contents field must not be specified when using raw_input_contents for 'x' for model 'm'"
        );
        assert_eq!(
            refused(vec![input("FP32", &[1], None)], vec![]),
            "unable to find data for input tensor 'x' for model 'm' in request."
        );
        let two = vec![input("FP32", &[1], None), input("FP32", &[1], None)];
        assert_eq!(refused(two, vec![raw()]), "unable to find data for input tensor 'x' for model 'm' in request.");
    }

    #[test]
    fn lengths_and_shapes_must_agree() {
        let fp32 = |shape: &[i64], bytes: usize| {
            tensors(vec![input("FP32", shape, None)], vec![vec![0; bytes].into()], "m").map(|_| ())
        };
        assert!(fp32(&[2], 8).is_ok() && fp32(&[], 4).is_ok() && fp32(&[0, 3], 0).is_ok());
        assert_eq!(
            fp32(&[2], 7).unwrap_err().message(),
            "input 'x' for model 'm': 7 bytes of data, expected 8 for FP32 [2]"
        );
        for bad in [fp32(&[2], 9), fp32(&[-1], 4), fp32(&[i64::MAX, 2], 4), fp32(&[0, i64::MAX, 2], 0)] {
            assert_eq!(bad.unwrap_err().kind(), Kind::InvalidInput);
        }
        let surplus = refused(vec![input("FP32", &[1], None)], vec![vec![0; 4].into(), Bytes::new()]);
        assert_eq!(surplus, "request has 2 entries in raw_input_contents for 1 inputs of model 'm'");
        let contents = InferTensorContents { fp32_contents: vec![1.0; 3], ..Default::default() };
        assert_eq!(
            refused(vec![input("FP32", &[2, 2], Some(contents))], vec![]),
            "input 'x' for model 'm': `fp32_contents` has 3 elements, expected 4 for shape [2,2]"
        );
        let empty = one(input("FP32", &[0, 2], Some(InferTensorContents::default())), None);
        assert_eq!(empty.shape().dims(), [0, 2]);
        assert!(
            refused(vec![input("FLOAT", &[1], None)], vec![]).contains("has datatype 'FLOAT', expected one of BOOL,")
        );
    }

    proptest! {
        #[test]
        fn typed_and_raw_are_the_same_tensor(
            ints in proptest::collection::vec(any::<i64>(), 0..20),
            floats in proptest::collection::vec(any::<f32>(), 0..20),
            texts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..9), 0..20),
        ) {
            let same = |datatype: &str, contents: InferTensorContents, raw: Vec<u8>, elements: usize| {
                let shape = [i64::try_from(elements).unwrap()];
                let typed = one(input(datatype, &shape, Some(contents)), None);
                typed == one(input(datatype, &shape, None), Some(raw))
            };
            let none = InferTensorContents::default;
            let narrow: Vec<i32> = ints.iter().map(|i| i32::from(*i as i16)).collect();
            let narrow_raw = narrow.iter().flat_map(|i| (*i as i16).to_le_bytes()).collect();
            let wide_raw = ints.iter().flat_map(|i| i.to_le_bytes()).collect();
            let count = ints.len();
            let contents = InferTensorContents { int_contents: narrow, ..none() };
            prop_assert!(same("INT16", contents, narrow_raw, count));
            let contents = InferTensorContents { int64_contents: ints, ..none() };
            prop_assert!(same("INT64", contents, wide_raw, count));
            let float_raw = floats.iter().flat_map(|f| f.to_le_bytes()).collect();
            let count = floats.len();
            let contents = InferTensorContents { fp32_contents: floats, ..none() };
            prop_assert!(same("FP32", contents, float_raw, count));
            let mut text_raw = Vec::new();
            texts.iter().for_each(|text| strings::push(&mut text_raw, text).unwrap());
            let count = texts.len();
            let contents = texts.into_iter().map(Bytes::from).collect();
            let contents = InferTensorContents { bytes_contents: contents, ..none() };
            prop_assert!(same("BYTES", contents, text_raw, count));
        }
    }
}
