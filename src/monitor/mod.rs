//! What the server tells about itself: metrics, and the distributions of every version's predictions.
//!
//! Owns every metric's name (`names`), the events that write metrics and log lines (`events`), and the text of a
//! scrape. Other modules emit events; none names a metric. Knows nothing of HTTP, of engines or of how requests are
//! scheduled.
//!
//! Two kinds of series. What counts over the process's life goes through the exporter, a value of the [`Monitor`] and not
//! a global one, so that servers in one process do not mix. What belongs to one version (gauges, distributions, and the
//! statistics that protocols tell) lives in its [`VersionMonitor`] and vanishes with it. What requests tell is counted by
//! thread (`shares`) and put together when it is read. Memory stays flat without scrapes.
//!
//! Threads: everything may be called from anywhere. Recording takes no lock but those of a thread's own shares,
//! and for a label that the thread has not seen yet the output's.

mod distribution;
pub mod events;
mod export;
mod histogram;
mod latency;
pub mod names;
mod pending;
mod process;
mod shares;
mod statistics;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use metrics::{Counter, Gauge};

use crate::error::Kind;
use crate::request::VersionId;
use crate::tensor::{OutputKind, Tensor};
use distribution::{Distribution, OutputMonitor};
use export::{Exporter, Family, Number};
use histogram::Histogram;
use latency::{Handles, PROTOCOLS};
use names::{MAX_LABELLED_VERSIONS, MAX_MONITORED_OUTPUTS, OTHER};

use pending::Pending;
pub use process::cpu_seconds;
pub use statistics::{Compute, Statistics, Total};

/// One server's metrics.
pub struct Monitor {
    /// Whether requests, batches and predictions are measured. What is loaded, refused and in flight always is.
    measures: bool,
    exporter: Arc<Exporter>,
    refused: [[Counter; Kind::ALL.len()]; PROTOCOLS.len()],
    in_flight: Gauge,
    in_flight_bytes: Gauge,
    pool_queued: Gauge,
    pool_running: Gauge,
    loads_ok: Counter,
    loads_failed: Counter,
    truncated_versions: Counter,
    truncated_outputs: Counter,
    truncated_classes: Counter,
    /// Versions that have label values of their own.
    labelled: Mutex<HashSet<(Arc<str>, VersionId)>>,
    live: Mutex<Vec<Weak<VersionMonitor>>>,
}

impl Monitor {
    pub fn new() -> Arc<Monitor> {
        Monitor::measuring(true)
    }

    /// With `false`, one that leaves out what costs time with every request.
    pub fn measuring(measures: bool) -> Arc<Monitor> {
        let exporter = Arc::new(Exporter::new());
        let truncated = |label| exporter.counter(&names::SERIES_TRUNCATED, &[label]);
        let loads = |outcome| exporter.counter(&names::MODEL_LOADS, &[outcome]);
        Arc::new(Monitor {
            measures,
            refused: PROTOCOLS.map(|protocol| {
                Kind::ALL.map(|kind| exporter.counter(&names::REFUSED, &[kind.label(), protocol.label()]))
            }),
            in_flight: exporter.gauge(&names::IN_FLIGHT, &[]),
            in_flight_bytes: exporter.gauge(&names::IN_FLIGHT_BYTES, &[]),
            pool_queued: exporter.gauge(&names::CPU_POOL_QUEUE_DEPTH, &[]),
            pool_running: exporter.gauge(&names::CPU_POOL_RUNNING, &[]),
            loads_ok: loads("ok"),
            loads_failed: loads("failed"),
            truncated_versions: truncated("version"),
            truncated_outputs: truncated("output"),
            truncated_classes: truncated("class"),
            labelled: Mutex::default(),
            live: Mutex::default(),
            exporter,
        })
    }

    /// The text of `/metrics`, in Prometheus' text format 0.0.4.
    pub fn render(&self) -> String {
        self.hand_on();
        let mut out = self.exporter.render();
        let versions = self.shown();
        write_versions(&mut out, &versions);
        let snapshots: Vec<Snapshot> = versions.iter().flat_map(|version| version.snapshots()).collect();
        write_predictions(&mut out, &snapshots);
        process::write(&mut out);
        out
    }

    fn hand_on(&self) {
        self.live().iter().for_each(|version| version.pending.hand_on(&version.handles));
    }

    fn live(&self) -> Vec<Arc<VersionMonitor>> {
        lock(&self.live).iter().filter_map(Weak::upgrade).collect()
    }

    /// Handles and accumulators for one version. `outputs` are those of the signature, in its order. Dropping the last
    /// `Arc` drops its gauges and distributions from the scrape.
    pub fn version(
        self: &Arc<Self>,
        model: Arc<str>,
        version: VersionId,
        outputs: Vec<MonitoredOutput>,
    ) -> Arc<VersionMonitor> {
        let (model_label, version_label) = self.labels(&model, version);
        self.truncated_outputs.increment(outputs.len().saturating_sub(MAX_MONITORED_OUTPUTS) as u64);
        let outputs = outputs.into_iter().take(MAX_MONITORED_OUTPUTS);
        let monitor = Arc::new(VersionMonitor {
            measures: self.measures,
            handles: Handles::new(Arc::clone(&self.exporter), model_label, version_label),
            model,
            version: version.to_string().into(),
            outputs: outputs.map(|output| OutputMonitor::new(output.name, output.kind, output.labels)).collect(),
            truncated_classes: self.truncated_classes.clone(),
            queue_requests: AtomicUsize::new(0),
            queue_bytes: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            batch_limit: AtomicUsize::new(0),
            expected_run_nanos: AtomicU64::new(0),
            run_threads: AtomicUsize::new(0),
            ready: AtomicBool::new(false),
            info: Mutex::default(),
            pending: Pending::default(),
        });
        let mut live = lock(&self.live);
        live.retain(|version| version.strong_count() > 0);
        live.push(Arc::downgrade(&monitor));
        monitor
    }

    /// The label values of a version in the exporter, whose series stay for ever: at most [`MAX_LABELLED_VERSIONS`]
    /// pairs, then `other` for versions of known models and for whole new models.
    fn labels(&self, model: &Arc<str>, version: VersionId) -> (Arc<str>, Arc<str>) {
        let mut labelled = lock(&self.labelled);
        let pair = (Arc::clone(model), version);
        if labelled.contains(&pair) {
            return (pair.0, version.to_string().into());
        }
        if labelled.len() < MAX_LABELLED_VERSIONS {
            labelled.insert(pair);
            return (Arc::clone(model), version.to_string().into());
        }
        self.truncated_versions.increment(1);
        let known = labelled.iter().any(|(name, _)| name == model);
        (if known { Arc::clone(model) } else { OTHER.into() }, OTHER.into())
    }

    /// The live versions, one of each name: where one load replaces another, the ready one, else the newer.
    fn shown(&self) -> Vec<Arc<VersionMonitor>> {
        let mut positions: HashMap<(Arc<str>, Arc<str>), usize> = HashMap::new();
        let mut shown: Vec<Arc<VersionMonitor>> = Vec::new();
        for version in self.live() {
            let name = (Arc::clone(&version.model), Arc::clone(&version.version));
            let position = *positions.entry(name).or_insert(shown.len());
            match shown.get_mut(position) {
                None => shown.push(version),
                Some(earlier) if version.is_ready() || !earlier.is_ready() => *earlier = version,
                Some(_) => {}
            }
        }
        shown
    }
}

/// One output of a version's signature, as monitoring sees it.
pub struct MonitoredOutput {
    pub name: Arc<str>,
    pub kind: OutputKind,
    /// Names of the classes, by index.
    pub labels: Option<Arc<[String]>>,
}

/// One loaded version's series: shared by its scheduler, its workers and the requests it serves.
pub struct VersionMonitor {
    measures: bool,
    handles: Handles,
    model: Arc<str>,
    version: Arc<str>,
    outputs: Vec<OutputMonitor>,
    truncated_classes: Counter,
    queue_requests: AtomicUsize,
    queue_bytes: AtomicUsize,
    running: AtomicUsize,
    /// 0 until it has run.
    batch_limit: AtomicUsize,
    /// Of a batch of so many rows; 0 where that is not known.
    expected_run_nanos: AtomicU64,
    run_threads: AtomicUsize,
    ready: AtomicBool,
    info: Mutex<Option<Info>>,
    pending: Pending,
}

/// What a load found out.
struct Info {
    digest: Box<str>,
    backend: Box<str>,
    backend_version: Box<str>,
    device: Box<str>,
    batching: bool,
    load: Duration,
}

impl VersionMonitor {
    /// Folds one batch's whole outputs (positional, all rows), which a run of that time gave, into the distributions.
    /// Called by workers after replying.
    pub fn fold(&self, outputs: &[Tensor], run: Duration) {
        if !self.measures {
            return;
        }
        let others = self.outputs.iter().zip(outputs).map(|(output, tensor)| output.fold(tensor, run)).sum();
        if others > 0 {
            self.truncated_classes.increment(others);
        }
    }

    /// Counts and durations since it was loaded, as of one moment.
    pub fn statistics(&self) -> Statistics {
        self.pending.statistics()
    }

    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    fn info(&self) -> MutexGuard<'_, Option<Info>> {
        lock(&self.info)
    }

    fn snapshots(&self) -> impl Iterator<Item = Snapshot<'_>> {
        self.outputs.iter().map(|output| Snapshot { version: self, output, distribution: output.snapshot() })
    }
}

impl Drop for VersionMonitor {
    fn drop(&mut self) {
        self.pending.hand_on(&self.handles);
    }
}

/// One output's distribution at the moment of a scrape, so that its families agree with each other.
struct Snapshot<'a> {
    version: &'a VersionMonitor,
    output: &'a OutputMonitor,
    distribution: Distribution,
}

impl Snapshot<'_> {
    fn labels(&self) -> [&str; 3] {
        [&self.version.model, &self.version.version, &self.output.name]
    }
}

fn write_versions(out: &mut String, versions: &[Arc<VersionMonitor>]) {
    let mut gauge = |metric, value: &dyn Fn(&VersionMonitor) -> Option<f64>| {
        let mut family = Family::new(out, metric);
        for version in versions {
            if let Some(value) = value(version) {
                family.sample(&[&version.model, &version.version], Number(value));
            }
        }
    };
    gauge(&names::QUEUE_DEPTH, &|version| Some(version.queue_requests.load(Ordering::Relaxed) as f64));
    gauge(&names::QUEUE_BYTES, &|version| Some(version.queue_bytes.load(Ordering::Relaxed) as f64));
    gauge(&names::RUNNING, &|version| Some(version.running.load(Ordering::Relaxed) as f64));
    let known = |value: f64| (value > 0.0).then_some(value);
    gauge(&names::BATCH_LIMIT, &|version| known(version.batch_limit.load(Ordering::Relaxed) as f64));
    gauge(&names::EXPECTED_RUN, &|version| known(version.expected_run_nanos.load(Ordering::Relaxed) as f64 / 1e9));
    gauge(&names::RUN_THREADS, &|version| known(version.run_threads.load(Ordering::Relaxed) as f64));
    gauge(&names::MODEL_READY, &|version| Some(f64::from(u8::from(version.is_ready()))));
    gauge(&names::MODEL_LOAD, &|version| version.info().as_ref().map(|info| info.load.as_secs_f64()));
    let mut family = Family::new(out, &names::MODEL_INFO);
    for version in versions {
        if let Some(Info { digest, backend, backend_version, device, batching, .. }) = &*version.info() {
            let batching = if *batching { "true" } else { "false" };
            let (model, number) = (&version.model, &version.version);
            family.sample(&[model, number, digest, backend, backend_version, device, batching], 1);
        }
    }
}

fn write_predictions(out: &mut String, snapshots: &[Snapshot]) {
    let mut counter = |metric, value: &dyn Fn(&Distribution) -> Option<f64>| {
        let mut family = Family::new(out, metric);
        for snapshot in snapshots {
            if let Some(value) = value(&snapshot.distribution) {
                family.sample(&snapshot.labels(), Number(value));
            }
        }
    };
    counter(&names::ELEMENTS, &|d| Some(d.tally.elements as f64));
    counter(&names::NAN, &|d| Some(d.tally.nan as f64));
    counter(&names::INFINITE, &|d| Some(d.tally.infinite as f64));
    counter(&names::SAMPLED_OUT, &|d| (d.tally.sampled_out > 0).then_some(d.tally.sampled_out as f64));
    counter(&names::SQUARES, &Distribution::squares);

    let mut family = Family::new(out, &names::CLASSES);
    for snapshot in snapshots {
        let [model, version, output] = snapshot.labels();
        for (class, rows) in snapshot.output.class_counts(&snapshot.distribution) {
            family.sample(&[model, version, output, &class], rows);
        }
    }

    let mut histogram = |metric, of: fn(&Distribution) -> Option<&Histogram>| {
        let mut family = Family::new(out, metric);
        for snapshot in snapshots {
            if let Some(histogram) = of(&snapshot.distribution).filter(|histogram| !histogram.is_empty()) {
                family.histogram(&snapshot.labels(), histogram);
            }
        }
    };
    histogram(&names::CONFIDENCE, Distribution::confidence);
    histogram(&names::ENTROPY, Distribution::entropy);
    histogram(&names::VALUES, Distribution::values);
}

/// A panic while one of these locks is held leaves counts that are still usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{PredictionId, Protocol, Timings};
    use crate::tensor::Shape;
    use events::*;
    use std::collections::HashMap;

    const RUN: Duration = Duration::from_millis(1);

    fn id(version: u64) -> VersionId {
        VersionId::new(version).unwrap()
    }

    fn output(name: &str, kind: OutputKind) -> MonitoredOutput {
        MonitoredOutput { name: name.into(), kind, labels: None }
    }

    fn floats(dims: &[usize], elements: Vec<f32>) -> Tensor {
        Tensor::from_vec(Shape::new(dims).unwrap(), elements).unwrap()
    }

    fn load(monitor: &Monitor, version: &VersionMonitor) {
        VersionLoaded {
            version,
            duration: Duration::from_millis(1500),
            digest: "sha256:00",
            backend: "fake",
            backend_version: "1.0",
            device: "cpu",
            instances: 2,
            batching: true,
            batching_reason: "a test",
            costs: "",
            wide: "",
        }
        .emit(monitor);
    }

    fn execute(version: &VersionMonitor, rows: usize, failed: bool) {
        let (input, gather_and_compute, split) = (Duration::ZERO, Duration::from_micros(300), Duration::ZERO);
        let (data, padding) = (0, 0);
        BatchExecuted { version, requests: 1, rows, data, padding, input, gather_and_compute, split, failed }.emit();
    }

    /// Reads the text format strictly and returns every sample as written (`name{labels}`) with its value.
    fn parse(text: &str) -> HashMap<String, f64> {
        let mut samples = HashMap::new();
        let mut finished: HashSet<&str> = HashSet::new();
        let (mut family, mut shape, mut described) = ("", "", "");
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect(line);
                assert!(!help.is_empty() && finished.insert(name), "second HELP of {name}");
                described = name;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                (family, shape) = rest.split_once(' ').expect(line);
                assert_eq!(family, described, "TYPE without HELP");
                let metric = names::ALL.iter().find(|metric| metric.name == family).expect(line);
                assert_eq!(metric.shape.name(), shape);
            } else {
                let (series, value) = line.rsplit_once(' ').expect(line);
                let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
                let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} inside family {family}"));
                let suffixes: &[&str] = if shape == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                assert!(suffixes.contains(&suffix), "{line}");
                check_labels(family, labels.strip_suffix('}').expect(line), suffix == "_bucket");
                let value: f64 = value.parse().expect(line);
                assert!(value.is_finite(), "{line}");
                assert!(samples.insert(series.to_owned(), value).is_none(), "second sample of {series}");
            }
        }
        samples
    }

    fn check_labels(family: &str, mut text: &str, bucket: bool) {
        let metric = names::ALL.iter().find(|metric| metric.name == family).unwrap();
        let expected = metric.labels.iter().copied().chain(bucket.then_some("le"));
        for (position, name) in expected.enumerate() {
            let separator = if position == 0 { "" } else { "," };
            let start = format!("{separator}{name}=\"");
            text = text.strip_prefix(&start).unwrap_or_else(|| panic!("{family}: {text} should begin {start}"));
            let mut escaped = false;
            let end = text.find(|c| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            });
            text = &text[end.expect("an end quote") + 1..];
        }
        assert_eq!(text, "", "{family}: labels left over");
    }

    #[test]
    fn without_monitoring_only_what_is_loaded_and_refused_is_told() {
        let monitor = Monitor::measuring(false);
        let version = monitor.version("m".into(), id(1), vec![output("value", OutputKind::Values)]);
        load(&monitor, &version);
        version.fold(&[floats(&[2], vec![1.5, 2.5])], RUN);
        execute(&version, 2, false);
        let timings = Timings::default();
        for (version, outcome) in [(Some(&*version), Ok(&timings)), (None, Err(Kind::NotFound))] {
            RequestFinished {
                version,
                prediction: PredictionId(1),
                protocol: Protocol::Grpc,
                outcome,
                duration: Duration::from_millis(3),
            }
            .emit(&monitor);
        }
        let text = monitor.render();
        assert!(!text.contains("tidegate_batch_size_count{"), "{text}");
        let told = [
            "tidegate_requests_refused_total{kind=\"not_found\"",
            "tidegate_model_ready{model=\"m\",version=\"1\"} 1",
            "tidegate_requests_total{model=\"m\",version=\"1\",protocol=\"grpc\",outcome=\"ok\"} 0",
            "tidegate_executions_total{model=\"m\",version=\"1\"} 0",
            "tidegate_prediction_elements_total{model=\"m\",version=\"1\",output=\"value\"} 0",
        ];
        for present in told {
            assert!(text.contains(present), "no {present} in {text}");
        }
        assert_eq!(version.statistics().inferences, 0);
    }

    #[test]
    fn a_version_with_everything_renders_valid_text() {
        let monitor = Monitor::new();
        let labels: Arc<[String]> = ["a\"b\\".into(), "line\nfeed".into()].into();
        let outputs = vec![
            MonitoredOutput { name: "p".into(), kind: OutputKind::Probabilities, labels: Some(labels) },
            output("value", OutputKind::Values),
        ];
        let version = monitor.version("m\"1".into(), id(2), outputs);
        load(&monitor, &version);
        EnginePresent { backend: "fake", version: "1.0" }.emit(&monitor);
        InFlight { requests: 3, bytes: 400, pool_queued: 7, pool_running: 1 }.emit(&monitor);
        QueueChanged { version: &version, requests: 2, bytes: 64, running: 5 }.emit();
        let expected = Some(Duration::from_millis(4));
        RunLearned { version: &version, batch_limit: 8, expected, threads: 2 }.emit();
        version.fold(&[floats(&[2, 2], vec![0.25, 0.75, 1.0, 0.0]), floats(&[2], vec![1.5, f32::NAN])], RUN);
        execute(&version, 2, false);
        execute(&version, 7, true);
        let timings = Timings { queue: Duration::from_millis(2), ..Timings::default() };
        for outcome in [Ok(&timings), Err(Kind::DeadlineExceeded)] {
            RequestFinished {
                version: Some(&version),
                prediction: PredictionId(1),
                protocol: Protocol::Grpc,
                outcome,
                duration: Duration::from_millis(3),
            }
            .emit(&monitor);
        }
        // The second is what must not be: an answer that no version gave.
        for outcome in [Err(Kind::NotFound), Ok(&timings)] {
            RequestFinished {
                version: None,
                prediction: PredictionId(2),
                protocol: Protocol::Http,
                outcome,
                duration: Duration::ZERO,
            }
            .emit(&monitor);
        }
        VersionFailed { model: "other", version: id(1), reason: "corrupt", duration: Duration::ZERO }.emit(&monitor);

        let statistics = version.statistics();
        assert_eq!((statistics.inferences, statistics.executions), (2, 1), "failed executions do not count");
        assert!(statistics.last_inference_ms > 0);
        assert_eq!(statistics.success, Total { count: 1, ns: 3_000_000 });
        assert_eq!(statistics.fail, Total { count: 1, ns: 3_000_000 });
        assert_eq!(statistics.queue, Total { count: 1, ns: 2_000_000 });
        assert_eq!(statistics.batches.keys().collect::<Vec<_>>(), [&2]);

        let samples = parse(&monitor.render());
        let v = r#"model="m\"1",version="2""#;
        for (series, expected) in [
            (format!("tidegate_requests_total{{{v},protocol=\"grpc\",outcome=\"ok\"}}"), 1.0),
            (format!("tidegate_requests_total{{{v},protocol=\"grpc\",outcome=\"deadline_exceeded\"}}"), 1.0),
            (format!("tidegate_requests_total{{{v},protocol=\"http\",outcome=\"ok\"}}"), 0.0),
            ("tidegate_requests_refused_total{kind=\"not_found\",protocol=\"http\"}".into(), 1.0),
            ("tidegate_requests_refused_total{kind=\"internal\",protocol=\"http\"}".into(), 1.0),
            (format!("tidegate_request_duration_seconds_count{{{v},protocol=\"grpc\"}}"), 1.0),
            (format!("tidegate_queue_duration_seconds_sum{{{v}}}"), 0.002),
            (format!("tidegate_infer_duration_seconds_bucket{{{v},le=\"0.00025\"}}"), 0.0),
            (format!("tidegate_infer_duration_seconds_bucket{{{v},le=\"0.0005\"}}"), 2.0),
            (format!("tidegate_batch_size_sum{{{v}}}"), 9.0),
            (format!("tidegate_executions_total{{{v}}}"), 2.0),
            (format!("tidegate_execution_failures_total{{{v}}}"), 1.0),
            (format!("tidegate_inferences_total{{{v}}}"), 2.0),
            ("tidegate_inflight".into(), 3.0),
            ("tidegate_inflight_bytes".into(), 400.0),
            (format!("tidegate_queue_depth{{{v}}}"), 2.0),
            (format!("tidegate_queue_bytes{{{v}}}"), 64.0),
            (format!("tidegate_running{{{v}}}"), 5.0),
            (format!("tidegate_batch_limit_rows{{{v}}}"), 8.0),
            (format!("tidegate_expected_run_seconds{{{v}}}"), 0.004),
            (format!("tidegate_run_threads{{{v}}}"), 2.0),
            ("tidegate_cpu_pool_queue_depth".into(), 7.0),
            ("tidegate_cpu_pool_running".into(), 1.0),
            (format!("tidegate_model_ready{{{v}}}"), 1.0),
            (format!("tidegate_model_load_seconds{{{v}}}"), 1.5),
            (
                format!(
                    "tidegate_model_info{{{v},digest=\"sha256:00\",backend=\"fake\",backend_version=\"1.0\",\
                     device=\"cpu\",batching=\"true\"}}"
                ),
                1.0,
            ),
            ("tidegate_model_loads_total{outcome=\"ok\"}".into(), 1.0),
            ("tidegate_model_loads_total{outcome=\"failed\"}".into(), 1.0),
            ("tidegate_engine_info{backend=\"fake\",version=\"1.0\"}".into(), 1.0),
            (format!(r#"tidegate_prediction_class_total{{{v},output="p",class="a\"b\\"}}"#), 1.0),
            // A label's control characters are shown escaped, so the backslash is the label's.
            (format!(r#"tidegate_prediction_class_total{{{v},output="p",class="line\\nfeed"}}"#), 1.0),
            (format!(r#"tidegate_prediction_confidence_bucket{{{v},output="p",le="0.8"}}"#), 1.0),
            (format!(r#"tidegate_prediction_confidence_sum{{{v},output="p"}}"#), 1.75),
            (format!(r#"tidegate_prediction_value_count{{{v},output="value"}}"#), 1.0),
            (format!(r#"tidegate_prediction_value_sum{{{v},output="value"}}"#), 1.5),
            (format!(r#"tidegate_prediction_value_squares_total{{{v},output="value"}}"#), 2.25),
            (format!(r#"tidegate_prediction_nan_total{{{v},output="value"}}"#), 1.0),
            (format!(r#"tidegate_prediction_elements_total{{{v},output="p"}}"#), 4.0),
        ] {
            assert_eq!(samples.get(&series), Some(&expected), "{series} in {samples:#?}");
        }
    }

    #[test]
    fn what_belongs_to_a_version_goes_with_it() {
        let monitor = Monitor::new();
        let version = monitor.version("m".into(), id(1), vec![output("y", OutputKind::Values)]);
        load(&monitor, &version);
        version.fold(&[floats(&[1], vec![1.0])], RUN);
        let own = |text: &str| {
            let per_version = text.lines().filter(|line| line.contains("version=\"1\""));
            per_version.filter(|line| line.contains("prediction") || line.contains("model_")).count()
        };
        assert!(own(&monitor.render()) > 0);
        drop(version);
        let text = monitor.render();
        assert_eq!(own(&text), 0, "{text}");
        parse(&text);
    }

    #[test]
    fn of_two_loads_of_a_version_the_ready_one_is_shown() {
        let monitor = Monitor::new();
        let shown =
            |text: &str| parse(text)["tidegate_prediction_elements_total{model=\"m\",version=\"1\",output=\"y\"}"];
        let one = || monitor.version("m".into(), id(1), vec![output("y", OutputKind::Values)]);
        let old = one();
        load(&monitor, &old);
        old.fold(&[floats(&[1], vec![1.0])], RUN);
        let new = one();
        assert_eq!(shown(&monitor.render()), 1.0);
        load(&monitor, &new);
        assert_eq!(shown(&monitor.render()), 0.0);
        VersionRetired { version: &old, reason: "replaced" }.emit();
        assert_eq!(shown(&monitor.render()), 0.0);
        drop(new);
        assert_eq!(shown(&monitor.render()), 1.0);
    }

    #[test]
    fn a_demoted_version_says_so() {
        let monitor = Monitor::new();
        let version = monitor.version("m".into(), id(1), vec![]);
        load(&monitor, &version);
        VersionDemoted { version: &version, reason: "a test" }.emit();
        assert!(monitor.render().contains("batching=\"false\""));
        VersionRetired { version: &version, reason: "a test" }.emit();
        assert_eq!(parse(&monitor.render())["tidegate_model_ready{model=\"m\",version=\"1\"}"], 0.0);
    }

    #[test]
    fn version_churn_does_not_grow_the_exporter_for_ever() {
        let monitor = Monitor::new();
        let executions = |text: &str| text.lines().filter(|l| l.starts_with("tidegate_executions_total{")).count();
        for number in 1..=MAX_LABELLED_VERSIONS as u64 + 50 {
            execute(&monitor.version("m".into(), id(number), vec![]), 1, false);
        }
        for number in 0..50 {
            execute(&monitor.version(format!("new{number}").into(), id(1), vec![]), 1, false);
        }
        // A version seen before keeps its labels.
        execute(&monitor.version("m".into(), id(7), vec![]), 1, false);
        let text = monitor.render();
        assert_eq!(executions(&text), MAX_LABELLED_VERSIONS + 2);
        let samples = parse(&text);
        assert_eq!(samples["tidegate_executions_total{model=\"m\",version=\"7\"}"], 2.0);
        assert_eq!(samples["tidegate_executions_total{model=\"m\",version=\"other\"}"], 50.0);
        assert_eq!(samples["tidegate_executions_total{model=\"other\",version=\"other\"}"], 50.0);
        assert_eq!(samples["tidegate_series_truncated_total{label=\"version\"}"], 100.0);
    }

    #[test]
    fn outputs_and_classes_are_bounded_and_the_cut_is_counted() {
        let monitor = Monitor::new();
        let outputs = (0..MAX_MONITORED_OUTPUTS + 3).map(|i| output(&i.to_string(), OutputKind::Logits)).collect();
        let version = monitor.version("m".into(), id(1), outputs);
        let mut logits = vec![0.0; 30];
        logits[29] = 1.0;
        version.fold(&vec![floats(&[1, 30], logits); MAX_MONITORED_OUTPUTS + 3], RUN);
        let samples = parse(&monitor.render());
        assert_eq!(samples["tidegate_series_truncated_total{label=\"output\"}"], 3.0);
        assert_eq!(samples["tidegate_series_truncated_total{label=\"class\"}"], MAX_MONITORED_OUTPUTS as f64);
        let class = "tidegate_prediction_class_total{model=\"m\",version=\"1\",output=\"0\",class=\"other\"}";
        assert_eq!(samples[class], 1.0);
    }

    #[test]
    fn concurrent_folds_lose_nothing() {
        let monitor = Monitor::new();
        let version = monitor.version("m".into(), id(1), vec![output("y", OutputKind::Values)]);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| version.fold(&[floats(&[2], vec![1.0, 2.0])], RUN)));
            }
            (0..20).for_each(|_| {
                parse(&monitor.render());
            });
        });
        let samples = parse(&monitor.render());
        let series = |name: &str| samples[&format!("{name}{{model=\"m\",version=\"1\",output=\"y\"}}")];
        assert_eq!(series("tidegate_prediction_value_count"), 8000.0);
        assert_eq!(series("tidegate_prediction_value_sum"), 12000.0);
        assert_eq!(series("tidegate_prediction_value_squares_total"), 20000.0);
    }

    #[test]
    fn what_threads_tell_side_by_side_is_counted_once_and_outlives_the_version() {
        const THREADS: usize = 12;
        const EACH: usize = 1000;
        let monitor = Monitor::new();
        let version = monitor.version("m".into(), id(1), vec![]);
        let answer = |_| {
            execute(&version, 2, false);
            let timings = Timings { queue: Duration::from_millis(2), ..Timings::default() };
            let (version, prediction, protocol) = (Some(&*version), PredictionId(1), Protocol::Http);
            let (outcome, duration) = (Ok(&timings), Duration::from_millis(3));
            RequestFinished { version, prediction, protocol, outcome, duration }.emit(&monitor);
        };
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| (0..EACH).for_each(answer));
            }
            let (mut before, count) =
                (0.0, "tidegate_requests_total{model=\"m\",version=\"1\",protocol=\"http\",outcome=\"ok\"}");
            for _ in 0..20 {
                let now = parse(&monitor.render())[count];
                assert!(now >= before, "{now} after {before}");
                before = now;
            }
        });
        let all = (THREADS * EACH) as u64;
        let statistics = version.statistics();
        assert_eq!((statistics.executions, statistics.inferences, statistics.success.count), (all, 2 * all, all));
        // Not shown yet: a share is handed on for a scrape, and when the version goes.
        answer(0);
        drop(version);
        let samples = parse(&monitor.render());
        let labels = "model=\"m\",version=\"1\"";
        for (series, expected) in [
            (format!("tidegate_requests_total{{{labels},protocol=\"http\",outcome=\"ok\"}}"), all + 1),
            (format!("tidegate_request_duration_seconds_count{{{labels},protocol=\"http\"}}"), all + 1),
            (format!("tidegate_queue_duration_seconds_count{{{labels}}}"), all + 1),
            (format!("tidegate_executions_total{{{labels}}}"), all + 1),
            (format!("tidegate_batch_size_sum{{{labels}}}"), 2 * (all + 1)),
        ] {
            assert_eq!(samples.get(&series), Some(&(expected as f64)), "{series} in {samples:#?}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_stays_flat_without_a_scrape() {
        const ROUNDS: usize = 400;
        const SAMPLES: usize = 20_000;
        let monitor = Monitor::new();
        let version = monitor.version("m".into(), id(1), vec![output("y", OutputKind::Logits)]);
        let logits = floats(&[1, 10], vec![0.5; 10]);
        let before = process::resident_memory().unwrap();
        for _ in 0..ROUNDS {
            (0..SAMPLES).for_each(|_| execute(&version, 1, false));
            version.fold(std::slice::from_ref(&logits), RUN);
        }
        let grown = process::resident_memory().unwrap() - before;
        // Kept samples would take more than 250 MB; other tests of this process may hold some MB meanwhile.
        assert!(grown < 128e6, "resident memory has grown by {grown} bytes");
        let samples = parse(&monitor.render());
        let count = samples["tidegate_batch_size_count{model=\"m\",version=\"1\"}"];
        assert_eq!(count, (ROUNDS * SAMPLES) as f64);
    }
}
