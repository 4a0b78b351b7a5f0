//! What an output's numbers mean, inferred from the graph's last operators. A guess for monitoring: where the graph
//! does not say, [`OutputKind::Values`].

use super::graph::{Index, attribute, input, integer, text};
use super::proto::NodeProto;
use super::signature::dims;
use crate::tensor::{DataType, Dim, OutputKind, TensorSpec};

/// Most operators walked back from an output: cycles end here.
const MAX_STEPS: usize = 32;

pub(super) fn infer(index: &Index, output: &TensorSpec) -> OutputKind {
    match output.dtype {
        DataType::Fp16 | DataType::Bf16 | DataType::Fp32 | DataType::Fp64 => scores(index, output),
        DataType::Bool => OutputKind::Values,
        _ if is_label(index, output) => OutputKind::Labels,
        _ => OutputKind::Values,
    }
}

fn scores(index: &Index, output: &TensorSpec) -> OutputKind {
    let walk = Walk::back(index, output);
    let kind = walk.node.and_then(|(node, slot)| {
        Some(match (node.op_type.as_str(), slot) {
            ("Softmax", 0) if walk.is_last_axis(index, node, output) => OutputKind::Probabilities,
            ("LogSoftmax", 0) if walk.is_last_axis(index, node, output) => OutputKind::LogProbabilities,
            ("Sigmoid", 0) if one_per_row(output) => OutputKind::BinaryProbability,
            ("Concat", 0) if classes(output) == Some(2) && is_complement(index, node) => OutputKind::Probabilities,
            ("TreeEnsembleClassifier" | "LinearClassifier" | "SVMClassifier", 1)
                if gives_probabilities(node, walk.normalised, output) =>
            {
                OutputKind::Probabilities
            }
            _ => return None,
        })
    });
    let named_logits = output.name.to_ascii_lowercase().contains("logit") && classes(output).is_some_and(|n| n >= 2);
    kind.unwrap_or(if named_logits { OutputKind::Logits } else { OutputKind::Values })
}

/// The operator that computed an output, behind those that only move or convert its numbers.
struct Walk<'a> {
    node: Option<(&'a NodeProto, usize)>,
    /// The name under which that operator wrote the output.
    name: &'a str,
    /// An operator that changes the shape was passed.
    reshaped: bool,
    /// Rows were scaled to a sum of 1.
    normalised: bool,
}

impl<'a> Walk<'a> {
    fn back(index: &Index<'a>, output: &'a TensorSpec) -> Walk<'a> {
        let mut walk = Walk { node: None, name: &output.name, reshaped: false, normalised: false };
        for _ in 0..MAX_STEPS {
            walk.node = index.producer(walk.name);
            let Some((node, 0)) = walk.node else { break };
            match node.op_type.as_str() {
                "Identity" | "Cast" => {}
                "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => walk.reshaped = true,
                "Normalizer" if text(node, "norm") == "L1" => walk.normalised = true,
                _ => break,
            }
            let Some(before) = input(node, 0) else { break };
            walk.name = before;
        }
        walk
    }

    /// Whether a softmax ran over what is the output's last axis.
    fn is_last_axis(&self, index: &Index, softmax: &NodeProto, output: &TensorSpec) -> bool {
        let default = if index.opset >= 13 { -1 } else { 1 };
        let axis = integer(softmax, "axis").unwrap_or(default);
        let declared = index.tensor_type(self.name).and_then(dims);
        let Some(before) = declared.or_else(|| output.dims.clone().filter(|_| !self.reshaped)) else {
            return axis == -1;
        };
        let rank = before.len() as i64;
        let Ok(axis) = usize::try_from(if axis < 0 { axis + rank } else { axis }) else { return false };
        match before.get(axis) {
            None => false,
            Some(_) if !self.reshaped => axis + 1 == before.len(),
            // [n, classes, 1, 1] flattened to [n, classes] keeps its distribution, [n, classes, h, w] does not.
            Some(softened) => {
                let kept = match (softened, output.dims.as_ref().and_then(|dims| dims.last())) {
                    (Dim::Fixed(before), Some(Dim::Fixed(after))) => before == after,
                    _ => true,
                };
                kept && before[axis + 1..].iter().all(|dim| *dim == Dim::Fixed(1))
            }
        }
    }
}

/// The length of the last of several axes, where it is fixed.
fn classes(output: &TensorSpec) -> Option<usize> {
    match output.dims.as_deref()? {
        [_, .., Dim::Fixed(n)] => Some(*n),
        _ => None,
    }
}

fn one_per_row(output: &TensorSpec) -> bool {
    classes(output) == Some(1) || output.dims.as_ref().is_some_and(|dims| dims.len() == 1)
}

/// A tree ensemble, a linear classifier or a support vector machine writes distributions: it says that it applies a
/// link function, or its trees hold votes. A logistic function of each of several classes sums to 1 only if normalised.
fn gives_probabilities(node: &NodeProto, normalised: bool, output: &TensorSpec) -> bool {
    let floats = |name| attribute(node, name).map_or(&[][..], |attribute| &attribute.floats);
    match (node.op_type.as_str(), text(node, "post_transform")) {
        (_, "SOFTMAX" | "SOFTMAX_ZERO") => true,
        (_, "LOGISTIC" | "PROBIT") => normalised || classes(output) == Some(2),
        ("SVMClassifier", _) => !floats("prob_a").is_empty(),
        // Trees of a forest vote with fractions of 1; boosted trees without a link function add scores of any sign.
        ("TreeEnsembleClassifier", _) => {
            let votes = floats("class_weights");
            !votes.is_empty() && votes.iter().all(|vote| (0.0..=1.0).contains(vote))
        }
        _ => false,
    }
}

/// [1 - p, p] with p from a sigmoid, as two-class networks are exported from scikit-learn.
fn is_complement(index: &Index, concat: &NodeProto) -> bool {
    let [negative, positive] = concat.input.as_slice() else { return false };
    let made_by = |name: &str, operator| index.producer(name).map(|(node, _)| node).filter(|n| n.op_type == operator);
    made_by(positive, "Sigmoid").is_some()
        && made_by(negative, "Sub").is_some_and(|sub| input(sub, 1) == Some(positive.as_str()))
}

/// Class ids or names: said by the name, by a classifier's first output, or by an ArgMax that may have been looked up
/// in a table of classes since.
fn is_label(index: &Index, output: &TensorSpec) -> bool {
    if output.name.to_ascii_lowercase().contains("label") {
        return true;
    }
    let mut name = &*output.name;
    for _ in 0..MAX_STEPS {
        let Some((node, 0)) = index.producer(name) else { return false };
        let position = match node.op_type.as_str() {
            "ArgMax" | "TreeEnsembleClassifier" | "LinearClassifier" | "SVMClassifier" => return true,
            "Identity" | "Cast" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "LabelEncoder" => 0,
            "Gather" | "ArrayFeatureExtractor" => 1,
            _ => return false,
        };
        let Some(before) = input(node, position) else { return false };
        name = before;
    }
    false
}

#[cfg(test)]
mod tests {
    use crate::backend::onnx::Description;
    use crate::backend::onnx::build::{self, FLOAT, INT64, Model, STRING, floats, integer, text};
    use crate::tensor::OutputKind::{self, *};

    fn kinds(model: Model) -> Vec<OutputKind> {
        Description::read(model.input("x", FLOAT, &["batch", "3"]).bytes()).unwrap().output_kinds
    }

    fn kind(model: Model) -> OutputKind {
        kinds(model)[0]
    }

    fn softmax(attributes: Vec<build::Attribute>) -> Model {
        Model::new().call("", "Softmax", &["x"], &["s"], attributes)
    }

    #[test]
    fn softmax_counts_over_the_last_axis_only() {
        let out = |model: Model| model.node("Identity", &["s"], &["y"]).output("y", FLOAT, &["batch", "3"]);
        assert_eq!(kind(out(softmax(vec![]))), Probabilities);
        assert_eq!(kind(out(softmax(vec![integer("axis", 1)]))), Probabilities);
        assert_eq!(kind(out(softmax(vec![integer("axis", 0)]))), Values);
        assert_eq!(kind(out(softmax(vec![integer("axis", 7)]))), Values);
        assert_eq!(kind(out(softmax(vec![]).opset(11))), Probabilities, "the old default axis is 1");
        let rank3 = |model: Model| kind(model.output("s", FLOAT, &["batch", "2", "3"]));
        assert_eq!(rank3(softmax(vec![])), Probabilities);
        assert_eq!(rank3(softmax(vec![]).opset(11)), Values);
        let log = Model::new().node("LogSoftmax", &["x"], &["y"]).output("y", FLOAT, &["batch", "3"]);
        assert_eq!(kind(log), LogProbabilities);
    }

    #[test]
    fn flattening_keeps_a_distribution_over_channels_of_one_pixel() {
        let flat = |dims: &[&str], width| {
            let model = softmax(vec![integer("axis", 1)]).value("s", FLOAT, dims);
            kind(model.node("Flatten", &["s"], &["y"]).output("y", FLOAT, &["batch", width]))
        };
        assert_eq!(flat(&["batch", "5", "1", "1"], "5"), Probabilities);
        assert_eq!(flat(&["batch", "5", "2", "2"], "20"), Values);
    }

    #[test]
    fn sigmoids_of_one_column_are_binary() {
        let sigmoid = |dims: &[&str]| kind(Model::new().node("Sigmoid", &["x"], &["y"]).output("y", FLOAT, dims));
        assert_eq!(sigmoid(&["batch", "1"]), BinaryProbability);
        assert_eq!(sigmoid(&["batch"]), BinaryProbability);
        assert_eq!(sigmoid(&["batch", "4"]), Values);
        assert_eq!(sigmoid(&["batch", "n"]), Values);
        let complement = Model::new()
            .node("Sigmoid", &["x"], &["p"])
            .node("Sub", &["one", "p"], &["q"])
            .node("Concat", &["q", "p"], &["y"])
            .output("y", FLOAT, &["batch", "2"]);
        assert_eq!(kind(complement), Probabilities);
    }

    #[test]
    fn classifiers_write_labels_and_distributions() {
        let classifier = |operator, attributes| {
            let model = Model::new().call("ai.onnx.ml", operator, &["x"], &["id", "scores"], attributes);
            kinds(model.output("id", INT64, &["batch"]).output("scores", FLOAT, &["batch", "3"]))
        };
        let votes = |weights: &[f32]| vec![text("post_transform", "NONE"), floats("class_weights", weights)];
        assert_eq!(classifier("TreeEnsembleClassifier", votes(&[0.25, 0.75])), [Labels, Probabilities]);
        assert_eq!(classifier("TreeEnsembleClassifier", votes(&[-1.5, 0.75])), [Labels, Values]);
        assert_eq!(classifier("TreeEnsembleClassifier", vec![text("post_transform", "SOFTMAX")])[1], Probabilities);
        assert_eq!(classifier("LinearClassifier", vec![text("post_transform", "LOGISTIC")])[1], Values);
        assert_eq!(classifier("LinearClassifier", vec![text("post_transform", "NONE")])[1], Values);
        assert_eq!(classifier("SVMClassifier", vec![floats("prob_a", &[1.0])])[1], Probabilities);
        assert_eq!(classifier("SVMClassifier", vec![])[1], Values);
        let normalised = Model::new()
            .call("ai.onnx.ml", "LinearClassifier", &["x"], &["id", "s"], vec![text("post_transform", "LOGISTIC")])
            .call("ai.onnx.ml", "Normalizer", &["s"], &["p"], vec![text("norm", "L1")])
            .output("p", FLOAT, &["", "3"]);
        assert_eq!(kind(normalised), Probabilities);
    }

    #[test]
    fn labels_by_argmax_and_by_name() {
        let argmax = Model::new()
            .node("ArgMax", &["x"], &["a"])
            .call("ai.onnx.ml", "ArrayFeatureExtractor", &["classes", "a"], &["b"], vec![])
            .node("Cast", &["b"], &["y"]);
        assert_eq!(kind(argmax.clone().output("y", INT64, &["batch"])), Labels);
        assert_eq!(kind(argmax.output("y", STRING, &["batch"])), Labels);
        let neg = |name, kind| Model::new().node("Neg", &["x"], &[name]).output(name, kind, &["batch"]);
        assert_eq!(kind(neg("output_label", INT64)), Labels);
        assert_eq!(kind(neg("count", INT64)), Values);
        assert_eq!(kind(neg("label", FLOAT)), Values);
    }

    #[test]
    fn logits_by_name_and_several_classes() {
        let named = |name, dims: &[&str]| kind(Model::new().node("Neg", &["x"], &[name]).output(name, FLOAT, dims));
        assert_eq!(named("class_Logits", &["batch", "3"]), Logits);
        assert_eq!(named("logits", &["batch", "1"]), Values);
        assert_eq!(named("logits", &["batch", "n"]), Values);
        assert_eq!(named("logits", &["3"]), Values);
        assert_eq!(named("y", &["batch", "3"]), Values);
    }

    #[test]
    fn a_cycle_ends() {
        let model = Model::new().node("Identity", &["z"], &["y"]).node("Identity", &["y"], &["z"]);
        assert_eq!(kind(model.output("y", FLOAT, &["batch", "3"])), Values);
    }
}
