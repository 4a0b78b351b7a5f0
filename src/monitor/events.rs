//! Every observable fact, as a struct whose `emit` writes its metrics and, where an operator would want to know, one
//! log line.

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::pending::Executed;
use super::{Info, Monitor, VersionMonitor, names};
use crate::error::Kind;
use crate::request::{Phase, PredictionId, Protocol, Timings, VersionId};

/// The end of every inference call.
pub struct RequestFinished<'a> {
    /// `None`: refused before a version was chosen.
    pub version: Option<&'a VersionMonitor>,
    pub prediction: PredictionId,
    pub protocol: Protocol,
    pub outcome: Result<&'a Timings, Kind>,
    /// From the call's head, read just before admission.
    pub duration: Duration,
}

impl RequestFinished<'_> {
    pub fn emit(self, monitor: &Monitor) {
        let RequestFinished { version, prediction, protocol, outcome, duration } = self;
        match (version, outcome) {
            (None, outcome) => {
                // Nobody but a version answers: what was answered without one is counted as the defect that it is.
                let kind = outcome.err().unwrap_or(Kind::Internal);
                // No label of it comes from the client.
                monitor.refused[protocol as usize][kind as usize].increment(1);
            }
            (Some(_), Ok(_)) if !monitor.measures => {}
            (Some(version), Ok(timings)) => {
                version.pending.answered(protocol, duration, timings);
            }
            (Some(version), Err(kind)) => {
                version.handles.requests(protocol, Some(kind)).increment(1);
                version.pending.failed(duration);
                if kind == Kind::Internal {
                    tracing::error!(
                        model = %version.model, version = %version.version, %prediction,
                        protocol = protocol.label(),
                        "request failed by a defect of the server"
                    );
                }
            }
        }
    }
}

/// What the server holds at the moment: told before a scrape.
pub struct InFlight {
    pub requests: usize,
    /// Of requests and answers.
    pub bytes: usize,
    /// Bodies that wait for the CPU pool, and those that it works on.
    pub pool_queued: usize,
    pub pool_running: usize,
}

impl InFlight {
    pub fn emit(self, monitor: &Monitor) {
        monitor.in_flight.set(self.requests as f64);
        monitor.in_flight_bytes.set(self.bytes as f64);
        monitor.pool_queued.set(self.pool_queued as f64);
        monitor.pool_running.set(self.pool_running as f64);
    }
}

/// One execution of a batch (also each rerun of a bisected one).
pub struct BatchExecuted<'a> {
    pub version: &'a VersionMonitor,
    pub requests: usize,
    pub rows: usize,
    /// Positions along the rows' sequences, as sent; 0 where rows of different lengths don't share batches.
    pub data: usize,
    /// Positions that shorter rows were filled up with.
    pub padding: usize,
    /// Before the engine was called.
    pub input: Duration,
    pub gather_and_compute: Duration,
    pub split: Duration,
    pub failed: bool,
}

impl BatchExecuted<'_> {
    pub fn emit(self) {
        let BatchExecuted { version, requests, rows, data, padding, input, gather_and_compute, split, failed } = self;
        if !version.measures {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let (positions, phases) = ([data, padding], [input, gather_and_compute, split]);
        version.pending.executed(&Executed { rows, positions, phases, failed }, now_ms);
        tracing::trace!(
            model = %version.model, version = %version.version, requests, rows, padding, failed,
            gather_and_compute_us = gather_and_compute.as_micros(), split_us = split.as_micros(), "batch executed"
        );
    }
}

/// Requests and bytes waiting in a version's queue and requests taken from it and not yet answered, after a change.
/// Emitted in the order of the changes.
pub struct QueueChanged<'a> {
    pub version: &'a VersionMonitor,
    pub requests: usize,
    pub bytes: usize,
    pub running: usize,
}

impl QueueChanged<'_> {
    pub fn emit(self) {
        self.version.queue_requests.store(self.requests, Ordering::Relaxed);
        self.version.queue_bytes.store(self.bytes, Ordering::Relaxed);
        self.version.running.store(self.running, Ordering::Relaxed);
    }
}

/// What a version has learned from its latest run.
pub struct RunLearned<'a> {
    pub version: &'a VersionMonitor,
    /// Rows that batches are filled up to from now on.
    pub batch_limit: usize,
    /// Of a run of so many rows. `None`: too little is known.
    pub expected: Option<Duration>,
    /// Of the run.
    pub threads: usize,
}

impl RunLearned<'_> {
    pub fn emit(self) {
        let RunLearned { version, batch_limit, expected, threads } = self;
        let before = version.batch_limit.swap(batch_limit, Ordering::Relaxed);
        let nanos = expected.map_or(0, |expected| u64::try_from(expected.as_nanos()).unwrap_or(u64::MAX));
        version.expected_run_nanos.store(nanos, Ordering::Relaxed);
        version.run_threads.store(threads, Ordering::Relaxed);
        if before != batch_limit {
            tracing::debug!(
                model = %version.model, version = %version.version, rows = batch_limit,
                expected_us = nanos / 1000, "batch limit"
            );
        }
    }
}

/// A request was refused because its version's queue is full.
pub struct QueueRejected<'a> {
    pub version: &'a VersionMonitor,
}

impl QueueRejected<'_> {
    pub fn emit(self) {
        self.version.handles.queue_rejected.increment(1);
    }
}

/// A version is warm and takes requests from now on.
pub struct VersionLoaded<'a> {
    pub version: &'a VersionMonitor,
    /// From the start of the load, warm-up included.
    pub duration: Duration,
    /// `sha256:<hex>` of the artifact.
    pub digest: &'a str,
    pub backend: &'a str,
    pub backend_version: &'a str,
    pub device: &'a str,
    pub instances: usize,
    pub batching: bool,
    pub batching_reason: &'a str,
    /// What its runs take, for people.
    pub costs: &'a str,
    /// Whether a request that is alone runs on all cores, and why, for people.
    pub wide: &'a str,
}

impl VersionLoaded<'_> {
    pub fn emit(self, monitor: &Monitor) {
        let VersionLoaded {
            version,
            duration,
            digest,
            backend,
            backend_version,
            device,
            instances,
            batching,
            batching_reason,
            costs,
            wide,
        } = self;
        *version.info() = Some(Info {
            digest: digest.into(),
            backend: backend.into(),
            backend_version: backend_version.into(),
            device: device.into(),
            batching,
            load: duration,
        });
        version.ready.store(true, Ordering::Relaxed);
        monitor.loads_ok.increment(1);
        tracing::info!(
            model = %version.model, version = %version.version, digest, backend, backend_version, device, instances,
            batching, batching_reason, costs, wide, seconds = duration.as_secs_f64(), "version ready"
        );
    }
}

/// A version could not be loaded; others go on.
pub struct VersionFailed<'a> {
    pub model: &'a str,
    pub version: VersionId,
    pub reason: &'a str,
    pub duration: Duration,
}

impl VersionFailed<'_> {
    pub fn emit(self, monitor: &Monitor) {
        monitor.loads_failed.increment(1);
        tracing::warn!(
            model = self.model, version = %self.version, reason = self.reason, seconds = self.duration.as_secs_f64(),
            "version failed to load"
        );
    }
}

/// A version takes no more requests; what it has is still answered.
pub struct VersionRetired<'a> {
    pub version: &'a VersionMonitor,
    pub reason: &'a str,
}

impl VersionRetired<'_> {
    pub fn emit(self) {
        self.version.ready.store(false, Ordering::Relaxed);
        tracing::info!(
            model = %self.version.model, version = %self.version.version, reason = self.reason, "version retired"
        );
    }
}

/// A version was found at run time not to be batchable: its requests run alone from now on.
pub struct VersionDemoted<'a> {
    pub version: &'a VersionMonitor,
    pub reason: &'a str,
}

impl VersionDemoted<'_> {
    pub fn emit(self) {
        if let Some(info) = self.version.info().as_mut() {
            info.batching = false;
        }
        tracing::warn!(
            model = %self.version.model, version = %self.version.version, reason = self.reason,
            "batching switched off for this version"
        );
    }
}

/// An inference engine that the process has.
pub struct EnginePresent<'a> {
    /// `onnxruntime`, `tract`.
    pub backend: &'a str,
    pub version: &'a str,
}

impl EnginePresent<'_> {
    pub fn emit(self, monitor: &Monitor) {
        monitor.exporter.gauge(&names::ENGINE_INFO, &[self.backend, self.version]).set(1.0);
    }
}

/// The engine that models get which name none.
pub struct EngineChosen<'a> {
    /// `onnxruntime`, `tract`.
    pub backend: &'a str,
    pub version: &'a str,
    pub reason: &'a str,
    /// It stands in for one that is there and cannot be used.
    pub degraded: bool,
}

impl EngineChosen<'_> {
    pub fn emit(self) {
        let EngineChosen { backend, version, reason, degraded } = self;
        if degraded {
            tracing::warn!(backend, version, reason, "engine chosen in place of one that cannot be used");
        } else {
            tracing::info!(backend, version, reason, "engine chosen");
        }
    }
}

/// The process enters a phase of its life; [`Stopped`] tells of the last one.
pub struct PhaseEntered {
    pub phase: Phase,
    /// There once the server has been told to stop.
    pub remaining: Option<Remaining>,
}

/// What a server that is stopping has yet to finish.
#[derive(Clone, Copy)]
pub struct Remaining {
    pub connections: usize,
    /// Admitted and not yet answered.
    pub requests: usize,
    /// What the phase may still take.
    pub time: Duration,
}

impl PhaseEntered {
    pub fn emit(self) {
        let phase = self.phase.label();
        match self.remaining {
            None => tracing::info!(phase, "phase"),
            Some(Remaining { connections, requests, time }) => {
                tracing::info!(phase, connections, requests, seconds_left = time.as_secs_f64(), "phase");
            }
        }
    }
}

/// A phase of the stop is not over yet: told every few seconds.
pub struct StillStopping {
    pub phase: Phase,
    pub remaining: Remaining,
}

impl StillStopping {
    pub fn emit(self) {
        let Remaining { connections, requests, time } = self.remaining;
        let phase = self.phase.label();
        tracing::info!(phase, connections, requests, seconds_left = time.as_secs_f64(), "still stopping");
    }
}

/// The server has stopped; what it could not finish in time.
pub struct Stopped {
    pub connections_cut: usize,
    pub jobs_abandoned: usize,
}

impl Stopped {
    pub fn emit(self) {
        let Stopped { connections_cut, jobs_abandoned } = self;
        if connections_cut == 0 && jobs_abandoned == 0 {
            tracing::info!("stopped; everything accepted was answered");
        } else {
            tracing::warn!(connections_cut, jobs_abandoned, "stopped before everything was answered");
        }
    }
}
