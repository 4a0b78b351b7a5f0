//! What a person reads: a model's signature, or an answer as aligned columns that fit a screen. Pure.
//!
//! Whatever came from the server is made visible: it cannot steer the terminal.

use crate::cli::client::elements::{number, shown};
use crate::cli::client::{Answer, ModelMetadata, TensorMetadata};
use crate::cli::columns::aligned;
use crate::cli::summary::ones;
use crate::error::visible;
use crate::tensor::{Tensor, wire_shape};

/// Lines of an output; of more, the rest is counted.
const MAX_LINES: usize = 10;
/// Columns of an output of several rows.
const MAX_COLUMNS: usize = 6;

#[derive(Clone, Copy)]
pub(super) struct Style {
    pub(super) bold: bool,
}

impl Style {
    fn strong(self, text: &str) -> String {
        if self.bold { format!("\x1b[1m{text}\x1b[0m") } else { text.to_string() }
    }

    fn faint(self, text: &str) -> String {
        if self.bold { format!("\x1b[2m{text}\x1b[0m") } else { text.to_string() }
    }
}

/// Signature, versions, and a line to try that `command` begins.
pub(super) fn model(model: &ModelMetadata, command: &str, style: Style) -> String {
    let versions = if model.versions.len() == 1 { "version" } else { "versions" };
    let facts: Vec<String> = [
        (!model.versions.is_empty()).then(|| format!("{versions} {}", model.versions.join(", "))),
        (!model.platform.is_empty()).then(|| model.platform.clone()),
        model.properties.get("batching").map(|batching| format!("batching {batching}")),
    ]
    .into_iter()
    .flatten()
    .map(|fact| visible(&fact))
    .collect();
    let row = |kind: &str, tensor: &TensorMetadata| {
        vec![kind.to_string(), visible(&tensor.name), visible(&tensor.datatype), wire_shape(&tensor.shape)]
    };
    let rows: Vec<Vec<String>> = model
        .inputs
        .iter()
        .map(|input| row("input", input))
        .chain(model.outputs.iter().map(|output| row("output", output)))
        .collect();
    let head = style.strong(&visible(&model.name));
    let inputs: String = model.inputs.iter().map(|input| example(input, model.inputs.len() == 1)).collect();
    format!("{head}  {}\n\n{}\n{}\n  {command}{inputs}\n", facts.join(", "), aligned(&rows, false), style.strong("Try"))
}

/// Ones where that is short enough, or a file to be made.
fn example(input: &TensorMetadata, only: bool) -> String {
    let name = visible(&input.name);
    let named = if only { String::new() } else { format!("{name}=") };
    let value = match input.spec().ok().as_ref().and_then(ones) {
        Some((_, ones)) => format!("[{ones}]"),
        None => format!("@{name}.npy"),
    };
    format!(" -i {}", shell_word(&(named + &value)))
}

/// One word to a shell, whatever it holds.
pub(super) fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// Every output, and where the answer came from. With `classes`, outputs of text are classes with their values.
pub(super) fn answer(answer: &Answer, classes: bool, style: Style) -> String {
    let mut out = String::new();
    for (name, tensor) in &answer.outputs {
        let head = format!("{}  {} {}", style.strong(&visible(name)), tensor.dtype(), tensor.shape());
        out.push_str(&format!("{}\n{}\n", head.trim_end(), output(tensor, classes, style)));
    }
    out + &style.faint(&provenance(answer)) + "\n"
}

fn output(tensor: &Tensor, classes: bool, style: Style) -> String {
    let columns = tensor.shape().dims().last().copied().unwrap_or(1);
    if tensor.shape().elements() == 0 {
        return String::from("  no elements\n");
    }
    let rows = tensor.shape().elements() / columns;
    match classes.then(|| ranking(tensor, rows, columns, style)).flatten() {
        Some(ranking) => ranking,
        None if rows == 1 => list(tensor, columns, style),
        None => grid(tensor, rows, columns, style),
    }
}

fn more(count: usize, what: &str, style: Style) -> String {
    if count == 0 { String::new() } else { format!("  {}\n", style.faint(&format!("… {count} more {what}"))) }
}

/// One row: an element to a line, behind its position.
fn list(tensor: &Tensor, elements: usize, style: Style) -> String {
    let listed = elements.min(MAX_LINES);
    let lines: Vec<Vec<String>> = (0..listed).map(|index| vec![index.to_string(), shown(tensor, index)]).collect();
    aligned(&lines, tensor.strings().next().is_none()) + &more(elements - listed, "elements", style)
}

/// Several rows, all dimensions but the last, below the positions in the last.
fn grid(tensor: &Tensor, rows: usize, columns: usize, style: Style) -> String {
    let (listed, across) = (rows.min(MAX_LINES), columns.min(MAX_COLUMNS));
    let cut = if columns > across { vec!["…".to_string()] } else { Vec::new() };
    let line = |row: usize| {
        let cells = (0..across).map(|column| shown(tensor, row * columns + column));
        std::iter::once(position(tensor, row)).chain(cells).chain(cut.clone()).collect()
    };
    let mut lines: Vec<Vec<String>> = (0..listed).map(line).collect();
    if columns > 1 {
        let positions = (0..across).map(|column| column.to_string());
        lines.insert(0, std::iter::once(String::new()).chain(positions).collect());
    }
    let numbers = tensor.strings().next().is_none();
    let columns_left = if cut.is_empty() { String::new() } else { more(columns - across, "columns", style) };
    aligned(&lines, numbers) + &columns_left + &more(rows - listed, "rows", style)
}

/// The row's index in each dimension but the last.
fn position(tensor: &Tensor, mut row: usize) -> String {
    let dims = tensor.shape().dims();
    let mut indices = Vec::new();
    for extent in dims[..dims.len().saturating_sub(1)].iter().rev() {
        indices.push((row % extent).to_string());
        row /= extent;
    }
    indices.reverse();
    indices.join(",")
}

/// The classification extension's `value:index[:label]`. `None` where the elements are something else.
fn ranking(tensor: &Tensor, rows: usize, columns: usize, style: Style) -> Option<String> {
    let listed = rows.min(MAX_LINES);
    let mut lines = Vec::new();
    for (at, element) in tensor.strings().take(listed * columns).enumerate() {
        let mut parts = std::str::from_utf8(element).ok()?.splitn(3, ':');
        let (value, index) = (parts.next()?.parse::<f64>().ok()?, parts.next()?.parse::<u64>().ok()?);
        let row = if rows > 1 && at % columns == 0 { position(tensor, at / columns) } else { String::new() };
        let label = parts.next().map(visible).unwrap_or_default();
        lines.push(vec![row, index.to_string(), number(value), label]);
    }
    if rows == 1 {
        lines.iter_mut().for_each(|line| drop(line.remove(0)));
    }
    (!lines.is_empty()).then(|| aligned(&lines, false) + &more(rows - listed, "rows", style))
}

/// Model and version, the request's id, the prediction's id, and the server's time.
fn provenance(answer: &Answer) -> String {
    let mut facts = vec![answer.model.clone()];
    if !answer.version.is_empty() {
        facts[0].push_str(&format!(" version {}", answer.version));
    }
    if !answer.id.is_empty() {
        facts.push(format!("id {}", answer.id));
    }
    if let Some(prediction) = answer.parameters.get("prediction_id").and_then(|id| id.as_str()) {
        facts.push(format!("prediction {prediction}"));
    }
    facts.extend(answer.timing.as_deref().map(timing));
    visible(&facts.join(" · "))
}

/// `queue;dur=0.1, total;dur=0.3` to `queue 0.1, total 0.3 ms`.
fn timing(header: &str) -> String {
    let phases = header.split(',').map(|phase| phase.trim().replace(";dur=", " "));
    format!("{} ms", phases.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::tensor::{Shape, Tensor};

    const PLAIN: Style = Style { bold: false };

    fn answered(tensor: Tensor, classes: bool) -> String {
        let whole = Answer {
            id: "7".into(),
            model: "m".into(),
            version: "2".into(),
            parameters: json!({"prediction_id": "01"}).as_object().unwrap().clone(),
            outputs: vec![("y".into(), tensor)],
            timing: Some("queue;dur=0.100, total;dur=0.300".into()),
        };
        let text = answer(&whole, classes, PLAIN);
        let tail = "\nm version 2 · id 7 · prediction 01 · queue 0.100, total 0.300 ms\n";
        text.strip_suffix(tail).unwrap_or_else(|| panic!("{text}")).to_string()
    }

    fn floats(dims: &[usize]) -> Tensor {
        let shape = Shape::new(dims).unwrap();
        let elements = (0..shape.elements()).map(|i| i as f32 / 4.0).collect();
        Tensor::from_vec(shape, elements).unwrap()
    }

    #[test]
    fn one_row_is_listed_by_position() {
        assert_eq!(answered(floats(&[1, 3]), false), "y  FP32 [1,3]\n  0     0\n  1  0.25\n  2   0.5\n");
        assert_eq!(answered(floats(&[]), false), "y  FP32 []\n  0  0\n");
        let long = answered(floats(&[1, 1000]), false);
        assert_eq!(long.lines().count(), 1 + MAX_LINES + 1);
        assert!(long.ends_with("  9  2.25\n  … 990 more elements\n"), "{long}");
    }

    #[test]
    fn several_rows_are_a_grid() {
        assert_eq!(
            answered(floats(&[2, 1, 3]), false),
            "y  FP32 [2,1,3]\n          0     1     2\n  0,0     0  0.25   0.5\n  1,0  0.75     1  1.25\n"
        );
        assert_eq!(answered(floats(&[2, 1]), false), "y  FP32 [2,1]\n  0     0\n  1  0.25\n");
        let wide = answered(floats(&[20, 8]), false);
        assert!(wide.contains("  5\n  0   0   0.25   0.5   0.75   1   1.25  …\n"), "{wide}");
        assert!(wide.ends_with("  … 2 more columns\n  … 10 more rows\n"), "{wide}");
        assert_eq!(answered(floats(&[0, 4]), false), "y  FP32 [0,4]\n  no elements\n");
    }

    #[test]
    fn classes_are_ranked_with_their_labels() {
        let classes = |dims: &[usize], texts: &[&str]| {
            answered(Tensor::from_strings(Shape::new(dims).unwrap(), texts).unwrap(), true)
        };
        assert_eq!(
            classes(&[1, 2], &["0.990000:2:two: a", "0.010000:11"]),
            "y  BYTES [1,2]\n  2   0.99  two: a\n  11  0.01\n"
        );
        assert_eq!(classes(&[2, 1], &["0.5:1:b", "0.75:0:a"]), "y  BYTES [2,1]\n  0  1  0.5   b\n  1  0  0.75  a\n");
        assert_eq!(classes(&[1], &["hello"]), "y  BYTES [1]\n  0  \"hello\"\n");
    }

    #[test]
    fn nothing_from_the_server_steers_the_terminal() {
        let evil = "\x1b[2J";
        let model = ModelMetadata {
            name: evil.into(),
            versions: vec![evil.into()],
            inputs: vec![TensorMetadata { name: evil.into(), datatype: evil.into(), shape: vec![-1] }],
            ..ModelMetadata::default()
        };
        assert!(!super::model(&model, "tidegate infer m", PLAIN).contains('\x1b'));
        let tensor = Tensor::from_strings(Shape::new([1]).unwrap(), [format!("0.5:1:{evil}")]).unwrap();
        assert!(!answered(tensor.clone(), true).contains('\x1b') && !answered(tensor, false).contains('\x1b'));
    }

    #[test]
    fn words_are_data_to_the_shell() {
        assert_eq!(shell_word("image=@image.npy"), "image=@image.npy");
        assert_eq!(shell_word("[1,1]"), "'[1,1]'");
        assert_eq!(shell_word("a'$(cmd)"), "'a'\\''$(cmd)'");
        assert_eq!(shell_word(""), "''");
    }

    #[test]
    fn a_signature_comes_with_a_line_to_try() {
        let tensor = |name: &str, datatype: &str, shape: &[i64]| TensorMetadata {
            name: name.into(),
            datatype: datatype.into(),
            shape: shape.to_vec(),
        };
        let mut model = ModelMetadata {
            name: "m".into(),
            versions: vec!["1".into(), "2".into()],
            platform: "onnx".into(),
            inputs: vec![tensor("text", "BYTES", &[-1, 1])],
            outputs: vec![tensor("score", "FP32", &[-1])],
            ..ModelMetadata::default()
        };
        assert_eq!(
            super::model(&model, "tidegate infer m", PLAIN),
            "m  versions 1, 2, onnx\n\n  input   text   BYTES  [-1,1]\n  output  score  FP32   [-1]\n\n\
             Try\n  tidegate infer m -i '[\"a\"]'\n"
        );
        model.inputs.push(tensor("image", "FP32", &[-1, 3, 224, 224]));
        let text = super::model(&model, "tidegate infer m", PLAIN);
        assert!(text.ends_with("tidegate infer m -i 'text=[\"a\"]' -i image=@image.npy\n"), "{text}");
    }
}
