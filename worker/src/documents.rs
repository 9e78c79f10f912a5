//! The JSON documents that stages hand to each other inside artifacts. One stage kind writes each,
//! others read it; whoever changes a field here raises the writing kind's version.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A table's artifact has Parquet files of one schema with this extension.
pub const TABLE_EXTENSION: &str = "parquet";
/// The document of a `validation` artifact: a [`Validation`].
pub const VALIDATION_FILE: &str = "validation.json";
/// The document of a `model` artifact: a [`ModelDocument`].
pub const MODEL_FILE: &str = "model.json";
/// The weights of a `model` artifact, as burn's own record (burnpack).
pub const WEIGHTS_FILE: &str = "weights.bpk";
/// The document of an `evaluation` artifact: an [`Evaluation`].
pub const EVALUATION_FILE: &str = "evaluation.json";
/// The document of a `version` artifact.
pub const VERSION_FILE: &str = "version.json";
/// The page of a `page` artifact.
pub const REPORT_FILE: &str = "report.html";

/// What is known of a table; the `metadata` of every `table` artifact has this form.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TableSummary {
    /// Rows in all files together.
    pub rows: u64,
    /// The columns in their order.
    pub columns: Vec<ColumnSummary>,
}

/// What is known of one column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ColumnSummary {
    /// Its name.
    pub name: String,
    /// Its type as in `cast`: `integer`, `float`, `boolean`, `text`, `bytes`.
    #[serde(rename = "type")]
    pub column_type: String,
    /// Nulls in it.
    pub nulls: u64,
    /// Different values, where they were counted; at most 1,000 are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distinct: Option<u64>,
    /// The smallest value of a numeric column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// The largest value of a numeric column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// The mean of a numeric column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean: Option<f64>,
}

/// What `validate` found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Whether every rule held.
    pub passed: bool,
    /// Rows looked at.
    pub rows: u64,
    /// Rules that held.
    pub rules_passed: u64,
    /// Rules that did not.
    pub failures: Vec<RuleFailure>,
    /// The comparison with the reference, by column.
    #[serde(default)]
    pub drift: Vec<ColumnDrift>,
    /// What the table is like.
    pub table: TableSummary,
}

/// One rule that did not hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RuleFailure {
    /// The rule as written, e.g. `columns.torque.min`.
    pub rule: String,
    /// The column, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// What is wrong, in one line.
    pub message: String,
    /// Rows that break it.
    pub count: u64,
    /// The first of them: row number (from 0) and values.
    #[serde(default)]
    pub examples: Vec<ExampleRow>,
}

/// A row that breaks a rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExampleRow {
    /// Its number, from 0.
    pub row: u64,
    /// Its values by column, texts cut to 100 characters.
    pub values: Map<String, Value>,
}

/// How far one column is from the reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ColumnDrift {
    /// The column.
    pub column: String,
    /// The population stability index.
    pub psi: f64,
    /// The statistic of the two-sample Kolmogorov-Smirnov test, for a numeric column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ks: Option<f64>,
    /// Its p-value (asymptotic).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ks_p: Option<f64>,
    /// Whether it is within the limits.
    pub passed: bool,
}

/// A trained model: everything but the weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelDocument {
    /// The version of this form: 1.
    pub format: u32,
    /// The stage's spec as it was trained with.
    pub spec: Value,
    /// `mlp` or `cnn`.
    pub family: String,
    /// `classification` or `regression`.
    pub task: String,
    /// The column that it predicts.
    pub label: String,
    /// For classification: the classes in the order of the outputs, as text.
    #[serde(default)]
    pub classes: Vec<String>,
    /// The columns that it takes, in their order, as they come (before preprocessing).
    pub inputs: Vec<ModelInput>,
    /// How raw columns become numbers; the train crate's own form.
    pub preprocessing: Value,
    /// The shape of the network; the train crate's own form.
    pub network: Value,
    /// Number of trainable parameters.
    pub parameters: u64,
    /// Rows it was trained on.
    pub train_rows: u64,
    /// Rows it was watched on.
    pub validation_rows: u64,
    /// Where it was computed, e.g. `cpu (flex)`.
    pub backend: String,
    /// The epoch, from 1, whose weights these are.
    pub best_epoch: u32,
    /// Metrics by epoch, from 1: `train_loss`, `validation_loss`, `learning_rate`, …
    pub history: Vec<EpochMetrics>,
    /// The SHA-256 of the weights file.
    pub weights_sha256: String,
    /// What it was trained on looked like, to compare what it is asked with. Models of before this was
    /// noted have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<Reference>,
}

/// What a model was trained on, in counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// By column.
    pub columns: Vec<ReferenceColumn>,
    /// The model's own predictions, in the bins of `emberline_common::serving`: of the validation part,
    /// or, where there is none, of the train part.
    pub predictions: Vec<u64>,
}

/// One column of what a model was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReferenceColumn {
    /// Its name; of images the column of bytes, or `image` for all the pixels' columns together.
    pub name: String,
    /// How its values are told apart.
    pub bins: ReferenceBins,
    /// Rows of the train part by bin.
    pub counts: Vec<u64>,
}

/// How the values of a column are told apart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReferenceBins {
    /// By number: a value is in the bin of the first of these that it is not above, and in one more
    /// bin if it is above all of them. Of an image it is the mean of its pixels.
    Edges(Vec<f64>),
    /// By text: a bin each, and one more for all others.
    Texts(Vec<String>),
}

/// One raw column that a model takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelInput {
    /// The column's name.
    pub name: String,
    /// Its type as in `cast`.
    #[serde(rename = "type")]
    pub column_type: String,
    /// For text: the values that it knows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub categories: Vec<String>,
    /// The smallest value in the train part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// The largest value in the train part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

/// The metrics of one epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochMetrics {
    /// From 1.
    pub epoch: u32,
    /// By name.
    #[serde(flatten)]
    pub values: BTreeMap<String, f64>,
}

/// What `evaluate` measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// `classification` or `regression`.
    pub task: String,
    /// Rows of the test part.
    pub rows: u64,
    /// Metrics by name.
    pub metrics: BTreeMap<String, f64>,
    /// For classification: the classes in the order of the matrix.
    #[serde(default)]
    pub classes: Vec<String>,
    /// For classification: `confusion[truth][prediction]`.
    #[serde(default)]
    pub confusion: Vec<Vec<u64>>,
    /// For two classes: the one that counts as positive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub positive: Option<String>,
    /// For two classes: where a probability becomes a yes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// For two classes: false positive rate, true positive rate; at most 500 points.
    #[serde(default)]
    pub roc: Vec<[f64; 2]>,
    /// For two classes: recall, precision; at most 500 points.
    #[serde(default)]
    pub precision_recall: Vec<[f64; 2]>,
    /// For several classes: precision, recall, F1 and rows of each.
    #[serde(default)]
    pub per_class: Vec<ClassMetrics>,
    /// For regression: truth and prediction of at most 1,000 rows.
    #[serde(default)]
    pub scatter: Vec<[f64; 2]>,
    /// Labels of the test part that the model has never seen, with the number of rows.
    #[serde(default)]
    pub unknown_labels: BTreeMap<String, u64>,
    /// The gates and how they came out.
    #[serde(default)]
    pub gates: Vec<GateResult>,
    /// The comparison with a registered version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comparison: Option<Comparison>,
    /// With several models: each one's metrics on the validation part, and which was taken.
    #[serde(default)]
    pub candidates: Vec<Candidate>,
}

/// The metrics of one class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassMetrics {
    /// The class.
    pub class: String,
    /// Of those predicted, the right ones.
    pub precision: f64,
    /// Of those there are, the found ones.
    pub recall: f64,
    /// Their harmonic mean.
    pub f1: f64,
    /// Rows of the class.
    pub rows: u64,
}

/// How one gate came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GateResult {
    /// The metric.
    pub metric: String,
    /// The gate as written.
    pub gate: String,
    /// The measured value.
    pub value: f64,
    /// Whether it holds.
    pub passed: bool,
    /// By how much it holds (or, negative, does not).
    pub margin: f64,
}

/// The comparison with a registered version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The metric.
    pub metric: String,
    /// Of the new model.
    pub value: f64,
    /// Of the registered version on the same rows; none if there was no such version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other: Option<f64>,
    /// The alias that named it.
    pub alias: String,
    /// Whether the new model is good enough.
    pub passed: bool,
}

/// One of several models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The task that trained it.
    pub producer: String,
    /// The deciding metric on the validation part.
    pub score: f64,
    /// Whether it was taken.
    pub chosen: bool,
}
