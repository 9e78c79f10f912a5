//! `report`: one HTML page about the run.
//!
//! In: any names and types; what it knows it shows (validation, model, evaluation, version). Out: `page`.
//! It is never reused, since it tells of this run.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Writes `report.html`: self-contained, works offline.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReportSpec {
    /// The page's title; by default the pipeline's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 200))]
    pub title: Option<String>,
}
