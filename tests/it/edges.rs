//! The edges of the server's life: connections that say nothing, starts that fail, readiness that waits.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;

use tidegate::server::Addresses;

use crate::support::{Models, PATIENCE, TestServer, exchange, root};

fn connect(address: SocketAddr, said: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(said).unwrap();
    stream
}

const SAID: [&[u8]; 3] = [b"", b"PRI * HT", b"GET /v2 HT"];

#[test]
fn connections_that_never_finish_a_head_are_closed() {
    let models = Models::new().with("tumor");
    let server = TestServer::of(models.path()).set("timeouts.header", "50ms").start();
    for address in [server.addresses.http, server.addresses.grpc] {
        for said in SAID {
            let mut stream = connect(address, said);
            // Nothing, an HTTP/2 GOAWAY, or a reset: the connection ends.
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            assert!(!answer.starts_with(b"HTTP/1.1 200"));
        }
    }
    assert_eq!(server.get("/v2/health/ready").status, 200);
}

#[test]
fn connections_that_say_nothing_do_not_hold_the_exit() {
    let models = Models::new().with("tumor");
    let server = TestServer::of(models.path()).start();
    let addresses = [server.addresses.http, server.addresses.grpc];
    let held: Vec<TcpStream> =
        addresses.iter().flat_map(|address| SAID[..2].iter().map(|said| connect(*address, said))).collect();
    // The last connection of each listener has been accepted when a later one is answered.
    assert_eq!(server.get("/v2/health/ready").status, 200);
    let drained = server.stop();
    assert_eq!((drained.connections, drained.jobs), (0, 0));
    drop(held);
}

#[test]
fn an_idle_connection_outlives_the_head_timeout() {
    let models = Models::new().with("tumor");
    let server = TestServer::of(models.path()).set("timeouts.header", "50ms").start();
    let mut stream = connect(server.addresses.http, b"");
    let ask = b"GET /v2/health/live HTTP/1.1\r\nHost: t\r\n\r\n";
    let mut answer = [0; 512];
    stream.write_all(ask).unwrap();
    assert!(stream.read(&mut answer).unwrap() > 0);
    // Another connection's head times out meanwhile: as long has passed on this one.
    let _ = connect(server.addresses.http, b"G").read_to_end(&mut Vec::new());
    stream.write_all(ask).unwrap();
    assert!(stream.read(&mut answer).unwrap() > 0, "the idle connection was closed");
}

#[test]
fn a_start_that_fails_leaves_no_private_copies() {
    let models = Models::new().with("tumor");
    let cache = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let start = TestServer::of(models.path()).set("http_port", port).set("cache_dir", cache.path().display());
    let error = start.try_start().err().expect("the port is taken");
    assert!(error.contains(&port.to_string()), "{error}");
    let left = std::fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| name == "remembered"));
}

#[test]
fn strict_readiness_waits_until_every_version_is_mended() {
    let models = Models::new().with("tumor").with("corrupt");
    let status = |address: SocketAddr, path: &str| exchange(address, "GET", path, &[], b"").status;
    thread::scope(|scope| {
        let (listening, bound) = mpsc::channel();
        let server = scope.spawn(|| {
            let on_listening = move |addresses: &Addresses| listening.send(*addresses).unwrap();
            TestServer::of(models.path()).set("strict_readiness", true).on_listening(on_listening).start()
        });
        let Addresses { http, metrics, .. } = bound.recv_timeout(PATIENCE).expect("it listens before it is ready");
        assert_eq!((status(http, "/v2/health/ready"), status(metrics, "/readyz")), (503, 503));
        assert_eq!((status(http, "/v2/health/live"), status(http, "/v2/models/tumor/ready")), (200, 200));
        models.write("corrupt/1/model.onnx", std::fs::read(root().join("models/tumor/1/model.onnx")).unwrap());
        let server = server.join().unwrap();
        assert_eq!(server.get("/v2/health/ready").status, 200);
    });
}
