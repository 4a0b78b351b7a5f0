//! Loading and unloading models on request: over REST, gRPC and the admin port, in every mode.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use serde_json::{Value, json};
use tidegate::protocol::grpc::proto::model_repository_parameter::ParameterChoice;
use tidegate::protocol::grpc::proto::*;
use tonic::Code;

use crate::grpc::{self, Frames, GRPC, Http2, SERVICE, echo, framed};
use crate::support::{Builder, Models, Reply, TestServer, exchange};

const IDENTITY: &str = "identity_fp32";

/// A server that loads nothing by itself.
fn explicit(models: &Models) -> Builder {
    TestServer::of(models.path()).set("model_control", "explicit").set("poll_interval", "20ms")
}

fn ask(address: SocketAddr, model: &str, change: &str, body: &str) -> Reply {
    exchange(address, "POST", &format!("/v2/repository/models/{model}/{change}"), &[], body.as_bytes())
}

fn index(server: &TestServer) -> Value {
    server.post("/v2/repository/index", "").json()
}

fn rows(count: usize) -> Value {
    json!({"inputs": [{"name": "x", "shape": [count, 4], "datatype": "FP32", "data": vec![1.0; count * 4]}]})
}

fn digits() -> Value {
    json!({"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": vec![1.0; 64]}]})
}

fn named(model: &str) -> RepositoryModelLoadRequest {
    RepositoryModelLoadRequest { model_name: model.into(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn models_come_and_go_over_both_protocols() {
    let models = Models::new().with(IDENTITY).with("scalar").with("corrupt");
    let server = explicit(&models).set("repository_api", "true").start();
    let mut client = grpc::client(&server).await;
    assert_eq!(index(&server), json!([{"name": "corrupt"}, {"name": IDENTITY}, {"name": "scalar"}]));
    let listed = client.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner().models;
    let bare =
        |row: &repository_index_response::ModelIndex| [&row.version, &row.state, &row.reason].map(String::is_empty);
    assert!(listed.len() == 3 && listed.iter().all(|row| bare(row) == [true; 3]), "{listed:?}");
    let missing = "Request for unknown model: 'identity_fp32' is not found";
    assert_eq!(server.infer(IDENTITY, &rows(1)).error(), missing);

    let loaded = ask(server.addresses.http, IDENTITY, "load", "");
    assert_eq!((loaded.status, &*loaded.body), (200, &b""[..]));
    assert_eq!(server.infer(IDENTITY, &rows(2)).status, 200);
    assert_eq!(
        index(&server)[1],
        json!({"name": IDENTITY, "version": "1", "state": "READY", "reason": ""}),
        "the others are as they were: {}",
        index(&server)
    );
    let answer = client.repository_model_load(named("scalar")).await.unwrap().into_inner();
    assert_eq!(answer, RepositoryModelLoadResponse { model_name: "scalar".into(), is_loaded: true });
    assert_eq!(server.get("/v2/models").json(), json!({"models": [IDENTITY, "scalar"]}));

    let request = RepositoryModelUnloadRequest { model_name: IDENTITY.into(), ..Default::default() };
    let answer = client.repository_model_unload(request).await.unwrap().into_inner();
    assert_eq!(answer, RepositoryModelUnloadResponse { model_name: IDENTITY.into(), is_unloaded: true });
    let gone = client.model_infer(echo(1)).await.unwrap_err();
    let text = "Request for unknown model: 'identity_fp32' has no available versions";
    assert_eq!((gone.code(), gone.message()), (Code::NotFound, text));
    server.eventually("it is unloaded", |server| {
        index(server)[1] == json!({"name": IDENTITY, "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"})
    });
    let unload = |body: &str| ask(server.addresses.http, "scalar", "unload", body).status;
    assert_eq!(unload(r#"{"parameters": {"unload_dependents": true}}"#), 200);
    assert_eq!((unload("{}"), unload("[]")), (200, 400), "once more changes nothing");
    assert_eq!(server.get("/v2/models").json(), json!({"models": []}));
    assert_eq!(server.get("/v2/health/ready").status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_load_that_fails_says_why_over_both_protocols() {
    let models = Models::new().with(IDENTITY).with("corrupt");
    let server = explicit(&models).set("repository_api", "true").set("load_model", IDENTITY).start();
    let mut client = grpc::client(&server).await;
    for (model, status, code, start) in [
        ("corrupt", 400, Code::InvalidArgument, "load failed for model 'corrupt': version 1 is at UNAVAILABLE state: "),
        ("nope", 404, Code::NotFound, "failed to load 'nope', failed to poll from model repository"),
        (&*"n".repeat(257), 400, Code::InvalidArgument, "the model's name has 257 bytes"),
    ] {
        let reply = ask(server.addresses.http, model, "load", "{}");
        assert!(reply.status == status && reply.error().starts_with(start), "{}", reply.text());
        let refused = client.repository_model_load(named(model)).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (code, &*reply.error()));
        assert!(!refused.message().contains('/'), "no path: {}", refused.message());
    }
    let bad = index(&server)[0].clone();
    assert_eq!((&bad["name"], &bad["state"]), (&json!("corrupt"), &json!("UNAVAILABLE")));
    for (parameter, choice, expected) in [
        (
            r#""file:1/model.onnx": "AAAA""#,
            ParameterChoice::BytesParam(vec![0].into()),
            "parameter `file:1/model.onnx` is not supported",
        ),
        (r#""config": 3"#, ParameterChoice::Int64Param(3), "parameter `config` is not as expected"),
        (
            r#""config": "{\"batch_input\": [{}]}""#,
            ParameterChoice::StringParam(r#"{"batch_input": [{}]}"#.into()),
            "parameter `config`: `batch_input`",
        ),
        (
            r#""configuration": """#,
            ParameterChoice::StringParam(String::new()),
            "unknown parameter `configuration`, expected `config`",
        ),
    ] {
        let reply = ask(server.addresses.http, IDENTITY, "load", &format!("{{\"parameters\": {{{parameter}}}}}"));
        assert!(reply.status == 400 && reply.error().starts_with(expected), "{}", reply.text());
        let name = parameter.split('"').nth(1).unwrap().to_string();
        let parameters = [(name, ModelRepositoryParameter { parameter_choice: Some(choice) })].into();
        let refused = client.repository_model_load(RepositoryModelLoadRequest { parameters, ..named(IDENTITY) }).await;
        let refused = refused.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::InvalidArgument, &*reply.error()));
    }
    let long = format!("{{\"x\": \"{}\"}}", "x".repeat(64 << 10));
    assert_eq!(ask(server.addresses.http, IDENTITY, "load", &long).status, 413);
    let many = |n: usize| (0..n).map(|i| (format!("p{i}"), ModelRepositoryParameter::default())).collect();
    let flooded = RepositoryModelLoadRequest { parameters: many(65), ..named(IDENTITY) };
    assert_eq!(client.repository_model_load(flooded).await.unwrap_err().message(), "more than 64 parameters");
    assert_eq!(server.infer(IDENTITY, &rows(1)).status, 200);
}

#[test]
fn settings_given_with_a_load_are_in_effect() {
    let models = Models::new().with("tumor");
    let server = explicit(&models).set("load_model", "*").start();
    let of = |key: &str| server.get("/v2/models/tumor/config").json()[key].clone();
    let load = |config: Value| {
        let body = json!({"parameters": {"config": config.to_string()}}).to_string();
        let reply = ask(server.addresses.admin, "tumor", "load", &body);
        assert_eq!(reply.status, 200, "{}", reply.text());
    };
    load(json!({"name": "tumor", "max_batch_size": 16, "dynamic_batching": {"max_queue_delay_microseconds": 70},
                "instance_group": [{"count": 1, "kind": "KIND_CPU"}]}));
    assert_eq!(of("max_batch_size"), 16);
    assert_eq!(of("dynamic_batching")["max_queue_delay_microseconds"], 70);
    assert_eq!(of("instance_group")[0]["count"], 1);
    // What the server tells of a model can be given back to it.
    let told = server.get("/v2/models/tumor/config").json();
    load(told.clone());
    assert_eq!(server.get("/v2/models/tumor/config").json(), told);
    assert_eq!(ask(server.addresses.admin, "tumor", "load", "").status, 200);
    assert_eq!(of("max_batch_size"), i32::MAX, "and the folder's own again");
    load(server.get("/v2/models/tumor/config").json());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_data_port_loads_only_where_that_is_switched_on() {
    let models = Models::new().with(IDENTITY);
    let server = explicit(&models).start();
    let mut client = grpc::client(&server).await;
    let extensions = |server: &TestServer| server.get("/v2").json()["extensions"].to_string();
    for change in ["load", "unload"] {
        let reply = ask(server.addresses.http, IDENTITY, change, "");
        assert!(reply.status == 403 && reply.error().contains("`repository_api`"), "{}", reply.text());
    }
    let refused = client.repository_model_load(named(IDENTITY)).await.unwrap_err();
    assert!(refused.code() == Code::PermissionDenied && refused.message().contains("`repository_api`"));
    let refused = client.repository_model_unload(RepositoryModelUnloadRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(!extensions(&server).contains("model_repository"));

    assert_eq!(ask(server.addresses.admin, IDENTITY, "load", "").status, 200);
    assert_eq!(server.infer(IDENTITY, &rows(1)).status, 200);
    let listed = exchange(server.addresses.admin, "POST", "/v2/repository/index", &[], b"").json();
    assert_eq!(listed, index(&server));
    assert_eq!(ask(server.addresses.admin, IDENTITY, "unload", "").status, 200);
    assert_eq!(server.infer(IDENTITY, &rows(1)).status, 404);

    let open = explicit(&models).set("repository_api", "true").start();
    assert!(extensions(&open).contains("\"model_repository\",\"model_repository(unload_dependents)\""));
    let mut client = grpc::client(&open).await;
    let about = client.server_metadata(ServerMetadataRequest {}).await.unwrap().into_inner();
    assert_eq!(json!(about.extensions), open.get("/v2").json()["extensions"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn where_the_folder_decides_nothing_is_loaded_on_request() {
    let models = Models::new().with(IDENTITY);
    for mode in ["none", "poll"] {
        let server = TestServer::of(models.path()).set("model_control", mode).set("repository_api", "true").start();
        let mut client = grpc::client(&server).await;
        let text = "explicit model load / unload is not allowed if polling is enabled";
        for address in [server.addresses.http, server.addresses.admin] {
            for change in ["load", "unload"] {
                let reply = ask(address, IDENTITY, change, "");
                assert_eq!((reply.status, &*reply.error()), (503, text), "{mode}");
            }
        }
        let refused = client.repository_model_load(named(IDENTITY)).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::Unavailable, text));
        let refused = client.repository_model_unload(RepositoryModelUnloadRequest::default()).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::Unavailable, text));
        assert!(!server.get("/v2").text().contains("model_repository"));
        assert_eq!(server.infer(IDENTITY, &rows(1)).status, 200);
    }
}

#[test]
fn what_changes_after_the_start_does_not_count_without_polling() {
    let models = Models::new();
    models.add_version("digits", "1", "1");
    let still = TestServer::of(models.path()).set("model_control", "none").set("poll_interval", "1ms").start();
    let polling = TestServer::of(models.path()).set("poll_interval", "1ms").start();
    models.add_version("digits", "2", "2");
    let versions = |server: &TestServer| server.get("/v2/models/digits").json()["versions"].clone();
    polling.eventually("the new version serves where it is looked for", |server| versions(server) == json!(["1", "2"]));
    assert_eq!(versions(&still), json!(["1"]));
}

#[test]
fn an_unknown_model_to_load_ends_the_start() {
    let models = Models::new().with(IDENTITY);
    let error = explicit(&models).set("load_model", "identity_fp23").try_start().err().expect("no such model");
    assert!(error.contains("no model `identity_fp23`") && error.contains("`identity_fp32`, perhaps"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn both_dialects_are_spoken() {
    let models = Models::new().with(IDENTITY);
    let server = explicit(&models).set("repository_api", "true").start();
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let field =
        |number: u8, text: &str| [&[number << 3 | 2, u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    let (kserve, triton) = (field(1, IDENTITY), field(2, IDENTITY));
    let both = [field(1, "elsewhere"), triton.clone()].concat();
    // The name, and true: what KServe's clients read, and Triton's step over.
    let done = framed(0, &[&kserve[..], &[0x10, 1]].concat());
    for (method, message, expected) in [
        ("RepositoryModelLoad", &kserve, Code::Ok),
        ("RepositoryModelUnload", &kserve, Code::Ok),
        ("RepositoryModelLoad", &triton, Code::Ok),
        ("RepositoryModelUnload", &triton, Code::Ok),
        ("RepositoryModelLoad", &both, Code::Unimplemented),
        ("RepositoryModelUnload", &both, Code::Unimplemented),
        ("RepositoryModelLoad", &Vec::new(), Code::NotFound),
    ] {
        let path = format!("/{SERVICE}/{method}");
        let answer = http2.send("POST", &path, &GRPC, Frames::of(framed(0, message))).await;
        assert_eq!(answer.status().code(), expected, "{method}: {}", answer.status().message());
        if expected == Code::Ok {
            assert_eq!(answer.body, done, "{method}");
            let serves = server.infer(IDENTITY, &rows(1)).status == 200;
            assert_eq!(serves, method == "RepositoryModelLoad");
        }
    }
}

#[test]
fn models_change_under_load_and_only_what_is_unloaded_is_refused() {
    let models = Models::new();
    models.add_version("digits", "1", "1");
    let server = explicit(&models).set("load_model", "digits").start();
    let change = |change: &str| ask(server.addresses.admin, "digits", change, "");
    // Odd while the model may be gone.
    let gone = AtomicUsize::new(0);
    let (stop, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    let before = gone.load(Ordering::SeqCst);
                    let reply = server.infer("digits", &digits());
                    let may_be_gone = before % 2 == 1 || gone.load(Ordering::SeqCst) != before;
                    match reply.status {
                        200 => drop(served.fetch_add(1, Ordering::SeqCst)),
                        // Unloaded; or loaded again, and not ready yet.
                        404 | 503 => assert!(may_be_gone, "{}", reply.text()),
                        _ => panic!("{}", reply.text()),
                    }
                }
            });
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..3 {
                models.add_version("digits", "2", "2");
                assert_eq!(change("load").status, 200);
                assert_eq!(server.infer("digits", &digits()).json()["model_version"], "2");
                models.write("digits/2/model.onnx", "broken");
                assert_eq!(change("load").status, 400);
                assert_eq!(server.infer("digits", &digits()).json()["model_version"], "2");
                models.remove("digits/2");
                assert_eq!(change("load").status, 200);
                assert_eq!(server.infer("digits", &digits()).json()["model_version"], "1");
                gone.fetch_add(1, Ordering::SeqCst);
                assert_eq!(change("unload").status, 200);
                assert_eq!(server.infer("digits", &digits()).status, 404);
                assert_eq!(change("load").status, 200);
                gone.fetch_add(1, Ordering::SeqCst);
                assert_eq!(server.infer("digits", &digits()).status, 200);
            }
        }));
        stop.store(true, Ordering::SeqCst);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(served.load(Ordering::SeqCst) > 0);
    assert_eq!(server.stop().jobs, 0);
}

#[test]
fn the_admin_port_answers_no_web_page() {
    let models = Models::new().with(IDENTITY);
    let server = TestServer::of(models.path()).start();
    let index = |headers: &[(&str, &str)]| {
        exchange(server.addresses.admin, "POST", "/v2/repository/index", headers, b"").status
    };
    assert_eq!(index(&[]), 200);
    assert_eq!(index(&[("Origin", "http://evil.example")]), 403);
}
