//! tract on models built by hand, the trap models and the example models.

use bytes::Bytes;

use super::plans::KEPT_PLANS;
use super::*;
use crate::backend::onnx::build::{self, FLOAT, INT64, STRING, integer};
use crate::backend::panics_are_answered;
use crate::tensor::{DataType, Dim, Shape};

const CPU: LoadOptions = LoadOptions { device: Device::Cpu, threads: 1 };

fn load_file(path: &Path) -> Result<Arc<dyn Model>, LoadError> {
    let description = crate::backend::Description::Onnx(Description::read(std::fs::read(path).unwrap().into())?);
    Tract.load(&Artifact { path: path.to_owned(), bytes: 1, description: Arc::new(description) }, &CPU)
}

fn in_repository(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn trap(name: &str) -> Result<Arc<dyn Model>, LoadError> {
    load_file(&in_repository(&format!("tests/traps/{name}/1/model.onnx")))
}

fn load_built(model: &build::Model) -> Result<Arc<dyn Model>, LoadError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, model.bytes()).unwrap();
    load_file(&path)
}

fn error(result: Result<Arc<dyn Model>, LoadError>) -> String {
    result.err().unwrap().to_string()
}

fn floats(dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_vec(Shape::new(dims).unwrap(), values.to_vec()).unwrap()
}

fn run_jobs(model: &Arc<dyn Model>, jobs: &[&[Tensor]]) -> Result<Vec<Tensor>, RunError> {
    model.instance().unwrap().run(&Batch::new(jobs))
}

fn run_one(model: &Arc<dyn Model>, inputs: &[Tensor]) -> Vec<Tensor> {
    run_jobs(model, &[inputs]).unwrap()
}

#[test]
fn matmul_and_softmax_by_hand_at_every_batch_size() {
    let model = build::Model::new()
        .input("x", FLOAT, &["batch", "2"])
        .weights("w", &[2, 2], &[1.0, 0.0, 0.0, 2.0])
        .node("MatMul", &["x", "w"], &["h"])
        .node("Softmax", &["h"], &["y"])
        .untyped_shape_output("y", FLOAT);
    let model = load_built(&model).unwrap();
    assert_eq!(model.output_kinds(), [OutputKind::Probabilities]);
    let inferred = model.signature().outputs[0].dims.clone();
    assert_eq!(inferred, Some(vec![Dim::Free(Some("batch".into())), Dim::Fixed(2)]));
    for rows in [1, 3, 0] {
        let values: Vec<f32> = (0..2 * rows).map(|i| i as f32 / 4.0).collect();
        let outputs = run_one(&model, &[floats(&[rows, 2], &values)]);
        assert_eq!(outputs[0].shape().dims(), [rows, 2]);
        for (given, found) in values.chunks(2).zip(outputs[0].to_vec::<f32>().unwrap().chunks(2)) {
            let (a, b) = (given[0].exp(), (given[1] * 2.0).exp());
            assert!((found[0] - a / (a + b)).abs() < 1e-6 && (found[1] - b / (a + b)).abs() < 1e-6);
        }
    }
}

#[test]
fn jobs_are_gathered_in_order_whatever_their_alignment() {
    let model = trap("sentinel").unwrap();
    let row = |value: f32| {
        let mut bytes = vec![0];
        bytes.extend([value; 8].iter().flat_map(|v| v.to_le_bytes()));
        [Tensor::new(DataType::Fp32, Shape::new([1, 8]).unwrap(), Bytes::from(bytes).slice(1..)).unwrap()]
    };
    let jobs: Vec<[Tensor; 1]> = (0..5).map(|i| row(i as f32)).collect();
    let jobs: Vec<&[Tensor]> = jobs.iter().map(|job| job.as_slice()).collect();
    let found = run_jobs(&model, &jobs).unwrap().remove(0).to_vec::<f32>().unwrap();
    let expected: Vec<f32> = (0..5).flat_map(|i| [2.0 * i as f32 + 1.0; 8]).collect();
    assert_eq!(found, expected);
}

#[test]
fn every_bit_of_every_datatype_comes_back() {
    for dtype in DataType::ALL.into_iter().filter(|dtype| *dtype != DataType::Bf16) {
        let shape = Shape::new([3, 5]).unwrap();
        let tensor = match dtype.size() {
            None => Tensor::from_strings(shape, (0..15).map(|i| "é\0".repeat(i % 4))),
            Some(size) => {
                let limit = if dtype == DataType::Bool { 2 } else { 251 };
                let bytes: Vec<u8> = (0..15 * size).map(|i| (i * 37 % limit) as u8).collect();
                Tensor::new(dtype, shape, bytes.into())
            }
        }
        .unwrap();
        let name = format!("identity_{}", dtype.name().to_lowercase());
        assert_eq!(run_one(&trap(&name).unwrap(), std::slice::from_ref(&tensor)), [tensor], "{name}");
    }
}

#[test]
fn strings_that_are_not_utf8_are_the_clients_fault() {
    let x = Tensor::from_strings(Shape::new([1, 1]).unwrap(), [b"\xff"]).unwrap();
    let error = run_jobs(&trap("identity_bytes").unwrap(), &[&[x]]).unwrap_err();
    assert!(matches!(&error, RunError::InvalidArgument(text) if text.contains("\"x\" holds bytes")), "{error}");
}

#[test]
fn scalars_integers_and_computed_shapes() {
    let scale = Tensor::from_vec(Shape::scalar(), vec![3f32]).unwrap();
    let y = run_one(&trap("scalar").unwrap(), &[floats(&[1, 4], &[1.0, 2.0, 3.0, 4.0]), scale]);
    assert_eq!(y[0].to_vec::<f32>().unwrap(), [3.0, 6.0, 9.0, 12.0]);
    let model = build::Model::new()
        .input("x", INT64, &["batch", "2"])
        .node("Add", &["x", "x"], &["y"])
        .node("Shape", &["x"], &["shape"])
        .output("y", INT64, &["batch", "2"])
        .output("shape", INT64, &["2"]);
    let x = Tensor::from_vec(Shape::new([2, 2]).unwrap(), vec![1i64, -2, i64::MAX / 2, 0]).unwrap();
    let outputs = run_one(&load_built(&model).unwrap(), &[x]);
    assert_eq!(outputs[0].to_vec::<i64>().unwrap(), [2, -4, i64::MAX - 1, 0]);
    assert_eq!(outputs[1].to_vec::<i64>().unwrap(), [2, 2]);
}

#[test]
fn unnamed_free_dimensions_get_symbols() {
    let model =
        build::Model::new().input("x", FLOAT, &["", ""]).node("Relu", &["x"], &["y"]).output("y", FLOAT, &["", ""]);
    let model = load_built(&model).unwrap();
    assert!(model.warnings().is_empty(), "one plan for every shape: {:?}", model.warnings());
    assert_eq!(run_one(&model, &[floats(&[2, 1], &[-1.0, 1.0])])[0].to_vec::<f32>().unwrap(), [0.0, 1.0]);
    assert_eq!(run_one(&model, &[floats(&[1, 3], &[2.0; 3])])[0].shape().dims(), [1, 3]);
}

#[test]
fn a_run_remembers_nothing_of_the_one_before() {
    // One cell, input and state of width 1: the answer depends on the state that it starts from. A state of tract's
    // that is used twice gives another answer the second time.
    let model = build::Model::new()
        .input("x", FLOAT, &["seq", "batch", "1"])
        .weights("w", &[1, 4, 1], &[1.0; 4])
        .weights("r", &[1, 4, 1], &[1.0; 4])
        .call("", "LSTM", &["x", "w", "r"], &["y"], vec![integer("hidden_size", 1)])
        .output("y", FLOAT, &["seq", "1", "batch", "1"]);
    let model = load_built(&model).unwrap();
    let mut instance = model.instance().unwrap();
    let mut run = |batch: usize| {
        let inputs = [floats(&[2, batch, 1], &vec![0.5; 2 * batch])];
        instance.run(&Batch::new(&[&inputs])).unwrap()[0].to_vec::<f32>().unwrap()[0]
    };
    let first = run(1);
    assert_eq!([run(1), run(3), run(1)], [first; 3]);
}

#[test]
fn an_index_out_of_range_is_the_clients_fault_and_costs_nothing() {
    let model = trap("gather").unwrap();
    let mut instance = model.instance().unwrap();
    let mut run = |ids: &[i64]| {
        let inputs = [Tensor::from_vec(Shape::new([ids.len(), 1]).unwrap(), ids.to_vec()).unwrap()];
        instance.run(&Batch::new(&[&inputs])).map(|mut outputs| outputs.remove(0))
    };
    // The panics inside are not worth a line of log each: whoever hooks them can tell.
    let (me, previous) = (std::thread::current().id(), std::panic::take_hook());
    let unanswered = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let seen = unanswered.clone();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().id() != me {
            previous(panic);
        } else if !panics_are_answered() {
            seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }));
    for bad in [10, -11, i64::MAX, i64::MIN] {
        assert!(matches!(run(&[1, bad]), Err(RunError::InvalidArgument(_))), "{bad}");
    }
    assert_eq!(run(&[-10]).unwrap(), run(&[0]).unwrap());
    assert_eq!(unanswered.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[test]
fn shapes_that_need_plans_of_their_own() {
    let model = trap("only_seven").unwrap();
    assert_eq!(model.warnings().len(), 1);
    let row = |seed: usize| [floats(&[1, 7], &(0..7).map(|i| (i * seed) as f32 / 9.0).collect::<Vec<_>>())];
    let rows: Vec<[Tensor; 1]> = (0..11).map(row).collect();
    let alone: Vec<Vec<f32>> = rows.iter().map(|r| run_one(&model, r)[0].to_vec().unwrap()).collect();
    for count in 2..=rows.len() {
        let jobs: Vec<&[Tensor]> = rows[..count].iter().map(|row| row.as_slice()).collect();
        let outputs = run_jobs(&model, &jobs).unwrap();
        assert_eq!(outputs[0].shape().dims(), [count, 2], "padding is cut off again");
        let found = outputs[0].to_vec::<f32>().unwrap();
        for (a, b) in found.iter().zip(alone.concat()) {
            assert!((a - b).abs() < 1e-6);
        }
    }
    let wide = [floats(&[1, 8], &[0.0; 8])];
    assert!(matches!(run_jobs(&model, &[&wide]), Err(RunError::InvalidArgument(_))));
}

#[test]
fn few_plans_are_kept_and_batch_sizes_share_them() {
    let path = in_repository("tests/traps/only_seven/1/model.onnx");
    let description = Description::read(std::fs::read(&path).unwrap().into()).unwrap();
    let Plans::Concrete(plans) = load(&path, &description).unwrap().plans else { panic!("a symbolic plan") };
    for rows in 1..20 {
        plans.plan(vec![Shape::new([rows, 7]).unwrap()]).unwrap();
        assert!(plans.recent.len() <= KEPT_PLANS);
    }
    let kept = plans.plan(vec![Shape::new([12, 7]).unwrap()]).unwrap();
    assert!(Arc::ptr_eq(&kept, &plans.plan(vec![Shape::new([12, 7]).unwrap()]).unwrap()));
    assert!(plans.plan(vec![Shape::new([1, 8]).unwrap()]).is_err());
    assert_eq!(plans.recent.len(), KEPT_PLANS, "a failure takes no place");
}

#[test]
fn what_tract_cannot_do_is_refused_at_load_with_a_reason() {
    for (name, reason) in [
        ("reverse_lstm", "tract: LSTM with direction reverse runs forwards in tract: use the backend onnxruntime"),
        ("identity_bf16", "tract: \"x\" is BF16, which tract does not have: use the backend onnxruntime"),
        ("slow", "tract: Translating node #3 \"loop_1\" Unimplemented(Loop)"),
        ("random_noise", "tract: Building node"),
    ] {
        let text = error(trap(name));
        assert!(text.starts_with(reason), "{name}: {text}");
    }
    let free = build::Model::new().input("x", FLOAT, &["batch", "n"]).node("NoSuchOperator", &["x"], &["y"]).output(
        "y",
        FLOAT,
        &["batch", "n"],
    );
    assert!(error(load_built(&free)).contains("NoSuchOperator"));
    // tract panics where the file lacks what its output names.
    let dangling = build::Model::new().input("x", STRING, &["n"]).output("nowhere", STRING, &["n"]);
    assert!(error(load_built(&dangling)).starts_with("tract: panicked: "));
}

#[test]
fn every_other_trap_model_loads() {
    let refused = ["batch_norm_training", "identity_bf16", "random_noise", "reverse_lstm", "slow"];
    for entry in std::fs::read_dir(in_repository("tests/traps")).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_str().unwrap();
        if folder.is_dir() && !name.starts_with('.') {
            let result = trap(name);
            assert_eq!(result.is_err(), refused.contains(&name), "{name}: {:?}", result.err());
        }
    }
}

#[test]
fn other_devices_and_threads() {
    let path = in_repository("tests/traps/sentinel/1/model.onnx");
    let description =
        crate::backend::Description::Onnx(Description::read(std::fs::read(&path).unwrap().into()).unwrap());
    let artifact = Artifact { path, bytes: 1, description: Arc::new(description) };
    let cuda = LoadOptions { device: Device::Cuda(0), threads: 1 };
    assert!(
        matches!(Tract.load(&artifact, &cuda), Err(LoadError::Unavailable(text)) if text.contains("`cuda:0`") && text.contains("onnxruntime"))
    );
    let model = Tract.load(&artifact, &LoadOptions { threads: 4, ..CPU }).unwrap();
    assert_eq!(model.warnings(), ["tract runs on one thread: threads = 4 has no effect"]);
}

#[test]
fn load_errors_show_no_folder() {
    let folder = tempfile::tempdir().unwrap();
    let model = build::Model::new()
        .input("x", FLOAT, &["n"])
        .external("w", &[("location", "missing.bin")])
        .node("Add", &["x", "w"], &["y"])
        .output("y", FLOAT, &["n"]);
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, model.bytes()).unwrap();
    let text = error(load_file(&path));
    assert!(text.contains("missing.bin") && !text.contains(&*folder.path().to_string_lossy()), "{text}");
}

#[test]
fn the_example_models_give_their_expected_answers() {
    for name in ["digits/1", "digits/2", "tumor/1", "diabetes/1", "wine/1"] {
        let folder = in_repository("models").join(name);
        let model = load_file(&folder.join("model.onnx")).unwrap();
        let golden = std::fs::read_to_string(folder.join("expected.json")).unwrap();
        let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let tensor = |spec: &TensorSpec, given: &serde_json::Value| {
                let dims: Vec<i64> = serde_json::from_value(given["shape"].clone()).unwrap();
                let data: Vec<f64> = serde_json::from_value(given["data"].clone()).unwrap();
                let shape = Shape::from_wire(&dims).unwrap();
                let shaped = match spec.dtype {
                    DataType::Int64 => Tensor::from_vec(shape, data.iter().map(|v| *v as i64).collect()),
                    _ => Tensor::from_vec(shape, data.iter().map(|v| *v as f32).collect()),
                };
                shaped.unwrap()
            };
            let signature = model.signature();
            let inputs: Vec<Tensor> =
                signature.inputs.iter().map(|spec| tensor(spec, &case["inputs"][&*spec.name])).collect();
            for (spec, found) in signature.outputs.iter().zip(run_one(&model, &inputs)) {
                let expected = tensor(spec, &case["outputs"][&*spec.name]);
                assert_eq!(found.shape(), expected.shape(), "{name} {}", spec.name);
                match found.to_vec::<f32>() {
                    None => assert_eq!(found, expected, "{name} {}", spec.name),
                    Some(values) => {
                        for (a, b) in values.iter().zip(expected.to_vec::<f32>().unwrap()) {
                            assert!((a - b).abs() <= 1e-5 + 1e-4 * b.abs(), "{name} {}: {a} {b}", spec.name);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_version_is_the_one_pinned() {
    let manifest = std::fs::read_to_string(in_repository("Cargo.toml")).unwrap();
    assert!(manifest.contains(&format!("tract-onnx = {{ version = \"={VERSION}\"")));
}
