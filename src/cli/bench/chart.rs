//! Charts as SVG for the report: axes, lines with intervals, a legend. Pure; colours and text sizes are the page's.

use std::fmt::Write;

use super::table::short;

/// The drawing's own units; the page scales it.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 48.0;
/// Ticks of a linear axis, about.
const TICKS: f64 = 5.0;
/// Series that have a colour of their own; others begin again.
pub(super) const COLOURS: usize = 8;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scale {
    /// From zero.
    Linear,
    Log,
    /// Of 0 to 1, so that each further nine takes as much room as the one before.
    Quantile,
    /// Positions 0, 1, 2, … with their names.
    Names(Vec<String>),
}

pub(super) struct Axis {
    pub(super) label: String,
    pub(super) scale: Scale,
}

pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    /// Around `y`.
    pub(super) interval: Option<(f64, f64)>,
    /// What is told of it when it is pointed at.
    pub(super) told: String,
}

pub(super) struct Series {
    pub(super) name: String,
    pub(super) colour: usize,
    pub(super) stroke: Stroke,
    /// A mark at every point.
    pub(super) marked: bool,
    pub(super) points: Vec<Point>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Stroke {
    Solid,
    Dashed,
    Dotted,
}

pub(super) struct Chart {
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
    /// A horizontal line, with its name.
    pub(super) limit: Option<(f64, String)>,
}

impl Axis {
    pub(super) fn new(label: &str, scale: Scale) -> Axis {
        Axis { label: label.to_string(), scale }
    }

    /// Where a value lies, in the scale's own units.
    fn position(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear | Scale::Names(_) => value,
            Scale::Log => value.max(f64::MIN_POSITIVE).log10(),
            Scale::Quantile => -(1.0 - value).max(1e-12).log10(),
        }
    }

    /// The ends that hold all values, in the scale's own units.
    fn range(&self, values: impl Iterator<Item = f64>) -> (f64, f64) {
        let usable = values.filter(|value| value.is_finite() && (self.scale != Scale::Log || *value > 0.0));
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for position in usable.map(|value| self.position(value)) {
            (low, high) = (low.min(position), high.max(position));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        match &self.scale {
            Scale::Linear => (0.0, if high > 0.0 { high * 1.06 } else { 1.0 }),
            Scale::Log => (log_floor(low), log_ceiling(high)),
            Scale::Quantile => (0.0, high.max(1.0)),
            Scale::Names(names) => (-0.5, names.len().max(1) as f64 - 0.5),
        }
    }

    /// Values with their labels.
    fn ticks(&self, (low, high): (f64, f64)) -> Vec<(f64, String)> {
        match &self.scale {
            Scale::Names(names) => names.iter().enumerate().map(|(at, name)| (at as f64, name.clone())).collect(),
            Scale::Linear => {
                let step = nice(high / TICKS);
                (0..).map(|n| f64::from(n) * step).take_while(|v| *v <= high).map(|v| (v, tick(v))).collect()
            }
            Scale::Log => {
                // Few decades have room for ticks within them.
                let within: &[f64] = if high - low <= 2.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
                let decades = low.floor() as i32..=high.ceil() as i32;
                let all = decades.flat_map(|decade| within.iter().map(move |n| n * 10f64.powi(decade)));
                let inside = |value: &f64| (low - 1e-9..=high + 1e-9).contains(&value.log10());
                all.filter(inside).map(|value| (value, tick(value))).collect()
            }
            Scale::Quantile => {
                let nines = 0..=high.floor() as i32;
                let label = |nines: i32| match nines {
                    0 => "0 %".to_string(),
                    1 => "90 %".to_string(),
                    n => format!("{:.*} %", n as usize - 2, 100.0 - 10f64.powi(2 - n)),
                };
                nines.map(|n| (1.0 - 10f64.powi(-n), label(n))).collect()
            }
        }
    }
}

/// 1, 2 or 5 times a power of ten, at least as much.
fn nice(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0].iter().map(|n| n * power).find(|n| *n >= value * 0.999).unwrap_or(10.0 * power)
}

/// The next 1, 2 or 5 times a power of ten below, or above.
fn log_floor(position: f64) -> f64 {
    let value = 10f64.powf(position);
    let power = 10f64.powf(position.floor());
    [5.0, 2.0, 1.0].iter().map(|n| n * power).find(|n| *n <= value * 1.001).unwrap_or(power).log10()
}

fn log_ceiling(position: f64) -> f64 {
    nice(10f64.powf(position)).log10()
}

fn tick(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        _ if value >= 1e6 => format!("{} M", trimmed(value / 1e6)),
        _ if value >= 1e4 => format!("{} k", trimmed(value / 1e3)),
        _ => trimmed(value),
    }
}

fn trimmed(value: f64) -> String {
    let text = format!("{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

impl Chart {
    pub(super) fn svg(&self) -> String {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = self.x.range(points().map(|point| point.x));
        let spread = points().flat_map(|point| {
            let (low, high) = point.interval.unwrap_or((point.y, point.y));
            [low, point.y, high]
        });
        let y = self.y.range(spread.chain(self.limit.iter().map(|(value, _)| *value)));
        let scaled = |(low, high): (f64, f64), position: f64| (position - low) / (high - low).max(f64::MIN_POSITIVE);
        let place_x = |value: f64| LEFT + scaled(x, self.x.position(value)) * (WIDTH - LEFT - RIGHT);
        let place_y =
            |value: f64| HEIGHT - BOTTOM - scaled(y, self.y.position(value)).clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM);
        let mut out = format!(
            "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
            escaped(&self.title),
            escaped(&self.title)
        );
        for (value, label) in self.y.ticks(y) {
            let at = place_y(value);
            write_all(
                &mut out,
                format_args!(
                    "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                    WIDTH - RIGHT,
                    LEFT - 8.0,
                    at + 4.0,
                    escaped(&label)
                ),
            );
        }
        for (value, label) in self.x.ticks(x) {
            let at = place_x(value);
            write_all(
                &mut out,
                format_args!(
                    "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{:.1}\"/>\
                 <text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                    HEIGHT - BOTTOM,
                    HEIGHT - BOTTOM + 18.0,
                    escaped(&label)
                ),
            );
        }
        write_all(
            &mut out,
            format_args!(
                "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\
             <text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text class=\"label\" transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
                WIDTH - RIGHT,
                HEIGHT - BOTTOM,
                HEIGHT - BOTTOM,
                (LEFT + WIDTH - RIGHT) / 2.0,
                HEIGHT - 8.0,
                escaped(&self.x.label),
                (TOP + HEIGHT - BOTTOM) / 2.0,
                escaped(&self.y.label)
            ),
        );
        if let Some((value, name)) = &self.limit {
            let at = place_y(*value);
            write_all(
                &mut out,
                format_args!(
                    "<line class=\"limit\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"limit\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                    WIDTH - RIGHT,
                    LEFT + 6.0,
                    at - 5.0,
                    escaped(name)
                ),
            );
        }
        for series in &self.series {
            series.draw(&mut out, &place_x, &place_y);
        }
        out.push_str("</svg>");
        out.push_str(&self.legend());
        out.push_str("</figure>");
        out
    }

    fn legend(&self) -> String {
        if self.series.len() < 2 {
            return String::new();
        }
        let entry = |series: &Series| {
            let class = series.class();
            format!(
                "<span><svg class=\"key\" viewBox=\"0 0 24 8\"><line class=\"{class}\" x1=\"0\" x2=\"24\" y1=\"4\" y2=\"4\"/>\
                 </svg>{}</span>",
                escaped(&series.name)
            )
        };
        format!("<div class=\"legend\">{}</div>", self.series.iter().map(entry).collect::<String>())
    }
}

impl Series {
    fn class(&self) -> String {
        let stroke = match self.stroke {
            Stroke::Solid => "",
            Stroke::Dashed => " dashed",
            Stroke::Dotted => " dotted",
        };
        format!("line c{}{stroke}", self.colour % COLOURS)
    }

    fn draw(&self, out: &mut String, place_x: &dyn Fn(f64) -> f64, place_y: &dyn Fn(f64) -> f64) {
        let places: Vec<(f64, f64)> = self.points.iter().map(|point| (place_x(point.x), place_y(point.y))).collect();
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        write_all(out, format_args!("<polyline class=\"{}\" points=\"{}\"/>", self.class(), path.join(" ")));
        if !self.marked {
            return;
        }
        let colour = self.colour % COLOURS;
        for (point, (x, y)) in self.points.iter().zip(places) {
            if let Some((low, high)) = point.interval {
                let (low, high) = (place_y(low), place_y(high));
                write_all(
                    out,
                    format_args!(
                        "<line class=\"interval c{colour}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\"/>"
                    ),
                );
            }
            write_all(
                out,
                format_args!(
                    "<circle class=\"c{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"><title>{}</title></circle>",
                    escaped(&point.told)
                ),
            );
        }
    }
}

/// One line of a plot of ratios: where it lies around 1.
pub(super) struct Ratio {
    pub(super) name: String,
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) colour: usize,
}

const ROW_HEIGHT: f64 = 26.0;
const NAMES_WIDTH: f64 = 200.0;
const VALUES_WIDTH: f64 = 150.0;

/// Medians with their intervals, one below the other, beside a line at 1.
pub(super) fn ratios(title: &str, ratios: &[Ratio]) -> String {
    let axis = Axis::new("", Scale::Log);
    let ends = ratios.iter().flat_map(|ratio| [ratio.low, ratio.high]).chain([1.0]);
    let (low, high) = axis.range(ends);
    let (low, high) = (low.min(0.5f64.log10()), high.max(2f64.log10()));
    let height = TOP + ROW_HEIGHT * ratios.len() as f64 + 24.0;
    let place = |value: f64| {
        let position = (axis.position(value) - low) / (high - low);
        NAMES_WIDTH + position.clamp(0.0, 1.0) * (WIDTH - NAMES_WIDTH - VALUES_WIDTH)
    };
    let mut out = format!(
        "<figure><figcaption>{0}</figcaption><svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{0}\">",
        escaped(title)
    );
    for (value, label) in axis.ticks((low, high)) {
        let (at, class) = (place(value), if value == 1.0 { "one" } else { "grid" });
        write_all(
            &mut out,
            format_args!(
                "<line class=\"{class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{:.1}\"/>\
             <text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                height - 24.0,
                height - 8.0
            ),
        );
    }
    for (row, ratio) in ratios.iter().enumerate() {
        let (at, colour) = (TOP + ROW_HEIGHT * (row as f64 + 0.5), ratio.colour % COLOURS);
        write_all(
            &mut out,
            format_args!(
                "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <line class=\"interval wide c{colour}\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <circle class=\"c{colour}\" cx=\"{:.1}\" cy=\"{at:.1}\" r=\"4.5\"/>\
             <text class=\"value\" x=\"{:.1}\" y=\"{:.1}\">{} <tspan class=\"tick\">{}–{}</tspan></text>",
                NAMES_WIDTH - 12.0,
                at + 4.0,
                escaped(&ratio.name),
                place(ratio.low),
                place(ratio.high),
                place(ratio.median),
                WIDTH - VALUES_WIDTH + 10.0,
                at + 4.0,
                short(ratio.median),
                short(ratio.low),
                short(ratio.high)
            ),
        );
    }
    out.push_str("</svg></figure>");
    out
}

/// Writing to a string does not fail.
fn write_all(out: &mut String, text: std::fmt::Arguments) {
    let _ = out.write_fmt(text);
}

/// Text that is nothing but text to a browser.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: Scale, values: &[f64]) -> Vec<String> {
        let axis = Axis::new("", scale);
        axis.ticks(axis.range(values.iter().copied())).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_are_round_and_cover_what_there_is() {
        assert_eq!(labels(Scale::Linear, &[3.0, 97.0]), ["0", "50", "100"]);
        assert_eq!(labels(Scale::Linear, &[45_000.0]), ["0", "10 k", "20 k", "30 k", "40 k"]);
        assert_eq!(labels(Scale::Log, &[0.12, 0.9]), ["0.1", "0.2", "0.5", "1"]);
        assert_eq!(labels(Scale::Log, &[0.03, 800.0]), ["0.1", "1", "10", "100", "1000"]);
        assert_eq!(labels(Scale::Quantile, &[0.0, 0.9999]), ["0 %", "90 %", "99 %", "99.9 %", "99.99 %"]);
        assert_eq!(labels(Scale::Names(vec!["a".into(), "b".into()]), &[0.0, 1.0]), ["a", "b"]);
        for scale in [Scale::Linear, Scale::Log, Scale::Quantile] {
            assert!(!labels(scale.clone(), &[]).is_empty() && !labels(scale, &[0.0]).is_empty());
        }
    }

    #[test]
    fn a_chart_draws_every_point_inside_itself() {
        let point = |x: f64, y: f64| Point { x, y, interval: Some((y / 2.0, y * 2.0)), told: "<told>".into() };
        let series = |colour| Series {
            name: "a & b".into(),
            colour,
            stroke: Stroke::Dotted,
            marked: true,
            points: vec![point(0.0, 1.0), point(0.99, 50.0)],
        };
        let chart = Chart {
            title: "\"title\"".into(),
            x: Axis::new("x", Scale::Quantile),
            y: Axis::new("y", Scale::Log),
            series: vec![series(0), series(9)],
            limit: Some((20.0, "limit".into())),
        };
        let svg = chart.svg();
        assert_eq!(svg.matches("<circle").count(), 4);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("&lt;told&gt;") && svg.contains("a &amp; b") && svg.contains("&quot;title&quot;"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let numbers = svg.split(&['"', ' ', ','][..]).filter_map(|word| word.parse::<f64>().ok());
        assert!(numbers.clone().all(|n| (-90.0..=WIDTH).contains(&n)), "{svg}");
    }

    #[test]
    fn ratios_stand_around_one() {
        let svg = ratios("r", &[Ratio { name: "n".into(), median: 0.9, low: 0.8, high: 1.1, colour: 0 }]);
        assert!(svg.contains("class=\"one\"") && svg.contains("0.900"), "{svg}");
    }
}
