//! The models on disk, and which of their versions serve.
//!
//! Owns discovery, the requests to load and unload, private copies, loading, the decision to batch, and the table that
//! requests choose from. Knows nothing of protocols or requests beyond a model's name; runs no request itself.
//!
//! Invariants: the table has one writer and is replaced whole; a request sees one table. A version is published when
//! it is warm, and closed only after it was unpublished and its last request has gone. A version fails alone.
//!
//! Threads: `loader` looks at the folder and publishes; `load`, one for each model that is being loaded, ends with that;
//! `retire` drains, joins and drops. None is needed to answer a request.

mod cache;
mod calibrate;
mod control;
mod declared;
mod engines;
mod golden;
mod invent;
mod layer_config;
mod loader;
mod model_config;
mod pbtxt;
mod placement;
mod plan;
mod probe;
mod ragged;
mod remembered;
mod report;
mod retire;
mod selftest;
mod source;
mod table;
mod timing;
mod version;
mod view;
mod warmup;
mod watch;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::error::{Error, Result};
use crate::monitor::{Monitor, events};
use crate::scheduler::Gate;
use cache::Cache;
use control::{Change, Request};
use engines::Summary;
use loader::Loader;
use remembered::Remembered;
use retire::Retiring;
use source::Folder;
use timing::Timing;
use watch::Watch;
use writer::{Beside, Command, Writer};

pub use crate::backend::Device;
pub use cache::CacheError;
pub use control::{AtStart, Control, Done, stopping};
pub use engines::{BackendChoice, Engines, EnginesConfig};
pub use invent::{Random, tensor as invented};
pub use model_config::{REFERENCE as MODEL_TOML_REFERENCE, VersionPolicy};
pub use pbtxt::REFERENCE as CONFIG_PBTXT_REFERENCE;
pub use ragged::{RaggedConfig, RaggedDecision};
pub use report::{Alone, Report, each_alone, inspect, validate};
pub use selftest::BatchDecision;
pub use source::{SourceError, is_model_name, model_name_form};
pub use table::{Status, Table};
pub use version::{Facts, OutputInfo, State, Version};

/// What did not end in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    pub jobs: usize,
    /// A thread may still be inside an engine: the process must end without its libraries' destructors.
    pub threads: bool,
}

/// How long a stop waits for threads that have nothing to answer any more.
const THREADS_GRACE: Duration = Duration::from_secs(1);

/// Where the models are, and which of them are served.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// A folder of models, or one `.onnx` file.
    pub root: PathBuf,
    /// What a bare model file is called; empty: `model`.
    pub model_name: String,
    /// Where private copies of model files are kept; the system's temporary folder otherwise.
    pub cache_dir: Option<PathBuf>,
    pub temp_dir: PathBuf,
    /// Time what runs of models cost when they are loaded.
    pub calibrate: bool,
    /// Where that is kept for the next start; nowhere otherwise.
    pub remember_in: Option<PathBuf>,
    /// Of every version: see [`scheduler::Config::longest_inline`]; its default where `None`.
    pub longest_inline: Option<Duration>,
    pub control: Control,
    /// How long the last requests of a retired version may take.
    pub drain_timeout: Duration,
    pub engines: EnginesConfig,
}

impl Config {
    fn folder(&self) -> Folder {
        let name = if self.model_name.is_empty() { "model" } else { &self.model_name };
        Folder::new(self.root.clone(), name)
    }

    fn open_cache(&self) -> Result<Cache, CacheError> {
        Cache::open(self.cache_dir.as_ref().unwrap_or(&self.temp_dir))
    }

    fn timing(&self, cores: usize, cache: &Cache) -> Timing {
        let remembered = self.remember_in.as_ref().filter(|_| self.calibrate).and_then(|folder| {
            let opened = Remembered::new(folder.clone(), cache.folder());
            opened.inspect_err(|error| tracing::warn!("what is measured of models is not remembered: {error}")).ok()
        });
        Timing::new(self.calibrate, remembered, cores)
    }
}

/// Why there is no registry to serve from. Meant for operators: names paths.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("no inference engine: {0}")]
    Engine(String),
    #[error("cannot start the registry's threads: {0}")]
    Thread(std::io::Error),
}

pub struct Registry {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    cache: Arc<Cache>,
    explicit: bool,
}

/// What the registry, its writer and its waiters share.
struct Shared {
    table: ArcSwap<Table>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    /// Every version found at start is ready or has failed.
    loaded: bool,
    stopping: bool,
    /// Versions sent off and not yet retired.
    retiring: usize,
    /// Requests to load or unload that are not yet carried out.
    asking: usize,
    /// Threads that have not ended.
    threads: usize,
}

impl Registry {
    /// Finds the engines, looks at the folder and starts to load what is there.
    pub fn start(
        config: Config,
        cores: usize,
        gate: Arc<Gate>,
        monitor: Arc<Monitor>,
    ) -> Result<Arc<Registry>, RegistryError> {
        let engines = Engines::find(&config.engines).map_err(RegistryError::Engine)?;
        if let Some(Summary { backend, version, reason, degraded }) = engines.summary() {
            events::EngineChosen { backend, version: &version, reason: &reason, degraded }.emit();
        }
        Registry::start_with(config, engines, cores, gate, monitor)
    }

    /// The same with engines that somebody else made.
    pub fn start_with(
        config: Config,
        engines: Engines,
        cores: usize,
        gate: Arc<Gate>,
        monitor: Arc<Monitor>,
    ) -> Result<Arc<Registry>, RegistryError> {
        let mut folder = config.folder();
        let scan = folder.scan()?;
        let asked = config.control.asked(&folder, &scan)?;
        let cache = Arc::new(config.open_cache()?);
        for backend in engines.present() {
            events::EnginePresent { backend: backend.name(), version: &backend.version() }.emit(&monitor);
        }
        let shared = Arc::new(Shared {
            table: ArcSwap::default(),
            progress: Mutex::new(Progress { threads: 2, ..Progress::default() }),
            changed: Condvar::new(),
        });
        let (commands, received) = mpsc::channel();
        let (retire, retiring) = mpsc::channel();
        let notes = writer::scan_notes(&scan);
        let mut writer = Writer {
            folder,
            watch: Watch::new(scan),
            loader: Arc::new(Loader {
                timing: config.timing(cores, &cache),
                cache: Arc::clone(&cache),
                engines,
                cores,
                gate,
                longest_inline: config.longest_inline,
            }),
            monitor,
            shared: Arc::clone(&shared),
            retire,
            interval: config.control.interval(),
            drain_timeout: config.drain_timeout,
            asked,
            slots: BTreeMap::new(),
            beside: Beside::default(),
            said: BTreeSet::new(),
        };
        writer.say(notes);
        let registry = Registry { shared, commands, cache, explicit: config.control.is_explicit() };
        registry.spawn("loader", move || writer.run(received))?;
        registry.spawn_retire(retiring)?;
        Ok(Arc::new(registry))
    }

    fn spawn_retire(&self, retiring: mpsc::Receiver<Retiring>) -> Result<(), RegistryError> {
        let (cache, commands, shared) = (Arc::clone(&self.cache), self.commands.clone(), Arc::clone(&self.shared));
        self.spawn("retire", move || {
            retire::run(retiring, &cache, |key| {
                shared.lock().retiring -= 1;
                shared.changed.notify_all();
                // The writer may have stopped; then there is no index to correct.
                let _ = key.map(|key| commands.send(Command::Retired(key)));
            });
        })
    }

    fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), RegistryError> {
        let ended = Ended(Arc::clone(&self.shared));
        let body = move || {
            let _ended = ended;
            run();
        };
        thread::Builder::new().name(name.into()).spawn(body).map(drop).map_err(RegistryError::Thread)
    }

    /// The table as it is now. To be let go of soon: a request keeps the version it chose, not the table.
    pub fn table(&self) -> arc_swap::Guard<Arc<Table>> {
        self.shared.table.load()
    }

    /// Every version the registry knows of, by model and version.
    pub fn status(&self) -> Vec<Status> {
        self.table().status()
    }

    /// Every version to serve is ready.
    pub fn all_ready(&self) -> bool {
        let ready = |status: &Status| matches!(status.state, State::Ready | State::Unloaded);
        self.is_loaded() && self.status().iter().all(ready)
    }

    /// Every version found at start is ready or has failed.
    pub fn is_loaded(&self) -> bool {
        self.shared.lock().loaded
    }

    /// Blocks until [`Registry::is_loaded`], or until the registry stops.
    pub fn wait_loaded(&self) {
        drop(self.shared.wait(None, |progress| progress.loaded || progress.stopping));
    }

    /// Looks at the folder now and blocks until what settled is applied. A change needs two looks to settle.
    pub fn poll(&self) {
        let (done, waiting) = mpsc::sync_channel(1);
        if self.commands.send(Command::Poll(done)).is_ok() {
            // An error means that the writer has stopped.
            let _ = waiting.recv();
        }
    }

    /// Whether models are served as they are asked for.
    pub fn is_explicit(&self) -> bool {
        self.explicit
    }

    /// Asks for a model to be served as it is on disk now, with `config`, Triton's `ModelConfig` in JSON, in place of its
    /// settings there. `done` is told once its versions are ready or have failed; then what served goes on serving.
    pub fn load(&self, model: &str, config: Option<String>, done: Done) -> Result<()> {
        self.ask(model, Change::Load { config }, done)
    }

    /// Asks for a model to be served no more; `done` is told when nobody can choose it. It need not be served.
    pub fn unload(&self, model: &str, done: Done) -> Result<()> {
        self.ask(model, Change::Unload, done)
    }

    fn ask(&self, model: &str, change: Change, done: Done) -> Result<()> {
        if !self.explicit {
            return Err(control::not_explicit());
        }
        let request = Request::new(model, change, done, &self.shared)?;
        self.commands.send(Command::Change(request)).map_err(|_| self.unanswered())
    }

    /// Why a request to load or unload is dropped, or not even taken.
    pub fn unanswered(&self) -> Error {
        if self.shared.stopping() { control::stopping() } else { control::broken() }
    }

    /// Stops loading, closes every version, lets what is queued be answered until the deadline, and removes the private
    /// copies. Blocks.
    pub fn shutdown(&self, deadline: Instant) -> Left {
        self.stop();
        let table = self.shared.table.swap(Arc::default());
        for version in table.serving() {
            version.scheduler().close();
        }
        let unjoined: Vec<usize> =
            table.serving().filter_map(|version| version.scheduler().join(deadline).err()).collect();
        drop(table);
        let retiring = self.shared.wait(Some(deadline), |progress| progress.retiring == 0).retiring;
        // A load that is on cannot be stopped, and must not hold the exit: what it makes is never published.
        let grace = Some(Instant::now() + THREADS_GRACE);
        let own_threads = self.shared.wait(grace, |progress| progress.threads == 0).threads;
        self.cache.remove();
        let threads = !unjoined.is_empty() || retiring > 0 || own_threads > 0;
        Left { jobs: unjoined.into_iter().sum::<usize>() + retiring, threads }
    }

    fn stop(&self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_all();
        // The writer may have stopped already.
        let _ = self.commands.send(Command::Stop);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // The threads hold each other's channels and would wait for ever; versions are retired by `shutdown` only.
        self.stop();
        // After `shutdown` there is nothing left to remove.
        self.cache.remove();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is published once the registry stops: what serves then has been closed.
    fn publish(&self, table: Table) {
        let progress = self.lock();
        if !progress.stopping {
            self.table.store(Arc::new(table));
        }
    }

    fn loaded(&self) {
        self.lock().loaded = true;
        self.changed.notify_all();
    }

    fn stopping(&self) -> bool {
        self.lock().stopping
    }

    fn wait(&self, deadline: Option<Instant>, until: impl Fn(&Progress) -> bool) -> MutexGuard<'_, Progress> {
        let mut progress = self.lock();
        while !until(&progress) {
            progress = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(progress).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return progress,
                Some(left) => self.changed.wait_timeout(progress, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        progress
    }
}

/// Counts a thread out however it ends: nobody waits for a writer that panicked.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        let mut progress = self.0.lock();
        progress.threads -= 1;
        progress.loaded |= thread::panicking();
        drop(progress);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests;
