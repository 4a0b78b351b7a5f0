//! The data plane's accept loops and connection tasks.
//!
//! hyper is driven here rather than through `axum::serve`, which has no header-read timeout, no connection limit and
//! no way to abort a connection that never finishes. Invariant: every connection task is owned by [`Connections`] and
//! is gone when [`Connections::finish`] returns.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::prompt::{Heads, PromptStream};
use super::untaken::Untaken;
use crate::protocol::{Answering, Service};

#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Open connections per listener; more wait in the kernel's backlog.
    pub connections: usize,
    /// Concurrent HTTP/2 streams per connection.
    pub streams: u32,
    /// How long a client may take to begin to speak, and to send a request's head.
    pub header_timeout: Duration,
    /// How long a connection may be idle between requests. Longer than proxies keep theirs.
    pub idle_timeout: Duration,
    /// How long a client may take nothing of an answer that is ready for it: then its connection gets no new requests, and
    /// is cut after as long again.
    pub write_timeout: Duration,
}

/// Most header fields of one request, and most bytes of its head.
const MAX_HEADERS: usize = 100;
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Bytes that HTTP/1 reads at once where they come fast, and writes: bodies in fewer steps than heads would need. A connection
/// may cost two of them: one that it reads into, and one that a small body of an earlier read keeps.
const MAX_BUFFER_BYTES: usize = 128 << 10;
/// How long a connection may stay silent before HTTP/2 asks whether anybody is there, and how long it waits then.
const PING_AFTER: Duration = Duration::from_secs(60);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long connections are accepted and served on once the drain begins, before hyper closes those that it takes for
/// idle: a connection may wait in the kernel, a request lie in a socket unread. No less than a turn of the reactor, in
/// which the sockets report it.
const LAST_LOOK: Duration = Duration::from_millis(20);
/// Bytes that the kernel takes for a client ahead of what it has sent it. Without a bound it takes megabytes, and says
/// that there is room for more only when a third of them are gone: long after a slow reader has taken something.
#[cfg(target_os = "linux")]
const SEND_AHEAD: u32 = 64 << 10;
/// Bytes that an HTTP/2 client may send ahead of what is read: of one request, and of all of its connection. Windows that
/// adapt themselves answer every message with a ping.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Pause after an accept error such as exhausted file descriptors, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    /// HTTP/1.1, and HTTP/2 by prior knowledge.
    Http,
    /// HTTP/2 only.
    Grpc,
}

/// All connection tasks of the data plane.
pub(super) struct Connections {
    tasks: Arc<Mutex<JoinSet<()>>>,
    accepting: Mutex<JoinSet<()>>,
}

impl Connections {
    pub(super) fn new() -> Self {
        Connections { tasks: Arc::default(), accepting: Mutex::default() }
    }

    /// Accepts on `listener` until `draining` turns true, and then what waits in the kernel while there are places.
    pub(super) fn accept(
        &self,
        listener: TcpListener,
        wire: Wire,
        service: Service,
        limits: &ConnectionLimits,
        draining: watch::Receiver<bool>,
    ) {
        let mut stop = draining.clone();
        let connection = Connection { wire, service, builder: builder(wire, limits), limits: limits.clone(), draining };
        let tasks = Arc::clone(&self.tasks);
        lock(&self.accepting).spawn(async move {
            tokio::select! {
                () = looked_again(&mut stop) => {}
                () = accept_forever(listener, tasks, connection) => {}
            }
        });
    }

    /// Connections that have not ended.
    pub(super) fn open(&self) -> usize {
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.len()
    }

    /// Waits for the accept loops and then the connections to end; cuts what is left at the deadline. Returns how many.
    /// Tells `still` every few seconds how many are open.
    pub(super) async fn finish(self, deadline: Instant, still: impl Fn(usize)) -> usize {
        let mut accepting = std::mem::take(&mut *lock(&self.accepting));
        while accepting.join_next().await.is_some() {}
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        let mut look = super::every_few_seconds();
        let cut = tokio::time::sleep_until(deadline.into());
        tokio::pin!(cut);
        loop {
            tokio::select! {
                biased;
                ended = tasks.join_next() => if ended.is_none() { return 0 },
                () = &mut cut => break,
                _ = look.tick() => still(tasks.len()),
            }
        }
        let left = tasks.len();
        tasks.shutdown().await;
        left
    }
}

/// Completes a last look after the drain has begun.
async fn looked_again(draining: &mut watch::Receiver<bool>) {
    super::told(draining).await;
    tokio::time::sleep(LAST_LOOK).await;
}

/// Nothing that holds these locks can panic half-way: they are sets of tasks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept_forever(listener: TcpListener, tasks: Arc<Mutex<JoinSet<()>>>, connection: Connection) {
    let places = Arc::new(Semaphore::new(connection.limits.connections.min(Semaphore::MAX_PERMITS)));
    let mut failing = false;
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            // From here to the task there is no point at which a drain could lose the stream.
            Ok((stream, _)) => {
                failing = false;
                let connection = connection.clone();
                let mut tasks = lock(&tasks);
                while tasks.try_join_next().is_some() {}
                tasks.spawn(async move {
                    connection.serve(stream).await;
                    drop(place);
                });
            }
            Err(error) => {
                // One line until it works again, however often it is tried.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "cannot accept connections");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn builder(wire: Wire, limits: &ConnectionLimits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    if wire == Wire::Grpc {
        builder = builder.http2_only();
    }
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle_timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_BUFFER_BYTES)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING_AFTER)
        .keep_alive_timeout(PING_TIMEOUT);
    builder
}

#[derive(Clone)]
struct Connection {
    wire: Wire,
    service: Service,
    builder: auto::Builder<TokioExecutor>,
    limits: ConnectionLimits,
    draining: watch::Receiver<bool>,
}

impl Connection {
    async fn serve(mut self, stream: TcpStream) {
        set_options(&stream);
        let (heads, untaken) = (Arc::<Heads>::default(), Arc::<Untaken>::default());
        let stream = PromptStream::new(stream, &self.limits, Arc::clone(&heads));
        let (service, begun, given) = (self.service, Arc::clone(&heads), Arc::clone(&untaken));
        let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
            let request = request.map(axum::body::Body::new);
            let answered = if head_bytes(&request) > MAX_HEAD_BYTES { head_too_large() } else { service.call(request) };
            let (serving, given) = (begun.begin(), Arc::clone(&given));
            async move { Ok::<_, Infallible>(answered.await.map(|body| given.follow(body, serving))) }
        });
        let serving = self.builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(serving);
        let limit = self.limits.write_timeout;
        let still = tokio::select! {
            // What the same turn of the reactor brought is read first.
            biased;
            ended = serving.as_mut() => return self::ended(ended, self.wire),
            () = looked_again(&mut self.draining) => false,
            () = untaken.stands_still(limit) => true,
        };
        if !heads.decided() {
            return;
        }
        // The rest of the connection may be well: it gets no new requests, and time for those it has.
        serving.as_mut().graceful_shutdown();
        let cut = async {
            if still {
                tokio::time::sleep(limit).await;
            }
            untaken.stands_still(limit).await;
        };
        tokio::select! {
            biased;
            ended = serving => self::ended(ended, self.wire),
            () = cut => tracing::debug!(wire = ?self.wire, "a connection was cut: an answer was not taken in time"),
        }
    }
}

/// As sent over HTTP/1, but for what is read and forgotten: the version, a fragment, spaces, a length that is said twice. The
/// buffer bounds these. hyper's own `max_header_size` is not offered by what tells the protocols apart.
fn head_bytes<B>(request: &hyper::Request<B>) -> usize {
    const BETWEEN: usize = ": \r\n".len();
    let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + BETWEEN);
    let uri = request.uri();
    let authority = uri.authority().map_or(0, |authority| authority.as_str().len());
    let target = uri.path_and_query().map_or(0, |target| target.as_str().len());
    request.method().as_str().len() + authority + target + fields.sum::<usize>()
}

/// As hyper answers what is larger than its buffer.
fn head_too_large() -> Answering {
    let mut answer = axum::response::Response::default();
    *answer.status_mut() = hyper::StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
    answer.headers_mut().insert(hyper::header::CONNECTION, hyper::header::HeaderValue::from_static("close"));
    Box::pin(std::future::ready(answer))
}

fn ended<E: std::fmt::Display>(outcome: Result<(), E>, wire: Wire) {
    if let Err(error) = outcome {
        tracing::debug!(%error, ?wire, "a connection ended early");
    }
}

/// Neither can fail in a way that matters: the connection is slower, or its client's progress is seen later.
fn set_options(stream: &TcpStream) {
    // Small answers must not wait for a client's delayed acknowledgement.
    let _ = stream.set_nodelay(true);
    #[cfg(target_os = "linux")]
    let _ = socket2::SockRef::from(stream).set_tcp_notsent_lowat(SEND_AHEAD);
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const LIMITS: ConnectionLimits = ConnectionLimits {
        connections: 8,
        streams: 8,
        header_timeout: PATIENCE,
        idle_timeout: PATIENCE,
        write_timeout: PATIENCE,
    };
    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_connection_that_waits_in_the_kernel_when_the_drain_begins_is_served() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n").await.unwrap();
        let (_drain, draining) = watch::channel(true);
        let connections = Connections::new();
        let router = axum::Router::new().route("/", get(|| async { "served" }));
        connections.accept(listener, Wire::Http, Service::routed(router), &LIMITS, draining);
        assert_eq!(connections.finish(Instant::now() + PATIENCE, |_| {}).await, 0);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("served"), "{answer}");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_slow_reader_is_seen_to_take_something() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        // Of a fixed size: the kernel would take more for a client that reads.
        socket2::SockRef::from(&client).set_recv_buffer_size(64 << 10).unwrap();
        let (server, _) = listener.accept().await.unwrap();
        set_options(&server);
        let has_room = async || tokio::time::timeout(Duration::from_millis(50), server.writable()).await.is_ok();
        while has_room().await {
            while server.try_write(&[0; 64 << 10]).is_ok() {}
        }
        let mut taken = 0;
        while !has_room().await {
            taken += client.read(&mut [0; 16 << 10]).await.unwrap();
        }
        assert!(taken <= 4 * SEND_AHEAD as usize, "room was made only after {taken} bytes");
    }
}
