//! From a version on disk to one that is ready to serve: copy and hash, describe, choose an engine, load, decide about
//! batching, warm up. Slow, and called on the loader's thread (or by `inspect` and `validate`) only.
//!
//! Everything a version may fail of is a [`Failure`]; a panic of an engine is one, too. After a failure the version has
//! left nothing behind in the cache.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cache::{Cache, CacheError, Cached};
use super::calibrate::Sizes;
use super::engines::{Chosen, Engines};
use super::golden::{self, Goldens};
use super::invent::{self, Random, Recipe};
use super::model_config::{ModelConfig, WarmUp};
use super::placement::{Placed, Placement, Site};
use super::probe::Probe;
use super::selftest::{self, BatchDecision};
use super::source::{Discovered, Format, GOLDEN_FILE, MODEL_FILE, read_beside};
use super::timing::{Subject, Timed, Timing};
use super::version::{Facts, OutputInfo, Version};
use super::warmup::WarmUps;
use super::{declared, ragged, view, warmup};
use crate::backend::safetensors::{self, Declared};
use crate::backend::{Artifact, Description, Device, LoadError, LoadOptions, Model, onnx};
use crate::monitor::{Monitor, MonitoredOutput};
use crate::scheduler::{self, DEFAULT_PREFERRED_ROWS, Gate, Group, Sample, Scheduler, rows_at_first};
use crate::tensor::{Dim, OutputKind, Signature, Tensor, TensorSpec};

/// Longest file of class names, in bytes, and the most names in it.
const MAX_LABELS_BYTES: u64 = 16 << 20;
const MAX_LABELS: usize = 1 << 20;
/// What invented warm-up runs may take together.
const WARM_UP_BUDGET: Duration = Duration::from_secs(5);
const WARM_UP_SEED: u64 = 1;

/// Why a version is not served. Shown in the index: names files by their names in the registry only.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Refused(String),
    /// The model's settings, or a file that they name.
    #[error("{0}")]
    Config(String),
    #[error(transparent)]
    Copy(#[from] CacheError),
    #[error(transparent)]
    Model(#[from] LoadError),
    #[error("warm-up `{name}`: {reason}")]
    WarmUp { name: String, reason: String },
    #[error("`{GOLDEN_FILE}`: {0}")]
    Golden(String),
    #[error("the engine panicked while it loaded the model")]
    Panicked,
}

impl Failure {
    /// Whether the same files may load later.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Failure::Copy(CacheError::Unreadable { .. } | CacheError::Full { .. } | CacheError::Unwritable { .. })
        )
    }
}

pub struct Loader {
    pub cache: Arc<Cache>,
    pub engines: Engines,
    pub cores: usize,
    pub gate: Arc<Gate>,
    pub timing: Timing,
    /// See [`super::Config::longest_inline`].
    pub longest_inline: Option<Duration>,
}

/// A version in the cache, described but not loaded.
pub struct Staged {
    pub cached: Cached,
    pub settings: Settings,
    description: Arc<Description>,
    begun: Instant,
}

/// What a version is loaded with besides its artifact. Equal settings and digests make equal versions.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub config: Arc<ModelConfig>,
    /// Class names by file name.
    labels: BTreeMap<String, Arc<[String]>>,
}

/// A version loaded and warm, not yet serving.
pub struct Loaded {
    pub facts: Facts,
    /// Golden cases that agreed; `None` where they were not compared.
    pub goldens: Option<usize>,
    groups: Vec<Group>,
    cached: Cached,
}

/// What only an engine can make, and may panic over: made in one guarded place.
struct Made {
    facts: Facts,
    goldens: Option<usize>,
    groups: Vec<Group>,
}

/// Whether golden cases are compared where `model.toml` does not ask for it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum CompareGoldens {
    /// All that are there.
    IfThere,
    IfConfigured,
}

impl Loader {
    /// Reads the settings, copies and hashes the files, and reads what the model says of itself.
    pub fn stage(&self, found: &Discovered) -> Result<Staged, Failure> {
        let (begun, _under_way) = (Instant::now(), self.timing.under_way());
        if let Some(reason) = &found.refused {
            return Err(Failure::Refused(reason.clone()));
        }
        let settings = Settings::read(found)?;
        let (cached, description) = match found.format() {
            Format::Onnx => self.copy_onnx(found, &settings.config)?,
            Format::Safetensors => self.copy_safetensors(found, &settings.config)?,
        };
        Ok(Staged { cached, settings, description: Arc::new(description), begun })
    }

    fn copy_onnx(&self, found: &Discovered, config: &ModelConfig) -> Result<(Cached, Description), Failure> {
        if let Some(key) = config.declared_key() {
            let expected = "model.toml without it: an ONNX file says so itself";
            return Err(Failure::Config(format!(
                "model.toml: `{key}`: found beside `{MODEL_FILE}`, expected {expected}"
            )));
        }
        // Before it is copied; the copy is looked at again, since the file may grow meanwhile.
        if let Ok(metadata) = fs::metadata(&found.model) {
            onnx::Description::check_length(metadata.len())?;
        }
        let (cached, description) = self.cache.copy(&found.model, MODEL_FILE, &[], describe)?;
        Ok((cached, Description::Onnx(description)))
    }

    fn copy_safetensors(&self, found: &Discovered, config: &ModelConfig) -> Result<(Cached, Description), Failure> {
        let (name, folder) = match found.model.file_name().and_then(|name| name.to_str()) {
            Some(safetensors::INDEX_FILE) => (safetensors::INDEX_FILE, found.model.parent()),
            // One that was named by itself may be called anything.
            _ => (safetensors::MODEL_FILE, found.model.parent()),
        };
        let declared = match &config.sequential {
            Some(sequential) => Declared::Sequential(sequential.clone()),
            None if folder.is_some_and(|folder| folder.join(safetensors::ENCODER_FILE).exists()) => {
                Declared::Encoder(config.encoder.clone().unwrap_or_default())
            }
            None => {
                return Err(Failure::Config(format!(
                    "`{name}` holds weights only: expected [[layers]] in model.toml, or a {} beside it",
                    safetensors::ENCODER_FILE
                )));
            }
        };
        let beside = safetensors::beside(&declared);
        let (cached, ()) = self.cache.copy(&found.model, name, beside, |copy| {
            let folder = copy.parent().unwrap_or(copy);
            Ok::<_, Failure>(((), guarded(|| safetensors::files(folder, &declared))?))
        })?;
        match guarded(|| safetensors::Description::read(&cached.folder, &declared)) {
            Ok(description) => Ok((cached, Description::Safetensors(description))),
            Err(error) => {
                self.cache.release(cached);
                Err(error.into())
            }
        }
    }

    /// Loads, decides about batching, warms up. `warming` is called when the engine has loaded the model.
    pub fn load(
        &self,
        found: &Discovered,
        staged: Staged,
        compare: CompareGoldens,
        warming: impl FnOnce(),
    ) -> Result<Loaded, Failure> {
        let _under_way = self.timing.under_way();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.make(found, &staged, compare, warming)));
        let Staged { cached, .. } = staged;
        match outcome.unwrap_or(Err(Failure::Panicked)) {
            Ok(Made { facts, goldens, groups }) => Ok(Loaded { facts, goldens, groups, cached }),
            Err(failure) => {
                self.cache.release(cached);
                Err(failure)
            }
        }
    }

    /// The model on the CPU with so many threads for a run, as clients see it: nothing is tested or warmed up.
    pub fn load_alone(&self, found: &Discovered, staged: &Staged, threads: usize) -> Result<Arc<dyn Model>, Failure> {
        let (Chosen { backend, .. }, artifact) = self.chosen(found, staged)?;
        let model = guarded(|| backend.load(&artifact, &LoadOptions { device: Device::Cpu, threads }))?;
        Ok(view::of(model, &staged.settings.config))
    }

    /// The engine, and what it is given.
    fn chosen(&self, found: &Discovered, staged: &Staged) -> Result<(Chosen, Artifact), Failure> {
        let chosen = self.engines.choose(staged.settings.config.backend, found.format());
        let chosen = chosen.map_err(|reason| Failure::Model(LoadError::Unavailable(reason)))?;
        let path = match found.format() {
            Format::Onnx => staged.cached.model.clone(),
            Format::Safetensors => staged.cached.folder.clone(),
        };
        let (bytes, description) = (staged.cached.bytes, Arc::clone(&staged.description));
        Ok((chosen, Artifact { path, bytes, description }))
    }

    /// Makes the scheduler: from here on the version can answer.
    pub fn serve(&self, loaded: Loaded, monitor: &Arc<Monitor>) -> Version {
        let Loaded { facts, groups, cached, .. } = loaded;
        let outputs = facts.outputs.iter().map(|output| MonitoredOutput {
            name: Arc::clone(&output.name),
            kind: output.kind,
            labels: output.labels.clone(),
        });
        let monitor = monitor.version(Arc::clone(&facts.name), facts.id, outputs.collect());
        let name = format!("{}/{}", facts.name, facts.id);
        let config = scheduling(&facts, self.longest_inline);
        let scheduler = Scheduler::new(name, groups, config, Arc::clone(&self.gate), Arc::clone(&monitor));
        Version { facts, scheduler, monitor, cached }
    }

    pub fn discard_staged(&self, staged: Staged) {
        self.cache.release(staged.cached);
    }

    pub fn discard(&self, loaded: Loaded) {
        let Loaded { groups, cached, .. } = loaded;
        drop(groups);
        self.cache.release(cached);
    }

    fn make(
        &self,
        found: &Discovered,
        staged: &Staged,
        compare: CompareGoldens,
        warming: impl FnOnce(),
    ) -> Result<Made, Failure> {
        let config = &*staged.settings.config;
        let (Chosen { backend, reason }, artifact) = self.chosen(found, staged)?;
        let site = Site {
            backend: &*backend,
            artifact: &artifact,
            cores: self.cores,
            gpus: self.engines.gpus,
            threads: config.threads,
        };
        let Placement { mut devices, reason: device_reason, warnings: fallen_back } =
            site.place(&config.groups, config.file.name())?;
        warming();
        self.timing.give_way();
        for placed in &mut devices {
            declared::check(config, placed.model.signature()).map_err(Failure::Config)?;
            placed.model = view::of(Arc::clone(&placed.model), config);
        }
        let none = || Failure::Config("no device is named for its instances".into());
        let model = Arc::clone(&devices.first().ok_or_else(none)?.model);
        let signature = Arc::new(model.signature().clone());
        let mut warnings = [&config.warnings[..], &fallen_back, model.warnings()].concat();
        let outputs = outputs(&*model, &staged.settings, staged.description.labels(), &mut warnings)?;
        let mut probes = self.probes(&devices, &signature)?;
        let couples = staged.description.couples_rows();
        let batching = on_all(&devices, &mut probes, |probe| {
            selftest::decide(config.batching.enabled, couples, &signature, || selftest::run(probe, &signature))
        })
        .map(selftest::agreed)
        .map_err(Failure::Config)?;
        self.timing.give_way();
        let ragged = on_all(&devices, &mut probes, |probe| {
            ragged::decide(&config.batching.ragged, batching.enabled, &signature, probe)
        })
        .map(ragged::agreed)
        .map_err(Failure::Config)?;
        let max_batch_size = config.batching.max_batch_size;
        if let Some(why) = max_batch_size.and_then(|_| selftest::uncounted_rows(&signature)) {
            return Err(Failure::Config(format!("{} declares a `max_batch_size`, but {why}", config.file.name())));
        }
        let preferred_rows = config.batching.preferred_rows.unwrap_or(DEFAULT_PREFERRED_ROWS);
        let preferred_rows = max_batch_size.map_or(preferred_rows, |max| preferred_rows.min(max));
        let most_rows = batching.enabled.then(|| max_batch_size.unwrap_or(preferred_rows));
        let mut warm_ups = WarmUps { folder: &found.folder, signature: &signature, most_rows, left: warmup::BUDGET };
        let timed: Vec<Timed> = devices
            .iter()
            .zip(&mut probes)
            .map(|(placed, probe)| {
                let most_rows = if batching.enabled { preferred_rows } else { 1 };
                let sizes = Sizes { signature: &signature, most_rows, ragged: ragged.plan.as_deref() };
                let (site, digest, gate) = (&site, &*staged.cached.digest, &self.gate);
                self.timing.time(&Subject { site, config, digest, placed, sizes, gate }, probe)
            })
            .collect();
        let mut goldens = None;
        for (probe, timed) in probes.iter_mut().zip(&timed) {
            self.timing.give_way();
            let refused = warm_up(probe, &signature, &batching, filled_up_to(config, preferred_rows, &timed.costs));
            warnings.extend(refused.filter(|warning| !warnings.contains(warning)));
            declared_warm_ups(config, &mut warm_ups, probe)?;
            if config.goldens_on_load || compare == CompareGoldens::IfThere {
                goldens = check_goldens(found, probe)?;
            }
        }
        if config.goldens_on_load && goldens.is_none() {
            return Err(Failure::Golden("is not there".into()));
        }
        let told = |of: fn(&Timed) -> &String| {
            let on_cpu = timed.iter().map(of).find(|told| !told.is_empty());
            on_cpu.cloned().unwrap_or_else(|| "not on a GPU".into())
        };
        let facts = Facts {
            name: Arc::clone(&found.key.model),
            id: found.key.version,
            digest: Arc::clone(&staged.cached.digest),
            backend: backend.name(),
            backend_version: backend.version(),
            backend_reason: reason,
            config: Arc::clone(&staged.settings.config),
            devices: devices.iter().map(|placed| (placed.device, placed.plan)).collect(),
            device_reason,
            signature,
            outputs,
            batching,
            ragged,
            max_batch_size,
            preferred_rows,
            costs: told(|timed| &timed.told),
            wide: told(|timed| &timed.wide_told),
            decided_by_values: staged.description.decided_by_values().is_some(),
            producer: staged.description.producer().to_string(),
            load_time: staged.begun.elapsed(),
            warnings,
        };
        let group = |((placed, probe), Timed { costs, wide, .. }): ((Placed, Probe), Timed)| {
            let (instances, cores) = (placed.plan.instances, placed.cores());
            let instance = probe.into_instance()?;
            Ok::<_, Failure>(Group { model: placed.model, instance, instances, cores, costs, wide })
        };
        let groups = devices.into_iter().zip(probes).zip(timed).map(group).collect::<Result<_, _>>()?;
        Ok(Made { facts, goldens, groups })
    }

    /// One for each device.
    fn probes(&self, devices: &[Placed], signature: &Signature) -> Result<Vec<Probe>, Failure> {
        let probe = |placed: &Placed| {
            if placed.model.signature() != signature {
                return Err(Failure::Refused(format!("on {} the model has another signature", placed.device)));
            }
            let mut probe = Probe::new(Arc::clone(&placed.model), &self.gate, placed.cores())?;
            if placed.device != Device::Cpu {
                first_run(&mut probe, signature);
            }
            Ok(probe)
        };
        devices.iter().map(probe).collect()
    }
}

/// A GPU's kernels are loaded, or even compiled, in the first run: that can take longer than a self-test may. Whether the
/// model takes what is invented here is for the self-test to say.
fn first_run(probe: &mut Probe, signature: &Signature) {
    let taken = |extent: &usize| {
        let recipe = Recipe { extent: *extent, below: 2, scale: 1.0 };
        invent::row(signature, recipe, 0, &mut Random(WARM_UP_SEED)).is_ok_and(|row| probe.run(&[&row]).is_ok())
    };
    let _ = invent::extents(signature).iter().any(taken);
}

/// What is decided on each device.
fn on_all<T>(
    devices: &[Placed],
    probes: &mut [Probe],
    mut decide: impl FnMut(&mut Probe) -> Result<T, String>,
) -> Result<Vec<(Device, T)>, String> {
    devices.iter().zip(probes).map(|(placed, probe)| Ok((placed.device, decide(probe)?))).collect()
}

impl Settings {
    fn read(found: &Discovered) -> Result<Settings, Failure> {
        let config = found.config.clone().map_err(Failure::Config)?;
        let named = config.outputs.values().filter_map(|output| output.labels.as_ref());
        let mut labels = BTreeMap::new();
        for file in config.labels.iter().chain(named) {
            labels.insert(file.clone(), read_labels(found, file)?);
        }
        Ok(Settings { config, labels })
    }
}

fn describe(copy: &Path) -> Result<(onnx::Description, BTreeSet<String>), Failure> {
    let unreadable = |error| CacheError::Unreadable { file: MODEL_FILE.into(), error };
    onnx::Description::check_length(fs::metadata(copy).map_err(unreadable)?.len())?;
    let bytes = fs::read(copy).map_err(unreadable)?;
    let description = guarded(|| onnx::Description::read(bytes.into()))?;
    let external = description.external_files.clone();
    Ok((description, external))
}

/// Files are untrusted: a defect of their reader must not take the loader's thread with it.
fn guarded<T>(read: impl FnOnce() -> Result<T, LoadError>) -> Result<T, LoadError> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(LoadError::BadModel("the reader of model files panicked on it".into())))
}

/// One name a line; empty lines at the end do not count.
fn read_labels(found: &Discovered, file: &str) -> Result<Arc<[String]>, Failure> {
    let failed = |reason: String| Failure::Config(format!("labels `{file}`: {reason}"));
    let text = read_beside(&found.folder, file, MAX_LABELS_BYTES).map_err(failed)?;
    let names: Vec<String> = text.trim_end().lines().map(|line| line.trim().to_string()).collect();
    match names.len() {
        1..=MAX_LABELS => Ok(names.into()),
        count => Err(failed(format!("{count} names, expected 1 to {MAX_LABELS}"))),
    }
}

/// Kinds and labels: what the configuration says, else what was inferred and what the model's own files hold.
fn outputs(
    model: &dyn Model,
    settings: &Settings,
    own_labels: Option<&Arc<[String]>>,
    warnings: &mut Vec<String>,
) -> Result<Vec<OutputInfo>, Failure> {
    let signature = model.signature();
    let specs = signature.outputs.iter().zip(model.output_kinds());
    let mut outputs =
        specs.map(|(spec, kind)| output(spec, *kind, settings, warnings)).collect::<Result<Vec<_>, _>>()?;
    if let Some(file) = &settings.config.labels
        && outputs.iter().all(|output| output.labels.is_none())
    {
        warnings.push(format!("labels `{file}`: no output has as many classes"));
    }
    if let (None, Some(names)) = (&settings.config.labels, own_labels) {
        for (output, spec) in outputs.iter_mut().zip(&signature.outputs) {
            if output.labels.is_none() && classes(spec, output.kind) == Some(names.len()) {
                output.labels = Some(Arc::clone(names));
            }
        }
    }
    Ok(outputs)
}

fn output(
    spec: &TensorSpec,
    inferred: OutputKind,
    settings: &Settings,
    warnings: &mut Vec<String>,
) -> Result<OutputInfo, Failure> {
    let own = settings.config.outputs.get(&*spec.name);
    let kind = own.and_then(|output| output.kind).unwrap_or(inferred);
    let info = |labels| Ok(OutputInfo { name: Arc::clone(&spec.name), kind, labels });
    let fits = |labels: &Arc<[String]>| classes(spec, kind).is_none_or(|classes| classes == labels.len());
    if let Some(file) = own.and_then(|output| output.labels.as_ref()) {
        let labels = &settings.labels[file];
        if !fits(labels) {
            let (found, expected) = (labels.len(), classes(spec, kind).unwrap_or_default());
            return Err(Failure::Config(format!(
                "labels `{file}`: {found} names, expected the {expected} classes of output `{}`",
                spec.name
            )));
        }
        return info(Some(Arc::clone(labels)));
    }
    let Some(file) = settings.config.labels.as_ref().filter(|_| kind != OutputKind::Values) else { return info(None) };
    let labels = &settings.labels[file];
    if !fits(labels) {
        warnings.push(format!("labels `{file}` do not fit output `{}`: {} names", spec.name, labels.len()));
        return info(None);
    }
    info(Some(Arc::clone(labels)))
}

/// How many classes an output has, where its shape says.
fn classes(spec: &TensorSpec, kind: OutputKind) -> Option<usize> {
    match kind {
        OutputKind::BinaryProbability => Some(2),
        OutputKind::Labels | OutputKind::Values => None,
        OutputKind::Probabilities | OutputKind::LogProbabilities | OutputKind::Logits => {
            match spec.dims.as_ref()?.last()? {
                Dim::Fixed(classes) => Some(*classes),
                Dim::Free(_) => None,
            }
        }
    }
}

/// What a batch will be filled up to at first: more would take memory that may never be needed again.
fn filled_up_to(config: &ModelConfig, preferred_rows: usize, costs: &[Sample]) -> usize {
    if tuned(config) { rows_at_first(preferred_rows, costs) } else { preferred_rows }
}

/// Runs an invented row, and a full batch where there will be batches. A refusal is worth a warning only: many models
/// refuse what is made up.
fn warm_up(probe: &mut Probe, signature: &Signature, batching: &BatchDecision, rows: usize) -> Option<String> {
    let before = probe.spent();
    let mut refusal = None;
    for extent in invent::extents(signature) {
        let recipe = Recipe { extent: *extent, below: 2, scale: 1.0 };
        let run = |probe: &mut Probe, count: usize| {
            let row = invent::row(signature, recipe, 0, &mut Random(WARM_UP_SEED))?;
            let jobs: Vec<&[Tensor]> = vec![&row; count];
            let begun = probe.spent();
            probe.run(&jobs).map(|_| probe.spent() - begun)
        };
        match run(probe, 1) {
            Ok(one) => {
                let all = one.saturating_mul(u32::try_from(rows).unwrap_or(u32::MAX));
                if batching.enabled && all <= WARM_UP_BUDGET {
                    return run(probe, rows).err().map(|why| format!("warm-up: a full batch is refused: {why}"));
                }
                return None;
            }
            Err(why) => refusal.get_or_insert(why),
        };
        if probe.spent() - before > WARM_UP_BUDGET {
            break;
        }
    }
    refusal.map(|why| format!("warm-up: the model refuses invented inputs: {why}"))
}

fn declared_warm_ups(config: &ModelConfig, warm_ups: &mut WarmUps, probe: &mut Probe) -> Result<(), Failure> {
    for declared in &config.warmup {
        let name = match declared {
            WarmUp::Request(file) => file.clone(),
            WarmUp::Made(made) => made.name.clone(),
        };
        warm_ups.run(declared, probe).map_err(|reason| Failure::WarmUp { name, reason })?;
    }
    Ok(())
}

/// Compares with `expected.json` beside the model: the number of cases, `None` where there is no such file.
fn check_goldens(found: &Discovered, probe: &mut Probe) -> Result<Option<usize>, Failure> {
    let folder = found.model.parent().unwrap_or(&found.folder);
    if fs::symlink_metadata(folder.join(GOLDEN_FILE)).is_err() {
        return Ok(None);
    }
    let text = read_beside(folder, GOLDEN_FILE, golden::MAX_FILE_BYTES).map_err(Failure::Golden)?;
    let goldens = Goldens::parse(&text).map_err(Failure::Golden)?;
    goldens.check(probe).map_err(Failure::Golden)?;
    Ok(Some(goldens.len()))
}

fn tuned(config: &ModelConfig) -> bool {
    config.batching.tune.unwrap_or(scheduler::Config::default().tuned)
}

fn scheduling(facts: &Facts, longest_inline: Option<Duration>) -> scheduler::Config {
    let (config, defaults) = (&facts.config, scheduler::Config::default());
    scheduler::Config {
        batching: facts.batching.enabled,
        ragged: facts.ragged.plan.clone(),
        preferred_rows: facts.preferred_rows,
        tuned: tuned(config),
        latency_goal: config.latency_goal,
        max_delay: config.batching.max_delay.unwrap_or(defaults.max_delay),
        max_queue_requests: config.max_queue_requests.unwrap_or(defaults.max_queue_requests),
        max_queue_bytes: config.max_queue_bytes.unwrap_or(defaults.max_queue_bytes),
        longest_inline: if facts.decided_by_values {
            Duration::ZERO
        } else {
            longest_inline.unwrap_or(defaults.longest_inline)
        },
        ..defaults
    }
}
