//! When a version's runs are timed, and when that was done before and is remembered.

use std::sync::{Arc, Mutex, PoisonError};

use super::calibrate::{self, Calibration, Sizes};
use super::model_config::ModelConfig;
use super::placement::{Placed, Site};
use super::probe::Probe;
use super::remembered::{self, Key, Remembered};
use super::view;
use crate::backend::Device;
use crate::scheduler::{Gate, Sample, Wide};

pub struct Timing {
    on: bool,
    remembered: Option<Remembered>,
    machine: String,
    /// One version is timed at a time: two would measure each other.
    turn: Mutex<()>,
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
        Timing { on, remembered, machine, turn: Mutex::default() }
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
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (calibration, wide, certain) = subject.measure(probe);
        drop(turn);
        if let Some(remembered) = self.remembered.as_ref().filter(|_| certain) {
            remembered.keep(&key, &calibration);
        }
        Timed::of(calibration, wide, "timed at this load")
    }

    fn key(&self, subject: &Subject) -> Key {
        let Subject { site, config, digest, placed, sizes, .. } = subject;
        let (engine, settings) = (site.backend, remembered::hex(format!("{config:?}").as_bytes()));
        Key(format!(
            "tidegate {}\nmodel {digest}\nengine {} {}\nmachine {}\nplan {}\nrows {}\nlengths {}\nsettings {settings}",
            env!("CARGO_PKG_VERSION"),
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
    fn measure(&self, probe: &mut Probe) -> (Calibration, Option<Wide>, bool) {
        let narrow = calibrate::narrow(&self.sizes, probe);
        let mut calibration = Calibration { narrow, ..Calibration::default() };
        if !calibrate::may_gain(&calibration.narrow) {
            let why = if calibration.narrow.is_empty() { "nothing could be timed" } else { "a row takes too little" };
            calibration.wide_reason = format!("off: {why}");
            let certain = !calibration.narrow.is_empty();
            return (calibration, None, certain);
        }
        let mut spread = match self.spread() {
            Ok(spread) => spread,
            Err(why) => {
                calibration.wide_reason = why;
                return (calibration, None, true);
            }
        };
        let timed = calibrate::wide(&self.sizes, &calibration.narrow, &mut spread, probe);
        (calibration.wide, calibration.wide_reason) = timed;
        let wide = (!calibration.wide.is_empty()).then(|| self.layout(spread, &calibration.wide)).flatten();
        (calibration, wide, true)
    }

    /// As it was measured before.
    fn again(&self, known: Calibration) -> Timed {
        let mut wide = None;
        if !known.wide.is_empty()
            && let Ok(mut spread) = self.spread()
        {
            // Its threads and buffers are there before the first request.
            let row = calibrate::row_of(&self.sizes, &known.wide);
            let _ = row.and_then(|row| spread.run(&[&row]));
            wide = self.layout(spread, &known.wide);
        }
        Timed::of(known, wide, "remembered from an earlier load")
    }

    fn spread(&self) -> Result<Probe, String> {
        let model = view::of(self.site.load_wide(self.placed)?, self.config);
        Probe::new(model, self.gate, self.site.cores).map_err(|error| format!("off: {error}"))
    }

    fn layout(&self, spread: Probe, costs: &[Sample]) -> Option<Wide> {
        let instance = spread.into_instance().ok()?;
        Some(Wide { instance, cores: self.site.cores, costs: costs.to_vec() })
    }
}

impl Timed {
    fn of(calibration: Calibration, wide: Option<Wide>, when: &str) -> Timed {
        let Calibration { narrow, wide_reason, .. } = calibration;
        Timed { told: format!("{} ({when})", calibrate::told(&narrow)), wide_told: wide_reason, wide, costs: narrow }
    }
}
