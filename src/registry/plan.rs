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

    #[test]
    fn versions_that_are_not_listed_are_left_alone_or_retired() {
        let listed = VersionPolicy::Listed([id(1)].into());
        assert_eq!(step(&listed, &[(1, SERVING), (2, NEW), (3, SERVING)]), retire(&[3]));
    }
}
