//! Where weights outside the model file lie.
//!
//! Locations are checked here, before any engine sees the file: engines have followed `..` and absolute paths, and
//! ONNX Runtime has read memory addresses out of them.

use std::collections::BTreeSet;

use super::graph::Index;
use super::proto::{SparseTensorProto, TensorProto};
use super::{LoadError, bad};
use crate::error::quoted;

/// The names of all external files, each a plain file name.
pub(super) fn files(index: &Index) -> Result<BTreeSet<String>, LoadError> {
    let attributes = || index.nodes.iter().flat_map(|node| &node.attribute);
    let sparse = index.graphs.iter().flat_map(|graph| &graph.sparse_initializer);
    let sparse = sparse.chain(attributes().flat_map(|a| a.sparse_tensor.iter().chain(&a.sparse_tensors)));
    let dense = index.graphs.iter().flat_map(|graph| &graph.initializer);
    let dense = dense.chain(attributes().flat_map(|a| a.t.iter().chain(&a.tensors)));
    let mut files = BTreeSet::new();
    for tensor in dense.chain(sparse.flat_map(parts)) {
        if tensor.data_location != 0 || !tensor.external_data.is_empty() {
            files.extend(locations(tensor)?);
        }
    }
    Ok(files)
}

fn parts(sparse: &SparseTensorProto) -> impl Iterator<Item = &TensorProto> {
    sparse.values.iter().chain(&sparse.indices)
}

/// All locations are checked, not one: engines differ in which of several they take.
fn locations(tensor: &TensorProto) -> Result<Vec<String>, LoadError> {
    let name = quoted(&tensor.name);
    let mut files = Vec::new();
    for entry in &tensor.external_data {
        match entry.key.as_str() {
            "location" => files.push(file_name(&entry.value).map_err(|reason| {
                bad(format!("tensor {name:?} keeps its data in {:?}, {reason}", quoted(&entry.value)))
            })?),
            "offset" | "length" if entry.value.parse::<u64>().is_err() => {
                let (key, value) = (&entry.key, quoted(&entry.value));
                return Err(bad(format!("tensor {name:?} has external data of {key} {value:?}, expected a number")));
            }
            _ => {}
        }
    }
    if files.is_empty() {
        return Err(bad(format!("tensor {name:?} keeps its data in another file and does not say which")));
    }
    Ok(files)
}

/// A plain file name, with or without `./` before it; otherwise the reason why it is none.
fn file_name(location: &str) -> Result<String, &'static str> {
    let name = location.strip_prefix("./").unwrap_or(location);
    match name {
        "" | "." => Err("which names no file"),
        ".." => Err("which lies outside the model's folder"),
        // A backslash and a drive are harmless here and a path elsewhere: no file should mean two things.
        name if name.contains(['/', '\\', ':']) => Err("expected the plain name of a file beside the model"),
        name if name.chars().any(char::is_control) => Err("which holds control characters"),
        name => Ok(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use crate::backend::onnx::Description;
    use crate::backend::onnx::build::{FLOAT, Model, graph, tensor};

    fn read(model: Model) -> Result<Vec<String>, String> {
        let model = model.input("x", FLOAT, &["n"]).node("Identity", &["x"], &["y"]).output("y", FLOAT, &["n"]);
        Description::read(model.bytes())
            .map(|description| description.external_files.into_iter().collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn plain_names_are_collected_from_everywhere() {
        let inner = Model::new().external("inner", &[("location", "c")]).graph();
        let constant = tensor(Model::new().external("t", &[("location", "./d.bin"), ("length", "8")]));
        let model = Model::new()
            .external("w", &[("location", "a.bin"), ("offset", "4096"), ("length", "8"), ("checksum", "")])
            .external("v", &[("location", "a.bin")])
            .call("", "Constant", &[], &["k"], vec![constant])
            .call("", "If", &["x"], &["z"], vec![graph("then_branch", inner)]);
        assert_eq!(read(model).unwrap(), ["a.bin", "c", "d.bin"]);
    }

    #[test]
    fn nothing_outside_the_folder_and_nothing_ambiguous() {
        for location in [
            "../x",
            "/etc/passwd",
            "a/../../x",
            "a/x",
            "..\\x",
            "C:x",
            "//proc/self/environ",
            "file:///x",
            "a\0b",
            "",
            ".",
            "..",
            "./",
            "./..",
            "*/_ORT_MEM_ADDR_/*",
        ] {
            let error = read(Model::new().external("weights", &[("location", location)])).unwrap_err();
            assert!(error.starts_with("tensor \"weights\" keeps its data in"), "{location:?}: {error}");
            assert!(!error.contains('\0'));
        }
        let second = read(Model::new().external("w", &[("location", "good"), ("location", "../bad")]));
        assert!(second.is_err());
        assert!(read(Model::new().external("w", &[("offset", "0")])).unwrap_err().contains("does not say which"));
        let offset = read(Model::new().external("w", &[("location", "a"), ("offset", "-1")])).unwrap_err();
        assert_eq!(offset, "tensor \"w\" has external data of offset \"-1\", expected a number");
    }
}
