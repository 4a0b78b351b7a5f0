//! The JSON field `data` of an input, within the request's limits, and a tensor back into a flat array.
//!
//! `tensor::json` reads; the bounds, the reservation and the texts of errors are here. On the way out floats are the
//! shortest text that reads back to the same bits; NaN and the infinities become `null`, for which JSON has no number.

use half::{bf16, f16};
use serde::ser::{Error as _, Serialize, Serializer};

use crate::error::{Error, Quoted, Result};
use crate::protocol::common::check_longest;
use crate::request::Permit;
use crate::tensor::json::{Data, DataError, NotFinite};
use crate::tensor::{DataType, Element, Shape, Tensor};

/// Reads the `data` of the input `name`. Reserves the buffer's bytes before it allocates them. `left`: of those that a
/// request's tensors may take when they are written as JSON, which can be far shorter.
pub(super) fn parse(
    name: Quoted<'_>,
    dtype: DataType,
    shape: Shape,
    text: &str,
    left: &mut usize,
    permit: &mut Permit,
) -> Result<Tensor> {
    let data = Data::new(dtype, shape, text).map_err(|error| refused(name, error))?;
    let length = data.max_bytes();
    *left = left.checked_sub(length).ok_or_else(|| {
        Error::too_large(format!("input '{name}' expands to {length} bytes, expected at most {left} more"))
    })?;
    permit.grow(length)?;
    let tensor = data.read(NotFinite::Refused).map_err(|error| refused(name, error))?;
    check_longest(name, &tensor)?;
    Ok(tensor)
}

fn refused(name: Quoted<'_>, error: DataError) -> Error {
    match error {
        DataError::Structure { shape } => Error::invalid(format!(
            "Shape does not match true shape of 'data' field of input '{name}', expected {shape}"
        )),
        DataError::Element { index, error } => Error::invalid(format!("element {index} of input '{name}' is {error}")),
        DataError::Tensor(error) => Error::internal(error.to_string()),
    }
}

/// A tensor's elements as a flat JSON array.
pub(crate) struct Flat<'a>(pub(crate) &'a Tensor);

impl Serialize for Flat<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tensor = self.0;
        match tensor.dtype() {
            DataType::Bool => serializer.collect_seq(tensor.data().iter().map(|byte| *byte != 0)),
            DataType::Uint8 => elements::<u8, _, _>(tensor, serializer, |x| x),
            DataType::Uint16 => elements::<u16, _, _>(tensor, serializer, |x| x),
            DataType::Uint32 => elements::<u32, _, _>(tensor, serializer, |x| x),
            DataType::Uint64 => elements::<u64, _, _>(tensor, serializer, |x| x),
            DataType::Int8 => elements::<i8, _, _>(tensor, serializer, |x| x),
            DataType::Int16 => elements::<i16, _, _>(tensor, serializer, |x| x),
            DataType::Int32 => elements::<i32, _, _>(tensor, serializer, |x| x),
            DataType::Int64 => elements::<i64, _, _>(tensor, serializer, |x| x),
            DataType::Fp16 => elements::<f16, _, _>(tensor, serializer, f32::from),
            DataType::Bf16 => elements::<bf16, _, _>(tensor, serializer, f32::from),
            DataType::Fp32 => elements::<f32, _, _>(tensor, serializer, |x| x),
            DataType::Fp64 => elements::<f64, _, _>(tensor, serializer, |x| x),
            DataType::Bytes => {
                let texts: Result<Vec<&str>, _> = tensor.strings().map(std::str::from_utf8).collect();
                serializer.collect_seq(texts.map_err(|_| S::Error::custom("not UTF-8"))?)
            }
        }
    }
}

fn elements<T: Element, V: Serialize, S: Serializer>(
    tensor: &Tensor,
    serializer: S,
    value: fn(T) -> V,
) -> Result<S::Ok, S::Error> {
    match tensor.as_slice::<T>() {
        Some(aligned) => serializer.collect_seq(aligned.iter().map(|x| value(*x))),
        None => serializer.collect_seq(tensor.to_vec::<T>().unwrap_or_default().into_iter().map(value)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;
    use crate::protocol::common::MAX_STRING_BYTES;
    use crate::request::{Budget, BudgetConfig};

    const BODY: usize = 64 << 20;

    fn read_within(dtype: DataType, dims: &[usize], text: &str, mut left: usize, budget: usize) -> Result<Tensor> {
        let budget = Budget::new(BudgetConfig { max_requests: 1, max_bytes: budget, ..BudgetConfig::default() });
        let mut permit = budget.admit(0, Instant::now()).unwrap();
        let tensor = parse(Quoted("x"), dtype, Shape::new(dims).unwrap(), text, &mut left, &mut permit);
        if let Ok(tensor) = &tensor {
            assert!(permit.bytes() >= tensor.data().len());
        }
        tensor
    }

    fn read(dtype: DataType, dims: &[usize], text: &str) -> Result<Tensor> {
        read_within(dtype, dims, text, BODY, 1 << 30)
    }

    fn written(tensor: &Tensor) -> String {
        serde_json::to_string(&Flat(tensor)).unwrap()
    }

    #[test]
    fn errors_name_the_input() {
        let message = |dims: &[usize], text: &str| {
            let error = read(DataType::Int32, dims, text).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput);
            error.message().to_string()
        };
        assert_eq!(message(&[2], "[1,\"2\"]"), "element 1 of input 'x' is a string, expected INT32");
        assert_eq!(
            message(&[2, 2], "[1,2,3]"),
            "Shape does not match true shape of 'data' field of input 'x', expected [2,2]"
        );
    }

    #[test]
    fn names_of_floats_are_refused() {
        assert_eq!(read(DataType::Fp32, &[1], "[\"NaN\"]").unwrap_err().kind(), Kind::InvalidInput);
    }

    #[test]
    fn long_strings_are_refused() {
        let one = |length| {
            let text = format!(r#"["{}"]"#, "a".repeat(length));
            read_within(DataType::Bytes, &[1], &text, BODY, 64 << 20).map(|_| ())
        };
        assert!(one(MAX_STRING_BYTES).is_ok());
        assert_eq!(one(MAX_STRING_BYTES + 1).unwrap_err().kind(), Kind::TooLarge);
    }

    #[test]
    fn the_expanded_size_is_bounded_before_it_is_allocated() {
        let text = format!("[{}0]", "0,".repeat(1023));
        let error = read_within(DataType::Int64, &[1024], &text, 8191, 1 << 20).unwrap_err();
        assert_eq!(error.kind(), Kind::TooLarge);
        assert!(read_within(DataType::Int64, &[1024], &text, 8192, 1 << 20).is_ok());
        let error = read_within(DataType::Int64, &[1024], &text, BODY, 8191).unwrap_err();
        assert_eq!(error.kind(), Kind::Overloaded);
    }

    #[test]
    fn what_is_not_finite_becomes_null() {
        let tensor = Tensor::from_vec(Shape::new([4]).unwrap(), vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5]);
        assert_eq!(written(&tensor.unwrap()), "[null,null,null,0.5]");
        let tensor = Tensor::from_vec(Shape::new([2]).unwrap(), vec![f16::NAN, f16::from_f32(0.1)]);
        assert_eq!(written(&tensor.unwrap()), "[null,0.099975586]");
        let tensor = Tensor::from_vec(Shape::new([2]).unwrap(), vec![0.1f32, 1.0]);
        assert_eq!(written(&tensor.unwrap()), "[0.1,1.0]");
    }

    #[test]
    fn every_half_returns_to_the_same_bits() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()).collect();
        let tensor = Tensor::from_vec(Shape::new([halves.len()]).unwrap(), halves).unwrap();
        assert_eq!(read(DataType::Fp16, tensor.shape().dims(), &written(&tensor)).unwrap(), tensor);
        let halves: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).filter(|x| x.is_finite()).collect();
        let tensor = Tensor::from_vec(Shape::new([halves.len()]).unwrap(), halves).unwrap();
        assert_eq!(read(DataType::Bf16, tensor.shape().dims(), &written(&tensor)).unwrap(), tensor);
    }

    /// Random elements of any datatype as their binary layout, without what JSON cannot say.
    fn tensors() -> impl Strategy<Value = Tensor> {
        let dims = proptest::collection::vec(0usize..4, 0..4);
        (0..DataType::ALL.len(), dims, proptest::collection::vec(any::<u64>(), 27)).prop_map(|(dtype, dims, seeds)| {
            let shape = Shape::new(dims).unwrap();
            let seeds = &seeds[..shape.elements()];
            match DataType::ALL[dtype] {
                DataType::Bytes => Tensor::from_strings(
                    shape,
                    seeds.iter().map(|s| {
                        "\u{0}\"\\é🦀a,]"
                            .chars()
                            .cycle()
                            .skip((s % 7) as usize)
                            .take((s % 11) as usize)
                            .collect::<String>()
                    }),
                )
                .unwrap(),
                DataType::Bool => {
                    let data: Vec<u8> = seeds.iter().map(|s| (s % 2) as u8).collect();
                    Tensor::new(DataType::Bool, shape, data.into()).unwrap()
                }
                DataType::Fp32 => {
                    let finite = |s: &u64| Some(f32::from_bits(*s as u32)).filter(|x| x.is_finite()).unwrap_or(0.0);
                    Tensor::from_vec(shape, seeds.iter().map(finite).collect()).unwrap()
                }
                DataType::Fp64 => {
                    let finite = |s: &u64| Some(f64::from_bits(*s)).filter(|x| x.is_finite()).unwrap_or(0.0);
                    Tensor::from_vec(shape, seeds.iter().map(finite).collect()).unwrap()
                }
                DataType::Fp16 => {
                    let finite =
                        |s: &u64| Some(f16::from_bits(*s as u16)).filter(|x| x.is_finite()).unwrap_or_default();
                    Tensor::from_vec(shape, seeds.iter().map(finite).collect()).unwrap()
                }
                DataType::Bf16 => {
                    let finite =
                        |s: &u64| Some(bf16::from_bits(*s as u16)).filter(|x| x.is_finite()).unwrap_or_default();
                    Tensor::from_vec(shape, seeds.iter().map(finite).collect()).unwrap()
                }
                integer => {
                    let size = integer.size().unwrap();
                    let data: Vec<u8> = seeds.iter().flat_map(|s| s.to_le_bytes()[..size].to_vec()).collect();
                    Tensor::new(integer, shape, data.into()).unwrap()
                }
            }
        })
    }

    proptest! {
        #[test]
        fn tensors_round_trip(tensor in tensors()) {
            let text = written(&tensor);
            prop_assert_eq!(read(tensor.dtype(), tensor.shape().dims(), &text).unwrap(), tensor);
        }

        #[test]
        fn misaligned_tensors_read_the_same(tensor in tensors(), offset in 0usize..8) {
            let moved: Bytes = [&vec![0; offset][..], tensor.data()].concat().into();
            let moved = Tensor::new(tensor.dtype(), tensor.shape().clone(), moved.slice(offset..)).unwrap();
            prop_assert_eq!(written(&moved), written(&tensor));
        }
    }
}
