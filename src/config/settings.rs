use std::fmt::Write;

/// One thing that can be set. Its file key is `key`, its variable `TIDEGATE_` and the key in capitals (dots become
/// underscores), its flag, where it has one, `--` and the key with hyphens.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    pub key: &'static str,
    pub flag: bool,
    /// Empty: no value.
    pub default: &'static str,
    pub about: &'static str,
}

impl Setting {
    pub fn variable(&self) -> String {
        format!("TIDEGATE_{}", self.key.replace('.', "_").to_uppercase())
    }

    pub fn flag_name(&self) -> String {
        format!("--{}", self.key.replace('_', "-"))
    }
}

const fn flag(key: &'static str, default: &'static str, about: &'static str) -> Setting {
    Setting { key, flag: true, default, about }
}

const fn file_only(key: &'static str, default: &'static str, about: &'static str) -> Setting {
    Setting { key, flag: false, default, about }
}

pub static SETTINGS: &[Setting] = &[
    flag("registry", "", "the folder of models to serve, or one `.onnx` file"),
    flag("model_name", "model", "what a bare `model.onnx` is called"),
    flag(
        "model_control",
        "poll",
        "which models are served: `poll`: all that are in the registry, as they come, change and go; `none`: all that are there at start, as they are then; `explicit`: those of `load_model`, and those that clients ask to load",
    ),
    flag(
        "load_model",
        "",
        "names of models that `model_control = explicit` loads at start, with commas between, so that none can be named whose own name has one; `*`: all that are there. The flag may be repeated",
    ),
    flag(
        "repository_api",
        "false",
        "whether models may be loaded and unloaded over the data ports, too, and not over the admin port only",
    ),
    flag("host", "0.0.0.0", "address that HTTP, gRPC and metrics listen on"),
    flag("http_port", "8000", "port of the REST API; 0 picks a free one"),
    flag("grpc_port", "8001", "port of the gRPC API; 0 picks a free one"),
    flag("metrics_port", "8002", "port of `/metrics`, `/livez` and `/readyz`; 0 picks a free one"),
    flag("admin_port", "8003", "port of the admin API; 0 picks a free one"),
    flag(
        "cache_dir",
        "",
        "folder that model files are copied to and loaded from, in a private folder that is removed at exit, and where what was measured of models is remembered for the next start, in `remembered`. By default copies lie in the system's temporary folder, and `remembered` in `$XDG_CACHE_HOME/tidegate` or `$HOME/.cache/tidegate`; `none`: nothing is remembered",
    ),
    flag("log_format", "text", "`text` for people, `json` for machines: one object a line"),
    file_only("log_level", "info", "`error`, `warn`, `info`, `debug` or `trace`"),
    file_only("admin_host", "127.0.0.1", "address that the admin API listens on; only a loopback address is allowed"),
    file_only(
        "engine",
        "auto",
        "`auto`: onnxruntime where its library is found and loads, else tract; or one by name, whose absence is then an error",
    ),
    file_only("onnxruntime", "", "path of ONNX Runtime's library; otherwise `ORT_DYLIB_PATH`, then beside the binary"),
    file_only(
        "calibration",
        "true",
        "whether runs of a model on the CPU are timed when it is loaded, for 0.3 s and nine runs of one row at most, so that its first requests find it tuned; what was found is remembered in `cache_dir`",
    ),
    file_only(
        "poll_interval",
        "2s",
        "how often the registry is looked at: with `poll` for changes, with `explicit` for the names of models that may be loaded",
    ),
    file_only(
        "monitoring",
        "true",
        "whether requests, batches and predictions are measured; without it `/metrics` tells what is loaded, refused and in flight, and statistics stay 0",
    ),
    file_only("strict_readiness", "false", "ready only if no version has failed"),
    file_only("io_threads", "0", "threads that accept, parse and respond; 0: as many as cores, at most 4"),
    file_only("lame_duck", "1s", "how long to go on serving, not ready, after being told to stop"),
    file_only(
        "drain_timeout",
        "25s",
        "how long what was accepted may take to finish when stopping, or when a version is retired",
    ),
    file_only("limits.connections", "4096", "open connections per data port"),
    file_only("limits.requests", "4096", "requests in the server at once"),
    file_only(
        "limits.request_bytes",
        "512MiB",
        "bytes of requests and answers in the server at once, beyond which no more are admitted",
    ),
    file_only("limits.body", "64MiB", "one request body, or gRPC message, before and after decompression"),
    file_only("limits.answer", "256MiB", "one answer, as tensors and as text"),
    file_only("limits.json_header", "1MiB", "the JSON part of a request with binary tensors"),
    file_only("limits.streams", "256", "concurrent HTTP/2 streams per connection"),
    file_only(
        "limits.stream_requests",
        "64",
        "requests of one gRPC stream in the server at once; no more are read until one is answered",
    ),
    file_only("timeouts.header", "10s", "how long a client may take to begin to speak, and to send a request's head"),
    file_only("timeouts.idle", "75s", "how long an HTTP/1 connection may be idle; longer than proxies keep theirs"),
    file_only(
        "timeouts.write",
        "30s",
        "how long a client may take nothing (less than about 128 KiB) of an answer that is ready for it; then its connection takes no new requests, and is cut after as long again",
    ),
    file_only("timeouts.body", "30s", "how long a client may take to send a request's body"),
    file_only(
        "timeouts.load",
        "10m",
        "how long a client that asks to load or unload a model is kept waiting for the outcome; the work goes on",
    ),
];

pub fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// The text of docs/configuration.md.
pub fn reference() -> String {
    let mut out = String::from(
        "# Configuration\n\n<!-- Generated from src/config/settings.rs; `TIDEGATE_BLESS=1 cargo test --release` rewrites it. -->\n\n\
         Nothing has to be configured but the registry. A flag wins over an environment variable, that over `tidegate.toml`\n\
         (`--config FILE`, or `TIDEGATE_CONFIG`), that over the default. All problems are reported at once, before a port is bound.\n\
         Durations are written `250us`, `2ms`, `1.5s`, `10m`; sizes `512KiB`, `64MiB`.\n\n\
         | key in `tidegate.toml` | flag | variable | default | what it is |\n| --- | --- | --- | --- | --- |\n",
    );
    for setting in SETTINGS {
        let flag = if setting.flag { format!("`{}`", setting.flag_name()) } else { String::new() };
        let default = if setting.default.is_empty() { String::new() } else { format!("`{}`", setting.default) };
        // Writing to a String cannot fail.
        let _ =
            writeln!(out, "| `{}` | {flag} | `{}` | {default} | {} |", setting.key, setting.variable(), setting.about);
    }
    out.push_str("\nA dot in a key is a table: `limits.body` is `body` under `[limits]`.\n");
    let model = crate::registry::MODEL_TOML_REFERENCE;
    let _ = write!(
        out,
        "\n## `model.toml`\n\nBeside a model's versions, for that model. Every key with its default or an example:\n\n```toml\n{model}```\n"
    );
    let _ = write!(out, "\n## `config.pbtxt`\n\n{}", crate::registry::CONFIG_PBTXT_REFERENCE);
    out
}
