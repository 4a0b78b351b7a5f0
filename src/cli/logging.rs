//! Log lines on standard error: text for people (coloured on a terminal), JSON for machines. Panics are lines, too.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::IsTerminal;
use std::panic::PanicHookInfo;
use std::path::Path;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::backend::panics_are_answered;
use crate::config::LogFormat;

/// Installs the process's subscriber; dependencies are kept at warnings unless more than `info` is asked for, and h2,
/// which warns of every frame that a client had no right to send, at errors.
pub(super) fn start(format: LogFormat, level: tracing::Level) {
    let filter = if level > tracing::Level::INFO {
        EnvFilter::default().add_directive(LevelFilter::from_level(level).into())
    } else {
        EnvFilter::new(format!("{},h2=error,tidegate={}", level.min(tracing::Level::WARN), level).to_lowercase())
    };
    // A line that nobody reads any more is dropped: reporting that on standard error would panic.
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false);
    // A second call, as tests in one process make, keeps the first subscriber.
    let started = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    if started.is_ok() {
        std::panic::set_hook(Box::new(log_panic));
    }
}

/// One line like any other: readers of JSON lines would stumble over the standard report.
fn log_panic(panic: &PanicHookInfo) {
    // One that a client provoked and is told of: it must not be able to fill the log.
    if panics_are_answered() {
        return tracing::debug!("answered panic: {}", panic.payload_as_str().unwrap_or("no message"));
    }
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
    tracing::error!(
        thread = std::thread::current().name(),
        place = panic.location().map(|place| format!("{}:{}", file_name(place.file()), place.line())),
        backtrace,
        "panic: {}",
        panic.payload_as_str().unwrap_or("no message")
    );
}

/// Without the folder, which is the build machine's.
fn file_name(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path)
}
