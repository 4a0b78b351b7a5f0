//! What was measured, as it is written to JSON: every number with the rounds it is made of. The schema's name changes
//! when a field changes its meaning or goes.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::arguments::Arguments;
use super::in_process::{Ceiling, Timed};
use super::load::{Load, Method, Round};
use super::stats::{self, Estimate, curve, millis};
use super::wire::Wire;

const SCHEMA: &str = "tidegate-bench/1";

#[derive(Serialize)]
pub(super) struct Report {
    pub(super) schema: &'static str,
    pub(super) environment: Environment,
    pub(super) settings: Settings,
    pub(super) servers: Vec<Server>,
    pub(super) models: Vec<Sent>,
    pub(super) cells: Vec<Cell>,
    pub(super) ramps: Vec<Ramp>,
    /// The engine alone.
    pub(super) ceilings: Vec<Ceiling>,
    /// What the command line asked for, and whether it was met.
    pub(super) verdict: Verdict,
}

/// Where it was measured.
#[derive(Serialize)]
pub(super) struct Environment {
    pub(super) tidegate: &'static str,
    pub(super) cpu: Option<String>,
    pub(super) cores: usize,
    pub(super) kernel: Option<String>,
    /// Seconds since 1970.
    pub(super) begun: u64,
}

#[derive(Serialize)]
pub(super) struct Settings {
    pub(super) duration_seconds: f64,
    pub(super) rounds: usize,
    pub(super) warm_up_seconds: f64,
    pub(super) timeout_seconds: f64,
    pub(super) threads: usize,
    pub(super) connections: usize,
    pub(super) outstanding: usize,
    pub(super) seed: u64,
}

impl Settings {
    pub(super) fn of(arguments: &Arguments, method: &Method) -> Settings {
        Settings {
            duration_seconds: arguments.duration.as_secs_f64(),
            rounds: arguments.rounds,
            warm_up_seconds: arguments.warm_up.as_secs_f64(),
            timeout_seconds: method.timeout.as_secs_f64(),
            threads: method.threads,
            connections: method.connections,
            outstanding: method.outstanding,
            seed: method.seed,
        }
    }
}

/// What a server is to this measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    Server,
    Compared,
    Echo,
}

impl Role {
    pub(super) fn name(self) -> &'static str {
        match self {
            Role::Server => "server",
            Role::Compared => "compared",
            Role::Echo => "echo",
        }
    }
}

#[derive(Serialize)]
pub(super) struct Server {
    pub(super) role: Role,
    pub(super) addresses: Vec<String>,
}

/// What one model was sent.
#[derive(Serialize)]
pub(super) struct Sent {
    pub(super) model: String,
    pub(super) version: String,
    pub(super) weight: usize,
    pub(super) requests: usize,
    /// `drawn`, or the file's name.
    pub(super) source: String,
    /// Of the first request: `ids INT64 [1,32]`.
    pub(super) inputs: Vec<String>,
}

/// One load over one wire.
#[derive(Serialize)]
pub(super) struct Cell {
    pub(super) protocol: Wire,
    pub(super) load: LoadSaid,
    pub(super) sides: Vec<Side>,
    pub(super) ratios: Vec<Ratio>,
    /// The engine alone, which took turns with the sides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) engine: Option<Timed>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "loop", rename_all = "lowercase")]
pub(super) enum LoadSaid {
    Closed { clients: usize },
    Open { rate: f64, arrivals: &'static str },
}

impl From<&Load> for LoadSaid {
    fn from(load: &Load) -> LoadSaid {
        match load {
            Load::Closed { clients } => LoadSaid::Closed { clients: *clients },
            Load::Open { rate, pattern } => LoadSaid::Open { rate: *rate, arrivals: pattern.name() },
        }
    }
}

impl LoadSaid {
    pub(super) fn text(&self) -> String {
        match self {
            LoadSaid::Closed { clients: 1 } => "1 client".into(),
            LoadSaid::Closed { clients } => format!("{clients} clients"),
            LoadSaid::Open { rate, .. } => format!("{}/s", super::table::count(*rate)),
        }
    }
}

/// One server under one load.
#[derive(Serialize)]
pub(super) struct Side {
    pub(super) role: Role,
    pub(super) warm_up: Option<WarmUp>,
    /// Answers a second.
    pub(super) throughput: Option<Estimate>,
    pub(super) latency_ms: Latencies,
    /// Of all rounds together: quantile and milliseconds.
    pub(super) curve: Vec<(f64, f64)>,
    #[serde(skip)]
    pub(super) latencies: Histogram<u64>,
    /// How late the load generator itself sent, at the 99th percentile.
    pub(super) late_p99_ms: f64,
    pub(super) answers: u64,
    pub(super) errors: Vec<Errors>,
    /// Due in an open loop and never sent.
    pub(super) unsent: u64,
    /// Microseconds of CPU time for each answer.
    pub(super) client_cpu_us: Option<Estimate>,
    pub(super) server_cpu_us: Option<Estimate>,
}

#[derive(Serialize)]
pub(super) struct Latencies {
    pub(super) p50: Option<Estimate>,
    pub(super) p90: Option<Estimate>,
    pub(super) p99: Option<Estimate>,
    pub(super) p999: Option<Estimate>,
    pub(super) max: Option<Estimate>,
}

#[derive(Serialize)]
pub(super) struct Errors {
    pub(super) kind: String,
    pub(super) count: u64,
    pub(super) first: String,
}

#[derive(Clone, Copy, Serialize)]
pub(super) struct WarmUp {
    pub(super) seconds: f64,
    pub(super) steady: bool,
}

/// Two servers under one load, round by round.
#[derive(Serialize)]
pub(super) struct Ratio {
    pub(super) over: Role,
    pub(super) under: Role,
    pub(super) throughput: Option<Estimate>,
    pub(super) p50: Option<Estimate>,
    pub(super) p99: Option<Estimate>,
    /// The servers' CPU time for each answer.
    pub(super) server_cpu: Option<Estimate>,
}

/// The search for the highest rate that meets the objective.
#[derive(Serialize)]
pub(super) struct Ramp {
    pub(super) protocol: Wire,
    pub(super) role: Role,
    /// `None`: no rate met it.
    pub(super) rate: Option<f64>,
    /// In the order in which they were made.
    pub(super) probes: Vec<Probe>,
}

#[derive(Serialize)]
pub(super) struct Probe {
    pub(super) rate: f64,
    /// Answers a second.
    pub(super) throughput: f64,
    pub(super) p50_ms: f64,
    /// At the objective's quantile.
    pub(super) latency_ms: f64,
    pub(super) failures: u64,
    pub(super) met: bool,
}

#[derive(Default, Serialize)]
pub(super) struct Verdict {
    pub(super) errors: u64,
    /// Servers under a load that gave not one answer: failed, however many errors are allowed.
    pub(super) unanswered: usize,
    pub(super) max_errors: u64,
    pub(super) slo: Option<String>,
    /// Its limit.
    pub(super) slo_ms: Option<f64>,
    /// Whether every load met the objective; of a ramp, whether any did.
    pub(super) slo_met: Option<bool>,
}

impl Report {
    pub(super) fn empty(environment: Environment, settings: Settings) -> Report {
        Report {
            schema: SCHEMA,
            environment,
            settings,
            servers: Vec::new(),
            models: Vec::new(),
            cells: Vec::new(),
            ramps: Vec::new(),
            ceilings: Vec::new(),
            verdict: Verdict::default(),
        }
    }

    /// What the intervals are worth, where there are any.
    pub(super) fn confidence(&self) -> Option<f64> {
        let cell = self.cells.iter().flat_map(|cell| &cell.sides).find_map(|side| side.throughput.as_ref());
        let ceiling = self.ceilings.iter().flat_map(|ceiling| &ceiling.cells).map(|cell| &cell.rows_per_second);
        cell.or(ceiling.into_iter().next()).map(|estimate| estimate.confidence)
    }
}

impl Side {
    pub(super) fn of(role: Role, warm_up: Option<WarmUp>, rounds: &[Round]) -> Side {
        let each = |of: &dyn Fn(&Round) -> f64| Estimate::of(rounds.iter().map(of).collect());
        // A round without answers has no latency.
        let latency = |quantile: f64| {
            each(&|round| match round.latencies.is_empty() {
                true => f64::NAN,
                false => millis(&round.latencies, quantile),
            })
        };
        let cpu = |of: fn(&Round) -> Option<f64>| {
            each(&|round| match (of(round), round.answers) {
                (Some(seconds), answers @ 1..) => seconds * 1e6 / answers as f64,
                _ => f64::NAN,
            })
        };
        let (mut all, mut late) = (stats::histogram(), stats::histogram());
        let mut errors: Vec<Errors> = Vec::new();
        for round in rounds {
            // All histograms have the same bounds.
            let _ = all.add(&round.latencies);
            let _ = late.add(&round.lateness);
            for (kind, (count, first)) in &round.faults {
                match errors.iter_mut().find(|errors| errors.kind == *kind) {
                    Some(errors) => errors.count += count,
                    None => errors.push(Errors { kind: kind.clone(), count: *count, first: first.clone() }),
                }
            }
        }
        Side {
            role,
            warm_up,
            throughput: each(&|round| round.answers as f64 / round.seconds),
            latency_ms: Latencies {
                p50: latency(0.5),
                p90: latency(0.9),
                p99: latency(0.99),
                p999: latency(0.999),
                max: latency(1.0),
            },
            curve: curve(&all),
            latencies: all,
            late_p99_ms: millis(&late, 0.99),
            answers: rounds.iter().map(|round| round.answers).sum(),
            errors,
            unsent: rounds.iter().map(|round| round.unsent).sum(),
            client_cpu_us: cpu(|round| round.client_cpu),
            server_cpu_us: cpu(|round| round.server_cpu),
        }
    }

    /// Whether this part of all requests was answered within the limit, a failure being slower than any limit.
    pub(super) fn within(&self, quantile: f64, limit: Duration) -> bool {
        let failed: u64 = self.errors.iter().map(|errors| errors.count).sum();
        let answered = self.latencies.len() as f64;
        let quantile = quantile * (answered + failed as f64) / answered;
        self.answers > 0 && quantile <= 1.0 && millis(&self.latencies, quantile) <= limit.as_secs_f64() * 1e3
    }

    /// What did not end as it should: errors, and what was never sent.
    pub(super) fn failures(&self) -> u64 {
        self.errors.iter().map(|errors| errors.count).sum::<u64>() + self.unsent
    }
}

/// Of the answers that a rate asks for, the part without which the server did not keep up.
const KEPT_UP: f64 = 0.95;

impl Probe {
    /// Met by latencies, which count from when requests were due, without failures, and by as many answers as were
    /// asked for: arrivals that are drawn vary by their root.
    pub(super) fn of(rate: f64, quantile: f64, limit: Duration, round: &Round) -> Probe {
        let failures = round.faults.values().map(|(count, _)| count).sum::<u64>() + round.unsent;
        let latency_ms = millis(&round.latencies, quantile);
        // What was due last may be answered behind the window, and that is no backlog.
        let asked = rate * (round.seconds - latency_ms / 1e3).max(0.0);
        let kept_up = round.answers as f64 >= KEPT_UP * asked - 3.0 * asked.sqrt();
        Probe {
            rate,
            throughput: round.answers as f64 / round.seconds,
            p50_ms: millis(&round.latencies, 0.5),
            latency_ms,
            failures,
            met: failures == 0 && kept_up && !round.latencies.is_empty() && latency_ms <= limit.as_secs_f64() * 1e3,
        }
    }
}

impl Ratio {
    pub(super) fn of(over: &Side, under: &Side) -> Ratio {
        let ratio = |of: fn(&Side) -> Option<&Estimate>| Estimate::ratio(of(over)?, of(under)?);
        Ratio {
            over: over.role,
            under: under.role,
            throughput: ratio(|side| side.throughput.as_ref()),
            p50: ratio(|side| side.latency_ms.p50.as_ref()),
            p99: ratio(|side| side.latency_ms.p99.as_ref()),
            server_cpu: ratio(|side| side.server_cpu_us.as_ref()),
        }
    }
}

impl Environment {
    pub(super) fn read(cores: usize, begun: Duration) -> Environment {
        let line = |file: &str, name: &str| {
            let text = std::fs::read_to_string(file).ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim_start_matches([' ', '\t', ':']).trim().to_string())
        };
        Environment {
            tidegate: env!("CARGO_PKG_VERSION"),
            cpu: line("/proc/cpuinfo", "model name"),
            cores,
            kernel: line("/proc/sys/kernel/osrelease", ""),
            begun: begun.as_secs(),
        }
    }
}
