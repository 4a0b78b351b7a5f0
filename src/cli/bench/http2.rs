//! gRPC over HTTP/2, without a gRPC library: a call is a head that never changes and a body that is bytes already; of
//! the answer the status and the message's length are checked.
//!
//! A connection may be shared by several callers; the first that finds it broken makes it anew.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderMap, Method, Request, Version};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tonic::Code;

use super::wire::{Fault, Reply};
use crate::cli::client::grpc::code_name;

const PATH: &str = "/inference.GRPCInferenceService/ModelInfer";

/// What a server may send before we say that we took it: more than an answer of 1 MiB for each of many streams.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;

/// Bytes in front of a message: whether it is compressed, and its length.
const MESSAGE_HEAD: usize = 5;

/// One connection, for however many callers.
pub(super) struct Shared {
    address: SocketAddr,
    host: String,
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    /// How many connections there have been.
    generation: u64,
    sender: Option<SendRequest<Bytes>>,
}

pub(super) struct Http2 {
    shared: Arc<Shared>,
    head: Request<()>,
    /// The connection as this caller last saw it.
    generation: u64,
    sender: Option<SendRequest<Bytes>>,
}

impl Shared {
    pub(super) fn new(address: SocketAddr, host: String) -> Arc<Shared> {
        Arc::new(Shared { address, host, current: Mutex::default() })
    }

    /// The connection after generation `broken`.
    async fn after(&self, broken: u64) -> Result<(u64, SendRequest<Bytes>), Fault> {
        let mut current = self.current.lock().await;
        if let Some(sender) = current.sender.as_ref().filter(|_| current.generation > broken) {
            return Ok((current.generation, sender.clone()));
        }
        current.sender = None;
        let failed = |error: std::io::Error| Fault::Connect(error.to_string());
        let stream = TcpStream::connect(self.address).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let (sender, connection) = Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .enable_push(false)
            .handshake(stream)
            .await
            .map_err(|error| Fault::Connect(error.to_string()))?;
        // How it ends, the calls that it breaks off tell.
        tokio::spawn(connection);
        current.generation += 1;
        current.sender = Some(sender.clone());
        Ok((current.generation, sender))
    }
}

impl Http2 {
    pub(super) fn new(shared: &Arc<Shared>) -> Result<Http2, http::Error> {
        let head = Request::builder()
            .method(Method::POST)
            .version(Version::HTTP_2)
            .uri(format!("http://{}{PATH}", shared.host))
            .header(CONTENT_TYPE, "application/grpc")
            .header(TE, "trailers")
            .body(())?;
        Ok(Http2 { shared: Arc::clone(shared), head, generation: 0, sender: None })
    }

    pub(super) async fn connect(&mut self) -> Result<(), Fault> {
        if self.sender.is_none() {
            let (generation, sender) = self.shared.after(self.generation).await?;
            (self.generation, self.sender) = (generation, Some(sender));
        }
        Ok(())
    }

    pub(super) async fn call(&mut self, body: &Bytes, reply: Option<&mut Reply>) -> Result<(), Fault> {
        self.connect().await?;
        // A timeout drops this here: what did not answer in time is not asked again.
        let Some(mut sender) = self.sender.take() else { return Err(Fault::Connect(String::new())) };
        let outcome = self.exchange(&mut sender, body, reply).await;
        if !matches!(outcome, Err(Fault::Closed(_))) {
            self.sender = Some(sender);
        }
        outcome
    }

    async fn exchange(
        &self,
        sender: &mut SendRequest<Bytes>,
        body: &Bytes,
        reply: Option<&mut Reply>,
    ) -> Result<(), Fault> {
        poll_fn(|context| sender.poll_ready(context)).await.map_err(|error| broke(&error))?;
        let (answer, mut sending) = sender.send_request(self.head.clone(), false).map_err(|error| broke(&error))?;
        sending.send_data(body.clone(), true).map_err(|error| broke(&error))?;
        let (head, mut body) = answer.await.map_err(|error| broke(&error))?.into_parts();
        if !head.status.is_success() {
            return Err(Fault::Status(head.status.as_u16(), String::new()));
        }
        // An answer that is a status only.
        check(&head.headers)?;
        let mut received = Received { kept: reply.is_some().then(Vec::new), ..Received::default() };
        while let Some(data) = body.data().await {
            let data = data.map_err(|error| broke(&error))?;
            let _ = body.flow_control().release_capacity(data.len());
            received.take(&data);
        }
        match body.trailers().await.map_err(|error| broke(&error))? {
            Some(trailers) if trailers.contains_key("grpc-status") => check(&trailers)?,
            _ => return Err(Fault::Malformed("no grpc-status".into())),
        }
        let message = received.whole()?;
        if let Some(reply) = reply {
            let headers = head.headers.iter().filter(|(name, _)| *name != http::header::DATE);
            reply.headers = headers.map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect();
            reply.body = message;
        }
        Ok(())
    }
}

/// Of a body, its first bytes and its length, and the whole where it is wanted.
#[derive(Default)]
struct Received {
    length: usize,
    head: [u8; MESSAGE_HEAD],
    kept: Option<Vec<u8>>,
}

impl Received {
    fn take(&mut self, data: &[u8]) {
        for (place, byte) in self.head.iter_mut().skip(self.length).zip(data) {
            *place = *byte;
        }
        self.length += data.len();
        if let Some(kept) = &mut self.kept {
            kept.extend_from_slice(data);
        }
    }

    /// Fails unless it was one whole message.
    fn whole(self) -> Result<Vec<u8>, Fault> {
        let [_, length @ ..] = self.head;
        if self.length < MESSAGE_HEAD || u32::from_be_bytes(length) as usize != self.length - MESSAGE_HEAD {
            return Err(Fault::Malformed(format!("{} bytes that are not one message", self.length)));
        }
        Ok(self.kept.unwrap_or_default())
    }
}

fn check(headers: &HeaderMap) -> Result<(), Fault> {
    let Some(status) = headers.get("grpc-status").filter(|status| *status != "0") else { return Ok(()) };
    let message = headers.get("grpc-message").map(|text| String::from_utf8_lossy(text.as_bytes()).into_owned());
    Err(Fault::Code(code_name(Code::from_bytes(status.as_bytes())), message.unwrap_or_default()))
}

/// A stream that was refused or reset leaves the connection as it is.
fn broke(error: &h2::Error) -> Fault {
    match error.reason() {
        Some(reason) if error.is_reset() => Fault::Code(format!("reset {reason:?}"), String::new()),
        _ => Fault::Closed(error.to_string()),
    }
}
