//! `exec`: any command.
//!
//! In: any names and types. Out: as declared under the stage's `outputs`.
//! Results: a JSON object that the command may write to `$EMBERLINE_RESULTS`.

use std::{borrow::Cow, collections::BTreeMap};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::Value;

use crate::{ids::SecretName, spec::ByteSize};

/// Runs a command in a directory of its own. Each input is a directory, `$EMBERLINE_INPUT_<NAME>`; what the command leaves in `$EMBERLINE_OUTPUT_<NAME>` becomes the output of that name (upper case, `-` as `_`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecSpec {
    /// The program and its arguments, as they are: no shell reads them. For a shell write `["sh", "-c", "…"]`.
    #[serde(deserialize_with = "texts")]
    #[schemars(with = "Vec<Text>", length(min = 1, max = 1000))]
    pub command: Vec<String>,
    /// Files beside the pipeline file that travel with the run and lie in the working directory, e.g. `train.py`. Their content is part of the cache key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000))]
    pub files: Vec<String>,
    /// Environment variables to set. Of the worker's own environment the command sees only `PATH`, `HOME`, `LANG` and `TZ`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[serde(deserialize_with = "texts_by_name")]
    #[schemars(with = "BTreeMap<String, Text>")]
    pub env: BTreeMap<String, String>,
    /// Environment variables to set to secrets, each by its name on the worker (`--secrets-dir`, or `EMBERLINE_SECRET_<NAME>` in the worker's environment). The values are taken out of logs, errors and results; only the names are part of the cache key.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, SecretName>,
    /// Exit codes that mean bad data: reason `data`, never retried.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_exit_codes: Vec<i32>,
    /// The most output kept in the log; the command goes on, the rest is counted and dropped.
    #[serde(default = "log_limit")]
    pub max_log: ByteSize,
}

/// A text; a number or a truth value is taken as it is written, for `${matrix.rate}` alone is one.
struct Text(String);

impl JsonSchema for Text {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Text".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "number", "boolean"] })
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match Value::deserialize(from)? {
            Value::String(text) => Ok(Self(text)),
            Value::Number(number) => Ok(Self(number.to_string())),
            Value::Bool(truth) => Ok(Self(truth.to_string())),
            _ => Err(D::Error::custom("expected a text")),
        }
    }
}

fn texts<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let texts = Vec::<Text>::deserialize(from)?;
    Ok(texts.into_iter().map(|text| text.0).collect())
}

fn texts_by_name<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    let texts = BTreeMap::<String, Text>::deserialize(from)?;
    Ok(texts
        .into_iter()
        .map(|(name, text)| (name, text.0))
        .collect())
}

const fn log_limit() -> ByteSize {
    ByteSize(64 << 20)
}

/// Whether a variable of that name can have a secret: it is one that a shell knows, and none that
/// the worker sets itself.
///
/// # Errors
/// Why not, in words.
pub fn check_secret_variable(name: &str) -> Result<(), String> {
    let shown = || {
        name.chars()
            .take(80)
            .collect::<String>()
            .escape_debug()
            .to_string()
    };
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    let is_name = name.starts_with(first)
        && name.len() <= 255
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !is_name {
        return Err(format!(
            "`{}` is no name of a variable: use letters, digits and `_`",
            shown()
        ));
    }
    if name.starts_with("EMBERLINE_") || matches!(name, "TMPDIR" | "TRACEPARENT") {
        return Err(format!("`{}` is set by the worker itself", shown()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_and_truth_values_are_texts_of_a_command() {
        let spec: ExecSpec = serde_json::from_value(json!({
            "command": ["train", "--rate", 0.001, "--layers", 3, true],
            "env": {"SEED": 7},
        }))
        .unwrap();
        assert_eq!(
            spec.command,
            ["train", "--rate", "0.001", "--layers", "3", "true"]
        );
        assert_eq!(spec.env["SEED"], "7");
        let nested = serde_json::from_value::<ExecSpec>(json!({"command": [["a"]]}));
        assert!(nested.unwrap_err().to_string().contains("expected a text"));
    }
}
