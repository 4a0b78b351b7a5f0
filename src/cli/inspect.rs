use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use super::EngineArguments;
use crate::registry::{self, Facts, Report};
use crate::tensor::{OutputKind, TensorSpec, wire_shape};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// A model's folder, one of its versions, or an .onnx file
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    #[command(flatten)]
    engine: EngineArguments,
}

/// Exit code 1 where a version would not be served.
#[expect(clippy::print_stdout, reason = "the report is what the command is for")]
pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let (config, cores) = arguments.engine.registry(arguments.model)?;
    let reports = registry::inspect(&config, cores)?;
    for report in &reports {
        print!("{}", describe(report));
    }
    let failed = reports.iter().any(|report| report.outcome.is_err());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn describe(report: &Report) -> String {
    let head = format!("{} version {}\n", report.model, report.version);
    match &report.outcome {
        Ok(facts) => head + &loaded(facts),
        Err(reason) => format!("{head}  not servable  {reason}\n"),
    }
}

fn loaded(facts: &Facts) -> String {
    let mut lines = Vec::new();
    for spec in &facts.signature.inputs {
        lines.push(("input", tensor(spec)));
    }
    for (spec, output) in facts.signature.outputs.iter().zip(&facts.outputs) {
        let classes = output.labels.as_ref().map(|labels| format!(", {} labels", labels.len())).unwrap_or_default();
        let meaning = match output.kind {
            OutputKind::Values => "values".to_string(),
            kind => format!("{}{classes}", kind.name()),
        };
        lines.push(("output", format!("{}  ({meaning})", tensor(spec))));
    }
    let backend = format!("{} {} on {}", facts.backend, facts.backend_version, facts.device());
    lines.push(("engine", format!("{backend}: {}", facts.backend_reason)));
    let batching =
        if facts.batching.enabled { format!("on, up to {} rows", facts.preferred_rows) } else { "off".into() };
    lines.push(("batching", format!("{batching}: {}", facts.batching.reason)));
    let ragged = if facts.ragged.plan.is_some() { "on" } else { "off" };
    lines.push(("ragged", format!("{ragged}: {}", facts.ragged.reason)));
    lines.push(("threads", facts.threads()));
    lines.push(("wide", facts.wide.clone()));
    lines.push(("costs", facts.costs.clone()));
    lines.push(("producer", facts.producer.clone()));
    lines.push(("digest", facts.digest.to_string()));
    lines.push(("loaded in", format!("{:.0} ms", facts.load_time.as_secs_f64() * 1e3)));
    lines.extend(facts.warnings.iter().map(|warning| ("warning", warning.clone())));
    lines.iter().map(|(name, value)| format!("  {name:<9}  {value}\n")).collect()
}

fn tensor(spec: &TensorSpec) -> String {
    format!("{} {} {}", spec.name, spec.dtype, wire_shape(&spec.to_wire()))
}
