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

mod convert;
mod plans;

use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;

use tract_onnx::prelude::{TValue, TVec, TractError, TypedRunnableModel};

use super::onnx::Description;
use super::panics::{answer_panics, panic_text};
use super::text::first_line;
use super::{Artifact, Backend, Batch, Device, Instance, LoadError, LoadOptions, Model, RunError};
use crate::tensor::{OutputKind, Signature, Tensor, TensorSpec};
use convert::{cut, export, import, padded_shape, to_tract};
use plans::{Plans, load};

const NAME: &str = "tract";

/// As pinned in `Cargo.toml`; tract does not tell its own version.
const VERSION: &str = "0.23.9";

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
                "device `{device}` cannot be used: tract runs on the CPU only; use `backend = \"onnxruntime\"`, or \
                 `device = \"cpu\"`"
            )));
        }
        let description = artifact.onnx(NAME)?;
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

    fn instances_share_weights(&self, _: &Artifact, _: &LoadOptions) -> bool {
        true
    }

    fn spreads_runs(&self) -> bool {
        false
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

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// What all instances of a version run.
struct Shared {
    inputs: Vec<TensorSpec>,
    plans: Plans,
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

/// The whole chain of causes in one line.
fn text_of(error: &TractError) -> String {
    first_line(&format!("{error:#}"))
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
    match answer_panics(|| plan.run(inputs)) {
        Ok(result) => result.map_err(run_error),
        Err(panic) => match panic_text(&*panic) {
            text if blames_input(text) => {
                Err(RunError::InvalidArgument(first_line(&format!("an index or a size is out of range: {text}"))))
            }
            _ => resume_unwind(panic),
        },
    }
}

#[cfg(test)]
mod tests;
