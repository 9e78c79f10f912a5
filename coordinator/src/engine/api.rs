//! What goes into the engine and what comes out of it. Plain data, no behaviour.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use emberline_common::{
    delivery::{Change, Deployment},
    failure::{Failure, Reason},
    ids::{
        ArtifactName, AttemptId, DeploymentId, Digest, EnvironmentName, Epoch, Incarnation,
        ModelName, RunId, StageKind, TaskName, WorkerName,
    },
    resources::Resources,
    run_view::{
        ArtifactRef, AttemptTiming, ModelRegistration, Results, RunSummary, RunView, TaskView,
    },
    serving::{ServingOffer, ServingPlan, ServingStatus},
    spec::{ArtifactType, PipelineSpec},
    time::Timestamp,
    trace::TraceId,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

pub use super::{
    outside::{Merge, OutsideEvent},
    registry::{ImportedVersion, RegistryCommand, RegistryRefusal, VersionRef, VersionView},
    tokens::{AccessTable, CredentialRecord, TokenCommand, TokenRecord, TokenRefusal},
};

/// One session of a worker with this leader. Never reused by one leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// One thing that happened, for the engine to decide on.
#[derive(Debug, Clone)]
pub enum Command {
    /// A client submits a run.
    Submit(Box<Submission>),
    /// A client asks a run to stop.
    Cancel {
        /// Which.
        run: RunId,
        /// Why.
        why: String,
    },
    /// A client starts an ended, unsuccessful run again from its tasks that did not succeed.
    Retry(Box<ArchivedRun>),
    /// A worker opened a session.
    WorkerRegistered(Box<WorkerHello>),
    /// A worker has room for more attempts.
    Credits {
        /// The session.
        session: SessionId,
        /// How many more.
        credits: u32,
    },
    /// A session's connection broke.
    WorkerDisconnected {
        /// The session.
        session: SessionId,
        /// How.
        how: Disconnect,
    },
    /// A worker takes no more work.
    WorkerDraining {
        /// The session.
        session: SessionId,
    },
    /// A person wants a worker to take no more work, and to end.
    DrainWorker {
        /// Which.
        worker: WorkerName,
    },
    /// Attempts ended.
    Reports {
        /// The session that says so.
        session: SessionId,
        /// The reports.
        reports: Vec<AttemptReport>,
    },
    /// The record of an ended run is in the object store.
    RunArchived {
        /// Which.
        run: RunId,
        /// The SHA-256 under which it is stored.
        archive: Digest,
    },
    /// Forget ended runs, and the cache entries that they made.
    Forget {
        /// Which.
        runs: Vec<RunId>,
    },
    /// A person says that a deployment has failed.
    MarkFailed {
        /// Which.
        deployment: DeploymentId,
        /// Since when it did harm; by default since it was live.
        began_at: Option<Timestamp>,
        /// One line for people.
        why: String,
    },
    /// A person wants back what was live before.
    RollBack {
        /// Where.
        environment: EnvironmentName,
        /// Of which model; need not be said if only one is live there.
        model: Option<ModelName>,
        /// Only if this is what is live.
        expected: Option<DeploymentId>,
        /// One line for people.
        why: String,
    },
    /// A person says yes to a deployment.
    Approve {
        /// Which.
        deployment: DeploymentId,
    },
    /// A worker says how far it is with what it serves.
    Serving {
        /// The session.
        session: SessionId,
        /// How far.
        status: Box<ServingStatus>,
    },
    /// A person wants the registry to be another one.
    Registry(RegistryCommand),
    /// Tokens are made, revoked and issued.
    Tokens(TokenCommand),
    /// An outside system tells something.
    Outside(OutsideEvent),
    /// Outside systems have been told of runs and deployments.
    Told {
        /// All up to this mark of [`Engine::untold`](super::Engine::untold).
        up_to: u64,
    },
    /// A deadline given by [`Engine::next_deadline`](super::Engine::next_deadline) has come.
    Tick,
}

/// How a session's connection broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disconnect {
    /// It was closed: the worker's process has died, or it comes back at once.
    Closed,
    /// Nothing was heard from it for as long as `worker_grace`: it may be paused, cut off, or gone
    /// with its machine.
    Silent,
}

/// A run to accept. Its pipeline has been checked, its parameters are filled in.
#[derive(Debug, Clone)]
pub struct Submission {
    /// The id that it will have if it is new.
    pub run: RunId,
    /// Chosen by the client; the same id again is the same run.
    pub request_id: Option<String>,
    /// The pipeline, with `${params.…}` filled in and `${matrix.…}` still there.
    pub spec: Arc<PipelineSpec>,
    /// The SHA-256 under which the pipeline's text is stored.
    pub revision: Digest,
    /// The parameters' final values.
    pub params: Map<String, Value>,
    /// Directory that relative `file:` sources are resolved against.
    pub base_dir: String,
    /// Overrides the pipeline's own.
    pub priority: Option<i32>,
    /// Reuse nothing.
    pub no_cache: bool,
    /// Files that travel with the submission.
    pub files: Vec<StageFile>,
    /// What started it.
    pub trigger: String,
    /// W3C `traceparent` to go on from.
    pub traceparent: String,
    /// What it is started for.
    pub change: Option<Change>,
    /// The failed deployment that it is started to repair.
    pub repairs: Option<DeploymentId>,
}

/// A file that travels with a submission.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageFile {
    /// Path relative to the pipeline file and to the working directory.
    pub path: String,
    /// The SHA-256 of its content.
    pub sha256: Digest,
    /// Size in bytes.
    pub bytes: u64,
    /// Whether it is executable.
    pub executable: bool,
}

/// A worker that opens a session.
#[derive(Debug, Clone)]
pub struct WorkerHello {
    /// The session.
    pub session: SessionId,
    /// Its name.
    pub worker: WorkerName,
    /// Its life.
    pub incarnation: Incarnation,
    /// Its program's version.
    pub version: String,
    /// What it has.
    pub resources: Resources,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The stage kinds it runs, with their versions.
    pub kinds: BTreeMap<StageKind, u32>,
    /// Manifests in its cache.
    pub cached: Vec<Digest>,
    /// Attempts that it is still running, and those that ended but whose reports no leader has
    /// acknowledged (these reports follow as [`Command::Reports`]). What is not here is lost.
    pub running: Vec<AttemptId>,
    /// Room for attempts.
    pub credits: u32,
    /// What it serves, and how far it is with it, if it serves models.
    pub serving: Option<(ServingOffer, ServingStatus)>,
}

/// How one attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub struct AttemptReport {
    /// Which.
    pub id: AttemptId,
    /// Whether it succeeded, and what it produced.
    pub outcome: Result<AttemptSuccess, AttemptFailure>,
    /// Where its time went.
    pub timing: AttemptTiming,
}

/// What a successful attempt produced; all of it is stored already.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AttemptSuccess {
    /// Its outputs.
    pub outputs: Vec<ArtifactRef>,
    /// Its results.
    pub results: Results,
    /// What to register.
    pub registration: Option<ModelRegistration>,
}

/// Why an attempt did not succeed.
#[derive(Debug, Clone, PartialEq)]
pub struct AttemptFailure {
    /// The failure.
    pub failure: Failure,
    /// The input that is missing or corrupted: cache entries that name it are dropped.
    pub bad_manifest: Option<Digest>,
    /// Outputs that were stored all the same (e.g. `validation`), kept for `run_if: always`.
    pub outputs: Vec<ArtifactRef>,
    /// Results up to the failure.
    pub results: Results,
}

/// An ended run as it lies in the object store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArchivedRun {
    /// What could be seen of it.
    pub view: RunView,
    /// As submitted.
    pub base_dir: String,
    /// As submitted.
    pub no_cache: bool,
    /// As submitted.
    pub files: Vec<StageFile>,
    /// As submitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// As submitted, with parameters filled in.
    pub spec: Arc<PipelineSpec>,
    /// As submitted, with all commits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<Change>,
}

/// An attempt for a worker to run.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// Which.
    pub id: AttemptId,
    /// The leader's term.
    pub epoch: Epoch,
    /// The pipeline's name.
    pub pipeline: emberline_common::ids::PipelineName,
    /// The stage's kind.
    pub kind: StageKind,
    /// The stage's `with`, everything filled in.
    pub spec: Value,
    /// Its inputs.
    pub inputs: Vec<AssignedInput>,
    /// What is reserved for it.
    pub resources: Resources,
    /// Stop it after this long.
    pub timeout: Option<Duration>,
    /// Directory that relative `file:` sources are resolved against.
    pub base_dir: String,
    /// Files that this stage names.
    pub files: Vec<StageFile>,
    /// The outputs that the stage declares in the pipeline; for `exec` and a user's own kinds.
    pub outputs: Vec<(ArtifactName, ArtifactType)>,
    /// What earlier tasks of the run did; only for kinds `report` and `deploy`.
    pub run_view: Option<Box<RunView>>,
    /// All deployments that are remembered; only for kind `report`.
    pub deployments: Vec<Arc<Deployment>>,
    /// W3C `traceparent` of the run.
    pub traceparent: String,
    /// When it could have started.
    pub ready_at: Timestamp,
}

/// One input of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssignedInput {
    /// The name that the stage knows it by.
    pub name: ArtifactName,
    /// What it is.
    pub artifact: ArtifactRef,
    /// The task that produced it.
    pub producer: TaskName,
}

/// One record to write. All writes of one decision are committed together, or none is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Set a key.
    Put {
        /// The key, without the cluster's prefix.
        key: String,
        /// JSON, at most 64 KiB.
        value: Vec<u8>,
    },
    /// Remove a key.
    Delete {
        /// The key, without the cluster's prefix.
        key: String,
    },
    /// Remove every key that begins so.
    DeletePrefix {
        /// The prefix, without the cluster's own.
        prefix: String,
    },
}

/// What to do once the writes are committed; never before.
#[derive(Debug, Clone)]
pub enum Effect {
    /// Answer a registration.
    Registered {
        /// The session.
        session: SessionId,
        /// Of the attempts that it said are running, those that are no longer current.
        abandon: Vec<AttemptId>,
    },
    /// End a session: it was replaced, or the worker is not wanted.
    CloseSession {
        /// The session.
        session: SessionId,
        /// Why.
        why: String,
    },
    /// Send work.
    Assign {
        /// To whom.
        session: SessionId,
        /// What.
        assignment: Box<Assignment>,
    },
    /// Stop an attempt.
    Stop {
        /// Where it runs.
        session: SessionId,
        /// Which.
        attempt: AttemptId,
    },
    /// Tell a worker to take no more work, to finish what runs, and to end.
    Drain {
        /// Whom.
        session: SessionId,
    },
    /// Tell a worker what to serve.
    Serve {
        /// Whom.
        session: SessionId,
        /// All of it.
        plan: Box<ServingPlan>,
    },
    /// Tell a worker what became of its report.
    Ack {
        /// Whom.
        session: SessionId,
        /// Which attempt.
        attempt: AttemptId,
        /// Committed, or refused since it is no longer current.
        committed: bool,
    },
    /// Tell those who watch the run. Only made for runs that are watched.
    RunChanged(Arc<RunSummary>),
    /// Tell those who watch the run. Only made for runs that are watched.
    TaskChanged(Arc<TaskView>),
    /// Check calls by this from now on.
    Access(Arc<AccessTable>),
    /// Write the ended run to the object store, then answer with [`Command::RunArchived`].
    Archive(Arc<ArchivedRun>),
    /// Tell those who observe the cluster: the run is in another state.
    RunObserved(Arc<RunSummary>),
    /// Tell those who observe the cluster; see [`Observe`].
    TaskObserved(Arc<TaskView>),
    /// Tell those who observe the cluster: an attempt did not succeed, whether there is to be another
    /// one or not.
    AttemptFailed(Reason),
    /// Tell those who observe the cluster: a deployment was made, or has changed.
    Deployed(Arc<Deployment>),
}

/// What is told to those who observe the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Observe {
    /// Nothing of runs and tasks.
    #[default]
    Nothing,
    /// New states of runs, attempts that failed, and ends of tasks but for those that simply succeeded.
    Exceptions,
    /// New states of runs, and ends of tasks.
    Ends,
    /// Also that attempts were assigned.
    Starts,
}

/// What a command came to, for whoever gave it. To be told only after the commit.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Nothing to say.
    Done,
    /// The submitted run.
    Submitted {
        /// Its id.
        run: RunId,
        /// Its trace.
        trace: TraceId,
        /// Whether an earlier submit with the same request id had made it.
        already_existed: bool,
    },
    /// The run as it is now.
    Run(Box<RunSummary>),
    /// Whether what was told was new.
    Noted {
        /// Whether anything has changed.
        changed: bool,
    },
    /// A deployment as it is now.
    Deployment {
        /// Itself.
        deployment: Arc<Deployment>,
        /// The one that it rolled back.
        failed: Option<Arc<Deployment>>,
    },
    /// A version of a model: as it is now, or as it was when it was deleted.
    Version(Box<VersionView>),
    /// Tokens were changed.
    Revoked {
        /// How many workers' credentials went with it.
        credentials: usize,
    },
    /// A worker that was told to drain.
    Draining {
        /// Attempts that it still runs.
        running: usize,
    },
}

/// Why a command was refused. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// There is no such run among the live ones.
    #[error("there is no live run `{0}`")]
    NoSuchRun(RunId),
    /// There is no such worker.
    #[error("there is no worker `{0}`")]
    NoSuchWorker(WorkerName),
    /// There is no such deployment.
    #[error("{0}")]
    NoSuchDeployment(String),
    /// The deployment's state, or what is live, does not allow it.
    #[error("{0}")]
    WrongDeployment(String),
    /// The registry does not allow it.
    #[error(transparent)]
    Registry(#[from] RegistryRefusal),
    /// The tokens do not allow it.
    #[error(transparent)]
    Tokens(#[from] TokenRefusal),
    /// The run's state does not allow it.
    #[error("run `{run}` is {state}: {hint}")]
    WrongState {
        /// The run.
        run: RunId,
        /// Its state.
        state: &'static str,
        /// What can be done instead.
        hint: &'static str,
    },
    /// Too much is queued already.
    #[error("the queue is full ({limit} {what}); try again later")]
    QueueFull {
        /// The limit.
        limit: usize,
        /// Of what.
        what: &'static str,
    },
    /// The submission is larger than the state can hold.
    #[error("the submission is too large: {0}")]
    TooLarge(String),
    /// The pipeline cannot be run as it is, though its file has passed the checks.
    #[error("the pipeline cannot run: {0}")]
    Invalid(String),
}

/// All that one command led to.
#[derive(Debug)]
pub struct Decision {
    /// What to write, in one transaction.
    pub writes: Vec<Write>,
    /// What to do once that is committed.
    pub effects: Vec<Effect>,
    /// What to answer once that is committed.
    pub outcome: Result<Outcome, Refusal>,
}

/// Limits and times of the engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// How long nothing may be heard of a worker before its attempts are lost.
    pub worker_grace: Duration,
    /// How long a worker whose connection was closed may take to come back: when a process dies, its
    /// system closes its connections at once; one that lives connects again within milliseconds.
    pub closed_grace: Duration,
    /// How long a new leader waits for workers to claim their attempts.
    pub adoption_window: Duration,
    /// Runs that have not ended, at most.
    pub max_live_runs: usize,
    /// Tasks that have not ended, at most, over all runs.
    pub max_live_tasks: usize,
    /// Assignments of one decision, at most: more go into the next one, which follows at once. A
    /// store with small transactions wants few.
    pub assignments_at_once: usize,
    /// Cache entries, at most; the least recently used go first.
    pub max_cache_entries: usize,
    /// A run is quarantined (failed with reason `system`) after this many leaders have died while deciding on it.
    pub poison_limit: u32,
    /// Ended runs that the state remembers, at most; the oldest are forgotten first.
    pub max_ended_runs: usize,
    /// How long an attempt that was told to stop may take before its task ends without it.
    pub stop_grace: Duration,
    /// How long after its time limit an attempt is given up; until then the worker, which keeps the
    /// limit exactly, is waited for. Longer than a worker lets a command tidy up.
    pub timeout_slack: Duration,
    /// What those who observe the cluster are told.
    pub observe: Observe,
    /// Keep what outside systems have to be told of, until [`Command::Told`].
    pub keep_untold: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            worker_grace: Duration::from_secs(3),
            closed_grace: Duration::from_millis(400),
            adoption_window: Duration::from_secs(3),
            max_live_runs: 10_000,
            max_live_tasks: 1_000_000,
            assignments_at_once: 512,
            max_cache_entries: 100_000,
            poison_limit: 3,
            max_ended_runs: 100_000,
            stop_grace: Duration::from_secs(15),
            timeout_slack: Duration::from_secs(15),
            observe: Observe::Nothing,
            keep_untold: false,
        }
    }
}

/// One task of a plan: what a submit would do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTask {
    /// The task.
    pub task: TaskName,
    /// The stage's kind.
    pub kind: StageKind,
    /// What would happen.
    pub action: PlannedAction,
    /// Why.
    pub why: String,
    /// The stages it waits for.
    pub needs: Vec<emberline_common::ids::StageName>,
}

/// What would happen to a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlannedAction {
    /// It would run.
    Run,
    /// Its outputs would be reused.
    Reuse,
    /// It depends on what an upstream task that has to run will produce.
    Depends,
}

/// What can be seen of a worker.
#[derive(Debug, Clone)]
pub struct WorkerStatus {
    /// Its name.
    pub worker: WorkerName,
    /// Since when its connection is broken, if it is.
    pub suspect_since: Option<Timestamp>,
    /// Whether it takes no more work.
    pub draining: bool,
    /// What it has.
    pub total: Resources,
    /// What is free.
    pub free: Resources,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its kinds.
    pub kinds: Vec<StageKind>,
    /// Attempts that it runs.
    pub running: usize,
    /// Its program's version.
    pub version: String,
}

/// How much is queued and running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueStats {
    /// Runs that have not ended, or whose record is not archived yet.
    pub live_runs: usize,
    /// Tasks that are not in a final state.
    pub live_tasks: usize,
    /// Tasks that wait for a worker.
    pub queued_tasks: usize,
    /// Since when the one waits that waits longest.
    pub queued_since: Option<Timestamp>,
    /// Attempts on workers, those that were told to stop included.
    pub running_attempts: usize,
    /// Cache entries.
    pub cache_entries: usize,
}

/// What can be seen of a registered model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelView {
    /// Its name.
    pub model: emberline_common::ids::ModelName,
    /// The highest version that there ever was.
    pub latest_version: u32,
    /// How many versions there are.
    pub versions: usize,
    /// Aliases and the versions they point to.
    pub aliases: BTreeMap<emberline_common::ids::Alias, u32>,
}

/// An ended run as the state remembers it; the whole is in the archive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EndedRun {
    /// Its last summary.
    pub summary: RunSummary,
    /// The SHA-256 under which the [`ArchivedRun`] is stored.
    pub archive: Digest,
    /// The client's request id, so that a repeated submit finds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// Why the records of an earlier leader could not be taken over.
#[derive(Debug, Error)]
pub enum LoadError {
    /// A record is no JSON of the expected shape, or has a key of no known kind.
    #[error(
        "the state's record `{key}` cannot be read ({what}): it was written by another version or is damaged"
    )]
    Record {
        /// The key.
        key: String,
        /// What does not fit.
        what: String,
    },
    /// A run's pipeline is missing.
    #[error("the pipeline {spec} of run `{run}` is missing in the object store")]
    MissingSpec {
        /// The run.
        run: RunId,
        /// The SHA-256 of its spec.
        spec: Digest,
    },
    /// A run's pipeline no longer passes the engine's checks.
    #[error("run `{run}` cannot be taken over: {why}")]
    Run {
        /// The run.
        run: RunId,
        /// Why.
        why: String,
    },
}
