//! NumPy's `.npy` files, versions 1 to 3: one array in row-major order (NEP 1, numpy.lib.format).
//!
//! By hand, as what of the format is a tensor takes these lines, and the crates for it bring a grammar of Python
//! literals and big numbers. Pure. The header is bounded, and the data must be as long as it says.

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;

use crate::error::quoted;
use crate::tensor::{DataType, Shape, Tensor};

const MAGIC: &[u8] = b"\x93NUMPY";

/// Longest header, in bytes; what arrays without fields have is far shorter.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// Strings of an array whose strings take no bytes, so that the file's length does not bound them.
const MAX_EMPTY_STRINGS: usize = 1 << 20;

pub(in crate::cli) fn is_npy(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

/// The array. `bool`, integers, `float16` to `float64`, `bytes_` and `str_` have a datatype each; elements of two
/// opaque bytes are BF16, as `ml_dtypes` saves it.
pub(in crate::cli) fn read(file: Bytes) -> Result<Tensor> {
    let (header, data) = split(&file)?;
    let descr = string(value(header, "descr")?)?;
    let shape = shape(value(header, "shape")?)?;
    if value(header, "fortran_order")?.starts_with("True") && shape.rank() > 1 {
        bail!("the array is in column-major order, expected row-major: save numpy.ascontiguousarray(array)");
    }
    let (order, kind) = descr.split_at_checked(1).ok_or_else(|| unknown(descr))?;
    let (kind, size) = kind.split_at_checked(1).ok_or_else(|| unknown(descr))?;
    let size: usize = size.parse().map_err(|_| unknown(descr))?;
    let swapped = match order {
        "<" | "|" => false,
        ">" => true,
        _ => return Err(unknown(descr)),
    };
    let data = file.slice(data..);
    match (kind, size) {
        ("S", _) => return strings(&data, shape, size, |element| Ok(without_padding(element, 1).to_vec())),
        ("U", _) => return strings(&data, shape, size.saturating_mul(4), |element| text(element, swapped)),
        _ => {}
    }
    let dtype = match (kind, size) {
        ("b", 1) => DataType::Bool,
        ("i", 1) => DataType::Int8,
        ("i", 2) => DataType::Int16,
        ("i", 4) => DataType::Int32,
        ("i", 8) => DataType::Int64,
        ("u", 1) => DataType::Uint8,
        ("u", 2) => DataType::Uint16,
        ("u", 4) => DataType::Uint32,
        ("u", 8) => DataType::Uint64,
        ("f", 2) => DataType::Fp16,
        ("f", 4) => DataType::Fp32,
        ("f", 8) => DataType::Fp64,
        ("V", 2) => DataType::Bf16,
        _ => return Err(unknown(descr)),
    };
    let data =
        if swapped { data.chunks(size).flat_map(|element| element.iter().rev().copied()).collect() } else { data };
    Tensor::new(dtype, shape, data).context("the .npy file is not whole")
}

fn unknown(descr: &str) -> anyhow::Error {
    anyhow!("the array's dtype is '{}', expected booleans, integers, floats or strings", quoted(descr))
}

/// The header's text, and where the data begins.
fn split(file: &[u8]) -> Result<(&str, usize)> {
    let cut = || anyhow!("the .npy file ends in its header");
    let rest = file.get(MAGIC.len()..).ok_or_else(cut)?;
    let ([major, _], rest) = rest.split_first_chunk().ok_or_else(cut)?;
    let (length, rest) = match major {
        1 => rest.split_first_chunk().map(|(length, rest)| (u16::from_le_bytes(*length).into(), rest)),
        2 | 3 => rest.split_first_chunk().map(|(length, rest)| (u32::from_le_bytes(*length), rest)),
        other => bail!("the .npy file has format version {other}, expected 1, 2 or 3"),
    }
    .ok_or_else(cut)?;
    let length = usize::try_from(length).ok().filter(|length| *length <= MAX_HEADER_BYTES);
    let length = length.ok_or_else(|| anyhow!("the .npy file's header is over {MAX_HEADER_BYTES} bytes"))?;
    let header = rest.get(..length).ok_or_else(cut)?;
    let header = std::str::from_utf8(header).context("the .npy file's header is not text")?;
    Ok((header, file.len() - rest.len() + length))
}

/// What follows a key of the header's Python dictionary. Keys stand in front of any text that could look like one:
/// only the names of fields could, and arrays with fields are refused by their `descr`, which is the first key.
fn value<'a>(header: &'a str, key: &str) -> Result<&'a str> {
    let found = ["'", "\""].iter().find_map(|quote| header.split_once(&format!("{quote}{key}{quote}")));
    let value = found.and_then(|(_, after)| after.trim_start().strip_prefix(':'));
    Ok(value.ok_or_else(|| anyhow!("the .npy file's header has no `{key}`"))?.trim_start())
}

fn string(value: &str) -> Result<&str> {
    let quote = value.chars().next().filter(|c| matches!(c, '\'' | '"'));
    let inner = quote.and_then(|quote| value[1..].split_once(quote));
    Ok(inner.ok_or_else(|| anyhow!("the array has fields, expected plain elements"))?.0)
}

fn shape(value: &str) -> Result<Shape> {
    let unclear = || anyhow!("the .npy file's shape is '{}', expected a tuple of numbers", quoted(value));
    let inner = value.strip_prefix('(').and_then(|value| value.split_once(')')).ok_or_else(unclear)?.0;
    let dims = inner.split(',').map(str::trim).filter(|dim| !dim.is_empty());
    let dims: Vec<usize> = dims.map(|dim| dim.parse().map_err(|_| unclear())).collect::<Result<_>>()?;
    Ok(Shape::new(dims)?)
}

fn strings(data: &[u8], shape: Shape, size: usize, element: impl Fn(&[u8]) -> Result<Vec<u8>>) -> Result<Tensor> {
    let expected = shape.elements().checked_mul(size);
    if expected != Some(data.len()) {
        bail!("the .npy file is not whole: {} bytes of data for {} strings of {size}", data.len(), shape.elements());
    }
    let elements: Vec<Vec<u8>> = match size {
        // Nothing but the header says how many there are.
        0 if shape.elements() > MAX_EMPTY_STRINGS => {
            bail!("the array has {} empty strings, expected at most {MAX_EMPTY_STRINGS}", shape.elements())
        }
        0 => vec![Vec::new(); shape.elements()],
        _ => data.chunks(size).map(element).collect::<Result<_>>()?,
    };
    Ok(Tensor::from_strings(shape, elements)?)
}

/// Without the zeros, each of `unit` bytes, that fill an element up.
fn without_padding(element: &[u8], unit: usize) -> &[u8] {
    let kept = element.chunks(unit).rposition(|code| code.iter().any(|byte| *byte != 0)).map_or(0, |last| last + 1);
    &element[..kept * unit]
}

/// UTF-32 to UTF-8.
fn text(element: &[u8], big_endian: bool) -> Result<Vec<u8>> {
    let (codes, _) = without_padding(element, 4).as_chunks();
    let code = |code: &[u8; 4]| if big_endian { u32::from_be_bytes(*code) } else { u32::from_le_bytes(*code) };
    let text: Option<String> = codes.iter().map(|bytes| char::from_u32(code(bytes))).collect();
    Ok(text.ok_or_else(|| anyhow!("a string of the array is not Unicode"))?.into_bytes())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A file of format 1 as NumPy writes it.
    pub fn file(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        with_header(1, &format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"), data)
    }

    fn with_header(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let length = u32::try_from(header.len()).unwrap().to_le_bytes();
        let length = if version == 1 { &length[..2] } else { &length[..] };
        [MAGIC, &[version, 0], length, header.as_bytes(), data].concat()
    }

    fn read(file: Vec<u8>) -> Result<Tensor> {
        super::read(file.into())
    }

    #[test]
    fn every_datatype_is_read_in_both_byte_orders() {
        for (descr, dtype, data) in [
            ("|b1", DataType::Bool, &[1, 0][..]),
            ("|u1", DataType::Uint8, &[1, 2]),
            ("|i1", DataType::Int8, &[1, 0xff]),
            ("<u2", DataType::Uint16, &[1, 2, 3, 4]),
            ("<i2", DataType::Int16, &[1, 2, 3, 4]),
            ("<u4", DataType::Uint32, &[1, 2, 3, 4, 5, 6, 7, 8]),
            ("<i4", DataType::Int32, &[1, 2, 3, 4, 5, 6, 7, 8]),
            ("<u8", DataType::Uint64, &[7; 16]),
            ("<i8", DataType::Int64, &[7; 16]),
            ("<f2", DataType::Fp16, &[1, 2, 3, 4]),
            ("<f4", DataType::Fp32, &[1, 2, 3, 4, 5, 6, 7, 8]),
            ("<f8", DataType::Fp64, &[1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8]),
            ("<V2", DataType::Bf16, &[1, 2, 3, 4]),
        ] {
            let tensor = read(file(descr, "(1, 2)", data)).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape().dims(), &tensor.data()[..]), (dtype, &[1, 2][..], data));
            let swapped: Vec<u8> =
                data.chunks(data.len() / 2).flat_map(|element| element.iter().rev().copied()).collect();
            assert_eq!(read(file(&descr.replace(['<', '|'], ">"), "(1, 2)", &swapped)).unwrap(), tensor, "{descr}");
        }
    }

    #[test]
    fn strings_lose_their_padding_only() {
        let strings = |file| -> Vec<Vec<u8>> { read(file).unwrap().strings().map(<[u8]>::to_vec).collect() };
        assert_eq!(strings(file("|S3", "(3,)", b"ab\0\0\0\0a\0b")), [&b"ab"[..], b"", b"a\0b"]);
        let utf32 = |order: fn(u32) -> [u8; 4]| "é🦀".chars().chain(['\0']).flat_map(|c| order(c.into())).collect();
        let (little, big): (Vec<u8>, Vec<u8>) = (utf32(u32::to_le_bytes), utf32(u32::to_be_bytes));
        assert_eq!(strings(file("<U3", "()", &little)), ["é🦀".as_bytes()]);
        assert_eq!(strings(file(">U3", "()", &big)), ["é🦀".as_bytes()]);
        assert_eq!(strings(file("<U0", "(2,)", b"")), [b"", b""]);
        for descr in ["|S0", "<U0"] {
            let refused = read(file(descr, "(576460752303423488,)", b"")).unwrap_err().to_string();
            assert!(refused.contains("576460752303423488 empty strings"), "{refused}");
        }
        assert!(read(file("<U1", "()", &[0xff; 4])).is_err());
    }

    #[test]
    fn every_format_version_is_read() {
        for version in [1, 2, 3] {
            let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (), }  \n";
            let tensor = read(with_header(version, header, &1f32.to_le_bytes())).unwrap();
            assert_eq!((tensor.shape().rank(), tensor.to_vec::<f32>()), (0, Some(vec![1.0])));
        }
        assert!(read(with_header(4, "", b"")).is_err());
    }

    #[test]
    fn what_is_no_tensor_is_refused() {
        let with = |header: &str| read(with_header(1, header, &[0; 16])).unwrap_err().to_string();
        let column_major = with("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }");
        assert!(column_major.contains("ascontiguousarray"), "{column_major}");
        assert!(with("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,), }").contains("fields"));
        assert!(with("{'descr': '|O', 'fortran_order': False, 'shape': (4,), }").contains("'|O'"));
        assert!(with("{'descr': '<c8', 'fortran_order': False, 'shape': (2,), }").contains("'<c8'"));
        assert!(with("{'descr': '<f4', 'fortran_order': False, 'shape': (5,), }").contains("not whole"));
        assert!(with("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }").contains("tuple"));
        assert!(with("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }").contains("more"));
        assert!(with("{'descr': '<f4', 'shape': (4,), }").contains("no `fortran_order`"));
        assert!(with("{'descr': '', 'fortran_order': False, 'shape': (4,), }").contains("dtype"));
        assert!(with("{'descr': 'é', 'fortran_order': False, 'shape': (4,), }").contains("dtype"));
        let bad_bool = read(file("|b1", "(1,)", &[2])).unwrap_err();
        assert!(format!("{bad_bool:#}").contains("expected 0 or 1"));
        let long = with_header(2, &" ".repeat(MAX_HEADER_BYTES + 1), b"");
        assert!(read(long).unwrap_err().to_string().contains("header is over"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = file("<f4", "(2,)", &[0; 8]);
        for end in MAGIC.len()..whole.len() {
            assert!(read(whole[..end].to_vec()).is_err(), "cut at {end}");
        }
        read(whole).unwrap();
    }
}
