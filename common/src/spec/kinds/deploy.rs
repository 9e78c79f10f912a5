//! `deploy`: a model into the registry, and into an environment.
//!
//! In: `model`, optionally `evaluation`. Out: `version`.
//! The leader registers the version and makes it live in the commit of the task: it happens once, or
//! not at all.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{Alias, EnvironmentName, ModelName};

/// Registers the input `model` as an immutable version, moves an alias to it, and makes it live in an environment. The same model a second time is the same version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeploySpec {
    /// The name in the registry.
    pub model: ModelName,
    /// The alias to move to the version, e.g. `champion`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<Alias>,
    /// Where the version becomes live. Each deployment is recorded, and counts in the metrics of delivery.
    #[serde(default = "EnvironmentName::production")]
    pub environment: EnvironmentName,
    /// Notes for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub notes: Option<String>,
}
