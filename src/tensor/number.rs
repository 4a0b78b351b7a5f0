//! JSON numbers as the elements of tensors, exactly: what is no JSON number is refused, whoever has read the text before.
//!
//! An integer is taken where its value is one, however it is written (`2`, `2.0`, `2e0`), and refused where it has a
//! fraction or does not fit. FP32 and FP64 are the nearest value to the decimal text; FP16 and BF16 the nearest even to
//! that text's FP64. What would round to infinity is refused: JSON has no infinity. Pure.

use half::{bf16, f16};

use super::{DataType, Element};

pub(super) trait Number: Element {
    /// The JSON number that `text` begins with, and how many bytes it takes. What may follow it is the caller's to say.
    fn read(text: &[u8]) -> Result<(Self, usize), ElementError>;

    /// From one of the strings that stand for what JSON has no number for, quotes included. Integers have none.
    fn named(_token: &[u8]) -> Option<Self> {
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
            #[inline]
            fn read(text: &[u8]) -> Result<(Self, usize), ElementError> {
                if let Some(Decimal { negative, digits, fraction: 0, length }) = decimal(text) {
                    // Of at most [`AT_ONCE`] digits.
                    let value = if negative { -(digits as i64) } else { digits as i64 };
                    let value = Self::try_from(value).map_err(|_| ElementError::Range { dtype: Self::DTYPE })?;
                    return Ok((value, length));
                }
                rare(text)
            }
        }

        impl Rare for $rust {
            fn of(token: &str) -> Result<Self, ElementError> {
                let dtype = Self::DTYPE;
                let otherwise = || Self::try_from(integer(token, dtype)?).map_err(|_| ElementError::Range { dtype });
                token.parse().or_else(|_| otherwise())
            }
        })*
    };
}
integers!(u8, u16, u32, u64, i8, i16, i32, i64);

macro_rules! floats {
    ($($rust:ty, by $by:ty: $narrowed:expr, $exact:expr);* $(;)?) => {
        $(impl Number for $rust {
            #[inline]
            fn read(text: &[u8]) -> Result<(Self, usize), ElementError> {
                let exact: fn(f64) -> Option<$rust> = $exact;
                let read = decimal(text).and_then(|decimal| Some((exact(decimal.double()?)?, decimal.length)));
                match read {
                    Some(read) if read.0.is_finite() => Ok(read),
                    _ => rare(text),
                }
            }

            fn named(token: &[u8]) -> Option<Self> {
                match token {
                    br#""NaN""# => Some(Self::NAN),
                    br#""Infinity""# => Some(Self::INFINITY),
                    br#""-Infinity""# => Some(Self::NEG_INFINITY),
                    _ => None,
                }
            }
        }

        impl Rare for $rust {
            fn of(token: &str) -> Result<Self, ElementError> {
                let narrowed: fn($by) -> $rust = $narrowed;
                let read = fast_float2::parse::<$by, _>(token).ok().map(narrowed);
                read.filter(|value| value.is_finite()).ok_or(ElementError::Range { dtype: Self::DTYPE })
            }
        })*
    };
}
floats! {
    f32, by f32: |value| value, single;
    f64, by f64: |value| value, Some;
    f16, by f64: f16::from_f64, |value| Some(f16::from_f64(value));
    bf16, by f64: bf16::from_f64, |value| Some(bf16::from_f64(value));
}

/// The nearest single to a decimal number from the nearest double to it. `None` for a double in the middle between two
/// singles: on which side of it the number was has been lost. (Singles that are not normal have other middles, but no
/// [`Decimal`] is that small.)
#[inline]
fn single(double: f64) -> Option<f32> {
    const LOST: u32 = f64::MANTISSA_DIGITS - f32::MANTISSA_DIGITS;
    let lost = double.to_bits() & ((1 << LOST) - 1);
    (lost != 1 << (LOST - 1)).then_some(double as f32)
}

/// A number that is not written as nearly all are.
trait Rare: Number {
    /// From a whole JSON number.
    fn of(token: &str) -> Result<Self, ElementError>;
}

#[cold]
fn rare<T: Rare>(text: &[u8]) -> Result<(T, usize), ElementError> {
    let token = length(text).and_then(|length| std::str::from_utf8(&text[..length]).ok());
    let token = token.ok_or(ElementError::Type { found: "no JSON number", expected: T::DTYPE.name() })?;
    T::of(token).map(|value| (value, token.len()))
}

/// A JSON number as nearly all are written: without an exponent, of few digits. Its value is `digits` / 10^`fraction`.
struct Decimal {
    negative: bool,
    digits: u64,
    fraction: usize,
    length: usize,
}

impl Decimal {
    /// The nearest double: both numbers are exact as doubles, so that their quotient is rounded once.
    #[inline]
    fn double(&self) -> Option<f64> {
        if self.digits > 1 << f64::MANTISSA_DIGITS {
            return None;
        }
        // As an i64: for an unsigned number there is no instruction.
        let value = self.digits as i64 as f64 / POWERS[self.fraction] as i64 as f64;
        // The sign by its bit: a branch on it is foreseen half of the time.
        Some(f64::from_bits(value.to_bits() | u64::from(self.negative) << 63))
    }
}

/// Digits that are read at once.
const AT_ONCE: usize = 16;

/// 10^0 to 10^16, each of which is exact as a double, too.
const POWERS: [u64; AT_ONCE + 1] = {
    let mut powers = [1; AT_ONCE + 1];
    let mut i = 1;
    while i < powers.len() {
        powers[i] = powers[i - 1] * 10;
        i += 1;
    }
    powers
};

/// The number that `text` begins with, if it has no exponent, at most [`AT_ONCE`] digits, and enough bytes follow it to read ahead.
#[inline]
fn decimal(text: &[u8]) -> Option<Decimal> {
    let negative = *text.first()? == b'-';
    let start = usize::from(negative);
    let ahead: &[u8; AT_ONCE] = text.get(start..)?.first_chunk()?;
    // So often that where the fraction begins need not be computed before it is looked at.
    let one_digit = ahead[0].is_ascii_digit() && ahead[1] == b'.';
    let (whole, count) = if one_digit { (u64::from(ahead[0] - b'0'), 1) } else { digits(ahead) };
    let mut decimal = Decimal { negative, digits: whole, fraction: 0, length: start + count };
    let mut next = *text.get(decimal.length)?;
    if next == b'.' {
        let (part, fraction) = digits(text.get(decimal.length + 1..)?.first_chunk()?);
        if fraction == 0 || count + fraction > AT_ONCE {
            return None;
        }
        decimal.digits = whole.wrapping_mul(POWERS[fraction]).wrapping_add(part);
        decimal.fraction = fraction;
        decimal.length += 1 + fraction;
        next = *text.get(decimal.length)?;
    }
    // A number goes on, or begins as none does.
    let no_number = matches!(next, b'0'..=b'9' | b'e' | b'E' | b'.') || count == 0 || count > 1 && text[start] == b'0';
    (!no_number).then_some(decimal)
}

/// The value of the digits that `text` begins with, and how many of them there are. Branches on none of them, for how
/// many there are is not to be foreseen.
#[inline]
fn digits(text: &[u8; AT_ONCE]) -> (u64, usize) {
    const ZEROS: u128 = u128::from_le_bytes([b'0'; AT_ONCE]);
    // A byte of 10 or more overflows into its highest bit, and into bytes behind it only.
    const OVERFLOW: u128 = u128::from_le_bytes([0x80 - 10; AT_ONCE]);
    const HIGHEST: u128 = u128::from_le_bytes([0x80; AT_ONCE]);
    let digits = u128::from_le_bytes(*text) ^ ZEROS;
    let others = (digits.wrapping_add(OVERFLOW) | digits) & HIGHEST;
    let count = others.trailing_zeros() / 8;
    // The last digit to the end, zeros in front of the first.
    let digits = digits.checked_shl(128 - 8 * count).unwrap_or(0);
    let [front, back] = [digits as u64, (digits >> 64) as u64].map(eight_digits);
    (front.wrapping_mul(100_000_000).wrapping_add(back), count as usize)
}

/// The value of eight digits, the first of them in the lowest byte: pairs are added up, then pairs of pairs, then these.
#[inline]
fn eight_digits(digits: u64) -> u64 {
    const EVERY_OTHER_PAIR: u64 = 0x0000_00ff_0000_00ff;
    let pairs = digits.wrapping_mul(10).wrapping_add(digits >> 8);
    let front = (pairs & EVERY_OTHER_PAIR).wrapping_mul(100 + (1_000_000 << 32));
    let back = ((pairs >> 16) & EVERY_OTHER_PAIR).wrapping_mul(1 + (10_000 << 32));
    front.wrapping_add(back) >> 32
}

/// Bytes of the JSON number that `text` begins with, if it does with one.
fn length(text: &[u8]) -> Option<usize> {
    let digits = |from: usize| text[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let some_digits = |from: usize| Some(digits(from)).filter(|count| *count > 0);
    let start = usize::from(text.first() == Some(&b'-'));
    let mut at = start + some_digits(start)?;
    if at - start > 1 && text[start] == b'0' {
        return None;
    }
    if text.get(at) == Some(&b'.') {
        at += 1 + some_digits(at + 1)?;
    }
    if let Some(b'e' | b'E') = text.get(at) {
        let sign = usize::from(matches!(text.get(at + 1), Some(b'+' | b'-')));
        at += 1 + sign + some_digits(at + 1 + sign)?;
    }
    Some(at)
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
        for behind in ["", ",1", "]", " ,", "\n]", "\t", "\r\n", ",1.2345678901234567,2,-34567890123456]"] {
            let (read, longer) = (T::read(text.as_bytes()), T::read(format!("{text}{behind}").as_bytes()));
            assert_eq!(read.map(|(_, length)| length), longer.map(|(_, length)| length), "{text}{behind}");
            assert!(longer.is_err() || longer.is_ok_and(|(_, length)| length == text.len()), "{text}{behind}");
        }
        T::read(text.as_bytes()).map(|(value, _)| value)
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

    #[test]
    fn what_is_no_json_number_is_refused() {
        const MORE: &str = ",1.2345678901234567,2,-34567890123456]";
        for text in [
            "", "-", "--1", "+1", "01", "-01", "00.5", ".5", "-.5", "1.", "1.,", "1.e5", "1e", "1e+", "1.5E", "e1", "x",
        ] {
            for text in [text.to_string(), format!("{text}{MORE}")] {
                let text = text.as_bytes();
                assert!(f32::read(text).is_err() && f64::read(text).is_err(), "{text:?}");
                assert!(i32::read(text).is_err() && u64::read(text).is_err(), "{text:?}");
            }
        }
    }

    #[test]
    fn as_many_digits_are_read_as_there_are() {
        for count in 0..=16 {
            for behind in ["................", "\u{7f}///////////////", "::::::::::::::::", "éééééééé"] {
                let text = [&b"9876543210123456"[..count], behind.as_bytes()].concat();
                let expected = std::str::from_utf8(&text[..count]).unwrap().parse().unwrap_or(0);
                assert_eq!(digits(text.first_chunk().unwrap()), (expected, count), "{count} {behind}");
            }
        }
    }

    proptest! {
        #[test]
        fn integers_are_read_as_the_standard_library_does(value in any::<i64>(), shift in 0u32..64) {
            let value = value >> shift;
            prop_assert_eq!(one::<i64>(&value.to_string()).unwrap(), value);
            prop_assert_eq!(one::<i32>(&value.to_string()).ok(), i32::try_from(value).ok());
            prop_assert_eq!(one::<u8>(&value.to_string()).ok(), u8::try_from(value).ok());
        }

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
        assert!(f32::named(b"\"NaN\"").unwrap().is_nan() && bf16::named(b"\"NaN\"").unwrap().is_nan());
        assert_eq!(f64::named(b"\"Infinity\""), Some(f64::INFINITY));
        assert_eq!(f16::named(b"\"-Infinity\""), Some(f16::NEG_INFINITY));
        for text in ["\"nan\"", "\"inf\"", "\"1\"", "\"\"", "NaN", "\"+Infinity\""] {
            assert_eq!(f32::named(text.as_bytes()), None, "{text}");
        }
        assert_eq!(i8::named(b"\"NaN\""), None);
    }
}
