//! Hostile requests over raw sockets, each followed by a check that the server is unharmed.
//!
//! Row names are those of the project's fault catalogue: A is HTTP, B the JSON body, C the binary tensor extension,
//! D gRPC, E shapes, datatypes and values, F strings. A [`Case`] says what is sent and which statuses are right;
//! [`Target`] sends it, judges the answers and looks after the server. [`grpc::Port`] is the same for gRPC.
//!
//! | rows over gRPC | tests, each named after its row |
//! |---|---|
//! | D1, D2, D4 to D6, D8, D19 | `http2` |
//! | D10 to D18, D20 | `grpc`, `d10_…` and on; of streams: `stream.rs` |
//! | D10, D11, D13: what they cost | `grpc_memory` |
//! | D21, D22 | `grpc_memory`: `d21_…`, `d22_…`; watches and streams one past their limits: `grpc.rs`, `stream.rs` |
//! | E1 to E7, E10 to E16 | `grpc_shapes`, `e1_…` and on |

mod binary;
mod grpc;
mod grpc_memory;
mod grpc_shapes;
mod http;
mod http2;
mod json;
mod shapes;
mod strings;

use serde_json::Value;

use crate::support::{Builder, Models, Reply, TestServer, root, without_onnxruntime};

/// Longest error body, in bytes.
const MAX_ERROR: usize = 1 << 10;
/// Longest stretch of the client's own bytes that an error may repeat.
const MAX_QUOTE: usize = 64;
/// As much of what was sent is searched for in the error.
const SEARCHED: usize = 16 << 10;
/// `max_batch_size` of `sentinel`.
const MAX_ROWS: usize = 8;

/// One hostile connection and the answers that are right.
struct Case {
    row: &'static str,
    what: String,
    sent: Vec<u8>,
    /// How many answers come before the server closes the connection.
    answers: usize,
    /// Each of them has one of these statuses.
    statuses: &'static [u16],
    /// Refused by the HTTP layer before there was a request: without a body.
    bare: bool,
    /// Inferences that metrics must have counted, each once.
    counted: usize,
}

impl Case {
    /// What is no inference, or none that is counted.
    fn http(row: &'static str, what: impl Into<String>, sent: impl Into<Vec<u8>>, statuses: &'static [u16]) -> Case {
        Case { row, what: what.into(), sent: sent.into(), answers: 1, statuses, bare: false, counted: 0 }
    }

    /// One infer request.
    fn infer(row: &'static str, what: impl Into<String>, sent: impl Into<Vec<u8>>, statuses: &'static [u16]) -> Case {
        Case { counted: 1, ..Case::http(row, what, sent, statuses) }
    }

    /// Several infer requests on one connection, sent without waiting for answers.
    fn pipelined(row: &'static str, what: impl Into<String>, requests: Vec<Vec<u8>>, statuses: &'static [u16]) -> Case {
        let count = requests.len();
        let case = Case::infer(row, what, requests.concat(), statuses);
        Case { answers: count, counted: count, ..case }
    }

    /// A refusal by the HTTP layer itself.
    fn bare(self) -> Case {
        Case { bare: true, ..self }
    }

    fn answered(self, answers: usize) -> Case {
        Case { answers, ..self }
    }

    fn name(&self) -> String {
        format!("{} ({})", self.row, self.what)
    }
}

/// A server with a registry of targets, and how it answered before anything hostile was sent.
struct Target {
    server: TestServer,
    models: Models,
    golden: Value,
}

impl Target {
    fn new() -> Target {
        Target::with(|server| server)
    }

    fn with(configure: impl FnOnce(Builder) -> Builder) -> Target {
        let models = ["digits", "sentinel", "sum_rows", "gather", "scalar", "fixed_batch", "nan_maker"]
            .into_iter()
            .fold(Models::new(), Models::with);
        let models = IDENTITIES.iter().fold(models, |models, (model, _)| models.with(model));
        models.write("sentinel/model.toml", format!("[batching]\nmax_batch_size = {MAX_ROWS}\n"));
        let server = configure(TestServer::of(models.path())).start();
        let golden = golden(&server);
        Target { server, models, golden }
    }

    /// Runs every case and reports all that went wrong at once.
    fn run(&self, cases: impl IntoIterator<Item = Case>) {
        let faults: Vec<String> = cases.into_iter().filter_map(|case| self.judge(&case).err()).collect();
        assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
    }

    /// The answer to one case, for a closer look.
    fn answer(&self, case: Case) -> Reply {
        self.judge(&case).unwrap_or_else(|fault| panic!("{fault}")).pop().expect("an answer")
    }

    fn judge(&self, case: &Case) -> Result<Vec<Reply>, String> {
        let before = self.counted();
        let replies = self.exchange(case).map_err(|fault| format!("{}: {fault}", case.name()));
        self.is_unharmed(&case.name());
        let counted = self.counted() - before - 1.0;
        if replies.is_ok() && counted != case.counted as f64 {
            return Err(format!("{}: {counted} inferences were counted, expected {}", case.name(), case.counted));
        }
        replies
    }

    fn exchange(&self, case: &Case) -> Result<Vec<Reply>, String> {
        let answer = self.server.raw(&case.sent).map_err(|error| format!("the connection stayed open: {error}"))?;
        let (mut stream, mut replies) = (&answer[..], Vec::new());
        while let Some(reply) = Reply::read(&mut stream).map_err(|error| format!("the answer is no HTTP/1: {error}"))? {
            replies.push(reply);
        }
        if replies.len() != case.answers {
            return Err(format!("{} answers, expected {}: {replies:?}", replies.len(), case.answers));
        }
        replies.iter().try_for_each(|reply| self.acceptable(case, reply))?;
        Ok(replies)
    }

    fn acceptable(&self, case: &Case, reply: &Reply) -> Result<(), String> {
        let (status, text) = (reply.status, reply.text());
        if !case.statuses.contains(&status) {
            return Err(format!("{status}, expected {:?}: {text:.200}", case.statuses));
        }
        if status < 400 || (case.bare && text.is_empty()) {
            return Ok(());
        }
        // What a client sends is never the server's failure: but 501 is "not offered", 503 "not now", 504 "too late".
        if status >= 500 && ![501, 503, 504].contains(&status) {
            return Err(format!("{status}: {text:.200}"));
        }
        let json: Value = serde_json::from_slice(&reply.body).map_err(|error| format!("{error} in {text}"))?;
        let message = json["error"].as_str().ok_or_else(|| format!("no `error` in {text}"))?;
        if reply.body.len() > MAX_ERROR {
            return Err(format!("an error of {} bytes", reply.body.len()));
        }
        self.fit_for_clients(&case.sent, message)
    }

    /// An error is short, and holds neither our paths nor much of the client's own bytes.
    fn fit_for_clients(&self, sent: &[u8], message: &str) -> Result<(), String> {
        if message.len() > MAX_ERROR {
            return Err(format!("an error of {} bytes", message.len()));
        }
        let root = root();
        let ours = [self.models.path(), &root].map(|path| path.to_str().unwrap());
        let paths = [&ours[..], &["/tmp/", "/home/", "/usr/", "src/"]].concat();
        if let Some(path) = paths.iter().find(|path| message.contains(*path)) {
            return Err(format!("`{path}` in {message}"));
        }
        let sent = &sent[..sent.len().min(SEARCHED)];
        let repeats = |window: &[u8]| sent.windows(window.len()).any(|part| part == window);
        match message.as_bytes().windows(MAX_QUOTE + 1).find(|window| repeats(window)) {
            Some(window) => Err(format!("repeats what was sent: {}", String::from_utf8_lossy(window))),
            None => Ok(()),
        }
    }

    /// Live, ready, answering as before, and holding nothing of what was sent.
    fn is_unharmed(&self, after: &str) {
        for path in ["/v2/health/live", "/v2/health/ready"] {
            assert_eq!(self.server.get(path).status, 200, "{path} after {after}");
        }
        assert_eq!(golden(&self.server), self.golden, "after {after}");
        self.server.eventually(&format!("nothing is in flight after {after}"), |server| {
            let metrics = server.metrics();
            ["inflight", "inflight_bytes", "queue_depth", "queue_bytes"]
                .iter()
                .all(|gauge| metrics.sum(&format!("tidegate_{gauge}"), &[]) == 0.0)
        });
    }

    /// Inferences that were begun or refused.
    fn counted(&self) -> f64 {
        let metrics = self.server.metrics();
        metrics.sum("tidegate_requests_total", &[]) + metrics.sum("tidegate_requests_refused_total", &[])
    }
}

/// The outputs for a real image, every digit of them.
fn golden(server: &TestServer) -> Value {
    let sample = std::fs::read_to_string(root().join("models/digits/sample.json")).unwrap();
    let reply = server.post("/v2/models/digits/infer", sample);
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["outputs"].take()
}

/// The identity models and their datatypes: of those, tract lacks BF16.
const IDENTITIES: [(&str, &str); 14] = [
    ("identity_bool", "BOOL"),
    ("identity_uint8", "UINT8"),
    ("identity_uint16", "UINT16"),
    ("identity_uint32", "UINT32"),
    ("identity_uint64", "UINT64"),
    ("identity_int8", "INT8"),
    ("identity_int16", "INT16"),
    ("identity_int32", "INT32"),
    ("identity_int64", "INT64"),
    ("identity_fp16", "FP16"),
    ("identity_bf16", "BF16"),
    ("identity_fp32", "FP32"),
    ("identity_fp64", "FP64"),
    ("identity_bytes", "BYTES"),
];

/// Those that the engine of this run serves.
fn identities() -> impl Iterator<Item = (&'static str, &'static str)> {
    IDENTITIES.into_iter().filter(|(_, datatype)| *datatype != "BF16" || !without_onnxruntime())
}

/// A request as bytes: `line` is its first line without the version.
fn request(line: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{line} HTTP/1.1\r\nHost: test\r\n").into_bytes();
    for (name, value) in headers {
        bytes.extend(format!("{name}: {value}\r\n").as_bytes());
    }
    bytes.extend(b"\r\n");
    bytes.extend(body);
    bytes
}

const CLOSE: (&str, &str) = ("Connection", "close");

fn get(path: &str) -> Vec<u8> {
    request(&format!("GET {path}"), &[CLOSE], b"")
}

fn post(path: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = body.len().to_string();
    request(&format!("POST {path}"), &[headers, &[("Content-Length", &length), CLOSE]].concat(), body)
}

fn path(model: &str) -> String {
    format!("/v2/models/{model}/infer")
}

/// An infer request with a JSON body.
fn infer(model: &str, body: impl AsRef<[u8]>) -> Vec<u8> {
    post(&path(model), &[], body)
}

/// Infer requests for one connection, which the last one closes.
fn series<'a>(model: &str, bodies: impl IntoIterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
    let open =
        |body: &[u8]| request(&format!("POST {}", path(model)), &[("Content-Length", &body.len().to_string())], body);
    let mut requests: Vec<Vec<u8>> = bodies.into_iter().map(open).collect();
    let last = requests.last_mut().expect("at least one request");
    let head = last.windows(2).position(|two| two == b"\r\n").unwrap() + 2;
    last.splice(head..head, b"Connection: close\r\n".iter().copied());
    requests
}

/// The JSON of a request with the input `x`; `rest` is what follows its datatype, from the comma on.
fn x(datatype: &str, shape: &str, rest: &str) -> String {
    format!(r#"{{"inputs":[{{"name":"x","shape":{shape},"datatype":"{datatype}"{rest}}}]}}"#)
}

/// The same with `data`.
fn x_data(datatype: &str, shape: &str, data: &str) -> String {
    x(datatype, shape, &format!(r#","data":{data}"#))
}

/// One row for `sentinel`.
fn sentinel() -> String {
    x_data("FP32", "[1,8]", "[0,1,2,3,4,5,6,7]")
}
