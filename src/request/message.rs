use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::Permit;
use crate::tensor::Tensor;

/// Longest request id, model name or tensor name accepted, in bytes.
pub const MAX_NAME_BYTES: usize = 256;

/// A model's version: a positive decimal number, the name of its folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VersionId(u64);

impl VersionId {
    /// `None` for anything but digits without a leading zero (Triton ignores such folders too).
    pub fn parse(text: &str) -> Option<VersionId> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        (digits && !text.starts_with('0')).then(|| text.parse().ok().map(VersionId)).flatten()
    }

    pub fn new(version: u64) -> Option<VersionId> {
        (version > 0).then_some(VersionId(version))
    }

    pub fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for VersionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which model a request asks for; without a version, the highest ready one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelRef {
    pub name: String,
    pub version: Option<VersionId>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    pub name: Arc<str>,
    pub tensor: Tensor,
}

/// Order in a queue: the smaller number first, arrival order among equals. Never a reason to refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Priority(u8);

impl Priority {
    /// The least urgent level; 1 is the most urgent.
    pub const LEVELS: u8 = u8::MAX;

    /// As OIP's `priority` parameter carries it: 1 is the most urgent, 0 the default, large numbers the least urgent.
    pub fn from_wire(priority: u64) -> Priority {
        match u8::try_from(priority) {
            Ok(0) => Priority::default(),
            Ok(level) => Priority(level),
            Err(_) => Priority(Priority::LEVELS),
        }
    }

    /// As [`Priority::from_wire`] reads it.
    pub fn level(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    fn default() -> Self {
        Priority(128)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Http,
    Grpc,
}

impl Protocol {
    /// The value of the metric label `protocol`.
    pub fn label(self) -> &'static str {
        match self {
            Protocol::Http => "http",
            Protocol::Grpc => "grpc",
        }
    }
}

/// Where a request came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    pub protocol: Protocol,
}

/// The longest that a caller may wait, or a model's settings let it: one who asks for more gets this.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// A request as sent: names unresolved, shapes unchecked against any model.
#[derive(Clone, Debug)]
pub struct InferRequest {
    /// The caller's id, echoed; empty if none was sent.
    pub id: String,
    pub model: ModelRef,
    pub inputs: Vec<NamedTensor>,
    /// Requested outputs by name; empty for all.
    pub outputs: Vec<String>,
    /// How long the caller waits, counted from the permit's arrival; [`MAX_TIMEOUT`] at most.
    pub timeout: Option<Duration>,
    pub priority: Priority,
    /// What a canary splits by; unused until rollouts exist, carried so that protocols need no change then.
    pub route_key: Option<String>,
}

/// Identifies one prediction for feedback and audit: the caller's id is echoed apart from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PredictionId(pub u128);

impl PredictionId {
    pub const TEXT_BYTES: usize = 36;

    /// As a hyphenated UUID.
    pub fn encode(self, text: &mut [u8; PredictionId::TEXT_BYTES]) -> &str {
        const HYPHENS: [usize; 4] = [8, 13, 18, 23];
        let mut rest = self.0;
        for (place, byte) in text.iter_mut().enumerate().rev() {
            *byte = if HYPHENS.contains(&place) {
                b'-'
            } else {
                let digit = b"0123456789abcdef"[(rest & 0xf) as usize];
                rest >>= 4;
                digit
            };
        }
        std::str::from_utf8(text).unwrap_or_default()
    }
}

impl fmt::Display for PredictionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.encode(&mut [0; PredictionId::TEXT_BYTES]))
    }
}

/// Where a request's time went. `input` (seeing who still waits, before the engine is called), `compute` (the engine,
/// which gathers the batch's inputs itself) and `split` are those of the batch it ran in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    pub prepare: Duration,
    pub queue: Duration,
    pub input: Duration,
    pub compute: Duration,
    pub split: Duration,
    /// Rows of the batch it ran in.
    pub batch_rows: usize,
}

#[derive(Debug)]
pub struct InferResponse {
    pub id: String,
    pub prediction: PredictionId,
    pub model: Arc<str>,
    pub version: VersionId,
    /// `sha256:<hex>` of the artifact that answered.
    pub digest: Arc<str>,
    pub outputs: Vec<NamedTensor>,
    /// Names of the classes of each output, by index, where it has them.
    pub labels: Vec<Option<Arc<[String]>>>,
    /// The leading dimension of every output counts rows.
    pub batched: bool,
    pub timings: Timings,
    /// The request's place in the server, held until the answer is written.
    pub permit: Permit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_positive_decimal_numbers() {
        assert_eq!(VersionId::parse("12").map(|v| v.to_string()), Some("12".into()));
        for bad in ["", "0", "01", "-1", "+1", "1a", "v1", "1.0", "99999999999999999999", "١"] {
            assert_eq!(VersionId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn priorities_order_urgent_first() {
        assert!(Priority::from_wire(1) < Priority::from_wire(0));
        assert_eq!(Priority::from_wire(0), Priority::default());
        assert!(Priority::from_wire(0) < Priority::from_wire(u64::MAX));
    }

    #[test]
    fn prediction_ids_print_as_uuids() {
        assert_eq!(PredictionId(0x0123_4567).to_string(), "00000000-0000-0000-0000-000001234567");
    }
}
