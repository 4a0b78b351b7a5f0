//! Reading a request's body: bounded in bytes, in time and in how slowly it may come.

use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;

use super::Config;
use crate::error::{Error, Kind, Result};
use crate::protocol::common;
use crate::request::Permit;

/// A declared length is believed, and room made for all of it, when one in so many of its bytes is here.
const BELIEVED: usize = 8;

/// The length the body declares, if it does. TooLarge before a byte is read where that is over `max`.
pub(super) fn declared(body: &Body, max: usize) -> Result<Option<usize>> {
    match body.size_hint().exact() {
        None => Ok(None),
        Some(length) => match usize::try_from(length) {
            Ok(length) if length <= max => Ok(Some(length)),
            _ => Err(too_large(max)),
        },
    }
}

fn too_large(max: usize) -> Error {
    Error::too_large(format!("the request body is longer than {max} bytes"))
}

/// Reads the whole body. `permit` grows with what arrives, whatever was declared. Of a body that comes in several parts,
/// the byte at `tensors` lies at a multiple of [`common::ALIGNMENT`].
pub(super) async fn read(
    mut body: Body,
    declared: Option<usize>,
    tensors: usize,
    config: &Config,
    permit: &mut Permit,
) -> Result<Bytes> {
    let max = config.max_body_bytes;
    let mut whole = Whole::new(declared, tensors);
    loop {
        let deadline = latest(permit.arrived(), whole.length(), config);
        let frame = tokio::time::timeout_at(deadline.into(), body.frame()).await.map_err(|_| slow(config))?;
        let Some(frame) = frame else { return Ok(whole.into_bytes()) };
        let Some(data) = whole.next(frame, max)? else { continue };
        permit.grow(data.len())?;
        whole.push(data);
    }
}

/// Reads the whole body of a call that takes no place, of at most `max` bytes. Takes as long as the client does.
pub(super) async fn read_short(mut body: Body, max: usize) -> Result<Bytes> {
    let declared = declared(&body, max)?;
    let mut whole = Whole::new(declared, 0);
    while let Some(frame) = body.frame().await {
        if let Some(data) = whole.next(frame, max)? {
            whole.push(data);
        }
    }
    Ok(whole.into_bytes())
}

/// When the next bytes must be there: the time for a whole body, or what the slowest rate allows for so few bytes.
fn latest(start: Instant, received: usize, config: &Config) -> Instant {
    let at_slowest = Duration::from_secs((received / config.min_body_rate.max(1)) as u64);
    start + config.body_timeout.min(config.body_grace + at_slowest)
}

fn slow(config: &Config) -> Error {
    Error::new(
        Kind::RequestTimeout,
        format!(
            "the request body came too slowly, expected all of it within {:?} and {} bytes a second",
            config.body_timeout, config.min_body_rate
        ),
    )
}

/// Whether the sender left or sent what is no HTTP body. Either way nothing of the request is executed.
fn broken(error: axum::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        let malformed = current
            .downcast_ref::<std::io::Error>()
            .is_some_and(|io| matches!(io.kind(), std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData));
        if malformed {
            return Error::invalid("the request body is not framed as HTTP expects");
        }
        cause = current.source();
    }
    Error::new(Kind::Cancelled, "the client left before its request was whole")
}

/// A body as it comes in: a single frame is kept as it is, several are copied together, so that a body of tiny chunks
/// costs no more memory than its bytes.
struct Whole {
    first: Bytes,
    rest: BytesMut,
    declared: usize,
    tensors: usize,
}

impl Whole {
    fn new(declared: Option<usize>, tensors: usize) -> Whole {
        Whole { first: Bytes::new(), rest: BytesMut::new(), declared: declared.unwrap_or_default(), tensors }
    }

    fn length(&self) -> usize {
        if self.rest.is_empty() { self.first.len() } else { self.rest.len() }
    }

    /// A frame's bytes, if they fit beside what is here; `None` for trailers.
    fn next(&self, frame: Result<Frame<Bytes>, axum::Error>, max: usize) -> Result<Option<Bytes>> {
        match frame.map_err(broken)?.into_data() {
            Ok(data) if data.len() > max - self.length() => Err(too_large(max)),
            data => Ok(data.ok()),
        }
    }

    fn push(&mut self, data: Bytes) {
        if self.length() == 0 {
            self.first = data;
            return;
        }
        let (held, length) = (self.length(), self.length() + data.len());
        if self.rest.capacity() < length {
            let room = self.room(held, length);
            common::move_aligned(&mut self.rest, room, self.tensors);
        }
        self.rest.extend_from_slice(&std::mem::take(&mut self.first));
        self.rest.extend_from_slice(&data);
    }

    /// For `length` bytes, of which `held` were here before: what was declared, once that can be believed, and otherwise
    /// twice as much as there was.
    fn room(&self, held: usize, length: usize) -> usize {
        let believed = length <= self.declared && self.declared / BELIEVED <= length;
        if believed { self.declared } else { length.max(2 * held) }
    }

    fn into_bytes(self) -> Bytes {
        if self.rest.is_empty() { self.first } else { self.rest.freeze() }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use http_body::Frame;

    use super::*;
    use crate::protocol::common::ALIGNMENT;
    use crate::request::{Budget, BudgetConfig};

    /// Chunks of undeclared length, then an end, an error, or silence.
    enum End {
        Here,
        Error(std::io::ErrorKind),
        Silence,
    }

    struct Chunks(std::vec::IntoIter<&'static [u8]>, End);

    impl http_body::Body for Chunks {
        type Data = Bytes;
        type Error = std::io::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
            match (self.0.next(), &self.1) {
                (Some(chunk), _) => Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(chunk))))),
                (None, End::Here) => Poll::Ready(None),
                (None, End::Error(kind)) => Poll::Ready(Some(Err((*kind).into()))),
                (None, End::Silence) => Poll::Pending,
            }
        }
    }

    async fn read_all(chunks: Vec<&'static [u8]>, end: End, config: &Config, budget: usize) -> Result<Bytes> {
        let budget = Budget::new(BudgetConfig { max_requests: 1, max_bytes: budget, ..BudgetConfig::default() });
        let mut permit = budget.admit(0, Instant::now()).unwrap();
        let read = read(Body::new(Chunks(chunks.into_iter(), end)), None, 0, config, &mut permit).await;
        if let Ok(bytes) = &read {
            assert_eq!(permit.bytes(), bytes.len());
        }
        read
    }

    #[tokio::test]
    async fn chunks_join_up_to_the_limit() {
        let config = Config { max_body_bytes: 6, ..Config::default() };
        for (chunks, whole) in
            [(vec![], &b""[..]), (vec![&b"abc"[..]], b"abc"), (vec![b"", b"ab", b"", b"c", b"def"], b"abcdef")]
        {
            assert_eq!(read_all(chunks, End::Here, &config, 100).await.unwrap(), whole);
        }
        let over = read_all(vec![b"abcd", b"efg"], End::Here, &config, 100).await.unwrap_err();
        assert_eq!(over.kind(), Kind::TooLarge);
        let budget = read_all(vec![b"abc", b"def"], End::Here, &config, 5).await.unwrap_err();
        assert_eq!(budget.kind(), Kind::Overloaded);
    }

    #[tokio::test]
    async fn a_declared_length_is_checked_unread() {
        assert_eq!(declared(&Body::from("abc"), 3).unwrap(), Some(3));
        assert_eq!(declared(&Body::from("abcd"), 3).unwrap_err().kind(), Kind::TooLarge);
        let chunked = Body::new(Chunks(vec![].into_iter(), End::Silence));
        assert_eq!(declared(&chunked, 3).unwrap(), None);
    }

    #[tokio::test]
    async fn leaving_differs_from_garbage() {
        use std::io::ErrorKind::{ConnectionReset, InvalidInput, UnexpectedEof};
        let config = Config::default();
        for (error, kind) in
            [(UnexpectedEof, Kind::Cancelled), (ConnectionReset, Kind::Cancelled), (InvalidInput, Kind::InvalidInput)]
        {
            let refused = read_all(vec![b"abc"], End::Error(error), &config, 100).await.unwrap_err();
            assert_eq!(refused.kind(), kind, "{error}");
        }
    }

    #[tokio::test]
    async fn silence_times_out() {
        let config = Config { body_grace: Duration::ZERO, ..Config::default() };
        let error = read_all(vec![b"abc"], End::Silence, &config, 100).await.unwrap_err();
        assert_eq!(error.kind(), Kind::RequestTimeout);
    }

    #[test]
    fn a_declared_length_makes_room_once_an_eighth_is_here() {
        let part = Bytes::from(vec![7; 1000]);
        let mut whole = Whole::new(Some(80_000), 0);
        let mut grown = Vec::new();
        for parts in 1..=80 {
            whole.push(part.clone());
            grown.push(whole.rest.capacity());
            assert_eq!(whole.length(), 1000 * parts);
        }
        assert!(grown[..9].iter().all(|room| *room <= 16_000 + ALIGNMENT), "{grown:?}");
        let last = grown[79];
        assert!(last >= 80_000 && grown[16..].iter().all(|room| *room + 70_000 > last), "{grown:?}");
        assert_eq!(whole.into_bytes(), vec![7; 80_000]);
    }

    #[test]
    fn a_body_of_unknown_length_is_copied_few_times() {
        for declared in [None, Some(10)] {
            let mut whole = Whole::new(declared, 0);
            let mut rooms = Vec::new();
            for _ in 0..10_000 {
                whole.push(Bytes::from_static(&[7; 50]));
                rooms.push(whole.rest.as_ptr() as usize);
            }
            rooms.dedup();
            assert!(rooms.len() <= 20, "{declared:?}: {}", rooms.len());
            assert_eq!(whole.into_bytes(), vec![7; 500_000]);
        }
    }

    #[test]
    fn tensors_are_aligned_wherever_they_begin() {
        for tensors in [0, 1, 63, 64, 65, 130, 5000] {
            for declared in [None, Some(20), Some(6000)] {
                let mut whole = Whole::new(declared, tensors);
                (0..60_u8).for_each(|part| whole.push(Bytes::from(vec![part; 100])));
                let bytes = whole.into_bytes();
                assert!((bytes.as_ptr() as usize + tensors).is_multiple_of(ALIGNMENT), "{tensors} {declared:?}");
                assert!(bytes.chunks(100).zip(0..60_u8).all(|(chunk, part)| chunk == [part; 100]));
            }
        }
    }

    #[test]
    fn the_rate_buys_time_up_to_the_timeout() {
        let config = Config {
            body_timeout: Duration::from_secs(30),
            body_grace: Duration::from_secs(5),
            min_body_rate: 1024,
            ..Config::default()
        };
        let start = Instant::now();
        for (received, seconds) in [(0, 5), (1023, 5), (1024, 6), (10 * 1024, 15), (1 << 20, 30)] {
            assert_eq!(latest(start, received, &config), start + Duration::from_secs(seconds));
        }
    }
}
