//! One instance run by the loader: for the self-test, warm-ups and goldens, before any worker gets it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::{Batch, Instance, LoadError, Model, first_line};
use crate::scheduler::{Account, Gate};
use crate::tensor::{Ragged, Tensor};

pub struct Probe {
    model: Arc<dyn Model>,
    /// `None` after a panic, until the next run makes another.
    instance: Option<Box<dyn Instance>>,
    /// Runs wait their turn among those of versions that serve.
    gate: Account,
    threads: usize,
    clock: Box<dyn FnMut() -> Instant>,
    spent: Duration,
}

impl Probe {
    /// `threads`: what one run takes from the gate.
    pub fn new(model: Arc<dyn Model>, gate: &Arc<Gate>, threads: usize) -> Result<Probe, LoadError> {
        let (instance, gate) = (Some(model.instance()?), gate.background());
        Ok(Probe { model, instance, gate, threads, clock: Box::new(Instant::now), spent: Duration::ZERO })
    }

    #[cfg(test)]
    pub fn with_clock(mut self, clock: impl FnMut() -> Instant + 'static) -> Probe {
        self.clock = Box::new(clock);
        self
    }

    pub fn model(&self) -> &Arc<dyn Model> {
        &self.model
    }

    /// The time all runs so far have taken, without the waiting for their turns.
    pub fn spent(&self) -> Duration {
        self.spent
    }

    /// Runs the jobs as one batch. The error is the first line of what the engine says.
    pub fn run(&mut self, jobs: &[&[Tensor]]) -> Result<Vec<Tensor>, String> {
        self.run_batch(&Batch::new(jobs))
    }

    /// The same with shorter jobs filled up; the outputs are as long as the longest.
    pub fn run_padded(&mut self, jobs: &[&[Tensor]], ragged: &Ragged) -> Result<Vec<Tensor>, String> {
        self.run_batch(&Batch::new(jobs).padded(Some(ragged)))
    }

    fn run_batch(&mut self, batch: &Batch) -> Result<Vec<Tensor>, String> {
        let mut instance = match self.instance.take() {
            Some(instance) => instance,
            None => self.model.instance().map_err(|error| first_line(&error.to_string()))?,
        };
        let turn = self.gate.acquire(self.threads);
        let begin = (self.clock)();
        // An instance is not used again after a panic, so nobody sees what it left half-done.
        let outcome = catch_unwind(AssertUnwindSafe(|| instance.run(batch)));
        self.spent += (self.clock)().saturating_duration_since(begin);
        drop(turn);
        let Ok(outcome) = outcome else { return Err("the engine panicked".into()) };
        self.instance = Some(instance);
        let outputs = outcome.map_err(|error| first_line(&error.to_string()))?;
        let expected = self.model.signature().outputs.len();
        if outputs.len() != expected {
            return Err(format!("{} outputs, expected {expected}", outputs.len()));
        }
        Ok(outputs)
    }

    /// The instance, warm, for a worker.
    pub fn into_instance(self) -> Result<Box<dyn Instance>, LoadError> {
        match self.instance {
            Some(instance) => Ok(instance),
            None => self.model.instance(),
        }
    }
}
