//! Sessions: a loaded model, and what one worker thread runs.

use std::sync::{Arc, Mutex, PoisonError};

use ort::ErrorCode;
use ort::environment::Environment;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{Session, SessionInputValue};
use ort::value::{Outlet, ValueType};

use super::shared::{Runner, Shared};
use super::values::{Aligned, borrowed_value, bytes_of, datatype, failed, run_error, string_value, tensor_of};
use super::{NAME, clean, refused};
use crate::backend::onnx::Description;
use crate::backend::{Artifact, Batch, Device, Instance, LoadError, LoadOptions, Model, RunError, gpus};
use crate::tensor::{DataType, Dim, OutputKind, Signature, Tensor, TensorSpec};

/// An input's gather buffer that grew larger than this is freed after the run, so that one big batch does not hold its
/// memory for ever.
pub(super) const SCRATCH_KEPT_BYTES: usize = 4 << 20;

pub(super) fn session(
    environment: &Environment,
    artifact: &Artifact,
    options: &LoadOptions,
) -> Result<Session, LoadError> {
    // Patterns are remembered per input shape, without a bound: only where all runs have the same shapes.
    let memory_pattern = artifact
        .description
        .signature()
        .inputs
        .iter()
        .all(|spec| spec.dims.as_ref().is_some_and(|dims| !dims.iter().any(Dim::is_free)));
    let build = || {
        Session::builder(environment)?
            .with_optimization_level(GraphOptimizationLevel::All)?
            .with_intra_threads(options.threads)?
            .with_inter_threads(1)?
            .with_intra_op_spinning(false)?
            .with_inter_op_spinning(false)?
            .with_memory_pattern(memory_pattern)
            .map_err(ort::Error::from)
    };
    let session = |builder: ort::Result<SessionBuilder>| builder?.commit_from_file(&artifact.path);
    // The engine's messages quote the path it was given.
    let said = |error: ort::Error| clean(&error.message().replace(&*artifact.path.to_string_lossy(), "the model"));
    match options.device {
        Device::Cpu => session(build()).map_err(|error| match error.code() {
            ErrorCode::InvalidProtobuf | ErrorCode::NoModel | ErrorCode::NoSuchFile => LoadError::BadModel(said(error)),
            _ => refused(said(error)),
        }),
        Device::Cuda(id) => {
            let number = i32::try_from(id).unwrap_or(i32::MAX);
            // FP32 is computed as such, so that answers are those of the CPU and of rows alone. Convolutions are not
            // tried out for every shape: batches have many.
            let cuda = ort::ep::CUDA::default()
                .with_device_id(number)
                .with_tf32(false)
                .with_conv_algorithm_search(ort::ep::cuda::ConvAlgorithmSearch::Heuristic)
                .build()
                .error_on_failure();
            let with_device = build()
                .and_then(|builder| Ok(builder.with_execution_providers([cuda])?))
                .map_err(|error| no_device(options.device, &said(error)))?;
            session(Ok(with_device)).map_err(|error| {
                if error.code() == ErrorCode::ExecutionProviderFailure || error.message().contains("CUDA") {
                    no_device(options.device, &said(error))
                } else {
                    refused(said(error))
                }
            })
        }
    }
}

fn no_device(device: Device, reason: &str) -> LoadError {
    let (reason, there) = (reason.trim_end_matches('.'), gpus::told(&gpus::count()));
    LoadError::Unavailable(format!(
        "device `{device}` cannot be used: {reason}; {there}; it takes a CUDA build of ONNX Runtime (the libraries in \
         the wheel onnxruntime-gpu, named by ORT_DYLIB_PATH or the setting `onnxruntime`), the CUDA and cuDNN \
         libraries which that build asks for (in LD_LIBRARY_PATH), and an NVIDIA driver; or `device = \"cpu\"`, or \
         `device_fallback = \"cpu\"`"
    ))
}

fn omitted(output: &str) -> String {
    format!("output `{output}` is not a tensor (a map, a sequence or an optional) and is left out")
}

pub(super) struct OnnxRuntimeModel {
    signature: Arc<Signature>,
    warnings: Vec<String>,
    environment: Environment,
    artifact: Artifact,
    options: LoadOptions,
    sessions: Sessions,
}

/// How the instances come by their sessions.
enum Sessions {
    /// All run the same one, each on its own thread.
    One(Arc<Shared>),
    /// Each has its own: it is small; or it has threads, which would be shared, too; or it computes on a GPU, where the
    /// engine's promise to run a session on several threads is not believed. Holds the session that proved the model
    /// loads: the first instance's.
    Each(Mutex<Option<Shared>>),
}

/// Models from this size on have one session for all instances. The runs of one session meet at its allocator's lock and
/// its counters, which costs what is fast anyhow up to 40 % of its throughput, and larger models nothing.
const SHARED_FROM_BYTES: u64 = 4 << 20;

/// Whether instances loaded so run one session.
pub(super) fn instances_share(artifact: &Artifact, options: &LoadOptions) -> bool {
    options.device == Device::Cpu && options.threads == 1 && artifact.bytes >= SHARED_FROM_BYTES
}

impl OnnxRuntimeModel {
    /// The session that this makes proves that the model loads.
    pub(super) fn load(
        environment: &Environment,
        artifact: &Artifact,
        options: &LoadOptions,
    ) -> Result<OnnxRuntimeModel, LoadError> {
        let description = artifact.onnx(NAME)?;
        let session = session(environment, artifact, options)?;
        let signature = reconciled(description, &session).map_err(refused)?;
        let session = Shared::new(session, &signature).map_err(|error| refused(clean(error.message())))?;
        let sessions = match instances_share(artifact, options) {
            true => Sessions::One(Arc::new(session)),
            false => Sessions::Each(Mutex::new(Some(session))),
        };
        Ok(OnnxRuntimeModel {
            signature: Arc::new(signature),
            warnings: description.omitted_outputs.iter().map(|name| omitted(name)).collect(),
            environment: environment.clone(),
            artifact: artifact.clone(),
            options: options.clone(),
            sessions,
        })
    }
}

impl Model for OnnxRuntimeModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn output_kinds(&self) -> &[OutputKind] {
        self.artifact.description.output_kinds()
    }

    fn instance(&self) -> Result<Box<dyn Instance>, LoadError> {
        let unusable = |error: ort::Error| refused(clean(error.message()));
        let session = match &self.sessions {
            Sessions::One(session) => Arc::clone(session),
            Sessions::Each(first) => {
                let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
                Arc::new(match first {
                    Some(session) => session,
                    None => {
                        let session = session(&self.environment, &self.artifact, &self.options)?;
                        Shared::new(session, &self.signature).map_err(unusable)?
                    }
                })
            }
        };
        let instance = OnnxRuntimeInstance::new(session, Arc::clone(&self.signature)).map_err(unusable)?;
        Ok(Box::new(instance))
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// The file's own signature, once the session is seen to agree; output shapes the file leaves open come from the
/// engine's shape inference.
fn reconciled(description: &Description, session: &Session) -> Result<Signature, String> {
    let mut signature = description.signature.clone();
    let inputs: Vec<String> = session.inputs().iter().map(outlet_text).collect();
    let expected: Vec<String> = signature.inputs.iter().map(spec_text).collect();
    if inputs != expected {
        return Err(format!("it takes the inputs {}, expected {}", inputs.join(", "), expected.join(", ")));
    }
    for spec in &mut signature.outputs {
        let outlet = session.outputs().iter().find(|outlet| outlet.name() == &*spec.name);
        let Some(outlet) = outlet.filter(|outlet| outlet_text(outlet) == spec_text(spec)) else {
            return Err(format!(
                "output {} was expected, found {}",
                spec_text(spec),
                outlet.map_or("none of that name".into(), outlet_text)
            ));
        };
        if spec.dims.is_none() {
            spec.dims = inferred_dims(outlet);
        }
    }
    if signature.outputs.is_empty() {
        return Err("none of its outputs is a tensor".into());
    }
    Ok(signature)
}

fn spec_text(spec: &TensorSpec) -> String {
    format!("`{}` {}", spec.name, spec.dtype)
}

/// As [`spec_text`]; a type that has no datatype here is told in the engine's words.
fn outlet_text(outlet: &Outlet) -> String {
    match outlet.dtype() {
        ValueType::Tensor { ty, .. } => match datatype(*ty) {
            Some(dtype) => format!("`{}` {dtype}", outlet.name()),
            None => format!("`{}` of element type {ty}", outlet.name()),
        },
        _ => format!("`{}`, which is not a tensor", outlet.name()),
    }
}

fn inferred_dims(outlet: &Outlet) -> Option<Vec<Dim>> {
    match outlet.dtype() {
        // The engine tells an unknown rank and a scalar apart in no way.
        ValueType::Tensor { shape, .. } if shape.is_empty() => None,
        ValueType::Tensor { shape, dimension_symbols, .. } => {
            let symbol = |axis: usize| dimension_symbols.get(axis).filter(|symbol| !symbol.is_empty());
            let dim = |(axis, extent): (usize, &i64)| match usize::try_from(*extent) {
                Ok(extent) => Dim::Fixed(extent),
                Err(_) => Dim::Free(symbol(axis).map(|symbol| symbol.as_str().into())),
            };
            Some(shape.iter().enumerate().map(dim).collect())
        }
        _ => None,
    }
}

pub(super) struct OnnxRuntimeInstance {
    runner: Runner,
    signature: Arc<Signature>,
    /// One gather buffer per input, reused.
    pub(super) scratch: Vec<Vec<Aligned>>,
}

impl OnnxRuntimeInstance {
    pub(super) fn new(session: Arc<Shared>, signature: Arc<Signature>) -> ort::Result<OnnxRuntimeInstance> {
        let scratch = vec![Vec::new(); signature.inputs.len()];
        Ok(OnnxRuntimeInstance { runner: Runner::new(session)?, signature, scratch })
    }
}

impl Instance for OnnxRuntimeInstance {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Tensor>, RunError> {
        let mut lent: Vec<&[u8]> = Vec::with_capacity(self.scratch.len());
        let mut values: Vec<SessionInputValue> = Vec::with_capacity(self.scratch.len());
        for (input, scratch) in batch.inputs().zip(&mut self.scratch) {
            let value = if input.dtype() == DataType::Bytes {
                string_value(&input)
            } else {
                let bytes = bytes_of(&input, scratch);
                lent.push(bytes);
                borrowed_value(&input, bytes)
            };
            values.push(value.map_err(|error| run_error(&error))?);
        }
        let outputs = self.runner.run(&values).map_err(|error| run_error(&error))?;
        let tensors = outputs
            .into_iter()
            .zip(&self.signature.outputs)
            .map(|(value, spec)| tensor_of(value.ok_or_else(|| failed(spec, "was not returned"))?, spec, &lent));
        let tensors = tensors.collect();
        drop(values);
        self.scratch
            .iter_mut()
            .filter(|buffer| buffer.capacity() * size_of::<Aligned>() > SCRATCH_KEPT_BYTES)
            .for_each(|buffer| {
                *buffer = Vec::new();
            });
        tensors
    }
}
