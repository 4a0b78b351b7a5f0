//! The one writer of the table: a thread that looks at the folder, has loaded what is new, and publishes what changed.
//!
//! Several models are loaded at a time, each on a thread of its own for as long as that takes; one model's versions come one
//! after the other. What those threads make is published here. Everything slow happens between two tables, never while one
//! is replaced. A version fails alone; a replacement that
//! fails leaves the old version serving. Where models are served as they are asked for, requests change the set of those
//! that are wanted, and nothing else differs.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use super::control::{self, Change, Request};
use super::loader::{CompareGoldens, Failure, Loaded, Loader, Settings};
use super::model_config::VersionPolicy;
use super::plan::{self, Candidate, Step};
use super::retire::Retiring;
use super::source::{Discovered, Fingerprint, Folder, Key, Scan};
use super::table::{Entry, Table};
use super::version::{State, Version};
use super::watch::Watch;
use super::{Shared, pbtxt};
use crate::error::{Error, Result};
use crate::monitor::{Monitor, events};
use crate::request::VersionId;

/// Models that are loaded at a time, at most; no more than there are cores. Each may hold a model in memory twice for a
/// while: what its file holds, and what the engine makes of it.
const MAX_LOADS_AT_ONCE: usize = 4;

/// Why a version is not served that left on request: Triton's word.
const UNLOADED: &str = "unloaded";

/// What the writer is asked to do.
pub enum Command {
    /// Look at the folder now, and answer when what settled is applied.
    Poll(SyncSender<()>),
    /// Load or unload a model.
    Change(Request),
    /// A version that left the index is retired.
    Retired(Key),
    /// Wake up and see that the registry is stopping.
    Stop,
}

pub struct Writer {
    pub folder: Folder,
    pub watch: Watch,
    pub loader: Arc<Loader>,
    pub monitor: Arc<Monitor>,
    pub shared: Arc<Shared>,
    pub retire: Sender<Retiring>,
    /// `None`: never look by itself.
    pub interval: Option<Duration>,
    pub drain_timeout: Duration,
    /// The models that are to be served. `None`: all.
    pub asked: Option<BTreeSet<Arc<str>>>,
    pub slots: BTreeMap<Key, Slot>,
    pub beside: Beside,
    /// What was last said about the folder, to say it once.
    pub said: BTreeSet<String>,
}

/// What the index names besides the slots.
#[derive(Default)]
pub struct Beside {
    /// Versions on their way out.
    draining: Vec<Key>,
    /// Versions that left on request and are still on disk.
    unloaded: BTreeSet<Key>,
    /// Where models are asked for: all that are on disk.
    models: BTreeSet<Arc<str>>,
}

/// One version that is served, or should be, or was tried.
pub struct Slot {
    /// Among the versions to serve. Of others it is only remembered what was tried, and the index does not name them.
    wanted: bool,
    state: State,
    reason: String,
    /// The files last tried, successfully or not.
    tried: Option<Fingerprint>,
    /// When they are tried again unasked, after a failure that may pass.
    retry: Option<Retry>,
    serving: Option<(Arc<Version>, Settings)>,
}

struct Retry {
    /// Failures in a row.
    failures: u32,
    at: Instant,
    /// Its time has come; decided once per look, so that a slow failure cannot keep the writer from looking.
    due: bool,
}

/// A version to load, with what serves in its place.
struct Order {
    key: Key,
    found: Discovered,
    /// How often these files failed in a row for a reason that may pass.
    failures: u32,
    serving: Option<(Arc<str>, Settings)>,
    begun: Instant,
}

/// `None`: what serves is the same already.
type Outcome = Result<Option<(Loaded, Settings)>, Failure>;

/// What a thread that loads has to say.
enum Progress {
    Warming(Key),
    Ended(Box<Order>, Box<Outcome>),
}

impl Slot {
    fn new() -> Slot {
        Slot { wanted: true, state: State::Discovered, reason: String::new(), tried: None, retry: None, serving: None }
    }
}

impl Writer {
    /// Loads what was there at start, then watches the folder until the registry stops.
    pub fn run(mut self, commands: Receiver<Command>) {
        self.name_models();
        self.apply();
        self.shared.loaded();
        let mut next_look = self.next_look();
        while !self.shared.stopping() {
            match received(&commands, next_look) {
                Ok(Command::Poll(done)) => {
                    let _ = survived(|| self.look());
                    // Whoever asked may have left.
                    let _ = done.send(());
                }
                Ok(Command::Change(request)) => self.carry_out(request),
                Ok(Command::Retired(key)) => self.forget(&key),
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    let _ = survived(|| self.look());
                    // Counted from the end of a look, so that slow ones leave time for commands.
                    next_look = self.next_look();
                }
            }
        }
    }

    /// `None`: never.
    fn next_look(&self) -> Option<Instant> {
        self.interval.and_then(|interval| Instant::now().checked_add(interval))
    }

    fn carry_out(&mut self, request: Request) {
        let outcome = survived(|| self.change(&request)).unwrap_or_else(|| Err(control::broken()));
        let _ = survived(|| request.answer(outcome));
    }

    fn look(&mut self) {
        match self.folder.scan() {
            Ok(scan) => {
                self.say(scan_notes(&scan));
                if self.asked.is_some() {
                    self.watch.note(&scan);
                    self.name_models();
                    return self.retry_asked();
                }
                let changed = self.watch.observe(scan);
                if self.retries_due(Instant::now()) || changed {
                    self.apply();
                }
            }
            // Whatever serves goes on serving: a registry that cannot be read is not an empty one.
            Err(error) => self.say([error.to_string()].into()),
        }
    }

    /// For the index. A version is unloaded for as long as it is there.
    fn name_models(&mut self) {
        if self.asked.is_none() {
            return;
        }
        let (models, known) = (self.watch.models(), self.beside.unloaded.len());
        self.beside.unloaded.retain(|key| self.watch.sees(key));
        if models != self.beside.models || known != self.beside.unloaded.len() {
            self.beside.models = models;
            self.publish();
        }
    }

    fn change(&mut self, request: &Request) -> Result<()> {
        match &request.change {
            Change::Load { config } => self.load_model(&request.model, config.as_deref()),
            Change::Unload => {
                self.unload_model(&request.model);
                Ok(())
            }
        }
    }

    /// Serves a model as it is on disk now, with that `ModelConfig` as its settings where one is given. A load that fails
    /// takes nothing away.
    fn load_model(&mut self, model: &Arc<str>, config: Option<&str>) -> Result<()> {
        let config = config.map(|config| pbtxt::parse_json(config, model)).transpose();
        let config = config.map_err(|problems| Error::invalid(problems.to_string()))?;
        let scan = self.folder.scan_given(model, config).map_err(|error| {
            self.say([error.to_string()].into());
            control::unknown(model)
        })?;
        self.say(scan_notes(&scan));
        if !scan.versions.keys().any(|key| key.model == *model) {
            self.watch.note(&scan);
            self.name_models();
            return Err(control::unknown(model));
        }
        self.adopt(model, scan);
        self.bring_up(model)
    }

    /// What failed for a reason that may pass, model by model: of others that failed nothing is taken away unasked.
    fn retry_asked(&mut self) {
        if !self.retries_due(Instant::now()) {
            return;
        }
        let due = |slot: &Slot| slot.retry.as_ref().is_some_and(|retry| retry.due);
        let models: BTreeSet<Arc<str>> =
            self.slots.iter().filter(|(_, slot)| due(slot)).map(|(key, _)| Arc::clone(&key.model)).collect();
        for model in &models {
            // How it ends is in the index.
            let _ = self.bring_up(model);
        }
    }

    /// Loads a model's versions to serve; what others replaced leaves if all are there.
    fn bring_up(&mut self, model: &Arc<str>) -> Result<()> {
        self.admit(model);
        self.publish();
        if !self.load_wanted(&BTreeSet::from([Arc::clone(model)]), |_, _| {}) {
            return Err(control::stopping());
        }
        let outcome = self.outcome(model);
        if let (Ok(()), Step::Retire(ids)) = (&outcome, self.next(model)) {
            self.retire(model, &ids);
        }
        self.publish();
        outcome
    }

    /// Takes a model's versions as that scan has them. What failed is tried again, and what is to be served with other
    /// settings.
    fn adopt(&mut self, model: &Arc<str>, scan: Scan) {
        for (key, slot) in self.slots.iter_mut().filter(|(key, _)| key.model == *model) {
            let (known, found) = (self.watch.settled().get(key), scan.versions.get(key));
            if !slot.reason.is_empty() || known.map(|known| &known.config) != found.map(|found| &found.config) {
                slot.tried = None;
                slot.retry = None;
            }
        }
        self.watch.adopt(model, scan);
        if let Some(asked) = &mut self.asked {
            asked.insert(Arc::clone(model));
        }
        self.beside.unloaded.retain(|key| key.model != *model);
        self.name_models();
    }

    /// What became of the versions to serve.
    fn outcome(&self, model: &Arc<str>) -> Result<()> {
        let wanted = || self.slots.iter().filter(|(key, slot)| key.model == *model && slot.wanted);
        if wanted().next().is_none() {
            return Err(control::no_version(model));
        }
        let failed = || wanted().filter(|(_, slot)| !slot.reason.is_empty());
        match failed().next() {
            None => Ok(()),
            Some(_) => Err(control::failed(
                model,
                failed().map(|(key, slot)| (key.version, slot.serving.is_some(), &*slot.reason)),
            )),
        }
    }

    fn unload_model(&mut self, model: &Arc<str>) {
        if let Some(asked) = &mut self.asked {
            asked.remove(model);
        }
        self.admit(model);
        if let Step::Retire(ids) = self.next(model) {
            self.retire(model, &ids);
        }
        self.publish();
    }

    fn is_asked(&self, model: &Arc<str>) -> bool {
        self.asked.as_ref().is_none_or(|asked| asked.contains(model))
    }

    fn retries_due(&mut self, now: Instant) -> bool {
        let mut any = false;
        for retry in self.slots.values_mut().filter_map(|slot| slot.retry.as_mut()) {
            retry.due |= retry.at <= now;
            any |= retry.due;
        }
        any
    }

    pub fn say(&mut self, notes: BTreeSet<String>) {
        for note in notes.difference(&self.said) {
            tracing::warn!("{note}");
        }
        self.said = notes;
    }

    /// Brings what serves in line with what is on disk.
    fn apply(&mut self) {
        let models: BTreeSet<Arc<str>> =
            self.watch.settled().keys().chain(self.slots.keys()).map(|key| Arc::clone(&key.model)).collect();
        for model in &models {
            self.admit(model);
        }
        // What only leaves does so before anything slow begins.
        for model in &models {
            if let Step::Retire(ids) = self.next(model) {
                self.retire(model, &ids);
            }
        }
        self.publish();
        let all = self.load_wanted(&models, |writer, model| {
            if let Step::Retire(ids) = writer.next(model) {
                writer.retire(model, &ids);
            }
        });
        if all {
            self.publish();
        }
    }

    /// Loads the versions to serve of all these models; `then` is told when a model has what it can. False: the registry
    /// stops.
    fn load_wanted(&mut self, models: &BTreeSet<Arc<str>>, mut then: impl FnMut(&mut Writer, &Arc<str>)) -> bool {
        let loader = Arc::clone(&self.loader);
        let most = loader.cores.clamp(1, MAX_LOADS_AT_ONCE);
        // The last comes first.
        let mut waiting: Vec<Arc<str>> = models.iter().rev().cloned().collect();
        let mut loading = 0;
        let (say, heard) = mpsc::channel();
        thread::scope(|scope| {
            loop {
                while loading < most
                    && !self.shared.stopping()
                    && let Some(model) = waiting.pop()
                {
                    let Some(order) = self.order(&model) else {
                        then(self, &model);
                        continue;
                    };
                    loading += 1;
                    let (loader, told) = (&*loader, say.clone());
                    let (hand, handed) = mpsc::sync_channel(1);
                    let run = move || handed.recv().map_or((), |order| carry_out(loader, order, &told));
                    match thread::Builder::new().name("load".into()).spawn_scoped(scope, run) {
                        // There is room for it.
                        Ok(_) => drop(hand.send(order)),
                        Err(error) => {
                            tracing::warn!("no thread to load a model, others wait for it: {error}");
                            carry_out(loader, order, &say);
                        }
                    }
                }
                if loading == 0 {
                    return !self.shared.stopping();
                }
                match heard.recv() {
                    Ok(Progress::Warming(key)) => self.warming(&key),
                    Ok(Progress::Ended(order, outcome)) => {
                        loading -= 1;
                        let model = Arc::clone(&order.key.model);
                        self.settle(*order, *outcome);
                        self.admit(&model);
                        self.publish();
                        waiting.push(model);
                    }
                    // There is a sender here.
                    Err(mpsc::RecvError) => return false,
                }
            }
        })
    }

    /// What to load next of a model, marked as begun.
    fn order(&mut self, model: &Arc<str>) -> Option<Order> {
        let Step::Load(version) = self.next(model) else { return None };
        let key = Key { model: Arc::clone(model), version };
        let found = self.watch.settled().get(&key).cloned()?;
        let failures = self.begin(&key, &found.fingerprint)?;
        let serving = self.slots.get(&key).and_then(|slot| slot.serving.as_ref());
        let serving = serving.map(|(version, settings)| (Arc::clone(version.digest()), settings.clone()));
        Some(Order { key, found, failures, serving, begun: Instant::now() })
    }

    fn warming(&mut self, key: &Key) {
        if let Some(slot) = self.slots.get_mut(key).filter(|slot| slot.serving.is_none()) {
            slot.state = State::Warming;
            self.publish();
        }
    }

    /// Slots for the versions wanted; see [`plan::has_slot`] for those that go. Leaves the candidates as they are.
    fn admit(&mut self, model: &Arc<str>) {
        let candidates = self.candidates(model);
        let wanted = plan::wanted(&self.policy(model), &candidates);
        for id in &wanted {
            self.slots.entry(Key { model: Arc::clone(model), version: *id }).or_insert_with(Slot::new);
        }
        self.slots.retain(|key, slot| {
            if key.model != *model {
                return true;
            }
            slot.wanted = wanted.contains(&key.version);
            candidates.get(&key.version).is_some_and(|candidate| plan::has_slot(candidate, slot.wanted))
        });
    }

    fn next(&self, model: &Arc<str>) -> Step {
        plan::next(&self.policy(model), &self.candidates(model))
    }

    /// All versions of a model share its `model.toml`; a broken one fails them all, one by one, with its reason.
    fn policy(&self, model: &Arc<str>) -> VersionPolicy {
        if !self.is_asked(model) {
            return VersionPolicy::Listed(BTreeSet::new());
        }
        let config = self.versions(model).find_map(|found| found.config.as_ref().ok());
        config.map(|config| config.versions.clone()).unwrap_or_default()
    }

    fn versions(&self, model: &Arc<str>) -> impl Iterator<Item = &Discovered> {
        self.watch.settled().values().filter(|found| found.key.model == *model)
    }

    fn candidates(&self, model: &Arc<str>) -> BTreeMap<VersionId, Candidate> {
        let mut candidates: BTreeMap<VersionId, Candidate> = BTreeMap::new();
        for found in self.versions(model) {
            let slot = self.slots.get(&found.key);
            let tried = slot.and_then(|slot| slot.tried.as_ref()) == Some(&found.fingerprint);
            let due = slot.and_then(|slot| slot.retry.as_ref()).is_some_and(|retry| retry.due);
            let candidate = candidates.entry(found.key.version).or_default();
            candidate.on_disk = true;
            candidate.untried = !tried || due;
        }
        for (key, slot) in self.slots.iter().filter(|(key, _)| key.model == *model) {
            candidates.entry(key.version).or_default().serving = slot.serving.is_some();
        }
        candidates
    }

    /// Publishes what was loaded, or notes why not.
    fn settle(&mut self, order: Order, outcome: Outcome) {
        let Order { key, failures, begun, .. } = order;
        let loader = Arc::clone(&self.loader);
        let serve = |(loaded, settings)| {
            let version = survived(|| loader.serve(loaded, &self.monitor)).ok_or(Failure::Panicked)?;
            Ok((Arc::new(version), settings))
        };
        let outcome = outcome.and_then(|loaded| loaded.map(serve).transpose());
        // It was there when the load began, and only this thread removes slots, between loads.
        let Some(slot) = self.slots.get_mut(&key) else { return };
        match outcome {
            Ok(None) => slot.reason.clear(),
            Ok(Some((version, settings))) => {
                if slot.serving.is_none() {
                    slot.state = State::Ready;
                }
                slot.reason.clear();
                let replaced = slot.serving.replace((Arc::clone(&version), settings));
                self.publish();
                self.announce(&version);
                if let Some((old, _)) = replaced {
                    self.send_off(old, None, "replaced");
                }
            }
            Err(failure) => {
                let reason = failure.to_string();
                if failure.is_transient() {
                    let at = Instant::now() + plan::back_off(failures);
                    slot.retry = Some(Retry { failures: failures.saturating_add(1), at, due: false });
                }
                slot.reason = match &slot.serving {
                    Some(_) => format!("still serving the files before the last change, which failed: {reason}"),
                    None => {
                        slot.state = State::Failed;
                        reason.clone()
                    }
                };
                let (model, version, duration) = (&*key.model, key.version, begun.elapsed());
                events::VersionFailed { model, version, reason: &reason, duration }.emit(&self.monitor);
            }
        }
    }

    /// How often these files failed in a row for a reason that may pass. `None`: the version has no slot to load into.
    fn begin(&mut self, key: &Key, fingerprint: &Fingerprint) -> Option<u32> {
        let slot = self.slots.get_mut(key)?;
        let tried = slot.tried.replace(fingerprint.clone());
        let retry = slot.retry.take().filter(|_| tried.as_ref() == Some(fingerprint));
        if slot.serving.is_none() {
            slot.state = State::Loading;
            slot.reason.clear();
        }
        self.publish();
        Some(retry.map_or(0, |retry| retry.failures))
    }

    fn announce(&self, version: &Version) {
        let facts = version.facts();
        events::VersionLoaded {
            version: &version.monitor,
            duration: facts.load_time,
            digest: &facts.digest,
            backend: facts.backend,
            backend_version: &facts.backend_version,
            device: &facts.device(),
            instances: facts.instances(),
            batching: facts.batching.enabled,
            batching_reason: &facts.batching.reason,
            costs: &facts.costs,
            wide: &facts.wide,
        }
        .emit(&self.monitor);
        for warning in &facts.warnings {
            tracing::warn!(model = &*facts.name, version = %facts.id, "{warning}");
        }
    }

    fn retire(&mut self, model: &Arc<str>, ids: &BTreeSet<VersionId>) {
        let mut leaving = Vec::new();
        let unloaded = !self.is_asked(model);
        for id in ids {
            let key = Key { model: Arc::clone(model), version: *id };
            let on_disk = self.watch.settled().contains_key(&key);
            if let Some((version, _)) = self.slots.remove(&key).and_then(|slot| slot.serving) {
                self.beside.draining.push(key.clone());
                let reason = match (on_disk, unloaded) {
                    (true, true) => {
                        self.beside.unloaded.insert(key.clone());
                        UNLOADED
                    }
                    (true, false) => "not among the versions to serve",
                    (false, _) => "removed",
                };
                leaving.push((version, key, reason));
            }
        }
        if !leaving.is_empty() {
            self.publish();
        }
        for (version, key, reason) in leaving {
            self.send_off(version, Some(key), reason);
        }
    }

    /// Hands an unpublished version to the retiring thread.
    fn send_off(&self, version: Arc<Version>, key: Option<Key>, reason: &str) {
        events::VersionRetired { version: &version.monitor, reason }.emit();
        let deadline = Instant::now() + self.drain_timeout;
        self.shared.lock().retiring += 1;
        // The retiring thread outlives this one.
        let _ = self.retire.send(Retiring { version, key, deadline });
    }

    fn forget(&mut self, key: &Key) {
        let draining = &mut self.beside.draining;
        if let Some(at) = draining.iter().position(|draining| draining == key) {
            draining.swap_remove(at);
            self.publish();
        }
    }

    fn publish(&self) {
        self.shared.publish(table(&self.slots, &self.beside));
    }
}

/// On a thread of its own.
fn carry_out(loader: &Loader, order: Order, say: &Sender<Progress>) {
    // The writer hears all of it: it waits for the last.
    let warming = || drop(say.send(Progress::Warming(order.key.clone())));
    let outcome = survived(|| load(loader, &order, warming)).unwrap_or(Err(Failure::Panicked));
    let _ = say.send(Progress::Ended(Box::new(order), Box::new(outcome)));
}

fn load(loader: &Loader, order: &Order, warming: impl FnOnce()) -> Outcome {
    let staged = loader.stage(&order.found)?;
    let same =
        |(digest, settings): &(Arc<str>, Settings)| *digest == staged.cached.digest && *settings == staged.settings;
    if order.serving.as_ref().is_some_and(same) {
        loader.discard_staged(staged);
        return Ok(None);
    }
    let settings = staged.settings.clone();
    let loaded = loader.load(&order.found, staged, CompareGoldens::IfConfigured, warming)?;
    Ok(Some((loaded, settings)))
}

/// The next command, unless the next look is due: then what waits comes after it, or many commands would put it off for ever.
fn received(commands: &Receiver<Command>, next_look: Option<Instant>) -> Result<Command, RecvTimeoutError> {
    match next_look.map(|at| at.saturating_duration_since(Instant::now())) {
        None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
        Some(Duration::ZERO) => Err(RecvTimeoutError::Timeout),
        Some(left) => commands.recv_timeout(left),
    }
}

/// `None` after a panic: a client's text, or a file, that breaks what reads it ends one step, not all loading.
fn survived<T>(step: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(step)).ok()
}

pub fn scan_notes(scan: &Scan) -> BTreeSet<String> {
    scan.notes.iter().chain(scan.unreadable.values()).cloned().collect()
}

fn table(slots: &BTreeMap<Key, Slot>, beside: &Beside) -> Table {
    let mut models: BTreeMap<Arc<str>, BTreeMap<VersionId, Entry>> = BTreeMap::new();
    let mut put = |key: &Key, entry| models.entry(Arc::clone(&key.model)).or_default().insert(key.version, entry);
    for key in &beside.unloaded {
        put(key, Entry { state: State::Unloaded, reason: UNLOADED.into(), serving: None });
    }
    for key in &beside.draining {
        put(key, Entry { state: State::Draining, reason: String::new(), serving: None });
    }
    for (key, slot) in slots.iter().filter(|(_, slot)| slot.wanted || slot.serving.is_some()) {
        let serving = slot.serving.as_ref().map(|(version, _)| Arc::clone(version));
        put(key, Entry { state: slot.state, reason: slot.reason.clone(), serving });
    }
    Table::new(models, beside.models.clone())
}
