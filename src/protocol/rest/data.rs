//! The JSON field `data`: nested or flat arrays straight into a typed buffer, and a tensor back into a flat array.
//!
//! Numbers are read exactly, see `number`. On the way out floats are the shortest text that reads back to the same
//! bits; NaN and the infinities become `null`, for which JSON has no number.
//!
//! Text given here has passed the JSON parser: what is left to find is its end, not whether it is well formed.

use bytes::Bytes;
use half::{bf16, f16};
use serde::ser::{Error as _, Serialize, Serializer};

use super::Config;
use super::number::{Fault, Number};
use crate::error::{Error, Result};
use crate::protocol::common::MAX_STRING_BYTES;
use crate::request::Permit;
use crate::tensor::{DataType, Element, Shape, Tensor, TensorError, strings};

/// Reads the `data` of the input `name`. Reserves the buffer's bytes before it allocates them.
pub(super) fn parse(
    name: &str,
    dtype: DataType,
    shape: Shape,
    text: &str,
    config: &Config,
    permit: &mut Permit,
) -> Result<Tensor> {
    // `[0,0]`: an element takes two bytes of text at least. Keeps a shape from allocating what was never sent.
    if shape.elements() > text.len().saturating_sub(1) / 2 {
        return Err(mismatch(name, &shape));
    }
    let length = match dtype.size() {
        Some(size) => shape.elements() * size,
        // Two quotes and a comma make room for three of the prefix's four bytes.
        None => text.len() + shape.elements(),
    };
    if length > config.max_body_bytes {
        let message = format!("input '{name}' expands to {length} bytes, expected at most {}", config.max_body_bytes);
        return Err(Error::too_large(message));
    }
    permit.grow(length)?;
    match dtype {
        DataType::Bool => booleans(name, shape, text),
        DataType::Uint8 => numbers::<u8>(name, shape, text),
        DataType::Uint16 => numbers::<u16>(name, shape, text),
        DataType::Uint32 => numbers::<u32>(name, shape, text),
        DataType::Uint64 => numbers::<u64>(name, shape, text),
        DataType::Int8 => numbers::<i8>(name, shape, text),
        DataType::Int16 => numbers::<i16>(name, shape, text),
        DataType::Int32 => numbers::<i32>(name, shape, text),
        DataType::Int64 => numbers::<i64>(name, shape, text),
        DataType::Fp16 => numbers::<f16>(name, shape, text),
        DataType::Bf16 => numbers::<bf16>(name, shape, text),
        DataType::Fp32 => numbers::<f32>(name, shape, text),
        DataType::Fp64 => numbers::<f64>(name, shape, text),
        DataType::Bytes => texts(name, shape, text),
    }
}

fn mismatch(name: &str, shape: &Shape) -> Error {
    Error::invalid(format!("Shape does not match true shape of 'data' field of input '{name}', expected {shape}"))
}

fn booleans(name: &str, shape: Shape, text: &str) -> Result<Tensor> {
    let mut data = Vec::with_capacity(shape.elements());
    walk(name, &shape, text, |token| {
        data.push(match token {
            "true" => 1,
            "false" => 0,
            other => return Err(Fault::Type { found: kind_of(other), expected: "true or false" }),
        });
        Ok(())
    })?;
    built(Tensor::new(DataType::Bool, shape, data.into()))
}

fn numbers<T: Number + Send + 'static>(name: &str, shape: Shape, text: &str) -> Result<Tensor> {
    let mut data: Vec<T> = Vec::with_capacity(shape.elements());
    walk(name, &shape, text, |token| {
        match token.as_bytes().first() {
            Some(b'-' | b'0'..=b'9') => data.push(T::read(token)?),
            _ => return Err(Fault::Type { found: kind_of(token), expected: T::DTYPE.name() }),
        }
        Ok(())
    })?;
    built(Tensor::from_vec(shape, data))
}

fn texts(name: &str, shape: Shape, text: &str) -> Result<Tensor> {
    let mut data = Vec::new();
    walk(name, &shape, text, |token| {
        let inner = token.strip_prefix('"').and_then(|token| token.strip_suffix('"'));
        let inner = inner.ok_or(Fault::Type { found: kind_of(token), expected: "a string" })?;
        if inner.contains('\\') {
            let unescaped: String = serde_json::from_str(token).map_err(|_| Fault::Escape)?;
            append(&mut data, unescaped.as_bytes())
        } else {
            append(&mut data, inner.as_bytes())
        }
    })?;
    built(Tensor::new(DataType::Bytes, shape, Bytes::from(data)))
}

fn append(data: &mut Vec<u8>, element: &[u8]) -> Result<(), Fault> {
    let max = MAX_STRING_BYTES;
    let fits = element.len() <= max && strings::push(data, element).is_some();
    if fits { Ok(()) } else { Err(Fault::TooLong { max }) }
}

/// The walk has counted the elements; only a bug of ours gets here with an error.
fn built(tensor: Result<Tensor, TensorError>) -> Result<Tensor> {
    tensor.map_err(|error| Error::internal(error.to_string()))
}

fn kind_of(token: &str) -> &'static str {
    match token.as_bytes().first() {
        Some(b'"') => "a string",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        Some(b'[') => "an array",
        Some(b'{') => "an object",
        _ => "a number",
    }
}

/// Calls `element` with every element's text, in row-major order, and checks the structure against the shape.
fn walk(name: &str, shape: &Shape, text: &str, mut element: impl FnMut(&str) -> Result<(), Fault>) -> Result<()> {
    let mut cursor = Cursor { text, at: 0, index: 0 };
    let flat = [shape.elements()];
    let nested = text.trim_start().strip_prefix('[').is_some_and(|rest| rest.trim_start().starts_with('['));
    let dims = if nested { shape.dims() } else { &flat };
    match cursor.level(dims, &mut element) {
        Ok(()) => Ok(()),
        Err(Stop::Structure) => Err(mismatch(name, shape)),
        Err(Stop::Element(fault)) => Err(fault.at(name, cursor.index)),
    }
}

enum Stop {
    Structure,
    Element(Fault),
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
    index: usize,
}

impl<'a> Cursor<'a> {
    /// One array of `dims[0]` items. Recurses at most as deep as a shape has dimensions.
    fn level(&mut self, dims: &[usize], element: &mut impl FnMut(&str) -> Result<(), Fault>) -> Result<(), Stop> {
        let [count, inner @ ..] = dims else { return Err(Stop::Structure) };
        self.expect(b'[')?;
        for i in 0..*count {
            if i > 0 {
                self.expect(b',')?;
            }
            if inner.is_empty() {
                let token = self.token()?;
                element(token).map_err(Stop::Element)?;
                self.index += 1;
            } else {
                self.level(inner, element)?;
            }
        }
        self.expect(b']')
    }

    fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = bytes.get(self.at) {
            self.at += 1;
        }
        bytes.get(self.at).copied()
    }

    fn expect(&mut self, byte: u8) -> Result<(), Stop> {
        if self.peek() != Some(byte) {
            return Err(Stop::Structure);
        }
        self.at += 1;
        Ok(())
    }

    /// The next element's text. Arrays and objects are no elements: of those, the opening bracket only.
    fn token(&mut self) -> Result<&'a str, Stop> {
        let first = self.peek().ok_or(Stop::Structure)?;
        let rest = &self.text[self.at..];
        let length = match first {
            b']' | b'[' | b',' => return Err(Stop::Structure),
            b'{' => 1,
            b'"' => string_length(rest.as_bytes()).ok_or(Stop::Structure)?,
            _ => {
                let end = |byte: &u8| matches!(byte, b',' | b']' | b' ' | b'\n' | b'\r' | b'\t');
                rest.as_bytes().iter().position(end).unwrap_or(rest.len())
            }
        };
        self.at += length;
        Ok(&rest[..length])
    }
}

/// Bytes of the string at the start of `text`, quotes included.
fn string_length(text: &[u8]) -> Option<usize> {
    let mut at = 1;
    loop {
        match text.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

/// A tensor's elements as a flat JSON array.
pub(super) struct Flat<'a>(pub &'a Tensor);

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

    use proptest::prelude::*;

    use super::*;
    use crate::error::Kind;
    use crate::request::{Budget, BudgetConfig};

    fn read_within(dtype: DataType, dims: &[usize], text: &str, config: &Config, budget: usize) -> Result<Tensor> {
        serde_json::from_str::<serde::de::IgnoredAny>(text).unwrap();
        let budget = Budget::new(BudgetConfig { max_requests: 1, max_bytes: budget });
        let mut permit = budget.admit(0, Instant::now()).unwrap();
        let tensor = parse("x", dtype, Shape::new(dims).unwrap(), text, config, &mut permit);
        if let Ok(tensor) = &tensor {
            assert!(permit.bytes() >= tensor.data().len());
        }
        tensor
    }

    fn read(dtype: DataType, dims: &[usize], text: &str) -> Result<Tensor> {
        read_within(dtype, dims, text, &Config::default(), 1 << 30)
    }

    fn written(tensor: &Tensor) -> String {
        serde_json::to_string(&Flat(tensor)).unwrap()
    }

    #[test]
    fn elements_of_another_type_are_refused_by_index() {
        for (dtype, element) in [
            (DataType::Int32, "\"1\""),
            (DataType::Int32, "true"),
            (DataType::Int32, "null"),
            (DataType::Int32, "{}"),
            (DataType::Fp32, "\"NaN\""),
            (DataType::Fp32, "false"),
            (DataType::Bool, "0"),
            (DataType::Bool, "1"),
            (DataType::Bool, "\"true\""),
            (DataType::Bytes, "1"),
            (DataType::Bytes, "null"),
            (DataType::Bytes, r#""\ud800""#),
        ] {
            let good = if dtype == DataType::Bool {
                "true"
            } else if dtype == DataType::Bytes {
                "\"a\""
            } else {
                "1"
            };
            let error = read(dtype, &[2], &format!("[{good},{element}]")).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput);
            assert!(error.message().starts_with("element 1 of input 'x' is "), "{}", error.message());
        }
    }

    #[test]
    fn structure_must_match_the_shape() {
        for (dims, text) in [
            (&[2, 2][..], "[1,2,3,4]"),
            (&[2, 2], "[[1,2],[3,4]]"),
            (&[2, 2], " [ [ 1 , 2 ] ,\n[3,\t4]\r] "),
            (&[1, 1, 2], "[[[1,2]]]"),
            (&[], "[1]"),
            (&[0], "[]"),
            (&[3, 0], "[]"),
            (&[3, 0], "[[],[],[]]"),
            (&[0, 3], "[]"),
            (&[2, 0, 3], "[[],[]]"),
        ] {
            assert!(read(DataType::Int32, dims, text).is_ok(), "{dims:?} {text}");
        }
        for (dims, text) in [
            (&[2, 2][..], "[1,2,3]"),
            (&[2, 2], "[1,2,3,4,5]"),
            (&[2, 2], "[[1,2],[3]]"),
            (&[2, 2], "[[1,2],[3,4],[5,6]]"),
            (&[2, 2], "[[1,2,3,4]]"),
            (&[2, 2], "[[1],[2],[3],[4]]"),
            (&[2, 2], "[[[1,2]],[[3,4]]]"),
            (&[2, 2], "[[1,2],3]"),
            (&[2, 2], "[1,[2,3],4]"),
            (&[2, 1], "[1,[2]]"),
            (&[1, 1], "5"),
            (&[1, 1], "{}"),
            (&[1, 1], "\"[1]\""),
            (&[], "[[1]]"),
            (&[], "[]"),
            (&[3, 0], "[[],[]]"),
            (&[0], "[1]"),
            (&[1 << 40], "[1]"),
        ] {
            let error = read(DataType::Int32, dims, text).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{dims:?} {text}");
            assert!(error.message().starts_with("Shape does not match true shape of 'data' field"), "{dims:?} {text}");
        }
    }

    #[test]
    fn strings_keep_their_bytes() {
        let text = r#"["", "a,]\"b", "\u0000\ud83e\udd80\n", "é世", "\\"]"#;
        let tensor = read(DataType::Bytes, &[5], text).unwrap();
        let strings: Vec<&[u8]> = tensor.strings().collect();
        assert_eq!(strings, [&b""[..], b"a,]\"b", "\0🦀\n".as_bytes(), "é世".as_bytes(), b"\\"]);
        let one = |length| {
            let text = format!(r#"["{}"]"#, "a".repeat(length));
            read_within(DataType::Bytes, &[1], &text, &Config::default(), 64 << 20).map(|_| ())
        };
        assert!(one(MAX_STRING_BYTES).is_ok());
        assert_eq!(one(MAX_STRING_BYTES + 1).unwrap_err().kind(), Kind::TooLarge);
    }

    #[test]
    fn the_expanded_size_is_bounded_before_it_is_allocated() {
        let text = format!("[{}0]", "0,".repeat(1023));
        let config = Config { max_body_bytes: 8191, ..Config::default() };
        let error = read_within(DataType::Int64, &[1024], &text, &config, 1 << 20).unwrap_err();
        assert_eq!(error.kind(), Kind::TooLarge);
        assert!(read_within(DataType::Int32, &[1024], &text, &config, 1 << 20).is_ok());
        let error = read_within(DataType::Int64, &[1024], &text, &Config::default(), 8191).unwrap_err();
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
