//! The one builder of servers for every integration test, and the small HTTP client and metrics reader they share.

use std::collections::BTreeMap;
use std::io::{BufRead, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use tidegate::config::{self, SETTINGS, Surroundings, Text};
use tidegate::request::Phase;
use tidegate::server::{self, Addresses, Drained, Hooks, OnPhase, ServerError, WhenListening};
use tokio::sync::oneshot;

/// How long a test waits for something that must happen: long enough for a busy machine, an end for a broken one.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Where `make build` puts the binary and ONNX Runtime's library.
pub fn build_dir() -> PathBuf {
    root().join("target/release")
}

/// Whether this run was told that ONNX Runtime's library cannot be had here.
#[allow(clippy::disallowed_methods, reason = "the switch of the test run itself")]
pub fn without_onnxruntime() -> bool {
    std::env::var_os("TIDEGATE_TEST_WITHOUT_ONNXRUNTIME").is_some()
}

/// The engines that tests run on: both, unless the run was told otherwise.
pub fn engines() -> Vec<&'static str> {
    let mut engines = vec!["onnxruntime", "tract"];
    engines.retain(|engine| match *engine {
        "onnxruntime" => !without_onnxruntime(),
        _ => cfg!(feature = "tract"),
    });
    engines
}

/// A folder of models that a test fills and changes as it likes.
pub struct Models {
    dir: tempfile::TempDir,
}

impl Models {
    pub fn new() -> Self {
        Models { dir: tempfile::tempdir().unwrap() }
    }

    /// Copies `models/<name>` or `tests/traps/<name>` whole.
    pub fn with(self, name: &str) -> Self {
        self.add(name);
        self
    }

    pub fn add(&self, name: &str) {
        copy_tree(&source(name), &self.path().join(name));
    }

    /// Copies one version under another number, complete only once it is named.
    pub fn add_version(&self, name: &str, from: &str, to: &str) {
        let staging = self.path().join(format!(".{name}-{to}"));
        copy_tree(&source(name).join(from), &staging);
        std::fs::create_dir_all(self.path().join(name)).unwrap();
        std::fs::rename(staging, self.path().join(name).join(to)).unwrap();
    }

    pub fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub fn remove(&self, path: &str) {
        std::fs::remove_dir_all(self.path().join(path)).unwrap();
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

fn source(name: &str) -> PathBuf {
    ["models", "tests/traps", "tests/traps_bad", "tests/safetensors/encoders"]
        .iter()
        .map(|folder| root().join(folder).join(name))
        .find(|path| path.is_dir())
        .unwrap_or_else(|| panic!("no model `{name}` in models/ or below tests/"))
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

pub struct Builder {
    settings: Vec<(&'static str, String)>,
    exe_dir: PathBuf,
    on_listening: WhenListening,
    on_phase: OnPhase,
}

/// A server in this process on free ports, stopped and joined when dropped.
pub struct TestServer {
    pub addresses: Addresses,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<Drained, ServerError>>>,
}

impl TestServer {
    pub fn of(registry: &Path) -> Builder {
        let mut settings: Vec<(&'static str, String)> =
            ["http_port", "grpc_port", "metrics_port", "admin_port"].map(|key| (key, "0".to_string())).into();
        settings.push(("registry", registry.to_str().unwrap().to_string()));
        settings.push(("host", "127.0.0.1".into()));
        settings.push(("lame_duck", "0".into()));
        settings.push(("poll_interval", "50ms".into()));
        if without_onnxruntime() {
            settings.push(("engine", "tract".into()));
        }
        Builder { settings, exe_dir: build_dir(), on_listening: Box::new(|_| {}), on_phase: Box::new(|_| {}) }
    }

    /// Tells the server to stop, without waiting.
    pub fn tell_to_stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// Stops and waits.
    pub fn stop(mut self) -> Drained {
        self.tell_to_stop();
        self.thread.take().unwrap().join().unwrap().unwrap()
    }

    pub fn get(&self, path: &str) -> Reply {
        exchange(self.addresses.http, "GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Reply {
        self.post_with(path, &[], body)
    }

    pub fn post_with(&self, path: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Reply {
        exchange(self.addresses.http, "POST", path, headers, body.as_ref())
    }

    /// POST to `/v2/models/<model>/infer`; `model` may hold `name/versions/1`.
    pub fn infer(&self, model: &str, request: &Value) -> Reply {
        self.post(&format!("/v2/models/{model}/infer"), request.to_string())
    }

    /// Sends bytes as they are and reads all that comes back until the server closes the connection, which is an error
    /// if it takes longer than [`PATIENCE`]. The server may close before it has read everything.
    pub fn raw(&self, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
        let stream = TcpStream::connect(self.addresses.http)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut answer = Vec::new();
        // Read while writing: with answers to many requests unread, the server would stop reading more of them.
        let read = std::thread::scope(|scope| {
            scope.spawn(|| (&stream).write_all(bytes));
            let read = (&stream).read_to_end(&mut answer);
            let _ = stream.shutdown(Shutdown::Both);
            read
        });
        match read {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => Err(error),
            _ => Ok(answer),
        }
    }

    pub fn metrics(&self) -> Metrics {
        let reply = exchange(self.addresses.metrics, "GET", "/metrics", &[], b"");
        assert_eq!(reply.status, 200);
        Metrics::parse(&reply.text())
    }

    /// Waits until `condition` holds of the server, looking again and again; fails the test if it never does.
    pub fn eventually(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let started = std::time::Instant::now();
        while !condition(self) {
            assert!(started.elapsed() < PATIENCE, "never happened: {what}");
            std::thread::yield_now();
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.tell_to_stop();
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join();
            if !std::thread::panicking() {
                outcome.expect("the server does not panic").expect("the server stops cleanly");
            }
        }
    }
}

impl Builder {
    /// Any key of docs/configuration.md.
    pub fn set(mut self, key: &'static str, value: impl ToString) -> Self {
        self.settings.retain(|(known, _)| *known != key);
        self.settings.push((key, value.to_string()));
        self
    }

    /// Where the server's binary is taken to lie; ONNX Runtime's library is looked for beside it.
    pub fn exe_dir(mut self, dir: &Path) -> Self {
        self.exe_dir = dir.into();
        self
    }

    /// Called on a thread of the server as soon as it listens, which may be long before it is ready.
    pub fn on_listening(mut self, hook: impl FnOnce(&Addresses) + Send + 'static) -> Self {
        self.on_listening = Box::new(hook);
        self
    }

    /// Called on a thread of the server with every phase, from the first on, before the phase takes effect.
    pub fn on_phase(mut self, hook: impl FnMut(Phase) + Send + 'static) -> Self {
        self.on_phase = Box::new(hook);
        self
    }

    pub fn start(self) -> TestServer {
        self.try_start().unwrap_or_else(|error| panic!("the server does not start: {error}"))
    }

    pub fn try_start(self) -> Result<TestServer, String> {
        let given = self
            .settings
            .iter()
            .map(|(key, value)| {
                let setting = SETTINGS.iter().find(|setting| setting.key == *key).expect("a known setting");
                (setting, Text { text: value.clone(), place: key.to_string() })
            })
            .collect();
        let surroundings = Surroundings {
            cores: 2,
            exe_dir: Some(self.exe_dir),
            temp_dir: std::env::temp_dir(),
            ..Surroundings::default()
        };
        let config = config::resolve(given, None, &surroundings).map_err(|problems| problems.to_string())?.server;
        let (stop, told) = oneshot::channel::<()>();
        let (ready, when_ready) = mpsc::channel();
        let hooks = Hooks {
            listening: self.on_listening,
            ready: Box::new(move |addresses, _| {
                let _ = ready.send(*addresses);
            }),
            stop: async move {
                {
                    let _ = told.await;
                }
            },
            phase: self.on_phase,
        };
        let thread = std::thread::spawn(move || server::run(config, hooks));
        match when_ready.recv_timeout(PATIENCE) {
            Ok(addresses) => Ok(TestServer { addresses, stop: Some(stop), thread: Some(thread) }),
            Err(_) => Err(match thread.join().expect("the server does not panic") {
                Ok(_) => "it stopped before it was ready".into(),
                Err(error) => error.to_string(),
            }),
        }
    }
}

/// An HTTP response, whole.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    /// The next response on an HTTP/1 connection; `None` at its end.
    pub fn read(stream: &mut impl BufRead) -> std::io::Result<Option<Reply>> {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let status = line.strip_prefix("HTTP/1.").and_then(|line| line.split(' ').nth(1)).and_then(|s| s.parse().ok());
        let mut reply = Reply { status: status.ok_or(ErrorKind::InvalidData)?, headers: Vec::new(), body: Vec::new() };
        loop {
            line.clear();
            if stream.read_line(&mut line)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            reply.headers.push((name.to_string(), value.trim().to_string()));
        }
        let length = reply.header("content-length").map_or(Ok(0), str::parse).map_err(|_| ErrorKind::InvalidData)?;
        reply.body.resize(length, 0);
        stream.read_exact(&mut reply.body)?;
        Ok(Some(reply))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.text()))
    }

    /// The `error` of an error body.
    pub fn error(&self) -> String {
        self.json()["error"].as_str().unwrap_or_else(|| panic!("no error in {}", self.text())).to_string()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The elements of an output of an inference response.
    pub fn output(&self, name: &str) -> Vec<f64> {
        let json = self.json();
        let outputs = json["outputs"].as_array().unwrap_or_else(|| panic!("no outputs in {}", self.text()));
        let output = outputs.iter().find(|output| output["name"] == name).expect("the output");
        output["data"].as_array().expect("data").iter().map(|x| x.as_f64().unwrap_or(f64::NAN)).collect()
    }
}

/// One request on a connection of its own.
pub fn exchange(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).build().into();
    let mut request = ureq::http::Request::builder().method(method).uri(format!("http://{address}{path}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut response = agent.run(request.body(body).unwrap()).unwrap();
    Reply {
        status: response.status().as_u16(),
        headers: response
            .headers()
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_string()))
            .collect(),
        body: response.body_mut().with_config().limit(1 << 30).read_to_vec().unwrap(),
    }
}

/// `/metrics`, by series as printed: `name{labels}` → value.
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub fn parse(text: &str) -> Metrics {
        let series = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not a sample: {line}"));
            (series.to_string(), value.parse().unwrap_or_else(|_| panic!("not a number: {line}")))
        });
        Metrics(series.collect())
    }

    /// The sum of all series of that name whose labels include all of `labels` (`model="m"`).
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        self.0
            .iter()
            .filter(|(series, _)| series.split('{').next() == Some(name))
            .filter(|(series, _)| labels.iter().all(|label| series.contains(label)))
            .map(|(_, value)| value)
            .sum()
    }

    /// How many series have all of `parts` in their name or labels.
    pub fn count(&self, parts: &[&str]) -> usize {
        self.0.keys().filter(|series| parts.iter().all(|part| series.contains(part))).count()
    }
}
