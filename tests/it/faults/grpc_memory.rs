//! What rows of D may cost in memory, measured on a process of its own: while they run, and after many of them. Of the
//! rows that leave something open, D21 and D22, also that it ends once and is gone.

use std::future::poll_fn;
use std::net::SocketAddr;

use bytes::Bytes;
use h2::Reason;
use h2::client::{ResponseFuture, SendRequest};
use http_body_util::BodyExt;
use prost::Message;
use tokio::time::timeout;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;

use super::grpc::gzip;
use crate::grpc::{Frames, GRPC, Http2, INFER, echo, framed};
use crate::soak::Process;
use crate::stream::STREAM;
use crate::support::{Models, PATIENCE, exchange};

const MIB: u64 = 1 << 20;

fn start(settings: &[(&str, &str)]) -> (Models, Process) {
    let models = Models::new().with("identity_fp32");
    let process = Process::start(models.path(), settings);
    (models, process)
}

/// The after-check for a process: live, ready, nothing in flight, and a request is answered bit by bit.
async fn is_unharmed(process: &Process) {
    for path in ["/v2/health/live", "/v2/health/ready"] {
        assert_eq!(exchange(process.http, "GET", path, &[], b"").status, 200, "{path}");
    }
    let mut http2 = Http2::connect(process.grpc).await;
    let answer = http2.send("POST", INFER, &GRPC, Frames::of(framed(0, &echo(1).encode_to_vec()))).await;
    assert_eq!(answer.status().code(), Code::Ok, "{}", answer.status());
    assert!(answer.body.ends_with(&echo(1).raw_input_contents[0]));
    comes_to_rest(process).await;
}

async fn comes_to_rest(process: &Process) {
    let at_rest = async {
        loop {
            let metrics = process.scrape();
            if ["inflight", "inflight_bytes"].iter().all(|it| metrics.sum(&format!("tidegate_{it}"), &[]) == 0.0) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, at_rest).await.expect("nothing is in flight in the end");
}

/// Repeats a round until one of them leaves less than `bound` bytes behind: what is kept for good is kept every time,
/// what is only allocated late is not.
async fn leaves_nothing(process: &Process, bound: u64, mut round: impl AsyncFnMut()) {
    const MOST_ROUNDS: usize = 12;
    let mut sizes = vec![];
    for _ in 0..MOST_ROUNDS {
        round().await;
        comes_to_rest(process).await;
        sizes.push(process.resident());
        if let [.., before, after] = sizes[..]
            && after < before + bound
        {
            return;
        }
    }
    panic!("bytes after each round: {sizes:?}");
}

/// Sends a body to `ModelInfer`, again and again on one connection. It must have this status every time, take no more
/// than `most` bytes while it is there, and leave nothing behind.
async fn costs(
    process: &Process,
    row: &str,
    headers: &[(&str, &str)],
    wire: Bytes,
    repeats: usize,
    code: Code,
    most: u64,
) {
    let mut http2 = Http2::connect(process.grpc).await;
    let headers = [&GRPC[..], headers].concat();
    let mut send = async || {
        let status = http2.send("POST", INFER, &headers, Frames::of(wire.clone())).await.status();
        assert_eq!(status.code(), code, "{row}: {status}");
    };
    // What the first one brings in stays: threads, buffers, parts of the library that nobody needed before.
    send().await;
    let before = process.resident();
    process.forget_peak();
    send().await;
    let grown = process.peak().saturating_sub(before);
    assert!(grown <= most, "{row}: {grown} bytes more while it ran, at most {most} expected");
    leaves_nothing(process, MIB, async || {
        for _ in 0..repeats {
            send().await;
        }
    })
    .await;
    is_unharmed(process).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d10_a_length_that_is_only_said_costs_nothing() {
    let (_models, process) = start(&[]);
    let wire = Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]);
    costs(&process, "D10", &[], wire, 100, Code::ResourceExhausted, MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d11_a_bomb_costs_no_more_than_the_limit() {
    // And the message as it came, of 256 KiB, in the connection's buffers and in one piece.
    const MOST: u64 = (8 + 2) * MIB;
    let (_models, process) = start(&[("TIDEGATE_LIMITS_BODY", "8MiB")]);
    let bomb = framed(1, &gzip(&vec![0; 256 << 20]));
    costs(&process, "D11", &[("grpc-encoding", "gzip")], bomb, 20, Code::ResourceExhausted, MOST).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d13_many_small_entries_cost_no_more_than_three_times_their_message() {
    let (_models, process) = start(&[]);
    // A request whose contents are empty strings: 16 Mi of two bytes each.
    let contents = [8 << 3 | 2, 0].repeat(16 << 20);
    let nested = |field: u8, inner: &[u8]| {
        let length = u32::try_from(inner.len()).unwrap();
        let varint = (0..5).map(|i| (length >> (7 * i)) as u8 & 0x7f | if i < 4 { 0x80 } else { 0 });
        [&[field << 3 | 2][..], &varint.collect::<Vec<u8>>(), inner].concat()
    };
    let wire = framed(0, &nested(5, &nested(5, &contents)));
    let most = 3 * wire.len() as u64;
    costs(&process, "D13", &[], wire, 4, Code::ResourceExhausted, most).await;
}

/// Where a client leaves its stream.
#[derive(Clone, Copy, Debug)]
enum Left {
    /// Accepted, and nothing sent.
    BeforeTheFirst,
    /// A request has been sent and may be on its way through.
    During,
    /// Of two requests, the first has been answered.
    Between,
    /// The only request has been answered and no more will come; the status is yet to be read.
    AfterTheLast,
}

struct Streams(SendRequest<Bytes>, SocketAddr);

impl Streams {
    async fn connect(address: SocketAddr) -> Streams {
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        // The client's own library counts what arrives for streams that it has left, and would end the connection.
        let mut client = h2::client::Builder::new();
        client.max_local_error_reset_streams(None);
        let (requests, connection) = client.data_frame_budget(usize::MAX).handshake(stream).await.unwrap();
        tokio::spawn(connection);
        Streams(requests, address)
    }

    /// Opens a stream, with messages if any, and resets it.
    async fn leave(&mut self, left: Left) {
        let mut head = http::Request::builder().method("POST").uri(format!("http://{}{STREAM}", self.1));
        for (name, value) in GRPC {
            head = head.header(name, value);
        }
        let mut ready = self.0.clone().ready().await.unwrap();
        let (answer, mut body) = ready.send_request(head.body(()).unwrap(), false).unwrap();
        let message = framed(0, &echo(1).encode_to_vec());
        match left {
            Left::BeforeTheFirst => drop(accepted(answer).await),
            Left::During => {
                body.send_data(message, false).unwrap();
                drop(accepted(answer).await);
            }
            Left::Between => {
                body.send_data([&message[..], &message].concat().into(), false).unwrap();
                first_answer(accepted(answer).await).await;
            }
            Left::AfterTheLast => {
                body.send_data(message, true).unwrap();
                first_answer(accepted(answer).await).await;
            }
        }
        body.send_reset(Reason::CANCEL);
    }
}

async fn accepted(answer: ResponseFuture) -> h2::RecvStream {
    let answer = timeout(PATIENCE, answer).await.expect("a head").unwrap();
    assert!(Status::from_header_map(answer.headers()).is_none(), "{:?}", answer.headers());
    answer.into_body()
}

/// Reads one message, whole.
async fn first_answer(mut body: h2::RecvStream) {
    let mut read = Vec::new();
    while read.len() < 5 || read.len() < 5 + u32::from_be_bytes(read[1..5].try_into().unwrap()) as usize {
        let data = timeout(PATIENCE, poll_fn(|cx| body.poll_data(cx))).await.expect("an answer").unwrap().unwrap();
        read.extend(&data);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d21_a_stream_left_anywhere_completes_once_and_leaves_nothing() {
    /// Of each kind: the catalogue's ten thousand are one round, and there are two or more.
    const STREAMS: usize = 2500;
    /// Bytes that a round may leave: 64 for each of its streams.
    const BOUND: u64 = 64 * 4 * STREAMS as u64;
    let (_models, process) = start(&[]);
    let counted = || {
        let metrics = process.scrape();
        metrics.sum("tidegate_requests_total", &[]) + metrics.sum("tidegate_requests_refused_total", &[])
    };
    leaves_nothing(&process, BOUND, async || {
        // Streams of one kind by one connection, which outlives every one of its streams.
        for (left, fewest, most) in
            [(Left::BeforeTheFirst, 0, 0), (Left::During, 0, 1), (Left::Between, 1, 2), (Left::AfterTheLast, 1, 1)]
        {
            let before = counted();
            let mut streams = Streams::connect(process.grpc).await;
            for _ in 0..STREAMS {
                streams.leave(left).await;
            }
            drop(streams);
            comes_to_rest(&process).await;
            let each = (counted() - before) / STREAMS as f64;
            assert!((f64::from(fewest)..=f64::from(most)).contains(&each), "D21 ({left:?}): {each} requests a stream");
        }
    })
    .await;
    is_unharmed(&process).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn d22_ten_thousand_watchers_are_bounded() {
    /// Of the whole server: `health::MAX_WATCHES`.
    const MAX_WATCHES: usize = 1024;
    const CONNECTIONS: usize = 10;
    const WATCHES: usize = 1000;
    /// Of each that is open, on both sides of its task.
    const BYTES: u64 = 32 << 10;
    let (_models, process) = start(&[("TIDEGATE_LIMITS_STREAMS", "1000")]);
    let about = |service: &str| {
        let request = HealthCheckRequest { service: service.into() };
        Frames::of(framed(0, &request.encode_to_vec()))
    };
    const WATCH: &str = "/grpc.health.v1.Health/Watch";
    let mut http2 = Http2::connect(process.grpc).await;
    for path in [WATCH, "/grpc.health.v1.Health/Check"] {
        let status = http2.send("POST", path, &GRPC, about("nobody")).await.status();
        assert_eq!(status.code(), Code::NotFound, "D22: {status}");
    }
    is_unharmed(&process).await;
    let before = process.resident();
    let (mut connections, mut open, mut refused) = (Vec::new(), Vec::new(), 0);
    for _ in 0..CONNECTIONS {
        let mut http2 = Http2::connect(process.grpc).await;
        for _ in 0..WATCHES {
            let answer = timeout(PATIENCE, http2.begin("POST", WATCH, &GRPC, about(""))).await.expect("a head");
            match Status::from_header_map(answer.headers()) {
                None => open.push(answer),
                Some(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "D22: {status}");
                    refused += 1;
                }
            }
        }
        connections.push(http2);
    }
    assert_eq!((open.len(), refused), (MAX_WATCHES, CONNECTIONS * WATCHES - MAX_WATCHES), "D22");
    let grown = process.resident().saturating_sub(before);
    assert!(grown < MAX_WATCHES as u64 * BYTES, "D22: {grown} bytes for {MAX_WATCHES} watches");
    // Those that are open are told, the others' connections still serve.
    let first = timeout(PATIENCE, open.swap_remove(0).into_body().frame()).await.expect("a message").unwrap();
    assert!(first.unwrap().is_data());
    drop((open, connections));
    let mut freed = Http2::connect(process.grpc).await;
    let begun = async {
        while Status::from_header_map(freed.begin("POST", WATCH, &GRPC, about("")).await.headers()).is_some() {}
    };
    timeout(PATIENCE, begun).await.expect("D22: places are free again");
    is_unharmed(&process).await;
}
