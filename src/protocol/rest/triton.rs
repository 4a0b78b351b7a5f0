//! Configurations and statistics of models, as Triton's clients read them: the messages of the gRPC service as JSON,
//! with the fields' own names, every default written, 64-bit integers as numbers, enumerations by name.

use std::sync::LazyLock;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

use super::routes::Target;
use super::{App, JSON, Refusal};
use crate::error::{Error, Result};
use crate::protocol::triton;

const CONFIG: &str = "inference.ModelConfig";
const STATISTICS: &str = "inference.ModelStatisticsResponse";

pub(super) async fn config(State(app): State<App>, Target(target): Target) -> Result<Response, Refusal> {
    let config = triton::config(app.engine.setup(&target)?);
    Ok(answer(written(CONFIG, &config)?))
}

/// Of one version, or of every version of a model.
pub(super) async fn statistics(State(app): State<App>, Target(target): Target) -> Result<Response, Refusal> {
    let statistics = triton::statistics(app.engine.statistics(Some(&target))?);
    Ok(answer(written(STATISTICS, &statistics)?))
}

pub(super) async fn all_statistics(State(app): State<App>) -> Result<Response, Refusal> {
    let statistics = app.engine.statistics(None)?;
    // As long as there are versions: not for an I/O thread.
    let body = app.engine.cpu().run(move || written(STATISTICS, &triton::statistics(statistics))).await??;
    Ok(answer(body))
}

fn answer(body: Vec<u8>) -> Response {
    (StatusCode::OK, [(CONTENT_TYPE, JSON)], body).into_response()
}

/// The message, of that full name, as JSON.
fn written(name: &str, message: &impl Message) -> Result<Vec<u8>> {
    static DESCRIPTORS: LazyLock<Option<DescriptorPool>> = LazyLock::new(|| {
        let files: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/open_inference.bin"));
        DescriptorPool::decode(files).ok()
    });
    // Compiled from one source in one build: only a defect of it could make them differ.
    let unwritable = || Error::internal(format!("a message of type `{name}` cannot be written as JSON"));
    let descriptor = DESCRIPTORS.as_ref().and_then(|pool| pool.get_message_by_name(name)).ok_or_else(unwritable)?;
    let dynamic = DynamicMessage::decode(descriptor, &*message.encode_to_vec()).map_err(|_| unwritable())?;
    let options =
        SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false).stringify_64_bit_integers(false);
    let mut body = Vec::new();
    dynamic.serialize_with_options(&mut serde_json::Serializer::new(&mut body), &options).map_err(|_| unwritable())?;
    Ok(body)
}
