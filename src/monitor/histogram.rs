//! Counts per bucket, and sums that do not drift.

/// Counts per bucket and the sum of what was counted.
#[derive(Clone)]
pub struct Histogram {
    pub bounds: &'static [f64],
    /// One more than bounds: the last counts what is above them all.
    pub counts: Vec<u64>,
    sum: Sum,
}

impl Histogram {
    pub(super) fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, counts: vec![0; bounds.len() + 1], sum: Sum::default() }
    }

    pub(super) fn add(&mut self, value: f64) {
        // The first bucket whose upper bound is not below the value; at most `bounds.len()`, the last index.
        self.counts[self.bounds.partition_point(|bound| *bound < value)] += 1;
        self.add_to_sum(value);
    }

    /// Of values that were counted in their buckets already.
    pub(super) fn add_to_sum(&mut self, sum: f64) {
        self.sum.add(sum);
    }

    pub fn sum(&self) -> f64 {
        self.sum.value()
    }

    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Of the same bounds.
    pub(super) fn merge(&mut self, other: &Histogram) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
        self.sum.merge(other.sum);
    }

    /// [`merge`](Self::merge)s another, which is empty then.
    pub(super) fn take(&mut self, other: &mut Histogram) {
        self.merge(other);
        other.counts.fill(0);
        other.sum = Sum::default();
    }

    pub fn is_empty(&self) -> bool {
        self.counts.iter().all(|count| *count == 0)
    }
}

/// A compensated sum (Neumaier 1974): its error does not grow with the number of terms.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    sum: f64,
    compensation: f64,
}

impl Sum {
    pub(super) fn add(&mut self, term: f64) {
        let next = self.sum + term;
        self.compensation +=
            if self.sum.abs() >= term.abs() { (self.sum - next) + term } else { (term - next) + self.sum };
        self.sum = next;
    }

    pub(super) fn merge(&mut self, other: Sum) {
        self.add(other.sum);
        self.compensation += other.compensation;
    }

    pub(super) fn value(self) -> f64 {
        self.sum + self.compensation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compensated_sums_do_not_drift() {
        let mut sum = Sum::default();
        sum.add(1e16);
        (0..10_000).for_each(|_| sum.add(1.0));
        sum.add(-1e16);
        assert_eq!(sum.value(), 10_000.0);
    }

    #[test]
    fn bounds_are_inclusive_from_above() {
        let mut histogram = Histogram::new(&[-1.0, 0.0]);
        assert!(histogram.is_empty());
        [-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 9.0].into_iter().for_each(|value| histogram.add(value));
        assert_eq!((&histogram.counts[..], histogram.sum()), (&[2, 3, 2][..], 6.0));
    }
}
