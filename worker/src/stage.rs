//! What a stage is: the trait that every kind implements, and what it is handed.
//!
//! A stage runs on a thread of its own, never on the async ones: it may block and compute as long
//! as it likes, as long as it asks [`StageContext::check_cancelled`] often enough to stop within a
//! second or so. It sees local directories only: its inputs have been fetched and checked before it
//! starts, its outputs are stored after it has returned.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use emberline_common::attempt_log::LogSource;
use emberline_common::{
    dora::Delivery,
    failure::Reason,
    ids::{ArtifactName, AttemptId, Digest, PipelineName, SecretName, StageKind, TaskName},
    resources::Resources,
    run_view::{ArtifactRef, ModelRegistration, Results, RunView},
    spec::ArtifactType,
    telemetry::within,
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{
    secrets::{Secret, Secrets},
    telemetry::{AttemptTelemetry, StageSpan},
};

/// A kind of stage.
pub trait Stage: Send + Sync + 'static {
    /// The kind as written in a pipeline: `vendor/kind` for your own.
    fn kind(&self) -> StageKind;

    /// Part of the cache key: raise it when the same spec and inputs no longer give the same outputs.
    fn version(&self) -> u32;

    /// Whether it does nothing at all, like `noop`: then [`run`](Self::run) is never called, and an
    /// attempt succeeds at once, without a thread, a directory, inputs or outputs.
    fn does_nothing(&self) -> bool {
        false
    }

    /// The names of the secrets that a spec asks for. They are looked up before anything else is
    /// done for an attempt, which [`StageContext::secret`] gives them to and whose texts they are
    /// taken out of.
    ///
    /// # Errors
    /// A [`StageError`] if the spec is wrong.
    fn secrets(&self, _spec: &Value) -> Result<Vec<SecretName>, StageError> {
        Ok(Vec::new())
    }

    /// Runs one attempt.
    ///
    /// # Errors
    /// A [`StageError`] with the reason that decides whether it is tried again.
    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError>;
}

/// What a stage produced.
#[derive(Debug, Default)]
pub struct StageOutput {
    /// Its outputs.
    pub artifacts: Vec<Produced>,
    /// Numbers, texts and flags by name, for conditions, gates and people; at most 4 KiB as JSON.
    pub results: Results,
    /// A model version to register with the commit of the task.
    pub registration: Option<Registration>,
}

/// One output.
#[derive(Debug)]
pub struct Produced {
    /// Its name.
    pub name: ArtifactName,
    /// What it is made of.
    pub content: ProducedContent,
}

/// What an output is made of.
#[derive(Debug)]
pub enum ProducedContent {
    /// The files below a directory that [`StageContext::output_dir`] gave.
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What the artifact is.
        artifact_type: ArtifactType,
        /// What there is to know about it (rows, columns, schema).
        metadata: Map<String, Value>,
    },
    /// An input, handed on as it is.
    Input(ArtifactRef),
}

/// A model version to register; the artifact is named by one of the inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Registration(pub ModelRegistration);

/// Why a stage did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StageError {
    /// The reason; it decides whether the task is tried again.
    pub reason: Reason,
    /// What failed, where, and what to do, in one line.
    pub message: String,
    /// The error below, if there is one.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
    /// For reason `storage`: the input that is missing or corrupted.
    pub bad_manifest: Option<Digest>,
    /// Outputs that were written all the same and shall be kept, e.g. what `validate` found.
    pub outputs: Vec<Produced>,
}

impl StageError {
    /// With a reason and one line.
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            source: None,
            bad_manifest: None,
            outputs: Vec::new(),
        }
    }

    /// The stage's own error: a wrong spec, a command that failed.
    #[must_use]
    pub fn user(message: impl Into<String>) -> Self {
        Self::new(Reason::UserError, message)
    }

    /// The data is not what the stage was promised.
    #[must_use]
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(Reason::Data, message)
    }

    /// The disk or the object store refused.
    #[must_use]
    pub fn storage(message: impl Into<String>) -> Self {
        Self::new(Reason::Storage, message)
    }

    /// Emberline's own fault.
    #[must_use]
    pub fn system(message: impl Into<String>) -> Self {
        Self::new(Reason::System, message)
    }

    /// It was asked to stop.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(Reason::Cancelled, "stopped on request")
    }

    /// An I/O error on a local file.
    #[must_use]
    pub fn io(doing: impl fmt::Display, path: &Path, error: std::io::Error) -> Self {
        let mut out = Self::storage(format!("cannot {doing} `{}`: {error}", path.display()));
        out.source = Some(Box::new(error));
        out
    }

    /// Keeps what was written all the same.
    #[must_use]
    pub fn with_outputs(mut self, outputs: Vec<Produced>) -> Self {
        self.outputs = outputs;
        self
    }
}

/// One input, fetched and checked.
#[derive(Debug, Clone)]
pub struct Input {
    /// The name that the stage knows it by.
    pub name: ArtifactName,
    /// The task that produced it.
    pub producer: TaskName,
    /// What it is: the producer's output and its manifest.
    pub artifact: ArtifactRef,
    /// What it is.
    pub artifact_type: ArtifactType,
    /// What its producer noted about it.
    pub metadata: Map<String, Value>,
    /// The directory with its files, not to be written to.
    pub dir: PathBuf,
    /// The files, relative to `dir`, in the order of their names.
    pub files: Vec<PathBuf>,
}

/// A file that travelled with the submission, as it lies in the cache.
#[derive(Debug, Clone)]
pub struct StageFile {
    /// Path relative to the working directory.
    pub path: String,
    /// Where its bytes are; not to be written to.
    pub local: PathBuf,
    /// Whether it is executable.
    pub executable: bool,
}

/// Where an attempt's log, metrics and progress go. Never blocks for long and never fails: what
/// cannot be kept is counted.
pub trait AttemptSink: Send + Sync {
    /// A line of the log. `source` is `stdout`, `stderr` or `stage`.
    fn log(&self, source: LogSource, line: &str);
    /// A point of a series. `step` counts from 1.
    fn metric(&self, name: &str, step: u64, value: f64);
    /// How far it is, from 0 to 1 (negative: unknown), and one line for people.
    fn progress(&self, fraction: f64, message: &str);
}

/// Where a task's checkpoint is kept. It belongs to the task, not to the attempt: a later attempt
/// finds what an earlier one saved.
pub trait CheckpointStore: Send + Sync {
    /// Replaces the checkpoint; durable when it returns.
    ///
    /// # Errors
    /// Reason `storage`.
    fn save(&self, bytes: &[u8]) -> Result<(), StageError>;

    /// The last one that was saved, checked against its digest; `None` if there is none or it is damaged.
    ///
    /// # Errors
    /// Reason `storage`.
    fn load(&self) -> Result<Option<Vec<u8>>, StageError>;
}

/// Why an attempt shall stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The leader said so: the run was cancelled, or the attempt is no longer current.
    Cancelled,
    /// It went over its time limit.
    Timeout,
    /// The worker is to end: save a checkpoint and give the task back.
    Preempted,
}

impl StopReason {
    /// The reason that the attempt ends with.
    #[must_use]
    pub const fn reason(self) -> Reason {
        match self {
            Self::Cancelled => Reason::Cancelled,
            Self::Timeout => Reason::Timeout,
            Self::Preempted => Reason::Preempted,
        }
    }
}

/// Everything that one attempt is handed.
#[derive(Clone)]
pub struct StageContext {
    /// Which attempt this is.
    pub attempt: AttemptId,
    /// The pipeline's name.
    pub pipeline: PipelineName,
    /// The stage's `with`, everything filled in.
    pub spec: Value,
    /// The inputs.
    pub inputs: Vec<Input>,
    /// Files that travelled with the submission and that this stage names.
    pub files: Vec<StageFile>,
    /// The outputs that the stage declares in the pipeline; for `exec` and kinds of your own.
    pub outputs: Vec<(ArtifactName, ArtifactType)>,
    /// The secrets that the stage has [asked for](Stage::secrets).
    pub secrets: Secrets,
    /// Directory that relative `file:` sources are resolved against.
    pub base_dir: PathBuf,
    /// A directory of the attempt's own, removed afterwards.
    pub work_dir: PathBuf,
    /// What is reserved for it.
    pub resources: Resources,
    /// What earlier tasks of the run did; for `report` and `deploy`.
    pub run_view: Option<Arc<RunView>>,
    /// What there is to tell of delivery; for `report`.
    pub delivery: Option<Arc<Delivery>>,
    /// W3C `traceparent` of the attempt; may be empty.
    pub traceparent: String,
    /// Spans below the attempt's, and figures.
    pub telemetry: AttemptTelemetry,
    /// Log, metrics, progress.
    pub sink: Arc<dyn AttemptSink>,
    /// The task's checkpoint.
    pub checkpoints: Arc<dyn CheckpointStore>,
    /// Set when it shall stop.
    pub stop: tokio::sync::watch::Receiver<Option<StopReason>>,
    /// For the few things that are async (HTTP, S3): see [`Self::block_on`].
    pub runtime: tokio::runtime::Handle,
}

impl StageContext {
    /// The spec as the kind's own type.
    ///
    /// # Errors
    /// Reason `user_error`, naming the field.
    pub fn spec<T: DeserializeOwned>(&self) -> Result<T, StageError> {
        let value = if self.spec.is_null() {
            Value::Object(Map::new())
        } else {
            self.spec.clone()
        };
        spec(value)
    }

    /// The secret of that name.
    ///
    /// # Errors
    /// Reason `system` if the stage has not [asked for](Stage::secrets) it.
    pub fn secret(&self, name: &SecretName) -> Result<&Secret, StageError> {
        let secret = self.secrets.get(name);
        secret.ok_or_else(|| {
            StageError::system(format!("the stage has not asked for the secret `{name}`"))
        })
    }

    /// The one input of that name.
    ///
    /// # Errors
    /// Reason `user_error` if there is none, or more than one.
    pub fn input(&self, name: &str) -> Result<&Input, StageError> {
        self.optional_input(name)?.ok_or_else(|| {
            StageError::user(format!(
                "the stage has no input `{name}`: add it under `inputs`"
            ))
        })
    }

    /// The one input of that name, if it is given.
    ///
    /// # Errors
    /// Reason `user_error` if there is more than one.
    pub fn optional_input<'a>(&'a self, name: &str) -> Result<Option<&'a Input>, StageError> {
        let mut found = self
            .inputs
            .iter()
            .filter(|input| input.name.as_str() == name);
        let first = found.next();
        if found.next().is_some() {
            return Err(StageError::user(format!(
                "the input `{name}` comes from a matrix: this stage takes one, not several"
            )));
        }
        Ok(first)
    }

    /// All inputs of that name: several if they come from a matrix.
    pub fn inputs_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Input> {
        self.inputs
            .iter()
            .filter(move |input| input.name.as_str() == name)
    }

    /// Where the directory for an output is.
    #[must_use]
    pub fn output_path(&self, name: &ArtifactName) -> PathBuf {
        self.work_dir.join("outputs").join(name.as_str())
    }

    /// Makes the directory for an output.
    ///
    /// # Errors
    /// Reason `storage`.
    pub fn output_dir(&self, name: &ArtifactName) -> Result<PathBuf, StageError> {
        let dir = self.output_path(name);
        std::fs::create_dir_all(&dir).map_err(|e| StageError::io("make the directory", &dir, e))?;
        Ok(dir)
    }

    /// Why it shall stop, if it shall.
    #[must_use]
    pub fn stop_reason(&self) -> Option<StopReason> {
        *self.stop.borrow()
    }

    /// Fails if it shall stop.
    ///
    /// # Errors
    /// With the reason for which it shall stop.
    pub fn check_cancelled(&self) -> Result<(), StageError> {
        match self.stop_reason() {
            None => Ok(()),
            Some(StopReason::Cancelled) => Err(StageError::cancelled()),
            Some(StopReason::Timeout) => {
                Err(StageError::new(Reason::Timeout, "went over its time limit"))
            }
            Some(StopReason::Preempted) => Err(StageError::new(
                Reason::Preempted,
                "given back by its worker",
            )),
        }
    }

    /// Begins a span for a part of the attempt: what it is, not which one, for that is an attribute.
    ///
    /// ```
    /// # use emberline_worker::testing::TestContext;
    /// # let ctx = TestContext::builder().build().ctx;
    /// for fold in 1..=5 {
    ///     let mut span = ctx.span("fold");
    ///     span.set("acme.fold", fold);
    ///     // …
    ///     span.event("scores", [("acme.loss", 0.5)]);
    ///     span.end();
    /// }
    /// ```
    pub fn span(&self, name: impl Into<String>) -> StageSpan {
        self.telemetry.span(name)
    }

    /// How many samples a training learns from in a second.
    pub fn samples_per_second(&self, rate: f64) {
        self.telemetry.samples_per_second(rate);
    }

    /// Waits for something async, from the stage's own thread. The calls that it makes to an object
    /// store are part of the attempt's span.
    pub fn block_on<F: Future>(&self, work: F) -> F::Output {
        self.runtime
            .block_on(within(self.telemetry.context(), work))
    }

    /// A line of the log.
    pub fn log(&self, line: impl AsRef<str>) {
        self.sink.log(LogSource::Stage, line.as_ref());
    }

    /// A point of a series.
    pub fn metric(&self, name: &str, step: u64, value: f64) {
        self.sink.metric(name, step, value);
    }

    /// How far it is, from 0 to 1 (negative: unknown), and one line for people.
    pub fn progress(&self, fraction: f64, message: &str) {
        self.sink.progress(fraction, message);
    }
}

/// A spec as a kind's own type.
///
/// # Errors
/// Reason `user_error`, naming the field.
pub(crate) fn spec<T: DeserializeOwned>(value: Value) -> Result<T, StageError> {
    serde_json::from_value(value)
        .map_err(|e| StageError::user(format!("the stage's `with` is wrong: {e}")))
}
