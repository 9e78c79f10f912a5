//! The pipeline as a person writes it: typed, documented, checked before anything runs.
//!
//! The types here are the only source: the JSON Schema for editors, the reference in the guide, the
//! check for unknown fields and the typed values all come from them. Start with [`PipelineSpec`],
//! then [`StageSpec`]; each stage kind has a file of its own in [`kinds`].

pub mod check;
pub mod condition;
pub mod expand;
pub mod kinds;
pub mod parse;
pub mod reference;
pub mod schema;
pub mod secrets;
pub mod semantics;
pub mod signature;
pub mod suggest;
pub mod units;
pub mod yaml;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ids::{ArtifactName, PipelineName, StageKind, StageName};
pub use parse::{CheckedPipeline, Diagnostic, exec_files, parse_pipeline};
pub use units::{ByteSize, DurationText};

/// A map that keeps the order of the file.
pub type Ordered<K, V> = indexmap::IndexMap<K, V>;

/// A pipeline: a named graph of stages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PipelineSpec {
    /// The pipeline's name: 1 to 63 lower-case letters, digits, `_` and `-`.
    pub pipeline: PipelineName,
    /// What it is for, in a sentence or two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Parameters and their default values. A submit can set others (`--param name=value`); a value is used as `${params.name}`. Secrets do not belong here.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub params: Ordered<String, Value>,
    /// Runs with a higher priority get workers first; between −1000 and 1000.
    #[serde(default)]
    #[schemars(range(min = -1000, max = 1000))]
    pub priority: i32,
    /// The whole run ends with reason `timeout` after this long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<DurationText>,
    /// After a task has failed for good, start no further stage of the run, except those whose `run_if` asks for it.
    #[serde(default = "yes")]
    pub fail_fast: bool,
    /// The stages by name. They start as soon as what they need is there, not in the order of the file.
    pub stages: Ordered<StageName, StageSpec>,
}

/// One stage of a pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StageSpec {
    /// What it does: `collect`, `convert`, `validate`, `train`, `evaluate`, `deploy`, `report`, `exec`, `noop`, or `vendor/kind` for a kind of your own.
    pub kind: StageKind,
    /// Inputs by the name that the stage knows them by, each the `stage.output` that it comes from. From a stage with a matrix come the outputs of all its tasks.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub inputs: Ordered<ArtifactName, OutputRef>,
    /// Stages to wait for without taking anything from them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub needs: Vec<StageName>,
    /// The kind's own settings.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub with: Value,
    /// A condition on results of upstream stages, parameters and matrix values, e.g. `evaluate.f1 >= 0.7 and params.region == "eu"`. If it is false, the stage is skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// Which fate of the upstream stages lets this one start.
    #[serde(default)]
    pub run_if: RunIf,
    /// Values by name; the stage becomes one task for each combination, used as `${matrix.name}`. At most 10,000 tasks.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub matrix: Ordered<String, Vec<Value>>,
    /// What one attempt reserves on its worker.
    #[serde(default)]
    pub resources: ResourceSpec,
    /// Labels that the worker must have, with these values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// How often and how soon to try again.
    #[serde(default)]
    pub retries: RetrySpec,
    /// An attempt is stopped with reason `timeout` after this long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<DurationText>,
    /// Whether the outputs of an earlier task with the same spec and inputs may be used instead.
    #[serde(default = "yes")]
    pub cache: bool,
    /// For `exec` and kinds of your own: the outputs by name, each with the type of artifact it is.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub outputs: Ordered<ArtifactName, ArtifactType>,
}

const fn yes() -> bool {
    true
}

/// One output of one stage, written `stage.output`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OutputRef {
    /// The stage.
    pub stage: StageName,
    /// Its output.
    pub output: ArtifactName,
}

impl std::fmt::Display for OutputRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.stage, self.output)
    }
}

impl std::str::FromStr for OutputRef {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (stage, output) = text.split_once('.').ok_or_else(|| {
            format!(
                "`{}` names no output: write `stage.output`, e.g. `raw.data`",
                text.escape_debug()
            )
        })?;
        Ok(Self {
            stage: StageName::new(stage).map_err(|e| e.to_string())?,
            output: ArtifactName::new(output).map_err(|e| e.to_string())?,
        })
    }
}

impl Serialize for OutputRef {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for OutputRef {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for OutputRef {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "OutputRef".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "format": "emberline output reference",
            "pattern": "^[a-z0-9][a-z0-9_-]{0,62}\\.[a-z0-9][a-z0-9_-]{0,62}$"
        })
    }
}

/// Which fate of the upstream stages lets a stage start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunIf {
    /// All of them succeeded (or were cached, or skipped by their own condition).
    #[default]
    Success,
    /// At least one of them, or any stage of the run, failed.
    Failure,
    /// They ended, whichever way.
    Always,
}

/// What an artifact is; checked where one stage's output is another's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ArtifactType {
    /// Files as they are.
    Files,
    /// A table: Parquet files of one schema.
    Table,
    /// A trained model with its schema and preprocessing.
    Model,
    /// What `validate` found.
    Validation,
    /// What `evaluate` measured.
    Evaluation,
    /// A registered model version.
    Version,
    /// An HTML page.
    Page,
}

impl ArtifactType {
    /// The name as written in a pipeline.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Files => "files",
            Self::Table => "table",
            Self::Model => "model",
            Self::Validation => "validation",
            Self::Evaluation => "evaluation",
            Self::Version => "version",
            Self::Page => "page",
        }
    }
}

/// What one attempt reserves on its worker.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourceSpec {
    /// CPU cores, in steps of 0.001. By default 1; none for `noop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1024))]
    pub cpu: Option<f64>,
    /// Memory. For `exec` it is also the limit of the whole process group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// GPUs.
    #[serde(default)]
    #[schemars(range(max = 64))]
    pub gpu: u32,
}

impl StageSpec {
    /// What one attempt reserves, as amounts that can be added and compared.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to the range"
    )]
    pub fn reserves(&self) -> crate::resources::Resources {
        let does_nothing = self.kind.as_str() == kinds::BuiltinKind::Noop.as_str();
        let cpu = self
            .resources
            .cpu
            .unwrap_or(if does_nothing { 0.0 } else { 1.0 });
        crate::resources::Resources {
            cpu_millis: (cpu * 1000.0).ceil().clamp(0.0, f64::from(u32::MAX)) as u32,
            memory_bytes: self.resources.memory.map_or(0, |m| m.0),
            gpus: self.resources.gpu,
        }
    }
}

/// How often and how soon to try again. Reasons `data` and `quality_gate` are never retried, and `preempted` spends nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetrySpec {
    /// Further attempts after the stage's own errors (`user_error`, `oom`, `timeout`).
    #[serde(default)]
    #[schemars(range(max = 100))]
    pub errors: u32,
    /// Further attempts after faults of the system around it (`storage`, `system`).
    #[serde(default = "three")]
    #[schemars(range(max = 100))]
    pub faults: u32,
    /// Further attempts after a lost worker.
    #[serde(default = "five")]
    #[schemars(range(max = 100))]
    pub lost_workers: u32,
    /// The wait before the first further attempt after an error or a fault; it doubles with each one, and a random part of up to half is taken off. After a lost worker there is no wait.
    #[serde(default = "one_second")]
    pub backoff: DurationText,
    /// The longest wait.
    #[serde(default = "one_minute")]
    pub max_backoff: DurationText,
}

const fn three() -> u32 {
    3
}
const fn five() -> u32 {
    5
}
const fn one_second() -> DurationText {
    DurationText(std::time::Duration::from_secs(1))
}
const fn one_minute() -> DurationText {
    DurationText(std::time::Duration::from_secs(60))
}

impl Default for RetrySpec {
    fn default() -> Self {
        Self {
            errors: 0,
            faults: three(),
            lost_workers: five(),
            backoff: one_second(),
            max_backoff: one_minute(),
        }
    }
}

#[cfg(test)]
mod tests;
