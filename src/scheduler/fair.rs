//! Who computes next: places for threads, given out to the versions that ask for them. Pure: no clock, no threads; the
//! standard library only.
//!
//! Start-time fair queueing: every account has a virtual time, which its turns push on by what they took, places times
//! time. Whoever waits with the earliest one goes first; within an account it is first come, first served. An account
//! that comes back begins with the time of whoever went last: nothing is saved up by being idle. One that stands in
//! front and needs more than is free holds up those behind it, so that a wide turn is not starved by narrow ones.
//!
//! An account that computes much less than its share of the places need not wait for long turns of the others: it is
//! let in as a guest although nothing is free, for one place, one guest at a time. The operating system then shares the
//! cores; the guest takes the next place that becomes free.
//!
//! Invariant: turns hold at most all the places, and one more for a guest.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What was computed fades with this time constant: how much an account takes lately.
const MEMORY: Duration = Duration::from_secs(1);
/// An account that took less than this part of an even share may be a guest.
const QUIET: f64 = 0.5;
/// Accounts below this part of everything that was computed lately are idle.
const IDLE: f64 = 0.01;
/// Of an account's mean turn, what one more turn adds.
const NEWS: f64 = 0.25;

pub(super) type AccountId = u64;
pub(super) type TurnId = u64;

#[derive(Debug)]
pub(super) struct Places {
    all: usize,
    free: usize,
    /// The virtual time of the account that went last.
    current: f64,
    accounts: BTreeMap<AccountId, Account>,
    /// In order of arrival.
    waiting: Vec<Asked>,
    turns: BTreeMap<TurnId, Turn>,
    guest: Option<TurnId>,
    next: u64,
}

#[derive(Debug)]
struct Account {
    weight: f64,
    virtual_time: f64,
    /// Place-seconds of a turn, charged in advance.
    mean: f64,
    /// Place-seconds lately, as of `at`.
    lately: f64,
    at: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    turn: TurnId,
    account: AccountId,
    places: usize,
}

#[derive(Debug)]
struct Turn {
    asked: Asked,
    since: Instant,
    /// Already charged.
    charged: f64,
}

/// What an account sees of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Places that nobody holds or waits for.
    pub free: usize,
    /// Other accounts hold places, or wait for them.
    pub contended: bool,
}

impl Places {
    pub fn new(all: usize) -> Places {
        let all = all.max(1);
        let (accounts, turns) = (BTreeMap::new(), BTreeMap::new());
        Places { all, free: all, current: 0.0, accounts, waiting: Vec::new(), turns, guest: None, next: 0 }
    }

    /// `weight`: of two accounts that always wait, one of twice the weight computes twice as much.
    pub fn open(&mut self, weight: f64) -> AccountId {
        let account = Account { weight, virtual_time: self.current, mean: 0.0, lately: 0.0, at: None };
        self.next += 1;
        self.accounts.insert(self.next, account);
        self.next
    }

    /// What its turns still hold is given back when they end.
    pub fn close(&mut self, account: AccountId) {
        self.accounts.remove(&account);
    }

    /// True: the turn begins at once. Otherwise [`Self::end`] will name it.
    pub fn ask(&mut self, account: AccountId, places: usize, now: Instant) -> (TurnId, bool) {
        self.next += 1;
        let asked = Asked { turn: self.next, account, places: places.clamp(1, self.all) };
        if self.waiting.is_empty() && asked.places <= self.free {
            self.begin(asked, now);
            return (asked.turn, true);
        }
        // Older ones become guests when a turn ends.
        let is_first = self.waiting.iter().all(|other| other.account != account);
        let admitted = is_first && self.may_be_guest(&asked, now);
        if admitted {
            self.begin_guest(asked, now);
        } else {
            self.waiting.push(asked);
        }
        (asked.turn, admitted)
    }

    /// Names the turns that begin now.
    pub fn end(&mut self, turn: TurnId, now: Instant) -> Vec<TurnId> {
        let Some(Turn { asked, since, charged }) = self.turns.remove(&turn) else { return Vec::new() };
        let took = now.saturating_duration_since(since).as_secs_f64() * asked.places as f64;
        if let Some(account) = self.accounts.get_mut(&asked.account) {
            account.charge(took, charged, now);
        }
        if self.guest == Some(turn) {
            self.guest = None;
        } else {
            self.free += asked.places;
        }
        self.seat_guest();
        self.admit(now)
    }

    /// Adds places to a turn that has just begun, if they are free and nobody waits: never waited for.
    pub fn widen(&mut self, turn: TurnId, more: usize) -> bool {
        let alone = self.waiting.is_empty() && self.guest.is_none() && self.free >= more;
        let Some(turn) = self.turns.get_mut(&turn).filter(|_| alone) else { return false };
        turn.asked.places += more;
        self.free -= more;
        true
    }

    pub fn room(&self, account: AccountId) -> Room {
        let mut others = self.turns.values().map(|turn| &turn.asked).chain(&self.waiting);
        let free = if self.waiting.is_empty() { self.free } else { 0 };
        Room { free, contended: others.any(|asked| asked.account != account) }
    }

    fn begin(&mut self, asked: Asked, now: Instant) {
        let mut charged = 0.0;
        if let Some(account) = self.accounts.get_mut(&asked.account) {
            account.virtual_time = account.virtual_time.max(self.current);
            self.current = account.virtual_time;
            charged = account.mean;
            account.virtual_time += charged / account.weight;
        }
        self.free = self.free.saturating_sub(asked.places);
        self.turns.insert(asked.turn, Turn { asked, since: now, charged });
    }

    fn admit(&mut self, now: Instant) -> Vec<TurnId> {
        let mut begun = Vec::new();
        while let Some(first) = self.first() {
            if self.waiting[first].places > self.free {
                begun.extend(self.admit_guest(now));
                break;
            }
            let asked = self.waiting.remove(first);
            begun.push(asked.turn);
            self.begin(asked, now);
        }
        begun
    }

    /// Of those that wait, whose turn is next.
    fn first(&self) -> Option<usize> {
        let time = |asked: &Asked| self.accounts.get(&asked.account).map_or(0.0, |a| a.virtual_time.max(self.current));
        let in_order = |(_, a): &(usize, f64), (_, b): &(usize, f64)| a.total_cmp(b);
        // The first of equals: they are in order of arrival.
        self.waiting.iter().map(time).enumerate().min_by(in_order).map(|(place, _)| place)
    }

    fn admit_guest(&mut self, now: Instant) -> Option<TurnId> {
        let place = self.waiting.iter().position(|asked| self.may_be_guest(asked, now))?;
        let asked = self.waiting.remove(place);
        self.begin_guest(asked, now);
        Some(asked.turn)
    }

    fn may_be_guest(&self, asked: &Asked, now: Instant) -> bool {
        self.guest.is_none() && self.free == 0 && asked.places == 1 && self.is_quiet(asked.account, now)
    }

    fn begin_guest(&mut self, asked: Asked, now: Instant) {
        self.begin(asked, now);
        self.guest = Some(asked.turn);
    }

    /// Holds nothing, and took little lately, of what others take a lot of.
    fn is_quiet(&self, account: AccountId, now: Instant) -> bool {
        if self.turns.values().any(|turn| turn.asked.account == account) {
            return false;
        }
        let lately: Vec<(AccountId, f64)> = self.accounts.keys().map(|id| (*id, self.lately(*id, now))).collect();
        let all: f64 = lately.iter().map(|(_, took)| took).sum();
        let active = lately.iter().filter(|(id, took)| *id == account || *took > IDLE * all).count();
        active > 1 && self.lately(account, now) < QUIET * all / active as f64
    }

    /// Place-seconds, of turns that have not ended, too.
    fn lately(&self, account: AccountId, now: Instant) -> f64 {
        let ended = self.accounts.get(&account).map_or(0.0, |account| account.lately(now));
        let of_account = self.turns.values().filter(|turn| turn.asked.account == account);
        let so_far = |turn: &Turn| now.saturating_duration_since(turn.since).as_secs_f64() * turn.asked.places as f64;
        ended + of_account.map(so_far).sum::<f64>()
    }

    /// The guest holds what has become free.
    fn seat_guest(&mut self) {
        if self.free > 0 && self.guest.take().is_some() {
            self.free -= 1;
        }
    }
}

impl Account {
    fn charge(&mut self, took: f64, charged: f64, now: Instant) {
        self.virtual_time += (took - charged) / self.weight;
        self.mean += NEWS * (took - self.mean);
        self.lately = self.lately(now) + took;
        self.at = Some(now);
    }

    fn lately(&self, now: Instant) -> f64 {
        let since = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.lately * (-since.as_secs_f64() / MEMORY.as_secs_f64()).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    const MS: Duration = Duration::from_millis(1);

    /// Ends a turn and expects these to begin.
    fn ends(places: &mut Places, turn: TurnId, now: Instant, begun: &[TurnId]) {
        assert_eq!(places.end(turn, now), begun);
    }

    #[test]
    fn one_account_is_served_in_order_even_past_one_that_does_not_fit() {
        let (mut places, now) = (Places::new(2), Instant::now());
        let only = places.open(1.0);
        let (held, at_once) = places.ask(only, 1, now);
        assert!(at_once);
        let [wide, second, third] = [2, 1, 1].map(|wanted| places.ask(only, wanted, now));
        assert_eq!([wide.1, second.1, third.1], [false; 3], "a place is free, but not for the one in front");
        assert_eq!(places.room(only), Room { free: 0, contended: false });
        ends(&mut places, held, now, &[wide.0]);
        ends(&mut places, wide.0, now, &[second.0, third.0]);
        ends(&mut places, second.0, now, &[]);
        ends(&mut places, third.0, now, &[]);
        assert_eq!(places.room(only), Room { free: 2, contended: false });
        assert!(places.ask(only, 99, now).1, "more than there are means all");
    }

    #[test]
    fn who_has_computed_less_goes_first_but_nothing_is_saved_up() {
        let (mut places, start) = (Places::new(1), Instant::now());
        let [long, short] = [1.0; 2].map(|weight| places.open(weight));
        let mut now = start;
        // Both always wait: 100 ms against 10.
        let mut turns = vec![(long, places.ask(long, 1, now).0)];
        turns.push((short, places.ask(short, 1, now).0));
        let mut computed = BTreeMap::from([(long, Duration::ZERO), (short, Duration::ZERO)]);
        let mut running = turns[0];
        for _ in 0..200 {
            let (account, turn) = running;
            let took = if account == long { 100 * MS } else { 10 * MS };
            now += took;
            *computed.get_mut(&account).unwrap() += took;
            let again = (account, places.ask(account, 1, now));
            assert!(!again.1.1 || places.guest.is_some());
            turns.push((account, again.1.0));
            let begun = places.end(turn, now);
            let next = begun.first().copied().or(places.turns.keys().next().copied()).unwrap();
            running = *turns.iter().find(|(_, turn)| *turn == next).unwrap();
        }
        let ratio = computed[&long].as_secs_f64() / computed[&short].as_secs_f64();
        assert!((0.7..1.4).contains(&ratio), "{computed:?}");
    }

    #[test]
    fn a_turn_gets_wider_where_nobody_is_in_the_way() {
        let (mut places, now) = (Places::new(3), Instant::now());
        let account = places.open(1.0);
        let (turn, _) = places.ask(account, 1, now);
        assert!(!places.widen(turn, 3) && places.widen(turn, 2) && !places.widen(turn, 1));
        let (waits, at_once) = places.ask(account, 1, now);
        assert!(!at_once && !places.widen(turn, 0));
        ends(&mut places, turn, now, &[waits]);
        assert_eq!(places.room(account).free, 2);
    }

    /// A version in the simulation: turns of so long, of which this many want to run at once; every so often, or again
    /// and again.
    #[derive(Clone, Copy)]
    struct Load {
        turn: Duration,
        workers: usize,
        every: Option<Duration>,
    }

    /// Longest wait and number of turns by version after so long; as in life, turns beside a guest take longer.
    fn play(cores: usize, loads: &[Load], until: Duration) -> Vec<(Duration, usize)> {
        let (mut places, start) = (Places::new(cores), Instant::now());
        let accounts: Vec<AccountId> = loads.iter().map(|_| places.open(1.0)).collect();
        let mut result = vec![(Duration::ZERO, 0); loads.len()];
        // Time, then: a turn's end, or a request.
        let mut events = BinaryHeap::new();
        let mut asked: BTreeMap<TurnId, (usize, Instant)> = BTreeMap::new();
        for (version, load) in loads.iter().enumerate() {
            (0..load.workers).for_each(|_| events.push(Reverse((start, None, version))));
        }
        while let Some(Reverse((now, ended, version))) = events.pop() {
            if now > start + until {
                break;
            }
            let begun = match ended {
                Some(turn) => {
                    let begun = places.end(turn, now);
                    if loads[version].every.is_none() {
                        events.push(Reverse((now, None, version)));
                    }
                    begun
                }
                None => {
                    let (turn, at_once) = places.ask(accounts[version], 1, now);
                    asked.insert(turn, (version, now));
                    if let Some(every) = loads[version].every {
                        events.push(Reverse((now + every, None, version)));
                    }
                    if at_once { vec![turn] } else { Vec::new() }
                }
            };
            for turn in begun {
                let (version, since) = asked[&turn];
                // At first nobody has computed anything, and nobody is quiet.
                let wait = if now > start + MEMORY { now - since } else { Duration::ZERO };
                result[version].0 = result[version].0.max(wait);
                result[version].1 += 1;
                let running = places.turns.len().max(cores) as u32;
                events.push(Reverse((now + loads[version].turn * running / cores as u32, Some(turn), version)));
            }
        }
        result
    }

    #[test]
    fn a_quiet_version_does_not_wait_for_greedy_ones() {
        let greedy = Load { turn: 100 * MS, workers: 2, every: None };
        let quiet = Load { turn: 5 * MS, workers: 1, every: Some(50 * MS) };
        let played = play(2, &[greedy, greedy, quiet], Duration::from_secs(20));
        let [first, second, third] = played[..] else { panic!("{played:?}") };
        assert_eq!(third.0, Duration::ZERO, "{played:?}");
        assert!(third.1 >= 399, "{played:?}");
        let ratio = first.1 as f64 / second.1 as f64;
        assert!((0.9..1.1).contains(&ratio), "the greedy ones share evenly: {played:?}");
    }

    #[test]
    fn two_quiet_versions_wait_for_each_other_at_most() {
        let greedy = Load { turn: 100 * MS, workers: 2, every: None };
        let quiet = Load { turn: 5 * MS, workers: 1, every: Some(50 * MS) };
        let played = play(2, &[greedy, greedy, quiet, quiet], Duration::from_secs(20));
        assert!(played[2].0.max(played[3].0) <= 10 * MS, "{played:?}");
    }

    #[test]
    fn long_turns_and_short_ones_get_the_same_time() {
        let long = Load { turn: 100 * MS, workers: 2, every: None };
        let short = Load { turn: 2 * MS, workers: 2, every: None };
        let played = play(2, &[long, short], Duration::from_secs(40));
        let ratio = played[0].1 as f64 * 100.0 / (played[1].1 as f64 * 2.0);
        assert!((0.7..1.4).contains(&ratio), "{ratio}: {played:?}");
    }

    #[test]
    fn a_light_account_yields() {
        let (mut places, mut now) = (Places::new(1), Instant::now());
        let (heavy, light) = (places.open(1.0), places.open(0.25));
        let mut turns: BTreeMap<TurnId, AccountId> = BTreeMap::new();
        let mut running = places.ask(heavy, 1, now).0;
        turns.insert(running, heavy);
        turns.insert(places.ask(light, 1, now).0, light);
        let mut ended = BTreeMap::from([(heavy, 0), (light, 0)]);
        for _ in 0..400 {
            now += 10 * MS;
            let account = turns[&running];
            *ended.get_mut(&account).unwrap() += 1;
            turns.insert(places.ask(account, 1, now).0, account);
            let begun = places.end(running, now);
            running = begun.first().copied().or(places.turns.keys().next().copied()).unwrap();
        }
        let ratio = f64::from(ended[&heavy]) / f64::from(ended[&light]);
        assert!((2.0..6.0).contains(&ratio), "{ended:?}");
    }

    proptest! {
        #[test]
        fn never_more_than_the_places_and_a_guest_and_everyone_gets_a_turn(
            cores in 1usize..5,
            steps in proptest::collection::vec((0usize..4, 0usize..6, 0u64..40, any::<bool>()), 1..300),
        ) {
            let (mut places, mut now) = (Places::new(cores), Instant::now());
            let accounts = [1.0, 1.0, 1.0, 0.25].map(|weight| places.open(weight));
            let (mut waiting, mut running) = (Vec::new(), Vec::new());
            let check = |places: &Places| {
                let held: usize = places.turns.values().map(|turn| turn.asked.places).sum();
                let guests = usize::from(places.guest.is_some());
                held == places.all - places.free + guests && held <= places.all + 1
            };
            for (account, wanted, ms, ends) in steps {
                now += MS * u32::try_from(ms).unwrap();
                if ends && !running.is_empty() {
                    let turn = running.remove(wanted % running.len());
                    let begun = places.end(turn, now);
                    waiting.retain(|turn| !begun.contains(turn));
                    running.extend(begun);
                } else {
                    let (turn, at_once) = places.ask(accounts[account], wanted, now);
                    if at_once { running.push(turn) } else { waiting.push(turn) }
                }
                prop_assert!(check(&places), "{places:?}");
                prop_assert!(waiting.is_empty() || !running.is_empty(), "nobody would end: {places:?}");
            }
            places.close(accounts[0]);
            while let Some(turn) = running.pop() {
                now += MS;
                let begun = places.end(turn, now);
                waiting.retain(|turn| !begun.contains(turn));
                running.extend(begun);
            }
            prop_assert!(waiting.is_empty() && places.free == places.all && places.guest.is_none());
        }
    }
}
