//! How far a column is from the same column of a reference: population stability index and the
//! two-sample Kolmogorov-Smirnov test. Nulls, NaN and infinities are left out; the rules of columns
//! are what bounds them.

use std::collections::BTreeMap;

use crate::table::{Column, ColumnValues};

/// The smallest share that a bin counts with in the PSI: an empty bin would make it infinite. One in
/// ten thousand is the usual choice; with it, a bin that holds a tenth in the one table and nothing in
/// the other adds 0.69.
pub const EMPTY_SHARE: f64 = 1e-4;

/// The finite numbers of a column, sorted; none for text and bytes.
#[must_use]
pub fn sorted_numbers(column: &Column) -> Option<Vec<f64>> {
    if !matches!(
        column.values,
        ColumnValues::Integer(_) | ColumnValues::Float(_)
    ) {
        return None;
    }
    let mut numbers: Vec<f64> = (0..column.len())
        .filter_map(|row| column.number(row))
        .filter(|v| v.is_finite())
        .collect();
    numbers.sort_unstable_by(f64::total_cmp);
    Some(numbers)
}

/// The population stability index of numbers, both sorted, over the bins between the reference's
/// deciles: `Σ (p − q) · ln(p / q)` with the shares `p` of the data and `q` of the reference, each at
/// least [`EMPTY_SHARE`]. A decile is the smallest value with at least that share of the reference at
/// or below it; equal deciles are one, so there may be fewer than ten bins. Where the lowest decile is
/// the smallest value of the reference, what is smaller still has a bin of its own: else a constant
/// that falls would not be seen.
///
/// Source: N. Siddiqi, "Credit Risk Scorecards", Wiley 2006, chapter 8; it is the symmetric
/// (Jeffreys) divergence of Kullback and Leibler.
#[must_use]
pub fn psi_numbers(data: &[f64], reference: &[f64]) -> f64 {
    let mut edges: Vec<f64> = (1..10usize)
        .filter_map(|k| reference.get((k * reference.len()).div_ceil(10).saturating_sub(1)))
        .copied()
        .collect();
    edges.dedup();
    if let (Some(lowest), Some(smallest)) = (edges.first(), reference.first())
        && lowest == smallest
    {
        edges.insert(0, smallest.next_down());
    }
    let shares = |sorted: &[f64]| -> Vec<usize> {
        let mut below = 0;
        let mut out: Vec<usize> = edges
            .iter()
            .map(|edge| {
                let until = sorted.partition_point(|v| v <= edge);
                let count = until - below;
                below = until;
                count
            })
            .collect();
        out.push(sorted.len() - below);
        out
    };
    let pairs = shares(data).into_iter().zip(shares(reference));
    psi(pairs, data.len(), reference.len())
}

/// The population stability index over the values of a text or boolean column.
#[must_use]
pub fn psi_values(data: &Column, reference: &Column) -> f64 {
    let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    let mut totals = (0, 0);
    for text in (0..data.len()).filter_map(|row| data.text(row)) {
        counts.entry(text.into_owned()).or_default().0 += 1;
        totals.0 += 1;
    }
    for text in (0..reference.len()).filter_map(|row| reference.text(row)) {
        counts.entry(text.into_owned()).or_default().1 += 1;
        totals.1 += 1;
    }
    psi(counts.into_values(), totals.0, totals.1)
}

#[allow(clippy::cast_precision_loss, reason = "rows are far below 2^53")]
fn psi(bins: impl Iterator<Item = (usize, usize)>, data: usize, reference: usize) -> f64 {
    let share = |count: usize, of: usize| (count as f64 / of.max(1) as f64).max(EMPTY_SHARE);
    bins.filter(|(in_data, in_reference)| in_data + in_reference > 0)
        .map(|(in_data, in_reference)| {
            let (p, q) = (share(in_data, data), share(in_reference, reference));
            (p - q) * (p / q).ln()
        })
        .sum()
}

/// The statistic of the two-sample Kolmogorov-Smirnov test: the largest distance between the two
/// empirical distribution functions. Both sorted, neither empty.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "rows are far below 2^53")]
pub fn ks_statistic(a: &[f64], b: &[f64]) -> f64 {
    let (mut i, mut j) = (0, 0);
    let mut largest: f64 = 0.0;
    while i < a.len() && j < b.len() {
        let at = a[i].min(b[j]);
        while i < a.len() && a[i] <= at {
            i += 1;
        }
        while j < b.len() && b[j] <= at {
            j += 1;
        }
        largest = largest.max((i as f64 / a.len() as f64 - j as f64 / b.len() as f64).abs());
    }
    largest
}

/// The asymptotic p-value of a statistic for samples of `n` and `m`:
/// `Q(√(n·m / (n + m)) · statistic)` with the Kolmogorov distribution's upper tail `Q`.
///
/// Source: N. Smirnov, "Table for estimating the goodness of fit of empirical distributions", Annals
/// of Mathematical Statistics 19 (1948). It is close from some 50 values in each sample.
#[must_use]
#[allow(clippy::cast_precision_loss, reason = "rows are far below 2^53")]
pub fn ks_p_value(statistic: f64, n: usize, m: usize) -> f64 {
    let (n, m) = (n as f64, m as f64);
    kolmogorov_tail((n * m / (n + m)).sqrt() * statistic)
}

/// `Q(x) = 2 Σ (−1)^(k−1) exp(−2k²x²)`; for small `x`, where that converges slowly, by the equal
/// `1 − √(2π)/x · Σ exp(−(2k−1)²π² / (8x²))`.
///
/// Source: W. Feller, "On the Kolmogorov-Smirnov limit theorems for empirical distributions", Annals
/// of Mathematical Statistics 19 (1948), equations 1.4 and 1.6.
#[must_use]
pub fn kolmogorov_tail(x: f64) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    if x < 1.0 {
        let sum: f64 = (1..=5)
            .map(|k| {
                let odd = f64::from(2 * k - 1);
                (-(odd * odd * std::f64::consts::PI.powi(2)) / (8.0 * x * x)).exp()
            })
            .sum();
        return (1.0 - (2.0 * std::f64::consts::PI).sqrt() / x * sum).clamp(0.0, 1.0);
    }
    let sum: f64 = (1..=20)
        .map(|k| {
            let sign = if k % 2 == 1 { 1.0 } else { -1.0 };
            let k = f64::from(k);
            sign * (-2.0 * k * k * x * x).exp()
        })
        .sum();
    (2.0 * sum).clamp(0.0, 1.0)
}
