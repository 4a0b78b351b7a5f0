//! Devices that are not there, on the real engines: no machine has a hundred GPUs.

use serde_json::{Value, json};

use crate::goldens::mismatches;
use crate::support::{Models, TestServer, engines, root};

const ABSENT: &str = "cuda:99";

/// `digits` as ONNX and, under its own name, as safetensors, with these settings in front of their own.
fn repository(settings: &str) -> Models {
    let models = Models::new();
    models.add("digits");
    models.write("digits/model.toml", format!("{settings}\nlabels = \"labels.txt\""));
    if cfg!(feature = "candle") {
        models.add("digits_st");
        let own = std::fs::read_to_string(root().join("models/digits_st/model.toml")).unwrap();
        models.write("digits_st/model.toml", format!("{settings}\n{own}"));
    }
    models
}

/// A model with the version that has goldens, and what its engine says has to be done.
fn cases(engine: &'static str) -> Vec<(&'static str, &'static str, &'static [&'static str])> {
    let onnx: &[&str] = match engine {
        "onnxruntime" => &["onnxruntime-gpu", "ORT_DYLIB_PATH", "NVIDIA driver"],
        _ => &["tract runs on the CPU only", "`backend = \"onnxruntime\"`"],
    };
    let mut cases = vec![("digits", "2", onnx)];
    if cfg!(all(feature = "candle", not(feature = "cuda"))) {
        cases.push(("digits_st", "1", &["without the cargo feature `cuda`", "--features cuda"]));
    }
    cases
}

#[test]
fn a_device_that_is_not_there_is_refused_with_what_to_do() {
    let models = repository(&format!("device = \"{ABSENT}\""));
    for engine in engines() {
        let server = TestServer::of(models.path()).set("engine", engine).start();
        let index = server.post("/v2/repository/index", "").json();
        for (model, version, what_to_do) in cases(engine) {
            let mut entries = index.as_array().unwrap().iter();
            let entry = entries.find(|entry| entry["name"] == model && entry["version"] == version).unwrap();
            let reason = entry["reason"].as_str().unwrap();
            assert_eq!(entry["state"], "UNAVAILABLE", "{entry}");
            assert!(reason.starts_with(&format!("device `{ABSENT}` cannot be used: ")), "{reason}");
            for word in what_to_do.iter().chain(&["`device = \"cpu\"`"]) {
                assert!(reason.contains(word), "{engine}: no {word} in {reason}");
            }
            assert!(!reason.contains(root().to_str().unwrap()), "{reason}");
        }
    }
}

#[test]
fn a_fallback_answers_as_on_the_cpu_and_says_where_it_runs() {
    let models = repository(&format!("device = \"{ABSENT}\"\ndevice_fallback = \"cpu\"\ninstances = 1"));
    for engine in engines() {
        let server = TestServer::of(models.path()).set("engine", engine).start();
        for (model, version, _) in cases(engine) {
            assert_eq!(mismatches(&server, model, version), Vec::<String>::new(), "on {engine}");
            let properties = server.get(&format!("/v2/models/{model}")).json()["properties"].clone();
            let reason = properties["device_reason"].as_str().unwrap();
            assert_eq!((&properties["device"], &properties["batching"]), (&json!("cpu"), &json!("on")), "{properties}");
            assert!(reason.starts_with(&format!("in a GPU's place: device `{ABSENT}` cannot be used")), "{reason}");
            let group = server.get(&format!("/v2/models/{model}/config")).json()["instance_group"][0].clone();
            assert_eq!((&group["kind"], &group["count"]), (&json!("KIND_CPU"), &json!(1)), "{group}");
            let labels = [format!("model=\"{model}\""), format!("version=\"{version}\""), "device=\"cpu\"".to_string()];
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            assert_eq!(server.metrics().sum("tidegate_model_info", &labels), 1.0);
        }
    }
}

#[test]
fn instance_groups_of_a_triton_repository_are_refused_or_give_way_as_there() {
    let models = Models::new();
    for (name, config) in [
        ("gpu", "instance_group { kind: KIND_GPU gpus: 99 }"),
        ("either", "instance_group { kind: KIND_AUTO gpus: 99 count: 1 }"),
        (
            "told",
            "instance_group { kind: KIND_GPU gpus: 99 } parameters { key: 'device_fallback' value { string_value: 'cpu' } }",
        ),
    ] {
        models.write(&format!("{name}/1/model.onnx"), std::fs::read(root().join("models/tumor/1/model.onnx")).unwrap());
        models.write(&format!("{name}/config.pbtxt"), config);
    }
    let server = TestServer::of(models.path()).start();
    let device = |model: &str| server.get(&format!("/v2/models/{model}")).json()["properties"]["device"].clone();
    assert_eq!((device("either"), device("told"), device("gpu")), (json!("cpu"), json!("cpu"), Value::Null));
}
