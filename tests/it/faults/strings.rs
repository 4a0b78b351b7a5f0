//! F: strings, in BYTES tensors and elsewhere.

use serde_json::json;

use super::{Case, Target, infer, path, post, sentinel, x, x_data};
use crate::support::without_onnxruntime;

/// A BYTES tensor of these strings, binary both ways.
fn strings(strings: &[&[u8]], back_as_binary: bool) -> Vec<u8> {
    let tail: Vec<u8> = strings.iter().flat_map(|s| [&(s.len() as u32).to_le_bytes()[..], s].concat()).collect();
    let size = format!(r#","parameters":{{"binary_data_size":{}}}"#, tail.len());
    let json = x("BYTES", &format!("[1,{}]", strings.len()), &size).replacen(
        '{',
        &format!(r#"{{"parameters":{{"binary_data_output":{back_as_binary}}},"#),
        1,
    );
    post(
        &path("identity_bytes"),
        &[("Inference-Header-Content-Length", &json.len().to_string())],
        [json.as_bytes(), &tail].concat(),
    )
}

#[test]
fn every_byte_of_a_string_comes_back() {
    let target = Target::new();
    let all: Vec<u8> = (0..=255).collect();
    let mut sent: Vec<&[u8]> = vec![b"", b"a\0b", b"\0", "é🦀".as_bytes()];
    // tract's strings are UTF-8: anything else is refused.
    if without_onnxruntime() {
        target.run([Case::infer("F1", "all bytes", strings(&[&all], true), &[400])]);
    } else {
        sent.push(&all);
    }
    let reply = target.answer(Case::infer("F1", "bytes", strings(&sent, true), &[200]));
    let length: usize = reply.header("inference-header-content-length").unwrap().parse().unwrap();
    let expected: Vec<u8> = sent.iter().flat_map(|s| [&(s.len() as u32).to_le_bytes()[..], s].concat()).collect();
    assert_eq!(reply.body[length..], expected, "F1");
}

#[test]
fn strings_that_are_no_text_are_not_forced_into_json() {
    let target = Target::new();
    let error = target.answer(Case::infer("F2", "not UTF-8", strings(&[b"a", b"\xff"], false), &[400])).error();
    let advice = if without_onnxruntime() { "UTF-8" } else { "request the output with the parameter `binary_data`" };
    assert!(error.contains(advice), "F2: {error}");
}

#[test]
fn json_strings_come_back_as_they_were() {
    let target = Target::new();
    let combining = format!("a{}", "\u{301}".repeat(10_000));
    let joined = "👩\u{200d}".repeat(1000);
    for text in [
        "",
        "\0",
        "a\r\nb\u{1b}[31m",
        "\u{202e}abc",
        "\u{ffff}\u{fffe}",
        "\u{10ffff}",
        combining.as_str(),
        joined.as_str(),
    ] {
        let body = x_data("BYTES", "[1,1]", &json!([text]).to_string());
        let reply = target.answer(Case::infer(
            "F5",
            format!("{:.20}", text.escape_debug()),
            infer("identity_bytes", body),
            &[200],
        ));
        assert_eq!(reply.json()["outputs"][0]["data"][0], text, "F5");
    }
}

#[test]
fn strings_are_bounded() {
    let target = Target::new();
    let long = vec![b'a'; (16 << 20) + 1];
    let text = |bytes: &[u8]| format!("[\"{}\"]", std::str::from_utf8(bytes).unwrap());
    let many = (1 << 20) + 1;
    target.run([
        Case::infer("F3", "16 MiB", strings(&[&long[1..]], true), &[200]),
        Case::infer("F3", "a byte more than 16 MiB", strings(&[&long], true), &[413]),
        Case::infer(
            "F3",
            "a byte more than 16 MiB as JSON",
            infer("identity_bytes", x_data("BYTES", "[1,1]", &text(&long))),
            &[413],
        ),
        Case::infer(
            "F3",
            "a string more than 1 Mi",
            infer(
                "identity_bytes",
                x_data("BYTES", &format!("[1,{many}]"), &format!("[{}\"\"]", "\"\",".repeat(many - 1))),
            ),
            &[413],
        ),
    ]);
}

#[test]
fn control_characters_are_escaped_in_errors() {
    let target = Target::new();
    for (what, encoded) in
        [("a NUL", "a%00b"), ("a line", "a%0D%0Ab"), ("a colour", "%1b%5b31mred"), ("a turned line", "%E2%80%AEabc")]
    {
        let reply = target.answer(Case::infer("F6", what, infer(encoded, sentinel()), &[404]));
        assert!(!reply.error().chars().any(|c| c.is_control() || c == '\u{202e}'), "F6 ({what}): {}", reply.text());
    }
    let name = json!("\u{1b}[31m\r\n\0").to_string();
    let body = sentinel().replace("\"x\"", &name);
    let error = target.answer(Case::infer("F6", "an input's name", infer("sentinel", body), &[400])).error();
    assert!(!error.chars().any(char::is_control), "F6: {error}");
}

#[test]
fn strings_are_no_numbers() {
    let target = Target::new();
    let ones = json!(vec!["1"; 8]).to_string();
    target.run([
        Case::infer("F7", "strings to a numeric model", infer("sentinel", x_data("BYTES", "[1,8]", &ones)), &[400]),
        Case::infer(
            "F7",
            "numbers to a model of strings",
            infer("identity_bytes", x_data("FP32", "[1,1]", "[1]")),
            &[400],
        ),
        Case::infer("F7", "strings called numbers", infer("sentinel", x_data("FP32", "[1,8]", &ones)), &[400]),
        Case::infer("F7", "numbers called strings", infer("identity_bytes", x_data("BYTES", "[1,1]", "[1]")), &[400]),
    ]);
}
