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
                Ok(outcome) => outcome.unwrap_or_else(|_| Err(stopping())),
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
