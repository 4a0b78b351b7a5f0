//! A repository written for Triton, with a `config.pbtxt` for every model, serves as it is.

use serde_json::{Value, json};

use crate::goldens::{golden, mismatches, request};
use crate::support::{Models, TestServer, engines, root};

const DIGITS: &str = r#"
name: "digits"
platform: "onnxruntime_onnx"
max_batch_size: 64
input [ { name: "image" data_type: TYPE_FP32 dims: [ 64 ] } ]
output [ { name: "probabilities" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" } ]
version_policy: { all {} }
dynamic_batching {
  preferred_batch_size: [ 8, 16 ]
  max_queue_delay_microseconds: 100
  default_queue_policy { default_timeout_microseconds: 60000000 allow_timeout_override: true max_queue_size: 100 }
}
instance_group [ { count: 1 kind: KIND_CPU } ]
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
optimization { graph { level: 1 } }
model_warmup [
  { name: "zeros" batch_size: 16 inputs { key: "image" value { data_type: TYPE_FP32 dims: 64 zero_data: true } } },
  { name: "drawn" batch_size: 1 count: 2 inputs { key: "image" value { data_type: TYPE_FP32 dims: 64 random_data: true } } },
  { name: "real" batch_size: 1 inputs { key: "image" value { data_type: TYPE_FP32 dims: 64 input_data_file: "image" } } }
]
"#;

const TUMOR: &str = r#"
backend: "onnxruntime"
default_model_filename: "net.onnx"
max_batch_size: 32
input { name: "features" data_type: TYPE_FP32 dims: 30 }
output { name: "probabilities" data_type: TYPE_FP32 dims: 2 label_filename: "labels.txt" }
"#;

const WINE: &str = r#"
name: "wine"
backend: "onnxruntime"
input { name: "features" data_type: TYPE_FP32 dims: [ -1, 13 ] }
output [
  { name: "label" data_type: TYPE_INT64 dims: [ -1 ] },
  { name: "probabilities" data_type: TYPE_FP32 dims: [ -1, 3 ] label_filename: "labels.txt" }
]
"#;

const DIGITS_ST: &str = r#"
platform: "candle_safetensors"
max_batch_size: 64
input [ { name: "image" data_type: TYPE_FP32 dims: [ 64 ] } ]
output [ { name: "probabilities" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" } ]
dynamic_batching { }
"#;

const TUMOR_ST: &str = "backend: \"candle\"";

/// The model files and labels of an example, without its own settings, as `name`.
fn add(models: &Models, example: &str, versions: &[&str], name: &str, config: &str, file: &str) {
    let from = root().join("models").join(example);
    for version in versions {
        models
            .write(&format!("{name}/{version}/{file}"), std::fs::read(from.join(version).join("model.onnx")).unwrap());
    }
    if let Ok(labels) = std::fs::read(from.join("labels.txt")) {
        models.write(&format!("{name}/labels.txt"), labels);
    }
    models.write(&format!("{name}/config.pbtxt"), config);
}

fn repository() -> Models {
    let models = Models::new();
    add(&models, "digits", &["1", "2"], "digits", DIGITS, "model.onnx");
    models.write("digits/warmup/image", [0; 64 * size_of::<f32>()]);
    add(&models, "tumor", &["1"], "tumor", TUMOR, "net.onnx");
    add(&models, "wine", &["1"], "wine", WINE, "model.onnx");
    add(&models, "diabetes", &["1"], "diabetes", "platform: \"onnxruntime_onnx\"", "model.onnx");
    add_layered(&models, "digits_st", DIGITS_ST);
    add_layered(&models, "tumor_st", TUMOR_ST);
    models
}

/// A safetensors example: its layers stay in a `model.toml` that says nothing else.
fn add_layered(models: &Models, name: &str, config: &str) {
    let from = root().join("models").join(name);
    let own = std::fs::read_to_string(from.join("model.toml")).unwrap();
    let layers: Vec<&str> = own.lines().filter(|line| !line.starts_with("labels")).collect();
    models.write(&format!("{name}/model.toml"), layers.join("\n"));
    models.write(&format!("{name}/1/model.safetensors"), std::fs::read(from.join("1/model.safetensors")).unwrap());
    models.write(&format!("{name}/labels.txt"), std::fs::read(from.join("labels.txt")).unwrap());
    models.write(&format!("{name}/config.pbtxt"), config);
}

#[test]
fn every_example_answers_as_the_frameworks_do() {
    let models = repository();
    for engine in engines() {
        let server = TestServer::of(models.path()).set("engine", engine).start();
        for (model, version) in [
            ("digits", "1"),
            ("digits", "2"),
            ("tumor", "1"),
            ("wine", "1"),
            ("diabetes", "1"),
            ("digits_st", "1"),
            ("tumor_st", "1"),
        ] {
            assert_eq!(mismatches(&server, model, version), Vec::<String>::new(), "on {engine}");
        }
    }
}

#[test]
fn what_the_file_says_is_in_effect() {
    let models = repository();
    add(&models, "digits", &["1", "2"], "latest", "", "model.onnx");
    let hasty = "max_batch_size: 4 dynamic_batching { default_queue_policy { default_timeout_microseconds: 1 } }";
    add(&models, "tumor", &["1"], "hasty", hasty, "model.onnx");
    let server = TestServer::of(models.path()).start();
    let config = |model: &str| server.get(&format!("/v2/models/{model}/config")).json();

    let digits = config("digits");
    let batching = &digits["dynamic_batching"];
    assert_eq!((&digits["max_batch_size"], &batching["preferred_batch_size"]), (&json!(64), &json!([16])), "{digits}");
    assert_eq!(batching["max_queue_delay_microseconds"], 100);
    assert_eq!(batching["default_queue_policy"]["default_timeout_microseconds"], 60_000_000);
    assert_eq!(batching["default_queue_policy"]["max_queue_size"], 100);
    assert_eq!((&digits["instance_group"][0]["count"], &digits["version_policy"]), (&json!(1), &json!({"all": {}})));
    assert_eq!(digits["output"][0]["label_filename"], "labels.txt");

    let tumor = config("tumor");
    assert_eq!((&tumor["max_batch_size"], &tumor["dynamic_batching"]), (&json!(32), &Value::Null), "{tumor}");
    let row = [0.0; 30];
    let rows = |model: &str, count: usize| {
        let input = json!({"name": "features", "shape": [count, 30], "datatype": "FP32", "data": vec![row; count]});
        server.infer(model, &json!({ "inputs": [input] }))
    };
    assert_eq!((rows("tumor", 32).status, rows("tumor", 33).status), (200, 400));
    assert_eq!(rows("hasty", 1).status, 504, "its time is over before it is read");
    assert_eq!(config("wine")["max_batch_size"], 0);

    let inputs = &golden("digits", "2")["cases"][0]["inputs"];
    let status = |version: &str| server.infer(&format!("latest/versions/{version}"), &request(inputs)).status;
    assert_eq!((status("1"), status("2")), (404, 200), "the latest one version, where no policy is written");
}

#[test]
fn clients_see_the_declared_shapes_and_outputs() {
    let models = repository();
    let square =
        "max_batch_size: 8 input { name: 'image' data_type: TYPE_FP32 dims: [ 8, 8 ] reshape { shape: [ 64 ] } }
        output { name: 'probabilities' data_type: TYPE_FP32 dims: [ 10 ] } dynamic_batching {}";
    add(&models, "digits", &["1"], "square", square, "model.onnx");
    // As exporters of scikit-learn write it: a label has no axis but that of rows, and the file gives it one.
    let label = "max_batch_size: 8 input { name: 'features' data_type: TYPE_FP32 dims: 13 }
        output { name: 'label' data_type: TYPE_INT64 dims: 1 reshape { shape: [] } }";
    add(&models, "wine", &["1"], "label", label, "model.onnx");
    for engine in engines() {
        let server = TestServer::of(models.path()).set("engine", engine).start();
        let metadata = |model: &str| server.get(&format!("/v2/models/{model}")).json();
        assert_eq!(metadata("square")["inputs"][0]["shape"], json!([-1, 8, 8]));
        let told = server.get("/v2/models/square/config").json();
        assert_eq!(
            (&told["input"][0]["dims"], &told["input"][0]["reshape"]),
            (&json!([8, 8]), &json!({"shape": [64]}))
        );
        assert_eq!(told["output"][0]["reshape"], Value::Null);
        let label = metadata("label");
        assert_eq!(label["outputs"], json!([{"name": "label", "datatype": "INT64", "shape": [-1, 1]}]));

        let ask = |model: &str, input: &Value, shape: &Value| {
            let input = json!({"name": input["name"], "shape": shape, "datatype": "FP32", "data": input["data"]});
            server.infer(model, &json!({ "inputs": [input] }))
        };
        let output = |answer: &Value, name: &str| {
            let outputs = answer["outputs"].as_array().unwrap_or_else(|| panic!("{answer}"));
            outputs.iter().find(|output| output["name"] == name).cloned().unwrap_or_else(|| panic!("{answer}"))
        };
        let case = |model: &str| request(&golden(model, "1")["cases"][0]["inputs"])["inputs"][0].clone();

        let image = case("digits");
        let rows = image["shape"][0].clone();
        let flat = ask("digits/versions/1", &image, &json!([rows, 64])).json();
        let reshaped = ask("square", &image, &json!([rows, 8, 8])).json();
        assert_eq!(output(&flat, "probabilities")["data"], output(&reshaped, "probabilities")["data"]);
        let refused = ask("square", &image, &json!([rows, 64]));
        assert!(refused.status == 400 && refused.text().contains("[-1,8,8]"), "{}", refused.text());

        let features = case("wine");
        let both = ask("wine", &features, &features["shape"]).json();
        let one = ask("label", &features, &features["shape"]).json();
        assert_eq!(one["outputs"].as_array().map(Vec::len), Some(1), "{one}");
        let (both, one) = (output(&both, "label"), output(&one, "label"));
        assert_eq!((&one["shape"], &one["data"]), (&json!([both["shape"][0], 1]), &both["data"]));
    }
}

#[test]
fn a_file_that_cannot_be_honoured_fails_its_model_alone() {
    let models = repository();
    let tumor = |name: &str, config: &str| add(&models, "tumor", &["1"], name, config, "model.onnx");
    tumor("unknown", "max_batch_size: 4\nmax_batch_sise: 4");
    tumor("misnamed", "name: \"tumor\"");
    tumor("wide", "max_batch_size: 4 input { name: \"features\" data_type: TYPE_FP64 dims: 31 }");
    tumor("both", "");
    models.write("both/model.toml", "threads = 2");
    let warm_up = "inputs { key: \"features\" value { data_type: TYPE_FP32 dims: 31 zero_data: true } }";
    tumor("cold", &format!("max_batch_size: 4 model_warmup {{ name: \"w\" {warm_up} }}"));
    models.write("script/1/model.py", "");
    models.write("script/config.pbtxt", "backend: \"python\"");
    let server = TestServer::of(models.path()).start();
    let index = server.post("/v2/repository/index", "").json();
    let reason = |model: &str| {
        let entry = index.as_array().unwrap().iter().find(|entry| entry["name"] == model);
        entry.unwrap_or_else(|| panic!("no {model}: {index}"))["reason"].as_str().unwrap_or_default().to_string()
    };
    for (model, expected) in [
        ("unknown", "config.pbtxt: `line 2`: found field 'max_batch_sise' not found"),
        ("misnamed", "config.pbtxt: `name`: found \"tumor\", expected \"misnamed\""),
        ("wide", "config.pbtxt: input `features`: found FP64 [-1,31], expected FP32 [-1,30] as in the model"),
        (
            "both",
            "`model.toml` beside `config.pbtxt` says how the model is served, expected it to say only what the model is",
        ),
        ("cold", "warm-up `w`: input `features` is FP32 [1,31], expected FP32 [-1,30]"),
        ("script", "config.pbtxt: `backend`: found \"python\", expected one of \"onnxruntime\""),
    ] {
        assert!(reason(model).contains(expected), "{model}: {}", reason(model));
    }
    assert_eq!(mismatches(&server, "tumor", "1"), Vec::<String>::new());
}
