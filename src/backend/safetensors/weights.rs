//! All tensors of a version, in one file or in several that an index names, compared with what a model needs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use serde::Deserialize;

use super::header::{self, Stored};
use super::{INDEX_FILE, MODEL_FILE, bad, read_json};
use crate::backend::LoadError;
use crate::error::quoted;
use crate::problem::nearest;
use crate::tensor::DataType;

/// The longest index, in bytes, and the most files that it may name.
const MAX_INDEX_BYTES: u64 = 16 << 20;
const MAX_SHARDS: usize = 1024;
/// Problems that one refusal names; the rest is counted.
const MAX_SHOWN: usize = 8;

/// What weights are read from. The engine computes in FP32.
const FLOATS: [DataType; 3] = [DataType::Fp32, DataType::Fp16, DataType::Bf16];

/// A tensor's place: a plain file name in the version's folder, and where in that file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub file: String,
    pub stored: Stored,
}

/// Every tensor that the files hold, by name.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    pub places: BTreeMap<String, Place>,
    /// The writer's name for itself.
    pub format: Option<String>,
}

/// A tensor that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needed {
    pub name: String,
    pub dims: Vec<usize>,
}

/// The index of a model in several files, as Hugging Face writes it.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files that the folder's index names, beside it; one where there is no index.
pub fn files(folder: &Path) -> Result<BTreeSet<String>, LoadError> {
    match index(folder)? {
        None => Ok(BTreeSet::from([MODEL_FILE.to_string()])),
        Some(index) => Ok(index.weight_map.into_values().collect()),
    }
}

fn index(folder: &Path) -> Result<Option<Index>, LoadError> {
    if folder.join(MODEL_FILE).exists() {
        return Ok(None);
    }
    let index: Index = read_json(folder, INDEX_FILE, MAX_INDEX_BYTES)?;
    let shards: BTreeSet<&String> = index.weight_map.values().collect();
    if shards.is_empty() || shards.len() > MAX_SHARDS {
        return Err(bad(format!("{INDEX_FILE}: {} files, expected 1 to {MAX_SHARDS}", shards.len())));
    }
    if let Some(name) = shards.into_iter().find(|name| !is_plain(name)) {
        return Err(bad(format!(
            "{INDEX_FILE}: file `{}`, expected the plain name of a safetensors file beside it",
            quoted(name)
        )));
    }
    Ok(Some(index))
}

fn is_plain(name: &str) -> bool {
    let odd = |c: char| c.is_control() || ['/', '\\', ':'].contains(&c);
    name.ends_with(".safetensors") && !name.starts_with('.') && !name.contains(odd)
}

impl Weights {
    /// Reads the headers of all files in the folder.
    pub fn open(folder: &Path) -> Result<Weights, LoadError> {
        let Some(index) = index(folder)? else {
            let mut weights = Weights::default();
            weights.add(folder, MODEL_FILE)?;
            return Ok(weights);
        };
        let mut weights = Weights::default();
        for file in index.weight_map.values().collect::<BTreeSet<_>>() {
            weights.add(folder, file)?;
        }
        for (name, file) in &index.weight_map {
            if weights.places.get(name).is_none_or(|place| place.file != *file) {
                let (name, file) = (quoted(name), quoted(file));
                return Err(bad(format!("{INDEX_FILE}: tensor `{name}` is not in the file `{file}`")));
            }
        }
        Ok(weights)
    }

    fn add(&mut self, folder: &Path, name: &str) -> Result<(), LoadError> {
        let refused = |reason: String| bad(format!("`{}` is no safetensors file: {reason}", quoted(name)));
        let file = File::open(folder.join(name)).map_err(|error| refused(error.to_string()))?;
        let length = file.metadata().map_err(|error| refused(error.to_string()))?.len();
        let header = header::read(std::io::BufReader::new(file), length).map_err(refused)?;
        self.format = self.format.take().or(header.format);
        for (tensor, stored) in header.tensors {
            let place = Place { file: name.to_string(), stored };
            if let Some(other) = self.places.insert(tensor.clone(), place) {
                let (tensor, first, second) = (quoted(&tensor), quoted(&other.file), quoted(name));
                return Err(bad(format!("tensor `{tensor}` is in `{first}` and in `{second}`, expected once")));
            }
        }
        Ok(())
    }

    /// Every needed tensor is there, of floats and in its shape; otherwise a refusal that names each that is not, with
    /// the unused one that may have been meant. Returns the tensors that nothing needs.
    pub fn check(&self, needed: &[Needed]) -> Result<Vec<String>, LoadError> {
        let names: BTreeSet<&str> = needed.iter().map(|needed| &*needed.name).collect();
        let unused: Vec<&str> = self.places.keys().map(String::as_str).filter(|name| !names.contains(name)).collect();
        let misfits: Vec<&Needed> = needed.iter().filter(|needed| !self.fits(needed)).collect();
        if !misfits.is_empty() {
            return Err(bad(listed(&misfits, |misfit| self.problem(misfit, &unused))));
        }
        Ok(unused.into_iter().map(str::to_string).collect())
    }

    fn fits(&self, needed: &Needed) -> bool {
        self.places
            .get(&needed.name)
            .is_some_and(|place| FLOATS.contains(&place.stored.dtype) && place.stored.dims == needed.dims)
    }

    fn problem(&self, needed: &Needed, unused: &[&str]) -> String {
        let (name, shape) = (quoted(&needed.name), &needed.dims);
        let Some(place) = self.places.get(&needed.name) else {
            let perhaps = match nearest(&needed.name, unused.iter().copied()) {
                Some(near) => format!("; `{}`, perhaps, which nothing uses", quoted(near)),
                None => String::new(),
            };
            return format!("tensor `{name}` is missing, expected {shape:?}{perhaps}");
        };
        let (dtype, dims) = (place.stored.dtype, &place.stored.dims);
        if FLOATS.contains(&dtype) {
            format!("tensor `{name}` has shape {dims:?}, expected {shape:?}")
        } else {
            format!("tensor `{name}` is {dtype}, expected FP32, FP16 or BF16")
        }
    }
}

/// The first few, told, and how many more there are.
pub fn listed<T>(things: &[T], tell: impl Fn(&T) -> String) -> String {
    let shown: Vec<String> = things.iter().take(MAX_SHOWN).map(tell).collect();
    match things.len().saturating_sub(MAX_SHOWN) {
        0 => shown.join("; "),
        more => format!("{}; and {more} more", shown.join("; ")),
    }
}

#[cfg(test)]
pub mod tests {
    use std::fs;

    use super::super::header::tests::file;
    use super::*;

    /// A file of FP32 tensors of those names and shapes.
    pub fn floats(tensors: &[(&str, &[usize])]) -> Vec<u8> {
        let mut end = 0;
        let entries: Vec<String> = tensors
            .iter()
            .map(|(name, dims)| {
                let begin = end;
                end += 4 * dims.iter().product::<usize>();
                format!(r#""{name}":{{"dtype":"F32","shape":{dims:?},"data_offsets":[{begin},{end}]}}"#)
            })
            .collect();
        file(&format!("{{{}}}", entries.join(",")), end)
    }

    fn needed(name: &str, dims: &[usize]) -> Needed {
        Needed { name: name.into(), dims: dims.to_vec() }
    }

    fn error<T: std::fmt::Debug>(result: Result<T, LoadError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn what_is_missing_misshapen_or_of_another_type_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(MODEL_FILE);
        fs::write(&path, floats(&[("0.weight", &[2, 3]), ("0.bais", &[2]), ("extra", &[1])])).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(weights.check(&[needed("0.weight", &[2, 3])]).unwrap(), ["0.bais", "extra"]);
        assert_eq!(
            error(weights.check(&[needed("0.weight", &[3, 2]), needed("0.bias", &[2])])),
            "tensor `0.weight` has shape [2, 3], expected [3, 2]; \
             tensor `0.bias` is missing, expected [2]; `0.bais`, perhaps, which nothing uses"
        );
        let many: Vec<Needed> = (10..30).map(|i| needed(&format!("layer.{i}.gain"), &[1])).collect();
        assert!(error(weights.check(&many)).ends_with("; and 12 more"));
        fs::write(&path, file(r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, 8)).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(error(weights.check(&[needed("a", &[1])])), "tensor `a` is INT64, expected FP32, FP16 or BF16");
        fs::write(&path, b"no tensors here").unwrap();
        assert!(
            error(Weights::open(folder.path())).starts_with("`model.safetensors` is no safetensors file: a header of")
        );
    }

    #[test]
    fn shards_are_one_model() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
        let index = |entries: &[(&str, &str)]| {
            let entries: Vec<String> = entries.iter().map(|(name, file)| format!("{name:?}:{file:?}")).collect();
            write(INDEX_FILE, format!(r#"{{"metadata":{{}},"weight_map":{{{}}}}}"#, entries.join(",")).as_bytes());
        };
        write("a.safetensors", &floats(&[("x", &[2])]));
        write("b.safetensors", &floats(&[("y", &[3])]));
        index(&[("x", "a.safetensors"), ("y", "b.safetensors")]);
        let weights = Weights::open(folder.path()).unwrap();
        assert_eq!(weights.places["y"].file, "b.safetensors");
        assert_eq!(files(folder.path()).unwrap(), BTreeSet::from(["a.safetensors".into(), "b.safetensors".into()]));

        index(&[("x", "b.safetensors"), ("y", "b.safetensors")]);
        assert!(error(Weights::open(folder.path())).contains("tensor `x` is not in the file `b.safetensors`"));
        write("b.safetensors", &floats(&[("x", &[2]), ("y", &[3])]));
        index(&[("x", "a.safetensors"), ("y", "b.safetensors")]);
        assert!(error(Weights::open(folder.path())).contains("is in `a.safetensors` and in `b.safetensors`"));
        for escaping in ["../a.safetensors", "/a.safetensors", "c/../a.safetensors", "..", ".safetensors", "a.bin", ""]
        {
            index(&[("x", escaping)]);
            assert!(error(files(folder.path())).contains("expected the plain name"), "{escaping}");
        }
        index(&[]);
        assert!(error(files(folder.path())).contains("0 files, expected 1 to 1024"));
        write(INDEX_FILE, b"{");
        assert!(error(files(folder.path())).starts_with("model.safetensors.index.json: "));
    }
}
