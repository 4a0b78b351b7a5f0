//! A graph's declared inputs and outputs as a [`Signature`].

use std::collections::HashSet;
use std::sync::Arc;

use super::bad;
use super::proto::tensor_shape_proto::dimension;
use super::proto::type_proto::{self, Value};
use super::proto::{GraphProto, ValueInfoProto};
use crate::backend::LoadError;
use crate::error::quoted;
use crate::tensor::{DataType, Dim, MAX_RANK, Signature, TensorSpec};

/// The signature, and the names of outputs that are not tensors.
pub(super) fn read(graph: &GraphProto) -> Result<(Signature, Vec<String>), LoadError> {
    let initialized: HashSet<&str> = graph
        .initializer
        .iter()
        .chain(graph.sparse_initializer.iter().filter_map(|sparse| sparse.values.as_ref()))
        .map(|tensor| tensor.name.as_str())
        .collect();
    let inputs = graph
        .input
        .iter()
        .filter(|info| !initialized.contains(info.name.as_str()))
        .map(|info| match value(info, "input")? {
            Value::TensorType(tensor) => spec(info, tensor, "input"),
            other => Err(bad(format!("input {:?} is {}, expected a tensor", quoted(&info.name), called(other)))),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut outputs = Vec::new();
    let mut omitted = Vec::new();
    for info in &graph.output {
        match value(info, "output")? {
            Value::TensorType(tensor) => outputs.push(spec(info, tensor, "output")?),
            _ => omitted.push(info.name.clone()),
        }
    }
    if outputs.is_empty() {
        return Err(bad("the model has no output that is a tensor"));
    }
    unique(&inputs, "input")?;
    unique(&outputs, "output")?;
    Ok((Signature { inputs, outputs }, omitted))
}

/// Tensors are found by name: two of one name could not be told apart.
fn unique(specs: &[TensorSpec], what: &str) -> Result<(), LoadError> {
    let mut seen = HashSet::new();
    match specs.iter().find(|spec| !seen.insert(&spec.name)) {
        Some(spec) => Err(bad(format!("two {what}s are called {:?}", quoted(&spec.name)))),
        None => Ok(()),
    }
}

fn value<'a>(info: &'a ValueInfoProto, what: &str) -> Result<&'a Value, LoadError> {
    if info.name.is_empty() {
        return Err(bad(format!("an {what} has no name")));
    }
    let value = info.r#type.as_ref().and_then(|kind| kind.value.as_ref());
    value.ok_or_else(|| bad(format!("{what} {:?} has no type", quoted(&info.name))))
}

fn called(value: &Value) -> &'static str {
    match value {
        Value::TensorType(_) => "a tensor",
        Value::SequenceType(_) => "a sequence",
        Value::MapType(_) => "a map",
        Value::OpaqueType(_) => "an opaque value",
        Value::SparseTensorType(_) => "a sparse tensor",
        Value::OptionalType(_) => "an optional value",
    }
}

fn spec(info: &ValueInfoProto, tensor: &type_proto::Tensor, what: &str) -> Result<TensorSpec, LoadError> {
    let dtype = dtype(tensor.elem_type).map_err(|found| {
        bad(format!("{what} {:?} has the element type {found}, which the protocol cannot carry", quoted(&info.name)))
    })?;
    let dims = dims(tensor);
    if let Some(rank) = dims.as_ref().map(Vec::len).filter(|rank| *rank > MAX_RANK) {
        let name = quoted(&info.name);
        return Err(bad(format!("{what} {name:?} has {rank} dimensions, expected at most {MAX_RANK}")));
    }
    Ok(TensorSpec { name: info.name.as_str().into(), dtype, dims })
}

/// Declared dimensions; `None` where not even the rank is. A dimension that is negative, empty or not given is free.
pub(super) fn dims(tensor: &type_proto::Tensor) -> Option<Vec<Dim>> {
    let shape = tensor.shape.as_ref()?;
    let dim = |dim: &super::proto::tensor_shape_proto::Dimension| match &dim.value {
        Some(dimension::Value::DimValue(n)) => usize::try_from(*n).map_or(Dim::Free(None), Dim::Fixed),
        Some(dimension::Value::DimParam(symbol)) if !symbol.is_empty() => Dim::Free(Some(Arc::from(symbol.as_str()))),
        Some(dimension::Value::DimParam(_)) | None => Dim::Free(None),
    };
    Some(shape.dim.iter().map(dim).collect())
}

/// The datatype of an ONNX element type; the name of a type that the protocol does not have.
fn dtype(number: i32) -> Result<DataType, String> {
    Ok(match number {
        1 => DataType::Fp32,
        2 => DataType::Uint8,
        3 => DataType::Int8,
        4 => DataType::Uint16,
        5 => DataType::Int16,
        6 => DataType::Int32,
        7 => DataType::Int64,
        8 => DataType::Bytes,
        9 => DataType::Bool,
        10 => DataType::Fp16,
        11 => DataType::Fp64,
        12 => DataType::Uint32,
        13 => DataType::Uint64,
        16 => DataType::Bf16,
        other => return Err(unsupported(other)),
    })
}

fn unsupported(number: i32) -> String {
    let name = match number {
        14 => "COMPLEX64",
        15 => "COMPLEX128",
        17 => "FLOAT8E4M3FN",
        18 => "FLOAT8E4M3FNUZ",
        19 => "FLOAT8E5M2",
        20 => "FLOAT8E5M2FNUZ",
        21 => "UINT4",
        22 => "INT4",
        23 => "FLOAT4E2M1",
        24 => "FLOAT8E8M0",
        25 => "UINT2",
        26 => "INT2",
        27 => "FLOAT6E2M3",
        28 => "FLOAT6E3M2",
        other => return format!("number {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use crate::backend::onnx::Description;
    use crate::backend::onnx::build::{FLOAT, Model};
    use crate::tensor::{DataType, Dim};

    fn error(model: Model) -> String {
        Description::read(model.bytes()).unwrap_err().to_string()
    }

    #[test]
    fn dimensions_are_fixed_named_free_or_unknown() {
        let model = Model::new()
            .input("x", FLOAT, &["batch", "3", "", "-1"])
            .input("scalar", FLOAT, &[])
            .untyped_shape_input("any", FLOAT)
            .node("Identity", &["x"], &["y"])
            .untyped_shape_output("y", FLOAT);
        let signature = Description::read(model.bytes()).unwrap().signature;
        let free = Dim::Free(None);
        let expected = vec![Dim::Free(Some("batch".into())), Dim::Fixed(3), free.clone(), free];
        assert_eq!(signature.inputs[0].dims, Some(expected));
        assert_eq!(signature.inputs[1].dims, Some(vec![]));
        assert_eq!((&signature.inputs[2].dims, &signature.outputs[0].dims), (&None, &None));
    }

    #[test]
    fn every_datatype_is_mapped_and_the_rest_refused_by_name() {
        let identity = |kind| Model::new().input("x", kind, &["n"]).node("Identity", &["x"], &["y"]);
        let found: Vec<DataType> = [9, 2, 4, 12, 13, 3, 5, 6, 7, 10, 16, 1, 11, 8]
            .into_iter()
            .map(|kind| {
                let model = identity(kind).output("y", kind, &["n"]);
                Description::read(model.bytes()).unwrap().signature.outputs[0].dtype
            })
            .collect();
        assert_eq!(found, DataType::ALL);
        let text = error(identity(15).output("y", 15, &["n"]));
        assert_eq!(text, "input \"x\" has the element type COMPLEX128, which the protocol cannot carry");
        let text = error(identity(1).output("y", 22, &["n"]));
        assert_eq!(text, "output \"y\" has the element type INT4, which the protocol cannot carry");
        assert!(error(identity(1).output("y", 99, &["n"])).contains("number 99"));
    }

    #[test]
    fn initialisers_are_no_inputs() {
        let model = Model::new()
            .input("x", FLOAT, &["n"])
            .input("w", FLOAT, &["1"])
            .weights("w", &[1], &[2.0])
            .node("Mul", &["x", "w"], &["y"])
            .output("y", FLOAT, &["n"]);
        let signature = Description::read(model.bytes()).unwrap().signature;
        assert_eq!(signature.inputs.len(), 1);
        assert_eq!(&*signature.inputs[0].name, "x");
    }

    #[test]
    fn unusable_signatures_are_refused() {
        let x = || Model::new().input("x", FLOAT, &["n"]);
        assert_eq!(error(x().sequence_output("maps")), "the model has no output that is a tensor");
        let y = |model: Model| model.output("y", FLOAT, &["n"]);
        assert_eq!(error(y(x().input("x", FLOAT, &["n"]))), "two inputs are called \"x\"");
        assert_eq!(error(y(y(x()))), "two outputs are called \"y\"");
        assert_eq!(error(x().output("", FLOAT, &[])), "an output has no name");
        assert_eq!(error(x().output("y", FLOAT, &["1"; 17])), "output \"y\" has 17 dimensions, expected at most 16");
        let mut untyped = y(x());
        untyped.proto.graph.as_mut().unwrap().output[0].r#type = None;
        assert_eq!(error(untyped), "output \"y\" has no type");
    }
}
