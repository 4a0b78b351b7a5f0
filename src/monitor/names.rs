//! Every metric of the server: name, type, unit, labels, meaning and buckets. The one place where a name is written;
//! `docs/metrics.md` is generated from it by [`reference`].
//!
//! Names follow Prometheus' conventions: prefix `tidegate_`, base units as suffixes, `_total` on counters.

use std::fmt::Write;

/// Distinct (model, version) pairs that get their own label values in the process's lifetime. The exporter cannot
/// forget a series, so later versions share `version="other"`.
pub const MAX_LABELLED_VERSIONS: usize = 1000;

/// Classes of one output that get their own series; the rest share `class="other"`.
pub const MAX_CLASS_SERIES: usize = 20;

/// Outputs of one version whose distributions are kept; later ones of the signature are left out.
pub const MAX_MONITORED_OUTPUTS: usize = 16;

/// The value of a label whose bound was reached.
pub const OTHER: &str = "other";

/// Seconds. OpenTelemetry's list for HTTP, extended downwards for small models on a CPU.
pub const DURATION_BUCKETS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0,
];

pub const BATCH_BUCKETS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

pub const CONFIDENCE_BUCKETS: &[f64] = &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0];

pub const ENTROPY_BUCKETS: &[f64] = &[0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// Signed and logarithmic: a decade each from 1e-6 to 1e6, halved (at 3) between 0.01 and 1000, both signs, and zero.
pub const VALUE_BUCKETS: &[f64] = &[
    -1e6, -1e5, -1e4, -1e3, -300.0, -100.0, -30.0, -10.0, -3.0, -1.0, -0.3, -0.1, -0.03, -0.01, -1e-3, -1e-4, -1e-5,
    -1e-6, 0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e5, 1e6,
];

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    Counter,
    Gauge,
    /// With the upper bounds of its buckets, ascending, without `+Inf`.
    Histogram(&'static [f64]),
}

impl Shape {
    /// As the text format's `TYPE` lines name it.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Counter => "counter",
            Shape::Gauge => "gauge",
            Shape::Histogram(_) => "histogram",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    Requests,
    Executions,
    Models,
    Predictions,
    Process,
}

impl Section {
    const ALL: [Section; 5] =
        [Section::Requests, Section::Executions, Section::Models, Section::Predictions, Section::Process];

    fn title(self) -> &'static str {
        match self {
            Section::Requests => "Requests",
            Section::Executions => "Executions",
            Section::Models => "Models and engines",
            Section::Predictions => "Predictions",
            Section::Process => "Process",
        }
    }
}

/// One family of series.
#[derive(Debug)]
pub struct Metric {
    pub name: &'static str,
    pub shape: Shape,
    pub unit: &'static str,
    /// Label names, in the order in which values are given.
    pub labels: &'static [&'static str],
    pub help: &'static str,
    pub section: Section,
}

macro_rules! table {
    ($($section:ident { $($id:ident = $shape:expr, $name:literal, $unit:literal, [$($label:literal),*], $help:literal;)* })*) => {
        $($(pub static $id: Metric = Metric {
            name: $name,
            shape: $shape,
            unit: $unit,
            labels: &[$($label),*],
            help: $help,
            section: Section::$section,
        };)*)*
        /// Every metric, in the order of the reference.
        pub static ALL: &[&Metric] = &[$($(&$id),*),*];
    };
}

table! {
    Requests {
        REQUESTS = Shape::Counter, "tidegate_requests_total", "requests", ["model", "version", "protocol", "outcome"],
            "Inference requests that reached a version, by how they ended: ok or the kind of the error.";
        REFUSED = Shape::Counter, "tidegate_requests_refused_total", "requests", ["kind", "protocol"],
            "Inference requests refused before a version was chosen: unknown models, malformed bodies, a full server.";
        REQUEST_DURATION = Shape::Histogram(DURATION_BUCKETS), "tidegate_request_duration_seconds", "seconds",
            ["model", "version", "protocol"],
            "Time from a request's head to its answer, formatted over REST, yet to be encoded over gRPC; of those answered with ok.";
        QUEUE_DURATION = Shape::Histogram(DURATION_BUCKETS), "tidegate_queue_duration_seconds", "seconds",
            ["model", "version"], "Time a request waited in its version's queue, of requests answered with ok.";
        IN_FLIGHT = Shape::Gauge, "tidegate_inflight", "requests", [],
            "Requests in the server, from admission until the answer is written.";
        IN_FLIGHT_BYTES = Shape::Gauge, "tidegate_inflight_bytes", "bytes", [],
            "Bytes of requests in flight: of their bodies and inputs, and, once computed, of their answers.";
        QUEUE_DEPTH = Shape::Gauge, "tidegate_queue_depth", "requests", ["model", "version"],
            "Requests waiting in a version's queue.";
        QUEUE_REJECTED = Shape::Counter, "tidegate_queue_rejected_total", "requests", ["model", "version"],
            "Requests refused because their version's queue was full.";
        QUEUE_BYTES = Shape::Gauge, "tidegate_queue_bytes", "bytes", ["model", "version"],
            "Bytes of inputs waiting in a version's queue.";
        RUNNING = Shape::Gauge, "tidegate_running", "requests", ["model", "version"],
            "Requests that a version's instances have taken from its queue and are computing.";
        CPU_POOL_QUEUE_DEPTH = Shape::Gauge, "tidegate_cpu_pool_queue_depth", "jobs", [],
            "Bodies too big for an I/O thread that wait to be parsed, formatted or compressed.";
        CPU_POOL_RUNNING = Shape::Gauge, "tidegate_cpu_pool_running", "jobs", [],
            "Bodies being parsed, formatted or compressed by the pool's threads.";
    }
    Executions {
        EXECUTIONS = Shape::Counter, "tidegate_executions_total", "batches", ["model", "version"],
            "Batches given to the engine, failed ones and reruns of parts of a failed one included.";
        EXECUTION_FAILURES = Shape::Counter, "tidegate_execution_failures_total", "batches", ["model", "version"],
            "Batches that the engine failed.";
        INFERENCES = Shape::Counter, "tidegate_inferences_total", "rows", ["model", "version"],
            "Rows computed in batches that succeeded; above executions where requests were batched.";
        BATCH_SIZE = Shape::Histogram(BATCH_BUCKETS), "tidegate_batch_size", "rows", ["model", "version"],
            "Rows of each batch given to the engine.";
        BATCH_LIMIT = Shape::Gauge, "tidegate_batch_limit_rows", "rows", ["model", "version"],
            "Rows that batches are filled up to at the moment: as many as pay, for requests as long as the latest. Absent until a worker has run.";
        EXPECTED_RUN = Shape::Gauge, "tidegate_expected_run_seconds", "seconds", ["model", "version"],
            "What a batch of tidegate_batch_limit_rows is expected to take, by the runs so far. Absent until enough is known.";
        RUN_THREADS = Shape::Gauge, "tidegate_run_threads", "threads", ["model", "version"],
            "Threads of the latest run: more than otherwise where a request was alone and that is faster.";
        SEQUENCE_POSITIONS = Shape::Counter, "tidegate_sequence_positions_total", "positions",
            ["model", "version", "kind"],
            "Positions along the sequences of batches whose requests may differ in length: data as sent, or padding.";
        INFER_DURATION = Shape::Histogram(DURATION_BUCKETS), "tidegate_infer_duration_seconds", "seconds",
            ["model", "version"], "Time to gather a batch's inputs and run the engine on them, per batch.";
    }
    Models {
        MODEL_INFO = Shape::Gauge, "tidegate_model_info", "1",
            ["model", "version", "digest", "backend", "backend_version", "device", "batching"],
            "1 for each loaded version: the artifact's digest, the engine that runs it and on which devices, whether requests are batched.";
        MODEL_READY = Shape::Gauge, "tidegate_model_ready", "1", ["model", "version"],
            "1 while a version takes requests, 0 while it loads or drains.";
        MODEL_LOAD = Shape::Gauge, "tidegate_model_load_seconds", "seconds", ["model", "version"],
            "Time a version took from the start of its load until it was ready, warm-up included.";
        MODEL_LOADS = Shape::Counter, "tidegate_model_loads_total", "versions", ["outcome"],
            "Versions loaded, by outcome: ok or failed.";
        ENGINE_INFO = Shape::Gauge, "tidegate_engine_info", "1", ["backend", "version"],
            "1 for each inference engine that the process has.";
        SERIES_TRUNCATED = Shape::Counter, "tidegate_series_truncated_total", "1", ["label"],
            "Times a value of this label was replaced by other, or left out, because its bound was reached.";
    }
    Predictions {
        ELEMENTS = Shape::Counter, "tidegate_prediction_elements_total", "elements", ["model", "version", "output"],
            "Elements of an output that were looked at, NaN and infinite ones included.";
        CLASSES = Shape::Counter, "tidegate_prediction_class_total", "rows", ["model", "version", "output", "class"],
            "Predicted classes: the most probable class of each row, or the label the model gave.";
        CONFIDENCE = Shape::Histogram(CONFIDENCE_BUCKETS), "tidegate_prediction_confidence", "probability",
            ["model", "version", "output"], "Probability of the predicted class, per row.";
        ENTROPY = Shape::Histogram(ENTROPY_BUCKETS), "tidegate_prediction_entropy", "share of the maximum",
            ["model", "version", "output"],
            "Entropy of the class probabilities over its maximum ln(classes), per row: 0 certain, 1 undecided.";
        VALUES = Shape::Histogram(VALUE_BUCKETS), "tidegate_prediction_value", "the model's own",
            ["model", "version", "output"], "Finite elements of an output that is neither classes nor labels.";
        SQUARES = Shape::Counter, "tidegate_prediction_value_squares_total", "the model's own, squared",
            ["model", "version", "output"], "Sum of the squares of the elements that tidegate_prediction_value counts.";
        NAN = Shape::Counter, "tidegate_prediction_nan_total", "elements", ["model", "version", "output"],
            "Elements that are not a number.";
        INFINITE = Shape::Counter, "tidegate_prediction_inf_total", "elements", ["model", "version", "output"],
            "Elements that are infinite, or beyond 1e150 in magnitude, where squares would overflow.";
        SAMPLED_OUT = Shape::Counter, "tidegate_prediction_sampled_out_total", "elements",
            ["model", "version", "output"],
            "Elements of large outputs that were not looked at; absent while everything is.";
    }
    Process {
        BUILD_INFO = Shape::Gauge, "tidegate_build_info", "1", ["version"], "1, with the server's version.";
        RESIDENT_MEMORY = Shape::Gauge, "process_resident_memory_bytes", "bytes", [], "Resident memory. Linux only.";
        OPEN_FDS = Shape::Gauge, "process_open_fds", "descriptors", [], "Open file descriptors. Linux only.";
        CPU_SECONDS = Shape::Counter, "process_cpu_seconds_total", "seconds", [],
            "User and system CPU time. Linux only.";
        START_TIME = Shape::Gauge, "process_start_time_seconds", "seconds since 1970", [],
            "When the process started. Linux only.";
    }
}

/// The text of `docs/metrics.md`.
pub fn reference() -> String {
    let mut out = format!(
        "# Metrics\n\n\
         Generated from `src/monitor/names.rs`; change it there, then run \
         `TIDEGATE_BLESS=1 cargo test --release --lib metrics_reference`.\n\n\
         Served as Prometheus text at `/metrics` on the observation port (8002).\n\n\
         Label values are bounded: {MAX_LABELLED_VERSIONS} (model, version) pairs in a process's lifetime (later ones \
         share `version=\"{OTHER}\"` in counters and latency histograms), {MAX_CLASS_SERIES} classes per output, \
         {MAX_MONITORED_OUTPUTS} outputs per version. What a bound cuts off is counted in `{}`. Names of models that \
         do not exist never become labels.\n\n\
         Series of the section *Predictions*, the queue's gauges and `tidegate_model_*` gauges vanish with their \
         version. Where two loads of one version are alive at once (one drains), the ready one is shown.\n",
        SERIES_TRUNCATED.name
    );
    for section in Section::ALL {
        let _ = write!(out, "\n## {}\n\n", section.title());
        out.push_str(notes(section));
        out.push_str("| name | type | unit | labels | meaning |\n|---|---|---|---|---|\n");
        for metric in ALL.iter().filter(|metric| metric.section == section) {
            let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            let Metric { name, shape, unit, help, .. } = metric;
            let _ = writeln!(out, "| `{name}` | {} | {unit} | {} | {help} |", shape.name(), labels.join(", "));
        }
    }
    out.push_str("\n## Buckets\n\n| histogram | upper bounds (and +Inf) |\n|---|---|\n");
    for metric in ALL {
        if let Shape::Histogram(bounds) = metric.shape {
            let bounds: Vec<String> = bounds.iter().map(f64::to_string).collect();
            let _ = writeln!(out, "| `{}` | {} |", metric.name, bounds.join(", "));
        }
    }
    out
}

fn notes(section: Section) -> &'static str {
    match section {
        Section::Predictions => {
            "Recorded for every version without configuration, from whole batches after they were answered. What an \
             output means is inferred from the graph and shown by `tidegate inspect`; `model.toml` overrides it.\n\n\
             - Probabilities, log probabilities, logits: a row is the last axis, one class per position. The class is \
             the position of the largest element (the first of equals); positions 0 to 19 have their own series, \
             named by the model's labels if it has any, the others share `other`. Logits pass through a softmax.\n\
             - Binary probability: every element is a row; class 1 from 0.5 up. Confidence is max(p, 1 - p).\n\
             - Labels: every element is a row; the first 20 distinct values seen have their own series.\n\
             - Values: a histogram with signed logarithmic buckets and exact moments: mean = sum / count, \
             variance = squares / count - mean^2 (of differences between two scrapes, too). The variance's relative \
             error is about 1e-16 (mean / standard deviation)^2.\n\
             - A row with a NaN has no class. A row with +Inf has a class but no confidence; -Inf is probability 0. \
             Strings that are not labels are counted only.\n\
             - Of an output with more than 1024 elements in a batch, so many are looked at, or as many as a hundredth of the run's \
             time is enough for, and of one with more than 16384 no more than so many: rows (or elements, values 16 side by side) at even distances, beginning at another offset each \
             time. Rows of more than 262144 classes are never looked at.\n\n"
        }
        Section::Requests | Section::Executions | Section::Models | Section::Process => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_follow_the_conventions() {
        let names: HashSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            let name = metric.name;
            assert!(name.starts_with("tidegate_") || metric.section == Section::Process, "{name}");
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            assert_eq!(name.ends_with("_total"), metric.shape == Shape::Counter, "{name}");
            assert!(!metric.help.contains(['\n', '|', '\\']), "{name}: the help line goes into a table");
            if metric.unit == "seconds" || metric.unit == "bytes" {
                assert!(name.contains(metric.unit), "{name}: the unit is part of the name");
            }
            if let Shape::Histogram(bounds) = metric.shape {
                assert!(bounds.is_sorted_by(|a, b| a < b) && bounds.len() <= 40, "{name}");
            }
        }
    }

    #[test]
    fn the_notes_name_the_real_bounds() {
        let text = reference();
        use super::super::distribution::{MAX_CLASSES, MAX_FOLDED_ELEMENTS, MIN_FOLDED_ELEMENTS};
        for bound in [MIN_FOLDED_ELEMENTS, MAX_FOLDED_ELEMENTS, MAX_CLASSES] {
            assert!(text.contains(&format!("more than {bound} ")), "{bound}");
        }
        assert!(text.contains(&format!("positions 0 to {} have", MAX_CLASS_SERIES - 1)));
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "blessing is how a developer runs the test, not configuration")]
    fn metrics_reference_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        if std::env::var_os("TIDEGATE_BLESS").is_some() {
            std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/docs")).unwrap();
            std::fs::write(path, reference()).unwrap();
        }
        assert!(
            std::fs::read_to_string(path).is_ok_and(|text| text == reference()),
            "docs/metrics.md differs from src/monitor/names.rs; regenerate it: \
             TIDEGATE_BLESS=1 cargo test --release --lib metrics_reference"
        );
    }
}
