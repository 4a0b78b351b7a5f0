//! The folder source: looks at a registry on disk and says which versions are there. Reads names, file facts and
//! the model's settings (`model.toml`, or Triton's `config.pbtxt`); opens no model.
//!
//! Layouts: `<root>/<name>/<version>/model.onnx`, `<root>/<name>/model.onnx` (version 1), `<root>/model.onnx`, and a
//! root that is itself an `.onnx` file (the last two are named by the configuration); in `model.onnx`'s place may stand
//! `model.safetensors`, the index of its parts, or a file that the settings name. Hidden entries and folders whose name is no version are stepped over.
//! Symbolic links are followed inside the root only.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::model_config::{ConfigFile, ModelConfig};
use super::{pbtxt, warmup};
use crate::backend::safetensors;
use crate::error::quoted;
use crate::problem::expected_name;
use crate::request::{MAX_NAME_BYTES, VersionId};

pub const MODEL_FILE: &str = "model.onnx";
/// What makes a folder a version's, in the order of preference where a safetensors model is there whole and in parts.
const MODEL_FILES: [&str; 3] = [MODEL_FILE, safetensors::MODEL_FILE, safetensors::INDEX_FILE];
pub const GOLDEN_FILE: &str = "expected.json";

/// Entries of one folder, and files of one version, that are looked at; more make it an error.
const MAX_ENTRIES: usize = 100_000;
/// How deep folders inside a version are looked at for changes (external data may lie in folders).
const MAX_DEPTH: usize = 8;
/// Longest `model.toml` or `config.pbtxt`, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// A version's place in the registry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub model: Arc<str>,
    pub version: VersionId,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.model, self.version)
    }
}

/// A version found on disk, not yet opened.
#[derive(Clone, Debug)]
pub struct Discovered {
    pub key: Key,
    /// The ONNX file, or the safetensors file or index. What else belongs to it lies below its folder.
    pub model: PathBuf,
    /// The model's own folder: settings, labels and warm-up files.
    pub folder: PathBuf,
    /// The settings, or what is wrong with them.
    pub config: Result<Arc<ModelConfig>, String>,
    /// Why it may not be opened at all (a link that leaves the registry).
    pub refused: Option<String>,
    pub fingerprint: Fingerprint,
}

impl Discovered {
    pub fn format(&self) -> Format {
        match self.model.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors" | "json") => Format::Safetensors,
            _ => Format::Onnx,
        }
    }
}

/// What a version is kept in, by the name of its file; engines read one or the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Onnx,
    Safetensors,
}

/// Everything about a version's files that changes when they do. Equal fingerprints mean that nothing was touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint(Vec<FileFacts>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct FileFacts {
    path: PathBuf,
    size: u64,
    modified: (i64, i64),
    /// Also when permissions did: what could not be read may be readable now.
    changed: (i64, i64),
    inode: u64,
}

/// What one look at the registry found.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    pub versions: BTreeMap<Key, Discovered>,
    /// Models whose folder could not be read this time: nothing is known of their versions.
    pub unreadable: BTreeMap<Arc<str>, String>,
    /// What a person should know: names and links that were stepped over.
    pub notes: Vec<String>,
}

/// Why a registry cannot be looked at. Meant for operators.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    #[error("registry `{root}`: {reason}")]
    Root { root: String, reason: String },
    #[error(
        "registry `{root}` holds no model, expected `<model>/<version>/{MODEL_FILE}`, `<model>/{MODEL_FILE}` or \
         `{MODEL_FILE}`, or a `model.safetensors` in such a place{notes}"
    )]
    Empty { root: String, notes: String },
    #[error("registry `{root}` holds no model `{name}` to load at start, expected {expected}{notes}")]
    Unknown { root: String, name: String, expected: String, notes: String },
}

pub struct Folder {
    root: PathBuf,
    /// What a bare model file is called.
    model_name: Arc<str>,
    /// Parsed settings by path, kept while their facts stay the same.
    configs: HashMap<PathBuf, (FileFacts, Config)>,
    /// What stands for one model's settings in this scan.
    given: Option<(Arc<str>, Arc<ModelConfig>)>,
}

type Config = Result<Arc<ModelConfig>, String>;

impl Folder {
    pub fn new(root: PathBuf, model_name: &str) -> Folder {
        Folder { root, model_name: model_name.into(), configs: HashMap::new(), given: None }
    }

    pub fn scan(&mut self) -> Result<Scan, SourceError> {
        self.scan_with(None)
    }

    /// The same, with those settings for a model in place of what its folder says of how it is served.
    pub fn scan_given(&mut self, model: &Arc<str>, config: Option<ModelConfig>) -> Result<Scan, SourceError> {
        self.scan_with(config.map(|config| (Arc::clone(model), Arc::new(config))))
    }

    fn scan_with(&mut self, given: Option<(Arc<str>, Arc<ModelConfig>)>) -> Result<Scan, SourceError> {
        self.given = given;
        let root = fs::canonicalize(&self.root).map_err(|error| self.unusable(error))?;
        let mut scan = Scan::default();
        if root.is_file() {
            self.scan_file(&root, &mut scan);
            return Ok(scan);
        }
        let entries = entries(&root).map_err(|error| self.unusable(error))?;
        let name = Arc::clone(&self.model_name);
        self.add_loose(&root, &root, &name, &mut scan);
        for entry in entries {
            self.scan_model(&root, &entry, &mut scan);
        }
        self.forget_configs(&scan);
        Ok(scan)
    }

    /// One model's own folder (or one version's), looked at as if its parent were a registry of that model alone.
    pub fn scan_one(&mut self) -> Result<Scan, SourceError> {
        let path = fs::canonicalize(&self.root).map_err(|error| self.unusable(error))?;
        let mut scan = Scan::default();
        if path.is_file() {
            self.scan_file(&path, &mut scan);
            return Ok(scan);
        }
        let version = file_name(&path).and_then(|name| VersionId::parse(&name));
        let folder = match (version, path.parent()) {
            (Some(_), Some(parent)) if self.is_version(parent, &path) => parent.to_path_buf(),
            _ => path,
        };
        self.scan_model(&folder.clone(), &folder, &mut scan);
        if let Some(version) = version {
            scan.versions.retain(|key, _| key.version == version);
        }
        Ok(scan)
    }

    fn is_version(&mut self, folder: &Path, version: &Path) -> bool {
        let name = file_name(folder).unwrap_or_default();
        model_in(version, named(&self.config(folder, folder, &name))).is_some()
    }

    pub fn empty(&self, scan: &Scan) -> SourceError {
        SourceError::Empty { root: self.root.display().to_string(), notes: notes(scan) }
    }

    /// Of a model that was to be there.
    pub fn unknown(&self, name: &str, scan: &Scan) -> SourceError {
        let mut known: Vec<&str> = scan.versions.keys().map(|key| &*key.model).collect();
        known.dedup();
        let expected = if known.is_empty() { "a model's folder in it".into() } else { expected_name(name, &known) };
        let (root, name) = (self.root.display().to_string(), quoted(name));
        SourceError::Unknown { root, name, expected, notes: notes(scan) }
    }

    fn unusable(&self, error: std::io::Error) -> SourceError {
        SourceError::Root { root: self.root.display().to_string(), reason: error.to_string() }
    }

    fn scan_file(&mut self, model: &Path, scan: &mut Scan) {
        let name = Arc::clone(&self.model_name);
        let folder = model.parent().unwrap_or(model).to_path_buf();
        // Whatever else lies beside a file that was named by itself is not looked at.
        let settings = ConfigFile::ALL.map(|file| folder.join(file.name()));
        let files = [&[model.to_path_buf()][..], &settings[..]].concat();
        let facts = files.iter().filter_map(|path| Some(facts(path, &fs::metadata(path).ok()?))).collect();
        let config = self.config(&folder, &folder, &name);
        self.add(&folder, &folder, first(&name), model, config, Ok(Fingerprint(facts)), scan);
    }

    fn scan_model(&mut self, root: &Path, folder: &Path, scan: &mut Scan) {
        let Some(name) = file_name(folder) else {
            scan.notes.push(format!("`{}` is not UTF-8: ignored", quoted(&folder.to_string_lossy())));
            return;
        };
        if !folder.is_dir() {
            return;
        }
        if !is_model_name(&name) {
            scan.notes.push(format!(
                "`{}` cannot be a model's name, expected {}: ignored",
                quoted(&name),
                model_name_form()
            ));
            return;
        }
        match confined(root, folder) {
            Ok(true) => {}
            Ok(false) => {
                scan.notes.push(format!("`{name}` is a symbolic link that leaves the registry: ignored"));
                return;
            }
            Err(error) => {
                scan.unreadable.insert(name.as_str().into(), format!("`{name}`: {error}"));
                return;
            }
        }
        let name: Arc<str> = name.into();
        match entries(folder) {
            Err(error) => {
                scan.unreadable.insert(Arc::clone(&name), format!("`{name}`: {error}"));
            }
            Ok(entries) => {
                self.add_loose(root, folder, &name, scan);
                for entry in entries {
                    self.add_version(root, folder, &name, &entry, scan);
                }
            }
        }
    }

    /// A model file straight in the model's folder: version 1, unless there is a folder `1`.
    fn add_loose(&mut self, root: &Path, folder: &Path, name: &Arc<str>, scan: &mut Scan) {
        let config = self.config(root, folder, name);
        if let Some(model) = model_in(folder, named(&config)) {
            self.add(root, folder, first(name), &model, config, fingerprint(root, folder, folder), scan);
        }
    }

    fn add_version(&mut self, root: &Path, folder: &Path, name: &Arc<str>, entry: &Path, scan: &mut Scan) {
        let Some(version) = file_name(entry).and_then(|name| VersionId::parse(&name)) else { return };
        let config = self.config(root, folder, name);
        let model = match model_in(entry, named(&config)) {
            Some(model) => model,
            // Triton serves models of other kinds, too: a person who brings one is told that it is not served, and why.
            None if folder.join(ConfigFile::ConfigPbtxt.name()).exists() => {
                entry.join(named(&config).unwrap_or(MODEL_FILE))
            }
            None => return,
        };
        let key = Key { model: Arc::clone(name), version };
        if scan.versions.contains_key(&key) {
            scan.notes.push(format!("the model in `{name}` is hidden by the one in `{name}/{version}`"));
        }
        self.add(root, folder, key, &model, config, fingerprint(root, folder, entry), scan);
    }

    #[allow(clippy::too_many_arguments, reason = "what a version is made of")]
    fn add(
        &mut self,
        root: &Path,
        folder: &Path,
        key: Key,
        model: &Path,
        config: Config,
        fingerprint: std::io::Result<Fingerprint>,
        scan: &mut Scan,
    ) {
        let file = quoted(&file_name(model).unwrap_or_default());
        let refused = match (&confined(root, model), &fingerprint) {
            (Ok(true), Ok(_)) if model.is_file() => two_formats(model),
            (Ok(true), Ok(_)) => Some(format!("`{file}` is not a regular file")),
            (Ok(false), _) => Some(format!("`{file}` lies behind a symbolic link that leaves the registry")),
            // Settings that ask for another kind of model say more than that there is no file of this kind.
            (Err(_), Ok(_)) if config.is_err() => None,
            (Err(error), _) | (_, Err(error)) => Some(format!("`{file}` cannot be read: {error}")),
        };
        let discovered = Discovered {
            config,
            key: key.clone(),
            model: model.to_path_buf(),
            folder: folder.to_path_buf(),
            refused,
            fingerprint: fingerprint.unwrap_or_default(),
        };
        scan.versions.insert(key, discovered);
    }

    /// Keeps the settings of models that are there.
    fn forget_configs(&mut self, scan: &Scan) {
        let folders: HashSet<&Path> = scan.versions.values().map(|found| &*found.folder).collect();
        self.configs.retain(|path, _| path.parent().is_some_and(|folder| folders.contains(folder)));
    }

    fn config(&mut self, root: &Path, folder: &Path, name: &str) -> Config {
        let given = self.given.as_ref().filter(|(model, _)| **model == *name).map(|(_, given)| Arc::clone(given));
        let there = |file: &&ConfigFile| fs::symlink_metadata(folder.join(file.name())).is_ok();
        let files: Vec<ConfigFile> = ConfigFile::ALL.iter().filter(there).copied().collect();
        match (given, &files[..]) {
            (Some(given), files) if files.contains(&ConfigFile::ModelToml) => {
                let own = self.config_file(root, folder, ConfigFile::ModelToml)?;
                Ok(Arc::new(given.with_model_of(&own)))
            }
            (Some(given), _) => Ok(given),
            (None, []) => Ok(Arc::default()),
            (None, [file]) => self.config_file(root, folder, *file),
            (None, _) => {
                let own = self.config_file(root, folder, ConfigFile::ModelToml)?;
                let triton = self.config_file(root, folder, ConfigFile::ConfigPbtxt)?;
                if !own.is_of_the_model_alone() {
                    return Err(
                        "`model.toml` beside `config.pbtxt` says how the model is served, expected it to say only \
                                what the model is: [[layers]], [encoder], [goldens]"
                            .into(),
                    );
                }
                Ok(Arc::new(triton.with_model_of(&own)))
            }
        }
    }

    fn config_file(&mut self, root: &Path, folder: &Path, file: ConfigFile) -> Config {
        let path = folder.join(file.name());
        let Ok(metadata) = fs::metadata(&path) else { return Err(format!("{}: cannot be read", file.name())) };
        let facts = facts(&path, &metadata);
        match self.configs.get(&path) {
            Some((known, config)) if *known == facts => config.clone(),
            _ => {
                let config = read_text(root, &path, MAX_CONFIG_BYTES)
                    .map_err(|error| format!("{}: {error}", file.name()))
                    .and_then(|text| parse(file, &text, folder))
                    .map(Arc::new);
                self.configs.insert(path, (facts, config.clone()));
                config
            }
        }
    }
}

/// What a person should know of a scan that did not find what it should, in parentheses.
fn notes(scan: &Scan) -> String {
    let notes: Vec<&str> = scan.notes.iter().chain(scan.unreadable.values()).map(String::as_str).collect();
    if notes.is_empty() { String::new() } else { format!(" ({})", notes.join("; ")) }
}

fn parse(file: ConfigFile, text: &str, folder: &Path) -> Result<ModelConfig, String> {
    let config = match file {
        ConfigFile::ModelToml => ModelConfig::parse(text),
        ConfigFile::ConfigPbtxt => pbtxt::parse(text, &file_name(folder).unwrap_or_default()),
        ConfigFile::Parameter => pbtxt::parse_json(text, &file_name(folder).unwrap_or_default()),
    };
    config.map_err(|problems| problems.to_string())
}

/// What the settings call a version's file.
fn named(config: &Config) -> Option<&str> {
    config.as_ref().ok()?.model_file.as_deref()
}

/// The file that makes the folder a version's: the one that settings name, or one of the usual names.
fn model_in(folder: &Path, named: Option<&str>) -> Option<PathBuf> {
    let usual = if named.is_none() { &MODEL_FILES[..] } else { &[] };
    let mut files = named.iter().chain(usual).map(|file| folder.join(file));
    files.find(|model| fs::symlink_metadata(model).is_ok())
}

/// Nobody can tell which of two formats is meant. A file that was named by itself is.
fn two_formats(model: &Path) -> Option<String> {
    let rivals = MODEL_FILES[1..].iter().filter(|_| file_name(model).is_some_and(|name| name == MODEL_FILE));
    let rival = rivals.into_iter().find(|rival| model.with_file_name(rival).exists())?;
    Some(format!("`{MODEL_FILE}` and `{rival}` are both there, expected one"))
}

/// Whether a model can be called so, and asked for in a URL.
pub fn is_model_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.chars().any(|c| c.is_control() || c == '/')
}

/// What [`is_model_name`] takes, for error messages.
pub fn model_name_form() -> String {
    format!("1 to {MAX_NAME_BYTES} bytes without control characters and slashes")
}

fn first(name: &Arc<str>) -> Key {
    // Version 1 is positive.
    Key { model: Arc::clone(name), version: VersionId::new(1).unwrap_or_else(|| unreachable!()) }
}

/// A file in the model's own folder, links followed inside it only.
pub fn read_beside(folder: &Path, file: &str, max_bytes: u64) -> Result<String, String> {
    let folder = fs::canonicalize(folder).map_err(|error| error.to_string())?;
    read_text(&folder, &folder.join(file), max_bytes)
}

/// Reads a text file that must lie, links followed, below `root`. Errors carry no path.
pub fn read_text(root: &Path, path: &Path, max_bytes: u64) -> Result<String, String> {
    String::from_utf8(read_bytes(root, path, max_bytes)?).map_err(|_| "is not UTF-8".into())
}

/// The same of any file.
pub fn read_bytes(root: &Path, path: &Path, max_bytes: u64) -> Result<Vec<u8>, String> {
    if !confined(root, path).map_err(|error| error.to_string())? {
        return Err("lies behind a symbolic link that leaves the registry".into());
    }
    if !path.is_file() {
        return Err("is not a regular file".into());
    }
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > max_bytes {
        return Err(format!("is longer than {max_bytes} bytes"));
    }
    Ok(bytes)
}

/// Whether the path, links followed, still lies below `root`, which must be canonical.
pub fn confined(root: &Path, path: &Path) -> std::io::Result<bool> {
    Ok(fs::canonicalize(path)?.starts_with(root))
}

/// The visible entries of a folder, sorted by name.
fn entries(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if found.len() == MAX_ENTRIES {
            return Err(std::io::Error::other(format!("more than {MAX_ENTRIES} entries")));
        }
        found.push(entry.path());
    }
    found.sort();
    Ok(found)
}

/// The facts of all files of a version: what lies in `version` at any depth, and the files in the model's folder
/// itself (settings, labels) and in its folder `warmup`. Other versions and models are left out.
fn fingerprint(root: &Path, folder: &Path, version: &Path) -> std::io::Result<Fingerprint> {
    let mut walk = Walk { root, files: Vec::new(), seen: HashSet::new() };
    walk.collect(version, MAX_DEPTH)?;
    if folder != version {
        for entry in entries(folder)? {
            push_file(&entry, &mut walk.files)?;
        }
        let warm_ups = folder.join(warmup::FOLDER);
        if warm_ups.is_dir() {
            walk.collect(&warm_ups, 0)?;
        }
    }
    walk.files.sort();
    Ok(Fingerprint(walk.files))
}

/// Through folders below the root, each of them once, wherever links lead.
struct Walk<'a> {
    root: &'a Path,
    files: Vec<FileFacts>,
    /// Folders, by device and inode.
    seen: HashSet<(u64, u64)>,
}

impl Walk<'_> {
    /// What the folder lies in must be below the root.
    fn collect(&mut self, folder: &Path, depth: usize) -> std::io::Result<()> {
        let mut metadata = fs::symlink_metadata(folder)?;
        if metadata.is_symlink() {
            if !confined(self.root, folder)? {
                return Ok(());
            }
            metadata = fs::metadata(folder)?;
        }
        if !self.seen.insert((metadata.dev(), metadata.ino())) {
            return Ok(());
        }
        for entry in entries(folder)? {
            if !entry.is_dir() {
                push_file(&entry, &mut self.files)?;
                continue;
            }
            let other_version = file_name(&entry).is_some_and(|name| VersionId::parse(&name).is_some());
            if depth > 0 && !other_version && model_in(&entry, None).is_none() {
                self.collect(&entry, depth - 1)?;
            }
        }
        Ok(())
    }
}

fn push_file(path: &Path, files: &mut Vec<FileFacts>) -> std::io::Result<()> {
    if files.len() == MAX_ENTRIES {
        return Err(std::io::Error::other(format!("more than {MAX_ENTRIES} files")));
    }
    // A file that vanished between listing and looking is simply not there; a dangling link has facts of its own.
    if let Ok(metadata) = fs::metadata(path).or_else(|_| fs::symlink_metadata(path))
        && !metadata.is_dir()
    {
        files.push(facts(path, &metadata));
    }
    Ok(())
}

fn facts(path: &Path, metadata: &Metadata) -> FileFacts {
    FileFacts {
        path: path.to_path_buf(),
        size: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
        inode: metadata.ino(),
    }
}

fn file_name(path: &Path) -> Option<String> {
    path.file_name()?.to_str().map(str::to_string)
}

#[cfg(test)]
pub(super) mod tests_support {
    use super::*;

    /// A version that exists only in a test, told apart by the size of its one file.
    pub fn discovered(model: &str, version: u64, size: u64) -> Discovered {
        let file = FileFacts { path: MODEL_FILE.into(), size, modified: (0, 0), changed: (0, 0), inode: 0 };
        Discovered {
            key: Key { model: model.into(), version: VersionId::new(version).unwrap() },
            model: MODEL_FILE.into(),
            folder: PathBuf::new(),
            config: Ok(Arc::default()),
            refused: None,
            fingerprint: Fingerprint(vec![file]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Root(tempfile::TempDir);

    impl Root {
        fn new() -> Root {
            Root(tempfile::tempdir().unwrap())
        }

        fn file(&self, path: &str, content: &str) -> &Root {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
            self
        }

        fn scan(&self) -> Scan {
            Folder::new(self.0.path().to_path_buf(), "model").scan().unwrap()
        }

        fn keys(&self) -> Vec<String> {
            self.scan().versions.keys().map(Key::to_string).collect()
        }
    }

    #[test]
    fn every_layout_is_found_and_everything_else_stepped_over() {
        let root = Root::new();
        root.file("a/2/model.onnx", "x").file("a/10/model.onnx", "x").file("b/model.onnx", "x");
        root.file("a/02/model.onnx", "x").file("a/latest/model.onnx", "x").file("a/3/weights.bin", "x");
        root.file(".git/1/model.onnx", "x").file("a/.5/model.onnx", "x").file("README.md", "x").file("empty/x", "x");
        assert_eq!(root.keys(), ["a/2", "a/10", "b/1"]);
        root.file("model.onnx", "x");
        assert_eq!(root.keys(), ["a/2", "a/10", "b/1", "model/1"]);
    }

    #[test]
    fn a_root_that_is_a_file_and_one_model_alone() {
        let root = Root::new();
        root.file("x/net.onnx", "x").file("a/2/model.onnx", "x").file("a/3/model.onnx", "x").file("a/model.toml", "");
        let scan = Folder::new(root.0.path().join("x/net.onnx"), "mine").scan().unwrap();
        assert_eq!(scan.versions.keys().map(Key::to_string).collect::<Vec<_>>(), ["mine/1"]);
        let one = |path: &str| {
            let scan = Folder::new(root.0.path().join(path), "model").scan_one().unwrap();
            scan.versions.keys().map(Key::to_string).collect::<Vec<_>>()
        };
        assert_eq!(one("a"), ["a/2", "a/3"]);
        assert_eq!(one("a/3"), ["a/3"]);
        assert_eq!(one("x/net.onnx"), ["model/1"]);
    }

    #[test]
    fn safetensors_stand_in_any_place_of_onnx_and_not_beside_it() {
        let root = Root::new();
        root.file("a/2/model.safetensors", "x").file("b/model.safetensors.index.json", "x").file("c/1/model.onnx", "x");
        root.file("c/1/model.safetensors", "x")
            .file("d/1/1_Pooling/config.json", "x")
            .file("d/1/model.safetensors", "x");
        let scan = root.scan();
        assert_eq!(root.keys(), ["a/2", "b/1", "c/1", "d/1"]);
        let refused: Vec<_> = scan.versions.values().filter_map(|found| found.refused.as_deref()).collect();
        assert_eq!(refused, ["`model.onnx` and `model.safetensors` are both there, expected one"]);
        let formats: Vec<Format> = scan.versions.values().map(Discovered::format).collect();
        assert_eq!(formats, [Format::Safetensors, Format::Safetensors, Format::Onnx, Format::Safetensors]);
        let pooling = |root: &Root| root.scan().versions.into_values().next_back().unwrap().fingerprint;
        let before = pooling(&root);
        root.file("d/1/1_Pooling/config.json", "longer");
        assert!(pooling(&root) != before, "what an encoder reads is part of its fingerprint");
        let alone = Folder::new(root.0.path().join("a/2/model.safetensors"), "mine").scan().unwrap();
        assert!(alone.versions.values().all(|found| found.format() == Format::Safetensors && found.refused.is_none()));
    }

    #[test]
    fn a_missing_root_is_an_error() {
        let error = Folder::new("/nonexistent/registry".into(), "m").scan().unwrap_err();
        assert!(error.to_string().starts_with("registry `/nonexistent/registry`: "), "{error}");
    }

    #[test]
    fn an_explicit_version_hides_the_loose_file() {
        let root = Root::new();
        root.file("a/model.onnx", "loose").file("a/1/model.onnx", "x");
        let scan = root.scan();
        assert_eq!(scan.versions.len(), 1);
        assert!(scan.versions.values().all(|found| found.model.ends_with("a/1/model.onnx")));
        assert!(scan.notes[0].contains("hidden"));
    }

    #[test]
    fn links_inside_the_root_are_followed_and_those_out_of_it_refused() {
        let outside = Root::new();
        outside.file("1/model.onnx", "x");
        let root = Root::new();
        root.file("a/1/model.onnx", "x").file("b/1/note", "").file("c/..data/model.onnx", "x").file("c/1/note", "");
        symlink("1", root.0.path().join("a/2")).unwrap();
        symlink(outside.0.path().join("1/model.onnx"), root.0.path().join("b/1/model.onnx")).unwrap();
        symlink("../..data/model.onnx", root.0.path().join("c/1/model.onnx")).unwrap();
        symlink(outside.0.path(), root.0.path().join("d")).unwrap();
        symlink(outside.0.path().join("1"), root.0.path().join("a/3")).unwrap();
        symlink("nowhere", root.0.path().join("a/4")).unwrap();
        let scan = root.scan();
        let refused: Vec<String> =
            scan.versions.iter().filter(|(_, found)| found.refused.is_some()).map(|(key, _)| key.to_string()).collect();
        assert_eq!(root.keys(), ["a/1", "a/2", "a/3", "b/1", "c/1"]);
        assert_eq!(refused, ["a/3", "b/1"]);
        assert!(scan.notes[0].contains("`d` is a symbolic link that leaves the registry"));
    }

    #[test]
    fn links_to_folders_are_looked_through_once_and_never_out_of_the_root() {
        let outside = Root::new();
        outside.file("secret", "x");
        let root = Root::new();
        root.file("a/1/model.onnx", "x").file("a/1/data/weights", "x");
        symlink(outside.0.path(), root.0.path().join("a/1/data/out")).unwrap();
        // Followed each time, these would be 20 to the power of the depth.
        (0..20).for_each(|n| symlink(".", root.0.path().join(format!("a/1/data/loop{n}"))).unwrap());
        let scan = root.scan();
        let found = scan.versions.values().next().unwrap();
        assert_eq!(found.refused, None);
        let files: Vec<_> = found.fingerprint.0.iter().map(|file| file_name(&file.path).unwrap()).collect();
        assert_eq!(files, ["weights", "model.onnx"]);
    }

    #[test]
    fn settings_are_read_with_the_scan_and_their_problems_kept() {
        let root = Root::new();
        root.file("a/1/model.onnx", "x").file("a/model.toml", "threads = 3");
        root.file("b/1/model.onnx", "x").file("b/model.toml", "thread = 3");
        let scan = root.scan();
        let configs: Vec<_> = scan.versions.values().map(|found| &found.config).collect();
        assert_eq!(configs[0].as_ref().unwrap().threads, Some(3));
        assert!(configs[1].as_ref().unwrap_err().contains("`threads`, perhaps"));
    }

    #[test]
    fn settings_in_either_file_name_the_model_and_never_in_both() {
        let root = Root::new();
        root.file("a/1/net.onnx", "x").file("a/config.pbtxt", "default_model_filename: 'net.onnx'");
        root.file("b/1/net.onnx", "x").file("b/model.toml", "model_file = 'net.onnx'");
        root.file("c/1/model.onnx", "x").file("c/model.toml", "threads = 2").file("c/config.pbtxt", "");
        root.file("d/1/model.plan", "x").file("d/config.pbtxt", "platform: 'tensorrt_plan'");
        root.file("e/1/model.plan", "x").file("e/config.pbtxt", "").file("f/1/model.plan", "x");
        let scan = root.scan();
        assert_eq!(root.keys(), ["a/1", "b/1", "c/1", "d/1", "e/1"]);
        let found: Vec<&Discovered> = scan.versions.values().collect();
        assert!(found[..2].iter().all(|found| found.model.ends_with("1/net.onnx") && found.refused.is_none()));
        let problem = |i: usize| found[i].config.as_ref().unwrap_err().as_str();
        assert!(
            problem(2).starts_with("`model.toml` beside `config.pbtxt` says how the model is served"),
            "{}",
            problem(2)
        );
        assert!(problem(3).contains("tensorrt_plan") && found[3].refused.is_none(), "{}", problem(3));
        assert!(found[4].refused.as_ref().unwrap().starts_with("`model.onnx` cannot be read"));
        let print = || root.scan().versions.into_values().next().unwrap().fingerprint;
        let before = print();
        root.file("a/warmup/x.bin", "x");
        assert!(print() != before, "what warms a version up is part of its fingerprint");
    }

    #[test]
    fn settings_of_models_that_are_gone_are_forgotten() {
        let root = Root::new();
        root.file("a/1/model.onnx", "x").file("a/model.toml", "").file("b/1/model.onnx", "x").file("b/model.toml", "");
        let mut folder = Folder::new(root.0.path().to_path_buf(), "model");
        folder.scan().unwrap();
        assert_eq!(folder.configs.len(), 2);
        fs::remove_dir_all(root.0.path().join("a")).unwrap();
        folder.scan().unwrap();
        assert_eq!(folder.configs.len(), 1);
    }

    #[test]
    fn fingerprints_see_every_file_of_a_version_and_no_other() {
        let root = Root::new();
        root.file("a/1/model.onnx", "x")
            .file("a/1/data/w.bin", "x")
            .file("a/2/model.onnx", "x")
            .file("a/labels.txt", "x");
        let prints = || {
            let scan = root.scan();
            scan.versions.into_values().map(|found| found.fingerprint).collect::<Vec<_>>()
        };
        let before = prints();
        root.file("a/1/data/w.bin", "longer");
        let weights = prints();
        assert!(before[0] != weights[0] && before[1] == weights[1]);
        root.file("a/labels.txt", "longer");
        let labels = prints();
        assert!(weights[0] != labels[0] && weights[1] != labels[1]);
    }

    #[test]
    fn bad_names_are_noted() {
        let root = Root::new();
        root.file("a\nb/1/model.onnx", "x");
        let scan = root.scan();
        assert!(scan.versions.is_empty() && scan.notes[0].contains("a\\nb"));
        assert!(Folder::new("r".into(), "m").empty(&scan).to_string().contains("holds no model"));
    }
}
