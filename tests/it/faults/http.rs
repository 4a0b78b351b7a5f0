//! A: what is wrong before a body is understood.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use super::{CLOSE, Case, Target, get, infer, path, post, request, sentinel};
use crate::support::PATIENCE;

/// A request whose body is as long as `headers` say, or not.
fn to_sentinel(headers: &[(&str, &str)], sent: &[u8]) -> Vec<u8> {
    request(&format!("POST {}", path("sentinel")), headers, sent)
}

/// A POST of `sent` after the head, as a chunked body. The connection is kept open: who ends it is part of the row.
fn chunked(sent: &[u8]) -> Vec<u8> {
    to_sentinel(&[("Transfer-Encoding", "chunked")], sent)
}

/// A good request whose body should be framed by `headers`, and a second one that must never be executed.
fn smuggled(headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    [to_sentinel(headers, body.as_bytes()), infer("sentinel", sentinel())].concat()
}

#[test]
fn bodies_are_framed_as_http_says() {
    let target = Target::new();
    let good = sentinel();
    let as_chunk = format!("{:x}\r\n{good}\r\n0\r\n\r\n", good.len());
    let length = good.len().to_string();
    let trailers = format!("1\r\nA\r\n0\r\nX: {}\r\n\r\n", "a".repeat(64 << 10));
    let extension = format!("1;x={}\r\nA\r\n0\r\n\r\n", "a".repeat(64 << 10));
    target.run([
        Case::infer(
            "A1",
            "a million chunks of one byte",
            {
                let ending = [CLOSE, ("Transfer-Encoding", "chunked")];
                to_sentinel(&ending, &[&b"1\r\nA\r\n".repeat(1_000_000)[..], b"0\r\n\r\n"].concat())
            },
            &[400, 413],
        ),
        Case::infer("A2", "a size beyond 64 bits", chunked(b"10000000000000000\r\nA\r\n0\r\n\r\n"), &[400]),
        Case::infer("A2", "a negative size", chunked(b"-1\r\nA\r\n0\r\n\r\n"), &[400]),
        Case::infer("A2", "a size with a prefix", chunked(b"0x10\r\nA\r\n0\r\n\r\n"), &[400]),
        Case::http(
            "A2",
            "a negative size, to the repository",
            request("POST /v2/repository/index", &[("Transfer-Encoding", "chunked")], b"-1\r\nA\r\n0\r\n\r\n"),
            &[400],
        ),
        Case::infer("A3", "an extension of 64 KiB", chunked(extension.as_bytes()), &[400, 431]),
        Case::infer("A3", "trailers of 64 KiB", chunked(trailers.as_bytes()), &[400, 431]),
        // RFC 9112 §6.1: Transfer-Encoding wins, and the connection ends with the answer.
        Case::infer(
            "A4",
            "both lengths",
            smuggled(&[("Content-Length", "3"), ("Transfer-Encoding", "chunked")], &as_chunk),
            &[200, 400],
        ),
        Case::infer(
            "A4",
            "both lengths, turned round",
            smuggled(&[("Transfer-Encoding", "chunked"), ("Content-Length", "3")], &as_chunk),
            &[200, 400],
        ),
        Case::http(
            "A4",
            "two lengths",
            smuggled(&[("Content-Length", &length), ("Content-Length", "3")], &good),
            &[400],
        )
        .bare(),
        Case::http("A4", "a length with a sign", smuggled(&[("Content-Length", &format!("+{length}"))], &good), &[400])
            .bare(),
        Case::http(
            "A4",
            "a list of lengths",
            smuggled(&[("Content-Length", &format!("{length},{length}"))], &good),
            &[400],
        )
        .bare(),
        Case::http(
            "A5",
            "chunked, identity",
            smuggled(&[("Transfer-Encoding", "chunked, identity")], &as_chunk),
            &[400],
        )
        .bare(),
        Case::http("A5", "xchunked", smuggled(&[("Transfer-Encoding", "xchunked")], &as_chunk), &[400]).bare(),
        Case::infer("A6", "10 GiB announced", to_sentinel(&[("Content-Length", "10737418240")], b""), &[413]),
        Case::infer(
            "A8",
            "more than announced",
            to_sentinel(&[("Content-Length", "10")], "{".repeat(1000).as_bytes()),
            &[400],
        )
        .answered(2)
        .bare(),
    ]);
}

#[test]
fn heads_are_bounded_and_well_formed() {
    let target = Target::new();
    let many: Vec<(&str, &str)> = vec![("X", "a"); 101];
    let cookies: Vec<(&str, &str)> = vec![("Cookie", "a=b"); 10_000];
    let long = "a".repeat(20 << 10);
    // What surrounds the field, and what the test's requests say beside it, is a little less than this.
    let (fits, over) = ("a".repeat((16 << 10) - 256), "a".repeat(16 << 10));
    let line = |line: &str| format!("{line}\r\nHost: test\r\nConnection: close\r\n\r\n");
    let hello = [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], &[0; 506]].concat();
    target.run([
        Case::http("A5", "a folded header", "GET /v2 HTTP/1.1\r\nHost: t\r\nX: a\r\n b\r\n\r\n", &[400]).bare(),
        Case::http("A5", "a NUL in a header", "GET /v2 HTTP/1.1\r\nHost: t\r\nX: a\0b\r\n\r\n", &[400]).bare(),
        // RFC 9112 §2.2 lets a bare line feed end a line; without a body nothing can hide behind it.
        Case::http("A5", "bare line feeds", "GET /v2 HTTP/1.1\nHost: t\nConnection: close\n\n", &[200, 400]),
        Case::http("A9", "101 headers", request("GET /v2", &many, b""), &[431]).bare(),
        Case::http(
            "A9",
            "a header of nearly 16 KiB",
            request("GET /v2", &[("X", &fits), ("Connection", "close")], b""),
            &[200],
        ),
        Case::http("A9", "a header of 16 KiB", request("GET /v2", &[("X", &over)], b""), &[431]).bare(),
        Case::http("A9", "a header of 20 KiB", request("GET /v2", &[("X", &long)], b""), &[431]).bare(),
        Case::http("A9", "10 000 cookies", request("GET /v2", &cookies, b""), &[431]).bare(),
        Case::http("A10", "a host of 16 KiB", line(&format!("GET http://{over}/v2 HTTP/1.1")), &[400, 414, 431]).bare(),
        Case::http("A10", "a method of 16 KiB", line(&format!("{over} /v2 HTTP/1.1")), &[400, 405, 431]).bare(),
        Case::http("A10", "a path of 16 KiB", get(&format!("/v2/{over}")), &[414, 431]).bare(),
        Case::http("A10", "a path of 70 000 bytes", get(&format!("/v2/{}", "a".repeat(70_000))), &[414, 431]).bare(),
        Case::http("A13", "HTTP/0.9", "GET /v2\r\n", &[400, 505]).bare(),
        Case::http("A13", "HTTP/1.0 without a host", "GET /v2 HTTP/1.0\r\n\r\n", &[200]),
        Case::http("A13", "HTTP/3.0", line("GET /v2 HTTP/3.0"), &[400, 505]).bare(),
        Case::http("A13", "a TLS hello", hello, &[400]).bare(),
        Case::http(
            "A22",
            "an upgrade to HTTP/2",
            request(
                "GET /v2",
                &[
                    ("Connection", "Upgrade, HTTP2-Settings, close"),
                    ("Upgrade", "h2c"),
                    ("HTTP2-Settings", "AAMAAABkAAQAAP__"),
                ],
                b"",
            ),
            &[200, 426],
        ),
        Case::http(
            "A22",
            "an upgrade to a web socket",
            request(
                "GET /v2",
                &[
                    ("Connection", "Upgrade, close"),
                    ("Upgrade", "websocket"),
                    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
                    ("Sec-WebSocket-Version", "13"),
                ],
                b"",
            ),
            &[200, 426],
        ),
    ]);
}

#[test]
fn a_path_leads_to_its_own_route_or_none() {
    let target = Target::new();
    let mut cases: Vec<Case> = [
        "/v2/models/%00",
        "/v2/models/..",
        "/v2/models/.",
        "/v2/models/%2e%2e",
        "/v2/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v2/models/..%2f..%2fhealth/ready",
        "/v2/models/%252e%252e",
        "/v2/models/%20..",
        "/v2/models/-rf",
        "/v2/models/$(id)",
        "/v2/models/..;/health/live",
        "/v2/..;/v2/health/live",
        "//v2",
        "//v2/health/live",
        "/v2//health/live",
        "/v2/../v2/health/live",
        "/V2/health/live",
        "/v2/models//ready",
        "/v2/models/digits/versions/latest2",
        "/v2/models/digits/versions/0",
        "/v2/models/digits/versions/-1",
        "/v2/models/digits/versions/18446744073709551616",
        "/v2/models/digits/versions/1.0",
        "/metrics",
        "/",
        "/v2/models/%c0%ae%c0%ae",
        "/v2/models/%ff",
        "/v2/models/%zz",
    ]
    .into_iter()
    .map(|path| Case::http("A10", path, get(path), &[400, 404]))
    .collect();
    let name = "a".repeat(300);
    cases.push(Case::http("A10", "a name of 300 bytes", get(&format!("/v2/models/{name}")), &[400]));
    target.run(cases);
}

#[test]
fn methods_are_the_routes_own() {
    let target = Target::new();
    let methods = [
        "BREW /v2",
        "TRACE /v2",
        "OPTIONS *",
        "OPTIONS /v2",
        "CONNECT test:80",
        "DELETE /v2/models/digits",
        "GET /v2/models/digits/infer",
    ];
    for line in methods {
        let sent = request(line, &[("X-Secret", "sesame"), CLOSE], b"");
        let reply = target.answer(Case::http("A12", line, sent, &[404, 405, 501]));
        assert!(!reply.text().contains("sesame"), "A12 ({line}) echoes: {}", reply.text());
    }
}

#[test]
fn encodings_are_known_and_bounded() {
    let target = Target::new();
    let encoded = |encoding: &str, body: &[u8]| post(&path("sentinel"), &[("Content-Encoding", encoding)], body);
    let good = gzip(sentinel().as_bytes());
    let bomb = gzip(&vec![b' '; (64 << 20) + 1]);
    assert!(bomb.len() < 128 << 10, "the bomb is {} bytes", bomb.len());
    let mut corrupt = good.clone();
    let crc = corrupt.len() - 8;
    corrupt[crc] ^= 1;
    target.run([
        Case::infer("A16", "gzip, for comparison", encoded("gzip", &good), &[200]),
        Case::infer("A16", "a bomb", encoded("gzip", &bomb), &[413]),
        Case::infer("A16", "gzip five times", encoded("gzip, gzip, gzip, gzip, gzip", &good), &[415]),
        Case::infer("A16", "cut short", encoded("gzip", &good[..good.len() / 2]), &[400]),
        Case::infer("A16", "a wrong checksum", encoded("gzip", &corrupt), &[400]),
        Case::infer("A16", "no gzip", encoded("gzip", sentinel().as_bytes()), &[400]),
        Case::infer("A16", "gzip called deflate", encoded("deflate", &good), &[400]),
    ]);
    for encoding in ["br", "zstd", "foo", "gzip, br"] {
        let reply = target.answer(Case::infer("A17", encoding, encoded(encoding, &good), &[415]));
        assert_eq!(reply.header("accept-encoding"), Some("gzip, deflate"), "A17 ({encoding})");
    }
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn what_the_body_is_called_does_not_matter_and_what_follows_it_does() {
    let target = Target::new();
    let good = sentinel();
    let typed = |content_type| post(&path("sentinel"), &[("Content-Type", content_type)], &good);
    target.run([
        Case::infer("A19", "no content type", infer("sentinel", &good), &[200]),
        Case::infer("A19", "text", typed("text/plain"), &[200]),
        Case::infer("A19", "a form", typed("application/x-www-form-urlencoded"), &[200]),
        // JSON is UTF-8 (RFC 8259 §8.1): a charset changes nothing.
        Case::infer("A19", "another charset", typed("application/json; charset=utf-16"), &[200]),
        Case::infer("A20", "garbage behind", infer("sentinel", format!("{good}x")), &[400]),
        Case::infer("A20", "a second body behind", infer("sentinel", good.repeat(2)), &[400]),
        Case::infer("A20", "white space behind", infer("sentinel", format!("{good}\n ")), &[200]),
    ]);
}

#[test]
fn a_thousand_requests_at_once_are_answered_in_order() {
    let target = Target::new();
    let mut requests = vec![request("GET /v2/health/live", &[], b""); 999];
    requests.push(get("/v2"));
    let case = Case::http("A15", "1000 requests in one piece", requests.concat(), &[200]).answered(1000);
    let last = target.answer(case);
    assert_eq!(last.json()["name"], "tidegate");
}

#[test]
fn a_client_that_leaves_leaves_nothing_behind() {
    let target = Target::new();
    let cancelled =
        |target: &Target| target.server.metrics().sum("tidegate_requests_refused_total", &["kind=\"cancelled\""]);
    let sent = to_sentinel(&[("Content-Length", "1000")], b"{\"inputs\":");
    let mut stream = TcpStream::connect(target.server.addresses.http).unwrap();
    stream.write_all(&sent).unwrap();
    target
        .server
        .eventually("A7: the request is in flight", |server| server.metrics().sum("tidegate_inflight", &[]) == 1.0);
    drop(stream);
    target.server.eventually("A7: it is cancelled", |_| cancelled(&target) == 1.0);
    target.is_unharmed("A7 (10 of 1000 bytes)");

    // Closing with unread bytes resets the connection while the server writes.
    let pipelined = request("GET /v2/models/digits", &[], b"").repeat(50);
    for _ in 0..200 {
        let mut stream = TcpStream::connect(target.server.addresses.http).unwrap();
        stream.write_all(&pipelined).unwrap();
        stream.read_exact(&mut [0; 1]).unwrap();
    }
    target.is_unharmed("A24 (200 resets)");
}

#[test]
fn a_client_that_stalls_is_cut_off() {
    // Short, as each of these waits for its timeout.
    let target = Target::with(|server| server.set("timeouts.header", "300ms").set("timeouts.body", "300ms"));
    let expecting = |length: &str| to_sentinel(&[("Expect", "100-continue"), ("Content-Length", length)], b"");
    target.run([
        // hyper takes the largest 64-bit size for a size like any other; then nothing more comes.
        Case::infer("A2", "a chunk of 2^64 - 1 bytes", chunked(b"FFFFFFFFFFFFFFFF\r\nA\r\n0\r\n\r\n"), &[400, 408]),
        Case::infer("A14", "silence after 100", expecting("100"), &[100, 408]).answered(2),
        Case::infer("A14", "10 GiB expected", expecting("10737418240"), &[413]),
        Case::infer("A14", "a body that stops", to_sentinel(&[("Content-Length", "1000")], b"{"), &[408]),
    ]);
}

#[test]
fn http2_is_spoken_properly_or_not_at_all() {
    let target = Target::new();
    let sent = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &[0xff; 64]].concat();
    let answer = target.server.raw(&sent).expect("A13 (garbage after HTTP/2's preface): the connection ends");
    assert!(!answer.starts_with(b"HTTP/1"), "A13: {}", String::from_utf8_lossy(&answer));
    let mut stream = TcpStream::connect(target.server.addresses.grpc).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&get("/v2")).unwrap();
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    // Ended or reset: both are an end.
    let _ = stream.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/1"), "A13 (HTTP/1 on gRPC's port): {}", String::from_utf8_lossy(&answer));
    target.is_unharmed("A13 (the wrong HTTP)");
}
