//! Decoding that a hostile message cannot make expensive, and whose failures are the client's.
//!
//! Two bytes on the wire become hundreds in memory where a message repeats empty submessages or empty strings, so an
//! infer request's encoded form is walked, without allocating, before it is decoded. The walk is at least as strict as
//! the decoder: what it cannot follow it refuses. The generated server and client name [`CheckedCodec`].

use std::marker::PhantomData;

use bytes::Buf;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::ProstEncoder;

use super::{proto, status_of};
use crate::error::{Error, Result};
use crate::protocol::common::{MAX_INPUTS, MAX_OUTPUTS, MAX_PARAMETERS, MAX_STRING_ELEMENTS, too_many};
use crate::request::MAX_NAME_BYTES;
use crate::tensor::MAX_RANK;

/// Tensor bytes that typed contents may always decode to. Beyond them a message may no more than double, so that
/// one-byte varints don't become eight bytes each without a limit.
const TYPED_BYTES: usize = 64 << 20;

/// Protobuf over gRPC, refusing what [`Wire::check`] refuses.
pub struct CheckedCodec<T, U>(PhantomData<fn(T) -> U>);

impl<T, U> Default for CheckedCodec<T, U> {
    fn default() -> Self {
        CheckedCodec(PhantomData)
    }
}

impl<T: prost::Message + 'static, U: Wire> Codec for CheckedCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = CheckedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        CheckedDecoder::default()
    }
}

pub struct CheckedDecoder<U>(PhantomData<fn() -> U>);

impl<U> Default for CheckedDecoder<U> {
    fn default() -> Self {
        CheckedDecoder(PhantomData)
    }
}

impl<U: Wire> Decoder for CheckedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // One chunk: tonic collects a message in one buffer before it decodes it.
        if buffer.chunk().len() != buffer.remaining() {
            return Err(status_of(&Error::internal("a message's buffer is in pieces, expected one")));
        }
        decode(buffer).map(Some).map_err(|error| status_of(&error))
    }
}

/// From an encoded message in one piece.
pub(super) fn decode<U: Wire>(encoded: impl Buf) -> Result<U> {
    U::check(encoded.chunk())?;
    U::decode(encoded).map_err(|error| malformed(&error.to_string()))
}

/// A message of the service, and what of its encoded form is refused before it is decoded.
pub trait Wire: prost::Message + Default + 'static {
    fn check(_encoded: &[u8]) -> Result<()> {
        Ok(())
    }
}

impl Wire for proto::ModelInferRequest {
    fn check(encoded: &[u8]) -> Result<()> {
        let mut totals = Totals::default();
        let [mut inputs, mut outputs, mut raw, mut parameters] = [0usize; 4];
        for field in Fields(encoded) {
            match field? {
                (4, _) => count(&mut parameters, MAX_PARAMETERS, "parameters")?,
                (5, Value::Bytes(input)) => {
                    count(&mut inputs, MAX_INPUTS, "inputs")?;
                    check_input(input, &mut totals)?;
                }
                (6, Value::Bytes(output)) => {
                    count(&mut outputs, MAX_OUTPUTS, "requested outputs")?;
                    check_output(output)?;
                }
                (7, _) => count(&mut raw, MAX_INPUTS, "entries in raw_input_contents")?,
                _ => {}
            }
        }
        let limit = TYPED_BYTES.max(encoded.len().saturating_mul(2));
        if totals.typed_bytes > limit {
            return Err(Error::too_large(format!(
                "typed contents hold {} bytes of tensor data in a message of {}, expected at most {limit}: send them \
                 in raw_input_contents",
                totals.typed_bytes,
                encoded.len()
            )));
        }
        Ok(())
    }
}

impl Wire for proto::RepositoryModelLoadRequest {
    fn check(encoded: &[u8]) -> Result<()> {
        check_change(encoded)
    }
}

impl Wire for proto::RepositoryModelUnloadRequest {
    fn check(encoded: &[u8]) -> Result<()> {
        check_change(encoded)
    }
}

/// A request to load or unload a model.
fn check_change(encoded: &[u8]) -> Result<()> {
    let mut parameters = 0;
    for field in Fields(encoded) {
        if let (3, _) = field? {
            count(&mut parameters, MAX_PARAMETERS, "parameters")?;
        }
    }
    Ok(())
}

macro_rules! unchecked {
    ($($message:ident),* $(,)?) => { $(impl Wire for proto::$message {})* };
}
// Requests hold two strings and stay under the limit for queries; responses are decoded by clients only.
unchecked!(
    ServerLiveRequest,
    ServerLiveResponse,
    ServerReadyRequest,
    ServerReadyResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelConfigRequest,
    ModelConfigResponse,
    ModelStatisticsRequest,
    ModelStatisticsResponse,
    ModelInferResponse,
    ModelStreamInferResponse,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    RepositoryModelLoadResponse,
    RepositoryModelUnloadResponse,
);

/// The id of a request whose encoded form begins so: it stands before the inputs. Empty where it cannot be read.
pub(super) fn id(beginning: &[u8]) -> String {
    let ids = Fields(beginning).map_while(Result::ok).filter_map(|field| match field {
        (3, Value::Bytes(id)) => Some(String::from_utf8_lossy(id).into_owned()),
        _ => None,
    });
    ids.last().filter(|id| id.len() <= MAX_NAME_BYTES).unwrap_or_default()
}

/// Summed over the inputs of a request.
#[derive(Default)]
struct Totals {
    strings: usize,
    typed_bytes: usize,
}

fn check_input(encoded: &[u8], totals: &mut Totals) -> Result<()> {
    let (mut dims, mut parameters) = (0usize, 0usize);
    for field in Fields(encoded) {
        match field? {
            (3, value) => {
                dims += value.varints();
                if dims > MAX_RANK {
                    return Err(Error::invalid(format!("a shape has more than {MAX_RANK} dimensions")));
                }
            }
            (4, _) => count(&mut parameters, MAX_PARAMETERS, "parameters of one input")?,
            (5, Value::Bytes(contents)) => check_contents(contents, totals)?,
            _ => {}
        }
    }
    Ok(())
}

fn check_output(encoded: &[u8]) -> Result<()> {
    let mut parameters = 0;
    for field in Fields(encoded) {
        if let (2, _) = field? {
            count(&mut parameters, MAX_PARAMETERS, "parameters of one output")?;
        }
    }
    Ok(())
}

fn check_contents(encoded: &[u8], totals: &mut Totals) -> Result<()> {
    for field in Fields(encoded) {
        let (number, value) = field?;
        totals.typed_bytes += match number {
            1 => value.varints(),
            2 | 4 => value.varints().saturating_mul(4),
            3 | 5 => value.varints().saturating_mul(8),
            6 | 7 => value.fixed_bytes(),
            8 => {
                totals.strings += 1;
                if totals.strings > MAX_STRING_ELEMENTS {
                    return Err(Error::too_large(too_many(MAX_STRING_ELEMENTS, "BYTES elements in one request")));
                }
                value.fixed_bytes()
            }
            _ => 0,
        };
    }
    Ok(())
}

fn count(counter: &mut usize, limit: usize, what: &str) -> Result<()> {
    *counter += 1;
    if *counter > limit {
        return Err(Error::invalid(too_many(limit, what)));
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Value<'a> {
    Varint,
    /// A fixed-width number of that many bytes.
    Fixed(usize),
    /// A length-delimited value: a string, a submessage, or packed numbers.
    Bytes(&'a [u8]),
}

impl Value<'_> {
    /// Numbers in a varint field, packed or not.
    fn varints(self) -> usize {
        match self {
            Value::Varint => 1,
            Value::Fixed(_) => 0,
            Value::Bytes(packed) => packed.iter().filter(|byte| **byte < 0x80).count(),
        }
    }

    fn fixed_bytes(self) -> usize {
        match self {
            Value::Varint => 0,
            Value::Fixed(bytes) => bytes,
            Value::Bytes(packed) => packed.len(),
        }
    }
}

/// The fields of an encoded message, by number. Ends after an error.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = field(&mut self.0).ok_or_else(|| malformed("a field's key or value is cut short or invalid"));
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

fn field<'a>(rest: &mut &'a [u8]) -> Option<(u64, Value<'a>)> {
    let key = varint(rest)?;
    let value = match key & 7 {
        0 => varint(rest).map(|_| Value::Varint)?,
        1 => take(rest, 8).map(|_| Value::Fixed(8))?,
        2 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            Value::Bytes(take(rest, length)?)
        }
        5 => take(rest, 4).map(|_| Value::Fixed(4))?,
        // Groups: no message of the service has ever had one.
        _ => return None,
    };
    Some((key >> 3, value))
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for place in 0..10 {
        let byte = *take(rest, 1)?.first()?;
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(taken)
}

fn malformed(what: &str) -> Error {
    Error::invalid(format!("request is not a valid protobuf message: {what}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::error::Kind;
    use proto::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
    use proto::{InferTensorContents, ModelInferRequest};

    fn check(request: &ModelInferRequest) -> Result<()> {
        ModelInferRequest::check(&request.encode_to_vec())
    }

    fn with_contents(contents: InferTensorContents) -> ModelInferRequest {
        let input = InferInputTensor { contents: Some(contents), ..Default::default() };
        ModelInferRequest { inputs: vec![input], ..Default::default() }
    }

    #[test]
    fn counts_are_refused_one_past_the_limit() {
        let inputs = |n| ModelInferRequest { inputs: vec![InferInputTensor::default(); n], ..Default::default() };
        let outputs =
            |n| ModelInferRequest { outputs: vec![InferRequestedOutputTensor::default(); n], ..Default::default() };
        let raw = |n| ModelInferRequest { raw_input_contents: vec![bytes::Bytes::new(); n], ..Default::default() };
        let strings = |n| {
            with_contents(InferTensorContents { bytes_contents: vec![bytes::Bytes::new(); n], ..Default::default() })
        };
        let cases: [(&dyn Fn(usize) -> ModelInferRequest, usize); 4] =
            [(&inputs, MAX_INPUTS), (&outputs, MAX_OUTPUTS), (&raw, MAX_INPUTS), (&strings, MAX_STRING_ELEMENTS)];
        for (request, limit) in cases {
            assert!(check(&request(limit)).is_ok(), "{limit}");
            let kind = if limit == MAX_STRING_ELEMENTS { Kind::TooLarge } else { Kind::InvalidInput };
            assert_eq!(check(&request(limit + 1)).unwrap_err().kind(), kind, "{limit}");
        }
        let dims = |n| ModelInferRequest {
            inputs: vec![InferInputTensor { shape: vec![300; n], ..Default::default() }],
            ..Default::default()
        };
        assert!(check(&dims(MAX_RANK)).is_ok());
        assert_eq!(check(&dims(MAX_RANK + 1)).unwrap_err().kind(), Kind::InvalidInput);
    }

    #[test]
    fn repeated_keys_count_as_often_as_they_are_sent() {
        // A map in memory keeps one entry per key, but each occurrence costs a decode.
        let entry = [0x22, 0x00];
        assert!(ModelInferRequest::check(&entry.repeat(MAX_PARAMETERS)).is_ok());
        assert!(ModelInferRequest::check(&entry.repeat(MAX_PARAMETERS + 1)).is_err());
    }

    #[test]
    fn small_varints_may_not_blow_up_without_a_limit() {
        let zeros = |n| with_contents(InferTensorContents { int64_contents: vec![0; n], ..Default::default() });
        assert!(check(&zeros(TYPED_BYTES / 8)).is_ok());
        assert_eq!(check(&zeros(TYPED_BYTES / 8 + 1)).unwrap_err().kind(), Kind::TooLarge);
    }

    #[test]
    fn malformed_messages_are_the_clients_fault() {
        let eleven_byte_varint = [[0x08].as_slice(), &[0xff; 10], &[0x01]].concat();
        let cases: [&[u8]; 7] = [
            &[0x2a, 0x05, 0x00], // an input cut short
            &[0x2a],             // a key without its value
            &[0x0b, 0x0c],       // a group
            &[0x0e],             // wire type 6
            &eleven_byte_varint,
            &[0x2a, 0x02, 0x2a, 0x7f], // packed contents reaching past their message
            &[0x3a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
        ];
        for encoded in cases {
            assert_eq!(ModelInferRequest::check(encoded).unwrap_err().kind(), Kind::InvalidInput, "{encoded:?}");
        }
    }

    #[test]
    fn ids_are_read_from_a_messages_beginning() {
        let with_id = |id: &str| ModelInferRequest {
            model_name: "m".into(),
            id: id.into(),
            raw_input_contents: vec![vec![7; 1000].into()],
            ..Default::default()
        };
        let encoded = with_id("7").encode_to_vec();
        for length in [6, 7, 100, encoded.len()] {
            assert_eq!(id(&encoded[..length]), "7", "{length}");
        }
        assert_eq!(id(&encoded[..5]), "");
        assert_eq!(id(&with_id(&"n".repeat(257)).encode_to_vec()), "");
        assert_eq!(id(b"\x1f\x8b not protobuf"), "");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(encoded in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = ModelInferRequest::check(&encoded).and_then(|()| {
                ModelInferRequest::decode(&*encoded).map_err(|error| malformed(&error.to_string()))
            });
        }
    }
}
