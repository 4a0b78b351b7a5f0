//! Tidegate serves ONNX and safetensors models from a registry: requests over REST and gRPC, batched dynamically, observed.
//!
//! The request path, in the order of the modules below, from the socket down and back:
//! `server` accepts a connection; `protocol` takes a permit from the `engine`, reads and decodes a request;
//! `Engine::infer` chooses a version from the `registry`, checks the `request` against its signature and submits it to
//! the version's `scheduler`; a worker there joins waiting requests into a batch and runs it on a `backend` instance;
//! the answer travels back the same way, and `monitor` records it. `tests/it/tidy.rs` enforces who may import whom.

pub mod cli;
pub mod config;
pub mod server;

pub mod protocol;

pub mod backend;
pub mod engine;
pub mod registry;
pub mod scheduler;

pub mod monitor;
pub mod request;
pub mod tensor;

pub mod error;
pub mod pool;
pub mod problem;
pub mod units;
