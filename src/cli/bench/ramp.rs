//! The search for the highest rate that meets an objective: doubled until one misses it, or halved until one meets it,
//! then narrowed down between the two. Pure.

use super::arrivals::MAX_RATE;

/// How near the lowest rate that missed may lie to the highest that met: what is told is as exact as that.
const PRECISION: f64 = 1.05;
/// Slower than this is not meeting it at all.
const LEAST_RATE: f64 = 0.1;
const MAX_PROBES: usize = 64;

pub(super) struct Search {
    first: f64,
    /// The highest rate that met the objective.
    met: Option<f64>,
    /// The lowest above it that missed.
    missed: Option<f64>,
    probes: usize,
}

impl Search {
    pub(super) fn from(first: f64) -> Search {
        Search { first, met: None, missed: None, probes: 0 }
    }

    /// What to try now; `None` when it is found, or there is nothing to be found.
    pub(super) fn next(&self) -> Option<f64> {
        let next = match (self.met, self.missed) {
            (None, None) => self.first,
            (Some(met), None) if met >= MAX_RATE => return None,
            (Some(met), None) => (met * 2.0).min(MAX_RATE),
            (None, Some(missed)) => missed / 2.0,
            (Some(met), Some(missed)) if missed / met <= PRECISION => return None,
            (Some(met), Some(missed)) => (met * missed).sqrt(),
        };
        (self.probes < MAX_PROBES && (LEAST_RATE..=MAX_RATE).contains(&next)).then_some(next)
    }

    pub(super) fn tell(&mut self, rate: f64, met: bool) {
        self.probes += 1;
        *(if met { &mut self.met } else { &mut self.missed }) = Some(rate);
    }

    pub(super) fn found(&self) -> Option<f64> {
        self.met
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rate found where those up to `limit` meet, and how many were tried.
    fn search(first: f64, limit: f64) -> (Option<f64>, usize) {
        let (mut search, mut tried) = (Search::from(first), 0);
        while let Some(rate) = search.next() {
            search.tell(rate, rate <= limit);
            tried += 1;
        }
        (search.found(), tried)
    }

    #[test]
    fn the_highest_rate_is_found_from_below_and_from_above() {
        for (first, limit) in [(100.0, 12_345.0), (100.0, 100.0), (5000.0, 31.0), (100.0, 149.9), (1.0, 999_999.0)] {
            let (found, tried) = search(first, limit);
            let found = found.unwrap();
            assert!(found <= limit && found * PRECISION >= limit, "{found} for {limit}");
            assert!(tried < 32, "{tried} tries for {limit}");
        }
    }

    #[test]
    fn it_ends_where_nothing_or_everything_meets() {
        assert_eq!(search(100.0, 0.0).0, None);
        let (found, tried) = search(100.0, f64::INFINITY);
        assert!(found == Some(MAX_RATE) && tried < MAX_PROBES);
    }

    #[test]
    fn a_server_that_changes_its_mind_ends_the_search_all_the_same() {
        let mut search = Search::from(100.0);
        let mut tried = 0;
        while let Some(rate) = search.next() {
            search.tell(rate, tried % 3 != 2);
            tried += 1;
            assert!(tried <= MAX_PROBES);
        }
    }
}
