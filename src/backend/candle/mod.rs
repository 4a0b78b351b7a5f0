//! candle: safetensors models on the CPU, computed in FP32 whatever the weights are stored in.
//!
//! Owns the weights in memory and the arithmetic of layers and encoders; what they are and whether the files fit is known
//! from [`safetensors`](super::safetensors). Nothing else in the crate names candle, or the libraries it computes with.
//!
//! Threads: a network is immutable and shared by all instances of a version. A run computes in a pool of as many threads
//! as the version was loaded for, [lent](lent) for the run; the caller's thread waits.

mod encoder;
mod lent;
mod ops;
mod product;
mod sequential;
mod tensors;

use std::sync::Arc;

use candle_core::Tensor as Computed;

use super::safetensors::Architecture;
use super::safetensors::encoder::{ATTENTION_MASK, Encoder, INPUT_IDS, TOKEN_TYPE_IDS};
use super::safetensors::layers::{Kind, Sequential};
use super::text::first_line;
use super::{Artifact, Backend, Batch, BatchInput, Device, Instance, LoadError, LoadOptions, Model, RunError};
use crate::tensor::{DataType, OutputKind, Shape, Signature, Tensor, TensorSpec};
use encoder::{EncoderNetwork, Tokens};
use lent::Pools;
use sequential::Network;
use tensors::Tensors;

const NAME: &str = "candle";

/// As pinned in `Cargo.toml`; candle does not tell its own version.
const VERSION: &str = "0.11.1";

/// The engine. Clones share the pools of threads.
#[derive(Clone, Default)]
pub struct Candle {
    pools: Pools,
}

impl Backend for Candle {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn load(&self, artifact: &Artifact, options: &LoadOptions) -> Result<Arc<dyn Model>, LoadError> {
        if options.device != Device::Cpu {
            let device = options.device;
            return Err(LoadError::Unavailable(format!("candle runs on the CPU only, found device {device}")));
        }
        let super::Description::Safetensors(description) = &*artifact.description else {
            let message = "found an ONNX file, expected a safetensors model: use onnxruntime or tract";
            return Err(refused(message));
        };
        let tensors = Tensors::open(&artifact.path, &description.places)?;
        let network = match &description.architecture {
            Architecture::Sequential(declared) => {
                Computing::Sequential { network: Network::load(declared, &tensors)?, declared: declared.clone() }
            }
            Architecture::Encoder(declared) => {
                let network = Box::new(EncoderNetwork::load(declared, &tensors)?);
                Computing::Encoder { network, declared: declared.clone() }
            }
        };
        let model = CandleModel {
            shared: Arc::new(Shared { network, signature: description.signature.clone() }),
            output_kinds: description.output_kinds.clone(),
            warnings: description.warnings.clone(),
            threads: options.threads,
            pools: self.pools.clone(),
        };
        Ok(Arc::new(model))
    }
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
}

enum Computing {
    Sequential { network: Network, declared: Sequential },
    Encoder { network: Box<EncoderNetwork>, declared: Encoder },
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

    fn instances_share_weights(&self) -> bool {
        true
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
            Computing::Sequential { network, declared } => run_sequential(network, declared, batch),
            Computing::Encoder { network, declared } => run_encoder(network, declared, batch, &shared.signature),
        };
        self.pools
            .run(self.threads, run)
            .unwrap_or_else(|error| Err(RunError::Failed(format!("candle's threads cannot be started: {error}"))))
    }
}

fn run_sequential(network: &Network, declared: &Sequential, batch: &Batch) -> Result<Vec<Tensor>, RunError> {
    let input = batch.input(0);
    let name = &declared.input.name;
    // Free extents behind the rows may be too small for a kernel: the shapes are gone through before anything is computed.
    let shape = declared.output_shape(&input.shape()).map_err(|reason| {
        RunError::InvalidArgument(format!("input \"{name}\" of shape {}: {reason}", input.shape()))
    })?;
    if shape.elements() == 0 {
        return Ok(vec![empty(shape)?]);
    }
    let embedded = declared.layers.iter().find_map(|layer| match layer.kind {
        Kind::Embedding { rows, .. } => Some(rows),
        _ => None,
    });
    let dims = input.shape().dims().to_vec();
    let x = match embedded {
        Some(rows) => Computed::from_vec(indices(&input, name, rows)?, dims, &candle_core::Device::Cpu),
        None => Computed::from_vec(elements::<f32>(&input), dims, &candle_core::Device::Cpu),
    };
    let y = x.and_then(|x| network.forward(x)).map_err(run_error)?;
    Ok(vec![export(&y)?])
}

fn run_encoder(
    network: &EncoderNetwork,
    declared: &Encoder,
    batch: &Batch,
    signature: &Signature,
) -> Result<Vec<Tensor>, RunError> {
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
    if rows == 0 {
        return signature.outputs.iter().map(|spec| empty(without_rows(spec, length)?)).collect();
    }
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
    network.forward(&tokens).map_err(run_error)?.iter().map(export).collect()
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

/// One copy into memory that the answer owns.
fn export(tensor: &Computed) -> Result<Tensor, RunError> {
    let shape = Shape::new(tensor.dims()).map_err(|error| RunError::Failed(error.to_string()))?;
    let elements = tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>()).map_err(run_error)?;
    Tensor::from_vec(shape, elements).map_err(|error| RunError::Failed(error.to_string()))
}

/// The answer to no rows.
fn empty(shape: Shape) -> Result<Tensor, RunError> {
    Tensor::from_vec(shape, Vec::<f32>::new()).map_err(|error| RunError::Failed(error.to_string()))
}

/// An output's shape for no rows of that many tokens.
fn without_rows(spec: &TensorSpec, length: usize) -> Result<Shape, RunError> {
    let extent = |(axis, wire): (usize, i64)| if axis == 0 { 0 } else { usize::try_from(wire).unwrap_or(length) };
    let dims: Vec<usize> = spec.to_wire().into_iter().enumerate().map(extent).collect();
    Shape::new(dims).map_err(|error| RunError::Failed(error.to_string()))
}

/// Shapes and indices were checked before the run: what candle says is the server's or the model's.
fn run_error(error: candle_core::Error) -> RunError {
    RunError::Failed(text_of(&error))
}

#[cfg(test)]
mod tests;
