//! Who decides which models are served: the folder, or requests to load and unload.
//!
//! A request is carried out by the writer, one after the other with everything else that changes the table. Whoever asked
//! is called back and waits as it likes; one who leaves stops nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::source::{Folder, Scan, SourceError};
use crate::error::{Error, Kind, Result, quoted};
use crate::request::VersionId;

/// Requests that wait or are carried out; more are refused. Each may hold one of the admin port's 64 connections, and the
/// index, which tells how it ends, must still be there to ask.
const MAX_WAITING: usize = 32;

/// Which models are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Control {
    /// All that are there at start, as they are then.
    #[default]
    None,
    /// All that are there. The folder is looked at this often.
    Poll(Duration),
    /// Those that were asked for, as they were then. The folder is looked at this often for what else is there.
    Explicit { at_start: AtStart, interval: Duration },
}

/// The models that are asked for with the start of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AtStart {
    /// All that are there then.
    All,
    Named(BTreeSet<String>),
}

impl Control {
    /// How often the folder is looked at; `None`: never again.
    pub fn interval(&self) -> Option<Duration> {
        match self {
            Control::None => None,
            Control::Poll(interval) | Control::Explicit { interval, .. } => Some(*interval),
        }
    }

    pub fn is_explicit(&self) -> bool {
        matches!(self, Control::Explicit { .. })
    }

    /// The models that are asked for at start. `None`: all, whenever they come.
    pub(super) fn asked(&self, folder: &Folder, scan: &Scan) -> Result<Option<BTreeSet<Arc<str>>>, SourceError> {
        let models = || scan.versions.keys().map(|key| Arc::clone(&key.model));
        match self {
            Control::None | Control::Poll(_) if scan.versions.is_empty() => Err(folder.empty(scan)),
            Control::None | Control::Poll(_) => Ok(None),
            Control::Explicit { at_start: AtStart::All, .. } => Ok(Some(models().collect())),
            Control::Explicit { at_start: AtStart::Named(names), .. } => {
                let models: BTreeSet<Arc<str>> = models().collect();
                match names.iter().find(|name| !models.contains(name.as_str())) {
                    Some(name) => Err(folder.unknown(name, scan)),
                    None => Ok(Some(names.iter().map(|name| name.as_str().into()).collect())),
                }
            }
        }
    }
}

/// A request to load or to unload a model.
pub struct Request {
    pub model: Arc<str>,
    pub change: Change,
    done: Done,
    _waiting: Waiting,
}

pub enum Change {
    /// As it is on disk now, but for its settings, where others are given: Triton's `ModelConfig` in JSON.
    Load {
        config: Option<String>,
    },
    Unload,
}

/// Called with what became of a request; dropped where the registry stops before it is carried out.
pub type Done = Box<dyn FnOnce(Result<()>) + Send>;

impl Request {
    /// Overloaded where too many wait.
    pub(super) fn new(model: &str, change: Change, done: Done, shared: &Arc<Shared>) -> Result<Request> {
        Ok(Request { model: model.into(), change, done, _waiting: Waiting::begin(shared)? })
    }

    pub fn answer(self, outcome: Result<()>) {
        let Request { done, _waiting, .. } = self;
        drop(_waiting);
        done(outcome);
    }
}

/// One of the requests that are counted.
struct Waiting(Arc<Shared>);

impl Waiting {
    fn begin(shared: &Arc<Shared>) -> Result<Waiting> {
        let mut progress = shared.lock();
        if progress.asking == MAX_WAITING {
            let message = format!("server is overloaded: {MAX_WAITING} requests to load or unload models wait");
            return Err(Error::new(Kind::Overloaded, message));
        }
        progress.asking += 1;
        drop(progress);
        Ok(Waiting(Arc::clone(shared)))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.lock().asking -= 1;
    }
}

// What Triton says, as clients match on it.

pub(super) fn not_explicit() -> Error {
    Error::new(Kind::NotReady, "explicit model load / unload is not allowed if polling is enabled")
}

pub(super) fn unknown(model: &str) -> Error {
    Error::not_found(format!("failed to load '{}', failed to poll from model repository", quoted(model)))
}

pub(super) fn no_version(model: &str) -> Error {
    Error::invalid(format!("failed to load '{}', no version is available", quoted(model)))
}

/// `versions`: each that failed, whether the one before it still serves, and the reason.
pub(super) fn failed<'a>(model: &str, versions: impl Iterator<Item = (VersionId, bool, &'a str)>) -> Error {
    let version = |(id, serves, reason)| {
        let state = if serves { "READY" } else { "UNAVAILABLE" };
        format!("version {id} is at {state} state: {reason};")
    };
    let versions: Vec<String> = versions.map(version).collect();
    Error::invalid(format!("load failed for model '{}': {}", quoted(model), versions.join(" ")))
}

/// Of a request that is not carried out any more.
pub fn stopping() -> Error {
    Error::new(Kind::NotReady, "server is not loading or unloading models: it is stopping")
}

/// Of a request that broke the thread which loads, and of those that find it gone.
pub(super) fn broken() -> Error {
    Error::internal("server failed to load or unload the model: its loader panicked, as the log tells")
}
