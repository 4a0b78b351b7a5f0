//! Scheduling of one model version: requests are queued, batched and run by worker threads that pull.
//!
//! Owns the queue, the version's instances and its threads; knows nothing of protocols, registries or engines. Policy
//! lives in [`batcher`], `cost`, `limit`, `company`, `layout`, `fair` and [`threads`], which have neither clocks nor threads; this file is the
//! shell that callers see, `worker` the loop that runs.
//!
//! Invariants: a request leaves the queue exactly once, to a worker or because its caller stopped waiting. A job that
//! was taken is answered even after [`Scheduler::close`]; only a worker that cannot make its instance puts its jobs back
//! where they stood, for the workers of another group. Whenever something is queued, a worker is on its way to it, or
//! whoever has an instance will look again before it is idle. An idle version has no running thread. A group that rests
//! is called before those behind it, whatever else they wait for.
//!
//! Idle instances are in one pool, whether or not a thread rests that may run on them: a call promises one to the
//! thread, and only those that are not promised may be taken otherwise. A short run whose turn has come is not handed
//! to a worker at all (`inline`).
//!
//! A group whose instance cannot be made gives its place up where another group has one. A group whose runs fail keeps
//! its instances and its share of the requests: no run error tells a lost device from a request at fault.
//!
//! Locks: one mutex around the [`State`], held for queue operations only, never while an engine works or a gate is
//! waited for. Threads: callers submit from any async task and never block, save for an inline run; workers are std
//! threads, started on demand, gone after [`Config::linger`] without work.

pub mod batcher;
mod company;
mod cost;
mod fair;
mod gate;
mod inline;
mod layout;
mod limit;
#[cfg(test)]
mod tests;
mod threads;
mod worker;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::timeout_at;

use crate::backend::{Instance, Model};
use crate::error::{Error, Kind, Result};
use crate::monitor::VersionMonitor;
use crate::monitor::events::{QueueChanged, QueueRejected, VersionDemoted};
use crate::request::{Permit, Prepared, Priority, Timings};
use crate::tensor::{Ragged, Tensor};
use batcher::{Batcher, Entry, Readiness};
use company::Company;
use cost::CostModel;
use fair::Room;
use inline::{Inline, Pace, Quickness};
use layout::Contest;
use limit::{Limits, Queued, Sealing};
use worker::{Positions, Worker, blame};

pub use cost::Sample;
pub use gate::{Account, Gate};
pub use limit::{LatencyGoal, rows_at_first};
pub use threads::{MAX_COPIED_WEIGHTS_BYTES, Reason, ThreadPlan, Wish};

pub const DEFAULT_PREFERRED_ROWS: usize = 32;
pub const DEFAULT_MAX_QUEUE_REQUESTS: usize = 1024;
pub const DEFAULT_MAX_QUEUE_BYTES: usize = 512 << 20;
pub const DEFAULT_LINGER: Duration = Duration::from_secs(10);
/// A thread's other connections wait for such a run.
pub const DEFAULT_LONGEST_INLINE: Duration = Duration::from_micros(50);

/// How one version is scheduled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Batch at all.
    pub batching: bool,
    /// Where requests of different lengths share a batch.
    pub ragged: Option<Arc<Ragged>>,
    /// Rows a batch is filled up to at most; no more than the model declares. A request of more rows runs alone.
    pub preferred_rows: usize,
    /// Batches are filled up as far as that pays, by what runs have cost; otherwise to the preferred rows.
    pub tuned: bool,
    /// What batches, and the wait for them, must leave time for.
    pub latency_goal: Option<LatencyGoal>,
    /// How long a request may wait for others to share its batch. Zero, tuned and without a goal: a small part of a long run,
    /// where that pays (`company`).
    pub max_delay: Duration,
    pub max_queue_requests: usize,
    pub max_queue_bytes: usize,
    /// How long an idle worker thread lingers before it exits (its instance is kept).
    pub linger: Duration,
    /// Requests whose runs are expected to take no longer may run on the thread that submits them, large ones for as much
    /// longer as reading them takes; zero: none may.
    pub longest_inline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            batching: true,
            ragged: None,
            preferred_rows: DEFAULT_PREFERRED_ROWS,
            tuned: true,
            latency_goal: None,
            max_delay: Duration::ZERO,
            max_queue_requests: DEFAULT_MAX_QUEUE_REQUESTS,
            max_queue_bytes: DEFAULT_MAX_QUEUE_BYTES,
            linger: DEFAULT_LINGER,
            longest_inline: DEFAULT_LONGEST_INLINE,
        }
    }
}

/// A version's instances on one device. All groups answer alike: whichever is free takes what waits.
pub struct Group {
    /// As the engine has it on that device.
    pub model: Arc<dyn Model>,
    /// The first one, warmed; more are made on demand.
    pub instance: Box<dyn Instance>,
    /// Worker threads at most, one instance each.
    pub instances: usize,
    /// What a run takes from the gate: the instance's intra-op threads, or 0 where another device computes.
    pub cores: usize,
    /// What runs were measured to take; may be empty.
    pub costs: Vec<Sample>,
    /// The same model on the same device with more threads a run.
    pub wide: Option<Wide>,
}

/// One instance beside a group's own ones: for a request that is alone, where that is faster.
pub struct Wide {
    pub instance: Box<dyn Instance>,
    /// Its intra-op threads.
    pub cores: usize,
    pub costs: Vec<Sample>,
}

/// What a request gets: its requested outputs in order, where its time went, and its permit back (held until the
/// answer is written).
#[derive(Debug)]
pub struct Answer {
    pub outputs: Vec<Tensor>,
    /// `prepare` is zero: the caller measures it.
    pub timings: Timings,
    pub permit: Permit,
}

/// One per model version. Dropping it closes it; what is queued then has no caller left.
pub struct Scheduler {
    shared: Arc<Shared>,
}

/// What the scheduler and its workers share.
struct Shared {
    /// `model/version`, for messages and thread names.
    name: Box<str>,
    /// By group.
    engines: Vec<Engine>,
    /// Of the model.
    outputs: usize,
    config: Config,
    gate: Account,
    monitor: Arc<VersionMonitor>,
    /// False once demoted.
    batching: AtomicBool,
    quickness: Quickness,
    pace: Pace,
    state: Mutex<State>,
    /// `join` waits here for workers to end.
    ended: Condvar,
}

/// What a group's workers run on.
struct Engine {
    model: Arc<dyn Model>,
    cores: usize,
    /// Resting workers wait here for a wake-up.
    work: Condvar,
    /// Workers wait here for a batch to fill.
    filling: Condvar,
}

type Key = Box<[usize]>;
type Ticket = batcher::Ticket<Priority>;

struct State {
    batcher: Batcher<Key, Priority, Job>,
    closed: bool,
    /// Idle instances with their groups, the most recent last.
    instances: Vec<(usize, Box<dyn Instance>)>,
    /// By group.
    slots: Vec<Slots>,
    /// By group.
    limits: Vec<Limits>,
    /// By group.
    wide: Vec<Option<WideSlot>>,
    /// When there was more than one request here, last.
    crowded: Option<Instant>,
    company: Company,
    workers: usize,
    /// Workers that have begun to reply and will look at the queue next.
    returning: usize,
    /// One worker at a time makes another instance.
    growing: bool,
    /// Requests that run at once on the threads that submitted them.
    inline: usize,
    /// Workers that work on such threads.
    lent: usize,
    /// Jobs taken and not yet answered, and their rows.
    running: usize,
    running_rows: usize,
    /// Of these, of workers that have begun to reply.
    answering: usize,
    answering_rows: usize,
    handles: Vec<JoinHandle<()>>,
}

/// A batch of fewer rows than there might be.
struct Missing {
    /// Of the head, as its length.
    key: Key,
    length: Option<usize>,
    /// Rows of the head's kind that wait.
    here: usize,
    /// Rows that a worker could have.
    share: usize,
    /// On their way.
    workers: usize,
}

/// A group's wide instance.
struct WideSlot {
    /// `None` while it runs, and for good after a panic.
    instance: Option<Box<dyn Instance>>,
    cores: usize,
    /// As measured at load.
    costs: CostModel,
    /// By [`layout::key`].
    contests: BTreeMap<(usize, usize), Contest>,
}

/// A group's places for instances, and what its workers are at.
#[derive(Clone, Copy, Default)]
struct Slots {
    /// Instances, idle, in use, or about to be made (again).
    taken: usize,
    /// At least 1 in one group or more: the last group that has a place keeps it.
    most: usize,
    /// Resting workers that have not been called.
    resting: usize,
    /// Calls that a resting worker has yet to notice. Each has promised it an idle instance.
    calls: usize,
    /// Workers on their way to the queue: called, started, or waiting for the gate or for a batch to fill.
    heading: usize,
    /// Workers that wait for a batch to fill.
    filling: usize,
    /// Workers that have taken a batch and not come back yet.
    running: usize,
}

impl State {
    fn has_instances(&self) -> bool {
        self.slots.iter().any(|slots| slots.taken > 0)
    }

    /// The group's most recent.
    fn take_idle(&mut self, group: usize) -> Option<Box<dyn Instance>> {
        let place = self.instances.iter().rposition(|(of, _)| *of == group)?;
        Some(self.instances.remove(place).1)
    }

    /// Whether the group has an idle instance that is promised to nobody.
    fn has_spare(&self, group: usize) -> bool {
        self.instances.iter().filter(|(of, _)| *of == group).count() > self.slots[group].calls
    }

    /// The group with the fewest instances of those that may have more.
    fn group_with_room(&self) -> Option<usize> {
        let groups = self.slots.iter().enumerate().filter(|(_, slots)| slots.taken < slots.most);
        groups.min_by_key(|(_, slots)| slots.taken).map(|(group, _)| group)
    }

    /// Another group than this one may have an instance.
    fn others_have_room(&self, group: usize) -> bool {
        self.slots.iter().enumerate().any(|(other, slots)| other != group && slots.most > 0)
    }

    /// A worker has ended without its instance. `for_good`: one for its place cannot be made, and its group makes do
    /// with those it has. The last place of all stays: whoever takes it next tries again.
    fn vacate(&mut self, group: usize, for_good: bool) {
        let last = !self.others_have_room(group);
        let slots = &mut self.slots[group];
        slots.taken -= 1;
        if for_good {
            slots.most = slots.taken.max(usize::from(last));
        }
    }

    /// Rows that a batch of such requests is filled up to, as far as is known: on the device that is asked first.
    fn full(&mut self, extent: Option<usize>) -> usize {
        let group = self.front();
        self.limits[group].in_force(extent)
    }

    /// The group that is asked first.
    fn front(&self) -> usize {
        self.slots.iter().position(|slots| slots.most > 0).unwrap_or(0)
    }

    /// What a worker of the group that holds its places at the gate, so many of them, should take next.
    fn seal(&mut self, group: usize, cores: usize, room: Room) -> Sealing {
        let Some((head, rows)) = self.batcher.head() else { return Sealing::default() };
        let slots = &self.slots[group];
        // Where others compute, an idle core is theirs. Where a device computes, it is not the cores that are shared.
        let share = match cores {
            0 => rows,
            _ if room.contended => rows,
            _ => {
                let at_it = slots.most.min(slots.running + slots.heading + room.free / cores);
                (self.batcher.rows() + self.running_rows).div_ceil(at_it.max(1))
            }
        };
        let queued = Queued { length: head.item.extent, rows, share, contended: room.contended && cores > 0 };
        self.limits[group].seal(&queued)
    }

    /// The job is the only one here, and was for two such runs: whoever is second would wait for all cores at once.
    fn is_lone(&self, group: usize, job: &Job, now: Instant) -> bool {
        let usual = || self.limits[group].costs().predict(job.rows, job.extent);
        let long_ago = |crowded| usual().is_some_and(|usual| now.saturating_duration_since(crowded) > 2 * usual);
        self.is_alone() && self.crowded.is_none_or(long_ago)
    }

    /// The group's wide instance and its threads, if that is to answer this lone job.
    fn take_wide(&mut self, group: usize, job: &Job) -> Option<(Box<dyn Instance>, usize)> {
        let wide = self.wide[group].as_mut()?;
        let usual = self.limits[group].costs().predict(job.rows, job.extent)?;
        let on_all = wide.costs.predict(job.rows, job.extent)?;
        let begin = || Contest::new(on_all < usual.mul_f64(layout::SAVES));
        let contest = wide.contests.entry(layout::key(job.rows, job.extent)).or_insert_with(begin);
        Some((wide.instance.take_if(|_| contest.chooses_wide())?, wide.cores))
    }

    /// Rows that wait or run; those that hear their answer by now do neither.
    fn rows_here(&self) -> usize {
        self.batcher.rows() + self.running_rows - self.answering_rows
    }

    /// At most one request is here; those that hear their answer by now are not.
    fn is_alone(&self) -> bool {
        self.batcher.len() + self.running - self.answering + self.inline <= 1
    }

    fn give_wide(&mut self, group: usize, instance: Box<dyn Instance>) {
        if let Some(wide) = &mut self.wide[group] {
            wide.instance = Some(instance);
        }
    }

    /// The first group of those whose workers wait for a batch to fill, if they need not wait any longer.
    fn filled(&mut self, now: Instant) -> Option<usize> {
        let mut groups = 0..self.slots.len();
        let group = groups.find(|group| self.slots[*group].filling > 0 && self.missing(*group).is_none())?;
        (self.batcher.readiness(now) == Readiness::Ready).then_some(group)
    }

    /// What a worker of the group could have, and as much each of the others on their way, if those that were here lately
    /// came back; `None` where as much is here.
    fn missing(&mut self, group: usize) -> Option<Missing> {
        let (head, here) = self.batcher.head()?;
        let (key, length) = (&head.key, head.item.extent);
        let sum = |of: fn(&Slots) -> usize| self.slots.iter().map(of).sum::<usize>();
        let (most, workers) = (sum(|slots| slots.most), sum(|slots| slots.heading).max(1));
        let share = self.limits[group].worth_waiting_for(length, self.company.share(most));
        (share > 1 && here < share * workers).then(|| Missing { key: key.clone(), length, here, share, workers })
    }

    /// Of the head's kind, if it is this one.
    fn rows_of(&self, key: &Key) -> Option<usize> {
        self.batcher.head().filter(|(head, _)| head.key == *key).map(|(_, rows)| rows)
    }
}

/// A queued request. Dropping it frees its permit and tells its caller that nobody will answer.
struct Job {
    inputs: Vec<Tensor>,
    outputs: Vec<usize>,
    rows: usize,
    length: Option<usize>,
    /// What the time of a row depends on: its length, or how many elements it has.
    extent: Option<usize>,
    deadline: Option<Instant>,
    submitted: Instant,
    /// Where it stood in the queue, once taken.
    place: Option<(Ticket, Entry<Key, Priority, ()>)>,
    permit: Permit,
    reply: oneshot::Sender<Result<Answer>>,
}

impl Scheduler {
    /// `name` is `model/version`. At least one group; those in front are used first.
    pub fn new(
        name: impl Into<Box<str>>,
        groups: Vec<Group>,
        config: Config,
        gate: Arc<Gate>,
        monitor: Arc<VersionMonitor>,
    ) -> Scheduler {
        let preferred_rows = if config.batching { config.preferred_rows } else { 1 };
        let limits = groups
            .iter()
            .map(|group| Limits::new(preferred_rows, config.tuned, config.latency_goal, &group.costs))
            .collect();
        let slots =
            groups.iter().map(|group| Slots { taken: 1, most: group.instances.max(1), ..Slots::default() }).collect();
        let outputs = groups.first().map_or(0, |group| group.model.signature().outputs.len());
        let (mut engines, mut instances, mut wide) = (Vec::new(), Vec::new(), Vec::new());
        for (place, Group { model, instance, cores, wide: another, .. }) in groups.into_iter().enumerate() {
            wide.push(another.map(|Wide { instance, cores, costs }| WideSlot {
                instance: Some(instance),
                cores,
                costs: CostModel::new(&costs),
                contests: BTreeMap::new(),
            }));
            engines.push(Engine { model, cores, work: Condvar::new(), filling: Condvar::new() });
            instances.push((place, instance));
        }
        let state = State {
            batcher: Batcher::new(preferred_rows, config.max_delay),
            closed: false,
            instances,
            slots,
            limits,
            wide,
            crowded: None,
            // A delay that was asked for is long enough, and a goal leaves no time for another.
            company: Company::new(config.tuned && config.max_delay.is_zero() && config.latency_goal.is_none()),
            workers: 0,
            returning: 0,
            growing: false,
            inline: 0,
            lent: 0,
            running: 0,
            running_rows: 0,
            answering: 0,
            answering_rows: 0,
            handles: Vec::new(),
        };
        Scheduler {
            shared: Arc::new(Shared {
                name: name.into(),
                batching: AtomicBool::new(config.batching),
                quickness: Quickness::default(),
                pace: Pace::default(),
                engines,
                outputs,
                config,
                gate: gate.account(),
                monitor,
                state: Mutex::new(state),
                ended: Condvar::new(),
            }),
        }
    }

    /// Queues and waits. Dropping the future removes a queued job and frees its permit at once; a job that is running
    /// finishes unheard.
    ///
    /// Errors: `NotReady` once closed, `Overloaded` when the queue is full, `DeadlineExceeded`; `InvalidInput` or
    /// `BackendFailed` as the engine says of this request alone.
    pub async fn submit(&self, prepared: Prepared, permit: Permit) -> Result<Answer> {
        let (prepared, permit) = match self.shared.run_inline(prepared, permit)? {
            Inline::Answered(answer) => return Ok(answer),
            Inline::NotNow(prepared, permit) => (prepared, permit),
        };
        let deadline = prepared.deadline;
        let (waiting, answer, collector) = self.shared.enqueue(prepared, permit)?;
        if let Some(collector) = collector {
            self.shared.collect(collector);
        }
        let answered = match deadline {
            None => answer.await,
            Some(deadline) => timeout_at(deadline.into(), answer).await.map_err(|_| expired())?,
        };
        waiting.disarm();
        answered.unwrap_or_else(|_| Err(Error::internal("the worker ended without an answer")))
    }

    /// Refuses new requests; what is queued is still served, without waiting for batches to fill.
    pub fn close(&self) {
        let mut state = lock(&self.shared.state);
        state.closed = true;
        state.batcher.set_max_delay(Duration::ZERO);
        drop(state);
        self.shared.engines.iter().for_each(|engine| engine.work.notify_all());
        self.shared.wake_filling();
    }

    /// Closes, and waits until all queued and running jobs are answered and the threads have ended. `Err`: how many
    /// jobs remained at the deadline. Blocks: for the loader's threads.
    pub fn join(&self, deadline: Instant) -> Result<(), usize> {
        self.close();
        let mut state = lock(&self.shared.state);
        while state.workers + state.inline + state.lent > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(state.batcher.len() + state.running + state.inline);
            }
            (state, _) = self.shared.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
        let handles = std::mem::take(&mut state.handles);
        drop(state);
        for handle in handles {
            // A worker that panicked has said so on its way out.
            let _ = handle.join();
        }
        Ok(())
    }

    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// What runs cost, as far as is known, by group.
    #[cfg(test)]
    pub fn costs(&self) -> Vec<Vec<Sample>> {
        lock(&self.shared.state).limits.iter().map(|limits| limits.costs().samples()).collect()
    }

    /// Rows that batches are filled up to at the moment, where there is no end of requests like the latest.
    pub fn batch_limit(&self) -> usize {
        let mut state = lock(&self.shared.state);
        let group = state.front();
        state.limits[group].latest().0
    }

    /// Requests share batches; false once demoted at run time.
    pub fn batches(&self) -> bool {
        self.shared.batching.load(Ordering::Relaxed)
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn enqueue(
        self: &Arc<Self>,
        prepared: Prepared,
        permit: Permit,
    ) -> Result<(Waiting<'_>, oneshot::Receiver<Result<Answer>>, Option<Worker>)> {
        let bytes = prepared.input_bytes();
        let extent = extent_of(&prepared);
        let Prepared { inputs, outputs, rows, key, length, deadline, priority } = prepared;
        let (reply, answer) = oneshot::channel();
        let mut state = lock(&self.state);
        // Read under the lock, so that arrivals are in order.
        let now = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(expired());
        }
        self.check_admits(&state, bytes)?;
        let job = Job { inputs, outputs, rows, length, extent, deadline, submitted: now, place: None, permit, reply };
        // Where nothing is shared, every request is one batch, however many rows it has.
        let rows = if self.batching.load(Ordering::Relaxed) { rows.min(batcher::MOST_ROWS) } else { 1 };
        let full = state.full(extent);
        let ticket = state.batcher.push(Entry { key, priority, rows, full, bytes, arrived: now, item: job });
        if !state.is_alone() {
            state.crowded = Some(now);
        }
        let rows = state.rows_here();
        state.company.seen(rows);
        self.emit_queue(&state);
        let collector = self.collector(&mut state, ticket);
        let call = self.summon(&mut state);
        let filled = state.filled(now);
        drop(state);
        self.wake(call, filled);
        Ok((Waiting { shared: self, ticket: Some(ticket) }, answer, collector))
    }

    fn check_admits(&self, state: &State, bytes: usize) -> Result<()> {
        if state.closed {
            return Err(Error::new(Kind::NotReady, format!("`{}` is being unloaded", self.name)));
        }
        let max = self.config.max_queue_bytes;
        let message = if state.batcher.len() >= self.config.max_queue_requests.max(1) {
            "Exceeds maximum queue size".to_string()
        } else if state.batcher.bytes().saturating_add(bytes) > max {
            format!("Exceeds maximum queue size: {bytes} bytes more would make it over {max} bytes")
        } else {
            return Ok(());
        };
        QueueRejected { version: &self.monitor }.emit();
        Err(Error::new(Kind::Overloaded, message))
    }

    /// Sees to it that enough workers head for what is queued: those in front first, and no matter how many head for
    /// it from behind, who may wait for a core. Then wake one resting worker of the group it gives, after unlocking.
    fn summon(self: &Arc<Self>, state: &mut State) -> Option<usize> {
        let wanted = state.batcher.batches();
        let mut heading = 0;
        for group in 0..state.slots.len() {
            heading += state.slots[group].heading;
            if wanted <= heading {
                return None;
            }
            if !state.has_spare(group) {
                continue;
            }
            let slots = &mut state.slots[group];
            if slots.resting > 0 {
                slots.resting -= 1;
                slots.calls += 1;
                slots.heading += 1;
                return Some(group);
            }
            let idle = state.take_idle(group);
            if idle.is_some() && self.start_worker(state, group, idle) {
                return None;
            }
        }
        self.add_worker(state);
        None
    }

    /// After unlocking: one that rests, one that waits for a batch to fill, of these groups.
    fn wake(&self, resting: Option<usize>, filling: Option<usize>) {
        if let Some(group) = resting {
            self.engines[group].work.notify_one();
        }
        if let Some(group) = filling {
            self.engines[group].filling.notify_one();
        }
    }

    /// All that wait for a batch to fill.
    fn wake_filling(&self) {
        self.engines.iter().for_each(|engine| engine.filling.notify_all());
    }

    fn emit_queue(&self, state: &State) {
        let (requests, bytes, running) = (state.batcher.len(), state.batcher.bytes(), state.running);
        QueueChanged { version: &self.monitor, requests, bytes, running }.emit();
    }

    /// Stops sharing batches: what the model gives does not have one row per row.
    fn demote(&self) {
        if self.batching.swap(false, Ordering::Relaxed) {
            let mut state = lock(&self.state);
            state.batcher.set_preferred_rows(1);
            state.limits.iter_mut().for_each(|limits| limits.set_most(1));
            drop(state);
            self.wake_filling();
            let reason = "an output does not have as many rows as its inputs";
            VersionDemoted { version: &self.monitor, reason }.emit();
        }
    }
}

/// A caller that waits. Dropped armed, it takes its job out of the queue.
struct Waiting<'a> {
    shared: &'a Shared,
    ticket: Option<Ticket>,
}

impl Waiting<'_> {
    /// The job has left the queue.
    fn disarm(mut self) {
        self.ticket = None;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut state = lock(&self.shared.state);
        let job = state.batcher.remove(ticket);
        if job.is_some() {
            self.shared.emit_queue(&state);
        }
        drop(state);
        // The job's tensors and permit are freed here, outside the lock.
        drop(job);
    }
}

/// Elements of a row of the largest input: what the time of a row depends on where its shape is free and nobody says
/// which axis is a sequence. A sequence of numbers is as long as this.
pub fn extent(inputs: &[Tensor], rows: usize) -> usize {
    inputs.iter().map(|input| input.shape().elements() / rows.max(1)).max().unwrap_or(0)
}

fn extent_of(prepared: &Prepared) -> Option<usize> {
    prepared.length.or_else(|| (!prepared.key.is_empty()).then(|| extent(&prepared.inputs, prepared.rows)))
}

fn expired() -> Error {
    Error::new(Kind::DeadlineExceeded, "Request timeout expired")
}

/// A thread that panicked while it held one of our locks left nothing half-done that the next holder depends on: the
/// state is counters and a queue, changed by operations that do not panic in between.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
