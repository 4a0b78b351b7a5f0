//! Warm-up runs that a model's settings declare: from a file of one request's inputs, or made of zeros, random numbers and
//! raw bytes. A version whose declared warm-up fails is not served. Runs on the loader's thread.

use std::fs;
use std::path::Path;

use super::golden;
use super::invent::{self, Random};
use super::model_config::{MadeContent, MadeInput, MadeWarmUp, WarmUp};
use super::probe::Probe;
use super::source::{read_beside, read_bytes};
use crate::tensor::{Signature, Tensor};

/// Where, in a model's folder, the bytes of made inputs lie.
pub const FOLDER: &str = "warmup";
const SEED: u64 = 2;

/// Runs one. `together`: whether the version batches.
pub fn run(
    warm_up: &WarmUp,
    folder: &Path,
    signature: &Signature,
    together: bool,
    probe: &mut Probe,
) -> Result<(), String> {
    match warm_up {
        WarmUp::Request(file) => {
            let text = read_beside(folder, file, golden::MAX_FILE_BYTES)?;
            probe.run(&[&golden::read_warm_up(&text, signature)?]).map(drop)
        }
        WarmUp::Made(made) => {
            let inputs = make(made, folder, signature)?;
            let jobs: Vec<&[Tensor]> = vec![&inputs; made.requests];
            let together = if together { jobs.len() } else { 1 };
            (0..made.runs).try_for_each(|_| jobs.chunks(together).try_for_each(|jobs| probe.run(jobs).map(drop)))
        }
    }
}

fn make(made: &MadeWarmUp, folder: &Path, signature: &Signature) -> Result<Vec<Tensor>, String> {
    let mut random = Random(SEED);
    let mut make = |(name, input): (&String, &MadeInput)| match content(input, folder, &mut random) {
        Ok(tensor) => Ok((name.clone(), tensor)),
        Err(error) => Err(format!("input `{name}`: {error}")),
    };
    golden::in_order(&made.inputs.iter().map(&mut make).collect::<Result<Vec<_>, _>>()?, signature)
}

fn content(input: &MadeInput, folder: &Path, random: &mut Random) -> Result<Tensor, String> {
    let (dtype, shape) = (input.dtype, input.shape.clone());
    if shape.elements() > invent::MAX_ELEMENTS {
        return Err(format!("{} elements, expected at most {}", shape.elements(), invent::MAX_ELEMENTS));
    }
    let bytes = match &input.content {
        MadeContent::Random => return invent::tensor(dtype, shape, random),
        MadeContent::Zeros => vec![0; shape.elements() * dtype.size().unwrap_or(EMPTY_STRING_BYTES)],
        MadeContent::File(file) => {
            let folder = fs::canonicalize(folder).map_err(|error| error.to_string())?;
            let read = read_bytes(&folder, &folder.join(FOLDER).join(file), golden::MAX_FILE_BYTES);
            read.map_err(|error| format!("`{FOLDER}/{file}`: {error}"))?
        }
    };
    Tensor::new(dtype, shape, bytes.into()).map_err(|error| error.to_string())
}

/// A string is its length, in four bytes, and its bytes.
const EMPTY_STRING_BYTES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{DataType, Shape};

    fn made(dtype: DataType, shape: &[usize], content: MadeContent) -> MadeInput {
        MadeInput { dtype, shape: Shape::new(shape).unwrap(), content }
    }

    #[test]
    fn every_datatype_is_zeroed_and_drawn() {
        for dtype in DataType::ALL {
            for content in [MadeContent::Zeros, MadeContent::Random] {
                let tensor = super::content(&made(dtype, &[2, 3], content), Path::new("."), &mut Random(1)).unwrap();
                assert_eq!((tensor.dtype(), tensor.shape().dims()), (dtype, &[2, 3][..]));
            }
        }
        let huge = made(DataType::Fp32, &[1 << 20, 1 << 20], MadeContent::Zeros);
        assert!(content(&huge, Path::new("."), &mut Random(1)).unwrap_err().contains("expected at most"));
    }

    #[test]
    fn bytes_come_from_a_file_of_the_right_length() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(FOLDER)).unwrap();
        fs::write(folder.path().join("warmup/x.bin"), [0, 0, 128, 63, 0, 0, 0, 64]).unwrap();
        let file = |name: &str| MadeContent::File(name.into());
        let read =
            |shape: &[usize], name| content(&made(DataType::Fp32, shape, file(name)), folder.path(), &mut Random(1));
        assert_eq!(read(&[1, 2], "x.bin").unwrap().to_vec::<f32>().unwrap(), [1.0, 2.0]);
        assert!(read(&[1, 3], "x.bin").is_err());
        assert!(read(&[1, 2], "y.bin").unwrap_err().starts_with("`warmup/y.bin`: "));
    }
}
