//! The REST port as clients see it: paths and statuses, JSON and binary tensors, encodings, refusals and their texts.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;

use flate2::Compression;
use flate2::read::{GzDecoder, GzEncoder, ZlibDecoder, ZlibEncoder};
use serde_json::{Value, json};

use crate::grpc::{Frames, Http2, in_flight, is_at_rest, refused};
use crate::support::{Models, PATIENCE, Reply, TestServer, exchange, without_onnxruntime};

const ECHO: &str = "/v2/models/identity_fp32/infer";

fn server_of(names: &[&str], settings: &[(&'static str, &str)]) -> (Models, TestServer) {
    let models = names.iter().fold(Models::new(), |models, name| models.with(name));
    let builder = settings.iter().fold(TestServer::of(models.path()), |builder, (key, value)| builder.set(key, value));
    let server = builder.start();
    (models, server)
}

/// `identity_fp32`, which answers its numbers as they are.
fn echo_server(settings: &[(&'static str, &str)]) -> (Models, TestServer) {
    server_of(&["identity_fp32"], settings)
}

fn input(name: &str, datatype: &str, shape: Value, data: Value) -> Value {
    json!({"name": name, "datatype": datatype, "shape": shape, "data": data})
}

fn one_row(data: Value) -> Value {
    json!({"inputs": [input("x", "FP32", json!([1, 2]), data)]})
}

fn le(data: &[f32]) -> Vec<u8> {
    data.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn encoded(encoding: &str, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match encoding {
        "gzip" => GzEncoder::new(data, Compression::fast()).read_to_end(&mut out).unwrap(),
        "deflate" => ZlibEncoder::new(data, Compression::fast()).read_to_end(&mut out).unwrap(),
        _ => data.take(u64::MAX).read_to_end(&mut out).unwrap(),
    };
    out
}

fn decoded(encoding: &str, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match encoding {
        "gzip" => GzDecoder::new(data).read_to_end(&mut out).unwrap(),
        _ => ZlibDecoder::new(data).read_to_end(&mut out).unwrap(),
    };
    out
}

/// A body of JSON and the tensors behind it, with the header that tells them apart.
fn post_binary(server: &TestServer, path: &str, json: &Value, tail: &[u8], headers: &[(&str, &str)]) -> Reply {
    let json = json.to_string();
    let length = json.len().to_string();
    let headers = [&[("Inference-Header-Content-Length", length.as_str())], headers].concat();
    let encoding = headers.iter().find(|(name, _)| *name == "Content-Encoding").map_or("", |(_, value)| value);
    server.post_with(path, &headers, encoded(encoding, &[json.as_bytes(), tail].concat()))
}

/// The JSON and the bytes behind it.
fn split(reply: &Reply) -> (Value, &[u8]) {
    assert_eq!(reply.status, 200, "{}", reply.text());
    let length: usize = reply.header("inference-header-content-length").expect("the JSON's length").parse().unwrap();
    let (json, tail) = reply.body.split_at(length);
    (serde_json::from_slice(json).unwrap(), tail)
}

#[test]
fn health_and_metadata() {
    let (_models, server) = echo_server(&[]);
    for (path, body) in [
        ("/v2/health/live", json!({"live": true})),
        ("/v2/health/ready", json!({"ready": true})),
        ("/v2/health/ready/", json!({"ready": true})),
        ("/v2/models/identity_fp32/ready", json!({"name": "identity_fp32", "ready": true})),
        ("/v2/models/%69dentity_fp32/versions/1/ready", json!({"name": "identity_fp32", "ready": true})),
        ("/v2/models", json!({"models": ["identity_fp32"]})),
    ] {
        let reply = server.get(path);
        assert_eq!((reply.status, reply.json()), (200, body), "{path}");
        assert_eq!(reply.header("content-type"), Some("application/json"));
        let head = exchange(server.addresses.http, "HEAD", path, &[], b"");
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
    }
    for path in ["/v2/models/identity_fp32", "/v2/models/identity_fp32/versions/1/"] {
        let metadata = server.get(path).json();
        assert_eq!((&metadata["name"], &metadata["versions"]), (&json!("identity_fp32"), &json!(["1"])));
        assert_eq!(metadata["inputs"], json!([{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]));
        assert_eq!(metadata["outputs"], json!([{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]));
        assert!(metadata["platform"].as_str().unwrap().ends_with("_onnx"));
        assert!(metadata["properties"]["digest"].as_str().unwrap().starts_with("sha256:"));
    }
    for path in ["/v2", "/v2/"] {
        let about = server.get(path).json();
        assert_eq!((&about["name"], &about["version"]), (&json!("tidegate"), &json!(env!("CARGO_PKG_VERSION"))));
        assert!(about["extensions"].as_array().unwrap().contains(&json!("binary_tensor_data")));
    }
}

#[test]
fn paths_names_and_methods_that_are_not_there() {
    let (_models, server) = echo_server(&[]);
    for path in ["/", "/v1/models", "//v2", "/v2//models", "/v2/models//ready", "/v2/x"] {
        let reply = server.get(path);
        assert_eq!((reply.status, reply.error().as_str()), (404, "Not Found"), "{path}");
    }
    let long = format!("/v2/models/{}", "n".repeat(257));
    let model = "/v2/models/identity_fp32";
    for (status, path) in [
        (404, "/v2/models/%2e%2e%2fv2"),
        (404, "/v2/models/..;"),
        (404, "/v2/models/%252e"),
        (404, "/v2/models/a%00b"),
        (404, "/v2/models/nope/ready"),
        (404, &*format!("{model}/versions/2")),
        (400, &*format!("{model}/versions/x")),
        (400, &*format!("{model}/versions/-1/ready")),
        (400, "/v2/models/%ff"),
        (400, &*long),
    ] {
        let reply = server.get(path);
        assert_eq!(reply.status, status, "{path}: {}", reply.error());
        assert_eq!(reply.header("content-type"), Some("application/json"));
    }
    for (method, path, allowed) in
        [("GET", ECHO, "POST"), ("POST", "/v2", "GET"), ("DELETE", model, "GET"), ("PUT", "/v2/models", "GET")]
    {
        let reply = exchange(server.addresses.http, method, path, &[], b"");
        assert_eq!((reply.status, reply.error().as_str()), (405, "Method Not Allowed"), "{method} {path}");
        assert!(reply.header("allow").unwrap().contains(allowed), "{method} {path}");
    }
}

#[test]
fn the_index_lists_versions_and_reasons() {
    let (_models, server) = server_of(&["identity_fp32", "corrupt"], &[]);
    let index = |body: &str| server.post("/v2/repository/index", body);
    let all = index("").json();
    assert_eq!(all[1], json!({"name": "identity_fp32", "version": "1", "state": "READY", "reason": ""}));
    assert_eq!((&all[0]["name"], &all[0]["state"]), (&json!("corrupt"), &json!("UNAVAILABLE")));
    assert!(!all[0]["reason"].as_str().unwrap().is_empty());
    assert_eq!(index("{}").json(), all);
    assert_eq!(index(r#"{"ready":true}"#).json(), json!([all[1]]));
    for body in ["[]", r#"{"ready":1}"#, "{", "null"] {
        assert_eq!(index(body).status, 400, "{body}");
    }
    assert_eq!(server.get("/v2/models/corrupt/ready").status, 404);
    assert_eq!(server.get("/v2/models").json(), json!({"models": ["identity_fp32"]}));
}

#[test]
fn a_json_answer_is_whole() {
    let (_models, server) = echo_server(&[]);
    let request = r#"{"id":"a\"b","inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,0.1]}]}"#;
    for path in [ECHO, &format!("{ECHO}/"), "/v2/models/identity_fp32/versions/1/infer"] {
        let reply = server.post(path, request);
        assert_eq!(reply.status, 200, "{}", reply.text());
        let header = |name| reply.header(name).unwrap_or_default();
        let id = header("x-prediction-id");
        assert_eq!(
            reply.text(),
            format!(
                "{}{id}{}",
                r#"{"id":"a\"b","model_name":"identity_fp32","model_version":"1","parameters":{"prediction_id":""#,
                r#""},"outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[1.0,0.1]}]}"#
            )
        );
        assert_eq!((header("content-type"), header("vary")), ("application/json", "accept-encoding"));
        assert_eq!((header("x-model-version"), header("content-length")), ("1", reply.body.len().to_string().as_str()));
        let phases = header("server-timing").split(", ").map(|phase| phase.split_once(";dur=").expect("a duration"));
        let phases: Vec<_> = phases.map(|(name, ms)| (name, ms.parse::<f64>().unwrap() >= 0.0)).collect();
        assert_eq!(phases, [("prepare", true), ("queue", true), ("compute", true), ("total", true)]);
        assert!(reply.header("inference-header-content-length").is_none());
    }
    assert!(server.infer("identity_fp32", &one_row(json!([1, 2]))).json().get("id").is_none());
    assert_eq!(server.metrics().sum("tidegate_requests_refused_total", &[]), 0.0);
    server.eventually("every place is free", is_at_rest);
}

#[test]
fn data_may_be_nested_or_flat() {
    let (_models, server) = echo_server(&[]);
    let answer = |data: &str| {
        let head = r#"{"inputs":[{"datatype":"FP32","shape":[2,2],"data":"#;
        server.post(ECHO, format!(r#"{head}{data},"name":"x","unknown":[{{}}]}}],"unknown":null}}"#))
    };
    for data in ["[1,2,3,4]", "[[1,2],[3,4]]", " [ [1 ,2e0]\n,[30e-1,4.0]\t] "] {
        assert_eq!(answer(data).output("y"), [1.0, 2.0, 3.0, 4.0], "{data}");
    }
    for data in ["[1,2,3]", "[1,2,3,4,5]", "[[1,2],[3]]", "[[1,2,3,4]]", "[[[1,2],[3,4]]]", "[1,2,[3,4]]", "4", "{}"] {
        let reply = answer(data);
        assert_eq!(reply.status, 400, "{data}");
        assert!(reply.error().contains("input 'x'"), "{}", reply.error());
    }
    for body in ["", "{", "[]", "null", r#"{"inputs":[],"inputs":[]}"#, r#"{"inputs":3}"#, "{}", "\u{feff}{}"] {
        assert_eq!(server.post(ECHO, body).status, 400, "{body}");
    }
    assert_eq!(server.post(ECHO, format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))).status, 400);
}

#[test]
fn tensors_go_as_json_or_binary_in_any_mix_and_encoding() {
    let (_models, server) = server_of(&["sum_rows"], &[]);
    let tail = le(&[0.5; 16]);
    let request = json!({
        "inputs": [
            {"name": "INPUT1", "shape": [1, 16], "datatype": "FP32", "parameters": {"binary_data_size": tail.len()}},
            input("INPUT0", "FP32", json!([1, 16]), json!(vec![2; 16])),
        ],
        "outputs": [
            {"name": "OUTPUT1", "parameters": {"binary_data": false}},
            {"name": "OUTPUT0"},
        ],
        "parameters": {"binary_data_output": true},
    });
    for encoding in ["identity", "gzip", "deflate"] {
        let headers = [("Content-Encoding", encoding)];
        let reply = post_binary(&server, "/v2/models/sum_rows/infer", &request, &tail, &headers);
        assert_eq!(reply.header("content-type"), Some("application/octet-stream"), "{}", reply.text());
        let (json, sums) = split(&reply);
        assert_eq!(sums, le(&[2.5; 16]));
        let (difference, sum) = (&json["outputs"][0], &json["outputs"][1]);
        assert_eq!(difference["data"], json!(vec![1.5; 16]));
        assert_eq!((&sum["name"], &sum["parameters"]), (&json!("OUTPUT0"), &json!({"binary_data_size": 64})));
        assert!(difference.get("parameters").is_none() && sum.get("data").is_none());
    }
    // Outputs that do not say go as the request says, JSON where it says nothing.
    let mut plain = request.clone();
    plain.as_object_mut().unwrap().remove("parameters");
    let reply = post_binary(&server, "/v2/models/sum_rows/infer", &plain, &tail, &[]);
    assert_eq!(reply.output("OUTPUT0"), [2.5; 16]);
}

#[test]
fn binary_sizes_must_add_up() {
    let (_models, server) = echo_server(&[]);
    let request = |size: Value| {
        let parameters = json!({"binary_data_size": size});
        json!({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": parameters}]})
    };
    for (size, sent, why) in [
        (json!(8), 7, "declares 8 bytes of binary data, but 7 bytes remain"),
        (json!(8), 9, "unexpected additional input data for model 'identity_fp32'"),
        (json!(4), 4, "input 'x'"),
        (json!(u64::MAX), 8, "bytes remain"),
        (json!(-1), 8, "binary_data_size"),
        (json!("8"), 8, "binary_data_size"),
    ] {
        let reply = post_binary(&server, ECHO, &request(size.clone()), &vec![0; sent], &[]);
        assert_eq!(reply.status, 400, "{size}");
        assert!(reply.error().contains(why), "{size}: {}", reply.error());
    }
    let mut both = request(json!(8));
    both["inputs"][0]["data"] = json!([1, 2]);
    assert!(post_binary(&server, ECHO, &both, &[0; 8], &[]).error().contains("both"));
    let neither = json!({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32"}]});
    assert!(server.infer("identity_fp32", &neither).error().contains("neither"));
    for (length, error) in [
        ("9999999", "unexpected size for request JSON, expecting 9999997 more bytes"),
        ("-1", "header `inference-header-content-length` is not a number of bytes"),
        ("+2", "header `inference-header-content-length` is not a number of bytes"),
    ] {
        let reply = server.post_with(ECHO, &[("Inference-Header-Content-Length", length)], "{}");
        assert_eq!((reply.status, reply.error().as_str()), (400, error));
    }
}

#[test]
fn raw_mode_takes_its_shape_from_the_size() {
    let (_models, server) = server_of(&["sentinel", "sum_rows"], &[]);
    let raw = |model: &str, body: &[u8]| {
        server.post_with(&format!("/v2/models/{model}/infer"), &[("Inference-Header-Content-Length", "0")], body)
    };
    let reply = raw("sentinel", &le(&[3.0; 16]));
    let (json, tail) = split(&reply);
    assert_eq!((&json["outputs"][0]["shape"], tail), (&json!([2, 8]), &le(&[7.0; 16])[..]));
    for (model, body) in [("sentinel", &le(&[3.0; 9])[..]), ("sentinel", &[0; 33]), ("sum_rows", &[0; 64])] {
        let reply = raw(model, body);
        assert_eq!(reply.status, 400, "{model}");
        assert!(reply.error().starts_with("a raw request"), "{}", reply.error());
    }
    assert_eq!(raw("nope", b"").status, 404);
}

#[test]
fn answers_are_compressed_where_asked() {
    let (_models, server) = echo_server(&[]);
    let body = json!({"inputs": [input("x", "FP32", json!([1, 1000]), json!(vec![0; 1000]))]}).to_string();
    for (accepted, encoding) in [("gzip", "gzip"), ("deflate", "deflate"), ("br, gzip;q=0.5, deflate;q=0.1", "gzip")] {
        let reply = server.post_with(ECHO, &[("Accept-Encoding", accepted)], &body);
        assert_eq!((reply.status, reply.header("content-encoding")), (200, Some(encoding)), "{accepted}");
        assert!(reply.body.len() < 500, "{} bytes", reply.body.len());
        let plain: Value = serde_json::from_slice(&decoded(encoding, &reply.body)).unwrap();
        assert_eq!(plain["outputs"][0]["data"], json!(vec![0.0; 1000]));
    }
    for accepted in ["identity", "br", "gzip;q=0", ""] {
        let reply = server.post_with(ECHO, &[("Accept-Encoding", accepted)], &body);
        assert_eq!((reply.status, reply.header("content-encoding")), (200, None), "{accepted}");
    }
    let short = server.post_with(ECHO, &[("Accept-Encoding", "gzip")], one_row(json!([1, 2])).to_string());
    assert_eq!((short.status, short.header("content-encoding")), (200, None));
}

#[test]
fn refusals_have_their_status_are_counted_once_and_hold_nothing() {
    let (_models, server) = echo_server(&[("limits.body", "1000B")]);
    let ok = one_row(json!([1, 2])).to_string();
    let bomb = encoded("gzip", &vec![b' '; 100_000]);
    let cut = &encoded("gzip", ok.as_bytes())[..20];
    type Case<'a> = (u16, &'a str, (&'a str, &'a str), Vec<u8>);
    let cases: [Case; 10] = [
        (400, "invalid_input", ("", ""), b"{".to_vec()),
        (400, "invalid_input", ("", ""), Vec::new()),
        (413, "too_large", ("", ""), vec![b' '; 1001]),
        (415, "unsupported_media", ("Content-Encoding", "br"), ok.clone().into()),
        (415, "unsupported_media", ("Content-Encoding", "gzip, gzip"), ok.clone().into()),
        (400, "invalid_input", ("Content-Encoding", "gzip"), ok.clone().into()),
        (400, "invalid_input", ("Content-Encoding", "gzip"), cut.to_vec()),
        (413, "too_large", ("Content-Encoding", "gzip"), bomb),
        (400, "invalid_input", ("X-Request-Timeout", "1s"), ok.clone().into()),
        (400, "invalid_input", ("X-Routing-Key", &"k".repeat(257)), ok.clone().into()),
    ];
    let all = || server.metrics().sum("tidegate_requests_refused_total", &["protocol=\"http\""]);
    for (i, (status, kind, header, body)) in cases.into_iter().enumerate() {
        let before = refused(&server, "http", kind);
        let headers = if header.0.is_empty() { vec![] } else { vec![header] };
        let reply = server.post_with(ECHO, &headers, body);
        assert_eq!(reply.status, status, "case {i}: {}", reply.text());
        assert!(!reply.error().is_empty());
        assert_eq!((refused(&server, "http", kind) - before, all()), (1.0, i as f64 + 1.0), "case {i}");
        assert_eq!(reply.header("accept-encoding"), (status == 415).then_some("gzip, deflate"));
    }
    let before = all();
    assert_eq!(server.post("/v2/models/nope/infer", &ok).status, 404);
    assert_eq!((all() - before, refused(&server, "http", "not_found")), (1.0, 1.0), "once, by the engine");
    server.eventually("every place is free", is_at_rest);
    assert_eq!(server.post(ECHO, &ok).status, 200);
}

#[test]
fn refusals_say_which_prediction_they_were_and_who_answered() {
    let (_models, server) = echo_server(&[("limits.requests", "1")]);
    let about = server.get("/v2/models/identity_fp32").json();
    let digest = about["properties"]["digest"].as_str().unwrap();
    let good = one_row(json!([1, 2]));
    let wrong = json!({"inputs": [input("x", "INT32", json!([1, 2]), json!([1, 2]))]});
    let late = json!({"inputs": good["inputs"], "parameters": {"timeout": 1}});
    let mut ids = BTreeSet::new();
    let mut check = |reply: Reply, status: u16, chosen: bool| {
        assert_eq!(reply.status, status, "{}", reply.text());
        assert!(ids.insert(reply.header("x-prediction-id").expect("an id").to_string()), "an id of its own");
        assert_eq!(reply.header("x-model-version"), chosen.then_some("1"), "{}", reply.text());
        assert_eq!(reply.header("x-model-digest"), chosen.then_some(digest), "{}", reply.text());
    };
    check(server.infer("identity_fp32", &good), 200, true);
    check(server.infer("identity_fp32", &wrong), 400, true);
    check(server.infer("identity_fp32", &late), 504, true);
    check(server.infer("nope", &good), 404, false);
    check(server.infer("identity_fp32/versions/x", &good), 400, false);
    check(server.post(ECHO, "{"), 400, false);
    check(server.post(ECHO, "{"), 400, false);
    check(server.post_with(ECHO, &[("X-Request-Timeout", "1s")], good.to_string()), 400, false);
    check(server.post_with(ECHO, &[("Inference-Header-Content-Length", "0")], "1"), 400, false);
    let mut holder = TcpStream::connect(server.addresses.http).unwrap();
    holder.write_all(format!("POST {ECHO} HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\n").as_bytes()).unwrap();
    server.eventually("the place is taken", |server| in_flight(server) == 1.0);
    check(server.infer("identity_fp32", &good), 503, false);
    // What is no inference is no prediction.
    for reply in [server.get("/v2/models/nope"), server.get(ECHO)] {
        assert_eq!((reply.status >= 400, reply.header("x-prediction-id")), (true, None));
    }
    drop(holder);
    server.eventually("it is counted", |server| refused(server, "http", "cancelled") == 1.0);
}

#[test]
fn bodies_share_a_budget() {
    let (_models, server) = echo_server(&[("limits.body", "900B"), ("limits.request_bytes", "900B")]);
    // What a compressed body holds counts, and so do the tensors read from a body.
    let spaces = encoded("gzip", &[b' '; 900]);
    let reply = server.post_with(ECHO, &[("Content-Encoding", "gzip")], spaces);
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
    let zeros = json!({"inputs": [input("x", "FP32", json!([1, 200]), json!(vec![0; 200]))]});
    assert_eq!(server.infer("identity_fp32", &zeros).status, 503);
    assert_eq!(refused(&server, "http", "overloaded"), 2.0);
    server.eventually("every place is free", is_at_rest);
    assert_eq!(server.infer("identity_fp32", &one_row(json!([1, 2]))).status, 200);
}

/// Sends a head and never its body; the status of the answer that comes anyway.
fn status_of_silence(server: &TestServer, headers: &str) -> u16 {
    let mut stream = TcpStream::connect(server.addresses.http).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(format!("POST {ECHO} HTTP/1.1\r\nHost: t\r\n{headers}\r\n").as_bytes()).unwrap();
    let mut line = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut line).unwrap();
    std::str::from_utf8(&line[9..]).unwrap().parse().unwrap()
}

#[test]
fn a_body_that_does_not_come_is_not_waited_for() {
    let (_models, server) = echo_server(&[("timeouts.body", "50ms"), ("limits.body", "1000B")]);
    for (status, headers) in [
        (408, "Content-Length: 9\r\n"),
        (408, "Transfer-Encoding: chunked\r\n"),
        (413, "Content-Length: 1001\r\n"),
        (415, "Content-Length: 9\r\nContent-Encoding: br\r\n"),
        (400, "Content-Length: 9\r\nInference-Header-Content-Length: x\r\n"),
        (400, "Content-Length: 9\r\nX-Request-Timeout: x\r\n"),
    ] {
        assert_eq!(status_of_silence(&server, headers), status, "{headers}");
    }
    assert_eq!(refused(&server, "http", "request_timeout"), 2.0);
    server.eventually("every place is free", is_at_rest);
}

#[test]
fn the_shorter_of_two_timeouts_holds() {
    let (_models, server) = echo_server(&[]);
    let hour = "3600000";
    let mut request = one_row(json!([1, 2]));
    for (micros, millis, expected) in
        [(json!(1), hour, 504), (json!(1), "0", 504), (json!(0), hour, 200), (json!(0), "0", 200)]
    {
        request["parameters"] = json!({"timeout": micros, "priority": 1});
        let reply = server.post_with(ECHO, &[("X-Request-Timeout", millis)], request.to_string());
        assert_eq!(reply.status, expected, "{micros} {millis}: {}", reply.text());
    }
    if without_onnxruntime() {
        return;
    }
    let (_models, server) = server_of(&["slow"], &[]);
    // About 0.4 s: 4 µs a step.
    let mut request = json!({"inputs": [input("steps", "INT64", json!([]), json!([100_000]))]});
    request["parameters"] = json!({"timeout": 3_600_000_000u64});
    let headers = [("X-Request-Timeout", "50")];
    let reply = server.post_with("/v2/models/slow/infer", &headers, request.to_string());
    assert_eq!((reply.status, reply.error().as_str()), (504, "Request timeout expired"));
}

#[test]
fn numbers_are_exact_or_refused() {
    if without_onnxruntime() {
        return;
    }
    let datatypes = ["int8", "uint8", "int64", "uint64", "fp16", "bf16", "fp32", "fp64", "bool"];
    let names: Vec<String> = datatypes.iter().map(|datatype| format!("identity_{datatype}")).collect();
    let (_models, server) = server_of(&names.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    // Sent as text: `json!` would round before the server could.
    let ask = |datatype: &str, element: &str| {
        let body = format!(
            r#"{{"inputs":[{{"name":"x","shape":[1,1],"datatype":"{}","data":[{element}]}}]}}"#,
            datatype.to_uppercase()
        );
        server.post(&format!("/v2/models/identity_{datatype}/infer"), body)
    };
    for (datatype, element, answer) in [
        ("int8", "-128", "-128"),
        ("int8", "1.27e2", "127"),
        ("uint8", "255.0", "255"),
        ("int64", "-9223372036854775808", "-9223372036854775808"),
        ("int64", "9007199254740993", "9007199254740993"),
        ("uint64", "18446744073709551615", "18446744073709551615"),
        ("fp16", "0.1", "0.099975586"),
        ("fp16", "65504", "65504.0"),
        ("bf16", "0.1", "0.100097656"),
        ("fp32", "16777217", "16777216.0"),
        ("fp32", "-0.0", "-0.0"),
        ("fp32", "1e-45", "1e-45"),
        ("fp64", "0.1", "0.1"),
        ("fp64", "1e-400", "0.0"),
        ("bool", "true", "true"),
    ] {
        let reply = ask(datatype, element);
        assert!(reply.text().ends_with(&format!("\"data\":[{answer}]}}]}}")), "{datatype} {element}: {}", reply.text());
    }
    for (datatype, element) in [
        ("int8", "128"),
        ("uint8", "-1"),
        ("uint8", "1.5"),
        ("int64", "9223372036854775808"),
        ("int64", "true"),
        ("int64", "\"1\""),
        ("uint64", "18446744073709551616"),
        ("fp16", "65520"),
        ("fp32", "1e39"),
        ("fp32", "null"),
        ("fp64", "1e309"),
        ("bool", "1"),
    ] {
        let reply = ask(datatype, element);
        assert_eq!(reply.status, 400, "{datatype} {element}");
        assert!(reply.error().starts_with("element 0 of input 'x' is "), "{}", reply.error());
    }
    for element in ["NaN", "Infinity", "-Infinity", "+1", "01", "0x1", ".5"] {
        assert_eq!(ask("fp32", element).status, 400, "{element}");
    }
}

#[test]
fn what_json_cannot_say_is_null_and_exact_in_binary() {
    let (_models, server) = echo_server(&[]);
    let data = le(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0]);
    let mut request = json!({
        "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}]
    });
    let text = post_binary(&server, ECHO, &request, &data, &[]).text();
    assert!(text.ends_with(r#""data":[null,null,null,-0.0]}]}"#), "{text}");
    request["parameters"] = json!({"binary_data_output": true});
    assert_eq!(split(&post_binary(&server, ECHO, &request, &data, &[])).1, data);
}

#[test]
fn strings_that_json_cannot_carry_go_as_binary_only() {
    if without_onnxruntime() {
        return;
    }
    let (_models, server) = server_of(&["identity_bytes"], &[]);
    let path = "/v2/models/identity_bytes/infer";
    let json = |data: Value| json!({"inputs": [input("x", "BYTES", json!([1, 3]), data)]});
    let texts = json!(["", "a\"\\\n\u{0}", "ü😀"]);
    let answer = server.infer("identity_bytes", &json(texts.clone()));
    assert_eq!(answer.json()["outputs"][0]["data"], texts, "{}", answer.text());
    for data in [json!(["a", "b", 1]), json!(["a", "b", null]), json!(["a", "b"])] {
        assert_eq!(server.infer("identity_bytes", &json(data)).status, 400);
    }
    let half = r#"{"inputs":[{"name":"x","shape":[1,1],"datatype":"BYTES","data":["\ud800"]}]}"#;
    assert_eq!(server.post(path, half).status, 400);

    let tail = [&[1, 0, 0, 0, 0xff][..], &[0; 4], &[2, 0, 0, 0, 0xc3, 0x28]].concat();
    let mut request = json!({"inputs": [{
        "name": "x", "shape": [1, 3], "datatype": "BYTES", "parameters": {"binary_data_size": tail.len()},
    }]});
    let reply = post_binary(&server, path, &request, &tail, &[]);
    assert_eq!(reply.status, 400);
    assert!(reply.error().contains("element 0 of output 'y' is not UTF-8"), "{}", reply.error());
    assert_eq!(reply.header("x-model-version"), Some("1"));
    let ended = |outcome: &str| server.metrics().sum("tidegate_requests_total", &[&format!("outcome=\"{outcome}\"")]);
    assert_eq!((ended("ok"), ended("invalid_input")), (1.0, 1.0), "what cannot be written is no success");
    request["parameters"] = json!({"binary_data_output": true});
    assert_eq!(split(&post_binary(&server, path, &request, &tail, &[])).1, tail);
    server.eventually("every place is free", is_at_rest);
}

#[test]
fn well_known_errors_have_their_texts() {
    let (models, server) = server_of(&["sum_rows", "corrupt"], &[]);
    models.write("limited/model.toml", "[batching]\nmax_batch_size = 2\n");
    models.write("limited/1/model.onnx", std::fs::read(models.path().join("sum_rows/1/model.onnx")).unwrap());
    server.eventually("the limited one is ready", |server| server.get("/v2/models/limited/ready").status == 200);
    let rows = |name: &str, rows: usize| input(name, "FP32", json!([rows, 16]), json!(vec![0; rows * 16]));
    let of = |inputs: Value| json!({ "inputs": inputs });
    let good = || json!([rows("INPUT0", 1), rows("INPUT1", 1)]);
    let wanting = |output: &str| json!({"inputs": good(), "outputs": [{"name": output}]});
    let long = input("INPUT1", "FP32", json!([1, 15]), json!(vec![0; 15]));
    let whole = input("INPUT1", "INT32", json!([1, 16]), json!(vec![0; 16]));
    for (model, request, status, error) in [
        ("nope", of(good()), 404, "Request for unknown model: 'nope' is not found"),
        ("corrupt", of(good()), 404, "Request for unknown model: 'corrupt' has no available versions"),
        ("sum_rows/versions/9", of(good()), 404, "Request for unknown model: 'sum_rows' version 9 is not found"),
        (
            "sum_rows",
            of(json!([rows("INPUT0", 1), long])),
            400,
            "unexpected shape for input 'INPUT1' for model 'sum_rows'. Expected [-1,16], got [1,15]",
        ),
        (
            "sum_rows",
            of(json!([rows("INPUT0", 1), whole])),
            400,
            "inference input 'INPUT1' data-type is 'INT32', but model 'sum_rows' expects 'FP32'",
        ),
        (
            "sum_rows",
            of(json!([rows("INPUT0", 1)])),
            400,
            "expected 2 inputs but got 1 inputs for model 'sum_rows'. Got input(s) ['INPUT0'], but missing required \
             input(s) ['INPUT1']. Please provide all required input(s).",
        ),
        ("sum_rows", wanting("z"), 400, "unexpected inference output 'z' for model 'sum_rows'"),
        (
            "limited",
            of(json!([rows("INPUT0", 3), rows("INPUT1", 3)])),
            400,
            "inference request batch-size must be <= 2 for 'limited'",
        ),
    ] {
        let reply = server.infer(model, &request);
        assert_eq!((reply.status, reply.error().as_str()), (status, error));
    }
    for (parameters, place) in [
        (json!({"sequence_id": 7}), "the request"),
        (json!({"sequence_id": "s", "sequence_start": true}), "the request"),
    ] {
        let reply = server.infer("sum_rows", &json!({"inputs": good(), "parameters": parameters}));
        assert_eq!(reply.status, 501);
        assert_eq!(reply.error(), format!("parameter `sequence_id` of {place} is not supported"));
    }
    // What a client may set without meaning it, and what is its own business.
    let harmless =
        json!({"sequence_id": 0, "sequence_start": false, "triton_x": "y", "mine": 1.5, "classification": 3});
    assert_eq!(server.infer("sum_rows", &json!({"inputs": good(), "parameters": harmless})).status, 200);
}

#[test]
fn outputs_come_as_asked() {
    let (_models, server) = server_of(&["sum_rows"], &[]);
    let tensor = |name: &str, x: f32| input(name, "FP32", json!([1, 16]), json!(vec![x; 16]));
    let names = |outputs: Value| {
        let inputs = json!([tensor("INPUT1", 1.0), tensor("INPUT0", 3.0)]);
        let reply = server.infer("sum_rows", &json!({"inputs": inputs, "outputs": outputs}));
        assert_eq!(reply.status, 200, "{}", reply.text());
        let outputs = reply.json()["outputs"].as_array().unwrap().clone();
        for output in &outputs {
            // Inputs are matched by name, not by position.
            let expected = if output["name"] == "OUTPUT0" { 4.0 } else { 2.0 };
            assert_eq!(reply.output(output["name"].as_str().unwrap()), [expected; 16]);
        }
        outputs.iter().map(|output| output["name"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    let named = |name: &str| json!({ "name": name });
    assert_eq!(names(json!([])), ["OUTPUT0", "OUTPUT1"]);
    assert_eq!(names(json!(null)), ["OUTPUT0", "OUTPUT1"]);
    assert_eq!(names(json!([named("OUTPUT1")])), ["OUTPUT1"]);
    assert_eq!(names(json!([named("OUTPUT1"), named("OUTPUT0")])), ["OUTPUT1", "OUTPUT0"]);
}

#[test]
fn a_slow_reader_keeps_its_place_until_it_has_its_answer() {
    /// More than the sockets' buffers take at both ends.
    const ELEMENTS: usize = 12 << 20;
    let (_models, server) = echo_server(&[]);
    let data = vec![0x3f; ELEMENTS * 4];
    let request = json!({
        "inputs": [{
            "name": "x", "shape": [1, ELEMENTS], "datatype": "FP32", "parameters": {"binary_data_size": data.len()},
        }],
        "parameters": {"binary_data_output": true},
    })
    .to_string();
    let mut stream = TcpStream::connect(server.addresses.http).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "POST {ECHO} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nInference-Header-Content-Length: {}\r\nContent-Length: {}\r\n\r\n",
        request.len(),
        request.len() + data.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream.write_all(&data).unwrap();
    let mut start = [0; 12];
    stream.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 200");
    assert_eq!(in_flight(&server), 1.0, "most of the answer is still here");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(rest.ends_with(&data));
    server.eventually("every place is free", is_at_rest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn http2_is_spoken_too() {
    let (_models, server) = echo_server(&[]);
    let mut http2 = Http2::connect(server.addresses.http).await;
    let body = one_row(json!([1, 0.5])).to_string();
    let answer = http2.send("POST", ECHO, &[], Frames::of(body)).await;
    assert_eq!(answer.http, 200);
    let json: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(json["outputs"][0]["data"], json!([1.0, 0.5]));
    assert_eq!(answer.headers["x-prediction-id"], json["parameters"]["prediction_id"].as_str().unwrap());
    let answer = http2.send("GET", "/v2/models/nope", &[], Frames::of("")).await;
    assert_eq!(answer.http, 404);
}
