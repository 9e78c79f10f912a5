//! Metrics of classification and regression. Pure functions over truth and prediction, in double
//! precision; where a metric has no value (ROC AUC of one class), the answer is `None`, never NaN.
//!
//! Definitions: Fawcett, "An introduction to ROC analysis" (2006) for ROC and its area with ties;
//! Manning, Raghavan, Schütze, "Introduction to Information Retrieval" (2008), ch. 8 for precision,
//! recall, F1 and average precision (without interpolation). The numbers equal scikit-learn's, as
//! the tests check with constants that scikit-learn 1.9 computed.

use std::cmp::Ordering;

/// The most points that a curve is given with.
pub const MAX_CURVE_POINTS: usize = 500;

/// `matrix[truth][prediction]`, in rows.
pub type Confusion = Vec<Vec<u64>>;

/// Counts how often each class was taken for each.
#[must_use]
pub fn confusion(truth: &[u32], predicted: &[u32], classes: usize) -> Confusion {
    let mut matrix = vec![vec![0; classes]; classes];
    for (t, p) in truth.iter().zip(predicted) {
        matrix[*t as usize][*p as usize] += 1;
    }
    matrix
}

/// The share of right answers.
#[must_use]
pub fn accuracy(matrix: &Confusion) -> f64 {
    let right: u64 = matrix.iter().enumerate().map(|(i, row)| row[i]).sum();
    ratio(right, matrix.iter().flatten().sum())
}

/// Precision, recall and F1 of one class; 0 where nothing was predicted or there is nothing to find.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassScores {
    /// Of those predicted, the right ones.
    pub precision: f64,
    /// Of those there are, the found ones.
    pub recall: f64,
    /// Their harmonic mean.
    pub f1: f64,
    /// Rows of the class.
    pub rows: u64,
    /// Rows predicted as the class.
    pub predicted: u64,
}

/// The scores of one class.
#[must_use]
pub fn class_scores(matrix: &Confusion, class: usize) -> ClassScores {
    let rows: u64 = matrix[class].iter().sum();
    let predicted: u64 = matrix.iter().map(|row| row[class]).sum();
    let right = matrix[class][class];
    ClassScores {
        precision: ratio(right, predicted),
        recall: ratio(right, rows),
        f1: ratio(2 * right, rows + predicted),
        rows,
        predicted,
    }
}

/// The mean over the classes that occur in truth or prediction.
#[must_use]
pub fn mean_scores(matrix: &Confusion) -> ClassScores {
    let all: Vec<_> = (0..matrix.len())
        .map(|class| class_scores(matrix, class))
        .filter(|scores| scores.rows + scores.predicted > 0)
        .collect();
    let mean =
        |f: fn(&ClassScores) -> f64| all.iter().map(f).sum::<f64>() / (all.len().max(1) as f64);
    ClassScores {
        precision: mean(|s| s.precision),
        recall: mean(|s| s.recall),
        f1: mean(|s| s.f1),
        rows: all.iter().map(|s| s.rows).sum(),
        predicted: all.iter().map(|s| s.predicted).sum(),
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// Counts at one threshold: rows whose score is at least `score` are taken for positive.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cut {
    score: f64,
    true_positives: u64,
    false_positives: u64,
}

/// The cuts at each different score, from the highest; rows with the same score fall together.
fn cuts(positive: &[bool], scores: &[f64]) -> Vec<Cut> {
    let mut order: Vec<usize> = (0..scores.len().min(positive.len())).collect();
    order.sort_by(|a, b| {
        scores[*b]
            .partial_cmp(&scores[*a])
            .unwrap_or(Ordering::Equal)
    });
    let mut out: Vec<Cut> = Vec::new();
    let (mut tp, mut fp) = (0, 0);
    for i in order {
        if positive[i] {
            tp += 1
        } else {
            fp += 1
        }
        let cut = Cut {
            score: scores[i],
            true_positives: tp,
            false_positives: fp,
        };
        match out.last_mut() {
            Some(last) if last.score == scores[i] => *last = cut,
            _ => out.push(cut),
        }
    }
    out
}

fn totals(positive: &[bool]) -> (u64, u64) {
    let p = positive.iter().filter(|p| **p).count() as u64;
    (p, positive.len() as u64 - p)
}

/// The area under the ROC curve: the chance that a positive row scores higher than a negative one,
/// a tie counting half. `None` if there are rows of one class only.
#[must_use]
pub fn roc_auc(positive: &[bool], scores: &[f64]) -> Option<f64> {
    let (p, n) = totals(positive);
    if p == 0 || n == 0 {
        return None;
    }
    // Trapezoids between the cuts, doubled, in whole numbers: exact.
    let mut doubled: u128 = 0;
    let (mut last_tp, mut last_fp) = (0, 0);
    for cut in cuts(positive, scores) {
        let width = u128::from(cut.false_positives - last_fp);
        doubled += width * u128::from(cut.true_positives + last_tp);
        (last_tp, last_fp) = (cut.true_positives, cut.false_positives);
    }
    Some(doubled as f64 / (2.0 * p as f64 * n as f64))
}

/// The mean of the precision over the recall's steps. `None` without positive rows.
#[must_use]
pub fn average_precision(positive: &[bool], scores: &[f64]) -> Option<f64> {
    let (p, _) = totals(positive);
    if p == 0 {
        return None;
    }
    let mut sum = 0.0;
    let mut last_tp = 0;
    for cut in cuts(positive, scores) {
        let precision = ratio(cut.true_positives, cut.true_positives + cut.false_positives);
        sum += (cut.true_positives - last_tp) as f64 * precision;
        last_tp = cut.true_positives;
    }
    Some(sum / p as f64)
}

/// The threshold with the best F1, and that F1: half-way between the lowest score that is to be a
/// yes and the highest that is not. Among equals the highest threshold. `None` without positive rows.
#[must_use]
pub fn best_f1_threshold(positive: &[bool], scores: &[f64]) -> Option<(f64, f64)> {
    let (p, _) = totals(positive);
    if p == 0 {
        return None;
    }
    let cuts = cuts(positive, scores);
    let mut best: Option<(usize, f64)> = None;
    for (i, cut) in cuts.iter().enumerate() {
        let f1 = ratio(
            2 * cut.true_positives,
            p + cut.true_positives + cut.false_positives,
        );
        if best.is_none_or(|(_, b)| f1 > b) {
            best = Some((i, f1));
        }
    }
    let (i, f1) = best?;
    let next = cuts.get(i + 1).map_or(0.0, |next| next.score);
    Some((f64::midpoint(cuts[i].score, next), f1))
}

/// False and true positive rates at each threshold, from (0, 0) to (1, 1).
#[must_use]
pub fn roc_curve(positive: &[bool], scores: &[f64]) -> Vec<[f64; 2]> {
    let (p, n) = totals(positive);
    let mut points = vec![[0.0, 0.0]];
    points.extend(
        cuts(positive, scores)
            .iter()
            .map(|c| [ratio(c.false_positives, n), ratio(c.true_positives, p)]),
    );
    thin(points)
}

/// Recall and precision at each threshold, from a recall of 0.
#[must_use]
pub fn precision_recall_curve(positive: &[bool], scores: &[f64]) -> Vec<[f64; 2]> {
    let (p, _) = totals(positive);
    let mut points = vec![[0.0, 1.0]];
    points.extend(cuts(positive, scores).iter().map(|c| {
        let precision = ratio(c.true_positives, c.true_positives + c.false_positives);
        [ratio(c.true_positives, p), precision]
    }));
    thin(points)
}

/// At most [`MAX_CURVE_POINTS`], evenly taken, with the first and the last.
fn thin(points: Vec<[f64; 2]>) -> Vec<[f64; 2]> {
    let count = points.len();
    if count <= MAX_CURVE_POINTS {
        return points;
    }
    let last = MAX_CURVE_POINTS - 1;
    (0..=last).map(|i| points[i * (count - 1) / last]).collect()
}

/// The mean of −log(probability of the true class), probabilities kept within [1e-15, 1 − 1e-15].
/// `probabilities` has one row of `classes` numbers for each truth.
#[must_use]
pub fn log_loss(truth: &[u32], probabilities: &[f64], classes: usize) -> f64 {
    let sum: f64 = truth
        .iter()
        .zip(probabilities.chunks_exact(classes.max(1)))
        .map(|(t, row)| -row[*t as usize].clamp(1e-15, 1.0 - 1e-15).ln())
        .sum();
    sum / truth.len().max(1) as f64
}

/// Errors of a regression.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RegressionScores {
    /// Mean absolute error.
    pub mae: f64,
    /// Mean squared error.
    pub mse: f64,
    /// Its root.
    pub rmse: f64,
    /// The share of the variance that is explained; `None` if all truths are the same.
    pub r2: Option<f64>,
    /// Mean absolute error relative to the truth; `None` if a truth is 0.
    pub mape: Option<f64>,
}

/// The errors of predictions.
#[must_use]
pub fn regression_scores(truth: &[f64], predicted: &[f64]) -> RegressionScores {
    let rows = truth.len().max(1) as f64;
    let pairs = || truth.iter().zip(predicted);
    let mse = pairs().map(|(t, p)| (t - p).powi(2)).sum::<f64>() / rows;
    let mean = truth.iter().sum::<f64>() / rows;
    let variance = truth.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / rows;
    RegressionScores {
        mae: pairs().map(|(t, p)| (t - p).abs()).sum::<f64>() / rows,
        mse,
        rmse: mse.sqrt(),
        r2: (variance > 0.0).then(|| 1.0 - mse / variance),
        mape: (!truth.contains(&0.0))
            .then(|| pairs().map(|(t, p)| ((t - p) / t).abs()).sum::<f64>() / rows),
    }
}

/// Whether a larger value of the metric is better.
#[must_use]
pub fn higher_is_better(metric: &str) -> bool {
    !matches!(
        metric,
        "loss" | "log_loss" | "mae" | "mse" | "rmse" | "mape"
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    // The expected numbers below were computed by scikit-learn 1.9.1 with the functions
    // roc_auc_score, average_precision_score, log_loss, precision_recall_curve, precision_score,
    // recall_score, f1_score, accuracy_score, mean_absolute_error, mean_squared_error, r2_score and
    // mean_absolute_percentage_error on these same rows.
    const TRUTH: [u32; 20] = [0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1];
    const SCORES: [f64; 20] = [
        0.1, 0.4, 0.35, 0.8, 0.4, 0.4, 0.2, 0.9, 0.6, 0.55, 0.05, 0.55, 0.3, 0.4, 0.15, 0.9, 0.7,
        0.65, 0.1, 0.3,
    ];

    fn positive() -> Vec<bool> {
        TRUTH.iter().map(|t| *t == 1).collect()
    }

    fn near(value: f64, expected: f64) {
        assert!(
            (value - expected).abs() < 1e-12,
            "{value} is not {expected}"
        );
    }

    #[test]
    fn ranking_metrics_equal_scikit_learn_s_with_ties() {
        near(
            roc_auc(&positive(), &SCORES).unwrap(),
            0.676_767_676_767_676_8,
        );
        near(
            average_precision(&positive(), &SCORES).unwrap(),
            0.589_948_885_537_120_9,
        );
        let probabilities: Vec<f64> = SCORES.iter().flat_map(|s| [1.0 - s, *s]).collect();
        near(log_loss(&TRUTH, &probabilities, 2), 0.669_313_594_349_082_2);
    }

    #[test]
    fn the_best_threshold_lies_below_the_lowest_yes() {
        let (threshold, f1) = best_f1_threshold(&positive(), &SCORES).unwrap();
        near(f1, 0.692_307_692_307_692_4);
        // scikit-learn names the lowest yes, 0.15; the next lower score is 0.1.
        near(threshold, 0.125);
    }

    #[test]
    fn counting_metrics_equal_scikit_learn_s() {
        let predicted: Vec<u32> = SCORES.iter().map(|s| u32::from(*s >= 0.35)).collect();
        let matrix = confusion(&TRUTH, &predicted, 2);
        let scores = class_scores(&matrix, 1);
        near(scores.precision, 0.538_461_538_461_538_4);
        near(scores.recall, 0.777_777_777_777_777_8);
        near(scores.f1, 0.636_363_636_363_636_4);
        near(accuracy(&matrix), 0.6);
    }

    #[test]
    fn means_over_classes_equal_scikit_learn_s_and_leave_out_absent_classes() {
        let truth = [0, 1, 2, 2, 1, 0, 3, 1, 2, 0, 1, 2];
        let predicted = [0, 2, 2, 2, 1, 1, 0, 1, 0, 0, 1, 1];
        for classes in [4, 6] {
            let matrix = confusion(&truth, &predicted, classes);
            let mean = mean_scores(&matrix);
            near(mean.precision, 0.441_666_666_666_666_65);
            near(mean.recall, 0.479_166_666_666_666_63);
            near(mean.f1, 0.452_380_952_380_952_4);
            near(accuracy(&matrix), 0.583_333_333_333_333_4);
        }
    }

    #[test]
    fn regression_metrics_equal_scikit_learn_s() {
        let scores = regression_scores(
            &[3.0, -0.5, 2.0, 7.0, 4.25, 1.5],
            &[2.5, 0.1, 2.0, 8.0, 4.0, 1.1],
        );
        near(scores.mae, 0.458_333_333_333_333_3);
        near(scores.mse, 0.305_416_666_666_666_6);
        near(scores.r2.unwrap(), 0.944_417_061_611_374_4);
        near(scores.mape.unwrap(), 0.305_835_667_600_373_45);
        near(scores.rmse, scores.mse.sqrt());
    }

    #[test]
    fn what_has_no_value_is_none() {
        assert_eq!(roc_auc(&[true, true], &[0.1, 0.9]), None);
        assert_eq!(average_precision(&[false], &[0.5]), None);
        assert_eq!(best_f1_threshold(&[false], &[0.5]), None);
        let scores = regression_scores(&[0.0, 0.0], &[1.0, 2.0]);
        assert_eq!((scores.r2, scores.mape), (None, None));
        assert_eq!(roc_auc(&[], &[]), None);
    }

    #[test]
    fn curves_are_bounded_and_keep_their_ends() {
        let positive: Vec<bool> = (0..10_000).map(|i| i % 3 == 0).collect();
        let scores: Vec<f64> = (0..10_000).map(|i| f64::from(i) / 10_000.0).collect();
        let roc = roc_curve(&positive, &scores);
        assert_eq!(roc.len(), MAX_CURVE_POINTS);
        assert_eq!(roc[0], [0.0, 0.0]);
        assert_eq!(roc[MAX_CURVE_POINTS - 1], [1.0, 1.0]);
        let pr = precision_recall_curve(&positive, &scores);
        assert_eq!(pr[MAX_CURVE_POINTS - 1][0].to_bits(), 1.0f64.to_bits());
    }

    proptest::proptest! {
        #[test]
        fn the_area_is_the_chance_to_score_higher(
            rows in proptest::collection::vec((proptest::bool::ANY, 0u8..12), 1..60)
        ) {
            let positive: Vec<bool> = rows.iter().map(|r| r.0).collect();
            let scores: Vec<f64> = rows.iter().map(|r| f64::from(r.1)).collect();
            let (mut won, mut pairs) = (0.0, 0.0);
            for (p, a) in &rows {
                for (q, b) in &rows {
                    if *p && !*q {
                        pairs += 1.0;
                        won += if a > b { 1.0 } else if a == b { 0.5 } else { 0.0 };
                    }
                }
            }
            match roc_auc(&positive, &scores) {
                Some(area) => proptest::prop_assert!((area - won / pairs).abs() < 1e-12),
                None => proptest::prop_assert!(pairs == 0.0),
            }
        }
    }
}
