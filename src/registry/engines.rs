//! Which inference engines this process has, and which of them a model gets.
//!
//! Engines are chosen by a model's format and their presence only: a model that its engine refuses fails, rather than
//! quietly changing engines.

use std::path::PathBuf;
use std::sync::Arc;

use super::source::Format;
use crate::backend::onnxruntime::OnnxRuntime;
use crate::backend::{Backend, gpus};

/// Where to look for engines. Paths come from the configuration and the environment, read elsewhere.
#[derive(Clone, Debug, Default)]
pub struct EnginesConfig {
    /// What ONNX models without a `backend` of their own run on. An engine that is named and not there is an error; with
    /// tract, onnxruntime's library is not even looked for.
    pub choice: BackendChoice,
    /// ONNX Runtime's library, as configured.
    pub library: Option<PathBuf>,
    /// The value of `ORT_DYLIB_PATH`.
    pub library_variable: Option<PathBuf>,
    /// The folder of the server's binary.
    pub exe_dir: Option<PathBuf>,
}

/// An engine by name, or the best at hand: for the whole server, or for one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// For ONNX, onnxruntime where its library is found and loads, else tract; for safetensors, candle.
    #[default]
    Auto,
    OnnxRuntime,
    Tract,
    /// For one model only: it serves what the others do not.
    Candle,
}

impl BackendChoice {
    pub fn parse(text: &str) -> Option<BackendChoice> {
        match text {
            "auto" => Some(BackendChoice::Auto),
            "onnxruntime" => Some(BackendChoice::OnnxRuntime),
            "tract" => Some(BackendChoice::Tract),
            "candle" => Some(BackendChoice::Candle),
            _ => None,
        }
    }

    /// The engines that the whole server may be told to use: those of ONNX models.
    pub fn parse_for_all(text: &str) -> Option<BackendChoice> {
        BackendChoice::parse(text).filter(|choice| *choice != BackendChoice::Candle)
    }
}

/// The engines at hand.
#[derive(Clone)]
pub struct Engines {
    pub onnxruntime: Option<Arc<dyn Backend>>,
    pub tract: Option<Arc<dyn Backend>>,
    pub candle: Option<Arc<dyn Backend>>,
    /// Why onnxruntime is or is not there. Shown to clients: names no folder.
    pub onnxruntime_reason: String,
    /// The same for the operator, with the places looked at.
    pub details: String,
    /// A library was found, or named, and cannot be used.
    pub broken: bool,
    /// How many GPUs the machine has, or why that is not known.
    pub gpus: fn() -> Result<u32, String>,
}

/// What the log says of the engine that models get.
pub(super) struct Summary {
    pub backend: &'static str,
    pub version: String,
    pub reason: String,
    /// Not the one that was meant.
    pub degraded: bool,
}

/// An engine for one model, and why this one.
pub struct Chosen {
    pub backend: Arc<dyn Backend>,
    pub reason: String,
}

impl Engines {
    /// One engine for ONNX, in ONNX Runtime's place, no other and no GPU: for tests and benchmarks.
    pub fn only(backend: Arc<dyn Backend>) -> Engines {
        Engines {
            onnxruntime: Some(backend),
            tract: None,
            candle: None,
            onnxruntime_reason: String::new(),
            details: String::new(),
            broken: false,
            gpus: || Ok(0),
        }
    }

    /// Looks for ONNX Runtime's library and loads it. The error says what was asked for and is not there.
    pub fn find(config: &EnginesConfig) -> Result<Engines, String> {
        let mut engines = Engines {
            onnxruntime: None,
            tract: tract(),
            candle: candle(),
            onnxruntime_reason: String::new(),
            details: String::new(),
            broken: false,
            gpus: gpus::count,
        };
        if config.choice == BackendChoice::Tract {
            engines.onnxruntime_reason = "switched off by the configuration".into();
            engines.details = engines.onnxruntime_reason.clone();
        } else {
            engines.find_onnxruntime(config);
        }
        match config.choice {
            BackendChoice::OnnxRuntime if engines.onnxruntime.is_none() => {
                Err(format!("onnxruntime: {}", engines.details))
            }
            BackendChoice::Tract if engines.tract.is_none() => Err("tract is not built into this binary".into()),
            BackendChoice::Auto
                if engines.onnxruntime.is_none() && engines.tract.is_none() && engines.candle.is_none() =>
            {
                Err(format!("{}; tract and candle are not built into this binary", engines.details))
            }
            _ => Ok(engines),
        }
    }

    fn find_onnxruntime(&mut self, config: &EnginesConfig) {
        let found =
            OnnxRuntime::find(config.library.as_deref(), config.library_variable.clone(), config.exe_dir.as_deref());
        let found = match found {
            Ok(found) => found,
            Err(nowhere) => {
                self.onnxruntime_reason = "no ONNX Runtime library was found".into();
                self.details = nowhere.to_string();
                return;
            }
        };
        match OnnxRuntime::open(&found.path) {
            Ok(runtime) => {
                self.onnxruntime_reason = format!("its library was found by {}", found.by);
                self.details = format!("{}, `{}`", self.onnxruntime_reason, found.path.display());
                self.onnxruntime = Some(runtime);
            }
            Err(error) => {
                self.broken = true;
                self.onnxruntime_reason = error.to_string();
                self.details = format!("{error}, at `{}` (named by {})", found.path.display(), found.by);
            }
        }
    }

    /// The engine for one model. The error says what to install or build.
    pub fn choose(&self, choice: BackendChoice, format: Format) -> Result<Chosen, String> {
        match (format, choice) {
            (Format::Safetensors, BackendChoice::Auto | BackendChoice::Candle) => match &self.candle {
                Some(backend) => Ok(chosen(backend, "it computes safetensors models".into())),
                None => Err("a safetensors model takes candle, which is not built in: build with the cargo feature \
                             `candle`"
                    .into()),
            },
            (Format::Safetensors, BackendChoice::OnnxRuntime | BackendChoice::Tract) => {
                Err("model.toml: `backend`: found an engine of ONNX files, expected \"candle\" or \"auto\" for a \
                     safetensors model"
                    .into())
            }
            (Format::Onnx, BackendChoice::Candle) => {
                Err("model.toml: `backend`: found \"candle\", expected \"onnxruntime\", \"tract\" or \"auto\" for an \
                     ONNX file"
                    .into())
            }
            (Format::Onnx, choice) => self.choose_for_onnx(choice),
        }
    }

    fn choose_for_onnx(&self, choice: BackendChoice) -> Result<Chosen, String> {
        let why = &self.onnxruntime_reason;
        match (choice, &self.onnxruntime, &self.tract) {
            (BackendChoice::Auto, Some(backend), _) => Ok(chosen(backend, why.clone())),
            (BackendChoice::Auto, None, Some(backend)) => Ok(chosen(backend, format!("in onnxruntime's place: {why}"))),
            (BackendChoice::OnnxRuntime, Some(backend), _) | (BackendChoice::Tract, _, Some(backend)) => {
                Ok(chosen(backend, "named in model.toml".into()))
            }
            (BackendChoice::OnnxRuntime, None, _) => Err(format!("model.toml asks for onnxruntime: {why}")),
            (BackendChoice::Tract, _, None) => {
                Err("model.toml asks for tract, which is not built in: build with the cargo feature `tract`".into())
            }
            (BackendChoice::Auto | BackendChoice::Candle, ..) => {
                Err(format!("no engine for ONNX files: {why}, and tract is not built in"))
            }
        }
    }

    pub fn present(&self) -> impl Iterator<Item = &Arc<dyn Backend>> {
        self.onnxruntime.iter().chain(&self.tract).chain(&self.candle)
    }

    /// The engine of ONNX models that name none, and why it is this one.
    pub(super) fn summary(&self) -> Option<Summary> {
        let summary = |backend: &Arc<dyn Backend>, reason| Summary {
            backend: backend.name(),
            version: backend.version(),
            reason,
            degraded: self.broken,
        };
        match (&self.onnxruntime, &self.tract) {
            (Some(backend), _) => Some(summary(backend, self.details.clone())),
            (None, Some(backend)) => Some(summary(backend, format!("in onnxruntime's place: {}", self.details))),
            (None, None) => None,
        }
    }
}

fn chosen(backend: &Arc<dyn Backend>, reason: String) -> Chosen {
    Chosen { backend: Arc::clone(backend), reason }
}

#[cfg(feature = "tract")]
fn tract() -> Option<Arc<dyn Backend>> {
    Some(Arc::new(crate::backend::tract::Tract))
}

#[cfg(not(feature = "tract"))]
fn tract() -> Option<Arc<dyn Backend>> {
    None
}

#[cfg(feature = "candle")]
fn candle() -> Option<Arc<dyn Backend>> {
    Some(Arc::new(crate::backend::candle::Candle::default()))
}

#[cfg(not(feature = "candle"))]
fn candle() -> Option<Arc<dyn Backend>> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::fake::Fake;

    fn engines(onnxruntime: bool, tract: bool) -> Engines {
        let fake = |there: bool| there.then(|| Arc::new(Fake::echo(1)) as Arc<dyn Backend>);
        Engines {
            onnxruntime: fake(onnxruntime),
            tract: fake(tract),
            candle: None,
            onnxruntime_reason: "no library".into(),
            details: String::new(),
            broken: false,
            gpus: || Ok(0),
        }
    }

    #[cfg(feature = "tract")]
    #[test]
    fn a_library_that_is_broken_is_another_thing_than_one_that_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("libonnxruntime.so");
        std::fs::write(&library, "no library").unwrap();
        let degraded = |config: EnginesConfig| Engines::find(&config).unwrap().summary().unwrap().degraded;
        assert!(degraded(EnginesConfig { library: Some(library.clone()), ..EnginesConfig::default() }));
        assert!(degraded(EnginesConfig { library_variable: Some("absent.so".into()), ..EnginesConfig::default() }));
        assert!(!degraded(EnginesConfig::default()));
        let tract = EnginesConfig { choice: BackendChoice::Tract, library: Some(library), ..EnginesConfig::default() };
        assert!(!degraded(tract));
    }

    #[test]
    fn presence_decides_and_the_reason_is_told() {
        let reason = |engines: Engines, choice| engines.choose(choice, Format::Onnx).map(|chosen| chosen.reason);
        assert_eq!(reason(engines(true, true), BackendChoice::Auto).unwrap(), "no library");
        assert_eq!(reason(engines(false, true), BackendChoice::Auto).unwrap(), "in onnxruntime's place: no library");
        assert_eq!(reason(engines(true, true), BackendChoice::Tract).unwrap(), "named in model.toml");
        assert!(reason(engines(false, true), BackendChoice::OnnxRuntime).unwrap_err().contains("no library"));
        assert!(reason(engines(true, false), BackendChoice::Tract).unwrap_err().contains("not built in"));
        assert!(reason(engines(false, false), BackendChoice::Auto).is_err());
    }
    #[test]
    fn each_format_has_its_engines() {
        let fake = Some(Arc::new(Fake::echo(1)) as Arc<dyn Backend>);
        let with = Engines { candle: fake, ..engines(true, true) };
        let reason =
            |engines: &Engines, choice| engines.choose(choice, Format::Safetensors).map(|chosen| chosen.reason);
        for choice in [BackendChoice::Auto, BackendChoice::Candle] {
            assert_eq!(reason(&with, choice).unwrap(), "it computes safetensors models");
            assert!(reason(&engines(true, true), choice).unwrap_err().contains("cargo feature `candle`"));
        }
        for choice in [BackendChoice::OnnxRuntime, BackendChoice::Tract] {
            assert!(reason(&with, choice).unwrap_err().contains("expected \"candle\""));
        }
        let onnx = with.choose(BackendChoice::Candle, Format::Onnx).map(|chosen| chosen.reason);
        assert!(onnx.unwrap_err().contains("expected \"onnxruntime\", \"tract\" or \"auto\" for an ONNX file"));
        assert_eq!(BackendChoice::parse_for_all("candle"), None);
    }
}
