//! A tensor's elements one by one, for people, and as JSON text from which `tensor::json` makes another datatype.

use std::fmt::Write;

use half::{bf16, f16};

use crate::error::quoted;
use crate::tensor::json::{Data, DataError, ElementError, NotFinite};
use crate::tensor::{DataType, Tensor};

/// One element, widened without loss.
enum Element<'a> {
    Bool(bool),
    Integer(i128),
    Float(f64),
    Bytes(&'a [u8]),
}

/// `None` past the end. Of a BYTES tensor, those before are walked over.
fn element(tensor: &Tensor, index: usize) -> Option<Element<'_>> {
    macro_rules! little_endian {
        ($rust:ty) => {{
            let at = index.checked_mul(size_of::<$rust>())?;
            <$rust>::from_le_bytes(*tensor.data().get(at..)?.first_chunk()?)
        }};
    }
    Some(match tensor.dtype() {
        DataType::Bool => Element::Bool(*tensor.data().get(index)? != 0),
        DataType::Uint8 => Element::Integer(little_endian!(u8).into()),
        DataType::Uint16 => Element::Integer(little_endian!(u16).into()),
        DataType::Uint32 => Element::Integer(little_endian!(u32).into()),
        DataType::Uint64 => Element::Integer(little_endian!(u64).into()),
        DataType::Int8 => Element::Integer(little_endian!(i8).into()),
        DataType::Int16 => Element::Integer(little_endian!(i16).into()),
        DataType::Int32 => Element::Integer(little_endian!(i32).into()),
        DataType::Int64 => Element::Integer(little_endian!(i64).into()),
        DataType::Fp16 => Element::Float(little_endian!(f16).into()),
        DataType::Bf16 => Element::Float(little_endian!(bf16).into()),
        DataType::Fp32 => Element::Float(little_endian!(f32).into()),
        DataType::Fp64 => Element::Float(little_endian!(f64)),
        DataType::Bytes => Element::Bytes(tensor.strings().nth(index)?),
    })
}

/// As a person reads it: floats to six digits, text quoted and cut. Empty past the end.
pub(in crate::cli) fn shown(tensor: &Tensor, index: usize) -> String {
    match element(tensor, index) {
        None => String::new(),
        Some(Element::Bool(value)) => value.to_string(),
        Some(Element::Integer(value)) => value.to_string(),
        Some(Element::Float(value)) => number(value),
        Some(Element::Bytes(bytes)) => match std::str::from_utf8(bytes) {
            Ok(text) => format!("\"{}\"", quoted(text)),
            Err(_) => format!("{} bytes", bytes.len()),
        },
    }
}

/// Significant digits of a float.
const DIGITS: i32 = 6;

/// Short enough for a column, like C's `%g`.
pub(in crate::cli) fn number(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let scientific = format!("{value:.*e}", DIGITS as usize - 1);
    // Rust writes every finite float with an exponent.
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trimmed = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text.to_string(),
    };
    if (-4..DIGITS).contains(&exponent) {
        trimmed(&format!("{value:.*}", (DIGITS - 1 - exponent) as usize))
    } else {
        format!("{}e{exponent}", trimmed(mantissa))
    }
}

/// The elements as another datatype, by the rules for JSON: integers exactly or not at all, floats rounded.
pub(in crate::cli) fn converted(tensor: Tensor, dtype: DataType) -> Result<Tensor, DataError> {
    if tensor.dtype() == dtype {
        return Ok(tensor);
    }
    let mut text = String::from("[");
    for index in 0..tensor.shape().elements() {
        let separator = if index > 0 { "," } else { "" };
        // Writing to a string does not fail.
        let _ = match element(&tensor, index) {
            None => Ok(()),
            Some(Element::Bool(value)) => write!(text, "{separator}{value}"),
            Some(Element::Integer(value)) => write!(text, "{separator}{value}"),
            Some(Element::Float(value)) if value.is_nan() => write!(text, "{separator}\"NaN\""),
            Some(Element::Float(value)) if value.is_infinite() => {
                write!(text, "{separator}\"{}Infinity\"", if value < 0.0 { "-" } else { "" })
            }
            Some(Element::Float(value)) => write!(text, "{separator}{value:e}"),
            // At the first, as finding each would be to walk over those before.
            Some(Element::Bytes(_)) => {
                let error = ElementError::Type { found: "a string", expected: "a number" };
                return Err(DataError::Element { index, error });
            }
        };
    }
    text.push(']');
    Data::new(dtype, tensor.shape().clone(), &text)?.read(NotFinite::Named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Shape;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1"),
            (-2.5, "-2.5"),
            (0.99429274, "0.994293"),
            (0.00018724434, "0.000187244"),
            (1.6234637e-8, "1.62346e-8"),
            (123456.7, "123457"),
            (999999.9, "1e6"),
            (1234567.0, "1.23457e6"),
            (1e300, "1e300"),
            (0.1f32.into(), "0.1"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn elements_of_every_kind_are_shown() {
        let shape = |n| Shape::new([n]).unwrap();
        let ints = Tensor::from_vec(shape(2), vec![i64::MIN, 7]).unwrap();
        assert_eq!([shown(&ints, 0), shown(&ints, 1), shown(&ints, 2)], ["-9223372036854775808", "7", ""]);
        let half = Tensor::from_vec(shape(1), vec![bf16::from_f32(1.5)]).unwrap();
        assert_eq!(shown(&half, 0), "1.5");
        let bools = Tensor::new(DataType::Bool, shape(2), vec![1, 0].into()).unwrap();
        assert_eq!([shown(&bools, 0), shown(&bools, 1)], ["true", "false"]);
        let texts = Tensor::from_strings(shape(2), [&b"a\x1b[31m"[..], &[0xff, 0]]).unwrap();
        assert_eq!([shown(&texts, 0), shown(&texts, 1)], ["\"a\\u{1b}[31m\"", "2 bytes"]);
    }

    #[test]
    fn conversion_is_exact_or_refused() {
        let shape = || Shape::new([2]).unwrap();
        let floats = |values: [f64; 2]| Tensor::from_vec(shape(), values.to_vec()).unwrap();
        let to_f32 = converted(floats([0.1, f64::NEG_INFINITY]), DataType::Fp32).unwrap();
        assert_eq!(to_f32.to_vec::<f32>(), Some(vec![0.1, f32::NEG_INFINITY]));
        assert!(converted(floats([f64::NAN, 0.0]), DataType::Fp16).unwrap().to_vec::<f16>().unwrap()[0].is_nan());
        assert_eq!(converted(floats([2.0, -3e2]), DataType::Int32).unwrap().to_vec::<i32>(), Some(vec![2, -300]));
        assert!(converted(floats([2.5, 0.0]), DataType::Int32).is_err());
        assert!(converted(floats([1.0, 1e300]), DataType::Fp32).is_err());
        let integers = Tensor::from_vec(shape(), vec![i64::MAX, 300]).unwrap();
        assert!(converted(integers.clone(), DataType::Int32).is_err());
        assert!(converted(integers.clone(), DataType::Bytes).is_err());
        assert_eq!(converted(integers, DataType::Uint64).unwrap().to_vec::<u64>(), Some(vec![i64::MAX as u64, 300]));
        let text = Tensor::from_strings(shape(), ["1", "2"]).unwrap();
        assert!(converted(text, DataType::Int8).is_err());
        // So many that to look at more than the first would not end.
        let texts = Tensor::from_strings(Shape::new([1 << 21]).unwrap(), vec![""; 1 << 21]).unwrap();
        assert!(converted(texts, DataType::Fp32).is_err());
        let empty = Tensor::from_vec(Shape::new([0, 4]).unwrap(), Vec::<f64>::new()).unwrap();
        assert_eq!(converted(empty, DataType::Fp32).unwrap().shape().dims(), [0, 4]);
    }
}
