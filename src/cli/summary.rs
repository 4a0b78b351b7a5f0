//! What a person reads when the server is ready.

use std::net::SocketAddr;

use crate::engine::{Engine, IndexEntry, ModelInfo};
use crate::server::Addresses;
use crate::tensor::{DataType, Dim, Shape, TensorSpec};

/// Largest invented request that a line to try may hold, in elements.
const MAX_TRIED_ELEMENTS: usize = 64;

/// Models, versions, engines, ports and a line to try. `bold` on a terminal that shows it.
pub(super) fn text(addresses: &Addresses, engine: &Engine, bold: bool) -> String {
    let strong = |text: &str| if bold { format!("\x1b[1m{text}\x1b[0m") } else { text.to_string() };
    let mut out = format!("\n{}\n\n", strong(&format!("Tidegate {} is ready", env!("CARGO_PKG_VERSION"))));
    out.push_str(&table(&models(engine)));
    let Addresses { http, grpc, metrics, admin } = addresses;
    out.push_str(&format!(
        "\n  REST     http://{http}\n  gRPC     {grpc}\n  metrics  http://{metrics}/metrics\n  admin    http://{admin}\n"
    ));
    if let Some(line) = line_to_try(addresses, engine) {
        out.push_str(&format!("\n{}\n  {line}\n", strong("Try")));
    }
    out
}

/// A row per model that serves, and one per version that does not.
fn models(engine: &Engine) -> Vec<[String; 4]> {
    let mut rows = vec![["model", "versions", "engine", "batching"].map(String::from)];
    for info in infos(engine) {
        let property =
            |key: &str| info.properties.iter().find(|(k, _)| *k == key).map_or("", |(_, value)| value.as_str());
        let versions: Vec<String> = info.versions.iter().map(ToString::to_string).collect();
        let backend = format!("{} {}, {}", property("backend"), property("backend_version"), property("device"));
        rows.push([info.name.to_string(), versions.join(", "), backend, property("batching").to_string()]);
    }
    for IndexEntry { name, version, state, reason } in engine.index() {
        match version {
            Some(version) if state == "UNAVAILABLE" => {
                rows.push([name.to_string(), version.to_string(), format!("not serving: {reason}"), String::new()]);
            }
            None => rows.push([name.to_string(), String::new(), "not loaded".into(), String::new()]),
            Some(_) => {}
        }
    }
    rows
}

fn table(rows: &[[String; 4]]) -> String {
    // The engine's column is the last whose width matters, and a long reason must not push the others away.
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let engine_width =
        rows.iter().filter(|row| !row[3].is_empty()).map(|row| row[2].chars().count()).max().unwrap_or(0);
    let (name, versions) = (width(0), width(1));
    let line = |row: &[String; 4]| {
        let [model, version, engine, batching] = row;
        format!("  {model:name$}  {version:versions$}  {engine:engine_width$}  {batching}").trim_end().to_string()
            + "\n"
    };
    rows.iter().map(line).collect()
}

/// A request that works as it stands: an inference with invented numbers where it is short, metadata otherwise.
pub(super) fn line_to_try(addresses: &Addresses, engine: &Engine) -> Option<String> {
    let url = format!("http://{}/v2/models", authority(addresses.http));
    let infos = infos(engine);
    let tried = infos.iter().filter_map(|info| Some((request(info)?, info))).min_by_key(|(body, _)| body.len());
    match tried {
        Some((body, info)) => Some(format!("curl '{url}/{}/infer' -d '{body}'", segment(&info.name))),
        None => infos.first().map(|info| format!("curl '{url}/{}'", segment(&info.name))),
    }
}

/// Where a person on this machine reaches that address, as a URL has it.
fn authority(address: SocketAddr) -> String {
    if address.ip().is_unspecified() { format!("localhost:{}", address.port()) } else { address.to_string() }
}

/// A name as one segment of a URL's path, without anything that ends a shell's quotes.
pub(super) fn segment(name: &str) -> String {
    let mut segment = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => segment.push(char::from(byte)),
            _ => segment.push_str(&format!("%{byte:02X}")),
        }
    }
    segment
}

fn infos(engine: &Engine) -> Vec<ModelInfo> {
    engine.models().iter().filter_map(|model| engine.model(model, None).ok()).collect()
}

fn request(info: &ModelInfo) -> Option<String> {
    let inputs: Option<Vec<String>> = info.signature.inputs.iter().map(input).collect();
    Some(format!("{{\"inputs\":[{}]}}", inputs?.join(",")))
}

/// Ones in the shape of the input. `None` where that would be long, or the name would need escapes.
fn input(spec: &TensorSpec) -> Option<String> {
    let (shape, data) = ones(spec)?;
    let plain_name = spec.name.chars().all(|c| c.is_ascii_alphanumeric() || "_-./:".contains(c));
    plain_name.then(|| {
        let (name, dtype) = (&spec.name, spec.dtype);
        format!("{{\"name\":\"{name}\",\"shape\":{shape},\"datatype\":\"{dtype}\",\"data\":[{data}]}}")
    })
}

/// An invented input: a shape with one for each free dimension, and its elements as JSON, all alike, with commas
/// between. `None` where that would be long, or the rank is unknown.
pub(super) fn ones(spec: &TensorSpec) -> Option<(Shape, String)> {
    let dims = spec.dims.as_ref()?.iter().map(|dim| match dim {
        Dim::Fixed(extent) => *extent,
        Dim::Free(_) => 1,
    });
    let shape = Shape::new(dims.collect::<Vec<_>>()).ok()?;
    let one = match spec.dtype {
        DataType::Bool => "true",
        DataType::Bytes => "\"a\"",
        _ => "1",
    };
    let elements = shape.elements();
    (elements <= MAX_TRIED_ELEMENTS).then(|| (shape, vec![one; elements].join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_to_try_reaches_the_server_over_any_address() {
        let authority = |address: &str| authority(address.parse().unwrap());
        assert_eq!(authority("0.0.0.0:8000"), "localhost:8000");
        assert_eq!(authority("[::]:8000"), "localhost:8000");
        assert_eq!(authority("127.0.0.1:80"), "127.0.0.1:80");
        assert_eq!(authority("[::1]:8000"), "[::1]:8000");
    }

    #[test]
    fn names_are_data_to_the_shell_and_one_segment_to_the_server() {
        assert_eq!(segment("bert-base_v1.2"), "bert-base_v1.2");
        assert_eq!(segment("my model"), "my%20model");
        assert_eq!(segment("$(cmd);'`&|<>?#[]{}%"), "%24%28cmd%29%3B%27%60%26%7C%3C%3E%3F%23%5B%5D%7B%7D%25");
        assert_eq!(segment("é"), "%C3%A9");
    }
}
