//! The binary tensor extension of requests: a JSON part, then the bytes of each binary tensor in the order in which
//! the JSON names them; and raw mode, where the whole body is one tensor. Tensors share the body's buffer, at whatever
//! address they happen to start.

use bytes::Bytes;
use http::{HeaderMap, HeaderName};

use super::Config;
use crate::error::{Error, Quoted, Result, quoted};
use crate::protocol::common::check_longest;
use crate::request::NamedTensor;
use crate::tensor::{DataType, Dim, Shape, Signature, Tensor, strings};

/// Length in bytes of the JSON part, counted after decompression.
pub(super) const HEADER_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// How a request's body is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// All of it is JSON.
    Json,
    /// JSON of so many bytes, then tensors.
    Split(usize),
    /// No JSON: the bytes of the model's only input.
    Raw,
}

pub(super) fn layout(headers: &HeaderMap) -> Result<Layout> {
    let mut values = headers.get_all(HEADER_LENGTH).iter();
    let Some(value) = values.next() else { return Ok(Layout::Json) };
    if values.next().is_some() {
        return Err(Error::invalid(format!("header `{HEADER_LENGTH}` is given more than once")));
    }
    // Digits only: `usize::from_str` would take a plus sign too.
    let digits = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    match digits.and_then(|digits| digits.parse().ok()) {
        Some(0) => Ok(Layout::Raw),
        Some(length) => Ok(Layout::Split(length)),
        None => Err(Error::invalid(format!("header `{HEADER_LENGTH}` is not a number of bytes"))),
    }
}

/// The JSON part and what follows it.
pub(super) fn split(mut body: Bytes, length: usize, config: &Config) -> Result<(Bytes, Tail)> {
    if length > body.len() {
        let missing = length - body.len();
        return Err(Error::invalid(format!("unexpected size for request JSON, expecting {missing} more bytes")));
    }
    if length > config.max_json_header_bytes {
        let max = config.max_json_header_bytes;
        return Err(Error::too_large(format!(
            "the JSON before binary tensors has {length} bytes, expected at most {max}"
        )));
    }
    let json = body.split_to(length);
    Ok((json, Tail { rest: body }))
}

/// The bytes of the binary tensors that are not taken yet.
pub(super) struct Tail {
    rest: Bytes,
}

impl Tail {
    pub(super) fn empty() -> Tail {
        Tail { rest: Bytes::new() }
    }

    /// The next `size` bytes, for the input of that name.
    pub(super) fn take(&mut self, input: Quoted<'_>, size: u64) -> Result<Bytes> {
        match usize::try_from(size) {
            Ok(size) if size <= self.rest.len() => Ok(self.rest.split_to(size)),
            _ => Err(Error::invalid(format!(
                "input '{input}' declares {size} bytes of binary data, but {} bytes remain in the body",
                self.rest.len()
            ))),
        }
    }

    /// Checks that every byte was taken.
    pub(super) fn finish(self, model: &str) -> Result<()> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(Error::invalid(format!("unexpected additional input data for model '{}'", quoted(model))))
    }
}

/// A tensor over the bytes sent for it.
pub(super) fn tensor(input: Quoted<'_>, dtype: DataType, shape: Shape, data: Bytes) -> Result<Tensor> {
    let tensor =
        Tensor::new(dtype, shape, data).map_err(|error| Error::invalid(format!("input '{input}': {error}")))?;
    check_longest(input, &tensor)?;
    Ok(tensor)
}

/// The only input of a raw request. Its shape must follow from the signature and the number of bytes: at most one free
/// dimension, or two of which the leading one, the batch, is then 1. A `BYTES` input takes one element, sent as it is,
/// without a length in front.
pub(super) fn raw(body: Bytes, model: &str, signature: &Signature) -> Result<NamedTensor> {
    let [spec] = &signature.inputs[..] else {
        let found = signature.inputs.len();
        return Err(Error::invalid(format!("a raw request needs a model with one input, but '{model}' has {found}")));
    };
    let unclear = |why: &str| {
        let name = &spec.name;
        Error::invalid(format!(
            "a raw request's shape must follow from its size, but input '{name}' of '{model}' {why}"
        ))
    };
    let dims = spec.dims.as_ref().ok_or_else(|| unclear("has an unknown rank"))?;
    let sized = spec.dtype.size();
    let first = match dims.iter().filter(|dim| dim.is_free()).count() {
        0 | 1 => None,
        2 if dims[0].is_free() && sized.is_some() => Some(Dim::Fixed(1)),
        _ => return Err(unclear("has several free dimensions")),
    };
    let dims: Vec<&Dim> = first.iter().chain(&dims[usize::from(first.is_some())..]).collect();
    let fixed = Shape::new(dims.iter().map(|dim| if let Dim::Fixed(n) = dim { *n } else { 1 }).collect::<Vec<_>>());
    let fixed = fixed.map_err(|error| Error::invalid(error.to_string()))?.elements();
    let (elements, data) = match sized {
        Some(size) if body.len().is_multiple_of(size) => (body.len() / size, body),
        Some(size) => return Err(unclear(&format!("takes elements of {size} bytes, and {} were sent", body.len()))),
        None => {
            let mut data = Vec::with_capacity(strings::PREFIX + body.len());
            strings::push(&mut data, &body).ok_or_else(|| Error::too_large("the string is longer than 4 GiB"))?;
            (1, data.into())
        }
    };
    let free = elements.checked_div(fixed).filter(|free| free * fixed == elements);
    let free =
        free.ok_or_else(|| unclear(&format!("takes multiples of {fixed} elements, and {elements} were sent")))?;
    let shape = dims.iter().map(|dim| if let Dim::Fixed(n) = dim { *n } else { free }).collect::<Vec<_>>();
    let shape = Shape::new(shape).map_err(|error| Error::invalid(error.to_string()))?;
    Ok(NamedTensor { name: spec.name.clone(), tensor: tensor(Quoted(&spec.name), spec.dtype, shape, data)? })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::error::Kind;
    use crate::protocol::common::MAX_STRING_BYTES;
    use crate::tensor::TensorSpec;

    fn layout_of(values: &[&str]) -> Result<Layout> {
        layout(&values.iter().map(|value| (HEADER_LENGTH, HeaderValue::from_str(value).unwrap())).collect())
    }

    #[test]
    fn header_lengths_are_plain_digits_given_once() {
        assert_eq!(layout_of(&[]).unwrap(), Layout::Json);
        assert_eq!(layout_of(&["0"]).unwrap(), Layout::Raw);
        assert_eq!(layout_of(&["99999999999"]).unwrap(), Layout::Split(99_999_999_999));
        for bad in ["-1", "+5", "0x10", "", "1e3", "99999999999999999999", " ", "1 2", "١"] {
            let bytes = HeaderValue::from_bytes(bad.as_bytes()).unwrap();
            let error = layout(&[(HEADER_LENGTH, bytes)].into_iter().collect()).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput, "{bad:?}");
        }
        assert!(layout_of(&["5", "5"]).is_err());
    }

    #[test]
    fn parts_must_add_up() {
        let config = Config::default();
        let body = Bytes::from_static(b"{}abcdef");
        let error = split(body.clone(), 11, &config).map(|_| ()).unwrap_err();
        assert_eq!(error.message(), "unexpected size for request JSON, expecting 3 more bytes");
        assert!(split(body.clone(), 99_999_999_999, &config).is_err());
        let (json, mut tail) = split(body, 2, &config).unwrap();
        assert_eq!(json, "{}");
        assert_eq!(tail.take(Quoted("x"), 4).unwrap(), "abcd");
        for size in [3, 1 << 63, u64::MAX] {
            assert!(tail.take(Quoted("x"), size).is_err());
        }
        assert_eq!(tail.finish("m").unwrap_err().message(), "unexpected additional input data for model 'm'");
        let long = Bytes::from(vec![b' '; config.max_json_header_bytes + 2]);
        assert!(split(long.clone(), config.max_json_header_bytes, &config).is_ok());
        let error = split(long, config.max_json_header_bytes + 1, &config).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::TooLarge);
    }

    #[test]
    fn tensors_share_the_body() {
        let body = Bytes::from(vec![0u8; 19]);
        let (_, mut tail) = split(body.clone(), 3, &Config::default()).unwrap();
        let data = tail.take(Quoted("x"), 16).unwrap();
        let x = tensor(Quoted("x"), DataType::Fp32, Shape::new([4]).unwrap(), data).unwrap();
        assert_eq!(x.data().as_ptr(), body[3..].as_ptr());
    }

    #[test]
    fn long_strings_are_refused() {
        let data = |length: usize| {
            let mut data = Vec::new();
            strings::push(&mut data, &vec![b'x'; length]).unwrap();
            Bytes::from(data)
        };
        tensor(Quoted("x"), DataType::Bytes, Shape::new([1]).unwrap(), data(MAX_STRING_BYTES)).unwrap();
        let error =
            tensor(Quoted("x"), DataType::Bytes, Shape::new([1]).unwrap(), data(MAX_STRING_BYTES + 1)).unwrap_err();
        assert_eq!(error.kind(), Kind::TooLarge);
    }

    fn raw_shape(dtype: DataType, dims: Option<&[i64]>, inputs: usize, bytes: usize) -> Option<Vec<usize>> {
        let dims = dims.map(|dims| {
            dims.iter().map(|n| usize::try_from(*n).map_or(Dim::Free(None), Dim::Fixed)).collect::<Vec<_>>()
        });
        let spec = TensorSpec { name: "x".into(), dtype, dims };
        let signature = Signature { inputs: vec![spec; inputs], outputs: Vec::new() };
        let raw = raw(vec![0u8; bytes].into(), "m", &signature).ok()?;
        Some(raw.tensor.shape().dims().to_vec())
    }

    #[test]
    fn raw_shapes_follow_from_the_size() {
        let fp32 = |dims, bytes| raw_shape(DataType::Fp32, Some(dims), 1, bytes);
        assert_eq!(fp32(&[-1, 8], 32), Some(vec![1, 8]));
        assert_eq!(fp32(&[1, -1], 12), Some(vec![1, 3]));
        assert_eq!(fp32(&[2, 2], 16), Some(vec![2, 2]));
        assert_eq!(fp32(&[], 4), Some(vec![]));
        assert_eq!(fp32(&[-1, -1], 64), Some(vec![1, 16]));
        assert_eq!(fp32(&[-1, 2, -1], 24), Some(vec![1, 2, 3]));
        for (dims, bytes) in
            [(&[-1, -1, -1][..], 64), (&[2, -1, -1], 64), (&[-1, 8], 33), (&[-1, 8], 36), (&[2, 2], 12), (&[0, -1], 4)]
        {
            assert_eq!(fp32(dims, bytes), None, "{dims:?} {bytes}");
        }
        assert_eq!(raw_shape(DataType::Fp32, Some(&[4]), 2, 16), None);
        assert_eq!(raw_shape(DataType::Fp32, None, 1, 16), None);
        assert_eq!(raw_shape(DataType::Bytes, Some(&[-1, 1]), 1, 5), Some(vec![1, 1]));
        assert_eq!(raw_shape(DataType::Bytes, Some(&[-1, 2]), 1, 5), None);
        assert_eq!(raw_shape(DataType::Bytes, Some(&[-1, -1]), 1, 5), None);
        assert_eq!(raw_shape(DataType::Bool, Some(&[-1]), 1, 3), Some(vec![3]));
    }
}
