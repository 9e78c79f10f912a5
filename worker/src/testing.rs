//! For tests of stages: a [`StageContext`] over plain directories, with nothing faked but the
//! cluster around it. Start with [`TestContext::builder`].
//!
//! ```
//! # use emberline_worker::testing::TestContext;
//! let dir = tempfile::tempdir()?;
//! std::fs::write(dir.path().join("a.csv"), "x,y\n1,2\n")?;
//! let test = TestContext::builder()
//!     .spec(serde_json::json!({ "threshold": 3 }))
//!     .input("data", emberline_common::spec::ArtifactType::Files, dir.path())
//!     .build();
//! let input = test.ctx.input("data")?;
//! assert_eq!(input.files.len(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "for tests only: a wrong set-up is to fail at once"
)]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use emberline_common::{
    dora::Delivery,
    ids::{ArtifactName, AttemptId, Digest, PipelineName, RunId, SecretName, TaskName},
    resources::Resources,
    run_view::{ArtifactRef, RunView},
    spec::ArtifactType,
    telemetry::{Span, Telemetry},
};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::sync::{mpsc, watch};

use crate::{
    secrets::{Secret, Secrets},
    stage::{
        AttemptSink, CheckpointStore, Input, LogSource, Produced, ProducedContent, StageContext,
        StageError, StageFile, StopReason,
    },
    telemetry::{AttemptTelemetry, Instruments},
};

/// Spans that are kept for the test.
const MOST_SPANS: usize = 10_000;

/// What a stage wrote to its log, its series and its progress.
#[derive(Debug, Default)]
pub struct RecordingSink {
    lines: Mutex<Vec<(LogSource, String)>>,
    metrics: Mutex<Vec<(String, u64, f64)>>,
    progress: Mutex<Vec<(f64, String)>>,
}

impl RecordingSink {
    /// The lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<(LogSource, String)> {
        self.lines.lock().expect("not poisoned").clone()
    }

    /// The lines so far, as one text.
    #[must_use]
    pub fn text(&self) -> String {
        let lines = self.lines();
        lines
            .iter()
            .map(|(_, line)| line.as_str())
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// The points so far: series, step, value.
    #[must_use]
    pub fn metrics(&self) -> Vec<(String, u64, f64)> {
        self.metrics.lock().expect("not poisoned").clone()
    }

    /// The values of one series in the order in which they came.
    #[must_use]
    pub fn series(&self, name: &str) -> Vec<f64> {
        let metrics = self.metrics();
        metrics
            .iter()
            .filter(|m| m.0 == name)
            .map(|m| m.2)
            .collect()
    }

    /// The progress so far.
    #[must_use]
    pub fn progress(&self) -> Vec<(f64, String)> {
        self.progress.lock().expect("not poisoned").clone()
    }
}

impl AttemptSink for RecordingSink {
    fn log(&self, source: LogSource, line: &str) {
        self.lines
            .lock()
            .expect("not poisoned")
            .push((source, line.to_owned()));
    }
    fn metric(&self, name: &str, step: u64, value: f64) {
        self.metrics
            .lock()
            .expect("not poisoned")
            .push((name.to_owned(), step, value));
    }
    fn progress(&self, fraction: f64, message: &str) {
        self.progress
            .lock()
            .expect("not poisoned")
            .push((fraction, message.to_owned()));
    }
}

/// A checkpoint kept in memory. Hand the same one to two contexts to test a resume.
#[derive(Debug, Default)]
pub struct MemoryCheckpoints {
    saved: Mutex<Vec<Vec<u8>>>,
}

impl MemoryCheckpoints {
    /// How often one was saved.
    #[must_use]
    pub fn saves(&self) -> usize {
        self.saved.lock().expect("not poisoned").len()
    }

    /// Puts `bytes` where the last checkpoint is, as a damaged or foreign one.
    pub fn replace(&self, bytes: &[u8]) {
        *self.saved.lock().expect("not poisoned") = vec![bytes.to_vec()];
    }
}

impl CheckpointStore for MemoryCheckpoints {
    fn save(&self, bytes: &[u8]) -> Result<(), StageError> {
        self.saved
            .lock()
            .expect("not poisoned")
            .push(bytes.to_vec());
        Ok(())
    }
    fn load(&self) -> Result<Option<Vec<u8>>, StageError> {
        Ok(self.saved.lock().expect("not poisoned").last().cloned())
    }
}

/// A context and the handles to look into it and to stop it.
pub struct TestContext {
    /// What the stage is handed.
    pub ctx: StageContext,
    /// What the stage wrote.
    pub sink: Arc<RecordingSink>,
    /// The task's checkpoint.
    pub checkpoints: Arc<MemoryCheckpoints>,
    stop: Arc<watch::Sender<Option<StopReason>>>,
    spans: Mutex<mpsc::Receiver<Span>>,
    _work: tempfile::TempDir,
    _runtime: Option<tokio::runtime::Runtime>,
}

impl TestContext {
    /// With no inputs, an empty spec, one CPU core and a work directory of its own.
    #[must_use]
    pub fn builder() -> TestContextBuilder {
        TestContextBuilder::default()
    }

    /// The spans that have ended since this was asked last, if the context is
    /// [traced](TestContextBuilder::traced).
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        let mut spans = self.spans.lock().expect("not poisoned");
        std::iter::from_fn(|| spans.try_recv().ok()).collect()
    }

    /// Asks the stage to stop.
    pub fn stop(&self, reason: StopReason) {
        self.stop.send_replace(Some(reason));
    }

    /// To ask it to stop from another thread.
    pub fn stop_handle(&self) -> impl Fn(StopReason) + Send + Sync + 'static {
        let stop = self.stop.clone();
        move |reason| {
            stop.send_replace(Some(reason));
        }
    }

    /// The directory of one of a stage's outputs. Panics if there is no such output.
    #[must_use]
    pub fn output<'a>(&self, outputs: &'a [Produced], name: &str) -> &'a Path {
        let produced = outputs.iter().find(|p| p.name.as_str() == name);
        match &produced.expect("the stage has that output").content {
            ProducedContent::Directory { dir, .. } => dir,
            ProducedContent::Input(_) => Path::new(""),
        }
    }
}

/// Puts a [`TestContext`] together.
#[derive(Default)]
pub struct TestContextBuilder {
    spec: Value,
    inputs: Vec<Input>,
    files: Vec<StageFile>,
    outputs: Vec<(ArtifactName, ArtifactType)>,
    secrets: BTreeMap<SecretName, Secret>,
    base_dir: Option<PathBuf>,
    resources: Option<Resources>,
    run_view: Option<Arc<RunView>>,
    delivery: Option<Arc<Delivery>>,
    checkpoints: Option<Arc<MemoryCheckpoints>>,
    task: Option<TaskName>,
    traceparent: String,
}

impl TestContextBuilder {
    /// The stage's `with`.
    #[must_use]
    pub fn spec(mut self, spec: impl Serialize) -> Self {
        self.spec = serde_json::to_value(spec).expect("the spec can be written as JSON");
        self
    }

    /// An input with the files below a directory.
    #[must_use]
    pub fn input(self, name: &str, artifact_type: ArtifactType, dir: impl AsRef<Path>) -> Self {
        self.input_from(name, name, artifact_type, dir, Map::new())
    }

    /// An input with the files below a directory, with the task that made it and what it noted.
    #[must_use]
    pub fn input_from(
        mut self,
        name: &str,
        producer: &str,
        artifact_type: ArtifactType,
        dir: impl AsRef<Path>,
        metadata: Map<String, Value>,
    ) -> Self {
        let dir = dir.as_ref().to_path_buf();
        let mut files = Vec::new();
        files_below(&dir, Path::new(""), &mut files);
        files.sort();
        let bytes = files
            .iter()
            .map(|file| {
                std::fs::metadata(dir.join(file))
                    .expect("the file is there")
                    .len()
            })
            .sum();
        let name = ArtifactName::new(name).expect("the input's name is one");
        self.inputs.push(Input {
            producer: TaskName::new(producer).expect("the producer's name is one"),
            artifact: ArtifactRef {
                name: name.clone(),
                manifest: Digest::of(dir.as_os_str().as_encoded_bytes()),
                bytes,
            },
            name,
            artifact_type,
            metadata,
            dir,
            files,
        });
        self
    }

    /// A file that travelled with the submission.
    #[must_use]
    pub fn file(mut self, path: &str, local: impl AsRef<Path>, executable: bool) -> Self {
        self.files.push(StageFile {
            path: path.to_owned(),
            local: local.as_ref().to_path_buf(),
            executable,
        });
        self
    }

    /// An output that the stage declares in the pipeline.
    #[must_use]
    pub fn declare_output(mut self, name: &str, artifact_type: ArtifactType) -> Self {
        let name = ArtifactName::new(name).expect("the output's name is one");
        self.outputs.push((name, artifact_type));
        self
    }

    /// A secret that the worker has.
    #[must_use]
    pub fn secret(mut self, name: &str, value: &str) -> Self {
        let name = SecretName::new(name).expect("the secret's name is one");
        let value = Secret::new(value.to_owned().into()).expect("it can be a secret");
        self.secrets.insert(name, value);
        self
    }

    /// Directory that relative `file:` sources are resolved against.
    #[must_use]
    pub fn base_dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.base_dir = Some(dir.as_ref().to_path_buf());
        self
    }

    /// What is reserved for the attempt; by default one core.
    #[must_use]
    pub const fn resources(mut self, resources: Resources) -> Self {
        self.resources = Some(resources);
        self
    }

    /// What earlier tasks of the run did.
    #[must_use]
    pub fn run_view(mut self, view: RunView) -> Self {
        self.run_view = Some(Arc::new(view));
        self
    }

    /// What there is to tell of delivery.
    #[must_use]
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = Some(Arc::new(delivery));
        self
    }

    /// The task's name; `task` by default.
    #[must_use]
    pub fn task(mut self, task: &str) -> Self {
        self.task = Some(TaskName::new(task).expect("the task's name is one"));
        self
    }

    /// The attempt is part of a trace, by its W3C `traceparent`.
    #[must_use]
    pub fn traced(mut self, traceparent: &str) -> Self {
        traceparent.clone_into(&mut self.traceparent);
        self
    }

    /// The checkpoint of an earlier context of the same task.
    #[must_use]
    pub fn checkpoints(mut self, checkpoints: Arc<MemoryCheckpoints>) -> Self {
        self.checkpoints = Some(checkpoints);
        self
    }

    /// The context. Uses the runtime it is called in, if any, else one of its own.
    #[must_use]
    pub fn build(self) -> TestContext {
        let work = tempfile::tempdir().expect("a temporary directory can be made");
        let sink = Arc::new(RecordingSink::default());
        let checkpoints = self.checkpoints.unwrap_or_default();
        let (stop, stopped) = watch::channel(None);
        let (handle, runtime) = match tokio::runtime::Handle::try_current() {
            Ok(handle) => (handle, None),
            Err(_) => {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .enable_all()
                    .build()
                    .expect("a runtime can be made");
                (runtime.handle().clone(), Some(runtime))
            }
        };
        let attempt = AttemptId {
            run: RunId::new("test").expect("a run id"),
            task: self
                .task
                .unwrap_or_else(|| TaskName::new("task").expect("a task")),
            attempt: 1,
        };
        let pipeline = PipelineName::new("test").expect("a pipeline's name");
        let (telemetry, spans) = Telemetry::collecting(MOST_SPANS);
        let telemetry = AttemptTelemetry::new(
            Instruments::new(telemetry),
            &attempt,
            pipeline.clone(),
            &self.traceparent,
            stopped.clone(),
        );
        TestContext {
            ctx: StageContext {
                attempt,
                pipeline,
                spec: self.spec,
                inputs: self.inputs,
                files: self.files,
                outputs: self.outputs,
                secrets: Secrets::new(self.secrets),
                base_dir: self.base_dir.unwrap_or_else(|| work.path().to_path_buf()),
                work_dir: work.path().to_path_buf(),
                resources: self.resources.unwrap_or(Resources {
                    cpu_millis: 1000,
                    memory_bytes: 0,
                    gpus: 0,
                }),
                run_view: self.run_view,
                delivery: self.delivery,
                traceparent: self.traceparent,
                telemetry,
                sink: sink.clone(),
                checkpoints: checkpoints.clone(),
                stop: stopped,
                runtime: handle,
            },
            sink,
            checkpoints,
            stop: Arc::new(stop),
            spans: Mutex::new(spans),
            _work: work,
            _runtime: runtime,
        }
    }
}

fn files_below(root: &Path, below: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(root.join(below)).expect("the input's directory can be read") {
        let entry = entry.expect("the input's directory can be read");
        let path = below.join(entry.file_name());
        if entry.path().is_dir() {
            files_below(root, &path, out);
        } else {
            out.push(path);
        }
    }
}
