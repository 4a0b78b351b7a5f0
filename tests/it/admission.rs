//! Admission: what a client announces takes nothing from others, and a deadline holds from the first byte.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::json;

use crate::support::{Models, PATIENCE, TestServer};

/// A request whose body of so many bytes is announced, and begun.
fn begin(server: &TestServer, bytes: usize, headers: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.addresses.http).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head =
        format!("POST /v2/models/digits/infer HTTP/1.1\r\nHost: t\r\nContent-Length: {bytes}\r\n{headers}\r\n{{");
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

fn digit() -> serde_json::Value {
    json!({"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": vec![0.5; 64]}]})
}

#[test]
fn bodies_that_are_announced_and_not_sent_take_no_bytes_from_others() {
    let models = Models::new().with("digits");
    let server = TestServer::of(models.path()).set("limits.body", "1MiB").set("limits.request_bytes", "1MiB").start();
    let slow: Vec<TcpStream> = (0..8).map(|_| begin(&server, 1 << 19, "")).collect();
    server.eventually("eight are admitted", |s| s.metrics().sum("tidegate_inflight", &[]) == 8.0);
    let reply = server.infer("digits", &digit());
    assert_eq!(reply.status, 200, "{}", reply.text());
    drop(slow);
}

#[test]
fn a_deadline_holds_while_the_body_comes() {
    let models = Models::new().with("digits");
    let server = TestServer::of(models.path()).start();
    let mut stream = begin(&server, 1000, "X-Request-Timeout: 50\r\nConnection: close\r\n");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 504 ") && answer.contains("Request timeout expired"), "{answer}");
    let mut request = digit();
    request["parameters"] = json!({"timeout": 1});
    assert_eq!(server.infer("digits", &request).status, 504);
    server.eventually("all places are free", |s| s.metrics().sum("tidegate_inflight", &[]) == 0.0);
    assert_eq!(server.metrics().sum("tidegate_requests_refused_total", &["deadline_exceeded"]), 1.0);
}
