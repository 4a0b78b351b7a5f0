//! `--input` arguments to tensors, by the signature of the model: datatype, and what the shape leaves out.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::request::Input;
use super::{ModelMetadata, TensorMetadata};
use super::{elements, npy, read_file};
use crate::error::visible;
use crate::tensor::json::{Data, NotFinite};
use crate::tensor::{DataType, Dim, Shape, Tensor, TensorSpec};

/// An argument, its file read.
#[derive(Debug)]
pub(in crate::cli) struct Given {
    name: Option<String>,
    value: Vec<u8>,
}

impl Given {
    /// A file for the model's only input.
    pub(in crate::cli) fn file(path: &Path) -> Result<Given> {
        Ok(Given { name: None, value: read_file(path)? })
    }

    /// `[NAME=]VALUE`. What begins like JSON or a file has no name.
    pub(in crate::cli) fn parse(text: &str) -> Result<Given> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) if !name.starts_with(['[', '{', '"', '@']) => (Some(name.to_string()), value),
            _ => (None, text),
        };
        let value = match value.strip_prefix('@') {
            Some(file) => read_file(Path::new(file))?,
            None => value.as_bytes().to_vec(),
        };
        Ok(Given { name, value })
    }
}

/// One tensor for each argument. Whether all inputs are there is the server's to say: some may be optional.
pub(in crate::cli) fn tensors(given: Vec<Given>, model: &ModelMetadata) -> Result<Vec<Input>> {
    let mut inputs: Vec<Input> = Vec::with_capacity(given.len());
    for Given { name, value } in given {
        let metadata = named(name.as_deref(), model)?;
        let shown = visible(&metadata.name);
        if inputs.iter().any(|input| input.name == metadata.name) {
            bail!("input `{shown}` is given twice, expected once");
        }
        let tensor = tensor(value, &metadata.spec()?).with_context(|| format!("input `{shown}`"))?;
        inputs.push(Input { name: metadata.name.clone(), tensor, parameters: Default::default() });
    }
    Ok(inputs)
}

fn named<'a>(name: Option<&str>, model: &'a ModelMetadata) -> Result<&'a TensorMetadata> {
    let expected = || {
        let names: Vec<String> = model.inputs.iter().map(|input| format!("`{}`", visible(&input.name))).collect();
        names.join(", ")
    };
    match (name, &model.inputs[..]) {
        (Some(name), inputs) => inputs
            .iter()
            .find(|input| input.name == name)
            .ok_or_else(|| anyhow!("the model has no input `{}`, expected {}", visible(name), expected())),
        (None, [only]) => Ok(only),
        (None, inputs) => {
            bail!("an input has no name and the model takes {}: {}; expected NAME=VALUE", inputs.len(), expected())
        }
    }
}

fn tensor(value: Vec<u8>, spec: &TensorSpec) -> Result<Tensor> {
    let read = if npy::is_npy(&value) {
        let tensor = npy::read(value.into())?;
        let found = tensor.dtype();
        elements::converted(tensor, spec.dtype).with_context(|| format!("a {found} array, expected {}", spec.dtype))?
    } else {
        literal(value, spec.dtype)?
    };
    fitted(read, spec)
}

/// JSON of any shape, or an element of bytes that are not JSON.
fn literal(value: Vec<u8>, dtype: DataType) -> Result<Tensor> {
    let json = std::str::from_utf8(&value).map_err(anyhow::Error::from);
    let json = json.and_then(|text| serde_json::from_str::<IgnoredAny>(text).map(|_| text.trim()).map_err(Into::into));
    match json {
        Ok(text) => read_json(text, dtype),
        Err(_) if dtype == DataType::Bytes => Ok(Tensor::from_strings(Shape::scalar(), [value])?),
        Err(error) => Err(error.context(format!("neither JSON nor a .npy file, expected {dtype} elements"))),
    }
}

fn read_json(text: &str, dtype: DataType) -> Result<Tensor> {
    let dims = extents(text)?;
    let scalar = dims.is_empty();
    // Elements are read from an array, of which a lone one has none around it.
    let wrapped = if scalar { format!("[{text}]") } else { String::new() };
    let shape = Shape::new(dims)?;
    let data = Data::new(dtype, shape, if scalar { &wrapped } else { text });
    Ok(data.and_then(|data| data.read(NotFinite::Named))?)
}

/// How long the arrays are, followed by the first of each; that the others agree is found when they are read.
fn extents(mut text: &str) -> Result<Vec<usize>> {
    let mut dims = Vec::new();
    while text.starts_with('[') {
        let items: Vec<&RawValue> = serde_json::from_str(text)?;
        dims.push(items.len());
        match items.first() {
            Some(first) => text = first.get(),
            None => break,
        }
    }
    Ok(dims)
}

/// The tensor under a shape that the signature accepts: as it is, with leading dimensions of 1 added, or, for a flat
/// list, the only shape that follows from its length.
fn fitted(tensor: Tensor, spec: &TensorSpec) -> Result<Tensor> {
    if spec.accepts(tensor.shape()) {
        return Ok(tensor);
    }
    let dims = spec.dims.as_deref().unwrap_or_default();
    let shapes = [with_leading_ones(tensor.shape(), dims), unflattened(tensor.shape(), dims)];
    match shapes.into_iter().flatten().find(|shape| spec.accepts(shape)) {
        Some(shape) => Ok(tensor.reshaped(shape)?),
        None => {
            let expected = crate::tensor::wire_shape(&spec.to_wire());
            bail!("its shape is {}, expected {expected}", tensor.shape())
        }
    }
}

fn with_leading_ones(shape: &Shape, dims: &[Dim]) -> Option<Shape> {
    let missing = dims.len().checked_sub(shape.rank())?;
    Shape::new([vec![1; missing], shape.dims().to_vec()].concat()).ok()
}

/// As for a raw request: at most one free dimension, or two of which the leading one is then 1.
fn unflattened(shape: &Shape, dims: &[Dim]) -> Option<Shape> {
    let [elements] = shape.dims() else { return None };
    let free: Vec<usize> = (0..dims.len()).filter(|at| dims[*at].is_free()).collect();
    let open = match free[..] {
        [] => None,
        [only] => Some(only),
        [0, other] => Some(other),
        _ => return None,
    };
    let mut found: Vec<usize> = dims.iter().map(|dim| if let Dim::Fixed(n) = dim { *n } else { 1 }).collect();
    if let Some(open) = open {
        found[open] = elements.checked_div(Shape::new(found.clone()).ok()?.elements())?;
    }
    Shape::new(found).ok().filter(|found| found.elements() == *elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(name: &str, datatype: &str, shape: &[i64]) -> TensorMetadata {
        TensorMetadata { name: name.into(), datatype: datatype.into(), shape: shape.to_vec() }
    }

    fn read(value: impl AsRef<[u8]>, datatype: &str, shape: &[i64]) -> Result<Tensor> {
        tensor(value.as_ref().to_vec(), &metadata("x", datatype, shape).spec()?)
    }

    fn refused(value: impl AsRef<[u8]>, datatype: &str, shape: &[i64]) -> String {
        format!("{:#}", read(value, datatype, shape).unwrap_err())
    }

    #[test]
    fn shapes_are_completed_where_one_fits() {
        for (text, shape, expected) in [
            ("[[1,2],[3,4]]", &[-1, 2][..], &[2, 2][..]),
            ("[1,2]", &[-1, 2], &[1, 2]),
            ("[1,2,3,4]", &[-1, 2], &[2, 2]),
            ("[1,2,3,4]", &[-1, 2, 2], &[1, 2, 2]),
            ("[[1,2],[3,4]]", &[-1, 2, 2], &[1, 2, 2]),
            ("[1,2,3]", &[-1, -1], &[1, 3]),
            ("[1,2,3,4]", &[-1, -1, 2], &[1, 2, 2]),
            ("[1,2,3,4]", &[2, 2], &[2, 2]),
            ("[1,2]", &[1, 2], &[1, 2]),
            (" 5 ", &[-1, 1], &[1, 1]),
            ("-5", &[], &[]),
            ("[]", &[-1, 2], &[0, 2]),
            ("[[[1]]]", &[-1, -1, -1], &[1, 1, 1]),
        ] {
            let tensor = read(text, "FP32", shape).unwrap_or_else(|error| panic!("{text} {shape:?}: {error:#}"));
            assert_eq!(tensor.shape().dims(), expected, "{text} {shape:?}");
        }
    }

    #[test]
    fn a_shape_that_does_not_fit_says_what_would() {
        for (text, shape, expected) in [
            ("[1,2,3]", &[-1, 2][..], "its shape is [3], expected [-1,2]"),
            ("[[1,2,3]]", &[-1, 2], "its shape is [1,3], expected [-1,2]"),
            ("[1,2,3,4]", &[-1, 2, -1, -1], "its shape is [4], expected [-1,2,-1,-1]"),
            ("[[[1]]]", &[-1, 1], "its shape is [1,1,1], expected [-1,1]"),
            ("[1]", &[0, -1], "its shape is [1], expected [0,-1]"),
            ("[[1,2],[3]]", &[-1, 2], "`data` does not have the shape [2,2], expected its elements flat or nested"),
        ] {
            assert_eq!(refused(text, "FP32", shape), expected, "{text}");
        }
    }

    #[test]
    fn elements_are_read_as_the_server_reads_them() {
        assert_eq!(read("[1e2, 2.0]", "INT64", &[-1]).unwrap().to_vec::<i64>(), Some(vec![100, 2]));
        assert!(read(r#"["NaN"]"#, "FP32", &[-1]).unwrap().to_vec::<f32>().unwrap()[0].is_nan());
        assert_eq!(refused("[1.5]", "INT8", &[-1]), "element 0 is a number with a fraction, expected INT8");
        assert_eq!(refused("[\"a\"]", "INT8", &[-1]), "element 0 is a string, expected INT8");
        assert!(refused("[1,", "INT8", &[-1]).starts_with("neither JSON nor a .npy file, expected INT8 elements: EOF"));
        assert!(refused([0xff], "INT8", &[-1]).starts_with("neither JSON nor a .npy file"));
    }

    #[test]
    fn bytes_take_text_and_any_file() {
        let strings = |value: &[u8]| -> Vec<Vec<u8>> {
            read(value, "BYTES", &[-1, 1]).unwrap().strings().map(<[u8]>::to_vec).collect()
        };
        assert_eq!(strings(b"great movie"), [b"great movie"]);
        assert_eq!(strings(b"\xff\xd8\xff"), [b"\xff\xd8\xff"]);
        assert_eq!(strings(br#"["a","b"]"#), [b"a", b"b"]);
        assert_eq!(strings(br#""[1]""#), [b"[1]"]);
        assert_eq!(refused("5", "BYTES", &[-1, 1]), "element 0 is a number, expected a string");
    }

    #[test]
    fn arrays_are_converted_to_the_models_datatype() {
        let array = |descr: &str, data: &[u8]| npy::tests::file(descr, "(2,)", data);
        let float64 = array("<f8", &[0.1f64.to_le_bytes(), 2f64.to_le_bytes()].concat());
        assert_eq!(read(&float64, "FP32", &[-1, 2]).unwrap().to_vec::<f32>(), Some(vec![0.1, 2.0]));
        assert_eq!(
            refused(&float64, "INT64", &[-1, 2]),
            "a FP64 array, expected INT64: element 0 is a number with a fraction, expected INT64"
        );
        assert_eq!(refused(&float64, "FP64", &[-1, 3]), "its shape is [2], expected [-1,3]");
    }

    #[test]
    fn arguments_name_an_input_or_the_only_one() {
        let model = |names: &[&str]| ModelMetadata {
            inputs: names.iter().map(|name| metadata(name, "FP32", &[-1])).collect(),
            ..Default::default()
        };
        let names = |arguments: &[&str], model: &ModelMetadata| -> Result<Vec<String>> {
            let given = arguments.iter().map(|text| Given::parse(text)).collect::<Result<_>>()?;
            Ok(tensors(given, model)?.into_iter().map(|input| input.name).collect())
        };
        assert_eq!(names(&["[1]"], &model(&["a"])).unwrap(), ["a"]);
        assert_eq!(names(&["b=[1]", "a=1"], &model(&["a", "b"])).unwrap(), ["b", "a"]);
        let error = |arguments: &[&str], model: &ModelMetadata| names(arguments, model).unwrap_err().to_string();
        assert_eq!(error(&["c=[1]"], &model(&["a", "b"])), "the model has no input `c`, expected `a`, `b`");
        assert_eq!(
            error(&["[1]"], &model(&["a", "b"])),
            "an input has no name and the model takes 2: `a`, `b`; expected NAME=VALUE"
        );
        assert_eq!(error(&["a=1", "2"], &model(&["a"])), "input `a` is given twice, expected once");
        assert!(error(&["a=@/nowhere.npy"], &model(&["a"])).contains("/nowhere.npy"));
    }
}
