//! Writes small ONNX models for tests.

use bytes::Bytes;
use prost::Message;

use super::proto::*;

pub(crate) const FLOAT: i32 = 1;
pub(crate) const INT64: i32 = 7;
pub(crate) const STRING: i32 = 8;
pub(crate) const BOOL: i32 = 9;

/// A model under construction: operator set 17, ai.onnx.ml 3.
#[derive(Clone)]
pub(crate) struct Model {
    pub(in crate::backend::onnx) proto: ModelProto,
}

/// An attribute for [`Model::call`].
#[derive(Clone)]
pub(crate) struct Attribute(pub(in crate::backend::onnx) AttributeProto);

/// The main graph of a model, for an attribute.
#[derive(Clone)]
pub(crate) struct Graph(GraphProto);

impl Model {
    pub fn new() -> Model {
        Model::of(Graph(GraphProto { name: "test".into(), ..Default::default() }))
    }

    pub fn of(graph: Graph) -> Model {
        Model {
            proto: ModelProto {
                ir_version: 8,
                producer_name: "test".into(),
                producer_version: "1".into(),
                graph: Some(graph.0),
                opset_import: vec![
                    OperatorSetIdProto { domain: "".into(), version: 17 },
                    OperatorSetIdProto { domain: "ai.onnx.ml".into(), version: 3 },
                ],
                ..Default::default()
            },
        }
    }

    pub fn opset(mut self, version: i64) -> Model {
        self.proto.opset_import[0].version = version;
        self
    }

    fn edit(mut self, edit: impl FnOnce(&mut GraphProto)) -> Model {
        edit(self.proto.graph.as_mut().unwrap());
        self
    }

    /// Dimensions: a number is fixed, "" is free, anything else is a symbol.
    pub fn input(self, name: &str, kind: i32, dims: &[&str]) -> Model {
        self.edit(|graph| graph.input.push(info(name, kind, Some(dims))))
    }

    /// An input that does not say even its rank.
    pub fn untyped_shape_input(self, name: &str, kind: i32) -> Model {
        self.edit(|graph| graph.input.push(info(name, kind, None)))
    }

    pub fn output(self, name: &str, kind: i32, dims: &[&str]) -> Model {
        self.edit(|graph| graph.output.push(info(name, kind, Some(dims))))
    }

    pub fn untyped_shape_output(self, name: &str, kind: i32) -> Model {
        self.edit(|graph| graph.output.push(info(name, kind, None)))
    }

    pub fn value(self, name: &str, kind: i32, dims: &[&str]) -> Model {
        self.edit(|graph| graph.value_info.push(info(name, kind, Some(dims))))
    }

    pub fn sequence_output(self, name: &str) -> Model {
        let value = Some(type_proto::Value::SequenceType(type_proto::Opaque {}));
        let info = ValueInfoProto { name: name.into(), r#type: Some(TypeProto { value }) };
        self.edit(|graph| graph.output.push(info))
    }

    pub fn weights(self, name: &str, dims: &[i64], values: &[f32]) -> Model {
        self.initializer(name, FLOAT, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    pub fn integers(self, name: &str, dims: &[i64], values: &[i64]) -> Model {
        self.initializer(name, INT64, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    pub fn initializer(self, name: &str, kind: i32, dims: &[i64], raw: Vec<u8>) -> Model {
        let (name, dims) = (name.into(), dims.to_vec());
        let tensor = TensorProto { name, dims, data_type: kind, raw_data: raw.into(), ..Default::default() };
        self.edit(|graph| graph.initializer.push(tensor))
    }

    /// Three floats in another file.
    pub fn external(self, name: &str, entries: &[(&str, &str)]) -> Model {
        let external_data = entries
            .iter()
            .map(|(key, value)| StringStringEntryProto { key: key.to_string(), value: value.to_string() })
            .collect();
        let (name, dims) = (name.into(), vec![3]);
        let tensor =
            TensorProto { name, dims, data_type: FLOAT, data_location: 1, external_data, ..Default::default() };
        self.edit(|graph| graph.initializer.push(tensor))
    }

    pub fn node(self, operator: &str, inputs: &[&str], outputs: &[&str]) -> Model {
        self.call("", operator, inputs, outputs, Vec::new())
    }

    pub fn call(
        self,
        domain: &str,
        operator: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<Attribute>,
    ) -> Model {
        let node = NodeProto {
            input: inputs.iter().map(|name| name.to_string()).collect(),
            output: outputs.iter().map(|name| name.to_string()).collect(),
            op_type: operator.into(),
            domain: domain.into(),
            attribute: attributes.into_iter().map(|attribute| attribute.0).collect(),
            ..Default::default()
        };
        self.edit(|graph| graph.node.push(node))
    }

    /// A local function without a signature, of one node.
    pub fn function(mut self, domain: &str, name: &str, operator: &str) -> Model {
        let node = NodeProto { op_type: operator.into(), ..Default::default() };
        let function =
            FunctionProto { domain: domain.into(), name: name.into(), node: vec![node], ..Default::default() };
        self.proto.functions.push(function);
        self
    }

    pub fn graph(self) -> Graph {
        Graph(self.proto.graph.unwrap())
    }

    pub fn bytes(&self) -> Bytes {
        self.proto.encode_to_vec().into()
    }
}

fn info(name: &str, kind: i32, dims: Option<&[&str]>) -> ValueInfoProto {
    use tensor_shape_proto::dimension::Value;
    let dim = |text: &&str| tensor_shape_proto::Dimension {
        value: match text.parse::<i64>() {
            Ok(n) => Some(Value::DimValue(n)),
            Err(_) if text.is_empty() => None,
            Err(_) => Some(Value::DimParam(text.to_string())),
        },
    };
    let shape = dims.map(|dims| TensorShapeProto { dim: dims.iter().map(dim).collect() });
    let tensor = type_proto::Tensor { elem_type: kind, shape };
    let kind = TypeProto { value: Some(type_proto::Value::TensorType(tensor)) };
    ValueInfoProto { name: name.into(), r#type: Some(kind) }
}

fn attribute(name: &str, kind: i32) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: kind, ..Default::default() }
}

pub(crate) fn integer(name: &str, i: i64) -> Attribute {
    Attribute(AttributeProto { i, ..attribute(name, 2) })
}

pub(crate) fn float(name: &str, f: f32) -> Attribute {
    Attribute(AttributeProto { f, ..attribute(name, 1) })
}

pub(crate) fn integers(name: &str, ints: &[i64]) -> Attribute {
    Attribute(AttributeProto { ints: ints.to_vec(), ..attribute(name, 7) })
}

pub(crate) fn floats(name: &str, floats: &[f32]) -> Attribute {
    Attribute(AttributeProto { floats: floats.to_vec(), ..attribute(name, 6) })
}

pub(crate) fn text(name: &str, s: &str) -> Attribute {
    Attribute(AttributeProto { s: Bytes::copy_from_slice(s.as_bytes()), ..attribute(name, 3) })
}

pub(crate) fn graph(name: &str, graph: Graph) -> Attribute {
    Attribute(AttributeProto { g: Some(graph.0), ..attribute(name, 5) })
}

/// The attribute `value` of a Constant: the model's first initialiser.
pub(crate) fn tensor(model: Model) -> Attribute {
    let t = model.graph().0.initializer.into_iter().next();
    Attribute(AttributeProto { t, ..attribute("value", 4) })
}
