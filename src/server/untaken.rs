//! Answers that a connection has been given and whose client has not taken them yet.
//!
//! HTTP/2 has flow control of its own above the socket's: a client can keep a stream's window shut on a connection that
//! is otherwise well, and so keep the answer's memory and its place in the server. So each answer notes when some of it
//! last moved, and the connection's owner acts on one that stands still. An answer that has nothing to give yet is not
//! its client's to take.
//!
//! Invariant: an answer is listed until its body and every byte of it that the connection buffered are gone.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

/// The answers of one connection; as many at most as it has concurrent streams.
#[derive(Default)]
pub(super) struct Untaken(Mutex<State>);

#[derive(Default)]
struct State {
    next: u64,
    answers: HashMap<u64, Progress>,
}

struct Progress {
    /// When the connection last took some of it.
    moved: Instant,
    /// Pieces in the connection's buffers.
    buffered: usize,
    /// The body was asked for more and has none yet.
    empty: bool,
}

impl Untaken {
    /// Lists an answer. `held` is kept as long as it is listed.
    pub(super) fn follow<B, H>(self: &Arc<Self>, body: B, held: H) -> Followed<B, H> {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.answers.insert(id, Progress { moved: Instant::now(), buffered: 0, empty: false });
        Followed { body, answer: Arc::new(Answer { id, untaken: Arc::clone(self), _held: held }) }
    }

    /// Completes when an answer has stood still for so long.
    pub(super) async fn stands_still(&self, limit: Duration) {
        loop {
            let now = Instant::now();
            // What is listed later cannot be due earlier.
            let due = self.oldest().unwrap_or(now) + limit;
            if due <= now {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }

    fn oldest(&self) -> Option<Instant> {
        let state = self.state();
        let its_clients = state.answers.values().filter(|answer| answer.buffered > 0 || !answer.empty);
        its_clients.map(|answer| answer.moved).min()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No critical section can stop half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Answer<H> {
    id: u64,
    untaken: Arc<Untaken>,
    _held: H,
}

impl<H> Answer<H> {
    /// The connection took something.
    fn note(&self, change: impl FnOnce(&mut Progress)) {
        let now = Instant::now();
        self.change(|progress| {
            progress.moved = now;
            change(progress);
        });
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        if let Some(progress) = self.untaken.state().answers.get_mut(&self.id) {
            change(progress);
        }
    }
}

impl<H> Drop for Answer<H> {
    fn drop(&mut self) {
        self.untaken.state().answers.remove(&self.id);
    }
}

/// An answer's body. The connection asks it for more as the client takes what it was given.
pub(super) struct Followed<B, H> {
    body: B,
    answer: Arc<Answer<H>>,
}

/// Bytes in the connection's buffers: they keep their answer listed and note when some of them are taken.
pub(super) struct Piece<H> {
    bytes: Bytes,
    answer: Arc<Answer<H>>,
}

impl<H> Piece<H> {
    /// Counted by the body that gives it.
    fn new(bytes: Bytes, answer: &Arc<Answer<H>>) -> Piece<H> {
        Piece { bytes, answer: Arc::clone(answer) }
    }
}

impl<H> Drop for Piece<H> {
    fn drop(&mut self) {
        // The last byte has been noted as it was taken; a piece that is dropped with bytes goes with its connection.
        self.answer.change(|progress| progress.buffered -= 1);
    }
}

impl<H> Buf for Piece<H> {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        self.answer.note(|_| {});
    }
}

impl<B, H> Body for Followed<B, H>
where
    B: Body<Data = Bytes> + Unpin,
{
    type Data = Piece<H>;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Piece<H>>, B::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.answer.note(|progress| {
            progress.empty = frame.is_pending();
            progress.buffered += usize::from(matches!(&frame, Poll::Ready(Some(Ok(frame))) if frame.is_data()));
        });
        frame.map_ok(|frame| frame.map_data(|bytes| Piece::new(bytes, &self.answer)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;

    use http_body_util::BodyExt;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);
    const NEARLY: Duration = Duration::from_secs(9);

    /// Gives its frames; `None` is a time of nothing to give.
    struct Script(VecDeque<Option<&'static [u8]>>);

    impl Body for Script {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            match self.0.pop_front() {
                Some(Some(data)) => Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(data))))),
                Some(None) => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                None => Poll::Ready(None),
            }
        }
    }

    fn script(frames: &[Option<&'static [u8]>]) -> Script {
        Script(frames.iter().copied().collect())
    }

    async fn data<H>(answer: &mut Followed<Script, H>) -> Piece<H> {
        answer.frame().await.unwrap().unwrap().into_data().ok().expect("data")
    }

    async fn stands_still_within(untaken: &Untaken, time: Duration) -> bool {
        tokio::time::timeout(time, untaken.stands_still(LIMIT)).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_never_asked_for_stands_still() {
        let untaken = Arc::<Untaken>::default();
        assert!(!stands_still_within(&untaken, 3 * LIMIT).await, "nothing is listed");
        let _answer = untaken.follow(script(&[Some(b"x")]), ());
        assert!(!stands_still_within(&untaken, NEARLY).await);
        assert!(stands_still_within(&untaken, LIMIT).await);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_listed_while_another_is_waited_for_is_seen_when_it_is_due() {
        let untaken = Arc::<Untaken>::default();
        let started = Instant::now();
        let waiting = Arc::clone(&untaken);
        let waiting = tokio::spawn(async move { waiting.stands_still(LIMIT).await });
        tokio::time::sleep(NEARLY).await;
        let _answer = untaken.follow(script(&[]), ());
        waiting.await.unwrap();
        assert_eq!(started.elapsed(), NEARLY + LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn every_frame_taken_starts_the_time_anew() {
        let untaken = Arc::<Untaken>::default();
        let mut answer = untaken.follow(script(&[Some(&b"x"[..]); 3]), ());
        for _ in 0..3 {
            assert!(!stands_still_within(&untaken, NEARLY).await);
            assert!(answer.frame().await.is_some());
        }
        assert!(stands_still_within(&untaken, LIMIT).await);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_with_nothing_to_give_does_not_stand_still_once_all_it_gave_is_taken() {
        let untaken = Arc::<Untaken>::default();
        let mut answer = untaken.follow(script(&[Some(b"given"), None, Some(b"later")]), ());
        let given = data(&mut answer).await;
        let pending = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut answer).poll_frame(cx).is_pending()));
        assert!(pending.await);
        assert!(stands_still_within(&untaken, LIMIT).await, "some is buffered");
        drop(given);
        assert!(!stands_still_within(&untaken, 3 * LIMIT).await);
        let _later = data(&mut answer).await;
        assert!(stands_still_within(&untaken, LIMIT).await);
    }

    #[tokio::test(start_paused = true)]
    async fn every_byte_taken_of_a_piece_starts_the_time_anew() {
        let untaken = Arc::<Untaken>::default();
        let mut answer = untaken.follow(script(&[Some(b"abc")]), ());
        let mut piece = data(&mut answer).await;
        for _ in 0..3 {
            assert!(!stands_still_within(&untaken, NEARLY).await);
            piece.advance(1);
        }
        assert!(stands_still_within(&untaken, LIMIT).await);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_that_are_still_buffered_keep_their_answer_listed_and_what_it_holds() {
        let untaken = Arc::<Untaken>::default();
        let held = Arc::new(());
        let mut answer = untaken.follow(script(&[Some(b"left over")]), Arc::clone(&held));
        let mut piece = data(&mut answer).await;
        assert!(answer.frame().await.is_none());
        drop(answer);
        piece.advance(5);
        assert_eq!((piece.chunk(), Arc::strong_count(&held)), (&b"over"[..], 2));
        assert!(stands_still_within(&untaken, LIMIT).await);
        drop(piece);
        assert_eq!(Arc::strong_count(&held), 1);
        assert!(!stands_still_within(&untaken, 3 * LIMIT).await);
    }
}
