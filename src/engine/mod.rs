//! The request path. [`Engine::infer`] is the whole of it: one line per stage, the same for every protocol.
//!
//! Owns admission, the choice of a version, and the guarantee that every request that was begun is recorded once.
//! Knows nothing of wire formats, batching or engines. Runs on the I/O runtime and never blocks it.

mod describe;
mod trace;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use crate::error::{Error, Kind, Result};
use crate::monitor::{Monitor, events};
use crate::pool::Pool;
use crate::registry::{Registry, Version};
use crate::request::{
    Budget, BudgetConfig, InferRequest, InferResponse, NamedTensor, Origin, Permit, Phase, PredictionId, Prepared,
    Timings,
};
use crate::scheduler::Answer;

pub use describe::{IndexEntry, ModelInfo};
use trace::Trace;

pub struct Engine {
    registry: Arc<Registry>,
    monitor: Arc<Monitor>,
    budget: Arc<Budget>,
    phase: watch::Receiver<Phase>,
    cpu: Pool,
}

impl Engine {
    pub fn new(
        registry: Arc<Registry>,
        monitor: Arc<Monitor>,
        budget: BudgetConfig,
        phase: watch::Receiver<Phase>,
        cpu: Pool,
    ) -> Engine {
        Engine { registry, monitor, budget: Budget::new(budget), phase, cpu }
    }

    /// Takes a place for a request before its body is read. `declared_bytes` is what the client says it will send, 0
    /// where it does not say: it must fit now, and is reserved only as it arrives, by the protocol.
    pub fn admit(&self, origin: Origin, declared_bytes: usize) -> Result<Permit> {
        let phase = self.phase();
        let admitted = if phase.admits() {
            self.budget.admit(declared_bytes, Instant::now())
        } else {
            Err(Error::new(Kind::NotReady, format!("server is not taking requests: it is {}", phase.label())))
        };
        admitted.inspect_err(|error| self.refuse(origin, error))
    }

    /// Records a request that was refused before it reached [`Engine::infer`].
    pub fn refuse(&self, origin: Origin, error: &Error) {
        events::RequestRefused { kind: error.kind(), protocol: origin.protocol }.emit(&self.monitor);
    }

    pub async fn infer(&self, request: InferRequest, permit: Permit) -> Result<InferResponse> {
        let mut trace = Trace::start(&self.monitor, request.origin, permit.arrived());
        let outcome = self.serve(request, permit, &mut trace).await;
        trace.finish(&outcome);
        outcome
    }

    async fn serve(&self, mut request: InferRequest, permit: Permit, trace: &mut Trace<'_>) -> Result<InferResponse> {
        let version = self.registry.table().choose(&request.model)?;
        trace.chose(&version);
        let id = std::mem::take(&mut request.id);
        let prepared = Prepared::check(request, &permit, version.signature(), version.batching())?;
        let reply = Reply { id, wanted: prepared.outputs.clone(), arrived: permit.arrived(), prepared: Instant::now() };
        version.scheduler().submit(prepared, permit).await.map(|answer| reply.fill(answer, &version))
    }

    /// The pool for work on bodies too big for an I/O thread.
    pub fn cpu(&self) -> &Pool {
        &self.cpu
    }

    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub fn watch_phase(&self) -> watch::Receiver<Phase> {
        self.phase.clone()
    }

    /// Requests and bytes of request bodies in the server now.
    pub fn in_flight(&self) -> (usize, usize) {
        (self.budget.requests(), self.budget.bytes())
    }
}

/// What of the request its answer needs, kept while the rest is moved to a worker.
struct Reply {
    id: String,
    /// Positions of the requested outputs in the signature.
    wanted: Vec<usize>,
    arrived: Instant,
    prepared: Instant,
}

impl Reply {
    fn fill(self, answer: Answer, version: &Version) -> InferResponse {
        let Answer { outputs, timings, mut permit } = answer;
        // The inputs are gone: a slow reader of the answer keeps its place, but no bytes.
        permit.release_bytes();
        let specs = &version.signature().outputs;
        let names = self.wanted.iter().map(|position| Arc::clone(&specs[*position].name));
        InferResponse {
            id: self.id,
            prediction: PredictionId(uuid::Uuid::now_v7().as_u128()),
            model: Arc::clone(version.name()),
            version: version.id(),
            digest: Arc::clone(version.digest()),
            outputs: names.zip(outputs).map(|(name, tensor)| NamedTensor { name, tensor }).collect(),
            timings: Timings { prepare: self.prepared.saturating_duration_since(self.arrived), ..timings },
            permit,
        }
    }
}
