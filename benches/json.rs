//! A request through the REST service on an engine that answers at once: JSON beside the binary extension.

use axum::body::{Body, Bytes};
use axum::http::Request;
use criterion::{BenchmarkId, Criterion, Throughput};
use http_body_util::BodyExt;
use tidegate::backend::Model;
use tidegate::backend::fake::Fake;
use tidegate::protocol::{Service, rest};

use crate::engine::{WIDTH, serve};

struct Sent {
    body: Bytes,
    json_length: Option<usize>,
}

fn json(input: &str, rows: usize) -> Sent {
    let data: Vec<String> = (0..rows * WIDTH).map(|i| format!("{}", i as f32 * 0.37)).collect();
    let body = format!(
        r#"{{"inputs":[{{"name":"{input}","shape":[{rows},{WIDTH}],"datatype":"FP32","data":[{}]}}]}}"#,
        data.join(",")
    );
    Sent { body: body.into(), json_length: None }
}

fn binary(input: &str, rows: usize) -> Sent {
    let data: Vec<u8> = (0..rows * WIDTH).flat_map(|i| (i as f32 * 0.37).to_le_bytes()).collect();
    let header = format!(
        r#"{{"inputs":[{{"name":"{input}","shape":[{rows},{WIDTH}],"datatype":"FP32","parameters":{{"binary_data_size":{}}}}}],"parameters":{{"binary_data_output":true}}}}"#,
        data.len()
    );
    Sent { json_length: Some(header.len()), body: [header.as_bytes(), &data].concat().into() }
}

async fn post(service: &Service, sent: &Sent) {
    let mut request = Request::post("/v2/models/sentinel/infer").header("content-length", sent.body.len());
    if let Some(length) = sent.json_length {
        request = request.header("inference-header-content-length", length);
    }
    let response = service.call(request.body(Body::from(sent.body.clone())).unwrap()).await;
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.unwrap();
}

pub fn group() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("rest");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let fake = Fake::echo(WIDTH);
    let input = fake.signature().inputs[0].name.to_string();
    let served = serve(fake);
    let service = rest::service(served.engine, rest::Config::default());
    for rows in [1, 128, 16_384] {
        group.throughput(Throughput::Elements((rows * WIDTH) as u64));
        for (name, sent) in [("json", json(&input, rows)), ("binary", binary(&input, rows))] {
            group.bench_function(BenchmarkId::new(name, format!("{rows}x{WIDTH}")), |b| {
                b.iter(|| runtime.block_on(post(&service, &sent)));
            });
        }
    }
    group.finish();
}
