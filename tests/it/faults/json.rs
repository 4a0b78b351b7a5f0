//! B: JSON bodies.

use super::{Case, Target, identities, infer, path, post, sentinel, series, x, x_data};
use crate::support::without_onnxruntime;

/// `sentinel`'s request with more fields, each with its comma behind it.
fn with(fields: &str) -> String {
    sentinel().replacen('{', &format!("{{{fields}"), 1)
}

fn with_parameters(parameters: &str) -> String {
    with(&format!(r#""parameters":{{{parameters}}},"#))
}

#[test]
fn nesting_is_bounded() {
    let target = Target::new();
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    // The request's own object is the first of 64 levels.
    let unknown = |depth: usize| with(&format!(r#""unknown":{},"#, nested(depth - 1)));
    let mut cases: Vec<Case> = [63, 64]
        .map(|depth| Case::infer("B1", format!("{depth} levels"), infer("sentinel", unknown(depth)), &[200]))
        .into();
    for depth in [65, 100, 128, 250_000, 500_000] {
        let data = x_data("FP32", "[1,8]", &nested(depth));
        let parameters = with_parameters(&format!(r#""a":{}"#, nested(depth)));
        cases.extend([
            Case::infer("B1", format!("{depth} levels"), infer("sentinel", unknown(depth)), &[400]),
            Case::infer("B1", format!("{depth} levels of data"), infer("sentinel", data), &[400]),
            Case::infer("B1", format!("{depth} levels in a parameter"), infer("sentinel", parameters), &[400]),
            Case::http(
                "B1",
                format!("{depth} levels to the index"),
                post("/v2/repository/index", &[], nested(depth)),
                &[400, 413],
            ),
        ]);
    }
    for unit in ["[", "{\"a\":", "\"", "[[],"] {
        let body = unit.repeat((64 << 20) / unit.len());
        cases.push(Case::infer("B2", format!("64 MiB of {unit}"), infer("sentinel", body), &[400]));
    }
    cases.push(Case::infer("B2", "a byte more than 64 MiB", infer("sentinel", "[".repeat((64 << 20) + 1)), &[413]));
    target.run(cases);
}

#[test]
fn a_request_cut_short_anywhere_is_refused() {
    let target = Target::new();
    let good =
        with(r#""id":"é","parameters":{"timeout":1000000,"a":"b"},"outputs":[{"name":"y"}],"unknown":[1,{"a":null}],"#);
    target.run([
        Case::infer("B3", "for comparison", infer("sentinel", &good), &[200]),
        Case::pipelined(
            "B3",
            "every length",
            series("sentinel", (0..good.len()).map(|end| &good.as_bytes()[..end])),
            &[400],
        ),
    ]);
}

#[test]
fn what_is_said_twice_is_refused() {
    let target = Target::new();
    let input = r#"{"name":"x","shape":[1,8],"datatype":"FP32","data":[0,1,2,3,4,5,6,7]}"#;
    let twice = |field: &str| with("").replacen(field, &format!("{field},{field}"), 1);
    let bodies = [
        ("B4", "inputs", format!(r#"{{"inputs":[{input}],"inputs":[{input}]}}"#)),
        ("B4", "ids", with(r#""id":"a","id":"b","#)),
        ("B4", "parameters", with(r#""parameters":{},"parameters":{},"#)),
        ("B4", "one parameter", with_parameters(r#""a":1,"a":2"#)),
        ("B4", "shapes", twice(r#""shape":[1,8]"#)),
        ("B4", "names", twice(r#""name":"x""#)),
        ("B4", "data", twice(r#""data":[0,1,2,3,4,5,6,7]"#)),
        ("B5", "one input", format!(r#"{{"inputs":[{input},{input}]}}"#)),
        ("B5", "one output", with(r#""outputs":[{"name":"y"},{"name":"y"}],"#)),
    ];
    target.run(
        bodies.map(|(row, what, body)| Case::infer(row, format!("{what} twice"), infer("sentinel", body), &[400])),
    );
}

#[test]
fn lists_are_bounded() {
    const MANY: usize = 100_000;
    let target = Target::new();
    let list = |item: &str| vec![item; MANY].join(",");
    let keys: Vec<String> = (0..MANY).map(|i| format!(r#""key{i}":{i}"#)).collect();
    let input = r#"{"name":"x","shape":[1,8],"datatype":"FP32","data":[0,1,2,3,4,5,6,7]}"#;
    target.run([
        Case::infer("B6", "inputs", infer("sentinel", format!(r#"{{"inputs":[{}]}}"#, list(input))), &[400]),
        Case::infer(
            "B6",
            "outputs",
            infer("sentinel", with(&format!(r#""outputs":[{}],"#, list(r#"{"name":"y"}"#)))),
            &[400],
        ),
        Case::infer("B6", "parameters", infer("sentinel", with_parameters(&keys.join(","))), &[400]),
        Case::infer("B6", "dimensions", infer("sentinel", x_data("FP32", &format!("[{}]", list("1")), "[1]")), &[400]),
        Case::infer("B20", "unknown fields", infer("sentinel", with(&format!("{},", keys.join(",")))), &[200]),
        // 2^23 + 1 numbers of two bytes each become 64 MiB and 8 bytes.
        Case::infer(
            "B19",
            "what expands beyond the limit",
            {
                let count = (8 << 20) + 1;
                infer(
                    "identity_int64",
                    x_data("INT64", &format!("[1,{count}]"), &format!("[{}0]", "0,".repeat(count - 1))),
                )
            },
            &[413],
        ),
        // Each of them within the limit.
        Case::infer(
            "B19",
            "what expands beyond the limit together",
            {
                let count = (4 << 20) + 1;
                let input = |name| {
                    let numbers = "0,".repeat(count - 1);
                    format!(r#"{{"name":"{name}","shape":[1,{count}],"datatype":"INT64","data":[{numbers}0]}}"#)
                };
                infer("identity_int64", format!(r#"{{"inputs":[{},{}]}}"#, input("x"), input("y")))
            },
            &[413],
        ),
    ]);
}

#[test]
fn numbers_are_exact_or_refused() {
    let target = Target::new();
    let one =
        |model: &str, datatype: &str, number: &str| infer(model, x_data(datatype, "[1,1]", &format!("[{number}]")));
    let mut cases = Vec::new();
    for literal in
        ["NaN", "Infinity", "-Infinity", "nan", "1e999", "-1E400", "0x1", "01", ".5", "1.", "+1", "1e", "--1", "1_000"]
    {
        cases.push(Case::infer("B7", literal, one("identity_fp32", "FP32", literal), &[400]));
    }
    for (datatype, number) in [
        ("UINT64", "18446744073709551616"),
        ("INT64", "9223372036854775808"),
        ("INT64", "-9223372036854775809"),
        ("UINT8", "300"),
        ("UINT8", "-1"),
        ("UINT32", "-1"),
        ("INT8", "128"),
        ("INT16", "-32769"),
        ("INT32", "1.5"),
        ("INT32", "1e-1"),
        ("INT32", "2147483648"),
        ("UINT16", "65536"),
    ] {
        let model = format!("identity_{}", datatype.to_lowercase());
        cases.push(Case::infer("B9", format!("{number} as {datatype}"), one(&model, datatype, number), &[400]));
    }
    let digits = "7".repeat(1_000_000);
    cases.extend([
        Case::infer("B8", "a million digits before the point", one("identity_fp32", "FP32", &digits), &[400]),
        Case::infer("B8", "a million digits behind it", one("identity_fp32", "FP32", &format!("0.{digits}")), &[200]),
        Case::infer(
            "B8",
            "an exponent of a million digits",
            one("identity_fp32", "FP32", &format!("1e{digits}")),
            &[400],
        ),
        Case::infer("B8", "a million digits as INT64", one("identity_int64", "INT64", &digits), &[400]),
        Case::infer("B10", "out of FP16", one("identity_fp16", "FP16", "70000"), &[400]),
    ]);
    if !without_onnxruntime() {
        cases.push(Case::infer("B10", "out of BF16", one("identity_bf16", "BF16", "1e39"), &[400]));
    }
    target.run(cases);
    for (row, model, datatype, number, expected) in [
        ("B7", "identity_fp32", "FP32", "-0", "-0.0"),
        ("B7", "identity_fp32", "FP32", "1e-999", "0.0"),
        ("B9", "identity_int64", "INT64", "9007199254740993", "9007199254740993"),
        ("B9", "identity_int64", "INT64", "-9223372036854775808", "-9223372036854775808"),
        ("B9", "identity_uint64", "UINT64", "18446744073709551615", "18446744073709551615"),
        ("B9", "identity_int32", "INT32", "2.0", "2"),
        ("B10", "identity_fp16", "FP16", "65504", "65504.0"),
    ] {
        let reply = target.answer(Case::infer(row, number, one(model, datatype, number), &[200]));
        assert!(reply.text().contains(&format!("\"data\":[{expected}]")), "{row} ({number}): {}", reply.text());
    }
}

#[test]
fn booleans_are_true_or_false() {
    let target = Target::new();
    let one = |element: &str| infer("identity_bool", x_data("BOOL", "[1,2]", &format!("[true,{element}]")));
    target.run([
        Case::infer("B11", "a boolean", one("false"), &[200]),
        Case::infer("B11", "a number", one("1"), &[400]),
        Case::infer("B11", "another number", one("2"), &[400]),
        Case::infer("B11", "a string", one("\"true\""), &[400]),
        Case::infer("B11", "nothing", one("null"), &[400]),
    ]);
}

#[test]
fn data_has_the_structure_of_its_shape() {
    let target = Target::new();
    let row = "[0,1,2,3,4,5,6,7]";
    let data = |data: &str| infer("sentinel", x_data("FP32", "[2,8]", data));
    let shape = |shape: &str| infer("sentinel", x_data("FP32", shape, row));
    let flat = format!("[{}0]", "0,".repeat(15));
    let mut cases = vec![
        Case::infer("B12", "nested", data(&format!("[{row},{row}]")), &[200]),
        Case::infer("B12", "flat", data(&flat), &[200]),
        Case::infer("B12", "ragged", data(&format!("[{row},[0,1]]")), &[400]),
        Case::infer("B12", "nested otherwise", data("[[0,1,2,3],[0,1,2,3],[0,1,2,3],[0,1,2,3]]"), &[400]),
        Case::infer("B12", "nested deeper", data(&format!("[[{row}],[{row}]]")), &[400]),
        Case::infer("B12", "one short", data(&flat.replacen("0,", "", 1)), &[400]),
        Case::infer("B12", "no array", data("0"), &[400]),
    ];
    for wrong in [
        "\"1,8\"",
        "[1.0,8.5]",
        "[1,2.0]",
        "[\"1\",8]",
        "[-1,8]",
        "[null,8]",
        "{\"0\":1}",
        "null",
        "8",
        "[true,8]",
        "[[1,8]]",
    ] {
        cases.push(Case::infer("B13", format!("shape {wrong}"), shape(wrong), &[400]));
    }
    target.run(cases);
    for element in ["\"secret\"", "true", "null", "{\"a\":1}"] {
        let sent = infer("sentinel", x_data("FP32", "[1,8]", &format!("[0,1,{element},3,4,5,6,7]")));
        let error = target.answer(Case::infer("B14", element, sent, &[400])).error();
        assert!(error.contains("element 2 of input 'x'") && !error.contains("secret"), "B14 ({element}): {error}");
    }
}

#[test]
fn text_is_utf8() {
    let target = Target::new();
    let good = sentinel();
    let id = |bytes: &[u8]| [b"{\"id\":\"", bytes, b"\",", &good.as_bytes()[1..]].concat();
    let utf16: Vec<u8> = good.encode_utf16().flat_map(u16::to_le_bytes).collect();
    target.run([
        Case::infer("B15", "half a character", infer("sentinel", id(b"\xc3")), &[400]),
        Case::infer("B15", "an overlong character", infer("sentinel", id(b"\xc0\xaf")), &[400]),
        Case::infer("B15", "a surrogate's bytes", infer("sentinel", id(b"\xed\xa0\x80")), &[400]),
        Case::infer("B15", "a lone surrogate", infer("sentinel", id(b"\\ud800")), &[400]),
        Case::infer("B15", "a byte order mark", infer("sentinel", [b"\xef\xbb\xbf", good.as_bytes()].concat()), &[400]),
        Case::infer("B15", "UTF-16", infer("sentinel", utf16), &[400]),
        Case::infer("B16", "257 bytes", infer("sentinel", id(&[b'a'; 257])), &[400]),
        Case::infer("B16", "10 MiB", infer("sentinel", id(&vec![b'a'; 10 << 20])), &[400]),
        Case::infer("B16", "a bare control character", infer("sentinel", id(b"\x01")), &[400]),
        Case::infer("B16", "a number", infer("sentinel", with(r#""id":5,"#)), &[400]),
        Case::infer("B16", "an object", infer("sentinel", with(r#""id":{},"#)), &[400]),
    ]);
    for given in [&"a".repeat(256), "\u{1}\u{7f}\n\"\\", "é🦀\u{202e}", "\0"] {
        let body = with(&format!("\"id\":{},", serde_json::to_string(given).unwrap()));
        let reply = target.answer(Case::infer("B16", format!("{given:?}"), infer("sentinel", body), &[200]));
        assert_eq!(reply.json()["id"], *given, "B16");
    }
    let reply = target.answer(Case::infer("B16", "empty", infer("sentinel", with(r#""id":"","#)), &[200]));
    assert_eq!(reply.json().get("id"), None, "B16 (empty)");
}

#[test]
fn parameters_mean_what_they_say_or_are_refused() {
    let target = Target::new();
    let mut cases: Vec<Case> = [
        (r#""sequence_id":1"#, &[501][..]),
        (r#""sequence_start":true"#, &[501]),
        (r#""priority":"high""#, &[400]),
        (r#""timeout":-1"#, &[400]),
        (r#""timeout":1.5"#, &[400]),
        (r#""binary_data_output":"yes""#, &[400]),
        (r#""a":[1]"#, &[400]),
        (r#""a":{}"#, &[400]),
        (r#""triton_enable_empty_final_response":true"#, &[200]),
        (r#""a":"b""#, &[200]),
    ]
    .into_iter()
    .map(|(parameters, statuses)| {
        Case::infer("B17", parameters, infer("sentinel", with_parameters(parameters)), statuses)
    })
    .collect();
    for (parameters, statuses) in [
        (r#""priority":18446744073709551616"#, &[400][..]),
        (r#""timeout":18446744073709551616"#, &[400]),
        // Far beyond any clock: no deadline.
        (r#""timeout":18446744073709551615"#, &[200]),
    ] {
        cases.push(Case::infer("B18", parameters, infer("sentinel", with_parameters(parameters)), statuses));
    }
    let of_output = |parameters: &str| with(&format!(r#""outputs":[{{"name":"y","parameters":{{{parameters}}}}}],"#));
    cases.extend([
        Case::infer("B17", "binary_data of an output", infer("sentinel", of_output(r#""binary_data":1"#)), &[400]),
        Case::infer(
            "B18",
            "classification of an output",
            infer("sentinel", of_output(r#""classification":9223372036854775808"#)),
            &[400],
        ),
        Case::infer(
            "B17",
            "a timeout header",
            post(&path("sentinel"), &[("X-Request-Timeout", "soon")], sentinel()),
            &[400],
        ),
        Case::infer(
            "B17",
            "a routing key of 300 bytes",
            post(&path("sentinel"), &[("X-Routing-Key", &"k".repeat(300))], sentinel()),
            &[400],
        ),
    ]);
    target.run(cases);
}

#[test]
fn what_is_no_request_is_refused_and_what_is_unknown_ignored() {
    let target = Target::new();
    let mut cases: Vec<Case> = [
        "",
        " ",
        "{}",
        "[]",
        "null",
        "\"\"",
        "0",
        "true",
        "{\"inputs\":{}}",
        "{\"inputs\":[[]]}",
        "{\"inputs\":null}",
        "{\"inputs\":[]}",
    ]
    .map(|body| Case::infer("B21", format!("`{body}`"), infer("sentinel", body), &[400]))
    .into();
    cases.extend([
        Case::infer("B22", "another model's name", infer("sentinel", with(r#""model_name":"digits","#)), &[200]),
        Case::infer("B22", "unknown fields", infer("sentinel", with(r#""unknown":{"a":[1,"b",null]},"#)), &[200]),
        Case::infer(
            "B22",
            "unknown fields of an input",
            infer("sentinel", x("FP32", "[1,8]", r#","data":[0,1,2,3,4,5,6,7],"scale":1"#)),
            &[200],
        ),
        Case::infer("B22", "a model that is not there", infer("nobody", sentinel()), &[404]),
        Case::infer("B22", "a version that is not there", infer("sentinel/versions/7", sentinel()), &[404]),
    ]);
    target.run(cases);
}

/// E6 as JSON: every datatype to every model, on one connection each.
#[test]
fn datatypes_are_never_converted() {
    let target = Target::new();
    for (model, own) in identities() {
        let bodies: Vec<String> = super::IDENTITIES
            .iter()
            .filter(|(_, datatype)| *datatype != own)
            .map(|(_, datatype)| {
                let element = match *datatype {
                    "BOOL" => "true",
                    "BYTES" => "\"1\"",
                    _ => "1",
                };
                x_data(datatype, "[1,1]", &format!("[{element}]"))
            })
            .collect();
        target.run([Case::pipelined("E6", model, series(model, bodies.iter().map(String::as_bytes)), &[400])]);
    }
}
