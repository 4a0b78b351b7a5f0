//! The repository extension's read side. Loading and unloading are refused: on the data port, whoever can predict could
//! otherwise take a model away from everybody.

use axum::body::{Body, to_bytes};
use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::envelope::Object;
use super::json::{check_depth, malformed};
use super::{App, Refusal, json};
use crate::engine::IndexEntry;
use crate::error::{Error, Kind, Result};
use crate::protocol::common;

/// Longest body of a repository call, in bytes: it holds one flag.
const MAX_BODY_BYTES: usize = 64 << 10;

#[derive(Default, Deserialize)]
struct Filter {
    #[serde(default)]
    ready: bool,
}

/// Every version there is, or every ready one, with its state and the reason for it.
pub(super) async fn index(State(app): State<App>, body: Body) -> Result<Response, Refusal> {
    #[derive(Serialize)]
    struct Row<'a> {
        name: &'a str,
        version: String,
        state: &'a str,
        reason: &'a str,
    }
    let body = tokio::time::timeout(app.config.body_timeout, to_bytes(body, MAX_BODY_BYTES))
        .await
        .map_err(|_| Error::new(Kind::RequestTimeout, "the request body came too slowly"))?
        .map_err(|_| {
            Error::too_large(format!("the request body is cut short or longer than {MAX_BODY_BYTES} bytes"))
        })?;
    let filter = filter(&body, app.config.max_json_depth)?;
    let entries: Vec<IndexEntry> = common::index(&app.engine, filter.ready).collect();
    let rows: Vec<Row> = entries
        .iter()
        .map(|entry| Row {
            name: &entry.name,
            version: entry.version.to_string(),
            state: entry.state,
            reason: &entry.reason,
        })
        .collect();
    Ok(json(StatusCode::OK, &rows))
}

fn filter(body: &[u8], max_depth: usize) -> Result<Filter> {
    if body.is_empty() {
        return Ok(Filter::default());
    }
    let text = std::str::from_utf8(body).map_err(|_| Error::invalid("the request JSON is not UTF-8"))?;
    check_depth(text, max_depth)?;
    let Object(filter) = serde_json::from_str(text).map_err(malformed)?;
    Ok(filter)
}

pub(super) async fn refuse() -> Refusal {
    Refusal(Error::new(
        Kind::Forbidden,
        "explicit model load / unload is not allowed on this port: add, replace or remove versions in the registry's \
         folder",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_is_empty_or_an_object() {
        for (body, ready) in
            [("", false), ("{}", false), (r#"{"ready":true}"#, true), (r#"{"x":[1],"ready":false}"#, false)]
        {
            assert_eq!(filter(body.as_bytes(), 64).unwrap().ready, ready, "{body}");
        }
        let deep = format!(r#"{{"x":{}{}}}"#, "[".repeat(64), "]".repeat(64));
        for body in ["null", "[]", "{", r#"{"ready":1}"#, r#"{"ready":true,"ready":true}"#, "{} x", &deep] {
            assert_eq!(filter(body.as_bytes(), 64).map(|_| ()).unwrap_err().kind(), Kind::InvalidInput, "{body}");
        }
        assert!(filter(b"\xff", 64).is_err());
    }
}
