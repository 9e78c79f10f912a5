//! One attempt from its assignment to its report: fetch inputs, run the stage on a thread of its
//! own, store outputs, tell how it went.
//!
//! Whatever happens in between, there is exactly one report, nothing half-written is referred to,
//! and the work directory is removed.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use emberline_common::{
    artifact::{ArtifactError, ArtifactStore, Manifest, check_path},
    dora::Delivery,
    failure::{Failure, Reason},
    ids::{ArtifactName, AttemptId, Digest, PipelineName, StageKind, TaskName},
    resources::Resources,
    run_view::{ArtifactRef, MAX_RESULTS_BYTES, RunView},
    spec::ArtifactType,
    telemetry::{attempt_span, within},
    wire::{self, WireError},
};
use emberline_proto::v1 as pb;
use futures::{StreamExt, TryStreamExt, stream};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
};
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::{
    board::Board,
    cache::{Cache, Pinned},
    checkpoints::ObjectCheckpoints,
    outputs,
    secrets::{Redactor, SecretSource, Secrets},
    sink::LogSink,
    stage::{
        AttemptSink, Input, LogSource, Stage, StageContext, StageError, StageFile, StageOutput,
        StopReason,
    },
    telemetry::{AttemptTelemetry, Direction, Instruments, Moved},
};

/// Input files on their way at a time.
const FILES_AT_A_TIME: usize = 8;

/// The kinds that a worker has.
pub(crate) type Stages = BTreeMap<StageKind, Arc<dyn Stage>>;

/// Runs attempts.
pub(crate) struct Runner {
    pub stages: Stages,
    pub cache: Arc<Cache>,
    pub board: Arc<Board>,
    pub work_dir: PathBuf,
    pub stop_grace: Duration,
    pub runtime: Handle,
    pub tasks: TaskTracker,
    pub instruments: Arc<Instruments>,
    pub secrets: Arc<SecretSource>,
}

/// An assignment whose every field has been checked.
struct Job {
    id: AttemptId,
    pipeline: PipelineName,
    spec: Value,
    inputs: Vec<(ArtifactName, ArtifactRef, TaskName)>,
    files: Vec<(pb::SubmittedStageFile, Digest)>,
    outputs: Vec<(ArtifactName, ArtifactType)>,
    resources: Resources,
    timeout: Option<Duration>,
    base_dir: PathBuf,
    run_view: Option<Arc<RunView>>,
    delivery: Option<Arc<Delivery>>,
    traceparent: String,
    stage: Arc<dyn Stage>,
}

/// Where the time went.
#[derive(Default)]
struct Timing {
    fetch: Duration,
    stage: Duration,
    store: Duration,
}

/// What a stage's thread ends with.
type StageResult = Result<StageOutput, StageError>;

/// A stage that has not stopped though it was asked to.
type Leftover = Option<oneshot::Receiver<StageResult>>;

/// What came of an attempt.
struct Done {
    result: Result<Success, StageError>,
    kept: Vec<ArtifactRef>,
    timing: Timing,
    leftover: Leftover,
}

struct Success {
    outputs: Vec<ArtifactRef>,
    results: String,
    registration: Option<pb::ModelRegistration>,
}

impl Job {
    /// Checks every field of an assignment.
    fn of(stages: &Stages, id: AttemptId, message: pb::Assignment) -> Result<Self, WireError> {
        let kind: StageKind = wire::id("kind", &message.kind)?;
        let stage = stages.get(&kind).cloned().ok_or_else(|| {
            WireError::new(
                "kind",
                format!("this worker does not know the kind `{kind}`"),
            )
        })?;
        let mut inputs = Vec::with_capacity(message.inputs.len());
        for input in message.inputs {
            let artifact = wire::required("inputs.artifact", input.artifact)?;
            inputs.push((
                wire::id("inputs.name", &input.name)?,
                ArtifactRef::try_from(artifact).map_err(|e| e.within("inputs.artifact"))?,
                wire::id("inputs.producer", &input.producer)?,
            ));
        }
        let mut files = Vec::with_capacity(message.files.len());
        for file in message.files {
            check_path(&file.path).map_err(|why| WireError::new("files.path", why))?;
            let digest = wire::id("files.sha256", &file.sha256)?;
            files.push((file, digest));
        }
        let mut outputs = Vec::with_capacity(message.outputs.len());
        for (name, artifact_type) in message.outputs {
            let name: ArtifactName = wire::id("outputs.name", &name)?;
            let artifact_type = serde_json::from_value(Value::String(artifact_type))
                .map_err(|e| WireError::new("outputs.type", e.to_string()))?;
            outputs.push((name, artifact_type));
        }
        outputs.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let run_view = from_json("run_json", &message.run_json)?;
        let delivery = from_json("delivery_json", &message.delivery_json)?;
        Ok(Self {
            id,
            pipeline: wire::id("pipeline", &message.pipeline)?,
            spec: wire::json("spec_json", &message.spec_json)?,
            inputs,
            files,
            outputs,
            resources: message.resources.unwrap_or_default().into(),
            timeout: (message.timeout_ms > 0).then(|| Duration::from_millis(message.timeout_ms)),
            base_dir: message.base_dir.into(),
            run_view,
            delivery,
            traceparent: message.traceparent,
            stage,
        })
    }
}

/// Whether an assignment could be taken on, for [`crate::fuzzing`].
pub(crate) fn can_be_read(stages: &Stages, mut message: pb::Assignment) -> bool {
    let id = message.id.take().map(AttemptId::try_from);
    match id {
        Some(Ok(id)) => Job::of(stages, id, message).is_ok(),
        _ => false,
    }
}

impl Runner {
    /// Takes an attempt on. Every assignment that names an attempt comes to a report.
    pub fn assign(self: &Arc<Self>, store: &ArtifactStore, mut message: pb::Assignment) {
        let id = match message.id.take().map(AttemptId::try_from) {
            Some(Ok(id)) => id,
            Some(Err(error)) => {
                tracing::error!(%error, "an assignment that names no attempt was dropped");
                return;
            }
            None => {
                tracing::error!("an assignment without an attempt was dropped");
                return;
            }
        };
        self.board.stop_older(&id.run, &id.task, id.attempt);
        let kind = StageKind::new(&message.kind).ok();
        let stage = kind.and_then(|kind| self.stages.get(&kind));
        if stage.is_some_and(|stage| stage.does_nothing()) {
            // A join of thousands of tasks costs no thread, no directory and no object.
            let report = pb::AttemptReport {
                id: Some((&id).into()),
                ..pb::AttemptReport::default()
            };
            self.board.done_at_once(id, report);
            return;
        }
        let Some(stop) = self.board.begin(&id) else {
            return;
        };
        match Job::of(&self.stages, id.clone(), message) {
            Ok(job) => {
                let (this, store) = (self.clone(), store.clone());
                let telemetry = AttemptTelemetry::new(
                    self.instruments.clone(),
                    &id,
                    job.pipeline.clone(),
                    &job.traceparent,
                    stop.clone(),
                );
                let context = telemetry.context();
                let span = attempt_span(context.as_ref(), &id);
                let run = this.run(store, job, stop, telemetry);
                self.tasks.spawn(within(context, run).instrument(span));
            }
            Err(error) => {
                let failure = Failure::new(
                    Reason::System,
                    format!("the assignment cannot be read: {error}"),
                );
                self.board.report(
                    &id,
                    pb::AttemptReport {
                        id: Some((&id).into()),
                        failure: Some((&failure).into()),
                        ..pb::AttemptReport::default()
                    },
                );
                self.board.end(&id);
            }
        }
    }

    async fn run(
        self: Arc<Self>,
        store: ArtifactStore,
        job: Job,
        stop: watch::Receiver<Option<StopReason>>,
        telemetry: AttemptTelemetry,
    ) {
        let id = job.id.clone();
        let timeout = job.timeout;
        let work_dir = self
            .work_dir
            .join(format!("{}.{}.{}", id.run, id.task, id.attempt));
        let secrets = self.look_up(&job).await;
        let redactor = secrets.as_ref().map(Secrets::redactor).unwrap_or_default();
        let telemetry = telemetry.redacting(redactor.clone());
        let sink = Arc::new(LogSink::new(
            id.clone(),
            store.clone(),
            self.runtime.clone(),
            self.board.clone(),
            redactor.clone(),
        ));
        let attempt = self.attempt(&store, job, secrets, stop, &work_dir, &sink, telemetry);
        let mut attempt = std::pin::pin!(attempt);
        let mut done = match timeout {
            None => attempt.await,
            Some(timeout) => tokio::select! {
                done = &mut attempt => done,
                () = tokio::time::sleep(timeout) => {
                    self.board.stop(&id, StopReason::Timeout);
                    attempt.await
                }
            },
        };
        if let Err(error) = &mut done.result {
            // Before it is cut.
            redactor.string(&mut error.message);
        }
        if done.result.is_err() && done.leftover.is_none() {
            // What failed may have filled the disk: its log, and the record that it failed, need room.
            remove_work_dir(&work_dir).await;
        }
        match &done.result {
            Ok(_) => tracing::info!("the attempt succeeded"),
            Err(error) => {
                // The whole text: the state keeps only the beginning. It may repeat what a command
                // has printed, which is the attempt's own affair.
                sink.keep(
                    LogSource::Stage,
                    &format!("{}: {}", error.reason, error.message),
                );
                tracing::info!(reason = %error.reason, "the attempt failed");
            }
        }
        sink.finish().await;
        self.board.report(
            &id,
            report(&id, done.result, done.kept, &done.timing, timeout),
        );
        if let Some(thread) = done.leftover {
            // Its files are its own until it ends, and so is its slot.
            let _ = thread.await;
        }
        remove_work_dir(&work_dir).await;
        self.board.end(&id);
    }

    /// The secrets that a stage asks for. They are looked up on a thread that may block.
    async fn look_up(&self, job: &Job) -> Result<Secrets, StageError> {
        let names = job.stage.secrets(&job.spec)?;
        if names.is_empty() {
            return Ok(Secrets::default());
        }
        let source = self.secrets.clone();
        tokio::task::spawn_blocking(move || source.look_up(&names))
            .await
            .unwrap_or_else(|e| Err(StageError::system(format!("cannot look up secrets: {e}"))))
    }

    #[allow(clippy::too_many_arguments, reason = "what an attempt is made of")]
    async fn attempt(
        &self,
        store: &ArtifactStore,
        job: Job,
        secrets: Result<Secrets, StageError>,
        stop: watch::Receiver<Option<StopReason>>,
        work_dir: &Path,
        sink: &Arc<LogSink>,
        telemetry: AttemptTelemetry,
    ) -> Done {
        let mut done = Done {
            result: Err(StageError::system("the attempt did not begin")),
            kept: Vec::new(),
            timing: Timing::default(),
            leftover: None,
        };
        let secrets = match secrets {
            Ok(secrets) => secrets,
            Err(error) => {
                done.result = Err(error);
                return done;
            }
        };
        let redactor = secrets.redactor();
        let began = Instant::now();
        let fetched = until_stopped(&stop, self.fetch(store, &job, work_dir, &telemetry)).await;
        done.timing.fetch = began.elapsed();
        let (inputs, files, _pins) = match fetched {
            Ok(fetched) => fetched,
            Err(error) => {
                done.result = Err(error);
                return done;
            }
        };
        let ctx = StageContext {
            attempt: job.id.clone(),
            pipeline: job.pipeline,
            spec: job.spec,
            inputs,
            files,
            outputs: job.outputs,
            secrets,
            base_dir: job.base_dir,
            work_dir: work_dir.to_path_buf(),
            resources: job.resources,
            run_view: job.run_view,
            delivery: job.delivery,
            traceparent: job.traceparent,
            telemetry: telemetry.clone(),
            sink: sink.clone(),
            checkpoints: Arc::new(ObjectCheckpoints {
                store: store.clone(),
                id: job.id,
                runtime: self.runtime.clone(),
                context: telemetry.context(),
            }),
            stop: stop.clone(),
            runtime: self.runtime.clone(),
        };
        let began = Instant::now();
        let (result, leftover) = self.stage(job.stage, ctx, &stop).await;
        done.timing.stage = began.elapsed();
        done.leftover = leftover;

        let began = Instant::now();
        done.result = match result {
            Ok(output) => {
                let stored = self.success(store, &telemetry, &redactor, output);
                until_stopped(&stop, stored).await
            }
            Err(mut error) => {
                let outputs = std::mem::take(&mut error.outputs);
                let stored = outputs::store_all(store, &self.cache, &telemetry, &redactor, outputs);
                match stored.await {
                    Ok(kept) => done.kept = kept,
                    Err(e) => sink.log(LogSource::Stage, &e.message),
                }
                Err(error)
            }
        };
        done.timing.store = began.elapsed();
        done
    }

    async fn success(
        &self,
        store: &ArtifactStore,
        telemetry: &AttemptTelemetry,
        redactor: &Redactor,
        output: StageOutput,
    ) -> Result<Success, StageError> {
        let results = wire::object_text(&redactor.object(output.results));
        if results.len() > MAX_RESULTS_BYTES {
            return Err(StageError::user(format!(
                "the stage's results have {} bytes as JSON, more than {MAX_RESULTS_BYTES}: keep \
                 numbers and short texts there, and put the rest into an output",
                results.len()
            )));
        }
        Ok(Success {
            outputs: outputs::store_all(store, &self.cache, telemetry, redactor, output.artifacts)
                .await?,
            results,
            registration: output
                .registration
                .map(|registration| (&registration.0).into()),
        })
    }

    /// Runs the stage on a thread of its own. When it was asked to stop and does not, the attempt
    /// goes on without it.
    async fn stage(
        &self,
        stage: Arc<dyn Stage>,
        ctx: StageContext,
        stop: &watch::Receiver<Option<StopReason>>,
    ) -> (StageResult, Leftover) {
        let (send, mut receive) = oneshot::channel();
        let name = format!("stage {}", ctx.attempt.task);
        let span = tracing::Span::current();
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            let _within = span.entered();
            let result = catch_unwind(AssertUnwindSafe(|| stage.run(&ctx)));
            // Nobody waits any more when the worker is ending.
            let _ = send.send(result.unwrap_or_else(|panic| Err(panicked(&*panic))));
        });
        if let Err(e) = spawned {
            let error = StageError::system(format!("cannot start a thread for the stage: {e}"));
            return (Err(error), None);
        }
        let grace = self.stop_grace;
        let too_long = async {
            let why = stopped(stop.clone()).await;
            tokio::time::sleep(grace).await;
            why
        };
        tokio::select! {
            result = &mut receive => (
                result.unwrap_or_else(|_| Err(StageError::system("the stage's thread died"))),
                None,
            ),
            why = too_long => {
                let mut error = stop_error(why);
                error.message += &format!("; the stage did not stop within {} s", grace.as_secs());
                (Err(error), Some(receive))
            }
        }
    }

    async fn fetch(
        &self,
        store: &ArtifactStore,
        job: &Job,
        work_dir: &Path,
        telemetry: &AttemptTelemetry,
    ) -> Result<(Vec<Input>, Vec<StageFile>, Vec<Pinned>), StageError> {
        make_dir(work_dir).await?;
        let mut pins = Vec::new();
        let mut inputs = Vec::with_capacity(job.inputs.len());
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for (name, artifact, producer) in &job.inputs {
            let count = seen.entry(name.as_str()).or_default();
            let dir = match *count {
                0 => work_dir.join("inputs").join(name.as_str()),
                n => work_dir.join("inputs").join(format!("{name}.{n}")),
            };
            *count += 1;
            let failed = |e: ArtifactError| {
                let mut out = StageError::storage(format!(
                    "cannot fetch the input `{name}` (output `{}` of `{producer}`): {e}",
                    artifact.name
                ));
                out.bad_manifest = e.bad_digest().map(|_| artifact.manifest);
                out.source = Some(Box::new(e));
                out
            };
            let fetching = async {
                let fetched = self.fetch_artifact(store, &artifact.manifest);
                let (manifest, fetched) = fetched.await.map_err(failed)?;
                let moved = Moved {
                    digest: artifact.manifest,
                    bytes: artifact.bytes,
                    hit: fetched.iter().all(|(_, pinned)| pinned.is_hit()),
                };
                Ok(((manifest, fetched), moved))
            };
            let known = Some((artifact.manifest, artifact.bytes));
            let (manifest, fetched) = telemetry
                .transfer(Direction::Get, name, store, known, fetching)
                .await?;
            make_dir(&dir).await?;
            let links: Vec<(PathBuf, PathBuf)> = fetched
                .iter()
                .map(|(path, pinned)| (pinned.path().to_path_buf(), dir.join(path)))
                .collect();
            link_all(links).await?;
            let mut files = Vec::with_capacity(fetched.len());
            for (path, pinned) in fetched {
                files.push(path);
                pins.push(pinned);
            }
            inputs.push(Input {
                name: name.clone(),
                producer: producer.clone(),
                artifact: artifact.clone(),
                artifact_type: manifest.artifact_type,
                metadata: manifest.metadata,
                dir,
                files,
            });
        }
        let mut files = Vec::with_capacity(job.files.len());
        for (file, digest) in &job.files {
            let pinned = self
                .cache
                .get(store, digest, file.bytes)
                .await
                .map_err(|e| {
                    StageError::storage(format!("cannot fetch the file `{}`: {e}", file.path))
                })?;
            files.push(StageFile {
                path: file.path.clone(),
                local: pinned.path().to_path_buf(),
                executable: file.executable,
            });
            pins.push(pinned);
        }
        Ok((inputs, files, pins))
    }

    /// The manifest of an artifact, and its files in the cache.
    async fn fetch_artifact(
        &self,
        store: &ArtifactStore,
        digest: &Digest,
    ) -> Result<(Manifest, Vec<(PathBuf, Pinned)>), ArtifactError> {
        let manifest = self.cache.manifest(store, digest).await?;
        let files = stream::iter(manifest.files.clone())
            .map(|file| async move {
                let pinned = self.cache.get(store, &file.sha256, file.bytes).await?;
                Ok::<_, ArtifactError>((PathBuf::from(file.path), pinned))
            })
            .buffered(FILES_AT_A_TIME)
            .try_collect()
            .await?;
        Ok((manifest, files))
    }
}

async fn make_dir(dir: &Path) -> Result<(), StageError> {
    tokio::fs::create_dir_all(dir)
        .await
        .map_err(|e| StageError::io("make the directory", dir, e))
}

/// Puts cached files where the stage looks for them: as links where that can be, else as copies.
async fn link_all(links: Vec<(PathBuf, PathBuf)>) -> Result<(), StageError> {
    let linked = tokio::task::spawn_blocking(move || {
        for (from, to) in links {
            if let Some(dir) = to.parent() {
                fs::create_dir_all(dir)
                    .map_err(|e| StageError::io("make the directory", dir, e))?;
            }
            if fs::hard_link(&from, &to).is_err() {
                fs::copy(&from, &to).map_err(|e| StageError::io("write", &to, e))?;
            }
        }
        Ok(())
    });
    linked
        .await
        .unwrap_or_else(|e| Err(StageError::system(format!("cannot place inputs: {e}"))))
}

/// Waits until it is asked to stop.
async fn stopped(mut stop: watch::Receiver<Option<StopReason>>) -> StopReason {
    match stop.wait_for(Option::is_some).await {
        Ok(why) => (*why).unwrap_or(StopReason::Cancelled),
        // The attempt is no longer on the board.
        Err(_) => StopReason::Cancelled,
    }
}

async fn until_stopped<T>(
    stop: &watch::Receiver<Option<StopReason>>,
    work: impl Future<Output = Result<T, StageError>>,
) -> Result<T, StageError> {
    tokio::select! {
        result = work => result,
        why = stopped(stop.clone()) => Err(stop_error(why)),
    }
}

/// What the leader tells as JSON, if it tells anything.
fn from_json<T: DeserializeOwned>(field: &str, text: &str) -> Result<Option<Arc<T>>, WireError> {
    if text.is_empty() {
        return Ok(None);
    }
    let told = serde_json::from_str(text).map_err(|e| WireError::new(field, e.to_string()))?;
    Ok(Some(Arc::new(told)))
}

fn stop_error(why: StopReason) -> StageError {
    match why {
        StopReason::Cancelled => StageError::cancelled(),
        StopReason::Timeout => StageError::new(Reason::Timeout, "went over its time limit"),
        StopReason::Preempted => StageError::new(Reason::Preempted, "given back by its worker"),
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> StageError {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "it did not say why".to_owned());
    StageError::system(format!("the stage panicked: {text}"))
}

/// Removes what an attempt left, if anything.
async fn remove_work_dir(work_dir: &Path) {
    let work_dir = work_dir.to_path_buf();
    let removed = tokio::task::spawn_blocking(move || match fs::remove_dir_all(&work_dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(dir = %work_dir.display(), error = %e, "a work directory is left");
        }
        _ => {}
    });
    // A panic in it would be shown; nothing more can be done about it here.
    let _ = removed.await;
}

fn report(
    id: &AttemptId,
    result: Result<Success, StageError>,
    kept: Vec<ArtifactRef>,
    timing: &Timing,
    timeout: Option<Duration>,
) -> pb::AttemptReport {
    let micros = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    let mut report = pb::AttemptReport {
        id: Some(id.into()),
        fetch_micros: micros(timing.fetch),
        stage_micros: micros(timing.stage),
        store_micros: micros(timing.store),
        ..pb::AttemptReport::default()
    };
    match result {
        Ok(success) => {
            report.outputs = success.outputs.iter().map(Into::into).collect();
            report.results_json = success.results;
            report.registration = success.registration;
        }
        Err(error) => {
            let message = match (error.reason, timeout) {
                (Reason::Timeout, Some(limit)) => {
                    format!("{} of {:.1} s", error.message, limit.as_secs_f64())
                }
                _ => error.message,
            };
            report.failure = Some((&Failure::new(error.reason, message)).into());
            report.outputs = kept.iter().map(Into::into).collect();
            report.bad_manifest = error
                .bad_manifest
                .map(|digest| digest.to_string())
                .unwrap_or_default();
        }
    }
    report
}
