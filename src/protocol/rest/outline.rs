//! An infer request's JSON without the long arrays of numbers in it, for the JSON parser, which would go through each
//! digit only to find where they end.
//!
//! Cut out is what stands behind a name `"data"` from a bracket to the one that closes it, if there is no text between
//! them: whoever reads it must refuse what is no JSON. What is left is JSON exactly where the whole was, given that.
//! Pure.

use crate::protocol::common::MAX_INPUTS;

/// What is left of a text, and what was cut out.
pub(super) struct Outline<'a> {
    /// With an empty array in the place of each that was cut out.
    pub text: String,
    cuts: Vec<Cut<'a>>,
}

struct Cut<'a> {
    /// Where in the text that is left the empty array is.
    at: usize,
    array: &'a str,
}

/// The shortest array worth cutting out: to look for it takes longer than to parse a small request's.
const MIN_CUT: usize = 4 << 10;
/// The longest text that is copied. Where more is left, numbers are not what it is about.
const MAX_LEFT: usize = 64 << 10;

const NAME: &[u8] = b"\"data\"";

impl<'a> Outline<'a> {
    /// `None` where nothing is worth cutting out, or more than a request can have.
    pub fn of(text: &'a str) -> Option<Outline<'a>> {
        if text.len() < MIN_CUT {
            return None;
        }
        let bytes = text.as_bytes();
        let mut outline = Outline { text: String::new(), cuts: Vec::new() };
        // Up to where the text has been copied, and looked at.
        let (mut copied, mut at) = (0, 0);
        while let Some(quote) = bytes[at..].iter().take(MAX_LEFT).position(|byte| *byte == b'"') {
            at += quote;
            if at - copied > MAX_LEFT {
                return None;
            }
            let Some(start) = array_named_data(bytes, at) else {
                at += 1;
                continue;
            };
            at = start;
            let Some(length) = array_length(&bytes[start..]).filter(|length| *length >= MIN_CUT) else { continue };
            outline.text.push_str(&text[copied..start]);
            outline.cuts.push(Cut { at: outline.text.len(), array: &text[start..start + length] });
            outline.text.push_str("[]");
            (copied, at) = (start + length, start + length);
            if outline.cuts.len() > MAX_INPUTS || outline.text.len() > MAX_LEFT {
                return None;
            }
        }
        if outline.cuts.is_empty() || bytes.len() - copied > MAX_LEFT {
            return None;
        }
        outline.text.push_str(&text[copied..]);
        Some(outline)
    }

    pub fn arrays(&self) -> usize {
        self.cuts.len()
    }

    /// The array in whose place `part` is, which is a part of the outline's text: where it is says more than what it is,
    /// for clients may write empty arrays, too.
    pub fn array(&self, part: &str) -> Option<&'a str> {
        let at = (part.as_ptr() as usize).checked_sub(self.text.as_ptr() as usize)?;
        self.cuts.iter().find(|cut| cut.at == at).map(|cut| cut.array)
    }
}

/// Where the array begins whose name `"data"` begins at `quote`. What is before the quote says that it begins a text:
/// inside of one it would be escaped, and at the end of one no JSON would follow.
fn array_named_data(bytes: &[u8], quote: usize) -> Option<usize> {
    let behind = bytes[quote..].strip_prefix(NAME)?;
    let before = bytes[..quote].trim_ascii_end();
    before.last().filter(|byte| matches!(byte, b'{' | b','))?;
    let array = behind.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
    array.first().filter(|byte| **byte == b'[')?;
    Some(bytes.len() - array.len())
}

/// Up to the bracket that closes the one that `bytes` begin with. `None` where there is none, or a text before it.
fn array_length(bytes: &[u8]) -> Option<usize> {
    let mut depth = 0usize;
    for (i, part) in bytes.chunks(LOOKED_THROUGH).enumerate() {
        if !holds(part, |byte| matches!(byte, b'"' | b'[' | b']')) {
            continue;
        }
        for (j, byte) in part.iter().enumerate() {
            match byte {
                b'"' => return None,
                b'[' => depth += 1,
                b']' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return Some(i * LOOKED_THROUGH + j + 1);
            }
        }
    }
    None
}

/// Bytes that are looked through at once, to walk through those one by one in which something is found.
pub(super) const LOOKED_THROUGH: usize = 64;

/// Goes through all of `part`, which many bytes at a time is faster than to stop at the first.
#[inline]
pub(super) fn holds(part: &[u8], found: impl Fn(u8) -> bool) -> bool {
    part.iter().fold(false, |so_far, byte| so_far | found(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(length: usize) -> String {
        format!("[{}]", "1".repeat(length - 2))
    }

    #[test]
    fn long_arrays_named_data_are_cut_out() {
        let (long, nested) = (array(MIN_CUT), format!("[[{}], [1]]", "1".repeat(MIN_CUT)));
        for (text, left) in [
            (format!(r#"{{"data":{long}}}"#), r#"{"data":[]}"#),
            (format!("{{\"a\":1, \"data\" :\n{nested} }}"), "{\"a\":1, \"data\" :\n[] }"),
            (
                format!(r#"[{{"data":[]}},{{"data":{long}}},{{"data":{nested}}}]"#),
                r#"[{"data":[]},{"data":[]},{"data":[]}]"#,
            ),
        ] {
            let outline = Outline::of(&text).unwrap();
            assert_eq!(outline.text, left);
            let arrays: Vec<&str> = (0..left.len()).filter_map(|at| outline.array(&outline.text[at..])).collect();
            assert_eq!(arrays.len(), outline.arrays());
            assert!(arrays.iter().all(|array| *array == long || *array == nested));
            assert_eq!(outline.array(""), None);
        }
    }

    #[test]
    fn nothing_else_is() {
        let (long, short) = (array(MIN_CUT), array(MIN_CUT - 1));
        for text in [
            String::new(),
            format!(r#"{{"data":{short}}}"#),
            format!(r#"{{"Data":{long}}}"#),
            format!(r#"{{"data":[{long}"#),
            format!(r#"{{"data":[{long},""]}}"#),
            format!(r#"{{"data",{long}}}"#),
            format!(r#"{{"a":"\"data\":{long}"}}"#),
            format!(r#"{{"a\\"data":{long}}}"#),
            format!(r#"{{"data":{long},{}"#, " ".repeat(MAX_LEFT)),
            format!(r#"{{{}"data":{long}}}"#, " ".repeat(MAX_LEFT + 1)),
            format!(r#"{{{}"data":{long}}}"#, "\"\",".repeat(MAX_LEFT)),
            format!(r#"{{"x":[{}{{"data":{long}}}]}}"#, r#"{"data":[1]},"#.repeat(MAX_LEFT)),
            vec![format!(r#"{{"data":{long}}}"#); MAX_INPUTS + 1].join(","),
        ] {
            assert!(Outline::of(&text).is_none(), "{text:.100}");
        }
    }
}
