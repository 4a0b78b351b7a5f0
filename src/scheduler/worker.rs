//! The worker thread: waits for work, takes its turn at the compute gate, seals a batch at the last moment, runs it,
//! splits the outputs and replies.
//!
//! Owns one instance while it works, and gives it to the pool to rest. A failed batch is bisected by request; a panic costs the instance, which is made
//! anew. Where that fails, other groups get the jobs and the worker ends; the last group tells the callers. Never holds the state's lock while it waits for the gate, runs, replies or records.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::batcher::{Entry, Poll, Readiness};
use super::cost::seconds;
use super::gate::Turn;
use super::{Answer, Job, Key, Room, Shared, State, Ticket, WideSlot, expired, layout, lock};
use crate::backend::{Batch, Instance, RunError, panic_text};
use crate::error::{Error, Kind};
use crate::monitor::events::{BatchExecuted, RunLearned};
use crate::request::{Priority, Timings};
use crate::tensor::{Ragged, Tensor};

/// What Linux keeps of a thread's name.
const MAX_THREAD_NAME_BYTES: usize = 15;

pub(super) struct Worker {
    shared: Arc<Shared>,
    /// Whose instance it owns.
    group: usize,
    /// `None` while it rests, and after a panic, until it has been made anew.
    instance: Option<Box<dyn Instance>>,
    /// Its instance is in the pool.
    rested: bool,
    /// Works on a thread that is not its own, for one turn: counted in `State::lent`.
    lent: bool,
    /// Makes one more instance first: `State::growing`.
    growing: bool,
    /// An instance cannot be made: its place is given up when it ends.
    gives_up: bool,
    /// Counted in `Slots::heading`.
    heading: bool,
    /// Counted in `State::returning`.
    returning: bool,
    /// Jobs counted in `State::running`, and their rows.
    running: usize,
    running_rows: usize,
    /// On loan for one turn, with its threads.
    wide: Option<(Box<dyn Instance>, usize)>,
    /// When it took what it has, where that is alone on the machine: a measure for which layout such requests get.
    lone: Option<Instant>,
    /// Before the batch that it takes next.
    waited: Option<Waited>,
    /// When it began to wait for its turn.
    turn_asked: Instant,
    /// What its instance's latest run cost, until the others are told.
    learned: Option<Learned>,
    /// Has run: the first run of a thread finds nothing in the caches.
    warm: bool,
    /// Whole outputs of this turn's runs, for the monitor, and how long each took to compute.
    executed: Vec<(Vec<Tensor>, Duration)>,
}

/// One whole batch, run once.
#[derive(Clone, Copy)]
struct Learned {
    rows: usize,
    extent: Option<usize>,
    /// `None` where the wide instance failed.
    compute: Option<Duration>,
    /// On so many threads: not on those of the worker's own instance.
    wide: Option<usize>,
}

/// For company.
#[derive(Clone, Copy)]
struct Waited {
    took: Duration,
    /// That were there before, for each of the workers on their way.
    rows: usize,
    /// That came meanwhile, for each.
    came: usize,
}

/// What a run did for its jobs.
enum Outcome {
    Answered,
    Failed(Vec<Job>, RunError),
    /// The outputs cannot be told apart by rows, or by their lengths.
    NotByRows(Vec<Job>),
}

impl Shared {
    /// Starts a worker to make the only instance again, or to make one more while the others work. Starts none where
    /// there are as many as there may be, or where another is about to be free: one caller that sends request after
    /// request is no reason for a second instance.
    pub(super) fn add_worker(self: &Arc<Self>, state: &mut State) {
        if state.has_instances() && (state.growing || state.returning > 0 || state.closed) {
            return;
        }
        if let Some(group) = state.group_with_room() {
            self.start_worker(state, group, None);
        }
    }

    /// With an instance of one that has ended, or none. False: there is no thread for it.
    pub(super) fn start_worker(
        self: &Arc<Self>,
        state: &mut State,
        group: usize,
        instance: Option<Box<dyn Instance>>,
    ) -> bool {
        let new_slot = instance.is_none();
        let growing = new_slot && state.has_instances();
        let heading = !growing;
        let name = thread_name(&self.name, state.workers);
        let shared = Arc::clone(self);
        let begin = move || {
            let mut worker = Worker::new(shared, group, instance);
            (worker.growing, worker.heading) = (growing, heading);
            worker.work();
        };
        let spawned = thread::Builder::new().name(name).spawn(begin);
        let started = spawned.is_ok();
        match spawned {
            Ok(handle) => {
                state.workers += 1;
                state.slots[group].heading += usize::from(heading);
                state.slots[group].taken += usize::from(new_slot);
                state.growing |= growing;
                state.handles.retain(|handle| !handle.is_finished());
                state.handles.push(handle);
            }
            Err(error) => {
                tracing::error!(version = &*self.name, %error, "cannot start a worker thread");
                // The instance went with the thread that never was; it is made again when there are threads again.
                state.slots[group].taken -= usize::from(!new_slot);
                self.refuse_if_deserted(state);
            }
        }
        started
    }

    /// Without a worker nobody would ever answer.
    fn refuse_if_deserted(&self, state: &mut State) {
        if state.workers + state.lent > 0 {
            return;
        }
        for job in state.batcher.drain() {
            job.reject(Error::new(Kind::Overloaded, "no worker thread can be started"));
        }
        self.emit_queue(state);
    }

    /// A new instance; a panic of the engine is an error like any other.
    fn make_instance(&self, group: usize) -> Result<Box<dyn Instance>, String> {
        match catch_unwind(AssertUnwindSafe(|| self.engines[group].model.instance())) {
            Ok(made) => made.map_err(|error| error.to_string()),
            Err(panic) => Err(format!("panic: {}", panic_text(&*panic))),
        }
    }

    /// One run of one or more requests together. A panic costs the instance.
    pub(super) fn run_engine(
        &self,
        lent: &mut Option<Box<dyn Instance>>,
        inputs: &[&[Tensor]],
    ) -> Result<Vec<Tensor>, RunError> {
        let Some(mut instance) = lent.take() else {
            return Err(RunError::Failed("the version has no instance".into()));
        };
        let batch = Batch::new(inputs).padded(self.config.ragged.as_deref());
        let outputs = match catch_unwind(AssertUnwindSafe(|| instance.run(&batch))) {
            Ok(result) => {
                *lent = Some(instance);
                result?
            }
            Err(panic) => {
                let panic = panic_text(&*panic);
                tracing::error!(version = &*self.name, panic, "the backend panicked; its instance is made anew");
                return Err(RunError::Failed("the backend panicked".into()));
            }
        };
        let (found, expected) = (outputs.len(), self.outputs);
        if found != expected {
            return Err(RunError::Failed(format!("the backend gave {found} outputs, expected {expected}")));
        }
        Ok(outputs)
    }
}

impl Worker {
    fn new(shared: Arc<Shared>, group: usize, instance: Option<Box<dyn Instance>>) -> Worker {
        Worker {
            shared,
            group,
            instance,
            rested: false,
            lent: false,
            growing: false,
            gives_up: false,
            heading: false,
            returning: false,
            running: 0,
            running_rows: 0,
            wide: None,
            lone: None,
            waited: None,
            turn_asked: Instant::now(),
            learned: None,
            warm: false,
            executed: Vec::new(),
        }
    }

    /// On its way to the queue, on the thread that asks for it.
    pub(super) fn lend(shared: &Arc<Shared>, state: &mut State, group: usize) -> Worker {
        let instance = state.take_idle(group);
        state.lent += 1;
        let mut worker = Worker::new(Arc::clone(shared), group, instance);
        (worker.lent, worker.warm) = (true, true);
        worker.set_heading(state, true);
        worker
    }

    /// Takes, runs and answers one batch. How many requests it had.
    pub(super) fn one_turn(mut self) -> usize {
        let jobs = self.take();
        let requests = jobs.len();
        self.serve(jobs);
        self.record();
        requests
    }

    fn work(mut self) {
        if self.growing && !self.grow() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let cores = shared.engines[self.group].cores;
        while !self.gives_up && self.find_work() {
            self.turn_asked = Instant::now();
            let mut turn = shared.gate.acquire(cores);
            let jobs = self.take();
            self.widen(&mut turn, cores);
            self.serve(jobs);
            drop(turn);
            self.record();
        }
    }

    /// Makes one more instance. If that fails, the group makes do with those it has.
    fn grow(&mut self) -> bool {
        match self.shared.make_instance(self.group) {
            Ok(instance) => {
                self.instance = Some(instance);
                self.growing = false;
                lock(&self.shared.state).growing = false;
            }
            Err(error) => {
                self.gives_up = true;
                // This worker's own place goes when it ends.
                let instances = lock(&self.shared.state).slots[self.group].taken - 1;
                tracing::warn!(version = &*self.shared.name, error, instances, "cannot make another instance");
            }
        }
        !self.gives_up
    }

    /// Waits until there is a batch to take. False: this worker is not needed any more.
    fn find_work(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut state = lock(&shared.state);
        self.count_out(&mut state);
        state.returning -= usize::from(std::mem::take(&mut self.returning));
        let mut had_company = false;
        loop {
            match state.batcher.readiness(Instant::now()) {
                Readiness::Ready => {
                    self.set_heading(&mut state, true);
                    if std::mem::replace(&mut had_company, true) {
                        return true;
                    }
                    state = self.wait_for_company(&shared, state);
                }
                Readiness::At(due) => {
                    self.set_heading(&mut state, true);
                    state = self.wait_to_fill(&shared, state, due);
                }
                Readiness::Idle => {
                    self.set_heading(&mut state, false);
                    // It waited for what others took.
                    (had_company, self.waited) = (false, None);
                    if state.closed {
                        return false;
                    }
                    match self.rest(&shared, state) {
                        Some(called) => state = called,
                        None => return false,
                    }
                }
            }
        }
    }

    /// Rests until called or closed, its instance in the pool meanwhile; `None` once it has lingered long enough, and
    /// where it has no instance to be called for.
    fn rest<'a>(&mut self, shared: &'a Shared, mut state: MutexGuard<'a, State>) -> Option<MutexGuard<'a, State>> {
        let since = Instant::now();
        state.instances.push((self.group, self.instance.take()?));
        self.rested = true;
        state.slots[self.group].resting += 1;
        loop {
            let slots = &mut state.slots[self.group];
            if slots.calls > 0 {
                // Whoever called has counted this worker as heading, and no longer as resting.
                slots.calls -= 1;
                self.heading = true;
                self.take_back(&mut state);
                return Some(state);
            }
            let left = shared.config.linger.saturating_sub(since.elapsed());
            if state.closed || left.is_zero() {
                state.slots[self.group].resting -= 1;
                let goes_on = state.closed && state.has_spare(self.group);
                return goes_on.then(|| {
                    self.take_back(&mut state);
                    state
                });
            }
            (state, _) =
                shared.engines[self.group].work.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// From the pool: there is one that was promised, or that is promised to nobody.
    fn take_back(&mut self, state: &mut State) {
        self.instance = state.take_idle(self.group);
        self.rested = self.instance.is_none();
    }

    /// For those that were just answered, where that pays.
    fn wait_for_company<'a>(&mut self, shared: &'a Shared, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        if state.closed {
            return state;
        }
        let Some(missing) = state.missing(self.group) else { return state };
        let expected = state.limits[self.group].costs().predict(missing.share, missing.length);
        let Some(patience) = expected.and_then(|run| state.company.patience(run)) else { return state };
        let since = Instant::now();
        let mut here = missing.here;
        while !state.closed && since.elapsed() < patience {
            state = self.wait_to_fill(shared, state, since + patience);
            // What is urgent and of another kind has nothing to do with this wait.
            let Some(now) = state.rows_of(&missing.key) else { break };
            here = now;
            if state.missing(self.group).is_none() {
                break;
            }
        }
        let rows = state.rows_here();
        state.company.waited(rows);
        let each = |rows: usize| rows.div_ceil(missing.workers);
        let came = each(here).saturating_sub(each(missing.here));
        self.waited = Some(Waited { took: since.elapsed(), rows: each(missing.here), came });
        state
    }

    fn wait_to_fill<'a>(
        &self,
        shared: &'a Shared,
        mut state: MutexGuard<'a, State>,
        due: Instant,
    ) -> MutexGuard<'a, State> {
        let left = due.saturating_duration_since(Instant::now());
        state.slots[self.group].filling += 1;
        let filling = &shared.engines[self.group].filling;
        let (mut state, _) = filling.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        state.slots[self.group].filling -= 1;
        state
    }

    /// The jobs this worker took run no more.
    fn count_out(&mut self, state: &mut State) {
        let ended = std::mem::take(&mut self.running);
        state.running -= ended;
        let ended_rows = std::mem::take(&mut self.running_rows);
        state.running_rows -= ended_rows;
        if self.returning {
            state.answering -= ended;
            state.answering_rows -= ended_rows;
        }
        if let Some((instance, _)) = self.wide.take() {
            state.give_wide(self.group, instance);
        }
        if let Some(learned) = self.learned.take() {
            self.learn(state, learned);
        }
        if ended > 0 {
            state.slots[self.group].running -= 1;
            self.shared.emit_queue(state);
        }
    }

    fn learn(&self, state: &mut State, Learned { rows, extent, compute, wide }: Learned) {
        if self.lone.is_some_and(|taken| state.crowded.is_none_or(|crowded| crowded < taken))
            && let Some(WideSlot { contests, .. }) = &mut state.wide[self.group]
            && let Some(contest) = contests.get_mut(&layout::key(rows, extent))
        {
            contest.learn(wide.is_some(), compute.map_or(f64::INFINITY, |compute| seconds(rows, extent, compute)));
        }
        let limits = &mut state.limits[self.group];
        let Some(compute) = compute else { return };
        if wide.is_none() {
            limits.learn(rows, extent, compute, self.turn_asked.elapsed());
        }
        let max_delay = self.shared.config.max_delay;
        if self.shared.config.latency_goal.is_some() && !max_delay.is_zero() && !state.closed {
            state.batcher.set_max_delay(max_delay.min(limits.patience()));
        }
        let (batch_limit, expected) = limits.latest();
        let threads = wide.unwrap_or(self.shared.engines[self.group].cores).max(1);
        RunLearned { version: &self.shared.monitor, batch_limit, expected, threads }.emit();
    }

    fn set_heading(&mut self, state: &mut State, heading: bool) {
        let count = &mut state.slots[self.group].heading;
        *count = *count + usize::from(heading) - usize::from(self.heading);
        self.heading = heading;
    }

    /// Callers that hear their answer may send the next request before this worker is back.
    fn set_returning(&mut self) {
        if !std::mem::replace(&mut self.returning, true) {
            let mut state = lock(&self.shared.state);
            state.returning += 1;
            state.answering += self.running;
            state.answering_rows += self.running_rows;
            if let Some((instance, _)) = self.wide.take() {
                state.give_wide(self.group, instance);
            }
        }
    }

    /// Seals a batch. Empty if another worker or the callers' leaving was faster.
    fn take(&mut self) -> Vec<Job> {
        let shared = Arc::clone(&self.shared);
        let room = shared.gate.room();
        let mut state = lock(&shared.state);
        let now = Instant::now();
        let polled = self.poll(&mut state, room, now);
        let waited = self.waited.take();
        if let Poll::Batch(taken) = &polled {
            self.running = taken.len();
            self.running_rows = taken.iter().map(|(_, entry)| entry.rows.max(1)).fold(0, usize::saturating_add);
            state.running += taken.len();
            state.running_rows = state.running_rows.saturating_add(self.running_rows);
            state.slots[self.group].running += 1;
            if let Some(Waited { took, rows, came }) = waited {
                let longest = taken.iter().filter_map(|(_, entry)| entry.item.extent).max();
                // Less than came, where not all of it fits.
                let more = self.running_rows.saturating_sub(rows).min(came);
                let saved = state.limits[self.group].saved(longest, rows, more);
                state.company.learn(took, saved);
            }
            self.lone = None;
            if let [(_, entry)] = &taken[..]
                && !self.lent
                && !room.contended
                && state.wide[self.group].is_some()
                && state.is_lone(self.group, &entry.item, now)
            {
                self.lone = Some(now);
                self.wide = state.take_wide(self.group, &entry.item);
            }
            shared.emit_queue(&state);
        }
        self.set_heading(&mut state, false);
        let call = shared.summon(&mut state);
        // What filled up need not be what this worker took: a full lane sends off the head of another one.
        let filled = state.filled(now);
        drop(state);
        shared.wake(call, filled);
        match polled {
            Poll::Batch(taken) => taken.into_iter().map(Job::taken).collect(),
            Poll::Wait(_) | Poll::Idle => Vec::new(),
        }
    }

    /// Takes the cores for the wide instance, or gives it back: others may have come since it was chosen.
    fn widen(&mut self, turn: &mut Turn, cores: usize) {
        let Some((instance, threads)) = self.wide.take() else { return };
        if turn.widen(threads.saturating_sub(cores)) {
            self.wide = Some((instance, threads));
        } else {
            self.lone = None;
            lock(&self.shared.state).give_wide(self.group, instance);
        }
    }

    /// A batch of as many rows as pay, and of no sequences that would make the others long.
    fn poll(&self, state: &mut State, room: Room, now: Instant) -> Poll<Key, Priority, Job> {
        let mut sealing = state.seal(self.group, self.shared.engines[self.group].cores, room);
        let State { batcher, limits, .. } = state;
        let limits = &limits[self.group];
        let Some((head, _)) = batcher.head() else { return Poll::Idle };
        let mut longest = head.item.extent;
        let suits = |entry: &Entry<Key, Priority, Job>| !self.lent || self.shared.is_quick(limits.costs(), &entry.item);
        if !suits(head) {
            return Poll::Idle;
        }
        if self.lent {
            sealing.rows = self.shared.quick_rows(limits.costs(), sealing.rows, longest);
        }
        batcher.poll(now, sealing.rows, |rows, entry| {
            let joins = sealing.trial || limits.fits(rows, longest, entry.rows, entry.item.extent);
            let fits = joins && suits(entry);
            longest = longest.max(entry.item.extent.filter(|_| fits));
            fits
        })
    }

    /// Answers every job, or puts it back where another group may have an instance and this one has none. A failed group of several is halved until the requests at fault stand alone, larger groups
    /// first, so that most of the others are answered early. There is no other cap than that: `n` requests cost at
    /// most `2 n - 2` extra runs, and no request is failed for its neighbours.
    fn serve(&mut self, jobs: Vec<Job>) {
        let mut groups = VecDeque::from([jobs]);
        while let Some(group) = groups.pop_front() {
            if let Err(error) = self.ensure_instance() {
                let jobs = group.into_iter().chain(groups.drain(..).flatten()).collect();
                for job in self.give_back(jobs) {
                    job.reject(error.clone());
                }
                return;
            }
            match self.run(group) {
                Outcome::Answered => {}
                // Parting them takes more runs, and after a panic an instance: nothing for a thread that others wait for.
                Outcome::Failed(group, _) if self.lent && group.len() > 1 => {
                    self.put_back(group);
                }
                Outcome::NotByRows(group) => {
                    self.shared.demote();
                    groups.extend(group.into_iter().map(|job| vec![job]));
                }
                Outcome::Failed(mut group, error) if group.len() == 1 => {
                    self.set_returning();
                    group.drain(..).for_each(|job| job.reject(blame(&error)));
                }
                Outcome::Failed(mut first, _) => {
                    let second = first.split_off(first.len() / 2);
                    groups.extend([first, second]);
                }
            }
        }
    }

    /// To the queue, in their order, if there is a group that may answer in this one's stead: a worker without an
    /// instance fails fast, and would win the queue from those that work. Gives those that are left to reject.
    fn give_back(&mut self, jobs: Vec<Job>) -> Vec<Job> {
        let shared = Arc::clone(&self.shared);
        let state = lock(&shared.state);
        if !state.others_have_room(self.group) {
            return jobs;
        }
        drop(state);
        self.gives_up = true;
        tracing::warn!(version = &*shared.name, "a worker without an instance leaves its requests to other devices");
        self.put_back(jobs)
    }

    /// Gives those that cannot go back.
    fn put_back(&mut self, jobs: Vec<Job>) -> Vec<Job> {
        let shared = Arc::clone(&self.shared);
        let mut state = lock(&shared.state);
        let mut left = Vec::new();
        for mut job in jobs {
            match job.place.take() {
                // Closed under the lock: a caller that leaves later finds its job in the queue and takes it out.
                Some((ticket, place)) if !job.reply.is_closed() => {
                    state.batcher.put_back(ticket, place.replace(job).0);
                }
                _ => left.push(job),
            }
        }
        self.count_out(&mut state);
        drop(state);
        // The jobs are older than what the others wait to fill up. Those that rest are called when this worker ends.
        shared.wake_filling();
        left
    }

    fn ensure_instance(&mut self) -> Result<(), Error> {
        if self.instance.is_none() {
            let made = self.shared.make_instance(self.group).map_err(|error| {
                tracing::error!(version = &*self.shared.name, error, "cannot make an instance");
                Error::new(Kind::BackendFailed, format!("`{}` has no working instance", self.shared.name))
            })?;
            self.instance = Some(made);
        }
        Ok(())
    }

    /// Runs those jobs whose callers still wait, together, once.
    fn run(&mut self, jobs: Vec<Job>) -> Outcome {
        let started = Instant::now();
        let jobs = still_waiting(jobs, started);
        if jobs.is_empty() {
            return Outcome::Answered;
        }
        let (requests, rows) = (jobs.len(), jobs.iter().map(|job| job.rows).sum());
        let positions = Positions::of(&jobs);
        let assembled = Instant::now();
        let inputs: Vec<&[Tensor]> = jobs.iter().map(|job| job.inputs.as_slice()).collect();
        let (result, wide) = match self.wide.take() {
            None => (self.shared.run_engine(&mut self.instance, &inputs), None),
            Some((instance, threads)) => {
                let mut lent = Some(instance);
                let result = self.shared.run_engine(&mut lent, &inputs);
                // After a panic there is none, and lone requests run as the others do.
                self.wide = lent.map(|instance| (instance, threads));
                (result, Some(threads))
            }
        };
        let ran = Instant::now();
        if wide.is_none() && self.shared.engines[self.group].cores == 1 {
            self.shared.quickness.learn(jobs[0].bytes(), ran - assembled, result.is_ok());
        }
        let extent = jobs.iter().filter_map(|job| job.extent).max();
        // Parts of a batch that failed, and what fails, are no measure.
        let whole = requests == self.running && result.is_ok() && std::mem::replace(&mut self.warm, true);
        let compute = result.is_ok().then_some(ran - assembled);
        let lost = wide.is_some() && result.is_err();
        self.learned = (whole || lost).then_some(Learned { rows, extent, compute, wide });
        let ragged = self.shared.config.ragged.clone();
        let parts = result.map(|outputs| (split(&outputs, &jobs, ragged.as_deref()), outputs));
        let split = ran.elapsed();
        let (input, compute) = (assembled - started, ran - assembled);
        let failed = !matches!(parts, Ok((Some(_), _)));
        let outcome = match parts {
            Err(error) => Outcome::Failed(jobs, error),
            Ok((None, _)) => Outcome::NotByRows(jobs),
            Ok((Some(parts), outputs)) => {
                // What shorter rows were filled up with is no prediction.
                let observed = if positions.padding > 0 { by_job(&parts, jobs.len()) } else { vec![outputs] };
                let timings = Timings { input, compute, split, batch_rows: rows, ..Timings::default() };
                self.set_returning();
                reply(jobs, parts, started, timings);
                let each = compute / u32::try_from(observed.len()).unwrap_or(u32::MAX).max(1);
                self.executed.extend(observed.into_iter().map(|outputs| (outputs, each)));
                Outcome::Answered
            }
        };
        let version = &self.shared.monitor;
        let Positions { data, padding } = positions;
        BatchExecuted { version, requests, rows, data, padding, input, gather_and_compute: compute, split, failed }
            .emit();
        outcome
    }

    /// Hands this turn's outputs to the monitor, when every caller has its answer and the gate is free again.
    fn record(&mut self) {
        for (outputs, run) in self.executed.drain(..) {
            self.shared.monitor.fold(&outputs, run);
        }
    }
}

impl Drop for Worker {
    /// Leaves the instance to the next worker. Runs on a panic too, so that the version never counts on a dead worker.
    fn drop(&mut self) {
        let shared = Arc::clone(&self.shared);
        let instance = self.instance.take().filter(|_| !thread::panicking());
        let mut state = lock(&shared.state);
        self.set_heading(&mut state, false);
        self.count_out(&mut state);
        state.returning -= usize::from(self.returning);
        if self.lent {
            state.lent -= 1;
        } else {
            state.workers -= 1
        }
        match instance {
            Some(instance) => state.instances.push((self.group, instance)),
            None if self.rested => {}
            None => state.vacate(self.group, self.gives_up),
        }
        state.growing &= !self.growing;
        let call = shared.summon(&mut state);
        drop(state);
        shared.wake(call, None);
        shared.ended.notify_all();
    }
}

impl Job {
    fn taken((ticket, entry): (Ticket, Entry<Key, Priority, Job>)) -> Job {
        let (place, mut job) = entry.replace(());
        job.place = Some((ticket, place));
        job
    }

    pub(super) fn bytes(&self) -> usize {
        self.inputs.iter().map(|input| input.data().len()).sum()
    }

    fn reject(self, error: Error) {
        // A caller that has left hears nothing.
        let _ = self.reply.send(Err(error));
    }
}

/// Leaves out jobs whose callers have left or whose time is up: nothing is run for nobody.
fn still_waiting(jobs: Vec<Job>, now: Instant) -> Vec<Job> {
    let waits = |job: Job| {
        if job.deadline.is_some_and(|deadline| deadline <= now) {
            job.reject(expired());
            return None;
        }
        (!job.reply.is_closed()).then_some(job)
    };
    jobs.into_iter().filter_map(waits).collect()
}

/// Positions along the sequences of a batch, summed over its rows; 0 where the version has no sequences.
#[derive(Clone, Copy)]
pub(super) struct Positions {
    /// As sent.
    pub(super) data: usize,
    /// What shorter rows are filled up with.
    pub(super) padding: usize,
}

impl Positions {
    pub(super) fn alone(rows: usize, length: Option<usize>) -> Positions {
        Positions { data: rows.saturating_mul(length.unwrap_or(0)), padding: 0 }
    }

    fn of(jobs: &[Job]) -> Positions {
        let longest = jobs.iter().filter_map(|job| job.length).max().unwrap_or(0);
        let sum = |each: &dyn Fn(&Job) -> usize| jobs.iter().map(each).fold(0, usize::saturating_add);
        Positions {
            data: sum(&|job| job.rows.saturating_mul(job.length.unwrap_or(0))),
            padding: sum(&|job| job.rows.saturating_mul(job.length.map_or(0, |length| longest - length))),
        }
    }
}

/// `parts[o][j]`: output `o` of job `j`, as long as the job's own sequences. `None` where several jobs cannot be told
/// apart. A lone job's outputs are its own, whatever their shapes.
fn split(outputs: &[Tensor], jobs: &[Job], ragged: Option<&Ragged>) -> Option<Vec<Vec<Tensor>>> {
    if jobs.len() == 1 {
        return Some(outputs.iter().map(|output| vec![output.clone()]).collect());
    }
    let rows: Vec<usize> = jobs.iter().map(|job| job.rows).collect();
    let cut = |(position, output): (usize, &Tensor)| {
        let parts = output.split_rows(&rows)?;
        let cut = |(part, job): (Tensor, &Job)| match ragged.zip(job.length) {
            None => Some(part),
            Some((ragged, length)) => ragged.cut(position, &part, length),
        };
        parts.into_iter().zip(jobs).map(cut).collect()
    };
    outputs.iter().enumerate().map(cut).collect()
}

/// Each job's own outputs.
fn by_job(parts: &[Vec<Tensor>], jobs: usize) -> Vec<Vec<Tensor>> {
    (0..jobs).map(|job| parts.iter().map(|output| output[job].clone()).collect()).collect()
}

fn reply(jobs: Vec<Job>, parts: Vec<Vec<Tensor>>, started: Instant, timings: Timings) {
    for (place, job) in jobs.into_iter().enumerate() {
        let Job { outputs, submitted, permit, reply, .. } = job;
        let outputs = outputs.iter().map(|position| parts[*position][place].clone()).collect();
        let timings = Timings { queue: started.saturating_duration_since(submitted), ..timings };
        // A caller that has left hears nothing.
        let _ = reply.send(Ok(Answer { outputs, timings, permit }));
    }
}

/// What a request that failed alone is told.
pub(super) fn blame(error: &RunError) -> Error {
    match error {
        RunError::InvalidArgument(message) => Error::invalid(message.clone()),
        RunError::Failed(message) => Error::new(Kind::BackendFailed, message.clone()),
    }
}

/// `model/version#index`, the model's name cut so that the rest stays whole where it can.
fn thread_name(version: &str, index: usize) -> String {
    let (model, version) = version.rsplit_once('/').unwrap_or((version, ""));
    let end = format!("/{version}#{index}");
    let mut name = cut(model, MAX_THREAD_NAME_BYTES.saturating_sub(end.len())).to_string();
    name.push_str(&end);
    // A NUL in a thread's name would panic.
    name.retain(|c| !c.is_control());
    cut(&name, MAX_THREAD_NAME_BYTES).to_string()
}

fn cut(text: &str, max_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(max_bytes)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_names_keep_version_and_index() {
        for (version, index, expected) in [
            ("digits/1", 0, "digits/1#0"),
            ("sentiment-analysis/12", 3, "sentiment-/12#3"),
            ("größen-modell/1", 10, "größen-m/1#10"),
            ("ééééééé/1", 0, "ééééé/1#0"),
            ("m/12345678901234567890", 0, "/12345678901234"),
            ("no\0version", 0, "noversion/#0"),
        ] {
            let name = thread_name(version, index);
            assert!(name.len() <= MAX_THREAD_NAME_BYTES, "{name}");
            assert_eq!(name, expected);
        }
    }
}
