//! The gRPC port as clients see it: the generated one, and hand-made frames over HTTP/2 where that one is too well
//! behaved.

use std::collections::{BTreeSet, VecDeque};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::pin::Pin;
use std::sync::mpsc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use serde_json::json;
use tidegate::protocol::grpc::proto::grpc_inference_service_client::GrpcInferenceServiceClient;
use tidegate::protocol::grpc::proto::infer_parameter::ParameterChoice;
use tidegate::protocol::grpc::proto::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use tidegate::protocol::grpc::proto::*;
use tidegate::request::Phase;
use tokio::time::timeout;
use tonic::codec::CompressionEncoding::{Deflate, Gzip};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::{Models, PATIENCE, TestServer, without_onnxruntime};

pub const SERVICE: &str = "inference.GRPCInferenceService";
pub const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
/// What makes a request gRPC.
pub const GRPC: [(&str, &str); 2] = [("content-type", "application/grpc"), ("te", "trailers")];

pub type Client = GrpcInferenceServiceClient<Channel>;

/// A connection of its own.
pub async fn channel(server: &TestServer) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{}", server.addresses.grpc)).unwrap();
    endpoint.timeout(PATIENCE).connect().await.unwrap()
}

pub async fn client(server: &TestServer) -> Client {
    Client::new(channel(server).await).max_decoding_message_size(usize::MAX)
}

/// Rows of four to `identity_fp32`, which answers them as they are.
pub fn echo(rows: usize) -> ModelInferRequest {
    let elements = (0..rows * 4).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<u8>>();
    let input = InferInputTensor {
        name: "x".into(),
        datatype: "FP32".into(),
        shape: vec![i64::try_from(rows).unwrap(), 4],
        ..Default::default()
    };
    ModelInferRequest {
        model_name: "identity_fp32".into(),
        id: "7".into(),
        inputs: vec![input],
        raw_input_contents: vec![elements.into()],
        ..Default::default()
    }
}

pub fn parameter(choice: ParameterChoice) -> InferParameter {
    InferParameter { parameter_choice: Some(choice) }
}

pub fn echo_server(settings: &[(&'static str, &str)]) -> (Models, TestServer) {
    let models = Models::new().with("identity_fp32");
    let builder = settings.iter().fold(TestServer::of(models.path()), |builder, (key, value)| builder.set(key, value));
    let server = builder.start();
    (models, server)
}

/// Infer requests refused before a version was chosen.
pub fn refused(server: &TestServer, protocol: &str, kind: &str) -> f64 {
    let labels = [format!("protocol=\"{protocol}\""), format!("kind=\"{kind}\"")];
    server.metrics().sum("tidegate_requests_refused_total", &labels.each_ref().map(String::as_str))
}

pub fn in_flight(server: &TestServer) -> f64 {
    server.metrics().sum("tidegate_inflight", &[])
}

/// Nothing that is over is still counted as being here.
pub fn is_at_rest(server: &TestServer) -> bool {
    in_flight(server) == 0.0 && server.metrics().sum("tidegate_inflight_bytes", &[]) == 0.0
}

/// A body of given frames that ends, or falls silent.
pub struct Frames {
    frames: VecDeque<Bytes>,
    silent: bool,
}

impl Frames {
    pub fn of(whole: impl Into<Bytes>) -> Frames {
        Frames { frames: [whole.into()].into(), silent: false }
    }

    pub fn then_silence(whole: impl Into<Bytes>) -> Frames {
        Frames { silent: true, ..Frames::of(whole) }
    }
}

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.frames.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(Frame::data(frame)))),
            None if self.silent => Poll::Pending,
            None => Poll::Ready(None),
        }
    }
}

/// One HTTP/2 connection without anybody's manners.
pub struct Http2 {
    sender: SendRequest<Frames>,
    authority: SocketAddr,
}

/// A response, whole.
pub struct Answer {
    pub http: u16,
    pub headers: HeaderMap,
    pub trailers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// gRPC's verdict, from the trailers or, where there is no body, the headers.
    pub fn status(&self) -> Status {
        let found = Status::from_header_map(&self.trailers).or_else(|| Status::from_header_map(&self.headers));
        found.expect("a gRPC status")
    }
}

impl Http2 {
    pub async fn connect(authority: SocketAddr) -> Http2 {
        Http2::with_window(authority, 1 << 20).await
    }

    /// `window`: what each stream's answer may be ahead of its reader, in bytes.
    async fn with_window(authority: SocketAddr, window: u32) -> Http2 {
        let stream = tokio::net::TcpStream::connect(authority).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let builder = http2::Builder::new(TokioExecutor::new()).initial_stream_window_size(window).clone();
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Http2 { sender, authority }
    }

    pub async fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: Frames) -> Answer {
        let answered = async {
            let (head, body) = self.begin(method, path, headers, body).await.into_parts();
            let body = body.collect().await.unwrap();
            let trailers = body.trailers().cloned().unwrap_or_default();
            Answer { http: head.status.as_u16(), headers: head.headers, trailers, body: body.to_bytes() }
        };
        timeout(PATIENCE, answered).await.expect("an answer")
    }

    /// The head of an answer, its body unread.
    pub async fn begin(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Frames,
    ) -> http::Response<Incoming> {
        let uri = format!("http://{}{path}", self.authority);
        let mut request = http::Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.sender.send_request(request.body(body).unwrap()).await.unwrap()
    }

    /// Frames to `ModelInfer` and what became of them.
    async fn infer(&mut self, headers: &[(&str, &str)], body: Frames) -> Status {
        let headers = [&GRPC[..], headers].concat();
        let answer = self.send("POST", INFER, &headers, body).await;
        assert_eq!(answer.http, 200);
        answer.status()
    }
}

pub fn framed(flag: u8, message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[flag][..], &length, message].concat().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn questions_about_server_and_models() {
    let models = Models::new().with("identity_fp32").with("corrupt");
    models.add_version("digits", "1", "1");
    models.add_version("digits", "2", "2");
    let server = TestServer::of(models.path()).start();
    let mut client = client(&server).await;
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let about = client.server_metadata(ServerMetadataRequest {}).await.unwrap().into_inner();
    assert_eq!((&*about.name, &*about.version), ("tidegate", env!("CARGO_PKG_VERSION")));
    assert_eq!(json!(about.extensions), server.get("/v2").json()["extensions"]);

    let ask = |name: &str, version: &str| ModelMetadataRequest { name: name.into(), version: version.into() };
    for version in ["", "-1", "1"] {
        let model = client.model_metadata(ask("identity_fp32", version)).await.unwrap().into_inner();
        assert_eq!((&*model.name, &model.versions[..]), ("identity_fp32", &["1".to_string()][..]));
        let (input, output) = (&model.inputs[0], &model.outputs[0]);
        assert_eq!((&*input.name, &*input.datatype, &input.shape[..]), ("x", "FP32", &[-1, -1][..]));
        assert_eq!((&*output.name, &*output.datatype, &output.shape[..]), ("y", "FP32", &[-1, -1][..]));
        // The same words as REST's.
        let rest = server.get("/v2/models/identity_fp32").json();
        assert_eq!(
            (json!(model.platform), json!(model.properties)),
            (rest["platform"].clone(), rest["properties"].clone())
        );
    }
    let digits = client.model_metadata(ask("digits", "1")).await.unwrap().into_inner();
    assert_eq!(digits.versions, ["1", "2"]);
    for (name, version, code) in [
        ("nope", "", Code::NotFound),
        ("digits", "3", Code::NotFound),
        ("digits", "x", Code::InvalidArgument),
        ("digits", "0", Code::InvalidArgument),
        (&*"n".repeat(257), "", Code::InvalidArgument),
        (&*"n".repeat(16 << 10), "", Code::ResourceExhausted),
    ] {
        assert_eq!(client.model_metadata(ask(name, version)).await.unwrap_err().code(), code, "{version}");
    }
    for (name, version, expected) in [
        ("digits", "", true),
        ("digits", "2", true),
        ("digits", "3", false),
        ("corrupt", "", false),
        ("nope", "", false),
    ] {
        let request = ModelReadyRequest { name: name.into(), version: version.into() };
        assert_eq!(client.model_ready(request).await.unwrap().into_inner().ready, expected, "{name} {version}");
    }
    // What only asks never counts as an inference refused.
    assert_eq!(server.metrics().sum("tidegate_requests_refused_total", &[]), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_index_is_the_one_of_rest() {
    let models = Models::new().with("identity_fp32").with("corrupt");
    let server = TestServer::of(models.path()).start();
    let mut client = client(&server).await;
    for ready in [false, true] {
        let request = RepositoryIndexRequest { ready, ..Default::default() };
        let index = client.repository_index(request).await.unwrap().into_inner().models;
        let rows: Vec<_> = index
            .iter()
            .map(|m| json!({"name": m.name, "version": m.version, "state": m.state, "reason": m.reason}))
            .collect();
        assert_eq!(rows.len(), if ready { 1 } else { 2 });
        let rest = server.post("/v2/repository/index", json!({ "ready": ready }).to_string());
        assert_eq!(json!(rows), rest.json());
    }
    let named = RepositoryIndexRequest { repository_name: "r".into(), ..Default::default() };
    assert_eq!(client.repository_index(named).await.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn answers_come_raw_with_their_id() {
    let models = Models::new().with("sum_rows").with("identity_fp32");
    let server = TestServer::of(models.path()).start();
    let mut client = client(&server).await;
    let answer = client.model_infer(echo(2)).await.unwrap().into_inner();
    assert_eq!((&*answer.id, &*answer.model_name, &*answer.model_version), ("7", "identity_fp32", "1"));
    assert_eq!(answer.raw_output_contents, echo(2).raw_input_contents);
    let output = &answer.outputs[0];
    assert_eq!((&*output.name, &*output.datatype, &output.shape[..]), ("y", "FP32", &[2, 4][..]));
    assert!(output.contents.is_none());
    let anonymous = ModelInferRequest { id: String::new(), ..echo(1) };
    assert_eq!(client.model_infer(anonymous).await.unwrap().into_inner().id, "");

    // Inputs are matched by name, outputs come in the order asked for.
    let input = |name: &str, value: f32| InferInputTensor {
        name: name.into(),
        datatype: "FP32".into(),
        shape: vec![1, 16],
        contents: Some(InferTensorContents { fp32_contents: vec![value; 16], ..Default::default() }),
        ..Default::default()
    };
    let wanted = |name: &str| InferRequestedOutputTensor { name: name.into(), ..Default::default() };
    let request = ModelInferRequest {
        model_name: "sum_rows".into(),
        inputs: vec![input("INPUT1", 1.0), input("INPUT0", 3.0)],
        outputs: vec![wanted("OUTPUT1"), wanted("OUTPUT0")],
        ..Default::default()
    };
    let answer = client.model_infer(request).await.unwrap().into_inner();
    assert_eq!(answer.outputs.iter().map(|output| &*output.name).collect::<Vec<_>>(), ["OUTPUT1", "OUTPUT0"]);
    let all = |value: f32| Bytes::from(value.to_le_bytes().repeat(16));
    assert_eq!(answer.raw_output_contents, [all(2.0), all(4.0)]);
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn compression_is_answered_in_kind() {
    let (_models, server) = echo_server(&[]);
    for encoding in [Gzip, Deflate] {
        let client = client(&server).await;
        let mut client = client.send_compressed(encoding).accept_compressed(Gzip).accept_compressed(Deflate);
        let answer = client.model_infer(echo(1000)).await.unwrap();
        assert_eq!(answer.metadata().get("grpc-encoding").unwrap(), encoding.to_string().as_str());
        assert_eq!(answer.into_inner().raw_output_contents, echo(1000).raw_input_contents);
    }
    let mut plain = client(&server).await.accept_compressed(Gzip);
    let answer = plain.model_infer(echo(1000)).await.unwrap();
    assert!(!answer.metadata().contains_key("grpc-encoding"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_cannot_be_decoded_is_the_clients_fault() {
    let (_models, server) = echo_server(&[]);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let message = echo(1).encode_to_vec();
    let whole = framed(0, &message);
    let gzip = &[("grpc-encoding", "gzip")][..];
    type Case<'a> = (&'a [(&'a str, &'a str)], Bytes, Code);
    let cases: [Case; 12] = [
        (&[], framed(0, &[0x2a, 5, 0]), Code::InvalidArgument),
        (&[], framed(0, &[0x0a, 1, 0xff]), Code::InvalidArgument),
        (&[], framed(0, &[0x28, 1]), Code::InvalidArgument),
        (&[], whole.slice(..whole.len() - 1), Code::InvalidArgument),
        (&[], whole.slice(..3), Code::InvalidArgument),
        (&[], Bytes::new(), Code::InvalidArgument),
        (&[], [whole.clone(), whole.clone()].concat().into(), Code::InvalidArgument),
        (&[], framed(1, &message), Code::InvalidArgument),
        (&[], framed(2, &message), Code::InvalidArgument),
        (gzip, framed(1, b"not gzip at all"), Code::InvalidArgument),
        (gzip, framed(1, &message[..10]), Code::InvalidArgument),
        (&[("grpc-encoding", "br")], framed(1, b"x"), Code::Unimplemented),
    ];
    let count = |kind| refused(&server, "grpc", kind);
    for (case, (headers, wire, expected)) in cases.into_iter().enumerate() {
        let status = http2.infer(headers, Frames::of(wire)).await;
        assert_eq!(status.code(), expected, "case {case}: {}", status.message());
        assert_eq!(count("invalid_input") + count("unsupported_media"), case as f64 + 1.0, "case {case}");
    }
    server.eventually("every place is free", is_at_rest);
    let status = http2.infer(&[], Frames::of(whole)).await;
    assert_eq!(status.code(), Code::Ok, "the connection lives on: {}", status.message());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn only_grpc_to_a_known_service_is_served() {
    let (_models, server) = echo_server(&[]);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let empty = || Frames::of(framed(0, &[]));
    for (method, content_type, expected) in
        [("POST", "application/json", 415), ("POST", "application/grpc-web", 415), ("GET", "application/grpc", 405)]
    {
        let answer = http2.send(method, INFER, &[("content-type", content_type)], empty()).await;
        assert_eq!(answer.http, expected, "{method} {content_type}");
    }
    for path in [
        &*format!("/{SERVICE}/LogSettings"),
        &*format!("/{SERVICE}/"),
        "/other.Service/M",
        "/grpc.health.v1.Health/List",
        "/v2/health/live",
        "/",
    ] {
        let answer = http2.send("POST", path, &GRPC, empty()).await;
        assert_eq!((answer.http, answer.status().code()), (200, Code::Unimplemented), "{path}");
    }
    assert_eq!(server.metrics().sum("tidegate_requests_refused_total", &[]), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn deadlines_are_read_strictly_and_the_sooner_counts() {
    let (_models, server) = echo_server(&[]);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let wire = || Frames::of(framed(0, &echo(1).encode_to_vec()));
    for (timeout, expected) in [
        ("0n", Code::DeadlineExceeded),
        ("1n", Code::DeadlineExceeded),
        ("99999999H", Code::Ok),
        ("999999999S", Code::InvalidArgument),
        ("-1S", Code::InvalidArgument),
        ("abc", Code::InvalidArgument),
        ("1X", Code::InvalidArgument),
        ("", Code::InvalidArgument),
    ] {
        let status = http2.infer(&[("grpc-timeout", timeout)], wire()).await;
        assert_eq!(status.code(), expected, "{timeout}: {}", status.message());
    }
    let short = ModelInferRequest {
        parameters: [("timeout".to_string(), parameter(ParameterChoice::Int64Param(1)))].into(),
        ..echo(1)
    };
    let status = http2.infer(&[("grpc-timeout", "9H")], Frames::of(framed(0, &short.encode_to_vec()))).await;
    assert_eq!((status.code(), status.message()), (Code::DeadlineExceeded, "Request timeout expired"));
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_deadline_ends_a_wait_for_the_message_and_for_the_model() {
    let (_models, server) = echo_server(&[]);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let half = framed(0, &echo(1).encode_to_vec()).slice(..20);
    let status = http2.infer(&[("grpc-timeout", "20m")], Frames::then_silence(half)).await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    server.eventually("every place is free", is_at_rest);
    assert_eq!(refused(&server, "grpc", "deadline_exceeded"), 1.0);

    if without_onnxruntime() {
        return;
    }
    /// Some 4 µs each: 0.4 s or so.
    const STEPS: i64 = 100_000;
    let models = Models::new().with("slow");
    let server = TestServer::of(models.path()).start();
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let steps = InferInputTensor {
        name: "steps".into(),
        datatype: "INT64".into(),
        contents: Some(InferTensorContents { int64_contents: vec![STEPS], ..Default::default() }),
        ..Default::default()
    };
    let request = ModelInferRequest { model_name: "slow".into(), inputs: vec![steps], ..Default::default() };
    let status = http2.infer(&[("grpc-timeout", "50m")], Frames::of(framed(0, &request.encode_to_vec()))).await;
    assert_eq!((status.code(), status.message()), (Code::DeadlineExceeded, "Request timeout expired"));
    let labels = ["model=\"slow\"", "protocol=\"grpc\"", "outcome=\"deadline_exceeded\""];
    assert_eq!(server.metrics().sum("tidegate_requests_total", &labels), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_message_that_does_not_come_is_not_waited_for() {
    let (_models, server) = echo_server(&[("timeouts.body", "50ms")]);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let half = framed(0, &echo(1).encode_to_vec()).slice(..20);
    let status = http2.infer(&[], Frames::then_silence(half)).await;
    assert_eq!(status.code(), Code::Cancelled, "{}", status.message());
    assert_eq!(refused(&server, "grpc", "request_timeout"), 1.0);
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn refusals_arrive_before_the_message_is_sent_and_the_connection_lives_on() {
    let (_models, server) = echo_server(&[("limits.body", "1MiB")]);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    for (headers, body) in
        [(&[("content-length", "99999999")][..], Bytes::new()), (&[], Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]))]
    {
        let status = http2.infer(headers, Frames::then_silence(body)).await;
        assert_eq!(status.code(), Code::ResourceExhausted, "{}", status.message());
    }
    let mut client = client(&server).await;
    let error = client.model_infer(echo(1 << 18)).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    for rows in [1, 50_000, 2] {
        let answer = client.model_infer(echo(rows)).await.unwrap().into_inner();
        assert_eq!(answer.raw_output_contents, echo(rows).raw_input_contents);
    }
    assert_eq!(refused(&server, "grpc", "too_large"), 3.0);
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_server_refuses_before_it_reads() {
    let (_models, server) = echo_server(&[("limits.requests", "1")]);
    let mut client = client(&server).await;
    // One request that says it has a body and does not send it holds the only place.
    let mut holder = TcpStream::connect(server.addresses.http).unwrap();
    holder.write_all(b"POST /v2/models/identity_fp32/infer HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n").unwrap();
    server.eventually("the place is taken", |server| in_flight(server) == 1.0);
    let error = client.model_infer(echo(1)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert_eq!(error.metadata().get("grpc-retry-pushback-ms").unwrap(), "1000");
    let reply = server.post("/v2/models/identity_fp32/infer", "{}");
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
    // Whoever only asks needs no place.
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    drop(holder);
    server.eventually("the place is free", is_at_rest);
    assert!(client.model_infer(echo(1)).await.is_ok());
    assert_eq!((refused(&server, "grpc", "overloaded"), refused(&server, "http", "overloaded")), (1.0, 1.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn refusals_say_which_prediction_they_were_and_who_answered() {
    let (_models, server) = echo_server(&[("limits.requests", "1")]);
    let about = server.get("/v2/models/identity_fp32").json();
    let digest = about["properties"]["digest"].as_str().unwrap();
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let wrong = ModelInferRequest { model_version: "1".into(), raw_input_contents: vec![], ..echo(1) };
    let unexpected = ModelInferRequest { outputs: vec![InferRequestedOutputTensor::default()], ..echo(1) };
    let unknown = ModelInferRequest { model_name: "nope".into(), ..echo(1) };
    let encoded = |request: &ModelInferRequest| framed(0, &request.encode_to_vec());
    type Case<'a> = (&'a [(&'a str, &'a str)], Bytes, Code, bool);
    let cases: [Case; 9] = [
        (&[], encoded(&echo(1)), Code::Ok, true),
        (&[], encoded(&unexpected), Code::InvalidArgument, true),
        (&[], encoded(&unknown), Code::NotFound, false),
        (&[], encoded(&wrong), Code::InvalidArgument, false),
        (&[], framed(0, &[0x2a, 5, 0]), Code::InvalidArgument, false),
        (&[], framed(2, &[]), Code::InvalidArgument, false),
        (&[], Bytes::new(), Code::InvalidArgument, false),
        (&[("grpc-encoding", "br")], encoded(&echo(1)), Code::Unimplemented, false),
        (&[("grpc-timeout", "0n")], encoded(&echo(1)), Code::DeadlineExceeded, false),
    ];
    let mut ids = BTreeSet::new();
    let mut check = |metadata: &HeaderMap, chosen: bool| {
        let said = |name| metadata.get(name).map(|value| value.to_str().unwrap());
        assert!(ids.insert(said("x-prediction-id").expect("an id").to_string()), "an id of its own");
        assert_eq!(
            (said("x-model-version"), said("x-model-digest")),
            (chosen.then_some("1"), chosen.then_some(digest))
        );
    };
    for (headers, wire, code, chosen) in cases {
        let headers = [&GRPC[..], headers].concat();
        let answer = http2.send("POST", INFER, &headers, Frames::of(wire)).await;
        assert_eq!(answer.status().code(), code, "{}", answer.status().message());
        check(&answer.headers, chosen);
        server.eventually("the place is free", is_at_rest);
    }
    let mut holder = TcpStream::connect(server.addresses.http).unwrap();
    holder.write_all(b"POST /v2/models/identity_fp32/infer HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n").unwrap();
    server.eventually("the place is taken", |server| in_flight(server) == 1.0);
    let mut client = client(&server).await;
    let error = client.model_infer(echo(1)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    check(error.metadata().as_ref(), false);
    // What is no inference is no prediction.
    let unknown = ModelMetadataRequest { name: "nope".into(), ..Default::default() };
    let error = client.model_metadata(unknown).await.unwrap_err();
    assert!(error.metadata().get("x-prediction-id").is_none(), "{error}");
}

fn about(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.into() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn health_is_readiness_and_watching_follows_it() {
    let models = Models::new().with("identity_fp32");
    let (release, held) = mpsc::channel::<()>();
    let until_released = move |phase| {
        if phase == Phase::LameDuck {
            let _ = held.recv();
        }
    };
    let mut server = TestServer::of(models.path()).on_phase(until_released).start();
    let channel = channel(&server).await;
    let mut health = HealthClient::new(channel.clone());
    for service in ["", SERVICE] {
        assert_eq!(health.check(about(service)).await.unwrap().into_inner().status(), ServingStatus::Serving);
    }
    assert_eq!(health.check(about("nope")).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(health.watch(about("nope")).await.unwrap_err().code(), Code::NotFound);
    for encoding in [Gzip, Deflate] {
        let mut compressed = HealthClient::new(channel.clone()).send_compressed(encoding);
        let check = tokio::time::timeout(PATIENCE, compressed.check(about(SERVICE))).await.expect("an answer");
        assert_eq!(check.unwrap().into_inner().status(), ServingStatus::Serving);
        let watch = tokio::time::timeout(PATIENCE, compressed.watch(about("nope"))).await.expect("an answer");
        assert_eq!(watch.unwrap_err().code(), Code::NotFound);
    }

    let mut watches = Vec::new();
    for service in ["", SERVICE] {
        let mut watch = health.watch(about(service)).await.unwrap().into_inner();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
        watches.push(watch);
    }
    server.tell_to_stop();
    for watch in &mut watches {
        let next = timeout(PATIENCE, watch.message()).await.expect("the watch is told");
        assert_eq!(next.unwrap().unwrap().status(), ServingStatus::NotServing);
    }
    // Not ready, alive, and still serving.
    assert_eq!(health.check(about("")).await.unwrap().into_inner().status(), ServingStatus::NotServing);
    let mut client = Client::new(channel);
    assert!(!client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.model_infer(echo(1)).await.is_ok());
    let ready = server.get("/v2/health/ready");
    assert_eq!((ready.status, ready.json()), (503, json!({"ready": false})));
    assert_eq!(server.get("/v2/health/live").status, 200);

    release.send(()).unwrap();
    for watch in &mut watches {
        let end = timeout(PATIENCE, watch.message()).await.expect("a watch never holds an exit");
        assert!(end.unwrap().is_none());
    }
    drop((watches, health, client));
    assert_eq!(server.stop().connections, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn watches_are_bounded() {
    /// Of the whole server: `health::MAX_WATCHES`.
    const MAX_WATCHES: usize = 1024;
    let (_models, server) = echo_server(&[("limits.streams", "2000")]);
    let mut health = HealthClient::new(channel(&server).await);
    let mut open = Vec::new();
    for _ in 0..MAX_WATCHES {
        open.push(health.watch(about("")).await.unwrap());
    }
    assert_eq!(health.watch(about("")).await.unwrap_err().code(), Code::ResourceExhausted);
    open.pop();
    let freed = async { while health.watch(about("")).await.is_err() {} };
    timeout(PATIENCE, freed).await.expect("a watch that ends frees its place");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_slow_reader_keeps_its_place_until_it_has_its_answer() {
    /// Of 16 bytes: more than the client's window takes.
    const ROWS: usize = 1 << 20;
    let (_models, server) = echo_server(&[]);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let message = Frames::of(framed(0, &echo(ROWS).encode_to_vec()));
    let answer = timeout(PATIENCE, http2.begin("POST", INFER, &GRPC, message)).await.expect("an answer");
    assert!(Status::from_header_map(answer.headers()).is_none(), "{:?}", answer.headers());
    assert_eq!(in_flight(&server), 1.0, "most of the answer is still here");
    let body = timeout(PATIENCE, answer.into_body().collect()).await.expect("the rest").unwrap();
    assert_eq!(Status::from_header_map(body.trailers().unwrap()).unwrap().code(), Code::Ok);
    assert!(body.to_bytes().ends_with(&echo(ROWS).raw_input_contents[0]));
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_answer_keeps_its_place_while_http2_buffers_it() {
    /// Of 16 bytes: one piece of an answer, far more than the stream's window.
    const ROWS: usize = 12 << 10;
    const WINDOW: u32 = 1000;
    let (_models, server) = echo_server(&[]);
    let mut http2 = Http2::with_window(server.addresses.grpc, WINDOW).await;
    let message = Frames::of(framed(0, &echo(ROWS).encode_to_vec()));
    let answer = timeout(PATIENCE, http2.begin("POST", INFER, &GRPC, message)).await.expect("an answer");
    // What comes later on the connection shows that the answer's body has been taken up.
    let question = Frames::of(framed(0, &[]));
    let path = "/inference.GRPCInferenceService/ServerLive";
    assert_eq!(http2.send("POST", path, &GRPC, question).await.status().code(), Code::Ok);
    assert_eq!(in_flight(&server), 1.0);
    let body = timeout(PATIENCE, answer.into_body().collect()).await.expect("the rest").unwrap();
    assert_eq!(Status::from_header_map(body.trailers().unwrap()).unwrap().code(), Code::Ok);
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reader_that_takes_nothing_loses_its_place() {
    const ROWS: usize = 1 << 20;
    let (_models, server) = echo_server(&[("timeouts.write", "500ms")]);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let message = Frames::of(framed(0, &echo(ROWS).encode_to_vec()));
    // The connection answers pings, but the stream's window stays shut.
    let answer = timeout(PATIENCE, http2.begin("POST", INFER, &GRPC, message)).await.expect("an answer");
    server.eventually("every place is free", is_at_rest);
    assert!(timeout(PATIENCE, answer.into_body().collect()).await.expect("an end").is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_client_that_leaves_frees_its_place() {
    let (_models, server) = echo_server(&[]);
    let half = framed(0, &echo(1).encode_to_vec()).slice(..20);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    // Dropped with its connection, it leaves in the middle of its message.
    let waiting = tokio::spawn(async move { http2.infer(&[], Frames::then_silence(half)).await });
    server.eventually("half a message holds a place", |server| in_flight(server) == 1.0);
    waiting.abort();
    server.eventually("every place is free", is_at_rest);
    assert!(waiting.await.is_err_and(|error| error.is_cancelled()), "nothing answers half a message");
    server.eventually("it is counted", |server| refused(server, "grpc", "cancelled") == 1.0);
}
