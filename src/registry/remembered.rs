//! What was measured of a version when it was loaded, kept for the next start of the server: small files in a folder of the
//! user's own, one for each version, machine and setting.
//!
//! Trust: whoever may write as this user may write here; nobody else. The folder must belong to the user who runs the
//! server and be writable by nobody else, and so must every file, or nothing of it is read. A file carries the SHA-256 of
//! its content, which tells damage, not malice; one that is damaged, or of another key, is as if it were not there. What is
//! kept can make a server slow, not wrong: answers do not depend on it.
//!
//! Nothing here fails a load: what cannot be written is said once, and measured again at the next start. Written to a file
//! of another name and moved, so that no reader sees half of it, whoever else writes.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::calibrate::Calibration;
use crate::scheduler::Sample;

/// Of what is kept, in a key.
pub const FORMAT: u32 = 2;
/// The most files that are kept, and bytes of one. Those not used for longest go, when a start of the server first writes.
const MAX_ENTRIES: usize = 1024;
const MAX_BYTES: u64 = 64 << 10;
const SUFFIX: &str = ".json";
const TEMPORARY: &str = ".tmp";

/// What a measurement depends on, a line each: model, engine, machine, settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(pub String);

/// A folder of measurements.
pub struct Remembered {
    folder: PathBuf,
    /// The user who runs the server.
    user: u32,
    most: usize,
    complained: AtomicBool,
    pruned: AtomicBool,
}

/// A file's content below the line of its hash.
#[derive(Serialize, Deserialize)]
struct Entry {
    key: String,
    narrow: Vec<Run>,
    wide: Vec<Run>,
    wide_reason: String,
}

#[derive(Serialize, Deserialize)]
struct Run {
    rows: usize,
    length: Option<usize>,
    nanoseconds: u64,
}

impl Remembered {
    /// `own`: a file or folder that this process made, which tells its user. Makes nothing yet.
    pub fn new(folder: PathBuf, own: &Path) -> io::Result<Remembered> {
        let user = fs::metadata(own)?.uid();
        let (complained, pruned) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Remembered { folder, user, most: MAX_ENTRIES, complained, pruned })
    }

    /// What was measured then, if it was.
    pub fn recall(&self, key: &Key) -> Option<Calibration> {
        let path = self.path(key);
        match self.read(&path, key) {
            Ok(calibration) => calibration,
            Err(why) => {
                let file = path.file_name().unwrap_or_default().display().to_string();
                tracing::warn!(file, "what was remembered of a model is not used: {why}");
                None
            }
        }
    }

    pub fn keep(&self, key: &Key, calibration: &Calibration) {
        if let Err(error) = self.write(key, calibration)
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            let folder = self.folder.display().to_string();
            tracing::warn!(folder, "what is measured of models is not remembered: {error}");
        }
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(format!("{}{SUFFIX}", hex(key.0.as_bytes())))
    }

    /// Whether a file or folder can hold nothing that another user put there.
    fn check_owner(&self, metadata: &fs::Metadata) -> Result<(), String> {
        if metadata.uid() != self.user {
            return Err(format!("it belongs to user {}, expected {}", metadata.uid(), self.user));
        }
        match metadata.mode() & 0o022 {
            0 => Ok(()),
            _ => Err(format!("others may write to it (mode {:o})", metadata.mode() & 0o7777)),
        }
    }

    fn check_folder(&self) -> io::Result<()> {
        let metadata = fs::symlink_metadata(&self.folder)?;
        if !metadata.is_dir() {
            return Err(io::Error::other("it is not a folder"));
        }
        self.check_owner(&metadata).map_err(io::Error::other)
    }

    fn read(&self, path: &Path, key: &Key) -> Result<Option<Calibration>, String> {
        let told = |error: io::Error| error.to_string();
        // Looked at before it is opened: opening a pipe would wait for a writer.
        let there = match fs::symlink_metadata(path) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
            there => there.map_err(told)?,
        };
        self.check_folder().map_err(|error| format!("its folder is not to be trusted: {error}"))?;
        if !there.is_file() {
            return Err("it is not a regular file".into());
        }
        let file = File::open(path).map_err(told)?;
        let opened = file.metadata().map_err(told)?;
        self.check_owner(&opened)?;
        if (opened.dev(), opened.ino()) != (there.dev(), there.ino()) {
            return Err("it was replaced meanwhile".into());
        }
        let mut content = String::new();
        (&file).take(MAX_BYTES).read_to_string(&mut content).map_err(told)?;
        let (hash, body) = content.split_once('\n').ok_or("it is damaged")?;
        if hash != hex(body.as_bytes()) {
            return Err("it is damaged".into());
        }
        let entry: Entry = serde_json::from_str(body).map_err(|error| format!("it is of another form: {error}"))?;
        if entry.key != key.0 {
            return Err("it is another model's".into());
        }
        // What is used stays longest. Where nothing can be written, nothing goes either.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(Calibration {
            narrow: entry.narrow.into_iter().map(Sample::from).collect(),
            wide: entry.wide.into_iter().map(Sample::from).collect(),
            wide_reason: entry.wide_reason,
        }))
    }

    fn write(&self, key: &Key, calibration: &Calibration) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        self.check_folder()?;
        let Calibration { narrow, wide, wide_reason } = calibration;
        let runs = |samples: &[Sample]| samples.iter().map(Run::from).collect();
        let (narrow, wide, wide_reason) = (runs(narrow), runs(wide), wide_reason.clone());
        let body = serde_json::to_string(&Entry { key: key.0.clone(), narrow, wide, wide_reason })?;
        let content = format!("{}\n{body}", hex(body.as_bytes()));
        if content.len() as u64 >= MAX_BYTES {
            return Err(io::Error::other(format!("{} bytes, expected less than {MAX_BYTES}", content.len())));
        }
        let temporary = self.folder.join(format!("{}{TEMPORARY}", uuid::Uuid::now_v7().simple()));
        let written = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(content.as_bytes()))
            .and_then(|()| fs::rename(&temporary, self.path(key)));
        if written.is_err() {
            // The error that led here is the one to report.
            let _ = fs::remove_file(&temporary);
        }
        written?;
        if self.pruned.swap(true, Ordering::Relaxed) { Ok(()) } else { self.prune() }
    }

    /// Files of a process that was killed while it wrote go with the oldest. What is not of this form is none of ours.
    fn prune(&self) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let ours = name.to_str().is_some_and(|name| name.ends_with(SUFFIX) || name.ends_with(TEMPORARY));
            // One that another process removed meanwhile needs no more.
            if let (true, Ok(metadata)) = (ours, entry.metadata()) {
                files.push((metadata.mtime(), metadata.mtime_nsec(), entry.path()));
            }
        }
        files.sort_unstable();
        for (_, _, path) in files.iter().take(files.len().saturating_sub(self.most)) {
            let _ = fs::remove_file(path);
        }
        Ok(())
    }
}

impl From<&Sample> for Run {
    fn from(sample: &Sample) -> Run {
        let nanoseconds = u64::try_from(sample.compute.as_nanos()).unwrap_or(u64::MAX);
        Run { rows: sample.rows, length: sample.length, nanoseconds }
    }
}

impl From<Run> for Sample {
    fn from(run: Run) -> Sample {
        Sample { rows: run.rows, length: run.length, compute: Duration::from_nanos(run.nanoseconds) }
    }
}

/// SHA-256.
pub fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The processor, as far as the system says: what is measured on one holds for none of another kind.
pub fn machine(cores: usize) -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let of = |name: &str| {
        let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, value)| value.trim())
    };
    // As x86 and as ARM call what a processor can do.
    let features = hex(format!("{} {}", of("flags"), of("Features")).as_bytes());
    let (model, implementer, part) = (of("model name"), of("CPU implementer"), of("CPU part"));
    format!("{cores} cores, {model}, {implementer} {part}, {}", &features[..16])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    struct Setup {
        dir: tempfile::TempDir,
        remembered: Remembered,
    }

    impl Setup {
        fn new() -> Setup {
            let dir = tempfile::tempdir().unwrap();
            let remembered = Remembered::new(dir.path().join("cache/remembered"), dir.path()).unwrap();
            Setup { dir, remembered }
        }

        fn file(&self) -> PathBuf {
            self.remembered.path(&key(1))
        }

        fn kept() -> Setup {
            let setup = Setup::new();
            setup.remembered.keep(&key(1), &measured(1));
            assert_eq!(setup.remembered.recall(&key(1)), Some(measured(1)));
            setup
        }
    }

    fn key(n: u64) -> Key {
        Key(format!("model {n}\nengine 1.0"))
    }

    fn measured(micros: u64) -> Calibration {
        let sample = |rows| Sample { rows, length: Some(32), compute: Duration::from_micros(micros) };
        Calibration { narrow: vec![sample(1), sample(2)], wide: vec![sample(1)], wide_reason: "on: why".into() }
    }

    #[test]
    fn what_is_kept_is_recalled_by_its_key_alone_and_is_private() {
        let setup = Setup::kept();
        assert_eq!(setup.remembered.recall(&key(2)), None);
        setup.remembered.keep(&key(1), &measured(5));
        assert_eq!(setup.remembered.recall(&key(1)), Some(measured(5)));
        let again = Remembered::new(setup.remembered.folder.clone(), setup.dir.path()).unwrap();
        assert_eq!(again.recall(&key(1)), Some(measured(5)));
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&setup.remembered.folder), mode(&setup.file())), (0o700, 0o600));
        assert_eq!(fs::read_dir(&setup.remembered.folder).unwrap().count(), 1);
    }

    #[test]
    fn what_is_damaged_or_anothers_is_not_used_and_is_replaced() {
        let setup = Setup::kept();
        let good = fs::read(setup.file()).unwrap();
        let flipped = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            bytes
        };
        let other = fs::read({
            setup.remembered.keep(&key(2), &measured(2));
            setup.remembered.path(&key(2))
        });
        let long = vec![b' '; MAX_BYTES as usize + 1];
        for damaged in
            [flipped(0), flipped(70), flipped(good.len() - 1), vec![], good[..99].to_vec(), other.unwrap(), long]
        {
            fs::write(setup.file(), damaged).unwrap();
            assert_eq!(setup.remembered.recall(&key(1)), None);
            setup.remembered.keep(&key(1), &measured(1));
            assert_eq!(setup.remembered.recall(&key(1)), Some(measured(1)));
        }
    }

    #[test]
    fn what_others_may_write_to_is_not_trusted() {
        let setup = Setup::kept();
        let allow = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        allow(&setup.file(), 0o620);
        assert_eq!(setup.remembered.recall(&key(1)), None);
        allow(&setup.file(), 0o600);
        allow(&setup.remembered.folder, 0o777);
        assert_eq!(setup.remembered.recall(&key(1)), None);
        assert!(setup.remembered.write(&key(3), &measured(3)).unwrap_err().to_string().contains("others may write"));
        allow(&setup.remembered.folder, 0o700);
        assert_eq!(setup.remembered.recall(&key(1)), Some(measured(1)));
        let anothers = Remembered { user: setup.remembered.user + 1, ..Setup::new().remembered };
        let anothers = Remembered { folder: setup.remembered.folder.clone(), ..anothers };
        assert_eq!(anothers.recall(&key(1)), None);
        assert!(anothers.write(&key(3), &measured(3)).unwrap_err().to_string().contains("belongs to user"));
        fs::remove_file(setup.file()).unwrap();
        fs::write(setup.dir.path().join("elsewhere"), "").unwrap();
        symlink(setup.dir.path().join("elsewhere"), setup.file()).unwrap();
        assert_eq!(setup.remembered.recall(&key(1)), None, "links are not followed");
        assert!(std::process::Command::new("mkfifo").arg(setup.remembered.path(&key(4))).status().unwrap().success());
        assert_eq!(setup.remembered.recall(&key(4)), None, "a pipe is not waited for");
    }

    #[test]
    fn the_oldest_go_and_what_is_not_ours_stays() {
        let mut setup = Setup::new();
        setup.remembered.most = 2;
        fs::create_dir_all(setup.remembered.folder.parent().unwrap()).unwrap();
        DirBuilder::new().mode(0o700).create(&setup.remembered.folder).unwrap();
        fs::write(setup.remembered.folder.join("notes.txt"), "mine").unwrap();
        for n in 1..=4 {
            setup.remembered.keep(&key(n), &measured(n));
            let file = File::options().append(true).open(setup.remembered.path(&key(n))).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(n)).unwrap();
        }
        assert!(setup.remembered.recall(&key(1)).is_some(), "once a start, and what is recalled is as new");
        setup.remembered.pruned.store(false, Ordering::Relaxed);
        setup.remembered.keep(&key(5), &measured(5));
        let kept = [1, 2, 3, 4, 5].map(|n| setup.remembered.recall(&key(n)).is_some());
        assert_eq!(kept, [true, false, false, false, true]);
        assert!(setup.remembered.folder.join("notes.txt").exists());
    }

    #[test]
    fn a_folder_that_cannot_be_is_no_reason_to_fail() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let remembered = Remembered::new(dir.path().join("file/remembered"), dir.path()).unwrap();
        assert_eq!(remembered.recall(&key(1)), None);
        remembered.keep(&key(1), &measured(1));
        assert!(remembered.complained.load(Ordering::Relaxed));
        assert_eq!(remembered.recall(&key(1)), None);
    }
}
