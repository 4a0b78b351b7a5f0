//! The policy by itself, and then played through in simulated time: clients, a real batcher, instances whose runs take
//! what a curve says. Discrete events: nothing waits, nothing is random but by a seed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use super::super::batcher::{Batcher, Entry, Poll};
use super::*;

const MS: Duration = Duration::from_millis(1);

fn limits(samples: &[(usize, f64)]) -> Limits {
    let sample = |(rows, ms): &(usize, f64)| Sample { rows: *rows, length: None, compute: MS.mul_f64(*ms) };
    Limits::new(32, true, None, &samples.iter().map(sample).collect::<Vec<_>>())
}

fn alone(rows: usize) -> Queued {
    Queued { length: None, rows, share: rows, contended: false }
}

#[test]
fn a_batch_grows_as_long_as_that_pays() {
    let flat = [(1, 10.0), (2, 20.0), (4, 40.0), (8, 80.0), (16, 160.0), (32, 320.0)];
    let fixed = [(1, 10.0), (2, 11.0), (4, 12.0), (8, 13.0), (16, 14.0), (32, 15.0)];
    let spill = [(1, 10.0), (2, 12.0), (4, 14.0), (8, 16.0), (16, 18.0), (32, 60.0)];
    let convex = [(1, 10.0), (2, 21.0), (4, 44.0), (8, 100.0), (16, 250.0), (32, 900.0)];
    for (samples, expected) in [(flat, 1), (fixed, 32), (spill, 16), (convex, 1)] {
        assert_eq!(limits(&samples).in_force(None), expected, "{samples:?}");
    }
    let mut spill = limits(&spill);
    assert_eq!([5, 16, 20].map(|rows| spill.seal(&alone(rows)).rows), [5, 16, 16], "of those that wait");
    assert_eq!(Limits::new(32, false, None, &[]).in_force(None), 32);
    assert_eq!(Limits::new(1, true, None, &[]).in_force(None), 1);
}

#[test]
fn sizes_that_nobody_knows_are_entered_a_doubling_at_a_time() {
    assert_eq!(limits(&[]).in_force(None), 32, "nothing is known");
    assert_eq!(limits(&[(1, 10.0)]).in_force(None), 2);
    let sample = |length, rows, ms| Sample { rows, length: Some(length), compute: MS * ms };
    assert_eq!(rows_at_first(32, &[sample(16, 1, 10), sample(64, 1, 20), sample(64, 2, 20)]), 2, "of the shortest");
    assert_eq!(rows_at_first(32, &[]), 32);
    assert_eq!(limits(&[(1, 10.0), (2, 12.0)]).in_force(None), 4);
    assert_eq!(limits(&[(1, 10.0), (2, 20.0)]).in_force(None), 1, "it did not pay, and would make others wait");
    assert_eq!(limits(&[(1, 1.0), (2, 2.0)]).in_force(None), 4, "it did not pay, but costs nothing to know");
    assert_eq!(limits(&[(1, 1.0), (2, 3.0)]).in_force(None), 1);
}

#[test]
fn idle_cores_get_their_share_and_small_runs_are_not_worth_waking_them() {
    let mut slow = limits(&[(1, 4.1), (8, 5.0), (32, 8.0)]);
    assert_eq!(slow.seal(&Queued { share: 4, ..alone(8) }).rows, 4);
    let mut fast = limits(&[(1, 0.003), (8, 0.004), (32, 0.006)]);
    assert_eq!(fast.seal(&Queued { share: 4, ..alone(8) }).rows, 8);
}

#[test]
fn company_saves_what_it_would_cost_in_other_runs() {
    let curve = limits(&[(1, 6.0), (2, 9.0), (4, 16.0), (8, 30.0), (16, 60.0), (32, 120.0)]);
    assert_eq!([1, 2, 4, 16, 99].map(|rows| curve.worth_waiting_for(None, rows)), [1, 2, 4, 8, 8]);
    for ((rows, more), expected) in [((1, 1), 3), ((1, 3), 3), ((2, 2), 2), ((8, 8), 0), ((4, 0), 0)] {
        let saved = curve.saved(None, rows, more).as_secs_f64() * 1e3;
        assert_eq!(saved.round() as i32, expected, "{rows} and {more}");
    }
}

#[test]
fn long_runs_are_cut_while_others_wait() {
    let curve = [(1, 2.0), (2, 3.7), (4, 7.2), (8, 14.0), (16, 27.0), (32, 53.0)];
    let contended = Queued { contended: true, ..alone(32) };
    assert_eq!(limits(&curve).seal(&alone(32)).rows, 16);
    assert_eq!(limits(&curve).seal(&contended).rows, 4);
    assert_eq!(limits(&curve.map(|(rows, ms)| (rows, ms / 20.0))).seal(&contended).rows, 32);
}

#[test]
fn two_turns_fit_into_the_goal() {
    let samples = [(1, 10.0), (8, 24.0), (32, 72.0)];
    let with_goal = |ms| {
        let mut limits = limits(&samples);
        limits.goal = Some(LatencyGoal { of_10_000: 9900, within: MS * ms });
        limits
    };
    let mut goal = with_goal(80);
    assert_eq!((goal.in_force(None), goal.seal(&alone(99)).rows), (16, 16));
    assert_eq!(goal.patience(), Duration::ZERO);
    assert_eq!(with_goal(1000).patience(), MS * (1000 - 2 * 72));
    assert_eq!(with_goal(1).in_force(None), 1, "somebody must answer");
    // Every twentieth turn takes twice as long: that is within what p99 must hold.
    (0..400).for_each(|turn| goal.learn(8, None, MS * 24, MS * if turn % 20 == 0 { 48 } else { 24 }));
    assert!((4..=8).contains(&goal.in_force(None)), "{}", goal.in_force(None));
    (0..4000).for_each(|_| goal.learn(8, None, MS * 24, MS * 24));
    assert_eq!(goal.in_force(None), 16, "and over");
    assert_eq!(limits(&samples).patience(), Duration::MAX);
}

#[test]
fn a_longer_sequence_joins_where_that_costs_less_than_a_run_of_its_own() {
    let of = |rows, length, ms: f64| Sample { rows, length: Some(length), compute: MS.mul_f64(ms) };
    let fixed = Limits::new(32, true, None, &[of(1, 64, 10.0), of(32, 64, 20.0)]);
    assert!(fixed.fits(8, Some(49), 1, Some(64)));
    let flat = Limits::new(32, true, None, &[of(1, 64, 10.0), of(32, 64, 320.0)]);
    assert!(!flat.fits(8, Some(49), 1, Some(64)) && !flat.fits(1, Some(64), 1, Some(49)));
    assert!(flat.fits(8, Some(64), 1, Some(64)));
    assert!(Limits::new(32, true, None, &[]).fits(8, Some(49), 1, Some(64)), "to find out");
}

#[test]
fn trials_take_a_small_share_of_the_time() {
    for samples in [&[(1, 10.0), (32, 900.0)][..], &[(1, 10.0), (32, 20.0)], &[(1, 10.0)]] {
        let mut limits = limits(samples);
        let (mut tried, mut all) = (0.0, 0.0);
        for run in 0..5000 {
            let sealed = limits.seal(&alone(64));
            let compute = MS.mul_f64(10.0 * sealed.rows as f64);
            limits.learn(sealed.rows, None, compute, compute);
            all += compute.as_secs_f64();
            tried += if sealed.trial && run > 0 { compute.as_secs_f64() } else { 0.0 };
        }
        assert!(tried > 0.0 && tried <= 0.025 * all, "{samples:?}: {tried} of {all}");
    }
}

const MOST: usize = 32;

/// Seconds of a run, by rows, by length and at a time.
type Cost = fn(usize, usize, f64) -> f64;
/// The length of the next request, by its number.
type Lengths = fn(usize) -> usize;

enum Policy {
    /// Batches of at most so many rows.
    Static(usize),
    Tuned(Limits),
}

struct Server {
    cost: Cost,
    instances: usize,
    policy: Policy,
    batcher: Batcher<usize, u8, usize>,
    /// Rows that instances compute.
    running: usize,
    idle: usize,
    /// When a run ends: nanoseconds, its number.
    ends: BinaryHeap<Reverse<(u64, usize)>>,
    runs: Vec<Run>,
    start: Instant,
    noise: u64,
    disturbed: bool,
}

struct Run {
    jobs: usize,
    length: usize,
    time: f64,
}

impl Server {
    fn new(cost: Cost, instances: usize, policy: Policy) -> Server {
        let (batcher, ends) = (Batcher::new(MOST, Duration::ZERO), BinaryHeap::new());
        let (running, idle, runs, noise, disturbed) = (0, instances, Vec::new(), 1, false);
        Server { cost, instances, policy, batcher, running, idle, ends, runs, start: Instant::now(), noise, disturbed }
    }

    /// From 0 to 1.
    fn random(&mut self) -> f64 {
        self.noise ^= self.noise << 13;
        self.noise ^= self.noise >> 7;
        self.noise ^= self.noise << 17;
        (self.noise >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Up to a tenth more, and now and then a thread that was not scheduled.
    fn disturbance(&mut self) -> f64 {
        if !self.disturbed {
            return 1.0;
        }
        let outlier = if self.random() < 0.01 { 10.0 } else { 0.0 };
        1.0 + self.random() / 10.0 + outlier
    }

    fn push(&mut self, length: usize, time: f64) {
        let arrived = self.start + Duration::from_secs_f64(time);
        let full = match &mut self.policy {
            Policy::Static(rows) => *rows,
            Policy::Tuned(limits) => limits.in_force(Some(length)),
        };
        let key = crate::tensor::bucket(length);
        self.batcher.push(Entry { key, priority: 0, rows: 1, full, bytes: 0, arrived, item: length });
    }

    /// Idle instances take what waits.
    fn take(&mut self, time: f64) {
        while self.idle > 0 {
            let Some((head, rows)) = self.batcher.head() else { return };
            let share = (self.batcher.len() + self.running).div_ceil(self.instances);
            let length = Some(head.item);
            let now = self.start + Duration::from_secs_f64(time);
            let most = match &mut self.policy {
                Policy::Static(most) => Sealing { rows: *most, trial: true },
                Policy::Tuned(limits) => limits.seal(&Queued { length, rows, share, contended: false }),
            };
            let mut longest = head_length(&self.batcher);
            let policy = &self.policy;
            let polled = self.batcher.poll(now, most.rows, |rows, entry| {
                let fits = match policy {
                    _ if most.trial => true,
                    Policy::Static(_) => true,
                    Policy::Tuned(limits) => limits.fits(rows, Some(longest), 1, Some(entry.item)),
                };
                longest = if fits { longest.max(entry.item) } else { longest };
                fits
            });
            let Poll::Batch(batch) = polled else { panic!("nothing waits here") };
            let (jobs, disturbance) = (batch.len(), self.disturbance());
            let compute = (self.cost)(jobs, longest, time) * disturbance;
            self.running += jobs;
            self.idle -= 1;
            let end = ((time + compute + HAND_OVER) * 1e9) as u64;
            self.ends.push(Reverse((end, self.runs.len())));
            self.runs.push(Run { jobs, length: longest, time: compute });
        }
    }

    /// So many clients send one request after the other until `until`; rows a second from `from` on.
    fn closed(&mut self, clients: usize, lengths: Lengths, from: f64, until: f64) -> f64 {
        let mut sent = 0;
        (0..clients).for_each(|client| {
            self.push(lengths(client), 0.0);
            sent += 1;
        });
        self.take(0.0);
        let mut answered = 0;
        while let Some(Reverse((end, number))) = self.ends.pop() {
            let time = end as f64 / 1e9;
            if time > until {
                break;
            }
            let Run { jobs, length, time: compute, .. } = self.runs[number];
            if let Policy::Tuned(limits) = &mut self.policy {
                let compute = Duration::from_secs_f64(compute);
                limits.learn(jobs, Some(length), compute, compute);
            }
            self.idle += 1;
            self.running -= jobs;
            answered += if time >= from { jobs } else { 0 };
            for _ in 0..jobs {
                self.push(lengths(sent), time);
                sent += 1;
            }
            self.take(time);
        }
        answered as f64 / (until - from)
    }
}

fn head_length(batcher: &Batcher<usize, u8, usize>) -> usize {
    batcher.head().map_or(0, |(head, _)| head.item)
}

fn per_length(rows: usize, length: usize) -> f64 {
    rows as f64 * length as f64 / 16.0 * 1e-3
}

/// When some of the curves change, in seconds.
const CHANGE: f64 = 10.0;

/// Every row costs the same.
const FLAT: Cost = |rows, length, _| per_length(rows, length);
/// Much is paid once.
const FIXED: Cost = |rows, length, _| 4e-3 + per_length(rows, length) / 8.0;
/// A row costs the more, the more there are.
const CONVEX: Cost = |rows, length, _| 1e-3 + per_length(rows, length) * (1.0 + rows as f64 / 12.0);
/// Rows are computed four at a time.
const STEPS: Cost = |rows, length, _| per_length(rows.next_multiple_of(4), length);
/// Beyond 16 rows the cache is too small.
const SPILL: Cost = |rows, length, _| (1e-3 + per_length(rows, length)) * if rows > 16 { 2.0 } else { 1.0 };
/// From then on batching, which paid, does not.
const CHANGES: Cost =
    |rows, length, time| if time < CHANGE { FIXED(rows, length, time) } else { CONVEX(rows, length, time) };
/// And the other way round.
const IMPROVES: Cost =
    |rows, length, time| if time < CHANGE { CONVEX(rows, length, time) } else { FIXED(rows, length, time) };

const CURVES: [(&str, Cost); 7] = [
    ("flat", FLAT),
    ("fixed", FIXED),
    ("convex", CONVEX),
    ("steps", STEPS),
    ("spill", SPILL),
    ("changes", CHANGES),
    ("improves", IMPROVES),
];

const ONE_LENGTH: Lengths = |_| 16;
/// Short ones, and from some number on long ones, too.
const SHORT_THEN_MIXED: Lengths = |number| if number < 4_000 || number % 2 == 0 { 16 } else { 60 + number % 5 };

/// What a calibration would have found out.
fn calibrated(cost: Cost) -> Vec<Sample> {
    let sample = |length: usize, rows: usize| {
        let compute = Duration::from_secs_f64(cost(rows, length, 0.0));
        Sample { rows, length: Some(length), compute }
    };
    [16, 64].into_iter().flat_map(|length| [1, 2, 4, 8, 16, 32].map(|rows| sample(length, rows))).collect()
}

fn best_static(cost: Cost, clients: usize, lengths: Lengths, from: f64, until: f64) -> f64 {
    let rates = [1, 2, 4, 8, 16, 32]
        .map(|rows| Server::new(cost, 2, Policy::Static(rows)).closed(clients, lengths, from, until));
    rates.into_iter().fold(0.0, f64::max)
}

#[test]
fn tuned_batches_are_as_good_as_the_best_that_could_be_set_and_never_worse_than_none() {
    let mut bad = Vec::new();
    for (name, cost) in CURVES {
        for (mix, lengths) in [("one length", ONE_LENGTH), ("then mixed", SHORT_THEN_MIXED)] {
            for clients in [1, 2, 8, 64] {
                // Time to learn what has changed.
                let changes = cost(1, 1, 0.0) != cost(1, 1, CHANGE);
                let (from, until) = if changes { (60.0, 70.0) } else { (20.0, 30.0) };
                let none = Server::new(cost, 2, Policy::Static(1)).closed(clients, lengths, from, until);
                let best = best_static(cost, clients, lengths, from, until);
                // Without a calibration, or where all of it is wrong, a queue of two lengths seldom shows large sizes.
                let wanted = |samples: usize| if samples == 0 || changes { 0.85 } else { 0.95 };
                for (samples, disturbed) in [(calibrated(cost), false), (calibrated(cost), true), (Vec::new(), true)] {
                    let wanted = if mix == "one length" { 0.95 } else { wanted(samples.len()) };
                    let mut server = Server::new(cost, 2, Policy::Tuned(Limits::new(MOST, true, None, &samples)));
                    server.disturbed = disturbed;
                    // What is disturbed is so alike, whatever the batches.
                    let rate = server.closed(clients, lengths, from, until) * if disturbed { 1.15 } else { 1.0 };
                    let (to_none, to_best) = (rate / none, rate / best);
                    if to_none < 0.97 || to_best < wanted {
                        let known = samples.len();
                        bad.push(format!(
                            "{name}, {mix}, {clients} clients, {known} known: {to_none:.3} of none, {to_best:.3} of best"
                        ));
                    }
                }
            }
        }
    }
    assert!(bad.is_empty(), "\n{}", bad.join("\n"));
}
