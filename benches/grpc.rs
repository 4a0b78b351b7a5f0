//! A unary call through the gRPC service on an engine that answers at once: raw contents beside typed ones.

use axum::body::{Body, Bytes};
use axum::http::{Request, Version};
use criterion::{BenchmarkId, Criterion, Throughput};
use http_body_util::BodyExt;
use prost::Message;
use tidegate::backend::Model;
use tidegate::backend::fake::Fake;
use tidegate::protocol::grpc::proto::model_infer_request::InferInputTensor;
use tidegate::protocol::grpc::proto::{InferTensorContents, ModelInferRequest};
use tidegate::protocol::{Service, grpc};

use crate::engine::{Served, WIDTH, serve};
use crate::rest::numbers;

const PATH: &str = "/inference.GRPCInferenceService/ModelInfer";

/// One message as it is framed on a stream.
pub fn request(input: &str, rows: usize, raw: bool) -> Bytes {
    let numbers = numbers(rows);
    let mut tensor = InferInputTensor {
        name: input.into(),
        datatype: "FP32".into(),
        shape: vec![rows as i64, WIDTH as i64],
        ..InferInputTensor::default()
    };
    let mut message = ModelInferRequest { model_name: "sentinel".into(), ..ModelInferRequest::default() };
    if raw {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        message.raw_input_contents.push(bytes.into());
    } else {
        tensor.contents = Some(InferTensorContents { fp32_contents: numbers, ..InferTensorContents::default() });
    }
    message.inputs.push(tensor);
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &length[..], &message].concat().into()
}

pub async fn call(service: &Service, message: &Bytes) {
    let request = Request::post(PATH).version(Version::HTTP_2);
    let request = request.header("content-type", "application/grpc").header("te", "trailers");
    let response = service.call(request.body(Body::from(message.clone())).unwrap()).await;
    let body = response.into_body().collect().await.unwrap();
    assert_eq!(body.trailers().and_then(|trailers| trailers.get("grpc-status")).unwrap(), "0");
}

/// The input's name, the service, and what it needs to stay alive.
pub fn service() -> (String, Service, Served) {
    let fake = Fake::echo(WIDTH);
    let input = fake.signature().inputs[0].name.to_string();
    let served = serve(fake);
    (input, grpc::service(served.engine.clone(), grpc::Config::default()), served)
}

pub fn group() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("grpc");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (input, service, _served) = service();
    for rows in [1, 128, 16_384] {
        group.throughput(Throughput::Elements((rows * WIDTH) as u64));
        for (name, raw) in [("raw contents", true), ("typed contents", false)] {
            let message = request(&input, rows, raw);
            group.bench_function(BenchmarkId::new(name, format!("{rows}x{WIDTH}")), |b| {
                b.iter(|| runtime.block_on(call(&service, &message)));
            });
        }
    }
    group.finish();
}
