//! Reads an ONNX file without any engine: signature, what outputs mean, whether rows are independent, and
//! which other files it needs.
//!
//! Owns the ONNX protobuf (`proto/onnx.proto`); nothing outside this folder sees it. Opens no file: the caller hands
//! over the bytes. Knows nothing of engines but which models tract is known to compute wrongly ([`wrongly`]).
//!
//! Model files are untrusted. Invariants: any bytes give a [`Description`] or [`LoadError::BadModel`], never a panic;
//! nesting is bounded by the protobuf decoder (100 messages); weights are not copied; every name in `external_files`
//! is a plain file name, so that joining it to the model's folder cannot leave that folder.

mod external;
mod graph;
mod kinds;
mod rows;
mod signature;
mod sizes;
mod values;
mod wrongly;

/// The messages of `proto/onnx.proto`.
#[allow(clippy::all, clippy::pedantic, missing_docs)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
}

use std::collections::BTreeSet;

use bytes::Bytes;
use prost::Message;

use super::LoadError;
use crate::tensor::{OutputKind, Signature};
use graph::Index;

/// The longest ONNX file: protobuf knows no longer message. Larger weights lie in files beside it.
pub const MAX_FILE_BYTES: u64 = i32::MAX as u64;

/// What an ONNX file says about itself.
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// Inputs (without initialisers that may be overridden) and tensor outputs, as declared.
    pub signature: Signature,
    /// Declared outputs that are not tensors (maps, sequences, optionals): left out, with a warning.
    pub omitted_outputs: Vec<String>,
    /// One per output of the signature.
    pub output_kinds: Vec<OutputKind>,
    /// Why rows cannot be independent: the first row-coupling operator found (`DynamicQuantizeLinear couples rows`).
    /// `None` proves nothing.
    pub couples_rows: Option<String>,
    /// By which operator a run may take longer, or make more, for what its inputs hold: the first one found. `None`
    /// proves nothing.
    pub decided_by_values: Option<String>,
    /// Why tract is known to compute this wrongly without an error, if it is.
    pub tract_computes_wrongly: Option<String>,
    /// Sizes that the file's own constants mention, most frequent first: worth trying on a free axis that is not rows.
    pub mentioned_sizes: Vec<usize>,
    /// External data files: plain file names beside the model.
    pub external_files: BTreeSet<String>,
    /// The exporter and its version: `pytorch 2.9.0`. Empty where the file does not say.
    pub producer: String,
}

impl Description {
    /// Refuses a file by its length, before it is read into memory: no ONNX file is longer than [`MAX_FILE_BYTES`].
    pub fn check_length(bytes: u64) -> Result<(), LoadError> {
        if bytes > MAX_FILE_BYTES {
            return Err(bad(format!(
                "not an ONNX model: {bytes} bytes, expected at most {MAX_FILE_BYTES}; larger weights belong in external \
                 data files"
            )));
        }
        Ok(())
    }

    /// Reads a whole ONNX file. Every failure is a [`LoadError::BadModel`].
    pub fn read(bytes: Bytes) -> Result<Description, LoadError> {
        let model = decode(bytes)?;
        let graph = model.graph.as_ref().ok_or_else(|| bad("not an ONNX model: it holds no graph"))?;
        let index = Index::new(&model, graph);
        let (signature, omitted_outputs) = signature::read(graph)?;
        Ok(Description {
            output_kinds: signature.outputs.iter().map(|output| kinds::infer(&index, output)).collect(),
            couples_rows: rows::coupled(&index, &signature),
            decided_by_values: values::deciding(&index),
            tract_computes_wrongly: wrongly::by_tract(&index),
            mentioned_sizes: sizes::mentioned(&index),
            external_files: external::files(&index)?,
            producer: format!("{} {}", model.producer_name, model.producer_version).trim().to_owned(),
            signature,
            omitted_outputs,
        })
    }
}

/// The decoder skips fields that it does not know, so a file of another format may decode: what no ONNX file lacks is
/// required.
fn decode(bytes: Bytes) -> Result<proto::ModelProto, LoadError> {
    if bytes.is_empty() {
        return Err(bad("not an ONNX model: the file is empty"));
    }
    let model = proto::ModelProto::decode(bytes).map_err(|error| bad(format!("not an ONNX model: {error}")))?;
    if model.ir_version < 1 {
        return Err(bad(format!("not an ONNX model: IR version {}, expected 1 or more", model.ir_version)));
    }
    if model.opset_import.is_empty() {
        return Err(bad("not an ONNX model: it imports no operator set"));
    }
    Ok(model)
}

fn bad(message: impl Into<String>) -> LoadError {
    LoadError::BadModel(message.into())
}

#[cfg(test)]
pub(crate) mod build;
#[cfg(test)]
mod tests {
    use super::build::{FLOAT, INT64, Model, text};
    use super::*;

    /// One of everything that `read` looks at: weights, attributes, a subgraph, external data, a sequence output.
    fn model() -> Model {
        let body = Model::new().input("i", FLOAT, &["4"]).node("Neg", &["i"], &["o"]).output("o", FLOAT, &["4"]);
        Model::new()
            .input("x", FLOAT, &["batch", "4"])
            .weights("w", &[4, 3], &[0.5; 12])
            .external("b", &[("location", "weights.bin"), ("offset", "0")])
            .node("Gemm", &["x", "w", "b"], &["h"])
            .node("Softmax", &["h"], &["y"])
            .call("", "Scan", &["h"], &["s"], vec![build::graph("body", body.graph())])
            .call("ai.onnx.ml", "LabelEncoder", &["h"], &["l"], vec![text("default_string", "?")])
            .output("y", FLOAT, &["batch", "3"])
            .sequence_output("maps")
            .output("l", INT64, &["batch"])
    }

    #[test]
    fn describes_a_model() {
        let description = Description::read(model().bytes()).unwrap();
        let names: Vec<_> = description.signature.outputs.iter().map(|o| &*o.name).collect();
        assert_eq!(names, ["y", "l"]);
        assert_eq!(description.omitted_outputs, ["maps"]);
        assert_eq!(description.output_kinds, [OutputKind::Probabilities, OutputKind::Values]);
        assert_eq!(description.external_files, BTreeSet::from(["weights.bin".to_owned()]));
        assert_eq!(description.producer, "test 1");
    }

    #[test]
    fn other_files_are_no_onnx_models() {
        for (bytes, expected) in [
            (&b""[..], "not an ONNX model: the file is empty"),
            (b"\x08\x08", "not an ONNX model: it imports no operator set"),
            (b"\x08\x08\x42\x02\x10\x11", "not an ONNX model: it holds no graph"),
            (b"\x10\x08", "not an ONNX model: failed to decode"),
            (b"PK\x03\x04 a zip file", "not an ONNX model: "),
            (b"<html></html>", "not an ONNX model: "),
            (&[0; 64], "not an ONNX model: "),
        ] {
            let error = Description::read(Bytes::from_static(bytes)).unwrap_err();
            assert!(matches!(&error, LoadError::BadModel(text) if text.starts_with(expected)), "{error}");
        }
    }

    #[test]
    fn files_longer_than_a_protobuf_are_refused_unread() {
        assert_eq!(Description::check_length(MAX_FILE_BYTES), Ok(()));
        let error = Description::check_length(MAX_FILE_BYTES + 1).unwrap_err();
        assert!(matches!(&error, LoadError::BadModel(text) if text.contains("2147483648 bytes")), "{error}");
    }

    #[test]
    fn no_truncation_and_no_flipped_bit_panics() {
        let whole = model().bytes();
        // Without its last field, the second operator set, the file is still whole; cut anywhere else it is refused.
        assert_eq!((0..whole.len()).filter(|end| Description::read(whole.slice(..*end)).is_ok()).count(), 1);
        for offset in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.to_vec();
                flipped[offset] ^= 1 << bit;
                let _ = Description::read(flipped.into());
            }
        }
    }

    fn file(path: &str) -> Bytes {
        std::fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap().into()
    }

    fn trap(name: &str) -> Description {
        Description::read(file(&format!("tests/traps/{name}/1/model.onnx"))).unwrap()
    }

    #[test]
    fn files_of_a_real_exporter_are_described() {
        for (name, why) in [
            ("int8_dynamic", Some("DynamicQuantizeLinear couples rows")),
            ("batch_norm_training", Some("BatchNormalization in training mode couples rows")),
            ("random_noise", Some("RandomNormalLike draws random numbers")),
            ("row_coupled", Some("Softmax over axis 0 couples rows")),
            ("encoder", None),
            ("sentinel", None),
            ("logits", None),
        ] {
            assert_eq!(trap(name).couples_rows.as_deref(), why, "{name}");
        }
        for (name, kind) in [
            ("logits", OutputKind::Logits),
            ("softmaxed", OutputKind::Probabilities),
            ("sigmoid", OutputKind::BinaryProbability),
            ("zipmap", OutputKind::Labels),
            ("sentinel", OutputKind::Values),
        ] {
            assert_eq!(trap(name).output_kinds, [kind], "{name}");
        }
        assert_eq!(trap("zipmap").omitted_outputs, ["output_probability"]);
        assert_eq!(trap("external").external_files, BTreeSet::from(["weights.bin".to_owned()]));
        assert!(trap("only_seven").mentioned_sizes.contains(&7));
        assert!(trap("reverse_lstm").tract_computes_wrongly.is_some());
        assert_eq!(trap("scalar").signature.inputs[1].dims, Some(vec![]));
        let forest = Description::read(file("models/wine/1/model.onnx")).unwrap();
        assert_eq!(forest.output_kinds, [OutputKind::Labels, OutputKind::Probabilities]);
        for (name, text) in [
            ("corrupt", "not an ONNX model: failed to decode"),
            ("empty", "not an ONNX model: the file is empty"),
            ("escaping_external", "tensor \"w\" keeps its data in \"../../secret.bin\", expected the plain name"),
        ] {
            let error = Description::read(file(&format!("tests/traps_bad/{name}/1/model.onnx"))).unwrap_err();
            assert!(error.to_string().starts_with(text), "{name}: {error}");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let mut graph = Model::new().node("Neg", &["x"], &["y"]).graph();
        for _ in 0..200 {
            graph = Model::new().call("", "If", &["c"], &["y"], vec![build::graph("then_branch", graph)]).graph();
        }
        let error = Description::read(Model::of(graph).bytes()).unwrap_err();
        assert!(error.to_string().starts_with("not an ONNX model: "), "{error}");
    }
}
