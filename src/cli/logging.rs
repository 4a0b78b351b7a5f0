//! Log lines on standard error: text for people (coloured on a terminal), JSON for machines.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::config::LogFormat;

/// Installs the process's subscriber; `noisy` dependencies are kept at warnings unless more than `info` is asked for.
pub(super) fn start(format: LogFormat, level: tracing::Level) {
    let filter = if level > tracing::Level::INFO {
        EnvFilter::default().add_directive(LevelFilter::from_level(level).into())
    } else {
        EnvFilter::new(format!("{},tidegate={}", level.min(tracing::Level::WARN), level).to_lowercase())
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second call, as tests in one process make, keeps the first subscriber.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}
