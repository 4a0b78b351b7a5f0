//! ONNX Runtime as `make build` fetches it, on the trap models.

use std::path::Path;

use bytes::Bytes;

use super::library::{check_file, check_library, check_version};
use super::session::{OnnxRuntimeInstance, SCRATCH_KEPT_BYTES, session};
use super::shared::Shared;
use super::values::{Aligned, bytes_of};
use super::*;
use crate::backend::onnx::{Description, build};
use crate::backend::text::LIMIT;
use crate::backend::{Batch, Device, Instance, RunError};
use crate::tensor::{DataType, Dim, OutputKind, Shape, Signature, Tensor, TensorSpec};

/// The library that `make build` fetches. `None` only where the test run is told that there is none: a test that
/// needs it must not pass because it is missing.
#[expect(clippy::disallowed_methods, reason = "how a test run is told; no configuration exists here")]
fn library() -> Option<Arc<OnnxRuntime>> {
    if std::env::var_os("TIDEGATE_TEST_WITHOUT_ONNXRUNTIME").is_some_and(|value| value == "1") {
        return None;
    }
    let release = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/release");
    let found = OnnxRuntime::find(None, None, Some(&release)).unwrap_or_else(|error| {
        panic!("run `make build` first, or set TIDEGATE_TEST_WITHOUT_ONNXRUNTIME=1 where it cannot be had: {error}")
    });
    Some(OnnxRuntime::open(&found.path).unwrap())
}

fn spec(name: &str, dtype: DataType, dims: &[i64]) -> TensorSpec {
    let dims = dims.iter().map(|extent| usize::try_from(*extent).map_or(Dim::Free(None), Dim::Fixed));
    TensorSpec { name: name.into(), dtype, dims: Some(dims.collect()) }
}

fn artifact(path: PathBuf, inputs: Vec<TensorSpec>, outputs: Vec<TensorSpec>) -> Artifact {
    let description = Description {
        output_kinds: vec![OutputKind::Values; outputs.len()],
        signature: Signature { inputs, outputs },
        ..Description::default()
    };
    Artifact { path, bytes: 1, description: Arc::new(crate::backend::Description::Onnx(description)) }
}

/// A trap model as the registry would describe it.
fn trap(name: &str) -> Artifact {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traps").join(name).join("1/model.onnx");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let description = Description::read(bytes.into()).unwrap();
    Artifact { path, bytes: 1, description: Arc::new(crate::backend::Description::Onnx(description)) }
}

fn identity(dtype: DataType) -> Artifact {
    trap(&format!("identity_{}", dtype.name().to_lowercase()))
}

const ONE_THREAD: LoadOptions = LoadOptions { device: Device::Cpu, threads: 1 };

/// As if its weights were worth sharing.
const LARGE: u64 = 1 << 30;

fn instance(runtime: &OnnxRuntime, artifact: &Artifact) -> Box<dyn Instance> {
    runtime.load(artifact, &ONE_THREAD).unwrap().instance().unwrap()
}

fn run(instance: &mut Box<dyn Instance>, jobs: &[&[Tensor]]) -> Result<Vec<Tensor>, RunError> {
    instance.run(&Batch::new(jobs))
}

fn shape(dims: &[usize]) -> Shape {
    Shape::new(dims).unwrap()
}

/// `rows` rows of 3 elements whose bytes count up from `seed`, at an address that no element type is aligned to.
fn misaligned(dtype: DataType, rows: usize, seed: u8) -> Tensor {
    if dtype == DataType::Bytes {
        return Tensor::from_strings(shape(&[rows, 3]), (0..rows * 3).map(|i| vec![seed; i])).unwrap();
    }
    let length = rows * 3 * dtype.size().unwrap();
    let value = |i: usize| if dtype == DataType::Bool { (i % 2) as u8 } else { seed.wrapping_add(i as u8) };
    let mut raw: Vec<u8> = Vec::with_capacity(length + 8);
    let offset = (0..8).find(|offset| (raw.as_ptr() as usize + offset) % 8 == 1).unwrap();
    raw.extend(std::iter::repeat_n(0, offset).chain((0..length).map(value)));
    Tensor::new(dtype, shape(&[rows, 3]), Bytes::from(raw).slice(offset..)).unwrap()
}

#[test]
fn every_datatype_comes_back_bit_for_bit_from_jobs_at_any_address() {
    let Some(runtime) = library() else { return };
    for dtype in DataType::ALL {
        let mut instance = instance(&runtime, &identity(dtype));
        let parts: Vec<[Tensor; 1]> = [2, 1, 3].iter().map(|rows| [misaligned(dtype, *rows, *rows as u8)]).collect();
        let jobs: Vec<&[Tensor]> = parts.iter().map(|part| part.as_slice()).collect();
        for jobs in [&jobs[..], &jobs[..1], &jobs[1..2]] {
            let output = run(&mut instance, jobs).unwrap().remove(0);
            let counts: Vec<usize> = jobs.iter().map(|job| job[0].rows().unwrap()).collect();
            let split = output.split_rows(&counts).unwrap();
            for (sent, back) in jobs.iter().zip(&split) {
                assert_eq!(&sent[0], back, "{dtype}");
            }
        }
    }
}

#[test]
fn strings_may_hold_any_bytes() {
    let Some(runtime) = library() else { return };
    let mut instance = instance(&runtime, &identity(DataType::Bytes));
    let all: Vec<u8> = (0..=255).collect();
    let elements: [&[u8]; 6] = [b"", &all, b"a\0b\0", b"\xff\xfe", "héllo".as_bytes(), b""];
    let sent = [Tensor::from_strings(shape(&[3, 2]), elements).unwrap()];
    assert_eq!(run(&mut instance, &[&sent]).unwrap(), sent);
}

#[test]
fn no_rows_are_no_rows() {
    let Some(runtime) = library() else { return };
    for dtype in [DataType::Fp32, DataType::Bytes, DataType::Bool] {
        let mut instance = instance(&runtime, &identity(dtype));
        let sent = [Tensor::new(dtype, shape(&[0, 3]), Bytes::new()).unwrap()];
        assert_eq!(run(&mut instance, &[&sent]).unwrap(), sent);
    }
}

#[test]
fn an_aligned_job_is_lent_and_outputs_outlive_the_instance() {
    let Some(runtime) = library() else { return };
    let sum_rows = trap("sum_rows");
    let model = runtime.load(&sum_rows, &ONE_THREAD).unwrap();
    let fill = |value: f32| Tensor::from_vec(shape(&[2, 16]), vec![value; 32]).unwrap();
    let sent = [fill(5.0), fill(3.0)];
    let mut scratch = Vec::new();
    let jobs: [&[Tensor]; 1] = [&sent];
    let lent = bytes_of(&Batch::new(&jobs).input(0), &mut scratch);
    assert_eq!(lent.as_ptr(), sent[0].data().as_ptr());

    let mut instance = model.instance().unwrap();
    let answer = run(&mut instance, &[&sent]).unwrap();
    run(&mut instance, &[&[fill(0.0), fill(0.0)]]).unwrap();
    drop((instance, model, sent));
    assert_eq!((&answer[0], &answer[1]), (&fill(8.0), &fill(2.0)));

    // Outputs follow the signature's order and selection, not the file's.
    let Signature { inputs, outputs } = sum_rows.description.signature().clone();
    let second = artifact(sum_rows.path, inputs, outputs[1..].to_vec());
    let mut only = self::instance(&runtime, &second);
    assert_eq!(run(&mut only, &[&[fill(5.0), fill(3.0)]]).unwrap(), [fill(2.0)]);
}

#[test]
fn the_last_bits_of_a_sum_do_not_follow_from_the_address() {
    let Some(runtime) = library() else { return };
    let sum = build::Model::new().input("x", build::FLOAT, &["61"]);
    let sum = sum.node("ReduceSum", &["x"], &["y"]).output("y", build::FLOAT, &["1"]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.onnx");
    std::fs::write(&path, sum.bytes()).unwrap();
    let artifact = artifact(path, vec![spec("x", DataType::Fp32, &[61])], vec![spec("y", DataType::Fp32, &[1])]);
    let mut instance = instance(&runtime, &artifact);
    let numbers: Vec<u8> = (0..61).flat_map(|i| (1.0 / (i as f32 + 3.0)).to_le_bytes()).collect();
    let mut sum_at = |offset: usize| {
        let buffer = vec![0; offset].into_iter().chain(numbers.iter().copied()).collect::<Vec<u8>>();
        let sent = [Tensor::new(DataType::Fp32, shape(&[61]), Bytes::from(buffer).slice(offset..)).unwrap()];
        run(&mut instance, &[&sent]).unwrap()
    };
    let first = sum_at(0);
    assert!((1..64).all(|offset| sum_at(offset) == first));
}

#[test]
fn two_instances_of_a_model_agree() {
    let Some(runtime) = library() else { return };
    for (bytes, threads, share) in [(LARGE, 1, true), (LARGE, 2, false), (1, 1, false)] {
        let (artifact, options) =
            (Artifact { bytes, ..identity(DataType::Fp32) }, LoadOptions { threads, ..ONE_THREAD });
        let model = runtime.load(&artifact, &options).unwrap();
        let sent = [misaligned(DataType::Fp32, 4, 9)];
        for _ in 0..2 {
            assert_eq!(run(&mut model.instance().unwrap(), &[&sent]).unwrap(), sent);
        }
        assert_eq!((runtime.instances_share_weights(&artifact, &options), model.warnings().is_empty()), (share, true));
    }
    let (large, on_gpu) = (Artifact { bytes: LARGE, ..identity(DataType::Fp32) }, Device::Cuda(0));
    let on_gpu = LoadOptions { device: on_gpu, ..ONE_THREAD };
    assert!(!runtime.instances_share_weights(&large, &on_gpu), "the engine's promise is believed of the CPU only");
}

/// Instances of one session, each on its own thread, with runs of all sizes at once: every answer is that of the run alone,
/// what one fails of is its own, and outputs outlive the session.
#[test]
fn threads_run_one_session_together() {
    const THREADS: usize = 4;
    const RUNS: usize = 300;
    let Some(runtime) = library() else { return };
    for dtype in [DataType::Fp32, DataType::Bytes, DataType::Int64] {
        let model = runtime.load(&Artifact { bytes: LARGE, ..identity(dtype) }, &ONE_THREAD).unwrap();
        let kept: Vec<(Tensor, Tensor)> = std::thread::scope(|scope| {
            let run_all = |thread: usize| {
                let mut instance = model.instance().unwrap();
                let wrong = [Tensor::from_vec(shape(&[1, 3]), vec![0u8; 3]).unwrap()];
                let mut answers = Vec::new();
                for at in 0..RUNS {
                    let sent = misaligned(dtype, 1 + (at * (thread + 1)) % 67, at as u8);
                    let answer = run(&mut instance, &[std::slice::from_ref(&sent)]).unwrap().remove(0);
                    assert_eq!(answer, sent, "{dtype}");
                    assert!(run(&mut instance, &[&wrong]).is_err());
                    answers.push((sent, answer));
                }
                answers
            };
            let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || run_all(thread))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        drop(model);
        assert!(kept.iter().all(|(sent, answer)| sent == answer), "{dtype}");
    }
}

#[test]
fn a_scalar_input_has_no_dimensions() {
    let Some(runtime) = library() else { return };
    let scalar = trap("scalar");
    let rows = Tensor::from_vec(shape(&[1, 4]), vec![1f32, 2.0, 3.0, 4.0]).unwrap();
    let scale = Tensor::from_vec(Shape::scalar(), vec![2f32]).unwrap();
    let answer = run(&mut instance(&runtime, &scalar), &[&[rows, scale]]).unwrap();
    assert_eq!(answer[0].to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0, 8.0]);
}

#[test]
fn external_data_beside_the_file_is_read() {
    let Some(runtime) = library() else { return };
    let external = trap("external");
    let weights = std::fs::read(external.path.with_file_name("weights.bin")).unwrap();
    // y = x W, and x picks the row 5 of W.
    let mut picks = vec![0f32; 64];
    picks[5] = 1.0;
    let sent = [Tensor::from_vec(shape(&[1, 64]), picks).unwrap()];
    let answer = run(&mut instance(&runtime, &external), &[&sent]).unwrap();
    assert_eq!(answer[0].data()[..], weights[5 * 32..6 * 32]);
}

#[test]
fn what_the_engine_blames_on_the_input_is_an_invalid_argument() {
    let Some(runtime) = library() else { return };
    let mut sentinel = instance(&runtime, &trap("sentinel"));
    let narrow = [Tensor::from_vec(shape(&[1, 7]), vec![0f32; 7]).unwrap()];
    let Err(RunError::InvalidArgument(message)) = run(&mut sentinel, &[&narrow]) else { panic!("a narrow row ran") };
    assert!(message.contains("Expected: 8"), "{message}");

    let ids = |id: i64| [Tensor::from_vec(shape(&[1, 1]), vec![id]).unwrap()];
    let mut gather = instance(&runtime, &trap("gather"));
    let Err(RunError::InvalidArgument(message)) = run(&mut gather, &[&ids(99)]) else { panic!("99 is no id") };
    assert!(message.contains("idx=99") && !message.contains(".cc") && !message.contains(" /"), "{message}");
    assert_eq!(run(&mut gather, &[&ids(3)]).unwrap()[0].shape().dims(), [1, 1, 4]);
}

#[test]
fn outputs_that_are_no_tensors_are_left_out() {
    let Some(runtime) = library() else { return };
    let model = runtime.load(&trap("zipmap"), &ONE_THREAD).unwrap();
    let [warning] = model.warnings() else { panic!("{:?}", model.warnings()) };
    assert!(warning.contains("is not a tensor"), "{warning}");
    let rows = [Tensor::from_vec(shape(&[2, 4]), vec![0.5f32; 8]).unwrap()];
    let answer = run(&mut model.instance().unwrap(), &[&rows]).unwrap();
    assert_eq!((answer.len(), answer[0].shape().dims()), (1, &[2][..]));
}

#[test]
fn a_signature_the_engine_does_not_share_is_refused() {
    let Some(runtime) = library() else { return };
    let path = identity(DataType::Fp32).path;
    let refusal = |inputs, outputs| {
        let error = runtime.load(&artifact(path.clone(), inputs, outputs), &ONE_THREAD).err().unwrap();
        assert!(matches!(error, LoadError::Engine { .. }), "{error:?}");
        error.to_string()
    };
    let (x, y) = (|| spec("x", DataType::Fp32, &[-1, -1]), || spec("y", DataType::Fp32, &[-1, -1]));
    assert!(refusal(vec![spec("z", DataType::Fp32, &[-1])], vec![y()]).contains("`x` FP32, expected `z` FP32"));
    assert!(refusal(vec![x(), x()], vec![y()]).contains("expected `x` FP32, `x` FP32"));
    assert!(refusal(vec![x()], vec![spec("y", DataType::Int64, &[-1])]).contains("`y` INT64 was expected"));
    assert!(refusal(vec![x()], vec![spec("q", DataType::Fp32, &[-1])]).contains("none of that name"));
    assert!(refusal(vec![x()], vec![]).contains("none of its outputs"));

    let undeclared = TensorSpec { dims: None, ..y() };
    let model = runtime.load(&artifact(path.clone(), vec![x()], vec![undeclared]), &ONE_THREAD).unwrap();
    assert_eq!(model.signature().outputs[0].to_wire(), [-1, -1]);
    assert_eq!(model.signature().outputs[0].dims.as_ref().unwrap()[0], Dim::Free(Some("batch".into())));
}

#[test]
fn every_trap_loads_with_the_signature_its_file_declares() {
    let Some(runtime) = library() else { return };
    let traps = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traps")).unwrap();
    let names = traps.map(Result::unwrap).filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name());
    let mut seen = 0;
    for name in names {
        let artifact = trap(name.to_str().unwrap());
        let model = runtime.load(&artifact, &ONE_THREAD).unwrap_or_else(|error| panic!("{name:?}: {error}"));
        assert_eq!(model.signature().inputs, artifact.description.signature().inputs, "{name:?}");
        assert_eq!(model.output_kinds().len(), model.signature().outputs.len(), "{name:?}");
        seen += 1;
    }
    assert!(seen >= 30, "{seen} traps");
}

#[test]
fn bad_models_are_refused_with_a_reason() {
    let Some(runtime) = library() else { return };
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(identity(DataType::Fp32).path).unwrap();
    for (name, bytes) in [("garbage", &b"not a model"[..]), ("half", &whole[..whole.len() / 2]), ("empty", b"")] {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = runtime.load(&artifact(path, vec![], vec![]), &ONE_THREAD).err().unwrap().to_string();
        assert!(!error.contains(dir.path().to_str().unwrap()) && error.len() > 10, "{name}: {error}");
    }
    let absent = artifact(dir.path().join("absent"), vec![], vec![]);
    assert!(matches!(runtime.load(&absent, &ONE_THREAD).err(), Some(LoadError::BadModel(_))));
}

#[test]
fn a_device_that_is_not_there_is_named_with_what_it_takes() {
    let Some(runtime) = library() else { return };
    let cuda = LoadOptions { device: Device::Cuda(0), threads: 1 };
    match runtime.load(&identity(DataType::Fp32), &cuda) {
        Err(LoadError::Unavailable(message)) => {
            let wanted = ["`cuda:0`", "onnxruntime-gpu", "NVIDIA driver", "`device_fallback = \"cpu\"`"];
            assert!(wanted.iter().all(|word| message.contains(word)), "{message}");
        }
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("the fetched library is a CPU build, yet it loaded a model for CUDA"),
    }
}

#[test]
fn an_output_that_is_the_input_itself_is_copied() {
    let Some(runtime) = library() else { return };
    let through = build::Model::new().input("x", build::FLOAT, &["4"]).output("x", build::FLOAT, &["4"]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.onnx");
    std::fs::write(&path, through.bytes()).unwrap();
    let x = || vec![spec("x", DataType::Fp32, &[4])];
    let mut instance = instance(&runtime, &artifact(path, x(), x()));
    let sent = [Tensor::from_vec(shape(&[4]), vec![1f32, 2.0, 3.0, 4.0]).unwrap()];
    let address = sent[0].data().as_ptr();
    let answer = run(&mut instance, &[&sent]).unwrap();
    assert_eq!(answer, sent);
    assert_ne!(answer[0].data().as_ptr(), address);
}

#[test]
fn a_big_batch_does_not_hold_its_scratch_memory() {
    let Some(runtime) = library() else { return };
    let rows = SCRATCH_KEPT_BYTES / 8 / 8;
    let jobs: Vec<[Tensor; 1]> =
        (0..3).map(|_| [Tensor::from_vec(shape(&[rows, 8]), vec![1f32; rows * 8]).unwrap()]).collect();
    let jobs: Vec<&[Tensor]> = jobs.iter().map(|job| job.as_slice()).collect();
    let artifact = trap("sentinel");
    let session = session(&runtime.environment, &artifact, &ONE_THREAD).unwrap();
    let signature = Arc::new(artifact.description.signature().clone());
    let session = Arc::new(Shared::new(session, &signature).unwrap());
    let mut instance = OnnxRuntimeInstance::new(session, signature).unwrap();
    instance.run(&Batch::new(&jobs)).unwrap();
    assert_eq!(instance.scratch[0].capacity(), 0);
    let small = [Tensor::from_vec(shape(&[1, 8]), vec![1f32; 8]).unwrap()];
    instance.run(&Batch::new(&[&small, &small])).unwrap();
    assert_eq!(instance.scratch[0].len(), 64 / size_of::<Aligned>());
}

#[test]
fn the_library_is_looked_for_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let by = |configured: Option<&str>, environment: Option<&str>| {
        OnnxRuntime::find(configured.map(Path::new), environment.map(PathBuf::from), Some(dir.path()))
    };
    let found = |path: &Path, by| Ok(Found { path: path.into(), by });
    let nothing = by(None, None).unwrap_err();
    assert_eq!(nothing.0, [dir.path().join(LIBRARY), dir.path().join("lib").join(LIBRARY)]);
    assert!(nothing.to_string().contains("make build"), "{nothing}");
    assert_eq!(by(Some("/a"), Some("/b")), found(Path::new("/a"), FoundBy::Configuration));
    assert_eq!(by(None, Some("/b")), found(Path::new("/b"), FoundBy::Environment));
    assert!(by(None, Some("")).is_err());

    let inner = dir.path().join("lib").join(LIBRARY);
    std::fs::create_dir(dir.path().join("lib")).unwrap();
    std::fs::write(&inner, "").unwrap();
    assert_eq!(by(None, None), found(&inner, FoundBy::BesideBinary));
    std::fs::write(dir.path().join(LIBRARY), "").unwrap();
    assert_eq!(by(None, None), found(&dir.path().join(LIBRARY), FoundBy::BesideBinary));
    assert!(OnnxRuntime::find(None, None, None).is_err());
}

#[test]
fn what_is_no_usable_library_is_refused_by_name_and_reason() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |path: &Path| match check_file(path).and_then(|()| check_library(path)) {
        Err(reason) => reason,
        Ok((_, version)) => panic!("{} was taken for version {version}", path.display()),
    };
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    assert!(refusal(dir.path()).contains("not a file"));
    if cfg!(target_os = "linux") {
        assert!(refusal(&file("text.so", b"GROUP ( libc.so.6 )")).contains("not a shared library"));
        assert!(refusal(&file("empty.so", b"")).contains("not a shared library"));
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(refusal(&file("half.so", &own[..own.len() / 2])).contains("cut short"));
        assert!(refusal(&file("header.so", &own[..64])).contains("cut short"));
        let mut scrambled = own[..4096].to_vec();
        scrambled[0x20..0x40].fill(0xff);
        assert!(refusal(&file("scrambled.so", &scrambled)).contains("cut short"));
    }
    if let Ok(maps) = std::fs::read_to_string("/proc/self/maps") {
        let mut mapped = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
        let other = mapped.find(|path| path.contains("/libc.so") || path.contains("/libgcc_s")).unwrap();
        assert!(refusal(Path::new(other)).contains("not ONNX Runtime"));
    }
    let absent = OnnxRuntime::open(&dir.path().join("absent.so")).unwrap_err().to_string();
    assert!(absent.contains("`absent.so`") && absent.contains("no such file"), "{absent}");
    assert!(!absent.contains(dir.path().to_str().unwrap()), "{absent}");
}

#[test]
fn one_process_has_one_library() {
    let Some(runtime) = library() else { return };
    assert_eq!(check_version(&runtime.version()), Ok(()));
    let again = library().unwrap();
    assert!(Arc::ptr_eq(&runtime, &again));
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other.so");
    std::fs::write(&other, "").unwrap();
    assert!(OnnxRuntime::open(&other).unwrap_err().to_string().contains("already"));
}

#[test]
fn messages_lose_places_and_lines_and_length() {
    let message = "Non-zero status running Gather node. Name:'/emb/Gather' Status Message: \
                   /src/core/gather.cc:154 \"/tmp/x/y\" 0x7f00 indices\n out of bounds\nstack";
    assert_eq!(
        clean(message),
        "Non-zero status running Gather node. Name:'/emb/Gather' Status Message: indices out of bounds"
    );
    assert_eq!(clean(&"é ".repeat(1000)).chars().count(), LIMIT);
}

#[test]
fn libraries_older_than_the_interface_are_refused() {
    assert!(["1.17.0", "1.31.1", "1.32.0-dev", "2.0.0"].iter().all(|version| check_version(version).is_ok()));
    assert_eq!(check_version("1.16.3"), Err("it is version 1.16.3, expected 1.17 or newer".into()));
    assert!(["", "x", "1", "0.99.0"].iter().all(|version| check_version(version).is_err()));
}
