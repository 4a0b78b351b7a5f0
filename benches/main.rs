//! Micro-benchmarks, each pairing both sides in one run: `make bench-micro`, or `cargo bench -- engine` for one group.
//!
//! Figures of one run are comparable with each other; figures of two runs on a shared machine are not. What is: counted
//! instructions, `make instructions`.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "benchmarks")]

mod batcher;
mod engine;
mod gather;
mod grpc;
mod instructions;
mod monitor;
mod rest;

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let Some((instructions::NAME, more)) = arguments.split_first().map(|(first, more)| (first.as_str(), more)) {
        return instructions::main(more);
    }
    for group in [gather::group, rest::group, grpc::group, batcher::group, monitor::group, engine::group] {
        group();
    }
    criterion::Criterion::default().configure_from_args().final_summary();
    std::process::ExitCode::SUCCESS
}
