//! `tidegate infer`: one request to a running server, for a person at a shell.
//!
//! `cli/client` asks · `table` is what a person reads.
//!
//! Tensors travel binary both ways, so that both protocols give the same bits. One thread, one connection; files are
//! read before the server is asked for anything.

mod table;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::table::{Style, shell_word};
use super::client::input::{self, Given};
use super::client::request::{self, Request};
use super::client::{Address, Answer, Client, Failure, ModelMetadata, read_file};
use super::{print, surroundings};
use crate::units::{DURATION_FORM, parse_duration};

/// How much longer than the server we wait, so that its own word on a deadline arrives.
const GRACE: Duration = Duration::from_secs(1);

pub(super) const AFTER_HELP: &str = "\
Without --input and --request the model's signature is shown, and a line to try. Of an input's shape the leading batch \
dimension may be left out, and a flat list is given the model's shape where only one fits. JSON numbers are read as \
the server reads them; \"NaN\", \"Infinity\" and \"-Infinity\" stand for what JSON has no numbers for. A NumPy array of \
another datatype is converted where JSON could say it: float64 is rounded, int64 must fit.

Exit codes: 0 answered, 1 refused by the server, 2 not usable as asked, 3 no answer from the server.";

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The model to ask
    #[arg(value_name = "MODEL")]
    model: String,
    /// Where the server is: http:// for REST (port 8000 if not given), grpc:// for gRPC (port 8001)
    #[arg(short, long, value_name = "URL", default_value = "http://localhost:8000", value_parser = Address::parse)]
    server: Address,
    /// The model's version; otherwise the server chooses
    #[arg(long, value_name = "VERSION")]
    version: Option<String>,
    /// An input: JSON ([[1,2],[3,4]]), a .npy or .json file (@FILE), or standard input (@-); for a BYTES input also bare
    /// text or any file. The name may be left out where the model has one input
    #[arg(short, long, value_name = "[NAME=]VALUE", allow_hyphen_values = true)]
    input: Vec<String>,
    /// A whole request of the Open Inference Protocol as JSON, sent without asking for the signature; - is standard
    /// input
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["input", "output", "classes", "id"])]
    request: Option<PathBuf>,
    /// An output to ask for, again for each; otherwise all
    #[arg(short, long, value_name = "NAME")]
    output: Vec<String>,
    /// Ask for the COUNT best classes of each floating-point output, with their labels
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    classes: Option<u32>,
    /// The request's id, which the answer repeats
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// How long to wait, here and in the server; 0 is no limit
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    timeout: Duration,
    /// Print the answer, or the metadata, as JSON
    #[arg(long)]
    json: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| format!("expected {DURATION_FORM}"))
}

/// What the arguments ask for, files read.
enum Asked {
    Signature,
    Inference(Vec<Given>),
    Request(Request),
}

/// Exit code 1 where the server refuses, 3 where it does not answer.
pub(super) fn run(arguments: Arguments) -> Result<ExitCode> {
    let asked = arguments.asked()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(arguments.within_timeout(arguments.ask(asked)));
    // A name that is still being looked up must not keep the process.
    runtime.shutdown_background();
    match outcome {
        Ok(text) => {
            print(&text)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => failure.told(),
    }
}

impl Arguments {
    fn asked(&self) -> Result<Asked> {
        if let Some(path) = &self.request {
            let text = read_file(path)?;
            let request = Request::parse(&text).with_context(|| format!("the request in {}", path.display()))?;
            return Ok(Asked::Request(request));
        }
        if self.input.is_empty() {
            if !self.output.is_empty() || self.classes.is_some() || self.id.is_some() {
                bail!("no --input, expected one with --output, --classes or --id");
            }
            return Ok(Asked::Signature);
        }
        if self.input.iter().filter(|input| input.ends_with("@-")).count() > 1 {
            bail!("standard input is given twice, expected once");
        }
        let given = self.input.iter().map(|text| Given::parse(text)).collect::<Result<_>>()?;
        Ok(Asked::Inference(given))
    }

    async fn within_timeout(&self, work: impl Future<Output = Result<String, Failure>>) -> Result<String, Failure> {
        if self.timeout.is_zero() {
            return work.await;
        }
        tokio::time::timeout(self.timeout.saturating_add(GRACE), work).await.unwrap_or_else(|_| {
            Err(Failure::NoAnswer(format!("no answer from {} within {:?}", self.server, self.timeout)))
        })
    }

    async fn ask(&self, asked: Asked) -> Result<String, Failure> {
        let mut client = Client::connect(&self.server, self.timeout).await?;
        let version = self.version.as_deref().unwrap_or_default();
        let request = match asked {
            Asked::Signature => return self.shown(&client.model(&self.model, version).await?),
            Asked::Inference(given) => self.request(given, &client.model(&self.model, version).await?)?,
            Asked::Request(request) => request,
        };
        let answer = client.infer(&self.model, version, request).await?;
        Ok(self.answered(&answer)?)
    }

    fn request(&self, given: Vec<Given>, model: &ModelMetadata) -> Result<Request> {
        Ok(Request {
            id: self.id.clone().unwrap_or_default(),
            inputs: input::tensors(given, model)?,
            outputs: request::outputs(&self.output, self.classes, model),
            ..Request::default()
        })
    }

    fn shown(&self, model: &ModelMetadata) -> Result<String, Failure> {
        Ok(if self.json { json(model)? } else { table::model(model, &self.command(), style()) })
    }

    fn answered(&self, answer: &Answer) -> Result<String> {
        if self.json { json(&answer.as_json()) } else { Ok(table::answer(answer, self.classes.is_some(), style())) }
    }

    /// The command so far, to be gone on with inputs.
    fn command(&self) -> String {
        let mut command = format!("tidegate infer {}", shell_word(&self.model));
        if !self.server.is_default() {
            command.push_str(&format!(" --server {}", self.server));
        }
        if let Some(version) = &self.version {
            command.push_str(&format!(" --version {}", shell_word(version)));
        }
        command
    }
}

fn style() -> Style {
    let plain = surroundings::read().variables.get("NO_COLOR").is_some_and(|value| !value.is_empty());
    Style { bold: std::io::stdout().is_terminal() && !plain }
}

fn json(value: &impl serde::Serialize) -> Result<String> {
    let text = serde_json::to_string(value).context("the answer cannot be written as JSON: leave out --json")?;
    Ok(text + "\n")
}

#[cfg(test)]
mod tests;
