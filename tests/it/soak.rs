//! The real process: its memory under load that nobody scrapes, and how it stops.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use crate::support::{Metrics, Models, PATIENCE, Reply, exchange, without_onnxruntime};

/// `tidegate serve` on free ports, killed when dropped.
pub struct Process {
    child: Child,
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    metrics: SocketAddr,
    /// Its log, an object a line; ends with the process.
    log: Receiver<Value>,
}

impl Process {
    pub fn start(registry: &Path, settings: &[(&str, &str)]) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command.args(["serve", "--host", "127.0.0.1", "--log-format", "json", "--registry"]).arg(registry);
        command.args(["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--admin-port", "0"]);
        // What is set where the tests run must not configure it.
        command.env_clear().envs(settings.iter().copied());
        if without_onnxruntime() {
            command.env("TIDEGATE_ENGINE", "tract");
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, log) = mpsc::channel();
        thread::spawn(move || {
            for line in stderr.lines() {
                let line = line.unwrap();
                let object =
                    serde_json::from_str(&line).unwrap_or_else(|_| json!({"message": "not JSON", "line": line}));
                if send.send(object).is_err() {
                    break;
                }
            }
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut process = Process { child, http: nowhere, grpc: nowhere, metrics: nowhere, log };
        let ready = process.logged("ready");
        let address = |key: &str| ready[key].as_str().unwrap().parse().unwrap();
        (process.http, process.grpc, process.metrics) = (address("http"), address("grpc"), address("metrics"));
        process
    }

    /// The next log line whose message starts so.
    fn logged(&self, message: &str) -> Value {
        loop {
            let line = self.log.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("no `{message}`: {error}"));
            assert_ne!(line["message"], "not JSON", "{line}");
            if line["message"].as_str().is_some_and(|found| found.starts_with(message)) {
                return line;
            }
        }
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.child.id())]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits until it has ended.
    fn ended(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "the process does not end");
            thread::yield_now();
        }
    }

    /// Bytes.
    pub fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most that was resident since [`Process::forget_peak`], in bytes.
    pub fn peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    pub fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }

    fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a field of the process's status");
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    pub fn scrape(&self) -> Metrics {
        Metrics::parse(&exchange(self.metrics, "GET", "/metrics", &[], b"").text())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn post(model: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST /v2/models/{model}/infer HTTP/1.1\r\nHost: test\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

fn registry() -> Models {
    Models::new().with("digits").with("tumor").with("sentinel")
}

fn tumor() -> Vec<u8> {
    json!({"inputs": [{"name": "features", "shape": [1, 30], "datatype": "FP32", "data": vec![1.5; 30]}]})
        .to_string()
        .into()
}

const ORDINARY: usize = 8;

/// What clients send all day, with the status each gets. The number makes names and ids new every time: labels, caches and
/// interned texts must not keep them.
fn ordinary(number: usize) -> [(Vec<u8>, u16); ORDINARY] {
    let header = r#"{"inputs":[{"name":"x","shape":[2,8],"datatype":"FP32","parameters":{"binary_data_size":64}}],"parameters":{"binary_data_output":true}}"#;
    let binary = [header.as_bytes(), &[0x3f; 64]].concat();
    let length = format!("Inference-Header-Content-Length: {}\r\n", header.len());
    let image = json!({"id": format!("request-{number}"), "inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": vec![number % 17; 64]}]});
    let wrong =
        json!({"inputs": [{"name": format!("input-{number}"), "shape": [1, 1], "datatype": "INT8", "data": [1]}]});
    [
        (post("digits", "", image.to_string().as_bytes()), 200),
        (post("tumor", "", &tumor()), 200),
        (post("sentinel", &length, &binary), 200),
        (post("tumor/versions/1", "Accept-Encoding: gzip\r\n", &tumor()), 200),
        (post(&format!("unknown-{number}"), "", &tumor()), 404),
        (post("tumor", "", &tumor()[..100]), 400),
        (post("tumor", "Content-Encoding: gzip\r\n", &tumor()), 400),
        (post("digits", "", wrong.to_string().as_bytes()), 400),
    ]
}

const CLIENTS: usize = 4;
/// Times that each client sends all `ordinary` requests in a round.
const REPEATS: usize = 500;
/// Requests of a round.
const ROUND: usize = CLIENTS * REPEATS * ORDINARY;

/// One round of load from all clients at once. Returns when everything is answered.
fn load(address: SocketAddr, round: usize) {
    let client = |client: usize| {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reader = BufReader::new(&stream);
        for repeat in 0..REPEATS {
            let requests = ordinary((round * CLIENTS + client) * REPEATS + repeat);
            // In one piece: the load is on the server, not on the wire.
            let bytes: Vec<u8> = requests.iter().flat_map(|(bytes, _)| bytes).copied().collect();
            (&stream).write_all(&bytes).unwrap();
            for (_, status) in &requests {
                let reply = Reply::read(&mut reader).unwrap().expect("an answer to every request");
                assert_eq!(reply.status, *status, "{}", reply.text());
            }
        }
    };
    thread::scope(|scope| (0..CLIENTS).for_each(|i| drop(scope.spawn(move || client(i)))));
}

/// The short form of an hour: what leaks, leaks per request. Memory rises while pools and caches fill and then stays:
/// wanted is a stretch of rounds in which it rises by less than 16 bytes a request. A leak of 64 bytes, or of the smallest
/// allocation there is (32 with the allocator's own), would rise by more in every stretch.
#[test]
fn memory_stays_flat_under_load_that_nobody_scrapes() {
    const STRETCH: usize = 8;
    const MOST_ROUNDS: usize = 100;
    const BOUND: u64 = (16 * ROUND * STRETCH) as u64;
    let models = registry();
    let process = Process::start(models.path(), &[]);
    let mut sizes = Vec::new();
    let flat = (0..MOST_ROUNDS).any(|round| {
        load(process.http, round);
        sizes.push(process.resident());
        let before = sizes.len().checked_sub(STRETCH + 1).map(|at| sizes[at]);
        before.is_some_and(|before| sizes[sizes.len() - 1] < before + BOUND)
    });
    assert!(flat, "bytes after each round of {ROUND} requests: {sizes:?}");

    let metrics = process.scrape();
    let counted = metrics.sum("tidegate_requests_total", &[]) + metrics.sum("tidegate_requests_refused_total", &[]);
    assert_eq!(counted, (sizes.len() * ROUND) as f64);
    assert_eq!(metrics.sum("tidegate_inflight", &[]), 0.0);
    let named = metrics.count(&["unknown-"]) + metrics.count(&["request-"]) + metrics.count(&["input-"]);
    assert_eq!(named, 0, "series are named by what clients invent");
}

#[test]
fn sigterm_under_load_loses_nothing() {
    let models = registry();
    let mut process = Process::start(models.path(), &[]);
    let (told, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (address, request) = (process.http, post("tumor", "", &tumor()));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let sent = send(address, &request);
                    // What had been sent by then is answered; later ones may find the door closed.
                    let early = !told.load(Ordering::SeqCst);
                    match sent.and_then(|stream| Reply::read(&mut BufReader::new(stream))) {
                        Ok(Some(reply)) => assert_eq!(reply.status, 200, "{}", reply.text()),
                        outcome if early => panic!("a request that came before the signal was lost: {outcome:?}"),
                        Err(error) if error.kind() == ErrorKind::UnexpectedEof => panic!("an answer was cut: {error}"),
                        _ => break,
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while answered.load(Ordering::Relaxed) < 100 {
            thread::yield_now();
        }
        told.store(true, Ordering::SeqCst);
        process.signal("TERM");
    });
    assert_eq!(process.ended().code(), Some(0));
    process.logged("stopped; everything accepted was answered");
}

/// Sends a request on a connection of its own.
fn send(address: SocketAddr, request: &[u8]) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request)?;
    Ok(stream)
}

fn ask(address: SocketAddr, request: &[u8]) -> Reply {
    let stream = send(address, request).unwrap();
    Reply::read(&mut BufReader::new(stream)).unwrap().expect("an answer")
}

/// A server whose one instance of `slow` runs for about a second, with the connection that waits for it.
fn computing() -> (Models, Process, TcpStream) {
    let models = Models::new().with("slow");
    let process = Process::start(models.path(), &[("TIDEGATE_LAME_DUCK", "0")]);
    let body = json!({"inputs": [{"name": "steps", "shape": [], "datatype": "INT64", "data": [250_000]}]}).to_string();
    let stream = send(process.http, &post("slow", "", body.as_bytes())).unwrap();
    let started = Instant::now();
    while process.scrape().sum("tidegate_inflight", &[]) < 1.0 {
        assert!(started.elapsed() < PATIENCE, "the request never arrives");
    }
    (models, process, stream)
}

#[test]
fn sigterm_waits_for_what_is_being_computed() {
    if without_onnxruntime() {
        return;
    }
    let (_models, mut process, stream) = computing();
    process.signal("TERM");
    let reply = Reply::read(&mut BufReader::new(stream)).unwrap().expect("an answer");
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(process.ended().code(), Some(0));
    process.logged("stopped; everything accepted was answered");
}

#[test]
fn a_stop_says_what_remains_and_for_how_long() {
    let models = Models::new().with("tumor");
    let settings = [("TIDEGATE_LAME_DUCK", "0"), ("TIDEGATE_DRAIN_TIMEOUT", "10m"), ("TIDEGATE_TIMEOUTS_BODY", "10m")];
    let mut process = Process::start(models.path(), &settings);
    // All but the last byte, and enough of them not to be taken for a slow sender's.
    let request = post("tumor", "", &[tumor(), vec![b' '; 256 << 10]].concat());
    let (most, last) = request.split_at(request.len() - 1);
    let mut stream = send(process.http, most).unwrap();
    let started = Instant::now();
    while process.scrape().sum("tidegate_inflight", &[]) < 1.0 {
        assert!(started.elapsed() < PATIENCE, "the request never arrives");
    }
    process.signal("TERM");
    let remaining = |message: &str| {
        let line = process.logged(message);
        let seconds = line["seconds_left"].as_f64().unwrap();
        (
            line["phase"].as_str().unwrap().to_string(),
            [&line["connections"], &line["requests"]].map(Value::as_u64),
            seconds,
        )
    };
    for (message, phase, most) in
        [("phase", "lame_duck", 0.0), ("phase", "draining", 600.0), ("still", "draining", 600.0)]
    {
        let (found, counts, seconds) = remaining(message);
        assert_eq!((found.as_str(), counts), (phase, [Some(1); 2]), "{message}");
        assert!((0.0..=most).contains(&seconds), "{message} {phase}: {seconds} s");
    }
    stream.write_all(last).unwrap();
    assert_eq!(Reply::read(&mut BufReader::new(stream)).unwrap().expect("an answer").status, 200);
    let stopping = std::iter::repeat_with(|| remaining("phase")).find(|(phase, ..)| phase == "stopping");
    assert_eq!(stopping.unwrap().1, [Some(0); 2]);
    assert_eq!(process.ended().code(), Some(0));
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let models = Models::new().with("tumor");
    // Without the second one it would go on serving for ten minutes.
    let mut process = Process::start(models.path(), &[("TIDEGATE_LAME_DUCK", "10m")]);
    process.signal("TERM");
    process.logged("stopping");
    assert_eq!(ask(process.http, &post("tumor", "", &tumor())).status, 200);
    process.signal("TERM");
    assert_eq!(process.ended().code(), Some(130));
}

/// F6 of the fault catalogue: `Process` reads every line of the log as JSON, `logged` insists.
#[test]
fn what_clients_send_cannot_forge_log_lines() {
    let models = Models::new().with("tumor");
    let mut process = Process::start(models.path(), &[("TIDEGATE_LOG_LEVEL", "trace")]);
    let forged = "%0D%0A%7B%22message%22%3A%22forged%22%7D%1B%5B31m";
    let name = json!({"id": "\r\nforged\u{1b}[31m\0", "inputs": [{"name": "\nforged", "shape": [1], "datatype": "\u{202e}", "data": [1]}]});
    for request in [
        post(forged, "", &tumor()),
        post("tumor", "X-Routing-Key: \u{1b}[31mforged\r\nContent-Encoding: \u{1b}forged\r\n", &tumor()),
        post("tumor", "", name.to_string().as_bytes()),
    ] {
        let reply = ask(process.http, &request);
        assert!((400..500).contains(&reply.status), "{}", reply.status);
    }
    process.signal("TERM");
    process.logged("stopped; everything");
    assert_eq!(process.ended().code(), Some(0));
}
