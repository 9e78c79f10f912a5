//! `validate`: a table against rules, and against a reference for drift.
//!
//! In: `data` (table), optionally `reference` (table). Out: `validation`, with each failed rule, its
//! counts and example rows; it is written whether the rules hold or not.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::convert::{ColumnType, Scalar};
use crate::spec::Ordered;

/// Checks a table. If a rule fails, the stage fails with reason `data`, except where `on_failure` is `warn`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ValidateSpec {
    /// At least this many rows.
    #[serde(default = "one")]
    pub min_rows: u64,
    /// At most this many rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rows: Option<u64>,
    /// Rules by column.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub columns: Ordered<String, ColumnRules>,
    /// Whether columns without rules are allowed.
    #[serde(default = "yes")]
    pub allow_other_columns: bool,
    /// Columns that must not be there, each with the reason why, e.g. since they say the answer.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub forbidden_columns: Ordered<String, String>,
    /// Sets of columns that together must not repeat.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unique: Vec<Vec<String>>,
    /// Compare with the input `reference`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift: Option<DriftSpec>,
    /// What a failed rule does.
    #[serde(default)]
    pub on_failure: OnRuleFailure,
    /// Example rows to keep for each failed rule.
    #[serde(default = "five")]
    #[schemars(range(max = 100))]
    pub examples: u32,
}

const fn one() -> u64 {
    1
}
const fn five() -> u32 {
    5
}
const fn yes() -> bool {
    true
}

/// Rules for one column.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ColumnRules {
    /// The type that it must have.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "type")]
    pub column_type: Option<ColumnType>,
    /// The largest share of nulls; 0 means none.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_null_fraction: f64,
    /// No value is smaller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// No value is larger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// Every value that is not null is one of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed: Vec<Scalar>,
    /// No value stands twice.
    #[serde(default)]
    pub unique: bool,
    /// At least this many different values; 2 refuses a constant column or a one-class label.
    #[serde(default)]
    pub min_distinct: u64,
    /// Whether NaN and infinities are allowed in a float column.
    #[serde(default)]
    pub allow_non_finite: bool,
    /// Whether the column may be missing.
    #[serde(default)]
    pub optional: bool,
}

/// How to compare with a reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DriftSpec {
    /// The columns to compare; by default all that both tables have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// The largest population stability index of a column (over ten bins by the reference's deciles, or the values of a text column). Usual reading: under 0.1 none, over 0.25 much.
    #[serde(default = "quarter")]
    #[schemars(range(min = 0.0))]
    pub max_psi: f64,
    /// The smallest p-value of the two-sample Kolmogorov-Smirnov test of a numeric column; 0 turns it off.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_ks_p: f64,
}

const fn quarter() -> f64 {
    0.25
}

/// What a failed rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnRuleFailure {
    /// The stage fails with reason `data`.
    #[default]
    Fail,
    /// The stage succeeds; the failure stands in the validation, the log and the report.
    Warn,
}
