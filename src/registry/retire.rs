//! The end of versions: unpublished by the writer, drained, joined and dropped here, on a thread of its own.
//!
//! A version is closed only when nobody but this thread holds it: a request that chose it just before it was
//! unpublished still gets its answer. What is still in use at the deadline is closed and left to its last user.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use super::cache::Cache;
use super::source::Key;
use super::version::Version;

/// How often versions that are still in use are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// What the threads of a version that nobody uses may take to end, whatever the deadline.
const JOIN_GRACE: Duration = Duration::from_secs(1);

pub struct Retiring {
    pub version: Arc<Version>,
    /// Named where the version left the index with it; a replaced version did not.
    pub key: Option<Key>,
    pub deadline: Instant,
}

/// Runs until the sender is gone and everything is retired. `retired` is told of every version's end.
pub fn run(arriving: Receiver<Retiring>, cache: &Cache, retired: impl Fn(Option<Key>)) {
    let mut pending: Vec<Retiring> = Vec::new();
    loop {
        let arrived = if pending.is_empty() {
            arriving.recv().map_err(|_| TryRecvError::Disconnected)
        } else {
            arriving.try_recv()
        };
        match arrived {
            Ok(retiring) => pending.push(retiring),
            Err(TryRecvError::Disconnected) if pending.is_empty() => return,
            Err(_) => thread::park_timeout(LOOK_INTERVAL),
        }
        let now = Instant::now();
        for retiring in std::mem::take(&mut pending) {
            let Retiring { version, key, deadline } = retiring;
            match Arc::try_unwrap(version) {
                Ok(version) => {
                    finish(version, deadline, cache);
                    retired(key);
                }
                Err(version) if now >= deadline => {
                    version.scheduler.close();
                    tracing::warn!(
                        model = &**version.name(),
                        version = %version.id(),
                        "still in use at the drain timeout: closed and left to its last request"
                    );
                    retired(key);
                }
                Err(version) => pending.push(Retiring { version, key, deadline }),
            }
        }
    }
}

/// Joins and drops a version that nobody uses any more; its files go last.
fn finish(version: Version, deadline: Instant, cache: &Cache) {
    let Version { scheduler, cached, .. } = version;
    if scheduler.join(deadline.max(Instant::now() + JOIN_GRACE)).is_ok() {
        drop(scheduler);
        cache.release(cached);
    }
    // Otherwise a run that does not end keeps its instance, and with it the files.
}
