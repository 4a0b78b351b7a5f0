//! E over gRPC: shapes, datatypes, names and values that a model's signature rules out, or should have. One test per
//! row of the catalogue.

use bytes::Bytes;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use prost::Message;
use tidegate::protocol::grpc::proto::model_infer_request::InferRequestedOutputTensor;
use tidegate::protocol::grpc::proto::*;
use tonic::Code;

use super::grpc::{Call, INVALID, OK, Port, raw, response, width};
use super::{IDENTITIES, MAX_ROWS, identities};
use crate::grpc::{Frames, GRPC, Http2, INFER, client, framed};
use crate::support::without_onnxruntime;

/// The most dimensions a tensor may have.
const MAX_RANK: usize = 16;

/// The input `x` of `sentinel`, with so many rows' bytes.
fn sentinel(shape: &[i64], rows: usize) -> ModelInferRequest {
    raw("sentinel", [("x", "FP32", shape, &vec![0; rows * 32][..])])
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The bits of the first output.
fn bits(response: &ModelInferResponse) -> Vec<u32> {
    let (words, rest) = response.raw_output_contents[0].as_chunks();
    assert!(rest.is_empty());
    words.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// A shape that is no tensor's, with the data of one row, with none, and of strings.
fn impossible(row: &'static str, shapes: &[&[i64]]) -> Vec<Call> {
    let requests = shapes.iter().flat_map(|shape| {
        let strings = raw("identity_bytes", [("x", "BYTES", *shape, &[][..])]);
        [sentinel(shape, 1), sentinel(shape, 0), strings].map(|request| (shape, request))
    });
    let either: &[Code] = &[Code::InvalidArgument, Code::ResourceExhausted];
    requests
        .map(|(shape, request)| {
            let codes = if request.model_name == "identity_bytes" { either } else { INVALID };
            Call::infer(row, format!("{shape:?} to {}", request.model_name), &request, codes)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e1_products_that_wrap_are_refused() {
    let mut port = Port::new().await;
    let shapes: [&[i64]; 4] = [&[16, (1 << 60) + 2], &[4, (1 << 60) + 2], &[1 << 62, 4], &[1 << 31, 1 << 31, 4]];
    port.run(impossible("E1", &shapes)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e2_extents_and_ranks_have_limits() {
    let mut port = Port::new().await;
    let twos = |rank: usize| vec![2; rank];
    let shapes: [&[i64]; 9] = [
        &[1 << 32, 1 << 32],
        &[i64::MAX],
        // What 2^64 - 1 and 2^63 are on this wire.
        &[-1],
        &[i64::MIN, 2],
        &[i64::MAX, 2],
        &[0, i64::MAX, 2],
        &twos(64),
        &twos(MAX_RANK + 1),
        &twos(MAX_RANK),
    ];
    port.run(impossible("E2", &shapes)).await;
    let row = floats(&[1.0, 2.0, 3.0, 4.0]);
    let scale = |shape: &'static [i64], values: &[f32]| {
        raw("scalar", [("x", "FP32", &[1, 4][..], &row[..]), ("scale", "FP32", shape, &floats(values)[..])])
    };
    port.run([
        Call::infer("E2", "a scalar", &scale(&[], &[10.0]), OK),
        Call::infer("E2", "a vector of one for a scalar", &scale(&[1], &[10.0]), OK),
        Call::infer("E2", "two values for a scalar", &scale(&[2], &[10.0, 11.0]), INVALID),
        Call::infer("E2", "one value in two dimensions", &scale(&[1, 1], &[10.0]), INVALID),
        Call::infer("E2", "no value", &scale(&[], &[]), INVALID),
        Call::infer("E2", "a scalar for a row", &raw("sentinel", [("x", "FP32", &[][..], &row[..4])]), INVALID),
    ])
    .await;
}

/// Alone, and beside others that must not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e3_empty_tensors_are_refused_or_answered_empty() {
    let mut port = Port::new().await;
    let empty = |model: &str, shape: &[i64]| raw(model, [("x", "FP32", shape, &[][..])]);
    let either: &[Code] = &[Code::Ok, Code::InvalidArgument];
    let shapes: [&[i64]; 5] = [&[0], &[0, 8], &[3, 0], &[1, 0, 5], &[0, 0]];
    for shape in shapes {
        port.run([Call::infer("E3", format!("{shape:?}"), &empty("sentinel", shape), INVALID)]).await;
        let wide = Call::infer("E3", format!("{shape:?}, any width"), &empty("identity_fp32", shape), either);
        let answer = port.answer(wide).await;
        if answer.status().code() == Code::Ok {
            let response = response(&answer);
            assert_eq!(
                (&response.outputs[0].shape[..], &response.raw_output_contents[..]),
                (shape, &[Bytes::new()][..])
            );
        }
    }
    let mut sent = Vec::new();
    for i in 0..64u8 {
        let good = floats(&[f32::from(i); 8]);
        let (mut one, mut other) = (client(&port.target.server).await, client(&port.target.server).await);
        let hostile = empty("sentinel", shapes[usize::from(i) % shapes.len()]);
        sent.push(tokio::spawn(async move { other.model_infer(hostile).await.map(|_| ()) }));
        sent.push(tokio::spawn(async move {
            let answer = one.model_infer(raw("sentinel", [("x", "FP32", &[1, 8][..], &good[..])])).await?;
            assert_eq!(bits(&answer.into_inner()), [(2.0 * f32::from(i) + 1.0).to_bits(); 8]);
            Ok(())
        }));
    }
    for (i, outcome) in sent.into_iter().enumerate() {
        let code = outcome.await.unwrap().err().map(|status| status.code());
        assert_eq!(code, i.is_multiple_of(2).then_some(Code::InvalidArgument), "E3 (beside others)");
    }
    port.is_unharmed("E3").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e4_negative_extents_are_refused() {
    let mut port = Port::new().await;
    port.run(impossible("E4", &[&[-1], &[1, -8], &[-1, -8], &[-1, 8], &[i64::MIN, 8], &[0, -1]])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e5_batches_have_from_one_to_the_most_rows() {
    let mut port = Port::new().await;
    let rows = |rows: usize| sentinel(&[i64::try_from(rows).unwrap(), 8], rows);
    let images = |count: usize| {
        let shape = [i64::try_from(count).unwrap(), 3, 4, 4];
        raw("fixed_batch", [("image", "FP32", &shape[..], &vec![0; count * 48 * 4][..])])
    };
    port.run([
        Call::infer("E5", "no rows", &rows(0), INVALID),
        Call::infer("E5", "one row", &rows(1), OK),
        Call::infer("E5", "as many rows as allowed", &rows(MAX_ROWS), OK),
        Call::infer("E5", "a row more", &rows(MAX_ROWS + 1), INVALID),
        Call::infer("E5", "2^31 rows", &sentinel(&[1 << 31, 8], 1), INVALID),
        Call::infer("E5", "none of a fixed batch", &images(0), INVALID),
        Call::infer("E5", "a fixed batch", &images(1), OK),
        Call::infer("E5", "two of a fixed batch of one", &images(2), INVALID),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e6_every_model_takes_its_own_datatype_only() {
    let mut port = Port::new().await;
    let mut calls = Vec::new();
    for (model, expected) in identities() {
        for (_, datatype) in IDENTITIES {
            let request = raw(model, [("x", datatype, &[1, 2][..], &vec![0; 2 * width(datatype)][..])]);
            let codes = if datatype == expected { OK } else { INVALID };
            calls.push(Call::infer("E6", format!("{datatype} to {model}"), &request, codes));
        }
    }
    for unknown in ["", "fp32", "FP8", "FLOAT", "STRING", "FP32 ", "TYPE_FP32"] {
        let request = raw("identity_fp32", [("x", unknown, &[1, 2][..], &[0; 8][..])]);
        calls.push(Call::infer("E6", format!("datatype '{unknown}'"), &request, INVALID));
    }
    port.run(calls).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e7_fixed_dimensions_are_the_signatures_own() {
    let mut port = Port::new().await;
    let image = |shape: &[i64]| raw("fixed_batch", [("image", "FP32", shape, &[0; 192][..])]);
    let x = |shape: &[i64], elements: usize| raw("sentinel", [("x", "FP32", shape, &vec![0; elements * 4][..])]);
    port.run([
        Call::infer("E7", "as it should be", &image(&[1, 3, 4, 4]), OK),
        Call::infer("E7", "axes turned round", &image(&[1, 4, 4, 3]), INVALID),
        Call::infer("E7", "axes joined", &image(&[1, 48]), INVALID),
        Call::infer("E7", "a dimension too long", &x(&[1, 9], 9), INVALID),
        Call::infer("E7", "a dimension too short", &x(&[1, 7], 7), INVALID),
        Call::infer("E7", "dimensions turned round", &x(&[8, 1], 8), INVALID),
        Call::infer("E7", "one dimension more", &x(&[1, 1, 8], 8), INVALID),
        Call::infer("E7", "one dimension less", &x(&[8], 8), INVALID),
    ])
    .await;
}

/// A request to `sum_rows` with inputs of these names.
fn named(names: &[&str]) -> ModelInferRequest {
    raw("sum_rows", names.iter().map(|name| (*name, "FP32", &[1, 16][..], &[0; 64][..])))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e10_inputs_have_the_signatures_names() {
    let mut port = Port::new().await;
    port.run([Call::infer("E10", "in another order", &named(&["INPUT1", "INPUT0"]), OK)]).await;
    for (what, names) in [
        ("one missing", &["INPUT0"][..]),
        ("one too many", &["INPUT0", "INPUT1", "INPUT2"]),
        ("one twice", &["INPUT0", "INPUT1", "INPUT1"]),
        ("one misspelt", &["INPUT0", "INPUTI"]),
        ("in small letters", &["input0", "input1"]),
        ("with a space", &["INPUT0", "INPUT1 "]),
        ("empty", &["INPUT0", ""]),
        ("none at all", &[]),
    ] {
        let answer = port.answer(Call::infer("E10", what, &named(names), INVALID)).await;
        let status = answer.status();
        assert!(status.message().contains("INPUT1"), "E10 ({what}): what is expected is not said: {status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e11_outputs_are_those_asked_for_or_all() {
    let mut port = Port::new().await;
    let asked = |outputs: &[&str]| {
        let output = |name: &&str| InferRequestedOutputTensor { name: name.to_string(), ..Default::default() };
        ModelInferRequest { outputs: outputs.iter().map(output).collect(), ..named(&["INPUT0", "INPUT1"]) }
    };
    for outputs in [&["OUTPUT2"][..], &[""], &["output0"], &["OUTPUT0", "OUTPUT0"], &["OUTPUT0", "INPUT0"]] {
        port.run([Call::infer("E11", format!("{outputs:?}"), &asked(outputs), INVALID)]).await;
    }
    for (outputs, expected) in [
        (&[][..], &["OUTPUT0", "OUTPUT1"][..]),
        (&["OUTPUT1"], &["OUTPUT1"]),
        (&["OUTPUT1", "OUTPUT0"], &["OUTPUT1", "OUTPUT0"]),
    ] {
        let answer = port.answer(Call::infer("E11", format!("{outputs:?}"), &asked(outputs), OK)).await;
        let response = response(&answer);
        let found: Vec<&str> = response.outputs.iter().map(|output| &*output.name).collect();
        assert_eq!((found, response.raw_output_contents.len()), (expected.to_vec(), expected.len()), "E11");
    }
}

/// No input is optional: metadata lists those that have no value of their own in the file, and all are required.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e12_every_input_of_the_metadata_is_required() {
    let mut port = Port::new().await;
    let mut client = client(&port.target.server).await;
    let about = ModelMetadataRequest { name: "sum_rows".into(), ..Default::default() };
    let inputs = client.model_metadata(about).await.unwrap().into_inner().inputs;
    let names: Vec<&str> = inputs.iter().map(|input| &*input.name).collect();
    port.run([Call::infer("E12", "all of them", &named(&names), OK)]).await;
    for absent in &names {
        let others: Vec<&str> = names.iter().filter(|name| name != &absent).copied().collect();
        port.run([Call::infer("E12", format!("{absent} absent"), &named(&others), INVALID)]).await;
        for (what, shape, typed) in
            [("empty", &[0][..], false), ("rows of nothing", &[1, 0], false), ("no contents", &[1, 16], true)]
        {
            let mut request = named(&names);
            let at = request.inputs.iter().position(|input| input.name == *absent).unwrap();
            request.inputs[at].shape = shape.to_vec();
            request.raw_input_contents[at] = Bytes::new();
            if typed {
                let sixteen = InferTensorContents { fp32_contents: vec![0.0; 16], ..Default::default() };
                request.raw_input_contents.clear();
                request.inputs.iter_mut().for_each(|input| input.contents = Some(sixteen.clone()));
                request.inputs[at].contents = Some(InferTensorContents::default());
            }
            port.run([Call::infer("E12", format!("{absent}: {what}"), &request, INVALID)]).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e13_an_index_out_of_range_fails_alone() {
    let mut port = Port::new().await;
    let ids = |ids: &[i64]| {
        let data: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        raw("gather", [("ids", "INT64", &[i64::try_from(ids.len()).unwrap(), 1][..], &data[..])])
    };
    let answer = port.answer(Call::infer("E13", "the last index", &ids(&[9]), OK)).await;
    let last = bits(&response(&answer));
    port.run([Call::infer("E13", "the first from the end", &ids(&[-10]), OK)]).await;
    // tract reports an index out of range like any failure of its own.
    if without_onnxruntime() {
        return;
    }
    let outside = [10, -11, 1 << 40, -(1 << 40), i64::MAX, i64::MIN];
    for id in outside {
        port.run([
            Call::infer("E13", format!("index {id}"), &ids(&[id]), INVALID),
            Call::infer("E13", format!("index {id} among good ones"), &ids(&[9, id, 9]), INVALID),
        ])
        .await;
    }
    let mut client = client(&port.target.server).await;
    let mut sent = Vec::new();
    for i in 0..128 {
        let mut client = client.clone();
        let request = ids(&[if i % 4 == 0 { outside[i % outside.len()] } else { 9 }]);
        sent.push(tokio::spawn(async move { client.model_infer(request).await }));
    }
    for (i, outcome) in sent.into_iter().enumerate() {
        match outcome.await.unwrap() {
            Ok(answer) => assert_eq!((i % 4 == 0, bits(&answer.into_inner())), (false, last.clone()), "E13 ({i})"),
            Err(status) => assert_eq!((i % 4 == 0, status.code()), (true, Code::InvalidArgument), "E13 ({i})"),
        }
    }
    assert!(client.model_infer(ids(&[9])).await.is_ok());
    port.is_unharmed("E13").await;
}

/// Whether they take longer than others is no test's to decide.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e14_values_beside_the_numbers_are_computed_with() {
    let mut port = Port::new().await;
    let smallest = f32::from_bits(1);
    for (value, expected) in [
        (f32::NAN, f32::NAN),
        (-f32::NAN, f32::NAN),
        // Times the zeros of a matrix.
        (f32::INFINITY, f32::NAN),
        (f32::NEG_INFINITY, f32::NAN),
        (smallest, 1.0),
        (-smallest, 1.0),
        (f32::MAX, f32::INFINITY),
        (-0.0, 1.0),
    ] {
        let row = floats(&[value; 8]);
        let to = |model: &str| raw(model, [("x", "FP32", &[1, 8][..], &row[..])]);
        let answer = port.answer(Call::infer("E14", format!("{value:e}"), &to("sentinel"), OK)).await;
        for found in bits(&response(&answer)).into_iter().map(f32::from_bits) {
            assert!(found == expected || found.is_nan() && expected.is_nan(), "E14 ({value:e}): {found:e}");
        }
        let answer = port.answer(Call::infer("E14", format!("{value:e} as it is"), &to("identity_fp32"), OK)).await;
        assert_eq!(response(&answer).raw_output_contents, [row], "E14 ({value:e}): every bit comes back");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e15_outputs_that_are_no_numbers_keep_their_bits() {
    let mut port = Port::new().await;
    let request = raw("nan_maker", [("x", "FP32", &[1, 4][..], &floats(&[-1.0, 0.0, 1.0, -0.0])[..])]);
    let answer = port.answer(Call::infer("E15", "NaN and infinity", &request, OK)).await;
    let found: Vec<f32> = bits(&response(&answer)).into_iter().map(f32::from_bits).collect();
    assert!(found[0].is_nan(), "E15: {found:?}");
    assert_eq!(found[1..], [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY], "E15");
    let signalling: Vec<u8> = [0x7f80_0001u32, 0xffbf_ffff, 0x7fc0_1234].iter().flat_map(|x| x.to_le_bytes()).collect();
    let request = raw("identity_fp32", [("x", "FP32", &[1, 3][..], &signalling[..])]);
    let answer = port.answer(Call::infer("E15", "what a NaN carries", &request, OK)).await;
    assert_eq!(response(&answer).raw_output_contents, [signalling], "E15");
}

/// What is declared, and how many bytes come with it.
#[derive(Clone, Debug)]
struct Triple {
    model: &'static str,
    datatype: &'static str,
    shape: Vec<i64>,
    size: usize,
}

/// What models take, other than those of [`IDENTITIES`], which take any number of rows and any width.
const FIXED: [(&str, &str); 2] = [("sentinel", "x"), ("fixed_batch", "image")];

impl Triple {
    /// The reference: written down from the protocol, without the server's own types.
    fn is_acceptable(&self) -> bool {
        let datatype =
            IDENTITIES.iter().find(|(model, _)| *model == self.model).map_or("FP32", |(_, datatype)| datatype);
        let fits = match (self.model, &self.shape[..]) {
            ("sentinel", [rows, width]) => (1..=MAX_ROWS as i64).contains(rows) && *width == 8,
            ("fixed_batch", shape) => shape == [1, 3, 4, 4],
            (_, [rows, width]) => *rows >= 1 && *width >= 0,
            _ => false,
        };
        fits && self.datatype == datatype && self.bytes() == Some(self.size as i128)
    }

    /// Of the tensor that is declared; `None` where there can be none. Zeros are as many empty strings as fit.
    fn bytes(&self) -> Option<i128> {
        let width = width(self.datatype) as i128;
        let product = self.shape.iter().try_fold(width, |product, dim| product.checked_mul((*dim).into()));
        product.filter(|_| self.shape.iter().all(|dim| *dim >= 0))
    }

    fn request(&self) -> ModelInferRequest {
        let input = FIXED.iter().find(|(model, _)| *model == self.model).map_or("x", |(_, input)| input);
        raw(self.model, [(input, self.datatype, &self.shape[..], &vec![0; self.size][..])])
    }
}

/// Mostly what is nearly right: a model, a datatype, a shape and the size that they make, each sometimes another one.
fn triples() -> impl Strategy<Value = Triple> {
    let models: Vec<(&str, &str)> = identities().chain([("sentinel", "FP32"), ("fixed_batch", "FP32")]).collect();
    let wild = select(vec![0, 1, 2, 3, 8, 255, 1 << 31, 1 << 32, (1 << 60) + 2, i64::MAX, -1, i64::MIN]);
    let shape = prop_oneof![
        4 => prop::collection::vec(0i64..10, 2),
        2 => (1i64..10).prop_map(|rows| vec![rows, 8]),
        1 => Just(vec![1, 3, 4, 4]),
        2 => prop::collection::vec(0i64..5, 0..6),
        2 => prop::collection::vec(wild, 0..4),
        1 => prop::collection::vec(1i64..2, 0..20),
    ];
    let datatypes = IDENTITIES.map(|(_, datatype)| datatype).to_vec();
    let chance = 0u8..100;
    (select(models), select(datatypes), shape, chance.clone(), chance, 0usize..600).prop_map(
        |((model, own), other, shape, odd_datatype, odd_size, any)| {
            let datatype = if odd_datatype < 15 { other } else { own };
            let mut triple = Triple { model, datatype, shape, size: any };
            let exact = triple.bytes().and_then(|bytes| usize::try_from(bytes).ok()).filter(|bytes| *bytes <= 1 << 16);
            triple.size = match (odd_size, exact) {
                (0..70, Some(exact)) => exact,
                (70..75, Some(exact)) => exact + 1,
                (75..80, Some(exact)) => exact.saturating_sub(1),
                (80..85, Some(exact)) => exact * 2,
                (85..90, _) => 0,
                _ => any,
            };
            triple
        },
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn e16_a_shape_a_datatype_and_a_size_are_accepted_if_they_agree() {
    /// The same ones in every run.
    const TRIPLES: usize = 10_000;
    let mut port = Port::new().await;
    let mut runner = TestRunner::new_with_rng(Default::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let mut http2 = Http2::connect(port.target.server.addresses.grpc).await;
    let (triples, mut accepted) = (triples(), 0);
    for _ in 0..TRIPLES {
        let triple = triples.new_tree(&mut runner).unwrap().current();
        let wire = framed(0, &triple.request().encode_to_vec());
        let status = http2.send("POST", INFER, &GRPC, Frames::of(wire)).await.status();
        let right: &[Code] = match triple.is_acceptable() {
            true => OK,
            // More strings than one request may have.
            false if triple.datatype == "BYTES" => &[Code::InvalidArgument, Code::ResourceExhausted],
            false => INVALID,
        };
        assert!(right.contains(&status.code()), "E16 ({triple:?}): {status}, expected {right:?}");
        accepted += usize::from(status.code() == Code::Ok);
    }
    assert!((TRIPLES / 10..TRIPLES * 9 / 10).contains(&accepted), "E16: {accepted} of {TRIPLES} say little");
    port.is_unharmed("E16").await;
}
