//! One push and its share of a poll, at several depths of the queue.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use tidegate::scheduler::batcher::{Batcher, Entry, Poll};

fn entry(now: Instant) -> Entry<Box<[usize]>, u8, u64> {
    Entry { key: Box::default(), priority: 0, rows: 1, full: usize::MAX, bytes: 120, arrived: now, item: 0 }
}

fn fill(batcher: &mut Batcher<Box<[usize]>, u8, u64>, count: usize, now: Instant) {
    for _ in 0..count {
        batcher.push(entry(now));
    }
}

pub fn group() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("batcher");
    let now = Instant::now();
    for depth in [0, 32, 1024] {
        let mut batcher = Batcher::new(32, Duration::ZERO);
        fill(&mut batcher, depth, now);
        group.bench_function(BenchmarkId::new("32 pushes and the poll that takes them", depth), |b| {
            b.iter(|| {
                fill(&mut batcher, 32, now);
                assert!(matches!(batcher.poll(now, usize::MAX, |_, _| true), Poll::Batch(batch) if batch.len() == 32));
            });
        });
        let mut batcher = Batcher::new(32, Duration::ZERO);
        fill(&mut batcher, depth, now);
        group.bench_function(BenchmarkId::new("a push and its removal", depth), |b| {
            b.iter(|| {
                let ticket = batcher.push(entry(now));
                assert!(batcher.remove(ticket).is_some());
            });
        });
    }
    group.finish();
}
