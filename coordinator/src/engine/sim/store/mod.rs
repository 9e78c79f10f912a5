//! The store, and the invariants of everything that is written to it and told from it. The checks
//! at a commit are here, those of what starts in `starts`, those of what is told in `told`.
//!
//! - I2: what a client, a worker or a watcher was told stands in the store, and stays.
//! - I3: a task is committed at most once (until its run is retried), by the attempt that was
//!   current; no attempt's number is used twice.
//! - I4: terms never go down, and each record bears the term that wrote it.
//! - I5: a committed task names the outputs of its own attempt.
//! - I7: an attempt starts only when what it waits for has ended, and is given just what that has
//!   committed; the same holds for what is reused instead.
//! - I8: an ended run leaves no record but its summary.
//! - I11: the times of a run and of a task never go back.
//! - I13: no value is over its bound; no worker is given more than it has; no budget of retries is
//!   overspent.
//! - Nothing starts in a run that is to stop, nor in one that failed and is to fail fast.

mod delivered;
mod starts;
mod told;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use emberline_common::{
    failure::Reason,
    ids::{ArtifactName, AttemptId, Digest, Epoch, RunId, TaskName, WorkerName},
    resources::Resources,
    run_view::{ModelVersion, TaskState},
    spec::{PipelineSpec, StageSpec, expand::matrix_values},
};
use serde_json::{Value, json};

use crate::engine::{
    api::{EndedRun, Write},
    records::{MAX_VALUE_BYTES, ModelRecord, RunRecord, TaskRecord, Written},
    run::written_state,
};

type Task = (RunId, TaskName);

/// The store, and what the checks remember of its past.
#[derive(Debug, Default)]
pub(super) struct Store {
    pub records: BTreeMap<String, Vec<u8>>,
    /// The object store's pipelines.
    pub specs: BTreeMap<Digest, Arc<PipelineSpec>>,
    /// What each worker has.
    pub workers: BTreeMap<WorkerName, Resources>,
    /// Ended runs that a client asked to forget.
    pub forgettable: BTreeSet<RunId>,
    term: Epoch,
    runs: BTreeMap<RunId, RunRecord>,
    tasks: BTreeMap<Task, TaskRecord>,
    /// The highest attempt of each task that ever was.
    numbers: BTreeMap<Task, u32>,
    /// Attempts that were committed, with what they are to be given.
    started: BTreeMap<AttemptId, Given>,
    /// Attempts that have ended on a worker, and whether well.
    ended: BTreeMap<AttemptId, bool>,
    /// Attempts whose report was committed.
    reported: BTreeSet<AttemptId>,
    /// Further attempts by reason, since the run was last (re)started.
    spent: BTreeMap<Task, BTreeMap<Reason, u32>>,
    /// What each output was made from.
    made: BTreeMap<Digest, String>,
    /// Outputs that were reported as bad.
    bad: BTreeMap<AttemptId, Digest>,
    dropped: BTreeSet<Digest>,
    on: BTreeMap<WorkerName, BTreeMap<Task, Resources>>,
    delivered: delivered::Delivered,
    /// Tasks that were reused.
    pub reused: u64,
}

/// What a task is given.
#[derive(Debug, Clone, PartialEq)]
struct Given {
    worker: Option<WorkerName>,
    with: Value,
    inputs: Vec<(ArtifactName, Digest, TaskName)>,
}

impl Given {
    /// What a task's outputs depend on.
    fn made_from(&self, stage: &StageSpec) -> String {
        let inputs = self.inputs.iter();
        let inputs: Vec<_> = inputs.map(|(name, manifest, _)| (name, manifest)).collect();
        json!([stage.kind, self.with, stage.outputs, inputs]).to_string()
    }
}

/// What an attempt of the simulation produces.
pub(super) fn output_of(id: &AttemptId) -> Digest {
    Digest::of(id.to_string().as_bytes())
}

fn attempt(task: &Task, attempt: u32) -> AttemptId {
    AttemptId {
        run: task.0.clone(),
        task: task.1.clone(),
        attempt,
    }
}

/// The stage of a task, and its number in the stage's matrix.
fn place(task: &TaskName) -> (&str, usize) {
    let (stage, index) = (task.as_str().split_once('.')).unwrap_or((task.as_str(), "0"));
    (stage, index.parse().unwrap_or(0))
}

fn tasks_of(spec: &PipelineSpec, stage: &str) -> Vec<TaskName> {
    let Some((name, stage)) = spec.stages.get_key_value(stage) else {
        return Vec::new();
    };
    if stage.matrix.is_empty() {
        return vec![TaskName::of_stage(name)];
    }
    let count = matrix_values(stage).len();
    (0..count).map(|at| TaskName::of_matrix(name, at)).collect()
}

fn parse<T: serde::de::DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, String> {
    serde_json::from_slice(value).map_err(|error| format!("{key} cannot be read: {error}"))
}

/// What one transaction did, to be checked when all of it is in.
#[derive(Debug, Default)]
struct Changes {
    started: Vec<Task>,
    cached: Vec<Task>,
    gone: BTreeSet<RunId>,
    ended: Vec<RunId>,
    models: BTreeSet<String>,
}

impl Store {
    pub fn knows(&self, run: &RunId) -> bool {
        self.runs.contains_key(run) || self.records.contains_key(&format!("ended/{run}"))
    }

    /// Applies one decision's writes, as one transaction.
    pub fn apply(&mut self, term: Epoch, writes: &[Write]) -> Result<(), String> {
        if term < self.term && !writes.is_empty() {
            return Err(format!("I4: term {term} writes after term {}", self.term));
        }
        self.term = term;
        let mut changes = Changes::default();
        for write in writes {
            match write {
                Write::Put { key, value } => {
                    if value.len() > MAX_VALUE_BYTES || key.len() > 512 {
                        return Err(format!("I13: {key} has {} bytes", value.len()));
                    }
                    self.put(key, value, &mut changes)?;
                    self.records.insert(key.clone(), value.clone());
                }
                Write::Delete { key } => {
                    self.delete(key, &mut changes);
                    self.records.remove(key);
                }
                Write::DeletePrefix { prefix } => {
                    let keys = self.records.range(prefix.clone()..);
                    let keys = keys
                        .map(|(key, _)| key)
                        .take_while(|key| key.starts_with(prefix));
                    let keys: Vec<String> = keys.cloned().collect();
                    for key in keys {
                        self.delete(&key, &mut changes);
                        self.records.remove(&key);
                    }
                }
            }
        }
        for task in &changes.started {
            self.check_started(task)?;
        }
        for task in &changes.cached {
            self.check_cached(task)?;
            self.reused += 1;
        }
        for run in &changes.ended {
            if self.runs.contains_key(run) {
                return Err(format!("I8: {run} is live, and ended"));
            }
        }
        for run in &changes.gone {
            let known = self.knows(run) || self.forgettable.contains(run);
            let left = self.tasks.keys().find(|task| task.0 == *run);
            match left {
                _ if !known => return Err(format!("I2: {run} is gone")),
                Some(left) if !self.runs.contains_key(run) => {
                    return Err(format!("I8: {run} has ended, and {} is left over", left.1));
                }
                None | Some(_) => {}
            }
        }
        self.check_delivered()?;
        (changes.models.iter()).try_for_each(|model| self.check_model(model))
    }

    fn put(&mut self, key: &str, value: &[u8], changes: &mut Changes) -> Result<(), String> {
        let parts: Vec<&str> = key.split('/').collect();
        match parts[..] {
            ["runs", _] => self.put_run(key, parse(key, value)?),
            ["tasks", run, task] => {
                let run = RunId::new(run).map_err(|error| error.to_string())?;
                let task = TaskName::new(task).map_err(|error| error.to_string())?;
                self.put_task((run, task), parse(key, value)?, changes)
            }
            ["ended", _] => {
                let ended: EndedRun = parse(key, value)?;
                changes.ended.push(ended.summary.run);
                Ok(())
            }
            ["models", model, ..] => {
                changes.models.insert(model.to_owned());
                let old = self.records.get(key);
                if parts.len() == 3 && old.is_some_and(|old| old != value) {
                    return Err(format!("{key} has changed: a version is immutable"));
                }
                Ok(())
            }
            ["cache", _] | ["environments", ..] => Ok(()),
            ["deployments", _] => self.put_deployment(key, parse(key, value)?),
            _ => Err(format!("{key} is no key that is known")),
        }
    }

    fn delete(&mut self, key: &str, changes: &mut Changes) {
        let parts: Vec<&str> = key.split('/').collect();
        let run = parts.get(1).and_then(|run| RunId::new(run).ok());
        match (&parts[..], run) {
            (["runs", _], Some(run)) => {
                self.runs.remove(&run);
                changes.gone.insert(run);
            }
            (["ended", _], Some(run)) => {
                changes.gone.insert(run);
            }
            (["tasks", _, task], Some(run)) => {
                if let Ok(task) = TaskName::new(task) {
                    let task = (run.clone(), task);
                    self.tasks.remove(&task);
                    self.leaves(&task);
                }
                changes.gone.insert(run);
            }
            _ => {}
        }
    }

    fn leaves(&mut self, task: &Task) {
        for running in self.on.values_mut() {
            running.remove(task);
        }
    }

    fn put_run(&mut self, key: &str, new: RunRecord) -> Result<(), String> {
        if new.epoch != self.term {
            return Err(format!("I4: {key} bears term {}", new.epoch));
        }
        match self.runs.get(&new.run) {
            None => self.spent.retain(|task, _| task.0 != new.run),
            Some(old) => {
                let kept = (old.created_at, old.resumed_at) == (new.created_at, new.resumed_at);
                let once = |was: bool, same: bool| !was || same;
                let kept = kept
                    && once(old.started_at.is_some(), old.started_at == new.started_at)
                    && once(old.failure.is_some(), old.failure == new.failure)
                    && once(old.stop.is_some(), old.stop == new.stop)
                    && once(old.ended.is_some(), old.ended == new.ended);
                if !kept {
                    return Err(format!("I3: {key} has changed what was settled"));
                }
            }
        }
        let end = new.ended.as_ref().map_or(new.latest(), |ended| ended.at);
        if new.created_at > new.resumed_at || end < new.latest() {
            return Err(format!("I11: the times of {key} go back"));
        }
        self.runs.insert(new.run.clone(), new);
        Ok(())
    }

    fn put_task(
        &mut self,
        task: Task,
        new: TaskRecord,
        changes: &mut Changes,
    ) -> Result<(), String> {
        let text = format!("{}/{}", task.0, task.1);
        let old = self.tasks.get(&task);
        if new.epoch != self.term {
            return Err(format!("I4: {text} bears term {}", new.epoch));
        }
        let highest = self.numbers.get(&task).copied().unwrap_or(0);
        let is_current =
            old.is_some_and(|old| old.written == Written::Running && old.attempt == new.attempt);
        if let Some(old) = old {
            if new.attempt < old.attempt {
                return Err(format!(
                    "I3: {text}: attempt {} after {}",
                    new.attempt, old.attempt
                ));
            }
            let settled = written_state(old.written).is_some_and(TaskState::is_final);
            if settled && (new.written, &new.outputs) != (old.written, &old.outputs) {
                return Err(format!(
                    "I3: {text} was {:?}, is {:?}",
                    old.written, new.written
                ));
            }
        }
        if new.reported > 0 {
            let id = attempt(&task, new.reported);
            if !self.ended.contains_key(&id) {
                return Err(format!("I3: {id} has not ended, but its report is taken"));
            }
            if let Some(bad) = self.bad.get(&id) {
                self.dropped.insert(*bad);
            }
            self.reported.insert(id);
        }
        let id = attempt(&task, new.attempt);
        match new.written {
            Written::Running if is_current => {}
            Written::Running => {
                if new.attempt != highest + 1 {
                    return Err(format!(
                        "I3: {text}: attempt {} after {highest}",
                        new.attempt
                    ));
                }
                // Another leader's clock may be off, and then it waits anew.
                let old = old.filter(|old| old.epoch == new.epoch);
                if let Some(until) = old.and_then(|old| old.retry_at)
                    && new.started_at < Some(until)
                {
                    return Err(format!("{text} starts before its backoff is over"));
                }
                changes.started.push(task.clone());
            }
            Written::Succeeded => {
                // Of a run that is started again, what had succeeded is written once more.
                let again = old.is_none() && self.reported.contains(&id);
                let settled = old.is_some_and(|old| old.written == Written::Succeeded);
                if !(is_current || again || settled) || self.ended.get(&id) != Some(&true) {
                    return Err(format!("I3: {id} is committed, but was not current"));
                }
                let own = output_of(&id);
                if new.outputs.iter().any(|output| output.manifest != own) {
                    return Err(format!("I5: {text} names outputs of another attempt"));
                }
            }
            Written::Cached => changes.cached.push(task.clone()),
            Written::Pending
            | Written::Backoff
            | Written::Failed
            | Written::Cancelled
            | Written::Skipped => {}
        }
        let times = [Some(new.ready_at), new.started_at, new.finished_at];
        if new.written == Written::Succeeded && !times.iter().flatten().is_sorted() {
            return Err(format!("I11: the times of {text} go back"));
        }
        self.numbers.insert(task.clone(), highest.max(new.attempt));
        if !(is_current && new.written == Written::Running) {
            self.leaves(&task);
        }
        self.tasks.insert(task, new);
        Ok(())
    }

    fn check_model(&self, model: &str) -> Result<(), String> {
        let key = format!("models/{model}");
        let head = self.records.get(&key);
        let head: ModelRecord = parse(&key, head.map_or(b"null", Vec::as_slice))?;
        let prefix = format!("{key}/");
        let versions = self.records.range(prefix.clone()..);
        let versions = versions.take_while(|(key, _)| key.starts_with(&prefix));
        let mut artifacts = BTreeSet::new();
        let mut latest = 0;
        for (key, value) in versions {
            let version: ModelVersion = parse(key, value)?;
            latest += 1;
            if version.version != latest
                || !artifacts.insert(version.registration.artifact.manifest)
            {
                return Err(format!(
                    "{key} has a wrong number, or an artifact of another version"
                ));
            }
        }
        if head.latest != latest || head.aliases.values().any(|version| *version > latest) {
            return Err(format!("{key} points to a version that is none"));
        }
        Ok(())
    }
}
