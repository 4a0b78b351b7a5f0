//! The data plane's accept loops and connection tasks.
//!
//! hyper is driven here rather than through `axum::serve`, which has no header-read timeout, no connection limit and
//! no way to abort a connection that never finishes. Invariant: every connection task is owned by [`Connections`] and
//! is gone when [`Connections::finish`] returns.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

use super::prompt::{Heads, PromptStream};

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
    /// How long a client may take none of an answer that is ready for it.
    pub write_timeout: Duration,
}

/// Most header fields of one request, and most bytes of its head.
const MAX_HEADERS: usize = 100;
const MAX_HEAD_BYTES: usize = 16 << 10;
/// How long a connection may stay silent before HTTP/2 asks whether anybody is there, and how long it waits then.
const PING_AFTER: Duration = Duration::from_secs(60);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long connections are served on once the drain begins, before hyper closes those that it takes for idle: a request
/// may lie in a socket unread. No less than a turn of the reactor, in which the sockets report it.
const LAST_LOOK: Duration = Duration::from_millis(20);
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

    /// Accepts on `listener` until `draining` turns true.
    pub(super) fn accept(
        &self,
        listener: TcpListener,
        wire: Wire,
        router: Router,
        limits: &ConnectionLimits,
        draining: watch::Receiver<bool>,
    ) {
        let mut stop = draining.clone();
        let connection = Connection { wire, router, builder: builder(wire, limits), limits: limits.clone(), draining };
        let tasks = Arc::clone(&self.tasks);
        lock(&self.accepting).spawn(async move {
            tokio::select! {
                () = super::told(&mut stop) => {}
                () = accept_forever(listener, tasks, connection) => {}
            }
        });
    }

    /// Waits for the accept loops and then the connections to end; cuts what is left at the deadline. Returns how many.
    pub(super) async fn finish(self, deadline: Instant) -> usize {
        let mut accepting = std::mem::take(&mut *lock(&self.accepting));
        while accepting.join_next().await.is_some() {}
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        let all_ended = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout_at(deadline.into(), all_ended).await.is_ok() {
            return 0;
        }
        let left = tasks.len();
        tasks.shutdown().await;
        left
    }
}

/// Nothing that holds these locks can panic half-way: they are sets of tasks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept_forever(listener: TcpListener, tasks: Arc<Mutex<JoinSet<()>>>, connection: Connection) {
    let places = Arc::new(Semaphore::new(connection.limits.connections.min(Semaphore::MAX_PERMITS)));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            // From here to the task there is no point at which a drain could lose the stream.
            Ok((stream, _)) => {
                let connection = connection.clone();
                let mut tasks = lock(&tasks);
                while tasks.try_join_next().is_some() {}
                tasks.spawn(async move {
                    connection.serve(stream).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
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
        .max_buf_size(MAX_HEAD_BYTES)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .adaptive_window(true)
        .keep_alive_interval(PING_AFTER)
        .keep_alive_timeout(PING_TIMEOUT);
    builder
}

#[derive(Clone)]
struct Connection {
    wire: Wire,
    router: Router,
    builder: auto::Builder<TokioExecutor>,
    limits: ConnectionLimits,
    draining: watch::Receiver<bool>,
}

impl Connection {
    async fn serve(mut self, stream: TcpStream) {
        // Small answers must not wait for a client's delayed acknowledgement.
        let _ = stream.set_nodelay(true);
        let heads = Arc::<Heads>::default();
        let stream = PromptStream::new(stream, &self.limits, Arc::clone(&heads));
        let (router, begun) = (self.router, Arc::clone(&heads));
        let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
            let (router, serving) = (router.clone(), begun.begin());
            async move {
                let answered = router.oneshot(request.map(axum::body::Body::new)).await;
                drop(serving);
                Ok::<_, Infallible>(answered.unwrap_or_else(|never| match never {}))
            }
        });
        let serving = self.builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(serving);
        let looked_again = async {
            super::told(&mut self.draining).await;
            tokio::time::sleep(LAST_LOOK).await;
        };
        let ended = tokio::select! {
            // What the same turn of the reactor brought is read first.
            biased;
            ended = serving.as_mut() => ended,
            () = looked_again => {
                if !heads.decided() {
                    return;
                }
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, wire = ?self.wire, "a connection ended early");
        }
    }
}
