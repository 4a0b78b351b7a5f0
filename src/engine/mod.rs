//! The request path. [`Engine::infer`] is the whole of it: one line per stage, the same for every protocol.
//!
//! Owns admission, the choice of a version, and the [`Trace`], by which every call that was begun is named and recorded
//! once.
//! Knows nothing of wire formats, batching or engines. Runs on the I/O runtime and never blocks it.

mod control;
mod describe;
mod trace;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::error::{Error, Kind, Result};
use crate::monitor::Monitor;
use crate::pool::Pool;
use crate::registry::{Registry, Version};
use crate::request::{
    Budget, BudgetConfig, InferRequest, InferResponse, NamedTensor, Origin, Permit, Phase, Prepared, Timings,
};
use crate::scheduler::Answer;

pub use crate::monitor::{Compute, Total};
pub use crate::registry::{Device, VersionPolicy};
pub use describe::{IndexEntry, ModelInfo, Setup, Sharing, VersionStatistics};
pub use trace::Trace;

pub struct Engine {
    registry: Arc<Registry>,
    monitor: Arc<Monitor>,
    budget: Arc<Budget>,
    load_timeout: Duration,
    phase: watch::Receiver<Phase>,
    cpu: Pool,
}

impl Engine {
    pub fn new(
        registry: Arc<Registry>,
        monitor: Arc<Monitor>,
        budget: BudgetConfig,
        load_timeout: Duration,
        phase: watch::Receiver<Phase>,
        cpu: Pool,
    ) -> Engine {
        Engine { registry, monitor, budget: Budget::new(budget), load_timeout, phase, cpu }
    }

    /// Begins an inference call, before anything of it is read: deadlines and durations count from here.
    pub fn begin(&self, origin: Origin) -> Trace {
        Trace::begin(&self.monitor, origin)
    }

    /// Takes a place for a request before its body is read. `declared_bytes` is what the client says it will send, 0
    /// where it does not say: it must fit now, and is reserved only as it arrives, by the protocol.
    pub fn admit(&self, trace: &Trace, declared_bytes: usize) -> Result<Permit> {
        let phase = self.phase();
        if !phase.admits() {
            let message = format!("server is not taking requests: it is {}", phase.label());
            return Err(Error::new(Kind::NotReady, message));
        }
        self.budget.admit(declared_bytes, trace.arrived())
    }

    pub async fn infer(&self, trace: &Trace, mut request: InferRequest, permit: Permit) -> Result<InferResponse> {
        let version = self.registry.table().choose(&request.model)?;
        trace.chose(&version);
        let id = std::mem::take(&mut request.id);
        request.timeout = shorter(request.timeout, version.facts().config.default_timeout);
        let prepared = Prepared::check(request, &permit, version.signature(), version.batching())?;
        let reply = Reply { id, wanted: prepared.outputs.clone(), prepared: Instant::now() };
        let mut answer = version.scheduler().submit(prepared, permit).await?;
        answer.permit.hold_answer(answer.outputs.iter().map(|tensor| tensor.data().len()).sum())?;
        trace.answered(answer.timings);
        Ok(reply.fill(answer, &version, trace))
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

    /// Requests in the server now, and bytes of them and their answers.
    pub fn in_flight(&self) -> (usize, usize) {
        (self.budget.requests(), self.budget.bytes())
    }
}

/// Of a request's own timeout and the one its model is configured with.
fn shorter(own: Option<Duration>, configured: Option<Duration>) -> Option<Duration> {
    own.into_iter().chain(configured).min()
}

/// What of the request its answer needs, kept while the rest is moved to a worker.
struct Reply {
    id: String,
    /// Positions of the requested outputs in the signature.
    wanted: Vec<usize>,
    prepared: Instant,
}

impl Reply {
    fn fill(self, answer: Answer, version: &Version, trace: &Trace) -> InferResponse {
        let Answer { outputs, timings, permit } = answer;
        let specs = &version.signature().outputs;
        let labels = self.wanted.iter().map(|position| version.facts().outputs.get(*position)?.labels.clone());
        let names = self.wanted.iter().map(|position| Arc::clone(&specs[*position].name));
        InferResponse {
            id: self.id,
            prediction: trace.prediction(),
            model: Arc::clone(version.name()),
            version: version.id(),
            digest: Arc::clone(version.digest()),
            labels: labels.collect(),
            batched: version.batching().has_rows(specs),
            outputs: names.zip(outputs).map(|(name, tensor)| NamedTensor { name, tensor }).collect(),
            timings: Timings { prepare: self.prepared.saturating_duration_since(trace.arrived()), ..timings },
            permit,
        }
    }
}
