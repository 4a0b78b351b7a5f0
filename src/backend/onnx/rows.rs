//! Operators that are known to let one row of a batch change another's answer, or that make an answer random.
//!
//! Only what the graph shows without inference is found; the self-test at load finds the rest.

use super::graph::{Index, attribute, input, integer};
use super::proto::NodeProto;
use super::signature::dims;
use crate::tensor::{Dim, Signature};

/// The first reason found why rows cannot be independent.
pub(super) fn coupled(index: &Index, signature: &Signature) -> Option<String> {
    index.nodes.iter().find_map(|node| {
        let operator = &node.op_type;
        operator_couples(index, node)
            .or_else(|| over_rows(index, signature, node).then_some("over axis 0 couples rows"))
            .map(|why| format!("{operator} {why}"))
    })
}

fn operator_couples(index: &Index, node: &NodeProto) -> Option<&'static str> {
    match node.op_type.as_str() {
        "DynamicQuantizeLinear" | "DynamicQuantizeMatMul" | "DynamicQuantizeLSTM" => Some("couples rows"),
        "BatchNormalization" => {
            // Older operator sets have no mode: an inference node has one output, a training node five.
            let trains = integer(node, "training_mode") == Some(1) || node.output.iter().skip(1).any(|o| !o.is_empty());
            trains.then_some("in training mode couples rows")
        }
        "Dropout" => {
            let mode = input(node, 2).filter(|mode| index.integers(mode).as_deref() != Some(&[0]));
            mode.map(|_| "in training mode draws random numbers")
        }
        "RandomNormal" | "RandomNormalLike" | "RandomUniform" | "RandomUniformLike" | "Multinomial" | "Bernoulli" => {
            Some("draws random numbers")
        }
        "Unique" if integer(node, "axis").unwrap_or(0) == 0 => Some("couples rows"),
        "Compress" if integer(node, "axis").unwrap_or(0) == 0 => Some("couples rows"),
        // Exporters write a range as the non-zero positions of a tensor of ones.
        "NonZero" => {
            let source = input(node, 0).and_then(|name| index.producer(name));
            source.is_none_or(|(node, _)| node.op_type != "ConstantOfShape").then_some("couples rows")
        }
        _ => None,
    }
}

/// Whether the node works along axis 0 of a tensor whose axis 0 is declared to be the rows.
fn over_rows(index: &Index, signature: &Signature, node: &NodeProto) -> bool {
    let Some(rank) = input(node, 0).and_then(|name| rank_by_rows(index, signature, name)) else { return false };
    let first = |axis: i64| axis == 0 || axis == -rank;
    let attributed = |default| first(integer(node, "axis").unwrap_or(default));
    match node.op_type.as_str() {
        "Softmax" | "LogSoftmax" | "Hardmax" => attributed(if index.opset >= 13 { -1 } else { 1 }),
        "ArgMax" | "ArgMin" => attributed(0),
        "TopK" => attributed(-1),
        "CumSum" => {
            input(node, 1).and_then(|axis| index.integers(axis)).is_some_and(|axis| axis.iter().any(|a| first(*a)))
        }
        name if name.starts_with("Reduce") => match axes(index, node) {
            Axes::Unknown => false,
            Axes::All => integer(node, "noop_with_empty_axes") != Some(1),
            Axes::Listed(axes) => axes.into_iter().any(first),
        },
        _ => false,
    }
}

enum Axes {
    All,
    Listed(Vec<i64>),
    /// Computed when the model runs.
    Unknown,
}

/// A reduction's axes: an attribute in older operator sets, an input in newer ones.
fn axes(index: &Index, node: &NodeProto) -> Axes {
    let listed = match (attribute(node, "axes"), input(node, 1)) {
        (Some(attribute), _) => Some(attribute.ints.clone()),
        (None, Some(name)) => index.integers(name),
        (None, None) => Some(Vec::new()),
    };
    match listed {
        None => Axes::Unknown,
        Some(axes) if axes.is_empty() => Axes::All,
        Some(axes) => Axes::Listed(axes),
    }
}

/// The rank of a tensor that is an input of the model with a free leading axis, or is declared to lead with the symbol
/// that such an input leads with.
fn rank_by_rows(index: &Index, signature: &Signature, name: &str) -> Option<i64> {
    let dims = index.tensor_type(name).and_then(dims)?;
    let rows = signature.inputs.iter().filter(|input| input.has_free_rows());
    let leads = match dims.first()? {
        Dim::Fixed(_) => false,
        Dim::Free(None) => rows.into_iter().any(|input| &*input.name == name),
        Dim::Free(Some(_)) => {
            rows.into_iter().any(|input| input.dims.as_deref().and_then(<[_]>::first) == dims.first())
        }
    };
    leads.then_some(dims.len() as i64)
}

#[cfg(test)]
mod tests {
    use crate::backend::onnx::Description;
    use crate::backend::onnx::build::{BOOL, FLOAT, INT64, Model, graph, integer, integers};

    fn coupled(model: Model) -> Option<String> {
        let model = model.input("x", FLOAT, &["batch", "4"]).output("y", FLOAT, &["batch", "4"]);
        Description::read(model.bytes()).unwrap().couples_rows
    }

    fn one(operator: &str, attributes: Vec<super::super::build::Attribute>) -> Option<String> {
        coupled(Model::new().call("", operator, &["x"], &["y"], attributes))
    }

    #[test]
    fn operators_of_ill_repute_are_named() {
        assert_eq!(one("DynamicQuantizeLinear", vec![]).unwrap(), "DynamicQuantizeLinear couples rows");
        assert_eq!(one("RandomNormalLike", vec![]).unwrap(), "RandomNormalLike draws random numbers");
        assert_eq!(one("Unique", vec![]).unwrap(), "Unique couples rows");
        assert_eq!(one("Compress", vec![integer("axis", 1)]), None);
        assert_eq!(one("MatMulIntegerToFloat", vec![]), None);
        let body = Model::new().node("Bernoulli", &["i"], &["o"]).graph();
        let nested = coupled(Model::new().call("", "If", &["x"], &["y"], vec![graph("then_branch", body)]));
        assert_eq!(nested.unwrap(), "Bernoulli draws random numbers");
        let function =
            coupled(Model::new().call("own", "F", &["x"], &["y"], vec![]).function("own", "F", "Multinomial"));
        assert_eq!(function.unwrap(), "Multinomial draws random numbers");
    }

    #[test]
    fn training_modes() {
        assert!(one("BatchNormalization", vec![integer("training_mode", 1)]).unwrap().contains("training mode"));
        assert_eq!(one("BatchNormalization", vec![integer("training_mode", 0)]), None);
        assert!(coupled(Model::new().node("BatchNormalization", &["x"], &["y", "mean", "var"])).is_some());
        let dropout = |mode: u8| {
            let model = Model::new().initializer("mode", BOOL, &[], vec![mode]);
            coupled(model.node("Dropout", &["x", "", "mode"], &["y"]))
        };
        assert_eq!(dropout(0), None);
        assert_eq!(dropout(1).unwrap(), "Dropout in training mode draws random numbers");
        assert_eq!(coupled(Model::new().node("Dropout", &["x", "ratio"], &["y"])), None);
        assert!(coupled(Model::new().node("Dropout", &["x", "", "x"], &["y"])).is_some(), "decided at run time");
    }

    #[test]
    fn ranges_made_of_non_zeros_are_harmless() {
        assert!(one("NonZero", vec![]).is_some());
        let range = Model::new().node("ConstantOfShape", &["s"], &["ones"]).node("NonZero", &["ones"], &["y"]);
        assert_eq!(coupled(range), None);
    }

    #[test]
    fn axis_0_counts_where_it_is_the_rows() {
        assert_eq!(one("Softmax", vec![integer("axis", 0)]).unwrap(), "Softmax over axis 0 couples rows");
        assert!(one("Softmax", vec![integer("axis", -2)]).is_some());
        assert_eq!(one("Softmax", vec![integer("axis", -1)]), None);
        assert!(one("ArgMax", vec![]).is_some());
        assert_eq!(one("TopK", vec![]), None);
        assert!(one("ReduceMean", vec![]).is_some());
        assert_eq!(one("ReduceMean", vec![integers("axes", &[1])]), None);
        assert_eq!(one("ReduceSum", vec![integer("noop_with_empty_axes", 1)]), None);
        let by_input =
            |name: &str, axis| coupled(Model::new().integers("axis", &[1], &[axis]).node(name, &["x", "axis"], &["y"]));
        assert!(by_input("ReduceSum", 0).is_some() && by_input("CumSum", -2).is_some());
        assert!(by_input("ReduceSum", 1).is_none() && by_input("CumSum", 1).is_none());
        let inner = |symbol| {
            let model = Model::new().node("Relu", &["x"], &["h"]).value("h", FLOAT, &[symbol, "4"]);
            coupled(model.node("ReduceMax", &["h"], &["y"]))
        };
        assert!(inner("batch").is_some());
        assert_eq!(inner("other"), None);
        let shape = Model::new().node("Shape", &["x"], &["h"]).value("h", INT64, &["2"]);
        assert_eq!(coupled(shape.node("ReduceProd", &["h"], &["y"])), None);
    }
}
