//! What can be seen of a run: for clients, for the report, and for the archive of ended runs.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    delivery::Change,
    failure::{Failure, Reason},
    ids::{
        ArtifactName, DeploymentId, Digest, PipelineName, RunId, StageKind, StageName, TaskName,
        WorkerName,
    },
    time::Timestamp,
    trace::RunTrace,
};

/// The largest results of a task as JSON, in bytes: they are kept in the state.
pub const MAX_RESULTS_BYTES: usize = 4 << 10;

/// Where a run is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Accepted and durable; no task has started yet.
    Queued,
    /// At least one task has started.
    Running,
    /// A cancellation was accepted; running attempts are being stopped.
    Cancelling,
    /// Every task succeeded, was cached, or was skipped by its own condition.
    Succeeded,
    /// A task failed for good.
    Failed,
    /// Stopped on request.
    Cancelled,
}

impl RunState {
    /// Whether it will never change again (but for a retry).
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The name as shown and stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Cancelling => "cancelling",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Where a task is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// Waits for upstream tasks.
    Waiting,
    /// Inputs are there; waits for a worker.
    Queued,
    /// An attempt is assigned to a worker.
    Running,
    /// The last attempt failed; the next one waits for its backoff.
    Backoff,
    /// Done by an attempt of this run.
    Succeeded,
    /// Not run: an earlier task with the same cache key had already produced the outputs.
    Cached,
    /// Failed for good.
    Failed,
    /// Not run: its condition was false, or an upstream task did not succeed.
    Skipped,
    /// Stopped on request.
    Cancelled,
}

impl TaskState {
    /// Whether it will never change again (but for a retry of the run).
    #[must_use]
    pub const fn is_final(self) -> bool {
        !matches!(
            self,
            Self::Waiting | Self::Queued | Self::Running | Self::Backoff
        )
    }

    /// Whether its outputs are there.
    #[must_use]
    pub const fn is_done(self) -> bool {
        matches!(self, Self::Succeeded | Self::Cached)
    }

    /// The name as shown and stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Backoff => "backoff",
            Self::Succeeded => "succeeded",
            Self::Cached => "cached",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One named output of a task: the digest of its manifest, and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactRef {
    /// The output's name.
    pub name: ArtifactName,
    /// The SHA-256 of the manifest.
    pub manifest: Digest,
    /// Sum of the sizes of all files, in bytes.
    pub bytes: u64,
}

/// Results of a stage: numbers, texts and flags by name; at most 4 KiB as JSON.
pub type Results = Map<String, Value>;

/// What can be seen of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunView {
    /// Itself.
    #[serde(flatten)]
    pub summary: RunSummary,
    /// Its tasks in the order of the pipeline.
    pub tasks: Vec<TaskView>,
}

/// What can be seen of one run, without its tasks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSummary {
    /// The run.
    pub run: RunId,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// The SHA-256 of the pipeline's text, under which it is stored.
    pub revision: Digest,
    /// The state.
    pub state: RunState,
    /// Why it failed or was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// The parameters' final values.
    #[serde(default)]
    pub params: Map<String, Value>,
    /// Higher runs first.
    #[serde(default)]
    pub priority: i32,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When its first task started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// Tasks in all.
    pub tasks_total: u32,
    /// Tasks in a final state.
    pub tasks_done: u32,
    /// Of those, the cached ones.
    pub tasks_cached: u32,
    /// What started it: `manual`, `schedule`, `data`, `commit`.
    pub trigger: String,
    /// W3C `traceparent` that the run's trace goes on from; empty if it starts its own.
    #[serde(default)]
    pub traceparent: String,
    /// When it was accepted or last retried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_at: Option<Timestamp>,
    /// What it was started for, without the commits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// The failed deployment that it was started to repair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repairs: Option<DeploymentId>,
}

impl RunSummary {
    /// Its trace.
    #[must_use]
    pub fn trace(&self) -> RunTrace {
        RunTrace::of(&self.run, &self.traceparent)
    }
}

/// What can be seen of one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskView {
    /// The run.
    pub run: RunId,
    /// The task.
    pub task: TaskName,
    /// The stage.
    pub stage: StageName,
    /// The stage's kind.
    pub kind: StageKind,
    /// The stages that it waits for.
    #[serde(default)]
    pub needs: Vec<StageName>,
    /// The values of the matrix for this task.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub matrix: Map<String, Value>,
    /// The state.
    pub state: TaskState,
    /// The number of the current or last attempt; 0 before the first.
    #[serde(default)]
    pub attempt: u32,
    /// The worker of the current or last attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// Why the last attempt failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// What it produced.
    #[serde(default)]
    pub outputs: Vec<ArtifactRef>,
    /// Its results.
    #[serde(default)]
    pub results: Results,
    /// One line for people: why it was reused or not, why it waits.
    #[serde(default)]
    pub note: String,
    /// When all inputs were there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_at: Option<Timestamp>,
    /// When the current or last attempt was assigned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it reached a final state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// For a cached task: the run that produced the outputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_from: Option<RunId>,
    /// Where the time of the successful attempt went.
    #[serde(default)]
    pub timing: AttemptTiming,
    /// The attempts before the current or last one, oldest first; the last [`MAX_EARLIER`] of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<PastAttempt>,
    /// When the current or last attempt could have started, if it is not the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub again_at: Option<Timestamp>,
}

/// The most earlier attempts that a task remembers.
pub const MAX_EARLIER: usize = 16;

/// An attempt that was not the last one of its task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastAttempt {
    /// Its number.
    pub attempt: u32,
    /// Its worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// When it could have started.
    pub ready_at: Timestamp,
    /// When it was assigned.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// Why it did not succeed.
    pub reason: Reason,
}

/// Where the time of an attempt went, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct AttemptTiming {
    /// Fetching inputs.
    pub fetch_micros: u64,
    /// The stage itself.
    pub stage_micros: u64,
    /// Storing outputs.
    pub store_micros: u64,
}

/// A model version to register together with the commit of its task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelRegistration {
    /// The model's name.
    pub model: crate::ids::ModelName,
    /// The alias to move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<crate::ids::Alias>,
    /// The model artifact.
    pub artifact: ArtifactRef,
    /// Metrics by name.
    #[serde(default)]
    pub metrics: Results,
    /// The input schema.
    #[serde(default)]
    pub schema: Value,
    /// Notes for people.
    #[serde(default)]
    pub notes: String,
}

/// One version of a model. Only its tags and its notes ever change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelVersion {
    /// What was registered.
    #[serde(flatten)]
    pub registration: ModelRegistration,
    /// From 1.
    pub version: u32,
    /// Where it comes from.
    #[serde(flatten)]
    pub origin: Origin,
    /// The artifacts of the run that it descends from: `task/output` to manifest.
    #[serde(default)]
    pub lineage: BTreeMap<String, Digest>,
    /// The code that the run was started for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<CodeRevision>,
    /// The version that it came after: the one that was live where it was deployed to, else the
    /// one that its alias named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<u32>,
    /// What people have put on it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// When it was registered.
    pub created_at: Timestamp,
}

/// Where a version of a model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Origin {
    /// A run of this cluster.
    Run(MadeBy),
    /// A bundle.
    Bundle {
        /// What it was where the bundle was written.
        imported: Imported,
    },
}

impl Origin {
    /// The run that made it, in this cluster or in another one.
    #[must_use]
    pub const fn made_by(&self) -> Option<&MadeBy> {
        match self {
            Self::Run(made_by) => Some(made_by),
            Self::Bundle { imported } => imported.made_by.as_ref(),
        }
    }
}

/// The task that registered a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeBy {
    /// The run.
    pub run: RunId,
    /// The task.
    pub task: TaskName,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// The SHA-256 of the pipeline's text.
    pub pipeline_revision: Digest,
}

/// What an imported version was in the registry that it was exported from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// Its model.
    pub model: crate::ids::ModelName,
    /// Its number.
    pub version: u32,
    /// When it was registered there.
    pub created_at: Timestamp,
    /// The task that registered it there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_by: Option<MadeBy>,
}

/// A revision of code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeRevision {
    /// The repository's URL without credentials; empty where there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub repository: String,
    /// The commit's id.
    pub revision: String,
    /// Whether the work tree held changes that were not committed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dirty: bool,
}

impl CodeRevision {
    /// Of what a run was started for; none where that was no code.
    #[must_use]
    pub fn of(change: &Change) -> Option<Self> {
        (change.kind == crate::delivery::ChangeKind::Code).then(|| Self {
            repository: change.repository.clone(),
            revision: change.revision.clone(),
            dirty: change.dirty,
        })
    }
}
