//! An engine that computes a closure, for tests of what lies above the backends and for benchmarks of its cost.
//!
//! Compiled always, so that integration tests, benchmarks and the server's own tests share one. Does on purpose what a
//! real engine does by accident: blocks until a test lets it go on, fails or panics on chosen values, answers with the
//! wrong number of rows, burns time. Keeps a log of its runs.
//!
//! Threads: a [`Fake`] is a handle; clones and the instances made from them share one log and one [`Gate`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Artifact, Backend, Batch, Device, Instance, LoadError, LoadOptions, Model, RunError};
use crate::tensor::{DataType, Dim, OutputKind, Shape, Signature, Tensor, TensorSpec};

/// Runs that are logged; later ones are counted only.
const LOG_LIMIT: usize = 1 << 20;

/// How long a waiting test believes that what it waits for still comes.
const PATIENCE: Duration = Duration::from_secs(60);

type Compute = dyn Fn(&[Tensor]) -> Result<Vec<Tensor>, RunError> + Send + Sync;

/// What one call of [`Instance::run`] was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunRecord {
    /// The leading dimension of the first input; 1 where it has none.
    pub rows: usize,
    /// Counts the instances from 0 in the order in which they were made.
    pub instance: usize,
    /// What the model was loaded for.
    pub device: Device,
}

/// What happens to a run that holds a poisonous value.
#[derive(Clone, Debug, PartialEq)]
pub enum Poison {
    Error(RunError),
    Panic,
}

/// A model, and a backend that gives every file this behaviour. Configure first, then clone and share.
#[derive(Clone)]
pub struct Fake {
    signature: Arc<Signature>,
    kinds: Arc<[OutputKind]>,
    compute: Option<Arc<Compute>>,
    gate: Option<Arc<Gate>>,
    poison: Vec<(f32, Poison)>,
    rows: fn(usize) -> usize,
    gpus: u32,
    device: Device,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    log: Mutex<Vec<RunRecord>>,
    started: AtomicUsize,
    running: AtomicUsize,
    peak: AtomicUsize,
    instances: AtomicUsize,
}

impl Fake {
    /// Answers each output with the input of its position and datatype, else with zeros.
    pub fn new(signature: Signature) -> Fake {
        Fake {
            kinds: vec![OutputKind::Values; signature.outputs.len()].into(),
            signature: Arc::new(signature),
            compute: None,
            gate: None,
            poison: Vec::new(),
            rows: |rows| rows,
            gpus: 0,
            device: Device::Cpu,
            state: Arc::default(),
        }
    }

    /// `x` FP32 [batch, width] → `y` FP32 [batch, width], equal to `x`.
    pub fn echo(width: usize) -> Fake {
        let spec = |name: &str| TensorSpec {
            name: name.into(),
            dtype: DataType::Fp32,
            dims: Some(vec![Dim::Free(Some("batch".into())), Dim::Fixed(width)]),
        };
        Fake::new(Signature { inputs: vec![spec("x")], outputs: vec![spec("y")] })
    }

    /// Loads for that many GPUs, too. None otherwise.
    pub fn with_gpus(mut self, gpus: u32) -> Fake {
        self.gpus = gpus;
        self
    }

    /// Computes the outputs from the joined inputs.
    pub fn computing(
        mut self,
        compute: impl Fn(&[Tensor]) -> Result<Vec<Tensor>, RunError> + Send + Sync + 'static,
    ) -> Fake {
        self.compute = Some(Arc::new(compute));
        self
    }

    /// One kind per output; `Values` for all otherwise.
    pub fn meaning(mut self, kinds: impl Into<Arc<[OutputKind]>>) -> Fake {
        self.kinds = kinds.into();
        self
    }

    /// Every run passes the gate first, or waits at it.
    pub fn gated(mut self, gate: &Arc<Gate>) -> Fake {
        self.gate = Some(gate.clone());
        self
    }

    /// A run fails so when an element of an FP32 input equals `value`.
    pub fn poisoned_by(mut self, value: f32, poison: Poison) -> Fake {
        self.poison.push((value, poison));
        self
    }

    /// A run of as many rows as `rows` says, given those it got: what a model that is wrongly thought batchable does.
    pub fn answering_rows(mut self, rows: fn(usize) -> usize) -> Fake {
        self.rows = rows;
        self
    }

    /// The finished and unfinished runs, in the order in which they passed the gate.
    pub fn log(&self) -> Vec<RunRecord> {
        lock(&self.state.log).clone()
    }

    /// Runs that were begun, those waiting at the gate included.
    pub fn started(&self) -> usize {
        self.state.started.load(Ordering::SeqCst)
    }

    /// The most runs that were between gate and answer at one time.
    pub fn peak_concurrency(&self) -> usize {
        self.state.peak.load(Ordering::SeqCst)
    }

    /// Instances made so far.
    pub fn instances(&self) -> usize {
        self.state.instances.load(Ordering::SeqCst)
    }

    fn answer(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>, RunError> {
        self.poison_in(inputs)?;
        let outputs = match &self.compute {
            Some(compute) => compute(inputs)?,
            None => self.signature.outputs.iter().enumerate().map(|(i, spec)| echoed(inputs, i, spec)).collect(),
        };
        Ok(outputs.into_iter().map(|output| with_rows(output, self.rows)).collect())
    }

    fn poison_in(&self, inputs: &[Tensor]) -> Result<(), RunError> {
        for (value, poison) in &self.poison {
            if inputs.iter().filter_map(Tensor::to_vec::<f32>).any(|elements| elements.contains(value)) {
                match poison {
                    Poison::Error(error) => return Err(error.clone()),
                    Poison::Panic => panic!("the fake engine was asked to panic on {value}"),
                }
            }
        }
        Ok(())
    }
}

impl Backend for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").into()
    }

    /// Gives the file's own signature this fake's behaviour, log and gate.
    fn load(&self, artifact: &Artifact, options: &LoadOptions) -> Result<Arc<dyn Model>, LoadError> {
        let (mut fake, device) = (self.clone(), options.device);
        if matches!(device, Device::Cuda(id) if id >= self.gpus) {
            let message = format!("device `{device}` cannot be used: the fake engine has {} GPUs", self.gpus);
            return Err(LoadError::Unavailable(message));
        }
        fake.device = device;
        fake.signature = Arc::new(artifact.description.signature().clone());
        fake.kinds = artifact.description.output_kinds().into();
        Ok(Arc::new(fake))
    }

    fn instances_share_weights(&self, _: &Artifact, _: &LoadOptions) -> bool {
        true
    }

    fn spreads_runs(&self) -> bool {
        true
    }
}

impl Model for Fake {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn output_kinds(&self) -> &[OutputKind] {
        &self.kinds
    }

    fn instance(&self) -> Result<Box<dyn Instance>, LoadError> {
        let number = self.state.instances.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FakeInstance { fake: self.clone(), number }))
    }

    fn warnings(&self) -> &[String] {
        &[]
    }
}

struct FakeInstance {
    fake: Fake,
    number: usize,
}

impl Instance for FakeInstance {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Tensor>, RunError> {
        let state = &self.fake.state;
        state.started.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &self.fake.gate {
            gate.pass();
        }
        let inputs = joined(batch)?;
        let rows = inputs.first().and_then(Tensor::rows).unwrap_or(1);
        {
            let mut log = lock(&state.log);
            if log.len() < LOG_LIMIT {
                log.push(RunRecord { rows, instance: self.number, device: self.fake.device });
            }
        }
        let _running = Running::begin(state);
        self.fake.answer(&inputs)
    }
}

/// Counts a run while it lives, a panicking one too.
struct Running<'a>(&'a State);

impl<'a> Running<'a> {
    fn begin(state: &'a State) -> Running<'a> {
        let now = state.running.fetch_add(1, Ordering::SeqCst) + 1;
        state.peak.fetch_max(now, Ordering::SeqCst);
        Running(state)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Lent as they are for one job, gathered for several, as a real engine does it.
fn joined(batch: &Batch) -> Result<Vec<Tensor>, RunError> {
    batch
        .inputs()
        .map(|input| {
            let data = match input.contiguous(1) {
                Some(bytes) => bytes.clone(),
                None => {
                    let mut bytes = vec![0; input.byte_length()];
                    input.gather_into(&mut bytes);
                    bytes.into()
                }
            };
            Tensor::new(input.dtype(), input.shape(), data).map_err(|error| RunError::Failed(error.to_string()))
        })
        .collect()
}

fn echoed(inputs: &[Tensor], position: usize, spec: &TensorSpec) -> Tensor {
    let same = |tensor: &&Tensor| tensor.dtype() == spec.dtype;
    let rows = inputs.first().and_then(Tensor::rows).unwrap_or(1);
    match inputs.get(position).filter(same).or_else(|| inputs.iter().find(same)) {
        Some(tensor) => tensor.clone(),
        None => zeros(spec, rows),
    }
}

/// Free dimensions are 1, but for a leading one.
fn zeros(spec: &TensorSpec, rows: usize) -> Tensor {
    let extent = |(axis, dim): (usize, &Dim)| match dim {
        Dim::Fixed(extent) => *extent,
        Dim::Free(_) if axis == 0 => rows,
        Dim::Free(_) => 1,
    };
    let dims: Vec<usize> = spec.dims.iter().flatten().enumerate().map(extent).collect();
    let shape = Shape::new(dims).unwrap_or_else(|_| Shape::scalar());
    // An empty BYTES element is its length alone, 0.
    let size = spec.dtype.size().unwrap_or(crate::tensor::strings::PREFIX);
    let data = vec![0; shape.elements() * size];
    #[expect(clippy::expect_used, reason = "the buffer is made to the shape's measure, and zeros are legal everywhere")]
    Tensor::new(spec.dtype, shape, data.into()).expect("zeros fit their shape")
}

/// The first rows of a tensor, repeated where `rows` asks for more than there are.
fn with_rows(tensor: Tensor, rows: fn(usize) -> usize) -> Tensor {
    let Some(found) = tensor.rows().filter(|found| rows(*found) != *found) else { return tensor };
    let wanted = rows(found);
    let row = |i: usize| tensor.slice_rows(i % found.max(1), 1).map(|row| row.data().to_vec()).unwrap_or_default();
    let data: Vec<u8> = (0..wanted).flat_map(row).collect();
    let resized =
        tensor.shape().with_rows(wanted).ok().and_then(|shape| Tensor::new(tensor.dtype(), shape, data.into()).ok());
    resized.unwrap_or(tensor)
}

/// Holds runs until a test lets them through.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    open: bool,
    /// Runs that may pass a closed gate.
    tickets: usize,
    waiting: usize,
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Arc<Gate> {
        Arc::default()
    }

    /// From now on every run waits.
    pub fn hold(&self) {
        lock(&self.state).open = false;
    }

    /// Those that wait go on, and later ones pass.
    pub fn open(&self) {
        lock(&self.state).open = true;
        self.changed.notify_all();
    }

    /// So many runs pass the closed gate, now or later.
    pub fn let_through(&self, runs: usize) {
        lock(&self.state).tickets += runs;
        self.changed.notify_all();
    }

    /// Blocks until at least so many runs wait at the gate; panics when they do not come.
    pub fn wait_for(&self, runs: usize) {
        let state = lock(&self.state);
        let (state, waited) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| state.waiting < runs)
            .unwrap_or_else(PoisonError::into_inner);
        let waiting = state.waiting;
        drop(state);
        assert!(!waited.timed_out(), "{waiting} runs wait at the gate, expected {runs}");
    }

    fn pass(&self) {
        let mut state = lock(&self.state);
        state.waiting += 1;
        self.changed.notify_all();
        while !state.open && state.tickets == 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        if !state.open {
            state.tickets -= 1;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[f32]) -> [Tensor; 1] {
        [Tensor::from_vec(Shape::new([values.len() / 2, 2]).unwrap(), values.to_vec()).unwrap()]
    }

    fn run(instance: &mut Box<dyn Instance>, jobs: &[&[Tensor]]) -> Result<Vec<Tensor>, RunError> {
        instance.run(&Batch::new(jobs))
    }

    #[test]
    fn echoes_joined_jobs_and_logs_them() {
        let fake = Fake::echo(2);
        let mut instance = fake.instance().unwrap();
        let (a, b) = (rows(&[1.0, 2.0]), rows(&[3.0, 4.0, 5.0, 6.0]));
        let outputs = run(&mut instance, &[&a, &b]).unwrap();
        assert_eq!(outputs[0].to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        run(&mut fake.instance().unwrap(), &[&a]).unwrap();
        let run = |rows, instance| RunRecord { rows, instance, device: Device::Cpu };
        assert_eq!(fake.log(), [run(3, 0), run(1, 1)]);
        assert_eq!((fake.started(), fake.instances(), fake.peak_concurrency()), (2, 2, 1));
    }

    #[test]
    fn computes_poisons_and_miscounts_as_told() {
        let failure = RunError::InvalidArgument("seven".into());
        let fake = Fake::echo(2)
            .computing(|inputs| {
                let doubled = inputs[0].to_vec::<f32>().unwrap().iter().map(|x| 2.0 * x).collect();
                Ok(vec![Tensor::from_vec(inputs[0].shape().clone(), doubled).unwrap()])
            })
            .poisoned_by(7.0, Poison::Error(failure.clone()))
            .poisoned_by(8.0, Poison::Panic)
            .answering_rows(|rows| if rows > 1 { rows - 1 } else { rows });
        let mut instance = fake.instance().unwrap();
        assert_eq!(run(&mut instance, &[&rows(&[1.0, 2.0])]).unwrap()[0].to_vec::<f32>().unwrap(), [2.0, 4.0]);
        assert_eq!(run(&mut instance, &[&rows(&[0.0; 6])]).unwrap()[0].rows(), Some(2));
        assert_eq!(run(&mut instance, &[&rows(&[1.0, 7.0])]), Err(failure));
        let eight = rows(&[8.0, 8.0]);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&mut instance, &[&eight])));
        assert!(panicked.is_err());
        assert_eq!(fake.state.running.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_gate_holds_runs_and_counts_them() {
        let gate = Gate::new();
        let fake = Fake::echo(2).gated(&gate);
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let mut instance = fake.instance().unwrap();
                std::thread::spawn(move || run(&mut instance, &[&rows(&[1.0, 2.0])]).unwrap())
            })
            .collect();
        gate.wait_for(3);
        assert_eq!((fake.started(), fake.log().len()), (3, 0));
        gate.let_through(1);
        gate.open();
        threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap().len(), 1));
        assert_eq!(fake.log().len(), 3);
    }

    #[test]
    fn any_signature_gets_an_answer() {
        let spec = |name: &str, dtype, dims: &[Dim]| TensorSpec { name: name.into(), dtype, dims: Some(dims.to_vec()) };
        let free = Dim::Free(None);
        let fake = Fake::new(Signature {
            inputs: vec![spec("x", DataType::Fp32, &[free.clone(), Dim::Fixed(2)])],
            outputs: vec![
                spec("label", DataType::Bytes, std::slice::from_ref(&free)),
                spec("y", DataType::Fp32, &[free.clone(), Dim::Fixed(2)]),
                spec("n", DataType::Int64, &[]),
            ],
        });
        let outputs = run(&mut fake.instance().unwrap(), &[&rows(&[1.0, 2.0, 3.0, 4.0])]).unwrap();
        assert_eq!(outputs[0].strings().count(), 2);
        assert_eq!(outputs[1].to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(outputs[2].to_vec::<i64>().unwrap(), [0]);
    }
}
