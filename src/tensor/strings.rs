//! `BYTES` elements: each a 4-byte little-endian length and that many bytes (`protocols.md` §1.2).

/// Bytes of the length in front of every element.
pub const PREFIX: usize = 4;

/// Iterates over the elements of a buffer that [`count`] has accepted; stops at the first malformed one otherwise.
pub fn iter(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = data;
    std::iter::from_fn(move || {
        let (element, after) = split_first(rest)?;
        rest = after;
        Some(element)
    })
}

/// Appends one element. Elements of 4 GiB and more have no encoding: `None`, and nothing is appended.
pub fn push(out: &mut Vec<u8>, element: &[u8]) -> Option<()> {
    let length = u32::try_from(element.len()).ok()?;
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(element);
    Some(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StringsError {
    #[error("element {index} is cut short: its length prefix or its bytes reach past the end of the data")]
    CutShort { index: usize },
    #[error("{found} or more elements, expected {expected}")]
    TooMany { found: usize, expected: usize },
    #[error("{found} elements, expected {expected}")]
    TooFew { found: usize, expected: usize },
}

/// Checks that the buffer holds exactly `expected` whole elements. Allocates nothing.
pub fn check(data: &[u8], expected: usize) -> Result<(), StringsError> {
    let mut rest = data;
    let mut found = 0;
    while !rest.is_empty() {
        if found == expected {
            return Err(StringsError::TooMany { found: found + 1, expected });
        }
        match split_first(rest) {
            Some((_, after)) => rest = after,
            None => return Err(StringsError::CutShort { index: found }),
        }
        found += 1;
    }
    if found < expected {
        return Err(StringsError::TooFew { found, expected });
    }
    Ok(())
}

/// Byte length of the first `elements` elements of a checked buffer.
pub(super) fn byte_length(data: &[u8], elements: usize) -> usize {
    iter(data).take(elements).map(|element| PREFIX + element.len()).sum()
}

fn split_first(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (prefix, rest) = data.split_first_chunk::<PREFIX>()?;
    let length = usize::try_from(u32::from_le_bytes(*prefix)).ok()?;
    (length <= rest.len()).then(|| rest.split_at(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_round_trip(elements in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let mut data = Vec::new();
            for element in &elements {
                push(&mut data, element).unwrap();
            }
            prop_assert_eq!(check(&data, elements.len()), Ok(()));
            prop_assert_eq!(iter(&data).map(<[u8]>::to_vec).collect::<Vec<_>>(), elements);
        }

        #[test]
        fn arbitrary_buffers_never_panic(data in proptest::collection::vec(any::<u8>(), 0..64), expected in 0usize..9) {
            let counted = iter(&data).count();
            if check(&data, expected).is_ok() {
                prop_assert_eq!(counted, expected);
            }
        }
    }

    #[test]
    fn malformed_buffers_say_what_is_wrong() {
        assert_eq!(check(&[1, 0, 0], 1), Err(StringsError::CutShort { index: 0 }));
        assert_eq!(check(&[0xff; 8], 1), Err(StringsError::CutShort { index: 0 }));
        assert_eq!(check(&[0; 8], 1), Err(StringsError::TooMany { found: 2, expected: 1 }));
        assert_eq!(check(&[0; 4], 2), Err(StringsError::TooFew { found: 1, expected: 2 }));
    }
}
