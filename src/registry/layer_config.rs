//! The `[[layers]]` of `model.toml`: the classes of `torch.nn` with their arguments, under PyTorch's names and with
//! PyTorch's defaults.

use toml::Value;

use super::model_config::Section;
use crate::backend::safetensors::layers::{Activation, Axes, Conv, Kind, Layer, MAX_LAYERS, Pool, Pooled, Sequential};
use crate::problem::expected_name;
use crate::tensor::{DataType, Dim, TensorSpec};

/// The largest extent, number of features and step.
const MAX_SIZE: i64 = 1 << 24;
/// The most dimensions of an input or of what an axis is split into.
const MAX_RANK: usize = 8;
const DEFAULT_OUTPUT: &str = "output";
const DEFAULT_EPS: f64 = 1e-5;

/// Every class that `type` may name.
const TYPES: [&str; 33] = [
    "Linear",
    "Conv1d",
    "Conv2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "LayerNorm",
    "MaxPool1d",
    "MaxPool2d",
    "AvgPool1d",
    "AvgPool2d",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "Embedding",
    "Flatten",
    "Unflatten",
    "Softmax",
    "LogSoftmax",
    "ReLU",
    "ReLU6",
    "LeakyReLU",
    "ELU",
    "GELU",
    "SiLU",
    "Mish",
    "Sigmoid",
    "Hardsigmoid",
    "Hardswish",
    "Tanh",
    "Softplus",
    "Identity",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
];

/// `input`, `output`, `prefix` and `[[layers]]`; `None` where there are none, or a problem was found.
pub fn read(top: &mut Section) -> Option<Sequential> {
    let input = top.section("input", read_input);
    let output = top.read("output", "a name", name);
    let prefix = top.read("prefix", "text", |value| value.as_str().map(str::to_string));
    let Some(tables) = top.tables("layers") else {
        for (key, there) in [("input", input.is_some()), ("output", output.is_some()), ("prefix", prefix.is_some())] {
            if there {
                top.problem(key, "no [[layers]]".into(), "layers for it".into());
            }
        }
        return None;
    };
    if !(1..=MAX_LAYERS).contains(&tables.len()) {
        top.problem("layers", format!("{} layers", tables.len()), format!("1 to {MAX_LAYERS}"));
        return None;
    }
    let prefix = prefix.unwrap_or_default();
    let layers = tables.into_iter().enumerate().map(|(i, section)| read_layer(section, i, &prefix));
    // Not one after the other: every layer's problems are told.
    let layers: Vec<Option<Layer>> = layers.collect();
    if input.is_none() {
        top.problem("input", "nothing".into(), "a table of name, datatype and shape".into());
    }
    let layers = layers.into_iter().collect::<Option<Vec<_>>>()?;
    Some(Sequential { input: input??, output: output.unwrap_or_else(|| DEFAULT_OUTPUT.into()).into(), layers })
}

fn name(value: &Value) -> Option<String> {
    value.as_str().filter(|name| !name.is_empty() && !name.chars().any(char::is_control)).map(str::to_string)
}

fn read_input(section: &mut Section) -> Option<TensorSpec> {
    let name = needed(section, "name", "a name", name);
    let dtype = needed(section, "datatype", "\"FP32\", \"INT64\" or \"INT32\"", |value| {
        DataType::parse(value.as_str()?)
            .filter(|dtype| [DataType::Fp32, DataType::Int64, DataType::Int32].contains(dtype))
    });
    let dims = needed(section, "shape", "a list of whole numbers, -1 first for the batch", read_shape);
    Some(TensorSpec { name: name?.into(), dtype: dtype?, dims: Some(dims?) })
}

fn read_shape(value: &Value) -> Option<Vec<Dim>> {
    let extent = |(axis, value): (usize, &Value)| match value.as_integer()? {
        -1 if axis == 0 => Some(Dim::Free(Some("batch".into()))),
        -1 => Some(Dim::Free(None)),
        extent if (1..=MAX_SIZE).contains(&extent) => usize::try_from(extent).ok().map(Dim::Fixed),
        _ => None,
    };
    let extents = value.as_array().filter(|extents| (1..=MAX_RANK).contains(&extents.len()))?;
    extents.iter().enumerate().map(extent).collect()
}

/// A key that must be there.
fn needed<T>(section: &mut Section, key: &str, expected: &str, read: impl FnOnce(&Value) -> Option<T>) -> Option<T> {
    let mut there = false;
    let value = section.read(key, expected, |value| {
        there = true;
        read(value)
    });
    if !there {
        section.problem(key, "nothing".into(), expected.to_string());
    }
    value
}

fn read_layer(mut section: Section, position: usize, prefix: &str) -> Option<Layer> {
    let key = section.read("key", "the name before .weight and .bias", name).unwrap_or_else(|| position.to_string());
    let expected = "the name of a class of torch.nn";
    let class = needed(&mut section, "type", expected, |value| value.as_str().map(str::to_string));
    let Some(class) = class else {
        // Nothing is known of the other keys.
        return None;
    };
    let Some(known) = TYPES.into_iter().find(|known| *known == class) else {
        section.problem("type", format!("\"{}\"", crate::error::quoted(&class)), expected_name(&class, &TYPES));
        return None;
    };
    let kind = read_kind(&mut section, known);
    section.finish();
    Some(Layer { key: format!("{prefix}{key}"), kind: kind? })
}

fn read_kind(section: &mut Section, class: &str) -> Option<Kind> {
    let activation = |activation| Some(Kind::Activation(activation));
    match class {
        "Linear" => {
            let (inputs, outputs) = (section.count("in_features", MAX_SIZE), size(section, "out_features"));
            let bias = switch(section, "bias", true);
            Some(Kind::Linear { inputs, outputs: outputs?, bias })
        }
        "Conv1d" => read_conv(section, Axes::One),
        "Conv2d" => read_conv(section, Axes::Two),
        "BatchNorm1d" | "BatchNorm2d" => {
            let axes = if class == "BatchNorm1d" { Axes::One } else { Axes::Two };
            let features = section.count("num_features", MAX_SIZE);
            Some(Kind::BatchNorm { axes, features, eps: eps(section), affine: switch(section, "affine", true) })
        }
        "LayerNorm" => {
            let shape = needed(section, "normalized_shape", "a whole number or a list of them", sizes);
            let affine = switch(section, "elementwise_affine", true);
            let bias = switch(section, "bias", true) && affine;
            Some(Kind::LayerNorm { shape: shape?, eps: eps(section), weight: affine, bias })
        }
        "MaxPool1d" | "AvgPool1d" => read_pool(section, Axes::One, class == "MaxPool1d"),
        "MaxPool2d" | "AvgPool2d" => read_pool(section, Axes::Two, class == "MaxPool2d"),
        "AdaptiveAvgPool1d" | "AdaptiveAvgPool2d" => {
            let axes = if class == "AdaptiveAvgPool1d" { Axes::One } else { Axes::Two };
            let expected = "1, the only size there is here";
            let one = |value: &Value| pair(value, axes, 1).filter(|sizes| *sizes == [1, 1]);
            needed(section, "output_size", expected, one).map(|_| Kind::GlobalAveragePool(axes))
        }
        "Embedding" => {
            let (rows, width) = (size(section, "num_embeddings"), size(section, "embedding_dim"));
            // Matters to training only: the weights of that row are what they are.
            section.read("padding_idx", "a whole number", Value::as_integer);
            Some(Kind::Embedding { rows: rows?, width: width? })
        }
        "Flatten" => {
            let (from, to) = (axis(section, "start_dim"), axis(section, "end_dim"));
            Some(Kind::Flatten { from: from.unwrap_or(1), to: to.unwrap_or(-1) })
        }
        "Unflatten" => {
            let axis = needed(section, "dim", AXIS, small);
            let sizes = needed(section, "unflattened_size", "a list of whole numbers", sizes);
            Some(Kind::Unflatten { axis: axis?, sizes: sizes? })
        }
        "Softmax" | "LogSoftmax" => {
            Some(Kind::Softmax { axis: needed(section, "dim", AXIS, small)?, log: class == "LogSoftmax" })
        }
        "LeakyReLU" => activation(Activation::LeakyRelu { slope: number(section, "negative_slope", 0.01) }),
        "ELU" => activation(Activation::Elu { alpha: number(section, "alpha", 1.0) }),
        "GELU" => {
            let tanh = section.read("approximate", "\"none\" or \"tanh\"", |value| match value.as_str()? {
                "none" => Some(false),
                "tanh" => Some(true),
                _ => None,
            });
            activation(if tanh == Some(true) { Activation::GeluTanh } else { Activation::Gelu })
        }
        "ReLU" => activation(Activation::Relu),
        "ReLU6" => activation(Activation::Relu6),
        "SiLU" => activation(Activation::Silu),
        "Mish" => activation(Activation::Mish),
        "Sigmoid" => activation(Activation::Sigmoid),
        "Hardsigmoid" => activation(Activation::HardSigmoid),
        "Hardswish" => activation(Activation::HardSwish),
        "Tanh" => activation(Activation::Tanh),
        "Softplus" => activation(Activation::Softplus),
        // The rest does nothing outside training; how much it would drop is of no matter.
        _ => {
            if class != "Identity" {
                section.read("p", "a number", |value| value.as_float().or(value.as_integer().map(|n| n as f64)));
            }
            Some(Kind::Identity)
        }
    }
}

fn read_conv(section: &mut Section, axes: Axes) -> Option<Kind> {
    let (inputs, outputs) = (section.count("in_channels", MAX_SIZE), size(section, "out_channels"));
    let kernel = needed(section, "kernel_size", pair_form(axes), |value| pair(value, axes, 1));
    let stride = section.read("stride", pair_form(axes), |value| pair(value, axes, 1)).unwrap_or([1, 1]);
    let padding = section.read("padding", "whole numbers, \"same\" or \"valid\"", |value| match value.as_str() {
        Some("same") => Some(None),
        Some("valid") => Some(Some([0, 0])),
        Some(_) => None,
        None => Some(Some(over(axes, pair(value, axes, 0)?))),
    });
    let dilation = section.read("dilation", "a whole number, the same for both axes", |value| {
        let [first, second] = pair(value, axes, 1)?;
        (axes == Axes::One || first == second).then_some(second)
    });
    if padding == Some(None) && stride != [1, 1] {
        section.problem("padding", "\"same\" with a stride".into(), "\"same\" with a stride of 1".into());
    }
    let (groups, bias) = (section.count("groups", MAX_SIZE).unwrap_or(1), switch(section, "bias", true));
    Some(Kind::Conv(Conv {
        axes,
        inputs,
        outputs: outputs?,
        kernel: kernel?,
        stride,
        padding: padding.unwrap_or(Some([0, 0])),
        dilation: dilation.unwrap_or(1),
        groups,
        bias,
    }))
}

fn read_pool(section: &mut Section, axes: Axes, maximum: bool) -> Option<Kind> {
    let kernel = needed(section, "kernel_size", pair_form(axes), |value| pair(value, axes, 1));
    let stride = section.read("stride", pair_form(axes), |value| pair(value, axes, 1));
    let padding = section.read("padding", pair_form(axes), |value| pair(value, axes, 0));
    let padding = padding.map_or([0, 0], |padding| over(axes, padding));
    let ceil = switch(section, "ceil_mode", false);
    let of = if maximum {
        let dilation = section.read("dilation", pair_form(axes), |value| pair(value, axes, 1)).unwrap_or([1, 1]);
        Pooled::Maximum { dilation }
    } else {
        Pooled::Average { count_padding: switch(section, "count_include_pad", true) }
    };
    let (kernel, stride) = (kernel?, stride.or(kernel)?);
    if (0..2).any(|axis| 2 * padding[axis] > kernel[axis]) {
        section.problem("padding", format!("{padding:?}"), format!("at most half of the kernel's {kernel:?}"));
        return None;
    }
    Some(Kind::Pool(Pool { axes, kernel, stride, padding, ceil, of }))
}

const AXIS: &str = "an axis, from the end where negative";

fn small(value: &Value) -> Option<i64> {
    value.as_integer().filter(|axis| axis.unsigned_abs() <= 2 * MAX_RANK as u64)
}

fn axis(section: &mut Section, key: &str) -> Option<i64> {
    section.read(key, AXIS, small)
}

fn size(section: &mut Section, key: &str) -> Option<usize> {
    needed(section, key, &format!("a whole number from 1 to {MAX_SIZE}"), |value| whole(value, 1))
}

fn whole(value: &Value, least: i64) -> Option<usize> {
    value.as_integer().filter(|n| (least..=MAX_SIZE).contains(n)).and_then(|n| usize::try_from(n).ok())
}

fn sizes(value: &Value) -> Option<Vec<usize>> {
    match value.as_array() {
        None => whole(value, 1).map(|size| vec![size]),
        Some(sizes) if (1..=MAX_RANK).contains(&sizes.len()) => sizes.iter().map(|value| whole(value, 1)).collect(),
        Some(_) => None,
    }
}

fn pair_form(axes: Axes) -> &'static str {
    match axes {
        Axes::One => "a whole number",
        Axes::Two => "a whole number, or one for each axis",
    }
}

/// One number for all axes, or a list of one for each; an axis that is not there has 1.
fn pair(value: &Value, axes: Axes, least: i64) -> Option<[usize; 2]> {
    let given = match value.as_array() {
        Some(list) => list.iter().map(|value| whole(value, least)).collect::<Option<Vec<_>>>()?,
        None => vec![whole(value, least)?; axes.count()],
    };
    match (axes, &given[..]) {
        (Axes::One, [only]) => Some([1, *only]),
        (Axes::Two, [first, second]) => Some([*first, *second]),
        _ => None,
    }
}

/// Padding: an axis that is not there has none.
fn over(axes: Axes, padding: [usize; 2]) -> [usize; 2] {
    match axes {
        Axes::One => [0, padding[1]],
        Axes::Two => padding,
    }
}

fn switch(section: &mut Section, key: &str, default: bool) -> bool {
    section.read(key, "true or false", Value::as_bool).unwrap_or(default)
}

fn number(section: &mut Section, key: &str, default: f64) -> f64 {
    let finite = |value: &Value| value.as_float().or(value.as_integer().map(|n| n as f64)).filter(|n| n.is_finite());
    section.read(key, "a number", finite).unwrap_or(default)
}

fn eps(section: &mut Section) -> f64 {
    let positive = |value: &Value| value.as_float().or(value.as_integer().map(|n| n as f64)).filter(|n| *n >= 0.0);
    section.read("eps", "a number from 0 up", positive).unwrap_or(DEFAULT_EPS)
}

#[cfg(test)]
mod tests {
    use super::super::model_config::ModelConfig;
    use super::*;

    fn parse(layers: &str) -> Result<Sequential, String> {
        let text = format!("input = {{ name = \"x\", datatype = \"FP32\", shape = [-1, 4] }}\n{layers}");
        ModelConfig::parse(&text).map(|config| config.sequential.unwrap()).map_err(|problems| problems.to_string())
    }

    fn one(layer: &str) -> Result<Kind, String> {
        parse(&format!("[[layers]]\n{}", layer.replace("; ", "\n"))).map(|sequential| sequential.layers[0].kind.clone())
    }

    #[test]
    fn layers_have_pytorchs_defaults() {
        let sequential = parse(
            "output = \"y\"\nprefix = \"net.\"\n[[layers]]\ntype = \"Linear\"\nout_features = 3\n[[layers]]\n\
             type = \"ReLU\"\n[[layers]]\nkey = \"last\"\ntype = \"Linear\"\nin_features = 3\nout_features = 2\nbias = false",
        )
        .unwrap();
        assert_eq!((&*sequential.output, sequential.input.to_wire()), ("y", vec![-1, 4]));
        let keys: Vec<&str> = sequential.layers.iter().map(|layer| &*layer.key).collect();
        assert_eq!(keys, ["net.0", "net.1", "net.last"]);
        assert_eq!(sequential.layers[2].kind, Kind::Linear { inputs: Some(3), outputs: 2, bias: false });
        assert_eq!(parse("[[layers]]\ntype = \"Tanh\"").unwrap().output, "output".into());
        let Kind::Conv(conv) = one("type = \"Conv1d\"; out_channels = 2; kernel_size = 3").unwrap() else { panic!() };
        assert_eq!((conv.kernel, conv.stride, conv.padding, conv.dilation), ([1, 3], [1, 1], Some([0, 0]), 1));
        let Kind::Pool(pool) = one("type = \"MaxPool2d\"; kernel_size = [3, 2]").unwrap() else { panic!() };
        assert_eq!((pool.kernel, pool.stride, pool.padding), ([3, 2], [3, 2], [0, 0]));
        assert_eq!(one("type = \"Dropout\"; p = 0.5").unwrap(), Kind::Identity);
        assert_eq!(one("type = \"Flatten\"").unwrap(), Kind::Flatten { from: 1, to: -1 });
    }

    #[test]
    fn every_type_is_read() {
        for class in TYPES {
            if let Err(problem) = one(&format!("type = \"{class}\"")) {
                assert!(problem.contains("found nothing, expected"), "{class}: {problem}");
            }
        }
    }

    #[test]
    fn problems_name_their_layer() {
        let problem = |layer: &str| one(layer).unwrap_err();
        assert_eq!(
            problem("type = \"Lineer\""),
            "model.toml: `layers[0].type`: found \"Lineer\", expected `Linear`, perhaps"
        );
        assert!(problem("type = \"LSTM\"").contains("found \"LSTM\", expected "));
        assert!(problem("out_features = 3").contains("`layers[0].type`: found nothing"));
        assert!(problem("type = \"Linear\"; out_feature = 3").contains("expected `out_features`, perhaps"));
        assert!(problem("type = \"Conv2d\"; out_channels = 2; kernel_size = [1, 2, 3]").contains("kernel_size"));
        assert!(
            problem("type = \"Conv2d\"; out_channels = 2; kernel_size = 1; dilation = [1, 2]")
                .contains("same for both")
        );
        let same = "type = \"Conv2d\"; out_channels = 2; kernel_size = 1; padding = \"same\"; stride = 2";
        assert!(problem(same).contains("\"same\" with a stride of 1"));
        assert!(problem("type = \"MaxPool2d\"; kernel_size = 2; padding = 2").contains("at most half"));
        assert!(problem("type = \"AdaptiveAvgPool2d\"; output_size = 2").contains("the only size"));
        let lone = "type = \"MaxPool2d\"; padding = 1; ceil_mode = true; dilation = 2";
        assert_eq!(
            problem(lone),
            "model.toml: `layers[0].kernel_size`: found nothing, expected a whole number, or one for each axis"
        );
        let both = parse("[[layers]]\ntype = \"Softmax\"\n[[layers]]\ntype = \"Linear\"").unwrap_err();
        assert!(both.contains("`layers[0].dim`") && both.contains("`layers[1].out_features`"), "{both}");
        let lone = ModelConfig::parse("output = \"y\"").unwrap_err().to_string();
        assert_eq!(lone, "model.toml: `output`: found no [[layers]], expected layers for it");
        let without = ModelConfig::parse("[[layers]]\ntype = \"ReLU\"").unwrap_err().to_string();
        assert!(without.contains("`input`: found nothing"), "{without}");
        assert!(parse("[encoder]\n[[layers]]\ntype = \"ReLU\"").unwrap_err().contains("one or the other"));
        assert!(ModelConfig::parse("layers = 3").unwrap_err().to_string().contains("a list of tables"));
    }

    #[test]
    fn inputs_are_checked() {
        let problem =
            |input: &str| ModelConfig::parse(&format!("{input}\n[[layers]]\ntype = \"ReLU\"")).unwrap_err().to_string();
        assert!(problem("input = { name = \"x\", datatype = \"FP64\", shape = [-1] }").contains("\"FP32\", \"INT64\""));
        assert!(problem("input = { name = \"x\", datatype = \"FP32\", shape = [-1, 0] }").contains("input.shape"));
        assert!(problem("input = { name = \"x\", datatype = \"FP32\" }").contains("`input.shape`: found nothing"));
    }
}
