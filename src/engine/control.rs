//! Loading and unloading, as clients ask for it.

use tokio::sync::{oneshot, watch};

use super::Engine;
use crate::error::{Error, Kind, Result};
use crate::registry::{Done, Registry, stopping};
use crate::request::Phase;

impl Engine {
    /// Whether models are served as they are asked for.
    pub fn is_explicit(&self) -> bool {
        self.registry.is_explicit()
    }

    /// Serves a model as it is on disk now, with `config`, Triton's `ModelConfig` in JSON, in place of its settings there.
    /// Answers once its versions are ready, or with why one is not; then what served goes on serving.
    pub async fn load(&self, model: &str, config: Option<String>) -> Result<()> {
        self.change(|registry, done| registry.load(model, config, done)).await
    }

    /// Serves a model no more. Answers when nobody can choose it; what was accepted is still computed.
    pub async fn unload(&self, model: &str) -> Result<()> {
        self.change(|registry, done| registry.unload(model, done)).await
    }

    /// Whoever leaves, or is told that it takes too long, stops nothing.
    async fn change(&self, ask: impl FnOnce(&Registry, Done) -> Result<()>) -> Result<()> {
        let mut phase = self.phase.clone();
        if *phase.borrow() > Phase::Ready {
            return Err(stopping());
        }
        let (tell, told) = oneshot::channel();
        // Nobody listens to what comes too late.
        ask(&self.registry, Box::new(move |outcome| drop(tell.send(outcome))))?;
        tokio::select! {
            // A stop is not held up by a load, whose model would serve nobody.
            () = stop(&mut phase) => Err(stopping()),
            told = tokio::time::timeout(self.load_timeout, told) => match told {
                Ok(outcome) => outcome.unwrap_or_else(|_| Err(self.registry.unanswered())),
                Err(_) => Err(Error::new(
                    Kind::DeadlineExceeded,
                    "it takes longer than `timeouts.load`: the index tells how it ends",
                )),
            },
        }
    }
}

async fn stop(phase: &mut watch::Receiver<Phase>) {
    // Where the server is gone, it has stopped.
    let _ = phase.wait_for(|phase| *phase > Phase::Ready).await;
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::backend::fake::{Fake, Gate as Held};
    use crate::monitor::Monitor;
    use crate::pool::Pool;
    use crate::registry::{AtStart, Config, Control, Engines};
    use crate::request::BudgetConfig;
    use crate::scheduler::Gate;

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/traps/sentinel/1/model.onnx");

    /// An engine that serves `model` on request, whose every run waits.
    fn engine(held: &Arc<Held>, load_timeout: Duration) -> (Engine, watch::Sender<Phase>) {
        let fake = Fake::echo(1).gated(held);
        let engines = Engines::only(Arc::new(fake));
        let at_start = AtStart::Named([].into());
        let config = Config {
            root: MODEL.into(),
            temp_dir: std::env::temp_dir(),
            control: Control::Explicit { at_start, interval: Duration::from_secs(3600) },
            ..Config::default()
        };
        let monitor = Monitor::new();
        let registry = Registry::start_with(config, engines, 2, Gate::new(2), Arc::clone(&monitor)).unwrap();
        registry.wait_loaded();
        let (phase, phases) = watch::channel(Phase::Ready);
        let cpu = Pool::new(1).unwrap();
        (Engine::new(registry, monitor, BudgetConfig::default(), load_timeout, phases, cpu), phase)
    }

    /// Looks until the model's state is that.
    async fn becomes(engine: &Engine, state: &str) {
        let look = async {
            while engine.index()[0].state != state {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), look).await.expect(state);
    }

    #[tokio::test]
    async fn whoever_is_told_that_a_load_takes_too_long_does_not_stop_it() {
        let held = Held::new();
        let (engine, _phase) = engine(&held, Duration::from_millis(1));
        assert_eq!(engine.load("model", None).await.unwrap_err().kind(), Kind::DeadlineExceeded);
        held.open();
        becomes(&engine, "READY").await;
    }

    #[tokio::test]
    async fn a_stop_is_not_held_up_by_a_load() {
        let held = Held::new();
        let (engine, phase) = engine(&held, Duration::MAX);
        let stop = async {
            becomes(&engine, "LOADING").await;
            phase.send_replace(Phase::LameDuck);
        };
        let (loaded, ()) = tokio::join!(engine.load("model", None), stop);
        assert_eq!(loaded, Err(stopping()));
        assert_eq!(engine.unload("model").await, Err(stopping()), "nor is anything begun then");
        held.open();
    }
}
