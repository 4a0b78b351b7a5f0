//! Conventions as tests: who may import whom, which crate is named where, where clocks and the environment are read.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Module → what it may `use crate::`. A module may always use itself.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("units", &[]),
    ("pool", &["error"]),
    ("tensor", &["error"]),
    ("request", &["tensor", "error"]),
    ("monitor", &["request", "tensor", "error"]),
    ("backend", &["tensor", "error"]),
    ("scheduler", &["backend", "monitor", "request", "tensor", "error"]),
    ("registry", &["scheduler", "backend", "monitor", "request", "tensor", "error", "units"]),
    ("engine", &["registry", "scheduler", "monitor", "request", "tensor", "pool", "error"]),
    ("protocol", &["engine", "request", "tensor", "pool", "error"]),
    ("server", &["protocol", "engine", "registry", "scheduler", "monitor", "request", "pool", "error"]),
    ("config", &["protocol", "registry", "request", "server", "units"]),
    ("cli", &["*"]),
    ("lib", &["*"]),
    ("main", &["*"]),
];

/// External crate → the files or folders under src/ that may name it. Crates not listed may be named anywhere.
const CRATES: &[(&str, &[&str])] = &[
    ("ort", &["backend/onnxruntime"]),
    ("libloading", &["backend/onnxruntime"]),
    ("tract_onnx", &["backend/tract"]),
    ("prost", &["backend/onnx", "protocol/grpc"]),
    ("tonic", &["protocol/grpc"]),
    ("tonic_health", &["protocol/grpc"]),
    ("tonic_prost", &["protocol/grpc"]),
    ("axum", &["protocol", "server"]),
    ("hyper", &["server"]),
    ("hyper_util", &["server"]),
    ("serde", &["protocol/rest", "registry", "cli"]),
    ("serde_json", &["protocol/rest", "registry", "cli"]),
    ("toml", &["config", "registry"]),
    ("clap", &["cli"]),
    ("anyhow", &["cli"]),
    ("metrics", &["monitor"]),
    ("metrics_exporter_prometheus", &["monitor"]),
    ("arc_swap", &["registry"]),
    ("sha2", &["registry"]),
    ("flate2", &["protocol/rest"]),
    ("tokio", &["server", "engine", "scheduler", "protocol", "pool", "cli"]),
];

/// Files that may only use the standard library besides their own module.
const STD_ONLY: &[&str] = &["scheduler/batcher.rs", "units.rs"];

/// Text → the files or folders under src/ where it may stand outside tests.
const CONFINED: &[(&str, &[&str])] = &[
    ("Instant::now", &["engine", "scheduler/mod.rs", "scheduler/worker.rs", "registry", "server", "backend/fake.rs"]),
    ("SystemTime::now", &["monitor"]),
    ("std::env::", &["cli"]),
    ("println!", &["cli"]),
    ("thread::sleep", &["backend/fake.rs"]),
    ("process::exit", &["cli/serve.rs"]),
];

const FORBIDDEN: &[&str] = &["todo!", "unimplemented!", "dbg!", "FIXME", "XXX"];

struct Source {
    /// Relative to src/, with forward slashes.
    path: String,
    /// Line numbers and lines outside comments and test modules.
    lines: Vec<(usize, String)>,
}

impl Source {
    fn module(&self) -> &str {
        self.path.split(['/', '.']).next().unwrap()
    }

    fn within(&self, places: &[&str]) -> bool {
        places.iter().any(|place| {
            self.path == *place || self.path.starts_with(&format!("{place}/")) || self.path == format!("{place}.rs")
        })
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, extension, found);
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
}

fn sources() -> Vec<Source> {
    let src = root().join("src");
    let mut paths = Vec::new();
    files(&src, "rs", &mut paths);
    paths.sort();
    let sources: Vec<Source> = paths
        .iter()
        .map(|path| Source {
            path: path.strip_prefix(&src).unwrap().to_str().unwrap().replace('\\', "/"),
            lines: code_lines(&fs::read_to_string(path).unwrap()),
        })
        .filter(|source| !source.path.ends_with("/tests.rs"))
        .collect();
    assert!(sources.len() > 30, "the scan finds the sources");
    sources
}

/// Lines without comments, up to the test module that house style puts last.
fn code_lines(text: &str) -> Vec<(usize, String)> {
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.starts_with("#[cfg(test)]") {
            break;
        }
        let code = line.split("//").next().unwrap_or_default();
        if !code.trim().is_empty() {
            lines.push((index + 1, code.to_string()));
        }
    }
    lines
}

/// `name::` as a whole path segment at the start of a path.
fn names_crate(line: &str, name: &str) -> bool {
    let needle = format!("{name}::");
    line.match_indices(&needle).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
    })
}

/// Module names after `crate::` on a line, `crate::{a, b::c}` included.
fn imported(line: &str) -> Vec<String> {
    let ident = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = Vec::new();
    for (at, needle) in line.match_indices("crate::") {
        let rest = &line[at + needle.len()..];
        match rest.strip_prefix('{') {
            None => found.push(ident(rest)),
            Some(group) => {
                let mut depth = 0;
                for part in group.split_inclusive([',', '{', '}']) {
                    if depth == 0 {
                        found.push(ident(part.trim_start()));
                    }
                    match part.chars().next_back() {
                        Some('{') => depth += 1,
                        Some('}') => depth -= 1,
                        _ => {}
                    }
                }
            }
        }
    }
    found.retain(|name| !name.is_empty() && name.chars().next().is_some_and(char::is_lowercase));
    found
}

fn report(breaches: Vec<String>) {
    assert!(breaches.is_empty(), "\n{}\n", breaches.join("\n"));
}

#[test]
fn modules_import_only_from_the_layers_below() {
    let layers: BTreeMap<_, _> = LAYERS.iter().copied().collect();
    let mut breaches = Vec::new();
    for source in sources() {
        let module = source.module();
        let allowed = layers.get(module).unwrap_or_else(|| panic!("module `{module}` is in no layer"));
        for (number, line) in &source.lines {
            for used in imported(line) {
                if used != module && !allowed.contains(&"*") && !allowed.contains(&used.as_str()) {
                    breaches.push(format!("src/{}:{number}: `{module}` may not use `crate::{used}`", source.path));
                }
            }
        }
    }
    report(breaches);
}

#[test]
fn crates_are_named_only_where_they_belong() {
    let mut breaches = Vec::new();
    for source in sources() {
        for (number, line) in &source.lines {
            for (name, places) in CRATES {
                if names_crate(line, name) && !source.within(places) {
                    breaches.push(format!("src/{}:{number}: names `{name}`, allowed in {places:?}", source.path));
                }
            }
            if STD_ONLY.contains(&source.path.as_str()) && line.trim_start().starts_with("use ") {
                let path = line.trim_start().trim_start_matches("use ");
                if !path.starts_with("std::") && !path.starts_with("super::") {
                    breaches.push(format!("src/{}:{number}: may use std only", source.path));
                }
            }
        }
    }
    report(breaches);
}

#[test]
fn clocks_the_environment_and_printing_stay_where_they_belong() {
    let mut breaches = Vec::new();
    for source in sources() {
        for (number, line) in &source.lines {
            for (text, places) in CONFINED {
                let in_build = source.path == "build.rs";
                if line.contains(text) && !source.within(places) && !in_build {
                    breaches.push(format!("src/{}:{number}: `{text}`, allowed in {places:?}", source.path));
                }
            }
            for text in FORBIDDEN.iter().filter(|text| line.contains(**text)) {
                breaches.push(format!("src/{}:{number}: `{text}`", source.path));
            }
        }
    }
    report(breaches);
}

#[test]
fn every_module_says_what_it_is() {
    let src = root().join("src");
    let mut breaches = Vec::new();
    for (module, _) in LAYERS {
        let file = [src.join(format!("{module}.rs")), src.join(module).join("mod.rs")].into_iter().find(|p| p.exists());
        let text = fs::read_to_string(file.unwrap_or_else(|| panic!("layer `{module}` has no file"))).unwrap();
        if !text.starts_with("//!") {
            breaches.push(format!("src/{module}: no `//!` head"));
        }
    }
    report(breaches);
}

#[test]
fn the_scan_itself_sees_what_it_should() {
    assert_eq!(imported("use crate::{error::{Error, Kind}, tensor};"), ["error", "tensor"]);
    assert_eq!(imported("pub(crate) fn f() -> crate::request::Permit {"), ["request"]);
    assert!(names_crate("use ort::session;", "ort") && names_crate("x: ort::Y", "ort"));
    assert!(!names_crate("use support::x;", "ort") && !names_crate("crate::ort::x", "ort"));
    assert_eq!(code_lines("a // b\n// c\n#[cfg(test)]\nmod tests {").len(), 1);
}
