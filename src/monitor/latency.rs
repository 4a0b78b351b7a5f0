//! The exporter's series of one version: handles, registered when first needed and kept, so that recording on the
//! request path is a few atomic operations, and versions that nobody calls have few series.

use std::sync::{Arc, OnceLock};

use metrics::{Counter, Histogram};

use super::export::Exporter;
use super::names::{self, Metric};
use crate::error::Kind;
use crate::request::Protocol;

/// `ok`, then one for each kind of error.
const OUTCOMES: usize = 1 + Kind::ALL.len();

pub(super) const PROTOCOLS: [Protocol; 2] = [Protocol::Http, Protocol::Grpc];

pub(super) struct Handles {
    pub(super) exporter: Arc<Exporter>,
    /// Label values; `other` once too many versions have been seen.
    model: Arc<str>,
    version: Arc<str>,
    requests: [[OnceLock<Counter>; OUTCOMES]; PROTOCOLS.len()],
    request_duration: [OnceLock<Histogram>; PROTOCOLS.len()],
    queue_duration: OnceLock<Histogram>,
    infer_duration: OnceLock<Histogram>,
    batch_size: OnceLock<Histogram>,
    positions: OnceLock<[Counter; 2]>,
    pub(super) executions: Counter,
    pub(super) execution_failures: Counter,
    pub(super) inferences: Counter,
    pub(super) queue_rejected: Counter,
}

impl Handles {
    pub(super) fn new(exporter: Arc<Exporter>, model: Arc<str>, version: Arc<str>) -> Handles {
        let counter = |metric| exporter.counter(metric, &[&model, &version]);
        let (executions, inferences) = (counter(&names::EXECUTIONS), counter(&names::INFERENCES));
        let queue_rejected = counter(&names::QUEUE_REJECTED);
        let execution_failures = counter(&names::EXECUTION_FAILURES);
        let handles = Handles {
            exporter,
            model,
            version,
            requests: Default::default(),
            request_duration: Default::default(),
            queue_duration: OnceLock::new(),
            infer_duration: OnceLock::new(),
            batch_size: OnceLock::new(),
            positions: OnceLock::new(),
            executions,
            execution_failures,
            inferences,
            queue_rejected,
        };
        for protocol in PROTOCOLS {
            // Registered at 0 so that rates are right from the first request on.
            handles.requests(protocol, None);
        }
        handles
    }

    /// Requests that ended with that error, or well.
    pub(super) fn requests(&self, protocol: Protocol, error: Option<Kind>) -> &Counter {
        let (index, outcome) = error.map_or((0, "ok"), |kind| (1 + kind as usize, kind.label()));
        self.requests[protocol as usize][index].get_or_init(|| {
            self.exporter.counter(&names::REQUESTS, &[&self.model, &self.version, protocol.label(), outcome])
        })
    }

    pub(super) fn request_duration(&self, protocol: Protocol) -> &Histogram {
        self.request_duration[protocol as usize].get_or_init(|| {
            self.exporter.histogram(&names::REQUEST_DURATION, &[&self.model, &self.version, protocol.label()])
        })
    }

    pub(super) fn queue_duration(&self) -> &Histogram {
        self.histogram(&self.queue_duration, &names::QUEUE_DURATION)
    }

    pub(super) fn infer_duration(&self) -> &Histogram {
        self.histogram(&self.infer_duration, &names::INFER_DURATION)
    }

    pub(super) fn batch_size(&self) -> &Histogram {
        self.histogram(&self.batch_size, &names::BATCH_SIZE)
    }

    /// Along the sequences of batches: as sent, and filled up.
    pub(super) fn positions(&self) -> &[Counter; 2] {
        self.positions.get_or_init(|| {
            ["data", "padding"]
                .map(|kind| self.exporter.counter(&names::SEQUENCE_POSITIONS, &[&self.model, &self.version, kind]))
        })
    }

    fn histogram<'a>(&self, cell: &'a OnceLock<Histogram>, metric: &'static Metric) -> &'a Histogram {
        cell.get_or_init(|| self.exporter.histogram(metric, &[&self.model, &self.version]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discriminants_index_their_lists() {
        assert!(Kind::ALL.iter().enumerate().all(|(index, kind)| *kind as usize == index));
        assert!(PROTOCOLS.iter().enumerate().all(|(index, protocol)| *protocol as usize == index));
    }
}
