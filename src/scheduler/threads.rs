//! How many instances of a model run at once and with how many threads each. Pure: cores and wishes in, plan out.
//!
//! Invariant: on the CPU, instances × threads ≤ cores. One thread per instance is the default, because several requests
//! side by side use cores better than one request spread over them, and an engine without a thread pool never spins.
//! On a GPU one instance is the default: a second one costs the weights once more and shares the same device.

use std::fmt;

/// Bytes that the copies of one model's weights may take together before the plan prefers fewer, wider instances.
pub const MAX_COPIED_WEIGHTS_BYTES: u64 = 512 << 20;

/// What is known and wanted of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// As configured.
    pub instances: Option<usize>,
    /// Intra-op threads of one instance, as configured.
    pub threads: Option<usize>,
    /// Size of the weights on disk, in bytes.
    pub weights_bytes: u64,
    /// Another instance costs little memory.
    pub instances_share_weights: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadPlan {
    /// Instances at most; they are made as load asks for them.
    pub instances: usize,
    /// Intra-op threads of each.
    pub threads: usize,
    pub reason: Reason,
}

/// Why a plan is as it is, for `inspect`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// One single-threaded instance per core.
    OnePerCore,
    /// Each instance holds its own copy of the weights, and one per core would take too much memory.
    CopiesTooLarge {
        weights_bytes: u64,
    },
    /// One instance on a GPU.
    OnePerGpu,
    Configured,
    /// The configuration asks for more than there is.
    ConfiguredBeyondCores {
        cores: usize,
    },
}

impl ThreadPlan {
    /// `cores`: what this process may use (`std::thread::available_parallelism` honours affinity and cgroup quotas).
    pub fn new(cores: usize, wish: &Wish) -> ThreadPlan {
        let cores = cores.max(1);
        let affordable = affordable_instances(cores, wish);
        let (instances, threads) = match (wish.instances, wish.threads) {
            (None, None) => (affordable, cores / affordable),
            (Some(instances), None) if affordable == cores => (instances, 1),
            (Some(instances), None) => (instances, (cores / instances.max(1)).max(1)),
            (None, Some(threads)) => (affordable.min(cores / threads.clamp(1, cores)), threads),
            (Some(instances), Some(threads)) => (instances, threads),
        };
        let fitting_threads = threads.clamp(1, cores);
        let fitting_instances = instances.clamp(1, cores / fitting_threads);
        let reason = if wish.instances.is_none() && wish.threads.is_none() {
            if affordable == cores {
                Reason::OnePerCore
            } else {
                Reason::CopiesTooLarge { weights_bytes: wish.weights_bytes }
            }
        } else if fitting_instances < instances || fitting_threads < threads {
            Reason::ConfiguredBeyondCores { cores }
        } else {
            Reason::Configured
        };
        ThreadPlan { instances: fitting_instances, threads: fitting_threads, reason }
    }
}

impl ThreadPlan {
    /// For a device that computes by itself: the cores bound the threads, which feed it, but not the instances.
    pub fn on_gpu(cores: usize, instances: Option<usize>, threads: Option<usize>) -> ThreadPlan {
        let reason = match (instances, threads) {
            (None, None) => Reason::OnePerGpu,
            _ => Reason::Configured,
        };
        let threads = threads.unwrap_or(1).clamp(1, cores.max(1));
        ThreadPlan { instances: instances.unwrap_or(1).max(1), threads, reason }
    }
}

/// The most instances whose weights fit [`MAX_COPIED_WEIGHTS_BYTES`] together and which divide the cores evenly, so
/// that none is left over.
fn affordable_instances(cores: usize, wish: &Wish) -> usize {
    if wish.instances_share_weights {
        return cores;
    }
    let copies = MAX_COPIED_WEIGHTS_BYTES / wish.weights_bytes.max(1);
    (1..=cores).rev().find(|n| cores.is_multiple_of(*n) && *n as u64 <= copies).unwrap_or(1)
}

impl fmt::Display for ThreadPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ThreadPlan { instances, threads, reason } = self;
        write!(f, "{instances} instance(s) of {threads} thread(s): ")?;
        match reason {
            Reason::OnePerCore => write!(f, "one single-threaded instance per core"),
            Reason::CopiesTooLarge { weights_bytes } => write!(
                f,
                "each instance copies {} MiB of weights, more copies would exceed {} MiB",
                weights_bytes >> 20,
                MAX_COPIED_WEIGHTS_BYTES >> 20
            ),
            Reason::OnePerGpu => write!(f, "one on a GPU"),
            Reason::Configured => write!(f, "as configured"),
            Reason::ConfiguredBeyondCores { cores } => write!(f, "the configured number, cut to {cores} core(s)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn plan(cores: usize, instances: Option<usize>, threads: Option<usize>, mib: u64, share: bool) -> ThreadPlan {
        let wish = Wish { instances, threads, weights_bytes: mib * MIB, instances_share_weights: share };
        ThreadPlan::new(cores, &wish)
    }

    #[test]
    fn plans() {
        use Reason::*;
        let large = |mib| CopiesTooLarge { weights_bytes: mib * MIB };
        let rows = [
            // cores, instances?, threads?, MiB, shared → instances, threads
            ((8, None, None, 1, false), (8, 1, OnePerCore)),
            ((1, None, None, 9000, false), (1, 1, OnePerCore)),
            ((0, None, None, 1, false), (1, 1, OnePerCore)),
            ((8, None, None, 100, false), (4, 2, large(100))),
            ((8, None, None, 440, false), (1, 8, large(440))),
            ((7, None, None, 100, false), (1, 7, large(100))),
            ((8, None, None, 9000, false), (1, 8, large(9000))),
            ((8, None, None, 9000, true), (8, 1, OnePerCore)),
            ((8, Some(2), None, 1, false), (2, 1, Configured)),
            ((8, Some(2), None, 440, false), (2, 4, Configured)),
            ((8, None, Some(4), 1, false), (2, 4, Configured)),
            ((8, None, Some(3), 1, false), (2, 3, Configured)),
            ((8, None, Some(3), 440, false), (1, 3, Configured)),
            ((8, Some(2), Some(4), 1, false), (2, 4, Configured)),
            ((8, Some(0), Some(0), 1, false), (1, 1, Configured)),
            ((8, Some(4), Some(4), 1, false), (2, 4, ConfiguredBeyondCores { cores: 8 })),
            ((2, None, Some(16), 1, false), (1, 2, ConfiguredBeyondCores { cores: 2 })),
            ((2, Some(16), None, 1, false), (2, 1, ConfiguredBeyondCores { cores: 2 })),
        ];
        for ((cores, i, t, mib, share), (instances, threads, reason)) in rows {
            let expected = ThreadPlan { instances, threads, reason };
            assert_eq!(plan(cores, i, t, mib, share), expected, "{cores} cores, {i:?} × {t:?}, {mib} MiB, {share}");
        }
    }

    #[test]
    fn a_gpu_has_one_instance_or_as_many_as_are_asked_for() {
        let plan = |instances, threads| ThreadPlan::on_gpu(2, instances, threads);
        assert_eq!(plan(None, None), ThreadPlan { instances: 1, threads: 1, reason: Reason::OnePerGpu });
        assert_eq!(plan(Some(8), None), ThreadPlan { instances: 8, threads: 1, reason: Reason::Configured });
        assert_eq!(plan(None, Some(9)), ThreadPlan { instances: 1, threads: 2, reason: Reason::Configured });
    }

    proptest! {
        #[test]
        fn never_beyond_the_cores(
            cores in 0usize..300, instances in proptest::option::of(any::<usize>()),
            threads in proptest::option::of(any::<usize>()), weights_bytes in any::<u64>(), share in any::<bool>(),
        ) {
            let wish = Wish { instances, threads, weights_bytes, instances_share_weights: share };
            let plan = ThreadPlan::new(cores, &wish);
            prop_assert!(plan.instances >= 1 && plan.threads >= 1);
            prop_assert!(plan.instances * plan.threads <= cores.max(1));
            prop_assert!(plan.to_string().contains(&plan.instances.to_string()));
        }
    }
}
