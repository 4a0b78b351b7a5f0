//! One loaded version: what the engine asks of it and what a person may know of it.

use std::sync::Arc;
use std::time::Duration;

use super::cache::Cached;
use super::model_config::ModelConfig;
use super::ragged::RaggedDecision;
use super::selftest::BatchDecision;
use crate::backend::Device;
use crate::monitor::VersionMonitor;
use crate::request::{Batching, VersionId};
use crate::scheduler::{Scheduler, ThreadPlan};
use crate::tensor::{OutputKind, Signature};

/// Where a version is in its life: Discovered → Loading → Warming → Ready → Draining, or Failed. A failed version begins
/// anew when its files change; one that is retired is not known any more, unless it was unloaded on request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Found on disk, waiting for its turn.
    Discovered,
    Loading,
    /// Loaded; its rows are compared and it runs for the first time.
    Warming,
    Ready,
    /// Takes no new requests, still answers those it has.
    Draining,
    Failed,
    /// Served once, and will when its model is asked for again.
    Unloaded,
}

impl State {
    /// Whether it may still become ready by itself.
    pub fn is_loading(self) -> bool {
        matches!(self, State::Discovered | State::Loading | State::Warming)
    }
}

/// What is known of one output besides its place in the signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputInfo {
    pub name: Arc<str>,
    pub kind: OutputKind,
    /// Names of the classes, by index.
    pub labels: Option<Arc<[String]>>,
}

/// How a version came to be loaded as it is; the same for `inspect`, the log and model metadata.
#[derive(Clone, Debug)]
pub struct Facts {
    pub name: Arc<str>,
    pub id: VersionId,
    /// `sha256:<hex>` of the artifact.
    pub digest: Arc<str>,
    pub backend: &'static str,
    pub backend_version: String,
    /// Why this engine.
    pub backend_reason: String,
    /// The model's own settings.
    pub config: Arc<ModelConfig>,
    /// Where its instances run, and how many on each device; those in front are used first.
    pub devices: Vec<(Device, ThreadPlan)>,
    /// Why there.
    pub device_reason: String,
    pub signature: Arc<Signature>,
    /// One per output of the signature.
    pub outputs: Vec<OutputInfo>,
    pub batching: BatchDecision,
    /// Whether requests of different lengths share batches.
    pub ragged: RaggedDecision,
    /// The most rows one request may carry, where declared.
    pub max_batch_size: Option<usize>,
    pub preferred_rows: usize,
    /// What runs on the CPU were timed to take.
    pub costs: String,
    /// Whether a request that is alone is run on all cores, and why.
    pub wide: String,
    /// A run may take longer for what its inputs hold: none for a thread that others wait for, however short others were.
    pub decided_by_values: bool,
    /// The exporter that wrote the file.
    pub producer: String,
    /// From the first byte copied to the end of the warm-up.
    pub load_time: Duration,
    pub warnings: Vec<String>,
}

/// A version that serves. Immutable; requests share it by reference count and it is retired by the registry, never by
/// being dropped.
pub struct Version {
    pub(super) facts: Facts,
    pub(super) scheduler: Scheduler,
    pub(super) monitor: Arc<VersionMonitor>,
    pub(super) cached: Cached,
}

impl Version {
    pub fn name(&self) -> &Arc<str> {
        &self.facts.name
    }

    pub fn id(&self) -> VersionId {
        self.facts.id
    }

    /// `sha256:<hex>` of the artifact.
    pub fn digest(&self) -> &Arc<str> {
        &self.facts.digest
    }

    pub fn signature(&self) -> &Arc<Signature> {
        &self.facts.signature
    }

    pub fn batching(&self) -> Batching<'_> {
        Batching {
            enabled: self.facts.batching.enabled,
            max_batch_size: self.facts.max_batch_size,
            ragged: self.facts.ragged.plan.as_deref(),
        }
    }

    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    pub fn monitor(&self) -> &Arc<VersionMonitor> {
        &self.monitor
    }

    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// As model metadata calls it.
    pub fn platform(&self) -> &'static str {
        match self.facts.backend {
            "onnxruntime" => "onnxruntime_onnx",
            "tract" => "tract_onnx",
            "candle" => "candle_safetensors",
            other => other,
        }
    }

    /// What else a person may want to know, for model metadata. Names no folder.
    pub fn properties(&self) -> Vec<(&'static str, String)> {
        let mut properties = self.facts.properties();
        if self.scheduler.batches() {
            properties.push(("batch_limit", format!("{} rows", self.scheduler.batch_limit())));
        }
        if self.facts.batching.enabled && !self.scheduler.batches() {
            for (key, value) in &mut properties {
                match *key {
                    "batching" => *value = "off".into(),
                    "batching_reason" => *value = "demoted: an output did not have one row for each row sent".into(),
                    _ => {}
                }
            }
        }
        properties
    }
}

impl Facts {
    /// The file that names an output's classes.
    pub fn labels_file(&self, output: &OutputInfo) -> Option<&str> {
        output.labels.as_ref()?;
        let own = self.config.outputs.get(&*output.name).and_then(|output| output.labels.as_deref());
        own.or(self.config.labels.as_deref())
    }

    /// `cpu`, `cuda:0,cuda:1`.
    pub fn device(&self) -> String {
        let names: Vec<String> = self.devices.iter().map(|(device, _)| device.to_string()).collect();
        names.join(",")
    }

    /// At most, on all devices.
    pub fn instances(&self) -> usize {
        self.devices.iter().map(|(_, plan)| plan.instances).sum()
    }

    /// Of the instances, by device where there are several.
    pub fn threads(&self) -> String {
        match &self.devices[..] {
            [(_, plan)] => plan.to_string(),
            devices => {
                let each: Vec<String> = devices.iter().map(|(device, plan)| format!("{device}: {plan}")).collect();
                each.join("; ")
            }
        }
    }

    pub fn properties(&self) -> Vec<(&'static str, String)> {
        vec![
            ("backend", self.backend.to_string()),
            ("backend_version", self.backend_version.clone()),
            ("backend_reason", self.backend_reason.clone()),
            ("device", self.device()),
            ("device_reason", self.device_reason.clone()),
            ("digest", self.digest.to_string()),
            ("batching", if self.batching.enabled { "on" } else { "off" }.to_string()),
            ("batching_reason", self.batching.reason.clone()),
            ("ragged_batching", if self.ragged.plan.is_some() { "on" } else { "off" }.to_string()),
            ("ragged_batching_reason", self.ragged.reason.clone()),
            ("threads", self.threads()),
            ("wide", self.wide.clone()),
            ("costs", self.costs.clone()),
        ]
    }
}
