//! A request through the REST service on an engine that answers at once. What is written as JSON and what is binary is
//! chosen for each direction alone, so that what a direction costs is a difference between two lines.

use axum::body::{Body, Bytes};
use axum::http::Request;
use criterion::{BenchmarkId, Criterion, Throughput};
use http_body_util::BodyExt;
use tidegate::backend::Model;
use tidegate::backend::fake::Fake;
use tidegate::protocol::{Service, rest};

use crate::engine::{Served, WIDTH, serve};

/// How tensors are written.
#[derive(Clone, Copy, PartialEq)]
pub enum Form {
    Json,
    Binary,
}

pub struct Sent {
    body: Bytes,
    /// Of the JSON, where binary tensors follow it.
    json_length: Option<usize>,
}

pub fn numbers(rows: usize) -> Vec<f32> {
    (0..rows * WIDTH).map(|i| i as f32 * 0.37).collect()
}

pub fn request(input: &str, rows: usize, asked: Form, answered: Form) -> Sent {
    let numbers = numbers(rows);
    let binary: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let tensor = match asked {
        Form::Json => format!(r#""data":{numbers:?}"#),
        Form::Binary => format!(r#""parameters":{{"binary_data_size":{}}}"#, binary.len()),
    };
    let json = format!(
        r#"{{"inputs":[{{"name":"{input}","shape":[{rows},{WIDTH}],"datatype":"FP32",{tensor}}}],"parameters":{{"binary_data_output":{}}}}}"#,
        answered == Form::Binary
    );
    match asked {
        Form::Json => Sent { body: json.into(), json_length: None },
        Form::Binary => Sent { json_length: Some(json.len()), body: [json.as_bytes(), &binary].concat().into() },
    }
}

pub async fn post(service: &Service, sent: &Sent) {
    let mut request = Request::post("/v2/models/sentinel/infer").header("content-length", sent.body.len());
    if let Some(length) = sent.json_length {
        request = request.header("inference-header-content-length", length);
    }
    let response = service.call(request.body(Body::from(sent.body.clone())).unwrap()).await;
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.unwrap();
}

/// The input's name, the service, and what it needs to stay alive.
pub fn service() -> (String, Service, Served) {
    let fake = Fake::echo(WIDTH);
    let input = fake.signature().inputs[0].name.to_string();
    let served = serve(fake);
    (input, rest::service(served.engine.clone(), rest::Config::default()), served)
}

pub fn group() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("rest");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (input, service, _served) = service();
    for rows in [1, 128, 16_384] {
        group.throughput(Throughput::Elements((rows * WIDTH) as u64));
        for (name, asked, answered) in [
            ("json", Form::Json, Form::Json),
            ("json in, binary out", Form::Json, Form::Binary),
            ("binary in, json out", Form::Binary, Form::Json),
            ("binary", Form::Binary, Form::Binary),
        ] {
            let sent = request(&input, rows, asked, answered);
            group.bench_function(BenchmarkId::new(name, format!("{rows}x{WIDTH}")), |b| {
                b.iter(|| runtime.block_on(post(&service, &sent)));
            });
        }
    }
    group.finish();
}
