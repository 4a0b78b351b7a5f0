//! `Content-Encoding` of requests and responses: gzip and deflate, where deflate means the zlib format (RFC 9110
//! §8.4.1.2). Output is bounded and budgeted as it grows; a stream that is cut short or fails its checksum is refused.

use std::io::{ErrorKind, Read, Write};

use bytes::Bytes;
use flate2::Compression;
use flate2::bufread::{MultiGzDecoder, ZlibDecoder};
use flate2::write::{GzEncoder, ZlibEncoder};
use http::HeaderMap;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};

use crate::error::{Error, Kind, Result, quoted};
use crate::request::Permit;

/// What requests may use: the value of `Accept-Encoding` on a 415.
pub(super) const ACCEPTED: &str = "gzip, deflate";

/// Decompressed bytes are reserved and copied out in steps of so many.
const STEP: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Identity,
    Gzip,
    Deflate,
}

impl Encoding {
    /// The value of `Content-Encoding`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Encoding::Identity => "identity",
            Encoding::Gzip => "gzip",
            Encoding::Deflate => "deflate",
        }
    }

    fn parse(token: &str) -> Option<Encoding> {
        match token.to_ascii_lowercase().as_str() {
            "" | "identity" => Some(Encoding::Identity),
            "gzip" | "x-gzip" => Some(Encoding::Gzip),
            "deflate" => Some(Encoding::Deflate),
            _ => None,
        }
    }
}

/// How a request's body is encoded. At most one encoding: layers are a way to build bombs.
pub(super) fn of_request(headers: &HeaderMap) -> Result<Encoding> {
    let mut found = Encoding::Identity;
    for value in headers.get_all(CONTENT_ENCODING) {
        let value = value.to_str().map_err(|_| unsupported("a value that is not text"))?;
        for token in value.split(',') {
            let encoding = Encoding::parse(token.trim()).ok_or_else(|| unsupported(&quoted(token.trim())))?;
            if found != Encoding::Identity && encoding != Encoding::Identity {
                return Err(unsupported("several encodings"));
            }
            if encoding != Encoding::Identity {
                found = encoding;
            }
        }
    }
    Ok(found)
}

fn unsupported(found: &str) -> Error {
    Error::new(Kind::UnsupportedMedia, format!("`content-encoding` is {found}, expected one of {ACCEPTED}, identity"))
}

/// The encoding the client prefers for the response (RFC 9110 §12.5.3). Identity where it names none that we have:
/// an answer it did not ask for beats no answer.
pub(super) fn negotiated(headers: &HeaderMap) -> Encoding {
    let mut best = (Encoding::Identity, 0);
    for value in headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok()) {
        for item in value.split(',') {
            let (token, weight) = weighted(item);
            let encoding = match token {
                "*" => Some(Encoding::Gzip),
                "" => None,
                token => Encoding::parse(token),
            };
            if let Some(encoding) = encoding.filter(|_| weight > best.1) {
                best = (encoding, weight);
            }
        }
    }
    best.0
}

/// `gzip;q=0.5` → (`gzip`, 500). A malformed weight is none: 0.
fn weighted(item: &str) -> (&str, u16) {
    let mut parts = item.split(';').map(str::trim);
    let token = parts.next().unwrap_or_default();
    let weight = match parts.next().map(|parameter| parameter.strip_prefix("q=").or(parameter.strip_prefix("Q="))) {
        None => 1000,
        Some(None) => 0,
        Some(Some(q)) => q.parse::<f32>().ok().filter(|q| (0.0..=1.0).contains(q)).map_or(0, |q| (q * 1000.0) as u16),
    };
    (token, weight)
}

/// The body as it was before its sender compressed it. TooLarge beyond `max` bytes; nothing is kept of a body refused.
pub(super) fn decode(encoding: Encoding, body: Bytes, max: usize, permit: &mut Permit) -> Result<Bytes> {
    match encoding {
        Encoding::Identity => Ok(body),
        Encoding::Gzip => {
            let mut decoder = MultiGzDecoder::new(&body[..]);
            inflate(&mut decoder, encoding, max, permit)
        }
        Encoding::Deflate => {
            let mut decoder = ZlibDecoder::new(&body[..]);
            let plain = inflate(&mut decoder, encoding, max, permit)?;
            match decoder.into_inner() {
                [] => Ok(plain),
                rest => Err(Error::invalid(format!("{} bytes follow the end of the deflate body", rest.len()))),
            }
        }
    }
}

fn inflate(decoder: &mut impl Read, encoding: Encoding, max: usize, permit: &mut Permit) -> Result<Bytes> {
    let name = encoding.name();
    let mut plain = Vec::new();
    let mut step = vec![0; STEP];
    loop {
        let read = match decoder.read(&mut step) {
            Ok(0) => return Ok(plain.into()),
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(Error::invalid(format!("the {name} body is cut short")));
            }
            Err(_) => return Err(Error::invalid(format!("the {name} body is corrupt"))),
        };
        if read > max - plain.len() {
            return Err(Error::too_large(format!("the {name} body holds more than {max} bytes")));
        }
        permit.grow(read)?;
        plain.extend_from_slice(&step[..read]);
    }
}

/// The frames as one compressed body. Level 1: a server's CPU is dearer than its wire.
pub(super) fn encode(encoding: Encoding, frames: &[Bytes]) -> Result<Bytes> {
    let compressed = match encoding {
        Encoding::Identity => Ok(frames.concat()),
        Encoding::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            frames.iter().try_for_each(|frame| encoder.write_all(frame)).and_then(|()| encoder.finish())
        }
        Encoding::Deflate => {
            let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
            frames.iter().try_for_each(|frame| encoder.write_all(frame)).and_then(|()| encoder.finish())
        }
    };
    compressed.map(Bytes::from).map_err(|_| Error::internal("the response could not be compressed"))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;
    use crate::request::{Budget, BudgetConfig};

    const BOTH: [Encoding; 2] = [Encoding::Gzip, Encoding::Deflate];

    fn permit(max_bytes: usize) -> Permit {
        Budget::new(BudgetConfig { max_requests: 1, max_bytes, ..BudgetConfig::default() })
            .admit(0, Instant::now())
            .unwrap()
    }

    fn decode_within(encoding: Encoding, body: &[u8], max: usize) -> Result<Bytes> {
        decode(encoding, Bytes::copy_from_slice(body), max, &mut permit(1 << 30))
    }

    fn headers(name: http::header::HeaderName, values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (name.clone(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn one_known_encoding_is_accepted() {
        for (values, expected) in [
            (&[][..], Encoding::Identity),
            (&[""], Encoding::Identity),
            (&["GZip"], Encoding::Gzip),
            (&["x-gzip"], Encoding::Gzip),
            (&["identity, deflate"], Encoding::Deflate),
            (&["gzip", "identity"], Encoding::Gzip),
        ] {
            assert_eq!(of_request(&headers(CONTENT_ENCODING, values)).unwrap(), expected, "{values:?}");
        }
        for values in [&["br"][..], &["zstd"], &["gzip, gzip"], &["gzip", "deflate"], &["gzip, br"], &["gzip;q=1"]] {
            let error = of_request(&headers(CONTENT_ENCODING, values)).unwrap_err();
            assert_eq!(error.kind(), Kind::UnsupportedMedia, "{values:?}");
        }
    }

    #[test]
    fn the_preferred_encoding_is_negotiated() {
        for (value, expected) in [
            ("", Encoding::Identity),
            ("gzip", Encoding::Gzip),
            ("deflate", Encoding::Deflate),
            ("gzip, deflate", Encoding::Gzip),
            ("gzip;q=0.5, deflate;q=0.8", Encoding::Deflate),
            ("gzip; q=0", Encoding::Identity),
            ("identity, gzip;q=0.5", Encoding::Identity),
            ("identity;q=0.2, GZIP;Q=0.5", Encoding::Gzip),
            ("br, *;q=0.1", Encoding::Gzip),
            ("br, zstd", Encoding::Identity),
            ("gzip;q=x, deflate;q=2", Encoding::Identity),
            (";;,,=", Encoding::Identity),
        ] {
            assert_eq!(negotiated(&headers(ACCEPT_ENCODING, &[value])), expected, "{value:?}");
        }
        assert_eq!(negotiated(&HeaderMap::new()), Encoding::Identity);
    }

    #[test]
    fn bombs_stop_at_the_limit() {
        let zeros = Bytes::from(vec![0; 1 << 20]);
        for encoding in BOTH {
            let bomb = encode(encoding, std::slice::from_ref(&zeros)).unwrap();
            assert!(bomb.len() < 1 << 14);
            assert_eq!(decode_within(encoding, &bomb, 1 << 20).unwrap().len(), 1 << 20);
            assert_eq!(decode_within(encoding, &bomb, (1 << 20) - 1).unwrap_err().kind(), Kind::TooLarge);
            let error = decode(encoding, bomb, 1 << 20, &mut permit(1 << 19)).unwrap_err();
            assert_eq!(error.kind(), Kind::Overloaded);
        }
    }

    #[test]
    fn damage_is_the_clients_fault() {
        for encoding in BOTH {
            let whole = encode(encoding, &[Bytes::from_static(b"some text, some text, some text")]).unwrap();
            for end in 0..whole.len() {
                let error = decode_within(encoding, &whole[..end], 1 << 20).unwrap_err();
                assert_eq!(error.kind(), Kind::InvalidInput, "{encoding:?} cut at {end}");
            }
            let mut wrong = whole.to_vec();
            // The checksum: gzip ends with CRC and length, zlib with its Adler-32.
            let at = wrong.len() - if encoding == Encoding::Gzip { 6 } else { 2 };
            wrong[at] ^= 1;
            assert_eq!(decode_within(encoding, &wrong, 1 << 20).unwrap_err().kind(), Kind::InvalidInput);
            let trailing = [&whole[..], b"more"].concat();
            assert_eq!(decode_within(encoding, &trailing, 1 << 20).unwrap_err().kind(), Kind::InvalidInput);
        }
    }

    proptest! {
        #[test]
        fn frames_return_whole(frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..5)) {
            let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
            for encoding in [Encoding::Identity, Encoding::Gzip, Encoding::Deflate] {
                let body = encode(encoding, &frames).unwrap();
                prop_assert_eq!(decode_within(encoding, &body, 1 << 20).unwrap(), frames.concat());
            }
        }

        #[test]
        fn arbitrary_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            for encoding in BOTH {
                let _ = decode_within(encoding, &body, 1 << 16);
            }
        }
    }
}
