//! The exporter's counters of one version: handles, registered when first needed and kept, so that versions that nobody
//! calls have few series.

use std::sync::{Arc, OnceLock};

use metrics::Counter;

use super::export::Exporter;
use super::names;
use crate::error::Kind;
use crate::request::Protocol;

/// `ok`, then one for each kind of error.
const OUTCOMES: usize = 1 + Kind::ALL.len();

pub(super) const PROTOCOLS: [Protocol; 2] = [Protocol::Http, Protocol::Grpc];

pub(super) struct Handles {
    pub(super) exporter: Arc<Exporter>,
    /// Label values; `other` once too many versions have been seen.
    pub(super) model: Arc<str>,
    pub(super) version: Arc<str>,
    requests: [[OnceLock<Counter>; OUTCOMES]; PROTOCOLS.len()],
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

    /// Along the sequences of batches: as sent, and filled up.
    pub(super) fn positions(&self) -> &[Counter; 2] {
        self.positions.get_or_init(|| {
            ["data", "padding"]
                .map(|kind| self.exporter.counter(&names::SEQUENCE_POSITIONS, &[&self.model, &self.version, kind]))
        })
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
