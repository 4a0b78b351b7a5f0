//! One engine behind every way in: the same request as JSON, as binary tensors, as typed and as raw gRPC contents gets
//! the same answer, the same refusal, the same limits.

use std::collections::BTreeSet;

use half::{bf16, f16};
use prost::Message;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tidegate::protocol::grpc::proto::infer_parameter::ParameterChoice;
use tidegate::protocol::grpc::proto::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use tidegate::protocol::grpc::proto::*;
use tonic::codec::CompressionEncoding::Gzip;
use tonic::{Code, Status};

use crate::grpc::{Client, client, echo, is_at_rest, parameter, refused};
use crate::support::{Models, Reply, TestServer, engines, root};

/// A tensor as it lies in memory: little-endian elements, strings after their lengths.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tensor {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    data: Vec<u8>,
}

#[derive(Clone, Default)]
struct Ask {
    model: String,
    version: String,
    inputs: Vec<Tensor>,
    outputs: Vec<String>,
    /// A parameter of the request.
    parameter: Option<(&'static str, i64)>,
}

const ROUTES: [&str; 4] = ["JSON", "binary", "typed", "raw"];

/// REST's status and gRPC's code for one kind of error.
const KINDS: [(u16, Code); 5] = [
    (400, Code::InvalidArgument),
    (404, Code::NotFound),
    (413, Code::ResourceExhausted),
    (501, Code::Unimplemented),
    (504, Code::DeadlineExceeded),
];

type Outcome = Result<Vec<Tensor>, (u16, String)>;

async fn ask(server: &TestServer, client: &mut Client, route: &str, ask: &Ask) -> Outcome {
    match route {
        "JSON" => of_reply(&server.infer(&ask.path(), &ask.json())),
        "binary" => of_reply(&ask.binary(server)),
        route => of_response(client.model_infer(ask.message(route == "raw")).await.map(|answer| answer.into_inner())),
    }
}

impl Ask {
    fn path(&self) -> String {
        if self.version.is_empty() { self.model.clone() } else { format!("{}/versions/{}", self.model, self.version) }
    }

    /// Everything but the inputs' data.
    fn envelope(&self, data: impl Fn(&Tensor) -> (&'static str, Value)) -> Value {
        let input = |tensor: &Tensor| {
            let (key, value) = data(tensor);
            json!({"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape, key: value})
        };
        let inputs: Vec<Value> = self.inputs.iter().map(input).collect();
        let outputs: Vec<Value> = self.outputs.iter().map(|name| json!({ "name": name })).collect();
        let mut envelope = json!({"id": "i", "inputs": inputs, "outputs": outputs, "parameters": {}});
        if let Some((name, value)) = self.parameter {
            envelope["parameters"][name] = json!(value);
        }
        envelope
    }

    fn json(&self) -> Value {
        self.envelope(|tensor| {
            let texts = format!("[{}]", texts(&tensor.datatype, &tensor.data).join(","));
            ("data", serde_json::from_str(&texts).unwrap())
        })
    }

    fn binary(&self, server: &TestServer) -> Reply {
        let mut envelope = self.envelope(|tensor| ("parameters", json!({"binary_data_size": tensor.data.len()})));
        envelope["parameters"]["binary_data_output"] = json!(true);
        let envelope = envelope.to_string();
        let length = envelope.len().to_string();
        let tail = self.inputs.iter().flat_map(|tensor| &tensor.data).copied();
        let body: Vec<u8> = envelope.bytes().chain(tail).collect();
        let headers = [("Inference-Header-Content-Length", length.as_str())];
        server.post_with(&format!("/v2/models/{}/infer", self.path()), &headers, body)
    }

    fn message(&self, raw: bool) -> ModelInferRequest {
        let input = |tensor: &Tensor| InferInputTensor {
            name: tensor.name.clone(),
            datatype: tensor.datatype.clone(),
            shape: tensor.shape.clone(),
            contents: (!raw).then(|| contents(&tensor.datatype, &tensor.data)),
            ..Default::default()
        };
        let output = |name: &String| InferRequestedOutputTensor { name: name.clone(), ..Default::default() };
        let number = |(name, value): (&str, i64)| (name.to_string(), parameter(ParameterChoice::Int64Param(value)));
        ModelInferRequest {
            model_name: self.model.clone(),
            model_version: self.version.clone(),
            id: "i".into(),
            parameters: self.parameter.into_iter().map(number).collect(),
            inputs: self.inputs.iter().map(input).collect(),
            outputs: self.outputs.iter().map(output).collect(),
            raw_input_contents: if raw { self.inputs.iter().map(|t| t.data.clone().into()).collect() } else { vec![] },
        }
    }
}

fn of_reply(reply: &Reply) -> Outcome {
    #[derive(Deserialize)]
    struct Body {
        outputs: Vec<Output>,
    }
    /// Its numbers as texts: a detour over `f64` could round them.
    #[derive(Deserialize)]
    struct Output {
        name: String,
        datatype: String,
        shape: Vec<i64>,
        data: Option<Vec<Box<RawValue>>>,
        parameters: Option<Size>,
    }
    #[derive(Deserialize)]
    struct Size {
        binary_data_size: usize,
    }
    if reply.status != 200 {
        return Err((reply.status, reply.error()));
    }
    let length = reply.header("inference-header-content-length").map_or(reply.body.len(), |n| n.parse().unwrap());
    let (json, mut tail) = reply.body.split_at(length);
    let body: Body = serde_json::from_slice(json).unwrap();
    let outputs = body.outputs.into_iter().map(|Output { name, datatype, shape, data, parameters }| {
        let data = match (data, parameters) {
            (Some(data), None) => bytes(&datatype, &data.iter().map(|text| text.get()).collect::<Vec<_>>()),
            (None, Some(Size { binary_data_size })) => {
                let (data, rest) = tail.split_at(binary_data_size);
                tail = rest;
                data.to_vec()
            }
            _ => panic!("{name} has both or neither of data and size"),
        };
        Tensor { name, datatype, shape, data }
    });
    Ok(outputs.collect())
}

fn of_response(response: Result<ModelInferResponse, Status>) -> Outcome {
    let response = response.map_err(|status| {
        let (http, _) = KINDS.iter().find(|(_, code)| *code == status.code()).unwrap_or_else(|| panic!("{status}"));
        (*http, status.message().to_string())
    })?;
    assert_eq!(response.outputs.len(), response.raw_output_contents.len());
    let outputs = response.outputs.into_iter().zip(response.raw_output_contents);
    Ok(outputs
        .map(|(output, data)| Tensor {
            name: output.name,
            datatype: output.datatype,
            shape: output.shape,
            data: data.to_vec(),
        })
        .collect())
}

fn strings(mut data: &[u8]) -> Vec<Vec<u8>> {
    let mut strings = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk() {
        let (string, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        strings.push(string.to_vec());
        data = rest;
    }
    strings
}

fn elements<const N: usize, T>(data: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    data.chunks_exact(N).map(|element| read(element.try_into().unwrap())).collect()
}

/// Elements as JSON.
fn texts(datatype: &str, data: &[u8]) -> Vec<String> {
    macro_rules! as_text {
        ($rust:ty) => {
            elements(data, |b| format!("{:?}", <$rust>::from_le_bytes(b)))
        };
    }
    match datatype {
        "BOOL" => elements(data, |[b]| (b != 0).to_string()),
        "UINT8" => as_text!(u8),
        "UINT16" => as_text!(u16),
        "UINT32" => as_text!(u32),
        "UINT64" => as_text!(u64),
        "INT8" => as_text!(i8),
        "INT16" => as_text!(i16),
        "INT32" => as_text!(i32),
        "INT64" => as_text!(i64),
        "FP16" => elements(data, |b| format!("{:?}", f16::from_le_bytes(b).to_f32())),
        "BF16" => elements(data, |b| format!("{:?}", bf16::from_le_bytes(b).to_f32())),
        "FP32" => as_text!(f32),
        "FP64" => as_text!(f64),
        "BYTES" => strings(data).into_iter().map(|s| json!(String::from_utf8(s).unwrap()).to_string()).collect(),
        other => panic!("{other}"),
    }
}

/// And back.
fn bytes(datatype: &str, texts: &[&str]) -> Vec<u8> {
    macro_rules! from_text {
        ($rust:ty) => {
            texts.iter().flat_map(|text| text.parse::<$rust>().unwrap().to_le_bytes()).collect()
        };
    }
    match datatype {
        "BOOL" => texts.iter().map(|text| u8::from(text.parse::<bool>().unwrap())).collect(),
        "UINT8" => from_text!(u8),
        "UINT16" => from_text!(u16),
        "UINT32" => from_text!(u32),
        "UINT64" => from_text!(u64),
        "INT8" => from_text!(i8),
        "INT16" => from_text!(i16),
        "INT32" => from_text!(i32),
        "INT64" => from_text!(i64),
        "FP16" => texts.iter().flat_map(|text| f16::from_f32(text.parse().unwrap()).to_le_bytes()).collect(),
        "BF16" => texts.iter().flat_map(|text| bf16::from_f32(text.parse().unwrap()).to_le_bytes()).collect(),
        "FP32" => from_text!(f32),
        "FP64" => from_text!(f64),
        "BYTES" => packed(&texts.iter().map(|text| serde_json::from_str(text).unwrap()).collect::<Vec<String>>()),
        other => panic!("{other}"),
    }
}

fn packed(strings: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let each = strings.iter().map(AsRef::as_ref);
    each.flat_map(|s| [&u32::try_from(s.len()).unwrap().to_le_bytes(), s].concat()).collect()
}

/// The typed field of a datatype. Those without one go where a client might try them.
fn contents(datatype: &str, data: &[u8]) -> InferTensorContents {
    let mut contents = InferTensorContents::default();
    match datatype {
        "BOOL" => contents.bool_contents = elements(data, |[b]| b != 0),
        "UINT8" => contents.uint_contents = elements(data, |b| u8::from_le_bytes(b).into()),
        "UINT16" => contents.uint_contents = elements(data, |b| u16::from_le_bytes(b).into()),
        "UINT32" => contents.uint_contents = elements(data, u32::from_le_bytes),
        "UINT64" => contents.uint64_contents = elements(data, u64::from_le_bytes),
        "INT8" => contents.int_contents = elements(data, |b| i8::from_le_bytes(b).into()),
        "INT16" => contents.int_contents = elements(data, |b| i16::from_le_bytes(b).into()),
        "INT32" => contents.int_contents = elements(data, i32::from_le_bytes),
        "INT64" => contents.int64_contents = elements(data, i64::from_le_bytes),
        "FP16" => contents.fp32_contents = elements(data, |b| f16::from_le_bytes(b).into()),
        "BF16" => contents.fp32_contents = elements(data, |b| bf16::from_le_bytes(b).into()),
        "FP32" => contents.fp32_contents = elements(data, f32::from_le_bytes),
        "FP64" => contents.fp64_contents = elements(data, f64::from_le_bytes),
        "BYTES" => contents.bytes_contents = strings(data).into_iter().map(Into::into).collect(),
        other => panic!("{other}"),
    }
    contents
}

/// Six elements of each datatype, the ends of its range among them.
fn extremes(datatype: &str) -> Vec<u8> {
    macro_rules! integers {
        ($rust:ty) => {
            [<$rust>::MIN, <$rust>::MAX, 0, 1, 2, <$rust>::MAX - 1].map(<$rust>::to_le_bytes).concat()
        };
    }
    match datatype {
        "BOOL" => vec![1, 0, 1, 1, 0, 0],
        "UINT8" => integers!(u8),
        "UINT16" => integers!(u16),
        "UINT32" => integers!(u32),
        "UINT64" => integers!(u64),
        "INT8" => integers!(i8),
        "INT16" => integers!(i16),
        "INT32" => integers!(i32),
        "INT64" => integers!(i64),
        // By bits: the largest, the smallest subnormal, the smallest normal, -0, one third, -1.
        "FP16" => [0x7bffu16, 0x0001, 0x0400, 0x8000, 0x3555, 0xbc00].map(u16::to_le_bytes).concat(),
        "BF16" => [0x7f7fu16, 0x0001, 0x0080, 0x8000, 0x3eab, 0xbf80].map(u16::to_le_bytes).concat(),
        "FP32" => [f32::MAX, 1e-45, f32::MIN_POSITIVE, -0.0, 0.1 + 0.2, -1.0 / 3.0].map(f32::to_le_bytes).concat(),
        "FP64" => [f64::MAX, 5e-324, f64::MIN_POSITIVE, -0.0, 0.1 + 0.2, -1.0 / 3.0].map(f64::to_le_bytes).concat(),
        "BYTES" => packed(&["", "a", "\u{0}\"\\\n", "ü", "😀 two words", &"long ".repeat(100)]),
        other => panic!("{other}"),
    }
}

const DATATYPES: [&str; 14] = [
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32", "FP64",
    "BYTES",
];

fn identity(datatype: &str, data: Vec<u8>) -> Ask {
    let input = Tensor { name: "x".into(), datatype: datatype.into(), shape: vec![2, 3], data };
    Ask { model: format!("identity_{}", datatype.to_lowercase()), inputs: vec![input], ..Ask::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_datatype_goes_every_way_and_comes_back_bit_for_bit() {
    let models = DATATYPES
        .iter()
        .fold(Models::new(), |models, datatype| models.with(&format!("identity_{}", datatype.to_lowercase())));
    for engine in engines() {
        let server = TestServer::of(models.path()).set("engine", engine).start();
        let mut client = client(&server).await;
        let mut served = 0;
        for datatype in DATATYPES {
            let request = identity(datatype, extremes(datatype));
            if server.get(&format!("/v2/models/{}/ready", request.model)).status != 200 {
                assert_eq!(engine, "tract", "onnxruntime has {datatype}");
                continue;
            }
            served += 1;
            let expected = Tensor { name: "y".into(), ..request.inputs[0].clone() };
            for route in ROUTES {
                let outcome = ask(&server, &mut client, route, &request).await;
                if route == "typed" && ["FP16", "BF16"].contains(&datatype) {
                    let error = format!(
                        "input 'x' for model '{}': {datatype} has no typed field, send it in raw_input_contents",
                        request.model
                    );
                    assert_eq!(outcome, Err((400, error)));
                } else {
                    assert_eq!(outcome, Ok(vec![expected.clone()]), "{datatype} as {route} on {engine}");
                }
            }
        }
        assert!(served >= 10, "{engine} serves {served} datatypes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_json_cannot_say_agrees_everywhere_else() {
    let bits = [f32::NAN.to_bits(), 0xffc0_1234, f32::INFINITY.to_bits(), f32::NEG_INFINITY.to_bits(), 0, 1];
    let request = identity("FP32", bits.map(u32::to_le_bytes).concat());
    let models = Models::new().with("identity_fp32");
    for engine in engines() {
        let server = TestServer::of(models.path()).set("engine", engine).start();
        let mut client = client(&server).await;
        for route in ["binary", "typed", "raw"] {
            let outcome = ask(&server, &mut client, route, &request).await.unwrap();
            assert_eq!(outcome[0].data, request.inputs[0].data, "{route} on {engine}");
        }
    }
}

/// The requests of tests/traps/expected.json.
fn traps() -> Vec<Ask> {
    let file = std::fs::read_to_string(root().join("tests/traps/expected.json")).unwrap();
    let file: Value = serde_json::from_str(&file).unwrap();
    let request = |(model, case): (&String, &Value)| {
        let inputs = case["inputs"].as_object().unwrap().iter().map(|(name, tensor)| {
            let datatype = tensor["datatype"].as_str().unwrap();
            let texts: Vec<String> = tensor["data"].as_array().unwrap().iter().map(Value::to_string).collect();
            Tensor {
                name: name.clone(),
                datatype: datatype.into(),
                shape: serde_json::from_value(tensor["shape"].clone()).unwrap(),
                data: bytes(datatype, &texts.iter().map(String::as_str).collect::<Vec<_>>()),
            }
        });
        Ask { model: model.clone(), inputs: inputs.collect(), ..Ask::default() }
    };
    file.as_object().unwrap().iter().map(request).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_model_computes_the_same_whichever_way_it_is_asked() {
    let requests = traps();
    let models = requests.iter().fold(Models::new(), |models, request| models.with(&request.model));
    for engine in engines() {
        let server = TestServer::of(models.path()).set("engine", engine).start();
        let mut client = client(&server).await;
        let mut served = 0;
        for request in &requests {
            if server.get(&format!("/v2/models/{}/ready", request.model)).status != 200 {
                continue;
            }
            served += 1;
            let first = ask(&server, &mut client, ROUTES[0], request).await;
            assert!(first.is_ok(), "{} on {engine}: {first:?}", request.model);
            for route in &ROUTES[1..] {
                let other = ask(&server, &mut client, route, request).await;
                assert_eq!(other, first, "{} as {route} on {engine}", request.model);
            }
        }
        assert!(served >= 20, "{engine} serves {served} models");
        server.eventually("every place is free", is_at_rest);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn refusals_are_the_same_whichever_way_one_asks() {
    let models = Models::new().with("sum_rows").with("corrupt");
    let server = TestServer::of(models.path()).start();
    let mut client = client(&server).await;
    let rows = |name: &str, rows: i64| Tensor {
        name: name.into(),
        datatype: "FP32".into(),
        shape: vec![rows, 16],
        data: vec![0; usize::try_from(rows).unwrap() * 64],
    };
    let of = |inputs: Vec<Tensor>| Ask { model: "sum_rows".into(), inputs, ..Ask::default() };
    let good = || of(vec![rows("INPUT0", 1), rows("INPUT1", 1)]);
    let outputs = |names: &[&str]| Ask { outputs: names.iter().map(|name| name.to_string()).collect(), ..good() };
    let shaped = |shape: Vec<i64>| of(vec![rows("INPUT0", 1), Tensor { shape, ..rows("INPUT1", 1) }]);
    let integers = Tensor { datatype: "INT32".into(), ..rows("INPUT1", 1) };
    let cases = [
        (404, Ask { model: "nope".into(), ..good() }),
        (404, Ask { model: "corrupt".into(), ..good() }),
        (404, Ask { version: "9".into(), ..good() }),
        (400, of(vec![])),
        (400, of(vec![rows("INPUT0", 1)])),
        (400, of(vec![rows("INPUT0", 1), rows("INPUT0", 1)])),
        (400, of(vec![rows("INPUT0", 1), rows("other", 1)])),
        (400, of(vec![rows("INPUT0", 1), rows("INPUT1", 2)])),
        (400, of(vec![rows("INPUT0", 0), rows("INPUT1", 0)])),
        (400, of(vec![rows("INPUT0", 1), integers])),
        (400, shaped(vec![16])),
        (400, shaped(vec![2, 8])),
        (400, shaped(vec![1, 16, 1])),
        (400, outputs(&["z"])),
        (400, outputs(&["OUTPUT0", "OUTPUT0"])),
        (504, Ask { parameter: Some(("timeout", 1)), ..good() }),
        (501, Ask { parameter: Some(("sequence_id", 5)), ..good() }),
    ];
    for (case, (status, request)) in cases.iter().enumerate() {
        let mut texts = BTreeSet::new();
        for route in ROUTES {
            let (found, text) = ask(&server, &mut client, route, request).await.unwrap_err();
            assert_eq!(found, *status, "case {case} as {route}: {text}");
            texts.insert(text);
        }
        assert_eq!(texts.len(), 1, "case {case}: {texts:#?}");
    }
    let refused_by = |protocol: &str| {
        let labels = [&*format!("protocol=\"{protocol}\"")];
        let metrics = server.metrics();
        let ok = metrics.sum("tidegate_requests_total", &[labels[0], "outcome=\"ok\""]);
        assert_eq!(ok, 0.0);
        metrics.sum("tidegate_requests_refused_total", &labels) + metrics.sum("tidegate_requests_total", &labels)
    };
    assert_eq!((refused_by("http"), refused_by("grpc")), (cases.len() as f64 * 2.0, cases.len() as f64 * 2.0));
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn provenance_is_said_everywhere_and_is_the_models() {
    let models = Models::new();
    models.add_version("digits", "1", "1");
    models.add_version("digits", "2", "2");
    let server = TestServer::of(models.path()).start();
    let mut client = client(&server).await;
    let pixels = Tensor { name: "image".into(), datatype: "FP32".into(), shape: vec![1, 64], data: vec![0; 256] };
    let (mut ids, mut digests) = (BTreeSet::new(), BTreeSet::new());
    for (asked, answers) in [("1", "1"), ("2", "2"), ("", "2")] {
        let request = Ask {
            model: "digits".into(),
            version: asked.into(),
            inputs: vec![pixels.clone()],
            outputs: vec![],
            parameter: None,
        };
        let about = server.get(&format!("/v2/models/digits/versions/{answers}")).json();
        let digest = about["properties"]["digest"].as_str().unwrap().to_string();
        let labels = [&*format!("version=\"{answers}\""), &*format!("digest=\"{digest}\"")];
        assert_eq!(server.metrics().sum("tidegate_model_info", &labels), 1.0);

        for reply in [server.infer(&request.path(), &request.json()), request.binary(&server)] {
            let header = |name| reply.header(name).unwrap_or_default().to_string();
            let length =
                reply.header("inference-header-content-length").map_or(reply.body.len(), |n| n.parse().unwrap());
            let body: Value = serde_json::from_slice(&reply.body[..length]).unwrap();
            assert_eq!((&body["model_name"], &body["id"]), (&json!("digits"), &json!("i")));
            assert_eq!((&body["model_version"], header("x-model-version")), (&json!(answers), answers.to_string()));
            assert_eq!(body["parameters"]["prediction_id"], json!(header("x-prediction-id")));
            assert_eq!(header("x-model-digest"), digest);
            assert!(header("server-timing").starts_with("prepare;dur="));
            ids.insert(header("x-prediction-id"));
        }
        for raw in [true, false] {
            let answer = client.model_infer(request.message(raw)).await.unwrap();
            let metadata = answer.metadata().clone();
            let header = |name| metadata.get(name).map_or("", |value| value.to_str().unwrap()).to_string();
            let body = answer.into_inner();
            let said = |name: &str| match body.parameters.get(name).and_then(|p| p.parameter_choice.clone()) {
                Some(ParameterChoice::StringParam(value)) => value,
                other => panic!("{name} is {other:?}"),
            };
            assert_eq!((&*body.model_name, &*body.id), ("digits", "i"));
            assert_eq!((&*body.model_version, header("x-model-version")), (answers, answers.to_string()));
            assert_eq!(said("prediction_id"), header("x-prediction-id"));
            assert_eq!((said("model_digest"), header("x-model-digest")), (digest.clone(), digest.clone()));
            assert!(header("server-timing").starts_with("prepare;dur="));
            ids.insert(header("x-prediction-id"));
        }
        digests.insert(digest);
    }
    assert_eq!((ids.len(), digests.len()), (12, 2), "every prediction has its own id, every version its own digest");
    for id in ids {
        // UUIDv7, which sorts by time: the version is the first digit of the third group.
        assert_eq!((id.len(), id.split('-').nth(2).unwrap().as_bytes()[0]), (36, b'7'), "{id}");
    }
    for digest in digests {
        let hex = digest.strip_prefix("sha256:").unwrap();
        assert!(hex.len() == 64 && hex.bytes().all(|digit| digit.is_ascii_hexdigit()), "{digest}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_number_limits_bodies_and_messages() {
    let models = Models::new().with("identity_fp32");
    let message = |tail: usize| ModelInferRequest { id: "i".repeat(tail), ..echo(100) };
    let limit = message(50).encoded_len();
    let server = TestServer::of(models.path()).set("limits.body", format!("{limit}B")).start();
    let path = "/v2/models/identity_fp32/infer";
    // REST: spaces make up the length.
    let body = |length: usize| {
        let json = r#"{"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[1]}]}"#;
        format!("{json:length$}")
    };
    assert_eq!(server.post(path, body(limit)).status, 200);
    let over = server.post(path, body(limit + 1));
    assert_eq!((over.status, over.error()), (413, format!("the request body is longer than {limit} bytes")));

    // gRPC: the id does; both messages are far smaller once compressed.
    assert_eq!((message(50).encoded_len(), message(51).encoded_len()), (limit, limit + 1));
    let plain = client(&server).await;
    for mut client in [plain.clone(), plain.send_compressed(Gzip)] {
        assert!(client.model_infer(message(50)).await.is_ok());
        let over = client.model_infer(message(51)).await.unwrap_err();
        assert_eq!(over.code(), Code::ResourceExhausted, "{over}");
    }
    assert_eq!((refused(&server, "http", "too_large"), refused(&server, "grpc", "too_large")), (1.0, 2.0));
    server.eventually("every place is free", is_at_rest);
}
