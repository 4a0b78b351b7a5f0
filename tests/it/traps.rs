//! Each trap of tests/traps/README.md: batched or not, for the right reason, and answered right.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Models, TestServer, engines, root, without_onnxruntime};

fn property(server: &TestServer, model: &str, key: &str) -> String {
    let metadata = server.get(&format!("/v2/models/{model}"));
    assert_eq!(metadata.status, 200, "{model}: {}", metadata.text());
    metadata.json()["properties"][key].as_str().unwrap_or_else(|| panic!("{model}: no {key}")).to_string()
}

fn fp32(name: &str, shape: Value, data: &[f32]) -> Value {
    json!({"name": name, "shape": shape, "datatype": "FP32", "data": data})
}

#[test]
fn batchability_is_decided_and_explained() {
    if without_onnxruntime() {
        return;
    }
    let server = TestServer::of(&root().join("tests/traps")).set("engine", "onnxruntime").start();
    let batched =
        ["encoder", "sum_rows", "sentinel", "gather", "logits", "softmaxed", "sigmoid", "nan_maker", "external"];
    for model in batched {
        assert_eq!(
            property(&server, model, "batching"),
            "on",
            "{model}: {}",
            property(&server, model, "batching_reason")
        );
    }
    let unbatched = [
        ("recurrent", "state"),
        ("time_major", "row"),
        ("time_pooled", "output"),
        ("scalar", "scale"),
        ("int8_dynamic", "DynamicQuantizeLinear"),
        ("row_coupled", ""),
        ("batch_norm_training", "BatchNormalization"),
        ("random_noise", "RandomNormalLike"),
        ("mean_centred", "row"),
        ("inconclusive", "conclu"),
        ("refuses_zeros", "conclu"),
        ("fixed_batch", "fixed"),
        ("reverse_lstm", ""),
        ("slow", ""),
    ];
    for (model, reason) in unbatched {
        let found = property(&server, model, "batching_reason");
        assert_eq!(property(&server, model, "batching"), "off", "{model}: {found}");
        assert!(found.contains(reason), "{model}: {found}");
    }
}

#[test]
fn unbatched_models_answer_right() {
    for engine in engines() {
        let server = TestServer::of(&root().join("tests/traps")).set("engine", engine).start();
        for shape in [json!([]), json!([1])] {
            let reply = server.infer(
                "scalar",
                &json!({"inputs": [fp32("x", json!([2, 4]), &[1., 2., 3., 4., 5., 6., 7., 8.]), fp32("scale", shape, &[10.])]}),
            );
            assert_eq!(reply.status, 200, "{engine}: {}", reply.text());
            assert_eq!(reply.output("y"), [10., 20., 30., 40., 50., 60., 70., 80.]);
        }
        let state = vec![0f32; 2 * 3 * 128];
        let reply = server.infer(
            "recurrent",
            &json!({"inputs": [fp32("input", json!([3, 16]), &[0.5; 48]), fp32("state", json!([2, 3, 128]), &state)]}),
        );
        assert_eq!(reply.status, 200, "{engine}: {}", reply.text());
        assert_eq!(reply.json()["outputs"][1]["shape"], json!([2, 3, 128]));
        // Rows sum what came before them: joined with a neighbour's they would differ.
        let reply = server.infer(
            "mean_centred",
            &json!({"inputs": [fp32("x", json!([2, 6]), &[
                1., 1., 1., 1., 1., 1., 3., 3., 3., 3., 3., 3.,
            ])]}),
        );
        assert_eq!(reply.output("y"), [-1., -1., -1., -1., -1., -1., 1., 1., 1., 1., 1., 1.], "{engine}");
        let reply = server.infer("fixed_batch", &json!({"inputs": [fp32("image", json!([2, 3, 4, 4]), &[0.; 96])]}));
        assert_eq!(reply.status, 400, "{engine}");
    }
}

#[test]
fn tract_refuses_what_it_computes_wrongly() {
    let models = Models::new().with("reverse_lstm").with("sum_rows");
    let server = TestServer::of(models.path()).set("engine", "tract").start();
    assert_eq!(server.get("/v2/models/sum_rows/ready").status, 200);
    assert_ne!(server.get("/v2/models/reverse_lstm/ready").status, 200);
    let index = server.post("/v2/repository/index", "").text();
    assert!(index.contains("tract") && index.contains("LSTM"), "{index}");
}

#[test]
fn an_output_that_is_no_tensor_is_left_out() {
    if without_onnxruntime() {
        return;
    }
    let models = Models::new().with("zipmap");
    let server = TestServer::of(models.path()).set("engine", "onnxruntime").start();
    let metadata = server.get("/v2/models/zipmap").json();
    assert_eq!(metadata["outputs"].as_array().unwrap().len(), 1);
    let reply = server.infer("zipmap", &json!({"inputs": [fp32("features", json!([1, 4]), &[1., 0., 0., 0.])]}));
    assert_eq!((reply.status, reply.output("output_label").len()), (200, 1), "{}", reply.text());
}

#[test]
fn bad_models_fail_alone_with_a_reason_and_no_path() {
    let models = Models::new().with("corrupt").with("empty").with("escaping_external").with("sum_rows");
    models.write("secret.bin", "secret");
    let server = TestServer::of(models.path()).start();
    let index = server.post("/v2/repository/index", "").json();
    for entry in index.as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let (state, reason) = (entry["state"].as_str().unwrap(), entry["reason"].as_str().unwrap_or_default());
        if name == "sum_rows" {
            assert_eq!((state, reason), ("READY", ""));
        } else {
            assert_eq!(state, "UNAVAILABLE", "{name}");
            assert!(!reason.is_empty() && !reason.contains(models.path().to_str().unwrap()), "{name}: {reason}");
        }
    }
    assert_eq!(index.as_array().unwrap().len(), 4);
    assert_eq!(server.get("/v2/health/ready").status, 200);
}

#[test]
fn without_the_library_metadata_and_metrics_say_tract() {
    let nowhere = tempfile::tempdir().unwrap();
    let server = TestServer::of(&root().join("models")).set("engine", "auto").exe_dir(nowhere.path()).start();
    assert_eq!(server.get("/v2/models/digits").json()["platform"], "tract_onnx");
    assert!(property(&server, "digits", "backend").contains("tract"));
    let metrics = server.metrics();
    assert_eq!(metrics.sum("tidegate_model_info", &["model=\"digits\"", "backend=\"tract\""]), 2.0);
    assert_eq!(metrics.sum("tidegate_model_info", &["backend=\"onnxruntime\""]), 0.0);
    assert_eq!(metrics.sum("tidegate_engine_info", &["backend=\"tract\""]), 1.0);
    assert_eq!(metrics.sum("tidegate_engine_info", &["backend=\"onnxruntime\""]), 0.0);
}

#[test]
fn without_the_library_the_log_says_tract() {
    let binary = tempfile::tempdir().unwrap();
    let program = binary.path().join("tidegate");
    let built = env!("CARGO_BIN_EXE_tidegate");
    // The binary elsewhere, without what lies beside it.
    std::fs::hard_link(built, &program).or_else(|_| std::fs::copy(built, &program).map(drop)).unwrap();
    let mut child = Command::new(program)
        .args(["serve", "--host", "127.0.0.1", "--log-format", "json", "--registry"])
        .arg(root().join("models"))
        .args(["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--admin-port", "0"])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Ends with the process, should it end before it is ready.
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let lines: Vec<String> = lines.take_while(|line| !line.contains(r#""message":"ready""#)).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    let log: Vec<Value> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let backends = |message: &str| -> Vec<&str> {
        log.iter().filter(|line| line["message"] == message).map(|line| line["backend"].as_str().unwrap()).collect()
    };
    assert_eq!(backends("engine chosen"), ["tract"], "{log:?}");
    let ready = backends("version ready");
    // candle's models are the two safetensors twins, whichever engine ONNX gets.
    assert_eq!(ready.iter().filter(|backend| **backend == "candle").count(), 2, "{log:?}");
    assert!(ready.len() > 2 && ready.iter().all(|backend| ["tract", "candle"].contains(backend)), "{log:?}");
    for line in log.iter().filter(|line| line["message"] == "version ready") {
        assert!(line["instances"].as_u64() > Some(0) && line["batching"].is_boolean(), "{line}");
        assert!(line["batching_reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{line}");
        let told = log.iter().filter(|other| {
            other["level"] == "INFO" && (&other["model"], &other["version"]) == (&line["model"], &line["version"])
        });
        assert_eq!(told.count(), 1, "one line tells that a version is ready: {log:?}");
    }
    let reason = log.iter().find(|line| line["message"] == "engine chosen").unwrap()["reason"].as_str().unwrap();
    assert!(reason.contains("no ONNX Runtime library"), "{reason}");
}

#[test]
fn with_the_library_the_process_maps_it() {
    if without_onnxruntime() {
        return;
    }
    let server = TestServer::of(&root().join("models")).start();
    assert_eq!(server.get("/v2/models/digits").json()["platform"], "onnxruntime_onnx");
    let metrics = server.metrics();
    for engine in engines() {
        assert_eq!(metrics.sum("tidegate_engine_info", &[&format!("backend=\"{engine}\"")]), 1.0, "{engine}");
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps.contains("libonnxruntime"), "the library is not mapped");
}

#[test]
fn a_missing_or_broken_library_is_an_error_or_a_fallback_as_configured() {
    let broken = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(broken.path(), "not a library").unwrap();
    for library in ["/nonexistent/libonnxruntime.so", broken.path().to_str().unwrap()] {
        let models = Models::new().with("tumor");
        let of =
            |engine: &str| TestServer::of(models.path()).set("onnxruntime", library).set("engine", engine).try_start();
        let error = of("onnxruntime").err().expect("an engine asked for by name must be there");
        assert!(error.contains("onnxruntime"), "{error}");
        let server = of("auto").expect("auto falls back");
        assert_eq!(server.get("/v2/models/tumor").json()["platform"], "tract_onnx");
    }
}
