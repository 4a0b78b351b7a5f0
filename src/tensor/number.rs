//! JSON numbers as the elements of tensors, exactly.
//!
//! An integer is taken where its value is one, however it is written (`2`, `2.0`, `2e0`), and refused where it has a
//! fraction or does not fit. FP32 and FP64 are the nearest value to the decimal text; FP16 and BF16 the nearest even to
//! that text's FP64. What would round to infinity is refused: JSON has no infinity. Pure.

use half::{bf16, f16};

use super::{DataType, Element};

pub(super) trait Number: Element {
    /// The JSON number that `text` begins with, and how many bytes it takes.
    fn read(text: &str) -> Result<(Self, usize), ElementError>;

    /// From one of the strings that stand for what JSON has no number for, quotes included. Integers have none.
    fn named(_token: &str) -> Option<Self> {
        None
    }
}

/// Why an element was refused: what was found, and what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElementError {
    #[error("{found}, expected {expected}")]
    Type { found: &'static str, expected: &'static str },
    #[error("a number out of range, expected {dtype}")]
    Range { dtype: DataType },
    #[error("a number with a fraction, expected {dtype}")]
    Fraction { dtype: DataType },
    #[error("a string with half a surrogate pair, expected Unicode")]
    Escape,
    #[error("a string of 4 GiB or more, expected a shorter one")]
    TooLong,
}

macro_rules! integers {
    ($($rust:ty),*) => {
        $(impl Number for $rust {
            fn read(text: &str) -> Result<(Self, usize), ElementError> {
                let dtype = Self::DTYPE;
                let token = &text[..end(text.as_bytes()).unwrap_or(text.len())];
                // Plain digits, which is nearly always; the rest is rare enough to be slow.
                if let Ok(value) = token.parse() {
                    return Ok((value, token.len()));
                }
                let value = Self::try_from(integer(token, dtype)?).map_err(|_| ElementError::Range { dtype })?;
                Ok((value, token.len()))
            }
        })*
    };
}
integers!(u8, u16, u32, u64, i8, i16, i32, i64);

macro_rules! floats {
    ($($rust:ty, by $by:ty: $narrowed:expr);* $(;)?) => {
        $(impl Number for $rust {
            fn read(text: &str) -> Result<(Self, usize), ElementError> {
                let narrowed: fn($by) -> $rust = $narrowed;
                // A JSON number is a number here, too, and ends where it does there.
                let read = fast_float2::parse_partial::<$by, _>(text).ok();
                let read = read.map(|(value, length)| (narrowed(value), length));
                read.filter(|(value, _)| value.is_finite()).ok_or(ElementError::Range { dtype: Self::DTYPE })
            }

            fn named(token: &str) -> Option<Self> {
                let known = matches!(token, r#""NaN""# | r#""Infinity""# | r#""-Infinity""#);
                if known { token.trim_matches('"').parse().ok() } else { None }
            }
        })*
    };
}
floats! {
    f32, by f32: |value| value;
    f64, by f64: |value| value;
    f16, by f64: f16::from_f64;
    bf16, by f64: bf16::from_f64;
}

/// Where the number, `true`, `false` or `null` ends that `text` begins with, if anything follows it.
pub(super) fn end(text: &[u8]) -> Option<usize> {
    text.iter().position(|byte| matches!(byte, b',' | b']' | b' ' | b'\n' | b'\r' | b'\t'))
}

/// The most digits an integer of interest has: 2^64 has 20.
const MAX_DIGITS: usize = 20;

/// The value of a JSON number that is whole, however written, in time linear in its length.
fn integer(token: &str, dtype: DataType) -> Result<i128, ElementError> {
    let (negative, token) = token.strip_prefix('-').map_or((false, token), |rest| (true, rest));
    let (mantissa, exponent) = token.split_once(['e', 'E']).unwrap_or((token, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = [whole, fraction].concat();
    let digits = digits.trim_start_matches('0');
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return Ok(0);
    }
    // The value is the significant digits × 10^scale.
    let zeros = digits.len() - significant.len();
    let scale = power(exponent) + zeros as i64 - fraction.len() as i64;
    let Ok(scale) = u32::try_from(scale) else {
        return Err(if scale < 0 { ElementError::Fraction { dtype } } else { ElementError::Range { dtype } });
    };
    if significant.len() + scale as usize > MAX_DIGITS {
        return Err(ElementError::Range { dtype });
    }
    let value = significant.bytes().fold(0, |value, digit| value * 10 + i128::from(digit - b'0'));
    let value = value * 10i128.pow(scale);
    Ok(if negative { -value } else { value })
}

/// A JSON exponent, held to a range in which sums cannot overflow.
fn power(exponent: &str) -> i64 {
    const LIMIT: i64 = 1 << 40;
    let (negative, digits) = match exponent.as_bytes() {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        digits => (false, digits),
    };
    let value = digits.iter().fold(0i64, |value, digit| (value * 10 + i64::from(digit - b'0')).min(LIMIT));
    if negative { -value } else { value }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one<T: Number>(text: &str) -> Result<T, ElementError> {
        for behind in ["", ",1", "]", " ,", "\n]", "\t", "\r\n"] {
            let (read, longer) = (T::read(text), T::read(&format!("{text}{behind}")));
            assert_eq!(read.map(|(_, length)| length), longer.map(|(_, length)| length), "{text}{behind}");
            assert!(longer.is_err() || longer.is_ok_and(|(_, length)| length == text.len()), "{text}{behind}");
        }
        T::read(text).map(|(value, _)| value)
    }

    #[test]
    fn integers_are_exact_however_they_are_written() {
        for (text, value) in [
            ("9007199254740993", 9_007_199_254_740_993),
            ("9007199254740993.0", 9_007_199_254_740_993),
            ("-9223372036854775808", i64::MIN),
            ("9223372036854775807e0", i64::MAX),
            ("1e3", 1000),
            ("1.5e1", 15),
            ("0.0001E+4", 1),
            ("1200e-2", 12),
            ("-0", 0),
            ("-0.0", 0),
            ("0e99999999999999999999", 0),
        ] {
            assert_eq!(one::<i64>(text).unwrap(), value, "{text}");
        }
        assert_eq!(one::<u64>("18446744073709551615").unwrap(), u64::MAX);
        assert_eq!(one::<u64>("18446744073709551615.000").unwrap(), u64::MAX);
        assert_eq!(one::<u8>("-0").unwrap(), 0);
        assert_eq!(one::<i8>("-1.28e2").unwrap(), -128);
    }

    #[test]
    fn integers_that_do_not_fit_are_refused() {
        for text in ["9223372036854775808", "-9223372036854775809", "1e19", "1e400", "1e99999999999999999999"] {
            assert_eq!(one::<i64>(text), Err(ElementError::Range { dtype: DataType::Int64 }), "{text}");
        }
        for text in ["1.5", "1e-1", "15e-1", "0.1", "1e-99999999999999999999", "123456789012345678901234567890.5"] {
            assert_eq!(one::<i64>(text), Err(ElementError::Fraction { dtype: DataType::Int64 }), "{text}");
        }
        assert!(one::<u64>("18446744073709551616").is_err() && one::<u64>("-1").is_err());
        assert!(one::<u8>("300").is_err() && one::<i8>("128").is_err() && one::<u32>("-1").is_err());
        assert!(one::<i64>(&"9".repeat(1_000_000)).is_err());
        assert!(one::<i64>(&format!("1e{}", "9".repeat(1_000_000))).is_err());
    }

    #[test]
    fn floats_are_the_nearest_and_never_infinite() {
        assert_eq!(one::<f32>("16777217").unwrap(), 16_777_216.0);
        // Between two floats, a hair above the middle: by way of a double it would round down.
        assert_eq!(one::<f32>("1.00000005960464477540").unwrap(), 1.000_000_1);
        assert_eq!(one::<f32>("-0").unwrap().to_bits(), (-0.0f32).to_bits());
        assert_eq!(one::<f64>("0.1").unwrap(), 0.1);
        assert_eq!(one::<f16>("65504").unwrap(), f16::MAX);
        assert_eq!(one::<f16>("2049").unwrap(), f16::from_f32(2048.0));
        assert_eq!(one::<bf16>("1.00390625").unwrap(), bf16::from_f32(1.0));
        for text in ["1e39", "-1e39", "1e999", "1E400"] {
            assert!(one::<f32>(text).is_err(), "{text}");
        }
        assert!(one::<f64>("1e999").is_err() && one::<f16>("65520").is_err() && one::<bf16>("3.4e38").is_err());
        assert!(one::<f64>(&format!("0.{}", "1".repeat(1_000_000))).is_ok());
        assert!(one::<f64>(&format!("1e{}", "9".repeat(1_000_000))).is_err());
    }

    proptest! {
        #[test]
        fn floats_are_read_as_the_standard_library_does(
            text in r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?",
            bits in any::<u32>(), wide in any::<u64>(), digits in 0usize..900,
        ) {
            // What was written from a float, the middle between it and the next one, and more digits than anybody needs.
            let (value, double) = (f32::from_bits(bits), f64::from_bits(wide));
            let middle = (f64::from(value) + f64::from(f32::from_bits(bits.wrapping_add(1)))) / 2.0;
            let long = format!("{text}{}", if text.contains(['e', 'E', '.']) { String::new() } else { format!(".{}", "7".repeat(digits + 1)) });
            let written = [value.to_string(), format!("{middle:.60}"), format!("{middle:e}"), double.to_string()];
            for text in written.into_iter().chain([text, long]).filter(|text| !text.contains(['N', 'f'])) {
                let (single, double): (f32, f64) = (text.parse().unwrap(), text.parse().unwrap());
                let expected = single.is_finite().then_some(single.to_bits());
                prop_assert_eq!(one::<f32>(&text).ok().map(f32::to_bits), expected, "{}", &text);
                let expected = double.is_finite().then_some(double.to_bits());
                prop_assert_eq!(one::<f64>(&text).ok().map(f64::to_bits), expected, "{}", &text);
            }
        }
    }

    #[test]
    fn floats_have_three_names_and_integers_none() {
        assert!(f32::named("\"NaN\"").unwrap().is_nan() && bf16::named("\"NaN\"").unwrap().is_nan());
        assert_eq!(f64::named("\"Infinity\""), Some(f64::INFINITY));
        assert_eq!(f16::named("\"-Infinity\""), Some(f16::NEG_INFINITY));
        for text in ["\"nan\"", "\"inf\"", "\"1\"", "\"\"", "NaN", "\"+Infinity\""] {
            assert_eq!(f32::named(text), None, "{text}");
        }
        assert_eq!(i8::named("\"NaN\""), None);
    }
}
