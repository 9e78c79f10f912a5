//! The values under the state's keys, as JSON.
//!
//! A task is written only when it is assigned, when it reaches a final state by its own doing, and
//! where spent retries must survive. Whatever follows from the pipeline and the other records
//! (waiting, queued, skipped, cancelled before it ever started) is derived again on load. A value
//! is never larger than [`MAX_VALUE_BYTES`]: what could grow past it is refused before.

use std::collections::BTreeMap;

use emberline_common::{
    delivery::Change,
    failure::{Failure, Reason},
    ids::{
        Alias, ArtifactName, DeploymentId, Digest, EnvironmentName, Epoch, Incarnation, ModelName,
        PipelineName, RunId, TaskName, TokenName, WorkerName,
    },
    run_view::{ArtifactRef, AttemptTiming, MAX_EARLIER, PastAttempt, Results, RunState},
    time::Timestamp,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::api::{LoadError, StageFile};

/// The largest value that the state takes, in bytes.
pub const MAX_VALUE_BYTES: usize = 64 << 10;
/// The longest request id, in bytes.
pub const MAX_REQUEST_ID_BYTES: usize = 128;
/// The most outputs of one task.
pub const MAX_OUTPUTS: usize = 64;
/// Room in a run's record for what is added after the submit (failure, cancellation).
pub const RUN_RESERVE_BYTES: usize = 16 << 10;

/// The state's keys.
pub mod keys {
    use super::{
        DeploymentId, Digest, EnvironmentName, ModelName, RunId, TaskName, TokenName, WorkerName,
    };

    /// `runs/{run}`
    #[must_use]
    pub fn run(run: &RunId) -> String {
        format!("runs/{run}")
    }
    /// `tasks/{run}/{task}`
    #[must_use]
    pub fn task(run: &RunId, task: &TaskName) -> String {
        format!("tasks/{run}/{task}")
    }
    /// What all records of a run's tasks begin with.
    #[must_use]
    pub fn tasks(run: &RunId) -> String {
        format!("tasks/{run}/")
    }
    /// `cache/{key}`
    #[must_use]
    pub fn cache(key: &Digest) -> String {
        format!("cache/{key}")
    }
    /// `models/{model}`
    #[must_use]
    pub fn model(model: &ModelName) -> String {
        format!("models/{model}")
    }
    /// `models/{model}/{version}`
    #[must_use]
    pub fn version(model: &ModelName, version: u32) -> String {
        format!("models/{model}/{version:08}")
    }
    /// `ended/{run}`
    #[must_use]
    pub fn ended(run: &RunId) -> String {
        format!("ended/{run}")
    }
    /// `deployments/{number}`
    #[must_use]
    pub fn deployment(deployment: DeploymentId) -> String {
        format!("deployments/{:012}", deployment.0)
    }
    /// `environments/{environment}/{model}`
    #[must_use]
    pub fn environment(environment: &EnvironmentName, model: &ModelName) -> String {
        format!("environments/{environment}/{model}")
    }
    /// `merges/{digest of the revision}`
    #[must_use]
    pub fn merge(key: &str) -> String {
        format!("merges/{key}")
    }
    /// `untold/{run or deployment}`
    #[must_use]
    pub fn untold(subject: &str) -> String {
        format!("untold/{subject}")
    }
    /// `tokens/{name}`
    #[must_use]
    pub fn token(name: &TokenName) -> String {
        format!("tokens/{name}")
    }
    /// `credentials/{worker}`
    #[must_use]
    pub fn credential(worker: &WorkerName) -> String {
        format!("credentials/{worker}")
    }
    /// `poison/{run}`
    #[must_use]
    pub fn poison(run: &RunId) -> String {
        format!("poison/{run}")
    }
}

/// A run that has not been archived.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The run.
    pub run: RunId,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// The SHA-256 of the pipeline's text.
    pub revision: Digest,
    /// The SHA-256 of [`spec_blob`](super::spec_blob).
    pub spec: Digest,
    /// The term that wrote this.
    pub epoch: Epoch,
    /// The parameters' final values.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub params: Map<String, Value>,
    /// Higher runs first.
    pub priority: i32,
    /// Reuse nothing.
    pub no_cache: bool,
    /// Where relative sources start.
    pub base_dir: String,
    /// Files that travel with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<StageFile>,
    /// What started it.
    pub trigger: String,
    /// W3C `traceparent`.
    pub traceparent: String,
    /// What it was started for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// The failed deployment that it was started to repair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repairs: Option<DeploymentId>,
    /// The client's request id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When it was accepted or last retried.
    pub resumed_at: Timestamp,
    /// When its first task started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// The first failure of a task for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<FirstFailure>,
    /// That it is to stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<StopRecord>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<EndRecord>,
}

/// The first failure of a task for good.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FirstFailure {
    /// The task.
    pub task: TaskName,
    /// When.
    pub at: Timestamp,
    /// Why.
    pub failure: Failure,
}

/// That a run is to stop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StopRecord {
    /// Since when.
    pub at: Timestamp,
    /// What it ends with: reason `cancelled` on request, else the run counts as failed.
    pub failure: Failure,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EndRecord {
    /// A final state.
    pub state: RunState,
    /// When.
    pub at: Timestamp,
    /// Why it did not succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// What a task's record says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Written {
    /// Nothing but the numbers: its state follows from the rest.
    #[default]
    Pending,
    /// An attempt is assigned.
    Running,
    /// The next attempt waits.
    Backoff,
    /// Done by an attempt.
    Succeeded,
    /// Reused.
    Cached,
    /// Failed for good.
    Failed,
    /// Stopped after it had started.
    Cancelled,
    /// Waited for a failure in vain.
    Skipped,
}

/// Retries spent, by budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Spent {
    /// The stage's own errors.
    #[serde(default)]
    pub errors: u32,
    /// Faults of the system around it.
    #[serde(default)]
    pub faults: u32,
    /// Lost workers.
    #[serde(default)]
    pub lost: u32,
}

/// One task.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TaskRecord {
    /// The term that wrote this.
    pub epoch: Epoch,
    /// Where it is.
    pub written: Written,
    /// The number of the current or last attempt.
    pub attempt: u32,
    /// The last attempt whose report was taken; 0 if none.
    #[serde(default)]
    pub reported: u32,
    /// Retries spent.
    #[serde(default)]
    pub spent: Spent,
    /// The worker of the current or last attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// Its life.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Incarnation>,
    /// When the inputs were there.
    #[serde(default)]
    pub ready_at: Timestamp,
    /// When the current or last attempt was assigned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// When the backoff ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
    /// Why the last attempt failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// Its outputs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<ArtifactRef>,
    /// Its results.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub results: Results,
    /// One line for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// For a cached task: where from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_from: Option<RunId>,
    /// The cache key of the current attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Digest>,
    /// Where the time went.
    #[serde(default)]
    pub timing: AttemptTiming,
    /// The attempts before the current or last one, oldest first; of many, the last ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<PastAttempt>,
    /// When the current attempt could have started, if it is not the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub again_at: Option<Timestamp>,
}

impl RunRecord {
    /// The latest time in it.
    pub(super) fn latest(&self) -> Timestamp {
        let failure = self.failure.as_ref().map(|failure| failure.at);
        let stop = self.stop.as_ref().map(|stop| stop.at);
        let ended = self.ended.as_ref().map(|ended| ended.at);
        let times = [self.started_at, failure, stop, ended];
        (times.into_iter().flatten()).fold(self.resumed_at, Timestamp::max)
    }
}

impl TaskRecord {
    /// The latest time in it that has come.
    pub(super) fn latest(&self) -> Timestamp {
        let times = [self.started_at, self.finished_at];
        (times.into_iter().flatten()).fold(self.ready_at, Timestamp::max)
    }

    /// Keeps what there is to know of the current attempt, which has ended; the next one can start
    /// at `again_at`.
    pub(super) fn remember(
        &mut self,
        ready_at: Timestamp,
        finished_at: Timestamp,
        reason: Reason,
        again_at: Timestamp,
    ) {
        if self.earlier.len() >= MAX_EARLIER {
            self.earlier.remove(0);
        }
        self.earlier.push(PastAttempt {
            attempt: self.attempt,
            worker: self.worker.clone(),
            ready_at: self.again_at.unwrap_or(ready_at),
            started_at: self.started_at.unwrap_or(ready_at),
            finished_at,
            reason,
        });
        self.again_at = Some(again_at);
    }
}

/// An entry of the cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CacheRecord {
    /// The run that produced it.
    pub run: RunId,
    /// The task that produced it.
    pub task: TaskName,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// When.
    pub created_at: Timestamp,
    /// The outputs.
    pub outputs: Vec<ArtifactRef>,
    /// The results.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub results: Results,
    /// Digest of all of the key but the inputs.
    pub spec: Digest,
    /// Digest of each input's manifests in order.
    pub inputs: BTreeMap<ArtifactName, Digest>,
}

/// A model's head.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ModelRecord {
    /// The highest version that there ever was: no number is given twice.
    pub latest: u32,
    /// The aliases.
    pub aliases: BTreeMap<Alias, u32>,
}

/// What is live of one model in one environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvironmentRecord {
    /// The deployment that made it live.
    pub deployment: DeploymentId,
    /// The version.
    pub version: u32,
    /// Since when.
    pub since: Timestamp,
}

/// How often a leader has died while deciding on a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoisonRecord {
    /// How often.
    pub deaths: u32,
}

/// JSON of a record.
#[must_use]
pub fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    // Only a map with keys that are no text could fail, and no record has one.
    serde_json::to_vec(record).unwrap_or_default()
}

/// A record from JSON.
///
/// # Errors
/// [`LoadError::Record`] names the key.
pub fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(value).map_err(|error| LoadError::Record {
        key: key.to_owned(),
        what: error.to_string(),
    })
}
