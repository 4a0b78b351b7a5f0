//! Plans: one with symbolic dimensions for every shape where tract can make it, else one per shape as requests bring
//! them.
//!
//! Threads: a plan is made outside any lock, so that a shape nobody has met yet holds up only those who bring it.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tract_onnx::prelude::{
    DatumType, Framework, InferenceFact, InferenceModel, InferenceModelExt, IntoRunnable, SpecialOps, TDim, TractError,
    TractResult, TypedRunnableModel,
};
use tract_onnx::tract_core::ops::cast::cast;
use tract_onnx::tract_hir::infer::Factoid;

use super::convert::to_tract;
use super::text_of;
use crate::backend::onnx::Description;
use crate::backend::panics::{answer_panics, panic_text};
use crate::backend::text::first_line;
use crate::tensor::{Dim, Shape, Signature, TensorSpec};

/// Plans for concrete shapes that are kept per version.
pub(super) const KEPT_PLANS: usize = 8;

/// Sizes tried for the free axes behind the first when a model loads without a symbolic plan, before those that the
/// file mentions: some size must work.
const PROBED_SIZES: [usize; 5] = [1, 8, 32, 224, 512];

pub(super) type Plan = Arc<TypedRunnableModel>;

pub(super) enum Plans {
    /// One plan for every shape.
    Symbolic(Plan),
    Concrete(Box<ConcretePlans>),
}

/// Plans made for the shapes that were met last.
pub(super) struct ConcretePlans {
    template: InferenceModel,
    dtypes: Vec<DatumType>,
    pub recent: Recent<Plan>,
}

impl ConcretePlans {
    pub fn plan(&self, shapes: Vec<Shape>) -> Result<Plan, String> {
        self.recent.get(shapes, |shapes| attempt(|| self.make(shapes)))
    }

    fn make(&self, shapes: &[Shape]) -> TractResult<Plan> {
        let mut model = self.template.clone();
        for (position, (shape, dtype)) in shapes.iter().zip(&self.dtypes).enumerate() {
            model.set_input_fact(position, InferenceFact::dt_shape(*dtype, shape.dims()))?;
        }
        runnable(model)
    }
}

/// What was made for the shapes met last: [`KEPT_PLANS`], and those being made.
pub(super) struct Recent<T> {
    /// Most recently used last. A slot is filled once, while this is not locked.
    slots: Mutex<VecDeque<(Vec<Shape>, Slot<T>)>>,
}

type Slot<T> = Arc<OnceLock<Result<T, String>>>;

impl<T: Clone> Recent<T> {
    fn new() -> Recent<T> {
        Recent { slots: Mutex::default() }
    }

    /// Made by whoever asks first; others who ask for the same shapes meanwhile wait for it. A failure takes no place.
    pub fn get(&self, shapes: Vec<Shape>, make: impl FnOnce(&[Shape]) -> Result<T, String>) -> Result<T, String> {
        let slot = self.slot(&shapes);
        if let Some(made) = slot.get() {
            return made.clone();
        }
        let made = slot.get_or_init(|| make(&shapes)).clone();
        let mut slots = self.lock();
        if made.is_err() {
            slots.retain(|(_, kept)| !Arc::ptr_eq(kept, &slot));
        }
        let surplus = slots.len().saturating_sub(KEPT_PLANS);
        slots.drain(..surplus);
        made
    }

    /// The shapes' slot, from now on the most recently used.
    fn slot(&self, shapes: &[Shape]) -> Slot<T> {
        let mut slots = self.lock();
        let met = slots.iter().position(|(met, _)| met == shapes).and_then(|place| slots.remove(place));
        let entry = met.unwrap_or_else(|| (shapes.to_vec(), Slot::default()));
        let slot = Arc::clone(&entry.1);
        slots.push_back(entry);
        slot
    }

    /// A poisoned lock guards a list that is whole between any two statements here.
    fn lock(&self) -> MutexGuard<'_, VecDeque<(Vec<Shape>, Slot<T>)>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.lock().len()
    }
}

pub(super) struct Loaded {
    pub plans: Plans,
    pub signature: Signature,
    pub warnings: Vec<String>,
}

pub(super) fn load(path: &Path, description: &Description) -> Result<Loaded, String> {
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
        recent: Recent::new(),
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
fn symbolic_plan(mut model: InferenceModel, signature: &Signature) -> TractResult<Plan> {
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

fn runnable(model: InferenceModel) -> TractResult<Plan> {
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

/// Runs one step of loading; an error or a panic becomes a text.
fn attempt<T>(step: impl FnOnce() -> TractResult<T>) -> Result<T, String> {
    // Whatever a panicking step was changing is dropped with it.
    match answer_panics(step) {
        Ok(result) => result.map_err(|error| text_of(&error)),
        Err(panic) => Err(first_line(&format!("panicked: {}", panic_text(&*panic)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes(length: usize) -> Vec<Shape> {
        vec![Shape::new([1, length]).unwrap()]
    }

    #[test]
    fn making_one_plan_holds_up_no_other() {
        let recent = Recent::new();
        let outer = recent.get(shapes(1), |_| {
            let inner = recent.get(shapes(2), |_| Ok(2));
            assert_eq!((inner, recent.get(shapes(2), |_| Err("made before".into()))), (Ok(2), Ok(2)));
            Ok(1)
        });
        assert_eq!((outer, recent.len()), (Ok(1), 2));
    }

    #[test]
    fn two_who_ask_for_the_same_shapes_get_one_plan() {
        let recent = Recent::new();
        let (both, made) = (std::sync::Barrier::new(2), std::sync::atomic::AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    both.wait();
                    recent.get(shapes(1), |_| Ok(made.fetch_add(1, std::sync::atomic::Ordering::SeqCst))).unwrap();
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn the_least_recently_used_goes_and_a_failure_takes_no_place() {
        let recent = Recent::new();
        for length in 0..KEPT_PLANS {
            recent.get(shapes(length), |_| Ok(length)).unwrap();
        }
        assert_eq!(recent.get(shapes(99), |_| Err("no such plan".into())), Err("no such plan".into()));
        assert_eq!(recent.get(shapes(0), |_| Err("used".into())), Ok(0));
        assert_eq!(recent.get(shapes(99), |_| Ok(99)), Ok(99));
        assert_eq!((recent.len(), recent.get(shapes(0), |_| Err("kept".into()))), (KEPT_PLANS, Ok(0)));
        assert_eq!(recent.get(shapes(1), |_| Ok(100)), Ok(100), "the least recently used had to go");
    }
}
