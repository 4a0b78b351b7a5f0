//! What threads count, each in a share of its own: threads that count in one place hand its cache lines to and fro, which
//! takes longer than counting.
//!
//! Threads: any. A share's lock is taken by its thread, or the few that have one together, and by those who read.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::lock;

/// As many threads as read requests on a large machine, and more workers than run at once on a small one.
const SHARES: usize = 8;

static THREADS: AtomicUsize = AtomicUsize::new(0);
thread_local!(static MINE: Cell<usize> = Cell::new(THREADS.fetch_add(1, Ordering::Relaxed) % SHARES));

pub(super) struct Shares<T>([Share<T>; SHARES]);

/// On cache lines of its own; processors fetch them in pairs. Filled by the first thread that counts in it, so that what it
/// points to lies among that thread's memory, and those that nobody counts in take a pair of lines and no more.
#[repr(align(128))]
struct Share<T>(Mutex<Option<Box<T>>>);

impl<T> Default for Shares<T> {
    fn default() -> Shares<T> {
        Shares(std::array::from_fn(|_| Share(Mutex::default())))
    }
}

impl<T> Shares<T> {
    /// In the calling thread's share, which is `new` if nobody has counted in it yet.
    pub(super) fn count<R>(&self, new: impl FnOnce() -> T, count: impl FnOnce(&mut T) -> R) -> R {
        count(lock(&self.0[MINE.get()].0).get_or_insert_with(|| Box::new(new())))
    }

    /// One after the other.
    pub(super) fn for_each(&self, mut read: impl FnMut(&mut T)) {
        self.0.iter().for_each(|share| lock(&share.0).as_deref_mut().into_iter().for_each(&mut read));
    }

    /// As of one moment.
    pub(super) fn for_each_at_once(&self, mut read: impl FnMut(&T)) {
        // Nobody else holds more than one.
        let all: [MutexGuard<_>; SHARES] = self.0.each_ref().map(|share| lock(&share.0));
        all.iter().for_each(|share| share.as_deref().into_iter().for_each(&mut read));
    }
}
