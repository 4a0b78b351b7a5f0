//! The way out of a stream: what an answer holds is held until the connection has written its bytes, and a long answer
//! is encoded where that may take its time.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;

use crate::protocol::common;
use crate::protocol::grpc::intake::{Places, Waiting, at_length};
use crate::request::Permit;

/// What an answer keeps until it is written: its place in the server, which a refused request has not, and the one on
/// its stream.
pub(super) type Held = (Option<Permit>, OwnedSemaphorePermit);

/// What the answers and their way out share.
#[derive(Clone, Default)]
pub(in crate::protocol::grpc) struct Outlet(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Of answers that were given to be encoded since bytes last came out.
    given: Vec<Held>,
    long: Long,
}

/// Whether a long answer waits to be given.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Long {
    #[default]
    None,
    Waits,
    MayGo,
}

impl Outlet {
    /// Whether the next answer may be given to be encoded now. A long one may not until it is polled in a place.
    pub(super) fn takes(&self, is_long: bool) -> bool {
        let mut state = self.state();
        if is_long && state.long != Long::MayGo {
            state.long = Long::Waits;
            return false;
        }
        if is_long {
            state.long = Long::None;
        }
        true
    }

    pub(super) fn give(&self, held: Held) {
        self.state().given.push(held);
    }

    /// What the answers hold whose bytes came out.
    fn taken(&self) -> Vec<Held> {
        std::mem::take(&mut self.state().given)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every critical section is a field access: a poisoned lock guards nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream's answers as bytes.
pub(in crate::protocol::grpc) struct Outward {
    inner: tonic::body::Body,
    /// Of the last frame: handed over piece by piece, as HTTP/2 asks for the next one before it has sent the last.
    rest: Bytes,
    /// What the answers in it hold.
    held: Arc<Vec<Held>>,
    outlet: Outlet,
    places: Arc<Places>,
    waiting: Option<Waiting>,
    /// The stream's own place, held until it has ended.
    _open: OwnedSemaphorePermit,
}

impl Outward {
    /// A long answer is encoded in one of the `places`.
    pub(in crate::protocol::grpc) fn new(
        inner: tonic::body::Body,
        outlet: Outlet,
        places: Arc<Places>,
        open: OwnedSemaphorePermit,
    ) -> Outward {
        Outward { inner, rest: Bytes::new(), held: Arc::default(), outlet, places, waiting: None, _open: open }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            let frame = match &mut self.waiting {
                None => Pin::new(&mut self.inner).poll_frame(cx),
                Some(waiting) => {
                    // Free again once the frame is encoded.
                    let _place = ready!(waiting.as_mut().poll(cx));
                    self.waiting = None;
                    self.outlet.state().long = Long::MayGo;
                    at_length(|| Pin::new(&mut self.inner).poll_frame(cx))
                }
            };
            if frame.is_pending() && self.outlet.state().long == Long::Waits {
                self.waiting = Some(Arc::clone(&self.places).wait());
                continue;
            }
            return frame;
        }
    }
}

impl Body for Outward {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if this.rest.is_empty() {
            match ready!(this.poll_next(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => (this.rest, this.held) = (bytes, Arc::new(this.outlet.taken())),
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return Poll::Ready(end),
            }
        }
        let piece = common::piece(&mut this.rest, &this.held);
        if this.rest.is_empty() {
            this.held = Arc::default();
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::poll_fn;
    use std::time::Instant;

    use http_body_util::BodyExt;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::request::{Budget, BudgetConfig};

    /// Gives its answers, all of them long, as the encoder would.
    struct Answers(Vec<(Bytes, Held)>, Outlet);

    impl Body for Answers {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            if self.0.is_empty() {
                return Poll::Ready(None);
            }
            if !self.1.takes(true) {
                return Poll::Pending;
            }
            let (bytes, held) = self.0.remove(0);
            self.1.give(held);
            Poll::Ready(Some(Ok(Frame::data(bytes))))
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn long_answers_are_encoded_in_a_place_and_hold_theirs_until_they_are_written() {
        let budget = Budget::new(BudgetConfig::default());
        let room = Arc::new(Semaphore::new(2));
        let answer = || {
            let permit = budget.admit(0, Instant::now()).unwrap();
            let held = (Some(permit), Arc::clone(&room).try_acquire_owned().unwrap());
            (Bytes::from_static(b"answer"), held)
        };
        let outlet = Outlet::default();
        let answers = Answers(vec![answer(), answer()], outlet.clone());
        let (places, open) = (Places::new(0), Arc::new(Semaphore::new(1)));
        let open = open.try_acquire_owned().unwrap();
        let mut outward = Outward::new(tonic::body::Body::new(answers), outlet, Arc::clone(&places), open);
        let early = poll_fn(|cx| Poll::Ready(Pin::new(&mut outward).poll_frame(cx))).await;
        assert!(early.is_pending());
        places.add(1);
        for left in [1, 0] {
            let bytes = outward.frame().await.unwrap().unwrap().into_data().unwrap();
            assert_eq!((&bytes[..], places.free()), (&b"answer"[..], 1), "free before it is sent");
            let part = bytes.slice(3..);
            drop(bytes);
            assert_eq!((budget.requests(), room.available_permits()), (left + 1, 1 - left));
            drop(part);
            assert_eq!((budget.requests(), room.available_permits()), (left, 2 - left));
        }
        assert!(outward.frame().await.is_none());
    }
}
