//! Deadlines and departures: answered in time, places freed at once.

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::time::Instant;

use serde_json::json;

use crate::support::{Models, TestServer, without_onnxruntime};

/// The `slow` trap takes about 4 µs a step: some 5 s.
const STEPS: u64 = 1_250_000;

fn slow(steps: u64) -> serde_json::Value {
    json!({"inputs": [{"name": "steps", "shape": [], "datatype": "INT64", "data": [steps]}]})
}

/// A server whose one instance of `slow` is busy, with the connection that keeps it so.
pub fn busy() -> (Models, TestServer, TcpStream) {
    let models = Models::new().with("slow");
    models.write("slow/model.toml", "instances = 1\n");
    let server = TestServer::of(models.path()).start();
    let holder = send(&server, &slow(STEPS).to_string());
    server.eventually("the long run is under way", |server| {
        server.metrics().sum("tidegate_running", &["model=\"slow\""]) == 1.0
    });
    (models, server, holder)
}

fn send(server: &TestServer, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.addresses.http).unwrap();
    let head = format!("POST /v2/models/slow/infer HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    stream
}

/// The long run is not over: its caller has no answer yet.
fn assert_still_running(holder: &TcpStream) {
    holder.set_nonblocking(true).unwrap();
    let answer = holder.peek(&mut [0]);
    assert!(matches!(&answer, Err(error) if error.kind() == ErrorKind::WouldBlock), "{answer:?}");
}

#[test]
fn a_deadline_behind_a_long_run_is_answered_in_time() {
    if without_onnxruntime() {
        return;
    }
    let (_models, server, holder) = busy();
    let mut request = slow(1);
    request["parameters"] = json!({"timeout": 50_000});
    let started = Instant::now();
    let reply = server.infer("slow", &request);
    let elapsed = started.elapsed();
    assert_eq!((reply.status, reply.error().as_str()), (504, "Request timeout expired"));
    assert_still_running(&holder);
    println!("a deadline of 50 ms was answered after {elapsed:?}");
    let reply = server.post_with("/v2/models/slow/infer", &[("X-Request-Timeout", "50")], slow(1).to_string());
    assert_eq!(reply.status, 504);
    assert_still_running(&holder);
    assert_eq!(server.metrics().sum("tidegate_queue_depth", &["model=\"slow\""]), 0.0);
}

#[test]
fn a_client_that_leaves_frees_its_place() {
    if without_onnxruntime() {
        return;
    }
    let (_models, server, holder) = busy();
    let waiting: Vec<TcpStream> = (0..8).map(|_| send(&server, &slow(1).to_string())).collect();
    server.eventually("eight wait", |s| s.metrics().sum("tidegate_queue_depth", &["model=\"slow\""]) == 8.0);
    drop(waiting);
    server.eventually("none waits", |s| s.metrics().sum("tidegate_queue_depth", &["model=\"slow\""]) == 0.0);
    server.eventually("eight are recorded as cancelled", |s| {
        s.metrics().sum("tidegate_requests_total", &["outcome=\"cancelled\""]) == 8.0
    });
    assert_still_running(&holder);
}

/// Some runs of it are quick, but how long one takes is for its input to say.
#[test]
fn a_run_as_long_as_its_input_says_holds_up_nobody() {
    if without_onnxruntime() {
        return;
    }
    let models = Models::new().with("slow").with("identity_fp32");
    let server = TestServer::of(models.path()).start();
    for _ in 0..20 {
        assert_eq!(server.infer("slow", &slow(1)).status, 200);
    }
    let holders: Vec<TcpStream> = (0..4).map(|_| send(&server, &slow(STEPS).to_string())).collect();
    server.eventually("all four are in", |server| server.metrics().sum("tidegate_inflight", &[]) == 4.0);
    let row = json!({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}]});
    assert_eq!(server.get("/v2/health/ready").status, 200);
    assert_eq!(server.infer("identity_fp32", &row).status, 200);
    holders.iter().for_each(assert_still_running);
}
