//! A server as seen from here: where it is, what it says of a model, what it answers, and how a call can fail.
//!
//! `rest` and `grpc` speak the protocol · `request` is what is sent, from a file or from `input`s, which read literals,
//! JSON and NumPy's files (`npy`) by the model's signature · `elements` are a tensor's, one by one.
//!
//! One connection for the few calls of a command, without a pool, and without TLS, which the server does not speak
//! either. Knows of the server only what the protocol says.

pub(super) mod elements;
pub(super) mod grpc;
pub(super) mod input;
mod npy;
pub(super) mod request;
pub(super) mod rest;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use http::Uri;
use http::uri::Authority;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::net::TcpStream;

use self::grpc::Grpc;
use self::request::Request;
use self::rest::Rest;
use crate::error::visible;
use crate::protocol::rest::Flat;
use crate::request::Protocol;
use crate::tensor::{DataType, Dim, Tensor, TensorSpec};

/// Where servers listen unless told otherwise.
const HTTP_PORT: u16 = 8000;
const GRPC_PORT: u16 = 8001;

/// For the connection alone: a host that swallows packets is told from a server that computes.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Longest answer, in bytes.
pub(super) const MAX_ANSWER_BYTES: usize = 1 << 30;

/// Longest text of an error that is repeated, in bytes: whatever is at the address wrote it.
const MAX_MESSAGE_BYTES: usize = 2 << 10;

/// Longest file or standard input, in bytes: far more than servers take.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Why there is no answer to show.
#[derive(Debug)]
pub(super) enum Failure {
    /// What was asked cannot be sent.
    Usage(anyhow::Error),
    /// The server answered with an error.
    Refused(String),
    /// The server is not there, broke off, or answered what is not in the protocol.
    NoAnswer(String),
}

/// The server answered with an error.
const EXIT_REFUSED: u8 = 1;
/// There was no answer: not reachable, cut off, too late, or not in the protocol.
const EXIT_NO_ANSWER: u8 = 3;

impl Failure {
    /// Tells why a command has nothing to show, and how it exits then.
    #[expect(clippy::print_stderr, reason = "the one place where a client's failure is told")]
    pub(super) fn told(self) -> Result<ExitCode> {
        let (message, code) = match self {
            Failure::Usage(error) => return Err(error),
            Failure::Refused(message) => (message, EXIT_REFUSED),
            Failure::NoAnswer(message) => (message, EXIT_NO_ANSWER),
        };
        eprintln!("tidegate: {message}");
        Ok(ExitCode::from(code))
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Usage(error)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Address {
    protocol: Protocol,
    authority: Authority,
    port: u16,
}

impl Address {
    /// `http://host[:port]`, `grpc://host[:port]`, or `host[:port]` for HTTP.
    pub(super) fn parse(text: &str) -> Result<Address, String> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
        let (protocol, port) = match scheme {
            "http" => (Protocol::Http, HTTP_PORT),
            "grpc" => (Protocol::Grpc, GRPC_PORT),
            "https" | "grpcs" => return Err("TLS is not spoken, expected http:// or grpc://".into()),
            _ => return Err(format!("the scheme is `{scheme}`, expected http or grpc")),
        };
        let host = rest.strip_suffix('/').unwrap_or(rest);
        let authority: Authority =
            host.parse().map_err(|_| format!("`{host}` is no address, expected a host and perhaps a port"))?;
        if authority.as_str().contains('@') {
            return Err("a user is named, expected a host and perhaps a port".into());
        }
        let port = match host.strip_prefix(authority.host()) {
            Some("") => port,
            _ => authority.port_u16().ok_or_else(|| format!("`{host}` has no port from 0 to 65535 after the colon"))?,
        };
        let authority =
            format!("{}:{port}", authority.host()).parse().map_err(|_| format!("`{host}` is no address"))?;
        Ok(Address { protocol, authority, port })
    }

    pub(super) fn is_default(&self) -> bool {
        self.to_string() == "http://localhost:8000"
    }

    pub(super) fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The same host, spoken to over another protocol on its default port.
    pub(super) fn sibling(&self, protocol: Protocol) -> Address {
        let port = match protocol {
            Protocol::Http => HTTP_PORT,
            Protocol::Grpc => GRPC_PORT,
        };
        let authority = format!("{}:{port}", self.authority.host()).parse().unwrap_or_else(|_| self.authority.clone());
        Address { protocol, authority, port }
    }

    /// The address behind the name that answers there.
    pub(super) async fn resolved(&self) -> Result<SocketAddr, Failure> {
        self.connect().await?.peer_addr().map_err(|error| self.broke(&error))
    }

    /// Host and port.
    pub(super) fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// What HTTP/2 calls begin with.
    pub(super) fn origin(&self) -> Result<Uri> {
        Ok(Uri::builder().scheme("http").authority(self.authority.clone()).path_and_query("/").build()?)
    }

    async fn connect(&self) -> Result<TcpStream, Failure> {
        let host = self.authority.host().trim_matches(['[', ']']);
        let found = match tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect((host, self.port))).await {
            Ok(Ok(stream)) => {
                // One short message each way: nothing is gained by waiting for more. Without it, all still works.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no connection within {CONNECT_LIMIT:?}"),
        };
        Err(Failure::NoAnswer(format!(
            "cannot reach {self}: {found}\n  start a server with `tidegate serve --registry DIR`, or name another with \
             `--server URL`"
        )))
    }

    /// A refusal, as this server worded it.
    pub(super) fn refused(&self, status: &str, message: &str, prediction: Option<&str>) -> Failure {
        let message = visible(&message[..message.floor_char_boundary(MAX_MESSAGE_BYTES)]);
        let prediction = prediction.map(|id| format!("\n  prediction {}", visible(id))).unwrap_or_default();
        let colon = if message.is_empty() { "" } else { ": " };
        Failure::Refused(format!("{self} answered {status}{colon}{message}{prediction}"))
    }

    /// The connection broke, or what came was not HTTP at all.
    pub(super) fn broke(&self, error: &(dyn Error + 'static)) -> Failure {
        let (mut cause, mut found) = (error.source(), error.to_string());
        while let Some(error) = cause {
            found.push_str(&format!(": {error}"));
            cause = error.source();
        }
        let speaks = match self.protocol {
            Protocol::Http => "http:// is for the REST port: for the gRPC port use grpc://",
            Protocol::Grpc => "grpc:// is for the gRPC port: for the REST port use http://",
        };
        Failure::NoAnswer(format!("no answer from {self}: {found}\n  {speaks}"))
    }

    /// An answer came, but not one of the protocol.
    pub(super) fn unreadable(&self, why: impl fmt::Display) -> Failure {
        let why = visible(&why.to_string());
        Failure::NoAnswer(format!("{self} answered, but not as the Open Inference Protocol says: {why}"))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.protocol {
            Protocol::Http => "http",
            Protocol::Grpc => "grpc",
        };
        write!(f, "{scheme}://{}", self.authority)
    }
}

pub(super) enum Client {
    Rest(Rest),
    Grpc(Grpc),
}

impl Client {
    /// `timeout` is what the server is told; zero is no limit.
    pub(super) async fn connect(address: &Address, timeout: Duration) -> Result<Client, Failure> {
        let stream = address.connect().await?;
        let (address, timeout) = (address.clone(), (!timeout.is_zero()).then_some(timeout));
        Ok(match address.protocol {
            Protocol::Http => Client::Rest(Rest::start(stream, address, timeout).await?),
            Protocol::Grpc => Client::Grpc(Grpc::start(stream, address, timeout).await?),
        })
    }

    /// The empty version is the server's choice, here and below.
    pub(super) async fn model(&mut self, name: &str, version: &str) -> Result<ModelMetadata, Failure> {
        match self {
            Client::Rest(rest) => rest.model(name, version).await,
            Client::Grpc(grpc) => grpc.model(name, version).await,
        }
    }

    pub(super) async fn infer(&mut self, name: &str, version: &str, request: Request) -> Result<Answer, Failure> {
        match self {
            Client::Rest(rest) => rest.infer(name, version, request).await,
            Client::Grpc(grpc) => grpc.infer(name, version, request).await,
        }
    }
}

/// A model's metadata as it is on the wire.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(super) struct ModelMetadata {
    pub(super) name: String,
    #[serde(default)]
    pub(super) versions: Vec<String>,
    #[serde(default)]
    pub(super) platform: String,
    pub(super) inputs: Vec<TensorMetadata>,
    pub(super) outputs: Vec<TensorMetadata>,
    #[serde(default)]
    pub(super) properties: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct TensorMetadata {
    pub(super) name: String,
    pub(super) datatype: String,
    pub(super) shape: Vec<i64>,
}

impl TensorMetadata {
    pub(super) fn spec(&self) -> Result<TensorSpec> {
        let name = visible(&self.name);
        let Some(dtype) = DataType::parse(&self.datatype) else {
            bail!("input `{name}` takes {}, which cannot be written here: use --request", visible(&self.datatype));
        };
        let dim = |dim: &i64| match usize::try_from(*dim) {
            Ok(extent) => Ok(Dim::Fixed(extent)),
            Err(_) if *dim == -1 => Ok(Dim::Free(None)),
            Err(_) => Err(anyhow!("input `{name}` has dimension {dim}, expected -1 or more")),
        };
        let dims = self.shape.iter().map(dim).collect::<Result<_>>()?;
        Ok(TensorSpec { name: self.name.as_str().into(), dtype, dims: Some(dims) })
    }
}

/// An answered inference.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) id: String,
    pub(super) model: String,
    pub(super) version: String,
    pub(super) parameters: Map<String, Value>,
    pub(super) outputs: Vec<(String, Tensor)>,
    /// HTTP's `Server-Timing`, over gRPC too.
    pub(super) timing: Option<String>,
}

/// An answer of the protocol, outputs as JSON.
#[derive(Serialize)]
pub(super) struct AnswerJson<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    id: &'a str,
    model_name: &'a str,
    model_version: &'a str,
    #[serde(skip_serializing_if = "Map::is_empty")]
    parameters: &'a Map<String, Value>,
    outputs: Vec<OutputJson<'a>>,
}

#[derive(Serialize)]
struct OutputJson<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: &'a [usize],
    data: Flat<'a>,
}

impl<'a> OutputJson<'a> {
    fn of(name: &'a str, tensor: &'a Tensor) -> OutputJson<'a> {
        OutputJson { name, datatype: tensor.dtype().name(), shape: tensor.shape().dims(), data: Flat(tensor) }
    }
}

impl Answer {
    pub(super) fn as_json(&self) -> AnswerJson<'_> {
        AnswerJson {
            id: &self.id,
            model_name: &self.model,
            model_version: &self.version,
            parameters: &self.parameters,
            outputs: self.outputs.iter().map(|(name, tensor)| OutputJson::of(name, tensor)).collect(),
        }
    }
}

/// The file, or standard input for `-`.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes))
    };
    let length = read.with_context(|| format!("cannot read {}", path.display()))?;
    if length as u64 > MAX_FILE_BYTES {
        bail!("{} is longer than {MAX_FILE_BYTES} bytes", path.display());
    }
    Ok(bytes)
}
