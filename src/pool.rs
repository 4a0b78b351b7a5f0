//! A small bounded CPU pool for work too long for an async thread (over about 500 µs): parsing and formatting big JSON
//! bodies, compression, tokenising.
//!
//! Owns its threads and one queue, both of a size fixed at the start. Knows nothing of what it runs. Work whose future
//! was dropped while it waited is skipped; work that has begun runs to its end unheard. A panic becomes an error for
//! its caller and costs no thread. Dropping the pool lets its threads finish what is queued and end.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::error::{Error, Kind, Result};

/// Jobs that may wait for one pool's threads before more are refused as overload. Far more than a client waits out.
const MAX_PENDING: usize = 256;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    ongoing: AtomicUsize,
    max_pending: usize,
}

pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// Starts the threads, at least one, named `cpu-0`, `cpu-1`, …
    pub fn new(threads: usize) -> std::io::Result<Pool> {
        Pool::with_queue(threads, MAX_PENDING)
    }

    fn with_queue(threads: usize, max_pending: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            wake: Condvar::new(),
            ongoing: AtomicUsize::new(0),
            max_pending,
        });
        let pool = Pool { shared };
        for i in 0..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            std::thread::Builder::new().name(format!("cpu-{i}")).spawn(move || shared.work())?;
        }
        Ok(pool)
    }

    /// Queues `work` now, whenever the future is polled. Overloaded where the queue is full, Internal where it panics.
    pub fn run<T, F>(&self, work: F) -> impl Future<Output = Result<T>> + Send + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let (job, result) = job(work);
        let queued = self.shared.push_if_room(job);
        async move {
            if !queued {
                return Err(Error::new(Kind::Overloaded, "server is overloaded: too many requests wait to be parsed"));
            }
            result.await
        }
    }

    /// As [`Pool::run`], for what must not be refused: it is queued however many wait. Its callers hold permits, which
    /// bound it.
    pub fn finish<T, F>(&self, work: F) -> impl Future<Output = Result<T>> + Send + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let (job, result) = job(work);
        self.shared.push(job);
        result
    }

    /// Jobs that wait for a thread.
    pub fn pending(&self) -> usize {
        self.shared.lock().jobs.len()
    }

    /// Jobs that are running.
    pub fn ongoing(&self) -> usize {
        self.shared.ongoing.load(Ordering::Relaxed)
    }
}

/// `work` as a job, and its result.
fn job<T, F>(work: F) -> (Job, impl Future<Output = Result<T>> + Send + use<T, F>)
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let (reply, result) = oneshot::channel();
    let job = Box::new(move || {
        if reply.is_closed() {
            return;
        }
        // What `work` had borrowed mutably is its own and is gone after a panic.
        if let Ok(value) = catch_unwind(AssertUnwindSafe(work)) {
            let _ = reply.send(value);
        }
    });
    (job, async move { result.await.map_err(|_| Error::internal("a worker thread failed on this request")) })
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_all();
    }
}

impl Shared {
    fn push(&self, job: Job) {
        self.lock().jobs.push_back(job);
        self.wake.notify_one();
    }

    /// False, and the job dropped, where the queue is full.
    fn push_if_room(&self, job: Job) -> bool {
        let mut queue = self.lock();
        let room = queue.jobs.len() < self.max_pending;
        if room {
            queue.jobs.push_back(job);
            self.wake.notify_one();
        }
        room
    }

    fn work(&self) {
        while let Some(job) = self.next() {
            job();
            self.ongoing.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The next job, counted as running; `None` once the pool is dropped and its queue is empty.
    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                self.ongoing.fetch_add(1, Ordering::Relaxed);
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No job runs under the lock, so it is poisoned by nothing that could leave the queue half changed.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc;

    use super::*;

    fn pool(threads: usize, max_pending: usize) -> Pool {
        Pool::with_queue(threads, max_pending).unwrap()
    }

    /// Occupies one thread until the sender is dropped; returns once the thread has begun.
    fn occupy(pool: &Pool) -> (mpsc::Sender<()>, impl Future<Output = Result<()>> + use<>) {
        let (begun, wait) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let job = pool.run(move || {
            begun.send(()).unwrap();
            let _ = released.recv();
        });
        wait.recv().unwrap();
        (release, job)
    }

    #[tokio::test]
    async fn returns_what_the_work_returns() {
        let pool = pool(2, 64);
        let jobs: Vec<_> = (0..50).map(|i| pool.run(move || i * 2)).collect();
        for (i, job) in jobs.into_iter().enumerate() {
            assert_eq!(job.await.unwrap(), i * 2);
        }
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_costs_no_thread() {
        let pool = pool(1, 64);
        for _ in 0..3 {
            let error = pool.run(|| -> () { panic!("planted") }).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Internal);
        }
        assert_eq!(pool.run(|| 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn abandoned_work_is_skipped() {
        let pool = pool(1, 64);
        let (release, first) = occupy(&pool);
        let ran = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ran);
        drop(pool.run(move || flag.store(true, Ordering::SeqCst)));
        assert_eq!((pool.pending(), pool.ongoing()), (1, 1));
        drop(release);
        first.await.unwrap();
        pool.run(|| ()).await.unwrap();
        assert!(!ran.load(Ordering::SeqCst));
    }

    #[tokio::test]
    async fn a_full_queue_refuses_what_may_be_refused_and_takes_the_rest() {
        let pool = pool(1, 2);
        let (release, first) = occupy(&pool);
        let one: fn() -> i32 = || 1;
        let waiting = [pool.run(one), pool.run(one)];
        assert_eq!(pool.run(|| ()).await.unwrap_err().kind(), Kind::Overloaded);
        let finished = pool.finish(|| std::thread::current().id());
        drop(release);
        first.await.unwrap();
        assert_ne!(finished.await.unwrap(), std::thread::current().id());
        for job in waiting {
            assert_eq!(job.await.unwrap(), 1);
        }
    }

    #[tokio::test]
    async fn a_dropped_pool_finishes_its_queue() {
        let pool = pool(1, 2);
        let (release, first) = occupy(&pool);
        let second = pool.run(|| 2);
        drop((pool, release));
        first.await.unwrap();
        assert_eq!(second.await.unwrap(), 2);
    }
}
