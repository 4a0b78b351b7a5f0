//! One round: a load on a server for a while, and what came of it.
//!
//! In a closed loop every client sends its next request when it has the answer to the last; in an open one requests are
//! due at times that were decided before, and their latency counts from then, also while they wait for a connection:
//! a server that stalls is charged for all the requests that it kept waiting.
//!
//! Latencies are of the requests that were due within the measured window, whenever they ended; throughput is of the
//! answers that came within it. Before the window lies a lead in which nothing counts.
//!
//! Threads: each has a runtime of its own, a part of the clients or arrivals, and a tally that only it writes to.
//! The caller's thread keeps time.

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;

use super::arrivals::Pattern;
use super::connection::{Connection, Patience, several};
use super::stats::histogram;
use super::steady::{LEAST_ANSWERS, Window, is_steady};
use super::timer::Timer;
use super::wire::{Encoded, Fault, Reply, Wire};
use crate::monitor::cpu_seconds;
use crate::tensor::{DataType, Shape};

/// How long a client rests whom the server does not let connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);
/// How long after an open loop's window requests that are due are still sent; what is left then was never sent.
const OVERTIME: Duration = Duration::from_secs(2);
/// What a window of the warm-up takes.
const WARM_UP_WINDOW: Duration = Duration::from_millis(200);
/// How often progress is told.
const TICK: Duration = Duration::from_millis(200);
/// After so many arrivals that are late already, others get a turn.
const LATE_AT_ONCE: usize = 32;

/// A server, and what it is sent.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) wire: Wire,
    pub(super) address: SocketAddr,
    pub(super) host: String,
    pub(super) items: Arc<[Encoded]>,
    /// Positions of items, in the order in which they are sent; every client begins elsewhere.
    pub(super) order: Arc<[u32]>,
    /// What the answer to each item holds; empty where that is not known.
    pub(super) expected: Arc<[Outputs]>,
    /// The server's process, where it is known.
    pub(super) pid: Option<u32>,
}

pub(super) type Outputs = Vec<(String, DataType, Shape)>;

#[derive(Clone, Debug)]
pub(super) enum Load {
    Closed { clients: usize },
    Open { rate: f64, pattern: Pattern },
}

/// How loads are made, whatever they are.
#[derive(Clone, Debug)]
pub(super) struct Method {
    pub(super) threads: usize,
    pub(super) timeout: Duration,
    pub(super) seed: u64,
    /// Of gRPC, in a closed and in an open loop.
    pub(super) connections: usize,
    /// Requests that an open loop has in flight at most.
    pub(super) outstanding: usize,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Span {
    Measured {
        lead: Duration,
        length: Duration,
    },
    /// Until the server is steady.
    WarmUp {
        longest: Duration,
    },
}

/// What came of a round.
pub(super) struct Round {
    pub(super) seconds: f64,
    /// Answers within the window.
    pub(super) answers: u64,
    pub(super) latencies: Histogram<u64>,
    /// How long after they were due requests were sent.
    pub(super) lateness: Histogram<u64>,
    /// By kind, with the first one's words.
    pub(super) faults: BTreeMap<String, (u64, String)>,
    /// Due within the window and never sent.
    pub(super) unsent: u64,
    pub(super) client_cpu: Option<f64>,
    pub(super) server_cpu: Option<f64>,
    /// Of a warm-up: whether it ended because the server was steady.
    pub(super) steady: bool,
}

/// What is known while a round goes on.
pub(super) struct Progress {
    pub(super) elapsed: Duration,
    pub(super) answers: u64,
    pub(super) faults: u64,
}

/// A thread's counts for whoever watches. On a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Live {
    answers: AtomicU64,
    nanos: AtomicU64,
    faults: AtomicU64,
}

struct Tally {
    answers: u64,
    latencies: Histogram<u64>,
    lateness: Histogram<u64>,
    faults: BTreeMap<String, (u64, String)>,
    unsent: u64,
}

/// What the clients of one thread share.
struct Thread {
    target: Target,
    method: Method,
    lead: Duration,
    length: Duration,
    begin: OnceLock<Instant>,
    stop: Arc<AtomicBool>,
    live: Arc<[Live]>,
    number: usize,
    tally: Mutex<Tally>,
}

/// Makes the load and waits until it is over. `round` picks the item that is looked at closely, and the arrivals.
pub(super) fn run(
    target: &Target,
    load: &Load,
    method: &Method,
    span: Span,
    round: usize,
    mut told: impl FnMut(&Progress),
) -> Result<Round> {
    let callers = match load {
        Load::Closed { clients } => *clients,
        Load::Open { .. } => method.outstanding,
    };
    let threads = method.threads.clamp(1, callers.max(1));
    let (lead, length) = match span {
        Span::Measured { lead, length } => (lead, length),
        Span::WarmUp { longest } => (Duration::ZERO, longest),
    };
    let stop = Arc::new(AtomicBool::new(false));
    let live: Arc<[Live]> = (0..threads).map(|_| Live::default()).collect();
    let barrier = Barrier::new(threads + 1);
    let (ended, ends) = mpsc::channel();
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for number in 0..threads {
            let thread = Arc::new(Thread {
                target: target.clone(),
                method: method.clone(),
                lead,
                length,
                begin: OnceLock::new(),
                stop: Arc::clone(&stop),
                live: Arc::clone(&live),
                number,
                tally: Mutex::new(Tally::new()),
            });
            let share = callers / threads + usize::from(number < callers % threads);
            let (barrier, load, ended) = (&barrier, load.clone(), ended.clone());
            running.push(scope.spawn(move || {
                let outcome = work(&thread, load, share, threads, round, barrier);
                drop(ended);
                outcome.map(|()| thread)
            }));
        }
        drop::<mpsc::Sender<()>>(ended);
        barrier.wait();
        let watch = Watch { span, lead, length, stop: &stop, live: &live, pid: target.pid };
        let watched = watch.watch(&ends, &mut told);
        let mut all = Tally::new();
        for thread in running {
            // A panic of a client is ours, not the server's.
            let thread = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            all.add(&thread.tally());
        }
        Ok(Round {
            seconds: watched.seconds.unwrap_or(length.as_secs_f64()),
            answers: all.answers,
            latencies: all.latencies,
            lateness: all.lateness,
            faults: all.faults,
            unsent: all.unsent,
            client_cpu: watched.client_cpu,
            server_cpu: watched.server_cpu,
            steady: watched.steady,
        })
    })
}

/// The caller's part: time, CPU and progress.
struct Watch<'a> {
    span: Span,
    lead: Duration,
    length: Duration,
    stop: &'a AtomicBool,
    live: &'a [Live],
    pid: Option<u32>,
}

#[derive(Default)]
struct Watched {
    client_cpu: Option<f64>,
    server_cpu: Option<f64>,
    steady: bool,
    /// Of a warm-up that ended early.
    seconds: Option<f64>,
}

impl Watch<'_> {
    fn watch(&self, ends: &mpsc::Receiver<()>, told: &mut impl FnMut(&Progress)) -> Watched {
        let begin = Instant::now();
        let mut watched = Watched::default();
        let cpu = || (cpu_seconds(None), self.pid.and_then(|pid| cpu_seconds(Some(pid))));
        let spent = |before: Option<f64>, after: Option<f64>| Some(after? - before?);
        let (mut before, mut after) = (None, None);
        let mut windows: Vec<Window> = Vec::new();
        let mut last = (begin, self.counted());
        let mut tick = begin + TICK;
        loop {
            let now = Instant::now();
            if before.is_none() && now >= begin + self.lead {
                before = Some(cpu());
            }
            if after.is_none() && now >= begin + self.lead + self.length {
                after = Some(cpu());
            }
            if matches!(self.span, Span::WarmUp { .. }) && now >= last.0 + WARM_UP_WINDOW && !watched.steady {
                let counted = self.counted();
                let (answers, nanos) = (counted.0 - last.1.0, counted.1 - last.1.1);
                if answers >= LEAST_ANSWERS {
                    let seconds = (now - last.0).as_secs_f64();
                    windows.push(Window { answers, seconds, latency_seconds: nanos as f64 / 1e9 });
                    last = (now, counted);
                }
                if is_steady(&windows) {
                    watched.steady = true;
                    watched.seconds = Some((now - begin).as_secs_f64());
                    self.stop.store(true, Ordering::Relaxed);
                }
            }
            if now >= tick {
                let (answers, _, faults) = self.counted();
                told(&Progress { elapsed: now - begin, answers, faults });
                tick = now + TICK;
            }
            let marks = [begin + self.lead, begin + self.lead + self.length, tick];
            let next = marks.into_iter().filter(|mark| *mark > now).min().unwrap_or(tick);
            if let Err(RecvTimeoutError::Disconnected) = ends.recv_timeout(next - now) {
                break;
            }
        }
        // The last client may end a little before the window does by this thread's clock.
        let after = after.unwrap_or_else(cpu);
        if let Some(before) = before {
            watched.client_cpu = spent(before.0, after.0);
            watched.server_cpu = spent(before.1, after.1);
        }
        watched
    }

    /// Answers, the nanoseconds they took together, failures.
    fn counted(&self) -> (u64, u64, u64) {
        let sum = |of: fn(&Live) -> &AtomicU64| self.live.iter().map(|live| of(live).load(Ordering::Relaxed)).sum();
        (sum(|live| &live.answers), sum(|live| &live.nanos), sum(|live| &live.faults))
    }
}

/// One thread's part, in its own runtime.
fn work(
    thread: &Arc<Thread>,
    load: Load,
    callers: usize,
    threads: usize,
    round: usize,
    barrier: &Barrier,
) -> Result<()> {
    // Whatever fails here must still come to the barrier, where the others wait.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let connections = thread.method.connections.div_ceil(threads);
    let made = several(thread.target.wire, thread.target.address, &thread.target.host, callers, connections);
    let (Ok(runtime), Ok(mut made)) = (runtime, made) else {
        barrier.wait();
        anyhow::bail!("cannot start a client");
    };
    runtime.block_on(async {
        for connection in &mut made {
            // Those that cannot connect now try again with their first request, and fail there: where one waits in
            // vain, the others need not.
            if Patience::new(thread.method.timeout).hold(Instant::now(), connection.connect()).await.is_err() {
                break;
            }
        }
        if let Some(first) = made.first_mut().filter(|_| thread.number == 0) {
            thread.examine(first, round).await;
        }
        barrier.wait();
        let begin = *thread.begin.get_or_init(Instant::now);
        match load {
            Load::Closed { .. } => {
                let clients: Vec<_> = made
                    .into_iter()
                    .enumerate()
                    .map(|(number, connection)| {
                        let first = (number * threads + thread.number) * FIRST_STEP + round;
                        tokio::spawn(closed(Arc::clone(thread), connection, first))
                    })
                    .collect();
                finished(clients).await;
                Ok(())
            }
            Load::Open { rate, pattern } => {
                let queue = Arc::new(Queue::new(made.len()));
                let workers = made.into_iter().enumerate().map(|(number, connection)| {
                    tokio::spawn(open(Arc::clone(thread), connection, Arc::clone(&queue), number))
                });
                let workers: Vec<_> = workers.collect();
                let seed = thread.method.seed.wrapping_add(round as u64);
                let arrivals = pattern.share(rate, thread.number, threads, seed).map(|due| begin + due);
                let outcome = send(thread, &queue, arrivals).await;
                queue.close();
                finished(workers).await;
                outcome.context("cannot keep time")
            }
        }
    })
}

/// Clients begin apart in the order of items.
const FIRST_STEP: usize = 7;

/// Panics of a client are ours.
async fn finished(clients: Vec<tokio::task::JoinHandle<()>>) {
    for client in clients {
        if let Err(error) = client.await
            && let Ok(panic) = error.try_into_panic()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

async fn closed(thread: Arc<Thread>, mut connection: Connection, mut position: usize) {
    let mut patience = Patience::new(thread.method.timeout);
    let mut begun = Instant::now();
    while !thread.over(begun) {
        let outcome = patience.hold(begun, connection.call(thread.item(position), None)).await;
        let now = Instant::now();
        let refused = matches!(outcome, Err(Fault::Connect(_)));
        thread.count(begun, begun, now, outcome);
        position += 1;
        begun = now;
        if refused {
            tokio::time::sleep(CONNECT_PAUSE).await;
            begun = Instant::now();
        }
    }
}

/// Hands out what is due, when it is.
async fn send(thread: &Thread, queue: &Queue, arrivals: impl Iterator<Item = Instant>) -> std::io::Result<()> {
    let mut timer = Timer::new()?;
    let mut late = 0;
    for due in arrivals {
        let now = Instant::now();
        if thread.over(due) || thread.over(now) && thread.stopped() {
            break;
        }
        if due > now {
            timer.until(due).await?;
            late = 0;
        } else {
            late += 1;
            if late % LATE_AT_ONCE == 0 {
                tokio::task::yield_now().await;
            }
        }
        queue.push(due);
    }
    Ok(())
}

async fn open(thread: Arc<Thread>, mut connection: Connection, queue: Arc<Queue>, number: usize) {
    let mut patience = Patience::new(thread.method.timeout);
    let mut position = (number * FIRST_STEP).wrapping_add(thread.number);
    while let Some(due) = queue.next(number).await {
        let begun = Instant::now();
        if thread.too_late(begun) {
            thread.count_unsent(due, begun);
            continue;
        }
        let outcome = patience.hold(begun, connection.call(thread.item(position), None)).await;
        let refused = matches!(outcome, Err(Fault::Connect(_)));
        thread.count(due, begun, Instant::now(), outcome);
        position += 1;
        if refused {
            tokio::time::sleep(CONNECT_PAUSE).await;
        }
    }
}

/// Requests that are due, and the workers that wait for one: the last that came to rest is the first to be woken, so
/// that no more connections are in use than are needed.
struct Queue {
    state: Mutex<Waiting>,
}

struct Waiting {
    due: VecDeque<Instant>,
    /// Numbers of the workers that wait, each with its waker.
    resting: Vec<usize>,
    wakers: Vec<Option<Waker>>,
    closed: bool,
}

impl Queue {
    fn new(workers: usize) -> Queue {
        let wakers = (0..workers).map(|_| None).collect();
        Queue { state: Mutex::new(Waiting { due: VecDeque::new(), resting: Vec::new(), wakers, closed: false }) }
    }

    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, due: Instant) {
        let mut state = self.state();
        state.due.push_back(due);
        if let Some(waker) = state.resting.pop().and_then(|worker| state.wakers[worker].take()) {
            waker.wake();
        }
    }

    fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.wakers.iter_mut().filter_map(Option::take).for_each(Waker::wake);
    }

    /// `None` when there will be no more.
    async fn next(&self, worker: usize) -> Option<Instant> {
        poll_fn(|context| {
            let mut state = self.state();
            let found = state.due.pop_front();
            if found.is_some() || state.closed {
                // Polled without having been woken here: it rests no more.
                if state.wakers[worker].take().is_some() {
                    state.resting.retain(|resting| *resting != worker);
                }
                return Poll::Ready(found);
            }
            if state.wakers[worker].replace(context.waker().clone()).is_none() {
                state.resting.push(worker);
            }
            Poll::Pending
        })
        .await
    }
}

impl Thread {
    fn begin(&self) -> Instant {
        *self.begin.get_or_init(Instant::now)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn over(&self, now: Instant) -> bool {
        now >= self.begin() + self.lead + self.length || self.stopped()
    }

    fn too_late(&self, now: Instant) -> bool {
        self.stopped() || now >= self.begin() + self.lead + self.length + OVERTIME
    }

    fn measured(&self, instant: Instant) -> bool {
        let from = self.begin() + self.lead;
        (from..from + self.length).contains(&instant)
    }

    /// From before the window until after it.
    fn outlasted(&self, due: Instant, ended: Instant) -> bool {
        let from = self.begin() + self.lead;
        due < from && ended >= from + self.length
    }

    fn item(&self, position: usize) -> &Encoded {
        let order = &self.target.order;
        &self.target.items[order[position % order.len()] as usize]
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads one answer as a client would: shapes, datatypes and lengths.
    async fn examine(&self, connection: &mut Connection, round: usize) {
        let item = self.target.order[round % self.target.order.len()] as usize;
        let Some(expected) = self.target.expected.get(item) else { return };
        let mut reply = Reply::default();
        let call = connection.call(&self.target.items[item], Some(&mut reply));
        let outcome = match Patience::new(self.method.timeout).hold(Instant::now(), call).await {
            Ok(()) => reply.decoded(self.target.wire).map_err(Fault::Malformed).and_then(|answer| {
                let found = outputs(&answer);
                let differs = || Fault::Malformed(format!("outputs {found:?}, expected {expected:?} as before"));
                if found == *expected { Ok(()) } else { Err(differs()) }
            }),
            Err(fault) => Err(fault),
        };
        if let Err(fault) = outcome {
            self.tally().fault(&fault);
        }
    }

    /// An answer, or its absence, to a request that was `due` and sent when it `begun`.
    fn count(&self, due: Instant, begun: Instant, ended: Instant, outcome: Result<(), Fault>) {
        let live = &self.live[self.number];
        // Only this thread writes to it.
        let add = |to: &AtomicU64, more: u64| to.store(to.load(Ordering::Relaxed) + more, Ordering::Relaxed);
        let took = nanos(ended, due);
        match outcome {
            Ok(()) => {
                add(&live.answers, 1);
                add(&live.nanos, took);
                let (counts, timed) = (self.measured(ended), self.measured(due));
                if counts || timed {
                    let mut tally = self.tally();
                    tally.answers += u64::from(counts);
                    if timed {
                        tally.latencies.saturating_record(took);
                        tally.lateness.saturating_record(nanos(begun, due));
                    }
                }
            }
            Err(fault) => {
                add(&live.faults, 1);
                if self.measured(due) || self.outlasted(due, ended) {
                    self.tally().fault(&fault);
                }
            }
        }
    }

    /// One that waited in vain: its latency is at least what it waited.
    fn count_unsent(&self, due: Instant, now: Instant) {
        if self.measured(due) && !self.stopped() {
            let mut tally = self.tally();
            tally.unsent += 1;
            tally.latencies.saturating_record(nanos(now, due));
        }
    }
}

fn nanos(later: Instant, earlier: Instant) -> u64 {
    u64::try_from(later.saturating_duration_since(earlier).as_nanos()).unwrap_or(u64::MAX)
}

pub(super) fn outputs(answer: &crate::cli::client::Answer) -> Outputs {
    answer.outputs.iter().map(|(name, tensor)| (name.clone(), tensor.dtype(), tensor.shape().clone())).collect()
}

impl Tally {
    fn new() -> Tally {
        Tally { answers: 0, latencies: histogram(), lateness: histogram(), faults: BTreeMap::new(), unsent: 0 }
    }

    fn fault(&mut self, fault: &Fault) {
        let (count, _) = self.faults.entry(fault.kind()).or_insert_with(|| (0, fault.detail().to_string()));
        *count += 1;
    }

    fn add(&mut self, other: &Tally) {
        self.answers += other.answers;
        self.unsent += other.unsent;
        // All histograms have the same bounds.
        let _ = self.latencies.add(&other.latencies);
        let _ = self.lateness.add(&other.lateness);
        for (kind, (count, detail)) in &other.faults {
            self.faults.entry(kind.clone()).or_insert_with(|| (0, detail.clone())).0 += count;
        }
    }
}
