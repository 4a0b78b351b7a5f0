//! `grpc.health.v1`: the server's readiness under the service's name and under the empty one.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::codegen::tokio_stream::Stream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::intake::Intake;
use super::{SERVICE, status_of};
use crate::engine::Engine;
use crate::error::{Error, Kind, Result, quoted};
use crate::request::Phase;

/// Watches open at once on the whole server.
pub(super) const MAX_WATCHES: usize = 1024;

pub(super) struct HealthService {
    engine: Arc<Engine>,
    places: Arc<Semaphore>,
}

impl HealthService {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        HealthService { engine, places: Arc::new(Semaphore::new(MAX_WATCHES)) }
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Intake::reach(&request)?;
        known(&request.get_ref().service)?;
        Ok(Response::new(answer(self.engine.ready())))
    }

    type WatchStream = Watch;

    /// The state now and after every change, until the server drains.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Watch>, Status> {
        Intake::reach(&request)?;
        known(&request.get_ref().service)?;
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            status_of(&Error::new(Kind::RateLimited, format!("more than {MAX_WATCHES} health watches are open")))
        })?;
        let state = Next::Look(self.engine.watch_phase());
        Ok(Response::new(Watch { engine: Arc::clone(&self.engine), next: state, last: None, _place: place }))
    }
}

fn known(service: &str) -> Result<(), Status> {
    if service.is_empty() || service == SERVICE {
        return Ok(());
    }
    let message = format!("unknown service '{}', expected '{SERVICE}' or ''", quoted(service));
    Err(status_of(&Error::not_found(message)))
}

fn answer(ready: bool) -> HealthCheckResponse {
    let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
    HealthCheckResponse { status: status.into() }
}

/// One open watch. Ends when the server drains, so that it never holds an exit.
pub(super) struct Watch {
    engine: Arc<Engine>,
    next: Next,
    last: Option<bool>,
    _place: OwnedSemaphorePermit,
}

enum Next {
    Look(watch::Receiver<Phase>),
    /// `None` once the phase can change no more.
    Wait(Pin<Box<dyn Future<Output = Option<watch::Receiver<Phase>>> + Send>>),
    End,
}

impl Stream for Watch {
    type Item = Result<HealthCheckResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            match &mut this.next {
                Next::End => return Poll::Ready(None),
                Next::Wait(change) => {
                    let phases = ready!(change.as_mut().poll(cx));
                    this.next = phases.map_or(Next::End, Next::Look);
                }
                Next::Look(phases) => {
                    // Marked as seen before readiness is read: a change in between is looked at again.
                    let phase = *phases.borrow_and_update();
                    let ready = this.engine.ready();
                    if this.last != Some(ready) {
                        this.last = Some(ready);
                        return Poll::Ready(Some(Ok(answer(ready))));
                    }
                    let mut phases = phases.clone();
                    this.next = if phase >= Phase::Draining {
                        Next::End
                    } else {
                        Next::Wait(Box::pin(async move { phases.changed().await.is_ok().then_some(phases) }))
                    };
                }
            }
        }
    }
}
