//! All integration tests, in one binary: one link, one set of fixtures.

mod batching;
mod deadlines;
mod goldens;
mod lifecycle;
mod references;
mod support;
mod tidy;
mod traps;
