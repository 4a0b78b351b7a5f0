//! What to do next about one model: load, retire, or nothing. Pure: what is on disk and what serves in, one step out.
//!
//! Order within a model: everything wanted is loaded before anything is retired, so that a request without a version
//! finds one throughout; the highest version first.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::model_config::VersionPolicy;
use crate::request::VersionId;

/// How long after a failure that may pass (a full disk, an unreadable file) the same files are tried again: after the
/// first and at the most. Each attempt copies the model once more.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(300);

/// One version as the registry knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    pub on_disk: bool,
    /// Its files are not those that were last loaded, or failed to.
    pub untried: bool,
    pub serving: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Load(VersionId),
    /// Nothing is left to load: what serves and should not, from now on.
    Retire(BTreeSet<VersionId>),
}

/// The versions to serve, as far as is known.
pub fn wanted(policy: &VersionPolicy, versions: &BTreeMap<VersionId, Candidate>) -> BTreeSet<VersionId> {
    let alive = |candidate: &Candidate| candidate.untried || candidate.serving;
    let on_disk = versions.iter().filter(|(_, candidate)| candidate.on_disk);
    policy.select(&on_disk.map(|(id, candidate)| (*id, alive(candidate))).collect())
}

pub fn next(policy: &VersionPolicy, versions: &BTreeMap<VersionId, Candidate>) -> Step {
    let wanted = wanted(policy, versions);
    match wanted.iter().rev().find(|id| versions[*id].untried) {
        Some(id) => Step::Load(*id),
        None => {
            let leaving = versions.iter().filter(|(id, candidate)| candidate.serving && !wanted.contains(id));
            Step::Retire(leaving.map(|(id, _)| *id).collect())
        }
    }
}

/// Whether a version has a slot: it serves, or should, or its files on disk were tried. What was tried is remembered even
/// where it is not wanted: forgotten, a version that failed would count as one that may be served, and be tried again
/// without end.
pub fn has_slot(candidate: &Candidate, wanted: bool) -> bool {
    candidate.serving || (candidate.on_disk && (wanted || !candidate.untried))
}

/// The wait after `failures` earlier ones in a row: doubled each time.
pub fn back_off(failures: u32) -> Duration {
    FIRST_RETRY.saturating_mul(2u32.saturating_pow(failures)).min(LONGEST_RETRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_slow_down_and_never_stop() {
        assert_eq!([0, 1, 3].map(back_off), [1, 2, 8].map(Duration::from_secs));
        assert_eq!([9, 40, u32::MAX].map(back_off), [LONGEST_RETRY; 3]);
    }

    const NEW: Candidate = Candidate { on_disk: true, untried: true, serving: false };
    const SERVING: Candidate = Candidate { on_disk: true, untried: false, serving: true };
    const CHANGED: Candidate = Candidate { on_disk: true, untried: true, serving: true };
    const FAILED: Candidate = Candidate { on_disk: true, untried: false, serving: false };
    const GONE: Candidate = Candidate { on_disk: false, untried: false, serving: true };

    fn id(n: u64) -> VersionId {
        VersionId::new(n).unwrap()
    }

    fn step(policy: &VersionPolicy, versions: &[(u64, Candidate)]) -> Step {
        next(policy, &versions.iter().map(|(n, candidate)| (id(*n), *candidate)).collect())
    }

    fn retire(ids: &[u64]) -> Step {
        Step::Retire(ids.iter().map(|n| id(*n)).collect())
    }

    #[test]
    fn what_is_wanted_is_loaded_before_anything_is_retired() {
        let all = VersionPolicy::All;
        assert_eq!(step(&all, &[(1, NEW), (2, NEW)]), Step::Load(id(2)));
        assert_eq!(step(&all, &[(1, GONE), (2, NEW)]), Step::Load(id(2)));
        assert_eq!(step(&all, &[(1, GONE), (2, SERVING)]), retire(&[1]));
        assert_eq!(step(&all, &[(1, CHANGED)]), Step::Load(id(1)));
        assert_eq!(step(&all, &[(1, SERVING), (2, FAILED)]), retire(&[]));
        assert_eq!(step(&all, &[(1, GONE)]), retire(&[1]));
    }

    #[test]
    fn a_failed_release_does_not_retire_what_it_was_to_replace() {
        let latest = VersionPolicy::Latest(1);
        assert_eq!(step(&latest, &[(1, SERVING), (2, NEW)]), Step::Load(id(2)));
        assert_eq!(step(&latest, &[(1, SERVING), (2, SERVING)]), retire(&[1]));
        assert_eq!(step(&latest, &[(1, SERVING), (2, FAILED)]), retire(&[]));
        assert_eq!(step(&latest, &[(1, NEW), (2, FAILED)]), Step::Load(id(1)));
    }

    /// One model as the writer sees it: what is on disk, and its slots.
    #[derive(Default)]
    struct Model {
        on_disk: BTreeSet<u64>,
        bad: BTreeSet<u64>,
        /// Version → serving. Only what was tried, or is about to be, has one.
        slots: BTreeMap<u64, Slot>,
        loads: usize,
    }

    #[derive(Clone, Copy, Default)]
    struct Slot {
        tried: bool,
        serving: bool,
    }

    impl Model {
        fn candidates(&self) -> BTreeMap<VersionId, Candidate> {
            let known: BTreeSet<u64> = self.on_disk.iter().chain(self.slots.keys()).copied().collect();
            let candidate = |n: &u64| {
                let slot = self.slots.get(n).copied().unwrap_or_default();
                let on_disk = self.on_disk.contains(n);
                Candidate { on_disk, untried: on_disk && !slot.tried, serving: slot.serving }
            };
            known.iter().map(|n| (id(*n), candidate(n))).collect()
        }

        fn admit(&mut self, policy: &VersionPolicy) {
            let candidates = self.candidates();
            let wanted = wanted(policy, &candidates);
            for n in self.on_disk.iter().filter(|n| wanted.contains(&id(**n))) {
                self.slots.entry(*n).or_default();
            }
            self.slots.retain(|n, _| has_slot(&candidates[&id(*n)], wanted.contains(&id(*n))));
        }

        /// As the writer applies a change. Every version is tried once at the most.
        fn apply(&mut self, policy: &VersionPolicy) {
            self.admit(policy);
            let bound = self.loads + self.on_disk.len();
            while let Step::Load(next) = next(policy, &self.candidates()) {
                self.loads += 1;
                assert!(self.loads <= bound, "{policy:?} loads without end: {:?}, bad {:?}", self.on_disk, self.bad);
                let n = (1..=VERSIONS).find(|n| id(*n) == next).unwrap();
                let slot = self.slots.get_mut(&n).expect("what is loaded has a slot");
                *slot = Slot { tried: true, serving: slot.serving || !self.bad.contains(&n) };
                self.admit(policy);
            }
            let Step::Retire(leaving) = next(policy, &self.candidates()) else { unreachable!() };
            self.slots.retain(|n, _| !leaving.contains(&id(*n)));
        }
    }

    const VERSIONS: u64 = 3;

    /// The subsets of the versions.
    fn subsets() -> impl Iterator<Item = BTreeSet<u64>> {
        (0u64..1 << VERSIONS).map(|bits| (1..=VERSIONS).filter(|n| bits & (1 << (n - 1)) != 0).collect())
    }

    #[test]
    fn steps_end_whatever_fails_comes_and_goes() {
        let listed = subsets().map(|listed| VersionPolicy::Listed(listed.into_iter().map(id).collect()));
        let latest = (1..=4).map(VersionPolicy::Latest);
        for policy in latest.chain([VersionPolicy::All]).chain(listed) {
            for bad in subsets() {
                for (first, second) in subsets().flat_map(|first| subsets().map(move |second| (first.clone(), second)))
                {
                    let mut model = Model { bad: bad.clone(), ..Model::default() };
                    for on_disk in [&first, &second, &first] {
                        model.on_disk.clone_from(on_disk);
                        model.apply(&policy);
                    }
                    let (loads, before) = (model.loads, model.slots.len());
                    model.apply(&policy);
                    assert_eq!((model.loads, model.slots.len()), (loads, before), "a second look changes nothing");
                    let serving = model.slots.values().filter(|slot| slot.serving).count();
                    let good = first.difference(&bad).count();
                    match &policy {
                        VersionPolicy::Latest(n) => assert_eq!(serving, good.min(*n)),
                        VersionPolicy::All => assert_eq!(serving, good),
                        VersionPolicy::Listed(_) => {}
                    }
                }
            }
        }
    }

    #[test]
    fn versions_that_are_not_listed_are_left_alone_or_retired() {
        let listed = VersionPolicy::Listed([id(1)].into());
        assert_eq!(step(&listed, &[(1, SERVING), (2, NEW), (3, SERVING)]), retire(&[3]));
    }
}
