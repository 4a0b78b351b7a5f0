//! A tensor's elements as JSON: nested or flat arrays straight into a typed buffer.
//!
//! For requests, golden cases and warm-ups alike; what surrounds the elements, and how many bytes they may take, is the
//! caller's. Numbers are read exactly, see `number`.
//!
//! Text given here may not have passed a JSON parser, if there are no strings in it: what is no JSON is refused, but where
//! it is wrong, only one can tell.

use bytes::Bytes;
use half::{bf16, f16};

pub use super::number::ElementError;
use super::number::Number;
use super::{DataType, Shape, Tensor, TensorError, strings};

/// What stands for the values of a float that are not finite, for which JSON has no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotFinite {
    Refused,
    /// The strings `"NaN"`, `"Infinity"` and `"-Infinity"`.
    Named,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    #[error("`data` does not have the shape {shape}, expected its elements flat or nested")]
    Structure { shape: Shape },
    #[error("element {index} is {error}")]
    Element { index: usize, error: ElementError },
    /// The elements have been counted: only a defect of ours gets here.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// Elements as text, with what they should be.
pub struct Data<'a> {
    dtype: DataType,
    shape: Shape,
    text: &'a str,
}

impl<'a> Data<'a> {
    /// Refuses a shape of more elements than the text has room for, so that no shape allocates what was never written.
    pub fn new(dtype: DataType, shape: Shape, text: &'a str) -> Result<Data<'a>, DataError> {
        // `[0,0]`: an element takes two bytes of text at least.
        if shape.elements() > text.len().saturating_sub(1) / 2 {
            return Err(DataError::Structure { shape });
        }
        Ok(Data { dtype, shape, text })
    }

    /// The most bytes that the tensor's buffer will hold.
    pub fn max_bytes(&self) -> usize {
        match self.dtype.size() {
            Some(size) => self.shape.elements() * size,
            // Two quotes and a comma make room for three of the prefix's four bytes.
            None => self.text.len() + self.shape.elements(),
        }
    }

    pub fn read(self, not_finite: NotFinite) -> Result<Tensor, DataError> {
        match self.dtype {
            DataType::Bool => self.booleans(),
            DataType::Uint8 => self.numbers::<u8>(not_finite),
            DataType::Uint16 => self.numbers::<u16>(not_finite),
            DataType::Uint32 => self.numbers::<u32>(not_finite),
            DataType::Uint64 => self.numbers::<u64>(not_finite),
            DataType::Int8 => self.numbers::<i8>(not_finite),
            DataType::Int16 => self.numbers::<i16>(not_finite),
            DataType::Int32 => self.numbers::<i32>(not_finite),
            DataType::Int64 => self.numbers::<i64>(not_finite),
            DataType::Fp16 => self.numbers::<f16>(not_finite),
            DataType::Bf16 => self.numbers::<bf16>(not_finite),
            DataType::Fp32 => self.numbers::<f32>(not_finite),
            DataType::Fp64 => self.numbers::<f64>(not_finite),
            DataType::Bytes => self.texts(),
        }
    }

    fn booleans(self) -> Result<Tensor, DataError> {
        let mut data = Vec::with_capacity(self.shape.elements());
        self.walk(|text| {
            let token = token(text);
            data.push(match token {
                b"true" => 1,
                b"false" => 0,
                other => return Err(misfit(other, "true or false")),
            });
            Ok(token.len())
        })?;
        Ok(Tensor::new(DataType::Bool, self.shape, data.into())?)
    }

    fn numbers<T: Number + Send + 'static>(self, not_finite: NotFinite) -> Result<Tensor, DataError> {
        let mut data: Vec<T> = Vec::with_capacity(self.shape.elements());
        self.walk(|text| {
            let (value, length) = match text.first() {
                Some(b'-' | b'0'..=b'9') => T::read(text)?,
                _ => {
                    let token = token(text);
                    let named = if not_finite == NotFinite::Named { T::named(token) } else { None };
                    (named.ok_or_else(|| misfit(token, T::DTYPE.name()))?, token.len())
                }
            };
            data.push(value);
            Ok(length)
        })?;
        Ok(Tensor::from_vec(self.shape, data)?)
    }

    fn texts(self) -> Result<Tensor, DataError> {
        let mut data = Vec::new();
        self.walk(|text| {
            let token = token(text);
            let [b'"', inner @ .., b'"'] = token else { return Err(misfit(token, "a string")) };
            let pushed = if inner.contains(&b'\\') {
                let unescaped: String = serde_json::from_slice(token).map_err(|_| ElementError::Escape)?;
                strings::push(&mut data, unescaped.as_bytes())
            } else {
                strings::push(&mut data, inner)
            };
            pushed.ok_or(ElementError::TooLong)?;
            Ok(token.len())
        })?;
        Ok(Tensor::new(DataType::Bytes, self.shape, Bytes::from(data))?)
    }

    /// Calls `element` with the text from every element on, in row-major order, to hear how long the element is, and checks
    /// the structure against the shape.
    fn walk(&self, mut element: impl FnMut(&[u8]) -> Result<usize, ElementError>) -> Result<(), DataError> {
        let mut cursor = Cursor { text: self.text.as_bytes(), at: 0, index: 0 };
        let flat = [self.shape.elements()];
        let nested = self.text.trim_start().strip_prefix('[').is_some_and(|rest| rest.trim_start().starts_with('['));
        let dims = if nested { self.shape.dims() } else { &flat };
        let read = cursor.level(dims, &mut element).and_then(|()| cursor.end());
        read.map_err(|stop| match stop {
            Stop::Structure => DataError::Structure { shape: self.shape.clone() },
            Stop::Element(error) => DataError::Element { index: cursor.index, error },
        })
    }
}

fn misfit(token: &[u8], expected: &'static str) -> ElementError {
    ElementError::Type { found: kind_of(token), expected }
}

fn kind_of(token: &[u8]) -> &'static str {
    match token.first() {
        Some(b'"') => "a string",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        Some(b'{') => "an object",
        _ => "a number",
    }
}

enum Stop {
    Structure,
    Element(ElementError),
}

struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
    index: usize,
}

impl Cursor<'_> {
    /// One array of `dims[0]` items. Recurses at most as deep as a shape has dimensions.
    fn level(
        &mut self,
        dims: &[usize],
        element: &mut impl FnMut(&[u8]) -> Result<usize, ElementError>,
    ) -> Result<(), Stop> {
        let [count, inner @ ..] = dims else { return Err(Stop::Structure) };
        self.expect(b'[')?;
        for i in 0..*count {
            if i > 0 {
                self.expect(b',')?;
            }
            if inner.is_empty() {
                // An array here is one too many.
                if let None | Some(b']' | b'[' | b',') = self.peek() {
                    return Err(Stop::Structure);
                }
                self.at += element(&self.text[self.at..]).map_err(Stop::Element)?;
                self.index += 1;
            } else {
                self.level(inner, element)?;
            }
        }
        self.expect(b']')
    }

    fn end(&mut self) -> Result<(), Stop> {
        self.peek().map_or(Ok(()), |_| Err(Stop::Structure))
    }

    #[inline]
    fn peek(&mut self) -> Option<u8> {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.text.get(self.at) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    #[inline]
    fn expect(&mut self, byte: u8) -> Result<(), Stop> {
        if self.peek() != Some(byte) {
            return Err(Stop::Structure);
        }
        self.at += 1;
        Ok(())
    }
}

/// The element that `text` begins with: of an object, which is none, the opening bracket.
fn token(text: &[u8]) -> &[u8] {
    let length = match text.first() {
        Some(b'{') => Some(1),
        Some(b'"') => string_length(text),
        _ => text.iter().position(|byte| matches!(byte, b',' | b']' | b' ' | b'\n' | b'\r' | b'\t')),
    };
    &text[..length.unwrap_or(text.len())]
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(not_finite: NotFinite, dtype: DataType, dims: &[usize], text: &str) -> Result<Tensor, DataError> {
        serde_json::from_str::<serde::de::IgnoredAny>(text).unwrap();
        let data = Data::new(dtype, Shape::new(dims).unwrap(), text)?;
        let max = data.max_bytes();
        let tensor = data.read(not_finite)?;
        assert!(tensor.data().len() <= max, "{dtype} {text}");
        Ok(tensor)
    }

    fn read(dtype: DataType, dims: &[usize], text: &str) -> Result<Tensor, DataError> {
        read_as(NotFinite::Refused, dtype, dims, text)
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
            assert!(matches!(error, DataError::Element { index: 1, .. }), "{dtype} {element}: {error}");
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
            assert_eq!(error, DataError::Structure { shape: Shape::new(dims).unwrap() }, "{dims:?} {text}");
        }
    }

    #[test]
    fn strings_keep_their_bytes() {
        let text = r#"["", "a,]\"b", "\u0000\ud83e\udd80\n", "é世", "\\"]"#;
        let tensor = read(DataType::Bytes, &[5], text).unwrap();
        let strings: Vec<&[u8]> = tensor.strings().collect();
        assert_eq!(strings, [&b""[..], b"a,]\"b", "\0🦀\n".as_bytes(), "é世".as_bytes(), b"\\"]);
    }

    #[test]
    fn values_that_are_not_finite_have_names_where_they_are_asked_for() {
        let text = r#"["NaN", "Infinity", "-Infinity", 1]"#;
        let named = |dtype| read_as(NotFinite::Named, dtype, &[4], text);
        let floats = named(DataType::Fp32).unwrap().to_vec::<f32>().unwrap();
        assert!(floats[0].is_nan());
        assert_eq!(floats[1..], [f32::INFINITY, f32::NEG_INFINITY, 1.0]);
        for dtype in [DataType::Fp16, DataType::Bf16, DataType::Fp64] {
            assert!(named(dtype).is_ok(), "{dtype}");
        }
        let expected = |dtype: DataType| ElementError::Type { found: "a string", expected: dtype.name() };
        for (found, dtype) in
            [(named(DataType::Int32), DataType::Int32), (read(DataType::Fp32, &[4], text), DataType::Fp32)]
        {
            assert_eq!(found.unwrap_err(), DataError::Element { index: 0, error: expected(dtype) });
        }
    }
}
