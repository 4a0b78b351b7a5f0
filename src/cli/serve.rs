use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use tokio::signal::unix::{SignalKind, signal};

use super::{logging, summary, surroundings};
use crate::config::{self, Given, LogFormat};
use crate::server::{self, Addresses, Hooks, WhenReady};

/// Exit code after a second signal: stopped without draining.
const EXIT_INTERRUPTED: i32 = 130;

/// Values are taken as typed and checked together with the file's and the environment's.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The folder of models to serve, or one .onnx file
    #[arg(long, value_name = "DIR")]
    registry: Option<String>,
    /// Address that HTTP, gRPC and metrics listen on [default: 0.0.0.0]
    #[arg(long, value_name = "ADDRESS")]
    host: Option<String>,
    /// Port of the REST API; 0 picks a free one [default: 8000]
    #[arg(long, value_name = "PORT")]
    http_port: Option<String>,
    /// Port of the gRPC API [default: 8001]
    #[arg(long, value_name = "PORT")]
    grpc_port: Option<String>,
    /// Port of /metrics, /livez and /readyz [default: 8002]
    #[arg(long, value_name = "PORT")]
    metrics_port: Option<String>,
    /// Port of the admin API, on loopback [default: 8003]
    #[arg(long, value_name = "PORT")]
    admin_port: Option<String>,
    /// Configuration file; see docs/configuration.md
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What a bare model.onnx is called [default: model]
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// poll, none or explicit: serve what is in the registry, what was there at start, or what is asked for [default: poll]
    #[arg(long, value_name = "MODE")]
    model_control: Option<String>,
    /// With --model-control explicit, a model to load at start; * for all. May be repeated
    #[arg(long, value_name = "NAME")]
    load_model: Vec<String>,
    /// Whether clients may load and unload models over the data ports, too [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    repository_api: Option<String>,
    /// Where model files are copied to, and what was measured of them is remembered; none remembers nothing
    /// [default: the system's temporary folder, and $XDG_CACHE_HOME/tidegate or ~/.cache/tidegate]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<String>,
    /// text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

impl Arguments {
    fn given(&self) -> Given {
        config::given([
            ("registry", self.registry.clone()),
            ("host", self.host.clone()),
            ("http_port", self.http_port.clone()),
            ("grpc_port", self.grpc_port.clone()),
            ("metrics_port", self.metrics_port.clone()),
            ("admin_port", self.admin_port.clone()),
            ("model_name", self.model_name.clone()),
            ("model_control", self.model_control.clone()),
            ("load_model", (!self.load_model.is_empty()).then(|| self.load_model.join(","))),
            ("repository_api", self.repository_api.clone()),
            ("cache_dir", self.cache_dir.clone()),
            ("log_format", self.log_format.clone()),
        ])
    }
}

pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let surroundings = surroundings::read();
    let path = arguments.config.clone().or_else(|| surroundings.variables.get("TIDEGATE_CONFIG").map(PathBuf::from));
    let file =
        path.map(|path| config::File { name: path.display().to_string(), content: std::fs::read_to_string(&path) });
    let resolved = config::resolve(arguments.given(), file, &surroundings)?;
    logging::start(resolved.log_format, resolved.log_level);

    let hooks = Hooks {
        listening: Box::new(listening),
        ready: announce(resolved.log_format),
        stop: told_to_stop(),
        phase: Box::new(|_| {}),
    };
    let drained = server::run(resolved.server, hooks)?;
    // A peer that was cut had its time; a job that was abandoned had been accepted.
    let failed = drained.jobs > 0;
    if drained.threads {
        tracing::warn!("a thread is still inside an engine: the process ends without waiting for it");
        exit_at_once(i32::from(failed));
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// SIGTERM or SIGINT. The next one exits at once.
async fn told_to_stop() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("cannot listen for signals: the process will not drain when told to stop");
        return std::future::pending().await;
    };
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal = name, "stopping: finishing what was accepted; a second signal exits now");
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("stopped by a second signal, without draining");
        exit_at_once(EXIT_INTERRUPTED);
    });
}

/// Without the destructors of the libraries' globals, which a thread inside an engine may still use. Nothing is lost:
/// log lines are written unbuffered, and a cache that is left behind is swept by the next process.
fn exit_at_once(code: i32) -> ! {
    unsafe extern "C" {
        // SAFETY: as POSIX has it; it reads no memory and does not return.
        safe fn _exit(code: std::ffi::c_int) -> !;
    }
    _exit(code)
}

/// Before the server is ready: with strict readiness that may take until somebody mends a version.
fn listening(Addresses { http, grpc, metrics, admin }: &Addresses) {
    tracing::info!(%http, %grpc, %metrics, %admin, "listening");
}

/// A summary for a person, or the one line that tools wait for.
fn announce(format: LogFormat) -> WhenReady {
    Box::new(move |addresses, engine| match format {
        LogFormat::Text => {
            let mut log = std::io::stderr();
            let summary = summary::text(addresses, engine, log.is_terminal());
            // Where nobody reads it, the server serves all the same; `eprintln!` would panic.
            let _ = writeln!(log, "{summary}");
        }
        LogFormat::Json => tracing::info!(
            http = %addresses.http,
            grpc = %addresses.grpc,
            metrics = %addresses.metrics,
            admin = %addresses.admin,
            r#try = summary::line_to_try(addresses, engine),
            "ready"
        ),
    })
}
