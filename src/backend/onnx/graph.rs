//! Indices over a decoded model and typed access to nodes' attributes.

use std::collections::{HashMap, HashSet, VecDeque};

use super::proto::type_proto::Value;
use super::proto::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, type_proto};

/// DataType numbers of the published format that are looked at one by one.
const BOOL: i32 = 9;
pub(super) const FLOAT16: i32 = 10;
const INT64: i32 = 7;
const INT32: i32 = 6;

/// A model's parts by name. Names of subgraphs share the tables with the main graph's: ONNX forbids shadowing, and a
/// file that does it anyway only makes a hint worse.
pub(super) struct Index<'a> {
    /// The main graph and every subgraph of every node, those in local functions too.
    pub graphs: Vec<&'a GraphProto>,
    /// Every node: the main graph's, local functions', subgraphs'.
    pub nodes: Vec<&'a NodeProto>,
    /// Version of the ai.onnx operator set; 0 where it is not imported.
    pub opset: i64,
    producers: HashMap<&'a str, (&'a NodeProto, usize)>,
    constants: HashMap<&'a str, &'a TensorProto>,
    types: HashMap<&'a str, &'a type_proto::Tensor>,
    functions: HashSet<(&'a str, &'a str)>,
}

impl<'a> Index<'a> {
    pub fn new(model: &'a ModelProto, main: &'a GraphProto) -> Index<'a> {
        let (graphs, nodes) = walk(model, main);
        let constant_nodes = nodes.iter().filter(|node| node.op_type == "Constant").filter_map(|node| {
            Some((node.output.first()?.as_str(), attribute(node, "value").and_then(|value| value.t.as_ref())?))
        });
        let initializers = graphs.iter().flat_map(|graph| &graph.initializer).map(|t| (t.name.as_str(), t));
        let infos = graphs.iter().flat_map(|graph| graph.value_info.iter().chain(&graph.input).chain(&graph.output));
        Index {
            opset: model.opset_import.iter().find(|set| domain(&set.domain).is_empty()).map_or(0, |set| set.version),
            producers: main
                .node
                .iter()
                .flat_map(|node| node.output.iter().enumerate().map(move |(slot, name)| (name.as_str(), (node, slot))))
                .collect(),
            constants: constant_nodes.chain(initializers).collect(),
            types: infos
                .filter_map(|info| match info.r#type.as_ref()?.value.as_ref()? {
                    Value::TensorType(tensor) => Some((info.name.as_str(), tensor)),
                    _ => None,
                })
                .collect(),
            functions: model.functions.iter().map(|f| (domain(&f.domain), f.name.as_str())).collect(),
            graphs,
            nodes,
        }
    }

    /// The main graph's node that writes `name`, and at which of its outputs.
    pub fn producer(&self, name: &str) -> Option<(&'a NodeProto, usize)> {
        self.producers.get(name).copied()
    }

    /// Whether the node calls a function that the file itself defines.
    pub fn calls_function(&self, node: &NodeProto) -> bool {
        self.functions.contains(&(domain(&node.domain), node.op_type.as_str()))
    }

    /// The declared type of a value, wherever it is declared.
    pub fn tensor_type(&self, name: &str) -> Option<&'a type_proto::Tensor> {
        self.types.get(name).copied()
    }

    pub fn types(&self) -> impl Iterator<Item = &'a type_proto::Tensor> {
        self.types.values().copied()
    }

    /// Every constant tensor of the file.
    pub fn constants(&self) -> impl Iterator<Item = &'a TensorProto> {
        self.constants.values().copied()
    }

    /// Of every constant tensor of the file.
    pub fn constant_names(&self) -> impl Iterator<Item = &'a str> {
        self.constants.keys().copied()
    }

    /// The integers or truth values of a constant that the file itself holds.
    pub fn integers(&self, name: &str) -> Option<Vec<i64>> {
        integers(self.constants.get(name)?)
    }
}

/// The elements of a tensor of integers or truth values that lie in the model file.
pub(super) fn integers(tensor: &TensorProto) -> Option<Vec<i64>> {
    let raw = &tensor.raw_data;
    Some(match tensor.data_type {
        INT64 if raw.is_empty() => tensor.int64_data.clone(),
        INT64 => raw.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
        INT32 | BOOL if raw.is_empty() => tensor.int32_data.iter().map(|n| i64::from(*n)).collect(),
        INT32 => raw.as_chunks().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect(),
        BOOL => raw.iter().map(|byte| i64::from(*byte)).collect(),
        _ => return None,
    })
}

/// All graphs and all nodes, outer before inner.
fn walk<'a>(model: &'a ModelProto, main: &'a GraphProto) -> (Vec<&'a GraphProto>, Vec<&'a NodeProto>) {
    let mut graphs = vec![main];
    let mut nodes = Vec::new();
    let mut waiting = VecDeque::from([main.node.as_slice()]);
    waiting.extend(model.functions.iter().map(|function| function.node.as_slice()));
    while let Some(list) = waiting.pop_front() {
        nodes.extend(list);
        for subgraph in list.iter().flat_map(|node| &node.attribute).flat_map(|a| a.g.iter().chain(&a.graphs)) {
            graphs.push(subgraph);
            waiting.push_back(&subgraph.node);
        }
    }
    (graphs, nodes)
}

/// The default operator set has two names; "" is used here.
pub(super) fn domain(name: &str) -> &str {
    if name == "ai.onnx" { "" } else { name }
}

pub(super) fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name == name)
}

pub(super) fn integer(node: &NodeProto, name: &str) -> Option<i64> {
    attribute(node, name).map(|attribute| attribute.i)
}

/// A string attribute; "" where it is missing or not UTF-8, which equals no value that an operator knows.
pub(super) fn text<'a>(node: &'a NodeProto, name: &str) -> &'a str {
    attribute(node, name).and_then(|attribute| std::str::from_utf8(&attribute.s).ok()).unwrap_or("")
}

/// The name of an input; `None` where the node leaves it out.
pub(super) fn input(node: &NodeProto, position: usize) -> Option<&str> {
    node.input.get(position).map(String::as_str).filter(|name| !name.is_empty())
}
