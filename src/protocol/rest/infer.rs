//! One inference over REST: headers, then a permit, then the body, then the engine, then the response.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderName};

use super::answer::{self, Wanted};
use super::binary::{self, Layout, Tail};
use super::encoding::{self, Encoding};
use super::json::{self, Parsed};
use super::parameters::OfRequest;
use super::routes::Target;
use super::{App, Config, ORIGIN, Refusal, body};
use crate::engine::Trace;
use crate::error::{Error, Result};
use crate::protocol::classification::Classes;
use crate::protocol::common;
use crate::request::{InferRequest, MAX_NAME_BYTES, ModelRef, Permit};
use crate::tensor::Signature;

/// How long the client waits, in milliseconds; 0 is no limit. The parameter `timeout` counts in microseconds: where
/// both are sent, the shorter one holds.
const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout");
/// What a canary splits by.
const ROUTING_KEY: HeaderName = HeaderName::from_static("x-routing-key");

/// As the router calls it.
pub(super) async fn routed(State(app): State<App>, target: Result<Target, Refusal>, request: Request) -> Response {
    infer(&app, target, request).await
}

pub(super) async fn infer(app: &App, target: Result<Target, Refusal>, request: Request) -> Response {
    let trace = app.engine.begin(ORIGIN);
    let outcome = serve(app, target, request, &trace).await;
    // After the answer has been written: what could not be is no success.
    trace.finish(outcome.as_ref().err());
    let mut response = outcome.map_err(Refusal).into_response();
    common::provenance(&trace, response.headers_mut());
    response
}

async fn serve(app: &App, target: Result<Target, Refusal>, request: Request, trace: &Trace) -> Result<Response> {
    let accepted = encoding::negotiated(request.headers());
    let announced = announce(app, target, request)?;
    let permit = app.engine.admit(trace, announced.declared.unwrap_or(0))?;
    let deadline = announced.head.timeout.and_then(|timeout| permit.arrived().checked_add(timeout));
    let (request, wanted, permit) = before(deadline, receive(app, announced, permit)).await?;
    let response = app.engine.infer(trace, request, permit).await?;
    answer::write(app, response, wanted, accepted).await
}

/// What is known of a request before its body is read. A body that cannot be understood is better left unread.
struct Announced {
    model: ModelRef,
    head: Head,
    declared: Option<usize>,
    body: Body,
}

/// `received`, if it comes before the deadline: a body that is late, or waits too long to be parsed, is not awaited.
async fn before<T>(deadline: Option<Instant>, received: impl Future<Output = Result<T>>) -> Result<T> {
    let Some(deadline) = deadline else { return received.await };
    tokio::time::timeout_at(deadline.into(), received).await.unwrap_or_else(|_| Err(common::expired()))
}

fn announce(app: &App, target: Result<Target, Refusal>, request: Request) -> Result<Announced> {
    let Target(model) = target.map_err(|Refusal(error)| error)?;
    let (parts, body) = request.into_parts();
    let head = Head::read(&parts.headers)?;
    if head.layout == Layout::Raw {
        signature_of(app, &model)?;
    }
    let declared = body::declared(&body, app.config.max_body_bytes)?;
    Ok(Announced { model, head, declared, body })
}

/// For raw mode, whose body says nothing of names and shapes. The one look at the table besides the engine's own choice:
/// after the body has arrived, so that the two fall together but for the time of parsing.
fn signature_of(app: &App, model: &ModelRef) -> Result<Arc<Signature>> {
    Ok(app.engine.model(&model.name, model.version)?.signature)
}

/// Reads the body into the request that every protocol hands to the engine.
async fn receive(app: &App, announced: Announced, mut permit: Permit) -> Result<(InferRequest, Wanted, Permit)> {
    let Announced { model, head, declared, body } = announced;
    let tensors = if let Layout::Split(json) = head.layout { json } else { 0 };
    let body = body::read(body, declared, tensors, &app.config, &mut permit).await?;
    let signature = if head.layout == Layout::Raw { Some(signature_of(app, &model)?) } else { None };
    // How much a compressed body holds is not known before it is decompressed.
    let bytes = if head.encoding == Encoding::Identity { body.len() } else { usize::MAX };
    let (config, name) = (Arc::clone(&app.config), model.name.clone());
    let (encoding, layout) = (head.encoding, head.layout);
    let understand = move || {
        let body = encoding::decode(encoding, body, config.max_body_bytes, &mut permit)?;
        let parsed = understand(body, layout, &name, signature.as_deref(), &config, &mut permit)?;
        Ok((parsed, permit))
    };
    let (parsed, permit) = if app.is_long(bytes) { app.engine.cpu().run(understand).await?? } else { understand()? };

    let Parsed { id, parameters, inputs, outputs } = parsed;
    let mut classes = Classes::default();
    outputs.iter().try_for_each(|output| classes.ask(&output.name, output.how.classes))?;
    let request = InferRequest {
        id,
        model,
        inputs,
        outputs: outputs.iter().map(|output| output.name.clone()).collect(),
        timeout: [parameters.timeout, head.timeout].into_iter().flatten().min(),
        priority: parameters.priority,
        route_key: head.route_key,
    };
    Ok((request, Wanted { outputs, binary: parameters.binary_data_output, classes }, permit))
}

/// From a body's bytes to named tensors and what was asked about them.
fn understand(
    body: Bytes,
    layout: Layout,
    model: &str,
    signature: Option<&Signature>,
    config: &Config,
    permit: &mut Permit,
) -> Result<Parsed> {
    match (layout, signature) {
        (Layout::Raw, Some(signature)) => Ok(Parsed {
            id: String::new(),
            parameters: OfRequest { binary_data_output: true, ..OfRequest::default() },
            inputs: vec![binary::raw(body, model, signature)?],
            outputs: Vec::new(),
        }),
        (Layout::Split(length), _) => {
            let (json, tail) = binary::split(body, length, config)?;
            json::parse(model, &json, tail, config, permit)
        }
        (Layout::Json | Layout::Raw, _) => json::parse(model, &body, Tail::empty(), config, permit),
    }
}

/// What an infer request says in its headers.
#[derive(Debug)]
struct Head {
    encoding: Encoding,
    layout: Layout,
    timeout: Option<Duration>,
    route_key: Option<String>,
}

impl Head {
    fn read(headers: &HeaderMap) -> Result<Head> {
        Ok(Head {
            encoding: encoding::of_request(headers)?,
            layout: binary::layout(headers)?,
            timeout: timeout(headers)?,
            route_key: route_key(headers)?,
        })
    }
}

fn timeout(headers: &HeaderMap) -> Result<Option<Duration>> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let digits = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let millis: u64 = digits
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| Error::invalid(format!("header `{TIMEOUT}` is not a number of milliseconds")))?;
    Ok((millis > 0).then(|| Duration::from_millis(millis)))
}

fn route_key(headers: &HeaderMap) -> Result<Option<String>> {
    let Some(value) = headers.get(ROUTING_KEY) else { return Ok(None) };
    let key = std::str::from_utf8(value.as_bytes()).ok().filter(|key| key.len() <= MAX_NAME_BYTES);
    let key = key.ok_or_else(|| {
        Error::invalid(format!("header `{ROUTING_KEY}` is not UTF-8 text of at most {MAX_NAME_BYTES} bytes"))
    })?;
    Ok(Some(key.to_string()))
}
