//! C: the binary tensor extension.

use std::io::Write;

use super::{Case, Target, path, post, sentinel, x};
use crate::support::{Reply, without_onnxruntime};

const HEADER: &str = "Inference-Header-Content-Length";
const AS_BINARY: &str = r#"{"binary_data_output":true}"#;

/// A request of `json` and the bytes after it.
fn binary(model: &str, json: &str, tail: &[u8]) -> Vec<u8> {
    binary_with(model, &[], &json.len().to_string(), &[json.as_bytes(), tail].concat())
}

fn binary_with(model: &str, headers: &[(&str, &str)], length: &str, body: &[u8]) -> Vec<u8> {
    post(&path(model), &[headers, &[(HEADER, length)]].concat(), body)
}

/// The JSON part: the input `x` with `size` bytes, and the outputs wanted as binary.
fn x_binary(datatype: &str, shape: &str, size: impl ToString) -> String {
    let parameters = format!(r#","parameters":{{"binary_data_size":{}}}"#, size.to_string());
    x(datatype, shape, &parameters).replacen('{', &format!(r#"{{"parameters":{AS_BINARY},"#), 1)
}

/// `sentinel`'s row as bytes.
fn row() -> Vec<u8> {
    (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

fn le(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// The bytes behind the JSON of an answer.
fn tail(reply: &Reply) -> &[u8] {
    let length: usize = reply.header(HEADER).expect("the length of the JSON").parse().unwrap();
    &reply.body[length..]
}

fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

#[test]
fn the_length_of_the_json_is_a_number_within_the_body() {
    let target = Target::new();
    let json = x_binary("FP32", "[1,8]", 32);
    let body = [json.as_bytes(), &row()].concat();
    let mut cases: Vec<Case> =
        ["99999999999", "-1", "+5", "0x10", "", "1e3", "99999999999999999999", " 1 2", "1.0", "١"]
            .map(|length| Case::infer("C1", format!("`{length}`"), binary_with("sentinel", &[], length, &body), &[400]))
            .into();
    let length = json.len().to_string();
    let accented = json.replacen('{', "{\"id\":\"é\",", 1);
    let within = accented.find('é').unwrap() + 1;
    cases.extend([
        Case::infer("C1", "for comparison", binary_with("sentinel", &[], &length, &body), &[200]),
        Case::infer("C1", "two headers", binary_with("sentinel", &[(HEADER, &length)], &length, &body), &[400]),
        Case::infer(
            "C2",
            "a byte beyond the body",
            binary_with("sentinel", &[], &(body.len() + 1).to_string(), &body),
            &[400],
        ),
        Case::infer("C2", "the whole body", binary_with("sentinel", &[], &body.len().to_string(), &body), &[400]),
        Case::infer(
            "C2",
            "half a character",
            binary_with("sentinel", &[], &within.to_string(), accented.as_bytes()),
            &[400],
        ),
        Case::infer(
            "C2",
            "a byte too many",
            binary_with("sentinel", &[], &(json.len() + 1).to_string(), &body),
            &[400],
        ),
        Case::infer("C2", "a byte too few", binary_with("sentinel", &[], &(json.len() - 1).to_string(), &body), &[400]),
        Case::infer(
            "C14",
            "a byte more than 1 MiB",
            {
                let long = format!("{json}{}", " ".repeat((1 << 20) + 1 - json.len()));
                binary("sentinel", &long, &row())
            },
            &[413],
        ),
        Case::infer(
            "C14",
            "1 MiB",
            {
                let long = format!("{json}{}", " ".repeat((1 << 20) - json.len()));
                binary("sentinel", &long, &row())
            },
            &[200],
        ),
        Case::infer(
            "C15",
            "a datatype in small letters",
            binary("sentinel", &x_binary("fp32", "[1,8]", 32), &row()),
            &[400],
        ),
    ]);
    target.run(cases);
}

#[test]
fn a_raw_body_needs_a_shape_that_follows() {
    let target = Target::new();
    let raw = |model: &str, body: &[u8]| binary_with(model, &[], "0", body);
    target.run([
        Case::infer("C3", "one free dimension", raw("sentinel", &row()), &[200]),
        Case::infer("C3", "a byte too many", raw("sentinel", &[&row()[..], &[0]].concat()), &[400]),
        Case::infer("C3", "half a row", raw("sentinel", &row()[..16]), &[400]),
        Case::infer("C3", "nothing", raw("sentinel", b""), &[400]),
        Case::infer("C3", "two inputs", raw("sum_rows", &[0; 128]), &[400]),
        Case::infer("C3", "a free width after the batch", raw("identity_fp32", &row()), &[200]),
        Case::infer("C3", "a string with two free dimensions", raw("identity_bytes", b"text"), &[400]),
        Case::infer("C3", "a model that is not there", raw("nobody", &row()), &[404]),
    ]);
}

#[test]
fn sizes_add_up() {
    let target = Target::new();
    let one = |size: &str, bytes: usize| binary("sentinel", &x_binary("FP32", "[1,8]", size), &vec![0; bytes]);
    let two = |first: &str, second: &str, bytes: usize| {
        let input = |name: &str, size: &str| {
            format!(
                r#"{{"name":"{name}","shape":[1,16],"datatype":"FP32","parameters":{{"binary_data_size":{size}}}}}"#
            )
        };
        binary(
            "sum_rows",
            &format!(r#"{{"inputs":[{},{}]}}"#, input("INPUT0", first), input("INPUT1", second)),
            &vec![0; bytes],
        )
    };
    let half = "9223372036854775808";
    let mut cases = vec![
        Case::infer("C4", "for comparison", two("64", "64", 128), &[200]),
        Case::infer("C4", "more than there is", two("64", "64", 127), &[400]),
        Case::infer("C4", "less than there is", two("64", "64", 129), &[400]),
        Case::infer("C4", "an overflowing sum", two(half, half, 128), &[400]),
    ];
    for size in ["-1", "32.0", "32.5", "\"32\"", "null", "[32]", "true", "18446744073709551616"] {
        cases.push(Case::infer("C4", format!("size {size}"), one(size, 32), &[400]));
    }
    for bytes in [31, 33, 64, 0] {
        cases.push(Case::infer("C5", format!("{bytes} bytes for 32"), one(&bytes.to_string(), bytes), &[400]));
    }
    target.run(cases);
}

/// Data in JSON, as binary, both or neither, for each of two inputs.
#[test]
fn an_input_comes_one_way() {
    let target = Target::new();
    let values = format!("[{}0]", "0,".repeat(15));
    let ways = [("json", true, false), ("binary", false, true), ("both", true, true), ("neither", false, false)];
    let mut cases = Vec::new();
    for (first, json0, binary0) in ways {
        for (second, json1, binary1) in ways {
            let input = |name: &str, json: bool, binary: bool| {
                let data = if json { format!(r#","data":{values}"#) } else { String::new() };
                let parameters = if binary { r#","parameters":{"binary_data_size":64}"# } else { "" };
                format!(r#"{{"name":"{name}","shape":[1,16],"datatype":"FP32"{data}{parameters}}}"#)
            };
            let inputs =
                format!(r#"{{"inputs":[{},{}]}}"#, input("INPUT0", json0, binary0), input("INPUT1", json1, binary1));
            let tail = vec![0; 64 * (usize::from(binary0) + usize::from(binary1))];
            let good = json0 != binary0 && json1 != binary1;
            let statuses: &[u16] = if good { &[200] } else { &[400] };
            cases.push(Case::infer(
                "C6",
                format!("{first} and {second}"),
                binary("sum_rows", &inputs, &tail),
                statuses,
            ));
        }
    }
    target.run(cases);
}

#[test]
fn strings_keep_to_their_prefixes() {
    let target = Target::new();
    let strings = |count: usize, bytes: &[u8]| {
        binary("identity_bytes", &x_binary("BYTES", &format!("[1,{count}]"), bytes.len()), bytes)
    };
    let good = [string(b"one"), string(b""), string(b"three")].concat();
    let many = 16 << 20;
    target.run([
        Case::infer("C7", "for comparison", strings(3, &good), &[200]),
        Case::infer("C7", "empty strings", strings(3, &[0; 12]), &[200]),
        Case::infer("C7", "a prefix beyond the end", strings(1, &[5, 0, 0, 0, b'a']), &[400]),
        Case::infer("C7", "the largest prefix", strings(1, &[0xff; 8]), &[400]),
        Case::infer("C7", "half a prefix", strings(1, &[1, 0]), &[400]),
        Case::infer("C7", "one too many", strings(2, &good), &[400]),
        Case::infer("C7", "one too few", strings(4, &good), &[400]),
        Case::infer("C7", "a byte behind", strings(3, &[&good[..], &[0]].concat()), &[400]),
        Case::infer("C8", "16 Mi empty strings", strings(many, &vec![0; many * 4]), &[413]),
    ]);
}

#[test]
fn every_bit_pattern_passes_or_is_refused() {
    let target = Target::new();
    let sent = |model: &str, datatype: &str, bytes: &[u8], size: usize| {
        binary(model, &x_binary(datatype, &format!("[1,{}]", bytes.len() / size), bytes.len()), bytes)
    };
    target.run([
        Case::infer("C9", "booleans", sent("identity_bool", "BOOL", &[0, 1], 1), &[200]),
        Case::infer("C9", "a boolean of 2", sent("identity_bool", "BOOL", &[0, 2], 1), &[400]),
        Case::infer("C9", "a boolean of 255", sent("identity_bool", "BOOL", &[255, 1], 1), &[400]),
    ]);
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    // Quiet and signalling NaN with payloads, subnormals, both zeros and infinities.
    let floats: Vec<u8> =
        [0x7fc0_1234u32, 0x7f80_0001, 0xffa5_5aa5, 1, 0x007f_ffff, 0x8000_0000, 0, 0x7f80_0000, 0xff80_0000]
            .iter()
            .flat_map(|bits| bits.to_le_bytes())
            .collect();
    let mut patterns = vec![("identity_fp16", "FP16", &halves, 2), ("identity_fp32", "FP32", &floats, 4)];
    if !without_onnxruntime() {
        patterns.push(("identity_bf16", "BF16", &halves, 2));
    }
    for (model, datatype, bytes, size) in patterns {
        let reply = target.answer(Case::infer("C10", model, sent(model, datatype, bytes, size), &[200]));
        assert!(tail(&reply) == &bytes[..], "C10 ({model}): other bits came back");
    }
}

#[test]
fn tensors_start_at_any_address() {
    let target = Target::new();
    let expected = le((0..8).map(|i| 2.0 * i as f32 + 1.0));
    for padding in 0..8 {
        let json = format!("{}{}", x_binary("FP32", "[1,8]", 32), " ".repeat(padding));
        let reply =
            target.answer(Case::infer("C11", format!("{padding} more"), binary("sentinel", &json, &row()), &[200]));
        assert_eq!(tail(&reply), expected, "C11 ({padding} more)");
    }
}

#[test]
fn outputs_come_as_asked() {
    let target = Target::new();
    let asked = |outputs: &str| {
        let values = format!("[{}0]", "0,".repeat(15));
        let input = |name: &str| format!(r#"{{"name":"{name}","shape":[1,16],"datatype":"FP32","data":{values}}}"#);
        let json = format!(
            r#"{{"parameters":{AS_BINARY},"outputs":{outputs},"inputs":[{},{}]}}"#,
            input("INPUT0"),
            input("INPUT1")
        );
        post(&path("sum_rows"), &[], json)
    };
    target.run([Case::infer(
        "C12",
        "an unknown output",
        asked(r#"[{"name":"y","parameters":{"binary_data":true}}]"#),
        &[400],
    )]);
    let one = r#"[{"name":"OUTPUT0"},{"name":"OUTPUT1","parameters":{"binary_data":false}}]"#;
    let reply = target.answer(Case::infer("C12", "one of two as binary", asked(one), &[200]));
    // `Reply` has read as many bytes as Content-Length says: JSON and one tensor of 64.
    let length: usize = reply.header(HEADER).unwrap().parse().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&reply.body[..length]).unwrap();
    assert_eq!(json["outputs"][0]["parameters"]["binary_data_size"], 64, "C12");
    assert_eq!((tail(&reply).len(), json["outputs"][1]["data"].as_array().unwrap().len()), (64, 16), "C12");
}

#[test]
fn framing_and_compression_change_nothing() {
    let target = Target::new();
    let json = x_binary("FP32", "[1,8]", 32);
    let length = json.len().to_string();
    let body = [json.as_bytes(), &row()].concat();
    let expected = le((0..8).map(|i| 2.0 * i as f32 + 1.0));
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&body).unwrap();
    let packed = encoder.finish().unwrap();
    let sent = binary_with("sentinel", &[("Content-Encoding", "gzip")], &length, &packed);
    assert_eq!(tail(&target.answer(Case::infer("C13", "gzip", sent, &[200]))), expected, "C13 (gzip)");
    for split in 1..body.len() {
        let (first, second) = body.split_at(split);
        let mut chunks = Vec::new();
        for part in [first, second, b""] {
            chunks.extend(format!("{:x}\r\n", part.len()).as_bytes());
            chunks.extend(part);
            chunks.extend(b"\r\n");
        }
        let headers = [("Transfer-Encoding", "chunked"), (HEADER, length.as_str()), super::CLOSE];
        let sent = super::request(&format!("POST {}", path("sentinel")), &headers, &chunks);
        let reply = target.answer(Case::infer("C13", format!("chunks of {split} and the rest"), sent, &[200]));
        assert_eq!(tail(&reply), expected, "C13 (chunks of {split} and the rest)");
    }
}

#[test]
fn there_is_no_shared_memory() {
    let target = Target::new();
    let mut cases: Vec<Case> = ["systemsharedmemory", "cudasharedmemory"]
        .iter()
        .flat_map(|kind| {
            ["status", "region/a/register", "region/a/unregister"].map(|verb| format!("/v2/{kind}/{verb}"))
        })
        .map(|path| {
            Case::http("C18", path.clone(), post(&path, &[], r#"{"key":"/a","offset":0,"byte_size":64}"#), &[404])
        })
        .collect();
    let region = r#","parameters":{"shared_memory_region":"a","shared_memory_byte_size":32}"#;
    let output = r#""outputs":[{"name":"y","parameters":{"shared_memory_region":"a"}}],"#;
    cases.extend([
        Case::infer(
            "C18",
            "an input in a region",
            post(&path("sentinel"), &[], x("FP32", "[1,8]", region)),
            &[400, 501],
        ),
        Case::infer(
            "C18",
            "an output in a region",
            post(&path("sentinel"), &[], sentinel().replacen('{', &format!("{{{output}"), 1)),
            &[400, 501],
        ),
    ]);
    target.run(cases);
}
