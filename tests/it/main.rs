//! All integration tests, in one binary: one link, one set of fixtures.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr, reason = "tests")]

mod batching;
mod deadlines;
mod edges;
mod goldens;
mod lifecycle;
mod references;
mod support;
mod tidy;
mod traps;
