//! A stream whose client must finish what it begins to say in time, and take what it is told.
//!
//! hyper's own header timeout starts only when it has told HTTP/1 from HTTP/2 by the first bytes, and then also runs
//! while a kept-alive connection is idle. So hyper's is set to how long a connection may be idle, and this one bounds
//! the rest: the first bytes after connecting, and an HTTP/1 request head once its first byte has come. A head begun
//! while another request is being served cannot be told from that one's body here: it has hyper's time. The socket must
//! take more from time to time, or its client would hold its place, and what is written for it, for as long as it likes.
//! What HTTP/2's own flow control holds back is seen by `untaken`.

use std::future::Future;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::ConnectionLimits;

/// What an HTTP/2 client sends first (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the service and the connection's owner know of the stream, and it of them.
#[derive(Default)]
pub(super) struct Heads {
    /// Request heads that were read whole.
    read: AtomicUsize,
    /// Requests whose answers are not written yet.
    serving: AtomicUsize,
    /// The protocol is known.
    decided: AtomicBool,
}

impl Heads {
    /// A request's head was read; the guard lives until its answer is written.
    pub(super) fn begin(self: &Arc<Self>) -> Serving {
        self.serving.fetch_add(1, Ordering::Relaxed);
        self.read.fetch_add(1, Ordering::Relaxed);
        Serving(Arc::clone(self))
    }

    /// Whether the client has said enough to tell its protocol. Until then nothing of it was accepted.
    pub(super) fn decided(&self) -> bool {
        self.decided.load(Ordering::Relaxed)
    }
}

pub(super) struct Serving(Arc<Heads>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.serving.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Said {
    /// So many bytes, all of which agree with [`PREFACE`].
    Preface(usize),
    Http1,
    /// Silence and slowness are found by hyper's pings.
    Http2,
}

/// Reading and writing fail with [`ErrorKind::TimedOut`] when the client is too slow.
pub(super) struct PromptStream<S> {
    stream: S,
    said: Said,
    heads: Arc<Heads>,
    head_timeout: Duration,
    write_timeout: Duration,
    /// When the head that is being sent must be whole, and how many heads had been read before it.
    due: Option<(Pin<Box<Sleep>>, usize)>,
    /// When the client must have taken some of what is written.
    taken_due: Option<Pin<Box<Sleep>>>,
}

impl<S> PromptStream<S> {
    pub(super) fn new(stream: S, limits: &ConnectionLimits, heads: Arc<Heads>) -> Self {
        PromptStream {
            stream,
            said: Said::Preface(0),
            heads,
            head_timeout: limits.header_timeout,
            write_timeout: limits.write_timeout,
            due: Some((Box::pin(tokio::time::sleep(limits.header_timeout)), 0)),
            taken_due: None,
        }
    }

    fn received(&mut self, bytes: &[u8]) {
        if let Said::Preface(matched) = self.said {
            let expected = &PREFACE[matched..];
            let length = expected.len().min(bytes.len());
            let agrees = expected[..length] == bytes[..length];
            self.said = match matched + length {
                _ if !agrees => Said::Http1,
                matched if matched == PREFACE.len() => Said::Http2,
                matched => Said::Preface(matched),
            };
            self.heads.decided.store(!matches!(self.said, Said::Preface(_)), Ordering::Relaxed);
        }
        match self.said {
            Said::Http2 => self.due = None,
            // Empty lines before a head are none of it (RFC 9112 §2.2).
            Said::Http1 if bytes.iter().all(|byte| b"\r\n".contains(byte)) => {}
            Said::Http1 if self.due.is_none() && self.heads.serving.load(Ordering::Relaxed) == 0 => {
                let read = self.heads.read.load(Ordering::Relaxed);
                self.due = Some((Box::pin(tokio::time::sleep(self.head_timeout)), read));
            }
            Said::Http1 | Said::Preface(_) => {}
        }
    }

    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        match &mut self.due {
            Some((due, _)) => due.as_mut().poll(cx).is_ready(),
            None => false,
        }
    }

    /// What a write came to, or an error if the client has taken nothing for too long.
    fn progressed<T>(&mut self, written: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.taken_due = None;
            return written;
        }
        let due = self.taken_due.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.write_timeout)));
        due.as_mut().poll(cx).map(|()| Err(ErrorKind::TimedOut.into()))
    }

    /// Forgets the head that has been read whole since.
    fn settle(&mut self) {
        let read = self.heads.read.load(Ordering::Relaxed);
        self.due.take_if(|(_, before)| *before != read);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PromptStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.settle();
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        match read {
            Poll::Pending if self.is_late(cx) => return Poll::Ready(Err(ErrorKind::TimedOut.into())),
            Poll::Ready(Ok(())) if buf.filled().len() > before => self.received(&buf.filled()[before..]),
            Poll::Pending | Poll::Ready(_) => {}
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PromptStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.progressed(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.progressed(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.progressed(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    const TIMEOUT: Duration = Duration::from_secs(10);
    const NEARLY: Duration = Duration::from_secs(9);

    const LIMITS: ConnectionLimits = ConnectionLimits {
        connections: 1,
        streams: 1,
        header_timeout: TIMEOUT,
        idle_timeout: TIMEOUT,
        write_timeout: TIMEOUT,
    };

    fn pair() -> (DuplexStream, PromptStream<DuplexStream>, Arc<Heads>) {
        let (client, server) = duplex(1024);
        let heads = Arc::default();
        (client, PromptStream::new(server, &LIMITS, Arc::clone(&heads)), heads)
    }

    async fn read(stream: &mut PromptStream<DuplexStream>) -> io::Result<usize> {
        stream.read(&mut [0; 1024]).await
    }

    fn assert_late(read: io::Result<usize>) {
        assert_eq!(read.unwrap_err().kind(), ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_and_half_a_preface_run_out_of_time() {
        let (_client, mut stream, heads) = pair();
        assert_late(read(&mut stream).await);
        assert!(!heads.decided());
        let (mut client, mut stream, heads) = pair();
        client.write_all(&PREFACE[..5]).await.unwrap();
        read(&mut stream).await.unwrap();
        assert_late(read(&mut stream).await);
        assert!(!heads.decided());
    }

    #[tokio::test(start_paused = true)]
    async fn every_http1_head_has_its_own_time_and_idling_takes_none() {
        let (mut client, mut stream, heads) = pair();
        for _ in 0..3 {
            client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
            read(&mut stream).await.unwrap();
            tokio::time::sleep(NEARLY).await;
            client.write_all(b"\r\n").await.unwrap();
            read(&mut stream).await.unwrap();
            let serving = heads.begin();
            // A body may take longer: it has a deadline of its own.
            assert!(tokio::time::timeout(3 * TIMEOUT, read(&mut stream)).await.is_err());
            drop(serving);
            client.write_all(b"\r\n").await.unwrap();
            read(&mut stream).await.unwrap();
            assert!(tokio::time::timeout(3 * TIMEOUT, read(&mut stream)).await.is_err());
        }
        client.write_all(b"G").await.unwrap();
        read(&mut stream).await.unwrap();
        assert_late(read(&mut stream).await);
    }

    #[tokio::test(start_paused = true)]
    async fn http2_is_left_to_its_pings() {
        let (mut client, mut stream, heads) = pair();
        client.write_all(PREFACE).await.unwrap();
        read(&mut stream).await.unwrap();
        assert!(heads.decided());
        assert!(tokio::time::timeout(3 * TIMEOUT, read(&mut stream)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_must_be_taken() {
        let (mut client, mut stream, _) = pair();
        for _ in 0..3 {
            // As much as the pipe holds: the next byte waits until the client has read.
            stream.write_all(&[0; 1024]).await.unwrap();
            assert!(tokio::time::timeout(NEARLY, stream.write(&[0])).await.is_err());
            client.read_exact(&mut [0; 1024]).await.unwrap();
        }
        stream.write_all(&[0; 1024]).await.unwrap();
        assert_late(stream.write(&[0]).await);
    }
}
