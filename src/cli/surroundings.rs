//! What commands take from the process they run in.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::Surroundings;

/// Cores by affinity and cgroup quota; variables that are not UTF-8 are none of ours.
pub(super) fn read() -> Surroundings {
    Surroundings {
        variables: std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        exe_dir: std::env::current_exe().ok().and_then(|path| path.parent().map(Into::into)),
        temp_dir: std::env::temp_dir(),
    }
}

/// This program's own file.
pub(super) fn program() -> std::io::Result<PathBuf> {
    std::env::current_exe()
}

/// The time since 1970, for people: when something was done.
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
