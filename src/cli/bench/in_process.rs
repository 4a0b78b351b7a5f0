//! The ceiling: an engine alone, without queue, transport or server, for every sensible batch × instances × threads.
//!
//! A model is loaded as the server loads it, for each layout of the cores anew; then every instance runs one batch
//! after the other on a thread of its own. Nothing is gathered or split. Or one layout takes turns with servers, on the
//! rows that they are sent ([`Alone`]): what is compared with it was measured on the machine as it was then.

use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::Told;
use super::arguments::Asked;
use super::data::{Drawing, Lengths};
use super::stats::{Estimate, histogram, millis};
use super::table::{count, short};
use super::wire::Item;
use crate::backend::{Batch, Instance, Model};
use crate::cli::columns::aligned;
use crate::registry::{self, Facts, Random};
use crate::tensor::Tensor;

/// Runs before the clock starts.
const WARM_UP_RUNS: usize = 2;
/// Different batches that an instance goes through in turn.
const BATCHES: usize = 4;
/// Rows, instances or threads.
const MAX_OF_SETTING: usize = 1024;
/// With more cores than these, only powers of two of instances and threads are tried.
const FEW_CORES: usize = 4;

/// One model's ceilings.
#[derive(Serialize)]
pub(super) struct Ceiling {
    pub(super) model: String,
    pub(super) version: String,
    pub(super) engine: String,
    /// Whether the server would batch it.
    pub(super) batches: bool,
    /// Of free axes; `None` where lengths are mixed or the model has none.
    pub(super) length: Option<usize>,
    pub(super) inputs: Vec<String>,
    pub(super) cells: Vec<Timed>,
    /// The position of the cell with the most rows a second.
    pub(super) best: usize,
    /// The position of the one that answers a single request soonest; `None` where none was tried with one row.
    pub(super) best_single: Option<usize>,
}

/// One batch in one layout.
#[derive(Serialize)]
pub(super) struct Timed {
    pub(super) rows: usize,
    pub(super) instances: usize,
    pub(super) threads: usize,
    pub(super) rows_per_second: Estimate,
    pub(super) p50_ms: Estimate,
    pub(super) p99_ms: Estimate,
}

/// What is to be timed.
pub(super) struct Ceilings<'a> {
    pub(super) root: &'a Path,
    /// All that are there, if none is named.
    pub(super) models: &'a [Asked],
    pub(super) rows: &'a [usize],
    pub(super) drawing: Drawing,
    pub(super) duration: Duration,
    pub(super) rounds: usize,
}

/// Instances and threads.
type Layout = (usize, usize);

/// `version`: of any, if empty.
fn is_of(facts: &Facts, model: &str, version: &str) -> bool {
    *facts.name == *model && (version.is_empty() || version == facts.id.to_string())
}

impl Ceilings<'_> {
    pub(super) fn measure(&self, config: &registry::Config, cores: usize, told: &mut Told) -> Result<Vec<Ceiling>> {
        let mut ceilings = Vec::new();
        let mut outcome = Ok(());
        registry::each_alone(config, cores, |facts, load| {
            if outcome.is_ok() && self.wants(facts) {
                outcome = self.one(facts, load, cores, told).map(|found| ceilings.extend(found));
            }
        })?;
        outcome?;
        if ceilings.is_empty() {
            bail!("{} has no version of that name that loads: see `tidegate inspect`", self.root.display());
        }
        Ok(ceilings)
    }

    fn wants(&self, facts: &Facts) -> bool {
        self.models.is_empty() || self.models.iter().any(|asked| is_of(facts, &asked.name, &asked.version))
    }

    /// A ceiling for each length that was listed.
    fn one(&self, facts: &Facts, load: registry::Alone, cores: usize, told: &mut Told) -> Result<Vec<Ceiling>> {
        let specs = &facts.signature.inputs;
        let free = specs
            .iter()
            .any(|spec| spec.dims.as_ref().is_some_and(|dims| dims.iter().skip(1).any(|dim| dim.is_free())));
        let lengths: Vec<Option<Lengths>> = match &self.drawing.lengths {
            Some(Lengths::Among(lengths)) if free => {
                lengths.iter().map(|length| Some(Lengths::Among(vec![*length]))).collect()
            }
            other => vec![other.clone()],
        };
        let mut ceilings: Vec<Ceiling> = Vec::new();
        for lengths in &lengths {
            let length = match lengths {
                Some(Lengths::Among(one)) if free => one.first().copied(),
                _ => None,
            };
            ceilings.push(Ceiling {
                model: facts.name.to_string(),
                version: facts.id.to_string(),
                engine: format!("{} {}", facts.backend, facts.backend_version),
                batches: facts.batching.enabled,
                length,
                inputs: specs.iter().map(|spec| format!("{} {}", spec.name, spec.dtype)).collect(),
                cells: Vec::new(),
                best: 0,
                best_single: None,
            });
        }
        let sizes: Vec<usize> = self.rows.iter().copied().filter(|rows| *rows == 1 || facts.batching.enabled).collect();
        for layout in layouts(cores) {
            let model = load(layout.1).map_err(anyhow::Error::msg).with_context(|| facts.name.to_string())?;
            let made = (0..layout.0).map(|_| model.instance()).collect::<Result<Vec<_>, _>>();
            let mut instances = made.with_context(|| facts.name.to_string())?;
            for (ceiling, lengths) in ceilings.iter_mut().zip(&lengths) {
                let drawing = Drawing { lengths: lengths.clone(), ..self.drawing.clone() };
                self.layout(&*model, layout, &mut instances, &drawing, &sizes, ceiling, told)?;
            }
        }
        for ceiling in &mut ceilings {
            ceiling.judge();
        }
        Ok(ceilings)
    }

    #[expect(clippy::too_many_arguments, reason = "the loop's body")]
    fn layout(
        &self,
        model: &dyn Model,
        (count_of_instances, threads): Layout,
        instances: &mut [Box<dyn Instance>],
        drawing: &Drawing,
        sizes: &[usize],
        ceiling: &mut Ceiling,
        told: &mut Told,
    ) -> Result<()> {
        let mut random = Random(drawing.seed);
        let mut drawn = Vec::new();
        for rows in sizes {
            let drawing = Drawing { rows: *rows, ..drawing.clone() };
            let batch = |number| drawing.tensors(&model.signature().inputs, number, &mut random);
            drawn.push((0..BATCHES).map(batch).collect::<Result<Vec<_>>>()?);
        }
        let drawn: Vec<Vec<Vec<&[Tensor]>>> =
            drawn.iter().map(|batches| batches.iter().map(|batch| vec![&batch[..]]).collect()).collect();
        let mut rounds: Vec<Vec<Run>> = sizes.iter().map(|_| Vec::new()).collect();
        for round in 0..self.rounds {
            for ((rows, batches), runs) in sizes.iter().zip(&drawn).zip(&mut rounds) {
                told.tell(&format!(
                    "{}: {rows} rows, {count_of_instances} × {threads} threads, round {} of {}",
                    ceiling.model,
                    round + 1,
                    self.rounds
                ));
                let run = run(instances, batches, self.duration);
                runs.push(run.with_context(|| format!("model `{}` with {rows} rows", ceiling.model))?);
            }
        }
        for (rows, runs) in sizes.iter().zip(&rounds) {
            ceiling.cells.push(Timed::of(*rows, (count_of_instances, threads), runs)?);
        }
        Ok(())
    }
}

impl Ceiling {
    fn judge(&mut self) {
        let best = |better: &dyn Fn(&Timed) -> Option<f64>| {
            let rated = self.cells.iter().enumerate().filter_map(|(position, cell)| Some((better(cell)?, position)));
            rated.max_by(|one, other| one.0.total_cmp(&other.0)).map(|(_, position)| position)
        };
        self.best = best(&|cell| Some(cell.rows_per_second.median)).unwrap_or(0);
        self.best_single = best(&|cell| (cell.rows == 1 && cell.instances == 1).then_some(-cell.p50_ms.median));
    }

    pub(super) fn name(&self) -> String {
        let length = self.length.map(|length| format!(", length {length}")).unwrap_or_default();
        format!("{} version {}{length}", self.model, self.version)
    }

    pub(super) fn text(&self) -> String {
        let batching = if self.batches { "" } else { ", not batched" };
        let head = format!("{}: {}{batching}\n", self.name(), self.engine);
        let mut rows =
            vec![["rows", "instances × threads", "rows/s", "", "run p50 ms", "p99", ""].map(String::from).to_vec()];
        for (position, cell) in self.cells.iter().enumerate() {
            let mut marks = Vec::new();
            if position == self.best {
                marks.push("most rows");
            }
            if Some(position) == self.best_single {
                marks.push("soonest answer");
            }
            rows.push(vec![
                cell.rows.to_string(),
                format!("{} × {}", cell.instances, cell.threads),
                count(cell.rows_per_second.median),
                format!("{}–{}", count(cell.rows_per_second.low), count(cell.rows_per_second.high)),
                short(cell.p50_ms.median),
                short(cell.p99_ms.median),
                marks.join(", "),
            ]);
        }
        head + &aligned(&rows, true)
    }
}

/// What takes turns with servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    rows: usize,
    instances: usize,
    threads: usize,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Setting, String> {
        let numbers: Option<Vec<usize>> =
            text.split('x').map(|part| part.parse().ok().filter(|n| (1..=MAX_OF_SETTING).contains(n))).collect();
        match numbers.as_deref() {
            Some(&[rows, instances, threads]) => Ok(Setting { rows, instances, threads }),
            _ => Err(format!(
                "found `{text}`, expected rows x instances x threads, like 8x2x1, each 1 to {MAX_OF_SETTING}"
            )),
        }
    }
}

/// An engine in one layout, ready to run.
pub(super) struct Alone {
    setting: Setting,
    instances: Vec<Box<dyn Instance>>,
    /// Of so many rows, as jobs of one request each.
    batches: Vec<Vec<Vec<Tensor>>>,
}

impl Alone {
    /// `items`: what the servers are sent.
    pub(super) fn load(config: &registry::Config, cores: usize, setting: Setting, items: &[Item]) -> Result<Alone> {
        let Some(Item { model, version, .. }) = items.first() else { bail!("there is no request") };
        let mut found = None;
        registry::each_alone(config, cores, |facts, load| {
            if is_of(facts, model, version) {
                found = Some(Alone::of(facts, load, setting, items).with_context(|| format!("model `{model}`")));
            }
        })?;
        found.with_context(|| format!("{} has no version of `{model}` that loads", config.root.display()))?
    }

    fn of(facts: &Facts, load: registry::Alone, setting: Setting, items: &[Item]) -> Result<Alone> {
        let jobs = items.iter().filter(|item| *item.model == *facts.name).map(|item| inputs(facts, item));
        let jobs = jobs.collect::<Result<Vec<_>>>()?;
        let shapes = |job: &[Tensor]| job.iter().map(|input| input.shape().clone()).collect::<Vec<_>>();
        let one_row = jobs.iter().flatten().all(|input| input.shape().rows() == Some(1));
        if setting.rows > 1 && !(one_row && jobs.iter().all(|job| shapes(job) == shapes(&jobs[0]))) {
            bail!("requests differ in shape or have several rows, expected one row each and one shape for all");
        }
        let mut next = jobs.iter().cycle();
        let batches = (0..BATCHES).map(|_| next.by_ref().take(setting.rows).cloned().collect()).collect();
        let model = load(setting.threads).map_err(anyhow::Error::msg)?;
        let instances = (0..setting.instances).map(|_| model.instance()).collect::<Result<_, _>>()?;
        Ok(Alone { setting, instances, batches })
    }

    pub(super) fn round(&mut self, duration: Duration) -> Result<Run> {
        let batches: Vec<Vec<&[Tensor]>> =
            self.batches.iter().map(|jobs| jobs.iter().map(Vec::as_slice).collect()).collect();
        run(&mut self.instances, &batches, duration)
    }

    pub(super) fn timed(&self, runs: &[Run]) -> Result<Timed> {
        let Setting { rows, instances, threads } = self.setting;
        Timed::of(rows, (instances, threads), runs)
    }
}

/// A request's inputs, in the order of the model's.
fn inputs(facts: &Facts, item: &Item) -> Result<Vec<Tensor>> {
    let named = |name: &str| item.request.inputs.iter().find(|input| *input.name == *name);
    let specs = facts.signature.inputs.iter();
    specs
        .map(|spec| Ok(named(&spec.name).with_context(|| format!("no input `{}`", spec.name))?.tensor.clone()))
        .collect()
}

impl Timed {
    fn of(rows: usize, (instances, threads): Layout, runs: &[Run]) -> Result<Timed> {
        let estimate =
            |of: &dyn Fn(&Run) -> f64| Estimate::of(runs.iter().map(of).collect()).context("there was no round");
        Ok(Timed {
            rows,
            instances,
            threads,
            rows_per_second: estimate(&|run| run.runs_per_second * rows as f64)?,
            p50_ms: estimate(&|run| millis(&run.times, 0.5))?,
            p99_ms: estimate(&|run| millis(&run.times, 0.99))?,
        })
    }
}

/// Every way to use up to all cores; of many cores, those by powers of two.
fn layouts(cores: usize) -> Vec<Layout> {
    let counts: Vec<usize> = (1..=cores).filter(|n| cores <= FEW_CORES || n.is_power_of_two() || *n == cores).collect();
    let all = counts.iter().flat_map(|instances| counts.iter().map(move |threads| (*instances, *threads)));
    all.filter(|(instances, threads)| instances * threads <= cores).collect()
}

/// What came of one round.
pub(super) struct Run {
    /// Of all instances together.
    runs_per_second: f64,
    times: Histogram<u64>,
}

fn run(instances: &mut [Box<dyn Instance>], batches: &[Vec<&[Tensor]>], duration: Duration) -> Result<Run> {
    let barrier = Arc::new(Barrier::new(instances.len()));
    let outcomes: Vec<Result<Run>> = std::thread::scope(|scope| {
        let started: Vec<_> = instances
            .iter_mut()
            .map(|instance| {
                let barrier = Arc::clone(&barrier);
                scope.spawn(move || repeat(&mut **instance, batches, duration, &barrier))
            })
            .collect();
        // An engine's panic is a failure of this batch.
        let joined = started.into_iter().map(|thread| thread.join());
        joined.map(|outcome| outcome.unwrap_or_else(|_| bail!("the engine panicked"))).collect()
    });
    let mut all = Run { runs_per_second: 0.0, times: histogram() };
    for run in outcomes {
        let run = run?;
        all.runs_per_second += run.runs_per_second;
        // All histograms have the same bounds.
        let _ = all.times.add(&run.times);
    }
    Ok(all)
}

/// One instance's part.
fn repeat(
    instance: &mut dyn Instance,
    batches: &[Vec<&[Tensor]>],
    duration: Duration,
    barrier: &Barrier,
) -> Result<Run> {
    let mut next = batches.iter().cycle();
    let mut run = || -> Result<()> {
        let jobs = next.next().context("there is no batch")?;
        std::hint::black_box(instance.run(&Batch::new(jobs))?);
        Ok(())
    };
    // All come to the barrier, whatever happens.
    let warm = (0..WARM_UP_RUNS).try_for_each(|_| run());
    barrier.wait();
    warm?;
    let mut times = histogram();
    let begun = Instant::now();
    let (mut last, mut runs) = (begun, 0u32);
    while runs == 0 || last - begun < duration {
        run()?;
        let now = Instant::now();
        times.saturating_record(u64::try_from((now - last).as_nanos()).unwrap_or(u64::MAX));
        (last, runs) = (now, runs + 1);
    }
    Ok(Run { runs_per_second: f64::from(runs) / (last - begun).as_secs_f64(), times })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_three_numbers() {
        assert_eq!("8x2x1".parse(), Ok(Setting { rows: 8, instances: 2, threads: 1 }));
        for wrong in ["", "8", "8x2", "8x2x1x1", "0x1x1", "8x2x", "8 x 2 x 1", "1025x1x1", "-1x1x1"] {
            assert!(wrong.parse::<Setting>().unwrap_err().contains("like 8x2x1"), "{wrong}");
        }
    }

    #[test]
    fn layouts_never_take_more_cores_than_there_are() {
        assert_eq!(layouts(1), [(1, 1)]);
        assert_eq!(layouts(2), [(1, 1), (1, 2), (2, 1)]);
        assert_eq!(layouts(4).len(), 8);
        let many = layouts(24);
        assert!(
            many.contains(&(24, 1)) && many.contains(&(1, 24)) && many.contains(&(8, 2)) && !many.contains(&(3, 8))
        );
    }
}
