//! The example models answer as the frameworks that trained them do, on every engine, alone and batched.

use serde_json::{Value, json};

use crate::support::{Models, TestServer, engines, root};

const MODELS: [(&str, &str); 7] = [
    ("digits", "1"),
    ("digits", "2"),
    ("tumor", "1"),
    ("diabetes", "1"),
    ("wine", "1"),
    ("digits_st", "1"),
    ("tumor_st", "1"),
];

pub fn golden(model: &str, version: &str) -> Value {
    let path = root().join("models").join(model).join(version).join("expected.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub fn request(inputs: &Value) -> Value {
    let inputs: Vec<Value> = inputs
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, tensor)| {
            json!({"name": name, "shape": tensor["shape"], "datatype": tensor["datatype"], "data": tensor["data"]})
        })
        .collect();
    json!({ "inputs": inputs })
}

fn numbers(tensor: &Value) -> Vec<f64> {
    tensor["data"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// The first element that differs by more than the file's tolerance.
fn difference(found: &[f64], expected: &[f64], tolerance: &Value) -> Option<String> {
    let (absolute, relative) = (tolerance["absolute"].as_f64().unwrap(), tolerance["relative"].as_f64().unwrap());
    if found.len() != expected.len() {
        return Some(format!("{} elements, expected {}", found.len(), expected.len()));
    }
    let off = |(f, e): (&f64, &f64)| (f - e).abs() > absolute + relative * e.abs() || f.is_nan();
    let at = found.iter().zip(expected).position(off)?;
    Some(format!("element {at} is {}, expected {}", found[at], expected[at]))
}

/// Every golden case that fails, by name.
pub fn mismatches(server: &TestServer, model: &str, version: &str) -> Vec<String> {
    let golden = golden(model, version);
    let mut mismatches = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let reply = server.infer(&format!("{model}/versions/{version}"), &request(&case["inputs"]));
        assert_eq!(reply.status, 200, "{model} {version}: {}", reply.text());
        for (name, expected) in case["outputs"].as_object().unwrap() {
            if let Some(what) = difference(&reply.output(name), &numbers(expected), &golden["tolerance"]) {
                mismatches.push(format!("{model} {version} {} {name}: {what}", case["name"]));
            }
        }
    }
    mismatches
}

#[test]
fn every_engine_answers_as_the_frameworks_do() {
    for engine in engines() {
        let server = TestServer::of(&root().join("models")).set("engine", engine).start();
        for (model, version) in MODELS {
            assert_eq!(mismatches(&server, model, version), Vec::<String>::new(), "on {engine}");
            let metadata = server.get(&format!("/v2/models/{model}/versions/{version}")).json();
            let platform = format!("{engine}_onnx");
            let platform = if model.ends_with("_st") { "candle_safetensors" } else { &platform };
            assert_eq!(metadata["platform"], platform);
        }
    }
}

/// The file with the sign of the second bias turned (the first is 0). In a TensorProto the raw data (field 9, tag 0x4a)
/// follow the name, after one byte of length.
fn with_one_weight_changed(mut file: Vec<u8>, initialiser: &[u8]) -> Vec<u8> {
    let tagged: Vec<u8> = [initialiser, &[0x4a]].concat();
    let name = file.windows(tagged.len()).position(|window| window == tagged).expect("the initialiser");
    let second = name + tagged.len() + 1 + size_of::<f32>();
    file[second + 3] ^= 0x80;
    file
}

#[test]
fn one_changed_weight_fails_the_goldens() {
    let models = Models::new().with("tumor");
    let file = std::fs::read(root().join("models/tumor/1/model.onnx")).unwrap();
    models.write("tumor/1/model.onnx", with_one_weight_changed(file, b"bias0"));
    for engine in engines() {
        let server = TestServer::of(models.path()).set("engine", engine).start();
        assert_ne!(mismatches(&server, "tumor", "1"), Vec::<String>::new(), "{engine} does not see the change");
    }
}

#[test]
fn a_row_answers_the_same_alone_and_batched() {
    for engine in engines() {
        let server = TestServer::of(&root().join("models")).set("engine", engine).start();
        for (model, version) in MODELS {
            let golden = golden(model, version);
            let many = golden["cases"].as_array().unwrap().iter().max_by_key(|case| case["inputs"].to_string().len());
            let inputs = &many.unwrap()["inputs"];
            let target = format!("{model}/versions/{version}");
            let whole = server.infer(&target, &request(inputs));
            let (input, tensor) = inputs.as_object().unwrap().iter().next().unwrap();
            let (rows, width) =
                (tensor["shape"][0].as_u64().unwrap() as usize, tensor["shape"][1].as_u64().unwrap() as usize);
            for output in ["probabilities", "progression", "label"] {
                if !whole.text().contains(&format!("\"{output}\"")) {
                    continue;
                }
                let batched = whole.output(output);
                let per_row = batched.len() / rows;
                for row in 0..rows {
                    let data = &tensor["data"].as_array().unwrap()[row * width..(row + 1) * width];
                    let alone = server.infer(
                        &target,
                        &json!({"inputs": [{"name": input, "shape": [1, width], "datatype": "FP32", "data": data}]}),
                    );
                    let found = alone.output(output);
                    let expected = &batched[row * per_row..(row + 1) * per_row];
                    let what = difference(&found, expected, &json!({"absolute": 1e-6, "relative": 1e-5}));
                    assert_eq!(what, None, "{engine} {target} {output} row {row}");
                }
            }
        }
    }
}
