//! What a listener hands its requests to: routes, or routes and a shorter way to the one that nearly all requests take.

use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::response::Response;
use tower::ServiceExt;

pub type Answering = Pin<Box<dyn Future<Output = Response> + Send>>;

/// Answers every request, one that it does not know too.
#[derive(Clone)]
pub struct Service(Arc<dyn Fn(Request) -> Answering + Send + Sync>);

impl Service {
    pub fn new(answer: impl Fn(Request) -> Answering + Send + Sync + 'static) -> Service {
        Service(Arc::new(answer))
    }

    pub fn routed(router: Router) -> Service {
        Service::new(move |request| routed(&router, request))
    }

    pub fn call(&self, request: Request) -> Answering {
        self.0(request)
    }
}

pub(super) fn routed(router: &Router, request: Request) -> Answering {
    let answered = router.clone().oneshot(request);
    Box::pin(async { answered.await.unwrap_or_else(|never| match never {}) })
}
