//! D1, D2, D4 to D6, D8, D19: frames that no client has a reason to send, written by hand on a connection of their own.
//!
//! Of each row it is seen how the connection ends, and that the server goes on for everybody else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;

use super::Target;
use crate::grpc::INFER;
use crate::support::PATIENCE;

/// Kinds of frames, RFC 9113 §6.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Codes of errors, RFC 9113 §7.
const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const COMPRESSION_ERROR: u32 = 9;
const ENHANCE_YOUR_CALM: u32 = 11;

#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Frame {
    /// Of a frame that ends a stream or the connection.
    fn code(&self) -> Option<u32> {
        let at = match self.kind {
            RST_STREAM => 0,
            GOAWAY => 4,
            _ => return None,
        };
        Some(u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap()))
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header that no table keeps, RFC 7541 §6.2.2: with a name of the static table, or one of its own.
fn literal(name: Result<u8, &str>, value: &[u8]) -> Vec<u8> {
    let text = |text: &[u8]| {
        let mut length = vec![];
        whole(&mut length, 0, 7, text.len());
        [&length[..], text].concat()
    };
    let mut out = vec![];
    match name {
        Ok(index) => whole(&mut out, 0, 4, usize::from(index)),
        Err(name) => out.extend([&[0], &text(name.as_bytes())[..]].concat()),
    }
    out.extend(text(value));
    out
}

/// A whole number behind the upper bits of its first byte, RFC 7541 §5.1.
fn whole(out: &mut Vec<u8>, upper: u8, bits: u32, mut number: usize) {
    let most = (1 << bits) - 1;
    if number < most {
        return out.push(upper | number as u8);
    }
    out.push(upper | most as u8);
    number -= most;
    while number >= 128 {
        out.push((number % 128) as u8 | 128);
        number /= 128;
    }
    out.push(number as u8);
}

/// The headers of a call to `ModelInfer`.
fn call() -> Vec<u8> {
    const METHOD_POST: u8 = 0x83;
    const SCHEME_HTTP: u8 = 0x86;
    [
        &[METHOD_POST, SCHEME_HTTP][..],
        &literal(Ok(4), INFER.as_bytes()),
        &literal(Ok(1), b"test"),
        &literal(Ok(31), b"application/grpc"),
        &literal(Err("te"), b"trailers"),
    ]
    .concat()
}

/// What the server sends on a connection of these frames, up to the first that `decides` or to its end.
fn answers(server: SocketAddr, sent: Vec<Vec<u8>>, decides: impl Fn(&Frame) -> bool) -> Vec<Frame> {
    let stream = TcpStream::connect(server).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut writing = stream.try_clone().unwrap();
    let opening = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, 0, &[]), &sent.concat()].concat();
    thread::scope(|scope| {
        // Fails where the server has heard enough.
        scope.spawn(move || drop(writing.write_all(&opening)));
        let mut frames = vec![];
        while let Some(next) = read(&stream) {
            frames.push(next);
            if decides(frames.last().unwrap()) {
                break;
            }
        }
        stream.shutdown(std::net::Shutdown::Both).ok();
        frames
    })
}

/// `None` at the end of the connection, however it comes.
fn read(mut stream: &TcpStream) -> Option<Frame> {
    let mut head = [0; 9];
    if let Err(error) = stream.read_exact(&mut head) {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "the server neither answers nor ends the connection");
        return None;
    }
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    stream.read_exact(&mut payload).ok()?;
    Some(Frame { kind: head[3], flags: head[4], stream: u32::from_be_bytes(head[5..].try_into().unwrap()), payload })
}

/// The code with which the server ends a connection of these frames.
fn farewell(server: SocketAddr, sent: Vec<Vec<u8>>) -> Option<u32> {
    answers(server, sent, |frame| frame.kind == GOAWAY).iter().find(|frame| frame.kind == GOAWAY)?.code()
}

#[test]
fn floods_end_the_connection() {
    let target = Target::new();
    let call = call();
    let resets = |stream: u32| {
        [frame(HEADERS, END_HEADERS, stream, &call), frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())].concat()
    };
    let continued = [vec![frame(HEADERS, 0, 1, &call)], vec![frame(CONTINUATION, 0, 1, &[]); 10_000]].concat();
    let empty = [vec![frame(HEADERS, END_HEADERS, 1, &call)], vec![frame(DATA, 0, 1, &[]); 10_000]].concat();
    let growing = |by: u32| frame(WINDOW_UPDATE, 0, 0, &by.to_be_bytes());
    // A header of nearly 4 KiB that the table keeps, and 12,000 times the same again.
    let kept = [&[0x40][..], &literal(Err("x"), &[b'a'; 3900])[1..]].concat();
    let bomb = [&call[..], &kept, &[0x80 | 62; 12_000]].concat();
    let mut table = vec![];
    whole(&mut table, 0x20, 5, 1 << 32);
    for (row, sent, codes) in [
        ("D1: rapid reset", (0..10_000).map(|n| resets(2 * n + 1)).collect(), &[ENHANCE_YOUR_CALM][..]),
        ("D2: headers without an end", continued, &[ENHANCE_YOUR_CALM, PROTOCOL_ERROR]),
        ("D4: empty data", empty, &[ENHANCE_YOUR_CALM]),
        ("D5: a window that does not grow", vec![growing(0)], &[PROTOCOL_ERROR]),
        ("D5: a window beyond 31 bits", vec![growing((1 << 31) - 1)], &[FLOW_CONTROL_ERROR]),
        ("D6: one header many times", vec![frame(HEADERS, END_HEADERS, 1, &bomb)], &[ENHANCE_YOUR_CALM]),
        ("D6: a table of 4 GiB", vec![frame(HEADERS, END_HEADERS, 1, &table)], &[COMPRESSION_ERROR, PROTOCOL_ERROR]),
    ] {
        let code = farewell(target.server.addresses.grpc, sent);
        assert!(code.is_some_and(|code| codes.contains(&code)), "{row}: ended with {code:?}, expected {codes:?}");
        target.is_unharmed(row);
    }
}

#[test]
fn questions_without_end_are_answered_one_by_one_or_not_at_all() {
    let target = Target::new();
    const MANY: usize = 10_000;
    let (ping, settings) = (frame(PING, 0, 0, &[7; 8]), frame(SETTINGS, 0, 0, &[]));
    for (row, flood, kind) in [("D5: pings", ping, PING), ("D5: settings", settings, SETTINGS)] {
        let last = frame(PING, 0, 0, b"the last");
        let sent = [vec![flood; MANY], vec![last]].concat();
        let frames = answers(target.server.addresses.grpc, sent, |frame| frame.payload == b"the last");
        let answered = frames.iter().filter(|frame| frame.kind == kind && frame.flags & ACK != 0).count();
        let ended = frames.iter().any(|frame| frame.kind == GOAWAY);
        assert!(ended || answered >= MANY, "{row}: {answered} of {MANY} were answered");
        target.is_unharmed(row);
    }
}

#[test]
fn acknowledgements_of_nothing_are_ignored() {
    let target = Target::new();
    let sent = [vec![frame(PING, ACK, 0, &[0; 8]); 10_000], vec![frame(PING, 0, 0, b"the last")]].concat();
    let frames = answers(target.server.addresses.grpc, sent, |frame| frame.payload == b"the last");
    assert!(frames.iter().all(|frame| frame.kind != GOAWAY || frame.code() == Some(ENHANCE_YOUR_CALM)), "{frames:?}");
    let last = frames.last().expect("an answer");
    assert!(last.kind == GOAWAY || last.payload == b"the last", "{last:?}");
    target.is_unharmed("D5: acknowledgements");
}

#[test]
fn streams_beyond_the_limit_are_refused_and_the_others_live() {
    const STREAMS: u32 = 8;
    let target = Target::with(|server| server.set("limits.streams", STREAMS.to_string()));
    let open = |number: u32| frame(HEADERS, END_HEADERS, 2 * number + 1, &call());
    let sent: Vec<Vec<u8>> = (0..=STREAMS).map(open).chain([frame(PING, 0, 0, b"the last")]).collect();
    let frames = answers(target.server.addresses.grpc, sent, |frame| frame.payload == b"the last");
    let refused: Vec<(u32, Option<u32>)> =
        frames.iter().filter(|frame| frame.kind == RST_STREAM).map(|frame| (frame.stream, frame.code())).collect();
    assert_eq!(refused, [(2 * STREAMS + 1, Some(REFUSED_STREAM))], "D8");
    target.is_unharmed("D8");
}

#[test]
fn metadata_is_bounded() {
    let target = Target::new();
    let block = [&call()[..], &literal(Err("x"), &[b'a'; 32 << 10])].concat();
    let (first, rest) = block.split_at(16 << 10);
    let (second, third) = rest.split_at(16 << 10);
    let sent = vec![
        frame(HEADERS, 0, 1, first),
        frame(CONTINUATION, 0, 1, second),
        frame(CONTINUATION, END_HEADERS, 1, third),
    ];
    let before = target.counted();
    let frames = answers(target.server.addresses.grpc, sent, |frame| {
        frame.kind == GOAWAY || frame.kind == RST_STREAM || frame.flags & END_STREAM != 0 && frame.kind == HEADERS
    });
    let last = frames.last().expect("an answer");
    assert!([GOAWAY, RST_STREAM, HEADERS].contains(&last.kind), "D19: {last:?}");
    assert_eq!(target.counted(), before, "D19: no inference was begun");
    target.is_unharmed("D19");
}
