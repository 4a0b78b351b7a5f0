use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::error::{Error, Kind};
use crate::monitor::{Monitor, events};
use crate::registry::Version;
use crate::request::{Origin, PredictionId, Timings, VersionId};

/// One inference call, from its head to its answer: which prediction it is, what answers it, and its one record.
///
/// The protocol begins it before it reads anything, and finishes it with what the client gets; the engine notes in it
/// what happens in between. Dropped unfinished, it is recorded as cancelled: the caller left.
pub struct Trace {
    monitor: Arc<Monitor>,
    origin: Origin,
    prediction: PredictionId,
    arrived: Instant,
    version: OnceLock<Arc<Version>>,
    timings: OnceLock<Timings>,
    recorded: AtomicBool,
}

impl Trace {
    pub(super) fn begin(monitor: &Arc<Monitor>, origin: Origin) -> Trace {
        Trace {
            monitor: Arc::clone(monitor),
            origin,
            prediction: PredictionId(uuid::Uuid::now_v7().as_u128()),
            arrived: Instant::now(),
            version: OnceLock::new(),
            timings: OnceLock::new(),
            recorded: AtomicBool::new(false),
        }
    }

    pub fn prediction(&self) -> PredictionId {
        self.prediction
    }

    /// The version that was chosen to answer, and the digest of its artifact.
    pub fn chosen(&self) -> Option<(VersionId, &str)> {
        self.version.get().map(|version| (version.id(), &**version.digest()))
    }

    /// Records how the call ended: with the engine's answer, or with the error that the client gets instead. Only the
    /// first word counts.
    pub fn finish(&self, failure: Option<&Error>) {
        // A call that ends without either has been lost by us.
        let answer = || self.timings.get().ok_or(Kind::Internal);
        self.record(failure.map_or_else(answer, |error| Err(error.kind())));
    }

    pub(super) fn arrived(&self) -> Instant {
        self.arrived
    }

    pub(super) fn chose(&self, version: &Arc<Version>) {
        self.version.get_or_init(|| Arc::clone(version));
    }

    pub(super) fn answered(&self, timings: Timings) {
        self.timings.get_or_init(|| timings);
    }

    fn record(&self, outcome: Result<&Timings, Kind>) {
        if self.recorded.swap(true, Ordering::Relaxed) {
            return;
        }
        events::RequestFinished {
            version: self.version.get().map(|version| version.monitor().as_ref()),
            prediction: self.prediction,
            protocol: self.origin.protocol,
            outcome,
            duration: self.arrived.elapsed(),
        }
        .emit(&self.monitor);
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.record(Err(Kind::Cancelled));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Protocol;

    #[test]
    fn a_call_is_recorded_once_as_what_the_client_got() {
        let monitor = Monitor::new();
        let begin = || Trace::begin(&monitor, Origin { protocol: Protocol::Grpc });
        let refused = |kind: Kind| {
            let series = format!("tidegate_requests_refused_total{{kind=\"{}\",protocol=\"grpc\"}} ", kind.label());
            let text = monitor.render();
            let line = text.lines().find(|line| line.starts_with(&series)).expect("the series");
            line[series.len()..].parse::<f64>().unwrap()
        };
        let first = begin();
        let second = begin();
        assert_ne!(first.prediction(), second.prediction());
        first.finish(Some(&Error::not_found("no such model")));
        first.finish(Some(&Error::invalid("too late to matter")));
        drop(first);
        let counts = || [Kind::NotFound, Kind::InvalidInput, Kind::Cancelled, Kind::Internal].map(refused);
        assert_eq!(counts(), [1.0, 0.0, 0.0, 0.0]);
        drop(second);
        assert_eq!(counts(), [1.0, 0.0, 1.0, 0.0], "the caller left");
        begin().finish(None);
        assert_eq!(counts(), [1.0, 0.0, 1.0, 1.0], "neither answered nor refused");
    }
}
