//! What runs cost, timed at load on invented inputs: by rows and by the length of their sequences; and whether a request
//! that is alone gains by having its run spread over all cores. A start for what the scheduler learns from requests, so
//! that the first of them find a server that is tuned.
//!
//! Sizes come in the order of their elements, until the next would take longer than is left. What counts of
//! a size is its shortest run: the machine may be busy, and a run that had to wait for a core says nothing. What a model
//! refuses stays unknown. Runs on a loading thread.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use super::invent::{self, Random, Recipe};
use super::probe::Probe;
use super::selftest::Tolerance;
use crate::scheduler::Sample;
use crate::tensor::{Dim, Ragged, Signature, Tensor};

/// What timing one layout may take; the size that would exceed it is not begun, but for the first.
pub const BUDGET: Duration = Duration::from_millis(150);
/// Runs of a size, unless they take longer than this together.
const MOST_RUNS: u32 = 16;
const ENOUGH_TIME: Duration = Duration::from_millis(2);
const LEAST_RUNS: u32 = 2;
/// Of runs on all cores and on one: a neighbour on any core disturbs the first.
const PAIRS: u32 = 3;
/// Of such pairs, where they show no gain.
const TRIES: u32 = 3;
/// What it may take to decide so thoroughly.
const DECIDING: Duration = Duration::from_millis(300);
/// How far two timings of one size may lie apart and still agree.
const AGREES: f64 = 1.25;
/// What free dimensions are timed at.
const EXTENTS: [usize; 7] = [16, 32, 64, 128, 224, 256, 512];
/// A run that waited for a core for more than this part of its time is not counted. Shorter ones than
/// [`WORTH_A_LOOK`] are not asked.
const MOST_WAITED: f64 = 0.1;
const WORTH_A_LOOK: Duration = Duration::from_millis(1);
/// From this on a run may gain by being spread: waking another thread takes some 50 µs.
const WORTH_SPREADING: Duration = Duration::from_micros(200);
/// How much faster a spread run is where no more tries are needed.
const GAIN: f64 = 1.08;
/// One that is less is not worth the memory. In between requests decide: what a second core gives may change with what else
/// the machine does, from none of it to all.
const HOPELESS: f64 = 0.8;
const SEED: u64 = 3;

/// What runs of a version on the CPU cost, and which layouts it has there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calibration {
    /// Of an instance of the plan.
    pub narrow: Vec<Sample>,
    /// Of a run on all cores; empty where that is no layout of this version.
    pub wide: Vec<Sample>,
    /// Why there is, or is no, such a layout.
    pub wide_reason: String,
}

/// What a version's runs are timed with.
pub struct Sizes<'a> {
    pub signature: &'a Signature,
    /// 1 where it is not batched.
    pub most_rows: usize,
    pub ragged: Option<&'a Ragged>,
}

/// One size to time.
#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    /// What the free dimensions of a row are.
    extent: usize,
    /// Elements of all rows of the largest input.
    elements: usize,
}

impl Sizes<'_> {
    /// The cheapest first.
    fn all(&self) -> Vec<Size> {
        let powers = (0..usize::BITS).map(|power| 1 << power).take_while(|rows| *rows < self.most_rows);
        let rows: Vec<usize> = powers.chain([self.most_rows.max(1)]).collect();
        let extents = if invent::extents(self.signature).len() > 1 { &EXTENTS[..] } else { &[1] };
        let size = |rows: usize, extent| Size { rows, extent, elements: rows.saturating_mul(self.elements(extent)) };
        let mut sizes: Vec<_> =
            extents.iter().flat_map(|extent| rows.iter().map(move |rows| size(*rows, *extent))).collect();
        sizes.sort_by_key(|size| (size.elements, size.rows));
        sizes
    }

    /// Of a row of the largest input.
    fn elements(&self, extent: usize) -> usize {
        let of = |dim: &Dim| match dim {
            Dim::Fixed(fixed) => *fixed,
            Dim::Free(_) => extent,
        };
        let dims = self.signature.inputs.iter().filter_map(|spec| spec.dims.as_ref());
        dims.map(|dims| dims.iter().skip(1).map(of).fold(1, usize::saturating_mul)).max().unwrap_or(1)
    }

    /// As the scheduler tells sizes apart: by the length of the sequences, else, where not all rows are of one shape, by the
    /// elements of one.
    fn length(&self, extent: usize) -> Option<usize> {
        match self.ragged {
            Some(_) => Some(extent),
            None if invent::extents(self.signature).len() > 1 => Some(self.elements(extent)),
            None => None,
        }
    }

    fn row(&self, extent: usize) -> Result<Vec<Tensor>, String> {
        invent::row(self.signature, Recipe { extent, below: 2, scale: 1.0 }, 0, &mut Random(SEED))
    }

    /// That is how sizes are told; the extent that it came from is found again.
    fn extent(&self, length: Option<usize>) -> usize {
        EXTENTS.into_iter().find(|extent| self.length(*extent) == length).unwrap_or(1)
    }
}

/// A row of the shortest that was timed.
pub fn row_of(sizes: &Sizes, samples: &[Sample]) -> Result<Vec<Tensor>, String> {
    let shortest = samples.first().ok_or("nothing was timed")?;
    sizes.row(sizes.extent(shortest.length))
}

/// An instance of the plan.
pub fn narrow(sizes: &Sizes, probe: &mut Probe) -> Vec<Sample> {
    let end = probe.spent() + BUDGET;
    let mut samples: Vec<Sample> = Vec::new();
    let (mut refused, mut last) = (BTreeSet::new(), None::<(Duration, usize)>);
    for size in sizes.all() {
        // What refuses the length of a sequence refuses longer ones; an image may have to be of some size.
        let hopeless = match sizes.ragged {
            Some(_) => refused.first().is_some_and(|shortest| size.extent >= *shortest),
            None => refused.contains(&size.extent),
        };
        if hopeless {
            continue;
        }
        let in_proportion = |(took, elements): (Duration, usize)| took.mul_f64(size.elements as f64 / elements as f64);
        if probe.spent() + LEAST_RUNS * last.map_or(Duration::ZERO, in_proportion) > end {
            break;
        }
        match timed(sizes, size, LEAST_RUNS, end.saturating_sub(probe.spent()), probe) {
            Ok(Some(compute)) => {
                last = Some((compute, size.elements.max(1)));
                samples.push(Sample { rows: size.rows, length: sizes.length(size.extent), compute });
            }
            Ok(None) => {}
            Err(_) => {
                refused.insert(size.extent);
            }
        }
    }
    samples
}

/// The shortest of several runs, none of them begun after `most`; `None` where all were disturbed.
fn timed(sizes: &Sizes, size: Size, least: u32, most: Duration, probe: &mut Probe) -> Result<Option<Duration>, String> {
    let row = sizes.row(size.extent)?;
    let jobs: Vec<&[Tensor]> = vec![&row; size.rows];
    let (begun, mut shortest) = (probe.spent(), None);
    for run in 0..MOST_RUNS {
        let spent = probe.spent() - begun;
        if run > 0 && spent > most || run >= least && spent > ENOUGH_TIME {
            break;
        }
        if let Some(took) = once(&jobs, probe)? {
            shortest = Some(shortest.map_or(took, |shortest: Duration| shortest.min(took)));
        }
    }
    Ok(shortest)
}

/// How long this thread has been ready to run and had no core, as Linux counts it.
fn waited() -> Option<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
}

/// Whether anything can be gained by spreading one row's run, given what it takes on one core.
pub fn may_gain(narrow: &[Sample]) -> bool {
    narrow.iter().any(|sample| sample.rows == 1 && sample.compute >= WORTH_SPREADING)
}

/// Whether the cheapest and the dearest take now what they took before: then nothing disturbed either timing.
pub fn agree(sizes: &Sizes, narrow: &[Sample], probe: &mut Probe) -> bool {
    [narrow.first(), narrow.last()].into_iter().flatten().all(|sample| {
        let size = Size { rows: sample.rows, extent: sizes.extent(sample.length), elements: 1 };
        let again = timed(sizes, size, LEAST_RUNS, BUDGET / 2, probe);
        again.is_ok_and(|again| again.is_some_and(|again| alike(again, sample.compute)))
    })
}

fn alike(one: Duration, other: Duration) -> bool {
    one.max(other) <= one.min(other).mul_f64(AGREES)
}

/// What came of timing rows on all cores.
pub struct Verdict {
    /// Empty where that is no layout of the version's.
    pub samples: Vec<Sample>,
    /// Why it is one, or is none.
    pub reason: String,
    /// Whether the runs on one core beside them took what they took before; `None` where none was timed.
    pub agree: Option<bool>,
}

impl Verdict {
    fn off(reason: String, agree: Option<bool>) -> Verdict {
        Verdict { samples: Vec::new(), reason: format!("off: {reason}"), agree }
    }
}

/// Times one row on all cores, where it takes long enough on one. The two take turns: what disturbs one of them for a
/// while disturbs the other, too.
pub fn wide(sizes: &Sizes, narrow: &[Sample], probe: &mut Probe, one_core: &mut Probe) -> Verdict {
    let (mut samples, mut best, mut agree) = (Vec::new(), None::<(f64, Sample)>, None);
    let (mut end, tolerance) = (Duration::MAX, Tolerance::of(sizes.signature));
    for sample in narrow.iter().filter(|sample| sample.rows == 1 && sample.compute >= WORTH_SPREADING) {
        let all_runs = 2 * (1 + PAIRS);
        if !samples.is_empty() && probe.spent() + one_core.spent() + all_runs * sample.compute > end {
            break;
        }
        // Its threads are begun, and its buffers made, in the first run.
        let answers = sizes
            .row(sizes.extent(sample.length))
            .and_then(|row| Ok((probe.run(&[&row])?, one_core.run(&[&row])?, row)));
        let row = match answers {
            Ok((spread, alone, row)) => {
                let differs = alone.iter().zip(&spread).find_map(|(alone, spread)| tolerance.same(alone, spread).err());
                if let Some(difference) = differs {
                    return Verdict::off(format!("a run on all cores has other answers: {difference}"), Some(true));
                }
                row
            }
            Err(why) => return Verdict::off(format!("a run on all cores fails: {why}"), Some(true)),
        };
        // What takes long is disturbed less.
        let thorough = TRIES * 2 * PAIRS * (1 + LEAST_RUNS) * sample.compute <= DECIDING;
        let timed = match samples.is_empty() && thorough {
            true => best_of(TRIES, &row, probe, one_core),
            false => paired(&row, probe, one_core, |row, probe| once(&[row], probe)),
        };
        if samples.is_empty() {
            end = probe.spent() + one_core.spent() + BUDGET;
        }
        if let Ok(Some(Paired { gain, spread, alone })) = timed {
            agree = Some(agree.unwrap_or(true) && alike(alone, sample.compute));
            samples.push(Sample { compute: spread, ..*sample });
            if best.is_none_or(|(most, _)| gain > most) {
                best = Some((gain, *sample));
            }
        }
    }
    match best {
        None => Verdict::off("a run on all cores could not be timed".into(), None),
        Some((gain, sample)) => {
            let at = of_length(sample.length);
            let told = format!("a row{at} takes 1/{gain:.2} of its time on one");
            if gain < HOPELESS {
                return Verdict::off(format!("on all cores, {told}; expected 1/{HOPELESS} or less"), agree);
            }
            if gain < GAIN {
                let reason = format!("on, if requests show a gain: on all cores, {told}");
                return Verdict { samples, reason, agree };
            }
            Verdict { samples, reason: format!("on: on all cores, {told}"), agree }
        }
    }
}

/// Runs of one row on all cores and on one, in turns.
struct Paired {
    /// The median of how many times as long as on all cores a run on one took.
    gain: f64,
    /// The shortest of each.
    spread: Duration,
    alone: Duration,
}

/// A neighbour on any core takes the gain away, and few can give it: the first of them that shows one, or the best.
fn best_of(tries: u32, row: &[Tensor], probe: &mut Probe, one_core: &mut Probe) -> Result<Option<Paired>, String> {
    let mut best = None::<Paired>;
    for _ in 0..tries {
        let Some(found) = paired(row, probe, one_core, in_a_row)? else { continue };
        if best.as_ref().is_none_or(|best| found.gain > best.gain) {
            best = Some(found);
        }
        if best.as_ref().is_some_and(|best| best.gain >= GAIN) {
            break;
        }
    }
    Ok(best)
}

/// `None` where all were disturbed.
fn paired(
    row: &[Tensor],
    probe: &mut Probe,
    one_core: &mut Probe,
    time: impl Fn(&[Tensor], &mut Probe) -> Result<Option<Duration>, String>,
) -> Result<Option<Paired>, String> {
    let mut found: Vec<(Duration, Duration)> = Vec::new();
    let begun = probe.spent() + one_core.spent();
    for _ in 0..PAIRS {
        if !found.is_empty() && probe.spent() + one_core.spent() - begun > BUDGET {
            break;
        }
        if let (Some(spread), Some(alone)) = (time(row, probe)?, time(row, one_core)?) {
            found.push((spread, alone));
        }
    }
    let ratio = |(spread, alone): &(Duration, Duration)| alone.as_secs_f64() / spread.as_secs_f64().max(1e-9);
    let mut gains: Vec<f64> = found.iter().map(ratio).collect();
    gains.sort_by(f64::total_cmp);
    let shortest = |of: fn(&(Duration, Duration)) -> Duration| found.iter().map(of).min();
    let both = shortest(|pair| pair.0).zip(shortest(|pair| pair.1));
    Ok(both.map(|(spread, alone)| Paired { gain: gains[(gains.len() - 1) / 2], spread, alone }))
}

/// The shortest of a few, but for the first, which finds the other layout's weights in the caches.
fn in_a_row(row: &[Tensor], probe: &mut Probe) -> Result<Option<Duration>, String> {
    probe.run(&[row])?;
    let runs = (0..LEAST_RUNS).map(|_| once(&[row], probe)).collect::<Result<Vec<_>, _>>()?;
    Ok(runs.into_iter().flatten().min())
}

/// What one run took; `None` where it had to wait for a core.
fn once(jobs: &[&[Tensor]], probe: &mut Probe) -> Result<Option<Duration>, String> {
    let (before, waited) = (probe.spent(), waited());
    probe.run(jobs)?;
    let took = probe.spent() - before;
    let waited = self::waited().zip(waited).map_or(Duration::ZERO, |(after, before)| after.saturating_sub(before));
    Ok((took < WORTH_A_LOOK || waited <= took.mul_f64(MOST_WAITED)).then_some(took))
}

/// For people: what a row takes, and what one costs in the best batch, by length.
pub fn told(samples: &[Sample]) -> String {
    let mut lengths: Vec<Option<usize>> = samples.iter().map(|sample| sample.length).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let each = lengths.into_iter().filter_map(|length| {
        let of = || samples.iter().filter(move |sample| sample.length == length);
        let one = of().find(|sample| sample.rows == 1)?;
        let per_row = |sample: &Sample| sample.compute / u32::try_from(sample.rows).unwrap_or(u32::MAX);
        let best = of().min_by_key(|sample| per_row(sample))?;
        let at = of_length(length);
        let alone = format!("a row{at} {}", short(one.compute));
        if best.rows == 1 {
            return Some(alone);
        }
        Some(format!("{alone}, {} each among {}", short(per_row(best)), best.rows))
    });
    let each: Vec<String> = each.collect();
    if each.is_empty() { "not timed".into() } else { each.join("; ") }
}

fn of_length(length: Option<usize>) -> String {
    length.map_or(String::new(), |length| format!(" of length {length}"))
}

fn short(time: Duration) -> String {
    let micros = time.as_secs_f64() * 1e6;
    if micros < 1e3 { format!("{micros:.1} µs") } else { format!("{:.2} ms", micros / 1e3) }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::tests::{probe, signature};
    use super::*;
    use crate::backend::RunError;
    use crate::tensor::{DataType, SequenceAxis};

    /// A probe whose every run takes as long as its rows times its length take microseconds, times `factor`.
    fn clocked(signature: &Signature, factor: f64, refuse: fn(&Tensor) -> bool) -> Probe {
        let work = std::sync::Arc::new(std::sync::Mutex::new(Duration::ZERO));
        let probe = probe(signature, {
            let work = work.clone();
            move |inputs| {
                if refuse(&inputs[0]) {
                    return Err(RunError::InvalidArgument("too long".into()));
                }
                let elements = inputs[0].shape().elements() as f64;
                *work.lock().unwrap() += Duration::from_secs_f64(elements * factor * 1e-6);
                Ok(inputs.to_vec())
            }
        });
        let begun = Instant::now();
        probe.with_clock(move || begun + *work.lock().unwrap())
    }

    fn ragged() -> Ragged {
        let axis = SequenceAxis { axis: 1, fill: Box::new([0; 8]) };
        Ragged { inputs: vec![Some(axis)], outputs: vec![vec![1]], even: false }
    }

    #[test]
    fn rows_are_timed_up_to_the_preferred_ones_and_lengths_where_they_may_differ() {
        let fixed = signature(&[("x", DataType::Fp32, &[-1, 4])], &[("y", DataType::Fp32, &[-1, 4])]);
        let sizes = Sizes { signature: &fixed, most_rows: 20, ragged: None };
        let samples = narrow(&sizes, &mut clocked(&fixed, 1.0, |_| false));
        let expected = [1, 2, 4, 8, 16, 20].map(|rows| Sample {
            rows,
            length: None,
            compute: Duration::from_micros(rows as u64 * 4),
        });
        assert_eq!(samples, expected);
        assert_eq!(told(&samples), "a row 4.0 µs");

        let free = signature(&[("x", DataType::Int64, &[-1, -1])], &[("y", DataType::Int64, &[-1, -1])]);
        let unbatched = Sizes { signature: &free, most_rows: 1, ragged: Some(&ragged()) };
        let samples = narrow(&unbatched, &mut clocked(&free, 1.0, |x| x.shape().dims()[1] > 100));
        assert_eq!(samples.iter().map(|sample| sample.length.unwrap()).collect::<Vec<_>>(), [16, 32, 64]);
        // An image of any size, but for those whose sides are not told apart: by what a row holds.
        let image = signature(&[("x", DataType::Fp32, &[-1, -1, -1])], &[("y", DataType::Fp32, &[-1, -1, -1])]);
        let sizes = Sizes { signature: &image, most_rows: 1, ragged: None };
        let samples = narrow(&sizes, &mut clocked(&image, 0.01, |x| x.shape().dims()[1] == 32));
        let expected = [16, 64, 128, 224, 256, 512].map(|side| Some(side * side));
        assert_eq!(samples.iter().map(|sample| sample.length).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_would_take_longer_than_is_left_is_not_begun() {
        let free = signature(&[("x", DataType::Int64, &[-1, -1])], &[("y", DataType::Int64, &[-1, -1])]);
        let sizes = Sizes { signature: &free, most_rows: 32, ragged: Some(&ragged()) };
        let mut probe = clocked(&free, 100.0, |_| false);
        let samples = narrow(&sizes, &mut probe);
        assert!(samples.len() > 4 && samples.iter().any(|sample| sample.length == Some(64)), "{samples:?}");
        assert!(probe.spent() <= BUDGET, "{:?}", probe.spent());
        // One that takes longer than all that is timed once, since nothing was known of it.
        let mut slow = clocked(&free, 1e5, |_| false);
        assert_eq!(narrow(&sizes, &mut slow).len(), 1);
        assert_eq!(slow.spent(), Duration::from_millis(1600), "one run");
    }

    #[test]
    fn a_layout_on_all_cores_must_be_faster_and_answer_alike() {
        let fixed = signature(&[("x", DataType::Fp32, &[-1, 4])], &[("y", DataType::Fp32, &[-1, 4])]);
        let sizes = Sizes { signature: &fixed, most_rows: 1, ragged: None };
        let on_one = || clocked(&fixed, 100.0, |_| false);
        let times = narrow(&sizes, &mut on_one());
        assert!(may_gain(&times));
        let Verdict { samples, reason, .. } =
            wide(&sizes, &times, &mut clocked(&fixed, 60.0, |_| false), &mut on_one());
        assert_eq!(
            (samples[0].compute, &*reason),
            (Duration::from_micros(240), "on: on all cores, a row takes 1/1.67 of its time on one")
        );
        let Verdict { samples, reason, .. } =
            wide(&sizes, &times, &mut clocked(&fixed, 95.0, |_| false), &mut on_one());
        assert!(samples.len() == 1 && reason.starts_with("on, if requests show a gain: on all cores"), "{reason}");
        let Verdict { samples, reason, .. } =
            wide(&sizes, &times, &mut clocked(&fixed, 130.0, |_| false), &mut on_one());
        assert!(samples.is_empty() && reason.starts_with("off: on all cores, a row takes 1/0.77"), "{reason}");
        let mut other = probe(&fixed, |inputs| Ok(vec![inputs[0].truncated(1, 3).unwrap()]));
        let Verdict { samples, reason, .. } = wide(&sizes, &times, &mut other, &mut on_one());
        assert!(samples.is_empty() && reason.contains("other answers"), "{reason}");
        // However long a row takes, and whether what it took before was disturbed.
        let slow = |factor| clocked(&fixed, factor, |_| false);
        let times = narrow(&sizes, &mut slow(1e5));
        let verdict = wide(&sizes, &times, &mut slow(5e4), &mut slow(1e5));
        assert!(verdict.reason.starts_with("on: ") && verdict.agree == Some(true), "{}", verdict.reason);
        let verdict = wide(&sizes, &times, &mut slow(5e4), &mut slow(7e4));
        assert!(verdict.reason.starts_with("on: ") && verdict.agree == Some(false), "{}", verdict.reason);
        assert!(agree(&sizes, &times, &mut slow(1e5)) && !agree(&sizes, &times, &mut slow(7e4)));
        let quick = narrow(&sizes, &mut clocked(&fixed, 1.0, |_| false));
        assert!(!may_gain(&quick));
    }
}
