//! `tidegate bench`: a load generator, which costs little enough to share a machine with what it measures.
//!
//! `arguments` is what is asked for · `data` makes the requests, `wire` their bytes, before anything is timed · `http1`
//! and `http2` send them, `connection` is either · `load` makes one round of a closed or open loop, by `arrivals` and a
//! `timer` · `steady` ends the warm-up · `echo` is the bare server beside which others are measured · `measure` goes
//! through servers, loads and rounds, or by `ramp` through rates · `in_process` needs no server · `stats`, `report`,
//! `table` and `html` with its `chart`s are what comes of it.
//!
//! Knows of the server only what the protocols say. Its clients do not use an HTTP library's client: what they cost
//! comes off what a server on the same cores can show.

mod arguments;
mod arrivals;
mod chart;
mod connection;
mod data;
mod echo;
mod html;
mod http1;
mod http2;
mod in_process;
mod load;
mod measure;
mod ramp;
mod report;
mod stats;
mod steady;
mod table;
mod timer;
mod wire;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::client::Failure;
use super::surroundings;
pub(super) use arguments::{AFTER_HELP, Arguments};
use measure::Measurement;
use report::{Environment, Report, Settings};

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    arguments.check()?;
    if arguments.answers_from_stdin {
        return echo::serve_from_stdin().map(|()| ExitCode::SUCCESS);
    }
    if arguments.serve {
        return echo::serve_blank(arguments.response_bytes).map(|()| ExitCode::SUCCESS);
    }
    let outcome = match &arguments.in_process {
        Some(root) => alone(&arguments, root).map_err(Failure::from),
        None => Measurement::prepare(&arguments).and_then(|measurement| Ok(measurement.run(&mut Told::new())?)),
    };
    match outcome {
        Ok(report) => finish(&arguments, &report),
        Err(failure) => failure.told(),
    }
}

fn alone(arguments: &Arguments, root: &Path) -> Result<Report> {
    let begun = surroundings::now();
    let (config, cores) = arguments.engine.clone().registry(root.to_path_buf())?;
    let ceilings = arguments.ceilings(root).measure(&config, cores, &mut Told::new())?;
    let settings = Settings::of(arguments, &arguments.method(cores));
    Ok(Report { ceilings, ..Report::empty(Environment::read(cores, begun), settings) })
}

fn finish(arguments: &Arguments, report: &Report) -> Result<ExitCode> {
    if let Some(path) = &arguments.json {
        let json = serde_json::to_string_pretty(report).context("the report cannot be written as JSON")?;
        std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &arguments.html {
        std::fs::write(path, html::page(report)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    super::print(&table::text(report))?;
    let verdict = &report.verdict;
    let failed = verdict.errors > verdict.max_errors || verdict.unanswered > 0 || verdict.slo_met == Some(false);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The progress line: on standard error, and only where somebody sees it.
struct Told {
    terminal: bool,
}

impl Told {
    fn new() -> Told {
        Told { terminal: std::io::stderr().is_terminal() }
    }

    fn tell(&mut self, line: &str) {
        if self.terminal {
            // Nobody is missed who does not read it.
            let _ = write!(std::io::stderr(), "\r\x1b[2K{line}");
        }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.tell("");
    }
}
