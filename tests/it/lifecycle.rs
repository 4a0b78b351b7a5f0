//! Start, change under load, stop: in order, and nothing accepted is lost.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use serde_json::json;
use tidegate::request::Phase;

use crate::support::{Models, PATIENCE, Reply, TestServer};

fn tumor() -> serde_json::Value {
    json!({"inputs": [{"name": "features", "shape": [1, 30], "datatype": "FP32", "data": vec![1.0; 30]}]})
}

fn digits() -> serde_json::Value {
    json!({"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": vec![1.0; 64]}]})
}

fn version(reply: &Reply) -> String {
    reply.json()["model_version"].as_str().unwrap_or_default().to_string()
}

#[test]
fn phases_come_in_order() {
    let models = Models::new().with("tumor");
    let mut server = TestServer::of(models.path()).start();
    assert_eq!(server.phase(), Phase::Ready);
    let mut phases = server.phases();
    let watcher = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async move {
            let mut seen = vec![*phases.borrow_and_update()];
            while *seen.last().unwrap() != Phase::Stopped && phases.changed().await.is_ok() {
                seen.push(*phases.borrow_and_update());
            }
            seen
        })
    });
    server.tell_to_stop();
    let seen = watcher.join().unwrap();
    // A watcher may miss a phase that passes quickly, never see two out of order.
    assert!(seen.is_sorted() && seen.last() == Some(&Phase::Stopped), "{seen:?}");
    let drained = server.stop();
    assert_eq!((drained.connections, drained.jobs), (0, 0));
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

#[test]
fn stopping_under_load_loses_nothing_that_was_accepted() {
    let models = Models::new().with("tumor");
    let mut server = TestServer::of(models.path()).set("lame_duck", "200ms").start();
    let address = server.addresses.http;
    let (started, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let agent: ureq::Agent = ureq::Agent::config_builder()
                    .http_status_as_error(false)
                    .timeout_global(Some(PATIENCE))
                    .build()
                    .into();
                loop {
                    let sent = agent.post(format!("http://{address}/v2/models/tumor/infer")).send(tumor().to_string());
                    match sent {
                        Ok(mut response) => {
                            started.fetch_add(1, Ordering::Relaxed);
                            assert_eq!(response.status(), 200);
                            assert!(response.body_mut().read_to_vec().unwrap().starts_with(b"{"));
                            finished.fetch_add(1, Ordering::Relaxed);
                        }
                        // Refused or closed between requests: it was never accepted.
                        Err(ureq::Error::Io(_) | ureq::Error::ConnectionFailed) => break,
                        Err(error) => panic!("an accepted request was lost: {error}"),
                    }
                }
            });
        }
        server.eventually("there is load", |_| finished.load(Ordering::Relaxed) > 50);
        server.tell_to_stop();
    });
    let drained = server.stop();
    assert_eq!((drained.connections, drained.jobs), (0, 0));
    assert_eq!(started.into_inner(), finished.into_inner());
}

#[test]
fn readiness_follows_the_phase() {
    let models = Models::new().with("tumor");
    let server = TestServer::of(models.path()).start();
    assert_eq!(server.get("/v2/health/live").json(), json!({"live": true}));
    assert_eq!(server.get("/v2/health/ready").json(), json!({"ready": true}));
    let probe = |path| crate::support::exchange(server.addresses.metrics, "GET", path, &[], b"").status;
    assert_eq!((probe("/livez"), probe("/readyz")), (200, 200));
}

#[test]
fn a_registry_that_cannot_be_read_stops_the_start() {
    let models = Models::new();
    let error = TestServer::of(&models.path().join("nowhere")).try_start().err().expect("no such folder");
    assert!(error.contains("nowhere"), "{error}");
}
