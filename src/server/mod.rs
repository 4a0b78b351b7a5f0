//! The process: start, serve, drain, stop, in that order and observable as a [`Phase`].
//!
//! Owns the listeners, connection tasks and runtimes. Knows nothing of tensors or batching.
//! Threads: the data plane's I/O runtime; one thread with its own runtime for observation, so that `/metrics` and
//! probes answer while the data plane is saturated or draining; one such thread for the admin API.
//!
//! Order at start: observation is up (live, not ready) → the registry loads → data and admin ports are bound → ready.
//! Order at stop: not ready, still serving → no new connections, open ones finish → schedulers close and join → stop.

mod accept;
mod observe;
mod plane;
mod prompt;
mod untaken;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Interval;

pub use accept::ConnectionLimits;
use accept::Wire;

use crate::engine::Engine;
use crate::monitor::Monitor;
use crate::monitor::events::{self, Remaining};
use crate::pool::Pool;
use crate::protocol::{grpc, rest};
use crate::registry::{self, Left, Registry, RegistryError};
use crate::request::{BudgetConfig, Phase};
use crate::scheduler::Gate;

#[derive(Debug)]
pub struct Config {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub metrics: SocketAddr,
    pub admin: SocketAddr,
    pub io_threads: usize,
    /// Cores the process may use, by affinity and cgroup quota.
    pub cores: usize,
    /// Whether requests, batches and predictions are measured.
    pub monitoring: bool,
    /// Ready only if no version found at start has failed.
    pub strict_readiness: bool,
    /// How long to go on serving, not ready, after being told to stop.
    pub lame_duck: Duration,
    /// How long what was accepted may take to finish after that.
    pub drain_timeout: Duration,
    /// How long a client that asks to load or unload a model is kept waiting.
    pub load_timeout: Duration,
    pub connections: ConnectionLimits,
    pub budget: BudgetConfig,
    pub rest: rest::Config,
    pub grpc_messages: grpc::Config,
    pub registry: registry::Config,
}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("cannot listen on {address} for {plane}: {error}")]
    Bind { plane: &'static str, address: SocketAddr, error: std::io::Error },
    #[error("cannot start a thread or runtime: {0}")]
    Start(std::io::Error),
}

/// Where the server came to listen.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub metrics: SocketAddr,
    pub admin: SocketAddr,
}

/// Called once, with where the server listens: as soon as it does, ready or not.
pub type WhenListening = Box<dyn FnOnce(&Addresses) + Send>;

/// Called once, with where the server listens and what it serves.
pub type WhenReady = Box<dyn FnOnce(&Addresses, &Engine) + Send>;

/// Called with every phase, in order and none left out, once it shows to those who look but before it takes effect.
pub type OnPhase = Box<dyn FnMut(Phase) + Send>;

/// What happens at the edges of a run: told of phases, of ports and of readiness, asked when to stop.
pub struct Hooks<Stop> {
    pub listening: WhenListening,
    pub ready: WhenReady,
    /// Completes when the process should stop.
    pub stop: Stop,
    pub phase: OnPhase,
}

/// The phase the server is in, for those who look and for the hook, which misses none.
struct Phases {
    current: watch::Sender<Phase>,
    hook: OnPhase,
}

impl Phases {
    fn start(hook: OnPhase) -> Phases {
        let mut phases = Phases { current: watch::Sender::new(Phase::Starting), hook };
        phases.enter(Phase::Starting, None);
        phases
    }

    /// `remaining`: what there is to finish, where the phase is one of the stop.
    fn enter(&mut self, phase: Phase, remaining: Option<Remaining>) {
        self.current.send_replace(phase);
        if phase != Phase::Stopped {
            events::PhaseEntered { phase, remaining }.emit();
        }
        (self.hook)(phase);
    }

    fn current(&self) -> Phase {
        *self.current.borrow()
    }

    fn subscribe(&self) -> watch::Receiver<Phase> {
        self.current.subscribe()
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections cut and jobs abandoned at the deadline; both 0 after a clean stop.
    pub connections: usize,
    pub jobs: usize,
    /// A thread may still be inside an engine: the process must end without its libraries' destructors.
    pub threads: bool,
}

/// Runs until told to stop and drained. Blocks the calling thread.
pub fn run<Stop>(config: Config, hooks: Hooks<Stop>) -> Result<Drained, ServerError>
where
    Stop: Future<Output = ()> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.io_threads)
        .thread_name("io")
        .enable_all()
        .build()
        .map_err(ServerError::Start)?;
    let drained = runtime.block_on(serve(config, hooks));
    // Connection tasks are aborted by now; nothing a runtime could wait for may hold the exit.
    runtime.shutdown_background();
    drained
}

async fn serve<Stop>(config: Config, hooks: Hooks<Stop>) -> Result<Drained, ServerError>
where
    Stop: Future<Output = ()> + Send + 'static,
{
    let Hooks { listening, ready, stop, phase } = hooks;
    let mut phase = Phases::start(phase);
    let stopping = watch_stop(stop);
    let monitor = Monitor::measuring(config.monitoring);
    let probe = observe::Probe { monitor: Arc::clone(&monitor), phase: phase.subscribe() };
    let observation = observe::spawn(config.metrics, probe)?;

    phase.enter(Phase::Loading, None);
    let gate = Gate::new(config.cores);
    let registry = Registry::start(config.registry.clone(), config.cores, gate, Arc::clone(&monitor))?;
    let mut life = Life { config, registry, monitor, observation, phase, stopping, engine: None };
    let served = life.serve(listening, ready).await;
    // Private copies and threads go whether or not there was anything to serve.
    let left = life.close(served.as_ref().map_or_else(|_| Instant::now(), |cut| cut.deadline)).await;
    served.map(|cut| life.stopped(cut.connections, left))
}

/// A process whose registry has started.
struct Life {
    config: Config,
    registry: Arc<Registry>,
    monitor: Arc<Monitor>,
    observation: observe::Observation,
    phase: Phases,
    stopping: watch::Receiver<bool>,
    /// Once what was found at start has been loaded.
    engine: Option<Arc<Engine>>,
}

/// What became of the connections, and until when what was accepted may take.
struct Cut {
    connections: usize,
    deadline: Instant,
}

/// The data plane, accepting.
struct DataPlane {
    connections: accept::Connections,
    drain: watch::Sender<bool>,
}

impl Life {
    /// Loads, serves until told to stop, drains.
    async fn serve(&mut self, listening: WhenListening, ready: WhenReady) -> Result<Cut, ServerError> {
        let loading = {
            let registry = Arc::clone(&self.registry);
            tokio::task::spawn_blocking(move || registry.wait_loaded())
        };
        tokio::select! {
            _ = loading => {}
            () = told(&mut self.stopping) => return Ok(Cut { connections: 0, deadline: self.deadline() }),
        }
        let engine = self.engine()?;
        self.engine = Some(Arc::clone(&engine));
        let (plane, addresses) = self.bind(&engine).await?;
        listening(&addresses);
        if self.became_ready().await {
            self.phase.enter(Phase::Ready, None);
            ready(&addresses, &engine);
            told(&mut self.stopping).await;
        }
        let lame_duck_ends = Instant::now() + self.config.lame_duck;
        self.phase.enter(Phase::LameDuck, Some(self.remaining(plane.connections.open(), lame_duck_ends)));
        tokio::time::sleep_until(lame_duck_ends.into()).await;
        let deadline = self.deadline();
        self.phase.enter(Phase::Draining, Some(self.remaining(plane.connections.open(), deadline)));
        plane.drain.send_replace(true);
        let connections = plane.connections.finish(deadline, |open| self.still_stopping(open, deadline)).await;
        Ok(Cut { connections, deadline })
    }

    fn remaining(&self, connections: usize, deadline: Instant) -> Remaining {
        let requests = self.engine.as_ref().map_or(0, |engine| engine.in_flight().0);
        Remaining { connections, requests, time: deadline.saturating_duration_since(Instant::now()) }
    }

    fn still_stopping(&self, connections: usize, deadline: Instant) {
        let remaining = self.remaining(connections, deadline);
        events::StillStopping { phase: self.phase.current(), remaining }.emit();
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.config.drain_timeout
    }

    fn engine(&self) -> Result<Arc<Engine>, ServerError> {
        let engine = Arc::new(Engine::new(
            Arc::clone(&self.registry),
            Arc::clone(&self.monitor),
            self.config.budget.clone(),
            self.config.load_timeout,
            self.phase.subscribe(),
            Pool::new(self.config.cores).map_err(ServerError::Start)?,
        ));
        self.observation.attach(Arc::clone(&engine));
        Ok(engine)
    }

    async fn bind(&self, engine: &Arc<Engine>) -> Result<(DataPlane, Addresses), ServerError> {
        let config = &self.config;
        let http = bind("HTTP", config.http).await?;
        let grpc = bind("gRPC", config.grpc).await?;
        let admin_router = rest::admin(Arc::clone(engine), config.rest.clone());
        let admin = plane::spawn("admin", config.admin, admin_router, self.phase.subscribe())?;
        let addresses = Addresses {
            http: local(&http, config.http),
            grpc: local(&grpc, config.grpc),
            metrics: self.observation.address(),
            admin,
        };
        let connections = accept::Connections::new();
        let http_service = rest::service(Arc::clone(engine), config.rest.clone());
        let grpc_service = grpc::service(Arc::clone(engine), config.grpc_messages.clone());
        let (drain, draining) = watch::channel(false);
        connections.accept(http, Wire::Http, http_service, &config.connections, draining.clone());
        connections.accept(grpc, Wire::Grpc, grpc_service, &config.connections, draining);
        Ok((DataPlane { connections, drain }, addresses))
    }

    /// With strict readiness, waits until no version has failed. False: told to stop before that.
    async fn became_ready(&mut self) -> bool {
        if !self.config.strict_readiness || self.registry.all_ready() {
            return true;
        }
        tracing::warn!("not ready: a model version has failed, and `strict_readiness` is on");
        let registry = Arc::clone(&self.registry);
        let all_ready = async move {
            while !registry.all_ready() {
                tokio::time::sleep(STRICT_READINESS_POLL).await;
            }
        };
        tokio::select! {
            () = all_ready => true,
            () = told(&mut self.stopping) => false,
        }
    }

    /// Closes the registry; what is left at the deadline.
    async fn close(&mut self, deadline: Instant) -> Left {
        self.phase.enter(Phase::Stopping, Some(self.remaining(0, deadline)));
        let registry = Arc::clone(&self.registry);
        // Joining blocks.
        let mut closing = tokio::task::spawn_blocking(move || registry.shutdown(deadline));
        let mut look = every_few_seconds();
        loop {
            tokio::select! {
                biased;
                // If the blocking task itself dies, nothing is known to be left.
                left = &mut closing => return left.unwrap_or_default(),
                _ = look.tick() => self.still_stopping(0, deadline),
            }
        }
    }

    fn stopped(&mut self, connections: usize, Left { jobs, threads }: Left) -> Drained {
        events::Stopped { connections_cut: connections, jobs_abandoned: jobs }.emit();
        self.phase.enter(Phase::Stopped, None);
        Drained { connections, jobs, threads }
    }
}

/// How often a server that is not ready looks whether its failed versions have been mended.
const STRICT_READINESS_POLL: Duration = Duration::from_millis(100);

/// How often a server that is stopping says what is left.
const STOPPING_INTERVAL: Duration = Duration::from_secs(2);

/// Ticks for the first time after one interval.
fn every_few_seconds() -> Interval {
    tokio::time::interval_at(tokio::time::Instant::now() + STOPPING_INTERVAL, STOPPING_INTERVAL)
}

/// Runs `stop` on the runtime and makes its completion something that several places can wait for.
fn watch_stop(stop: impl Future<Output = ()> + Send + 'static) -> watch::Receiver<bool> {
    let (stopped, stopping) = watch::channel(false);
    tokio::spawn(async move {
        stop.await;
        stopped.send_replace(true);
        // Held open: a dropped sender would read as a stop.
        std::future::pending::<()>().await;
    });
    stopping
}

/// Waits until the flag is true. A sender is never dropped while somebody waits for it here.
async fn told(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|told| *told).await;
}

async fn bind(plane: &'static str, address: SocketAddr) -> Result<TcpListener, ServerError> {
    TcpListener::bind(address).await.map_err(|error| ServerError::Bind { plane, address, error })
}

fn local(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}
