//! A listener with a thread and a runtime of its own, so that it answers whatever the data plane is doing.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use tokio::sync::watch;

use super::ServerError;
use super::accept::{ConnectionLimits, Connections, Wire};
use crate::protocol::Service;
use crate::request::Phase;

/// Few and patient: scrapers, probes and operators, not clients.
const LIMITS: ConnectionLimits = ConnectionLimits {
    connections: 64,
    streams: 16,
    header_timeout: Duration::from_secs(5),
    idle_timeout: Duration::from_secs(120),
    write_timeout: Duration::from_secs(10),
};

/// Serves `router` on a new thread until the phase is [`Phase::Stopped`]. Returns the bound address once connections are
/// accepted by the kernel.
pub(super) fn spawn(
    plane: &'static str,
    address: SocketAddr,
    router: Router,
    mut phase: watch::Receiver<Phase>,
) -> Result<SocketAddr, ServerError> {
    let listener = std::net::TcpListener::bind(address)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|error| ServerError::Bind { plane, address, error })?;
    let bound = listener.local_addr().unwrap_or(address);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServerError::Start)?;
    let listener = {
        let _entered = runtime.enter();
        tokio::net::TcpListener::from_std(listener).map_err(|error| ServerError::Bind { plane, address, error })?
    };
    let run = move || {
        runtime.block_on(async move {
            let connections = Connections::new();
            // Never told to drain: when the process has stopped, the runtime goes and the connections with it.
            let (_drain, draining) = watch::channel(false);
            connections.accept(listener, Wire::Http, Service::routed(router), &LIMITS, draining);
            // An error is the end of who tells the phases.
            let _ = phase.wait_for(|phase| *phase == Phase::Stopped).await;
        });
    };
    std::thread::Builder::new().name(plane.into()).spawn(run).map_err(ServerError::Start)?;
    Ok(bound)
}
