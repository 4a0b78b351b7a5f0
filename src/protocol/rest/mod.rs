//! The Open Inference Protocol V2 over REST, with the binary tensor extension and gzip or deflate both ways.
//!
//! `routes` maps paths to handlers · `infer` is the way of one inference · `body` and `encoding` read it within bounds ·
//! `json` turns it into tensors, by way of `outline`, `envelope`, `parameters`, `data` and `binary` · `answer` writes the
//! response · `repository` lists, loads and unloads what is there · `triton` tells configurations and statistics. Owns parsing, HTTP limits and texts. Knows nothing of the listener, of batching or of models.
//!
//! No byte of a body is read before there is a permit for it. Work that may take more than about 500 µs runs on the
//! CPU pool. No request needs a `Content-Type`, as real clients send none.

mod answer;
mod binary;
mod body;
mod data;
mod encoding;
mod envelope;
mod infer;
mod json;
mod outline;
mod parameters;
mod repository;
mod routes;
mod triton;

use std::sync::Arc;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::header::{ACCEPT_ENCODING, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, StatusCode};
use serde::Serialize;

pub(crate) use self::data::Flat;
use super::status::Status;
use super::{Service, common, service};
use crate::engine::Engine;
use crate::error::{Error, Kind};
use crate::request::{Origin, Protocol};

/// Limits of the REST data port, besides those that all protocols share. All are checked before memory is taken for what they bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The request body as sent, as decompressed, and each of its tensors: 64 MiB, Triton's default.
    pub max_body_bytes: usize,
    /// The JSON in front of binary tensors: 1 MiB.
    pub max_json_header_bytes: usize,
    /// Nesting of JSON: 64 levels.
    pub max_json_depth: usize,
    /// For a whole body to arrive: 30 s.
    pub body_timeout: Duration,
    /// Before the slowest rate counts: 5 s.
    pub body_grace: Duration,
    /// The slowest a body may come, in bytes per second: 1024.
    pub min_body_rate: usize,
    /// Bytes parsed or formatted on the async thread; more go to the CPU pool: 128 KiB, about 500 µs of JSON numbers.
    pub inline_bytes: usize,
    /// Whether models may be loaded and unloaded here, as far as they are served on request: not.
    pub repository_api: bool,
    /// The shortest response worth compressing: 1 KiB.
    pub min_compressed_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            max_body_bytes: 64 << 20,
            max_json_header_bytes: 1 << 20,
            max_json_depth: 64,
            body_timeout: Duration::from_secs(30),
            body_grace: Duration::from_secs(5),
            min_body_rate: 1024,
            inline_bytes: 128 << 10,
            repository_api: false,
            min_compressed_bytes: 1 << 10,
        }
    }
}

/// The REST data port, to be served by any HTTP/1.1 or HTTP/2 listener. Inference goes straight to its handler: the
/// router takes a tenth of what a small request costs.
pub fn service(engine: Arc<Engine>, config: Config) -> Service {
    let app = App { engine, config: Arc::new(config) };
    let router = routes::routes(app.clone());
    Service::new(move |request| match routes::inference(request.method(), request.uri().path()) {
        Some(target) => {
            let app = app.clone();
            Box::pin(async move { infer::infer(&app, target, request).await })
        }
        None => service::routed(&router, request),
    })
}

/// The admin port's routes: for now those of the repository.
pub fn admin(engine: Arc<Engine>, config: Config) -> axum::Router {
    routes::admin(App { engine, config: Arc::new(Config { repository_api: true, ..config }) })
}

const ORIGIN: Origin = Origin { protocol: Protocol::Http };

#[derive(Clone)]
struct App {
    engine: Arc<Engine>,
    config: Arc<Config>,
}

impl App {
    /// Whether work on so many bytes belongs on the CPU pool.
    fn is_long(&self, bytes: usize) -> bool {
        bytes > self.config.inline_bytes
    }
}

/// An error as this protocol says it.
struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        #[derive(Serialize)]
        struct Body<'a> {
            error: &'a str,
        }
        let Refusal(error) = self;
        let status = Status::of(error.kind());
        let code = StatusCode::from_u16(status.http).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = json(code, &Body { error: common::message(&error) });
        if let Some(seconds) = status.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if error.kind() == Kind::UnsupportedMedia {
            response.headers_mut().insert(ACCEPT_ENCODING, HeaderValue::from_static(encoding::ACCEPTED));
        }
        response
    }
}

const JSON: HeaderValue = HeaderValue::from_static("application/json");

fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(body) => (status, [(CONTENT_TYPE, JSON)], body).into_response(),
        // Bodies are plain structs of strings and numbers; only a map with other keys than strings could fail.
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
