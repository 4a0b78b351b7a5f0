//! Safetensors models through a registry: every layer as PyTorch computes it, encoders as transformers does, and
//! refusals that name what is wrong.

use serde_json::{Value, json};
use tidegate::registry::{Config, EnginesConfig, Report, inspect, validate};

use crate::support::{Models, TestServer, root};

fn config(path: &std::path::Path) -> Config {
    Config {
        root: path.to_path_buf(),
        temp_dir: std::env::temp_dir(),
        engines: EnginesConfig::default(),
        ..Config::default()
    }
}

/// A file of the tensors `{name: {shape, data}}`: numbers as FP32, but for counters.
fn file(tensors: &Value) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, tensor) in tensors.as_object().unwrap() {
        let (begin, counter) = (data.len(), name.ends_with("num_batches_tracked"));
        for number in tensor["data"].as_array().unwrap() {
            match counter {
                true => data.extend(number.as_i64().unwrap().to_le_bytes()),
                false => data.extend((number.as_f64().unwrap() as f32).to_le_bytes()),
            }
        }
        let dtype = if counter { "I64" } else { "F32" };
        header.insert(
            name.clone(),
            json!({"dtype": dtype, "shape": tensor["shape"], "data_offsets": [begin, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// `model.toml` of a case in `layers.json`; JSON's lists, numbers, texts and booleans are TOML's.
fn settings(case: &Value) -> String {
    let mut shape = case["input"]["shape"].clone();
    shape[0] = json!(-1);
    let first = case["layers"][0]["type"].as_str().unwrap();
    let datatype = if first == "Embedding" { "INT64" } else { "FP32" };
    let mut text = format!("input = {{ name = \"x\", datatype = \"{datatype}\", shape = {shape} }}\n");
    for layer in case["layers"].as_array().unwrap() {
        text.push_str("\n[[layers]]\n");
        for (key, value) in layer.as_object().unwrap() {
            text.push_str(&format!("{key} = {value}\n"));
        }
    }
    text
}

fn golden(case: &Value) -> Value {
    let tensor = |tensor: &Value, datatype: &str| json!({"datatype": datatype, "shape": tensor["shape"], "data": tensor["data"]});
    let embeds = case["layers"][0]["type"] == "Embedding";
    json!({
        "source": "PyTorch", "tolerance": {"absolute": 2e-6, "relative": 2e-5},
        "cases": [{
            "name": case["name"],
            "inputs": {"x": tensor(&case["input"], if embeds { "INT64" } else { "FP32" })},
            "outputs": {"output": tensor(&case["output"], "FP32")},
        }],
    })
}

fn outcomes(reports: &[Report]) -> Vec<String> {
    let failed = |report: &Report| match (&report.outcome, report.goldens) {
        (Err(reason), _) => Some(format!("{}: {reason}", report.model)),
        (Ok(_), None) => Some(format!("{}: no golden case", report.model)),
        (Ok(facts), _) if facts.backend != "candle" => Some(format!("{}: {}", report.model, facts.backend)),
        _ => None,
    };
    reports.iter().filter_map(failed).collect()
}

#[test]
fn every_layer_answers_as_pytorch_does() {
    let path = root().join("tests/safetensors/layers.json");
    let cases: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = cases["cases"].as_array().unwrap();
    let models = Models::new();
    for case in cases {
        let name = case["name"].as_str().unwrap();
        models.write(&format!("{name}/model.toml"), settings(case));
        models.write(&format!("{name}/1/model.safetensors"), file(&case["tensors"]));
        models.write(&format!("{name}/1/expected.json"), golden(case).to_string());
    }
    let reports = validate(&config(models.path()), 2).unwrap();
    assert_eq!(reports.len(), cases.len(), "one model for each case");
    assert_eq!(outcomes(&reports), [""; 0]);
    // Rows are independent in all of them, and the self-test says so where invented rows show a difference.
    for facts in reports.iter().filter_map(|report| report.outcome.as_ref().ok()) {
        assert!(!facts.batching.reason.contains("differs"), "{}: {}", facts.name, facts.batching.reason);
    }
}

#[test]
fn encoders_answer_as_transformers_does() {
    let reports = validate(&config(&root().join("tests/safetensors/encoders")), 2).unwrap();
    assert_eq!((reports.len(), outcomes(&reports)), (8, vec![]));
    let facts = |name: &str| reports.iter().find(|report| &*report.model == name).unwrap().outcome.as_ref().unwrap();
    for name in ["bert", "bert_classes", "bert_sentences", "distilbert_classes", "roberta", "xlm_roberta_cls"] {
        assert!(facts(name).batching.enabled, "{name}: {}", facts(name).batching.reason);
    }
    let classes = facts("bert_classes");
    assert_eq!(classes.outputs[0].labels.as_deref(), Some(&["no".into(), "yes".into(), "maybe".into()][..]));
    assert!(classes.producer.starts_with("transformers "), "{}", classes.producer);
    let pooler = &facts("bert").warnings;
    assert!(pooler[0].contains("pooler.dense.weight"), "{pooler:?}");
}

#[test]
fn twins_answer_over_rest_as_their_siblings_do() {
    let server = TestServer::of(&root().join("models")).start();
    for (twin, sibling) in [("digits_st/versions/1", "digits/versions/2"), ("tumor_st/versions/1", "tumor/versions/1")]
    {
        let (model, version) = (sibling.split('/').next().unwrap(), sibling.rsplit('/').next().unwrap());
        let path = root().join("models").join(model).join(version).join("expected.json");
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let (name, input) = golden["cases"][2]["inputs"].as_object().unwrap().iter().next().unwrap();
        let input = json!({
            "name": name, "shape": input["shape"], "datatype": input["datatype"], "data": input["data"],
        });
        let request = json!({ "inputs": [input] });
        let (one, other) = (server.infer(twin, &request), server.infer(sibling, &request));
        assert_eq!((one.status, other.status), (200, 200), "{}", one.text());
        let pairs = one.output("probabilities").into_iter().zip(other.output("probabilities")).collect::<Vec<_>>();
        assert!(!pairs.is_empty() && pairs.iter().all(|(a, b)| (a - b).abs() < 1e-5), "{twin}: {pairs:?}");
    }
    let metadata = server.get("/v2/models/digits_st").json();
    assert_eq!(metadata["platform"], "candle_safetensors");
}

/// Why `inspect` would not serve the one model there is.
fn refusal(models: &Models) -> String {
    inspect(&config(&models.path().join("m")), 2).unwrap()[0].outcome.as_ref().unwrap_err().clone()
}

#[test]
fn refusals_name_what_is_wrong() {
    let read = |file: &str| std::fs::read(root().join("models").join(file)).unwrap();
    let text = |file: &str| String::from_utf8(read(file)).unwrap();
    let models = Models::new();
    models.write("m/1/model.safetensors", read("tumor_st/1/model.safetensors"));
    assert_eq!(
        refusal(&models),
        "`model.safetensors` holds weights only: expected [[layers]] in model.toml, or a config.json beside it"
    );
    models.write("m/labels.txt", text("tumor_st/labels.txt"));
    models.write("m/model.toml", text("tumor_st/model.toml"));
    inspect(&config(&models.path().join("m")), 2).unwrap()[0].outcome.as_ref().unwrap();
    models.write("m/model.toml", format!("backend = \"tract\"\n{}", text("tumor_st/model.toml")));
    assert!(refusal(&models).contains("expected \"candle\" or \"auto\" for a safetensors model"));
    models.write("m/model.toml", text("tumor_st/model.toml").replace("\"Softmax\"", "\"Softmix\""));
    assert!(refusal(&models).contains("`layers[2].type`: found \"Softmix\", expected `Softmax`, perhaps"));
    models.write("m/model.toml", text("tumor_st/model.toml").replace("out_features = 2", "out_features = 3"));
    assert!(refusal(&models).contains("tensor `1.weight` has shape [2, 30], expected [3, 30]"));
    models.write("m/model.toml", text("tumor_st/model.toml"));
    let mut renamed = read("tumor_st/1/model.safetensors");
    let at = renamed.windows(8).position(|window| window == b"1.weight").unwrap();
    renamed[at..at + 8].copy_from_slice(b"1.wieght");
    models.write("m/1/model.safetensors", &renamed);
    assert!(refusal(&models).contains("tensor `1.weight` is missing, expected [2, 30]; `1.wieght`, perhaps"));
    models.write("m/1/model.onnx", "x");
    assert_eq!(refusal(&models), "`model.onnx` and `model.safetensors` are both there, expected one");
    std::fs::remove_file(models.path().join("m/1/model.safetensors")).unwrap();
    assert!(refusal(&models).contains("`layers`: found beside `model.onnx`"));
}

#[test]
fn a_shard_outside_the_folder_is_not_opened() {
    let models = Models::new();
    let encoder = root().join("tests/safetensors/encoders/bert_sentences/1");
    for name in ["config.json", "modules.json", "1_Pooling/config.json", "model-00001-of-00002.safetensors"] {
        models.write(&format!("m/1/{name}"), std::fs::read(encoder.join(name)).unwrap());
    }
    let index = std::fs::read_to_string(encoder.join("model.safetensors.index.json")).unwrap();
    models.write("m/1/model.safetensors.index.json", &index);
    assert_eq!(refusal(&models), "`model-00002-of-00002.safetensors` is not there");
    models.write("m/1/model.safetensors.index.json", index.replace("model-00002", "../model-00002"));
    assert!(refusal(&models).contains("expected the plain name of a safetensors file beside it"));
}
