//! candle on small models built by hand and on the folders that transformers wrote. What single layers and whole encoders
//! answer is compared with PyTorch in tests/it, through a registry.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use super::*;
use crate::backend::safetensors::encoder::EncoderConfig;
use crate::backend::safetensors::layers::{Activation, Axes, Conv, Layer, Pool, Pooled};
use crate::backend::safetensors::{Declared, Description, MODEL_FILE};
use crate::tensor::Dim;

fn options(threads: usize) -> LoadOptions {
    LoadOptions { device: Device::Cpu, threads }
}

type Weights<'a> = &'a [(&'a str, &'a [usize], &'a [f32])];

fn write(folder: &Path, dtype: &str, weights: Weights) {
    let (mut header, mut data) = (Vec::new(), Vec::new());
    for (name, dims, values) in weights {
        let begin = data.len();
        for value in *values {
            match dtype {
                "F16" => data.extend(f16::from_f32(*value).to_le_bytes()),
                "BF16" => data.extend(bf16::from_f32(*value).to_le_bytes()),
                _ => data.extend(value.to_le_bytes()),
            }
        }
        let end = data.len();
        header.push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{dims:?},"data_offsets":[{begin},{end}]}}"#));
    }
    let header = format!("{{{}}}", header.join(","));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(folder.join(MODEL_FILE), bytes).unwrap();
}

fn sequential(shape: &[i64], dtype: DataType, kinds: &[Kind]) -> Sequential {
    let dims = shape.iter().map(|extent| usize::try_from(*extent).map_or(Dim::Free(None), Dim::Fixed)).collect();
    let layers = kinds.iter().enumerate().map(|(i, kind)| Layer { key: i.to_string(), kind: kind.clone() }).collect();
    Sequential { input: TensorSpec { name: "x".into(), dtype, dims: Some(dims) }, output: "y".into(), layers }
}

fn artifact(folder: &Path, declared: &Declared) -> Artifact {
    let description = Description::read(folder, declared).unwrap();
    let description = Arc::new(crate::backend::Description::Safetensors(description));
    Artifact { path: folder.to_owned(), bytes: 1, description }
}

fn load(sequential: Sequential, dtype: &str, weights: Weights, threads: usize) -> Arc<dyn Model> {
    load_limited(sequential, dtype, weights, threads, MAX_ELEMENTS)
}

fn load_limited(s: Sequential, dtype: &str, weights: Weights, threads: usize, max_elements: usize) -> Arc<dyn Model> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), dtype, weights);
    let candle = Candle { max_elements, ..Candle::default() };
    candle.load(&artifact(folder.path(), &Declared::Sequential(s)), &options(threads)).unwrap()
}

fn floats(dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_vec(Shape::new(dims).unwrap(), values.to_vec()).unwrap()
}

fn integers(dims: &[usize], values: &[i64]) -> Tensor {
    Tensor::from_vec(Shape::new(dims).unwrap(), values.to_vec()).unwrap()
}

fn run(model: &Arc<dyn Model>, jobs: &[&[Tensor]]) -> Result<Vec<Tensor>, RunError> {
    model.instance().unwrap().run(&Batch::new(jobs))
}

fn numbers(model: &Arc<dyn Model>, inputs: &[Tensor]) -> Vec<f32> {
    run(model, &[inputs]).unwrap()[0].to_vec().unwrap()
}

fn blamed(result: Result<Vec<Tensor>, RunError>) -> String {
    match result {
        Err(RunError::InvalidArgument(message)) => message,
        other => panic!("{other:?}, expected the input to be blamed"),
    }
}

const LINEAR: Kind = Kind::Linear { inputs: None, outputs: 2, bias: true };
const LINEAR_WEIGHTS: Weights =
    &[("0.weight", &[2, 3], &[1.0, 0.0, -2.5, 0.5, 3.0, 1.0]), ("0.bias", &[2], &[0.25, -1.0])];

#[test]
fn weights_of_every_float_are_the_same_numbers() {
    for dtype in ["F32", "F16", "BF16"] {
        let model = load(sequential(&[-1, 3], DataType::Fp32, &[LINEAR]), dtype, LINEAR_WEIGHTS, 1);
        let y = numbers(&model, &[floats(&[2, 3], &[1.0, 2.0, 3.0, 0.0, 0.0, 0.0])]);
        assert_eq!(y, [-6.25, 8.5, 0.25, -1.0], "{dtype}");
    }
}

#[test]
fn other_engines_and_devices_say_who_serves_a_model() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "F32", LINEAR_WEIGHTS);
    let declared = Declared::Sequential(sequential(&[-1, 3], DataType::Fp32, &[LINEAR]));
    let safetensors = artifact(folder.path(), &declared);
    let cuda = LoadOptions { device: Device::Cuda(0), threads: 1 };
    // With the feature the device may be there.
    if cfg!(not(feature = "cuda")) {
        let Err(LoadError::Unavailable(error)) = Candle::default().load(&safetensors, &cuda) else {
            panic!("no refusal")
        };
        assert!(error.starts_with("device `cuda:0` cannot be used: this binary was built without"), "{error}");
        assert!(
            ["`cuda`", "--features cuda", "`device_fallback = \"cpu\"`"].iter().all(|w| error.contains(w)),
            "{error}"
        );
    }
    let onnx = Arc::new(crate::backend::Description::Onnx(Default::default()));
    let onnx = Artifact { path: PathBuf::new(), bytes: 1, description: onnx };
    let error = Candle::default().load(&onnx, &options(1)).err().unwrap().to_string();
    assert_eq!(error, "candle: found an ONNX file, expected a safetensors model: use onnxruntime or tract");
    #[cfg(feature = "tract")]
    {
        let error = crate::backend::tract::Tract.load(&safetensors, &options(1)).err().unwrap().to_string();
        assert_eq!(error, "tract: found a safetensors model, expected an ONNX file: use the backend candle");
    }
}

#[test]
fn a_file_that_shrank_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "F32", LINEAR_WEIGHTS);
    let declared = Declared::Sequential(sequential(&[-1, 3], DataType::Fp32, &[LINEAR]));
    let artifact = artifact(folder.path(), &declared);
    let file = fs::File::options().write(true).open(folder.path().join(MODEL_FILE)).unwrap();
    file.set_len(file.metadata().unwrap().len() - 9).unwrap();
    let error = Candle::default().load(&artifact, &options(1)).err().unwrap().to_string();
    assert!(error.starts_with("`0.") && error.contains("cannot be read"), "{error}");
}

#[test]
fn indices_out_of_range_are_the_clients_fault() {
    let embedding = Kind::Embedding { rows: 3, width: 2 };
    let weights: Weights = &[("0.weight", &[3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])];
    let model = load(sequential(&[-1, -1], DataType::Int64, std::slice::from_ref(&embedding)), "F32", weights, 1);
    assert_eq!(numbers(&model, &[integers(&[1, 3], &[2, 0, 1])]), [4.0, 5.0, 0.0, 1.0, 2.0, 3.0]);
    for bad in [-1, 3, i64::MIN, i64::MAX, 1 << 32] {
        let message = blamed(run(&model, &[&[integers(&[1, 2], &[0, bad])]]));
        assert_eq!(message, format!("input \"x\" holds {bad}, expected 0 to 2"));
    }
    let narrow = load(sequential(&[-1, 2], DataType::Int32, &[embedding]), "F32", weights, 1);
    let ids = Tensor::from_vec(Shape::new([1, 2]).unwrap(), vec![1i32, 1]).unwrap();
    assert_eq!(numbers(&narrow, &[ids]), [2.0, 3.0, 2.0, 3.0]);
}

fn conv(axes: Axes, kernel: [usize; 2]) -> Kind {
    let (stride, padding) = ([1, 1], Some([0, 0]));
    Kind::Conv(Conv { axes, inputs: None, outputs: 3, kernel, stride, padding, dilation: 1, groups: 1, bias: true })
}

/// Numbers that are neither round nor ordered.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn free_extents_that_are_too_small_are_the_clients_fault() {
    let model = load(
        sequential(&[-1, 2, -1], DataType::Fp32, &[conv(Axes::One, [1, 3])]),
        "F32",
        &[("0.weight", &[3, 2, 3], &noise(18, 1)), ("0.bias", &[3], &[0.0; 3])],
        1,
    );
    assert_eq!(run(&model, &[&[floats(&[1, 2, 5], &[0.5; 10])]]).unwrap()[0].shape().dims(), [1, 3, 3]);
    let message = blamed(run(&model, &[&[floats(&[1, 2, 2], &[0.5; 4])]]));
    assert_eq!(
        message,
        "input \"x\" of shape [1,2,2]: layer 0 (`0`): an extent of 2, expected at least the window's 3"
    );
    assert_eq!(run(&model, &[&[floats(&[0, 2, 5], &[])]]).unwrap()[0].shape().dims(), [0, 3, 3]);
}

#[test]
fn rows_are_the_same_alone_in_batches_and_on_any_number_of_threads() {
    let kinds = [
        conv(Axes::Two, [3, 3]),
        Kind::BatchNorm { axes: Axes::Two, features: None, eps: 1e-5, affine: true },
        Kind::Activation(Activation::Gelu),
        Kind::Pool(Pool {
            axes: Axes::Two,
            kernel: [2, 2],
            stride: [2, 2],
            padding: [0, 0],
            ceil: false,
            of: Pooled::Maximum { dilation: [1, 1] },
        }),
        Kind::Flatten { from: 1, to: -1 },
        Kind::LayerNorm { shape: vec![27], eps: 1e-5, weight: true, bias: true },
        Kind::Linear { inputs: None, outputs: 5, bias: true },
        Kind::Softmax { axis: 1, log: false },
    ];
    let variance: Vec<f32> = noise(3, 4).iter().map(|x| x.abs() + 0.1).collect();
    let weights: [(&str, &[usize], Vec<f32>); 10] = [
        ("0.weight", &[3, 2, 3, 3], noise(54, 1)),
        ("0.bias", &[3], noise(3, 2)),
        ("1.running_mean", &[3], noise(3, 3)),
        ("1.running_var", &[3], variance),
        ("1.weight", &[3], noise(3, 5)),
        ("1.bias", &[3], noise(3, 6)),
        ("5.weight", &[27], noise(27, 7)),
        ("5.bias", &[27], noise(27, 8)),
        ("6.weight", &[5, 27], noise(135, 9)),
        ("6.bias", &[5], noise(5, 10)),
    ];
    let weights: Vec<(&str, &[usize], &[f32])> = weights.iter().map(|(n, d, values)| (*n, *d, &values[..])).collect();
    let network = || sequential(&[-1, 2, 8, 8], DataType::Fp32, &kinds);
    let (one, three) = (load(network(), "F32", &weights, 1), load(network(), "F32", &weights, 3));
    let jobs: Vec<[Tensor; 1]> = (0..5).map(|i| [floats(&[1, 2, 8, 8], &noise(128, 100 + i))]).collect();
    let jobs: Vec<&[Tensor]> = jobs.iter().map(|job| job.as_slice()).collect();
    let together: Vec<f32> = run(&one, &jobs).unwrap()[0].to_vec().unwrap();
    let alone: Vec<f32> = jobs.iter().flat_map(|job| numbers(&one, job)).collect();
    let threaded: Vec<f32> = run(&three, &jobs).unwrap()[0].to_vec().unwrap();
    for (a, (b, c)) in alone.iter().zip(together.iter().zip(&threaded)) {
        assert!((a - b).abs() < 1e-6 && (a - c).abs() < 1e-6, "{a} {b} {c}");
    }
    assert!(alone[..5].iter().zip(&alone[5..]).any(|(a, b)| (a - b).abs() > 1e-3), "rows differ");
    let sums: Vec<f32> = alone.chunks(5).map(|row| row.iter().sum()).collect();
    assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-6), "{sums:?}");
}

#[test]
fn a_nan_stays_one() {
    let maximum = Kind::Pool(Pool {
        axes: Axes::One,
        kernel: [1, 2],
        stride: [1, 2],
        padding: [0, 0],
        ceil: false,
        of: Pooled::Maximum { dilation: [1, 1] },
    });
    let input = floats(&[1, 1, 4], &[f32::NAN, 1.0, -2.0, 5.0]);
    let pooled = load(sequential(&[-1, 1, 4], DataType::Fp32, &[maximum]), "F32", &[], 1);
    let y = numbers(&pooled, std::slice::from_ref(&input));
    assert!(y[0].is_nan() && y[1] == 5.0);
    for activation in [Activation::Relu, Activation::Relu6, Activation::Elu { alpha: 1.0 }, Activation::HardSwish] {
        let model = load(sequential(&[-1, 1, 4], DataType::Fp32, &[Kind::Activation(activation)]), "F32", &[], 1);
        let y = numbers(&model, std::slice::from_ref(&input));
        assert!(y[0].is_nan() && y[1..].iter().all(|y| y.is_finite()), "{activation:?}: {y:?}");
    }
}

fn encoder(name: &str, config: EncoderConfig) -> Arc<dyn Model> {
    encoder_limited(name, config, MAX_ELEMENTS)
}

fn encoder_limited(name: &str, config: EncoderConfig, max_elements: usize) -> Arc<dyn Model> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/safetensors/encoders").join(name).join("1");
    let candle = Candle { max_elements, ..Candle::default() };
    candle.load(&artifact(&folder, &Declared::Encoder(config)), &options(1)).unwrap()
}

/// Ids and mask of one row.
fn row(ids: &[i64], mask: &[i64]) -> [Tensor; 2] {
    [integers(&[1, ids.len()], ids), integers(&[1, mask.len()], mask)]
}

#[test]
fn padding_has_no_influence() {
    for name in ["bert", "bert_sentences", "distilbert", "distilbert_classes", "roberta", "roberta_classes"] {
        let model = encoder(name, EncoderConfig::default());
        let short = run(&model, &[&row(&[5, 7, 9], &[1; 3])]).unwrap();
        // RoBERTa knows padding by its id, 1, too.
        let padded = row(&[5, 7, 9, 1, 1], &[1, 1, 1, 0, 0]);
        let other = row(&[3, 4, 6, 8, 10], &[1; 5]);
        let outputs = run(&model, &[&padded, &other]).unwrap();
        for (short, long) in short.iter().zip(&outputs) {
            let (short, long) = (short.to_vec::<f32>().unwrap(), long.to_vec::<f32>().unwrap());
            assert!(short.iter().zip(&long).all(|(a, b)| (a - b).abs() < 1e-5), "{name}: {short:?} {long:?}");
        }
    }
}

#[test]
fn tokens_that_cannot_be_are_the_clients_fault() {
    let model = encoder("bert", EncoderConfig::default());
    let refusal = |inputs: [Tensor; 2]| blamed(run(&model, &[&inputs]));
    assert_eq!(refusal(row(&[5, 32], &[1, 1])), "input \"input_ids\" holds 32, expected 0 to 31");
    assert_eq!(refusal(row(&[5, 6], &[1, 2])), "input \"attention_mask\" holds 2, expected 0 to 1");
    assert_eq!(
        refusal(row(&[5, 6], &[1, 1, 1])),
        "input \"attention_mask\" has shape [1,3], expected [1,2] as input \"input_ids\" has"
    );
    assert_eq!(refusal(row(&[5; 21], &[1; 21])), "input \"input_ids\" has 21 tokens in a row, expected 1 to 20");
    assert_eq!(refusal(row(&[], &[])), "input \"input_ids\" has 0 tokens in a row, expected 1 to 20");
    let roberta = encoder("roberta", EncoderConfig::default());
    assert_eq!(
        blamed(run(&roberta, &[&row(&[5; 19], &[1; 19])])),
        "input \"input_ids\" has 19 tokens in a row, expected 1 to 18"
    );
    run(&roberta, &[&row(&[5; 18], &[1; 18])]).unwrap();
}

#[test]
fn rows_of_nothing_are_answered() {
    let model = encoder("bert_sentences", EncoderConfig::default());
    let nobody = [integers(&[0, 4], &[]), integers(&[0, 4], &[])];
    let outputs = run(&model, &[&nobody]).unwrap();
    assert_eq!([outputs[0].shape().dims(), outputs[1].shape().dims()], [&[0, 4, 16][..], &[0, 16]]);
    let masked: Vec<f32> = run(&model, &[&row(&[5, 6], &[0, 0])]).unwrap()[1].to_vec().unwrap();
    assert!(masked.iter().all(|x| x.is_finite()), "{masked:?}");
}

#[test]
fn token_types_are_an_input_where_they_are_asked_for() {
    let typed = EncoderConfig { token_type_ids: true, ..EncoderConfig::default() };
    let (plain, typed) = (encoder("bert", EncoderConfig::default()), encoder("bert", typed));
    let [ids, mask] = row(&[5, 7, 9], &[1; 3]);
    let states = |model: &Arc<dyn Model>, inputs: &[Tensor]| numbers(model, inputs);
    let of = |types: &[i64]| states(&typed, &[ids.clone(), mask.clone(), integers(&[1, 3], types)]);
    assert_eq!(of(&[0, 0, 0]), states(&plain, &[ids.clone(), mask.clone()]));
    assert_ne!(of(&[0, 1, 1]), of(&[0, 0, 0]));
    let message = blamed(run(&typed, &[&[ids.clone(), mask.clone(), integers(&[1, 3], &[0, 2, 0])]]));
    assert_eq!(message, "input \"token_type_ids\" holds 2, expected 0 to 1");
}

/// A convolution to 24 elements a row, more than go in or come out.
fn widening() -> (Sequential, Vec<f32>) {
    let mut widening = conv(Axes::One, [1, 1]);
    let Kind::Conv(conv) = &mut widening else { panic!() };
    (conv.outputs, conv.bias) = (6, false);
    let kinds = [widening, Kind::Flatten { from: 1, to: 2 }, Kind::Linear { inputs: None, outputs: 2, bias: false }];
    (sequential(&[-1, 2, 4], DataType::Fp32, &kinds), noise(12 + 48, 21))
}

#[test]
fn a_layers_rows_are_computed_in_slices() {
    let (network, values) = widening();
    let weights: Weights = &[("0.weight", &[6, 2, 1], &values[..12]), ("2.weight", &[2, 24], &values[12..])];
    let of = |limit| load_limited(network.clone(), "F32", weights, 1, limit);
    let input = [floats(&[5, 2, 4], &noise(40, 22))];
    let whole = numbers(&of(MAX_ELEMENTS), &input);
    for limit in [24, 48, 71, 5 * 24] {
        let sliced = numbers(&of(limit), &input);
        assert_eq!(sliced.len(), whole.len());
        assert!(sliced.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-6), "{limit}: {sliced:?} {whole:?}");
    }
    assert_eq!(
        blamed(run(&of(23), &[&input])),
        "input \"x\" of shape [5,2,4]: a row needs a tensor of 24 elements, expected at most 23"
    );
    assert_eq!(
        blamed(run(&of(24), &[&[floats(&[13, 2, 4], &[0.5; 104])]])),
        "the answer has an output of shape [13,2], 26 elements, expected at most 24"
    );
    assert!(numbers(&of(24), &[floats(&[0, 2, 4], &[])]).is_empty());
}

#[test]
fn slices_have_the_rows_that_the_limit_lets_them() {
    let ones = |rows: usize| Computed::ones((rows, 1), candle_core::DType::F32, &candle_core::Device::Cpu);
    let ranges = |rows: usize, at_once: usize| {
        let mut ranges = Vec::new();
        let joined = Joined::new(vec![Shape::new([rows, 1]).unwrap()], MAX_ELEMENTS).unwrap();
        let outputs = joined.compute(rows, at_once, |slice| {
            ranges.push((slice.start, slice.end));
            Ok(vec![ones(slice.len())?])
        });
        assert_eq!(outputs.unwrap()[0].to_vec::<f32>().unwrap(), vec![1.0; rows]);
        ranges
    };
    assert_eq!(ranges(5, slices_of(1, 10, 29).unwrap()), [(0, 2), (2, 4), (4, 5)]);
    assert_eq!(ranges(5, slices_of(1, 10, 50).unwrap()), [(0, 5)]);
    assert_eq!(ranges(5, slices_of(5, 50, 50).unwrap()), [(0, 5)]);
    assert_eq!(ranges(0, 2), []);
    // 8192 rows of BERT-base with 512 tokens, as 64 MiB of ids and mask: 12 heads' scores are what is largest.
    let at_once = slices_of(1, 12 * 512 * 512, MAX_ELEMENTS).unwrap();
    assert_eq!((at_once, at_once * 12 * 512 * 512 <= MAX_ELEMENTS), (85, true));
}

/// Sliced, the columns of each slice would sum to 1.
#[test]
fn coupled_rows_are_not_taken_apart() {
    let kinds = [Kind::Softmax { axis: 0, log: false }];
    let of = |limit| load_limited(sequential(&[-1, 2], DataType::Fp32, &kinds), "F32", &[], 1, limit);
    let input = [floats(&[4, 2], &[0.0; 8])];
    assert_eq!(numbers(&of(8), &input), [0.25; 8]);
    assert_eq!(
        blamed(run(&of(7), &[&input])),
        "input \"x\" of shape [4,2]: 4 rows, which this model couples, need a tensor of 8 elements, expected at most 7"
    );
}

#[test]
fn an_encoders_rows_are_computed_in_slices() {
    let typed = EncoderConfig { token_type_ids: true, ..EncoderConfig::default() };
    let plain = EncoderConfig::default();
    for (name, config) in [("bert", &typed), ("bert_sentences", &plain), ("roberta_classes", &plain)] {
        let of = |limit| encoder_limited(name, config.clone(), limit);
        let ids: Vec<i64> = (0..7 * 3).map(|i| 2 + i).collect();
        let mask: Vec<i64> = (0..7 * 3).map(|i| i64::from(i != 11)).collect();
        let mut inputs = vec![integers(&[7, 3], &ids), integers(&[7, 3], &mask)];
        if config.token_type_ids {
            inputs.push(integers(&[7, 3], &mask));
        }
        let whole = run(&of(MAX_ELEMENTS), &[&inputs]).unwrap();
        // The answer's 7 rows of 3 tokens, 16 each, fit as well.
        let row = 3 * 24;
        for limit in [5 * row - 1, 5 * row, 7 * row] {
            let sliced = run(&of(limit), &[&inputs]).unwrap();
            for (sliced, whole) in sliced.iter().zip(&whole) {
                assert_eq!(sliced.shape(), whole.shape());
                let (sliced, whole) = (sliced.to_vec::<f32>().unwrap(), whole.to_vec::<f32>().unwrap());
                assert!(sliced.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5), "{name}: {sliced:?} {whole:?}");
            }
        }
        assert_eq!(
            blamed(run(&of(row - 1), &[&inputs])),
            "input \"input_ids\" has 3 tokens in a row: a row needs a tensor of 72 elements, expected at most 71"
        );
    }
}

#[test]
fn the_largest_tensor_of_a_row_is_the_scores_or_a_layer() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/safetensors/encoders/bert/1");
    let description = Description::read(&folder, &Declared::Encoder(EncoderConfig::default())).unwrap();
    let Architecture::Encoder(mut base) = description.architecture else { panic!() };
    (base.heads, base.hidden, base.intermediate) = (12, 768, 3072);
    assert_eq!(base.row_elements(512), 12 * 512 * 512);
    assert_eq!(base.row_elements(8), 8 * 3072);
    base.intermediate = 5;
    assert_eq!(base.row_elements(8), 8 * 768);
}
