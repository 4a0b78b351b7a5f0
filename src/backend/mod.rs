//! Inference engines behind three traits, split by ownership: [`Backend`] is process-wide, [`Model`] is one immutable
//! version loaded for one device, [`Instance`] is what one worker thread runs.
//!
//! Knows nothing of requests, protocols, metrics or async runtimes: tensors in, tensors out. Each engine's crate is
//! named in that engine's folder only; `onnx` and `safetensors` read model files without any engine.
//!
//! Threads: `load` and `instance` are slow and called on a loader thread; `run` is called on a worker thread that owns
//! the instance. A panic in `run` costs the caller the instance, nothing else.

mod batch;
#[cfg(feature = "candle")]
pub mod candle;
pub mod fake;
pub mod gpus;
pub mod onnx;
pub mod onnxruntime;
mod panics;
pub mod safetensors;
mod text;
#[cfg(feature = "tract")]
pub mod tract;

use std::path::PathBuf;
use std::sync::Arc;

use crate::tensor::{OutputKind, Signature, Tensor};

pub use batch::{Batch, BatchInput};
pub use panics::{panic_text, panics_are_answered};
pub use text::first_line;

/// A version's files in the server's private cache, with what they say about themselves.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// The ONNX file, beside which external data lies; the folder of a safetensors model.
    pub path: PathBuf,
    /// Of all its files.
    pub bytes: u64,
    pub description: Arc<Description>,
}

impl Artifact {
    /// For engines that take nothing else.
    fn onnx(&self, engine: &'static str) -> Result<&onnx::Description, LoadError> {
        match &*self.description {
            Description::Onnx(description) => Ok(description),
            Description::Safetensors(_) => Err(LoadError::Engine {
                engine,
                message: "found a safetensors model, expected an ONNX file: use the backend candle".into(),
            }),
        }
    }
}

/// What a version's files say, whichever format they have.
#[derive(Clone, Debug)]
pub enum Description {
    Onnx(onnx::Description),
    Safetensors(safetensors::Description),
}

impl Description {
    /// As declared; an engine may know more.
    pub fn signature(&self) -> &Signature {
        match self {
            Description::Onnx(description) => &description.signature,
            Description::Safetensors(description) => &description.signature,
        }
    }

    /// One per output of the signature.
    pub fn output_kinds(&self) -> &[OutputKind] {
        match self {
            Description::Onnx(description) => &description.output_kinds,
            Description::Safetensors(description) => &description.output_kinds,
        }
    }

    /// Why rows cannot be independent. `None` proves nothing.
    pub fn couples_rows(&self) -> Option<&str> {
        match self {
            Description::Onnx(description) => description.couples_rows.as_deref(),
            Description::Safetensors(description) => description.couples_rows.as_deref(),
        }
    }

    /// By which operator a run may take longer, or make more, for what its inputs hold. `None` proves nothing.
    pub fn decided_by_values(&self) -> Option<&str> {
        match self {
            Description::Onnx(description) => description.decided_by_values.as_deref(),
            Description::Safetensors(_) => None,
        }
    }

    /// The exporter and its version; empty where the files do not say.
    pub fn producer(&self) -> &str {
        match self {
            Description::Onnx(description) => &description.producer,
            Description::Safetensors(description) => &description.producer,
        }
    }

    /// Names of the classes, by index, where the files hold them: for every output that has classes.
    pub fn labels(&self) -> Option<&Arc<[String]>> {
        match self {
            Description::Onnx(_) => None,
            Description::Safetensors(description) => description.labels.as_ref(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Device {
    #[default]
    Cpu,
    /// A CUDA device by its number.
    Cuda(u32),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(id) => write!(f, "cuda:{id}"),
        }
    }
}

#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub device: Device,
    /// Intra-op threads per instance; at least 1.
    pub threads: usize,
}

/// One engine, as the process has it.
pub trait Backend: Send + Sync {
    /// `onnxruntime`, `tract`, `candle`, `fake`: what `backend = "…"` in `model.toml` names, and the label `backend` in metrics.
    fn name(&self) -> &'static str;

    /// The engine's own version, for people: `1.31.1`.
    fn version(&self) -> String;

    /// Reads, checks and optimises a model. Slow.
    fn load(&self, artifact: &Artifact, options: &LoadOptions) -> Result<Arc<dyn Model>, LoadError>;

    /// Whether the instances of a model that is loaded so have its weights in memory once.
    fn instances_share_weights(&self, artifact: &Artifact, options: &LoadOptions) -> bool;

    /// Whether a run uses the threads that a model was loaded for.
    fn spreads_runs(&self) -> bool;
}

/// One version loaded for one device: immutable, shared by its instances.
pub trait Model: Send + Sync {
    /// Inputs and outputs in the order in which [`Instance::run`] takes and gives them.
    fn signature(&self) -> &Signature;

    /// What each output of the signature means, in the same order.
    fn output_kinds(&self) -> &[OutputKind];

    /// A new instance with the threads it was loaded for. May be slow.
    fn instance(&self) -> Result<Box<dyn Instance>, LoadError>;

    /// What a person should know about this load: outputs left out, a fallback taken.
    fn warnings(&self) -> &[String];
}

/// What one worker thread runs. Not shared.
pub trait Instance: Send {
    /// Runs one batch and returns one tensor per output of the signature. An error fails the whole batch.
    fn run(&mut self, batch: &Batch) -> Result<Vec<Tensor>, RunError>;
}

/// Why a model could not be loaded. Messages are for operators; they may name files by their registry name only.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The file is not a model this server can read, or reaches outside its folder.
    #[error("{0}")]
    BadModel(String),
    /// The engine refuses or fails on this model, or is known to compute it wrongly.
    #[error("{engine}: {message}")]
    Engine { engine: &'static str, message: String },
    /// The engine or the device is not there or full; the message says what to install, build or set.
    #[error("{0}")]
    Unavailable(String),
}

/// Why a run failed. Messages come from the engine and are shown to the client without paths.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// The engine blames the input (an index out of range). Only believed of a request that ran alone.
    #[error("{0}")]
    InvalidArgument(String),
    #[error("{0}")]
    Failed(String),
}
