//! ONNX Runtime, loaded from its shared library while the server runs; the only file that names the crate `ort`.
//!
//! Owns the search for the library, the process-wide environment, sessions, and the hand-over of buffers: inputs are
//! lent to the engine where one aligned buffer holds them and gathered once otherwise; outputs stay in the engine's
//! memory and are shared by reference count. Knows nothing of requests, and does not read the process's environment:
//! callers pass what they found there.
//!
//! Invariants: the library is loaded once and stays until the process ends (nothing tears the environment down, so
//! nothing can crash there); a session belongs to one instance, hence to one thread at a time.
//!
//! Threads: `open`, `load` and `instance` are slow and belong on a loader thread. A session has the intra-op threads it
//! was loaded for, none for 1, and they sleep rather than spin between runs.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use half::{bf16, f16};
use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::memory::Allocator;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{HasSelectedOutputs, OutputSelector, RunOptions, Session, SessionInputValue};
use ort::value::{
    DynTensor, DynTensorValueType, DynValue, Outlet, PrimitiveTensorElementType, TensorElementType, TensorRef,
    ValueType,
};
use ort::{AsPointer, ErrorCode};

use super::{
    Artifact, Backend, Batch, BatchInput, Device, Instance, LoadError, LoadOptions, Model, RunError, onnx::Description,
};
use crate::tensor::{DataType, Dim, OutputKind, Shape, Signature, Tensor, TensorSpec, strings};

/// What `backend = "…"` and the metric label call this engine.
pub const NAME: &str = "onnxruntime";

/// The library's file name, beside the server's binary or in `lib` there.
pub const LIBRARY: &str = if cfg!(target_os = "macos") { "libonnxruntime.dylib" } else { "libonnxruntime.so" };

/// The lowest version of the library that serves: 1.17, the oldest interface that the crate speaks.
const OLDEST: (u32, u32) = (1, ort::MINOR_VERSION);

/// An input's gather buffer that grew larger than this is freed after the run, so that one big batch does not hold its
/// memory for ever.
const SCRATCH_KEPT_BYTES: usize = 4 << 20;

/// The longest engine message passed on, in characters and in lines: the engine puts what it expected on the second.
const MESSAGE_LIMIT: usize = 300;
const MESSAGE_LINES: usize = 2;

const HOW_TO_INSTALL: &str =
    "`make build` puts one beside the binary; or name one in the configuration or in ORT_DYLIB_PATH";

/// A library to open, and why that one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub path: PathBuf,
    pub by: FoundBy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundBy {
    Configuration,
    Environment,
    BesideBinary,
}

impl fmt::Display for FoundBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FoundBy::Configuration => "the configuration",
            FoundBy::Environment => "ORT_DYLIB_PATH",
            FoundBy::BesideBinary => "a library beside the binary",
        })
    }
}

/// No library was named and none lies where it is looked for. Names paths: for the operator's eyes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no ONNX Runtime library at {}; {HOW_TO_INSTALL}", list(.0))]
pub struct NotFound(pub Vec<PathBuf>);

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths.iter().map(|path| format!("`{}`", path.display())).collect();
    if paths.is_empty() { "any place, none being known".into() } else { paths.join(" or ") }
}

/// ONNX Runtime as this process has it.
pub struct OnnxRuntime {
    /// Canonical, to recognise a second `open` of the same file.
    path: PathBuf,
    version: String,
    environment: Environment,
}

impl OnnxRuntime {
    /// Chooses the library: the configured path, else `environment` (the value of `ORT_DYLIB_PATH`), else one beside
    /// the binary. A path somebody named is taken at its word, so that a misspelt one fails in [`OnnxRuntime::open`]
    /// instead of silently giving way to another library.
    pub fn find(
        configured: Option<&Path>,
        environment: Option<PathBuf>,
        exe_dir: Option<&Path>,
    ) -> Result<Found, NotFound> {
        if let Some(path) = configured {
            return Ok(Found { path: path.into(), by: FoundBy::Configuration });
        }
        if let Some(path) = environment.filter(|path| !path.as_os_str().is_empty()) {
            return Ok(Found { path, by: FoundBy::Environment });
        }
        let places: Vec<PathBuf> =
            exe_dir.iter().flat_map(|dir| [dir.join(LIBRARY), dir.join("lib").join(LIBRARY)]).collect();
        match places.iter().find(|place| place.is_file()) {
            Some(place) => Ok(Found { path: place.clone(), by: FoundBy::BesideBinary }),
            None => Err(NotFound(places)),
        }
    }

    /// Loads the library and makes the process's environment; later calls with the same file return the same runtime.
    ///
    /// The error names the file without its folder, what was found and what was expected. Never panics, whatever the
    /// file is.
    pub fn open(path: &Path) -> Result<Arc<OnnxRuntime>, LoadError> {
        // The library cannot be loaded twice in one process, and its environment must outlive every session.
        static OPENED: Mutex<Option<Arc<OnnxRuntime>>> = Mutex::new(None);
        let name = path.file_name().unwrap_or(path.as_os_str()).display().to_string();
        let refused = |what: String| {
            LoadError::Unavailable(format!("ONNX Runtime's library `{name}` cannot be used: {what}; {HOW_TO_INSTALL}"))
        };
        let path = path.canonicalize().map_err(|error| refused(error.to_string().to_lowercase()))?;

        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = &*opened {
            return if runtime.path == path {
                Ok(runtime.clone())
            } else {
                Err(refused(format!("another one, version {}, is loaded in this process already", runtime.version)))
            };
        }
        // The crate panics where it takes the library's word for something.
        let runtime = catch_unwind(|| initialise(path))
            .unwrap_or_else(|_| Err("it broke while it was initialised".into()))
            .map_err(refused)?;
        let runtime = Arc::new(runtime);
        *opened = Some(runtime.clone());
        Ok(runtime)
    }

    fn session(environment: &Environment, artifact: &Artifact, options: &LoadOptions) -> Result<Session, LoadError> {
        // Patterns are remembered per input shape, without a bound: only where all runs have the same shapes.
        let memory_pattern = artifact
            .description
            .signature
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
                ErrorCode::InvalidProtobuf | ErrorCode::NoModel | ErrorCode::NoSuchFile => {
                    LoadError::BadModel(said(error))
                }
                _ => refused(said(error)),
            }),
            Device::Cuda(id) => {
                let number = i32::try_from(id).unwrap_or(i32::MAX);
                let cuda = ort::ep::CUDA::default().with_device_id(number).build().error_on_failure();
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
}

impl fmt::Debug for OnnxRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnnxRuntime").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Backend for OnnxRuntime {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        self.version.clone()
    }

    fn load(&self, artifact: &Artifact, options: &LoadOptions) -> Result<Arc<dyn Model>, LoadError> {
        let load = || {
            let session = OnnxRuntime::session(&self.environment, artifact, options)?;
            let signature = reconciled(&artifact.description, &session).map_err(refused)?;
            Ok(Arc::new(OnnxRuntimeModel {
                signature: Arc::new(signature),
                warnings: artifact.description.omitted_outputs.iter().map(|name| omitted(name)).collect(),
                environment: self.environment.clone(),
                artifact: artifact.clone(),
                options: options.clone(),
                first: Mutex::new(Some(session)),
            }))
        };
        // The crate panics on types of inputs and outputs it does not know.
        let model = catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(|_| Err(refused("it broke on this model")))?;
        Ok(model)
    }
}

fn refused(message: impl Into<String>) -> LoadError {
    LoadError::Engine { engine: NAME, message: message.into() }
}

fn no_device(device: Device, reason: &str) -> LoadError {
    LoadError::Unavailable(format!(
        "device `{device}` cannot be used: {reason}; it takes a CUDA build of ONNX Runtime (the library in the wheel \
         onnxruntime-gpu, named by ORT_DYLIB_PATH), the CUDA and cuDNN libraries that build asks for, and an NVIDIA \
         driver"
    ))
}

fn omitted(output: &str) -> String {
    format!("output `{output}` is not a tensor (a map, a sequence or an optional) and is left out")
}

// --- the library ---------------------------------------------------------------------------------------------------

fn initialise(path: PathBuf) -> Result<OnnxRuntime, String> {
    check_file(&path)?;
    // Held until the crate holds the library too, which is then not unloaded in between.
    let (_library, version) = check_library(&path)?;
    let environment = ort::init_from(&path)
        .map_err(|error| clean(&error.to_string()))?
        .with_name("tidegate")
        .with_telemetry(false)
        .with_logger(Arc::new(log))
        .build()
        .map_err(|error| clean(error.message()))?;
    // A custom logger starts at verbose: every run would format lines that nobody reads.
    environment.set_log_level(LogLevel::Warning);
    Ok(OnnxRuntime { path, version, environment })
}

fn check_version(version: &str) -> Result<(), String> {
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found < OLDEST {
        return Err(format!("it is version {version}, expected {}.{} or newer", OLDEST.0, OLDEST.1));
    }
    Ok(())
}

/// Refuses what the dynamic linker would crash on or describe badly: a file that is no library, or half of one.
fn check_file(path: &Path) -> Result<(), String> {
    let read = || -> std::io::Result<Option<String>> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Ok(Some("it is not a file".into()));
        }
        if !cfg!(target_os = "linux") {
            return Ok(None);
        }
        Ok(match elf_length(&mut file, metadata.len())? {
            None => Some("it is not a shared library (no 64-bit ELF header)".into()),
            Some(expected) if expected > metadata.len() => {
                Some(format!("it is cut short: {} bytes, expected {expected} or more", metadata.len()))
            }
            Some(_) => None,
        })
    };
    match read() {
        Ok(None) => Ok(()),
        Ok(Some(problem)) => Err(problem),
        Err(error) => Err(error.to_string().to_lowercase()),
    }
}

/// The bytes that a little-endian ELF64 file's headers speak of; `None` where it is none. Mapping fewer ends in SIGBUS.
/// Reads on only where the tables themselves are inside the file.
fn elf_length(file: &mut File, file_length: u64) -> std::io::Result<Option<u64>> {
    const HEADER: u64 = 64;
    let mut header = Vec::new();
    file.by_ref().take(HEADER).read_to_end(&mut header)?;
    // Magic, 64 bits, little-endian.
    if header.len() < HEADER as usize || !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    let number = |bytes: &[u8], at: usize, size: usize| {
        bytes[at..at + size].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let (segments, segment_size, segment_count) =
        (number(&header, 0x20, 8), number(&header, 0x36, 2), number(&header, 0x38, 2));
    let (sections, section_size, section_count) =
        (number(&header, 0x28, 8), number(&header, 0x3a, 2), number(&header, 0x3c, 2));
    let table_end = segments.saturating_add(segment_size * segment_count);
    let mut length = table_end.max(sections.saturating_add(section_size * section_count));
    if length > file_length {
        return Ok(Some(length));
    }
    let mut table = Vec::new();
    file.seek(SeekFrom::Start(segments))?;
    // At most 4 GiB by the width of the two factors, and no more than the file holds.
    file.by_ref().take(segment_size * segment_count).read_to_end(&mut table)?;
    for segment in table.chunks_exact((segment_size as usize).max(1)).filter(|segment| segment.len() >= 0x28) {
        length = length.max(number(segment, 0x08, 8).saturating_add(number(segment, 0x20, 8)));
    }
    Ok(Some(length))
}

/// Asks the library for its version and its interface before the crate takes it for good. The library stays mapped
/// while the handle lives.
fn check_library(path: &Path) -> Result<(libloading::Library, String), String> {
    use std::error::Error;
    // SAFETY: loading runs the library's initialisers. The operator chose the file, and it is a whole one.
    let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
        let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        clean(&reason.replace(&*path.to_string_lossy(), "the library"))
    })?;
    type GetApiBase = unsafe extern "system" fn() -> *const ort::sys::OrtApiBase;
    // SAFETY: that symbol has had this type in every release of ONNX Runtime.
    let base = unsafe { library.get::<GetApiBase>(b"OrtGetApiBase\0") }
        .map_err(|_| "it is not ONNX Runtime (it does not export `OrtGetApiBase`)")?;
    // SAFETY: it takes no arguments and returns a static of the library, which is alive here, or null.
    let base = unsafe { base().as_ref() }.ok_or("it offers no interface")?;
    // SAFETY: `base` is that static; the function takes no arguments and returns a static C string.
    let version = unsafe { std::ffi::CStr::from_ptr((base.GetVersionString)()) }.to_string_lossy().into_owned();
    check_version(&version)?;
    // SAFETY: `base` is that static; the function takes a number and returns a static of the library, or null.
    if unsafe { (base.GetApi)(ort::MINOR_VERSION) }.is_null() {
        return Err(format!("it does not offer version {} of its interface", ort::MINOR_VERSION));
    }
    Ok((library, version))
}

/// The engine's log, into ours. Called from the engine's threads.
fn log(level: LogLevel, _category: &str, _id: &str, _location: &str, message: &str) {
    match level {
        LogLevel::Verbose | LogLevel::Info => {}
        LogLevel::Warning => tracing::warn!(target: "onnxruntime", "{}", clean(message)),
        LogLevel::Error | LogLevel::Fatal => tracing::error!(target: "onnxruntime", "{}", clean(message)),
    }
}

/// An engine's message made fit for a client and for one line of log: its first lines, without words that are paths or
/// addresses, bounded.
fn clean(message: &str) -> String {
    let is_place = |word: &str| {
        let word = word.trim_start_matches(['"', '\'', '(', '[', '`']);
        word.starts_with('/') || word.contains("0x") || word.contains(".cc:") || word.contains(".h:")
    };
    let words: Vec<&str> =
        message.lines().take(MESSAGE_LINES).flat_map(str::split_whitespace).filter(|word| !is_place(word)).collect();
    let text = words.join(" ");
    text.chars().filter(|c| !c.is_control()).take(MESSAGE_LIMIT).collect()
}

// --- a model -------------------------------------------------------------------------------------------------------

struct OnnxRuntimeModel {
    signature: Arc<Signature>,
    warnings: Vec<String>,
    environment: Environment,
    artifact: Artifact,
    options: LoadOptions,
    /// The session that proved the model loads: the first instance's.
    first: Mutex<Option<Session>>,
}

impl Model for OnnxRuntimeModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn output_kinds(&self) -> &[OutputKind] {
        &self.artifact.description.output_kinds
    }

    fn instance(&self) -> Result<Box<dyn Instance>, LoadError> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let session = match first {
            Some(session) => session,
            None => OnnxRuntime::session(&self.environment, &self.artifact, &self.options)?,
        };
        let instance = OnnxRuntimeInstance::new(session, self.signature.clone())
            .map_err(|error| refused(clean(error.message())))?;
        Ok(Box::new(instance))
    }

    fn instances_share_weights(&self) -> bool {
        false
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

macro_rules! element_types {
    ($($element:ident => $dtype:ident),* $(,)?) => {
        fn datatype(ty: TensorElementType) -> Option<DataType> {
            match ty {
                $(TensorElementType::$element => Some(DataType::$dtype),)*
                _ => None,
            }
        }
    };
}
element_types! {
    Bool => Bool, Uint8 => Uint8, Uint16 => Uint16, Uint32 => Uint32, Uint64 => Uint64, Int8 => Int8, Int16 => Int16,
    Int32 => Int32, Int64 => Int64, Float16 => Fp16, Bfloat16 => Bf16, Float32 => Fp32, Float64 => Fp64,
    String => Bytes,
}

// --- a run ---------------------------------------------------------------------------------------------------------

struct OnnxRuntimeInstance {
    session: Session,
    /// Asks for the signature's outputs, in its order: what is not a tensor is never fetched.
    options: RunOptions<HasSelectedOutputs>,
    signature: Arc<Signature>,
    /// One gather buffer per input, reused. `u64` aligns it for every element type.
    scratch: Vec<Vec<u64>>,
}

impl OnnxRuntimeInstance {
    fn new(session: Session, signature: Arc<Signature>) -> ort::Result<OnnxRuntimeInstance> {
        let mut options = RunOptions::new()?;
        // A failed run is an error its caller gets; a client must not be able to fill the log.
        options.set_log_level(LogLevel::Fatal)?;
        let outputs =
            signature.outputs.iter().fold(OutputSelector::no_default(), |all, spec| all.with(spec.name.to_string()));
        let scratch = vec![Vec::new(); signature.inputs.len()];
        Ok(OnnxRuntimeInstance { session, options: options.with_outputs(outputs), signature, scratch })
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
        // Named as the session orders its inputs, which is the signature's order.
        let mut outputs =
            self.session.run_with_options(&values[..], &self.options).map_err(|error| run_error(&error))?;
        let tensors = self.signature.outputs.iter().map(|spec| {
            let value = outputs.remove(&*spec.name).ok_or_else(|| failed(spec, "was not returned"))?;
            tensor_of(value, spec, &lent)
        });
        let tensors = tensors.collect();
        drop(values);
        self.scratch.iter_mut().filter(|buffer| buffer.capacity() > SCRATCH_KEPT_BYTES / 8).for_each(|buffer| {
            *buffer = Vec::new();
        });
        tensors
    }
}

fn run_error(error: &ort::Error) -> RunError {
    match error.code() {
        ErrorCode::InvalidArgument => RunError::InvalidArgument(clean(error.message())),
        _ => RunError::Failed(clean(error.message())),
    }
}

fn failed(spec: &TensorSpec, what: impl fmt::Display) -> RunError {
    RunError::Failed(format!("output `{}` {what}", spec.name))
}

/// The input's bytes at the alignment of its elements: where they lie, or gathered into `scratch`.
fn bytes_of<'a>(input: &BatchInput<'a>, scratch: &'a mut Vec<u64>) -> &'a [u8] {
    if let Some(bytes) = input.contiguous(input.dtype().size().unwrap_or(1)) {
        return bytes;
    }
    let length = input.byte_length();
    scratch.resize(length.div_ceil(8), 0);
    let bytes = &mut bytemuck::cast_slice_mut(scratch)[..length];
    input.gather_into(bytes);
    bytes
}

/// A tensor over `bytes`, which it borrows.
fn borrowed_value<'a>(input: &BatchInput<'a>, bytes: &'a [u8]) -> ort::Result<SessionInputValue<'a>> {
    let shape = input.shape().to_wire();
    match input.dtype() {
        DataType::Bool => {
            let elements = bytemuck::checked::try_cast_slice(bytes).map_err(unlendable)?;
            Ok(TensorRef::<bool>::from_array_view((shape, elements))?.into())
        }
        DataType::Uint8 => view::<u8>(shape, bytes),
        DataType::Uint16 => view::<u16>(shape, bytes),
        DataType::Uint32 => view::<u32>(shape, bytes),
        DataType::Uint64 => view::<u64>(shape, bytes),
        DataType::Int8 => view::<i8>(shape, bytes),
        DataType::Int16 => view::<i16>(shape, bytes),
        DataType::Int32 => view::<i32>(shape, bytes),
        DataType::Int64 => view::<i64>(shape, bytes),
        DataType::Fp16 => view::<f16>(shape, bytes),
        DataType::Bf16 => view::<bf16>(shape, bytes),
        DataType::Fp32 => view::<f32>(shape, bytes),
        DataType::Fp64 => view::<f64>(shape, bytes),
        DataType::Bytes => Err(ort::Error::new("a BYTES tensor has no fixed-size elements")),
    }
}

fn view<'a, T>(shape: Vec<i64>, bytes: &'a [u8]) -> ort::Result<SessionInputValue<'a>>
where
    T: bytemuck::Pod + PrimitiveTensorElementType + fmt::Debug,
{
    // An empty buffer may lie anywhere.
    let elements: &'a [T] = if bytes.is_empty() { &[] } else { bytemuck::try_cast_slice(bytes).map_err(unlendable)? };
    Ok(TensorRef::from_array_view((shape, elements))?.into())
}

fn unlendable(error: impl fmt::Display) -> ort::Error {
    ort::Error::new(format!("the input's buffer cannot be lent to the engine: {error}"))
}

/// A string tensor of the engine's own, filled by length: the crate's way goes through C strings, which end at the
/// first NUL, and demands UTF-8.
fn string_value<'a>(input: &BatchInput) -> ort::Result<SessionInputValue<'a>> {
    let shape = input.shape();
    let mut tensor = DynTensor::new(&Allocator::default(), TensorElementType::String, shape.to_wire())?;
    for (index, element) in input.strings().take(shape.elements()).enumerate() {
        let mut buffer = std::ptr::null_mut();
        // SAFETY: `tensor` is a live string tensor with more than `index` elements, and nobody else refers to it.
        let status = unsafe {
            (ort::api().GetResizedStringTensorElementBuffer)(tensor.ptr_mut(), index, element.len(), &mut buffer)
        };
        // SAFETY: the status comes from the call above and is consumed once.
        unsafe { ort::Error::result_from_status(status) }?;
        if !element.is_empty() {
            // SAFETY: on success `buffer` points at `element.len()` writable bytes inside the tensor.
            unsafe { std::ptr::copy_nonoverlapping(element.as_ptr(), buffer.cast(), element.len()) };
        }
    }
    Ok(tensor.into())
}

/// An output as a tensor over the engine's memory. `lent` are the inputs' buffers, which the engine must not keep.
fn tensor_of(value: DynValue, spec: &TensorSpec, lent: &[&[u8]]) -> Result<Tensor, RunError> {
    let value = value.downcast::<DynTensorValueType>().map_err(|_| failed(spec, "is not a tensor"))?;
    let dtype = datatype(*value.data_type()).filter(|dtype| *dtype == spec.dtype);
    let dtype = dtype.ok_or_else(|| failed(spec, format!("is of another datatype than {}", spec.dtype)))?;
    let shape =
        Shape::from_wire(value.shape()).map_err(|error| failed(spec, format!("has no usable shape: {error}")))?;
    if !value.memory_info().is_cpu_accessible() {
        return Err(failed(spec, "was left in the device's memory"));
    }
    let data = match dtype.size() {
        None => string_data(&value, shape.elements()).map_err(|error| run_error(&error))?.into(),
        Some(size) => engine_data(value, shape.elements() * size, lent),
    };
    Tensor::new(dtype, shape, data).map_err(|error| failed(spec, format!("is malformed: {error}")))
}

/// Lets [`Bytes`] own an engine's tensor.
struct EngineBuffer {
    tensor: DynTensor,
    length: usize,
}

impl AsRef<[u8]> for EngineBuffer {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the tensor holds `length` initialised bytes in host memory at that address (dense, by the engine's
        // contract; not null, since `length` is not 0) for as long as it lives, and nobody writes to them.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr().cast(), self.length) }
    }
}

fn engine_data(tensor: DynTensor, length: usize, lent: &[&[u8]]) -> Bytes {
    if length == 0 {
        return Bytes::new();
    }
    let start: *const u8 = tensor.data_ptr().cast();
    let buffer = EngineBuffer { tensor, length };
    // A graph may name an input as its output; the engine then returns our own buffer, which only the run borrows.
    if lent.iter().any(|input| input.as_ptr_range().contains(&start)) {
        return Bytes::copy_from_slice(buffer.as_ref());
    }
    Bytes::from_owner(buffer)
}

/// The elements of a string tensor in the protocol's encoding; any byte may occur in them.
fn string_data(tensor: &DynTensor, elements: usize) -> ort::Result<Vec<u8>> {
    let mut length = 0;
    // SAFETY: `tensor` is a live string tensor; the status is consumed once.
    unsafe {
        ort::Error::result_from_status((ort::api().GetStringTensorDataLength)(tensor.ptr(), &mut length))?;
    }
    let mut content = vec![0u8; length];
    let mut offsets = vec![0usize; elements];
    if elements > 0 {
        // SAFETY: the buffers are as long as the lengths passed with them; the status is consumed once.
        unsafe {
            ort::Error::result_from_status((ort::api().GetStringTensorContent)(
                tensor.ptr(),
                content.as_mut_ptr().cast(),
                content.len(),
                offsets.as_mut_ptr(),
                offsets.len(),
            ))?;
        }
    }
    let mut encoded = Vec::with_capacity(length + elements * strings::PREFIX);
    let ends = offsets.iter().skip(1).copied().chain([length]);
    for (start, end) in offsets.iter().zip(ends) {
        let element = content.get(*start..end).ok_or_else(|| ort::Error::new("the string offsets do not ascend"))?;
        strings::push(&mut encoded, element).ok_or_else(|| ort::Error::new("a string is longer than 4 GiB"))?;
    }
    Ok(encoded)
}

#[cfg(test)]
mod tests {
    use super::super::onnx::build;
    use super::*;

    /// The library that `make build` fetches. `None` only where the test run is told that there is none: a test that
    /// needs it must not pass because it is missing.
    #[expect(clippy::disallowed_methods, reason = "how a test run is told; no configuration exists here")]
    fn library() -> Option<Arc<OnnxRuntime>> {
        if std::env::var_os("TIDEGATE_TEST_WITHOUT_ONNXRUNTIME").is_some_and(|value| value == "1") {
            return None;
        }
        let release = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/release");
        let found = OnnxRuntime::find(None, None, Some(&release)).unwrap_or_else(|error| {
            panic!("run `make build` first, or set TIDEGATE_TEST_WITHOUT_ONNXRUNTIME=1 where it cannot be had: {error}")
        });
        Some(OnnxRuntime::open(&found.path).unwrap())
    }

    fn spec(name: &str, dtype: DataType, dims: &[i64]) -> TensorSpec {
        let dims = dims.iter().map(|extent| usize::try_from(*extent).map_or(Dim::Free(None), Dim::Fixed));
        TensorSpec { name: name.into(), dtype, dims: Some(dims.collect()) }
    }

    fn artifact(path: PathBuf, inputs: Vec<TensorSpec>, outputs: Vec<TensorSpec>) -> Artifact {
        let description = Description {
            output_kinds: vec![OutputKind::Values; outputs.len()],
            signature: Signature { inputs, outputs },
            ..Description::default()
        };
        Artifact { path, description: Arc::new(description) }
    }

    /// A trap model as the registry would describe it.
    fn trap(name: &str) -> Artifact {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traps").join(name).join("1/model.onnx");
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Artifact { path, description: Arc::new(Description::read(bytes.into()).unwrap()) }
    }

    fn identity(dtype: DataType) -> Artifact {
        trap(&format!("identity_{}", dtype.name().to_lowercase()))
    }

    const ONE_THREAD: LoadOptions = LoadOptions { device: Device::Cpu, threads: 1 };

    fn instance(runtime: &OnnxRuntime, artifact: &Artifact) -> Box<dyn Instance> {
        runtime.load(artifact, &ONE_THREAD).unwrap().instance().unwrap()
    }

    fn run(instance: &mut Box<dyn Instance>, jobs: &[&[Tensor]]) -> Result<Vec<Tensor>, RunError> {
        instance.run(&Batch::new(jobs))
    }

    fn shape(dims: &[usize]) -> Shape {
        Shape::new(dims).unwrap()
    }

    /// `rows` rows of 3 elements whose bytes count up from `seed`, at an address that no element type is aligned to.
    fn misaligned(dtype: DataType, rows: usize, seed: u8) -> Tensor {
        if dtype == DataType::Bytes {
            return Tensor::from_strings(shape(&[rows, 3]), (0..rows * 3).map(|i| vec![seed; i])).unwrap();
        }
        let length = rows * 3 * dtype.size().unwrap();
        let value = |i: usize| if dtype == DataType::Bool { (i % 2) as u8 } else { seed.wrapping_add(i as u8) };
        let mut raw: Vec<u8> = Vec::with_capacity(length + 8);
        let offset = (0..8).find(|offset| (raw.as_ptr() as usize + offset) % 8 == 1).unwrap();
        raw.extend(std::iter::repeat_n(0, offset).chain((0..length).map(value)));
        Tensor::new(dtype, shape(&[rows, 3]), Bytes::from(raw).slice(offset..)).unwrap()
    }

    #[test]
    fn every_datatype_comes_back_bit_for_bit_from_jobs_at_any_address() {
        let Some(runtime) = library() else { return };
        for dtype in DataType::ALL {
            let mut instance = instance(&runtime, &identity(dtype));
            let parts: Vec<[Tensor; 1]> =
                [2, 1, 3].iter().map(|rows| [misaligned(dtype, *rows, *rows as u8)]).collect();
            let jobs: Vec<&[Tensor]> = parts.iter().map(|part| part.as_slice()).collect();
            for jobs in [&jobs[..], &jobs[..1], &jobs[1..2]] {
                let output = run(&mut instance, jobs).unwrap().remove(0);
                let counts: Vec<usize> = jobs.iter().map(|job| job[0].rows().unwrap()).collect();
                let split = output.split_rows(&counts).unwrap();
                for (sent, back) in jobs.iter().zip(&split) {
                    assert_eq!(&sent[0], back, "{dtype}");
                }
            }
        }
    }

    #[test]
    fn strings_may_hold_any_bytes() {
        let Some(runtime) = library() else { return };
        let mut instance = instance(&runtime, &identity(DataType::Bytes));
        let all: Vec<u8> = (0..=255).collect();
        let elements: [&[u8]; 6] = [b"", &all, b"a\0b\0", b"\xff\xfe", "héllo".as_bytes(), b""];
        let sent = [Tensor::from_strings(shape(&[3, 2]), elements).unwrap()];
        assert_eq!(run(&mut instance, &[&sent]).unwrap(), sent);
    }

    #[test]
    fn no_rows_are_no_rows() {
        let Some(runtime) = library() else { return };
        for dtype in [DataType::Fp32, DataType::Bytes, DataType::Bool] {
            let mut instance = instance(&runtime, &identity(dtype));
            let sent = [Tensor::new(dtype, shape(&[0, 3]), Bytes::new()).unwrap()];
            assert_eq!(run(&mut instance, &[&sent]).unwrap(), sent);
        }
    }

    #[test]
    fn an_aligned_job_is_lent_and_outputs_outlive_the_instance() {
        let Some(runtime) = library() else { return };
        let sum_rows = trap("sum_rows");
        let model = runtime.load(&sum_rows, &ONE_THREAD).unwrap();
        let fill = |value: f32| Tensor::from_vec(shape(&[2, 16]), vec![value; 32]).unwrap();
        let sent = [fill(5.0), fill(3.0)];
        let mut scratch = Vec::new();
        let jobs: [&[Tensor]; 1] = [&sent];
        let lent = bytes_of(&Batch::new(&jobs).input(0), &mut scratch);
        assert_eq!(lent.as_ptr(), sent[0].data().as_ptr());

        let mut instance = model.instance().unwrap();
        let answer = run(&mut instance, &[&sent]).unwrap();
        run(&mut instance, &[&[fill(0.0), fill(0.0)]]).unwrap();
        drop((instance, model, sent));
        assert_eq!((&answer[0], &answer[1]), (&fill(8.0), &fill(2.0)));

        // Outputs follow the signature's order and selection, not the file's.
        let Signature { inputs, outputs } = sum_rows.description.signature.clone();
        let second = artifact(sum_rows.path, inputs, outputs[1..].to_vec());
        let mut only = self::instance(&runtime, &second);
        assert_eq!(run(&mut only, &[&[fill(5.0), fill(3.0)]]).unwrap(), [fill(2.0)]);
    }

    #[test]
    fn two_instances_of_a_model_agree() {
        let Some(runtime) = library() else { return };
        let model = runtime.load(&identity(DataType::Fp32), &LoadOptions { threads: 2, ..ONE_THREAD }).unwrap();
        let sent = [misaligned(DataType::Fp32, 4, 9)];
        for _ in 0..2 {
            assert_eq!(run(&mut model.instance().unwrap(), &[&sent]).unwrap(), sent);
        }
        assert!(!model.instances_share_weights() && model.warnings().is_empty());
    }

    #[test]
    fn a_scalar_input_has_no_dimensions() {
        let Some(runtime) = library() else { return };
        let scalar = trap("scalar");
        let rows = Tensor::from_vec(shape(&[1, 4]), vec![1f32, 2.0, 3.0, 4.0]).unwrap();
        let scale = Tensor::from_vec(Shape::scalar(), vec![2f32]).unwrap();
        let answer = run(&mut instance(&runtime, &scalar), &[&[rows, scale]]).unwrap();
        assert_eq!(answer[0].to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0, 8.0]);
    }

    #[test]
    fn external_data_beside_the_file_is_read() {
        let Some(runtime) = library() else { return };
        let external = trap("external");
        let weights = std::fs::read(external.path.with_file_name("weights.bin")).unwrap();
        // y = x W, and x picks the row 5 of W.
        let mut picks = vec![0f32; 64];
        picks[5] = 1.0;
        let sent = [Tensor::from_vec(shape(&[1, 64]), picks).unwrap()];
        let answer = run(&mut instance(&runtime, &external), &[&sent]).unwrap();
        assert_eq!(answer[0].data()[..], weights[5 * 32..6 * 32]);
    }

    #[test]
    fn what_the_engine_blames_on_the_input_is_an_invalid_argument() {
        let Some(runtime) = library() else { return };
        let mut sentinel = instance(&runtime, &trap("sentinel"));
        let narrow = [Tensor::from_vec(shape(&[1, 7]), vec![0f32; 7]).unwrap()];
        let Err(RunError::InvalidArgument(message)) = run(&mut sentinel, &[&narrow]) else {
            panic!("a narrow row ran")
        };
        assert!(message.contains("Expected: 8"), "{message}");

        let ids = |id: i64| [Tensor::from_vec(shape(&[1, 1]), vec![id]).unwrap()];
        let mut gather = instance(&runtime, &trap("gather"));
        let Err(RunError::InvalidArgument(message)) = run(&mut gather, &[&ids(99)]) else { panic!("99 is no id") };
        assert!(message.contains("idx=99") && !message.contains(".cc") && !message.contains(" /"), "{message}");
        assert_eq!(run(&mut gather, &[&ids(3)]).unwrap()[0].shape().dims(), [1, 1, 4]);
    }

    #[test]
    fn outputs_that_are_no_tensors_are_left_out() {
        let Some(runtime) = library() else { return };
        let model = runtime.load(&trap("zipmap"), &ONE_THREAD).unwrap();
        let [warning] = model.warnings() else { panic!("{:?}", model.warnings()) };
        assert!(warning.contains("is not a tensor"), "{warning}");
        let rows = [Tensor::from_vec(shape(&[2, 4]), vec![0.5f32; 8]).unwrap()];
        let answer = run(&mut model.instance().unwrap(), &[&rows]).unwrap();
        assert_eq!((answer.len(), answer[0].shape().dims()), (1, &[2][..]));
    }

    #[test]
    fn a_signature_the_engine_does_not_share_is_refused() {
        let Some(runtime) = library() else { return };
        let path = identity(DataType::Fp32).path;
        let refusal = |inputs, outputs| {
            let error = runtime.load(&artifact(path.clone(), inputs, outputs), &ONE_THREAD).err().unwrap();
            assert!(matches!(error, LoadError::Engine { .. }), "{error:?}");
            error.to_string()
        };
        let (x, y) = (|| spec("x", DataType::Fp32, &[-1, -1]), || spec("y", DataType::Fp32, &[-1, -1]));
        assert!(refusal(vec![spec("z", DataType::Fp32, &[-1])], vec![y()]).contains("`x` FP32, expected `z` FP32"));
        assert!(refusal(vec![x(), x()], vec![y()]).contains("expected `x` FP32, `x` FP32"));
        assert!(refusal(vec![x()], vec![spec("y", DataType::Int64, &[-1])]).contains("`y` INT64 was expected"));
        assert!(refusal(vec![x()], vec![spec("q", DataType::Fp32, &[-1])]).contains("none of that name"));
        assert!(refusal(vec![x()], vec![]).contains("none of its outputs"));

        let undeclared = TensorSpec { dims: None, ..y() };
        let model = runtime.load(&artifact(path.clone(), vec![x()], vec![undeclared]), &ONE_THREAD).unwrap();
        assert_eq!(model.signature().outputs[0].to_wire(), [-1, -1]);
        assert_eq!(model.signature().outputs[0].dims.as_ref().unwrap()[0], Dim::Free(Some("batch".into())));
    }

    #[test]
    fn every_trap_loads_with_the_signature_its_file_declares() {
        let Some(runtime) = library() else { return };
        let traps = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traps")).unwrap();
        let names = traps.map(Result::unwrap).filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name());
        let mut seen = 0;
        for name in names {
            let artifact = trap(name.to_str().unwrap());
            let model = runtime.load(&artifact, &ONE_THREAD).unwrap_or_else(|error| panic!("{name:?}: {error}"));
            assert_eq!(model.signature().inputs, artifact.description.signature.inputs, "{name:?}");
            assert_eq!(model.output_kinds().len(), model.signature().outputs.len(), "{name:?}");
            seen += 1;
        }
        assert!(seen >= 30, "{seen} traps");
    }

    #[test]
    fn bad_models_are_refused_with_a_reason() {
        let Some(runtime) = library() else { return };
        let dir = tempfile::tempdir().unwrap();
        let whole = std::fs::read(identity(DataType::Fp32).path).unwrap();
        for (name, bytes) in [("garbage", &b"not a model"[..]), ("half", &whole[..whole.len() / 2]), ("empty", b"")] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = runtime.load(&artifact(path, vec![], vec![]), &ONE_THREAD).err().unwrap().to_string();
            assert!(!error.contains(dir.path().to_str().unwrap()) && error.len() > 10, "{name}: {error}");
        }
        let absent = artifact(dir.path().join("absent"), vec![], vec![]);
        assert!(matches!(runtime.load(&absent, &ONE_THREAD).err(), Some(LoadError::BadModel(_))));
    }

    #[test]
    fn a_device_that_is_not_there_is_named_with_what_it_takes() {
        let Some(runtime) = library() else { return };
        let cuda = LoadOptions { device: Device::Cuda(0), threads: 1 };
        match runtime.load(&identity(DataType::Fp32), &cuda) {
            Err(LoadError::Unavailable(message)) => {
                let wanted = ["`cuda:0`", "onnxruntime-gpu", "driver"];
                assert!(wanted.iter().all(|word| message.contains(word)), "{message}");
            }
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("the fetched library is a CPU build, yet it loaded a model for CUDA"),
        }
    }

    #[test]
    fn an_output_that_is_the_input_itself_is_copied() {
        let Some(runtime) = library() else { return };
        let through = build::Model::new().input("x", build::FLOAT, &["4"]).output("x", build::FLOAT, &["4"]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.onnx");
        std::fs::write(&path, through.bytes()).unwrap();
        let x = || vec![spec("x", DataType::Fp32, &[4])];
        let mut instance = instance(&runtime, &artifact(path, x(), x()));
        let sent = [Tensor::from_vec(shape(&[4]), vec![1f32, 2.0, 3.0, 4.0]).unwrap()];
        let address = sent[0].data().as_ptr();
        let answer = run(&mut instance, &[&sent]).unwrap();
        assert_eq!(answer, sent);
        assert_ne!(answer[0].data().as_ptr(), address);
    }

    #[test]
    fn a_big_batch_does_not_hold_its_scratch_memory() {
        let Some(runtime) = library() else { return };
        let rows = SCRATCH_KEPT_BYTES / 8 / 8;
        let jobs: Vec<[Tensor; 1]> =
            (0..3).map(|_| [Tensor::from_vec(shape(&[rows, 8]), vec![1f32; rows * 8]).unwrap()]).collect();
        let jobs: Vec<&[Tensor]> = jobs.iter().map(|job| job.as_slice()).collect();
        let artifact = trap("sentinel");
        let session = OnnxRuntime::session(&runtime.environment, &artifact, &ONE_THREAD).unwrap();
        let signature = Arc::new(artifact.description.signature.clone());
        let mut instance = OnnxRuntimeInstance::new(session, signature).unwrap();
        instance.run(&Batch::new(&jobs)).unwrap();
        assert_eq!(instance.scratch[0].capacity(), 0);
        let small = [Tensor::from_vec(shape(&[1, 8]), vec![1f32; 8]).unwrap()];
        instance.run(&Batch::new(&[&small, &small])).unwrap();
        assert_eq!(instance.scratch[0].len(), 8);
    }

    #[test]
    fn the_library_is_looked_for_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let by = |configured: Option<&str>, environment: Option<&str>| {
            OnnxRuntime::find(configured.map(Path::new), environment.map(PathBuf::from), Some(dir.path()))
        };
        let found = |path: &Path, by| Ok(Found { path: path.into(), by });
        let nothing = by(None, None).unwrap_err();
        assert_eq!(nothing.0, [dir.path().join(LIBRARY), dir.path().join("lib").join(LIBRARY)]);
        assert!(nothing.to_string().contains("make build"), "{nothing}");
        assert_eq!(by(Some("/a"), Some("/b")), found(Path::new("/a"), FoundBy::Configuration));
        assert_eq!(by(None, Some("/b")), found(Path::new("/b"), FoundBy::Environment));
        assert!(by(None, Some("")).is_err());

        let inner = dir.path().join("lib").join(LIBRARY);
        std::fs::create_dir(dir.path().join("lib")).unwrap();
        std::fs::write(&inner, "").unwrap();
        assert_eq!(by(None, None), found(&inner, FoundBy::BesideBinary));
        std::fs::write(dir.path().join(LIBRARY), "").unwrap();
        assert_eq!(by(None, None), found(&dir.path().join(LIBRARY), FoundBy::BesideBinary));
        assert!(OnnxRuntime::find(None, None, None).is_err());
    }

    #[test]
    fn what_is_no_usable_library_is_refused_by_name_and_reason() {
        let dir = tempfile::tempdir().unwrap();
        let refusal = |path: &Path| match check_file(path).and_then(|()| check_library(path)) {
            Err(reason) => reason,
            Ok((_, version)) => panic!("{} was taken for version {version}", path.display()),
        };
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        assert!(refusal(dir.path()).contains("not a file"));
        if cfg!(target_os = "linux") {
            assert!(refusal(&file("text.so", b"GROUP ( libc.so.6 )")).contains("not a shared library"));
            assert!(refusal(&file("empty.so", b"")).contains("not a shared library"));
            let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
            assert!(refusal(&file("half.so", &own[..own.len() / 2])).contains("cut short"));
            assert!(refusal(&file("header.so", &own[..64])).contains("cut short"));
            let mut scrambled = own[..4096].to_vec();
            scrambled[0x20..0x40].fill(0xff);
            assert!(refusal(&file("scrambled.so", &scrambled)).contains("cut short"));
        }
        if let Ok(maps) = std::fs::read_to_string("/proc/self/maps") {
            let mut mapped = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
            let other = mapped.find(|path| path.contains("/libc.so") || path.contains("/libgcc_s")).unwrap();
            assert!(refusal(Path::new(other)).contains("not ONNX Runtime"));
        }
        let absent = OnnxRuntime::open(&dir.path().join("absent.so")).unwrap_err().to_string();
        assert!(absent.contains("`absent.so`") && absent.contains("no such file"), "{absent}");
        assert!(!absent.contains(dir.path().to_str().unwrap()), "{absent}");
    }

    #[test]
    fn one_process_has_one_library() {
        let Some(runtime) = library() else { return };
        assert_eq!(check_version(&runtime.version()), Ok(()));
        let again = library().unwrap();
        assert!(Arc::ptr_eq(&runtime, &again));
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other.so");
        std::fs::write(&other, "").unwrap();
        assert!(OnnxRuntime::open(&other).unwrap_err().to_string().contains("already"));
    }

    #[test]
    fn messages_lose_places_and_lines_and_length() {
        let message = "Non-zero status running Gather node. Name:'/emb/Gather' Status Message: \
                       /src/core/gather.cc:154 \"/tmp/x/y\" 0x7f00 indices\n out of bounds\nstack";
        assert_eq!(
            clean(message),
            "Non-zero status running Gather node. Name:'/emb/Gather' Status Message: indices out of bounds"
        );
        assert_eq!(clean(&"é ".repeat(1000)).chars().count(), MESSAGE_LIMIT);
    }

    #[test]
    fn libraries_older_than_the_interface_are_refused() {
        assert!(["1.17.0", "1.31.1", "1.32.0-dev", "2.0.0"].iter().all(|version| check_version(version).is_ok()));
        assert_eq!(check_version("1.16.3"), Err("it is version 1.16.3, expected 1.17 or newer".into()));
        assert!(["", "x", "1", "0.99.0"].iter().all(|version| check_version(version).is_err()));
    }
}
