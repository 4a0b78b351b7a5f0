//! The compute gate: bounds how many threads compute at once, across all models.
//!
//! The shell around [`super::fair`], which decides whose turn it is: threads wait here. Knows accounts and counts, nothing
//! of models or jobs. Each waiter is woken by name, so that a turn's end wakes exactly those that may go.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};
use std::time::Instant;

use super::fair::{AccountId, Places, Room, TurnId};
use super::lock;

/// What a probe or a warm-up counts, beside a version that serves.
const BACKGROUND_WEIGHT: f64 = 0.25;

/// As many places as cores.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    places: Places,
    waiting: BTreeMap<TurnId, Arc<Waiter>>,
}

#[derive(Debug)]
struct Waiter {
    granted: AtomicBool,
    thread: Thread,
}

/// Whoever computes: what its turns take is counted together.
#[derive(Debug)]
pub struct Account {
    gate: Arc<Gate>,
    id: AccountId,
}

/// Places at the gate; dropping it gives them back.
#[derive(Debug)]
#[must_use = "the places are given back when this is dropped"]
pub struct Turn<'a> {
    gate: &'a Gate,
    /// `None`: no place was asked for.
    id: Option<TurnId>,
}

impl Gate {
    pub fn new(cores: usize) -> Arc<Gate> {
        Arc::new(Gate { state: Mutex::new(State { places: Places::new(cores), waiting: BTreeMap::new() }) })
    }

    /// Of a version that serves.
    pub fn account(self: &Arc<Gate>) -> Account {
        self.open(1.0)
    }

    /// Of what has time: probes and warm-ups.
    pub fn background(self: &Arc<Gate>) -> Account {
        self.open(BACKGROUND_WEIGHT)
    }

    fn open(self: &Arc<Gate>, weight: f64) -> Account {
        Account { gate: Arc::clone(self), id: lock(&self.state).places.open(weight) }
    }
}

impl Account {
    /// Waits for `threads` places; more than the gate has means all of it, and none is never waited for. Blocks the
    /// thread: for compute threads only.
    pub fn acquire(&self, threads: usize) -> Turn<'_> {
        let gate = &*self.gate;
        if threads == 0 {
            return Turn { gate, id: None };
        }
        let mut state = lock(&gate.state);
        let (id, at_once) = state.places.ask(self.id, threads, Instant::now());
        if !at_once {
            let waiter = Arc::new(Waiter { granted: AtomicBool::new(false), thread: thread::current() });
            state.waiting.insert(id, Arc::clone(&waiter));
            drop(state);
            while !waiter.granted.load(Ordering::Acquire) {
                thread::park();
            }
        }
        Turn { gate, id: Some(id) }
    }

    /// What is left at the moment.
    pub(super) fn room(&self) -> Room {
        lock(&self.gate.state).places.room(self.id)
    }
}

impl Turn<'_> {
    /// Takes so many places more, if they are free and nobody waits.
    pub(super) fn widen(&mut self, more: usize) -> bool {
        self.id.is_some_and(|id| lock(&self.gate.state).places.widen(id, more))
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        lock(&self.gate.state).places.close(self.id);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let mut state = lock(&self.gate.state);
        for begun in state.places.end(id, Instant::now()) {
            if let Some(waiter) = state.waiting.remove(&begun) {
                waiter.granted.store(true, Ordering::Release);
                waiter.thread.unpark();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    impl Gate {
        pub(in crate::scheduler) fn wait_for_waiters(&self, count: usize) {
            while lock(&self.state).waiting.len() < count {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn requests_are_clamped_to_what_the_gate_has() {
        let gate = Gate::new(2);
        let account = gate.account();
        let free = || account.room().free;
        let all = account.acquire(99);
        assert_eq!(free(), 0);
        drop(all);
        let (one, none) = (account.acquire(1), account.acquire(0));
        assert_eq!(free(), 1);
        drop((one, none));
        assert_eq!(free(), 2);
        drop(Gate::new(0).account().acquire(1));
        let all = account.acquire(2);
        drop(account.acquire(0));
        assert_eq!(free(), 0, "what computes elsewhere waits for no core");
        drop(all);
    }

    #[test]
    fn first_come_first_served_even_past_one_that_does_not_fit() {
        let gate = Gate::new(2);
        let account = gate.account();
        let held = account.acquire(1);
        let (order, went) = mpsc::channel();
        thread::scope(|scope| {
            for (place, threads) in [2usize, 1, 1].into_iter().enumerate() {
                let (account, order) = (&account, order.clone());
                scope.spawn(move || {
                    let turn = account.acquire(threads);
                    order.send(place).unwrap();
                    drop(turn);
                });
                gate.wait_for_waiters(place + 1);
            }
            drop(held);
        });
        let mut places: Vec<usize> = went.try_iter().collect();
        assert_eq!(places.first(), Some(&0), "the wide one went first: {places:?}");
        places.sort_unstable();
        assert_eq!((places, account.room().free), (vec![0, 1, 2], 2));
    }

    #[test]
    fn what_a_turn_held_is_free_again_though_its_account_is_gone() {
        let gate = Gate::new(2);
        let (first, second) = (gate.account(), gate.background());
        let turn = first.acquire(2);
        assert!(second.room().contended && !first.room().contended);
        let id = turn.id;
        std::mem::forget(turn);
        drop(first);
        drop(Turn { gate: &gate, id });
        assert_eq!(second.room(), Room { free: 2, contended: false });
    }

    #[test]
    fn never_more_threads_than_cores_and_a_guest() {
        let gate = Gate::new(3);
        let running = AtomicUsize::new(0);
        thread::scope(|scope| {
            for threads in [1usize, 2, 3, 1, 2, 1] {
                let (gate, running) = (&gate, &running);
                scope.spawn(move || {
                    let account = gate.account();
                    for _ in 0..200 {
                        let turn = account.acquire(threads);
                        let before = running.fetch_add(threads, Ordering::SeqCst);
                        assert!(before + threads <= 4);
                        running.fetch_sub(threads, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
        });
        assert_eq!(gate.account().room().free, 3);
    }
}
