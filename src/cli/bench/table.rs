//! What was measured, as a person reads it in a terminal. Pure.

use super::in_process::Ceiling;
use super::report::{Cell, Ratio, Report, Role, Side};
use super::stats::Estimate;
use crate::cli::columns::aligned;
use crate::error::visible;

pub(super) fn text(report: &Report) -> String {
    let mut out = String::new();
    for sent in &report.models {
        let version = if sent.version.is_empty() { String::new() } else { format!(" version {}", sent.version) };
        out.push_str(&format!(
            "{}{version}: {}, {} {} {}\n",
            visible(&sent.model),
            visible(&sent.inputs.join(", ")),
            sent.requests,
            if sent.requests == 1 { "request" } else { "different requests" },
            visible(&sent.source),
        ));
    }
    out.push_str(&format!(
        "{}, {} cores; {} rounds of {} s\n\n",
        report.environment.cpu.as_deref().unwrap_or("unknown processor"),
        report.environment.cores,
        report.settings.rounds,
        report.settings.duration_seconds
    ));
    if !report.cells.is_empty() {
        out.push_str(&sides(report));
    }
    out.push_str(&ratios(report));
    out.push_str(&engines(report));
    out.push_str(&ramps(report));
    out.push_str(&report.ceilings.iter().map(Ceiling::text).collect::<Vec<_>>().join("\n"));
    out.push_str(&errors(report));
    out
}

fn sides(report: &Report) -> String {
    let heads =
        ["", "", "", "answers/s", "", "p50 ms", "p90", "p99", "p99.9", "max", "client µs", "server µs", "errors"];
    let mut rows = vec![heads.map(String::from).to_vec()];
    for (cell, side) in report.cells.iter().flat_map(|cell| cell.sides.iter().map(move |side| (cell, side))) {
        rows.push(row(cell, side));
    }
    if report.cells.iter().all(|cell| cell.sides.iter().all(|side| side.server_cpu_us.is_none())) {
        rows.iter_mut().for_each(|row| drop(row.remove(11)));
    }
    aligned(&rows, true)
}

fn row(cell: &Cell, side: &Side) -> Vec<String> {
    let median = |estimate: &Option<Estimate>| estimate.as_ref().map_or("–".into(), |found| short(found.median));
    let latency = &side.latency_ms;
    vec![
        cell.protocol.to_string(),
        cell.load.text(),
        side.role.name().into(),
        side.throughput.as_ref().map_or("–".into(), |found| count(found.median)),
        side.throughput.as_ref().map_or(String::new(), |found| format!("{}–{}", count(found.low), count(found.high))),
        median(&latency.p50),
        median(&latency.p90),
        median(&latency.p99),
        median(&latency.p999),
        median(&latency.max),
        median(&side.client_cpu_us),
        median(&side.server_cpu_us),
        count(side.failures() as f64),
    ]
}

fn ratios(report: &Report) -> String {
    let pairs: Vec<(&Cell, &Ratio)> =
        report.cells.iter().flat_map(|cell| cell.ratios.iter().map(move |ratio| (cell, ratio))).collect();
    if pairs.is_empty() {
        return String::new();
    }
    let heads = ["", "", "ratio", "answers/s", "", "p50", "", "p99", "", "server CPU", ""];
    let mut rows = vec![heads.map(String::from).to_vec()];
    for (cell, ratio) in pairs {
        let mut row = vec![
            cell.protocol.to_string(),
            cell.load.text(),
            format!("{} / {}", ratio.over.name(), ratio.under.name()),
        ];
        for estimate in [&ratio.throughput, &ratio.p50, &ratio.p99, &ratio.server_cpu] {
            row.extend(estimate.as_ref().map_or([String::from("–"), String::new()], |found| {
                [format!("{:.3}", found.median), format!("{:.3}–{:.3}", found.low, found.high)]
            }));
        }
        rows.push(row);
    }
    if report.cells.iter().flat_map(|cell| &cell.ratios).all(|ratio| ratio.server_cpu.is_none()) {
        rows.iter_mut().for_each(|row| row.truncate(9));
    }
    format!("\n{}", aligned(&rows, true))
}

/// The engine alone, where it took turns with the servers.
fn engines(report: &Report) -> String {
    let heads = ["", "", "", "rows/s", "", "run p50 ms", "p99"];
    let mut rows = vec![heads.map(String::from).to_vec()];
    for (cell, engine) in report.cells.iter().filter_map(|cell| Some((cell, cell.engine.as_ref()?))) {
        rows.push(vec![
            cell.protocol.to_string(),
            cell.load.text(),
            format!("engine, {} rows, {} × {}", engine.rows, engine.instances, engine.threads),
            count(engine.rows_per_second.median),
            format!("{}–{}", count(engine.rows_per_second.low), count(engine.rows_per_second.high)),
            short(engine.p50_ms.median),
            short(engine.p99_ms.median),
        ]);
    }
    if rows.len() == 1 { String::new() } else { format!("\n{}", aligned(&rows, true)) }
}

/// The curve that the search went along, by rate.
fn ramps(report: &Report) -> String {
    let mut out = String::new();
    for ramp in &report.ramps {
        let heads = ["rate/s", "answers/s", "p50 ms", "slo ms", "errors", ""];
        let mut rows = vec![heads.map(String::from).to_vec()];
        let mut probes: Vec<_> = ramp.probes.iter().collect();
        probes.sort_by(|one, other| one.rate.total_cmp(&other.rate));
        for probe in probes {
            rows.push(vec![
                count(probe.rate),
                count(probe.throughput),
                short(probe.p50_ms),
                short(probe.latency_ms),
                count(probe.failures as f64),
                if probe.met { "met".into() } else { "missed".into() },
            ]);
        }
        let slo = report.verdict.slo.as_deref().unwrap_or_default();
        let found = match ramp.rate {
            Some(rate) => format!("{slo} is met up to {}/s", count(rate)),
            None => format!("{slo} is met at no rate"),
        };
        out.push_str(&format!("{} {}: {found}\n{}", ramp.protocol, ramp.role.name(), aligned(&rows, true)));
    }
    out
}

fn errors(report: &Report) -> String {
    let mut out = String::new();
    for (cell, side) in report.cells.iter().flat_map(|cell| cell.sides.iter().map(move |side| (cell, side))) {
        let named = |what: String| {
            let role = if side.role == Role::Server { "" } else { side.role.name() };
            format!("{} {}{} {role}: {what}\n", cell.protocol, cell.load.text(), if role.is_empty() { "" } else { "," })
                .replace(" :", ":")
        };
        if side.answers == 0 {
            out.push_str(&named("not one answer".into()));
        }
        for errors in &side.errors {
            let first = if errors.first.is_empty() { String::new() } else { format!(": {}", visible(&errors.first)) };
            out.push_str(&named(format!("{} × {}{first}", count(errors.count as f64), errors.kind)));
        }
        if side.unsent > 0 {
            out.push_str(&named(format!("{} requests were due and never sent", count(side.unsent as f64))));
        }
        if side.warm_up.is_some_and(|warm_up| !warm_up.steady) {
            out.push_str(&named("was not steady when the warm-up ended".into()));
        }
    }
    if let (Some(slo), Some(met)) = (&report.verdict.slo, report.verdict.slo_met) {
        out.push_str(&format!("{slo}: {}\n", if met { "met" } else { "missed" }));
    }
    if out.is_empty() { out } else { format!("\n{out}") }
}

/// With thousands apart: `12,345`; fractions only of what is small.
pub(super) fn count(value: f64) -> String {
    if value < 10.0 && value.fract() != 0.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Three digits that matter, as far as there are any behind the point.
pub(super) fn short(value: f64) -> String {
    match value {
        _ if value >= 100.0 => count(value),
        _ if value >= 10.0 => format!("{value:.1}"),
        _ if value >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [(0.0, "0"), (3.25, "3.25"), (999.4, "999"), (1000.0, "1,000"), (1234567.8, "1,234,568")] {
            assert_eq!(count(value), text);
        }
        for (value, text) in [(0.0414, "0.041"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234.0, "1,234")] {
            assert_eq!(short(value), text);
        }
    }
}
