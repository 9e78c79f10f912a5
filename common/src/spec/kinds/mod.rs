//! The built-in stage kinds: the settings of each, and which artifacts go in and come out.
//!
//! A kind's version is part of its cache key: raise it when the same spec and inputs no longer give
//! the same outputs.

pub mod collect;
pub mod convert;
pub mod deploy;
pub mod evaluate;
pub mod exec;
pub mod report;
pub mod train;
pub mod validate;

pub use collect::CollectSpec;
pub use convert::ConvertSpec;
pub use deploy::DeploySpec;
pub use evaluate::EvaluateSpec;
pub use exec::ExecSpec;
pub use report::ReportSpec;
pub use train::TrainSpec;
pub use validate::ValidateSpec;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A built-in stage kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BuiltinKind {
    /// Takes a snapshot of files.
    Collect,
    /// Turns files into tables.
    Convert,
    /// Checks a table.
    Validate,
    /// Trains a model.
    Train,
    /// Measures a model.
    Evaluate,
    /// Registers a model version and moves an alias.
    Deploy,
    /// Writes an HTML page about the run.
    Report,
    /// Runs a command.
    Exec,
    /// Does nothing: a join, a barrier, a measure of the system itself.
    Noop,
}

impl BuiltinKind {
    /// All of them, in the order of a pipeline.
    pub const ALL: [Self; 9] = [
        Self::Collect,
        Self::Convert,
        Self::Validate,
        Self::Train,
        Self::Evaluate,
        Self::Deploy,
        Self::Report,
        Self::Exec,
        Self::Noop,
    ];

    /// The name as written in a pipeline.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Collect => "collect",
            Self::Convert => "convert",
            Self::Validate => "validate",
            Self::Train => "train",
            Self::Evaluate => "evaluate",
            Self::Deploy => "deploy",
            Self::Report => "report",
            Self::Exec => "exec",
            Self::Noop => "noop",
        }
    }

    /// The kind of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// Part of every cache key of this kind.
    #[must_use]
    pub const fn version(self) -> u32 {
        match self {
            // 2: the model's document has a reference.
            Self::Train => 2,
            _ => 1,
        }
    }
}

/// The settings of `noop`: there are none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoopSpec {}
