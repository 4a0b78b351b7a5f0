//! `ModelStreamInfer`: many requests on one call, many of them in the server at once, answered in the order in which
//! they came.
//!
//! `messages` cuts the call's body, so that each message is taken in and admitted as a unary call's; [`Answers`] reads
//! while there is room, runs what it has read, and gives what is answered; `outward` holds what each answer holds until
//! it is written. A request that is refused is an answer like any other, and the stream goes on; only what leaves it
//! unclear where the next message begins ends the stream, after everything before it has been answered.
//!
//! Invariants: a stream has no task of its own: it moves when its connection asks for bytes, and dropped with it, every
//! request on it leaves the server. No more requests of a stream are in the server, from their first byte to their last
//! answered, than [`Config::max_stream_requests`].
//!
//! [`Config::max_stream_requests`]: super::Config::max_stream_requests

mod messages;
mod outward;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::FuturesOrdered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tonic::codec::CompressionEncoding;
use tonic::codegen::tokio_stream::Stream;
use tonic::{Request, Status};

use super::intake::{Admitted, Framing, Intake, Inward, LONG, Places, check_announced};
use super::metadata::Terms;
use super::proto::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use super::{Config, ORIGIN, convert, infer, status_of};
use crate::engine::{Engine, Trace};
use crate::error::{Error, Kind, Result};
use crate::protocol::common::{self, expired};
use crate::request::{Permit, Phase};
pub(super) use messages::Messages;
pub(super) use outward::{Outlet, Outward};

/// `ModelStreamInfer` calls open at once on the whole server.
pub(super) const MAX_STREAMS: usize = 1024;

/// Requests of one stream in the server at once, unless configured.
pub(super) const DEFAULT_MAX_STREAM_REQUESTS: usize = 64;

/// Why a stream takes no more messages, whatever its client does.
pub(super) type Closing = Pin<Box<dyn Future<Output = Error> + Send>>;

/// Completes when the server drains, or when the caller's time is over, and says when that is.
pub(super) fn closing(mut phases: watch::Receiver<Phase>, timeout: Option<Duration>) -> (Closing, Option<Instant>) {
    let expiry = timeout.map(tokio::time::sleep);
    let deadline = expiry.as_ref().map(tokio::time::Sleep::deadline);
    let over = async move {
        match expiry {
            Some(expiry) => expiry.await,
            None => std::future::pending().await,
        }
    };
    let closing = async move {
        tokio::select! {
            // An error is the sender's end, which outlives every stream.
            _ = phases.wait_for(|phase| *phase >= Phase::Draining) => {
                Error::new(Kind::NotReady, "server is not taking more requests on this stream: it is draining")
            }
            () = over => expired(),
        }
    };
    (Box::pin(closing), deadline)
}

/// Takes in one message after the other.
struct Reader {
    engine: Arc<Engine>,
    messages: Messages,
    encoding: Option<CompressionEncoding>,
    config: Config,
    closing: Closing,
    deadline: Option<Instant>,
    /// Of this stream.
    room: Arc<Semaphore>,
    /// For decoding long messages.
    places: Arc<Places>,
}

/// A request; or none, as the client sends no more; or why no more are taken.
type Read = Result<Option<Arrived>>;

/// Gives the reader back with what it read.
type Reading = Pin<Box<dyn Future<Output = (Reader, Read)> + Send>>;

/// A request as it came in: decoded, or refused and known by its id.
struct Arrived {
    room: OwnedSemaphorePermit,
    trace: Trace,
    request: Result<(ModelInferRequest, Admitted), (String, Error)>,
}

impl Reader {
    async fn read(mut self) -> (Reader, Read) {
        let read = self.next().await;
        (self, read)
    }

    async fn next(&mut self) -> Read {
        let room = Arc::clone(&self.room).acquire_owned().await;
        let room = room.map_err(|_| Error::internal("a stream's semaphore is closed"))?;
        let begun = tokio::select! {
            biased;
            error = &mut self.closing => return Err(error),
            begun = poll_fn(|cx| self.messages.poll_begin(cx)) => begun?,
        };
        if !begun {
            return Ok(None);
        }
        let trace = self.engine.begin(ORIGIN);
        let request = match self.receive(&trace).await {
            Ok(received) => Ok(received),
            Err(error) => match self.pass_over(&error).await {
                Some(id) => Err((id, error)),
                None => {
                    trace.finish(Some(&error));
                    return Err(error);
                }
            },
        };
        Ok(Some(Arrived { room, trace, request }))
    }

    /// As a unary call's message is: a permit first, which grows with what arrives.
    async fn receive(&mut self, trace: &Trace) -> Result<(ModelInferRequest, Admitted)> {
        let announced = self.messages.announced();
        check_announced(announced, self.config.max_message_bytes)?;
        let permit = self.engine.admit(trace, announced)?;
        let timeout = self.deadline.map(|deadline| deadline.saturating_duration_since(permit.arrived().into()));
        let intake = Intake::new(Some(permit), timeout);
        let Config { max_message_bytes, body_timeout, .. } = self.config;
        let framing = Framing::new(max_message_bytes, self.encoding.is_some());
        let body = Inward::new(self.messages.clone(), framing, body_timeout, intake.clone());
        let request = infer::read(body, &intake, self.encoding, max_message_bytes);
        let request = intake.follow(request, &self.places).await??;
        Ok((request, intake.take()?))
    }

    /// Passes over the rest of a message that is refused, so that the stream goes on. `None` where it cannot.
    async fn pass_over(&mut self, error: &Error) -> Option<String> {
        if matches!(error.kind(), Kind::RequestTimeout | Kind::DeadlineExceeded | Kind::Cancelled) {
            return None;
        }
        let passed = poll_fn(|cx| self.messages.poll_skip(self.config.max_message_bytes, cx));
        tokio::time::timeout(self.config.body_timeout, passed).await.ok().flatten()
    }
}

/// What became of a request.
struct Answered {
    room: OwnedSemaphorePermit,
    trace: Trace,
    id: String,
    /// The caller asked for a mark on the last answer to its request, which is the only one.
    marked: bool,
    outcome: Result<(ModelInferResponse, Permit)>,
}

impl Answered {
    async fn to(arrived: Arrived, engine: Arc<Engine>, places: Arc<Places>) -> Answered {
        let Arrived { room, trace, request } = arrived;
        let (request, admitted) = match request {
            Ok(request) => request,
            Err((id, error)) => return Answered { room, trace, id, marked: false, outcome: Err(error) },
        };
        let id = request.id.clone();
        let marked = convert::wants_final_mark(&request.parameters);
        let outcome = match marked {
            Ok(_) => infer::infer(&engine, &places, &trace, admitted, request).await.map(convert::response),
            Err(ref error) => Err(error.clone()),
        };
        Answered { room, trace, id, marked: marked.unwrap_or_default(), outcome }
    }

    fn is_long(&self) -> bool {
        let bytes = |(message, _): &(ModelInferResponse, _)| message.raw_output_contents.iter().map(|b| b.len()).sum();
        self.outcome.as_ref().map_or(0, bytes) > LONG
    }

    /// The answer as a message, and what it holds until it is written.
    fn message(self) -> (ModelStreamInferResponse, outward::Held) {
        let (mut response, permit, error_message) = match self.outcome {
            Ok((response, permit)) => (response, Some(permit), String::new()),
            Err(error) => (convert::refused(self.id, &self.trace), None, common::message(&error).to_string()),
        };
        if self.marked {
            convert::mark_final(&mut response);
        }
        (ModelStreamInferResponse { error_message, infer_response: Some(response) }, (permit, self.room))
    }
}

/// The answers of one stream, and all that is in the server for it.
pub(super) struct Answers {
    engine: Arc<Engine>,
    places: Arc<Places>,
    /// `None` once no more is read.
    reading: Option<Reading>,
    running: FuturesOrdered<Pin<Box<dyn Future<Output = Answered> + Send>>>,
    /// The next answer.
    next: Option<Answered>,
    /// What the call ends with once all is answered.
    end: Option<Error>,
    errors_end_it: bool,
    outlet: Outlet,
}

/// Takes answers past tonic, in the extensions of a request whose body it does not see.
#[derive(Clone)]
struct HandedOver(Arc<Mutex<Option<Answers>>>);

impl Answers {
    /// The answers to what `messages` brings, given through `outlet`.
    pub(super) fn new(
        engine: &Arc<Engine>,
        messages: Messages,
        terms: Terms,
        config: Config,
        places: &Arc<Places>,
        outlet: Outlet,
    ) -> Answers {
        let (closing, deadline) = closing(engine.watch_phase(), terms.timeout);
        let reader = Reader {
            engine: Arc::clone(engine),
            messages,
            encoding: terms.encoding,
            room: Arc::new(Semaphore::new(config.max_stream_requests.min(Semaphore::MAX_PERMITS))),
            config,
            closing,
            deadline,
            places: Arc::clone(places),
        };
        Answers {
            engine: Arc::clone(engine),
            places: Arc::clone(places),
            reading: Some(Box::pin(reader.read())),
            running: FuturesOrdered::new(),
            next: None,
            end: None,
            errors_end_it: terms.errors_end_stream,
            outlet,
        }
    }

    pub(super) fn hand_over(self, extensions: &mut http::Extensions) {
        extensions.insert(HandedOver(Arc::new(Mutex::new(Some(self)))));
    }

    /// Those handed over, in the method that gives them.
    pub(super) fn reach<T>(request: &Request<T>) -> Result<Answers, Status> {
        let handed_over = request.extensions().get::<HandedOver>();
        let answers = handed_over.and_then(|HandedOver(it)| it.lock().unwrap_or_else(PoisonError::into_inner).take());
        answers.ok_or_else(|| status_of(&Error::internal("a stream came in past its reader")))
    }

    /// Reads what has arrived, as far as there is room.
    fn read(&mut self, cx: &mut Context<'_>) {
        while let Some(reading) = &mut self.reading {
            let Poll::Ready((reader, read)) = reading.as_mut().poll(cx) else { return };
            self.reading = None;
            match read {
                Ok(Some(arrived)) => {
                    let answered = Answered::to(arrived, Arc::clone(&self.engine), Arc::clone(&self.places));
                    self.running.push_back(Box::pin(answered));
                    self.reading = Some(Box::pin(reader.read()));
                }
                Ok(None) => {}
                Err(error) => self.end = Some(error),
            }
        }
    }

    fn give(&mut self, answered: Answered) -> Result<ModelStreamInferResponse, Status> {
        answered.trace.finish(answered.outcome.as_ref().err());
        if self.errors_end_it
            && let Err(error) = &answered.outcome
        {
            let status = status_of(error);
            (self.reading, self.running, self.end) = (None, FuturesOrdered::new(), None);
            return Err(status);
        }
        let (message, held) = answered.message();
        self.outlet.give(held);
        Ok(message)
    }
}

impl Stream for Answers {
    type Item = Result<ModelStreamInferResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        this.read(cx);
        if this.next.is_none() {
            match Pin::new(&mut this.running).poll_next(cx) {
                Poll::Ready(None) if this.reading.is_none() => {
                    return Poll::Ready(this.end.take().map(|error| Err(status_of(&error))));
                }
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
                Poll::Ready(answered) => this.next = answered,
            }
        }
        match this.next.take_if(|next| this.outlet.takes(next.is_long())) {
            Some(answered) => Poll::Ready(Some(this.give(answered))),
            None => Poll::Pending,
        }
    }
}
