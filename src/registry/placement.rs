//! Where a version's instances run: what its settings ask for, held against the GPUs that there are and what the engine
//! can do with them. One model is loaded for each device.
//!
//! A GPU that cannot be used fails the version, unless its group may fall back: then the whole group runs on the CPU, and
//! the version says so wherever it says on which device it runs.

use std::sync::Arc;

use super::model_config::MAX_INSTANCES;
use crate::backend::{Artifact, Backend, Device, LoadError, LoadOptions, Model, gpus};
use crate::scheduler::{MAX_COPIED_WEIGHTS_BYTES, Reason, ThreadPlan, Wish};

/// Instances that are configured together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InstanceGroup {
    pub devices: Devices,
    /// On each device; `None`: planned.
    pub count: Option<usize>,
    /// On the CPU where a GPU of the group cannot be used.
    pub fallback: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Devices {
    /// At least one.
    Listed(Vec<Device>),
    EveryGpu,
    /// Every GPU; where there is none, or one cannot be used, the CPU.
    Auto,
}

impl Default for Devices {
    fn default() -> Devices {
        Devices::Listed(vec![Device::Cpu])
    }
}

impl Devices {
    /// As `model.toml` has them.
    pub fn parse(text: &str) -> Option<Devices> {
        let one = |device| Some(Devices::Listed(vec![device]));
        match text {
            "cpu" => one(Device::Cpu),
            "cuda" => one(Device::Cuda(0)),
            "cuda:all" => Some(Devices::EveryGpu),
            "auto" => Some(Devices::Auto),
            _ => {
                let number = text.strip_prefix("cuda:").filter(|number| number.bytes().all(|c| c.is_ascii_digit()))?;
                one(Device::Cuda(number.parse().ok()?))
            }
        }
    }
}

/// What is loaded where.
pub struct Placement {
    /// In the order of the groups, the CPU last; at least one.
    pub devices: Vec<Placed>,
    /// Why these.
    pub reason: String,
    pub warnings: Vec<String>,
}

/// A version on one device.
pub struct Placed {
    pub model: Arc<dyn Model>,
    pub device: Device,
    pub plan: ThreadPlan,
}

impl Placed {
    /// What a run takes from the compute gate.
    pub fn cores(&self) -> usize {
        match self.device {
            Device::Cpu => self.plan.threads,
            Device::Cuda(_) => 0,
        }
    }
}

/// What a version is loaded with, and the machine it is loaded on.
pub struct Site<'a> {
    pub backend: &'a dyn Backend,
    pub artifact: &'a Artifact,
    pub cores: usize,
    /// How many GPUs there are, or why that is not known.
    pub gpus: fn() -> Result<u32, String>,
    /// Intra-op threads of one instance, as configured.
    pub threads: Option<usize>,
}

/// Instances asked for on one device; `None`: planned.
struct Asked {
    model: Arc<dyn Model>,
    device: Device,
    count: Option<usize>,
}

impl Site<'_> {
    /// Loads the model for every device that the groups name. `file`: where they stand.
    pub fn place(&self, groups: &[InstanceGroup], file: &str) -> Result<Placement, LoadError> {
        let mut placed = Placing { gpus: Vec::new(), cpu: None, why: Vec::new(), warnings: Vec::new() };
        if groups.is_empty() {
            placed.on_cpu(None);
        }
        for group in groups {
            self.place_group(group, &mut placed)?;
        }
        let mut devices: Vec<Placed> = placed.gpus.into_iter().map(|asked| self.planned_on_gpu(asked)).collect();
        if let Some(count) = placed.cpu {
            devices.push(self.on_cpu(count)?);
        }
        let reason = match (placed.why.is_empty(), groups.is_empty()) {
            (false, _) => placed.why.join("; "),
            (true, true) => "by default".into(),
            (true, false) => format!("named in {file}"),
        };
        Ok(Placement { devices, reason, warnings: placed.warnings })
    }

    fn place_group(&self, group: &InstanceGroup, placed: &mut Placing) -> Result<(), LoadError> {
        let devices = match self.devices(&group.devices) {
            Ok(devices) => devices,
            Err(why) if group.devices == Devices::Auto => {
                placed.on_cpu(group.count);
                placed.why.push(format!("auto: {why}"));
                return Ok(());
            }
            Err(why) => return placed.fall_back(group, LoadError::Unavailable(no_gpu(&why))),
        };
        // All or none: a group that falls back does so as a whole.
        let mut loaded = Vec::new();
        for device in devices.iter().copied().filter(|device| *device != Device::Cpu) {
            match placed.on(device).map_or_else(|| self.load_on_gpu(device), Ok) {
                Ok(model) => loaded.push(Asked { model, device, count: group.count }),
                Err(error) => return placed.fall_back(group, error),
            }
        }
        loaded.into_iter().try_for_each(|asked| placed.on_gpu(asked))?;
        if devices.contains(&Device::Cpu) {
            placed.on_cpu(group.count);
        }
        Ok(())
    }

    /// The same on the CPU with all cores for every run. The error says why that is not to be tried.
    pub fn load_wide(&self, placed: &Placed) -> Result<Arc<dyn Model>, String> {
        let off = |why: &str| Err(format!("off: {why}"));
        if self.cores < 2 {
            return off("there is one core");
        }
        if placed.plan.reason != Reason::OnePerCore {
            return off("instances and threads are given, or follow from the size of the weights");
        }
        if !self.backend.spreads_runs() {
            return off("the engine runs on one core");
        }
        if self.artifact.bytes > MAX_COPIED_WEIGHTS_BYTES / 2 {
            return off("the weights would be in memory twice, and are too large for that");
        }
        let options = LoadOptions { device: Device::Cpu, threads: self.cores };
        self.backend.load(self.artifact, &options).map_err(|error| format!("off: {error}"))
    }

    /// The error says that there is no GPU.
    fn devices(&self, devices: &Devices) -> Result<Vec<Device>, String> {
        match devices {
            Devices::Listed(devices) => Ok(devices.clone()),
            Devices::EveryGpu | Devices::Auto => match (self.gpus)() {
                Ok(count) if count > 0 => Ok((0..count).map(Device::Cuda).collect()),
                none => Err(gpus::told(&none)),
            },
        }
    }

    fn load_on_gpu(&self, device: Device) -> Result<Arc<dyn Model>, LoadError> {
        let threads = ThreadPlan::on_gpu(self.cores, None, self.threads).threads;
        self.backend.load(self.artifact, &LoadOptions { device, threads })
    }

    fn planned_on_gpu(&self, Asked { model, device, count }: Asked) -> Placed {
        Placed { model, device, plan: ThreadPlan::on_gpu(self.cores, count, self.threads) }
    }

    fn on_cpu(&self, instances: Option<usize>) -> Result<Placed, LoadError> {
        let loaded_with = |threads| LoadOptions { device: Device::Cpu, threads };
        // Where nothing is said of threads, one each is what is planned unless copies of the weights are in the way.
        let share = self.backend.instances_share_weights(self.artifact, &loaded_with(self.threads.unwrap_or(1)));
        let wish = Wish {
            instances,
            threads: self.threads,
            weights_bytes: self.artifact.bytes,
            instances_share_weights: share,
        };
        let plan = ThreadPlan::new(self.cores, &wish);
        let model = self.backend.load(self.artifact, &loaded_with(plan.threads))?;
        Ok(Placed { model, device: Device::Cpu, plan })
    }
}

/// What has been placed so far.
struct Placing {
    gpus: Vec<Asked>,
    /// Instances on the CPU, if there are to be any.
    cpu: Option<Option<usize>>,
    why: Vec<String>,
    warnings: Vec<String>,
}

impl Placing {
    fn on(&self, device: Device) -> Option<Arc<dyn Model>> {
        self.gpus.iter().find(|asked| asked.device == device).map(|asked| Arc::clone(&asked.model))
    }

    /// Groups add up to no more than one may have: on a GPU there are no cores to bound them.
    fn on_gpu(&mut self, asked: Asked) -> Result<(), LoadError> {
        let Some(there) = self.gpus.iter_mut().find(|there| there.device == asked.device) else {
            self.gpus.push(asked);
            return Ok(());
        };
        // One that is not counted is one.
        let count = there.count.unwrap_or(1) + asked.count.unwrap_or(1);
        if i64::try_from(count).is_ok_and(|count| count <= MAX_INSTANCES) {
            there.count = Some(count);
            return Ok(());
        }
        let (device, expected) = (asked.device, format!("at most {MAX_INSTANCES} of all groups"));
        Err(LoadError::Unavailable(format!("device `{device}`: {count} instances, expected {expected}")))
    }

    /// Where one group leaves the number to the plan, the plan decides.
    fn on_cpu(&mut self, count: Option<usize>) {
        self.cpu = Some(match self.cpu {
            None => count,
            Some(there) => there.zip(count).map(|(there, more)| there + more),
        });
    }

    /// Only what is not there may be replaced: a model that is refused would be on any device.
    fn fall_back(&mut self, group: &InstanceGroup, error: LoadError) -> Result<(), LoadError> {
        match error {
            LoadError::Unavailable(why) if group.fallback || group.devices == Devices::Auto => {
                self.on_cpu(group.count);
                self.warnings.push(format!("runs on the CPU in a GPU's place: {why}"));
                self.why.push(format!("in a GPU's place: {why}"));
                Ok(())
            }
            error => Err(error),
        }
    }
}

fn no_gpu(why: &str) -> String {
    format!("`cuda:all`: {why}, expected a GPU or more; use `device = \"auto\"`, or `device_fallback = \"cpu\"`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Description;
    use crate::backend::fake::Fake;

    const NO_GPU: fn() -> Result<u32, String> = || Err("no NVIDIA driver was found".into());

    /// What is placed with so many GPUs that the fake engine can use, and those that the driver shows.
    fn place(fake: &Fake, gpus: fn() -> Result<u32, String>, groups: &[InstanceGroup]) -> Result<Placement, LoadError> {
        let description = Arc::new(Description::Onnx(Default::default()));
        let artifact = Artifact { path: "m".into(), bytes: 1, description };
        let site = Site { backend: fake, artifact: &artifact, cores: 4, gpus, threads: None };
        site.place(groups, "model.toml")
    }

    fn group(devices: &str, count: Option<usize>) -> InstanceGroup {
        InstanceGroup { devices: Devices::parse(devices).unwrap(), count, fallback: false }
    }

    fn or_cpu(devices: &str, count: Option<usize>) -> InstanceGroup {
        InstanceGroup { fallback: true, ..group(devices, count) }
    }

    /// Devices with the instances on each.
    fn placed(placement: &Placement) -> Vec<(String, usize)> {
        placement.devices.iter().map(|placed| (placed.device.to_string(), placed.plan.instances)).collect()
    }

    fn on(devices: &[(&str, usize)]) -> Vec<(String, usize)> {
        devices.iter().map(|(device, count)| (device.to_string(), *count)).collect()
    }

    #[test]
    fn every_group_is_placed_and_those_of_one_device_add_up() {
        let two = Fake::echo(1).with_gpus(2);
        type Case<'a> = (&'a [InstanceGroup], &'a [(&'a str, usize)]);
        let cases: &[Case] = &[
            (&[], &[("cpu", 4)]),
            (&[group("cpu", Some(2))], &[("cpu", 2)]),
            (&[group("cuda:1", None)], &[("cuda:1", 1)]),
            (&[group("cuda:1", Some(9)), group("cuda:1", None)], &[("cuda:1", 10)]),
            (&[group("cpu", Some(1)), group("cuda", Some(2)), group("cpu", Some(2))], &[("cuda:0", 2), ("cpu", 3)]),
            (&[group("cpu", Some(1)), group("cpu", None)], &[("cpu", 4)]),
            (&[group("cuda:all", Some(2))], &[("cuda:0", 2), ("cuda:1", 2)]),
            (&[group("auto", None)], &[("cuda:0", 1), ("cuda:1", 1)]),
            (&[or_cpu("cuda:1", None)], &[("cuda:1", 1)]),
        ];
        for (groups, expected) in cases {
            let placement = place(&two, || Ok(2), groups).unwrap_or_else(|error| panic!("{groups:?}: {error}"));
            assert_eq!(placed(&placement), on(expected), "{groups:?}");
            let reason = if groups.is_empty() { "by default" } else { "named in model.toml" };
            assert_eq!((placement.reason.as_str(), placement.warnings.is_empty()), (reason, true), "{groups:?}");
        }
        let both = place(&two, || Ok(2), &[group("cuda", None), group("cpu", Some(1))]).unwrap().devices;
        assert_eq!((both[0].cores(), both[1].cores()), (0, 1), "a run on a GPU takes no core");
        assert_eq!(both[0].plan.reason, Reason::OnePerGpu);
    }

    #[test]
    fn a_device_that_is_not_there_is_refused() {
        let refusal = |devices: &str, gpus| match place(&Fake::echo(1).with_gpus(1), gpus, &[group(devices, None)]) {
            Err(LoadError::Unavailable(why)) => why,
            Err(other) => panic!("{devices}: {other:?}"),
            Ok(placement) => panic!("{devices}: {:?}", placed(&placement)),
        };
        assert_eq!(refusal("cuda:1", || Ok(1)), "device `cuda:1` cannot be used: the fake engine has 1 GPUs");
        assert_eq!(refusal("cuda:all", || Ok(2)), "device `cuda:1` cannot be used: the fake engine has 1 GPUs");
        let none = "`cuda:all`: no NVIDIA driver was found, expected a GPU or more; ";
        assert!(refusal("cuda:all", NO_GPU).starts_with(none), "{}", refusal("cuda:all", NO_GPU));
        assert!(refusal("cuda:all", || Ok(0)).contains("shows no GPU"));
    }

    #[test]
    fn groups_of_one_gpu_add_up_to_a_bound() {
        let one = Fake::echo(1).with_gpus(1);
        let full = [group("cuda", Some(200)), or_cpu("cuda", Some(56))];
        assert_eq!(placed(&place(&one, || Ok(1), &full).unwrap()), on(&[("cuda:0", 256)]));
        let more = [&full[..], &[or_cpu("cuda", None)]].concat();
        let refused = place(&one, || Ok(1), &more).err().unwrap().to_string();
        assert_eq!(refused, "device `cuda:0`: 257 instances, expected at most 256 of all groups");
    }

    #[test]
    fn a_group_that_may_falls_back_as_a_whole_and_says_so() {
        let one = Fake::echo(1).with_gpus(1);
        let place = |gpus, groups: &[InstanceGroup]| place(&one, gpus, groups).unwrap();
        let fallen = |gpus, groups: &[InstanceGroup], expected: &[(&str, usize)]| {
            let placement = place(gpus, groups);
            assert_eq!(placed(&placement), on(expected), "{groups:?}");
            let [warning] = &placement.warnings[..] else { panic!("{groups:?}: {:?}", placement.warnings) };
            assert!(warning.starts_with("runs on the CPU in a GPU's place: "), "{warning}");
            assert!(placement.reason.starts_with("in a GPU's place: "), "{}", placement.reason);
        };
        fallen(|| Ok(1), &[or_cpu("cuda:1", None)], &[("cpu", 4)]);
        fallen(|| Ok(1), &[or_cpu("cuda:1", Some(2)), group("cpu", Some(1))], &[("cpu", 3)]);
        fallen(|| Ok(1), &[group("cuda:0", None), or_cpu("cuda:1", Some(2))], &[("cuda:0", 1), ("cpu", 2)]);
        fallen(|| Ok(2), &[or_cpu("cuda:all", Some(2))], &[("cpu", 2)]);
        fallen(NO_GPU, &[or_cpu("cuda:all", Some(2))], &[("cpu", 2)]);
        // There are GPUs that the engine cannot use: worth a warning, unlike a machine that has none.
        fallen(|| Ok(2), &[group("auto", Some(2))], &[("cpu", 2)]);
        for none in [NO_GPU, || Ok(0)] {
            let placement = place(none, &[group("auto", Some(2))]);
            assert_eq!((placed(&placement), placement.warnings.len()), (on(&[("cpu", 2)]), 0));
            assert!(placement.reason.starts_with("auto: "), "{}", placement.reason);
        }
    }
}
