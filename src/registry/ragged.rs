//! Whether requests of different lengths may share a version's batches: by what `model.toml` declares, or what the
//! signature suggests, and then by asking the model.
//!
//! Suggested are token models: integer inputs of [rows, length], one of them a mask. The model is given rows of several
//! lengths, each alone and then together, filled up to the longest. Their answers, cut back, must be the same; along
//! which axes answers are cut is learnt from those given alone. What the model refuses, or what takes too long, leaves
//! the question open: then only equal lengths share a batch.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::invent::{self, Random, Recipe};
use super::probe::Probe;
use super::selftest::{RANGES, Tolerance, symbol};
use crate::backend::Device;
use crate::tensor::{DataType, Dim, Ragged, SequenceAxis, Shape, Signature, Tensor, TensorSpec};

/// What asking one version may take.
const BUDGET: Duration = Duration::from_secs(2);
const SEED: u64 = 0x7261_6767_6564;

/// What `model.toml` says under `batching.ragged`.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum RaggedConfig {
    /// Where the signature suggests it and the model proves it.
    #[default]
    Auto,
    Off,
    Declared {
        /// Of every input named below.
        axis: usize,
        /// By input: the number that shorter rows are filled up with.
        fill: BTreeMap<String, f64>,
    },
}

/// How requests of different lengths share batches, if they do, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaggedDecision {
    pub plan: Option<Arc<Ragged>>,
    pub reason: String,
}

impl RaggedDecision {
    fn no(reason: impl Into<String>) -> RaggedDecision {
        RaggedDecision { plan: None, reason: reason.into() }
    }
}

/// What holds on every device: all must cut and fill alike.
pub fn agreed(decided: Vec<(Device, RaggedDecision)>) -> RaggedDecision {
    let Some((first, decision)) = decided.first() else { return RaggedDecision::no("there is no device") };
    match decided.iter().find(|(_, other)| other.plan != decision.plan) {
        None => decision.clone(),
        Some((other, differing)) => {
            RaggedDecision::no(format!("on {first}: {}, on {other}: {}", decision.reason, differing.reason))
        }
    }
}

/// An error where the configuration declares what the signature does not have, or what changes the answers.
pub fn decide(
    config: &RaggedConfig,
    batched: bool,
    signature: &Signature,
    probe: &mut Probe,
) -> Result<RaggedDecision, String> {
    let inputs = match config {
        RaggedConfig::Off => return Ok(RaggedDecision::no("switched off in model.toml")),
        RaggedConfig::Declared { axis, fill } => declared(signature, *axis, fill)?,
        RaggedConfig::Auto => match suggested(signature) {
            Ok(inputs) => inputs,
            Err(why) => return Ok(RaggedDecision::no(why)),
        },
    };
    let by_hand = matches!(config, RaggedConfig::Declared { .. });
    match (batched, by_hand) {
        (true, _) => {}
        (false, false) => return Ok(RaggedDecision::no("the version is not batched")),
        (false, true) => return Err("model.toml declares `batching.ragged`, but the version is not batched".into()),
    }
    match ask(signature, &inputs, probe) {
        Ok(outputs) => Ok(RaggedDecision {
            plan: Some(Arc::new(Ragged { inputs, outputs, even: by_hand })),
            reason: "self-test: every row's answer is the same alone and filled up to a longer one's length".into(),
        }),
        Err(Stop::Changed(why)) if by_hand => {
            Err(format!("model.toml declares `batching.ragged`, but filling rows up changes their answers: {why}"))
        }
        Err(Stop::Open(why)) if by_hand => {
            Err(format!("model.toml declares `batching.ragged`, but it cannot be proved: {why}"))
        }
        Err(Stop::Changed(why)) => Ok(RaggedDecision::no(format!("self-test: {why}"))),
        Err(Stop::Open(why)) => Ok(RaggedDecision::no(format!("self-test inconclusive: {why}"))),
    }
}

type Sequences = Vec<Option<SequenceAxis>>;

/// Integer inputs of [rows, length], of which one is a mask, and no other input of any length. Lengths of different
/// names are those of different sequences (a question's and an answer's).
fn suggested(signature: &Signature) -> Result<Sequences, String> {
    let is_free = |spec: &TensorSpec| spec.dims.as_ref().is_none_or(|dims| dims.iter().skip(1).any(Dim::is_free));
    if !signature.inputs.iter().any(is_free) {
        return Err("rows have one length".into());
    }
    if !signature.inputs.iter().any(is_mask) {
        return Err("no input is a mask, by its name".into());
    }
    let mut named = signature.inputs.iter().filter_map(|spec| Some((spec, length_symbol(spec.dims.as_ref()?)?)));
    if let Some((first, symbol)) = named.next()
        && let Some((other, differs)) = named.find(|(_, other)| *other != symbol)
    {
        return Err(format!(
            "inputs `{}` and `{}` have lengths of different names, `{symbol}` and `{differs}`",
            first.name, other.name
        ));
    }
    let is_token = |spec: &TensorSpec| matches!(spec.dtype, DataType::Int32 | DataType::Int64) || is_mask(spec);
    let sequence = |spec: &TensorSpec| match (&spec.dims, element(spec.dtype, 0.0)) {
        _ if !is_free(spec) => Ok(None),
        (Some(dims), Some(fill)) if dims.len() == 2 && is_token(spec) => Ok(Some(SequenceAxis { axis: 1, fill })),
        _ => Err(format!("input `{}` is not [rows, length] of integers", spec.name)),
    };
    signature.inputs.iter().map(sequence).collect()
}

/// The name of the second axis, where that is free and named.
fn length_symbol(dims: &[Dim]) -> Option<&str> {
    symbol(dims.get(1)?)
}

fn is_mask(spec: &TensorSpec) -> bool {
    spec.name.contains("mask")
}

fn declared(signature: &Signature, axis: usize, fill: &BTreeMap<String, f64>) -> Result<Sequences, String> {
    let place = |name: &str| format!("model.toml: `batching.ragged.fill.{name}`");
    if let Some(unknown) = fill.keys().find(|name| signature.input(name).is_none()) {
        return Err(format!("{}: the model has no such input", place(unknown)));
    }
    let sequence = |spec: &TensorSpec| {
        let Some(number) = fill.get(&*spec.name) else { return Ok(None) };
        let free = spec.dims.as_ref().and_then(|dims| dims.get(axis)).is_some_and(Dim::is_free);
        if axis == 0 || !free {
            return Err(format!("{}: axis {axis} of the input is not one of any length", place(&spec.name)));
        }
        match element(spec.dtype, *number) {
            Some(fill) => Ok(Some(SequenceAxis { axis, fill })),
            None => Err(format!("{}: {number} does not fit, expected {}", place(&spec.name), spec.dtype)),
        }
    };
    signature.inputs.iter().map(sequence).collect()
}

/// A number as one element of the binary layout. `None` where it does not fit.
fn element(dtype: DataType, number: f64) -> Option<Box<[u8]>> {
    let shape = Shape::scalar();
    let text = if number.fract() == 0.0 { format!("[{number:.0}]") } else { format!("[{number}]") };
    let text = if dtype == DataType::Bool { format!("[{}]", number != 0.0) } else { text };
    let data = crate::tensor::json::Data::new(dtype, shape, &text).ok()?;
    let tensor = data.read(crate::tensor::json::NotFinite::Refused).ok()?;
    (dtype != DataType::Bytes).then(|| tensor.data()[..].into())
}

enum Stop {
    Changed(String),
    Open(String),
}

/// Along which axes each output is cut.
fn ask(signature: &Signature, inputs: &Sequences, probe: &mut Probe) -> Result<Vec<Vec<usize>>, Stop> {
    let end = probe.spent() + BUDGET;
    let tolerance = Tolerance::of(signature);
    let mut open = "no invented rows have different answers".to_string();
    for extent in invent::extents(signature).iter().filter(|extent| **extent >= 4) {
        for (below, scale) in RANGES {
            if probe.spent() > end {
                return Err(Stop::Open(format!("not done within {} s", BUDGET.as_secs())));
            }
            match attempt(signature, inputs, Recipe { extent: *extent, below, scale }, probe, tolerance) {
                Ok(Some(outputs)) => return Ok(outputs),
                Ok(None) => {}
                Err(Stop::Open(why)) => {
                    open = why;
                    break;
                }
                Err(changed) => return Err(changed),
            }
        }
    }
    Err(Stop::Open(open))
}

/// `None` where the answers don't tell rows apart: then that they agree means nothing.
fn attempt(
    signature: &Signature,
    inputs: &Sequences,
    recipe: Recipe,
    probe: &mut Probe,
    tolerance: Tolerance,
) -> Result<Option<Vec<Vec<usize>>>, Stop> {
    let mut random = Random(SEED);
    // Two of one length, to tell rows apart; the longest in the middle.
    let lengths = [recipe.extent / 2, recipe.extent, recipe.extent - 1, recipe.extent / 2];
    let mut rows = Vec::with_capacity(lengths.len());
    for (number, extent) in (0..).zip(lengths) {
        let row = invent::row(signature, Recipe { extent, ..recipe }, number, &mut random).map_err(Stop::Open)?;
        rows.push(unmasked(signature, row)?);
    }
    let refuses = |why: String| Stop::Open(format!("the model refuses invented inputs: {why}"));
    let alone = rows.iter().map(|row| probe.run(&[row]).map_err(refuses)).collect::<Result<Vec<_>, _>>()?;
    let outputs = along(signature, &alone, lengths)?;
    let ragged = Ragged { inputs: inputs.clone(), outputs, even: true };
    let jobs: Vec<&[Tensor]> = rows.iter().map(Vec::as_slice).collect();
    let together = probe
        .run_padded(&jobs, &ragged)
        .map_err(|why| Stop::Changed(format!("the model refuses rows that are filled up: {why}")))?;
    for (position, (spec, output)) in signature.outputs.iter().zip(&together).enumerate() {
        let changed = |what: String| Stop::Changed(format!("output `{}` {what}", spec.name));
        let parts = output.split_rows(&[1; 4]).ok_or_else(|| changed(format!("has shape {}", output.shape())))?;
        for ((part, alone), length) in parts.iter().zip(&alone).zip(lengths) {
            let cut = ragged.cut(position, part, length);
            let cut = cut.ok_or_else(|| changed(format!("has shape {} for length {length}", part.shape())))?;
            tolerance.same(&alone[position], &cut).map_err(|difference| {
                changed(format!("is not the same for a row of {length} filled up to {}: {difference}", recipe.extent))
            })?;
        }
    }
    let told_apart = alone[0].iter().zip(&alone[3]).any(|(one, other)| tolerance.tells_apart(one, other));
    Ok(told_apart.then_some(ragged.outputs))
}

/// A row whose masks hide nothing: invented ones hide at random.
fn unmasked(signature: &Signature, row: Vec<Tensor>) -> Result<Vec<Tensor>, Stop> {
    let shown = |(spec, tensor): (&TensorSpec, Tensor)| {
        let one = element(spec.dtype, 1.0).filter(|_| is_mask(spec));
        let Some(one) = one else { return Ok(tensor) };
        let ones = one.repeat(tensor.shape().elements());
        Tensor::new(spec.dtype, tensor.shape().clone(), ones.into()).map_err(|error| Stop::Open(error.to_string()))
    };
    signature.inputs.iter().zip(row).map(shown).collect()
}

/// The axes, but the leading one, that were as long as the row for rows of every length; all others must not change.
fn along(signature: &Signature, alone: &[Vec<Tensor>], lengths: [usize; 4]) -> Result<Vec<Vec<usize>>, Stop> {
    let axes = |(position, spec): (usize, &TensorSpec)| {
        let dims = |row: usize| alone[row][position].shape().dims();
        let rank = dims(0).len();
        let mut along = Vec::new();
        for axis in 1..rank {
            let extents: Vec<Option<usize>> = (0..alone.len()).map(|row| dims(row).get(axis).copied()).collect();
            if extents.iter().zip(lengths).all(|(extent, length)| *extent == Some(length)) {
                along.push(axis);
            } else if extents.iter().any(|extent| *extent != extents[0]) {
                let name = &spec.name;
                return Err(Stop::Changed(format!("axis {axis} of output `{name}` is not as long as the row")));
            }
        }
        Ok(along)
    };
    signature.outputs.iter().enumerate().map(axes).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{probe, signature};
    use super::*;
    use crate::backend::RunError;

    fn tokens() -> Signature {
        signature(
            &[("ids", DataType::Int64, &[-1, -1]), ("attention_mask", DataType::Int64, &[-1, -1])],
            &[("hidden", DataType::Fp32, &[-1, -1, 2]), ("pooled", DataType::Fp32, &[-1, 1])],
        )
    }

    /// Means of what the mask shows, per row; each position knows the mean, too.
    fn pooling(shown: impl Fn(i64) -> f32) -> impl Fn(&[Tensor]) -> Result<Vec<Tensor>, RunError> {
        move |inputs| {
            let [rows, length] = inputs[0].shape().dims()[..] else { panic!("two axes") };
            let (ids, mask) = (inputs[0].to_vec::<i64>().unwrap(), inputs[1].to_vec::<i64>().unwrap());
            let mean = |row: usize| {
                let span = row * length..(row + 1) * length;
                let weights = mask[span.clone()].iter().map(|mask| shown(*mask));
                let sum: f32 = ids[span].iter().zip(weights.clone()).map(|(id, shown)| *id as f32 * shown).sum();
                sum / weights.sum::<f32>()
            };
            let means: Vec<f32> = (0..rows).map(mean).collect();
            let position = |at: usize| [ids[at] as f32, means[at / length]];
            let hidden: Vec<f32> = (0..rows * length).flat_map(position).collect();
            let tensor = |dims: &[usize], data| Tensor::from_vec(Shape::new(dims).unwrap(), data).unwrap();
            Ok(vec![tensor(&[rows, length, 2], hidden), tensor(&[rows, 1], means)])
        }
    }

    fn decision(
        config: &RaggedConfig,
        run: impl Fn(&[Tensor]) -> Result<Vec<Tensor>, RunError> + Send + Sync + 'static,
    ) -> Result<RaggedDecision, String> {
        decide(config, true, &tokens(), &mut probe(&tokens(), run))
    }

    fn fill(numbers: &[(&str, f64)]) -> RaggedConfig {
        let fill = numbers.iter().map(|(name, number)| (name.to_string(), *number)).collect();
        RaggedConfig::Declared { axis: 1, fill }
    }

    #[test]
    fn a_model_that_heeds_its_mask_is_found_out_and_its_outputs_axes_learnt() {
        let plan = decision(&RaggedConfig::Auto, pooling(|mask| mask as f32)).unwrap().plan.expect("a plan");
        assert_eq!(plan.outputs, [vec![1], vec![]]);
        let zero = Some(SequenceAxis { axis: 1, fill: [0; 8].into() });
        assert_eq!(plan.inputs, [zero.clone(), zero]);
    }

    #[test]
    fn devices_that_differ_do_not_fill_up() {
        let yes = decision(&RaggedConfig::Auto, pooling(|mask| mask as f32)).unwrap();
        let no = RaggedDecision::no("differs");
        assert_eq!(agreed(vec![(Device::Cuda(0), yes.clone()), (Device::Cpu, yes.clone())]), yes);
        let decided = agreed(vec![(Device::Cuda(0), yes), (Device::Cpu, no)]);
        assert!(decided.plan.is_none() && decided.reason.ends_with(", on cpu: differs"), "{decided:?}");
    }

    #[test]
    fn a_model_that_ignores_its_mask_is_not_filled_up() {
        let ignores = || pooling(|_| 1.0);
        let decided = decision(&RaggedConfig::Auto, ignores()).unwrap();
        assert!(decided.plan.is_none() && decided.reason.contains("output `hidden` is not the same"), "{decided:?}");
        let error = decision(&fill(&[("ids", 0.0), ("attention_mask", 0.0)]), ignores()).unwrap_err();
        assert!(error.contains("changes their answers"), "{error}");
    }

    #[test]
    fn what_is_declared_is_checked() {
        let heeds = || pooling(|mask| mask as f32);
        let declared = |numbers: &[(&str, f64)]| decision(&fill(numbers), heeds());
        let plan = declared(&[("ids", 7.0), ("attention_mask", 0.0)]).unwrap().plan.unwrap();
        assert_eq!(*plan.inputs[0].as_ref().unwrap().fill, 7i64.to_le_bytes());
        let refused = |numbers: &[(&str, f64)], part: &str| {
            let error = declared(numbers).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        refused(&[("ids", 0.0), ("attention_mask", 1.0)], "changes their answers");
        refused(&[("idz", 0.0)], "no such input");
        refused(&[("ids", 0.5)], "0.5 does not fit, expected INT64");
        // Two of three axes of different lengths.
        refused(&[("ids", 0.0)], "batching.ragged");
    }

    #[test]
    fn nothing_is_suggested_without_a_mask_or_beside_other_free_axes() {
        let never = |_: &[Tensor]| -> Result<Vec<Tensor>, RunError> { panic!("not asked") };
        let reason = |inputs: &[(&str, DataType, &[i64])]| {
            let signature = signature(inputs, &[("y", DataType::Fp32, &[-1, 1])]);
            decide(&RaggedConfig::Auto, true, &signature, &mut probe(&signature, never)).unwrap().reason
        };
        let ids = ("ids", DataType::Int64, &[-1, -1][..]);
        assert_eq!(reason(&[("x", DataType::Fp32, &[-1, 4])]), "rows have one length");
        assert_eq!(reason(&[ids]), "no input is a mask, by its name");
        let image = ("image", DataType::Fp32, &[-1, 3, -1][..]);
        assert_eq!(
            reason(&[ids, ("mask", DataType::Int64, &[-1, -1]), image]),
            "input `image` is not [rows, length] of integers"
        );
    }

    #[test]
    fn it_can_be_switched_off_and_needs_batching() {
        let heeds = || pooling(|mask| mask as f32);
        assert_eq!(decision(&RaggedConfig::Off, heeds()).unwrap().reason, "switched off in model.toml");
        let signature = tokens();
        let unbatched = |config: &RaggedConfig| decide(config, false, &signature, &mut probe(&signature, heeds()));
        assert!(unbatched(&RaggedConfig::Auto).unwrap().plan.is_none());
        assert!(unbatched(&fill(&[("ids", 0.0), ("attention_mask", 0.0)])).unwrap_err().contains("not batched"));
    }

    #[test]
    fn two_sequences_of_different_names_are_not_taken_for_one() {
        let never = |_: &[Tensor]| -> Result<Vec<Tensor>, RunError> { panic!("not asked") };
        let mut signature = tokens();
        let name = |spec: &mut TensorSpec, name: &str| {
            spec.dims = Some(vec![Dim::Free(Some("batch".into())), Dim::Free(Some(name.into()))]);
        };
        name(&mut signature.inputs[0], "question");
        name(&mut signature.inputs[1], "answer");
        let decided = decide(&RaggedConfig::Auto, true, &signature, &mut probe(&signature, never)).unwrap();
        assert!(decided.reason.contains("lengths of different names, `question` and `answer`"), "{decided:?}");
    }
}
