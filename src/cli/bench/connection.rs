//! One caller's way to a server, over any wire.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::time::{Sleep, sleep_until};

use super::http1::Http1;
use super::http2::{Http2, Shared};
use super::wire::{Encoded, Fault, Reply, Wire};

pub(super) enum Connection {
    Rest(Http1),
    Grpc(Http2),
}

impl Connection {
    pub(super) async fn connect(&mut self) -> Result<(), Fault> {
        match self {
            Connection::Rest(rest) => rest.connect().await,
            Connection::Grpc(grpc) => grpc.connect().await,
        }
    }

    pub(super) async fn call(&mut self, request: &Encoded, reply: Option<&mut Reply>) -> Result<(), Fault> {
        match self {
            Connection::Rest(rest) => rest.call(&request.0, reply).await,
            Connection::Grpc(grpc) => grpc.call(&request.0, reply).await,
        }
    }
}

/// `callers` ways to a server. Those of gRPC share `connections`; of REST everyone has its own.
pub(super) fn several(
    wire: Wire,
    address: SocketAddr,
    host: &str,
    callers: usize,
    connections: usize,
) -> Result<Vec<Connection>, http::Error> {
    if wire != Wire::Grpc {
        return Ok((0..callers).map(|_| Connection::Rest(Http1::new(address))).collect());
    }
    let shared: Vec<Arc<Shared>> =
        (0..connections.clamp(1, callers.max(1))).map(|_| Shared::new(address, host.to_string())).collect();
    let caller = |number: usize| Ok(Connection::Grpc(Http2::new(&shared[number % shared.len()])?));
    (0..callers).map(caller).collect()
}

/// Ends calls that take too long, at the price of one timer for all of them: it is set again only when it rings.
pub(super) struct Patience {
    limit: Duration,
    bell: Pin<Box<Sleep>>,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Patience {
        Patience { limit, bell: Box::pin(sleep_until((Instant::now() + limit).into())) }
    }

    /// [`Fault::Timeout`] where the call that began at `begun` is not done in time.
    pub(super) async fn hold<T>(
        &mut self,
        begun: Instant,
        call: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let mut call = pin!(call);
        let ends = begun + self.limit;
        poll_fn(|context| {
            if let Poll::Ready(outcome) = call.as_mut().poll(context) {
                return Poll::Ready(outcome);
            }
            while self.bell.as_mut().poll(context).is_ready() {
                if Instant::now() >= ends {
                    return Poll::Ready(Err(Fault::Timeout));
                }
                self.bell.as_mut().reset(ends.into());
            }
            Poll::Pending
        })
        .await
    }
}
