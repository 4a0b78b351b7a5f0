//! What tract 0.23 is known to compute wrongly without an error, from its results on ONNX's own node tests and from its
//! source. Whole operators are named where the tests do not tell which of their forms are right.

use super::graph::{FLOAT16, Index, attribute, domain, integer, text};
use super::proto::NodeProto;

/// Why tract would answer this model wrongly, if it would.
pub(super) fn by_tract(index: &Index) -> Option<String> {
    let half = speaks_of_half(index);
    index.nodes.iter().find_map(|node| reason(index, node, half).map(|why| format!("{} {why}", node.op_type)))
}

fn reason(index: &Index, node: &NodeProto, half: bool) -> Option<&'static str> {
    if index.calls_function(node) {
        return Some("is a function of the model's own, and tract takes operators by their bare name");
    }
    if !["", "ai.onnx.ml", "com.microsoft"].contains(&domain(&node.domain)) {
        return Some("is of a domain that tract does not know, and tract takes operators by their bare name");
    }
    match node.op_type.as_str() {
        "LSTM" | "GRU" | "RNN" => match text(node, "direction") {
            "reverse" => Some("with direction reverse runs forwards in tract"),
            "bidirectional" => Some("with direction bidirectional is not trusted in tract"),
            _ => None,
        },
        "Attention" => Some("with windows, cached keys or fully masked rows is wrong in tract"),
        "Celu" if half => Some("in half precision is wrong in tract"),
        "DepthToSpace" | "SpaceToDepth" if text(node, "mode") == "CRD" => Some("in mode CRD is wrong in tract"),
        "SwiGLU" => Some("is wrong in tract"),
        "Swish" if attribute(node, "alpha").is_some_and(|alpha| alpha.f != 1.0) => {
            Some("with an alpha is wrong in tract")
        }
        "BitShift" => Some("by the width of its type or more is wrong in tract"),
        _ => None,
    }
}

/// Whether the model computes in half precision anywhere.
fn speaks_of_half(index: &Index) -> bool {
    index.types().any(|tensor| tensor.elem_type == FLOAT16)
        || index.graphs.iter().flat_map(|graph| &graph.initializer).any(|tensor| tensor.data_type == FLOAT16)
        || index.nodes.iter().any(|n| n.op_type == "Cast" && integer(n, "to") == Some(i64::from(FLOAT16)))
}

#[cfg(test)]
mod tests {
    use crate::backend::onnx::Description;
    use crate::backend::onnx::build::{FLOAT, Model, float, graph, integer, text};

    fn wrong(model: Model) -> Option<String> {
        let model = model.input("x", FLOAT, &["batch", "4"]).output("y", FLOAT, &["batch", "4"]);
        Description::read(model.bytes()).unwrap().tract_computes_wrongly
    }

    #[test]
    fn refused_and_trusted() {
        let one = |operator, attributes| wrong(Model::new().call("", operator, &["x"], &["y"], attributes));
        let direction = |value| vec![text("direction", value)];
        assert_eq!(one("LSTM", direction("reverse")).unwrap(), "LSTM with direction reverse runs forwards in tract");
        assert!(one("GRU", direction("bidirectional")).is_some() && one("RNN", direction("reverse")).is_some());
        assert_eq!(one("LSTM", direction("forward")), None);
        assert_eq!(one("LSTM", vec![]), None);
        assert!(one("Attention", vec![]).is_some() && one("BitShift", vec![]).is_some());
        assert!(one("DepthToSpace", vec![text("mode", "CRD")]).is_some());
        assert_eq!(one("DepthToSpace", vec![text("mode", "DCR")]), None);
        assert!(one("Swish", vec![float("alpha", 0.5)]).is_some());
        assert_eq!(one("Swish", vec![float("alpha", 1.0)]), None);
        let body = Model::new().call("", "LSTM", &["i"], &["o"], direction("reverse")).graph();
        assert!(wrong(Model::new().call("", "If", &["x"], &["y"], vec![graph("else_branch", body)])).is_some());
    }

    #[test]
    fn celu_in_half_precision_only() {
        let celu = Model::new().node("Celu", &["x"], &["y"]);
        assert_eq!(wrong(celu.clone()), None);
        assert!(wrong(celu.clone().value("h", 10, &["4"])).is_some());
        assert!(wrong(celu.call("", "Cast", &["x"], &["h"], vec![integer("to", 10)])).is_some());
    }

    #[test]
    fn operators_of_other_domains_are_not_taken_by_name() {
        let softmax = |domain| Model::new().call(domain, "Softmax", &["x"], &["y"], vec![]);
        assert!(wrong(softmax("my.domain")).is_some());
        assert_eq!(wrong(softmax("ai.onnx")), None);
        assert!(wrong(softmax("").function("ai.onnx", "Softmax", "Neg")).is_some());
    }
}
