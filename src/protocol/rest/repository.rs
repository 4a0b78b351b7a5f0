//! The repository extension: what is there, and loading and unloading it. On a data port, whoever can predict could
//! otherwise take a model away from everybody: that is switched on apart.

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::envelope::Object;
use super::json::{check_depth, malformed};
use super::routes::Target;
use super::{App, Refusal, body, json, parameters};
use crate::engine::IndexEntry;
use crate::error::{Error, Kind, Result};
use crate::protocol::common::{self, MAX_REPOSITORY_BYTES};

#[derive(Default, Deserialize)]
struct Filter {
    #[serde(default)]
    ready: bool,
}

#[derive(Default, Deserialize)]
struct Change<'a> {
    #[serde(borrow)]
    parameters: Option<&'a RawValue>,
}

/// Every version there is, or every ready one, with its state and the reason for it.
pub(super) async fn index(State(app): State<App>, body: Body) -> Result<Response, Refusal> {
    #[derive(Serialize)]
    struct Row<'a> {
        name: &'a str,
        #[serde(flatten)]
        version: Option<Version<'a>>,
    }
    #[derive(Serialize)]
    struct Version<'a> {
        version: String,
        state: &'a str,
        reason: &'a str,
    }
    let body = read(&app, body).await?;
    let filter: Filter = object(&body, app.config.max_json_depth)?;
    let entries: Vec<IndexEntry> = common::index(&app.engine, filter.ready).collect();
    let rows: Vec<Row> = entries
        .iter()
        .map(|IndexEntry { name, version, state, reason }| Row {
            name,
            version: version.map(|version| Version { version: version.to_string(), state, reason }),
        })
        .collect();
    Ok(json(StatusCode::OK, &rows))
}

/// Answers once the model's versions are ready.
pub(super) async fn load(State(app): State<App>, Target(target): Target, body: Body) -> Result<StatusCode, Refusal> {
    common::check_repository_api(&app.engine, app.config.repository_api)?;
    let body = read(&app, body).await?;
    let change: Change = object(&body, app.config.max_json_depth)?;
    app.engine.load(&target.name, parameters::of_load(change.parameters)?).await?;
    Ok(StatusCode::OK)
}

/// Answers when no request gets the model any more. No model depends on another one: parameters say nothing.
pub(super) async fn unload(State(app): State<App>, Target(target): Target, body: Body) -> Result<StatusCode, Refusal> {
    common::check_repository_api(&app.engine, app.config.repository_api)?;
    let body = read(&app, body).await?;
    let Change { .. } = object(&body, app.config.max_json_depth)?;
    app.engine.unload(&target.name).await?;
    Ok(StatusCode::OK)
}

async fn read(app: &App, body: Body) -> Result<Bytes> {
    tokio::time::timeout(app.config.body_timeout, body::read_short(body, MAX_REPOSITORY_BYTES))
        .await
        .map_err(|_| Error::new(Kind::RequestTimeout, "the request body came too slowly"))?
}

/// An empty body is an empty object.
fn object<'a, T: Default + Deserialize<'a>>(body: &'a [u8], max_depth: usize) -> Result<T> {
    if body.is_empty() {
        return Ok(T::default());
    }
    let text = std::str::from_utf8(body).map_err(|_| Error::invalid("the request JSON is not UTF-8"))?;
    check_depth(text, max_depth)?;
    let Object(object) = serde_json::from_str(text).map_err(malformed)?;
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(body: &[u8]) -> Result<Filter> {
        object(body, 64)
    }

    #[test]
    fn the_body_is_empty_or_an_object() {
        for (body, ready) in
            [("", false), ("{}", false), (r#"{"ready":true}"#, true), (r#"{"x":[1],"ready":false}"#, false)]
        {
            assert_eq!(filter(body.as_bytes()).unwrap().ready, ready, "{body}");
        }
        let deep = format!(r#"{{"x":{}{}}}"#, "[".repeat(64), "]".repeat(64));
        for body in ["null", "[]", "{", r#"{"ready":1}"#, r#"{"ready":true,"ready":true}"#, "{} x", &deep] {
            assert_eq!(filter(body.as_bytes()).map(|_| ()).unwrap_err().kind(), Kind::InvalidInput, "{body}");
        }
        assert!(filter(b"\xff").is_err());
    }
}
