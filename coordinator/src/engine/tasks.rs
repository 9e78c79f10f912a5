//! What becomes of a task: waiting, queued, running, retried, ended.
//!
//! Every change ends with [`Engine::settle`], which opens the stages that have become ready and
//! ends the run when nothing is left. A task's end touches its own stage's counters only.

use emberline_common::{
    failure::{Failure, Reason},
    ids::AttemptId,
    run_view::{ArtifactRef, ModelVersion, Results, TaskState},
    spec::RunIf,
    time::Timestamp,
};

use super::{
    Engine,
    api::{AttemptReport, AttemptSuccess, Effect, SessionId},
    cache::never,
    conditions::{self, Gate},
    deadlines::Due,
    records::{CacheRecord, FirstFailure, MAX_OUTPUTS, MAX_RESULTS_BYTES, Written, encode},
    retries::{Verdict, judge},
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
    fn end_unretried(&mut self, at: TaskRef) {
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
        let record = task.record();
        record.written = Written::Failed;
        record.failure = Some(failure);
        self.finish(at, TaskState::Failed, now, true);
    }

    /// The task of an attempt, if that attempt is current.
    pub(super) fn current(&self, id: &AttemptId) -> Option<TaskRef> {
        let run = *self.run_ids.get(&id.run)?;
        let live = self.runs.get(&run)?;
        let task = live.find(&id.task)?;
        let found = &live.tasks[task as usize];
        #[cfg(test)]
        if self.sabotage == Some(super::sim::Sabotage::StaleAttempts) && !found.state.is_final() {
            return Some(TaskRef { run, task });
        }
        (found.state == TaskState::Running && found.attempt() == id.attempt)
            .then_some(TaskRef { run, task })
    }

    /// Takes a report, or refuses it.
    pub(super) fn report(&mut self, session: SessionId, report: AttemptReport) {
        // A session that is over gets no answer: a refusal could make the worker throw away what
        // its newer session is about to report.
        let Some(worker) = self.fleet.name_of(session) else {
            return;
        };
        self.tick();
        let id = report.id.clone();
        #[cfg(test)]
        let leak = self.sabotage == Some(super::sim::Sabotage::LeakedAttempts);
        #[cfg(not(test))]
        let leak = false;
        if !leak {
            self.fleet.release(&worker, &id);
        }
        let at = self.current(&id).filter(|at| {
            let record = self
                .runs
                .get(&at.run)
                .map(|r| &r.tasks[at.task as usize].record);
            record
                .and_then(|r| r.as_ref())
                .is_some_and(|r| r.worker.as_ref() == Some(&worker))
        });
        let Some(at) = at else {
            let known = self.run_ids.get(&id.run).and_then(|seq| self.runs.get(seq));
            let task = known.and_then(|run| Some(&run.tasks[run.find(&id.task)? as usize]));
            let record = task.and_then(|task| task.record.as_ref());
            let committed = record.is_some_and(|r| {
                id.attempt > 0 && r.reported == id.attempt && r.worker.as_ref() == Some(&worker)
            });
            return self.effect(Effect::Ack {
                session,
                attempt: id,
                committed,
            });
        };
        self.deciding = Some(id.run.clone());
        let asked = self.fleet.workers.get(&worker).is_some_and(|w| w.draining);
        if let Some(run) = self.runs.get_mut(&at.run) {
            let record = run.tasks[at.task as usize].record();
            record.reported = id.attempt;
            record.timing = report.timing;
        }
        let outcome = match report.outcome {
            Ok(success) => match self.commit(at, &success) {
                Ok(()) => Ok(success),
                Err(what) => Err(super::api::AttemptFailure {
                    failure: Failure::new(Reason::UserError, what),
                    bad_manifest: None,
                    outputs: Vec::new(),
                    results: Results::new(),
                }),
            },
            failed => failed,
        };
        match outcome {
            Ok(success) => {
                if let Some(worker) = self.fleet.workers.get_mut(&worker) {
                    worker.has(success.outputs.iter().map(|output| output.manifest));
                }
                let now = self.now;
                self.finish(at, TaskState::Succeeded, now, true);
            }
            Err(failure) => {
                if let Some(bad) = &failure.bad_manifest {
                    self.cache.drop_manifest(bad, &mut self.out.writes);
                }
                let kept = check_size(&failure.outputs, &failure.results).is_ok();
                let Failure { reason, message } = failure.failure;
                // Cut again: what comes from a worker need not have been.
                let text = Failure::new(reason, message);
                let shown = kept.then_some((failure.outputs, failure.results));
                self.attempt_ended(at, text, asked, shown);
            }
        }
        self.effect(Effect::Ack {
            session,
            attempt: id,
            committed: true,
        });
        self.settle(at.run);
    }

    /// Takes over what a successful attempt produced: outputs, results, registration, cache entry.
    ///
    /// # Errors
    /// What is wrong with it. Nothing has changed then.
    fn commit(&mut self, at: TaskRef, success: &AttemptSuccess) -> Result<(), String> {
        check_size(&success.outputs, &success.results)?;
        let Some(run) = self.runs.get(&at.run) else {
            return Ok(());
        };
        let stage = run.tasks[at.task as usize].stage as usize;
        let name = run.name_of(at.task);
        let spec = run.spec.clone();
        let spec = &spec.stages[stage];
        if let Some(registration) = &success.registration {
            let manifest = registration.artifact.manifest;
            let lineage = Self::lineage(run, stage);
            let own = success.outputs.iter().any(|o| o.manifest == manifest);
            if !own && !self.is_input(at, manifest) {
                return Err(format!(
                    "the model {} to register is neither an input nor an output of `{name}`",
                    manifest.short()
                ));
            }
            let version = ModelVersion {
                registration: registration.clone(),
                version: 0,
                run: run.record.run.clone(),
                task: name.clone(),
                pipeline: run.record.pipeline.clone(),
                pipeline_revision: run.record.revision,
                lineage,
                created_at: self.now,
            };
            self.models.register(version, &mut self.out.writes)?;
        }
        let now = self.now;
        let Some(run) = self.runs.get_mut(&at.run) else {
            return Ok(());
        };
        let record = run.tasks[at.task as usize].record();
        record.written = Written::Succeeded;
        record.failure = None;
        record.outputs.clone_from(&success.outputs);
        record.results.clone_from(&success.results);
        let Some(key) = record.key else {
            return Ok(());
        };
        let run = &self.runs[&at.run];
        let Ok(prepared) = self.prepare(run, stage, run.tasks[at.task as usize].index) else {
            return Ok(());
        };
        let version = self.kind_version(spec.kind.as_str()).unwrap_or(1);
        let fingerprint = prepared.fingerprint(run, stage, version);
        // If the key would be another one now (the champion moved, say), the entry says less of
        // why a later task is not reused, but it is as right: the key is that of the attempt.
        let entry = CacheRecord {
            run: run.record.run.clone(),
            task: name,
            pipeline: run.record.pipeline.clone(),
            created_at: now,
            outputs: success.outputs.clone(),
            results: success.results.clone(),
            spec: fingerprint.spec,
            inputs: fingerprint.inputs,
        };
        let limit = self.config.max_cache_entries;
        self.cache.put(key, entry, limit, &mut self.out.writes);
        Ok(())
    }

    fn is_input(&self, at: TaskRef, manifest: emberline_common::ids::Digest) -> bool {
        let Some(run) = self.runs.get(&at.run) else {
            return false;
        };
        let stage = run.tasks[at.task as usize].stage as usize;
        let mut upstream = run.stages[stage].upstream.iter().map(|up| &run.stages[*up]);
        upstream.any(|up| {
            let mut tasks = run.tasks[up.first..up.first + up.count].iter();
            tasks.any(|task| {
                let record = task.record.as_ref();
                record.is_some_and(|r| r.outputs.iter().any(|o| o.manifest == manifest))
            })
        })
    }

    /// What follows an attempt that did not succeed. `asked`: its worker is draining.
    pub(super) fn attempt_ended(
        &mut self,
        at: TaskRef,
        failure: Failure,
        asked: bool,
        shown: Option<(Vec<ArtifactRef>, Results)>,
    ) {
        let now = self.now;
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let stage = run.tasks[at.task as usize].stage as usize;
        let cut = run.cut(stage).is_some();
        let stopped = run.record.stop.is_some();
        let retries = &run.spec.stages[stage].retries;
        let task = &mut run.tasks[at.task as usize];
        let record = task.record.get_or_insert_default();
        let reason = failure.reason;
        record.failure = Some(failure);
        if let Some((outputs, results)) = shown {
            (record.outputs, record.results) = (outputs, results);
        }
        if stopped {
            record.written = Written::Cancelled;
            return self.finish(at, TaskState::Cancelled, now, true);
        }
        #[cfg(test)]
        if self.sabotage == Some(super::sim::Sabotage::EndlessRetries) {
            record.spent = super::records::Spent::default();
        }
        match judge(retries, &mut record.spent, reason, asked, &mut self.random) {
            Verdict::Again(_) if cut => self.end_unretried(at),
            Verdict::Again(wait) if wait.is_zero() => {
                record.written = Written::Pending;
                task.note = format!("attempt {} ended: {reason}", record.attempt);
                self.unqueue(at);
                self.enqueue(at);
                self.touch(at, true);
            }
            Verdict::Again(wait) => {
                let until = now.after(wait);
                record.written = Written::Backoff;
                record.retry_at = Some(until);
                let attempt = record.attempt;
                task.note = format!("attempt {attempt} ended: {reason}; the next one waits");
                task.state = TaskState::Backoff;
                self.deadlines
                    .add(until, Due::Backoff { task: at, attempt });
                self.touch(at, true);
            }
            Verdict::Final(why) => {
                record.written = Written::Failed;
                why.clone_into(&mut task.note);
                self.finish(at, TaskState::Failed, now, true);
            }
        }
    }

    /// Asks a running attempt to stop; what it reports first still counts.
    fn stop_attempt(&mut self, at: TaskRef) {
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let name = run.name_of(at.task);
        let id = run.record.run.clone();
        let task = &mut run.tasks[at.task as usize];
        let Some(record) = &task.record else { return };
        let attempt = record.attempt;
        let worker = record.worker.as_ref();
        let worker = worker.and_then(|worker| self.fleet.workers.get(worker));
        if let Some(worker) = worker.filter(|worker| worker.suspect_since.is_none()) {
            self.out.effects.push(Effect::Stop {
                session: worker.session,
                attempt: AttemptId {
                    run: id,
                    task: name,
                    attempt,
                },
            });
        }
        let until = self.now.after(self.config.stop_grace);
        self.deadlines
            .add(until, Due::StopGrace { task: at, attempt });
    }

    /// Asks the attempts of a run that is to stop again, after their worker came back.
    pub(super) fn stop_again(&mut self, at: TaskRef) {
        let stop = |run: &super::run::Run| run.record.stop.is_some();
        if self.runs.get(&at.run).is_some_and(stop) {
            self.stop_attempt(at);
        }
    }

    pub(super) fn stop_grace_over(&mut self, at: TaskRef) {
        let why = Failure::new(Reason::Cancelled, "it did not stop when told to");
        self.attempt_ended(at, why, false, None);
        self.settle(at.run);
    }

    pub(super) fn attempt_timed_out(&mut self, at: TaskRef) {
        let Some(run) = self.runs.get(&at.run) else {
            return;
        };
        self.deciding = Some(run.record.run.clone());
        let stage = run.tasks[at.task as usize].stage as usize;
        let limit = run.stage_spec(stage).timeout;
        let text = limit.map_or_else(String::new, |limit| {
            format!("the attempt took longer than its `timeout` of {limit}, and its worker did not stop it")
        });
        self.stop_attempt(at);
        self.attempt_ended(at, Failure::new(Reason::Timeout, text), false, None);
        self.settle(at.run);
    }

    pub(super) fn backoff_over(&mut self, at: TaskRef) {
        self.unqueue(at);
        if let Some(run) = self.runs.get_mut(&at.run) {
            // So that the deadline is void from now on; the store need not know.
            run.tasks[at.task as usize].record().written = Written::Pending;
        }
        self.enqueue(at);
    }
}

fn check_size(outputs: &[ArtifactRef], results: &Results) -> Result<(), String> {
    if outputs.len() > MAX_OUTPUTS {
        return Err(format!(
            "{} outputs are reported, at most {MAX_OUTPUTS} are kept",
            outputs.len()
        ));
    }
    let bytes = encode(results).len();
    if bytes > MAX_RESULTS_BYTES {
        return Err(format!(
            "the results take {bytes} bytes as JSON, at most {MAX_RESULTS_BYTES} are kept"
        ));
    }
    Ok(())
}
