//! The way in and out: follows one message while it is read, a unary call's whole body or one of a stream's, so that
//! limits, deadlines and the permit hold from the first byte; and holds a unary call's permit until the answer's last.
//!
//! A message is inflated, decoded and encoded wherever its call is polled. The last bytes of a long one are therefore
//! held back until [`Intake::follow`] polls the call where that may take its time: with the thread's other tasks handed
//! over, and in one of a few places. Its first bytes are held back, too: room is made for all that a prefix announces,
//! and it is shown when half of that is here. [`Outward`] waits for such a place before it has a long answer encoded.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Sleep;
use tonic::Status;

use super::status_of;
use crate::error::{Error, Kind, Result};
use crate::protocol::common;
use crate::request::Permit;

/// Bytes in front of every gRPC message: a compression flag and a big-endian length.
pub(super) const PREFIX: usize = 5;

/// Bytes of a message, or of an answer's tensors, that are worth handing the thread's other tasks over for: as on REST,
/// about 500 µs of work where it is compressed or in typed contents.
pub(super) const LONG: usize = 128 << 10;

/// Long messages decoded or encoded at once, each on a thread of its own.
pub(super) const MAX_PLACES: usize = 16;

/// Where long messages are decoded and encoded. A free place is nobody's until somebody who is polled takes it: a queue
/// would hand it to whoever waits longest, and what belongs to a call whose client does not read is not polled any more.
pub(super) struct Places {
    free: Semaphore,
    freed: Notify,
}

/// A place that nobody else has, until it is dropped.
pub(super) struct Place(Arc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.add(1);
    }
}

impl Places {
    pub(super) fn new(count: usize) -> Arc<Places> {
        Arc::new(Places { free: Semaphore::new(count), freed: Notify::new() })
    }

    pub(super) async fn take(self: &Arc<Self>) -> Place {
        loop {
            // Before the look, so that no place freed after it is missed.
            let freed = self.freed.notified();
            if let Ok(free) = self.free.try_acquire() {
                free.forget();
                return Place(Arc::clone(self));
            }
            freed.await;
        }
    }

    pub(super) fn wait(self: Arc<Self>) -> Waiting {
        Box::pin(async move { self.take().await })
    }

    pub(super) fn add(&self, count: usize) {
        self.free.add_permits(count);
        // All of them: whoever were chosen might not be polled.
        self.freed.notify_waiters();
    }

    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.free.available_permits()
    }
}

/// What one message, its method and its answer share. Of a unary call it travels in the request's extensions.
#[derive(Clone, Default)]
pub(super) struct Intake(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    permit: Option<Permit>,
    refused: Option<Error>,
    reached: bool,
    timeout: Option<Duration>,
    /// A long message has arrived and its last bytes are held back.
    held_back: bool,
}

/// An infer call whose message has been decoded.
pub(super) struct Admitted {
    pub permit: Permit,
    /// How long the caller waits.
    pub timeout: Option<Duration>,
}

/// How a call ended, as far as tonic's answer does not say it.
pub(super) struct Ending {
    /// Why the body or the request in it was refused.
    pub refused: Option<Error>,
    /// The request was decoded and its method called.
    pub reached: bool,
}

impl Intake {
    /// Infer requests have a permit.
    pub(super) fn new(permit: Option<Permit>, timeout: Option<Duration>) -> Intake {
        Intake(Arc::new(Mutex::new(State { permit, timeout, ..State::default() })))
    }

    /// Marks the method as called.
    pub(super) fn reach<T>(request: &tonic::Request<T>) -> Result<Intake, Status> {
        let intake = request.extensions().get::<Intake>().cloned();
        let intake = intake.ok_or_else(|| status_of(&Error::internal("a call came in past the intake")))?;
        intake.state().reached = true;
        Ok(intake)
    }

    /// What admitted the call.
    pub(super) fn take(&self) -> Result<Admitted> {
        let mut state = self.state();
        let permit = state.permit.take().ok_or_else(|| Error::internal("a call came in without a permit"))?;
        Ok(Admitted { permit, timeout: state.timeout })
    }

    /// Polls the call, for as long as the caller waits.
    pub(super) async fn follow<F: Future>(&self, call: F, places: &Arc<Places>) -> Result<F::Output> {
        let timeout = self.state().timeout;
        let polled = self.poll(call, places);
        match timeout {
            None => Ok(polled.await),
            Some(timeout) => tokio::time::timeout(timeout, polled).await.map_err(|_| common::expired()),
        }
    }

    /// Where a long message is decoded, in one of the `places` and off the I/O threads.
    async fn poll<F: Future>(&self, call: F, places: &Arc<Places>) -> F::Output {
        let mut call = pin!(call);
        loop {
            let polled = poll_fn(|cx| match call.as_mut().poll(cx) {
                Poll::Pending if self.state().held_back => Poll::Ready(None),
                polled => polled.map(Some),
            });
            if let Some(output) = polled.await {
                return output;
            }
            let _place = places.take().await;
            self.state().held_back = false;
            if let Poll::Ready(output) = poll_fn(|cx| Poll::Ready(at_length(|| call.as_mut().poll(cx)))).await {
                return output;
            }
        }
    }

    /// Gives on what is held back, where it is not worth a place. False: nothing is.
    pub(super) fn let_go(&self) -> bool {
        std::mem::take(&mut self.state().held_back)
    }

    pub(super) fn end(&self) -> Ending {
        let mut state = self.state();
        Ending { refused: state.refused.take(), reached: state.reached }
    }

    fn received(&self, bytes: usize) -> Result<()> {
        match &mut self.state().permit {
            Some(permit) => grow_to(permit, bytes),
            None => Ok(()),
        }
    }

    /// Notes why the call fails, which a status does not say in full; the first reason counts.
    pub(super) fn refuse(&self, error: Error) -> Status {
        let status = status_of(&error);
        self.state().refused.get_or_insert(error);
        status
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every critical section is a field access: a poisoned lock guards nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs what takes long while other threads poll this one's tasks, where there are others.
pub(super) fn at_length<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// Reserves what is missing to `bytes` in all.
pub(super) fn grow_to(permit: &mut Permit, bytes: usize) -> Result<()> {
    permit.grow(bytes.saturating_sub(permit.bytes()))
}

/// A request's body on its way to what decodes it.
pub(super) struct Inward<B> {
    inner: B,
    framing: Framing,
    received: usize,
    /// Arrived, not yet given on: less than half of a message, or the last of a long one.
    held: VecDeque<Frame<Bytes>>,
    /// How long the client may take to send its message.
    limit: Duration,
    /// Runs from when the body is first waited for.
    expiry: Option<Pin<Box<Sleep>>>,
    intake: Intake,
}

impl<B> Inward<B> {
    pub(super) fn new(inner: B, framing: Framing, limit: Duration, intake: Intake) -> Self {
        Inward { inner, framing, received: 0, held: VecDeque::new(), limit, expiry: None, intake }
    }

    /// Bytes of the message, prefix included, as far as is known.
    pub(super) fn expected(&self) -> usize {
        self.received.saturating_add(self.framing.left)
    }

    fn follow(&mut self, data: &[u8]) -> Result<()> {
        self.received += data.len();
        self.framing.follow(data)?;
        self.intake.received(self.received)
    }

    /// A frame that just arrived, where it may go at once.
    fn pass(&mut self, frame: Frame<Bytes>) -> Option<Frame<Bytes>> {
        let is_last_of_long = self.framing.is_whole() && (self.received > LONG || self.framing.is_compressed());
        if is_last_of_long {
            self.intake.state().held_back = true;
        }
        if self.held.is_empty() && !is_last_of_long && self.may_go() {
            return Some(frame);
        }
        self.held.push_back(frame);
        None
    }

    /// The next of what is held, where it may go.
    fn release(&mut self) -> Option<Frame<Bytes>> {
        if self.held.is_empty() || self.holds_back() || !self.may_go() {
            return None;
        }
        self.held.pop_front()
    }

    /// Whether enough of the message is here to make room for all of it.
    fn may_go(&self) -> bool {
        self.framing.is_whole() || self.received > self.framing.left
    }

    /// Whether what is left is the end of a long message, which waits for a place.
    fn holds_back(&self) -> bool {
        self.held.len() == 1 && self.intake.state().held_back
    }

    fn poll_expired(&mut self, cx: &mut Context<'_>) -> bool {
        let limit = self.limit;
        let expiry = self.expiry.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        expiry.as_mut().poll(cx).is_ready()
    }

    fn late(&self) -> Error {
        Error::new(Kind::RequestTimeout, format!("the message did not arrive within {:?}", self.limit))
    }

    fn fail<T>(&self, error: Error) -> Poll<Option<Result<T, Status>>> {
        Poll::Ready(Some(Err(self.intake.refuse(error))))
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Inward<B> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        loop {
            if let Some(frame) = this.release() {
                return Poll::Ready(Some(Ok(frame)));
            }
            // Nobody is to be woken: `follow` looks at every poll.
            if this.holds_back() {
                return Poll::Pending;
            }
            match Pin::new(&mut this.inner).poll_frame(cx) {
                Poll::Pending if this.poll_expired(cx) => return this.fail(this.late()),
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(frame))) => {
                    if let Some(Err(error)) = frame.data_ref().map(|data| this.follow(data)) {
                        return this.fail(error);
                    }
                    // Trailers, too: only behind them is a message known to be whole, and decoded.
                    if let Some(frame) = this.pass(frame) {
                        return Poll::Ready(Some(Ok(frame)));
                    }
                }
                Poll::Ready(Some(Err(_))) => {
                    return this.fail(Error::new(Kind::Cancelled, "the request's body broke off"));
                }
                Poll::Ready(None) => {
                    return match this.framing.finish() {
                        Ok(()) => Poll::Ready(None),
                        Err(error) => this.fail(error),
                    };
                }
            }
        }
    }
}

/// Follows one message through chunks of any size. Buffers nothing.
#[derive(Clone, Debug)]
pub(super) struct Framing {
    prefix: [u8; PREFIX],
    filled: usize,
    left: usize,
    limit: usize,
    encoded: bool,
}

impl Framing {
    /// For a message of at most `limit` bytes, compressed only if the call names an encoding.
    pub(super) fn new(limit: usize, encoded: bool) -> Framing {
        Framing { prefix: [0; PREFIX], filled: 0, left: 0, limit, encoded }
    }

    fn follow(&mut self, mut data: &[u8]) -> Result<()> {
        if self.filled < PREFIX {
            let (head, rest) = data.split_at(data.len().min(PREFIX - self.filled));
            self.prefix[self.filled..self.filled + head.len()].copy_from_slice(head);
            self.filled += head.len();
            if self.filled < PREFIX {
                return Ok(());
            }
            self.left = self.announced()?;
            data = rest;
        }
        self.left = self
            .left
            .checked_sub(data.len())
            .ok_or_else(|| Error::invalid("the call carries more than one message, expected one"))?;
        Ok(())
    }

    fn is_whole(&self) -> bool {
        self.filled == PREFIX && self.left == 0
    }

    /// How much a compressed message holds is not known before it is inflated.
    fn is_compressed(&self) -> bool {
        self.prefix[0] == 1
    }

    fn announced(&self) -> Result<usize> {
        let [flag, length @ ..] = self.prefix;
        match flag {
            0 => {}
            1 if self.encoded => {}
            1 => {
                return Err(Error::invalid(
                    "the message is flagged as compressed, but `grpc-encoding` names no encoding",
                ));
            }
            flag => return Err(Error::invalid(format!("the message's compression flag is {flag}, expected 0 or 1"))),
        }
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > self.limit {
            return Err(too_long(length, self.limit));
        }
        Ok(length)
    }

    fn finish(&self) -> Result<()> {
        match (self.filled, self.left) {
            (0, _) => Err(Error::invalid("the call carries no message, expected one")),
            (PREFIX, 0) => Ok(()),
            (PREFIX, left) => Err(Error::invalid(format!("the message is cut short by {left} bytes"))),
            _ => Err(Error::invalid("the message is cut short inside its length prefix")),
        }
    }
}

/// Refuses a message that says, with its prefix, how long it will be.
pub(super) fn check_announced(bytes: usize, limit: usize) -> Result<()> {
    match bytes.checked_sub(PREFIX).filter(|length| *length > limit) {
        Some(length) => Err(too_long(length, limit)),
        None => Ok(()),
    }
}

fn too_long(found: usize, limit: usize) -> Error {
    Error::too_large(format!("message of {found} bytes, expected at most {limit}"))
}

/// For a place to encode a long answer in.
pub(super) type Waiting = Pin<Box<dyn Future<Output = Place> + Send>>;

/// An answer's body. It and its pieces hold the request's place until the last byte is written.
pub(super) struct Outward<B> {
    inner: B,
    /// Of the last frame: handed over piece by piece, as HTTP/2 asks for the next one before it has sent the last.
    rest: Bytes,
    /// Where the first frame takes long: for a place to encode it in.
    waiting: Option<Waiting>,
    permit: Arc<Permit>,
}

impl<B> Outward<B> {
    /// A long answer is encoded in one of the `places`.
    pub(super) fn new(inner: B, permit: Permit, places: Option<Arc<Places>>) -> Outward<B> {
        let waiting = places.map(Places::wait);
        Outward { inner, rest: Bytes::new(), waiting, permit: Arc::new(permit) }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Outward<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        if this.rest.is_empty() {
            // Free again once the frame is encoded.
            let place = this.waiting.as_mut().map(|waiting| waiting.as_mut().poll(cx));
            let place = match place {
                Some(Poll::Pending) => return Poll::Pending,
                taken => taken,
            };
            this.waiting = None;
            let mut next = || Pin::new(&mut this.inner).poll_frame(cx);
            match ready!(if place.is_some() { at_length(next) } else { next() }) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return Poll::Ready(end),
            }
        }
        Poll::Ready(Some(Ok(Frame::data(common::piece(&mut this.rest, &this.permit)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.rest.is_empty() { self.inner.size_hint() } else { SizeHint::default() }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Instant;

    use http_body_util::{BodyExt, Full};
    use proptest::prelude::*;

    use super::*;
    use crate::request::{Budget, BudgetConfig};

    fn followed(framing: &mut Framing, chunks: &[&[u8]]) -> Result<()> {
        chunks.iter().try_for_each(|chunk| framing.follow(chunk))?;
        framing.finish()
    }

    fn message(length: usize) -> Vec<u8> {
        let mut wire = vec![0];
        wire.extend(u32::try_from(length).unwrap().to_be_bytes());
        wire.resize(PREFIX + length, 7);
        wire
    }

    #[test]
    fn one_whole_message_passes_and_nothing_else() {
        let follow = |wire: &[u8]| followed(&mut Framing::new(10, false), &[wire]).map_err(|error| error.kind());
        assert_eq!(follow(&message(10)), Ok(()));
        assert_eq!(follow(&message(0)), Ok(()));
        assert_eq!(follow(&message(11)), Err(Kind::TooLarge));
        assert_eq!(follow(&[0, 0xff, 0xff, 0xff, 0xff]), Err(Kind::TooLarge));
        assert_eq!(follow(&[]), Err(Kind::InvalidInput));
        assert_eq!(follow(&message(10)[..4]), Err(Kind::InvalidInput));
        assert_eq!(follow(&message(10)[..14]), Err(Kind::InvalidInput));
        assert_eq!(follow(&[message(3), message(3)].concat()), Err(Kind::InvalidInput));
        assert_eq!(follow(&[2, 0, 0, 0, 0]), Err(Kind::InvalidInput));
        assert_eq!(follow(&[1, 0, 0, 0, 0]), Err(Kind::InvalidInput));
        assert!(followed(&mut Framing::new(10, true), &[&[1, 0, 0, 0, 1, 9]]).is_ok());
    }

    proptest! {
        #[test]
        fn chunking_changes_nothing(length in 0usize..12, extra in 0usize..3, sizes in proptest::collection::vec(0usize..4, 0..20)) {
            let mut wire = message(length);
            wire.truncate(wire.len() + 1 - extra.min(1));
            wire.extend(vec![0; extra]);
            let (mut rest, mut chunks) = (&wire[..], Vec::new());
            for size in sizes {
                let (chunk, after) = rest.split_at(size.min(rest.len()));
                chunks.push(chunk);
                rest = after;
            }
            chunks.push(rest);
            let whole = followed(&mut Framing::new(8, false), &[&wire]).map_err(|error| error.kind());
            let parts = followed(&mut Framing::new(8, false), &chunks).map_err(|error| error.kind());
            prop_assert_eq!(whole, parts);
        }
    }

    /// As a client's frames arrive, each in a poll of its own.
    struct Arriving(VecDeque<Frame<Bytes>>, bool);

    impl Body for Arriving {
        type Data = Bytes;
        type Error = Status;
        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            self.1 = !self.1;
            if self.1 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Poll::Ready(self.0.pop_front().map(Ok))
        }
    }

    #[tokio::test]
    async fn a_long_message_that_ends_with_trailers_is_decoded_in_a_place() {
        let frames = [Frame::data(message(LONG + 1).into()), Frame::trailers(http::HeaderMap::new())];
        let intake = Intake::default();
        let body = Arriving(frames.into(), false);
        let mut body = Inward::new(body, Framing::new(2 * LONG, false), Duration::MAX, intake.clone());
        let (places, seen) = (Places::new(1), Mutex::new(Vec::new()));
        let reading = async {
            while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                seen.lock().unwrap().push((frame.unwrap().is_trailers(), places.free()));
            }
        };
        intake.follow(reading, &places).await.unwrap();
        assert_eq!(*seen.lock().unwrap(), [(false, 0), (true, 0)], "no place is free while either goes on");
    }

    /// Never gives a frame, never ends.
    struct Stalled;
    impl Body for Stalled {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }

    fn permit(max_bytes: usize) -> (Arc<Budget>, Permit) {
        let budget = Budget::new(BudgetConfig { max_requests: 1, max_bytes, ..BudgetConfig::default() });
        let permit = budget.admit(0, Instant::now()).unwrap();
        (budget, permit)
    }

    #[tokio::test]
    async fn the_permit_grows_with_the_body_and_bounds_it() {
        for (max_bytes, refused) in [(15, None), (14, Some(Kind::Overloaded))] {
            let (budget, permit) = permit(max_bytes);
            let intake = Intake::new(Some(permit), None);
            let body = Full::new(Bytes::from(message(10)));
            let body = Inward::new(body, Framing::new(10, false), Duration::MAX, intake.clone());
            assert_eq!(body.collect().await.is_err(), refused.is_some());
            let ending = intake.end();
            assert_eq!(ending.refused.map(|error| error.kind()), refused);
            assert_eq!(budget.bytes(), if refused.is_some() { 0 } else { 15 });
            drop(intake.take().unwrap());
            assert_eq!((budget.requests(), budget.bytes()), (0, 0));
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_long_message_is_decoded_in_a_place_of_its_own() {
        for (length, compressed, waits) in [(LONG - PREFIX, false, false), (LONG, false, true), (1, true, true)] {
            let intake = Intake::default();
            let mut wire = message(length);
            wire[0] = u8::from(compressed);
            let body = Full::new(Bytes::from(wire));
            let body = Inward::new(body, Framing::new(LONG, compressed), Duration::MAX, intake.clone());
            let places = Places::new(0);
            let mut call = pin!(intake.follow(body.collect(), &places));
            let early = poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx))).await;
            assert_eq!(early.is_pending(), waits, "{length}");
            if waits {
                places.add(1);
                assert_eq!(call.await.unwrap().unwrap().to_bytes().len(), PREFIX + length);
            }
        }
    }

    /// As on a stream whose client does not read its answers.
    #[tokio::test(start_paused = true)]
    async fn a_message_that_nobody_follows_any_more_is_given_no_place() {
        let places = Places::new(0);
        let follow = || async {
            let intake = Intake::default();
            let body = Full::new(Bytes::from(message(LONG)));
            let body = Inward::new(body, Framing::new(LONG, false), Duration::MAX, intake.clone());
            intake.follow(body.collect(), &places).await.unwrap().unwrap().to_bytes().len()
        };
        let (mut stalled, mut waiting) = (pin!(follow()), pin!(follow()));
        for call in [&mut stalled, &mut waiting] {
            assert!(poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx))).await.is_pending());
        }
        places.add(1);
        // The clock is paused: it ends once nothing else can move.
        let decoded = tokio::time::timeout(Duration::from_secs(1), waiting).await.expect("a place");
        assert_eq!((decoded, places.free()), (PREFIX + LONG, 1));
        assert_eq!(stalled.await, PREFIX + LONG);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_nobody_writes_is_given_no_place() {
        let places = Places::new(0);
        let mut unwritten = Arc::clone(&places).wait();
        assert!(poll_fn(|cx| Poll::Ready(unwritten.as_mut().poll(cx))).await.is_pending());
        places.add(1);
        drop(tokio::time::timeout(Duration::from_secs(1), places.take()).await.expect("a place"));
        drop(unwritten.await);
        assert_eq!(places.free(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_place_past_the_callers_deadline() {
        const TIMEOUT: Duration = Duration::from_secs(3600);
        let intake = Intake::new(None, Some(TIMEOUT));
        let body = Full::new(Bytes::from(message(LONG)));
        let body = Inward::new(body, Framing::new(LONG, false), Duration::MAX, intake.clone());
        let (places, began) = (Places::new(0), tokio::time::Instant::now());
        let followed = intake.follow(body.collect(), &places);
        let followed = tokio::time::timeout(2 * TIMEOUT, followed).await.expect("an end at the deadline");
        assert_eq!(followed.unwrap_err(), common::expired());
        assert!(began.elapsed() >= TIMEOUT);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_long_answer_is_encoded_in_a_place_of_its_own() {
        let answer = |places| {
            let (_, permit) = permit(0);
            Outward::new(tonic::body::Body::new(Full::new(Bytes::from(message(LONG)))), permit, places)
        };
        assert_eq!(answer(None).collect().await.unwrap().to_bytes().len(), PREFIX + LONG);

        let places = Places::new(0);
        let mut long = answer(Some(Arc::clone(&places)));
        let early = poll_fn(|cx| Poll::Ready(Pin::new(&mut long).poll_frame(cx))).await;
        assert!(early.is_pending());
        places.add(1);
        let first = long.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(places.free(), 1, "free for the next before this one is sent");
        assert_eq!(first.len() + long.collect().await.unwrap().to_bytes().len(), PREFIX + LONG);
    }

    /// Gives these, and then nothing.
    struct Parts(VecDeque<Bytes>);
    impl Body for Parts {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0.pop_front().map_or(Poll::Pending, |part| Poll::Ready(Some(Ok(Frame::data(part)))))
        }
    }

    #[tokio::test]
    async fn how_long_a_message_is_shows_when_half_of_it_is_here() {
        let (first, rest) = (Bytes::from(message(1000)).slice(..PREFIX), Bytes::from(message(1000)).slice(PREFIX..));
        for (more, given) in [(0, 0), (497, 0), (498, 2), (999, 2)] {
            let parts = Parts([first.clone(), rest.slice(..more)].into());
            let mut body = Inward::new(parts, Framing::new(LONG, false), Duration::MAX, Intake::default());
            let mut frames = 0;
            while poll_fn(|cx| Poll::Ready(Pin::new(&mut body).poll_frame(cx))).await.is_ready() {
                frames += 1;
            }
            assert_eq!(frames, given, "{more}");
        }
    }

    #[tokio::test]
    async fn a_stalled_body_is_cut() {
        let intake = Intake::default();
        let mut body = Inward::new(Stalled, Framing::new(10, false), Duration::ZERO, intake.clone());
        assert!(body.frame().await.unwrap().is_err());
        assert_eq!(intake.end().refused.unwrap().kind(), Kind::RequestTimeout);
    }
}
