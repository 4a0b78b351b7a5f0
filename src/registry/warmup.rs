//! Warm-up runs that a model's settings declare: from a file of one request's inputs, or made of zeros, random numbers and
//! raw bytes. A version whose declared warm-up fails is not served. Runs on the loader's thread.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::golden;
use super::invent::{self, Random};
use super::model_config::{MadeContent, MadeInput, MadeWarmUp, WarmUp};
use super::probe::Probe;
use super::source::{read_beside, read_bytes};
use crate::tensor::{Shape, Signature, Tensor};

/// Where, in a model's folder, the bytes of made inputs lie.
pub const FOLDER: &str = "warmup";
const SEED: u64 = 2;
/// What the runs of all declared warm-ups of a version may take, on all its devices together, without the waiting for
/// their turns: nothing else is loaded meanwhile.
pub const BUDGET: Duration = Duration::from_secs(60);
/// The most bytes that all made inputs of one run may have: strings are as long as their file says.
const MAX_RUN_BYTES: usize = 256 << 20;

/// What the declared warm-ups of one version run with.
pub struct WarmUps<'a> {
    /// The model's own.
    pub folder: &'a Path,
    pub signature: &'a Signature,
    /// The most rows that several requests have in one run, as in service. `None`: each runs by itself.
    pub most_rows: Option<usize>,
    /// Of [`BUDGET`].
    pub left: Duration,
}

impl WarmUps<'_> {
    pub fn run(&mut self, warm_up: &WarmUp, probe: &mut Probe) -> Result<(), String> {
        match warm_up {
            WarmUp::Request(file) => {
                let text = read_beside(self.folder, file, golden::MAX_FILE_BYTES)?;
                let inputs = golden::read_warm_up(&text, self.signature)?;
                self.repeat(&inputs, 1, 1, 1, probe)
            }
            WarmUp::Made(made) => {
                let together = self.together(made)?;
                let inputs = self.make(made, together)?;
                self.repeat(&inputs, made.requests, together, made.runs, probe)
            }
        }
    }

    /// Checked between runs: one that is on cannot be stopped.
    fn repeat(
        &mut self,
        inputs: &[Tensor],
        requests: usize,
        together: usize,
        times: usize,
        probe: &mut Probe,
    ) -> Result<(), String> {
        let jobs = vec![inputs; together];
        let (mut done, all) = (0usize, times.saturating_mul(requests.div_ceil(together)));
        for _ in 0..times {
            for first in (0..requests).step_by(together) {
                if self.left.is_zero() {
                    return Err(format!(
                        "{done} of {all} runs were done when the {} s for all warm-ups were over",
                        BUDGET.as_secs()
                    ));
                }
                let before = probe.spent();
                probe.run(&jobs[..together.min(requests - first)])?;
                self.left = self.left.saturating_sub(probe.spent() - before);
                done += 1;
            }
        }
        Ok(())
    }

    /// How many requests share a run.
    fn together(&self, made: &MadeWarmUp) -> Result<usize, String> {
        let shapes = || made.inputs.values().map(|input| &input.shape);
        let rows = shapes().filter_map(Shape::rows).max().unwrap_or(1).max(1);
        let together = self.most_rows.map_or(1, |most| most / rows).clamp(1, made.requests.max(1));
        let elements = shapes().map(Shape::elements).fold(0, usize::saturating_add).saturating_mul(together);
        if elements > invent::MAX_ELEMENTS {
            return Err(format!(
                "{} has {elements} elements, expected at most {}",
                a_run(together),
                invent::MAX_ELEMENTS
            ));
        }
        Ok(together)
    }

    fn make(&self, made: &MadeWarmUp, together: usize) -> Result<Vec<Tensor>, String> {
        let (mut random, mut bytes, mut named) = (Random(SEED), 0usize, Vec::new());
        for (name, input) in &made.inputs {
            let tensor =
                content(input, self.folder, &mut random).map_err(|error| format!("input `{name}`: {error}"))?;
            bytes = bytes.saturating_add(tensor.data().len().saturating_mul(together));
            if bytes > MAX_RUN_BYTES {
                return Err(format!("{} has {bytes} bytes or more, expected at most {MAX_RUN_BYTES}", a_run(together)));
            }
            named.push((name.clone(), tensor));
        }
        golden::in_order(&named, self.signature)
    }
}

fn a_run(together: usize) -> String {
    format!("a run of {together} request{}", if together == 1 { "" } else { "s" })
}

fn content(input: &MadeInput, folder: &Path, random: &mut Random) -> Result<Tensor, String> {
    let (dtype, shape) = (input.dtype, input.shape.clone());
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
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};
    use std::time::Instant;

    use super::super::tests::{probe, signature};
    use super::*;
    use crate::tensor::DataType;

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
    }

    fn warm_up(requests: usize, runs: usize, input: MadeInput) -> WarmUp {
        let inputs = BTreeMap::from([("x".into(), input)]);
        WarmUp::Made(MadeWarmUp { name: "w".into(), requests, runs, inputs })
    }

    fn warm_ups<'a>(folder: &'a Path, signature: &'a Signature, most_rows: Option<usize>) -> WarmUps<'a> {
        WarmUps { folder, signature, most_rows, left: BUDGET }
    }

    #[test]
    fn requests_share_runs_as_long_as_in_service() {
        let spec = signature(&[("x", DataType::Fp32, &[-1, 2])], &[("y", DataType::Fp32, &[-1, 2])]);
        let runs = |most_rows, rows: usize, requests| {
            let log = Arc::new(Mutex::new(Vec::new()));
            let mut probe = probe(&spec, {
                let log = Arc::clone(&log);
                move |inputs| {
                    log.lock().unwrap().push(inputs[0].rows().unwrap());
                    Ok(inputs.to_vec())
                }
            });
            let input = made(DataType::Fp32, &[rows, 2], MadeContent::Zeros);
            warm_ups(Path::new("."), &spec, most_rows).run(&warm_up(requests, 2, input), &mut probe).unwrap();
            let log = log.lock().unwrap();
            log.clone()
        };
        assert_eq!(runs(Some(4), 1, 9), [4, 4, 1, 4, 4, 1]);
        assert_eq!(runs(Some(4), 1, 3), [3, 3]);
        assert_eq!(runs(Some(5), 2, 3), [4, 2, 4, 2]);
        assert_eq!(runs(Some(4), 8, 1), [8, 8]);
        assert_eq!(runs(None, 1, 2), [1, 1, 1, 1]);
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_made() {
        let spec = signature(&[("x", DataType::Fp32, &[-1, -1])], &[("y", DataType::Fp32, &[-1, -1])]);
        let refusal = |most_rows, input| {
            let mut probe = probe(&spec, |_| unreachable!());
            warm_ups(Path::new("."), &spec, most_rows).run(&warm_up(1 << 20, 1, input), &mut probe).unwrap_err()
        };
        let huge = made(DataType::Fp32, &[1 << 20, 1 << 20], MadeContent::Zeros);
        assert_eq!(refusal(None, huge), "a run of 1 request has 1099511627776 elements, expected at most 16777216");
        let many = made(DataType::Fp32, &[1, 32], MadeContent::Zeros);
        let expected = "a run of 1048576 requests has 33554432 elements, expected at most 16777216";
        assert_eq!(refusal(Some(1 << 20), many), expected);
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(FOLDER)).unwrap();
        let long = [&1000u32.to_le_bytes()[..], &[b'x'; 1000]].concat();
        fs::write(folder.path().join("warmup/long"), long).unwrap();
        let spec = signature(&[("x", DataType::Bytes, &[-1])], &[("y", DataType::Bytes, &[-1])]);
        let mut probe = probe(&spec, |_| unreachable!());
        let strings = warm_up(1 << 20, 1, made(DataType::Bytes, &[1], MadeContent::File("long".into())));
        let refusal = warm_ups(folder.path(), &spec, Some(1 << 20)).run(&strings, &mut probe).unwrap_err();
        assert_eq!(refusal, "a run of 1048576 requests has 1052770304 bytes or more, expected at most 268435456");
    }

    #[test]
    fn what_takes_too_long_ends_between_runs() {
        let spec = signature(&[("x", DataType::Fp32, &[-1, 2])], &[("y", DataType::Fp32, &[-1, 2])]);
        let mut now = Instant::now();
        // Every run takes 20 seconds.
        let mut probe = probe(&spec, |inputs| Ok(inputs.to_vec())).with_clock(move || {
            now += Duration::from_secs(20);
            now
        });
        let mut warm_ups = warm_ups(Path::new("."), &spec, Some(4));
        let mut run = |requests, runs| {
            let input = made(DataType::Fp32, &[1, 2], MadeContent::Zeros);
            warm_ups.run(&warm_up(requests, runs, input), &mut probe)
        };
        assert_eq!(run(4, 1), Ok(()));
        assert_eq!(run(8, 1000), Err("2 of 2000 runs were done when the 60 s for all warm-ups were over".into()));
        assert_eq!(run(1, 1), Err("0 of 1 runs were done when the 60 s for all warm-ups were over".into()));
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
