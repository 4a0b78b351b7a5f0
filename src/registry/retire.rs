//! The end of versions: unpublished by the writer, drained, joined and dropped here, on a thread of its own.
//!
//! A version is closed only when nobody but this thread holds it: a request that chose it just before it was
//! unpublished still gets its answer. What is in use at its deadline leaves the index and is closed; it is kept here
//! until it is idle, so that engines are dropped, and files released, on this thread only. Nothing is waited for: one
//! run that does not end holds up no other retirement.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::cache::Cache;
use super::source::Key;
use super::version::Version;

/// How often versions that are still in use are looked at, before their deadline and after it.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
const LINGER_INTERVAL: Duration = Duration::from_secs(1);

/// What the threads of a version that nobody uses may take to end, whatever the deadline.
const JOIN_GRACE: Duration = Duration::from_secs(1);

pub struct Retiring {
    pub version: Arc<Version>,
    /// Named where the version left the index with it; a replaced version did not.
    pub key: Option<Key>,
    pub deadline: Instant,
}

/// Runs until the sender is gone and every version is retired or past its deadline. `retired` is told of each once.
pub fn run(arriving: Receiver<Retiring>, cache: &Cache, retired: impl Fn(Option<Key>)) {
    let mut pending: Vec<Retiring> = Vec::new();
    // Past their deadline. No more of them than there are runs that do not end.
    let mut lingering: Vec<Arc<Version>> = Vec::new();
    loop {
        let arrived = match (pending.is_empty(), lingering.is_empty()) {
            (true, true) => arriving.recv().map_err(|_| RecvTimeoutError::Disconnected),
            (true, false) => arriving.recv_timeout(LINGER_INTERVAL),
            (false, _) => arriving.recv_timeout(LOOK_INTERVAL),
        };
        match arrived {
            Ok(retiring) => pending.push(retiring),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) if pending.is_empty() => return,
            Err(RecvTimeoutError::Disconnected) => thread::park_timeout(LOOK_INTERVAL),
        }
        let now = Instant::now();
        lingering = lingering.into_iter().filter_map(|version| finish(version, cache).err()).collect();
        for Retiring { version, key, deadline } in std::mem::take(&mut pending) {
            match finish(version, cache) {
                Ok(()) => retired(key),
                Err(version) if is_over(&version, deadline, now) => {
                    version.scheduler.close();
                    tracing::warn!(
                        model = &**version.name(),
                        version = %version.id(),
                        "still in use at the drain timeout: closed, and kept until its last run ends"
                    );
                    retired(key);
                    lingering.push(version);
                }
                Err(version) => pending.push(Retiring { version, key, deadline }),
            }
        }
    }
}

fn is_over(version: &Arc<Version>, deadline: Instant, now: Instant) -> bool {
    let unused = Arc::strong_count(version) == 1;
    now >= if unused { deadline + JOIN_GRACE } else { deadline }
}

/// Drops a version that nobody uses any more and whose threads have ended, its files last; gives back any other.
fn finish(version: Arc<Version>, cache: &Cache) -> Result<(), Arc<Version>> {
    let version = Arc::try_unwrap(version)?;
    if version.scheduler.join(Instant::now()).is_err() {
        return Err(Arc::new(version));
    }
    let Version { scheduler, cached, .. } = version;
    drop(scheduler);
    cache.release(cached);
    Ok(())
}
