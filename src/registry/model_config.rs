//! What a model's own settings may say, whichever file they are in; and `model.toml`, read key by key so that every problem
//! is reported at once.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use toml::{Table, Value};

use super::engines::BackendChoice;
use super::layer_config;
use super::placement::{Devices, InstanceGroup};
use super::ragged::RaggedConfig;
use super::view::interchangeable;
use crate::backend::safetensors::encoder::{EncoderConfig, Pooling};
use crate::backend::safetensors::layers::Sequential;
use crate::error::quoted;
use crate::problem::{Problem, expected_name};
use crate::request::{MAX_TIMEOUT, VersionId};
use crate::scheduler::LatencyGoal;
use crate::tensor::{DataType, MAX_RANK, OutputKind, Shape, wire_shape};
use crate::units::{DURATION_FORM, SIZE_FORM, parse_duration, parse_size};

pub(super) const MAX_INSTANCES: i64 = 256;
pub(super) const MAX_GROUPS: usize = 64;
pub(super) const MAX_THREADS: i64 = 1024;
pub(super) const MAX_ROWS: i64 = 1 << 20;
pub(super) const MAX_QUEUE_REQUESTS: i64 = 1 << 24;
pub(super) const MAX_DELAY: Duration = Duration::from_secs(60);
pub(super) const MAX_WARM_UPS: usize = 64;
pub(super) const RESHAPE_FORM: &str = "as many elements as the shape, and a -1 for each of its";

const GOAL_FORM: &str = "a percentile from p50 and a duration of at most 60s, like \"p99 20ms\"";
pub(super) const DEVICE_FORM: &str = "\"cpu\", \"cuda\", \"cuda:N\", \"cuda:all\" or \"auto\"";
pub(super) const FALLBACK_FORM: &str = "\"none\" or \"cpu\"";

/// Every key, with its meaning; a part of docs/configuration.md.
pub const REFERENCE: &str = r#"# Every key is optional; an unknown one is an error. Files lie beside model.toml.

backend = "auto"            # auto: candle for safetensors; for ONNX onnxruntime where its library was found, else tract
device = "cpu"              # cpu; cuda (the GPU cuda:0) or cuda:N; cuda:all, every GPU; auto, every GPU or else the CPU
device_fallback = "none"    # none: a model whose GPU cannot be used is not served; cpu: it runs on the CPU, with a warning
instances = 2               # runs at once on each device; by default one on a GPU, on the CPU planned from the cores
threads = 1                 # intra-op threads of one instance; by default one on a GPU, on the CPU planned from the cores
labels = "labels.txt"       # class names, one a line, for every output that has classes
warmup = ["warmup.json"]    # requests ({"inputs": [...]}) that must succeed before the version is ready, all in 60 s
latency_goal = "p99 20ms"   # batches are no longer than leaves 99 of 100 requests that time. By default as long as pays
versions = "all"            # or { latest = 2 }, the highest that load; or a list such as [1, 3]
only_declared_outputs = false   # true: outputs without a section [outputs.…] are not given
# model_file = "net.onnx"   # what a version's file is called; by default model.onnx or model.safetensors

[batching]                  # or in short: batching = true, false or "auto"
enabled = "auto"            # auto: batched if the file and the self-test at load allow it
preferred_rows = 32         # what batches are filled up to at most
tune = true                 # as far as that pays, by what runs cost; false: always, whatever it costs
max_batch_size = 256        # the most rows one request may carry, batched or not; by default any number
max_delay = "0"             # how long a request may wait for others to share its batch; 0: a twentieth of a long run, where that pays
ragged = "auto"             # requests of different lengths in one batch. auto: where integer inputs and a mask suggest
                            # it and the self-test proves it; or false; or what shorter rows are filled up with along
                            # an axis, by input: { axis = 1, fill = { ids = 0, mask = 0 } }

[limits]
max_queue_requests = 1024   # waiting for this version; more are refused
max_queue_bytes = "512MiB"  # of waiting inputs
default_timeout = "10s"     # how long a request may take; its own timeout may only be shorter. By default any time

[inputs.image]              # by the input's name: what the model must take, or it is not served. All inputs, or none
datatype = "FP32"
shape = [-1, 64]            # -1: any extent; what the model leaves free may be fixed
# reshape = [-1, 8, 8]     # the model's own shape, where clients send another one of as many elements

[outputs.probabilities]     # by the output's name
kind = "probabilities"      # or log_probabilities, logits, binary_probability, labels, values
labels = "labels.txt"
datatype = "FP32"           # with shape: what the model must give
shape = [-1, 10]            # and reshape, as above: answers have `shape`

[goldens]
on_load = false             # compare with expected.json at every load; a version that differs fails

# Instances on several devices, in place of device, device_fallback and instances; those in front are used first.
#
# [[instance_group]]
# device = "cuda:0"
# device_fallback = "none"
# count = 2                 # instances on each device of the group, as `instances`
#
# [[instance_group]]
# device = "cpu"

# A model.safetensors beside a config.json of Hugging Face's describes itself; this adds to it.
[encoder]
pooling = "mean"            # or cls, max: an output sentence_embedding; by default what 1_Pooling/config.json says
normalize = true            # whether it is scaled to length 1; by default if modules.json lists Normalize
token_type_ids = false      # a third input; without it every token is of type 0

# Any other model.safetensors is a torch.nn.Sequential, with the settings below in place of [encoder], before any table.
# Layers are named and set as in torch.nn, weights by their keys in PyTorch's state_dict. What goes in may be left out.
#
# input = { name = "x", datatype = "FP32", shape = [-1, 8] }   # -1: any extent; the batch first. INT64 for an Embedding
# output = "output"                                            # what the last layer's numbers are called
# prefix = ""                                                  # before every key: "net." for net.0.weight
#
# [[layers]]
# type = "Linear"                     # in_features, out_features, bias = true
# out_features = 16
# key = "0"                           # by default the layer's place in the list
#
# Conv1d, Conv2d                      in_channels, out_channels, kernel_size, stride = 1, padding = 0 (or "same"),
#                                     dilation = 1, groups = 1, bias = true; sizes of two axes are 3 or [3, 2]
# BatchNorm1d, BatchNorm2d            num_features, eps = 1e-5, affine = true
# LayerNorm                           normalized_shape, eps = 1e-5, elementwise_affine = true, bias = true
# MaxPool1d, MaxPool2d                kernel_size, stride = kernel_size, padding = 0, dilation = 1, ceil_mode = false
# AvgPool1d, AvgPool2d                kernel_size, stride = kernel_size, padding = 0, ceil_mode = false,
#                                     count_include_pad = true
# AdaptiveAvgPool1d, AdaptiveAvgPool2d  output_size = 1
# Embedding                           num_embeddings, embedding_dim
# Flatten                             start_dim = 1, end_dim = -1
# Unflatten                           dim, unflattened_size
# Softmax, LogSoftmax                 dim
# LeakyReLU, ELU, GELU                negative_slope = 0.01; alpha = 1.0; approximate = "none" or "tanh"
# ReLU, ReLU6, SiLU, Mish, Sigmoid, Hardsigmoid, Hardswish, Tanh, Softplus, Identity, Dropout, Dropout1d, Dropout2d
"#;

/// One model's settings, checked. `None` where the file is silent: the server's defaults or the model decide.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelConfig {
    /// Where all this was read.
    pub file: ConfigFile,
    /// What the file asks for and does not get, though answers are the same without it.
    pub warnings: Vec<String>,
    /// What a version's file is called, where that is not one of the usual names.
    pub model_file: Option<String>,
    pub backend: BackendChoice,
    /// Where instances run, those in front first. Empty: on the CPU, as many as are planned.
    pub groups: Vec<InstanceGroup>,
    /// Intra-op threads of one instance.
    pub threads: Option<usize>,
    pub batching: BatchingConfig,
    /// What batches must leave time for.
    pub latency_goal: Option<LatencyGoal>,
    pub max_queue_requests: Option<usize>,
    pub max_queue_bytes: Option<usize>,
    /// From its arrival on, of a request that names no shorter one.
    pub default_timeout: Option<Duration>,
    /// By name: what the model must take. Empty, or every input.
    pub inputs: BTreeMap<String, TensorConfig>,
    /// A file of class names, one a line, for every output that has classes.
    pub labels: Option<String>,
    /// By output name.
    pub outputs: BTreeMap<String, OutputConfig>,
    /// Outputs that are not in `outputs` are not given.
    pub only_declared_outputs: bool,
    /// What must succeed before the version is ready.
    pub warmup: Vec<WarmUp>,
    pub versions: VersionPolicy,
    /// Compare with `expected.json` at every load; a version that differs fails.
    pub goldens_on_load: bool,
    /// The layers of a `model.safetensors`.
    pub sequential: Option<Sequential>,
    /// What is added to a `config.json` of Hugging Face's.
    pub encoder: Option<EncoderConfig>,
}

impl ModelConfig {
    /// The key of what only a safetensors model needs to be told, where there is any.
    pub fn declared_key(&self) -> Option<&'static str> {
        self.sequential.as_ref().map(|_| "layers").or(self.encoder.as_ref().map(|_| "encoder"))
    }

    /// These settings, but with what `own` says of the model itself, and of what its answers must be: Triton's form, in
    /// which settings are sent, cannot say it.
    pub fn with_model_of(&self, own: &ModelConfig) -> ModelConfig {
        ModelConfig {
            goldens_on_load: own.goldens_on_load,
            sequential: own.sequential.clone(),
            encoder: own.encoder.clone(),
            ..self.clone()
        }
    }

    /// Nothing is said but what [`Self::with_model_of`] takes.
    pub fn is_of_the_model_alone(&self) -> bool {
        *self == ModelConfig::default().with_model_of(self)
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchingConfig {
    /// `None`: batched if the model proves to allow it.
    pub enabled: Option<bool>,
    pub preferred_rows: Option<usize>,
    /// Fill batches only as far as that pays.
    pub tune: Option<bool>,
    /// The most rows one request may carry.
    pub max_batch_size: Option<usize>,
    pub max_delay: Option<Duration>,
    pub ragged: RaggedConfig,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct OutputConfig {
    pub kind: Option<OutputKind>,
    pub labels: Option<String>,
    pub tensor: TensorConfig,
}

/// What the model must say of a tensor, too.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorConfig {
    pub dtype: Option<DataType>,
    /// What clients send and get. -1: any extent.
    pub shape: Option<Vec<i64>>,
    /// The model's own shape where it is another, [interchangeable](super::view::interchangeable) with `shape`.
    pub reshape: Option<Vec<i64>>,
}

/// A warm-up run; see [`super::warmup`].
#[derive(Clone, Debug, PartialEq)]
pub enum WarmUp {
    /// A file with the inputs of one request.
    Request(String),
    Made(MadeWarmUp),
}

/// A warm-up as `config.pbtxt` describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct MadeWarmUp {
    pub name: String,
    /// Requests that run as one batch, if the version batches.
    pub requests: usize,
    /// How often.
    pub runs: usize,
    pub inputs: BTreeMap<String, MadeInput>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct MadeInput {
    pub dtype: DataType,
    pub shape: Shape,
    pub content: MadeContent,
}

#[derive(Clone, Debug, PartialEq)]
pub enum MadeContent {
    Zeros,
    Random,
    /// The elements' bytes, in a file of this name in the folder `warmup`.
    File(String),
}

/// Where a model's settings may stand: in one of two files, or in the request to load it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConfigFile {
    #[default]
    ModelToml,
    /// Triton's; see [`super::pbtxt`].
    ConfigPbtxt,
    /// The same in JSON, sent in place of the model's own.
    Parameter,
}

impl ConfigFile {
    /// The files.
    pub const ALL: [ConfigFile; 2] = [ConfigFile::ModelToml, ConfigFile::ConfigPbtxt];

    pub fn name(self) -> &'static str {
        match self {
            ConfigFile::ModelToml => "model.toml",
            ConfigFile::ConfigPbtxt => "config.pbtxt",
            ConfigFile::Parameter => "parameter `config`",
        }
    }
}

/// Which of the versions on disk are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VersionPolicy {
    #[default]
    All,
    /// The highest n of those that load.
    Latest(usize),
    Listed(BTreeSet<VersionId>),
}

impl VersionPolicy {
    /// The versions to serve. `versions` are those on disk, each with whether it can still be served: one that failed to
    /// load makes room for the next lower one, so that a bad release never empties a model.
    pub fn select(&self, versions: &BTreeMap<VersionId, bool>) -> BTreeSet<VersionId> {
        match self {
            VersionPolicy::All => versions.keys().copied().collect(),
            VersionPolicy::Listed(listed) => versions.keys().copied().filter(|id| listed.contains(id)).collect(),
            VersionPolicy::Latest(n) => {
                let mut alive = versions.iter().rev().filter(|(_, alive)| **alive).map(|(id, _)| *id);
                // Failed versions above the lowest served one are kept, so that the index shows why they are not served;
                // where fewer than asked for can be served, every failed one is why.
                let lowest = alive.nth(n.saturating_sub(1));
                versions.keys().copied().filter(|id| lowest.is_none_or(|lowest| *id >= lowest)).collect()
            }
        }
    }
}

/// Everything wrong with a model's settings. Places are dotted keys: `batching.max_delay`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", .0.name(), .1.iter().map(Problem::to_string).collect::<Vec<_>>().join("; "))]
pub struct ConfigProblems(pub ConfigFile, pub Vec<Problem>);

impl ModelConfig {
    /// Reads the text of a `model.toml`.
    pub fn parse(text: &str) -> Result<ModelConfig, ConfigProblems> {
        let table: Table = toml::from_str(text).map_err(|error| problems_of(vec![syntax_problem(text, &error)]))?;
        let problems = RefCell::new(Vec::new());
        let config = read_model(Section::new(String::new(), &table, &problems));
        let problems = problems.into_inner();
        if problems.is_empty() { Ok(config) } else { Err(problems_of(problems)) }
    }
}

fn problems_of(problems: Vec<Problem>) -> ConfigProblems {
    ConfigProblems(ConfigFile::ModelToml, problems)
}

fn syntax_problem(text: &str, error: &toml::de::Error) -> Problem {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or("");
    let line = before.matches('\n').count() + 1;
    Problem {
        place: format!("`line {line}`"),
        found: error.message().replace('\n', ", "),
        expected: "valid TOML".into(),
    }
}

fn read_model(mut top: Section) -> ModelConfig {
    let limits = top.section("limits", |section| {
        let requests = section.count("max_queue_requests", MAX_QUEUE_REQUESTS);
        let bytes = section.read("max_queue_bytes", SIZE_FORM, |value| value.as_str().and_then(parse_size));
        let timeout = |value: &Value| {
            value.as_str().and_then(parse_duration).filter(|timeout| !timeout.is_zero() && *timeout <= MAX_TIMEOUT)
        };
        (requests, bytes, section.read("default_timeout", &format!("{DURATION_FORM}, at most a day"), timeout))
    });
    let (max_queue_requests, max_queue_bytes, default_timeout) = limits.unwrap_or_default();
    let config = ModelConfig {
        file: ConfigFile::ModelToml,
        warnings: Vec::new(),
        model_file: top.file("model_file"),
        backend: top
            .read("backend", "\"auto\", \"onnxruntime\", \"tract\" or \"candle\"", |value| {
                BackendChoice::parse(value.as_str()?)
            })
            .unwrap_or_default(),
        groups: read_groups(&mut top),
        threads: top.count("threads", MAX_THREADS),
        batching: read_batching(&mut top),
        latency_goal: top.read("latency_goal", GOAL_FORM, |value| parse_goal(value.as_str()?)),
        max_queue_requests,
        max_queue_bytes,
        default_timeout,
        inputs: read_inputs(&mut top),
        labels: top.file("labels"),
        outputs: read_outputs(&mut top),
        only_declared_outputs: top.read("only_declared_outputs", "true or false", Value::as_bool).unwrap_or(false),
        warmup: top.read("warmup", "a list of file names beside model.toml", read_files).unwrap_or_default(),
        versions: top
            .read("versions", "\"all\", { latest = 2 } or a list such as [1, 3]", read_policy)
            .unwrap_or_default(),
        goldens_on_load: top
            .section("goldens", |section| section.read("on_load", "true or false", Value::as_bool))
            .flatten()
            .unwrap_or(false),
        sequential: layer_config::read(&mut top),
        encoder: read_encoder(&mut top),
    };
    if let (Some(_), Some(_)) = (&config.sequential, &config.encoder) {
        top.problem("encoder", "[[layers]], too".into(), "one or the other".into());
    }
    if config.only_declared_outputs && config.outputs.is_empty() {
        top.problem("only_declared_outputs", "no output declared".into(), "a section such as [outputs.y]".into());
    }
    top.finish();
    config
}

fn read_encoder(top: &mut Section) -> Option<EncoderConfig> {
    const SWITCH: &str = "true or false";
    top.section("encoder", |section| EncoderConfig {
        token_type_ids: section.read("token_type_ids", SWITCH, Value::as_bool).unwrap_or(false),
        pooling: section.read("pooling", "\"mean\", \"cls\" or \"max\"", |value| match value.as_str()? {
            "mean" => Some(Pooling::Mean),
            "cls" => Some(Pooling::Cls),
            "max" => Some(Pooling::Max),
            _ => None,
        }),
        normalize: section.read("normalize", SWITCH, Value::as_bool),
    })
}

/// A list of groups, or one in short.
fn read_groups(top: &mut Section) -> Vec<InstanceGroup> {
    const SHORT: [&str; 3] = ["device", "device_fallback", "instances"];
    let short = SHORT.iter().find(|key| top.table.contains_key(**key));
    let one = read_group(top, "instances");
    let Some(groups) = top.tables("instance_group") else { return short.map(|_| one).into_iter().collect() };
    if let Some(key) = short {
        top.problem(key, "[[instance_group]], too".into(), "one or the other".into());
    }
    if !(1..=MAX_GROUPS).contains(&groups.len()) {
        top.problem("instance_group", format!("{} groups", groups.len()), format!("1 to {MAX_GROUPS}"));
    }
    let group = |mut section: Section| {
        let group = read_group(&mut section, "count");
        section.finish();
        group
    };
    groups.into_iter().map(group).collect()
}

fn read_group(section: &mut Section, count: &str) -> InstanceGroup {
    let devices = section.read("device", DEVICE_FORM, |value| Devices::parse(value.as_str()?));
    let fallback = section.read("device_fallback", FALLBACK_FORM, |value| parse_fallback(value.as_str()?));
    InstanceGroup {
        devices: devices.unwrap_or_default(),
        count: section.count(count, MAX_INSTANCES),
        fallback: fallback.unwrap_or(false),
    }
}

/// Whether a group may run on the CPU in place of its GPUs.
pub(super) fn parse_fallback(text: &str) -> Option<bool> {
    match text {
        "none" => Some(false),
        "cpu" => Some(true),
        _ => None,
    }
}

/// `p99.9 20ms`.
fn parse_goal(text: &str) -> Option<LatencyGoal> {
    let (percentile, within) = text.strip_prefix('p')?.split_once(' ')?;
    let (whole, fraction) = percentile.split_once('.').unwrap_or((percentile, ""));
    let digits = |text: &str| text.len() <= 2 && text.bytes().all(|c| c.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let of_10_000 = format!("{whole}{fraction:0<2}").parse().ok().filter(|of: &u16| (5_000..10_000).contains(of))?;
    let within = parse_duration(within.trim_start()).filter(|within| !within.is_zero() && *within <= MAX_DELAY)?;
    Some(LatencyGoal { of_10_000, within })
}

/// `batching = true`, `false` or `"auto"`, or a table whose `enabled` says the same.
fn read_batching(top: &mut Section) -> BatchingConfig {
    const SWITCH: &str = "true, false or \"auto\"";
    if !matches!(top.table.get("batching"), Some(Value::Table(_))) {
        let enabled = top.read("batching", "true, false, \"auto\" or a table", read_switch).flatten();
        return BatchingConfig { enabled, ..BatchingConfig::default() };
    }
    top.section("batching", |section| BatchingConfig {
        enabled: section.read("enabled", SWITCH, read_switch).flatten(),
        preferred_rows: section.count("preferred_rows", MAX_ROWS),
        tune: section.read("tune", "true or false", Value::as_bool),
        max_batch_size: section.count("max_batch_size", MAX_ROWS),
        max_delay: section.read("max_delay", DURATION_FORM, |value| {
            value.as_str().and_then(parse_duration).filter(|delay| *delay <= MAX_DELAY)
        }),
        ragged: read_ragged(section),
    })
    .unwrap_or_default()
}

fn read_ragged(batching: &mut Section) -> RaggedConfig {
    if !matches!(batching.table.get("ragged"), Some(Value::Table(_))) {
        let read = |value: &Value| match value {
            Value::Boolean(false) => Some(RaggedConfig::Off),
            Value::String(text) if text == "auto" => Some(RaggedConfig::Auto),
            _ => None,
        };
        return batching.read("ragged", "false, \"auto\" or a table of `axis` and `fill`", read).unwrap_or_default();
    }
    let declared = batching.section("ragged", |section| RaggedConfig::Declared {
        axis: section.count("axis", MAX_RANK as i64).unwrap_or(1),
        fill: read_fills(section),
    });
    declared.unwrap_or_default()
}

fn read_fills(ragged: &mut Section) -> BTreeMap<String, f64> {
    const FORM: &str = "a table of numbers by input";
    let fill = ragged.read("fill", FORM, read_fill);
    if !ragged.table.contains_key("fill") {
        ragged.problem("fill", "nothing".into(), FORM.into());
    }
    fill.unwrap_or_default()
}

fn read_fill(value: &Value) -> Option<BTreeMap<String, f64>> {
    let number = |value: &Value| value.as_float().or_else(|| value.as_integer().map(|n| n as f64));
    let table = value.as_table().filter(|table| !table.is_empty())?;
    table.iter().map(|(name, value)| Some((name.clone(), number(value)?))).collect()
}

fn read_switch(value: &Value) -> Option<Option<bool>> {
    match value {
        Value::Boolean(on) => Some(Some(*on)),
        Value::String(text) if text == "auto" => Some(None),
        _ => None,
    }
}

fn read_outputs(top: &mut Section) -> BTreeMap<String, OutputConfig> {
    let mut outputs = BTreeMap::new();
    let kinds = OutputKind::ALL.map(|kind| format!("\"{}\"", kind.name())).join(", ");
    top.section("outputs", |section| {
        for name in section.table.keys() {
            let output = section.section(name, |section| OutputConfig {
                kind: section.read("kind", &format!("one of {kinds}"), |value| OutputKind::parse(value.as_str()?)),
                labels: section.file("labels"),
                tensor: read_tensor(section),
            });
            outputs.insert(name.clone(), output.unwrap_or_default());
        }
    });
    outputs
}

fn read_inputs(top: &mut Section) -> BTreeMap<String, TensorConfig> {
    let mut inputs = BTreeMap::new();
    top.section("inputs", |section| {
        for name in section.table.keys() {
            inputs.insert(name.clone(), section.section(name, read_tensor).unwrap_or_default());
        }
    });
    inputs
}

fn read_tensor(section: &mut Section) -> TensorConfig {
    let extent = |value: &Value| value.as_integer().filter(|extent| *extent >= -1);
    let shape = |value: &Value| value.as_array()?.iter().map(extent).collect();
    let tensor = TensorConfig {
        dtype: section.read("datatype", "a datatype such as \"FP32\"", |value| DataType::parse(value.as_str()?)),
        shape: section.read("shape", "a list of extents such as [-1, 64]", shape),
        reshape: section.read("reshape", "a list of extents such as [-1, 8, 8]", shape),
    };
    if let Some(reshape) = &tensor.reshape
        && !tensor.shape.as_ref().is_some_and(|shape| interchangeable(shape, reshape))
    {
        section.problem("reshape", wire_shape(reshape), RESHAPE_FORM.into());
    }
    tensor
}

fn read_policy(value: &Value) -> Option<VersionPolicy> {
    let version = |value: &Value| value.as_integer().and_then(|id| VersionId::new(u64::try_from(id).ok()?));
    match value {
        Value::String(text) if text == "all" => Some(VersionPolicy::All),
        Value::Table(table) if table.len() == 1 => {
            let latest = table.get("latest")?.as_integer()?;
            (latest >= 1).then(|| usize::try_from(latest).ok().map(VersionPolicy::Latest)).flatten()
        }
        Value::Array(ids) if !ids.is_empty() => {
            ids.iter().map(version).collect::<Option<_>>().map(VersionPolicy::Listed)
        }
        _ => None,
    }
}

fn read_files(value: &Value) -> Option<Vec<WarmUp>> {
    let files = value.as_array()?;
    let request = |value: &Value| plain_file(value).map(WarmUp::Request);
    (files.len() <= MAX_WARM_UPS).then(|| files.iter().map(request).collect()).flatten()
}

fn plain_file(value: &Value) -> Option<String> {
    value.as_str().filter(|name| is_plain_file(name)).map(str::to_string)
}

/// The name of a file in the model's own folder: no folder, no `..`, not hidden.
pub(super) fn is_plain_file(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

/// One table of the file while it is read: remembers which keys it knows, and collects problems.
pub(super) struct Section<'a> {
    /// `batching.`; empty at the top.
    prefix: String,
    table: &'a Table,
    known: BTreeSet<String>,
    problems: &'a RefCell<Vec<Problem>>,
}

impl<'a> Section<'a> {
    pub(super) fn new(prefix: String, table: &'a Table, problems: &'a RefCell<Vec<Problem>>) -> Self {
        Section { prefix, table, known: BTreeSet::new(), problems }
    }

    pub(super) fn read<T>(
        &mut self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        self.known.insert(key.to_string());
        let value = self.table.get(key)?;
        let converted = convert(value);
        if converted.is_none() {
            self.problem(key, shown(value), expected.to_string());
        }
        converted
    }

    pub(super) fn count(&mut self, key: &str, max: i64) -> Option<usize> {
        let convert =
            |value: &Value| value.as_integer().filter(|n| (1..=max).contains(n)).and_then(|n| usize::try_from(n).ok());
        self.read(key, &format!("a whole number from 1 to {max}"), convert)
    }

    fn file(&mut self, key: &str) -> Option<String> {
        self.read(key, "the name of a file beside model.toml", plain_file)
    }

    pub(super) fn section<T>(&mut self, key: &str, read: impl FnOnce(&mut Section<'a>) -> T) -> Option<T> {
        self.known.insert(key.to_string());
        let value = self.table.get(key)?;
        let Some(table) = value.as_table() else {
            self.problem(key, shown(value), "a table".into());
            return None;
        };
        let mut section = Section::new(format!("{}{key}.", self.prefix), table, self.problems);
        let result = read(&mut section);
        section.finish();
        Some(result)
    }

    /// The tables of an array of them, each to be finished; `None` where the key is not there.
    pub(super) fn tables(&mut self, key: &str) -> Option<Vec<Section<'a>>> {
        self.known.insert(key.to_string());
        let value = self.table.get(key)?;
        let tables = value.as_array().and_then(|array| array.iter().map(Value::as_table).collect::<Option<Vec<_>>>());
        let Some(tables) = tables else {
            self.problem(key, shown(value), format!("[[{key}]], a list of tables"));
            return None;
        };
        let named = |(i, table)| Section::new(format!("{}{key}[{i}].", self.prefix), table, self.problems);
        Some(tables.into_iter().enumerate().map(named).collect())
    }

    /// Reports the keys nobody asked for.
    pub(super) fn finish(self) {
        for key in self.table.keys().filter(|key| !self.known.contains(*key)) {
            let known: Vec<&str> = self.known.iter().map(String::as_str).collect();
            self.problem(key, "an unknown key".into(), expected_name(key, &known));
        }
    }

    pub(super) fn problem(&self, key: &str, found: String, expected: String) {
        let place = format!("`{}{}`", self.prefix, quoted(key));
        self.problems.borrow_mut().push(Problem { place, found, expected });
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Table(_) => "a table".into(),
        Value::Array(_) => quoted(&value.to_string()),
        Value::String(text) => format!("\"{}\"", quoted(text)),
        other => quoted(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Device;
    use crate::problem::nearest;

    fn id(n: u64) -> VersionId {
        VersionId::new(n).unwrap()
    }

    fn goal(of_10_000: u16, ms: u64) -> Option<LatencyGoal> {
        Some(LatencyGoal { of_10_000, within: Duration::from_millis(ms) })
    }

    #[test]
    fn a_goal_is_a_percentile_and_a_time() {
        for (text, expected) in [
            ("p50 1s", goal(5000, 1000)),
            ("p99 20ms", goal(9900, 20)),
            ("p99.99  5ms", goal(9999, 5)),
            ("p9 20ms", None),
            ("p100 20ms", None),
            ("p99.999 20ms", None),
            ("p99 0", None),
            ("p99 61s", None),
            ("p99", None),
            ("99 20ms", None),
            ("p+9 20ms", None),
        ] {
            assert_eq!(parse_goal(text), expected, "{text}");
        }
    }

    #[test]
    fn a_full_file_is_read() {
        let config = ModelConfig::parse(
            r#"
            model_file = "net.onnx"
            backend = "tract"
            device = "cuda:1"
            instances = 2
            threads = 3
            labels = "labels.txt"
            warmup = ["warmup.json"]
            latency_goal = "p99.9 20ms"
            versions = { latest = 2 }
            only_declared_outputs = true
            [batching]
            enabled = true
            preferred_rows = 16
            tune = false
            max_batch_size = 64
            max_delay = "2ms"
            ragged = { axis = 2, fill = { ids = 1 } }
            [limits]
            max_queue_requests = 10
            max_queue_bytes = "64MiB"
            default_timeout = "2s"
            [inputs.x]
            datatype = "FP32"
            shape = [-1, 3]
            [outputs."a/b"]
            kind = "logits"
            labels = "other.txt"
            shape = [-1, 3]
            reshape = [-1, 3, 1]
            [goldens]
            on_load = true
            "#,
        )
        .unwrap();
        assert_eq!((config.backend, config.threads), (BackendChoice::Tract, Some(3)));
        assert_eq!(config.groups, [on(Device::Cuda(1), Some(2))]);
        assert_eq!(
            config.batching,
            BatchingConfig {
                enabled: Some(true),
                preferred_rows: Some(16),
                tune: Some(false),
                max_batch_size: Some(64),
                max_delay: Some(Duration::from_millis(2)),
                ragged: RaggedConfig::Declared { axis: 2, fill: [("ids".to_string(), 1.0)].into() },
            }
        );
        assert_eq!(config.latency_goal, goal(9990, 20));
        assert_eq!((config.max_queue_requests, config.max_queue_bytes), (Some(10), Some(64 << 20)));
        assert_eq!(config.versions, VersionPolicy::Latest(2));
        assert_eq!(config.outputs["a/b"].kind, Some(OutputKind::Logits));
        assert!(config.goldens_on_load && config.warmup == [WarmUp::Request("warmup.json".into())]);
        assert_eq!(
            (config.default_timeout, config.model_file.as_deref()),
            (Some(Duration::from_secs(2)), Some("net.onnx"))
        );
        let shape = Some(vec![-1, 3]);
        assert_eq!(
            config.inputs["x"],
            TensorConfig { dtype: Some(DataType::Fp32), shape: shape.clone(), reshape: None }
        );
        assert_eq!(config.outputs["a/b"].tensor, TensorConfig { dtype: None, shape, reshape: Some(vec![-1, 3, 1]) });
        assert!(config.only_declared_outputs);
    }

    #[test]
    fn the_reference_is_a_file_that_reads_and_its_defaults_are_the_defaults() {
        let config = ModelConfig::parse(REFERENCE).unwrap();
        let defaults = crate::scheduler::Config::default();
        assert_eq!(config.batching.preferred_rows, Some(defaults.preferred_rows));
        assert_eq!(config.batching.max_delay, Some(defaults.max_delay));
        assert_eq!(config.batching.tune, Some(defaults.tuned));
        assert_eq!(config.max_queue_requests, Some(defaults.max_queue_requests));
        assert_eq!(config.max_queue_bytes, Some(defaults.max_queue_bytes));
        let silent = ModelConfig::default();
        assert_eq!(
            (config.backend, config.batching.enabled, config.versions, config.goldens_on_load),
            (silent.backend, silent.batching.enabled, silent.versions, silent.goldens_on_load)
        );
        assert_eq!(config.groups, [on(Device::Cpu, Some(2))]);
        let groups = REFERENCE.split_once("# [[instance_group]]").unwrap().1.split_once("\n\n").unwrap().0;
        let groups =
            ModelConfig::parse(&format!("[[instance_group]]{}", groups.replace("\n# ", "\n").replace("\n#", "\n")));
        assert_eq!(groups.unwrap().groups, [on(Device::Cuda(0), Some(2)), on(Device::Cpu, None)]);
    }

    fn on(device: Device, count: Option<usize>) -> InstanceGroup {
        InstanceGroup { devices: Devices::Listed(vec![device]), count, fallback: false }
    }

    #[test]
    fn devices_are_read_and_what_is_none_is_told() {
        let devices = |text: &str| ModelConfig::parse(&format!("device = {text:?}")).map(|config| config.groups);
        for (text, device) in [("cpu", Device::Cpu), ("cuda", Device::Cuda(0)), ("cuda:99", Device::Cuda(99))] {
            assert_eq!(devices(text).unwrap(), [on(device, None)]);
        }
        for (text, expected) in [("cuda:all", Devices::EveryGpu), ("auto", Devices::Auto)] {
            assert_eq!(devices(text).unwrap(), [InstanceGroup { devices: expected, count: None, fallback: false }]);
        }
        for text in
            ["", "gpu", "gpu:0", "CUDA", "cuda:", "cuda:-1", "cuda:+1", "cuda:1.0", "cuda:0x1", "cuda: 1", "cpu:0"]
        {
            let problem = devices(text).unwrap_err().to_string();
            let expected = format!("model.toml: `device`: found \"{text}\", expected {DEVICE_FORM}");
            assert_eq!(problem, expected);
        }
        assert!(devices("cuda:4294967296").unwrap_err().to_string().contains("expected \"cpu\""));
        let fallback = |text: &str| ModelConfig::parse(&format!("device_fallback = {text:?}"));
        assert!(fallback("cpu").unwrap().groups[0].fallback && !fallback("none").unwrap().groups[0].fallback);
        assert!(fallback("cuda:1").unwrap_err().to_string().contains("expected \"none\" or \"cpu\""));
    }

    #[test]
    fn several_groups_are_read_and_the_short_form_is_not_mixed_with_them() {
        let text = "[[instance_group]]\ndevice = 'cuda:1'\ndevice_fallback = 'cpu'\n[[instance_group]]\ncount = 3";
        let config = ModelConfig::parse(text).unwrap();
        let first = InstanceGroup { fallback: true, ..on(Device::Cuda(1), None) };
        assert_eq!(config.groups, [first, on(Device::Cpu, Some(3))]);
        let problem = |text: &str| ModelConfig::parse(text).unwrap_err().to_string();
        assert!(problem("instances = 2\n[[instance_group]]").contains("`instances`: found [[instance_group]], too"));
        assert!(problem("instance_group = []").contains("`instance_group`: found 0 groups, expected 1 to 64"));
        assert!(
            problem("[[instance_group]]\ninstances = 1").contains("`instance_group[0].instances`: found an unknown")
        );
        assert!(problem("[instance_group]").contains("[[instance_group]], a list of tables"));
    }

    #[test]
    fn silence_means_defaults_and_batching_has_a_short_form() {
        assert_eq!(ModelConfig::parse("").unwrap(), ModelConfig::default());
        for (text, enabled) in [("true", Some(true)), ("false", Some(false)), ("\"auto\"", None)] {
            assert_eq!(ModelConfig::parse(&format!("batching = {text}")).unwrap().batching.enabled, enabled);
        }
        assert_eq!(
            ModelConfig::parse("versions = [1, 3]").unwrap().versions,
            VersionPolicy::Listed([id(1), id(3)].into())
        );
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let ConfigProblems(_, problems) = ModelConfig::parse(
            r#"
            backend = "onnx"
            instnaces = 2
            threads = 0
            labels = "../labels.txt"
            versions = []
            model_file = "a/b"
            quux = 1
            [batching]
            max_delay = 2
            prefered_rows = 3
            [outputs.y]
            kind = "probs"
            [limits]
            max_queue_bytes = "lots"
            default_timeout = "0"
            [inputs.x]
            datatype = "FP33"
            shape = [-2]
            "#,
        )
        .unwrap_err();
        let problem = |key: &str| {
            problems.iter().find(|p| p.place == format!("`{key}`")).unwrap_or_else(|| panic!("{key}: {problems:?}"))
        };
        assert_eq!(problem("backend").found, "\"onnx\"");
        assert_eq!(problem("instnaces").expected, "`instances`, perhaps");
        assert_eq!(problem("threads").found, "0");
        assert!(problem("quux").expected.starts_with("one of backend, batching"));
        assert_eq!(problem("batching.max_delay").found, "2");
        assert_eq!(problem("batching.prefered_rows").expected, "`preferred_rows`, perhaps");
        assert!(problem("outputs.y.kind").expected.contains("\"log_probabilities\""));
        assert_eq!(problem("limits.max_queue_bytes").expected, SIZE_FORM);
        assert_eq!(problem("labels").found, "\"../labels.txt\"");
        assert_eq!(problem("versions").found, "[]");
        assert_eq!(problem("model_file").found, "\"a/b\"");
        assert_eq!(problem("limits.default_timeout").found, "\"0\"");
        assert_eq!(problem("inputs.x.datatype").found, "\"FP33\"");
        assert_eq!(problem("inputs.x.shape").found, "[-2]");
        assert_eq!(problems.len(), 14);
    }

    #[test]
    fn broken_toml_names_its_line() {
        let ConfigProblems(_, problems) = ModelConfig::parse("threads = 1\nlabels = = 2\nbackend = 1").unwrap_err();
        assert_eq!(problems[0].place, "`line 2`");
        assert!(ModelConfig::parse("a = 1\na = 2").is_err());
    }

    #[test]
    fn hostile_numbers_are_refused() {
        for text in ["instances = 2147483648", "[batching]\nmax_batch_size = -1", "[batching]\nmax_delay = \"9000h\""] {
            assert!(ModelConfig::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn policies_select() {
        let on_disk: BTreeMap<VersionId, bool> = [(id(1), true), (id(2), true), (id(3), false)].into();
        let ids = |ids: &[u64]| ids.iter().map(|n| id(*n)).collect::<BTreeSet<_>>();
        assert_eq!(VersionPolicy::All.select(&on_disk), ids(&[1, 2, 3]));
        assert_eq!(VersionPolicy::Latest(1).select(&on_disk), ids(&[2, 3]));
        assert_eq!(VersionPolicy::Latest(9).select(&on_disk), ids(&[1, 2, 3]));
        let lowest_failed = [(id(1), false), (id(2), true)].into();
        assert_eq!(VersionPolicy::Latest(2).select(&lowest_failed), ids(&[1, 2]));
        assert_eq!(VersionPolicy::Latest(1).select(&lowest_failed), ids(&[2]));
        assert_eq!(VersionPolicy::Listed(ids(&[1, 7])).select(&on_disk), ids(&[1]));
        assert_eq!(VersionPolicy::Latest(1).select(&[(id(3), false)].into()), ids(&[3]));
    }

    #[test]
    fn nearest_only_when_near() {
        assert_eq!(nearest("bathcing", ["backend", "batching"]), Some("batching"));
        assert_eq!(nearest("zzz", ["backend", "batching"]), None);
    }
}
