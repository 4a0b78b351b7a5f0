//! All integration tests, in one binary: one link, one set of fixtures.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr, reason = "tests")]

mod admission;
mod agreement;
mod batching;
mod bench;
mod cli;
mod control;
mod deadlines;
mod devices;
mod edges;
mod faults;
mod goldens;
mod grpc;
mod infer_cli;
mod lifecycle;
mod references;
mod rest;
mod safetensors;
mod soak;
mod statistics;
mod stream;
mod support;
mod tidy;
mod traps;
mod triton_repository;
