//! Instructions a request, where times would tell of the neighbours: a guard for the hot path.
//!
//! `make instructions` runs this binary under valgrind, twice for each way through the server, and takes the difference:
//! what starting costs is in both. The engine answers at once and one thread asks, so that what is counted is the server's
//! own work. Counts belong to a compiler and to the features that valgrind's processor has, so the file they are held
//! against, benches/instructions.txt, is of x86-64 and is written anew with the compiler (`BLESS=1`).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use tidegate::backend::fake::Fake;
use tokio::runtime::Runtime;

use crate::engine::{WIDTH, infer, request, serve};
use crate::grpc;
use crate::rest::{self, Form};

/// What was asked for on the command line to get here.
pub const NAME: &str = "instructions";
/// More than this share above what is written down is a failure; more below is worth writing down.
const TOLERANCE: f64 = 0.10;
/// Requests of the two runs.
const FEW: u64 = 100;
const MANY: u64 = 600;
/// Rows of the larger requests.
const ROWS: usize = 128;

type Scenario = (&'static str, fn(&Runtime, u64));

const SCENARIOS: &[Scenario] = &[
    ("engine", through_engine),
    ("rest binary", |runtime, count| through_rest(runtime, count, 1, Form::Binary, Form::Binary)),
    ("rest json", |runtime, count| through_rest(runtime, count, 1, Form::Json, Form::Json)),
    ("rest json in, 128 rows", |runtime, count| through_rest(runtime, count, ROWS, Form::Json, Form::Binary)),
    ("rest json out, 128 rows", |runtime, count| through_rest(runtime, count, ROWS, Form::Binary, Form::Json)),
    ("grpc raw", |runtime, count| through_grpc(runtime, count, 1, true)),
    ("grpc typed, 128 rows", |runtime, count| through_grpc(runtime, count, ROWS, false)),
];

fn through_engine(runtime: &Runtime, count: u64) {
    let fake = Fake::echo(WIDTH);
    let served = serve(fake.clone());
    for _ in 0..count {
        runtime.block_on(infer(&served.engine, request(&fake)));
    }
}

fn through_rest(runtime: &Runtime, count: u64, rows: usize, asked: Form, answered: Form) {
    let (input, router, _served) = rest::router();
    let sent = rest::request(&input, rows, asked, answered);
    for _ in 0..count {
        runtime.block_on(rest::post(router.clone(), &sent));
    }
}

fn through_grpc(runtime: &Runtime, count: u64, rows: usize, raw: bool) {
    let (input, router, _served) = grpc::router();
    let message = grpc::request(&input, rows, raw);
    for _ in 0..count {
        runtime.block_on(grpc::call(router.clone(), &message));
    }
}

/// With a scenario and a count behind its name: runs them, and nothing else. Without: the guard.
pub fn main(arguments: &[String]) -> ExitCode {
    match arguments {
        [scenario, count] => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (_, run) = SCENARIOS.iter().find(|(name, _)| name == scenario).unwrap();
            run(&runtime, count.parse().unwrap());
            ExitCode::SUCCESS
        }
        _ if !cfg!(target_arch = "x86_64") => skipped("counts are written down for x86-64 only"),
        _ if Command::new("valgrind").arg("--version").output().is_err() => skipped("valgrind is not installed"),
        _ => guard(),
    }
}

fn skipped(why: &str) -> ExitCode {
    println!("instructions: skipped, since {why}");
    ExitCode::SUCCESS
}

fn guard() -> ExitCode {
    let known = written_down();
    let mut found = BTreeMap::new();
    let mut worse = false;
    for (name, _) in SCENARIOS {
        let count = (counted(name, MANY) - counted(name, FEW)) / (MANY - FEW);
        let change = known.get(*name).map(|before| count as f64 / *before as f64 - 1.0);
        let verdict = match change {
            None => "not written down",
            Some(change) if change > TOLERANCE => "too many",
            Some(change) if change < -TOLERANCE => "fewer: write it down with BLESS=1",
            Some(_) => "",
        };
        worse |= change.is_none_or(|change| change > TOLERANCE);
        println!("{name:24} {count:>10} {:>+8.1} %  {verdict}", 100.0 * change.unwrap_or_default());
        found.insert(*name, count);
    }
    if std::env::var_os("BLESS").is_some() {
        let lines: String = SCENARIOS.iter().map(|(name, _)| format!("{}\t{name}\n", found[name])).collect();
        std::fs::write(path(), lines).unwrap();
        return ExitCode::SUCCESS;
    }
    if worse { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn path() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/benches/instructions.txt").into()
}

fn written_down() -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(path()).unwrap_or_default();
    let pair = |line: &str| line.split_once('\t').map(|(count, name)| (name.to_string(), count.parse().unwrap()));
    text.lines().filter_map(pair).collect()
}

/// Instructions of a whole run, on all its threads.
fn counted(scenario: &str, requests: u64) -> u64 {
    let this = std::env::current_exe().unwrap();
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]);
    let output = valgrind.arg(this).args([NAME, scenario, &requests.to_string()]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{scenario} under valgrind: {said}");
    let line = said.lines().find(|line| line.contains("I   refs:") || line.contains("I refs:")).unwrap();
    let digits: String = line.rsplit(':').next().unwrap().chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}
