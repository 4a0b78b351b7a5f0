//! `grpc.reflection.v1` and `v1alpha`: which services there are, and their messages.
//!
//! Questions come on a stream: each is bounded as any other query is, and so are the streams.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tokio::sync::Semaphore;
use tonic::Status;
use tonic::codec::CompressionEncoding::{Deflate, Gzip};
use tonic_reflection::pb::{v1, v1alpha};
use tonic_reflection::server::Builder;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use super::intake::{Framing, Intake, Inward};
use super::metadata::Terms;
use super::stream::{Closing, Messages, closing};
use super::{MAX_QUERY_BYTES, trailers};
use crate::engine::Engine;
use crate::error::{Error, Kind, Result};

/// Streams of questions open at once on the whole server.
const MAX_STREAMS: usize = 64;

const OPEN_INFERENCE: &[u8] = tonic::include_file_descriptor_set!("open_inference");

pub(super) const SERVICES: [&str; 2] =
    [v1::server_reflection_server::SERVICE_NAME, v1alpha::server_reflection_server::SERVICE_NAME];

type Answering = BoxCloneSyncService<http::Request<tonic::body::Body>, http::Response<tonic::body::Body>, Infallible>;

pub(super) struct Reflection {
    engine: Arc<Engine>,
    v1: Answering,
    v1alpha: Answering,
    places: Arc<Semaphore>,
    body_timeout: Duration,
}

impl Reflection {
    pub(super) fn new(engine: Arc<Engine>, body_timeout: Duration) -> Result<Reflection> {
        let unreadable = |error: tonic_reflection::server::Error| {
            Error::internal(format!("the services' descriptions cannot be read: {error}"))
        };
        let v1 = described().build_v1().map_err(unreadable)?.max_decoding_message_size(MAX_QUERY_BYTES);
        let v1alpha = described().build_v1alpha().map_err(unreadable)?.max_decoding_message_size(MAX_QUERY_BYTES);
        Ok(Reflection {
            engine,
            v1: BoxCloneSyncService::new(v1.accept_compressed(Gzip).accept_compressed(Deflate)),
            v1alpha: BoxCloneSyncService::new(v1alpha.accept_compressed(Gzip).accept_compressed(Deflate)),
            places: Arc::new(Semaphore::new(MAX_STREAMS)),
            body_timeout,
        })
    }

    pub(super) async fn answer(
        &self,
        terms: Terms,
        request: http::Request<impl Body<Data = Bytes> + Send + 'static>,
    ) -> Result<http::Response<tonic::body::Body>> {
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| {
            Error::new(Kind::RateLimited, format!("more than {MAX_STREAMS} reflection streams are open"))
        })?;
        let intake = Intake::default();
        let answering = if request.uri().path().contains(SERVICES[0]) { &self.v1 } else { &self.v1alpha };
        let request = request.map(|body| {
            tonic::body::Body::new(Questions {
                messages: Messages::new(body),
                current: None,
                closing: closing(self.engine.watch_phase(), terms.timeout).0,
                framing: Framing::new(MAX_QUERY_BYTES, terms.encoding.is_some()),
                body_timeout: self.body_timeout,
                intake: intake.clone(),
            })
        });
        let Ok(response) = answering.clone().oneshot(request).await;
        // The crate ends a stream well where a question could not be read: say what became of it.
        Ok(response.map(|answers| {
            tonic::body::Body::new(answers.map_frame(move |frame| {
                let _held = &place;
                match frame.is_trailers().then(|| intake.end().refused).flatten() {
                    Some(error) => Frame::trailers(trailers(&error)),
                    None => frame,
                }
            }))
        }))
    }
}

fn described() -> Builder<'static> {
    Builder::configure()
        .register_encoded_file_descriptor_set(OPEN_INFERENCE)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// The body of a stream of questions. Ends when the server drains, or the caller's time is over.
struct Questions {
    messages: Messages,
    current: Option<Inward<Messages>>,
    closing: Closing,
    /// Of a message that has not begun.
    framing: Framing,
    body_timeout: Duration,
    intake: Intake,
}

impl Body for Questions {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        loop {
            if let Some(question) = &mut this.current {
                match Pin::new(question).poll_frame(cx) {
                    // Short enough to be inflated wherever it is read.
                    Poll::Pending if this.intake.let_go() => continue,
                    Poll::Ready(None) => this.current = None,
                    frame => return frame,
                }
            }
            if let Poll::Ready(error) = this.closing.as_mut().poll(cx) {
                this.intake.refuse(error);
                return Poll::Ready(None);
            }
            match ready!(this.messages.poll_begin(cx)) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(None),
                Err(error) => return Poll::Ready(Some(Err(this.intake.refuse(error)))),
            }
            let (messages, framing) = (this.messages.clone(), this.framing.clone());
            this.current = Some(Inward::new(messages, framing, this.body_timeout, this.intake.clone()));
        }
    }
}
