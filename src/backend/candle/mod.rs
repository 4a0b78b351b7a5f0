//! candle: safetensors models on the CPU, and on NVIDIA GPUs where the cargo feature `cuda` is built in. Computed in FP32
//! whatever the weights are stored in.
//!
//! Owns the weights in memory and the arithmetic of layers and encoders; what they are and whether the files fit is known
//! from [`safetensors`](super::safetensors). Nothing else in the crate names candle, or the libraries it computes with.
//!
//! Invariant: no tensor on the way to an answer, nor the answer, has more elements than [`MAX_ELEMENTS`]: rows are computed
//! in slices that are small enough, and a request that cannot be is refused before anything is computed.
//!
//! Threads: a network is immutable and shared by all instances of a version. A run computes in a pool of as many threads
//! as the version was loaded for, [lent](lent) for the run; the caller's thread waits. On a GPU the caller's thread
//! launches the work, and runs of a version take turns: candle gives every thread a stream of its own, but all of them one
//! cuBLAS handle with its workspace. What a thread has begun is finished before another one begins.

mod composed;
mod encoder;
mod lent;
mod ops;
mod product;
mod sequential;
mod tensors;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device as Place, Tensor as Computed};

use super::safetensors::Architecture;
use super::safetensors::encoder::{ATTENTION_MASK, Encoder, INPUT_IDS, TOKEN_TYPE_IDS};
use super::safetensors::layers::{Kind, Sequential};
use super::text::first_line;
use super::{Artifact, Backend, Batch, BatchInput, Device, Instance, LoadError, LoadOptions, Model, RunError, gpus};
use crate::tensor::{DataType, OutputKind, Shape, Signature, Tensor, TensorSpec};
use encoder::{EncoderNetwork, Tokens};
use lent::Pools;
use sequential::Network;
use tensors::Tensors;

const NAME: &str = "candle";

/// As pinned in `Cargo.toml`; candle does not tell its own version.
const VERSION: &str = "0.11.1";

/// How many rows, in the kernel's steps of 4 to 12, a product must have for the weights to be rearranged for it first:
/// they lie as it wants them, and to rearrange them pays for long products only.
const PACKING_THRESHOLD: usize = 64;

/// The most elements of one tensor, 1 GiB of FP32. A handful of the size may be alive at a time in each instance.
const MAX_ELEMENTS: usize = 1 << 28;

/// The engine. Clones share the pools of threads.
#[derive(Clone)]
pub struct Candle {
    pools: Pools,
    max_elements: usize,
}

impl Default for Candle {
    fn default() -> Candle {
        // Process-wide, and the same for all.
        gemm::set_lhs_packing_threshold_single_thread(PACKING_THRESHOLD);
        gemm::set_lhs_packing_threshold_multi_thread(PACKING_THRESHOLD);
        Candle { pools: Pools::default(), max_elements: MAX_ELEMENTS }
    }
}

impl Backend for Candle {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn load(&self, artifact: &Artifact, options: &LoadOptions) -> Result<Arc<dyn Model>, LoadError> {
        let super::Description::Safetensors(description) = &*artifact.description else {
            let message = "found an ONNX file, expected a safetensors model: use onnxruntime or tract";
            return Err(refused(message));
        };
        let place = place(options.device)?;
        let tensors = Tensors::open(&artifact.path, &description.places, &place)?;
        let network = match &description.architecture {
            Architecture::Sequential(declared) => {
                let coupled = description.couples_rows.is_some();
                let network = Network::load(declared, &tensors)?;
                Computing::Sequential { network, declared: declared.clone(), coupled }
            }
            Architecture::Encoder(declared) => {
                let network = Box::new(EncoderNetwork::load(declared, &tensors)?);
                Computing::Encoder { network, declared: declared.clone() }
            }
        };
        // The weights go there in this thread's stream; those that run wait for their own.
        place.synchronize().map_err(|error| unusable(options.device, &text_of(&error)))?;
        let (signature, max_elements) = (description.signature.clone(), self.max_elements);
        let model = CandleModel {
            shared: Arc::new(Shared { network, signature, max_elements, place, turn: Mutex::new(()) }),
            output_kinds: description.output_kinds.clone(),
            warnings: description.warnings.clone(),
            threads: options.threads,
            pools: self.pools.clone(),
        };
        Ok(Arc::new(model))
    }

    fn instances_share_weights(&self, _: &Artifact, _: &LoadOptions) -> bool {
        true
    }

    fn spreads_runs(&self) -> bool {
        true
    }
}

#[cfg(feature = "cuda")]
fn place(device: Device) -> Result<Place, LoadError> {
    match device {
        Device::Cpu => Ok(Place::Cpu),
        Device::Cuda(id) => Place::new_cuda(id as usize).map_err(|error| unusable(device, &text_of(&error))),
    }
}

#[cfg(not(feature = "cuda"))]
fn place(device: Device) -> Result<Place, LoadError> {
    match device {
        Device::Cpu => Ok(Place::Cpu),
        Device::Cuda(_) => Err(LoadError::Unavailable(format!(
            "device `{device}` cannot be used: this binary was built without the cargo feature `cuda`, and computes \
             safetensors models on the CPU only; build it with `cargo build --release --features cuda`, which takes \
             CUDA's toolkit and makes a binary that starts only where the NVIDIA driver is; or use `device = \"cpu\"`, or \
             `device_fallback = \"cpu\"`"
        ))),
    }
}

fn unusable(device: Device, reason: &str) -> LoadError {
    let there = gpus::told(&gpus::count());
    LoadError::Unavailable(format!(
        "device `{device}` cannot be used: {reason}; {there}; use another one, `device = \"cpu\"`, or \
         `device_fallback = \"cpu\"`"
    ))
}

fn refused(message: impl Into<String>) -> LoadError {
    LoadError::Engine { engine: NAME, message: message.into() }
}

/// The first line of candle's own words; a backtrace may follow it.
fn text_of(error: &candle_core::Error) -> String {
    first_line(&error.to_string())
}

struct CandleModel {
    shared: Arc<Shared>,
    output_kinds: Vec<OutputKind>,
    warnings: Vec<String>,
    threads: usize,
    pools: Pools,
}

/// What all instances of a version compute with.
struct Shared {
    network: Computing,
    signature: Signature,
    max_elements: usize,
    place: Place,
    /// Held for a run on a GPU.
    turn: Mutex<()>,
}

enum Computing {
    /// Where rows are coupled, all are computed at once.
    Sequential {
        network: Network,
        declared: Sequential,
        coupled: bool,
    },
    Encoder {
        network: Box<EncoderNetwork>,
        declared: Encoder,
    },
}

impl Model for CandleModel {
    fn signature(&self) -> &Signature {
        &self.shared.signature
    }

    fn output_kinds(&self) -> &[OutputKind] {
        &self.output_kinds
    }

    fn instance(&self) -> Result<Box<dyn Instance>, LoadError> {
        let (shared, pools) = (Arc::clone(&self.shared), self.pools.clone());
        Ok(Box::new(CandleInstance { shared, pools, threads: self.threads }))
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

struct CandleInstance {
    shared: Arc<Shared>,
    pools: Pools,
    threads: usize,
}

impl Instance for CandleInstance {
    fn run(&mut self, batch: &Batch) -> Result<Vec<Tensor>, RunError> {
        let shared = &self.shared;
        let run = || match &shared.network {
            Computing::Sequential { network, declared, coupled } => {
                run_sequential(network, declared, *coupled, batch, shared)
            }
            Computing::Encoder { network, declared } => run_encoder(network, declared, batch, shared),
        };
        if !shared.place.is_cpu() {
            let _turn = shared.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let outputs = run();
            // After a failure, too, something may still be running.
            let finished = shared.place.synchronize().map_err(run_error);
            return outputs.and_then(|outputs| finished.map(|()| outputs));
        }
        self.pools
            .run(self.threads, run)
            .unwrap_or_else(|error| Err(RunError::Failed(format!("candle's threads cannot be started: {error}"))))
    }
}

fn run_sequential(
    network: &Network,
    declared: &Sequential,
    coupled: bool,
    batch: &Batch,
    shared: &Shared,
) -> Result<Vec<Tensor>, RunError> {
    let Shared { max_elements, place, .. } = shared;
    let max_elements = *max_elements;
    let input = batch.input(0);
    let name = &declared.input.name;
    let blamed =
        |reason: String| RunError::InvalidArgument(format!("input \"{name}\" of shape {}: {reason}", input.shape()));
    // Free extents behind the rows may be too small for a kernel: the shapes are gone through before anything is computed.
    let shape = declared.output_shape(&input.shape()).map_err(blamed)?;
    let rows = input.shape().rows().unwrap_or(1);
    let least = if coupled { rows.max(1) } else { 1 };
    let slice = input.shape().with_rows(least).map_err(|error| blamed(error.to_string()))?;
    let largest = declared.most_elements(&slice).map_err(blamed)?;
    let slices = slices_of(least, largest, max_elements).map_err(blamed)?;
    let joined = Joined::new(vec![shape], max_elements)?;
    let embedded = declared.layers.iter().find_map(|layer| match layer.kind {
        Kind::Embedding { rows, .. } => Some(rows),
        _ => None,
    });
    let dims = input.shape().dims().to_vec();
    let x = match embedded {
        Some(rows) => Computed::from_vec(indices(&input, name, rows)?, dims, place),
        None => Computed::from_vec(elements::<f32>(&input), dims, place),
    };
    let x = x.map_err(run_error)?;
    joined.compute(rows, slices, |slice| Ok(vec![network.forward(x.narrow(0, slice.start, slice.len())?)?]))
}

fn run_encoder(
    network: &EncoderNetwork,
    declared: &Encoder,
    batch: &Batch,
    shared: &Shared,
) -> Result<Vec<Tensor>, RunError> {
    let signature = &shared.signature;
    let shape = batch.input(0).shape();
    let &[rows, length] = shape.dims() else {
        return Err(RunError::Failed(format!("input {INPUT_IDS:?} of shape {shape}, expected [rows, tokens]")));
    };
    if let Some((spec, other)) = signature.inputs.iter().zip(batch.inputs()).find(|(_, other)| other.shape() != shape) {
        return Err(RunError::InvalidArgument(format!(
            "input {:?} has shape {}, expected {shape} as input {INPUT_IDS:?} has",
            spec.name,
            other.shape()
        )));
    }
    if length == 0 || length > declared.positions {
        let most = declared.tokens;
        let message = format!("input {INPUT_IDS:?} has {length} tokens in a row, expected 1 to {most}");
        return Err(RunError::InvalidArgument(message));
    }
    let slices = slices_of(1, declared.row_elements(length), shared.max_elements).map_err(|reason| {
        RunError::InvalidArgument(format!("input {INPUT_IDS:?} has {length} tokens in a row: {reason}"))
    })?;
    let shapes = signature.outputs.iter().map(|spec| output_shape(spec, rows, length)).collect::<Result<_, _>>()?;
    let joined = Joined::new(shapes, shared.max_elements)?;
    let tokens = Tokens {
        rows,
        length,
        ids: indices(&batch.input(0), INPUT_IDS, declared.vocabulary)?,
        mask: indices(&batch.input(1), ATTENTION_MASK, 2)?,
        types: match declared.token_type_input {
            true => Some(indices(&batch.input(2), TOKEN_TYPE_IDS, declared.token_types)?),
            false => None,
        },
    };
    let most = encoder::positions(declared, &tokens).into_iter().max().unwrap_or(0);
    if most as usize >= declared.positions {
        let (found, most) = (length, declared.tokens);
        let message = format!("input {INPUT_IDS:?} has {found} tokens in a row, expected 1 to {most}");
        return Err(RunError::InvalidArgument(message));
    }
    joined.compute(rows, slices, |slice| network.forward(&tokens.slice(slice)))
}

/// How many rows are computed at once, where `least` of them need a tensor of `largest` elements.
fn slices_of(least: usize, largest: usize, max_elements: usize) -> Result<usize, String> {
    match max_elements / largest.max(1) {
        0 if least == 1 => Err(format!("a row needs a tensor of {largest} elements, expected at most {max_elements}")),
        0 => Err(format!(
            "{least} rows, which this model couples, need a tensor of {largest} elements, expected at most {max_elements}"
        )),
        times => Ok(least.saturating_mul(times)),
    }
}

/// The outputs of all rows, filled slice by slice.
struct Joined {
    shapes: Vec<Shape>,
    outputs: Vec<Vec<f32>>,
}

impl Joined {
    fn new(shapes: Vec<Shape>, max_elements: usize) -> Result<Joined, RunError> {
        if let Some(shape) = shapes.iter().find(|shape| shape.elements() > max_elements) {
            let elements = shape.elements();
            return Err(RunError::InvalidArgument(format!(
                "the answer has an output of shape {shape}, {elements} elements, expected at most {max_elements}"
            )));
        }
        let outputs = shapes.iter().map(|shape| Vec::with_capacity(shape.elements())).collect();
        Ok(Joined { shapes, outputs })
    }

    /// An answer without elements needs nothing computed.
    fn compute(
        mut self,
        rows: usize,
        at_once: usize,
        mut compute: impl FnMut(Range<usize>) -> candle_core::Result<Vec<Computed>>,
    ) -> Result<Vec<Tensor>, RunError> {
        let rows = if self.shapes.iter().all(|shape| shape.elements() == 0) { 0 } else { rows };
        for from in (0..rows).step_by(at_once) {
            let computed = compute(from..rows.min(from.saturating_add(at_once))).map_err(run_error)?;
            for (output, computed) in self.outputs.iter_mut().zip(&computed) {
                append(output, computed).map_err(run_error)?;
            }
        }
        let tensors = self.shapes.into_iter().zip(self.outputs).map(|(shape, output)| Tensor::from_vec(shape, output));
        tensors.collect::<Result<_, _>>().map_err(|error| RunError::Failed(error.to_string()))
    }
}

/// One copy into memory that the answer owns; from a GPU by way of candle's own.
fn append(output: &mut Vec<f32>, computed: &Computed) -> candle_core::Result<()> {
    let computed = computed.contiguous()?.to_device(&Place::Cpu)?;
    let (storage, layout) = computed.storage_and_layout();
    output.extend_from_slice(ops::held(&storage, layout)?);
    Ok(())
}

/// The joined elements, copied once into memory of candle's own.
fn elements<T: bytemuck::Pod + bytemuck::Zeroable>(input: &BatchInput) -> Vec<T> {
    let mut elements = vec![T::zeroed(); input.byte_length() / size_of::<T>()];
    input.gather_into(bytemuck::cast_slice_mut(&mut elements));
    elements
}

/// The joined elements of an integer input, each from 0 to `count` - 1.
fn indices(input: &BatchInput, name: &str, count: usize) -> Result<Vec<u32>, RunError> {
    let wide: Vec<i64> = match input.dtype() {
        DataType::Int64 => elements(input),
        DataType::Int32 => elements::<i32>(input).into_iter().map(i64::from).collect(),
        other => return Err(RunError::Failed(format!("input {name:?} is {other}, expected INT64 or INT32"))),
    };
    let index = |value: i64| u32::try_from(value).ok().filter(|index| (*index as usize) < count);
    let checked = |value: i64| {
        let last = count.saturating_sub(1);
        index(value)
            .ok_or_else(|| RunError::InvalidArgument(format!("input {name:?} holds {value}, expected 0 to {last}")))
    };
    wide.into_iter().map(checked).collect()
}

/// An output's shape for rows of that many tokens.
fn output_shape(spec: &TensorSpec, rows: usize, length: usize) -> Result<Shape, RunError> {
    let extent = |(axis, wire): (usize, i64)| if axis == 0 { rows } else { usize::try_from(wire).unwrap_or(length) };
    let dims: Vec<usize> = spec.to_wire().into_iter().enumerate().map(extent).collect();
    Shape::new(dims).map_err(|error| RunError::Failed(error.to_string()))
}

/// Shapes and indices were checked before the run: what candle says is the server's or the model's.
fn run_error(error: candle_core::Error) -> RunError {
    RunError::Failed(text_of(&error))
}

#[cfg(test)]
mod tests;
