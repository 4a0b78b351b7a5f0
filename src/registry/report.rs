//! Loading without serving: what `tidegate inspect` shows and `tidegate validate` checks.

use std::sync::Arc;

use super::engines::Engines;
use super::loader::{CompareGoldens, Failure, Loader};
use super::source::{Discovered, Scan};
use super::version::Facts;
use super::{Config, RegistryError};
use crate::backend::Model;
use crate::request::VersionId;
use crate::scheduler::Gate;

/// What became of one version.
#[derive(Clone, Debug)]
pub struct Report {
    pub model: Arc<str>,
    pub version: VersionId,
    /// How it was loaded, or why it would not be served.
    pub outcome: Result<Facts, String>,
    /// Golden cases that agreed; `None` where there are none or they were not asked for.
    pub goldens: Option<usize>,
}

/// Loads one model, or one of its versions, the way `serve` would. `config.root` is the model's folder, a version's, or an
/// `.onnx` file.
pub fn inspect(config: &Config, cores: usize) -> Result<Vec<Report>, RegistryError> {
    let mut folder = config.folder();
    let scan = folder.scan_one()?;
    if scan.versions.is_empty() {
        return Err(folder.empty(&scan).into());
    }
    report(config, cores, scan, CompareGoldens::IfConfigured)
}

/// Loads and warms every version of a registry and compares each with its golden cases, where it has some.
pub fn validate(config: &Config, cores: usize) -> Result<Vec<Report>, RegistryError> {
    let mut folder = config.folder();
    let scan = folder.scan()?;
    if scan.versions.is_empty() {
        return Err(folder.empty(&scan).into());
    }
    report(config, cores, scan, CompareGoldens::IfThere)
}

/// Loads a version on the CPU with so many threads for a run. The error says why it cannot be.
pub type Alone<'a> = &'a dyn Fn(usize) -> Result<Arc<dyn Model>, String>;

/// Shows every version that loads to `look`, with what loads it without a server: for timing an engine alone.
/// `config.root` is what [`inspect`] takes, or a registry.
pub fn each_alone(config: &Config, cores: usize, mut look: impl FnMut(&Facts, Alone)) -> Result<(), RegistryError> {
    let mut folder = config.folder();
    let mut scan = folder.scan_one()?;
    if scan.versions.is_empty() {
        scan = folder.scan()?;
    }
    if scan.versions.is_empty() {
        return Err(folder.empty(&scan).into());
    }
    let engines = Engines::find(&config.engines).map_err(RegistryError::Engine)?;
    let loader = loader(config, engines, cores)?;
    for found in scan.versions.values() {
        let Ok(facts) = one(&loader, found, CompareGoldens::IfConfigured).outcome else { continue };
        let Ok(staged) = loader.stage(found) else { continue };
        look(&facts, &|threads| loader.load_alone(found, &staged, threads).map_err(|failure| failure.to_string()));
        loader.discard_staged(staged);
    }
    loader.cache.remove();
    Ok(())
}

fn report(config: &Config, cores: usize, scan: Scan, goldens: CompareGoldens) -> Result<Vec<Report>, RegistryError> {
    let engines = Engines::find(&config.engines).map_err(RegistryError::Engine)?;
    report_with(config, engines, cores, scan, goldens)
}

pub(super) fn report_with(
    config: &Config,
    engines: Engines,
    cores: usize,
    scan: Scan,
    goldens: CompareGoldens,
) -> Result<Vec<Report>, RegistryError> {
    let loader = loader(config, engines, cores)?;
    let reports = scan.versions.values().map(|found| one(&loader, found, goldens)).collect();
    loader.cache.remove();
    Ok(reports)
}

/// With a gate and a cache of its own, which is to be removed.
fn loader(config: &Config, engines: Engines, cores: usize) -> Result<Loader, RegistryError> {
    let cache = Arc::new(config.open_cache()?);
    let timing = config.timing(cores, &cache);
    Ok(Loader { cache, engines, cores, gate: Gate::new(cores), timing, longest_inline: None })
}

fn one(loader: &Loader, found: &Discovered, goldens: CompareGoldens) -> Report {
    let load = || -> Result<(Facts, Option<usize>), Failure> {
        let loaded = loader.load(found, loader.stage(found)?, goldens, || {})?;
        let (facts, compared) = (loaded.facts.clone(), loaded.goldens);
        loader.discard(loaded);
        Ok((facts, compared))
    };
    let outcome = load();
    let goldens = outcome.as_ref().ok().and_then(|(_, goldens)| *goldens);
    Report {
        model: Arc::clone(&found.key.model),
        version: found.key.version,
        outcome: outcome.map(|(facts, _)| facts).map_err(|failure| failure.to_string()),
        goldens,
    }
}
