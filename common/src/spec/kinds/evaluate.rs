//! `evaluate`: a model on rows that it has not seen, gates, and the comparison with the champion.
//!
//! In: `model` (one, or several from a matrix: the best on the validation part is taken), `test`
//! (table), optionally `validation` (table). Out: `evaluation`, and `model` (the one taken).
//! Results: every metric by its name.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{Alias, ModelName},
    spec::Ordered,
};

/// The metrics that `evaluate` can measure, of classification and of regression.
pub const METRICS: [&str; 13] = [
    "accuracy",
    "precision",
    "recall",
    "f1",
    "roc_auc",
    "average_precision",
    "log_loss",
    "threshold",
    "mae",
    "mse",
    "rmse",
    "r2",
    "mape",
];

/// Measures a model on the input `test`. Metrics of classification: `accuracy`, `precision`, `recall`, `f1`, `roc_auc`, `average_precision`, `log_loss`, `threshold` (two classes; the mean over the classes otherwise); of regression: `mae`, `mse`, `rmse`, `r2`, `mape`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluateSpec {
    /// For two classes: the class that counts as positive; by default the second in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positive: Option<String>,
    /// For two classes: where a probability becomes a yes.
    #[serde(default)]
    pub threshold: Threshold,
    /// Gates by metric, each a comparison such as `">= 0.60"`. One that does not hold fails the stage with reason `quality_gate`.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub gates: Ordered<String, String>,
    /// With several models: the metric on the validation part that decides. By default `f1` or `rmse`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select_by: Option<String>,
    /// Compare with a version that is already registered, measured on the same rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compare: Option<CompareSpec>,
}

/// Where a probability becomes a yes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Threshold {
    /// A fixed probability.
    Fixed(f64),
    /// A rule.
    Rule(ThresholdRule),
}

impl Default for Threshold {
    fn default() -> Self {
        Self::Rule(ThresholdRule::BestF1)
    }
}

/// A rule for the threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ThresholdRule {
    /// The one with the best F1 on the validation part (0.5 without one).
    BestF1,
}

/// The version to compare with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CompareSpec {
    /// The registered model.
    pub model: ModelName,
    /// The alias whose version to compare with. If there is none yet, the comparison holds.
    #[serde(default = "champion")]
    pub alias: Alias,
    /// The metric to compare.
    pub metric: String,
    /// How much worse than the other version it may be; a negative number asks it to be better by that much.
    #[serde(default)]
    pub tolerance: f64,
}

/// `champion`.
///
/// # Panics
/// Never: the text is a valid alias, as the test beside it shows.
#[allow(clippy::expect_used, reason = "a constant of this file, tested")]
fn champion() -> Alias {
    Alias::new("champion").expect("`champion` is an alias")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_default_alias_is_one() {
        assert_eq!(super::champion().as_str(), "champion");
    }
}
