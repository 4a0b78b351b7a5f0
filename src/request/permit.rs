//! Admission by count and bytes: a [`Permit`] is taken before a body is read and carried until the answer is written.
//!
//! Invariants: bytes are reserved for what has arrived, never for what was announced, so that clients who announce much
//! and send little take nothing from others. A computed answer counts in its request's place until it is written, so that
//! clients who ask for much and read slowly keep others from being admitted before they fill the memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::error::{Error, Kind, Result};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetConfig {
    /// Requests in the server at once, from admission to the answer.
    pub max_requests: usize,
    /// Bytes of requests in the server at once, beyond which no more are admitted; their answers count, too.
    pub max_bytes: usize,
    /// Bytes of one answer.
    pub max_answer_bytes: usize,
}

impl Default for BudgetConfig {
    fn default() -> Self {
        BudgetConfig { max_requests: 4096, max_bytes: 512 << 20, max_answer_bytes: 256 << 20 }
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

    /// Takes a place for one request that arrived at `now`. Refused where the bytes it announces would not fit now:
    /// better before they are sent than after.
    pub fn admit(self: &Arc<Self>, announced: usize, now: Instant) -> Result<Permit> {
        if self.bytes().checked_add(announced).is_none_or(|sum| sum > self.config.max_bytes) {
            return Err(self.full());
        }
        reserve(&self.requests, 1, self.config.max_requests)
            .ok_or_else(|| overloaded(format!("more than {} requests in flight", self.config.max_requests)))?;
        Ok(Permit { budget: Arc::clone(self), bytes: 0, arrived: now })
    }

    fn full(&self) -> Error {
        overloaded(format!("more than {} bytes of requests and answers in flight", self.config.max_bytes))
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
    /// Reserves more bytes, as a body arrives or as it grows on decompression and parsing.
    pub fn grow(&mut self, bytes: usize) -> Result<()> {
        let budget = &self.budget;
        reserve(&budget.bytes, bytes, budget.config.max_bytes).ok_or_else(|| budget.full())?;
        self.bytes += bytes;
        Ok(())
    }

    /// The request is gone, its answer takes so many bytes. TooLarge where that is more than an answer may take; not
    /// refused for what others hold: it is computed.
    pub fn hold_answer(&mut self, bytes: usize) -> Result<()> {
        let max = self.budget.config.max_answer_bytes;
        if bytes > max {
            return Err(Error::too_large(format!("the answer takes {bytes} bytes, expected at most {max}")));
        }
        self.hold(bytes);
        Ok(())
    }

    fn hold(&mut self, bytes: usize) {
        let (all, before) = (&self.budget.bytes, std::mem::replace(&mut self.bytes, bytes));
        // All threads count here: no news is not told.
        if bytes > before {
            all.fetch_add(bytes - before, Ordering::Relaxed);
        } else if bytes < before {
            all.fetch_sub(before - bytes, Ordering::Relaxed);
        }
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
        self.hold(0);
        self.budget.requests.fetch_sub(1, Ordering::Relaxed);
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

    fn budget(max_requests: usize) -> Arc<Budget> {
        Budget::new(BudgetConfig { max_requests, max_bytes: 10, max_answer_bytes: 20 })
    }

    #[test]
    fn a_refused_request_leaves_nothing_behind() {
        let budget = budget(2);
        let now = Instant::now();
        let mut first = budget.admit(0, now).unwrap();
        first.grow(6).unwrap();
        for announced in [5, usize::MAX] {
            assert_eq!(budget.admit(announced, now).unwrap_err().kind(), Kind::Overloaded);
        }
        assert_eq!((budget.requests(), budget.bytes()), (1, 6));
        assert!(first.grow(5).is_err() && first.grow(usize::MAX).is_err());
        first.grow(4).unwrap();
        let second = budget.admit(0, now).unwrap();
        assert!(budget.admit(0, now).is_err());
        drop((first, second));
        assert_eq!((budget.requests(), budget.bytes()), (0, 0));
    }

    #[test]
    fn announced_bytes_take_nothing_from_others() {
        let budget = budget(9);
        let now = Instant::now();
        let mut permits: Vec<Permit> = (0..8).map(|_| budget.admit(10, now).unwrap()).collect();
        assert_eq!(budget.bytes(), 0);
        permits[0].grow(10).unwrap();
        assert!(permits[1].grow(1).is_err());
        permits[0].hold(0);
        permits[1].grow(10).unwrap();
        drop(permits);
        assert_eq!((budget.requests(), budget.bytes()), (0, 0));
    }

    #[test]
    fn an_answer_counts_until_it_is_written_and_is_not_refused_for_others() {
        let (budget, now) = (budget(9), Instant::now());
        let mut permits: Vec<Permit> = (0..2).map(|_| budget.admit(0, now).unwrap()).collect();
        permits[0].grow(10).unwrap();
        permits[0].hold_answer(3).unwrap();
        permits[1].grow(7).unwrap();
        permits[1].hold_answer(20).unwrap();
        assert_eq!(budget.bytes(), 23);
        assert_eq!(budget.admit(0, now).unwrap_err().kind(), Kind::Overloaded);
        assert_eq!(permits[0].hold_answer(21).unwrap_err().kind(), Kind::TooLarge);
        drop(permits);
        assert_eq!((budget.requests(), budget.bytes()), (0, 0));
        assert!(budget.admit(10, now).is_ok());
    }
}
