//! Operators by which a run may take longer, or make more, for what its inputs hold, whatever their shapes.
//!
//! Only what the graph shows without inference: loops, branches, and sizes that are computed from the inputs' values
//! rather than from their shapes. Of operators that other libraries define nothing is known.

use std::collections::HashSet;

use super::graph::{Index, domain};
use super::proto::NodeProto;

/// The first one found.
pub(super) fn deciding(index: &Index) -> Option<String> {
    let known = sizes_and_constants(index);
    let decides = |node: &&&NodeProto| {
        let unknown = |name: &String| !name.is_empty() && !known.contains(name.as_str());
        matches!(node.op_type.as_str(), "Loop" | "If") || sizes(node).iter().any(unknown)
    };
    index.nodes.iter().find(decides).map(|node| node.op_type.clone())
}

/// The inputs that say how much the node makes.
fn sizes(node: &NodeProto) -> &[String] {
    let first = match node.op_type.as_str() {
        "Range" | "ConstantOfShape" | "HannWindow" | "HammingWindow" | "BlackmanWindow" | "MelWeightMatrix" => 0,
        "Expand" | "Tile" | "Resize" | "Upsample" | "OneHot" | "Pad" | "CenterCropPad" | "Col2Im" | "DFT"
        | "AffineGrid" => 1,
        "MaxUnpool" => 2,
        _ => return &[],
    };
    node.input.get(first..).unwrap_or_default()
}

/// Names whose values follow from the file and from the inputs' shapes alone. Where nodes are not in the order in which they
/// run, as those of subgraphs are not, some are missing.
fn sizes_and_constants<'a>(index: &Index<'a>) -> HashSet<&'a str> {
    let mut known: HashSet<&str> = index.constant_names().collect();
    for node in &index.nodes {
        let by_shape = domain(&node.domain).is_empty() && matches!(node.op_type.as_str(), "Shape" | "Size");
        if by_shape || node.input.iter().all(|name| name.is_empty() || known.contains(name.as_str())) {
            known.extend(node.output.iter().map(String::as_str));
        }
    }
    known
}

#[cfg(test)]
mod tests {
    use crate::backend::onnx::Description;
    use crate::backend::onnx::build::{FLOAT, INT64, Model, graph};

    fn model() -> Model {
        Model::new().input("x", FLOAT, &["batch", "4"]).input("n", INT64, &["1"]).output("y", FLOAT, &["batch", "4"])
    }

    fn deciding(model: Model) -> Option<String> {
        Description::read(model.bytes()).unwrap().decided_by_values
    }

    #[test]
    fn sizes_from_values_decide_and_those_from_shapes_do_not() {
        assert_eq!(deciding(model().node("Relu", &["x"], &["y"])), None);
        let shaped = || model().node("Shape", &["x"], &["s"]).integers("two", &[1], &[2]);
        let computed = shaped().node("Mul", &["s", "two"], &["t"]).node("Expand", &["x", "t"], &["y"]);
        assert_eq!(deciding(computed), None);
        for operator in ["Expand", "Tile", "Resize", "OneHot", "Pad"] {
            assert_eq!(deciding(shaped().node(operator, &["x", "two"], &["y"])), None, "{operator}");
            let by_value = shaped().node("Mul", &["n", "two"], &["t"]).node(operator, &["x", "t"], &["y"]);
            assert_eq!(deciding(by_value).as_deref(), Some(operator));
        }
        assert_eq!(deciding(model().node("Range", &["n", "n", "n"], &["y"])).as_deref(), Some("Range"));
    }

    #[test]
    fn loops_and_branches_decide_wherever_they_are() {
        let body = Model::new().node("Neg", &["i"], &["o"]).output("o", FLOAT, &["4"]);
        let looped = |inner: Model| model().call("", "Loop", &["n"], &["y"], vec![graph("body", inner.graph())]);
        assert_eq!(deciding(looped(body)).as_deref(), Some("Loop"));
        let inner = Model::new().node("ConstantOfShape", &["i"], &["o"]).output("o", FLOAT, &["4"]);
        let scan = model().call("", "Scan", &["x"], &["y"], vec![graph("body", inner.graph())]);
        assert_eq!(deciding(scan).as_deref(), Some("ConstantOfShape"), "of a subgraph's own input");
    }
}
