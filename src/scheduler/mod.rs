//! Scheduling of one model version: requests are queued, batched and run by worker threads that pull.
//!
//! Owns the queue, the version's instances and its threads; knows nothing of protocols, registries or engines. Policy
//! lives in [`batcher`] and [`threads`], which have neither clocks nor threads; this file is the shell that callers
//! see, `worker` the loop that runs.
//!
//! Invariants: a request leaves the queue exactly once, to a worker or because its caller stopped waiting. A job that
//! was taken is answered even after [`Scheduler::close`]. Whenever something is queued, a worker is on its way to it
//! or busy and will look again before it rests. An idle version has no running thread.
//!
//! Locks: one mutex around the [`State`], held for queue operations only, never while an engine works or a gate is
//! waited for. Threads: callers submit from any async task and never block; workers are std threads, started on
//! demand, gone after [`Config::linger`] without work.

pub mod batcher;
mod gate;
#[cfg(test)]
mod tests;
mod threads;
mod worker;

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

pub use gate::Gate;
pub use threads::{Reason, ThreadPlan, Wish};

pub const DEFAULT_PREFERRED_ROWS: usize = 32;
pub const DEFAULT_MAX_QUEUE_REQUESTS: usize = 1024;
pub const DEFAULT_MAX_QUEUE_BYTES: usize = 512 << 20;
pub const DEFAULT_LINGER: Duration = Duration::from_secs(10);

/// How one version is scheduled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Batch at all.
    pub batching: bool,
    /// Where requests of different lengths share a batch.
    pub ragged: Option<Arc<Ragged>>,
    /// Rows a batch is filled up to; at most what the model declares. A request of more rows runs alone.
    pub preferred_rows: usize,
    /// How long a request may wait for others to share its batch.
    pub max_delay: Duration,
    pub max_queue_requests: usize,
    pub max_queue_bytes: usize,
    /// How long an idle worker thread lingers before it exits (its instance is kept).
    pub linger: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            batching: true,
            ragged: None,
            preferred_rows: DEFAULT_PREFERRED_ROWS,
            max_delay: Duration::ZERO,
            max_queue_requests: DEFAULT_MAX_QUEUE_REQUESTS,
            max_queue_bytes: DEFAULT_MAX_QUEUE_BYTES,
            linger: DEFAULT_LINGER,
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
    gate: Arc<Gate>,
    monitor: Arc<VersionMonitor>,
    /// False once demoted.
    batching: AtomicBool,
    state: Mutex<State>,
    /// Resting workers wait here for a wake-up.
    work: Condvar,
    /// Workers wait here for a batch to fill.
    filling: Condvar,
    /// `join` waits here for workers to end.
    ended: Condvar,
}

/// What a group's workers run on.
struct Engine {
    model: Arc<dyn Model>,
    cores: usize,
}

type Key = Box<[usize]>;
type Ticket = batcher::Ticket<Priority>;

struct State {
    batcher: Batcher<Key, Priority, Job>,
    closed: bool,
    /// Instances of workers that have ended, with their groups, the most recent last.
    instances: Vec<(usize, Box<dyn Instance>)>,
    /// By group. Places for instances: those above, and one for every worker (empty for a moment after a panic).
    slots: Vec<Slots>,
    workers: usize,
    /// Resting workers that have not been called.
    resting: usize,
    /// Calls that a resting worker has yet to notice.
    calls: usize,
    /// Workers on their way to the queue: called, started, or waiting for the gate or for a batch to fill.
    heading: usize,
    /// Workers that have begun to reply and will look at the queue next.
    returning: usize,
    /// Workers that wait for a batch to fill.
    filling: usize,
    /// One worker at a time makes another instance.
    growing: bool,
    /// Jobs taken and not yet answered.
    running: usize,
    handles: Vec<JoinHandle<()>>,
}

#[derive(Clone, Copy)]
struct Slots {
    taken: usize,
    /// At least 1 in one group or more: a group loses places only while another instance is there.
    most: usize,
}

impl State {
    fn has_instances(&self) -> bool {
        self.slots.iter().any(|slots| slots.taken > 0)
    }

    /// Of the first group that has any, the most recent.
    fn take_idle(&mut self) -> Option<(usize, Box<dyn Instance>)> {
        let place = (0..self.instances.len()).rev().min_by_key(|place| self.instances[*place].0)?;
        Some(self.instances.remove(place))
    }

    /// The group with the fewest instances of those that may have more.
    fn group_with_room(&self) -> Option<usize> {
        let groups = self.slots.iter().enumerate().filter(|(_, slots)| slots.taken < slots.most);
        groups.min_by_key(|(_, slots)| slots.taken).map(|(group, _)| group)
    }

    /// A worker that waits for a batch to fill need not wait any longer.
    fn filled(&self, now: Instant) -> bool {
        self.filling > 0 && self.batcher.readiness(now) == Readiness::Ready
    }
}

/// A queued request. Dropping it frees its permit and tells its caller that nobody will answer.
struct Job {
    inputs: Vec<Tensor>,
    outputs: Vec<usize>,
    rows: usize,
    length: Option<usize>,
    deadline: Option<Instant>,
    submitted: Instant,
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
        let slots = groups.iter().map(|group| Slots { taken: 1, most: group.instances.max(1) }).collect();
        let outputs = groups.first().map_or(0, |group| group.model.signature().outputs.len());
        let (mut engines, mut instances) = (Vec::new(), Vec::new());
        for (place, Group { model, instance, cores, .. }) in groups.into_iter().enumerate() {
            engines.push(Engine { model, cores });
            instances.push((place, instance));
        }
        let state = State {
            batcher: Batcher::new(preferred_rows, config.max_delay),
            closed: false,
            instances,
            slots,
            workers: 0,
            resting: 0,
            calls: 0,
            heading: 0,
            returning: 0,
            filling: 0,
            growing: false,
            running: 0,
            handles: Vec::new(),
        };
        Scheduler {
            shared: Arc::new(Shared {
                name: name.into(),
                batching: AtomicBool::new(config.batching),
                engines,
                outputs,
                config,
                gate,
                monitor,
                state: Mutex::new(state),
                work: Condvar::new(),
                filling: Condvar::new(),
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
        let deadline = prepared.deadline;
        let (waiting, answer) = self.shared.enqueue(prepared, permit)?;
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
        self.shared.work.notify_all();
        self.shared.filling.notify_all();
    }

    /// Closes, and waits until all queued and running jobs are answered and the threads have ended. `Err`: how many
    /// jobs remained at the deadline. Blocks: for the loader's threads.
    pub fn join(&self, deadline: Instant) -> Result<(), usize> {
        self.close();
        let mut state = lock(&self.shared.state);
        while state.workers > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(state.batcher.len() + state.running);
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
    ) -> Result<(Waiting<'_>, oneshot::Receiver<Result<Answer>>)> {
        let Prepared { inputs, outputs, rows, key, length, deadline, priority } = prepared;
        let bytes = inputs.iter().map(|input| input.data().len()).sum();
        let (reply, answer) = oneshot::channel();
        let mut state = lock(&self.state);
        // Read under the lock, so that arrivals are in order.
        let now = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(expired());
        }
        self.check_admits(&state, bytes)?;
        let job = Job { inputs, outputs, rows, length, deadline, submitted: now, permit, reply };
        // Where nothing is shared, every request is one batch, however many rows it has.
        let rows = if self.batching.load(Ordering::Relaxed) { rows } else { 1 };
        let ticket = state.batcher.push(Entry { key, priority, rows, bytes, arrived: now, item: job });
        self.emit_queue(&state);
        let call = self.summon(&mut state);
        let filled = state.filled(now);
        drop(state);
        self.wake(call, filled);
        Ok((Waiting { shared: self, ticket: Some(ticket) }, answer))
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

    /// Sees to it that enough workers head for what is queued. True: wake one resting worker, after unlocking.
    fn summon(self: &Arc<Self>, state: &mut State) -> bool {
        if state.batcher.batches() <= state.heading {
            return false;
        }
        if state.resting > 0 {
            state.resting -= 1;
            state.calls += 1;
            state.heading += 1;
            return true;
        }
        self.start_worker(state);
        false
    }

    /// After unlocking: one that rests, one that waits for a batch to fill.
    fn wake(&self, resting: bool, filling: bool) {
        if resting {
            self.work.notify_one();
        }
        if filling {
            self.filling.notify_one();
        }
    }

    fn emit_queue(&self, state: &State) {
        let (requests, bytes, running) = (state.batcher.len(), state.batcher.bytes(), state.running);
        QueueChanged { version: &self.monitor, requests, bytes, running }.emit();
    }

    /// Stops sharing batches: what the model gives does not have one row per row.
    fn demote(&self) {
        if self.batching.swap(false, Ordering::Relaxed) {
            lock(&self.state).batcher.set_preferred_rows(1);
            self.filling.notify_all();
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

fn expired() -> Error {
    Error::new(Kind::DeadlineExceeded, "Request timeout expired")
}

/// A thread that panicked while it held one of our locks left nothing half-done that the next holder depends on: the
/// state is counters and a queue, changed by operations that do not panic in between.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
