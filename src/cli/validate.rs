use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use super::EngineArguments;
use crate::registry::{self, Report};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The folder of models
    #[arg(value_name = "REGISTRY")]
    registry: PathBuf,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Exit code 1 where a version fails to load or disagrees with its golden files.
#[expect(clippy::print_stdout, reason = "the verdicts are what the command is for")]
pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let (config, cores) = arguments.engine.registry(arguments.registry)?;
    // Nothing is served here.
    let config = registry::Config { calibrate: false, ..config };
    let reports = registry::validate(&config, cores)?;
    for report in &reports {
        println!("{}", verdict(report));
    }
    let failed = reports.iter().filter(|report| report.outcome.is_err()).count();
    println!("{} passed, {failed} failed", reports.len() - failed);
    Ok(if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn verdict(report: &Report) -> String {
    let version = format!("{} {}", report.model, report.version);
    match (&report.outcome, report.goldens) {
        (Err(reason), _) => format!("FAILED  {version}: {reason}"),
        (Ok(facts), Some(cases)) => format!("ok      {version} on {}: {cases} golden cases agree", facts.backend),
        (Ok(facts), None) => format!("ok      {version} on {}: loads and runs; no golden cases", facts.backend),
    }
}
