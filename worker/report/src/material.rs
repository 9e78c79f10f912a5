//! What a page is made from: the run as the leader saw it when it handed the task out, and the
//! documents in the artifacts that came in. What cannot be read becomes a notice, never an error:
//! a report on a broken run is the one that is needed most.

use std::{fs, path::Path, time::Duration};

use emberline_common::{
    ids::TaskName,
    run_view::{ModelRegistration, RunState, RunView, TaskState, TaskView},
    spec::ArtifactType,
    time::Timestamp,
};
use emberline_worker::{
    documents::{
        EVALUATION_FILE, Evaluation, MODEL_FILE, ModelDocument, TableSummary, VALIDATION_FILE,
        VERSION_FILE, Validation,
    },
    stage::{Input, StageContext},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

/// The largest document that is read.
const MAX_DOCUMENT_BYTES: u64 = 64 << 20;

/// A document with the input that it came by.
pub struct Known<'a, T> {
    /// The input.
    pub input: &'a Input,
    /// What is in it.
    pub document: T,
}

impl<T> Known<'_, T> {
    /// What to call it on the page: `task/output`.
    pub fn label(&self) -> String {
        format!("{}/{}", self.input.producer, self.input.artifact.name)
    }
}

/// The document of a `version` artifact.
#[derive(Deserialize)]
pub struct VersionDocument {
    /// What was registered.
    pub registration: ModelRegistration,
}

/// Everything that the page tells of.
pub struct Material<'a> {
    /// What the stage was handed.
    pub ctx: &'a StageContext,
    /// The page's title.
    pub title: String,
    /// The run, if the leader sent it.
    pub run: Option<&'a RunView>,
    /// Tables.
    pub tables: Vec<Known<'a, TableSummary>>,
    /// Validations.
    pub validations: Vec<Known<'a, Validation>>,
    /// Models.
    pub models: Vec<Known<'a, ModelDocument>>,
    /// Evaluations.
    pub evaluations: Vec<Known<'a, Evaluation>>,
    /// Registered versions.
    pub versions: Vec<Known<'a, VersionDocument>>,
    /// What could not be read, and why.
    pub notices: Vec<String>,
}

impl<'a> Material<'a> {
    /// Reads the documents in the inputs.
    pub fn read(ctx: &'a StageContext, title: Option<String>) -> Self {
        let mut notices = Vec::new();
        let notices = &mut notices;
        Self {
            ctx,
            title: title.unwrap_or_else(|| ctx.pipeline.to_string()),
            run: ctx.run_view.as_deref(),
            tables: known(ctx, ArtifactType::Table, notices, |input| {
                serde_json::from_value(Value::Object(input.metadata.clone()))
                    .map_err(|e| format!("its summary is not one: {e}"))
            }),
            validations: documents(ctx, ArtifactType::Validation, VALIDATION_FILE, notices),
            models: documents(ctx, ArtifactType::Model, MODEL_FILE, notices),
            evaluations: documents(ctx, ArtifactType::Evaluation, EVALUATION_FILE, notices),
            versions: documents(ctx, ArtifactType::Version, VERSION_FILE, notices),
            notices: std::mem::take(notices),
        }
    }

    /// The run's tasks.
    pub fn tasks(&self) -> &'a [TaskView] {
        self.run.map_or(&[], |run| &run.tasks)
    }

    /// Whether it is the task that writes this page.
    pub fn is_own(&self, task: &TaskView) -> bool {
        task.task == self.ctx.attempt.task
    }

    /// The task of that name.
    pub fn task(&self, name: &TaskName) -> Option<&'a TaskView> {
        self.tasks().iter().find(|task| task.task == *name)
    }

    /// How the run came out, as far as it is known while its report is written: this task is still
    /// running and does not count. `None` without a run.
    pub fn outcome(&self) -> Option<RunState> {
        let run = self.run?;
        let state = run.summary.state;
        if state.is_final() || state == RunState::Cancelling {
            return Some(state);
        }
        let mut others = run.tasks.iter().filter(|task| !self.is_own(task));
        if run.summary.failure.is_some() || others.clone().any(|t| t.state == TaskState::Failed) {
            Some(RunState::Failed)
        } else if others.all(|task| task.state.is_final()) {
            Some(RunState::Succeeded)
        } else {
            Some(RunState::Running)
        }
    }

    /// The last time that the run speaks of: its end, or when this task was handed out.
    pub fn until(&self) -> Option<Timestamp> {
        let run = self.run?;
        run.summary.finished_at.or_else(|| {
            let times = run.tasks.iter().flat_map(|task| {
                let own = task.started_at.filter(|_| self.is_own(task));
                [task.finished_at, own]
            });
            times.flatten().max()
        })
    }

    /// From when the run was accepted until [`until`](Self::until).
    pub fn took(&self) -> Option<Duration> {
        Some(self.until()?.since(self.run?.summary.created_at))
    }
}

/// The input's documents of one type.
fn documents<'a, T: DeserializeOwned>(
    ctx: &'a StageContext,
    artifact_type: ArtifactType,
    file: &str,
    notices: &mut Vec<String>,
) -> Vec<Known<'a, T>> {
    known(ctx, artifact_type, notices, |input| document(input, file))
}

fn known<'a, T>(
    ctx: &'a StageContext,
    artifact_type: ArtifactType,
    notices: &mut Vec<String>,
    read: impl Fn(&Input) -> Result<T, String>,
) -> Vec<Known<'a, T>> {
    let mut out: Vec<Known<'a, T>> = Vec::new();
    for input in ctx
        .inputs
        .iter()
        .filter(|i| i.artifact_type == artifact_type)
    {
        // A model that came by two names (from `train`, and as taken by `evaluate`) is shown once.
        let same = |known: &Known<'_, T>| known.input.artifact.manifest == input.artifact.manifest;
        if out.iter().any(same) {
            continue;
        }
        match read(input) {
            Ok(document) => out.push(Known { input, document }),
            Err(why) => notices.push(format!(
                "The input {} ({} from {}) cannot be shown: {why}",
                input.name,
                artifact_type.as_str(),
                input.producer
            )),
        }
    }
    out
}

fn document<T: DeserializeOwned>(input: &Input, file: &str) -> Result<T, String> {
    if !input.files.iter().any(|path| path == Path::new(file)) {
        return Err(format!("it has no {file}"));
    }
    let path = input.dir.join(file);
    let bytes = fs::metadata(&path)
        .map_err(|e| format!("{file}: {e}"))?
        .len();
    if bytes > MAX_DOCUMENT_BYTES {
        return Err(format!(
            "{file} has {bytes} bytes, at most {MAX_DOCUMENT_BYTES} are read"
        ));
    }
    let text = fs::read(&path).map_err(|e| format!("{file}: {e}"))?;
    serde_json::from_slice(&text).map_err(|e| format!("{file}: {e}"))
}
