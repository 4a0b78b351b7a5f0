//! Micro-benchmarks, each pairing both sides in one run: `make bench`, or `cargo bench -- engine` for one group.
//!
//! Figures of one run are comparable with each other; figures of two runs on a shared machine are not.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "benchmarks")]

mod batcher;
mod engine;
mod gather;
mod json;

criterion::criterion_main!(gather::group, json::group, batcher::group, engine::group);
