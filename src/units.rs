//! Durations and sizes as people write them in configuration: `"2ms"`, `"64MiB"`. A bare number is refused, because
//! it leaves the unit to guesswork; `0` alone needs none.

use std::time::Duration;

const DURATIONS: [(&str, u64); 5] =
    [("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000), ("m", 60_000_000_000), ("h", 3_600_000_000_000)];

const SIZES: [(&str, u64); 7] = [
    ("B", 1),
    ("kB", 1_000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
];

/// What [`parse_duration`] takes, for error messages.
pub const DURATION_FORM: &str = "a duration like \"250us\", \"2ms\", \"1.5s\", \"10m\" or \"0\"";
/// What [`parse_size`] takes, for error messages.
pub const SIZE_FORM: &str = "a size like \"512KiB\", \"64MiB\", \"1GB\" or \"0\"";

pub fn parse_duration(text: &str) -> Option<Duration> {
    scaled(text, &DURATIONS).map(Duration::from_nanos)
}

/// In bytes.
pub fn parse_size(text: &str) -> Option<usize> {
    scaled(text, &SIZES).and_then(|bytes| usize::try_from(bytes).ok())
}

/// Digits after the point; more say nothing in any unit here.
const MAX_FRACTION_DIGITS: usize = 18;

/// The number times its unit, rounded down; `None` for anything malformed, negative, or too large.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    if text == "0" {
        return Some(0);
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(end);
    let (_, scale) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > MAX_FRACTION_DIGITS || number.ends_with('.') {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let places = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    u64::try_from(digits.checked_mul(u128::from(*scale))? / places).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write() {
        for (text, millis) in [("2ms", 2), ("1.5s", 1500), ("10m", 600_000), ("0", 0), ("1 s", 1000), ("1h", 3_600_000)]
        {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(parse_duration("250us"), Some(Duration::from_micros(250)));
        for (text, bytes) in [("64MiB", 64 << 20), ("1kB", 1000), ("0", 0), ("1.5KiB", 1536)] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn what_they_should_not() {
        for bad in ["", "5", "-1s", "s", "1 fortnight", "1.2.3s", "99999999999999999999s", "9999999999h", "1S", "٣s"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
        for bad in ["64", "64mib", "-1B", "20000000000GiB"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }
}
