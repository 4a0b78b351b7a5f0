//! Conventions as tests: who may import whom, which crate is named where, where clocks and the environment are read.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Module → what it may `use crate::`. A module may always use itself.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("units", &[]),
    ("problem", &[]),
    ("pool", &["error"]),
    ("tensor", &["error"]),
    ("request", &["tensor", "error"]),
    ("monitor", &["request", "tensor", "error"]),
    ("backend", &["tensor", "error", "problem"]),
    ("scheduler", &["backend", "monitor", "request", "tensor", "error"]),
    ("registry", &["scheduler", "backend", "monitor", "request", "tensor", "error", "units", "problem"]),
    ("engine", &["registry", "scheduler", "monitor", "request", "tensor", "pool", "error"]),
    ("protocol", &["engine", "request", "tensor", "pool", "error"]),
    ("server", &["protocol", "engine", "registry", "scheduler", "monitor", "request", "pool", "error"]),
    ("config", &["protocol", "registry", "request", "server", "units", "problem"]),
    ("cli", &["*"]),
    ("lib", &["*"]),
    ("main", &["*"]),
];

/// Dependency → the files or folders under src/ that may name it. Every dependency stands here or in [`ANYWHERE`].
const CRATES: &[(&str, &[&str])] = &[
    ("ort", &["backend/onnxruntime"]),
    ("libloading", &["backend/onnxruntime", "backend/gpus.rs"]),
    ("tract_onnx", &["backend/tract"]),
    ("candle_core", &["backend/candle"]),
    ("gemm", &["backend/candle"]),
    ("rayon", &["backend/candle"]),
    ("prost", &["backend/onnx", "protocol/grpc", "protocol/rest/triton.rs", "cli/client/grpc.rs"]),
    ("prost_reflect", &["protocol/rest/triton.rs", "registry/pbtxt.rs"]),
    ("miette", &["registry/pbtxt.rs"]),
    ("tonic", &["protocol/grpc", "cli/client/grpc.rs", "cli/bench/http2.rs"]),
    ("tonic_health", &["protocol/grpc"]),
    ("tonic_prost", &["protocol/grpc"]),
    ("tonic_reflection", &["protocol/grpc"]),
    ("futures_util", &["protocol/grpc/stream"]),
    ("axum", &["protocol", "server"]),
    ("h2", &["cli/bench/http2.rs"]),
    ("hdrhistogram", &["cli/bench"]),
    ("httparse", &["cli/bench/http1.rs"]),
    ("hyper", &["server", "cli/client", "cli/bench/echo.rs"]),
    ("hyper_util", &["server", "cli/client", "cli/bench/echo.rs"]),
    ("socket2", &["server"]),
    ("serde", &["backend/safetensors", "protocol/rest", "registry", "cli"]),
    ("serde_json", &["backend/safetensors", "protocol/rest", "registry", "tensor/json.rs", "cli"]),
    ("toml", &["config", "registry"]),
    ("clap", &["cli"]),
    ("anyhow", &["cli"]),
    ("metrics", &["monitor"]),
    ("metrics_exporter_prometheus", &["monitor"]),
    ("arc_swap", &["registry"]),
    ("sha2", &["registry"]),
    ("flate2", &["protocol/rest"]),
    ("tokio", &["server", "engine", "scheduler", "protocol", "pool", "cli"]),
    ("tower", &["protocol/grpc", "protocol/service.rs", "cli/client/grpc.rs"]),
    ("tracing_subscriber", &["cli"]),
    ("uuid", &["engine", "registry"]),
    ("http", &["protocol", "cli/client", "cli/bench"]),
    ("http_body", &["protocol", "server"]),
    ("http_body_util", &["protocol", "cli/client/rest.rs", "cli/bench/echo.rs"]),
    ("bytes", &["tensor", "backend", "protocol", "server", "cli/client", "cli/bench"]),
    ("half", &["tensor", "backend", "monitor/distribution", "registry", "protocol", "cli/client/elements.rs"]),
    ("fast_float2", &["tensor/number.rs"]),
    ("bytemuck", &["tensor", "backend/onnxruntime", "backend/candle"]),
];

/// Dependencies that every module may name.
const ANYWHERE: &[&str] = &["thiserror", "tracing"];

/// Files that may only use the standard library besides their own module.
const STD_ONLY: &[&str] = &["scheduler/batcher.rs", "scheduler/fair.rs", "units.rs", "problem.rs"];

/// Text → the files or folders under src/ where it may stand outside tests.
const CONFINED: &[(&str, &[&str])] = &[
    (
        "Instant::now",
        &[
            "engine",
            "scheduler/gate.rs",
            "scheduler/inline.rs",
            "scheduler/mod.rs",
            "scheduler/worker.rs",
            "registry",
            "server",
            "cli/bench",
        ],
    ),
    // How long files have been on disk is told by the wall clock.
    ("SystemTime::now", &["monitor", "cli/surroundings.rs", "registry/remembered.rs"]),
    ("std::env::", &["cli"]),
    ("println!", &["cli"]),
    ("thread::sleep", &[]),
    ("process::exit", &[]),
];

const FORBIDDEN: &[&str] = &["todo!", "unimplemented!", "dbg!", "FIXME", "XXX"];

struct Source {
    /// Relative to src/, with forward slashes.
    path: String,
    /// Line numbers and lines outside comments and test code.
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

/// Lines without comments and without the items that are compiled for tests only.
fn code_lines(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        if line.trim_start().starts_with("#[cfg(test)]") {
            skip_item(indent(line), lines.by_ref().map(|(_, line)| line));
        } else if !code(line).is_empty() {
            found.push((index + 1, code(line).to_string()));
        }
    }
    found
}

/// Steps over the item behind an attribute, as rustfmt sets it: to the brace at the attribute's own indent that closes
/// it, or to its end on a line of its own where it opens none.
fn skip_item<'a>(at: usize, lines: impl Iterator<Item = &'a str>) {
    let mut opened = false;
    for line in lines {
        let (own, code) = (indent(line) == at, code(line));
        let ends = if opened { own && code.trim_start().starts_with('}') } else { code.ends_with(';') };
        if ends || (own && !opened && code.ends_with([',', '}'])) {
            return;
        }
        opened |= own && code.ends_with('{');
    }
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// A line up to its comment.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default().trim_end()
}

/// Every path in the code (`a::b`) with the number of its line; `use` trees, over however many lines, by their leaves.
fn paths(lines: &[(usize, String)]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut lines = lines.iter();
    while let Some((number, line)) = lines.next() {
        let Some(tree) = use_tree(line) else {
            let words = line.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
            found.extend(words.filter(|word| word.contains("::")).map(|path| (*number, path.to_string())));
            continue;
        };
        let mut tree = tree.to_string();
        while !tree.contains(';') {
            let Some((_, more)) = lines.next() else { break };
            tree.push_str(more);
        }
        found.extend(leaves(tree.trim_end_matches(';')).into_iter().map(|path| (*number, path)));
    }
    found
}

/// What follows `use` on a line that begins a `use` statement.
fn use_tree(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let line = match line.strip_prefix("pub") {
        Some(scope) if scope.starts_with('(') => scope.split_once(')')?.1,
        Some(rest) => rest,
        None => line,
    };
    line.trim_start().strip_prefix("use ")
}

/// `a::{b, c::{d as e}}` → `a::b`, `a::c::d`.
fn leaves(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((stem, group)) = tree.split_once('{') else {
        return vec![tree.split_whitespace().next().unwrap_or_default().to_string()];
    };
    let mut depth = 0;
    let parts = group.strip_suffix('}').unwrap_or(group).split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    parts.filter(|part| !part.trim().is_empty()).flat_map(leaves).map(|leaf| format!("{stem}{leaf}")).collect()
}

/// The top-level module to which a path leads by `crate` or `super` from the file at `place`; `*` for the crate itself.
fn module_reached(place: &str, path: &str) -> Option<String> {
    let depth = place.trim_end_matches(".rs").split('/').filter(|part| !["mod", "lib", "main"].contains(part)).count();
    let segments: Vec<&str> = path.split("::").skip_while(|segment| *segment == "self").collect();
    let supers = segments.iter().take_while(|segment| **segment == "super").count();
    let steps = match segments.first() {
        Some(&"crate") => 1,
        _ if supers > 0 && supers >= depth => supers,
        _ => return None,
    };
    let name = segments.get(steps).filter(|name| **name != "self").unwrap_or(&"*");
    Some(name.to_string())
}

/// Whether a path begins in that dependency.
fn names_crate(path: &str, name: &str) -> bool {
    path.trim_start_matches("::").split("::").next() == Some(name)
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
        for (number, path) in paths(&source.lines) {
            let Some(used) = module_reached(&source.path, &path) else { continue };
            if used != module && !allowed.contains(&"*") && !allowed.contains(&used.as_str()) {
                breaches.push(format!("src/{}:{number}: `{module}` may not use `crate::{used}`", source.path));
            }
        }
    }
    report(breaches);
}

#[test]
fn crates_are_named_only_where_they_belong() {
    let mut breaches = Vec::new();
    for source in sources() {
        let std_only = STD_ONLY.contains(&source.path.as_str());
        for (number, path) in paths(&source.lines) {
            for (name, places) in CRATES {
                if names_crate(&path, name) && !source.within(places) {
                    breaches.push(format!("src/{}:{number}: names `{name}`, allowed in {places:?}", source.path));
                }
            }
            let outside = module_reached(&source.path, &path).is_some_and(|used| used != source.module())
                || CRATES.iter().map(|(name, _)| name).chain(ANYWHERE).any(|name| names_crate(&path, name));
            if std_only && outside {
                breaches.push(format!("src/{}:{number}: `{path}`, but it may use std only", source.path));
            }
        }
    }
    report(breaches);
}

#[test]
fn every_dependency_has_its_place() {
    let manifest: toml::Table = fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let mut declared: Vec<_> =
        manifest["dependencies"].as_table().unwrap().keys().map(|name| name.replace('-', "_")).collect();
    let mut placed: Vec<_> = CRATES.iter().map(|(name, _)| name).chain(ANYWHERE).map(ToString::to_string).collect();
    declared.sort();
    placed.sort();
    assert_eq!(declared, placed, "Cargo.toml's [dependencies], and CRATES with ANYWHERE");
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
    let found = |text: &str| paths(&code_lines(text)).into_iter().map(|(_, path)| path).collect::<Vec<_>>();
    assert_eq!(
        found("use crate::{error::{Error, Kind}, tensor};"),
        ["crate::error::Error", "crate::error::Kind", "crate::tensor"]
    );
    assert_eq!(
        found("pub(crate) use crate::{\n    error,\n    units as u, // why\n};"),
        ["crate::error", "crate::units"]
    );
    assert_eq!(found("use super::{super::scheduler, x};\nlet y = 1;"), ["super::super::scheduler", "super::x"]);
    assert_eq!(found("pub(crate) fn f(x: ort::Y) -> crate::request::Permit {"), ["ort::Y", "crate::request::Permit"]);
    assert_eq!(paths(&code_lines("\nuse a::{\nb,\n};\nc::d"))[1].0, 5, "lines are counted");

    let reached = |place, path| module_reached(place, path).unwrap_or_default();
    assert_eq!(reached("engine/mod.rs", "crate::registry::Table"), "registry");
    assert_eq!(reached("protocol/rest/body.rs", "super::super::super::scheduler"), "scheduler");
    assert_eq!(reached("protocol/rest/mod.rs", "self::super::super::scheduler::x"), "scheduler");
    assert_eq!(reached("pool.rs", "super::engine"), "engine");
    assert_eq!(reached("protocol/rest/body.rs", "super::super::status"), "");
    assert_eq!(reached("engine/trace.rs", "Error::invalid"), "");
    for whole in ["crate", "crate::*", "crate::self", "super::super"] {
        assert_eq!(reached("engine/trace.rs", whole), "*", "{whole}");
    }

    assert!(["ort::session", "::ort::session", "ort"].iter().all(|path| names_crate(path, "ort")));
    assert!(["support::x", "crate::ort::x", "orte"].iter().all(|path| !names_crate(path, "ort")));
    assert_eq!(code_lines("a // b\n// c\n#[cfg(test)]\nmod tests {\n    b\n}\n").len(), 1);
    for item in [
        "mod tests;",
        "use a::{\n    b,\n};",
        "pub fn f(\n    a: B,\n) -> C {\n    if a {\n        b;\n    }\n}",
        "#[allow(x, reason = \"a\")]\nmod tests {\n    fn f() {\n    }\n}",
        "const A: &str =\n    \"a\";",
        "field: A,",
        "fn f() {}",
    ] {
        let text = format!("#[cfg(test)]\n{item}\nort::seen;");
        let nested = format!("impl A {{\n    #[cfg(test)]\n    {}\n    ort::seen;\n}}", item.replace('\n', "\n    "));
        assert_eq!(found(&text), ["ort::seen"], "{text}");
        assert_eq!(found(&nested), ["ort::seen"], "{nested}");
    }
    let scheduler = sources().into_iter().find(|source| source.path == "scheduler/mod.rs").expect("the scheduler");
    assert!(scheduler.lines.iter().any(|(_, line)| line.contains("impl Scheduler")), "it is read past its first lines");
}
