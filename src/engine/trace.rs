use std::sync::Arc;
use std::time::Instant;

use crate::error::{Kind, Result};
use crate::monitor::{Monitor, events};
use crate::registry::Version;
use crate::request::{InferResponse, Origin};

/// Records one request exactly once: with its outcome, or as cancelled where the caller left and the guard is dropped.
pub(super) struct Trace<'a> {
    monitor: &'a Monitor,
    origin: Origin,
    started: Instant,
    version: Option<Arc<Version>>,
    finished: bool,
}

impl<'a> Trace<'a> {
    pub(super) fn start(monitor: &'a Monitor, origin: Origin, started: Instant) -> Self {
        Trace { monitor, origin, started, version: None, finished: false }
    }

    pub(super) fn chose(&mut self, version: &Arc<Version>) {
        self.version = Some(Arc::clone(version));
    }

    pub(super) fn finish(mut self, outcome: &Result<InferResponse>) {
        self.finished = true;
        self.record(outcome.as_ref().map(|response| &response.timings).map_err(|error| error.kind()));
    }

    fn record(&self, outcome: Result<&crate::request::Timings, Kind>) {
        events::RequestFinished {
            version: self.version.as_ref().map(|version| version.monitor().as_ref()),
            protocol: self.origin.protocol,
            outcome,
            duration: self.started.elapsed(),
        }
        .emit(self.monitor);
    }
}

impl Drop for Trace<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.record(Err(Kind::Cancelled));
        }
    }
}
