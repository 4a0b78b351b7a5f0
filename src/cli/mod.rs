//! The command line: one file per subcommand. The only module that prints, and the only one that uses `anyhow`.

mod bench;
mod client;
mod columns;
mod infer;
mod inspect;
mod logging;
mod serve;
mod summary;
mod surroundings;
mod validate;

use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::config;
use crate::registry;

/// Something was wrong with what was asked: a bad flag, a bad configuration, an unusable registry.
const EXIT_USAGE: u8 = 2;

#[derive(Parser)]
#[command(
    name = "tidegate",
    version,
    about = "Serves ONNX and safetensors models over the Open Inference Protocol",
    max_term_width = 100
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a registry of models over REST and gRPC
    Serve(serve::Arguments),
    /// Send one request to a running server and show the answer
    #[command(after_help = infer::AFTER_HELP)]
    Infer(infer::Arguments),
    /// Measure how fast a running server answers
    #[command(after_help = bench::AFTER_HELP)]
    Bench(Box<bench::Arguments>),
    /// Show what a model takes and gives, which engine runs it, and whether it batches and why
    Inspect(inspect::Arguments),
    /// Load every version of a registry, warm it, and compare its answers with its golden files
    Validate(validate::Arguments),
}

#[expect(clippy::print_stderr, reason = "the one place where a command's failure is told")]
/// Parses, runs, and maps the result to an exit code: 0 done, 1 failed, 2 not usable as asked.
pub fn main() -> ExitCode {
    restrain_libraries();
    let outcome = match Arguments::parse().command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Infer(arguments) => infer::run(arguments),
        Command::Bench(arguments) => bench::run(*arguments),
        Command::Inspect(arguments) => inspect::run(arguments),
        Command::Validate(arguments) => validate::run(arguments),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("tidegate: {error:#}");
        ExitCode::from(EXIT_USAGE)
    })
}

/// What libraries can be told by the environment only. .cargo/config.toml has the same for tests.
///
/// ONNX Runtime's own library, from 1.29 on, keeps a device id and a database below the home folder and sends what it
/// loads (names and hashes of models) to its maker, unless it is told before it is initialised: its switch in the API
/// comes too late. candle computes big sums on threads of its own, as many as there are cores, that spin while they wait
/// for each other; the compute gate knows nothing of them.
#[expect(clippy::disallowed_methods, reason = "libraries read it; the server never does")]
fn restrain_libraries() {
    for (variable, value) in [("ORT_DISABLE_TELEMETRY", "1"), ("CANDLE_NUM_THREADS", "1")] {
        // SAFETY: called first in `main`, when no other thread exists that could read or write the environment.
        unsafe { std::env::set_var(variable, value) };
    }
}

/// A reader that has seen enough (`| head`) is no failure.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

/// Flags that say how models are loaded, shared by the commands that load models without a server.
#[derive(Clone, clap::Args)]
struct EngineArguments {
    /// `auto`, `onnxruntime` or `tract`; otherwise TIDEGATE_ENGINE [default: auto]
    #[arg(long, value_name = "NAME")]
    engine: Option<String>,
    /// Path of ONNX Runtime's library; otherwise TIDEGATE_ONNXRUNTIME, ORT_DYLIB_PATH, then beside the binary
    #[arg(long, value_name = "FILE")]
    onnxruntime: Option<String>,
    /// Where what was measured of models is remembered; `none` for nowhere; otherwise TIDEGATE_CACHE_DIR
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<String>,
}

impl EngineArguments {
    /// A registry that is loaded once and not watched, and the cores it may plan for.
    fn registry(self, root: PathBuf) -> Result<(registry::Config, usize)> {
        let surroundings = surroundings::read();
        let flags =
            config::given([("engine", self.engine), ("onnxruntime", self.onnxruntime), ("cache_dir", self.cache_dir)]);
        let config = registry::Config { root, ..config::loading(flags, &surroundings)? };
        Ok((config, surroundings.cores))
    }
}

/// The text of docs/cli.md: every command's `--help`.
pub fn reference() -> String {
    use clap::CommandFactory;
    let mut out = String::from(
        "# Command line\n\n<!-- Generated from src/cli; `TIDEGATE_BLESS=1 cargo test --release` rewrites it. -->\n",
    );
    let mut command = Arguments::command();
    command.build();
    for subcommand in command.get_subcommands_mut().filter(|command| command.get_name() != "help") {
        let help = subcommand.render_long_help();
        out.push_str(&format!("\n## tidegate {}\n\n```\n{help}```\n", subcommand.get_name()));
    }
    out
}
