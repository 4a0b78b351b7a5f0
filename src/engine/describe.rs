//! What the engine says about its models: metadata, how they are served, statistics, readiness, the repository index.

use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use crate::error::Result;
use crate::monitor::Statistics;
use crate::registry::{Device, State, Version, VersionPolicy};
use crate::request::{ModelRef, Phase, VersionId};
use crate::tensor::{Signature, TensorSpec};

/// A version's metadata, as protocols show it.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    pub name: Arc<str>,
    /// Every ready version of the model, ascending.
    pub versions: Vec<VersionId>,
    /// `onnxruntime_onnx`, `tract_onnx`, `candle_safetensors`.
    pub platform: &'static str,
    pub signature: Arc<Signature>,
    /// What else a person may want to know: engine, device, digest, batching.
    pub properties: Vec<(&'static str, String)>,
}

/// How a version is served.
#[derive(Clone, Debug)]
pub struct Setup {
    pub name: Arc<str>,
    /// `onnxruntime_onnx`, `tract_onnx`, `candle_safetensors`.
    pub platform: &'static str,
    /// `onnxruntime`, `tract`, `candle`.
    pub backend: &'static str,
    /// Devices with the most instances on each.
    pub instances: Vec<(Device, usize)>,
    pub signature: Arc<Signature>,
    /// The file that names an output's classes, for each output of the signature.
    pub labels: Vec<Option<String>>,
    /// What a version's file is called, where that is configured.
    pub model_file: Option<String>,
    /// The model's own shape where clients see another, for each input and each output of the signature.
    pub input_reshapes: Vec<Option<Vec<i64>>>,
    pub output_reshapes: Vec<Option<Vec<i64>>>,
    /// Of the model.
    pub versions: VersionPolicy,
    /// All inputs and outputs share their leading dimension: it counts rows.
    pub batching: bool,
    /// The most rows one request may carry, where that is declared; then every input has a leading dimension that is free.
    pub max_batch_size: Option<usize>,
    /// How requests share batches. `None`: they don't.
    pub sharing: Option<Sharing>,
}

#[derive(Clone, Debug)]
pub struct Sharing {
    /// What batches are filled up to.
    pub preferred_rows: usize,
    pub max_delay: Duration,
    pub max_queue_requests: usize,
    /// Of requests that name no shorter one.
    pub default_timeout: Option<Duration>,
}

/// What a version has done since it was loaded.
#[derive(Clone, Debug)]
pub struct VersionStatistics {
    pub name: Arc<str>,
    pub version: VersionId,
    pub statistics: Statistics,
}

/// One line of the repository index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    pub name: Arc<str>,
    /// `None`: nobody has asked for this model, and no more than its name is known.
    pub version: Option<VersionId>,
    /// Triton's words: `READY`, `LOADING`, `UNAVAILABLE`, `UNLOADING`; empty without a version.
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

    /// How the named version is served, or the one that a request without a version would get.
    pub fn setup(&self, model: &ModelRef) -> Result<Setup> {
        self.registry.table().choose(model).map(|version| setup(&version))
    }

    /// Of all versions that serve; of those of one model; or of one version. By name and version.
    pub fn statistics(&self, model: Option<&ModelRef>) -> Result<Vec<VersionStatistics>> {
        let table = self.registry.table();
        match model {
            None => Ok(table.serving().map(|version| statistics(version)).collect()),
            Some(model) => {
                let chosen = table.choose(model)?;
                if model.version.is_some() {
                    return Ok(vec![statistics(&chosen)]);
                }
                let versions = table.serving().filter(|version| version.name() == chosen.name());
                Ok(versions.map(|version| statistics(version)).collect())
            }
        }
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

    /// Every version that the registry knows of, and every model without one, by name and version.
    pub fn index(&self) -> Vec<IndexEntry> {
        let table = self.registry.table();
        let idle = table.idle().iter().map(|model| IndexEntry {
            name: Arc::clone(model),
            version: None,
            state: "",
            reason: String::new(),
        });
        let mut entries: Vec<IndexEntry> = table
            .status()
            .into_iter()
            .map(|entry| IndexEntry {
                name: entry.model,
                version: Some(entry.version),
                state: match entry.state {
                    State::Ready => "READY",
                    State::Discovered | State::Loading | State::Warming => "LOADING",
                    State::Draining => "UNLOADING",
                    State::Failed | State::Unloaded => "UNAVAILABLE",
                },
                reason: entry.reason,
            })
            .chain(idle)
            .collect();
        entries.sort_by(|a, b| (&a.name, a.version).cmp(&(&b.name, b.version)));
        entries
    }
}

fn setup(version: &Version) -> Setup {
    let (facts, scheduling) = (version.facts(), version.scheduler().config());
    let (signature, config) = (version.signature(), &facts.config);
    let input = |spec: &TensorSpec| config.inputs.get(&*spec.name)?.reshape.clone();
    let output = |spec: &TensorSpec| config.outputs.get(&*spec.name)?.tensor.reshape.clone();
    Setup {
        name: Arc::clone(version.name()),
        platform: version.platform(),
        backend: facts.backend,
        instances: facts.devices.iter().map(|(device, plan)| (*device, plan.instances)).collect(),
        signature: Arc::clone(signature),
        model_file: config.model_file.clone(),
        input_reshapes: signature.inputs.iter().map(input).collect(),
        output_reshapes: signature.outputs.iter().map(output).collect(),
        labels: facts.outputs.iter().map(|output| facts.labels_file(output).map(str::to_string)).collect(),
        versions: facts.config.versions.clone(),
        batching: version.batching().enabled,
        max_batch_size: version.batching().max_batch_size,
        sharing: version.scheduler().batches().then_some(Sharing {
            preferred_rows: scheduling.preferred_rows,
            max_delay: scheduling.max_delay,
            max_queue_requests: scheduling.max_queue_requests,
            default_timeout: facts.config.default_timeout,
        }),
    }
}

fn statistics(version: &Version) -> VersionStatistics {
    VersionStatistics {
        name: Arc::clone(version.name()),
        version: version.id(),
        statistics: version.monitor().statistics(),
    }
}
