//! Configuration: flags over environment over file over defaults, every problem reported at once.
//!
//! [`SETTINGS`] is the one list: flags, `TIDEGATE_*` variables, keys of `tidegate.toml` and docs/configuration.md all
//! come from it. [`resolve`] turns the texts into each module's own `Config`. Knows nothing else of those modules.
//! The only place, with `cli`, that the process environment reaches.

mod file;
mod resolve;
mod settings;

use std::fmt;

use crate::problem::Problem;

pub use resolve::{LogFormat, Resolved, Surroundings, loading, resolve};
pub use settings::{SETTINGS, Setting, reference};

/// What was typed, by key, as given by flags.
pub fn given(typed: impl IntoIterator<Item = (&'static str, Option<String>)>) -> Given {
    typed
        .into_iter()
        .filter_map(|(key, text)| {
            let setting = settings::find(key)?;
            Some((setting, Text { text: text?, place: setting.flag_name() }))
        })
        .collect()
}

/// Texts as given, before they mean anything: key, text, and where it stood.
pub type Given = Vec<(&'static Setting, Text)>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    pub text: String,
    /// `--http-port`, `TIDEGATE_HTTP_PORT`, `tidegate.toml:3: http_port`.
    pub place: String,
}

/// `tidegate.toml`, or another file that was named, as far as it could be read.
#[derive(Debug)]
pub struct File {
    pub name: String,
    pub content: std::io::Result<String>,
}

/// All things wrong with the configuration; at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "{count} problem{} in the configuration", if count == 1 { "" } else { "s" })?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for Problems {}
