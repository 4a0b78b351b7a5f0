//! From texts to each module's `Config`.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::{File, Given, Problems, SETTINGS, Setting, Text, file};
use crate::problem::Problem;
use crate::protocol::{grpc, rest};
use crate::registry::{self, AtStart, BackendChoice, Control, EnginesConfig};
use crate::request::BudgetConfig;
use crate::server;
use crate::units::{DURATION_FORM, SIZE_FORM, parse_duration, parse_size};

/// Most I/O threads taken without being told to: they only move bytes.
const DEFAULT_IO_THREADS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Everything `serve` needs.
#[derive(Debug)]
pub struct Resolved {
    pub log_format: LogFormat,
    pub log_level: tracing::Level,
    pub server: server::Config,
}

/// The process as configuration sees it: handed in, so that tests need no real one.
#[derive(Debug, Default)]
pub struct Surroundings {
    pub variables: HashMap<String, String>,
    pub cores: usize,
    /// The folder of the running binary.
    pub exe_dir: Option<PathBuf>,
    pub temp_dir: PathBuf,
}

/// `flags` as typed.
pub fn resolve(flags: Given, file: Option<File>, surroundings: &Surroundings) -> Result<Resolved, Problems> {
    let mut problems = Vec::new();
    let file = file.map(|file| file::read(file, &mut problems)).unwrap_or_default();
    Texts::of(file, flags, surroundings, problems).read(|texts| build(texts, surroundings))
}

/// For commands that load models without a server: without a registry, which they are told by themselves.
pub fn loading(flags: Given, surroundings: &Surroundings) -> Result<registry::Config, Problems> {
    Texts::of(Given::new(), flags, surroundings, Vec::new()).read(|texts| loading_of(texts, surroundings))
}

/// Names the file, and is read by `cli`.
const FILE_VARIABLE: &str = "TIDEGATE_CONFIG";

/// Unknown names are no problem: Kubernetes makes `TIDEGATE_SERVICE_HOST` and its like for a service named `tidegate`.
fn variables(surroundings: &Surroundings) -> Given {
    let mut given = Given::new();
    for (name, text) in &surroundings.variables {
        let setting = SETTINGS.iter().find(|setting| setting.variable() == *name);
        match setting.filter(|_| !made_by_kubernetes(text)) {
            Some(setting) => given.push((setting, Text { text: text.clone(), place: name.clone() })),
            None if name.starts_with("TIDEGATE_") && name != FILE_VARIABLE => {
                tracing::debug!(name, "a variable that is no setting");
            }
            None => {}
        }
    }
    given
}

/// `TIDEGATE_HTTP_PORT=tcp://10.0.0.7:80` is what Kubernetes makes for a service named `tidegate-http`.
fn made_by_kubernetes(text: &str) -> bool {
    ["tcp://", "udp://", "sctp://"].iter().any(|scheme| text.starts_with(scheme))
}

struct Texts {
    given: HashMap<&'static str, Text>,
    problems: Vec<Problem>,
}

impl Texts {
    /// The last of the layers to name a setting wins.
    fn of(file: Given, flags: Given, surroundings: &Surroundings, problems: Vec<Problem>) -> Texts {
        let layers = file.into_iter().chain(variables(surroundings)).chain(flags);
        Texts { given: layers.map(|(setting, text)| (setting.key, text)).collect(), problems }
    }

    fn read<T>(mut self, read: impl FnOnce(&mut Texts) -> T) -> Result<T, Problems> {
        let value = read(&mut self);
        if self.problems.is_empty() { Ok(value) } else { Err(Problems(self.problems)) }
    }

    /// The setting's value, or `fallback` beside a recorded problem.
    fn take<T>(&mut self, key: &'static str, fallback: T, form: &str, parse: impl Fn(&str) -> Option<T>) -> T {
        let default = super::settings::find(key).map_or("", |setting: &Setting| setting.default);
        match self.given.get(key) {
            None => parse(default).unwrap_or(fallback),
            Some(Text { text, place }) => parse(text).unwrap_or_else(|| {
                let found = if text.is_empty() { "nothing".into() } else { format!("`{text}`") };
                self.problems.push(Problem { place: place.clone(), found, expected: form.into() });
                fallback
            }),
        }
    }

    fn text(&mut self, key: &'static str) -> String {
        self.take(key, String::new(), "text", |text| Some(text.to_string()))
    }

    fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        Some(PathBuf::from(self.text(key))).filter(|path| !path.as_os_str().is_empty())
    }

    fn port(&mut self, key: &'static str) -> u16 {
        self.take(key, 0, "a port from 0 to 65535", |text| text.parse().ok())
    }

    fn address(&mut self, key: &'static str) -> IpAddr {
        self.take(key, IpAddr::from([127, 0, 0, 1]), "an IP address", |text| text.parse().ok())
    }

    fn count(&mut self, key: &'static str) -> usize {
        self.take(key, 1, "a number from 1 up", |text| text.parse().ok().filter(|n| *n > 0))
    }

    fn size(&mut self, key: &'static str) -> usize {
        self.take(key, 1, &format!("{SIZE_FORM}, more than 0"), |text| parse_size(text).filter(|n| *n > 0))
    }

    fn timeout(&mut self, key: &'static str) -> Duration {
        self.take(key, Duration::MAX, &format!("{DURATION_FORM}, more than 0"), |text| {
            parse_duration(text).filter(|timeout| !timeout.is_zero())
        })
    }

    fn duration(&mut self, key: &'static str) -> Duration {
        self.take(key, Duration::ZERO, DURATION_FORM, parse_duration)
    }

    fn flag(&mut self, key: &'static str) -> bool {
        self.take(key, false, "true or false", |text| text.parse().ok())
    }

    fn problem(&mut self, key: &'static str, found: String, expected: &str) {
        let place = match (self.given.get(key), super::settings::find(key)) {
            (Some(text), _) => text.place.clone(),
            (None, Some(setting)) if setting.flag => setting.flag_name(),
            _ => key.to_string(),
        };
        self.problems.push(Problem { place, found, expected: expected.into() });
    }
}

fn build(texts: &mut Texts, surroundings: &Surroundings) -> Resolved {
    let host = texts.address("host");
    let drain_timeout = texts.duration("drain_timeout");
    let max_body = texts.size("limits.body");
    let body_timeout = texts.timeout("timeouts.body");
    let repository_api = texts.flag("repository_api");
    let budget = BudgetConfig {
        max_requests: texts.count("limits.requests"),
        max_bytes: texts.size("limits.request_bytes"),
        max_answer_bytes: texts.size("limits.answer"),
    };
    if budget.max_bytes < max_body {
        let found = format!("{} bytes", budget.max_bytes);
        texts.problem("limits.request_bytes", found, &format!("at least `limits.body`, {max_body} bytes"));
    }
    Resolved {
        log_format: texts.take("log_format", LogFormat::Text, "`text` or `json`", |text| match text {
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            _ => None,
        }),
        log_level: texts.take(
            "log_level",
            tracing::Level::INFO,
            "`error`, `warn`, `info`, `debug` or `trace`",
            |text| text.parse().ok(),
        ),
        server: server::Config {
            http: SocketAddr::new(host, texts.port("http_port")),
            grpc: SocketAddr::new(host, texts.port("grpc_port")),
            metrics: SocketAddr::new(host, texts.port("metrics_port")),
            admin: admin(texts),
            io_threads: io_threads(texts, surroundings.cores),
            cores: surroundings.cores.max(1),
            monitoring: texts.flag("monitoring"),
            strict_readiness: texts.flag("strict_readiness"),
            lame_duck: texts.duration("lame_duck"),
            drain_timeout,
            load_timeout: texts.timeout("timeouts.load"),
            connections: server::ConnectionLimits {
                connections: texts.count("limits.connections"),
                streams: u32::try_from(texts.count("limits.streams")).unwrap_or(u32::MAX),
                header_timeout: texts.timeout("timeouts.header"),
                idle_timeout: texts.timeout("timeouts.idle"),
                write_timeout: texts.timeout("timeouts.write"),
            },
            budget,
            rest: rest::Config {
                max_body_bytes: max_body,
                max_json_header_bytes: texts.size("limits.json_header"),
                body_timeout,
                repository_api,
                ..rest::Config::default()
            },
            grpc_messages: grpc::Config {
                max_message_bytes: max_body,
                body_timeout,
                max_stream_requests: texts.count("limits.stream_requests"),
                repository_api,
            },
            registry: registry(texts, surroundings, drain_timeout),
        },
    }
}

fn admin(texts: &mut Texts) -> SocketAddr {
    let host = texts.address("admin_host");
    if !host.is_loopback() {
        texts.problem("admin_host", format!("`{host}`"), "a loopback address: the admin API has no authentication yet");
    }
    SocketAddr::new(host, texts.port("admin_port"))
}

fn io_threads(texts: &mut Texts, cores: usize) -> usize {
    let form = "a number from 0 to 64";
    match texts.take("io_threads", 0, form, |text| text.parse().ok().filter(|n| *n <= 64)) {
        0 => cores.clamp(1, DEFAULT_IO_THREADS),
        threads => threads,
    }
}

fn registry(texts: &mut Texts, surroundings: &Surroundings, drain_timeout: Duration) -> registry::Config {
    let root = texts.path("registry").unwrap_or_else(|| {
        texts.problem("registry", "nothing".into(), "a folder of models, or one `.onnx` file");
        PathBuf::new()
    });
    registry::Config {
        root,
        model_name: texts.take("model_name", String::new(), &registry::model_name_form(), |text| {
            registry::is_model_name(text).then(|| text.to_string())
        }),
        control: control(texts),
        drain_timeout,
        ..loading_of(texts, surroundings)
    }
}

/// What loading models takes, served or not.
fn loading_of(texts: &mut Texts, surroundings: &Surroundings) -> registry::Config {
    let (cache_dir, remember_in) = match texts.path("cache_dir") {
        None => (None, user_cache(surroundings)),
        Some(none) if none.as_os_str() == "none" => (None, None),
        Some(folder) => (Some(folder.clone()), Some(folder)),
    };
    registry::Config {
        cache_dir,
        temp_dir: surroundings.temp_dir.clone(),
        calibrate: texts.flag("calibration"),
        remember_in: remember_in.map(|folder| folder.join("remembered")),
        engines: engines_of(texts, surroundings),
        ..registry::Config::default()
    }
}

/// The user's own folder for caches, by the XDG's rules: relative ones do not count.
fn user_cache(surroundings: &Surroundings) -> Option<PathBuf> {
    let named = |name: &str| surroundings.variables.get(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")))?;
    Some(folder.join("tidegate"))
}

fn control(texts: &mut Texts) -> Control {
    let form = format!("{DURATION_FORM}, more than 0; `model_control = none` never looks");
    let interval = texts.take("poll_interval", Duration::MAX, &form, |text| {
        parse_duration(text).filter(|interval| !interval.is_zero())
    });
    let at_start = texts.take("load_model", AtStart::Named(BTreeSet::new()), "names of models, or `*`", at_start);
    let form = "`poll`, `none` or `explicit`";
    let control = texts.take("model_control", Control::None, form, |text| match text {
        "poll" => Some(Control::Poll(interval)),
        "none" => Some(Control::None),
        "explicit" => Some(Control::Explicit { at_start: at_start.clone(), interval }),
        _ => None,
    });
    if !control.is_explicit() && at_start != AtStart::Named(BTreeSet::new()) {
        texts.problem("load_model", "names".into(), "none, or `model_control = explicit`: all models are loaded");
    }
    control
}

/// Names with commas between, or all.
fn at_start(text: &str) -> Option<AtStart> {
    let names: BTreeSet<&str> = text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    if names.contains("*") {
        return Some(AtStart::All);
    }
    let names = names.into_iter().map(|name| registry::is_model_name(name).then(|| name.to_string()));
    names.collect::<Option<_>>().map(AtStart::Named)
}

fn engines_of(texts: &mut Texts, surroundings: &Surroundings) -> EnginesConfig {
    EnginesConfig {
        choice: texts.take(
            "engine",
            BackendChoice::Auto,
            "`auto`, `onnxruntime` or `tract`",
            BackendChoice::parse_for_all,
        ),
        library: texts.path("onnxruntime"),
        library_variable: surroundings.variables.get("ORT_DYLIB_PATH").map(PathBuf::from),
        exe_dir: surroundings.exe_dir.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(flags: &[(&str, &str)], file: Option<&str>, variables: &[(&str, &str)]) -> Result<Resolved, Problems> {
        let flags = flags
            .iter()
            .map(|(key, text)| {
                let setting = super::super::settings::find(key).unwrap();
                (setting, Text { text: text.to_string(), place: setting.flag_name() })
            })
            .collect();
        let surroundings = Surroundings {
            variables: variables.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
            cores: 2,
            ..Surroundings::default()
        };
        let file = file.map(|content| File { name: "tidegate.toml".into(), content: Ok(content.into()) });
        resolve(flags, file, &surroundings)
    }

    #[test]
    fn every_default_parses_and_the_registry_is_all_that_is_needed() {
        let resolved = with(&[("registry", "models")], None, &[]).unwrap();
        assert_eq!(resolved.server.http.to_string(), "0.0.0.0:8000");
        assert_eq!(resolved.server.admin.to_string(), "127.0.0.1:8003");
        assert_eq!(resolved.server.rest.max_body_bytes, 64 << 20);
        assert_eq!(resolved.server.io_threads, 2);
        for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
            with(&[("registry", "m"), (setting.key, setting.default)], None, &[])
                .unwrap_or_else(|problems| panic!("default of {}: {problems}", setting.key));
        }
    }

    #[test]
    fn flags_win_over_variables_over_the_file_over_defaults() {
        let file = Some("registry = \"f\"\nhttp_port = 1\ngrpc_port = 1\nmetrics_port = 1\n");
        let variables = [("TIDEGATE_HTTP_PORT", "2"), ("TIDEGATE_GRPC_PORT", "2")];
        let server = with(&[("http_port", "3")], file, &variables).unwrap().server;
        let ports = [server.http, server.grpc, server.metrics, server.admin].map(|address| address.port());
        assert_eq!(ports, [3, 2, 1, 8003]);
    }

    #[test]
    fn all_problems_are_reported_with_place_found_and_expected() {
        let Problems(problems) = with(
            &[("http_port", "70000"), ("log_format", "xml")],
            Some("lame_duck = 5\nadmin_host = \"0.0.0.0\"\n"),
            &[("TIDEGATE_LIMITS_BODY", "64")],
        )
        .unwrap_err();
        let texts: Vec<String> = problems.iter().map(Problem::to_string).collect();
        let has = |part: &str| assert!(texts.iter().any(|text| text.starts_with(part)), "{part} not in {texts:#?}");
        has("--http-port: found `70000`, expected a port");
        has("--log-format: found `xml`, expected `text` or `json`");
        has("tidegate.toml:1: lame_duck: found `5`, expected a duration");
        has("tidegate.toml:2: admin_host: found `0.0.0.0`, expected a loopback");
        has("TIDEGATE_LIMITS_BODY: found `64`, expected a size");
        has("--registry: found nothing");
        assert_eq!(texts.len(), 6, "{texts:#?}");
    }

    #[test]
    fn one_body_fits_into_what_all_bodies_may_take() {
        let of = |all: &str| with(&[("registry", "m")], Some(&format!("limits.request_bytes = \"{all}\"")), &[]);
        assert!(of("64MiB").is_ok());
        let problems = of("63MiB").unwrap_err().to_string();
        assert!(problems.contains("limits.request_bytes: found 66060288 bytes"), "{problems}");
    }

    #[test]
    fn a_model_name_is_one_that_can_be_asked_for() {
        for bad in ["a\nb", "a/b", "", &"x".repeat(1 << 12)] {
            let problems = with(&[("registry", "m"), ("model_name", bad)], None, &[]).unwrap_err().to_string();
            assert!(problems.contains("--model-name: found") && problems.contains("expected 1 to"), "{problems}");
        }
    }

    #[test]
    fn models_are_controlled_in_one_of_three_ways() {
        let with = |settings: &[(&str, &str)]| {
            let resolved = with(&[&[("registry", "m")], settings].concat(), None, &[]);
            resolved.map(|resolved| resolved.server.registry.control).map_err(|problems| problems.to_string())
        };
        let (short, long) = (Duration::from_millis(5), Duration::from_secs(2));
        let explicit = |at_start| Ok(Control::Explicit { at_start, interval: long });
        let named = |names: &[&str]| AtStart::Named(names.iter().map(|name| name.to_string()).collect());
        assert_eq!(with(&[]), Ok(Control::Poll(long)));
        assert_eq!(with(&[("poll_interval", "5ms")]), Ok(Control::Poll(short)));
        assert_eq!(with(&[("model_control", "none")]), Ok(Control::None));
        assert_eq!(with(&[("model_control", "explicit")]), explicit(named(&[])));
        assert_eq!(with(&[("model_control", "explicit"), ("load_model", "b, a,b")]), explicit(named(&["a", "b"])));
        assert_eq!(with(&[("model_control", "explicit"), ("load_model", "a,*")]), explicit(AtStart::All));
        for (settings, expected) in [
            (&[("model_control", "manual")][..], "--model-control: found `manual`, expected `poll`, `none` or"),
            (&[("poll_interval", "0")], "more than 0; `model_control = none` never looks"),
            (&[("load_model", "a")], "--load-model: found names, expected none, or `model_control = explicit`"),
            (&[("model_control", "explicit"), ("load_model", "a/b")], "--load-model: found `a/b`"),
        ] {
            let problems = with(settings).unwrap_err();
            assert!(problems.contains(expected), "{problems}");
        }
    }

    #[test]
    fn commands_without_a_server_take_engines_from_flags_over_variables() {
        let setting = super::super::settings::find("engine").unwrap();
        let flag = |text: &str| vec![(setting, Text { text: text.into(), place: "--engine".into() })];
        let variables =
            [("TIDEGATE_ENGINE", "tract"), ("TIDEGATE_ONNXRUNTIME", "a/lib.so"), ("TIDEGATE_HTTP_PORT", "x")];
        let variables = variables.map(|(name, text)| (name.to_string(), text.to_string())).into();
        let surroundings = Surroundings { variables, ..Surroundings::default() };
        let found = loading(Given::new(), &surroundings).unwrap().engines;
        assert_eq!((found.choice, found.library), (BackendChoice::Tract, Some("a/lib.so".into())));
        assert_eq!(loading(flag("auto"), &surroundings).unwrap().engines.choice, BackendChoice::Auto);
        let problems = loading(flag("tracked"), &surroundings).unwrap_err().to_string();
        assert!(problems.contains("--engine: found `tracked`, expected `auto`"), "{problems}");
    }

    #[test]
    fn what_is_remembered_lies_in_the_users_cache_unless_a_folder_is_named() {
        let folders = |cache_dir: &str, variables: &[(&str, &str)]| {
            let named = [("TIDEGATE_CACHE_DIR", cache_dir)];
            let variables = variables.iter().chain(named.iter().filter(|(_, folder)| !folder.is_empty()));
            let variables = variables.map(|(name, text)| (name.to_string(), text.to_string())).collect();
            let surroundings = Surroundings { variables, temp_dir: "/tmp".into(), ..Surroundings::default() };
            let config = loading(Given::new(), &surroundings).unwrap();
            let text = |path: Option<PathBuf>| path.map(|path| path.display().to_string());
            (text(config.cache_dir), text(config.remember_in))
        };
        let some = |text: &str| Some(text.to_string());
        let home = ("HOME", "/home/me");
        assert_eq!(folders("", &[home]), (None, some("/home/me/.cache/tidegate/remembered")));
        assert_eq!(folders("", &[home, ("XDG_CACHE_HOME", "/x")]), (None, some("/x/tidegate/remembered")));
        let relative = ("XDG_CACHE_HOME", "x");
        assert_eq!(folders("", &[home, relative]), (None, some("/home/me/.cache/tidegate/remembered")));
        assert_eq!(folders("", &[]), (None, None));
        assert_eq!(folders("/var/cache/t", &[home]), (some("/var/cache/t"), some("/var/cache/t/remembered")));
        assert_eq!(folders("none", &[home]), (None, None));
    }

    #[test]
    fn what_kubernetes_puts_into_the_environment_is_not_ours() {
        let variables = [
            ("TIDEGATE_SERVICE_HOST", "10.0.0.7"),
            ("TIDEGATE_PORT", "tcp://10.0.0.7:8000"),
            ("TIDEGATE_HTTP_PORT", "tcp://10.0.0.7:80"),
        ];
        let resolved = with(&[("registry", "m")], None, &variables).unwrap();
        assert_eq!(resolved.server.http.port(), 8000);
    }
}
