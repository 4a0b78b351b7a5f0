//! The command line: what each command prints and which exit code it ends with.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use crate::support::{Models, root, without_onnxruntime};

pub fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    // What is set where the tests run must not configure it.
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.args(arguments).env_clear().envs(variables.iter().copied()).output().unwrap()
}

/// A command that loads models, on this run's engine.
fn loading(command: &str, path: &Path) -> Output {
    let engine: &[&str] = if without_onnxruntime() { &["--engine", "tract"] } else { &[] };
    run(&[&[command, path.to_str().unwrap()], engine].concat(), &[])
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Fails unless the command was not usable as asked (2) and complained of each of these.
fn complains(output: &Output, complaints: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(stdout(output), "");
    for complaint in complaints {
        assert!(text.contains(complaint), "no `{complaint}` in:\n{text}");
    }
}

/// What stands behind `name` in `inspect`'s lines.
fn lines<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    text.lines()
        .filter_map(|line| line.strip_prefix("  ")?.strip_prefix(name)?.strip_prefix("  "))
        .map(str::trim)
        .collect()
}

#[test]
fn version_and_help() {
    let output = run(&["--version"], &[]);
    assert_eq!((output.status.code(), stdout(&output)), (Some(0), format!("tidegate {}\n", env!("CARGO_PKG_VERSION"))));
    let output = run(&["--help"], &[]);
    assert_eq!(output.status.code(), Some(0));
    for command in ["serve", "infer", "inspect", "validate"] {
        assert!(stdout(&output).contains(command), "{}", stdout(&output));
    }
}

#[test]
fn a_loaded_engine_leaves_nothing_in_the_home_folder() {
    let home = tempfile::tempdir().unwrap();
    let models = root().join("models/wine");
    let engine = if without_onnxruntime() { "tract" } else { "onnxruntime" };
    let arguments = ["validate", models.to_str().unwrap(), "--engine", engine];
    // Where tests run, `CI` may be set, which switches its telemetry off by itself: it is not handed on.
    let output = run(&arguments, &[("HOME", home.path().to_str().unwrap())]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
}

#[test]
fn inspect_shows_signature_engine_batching_and_threads() {
    let output = loading("inspect", &root().join("models/digits"));
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    let heads: Vec<&str> = text.lines().filter(|line| !line.starts_with(' ')).collect();
    assert_eq!(heads, ["digits version 1", "digits version 2"]);
    assert_eq!(lines(&text, "input"), ["image FP32 [-1,64]"; 2]);
    assert_eq!(lines(&text, "output"), ["probabilities FP32 [-1,10]  (probabilities, 10 labels)"; 2]);
    let engine = if without_onnxruntime() { "tract " } else { "onnxruntime " };
    let expected = [
        ("engine", engine),
        ("batching", "on, up to "),
        ("threads", ""),
        ("wide", "o"),
        ("costs", "a row "),
        ("digest", "sha256:"),
    ];
    for (name, start) in expected {
        let found = lines(&text, name);
        assert!(found.len() == 2 && found.iter().all(|line| line.starts_with(start)), "{name}: {found:?}");
    }
    assert!(lines(&text, "batching").iter().all(|line| line.contains("self-test")), "no reason in:\n{text}");
}

#[test]
fn inspect_says_why_a_model_is_not_batched_or_not_servable() {
    let output = loading("inspect", &root().join("tests/traps/mean_centred"));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let batching = stdout(&output);
    let batching = lines(&batching, "batching");
    assert!(batching[0].starts_with("off: ") && batching[0].len() > "off: ".len(), "{batching:?}");
    let output = loading("inspect", &root().join("tests/traps_bad/corrupt"));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stdout(&output).contains("not servable"), "{}", stdout(&output));
}

#[test]
fn validate_counts_the_golden_cases_that_agree() {
    let models = ["digits", "tumor", "diabetes", "wine"].into_iter().fold(Models::new(), Models::with);
    let versions = 5;
    let output = loading("validate", models.path());
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}{}", stderr(&output));
    assert_eq!(text.lines().last(), Some(&*format!("{versions} passed, 0 failed")));
    let verdicts: Vec<&str> =
        text.lines().filter(|line| line.starts_with("ok ") && line.ends_with("golden cases agree")).collect();
    assert_eq!(verdicts.len(), versions, "{text}");
    assert!(verdicts.iter().all(|line| !line.contains(" 0 golden")), "{text}");
}

#[test]
fn validate_names_the_model_and_the_case_that_disagrees() {
    let models = Models::new().with("tumor").with("diabetes");
    let mut file = std::fs::read(models.path().join("tumor/1/model.onnx")).unwrap();
    // The bias of the second class: its name, the field's tag and length, two floats; the sign is in the last byte.
    let name = b"bias0\x4a\x08";
    let at = file.windows(name.len()).rposition(|window| window == name).expect("the bias") + name.len();
    file[at + 7] ^= 0x80;
    models.write("tumor/1/model.onnx", &file);
    let output = loading("validate", models.path());
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{text}{}", stderr(&output));
    let failed: Vec<&str> = text.lines().filter(|line| line.starts_with("FAILED")).collect();
    assert!(failed.len() == 1 && failed[0].contains("tumor 1") && failed[0].contains("case `"), "{text}");
    assert!(text.contains("ok      diabetes 1") && text.ends_with("1 passed, 1 failed\n"), "{text}");
}

#[test]
fn validate_needs_a_registry_with_models() {
    let empty = Models::new();
    complains(&loading("validate", empty.path()), &["tidegate: "]);
    complains(&loading("validate", &empty.path().join("nowhere")), &["nowhere"]);
}

#[test]
fn configuration_errors_come_all_at_once_before_a_port_is_bound() {
    let models = Models::new();
    models.write("tidegate.toml", "http_prot = 1\n\n[limits]\nbody = \"lots\"\n");
    let config = models.path().join("tidegate.toml");
    // Taken: a server that came as far as binding would complain of it.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let arguments = [
        "serve",
        "--config",
        config.to_str().unwrap(),
        "--metrics-port",
        &port,
        "--grpc-port",
        "70000",
        "--log-format",
        "yaml",
    ];
    let output = run(&arguments, &[("TIDEGATE_LAME_DUCK", "soon")]);
    complains(
        &output,
        &[
            "6 problems in the configuration",
            "--grpc-port: found `70000`, expected a port from 0 to 65535",
            "--log-format: found `yaml`, expected `text` or `json`",
            "TIDEGATE_LAME_DUCK: found `soon`, expected ",
            "tidegate.toml:1: http_prot: found an unknown key, expected a known one; perhaps `http_port`",
            "tidegate.toml:4: limits.body: found `lots`, expected ",
            "--registry: found nothing, expected a folder of models",
        ],
    );
    assert!(!stderr(&output).contains("listen"), "{}", stderr(&output));
}

#[test]
fn serve_says_what_keeps_it_from_starting() {
    complains(&run(&["serve"], &[]), &["1 problem in the configuration", "--registry: found nothing"]);
    complains(&run(&["serve", "--regsitry", "models"], &[]), &["--regsitry", "--registry"]);
    let problems = ["2 problems", "/nowhere.toml: found no readable file (", "--http-port: found `x`"];
    let arguments = ["serve", "--registry", "models", "--config", "/nowhere.toml", "--http-port", "x"];
    complains(&run(&arguments, &[]), &problems);
    complains(&run(&["serv"], &[]), &["serv", "serve"]);
    complains(&run(&[], &[]), &["Usage"]);

    let models = Models::new().with("tumor");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let registry = models.path().to_str().unwrap();
    let free = ["--grpc-port", "0", "--metrics-port", "0", "--admin-port", "0"];
    let arguments =
        [&["serve", "--registry", registry, "--host", "127.0.0.1", "--http-port", &port][..], &free].concat();
    complains(&run(&arguments, &[]), &[&format!("cannot listen on 127.0.0.1:{port} for HTTP")]);
}
