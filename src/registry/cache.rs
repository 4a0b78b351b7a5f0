//! The private copy of every model that is served: files are copied, hashed on the way, and loaded from the copy, so
//! that what is served cannot be truncated or swapped under it.
//!
//! Content-addressed: a version's files lie in a folder named by their digest, shared by versions of equal content and
//! removed after the last of them was released. Each registry has a folder of its own, marked by a locked file; folders
//! whose lock is free are left over from a process that was killed, and are swept at start.
//!
//! Digest: the SHA-256 of the model file where it is the only one; otherwise the SHA-256 of the text that
//! `sha256sum` prints for all files, sorted by name (`<hex>  <name>\n`, names relative to the model's folder).

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::source::{MODEL_FILE, confined};

/// The most bytes all files of one version may have together.
pub const MAX_ARTIFACT_BYTES: u64 = 64 << 30;
/// The most external data files of one model.
const MAX_FILES: usize = 4096;
/// How many lock files are tried.
const LOCK_ATTEMPTS: u32 = 8;
const COPY_BUFFER_BYTES: usize = 1 << 20;
const RUN_PREFIX: &str = "tidegate-";
const LOCK_SUFFIX: &str = ".lock";

#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("model cache `{folder}`: {error}")]
    Unusable { folder: String, error: io::Error },
    #[error("`{file}` is not there")]
    Missing { file: String },
    #[error("`{file}` cannot be read: {error}")]
    Unreadable { file: String, error: io::Error },
    #[error("`{file}` leaves the model's folder, expected a file inside it")]
    Escapes { file: String },
    #[error("`{file}` is not a regular file")]
    NotAFile { file: String },
    #[error("{found} files beside the model, expected at most {MAX_FILES}")]
    TooMany { found: usize },
    #[error("more than {MAX_ARTIFACT_BYTES} bytes of model files")]
    TooLarge,
    #[error("`{file}` changed while it was copied")]
    Changed { file: String },
    #[error("no space left in the model cache for `{file}`")]
    Full { file: String },
    #[error("the model cache cannot be written for `{file}`: {error}")]
    Unwritable { file: String, error: io::Error },
}

/// One version's files in the cache, in use until released.
#[derive(Debug)]
pub struct Cached {
    /// `sha256:<hex>`.
    pub digest: Arc<str>,
    /// The copy of the model file.
    pub model: PathBuf,
    /// Of all files together.
    pub bytes: u64,
    /// Where all copies lie.
    pub folder: PathBuf,
}

pub struct Cache {
    run: PathBuf,
    lock_path: PathBuf,
    /// Held locked until the folder is removed, or the process ends.
    lock: Mutex<Option<File>>,
    staged: AtomicU64,
    /// Users of each folder.
    users: Mutex<BTreeMap<PathBuf, usize>>,
}

impl Cache {
    /// Sweeps what dead processes left below `parent` and makes this registry's own folder there.
    pub fn open(parent: &Path) -> Result<Cache, CacheError> {
        let unusable = |error| CacheError::Unusable { folder: parent.display().to_string(), error };
        private_folder(parent).map_err(unusable)?;
        sweep(parent).map_err(unusable)?;
        for _ in 0..LOCK_ATTEMPTS {
            // A name that was never used: process numbers come again, in containers at every start.
            let run = parent.join(format!("{RUN_PREFIX}{}", uuid::Uuid::now_v7().simple()));
            let lock_path = run.with_extension(&LOCK_SUFFIX[1..]);
            if let Some(lock) = take_lock(&lock_path).map_err(unusable)? {
                DirBuilder::new().mode(0o700).create(&run).map_err(unusable)?;
                let (lock, staged) = (Mutex::new(Some(lock)), AtomicU64::new(0));
                return Ok(Cache { run, lock_path, lock, staged, users: Mutex::default() });
            }
        }
        Err(unusable(io::Error::other("its lock file is taken away again and again")))
    }

    /// This registry's own.
    pub fn folder(&self) -> &Path {
        &self.run
    }

    /// Copies a model as `name`, those of the files `beside` it that are there, and the further ones that `describe`,
    /// which is given the copy of the model, finds to be needed. After an error nothing of the version is left behind.
    pub fn copy<T, E: From<CacheError>>(
        &self,
        model: &Path,
        name: &str,
        beside: &[&str],
        describe: impl FnOnce(&Path) -> Result<(T, BTreeSet<String>), E>,
    ) -> Result<(Cached, T), E> {
        let source = canonical_folder(model)?;
        let staging = Staging::new(self.run.join(format!("staging-{}", self.staged.fetch_add(1, Ordering::Relaxed))))?;
        let mut room = MAX_ARTIFACT_BYTES;
        let mut files = BTreeMap::new();
        let copy = staging.folder.join(name);
        // The model file itself may be a link to elsewhere in the registry; the scan has checked where it leads.
        files.insert(name.to_string(), copy_hashed(model, &copy, name, &mut room)?);
        for name in beside.iter().filter(|name| fs::symlink_metadata(source.join(name)).is_ok()) {
            files.insert(name.to_string(), copy_external(&source, &staging.folder, name, &mut room)?);
        }
        let (described, external) = describe(&copy)?;
        if external.len() > MAX_FILES {
            return Err(CacheError::TooMany { found: external.len() }.into());
        }
        for name in external {
            // Those beside the model were copied before.
            if let Entry::Vacant(place) = files.entry(name) {
                let hex = copy_external(&source, &staging.folder, place.key(), &mut room)?;
                place.insert(hex);
            }
        }
        let digest = digest(&files);
        let folder = self.publish(staging, &digest)?;
        let bytes = MAX_ARTIFACT_BYTES - room;
        let digest = format!("sha256:{digest}").into();
        Ok((Cached { digest, model: folder.join(name), bytes, folder }, described))
    }

    /// Moves a finished copy to its place, or drops it where the same content is there already.
    fn publish(&self, staging: Staging, digest: &str) -> Result<PathBuf, CacheError> {
        let folder = self.run.join(digest);
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let count = users.entry(folder.clone()).or_default();
        if *count == 0 {
            staging.rename(&folder).inspect_err(|_| *count = 0)?;
        }
        *count += 1;
        Ok(folder)
    }

    /// Gives one use back; the last one removes the files. To be called after whatever was loaded from them is gone.
    pub fn release(&self, cached: Cached) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = users.get_mut(&cached.folder) {
            *count -= 1;
            if *count == 0 {
                users.remove(&cached.folder);
                // What cannot be removed now goes with the whole folder at exit, or is swept by the next process.
                let _ = fs::remove_dir_all(&cached.folder);
            }
        }
    }

    /// Removes the registry's folder, once. What is still mapped by an engine stays readable to it.
    pub fn remove(&self) {
        if let Some(lock) = self.lock.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Best effort at exit; the next process sweeps.
            let _ = fs::remove_dir_all(&self.run);
            let _ = fs::remove_file(&self.lock_path);
            drop(lock);
        }
    }
}

/// A copy being made; removed when dropped unless it was moved to its place.
struct Staging {
    folder: PathBuf,
}

impl Staging {
    fn new(folder: PathBuf) -> Result<Staging, CacheError> {
        DirBuilder::new().mode(0o700).create(&folder).map_err(|error| write_error(MODEL_FILE, error))?;
        Ok(Staging { folder })
    }

    fn rename(self, to: &Path) -> Result<(), CacheError> {
        fs::rename(&self.folder, to).map_err(|error| write_error(MODEL_FILE, error))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Gone already where it was renamed; otherwise the error that led here is the one to report.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn private_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes and locks a new file. The lock goes with the process, however it ends. `None` where a sweeper came between
/// making and locking and took the file for a dead process's: that name is lost.
fn take_lock(path: &Path) -> io::Result<Option<File>> {
    let file = File::options().write(true).create_new(true).open(path)?;
    let ours = file.try_lock().is_ok() && is_at(&file, path);
    Ok(ours.then_some(file))
}

/// Whether the open file is what lies at that path now.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn sweep(parent: &Path) -> io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let name = entry?.file_name();
        let Some(run) = name.to_str().and_then(|name| name.strip_suffix(LOCK_SUFFIX)) else { continue };
        if !run.starts_with(RUN_PREFIX) {
            continue;
        }
        let lock_path = parent.join(&name);
        // In a folder that others may write to. Looked at before it is opened: opening a pipe would wait for a writer.
        if !fs::symlink_metadata(&lock_path).is_ok_and(|metadata| metadata.is_file()) {
            continue;
        }
        // Another user's files that cannot be opened or removed are none of ours.
        let Ok(lock) = File::open(&lock_path) else { continue };
        if lock.try_lock().is_ok() && is_at(&lock, &lock_path) {
            let _ = fs::remove_dir_all(parent.join(run));
            let _ = fs::remove_file(&lock_path);
        }
    }
    Ok(())
}

fn canonical_folder(model: &Path) -> Result<PathBuf, CacheError> {
    let folder = model.parent().unwrap_or(model);
    fs::canonicalize(folder).map_err(|error| read_error(MODEL_FILE, error))
}

fn copy_external(source: &Path, staging: &Path, name: &str, room: &mut u64) -> Result<String, CacheError> {
    let file = || name.to_string();
    let relative = Path::new(name);
    let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || name.is_empty() || name.contains(['\\', '\n', '\0']) {
        return Err(CacheError::Escapes { file: file() });
    }
    let from = source.join(relative);
    if !confined(source, &from).map_err(|error| read_error(name, error))? {
        return Err(CacheError::Escapes { file: file() });
    }
    let to = staging.join(relative);
    if let Some(folder) = to.parent() {
        private_folder(folder).map_err(|error| write_error(name, error))?;
    }
    copy_hashed(&from, &to, name, room)
}

/// Copies one regular file and returns its SHA-256 in hex. Refuses a file that changes meanwhile.
fn copy_hashed(from: &Path, to: &Path, name: &str, room: &mut u64) -> Result<String, CacheError> {
    // Looked at before it is opened: opening a pipe would wait for a writer.
    let before = fs::metadata(from).map_err(|error| read_error(name, error))?;
    if !before.is_file() {
        return Err(CacheError::NotAFile { file: name.into() });
    }
    let mut reader = File::open(from).map_err(|error| read_error(name, error))?;
    let mut writer = File::options().write(true).create_new(true).open(to).map_err(|error| write_error(name, error))?;
    let hex = copy_stream(&mut reader, &mut writer, name, room)?;
    let after = fs::metadata(from).map_err(|error| read_error(name, error))?;
    let facts = |m: &fs::Metadata| (m.ino(), m.len(), m.mtime(), m.mtime_nsec());
    if facts(&before) != facts(&after) {
        return Err(CacheError::Changed { file: name.into() });
    }
    Ok(hex)
}

fn copy_stream(
    reader: &mut impl Read,
    writer: &mut impl Write,
    name: &str,
    room: &mut u64,
) -> Result<String, CacheError> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    loop {
        let read = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(read_error(name, error)),
        };
        *room = room.checked_sub(read as u64).ok_or(CacheError::TooLarge)?;
        hash.update(&buffer[..read]);
        writer.write_all(&buffer[..read]).map_err(|error| write_error(name, error))?;
    }
    writer.flush().map_err(|error| write_error(name, error))?;
    Ok(hex(&hash.finalize()))
}

fn digest(files: &BTreeMap<String, String>) -> String {
    match files.values().next() {
        Some(only) if files.len() == 1 => only.clone(),
        _ => {
            let listing: String = files.iter().map(|(name, hex)| format!("{hex}  {name}\n")).collect();
            hex(&Sha256::digest(listing))
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read_error(name: &str, error: io::Error) -> CacheError {
    match error.kind() {
        ErrorKind::NotFound => CacheError::Missing { file: name.into() },
        _ => CacheError::Unreadable { file: name.into(), error },
    }
}

fn write_error(name: &str, error: io::Error) -> CacheError {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            CacheError::Full { file: name.into() }
        }
        _ => CacheError::Unwritable { file: name.into(), error },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Setup {
        root: tempfile::TempDir,
        cache: Cache,
    }

    impl Setup {
        fn new() -> Setup {
            let root = tempfile::tempdir().unwrap();
            let cache = Cache::open(&root.path().join("cache")).unwrap();
            fs::create_dir_all(root.path().join("m/1/data")).unwrap();
            fs::write(root.path().join("m/1/model.onnx"), "model").unwrap();
            fs::write(root.path().join("m/1/data/w.bin"), "weights").unwrap();
            Setup { root, cache }
        }

        fn copy(&self, external: &[&str]) -> Result<Cached, CacheError> {
            let external = external.iter().map(|name| name.to_string()).collect();
            let model = self.root.path().join("m/1/model.onnx");
            self.cache
                .copy(&model, MODEL_FILE, &["notes.json", "data/no.json"], |copy| {
                    assert_eq!(fs::read(copy).unwrap(), b"model");
                    Ok(((), external))
                })
                .map(|(cached, ())| cached)
        }

        fn left(&self) -> usize {
            fs::read_dir(&self.cache.run).unwrap().count()
        }
    }

    #[test]
    fn the_digest_is_what_sha256sum_says() {
        let setup = Setup::new();
        let alone = setup.copy(&[]).unwrap();
        // printf model | sha256sum
        assert_eq!(&*alone.digest, "sha256:9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4");
        assert_eq!(alone.model.parent().unwrap().file_name().unwrap().to_str().unwrap(), &alone.digest[7..]);
        let two = setup.copy(&["data/w.bin"]).unwrap();
        let listing = format!("{}  data/w.bin\n{}  model.onnx\n", hex(&Sha256::digest("weights")), &alone.digest[7..]);
        assert_eq!(*two.digest, format!("sha256:{}", hex(&Sha256::digest(listing))));
        assert_eq!(fs::read(two.folder.join("data/w.bin")).unwrap(), b"weights");
    }

    #[test]
    fn files_beside_the_model_are_copied_where_they_are_there() {
        let setup = Setup::new();
        let without = setup.copy(&[]).unwrap();
        fs::write(setup.root.path().join("m/1/notes.json"), "{}").unwrap();
        let with = setup.copy(&["notes.json"]).unwrap();
        assert_eq!(fs::read(with.folder.join("notes.json")).unwrap(), b"{}");
        assert!(with.digest != without.digest && !without.folder.join("notes.json").exists());
        symlink("/etc/hostname", setup.root.path().join("m/1/data/no.json")).unwrap();
        assert!(matches!(setup.copy(&[]).unwrap_err(), CacheError::Escapes { file } if file == "data/no.json"));
    }

    #[test]
    fn equal_content_is_shared_until_the_last_release() {
        let setup = Setup::new();
        let (first, second) = (setup.copy(&[]).unwrap(), setup.copy(&[]).unwrap());
        assert_eq!((first.model.clone(), setup.left()), (second.model.clone(), 1));
        setup.cache.release(first);
        assert!(second.model.exists());
        setup.cache.release(second);
        assert_eq!(setup.left(), 0);
    }

    #[test]
    fn a_failed_copy_leaves_nothing() {
        let setup = Setup::new();
        symlink("/etc/hostname", setup.root.path().join("m/1/link")).unwrap();
        let missing = setup.copy(&["data/w.bin", "gone.bin"]).unwrap_err();
        assert!(matches!(missing, CacheError::Missing { file } if file == "gone.bin"));
        for name in ["../2/w", "/etc/hostname", "a/../../x", "link", "", "..\\x", "C:\\x", "data/.."] {
            let error = setup.copy(&[name]).unwrap_err();
            assert!(matches!(error, CacheError::Escapes { .. } | CacheError::Missing { .. }), "{name}: {error}");
        }
        assert!(matches!(setup.copy(&["data"]).unwrap_err(), CacheError::NotAFile { .. }));
        let model = setup.root.path().join("m/1/model.onnx");
        let refused: Result<(Cached, ()), CacheError> =
            setup.cache.copy(&model, MODEL_FILE, &[], |_| Err(CacheError::TooLarge));
        assert!(refused.is_err());
        assert_eq!(setup.left(), 0);
    }

    #[test]
    fn a_full_disk_and_a_file_too_large_are_named() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let error = copy_stream(&mut &b"abc"[..], &mut Full, "w.bin", &mut 10).unwrap_err();
        assert_eq!(error.to_string(), "no space left in the model cache for `w.bin`");
        let error = copy_stream(&mut &b"abc"[..], &mut io::sink(), "w.bin", &mut 2).unwrap_err();
        assert!(matches!(error, CacheError::TooLarge));
    }

    #[test]
    fn folders_of_dead_processes_are_swept_and_those_of_living_ones_kept() {
        let parent = tempfile::tempdir().unwrap();
        let dead = parent.path().join("tidegate-1-0");
        fs::create_dir(&dead).unwrap();
        fs::write(parent.path().join("tidegate-1-0.lock"), "").unwrap();
        fs::create_dir(parent.path().join("someone-elses")).unwrap();
        let living = Cache::open(parent.path()).unwrap();
        assert!(!dead.exists());
        let other = Cache::open(parent.path()).unwrap();
        assert!(living.run.exists() && other.run.exists() && living.run != other.run);
        [&living, &other, &living].into_iter().for_each(Cache::remove);
        let left: Vec<_> = fs::read_dir(parent.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["someone-elses"]);
    }

    #[test]
    fn what_only_looks_like_a_lock_is_stepped_over() {
        let parent = tempfile::tempdir().unwrap();
        let pipe = parent.path().join("tidegate-pipe.lock");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        fs::write(parent.path().join("elsewhere"), "").unwrap();
        symlink("elsewhere", parent.path().join("tidegate-link.lock")).unwrap();
        fs::create_dir(parent.path().join("tidegate-link")).unwrap();
        let (opened, wait) = std::sync::mpsc::channel();
        let folder = parent.path().to_path_buf();
        std::thread::spawn(move || opened.send(Cache::open(&folder).map(|cache| cache.remove())));
        wait.recv_timeout(std::time::Duration::from_secs(60)).expect("the pipe is not waited for").unwrap();
        assert!(pipe.exists() && parent.path().join("tidegate-link").exists());
    }

    #[test]
    fn caches_opened_and_removed_side_by_side_leave_each_other_alone() {
        let parent = tempfile::tempdir().unwrap();
        let model = parent.path().join("model.onnx");
        fs::write(&model, "model").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let cache = Cache::open(parent.path()).unwrap();
                        let copied =
                            cache.copy::<(), CacheError>(&model, MODEL_FILE, &[], |_| Ok(((), BTreeSet::new())));
                        let (cached, ()) = copied.unwrap();
                        assert!(cached.model.exists());
                        cache.remove();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }
}
