//! Start, change under load, stop: in order, and nothing accepted is lost.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread;

use serde_json::json;
use tidegate::request::Phase;
use tidegate::server::Addresses;

use crate::support::{Models, PATIENCE, Reply, TestServer, exchange};

fn tumor() -> serde_json::Value {
    json!({"inputs": [{"name": "features", "shape": [1, 30], "datatype": "FP32", "data": vec![1.0; 30]}]})
}

fn digits() -> serde_json::Value {
    json!({"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": vec![1.0; 64]}]})
}

#[test]
fn what_runs_cost_is_timed_once_and_remembered_until_something_differs() {
    let models = Models::new().with("tumor").with("digits_st");
    let cache = tempfile::tempdir().unwrap();
    let remembered = cache.path().join("remembered");
    let costs = |model: &str, calibration: bool| {
        let server = TestServer::of(models.path()).set("cache_dir", cache.path().display());
        let server = server.set("calibration", calibration).start();
        let properties = server.get(&format!("/v2/models/{model}")).json()["properties"].clone();
        assert!(properties["wide"].as_str().unwrap().starts_with("o"), "{properties}");
        properties["costs"].as_str().unwrap().to_string()
    };
    let is = |costs: String, when: &str| {
        assert!(costs.starts_with("a row ") && costs.ends_with(when), "{costs}, expected {when}");
    };
    assert!(costs("tumor", false).starts_with("not timed"));
    assert!(!remembered.exists());
    is(costs("tumor", true), "(timed at this load)");
    is(costs("tumor", true), "(remembered from an earlier load)");
    is(costs("digits_st", true), "(remembered from an earlier load)");
    for file in std::fs::read_dir(&remembered).unwrap() {
        std::fs::write(file.unwrap().path(), "damaged").unwrap();
    }
    is(costs("tumor", true), "(timed at this load)");
    is(costs("tumor", true), "(remembered from an earlier load)");
    models.write("tumor/model.toml", "[batching]\npreferred_rows = 4\n");
    is(costs("tumor", true), "(timed at this load)");
    // A folder that cannot be written is no reason not to serve.
    std::fs::remove_dir_all(&remembered).unwrap();
    std::fs::write(&remembered, "a file in its place").unwrap();
    is(costs("tumor", true), "(timed at this load)");
}

fn version(reply: &Reply) -> String {
    reply.json()["model_version"].as_str().unwrap_or_default().to_string()
}

#[test]
fn phases_come_in_order() {
    let models = Models::new().with("tumor");
    let (entered, phases) = mpsc::channel();
    let server = TestServer::of(models.path()).on_phase(move |phase| entered.send(phase).unwrap()).start();
    let drained = server.stop();
    assert_eq!((drained.connections, drained.jobs), (0, 0));
    let expected = [
        Phase::Starting,
        Phase::Loading,
        Phase::Ready,
        Phase::LameDuck,
        Phase::Draining,
        Phase::Stopping,
        Phase::Stopped,
    ];
    assert_eq!(phases.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn versions_come_change_and_go_under_load_without_a_failed_request() {
    let models = Models::new();
    models.add_version("digits", "1", "1");
    let server = TestServer::of(models.path()).set("poll_interval", "20ms").start();
    let (stop, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let reply = server.infer("digits", &digits());
                    assert_eq!(reply.status, 200, "{}", reply.text());
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let answers = |expected: &str| {
            server.eventually(&format!("version {expected} answers"), |s| {
                version(&s.infer("digits", &digits())) == expected
            });
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..3 {
                models.add_version("digits", "2", "2");
                answers("2");
                assert_eq!(server.infer("digits/versions/1", &digits()).status, 200);
                // Replaced in place: another file under the same number.
                let before = server.infer("digits/versions/2", &digits()).header("x-model-digest").unwrap().to_string();
                models.write(
                    "digits/2/model.onnx.new",
                    std::fs::read(crate::support::root().join("models/digits/1/model.onnx")).unwrap(),
                );
                std::fs::rename(
                    models.path().join("digits/2/model.onnx.new"),
                    models.path().join("digits/2/model.onnx"),
                )
                .unwrap();
                server.eventually("the replacement answers", |s| {
                    s.infer("digits/versions/2", &digits()).header("x-model-digest") != Some(before.as_str())
                });
                models.remove("digits/2");
                answers("1");
                server.eventually("the deleted version is gone", |s| {
                    s.infer("digits/versions/2", &digits()).status == 404
                });
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(served.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_half_copied_or_bad_version_never_disturbs_the_others() {
    let models = Models::new().with("tumor");
    let server = TestServer::of(models.path()).start();
    let whole = std::fs::read(crate::support::root().join("models/tumor/1/model.onnx")).unwrap();
    models.write("tumor/2/model.onnx", &whole[..whole.len() / 2]);
    server.eventually("the bad version is in the index", |s| {
        s.post("/v2/repository/index", "").text().contains("UNAVAILABLE")
    });
    assert_eq!(version(&server.infer("tumor", &tumor())), "1");
    assert_eq!(server.infer("tumor/versions/2", &tumor()).status, 404);
    models.write("tumor/2/model.onnx", &whole);
    server.eventually("the mended version answers", |s| version(&s.infer("tumor", &tumor())) == "2");
}

/// A keep-alive connection that asks `tumor`, first once as it opens: then the server has accepted it.
struct Caller {
    stream: BufReader<TcpStream>,
    request: Vec<u8>,
}

impl Caller {
    fn new(address: SocketAddr) -> Caller {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = tumor().to_string();
        let head = format!("POST /v2/models/tumor/infer HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n\r\n", body.len());
        let mut caller = Caller { stream: BufReader::new(stream), request: format!("{head}{body}").into_bytes() };
        caller.send().unwrap();
        assert!(caller.is_answered(), "nobody is stopping the server yet");
        caller
    }

    fn send(&mut self) -> std::io::Result<()> {
        self.stream.get_mut().write_all(&self.request)
    }

    /// Whether a whole answer comes, which must be the right one.
    fn is_answered(&mut self) -> bool {
        let Ok(Some(reply)) = Reply::read(&mut self.stream) else { return false };
        assert_eq!((reply.status, version(&reply).as_str()), (200, "1"), "{}", reply.text());
        true
    }
}

#[test]
fn stopping_under_load_loses_nothing_that_was_accepted() {
    let models = Models::new().with("tumor");
    let draining = Arc::new(AtomicBool::new(false));
    let is_draining = Arc::clone(&draining);
    let on_phase = move |phase| {
        if phase == Phase::Draining {
            is_draining.store(true, Ordering::SeqCst);
        }
    };
    let mut server = TestServer::of(models.path()).set("lame_duck", "100ms").on_phase(on_phase).start();
    let address = server.addresses.http;
    let answered = AtomicUsize::new(0);
    let lost: usize = thread::scope(|scope| {
        let callers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let mut caller = Caller::new(address);
                    loop {
                        let sent = caller.send().is_ok();
                        // All of it was in the socket of an accepted connection before the drain began.
                        let accepted = !draining.load(Ordering::SeqCst);
                        if !sent || !caller.is_answered() {
                            return usize::from(accepted);
                        }
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        server.eventually("there is load", |_| answered.load(Ordering::Relaxed) > 50);
        server.tell_to_stop();
        callers.into_iter().map(|caller| caller.join().unwrap()).sum()
    });
    let drained = server.stop();
    assert_eq!((drained.connections, drained.jobs), (0, 0));
    assert_eq!(lost, 0, "requests that were accepted, of {}", answered.into_inner());
}

#[test]
fn requests_that_lie_unread_when_the_drain_begins_are_answered() {
    let models = Models::new().with("tumor");
    let callers = Arc::new(Mutex::new(Vec::<Caller>::new()));
    let theirs = Arc::clone(&callers);
    let on_phase = move |phase| {
        if phase == Phase::Draining {
            theirs.lock().unwrap().iter_mut().for_each(|caller| caller.send().unwrap());
        }
    };
    let server = TestServer::of(models.path()).on_phase(on_phase).start();
    callers.lock().unwrap().extend((0..32).map(|_| Caller::new(server.addresses.http)));
    let drained = server.stop();
    assert_eq!((drained.connections, drained.jobs), (0, 0));
    let lost = callers.lock().unwrap().iter_mut().filter_map(|caller| (!caller.is_answered()).then_some(())).count();
    assert_eq!(lost, 0, "of 32");
}

#[test]
fn readiness_follows_the_phase() {
    let models = Models::new().with("tumor");
    let addresses = Arc::new(OnceLock::<Addresses>::new());
    let (seen, probes) = mpsc::channel();
    let at = Arc::clone(&addresses);
    // The hook holds the phase up while it asks.
    let on_phase = move |phase| {
        if let (Some(at), Phase::LameDuck | Phase::Draining) = (at.get(), phase) {
            let probe = |address, path| exchange(address, "GET", path, &[], b"").status;
            let planes = [(at.metrics, "/livez"), (at.metrics, "/readyz")];
            let data = [(at.http, "/v2/health/live"), (at.http, "/v2/health/ready"), (at.http, "/v2/models/tumor")];
            seen.send(planes.into_iter().chain(data).map(|(address, path)| probe(address, path)).collect()).unwrap();
        }
    };
    let server = TestServer::of(models.path()).on_phase(on_phase).start();
    addresses.set(server.addresses).unwrap();
    assert_eq!(server.get("/v2/health/live").json(), json!({"live": true}));
    assert_eq!(server.get("/v2/health/ready").json(), json!({"ready": true}));
    let probe = |path| exchange(server.addresses.metrics, "GET", path, &[], b"").status;
    assert_eq!((probe("/livez"), probe("/readyz")), (200, 200));
    server.stop();
    let probes: Vec<Vec<u16>> = probes.into_iter().collect();
    assert_eq!(probes, vec![vec![200, 503, 200, 503, 200]; 2], "alive and serving, but not ready");
}

#[test]
fn a_registry_that_cannot_be_read_stops_the_start() {
    let models = Models::new();
    let error = TestServer::of(&models.path().join("nowhere")).try_start().err().expect("no such folder");
    assert!(error.contains("nowhere"), "{error}");
}
