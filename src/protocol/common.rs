//! What all protocols bound and say alike, so that none drifts from another: the limits of one request, the parameters
//! that are not offered, texts of errors, and what every answer and every refusal says of its origin.
//!
//! Pure. A count or a name over its limit is InvalidInput; what would take memory or time is TooLarge.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::{EXTENSIONS, REPOSITORY_EXTENSIONS};
use crate::engine::{Engine, IndexEntry, Trace};
use crate::error::{Error, Kind, Quoted, Result, quoted};
use crate::request::{InferResponse, MAX_NAME_BYTES, PredictionId};
use crate::tensor::{DataType, Shape, Tensor};

pub(super) const MAX_INPUTS: usize = 64;
/// Requested outputs.
pub(super) const MAX_OUTPUTS: usize = 256;
/// Of the request, of one input, and of one output.
pub(super) const MAX_PARAMETERS: usize = 64;
/// Elements of all BYTES inputs of a request together.
pub(super) const MAX_STRING_ELEMENTS: usize = 1 << 20;
/// One element of a BYTES input.
pub(super) const MAX_STRING_BYTES: usize = 16 << 20;
/// A call about the repository: at the longest, it holds a model's settings.
pub(super) const MAX_REPOSITORY_BYTES: usize = 64 << 10;

/// Extensions that are not offered, by the parameters that ask for them.
const NOT_OFFERED: [&str; 6] = [
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
];

/// Checks one parameter of `owner`. Those that would change the answer must not be ignored, unless they are switched
/// off: clients send the default of a feature they don't use. All others are the caller's own.
pub(super) fn check_parameter(key: &str, off: bool, owner: impl Display) -> Result<()> {
    check_length(format_args!("a parameter's name in {owner}"), key)?;
    if NOT_OFFERED.contains(&key) && !off {
        return Err(Error::new(Kind::Unsupported, format!("parameter `{key}` of {owner} is not supported")));
    }
    Ok(())
}

/// Bounds an id or a name.
pub(super) fn check_length(what: impl Display, text: &str) -> Result<()> {
    if text.len() <= MAX_NAME_BYTES {
        return Ok(());
    }
    Err(Error::invalid(format!("{what} has {} bytes, expected at most {MAX_NAME_BYTES}", text.len())))
}

pub(super) fn too_many(max: usize, what: &str) -> String {
    format!("more than {max} {what}")
}

pub(super) fn datatype(input: Quoted<'_>, name: &str) -> Result<DataType> {
    DataType::parse(name).ok_or_else(|| {
        let expected = DataType::ALL.map(DataType::name).join(", ");
        Error::invalid(format!("input '{input}' has datatype '{}', expected one of {expected}", quoted(name)))
    })
}

/// The BYTES elements of a request, which are iterated over one by one, here and further down.
#[derive(Default)]
pub(super) struct Strings(usize);

impl Strings {
    /// Counts an input, before anything is allocated for it.
    pub(super) fn count(&mut self, dtype: DataType, shape: &Shape) -> Result<()> {
        if dtype == DataType::Bytes {
            self.0 = self.0.saturating_add(shape.elements());
        }
        if self.0 > MAX_STRING_ELEMENTS {
            return Err(Error::too_large(too_many(MAX_STRING_ELEMENTS, "BYTES elements in one request")));
        }
        Ok(())
    }
}

/// Refuses a tensor with a BYTES element over the limit.
pub(super) fn check_longest(input: Quoted<'_>, tensor: &Tensor) -> Result<()> {
    match tensor.strings().position(|element| element.len() > MAX_STRING_BYTES) {
        None => Ok(()),
        Some(index) => Err(Error::too_large(format!(
            "element {index} of input '{input}' is longer than expected: at most {MAX_STRING_BYTES} bytes"
        ))),
    }
}

pub(super) fn expired() -> Error {
    Error::new(Kind::DeadlineExceeded, "Request timeout expired")
}

/// An error's message as it is sent: it may list a model's inputs, and clients bound the headers they take.
pub(super) fn message(error: &Error) -> &str {
    const MAX_BYTES: usize = 1 << 10;
    let message = error.message();
    &message[..message.floor_char_boundary(MAX_BYTES)]
}

/// Says of an answer or a refusal which prediction it is and, once a version was chosen, what made it: headers over
/// HTTP, metadata over gRPC.
pub(super) fn provenance(trace: &Trace, headers: &mut HeaderMap) {
    const PREDICTION: HeaderName = HeaderName::from_static("x-prediction-id");
    const VERSION: HeaderName = HeaderName::from_static("x-model-version");
    const DIGEST: HeaderName = HeaderName::from_static("x-model-digest");
    // Texts are ASCII; one that were not would be left out rather than fail the answer.
    let text = |value: &str| HeaderValue::from_str(value).ok();
    let mut say = |name, value: Option<HeaderValue>| value.and_then(|value| headers.insert(name, value));
    say(PREDICTION, text(trace.prediction().encode(&mut [0; PredictionId::TEXT_BYTES])).map(passing));
    if let Some((version, digest)) = trace.chosen() {
        say(VERSION, Some(version.number().into()));
        say(DIGEST, text(digest));
    }
}

/// A value that no other answer has. HTTP/2 keeps what it sends, to refer to it later, but not what is marked like this:
/// this would only drive out what is sent again and again.
pub(super) fn passing(mut value: HeaderValue) -> HeaderValue {
    value.set_sensitive(true);
    value
}

pub(super) const SERVER_TIMING: &str = "server-timing";
/// Enough for most.
const SERVER_TIMING_BYTES: usize = 96;

/// HTTP's `Server-Timing`, as metadata over gRPC too: milliseconds by phase, `total` from admission. ASCII.
pub(super) fn server_timing(response: &InferResponse) -> String {
    let timings = &response.timings;
    let phases = [
        ("prepare", timings.prepare),
        ("queue", timings.queue),
        ("compute", timings.compute),
        ("total", response.permit.arrived().elapsed()),
    ];
    let mut text = String::with_capacity(SERVER_TIMING_BYTES);
    for (name, duration) in phases {
        text.push_str(if text.is_empty() { "" } else { ", " });
        text.push_str(name);
        text.push_str(";dur=");
        push_millis(&mut text, duration);
    }
    text
}

/// With three decimals. By hand: the formatter takes as long as reading a small request.
fn push_millis(text: &mut String, duration: Duration) {
    let mut micros = duration.as_nanos().saturating_add(500) / 1000;
    // Digits from the right, four of them at least.
    let mut digits = [0u8; 40];
    let mut from = digits.len();
    while micros > 0 || digits.len() - from < 4 {
        from -= 1;
        digits[from] = b'0' + (micros % 10) as u8;
        micros /= 10;
    }
    let point = digits.len() - 3;
    digits[from..point].iter().for_each(|digit| text.push(char::from(*digit)));
    text.push('.');
    digits[point..].iter().for_each(|digit| text.push(char::from(*digit)));
}

/// Of memory that every engine computes on where it lies.
pub(super) const ALIGNMENT: usize = 64;

/// Moves what has come of a message to where there is room for `bytes`, of which the one at `tensors` lies at a multiple of
/// [`ALIGNMENT`].
pub(super) fn move_aligned(message: &mut BytesMut, bytes: usize, tensors: usize) {
    let mut room = BytesMut::with_capacity(bytes + ALIGNMENT);
    let address = room.as_ptr() as usize;
    let skipped = address.wrapping_add(tensors).wrapping_neg() % ALIGNMENT;
    room.put_bytes(0, skipped);
    room.advance(skipped);
    room.extend_from_slice(message);
    *message = room;
}

/// The next bytes of an answer to hand to its connection. They keep what it holds, the request's place in the server,
/// until the last of them is gone: HTTP/2 buffers what it has asked for, however small its client's window.
pub(super) fn piece<H: Send + Sync + 'static>(rest: &mut Bytes, held: &Arc<H>) -> Bytes {
    const MAX_BYTES: usize = 256 << 10;
    let bytes = rest.split_to(rest.len().min(MAX_BYTES));
    Bytes::from_owner(Piece { bytes, _held: Arc::clone(held) })
}

struct Piece<H> {
    bytes: Bytes,
    _held: Arc<H>,
}

impl<H> AsRef<[u8]> for Piece<H> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The repository's versions, or only those that serve.
pub(super) fn index(engine: &Engine, only_ready: bool) -> impl Iterator<Item = IndexEntry> {
    engine.index().into_iter().filter(move |entry| !only_ready || entry.state == "READY")
}

/// `repository_api`: whether the port may load and unload models.
pub(super) fn extensions(engine: &Engine, repository_api: bool) -> Vec<&'static str> {
    let repository = if engine.is_explicit() && repository_api { REPOSITORY_EXTENSIONS } else { &[] };
    EXTENSIONS.iter().chain(repository).copied().collect()
}

/// Refuses to load and unload on a port that may not, where another may.
pub(super) fn check_repository_api(engine: &Engine, repository_api: bool) -> Result<()> {
    if !engine.is_explicit() || repository_api {
        return Ok(());
    }
    let message = "explicit model load / unload is not allowed on this port: use the admin port, or switch it on with \
                   the setting `repository_api`";
    Err(Error::new(Kind::Forbidden, message))
}

/// The model's settings in a parameter of a request to load it. Others would change what is loaded and are not offered.
pub(super) fn load_config(parameter: &str, text: Option<&str>) -> Result<String> {
    match (parameter, text) {
        ("config", Some(config)) => Ok(config.to_string()),
        ("config", None) => {
            Err(Error::invalid("parameter `config` is not as expected: a ModelConfig in JSON, as text"))
        }
        (file, _) if file.starts_with("file:") => {
            let expected = "model files in the registry, where no client writes";
            Err(Error::invalid(format!("parameter `{}` is not supported, expected {expected}", quoted(file))))
        }
        (other, _) => Err(Error::invalid(format!("unknown parameter `{}`, expected `config`", quoted(other)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_milliseconds_to_the_microsecond() {
        for (nanos, expected) in [
            (0, "0.000"),
            (499, "0.000"),
            (500, "0.001"),
            (12_345, "0.012"),
            (999_999, "1.000"),
            (1_234_567, "1.235"),
            (98_765_432_100, "98765.432"),
        ] {
            let mut text = String::new();
            push_millis(&mut text, Duration::from_nanos(nanos));
            assert_eq!(text, expected, "{nanos} ns");
        }
        let mut text = String::new();
        push_millis(&mut text, Duration::MAX);
        assert_eq!(text, "18446744073709551616000.000");
    }
}
