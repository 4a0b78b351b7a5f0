//! ONNX Runtime, loaded from its shared library while the server runs; the only folder that names the crate `ort`.
//!
//! Owns the search for the library, the process-wide environment, sessions, and the hand-over of buffers: inputs are
//! lent to the engine where one aligned buffer holds them and gathered once otherwise; outputs stay in the engine's
//! memory and are shared by reference count. Knows nothing of requests, and does not read the process's environment:
//! callers pass what they found there.
//!
//! Invariants: the library is loaded once and stays until the process ends (nothing tears the environment down, so
//! nothing can crash there). On the CPU instances of one thread run one session together where the weights are large, so
//! that they are in memory once; any other session belongs to one instance, hence to one thread at a time.
//!
//! Threads: `open`, `load` and `instance` are slow and belong on a loader thread. A session has the intra-op threads it
//! was loaded for, none for 1, and they sleep rather than spin between runs.

mod library;
mod session;
mod shared;
mod values;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use ort::environment::Environment;

use super::text::one_line;
use super::{Artifact, Backend, LoadError, LoadOptions, Model};
use session::OnnxRuntimeModel;

pub use library::{Found, FoundBy, LIBRARY, NotFound};

/// What `backend = "…"` and the metric label call this engine.
pub const NAME: &str = "onnxruntime";

/// The engine puts what it expected on the second line of its messages.
const MESSAGE_LINES: usize = 2;

/// ONNX Runtime as this process has it.
pub struct OnnxRuntime {
    /// Canonical, to recognise a second `open` of the same file.
    path: PathBuf,
    version: String,
    environment: Environment,
}

impl fmt::Debug for OnnxRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnnxRuntime").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Backend for OnnxRuntime {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn load(&self, artifact: &Artifact, options: &LoadOptions) -> Result<Arc<dyn Model>, LoadError> {
        let load = || OnnxRuntimeModel::load(&self.environment, artifact, options);
        // The crate panics on types of inputs and outputs it does not know.
        let model = catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(|_| Err(refused("it broke on this model")))?;
        Ok(Arc::new(model))
    }

    fn instances_share_weights(&self, artifact: &Artifact, options: &LoadOptions) -> bool {
        session::instances_share(artifact, options)
    }

    fn spreads_runs(&self) -> bool {
        true
    }
}

fn refused(message: impl Into<String>) -> LoadError {
    LoadError::Engine { engine: NAME, message: message.into() }
}

/// An engine's message made fit for a client and for one line of log: its first lines, without words that are paths or
/// addresses, bounded.
fn clean(message: &str) -> String {
    one_line(message, MESSAGE_LINES, |word| {
        let word = word.trim_start_matches(['"', '\'', '(', '[', '`']);
        !(word.starts_with('/') || word.contains("0x") || word.contains(".cc:") || word.contains(".h:"))
    })
}

#[cfg(test)]
mod tests;
