//! E: shapes, names and values that a model's signature rules out, or should have.

use serde_json::Value;

use super::{Case, MAX_ROWS, Target, infer, sentinel, x, x_data};
use crate::support::without_onnxruntime;

/// A request to `sum_rows` with inputs of these names.
fn named(names: &[&str]) -> Vec<u8> {
    let values = format!("[{}0]", "0,".repeat(15));
    let inputs: Vec<String> = names
        .iter()
        .map(|name| format!(r#"{{"name":"{name}","shape":[1,16],"datatype":"FP32","data":{values}}}"#))
        .collect();
    infer("sum_rows", format!(r#"{{"inputs":[{}]}}"#, inputs.join(",")))
}

#[test]
fn sizes_are_computed_without_overflow() {
    let target = Target::new();
    let mut cases = Vec::new();
    let wrapping = [
        // Products that wrap to something harmless.
        ("E1", "[16,1152921504606846978]"),
        ("E1", "[4,1152921504606846978]"),
        ("E2", "[4294967296,4294967296]"),
        ("E2", "[18446744073709551615]"),
        ("E2", "[9223372036854775807,2]"),
        ("E2", "[9223372036854775808,2]"),
        ("E2", "[0,9223372036854775807,2]"),
        ("E2", "[9223372036854775807]"),
        ("E2", "[1,2147483648]"),
        ("E4", "[-1]"),
        ("E4", "[1,-8]"),
        ("E4", "[-1,-8]"),
        ("E4", "[-9223372036854775808,8]"),
    ];
    for (row, shape) in wrapping {
        let size = r#","parameters":{"binary_data_size":0}"#;
        cases.push(Case::infer(row, shape, infer("sentinel", x_data("FP32", shape, "[0,1,2,3,4,5,6,7]")), &[400]));
        cases.push(Case::infer(row, format!("{shape} as binary"), infer("sentinel", x("FP32", shape, size)), &[400]));
        cases.push(Case::infer(
            row,
            format!("{shape} of strings"),
            infer("identity_bytes", x("BYTES", shape, size)),
            &[400, 413],
        ));
    }
    for dims in [17, 64] {
        let shape = format!("[{}2]", "2,".repeat(dims - 1));
        cases.push(Case::infer(
            "E2",
            format!("{dims} dimensions"),
            infer("sentinel", x_data("FP32", &shape, "[0]")),
            &[400],
        ));
    }
    target.run(cases);
}

#[test]
fn shapes_are_the_signatures_own() {
    let target = Target::new();
    let zeros = |count: usize| format!("[{}]", vec!["0"; count].join(","));
    let rows = |rows: usize| infer("sentinel", x_data("FP32", &format!("[{rows},8]"), &zeros(rows * 8)));
    let image = |shape: &str, count: usize| {
        let input = x_data("FP32", shape, &zeros(count)).replace("\"x\"", "\"image\"");
        infer("fixed_batch", input)
    };
    let scalar = |shape: &str, data: &str| {
        let scale = format!(r#"{{"name":"scale","shape":{shape},"datatype":"FP32","data":{data}}},"#);
        infer("scalar", x_data("FP32", "[1,4]", "[1,2,3,4]").replacen('[', &format!("[{scale}"), 1))
    };
    let mut cases = vec![
        Case::infer("E2", "a scalar", scalar("[]", "[10]"), &[200]),
        Case::infer("E2", "a vector of one for a scalar", scalar("[1]", "[10]"), &[200]),
        Case::infer("E2", "two values for a scalar", scalar("[2]", "[10,11]"), &[400]),
        Case::infer("E2", "a scalar for a row", infer("sentinel", x_data("FP32", "[]", "[1]")), &[400]),
        Case::infer("E5", "one row", rows(1), &[200]),
        Case::infer("E5", "as many rows as allowed", rows(MAX_ROWS), &[200]),
        Case::infer("E5", "a row more", rows(MAX_ROWS + 1), &[400]),
        Case::infer("E5", "2^31 rows", infer("sentinel", x_data("FP32", "[2147483648,8]", "[0]")), &[400]),
        Case::infer("E5", "a fixed batch", image("[1,3,4,4]", 48), &[200]),
        Case::infer("E5", "two of a fixed batch of one", image("[2,3,4,4]", 96), &[400]),
        Case::infer("E7", "a dimension too long", infer("sentinel", x_data("FP32", "[1,9]", &zeros(9))), &[400]),
        Case::infer("E7", "dimensions turned round", infer("sentinel", x_data("FP32", "[8,1]", &zeros(8))), &[400]),
        Case::infer("E7", "axes turned round", image("[1,4,4,3]", 48), &[400]),
        Case::infer("E7", "one dimension more", infer("sentinel", x_data("FP32", "[1,1,8]", &zeros(8))), &[400]),
        Case::infer("E7", "one dimension less", infer("sentinel", x_data("FP32", "[8]", &zeros(8))), &[400]),
    ];
    for shape in ["[0]", "[0,8]", "[3,0]", "[1,0,5]", "[0,0]"] {
        cases.push(Case::infer("E3", shape, infer("sentinel", x_data("FP32", shape, "[]")), &[400]));
        cases.push(Case::infer(
            "E3",
            format!("{shape} where any width goes"),
            infer("identity_fp32", x_data("FP32", shape, "[]")),
            &[200, 400],
        ));
    }
    target.run(cases);
}

#[test]
fn names_are_the_signatures_own() {
    let target = Target::new();
    for (what, names) in [
        ("one missing", &["INPUT0"][..]),
        ("one too many", &["INPUT0", "INPUT1", "INPUT2"]),
        ("one misspelt", &["INPUT0", "INPUTI"]),
        ("in small letters", &["input0", "input1"]),
        ("with a space", &["INPUT0", "INPUT1 "]),
        ("empty", &["INPUT0", ""]),
    ] {
        let error = target.answer(Case::infer("E10", what, named(names), &[400])).error();
        assert!(error.contains("INPUT1"), "E10 ({what}): the error does not say what is expected: {error}");
    }
    let asked = |outputs: &str| {
        let body = String::from_utf8(named(&["INPUT0", "INPUT1"])).unwrap();
        let json = &body[body.find("\r\n\r\n").unwrap() + 4..];
        infer("sum_rows", json.replacen('{', &format!(r#"{{"outputs":{outputs},"#), 1))
    };
    target.run([
        Case::infer("E10", "in another order", named(&["INPUT1", "INPUT0"]), &[200]),
        Case::infer("E11", "an unknown output", asked(r#"[{"name":"OUTPUT2"}]"#), &[400]),
        Case::infer("E11", "an output without a name", asked("[{}]"), &[400]),
    ]);
    for (outputs, expected) in [
        ("[]", &["OUTPUT0", "OUTPUT1"][..]),
        (r#"[{"name":"OUTPUT1"}]"#, &["OUTPUT1"]),
        (r#"[{"name":"OUTPUT1"},{"name":"OUTPUT0"}]"#, &["OUTPUT1", "OUTPUT0"]),
    ] {
        let json = target.answer(Case::infer("E11", outputs, asked(outputs), &[200])).json();
        let found: Vec<&str> =
            json["outputs"].as_array().unwrap().iter().map(|o| o["name"].as_str().unwrap()).collect();
        assert_eq!(found, expected, "E11 ({outputs})");
    }
}

#[test]
fn values_that_a_model_cannot_take_fail_alone() {
    let target = Target::new();
    let ids = |id: &str| infer("gather", x_data("INT64", "[1,1]", &format!("[{id}]")).replace("\"x\"", "\"ids\""));
    let mut cases = vec![Case::infer("E13", "the last index", ids("9"), &[200])];
    // tract reports an index out of range like any failure of its own.
    if !without_onnxruntime() {
        for id in ["10", "-11", "1099511627776", "9223372036854775807", "-9223372036854775808"] {
            cases.push(Case::infer("E13", format!("index {id}"), ids(id), &[400]));
        }
    }
    let row = |value: &str| format!("[{}]", [value; 8].join(","));
    cases.extend([
        Case::infer("E14", "subnormal numbers", infer("sentinel", x_data("FP32", "[1,8]", &row("1e-45"))), &[200]),
        Case::infer(
            "E14",
            "the largest numbers",
            infer("sentinel", x_data("FP32", "[1,8]", &row("3.4028234e38"))),
            &[200],
        ),
    ]);
    target.run(cases);
}

#[test]
fn answers_are_json_even_where_values_are_not_numbers() {
    let target = Target::new();
    let sent = infer("nan_maker", x_data("FP32", "[1,4]", "[-1,0,1,-0.0]"));
    let reply = target.answer(Case::infer("E15", "NaN and infinity", sent, &[200]));
    let data = &reply.json()["outputs"][0]["data"];
    assert_eq!(*data, serde_json::json!([null, null, 0.0, null]), "E15: {}", reply.text());
    let sent = infer("sentinel", sentinel().replace("[0,1,2,3,4,5,6,7]", "[3e38,3e38,0,0,0,0,0,0]"));
    let reply = target.answer(Case::infer("E15", "an overflow", sent, &[200]));
    assert_eq!(reply.json()["outputs"][0]["data"][0], Value::Null, "E15: {}", reply.text());
}
