//! Reads safetensors models without any engine: which tensors there are, what computes with them, and whether the two
//! fit. Two kinds: a `torch.nn.Sequential` described by a list of [`layers`], and the encoders of a Hugging Face folder.
//!
//! Owns the header, the index of several files, the layers' arithmetic of shapes and the encoders' `config.json`. Knows
//! nothing of tensors' contents, which only an engine reads.
//!
//! Files are untrusted. Invariants: any files give a [`Description`] or [`LoadError::BadModel`], never a panic; what is
//! read into memory is bounded; every file that is named is a plain file name; every tensor that the model computes with
//! is in the files, of floats, in its shape.

pub mod encoder;
mod header;
pub mod layers;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::LoadError;
use crate::tensor::{OutputKind, Signature};
use encoder::{Encoder, EncoderConfig};
use layers::Sequential;
use weights::Weights;

pub use header::Stored;
pub use weights::Place;

/// The weights, all in one file.
pub const MODEL_FILE: &str = "model.safetensors";
/// Names the files of weights that are spread over several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// What a Hugging Face folder says of its model.
pub const ENCODER_FILE: &str = "config.json";
/// What follows the model in a folder of sentence-transformers.
pub const MODULES_FILE: &str = "modules.json";

/// The longest of those JSON files, in bytes: `config.json` may name a hundred thousand classes.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// What a person declares of the model beside its files.
#[derive(Clone, Debug, PartialEq)]
pub enum Declared {
    /// The layers; a `config.json` is not looked at.
    Sequential(Sequential),
    /// Nothing but what `config.json` says, or little more.
    Encoder(EncoderConfig),
}

/// What the files of a safetensors model say, checked.
#[derive(Clone, Debug)]
pub struct Description {
    pub architecture: Architecture,
    pub signature: Signature,
    /// One per output of the signature.
    pub output_kinds: Vec<OutputKind>,
    pub couples_rows: Option<String>,
    /// Class names by index, where `config.json` has them.
    pub labels: Option<Arc<[String]>>,
    /// `pytorch`, `transformers 4.57.0`; empty where nothing says.
    pub producer: String,
    /// What a person should know: tensors left out.
    pub warnings: Vec<String>,
    /// Where each tensor lies.
    pub places: BTreeMap<String, Place>,
}

/// What computes with the tensors.
#[derive(Clone, Debug)]
pub enum Architecture {
    Sequential(Sequential),
    Encoder(Encoder),
}

/// Files that lie beside the weights, some of them, and are read first.
pub fn beside(declared: &Declared) -> &'static [&'static str] {
    match declared {
        Declared::Sequential(_) => &[],
        Declared::Encoder(_) => &[ENCODER_FILE, MODULES_FILE],
    }
}

/// The files to be read, once the weights, or their index, and those [`beside`] them are there: plain names, or a plain
/// name in a plain folder.
pub fn files(folder: &Path, declared: &Declared) -> Result<BTreeSet<String>, LoadError> {
    let mut files = weights::files(folder)?;
    if let Declared::Encoder(settings) = declared {
        files.extend(encoder::pooling_file(folder, settings)?);
    }
    Ok(files)
}

impl Description {
    /// Reads a folder that holds the version's files. Every failure is a [`LoadError::BadModel`].
    pub fn read(folder: &Path, declared: &Declared) -> Result<Description, LoadError> {
        let weights = Weights::open(folder)?;
        match declared {
            Declared::Sequential(sequential) => layers::describe(sequential.clone(), weights),
            Declared::Encoder(config) => encoder::describe(folder, config, weights),
        }
    }
}

/// Reads a bounded JSON file of the folder.
fn read_json<T: DeserializeOwned>(folder: &Path, name: &str, max_bytes: u64) -> Result<T, LoadError> {
    let failed = |reason: String| bad(format!("{name}: {reason}"));
    let file = File::open(folder.join(name)).map_err(|error| failed(error.to_string()))?;
    let mut text = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut text).map_err(|error| failed(error.to_string()))?;
    if text.len() as u64 > max_bytes {
        return Err(failed(format!("longer than {max_bytes} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))
}

fn bad(message: impl Into<String>) -> LoadError {
    LoadError::BadModel(message.into())
}
