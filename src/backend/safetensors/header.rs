//! The header of one safetensors file: an 8-byte little-endian length, then JSON that names every tensor with its
//! datatype, shape and place.
//!
//! Nothing of the file is believed: the header's length is bounded before it is read, names are unique, every tensor's
//! place is as long as its shape says, and the places cover the rest of the file without gap or overlap.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::error::quoted;
use crate::tensor::{DataType, Shape};

/// The longest header, in bytes.
pub const MAX_HEADER_BYTES: u64 = 8 << 20;
/// The most tensors of one file.
pub const MAX_TENSORS: usize = 100_000;
/// The length in front of the header.
const PREFIX_BYTES: u64 = 8;
const METADATA: &str = "__metadata__";

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub dtype: DataType,
    pub dims: Vec<usize>,
    /// Of its first byte in the file.
    pub offset: u64,
    pub bytes: usize,
}

/// What the header of a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub tensors: BTreeMap<String, Stored>,
    /// `pt` where PyTorch wrote the file.
    pub format: Option<String>,
}

/// Reads the header of a file of `length` bytes. The error says what is wrong with the file.
pub fn read(mut file: impl Read, length: u64) -> Result<Header, String> {
    let mut prefix = [0; PREFIX_BYTES as usize];
    if length < PREFIX_BYTES || file.read_exact(&mut prefix).is_err() {
        return Err(format!("{length} bytes, expected at least the {PREFIX_BYTES} of a header's length"));
    }
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(format!("a header of {header_bytes} bytes, expected at most {MAX_HEADER_BYTES}"));
    }
    let begin = PREFIX_BYTES + header_bytes;
    if begin > length {
        return Err(format!("{length} bytes, expected the {begin} that its header takes"));
    }
    // Bounded above: at most MAX_HEADER_BYTES.
    let mut text = vec![0; header_bytes as usize];
    file.read_exact(&mut text).map_err(|error| format!("its header cannot be read: {error}"))?;
    let entries: Entries = serde_json::from_slice(&text).map_err(|error| format!("its header is wrong: {error}"))?;
    Ok(Header { tensors: places(entries.tensors, begin, length)?, format: entries.format })
}

/// The tensors as the file lays them out.
fn places(entries: BTreeMap<String, Entry>, begin: u64, length: u64) -> Result<BTreeMap<String, Stored>, String> {
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let stored = entry.place(begin).map_err(|reason| format!("tensor `{}`: {reason}", quoted(&name)))?;
        tensors.insert(name, stored);
    }
    let mut in_order: Vec<(&String, &Stored)> = tensors.iter().collect();
    in_order.sort_by_key(|(_, stored)| (stored.offset, stored.bytes));
    let mut end = begin;
    for (name, stored) in in_order {
        if stored.offset != end {
            let relation = if stored.offset < end { "overlaps the one before it" } else { "leaves a gap before it" };
            return Err(format!("tensor `{}` {relation}", quoted(name)));
        }
        end += stored.bytes as u64;
    }
    if end != length {
        return Err(format!("{length} bytes, expected the {end} that its header describes"));
    }
    Ok(tensors)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl Entry {
    fn place(self, begin: u64) -> Result<Stored, String> {
        let dtype = datatype(&self.dtype).ok_or_else(|| {
            format!("datatype `{}`, expected one of {}", quoted(&self.dtype), NAMES.map(|(name, _)| name).join(", "))
        })?;
        let dims: Option<Vec<usize>> = self.shape.iter().map(|dim| usize::try_from(*dim).ok()).collect();
        let dims = dims.ok_or("a dimension that no memory can hold")?;
        let shape = Shape::new(dims).map_err(|error| error.to_string())?;
        // Every datatype of a file has a size, and a shape's elements times the widest fit.
        let bytes = shape.elements() * dtype.size().unwrap_or(0);
        let [from, to] = self.data_offsets;
        if to.checked_sub(from) != Some(bytes as u64) {
            return Err(format!("offsets {from} to {to}, expected {bytes} bytes for {dtype} {shape}"));
        }
        let offset = begin.checked_add(from).filter(|offset| offset.checked_add(bytes as u64).is_some());
        let offset = offset.ok_or_else(|| format!("offset {from}, expected a place in the file"))?;
        Ok(Stored { dtype, dims: shape.dims().to_vec(), offset, bytes })
    }
}

/// The format's names of the datatypes that this server has.
const NAMES: [(&str, DataType); 13] = [
    ("BOOL", DataType::Bool),
    ("U8", DataType::Uint8),
    ("I8", DataType::Int8),
    ("U16", DataType::Uint16),
    ("I16", DataType::Int16),
    ("U32", DataType::Uint32),
    ("I32", DataType::Int32),
    ("U64", DataType::Uint64),
    ("I64", DataType::Int64),
    ("F16", DataType::Fp16),
    ("BF16", DataType::Bf16),
    ("F32", DataType::Fp32),
    ("F64", DataType::Fp64),
];

fn datatype(name: &str) -> Option<DataType> {
    NAMES.into_iter().find(|(known, _)| *known == name).map(|(_, dtype)| dtype)
}

/// The JSON object, read key by key: a repeated name would mean two things to two readers.
struct Entries {
    tensors: BTreeMap<String, Entry>,
    format: Option<String>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Entries, M::Error> {
                let mut entries = Entries { tensors: BTreeMap::new(), format: None };
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        let mut metadata: BTreeMap<String, String> = map.next_value()?;
                        entries.format = metadata.remove("format");
                        continue;
                    }
                    if entries.tensors.len() == MAX_TENSORS {
                        return Err(M::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let entry = map.next_value()?;
                    if entries.tensors.insert(name.clone(), entry).is_some() {
                        return Err(M::Error::custom(format!("tensor `{}` is there twice", quoted(&name))));
                    }
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file of that header and so many bytes after it.
    pub fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend((0..data).map(|i| i as u8));
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Header, String> {
        read(bytes, bytes.len() as u64)
    }

    fn refusal(bytes: &[u8]) -> String {
        parse(bytes).unwrap_err()
    }

    #[test]
    fn tensors_are_found_where_they_lie() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
                         "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
                         "empty":{"dtype":"I64","shape":[0,7],"data_offsets":[4,4]}}  "#;
        let found = parse(&file(header, 16)).unwrap();
        let begin = 8 + header.len() as u64;
        assert_eq!(found.format.as_deref(), Some("pt"));
        assert_eq!(
            found.tensors["b"],
            Stored { dtype: DataType::Bf16, dims: vec![2, 3], offset: begin + 4, bytes: 12 }
        );
        assert_eq!((found.tensors["a"].dims.len(), found.tensors["empty"].bytes), (0, 0));
    }

    #[test]
    fn lengths_that_lie_are_refused_before_anything_is_allocated() {
        let with_length = |n: u64| [&n.to_le_bytes()[..], b"{}"].concat();
        assert!(refusal(b"").contains("0 bytes"));
        assert!(refusal(&[0; 7]).contains("7 bytes"));
        assert!(refusal(&with_length(0)).contains("header is wrong"));
        assert!(refusal(&with_length(1)).contains("header is wrong"));
        assert!(refusal(&with_length(3)).contains("10 bytes, expected the 11"));
        for lie in [1 << 63, u64::MAX, 100_000_001, MAX_HEADER_BYTES + 1] {
            assert!(refusal(&with_length(lie)).contains("expected at most 8388608"), "{lie}");
        }
        let nine_mebibytes = file(&format!("{{}}{}", " ".repeat(9 << 20)), 0);
        assert!(refusal(&nine_mebibytes).contains("a header of 9437186 bytes"));
        assert_eq!(parse(&file("{}", 0)), Ok(Header::default()));
    }

    #[test]
    fn places_cover_the_file_once() {
        let two = |a: &str, b: &str, data| {
            let tensor = |offsets: &str| format!(r#"{{"dtype":"U8","shape":[4],"data_offsets":[{offsets}]}}"#);
            refusal(&file(&format!(r#"{{"a":{},"b":{}}}"#, tensor(a), tensor(b)), data))
        };
        assert_eq!(two("0,4", "2,6", 6), "tensor `b` overlaps the one before it");
        assert_eq!(two("0,4", "0,4", 4), "tensor `b` overlaps the one before it");
        assert_eq!(two("0,4", "5,9", 9), "tensor `b` leaves a gap before it");
        assert_eq!(two("1,5", "5,9", 9), "tensor `a` leaves a gap before it");
        assert!(two("0,4", "4,8", 7).contains("expected the "));
        assert!(two("0,4", "4,8", 9).contains("expected the "));
        assert_eq!(two("4,0", "4,8", 8), "tensor `a`: offsets 4 to 0, expected 4 bytes for UINT8 [4]");
        assert!(two("0,5", "5,9", 9).contains("offsets 0 to 5, expected 4 bytes"));
        assert!(two("18446744073709551611,18446744073709551615", "0,4", 4).contains("expected a place in the file"));
    }

    #[test]
    fn what_a_header_may_not_say() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            refusal(&file(&format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#), 4))
        };
        assert!(one("F4", "[1]", "[0,4]").contains("datatype `F4`, expected one of BOOL"));
        assert!(one("F32", "[4294967296,4294967296]", "[0,4]").contains("more elements than memory"));
        assert!(one("F32", "[18446744073709551615]", "[0,4]").contains("more elements than memory"));
        assert!(one("F32", "[-1]", "[0,4]").contains("header is wrong"));
        assert!(one("F32", &format!("[{}1]", "1,".repeat(17)), "[0,4]").contains("18 dimensions"));
        assert!(one("F32", "[1]", "[0]").contains("header is wrong"));
        let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        let twice = file(&format!(r#"{{"a":{entry},"a":{entry}}}"#), 4);
        assert!(refusal(&twice).contains("tensor `a` is there twice"));
        let extra = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}}"#;
        assert!(refusal(&file(extra, 4)).contains("unknown field"));
        assert!(refusal(&file("[1]", 0)).contains("an object of tensors"));
        let many: Vec<String> = (0..=MAX_TENSORS).map(|i| format!(r#""{i}":{entry}"#)).collect();
        assert!(refusal(&file(&format!("{{{}}}", many.join(",")), 4)).contains("more than 100000 tensors"));
    }

    proptest! {
        #[test]
        fn no_file_panics(text in "[\\PC]{0,80}", data in proptest::collection::vec(any::<u8>(), 0..40), lie in any::<u64>()) {
            let _ = parse(&file(&text, data.len()));
            let _ = parse(&data);
            let _ = parse(&[&lie.to_le_bytes()[..], &data].concat());
        }
    }

    #[test]
    fn no_flipped_bit_panics() {
        let whole = file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8);
        for offset in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[offset] ^= 1 << bit;
                let _ = parse(&flipped);
            }
            let _ = parse(&whole[..offset]);
        }
    }
}
