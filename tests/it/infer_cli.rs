//! `tidegate infer` as a person at a shell uses it: a child process against a server, over both protocols.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::cli::{run, stderr, stdout};
use crate::deadlines::busy;
use crate::support::{Models, TestServer, root, without_onnxruntime};

fn digits() -> (Models, TestServer) {
    serving("digits")
}

fn serving(model: &str) -> (Models, TestServer) {
    let models = Models::new().with(model);
    let server = TestServer::of(models.path()).start();
    (models, server)
}

fn servers(server: &TestServer) -> [String; 2] {
    [format!("http://{}", server.addresses.http), format!("grpc://{}", server.addresses.grpc)]
}

fn infer(server: &str, arguments: &[&str]) -> Output {
    run(&[&["infer", "--server", server], arguments].concat(), &[])
}

/// What was printed, of a command that was answered.
fn answered(server: &str, arguments: &[&str]) -> String {
    let output = infer(server, arguments);
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()), "{server} {arguments:?}");
    stdout(&output)
}

/// What was complained of, of a command that ended with `code`.
fn complaint(server: &str, arguments: &[&str], code: i32) -> String {
    let output = infer(server, arguments);
    assert_eq!((output.status.code(), stdout(&output)), (Some(code), String::new()), "{server}: {}", stderr(&output));
    stderr(&output)
}

/// The elements of an answer's only output.
fn data(json: &str) -> Vec<Value> {
    let answer: Value = serde_json::from_str(json).unwrap();
    assert_eq!(answer["outputs"].as_array().unwrap().len(), 1, "{json}");
    answer["outputs"][0]["data"].as_array().unwrap().clone()
}

fn sample() -> String {
    root().join("models/digits/sample.json").to_str().unwrap().to_string()
}

/// The sample's pixels.
fn pixels() -> Vec<f64> {
    let request: Value = serde_json::from_slice(&std::fs::read(sample()).unwrap()).unwrap();
    request["inputs"][0]["data"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// A `.npy` file of format 1 in little-endian FP64, NumPy's default.
fn npy(shape: &str, elements: &[f64]) -> Vec<u8> {
    let header = format!("{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n");
    let length = u16::try_from(header.len()).unwrap().to_le_bytes();
    let data: Vec<u8> = elements.iter().flat_map(|x| x.to_le_bytes()).collect();
    [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), &data].concat()
}

#[test]
fn a_request_file_is_answered_with_a_table() {
    let (_models, server) = digits();
    for address in servers(&server) {
        let text = answered(&address, &["digits", "--request", &sample()]);
        assert!(text.starts_with("probabilities  FP32 [1,10]\n  0  "), "{text}");
        assert!(text.contains("\n  2     0.994293\n"), "{text}");
        let last = text.lines().last().unwrap();
        assert!(last.starts_with("digits version 2 · prediction ") && last.contains("compute"), "{last}");
        assert!(!text.contains('\x1b'), "colour is for terminals: {text}");
    }
}

#[test]
fn every_way_to_write_an_input_gives_the_same_answer() {
    let (models, server) = digits();
    let pixels = pixels();
    let literal = format!("{pixels:?}");
    models.write("request/image.json", &literal);
    models.write("request/image.npy", npy("(64,)", &pixels));
    models.write("request/batch.npy", npy("(1, 64)", &pixels));
    let path = |file: &str| models.path().join("request").join(file).to_str().unwrap().to_string();
    let [json, array, batch] = ["image.json", "image.npy", "batch.npy"].map(path);
    let inputs = [
        literal.clone(),
        format!("image={literal}"),
        format!("image=[{literal}]"),
        format!("@{json}"),
        format!("image=@{array}"),
        format!("@{batch}"),
    ];
    let [rest, grpc] = servers(&server);
    let expected = data(&answered(&rest, &["digits", "--json", "--request", &sample()]));
    assert_eq!(expected[2].to_string(), "0.99429274");
    for (address, input) in [&rest, &grpc].into_iter().flat_map(|address| inputs.iter().map(move |i| (address, i))) {
        assert_eq!(data(&answered(address, &["digits", "--json", "-i", input])), expected, "{address} {input}");
    }
    // And another version answers when it is asked for.
    let other = answered(&grpc, &["digits", "--version", "1", "--id", "a7", "-o", "probabilities", "-i", &inputs[0]]);
    assert!(other.contains("\ndigits version 1 · id a7 · prediction "), "{other}");
}

#[test]
fn standard_input_is_an_input_or_a_whole_request() {
    let (_models, server) = digits();
    let [rest, grpc] = servers(&server);
    let request = std::fs::read(sample()).unwrap();
    for (arguments, given) in [
        (["--server", &rest, "--request", "-"], request),
        (["--server", &grpc, "--input", "@-"], format!("{:?}", pixels()).into_bytes()),
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args(["infer", "digits"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&given).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(stdout(&output).contains("0.994293"), "{arguments:?}: {}", stdout(&output));
    }
}

#[test]
fn without_an_input_the_signature_is_shown_with_a_line_that_works() {
    let (_models, server) = digits();
    for address in servers(&server) {
        let text = answered(&address, &["digits"]);
        for line in ["  input   image          FP32  [-1,64]", "  output  probabilities  FP32  [-1,10]"] {
            assert!(text.lines().any(|found| found == line), "no `{line}` in:\n{text}");
        }
        let line = text.lines().last().unwrap().trim();
        let shell = line.replacen("tidegate", concat!("'", env!("CARGO_BIN_EXE_tidegate"), "'"), 1);
        let output = Command::new("sh").args(["-c", &shell]).output().unwrap();
        assert!(stdout(&output).contains("probabilities  FP32 [1,10]"), "{line}: {}", stderr(&output));
        let json: Value = serde_json::from_str(&answered(&address, &["digits", "--json"])).unwrap();
        assert_eq!((&json["inputs"][0]["datatype"], &json["versions"]), (&"FP32".into(), &["1", "2"][..].into()));
    }
}

#[test]
fn values_that_json_cannot_say_arrive_over_both_protocols() {
    let (_models, server) = serving("identity_fp32");
    for address in servers(&server) {
        let text = answered(&address, &["identity_fp32", "-i", r#"["NaN", "-Infinity", 0.1, 16777217]"#]);
        let values: Vec<&str> =
            text.lines().skip(1).take(4).filter_map(|line| line.split_whitespace().nth(1)).collect();
        assert_eq!(values, ["NaN", "-inf", "0.1", "1.67772e7"], "{text}");
        // JSON's own rule for them, as the server's answers have it.
        let json = answered(&address, &["identity_fp32", "--json", "-i", r#"["NaN", 1, 2, 3]"#]);
        assert_eq!(data(&json)[0], Value::Null, "{json}");
    }
}

#[test]
fn classes_come_ranked_and_labelled() {
    let (_models, server) = serving("tumor");
    let row = format!("{:?}", [1.0; 30]);
    for address in servers(&server) {
        let all = data(&answered(&address, &["tumor", "--json", "-o", "probabilities", "-i", &row]));
        let (best, other) = if all[0].as_f64() > all[1].as_f64() { (0, 1) } else { (1, 0) };
        let labels = std::fs::read_to_string(root().join("models/tumor/labels.txt")).unwrap();
        let labels: Vec<&str> = labels.lines().collect();
        let text = answered(&address, &["tumor", "-o", "probabilities", "--classes", "5", "-i", &row]);
        let found: Vec<Vec<&str>> =
            text.lines().skip(1).take(2).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(text.lines().next(), Some("probabilities  BYTES [1,2]"));
        for (line, class) in found.iter().zip([best, other]) {
            assert_eq!((line[0], line[2]), (&*class.to_string(), labels[class]), "{text}");
        }
    }
}

#[test]
fn refusals_are_the_servers_words_and_exit_1() {
    let (_models, server) = digits();
    let [rest, grpc] = servers(&server);
    for (address, status) in [(&rest, "404 Not Found"), (&grpc, "NOT_FOUND")] {
        let text = complaint(address, &["digit", "-i", "[1]"], 1);
        assert_eq!(
            text,
            format!("tidegate: {address} answered {status}: Request for unknown model: 'digit' is not found\n")
        );
        complaint(address, &["digits", "--version", "9", "-i", "[1]"], 1);
    }
    for (address, status) in [(&rest, "400 Bad Request"), (&grpc, "INVALID_ARGUMENT")] {
        let text = complaint(address, &["digits", "-o", "nothing", "-i", &format!("{:?}", pixels())], 1);
        assert!(text.contains(status) && text.contains("'nothing'") && text.contains("\n  prediction "), "{text}");
    }
}

#[test]
fn the_server_is_told_how_long_to_wait() {
    if without_onnxruntime() {
        return;
    }
    let (_models, server, _holder) = busy();
    for (address, status) in servers(&server).iter().zip(["504 Gateway Timeout", "DEADLINE_EXCEEDED"]) {
        let text = complaint(address, &["slow", "--timeout", "50ms", "-i", "1"], 1);
        assert!(text.starts_with(&format!("tidegate: {address} answered {status}: Request timeout expired")), "{text}");
    }
}

#[test]
fn what_cannot_be_sent_says_why_and_exits_2() {
    let (models, server) = digits();
    models.write("request/three.json", "[1,2,3]");
    models.write("request/cut.npy", &npy("(64,)", &pixels())[..200]);
    models.write("request/misshapen.json", r#"{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[1]}]}"#);
    let at = |file: &str| format!("@{}", models.path().join("request").join(file).to_str().unwrap());
    for address in servers(&server) {
        for (arguments, expected) in [
            (&["-i", "[1,2,3]"][..], "input `image`: its shape is [3], expected [-1,64]"),
            (&["-i", &at("three.json")], "input `image`: its shape is [3], expected [-1,64]"),
            (&["-i", &at("cut.npy")], "input `image`: the .npy file is not whole"),
            (&["-i", "imag=[1]"], "the model has no input `imag`, expected `image`"),
            (&["-i", "[1,\"a\"]"], "input `image`: element 1 is a string, expected FP32"),
            (&["-i", "[1,"], "input `image`: neither JSON nor a .npy file"),
            (&["-i", "@nowhere.npy"], "cannot read nowhere.npy"),
            (&["-o", "probabilities"], "no --input"),
            (&["-i", "@-", "-i", "x=@-"], "standard input is given twice"),
            (&["--request", &at("misshapen.json")[1..]], "input `x`: `data` does not have the shape [2]"),
            (&["--timeout", "5"], "expected a duration like"),
        ] {
            let text = complaint(&address, &[&["digits"], arguments].concat(), 2);
            assert!(text.contains(expected), "{arguments:?}: {text}");
        }
    }
    assert!(complaint("https://localhost", &["digits"], 2).contains("TLS is not spoken"));
}

/// Something at an address that reads a little, says `answer`, and closes; or says nothing for as long as it is asked.
fn listening(answer: Option<&'static [u8]>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]);
        match answer {
            Some(answer) => stream.write_all(answer).unwrap(),
            None => drop(stream.read_to_end(&mut Vec::new())),
        }
    });
    address
}

#[test]
fn no_answer_says_what_to_do_and_exits_3() {
    // Bound and closed again: nothing listens there.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for scheme in ["http", "grpc"] {
        let text = complaint(&format!("{scheme}://{closed}"), &["digits"], 3);
        let start = format!("tidegate: cannot reach {scheme}://{closed}: ");
        assert!(text.starts_with(&start) && text.contains("tidegate serve --registry DIR"), "{text}");

        let silent = format!("{scheme}://{}", listening(None));
        let text = complaint(&silent, &["digits", "--timeout", "1ms"], 3);
        assert_eq!(text, format!("tidegate: no answer from {silent} within 1ms\n"));

        let address = listening(Some(b"220 mail.example ESMTP\r\n"));
        let text = complaint(&format!("{scheme}://{address}"), &["digits"], 3);
        assert!(text.contains(" port: for the "), "{text}");
    }
    let web = listening(Some(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n<html>\x1b\n"));
    let text = complaint(&format!("http://{web}"), &["digits"], 3);
    assert!(text.contains("not as the Open Inference Protocol says") && !text.contains('\x1b'), "{text}");
}

#[test]
fn the_other_protocols_port_is_told_apart() {
    let (_models, server) = digits();
    let text = complaint(&format!("http://{}", server.addresses.grpc), &["digits"], 3);
    assert!(text.contains("for the gRPC port use grpc://"), "{text}");
    let text = complaint(&format!("grpc://{}", server.addresses.http), &["digits"], 3);
    assert!(text.contains("404") && text.contains("for the REST port use http://"), "{text}");
}
