//! The wire: protocols turn bytes into an `InferRequest` and an answer or an error back into bytes.
//!
//! A protocol owns its own parsing, limits and texts; everything past that is one call of the engine, the same for
//! all. Knows nothing of batching, scheduling or inference engines. Each protocol's crates stay in its own folder.

mod classification;
mod common;
pub mod grpc;
pub mod rest;
mod service;
pub mod status;
mod triton;

pub use service::{Answering, Service};

/// What of the protocol's extensions is offered on every port, and no more: clients choose calls by this list.
const EXTENSIONS: &[&str] =
    &["binary_tensor_data", "classification", "model_configuration", "parameters", "schedule_policy", "statistics"];
/// Offered where models may be loaded and unloaded. No model depends on another one.
const REPOSITORY_EXTENSIONS: &[&str] = &["model_repository", "model_repository(unload_dependents)"];
