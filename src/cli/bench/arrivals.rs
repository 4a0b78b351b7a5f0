//! When the requests of an open loop are due: decided before anything is sent, so that a slow server cannot put them
//! off. Pure.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cli::client::read_file;
use crate::registry::Random;

/// Highest rate, in requests a second: what one round has to keep in memory is bounded by it.
pub(super) const MAX_RATE: f64 = 1e6;

/// Most recorded arrivals.
const MAX_RECORDED: usize = 10_000_000;

#[derive(Clone, Debug)]
pub(super) enum Pattern {
    /// Independent of each other, as those of many users are.
    Poisson,
    Constant,
    /// Offsets from the beginning; repeated from there when they are over.
    Recorded(Arc<[Duration]>),
}

impl Pattern {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Pattern::Poisson => "poisson",
            Pattern::Constant => "constant",
            Pattern::Recorded(_) => "recorded",
        }
    }

    /// Seconds from the beginning, one to a line and never falling.
    pub(super) fn read(path: &Path) -> Result<Pattern> {
        let text = String::from_utf8(read_file(path)?).with_context(|| format!("{} is not text", path.display()))?;
        parse(&text).with_context(|| format!("the arrivals in {}", path.display()))
    }

    /// Requests a second, where the pattern itself says so.
    pub(super) fn own_rate(&self) -> Option<f64> {
        match self {
            Pattern::Poisson | Pattern::Constant => None,
            Pattern::Recorded(offsets) => Some(offsets.len() as f64 / span(offsets).as_secs_f64()),
        }
    }

    /// The offsets at which one of `shares` equal parts of the arrivals is due. Endless.
    pub(super) fn share(&self, rate: f64, share: usize, shares: usize, seed: u64) -> Arrivals {
        let step = shares as f64 / rate;
        match self {
            Pattern::Poisson => {
                // Poisson arrivals that are dealt out are Poisson arrivals again, of a part of the rate.
                // Far apart in the generator's sequence, which a multiple of its own increment would not be.
                let random = Random(Random(seed).draw() ^ (share as u64).wrapping_mul(0xd1b5_4a32_d192_ed03));
                Arrivals::Poisson { random, mean: step, at: 0.0 }
            }
            Pattern::Constant => Arrivals::Constant { step, at: share as f64 / rate },
            Pattern::Recorded(offsets) => {
                Arrivals::Recorded { offsets: Arc::clone(offsets), next: share, step: shares, round: Duration::ZERO }
            }
        }
    }
}

fn parse(text: &str) -> Result<Pattern> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let offset = |line: &str| {
        let seconds: f64 = line.parse().ok()?;
        Duration::try_from_secs_f64(seconds).ok()
    };
    let offsets = lines
        .map(|line| offset(line).with_context(|| format!("found `{line}`, expected seconds from the beginning")))
        .collect::<Result<Vec<_>>>()?;
    if offsets.len() < 2 || offsets.len() > MAX_RECORDED {
        bail!("found {}, expected 2 to {MAX_RECORDED}", offsets.len());
    }
    if !offsets.is_sorted() || span(&offsets).is_zero() {
        bail!("found offsets that fall or stand still, expected them to rise");
    }
    if offsets.len() as f64 / span(&offsets).as_secs_f64() > MAX_RATE {
        bail!("found over {MAX_RATE} a second on the average");
    }
    Ok(Pattern::Recorded(offsets.into()))
}

/// From the first arrival to where the next repetition begins: one mean gap behind the last.
fn span(offsets: &[Duration]) -> Duration {
    let [first, .., last] = offsets else { return Duration::ZERO };
    let between = *last - *first;
    between + between.div_f64((offsets.len() - 1) as f64)
}

pub(super) enum Arrivals {
    Poisson { random: Random, mean: f64, at: f64 },
    Constant { step: f64, at: f64 },
    Recorded { offsets: Arc<[Duration]>, next: usize, step: usize, round: Duration },
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        match self {
            Arrivals::Poisson { random, mean, at } => {
                // Of [0, 1), so that the logarithm is of what is never 0.
                *at -= (1.0 - random.unit()).ln() * *mean;
                Some(Duration::from_secs_f64(*at))
            }
            Arrivals::Constant { step, at } => {
                let due = *at;
                *at += *step;
                Some(Duration::from_secs_f64(due))
            }
            Arrivals::Recorded { offsets, next, step, round } => {
                while *next >= offsets.len() {
                    *next -= offsets.len();
                    *round += span(offsets);
                }
                let due = *round + offsets[*next] - offsets[0];
                *next += *step;
                Some(due)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(pattern: &Pattern, shares: usize, count: usize) -> Vec<Duration> {
        let parts = (0..shares).flat_map(|share| pattern.share(1000.0, share, shares, 7).take(count));
        let mut all: Vec<Duration> = parts.collect();
        all.sort();
        all
    }

    #[test]
    fn constant_arrivals_are_evenly_spaced_however_they_are_dealt_out() {
        for shares in [1, 3] {
            let all = first(&Pattern::Constant, shares, 300);
            let gaps: Vec<f64> = all.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
            assert!(gaps.iter().all(|gap| (gap - 0.001).abs() < 1e-6), "{shares} shares");
        }
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_its_spread_and_repeat_with_the_seed() {
        let all = first(&Pattern::Poisson, 2, 50_000);
        let gaps: Vec<f64> = all.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        // The tail, where one share has ended, is left out.
        let gaps = &gaps[..80_000];
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((mean / 0.001 - 1.0).abs() < 0.02, "{mean}");
        assert!((deviation / mean - 1.0).abs() < 0.03, "exponential gaps deviate by their mean: {deviation}");
        assert_eq!(all, first(&Pattern::Poisson, 2, 50_000));
        let other: Vec<Duration> = Pattern::Poisson.share(1000.0, 0, 1, 8).take(10).collect();
        assert_ne!(other, Pattern::Poisson.share(1000.0, 0, 1, 7).take(10).collect::<Vec<_>>());
    }

    #[test]
    fn shares_draw_from_numbers_of_their_own() {
        for seed in 0..8 {
            let drawn = |share| match Pattern::Poisson.share(1000.0, share, 4, seed) {
                Arrivals::Poisson { mut random, .. } => (0..10_000).map(|_| random.draw()).collect::<Vec<_>>(),
                _ => panic!("not Poisson"),
            };
            let all: std::collections::HashSet<u64> = (0..4).flat_map(drawn).collect();
            assert_eq!(all.len(), 40_000, "seed {seed}");
        }
    }

    #[test]
    fn recorded_arrivals_are_kept_and_repeated() {
        let pattern = parse("# seconds\n0.5\n0.6\n\n0.9\n").unwrap();
        let millis: Vec<u128> = pattern.share(0.0, 0, 1, 0).take(7).map(|due| due.as_millis()).collect();
        assert_eq!(millis, [0, 100, 400, 600, 700, 1000, 1200]);
        let odd: Vec<u128> = pattern.share(0.0, 1, 2, 0).take(3).map(|due| due.as_millis()).collect();
        assert_eq!(odd, [100, 600, 1000]);
        assert!((pattern.own_rate().unwrap() - 5.0).abs() < 1e-9);
        for bad in ["", "1", "1\n1", "2\n1", "a\n2", "-1\n2", "0\n0.0000001"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
