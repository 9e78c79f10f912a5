//! `exec`: any command.
//!
//! In: any names and types. Out: as declared under the stage's `outputs`.
//! Results: a JSON object that the command may write to `$EMBERLINE_RESULTS`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::spec::ByteSize;

/// Runs a command in a directory of its own. Each input is a directory, `$EMBERLINE_INPUT_<NAME>`; what the command leaves in `$EMBERLINE_OUTPUT_<NAME>` becomes the output of that name (upper case, `-` as `_`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecSpec {
    /// The program and its arguments, as they are: no shell reads them. For a shell write `["sh", "-c", "…"]`.
    #[schemars(length(min = 1, max = 1000))]
    pub command: Vec<String>,
    /// Files beside the pipeline file that travel with the run and lie in the working directory, e.g. `train.py`. Their content is part of the cache key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000))]
    pub files: Vec<String>,
    /// Environment variables to set. Of the worker's own environment the command sees only `PATH`, `HOME`, `LANG` and `TZ`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Exit codes that mean bad data: reason `data`, never retried.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_exit_codes: Vec<i32>,
    /// The most output kept in the log; the command goes on, the rest is counted and dropped.
    #[serde(default = "log_limit")]
    pub max_log: ByteSize,
}

const fn log_limit() -> ByteSize {
    ByteSize(64 << 20)
}
