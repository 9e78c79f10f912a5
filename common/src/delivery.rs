//! What is delivered: changes, and the deployments that carry them into an environment.
//!
//! A *change* is what a run was started for: a revision of a repository with the commits since the
//! previous deployment, or, without a repository, the revision of the pipeline itself; and the data
//! that it read. A *deployment* is one model version becoming, or failing to become, live in one
//! environment. The metrics of delivery are computed from these records alone.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    ids::{Alias, DeploymentId, Digest, EnvironmentName, ModelName, PipelineName, RunId, TaskName},
    serving::{ServingLimits, Traffic},
    spec::{
        DurationText,
        kinds::deploy::{Strategy, share},
    },
    time::Timestamp,
    trace::TraceId,
};

/// The most commits that a change keeps; of more, the newest.
pub const MAX_COMMITS: usize = 256;
/// The longest text of a change (repository, branch, change id), in bytes.
pub const MAX_CHANGE_TEXT_BYTES: usize = 512;

/// What a change is a revision of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// A repository.
    #[default]
    Code,
    /// The pipeline's text: there was no repository.
    Pipeline,
}

/// What a run was started for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What it is a revision of.
    pub kind: ChangeKind,
    /// The repository's URL without credentials; for [`ChangeKind::Pipeline`] empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub repository: String,
    /// The branch, e.g. `main`; empty if none is checked out.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub branch: String,
    /// The commit's id, or the SHA-256 of the pipeline's text.
    pub revision: String,
    /// The number of the pull request, if the trigger named one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// When it was committed; for a pipeline's text, when its file was last written.
    pub committed_at: Timestamp,
    /// When it was authored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authored_at: Option<Timestamp>,
    /// When it was pushed (or merged), if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pushed_at: Option<Timestamp>,
    /// Whether the work tree held changes that were not committed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dirty: bool,
    /// The commits since the previous deployment, newest first; the first is `revision` itself.
    /// At most [`MAX_COMMITS`]. Empty means that only `revision` is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub commits: Vec<Commit>,
    /// Older commits that were left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_out: u32,
}

impl Change {
    /// Whether it brings this revision.
    #[must_use]
    pub fn carries(&self, revision: &str) -> bool {
        self.revision == revision || self.commits.iter().any(|c| c.revision == revision)
    }

    /// Fills in when its revisions were pushed, where that is not known yet.
    pub fn note_pushes(&mut self, pushed: impl Fn(&str) -> Option<Timestamp>) {
        self.pushed_at = self.pushed_at.or_else(|| pushed(&self.revision));
        for commit in &mut self.commits {
            commit.pushed_at = commit.pushed_at.or_else(|| pushed(&commit.revision));
        }
    }
}

/// One commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Its id.
    pub revision: String,
    /// When it was committed.
    pub committed_at: Timestamp,
    /// When it was pushed (or merged), if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pushed_at: Option<Timestamp>,
}

/// A version of a data set that a run read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataChange {
    /// The task that collected it.
    pub task: TaskName,
    /// The SHA-256 of the snapshot's manifest.
    pub revision: Digest,
    /// When it arrived: when its source was last modified, as far as that tells; else when it was
    /// collected.
    pub arrived_at: Timestamp,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// How a deployment came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentKind {
    /// A run brought a version.
    Release,
    /// What was live before was made live again.
    Rollback,
}

impl DeploymentKind {
    /// The name as shown and stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Rollback => "rollback",
        }
    }
}

/// Where a deployment is, or how it came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentOutcome {
    /// It is under way.
    InProgress,
    /// The version became live (whatever happened to it later).
    Live,
    /// It was stopped before it had answered for anyone.
    CaughtBeforeExposure,
    /// It was stopped after it had answered for someone, and before it was live for all.
    Aborted,
    /// It was given up for a newer deployment before it was live: neither a success nor a failure.
    Superseded,
}

/// Why a deployment counts as failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCause {
    /// It was rolled back.
    Rollback,
    /// Its canary was aborted after it had answered requests.
    CanaryAborted,
    /// A gate was broken after exposure.
    GateBreach,
    /// A person said so.
    Marked,
    /// An outside system reported an incident.
    Incident,
}

impl FailureCause {
    /// The name as shown and stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rollback => "rollback",
            Self::CanaryAborted => "canary_aborted",
            Self::GateBreach => "gate_breach",
            Self::Marked => "marked",
            Self::Incident => "incident",
        }
    }
}

impl fmt::Display for FailureCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl DeploymentOutcome {
    /// The name as shown and stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Live => "live",
            Self::CaughtBeforeExposure => "caught_before_exposure",
            Self::Aborted => "aborted",
            Self::Superseded => "superseded",
        }
    }
}

impl fmt::Display for DeploymentOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// That a deployment has failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentFailure {
    /// Why it counts as failed.
    pub cause: FailureCause,
    /// Since when it did harm: what was told, else since it was live (or exposed).
    pub began_at: Timestamp,
    /// When the leader was told.
    pub noted_at: Timestamp,
    /// One line for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// The outside system's id of the incident.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub incident: String,
    /// When an outside system said that the incident was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved_at: Option<Timestamp>,
}

/// One model version becoming, or failing to become, live in one environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// Counts up over the cluster.
    pub id: DeploymentId,
    /// How it came about.
    pub kind: DeploymentKind,
    /// Where.
    pub environment: EnvironmentName,
    /// The pipeline whose run made the version.
    pub pipeline: PipelineName,
    /// The model.
    pub model: ModelName,
    /// The version; 0 if it was stopped before there was one.
    pub version: u32,
    /// The run that deployed it; for a rollback, the run that had made the version that is live again.
    pub run: RunId,
    /// The task of that run.
    pub task: TaskName,
    /// The failed deployment that it was started to repair: then it is unplanned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repairs: Option<DeploymentId>,
    /// The deployment that was live there before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<DeploymentId>,
    /// Where it is, or how it came out.
    pub outcome: DeploymentOutcome,
    /// When its run was accepted; for a rollback, when it was asked for.
    pub accepted_at: Timestamp,
    /// When it began.
    pub started_at: Timestamp,
    /// When the version was live, or was given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// That it has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<DeploymentFailure>,
    /// What its run was started for. None for a rollback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
    /// The data that the version descends from. Empty for a rollback.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<DataChange>,
    /// The trace that it is part of.
    pub trace: TraceId,
    /// How the version comes into service, or came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
}

/// How a version comes into service, or came.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// Serving workers that it is to be on.
    pub replicas: u32,
    /// How it takes over.
    pub strategy: Strategy,
    /// How much of a worker it may take.
    pub limits: ServingLimits,
    /// How long it may take to be loaded, and each step beyond its own time to see enough requests.
    pub progress_deadline: DurationText,
    /// The alias that moves to it when it is live.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<Alias>,
    /// Where it is.
    pub phase: RolloutPhase,
    /// Since when.
    pub since: Timestamp,
    /// The phases before it, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub past: Vec<PastPhase>,
    /// When it was known to have answered for someone first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exposed_at: Option<Timestamp>,
    /// Whether a person has said yes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub approved: bool,
    /// One line for people: what it waits for, or why it ended as it did.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// A phase that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastPhase {
    /// Which.
    pub phase: RolloutPhase,
    /// From.
    pub from: Timestamp,
    /// To.
    pub to: Timestamp,
}

/// Where a rollout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum RolloutPhase {
    /// The version is being loaded; it gets no request.
    Preparing,
    /// It gets a copy of requests.
    Shadowing,
    /// It gets the share of this step, from 0.
    Step {
        /// Which.
        step: u32,
    },
    /// A person has to say yes; meanwhile it keeps the share that it had last.
    AwaitingApproval,
    /// It is live, and would still be taken back by itself.
    Watching,
    /// Nothing more will happen by itself.
    Settled,
}

impl RolloutPhase {
    /// The name as shown and stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Shadowing => "shadowing",
            Self::Step { .. } => "step",
            Self::AwaitingApproval => "awaiting_approval",
            Self::Watching => "watching",
            Self::Settled => "settled",
        }
    }
}

impl Rollout {
    /// Goes on to another phase.
    pub fn enter(&mut self, phase: RolloutPhase, now: Timestamp) {
        self.past.push(PastPhase {
            phase: self.phase,
            from: self.since,
            to: now,
        });
        (self.phase, self.since) = (phase, now);
    }

    /// The requests that the new version gets before it is live.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.traffic_in(self.phase)
    }

    /// The requests that it gets in that phase.
    #[must_use]
    pub fn traffic_in(&self, phase: RolloutPhase) -> Traffic {
        let of_step = |step: usize| match &self.strategy {
            Strategy::Canary { steps, .. } => {
                let step = steps.get(step).or(steps.last());
                step.map_or(Traffic::Standby, |step| Traffic::Canary {
                    share: share(step.weight),
                })
            }
            Strategy::Shadow { weight, .. } => Traffic::Shadow {
                share: share(*weight),
            },
            Strategy::AllAtOnce { .. } => Traffic::Standby,
        };
        match phase {
            RolloutPhase::Step { step } => of_step(step as usize),
            RolloutPhase::Shadowing | RolloutPhase::AwaitingApproval => of_step(usize::MAX),
            RolloutPhase::Preparing | RolloutPhase::Watching | RolloutPhase::Settled => {
                Traffic::Standby
            }
        }
    }
}
