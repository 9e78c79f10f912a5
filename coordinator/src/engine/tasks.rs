//! What becomes of a task: waiting, queued, skipped, ended. What its attempts come to is in
//! `attempts`.
//!
//! Every change ends with [`Engine::settle`], which opens the stages that have become ready and
//! ends the run when nothing is left. A task's end touches its own stage's counters only.

use emberline_common::{
    failure::{Failure, Reason},
    run_view::TaskState,
    spec::RunIf,
    time::Timestamp,
};

use super::{
    Engine,
    cache::never,
    conditions::{self, Gate},
    records::{FirstFailure, Written},
    run::{Cut, RunSeq, TaskRef},
};

impl Engine {
    /// Goes on with a run as far as it can go without anything else happening.
    pub(super) fn settle(&mut self, seq: RunSeq) {
        loop {
            let Some(run) = self.runs.get_mut(&seq) else {
                return;
            };
            if let Some(stage) = run.to_open.pop_front() {
                self.open_stage(seq, stage);
            } else if run.active == 0 && !run.parked.is_empty() && !self.loading {
                // Nothing can fail any more: what waits for a failure waits in vain.
                let Some(stage) = run.parked.pop_first() else {
                    continue;
                };
                self.skip_parked(seq, stage);
            } else if run.active == 0 && run.unfinished > 0 && !self.loading {
                // Cannot be; if it is, the run must end all the same, and say so.
                debug_assert!(false, "run {} is stuck", run.record.run);
                let tasks = 0..u32::try_from(run.tasks.len()).unwrap_or(u32::MAX);
                for task in tasks {
                    let at = TaskRef { run: seq, task };
                    self.fail(
                        at,
                        Failure::new(Reason::System, "the engine lost track of it"),
                    );
                }
            } else {
                break;
            }
        }
        let Some(run) = self.runs.get(&seq) else {
            return;
        };
        if run.unfinished == 0 && run.record.ended.is_none() && !self.loading {
            self.end_run(seq);
        }
    }

    fn open_stage(&mut self, seq: RunSeq, stage: usize) {
        let Some(run) = self.runs.get_mut(&seq) else {
            return;
        };
        let upstream = run.stages[stage].upstream.iter();
        let latest = upstream.map(|up| run.stages[*up].latest).max();
        let ready_at = latest.unwrap_or_default().max(run.record.resumed_at);
        let cut = run.cut(stage).map(|cut| cut.at());
        if let Some(cut) = cut
            && (!self.loading || ready_at >= cut)
        {
            return self.sweep_stage(seq, stage);
        }
        // It opened only when something had failed, and after that had ended what fails fast.
        let failed_at = run.record.failure.as_ref().map(|failure| failure.at);
        if !run.failure_known
            && run.stage_spec(stage).run_if == RunIf::Failure
            && failed_at.is_some_and(|at| ready_at < at)
        {
            run.parked.insert(stage);
            return;
        }
        match conditions::gate(run, stage) {
            Gate::Open => {}
            Gate::Park => {
                run.parked.insert(stage);
                return;
            }
            Gate::Skip { benign, why } => {
                return self.skip_stage(seq, stage, ready_at, benign, &why);
            }
        }
        let (first, count) = (run.stages[stage].first, run.stages[stage].count);
        for number in first..first + count {
            let task = u32::try_from(number).unwrap_or(u32::MAX);
            self.open_task(TaskRef { run: seq, task }, stage, ready_at);
        }
    }

    fn open_task(&mut self, at: TaskRef, stage: usize, ready_at: Timestamp) {
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let task = &mut run.tasks[at.task as usize];
        if task.state != TaskState::Waiting {
            return;
        }
        task.ready_at = ready_at;
        let index = task.index;
        match conditions::when(run, stage, index) {
            Err(why) => return self.fail_unstarted(at, why),
            Ok(Some(why)) => return self.skip(at, ready_at, true, why),
            Ok(None) => {}
        }
        let Some(run) = self.runs.get(&at.run) else {
            return;
        };
        let spec = run.stage_spec(stage);
        let mut note = String::new();
        let mut reuse = None;
        let kind = spec.kind.as_str();
        if matches!(kind, "noop" | "report" | "deploy") {
            "this kind is never reused".clone_into(&mut note);
        } else {
            let prepared = match self.prepare(run, stage, index) {
                Ok(prepared) => prepared,
                Err(why) => return self.fail_unstarted(at, why),
            };
            if let Some(why) = never(spec, &prepared.with) {
                why.clone_into(&mut note);
            } else if run.record.no_cache {
                "--no-cache".clone_into(&mut note);
            } else if let Some(version) = self.kind_version(kind) {
                let fingerprint = prepared.fingerprint(run, stage, version);
                let key = fingerprint.key();
                // A new leader goes on where the old one was: what is queued stays queued.
                if !self.loading && self.cache.peek(&key).is_some() {
                    reuse = Some(key);
                } else {
                    let name = run.name_of(at.task);
                    let pipeline = &run.record.pipeline;
                    note = self.cache.explain(pipeline, &name, &fingerprint);
                }
            }
        }
        #[cfg(test)]
        if self.sabotage == Some(super::sim::Sabotage::AnyCacheEntry) && !self.loading {
            reuse = reuse.or_else(|| self.cache.any());
        }
        let hit = reuse.and_then(|key| Some((key, self.cache.take(&key)?)));
        let now = self.now;
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let task = &mut run.tasks[at.task as usize];
        task.note = note;
        if let Some((key, entry)) = hit {
            task.note = format!("same spec and inputs as in run {}", entry.run);
            let record = task.record();
            record.written = Written::Cached;
            record.outputs = entry.outputs;
            record.results = entry.results;
            record.cached_from = Some(entry.run);
            record.key = Some(key);
            record.failure = None;
            run.cached += 1;
            self.finish(at, TaskState::Cached, now, true);
        } else {
            self.enqueue(at);
        }
    }

    /// Puts a task into the queue.
    pub(super) fn enqueue(&mut self, at: TaskRef) {
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let task = &mut run.tasks[at.task as usize];
        task.state = TaskState::Queued;
        run.active += 1;
        let shape = &run.stages[task.stage as usize].shape;
        let (priority, pipeline) = (run.record.priority, &run.record.pipeline);
        self.queue
            .push(shape, priority, pipeline, task.ready_at, at);
        self.touch(at, false);
    }

    /// Takes a task out of what is queued, running or waiting for its backoff.
    pub(super) fn unqueue(&mut self, at: TaskRef) {
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let task = &run.tasks[at.task as usize];
        match task.state {
            TaskState::Queued => {
                let shape = &run.stages[task.stage as usize].shape;
                let (priority, pipeline) = (run.record.priority, &run.record.pipeline);
                let found = self
                    .queue
                    .remove(shape, priority, pipeline, task.ready_at, at);
                debug_assert!(found, "a queued task is in the queue");
                run.active -= 1;
            }
            TaskState::Running | TaskState::Backoff => run.active -= 1,
            _ => {}
        }
    }

    /// Brings a task to a final state.
    pub(super) fn finish(&mut self, at: TaskRef, state: TaskState, when: Timestamp, write: bool) {
        self.unqueue(at);
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let task = &mut run.tasks[at.task as usize];
        debug_assert!(!task.state.is_final(), "a final state is final");
        if task.state.is_final() {
            return;
        }
        task.state = state;
        task.ended_at = when;
        if let Some(record) = &mut task.record
            && write
        {
            record.finished_at = Some(when);
            record.retry_at = None;
        }
        let bad = match state {
            TaskState::Succeeded | TaskState::Cached => false,
            TaskState::Skipped => !task.benign,
            _ => true,
        };
        let number = task.stage as usize;
        let failure = (state == TaskState::Failed)
            .then(|| task.record.as_ref().and_then(|r| r.failure.clone()))
            .flatten();
        let tried = task.record.as_ref().is_some_and(|r| r.started_at.is_some());
        run.count_end(number, when, bad);
        self.live_tasks = self.live_tasks.saturating_sub(1);
        let mut first = None;
        if let Some(failure) = failure
            && run.record.failure.is_none()
        {
            let task = run.name_of(at.task);
            first = Some(FirstFailure {
                task,
                at: when,
                failure,
            });
        }
        self.touch(at, write);
        if state == TaskState::Failed && tried {
            self.deploy_failed(at);
        }
        if let Some(first) = first {
            self.first_failure(at.run, first);
        }
    }

    fn first_failure(&mut self, seq: RunSeq, first: FirstFailure) {
        let Some(run) = self.runs.get_mut(&seq) else {
            return;
        };
        run.record.failure = Some(first);
        let parked = std::mem::take(&mut run.parked);
        run.to_open.extend(parked);
        let stages = run.stages.len();
        let fail_fast = run.spec.fail_fast;
        self.touch_run(seq, true);
        if fail_fast {
            for stage in 0..stages {
                let Some(run) = self.runs.get(&seq) else {
                    return;
                };
                if run.stage_spec(stage).run_if == RunIf::Success {
                    self.sweep_stage(seq, stage);
                }
            }
        }
    }

    /// Ends what has not started in a stage in which nothing new may start.
    pub(super) fn sweep_stage(&mut self, seq: RunSeq, stage: usize) {
        let Some(run) = self.runs.get(&seq) else {
            return;
        };
        let Some(cut) = run.cut(stage) else { return };
        #[cfg(test)]
        if self.sabotage == Some(super::sim::Sabotage::DeafToStop) && run.active > 0 {
            return;
        }
        if run.stages[stage].unfinished == 0 {
            return;
        }
        let (when, why) = (cut.at(), cut.to_string());
        let cancels = matches!(cut, Cut::Stopped(_));
        let stops = run.record.stop.is_some();
        let (first, count) = (run.stages[stage].first, run.stages[stage].count);
        for number in first..first + count {
            let at = TaskRef {
                run: seq,
                task: u32::try_from(number).unwrap_or(u32::MAX),
            };
            let Some(run) = self.runs.get_mut(&seq) else {
                return;
            };
            let task = &mut run.tasks[number];
            let tried = task.record.as_ref().and_then(|r| r.started_at).is_some();
            match task.state {
                TaskState::Backoff => self.end_unretried(at),
                TaskState::Queued if tried => self.end_unretried(at),
                TaskState::Waiting | TaskState::Queued if cancels => {
                    task.note.clone_from(&why);
                    self.finish(at, TaskState::Cancelled, when, false);
                }
                TaskState::Waiting | TaskState::Queued => {
                    self.skip(at, when, false, format!("not started: {why}"));
                }
                TaskState::Running if stops => self.stop_attempt(at),
                _ => {}
            }
        }
    }

    /// Ends a task that would have had another attempt, but must not.
    pub(super) fn end_unretried(&mut self, at: TaskRef) {
        let now = self.now;
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let stage = run.tasks[at.task as usize].stage as usize;
        let stop = run.record.stop.as_ref();
        let (written, state, note) = match (stop, run.cut(stage)) {
            (Some(stop), _) => {
                let note = stop.failure.message.clone();
                (Written::Cancelled, TaskState::Cancelled, note)
            }
            (None, cut) => {
                let why = cut.map(|cut| cut.to_string()).unwrap_or_default();
                let note = format!("not tried again: {why}");
                (Written::Failed, TaskState::Failed, note)
            }
        };
        let task = &mut run.tasks[at.task as usize];
        task.note = note;
        task.record().written = written;
        self.finish(at, state, now, true);
    }

    fn skip_stage(&mut self, seq: RunSeq, stage: usize, when: Timestamp, benign: bool, why: &str) {
        let Some(run) = self.runs.get(&seq) else {
            return;
        };
        let (first, count) = (run.stages[stage].first, run.stages[stage].count);
        for number in first..first + count {
            let task = u32::try_from(number).unwrap_or(u32::MAX);
            self.skip(TaskRef { run: seq, task }, when, benign, why.to_owned());
        }
    }

    /// Skips a stage that waited for a failure. What follows may fail yet, so that this is written:
    /// a new leader could not tell.
    fn skip_parked(&mut self, seq: RunSeq, stage: usize) {
        let now = self.now;
        let Some(run) = self.runs.get(&seq) else {
            return;
        };
        let (first, count) = (run.stages[stage].first, run.stages[stage].count);
        for number in first..first + count {
            let task = u32::try_from(number).unwrap_or(u32::MAX);
            let at = TaskRef { run: seq, task };
            let Some(run) = self.runs.get_mut(&seq) else {
                return;
            };
            let task = &mut run.tasks[number];
            if task.state != TaskState::Waiting {
                continue;
            }
            task.benign = true;
            "nothing failed".clone_into(&mut task.note);
            task.record().written = Written::Skipped;
            self.finish(at, TaskState::Skipped, now, true);
        }
    }

    fn skip(&mut self, at: TaskRef, when: Timestamp, benign: bool, why: String) {
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let task = &mut run.tasks[at.task as usize];
        if !matches!(task.state, TaskState::Waiting | TaskState::Queued) {
            return;
        }
        task.benign = benign;
        task.note = why;
        self.finish(at, TaskState::Skipped, when, false);
    }

    /// Fails a task that could not even start: the pipeline is wrong.
    pub(super) fn fail_unstarted(&mut self, at: TaskRef, why: String) {
        self.fail(at, Failure::new(Reason::UserError, why));
    }

    fn fail(&mut self, at: TaskRef, failure: Failure) {
        self.tick();
        let now = self.now;
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let task = &mut run.tasks[at.task as usize];
        if task.state.is_final() {
            return;
        }
        let reason = failure.reason;
        let record = task.record();
        record.written = Written::Failed;
        record.failure = Some(failure);
        self.observe_failure(reason);
        self.finish(at, TaskState::Failed, now, true);
    }
}
