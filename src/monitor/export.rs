//! Getting metrics out: the exporter's recorder, which is a value here and never the process's global one, histograms,
//! of which the recorder would keep every sample until it is asked, and the Prometheus text of what this module
//! accumulates itself.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::{Mutex, MutexGuard};

use metrics::{Counter, Gauge, Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use super::histogram::Histogram;
use super::lock;
use super::names::{self, Metric, Shape};

static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

/// Counters, gauges and histograms that live as long as the process. Handles are registered once and cached by the
/// caller; registering an existing series gives the same one.
pub(super) struct Exporter {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    /// Held while a scrape is written, and by who adds to several series that should agree with each other.
    histograms: Mutex<Histograms>,
}

/// By metric and label values.
#[derive(Default)]
pub(super) struct Histograms(BTreeMap<&'static str, BTreeMap<Vec<Box<str>>, Histogram>>);

impl Exporter {
    pub(super) fn new() -> Exporter {
        let recorder = PrometheusBuilder::new().build_recorder();
        for metric in names::ALL {
            match metric.shape {
                Shape::Counter => recorder.describe_counter(metric.name.into(), None, metric.help.into()),
                Shape::Gauge => recorder.describe_gauge(metric.name.into(), None, metric.help.into()),
                Shape::Histogram(_) => {}
            }
        }
        let handle = recorder.handle();
        Exporter { recorder, handle, histograms: Mutex::default() }
    }

    pub(super) fn counter(&self, metric: &'static Metric, values: &[&str]) -> Counter {
        self.recorder.register_counter(&key(metric, values), &METADATA)
    }

    pub(super) fn gauge(&self, metric: &'static Metric, values: &[&str]) -> Gauge {
        self.recorder.register_gauge(&key(metric, values), &METADATA)
    }

    /// While it lives, no scrape is written.
    pub(super) fn histograms(&self) -> MutexGuard<'_, Histograms> {
        lock(&self.histograms)
    }

    pub(super) fn render(&self) -> String {
        let histograms = self.histograms();
        let mut out = self.handle.render();
        histograms.write(&mut out);
        out
    }
}

impl Histograms {
    pub(super) fn add(&mut self, metric: &'static Metric, values: &[&str], counted: &Histogram) {
        if !counted.is_empty() {
            let series = self.0.entry(metric.name).or_default();
            let values = values.iter().map(|value| (*value).into()).collect();
            series.entry(values).or_insert_with(|| Histogram::new(counted.bounds)).merge(counted);
        }
    }

    fn write(&self, out: &mut String) {
        for metric in names::ALL {
            let mut family = Family::new(out, metric);
            for (values, histogram) in self.0.get(metric.name).into_iter().flatten() {
                let values: Vec<&str> = values.iter().map(|value| &**value).collect();
                family.histogram(&values, histogram);
            }
        }
    }
}

fn key(metric: &'static Metric, values: &[&str]) -> Key {
    // Both are written in this module's sources: a slip fails the first test that makes the series.
    assert_eq!(metric.labels.len(), values.len(), "{}", metric.name);
    let labels: Vec<Label> =
        metric.labels.iter().zip(values).map(|(name, value)| Label::new(*name, (*value).to_owned())).collect();
    Key::from_parts(metric.name, labels)
}

/// The lines of one family; its `HELP` and `TYPE` are written with the first sample, so that an empty one has none.
pub(super) struct Family<'a> {
    out: &'a mut String,
    metric: &'static Metric,
    begun: bool,
}

impl<'a> Family<'a> {
    pub(super) fn new(out: &'a mut String, metric: &'static Metric) -> Self {
        Family { out, metric, begun: false }
    }

    pub(super) fn sample(&mut self, values: &[&str], value: impl Display) {
        self.line("", values, None, value);
    }

    pub(super) fn histogram(&mut self, values: &[&str], histogram: &Histogram) {
        let mut cumulative = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            cumulative += count;
            self.line("_bucket", values, Some(bound), cumulative);
        }
        let total = histogram.count();
        self.line("_bucket", values, Some(&"+Inf"), total);
        self.line("_sum", values, None, Number(histogram.sum()));
        self.line("_count", values, None, total);
    }

    fn line(&mut self, suffix: &str, values: &[&str], le: Option<&dyn Display>, value: impl Display) {
        let Metric { name, shape, labels, help, .. } = self.metric;
        // As above: a sample with other labels than its family's would spoil the whole scrape.
        assert_eq!(labels.len(), values.len(), "{name}");
        if !self.begun {
            self.begun = true;
            let _ = write!(self.out, "# HELP {name} {help}\n# TYPE {name} {}\n", shape.name());
        }
        self.out.push_str(name);
        self.out.push_str(suffix);
        let mut separator = '{';
        for (label, value) in labels.iter().zip(values) {
            self.out.push(separator);
            separator = ',';
            let _ = write!(self.out, "{label}=\"");
            escape(self.out, value);
            self.out.push('"');
        }
        if let Some(le) = le {
            let _ = write!(self.out, "{separator}le=\"{le}\"");
            separator = ',';
        }
        if separator == ',' {
            self.out.push('}');
        }
        let _ = writeln!(self.out, " {value}");
    }
}

/// A label value as the text format wants it: backslash, quote and line feed escaped.
fn escape(out: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
}

/// A number as the text format spells it.
pub(super) struct Number(pub(super) f64);

impl Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            f64::INFINITY => f.write_str("+Inf"),
            f64::NEG_INFINITY => f.write_str("-Inf"),
            number => number.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_escaped_and_headers_written_once() {
        let mut out = String::new();
        let mut family = Family::new(&mut out, &names::QUEUE_DEPTH);
        family.sample(&["a\"b\\n\n", "1"], 3);
        family.sample(&["b", "1"], Number(f64::INFINITY));
        assert_eq!(out.matches("# TYPE tidegate_queue_depth gauge\n").count(), 1);
        assert!(out.contains("tidegate_queue_depth{model=\"a\\\"b\\\\n\\n\",version=\"1\"} 3\n"), "{out}");
        assert!(out.ends_with("{model=\"b\",version=\"1\"} +Inf\n"));
    }

    #[test]
    fn a_sample_with_other_labels_than_its_family_is_refused() {
        let sampled = || Family::new(&mut String::new(), &names::QUEUE_DEPTH).sample(&["m"], 3);
        assert!(std::panic::catch_unwind(sampled).is_err());
        assert!(std::panic::catch_unwind(|| key(&names::QUEUE_DEPTH, &["m", "1", "x"])).is_err());
    }

    #[test]
    fn histograms_are_cumulative() {
        let mut out = String::new();
        let mut histogram = Histogram::new(&[0.5, 1.0]);
        [0.25, 0.75, 1.0, 1.25, 1.75, 2.25].into_iter().for_each(|value| histogram.add(value));
        Family::new(&mut out, &names::VALUES).histogram(&["m", "1", "y"], &histogram);
        let lines: Vec<&str> = out.lines().skip(2).map(|line| line.rsplit(',').next().unwrap()).collect();
        assert_eq!(lines, ["le=\"0.5\"} 1", "le=\"1\"} 3", "le=\"+Inf\"} 6", "output=\"y\"} 7.25", "output=\"y\"} 6"]);
    }
}
