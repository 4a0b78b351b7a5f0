//! When a version's runs are timed, and when that was done before and is remembered.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::calibrate::{self, Calibration, Sizes};
use super::model_config::ModelConfig;
use super::placement::{Placed, Site};
use super::probe::Probe;
use super::remembered::{self, Key, Remembered};
use super::view;
use crate::backend::Device;
use crate::scheduler::{Gate, Sample, Wide};

/// How long a timing waits for other loads to step aside, once for each that does not; none that meets another counts by
/// itself.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a load steps aside. A model of slow runs may be timed for longer, and an engine may hang.
const STEPS_ASIDE: Duration = Duration::from_secs(2);

pub struct Timing {
    on: bool,
    remembered: Option<Remembered>,
    machine: String,
    /// One version is timed at a time: two would measure each other.
    turn: Mutex<()>,
    loads: Mutex<Loads>,
    /// Told when a load ends or waits, and when a timing ends.
    changed: Condvar,
}

/// Loads that are under way, and wait neither for their turn to be timed nor for another's to end.
#[derive(Default)]
struct Loads {
    busy: usize,
    begun: u64,
    /// Of the busy ones, those that were waited for in vain.
    stuck: usize,
    /// One is timed, or about to be.
    timed: bool,
}

/// A load under way, until it is dropped.
pub struct UnderWay<'a>(&'a Timing);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.pause();
    }
}

/// The only timing.
struct Turn<'a> {
    timing: &'a Timing,
    _turn: MutexGuard<'a, ()>,
    /// How many loads had begun, where no other was under way.
    quiet: Option<u64>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut loads = self.timing.loads();
        loads.timed = false;
        loads.busy += 1;
        drop(loads);
        self.timing.changed.notify_all();
    }
}

impl Turn<'_> {
    /// Whether no other load was under way all the time.
    fn was_alone(&self) -> bool {
        self.quiet == Some(self.timing.loads().begun)
    }
}

/// A version on one device, and what it is timed with.
pub struct Subject<'a> {
    pub site: &'a Site<'a>,
    pub config: &'a ModelConfig,
    pub digest: &'a str,
    pub placed: &'a Placed,
    pub sizes: Sizes<'a>,
    pub gate: &'a Arc<Gate>,
}

/// What became known of a version on one device.
#[derive(Default)]
pub struct Timed {
    pub costs: Vec<Sample>,
    pub wide: Option<Wide>,
    /// For people; empty for a GPU.
    pub told: String,
    pub wide_told: String,
}

impl Timing {
    pub fn new(on: bool, remembered: Option<Remembered>, cores: usize) -> Timing {
        let machine = if on { remembered::machine(cores) } else { String::new() };
        let (turn, loads, changed) = (Mutex::default(), Mutex::default(), Condvar::new());
        Timing { on, remembered, machine, turn, loads, changed }
    }

    /// What a load says of itself, so that no timing beside it is taken for an undisturbed one.
    pub fn under_way(&self) -> UnderWay<'_> {
        self.resume();
        UnderWay(self)
    }

    /// Between two steps of a load that is under way: waits until none is timed.
    pub fn give_way(&self) {
        let timed = self.loads().timed;
        if timed {
            self.pause();
            self.resume();
        }
    }

    fn loads(&self) -> MutexGuard<'_, Loads> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Once none is timed, as a rule.
    fn resume(&self) {
        let waited = self.changed.wait_timeout_while(self.loads(), STEPS_ASIDE, |loads| loads.timed);
        let (mut loads, _) = waited.unwrap_or_else(PoisonError::into_inner);
        loads.busy += 1;
        loads.begun += 1;
    }

    fn pause(&self) {
        let mut loads = self.loads();
        loads.busy = loads.busy.saturating_sub(1);
        loads.stuck = loads.stuck.min(loads.busy);
        self.changed.notify_all();
    }

    /// For a load that is under way. While it waits it disturbs nobody.
    fn turn(&self) -> Turn<'_> {
        self.pause();
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.loads().timed = true;
        let waited = self.changed.wait_timeout_while(self.loads(), PATIENCE, |loads| loads.busy > loads.stuck);
        let (mut loads, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let alone = loads.busy == 0;
        loads.stuck = loads.busy;
        Turn { timing: self, _turn: turn, quiet: alone.then_some(loads.begun) }
    }

    /// Not on GPUs: there is no idle one to measure on, and their times are learned soon enough.
    pub fn time(&self, subject: &Subject, probe: &mut Probe) -> Timed {
        if subject.placed.device != Device::Cpu {
            return Timed::default();
        }
        if !self.on {
            let told = "not timed: switched off by the configuration";
            return Timed { told: told.into(), wide_told: format!("off: {told}"), ..Timed::default() };
        }
        let key = self.key(subject);
        if let Some(known) = self.remembered.as_ref().and_then(|remembered| remembered.recall(&key)) {
            return subject.again(known);
        }
        let (calibration, wide, certain) = subject.measure(self, probe);
        if let Some(remembered) = self.remembered.as_ref().filter(|_| certain) {
            remembered.keep(&key, &calibration);
        }
        let (wide, failed) = split(wide);
        Timed::of(calibration, wide, failed, "timed at this load")
    }

    fn key(&self, subject: &Subject) -> Key {
        let Subject { site, config, digest, placed, sizes, .. } = subject;
        let (engine, settings) = (site.backend, remembered::hex(format!("{config:?}").as_bytes()));
        Key(format!(
            "tidegate {}\nformat {}\nmodel {digest}\nengine {} {}\nmachine {}\nplan {}\nrows {}\nlengths {}\nsettings {settings}",
            env!("CARGO_PKG_VERSION"),
            remembered::FORMAT,
            engine.name(),
            engine.version(),
            self.machine,
            placed.plan,
            sizes.most_rows,
            sizes.ragged.is_some(),
        ))
    }
}

impl Subject<'_> {
    /// The last says whether it is worth remembering.
    fn measure(&self, timing: &Timing, probe: &mut Probe) -> (Calibration, Made, bool) {
        let turn = timing.turn();
        let narrow = calibrate::narrow(&self.sizes, probe);
        let mut calibration = Calibration { narrow, ..Calibration::default() };
        if !calibrate::may_gain(&calibration.narrow) {
            let why = if calibration.narrow.is_empty() { "nothing could be timed" } else { "a row takes too little" };
            calibration.wide_reason = format!("off: {why}");
            let certain = turn.was_alone() || calibrate::agree(&self.sizes, &calibration.narrow, probe);
            return (calibration.clone(), Ok(None), certain && !calibration.narrow.is_empty());
        }
        let alone = turn.was_alone();
        drop(turn);
        // Others may be timed while another session is made.
        let mut spread = match self.spread() {
            Ok(spread) => spread,
            Err(why) => {
                calibration.wide_reason = why;
                let turn = (!alone).then(|| timing.turn());
                let certain = turn.is_none() || calibrate::agree(&self.sizes, &calibration.narrow, probe);
                return (calibration, Ok(None), certain);
            }
        };
        let turn = timing.turn();
        let verdict = calibrate::wide(&self.sizes, &calibration.narrow, &mut spread, probe);
        let certain = verdict.agree.is_some_and(|agree| agree || alone && turn.was_alone());
        drop(turn);
        (calibration.wide, calibration.wide_reason) = (verdict.samples, verdict.reason);
        let wide =
            if calibration.wide.is_empty() { Ok(None) } else { self.layout(spread, &calibration.wide).map(Some) };
        (calibration, wide, certain)
    }

    /// As it was measured before.
    fn again(&self, known: Calibration) -> Timed {
        let wide = if known.wide.is_empty() { Ok(None) } else { self.wide_again(&known.wide).map(Some) };
        let (wide, failed) = split(wide);
        Timed::of(known, wide, failed, "remembered from an earlier load")
    }

    fn wide_again(&self, costs: &[Sample]) -> Result<Wide, String> {
        let mut spread = self.spread()?;
        // Its threads and buffers are there before the first request.
        let row = calibrate::row_of(&self.sizes, costs);
        let _ = row.and_then(|row| spread.run(&[&row]));
        self.layout(spread, costs)
    }

    fn spread(&self) -> Result<Probe, String> {
        let model = view::of(self.site.load_wide(self.placed)?, self.config);
        Probe::new(model, self.gate, self.site.cores).map_err(|error| format!("off: {error}"))
    }

    fn layout(&self, spread: Probe, costs: &[Sample]) -> Made<Wide> {
        let instance = spread.into_instance().map_err(|error| format!("off: {error}"))?;
        Ok(Wide { instance, cores: self.site.cores, costs: costs.to_vec() })
    }
}

/// The wide layout, or why what was measured to gain is not there.
type Made<T = Option<Wide>> = Result<T, String>;

fn split(made: Made) -> (Option<Wide>, Option<String>) {
    made.map_or_else(|why| (None, Some(why)), |wide| (wide, None))
}

impl Timed {
    fn of(calibration: Calibration, wide: Option<Wide>, failed: Option<String>, when: &str) -> Timed {
        let Calibration { narrow, wide_reason, .. } = calibration;
        let told = format!("{} ({when})", calibrate::told(&narrow));
        Timed { told, wide_told: failed.unwrap_or(wide_reason), wide, costs: narrow }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_load_steps_aside_for_one_that_is_timed() {
        let timing = Timing::new(false, None, 1);
        let (_timed, (ask, asked), (say, said)) = (timing.under_way(), mpsc::channel(), mpsc::channel());
        std::thread::scope(|scope| {
            let timing = &timing;
            scope.spawn(move || {
                let _other = timing.under_way();
                say.send("begun").unwrap();
                asked.recv().unwrap();
                timing.give_way();
                say.send("went on").unwrap();
            });
            assert_eq!(said.recv(), Ok("begun"));
            let asking = scope.spawn(move || {
                while !timing.loads().timed {
                    std::thread::yield_now();
                }
                ask.send(()).unwrap();
            });
            let turn = timing.turn();
            asking.join().unwrap();
            assert!(turn.quiet.is_some() && turn.was_alone(), "it did not wait until the other had stepped aside");
            assert!(said.try_recv().is_err());
            drop(turn);
            assert_eq!(said.recv(), Ok("went on"));
        });
    }

    #[test]
    fn one_that_does_not_step_aside_is_waited_for_once() {
        let timing = Timing::new(false, None, 1);
        let (_timed, stubborn) = (timing.under_way(), timing.under_way());
        let first = timing.turn();
        assert!(!first.was_alone());
        drop(first);
        assert_eq!(timing.loads().stuck, 1);
        let second = timing.turn();
        assert!(!second.was_alone());
        drop(stubborn);
        assert_eq!(timing.loads().stuck, 0);
        drop(second);
        assert!(timing.turn().was_alone());
    }
}
