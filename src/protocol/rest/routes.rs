//! Paths, methods and everything but inference: health, metadata, and the 404 and 405 that every client understands.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRequestParts, RawPathParams, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{MethodRouter, get, post};
use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::{Method, StatusCode};
use serde::{Serialize, Serializer};

use super::{App, Refusal, common, infer, json, repository, triton};
use crate::error::{Error, Kind, Result, quoted};
use crate::request::{MAX_NAME_BYTES, ModelRef, VersionId};
use crate::tensor::TensorSpec;

pub(super) fn routes(app: App) -> Router {
    let router = Router::new();
    let router = at(router, "/v2", get(server));
    let router = at(router, "/v2/health/live", get(live));
    let router = at(router, "/v2/health/ready", get(ready));
    let router = at(router, "/v2/models", get(models));
    let router = at(router, "/v2/models/stats", get(triton::all_statistics));
    let router = repository(router);
    ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"]
        .into_iter()
        .fold(router, |router, model| {
            let router = at(router, model, get(metadata));
            let router = at(router, &format!("{model}/ready"), get(model_ready));
            let router = at(router, &format!("{model}/config"), get(triton::config));
            let router = at(router, &format!("{model}/stats"), get(triton::statistics));
            at(router, &format!("{model}/infer"), post(infer::routed))
        })
        .fallback(unknown)
        .method_not_allowed_fallback(not_allowed)
        .with_state(app)
}

pub(super) fn admin(app: App) -> Router {
    repository(Router::new())
        .fallback(unknown)
        .method_not_allowed_fallback(not_allowed)
        .layer(axum::middleware::from_fn(from_no_page))
        .with_state(app)
}

/// Refuses what a browser sends for a web page: being on this machine, it reaches loopback, and the admin API has no
/// authentication. A page says where it is from, or, where it has had its name resolved to here, calls the server so.
async fn from_no_page(request: Request, next: Next) -> Result<Response, Refusal> {
    let headers = request.headers();
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if headers.contains_key(ORIGIN) || !(host.is_empty() || is_own(host)) {
        let message =
            "the admin API is not for web pages: expected no `Origin`, and as `Host` an address or `localhost`";
        return Err(Refusal(Error::new(Kind::Forbidden, message)));
    }
    Ok(next.run(request).await)
}

/// An IP address or `localhost`, with or without a port.
fn is_own(host: &str) -> bool {
    let name = host
        .rsplit_once(':')
        .filter(|(_, port)| port.bytes().all(|c| c.is_ascii_digit()))
        .map_or(host, |(name, _)| name);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    address.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
}

fn repository(router: Router<App>) -> Router<App> {
    let router = at(router, "/v2/repository/index", post(repository::index));
    let router = at(router, "/v2/repository/models/{model}/load", post(repository::load));
    at(router, "/v2/repository/models/{model}/unload", post(repository::unload))
}

/// With and without a trailing slash.
fn at(router: Router<App>, path: &str, methods: MethodRouter<App>) -> Router<App> {
    router.route(path, methods.clone()).route(&format!("{path}/"), methods)
}

async fn unknown() -> Refusal {
    Refusal(Error::not_found("Not Found"))
}

async fn not_allowed() -> Refusal {
    Refusal(Error::new(Kind::MethodNotAllowed, "Method Not Allowed"))
}

/// The model that a request to infer names. `None` where the router must look at it: other calls, and paths that are not
/// as clients write them.
pub(super) fn inference(method: &Method, path: &str) -> Option<Result<Target, Refusal>> {
    let rest = path.strip_prefix("/v2/models/")?;
    let named = rest.strip_suffix("/infer").filter(|named| method == Method::POST && !named.contains('%'))?;
    let target = match named.split_once('/') {
        None if !named.is_empty() => model_ref(named, None),
        Some((model, rest)) if !model.is_empty() => {
            let version = rest.strip_prefix("versions/").filter(|it| !it.is_empty() && !it.contains('/'))?;
            model_ref(model, Some(version))
        }
        _ => return None,
    };
    Some(target.map(Target).map_err(Refusal))
}

fn model_ref(model: &str, of: Option<&str>) -> Result<ModelRef> {
    Ok(ModelRef { name: model_name(model)?, version: of.map(version).transpose()? })
}

/// The model that a path names, percent-decoded.
pub(super) struct Target(pub ModelRef);

impl<S: Send + Sync> FromRequestParts<S> for Target {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Target, Refusal> {
        let segments = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|_| Error::invalid("the path is not UTF-8 once percent-decoded"))?;
        let mut target = ModelRef { name: String::new(), version: None };
        for (key, value) in &segments {
            if key == "model" {
                target.name = model_name(value)?;
            } else {
                target.version = Some(version(value)?);
            }
        }
        Ok(Target(target))
    }
}

fn model_name(name: &str) -> Result<String> {
    if name.is_empty() {
        return Err(Error::not_found("Not Found"));
    }
    if name.len() > MAX_NAME_BYTES {
        let found = name.len();
        return Err(Error::invalid(format!("the model's name has {found} bytes, expected at most {MAX_NAME_BYTES}")));
    }
    Ok(name.to_string())
}

fn version(text: &str) -> Result<VersionId> {
    VersionId::parse(text)
        .ok_or_else(|| Error::invalid(format!("model version '{}' is not a number from 1 up", quoted(text))))
}

fn verdict(yes: bool) -> StatusCode {
    if yes { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn live(State(app): State<App>) -> Response {
    #[derive(Serialize)]
    struct Body {
        live: bool,
    }
    let live = app.engine.live();
    json(verdict(live), &Body { live })
}

async fn ready(State(app): State<App>) -> Response {
    #[derive(Serialize)]
    struct Body {
        ready: bool,
    }
    let ready = app.engine.ready();
    json(verdict(ready), &Body { ready })
}

async fn server(State(app): State<App>) -> Response {
    #[derive(Serialize)]
    struct Body {
        name: &'static str,
        version: &'static str,
        extensions: Vec<&'static str>,
    }
    let extensions = common::extensions(&app.engine, app.config.repository_api);
    json(StatusCode::OK, &Body { name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION"), extensions })
}

async fn models(State(app): State<App>) -> Response {
    #[derive(Serialize)]
    struct Body<'a> {
        models: Vec<&'a str>,
    }
    let models: Vec<Arc<str>> = app.engine.models();
    json(StatusCode::OK, &Body { models: models.iter().map(|name| &**name).collect() })
}

async fn model_ready(State(app): State<App>, Target(target): Target) -> Result<Response, Refusal> {
    #[derive(Serialize)]
    struct Body<'a> {
        name: &'a str,
        ready: bool,
    }
    let ready = app.engine.model_ready(&target.name, target.version)?;
    Ok(json(verdict(ready), &Body { name: &target.name, ready }))
}

async fn metadata(State(app): State<App>, Target(target): Target) -> Result<Response, Refusal> {
    #[derive(Serialize)]
    struct Body<'a> {
        name: &'a str,
        versions: Vec<String>,
        platform: &'a str,
        inputs: Vec<TensorMetadata<'a>>,
        outputs: Vec<TensorMetadata<'a>>,
        #[serde(serialize_with = "as_object")]
        properties: &'a [(&'static str, String)],
    }
    let model = app.engine.model(&target.name, target.version)?;
    let body = Body {
        name: &model.name,
        versions: model.versions.iter().map(VersionId::to_string).collect(),
        platform: model.platform,
        inputs: model.signature.inputs.iter().map(TensorMetadata::of).collect(),
        outputs: model.signature.outputs.iter().map(TensorMetadata::of).collect(),
        properties: &model.properties,
    };
    Ok(json(StatusCode::OK, &body))
}

#[derive(Serialize)]
struct TensorMetadata<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: Vec<i64>,
}

impl<'a> TensorMetadata<'a> {
    fn of(spec: &'a TensorSpec) -> TensorMetadata<'a> {
        TensorMetadata { name: &spec.name, datatype: spec.dtype.name(), shape: spec.to_wire() }
    }
}

fn as_object<S: Serializer>(properties: &&[(&'static str, String)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(properties.iter().map(|(key, value)| (key, value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_paths_of_inference_are_known_without_the_router() {
        let target = |method: Method, path: &str| {
            let found = inference(&method, path)?;
            Some(found.map(|Target(model)| (model.name, model.version.map(VersionId::number))).map_err(|_| ()))
        };
        let post = |path: &str| target(Method::POST, path);
        assert_eq!(post("/v2/models/m/infer"), Some(Ok(("m".into(), None))));
        assert_eq!(post("/v2/models/m/versions/12/infer"), Some(Ok(("m".into(), Some(12)))));
        assert_eq!(post("/v2/models/m/versions/0/infer"), Some(Err(())));
        assert_eq!(post(&format!("/v2/models/{}/infer", "m".repeat(MAX_NAME_BYTES + 1))), Some(Err(())));
        assert_eq!(target(Method::GET, "/v2/models/m/infer"), None);
        for path in [
            "/v2/models/m/infer/",
            "/v2/models//infer",
            "/v2/models/infer",
            "/v2/models/a%2Fb/infer",
            "/v2/models/m/versions//infer",
            "/v2/models/m/versions/1/2/infer",
            "/v2/models/m/1/infer",
            "/v2/models/m/versions/infer",
            "/v2/models//versions/1/infer",
            "/v2/models/m/ready",
            "/v3/models/m/infer",
        ] {
            assert_eq!(post(path), None, "{path}");
        }
    }

    #[test]
    fn an_own_host_is_an_address_or_localhost() {
        for host in ["localhost", "LOCALHOST:8003", "127.0.0.1:8003", "127.0.0.1", "[::1]:8003", "[::1]"] {
            assert!(is_own(host), "{host}");
        }
        for host in
            ["evil.example", "evil.example:8003", "localhost.evil.example:8003", "127.0.0.1.evil.example", ":8003"]
        {
            assert!(!is_own(host), "{host}");
        }
    }
}
