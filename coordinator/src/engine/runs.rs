//! Runs: submit, cancel, retry, end, archive, forget.

use std::{collections::BTreeSet, sync::Arc};

use emberline_common::{
    failure::{Failure, Reason},
    ids::{Digest, RunId},
    run_view::{RunState, TaskState, TaskView},
    spec::{PipelineSpec, RunIf},
    time::Timestamp,
    trace::RunTrace,
};

use super::{
    Engine,
    api::{ArchivedRun, Effect, EndedRun, Outcome, Refusal, Submission, Write},
    deadlines::Due,
    records::{
        EndRecord, MAX_REQUEST_ID_BYTES, MAX_VALUE_BYTES, RUN_RESERVE_BYTES, RunRecord, StopRecord,
        TaskRecord, Written, encode, keys,
    },
    run::{Run, RunSeq, TaskRef},
    spec_blob,
};

/// The largest pipeline as JSON, in bytes.
const MAX_SPEC_BYTES: usize = 4 << 20;

impl Run {
    /// Counts the end of a task.
    pub(super) fn count_end(&mut self, stage: usize, when: Timestamp, bad: bool) {
        self.unfinished -= 1;
        let stage = &mut self.stages[stage];
        stage.unfinished -= 1;
        stage.bad += usize::from(bad);
        stage.latest = stage.latest.max(when);
        if stage.unfinished == 0 {
            for down in stage.downstream.clone() {
                self.stages[down].waiting_on -= 1;
                if self.stages[down].waiting_on == 0 {
                    self.to_open.push_back(down);
                }
            }
        }
    }
}

impl Engine {
    pub(super) fn submit(&mut self, submission: Submission) -> Result<Outcome, Refusal> {
        if let Some(request) = &submission.request_id {
            if let Some(run) = self.requests.get(request) {
                return Ok(Outcome::Submitted {
                    run: run.clone(),
                    trace: RunTrace::of(run, self.traceparent_of(run)).trace,
                    already_existed: true,
                });
            }
            if request.len() > MAX_REQUEST_ID_BYTES {
                return Err(Refusal::TooLarge(format!(
                    "a request id has at most {MAX_REQUEST_ID_BYTES} bytes"
                )));
            }
        }
        if self.run_ids.contains_key(&submission.run) || self.ended.contains_key(&submission.run) {
            return Err(Refusal::Invalid(format!(
                "the run id `{}` is taken",
                submission.run
            )));
        }
        if let Some(repaired) = submission.repairs
            && self.deployment(repaired).is_none()
        {
            return Err(Refusal::NoSuchDeployment(format!(
                "there is no deployment `{repaired}` to repair"
            )));
        }
        let record = self.new_record(submission.clone(), self.now)?;
        let run = Run::new(record, submission.spec)?;
        self.admit(&run)?;
        let id = run.record.run.clone();
        let trace = RunTrace::of(&id, &run.record.traceparent).trace;
        self.enter(run);
        Ok(Outcome::Submitted {
            run: id,
            trace,
            already_existed: false,
        })
    }

    fn traceparent_of(&self, run: &RunId) -> &str {
        let live = self.live(run).map(|run| &run.record.traceparent);
        let ended = || self.ended.get(run).map(|ended| &ended.summary.traceparent);
        live.or_else(ended).map_or("", String::as_str)
    }

    /// The record of a run to accept.
    pub(super) fn new_record(
        &self,
        submission: Submission,
        now: Timestamp,
    ) -> Result<RunRecord, Refusal> {
        let spec = checked_blob(&submission.spec)?;
        Ok(RunRecord {
            run: submission.run,
            pipeline: submission.spec.pipeline.clone(),
            revision: submission.revision,
            spec,
            epoch: self.epoch,
            params: submission.params,
            priority: submission.priority.unwrap_or(submission.spec.priority),
            no_cache: submission.no_cache,
            base_dir: submission.base_dir,
            files: submission.files,
            trigger: submission.trigger,
            traceparent: submission.traceparent,
            change: submission.change,
            repairs: submission.repairs,
            request_id: submission.request_id,
            created_at: now,
            resumed_at: now,
            started_at: None,
            failure: None,
            stop: None,
            ended: None,
        })
    }

    /// Whether there is room for one more run.
    fn admit(&self, run: &Run) -> Result<(), Refusal> {
        let bytes = encode(&run.record).len();
        if bytes + RUN_RESERVE_BYTES > MAX_VALUE_BYTES {
            return Err(Refusal::TooLarge(format!(
                "parameters, file list and paths take {bytes} bytes, at most {} are kept",
                MAX_VALUE_BYTES - RUN_RESERVE_BYTES
            )));
        }
        if run.unfinished > self.config.max_live_tasks {
            return Err(Refusal::TooLarge(format!(
                "it has {} tasks, at most {} can be live",
                run.unfinished, self.config.max_live_tasks
            )));
        }
        if self.runs.len() >= self.config.max_live_runs {
            return Err(Refusal::QueueFull {
                limit: self.config.max_live_runs,
                what: "live runs",
            });
        }
        if self.live_tasks + run.unfinished > self.config.max_live_tasks {
            return Err(Refusal::QueueFull {
                limit: self.config.max_live_tasks,
                what: "live tasks",
            });
        }
        Ok(())
    }

    /// Takes in a run that has been accepted, and starts it.
    fn enter(&mut self, run: Run) -> RunSeq {
        let seq = self.insert(run);
        self.touch_run(seq, true);
        self.settle(seq);
        seq
    }

    /// Takes in a run, without deciding on it.
    pub(super) fn insert(&mut self, run: Run) -> RunSeq {
        let seq = self.next_run;
        self.next_run += 1;
        let id = run.record.run.clone();
        self.deciding = Some(id.clone());
        if let Some(request) = &run.record.request_id {
            self.requests.insert(request.clone(), id.clone());
        }
        if let Some(timeout) = run.spec.timeout {
            let until = run.record.resumed_at.after(timeout.0);
            self.deadlines.add(until, Due::Run { run: id.clone() });
        }
        self.live_tasks += run.unfinished;
        self.run_ids.insert(id, seq);
        self.runs.insert(seq, run);
        seq
    }

    pub(super) fn cancel(&mut self, id: &RunId, why: &str) -> Result<Outcome, Refusal> {
        let Some(run) = self.live(id) else {
            return match self.ended.get(id) {
                None => Err(Refusal::NoSuchRun(id.clone())),
                Some(ended) if ended.summary.state == RunState::Cancelled => {
                    Ok(Outcome::Run(Box::new(ended.summary.clone())))
                }
                Some(ended) => Err(wrong_state(id, ended.summary.state)),
            };
        };
        if let Some(ended) = &run.record.ended {
            if ended.state != RunState::Cancelled {
                return Err(wrong_state(id, ended.state));
            }
        } else if run.record.stop.is_none() {
            let why = if why.is_empty() { "cancelled" } else { why };
            self.stop_run(id, Failure::new(Reason::Cancelled, why));
        }
        let summary = self.run_summary(id);
        let summary = summary.ok_or_else(|| Refusal::NoSuchRun(id.clone()))?;
        Ok(Outcome::Run(Box::new(summary)))
    }

    pub(super) fn run_timed_out(&mut self, id: &RunId) {
        let timeout = self.live(id).and_then(|run| run.spec.timeout);
        let text = timeout.map_or_else(String::new, |timeout| {
            format!("the run took longer than its `timeout` of {timeout}")
        });
        self.stop_run(id, Failure::new(Reason::Timeout, text));
    }

    /// Starts nothing more in a run, and stops what runs.
    pub(super) fn stop_run(&mut self, id: &RunId, failure: Failure) {
        let Some(&seq) = self.run_ids.get(id) else {
            return;
        };
        let now = self.now;
        let Some(run) = self.runs.get_mut(&seq) else {
            return;
        };
        self.deciding = Some(id.clone());
        run.record.stop = Some(StopRecord { at: now, failure });
        let stages = run.stages.len();
        self.touch_run(seq, true);
        for stage in 0..stages {
            self.sweep_stage(seq, stage);
        }
        self.settle(seq);
    }

    /// All tasks have ended: so has the run.
    pub(super) fn end_run(&mut self, seq: RunSeq) {
        let now = self.now;
        let Some(run) = self.runs.get_mut(&seq) else {
            return;
        };
        let cancelled = run.tasks.iter().any(|t| t.state == TaskState::Cancelled);
        let stop = run.record.stop.as_ref().filter(|_| cancelled);
        let failure = stop
            .map(|stop| stop.failure.clone())
            .or_else(|| run.record.failure.as_ref().map(|f| f.failure.clone()));
        let state = match (&failure, stop) {
            (None, _) => RunState::Succeeded,
            (Some(f), Some(_)) if f.reason == Reason::Cancelled => RunState::Cancelled,
            (Some(_), _) => RunState::Failed,
        };
        run.record.ended = Some(EndRecord {
            state,
            at: now,
            failure,
        });
        let archived = Arc::new(run.archived());
        self.touch_run(seq, true);
        self.effect(Effect::Archive(archived));
    }

    /// The ended run lies in the object store: its records leave the state.
    pub(super) fn archived(&mut self, id: &RunId, archive: Digest) {
        let Some(&seq) = self.run_ids.get(id) else {
            return;
        };
        if self
            .runs
            .get(&seq)
            .is_none_or(|run| run.record.ended.is_none())
        {
            return;
        }
        let Some(run) = self.runs.remove(&seq) else {
            return;
        };
        self.run_ids.remove(id);
        if run.tasks.iter().any(|task| task.stored || task.dirty) {
            self.out.writes.push(Write::DeletePrefix {
                prefix: keys::tasks(id),
            });
        }
        let delete = |key| Write::Delete { key };
        self.out.writes.push(delete(keys::run(id)));
        if self.poison.remove(id).is_some() {
            self.out.writes.push(delete(keys::poison(id)));
        }
        let ended = EndedRun {
            summary: run.summary(),
            archive,
            request_id: run.record.request_id.clone(),
        };
        self.out.writes.push(Write::Put {
            key: keys::ended(id),
            value: encode(&ended),
        });
        self.remember(ended);
        self.untell(id.to_string());
        while self.ended.len() > self.config.max_ended_runs {
            let Some((_, oldest)) = self.ended_order.first().cloned() else {
                break;
            };
            self.drop_ended(&oldest);
        }
    }

    /// Takes in an ended run.
    pub(super) fn remember(&mut self, ended: EndedRun) {
        let id = ended.summary.run.clone();
        if let Some(request) = &ended.request_id {
            self.requests.insert(request.clone(), id.clone());
        }
        self.ended_order
            .insert((ended.summary.created_at, id.clone()));
        self.ended.insert(id, ended);
    }

    fn drop_ended(&mut self, id: &RunId) -> Option<EndedRun> {
        let ended = self.ended.remove(id)?;
        self.ended_order
            .remove(&(ended.summary.created_at, id.clone()));
        if let Some(request) = &ended.request_id {
            self.requests.remove(request);
        }
        self.out.writes.push(Write::Delete {
            key: keys::ended(id),
        });
        self.never_tell(id.as_str());
        Some(ended)
    }

    pub(super) fn forget(&mut self, runs: Vec<RunId>) {
        let known = runs.into_iter();
        let known: BTreeSet<RunId> = known.filter(|id| self.drop_ended(id).is_some()).collect();
        self.cache.drop_runs(&known, &mut self.out.writes);
    }

    /// Starts an ended run again: what succeeded on inputs that stay as they are is kept.
    pub(super) fn retry(&mut self, archived: ArchivedRun) -> Result<Outcome, Refusal> {
        let id = archived.view.summary.run.clone();
        if let Some(run) = self.live(&id) {
            return Err(wrong_state(&id, run.state()));
        }
        let Some(ended) = self.ended.get(&id) else {
            return Err(Refusal::NoSuchRun(id));
        };
        if ended.summary.state == RunState::Succeeded {
            return Err(wrong_state(&id, RunState::Succeeded));
        }
        // Another client may have retried it since this archive was read: from an old archive,
        // attempts would get numbers that have been used.
        if ended.summary.finished_at != archived.view.summary.finished_at {
            return Err(Refusal::WrongState {
                run: id,
                state: ended.summary.state.as_str(),
                hint: "it has run again in the meantime; look at it, then retry",
            });
        }
        let summary = archived.view.summary;
        let record = RunRecord {
            run: id.clone(),
            pipeline: summary.pipeline,
            revision: summary.revision,
            spec: checked_blob(&archived.spec)?,
            epoch: self.epoch,
            params: summary.params,
            priority: summary.priority,
            no_cache: archived.no_cache,
            base_dir: archived.base_dir,
            files: archived.files,
            trigger: summary.trigger,
            traceparent: summary.traceparent,
            change: archived.change,
            repairs: summary.repairs,
            request_id: ended.request_id.clone(),
            created_at: summary.created_at,
            resumed_at: self.now,
            started_at: summary.started_at,
            failure: None,
            stop: None,
            ended: None,
        };
        let mut run = Run::new(record, archived.spec)?;
        let mut kept = BTreeSet::new();
        let views = archived.view.tasks.iter();
        let views: std::collections::BTreeMap<_, _> =
            views.map(|view| (&view.task, view)).collect();
        for stage in run.order() {
            let fixed = run.stages[stage]
                .upstream
                .iter()
                .all(|up| kept.contains(up));
            let fixed = fixed && run.stage_spec(stage).run_if != RunIf::Failure;
            let mut whole = fixed;
            let (first, count) = (run.stages[stage].first, run.stages[stage].count);
            for number in first..first + count {
                let name = run.name_of(u32::try_from(number).unwrap_or(u32::MAX));
                let view = views.get(&name).copied();
                let done = view.is_some_and(|view| fixed && view.state.is_done());
                // A skip is decided again, and may come out otherwise: what another task's failure
                // cut off runs now. So what follows it is decided again, too.
                whole &= done;
                let task = &mut run.tasks[number];
                if let Some(view) = view.filter(|view| done || view.attempt > 0) {
                    let record = record_of(view, done);
                    #[cfg(test)]
                    let record = match self.sabotage {
                        Some(super::sim::Sabotage::NumbersAnew) if !done => TaskRecord::default(),
                        _ => record,
                    };
                    task.record = Some(Box::new(record));
                }
                if let Some(view) = view.filter(|_| done) {
                    task.note.clone_from(&view.note);
                    task.ready_at = view.ready_at.unwrap_or_default();
                }
            }
            if whole {
                kept.insert(stage);
            }
        }
        self.admit(&run)?;
        self.drop_ended(&id);
        let seq = self.insert(run);
        self.touch_run(seq, true);
        let tasks = self.runs.get(&seq).map_or(0, |run| run.tasks.len());
        for task in 0..u32::try_from(tasks).unwrap_or(u32::MAX) {
            let at = TaskRef { run: seq, task };
            let Some(run) = self.runs.get_mut(&seq) else {
                break;
            };
            let Some(record) = &run.tasks[task as usize].record else {
                continue;
            };
            let ended_at = record.finished_at.unwrap_or_default();
            match record.written {
                Written::Succeeded => self.finish(at, TaskState::Succeeded, ended_at, true),
                Written::Cached => {
                    run.cached += 1;
                    self.finish(at, TaskState::Cached, ended_at, true);
                }
                _ => self.touch(at, true),
            }
        }
        self.settle(seq);
        let summary = self.run_summary(&id);
        let summary = summary.ok_or(Refusal::NoSuchRun(id))?;
        Ok(Outcome::Run(Box::new(summary)))
    }
}

/// A task's record from its view; of one that starts again only the attempt's number stays.
fn record_of(view: &TaskView, done: bool) -> TaskRecord {
    if !done {
        return TaskRecord {
            attempt: view.attempt,
            ..TaskRecord::default()
        };
    }
    TaskRecord {
        written: if view.state == TaskState::Cached {
            Written::Cached
        } else {
            Written::Succeeded
        },
        attempt: view.attempt,
        reported: view.attempt,
        worker: view.worker.clone(),
        ready_at: view.ready_at.unwrap_or_default(),
        started_at: view.started_at,
        finished_at: view.finished_at,
        outputs: view.outputs.clone(),
        results: view.results.clone(),
        note: view.note.clone(),
        cached_from: view.cached_from.clone(),
        timing: view.timing,
        earlier: view.earlier.clone(),
        again_at: view.again_at,
        ..TaskRecord::default()
    }
}

fn checked_blob(spec: &Arc<PipelineSpec>) -> Result<Digest, Refusal> {
    let blob = spec_blob(spec);
    if blob.len() > MAX_SPEC_BYTES {
        return Err(Refusal::TooLarge(format!(
            "the pipeline takes {} bytes as JSON, at most {MAX_SPEC_BYTES} are kept",
            blob.len()
        )));
    }
    Ok(Digest::of(&blob))
}

fn wrong_state(run: &RunId, state: RunState) -> Refusal {
    Refusal::WrongState {
        run: run.clone(),
        state: state.as_str(),
        hint: match state {
            RunState::Succeeded => "submit it again to run it anew",
            RunState::Failed | RunState::Cancelled => "`runs retry` starts it again",
            _ => "wait for its end, or cancel it",
        },
    }
}
