//! The Open Inference Protocol over gRPC, `grpc.health.v1` and reflection.
//!
//! [`Grpc`] is the whole port: it takes every call and watches its body. `infer` answers the one that nearly all calls
//! are; the others are handed to tonic, whose own refusals are given the status of our table. `intake` follows one
//! message, a unary call's or one of a stream's; `stream` is about streams alone. Owns the wire only: what a call means
//! is the engine's business. Runs on the I/O runtime; where a long message is decoded or encoded, its thread's other
//! tasks are handed over.
//!
//! Invariants: a permit is taken before an infer request's body is read and held until its answer is written; no
//! message over the one limit is buffered, compressed or not; a request that cannot be decoded is the client's fault.

pub(crate) mod codec;
mod convert;
mod health;
mod infer;
mod inputs;
mod intake;
mod metadata;
mod reflection;
mod service;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use http::StatusCode;
use tokio::sync::Semaphore;
use tonic::codec::CompressionEncoding::{Deflate, Gzip};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use tonic_health::pb::health_server::{HealthServer, SERVICE_NAME as HEALTH_SERVICE};
use tower::Service as _;

use crate::engine::Engine;
use crate::error::{Error, Kind, Result, quoted};
use crate::protocol::status;
use crate::protocol::{Service, common};
use crate::request::{Origin, Protocol};
use health::HealthService;
use intake::{Framing, Intake, Inward, MAX_PLACES, Places, check_announced};
use metadata::Terms;
use proto::grpc_inference_service_server::{GrpcInferenceServiceServer, SERVICE_NAME as SERVICE};
use reflection::Reflection;
use service::InferenceService;
use stream::{Answers, MAX_STREAMS, Messages, Outlet};

/// The generated messages, server and client of package `inference`.
#[allow(clippy::all, missing_docs, reason = "generated")]
pub mod proto {
    tonic::include_proto!("inference");
}

/// Longest message of a call that asks about the server or a model, in bytes.
const MAX_QUERY_BYTES: usize = 16 << 10;

const ORIGIN: Origin = Origin { protocol: Protocol::Grpc };

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Longest infer request, compressed or not, in bytes. Answers are as long as the model's outputs.
    pub max_message_bytes: usize,
    /// How long a client may take to send its message.
    pub body_timeout: Duration,
    /// Whether models may be loaded and unloaded here, as far as they are served on request.
    pub repository_api: bool,
    /// Requests of one stream in the server at once. No more of them are read until one is answered.
    pub max_stream_requests: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            max_message_bytes: 64 << 20,
            body_timeout: Duration::from_secs(30),
            repository_api: false,
            max_stream_requests: stream::DEFAULT_MAX_STREAM_REQUESTS,
        }
    }
}

/// The gRPC port's service.
struct Grpc {
    engine: Arc<Engine>,
    config: Config,
    inference: Arc<InferenceService>,
    health: Arc<HealthService>,
    reflection: Result<Reflection>,
    /// For decoding and encoding long messages.
    places: Arc<Places>,
    /// For open streams.
    streams: Arc<Semaphore>,
}

/// All that is served on the gRPC port, for a listener that speaks HTTP/2.
pub fn service(engine: Arc<Engine>, config: Config) -> Service {
    let grpc = Arc::new(Grpc::new(engine, config));
    Service::new(move |request| {
        let grpc = Arc::clone(&grpc);
        Box::pin(async move { grpc.answer(request).await })
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    /// One infer request.
    Infer,
    Unary(Unary),
    /// Many infer requests.
    Stream,
    Reflection,
}

/// Calls of one message that are not inferences; a health watch's answers are many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unary {
    /// About the server or a model; also methods that the service does not have.
    Query,
    /// To load or unload a model.
    Change,
    Health,
}

impl Call {
    fn of(path: &str) -> Option<Call> {
        match path.strip_prefix('/')?.split_once('/')? {
            (SERVICE, "ModelInfer") => Some(Call::Infer),
            (SERVICE, "ModelStreamInfer") => Some(Call::Stream),
            (SERVICE, "RepositoryModelLoad" | "RepositoryModelUnload") => Some(Call::Unary(Unary::Change)),
            (SERVICE, _) => Some(Call::Unary(Unary::Query)),
            (HEALTH_SERVICE, _) => Some(Call::Unary(Unary::Health)),
            (service, _) if reflection::SERVICES.contains(&service) => Some(Call::Reflection),
            _ => None,
        }
    }
}

impl Grpc {
    fn new(engine: Arc<Engine>, config: Config) -> Grpc {
        Grpc {
            inference: Arc::new(InferenceService::new(Arc::clone(&engine), config.repository_api)),
            health: Arc::new(HealthService::new(Arc::clone(&engine))),
            reflection: Reflection::new(Arc::clone(&engine), config.body_timeout),
            places: Places::new(MAX_PLACES),
            streams: Arc::new(Semaphore::new(MAX_STREAMS)),
            engine,
            config,
        }
    }

    async fn answer(&self, request: Request) -> Response {
        if !metadata::is_grpc(request.headers()) {
            return bare(StatusCode::UNSUPPORTED_MEDIA_TYPE);
        }
        if request.method() != http::Method::POST {
            return bare(StatusCode::METHOD_NOT_ALLOWED);
        }
        if let Err(error) = metadata::check_trailers(request.headers()) {
            return refused(&error);
        }
        let Some(call) = Call::of(request.uri().path()) else {
            let path = quoted(request.uri().path());
            return refused(&Error::new(Kind::Unsupported, format!("unknown service in '{path}'")));
        };
        // What is rare has a future of its own: each is large beside an inference's.
        let outcome = match call {
            Call::Infer => return self.infer(request).await,
            Call::Unary(call) => Box::pin(self.unary(call, request)).await,
            Call::Stream => Box::pin(self.stream(request)).await,
            Call::Reflection => Box::pin(self.reflect(request)).await,
        };
        outcome.map_or_else(|error| refused(&error), |response| response.map(Body::new))
    }

    /// Only infer requests are counted: metadata and health are asked for all day long.
    async fn infer(&self, request: Request) -> Response {
        let trace = self.engine.begin(ORIGIN);
        let outcome = infer::answer(self, &trace, request).await;
        trace.finish(outcome.as_ref().err());
        let mut response = outcome.unwrap_or_else(|error| refused(&error));
        common::provenance(&trace, response.headers_mut());
        response
    }

    /// Opens a stream; each of its messages is admitted, followed and recorded as a unary call's is.
    async fn stream(&self, request: Request) -> Result<http::Response<tonic::body::Body>> {
        let (mut parts, body) = request.into_parts();
        let terms = Terms::read(&mut parts.headers)?;
        let open = Arc::clone(&self.streams).try_acquire_owned().map_err(|_| {
            Error::new(Kind::RateLimited, format!("more than {MAX_STREAMS} streams of requests are open"))
        })?;
        let outlet = Outlet::default();
        let (config, places) = (self.config.clone(), &self.places);
        Answers::new(&self.engine, Messages::new(body), terms, config, places, outlet.clone())
            .hand_over(&mut parts.extensions);
        let request = http::Request::from_parts(parts, tonic::body::Body::empty());
        let Ok(response) = self.inference(self.config.max_message_bytes).call(request).await;
        Ok(response.map(|inner| tonic::body::Body::new(stream::Outward::new(inner, outlet, Arc::clone(places), open))))
    }

    async fn reflect(&self, mut request: Request) -> Result<http::Response<tonic::body::Body>> {
        let reflection = self.reflection.as_ref().map_err(Error::clone)?;
        let terms = Terms::read(request.headers_mut())?;
        reflection.answer(terms, request).await
    }

    async fn unary(&self, call: Unary, mut request: Request) -> Result<http::Response<tonic::body::Body>> {
        let limit = self.limit(call);
        let headers = request.headers_mut();
        let declared = metadata::declared_bytes(headers);
        let terms = Terms::read(headers)?;
        check_announced(declared, limit)?;
        let intake = Intake::new(None, terms.timeout);
        request.extensions_mut().insert(intake.clone());
        let framing = Framing::new(limit, terms.encoding.is_some());
        let request = request.map(|body| Inward::new(body, framing, self.config.body_timeout, intake.clone()));
        let response = self.hand_over(call, &intake, request).await?;
        let ending = intake.end();
        let own = Status::from_header_map(response.headers()).filter(|_| !ending.reached);
        match ending.refused.or_else(|| own.as_ref().and_then(refusal)) {
            Some(error) => Err(error),
            None => Ok(response),
        }
    }

    async fn hand_over(
        &self,
        call: Unary,
        intake: &Intake,
        request: http::Request<Inward<Body>>,
    ) -> Result<http::Response<tonic::body::Body>> {
        let limit = self.limit(call);
        let Ok(response) = match call {
            Unary::Query | Unary::Change => {
                let call = self.inference(limit).call(request);
                intake.follow(call, &self.places).await?
            }
            Unary::Health => {
                let call = HealthServer::from_arc(Arc::clone(&self.health))
                    .accept_compressed(Gzip)
                    .accept_compressed(Deflate)
                    .max_decoding_message_size(limit)
                    .call(request);
                intake.follow(call, &self.places).await?
            }
        };
        Ok(response)
    }

    fn inference(&self, limit: usize) -> GrpcInferenceServiceServer<InferenceService> {
        GrpcInferenceServiceServer::from_arc(Arc::clone(&self.inference))
            .accept_compressed(Gzip)
            .accept_compressed(Deflate)
            .send_compressed(Gzip)
            .send_compressed(Deflate)
            .max_decoding_message_size(limit)
    }

    fn limit(&self, call: Unary) -> usize {
        let limit = match call {
            Unary::Query | Unary::Health => MAX_QUERY_BYTES,
            Unary::Change => common::MAX_REPOSITORY_BYTES,
        };
        limit.min(self.config.max_message_bytes)
    }
}

/// What a refusal of tonic's own, before the method was called, is to the client. `None` for those that stand.
fn refusal(status: &Status) -> Option<Error> {
    let kind = match status.code() {
        // A method that the service does not have.
        Code::Unimplemented => return None,
        Code::OutOfRange | Code::ResourceExhausted => Kind::TooLarge,
        _ => Kind::InvalidInput,
    };
    let message = match status.message().strip_prefix("Error decompressing: ") {
        Some(why) => format!("message cannot be decompressed: {why}"),
        None => status.message().to_string(),
    };
    Some(Error::new(kind, message))
}

/// The status of an error.
fn status_of(error: &Error) -> Status {
    let entry = status::Status::of(error.kind());
    let mut status = Status::new(Code::from(entry.grpc), common::message(error));
    if let Some(seconds) = entry.retry_after {
        // What clients that retry by themselves wait.
        status.metadata_mut().insert("grpc-retry-pushback-ms", MetadataValue::from(u64::from(seconds) * 1000));
    }
    status
}

/// What ends an answer that has begun.
fn trailers(error: &Error) -> http::HeaderMap {
    let mut trailers = http::HeaderMap::new();
    // Fails on metadata that is no header, of which `status_of` adds none; the code is written before that.
    let _ = status_of(error).add_header(&mut trailers);
    trailers
}

/// The answer to a call that is refused: the status alone.
fn refused(error: &Error) -> Response {
    status_of(error).into_http::<tonic::body::Body>().map(Body::new)
}

/// An answer to something that is not gRPC.
fn bare(code: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = code;
    response
}
