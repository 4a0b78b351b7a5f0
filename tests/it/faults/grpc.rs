//! D: messages and metadata that no gRPC client should send, one test per row of the catalogue; each call is followed
//! by the same look after the server as an HTTP case's, with a golden request over gRPC besides.
//!
//! What the rows say of streams, also row by row: `stream.rs`. What they cost in memory: `grpc_memory`.

use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use prost::Message;
use serde_json::Value;
use tidegate::protocol::grpc::proto::model_infer_request::InferInputTensor;
use tidegate::protocol::grpc::proto::*;
use tonic::Code;

use super::Target;
use crate::grpc::{Answer, Frames, GRPC, Http2, INFER, SERVICE, echo, framed};
use crate::support::{Builder, root};

/// One hostile call and the answers that are right.
pub struct Call {
    row: &'static str,
    what: String,
    method: &'static str,
    path: String,
    headers: Vec<(&'static str, String)>,
    /// The request's body, after which it ends.
    wire: Bytes,
    http: u16,
    /// Where it is gRPC at all: the status is one of these.
    codes: &'static [Code],
    /// Metrics must have counted it, once.
    counted: bool,
}

impl Call {
    /// What is no inference.
    pub fn other(row: &'static str, path: impl Into<String>, wire: Bytes, codes: &'static [Code]) -> Call {
        let path = path.into();
        let headers = GRPC.map(|(name, value)| (name, value.to_string())).into();
        Call { row, what: path.clone(), method: "POST", path, headers, wire, http: 200, codes, counted: false }
    }

    /// A body to `ModelInfer`.
    pub fn wire(row: &'static str, what: impl Into<String>, wire: Bytes, codes: &'static [Code]) -> Call {
        Call { what: what.into(), counted: true, ..Call::other(row, INFER, wire, codes) }
    }

    pub fn infer(
        row: &'static str,
        what: impl Into<String>,
        request: &ModelInferRequest,
        codes: &'static [Code],
    ) -> Call {
        Call::wire(row, what, framed(0, &request.encode_to_vec()), codes)
    }

    fn with(mut self, name: &'static str, value: &str) -> Call {
        self.headers.retain(|(known, _)| *known != name);
        self.headers.push((name, value.to_string()));
        self
    }

    fn without(mut self, name: &str) -> Call {
        self.headers.retain(|(known, _)| *known != name);
        self
    }

    /// Refused before there was a call.
    fn bare(self, http: u16) -> Call {
        Call { http, codes: &[], counted: false, ..self }
    }

    fn name(&self) -> String {
        format!("{} ({})", self.row, self.what)
    }
}

/// The gRPC port of a [`Target`], and how it answered before anything hostile was sent.
pub struct Port {
    pub target: Target,
    http2: Http2,
    golden: Vec<Bytes>,
    /// As of the calls judged until now. Runs are counted after their answers are sent: what metrics say may be less.
    expected: Tally,
}

/// What metrics have counted.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tally {
    /// Inferences that were begun or refused.
    requests: f64,
    /// Runs that an engine completed.
    runs: f64,
}

impl Port {
    pub async fn new() -> Port {
        Port::with(|server| server).await
    }

    pub async fn with(configure: impl FnOnce(Builder) -> Builder) -> Port {
        let target = Target::with(configure);
        let mut http2 = Http2::connect(target.server.addresses.grpc).await;
        let golden = golden(&mut http2).await;
        Port { target, http2, golden, expected: Tally { requests: 2.0, runs: 2.0 } }
    }

    /// Runs every call and reports all that went wrong at once.
    pub async fn run(&mut self, calls: impl IntoIterator<Item = Call>) {
        let mut faults = Vec::new();
        for call in calls {
            faults.extend(self.judge(&call).await.err());
        }
        assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
    }

    /// The answer to one call, for a closer look.
    pub async fn answer(&mut self, call: Call) -> Answer {
        self.judge(&call).await.unwrap_or_else(|fault| panic!("{fault}"))
    }

    async fn judge(&mut self, call: &Call) -> Result<Answer, String> {
        let answer = self.send(call).await;
        self.is_unharmed(&call.name()).await;
        if call.counted {
            let computed = answer.http == 200 && answer.status().code() == Code::Ok;
            self.expected.requests += 1.0;
            self.expected.runs += f64::from(u8::from(computed));
        }
        let what = format!("{} is counted once, and run only if it is answered: {:?}", call.name(), self.expected);
        self.target.server.eventually(&what, |_| self.tally() == self.expected);
        self.acceptable(call, &answer).map_err(|fault| format!("{}: {fault}", call.name()))?;
        Ok(answer)
    }

    /// Sends a call without a look after the server.
    pub async fn send(&mut self, call: &Call) -> Answer {
        let headers: Vec<(&str, &str)> = call.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.http2.send(call.method, &call.path, &headers, Frames::of(call.wire.clone())).await
    }

    fn acceptable(&self, call: &Call, answer: &Answer) -> Result<(), String> {
        if answer.http != call.http {
            return Err(format!("HTTP {}, expected {}", answer.http, call.http));
        }
        if answer.http != 200 {
            return Ok(());
        }
        let status = answer.status();
        if !call.codes.contains(&status.code()) {
            return Err(format!("{:?}, expected {:?}: {:.200}", status.code(), call.codes, status.message()));
        }
        self.target.fit_for_clients(&call.wire, status.message())
    }

    /// As [`Target::is_unharmed`], and the golden request gets the same bits over gRPC.
    pub async fn is_unharmed(&mut self, after: &str) {
        assert_eq!(golden(&mut self.http2).await, self.golden, "after {after}");
        self.target.is_unharmed(after);
        self.expected.requests += 2.0;
        self.expected.runs += 2.0;
    }

    fn tally(&self) -> Tally {
        let metrics = self.target.server.metrics();
        let sum = |name| metrics.sum(name, &[]);
        Tally {
            requests: sum("tidegate_requests_total") + sum("tidegate_requests_refused_total"),
            runs: sum("tidegate_executions_total") - sum("tidegate_execution_failures_total"),
        }
    }
}

/// The outputs for a real image, every bit of them.
async fn golden(http2: &mut Http2) -> Vec<Bytes> {
    let sample = std::fs::read(root().join("models/digits/sample.json")).unwrap();
    let mut sample: Value = serde_json::from_slice(&sample).unwrap();
    let image = sample["inputs"][0].take();
    let numbers = |key: &str| image[key].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect::<Vec<_>>();
    let data: Vec<u8> = numbers("data").into_iter().flat_map(|x| (x as f32).to_le_bytes()).collect();
    let shape: Vec<i64> = numbers("shape").into_iter().map(|n| n as i64).collect();
    let request = raw("digits", [(image["name"].as_str().unwrap(), "FP32", &shape[..], &data[..])]);
    let answer = http2.send("POST", INFER, &GRPC, Frames::of(framed(0, &request.encode_to_vec()))).await;
    assert_eq!(answer.status().code(), Code::Ok, "{}", answer.status());
    response(&answer).raw_output_contents
}

/// The message of an answer that has one.
pub fn response(answer: &Answer) -> ModelInferResponse {
    ModelInferResponse::decode(answer.body.slice(5..)).unwrap()
}

/// A request with inputs (name, datatype, shape, bytes) in raw contents.
pub fn raw<'a>(
    model: &str,
    inputs: impl IntoIterator<Item = (&'a str, &'a str, &'a [i64], &'a [u8])>,
) -> ModelInferRequest {
    let (inputs, raw_input_contents) = inputs
        .into_iter()
        .map(|(name, datatype, shape, data)| (declared(name, datatype, shape), Bytes::copy_from_slice(data)))
        .unzip();
    ModelInferRequest { model_name: model.into(), inputs, raw_input_contents, ..Default::default() }
}

/// A request with the input `x` in a typed field.
fn typed(model: &str, datatype: &str, shape: &[i64], contents: InferTensorContents) -> ModelInferRequest {
    let input = InferInputTensor { contents: Some(contents), ..declared("x", datatype, shape) };
    ModelInferRequest { model_name: model.into(), inputs: vec![input], ..Default::default() }
}

fn declared(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
    let (name, datatype) = (name.into(), datatype.into());
    InferInputTensor { name, datatype, shape: shape.to_vec(), ..Default::default() }
}

/// Bytes of an element; of strings, the least there are: an empty one.
pub fn width(datatype: &str) -> usize {
    match datatype {
        "BOOL" | "INT8" | "UINT8" => 1,
        "INT16" | "UINT16" | "FP16" | "BF16" => 2,
        "INT32" | "UINT32" | "FP32" | "BYTES" => 4,
        _ => 8,
    }
}

pub const OK: &[Code] = &[Code::Ok];
pub const INVALID: &[Code] = &[Code::InvalidArgument];
const TOO_LARGE: &[Code] = &[Code::ResourceExhausted];
const UNIMPLEMENTED: &[Code] = &[Code::Unimplemented];
const EXPIRED: &[Code] = &[Code::DeadlineExceeded];

/// A message's prefix, and no message.
fn prefix(flag: u8, length: u32) -> Bytes {
    [&[flag][..], &length.to_be_bytes()].concat().into()
}

/// A good request of exactly so many bytes: what it lacks stands in a field that nobody knows.
fn padded(length: usize) -> Vec<u8> {
    let mut encoded = echo(1).encode_to_vec();
    // One byte says which field, three how long it is.
    let padding = length - encoded.len() - 4;
    assert!((1 << 14..1 << 21).contains(&padding), "{padding}");
    encoded.extend([15 << 3 | 2, padding as u8 | 0x80, (padding >> 7) as u8 | 0x80, (padding >> 14) as u8]);
    encoded.resize(length, 0);
    encoded
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d10_what_is_too_long_is_refused_by_its_prefix() {
    const LIMIT: usize = 1 << 20;
    const QUERY: u32 = 16 << 10;
    let mut port = Port::with(|server| server.set("limits.body", "1MiB")).await;
    let over = u32::try_from(LIMIT).unwrap() + 1;
    port.run([
        Call::wire("D10", "a byte less than the limit", framed(0, &padded(LIMIT - 1)), OK),
        Call::wire("D10", "the limit", framed(0, &padded(LIMIT)), OK),
        Call::wire("D10", "a byte more, all of it", framed(0, &padded(LIMIT + 1)), TOO_LARGE),
        Call::wire("D10", "a byte more, announced", prefix(0, over), TOO_LARGE),
        Call::wire("D10", "4 GiB, announced", prefix(0, u32::MAX), TOO_LARGE),
        Call::wire("D10", "4 GiB, compressed", prefix(1, u32::MAX), TOO_LARGE).with("grpc-encoding", "gzip"),
        Call::other("D10", format!("/{SERVICE}/ModelMetadata"), prefix(0, QUERY + 1), TOO_LARGE),
        Call::other("D10", "/grpc.health.v1.Health/Check", prefix(0, QUERY + 1), TOO_LARGE),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d11_compression_is_declared_known_and_bounded() {
    const LIMIT: usize = 1 << 20;
    let mut port = Port::with(|server| server.set("limits.body", "1MiB")).await;
    let message = echo(1).encode_to_vec();
    let packed = gzip(&message);
    let wrong_sum = {
        let mut wrong = packed.clone();
        let sum = wrong.len() - 8;
        wrong[sum] ^= 1;
        wrong
    };
    let bomb = vec![0; 64 << 20];
    let gzipped =
        |what, wire: &[u8], codes| Call::wire("D11", what, framed(1, wire), codes).with("grpc-encoding", "gzip");
    port.run([
        gzipped("as it should be", &packed, OK),
        Call::wire("D11", "deflate", framed(1, &zlib(&message)), OK).with("grpc-encoding", "deflate"),
        Call::wire("D11", "not compressed after all", framed(0, &message), OK).with("grpc-encoding", "gzip"),
        gzipped("the limit", &gzip(&padded(LIMIT)), OK),
        gzipped("a byte more than the limit", &gzip(&padded(LIMIT + 1)), TOO_LARGE),
        gzipped("a bomb", &gzip(&bomb), TOO_LARGE),
        Call::wire("D11", "a zlib bomb", framed(1, &zlib(&bomb)), TOO_LARGE).with("grpc-encoding", "deflate"),
        gzipped("cut short", &packed[..packed.len() / 2], INVALID),
        gzipped("a wrong checksum", &wrong_sum, INVALID),
        gzipped("twice over", &gzip(&packed), INVALID),
        gzipped("zlib called gzip", &zlib(&message), INVALID),
        gzipped("nothing", &[], INVALID),
        Call::wire("D11", "flagged, no encoding", framed(1, &packed), INVALID),
        Call::wire("D11", "flagged as identity", framed(1, &message), INVALID).with("grpc-encoding", "identity"),
        Call::wire("D11", "an unknown encoding", framed(1, &packed), UNIMPLEMENTED).with("grpc-encoding", "snappy"),
        Call::wire("D11", "an unknown encoding, unused", framed(0, &message), UNIMPLEMENTED)
            .with("grpc-encoding", "br"),
        Call::wire("D11", "flag 2", framed(2, &message), INVALID),
        Call::wire("D11", "flag 255", framed(255, &message), INVALID).with("grpc-encoding", "gzip"),
    ])
    .await;
}

/// Of the message's fields: the key of a value of this wire type.
const fn key(field: u8, wire_type: u8) -> u8 {
    field << 3 | wire_type
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d12_what_is_no_message_is_the_clients_fault() {
    let mut port = Port::new().await;
    let message = echo(1).encode_to_vec();
    let then = |tail: &[u8]| framed(0, &[&message[..], tail].concat());
    let groups = [[key(15, 3)].repeat(101), [key(15, 4)].repeat(101)].concat();
    let calls = [
        ("a string of bytes that are no UTF-8", framed(0, &[key(1, 2), 1, 0xff]), INVALID),
        ("a number for a string", then(&[key(1, 0), 1]), INVALID),
        ("a string for a number", then(&[key(5, 2), 4, key(3, 2), 2, 0x80, 0x80]), INVALID),
        ("fixed numbers for a submessage", then(&[key(5, 1), 0, 0, 0, 0, 0, 0, 0, 0]), INVALID),
        ("a group", then(&[key(15, 3), key(15, 4)]), INVALID),
        ("a group without an end", then(&[key(15, 3)]), INVALID),
        ("an end without a group", then(&[key(15, 4)]), INVALID),
        ("101 groups in each other", then(&groups), INVALID),
        ("wire type 6", then(&[key(15, 6)]), INVALID),
        ("wire type 7", then(&[key(15, 7)]), INVALID),
        ("field 0", then(&[key(0, 0), 0]), INVALID),
        ("field 2^29 - 1, which is nobody's", then(&[0xf8, 0xff, 0xff, 0xff, 0x0f, 0]), OK),
        ("field 2^29, which cannot be", then(&[0x80, 0x80, 0x80, 0x80, 0x10, 0]), INVALID),
        ("a varint of eleven bytes", then(&[[key(15, 0)].as_slice(), &[0x80; 10], &[1]].concat()), INVALID),
        ("a key of eleven bytes", then(&[[0x80; 10].as_slice(), &[1]].concat()), INVALID),
        ("a length of 2^64 - 1", then(&[[key(15, 2)].as_slice(), &[0xff; 9], &[1]].concat()), INVALID),
        ("101 submessages in each other, of a field that is nobody's", then(&nested(101)), OK),
        ("101 submessages in each other, of a parameter", then(&parameter_of(&nested(101))), OK),
        ("nothing but 64 KiB of 0xff", framed(0, &[0xff; 64 << 10]), INVALID),
    ];
    port.run(calls.map(|(what, wire, codes)| Call::wire("D12", what, wire, codes))).await;

    // Cut short anywhere, and with any byte turned round: refused or, where that is another good message, answered.
    let mut codes = Vec::new();
    for length in 0..message.len() {
        let code = port.send(&Call::wire("D12", "", framed(0, &message[..length]), &[])).await.status().code();
        assert!(matches!(code, Code::InvalidArgument | Code::NotFound), "D12 ({length} bytes of a message): {code:?}");
    }
    for turned in [0x01, 0x80, 0xff] {
        for at in 0..message.len() {
            let mut wrong = message.clone();
            wrong[at] ^= turned;
            let code = port.send(&Call::wire("D12", "", framed(0, &wrong), &[])).await.status().code();
            let right = [Code::Ok, Code::InvalidArgument, Code::NotFound, Code::ResourceExhausted, Code::Unimplemented];
            assert!(right.contains(&code), "D12 (byte {at} turned by {turned:#x}): {code:?}");
            codes.push(code);
        }
    }
    assert!(codes.contains(&Code::Ok) && codes.contains(&Code::InvalidArgument), "both happen");
    port.is_unharmed("D12").await;
}

/// A field 15 in a field 15, and so on.
fn nested(depth: usize) -> Vec<u8> {
    (0..depth).fold(Vec::new(), |inner, _| [&[key(15, 2)][..], &varint(inner.len()), &inner].concat())
}

/// A parameter of the request with an unknown field in its value.
fn parameter_of(unknown: &[u8]) -> Vec<u8> {
    let value = [&[key(2, 2)][..], &varint(unknown.len()), unknown].concat();
    let entry = [&[key(1, 2), 1, b'p'][..], &value].concat();
    [&[key(4, 2)][..], &varint(entry.len()), &entry].concat()
}

fn varint(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d13_repeated_fields_end_where_they_say_and_are_counted() {
    let mut port = Port::new().await;
    let contents = |contents: &[u8]| {
        let contents = [&[key(5, 2)][..], &varint(contents.len()), contents].concat();
        let input = [&declared("x", "FP32", &[1, 4]).encode_to_vec()[..], &contents].concat();
        let message = ModelInferRequest { model_name: "identity_fp32".into(), ..Default::default() };
        let input = [&[key(5, 2)][..], &varint(input.len()), &input].concat();
        framed(0, &[message.encode_to_vec(), input].concat())
    };
    let mut calls: Vec<Call> = (1..=8)
        .map(|field| {
            let beyond = [key(field, 2), 0x7f, 0];
            Call::wire("D13", format!("field {field} reaches beyond its message"), contents(&beyond), INVALID)
        })
        .collect();
    calls.extend([
        Call::wire("D13", "packed numbers of half a number", contents(&[key(6, 2), 3, 0, 0, 0]), INVALID),
        Call::wire("D13", "a packed varint without an end", contents(&[key(3, 2), 1, 0x80]), INVALID),
        Call::wire("D13", "16 Mi empty strings", contents(&[key(8, 2), 0].repeat(16 << 20)), TOO_LARGE),
        Call::wire("D13", "16 Mi zeros of 8 bytes each", contents(&packed_zeros(16 << 20)), TOO_LARGE),
        Call::wire("D13", "a shape of 64 Ki dimensions", shape_of(64 << 10), INVALID),
    ]);
    port.run(calls).await;
}

/// So many INT64 of one byte each.
fn packed_zeros(count: usize) -> Vec<u8> {
    [&[key(3, 2)][..], &varint(count), &vec![0; count]].concat()
}

fn shape_of(dimensions: usize) -> Bytes {
    framed(0, &raw("identity_fp32", [("x", "FP32", &vec![1; dimensions][..], &[][..])]).encode_to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d14_every_input_has_its_data_in_one_place() {
    let mut port = Port::new().await;
    let four = InferTensorContents { fp32_contents: vec![0.0; 4], ..Default::default() };
    let row = [0; 64];
    let two = raw("sum_rows", [("INPUT0", "FP32", &[1, 16][..], &row[..]), ("INPUT1", "FP32", &[1, 16], &row)]);
    let with_contents = |mut request: ModelInferRequest, at: usize, contents: &InferTensorContents| {
        request.inputs[at].contents = Some(contents.clone());
        request
    };
    let with_raw = |request: &ModelInferRequest, count: usize| ModelInferRequest {
        raw_input_contents: vec![Bytes::copy_from_slice(&row); count],
        ..request.clone()
    };
    let sixteen = InferTensorContents { fp32_contents: vec![0.0; 16], ..Default::default() };
    let mut mixed = with_contents(two.clone(), 0, &sixteen);
    mixed.raw_input_contents.pop();
    let shapeless = |data: &[u8]| raw("identity_fp32", [("x", "FP32", &[][..], data)]);
    let typed_both = with_contents(with_contents(with_raw(&two, 0), 0, &sixteen), 1, &sixteen);
    port.run([
        Call::infer("D14", "two raw inputs", &two, OK),
        Call::infer("D14", "two typed inputs", &typed_both, OK),
        Call::infer("D14", "both of an input", &with_contents(echo(1), 0, &four), INVALID),
        Call::infer("D14", "empty contents besides", &with_contents(echo(1), 0, &Default::default()), INVALID),
        Call::infer("D14", "typed here and raw there", &mixed, INVALID),
        Call::infer("D14", "neither", &with_raw(&echo(1), 0), INVALID),
        Call::infer("D14", "one for two inputs", &with_raw(&two, 1), INVALID),
        Call::infer("D14", "three for two inputs", &with_raw(&two, 3), INVALID),
        Call::infer("D14", "raw data and no input", &ModelInferRequest { inputs: vec![], ..echo(1) }, INVALID),
        Call::infer("D14", "no shape", &shapeless(&[0; 16]), INVALID),
        Call::infer("D14", "no shape, one element", &shapeless(&[0; 4]), INVALID),
        Call::infer("D14", "no datatype", &raw("identity_fp32", [("x", "", &[1, 4][..], &[0; 16][..])]), INVALID),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d15_raw_contents_have_the_length_of_their_shape() {
    let mut port = Port::new().await;
    let mut calls = Vec::new();
    for (model, datatype) in super::identities() {
        let whole = vec![0; 3 * width(datatype)];
        let long = [&whole[..], &[0]].concat();
        for (what, data, codes) in [
            ("exactly", &whole[..], OK),
            ("a byte short", &whole[1..], INVALID),
            ("a byte long", &long, INVALID),
            ("none", &[], INVALID),
            ("twice", &whole.repeat(2), INVALID),
        ] {
            let request = raw(model, [("x", datatype, &[1, 3][..], data)]);
            calls.push(Call::infer("D15", format!("{datatype}: {what}"), &request, codes));
        }
    }
    for (what, data) in [
        ("a string longer than what is there", &[5, 0, 0, 0, b'a'][..]),
        ("a string of 4 GiB", &[0xff; 4]),
        ("half a length", &[1, 0]),
    ] {
        calls.push(Call::infer("D15", what, &raw("identity_bytes", [("x", "BYTES", &[1, 1][..], data)]), INVALID));
    }
    calls.push(Call::infer("D15", "BOOL 2", &raw("identity_bool", [("x", "BOOL", &[1, 1][..], &[2][..])]), INVALID));
    port.run(calls).await;
}

/// Each typed field with one element, and the datatypes that it carries.
fn fields() -> [(&'static [&'static str], InferTensorContents); 8] {
    let none = InferTensorContents::default;
    [
        (&["BOOL"], InferTensorContents { bool_contents: vec![true], ..none() }),
        (&["INT8", "INT16", "INT32"], InferTensorContents { int_contents: vec![1], ..none() }),
        (&["INT64"], InferTensorContents { int64_contents: vec![1], ..none() }),
        (&["UINT8", "UINT16", "UINT32"], InferTensorContents { uint_contents: vec![1], ..none() }),
        (&["UINT64"], InferTensorContents { uint64_contents: vec![1], ..none() }),
        (&["FP32"], InferTensorContents { fp32_contents: vec![1.0], ..none() }),
        (&["FP64"], InferTensorContents { fp64_contents: vec![1.0], ..none() }),
        (&["BYTES"], InferTensorContents { bytes_contents: vec![Bytes::from_static(b"a")], ..none() }),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d16_typed_contents_stand_in_the_field_of_their_datatype() {
    let mut port = Port::new().await;
    let mut calls = Vec::new();
    for (model, datatype) in super::identities() {
        for (carried, contents) in fields() {
            let codes = if carried.contains(&datatype) { OK } else { INVALID };
            let what = format!("{datatype} in the field of {}", carried.join(", "));
            calls.push(Call::infer("D16", what, &typed(model, datatype, &[1, 1], contents), codes));
        }
    }
    let two = |contents| typed("identity_fp32", "FP32", &[1, 1], contents);
    let both = InferTensorContents { int64_contents: vec![1], ..fields()[5].1.clone() };
    calls.push(Call::infer("D16", "in two fields", &two(both), INVALID));
    let wide = InferTensorContents { int_contents: vec![128], ..Default::default() };
    calls.push(Call::infer("D16", "128 as INT8", &typed("identity_int8", "INT8", &[1, 1], wide), INVALID));
    port.run(calls).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d17_deadlines_are_read_strictly() {
    let mut port = Port::new().await;
    let wire = framed(0, &echo(1).encode_to_vec());
    let calls = [
        ("0n", EXPIRED),
        ("1n", EXPIRED),
        ("0H", EXPIRED),
        ("60S", OK),
        // Years: bounded to a day.
        ("99999999H", OK),
        ("99999999M", OK),
        ("999999999S", INVALID),
        ("-1S", INVALID),
        ("+1S", INVALID),
        ("1.5S", INVALID),
        ("abc", INVALID),
        ("1X", INVALID),
        ("1s", INVALID),
        ("1", INVALID),
        ("S", INVALID),
        ("", INVALID),
        ("１S", INVALID),
    ];
    port.run(
        calls.map(|(timeout, codes)| Call::wire("D17", timeout, wire.clone(), codes).with("grpc-timeout", timeout)),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d18_what_is_not_grpc_is_told_so() {
    let mut port = Port::new().await;
    let call = |what: &'static str| {
        let call = Call::wire("D18", what, framed(0, &echo(1).encode_to_vec()), UNIMPLEMENTED);
        Call { counted: false, ..call }
    };
    let to = |path: &str| Call::other("D18", path, framed(0, &[]), UNIMPLEMENTED);
    port.run([
        call("no `te`").without("te"),
        call("another `te`").with("te", "gzip"),
        call("no content type").without("content-type").bare(415),
        call("JSON").with("content-type", "application/json").bare(415),
        call("gRPC-Web").with("content-type", "application/grpc-web+proto").bare(415),
        call("messages of another kind").with("content-type", "application/grpc+json").bare(415),
        Call { method: "GET", ..call("GET").bare(405) },
        Call { method: "PUT", ..call("PUT").bare(405) },
        to(&format!("/{SERVICE}/ModelInferAll")),
        to(&format!("/{SERVICE}/modelinfer")),
        to(&format!("/{SERVICE}/ModelInfer/")),
        to(&format!("/{SERVICE}/")),
        to(&format!("/{SERVICE}")),
        to("/other.Service/ModelInfer"),
        to("/grpc.health.v1.Health/Look"),
        to("/v2/health/live"),
        to("/"),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d20_a_unary_call_has_one_message() {
    let mut port = Port::new().await;
    let whole = framed(0, &echo(1).encode_to_vec());
    let half = whole.slice(..whole.len() / 2);
    let wires = [
        ("none", Bytes::new()),
        ("half a prefix", whole.slice(..3)),
        ("a prefix", whole.slice(..5)),
        ("half a message", half.clone()),
        ("two", [&whole[..], &whole].concat().into()),
        ("one and a half", [&whole[..], &half].concat().into()),
        ("one and a byte", [&whole[..], &[0]].concat().into()),
    ];
    port.run(wires.map(|(what, wire)| Call::wire("D20", what, wire, INVALID))).await;
}
