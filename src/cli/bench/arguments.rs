//! What can be asked for, checked for what makes no sense together.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};

use super::arrivals::{MAX_RATE, Pattern};
use super::data::{Drawing, Extents, Lengths};
use super::in_process::{Ceilings, Setting};
use super::load::{Load, Method};
use super::wire::Wire;
use crate::cli::EngineArguments;
use crate::cli::client::Address;
use crate::request::Protocol;
use crate::units::{DURATION_FORM, SIZE_FORM, parse_duration, parse_size};

/// Connections that the callers of gRPC share, if nothing else is said.
const MAX_CONNECTIONS: usize = 64;
/// Most clients of a closed loop, and requests of an open one in flight.
const MAX_CALLERS: usize = 16 << 10;
/// Most arrivals in one round.
const MAX_ARRIVALS: f64 = 1e8;
const MAX_ROUNDS: usize = 1001;
/// With more cores than these, two threads make the load.
const FEW_CORES: usize = 4;
/// Largest blank request or answer.
const MAX_BLANK_BYTES: usize = 256 << 20;

pub(in crate::cli) const AFTER_HELP: &str = "\
A closed loop (--concurrency) has so many clients, each of which waits for its answer before it asks again: it measures \
what a server can do. An open loop (--rate) sends when requests are due, whatever the server does, and counts a latency \
from when its request was due: it measures what users see, a stall included.

Rounds of several servers (--compare, --echo) are interleaved, and ratios are made round by round. Numbers are medians \
of the rounds; the interval behind one holds the true median in 95 of 100 cases, or is the whole range where there are \
fewer than six rounds.

Exit codes: 0 done, 1 more errors than --max-errors or an objective missed, 2 not usable as asked, 3 no answer from the \
server.";

#[derive(clap::Args)]
pub(in crate::cli) struct Arguments {
    /// A model to ask, NAME[:VERSION][=WEIGHT]; again for each of several, which get shares of the requests by their
    /// weights [default weight: 1]
    #[arg(short = 'm', long = "model", value_name = "MODEL")]
    models: Vec<Asked>,
    /// The server's REST API
    #[arg(short, long, value_name = "URL", default_value = "http://localhost:8000", value_parser = Address::parse)]
    url: Address,
    /// The server's gRPC API [default: port 8001 where the REST API is]
    #[arg(long, value_name = "URL", value_parser = grpc_address)]
    grpc_url: Option<Address>,
    /// How requests are written
    #[arg(
        short = 'p',
        long = "protocol",
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "binary",
        value_enum
    )]
    pub(super) wires: Vec<Wire>,
    /// A closed loop with so many clients; several numbers are measured one after the other [default: 1]
    #[arg(short, long, value_name = "CLIENTS", value_delimiter = ',', conflicts_with = "rate")]
    concurrency: Vec<usize>,
    /// An open loop at so many requests a second
    #[arg(short, long, value_name = "RATES", value_delimiter = ',')]
    rate: Vec<f64>,
    /// Let an open loop's requests come at even distances instead of at random (Poisson)
    #[arg(long, conflicts_with = "arrivals")]
    constant: bool,
    /// Let an open loop's requests come as they were recorded: seconds from the beginning, one to a line
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rate", "concurrency", "ramp"])]
    arrivals: Option<PathBuf>,
    /// What each round measures
    #[arg(short, long, value_name = "DURATION", default_value = "2s", value_parser = duration)]
    pub(super) duration: Duration,
    /// Rounds of every measurement; a median of 11 or more has a useful interval
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    pub(super) rounds: usize,
    /// How long to warm up at most; it ends as soon as throughput and latency are steady. 0 for none
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub(super) warm_up: Duration,
    /// How long to wait for an answer
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    timeout: Duration,
    /// Threads that make the load [default: 1, with more than 4 cores 2]
    #[arg(long, value_name = "COUNT")]
    threads: Option<usize>,
    /// Connections that gRPC clients share; those of REST have one each [default: one each, 64 at most]
    #[arg(long, value_name = "COUNT")]
    connections: Option<usize>,
    /// Requests that an open loop has in flight at most; over REST each has a connection. Those that are due beyond
    /// wait here, and their wait counts
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    outstanding: usize,
    /// What drawn data and random arrivals begin with
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub(super) seed: u64,
    /// The leading dimension of drawn inputs
    #[arg(long, value_name = "ROWS", default_value_t = 1)]
    batch_rows: usize,
    /// What other free dimensions of drawn inputs become, one length for all inputs of a request: 8-128 or 8,32,128
    /// [default: 32]
    #[arg(long, value_name = "LENGTHS")]
    lengths: Option<Lengths>,
    /// A drawn input's whole shape
    #[arg(long = "shape", value_name = "INPUT:DIMS")]
    shapes: Vec<Extents>,
    /// Data to send instead: a request as JSON, a .npy array for a model with one input, or a folder of either
    #[arg(long, value_name = "PATH", conflicts_with_all = ["lengths", "shapes", "batch_rows"])]
    pub(super) data: Option<PathBuf>,
    /// The path that REST requests go to, where it is not the protocol's
    #[arg(long, value_name = "PATH")]
    pub(super) path: Option<String>,
    /// Measure a second server in turn with the first, and print ratios; its gRPC API is at the second URL
    #[arg(long, value_name = "URL[,GRPC_URL]", value_delimiter = ',', num_args = 1, value_parser = Address::parse)]
    compare: Vec<Address>,
    /// Measure a bare server that answers the same bytes in turn with the first: the transport's ceiling. Without a
    /// --model it is measured alone
    #[arg(long)]
    pub(super) echo: bool,
    /// With --echo and no --model, only serve it, for other load generators
    #[arg(long, requires = "echo", conflicts_with_all = ["models", "concurrency", "rate"])]
    pub(super) serve: bool,
    /// With --echo and no --model, the length of a request's body
    #[arg(long, value_name = "SIZE", default_value = "1KiB", value_parser = size)]
    pub(super) request_bytes: usize,
    /// With --echo and no --model, the length of an answer's body
    #[arg(long, value_name = "SIZE", default_value = "1KiB", value_parser = size)]
    pub(super) response_bytes: usize,
    #[arg(long, hide = true, requires = "serve")]
    pub(super) answers_from_stdin: bool,
    /// What latencies must stay within, like p99=20ms; else the exit code is 1
    #[arg(long, value_name = "OBJECTIVE")]
    pub(super) slo: Option<Slo>,
    /// Find the highest rate that meets --slo, beginning at --rate [default: 100]
    #[arg(long, requires = "slo", conflicts_with = "concurrency")]
    pub(super) ramp: bool,
    /// Errors that are put up with
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub(super) max_errors: u64,
    /// The server's process on this machine, to say how much CPU a request takes there
    #[arg(long, value_name = "PID")]
    pub(super) server_pid: Option<u32>,
    /// The same for the server of --compare
    #[arg(long, value_name = "PID")]
    pub(super) compare_pid: Option<u32>,
    /// Write all that was measured as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Write it as one page with charts
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Measure engines alone, without a server: every batch × instances × threads of the models in a registry, a model's
    /// folder or an .onnx file, or of those that --model names
    #[arg(long, value_name = "DIR", conflicts_with_all = ["compare", "echo", "ramp", "slo", "data", "rate", "concurrency"])]
    pub(super) in_process: Option<PathBuf>,
    /// With --in-process, the rows of batches; 1 alone where a model does not batch
    #[arg(long, value_name = "ROWS", value_delimiter = ',', default_value = "1,2,4,8,16,32")]
    batches: Vec<usize>,
    /// Measure the engine alone, too, in turn with the servers, on what they are sent: --model as this registry or folder
    /// has it, in the layout of --engine-layout
    #[arg(long, value_name = "DIR", requires = "engine_layout", conflicts_with_all = ["in_process", "ramp"])]
    pub(super) engine_of: Option<PathBuf>,
    /// Rows of a batch, instances and threads of each: 8x2x1
    #[arg(long, value_name = "ROWSxINSTANCESxTHREADS", requires = "engine_of")]
    pub(super) engine_layout: Option<Setting>,
    #[command(flatten)]
    pub(super) engine: EngineArguments,
}

/// A model with its share of the requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) name: String,
    /// Empty: the server's choice.
    pub(super) version: String,
    pub(super) weight: usize,
}

/// Shares of one model against another.
const MAX_WEIGHT: usize = 1000;

impl FromStr for Asked {
    type Err = String;

    fn from_str(text: &str) -> Result<Asked, String> {
        let (model, weight) = text.rsplit_once('=').unwrap_or((text, "1"));
        let weight = weight.parse().ok().filter(|weight| (1..=MAX_WEIGHT).contains(weight));
        let weight =
            weight.ok_or_else(|| format!("found `{text}`, expected a weight of 1 to {MAX_WEIGHT} after `=`"))?;
        let digits = |version: &str| !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit());
        let (name, version) = match model.rsplit_once(':') {
            Some((name, version)) if digits(version) => (name, version),
            _ => (model, ""),
        };
        if name.is_empty() {
            return Err(format!("found `{text}`, expected a model's name"));
        }
        Ok(Asked { name: name.into(), version: version.into(), weight })
    }
}

/// A service level objective: what latencies must stay within.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Slo {
    /// Of 0 to 1.
    pub(super) quantile: f64,
    pub(super) limit: Duration,
}

impl FromStr for Slo {
    type Err = String;

    fn from_str(text: &str) -> Result<Slo, String> {
        let expected = || format!("found `{text}`, expected a percentile and a limit, like p99=20ms or p99.9=0.1s");
        let (percentile, limit) = text.split_once('=').ok_or_else(expected)?;
        let percentile: f64 = percentile.strip_prefix('p').and_then(|text| text.parse().ok()).ok_or_else(expected)?;
        let limit = parse_duration(limit).filter(|limit| !limit.is_zero()).ok_or_else(expected)?;
        if !(0.0..100.0).contains(&percentile) {
            return Err(expected());
        }
        Ok(Slo { quantile: percentile / 100.0, limit })
    }
}

impl std::fmt::Display for Slo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // To hide what dividing by 100 did.
        let percentile = (self.quantile * 1e8).round() / 1e6;
        write!(f, "p{percentile}={:?}", self.limit)
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| format!("expected {DURATION_FORM}"))
}

fn size(text: &str) -> Result<usize, String> {
    parse_size(text)
        .filter(|size| *size <= MAX_BLANK_BYTES)
        .ok_or_else(|| format!("expected {SIZE_FORM}, {MAX_BLANK_BYTES} bytes at most"))
}

fn grpc_address(text: &str) -> Result<Address, String> {
    let address = Address::parse(&if text.contains("://") { text.to_string() } else { format!("grpc://{text}") })?;
    if address.protocol() == Protocol::Grpc { Ok(address) } else { Err("expected grpc://".into()) }
}

/// A server, over both protocols.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    pub(super) rest: Address,
    pub(super) grpc: Address,
    pub(super) pid: Option<u32>,
}

impl Remote {
    pub(super) fn address(&self, wire: Wire) -> &Address {
        if wire == Wire::Grpc { &self.grpc } else { &self.rest }
    }

    /// The second address where it was given, else where servers listen.
    fn of(first: &Address, second: Option<&Address>, pid: Option<u32>) -> Remote {
        let mut remote = Remote { rest: first.sibling(Protocol::Http), grpc: first.sibling(Protocol::Grpc), pid };
        for address in [Some(first), second].into_iter().flatten() {
            match address.protocol() {
                Protocol::Http => remote.rest = address.clone(),
                Protocol::Grpc => remote.grpc = address.clone(),
            }
        }
        remote
    }
}

impl Arguments {
    /// What clap cannot say.
    pub(super) fn check(&self) -> Result<()> {
        let within = |what: &str, value: usize, least: usize, most: usize| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                bail!("{what} is {value}, expected {least} to {most}")
            }
        };
        within("--rounds", self.rounds, 1, MAX_ROUNDS)?;
        within("--outstanding", self.outstanding, 1, MAX_CALLERS)?;
        within("--threads", self.threads.unwrap_or(1), 1, MAX_CALLERS)?;
        within("--connections", self.connections.unwrap_or(1), 1, MAX_CALLERS)?;
        within("--batch-rows", self.batch_rows, 1, usize::MAX)?;
        self.concurrency.iter().try_for_each(|clients| within("--concurrency", *clients, 1, MAX_CALLERS))?;
        if self.duration.is_zero() || self.timeout.is_zero() {
            bail!("--duration or --timeout is 0, expected more");
        }
        for rate in &self.rate {
            if !(*rate > 0.0 && *rate <= MAX_RATE && rate * self.duration.as_secs_f64() <= MAX_ARRIVALS) {
                bail!("--rate is {rate}, expected more than 0 and at most {MAX_RATE}");
            }
        }
        if self.engine_of.is_some() {
            within("The number of models beside --engine-of", self.models.len(), 1, 1)?;
        }
        self.batches.iter().try_for_each(|rows| within("--batches", *rows, 1, MAX_CALLERS))?;
        if self.models.is_empty() && !self.echo && self.in_process.is_none() {
            bail!("no --model, expected one; or --echo or --in-process alone");
        }
        if self.models.is_empty() && (!self.compare.is_empty() || self.data.is_some()) {
            bail!("no --model, expected one with --compare and --data");
        }
        if self.compare.len() > 2 {
            bail!("--compare names {} addresses, expected one or two", self.compare.len());
        }
        if self.ramp && self.rate.len() > 1 {
            bail!("--ramp begins at {} rates, expected one", self.rate.len());
        }
        if self.path.as_ref().is_some_and(|path| !path.starts_with('/') || path.contains(char::is_whitespace)) {
            bail!("--path is no path, expected one that begins with /");
        }
        Ok(())
    }

    /// None, where only the echo was asked for.
    pub(super) fn models(&self) -> &[Asked] {
        &self.models
    }

    pub(super) fn server(&self) -> Remote {
        Remote::of(&self.url, self.grpc_url.as_ref(), self.server_pid)
    }

    pub(super) fn compared(&self) -> Option<Remote> {
        let first = self.compare.first()?;
        Some(Remote::of(first, self.compare.get(1), self.compare_pid))
    }

    pub(super) fn pattern(&self) -> Result<Pattern> {
        match &self.arrivals {
            Some(path) => Pattern::read(path),
            None if self.constant => Ok(Pattern::Constant),
            None => Ok(Pattern::Poisson),
        }
    }

    pub(super) fn loads(&self) -> Result<Vec<Load>> {
        let pattern = self.pattern()?;
        let open = |rate: f64| Load::Open { rate, pattern: pattern.clone() };
        Ok(match (pattern.own_rate(), &self.rate[..], &self.concurrency[..]) {
            (Some(rate), ..) => vec![open(rate)],
            (None, [], []) => vec![Load::Closed { clients: 1 }],
            (None, [], clients) => clients.iter().map(|clients| Load::Closed { clients: *clients }).collect(),
            (None, rates, _) => rates.iter().copied().map(open).collect(),
        })
    }

    /// Of the engine alone.
    pub(super) fn ceilings<'a>(&'a self, root: &'a Path) -> Ceilings<'a> {
        Ceilings {
            root,
            models: &self.models,
            rows: &self.batches,
            drawing: self.drawing(),
            duration: self.duration,
            rounds: self.rounds,
        }
    }

    /// Where a ramp begins.
    pub(super) fn first_rate(&self) -> f64 {
        self.rate.first().copied().unwrap_or(100.0)
    }

    pub(super) fn method(&self, cores: usize) -> Method {
        Method {
            threads: self.threads.unwrap_or(if cores > FEW_CORES { 2 } else { 1 }),
            timeout: self.timeout,
            seed: self.seed,
            connections: self.connections.unwrap_or(MAX_CONNECTIONS),
            outstanding: self.outstanding,
        }
    }

    pub(super) fn drawing(&self) -> Drawing {
        Drawing { seed: self.seed, rows: self.batch_rows, lengths: self.lengths.clone(), shapes: self.shapes.clone() }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(arguments: &[&str]) -> Result<Arguments, String> {
        let parsed = Command::try_parse_from([&["bench"], arguments].concat()).map_err(|error| error.to_string())?;
        parsed.arguments.check().map_err(|error| error.to_string())?;
        Ok(parsed.arguments)
    }

    #[test]
    fn arguments_are_consistent() {
        Command::command().debug_assert();
        for good in [
            &["-m", "a"][..],
            &["-m", "a:1=3", "-m", "b", "-p", "json,grpc", "-c", "1,8"],
            &["-m", "a", "-r", "100,200.5", "--constant"],
            &["--echo", "--serve"],
            &["-m", "a", "--ramp", "--slo", "p99=20ms"],
            &["-m", "a", "--compare", "http://b:1,grpc://b:2"],
            &["--in-process", "models", "--batches", "1,64"],
        ] {
            assert!(parse(good).is_ok(), "{good:?}: {:?}", parse(good).err());
        }
        for bad in [
            &[][..],
            &["-m", "a", "-c", "1", "-r", "1"],
            &["-m", "a", "-r", "0"],
            &["-m", "a", "-c", "0"],
            &["-m", "a", "--ramp"],
            &["-m", "a", "--ramp", "--slo", "p99=20ms", "-r", "1,2"],
            &["-m", "a", "--slo", "p100=1s"],
            &["-m", "a", "--slo", "p99=20"],
            &["-m", "a=0"],
            &["-m", ":1"],
            &["-m", "a", "--rounds", "0"],
            &["-m", "a", "--duration", "0"],
            &["-m", "a", "--path", "x"],
            &["-m", "a", "--grpc-url", "http://a"],
            &["--serve"],
            &["--in-process", "models", "--echo"],
            &["--in-process", "models", "--batches", "0"],
            &["--echo", "--compare", "http://a"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn models_have_versions_and_weights() {
        let asked = |name: &str, version: &str, weight| Asked { name: name.into(), version: version.into(), weight };
        for (text, expected) in [
            ("a", asked("a", "", 1)),
            ("a:2", asked("a", "2", 1)),
            ("a=3", asked("a", "", 3)),
            ("a:b:10=3", asked("a:b", "10", 3)),
            ("a:latest", asked("a:latest", "", 1)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn the_grpc_api_is_beside_rest_unless_it_is_named() {
        let server = |arguments: &[&str]| {
            let remote = parse(&[&["-m", "a"], arguments].concat()).unwrap().server();
            (remote.rest.to_string(), remote.grpc.to_string())
        };
        assert_eq!(server(&["-u", "http://h:9"]), ("http://h:9".into(), "grpc://h:8001".into()));
        assert_eq!(server(&["--grpc-url", "h:7"]), ("http://localhost:8000".into(), "grpc://h:7".into()));
    }

    #[test]
    fn objectives_are_read_and_shown() {
        for text in ["p99=20ms", "p99.9=100ms", "p50=1.5ms"] {
            assert_eq!(text.parse::<Slo>().unwrap().to_string(), text);
        }
    }
}
