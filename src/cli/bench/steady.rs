//! When a server has warmed up: its last windows look alike. Pure.

/// Windows that must look alike.
const WINDOWS: usize = 3;
/// How far a window's throughput and mean latency may lie from the mean of them.
const RATE_TOLERANCE: f64 = 0.05;
const LATENCY_TOLERANCE: f64 = 0.10;
/// With fewer answers nothing can be said of a window; it goes on.
pub(super) const LEAST_ANSWERS: u64 = 4;

#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) answers: u64,
    pub(super) seconds: f64,
    /// Of all answers together.
    pub(super) latency_seconds: f64,
}

pub(super) fn is_steady(windows: &[Window]) -> bool {
    let Some(last) = windows.last_chunk::<WINDOWS>() else { return false };
    // A count varies by its root even where nothing changes.
    let fewest = last.iter().map(|window| window.answers).min().unwrap_or(0);
    let noise = 2.0 / (fewest as f64).sqrt();
    alike(last.map(|window| window.answers as f64 / window.seconds), RATE_TOLERANCE.max(noise))
        && alike(last.map(|window| window.latency_seconds / window.answers as f64), LATENCY_TOLERANCE.max(noise))
}

fn alike(values: [f64; WINDOWS], tolerance: f64) -> bool {
    let mean = values.iter().sum::<f64>() / WINDOWS as f64;
    values.iter().all(|value| (value - mean).abs() <= tolerance * mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(rates: &[(u64, f64)]) -> Vec<Window> {
        let window = |(answers, millis): &(u64, f64)| Window {
            answers: *answers,
            seconds: 0.2,
            latency_seconds: *answers as f64 * millis / 1e3,
        };
        rates.iter().map(window).collect()
    }

    #[test]
    fn windows_that_look_alike_are_steady() {
        assert!(!is_steady(&windows(&[(10_000, 1.0), (10_000, 1.0)])), "too few of them");
        assert!(is_steady(&windows(&[(10_000, 1.0), (10_100, 1.02), (9_900, 0.98)])));
        assert!(!is_steady(&windows(&[(8_000, 1.0), (10_000, 1.0), (12_000, 1.0)])), "throughput still rises");
        assert!(!is_steady(&windows(&[(10_000, 3.0), (10_000, 2.0), (10_000, 1.0)])), "latency still falls");
        assert!(is_steady(&windows(&[(10, 9.0), (10_000, 1.0), (10_100, 1.0), (9_900, 1.0)])), "only the last count");
    }

    #[test]
    fn few_answers_are_not_asked_to_agree_better_than_they_can() {
        assert!(is_steady(&windows(&[(16, 10.0), (20, 11.0), (18, 9.5)])));
    }
}
