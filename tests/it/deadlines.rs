//! Deadlines and departures: answered in time, places freed at once.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Models, TestServer, without_onnxruntime};

/// The `slow` trap takes about 4 µs a step: some 5 s.
const STEPS: u64 = 1_250_000;

fn slow(steps: u64) -> serde_json::Value {
    json!({"inputs": [{"name": "steps", "shape": [], "datatype": "INT64", "data": [steps]}]})
}

/// A server whose one instance of `slow` is busy, with the connection that keeps it so.
fn busy() -> (Models, TestServer, TcpStream) {
    let models = Models::new().with("slow");
    models.write("slow/model.toml", "instances = 1\n");
    let server = TestServer::of(models.path()).start();
    let holder = send(&server, &slow(STEPS).to_string());
    server.eventually("the long run is under way", |server| {
        server.metrics().sum("tidegate_in_flight_requests", &[]) == 1.0
            && server.metrics().sum("tidegate_queue_depth", &["model=\"slow\""]) == 0.0
    });
    (models, server, holder)
}

fn send(server: &TestServer, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.addresses.http).unwrap();
    let head = format!("POST /v2/models/slow/infer HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    stream
}

#[test]
fn a_deadline_behind_a_long_run_is_answered_in_time() {
    if without_onnxruntime() {
        return;
    }
    let (_models, server, _holder) = busy();
    let mut request = slow(1);
    request["parameters"] = json!({"timeout": 50_000});
    let started = Instant::now();
    let reply = server.infer("slow", &request);
    let elapsed = started.elapsed();
    assert_eq!((reply.status, reply.error().as_str()), (504, "Request timeout expired"));
    println!("answered after {elapsed:?}");
    // Not a claim about speed: an answer that waited for the run would take seconds.
    assert!(elapsed < Duration::from_secs(3), "{elapsed:?}");
    let reply = server.post_with("/v2/models/slow/infer", &[("X-Request-Timeout", "50")], slow(1).to_string());
    assert_eq!(reply.status, 504);
    assert_eq!(server.metrics().sum("tidegate_queue_depth", &["model=\"slow\""]), 0.0);
}

#[test]
fn a_client_that_leaves_frees_its_place() {
    if without_onnxruntime() {
        return;
    }
    let (_models, server, _holder) = busy();
    let waiting: Vec<TcpStream> = (0..8).map(|_| send(&server, &slow(1).to_string())).collect();
    server.eventually("eight wait", |s| s.metrics().sum("tidegate_queue_depth", &["model=\"slow\""]) == 8.0);
    drop(waiting);
    server.eventually("none waits", |s| s.metrics().sum("tidegate_queue_depth", &["model=\"slow\""]) == 0.0);
    assert_eq!(server.metrics().sum("tidegate_requests_total", &["outcome=\"cancelled\""]), 8.0);
}
