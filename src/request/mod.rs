//! What travels along the request path: the request as sent, the request as checked, the answer, and the permit that
//! bounds how much of it all is in the server at once.
//!
//! Knows no protocol, no model and no clock: instants and durations are handed in. Nothing here is serialisable.

mod message;
mod permit;
mod phase;
mod prepared;

pub use message::{
    InferRequest, InferResponse, MAX_NAME_BYTES, MAX_TIMEOUT, ModelRef, NamedTensor, Origin, PredictionId, Priority,
    Protocol, Timings, VersionId,
};
pub use permit::{Budget, BudgetConfig, Permit};
pub use phase::Phase;
pub use prepared::{Batching, Prepared, batch_key};
