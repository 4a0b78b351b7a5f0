//! What monitoring does of a request whose run answers one row, alone and on two threads in turns: what it takes more
//! there is cache lines on their way between cores, which counted instructions don't show.

use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use tidegate::monitor::events::{BatchExecuted, RequestFinished};
use tidegate::monitor::{Monitor, MonitoredOutput, VersionMonitor};
use tidegate::request::{PredictionId, Protocol, Timings, VersionId};
use tidegate::tensor::{OutputKind, Shape, Tensor};

const TOOK: Duration = Duration::from_micros(10);

fn request(monitor: &Monitor, version: &VersionMonitor, outputs: &[Tensor]) {
    let (input, gather_and_compute, split) = (Duration::ZERO, TOOK, Duration::ZERO);
    let (data, padding, failed) = (0, 0, false);
    BatchExecuted { version, requests: 1, rows: 1, data, padding, input, gather_and_compute, split, failed }.emit();
    version.fold(outputs, TOOK);
    let timings = Timings { compute: TOOK, batch_rows: 1, ..Timings::default() };
    let (version, prediction, protocol) = (Some(version), PredictionId(1), Protocol::Http);
    RequestFinished { version, prediction, protocol, outcome: Ok(&timings), duration: TOOK }.emit(monitor);
}

/// For how long a thread does so many; the mean of all threads.
fn on_threads(threads: u32, one: impl Fn() + Sync, times: u64) -> Duration {
    let timed = || {
        let begun = Instant::now();
        (0..times).for_each(|_| one());
        begun.elapsed()
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(timed)).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).sum::<Duration>() / threads
    })
}

pub fn group() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("monitor");
    let monitor = Monitor::new();
    let output = MonitoredOutput { name: "y".into(), kind: OutputKind::Logits, labels: None };
    let version = monitor.version("m".into(), VersionId::new(1).unwrap(), vec![output]);
    let outputs = [Tensor::from_vec(Shape::new([1, 2]).unwrap(), vec![0.25f32, 0.75]).unwrap()];
    for threads in [1, 2] {
        let fold = || version.fold(&outputs, TOOK);
        group.bench_function(BenchmarkId::new("a row folded", threads), |b| {
            b.iter_custom(|times| on_threads(threads, fold, times));
        });
        let request = || request(&monitor, &version, &outputs);
        group.bench_function(BenchmarkId::new("a request told", threads), |b| {
            b.iter_custom(|times| on_threads(threads, request, times));
        });
    }
    group.finish();
}
