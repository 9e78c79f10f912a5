//! What an attempt comes to: reported, refused, committed, retried, stopped, timed out.
//!
//! A report counts only while its attempt is current and comes from the worker that was given it;
//! whatever else arrives is answered and changes nothing. Start with [`Engine::report`].

use std::collections::BTreeMap;

use emberline_common::{
    failure::{Failure, Reason},
    ids::AttemptId,
    run_view::{
        ArtifactRef, CodeRevision, MAX_RESULTS_BYTES, MadeBy, ModelVersion, Origin, Results,
        TaskState,
    },
};

use super::{
    Engine,
    api::{AttemptReport, AttemptSuccess, Effect, Observe, SessionId},
    deadlines::Due,
    records::{CacheRecord, MAX_OUTPUTS, Written, encode},
    retries::{Verdict, judge},
    run::TaskRef,
};

impl Engine {
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
            if let Some(why) = self.refuses_clients(at, registration) {
                return Err(why);
            }
            let model = registration.model.clone();
            let environment = self.target_of(at);
            let version = ModelVersion {
                registration: registration.clone(),
                version: 0,
                origin: Origin::Run(MadeBy {
                    run: run.record.run.clone(),
                    task: name.clone(),
                    pipeline: run.record.pipeline.clone(),
                    pipeline_revision: run.record.revision,
                }),
                lineage,
                code: run.record.change.as_ref().and_then(CodeRevision::of),
                parent: self.parent_of(&model, environment, registration.alias.as_ref()),
                tags: BTreeMap::new(),
                created_at: self.now,
            };
            let version = self.models.register(version, &mut self.out.writes)?;
            self.deploy(at, &model, version, registration.alias.as_ref());
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
        self.observe_failure(failure.reason);
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
                record.remember(task.ready_at, now, reason, now);
                record.written = Written::Pending;
                task.note = format!("attempt {} ended: {reason}", record.attempt);
                self.unqueue(at);
                self.enqueue(at);
                self.touch(at, true);
            }
            Verdict::Again(wait) => {
                let until = now.after(wait);
                record.remember(task.ready_at, now, reason, until);
                record.written = Written::Backoff;
                record.retry_at = Some(until);
                let attempt = record.attempt;
                task.note = format!("attempt {attempt} ended: {reason}");
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

    pub(super) fn observe_failure(&mut self, reason: Reason) {
        if self.config.observe > Observe::Nothing {
            self.effect(Effect::AttemptFailed(reason));
        }
    }

    /// Asks a running attempt to stop; what it reports first still counts.
    pub(super) fn stop_attempt(&mut self, at: TaskRef) {
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
