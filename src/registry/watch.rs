//! When a change on disk counts: only after two scans in a row saw the same, so that half-copied files are left alone; or
//! because somebody who knows asks for the model. Pure: scans in, changes out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::source::{Discovered, Fingerprint, Key, Scan};

/// What the registry holds for sure, and what the last look at it saw.
pub struct Watch {
    settled: BTreeMap<Key, Discovered>,
    seen: BTreeMap<Key, Fingerprint>,
}

impl Watch {
    /// What is there at start counts at once: a server must not take longer to start than it needs.
    pub fn new(scan: Scan) -> Watch {
        let seen = fingerprints(&scan);
        Watch { settled: scan.versions, seen }
    }

    /// What is on disk, as far as two scans agreed.
    pub fn settled(&self) -> &BTreeMap<Key, Discovered> {
        &self.settled
    }

    /// The models that the last scan saw, or could not read.
    pub fn models(&self) -> BTreeSet<Arc<str>> {
        self.seen.keys().map(|key| Arc::clone(&key.model)).collect()
    }

    /// Whether the last scan saw that version.
    pub fn sees(&self, key: &Key) -> bool {
        self.seen.contains_key(key)
    }

    /// Takes a new scan in; true if anything settled differently. Versions of a model that could not be read stay.
    pub fn observe(&mut self, mut scan: Scan) -> bool {
        let now = self.see(&scan);
        let known: BTreeSet<Key> = self.settled.keys().chain(now.keys()).cloned().collect();
        let mut changed = false;
        for key in known {
            let steady = now.get(&key) == self.seen.get(&key) && !scan.unreadable.contains_key(&key.model);
            if !steady || now.get(&key) == self.settled.get(&key).map(|found| &found.fingerprint) {
                continue;
            }
            changed = true;
            match scan.versions.remove(&key) {
                Some(found) => self.settled.insert(key, found),
                None => self.settled.remove(&key),
            };
        }
        self.seen = now;
        changed
    }

    /// Takes a new scan in, and nothing of it counts.
    pub fn note(&mut self, scan: &Scan) {
        self.seen = self.see(scan);
    }

    /// Takes a new scan in, of which one model's versions count at once.
    pub fn adopt(&mut self, model: &str, scan: Scan) {
        self.note(&scan);
        self.settled.retain(|key, _| &*key.model != model);
        self.settled.extend(scan.versions.into_iter().filter(|(key, _)| &*key.model == model));
    }

    fn see(&self, scan: &Scan) -> BTreeMap<Key, Fingerprint> {
        let mut now = fingerprints(scan);
        let unread = self.seen.iter().filter(|(key, _)| scan.unreadable.contains_key(&key.model));
        now.extend(unread.map(|(key, print)| (key.clone(), print.clone())));
        now
    }
}

fn fingerprints(scan: &Scan) -> BTreeMap<Key, Fingerprint> {
    scan.versions.iter().map(|(key, found)| (key.clone(), found.fingerprint.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::super::source::tests_support::discovered;
    use super::*;

    fn scan(versions: &[(&str, u64, u64)]) -> Scan {
        let versions = versions.iter().map(|(model, version, size)| discovered(model, *version, *size));
        Scan { versions: versions.map(|found| (found.key.clone(), found)).collect(), ..Scan::default() }
    }

    fn held(watch: &Watch) -> Vec<String> {
        watch.settled().keys().map(Key::to_string).collect()
    }

    #[test]
    fn the_first_scan_counts_at_once() {
        assert_eq!(held(&Watch::new(scan(&[("a", 1, 5)]))), ["a/1"]);
    }

    #[test]
    fn a_new_version_counts_when_it_stops_growing() {
        let mut watch = Watch::new(scan(&[("a", 1, 5)]));
        for size in 1..4 {
            assert!(!watch.observe(scan(&[("a", 1, 5), ("a", 2, size)])));
        }
        assert!(watch.observe(scan(&[("a", 1, 5), ("a", 2, 3)])));
        assert_eq!(held(&watch), ["a/1", "a/2"]);
        assert!(!watch.observe(scan(&[("a", 1, 5), ("a", 2, 3)])));
    }

    #[test]
    fn a_removal_counts_when_seen_twice_and_a_flicker_never() {
        let mut watch = Watch::new(scan(&[("a", 1, 5)]));
        assert!(!watch.observe(scan(&[])));
        assert!(!watch.observe(scan(&[("a", 1, 5)])));
        assert!(!watch.observe(scan(&[])));
        assert_eq!(held(&watch), ["a/1"]);
        assert!(watch.observe(scan(&[])));
        assert!(held(&watch).is_empty());
    }

    #[test]
    fn a_change_counts_once_and_one_restless_version_holds_up_no_other() {
        let mut watch = Watch::new(scan(&[("a", 1, 5), ("b", 1, 1)]));
        assert!(!watch.observe(scan(&[("a", 1, 6), ("b", 1, 2)])));
        assert!(watch.observe(scan(&[("a", 1, 6), ("b", 1, 3)])));
        let sizes = |watch: &Watch, model| {
            watch.settled().iter().find(|(key, _)| &*key.model == model).map(|(_, found)| found.fingerprint.clone())
        };
        assert_eq!(sizes(&watch, "a"), Some(discovered("a", 1, 6).fingerprint));
        assert_eq!(sizes(&watch, "b"), Some(discovered("b", 1, 1).fingerprint));
    }

    #[test]
    fn what_is_only_noted_counts_once_its_model_is_asked_for() {
        let mut watch = Watch::new(scan(&[("a", 1, 5)]));
        let grown = || scan(&[("a", 1, 6), ("a", 2, 1), ("b", 1, 1)]);
        watch.note(&grown());
        watch.note(&grown());
        assert_eq!(held(&watch), ["a/1"]);
        assert_eq!(watch.models().into_iter().collect::<Vec<_>>(), ["a".into(), "b".into()]);
        watch.adopt("b", grown());
        assert_eq!(held(&watch), ["a/1", "b/1"]);
        watch.adopt("a", scan(&[("a", 2, 1)]));
        assert_eq!(held(&watch), ["a/2", "b/1"]);
    }

    #[test]
    fn an_unreadable_model_is_left_as_it_was() {
        let mut watch = Watch::new(scan(&[("a", 1, 5), ("b", 1, 5)]));
        let unreadable = || Scan { unreadable: [("a".into(), "no".to_string())].into(), ..scan(&[("b", 1, 5)]) };
        assert!(!watch.observe(unreadable()) && !watch.observe(unreadable()));
        assert_eq!(held(&watch), ["a/1", "b/1"]);
        assert!(!watch.observe(scan(&[("b", 1, 5)])));
        assert!(watch.observe(scan(&[("b", 1, 5)])));
        assert_eq!(held(&watch), ["b/1"]);
    }
}
