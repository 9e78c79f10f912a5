//! `convert`: files and tables in, tables out.
//!
//! In: any names, each `files` or `table`. Out: `data` (table); with `split` instead `train`,
//! `test` and, if it has a share, `validation` (tables).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{ids::ArtifactName, spec::Ordered};

/// Reads each input into a table of the input's name, applies `sql` if given, casts columns and writes Parquet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConvertSpec {
    /// How to read each input of type `files`; tables need no entry. An input without an entry is read by its files' extensions.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub read: Ordered<ArtifactName, ReadSpec>,
    /// One `SELECT` in SQLite's dialect over the inputs, each a table of the input's name with `-` replaced by `_`. Not needed with a single input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sql: Option<String>,
    /// The result's columns by name with new types; a value that cannot be cast fails the stage with reason `data`, naming row and column.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub cast: Ordered<String, ColumnType>,
    /// New names for the result's columns, old to new; applied last.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub rename: Ordered<String, String>,
    /// Columns to leave out of the result.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drop: Vec<String>,
    /// Cut the result into parts. Without it there is one output, `data`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<SplitSpec>,
}

/// How to read one input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReadSpec {
    /// The files' format; by the extension if not given (`.csv`, `.jsonl`, `.ndjson`, `.parquet`, `-idx3-ubyte`, `.idx`; each also with `.gz`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<FileFormat>,
    /// CSV: whether the first line has the columns' names. Without, they are `column_0`, `column_1`, …
    #[serde(default = "yes")]
    pub header: bool,
    /// CSV: the character between fields.
    #[serde(default = "comma")]
    #[schemars(length(min = 1, max = 1))]
    pub delimiter: String,
    /// CSV: fields that mean null; by default the empty one.
    #[serde(default = "empty_is_null")]
    pub null_values: Vec<String>,
    /// The columns' types. A CSV column without one is guessed from all its values: integer, then float, then boolean (`true`/`false`), then text.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub types: Ordered<String, ColumnType>,
    /// IDX: the file that holds the labels, to be joined to the images by position; a pattern such as `*labels*`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
}

const fn yes() -> bool {
    true
}
fn comma() -> String {
    ",".to_owned()
}
fn empty_is_null() -> Vec<String> {
    vec![String::new()]
}

impl Default for ReadSpec {
    fn default() -> Self {
        Self {
            format: None,
            header: true,
            delimiter: comma(),
            null_values: empty_is_null(),
            types: Ordered::new(),
            labels: None,
        }
    }
}

/// A file's format. Each is also read when compressed with gzip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileFormat {
    /// Comma-separated values (RFC 4180), UTF-8, with or without BOM, LF or CRLF.
    Csv,
    /// One JSON object a line.
    JsonLines,
    /// Parquet.
    Parquet,
    /// IDX images and labels, as of MNIST: columns `image` (bytes, row by row) and, with `labels`, `label`.
    Idx,
}

/// The type of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ColumnType {
    /// 64-bit signed integer.
    Integer,
    /// 64-bit floating point.
    Float,
    /// True or false; from text `true`/`false`, from numbers 1/0.
    Boolean,
    /// UTF-8 text.
    Text,
    /// Bytes (images).
    Bytes,
}

/// How to cut a table into parts for training and testing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SplitSpec {
    /// The share of rows for `test`.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub test: f64,
    /// The share of rows for `validation`; 0 makes no such output.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub validation: f64,
    /// The seed: the same seed and the same rows give the same parts.
    #[serde(default = "seed")]
    pub seed: SeedValue,
    /// A column whose values have the same shares in all parts, e.g. the label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stratify: Option<String>,
    /// A column whose equal values stay in one part, e.g. a machine's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

const fn seed() -> SeedValue {
    0
}

/// A seed for everything that looks random.
pub type SeedValue = u64;

/// A scalar in a table, as written in a pipeline.
pub type Scalar = Value;
