//! What a call's headers ask for: its content type, its deadline, its compression.

use std::time::Duration;

use http::HeaderMap;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue, TE};
use tonic::codec::CompressionEncoding;

use crate::error::{Error, Kind, Result, quoted};
use crate::protocol::common::expired;
use crate::request::MAX_TIMEOUT;

const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
pub(super) const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// Most digits that the gRPC specification allows in `grpc-timeout`.
const TIMEOUT_DIGITS: usize = 8;

/// Encodings understood in both directions. `deflate` is zlib's format, as for HTTP.
const ENCODINGS: [(&str, CompressionEncoding); 2] =
    [("gzip", CompressionEncoding::Gzip), ("deflate", CompressionEncoding::Deflate)];

/// An encoding's name.
pub(super) fn name(encoding: CompressionEncoding) -> HeaderValue {
    let known = ENCODINGS.iter().find(|(_, known)| *known == encoding);
    HeaderValue::from_static(known.map_or("identity", |(name, _)| name))
}

/// Of a stream: `true` asks for the first error as the call's status.
const ERRORS_END_STREAM: HeaderName = HeaderName::from_static("triton_grpc_error");

/// Whether the body is gRPC with protobuf messages, as `application/grpc` alone means too.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let media = value.split(';').next().unwrap_or(value).trim();
    media.eq_ignore_ascii_case("application/grpc") || media.eq_ignore_ascii_case("application/grpc+proto")
}

/// Refuses a call whose `te` has been lost or changed: whoever did so may lose the trailers, too, and with them the
/// status.
pub(super) fn check_trailers(headers: &HeaderMap) -> Result<()> {
    match headers.get(TE).map(|value| String::from_utf8_lossy(value.as_bytes())) {
        Some(value) if value.eq_ignore_ascii_case("trailers") => Ok(()),
        Some(value) => Err(Error::new(Kind::Unsupported, format!("`te` is '{}', expected 'trailers'", quoted(&value)))),
        None => Err(Error::new(Kind::Unsupported, "there is no `te`, expected 'trailers': does a proxy take it away?")),
    }
}

/// On what terms a call is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Terms {
    /// How its messages may be compressed.
    pub encoding: Option<CompressionEncoding>,
    /// How its answers are to be compressed.
    pub answers: Option<CompressionEncoding>,
    /// How long the caller waits, not zero.
    pub timeout: Option<Duration>,
    /// Whether the first error on a stream is to be the call's status, and its end.
    pub errors_end_stream: bool,
}

impl Terms {
    pub(super) fn read(headers: &mut HeaderMap) -> Result<Terms> {
        let encoding = negotiate(headers)?;
        let answers = encoding.filter(|_| headers.contains_key(ACCEPT_ENCODING));
        let timeout = timeout(headers)?;
        if timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(expired());
        }
        let asked = headers.get(ERRORS_END_STREAM);
        let errors_end_stream = asked.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true"));
        Ok(Terms { encoding, answers, timeout, errors_end_stream })
    }
}

/// How long the caller waits: `grpc-timeout`, at most eight digits and a unit, read strictly.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let text = String::from_utf8_lossy(value.as_bytes());
    let timeout = parse_timeout(&text).ok_or_else(|| {
        Error::invalid(format!(
            "`{TIMEOUT}` is '{}', expected one to {TIMEOUT_DIGITS} digits and one of the units H, M, S, m, u, n",
            quoted(&text)
        ))
    })?;
    Ok(Some(timeout.min(MAX_TIMEOUT)))
}

fn parse_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || digits.len() > TIMEOUT_DIGITS || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        // Eight digits of hours are fewer seconds than a u64 holds.
        'H' => Some(Duration::from_secs(number * 3600)),
        'M' => Some(Duration::from_secs(number * 60)),
        'S' => Some(Duration::from_secs(number)),
        'm' => Some(Duration::from_millis(number)),
        'u' => Some(Duration::from_micros(number)),
        'n' => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// Bytes that the client says it will send, prefix included; 0 where it does not say.
pub(super) fn declared_bytes(headers: &HeaderMap) -> usize {
    let value = headers.get(http::header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// How messages may be compressed. Rewrites what the client accepts to the encoding it used itself, so that an
/// answer is compressed only for clients that compress: every Python client accepts compression, few want to pay for it.
fn negotiate(headers: &mut HeaderMap) -> Result<Option<CompressionEncoding>> {
    let used = match headers.get(ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity") => None,
        Some(name) => Some(ENCODINGS.into_iter().find(|(known, _)| known.as_bytes() == name).ok_or_else(|| {
            let name = quoted(&String::from_utf8_lossy(name));
            Error::new(
                Kind::UnsupportedMedia,
                format!("`grpc-encoding` is '{name}', expected gzip, deflate or identity"),
            )
        })?),
    };
    let accepted = headers.remove(ACCEPT_ENCODING);
    let accepted = accepted.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default();
    if let Some((used, _)) = used
        && accepted.split(',').any(|name| name.trim() == used)
    {
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(used));
    }
    Ok(used.map(|(_, encoding)| encoding))
}

#[cfg(test)]
mod tests {
    use tonic::codec::CompressionEncoding::{Deflate, Gzip};

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn timeouts_are_read_strictly() {
        let read = |text: &'static str| timeout(&headers(&[("grpc-timeout", text)]));
        assert_eq!(timeout(&HeaderMap::new()), Ok(None));
        for (text, expected) in [
            ("0n", Duration::ZERO),
            ("1n", Duration::from_nanos(1)),
            ("250u", Duration::from_micros(250)),
            ("50m", Duration::from_millis(50)),
            ("7S", Duration::from_secs(7)),
            ("2M", Duration::from_secs(120)),
            ("24H", MAX_TIMEOUT),
            ("99999999H", MAX_TIMEOUT),
        ] {
            assert_eq!(read(text), Ok(Some(expected)), "{text}");
        }
        for bad in ["", "S", "abc", "1X", "1", "-1S", "+1S", "1.5S", " 1S", "1 S", "999999999S", "1s"] {
            assert_eq!(read(bad).unwrap_err().kind(), Kind::InvalidInput, "{bad}");
        }
    }

    #[test]
    fn answers_are_compressed_as_requests_were() {
        let negotiated = |pairs: &[(&'static str, &'static str)]| {
            let mut headers = headers(pairs);
            let encoded = negotiate(&mut headers).map_err(|error| error.kind())?;
            Ok((encoded, headers.get(ACCEPT_ENCODING).map(|value| value.to_str().unwrap().to_string())))
        };
        let python = ("grpc-accept-encoding", "identity, deflate, gzip");
        assert_eq!(negotiated(&[python]), Ok((None, None)));
        assert_eq!(negotiated(&[python, ("grpc-encoding", "identity")]), Ok((None, None)));
        assert_eq!(negotiated(&[python, ("grpc-encoding", "gzip")]), Ok((Some(Gzip), Some("gzip".into()))));
        assert_eq!(negotiated(&[python, ("grpc-encoding", "deflate")]), Ok((Some(Deflate), Some("deflate".into()))));
        assert_eq!(negotiated(&[("grpc-encoding", "gzip")]), Ok((Some(Gzip), None)));
        assert_eq!(negotiated(&[("grpc-encoding", "br")]), Err(Kind::UnsupportedMedia));
    }

    #[test]
    fn a_stream_ends_with_its_first_error_where_that_is_asked_for() {
        for (value, expected) in [("true", true), ("True", true), ("false", false), ("1", false)] {
            let terms = Terms::read(&mut headers(&[("triton_grpc_error", value)])).unwrap();
            assert_eq!(terms.errors_end_stream, expected, "{value}");
        }
        let none = Terms { encoding: None, answers: None, timeout: None, errors_end_stream: false };
        assert_eq!(Terms::read(&mut HeaderMap::new()), Ok(none));
    }

    #[test]
    fn content_types() {
        for (value, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=utf-8", true),
            ("application/grpc+json", false),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            assert_eq!(is_grpc(&headers(&[("content-type", value)])), expected, "{value}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }
}
