//! What was measured, as one page that needs nothing else: no script, no font, no picture from elsewhere; light or
//! dark as the reader has it. Pure.

use std::collections::BTreeSet;

use super::chart::{self, Axis, Chart, Point, Scale, Series, Stroke, escaped};
use super::in_process::Ceiling;
use super::report::{Cell, LoadSaid, Ramp, Report, Role, Side};
use super::stats::Estimate;
use super::table::{count, short};
use super::wire::Wire;

const STYLE: &str = "
:root{color-scheme:light dark;--ground:#fff;--raised:#f6f7f9;--ink:#1b1f24;--faint:#68717d;--line:#e2e6ea;--axis:#aeb6bf;
--bad:#c0312b;--good:#1a7f4b;--c0:#2468d8;--c1:#d9660d;--c2:#128a64;--c3:#9a4bc4;--c4:#c2305f;--c5:#7c6a00;--c6:#0d8aa5;--c7:#6b6f76}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--raised:#1c2026;--ink:#e6e9ed;--faint:#98a2ae;--line:#2b313a;--axis:#5a6470;
--bad:#ff7b72;--good:#56d38f;--c0:#6ea8ff;--c1:#ff9f4d;--c2:#4fd1a1;--c3:#cf97f0;--c4:#ff7aa5;--c5:#d8c24a;--c6:#59c8e0;--c7:#a7adb5}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.5rem 4rem;max-width:74rem;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.6rem 0 .8rem}
p{margin:.3rem 0}.faint{color:var(--faint)}.bad{color:var(--bad)}.good{color:var(--good)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.8rem;margin:1.6rem 0}
.tile{background:var(--raised);border:1px solid var(--line);border-radius:10px;padding:.9rem 1.1rem}
.tile b{display:block;font-size:1.65rem;line-height:1.25;font-weight:650}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,29rem),1fr));gap:1rem}
figure{margin:0;background:var(--raised);border:1px solid var(--line);border-radius:10px;padding:.9rem 1rem .7rem}
figcaption{font-weight:600;margin-bottom:.3rem}
figure>svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink);font-size:12px;font-family:inherit}svg .tick{fill:var(--faint);font-size:11px}
svg .label{fill:var(--faint)}.grid{stroke:var(--line)}.axis{stroke:var(--axis)}.one{stroke:var(--ink);stroke-dasharray:2 3}
line.limit{stroke:var(--bad);stroke-dasharray:5 4}text.limit{fill:var(--bad)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.dashed{stroke-dasharray:6 4}.dotted{stroke-dasharray:1.5 4;stroke-linecap:round}.interval{stroke-width:1.5;opacity:.55}.wide{stroke-width:3}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}
.c6{stroke:var(--c6)}.c7{stroke:var(--c7)}circle{stroke-width:0}
circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}circle.c2{fill:var(--c2)}circle.c3{fill:var(--c3)}circle.c4{fill:var(--c4)}
circle.c5{fill:var(--c5)}circle.c6{fill:var(--c6)}circle.c7{fill:var(--c7)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin-top:.4rem;font-size:13px;color:var(--faint)}
.legend span{display:inline-flex;align-items:center;gap:.4rem}.key{width:24px;height:8px}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:13.5px}th,td{padding:.42rem .75rem;text-align:right;white-space:nowrap}
th{color:var(--faint);font-weight:500;background:var(--raised)}tr+tr td{border-top:1px solid var(--line)}
td.name,th.name{text-align:left}td small{color:var(--faint);font-size:11.5px}td.best{font-weight:650}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.4rem;margin:0}dt{color:var(--faint)}dd{margin:0;overflow-wrap:anywhere}
";

pub(super) fn page(report: &Report) -> String {
    let title = title(report);
    let sections = [
        tiles(report),
        ramps(report),
        throughput(report),
        percentiles(report),
        ratios(report),
        cells(report),
        engines(report),
        failures(report),
        ceilings(report),
        facts(report),
    ];
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{0}</title><style>{STYLE}</style></head><body><h1>{0}</h1><p class=\"faint\">{1}</p>{2}</body></html>\n",
        escaped(&title),
        escaped(&subtitle(report)),
        sections.concat()
    )
}

fn title(report: &Report) -> String {
    let mut names: BTreeSet<&str> = report.models.iter().map(|sent| &*sent.model).collect();
    names.extend(report.ceilings.iter().map(|ceiling| &*ceiling.model));
    match names.into_iter().collect::<Vec<_>>()[..] {
        [] => "The transport alone".into(),
        ref names => names.join(", "),
    }
}

fn subtitle(report: &Report) -> String {
    let environment = &report.environment;
    format!(
        "tidegate bench {} · {} · {} cores · {}",
        environment.tidegate,
        environment.cpu.as_deref().unwrap_or("unknown processor"),
        environment.cores,
        date(environment.begun)
    )
}

/// `2026-11-22 14:05 UTC`, by Howard Hinnant's `civil_from_days`.
fn date(seconds: u64) -> String {
    let (days, minutes) = (seconds / 86_400 + 719_468, seconds % 86_400 / 60);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", minutes / 60, minutes % 60)
}

fn section(title: &str, content: String) -> String {
    if content.is_empty() { content } else { format!("<h2>{title}</h2>{content}") }
}

/// What a person looks for first: of each wire the most answers and the lowest latency.
fn tiles(report: &Report) -> String {
    let mut out = String::new();
    let main = |cell: &Cell| {
        cell.sides.first().map(|side| (cell.load.text(), side.throughput.clone(), side.latency_ms.p99.clone()))
    };
    for wire in wires(report) {
        let cells = report.cells.iter().filter(|cell| cell.protocol == wire).filter_map(main);
        let best = cells.filter_map(|(load, throughput, p99)| Some((load, throughput?.median, p99)));
        let Some((load, answers, p99)) = best.max_by(|one, other| one.1.total_cmp(&other.1)) else { continue };
        let p99 = p99.map(|p99| format!(", p99 {} ms", short(p99.median))).unwrap_or_default();
        out.push_str(&format!(
            "<div class=\"tile\"><span class=\"faint\">{wire}</span><b>{}/s</b><span class=\"faint\">{}{p99}</span></div>",
            count(answers),
            escaped(&load)
        ));
    }
    for ramp in report.ramps.iter().filter(|ramp| ramp.role == Role::Server) {
        let slo = report.verdict.slo.as_deref().unwrap_or_default();
        let found = ramp.rate.map_or("none".into(), |rate| format!("{}/s", count(rate)));
        out.push_str(&format!(
            "<div class=\"tile\"><span class=\"faint\">{}, highest rate</span><b>{found}</b><span class=\"faint\">{}</span></div>",
            ramp.protocol,
            escaped(slo)
        ));
    }
    for ceiling in &report.ceilings {
        let Some(best) = ceiling.cells.get(ceiling.best) else { continue };
        out.push_str(&format!(
            "<div class=\"tile\"><span class=\"faint\">{}, engine alone</span><b>{} rows/s</b>\
             <span class=\"faint\">{} rows, {} × {} threads</span></div>",
            escaped(&ceiling.name()),
            count(best.rows_per_second.median),
            best.rows,
            best.instances,
            best.threads
        ));
    }
    let errors = report.verdict.errors;
    if !report.cells.is_empty() {
        let class = if errors > report.verdict.max_errors { "bad" } else { "good" };
        out.push_str(&format!(
            "<div class=\"tile\"><span class=\"faint\">errors</span><b class=\"{class}\">{}</b>\
             <span class=\"faint\">of {} requests</span></div>",
            count(errors as f64),
            count(report.cells.iter().flat_map(|cell| &cell.sides).map(|side| side.answers).sum::<u64>() as f64)
        ));
    }
    if let (Some(slo), Some(met)) = (&report.verdict.slo, report.verdict.slo_met) {
        let (class, word) = if met { ("good", "met") } else { ("bad", "missed") };
        out.push_str(&format!(
            "<div class=\"tile\"><span class=\"faint\">objective</span><b class=\"{class}\">{word}</b>\
             <span class=\"faint\">{}</span></div>",
            escaped(slo)
        ));
    }
    format!("<div class=\"tiles\">{out}</div>")
}

fn wires(report: &Report) -> BTreeSet<Wire> {
    report.cells.iter().map(|cell| cell.protocol).collect()
}

/// The servers, in the order in which they are measured.
fn roles(report: &Report) -> Vec<Role> {
    report.servers.iter().map(|server| server.role).collect()
}

fn stroke(role: Role) -> Stroke {
    match role {
        Role::Server => Stroke::Solid,
        Role::Compared => Stroke::Dashed,
        Role::Echo => Stroke::Dotted,
    }
}

/// A line for each wire and server: the wire's colour, the server's stroke.
fn lines(report: &Report, point: impl Fn(usize, &Cell, &Side) -> Option<Point>) -> Vec<Series> {
    let (wires, roles) = (wires(report), roles(report));
    let mut lines = Vec::new();
    for role in &roles {
        for (wire_at, wire) in wires.iter().enumerate() {
            let cells = report.cells.iter().filter(|cell| cell.protocol == *wire).enumerate();
            let points = cells.filter_map(|(position, cell)| {
                point(position, cell, cell.sides.iter().find(|side| side.role == *role)?)
            });
            lines.push(Series {
                name: if roles.len() > 1 { format!("{wire}, {}", role.name()) } else { wire.to_string() },
                colour: wire_at,
                stroke: stroke(*role),
                marked: true,
                points: points.collect(),
            });
        }
    }
    lines
}

/// How loads are laid out along an axis: by their rates, or side by side.
fn load_axis(report: &Report) -> Axis {
    let Some(wire) = wires(report).into_iter().next() else { return Axis::new("", Scale::Linear) };
    let loads: Vec<&LoadSaid> =
        report.cells.iter().filter(|cell| cell.protocol == wire).map(|cell| &cell.load).collect();
    let open = loads.iter().all(|load| matches!(load, LoadSaid::Open { .. }));
    let name = |load: &&LoadSaid| match load {
        LoadSaid::Closed { clients } => clients.to_string(),
        LoadSaid::Open { rate, .. } => count(*rate),
    };
    Axis::new(if open { "requests due each second" } else { "clients" }, Scale::Names(loads.iter().map(name).collect()))
}

fn told(cell: &Cell, side: &Side, what: &str, estimate: &Estimate) -> String {
    format!(
        "{}, {}, {}: {what} {} ({}–{})",
        cell.protocol,
        cell.load.text(),
        side.role.name(),
        short(estimate.median),
        short(estimate.low),
        short(estimate.high)
    )
}

fn throughput(report: &Report) -> String {
    if report.cells.is_empty() {
        return String::new();
    }
    let by_load = |title: &str, label: &str, scale: Scale, of: fn(&Side) -> Option<&Estimate>| Chart {
        title: title.into(),
        x: load_axis(report),
        y: Axis::new(label, scale),
        series: lines(report, |position, cell, side| {
            let estimate = of(side)?;
            Some(Point {
                x: position as f64,
                y: estimate.median,
                interval: Some((estimate.low, estimate.high)),
                told: told(cell, side, label, estimate),
            })
        }),
        limit: None,
    };
    let against = Chart {
        title: "Latency against throughput".into(),
        x: Axis::new("answers a second", Scale::Linear),
        y: Axis::new("p99, ms", Scale::Log),
        series: lines(report, |_, cell, side| {
            let (answers, p99) = (side.throughput.as_ref()?, side.latency_ms.p99.as_ref()?);
            let told = format!("{}; {} answers/s", told(cell, side, "p99 ms", p99), count(answers.median));
            Some(Point { x: answers.median, y: p99.median, interval: Some((p99.low, p99.high)), told })
        }),
        limit: None,
    };
    let charts = [
        by_load("Throughput", "answers a second", Scale::Linear, |side| side.throughput.as_ref()),
        by_load("Median latency", "p50, ms", Scale::Log, |side| side.latency_ms.p50.as_ref()),
        by_load("Tail latency", "p99, ms", Scale::Log, |side| side.latency_ms.p99.as_ref()),
        against,
    ];
    let charts = charts.iter().map(Chart::svg).collect::<String>();
    section("Throughput and latency by load", format!("<div class=\"charts\">{charts}</div>"))
}

/// With one server a chart for each wire, with a line for each load; with several a chart for each load.
fn percentiles(report: &Report) -> String {
    let line = |name: String, colour: usize, side: &Side| Series {
        name,
        colour,
        stroke: Stroke::Solid,
        marked: false,
        points: side
            .curve
            .iter()
            .map(|(quantile, millis)| Point { x: *quantile, y: *millis, interval: None, told: String::new() })
            .collect(),
    };
    let chart = |title: String, series: Vec<Series>| Chart {
        title,
        x: Axis::new("share of requests", Scale::Quantile),
        y: Axis::new("latency, ms", Scale::Log),
        series,
        limit: None,
    };
    let charts: Vec<Chart> = if roles(report).len() > 1 {
        let one = |cell: &Cell| {
            let sides = cell.sides.iter().enumerate();
            let series = sides.map(|(at, side)| line(side.role.name().into(), at, side)).collect();
            chart(format!("{}, {}", cell.protocol, cell.load.text()), series)
        };
        report.cells.iter().map(one).collect()
    } else {
        let one = |wire: Wire| {
            let cells = report.cells.iter().filter(|cell| cell.protocol == wire).enumerate();
            let series = cells.filter_map(|(at, cell)| Some(line(cell.load.text(), at, cell.sides.first()?)));
            chart(wire.to_string(), series.collect())
        };
        wires(report).into_iter().map(one).collect()
    };
    if charts.is_empty() {
        return String::new();
    }
    let charts = charts.iter().map(Chart::svg).collect::<String>();
    section("Latency by percentile", format!("<div class=\"charts\">{charts}</div>"))
}

fn ratios(report: &Report) -> String {
    let roles = roles(report);
    let wires: Vec<Wire> = wires(report).into_iter().collect();
    let mut charts = String::new();
    for under in roles.iter().skip(1) {
        let chart = |title: &str, of: fn(&super::report::Ratio) -> Option<&Estimate>| {
            let rows = report.cells.iter().filter_map(|cell| {
                let ratio = cell.ratios.iter().find(|ratio| ratio.under == *under)?;
                let estimate = of(ratio)?;
                Some(chart::Ratio {
                    name: format!("{}, {}", cell.protocol, cell.load.text()),
                    median: estimate.median,
                    low: estimate.low,
                    high: estimate.high,
                    colour: wires.iter().position(|wire| *wire == cell.protocol).unwrap_or(0),
                })
            });
            let rows: Vec<chart::Ratio> = rows.collect();
            if rows.is_empty() { String::new() } else { chart::ratios(title, &rows) }
        };
        let over = roles.first().map_or("", |role| role.name());
        let name = |what: &str| format!("{what}: {over} / {}", under.name());
        charts.push_str(&chart(&name("Throughput"), |ratio| ratio.throughput.as_ref()));
        charts.push_str(&chart(&name("Median latency"), |ratio| ratio.p50.as_ref()));
        charts.push_str(&chart(&name("Tail latency (p99)"), |ratio| ratio.p99.as_ref()));
        charts.push_str(&chart(&name("Server CPU for an answer"), |ratio| ratio.server_cpu.as_ref()));
    }
    if charts.is_empty() {
        return charts;
    }
    section("Ratios, round by round", format!("<div class=\"charts\">{charts}</div>"))
}

fn table(heads: &[&str], names: usize, rows: &[Vec<String>]) -> String {
    let class = |column: usize| if column < names { " class=\"name\"" } else { "" };
    let head: String = heads.iter().enumerate().map(|(at, head)| format!("<th{}>{head}</th>", class(at))).collect();
    let row = |row: &Vec<String>| {
        let cells = row.iter().enumerate().map(|(at, cell)| format!("<td{}>{cell}</td>", class(at)));
        format!("<tr>{}</tr>", cells.collect::<String>())
    };
    let rows: String = rows.iter().map(row).collect();
    format!("<div class=\"scroll\"><table><tr>{head}</tr>{rows}</table></div>")
}

fn with_interval(estimate: Option<&Estimate>) -> String {
    estimate.map_or("–".into(), |found| {
        format!("{} <small>{}–{}</small>", short(found.median), short(found.low), short(found.high))
    })
}

fn cells(report: &Report) -> String {
    if report.cells.is_empty() {
        return String::new();
    }
    let heads = [
        "protocol",
        "load",
        "server",
        "answers/s",
        "p50 ms",
        "p90",
        "p99",
        "p99.9",
        "max",
        "client µs",
        "server µs",
        "errors",
    ];
    let mut rows = Vec::new();
    for (cell, side) in report.cells.iter().flat_map(|cell| cell.sides.iter().map(move |side| (cell, side))) {
        let latency = &side.latency_ms;
        let median = |found: &Option<Estimate>| found.as_ref().map_or("–".into(), |found| short(found.median));
        let failures = side.failures();
        rows.push(vec![
            cell.protocol.to_string(),
            cell.load.text(),
            side.role.name().into(),
            with_interval(side.throughput.as_ref()),
            with_interval(latency.p50.as_ref()),
            median(&latency.p90),
            with_interval(latency.p99.as_ref()),
            median(&latency.p999),
            median(&latency.max),
            median(&side.client_cpu_us),
            median(&side.server_cpu_us),
            if failures > 0 { format!("<span class=\"bad\">{}</span>", count(failures as f64)) } else { "0".into() },
        ]);
    }
    section("All measurements", table(&heads, 3, &rows))
}

/// The engine alone, where it took turns with the servers.
fn engines(report: &Report) -> String {
    let row = |cell: &Cell| {
        let engine = cell.engine.as_ref()?;
        Some(vec![
            cell.protocol.to_string(),
            cell.load.text(),
            format!("{} × {}", engine.instances, engine.threads),
            engine.rows.to_string(),
            with_interval(Some(&engine.rows_per_second)),
            with_interval(Some(&engine.p50_ms)),
            with_interval(Some(&engine.p99_ms)),
        ])
    };
    let rows: Vec<_> = report.cells.iter().filter_map(row).collect();
    if rows.is_empty() {
        return String::new();
    }
    let heads = ["protocol", "load", "instances × threads", "rows", "rows/s", "run p50 ms", "p99"];
    section("The engine alone, in turns with the servers", table(&heads, 3, &rows))
}

fn failures(report: &Report) -> String {
    let mut rows = Vec::new();
    for (cell, side) in report.cells.iter().flat_map(|cell| cell.sides.iter().map(move |side| (cell, side))) {
        let mut row = |kind: &str, number: u64, first: &str| {
            let place = [cell.protocol.to_string(), cell.load.text(), side.role.name().into()];
            let what = [escaped(kind), escaped(first), count(number as f64)];
            rows.push(place.into_iter().chain(what).collect());
        };
        for errors in &side.errors {
            row(&errors.kind, errors.count, &errors.first);
        }
        if side.unsent > 0 {
            row("never sent", side.unsent, "");
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    section("Errors", table(&["protocol", "load", "server", "kind", "the first", "count"], 5, &rows))
}

fn ramps(report: &Report) -> String {
    let mut charts = String::new();
    for ramp in &report.ramps {
        charts.push_str(&ramp_chart(ramp, report).svg());
    }
    if charts.is_empty() {
        return charts;
    }
    section("The search for the highest rate", format!("<div class=\"charts\">{charts}</div>"))
}

fn ramp_chart(ramp: &Ramp, report: &Report) -> Chart {
    let mut probes: Vec<_> = ramp.probes.iter().filter(|probe| probe.latency_ms > 0.0).collect();
    probes.sort_by(|one, other| one.rate.total_cmp(&other.rate));
    let line = |name: &str, colour: usize, stroke: Stroke, of: fn(&super::report::Probe) -> f64| Series {
        name: name.into(),
        colour,
        stroke,
        marked: true,
        points: probes
            .iter()
            .map(|probe| Point {
                x: probe.rate,
                y: of(probe),
                interval: None,
                told: format!(
                    "{}/s: {} ms, {} errors, {}",
                    count(probe.rate),
                    short(of(probe)),
                    probe.failures,
                    if probe.met { "met" } else { "missed" }
                ),
            })
            .collect(),
    };
    let slo = report.verdict.slo.clone().unwrap_or_default();
    let (percentile, _) = slo.split_once('=').unwrap_or((&slo, ""));
    Chart {
        title: format!("{}, {}", ramp.protocol, ramp.role.name()),
        x: Axis::new("requests due each second", Scale::Log),
        y: Axis::new("latency, ms", Scale::Log),
        series: vec![
            line(percentile, 0, Stroke::Solid, |probe| probe.latency_ms),
            line("median", 1, Stroke::Dashed, |probe| probe.p50_ms),
        ],
        limit: report.verdict.slo_ms.map(|limit| (limit, slo.clone())),
    }
}

fn ceilings(report: &Report) -> String {
    let mut out = String::new();
    for ceiling in &report.ceilings {
        out.push_str(&format!("<h2>{}, the engine alone</h2>", escaped(&ceiling.name())));
        out.push_str(&format!(
            "<p class=\"faint\">{}; every instance runs one batch after the other, without queue or transport</p>",
            escaped(&ceiling.engine)
        ));
        let charts: String = [
            ceiling_chart(ceiling, "rows a second", Scale::Linear, |cell| &cell.rows_per_second),
            ceiling_chart(ceiling, "run, p50 ms", Scale::Log, |cell| &cell.p50_ms),
        ]
        .iter()
        .map(Chart::svg)
        .collect();
        out.push_str(&format!("<div class=\"charts\">{charts}</div><p></p>"));
        let rows: Vec<Vec<String>> = ceiling
            .cells
            .iter()
            .enumerate()
            .map(|(at, cell)| {
                let mark = match (at == ceiling.best, Some(at) == ceiling.best_single) {
                    (true, true) => "most rows, soonest answer",
                    (true, false) => "most rows",
                    (false, true) => "soonest answer",
                    (false, false) => "",
                };
                vec![
                    format!("{} × {}", cell.instances, cell.threads),
                    cell.rows.to_string(),
                    with_interval(Some(&cell.rows_per_second)),
                    with_interval(Some(&cell.p50_ms)),
                    with_interval(Some(&cell.p99_ms)),
                    mark.into(),
                ]
            })
            .collect();
        out.push_str(&table(&["instances × threads", "rows", "rows/s", "run p50 ms", "p99", ""], 1, &rows));
    }
    out
}

fn ceiling_chart(
    ceiling: &Ceiling,
    label: &str,
    scale: Scale,
    of: fn(&super::in_process::Timed) -> &Estimate,
) -> Chart {
    let mut sizes: Vec<usize> = ceiling.cells.iter().map(|cell| cell.rows).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let mut layouts: Vec<(usize, usize)> = ceiling.cells.iter().map(|cell| (cell.instances, cell.threads)).collect();
    layouts.dedup();
    let series = layouts.iter().enumerate().map(|(colour, layout)| Series {
        name: format!("{} × {}", layout.0, layout.1),
        colour,
        stroke: Stroke::Solid,
        marked: true,
        points: ceiling
            .cells
            .iter()
            .filter(|cell| (cell.instances, cell.threads) == *layout)
            .map(|cell| {
                let estimate = of(cell);
                Point {
                    x: sizes.iter().position(|rows| *rows == cell.rows).unwrap_or(0) as f64,
                    y: estimate.median,
                    interval: Some((estimate.low, estimate.high)),
                    told: format!("{} × {}, {} rows: {}", layout.0, layout.1, cell.rows, short(estimate.median)),
                }
            })
            .collect(),
    });
    Chart {
        title: format!("{} by batch, for instances × threads", label),
        series: series.collect(),
        x: Axis::new("rows in a batch", Scale::Names(sizes.iter().map(usize::to_string).collect())),
        y: Axis::new(label, scale),
        limit: None,
    }
}

fn facts(report: &Report) -> String {
    let (settings, environment) = (&report.settings, &report.environment);
    let mut facts = Vec::new();
    for server in &report.servers {
        let addresses = server.addresses.iter().map(|address| match address.split_once("://") {
            Some((scheme, rest)) => format!("{rest} ({scheme})"),
            None => address.clone(),
        });
        facts.push((server.role.name().to_string(), addresses.collect::<Vec<_>>().join(", ")));
    }
    for sent in &report.models {
        let version = if sent.version.is_empty() { String::new() } else { format!(" version {}", sent.version) };
        facts.push((
            format!("model {}{version}", sent.model),
            format!("{}; {} requests {}, weight {}", sent.inputs.join(", "), sent.requests, sent.source, sent.weight),
        ));
    }
    let mut fact = |name: &str, value: String| facts.push((name.to_string(), value));
    fact("rounds", format!("{} of {} s each", settings.rounds, settings.duration_seconds));
    let confidence = report.confidence().map_or(String::new(), |confidence| {
        format!("; the interval behind one holds the true median in {:.1} of 100 cases", confidence * 100.0)
    });
    fact("numbers", format!("medians of the rounds{confidence}; curves are of all rounds together"));
    if report.ceilings.is_empty() {
        fact("warm-up", format!("until steady, {} s at most", settings.warm_up_seconds));
        fact(
            "client",
            format!(
                "{} threads, up to {} gRPC connections, {} requests in flight in an open loop, {} s timeout, seed {}",
                settings.threads, settings.connections, settings.outstanding, settings.timeout_seconds, settings.seed
            ),
        );
    }
    fact(
        "machine",
        format!(
            "{}, {} cores, kernel {}",
            environment.cpu.as_deref().unwrap_or("unknown processor"),
            environment.cores,
            environment.kernel.as_deref().unwrap_or("unknown")
        ),
    );
    fact("tidegate", environment.tidegate.to_string());
    let rows = facts.iter().map(|(name, value)| format!("<dt>{}</dt><dd>{}</dd>", escaped(name), escaped(value)));
    section("How it was measured", format!("<dl>{}</dl>", rows.collect::<String>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_795_356_300, "2026-11-22 14:05 UTC"),
            (4_107_542_399, "2100-02-28 23:59 UTC"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
