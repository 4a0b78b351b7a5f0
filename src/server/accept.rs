//! The data plane's accept loops and connection tasks.
//!
//! hyper is driven here rather than through `axum::serve`, which has no header-read timeout, no connection limit and
//! no way to abort a connection that never finishes. Invariant: every connection task is owned by [`Connections`] and
//! is gone when [`Connections::finish`] returns.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Open connections per listener; more wait in the kernel's backlog.
    pub connections: usize,
    /// Concurrent HTTP/2 streams per connection.
    pub streams: u32,
    /// How long a client may take to send a request's head.
    pub header_timeout: Duration,
}

/// Most header fields of one request, and most bytes of its head.
const MAX_HEADERS: usize = 100;
const MAX_HEAD_BYTES: usize = 16 << 10;
/// How long a connection may stay silent before HTTP/2 asks whether anybody is there, and how long it waits then.
const PING_AFTER: Duration = Duration::from_secs(60);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
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
    tasks: Arc<tokio::sync::Mutex<JoinSet<()>>>,
    accepting: std::sync::Mutex<JoinSet<()>>,
}

impl Connections {
    pub(super) fn new() -> Self {
        Connections { tasks: Arc::default(), accepting: std::sync::Mutex::default() }
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
        let connection = Connection { wire, router, builder: builder(wire, limits), draining: draining.clone() };
        let places = Arc::new(Semaphore::new(limits.connections));
        let tasks = Arc::clone(&self.tasks);
        let mut accepting = self.accepting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        accepting.spawn(async move {
            let mut draining = draining;
            tokio::select! {
                () = super::told(&mut draining) => {}
                () = accept_forever(listener, places, tasks, connection) => {}
            }
        });
    }

    /// Waits for the accept loops and then the connections to end; cuts what is left at the deadline. Returns how many.
    pub(super) async fn finish(self, deadline: Instant) -> usize {
        let mut accepting = self.accepting.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        while accepting.join_next().await.is_some() {}
        let mut tasks = self.tasks.lock().await;
        let all_ended = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout_at(deadline.into(), all_ended).await.is_ok() {
            return 0;
        }
        let left = tasks.len();
        tasks.shutdown().await;
        left
    }
}

async fn accept_forever(
    listener: TcpListener,
    places: Arc<Semaphore>,
    tasks: Arc<tokio::sync::Mutex<JoinSet<()>>>,
    connection: Connection,
) {
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let connection = connection.clone();
        let mut tasks = tasks.lock().await;
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            connection.serve(stream).await;
            drop(place);
        });
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
        .header_read_timeout(limits.header_timeout)
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
    draining: watch::Receiver<bool>,
}

impl Connection {
    async fn serve(mut self, stream: TcpStream) {
        // Small answers must not wait for a client's delayed acknowledgement.
        let _ = stream.set_nodelay(true);
        let router = self.router;
        let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
            let router = router.clone();
            async move {
                Ok::<_, Infallible>(
                    router.oneshot(request.map(axum::body::Body::new)).await.unwrap_or_else(|never| match never {}),
                )
            }
        });
        let serving = self.builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(serving);
        let ended = tokio::select! {
            ended = serving.as_mut() => ended,
            () = super::told(&mut self.draining) => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, wire = ?self.wire, "a connection ended early");
        }
    }
}
