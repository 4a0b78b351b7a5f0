//! The shared library: where it is looked for, what it must be before it is loaded, and the process's environment.
//!
//! Whatever the file is, loading it ends in a runtime or in a reason, never in a crash that a look at the file foresees.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ort::logging::LogLevel;

use super::{OnnxRuntime, clean};
use crate::backend::LoadError;

/// The library's file name, beside the server's binary or in `lib` there.
pub const LIBRARY: &str = if cfg!(target_os = "macos") { "libonnxruntime.dylib" } else { "libonnxruntime.so" };

/// The lowest version of the library that serves: 1.17, the oldest interface that the crate speaks.
const OLDEST: (u32, u32) = (1, ort::MINOR_VERSION);

const HOW_TO_INSTALL: &str =
    "`make build` puts one beside the binary; or name one in the configuration or in ORT_DYLIB_PATH";

/// A library to open, and why that one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub path: PathBuf,
    pub by: FoundBy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundBy {
    Configuration,
    Environment,
    BesideBinary,
}

impl fmt::Display for FoundBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FoundBy::Configuration => "the configuration",
            FoundBy::Environment => "ORT_DYLIB_PATH",
            FoundBy::BesideBinary => "its place beside the binary",
        })
    }
}

/// No library was named and none lies where it is looked for. Names paths: for the operator's eyes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no ONNX Runtime library at {}; {HOW_TO_INSTALL}", list(.0))]
pub struct NotFound(pub Vec<PathBuf>);

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths.iter().map(|path| format!("`{}`", path.display())).collect();
    if paths.is_empty() { "any place, none being known".into() } else { paths.join(" or ") }
}

impl OnnxRuntime {
    /// Chooses the library: the configured path, else `environment` (the value of `ORT_DYLIB_PATH`), else one beside
    /// the binary. A path somebody named is taken at its word, so that a misspelt one fails in [`OnnxRuntime::open`]
    /// instead of silently giving way to another library.
    pub fn find(
        configured: Option<&Path>,
        environment: Option<PathBuf>,
        exe_dir: Option<&Path>,
    ) -> Result<Found, NotFound> {
        if let Some(path) = configured {
            return Ok(Found { path: path.into(), by: FoundBy::Configuration });
        }
        if let Some(path) = environment.filter(|path| !path.as_os_str().is_empty()) {
            return Ok(Found { path, by: FoundBy::Environment });
        }
        let places: Vec<PathBuf> =
            exe_dir.iter().flat_map(|dir| [dir.join(LIBRARY), dir.join("lib").join(LIBRARY)]).collect();
        match places.iter().find(|place| place.is_file()) {
            Some(place) => Ok(Found { path: place.clone(), by: FoundBy::BesideBinary }),
            None => Err(NotFound(places)),
        }
    }

    /// Loads the library and makes the process's environment; later calls with the same file return the same runtime.
    ///
    /// The error names the file without its folder, what was found and what was expected. Never panics, whatever the
    /// file is.
    pub fn open(path: &Path) -> Result<Arc<OnnxRuntime>, LoadError> {
        // The library cannot be loaded twice in one process, and its environment must outlive every session.
        static OPENED: Mutex<Option<Arc<OnnxRuntime>>> = Mutex::new(None);
        let name = path.file_name().unwrap_or(path.as_os_str()).display().to_string();
        let refused = |what: String| {
            LoadError::Unavailable(format!("ONNX Runtime's library `{name}` cannot be used: {what}; {HOW_TO_INSTALL}"))
        };
        let path = path.canonicalize().map_err(|error| refused(error.to_string().to_lowercase()))?;

        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = &*opened {
            return if runtime.path == path {
                Ok(runtime.clone())
            } else {
                Err(refused(format!("another one, version {}, is loaded in this process already", runtime.version)))
            };
        }
        // The crate panics where it takes the library's word for something.
        let runtime = catch_unwind(|| initialise(path))
            .unwrap_or_else(|_| Err("it broke while it was initialised".into()))
            .map_err(refused)?;
        let runtime = Arc::new(runtime);
        *opened = Some(runtime.clone());
        Ok(runtime)
    }
}

fn initialise(path: PathBuf) -> Result<OnnxRuntime, String> {
    check_file(&path)?;
    // Held until the crate holds the library too, which is then not unloaded in between.
    let (_library, version) = check_library(&path)?;
    let environment = ort::init_from(&path)
        .map_err(|error| clean(&error.to_string()))?
        .with_name("tidegate")
        .with_telemetry(false)
        .with_logger(Arc::new(log))
        .build()
        .map_err(|error| clean(error.message()))?;
    // A custom logger starts at verbose: every run would format lines that nobody reads.
    environment.set_log_level(LogLevel::Warning);
    Ok(OnnxRuntime { path, version, environment })
}

pub(super) fn check_version(version: &str) -> Result<(), String> {
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found < OLDEST {
        return Err(format!("it is version {version}, expected {}.{} or newer", OLDEST.0, OLDEST.1));
    }
    Ok(())
}

/// Refuses what the dynamic linker would crash on or describe badly: a file that is no library, or half of one.
pub(super) fn check_file(path: &Path) -> Result<(), String> {
    let read = || -> std::io::Result<Option<String>> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Ok(Some("it is not a file".into()));
        }
        if !cfg!(target_os = "linux") {
            return Ok(None);
        }
        Ok(match elf_length(&mut file, metadata.len())? {
            None => Some("it is not a shared library (no 64-bit ELF header)".into()),
            Some(expected) if expected > metadata.len() => {
                Some(format!("it is cut short: {} bytes, expected {expected} or more", metadata.len()))
            }
            Some(_) => None,
        })
    };
    match read() {
        Ok(None) => Ok(()),
        Ok(Some(problem)) => Err(problem),
        Err(error) => Err(error.to_string().to_lowercase()),
    }
}

/// The bytes that a little-endian ELF64 file's headers speak of; `None` where it is none. Mapping fewer ends in SIGBUS.
/// Reads on only where the tables themselves are inside the file.
fn elf_length(file: &mut File, file_length: u64) -> std::io::Result<Option<u64>> {
    const HEADER: u64 = 64;
    let mut header = Vec::new();
    file.by_ref().take(HEADER).read_to_end(&mut header)?;
    // Magic, 64 bits, little-endian.
    if header.len() < HEADER as usize || !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    let number = |bytes: &[u8], at: usize, size: usize| {
        bytes[at..at + size].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let (segments, segment_size, segment_count) =
        (number(&header, 0x20, 8), number(&header, 0x36, 2), number(&header, 0x38, 2));
    let (sections, section_size, section_count) =
        (number(&header, 0x28, 8), number(&header, 0x3a, 2), number(&header, 0x3c, 2));
    let table_end = segments.saturating_add(segment_size * segment_count);
    let mut length = table_end.max(sections.saturating_add(section_size * section_count));
    if length > file_length {
        return Ok(Some(length));
    }
    let mut table = Vec::new();
    file.seek(SeekFrom::Start(segments))?;
    // At most 4 GiB by the width of the two factors, and no more than the file holds.
    file.by_ref().take(segment_size * segment_count).read_to_end(&mut table)?;
    for segment in table.chunks_exact((segment_size as usize).max(1)).filter(|segment| segment.len() >= 0x28) {
        length = length.max(number(segment, 0x08, 8).saturating_add(number(segment, 0x20, 8)));
    }
    Ok(Some(length))
}

/// Asks the library for its version and its interface before the crate takes it for good. The library stays mapped
/// while the handle lives.
pub(super) fn check_library(path: &Path) -> Result<(libloading::Library, String), String> {
    use std::error::Error;
    // SAFETY: loading runs the library's initialisers. The operator chose the file, and it is a whole one.
    let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
        let reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        clean(&reason.replace(&*path.to_string_lossy(), "the library"))
    })?;
    type GetApiBase = unsafe extern "system" fn() -> *const ort::sys::OrtApiBase;
    // SAFETY: that symbol has had this type in every release of ONNX Runtime.
    let base = unsafe { library.get::<GetApiBase>(b"OrtGetApiBase\0") }
        .map_err(|_| "it is not ONNX Runtime (it does not export `OrtGetApiBase`)")?;
    // SAFETY: it takes no arguments and returns a static of the library, which is alive here, or null.
    let base = unsafe { base().as_ref() }.ok_or("it offers no interface")?;
    // SAFETY: `base` is that static; the function takes no arguments and returns a static C string.
    let version = unsafe { std::ffi::CStr::from_ptr((base.GetVersionString)()) }.to_string_lossy().into_owned();
    check_version(&version)?;
    // SAFETY: `base` is that static; the function takes a number and returns a static of the library, or null.
    if unsafe { (base.GetApi)(ort::MINOR_VERSION) }.is_null() {
        return Err(format!("it does not offer version {} of its interface", ort::MINOR_VERSION));
    }
    Ok((library, version))
}

/// The engine's log, into ours. Called from the engine's threads.
fn log(level: LogLevel, _category: &str, _id: &str, _location: &str, message: &str) {
    match level {
        LogLevel::Verbose | LogLevel::Info => {}
        LogLevel::Warning => tracing::warn!(target: "onnxruntime", "{}", clean(message)),
        LogLevel::Error | LogLevel::Fatal => tracing::error!(target: "onnxruntime", "{}", clean(message)),
    }
}
