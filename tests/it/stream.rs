//! Calls of many messages: `ModelStreamInfer`, and reflection.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpStream;

use bytes::Bytes;
use http_body_util::BodyExt;
use prost::Message;
use tidegate::protocol::grpc::proto::infer_parameter::ParameterChoice;
use tidegate::protocol::grpc::proto::model_infer_request::InferInputTensor;
use tidegate::protocol::grpc::proto::*;
use tidegate::request::Phase;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::codec::CompressionEncoding::Gzip;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tonic_reflection::pb::v1alpha;

use crate::grpc::{
    Answer, Client, Frames, GRPC, Http2, SERVICE, channel, client, echo, echo_server, framed, in_flight, is_at_rest,
    parameter, refused,
};
use crate::support::{Models, PATIENCE, TestServer, without_onnxruntime};

pub const STREAM: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

/// One stream, both ends.
struct Call {
    requests: mpsc::Sender<ModelInferRequest>,
    answers: Streaming<ModelStreamInferResponse>,
}

impl Call {
    async fn open(client: &mut Client) -> Call {
        Call::with(client, |_| {}).await
    }

    async fn with(client: &mut Client, metadata: impl FnOnce(&mut Request<ReceiverStream<ModelInferRequest>>)) -> Call {
        let (requests, sent) = mpsc::channel(64);
        let mut request = Request::new(ReceiverStream::new(sent));
        metadata(&mut request);
        let answers = client.model_stream_infer(request).await.unwrap().into_inner();
        Call { requests, answers }
    }

    async fn send(&self, request: ModelInferRequest) {
        self.requests.send(request).await.unwrap();
    }

    /// The next answer; `None` at the end.
    async fn next(&mut self) -> Result<Option<ModelStreamInferResponse>, Status> {
        timeout(PATIENCE, self.answers.message()).await.expect("the stream moves")
    }

    async fn answer(&mut self) -> ModelStreamInferResponse {
        self.next().await.unwrap().expect("an answer")
    }

    /// Sends no more and reads what is left.
    async fn finish(self) -> (Vec<ModelStreamInferResponse>, Status) {
        let Call { requests, mut answers } = self;
        drop(requests);
        let mut rest = Vec::new();
        loop {
            match timeout(PATIENCE, answers.message()).await.expect("the stream ends") {
                Ok(Some(answer)) => rest.push(answer),
                Ok(None) => return (rest, Status::ok("")),
                Err(status) => return (rest, status),
            }
        }
    }
}

fn id_of(answer: &ModelStreamInferResponse) -> &str {
    &answer.infer_response.as_ref().expect("a response, with its id").id
}

fn prediction_of(answer: &ModelStreamInferResponse) -> String {
    match &answer.infer_response.as_ref().unwrap().parameters["prediction_id"].parameter_choice {
        Some(ParameterChoice::StringParam(id)) => id.clone(),
        other => panic!("not a prediction id: {other:?}"),
    }
}

fn named(id: &str, rows: usize) -> ModelInferRequest {
    ModelInferRequest { id: id.into(), ..echo(rows) }
}

/// Some 4 µs a step.
fn slow(id: &str, steps: i64) -> ModelInferRequest {
    let input = InferInputTensor {
        name: "steps".into(),
        datatype: "INT64".into(),
        contents: Some(InferTensorContents { int64_contents: vec![steps], ..Default::default() }),
        ..Default::default()
    };
    ModelInferRequest { model_name: "slow".into(), id: id.into(), inputs: vec![input], ..Default::default() }
}

/// Messages as they are, whole, and what came back.
async fn exchange(
    server: &TestServer,
    headers: &[(&str, &str)],
    wire: Frames,
) -> (Vec<ModelStreamInferResponse>, Status) {
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let answer = http2.send("POST", STREAM, &[&GRPC[..], headers].concat(), wire).await;
    assert_eq!(answer.http, 200);
    (decoded(&answer), answer.status())
}

fn decoded(answer: &Answer) -> Vec<ModelStreamInferResponse> {
    let (mut rest, mut found) = (answer.body.clone(), Vec::new());
    while !rest.is_empty() {
        let prefix = rest.split_to(5);
        let length = u32::from_be_bytes(prefix[1..].try_into().unwrap());
        found.push(ModelStreamInferResponse::decode(rest.split_to(length.try_into().unwrap())).unwrap());
    }
    found
}

fn encoded(request: &ModelInferRequest) -> Bytes {
    framed(0, &request.encode_to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn answers_come_in_the_order_of_the_requests() {
    let (_models, server) = echo_server(&[]);
    let mut client = client(&server).await;
    let mut call = Call::open(&mut client).await;
    // More than are let in at once, and some that are long enough to be encoded elsewhere.
    let rows = |i: usize| if i.is_multiple_of(10) { 20_000 } else { i };
    let requests = call.requests.clone();
    let sending = tokio::spawn(async move {
        for i in 1..=200 {
            requests.send(named(&i.to_string(), rows(i))).await.unwrap();
        }
    });
    let mut predictions = BTreeSet::new();
    for i in 1..=200 {
        let answer = call.answer().await;
        assert_eq!((&*answer.error_message, id_of(&answer)), ("", &*i.to_string()));
        assert!(predictions.insert(prediction_of(&answer)), "an id of its own");
        let response = answer.infer_response.unwrap();
        assert_eq!(response.raw_output_contents, echo(rows(i)).raw_input_contents);
        assert!(
            response.parameters.contains_key("model_digest")
                && !response.parameters.contains_key("triton_final_response")
        );
    }
    sending.await.unwrap();
    let (rest, status) = call.finish().await;
    assert_eq!((rest.len(), status.code()), (0, Code::Ok), "{status}");
    server.eventually("every place is free", is_at_rest);
    let labels = ["protocol=\"grpc\"", "outcome=\"ok\""];
    assert_eq!(server.metrics().sum("tidegate_requests_total", &labels), 200.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn errors_stay_in_their_place_and_the_stream_open() {
    let (_models, server) = echo_server(&[]);
    let mut client = client(&server).await;
    let mut call = Call::open(&mut client).await;
    call.send(named("1", 1)).await;
    call.send(ModelInferRequest { model_name: "nope".into(), ..named("2", 1) }).await;
    call.send(ModelInferRequest { raw_input_contents: vec![], ..named("3", 1) }).await;
    call.send(ModelInferRequest { inputs: vec![], raw_input_contents: vec![], ..named("4", 1) }).await;
    call.send(named("5", 2)).await;
    let (mut answers, status) = {
        let mut answers = Vec::new();
        for _ in 0..5 {
            answers.push(call.answer().await);
        }
        let (rest, status) = call.finish().await;
        assert!(rest.is_empty());
        (answers, status)
    };
    assert_eq!(status.code(), Code::Ok, "{status}");
    assert_eq!(answers.iter().map(id_of).collect::<Vec<_>>(), ["1", "2", "3", "4", "5"]);
    assert_eq!(answers.iter().map(prediction_of).collect::<BTreeSet<_>>().len(), 5);
    let errors: Vec<&str> = answers.iter().map(|answer| &*answer.error_message).collect();
    assert_eq!(errors[1], "Request for unknown model: 'nope' is not found");
    assert_eq!(errors[2], "unable to find data for input tensor 'x' for model 'identity_fp32' in request.");
    assert!(errors[3].starts_with("expected 1 inputs but got 0"), "{}", errors[3]);
    assert_eq!((errors[0], errors[4]), ("", ""));
    // A version was chosen only where the request could be understood.
    let versions = answers.iter_mut().map(|answer| answer.infer_response.take().unwrap().model_version);
    assert_eq!(versions.collect::<Vec<_>>(), ["1", "", "", "1", "1"]);
    assert_eq!((refused(&server, "grpc", "not_found"), refused(&server, "grpc", "invalid_input")), (1.0, 1.0));
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_first_error_ends_the_stream_where_that_is_asked_for() {
    let (_models, server) = echo_server(&[]);
    let mut client = client(&server).await;
    let asked = |request: &mut Request<_>| {
        request.metadata_mut().insert("triton_grpc_error", "true".parse().unwrap());
    };
    let mut call = Call::with(&mut client, asked).await;
    call.send(named("1", 1)).await;
    assert_eq!(id_of(&call.answer().await), "1");
    call.send(ModelInferRequest { model_name: "nope".into(), ..named("2", 1) }).await;
    let status = call.next().await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "Request for unknown model: 'nope' is not found"));
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn messages_that_cannot_be_read_are_answered_as_far_as_they_can_be_told_apart() {
    let (_models, server) = echo_server(&[("limits.body", "1MiB")]);
    let good = |id: &str| encoded(&named(id, 1));
    let hostile = ModelInferRequest { inputs: vec![InferInputTensor::default(); 65], ..named("3", 1) };
    let cut = named("4", 1).encode_to_vec();
    let wire = [
        good("1"),
        framed(0, &[0x2a, 5, 0]),
        encoded(&hostile),
        framed(0, &cut[..cut.len() - 1]),
        framed(1, b"x"),
        good("6"),
    ];
    let (answers, status) = exchange(&server, &[], Frames::of(wire.concat())).await;
    assert_eq!(status.code(), Code::Ok, "{status}");
    assert_eq!(answers.iter().map(id_of).collect::<Vec<_>>(), ["1", "", "3", "4", "", "6"]);
    let failed: Vec<bool> = answers.iter().map(|answer| !answer.error_message.is_empty()).collect();
    assert_eq!(failed, [false, true, true, true, true, false]);
    assert_eq!(refused(&server, "grpc", "invalid_input"), 4.0);

    let gzip = &[("grpc-encoding", "gzip")][..];
    let (answers, status) = exchange(&server, gzip, Frames::of([framed(1, b"no gzip"), good("2")].concat())).await;
    assert_eq!((answers.len(), status.code()), (2, Code::Ok), "{status}");
    assert!(answers[0].error_message.contains("cannot be decompressed"), "{}", answers[0].error_message);
    assert_eq!(id_of(&answers[1]), "2");

    // Where the next message begins cannot be known, or is too far away.
    type Case = (Bytes, Code);
    let cases: [Case; 5] = [
        (framed(2, b"x"), Code::InvalidArgument),
        (good("2").slice(..30), Code::InvalidArgument),
        (good("2").slice(..3), Code::InvalidArgument),
        (Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]), Code::ResourceExhausted),
        (encoded(&named("2", 1 << 18)), Code::ResourceExhausted),
    ];
    for (bad, code) in cases {
        let before = server.metrics().sum("tidegate_requests_refused_total", &[]);
        let (answers, status) = exchange(&server, &[], Frames::of([good("1"), bad].concat())).await;
        assert_eq!(status.code(), code, "{status}");
        assert_eq!(answers.iter().map(id_of).collect::<Vec<_>>(), ["1"], "what came before is answered");
        assert_eq!(server.metrics().sum("tidegate_requests_refused_total", &[]), before + 1.0);
    }
    for (headers, code) in [
        (&[("grpc-timeout", "x")][..], Code::InvalidArgument),
        (&[("grpc-timeout", "0n")], Code::DeadlineExceeded),
        (&[("grpc-encoding", "br")], Code::Unimplemented),
    ] {
        assert_eq!(exchange(&server, headers, Frames::of(good("1"))).await.1.code(), code);
    }
    let (answers, status) = exchange(&server, &[], Frames::of(Bytes::new())).await;
    assert_eq!((answers.len(), status.code()), (0, Code::Ok), "a stream may be empty");
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn compressed_streams_are_answered_in_kind() {
    let (_models, server) = echo_server(&[]);
    let mut client = client(&server).await.send_compressed(Gzip).accept_compressed(Gzip);
    let mut call = Call::open(&mut client).await;
    for rows in [1, 50_000, 2] {
        call.send(named("z", rows)).await;
        let response = call.answer().await.infer_response.unwrap();
        assert_eq!(response.raw_output_contents, echo(rows).raw_input_contents);
    }
    assert_eq!(call.finish().await.1.code(), Code::Ok);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_server_refuses_requests_and_keeps_their_stream() {
    let (_models, server) =
        echo_server(&[("limits.requests", "2"), ("limits.request_bytes", "1MiB"), ("limits.body", "1MiB")]);
    let mut client = client(&server).await;
    let mut call = Call::open(&mut client).await;
    call.send(named("1", 1)).await;
    assert_eq!(call.answer().await.error_message, "");
    server.eventually("an answer that is written holds no place", is_at_rest);
    let held = || {
        let mut holder = TcpStream::connect(server.addresses.http).unwrap();
        let head = b"POST /v2/models/identity_fp32/infer HTTP/1.1\r\nHost: t\r\nContent-Length: 700000\r\n\r\n";
        holder.write_all(head).unwrap();
        holder
    };
    let mut holders = vec![held(), held()];
    server.eventually("the places are taken", |server| in_flight(server) == 2.0);
    call.send(named("2", 1000)).await;
    let answer = call.answer().await;
    assert_eq!((id_of(&answer), &*answer.error_message), ("2", "server is overloaded: more than 2 requests in flight"));
    holders.pop();
    server.eventually("a place is free", |server| in_flight(server) == 1.0);
    holders[0].write_all(&[b' '; 600_000]).unwrap();
    server.eventually("most of the room is taken", |server| {
        server.metrics().sum("tidegate_inflight_bytes", &[]) == 600_000.0
    });
    call.send(named("3", 1 << 15)).await;
    let answer = call.answer().await;
    assert_eq!(id_of(&answer), "3");
    assert!(answer.error_message.contains("bytes of requests and answers in flight"), "{}", answer.error_message);
    drop(holders);
    server.eventually("there is room again", is_at_rest);
    call.send(named("4", 1)).await;
    let answer = call.answer().await;
    assert_eq!((id_of(&answer), &*answer.error_message), ("4", ""));
    assert_eq!(refused(&server, "grpc", "overloaded"), 2.0);
    assert_eq!(call.finish().await.1.code(), Code::Ok);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn many_are_in_flight_at_once_and_all_leave_with_their_client() {
    if without_onnxruntime() {
        return;
    }
    let models = Models::new().with("slow").with("identity_fp32");
    let server = TestServer::of(models.path()).set("limits.stream_requests", "4").start();
    let mut client = client(&server).await;
    let mut call = Call::open(&mut client).await;
    call.send(slow("slow", 20_000)).await;
    call.send(named("fast", 1)).await;
    assert_eq!(id_of(&call.answer().await), "slow", "the first first, however long it takes");
    assert_eq!(id_of(&call.answer().await), "fast");
    server.eventually("every place is free", is_at_rest);

    // Ten seconds of work, on one core.
    for i in 0..10 {
        call.send(slow(&i.to_string(), 250_000)).await;
    }
    server.eventually("as many as are let in", |server| in_flight(server) == 4.0);
    drop((call, client));
    server.eventually("every place is free", is_at_rest);
    let cancelled = ["model=\"slow\"", "outcome=\"cancelled\""];
    server.eventually("they are counted", |server| server.metrics().sum("tidegate_requests_total", &cancelled) >= 4.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stream_is_over_when_its_time_is() {
    let (_models, server) = echo_server(&[]);
    // Between messages, and in the middle of one.
    for wire in
        [encoded(&named("1", 1)), [encoded(&named("1", 1)), encoded(&named("2", 1)).slice(..20)].concat().into()]
    {
        let (answers, status) = exchange(&server, &[("grpc-timeout", "200m")], Frames::then_silence(wire)).await;
        assert_eq!((answers.len(), status.code()), (1, Code::DeadlineExceeded), "{status}");
    }
    assert_eq!(refused(&server, "grpc", "deadline_exceeded"), 1.0, "of the message that had begun");
    server.eventually("every place is free", is_at_rest);
    if without_onnxruntime() {
        return;
    }
    let models = Models::new().with("slow");
    let server = TestServer::of(models.path()).start();
    let wire = [encoded(&slow("1", 250_000)), encoded(&slow("2", 250_000))].concat();
    let (answers, status) = exchange(&server, &[("grpc-timeout", "100m")], Frames::then_silence(wire)).await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let errors: Vec<_> = answers.iter().map(|answer| (id_of(answer), &*answer.error_message)).collect();
    assert_eq!(errors, [("1", "Request timeout expired"), ("2", "Request timeout expired")]);
    // One request's own limit is its own affair.
    let hurried = ModelInferRequest {
        parameters: [("timeout".to_string(), parameter(ParameterChoice::Int64Param(1000)))].into(),
        ..slow("1", 250_000)
    };
    let (answers, status) =
        exchange(&server, &[], Frames::of([encoded(&hurried), encoded(&slow("2", 1))].concat())).await;
    assert_eq!(status.code(), Code::Ok, "{status}");
    assert_eq!(
        answers.iter().map(|answer| &*answer.error_message).collect::<Vec<_>>(),
        ["Request timeout expired", ""]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_message_that_does_not_come_is_not_waited_for_but_the_next_may_take_its_time() {
    let (_models, server) = echo_server(&[("timeouts.body", "50ms")]);
    let wire: Bytes = [encoded(&named("1", 1)), encoded(&named("2", 1)).slice(..20)].concat().into();
    let (answers, status) = exchange(&server, &[], Frames::then_silence(wire)).await;
    assert_eq!((answers.len(), status.code()), (1, Code::Cancelled), "{status}");
    assert_eq!(refused(&server, "grpc", "request_timeout"), 1.0);
    // Nothing but the caller's own limit ends a stream between messages.
    let (answers, status) =
        exchange(&server, &[("grpc-timeout", "300m")], Frames::then_silence(encoded(&named("1", 1)))).await;
    assert_eq!((answers.len(), status.code()), (1, Code::DeadlineExceeded), "{status}");
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_slow_reader_holds_what_it_has_not_read_and_loses_it_in_the_end() {
    /// Of 16 bytes: more than the client's window takes.
    const ROWS: usize = 1 << 20;
    for (limit, is_read) in [("30s", true), ("50ms", false)] {
        let (_models, server) = echo_server(&[("limits.stream_requests", "1"), ("timeouts.write", limit)]);
        let mut http2 = Http2::connect(server.addresses.grpc).await;
        let wire = [encoded(&named("1", ROWS)), encoded(&named("2", 1))].concat();
        let begun = http2.begin("POST", STREAM, &GRPC, Frames::of(wire));
        let answer = timeout(PATIENCE, begun).await.expect("a head").into_body();
        if is_read {
            server.eventually("it is computed", |server| {
                server.metrics().sum("tidegate_requests_total", &["outcome=\"ok\""]) == 1.0
            });
            assert_eq!(in_flight(&server), 1.0, "most of the first answer is still here, and the second not read");
            let body = timeout(PATIENCE, answer.collect()).await.expect("the rest").unwrap();
            assert_eq!(Status::from_header_map(body.trailers().unwrap()).unwrap().code(), Code::Ok);
            assert!(body.to_bytes().len() > ROWS * 16);
        } else {
            server.eventually("it begins", |server| {
                server.metrics().sum("tidegate_requests_total", &["outcome=\"ok\""]) == 1.0
            });
            server.eventually("every place is free", is_at_rest);
            assert!(timeout(PATIENCE, answer.collect()).await.expect("an end").is_err());
        }
        server.eventually("every place is free", is_at_rest);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_drain_answers_what_was_accepted_and_ends_the_stream() {
    let models = Models::new().with("identity_fp32").with("slow");
    let (release, held) = std::sync::mpsc::channel::<()>();
    let until_released = move |phase| {
        if phase == Phase::LameDuck {
            let _ = held.recv();
        }
    };
    let mut server = TestServer::of(models.path()).on_phase(until_released).start();
    let mut client = client(&server).await;
    let mut idle = Call::open(&mut client).await;
    let mut busy = Call::open(&mut client).await;
    busy.send(if without_onnxruntime() { named("1", 1) } else { slow("1", 50_000) }).await;
    server.eventually("it is accepted", |server| in_flight(server) == 1.0 || without_onnxruntime());
    server.tell_to_stop();
    idle.send(named("2", 1)).await;
    assert_eq!(idle.answer().await.error_message, "", "not ready any more, but still serving");
    release.send(()).unwrap();
    let answer = busy.answer().await;
    assert_eq!((id_of(&answer), &*answer.error_message), ("1", ""));
    for call in [&mut idle, &mut busy] {
        let status = call.next().await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(status.message().contains("draining"), "{status}");
    }
    drop((idle, busy, client));
    assert_eq!(server.stop().connections, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_last_answer_is_marked_for_those_who_ask() {
    let (_models, server) = echo_server(&[]);
    let mut client = client(&server).await;
    let mut call = Call::open(&mut client).await;
    let asking = |choice| ModelInferRequest {
        parameters: [("triton_enable_empty_final_response".to_string(), parameter(choice))].into(),
        ..echo(1)
    };
    for (choice, marked, refused) in [
        (ParameterChoice::BoolParam(true), true, false),
        (ParameterChoice::BoolParam(false), false, false),
        (ParameterChoice::StringParam("true".into()), false, true),
    ] {
        call.send(asking(choice)).await;
        let answer = call.answer().await;
        assert_eq!(!answer.error_message.is_empty(), refused, "{}", answer.error_message);
        let mark = answer.infer_response.unwrap().parameters.remove("triton_final_response");
        assert_eq!(mark, marked.then(|| parameter(ParameterChoice::BoolParam(true))));
    }
    // An error is the last answer, too.
    call.send(ModelInferRequest { model_name: "nope".into(), ..asking(ParameterChoice::BoolParam(true)) }).await;
    let answer = call.answer().await;
    assert!(answer.infer_response.unwrap().parameters.contains_key("triton_final_response"));
    assert_eq!(call.finish().await.0.len(), 0, "no empty answer follows");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn streams_are_bounded() {
    /// Of the whole server: `stream::MAX_STREAMS`.
    const MAX_STREAMS: usize = 1024;
    let (_models, server) = echo_server(&[("limits.streams", "2000")]);
    let mut client = client(&server).await;
    let mut open = Vec::new();
    for _ in 0..MAX_STREAMS {
        open.push(Call::open(&mut client).await);
    }
    let one_more = || Request::new(tonic::codegen::tokio_stream::iter([echo(1)]));
    let status = client.model_stream_infer(one_more()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    open.pop();
    let freed = async { while client.model_stream_infer(one_more()).await.is_err() {} };
    timeout(PATIENCE, freed).await.expect("a stream that ends frees its place");
}

fn question(question: MessageRequest) -> ServerReflectionRequest {
    ServerReflectionRequest { host: String::new(), message_request: Some(question) }
}

/// The names in answer to `list_services`.
fn listed(answer: ServerReflectionResponse) -> Vec<String> {
    match answer.message_response {
        Some(MessageResponse::ListServicesResponse(list)) => list.service.into_iter().map(|it| it.name).collect(),
        other => panic!("not a list: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn reflection_describes_every_service() {
    let (_models, server) = echo_server(&[]);
    let channel = channel(&server).await;
    let mut client = ServerReflectionClient::new(channel.clone()).send_compressed(Gzip);
    let questions = [
        question(MessageRequest::ListServices(String::new())),
        question(MessageRequest::FileContainingSymbol(format!("{SERVICE}.ModelStreamInfer"))),
        question(MessageRequest::FileContainingSymbol("grpc.health.v1.Health".into())),
    ];
    let asked = tonic::codegen::tokio_stream::iter(questions);
    let mut answers = client.server_reflection_info(asked).await.unwrap().into_inner();
    let mut services = listed(answers.message().await.unwrap().unwrap());
    services.sort();
    assert_eq!(services, ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", SERVICE]);
    for _ in 0..2 {
        let Some(MessageResponse::FileDescriptorResponse(file)) =
            answers.message().await.unwrap().unwrap().message_response
        else {
            panic!("not a file");
        };
        assert_eq!(file.file_descriptor_proto.len(), 1);
    }
    assert!(answers.message().await.unwrap().is_none());

    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let list = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
    let asked = [v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(list) }];
    let asked = tonic::codegen::tokio_stream::iter(asked);
    let mut answers = client.server_reflection_info(asked).await.unwrap().into_inner();
    assert!(answers.message().await.unwrap().unwrap().message_response.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn questions_are_bounded_and_never_hold_an_exit() {
    const PATH: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    /// Of the whole server: `reflection::MAX_STREAMS`.
    const MAX_STREAMS: usize = 64;
    let (_models, mut server) = echo_server(&[("timeouts.body", "1s")]);
    let mut http2 = Http2::connect(server.addresses.grpc).await;
    let list = framed(0, &question(MessageRequest::ListServices(String::new())).encode_to_vec());
    let long = framed(0, &question(MessageRequest::FileByFilename("f".repeat(16 << 10))).encode_to_vec());
    for (wire, code) in [
        (Frames::of([list.clone(), long].concat()), Code::ResourceExhausted),
        (Frames::of(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff])), Code::ResourceExhausted),
        (Frames::of(framed(7, b"x")), Code::InvalidArgument),
        (Frames::then_silence(list.slice(..3)), Code::Cancelled),
        (Frames::of(framed(0, &question(MessageRequest::FileByFilename("no".into())).encode_to_vec())), Code::NotFound),
    ] {
        let answer = http2.send("POST", PATH, &GRPC, wire).await;
        assert_eq!(answer.status().code(), code, "{}", answer.status());
    }
    let headers = [&GRPC[..], &[("grpc-timeout", "20m")]].concat();
    let answer = http2.send("POST", PATH, &headers, Frames::then_silence(list.clone())).await;
    assert_eq!(answer.status().code(), Code::DeadlineExceeded);
    assert!(!answer.body.is_empty());

    let mut open = Vec::new();
    for _ in 0..MAX_STREAMS {
        open.push(http2.begin("POST", PATH, &GRPC, Frames::then_silence(list.clone())).await);
    }
    let answer = http2.send("POST", PATH, &GRPC, Frames::of(list)).await;
    assert_eq!(answer.status().code(), Code::ResourceExhausted);
    server.tell_to_stop();
    for answer in open {
        let body = timeout(PATIENCE, answer.into_body().collect()).await.expect("an end").unwrap();
        assert_eq!(Status::from_header_map(body.trailers().unwrap()).unwrap().code(), Code::Unavailable);
    }
    drop(http2);
    assert_eq!(server.stop().connections, 0);
}
