//! The embedded engine: tract, pure Rust, on the CPU.
//!
//! Knows tract's API; nothing else in the crate does. Not a drop-in for ONNX Runtime: it lacks operators (those fail at
//! load) and computes some wrongly without an error; [`Description::tract_computes_wrongly`] names these and they are
//! refused.
//!
//! Plans: one plan with symbolic dimensions serves every shape, where tract can make it. Otherwise plans are made for
//! concrete shapes as requests bring them, and the last few are kept.
//!
//! Threads: a plan is immutable and shared by all instances of a version. A run is single-threaded, on the caller's
//! thread. Every run starts from fresh state: tract's recurrent operators carry theirs from one run to the next.
//! Panics while loading or planning become errors, and so do those in a run that an index out of range caused; any other
//! panic in a run is the caller's to catch, and leaves the shared plans whole.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tract_onnx::prelude::{
    DatumType, Framework, InferenceFact, InferenceModel, InferenceModelExt, IntoRunnable, SpecialOps, TDim, TValue,
    TVec, TractError, TractResult, TypedRunnableModel,
};
use tract_onnx::tract_core::ops::cast::cast;
use tract_onnx::tract_hir::infer::Factoid;

use super::onnx::Description;
use super::{Artifact, Backend, Batch, BatchInput, Device, Instance, LoadError, LoadOptions, Model, RunError};
use crate::tensor::{DataType, Dim, OutputKind, Shape, Signature, Tensor, TensorSpec};

const NAME: &str = "tract";

/// As pinned in `Cargo.toml`; tract does not tell its own version.
const VERSION: &str = "0.23.9";

/// Plans for concrete shapes that are kept per version.
const KEPT_PLANS: usize = 8;

/// Sizes tried for the free axes behind the first when a model loads without a symbolic plan, before those that the
/// file mentions: some size must work.
const PROBED_SIZES: [usize; 5] = [1, 8, 32, 224, 512];

/// Longest text of tract's that is repeated, in characters: it may hold whole tensors.
const TEXT_LIMIT: usize = 300;

/// The engine itself: stateless.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tract;

impl Backend for Tract {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn load(&self, artifact: &Artifact, options: &LoadOptions) -> Result<Arc<dyn Model>, LoadError> {
        if options.device != Device::Cpu {
            let device = options.device;
            return Err(LoadError::Unavailable(format!(
                "tract runs on the CPU only, found device {device}: use the backend onnxruntime"
            )));
        }
        let description = &artifact.description;
        refuse_unsuitable(description).map_err(|why| refusal(format!("{why}: use the backend onnxruntime")))?;
        let loaded = load(&artifact.path, description).map_err(|text| refusal(without_folder(text, &artifact.path)))?;
        let mut warnings = loaded.warnings;
        if options.threads > 1 {
            warnings.push(format!("tract runs on one thread: threads = {} has no effect", options.threads));
        }
        Ok(Arc::new(TractModel {
            shared: Arc::new(Shared { inputs: loaded.signature.inputs.clone(), plans: loaded.plans }),
            signature: loaded.signature,
            output_kinds: description.output_kinds.clone(),
            warnings,
        }))
    }
}

fn refusal(message: String) -> LoadError {
    LoadError::Engine { engine: NAME, message }
}

fn refuse_unsuitable(description: &Description) -> Result<(), String> {
    if let Some(why) = &description.tract_computes_wrongly {
        return Err(why.clone());
    }
    let signature = &description.signature;
    match signature.inputs.iter().chain(&signature.outputs).find(|spec| to_tract(spec.dtype).is_none()) {
        Some(spec) => Err(format!("{:?} is {}, which tract does not have", spec.name, spec.dtype)),
        None => Ok(()),
    }
}

struct TractModel {
    signature: Signature,
    output_kinds: Vec<OutputKind>,
    warnings: Vec<String>,
    shared: Arc<Shared>,
}

impl Model for TractModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn output_kinds(&self) -> &[OutputKind] {
        &self.output_kinds
    }

    fn instance(&self) -> Result<Box<dyn Instance>, LoadError> {
        Ok(Box::new(TractInstance { outputs: self.signature.outputs.clone(), shared: self.shared.clone() }))
    }

    fn instances_share_weights(&self) -> bool {
        true
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// What all instances of a version run.
struct Shared {
    inputs: Vec<TensorSpec>,
    plans: Plans,
}

enum Plans {
    /// One plan for every shape.
    Symbolic(Arc<TypedRunnableModel>),
    Concrete(Box<ConcretePlans>),
}

/// Plans made for the shapes that were met last.
struct ConcretePlans {
    template: InferenceModel,
    dtypes: Vec<DatumType>,
    /// Most recently used last. Held while a plan is made, so that two workers do not make the same one.
    recent: Mutex<VecDeque<(Vec<Shape>, Arc<TypedRunnableModel>)>>,
}

impl ConcretePlans {
    fn plan(&self, shapes: Vec<Shape>) -> Result<Arc<TypedRunnableModel>, String> {
        // A poisoned lock guards a list that is whole between any two statements here.
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match recent.iter().position(|(met, _)| *met == shapes).and_then(|place| recent.remove(place)) {
            Some(entry) => entry,
            None => {
                let plan = attempt(|| self.make(&shapes))?;
                (shapes, plan)
            }
        };
        let plan = entry.1.clone();
        if recent.len() == KEPT_PLANS {
            recent.pop_front();
        }
        recent.push_back(entry);
        Ok(plan)
    }

    fn make(&self, shapes: &[Shape]) -> TractResult<Arc<TypedRunnableModel>> {
        let mut model = self.template.clone();
        for (position, (shape, dtype)) in shapes.iter().zip(&self.dtypes).enumerate() {
            model.set_input_fact(position, InferenceFact::dt_shape(*dtype, shape.dims()))?;
        }
        runnable(model)
    }
}

struct Loaded {
    plans: Plans,
    signature: Signature,
    warnings: Vec<String>,
}

fn load(path: &Path, description: &Description) -> Result<Loaded, String> {
    let mut signature = description.signature.clone();
    // Intermediate shapes that exporters note down help tract's inference, and mislead it where they are wrong.
    let symbolic = attempt(|| symbolic_plan(parse(path, &signature, false)?, &signature))
        .or_else(|first| attempt(|| symbolic_plan(parse(path, &signature, true)?, &signature)).map_err(|_| first));
    let omitted = description.omitted_outputs.iter().map(|name| format!("output {name:?} is no tensor: left out"));
    let mut warnings: Vec<String> = omitted.collect();
    let error = match symbolic {
        Ok(plan) => {
            attempt(|| complete(&mut signature, &plan))?;
            return Ok(Loaded { plans: Plans::Symbolic(plan), signature, warnings });
        }
        Err(error) => error,
    };
    let is_fixed = |spec: &TensorSpec| spec.dims.as_ref().is_some_and(|dims| !dims.iter().any(Dim::is_free));
    if signature.inputs.iter().all(is_fixed) {
        return Err(error);
    }
    let plans = ConcretePlans {
        template: attempt(|| parse(path, &signature, true))?,
        dtypes: signature.inputs.iter().filter_map(|spec| to_tract(spec.dtype)).collect(),
        recent: Mutex::default(),
    };
    probe(&plans, description)?;
    warnings.push(format!("tract makes a plan for each new input shape, slowly, and keeps {KEPT_PLANS}: {error}"));
    Ok(Loaded { plans: Plans::Concrete(Box::new(plans)), signature, warnings })
}

/// Shows that the model can be planned at all: an operator that tract lacks fails here and not with every request.
fn probe(plans: &ConcretePlans, description: &Description) -> Result<(), String> {
    let mut last = String::new();
    for size in PROBED_SIZES.iter().chain(&description.mentioned_sizes).copied() {
        let dim = |(position, dim): (usize, &Dim)| match dim {
            Dim::Fixed(n) => *n,
            Dim::Free(_) if position == 0 => 1,
            Dim::Free(_) => size,
        };
        let dims = |spec: &TensorSpec| -> Vec<usize> { spec.dims.iter().flatten().enumerate().map(dim).collect() };
        let shapes =
            description.signature.inputs.iter().map(|spec| Shape::new(dims(spec)).map_err(|error| error.to_string()));
        match plans.plan(shapes.collect::<Result<_, _>>()?) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The model with its tensor outputs only, in the signature's order.
fn parse(path: &Path, signature: &Signature, ignore_value_info: bool) -> TractResult<InferenceModel> {
    let mut model = tract_onnx::onnx().with_ignore_value_info(ignore_value_info).model_for_path(path)?;
    let names: Vec<&str> = model.inputs.iter().map(|outlet| model.node(outlet.node).name.as_str()).collect();
    if !names.iter().copied().eq(signature.inputs.iter().map(|spec| &*spec.name)) {
        return Err(TractError::msg(format!("takes the inputs {names:?}, which the file does not declare")));
    }
    let outlets = signature
        .outputs
        .iter()
        .map(|spec| {
            let outlet = model.outputs.iter().copied().find(|o| model.outlet_label(*o) == Some(&*spec.name));
            outlet.ok_or_else(|| TractError::msg(format!("has no output {:?}", spec.name)))
        })
        .collect::<TractResult<Vec<_>>>()?;
    model.select_output_outlets(&outlets)?;
    Ok(model)
}

/// A plan whose free input dimensions stay symbols; those without a name get one.
fn symbolic_plan(mut model: InferenceModel, signature: &Signature) -> TractResult<Arc<TypedRunnableModel>> {
    for (position, spec) in signature.inputs.iter().enumerate() {
        let mut fact = model.input_fact(position)?.clone();
        for axis in 0..spec.dims.as_ref().map_or(0, Vec::len) {
            if fact.shape.dim(axis).is_some_and(|dim| dim.concretize().is_none()) {
                fact.shape.set_dim(axis, model.symbols.new_with_prefix("free").into());
            }
        }
        model.set_input_fact(position, fact)?;
    }
    runnable(model)
}

fn runnable(model: InferenceModel) -> TractResult<Arc<TypedRunnableModel>> {
    let mut model = model.into_typed()?;
    // Shapes are computed with integers of tract's own kind, which may hold symbols: they are resolved in the run.
    for (position, outlet) in model.outputs.clone().into_iter().enumerate() {
        if model.outlet_fact(outlet)?.datum_type == DatumType::TDim {
            let resolved = model.wire_node(format!("tidegate.output.{position}"), cast(DatumType::I64), &[outlet])?;
            model.outputs[position] = resolved[0];
        }
    }
    model.into_optimized()?.into_runnable()
}

/// Gives outputs without a declared shape the one that tract inferred.
fn complete(signature: &mut Signature, plan: &TypedRunnableModel) -> TractResult<()> {
    for (position, spec) in signature.outputs.iter_mut().enumerate().filter(|(_, spec)| spec.dims.is_none()) {
        spec.dims = Some(plan.model().output_fact(position)?.shape.iter().map(dim).collect());
    }
    Ok(())
}

fn dim(dim: &TDim) -> Dim {
    match (dim.as_i64().map(usize::try_from), dim) {
        (Some(Ok(n)), _) => Dim::Fixed(n),
        (_, TDim::Sym(symbol)) => Dim::Free(Some(symbol.to_string().into())),
        _ => Dim::Free(None),
    }
}

struct TractInstance {
    outputs: Vec<TensorSpec>,
    shared: Arc<Shared>,
}

impl Instance for TractInstance {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Tensor>, RunError> {
        match &self.shared.plans {
            Plans::Symbolic(plan) => self.execute(plan, batch, None),
            Plans::Concrete(plans) => {
                // Rounded up, so that batches of all sizes share a few plans. Rows may be added only where they are
                // known to be independent, as they are in a batch of several jobs.
                let rows = (batch.jobs() > 1).then(|| batch.input(0).shape().rows()).flatten();
                let padded = rows.and_then(usize::checked_next_power_of_two).filter(|padded| rows != Some(*padded));
                let shapes = batch.inputs().map(|input| padded_shape(&input, padded)).collect::<Result<_, _>>()?;
                let plan = plans.plan(shapes).map_err(RunError::InvalidArgument)?;
                let outputs = self.execute(&plan, batch, padded)?;
                Ok(match (rows, padded) {
                    (Some(rows), Some(padded)) => outputs.into_iter().map(|o| cut(o, padded, rows)).collect(),
                    _ => outputs,
                })
            }
        }
    }
}

impl TractInstance {
    fn execute(
        &self,
        plan: &Arc<TypedRunnableModel>,
        batch: &Batch,
        padded: Option<usize>,
    ) -> Result<Vec<Tensor>, RunError> {
        let inputs = batch.inputs().zip(&self.shared.inputs);
        let inputs = inputs.map(|(input, spec)| import(&input, spec, padded)).collect::<Result<TVec<_>, _>>()?;
        let outputs = run(plan, inputs)?;
        if outputs.len() != self.outputs.len() {
            let (found, expected) = (outputs.len(), self.outputs.len());
            return Err(RunError::Failed(format!("tract gave {found} outputs, expected {expected}")));
        }
        outputs.into_iter().zip(&self.outputs).map(|(value, spec)| export(value, spec)).collect()
    }
}

/// The shape of an input with its rows made up to `padded`.
fn padded_shape(input: &BatchInput, padded: Option<usize>) -> Result<Shape, RunError> {
    let shape = input.shape();
    match padded {
        Some(rows) => shape.with_rows(rows).map_err(|error| RunError::Failed(error.to_string())),
        None => Ok(shape),
    }
}

/// The first `rows` of an output that has `padded`; another output as it is, for the caller to judge.
fn cut(output: Tensor, padded: usize, rows: usize) -> Tensor {
    if output.rows() == Some(padded) { output.slice_rows(0, rows).unwrap_or(output) } else { output }
}

/// One copy into tract's own memory; padding repeats the last row, which the model is known to accept.
fn import(input: &BatchInput, spec: &TensorSpec, padded: Option<usize>) -> Result<TValue, RunError> {
    let dtype = to_tract(input.dtype()).ok_or_else(|| {
        RunError::Failed(format!("input {:?} is {}, which tract does not have", spec.name, input.dtype()))
    })?;
    let shape = padded_shape(input, padded)?;
    if dtype == DatumType::String {
        return import_strings(input, spec, shape);
    }
    let mut tensor = tract_onnx::prelude::Tensor::zero_dt(dtype, shape.dims()).map_err(run_error)?;
    let bytes = tensor.as_bytes_mut();
    let given = input.byte_length();
    input.gather_into(&mut bytes[..given]);
    let row = input.shape().rows().filter(|rows| *rows > 0).map_or(0, |rows| given / rows);
    let mut filled = given;
    while row > 0 && filled < bytes.len() {
        bytes.copy_within(given - row..given, filled);
        filled += row;
    }
    Ok(tensor.into())
}

fn import_strings(input: &BatchInput, spec: &TensorSpec, shape: Shape) -> Result<TValue, RunError> {
    let utf8 = |element: &[u8]| match std::str::from_utf8(element) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(RunError::InvalidArgument(format!(
            "input {:?} holds bytes that are not UTF-8, which tract expects of a string",
            spec.name
        ))),
    };
    let mut strings = input.strings().map(utf8).collect::<Result<Vec<_>, _>>()?;
    let row = shape.row_elements();
    while row > 0 && strings.len() >= row && strings.len() < shape.elements() {
        strings.extend_from_within(strings.len() - row..);
    }
    let array = tract_onnx::prelude::tract_ndarray::ArrayD::from_shape_vec(shape.dims(), strings);
    let array = array.map_err(|error| RunError::Failed(error.to_string()))?;
    Ok(tract_onnx::prelude::Tensor::from(array).into())
}

/// Wraps tract's memory; strings are copied.
fn export(value: TValue, spec: &TensorSpec) -> Result<Tensor, RunError> {
    let failed = |text: String| RunError::Failed(format!("output {:?}: {text}", spec.name));
    let shape = Shape::new(value.shape()).map_err(|error| failed(error.to_string()))?;
    let dtype = from_tract(value.datum_type()).filter(|dtype| *dtype == spec.dtype);
    let Some(dtype) = dtype.filter(|_| value.is_plain_ram()) else {
        return Err(failed(format!("tract gave {:?}, expected {}", value.datum_type(), spec.dtype)));
    };
    let tensor = match dtype {
        DataType::Bytes => {
            let strings = value.to_plain_array_view::<String>().map_err(|error| failed(text_of(&error)))?;
            Tensor::from_strings(shape, strings.iter().map(String::as_bytes))
        }
        _ => Tensor::new(dtype, shape, Bytes::from_owner(Owned(value))),
    };
    tensor.map_err(|error| failed(error.to_string()))
}

/// Keeps tract's tensor alive as long as its bytes are read. Only ever made of a plain tensor of numbers.
struct Owned(TValue);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// tract's counterpart of a datatype; `None` for BF16.
fn to_tract(dtype: DataType) -> Option<DatumType> {
    PAIRS.into_iter().find(|(ours, _)| *ours == dtype).map(|(_, theirs)| theirs)
}

fn from_tract(dtype: DatumType) -> Option<DataType> {
    let plain = dtype.unquantized();
    PAIRS.into_iter().find(|(_, theirs)| *theirs == plain).map(|(ours, _)| ours)
}

const PAIRS: [(DataType, DatumType); 13] = [
    (DataType::Bool, DatumType::Bool),
    (DataType::Uint8, DatumType::U8),
    (DataType::Uint16, DatumType::U16),
    (DataType::Uint32, DatumType::U32),
    (DataType::Uint64, DatumType::U64),
    (DataType::Int8, DatumType::I8),
    (DataType::Int16, DatumType::I16),
    (DataType::Int32, DatumType::I32),
    (DataType::Int64, DatumType::I64),
    (DataType::Fp16, DatumType::F16),
    (DataType::Fp32, DatumType::F32),
    (DataType::Fp64, DatumType::F64),
    (DataType::Bytes, DatumType::String),
];

/// Runs one step of loading; an error or a panic becomes a text.
fn attempt<T>(step: impl FnOnce() -> TractResult<T>) -> Result<T, String> {
    // Whatever a panicking step was changing is dropped with it.
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(result) => result.map_err(|error| text_of(&error)),
        Err(panic) => Err(shortened(&format!("panicked: {}", panic_text(&*panic)))),
    }
}

/// The whole chain of causes in one line.
fn text_of(error: &TractError) -> String {
    shortened(&format!("{error:#}"))
}

fn shortened(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    match line.char_indices().nth(TEXT_LIMIT) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

fn without_folder(text: String, path: &Path) -> String {
    match path.parent() {
        Some(folder) if folder != Path::new("") => text.replace(&format!("{}/", folder.display()), ""),
        _ => text,
    }
}

/// What tract says when it meets an index or a size that does not fit, in an error or in a panic. Its errors have no
/// kinds; datatypes and declared shapes were checked before the run, so the rest of its errors are the model's.
const INPUT_FAULTS: [&str; 8] = [
    "Clashing resolution",
    "Input at index",
    "Invalid gather",
    "Reshap",
    "index < dim",
    "out of bounds",
    "out of range",
    // An index below the first: the position of its row is computed unsigned.
    "attempt to multiply with overflow",
];

fn blames_input(text: &str) -> bool {
    INPUT_FAULTS.iter().any(|fault| text.contains(fault))
}

fn run_error(error: TractError) -> RunError {
    let text = text_of(&error);
    if blames_input(&text) { RunError::InvalidArgument(text) } else { RunError::Failed(text) }
}

/// Runs a plan. tract panics on an index out of range: that is the client's fault and becomes an error. Any other panic
/// goes on to the caller.
fn run(plan: &Arc<TypedRunnableModel>, inputs: TVec<TValue>) -> Result<TVec<TValue>, RunError> {
    // The plan is immutable and the run's state its own, dropped with the panic.
    match catch_unwind(AssertUnwindSafe(|| plan.run(inputs))) {
        Ok(result) => result.map_err(run_error),
        Err(panic) => match panic_text(&*panic) {
            text if blames_input(text) => {
                Err(RunError::InvalidArgument(shortened(&format!("an index or a size is out of range: {text}"))))
            }
            _ => resume_unwind(panic),
        },
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::onnx::build::{self, FLOAT, INT64, STRING, integer};

    const CPU: LoadOptions = LoadOptions { device: Device::Cpu, threads: 1 };

    fn load_file(path: &Path) -> Result<Arc<dyn Model>, LoadError> {
        let description = Arc::new(Description::read(std::fs::read(path).unwrap().into())?);
        Tract.load(&Artifact { path: path.to_owned(), description }, &CPU)
    }

    fn in_repository(path: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
    }

    fn trap(name: &str) -> Result<Arc<dyn Model>, LoadError> {
        load_file(&in_repository(&format!("tests/traps/{name}/1/model.onnx")))
    }

    fn load_built(model: &build::Model) -> Result<Arc<dyn Model>, LoadError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        std::fs::write(&path, model.bytes()).unwrap();
        load_file(&path)
    }

    fn error(result: Result<Arc<dyn Model>, LoadError>) -> String {
        result.err().unwrap().to_string()
    }

    fn floats(dims: &[usize], values: &[f32]) -> Tensor {
        Tensor::from_vec(Shape::new(dims).unwrap(), values.to_vec()).unwrap()
    }

    fn run_jobs(model: &Arc<dyn Model>, jobs: &[&[Tensor]]) -> Result<Vec<Tensor>, RunError> {
        model.instance().unwrap().run(&Batch::new(jobs))
    }

    fn run_one(model: &Arc<dyn Model>, inputs: &[Tensor]) -> Vec<Tensor> {
        run_jobs(model, &[inputs]).unwrap()
    }

    #[test]
    fn matmul_and_softmax_by_hand_at_every_batch_size() {
        let model = build::Model::new()
            .input("x", FLOAT, &["batch", "2"])
            .weights("w", &[2, 2], &[1.0, 0.0, 0.0, 2.0])
            .node("MatMul", &["x", "w"], &["h"])
            .node("Softmax", &["h"], &["y"])
            .untyped_shape_output("y", FLOAT);
        let model = load_built(&model).unwrap();
        assert_eq!(model.output_kinds(), [OutputKind::Probabilities]);
        let inferred = model.signature().outputs[0].dims.clone();
        assert_eq!(inferred, Some(vec![Dim::Free(Some("batch".into())), Dim::Fixed(2)]));
        for rows in [1, 3, 0] {
            let values: Vec<f32> = (0..2 * rows).map(|i| i as f32 / 4.0).collect();
            let outputs = run_one(&model, &[floats(&[rows, 2], &values)]);
            assert_eq!(outputs[0].shape().dims(), [rows, 2]);
            for (given, found) in values.chunks(2).zip(outputs[0].to_vec::<f32>().unwrap().chunks(2)) {
                let (a, b) = (given[0].exp(), (given[1] * 2.0).exp());
                assert!((found[0] - a / (a + b)).abs() < 1e-6 && (found[1] - b / (a + b)).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn jobs_are_gathered_in_order_whatever_their_alignment() {
        let model = trap("sentinel").unwrap();
        let row = |value: f32| {
            let mut bytes = vec![0];
            bytes.extend([value; 8].iter().flat_map(|v| v.to_le_bytes()));
            [Tensor::new(DataType::Fp32, Shape::new([1, 8]).unwrap(), Bytes::from(bytes).slice(1..)).unwrap()]
        };
        let jobs: Vec<[Tensor; 1]> = (0..5).map(|i| row(i as f32)).collect();
        let jobs: Vec<&[Tensor]> = jobs.iter().map(|job| job.as_slice()).collect();
        let found = run_jobs(&model, &jobs).unwrap().remove(0).to_vec::<f32>().unwrap();
        let expected: Vec<f32> = (0..5).flat_map(|i| [2.0 * i as f32 + 1.0; 8]).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn every_bit_of_every_datatype_comes_back() {
        for dtype in DataType::ALL.into_iter().filter(|dtype| *dtype != DataType::Bf16) {
            let shape = Shape::new([3, 5]).unwrap();
            let tensor = match dtype.size() {
                None => Tensor::from_strings(shape, (0..15).map(|i| "é\0".repeat(i % 4))),
                Some(size) => {
                    let limit = if dtype == DataType::Bool { 2 } else { 251 };
                    let bytes: Vec<u8> = (0..15 * size).map(|i| (i * 37 % limit) as u8).collect();
                    Tensor::new(dtype, shape, bytes.into())
                }
            }
            .unwrap();
            let name = format!("identity_{}", dtype.name().to_lowercase());
            assert_eq!(run_one(&trap(&name).unwrap(), std::slice::from_ref(&tensor)), [tensor], "{name}");
        }
    }

    #[test]
    fn strings_that_are_not_utf8_are_the_clients_fault() {
        let x = Tensor::from_strings(Shape::new([1, 1]).unwrap(), [b"\xff"]).unwrap();
        let error = run_jobs(&trap("identity_bytes").unwrap(), &[&[x]]).unwrap_err();
        assert!(matches!(&error, RunError::InvalidArgument(text) if text.contains("\"x\" holds bytes")), "{error}");
    }

    #[test]
    fn scalars_integers_and_computed_shapes() {
        let scale = Tensor::from_vec(Shape::scalar(), vec![3f32]).unwrap();
        let y = run_one(&trap("scalar").unwrap(), &[floats(&[1, 4], &[1.0, 2.0, 3.0, 4.0]), scale]);
        assert_eq!(y[0].to_vec::<f32>().unwrap(), [3.0, 6.0, 9.0, 12.0]);
        let model = build::Model::new()
            .input("x", INT64, &["batch", "2"])
            .node("Add", &["x", "x"], &["y"])
            .node("Shape", &["x"], &["shape"])
            .output("y", INT64, &["batch", "2"])
            .output("shape", INT64, &["2"]);
        let x = Tensor::from_vec(Shape::new([2, 2]).unwrap(), vec![1i64, -2, i64::MAX / 2, 0]).unwrap();
        let outputs = run_one(&load_built(&model).unwrap(), &[x]);
        assert_eq!(outputs[0].to_vec::<i64>().unwrap(), [2, -4, i64::MAX - 1, 0]);
        assert_eq!(outputs[1].to_vec::<i64>().unwrap(), [2, 2]);
    }

    #[test]
    fn unnamed_free_dimensions_get_symbols() {
        let model =
            build::Model::new().input("x", FLOAT, &["", ""]).node("Relu", &["x"], &["y"]).output("y", FLOAT, &["", ""]);
        let model = load_built(&model).unwrap();
        assert!(model.warnings().is_empty(), "one plan for every shape: {:?}", model.warnings());
        assert_eq!(run_one(&model, &[floats(&[2, 1], &[-1.0, 1.0])])[0].to_vec::<f32>().unwrap(), [0.0, 1.0]);
        assert_eq!(run_one(&model, &[floats(&[1, 3], &[2.0; 3])])[0].shape().dims(), [1, 3]);
    }

    #[test]
    fn a_run_remembers_nothing_of_the_one_before() {
        // One cell, input and state of width 1: the answer depends on the state that it starts from. A state of tract's
        // that is used twice gives another answer the second time.
        let model = build::Model::new()
            .input("x", FLOAT, &["seq", "batch", "1"])
            .weights("w", &[1, 4, 1], &[1.0; 4])
            .weights("r", &[1, 4, 1], &[1.0; 4])
            .call("", "LSTM", &["x", "w", "r"], &["y"], vec![integer("hidden_size", 1)])
            .output("y", FLOAT, &["seq", "1", "batch", "1"]);
        let model = load_built(&model).unwrap();
        let mut instance = model.instance().unwrap();
        let mut run = |batch: usize| {
            let inputs = [floats(&[2, batch, 1], &vec![0.5; 2 * batch])];
            instance.run(&Batch::new(&[&inputs])).unwrap()[0].to_vec::<f32>().unwrap()[0]
        };
        let first = run(1);
        assert_eq!([run(1), run(3), run(1)], [first; 3]);
    }

    #[test]
    fn an_index_out_of_range_is_the_clients_fault_and_costs_nothing() {
        let model = trap("gather").unwrap();
        let mut instance = model.instance().unwrap();
        let mut run = |ids: &[i64]| {
            let inputs = [Tensor::from_vec(Shape::new([ids.len(), 1]).unwrap(), ids.to_vec()).unwrap()];
            instance.run(&Batch::new(&[&inputs])).map(|mut outputs| outputs.remove(0))
        };
        for bad in [10, -11, i64::MAX, i64::MIN] {
            assert!(matches!(run(&[1, bad]), Err(RunError::InvalidArgument(_))), "{bad}");
        }
        assert_eq!(run(&[-10]).unwrap(), run(&[0]).unwrap());
    }

    #[test]
    fn shapes_that_need_plans_of_their_own() {
        let model = trap("only_seven").unwrap();
        assert_eq!(model.warnings().len(), 1);
        let row = |seed: usize| [floats(&[1, 7], &(0..7).map(|i| (i * seed) as f32 / 9.0).collect::<Vec<_>>())];
        let rows: Vec<[Tensor; 1]> = (0..11).map(row).collect();
        let alone: Vec<Vec<f32>> = rows.iter().map(|r| run_one(&model, r)[0].to_vec().unwrap()).collect();
        for count in 2..=rows.len() {
            let jobs: Vec<&[Tensor]> = rows[..count].iter().map(|row| row.as_slice()).collect();
            let outputs = run_jobs(&model, &jobs).unwrap();
            assert_eq!(outputs[0].shape().dims(), [count, 2], "padding is cut off again");
            let found = outputs[0].to_vec::<f32>().unwrap();
            for (a, b) in found.iter().zip(alone.concat()) {
                assert!((a - b).abs() < 1e-6);
            }
        }
        let wide = [floats(&[1, 8], &[0.0; 8])];
        assert!(matches!(run_jobs(&model, &[&wide]), Err(RunError::InvalidArgument(_))));
    }

    #[test]
    fn few_plans_are_kept_and_batch_sizes_share_them() {
        let path = in_repository("tests/traps/only_seven/1/model.onnx");
        let description = Description::read(std::fs::read(&path).unwrap().into()).unwrap();
        let Plans::Concrete(plans) = load(&path, &description).unwrap().plans else { panic!("a symbolic plan") };
        for rows in 1..20 {
            plans.plan(vec![Shape::new([rows, 7]).unwrap()]).unwrap();
            assert!(plans.recent.lock().unwrap().len() <= KEPT_PLANS);
        }
        let kept = plans.plan(vec![Shape::new([12, 7]).unwrap()]).unwrap();
        assert!(Arc::ptr_eq(&kept, &plans.plan(vec![Shape::new([12, 7]).unwrap()]).unwrap()));
        assert!(plans.plan(vec![Shape::new([1, 8]).unwrap()]).is_err());
        assert_eq!(plans.recent.lock().unwrap().len(), KEPT_PLANS, "a failure takes no place");
    }

    #[test]
    fn what_tract_cannot_do_is_refused_at_load_with_a_reason() {
        for (name, reason) in [
            ("reverse_lstm", "tract: LSTM with direction reverse runs forwards in tract: use the backend onnxruntime"),
            ("identity_bf16", "tract: \"x\" is BF16, which tract does not have: use the backend onnxruntime"),
            ("slow", "tract: Translating node #3 \"loop_1\" Unimplemented(Loop)"),
            ("random_noise", "tract: Building node"),
        ] {
            let text = error(trap(name));
            assert!(text.starts_with(reason), "{name}: {text}");
        }
        let free = build::Model::new()
            .input("x", FLOAT, &["batch", "n"])
            .node("NoSuchOperator", &["x"], &["y"])
            .output("y", FLOAT, &["batch", "n"]);
        assert!(error(load_built(&free)).contains("NoSuchOperator"));
        // tract panics where the file lacks what its output names.
        let dangling = build::Model::new().input("x", STRING, &["n"]).output("nowhere", STRING, &["n"]);
        assert!(error(load_built(&dangling)).starts_with("tract: panicked: "));
    }

    #[test]
    fn every_other_trap_model_loads() {
        let refused = ["batch_norm_training", "identity_bf16", "random_noise", "reverse_lstm", "slow"];
        for entry in std::fs::read_dir(in_repository("tests/traps")).unwrap() {
            let folder = entry.unwrap().path();
            let name = folder.file_name().unwrap().to_str().unwrap();
            if folder.is_dir() && !name.starts_with('.') {
                let result = trap(name);
                assert_eq!(result.is_err(), refused.contains(&name), "{name}: {:?}", result.err());
            }
        }
    }

    #[test]
    fn other_devices_and_threads() {
        let path = in_repository("tests/traps/sentinel/1/model.onnx");
        let description = Arc::new(Description::read(std::fs::read(&path).unwrap().into()).unwrap());
        let artifact = Artifact { path, description };
        let cuda = LoadOptions { device: Device::Cuda(0), threads: 1 };
        assert!(
            matches!(Tract.load(&artifact, &cuda), Err(LoadError::Unavailable(text)) if text.contains("onnxruntime"))
        );
        let model = Tract.load(&artifact, &LoadOptions { threads: 4, ..CPU }).unwrap();
        assert_eq!(model.warnings(), ["tract runs on one thread: threads = 4 has no effect"]);
        assert!(model.instances_share_weights());
    }

    #[test]
    fn load_errors_show_no_folder() {
        let folder = tempfile::tempdir().unwrap();
        let model = build::Model::new()
            .input("x", FLOAT, &["n"])
            .external("w", &[("location", "missing.bin")])
            .node("Add", &["x", "w"], &["y"])
            .output("y", FLOAT, &["n"]);
        let path = folder.path().join("model.onnx");
        std::fs::write(&path, model.bytes()).unwrap();
        let text = error(load_file(&path));
        assert!(text.contains("missing.bin") && !text.contains(&*folder.path().to_string_lossy()), "{text}");
    }

    #[test]
    fn the_example_models_give_their_expected_answers() {
        for name in ["digits/1", "digits/2", "tumor/1", "diabetes/1", "wine/1"] {
            let folder = in_repository("models").join(name);
            let model = load_file(&folder.join("model.onnx")).unwrap();
            let golden = std::fs::read_to_string(folder.join("expected.json")).unwrap();
            let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
            for case in golden["cases"].as_array().unwrap() {
                let tensor = |spec: &TensorSpec, given: &serde_json::Value| {
                    let dims: Vec<i64> = serde_json::from_value(given["shape"].clone()).unwrap();
                    let data: Vec<f64> = serde_json::from_value(given["data"].clone()).unwrap();
                    let shape = Shape::from_wire(&dims).unwrap();
                    let shaped = match spec.dtype {
                        DataType::Int64 => Tensor::from_vec(shape, data.iter().map(|v| *v as i64).collect()),
                        _ => Tensor::from_vec(shape, data.iter().map(|v| *v as f32).collect()),
                    };
                    shaped.unwrap()
                };
                let signature = model.signature();
                let inputs: Vec<Tensor> =
                    signature.inputs.iter().map(|spec| tensor(spec, &case["inputs"][&*spec.name])).collect();
                for (spec, found) in signature.outputs.iter().zip(run_one(&model, &inputs)) {
                    let expected = tensor(spec, &case["outputs"][&*spec.name]);
                    assert_eq!(found.shape(), expected.shape(), "{name} {}", spec.name);
                    match found.to_vec::<f32>() {
                        None => assert_eq!(found, expected, "{name} {}", spec.name),
                        Some(values) => {
                            for (a, b) in values.iter().zip(expected.to_vec::<f32>().unwrap()) {
                                assert!((a - b).abs() <= 1e-5 + 1e-4 * b.abs(), "{name} {}: {a} {b}", spec.name);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_version_is_the_one_pinned() {
        let manifest = std::fs::read_to_string(in_repository("Cargo.toml")).unwrap();
        assert!(manifest.contains(&format!("tract-onnx = {{ version = \"={VERSION}\"")));
    }
}
