//! Whether a model may be batched: what its file says, then whether each row's answer is the same alone and beside
//! others.
//!
//! The file must give every input and output a free leading dimension, the inputs the same one, and hold no operator
//! that couples rows. Then the model is asked: rows invented at sizes and value ranges that it accepts, each alone and in
//! batches of 2, 3 and 5, with neighbours as loud as itself and a hundred times louder. Agreement counts only where the
//! answers tell rows apart. What the model refuses, or what takes too long, leaves the question open: unbatched.

use std::time::Duration;

use super::invent::{self, Random, Recipe};
use super::probe::Probe;
use crate::backend::Device;
use crate::tensor::{DataType, Dim, Signature, Tensor, TensorSpec};

/// What one version's self-test may take.
pub const BUDGET: Duration = Duration::from_secs(2);
const BATCHES: [usize; 3] = [2, 3, 5];
/// Rows of the largest batch.
const ROWS: usize = 5;
/// How much louder a loud neighbour is.
const LOUD: f64 = 100.0;
/// Value ranges in the order tried: integers below, floats up to. Wider ones only where narrower ones show no
/// difference between rows (trees that split at large values, vocabularies whose first words embed alike).
pub(super) const RANGES: [(u64, f64); 3] = [(2, 1.0), (16, 30.0), (128, 1000.0)];
const SEED: u64 = 0x7469_6465_6761_7465;

/// Whether a version is batched, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchDecision {
    pub enabled: bool,
    pub reason: String,
}

/// What asking the model showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Independent,
    Coupled(String),
    Inconclusive(String),
}

/// From what the configuration says, the file, and, where these leave it open, the self-test. An error where the
/// configuration asks for what the signature cannot give.
pub fn decide(
    configured: Option<bool>,
    couples_rows: Option<&str>,
    signature: &Signature,
    test: impl FnOnce() -> Verdict,
) -> Result<BatchDecision, String> {
    let decided = |enabled, reason: String| Ok(BatchDecision { enabled, reason });
    match configured {
        Some(false) => return decided(false, "switched off by the model's settings".into()),
        Some(true) => {
            return match fixed_rows(signature) {
                None => decided(true, "switched on by the model's settings, without a self-test".into()),
                Some(why) => Err(format!("the model's settings switch batching on, but {why}")),
            };
        }
        None => {}
    }
    if let Some(why) = no_shared_rows(signature) {
        return decided(false, why);
    }
    if let Some(why) = couples_rows {
        return decided(false, why.to_string());
    }
    match test() {
        Verdict::Independent => {
            decided(true, "self-test: every row's answer is the same alone and in batches of 2, 3 and 5".into())
        }
        Verdict::Coupled(why) => decided(false, format!("self-test: {why}")),
        Verdict::Inconclusive(why) => decided(false, format!("self-test inconclusive: {why}")),
    }
}

/// What holds on every device: one that does not batch is enough.
pub fn agreed(decided: Vec<(Device, BatchDecision)>) -> BatchDecision {
    let refusal = decided.iter().find(|(_, decision)| !decision.enabled);
    let (device, decision) = match refusal.or(decided.first()) {
        Some((device, decision)) => (*device, decision.clone()),
        None => return BatchDecision { enabled: false, reason: "there is no device".into() },
    };
    if decided.iter().all(|(_, other)| other.enabled == decision.enabled) {
        return decision;
    }
    BatchDecision { reason: format!("on {device}: {}", decision.reason), ..decision }
}

/// Why rows cannot even be told apart, whatever the configuration says.
fn fixed_rows(signature: &Signature) -> Option<String> {
    fixed_leading("input", &signature.inputs).or_else(|| fixed_leading("output", &signature.outputs))
}

/// Why it cannot be said how many rows a request has.
pub fn uncounted_rows(signature: &Signature) -> Option<String> {
    if signature.inputs.is_empty() {
        return Some("the model has no inputs".into());
    }
    fixed_leading("input", &signature.inputs)
}

fn fixed_leading(side: &str, specs: &[TensorSpec]) -> Option<String> {
    specs.iter().find_map(|spec| match spec.dims.as_ref()?.first() {
        None => Some(format!("{side} `{}` is a scalar, without a leading dimension", spec.name)),
        Some(Dim::Fixed(rows)) => Some(format!("{side} `{}` has a fixed leading dimension of {rows}", spec.name)),
        Some(Dim::Free(_)) => None,
    })
}

fn no_shared_rows(signature: &Signature) -> Option<String> {
    if signature.inputs.is_empty() || signature.outputs.is_empty() {
        return Some("the model has no inputs or no outputs".into());
    }
    let sides = [("input", &signature.inputs), ("output", &signature.outputs)];
    for (side, spec) in sides.iter().flat_map(|(side, specs)| specs.iter().map(move |spec| (side, spec))) {
        if spec.dims.is_none() {
            return Some(format!("{side} `{}` declares no shape", spec.name));
        }
    }
    fixed_rows(signature).or_else(|| {
        // Outputs are not compared by symbol: exporters name derived dimensions anew. The self-test counts their rows.
        let mut named = signature.inputs.iter().filter_map(|spec| Some((spec, leading_symbol(spec.dims.as_ref()?)?)));
        let (first, symbol) = named.next()?;
        let (other, differs) = named.find(|(_, other)| *other != symbol)?;
        Some(format!(
            "inputs `{}` and `{}` have leading dimensions of different names, `{symbol}` and `{differs}`",
            first.name, other.name
        ))
    })
}

fn leading_symbol(dims: &[Dim]) -> Option<&str> {
    symbol(dims.first()?)
}

/// A dimension's name, if a person gave it one: tf2onnx numbers unknown dimensions `unk__1`, `unk__2`, ….
pub(super) fn symbol(dim: &Dim) -> Option<&str> {
    match dim {
        Dim::Free(Some(symbol)) if !symbol.starts_with("unk__") => Some(symbol),
        _ => None,
    }
}

/// Asks the model, for [`BUDGET`] at most.
pub fn run(probe: &mut Probe, signature: &Signature) -> Verdict {
    let mut test =
        Test { end: probe.spent() + BUDGET, probe, row_cost: Duration::ZERO, tolerance: Tolerance::of(signature) };
    let mut shown = vec![false; signature.outputs.len()];
    let mut refusal = None;
    for extent in invent::extents(signature) {
        for (below, scale) in RANGES {
            match test.attempt(signature, Recipe { extent: *extent, below, scale }, &mut shown) {
                Ok(()) if shown.iter().all(|shown| *shown) => return Verdict::Independent,
                Ok(()) => {}
                Err(Stop::Refused(why)) => {
                    refusal.get_or_insert(why);
                    // Values further out will not make a size acceptable.
                    if below == RANGES[0].0 {
                        break;
                    }
                }
                Err(Stop::Coupled(why)) => return Verdict::Coupled(why),
                Err(Stop::OutOfTime) => {
                    return conclude(signature, &shown, Some(format!("not done within {} s", BUDGET.as_secs())));
                }
            }
        }
    }
    conclude(signature, &shown, refusal.map(|why| format!("the model refuses invented inputs: {why}")))
}

/// What agreement without a full set of differences is worth: every output of floats must have told rows apart, and at
/// least one output at all. Class ids are often the same for every row that can be invented.
fn conclude(signature: &Signature, shown: &[bool], obstacle: Option<String>) -> Verdict {
    let silent = |(spec, shown): (&crate::tensor::TensorSpec, &bool)| {
        (!shown && is_float(spec.dtype)).then(|| spec.name.clone())
    };
    let silent = signature.outputs.iter().zip(shown).find_map(silent);
    match (shown.contains(&true), silent) {
        (true, None) => Verdict::Independent,
        (false, _) => {
            Verdict::Inconclusive(obstacle.unwrap_or_else(|| "no invented rows have different answers".into()))
        }
        (true, Some(output)) => Verdict::Inconclusive(
            obstacle.unwrap_or_else(|| format!("output `{output}` is the same for all invented rows")),
        ),
    }
}

enum Stop {
    Refused(String),
    Coupled(String),
    OutOfTime,
}

struct Test<'a> {
    probe: &'a mut Probe,
    /// What the probe may have spent in the end.
    end: Duration,
    /// How long the last row run alone took: the first one may have paid for what an engine prepares lazily.
    row_cost: Duration,
    tolerance: Tolerance,
}

impl Test<'_> {
    /// One size and range: all batches, and which outputs told rows apart.
    fn attempt(&mut self, signature: &Signature, recipe: Recipe, shown: &mut [bool]) -> Result<(), Stop> {
        let mut random = Random(SEED);
        let mut draw = |recipe: Recipe| {
            (0..ROWS as u64)
                .map(|number| invent::row(signature, recipe, number, &mut random))
                .collect::<Result<Vec<_>, _>>()
                .map_err(Stop::Refused)
        };
        let quiet = draw(recipe)?;
        let loud = draw(Recipe { scale: recipe.scale * LOUD, ..recipe })?;
        let alone = self.each_alone(signature, &quiet)?;
        let has_floats = signature.inputs.iter().any(|spec| is_float(spec.dtype));
        for rows in BATCHES {
            self.compare(signature, &quiet[..rows].iter().collect::<Vec<_>>(), 0..rows, &alone)?;
            if has_floats {
                let target = rows / 2;
                let mixed = (0..rows).map(|i| if i == target { &quiet[i] } else { &loud[i] }).collect::<Vec<_>>();
                self.compare(signature, &mixed, target..target + 1, &alone)?;
            }
        }
        for (output, shown) in shown.iter_mut().enumerate() {
            *shown |= (1..ROWS).any(|row| self.tolerance.tells_apart(&alone[0][output], &alone[row][output]));
        }
        Ok(())
    }

    /// Each row's own answer; the first row twice, to know a model that answers at random.
    fn each_alone(&mut self, signature: &Signature, rows: &[Vec<Tensor>]) -> Result<Vec<Vec<Tensor>>, Stop> {
        let mut answers = Vec::with_capacity(rows.len());
        for row in rows {
            answers.push(self.run(&[row]).map_err(|error| error.stop())?);
        }
        let again = self.run(&[&rows[0]]).map_err(|error| error.stop())?;
        for ((spec, one), other) in signature.outputs.iter().zip(&answers[0]).zip(&again) {
            if let Err(difference) = self.tolerance.same(one, other) {
                return Err(Stop::Coupled(format!("output `{}` differs from run to run: {difference}", spec.name)));
            }
            if one.rows() != Some(1) {
                return Err(Stop::Coupled(format!("output `{}` has shape {} for one row", spec.name, one.shape())));
            }
        }
        Ok(answers)
    }

    /// Runs the rows as one batch and compares those in `checked` with their own answers.
    fn compare(
        &mut self,
        signature: &Signature,
        rows: &[&Vec<Tensor>],
        checked: std::ops::Range<usize>,
        alone: &[Vec<Tensor>],
    ) -> Result<(), Stop> {
        let count = rows.len();
        let jobs: Vec<&[Tensor]> = rows.iter().map(|row| row.as_slice()).collect();
        let outputs = self.run(&jobs).map_err(|error| match error {
            RunFailure::OutOfTime => Stop::OutOfTime,
            RunFailure::Refused(why) => Stop::Coupled(format!("the model refuses a batch of {count}: {why}")),
        })?;
        for (position, (spec, output)) in signature.outputs.iter().zip(&outputs).enumerate() {
            let Some(parts) = output.split_rows(&vec![1; count]) else {
                let shape = output.shape();
                return Err(Stop::Coupled(format!("output `{}` has shape {shape} for {count} rows", spec.name)));
            };
            for row in checked.clone() {
                if let Err(difference) = self.tolerance.same(&alone[row][position], &parts[row]) {
                    let name = &spec.name;
                    return Err(Stop::Coupled(format!(
                        "a row's output `{name}` is not the same in a batch of {count}: {difference}"
                    )));
                }
            }
        }
        Ok(())
    }

    fn run(&mut self, jobs: &[&[Tensor]]) -> Result<Vec<Tensor>, RunFailure> {
        let before = self.probe.spent();
        let rows = u32::try_from(jobs.len()).unwrap_or(u32::MAX);
        // Stops before a run that would probably end too late: a run cannot be stopped once it is on.
        if before + self.row_cost * rows > self.end {
            return Err(RunFailure::OutOfTime);
        }
        let outcome = self.probe.run(jobs).map_err(RunFailure::Refused);
        if rows == 1 {
            self.row_cost = self.probe.spent() - before;
        }
        outcome
    }
}

enum RunFailure {
    OutOfTime,
    Refused(String),
}

impl RunFailure {
    fn stop(self) -> Stop {
        match self {
            RunFailure::OutOfTime => Stop::OutOfTime,
            RunFailure::Refused(why) => Stop::Refused(why),
        }
    }
}

/// How far apart two answers to the same row may lie: another order of additions is allowed, another scale of
/// quantisation is not.
#[derive(Clone, Copy)]
pub(super) struct Tolerance {
    relative: f64,
    /// Of the largest magnitude in the row's own answer.
    of_scale: f64,
    floor: f64,
}

impl Tolerance {
    pub(super) fn of(signature: &Signature) -> Tolerance {
        let halves = signature
            .inputs
            .iter()
            .chain(&signature.outputs)
            .any(|spec| matches!(spec.dtype, DataType::Fp16 | DataType::Bf16));
        if halves {
            Tolerance { relative: 2e-2, of_scale: 1e-2, floor: 1e-6 }
        } else {
            Tolerance { relative: 1e-3, of_scale: 1e-4, floor: 1e-9 }
        }
    }

    pub(super) fn same(&self, alone: &Tensor, batched: &Tensor) -> Result<(), String> {
        if alone.shape() != batched.shape() {
            return Err(format!("shape {} alone, {} batched", alone.shape(), batched.shape()));
        }
        let (Some(a), Some(b)) = (floats(alone), floats(batched)) else {
            return if alone.data() == batched.data() { Ok(()) } else { Err("other values".into()) };
        };
        match self.first_beyond(&a, &b, 1.0) {
            None => Ok(()),
            Some(at) => Err(format!("{} alone, {} batched", a[at], b[at])),
        }
    }

    /// Whether two answers differ by clearly more than the tolerance hides.
    pub(super) fn tells_apart(&self, one: &Tensor, other: &Tensor) -> bool {
        match (floats(one), floats(other)) {
            _ if one.shape() != other.shape() => true,
            (Some(a), Some(b)) => self.first_beyond(&a, &b, 10.0).is_some(),
            _ => one.data() != other.data(),
        }
    }

    fn first_beyond(&self, a: &[f64], b: &[f64], factor: f64) -> Option<usize> {
        let scale = a.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
        let slack = self.floor + self.of_scale * scale;
        a.iter().zip(b).position(|(a, b)| {
            if a.is_nan() || b.is_nan() || a.is_infinite() || b.is_infinite() {
                return !(a.is_nan() && b.is_nan() || a == b);
            }
            (a - b).abs() > factor * (slack + self.relative * a.abs())
        })
    }
}

fn is_float(dtype: DataType) -> bool {
    matches!(dtype, DataType::Fp16 | DataType::Bf16 | DataType::Fp32 | DataType::Fp64)
}

/// The elements of a tensor of floats; `None` for any other datatype.
pub(super) fn floats(tensor: &Tensor) -> Option<Vec<f64>> {
    match tensor.dtype() {
        DataType::Fp16 => Some(tensor.to_vec::<half::f16>()?.into_iter().map(f64::from).collect()),
        DataType::Bf16 => Some(tensor.to_vec::<half::bf16>()?.into_iter().map(f64::from).collect()),
        DataType::Fp32 => Some(tensor.to_vec::<f32>()?.into_iter().map(f64::from).collect()),
        DataType::Fp64 => tensor.to_vec(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::tests::{probe, signature};
    use super::*;
    use crate::backend::RunError;

    type Rows = Vec<Vec<f32>>;

    /// A model of FP32 rows of 4 → rows of 4, computed for the whole batch at once.
    fn verdict(run: impl Fn(&Rows) -> Result<Rows, RunError> + Send + Sync + 'static) -> Verdict {
        let signature = signature(&[("x", DataType::Fp32, &[-1, 4])], &[("y", DataType::Fp32, &[-1, -1])]);
        let ask = move |inputs: &[Tensor]| {
            let rows: Rows = inputs[0].to_vec::<f32>().unwrap().chunks(4).map(<[f32]>::to_vec).collect();
            let out = run(&rows)?;
            let width = out[0].len();
            let shape = crate::tensor::Shape::new([out.len(), width]).unwrap();
            Ok(vec![Tensor::from_vec(shape, out.concat()).unwrap()])
        };
        super::run(&mut probe(&signature, ask), &signature)
    }

    fn each(f: impl Fn(&[f32]) -> Vec<f32>) -> impl Fn(&Rows) -> Result<Rows, RunError> {
        move |rows| Ok(rows.iter().map(|row| f(row)).collect())
    }

    fn coupled(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Coupled(_))
    }

    #[test]
    fn independent_rows_pass_even_with_the_noise_of_another_order_of_additions() {
        assert_eq!(verdict(each(|row| row.iter().map(|x| 2.0 * x + 1.0).collect())), Verdict::Independent);
        let noisy = |rows: &Rows| {
            let noise = 1.0 + 1e-6 * rows.len() as f32;
            Ok(rows.iter().map(|row| row.iter().map(|x| (x * noise).exp()).collect()).collect())
        };
        assert_eq!(verdict(noisy), Verdict::Independent);
        assert_eq!(verdict(each(|row| row.iter().map(|x| x.ln()).collect())), Verdict::Independent);
    }

    #[test]
    fn coupled_rows_fail() {
        let centred = |rows: &Rows| {
            let mean = rows.concat().iter().sum::<f32>() / (4 * rows.len()) as f32;
            Ok(rows.iter().map(|row| row.iter().map(|x| x - mean).collect()).collect())
        };
        assert!(coupled(&verdict(centred)));
        let quantised = |rows: &Rows| {
            let scale = rows.concat().iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
            Ok(rows.iter().map(|row| row.iter().map(|x| (x / scale).round() * scale).collect()).collect())
        };
        assert!(coupled(&verdict(quantised)));
        let causal = |rows: &Rows| {
            let mut sum = vec![0f32; 4];
            Ok(rows
                .iter()
                .map(|row| {
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                    sum.clone()
                })
                .collect())
        };
        assert!(coupled(&verdict(causal)));
        let only_loud = |rows: &Rows| {
            let spill = if rows.concat().iter().any(|x| x.abs() > 50.0) { 1.0 } else { 0.0 };
            Ok(rows.iter().map(|row| row.iter().map(|x| x + spill).collect()).collect())
        };
        assert!(coupled(&verdict(only_loud)));
        let only_fives = |rows: &Rows| {
            let spill = if rows.len() == 5 { 1.0 } else { 0.0 };
            Ok(rows.iter().map(|row| row.iter().map(|x| x + spill).collect()).collect())
        };
        assert!(coupled(&verdict(only_fives)));
    }

    #[test]
    fn wrong_row_counts_and_refused_batches_fail() {
        let pooled = verdict(|rows| Ok(vec![rows[0].clone()]));
        assert_eq!(pooled, Verdict::Coupled("output `y` has shape [1,4] for 2 rows".into()));
        let single = verdict(|rows| match rows.len() {
            1 => Ok(rows.clone()),
            _ => Err(RunError::Failed("cannot reshape {2,4}\nat node 7".into())),
        });
        assert_eq!(single, Verdict::Coupled("the model refuses a batch of 2: cannot reshape {2,4}".into()));
    }

    #[test]
    fn agreement_that_proves_nothing_is_inconclusive() {
        let constant = verdict(each(|_| vec![1.0]));
        assert_eq!(constant, Verdict::Inconclusive("no invented rows have different answers".into()));
        let refusing = verdict(|_| Err(RunError::InvalidArgument("bad id".into())));
        assert_eq!(refusing, Verdict::Inconclusive("the model refuses invented inputs: bad id".into()));
        let panicking = verdict(|_| panic!("on purpose"));
        assert_eq!(panicking, Verdict::Inconclusive("the model refuses invented inputs: the engine panicked".into()));
    }

    #[test]
    fn wider_values_are_tried_where_narrow_ones_show_nothing() {
        let tree = verdict(each(|row| vec![if row.iter().any(|x| *x > 500.0) { 1.0 } else { 0.0 }]));
        assert_eq!(tree, Verdict::Independent);
    }

    #[test]
    fn a_class_id_may_be_constant_where_floats_differ() {
        let signature = signature(
            &[("x", DataType::Fp32, &[-1, 1])],
            &[("label", DataType::Int64, &[-1]), ("score", DataType::Fp32, &[-1, 1])],
        );
        let labelled = |inputs: &[Tensor]| {
            let rows = inputs[0].rows().unwrap();
            let label = Tensor::from_vec(crate::tensor::Shape::new([rows]).unwrap(), vec![3i64; rows]).unwrap();
            Ok(vec![label, inputs[0].clone()])
        };
        assert_eq!(run(&mut probe(&signature, labelled), &signature), Verdict::Independent);
    }

    #[test]
    fn the_ladder_finds_a_size_that_runs() {
        let signature = signature(&[("x", DataType::Int64, &[-1, -1])], &[("y", DataType::Int64, &[-1, -1])]);
        let only_32 = |inputs: &[Tensor]| match inputs[0].shape().dims()[1] {
            32 => Ok(inputs.to_vec()),
            _ => Err(RunError::Failed("only 32".into())),
        };
        assert_eq!(run(&mut probe(&signature, only_32), &signature), Verdict::Independent);
    }

    #[test]
    fn a_slow_model_is_given_up_before_the_budget_is_overrun() {
        let signature = signature(&[("x", DataType::Fp32, &[-1, 4])], &[("y", DataType::Fp32, &[-1, 4])]);
        let mut now = Instant::now();
        let slow_clock = move || {
            // Every run takes from one look to the next.
            now += Duration::from_millis(200);
            now
        };
        let mut probe = probe(&signature, |inputs| Ok(inputs.to_vec())).with_clock(slow_clock);
        assert_eq!(run(&mut probe, &signature), Verdict::Inconclusive("not done within 2 s".into()));
        assert!(probe.spent() <= BUDGET);
    }

    #[test]
    fn one_device_that_does_not_batch_decides_for_all() {
        let decision = |enabled, reason: &str| BatchDecision { enabled, reason: reason.into() };
        let (on, off) = (decision(true, "proved"), decision(false, "differs"));
        let agreed = |cpu: &BatchDecision, gpu: &BatchDecision| {
            super::agreed(vec![(Device::Cpu, cpu.clone()), (Device::Cuda(1), gpu.clone())])
        };
        assert_eq!((agreed(&on, &on), agreed(&off, &off)), (on.clone(), off.clone()));
        assert_eq!(agreed(&on, &off), decision(false, "on cuda:1: differs"));
        assert_eq!(agreed(&off, &on), decision(false, "on cpu: differs"));
    }

    #[test]
    fn the_configuration_and_the_file_decide_first() {
        let never = || -> Verdict { panic!("not asked") };
        let rows = signature(&[("x", DataType::Fp32, &[-1, 4])], &[("y", DataType::Fp32, &[-1, 4])]);
        let off = decide(Some(false), None, &rows, never).unwrap();
        let on = decide(Some(true), Some("RandomNormal couples rows"), &rows, never).unwrap();
        let listed = decide(None, Some("RandomNormal couples rows"), &rows, never).unwrap();
        assert_eq!((off.enabled, on.enabled, listed.enabled), (false, true, false));
        assert_eq!(listed.reason, "RandomNormal couples rows");
        let state = signature(
            &[("x", DataType::Fp32, &[-1, 4]), ("state", DataType::Fp32, &[2, -1, 8])],
            &[("y", DataType::Fp32, &[-1, 4])],
        );
        assert_eq!(
            decide(None, None, &state, never).unwrap().reason,
            "input `state` has a fixed leading dimension of 2"
        );
        assert!(decide(Some(true), None, &state, never).unwrap_err().contains("input `state`"));
        let scalar =
            signature(&[("x", DataType::Fp32, &[-1]), ("s", DataType::Fp32, &[])], &[("y", DataType::Fp32, &[-1])]);
        assert!(!decide(None, None, &scalar, never).unwrap().enabled);
        let open = decide(None, None, &rows, || Verdict::Inconclusive("why".into())).unwrap();
        assert_eq!((open.enabled, open.reason.as_str()), (false, "self-test inconclusive: why"));
    }

    #[test]
    fn inputs_that_name_their_leading_dimensions_differently_share_none() {
        let mut named =
            signature(&[("a", DataType::Fp32, &[-1]), ("b", DataType::Fp32, &[-1])], &[("y", DataType::Fp32, &[-1])]);
        let mut with = |first: Dim, second: Dim| {
            named.inputs[0].dims = Some(vec![first]);
            named.inputs[1].dims = Some(vec![second]);
            decide(None, None, &named, || Verdict::Independent).unwrap().enabled
        };
        let free = |symbol: &str| Dim::Free(Some(symbol.into()));
        assert!(!with(free("n"), free("m")));
        assert!(with(free("n"), free("n")));
        assert!(with(free("unk__1"), free("unk__2")));
        assert!(with(free("n"), Dim::Free(None)));
    }
}
