//! What a worker counts of a version in service. All of it only grows, so that two readings differ by
//! what happened between them, and readings of several replicas add up.

use serde::{Deserialize, Serialize};

/// Upper bounds of the buckets of latency, in microseconds; what is longer is in one more bucket.
pub const LATENCY_BOUNDS_MICROS: [u64; 28] = [
    50, 100, 150, 200, 300, 400, 500, 750, 1_000, 1_500, 2_000, 3_000, 4_000, 5_000, 7_500, 10_000,
    15_000, 20_000, 30_000, 50_000, 75_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000,
    5_000_000, 10_000_000,
];
/// Bins of predictions: as many as any task needs.
pub const PREDICTION_BINS: usize = 128;
/// Classes that are told apart in the counts of quality; of models with more, only the hits are counted.
pub const MAX_QUALITY_CLASSES: usize = 64;
/// The most columns whose drift is told.
pub const MAX_DRIFTED_COLUMNS: usize = 64;

/// Upper bounds of the bins of a probability: fine where rare classes live, near 0 and 1.
const PROBABILITY_BOUNDS: [f64; 15] = [
    0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99,
];
/// Bins of a value to each power of ten.
const BINS_PER_DECADE: f64 = 4.0;

/// The bin of a prediction of a model with two classes, by the probability of the second one.
#[must_use]
pub fn prediction_bin_of_probability(probability: f64) -> usize {
    PROBABILITY_BOUNDS.partition_point(|bound| *bound < probability)
}

/// The bin of a prediction of a model with more than two classes: the class itself.
#[must_use]
pub const fn prediction_bin_of_class(class: usize) -> usize {
    if class < PREDICTION_BINS {
        class
    } else {
        PREDICTION_BINS - 1
    }
}

/// The bin of a predicted value: by its sign and the logarithm of its size, from 10⁻⁶ to 10⁹, so that
/// two versions with other units of their own have the same bins.
#[must_use]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "within the bins"
)]
pub fn prediction_bin_of_value(value: f64) -> usize {
    const HALF: usize = PREDICTION_BINS / 2;
    let size = ((value.abs().max(1e-6).log10() + 6.0) * BINS_PER_DECADE).round();
    let size = size.clamp(0.0, (HALF - 1) as f64) as usize;
    if value < 0.0 {
        HALF - 1 - size
    } else {
        HALF + size
    }
}

/// The population stability index between two sets of counts over the same bins: the sum over the bins
/// of (p − q) · ln(p / q) (Siddiqi, "Credit Risk Scorecards", 2006). Half a count is added to each
/// bin that either has, so that an empty one is no infinity. None while either set is empty.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
pub fn psi(expected: &[u64], seen: &[u64]) -> Option<f64> {
    let at = |counts: &[u64], bin: usize| counts.get(bin).copied().unwrap_or(0);
    let bins: Vec<(u64, u64)> = (0..expected.len().max(seen.len()))
        .map(|bin| (at(expected, bin), at(seen, bin)))
        .filter(|(p, q)| p + q > 0)
        .collect();
    let (p, q) = (
        bins.iter().map(|b| b.0).sum::<u64>(),
        bins.iter().map(|b| b.1).sum::<u64>(),
    );
    if p == 0 || q == 0 {
        return None;
    }
    let half = 0.5 * bins.len() as f64;
    let share = |count: u64, of: u64| (count as f64 + 0.5) / (of as f64 + half);
    let sum = bins.iter().map(|(a, b)| {
        let (a, b) = (share(*a, p), share(*b, q));
        (a - b) * (a / b).ln()
    });
    Some(sum.sum())
}

/// What was counted of one version on one worker, or on several together.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VersionStats {
    /// Requests that it answered, or failed to: not those that were refused.
    pub requests: u64,
    /// Rows of them.
    pub rows: u64,
    /// Of the requests, those that failed by its own or the worker's fault.
    pub errors: u64,
    /// Requests that were refused for what they held: a column that is missing, a value that is none.
    pub rejected: u64,
    /// Requests that were refused for lack of room.
    pub overloaded: u64,
    /// How long the answered ones took, from arrival to answer.
    pub latency: LatencyHistogram,
    /// Predictions by bin; empty if there is none yet.
    pub predictions: Vec<u64>,
    /// Labels that came back.
    pub quality: Quality,
    /// How far what clients send is from what it was trained on, by column: the worst ones.
    pub input_drift: Vec<DriftedColumn>,
    /// How far its predictions are from those that it made of its training data.
    pub prediction_drift: Option<f64>,
}

/// How far a column is from the training data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DriftedColumn {
    /// The column.
    pub column: String,
    /// The population stability index.
    pub psi: f64,
    /// Values that it was computed from.
    pub values: u64,
}

/// Counts by latency; see [`LATENCY_BOUNDS_MICROS`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LatencyHistogram {
    /// One count for each bound and one for what is longer; empty if nothing was counted.
    pub counts: Vec<u64>,
    /// The sum of all, in microseconds.
    pub sum_micros: u64,
}

/// What labels said of predictions.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Quality {
    /// Rows whose label came back.
    pub labels: u64,
    /// Of a classifier: those that it had right.
    pub correct: u64,
    /// Of a classifier the sum of −ln of the probability that it gave the truth (at least 10⁻¹⁵);
    /// of a model of values the sum of the squared errors.
    pub loss: f64,
    /// By class: rows that it said are of it, and were.
    pub hits: Vec<u64>,
    /// By class: rows that it said are of it.
    pub predicted: Vec<u64>,
    /// By class: rows that were of it.
    pub actual: Vec<u64>,
}

fn add_counts(to: &mut Vec<u64>, from: &[u64]) {
    if to.len() < from.len() {
        to.resize(from.len(), 0);
    }
    for (to, from) in to.iter_mut().zip(from) {
        *to = to.saturating_add(*from);
    }
}

fn less_counts(counts: &[u64], before: &[u64]) -> Vec<u64> {
    let before = before.iter().copied().chain(std::iter::repeat(0));
    let less = counts.iter().zip(before);
    less.map(|(now, before)| now.saturating_sub(before))
        .collect()
}

impl VersionStats {
    /// Adds another replica's counts. Drift does not add up: the worse one stays.
    pub fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.rows = self.rows.saturating_add(other.rows);
        self.errors = self.errors.saturating_add(other.errors);
        self.rejected = self.rejected.saturating_add(other.rejected);
        self.overloaded = self.overloaded.saturating_add(other.overloaded);
        self.latency.add(&other.latency);
        add_counts(&mut self.predictions, &other.predictions);
        self.quality.add(&other.quality);
        for theirs in &other.input_drift {
            match self
                .input_drift
                .iter_mut()
                .find(|d| d.column == theirs.column)
            {
                Some(ours) if ours.psi < theirs.psi => *ours = theirs.clone(),
                Some(_) => {}
                None => self.input_drift.push(theirs.clone()),
            }
        }
        self.prediction_drift = match (self.prediction_drift, other.prediction_drift) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
    }

    /// What was counted since an earlier reading. Drift is as it is now.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(before.requests),
            rows: self.rows.saturating_sub(before.rows),
            errors: self.errors.saturating_sub(before.errors),
            rejected: self.rejected.saturating_sub(before.rejected),
            overloaded: self.overloaded.saturating_sub(before.overloaded),
            latency: self.latency.since(&before.latency),
            predictions: less_counts(&self.predictions, &before.predictions),
            quality: self.quality.since(&before.quality),
            input_drift: self.input_drift.clone(),
            prediction_drift: self.prediction_drift,
        }
    }

    /// Errors among the requests; none if there was no request.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    pub fn error_rate(&self) -> Option<f64> {
        (self.requests > 0).then(|| self.errors as f64 / self.requests as f64)
    }
}

impl LatencyHistogram {
    /// Counts one.
    pub fn count(&mut self, micros: u64) {
        if self.counts.is_empty() {
            self.counts = vec![0; LATENCY_BOUNDS_MICROS.len() + 1];
        }
        self.counts[LATENCY_BOUNDS_MICROS.partition_point(|bound| *bound < micros)] += 1;
        self.sum_micros = self.sum_micros.saturating_add(micros);
    }

    /// How many were counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The q-quantile in microseconds, even within its bucket; none if nothing was counted.
    #[must_use]
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts far below 2^52, and times far below that"
    )]
    pub fn quantile_micros(&self, q: f64) -> Option<u64> {
        let rank = self.total() as f64 * q.clamp(0.0, 1.0);
        let mut below = 0.0;
        let mut lower = 0;
        for (bucket, count) in self
            .counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
        {
            let last = LATENCY_BOUNDS_MICROS[LATENCY_BOUNDS_MICROS.len() - 1];
            let upper = LATENCY_BOUNDS_MICROS.get(bucket).copied().unwrap_or(last);
            lower = bucket
                .checked_sub(1)
                .map_or(0, |b| LATENCY_BOUNDS_MICROS[b])
                .min(upper);
            let count = *count as f64;
            if below + count >= rank {
                let within = ((rank - below) / count).clamp(0.0, 1.0);
                return Some(lower + ((upper - lower) as f64 * within) as u64);
            }
            below += count;
        }
        (below > 0.0).then_some(lower)
    }

    fn add(&mut self, other: &Self) {
        add_counts(&mut self.counts, &other.counts);
        self.sum_micros = self.sum_micros.saturating_add(other.sum_micros);
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            counts: less_counts(&self.counts, &before.counts),
            sum_micros: self.sum_micros.saturating_sub(before.sum_micros),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
impl Quality {
    /// Counts a classifier's prediction whose truth is known now. `truth` is none for a class that the
    /// model does not know: it cannot have been right.
    pub fn count_class(
        &mut self,
        predicted: usize,
        truth: Option<usize>,
        probability_of_truth: f64,
        classes: usize,
    ) {
        self.labels += 1;
        self.correct += u64::from(truth == Some(predicted));
        self.loss -= probability_of_truth.max(1e-15).ln();
        if classes > MAX_QUALITY_CLASSES {
            return;
        }
        let count = |counts: &mut Vec<u64>, class: usize| {
            counts.resize(classes.max(counts.len()), 0);
            if let Some(count) = counts.get_mut(class) {
                *count += 1;
            }
        };
        count(&mut self.predicted, predicted);
        if let Some(truth) = truth {
            count(&mut self.actual, truth);
            if truth == predicted {
                count(&mut self.hits, truth);
            }
        }
    }

    /// Counts a predicted value whose truth is known now.
    pub fn count_value(&mut self, predicted: f64, truth: f64) {
        self.labels += 1;
        self.loss += (predicted - truth).powi(2);
    }

    /// The share of right ones.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        (self.labels > 0).then(|| self.correct as f64 / self.labels as f64)
    }

    /// The F1 of the second of two classes, or the mean of all classes' F1. None while no row of any
    /// class came back.
    #[must_use]
    pub fn f1(&self) -> Option<f64> {
        let of = |class: usize| {
            let at = |counts: &[u64]| counts.get(class).copied().unwrap_or(0) as f64;
            let both = at(&self.predicted) + at(&self.actual);
            (both > 0.0).then(|| 2.0 * at(&self.hits) / both)
        };
        let classes = self.predicted.len().max(self.actual.len());
        if classes == 2 {
            return of(1);
        }
        let each: Vec<f64> = (0..classes).filter_map(of).collect();
        (!each.is_empty()).then(|| each.iter().sum::<f64>() / each.len() as f64)
    }

    /// The mean loss: −ln of the truth's probability, or the squared error.
    #[must_use]
    pub fn mean_loss(&self) -> Option<f64> {
        (self.labels > 0).then(|| self.loss / self.labels as f64)
    }

    fn add(&mut self, other: &Self) {
        self.labels = self.labels.saturating_add(other.labels);
        self.correct = self.correct.saturating_add(other.correct);
        self.loss += other.loss;
        add_counts(&mut self.hits, &other.hits);
        add_counts(&mut self.predicted, &other.predicted);
        add_counts(&mut self.actual, &other.actual);
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            labels: self.labels.saturating_sub(before.labels),
            correct: self.correct.saturating_sub(before.correct),
            loss: self.loss - before.loss,
            hits: less_counts(&self.hits, &before.hits),
            predicted: less_counts(&self.predicted, &before.predicted),
            actual: less_counts(&self.actual, &before.actual),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_quantile_lies_within_its_bucket() {
        let mut latency = LatencyHistogram::default();
        assert_eq!(latency.quantile_micros(0.5), None);
        for micros in 1..=1000 {
            latency.count(micros);
        }
        for (q, expected) in [(0.5, 500_u64), (0.9, 900), (0.99, 990)] {
            let seen = latency.quantile_micros(q).unwrap();
            assert!(seen.abs_diff(expected) <= 25, "{q}: {seen}");
        }
        latency.count(u64::MAX / 2);
        assert_eq!(latency.quantile_micros(1.0), Some(10_000_000));
    }

    #[test]
    fn readings_differ_by_what_happened_between_them() {
        let mut before = VersionStats {
            requests: 5,
            ..VersionStats::default()
        };
        before.latency.count(100);
        let mut after = before.clone();
        after.requests += 3;
        after.latency.count(2_000);
        after.predictions = vec![0, 4];
        let between = after.since(&before);
        assert_eq!((between.requests, between.latency.total()), (3, 1));
        assert_eq!(between.predictions, [0, 4]);
        let mut sum = before.clone();
        sum.add(&between);
        assert_eq!(sum.requests, after.requests);
        assert_eq!(sum.latency, after.latency);
    }

    #[test]
    fn equal_counts_have_no_drift_and_others_do() {
        assert_eq!(psi(&[], &[1]), None);
        assert!(psi(&[50, 30, 20], &[500, 300, 200]).unwrap().abs() < 1e-3);
        // By hand: p = (.905, .095), q = (.5, .5) with half a count each: .405·ln 1.81 + .405·ln 5.26
        let seen = psi(&[90, 9], &[9, 9]).unwrap();
        assert!((seen - 0.906).abs() < 0.01, "{seen}");
    }

    #[test]
    fn bins_are_ordered_and_within_bounds() {
        let values = [
            f64::MIN,
            -1e3,
            -1.0,
            -1e-9,
            0.0,
            1e-3,
            1.0,
            2.0,
            1e3,
            f64::MAX,
        ];
        let bins: Vec<usize> = values.iter().map(|v| prediction_bin_of_value(*v)).collect();
        assert!(bins.is_sorted(), "{bins:?}");
        assert!(bins.iter().all(|bin| *bin < PREDICTION_BINS));
        assert!(prediction_bin_of_value(f64::NAN) < PREDICTION_BINS);
        assert_eq!(prediction_bin_of_probability(0.0), 0);
        assert_eq!(prediction_bin_of_probability(1.0), 15);
        assert!(prediction_bin_of_probability(0.03) < prediction_bin_of_probability(0.3));
    }

    #[test]
    fn quality_is_that_of_the_labels_that_came_back() {
        let mut quality = Quality::default();
        assert_eq!((quality.accuracy(), quality.f1()), (None, None));
        for (predicted, truth) in [(1, 1), (1, 0), (0, 1), (0, 0), (1, 1)] {
            quality.count_class(predicted, Some(truth), 0.5, 2);
        }
        assert_eq!(quality.accuracy(), Some(0.6));
        // Precision 2/3, recall 2/3.
        assert!((quality.f1().unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert!((quality.mean_loss().unwrap() - 2.0f64.ln()).abs() < 1e-12);
    }
}
