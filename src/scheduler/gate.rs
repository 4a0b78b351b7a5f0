//! The compute gate: bounds how many threads compute at once, across all models.
//!
//! Knows threads and counts, nothing of models or jobs. Strictly first come, first served, also when the one in front
//! needs more than is free: a wide run is never starved by narrow ones. Each waiter is woken by name, so a release
//! wakes exactly those that may go.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};

use super::lock;

/// As many places as cores. Acquiring blocks the thread: for compute threads only.
#[derive(Debug)]
pub struct Gate {
    cores: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    waiting: VecDeque<Arc<Waiter>>,
}

#[derive(Debug)]
struct Waiter {
    threads: usize,
    granted: AtomicBool,
    thread: Thread,
}

/// Places at the gate; dropping it gives them back.
#[derive(Debug)]
#[must_use = "the places are given back when this is dropped"]
pub struct Turn<'a> {
    gate: &'a Gate,
    threads: usize,
}

impl Gate {
    pub fn new(cores: usize) -> Arc<Gate> {
        let cores = cores.max(1);
        Arc::new(Gate { cores, state: Mutex::new(State { free: cores, waiting: VecDeque::new() }) })
    }

    /// Waits for `threads` places; more than the gate has means all of it, and none is never waited for.
    pub fn acquire(&self, threads: usize) -> Turn<'_> {
        let threads = threads.min(self.cores);
        if threads == 0 {
            return Turn { gate: self, threads };
        }
        let mut state = lock(&self.state);
        if state.waiting.is_empty() && state.free >= threads {
            state.free -= threads;
            return Turn { gate: self, threads };
        }
        let waiter = Arc::new(Waiter { threads, granted: AtomicBool::new(false), thread: thread::current() });
        state.waiting.push_back(Arc::clone(&waiter));
        drop(state);
        while !waiter.granted.load(Ordering::Acquire) {
            thread::park();
        }
        Turn { gate: self, threads }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.threads == 0 {
            return;
        }
        let mut state = lock(&self.gate.state);
        state.free += self.threads;
        state.admit();
    }
}

impl State {
    /// Lets those in front go for as long as they fit.
    fn admit(&mut self) {
        while let Some(next) = self.waiting.front().filter(|next| next.threads <= self.free) {
            self.free -= next.threads;
            next.granted.store(true, Ordering::Release);
            next.thread.unpark();
            self.waiting.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    impl Gate {
        fn free(&self) -> usize {
            lock(&self.state).free
        }

        pub(in crate::scheduler) fn wait_for_waiters(&self, count: usize) {
            while lock(&self.state).waiting.len() < count {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn requests_are_clamped_to_what_the_gate_has() {
        let gate = Gate::new(2);
        let all = gate.acquire(99);
        assert_eq!(gate.free(), 0);
        drop(all);
        let (one, none) = (gate.acquire(1), gate.acquire(0));
        assert_eq!(gate.free(), 1);
        drop((one, none));
        assert_eq!(gate.free(), 2);
        drop(Gate::new(0).acquire(1));
        let all = gate.acquire(2);
        drop(gate.acquire(0));
        assert_eq!(gate.free(), 0, "what computes elsewhere waits for no core");
        drop(all);
    }

    #[test]
    fn first_come_first_served_even_past_one_that_does_not_fit() {
        let gate = Gate::new(2);
        let held = gate.acquire(1);
        let (order, went) = mpsc::channel();
        thread::scope(|scope| {
            for (place, threads) in [2usize, 1, 1].into_iter().enumerate() {
                let (gate, order) = (&gate, order.clone());
                scope.spawn(move || {
                    let turn = gate.acquire(threads);
                    order.send(place).unwrap();
                    drop(turn);
                });
                gate.wait_for_waiters(place + 1);
            }
            // One place is free and the last two would fit: they still stand behind the first.
            assert_eq!((gate.free(), lock(&gate.state).waiting.len()), (1, 3));
            drop(held);
        });
        let mut places: Vec<usize> = went.try_iter().collect();
        assert_eq!(places.first(), Some(&0), "the wide one went first: {places:?}");
        places.sort_unstable();
        assert_eq!((places, gate.free()), (vec![0, 1, 2], 2));
    }

    #[test]
    fn never_more_threads_than_cores() {
        let gate = Gate::new(3);
        let running = std::sync::atomic::AtomicUsize::new(0);
        thread::scope(|scope| {
            for threads in [1usize, 2, 3, 1, 2, 1] {
                let (gate, running) = (&gate, &running);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let turn = gate.acquire(threads);
                        let before = running.fetch_add(threads, Ordering::SeqCst);
                        assert!(before + threads <= 3);
                        running.fetch_sub(threads, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
        });
        assert_eq!(gate.free(), 3);
    }
}
