//! What the engine says about its models: metadata, readiness, the repository index.

use std::sync::Arc;

use super::Engine;
use crate::error::Result;
use crate::registry::State;
use crate::request::{ModelRef, Phase, VersionId};
use crate::tensor::Signature;

/// A version's metadata, as protocols show it.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    pub name: Arc<str>,
    /// Every ready version of the model, ascending.
    pub versions: Vec<VersionId>,
    /// `onnxruntime_onnx`, `tract_onnx`.
    pub platform: &'static str,
    pub signature: Arc<Signature>,
    /// What else a person may want to know: engine, device, digest, batching.
    pub properties: Vec<(&'static str, String)>,
}

/// One line of the repository index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    pub name: Arc<str>,
    pub version: VersionId,
    /// Triton's words: `READY`, `LOADING`, `UNAVAILABLE`, `UNLOADING`.
    pub state: &'static str,
    pub reason: String,
}

impl Engine {
    pub fn live(&self) -> bool {
        self.phase() != Phase::Stopped
    }

    pub fn ready(&self) -> bool {
        self.phase() == Phase::Ready
    }

    /// Metadata of the named version, or of the one that a request without a version would get.
    pub fn model(&self, name: &str, version: Option<VersionId>) -> Result<ModelInfo> {
        let table = self.registry.table();
        let version = table.choose(&ModelRef { name: name.to_string(), version })?;
        Ok(ModelInfo {
            name: Arc::clone(version.name()),
            versions: table.ready_versions(name),
            platform: version.platform(),
            signature: Arc::clone(version.signature()),
            properties: version.properties(),
        })
    }

    /// Whether the version can answer now; an error where the model or version is unknown.
    pub fn model_ready(&self, name: &str, version: Option<VersionId>) -> Result<bool> {
        use crate::error::Kind;
        match self.registry.table().choose(&ModelRef { name: name.to_string(), version }) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == Kind::NotReady => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Names of all models with a ready version, sorted.
    pub fn models(&self) -> Vec<Arc<str>> {
        self.registry.table().ready_models()
    }

    /// Every version that the registry knows of, by name and version.
    pub fn index(&self) -> Vec<IndexEntry> {
        let entries = self.registry.status();
        entries
            .into_iter()
            .map(|entry| IndexEntry {
                name: entry.model,
                version: entry.version,
                state: match entry.state {
                    State::Ready => "READY",
                    State::Discovered | State::Loading | State::Warming => "LOADING",
                    State::Draining => "UNLOADING",
                    State::Failed => "UNAVAILABLE",
                },
                reason: entry.reason,
            })
            .collect()
    }
}
