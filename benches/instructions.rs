//! Instructions a request, where times would tell of the neighbours: a guard for the hot path.
//!
//! `make instructions` runs this binary under valgrind, which tells what was executed from each request to the next, on
//! all threads. Every request runs on its caller's thread, however long it takes here, so that the same is counted each
//! time, what monitoring does behind it too; the figure is the least of many requests. The engine answers at once and
//! one caller asks, so that what is counted is the server's own work. Counts belong to a compiler and to the features
//! that valgrind's processor has: the file they are held against, benches/instructions.txt, is of x86-64 and is written
//! anew with the compiler (`BLESS=1`).

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use tidegate::backend::fake::Fake;
use tidegate::monitor::Monitor;
use tokio::runtime::Runtime;

use crate::engine::{WIDTH, infer, request, serve_with};
use crate::grpc;
use crate::rest::{self, Form};

/// What was asked for on the command line to get here.
pub const NAME: &str = "instructions";
/// More than this share above what is written down is a failure; more below is worth writing down.
const TOLERANCE: f64 = 0.10;
/// Requests before it counts: the server learns how long a run takes.
const WARM_UP: usize = 200;
/// Requests that count.
const REQUESTS: usize = 200;
/// Rows of the larger requests.
const ROWS: usize = 128;

type Scenario = (&'static str, fn(&Runtime));

const SCENARIOS: &[Scenario] = &[
    ("engine", |runtime| through_engine(runtime, "", true)),
    ("engine, unbatched", |runtime| through_engine(runtime, "batching = false", true)),
    ("engine, unmonitored", |runtime| through_engine(runtime, "", false)),
    ("rest binary", |runtime| through_rest(runtime, 1, Form::Binary, Form::Binary)),
    ("rest json", |runtime| through_rest(runtime, 1, Form::Json, Form::Json)),
    ("rest json in, 128 rows", |runtime| through_rest(runtime, ROWS, Form::Json, Form::Binary)),
    ("rest json out, 128 rows", |runtime| through_rest(runtime, ROWS, Form::Binary, Form::Json)),
    ("grpc raw", |runtime| through_grpc(runtime, 1, true)),
    ("grpc typed, 128 rows", |runtime| through_grpc(runtime, ROWS, false)),
];

fn through_engine(runtime: &Runtime, settings: &str, monitored: bool) {
    let fake = Fake::echo(WIDTH);
    let served = serve_with(fake.clone(), settings, Monitor::measuring(monitored));
    repeat(|| runtime.block_on(infer(&served.engine, request(&fake))));
}

fn through_rest(runtime: &Runtime, rows: usize, asked: Form, answered: Form) {
    let (input, service, _served) = rest::service();
    let sent = rest::request(&input, rows, asked, answered);
    repeat(|| runtime.block_on(rest::post(&service, &sent)));
}

fn through_grpc(runtime: &Runtime, rows: usize, raw: bool) {
    let (input, service, _served) = grpc::service();
    let message = grpc::request(&input, rows, raw);
    repeat(|| runtime.block_on(grpc::call(&service, &message)));
}

fn repeat(mut one: impl FnMut()) {
    (0..WARM_UP).for_each(|_| one());
    for _ in 0..REQUESTS {
        next_request();
        one();
    }
    next_request();
}

/// Where valgrind writes down what it counted so far, and begins again.
#[inline(never)]
fn next_request() {
    black_box(());
}
/// As valgrind finds it, whatever the compiler puts around the name.
const NEXT_REQUEST: &str = "*next_request*";

/// With a scenario behind its name: runs it, and nothing else. Without: the guard.
pub fn main(arguments: &[String]) -> ExitCode {
    match arguments {
        [scenario] => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (_, run) = SCENARIOS.iter().find(|(name, _)| name == scenario).unwrap();
            run(&runtime);
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
        let count = counted(name);
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

/// Instructions of one request.
fn counted(scenario: &str) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", &format!("--dump-before={NEXT_REQUEST}")]);
    valgrind.arg(format!("--callgrind-out-file={}/counts", folder.path().display()));
    let output = valgrind.arg(std::env::current_exe().unwrap()).args([NAME, scenario]).output().unwrap();
    assert!(output.status.success(), "{scenario} under valgrind: {}", String::from_utf8_lossy(&output.stderr));
    // The first is of all that came before the first request that counts; what came after the last has no number.
    let counts: Vec<u64> =
        (2..).map_while(|part| total(&folder.path().join(format!("counts.{part}")))).take(REQUESTS).collect();
    assert_eq!(counts.len(), REQUESTS, "{scenario}: counts of other requests than were made");
    counts.into_iter().min().unwrap_or_default()
}

/// What one of callgrind's files sums up to.
fn total(path: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("summary:").or(line.strip_prefix("totals:")));
    Some(line.unwrap().trim().parse().unwrap())
}
