//! The response: JSON, or JSON and the bytes of the outputs asked for as binary; its headers; its compression.
//!
//! Binary outputs go out as they are, in pieces that share the engine's buffer. The body and its pieces own the request's
//! permit, so that a slow reader keeps its place in the server until it has read the answer.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, VARY};
use http::{HeaderMap, HeaderValue};
use http_body::{Frame, SizeHint};
use serde::Serialize;

use super::binary::HEADER_LENGTH;
use super::data::Flat;
use super::encoding::{self, Encoding};
use super::json::Requested;
use super::{App, JSON};
use crate::error::{Error, Result};
use crate::protocol::classification::Classes;
use crate::protocol::common;
use crate::request::{InferResponse, NamedTensor, Permit, PredictionId};
use crate::tensor::{DataType, Tensor};

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// Of an answer, those that are added on its way out included.
const MOST_HEADERS: usize = 12;

/// How the client wants its outputs.
#[derive(Debug)]
pub(super) struct Wanted {
    pub outputs: Vec<Requested>,
    /// For outputs that don't say: those listed without `binary_data`, too, as OIP's text has it.
    pub binary: bool,
    /// The outputs that are answered by classes.
    pub classes: Classes,
}

impl Wanted {
    fn as_binary(&self, output: &str) -> bool {
        let listed = self.outputs.iter().find(|wanted| wanted.name == output);
        listed.and_then(|wanted| wanted.how.binary).unwrap_or(self.binary)
    }
}

pub(super) async fn write(app: &App, response: InferResponse, wanted: Wanted, accepted: Encoding) -> Result<Response> {
    /// Compressing a byte costs about as much as formatting so many.
    const COMPRESSION_COST: usize = 8;
    let formatted: usize =
        response.outputs.iter().filter(|y| !wanted.as_binary(&y.name)).map(|y| text_length(&y.tensor)).sum();
    let compressed: usize = match accepted {
        Encoding::Identity => 0,
        Encoding::Gzip | Encoding::Deflate => response.outputs.iter().map(|y| y.tensor.data().len()).sum(),
    };
    let ranked = wanted.classes.work(&response);
    let work = formatted.saturating_add(compressed.saturating_mul(COMPRESSION_COST)).saturating_add(ranked);
    let timing = common::server_timing(&response);
    let shortest = app.config.min_compressed_bytes;
    let rendering = move || {
        let mut response = wanted.classes.of(response)?;
        response.permit.hold_answer(bytes_of(&response, &wanted))?;
        let written = render(&response, &wanted)?.compressed(accepted, shortest)?;
        response.permit.hold_answer(written.frames.iter().map(Bytes::len).sum())?;
        Ok((written, response.permit))
    };
    // What has been computed is not refused for a full pool any more.
    let (written, permit) = if app.is_long(work) { app.engine.cpu().finish(rendering).await?? } else { rendering()? };

    let mut headers = HeaderMap::with_capacity(MOST_HEADERS);
    if let Ok(timing) = HeaderValue::try_from(timing) {
        headers.insert(common::SERVER_TIMING, common::passing(timing));
    }
    headers.insert(CONTENT_TYPE, if written.json_length.is_some() { OCTETS } else { JSON });
    headers.insert(VARY, HeaderValue::from_static(ACCEPT_ENCODING.as_str()));
    if let Some(length) = written.json_length {
        headers.insert(HEADER_LENGTH, HeaderValue::from(length));
    }
    if written.encoding != Encoding::Identity {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(written.encoding.name()));
    }
    let frames = Frames { frames: written.frames.into(), permit: Arc::new(permit) };
    headers.insert(CONTENT_LENGTH, HeaderValue::from(frames.remaining()));
    let mut answer = Response::new(Body::new(frames));
    *answer.headers_mut() = headers;
    Ok(answer)
}

/// A response's body before it is sent.
#[derive(Debug)]
struct Written {
    frames: Vec<Bytes>,
    /// Bytes of JSON where binary tensors follow it.
    json_length: Option<usize>,
    encoding: Encoding,
}

impl Written {
    fn compressed(self, encoding: Encoding, shortest: usize) -> Result<Written> {
        let length: usize = self.frames.iter().map(Bytes::len).sum();
        if encoding == Encoding::Identity || length < shortest {
            return Ok(self);
        }
        let frames = vec![encoding::encode(encoding, &self.frames)?];
        Ok(Written { frames, encoding, ..self })
    }
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    id: &'a str,
    model_name: &'a str,
    model_version: &'a str,
    parameters: Parameters<'a>,
    outputs: Vec<Output<'a>>,
}

#[derive(Serialize)]
struct Parameters<'a> {
    prediction_id: &'a str,
}

#[derive(Serialize)]
struct Output<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: &'a [usize],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Flat<'a>>,
}

#[derive(Serialize)]
struct BinarySize {
    binary_data_size: usize,
}

fn render(response: &InferResponse, wanted: &Wanted) -> Result<Written> {
    let (mut outputs, mut tail, mut text) = (Vec::with_capacity(response.outputs.len()), Vec::new(), 0);
    for NamedTensor { name, tensor } in &response.outputs {
        let binary = wanted.as_binary(name);
        if binary {
            tail.push(tensor.data().clone());
        } else {
            check_text(name, tensor)?;
            text += text_length(tensor);
        }
        outputs.push(Output {
            name,
            datatype: tensor.dtype().name(),
            shape: tensor.shape().dims(),
            parameters: binary.then(|| BinarySize { binary_data_size: tensor.data().len() }),
            data: (!binary).then_some(Flat(tensor)),
        });
    }
    let (version, mut prediction) = (response.version.to_string(), [0; PredictionId::TEXT_BYTES]);
    let answer = Answer {
        id: &response.id,
        model_name: &response.model,
        model_version: &version,
        parameters: Parameters { prediction_id: response.prediction.encode(&mut prediction) },
        outputs,
    };
    /// Names, shapes and ids; more than enough for most answers.
    const ENVELOPE: usize = 512;
    let mut json = Vec::with_capacity(ENVELOPE + text);
    serde_json::to_writer(&mut json, &answer).map_err(|_| Error::internal("the response could not be written"))?;
    let json_length = (!tail.is_empty()).then_some(json.len());
    let frames = std::iter::once(Bytes::from(json)).chain(tail).filter(|frame| !frame.is_empty()).collect();
    Ok(Written { frames, json_length, encoding: Encoding::Identity })
}

/// JSON has no bytes: an output that is not UTF-8 can only go as binary.
fn check_text(output: &str, tensor: &Tensor) -> Result<()> {
    match tensor.strings().position(|element| std::str::from_utf8(element).is_err()) {
        None => Ok(()),
        Some(index) => Err(Error::invalid(format!(
            "element {index} of output '{output}' is not UTF-8, which JSON cannot carry: request the output with the \
             parameter `binary_data` true"
        ))),
    }
}

/// About what the answer takes while it is written: its tensors, and the text of those that go as JSON.
fn bytes_of(response: &InferResponse, wanted: &Wanted) -> usize {
    let of = |output: &NamedTensor| match wanted.as_binary(&output.name) {
        true => output.tensor.data().len(),
        false => output.tensor.data().len().saturating_add(text_length(&output.tensor)),
    };
    response.outputs.iter().map(of).fold(0, usize::saturating_add)
}

/// About how long a tensor is as JSON, to allocate once.
fn text_length(tensor: &Tensor) -> usize {
    let per_element = match tensor.dtype() {
        DataType::Bytes => return tensor.data().len(),
        DataType::Fp32 | DataType::Fp64 => 12,
        _ => 6,
    };
    tensor.shape().elements().saturating_mul(per_element)
}

/// A body of ready frames, none empty. It and its pieces hold the request's permit until the last byte is written or the
/// client has gone.
struct Frames {
    frames: VecDeque<Bytes>,
    permit: Arc<Permit>,
}

impl Frames {
    fn remaining(&self) -> u64 {
        self.frames.iter().map(|frame| frame.len() as u64).sum()
    }
}

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Frames { frames, permit } = &mut *self;
        let piece = frames.front_mut().map(|frame| common::piece(frame, permit));
        if self.frames.front().is_some_and(Bytes::is_empty) {
            self.frames.pop_front();
        }
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.remaining())
    }
}
