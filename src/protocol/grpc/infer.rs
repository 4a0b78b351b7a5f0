//! `ModelInfer`, which nearly all calls are: from its headers to its answer, without what tonic does for calls of any
//! kind. `read` and `infer` are a stream's, too.
//!
//! A message that is not compressed is gathered, decoded and encoded in memory of its length; tonic inflates and
//! compresses the others. Limits, deadlines and the permit are `intake`'s to hold.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http_body::Frame;
use http_body_util::BodyExt;
use prost::Message;
use tonic::codec::{CompressionEncoding, EncodeBody, SingleMessageCompressionOverride};
use tonic::codegen::tokio_stream::once;
use tonic::{Status, Streaming};
use tonic_prost::ProstEncoder;

use super::codec::{self, CheckedDecoder};
use super::intake::{Admitted, Framing, Intake, Inward, LONG, Outward, PREFIX, Places};
use super::intake::{at_length, check_announced, grow_to};
use super::metadata::{self, Terms};
use super::proto::{ModelInferRequest, ModelInferResponse};
use super::{Grpc, convert, refusal, trailers};
use crate::engine::{Engine, Trace};
use crate::error::{Error, Result};
use crate::protocol::common;
use crate::request::InferResponse;

const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GOOD: HeaderValue = HeaderValue::from_static("0");
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// Reads the headers and admits the call, before a byte of its body is read; then its message, and what answers it.
pub(super) async fn answer(grpc: &Grpc, trace: &Trace, mut request: Request) -> Result<Response> {
    let limit = grpc.config.max_message_bytes;
    let headers = request.headers_mut();
    let declared = metadata::declared_bytes(headers);
    let terms = Terms::read(headers)?;
    check_announced(declared, limit)?;
    let permit = grpc.engine.admit(trace, declared)?;
    let intake = Intake::new(Some(permit), terms.timeout);
    let framing = Framing::new(limit, terms.encoding.is_some());
    let body = Inward::new(request.into_body(), framing, grpc.config.body_timeout, intake.clone());
    let response = async {
        let message = read(body, &intake, terms.encoding, limit).await?;
        infer(&grpc.engine, &grpc.places, trace, intake.take()?, message).await
    };
    let response = intake.follow(response, &grpc.places).await??;
    Ok(respond(response, terms.answers, &grpc.places))
}

/// The one message of a body, decoded. It is compressed, if at all, as the call's headers say.
pub(super) async fn read<B>(
    body: Inward<B>,
    intake: &Intake,
    encoding: Option<CompressionEncoding>,
    limit: usize,
) -> Result<ModelInferRequest>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
{
    let why = |status| {
        let refused = intake.end().refused.or_else(|| refusal(&status));
        refused.unwrap_or_else(|| Error::internal("a message was refused without a reason"))
    };
    match encoding {
        None => codec::decode(gather(body).await.map_err(why)?),
        Some(_) => inflated(body, encoding, limit).await.map_err(why),
    }
}

/// The content of a message that is not compressed. Tensors end a message, which ends at a multiple of
/// [`common::ALIGNMENT`]: the last of them, if its length is a multiple, too, lies where engines compute on it.
async fn gather<B>(mut body: Inward<B>) -> Result<Bytes, Status>
where
    B: http_body::Body<Data = Bytes> + Unpin,
{
    let mut message = BytesMut::new();
    while let Some(frame) = body.frame().await {
        // Trailers say nothing.
        let Ok(data) = frame?.into_data() else { continue };
        let expected = body.expected();
        if message.capacity() < expected {
            common::move_aligned(&mut message, expected, expected);
        }
        message.extend_from_slice(&data);
    }
    let mut content = message.freeze();
    // The body has ended well: it had a prefix.
    content.advance(PREFIX.min(content.len()));
    Ok(content)
}

async fn inflated<B>(
    body: Inward<B>,
    encoding: Option<CompressionEncoding>,
    limit: usize,
) -> Result<ModelInferRequest, Status>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
{
    let mut messages = Streaming::new_request(CheckedDecoder::default(), body, encoding, Some(limit));
    let message = messages.message().await?;
    // To the body's end: only there is it known to hold one message.
    messages.trailers().await?;
    message.ok_or_else(|| Status::internal("the message ended before it was whole"))
}

/// From a decoded message to what answers it.
pub(super) async fn infer(
    engine: &Engine,
    places: &Arc<Places>,
    trace: &Trace,
    admitted: Admitted,
    message: ModelInferRequest,
) -> Result<InferResponse> {
    let Admitted { mut permit, timeout } = admitted;
    let classes = convert::classes(&message.outputs)?;
    let mut request = convert::request(message)?;
    request.timeout = sooner(request.timeout, timeout);
    // What a compressed message or typed contents have grown to.
    let bytes = request.inputs.iter().map(|input| input.tensor.data().len()).sum();
    grow_to(&mut permit, bytes)?;
    let response = engine.infer(trace, request, permit).await?;
    if classes.work(&response) <= LONG {
        return classes.of(response);
    }
    let _place = places.take().await;
    at_length(|| classes.of(response))
}

fn sooner(first: Option<Duration>, second: Option<Duration>) -> Option<Duration> {
    first.into_iter().chain(second).min()
}

/// The answer, whose body is encoded as it is written.
fn respond(response: InferResponse, encoding: Option<CompressionEncoding>, places: &Arc<Places>) -> Response {
    let timing = HeaderValue::try_from(common::server_timing(&response)).map(common::passing);
    let (message, permit) = convert::response(response);
    let bytes: usize = message.raw_output_contents.iter().map(Bytes::len).sum();
    let places = (bytes > LONG).then(|| Arc::clone(places));
    let body = match encoding {
        None => Body::new(Outward::new(Plain { message: Some(message), over: false }, permit, places)),
        Some(encoding) => Body::new(Outward::new(compressed(message, encoding), permit, places)),
    };
    let mut answer = Response::new(body);
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, GRPC);
    encoding.and_then(|encoding| headers.insert(metadata::ENCODING, metadata::name(encoding)));
    timing.ok().and_then(|timing| headers.insert(common::SERVER_TIMING, timing));
    answer
}

fn compressed(message: ModelInferResponse, encoding: CompressionEncoding) -> tonic::body::Body {
    let (encoder, default) = (ProstEncoder::default(), SingleMessageCompressionOverride::default());
    tonic::body::Body::new(EncodeBody::new_server(encoder, once(Ok(message)), Some(encoding), default, None))
}

/// An answer that is not compressed: one message, then the good end of a call.
struct Plain {
    message: Option<ModelInferResponse>,
    over: bool,
}

impl http_body::Body for Plain {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let frame = match self.message.take().map(|message| framed(&message)) {
            Some(Ok(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
            Some(Err(error)) => Frame::trailers(trailers(&error)),
            None => Frame::trailers(HeaderMap::from_iter([(STATUS, GOOD)])),
        };
        self.over = true;
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.over
    }
}

/// A message behind its prefix.
fn framed(message: &impl Message) -> Result<Bytes> {
    let bytes = message.encoded_len();
    let length = u32::try_from(bytes).map_err(|_| Error::too_large(format!("the answer has {bytes} bytes")))?;
    let mut wire = Vec::with_capacity(PREFIX + bytes);
    wire.push(0);
    wire.extend_from_slice(&length.to_be_bytes());
    message.encode_raw(&mut wire);
    Ok(wire.into())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    struct Chunks(VecDeque<Bytes>);

    impl http_body::Body for Chunks {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.pop_front().map(|chunk| Ok(Frame::data(chunk))))
        }
    }

    fn request(bytes: usize) -> ModelInferRequest {
        ModelInferRequest {
            model_name: "m".into(),
            raw_input_contents: vec![vec![7; bytes].into()],
            ..Default::default()
        }
    }

    proptest! {
        #[test]
        fn chunking_changes_nothing(bytes in 0usize..40, sizes in proptest::collection::vec(0usize..12, 0..20)) {
            let mut rest = framed(&request(bytes)).unwrap();
            let mut chunks: VecDeque<Bytes> = sizes.iter().map(|size| rest.split_to(rest.len().min(*size))).collect();
            chunks.push_back(rest);
            let intake = Intake::default();
            let body = Inward::new(Chunks(chunks), Framing::new(100, false), Duration::MAX, intake.clone());
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            prop_assert_eq!(runtime.block_on(read(body, &intake, None, 100)), Ok(request(bytes)));
        }
    }

    #[tokio::test]
    async fn a_large_tensor_lies_where_engines_compute_on_it() {
        for sizes in [vec![], vec![100, 5000], vec![3; 2000]] {
            let mut rest = framed(&request(8192)).unwrap();
            let mut chunks: VecDeque<Bytes> =
                sizes.into_iter().map(|size| rest.split_to(rest.len().min(size))).collect();
            chunks.push_back(rest);
            let intake = Intake::default();
            let body = Inward::new(Chunks(chunks), Framing::new(10_000, false), Duration::MAX, intake.clone());
            let message = read(body, &intake, None, 10_000).await.unwrap();
            assert_eq!(message, request(8192));
            assert!((message.raw_input_contents[0].as_ptr() as usize).is_multiple_of(common::ALIGNMENT));
        }
    }

    #[tokio::test]
    async fn an_answer_reads_the_same_from_here_and_from_tonic() {
        let message = ModelInferResponse { id: "7".into(), ..Default::default() };
        let encoder = ProstEncoder::<ModelInferResponse>::default();
        let plain = SingleMessageCompressionOverride::default();
        let tonics = EncodeBody::new_server(encoder, once(Ok(message.clone())), None, plain, None);
        let tonics = tonics.collect().await.unwrap();
        let ours = Plain { message: Some(message), over: false }.collect().await.unwrap();
        assert_eq!(ours.trailers(), tonics.trailers());
        assert_eq!(ours.to_bytes(), tonics.to_bytes());
    }
}
