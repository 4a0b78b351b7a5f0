//! Pools of threads, lent for a run and given back.
//!
//! candle shares its work out among the threads of the rayon pool that it is called in, and outside of any it takes every
//! core there is. A pool of each instance's own would keep threads for every model that is loaded; lent, there are,
//! for each number of threads that a model asks for, as many as ever ran at once with it, which the compute gate bounds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// The pools that nobody uses now. Clones share them.
#[derive(Clone, Default)]
pub struct Pools(Arc<Mutex<Vec<ThreadPool>>>);

impl Pools {
    /// Runs the step in a pool of so many threads. A panic of the step is the caller's, and the pool stays whole.
    pub fn run<T: Send>(&self, threads: usize, step: impl FnOnce() -> T + Send) -> Result<T, ThreadPoolBuildError> {
        let idle = {
            let mut idle = self.lock();
            idle.iter().position(|pool| pool.current_num_threads() == threads).map(|place| idle.swap_remove(place))
        };
        let pool = match idle {
            Some(pool) => pool,
            None => ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("candle#{i}")).build()?,
        };
        let lent = Lent { pool: Some(pool), pools: self };
        Ok(lent.install(step))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<ThreadPool>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Lent<'a> {
    /// Taken when it is dropped.
    pool: Option<ThreadPool>,
    pools: &'a Pools,
}

impl Lent<'_> {
    fn install<T: Send>(&self, step: impl FnOnce() -> T + Send) -> T {
        match &self.pool {
            Some(pool) => pool.install(step),
            None => step(),
        }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.pools.lock().extend(self.pool.take());
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn pools_have_the_threads_asked_for_and_are_used_again() {
        let pools = Pools::default();
        let threads = |n| pools.run(n, rayon::current_num_threads).unwrap();
        assert_eq!([threads(1), threads(3), threads(1), threads(3)], [1, 3, 1, 3]);
        assert_eq!(pools.lock().len(), 2);
        let nested = pools.run(1, || pools.run(1, rayon::current_num_threads).unwrap()).unwrap();
        assert_eq!((nested, pools.lock().len()), (1, 3), "a pool in use is not lent");
    }

    #[test]
    fn a_panic_gives_the_pool_back() {
        let pools = Pools::default();
        let panicked = catch_unwind(AssertUnwindSafe(|| pools.run(2, || panic!("asked for"))));
        assert!(panicked.is_err());
        assert_eq!(pools.lock().len(), 1);
        assert_eq!(pools.run(2, || 7).unwrap(), 7);
    }
}
