//! A live run in memory: its stages as a graph with counters, its tasks, and its views.
//!
//! Counters by stage keep fan-in and fan-out linear: a task that ends touches its own stage, and
//! only the last of a stage touches the stages below.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use emberline_common::{
    delivery::Change,
    ids::{StageName, TaskName},
    run_view::{RunState, RunSummary, RunView, TaskState, TaskView},
    spec::{
        PipelineSpec, RunIf, StageSpec,
        condition::Condition,
        expand::{fill, matrix_size},
        semantics::MAX_STAGE_TASKS,
    },
    time::Timestamp,
};
use serde_json::{Map, Value};

use super::{
    api::{ArchivedRun, Refusal},
    placement::Shape,
    records::{FirstFailure, RunRecord, StopRecord, TaskRecord, Written},
};

/// The most inputs of all tasks of one stage together.
const MAX_STAGE_INPUTS: usize = 100_000;

/// A run's number within one engine; never reused.
pub(super) type RunSeq = u64;

/// One task of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct TaskRef {
    pub run: RunSeq,
    pub task: u32,
}

/// A live run.
#[derive(Debug)]
pub(super) struct Run {
    pub record: RunRecord,
    pub spec: Arc<PipelineSpec>,
    pub stages: Vec<Stage>,
    pub tasks: Vec<Task>,
    /// Tasks that are queued, running or in backoff.
    pub active: usize,
    /// Tasks that are not in a final state.
    pub unfinished: usize,
    /// Tasks that were reused.
    pub cached: usize,
    /// Stages whose upstream stages have all ended, to be decided on.
    pub to_open: VecDeque<usize>,
    /// Opened `run_if: failure` stages, as long as nothing has failed.
    pub parked: BTreeSet<usize>,
    /// Whether its first failure may be acted on. Not so while a new leader derives what came before.
    pub failure_known: bool,
    pub watched: bool,
    /// The state that observers were told last.
    pub observed: Option<RunState>,
    pub dirty: bool,
    pub changed: bool,
}

/// A stage of a live run.
#[derive(Debug)]
pub(super) struct Stage {
    pub name: StageName,
    pub upstream: Vec<usize>,
    pub downstream: Vec<usize>,
    /// Upstream stages that have not ended.
    pub waiting_on: usize,
    /// Its first task.
    pub first: usize,
    /// How many it has.
    pub count: usize,
    pub unfinished: usize,
    /// Ended tasks that did not succeed, but for those skipped by their own condition.
    pub bad: usize,
    /// The latest end of a task.
    pub latest: Timestamp,
    pub when: Option<Condition>,
    pub shape: Arc<Shape>,
}

/// A task of a live run.
#[derive(Debug)]
pub(super) struct Task {
    pub stage: u32,
    /// Position in the stage's matrix.
    pub index: u32,
    pub state: TaskState,
    /// Whether a skip is by the pipeline's own will and fails nothing.
    pub benign: bool,
    /// Whether a record lies in the store (or is on its way).
    pub stored: bool,
    pub dirty: bool,
    pub changed: bool,
    pub ready_at: Timestamp,
    /// When it ended, for tasks without a record.
    pub ended_at: Timestamp,
    pub note: String,
    pub record: Option<Box<TaskRecord>>,
}

/// Why nothing new may start in a stage.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cut<'a> {
    /// The run has failed, and is to fail fast.
    Failed(&'a FirstFailure),
    /// The run is to stop.
    Stopped(&'a StopRecord),
}

impl Cut<'_> {
    /// Since when.
    pub const fn at(&self) -> Timestamp {
        match self {
            Self::Failed(failure) => failure.at,
            Self::Stopped(stop) => stop.at,
        }
    }
}

impl std::fmt::Display for Cut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed(failure) => write!(f, "`{}` has failed (`fail_fast`)", failure.task),
            Self::Stopped(stop) => f.write_str(&stop.failure.message),
        }
    }
}

impl Task {
    /// The record, made if there is none.
    pub fn record(&mut self) -> &mut TaskRecord {
        self.record.get_or_insert_default()
    }

    pub fn attempt(&self) -> u32 {
        self.record.as_ref().map_or(0, |r| r.attempt)
    }
}

/// The name of a stage's task.
pub(super) fn task_name(stage: &StageSpec, name: &StageName, index: u32) -> TaskName {
    if stage.matrix.is_empty() {
        TaskName::of_stage(name)
    } else {
        TaskName::of_matrix(name, index as usize)
    }
}

/// The matrix values of one task; the last name varies fastest, as in `expand::matrix_values`.
pub(super) fn matrix_at(stage: &StageSpec, index: u32) -> Map<String, Value> {
    let mut rest = index as usize;
    let mut picked = Vec::with_capacity(stage.matrix.len());
    for (name, values) in stage.matrix.iter().rev() {
        let count = values.len().max(1);
        if let Some(value) = values.get(rest % count) {
            picked.push((name.clone(), value.clone()));
        }
        rest /= count;
    }
    picked.into_iter().rev().collect()
}

impl Run {
    /// All of the pipeline's tasks, waiting.
    pub fn new(record: RunRecord, spec: Arc<PipelineSpec>) -> Result<Self, Refusal> {
        let invalid = |what: String| Refusal::Invalid(what);
        let mut stages = Vec::with_capacity(spec.stages.len());
        let mut tasks = Vec::new();
        for (number, (name, stage)) in spec.stages.iter().enumerate() {
            let count = matrix_size(stage);
            if count > MAX_STAGE_TASKS {
                return Err(Refusal::TooLarge(format!(
                    "stage `{name}` has {count} tasks, at most {MAX_STAGE_TASKS} are allowed"
                )));
            }
            if count == 0 {
                return Err(invalid(format!(
                    "the matrix of stage `{name}` has no values"
                )));
            }
            let mut upstream = BTreeSet::new();
            let from_inputs = stage.inputs.values().map(|reference| &reference.stage);
            for needed in from_inputs.chain(&stage.needs) {
                let at = spec.stages.get_index_of(needed).ok_or_else(|| {
                    invalid(format!("stage `{name}` needs `{needed}`, which is none"))
                })?;
                upstream.insert(at);
            }
            fill(&stage.with, &matrix_at(stage, 0))
                .map_err(|what| invalid(format!("stage `{name}`: {what}")))?;
            let when = match &stage.when {
                None => None,
                Some(text) => Some(
                    text.parse::<Condition>()
                        .map_err(|what| invalid(format!("stage `{name}`: `when`: {what}")))?,
                ),
            };
            let upstream: Vec<usize> = upstream.into_iter().collect();
            let stage_number = u32::try_from(number)
                .map_err(|_| Refusal::TooLarge("too many stages".to_owned()))?;
            let first = tasks.len();
            for index in 0..count {
                tasks.push(Task {
                    stage: stage_number,
                    index: u32::try_from(index).unwrap_or(u32::MAX),
                    state: TaskState::Waiting,
                    benign: false,
                    stored: false,
                    dirty: false,
                    changed: false,
                    ready_at: Timestamp(0),
                    ended_at: Timestamp(0),
                    note: String::new(),
                    record: None,
                });
            }
            stages.push(Stage {
                name: name.clone(),
                waiting_on: upstream.len(),
                upstream,
                downstream: Vec::new(),
                first,
                count,
                unfinished: count,
                bad: 0,
                latest: Timestamp(0),
                when,
                shape: Arc::new(Shape::of(stage)),
            });
        }
        if tasks.is_empty() {
            return Err(invalid("it has no task".to_owned()));
        }
        for at in 0..stages.len() {
            for up in stages[at].upstream.clone() {
                stages[up].downstream.push(at);
            }
        }
        let run = Self {
            active: 0,
            unfinished: tasks.len(),
            cached: 0,
            to_open: (0..stages.len())
                .filter(|at| stages[*at].waiting_on == 0)
                .collect(),
            parked: BTreeSet::new(),
            failure_known: true,
            watched: false,
            observed: None,
            dirty: false,
            changed: false,
            record,
            spec,
            stages,
            tasks,
        };
        run.check_order()?;
        run.check_conditions()?;
        run.check_inputs()?;
        Ok(run)
    }

    /// The stages in an order in which they can start.
    pub fn order(&self) -> Vec<usize> {
        let mut waiting: Vec<usize> = self.stages.iter().map(|s| s.upstream.len()).collect();
        let mut order: Vec<usize> = (0..waiting.len()).filter(|at| waiting[*at] == 0).collect();
        let mut next = 0;
        while let Some(&at) = order.get(next) {
            next += 1;
            for &down in &self.stages[at].downstream {
                waiting[down] -= 1;
                if waiting[down] == 0 {
                    order.push(down);
                }
            }
        }
        order
    }

    fn check_order(&self) -> Result<(), Refusal> {
        let order: BTreeSet<usize> = self.order().into_iter().collect();
        match (0..self.stages.len()).find(|at| !order.contains(at)) {
            None => Ok(()),
            Some(at) => Err(Refusal::Invalid(format!(
                "stage `{}` is in a cycle, or behind one",
                self.stages[at].name
            ))),
        }
    }

    /// All stages that `stage` descends from, nearest first.
    pub fn ancestors(&self, stage: usize) -> Vec<usize> {
        let (mut seen, mut out) = (BTreeSet::new(), Vec::new());
        let mut next: VecDeque<usize> = self.stages[stage].upstream.iter().copied().collect();
        while let Some(at) = next.pop_front() {
            if seen.insert(at) {
                out.push(at);
                next.extend(&self.stages[at].upstream);
            }
        }
        out
    }

    /// A condition may name results of stages that have ended when it is read, and of one task.
    fn check_conditions(&self) -> Result<(), Refusal> {
        for (at, stage) in self.stages.iter().enumerate() {
            let Some(when) = &stage.when else { continue };
            let above = self.ancestors(at);
            for reference in when.references() {
                let scope = reference.first().map_or("", String::as_str);
                if scope == "params" || scope == "matrix" {
                    continue;
                }
                let fail = |why: &str| {
                    Err(Refusal::Invalid(format!(
                        "stage `{}`: `when` names `{}`, but {why}",
                        stage.name,
                        reference.join(".")
                    )))
                };
                match above
                    .iter()
                    .find(|up| self.stages[**up].name.as_str() == scope)
                {
                    None => return fail("it does not wait for a stage of that name"),
                    Some(up) if !self.stage_spec(*up).matrix.is_empty() => {
                        return fail("that stage has a matrix, so it has no single result");
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }

    /// Matrix times matrix must not be more than one decision can look at.
    fn check_inputs(&self) -> Result<(), Refusal> {
        for (at, stage) in self.stages.iter().enumerate() {
            let inputs = self.stage_spec(at).inputs.values();
            let from = inputs.filter_map(|i| self.spec.stages.get_index_of(&i.stage));
            let each: usize = from.map(|up| self.stages[up].count).sum();
            if each.saturating_mul(stage.count) > MAX_STAGE_INPUTS {
                return Err(Refusal::TooLarge(format!(
                    "the {} tasks of stage `{}` would take {each} inputs each; at most {MAX_STAGE_INPUTS} in all are allowed",
                    stage.count, stage.name
                )));
            }
        }
        Ok(())
    }

    pub fn stage_spec(&self, stage: usize) -> &StageSpec {
        &self.spec.stages[stage]
    }

    pub fn name_of(&self, task: u32) -> TaskName {
        let at = &self.tasks[task as usize];
        let stage = at.stage as usize;
        task_name(self.stage_spec(stage), &self.stages[stage].name, at.index)
    }

    /// The task of that name.
    pub fn find(&self, name: &TaskName) -> Option<u32> {
        let (stage, index) = match name.as_str().split_once('.') {
            None => (name.as_str(), None),
            Some((stage, index)) => (stage, Some(index)),
        };
        let at = self.spec.stages.get_index_of(stage)?;
        let has_matrix = !self.stage_spec(at).matrix.is_empty();
        let index = match index {
            Some(text) if has_matrix => text.parse::<usize>().ok()?,
            None if !has_matrix => 0,
            _ => return None,
        };
        let found = &self.stages[at];
        let task = u32::try_from(found.first + index).ok()?;
        // `007` would be another name for the same task.
        (index < found.count && self.name_of(task) == *name).then_some(task)
    }

    /// From when on nothing new may start in this stage, if there is such a time, and why.
    pub fn cut(&self, stage: usize) -> Option<Cut<'_>> {
        let failure = self.record.failure.as_ref();
        let fails_fast = self.spec.fail_fast && self.stage_spec(stage).run_if == RunIf::Success;
        let failed = failure.filter(|_| fails_fast).map(Cut::Failed);
        let stopped = self.record.stop.as_ref().map(Cut::Stopped);
        // Whichever came first: what it has ended stays as it is.
        failed.into_iter().chain(stopped).min_by_key(Cut::at)
    }

    pub fn state(&self) -> RunState {
        if let Some(ended) = &self.record.ended {
            ended.state
        } else if self.record.stop.is_some() {
            RunState::Cancelling
        } else if self.record.started_at.is_some() {
            RunState::Running
        } else {
            RunState::Queued
        }
    }

    pub fn summary(&self) -> RunSummary {
        let record = &self.record;
        let ended = record.ended.as_ref();
        let failure = match ended {
            Some(ended) => ended.failure.clone(),
            None => (record.stop.as_ref().map(|s| s.failure.clone()))
                .or_else(|| record.failure.as_ref().map(|f| f.failure.clone())),
        };
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        RunSummary {
            run: record.run.clone(),
            pipeline: record.pipeline.clone(),
            revision: record.revision,
            state: self.state(),
            failure,
            params: record.params.clone(),
            priority: record.priority,
            created_at: record.created_at,
            started_at: record.started_at,
            finished_at: ended.map(|e| e.at),
            tasks_total: count(self.tasks.len()),
            tasks_done: count(self.tasks.len() - self.unfinished),
            tasks_cached: count(self.cached),
            trigger: record.trigger.clone(),
            traceparent: record.traceparent.clone(),
            resumed_at: Some(record.resumed_at),
            change: record.change.as_ref().map(|change| Change {
                commits: Vec::new(),
                ..change.clone()
            }),
            repairs: record.repairs,
        }
    }

    pub fn task_view(&self, number: u32) -> TaskView {
        let task = &self.tasks[number as usize];
        let stage = task.stage as usize;
        let spec = self.stage_spec(stage);
        let kept = task.record.as_deref().cloned().unwrap_or_default();
        let reached = task.state != TaskState::Waiting && task.ready_at.0 > 0;
        TaskView {
            run: self.record.run.clone(),
            task: self.name_of(number),
            stage: self.stages[stage].name.clone(),
            kind: spec.kind.clone(),
            needs: (self.stages[stage].upstream.iter())
                .map(|up| self.stages[*up].name.clone())
                .collect(),
            matrix: matrix_at(spec, task.index),
            state: task.state,
            attempt: kept.attempt,
            worker: kept.worker,
            failure: kept.failure,
            outputs: kept.outputs,
            results: kept.results,
            note: task.note.clone(),
            ready_at: reached.then_some(task.ready_at),
            started_at: kept.started_at,
            finished_at: task.state.is_final().then_some(task.ended_at),
            cached_from: kept.cached_from,
            timing: kept.timing,
            earlier: kept.earlier,
            again_at: kept.again_at,
        }
    }

    pub fn view(&self) -> RunView {
        let tasks = u32::try_from(self.tasks.len()).unwrap_or(u32::MAX);
        RunView {
            summary: self.summary(),
            tasks: (0..tasks).map(|task| self.task_view(task)).collect(),
        }
    }

    pub fn archived(&self) -> ArchivedRun {
        ArchivedRun {
            view: self.view(),
            base_dir: self.record.base_dir.clone(),
            no_cache: self.record.no_cache,
            files: self.record.files.clone(),
            request_id: self.record.request_id.clone(),
            spec: self.spec.clone(),
            change: self.record.change.clone(),
        }
    }
}

/// What a task's record says of its state, if it says anything.
pub(super) fn written_state(written: Written) -> Option<TaskState> {
    Some(match written {
        Written::Pending => return None,
        Written::Running => TaskState::Running,
        Written::Backoff => TaskState::Backoff,
        Written::Succeeded => TaskState::Succeeded,
        Written::Cached => TaskState::Cached,
        Written::Failed => TaskState::Failed,
        Written::Cancelled => TaskState::Cancelled,
        Written::Skipped => TaskState::Skipped,
    })
}
