//! `/metrics`, `/livez` and `/readyz` on a thread and runtime of their own.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::sync::watch;

use super::ServerError;
use super::plane;
use crate::engine::Engine;
use crate::monitor::{Monitor, events};
use crate::request::Phase;

/// What the observation plane looks at.
#[derive(Clone)]
pub(super) struct Probe {
    pub(super) monitor: Arc<Monitor>,
    pub(super) phase: watch::Receiver<Phase>,
}

pub(super) struct Observation {
    address: SocketAddr,
    engine: Arc<OnceLock<Arc<Engine>>>,
}

impl Observation {
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on `/metrics` shows what is in flight.
    pub(super) fn attach(&self, engine: Arc<Engine>) {
        // Attached once, by the one start of the server.
        let _ = self.engine.set(engine);
    }
}

#[derive(Clone)]
struct Shared {
    probe: Probe,
    engine: Arc<OnceLock<Arc<Engine>>>,
}

pub(super) fn spawn(address: SocketAddr, probe: Probe) -> Result<Observation, ServerError> {
    let engine = Arc::new(OnceLock::new());
    let shared = Shared { probe: probe.clone(), engine: Arc::clone(&engine) };
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .with_state(shared);
    let address = plane::spawn("observation", address, router, probe.phase)?;
    Ok(Observation { address, engine })
}

async fn metrics(State(shared): State<Shared>) -> impl IntoResponse {
    if let Some(engine) = shared.engine.get() {
        let (requests, bytes) = engine.in_flight();
        let (pool_queued, pool_running) = (engine.cpu().pending(), engine.cpu().ongoing());
        events::InFlight { requests, bytes, pool_queued, pool_running }.emit(&shared.probe.monitor);
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], shared.probe.monitor.render())
}

async fn live() -> &'static str {
    "live\n"
}

async fn ready(State(shared): State<Shared>) -> (StatusCode, String) {
    let phase = *shared.probe.phase.borrow();
    let status = if phase == Phase::Ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, format!("{}\n", phase.label()))
}
