//! What the requests hold: drawn from a model's signature, the same with the same seed, or read from files.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};

use crate::cli::client::input::{self, Given};
use crate::cli::client::request::{Input, Request};
use crate::cli::client::{ModelMetadata, read_file};
use crate::error::visible;
use crate::registry::{Random, invented};
use crate::tensor::{DataType, Dim, Shape, Tensor, TensorSpec};

/// Requests that are drawn, and the bytes of tensors that they may take together.
const DRAWN: usize = 32;
const MAX_DRAWN_BYTES: usize = 64 << 20;
/// What free axes become where nothing is said of them.
const DEFAULT_LENGTH: usize = 32;
/// Longest free axis that may be asked for.
const MAX_LENGTH: usize = 1 << 20;
/// Most files of a folder.
const MAX_FILES: usize = 4096;

/// What free axes become, besides the leading one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lengths {
    /// Each as often.
    Among(Vec<usize>),
    /// Any of them, both ends included.
    Between(usize, usize),
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Lengths, String> {
        let expected = || format!("found `{text}`, expected lengths of 1 to {MAX_LENGTH}, like `8-128` or `8,32,128`");
        let length = |text: &str| {
            let length = text.trim().parse().ok().filter(|length| (1..=MAX_LENGTH).contains(length));
            length.ok_or_else(expected)
        };
        match text.split_once('-') {
            Some((from, to)) => {
                let (from, to) = (length(from)?, length(to)?);
                if from <= to { Ok(Lengths::Between(from, to)) } else { Err(expected()) }
            }
            None => Ok(Lengths::Among(text.split(',').map(length).collect::<Result<_, _>>()?)),
        }
    }
}

impl Lengths {
    fn draw(&self, number: usize, random: &mut Random) -> usize {
        match self {
            Lengths::Among(lengths) => lengths[number % lengths.len()],
            Lengths::Between(from, to) => from + (random.draw() % (to - from + 1) as u64) as usize,
        }
    }
}

/// An input's whole shape: `NAME:1,32`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extents {
    input: String,
    dims: Vec<usize>,
}

impl FromStr for Extents {
    type Err = String;

    fn from_str(text: &str) -> Result<Extents, String> {
        let expected = || format!("found `{text}`, expected an input and its shape, like `ids:1,32`");
        let (input, dims) = text.rsplit_once(':').ok_or_else(expected)?;
        let dims = dims.split(',').map(|dim| dim.trim().parse().map_err(|_| expected())).collect::<Result<_, _>>()?;
        Ok(Extents { input: input.to_string(), dims })
    }
}

/// How requests are drawn.
#[derive(Clone, Debug)]
pub(super) struct Drawing {
    pub(super) seed: u64,
    /// The leading dimension, where it is free.
    pub(super) rows: usize,
    pub(super) lengths: Option<Lengths>,
    pub(super) shapes: Vec<Extents>,
}

impl Drawing {
    /// Requests by the signature, as many as are worth having.
    pub(super) fn requests(&self, model: &ModelMetadata) -> Result<Vec<Request>> {
        let specs = model.inputs.iter().map(|input| input.spec()).collect::<Result<Vec<_>>>()?;
        if let Some(unknown) = self.shapes.iter().find(|shape| specs.iter().all(|spec| *spec.name != *shape.input)) {
            let name = visible(&model.name);
            bail!("--shape names the input `{}`, which model `{name}` does not have", visible(&unknown.input));
        }
        let mut random = Random(self.seed);
        let (mut requests, mut bytes) = (Vec::new(), 0);
        while requests.len() < DRAWN && (requests.is_empty() || bytes < MAX_DRAWN_BYTES) {
            let tensors = self.tensors(&specs, requests.len(), &mut random)?;
            bytes += tensors.iter().map(|tensor| tensor.data().len()).sum::<usize>();
            let inputs = specs.iter().zip(tensors).map(|(spec, tensor)| Input {
                name: spec.name.to_string(),
                tensor,
                parameters: Default::default(),
            });
            requests.push(Request { inputs: inputs.collect(), ..Request::default() });
        }
        Ok(requests)
    }

    /// One tensor for each input. Free axes get one length, since those of several inputs mostly go together.
    pub(super) fn tensors(&self, specs: &[TensorSpec], number: usize, random: &mut Random) -> Result<Vec<Tensor>> {
        let length = self.lengths.as_ref().map_or(DEFAULT_LENGTH, |lengths| lengths.draw(number, random));
        specs.iter().map(|spec| self.tensor(spec, length, random)).collect()
    }

    fn tensor(&self, spec: &TensorSpec, length: usize, random: &mut Random) -> Result<Tensor> {
        let dims = match (self.shapes.iter().find(|shape| *shape.input == *spec.name), &spec.dims) {
            (Some(given), _) => given.dims.clone(),
            (None, None) => {
                bail!("input `{}` may have any shape: say which with --shape {}:DIMS", spec.name, spec.name)
            }
            (None, Some(dims)) => {
                let extent = |(axis, dim): (usize, &Dim)| match dim {
                    Dim::Fixed(extent) => *extent,
                    Dim::Free(_) if axis == 0 => self.rows,
                    Dim::Free(_) => length,
                };
                dims.iter().enumerate().map(extent).collect()
            }
        };
        let shape = Shape::new(dims)?;
        // A mask that hides what is computed anyway would make no difference, and one that hides all makes no sense.
        if spec.name.contains("mask") && spec.dtype == DataType::Int64 {
            let ones = vec![1i64; shape.elements()];
            return Ok(Tensor::from_vec(shape, ones)?);
        }
        invented(spec.dtype, shape, random).map_err(|why| anyhow!("input `{}`: {why}", spec.name))
    }
}

/// Files to send: one, or those of a folder.
pub(super) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_dir() { within(path) } else { Ok(vec![path.to_path_buf()]) }
}

/// A NumPy array, which says neither which input it is for nor that it has a batch dimension.
pub(super) fn is_array(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "npy")
}

/// A request from each file: a whole one as JSON, or an array for a model with one input.
pub(super) fn read(files: &[PathBuf], model: Option<&ModelMetadata>) -> Result<Vec<Request>> {
    files.iter().map(|file| one(file, model).with_context(|| file.display().to_string())).collect()
}

fn within(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = || format!("cannot read the folder {}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(unreadable)? {
        let path = entry.with_context(unreadable)?.path();
        if is_array(&path) || path.extension().is_some_and(|extension| extension == "json") {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() || files.len() > MAX_FILES {
        bail!("{} has {} files .json or .npy, expected 1 to {MAX_FILES}", folder.display(), files.len());
    }
    Ok(files)
}

fn one(file: &Path, model: Option<&ModelMetadata>) -> Result<Request> {
    match model.filter(|_| is_array(file)) {
        Some(model) => {
            let inputs = input::tensors(vec![Given::file(file)?], model)?;
            Ok(Request { inputs, ..Request::default() })
        }
        None => Request::parse(&read_file(file)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::client::TensorMetadata;

    fn model(inputs: &[(&str, &str, &[i64])]) -> ModelMetadata {
        let input = |(name, datatype, shape): &(&str, &str, &[i64])| TensorMetadata {
            name: name.to_string(),
            datatype: datatype.to_string(),
            shape: shape.to_vec(),
        };
        ModelMetadata { name: "m".into(), inputs: inputs.iter().map(input).collect(), ..ModelMetadata::default() }
    }

    fn drawing() -> Drawing {
        Drawing { seed: 1, rows: 1, lengths: None, shapes: Vec::new() }
    }

    fn shapes(drawing: &Drawing, model: &ModelMetadata) -> Vec<Vec<Vec<usize>>> {
        let requests = drawing.requests(model).unwrap();
        let dims =
            |request: &Request| request.inputs.iter().map(|input| input.tensor.shape().dims().to_vec()).collect();
        requests.iter().map(dims).collect()
    }

    #[test]
    fn lengths_and_shapes_are_read() {
        assert_eq!("8-128".parse(), Ok(Lengths::Between(8, 128)));
        assert_eq!("8, 32".parse(), Ok(Lengths::Among(vec![8, 32])));
        assert_eq!("7".parse(), Ok(Lengths::Among(vec![7])));
        for bad in ["", "0", "9-8", "a", "8-", "1,,2", "2000000"] {
            assert!(bad.parse::<Lengths>().is_err(), "{bad}");
        }
        assert_eq!("a:b:1,32".parse(), Ok(Extents { input: "a:b".into(), dims: vec![1, 32] }));
        assert!("a".parse::<Extents>().is_err() && "a:x".parse::<Extents>().is_err());
    }

    #[test]
    fn requests_follow_the_signature_and_the_seed() {
        let model = model(&[("x", "FP32", &[-1, 4])]);
        let three = Drawing { rows: 3, ..drawing() };
        assert!(shapes(&three, &model).iter().all(|dims| *dims == [[3, 4]]));
        let data = |drawing: &Drawing| drawing.requests(&model).unwrap()[1].inputs[0].tensor.data().clone();
        assert_eq!(data(&drawing()), data(&drawing()));
        assert_ne!(data(&drawing()), data(&Drawing { seed: 2, ..drawing() }));
        assert_eq!(shapes(&drawing(), &model).len(), DRAWN);
    }

    #[test]
    fn free_axes_of_one_request_go_together() {
        let model = model(&[("ids", "INT64", &[-1, -1]), ("attention_mask", "INT64", &[-1, -1])]);
        let mixed = Drawing { lengths: Some(Lengths::Between(8, 128)), ..drawing() };
        let found = shapes(&mixed, &model);
        assert!(found.iter().all(|dims| dims[0] == dims[1] && (8..=128).contains(&dims[0][1])));
        assert!(found.iter().any(|dims| dims[0] != found[0][0]), "they are mixed");
        let listed = Drawing { lengths: Some(Lengths::Among(vec![8, 16])), ..drawing() };
        assert_eq!(shapes(&listed, &model)[..3], [vec![vec![1, 8]; 2], vec![vec![1, 16]; 2], vec![vec![1, 8]; 2]]);
        let mask = &mixed.requests(&model).unwrap()[0].inputs[1].tensor;
        assert!(mask.to_vec::<i64>().unwrap().iter().all(|one| *one == 1));
        let given = Drawing { shapes: vec!["ids:2,5".parse().unwrap()], ..drawing() };
        assert_eq!(shapes(&given, &model)[0], [[2, 5], [1, DEFAULT_LENGTH]]);
        let wrong = Drawing { shapes: vec!["y:1".parse().unwrap()], ..drawing() };
        assert!(wrong.requests(&model).unwrap_err().to_string().contains("does not have"));
    }

    #[test]
    fn large_requests_are_fewer() {
        let model = model(&[("x", "FP32", &[-1, 4 << 20])]);
        assert_eq!(drawing().requests(&model).unwrap().len(), 4);
    }

    #[test]
    fn files_and_folders_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &[u8]| std::fs::write(folder.path().join(name), content).unwrap();
        write("b.json", br#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2]}]}"#);
        write("a.npy", b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }            \n\0\0\0\0\0\0\0\0");
        write("README.md", b"");
        let model = model(&[("x", "FP32", &[-1, 2])]);
        let all = files(folder.path()).unwrap();
        let found = read(&all, Some(&model)).unwrap_or_else(|error| panic!("{error:#}"));
        assert!(found.iter().all(|request| request.inputs[0].tensor.shape().dims() == [1, 2]));
        assert_eq!(found.len(), 2);
        assert!(is_array(&all[0]) && !is_array(&all[1]));
        let whole = read(&files(&all[1]).unwrap(), None).unwrap();
        assert_eq!(whole.len(), 1, "a whole request needs no signature");
        let empty = tempfile::tempdir().unwrap();
        assert!(files(empty.path()).unwrap_err().to_string().contains("0 files"));
    }
}
