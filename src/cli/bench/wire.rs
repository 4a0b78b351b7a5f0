//! What goes over the wire, made before anything is timed: a request is bytes, an answer is looked at once.

use std::fmt;

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::cli::client::request::Request;
use crate::cli::client::{Answer, grpc, rest};

/// How requests are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Wire {
    /// REST, tensors as JSON
    Json,
    /// REST with the binary tensor extension both ways
    Binary,
    /// gRPC with raw contents
    Grpc,
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wire::Json => "json",
            Wire::Binary => "binary",
            Wire::Grpc => "grpc",
        })
    }
}

/// One request to one model.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) model: String,
    /// Empty: the server's choice.
    pub(super) version: String,
    pub(super) request: Request,
}

/// A request as it is sent: head and body for REST, the body for gRPC.
#[derive(Clone, Debug)]
pub(super) struct Encoded(pub(super) Bytes);

impl Item {
    /// `host` is what REST names as such; `path` replaces the model's own.
    pub(super) fn encoded(&self, wire: Wire, host: &str, path: Option<&str>) -> Result<Encoded> {
        let of = || format!("a request to `{}`", self.model);
        let (media, json, body) = match wire {
            Wire::Grpc => {
                return Ok(Encoded(grpc::written(&self.model, &self.version, self.request.clone()).with_context(of)?));
            }
            Wire::Json => ("application/json", None, rest::written_as_json(&self.request).with_context(of)?),
            Wire::Binary => {
                let (json, body) = rest::written(&self.request);
                ("application/octet-stream", Some(json), body)
            }
        };
        let own = || format!("{}/infer", rest::path(&self.model, &self.version));
        let path = path.map_or_else(own, String::from);
        Ok(Encoded(post(host, &path, media, json, &body)))
    }
}

/// A request of HTTP/1.1. `json` is how much of the body is.
pub(super) fn post(host: &str, path: &str, media: &str, json: Option<usize>, body: &[u8]) -> Bytes {
    let json = json.map(|length| format!("{}: {length}\r\n", rest::HEADER_LENGTH)).unwrap_or_default();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: {media}\r\n{json}content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat().into()
}

/// An answer, whole.
#[derive(Clone, Debug, Default)]
pub(super) struct Reply {
    /// Without those that are about the connection or the body's length.
    pub(super) headers: Vec<(String, Vec<u8>)>,
    pub(super) body: Vec<u8>,
}

impl Reply {
    pub(super) fn decoded(self, wire: Wire) -> Result<Answer, String> {
        if wire == Wire::Grpc {
            return grpc::read(self.body.into());
        }
        let length = self.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(rest::HEADER_LENGTH));
        let length = length.map(|(_, value)| String::from_utf8_lossy(value));
        rest::read(length.as_deref(), None, self.body.into())
    }
}

/// Why a request has no answer that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Connect(String),
    /// The connection ended before the answer did.
    Closed(String),
    Timeout,
    /// An HTTP status that is no success, with the beginning of the body where it was kept.
    Status(u16, String),
    /// A gRPC status that is no success.
    Code(String, String),
    Malformed(String),
}

impl Fault {
    /// What it is counted under.
    pub(super) fn kind(&self) -> String {
        match self {
            Fault::Connect(_) => "no connection".into(),
            Fault::Closed(_) => "connection closed".into(),
            Fault::Timeout => "timeout".into(),
            Fault::Status(status, _) => format!("HTTP {status}"),
            Fault::Code(code, _) => format!("gRPC {code}"),
            Fault::Malformed(_) => "malformed answer".into(),
        }
    }

    /// More of it, for people; may be empty.
    pub(super) fn detail(&self) -> &str {
        match self {
            Fault::Timeout => "",
            Fault::Connect(text)
            | Fault::Closed(text)
            | Fault::Status(_, text)
            | Fault::Code(_, text)
            | Fault::Malformed(text) => text,
        }
    }
}
