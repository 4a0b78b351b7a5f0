//! `config.pbtxt`, as Triton has it, read into the one form of settings there is; and the same in JSON.
//!
//! What would change answers and is not offered is refused; what would not is a warning that names it. A field that
//! Triton does not have is refused with its line. Every problem is reported at once, but for those of the syntax. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use miette::Diagnostic;
use prost_reflect::text_format::ParseError;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

use super::engines::BackendChoice;
use super::model_config::{
    BatchingConfig, ConfigFile, ConfigProblems, FALLBACK_FORM, MAX_DELAY, MAX_GROUPS, MAX_INSTANCES,
    MAX_QUEUE_REQUESTS, MAX_ROWS, MAX_THREADS, MAX_WARM_UPS, MadeContent, MadeInput, MadeWarmUp, ModelConfig,
    OutputConfig, RESHAPE_FORM, TensorConfig, VersionPolicy, WarmUp, is_plain_file, parse_fallback,
};
use super::placement::{Devices, InstanceGroup};
use super::view::interchangeable;
use super::warmup;
use crate::backend::Device;
use crate::error::quoted;
use crate::problem::Problem;
use crate::request::{MAX_TIMEOUT, Priority, VersionId};
use crate::tensor::{DataType, Shape};
use proto::model_config::SchedulingChoice;
use proto::model_instance_group::Kind;
use proto::model_queue_policy::TimeoutAction;
use proto::model_version_policy::PolicyChoice;
use proto::model_warmup::input::InputDataType;

#[allow(clippy::all, missing_docs, reason = "generated")]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/model_config/inference.rs"));
}

/// What becomes of every field; a part of docs/configuration.md.
pub const REFERENCE: &str = r#"A Triton repository is served as it is: in place of `model.toml` a model may have Triton's `config.pbtxt`. Beside it a
`model.toml` may say only what Triton's form has no words for: `[[layers]]` with what belongs to them, `[encoder]` and `[goldens]`. What would change
answers and is not offered is a refusal, with its reason in the index; what would not is a warning in `tidegate inspect` and the log.

| field | what it means here |
| --- | --- |
| `name` | the folder's name, if it is there |
| `backend`, `platform` | `onnxruntime` and `onnxruntime_onnx`: the engine at hand for ONNX. `tract`, `tract_onnx`, `candle`, `candle_safetensors`: that one. Others are refused |
| `default_model_filename` | `model_file`; no folders |
| `max_batch_size` | n: the most rows of a request, and `dims` leave the batch out; 2147483647: any number of rows. 0: no batch. A file without it, `input` and `output` is completed from the model, as in Triton; then the self-test decides about batching |
| `input`, `output` | names, `data_type` and `dims` must be the model's: all inputs or none; outputs that are not there are not given, unless none is. A `reshape` is the model's own shape where `dims` are another one of as many elements. A `label_filename` names an output's classes. `optional`, `allow_ragged_batch` and `is_shape_tensor` are refused |
| `dynamic_batching` | requests share batches because the file says so, without a self-test; without it they don't. The largest `preferred_batch_size`, or `max_batch_size`, is `preferred_rows`; `max_queue_delay_microseconds` is `max_delay` |
| `default_queue_policy` | `max_queue_size` is `max_queue_requests` (0: the default); `default_timeout_microseconds` with `REJECT` is `default_timeout`, and counts until the answer. `DELAY` is a warning |
| `priority_levels` | requests have levels 1 to 255 in any case, and 128 without one; a `default_priority_level` or policies by level are warnings |
| `instance_group` | `[[instance_group]]`: `count` instances on each of the `gpus`. `KIND_GPU` without them is `cuda:all`; `KIND_AUTO` is `auto`, or its `gpus` with a fallback to the CPU; `KIND_CPU` and `KIND_MODEL` are `cpu`. A file without groups runs on the CPU. `rate_limiter`, `secondary_devices`, `profile`, `passive` and `host_policy` are warnings |
| `version_policy` | the same; the latest one by default |
| `model_warmup` | run before the version is ready, which it is only if they succeed, all of them in 60 s. Where the version batches, requests share runs of at most `max_batch_size` rows, of at most 2^24 elements. An `input_data_file` lies in the folder `warmup` |
| `parameters` | `intra_op_thread_count` is `threads`, `device_fallback` is that of every group on GPUs; others are warnings |
| `optimization`, `response_cache`, `metric_tags`, `model_metrics`, `cc_model_filenames`, `model_operations`, `runtime` | warnings |
| `sequence_batching`, `ensemble_scheduling`, `batch_input`, `batch_output`, `model_transaction_policy.decoupled`, `model_repository_agents` | refused |
"#;

/// The `max_batch_size` of a model that takes any number of rows, as the server itself says it.
const ANY_ROWS: i32 = i32::MAX;
/// The parameter that stands for `device_fallback`.
const FALLBACK: &str = "device_fallback";
/// How often one warm-up may run.
const MAX_WARM_UP_RUNS: i64 = 1000;
/// Backends and platforms by name, and the engine that stands for each.
static ENGINES: [(&str, &str, BackendChoice); 3] = [
    ("onnxruntime", "onnxruntime_onnx", BackendChoice::Auto),
    ("tract", "tract_onnx", BackendChoice::Tract),
    ("candle", "candle_safetensors", BackendChoice::Candle),
];

/// Reads the text of a `config.pbtxt` in a folder of that name.
pub fn parse(text: &str, folder: &str) -> Result<ModelConfig, ConfigProblems> {
    understand(read(text, of_text), ConfigFile::ConfigPbtxt, folder)
}

/// Reads the same in JSON, for a model of that name.
pub fn parse_json(text: &str, model: &str) -> Result<ModelConfig, ConfigProblems> {
    understand(read(text, of_json), ConfigFile::Parameter, model)
}

fn understand(
    written: Result<proto::ModelConfig, Problem>,
    file: ConfigFile,
    folder: &str,
) -> Result<ModelConfig, ConfigProblems> {
    let written = written.map_err(|problem| ConfigProblems(file, vec![problem]))?;
    let rows = written.max_batch_size > 0;
    let mut reader = Reader { file, rows, problems: Vec::new(), warnings: Vec::new() };
    let config = reader.model(&written, folder);
    if reader.problems.is_empty() {
        Ok(ModelConfig { warnings: reader.warnings, ..config })
    } else {
        Err(ConfigProblems(file, reader.problems))
    }
}

fn read(
    text: &str,
    message: fn(MessageDescriptor, &str) -> Result<DynamicMessage, Problem>,
) -> Result<proto::ModelConfig, Problem> {
    const NAME: &str = "inference.ModelConfig";
    // Compiled from one source in one build: only a defect of it could make the schema and the structs differ.
    let defect = || Problem {
        place: format!("`{NAME}`"),
        found: "a schema that differs from the server's".into(),
        expected: "the one of this build".into(),
    };
    let files: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/model_config/model_config.bin"));
    let schema = DescriptorPool::decode(files).ok().and_then(|pool| pool.get_message_by_name(NAME));
    message(schema.ok_or_else(defect)?, text)?.transcode_to().map_err(|_| defect())
}

fn of_text(schema: MessageDescriptor, text: &str) -> Result<DynamicMessage, Problem> {
    let text = with_colons(text);
    DynamicMessage::parse_text_format(schema, &text).map_err(|error| syntax_problem(&text, &error))
}

fn of_json(schema: MessageDescriptor, text: &str) -> Result<DynamicMessage, Problem> {
    let problem = |error: serde_json::Error| Problem {
        place: format!("`line {}`", error.line()),
        found: quoted(&error.to_string()),
        expected: "Triton's ModelConfig in JSON".into(),
    };
    let mut json = serde_json::Deserializer::from_str(text);
    let message = DynamicMessage::deserialize(schema, &mut json).map_err(problem)?;
    json.end().map_err(problem)?;
    Ok(message)
}

/// Puts a colon between a name and a list, on the same line: the format lets it be left out before a list of messages, as
/// people do, and prost-reflect's parser does not. No field of the schema is an extension, whose name begins like a list.
fn with_colons(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut quote, mut escaped, mut comment, mut after_name) = (None, false, false, false);
    for c in text.chars() {
        if comment {
            comment = c != '\n';
        } else if let Some(opened) = quote {
            // A string ends with its line at the latest: the parser says so where it matters.
            quote = quote.filter(|_| escaped || c != opened && c != '\n');
            escaped = !escaped && c == '\\';
        } else {
            if c == '[' && after_name {
                out.push(':');
            }
            comment = c == '#';
            quote = Some(c).filter(|c| matches!(c, '"' | '\''));
            after_name = c.is_ascii_alphanumeric() || c == '_' || after_name && (comment || c.is_whitespace());
        }
        out.push(c);
    }
    out
}

fn syntax_problem(text: &str, error: &ParseError) -> Problem {
    let offset = error.labels().and_then(|mut labels| labels.next()).map_or(text.len(), |label| label.offset());
    let line = text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1;
    Problem {
        place: format!("`line {line}`"),
        found: error.to_string().replace('\n', ", "),
        expected: "the text format of Triton's ModelConfig".into(),
    }
}

struct Reader {
    /// Where the settings stand, for messages.
    file: ConfigFile,
    /// The first dimension counts rows, and `dims` leave it out.
    rows: bool,
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl Reader {
    fn model(&mut self, written: &proto::ModelConfig, folder: &str) -> ModelConfig {
        if !written.name.is_empty() && written.name != folder {
            let expected = format!("\"{}\", as its folder is called, or no name", quoted(folder));
            self.refuse("name", text(&written.name), expected);
        }
        self.unsupported(written);
        let inputs = self.inputs(&written.input);
        let outputs = self.outputs(&written.output);
        let (batching, queue) = self.scheduling(written);
        let fallback = self.fallback(&written.parameters);
        let groups = self.groups(&written.instance_group, fallback);
        ModelConfig {
            file: self.file,
            model_file: self.file_name("default_model_filename", &written.default_model_filename),
            backend: self.engine(&written.backend, &written.platform),
            groups,
            threads: self.parameters(&written.parameters),
            batching,
            max_queue_requests: queue.max_requests,
            default_timeout: queue.timeout,
            inputs,
            only_declared_outputs: !outputs.is_empty(),
            outputs,
            warmup: self.warm_ups(&written.model_warmup),
            versions: self.versions(written.version_policy.as_ref()),
            ..ModelConfig::default()
        }
    }

    /// What is not offered at all.
    fn unsupported(&mut self, written: &proto::ModelConfig) {
        let decoupled = written.model_transaction_policy.as_ref().is_some_and(|policy| policy.decoupled);
        let agents = written.model_repository_agents.as_ref().is_some_and(|agents| !agents.agents.is_empty());
        for (field, there, instead) in [
            ("batch_input", !written.batch_input.is_empty(), "inputs that clients send"),
            ("batch_output", !written.batch_output.is_empty(), "outputs with one row for each row sent"),
            ("model_transaction_policy.decoupled", decoupled, "one answer for each request"),
            ("model_repository_agents", agents, "model files that are served as they are"),
        ] {
            if there {
                self.refuse(field, "it set", instead);
            }
        }
        for (field, there) in [
            ("optimization", written.optimization.is_some()),
            ("runtime", !written.runtime.is_empty()),
            ("response_cache", written.response_cache.as_ref().is_some_and(|cache| cache.enable)),
            ("metric_tags", !written.metric_tags.is_empty()),
            ("model_metrics", written.model_metrics.is_some()),
            ("cc_model_filenames", !written.cc_model_filenames.is_empty()),
            ("model_operations", written.model_operations.is_some()),
        ] {
            if there {
                self.ignored(field);
            }
        }
    }

    fn engine(&mut self, backend: &str, platform: &str) -> BackendChoice {
        let by_backend = ENGINES.iter().find(|(name, _, _)| *name == backend);
        let by_platform = ENGINES.iter().find(|(_, name, _)| *name == platform);
        let names = |name: fn(&(&str, &str, BackendChoice)) -> String| ENGINES.map(|engine| name(&engine)).join(", ");
        if by_backend.is_none() && !backend.is_empty() {
            self.refuse("backend", text(backend), format!("one of {}", names(|(name, _, _)| text(name))));
        }
        if by_platform.is_none() && !platform.is_empty() {
            self.refuse("platform", text(platform), format!("one of {}", names(|(_, name, _)| text(name))));
        }
        if let (Some((_, expected, _)), Some((_, found, _))) = (by_backend, by_platform)
            && expected != found
        {
            self.refuse("platform", text(found), format!("\"{expected}\", the backend's"));
        }
        by_backend.or(by_platform).map_or(BackendChoice::Auto, |(_, _, engine)| *engine)
    }

    fn inputs(&mut self, written: &[proto::ModelInput]) -> BTreeMap<String, TensorConfig> {
        let mut inputs = BTreeMap::new();
        for input in written {
            let place = format!("input.{}", input.name);
            for (field, there, expected) in [
                ("optional", input.optional, "false: every request carries all inputs"),
                ("allow_ragged_batch", input.allow_ragged_batch, "false: rows keep their shape"),
                ("is_shape_tensor", input.is_shape_tensor, "false"),
            ] {
                if there {
                    self.refuse(&format!("{place}.{field}"), "true", expected);
                }
            }
            if input.is_non_linear_format_io {
                self.ignored(&format!("{place}.is_non_linear_format_io"));
            }
            let tensor = self.tensor(&place, input.data_type, &input.dims, input.reshape.as_ref());
            if inputs.insert(input.name.clone(), tensor).is_some() {
                self.refuse(&place, "it twice", "each input once");
            }
        }
        inputs
    }

    fn outputs(&mut self, written: &[proto::ModelOutput]) -> BTreeMap<String, OutputConfig> {
        let mut outputs = BTreeMap::new();
        for output in written {
            let place = format!("output.{}", output.name);
            if output.is_shape_tensor {
                self.refuse(&format!("{place}.is_shape_tensor"), "true", "false");
            }
            if output.is_non_linear_format_io {
                self.ignored(&format!("{place}.is_non_linear_format_io"));
            }
            let tensor = self.tensor(&place, output.data_type, &output.dims, output.reshape.as_ref());
            let labels = self.file_name(&format!("{place}.label_filename"), &output.label_filename);
            if outputs.insert(output.name.clone(), OutputConfig { kind: None, labels, tensor }).is_some() {
                self.refuse(&place, "it twice", "each output once");
            }
        }
        outputs
    }

    fn tensor(
        &mut self,
        place: &str,
        data_type: i32,
        dims: &[i64],
        reshape: Option<&proto::ModelTensorReshape>,
    ) -> TensorConfig {
        let reshape = reshape.map(|reshape| &reshape.shape[..]).filter(|reshape| *reshape != dims);
        if let Some(reshape) = reshape.filter(|reshape| !interchangeable(dims, reshape)) {
            self.refuse(&format!("{place}.reshape"), format!("{reshape:?} for {dims:?}"), RESHAPE_FORM);
        }
        if let Some(dim) = dims.iter().find(|dim| **dim == 0 || **dim < -1) {
            self.refuse(&format!("{place}.dims"), dim.to_string(), "a positive number, or -1 for any");
        }
        let rows: &[i64] = if self.rows { &[-1] } else { &[] };
        TensorConfig {
            dtype: self.data_type(place, data_type),
            shape: Some([rows, dims].concat()),
            reshape: reshape.map(|reshape| [rows, reshape].concat()),
        }
    }

    fn data_type(&mut self, place: &str, data_type: i32) -> Option<DataType> {
        let dtype = proto::DataType::try_from(data_type).ok().and_then(dtype);
        if dtype.is_none() {
            self.refuse(&format!("{place}.data_type"), "no datatype", "one such as TYPE_FP32");
        }
        dtype
    }

    fn scheduling(&mut self, written: &proto::ModelConfig) -> (BatchingConfig, Queue) {
        let max_batch_size = match written.max_batch_size {
            ANY_ROWS => None,
            most => self.count("max_batch_size", i64::from(most), MAX_ROWS),
        };
        // Triton completes a file that says nothing of tensors and rows from the model, and so does the server.
        let completed = !self.rows && written.input.is_empty() && written.output.is_empty();
        let alone = BatchingConfig { enabled: Some(false), max_batch_size, ..BatchingConfig::default() };
        match &written.scheduling_choice {
            None if completed => (BatchingConfig::default(), Queue::default()),
            None => (alone, Queue::default()),
            Some(SchedulingChoice::DynamicBatching(batching)) => {
                if !self.rows && !completed {
                    self.refuse("dynamic_batching", "it without `max_batch_size`", "`max_batch_size` of 1 or more");
                }
                self.dynamic_batching(batching, max_batch_size)
            }
            Some(SchedulingChoice::SequenceBatching(_)) => {
                self.refuse("sequence_batching", "it set", "dynamic_batching, or none: requests are independent");
                (alone, Queue::default())
            }
            Some(SchedulingChoice::EnsembleScheduling(_)) => {
                self.refuse("ensemble_scheduling", "it set", "a model file of its own");
                (alone, Queue::default())
            }
        }
    }

    fn dynamic_batching(
        &mut self,
        written: &proto::ModelDynamicBatching,
        max_batch_size: Option<usize>,
    ) -> (BatchingConfig, Queue) {
        let most = max_batch_size.map_or(MAX_ROWS, |most| i64::try_from(most).unwrap_or(MAX_ROWS));
        let sizes = written.preferred_batch_size.iter().map(|size| i64::from(*size));
        for size in sizes.clone().filter(|size| !(1..=most).contains(size)) {
            self.refuse("dynamic_batching.preferred_batch_size", size.to_string(), format!("1 to {most}"));
        }
        let max_delay = Duration::from_micros(written.max_queue_delay_microseconds);
        if max_delay > MAX_DELAY {
            let expected = format!("at most {}", MAX_DELAY.as_micros());
            self.refuse("dynamic_batching.max_queue_delay_microseconds", max_delay.as_micros().to_string(), expected);
        }
        if written.preserve_ordering {
            self.warn("dynamic_batching.preserve_ordering", "answers are sent as they are ready");
        }
        self.priorities(written);
        let batching = BatchingConfig {
            enabled: Some(true),
            preferred_rows: sizes.max().and_then(|size| usize::try_from(size).ok()).or(max_batch_size),
            max_batch_size,
            max_delay: Some(max_delay),
            ..BatchingConfig::default()
        };
        (batching, self.queue(written.default_queue_policy.as_ref()))
    }

    fn priorities(&mut self, written: &proto::ModelDynamicBatching) {
        let (levels, default) = (u64::from(Priority::LEVELS), Priority::default().level());
        if written.priority_levels > levels {
            self.warn("dynamic_batching.priority_levels", &format!("levels above {levels} count as {levels}"));
        }
        if written.priority_levels > 1 && written.default_priority_level != u64::from(default) {
            let why = format!("requests without a priority are of level {default} of {levels}");
            self.warn("dynamic_batching.default_priority_level", &why);
        }
        if !written.priority_queue_policy.is_empty() {
            self.warn("dynamic_batching.priority_queue_policy", "every level has the default policy");
        }
    }

    fn queue(&mut self, written: Option<&proto::ModelQueuePolicy>) -> Queue {
        const PLACE: &str = "default_queue_policy";
        let Some(written) = written else { return Queue::default() };
        let max_requests =
            self.count(&format!("{PLACE}.max_queue_size"), i64::from(written.max_queue_size), MAX_QUEUE_REQUESTS);
        let timeout = Duration::from_micros(written.default_timeout_microseconds);
        if timeout.is_zero() {
            return Queue { max_requests, timeout: None };
        }
        if timeout > MAX_TIMEOUT {
            let expected = format!("at most {}", MAX_TIMEOUT.as_micros());
            self.refuse(&format!("{PLACE}.default_timeout_microseconds"), timeout.as_micros().to_string(), expected);
        }
        if written.timeout_action() == TimeoutAction::Delay {
            self.warn(&format!("{PLACE}.timeout_action"), "requests do not lose their place: no timeout is set");
            return Queue { max_requests, timeout: None };
        }
        if !written.allow_timeout_override {
            self.warn(&format!("{PLACE}.allow_timeout_override"), "requests may set shorter timeouts");
        }
        Queue { max_requests, timeout: Some(timeout) }
    }

    fn groups(&mut self, written: &[proto::ModelInstanceGroup], fallback: bool) -> Vec<InstanceGroup> {
        if written.len() > MAX_GROUPS {
            self.refuse("instance_group", written.len().to_string(), format!("at most {MAX_GROUPS}"));
        }
        written.iter().take(MAX_GROUPS).enumerate().map(|(i, group)| self.group(i, group, fallback)).collect()
    }

    fn group(&mut self, i: usize, written: &proto::ModelInstanceGroup, fallback: bool) -> InstanceGroup {
        let place = format!("instance_group[{i}]");
        for (field, there) in [
            ("rate_limiter", written.rate_limiter.is_some()),
            ("secondary_devices", !written.secondary_devices.is_empty()),
            ("profile", !written.profile.is_empty()),
            ("passive", written.passive),
            ("host_policy", !written.host_policy.is_empty()),
        ] {
            if there {
                self.ignored(&format!("{place}.{field}"));
            }
        }
        let kind = Kind::try_from(written.kind).ok();
        let devices = match kind {
            Some(Kind::Gpu) if written.gpus.is_empty() => Devices::EveryGpu,
            Some(Kind::Auto) if written.gpus.is_empty() => Devices::Auto,
            Some(Kind::Gpu | Kind::Auto) => self.gpus(&place, &written.gpus),
            Some(Kind::Cpu | Kind::Model) => Devices::default(),
            None => {
                self.refuse(&format!("{place}.kind"), written.kind.to_string(), "KIND_CPU or KIND_GPU");
                Devices::default()
            }
        };
        if kind == Some(Kind::Cpu) && !written.gpus.is_empty() {
            self.refuse(&format!("{place}.gpus"), format!("{:?}", written.gpus), "none with KIND_CPU");
        }
        let count = self.count(&format!("{place}.count"), i64::from(written.count), MAX_INSTANCES);
        InstanceGroup { devices, count, fallback: fallback || kind == Some(Kind::Auto) }
    }

    fn gpus(&mut self, place: &str, written: &[i32]) -> Devices {
        let place = format!("{place}.gpus");
        let mut listed = Vec::new();
        for number in written {
            match (*number).try_into().map(Device::Cuda) {
                Ok(device) if listed.contains(&device) => {
                    self.refuse(&place, format!("{number} twice"), "each GPU once")
                }
                Ok(device) => listed.push(device),
                Err(_) => self.refuse(&place, number.to_string(), "a GPU's number, from 0"),
            }
        }
        if listed.len() > MAX_GROUPS {
            self.refuse(&place, format!("{} GPUs", listed.len()), format!("at most {MAX_GROUPS}"));
        }
        Devices::Listed(listed)
    }

    fn versions(&mut self, written: Option<&proto::ModelVersionPolicy>) -> VersionPolicy {
        match written.and_then(|policy| policy.policy_choice.as_ref()) {
            None => VersionPolicy::Latest(1),
            Some(PolicyChoice::All(_)) => VersionPolicy::All,
            Some(PolicyChoice::Latest(latest)) => {
                VersionPolicy::Latest(usize::try_from(latest.num_versions).unwrap_or(usize::MAX).max(1))
            }
            Some(PolicyChoice::Specific(specific)) => {
                let version = |n: &i64| VersionId::new(u64::try_from(*n).ok()?);
                let listed: Option<BTreeSet<VersionId>> = specific.versions.iter().map(version).collect();
                if listed.is_none() || specific.versions.is_empty() {
                    let found = format!("{:?}", specific.versions);
                    self.refuse("version_policy.specific.versions", found, "numbers from 1");
                }
                VersionPolicy::Listed(listed.unwrap_or_default())
            }
        }
    }

    fn warm_ups(&mut self, written: &[proto::ModelWarmup]) -> Vec<WarmUp> {
        if written.len() > MAX_WARM_UPS {
            self.refuse("model_warmup", written.len().to_string(), format!("at most {MAX_WARM_UPS}"));
        }
        written.iter().take(MAX_WARM_UPS).enumerate().map(|(i, sample)| self.warm_up(i, sample)).collect()
    }

    fn warm_up(&mut self, i: usize, written: &proto::ModelWarmup) -> WarmUp {
        let place = format!("model_warmup[{i}]");
        let requests = self.count(&format!("{place}.batch_size"), i64::from(written.batch_size), MAX_ROWS);
        let runs = self.count(&format!("{place}.count"), i64::from(written.count), MAX_WARM_UP_RUNS);
        let mut inputs = BTreeMap::new();
        for (name, input) in &written.inputs {
            if let Some(made) = self.made_input(&format!("{place}.inputs.{name}"), input) {
                inputs.insert(name.clone(), made);
            }
        }
        let name = if written.name.is_empty() { place } else { quoted(&written.name) };
        WarmUp::Made(MadeWarmUp { name, requests: requests.unwrap_or(1), runs: runs.unwrap_or(1), inputs })
    }

    fn made_input(&mut self, place: &str, written: &proto::model_warmup::Input) -> Option<MadeInput> {
        let rows: &[i64] = if self.rows { &[1] } else { &[] };
        let shape = Shape::from_wire(&[rows, &written.dims].concat());
        if let Err(error) = &shape {
            self.refuse(&format!("{place}.dims"), error.to_string(), "fixed extents");
        }
        let content = match &written.input_data_type {
            Some(InputDataType::ZeroData(true)) => Some(MadeContent::Zeros),
            Some(InputDataType::RandomData(true)) => Some(MadeContent::Random),
            Some(InputDataType::InputDataFile(file)) => {
                self.file_name(&format!("{place}.input_data_file"), file).map(MadeContent::File)
            }
            _ => {
                let expected = format!("zero_data, random_data, or input_data_file in the folder `{}`", warmup::FOLDER);
                self.refuse(place, "no data", expected);
                None
            }
        };
        Some(MadeInput { dtype: self.data_type(place, written.data_type)?, shape: shape.ok()?, content: content? })
    }

    /// A key that Triton hands to the backend unread: a way to say what `model.toml` can.
    fn fallback(&mut self, written: &BTreeMap<String, proto::ModelParameter>) -> bool {
        let Some(found) = written.get(FALLBACK).map(|parameter| parameter.string_value.as_str()) else { return false };
        let fallback = parse_fallback(found);
        if fallback.is_none() {
            self.refuse(&format!("parameters.{FALLBACK}"), text(found), FALLBACK_FORM);
        }
        fallback.unwrap_or(false)
    }

    fn parameters(&mut self, written: &BTreeMap<String, proto::ModelParameter>) -> Option<usize> {
        const THREADS: &str = "intra_op_thread_count";
        for name in written.keys().filter(|name| ![THREADS, FALLBACK].contains(&name.as_str())) {
            self.ignored(&format!("parameters.{name}"));
        }
        let place = format!("parameters.{THREADS}");
        let count = &written.get(THREADS)?.string_value;
        match count.parse() {
            Ok(count) => self.count(&place, count, MAX_THREADS),
            Err(_) => {
                self.refuse(&place, text(count), format!("a number from 0 to {MAX_THREADS}"));
                None
            }
        }
    }

    /// 0 is as good as nothing.
    fn count(&mut self, place: &str, found: i64, most: i64) -> Option<usize> {
        if !(0..=most).contains(&found) {
            self.refuse(place, found.to_string(), format!("0 to {most}"));
        }
        usize::try_from(found).ok().filter(|count| *count > 0)
    }

    fn file_name(&mut self, place: &str, name: &str) -> Option<String> {
        if name.is_empty() {
            return None;
        }
        if !is_plain_file(name) {
            self.refuse(place, text(name), "a file's name, without folders");
        }
        Some(name.to_string())
    }

    fn refuse(&mut self, place: &str, found: impl Into<String>, expected: impl Into<String>) {
        let place = format!("`{}`", quoted(place));
        self.problems.push(Problem { place, found: found.into(), expected: expected.into() });
    }

    fn ignored(&mut self, place: &str) {
        self.warn(place, "not supported, ignored");
    }

    fn warn(&mut self, place: &str, why: &str) {
        self.warnings.push(format!("{}: `{}`: {why}", self.file.name(), quoted(place)));
    }
}

#[derive(Default)]
struct Queue {
    max_requests: Option<usize>,
    timeout: Option<Duration>,
}

fn text(value: &str) -> String {
    format!("\"{}\"", quoted(value))
}

fn dtype(written: proto::DataType) -> Option<DataType> {
    match written {
        proto::DataType::TypeInvalid => None,
        proto::DataType::TypeBool => Some(DataType::Bool),
        proto::DataType::TypeUint8 => Some(DataType::Uint8),
        proto::DataType::TypeUint16 => Some(DataType::Uint16),
        proto::DataType::TypeUint32 => Some(DataType::Uint32),
        proto::DataType::TypeUint64 => Some(DataType::Uint64),
        proto::DataType::TypeInt8 => Some(DataType::Int8),
        proto::DataType::TypeInt16 => Some(DataType::Int16),
        proto::DataType::TypeInt32 => Some(DataType::Int32),
        proto::DataType::TypeInt64 => Some(DataType::Int64),
        proto::DataType::TypeFp16 => Some(DataType::Fp16),
        proto::DataType::TypeFp32 => Some(DataType::Fp32),
        proto::DataType::TypeFp64 => Some(DataType::Fp64),
        proto::DataType::TypeString => Some(DataType::Bytes),
        proto::DataType::TypeBf16 => Some(DataType::Bf16),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> ModelConfig {
        parse(text, "m").unwrap_or_else(|problems| panic!("{text}: {problems}"))
    }

    fn refusal(text: &str) -> String {
        parse(text, "m").err().unwrap_or_else(|| panic!("accepted: {text}")).to_string()
    }

    #[test]
    fn a_full_file_is_read() {
        let config = config(
            r#"
            # As people write it: comments, either quote, optional separators.
            name: "m" platform: "onnxruntime_onnx", backend: 'onnxruntime'
            max_batch_size: 16
            default_model_filename: "net.onnx"
            input [ { name: "x" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [ 3, -1 ] reshape { shape: [3, -1] } } ]
            output { name: "y" data_type: TYPE_STRING dims: 1 reshape: { shape: [] } label_filename: "labels.txt" }
            dynamic_batching {
              preferred_batch_size: [ 4, 8 ]
              max_queue_delay_microseconds: 2000
              default_queue_policy { default_timeout_microseconds: 5000000 allow_timeout_override: true max_queue_size: 9 }
            }
            instance_group [ { count: 2 kind: KIND_GPU gpus: [ 1, 2 ] }, { count: 1, kind: KIND_CPU } ]
            version_policy: { specific: { versions: [ 1, 3 ] } }
            parameters { key: "intra_op_thread_count" value: { string_value: "3" } }
            model_warmup [ {
              name: "w" batch_size: 4 count: 2
              inputs { key: "x" value { data_type: TYPE_FP32 dims: [3, 5] random_data: true } }
            } ]
            response_cache { enable: false }
            "#,
        );
        let id = |n| VersionId::new(n).unwrap();
        let made =
            MadeInput { dtype: DataType::Fp32, shape: Shape::new([1, 3, 5]).unwrap(), content: MadeContent::Random };
        let warm_up = MadeWarmUp { name: "w".into(), requests: 4, runs: 2, inputs: [("x".into(), made)].into() };
        let tensor = |dtype, shape: &[i64], reshape: Option<&[i64]>| TensorConfig {
            dtype: Some(dtype),
            shape: Some(shape.to_vec()),
            reshape: reshape.map(<[i64]>::to_vec),
        };
        let expected = ModelConfig {
            file: ConfigFile::ConfigPbtxt,
            model_file: Some("net.onnx".into()),
            groups: vec![
                InstanceGroup { devices: listed(&[1, 2]), count: Some(2), fallback: false },
                InstanceGroup { devices: Devices::default(), count: Some(1), fallback: false },
            ],
            threads: Some(3),
            batching: BatchingConfig {
                enabled: Some(true),
                preferred_rows: Some(8),
                tune: None,
                max_batch_size: Some(16),
                max_delay: Some(Duration::from_millis(2)),
                ..BatchingConfig::default()
            },
            max_queue_requests: Some(9),
            default_timeout: Some(Duration::from_secs(5)),
            inputs: [("x".into(), tensor(DataType::Fp32, &[-1, 3, -1], None))].into(),
            only_declared_outputs: true,
            outputs: [(
                "y".to_string(),
                OutputConfig {
                    kind: None,
                    labels: Some("labels.txt".into()),
                    tensor: tensor(DataType::Bytes, &[-1, 1], Some(&[-1])),
                },
            )]
            .into(),
            warmup: vec![WarmUp::Made(warm_up)],
            versions: VersionPolicy::Listed([id(1), id(3)].into()),
            ..ModelConfig::default()
        };
        assert_eq!(config, expected);
    }

    fn listed(gpus: &[u32]) -> Devices {
        Devices::Listed(gpus.iter().copied().map(Device::Cuda).collect())
    }

    #[test]
    fn instance_groups_run_where_triton_would_run_them() {
        let group = |text: &str| {
            let config = config(&format!("instance_group {{ {text} }}"));
            assert_eq!((config.warnings, config.groups.len()), (vec![], 1), "{text}");
            let InstanceGroup { devices, count, fallback } = config.groups[0].clone();
            (devices, count, fallback)
        };
        assert_eq!(group("kind: KIND_CPU count: 3"), (Devices::default(), Some(3), false));
        assert_eq!(group("kind: KIND_MODEL"), (Devices::default(), None, false));
        assert_eq!(group("kind: KIND_GPU count: 2"), (Devices::EveryGpu, Some(2), false));
        assert_eq!(group("kind: KIND_GPU gpus: [0, 1]"), (listed(&[0, 1]), None, false));
        assert_eq!(group("count: 2"), (Devices::Auto, Some(2), true));
        assert_eq!(group("kind: KIND_AUTO gpus: [0, 1]"), (listed(&[0, 1]), None, true));
        let parameter = "parameters { key: 'device_fallback' value { string_value: 'cpu' } }";
        let fallback = config(&format!("instance_group {{ kind: KIND_GPU gpus: 1 }} {parameter}"));
        assert!(fallback.warnings.is_empty() && fallback.groups[0].fallback, "{fallback:?}");
    }

    #[test]
    fn lists_of_messages_need_no_colon_and_strings_and_comments_stay() {
        for (text, expected) in [
            ("a [ { b: [1] } ]", "a :[ { b: [1] } ]"),
            ("a # b [\n[", "a # b [\n:["),
            ("a: 'b [\\' c [' d[", "a: 'b [\\' c [' d:["),
            ("a: \"'\" [", "a: \"'\" ["),
            ("a: \"\\\\\" b [", "a: \"\\\\\" b :["),
        ] {
            assert_eq!(with_colons(text), expected);
        }
    }

    #[test]
    fn silence_means_what_it_means_in_triton() {
        let silent = config("");
        assert_eq!((silent.versions, silent.batching.enabled, silent.groups), (VersionPolicy::Latest(1), None, vec![]));
        let batching = |text: &str| {
            let BatchingConfig { enabled, preferred_rows, max_batch_size, .. } = config(text).batching;
            (enabled, preferred_rows, max_batch_size)
        };
        let input = "input { name: 'x' data_type: TYPE_BOOL dims: 2 }";
        assert_eq!(batching(input), (Some(false), None, None));
        assert_eq!(batching("max_batch_size: 8"), (Some(false), None, Some(8)));
        assert_eq!(batching("max_batch_size: 8 dynamic_batching {}"), (Some(true), Some(8), Some(8)));
        assert_eq!(batching("dynamic_batching {}"), (Some(true), None, None));
        let any = "max_batch_size: 2147483647 dynamic_batching { preferred_batch_size: 32 }";
        assert_eq!(batching(&format!("{any} {input}")), (Some(true), Some(32), None));
        assert_eq!(config(&format!("{any} {input}")).inputs["x"].shape, Some(vec![-1, 2]));
        assert_eq!(config(input).inputs["x"].shape, Some(vec![2]));
        let versions = |policy: &str| config(&format!("version_policy {{ {policy} }}")).versions;
        assert_eq!(versions("all {}"), VersionPolicy::All);
        assert_eq!(versions("latest {}"), VersionPolicy::Latest(1));
        assert_eq!(versions("latest { num_versions: 2 }"), VersionPolicy::Latest(2));
        assert_eq!(config("backend: 'tract'").backend, BackendChoice::Tract);
    }

    #[test]
    fn what_would_change_answers_is_refused_by_name() {
        let input = |field: &str| format!("input {{ name: 'x' data_type: TYPE_FP32 dims: 1 {field} }}");
        let cases: &[(&str, &str)] = &[
            ("name: 'other'", "`name`: found \"other\", expected \"m\", as its folder is called"),
            ("backend: 'python'", "`backend`: found \"python\", expected one of \"onnxruntime\", "),
            ("platform: 'tensorrt_plan'", "`platform`: found \"tensorrt_plan\""),
            ("backend: 'onnxruntime' platform: 'tract_onnx'", "\"onnxruntime_onnx\", the backend's"),
            ("default_model_filename: '../net.onnx'", "`default_model_filename`: found \"../net.onnx\""),
            ("max_batch_size: -1", "`max_batch_size`: found -1"),
            (&input("reshape { shape: [2] }"), "`input.x.reshape`: found [2] for [1], expected as many elements as"),
            (&input("optional: true"), "`input.x.optional`: found true"),
            (&input("allow_ragged_batch: true"), "`input.x.allow_ragged_batch`"),
            (&input("is_shape_tensor: true"), "`input.x.is_shape_tensor`"),
            (&input("dims: 0"), "`input.x.dims`: found 0"),
            (&input("").repeat(2), "`input.x`: found it twice"),
            ("output { name: 'y' dims: 1 }", "`output.y.data_type`: found no datatype"),
            ("batch_input { kind: BATCH_ELEMENT_COUNT }", "`batch_input`"),
            ("batch_output {}", "`batch_output`"),
            ("sequence_batching {}", "`sequence_batching`"),
            ("ensemble_scheduling {}", "`ensemble_scheduling`"),
            ("model_transaction_policy { decoupled: true }", "`model_transaction_policy.decoupled`"),
            ("model_repository_agents { agents { name: 'checksum' } }", "`model_repository_agents`"),
            (&input("} dynamic_batching {"), "`dynamic_batching`: found it without `max_batch_size`"),
            ("max_batch_size: 4 dynamic_batching { preferred_batch_size: 8 }", "found 8, expected 1 to 4"),
            ("instance_group { count: 100000 }", "`instance_group[0].count`: found 100000"),
            ("instance_group { count: -1 }", "`instance_group[0].count`: found -1, expected 0 to 256"),
            ("instance_group { kind: KIND_GPU gpus: -1 }", "`instance_group[0].gpus`: found -1"),
            ("instance_group { kind: KIND_GPU gpus: [2, 2] }", "`instance_group[0].gpus`: found 2 twice"),
            ("instance_group { kind: KIND_CPU gpus: 0 }", "`instance_group[0].gpus`: found [0], expected none"),
            ("parameters { key: 'device_fallback' value { string_value: 'gpu' } }", "\"none\" or \"cpu\""),
            ("version_policy { specific { versions: 0 } }", "`version_policy.specific.versions`: found [0]"),
            ("parameters { key: 'intra_op_thread_count' value { string_value: 'all' } }", "found \"all\""),
            ("model_warmup { inputs { key: 'x' value { data_type: TYPE_FP32 dims: -1 zero_data: true } } }", ".dims`"),
            ("model_warmup { inputs { key: 'x' value { data_type: TYPE_FP32 dims: 1 } } }", "found no data"),
        ];
        for &(text, expected) in cases {
            let refusal = refusal(text);
            assert!(refusal.starts_with("config.pbtxt: ") && refusal.contains(expected), "{text}: {refusal}");
        }
        assert!(refusal("name: 'a' backend: 'b' platform: 'c'").matches("expected").count() == 3, "all at once");
    }

    #[test]
    fn what_changes_no_answer_is_a_warning_that_names_it() {
        let policy = |text: &str| format!("max_batch_size: 4 dynamic_batching {{ default_queue_policy {{ {text} }} }}");
        let cases: &[(&str, &str)] = &[
            ("optimization { graph { level: 1 } }", "`optimization`: not supported, ignored"),
            ("response_cache { enable: true }", "`response_cache`"),
            ("metric_tags { key: 'a' value: 'b' }", "`metric_tags`"),
            ("cc_model_filenames { key: '7.5' value: 'b' }", "`cc_model_filenames`"),
            ("parameters { key: 'execution_mode' value { string_value: '1' } }", "`parameters.execution_mode`"),
            ("instance_group { rate_limiter {} }", "`instance_group[0].rate_limiter`"),
            ("max_batch_size: 4 dynamic_batching { preserve_ordering: true }", "preserve_ordering`"),
            (
                "max_batch_size: 4 dynamic_batching { priority_levels: 3 default_priority_level: 2 }",
                "of level 128 of 255",
            ),
            ("max_batch_size: 4 dynamic_batching { priority_queue_policy { key: 1 value {} } }", "every level"),
            (&policy("timeout_action: DELAY default_timeout_microseconds: 1"), "timeout_action`"),
            (&policy("default_timeout_microseconds: 1"), "allow_timeout_override`"),
        ];
        for &(text, expected) in cases {
            let config = config(text);
            let [warning] = &config.warnings[..] else { panic!("{text}: {:?}", config.warnings) };
            assert!(warning.starts_with("config.pbtxt: ") && warning.contains(expected), "{text}: {warning}");
        }
        assert_eq!(config(&policy("timeout_action: DELAY default_timeout_microseconds: 1")).default_timeout, None);
    }

    #[test]
    fn json_says_the_same_as_text() {
        let text = "max_batch_size: 8 input { name: 'x' data_type: TYPE_FP32 dims: [3, -1] } dynamic_batching { \
                    max_queue_delay_microseconds: 9 } parameters { key: 'intra_op_thread_count' value { string_value: '3' } }";
        let snake = r#"{"name":"m","max_batch_size":8,"input":[{"name":"x","data_type":"TYPE_FP32","dims":["3",-1]}],
            "dynamic_batching":{"max_queue_delay_microseconds":9},
            "parameters":{"intra_op_thread_count":{"string_value":"3"}}}"#;
        let camel = snake.replace("max_batch_size", "maxBatchSize").replace("data_type", "dataType");
        for json in [snake, &camel] {
            let expected = ModelConfig { file: ConfigFile::Parameter, ..config(text) };
            assert_eq!(parse_json(json, "m").unwrap(), expected, "{json}");
        }
        for (json, expected) in [
            (
                "{\n\"max_batch_sise\": 8}",
                "parameter `config`: `line 2`: found unrecognized field name 'max_batch_sise'",
            ),
            ("[]", "`line 1`"),
            ("{} {}", "trailing characters"),
            ("{\"max_batch_size\": 99999999999}", "`line 1`"),
            (r#"{"name":"other"}"#, "parameter `config`: `name`: found \"other\", expected \"m\""),
            (r#"{"batch_output":[{}]}"#, "`batch_output`"),
        ] {
            let refusal = parse_json(json, "m").unwrap_err().to_string();
            assert!(refusal.contains(expected), "{json}: {refusal}");
        }
    }

    #[test]
    fn what_triton_does_not_have_is_refused_with_its_line() {
        let unknown = refusal("name: 'm'\nmax_batch_sise: 8\n");
        assert!(unknown.contains("`line 2`") && unknown.contains("max_batch_sise"), "{unknown}");
        assert!(refusal("name: 'm'\n\ninput [ { name: 'x' }").contains("`line 3`"));
        assert!(refusal("input { data_type: TYPE_FP33 }").contains("TYPE_FP33"));
        assert!(refusal("max_batch_size: 99999999999").contains("out of range"));
    }
}
