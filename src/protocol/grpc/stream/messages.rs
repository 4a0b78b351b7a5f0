//! A stream's body, cut into its messages, so that each is taken in as a unary call's body is.
//!
//! Only finds where a message ends; whether it is one, and how long it may be, is for its [`Framing`] to say. Buffers
//! nothing but the frame that arrived last and the beginning of the current message.
//!
//! [`Framing`]: crate::protocol::grpc::intake::Framing

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tonic::Status;

use crate::error::{Error, Kind, Result};
use crate::protocol::grpc::codec;
use crate::protocol::grpc::intake::PREFIX;

/// Bytes of a message that are kept for what they say of it, should it be refused: its id stands within them.
const BEGINNING_BYTES: usize = 1 << 10;

/// Shared by the stream and the message that is being read; never by two tasks.
#[derive(Clone)]
pub(in crate::protocol::grpc) struct Messages(Arc<Mutex<State>>);

struct State {
    body: tonic::body::Body,
    /// The body has ended or broken off.
    over: bool,
    /// Arrived and not handed on yet.
    rest: Bytes,
    /// Of the current message: its prefix, how much of that is there, and how many bytes of it are still to come.
    prefix: [u8; PREFIX],
    filled: usize,
    left: usize,
    beginning: Vec<u8>,
}

impl Messages {
    pub(in crate::protocol::grpc) fn new<B>(body: B) -> Messages
    where
        B: Body<Data = Bytes> + Send + 'static,
    {
        // Whatever it was: the client left.
        let body = tonic::body::Body::new(body.map_err(|_| Status::cancelled("the request's body broke off")));
        let state = State {
            body,
            over: false,
            rest: Bytes::new(),
            prefix: [0; PREFIX],
            filled: 0,
            left: 0,
            beginning: Vec::new(),
        };
        Messages(Arc::new(Mutex::new(state)))
    }

    /// Ready once a message begins. False: none will.
    pub(in crate::protocol::grpc) fn poll_begin(&self, cx: &mut Context<'_>) -> Poll<Result<bool>> {
        let mut state = self.state();
        let more = ready!(state.poll_rest(cx))?;
        if more {
            (state.filled, state.left) = (0, 0);
            state.beginning.clear();
        }
        Poll::Ready(Ok(more))
    }

    /// Passes over what is left of a message that was refused. `None` where it has no end to be found: the body ended,
    /// what stands in front of it is no prefix, or it is longer than `limit`. Otherwise its id, empty where it is
    /// compressed.
    pub(super) fn poll_skip(&self, limit: usize, cx: &mut Context<'_>) -> Poll<Option<String>> {
        let mut state = self.state();
        loop {
            if state.filled == PREFIX && (state.prefix[0] > 1 || state.announced() > limit) {
                return Poll::Ready(None);
            }
            match ready!(state.poll_part(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) => return Poll::Ready(None),
                None if state.is_whole() => return Poll::Ready(Some(state.id())),
                None => return Poll::Ready(None),
            }
        }
    }

    /// Bytes of the message that begins, prefix included; 0 where not all of its prefix has arrived.
    pub(super) fn announced(&self) -> usize {
        match self.state().rest.first_chunk() {
            Some(prefix) => PREFIX.saturating_add(read_length(prefix)),
            None => 0,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A body that panicked is not polled again: its stream is gone.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Waits for bytes to be there. False at the body's end.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool>> {
        while self.rest.is_empty() && !self.over {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => self.rest = frame.into_data().unwrap_or_default(),
                Some(Err(_)) => {
                    self.over = true;
                    return Poll::Ready(Err(Error::new(Kind::Cancelled, "the request's body broke off")));
                }
                None => self.over = true,
            }
        }
        Poll::Ready(Ok(!self.rest.is_empty()))
    }

    /// The next bytes of the current message; `None` at its end, or the body's.
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes>>> {
        if self.is_whole() {
            return Poll::Ready(None);
        }
        Poll::Ready(match ready!(self.poll_rest(cx)) {
            Ok(true) => Some(Ok(self.cut())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        })
    }

    /// What of the bytes at hand belongs to the current message.
    fn cut(&mut self) -> Bytes {
        let head = self.rest.len().min(PREFIX - self.filled);
        self.prefix[self.filled..self.filled + head].copy_from_slice(&self.rest[..head]);
        self.filled += head;
        if head > 0 && self.filled == PREFIX {
            self.left = self.announced();
        }
        let body = self.left.min(self.rest.len() - head);
        self.left -= body;
        let kept = body.min(BEGINNING_BYTES - self.beginning.len());
        self.beginning.extend_from_slice(&self.rest[head..head + kept]);
        self.rest.split_to(head + body)
    }

    fn is_whole(&self) -> bool {
        self.filled == PREFIX && self.left == 0
    }

    fn announced(&self) -> usize {
        read_length(&self.prefix)
    }

    /// What a compressed message begins with may look like an id and is none.
    fn id(&self) -> String {
        if self.prefix[0] == 0 { codec::id(&self.beginning) } else { String::new() }
    }
}

fn read_length([_, length @ ..]: &[u8; PREFIX]) -> usize {
    usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX)
}

/// The current message alone.
impl Body for Messages {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>>>> {
        self.state().poll_part(cx).map_ok(Frame::data)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;
    use std::future::poll_fn;

    use proptest::prelude::*;

    use super::*;

    struct Chunks(VecDeque<Bytes>);

    impl Body for Chunks {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.pop_front().map(|chunk| Ok(Frame::data(chunk))))
        }
    }

    fn framed(content: &[u8]) -> Vec<u8> {
        [&[0][..], &u32::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
    }

    async fn cut(chunks: impl IntoIterator<Item = Bytes>) -> Vec<Bytes> {
        let messages = Messages::new(Chunks(chunks.into_iter().collect()));
        let mut found = Vec::new();
        while poll_fn(|cx| messages.poll_begin(cx)).await.unwrap() {
            found.push(messages.clone().collect().await.unwrap().to_bytes());
        }
        found
    }

    proptest! {
        #[test]
        fn chunking_changes_nothing(
            contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..6),
            sizes in proptest::collection::vec(0usize..9, 0..40),
        ) {
            let wanted: Vec<Bytes> = contents.iter().map(|content| framed(content).into()).collect();
            let mut rest = Bytes::from(wanted.concat());
            let mut chunks: Vec<Bytes> = sizes.iter().map(|size| rest.split_to(rest.len().min(*size))).collect();
            chunks.push(rest);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            prop_assert_eq!(runtime.block_on(cut(chunks)), wanted);
        }
    }

    #[tokio::test]
    async fn what_is_passed_over_is_told_by_its_id() {
        let request = prost::Message::encode_to_vec(&crate::protocol::grpc::proto::ModelInferRequest {
            id: "7".into(),
            raw_input_contents: vec![vec![0; 5000].into()],
            ..Default::default()
        });
        let wire: Bytes = [framed(&request), framed(b"next")].concat().into();
        // However much of it has been read already.
        for read in 0..3 {
            let messages = Messages::new(Chunks([wire.slice(..2000), wire.slice(2000..)].into()));
            assert!(poll_fn(|cx| messages.poll_begin(cx)).await.unwrap());
            assert_eq!(messages.announced(), PREFIX + request.len());
            for _ in 0..read {
                messages.clone().frame().await.unwrap().unwrap();
            }
            assert_eq!(poll_fn(|cx| messages.poll_skip(request.len(), cx)).await, Some("7".into()));
            assert!(poll_fn(|cx| messages.poll_begin(cx)).await.unwrap());
            assert_eq!(messages.clone().collect().await.unwrap().to_bytes(), framed(b"next"));
        }
    }

    #[tokio::test]
    async fn a_compressed_message_is_not_searched_for_an_id() {
        let request = crate::protocol::grpc::proto::ModelInferRequest { id: "7".into(), ..Default::default() };
        // A stream of deflate may hold its content as it is, so that it reads as the message itself.
        let mut wire = framed(&prost::Message::encode_to_vec(&request));
        for (flag, id) in [(0, "7"), (1, "")] {
            wire[0] = flag;
            let messages = Messages::new(Chunks([wire.clone().into()].into()));
            assert!(poll_fn(|cx| messages.poll_begin(cx)).await.unwrap());
            assert_eq!(poll_fn(|cx| messages.poll_skip(100, cx)).await, Some(id.into()));
        }
    }

    #[tokio::test]
    async fn what_has_no_end_is_not_passed_over() {
        for (wire, limit) in [(framed(&[0; 9]), 8), (vec![2, 0, 0, 0, 0], 8), (framed(&[0; 8])[..12].into(), 8)] {
            let messages = Messages::new(Chunks([wire.into()].into()));
            assert!(poll_fn(|cx| messages.poll_begin(cx)).await.unwrap());
            assert_eq!(poll_fn(|cx| messages.poll_skip(limit, cx)).await, None);
        }
    }
}
