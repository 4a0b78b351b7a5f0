//! What is served at one moment: an immutable table, replaced whole. A request looks once and keeps what it got.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::version::{State, Version};
use crate::error::{Error, Kind, Result, quoted};
use crate::request::{ModelRef, VersionId};

/// All versions the registry knows of. Generic over what serves so that the choice can be tested without engines.
pub struct Table<V = Version> {
    models: BTreeMap<Arc<str>, BTreeMap<VersionId, Entry<V>>>,
    /// Models on disk that nobody has asked for: no more than their names is known.
    idle: BTreeSet<Arc<str>>,
}

/// One version in the table.
pub struct Entry<V = Version> {
    pub state: State,
    /// Why it failed; of a version that serves: why its replacement did. Empty otherwise.
    pub reason: String,
    /// What answers. There while ready, and while a replacement loads.
    pub serving: Option<Arc<V>>,
}

/// One line of the repository index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub model: Arc<str>,
    pub version: VersionId,
    pub state: State,
    pub reason: String,
}

impl<V> Table<V> {
    /// `idle`: models that are there, of which those without a version are only known by name.
    pub fn new(models: BTreeMap<Arc<str>, BTreeMap<VersionId, Entry<V>>>, mut idle: BTreeSet<Arc<str>>) -> Table<V> {
        idle.retain(|model| !models.contains_key(model));
        Table { models, idle }
    }

    /// The version that answers: the one asked for, or the highest that is ready.
    pub fn choose(&self, model: &ModelRef) -> Result<Arc<V>> {
        let name = || quoted(&model.name);
        let versions = self
            .models
            .get(model.name.as_str())
            .ok_or_else(|| Error::not_found(format!("Request for unknown model: '{}' is not found", name())))?;
        match model.version {
            None => versions.values().rev().find_map(|entry| entry.serving.clone()).ok_or_else(|| {
                let loading = versions.values().any(|entry| entry.state.is_loading());
                unavailable(loading, format!("Request for unknown model: '{}' has no available versions", name()))
            }),
            Some(id) => {
                let entry = versions.get(&id).filter(|entry| entry.state != State::Draining).ok_or_else(|| {
                    Error::not_found(format!("Request for unknown model: '{}' version {id} is not found", name()))
                })?;
                entry.serving.clone().ok_or_else(|| {
                    let message = format!("Request for unknown model: '{}' version {id} is not at ready state", name());
                    unavailable(entry.state.is_loading(), message)
                })
            }
        }
    }

    /// Names of all models with a version that serves, sorted.
    pub fn ready_models(&self) -> Vec<Arc<str>> {
        let serves = |versions: &BTreeMap<VersionId, Entry<V>>| versions.values().any(|entry| entry.serving.is_some());
        self.models.iter().filter(|(_, versions)| serves(versions)).map(|(name, _)| Arc::clone(name)).collect()
    }

    /// The versions of a model that serve, ascending.
    pub fn ready_versions(&self, name: &str) -> Vec<VersionId> {
        let versions = self.models.get(name).into_iter().flatten();
        versions.filter(|(_, entry)| entry.serving.is_some()).map(|(id, _)| *id).collect()
    }

    /// Every version, by model and version.
    pub fn status(&self) -> Vec<Status> {
        self.entries()
            .map(|(model, version, entry)| Status {
                model: Arc::clone(model),
                version,
                state: entry.state,
                reason: entry.reason.clone(),
            })
            .collect()
    }

    /// Models on disk that nobody has asked for.
    pub fn idle(&self) -> &BTreeSet<Arc<str>> {
        &self.idle
    }

    /// Every version that serves.
    pub fn serving(&self) -> impl Iterator<Item = &Arc<V>> {
        self.entries().filter_map(|(_, _, entry)| entry.serving.as_ref())
    }

    fn entries(&self) -> impl Iterator<Item = (&Arc<str>, VersionId, &Entry<V>)> {
        self.models.iter().flat_map(|(model, versions)| versions.iter().map(move |(id, entry)| (model, *id, entry)))
    }
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Table { models: BTreeMap::new(), idle: BTreeSet::new() }
    }
}

fn unavailable(loading: bool, message: String) -> Error {
    Error::new(if loading { Kind::NotReady } else { Kind::NotFound }, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> VersionId {
        VersionId::new(n).unwrap()
    }

    /// Versions that serve are named by their number.
    fn table(versions: &[(&str, u64, State, bool)]) -> Table<u64> {
        let mut models: BTreeMap<Arc<str>, BTreeMap<VersionId, Entry<u64>>> = BTreeMap::new();
        for (model, version, state, serves) in versions {
            let entry = Entry { state: *state, reason: String::new(), serving: serves.then(|| Arc::new(*version)) };
            models.entry((*model).into()).or_default().insert(id(*version), entry);
        }
        Table::new(models, BTreeSet::from(["m".into(), "idle".into()]))
    }

    fn choose(table: &Table<u64>, name: &str, version: Option<u64>) -> Result<u64, (Kind, String)> {
        let model = ModelRef { name: name.into(), version: version.map(id) };
        table.choose(&model).map(|chosen| *chosen).map_err(|error| (error.kind(), error.message().to_string()))
    }

    #[test]
    fn the_highest_ready_version_answers_unless_one_is_named() {
        let table = table(&[
            ("m", 1, State::Ready, true),
            ("m", 9, State::Ready, true),
            ("m", 10, State::Failed, false),
            ("m", 11, State::Warming, false),
        ]);
        assert_eq!(choose(&table, "m", None), Ok(9));
        assert_eq!(choose(&table, "m", Some(1)), Ok(1));
        assert_eq!(table.ready_versions("m"), [id(1), id(9)]);
        assert_eq!(table.ready_models(), ["m".into()]);
    }

    #[test]
    fn a_version_whose_replacement_loads_goes_on_answering() {
        let table = table(&[("m", 1, State::Loading, true)]);
        assert_eq!((choose(&table, "m", None), choose(&table, "m", Some(1))), (Ok(1), Ok(1)));
    }

    #[test]
    fn refusals_are_verbatim() {
        let table = table(&[
            ("loading", 1, State::Loading, false),
            ("failed", 1, State::Failed, false),
            ("leaving", 1, State::Draining, false),
            ("unloaded", 1, State::Unloaded, false),
            ("m", 1, State::Ready, true),
        ]);
        let refused = |name, version| choose(&table, name, version).unwrap_err();
        let expect = |kind, text: &str| (kind, text.to_string());
        assert_eq!(refused("x", None), expect(Kind::NotFound, "Request for unknown model: 'x' is not found"));
        assert_eq!(
            refused("loading", None),
            expect(Kind::NotReady, "Request for unknown model: 'loading' has no available versions")
        );
        assert_eq!(
            refused("failed", None),
            expect(Kind::NotFound, "Request for unknown model: 'failed' has no available versions")
        );
        assert_eq!(
            refused("m", Some(9)),
            expect(Kind::NotFound, "Request for unknown model: 'm' version 9 is not found")
        );
        assert_eq!(
            refused("unloaded", None),
            expect(Kind::NotFound, "Request for unknown model: 'unloaded' has no available versions")
        );
        assert_eq!(refused("idle", None), expect(Kind::NotFound, "Request for unknown model: 'idle' is not found"));
        assert_eq!(table.idle().iter().map(|name| &**name).collect::<Vec<_>>(), ["idle"]);
        assert_eq!(refused("leaving", Some(1)).0, Kind::NotFound);
        assert_eq!(refused("loading", Some(1)).0, Kind::NotReady);
        assert_eq!(refused("failed", Some(1)).0, Kind::NotFound);
    }
}
