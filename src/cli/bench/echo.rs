//! What the transport alone can do: a bare server that reads requests and answers with bytes that it was given, in a
//! process of its own, as the measured server has one.
//!
//! REST is hyper's HTTP/1.1, gRPC hyper's HTTP/2 with trailers; nothing is parsed or checked. It has as many threads as
//! the server has for its connections. The child ends when its standard input does, so that none is left behind.

use std::convert::Infallible;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

use super::wire::{Reply, Wire};

/// As many threads as the server has for its connections.
const MAX_THREADS: usize = 4;
/// Longest announcement of answers, in bytes.
const MAX_PLAN_BYTES: u64 = 64 << 20;

/// Answers for the echo's three wires, given in turn.
#[derive(Default)]
pub(super) struct Answers {
    pub(super) replies: Vec<(Wire, Vec<Reply>)>,
    /// Positions of a wire's replies, in the order in which its requests are sent; empty: one after the other.
    pub(super) order: Vec<u32>,
}

/// In front of the bodies, on a line of its own.
#[derive(Serialize, Deserialize)]
struct Plan {
    replies: Vec<Planned>,
    order: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
struct Planned {
    wire: Wire,
    headers: Vec<(String, String)>,
    bytes: usize,
}

/// Where the echo answers: a port for each wire.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ports {
    pub(super) json: SocketAddr,
    pub(super) binary: SocketAddr,
    pub(super) grpc: SocketAddr,
}

impl Ports {
    pub(super) fn of(&self, wire: Wire) -> SocketAddr {
        match wire {
            Wire::Json => self.json,
            Wire::Binary => self.binary,
            Wire::Grpc => self.grpc,
        }
    }
}

/// The child, ended when dropped.
pub(super) struct Echo {
    child: Child,
    /// Held open: the child ends with it.
    stdin: Option<ChildStdin>,
    pub(super) ports: Ports,
}

impl Echo {
    pub(super) fn spawn(answers: &Answers) -> Result<Echo> {
        let program = crate::cli::surroundings::program().context("cannot find this program to start the echo")?;
        let mut child = Command::new(program)
            .args(["bench", "--echo", "--serve", "--answers-from-stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the echo")?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let mut echo = Echo { child, stdin, ports: Ports::unbound() };
        let stdin = echo.stdin.as_mut().context("the echo has no standard input")?;
        answers.write(stdin).context("cannot tell the echo what to answer")?;
        let mut line = String::new();
        BufReader::new(stdout.context("the echo has no standard output")?).read_line(&mut line)?;
        echo.ports = Ports::parse(&line).with_context(|| format!("the echo said `{}`", line.trim()))?;
        Ok(echo)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // It ends by itself now; where it does not, it is made to.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ports {
    fn unbound() -> Ports {
        let none = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Ports { json: none, binary: none, grpc: none }
    }

    fn parse(line: &str) -> Option<Ports> {
        let mut found = line.split_whitespace().map(|word| word.split_once("://")?.1.parse().ok());
        Some(Ports { json: found.next()??, binary: found.next()??, grpc: found.next()?? })
    }

    fn line(&self) -> String {
        format!("http://{} http://{} grpc://{}", self.json, self.binary, self.grpc)
    }
}

impl Answers {
    /// The same bytes over every wire.
    pub(super) fn blank(length: usize) -> Answers {
        let reply = |media: &str, body: Vec<u8>| {
            vec![Reply { headers: vec![("content-type".into(), media.as_bytes().to_vec())], body }]
        };
        let replies = vec![
            (Wire::Json, reply("application/json", vec![b'0'; length])),
            (Wire::Binary, reply("application/octet-stream", vec![0; length])),
            (Wire::Grpc, reply("application/grpc", framed(length))),
        ];
        Answers { replies, order: Vec::new() }
    }

    fn write(&self, out: &mut impl Write) -> Result<()> {
        let replies =
            || self.replies.iter().flat_map(|(wire, replies)| replies.iter().map(move |reply| (*wire, reply)));
        let planned = replies().map(|(wire, reply)| Planned {
            wire,
            headers: reply
                .headers
                .iter()
                .map(|(name, value)| (name.clone(), String::from_utf8_lossy(value).into_owned()))
                .collect(),
            bytes: reply.body.len(),
        });
        let plan = serde_json::to_string(&Plan { replies: planned.collect(), order: self.order.clone() })?;
        writeln!(out, "{plan}")?;
        replies().try_for_each(|(_, reply)| out.write_all(&reply.body))?;
        Ok(out.flush()?)
    }

    fn read(input: &mut impl BufRead) -> Result<Fixed> {
        let mut line = String::new();
        input.by_ref().take(MAX_PLAN_BYTES).read_line(&mut line)?;
        let plan: Plan = serde_json::from_str(&line).context("no plan of answers")?;
        let mut fixed = Fixed { order: plan.order.into(), ..Fixed::default() };
        for planned in plan.replies {
            let mut body = vec![0; planned.bytes];
            input.read_exact(&mut body)?;
            let mut headers = HeaderMap::new();
            for (name, value) in &planned.headers {
                headers.append(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
            }
            let replies = match planned.wire {
                Wire::Json => &mut fixed.json,
                Wire::Binary => &mut fixed.binary,
                Wire::Grpc => &mut fixed.grpc,
            };
            replies.push((headers, body.into()));
        }
        Ok(fixed)
    }
}

/// A gRPC message of `length` bytes.
pub(super) fn framed(length: usize) -> Vec<u8> {
    let mut body = vec![0; 5 + length];
    body[1..5].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    body
}

/// What the server answers.
#[derive(Default)]
struct Fixed {
    json: Vec<(HeaderMap, Bytes)>,
    binary: Vec<(HeaderMap, Bytes)>,
    grpc: Vec<(HeaderMap, Bytes)>,
    order: Arc<[u32]>,
}

/// Serves until standard input ends, with answers that were read from it.
pub(super) fn serve_from_stdin() -> Result<()> {
    let mut stdin = BufReader::new(std::io::stdin());
    let fixed = Answers::read(&mut stdin)?;
    serve(fixed, move || {
        let mut rest = [0; 64];
        // Nothing more comes; the end does.
        while stdin.read(&mut rest).is_ok_and(|read| read > 0) {}
    })
}

/// Serves blank answers until the process is ended.
pub(super) fn serve_blank(length: usize) -> Result<()> {
    let mut written = Vec::new();
    Answers::blank(length).write(&mut written)?;
    serve(Answers::read(&mut &*written)?, || {
        loop {
            std::thread::park();
        }
    })
}

fn serve(fixed: Fixed, until: impl FnOnce()) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let ports = runtime.block_on(async {
        let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let (json, binary, grpc) = (bind().await?, bind().await?, bind().await?);
        let ports = Ports { json: json.local_addr()?, binary: binary.local_addr()?, grpc: grpc.local_addr()? };
        for (listener, wire, replies) in
            [(json, Wire::Json, fixed.json), (binary, Wire::Binary, fixed.binary), (grpc, Wire::Grpc, fixed.grpc)]
        {
            let replies = Arc::new(Replies { replies, order: Arc::clone(&fixed.order), next: AtomicUsize::new(0) });
            tokio::spawn(accept(listener, wire, replies));
        }
        Ok::<_, std::io::Error>(ports)
    })?;
    crate::cli::print(&format!("{}\n", ports.line()))?;
    until();
    runtime.shutdown_background();
    Ok(())
}

/// Answers that are given in turn.
struct Replies {
    replies: Vec<(HeaderMap, Bytes)>,
    order: Arc<[u32]>,
    next: AtomicUsize,
}

impl Replies {
    fn next(&self) -> (HeaderMap, Bytes) {
        match &self.replies[..] {
            [] => Default::default(),
            [only] => only.clone(),
            several => {
                let turn = self.next.fetch_add(1, Ordering::Relaxed);
                let position = match self.order.len() {
                    0 => turn,
                    length => self.order[turn % length] as usize,
                };
                several[position % several.len()].clone()
            }
        }
    }
}

async fn accept(listener: TcpListener, wire: Wire, replies: Arc<Replies>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let replies = Arc::clone(&replies);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, wire, Arc::clone(&replies)));
            let stream = TokioIo::new(stream);
            // A client that leaves is no news.
            let _ = if wire == Wire::Grpc {
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .adaptive_window(true)
                    .serve_connection(stream, service)
                    .await
            } else {
                hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await
            };
        });
    }
}

async fn answer(
    request: http::Request<Incoming>,
    wire: Wire,
    replies: Arc<Replies>,
) -> Result<http::Response<Answer>, Infallible> {
    let mut body = request.into_body();
    while let Some(Ok(_)) = body.frame().await {}
    let (headers, body) = replies.next();
    let mut response = http::Response::new(Answer { body: Some(body), trailers: wire == Wire::Grpc });
    *response.headers_mut() = headers;
    Ok(response)
}

/// Bytes, and gRPC's good end behind them.
struct Answer {
    body: Option<Bytes>,
    trailers: bool,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(body) = self.body.take() {
            return Poll::Ready(Some(Ok(Frame::data(body))));
        }
        if std::mem::take(&mut self.trailers) {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_none() && !self.trailers
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.body.as_ref().map_or(0, Bytes::len) as u64)
    }
}
