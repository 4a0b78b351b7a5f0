//! Behaviour of the whole scheduler on a scripted model whose runs are held and released by the test. Submitting is a
//! future's first poll, so the order of arrival is the test's own; nothing here sleeps.

use super::*;
use crate::backend::{Batch, LoadError, RunError};
use crate::monitor::Monitor;
use crate::request::{Budget, BudgetConfig, VersionId};
use crate::tensor::{DataType, Dim, OutputKind, Ragged, SequenceAxis, Shape, Signature, TensorSpec};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Waker};
use std::thread::{self, ThreadId};

/// Long enough never to decide a test that passes.
const AGES: Duration = Duration::from_secs(60);

const FAIL: f32 = -1.0;
const INVALID: f32 = -2.0;
const PANIC: f32 = -3.0;

/// What the test sees and steers of its model.
#[derive(Default)]
struct Script {
    state: Mutex<ScriptState>,
    changed: Condvar,
    made: AtomicUsize,
    broken: AtomicBool,
    short_batches: AtomicBool,
    missing_output: AtomicBool,
}

#[derive(Default)]
struct ScriptState {
    held: bool,
    inside: usize,
    /// Keeps the next instance from being made.
    hold_make: bool,
    /// One is kept so.
    making: bool,
    /// The values of each run, in order.
    runs: Vec<Vec<f32>>,
    threads: HashMap<ThreadId, String>,
}

impl Script {
    /// Keeps every run from ending until released.
    fn hold(&self) {
        lock(&self.state).held = true;
    }

    fn release(&self) {
        lock(&self.state).held = false;
        self.changed.notify_all();
    }

    fn wait_for_runs_inside(&self, count: usize) {
        let state = lock(&self.state);
        drop(self.changed.wait_timeout_while(state, AGES, |state| state.inside != count).unwrap());
        assert_eq!(lock(&self.state).inside, count);
    }

    /// Keeps the next instance, and no other, from being made until released.
    fn hold_make(&self) {
        lock(&self.state).hold_make = true;
    }

    fn wait_for_make(&self) {
        let state = lock(&self.state);
        let waited = self.changed.wait_timeout_while(state, AGES, |state| !state.making).unwrap();
        assert!(!waited.1.timed_out());
    }

    fn release_make(&self) {
        lock(&self.state).making = false;
        self.changed.notify_all();
    }

    fn begin_make(&self) {
        let mut state = lock(&self.state);
        if std::mem::take(&mut state.hold_make) {
            state.making = true;
            self.changed.notify_all();
            drop(self.changed.wait_while(state, |state| state.making).unwrap());
        }
    }

    fn runs(&self) -> Vec<Vec<f32>> {
        lock(&self.state).runs.clone()
    }

    fn enter(&self, values: &[f32]) {
        let mut state = lock(&self.state);
        state.inside += 1;
        state.runs.push(values.to_vec());
        let thread = thread::current();
        state.threads.insert(thread.id(), thread.name().unwrap_or_default().to_string());
        self.changed.notify_all();
        let mut state = self.changed.wait_while(state, |state| state.held).unwrap();
        state.inside -= 1;
        self.changed.notify_all();
    }
}

/// One input `x` and two outputs of one FP32 per row: `double` and `half`.
struct ScriptedModel {
    script: Arc<Script>,
    signature: Signature,
}

struct ScriptedInstance(Arc<Script>);

fn spec(name: &str) -> TensorSpec {
    TensorSpec { name: name.into(), dtype: DataType::Fp32, dims: Some(vec![Dim::Free(None), Dim::Fixed(1)]) }
}

impl Model for ScriptedModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn output_kinds(&self) -> &[OutputKind] {
        &[OutputKind::Values; 2]
    }
    fn instance(&self) -> Result<Box<dyn Instance>, LoadError> {
        self.script.begin_make();
        if self.script.broken.load(Ordering::SeqCst) {
            return Err(LoadError::Engine { engine: "scripted", message: "out of memory".into() });
        }
        self.script.made.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(ScriptedInstance(Arc::clone(&self.script))))
    }
    fn warnings(&self) -> &[String] {
        &[]
    }
}

impl Instance for ScriptedInstance {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Tensor>, RunError> {
        let input = batch.input(0);
        let mut bytes = vec![0; input.byte_length()];
        input.gather_into(&mut bytes);
        let values: Vec<f32> = bytemuck::allocation::pod_collect_to_vec(&bytes);
        self.0.enter(&values);
        if values.contains(&PANIC) {
            panic!("scripted");
        }
        if values.contains(&INVALID) {
            return Err(RunError::InvalidArgument("index out of range".into()));
        }
        if values.contains(&FAIL) {
            return Err(RunError::Failed("scripted failure".into()));
        }
        let lost = usize::from(values.len() > 1 && self.0.short_batches.load(Ordering::SeqCst));
        let (rows, width) = (input.shape().dims()[0] - lost, input.shape().dims()[1]);
        let output = |factor: f32| {
            let kept = values[lost * width..].iter().map(|value| value * factor).collect();
            Tensor::from_vec(Shape::new([rows, width]).unwrap(), kept).unwrap()
        };
        let mut outputs = vec![output(2.0), output(0.5)];
        outputs.truncate(if self.0.missing_output.load(Ordering::SeqCst) { 1 } else { 2 });
        Ok(outputs)
    }
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_vec(Shape::new([values.len(), 1]).unwrap(), values.to_vec()).unwrap()
}

fn group(script: &Arc<Script>, instances: usize, cores: usize) -> Group {
    let signature = Signature { inputs: vec![spec("x")], outputs: vec![spec("double"), spec("half")] };
    let model = Arc::new(ScriptedModel { script: Arc::clone(script), signature });
    let instance = model.instance().unwrap();
    Group { model, instance, instances, cores, costs: Vec::new(), wide: None }
}

struct Bench {
    script: Arc<Script>,
    budget: Arc<Budget>,
    gate: Arc<Gate>,
    monitor: Arc<Monitor>,
    scheduler: Scheduler,
}

type Submitted<'a> = Pin<Box<dyn Future<Output = Result<Answer>> + Send + 'a>>;

impl Bench {
    fn new(config: Config) -> Bench {
        Bench::of(1, config)
    }

    /// Of up to so many instances in one group.
    fn of(instances: usize, config: Config) -> Bench {
        let script = Arc::default();
        Bench::with(&script, vec![group(&script, instances, 1)], config)
    }

    /// `script` is what the test steers by default.
    fn with(script: &Arc<Script>, groups: Vec<Group>, config: Config) -> Bench {
        let monitor = Monitor::new();
        let version = monitor.version("m".into(), VersionId::new(1).unwrap(), Vec::new());
        let gate = Gate::new(4);
        let scheduler = Scheduler::new("scripted/7", groups, config, Arc::clone(&gate), version);
        let budget = Budget::new(BudgetConfig::default());
        Bench { script: Arc::clone(script), budget, gate, monitor, scheduler }
    }

    fn config() -> Config {
        Config { linger: AGES, longest_inline: Duration::ZERO, ..Config::default() }
    }

    fn prepared(values: &[f32]) -> Prepared {
        Prepared {
            length: None,
            inputs: vec![tensor(values)],
            outputs: vec![0],
            rows: values.len(),
            key: Box::default(),
            deadline: None,
            priority: Priority::default(),
        }
    }

    /// In the queue when this returns, if it is let in.
    fn send(&self, prepared: Prepared) -> Submitted<'_> {
        let permit = self.budget.admit(8, Instant::now()).unwrap();
        let mut submitted: Submitted = Box::pin(self.scheduler.submit(prepared, permit));
        match submitted.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Pending => submitted,
            Poll::Ready(outcome) => Box::pin(std::future::ready(outcome)),
        }
    }

    fn submit(&self, values: &[f32]) -> Submitted<'_> {
        self.send(Self::prepared(values))
    }

    /// A request that has the worker's attention until the script is released.
    fn occupy(&self) -> Submitted<'_> {
        self.script.hold();
        let first = self.submit(&[100.0]);
        self.script.wait_for_runs_inside(1);
        first
    }

    fn queued(&self) -> usize {
        lock(&self.scheduler.shared.state).batcher.len()
    }

    /// Blocks until a worker's end has brought the state about.
    fn wait_for_an_end(&self, reached: impl Fn(&State) -> bool) {
        let state = lock(&self.scheduler.shared.state);
        let ended = self.scheduler.shared.ended.wait_timeout_while(state, AGES, |state| !reached(state)).unwrap();
        assert!(!ended.1.timed_out());
    }

    /// Spins until as many workers are at it: nothing signals that they have begun to.
    fn wait_until(&self, at_it: impl Fn(&Slots) -> usize, workers: usize) {
        let since = Instant::now();
        let count = || lock(&self.scheduler.shared.state).slots.iter().map(&at_it).sum::<usize>();
        while count() < workers && since.elapsed() < AGES {
            thread::yield_now();
        }
        assert_eq!(count(), workers);
    }

    fn in_flight(&self) -> usize {
        self.budget.requests()
    }

    /// As a scrape shows it.
    fn running(&self) -> usize {
        let text = self.monitor.render();
        let series = "tidegate_running{model=\"m\",version=\"1\"} ";
        text.lines().find_map(|line| line.strip_prefix(series)).expect("the series").parse().unwrap()
    }

    fn join(&self) {
        self.scheduler.join(Instant::now() + AGES).unwrap();
        let state = lock(&self.scheduler.shared.state);
        let counts = [state.workers, state.returning, state.running, state.inline, state.lent];
        let rows = [state.running_rows, state.answering, state.answering_rows];
        assert_eq!((counts, rows, state.growing), ([0; 5], [0; 3], false), "a count is off");
        for (group, slots) in state.slots.iter().enumerate() {
            let counts = [slots.resting, slots.calls, slots.heading, slots.filling];
            assert_eq!(counts, [0; 4], "a count of group {group} is off");
            assert_eq!(slots.taken, state.instances.iter().filter(|(of, _)| *of == group).count(), "group {group}");
        }
    }
}

async fn done(submitted: Submitted<'_>) -> Result<Answer> {
    tokio::time::timeout(AGES, submitted).await.expect("answered")
}

async fn values(submitted: Submitted<'_>) -> Vec<f32> {
    done(submitted).await.unwrap().outputs[0].to_vec().unwrap()
}

async fn kind(submitted: Submitted<'_>) -> Kind {
    done(submitted).await.unwrap_err().kind()
}

#[tokio::test]
async fn eight_that_wait_run_as_one_batch_and_each_gets_its_own_rows() {
    let bench = Bench::new(Bench::config());
    let first = bench.occupy();
    let waiting: Vec<_> = (1..=8).map(|i| bench.submit(&vec![i as f32; 1 + i % 3])).collect();
    assert_eq!(bench.queued(), 8);
    bench.script.release();
    assert_eq!(values(first).await, [200.0]);
    for (i, submitted) in (1..=8).zip(waiting) {
        let answer = done(submitted).await.unwrap();
        assert_eq!(answer.outputs[0].to_vec::<f32>().unwrap(), vec![2.0 * i as f32; 1 + i % 3]);
        assert_eq!((answer.outputs.len(), answer.timings.batch_rows), (1, 17));
        assert!(answer.timings.compute > Duration::ZERO);
    }
    assert_eq!(bench.script.runs().iter().map(Vec::len).collect::<Vec<_>>(), [1, 17]);
    bench.join();
    assert_eq!(bench.in_flight(), 0);
}

#[tokio::test]
async fn requested_outputs_come_in_the_order_asked_for() {
    let bench = Bench::new(Bench::config());
    let first = bench.occupy();
    let both = bench.send(Prepared { outputs: vec![1, 0], ..Bench::prepared(&[4.0, 8.0]) });
    let half = bench.send(Prepared { outputs: vec![1], ..Bench::prepared(&[6.0]) });
    bench.script.release();
    done(first).await.unwrap();
    let outputs = done(both).await.unwrap().outputs;
    assert_eq!(outputs.iter().map(|o| o.to_vec::<f32>().unwrap()).collect::<Vec<_>>(), [[2.0, 4.0], [8.0, 16.0]]);
    assert_eq!(values(half).await, [3.0]);
}

#[tokio::test]
async fn a_large_request_runs_alone_and_an_unbatched_version_one_by_one() {
    let bench = Bench::new(Config { preferred_rows: 4, ..Bench::config() });
    let first = bench.occupy();
    let sizes = [1, 9, 2, 2, 3];
    let waiting: Vec<_> = sizes.iter().map(|rows| bench.submit(&vec![1.0; *rows])).collect();
    bench.script.release();
    done(first).await.unwrap();
    for (submitted, rows) in waiting.into_iter().zip(sizes) {
        assert_eq!(values(submitted).await, vec![2.0; rows]);
    }
    assert_eq!(bench.script.runs().iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 9, 4, 3]);

    let bench = Bench::new(Config { batching: false, ..Bench::config() });
    assert!(!bench.scheduler.batches());
    let first = bench.occupy();
    let waiting: Vec<_> = (0..3).map(|_| bench.submit(&[1.0])).collect();
    bench.script.release();
    for submitted in std::iter::once(first).chain(waiting) {
        done(submitted).await.unwrap();
    }
    assert_eq!(bench.script.runs().len(), 4);
}

#[tokio::test]
async fn keys_never_mix_and_priority_goes_first() {
    let bench = Bench::new(Bench::config());
    let first = bench.occupy();
    let keyed = |key: usize, value| Prepared { key: [key].into(), ..Bench::prepared(&[value]) };
    let mut waiting: Vec<_> =
        [(1, 1.0), (2, 2.0), (1, 3.0)].into_iter().map(|(k, v)| bench.send(keyed(k, v))).collect();
    waiting.push(bench.send(Prepared { priority: Priority::from_wire(1), ..keyed(2, 4.0) }));
    bench.script.release();
    for submitted in std::iter::once(first).chain(waiting) {
        done(submitted).await.unwrap();
    }
    assert_eq!(bench.script.runs()[1..], [vec![4.0, 2.0], vec![1.0, 3.0]]);
}

#[tokio::test]
async fn requests_of_different_lengths_share_a_batch_and_get_their_own_back() {
    let sequence = SequenceAxis { axis: 1, fill: 9f32.to_le_bytes().into() };
    let ragged = Ragged { inputs: vec![Some(sequence)], outputs: vec![vec![1], vec![1]], even: true };
    let bench = Bench::new(Config { ragged: Some(Arc::new(ragged)), ..Bench::config() });
    let first = bench.occupy();
    let row = |values: &[f32]| {
        let input = Tensor::from_vec(Shape::new([1, values.len()]).unwrap(), values.to_vec()).unwrap();
        bench.send(Prepared { inputs: vec![input], rows: 1, length: Some(values.len()), ..Bench::prepared(&[0.0]) })
    };
    let waiting = [row(&[1.0, 2.0, 3.0]), row(&[4.0, 5.0])];
    bench.script.release();
    done(first).await.unwrap();
    for (submitted, expected) in waiting.into_iter().zip([&[2.0f32, 4.0, 6.0][..], &[8.0, 10.0]]) {
        let answer = done(submitted).await.unwrap();
        assert_eq!(answer.outputs[0].shape().dims(), [1, expected.len()]);
        assert_eq!(answer.outputs[0].to_vec::<f32>().unwrap(), expected);
    }
    assert_eq!(bench.script.runs()[1..], [vec![1.0, 2.0, 3.0, 4.0, 5.0, 9.0]]);
}

#[tokio::test]
async fn a_deadline_behind_a_held_run_is_answered_and_frees_the_place() {
    let bench = Bench::new(Bench::config());
    let first = bench.occupy();
    let deadline = Some(Instant::now() + Duration::from_millis(50));
    let late = bench.send(Prepared { deadline, ..Bench::prepared(&[1.0]) });
    assert_eq!((bench.queued(), bench.in_flight(), bench.running()), (1, 2, 1));
    let error = done(late).await.unwrap_err();
    assert_eq!((error.kind(), error.message()), (Kind::DeadlineExceeded, "Request timeout expired"));
    assert_eq!((bench.queued(), bench.in_flight()), (0, 1));

    // One that is running is answered in time too, finishes unheard, and keeps its permit until then.
    drop(first);
    assert_eq!(bench.in_flight(), 1);
    let past = bench.send(Prepared { deadline: Some(Instant::now()), ..Bench::prepared(&[1.0]) });
    assert_eq!(kind(past).await, Kind::DeadlineExceeded);
    bench.script.release();
    bench.join();
    assert_eq!((bench.script.runs().len(), bench.in_flight(), bench.running()), (1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_deadline_is_answered_when_it_is_due_however_long_the_run_before_it_takes() {
    let bench = Bench::new(Bench::config());
    let _first = bench.occupy();
    let asked = tokio::time::Instant::now();
    let deadline = Some(asked.into_std() + Duration::from_millis(50));
    let late = bench.send(Prepared { deadline, ..Bench::prepared(&[1.0]) });
    assert_eq!(late.await.unwrap_err().kind(), Kind::DeadlineExceeded);
    // The timer counts in whole milliseconds.
    assert!(asked.elapsed() <= Duration::from_millis(51), "{:?}", asked.elapsed());
    bench.script.release();
}

#[tokio::test]
async fn a_caller_that_leaves_frees_its_place_and_its_permit_at_once() {
    let bench = Bench::new(Bench::config());
    let first = bench.occupy();
    let mut waiting: Vec<_> = (0..3).map(|i| bench.submit(&[i as f32])).collect();
    drop(waiting.remove(1));
    assert_eq!((bench.queued(), bench.in_flight()), (2, 3));
    bench.script.release();
    for submitted in std::iter::once(first).chain(waiting) {
        done(submitted).await.unwrap();
    }
    assert_eq!(bench.script.runs()[1..], [vec![0.0, 2.0]]);
}

#[tokio::test]
async fn one_poisonous_request_among_32_fails_alone() {
    for (poison, expected) in [
        (FAIL, (Kind::BackendFailed, "scripted failure")),
        (INVALID, (Kind::InvalidInput, "index out of range")),
        (PANIC, (Kind::BackendFailed, "the backend panicked")),
    ] {
        for place in [0, 13, 31] {
            let bench = Bench::new(Bench::config());
            let first = bench.occupy();
            let waiting: Vec<_> =
                (0..32).map(|i| bench.submit(&[if i == place { poison } else { i as f32 }])).collect();
            bench.script.release();
            done(first).await.unwrap();
            for (i, submitted) in waiting.into_iter().enumerate() {
                match done(submitted).await {
                    Ok(answer) => assert_eq!(answer.outputs[0].to_vec::<f32>().unwrap(), [2.0 * i as f32]),
                    Err(error) => assert_eq!((i, (error.kind(), error.message())), (place, expected)),
                }
            }
            assert_eq!(bench.script.runs().len(), 2 + 2 * 5, "halves of 16, 8, 4, 2 and 1");
            assert_eq!(values(bench.submit(&[5.0])).await, [10.0]);
            bench.join();
        }
    }
}

#[tokio::test]
async fn however_many_are_poisonous_each_gets_its_own_error() {
    // Of 32: all, and one in each four; with the runs that the halves take.
    let all = 2 + 4 + 8 + 16 + 32;
    let each_fourth = 2 + 4 + 8 + 16 + 16;
    for (every, extra_runs) in [(1, all), (4, each_fourth)] {
        let bench = Bench::new(Bench::config());
        let first = bench.occupy();
        let poisonous = |i: usize| i.is_multiple_of(every);
        let waiting: Vec<_> = (0..32).map(|i| bench.submit(&[if poisonous(i) { INVALID } else { i as f32 }])).collect();
        bench.script.release();
        done(first).await.unwrap();
        for (i, submitted) in waiting.into_iter().enumerate() {
            match done(submitted).await {
                Ok(answer) => {
                    assert!(!poisonous(i));
                    assert_eq!(answer.outputs[0].to_vec::<f32>().unwrap(), [2.0 * i as f32]);
                }
                Err(error) => {
                    assert!(poisonous(i), "{i}: {error}");
                    assert_eq!((error.kind(), error.message()), (Kind::InvalidInput, "index out of range"));
                }
            }
        }
        assert_eq!(bench.script.runs().len(), 2 + extra_runs);
        bench.join();
    }
}

#[tokio::test]
async fn a_panic_costs_the_instance_which_is_made_again() {
    let bench = Bench::new(Bench::config());
    assert_eq!(kind(bench.submit(&[PANIC])).await, Kind::BackendFailed);
    assert_eq!(values(bench.submit(&[1.0])).await, [2.0]);
    assert_eq!(bench.script.made.load(Ordering::SeqCst), 2);

    bench.script.broken.store(true, Ordering::SeqCst);
    assert_eq!(kind(bench.submit(&[PANIC])).await, Kind::BackendFailed);
    let error = done(bench.submit(&[1.0])).await.unwrap_err();
    assert_eq!((error.kind(), error.message()), (Kind::BackendFailed, "`scripted/7` has no working instance"));
    assert_eq!(bench.script.runs().len(), 3, "without an instance nothing ran");
    bench.script.broken.store(false, Ordering::SeqCst);
    assert_eq!(values(bench.submit(&[1.0])).await, [2.0]);
    bench.join();
}

#[tokio::test]
async fn a_worker_that_left_without_an_instance_is_replaced() {
    let bench = Bench::new(Config { linger: Duration::ZERO, ..Bench::config() });
    bench.script.broken.store(true, Ordering::SeqCst);
    assert_eq!(kind(bench.submit(&[PANIC])).await, Kind::BackendFailed);
    assert_eq!(kind(bench.submit(&[1.0])).await, Kind::BackendFailed);
    bench.script.broken.store(false, Ordering::SeqCst);
    assert_eq!(values(bench.submit(&[1.0])).await, [2.0]);
    bench.join();
}

#[tokio::test]
async fn outputs_that_are_not_by_rows_demote_the_version() {
    let bench = Bench::new(Bench::config());
    bench.script.short_batches.store(true, Ordering::SeqCst);
    assert!(bench.scheduler.batches());
    let first = bench.occupy();
    let waiting: Vec<_> = (0..3).map(|i| bench.submit(&[i as f32])).collect();
    bench.script.release();
    done(first).await.unwrap();
    for (i, submitted) in waiting.into_iter().enumerate() {
        assert_eq!(values(submitted).await, [2.0 * i as f32]);
    }
    assert!(!bench.scheduler.batches());
    assert_eq!(bench.script.runs().iter().map(Vec::len).collect::<Vec<_>>(), [1, 3, 1, 1, 1]);

    let first = bench.occupy();
    let waiting: Vec<_> = (0..3).map(|i| bench.submit(&[i as f32])).collect();
    bench.script.release();
    for submitted in std::iter::once(first).chain(waiting) {
        done(submitted).await.unwrap();
    }
    assert_eq!(bench.script.runs()[5..].iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 1, 1]);
    // A lone request's outputs are its own, whatever their rows.
    assert_eq!(values(bench.submit(&[1.0, 2.0])).await, [4.0]);
}

#[tokio::test]
async fn a_backend_that_leaves_out_an_output_fails() {
    let bench = Bench::new(Bench::config());
    bench.script.missing_output.store(true, Ordering::SeqCst);
    let error = done(bench.submit(&[1.0])).await.unwrap_err();
    assert_eq!((error.kind(), error.message()), (Kind::BackendFailed, "the backend gave 1 outputs, expected 2"));
}

#[tokio::test]
async fn over_the_queue_is_refused_and_leaves_nothing_behind() {
    let bench = Bench::new(Config { max_queue_requests: 2, max_queue_bytes: 100, ..Bench::config() });
    let first = bench.occupy();
    let waiting = [bench.submit(&[1.0; 20]), bench.submit(&[2.0])];
    assert_eq!(kind(bench.submit(&[3.0])).await, Kind::Overloaded);
    let [large, small] = waiting;
    drop(small);
    let error = done(bench.submit(&[4.0; 6])).await.unwrap_err();
    assert!(error.kind() == Kind::Overloaded && error.message().starts_with("Exceeds maximum queue size"), "{error}");
    let fits = bench.submit(&[4.0; 5]);
    assert_eq!((bench.queued(), bench.in_flight()), (2, 3));
    bench.script.release();
    for submitted in [first, large, fits] {
        done(submitted).await.unwrap();
    }
}

#[tokio::test]
async fn closed_serves_what_is_queued_and_refuses_what_comes() {
    let bench = Bench::new(Bench::config());
    let first = bench.occupy();
    let queued = bench.submit(&[1.0]);
    bench.scheduler.close();
    assert_eq!(kind(bench.submit(&[2.0])).await, Kind::NotReady);
    assert_eq!(bench.scheduler.join(Instant::now()), Err(2), "one runs, one waits");
    bench.script.release();
    assert_eq!((values(first).await, values(queued).await), (vec![200.0], vec![2.0]));
    bench.join();
    bench.join();
    let Bench { script, scheduler, .. } = bench;
    assert_eq!(Arc::strong_count(&scheduler.shared), 1, "no thread is left");
    drop(scheduler);
    assert_eq!(Arc::strong_count(&script), 1, "no instance is left");
}

#[tokio::test]
async fn a_dropped_scheduler_lets_its_threads_go() {
    let Bench { script, scheduler, budget, gate, .. } = Bench::new(Bench::config());
    let permit = budget.admit(0, Instant::now()).unwrap();
    scheduler.submit(Bench::prepared(&[1.0]), permit).await.unwrap();
    drop((scheduler, gate));
    // The resting thread holds model and instance until it has noticed.
    let since = Instant::now();
    while Arc::strong_count(&script) > 1 && since.elapsed() < AGES {
        thread::yield_now();
    }
    assert_eq!(Arc::strong_count(&script), 1);
}

#[tokio::test]
async fn an_idle_version_has_no_thread_and_comes_back() {
    let bench = Bench::new(Config { linger: Duration::ZERO, ..Bench::config() });
    for _ in 0..3 {
        assert_eq!(values(bench.submit(&[1.0])).await, [2.0]);
        bench.wait_for_an_end(|state| state.workers == 0 && state.instances.len() == 1 && state.slots[0].taken == 1);
    }
    assert_eq!(bench.script.made.load(Ordering::SeqCst), 1, "the instance was kept");
    let threads = lock(&bench.script.state).threads.clone();
    assert!(threads.len() == 3 && threads.values().all(|name| name == "scripted/7#0"), "{threads:?}");
}

#[tokio::test]
async fn instances_are_added_as_load_asks_for_them() {
    let bench = Bench::of(3, Config { preferred_rows: 1, ..Bench::config() });
    for _ in 0..5 {
        values(bench.submit(&[1.0])).await;
    }
    assert_eq!(bench.script.made.load(Ordering::SeqCst), 1, "one is enough for one caller");
    bench.script.hold();
    let mut waiting = Vec::new();
    for inside in 1..=3 {
        waiting.push(bench.submit(&[1.0]));
        bench.script.wait_for_runs_inside(inside);
    }
    waiting.push(bench.submit(&[1.0]));
    assert_eq!((bench.queued(), bench.script.made.load(Ordering::SeqCst)), (1, 3));
    bench.script.release();
    for submitted in waiting {
        done(submitted).await.unwrap();
    }
    bench.join();
}

#[tokio::test]
async fn a_version_makes_do_with_the_instances_it_has() {
    let bench = Bench::of(3, Config { preferred_rows: 1, ..Bench::config() });
    bench.script.broken.store(true, Ordering::SeqCst);
    let first = bench.occupy();
    let second = bench.submit(&[1.0]);
    bench.wait_for_an_end(|state| state.slots[0].most == 1);
    bench.script.release();
    for submitted in [first, second] {
        done(submitted).await.unwrap();
    }
    bench.join();
}

/// While one worker fails to make a second instance, the other one loses the first.
#[tokio::test]
async fn the_last_place_for_an_instance_is_never_given_up() {
    let config = Config { preferred_rows: 1, linger: Duration::ZERO, ..Bench::config() };
    let bench = Bench::of(2, config);
    bench.script.hold();
    bench.script.hold_make();
    let panics = bench.submit(&[PANIC]);
    bench.script.wait_for_runs_inside(1);
    let rejected = bench.submit(&[1.0]);
    bench.script.wait_for_make();
    bench.script.broken.store(true, Ordering::SeqCst);
    bench.script.release();
    for submitted in [panics, rejected] {
        assert_eq!(kind(submitted).await, Kind::BackendFailed);
    }
    bench.wait_for_an_end(|state| state.workers == 1);
    bench.script.release_make();
    bench.wait_for_an_end(|state| state.workers == 0);
    assert_eq!(kind(bench.submit(&[1.0])).await, Kind::BackendFailed);
    bench.script.broken.store(false, Ordering::SeqCst);
    assert_eq!(values(bench.submit(&[1.0])).await, [2.0]);
    bench.join();
}

#[tokio::test]
async fn groups_answer_alike_the_first_one_first_and_each_keeps_its_own_number() {
    let (first, second) = (Arc::<Script>::default(), Arc::<Script>::default());
    let groups = vec![group(&first, 1, 0), group(&second, 2, 1)];
    let config = Config { preferred_rows: 1, linger: Duration::ZERO, ..Bench::config() };
    let bench = Bench::with(&first, groups, config);
    values(bench.submit(&[1.0])).await;
    bench.wait_for_an_end(|state| state.workers == 0);
    assert_eq!((first.runs().len(), second.runs().len()), (1, 0), "the group in front is used first");
    first.hold();
    second.hold();
    let mut waiting = vec![bench.submit(&[2.0])];
    first.wait_for_runs_inside(1);
    for inside in 1..=2 {
        waiting.push(bench.submit(&[3.0]));
        second.wait_for_runs_inside(inside);
    }
    waiting.push(bench.submit(&[4.0]));
    assert_eq!((bench.queued(), first.made.load(Ordering::SeqCst), second.made.load(Ordering::SeqCst)), (1, 1, 2));
    first.release();
    second.release();
    for submitted in waiting {
        done(submitted).await.unwrap();
    }
    bench.join();
}

#[tokio::test]
async fn an_instance_that_panicked_is_made_again_in_its_own_group() {
    let (first, second) = (Arc::<Script>::default(), Arc::<Script>::default());
    let groups = vec![group(&first, 1, 0), group(&second, 1, 1)];
    let bench = Bench::with(&first, groups, Config { linger: Duration::ZERO, ..Bench::config() });
    assert_eq!(kind(bench.submit(&[PANIC])).await, Kind::BackendFailed);
    bench.wait_for_an_end(|state| state.workers == 0);
    second.hold();
    first.hold();
    let waiting = [bench.submit(&[1.0]), bench.send(Prepared { key: [1].into(), ..Bench::prepared(&[2.0]) })];
    first.wait_for_runs_inside(1);
    second.wait_for_runs_inside(1);
    assert_eq!((first.made.load(Ordering::SeqCst), second.made.load(Ordering::SeqCst)), (2, 1));
    first.release();
    second.release();
    for submitted in waiting {
        done(submitted).await.unwrap();
    }
    bench.join();
}

#[tokio::test]
async fn a_group_that_cannot_make_its_instance_leaves_its_requests_to_another() {
    let (first, second) = (Arc::<Script>::default(), Arc::<Script>::default());
    let bench = Bench::with(&first, vec![group(&first, 1, 0), group(&second, 1, 1)], Bench::config());
    let all = bench.scheduler.shared.gate.acquire(usize::MAX);
    first.broken.store(true, Ordering::SeqCst);
    first.hold();
    first.hold_make();
    let panics = bench.submit(&[PANIC]);
    first.wait_for_runs_inside(1);
    let deadline = Some(Instant::now() + AGES);
    let taken = bench.send(Prepared { deadline, ..Bench::prepared(&[1.0]) });
    let [leaves_while_taken, leaves_when_put_back] = [bench.submit(&[2.0]), bench.submit(&[3.0])];
    first.release();
    assert_eq!(kind(panics).await, Kind::BackendFailed);
    first.wait_for_make();
    assert_eq!(bench.queued(), 0, "the worker without an instance has them");
    drop(leaves_while_taken);
    let later = bench.submit(&[4.0]);
    first.release_make();
    bench.wait_for_an_end(|state| state.workers == 1);
    assert_eq!((bench.queued(), bench.in_flight(), bench.running()), (3, 3, 0));
    drop(leaves_when_put_back);
    assert_eq!((bench.queued(), bench.in_flight()), (2, 2));
    drop(all);
    assert_eq!((values(taken).await, values(later).await), (vec![2.0], vec![8.0]));
    assert_eq!(second.runs(), [[1.0, 4.0]], "in their old order");

    // The last group that has a place keeps it, and tells its callers.
    second.broken.store(true, Ordering::SeqCst);
    assert_eq!(kind(bench.submit(&[PANIC])).await, Kind::BackendFailed);
    assert_eq!(kind(bench.submit(&[1.0])).await, Kind::BackendFailed);
    second.broken.store(false, Ordering::SeqCst);
    assert_eq!(values(bench.submit(&[1.0])).await, [2.0]);
    assert_eq!((first.runs().len(), first.made.load(Ordering::SeqCst)), (1, 1));
    bench.join();
}

/// A worker that waits for a core counts for nothing where the group in front rests.
#[tokio::test]
async fn no_request_waits_for_a_core_while_the_group_in_front_rests() {
    let (first, second) = (Arc::<Script>::default(), Arc::<Script>::default());
    let groups = vec![group(&first, 1, 0), group(&second, 1, 1)];
    let bench = Bench::with(&first, groups, Config { preferred_rows: 1, ..Bench::config() });
    first.hold();
    second.hold();
    let mut warm = vec![bench.submit(&[1.0])];
    first.wait_for_runs_inside(1);
    warm.push(bench.submit(&[2.0]));
    second.wait_for_runs_inside(1);
    // The group in front rests last, so that the order in which threads came to rest would choose the other one.
    second.release();
    bench.wait_until(|slots| slots.resting, 1);
    first.release();
    for submitted in warm {
        done(submitted).await.unwrap();
    }
    bench.wait_until(|slots| slots.resting, 2);

    let all = bench.scheduler.shared.gate.acquire(usize::MAX);
    first.hold();
    let mut waiting = vec![bench.submit(&[3.0])];
    first.wait_for_runs_inside(1);
    waiting.push(bench.submit(&[4.0]));
    bench.gate.wait_for_waiters(1);
    first.release();
    for submitted in waiting {
        done(submitted).await.unwrap();
    }
    bench.wait_until(|slots| slots.resting, 1);
    assert_eq!(values(bench.submit(&[5.0])).await, [10.0]);
    assert_eq!((first.runs().len(), second.runs().len()), (4, 1));
    drop(all);
    bench.join();
}

#[tokio::test]
async fn what_computes_elsewhere_runs_while_every_core_is_taken() {
    let script = Arc::default();
    let bench = Bench::with(&script, vec![group(&script, 1, 0)], Bench::config());
    let all = bench.scheduler.shared.gate.acquire(usize::MAX);
    assert_eq!(values(bench.submit(&[1.0])).await, [2.0]);
    drop(all);
    bench.join();
}

#[tokio::test]
async fn batches_fill_while_the_gate_is_busy() {
    let bench = Bench::new(Bench::config());
    let all = bench.scheduler.shared.gate.acquire(usize::MAX);
    let waiting: Vec<_> = (0..8).map(|i| bench.submit(&[i as f32])).collect();
    drop(all);
    for submitted in waiting {
        done(submitted).await.unwrap();
    }
    assert_eq!(bench.script.runs().len(), 1);
}

#[tokio::test]
async fn with_a_delay_a_batch_waits_until_it_is_full_due_or_closed() {
    let bench = Bench::new(Config { preferred_rows: 2, max_delay: batcher::MAX_DELAY, ..Bench::config() });
    let pair = [bench.submit(&[1.0]), bench.submit(&[2.0])];
    for submitted in pair {
        done(submitted).await.unwrap();
    }
    assert_eq!(bench.script.runs(), [[1.0, 2.0]]);
    let alone = bench.submit(&[3.0]);
    bench.scheduler.close();
    assert_eq!(values(alone).await, [6.0]);
    bench.join();

    let bench = Bench::new(Config { max_delay: Duration::from_millis(5), ..Bench::config() });
    let answer = done(bench.submit(&[1.0])).await.unwrap();
    assert!(answer.timings.queue >= Duration::from_millis(5));
    bench.join();
}

/// The worker that a full lane wakes takes the head of another lane; somebody must still come for the full one.
#[tokio::test]
async fn a_full_lane_does_not_wait_for_the_worker_that_took_anothers_head() {
    let config = Config { preferred_rows: 2, max_delay: batcher::MAX_DELAY, ..Bench::config() };
    let bench = Bench::of(2, config);
    let keyed = |key: usize, value| Prepared { key: [key].into(), ..Bench::prepared(&[value]) };
    bench.script.hold();
    let mut waiting = vec![bench.send(keyed(1, 1.0)), bench.send(keyed(2, 2.0))];
    bench.wait_until(|slots| slots.filling, 2);
    waiting.push(bench.send(keyed(2, 3.0)));
    bench.script.wait_for_runs_inside(2);
    bench.script.release();
    for submitted in waiting {
        done(submitted).await.unwrap();
    }
    let mut runs = bench.script.runs();
    runs.sort_by_key(Vec::len);
    assert_eq!(runs, [vec![1.0], vec![2.0, 3.0]]);
    bench.join();
}

/// Callers that come, wait, leave and are poisonous at random, on several instances: every one gets its own answer,
/// nothing is left, and no count is off.
#[test]
fn nobody_gets_anothers_rows_under_load() {
    const CALLERS: usize = 16;
    const REQUESTS: usize = 400;
    let bench = Bench::of(3, Config { preferred_rows: 8, ..Bench::config() });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    thread::scope(|scope| {
        for caller in 0..CALLERS {
            let (bench, handle) = (&bench, runtime.handle().clone());
            scope.spawn(move || {
                handle.block_on(async {
                    for i in 0..REQUESTS {
                        let own = (caller * REQUESTS + i) as f32;
                        let rows = 1 + (caller + i) % 3;
                        if i % 11 == 3 {
                            drop(bench.submit(&vec![own; rows]));
                        } else if i % 37 == 5 {
                            assert_eq!(kind(Box::pin(submit(bench, &[FAIL]))).await, Kind::BackendFailed);
                        } else {
                            assert_eq!(values(Box::pin(submit(bench, &vec![own; rows]))).await, vec![2.0 * own; rows]);
                        }
                    }
                });
            });
        }
    });
    bench.join();
    assert_eq!((bench.queued(), bench.in_flight()), (0, 0));
}

async fn submit(bench: &Bench, values: &[f32]) -> Result<Answer> {
    let permit = bench.budget.admit(0, Instant::now())?;
    bench.scheduler.submit(Bench::prepared(values), permit).await
}

/// Its first run is a worker's, which has noticed that it was short; the test's own thread runs what comes next.
async fn quick() -> Bench {
    let bench = Bench::new(Config { longest_inline: AGES, ..Bench::config() });
    assert_eq!(values(bench.submit(&[1.0])).await, [2.0]);
    bench.wait_until(|slots| slots.resting, 1);
    bench
}

impl Bench {
    /// As [`Self::occupy`], on a version that would run it here.
    fn occupy_a_worker(&self) -> Submitted<'_> {
        let state = &self.scheduler.shared.state;
        let (group, instance) = lock(state).instances.pop().expect("an idle instance");
        self.script.hold();
        let first = self.submit(&[100.0]);
        assert_eq!(self.queued(), 1);
        // Back from whoever had it, as a run that ends would.
        let mut locked = lock(state);
        locked.instances.push((group, instance));
        let call = self.scheduler.shared.summon(&mut locked);
        drop(locked);
        self.scheduler.shared.wake(call, None);
        self.script.wait_for_runs_inside(1);
        first
    }

    fn runs_of_this_thread(&self) -> bool {
        lock(&self.script.state).threads.contains_key(&thread::current().id())
    }
}

#[tokio::test]
async fn a_short_run_is_its_callers_own() {
    let bench = quick().await;
    assert!(!bench.runs_of_this_thread(), "nothing was known of it");
    let answer = done(bench.submit(&[3.0])).await.unwrap();
    assert_eq!(answer.outputs[0].to_vec::<f32>().unwrap(), [6.0]);
    assert_eq!(answer.timings.batch_rows, 1);
    assert!(bench.runs_of_this_thread());
    drop(answer);
    assert_eq!((bench.in_flight(), bench.running()), (0, 0));
    assert!(bench.monitor.render().contains("tidegate_executions_total{model=\"m\",version=\"1\"} 2"));
    bench.join();
}

#[tokio::test]
async fn a_request_that_took_long_to_read_may_run_as_long_where_it_was_read() {
    const SMALL: usize = 120;
    const LARGE: usize = 1 << 20;
    let micros = Duration::from_micros;
    let took = |longest_inline: Duration, bytes: usize, took: u64| {
        let bench = Bench::new(Config { longest_inline, ..Bench::config() });
        bench.scheduler.shared.quickness.learn(bytes, micros(took), true);
        let at_once: Vec<bool> = (0..100).map(|_| bench.scheduler.shared.runs_at_once(bytes)).collect();
        bench.join();
        at_once
    };
    let (always, never) = (vec![true; 100], vec![false; 100]);
    assert_eq!(took(micros(50), LARGE, 200), always, "too long to be collected with others");
    assert_eq!(took(micros(50), LARGE, 400), never);
    assert_eq!(took(micros(50), SMALL, 60), never);
    let others_are_looked_for = took(micros(50), SMALL, 10);
    assert!(others_are_looked_for[0] && !others_are_looked_for[99]);
    assert_eq!(took(Duration::ZERO, LARGE, 10), never, "switched off");
}

#[tokio::test]
async fn a_run_of_its_callers_overtakes_nobody_and_takes_no_promised_instance() {
    let bench = quick().await;
    let first = bench.occupy_a_worker();
    let second = bench.submit(&[5.0]);
    assert_eq!(bench.queued(), 1, "the only instance is in use");
    bench.script.release();
    assert_eq!((values(first).await, values(second).await), (vec![200.0], vec![10.0]));
    assert!(!bench.runs_of_this_thread());
    bench.join();
}

#[tokio::test]
async fn a_run_of_its_callers_fails_alone_and_a_panic_costs_the_instance() {
    let bench = quick().await;
    let invalid = done(bench.submit(&[INVALID])).await.unwrap_err();
    assert_eq!((invalid.kind(), bench.runs_of_this_thread()), (Kind::InvalidInput, true));
    assert_eq!(done(bench.submit(&[FAIL])).await.unwrap_err().kind(), Kind::BackendFailed);
    assert_eq!(done(bench.submit(&[PANIC])).await.unwrap_err().kind(), Kind::BackendFailed);
    assert_eq!(lock(&bench.scheduler.shared.state).slots[0].taken, 0);
    assert_eq!(values(bench.submit(&[3.0])).await, [6.0], "made again by a worker");
    assert_eq!(bench.script.made.load(Ordering::SeqCst), 2);
    bench.join();
}

#[test]
fn what_arrives_during_a_run_of_its_callers_is_served_when_the_instance_is_back() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let bench = runtime.block_on(quick());
    bench.script.hold();
    thread::scope(|scope| {
        let inline = scope.spawn(|| runtime.block_on(async { values(bench.submit(&[7.0])).await }));
        bench.script.wait_for_runs_inside(1);
        let queued = bench.submit(&[8.0]);
        assert_eq!(bench.queued(), 1);
        assert!(bench.scheduler.join(Instant::now()).is_err(), "a run is on");
        bench.script.release();
        assert_eq!(inline.join().unwrap(), [14.0]);
        assert_eq!(runtime.block_on(values(queued)), [16.0], "closed or not, what is queued is served");
    });
    bench.join();
}

fn cost(rows: usize, seconds: u64) -> Sample {
    Sample { rows, length: None, compute: Duration::from_secs(seconds) }
}

#[tokio::test]
async fn batches_are_filled_up_as_far_as_that_pays() {
    for (tuned, expected) in [(true, 2), (false, 4)] {
        let script = Arc::default();
        let costs = vec![cost(1, 100), cost(2, 110), cost(4, 400), cost(32, 4000)];
        let group = Group { costs, ..group(&script, 1, 1) };
        let bench = Bench::with(&script, vec![group], Config { tuned, ..Bench::config() });
        assert_eq!(bench.scheduler.batch_limit(), if tuned { 2 } else { DEFAULT_PREFERRED_ROWS });
        let first = bench.occupy();
        let waiting: Vec<_> = [1.0, 2.0, 3.0, 4.0].into_iter().map(|value| bench.submit(&[value])).collect();
        bench.script.release();
        for submitted in waiting.into_iter().chain([first]) {
            done(submitted).await.unwrap();
        }
        let rows = bench.script.runs().iter().map(Vec::len).max();
        assert_eq!(rows, Some(expected), "tuned: {tuned}");
    }
}

#[tokio::test]
async fn a_worker_waits_a_moment_for_those_that_were_here_together() {
    let script = Arc::default();
    let group = Group { costs: vec![cost(1, 1000), cost(4, 1600)], ..group(&script, 1, 1) };
    let bench = Bench::with(&script, vec![group], Bench::config());
    let together = |bench: &Bench| lock(&bench.scheduler.shared.state).company.share(1);
    let send = |value: f32| bench.submit(&[value]);
    let first = bench.occupy();
    let others = [1.0, 2.0, 3.0].map(send);
    bench.script.release();
    done(first).await.unwrap();
    bench.wait_until(|slots| slots.filling, 1);
    let back = send(4.0);
    for submitted in others.into_iter().chain([back]) {
        done(submitted).await.unwrap();
    }
    assert_eq!(bench.script.runs(), [vec![100.0], vec![1.0, 2.0, 3.0, 4.0]]);
    assert_eq!(together(&bench), 4);
    let last = send(5.0);
    bench.wait_until(|slots| slots.filling, 1);
    bench.scheduler.close();
    assert_eq!(values(last).await, [10.0], "what is closed waits for nobody");
    assert_eq!(together(&bench), 1, "the others stayed away");
    bench.join();
}

#[tokio::test]
async fn company_is_shared_by_all_groups_and_a_goal_leaves_no_time_for_it() {
    let goal = LatencyGoal { of_10_000: 9900, within: AGES };
    for (groups, goal, waits) in [(1, None, true), (4, None, false), (1, Some(goal), false)] {
        let script: Arc<Script> = Arc::default();
        let one = || Group { costs: vec![cost(1, 1000), cost(4, 1600)], ..group(&script, 1, 1) };
        let groups = std::iter::repeat_with(one).take(groups).collect();
        let bench = Bench::with(&script, groups, Config { latency_goal: goal, ..Bench::config() });
        let mut state = lock(&bench.scheduler.shared.state);
        state.company.seen(4);
        let now = Instant::now();
        let (reply, _) = oneshot::channel();
        let permit = bench.budget.admit(8, now).unwrap();
        let Prepared { inputs, outputs, rows, key, length, deadline, priority } = Bench::prepared(&[1.0]);
        let job =
            Job { inputs, outputs, rows, length, extent: None, deadline, submitted: now, place: None, permit, reply };
        state.batcher.push(Entry { key, priority, rows, full: 4, bytes: 8, arrived: now, item: job });
        assert_eq!(state.missing(0).is_some(), waits, "{goal:?}");
        drop(state.batcher.drain());
    }
}

#[tokio::test]
async fn what_runs_cost_is_learned_and_can_be_handed_on() {
    let bench = Bench::new(Bench::config());
    for value in 0..20u8 {
        done(bench.submit(&[f32::from(value)])).await.unwrap();
    }
    let [costs] = &bench.scheduler.costs()[..] else { panic!("one group") };
    let [one] = costs[..] else { panic!("{costs:?}") };
    assert_eq!((one.rows, one.length), (1, None));
    assert!(bench.monitor.render().contains("tidegate_batch_limit_rows{model=\"m\",version=\"1\"} 2"), "unknown: next");
}

/// So many instances whose runs of a row take 100 s, it is said, and one on all four cores whose runs take `on_all` seconds.
fn with_wide(instances: usize, on_all: u64) -> (Arc<Script>, Arc<Script>, Bench) {
    let (narrow, wide): (Arc<Script>, Arc<Script>) = (Arc::default(), Arc::default());
    let another = Wide { instance: group(&wide, 1, 4).instance, cores: 4, costs: vec![cost(1, on_all)] };
    let group = Group { costs: vec![cost(1, 100)], wide: Some(another), ..group(&narrow, instances, 1) };
    let bench = Bench::with(&narrow, vec![group], Bench::config());
    (narrow, wide, bench)
}

#[tokio::test]
async fn a_request_that_is_alone_runs_on_all_cores_and_none_that_has_company() {
    let (narrow, wide, bench) = with_wide(2, 40);
    done(bench.submit(&[1.0])).await.unwrap();
    wide.hold();
    let alone = bench.submit(&[2.0]);
    wide.wait_for_runs_inside(1);
    assert_eq!(bench.scheduler.shared.gate.room().free, 0, "it has all cores");
    let second = bench.submit(&[3.0]);
    wide.release();
    done(alone).await.unwrap();
    done(second).await.unwrap();
    done(bench.submit(&[4.0])).await.unwrap();
    assert_eq!(wide.runs(), [[1.0], [2.0]]);
    assert_eq!(narrow.runs(), [[3.0], [4.0]], "there was company a moment ago");
}

#[tokio::test]
async fn what_seems_slower_is_tried_again_by_lone_requests() {
    for (expected_wide, usual) in [(40, true), (400, false)] {
        let (narrow, wide, bench) = with_wide(1, expected_wide);
        // The first run of a thread does not count.
        for _ in 0..=layout::FIRST_TRIAL {
            done(bench.submit(&[1.0])).await.unwrap();
        }
        let (on_all, on_one) = (wide.runs().len(), narrow.runs().len());
        assert_eq!((on_all > 0, on_one > 0), (usual, !usual));
        done(bench.submit(&[2.0])).await.unwrap();
        let tried = if usual { narrow.runs() } else { wide.runs() };
        assert_eq!(tried, [[2.0]]);
    }
}

#[tokio::test]
async fn a_wide_instance_that_fails_is_not_tried_for_long() {
    let (narrow, wide, bench) = with_wide(1, 40);
    for _ in 0..layout::FIRST_TRIAL {
        assert_eq!(kind(bench.submit(&[FAIL])).await, Kind::BackendFailed);
    }
    assert_eq!((wide.runs().len(), narrow.runs().len()), (layout::FIRST_TRIAL as usize, 0));
    // A trial of the other layout, and what follows until the next one.
    for _ in 0..12 {
        done(bench.submit(&[2.0])).await.unwrap();
    }
    assert_eq!((wide.runs().len(), narrow.runs().len()), (layout::FIRST_TRIAL as usize, 12));
}

#[tokio::test]
async fn a_wide_instance_that_panics_is_not_missed() {
    let (narrow, wide, bench) = with_wide(1, 40);
    assert_eq!(kind(bench.submit(&[PANIC])).await, Kind::BackendFailed);
    done(bench.submit(&[2.0])).await.unwrap();
    assert_eq!((wide.runs().len(), narrow.runs()), (1, vec![vec![2.0]]));
    // All cores are free again.
    drop(bench.scheduler.shared.gate.acquire(usize::MAX));
}

impl Bench {
    /// As after many that came fast.
    fn collects(&self) {
        self.scheduler.shared.pace.collected(usize::MAX);
    }
}

#[tokio::test]
async fn what_comes_fast_is_collected_and_nobody_waits_for_a_caller() {
    let bench = quick().await;
    bench.collects();
    // Polled once, and never again: its client reads nothing.
    let forgotten = bench.submit(&[1.0]);
    let others = [2.0, 3.0].map(|value| bench.submit(&[value]));
    assert_eq!(bench.queued(), 3);
    for (other, expected) in others.into_iter().zip([4.0, 6.0]) {
        assert_eq!(values(other).await, [expected]);
    }
    assert_eq!(bench.script.runs().last().unwrap(), &[1.0, 2.0, 3.0]);
    assert!(bench.runs_of_this_thread());
    drop(forgotten);
    bench.join();
}

#[tokio::test]
async fn a_collector_leaves_what_may_be_slow_and_what_fails_together_to_a_worker() {
    let bench = quick().await;
    bench.collects();
    let first = bench.submit(&[1.0]);
    let unknown = Prepared { priority: Priority::from_wire(1), ..Bench::prepared(&[2.0, 3.0]) };
    let unknown = bench.send(unknown);
    assert_eq!((values(unknown).await, values(first).await), (vec![4.0, 6.0], vec![2.0]));
    assert!(!bench.runs_of_this_thread(), "how long two rows take was not known");
    bench.wait_until(|slots| slots.resting, 1);
    bench.collects();
    let (poison, fine) = (bench.submit(&[FAIL]), bench.submit(&[5.0]));
    assert_eq!((kind(poison).await, values(fine).await), (Kind::BackendFailed, vec![10.0]));
    let runs = bench.script.runs();
    assert_eq!(runs.iter().filter(|run| run.len() == 2 && run[0] == FAIL).count(), 2, "here, and once by the worker");
    bench.join();
}
