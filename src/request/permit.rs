//! Admission by count and bytes: a [`Permit`] is taken before a body is read and carried until the answer is written.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::error::{Error, Kind, Result};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetConfig {
    /// Requests in the server at once, from admission to the answer.
    pub max_requests: usize,
    /// Bytes of request bodies in the server at once.
    pub max_bytes: usize,
}

impl Default for BudgetConfig {
    fn default() -> Self {
        BudgetConfig { max_requests: 4096, max_bytes: 512 << 20 }
    }
}

/// What all permits of a server share.
#[derive(Debug)]
pub struct Budget {
    config: BudgetConfig,
    requests: AtomicUsize,
    bytes: AtomicUsize,
}

impl Budget {
    pub fn new(config: BudgetConfig) -> Arc<Budget> {
        Arc::new(Budget { config, requests: AtomicUsize::new(0), bytes: AtomicUsize::new(0) })
    }

    /// Takes a place for one request that arrived at `now` and announces `bytes`.
    pub fn admit(self: &Arc<Self>, bytes: usize, now: Instant) -> Result<Permit> {
        reserve(&self.requests, 1, self.config.max_requests)
            .ok_or_else(|| overloaded(format!("more than {} requests in flight", self.config.max_requests)))?;
        let mut permit = Permit { budget: Arc::clone(self), bytes: 0, arrived: now };
        permit.grow(bytes)?;
        Ok(permit)
    }

    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// One request's place in the server. Dropping it gives the place and its bytes back.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
    arrived: Instant,
}

impl Permit {
    /// Reserves more bytes as a body of undeclared length, or a decompressed one, grows.
    pub fn grow(&mut self, bytes: usize) -> Result<()> {
        let max = self.budget.config.max_bytes;
        reserve(&self.budget.bytes, bytes, max)
            .ok_or_else(|| overloaded(format!("more than {max} bytes of request bodies in flight")))?;
        self.bytes += bytes;
        Ok(())
    }

    /// When the request was admitted: deadlines count from here.
    pub fn arrived(&self) -> Instant {
        self.arrived
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.requests.fetch_sub(1, Ordering::Relaxed);
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

fn reserve(counter: &AtomicUsize, amount: usize, max: usize) -> Option<usize> {
    counter
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| now.checked_add(amount).filter(|sum| *sum <= max))
        .ok()
}

fn overloaded(what: String) -> Error {
    Error::new(Kind::Overloaded, format!("server is overloaded: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_request_leaves_nothing_behind() {
        let budget = Budget::new(BudgetConfig { max_requests: 2, max_bytes: 10 });
        let now = Instant::now();
        let mut first = budget.admit(6, now).unwrap();
        assert_eq!(budget.admit(5, now).unwrap_err().kind(), Kind::Overloaded);
        assert_eq!((budget.requests(), budget.bytes()), (1, 6));
        assert!(first.grow(5).is_err() && first.grow(usize::MAX).is_err());
        first.grow(4).unwrap();
        let second = budget.admit(0, now).unwrap();
        assert!(budget.admit(0, now).is_err());
        drop((first, second));
        assert_eq!((budget.requests(), budget.bytes()), (0, 0));
    }
}
