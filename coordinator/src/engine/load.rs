//! A new leader takes over: from records to the state that the old leader had.
//!
//! Records say what cannot be derived; the rest (which stages are open, queued, skipped, cut off)
//! follows from the same rules as live, with the times that stand in the records. Running attempts
//! wait for their workers until the adoption window closes.

use std::{collections::BTreeMap, sync::Arc};

use emberline_common::{
    delivery::{Deployment, RolloutPhase},
    failure::{Failure, Reason},
    ids::{AttemptId, Digest, Epoch, RunId, TaskName},
    run_view::{ModelVersion, TaskState},
    spec::PipelineSpec,
    time::Timestamp,
};

use super::{
    Engine,
    api::{Decision, Effect, EndedRun, EngineConfig, LoadError, Outcome},
    deadlines::Due,
    records::{
        CacheRecord, EnvironmentRecord, ModelRecord, PoisonRecord, RunRecord, TaskRecord, decode,
    },
    run::{Cut, Run, RunSeq, TaskRef, written_state},
};

type Records = [(String, Vec<u8>)];

fn unknown(key: &str) -> LoadError {
    LoadError::Record {
        key: key.to_owned(),
        what: "no such kind of record is known".to_owned(),
    }
}

impl Engine {
    /// What [`Self::load`] will ask for: the SHA-256 of each live run's [`spec_blob`](super::spec_blob).
    ///
    /// # Errors
    /// [`LoadError::Record`] for a run's record that cannot be read.
    pub fn spec_revisions(records: &Records) -> Result<Vec<(RunId, Digest)>, LoadError> {
        let runs = records.iter().filter(|(key, _)| key.starts_with("runs/"));
        runs.map(|(key, value)| {
            let record: RunRecord = decode(key, value)?;
            Ok((record.run, record.spec))
        })
        .collect()
    }

    /// Takes over from the records of an earlier leader. The decision is to be committed before
    /// anything else.
    ///
    /// # Errors
    /// [`LoadError`] if a record or a run's pipeline cannot be read. A leader that cannot read the
    /// state must not lead.
    pub fn load(
        config: EngineConfig,
        epoch: Epoch,
        seed: u64,
        now: Timestamp,
        records: Vec<(String, Vec<u8>)>,
        specs: &dyn Fn(&RunId, &Digest) -> Option<Arc<PipelineSpec>>,
    ) -> Result<(Self, Decision), LoadError> {
        let mut engine = Self::new(config, epoch, seed);
        engine.loading = true;
        let mut latest = now;
        let mut runs: Vec<RunRecord> = Vec::new();
        let mut tasks: BTreeMap<RunId, Vec<(TaskName, TaskRecord)>> = BTreeMap::new();
        let mut cache: Vec<(Digest, CacheRecord)> = Vec::new();
        for (key, value) in &records {
            let parts: Vec<&str> = key.split('/').collect();
            match parts[..] {
                ["schema"] => {}
                ["runs", _] => {
                    let record: RunRecord = decode(key, value)?;
                    latest = latest.max(record.latest());
                    runs.push(record);
                }
                ["tasks", run, task] => {
                    let run = RunId::new(run).map_err(|_| unknown(key))?;
                    let task = TaskName::new(task).map_err(|_| unknown(key))?;
                    let record: TaskRecord = decode(key, value)?;
                    latest = latest.max(record.latest());
                    tasks.entry(run).or_default().push((task, record));
                }
                ["cache", digest] => {
                    let digest = digest.parse().map_err(|_| unknown(key))?;
                    cache.push((digest, decode(key, value)?));
                }
                ["models", model] => {
                    let model = model.parse().map_err(|_| unknown(key))?;
                    let head: ModelRecord = decode(key, value)?;
                    engine.models.load_head(model, head);
                }
                ["models", _, _] => {
                    let version: ModelVersion = decode(key, value)?;
                    latest = latest.max(version.created_at);
                    engine.models.load_version(version);
                }
                ["ended", _] => {
                    let ended: EndedRun = decode(key, value)?;
                    latest = latest.max(ended.summary.finished_at.unwrap_or_default());
                    engine.remember(ended);
                }
                ["deployments", _] => {
                    let deployment: Deployment = decode(key, value)?;
                    latest = latest.max(deployment.finished_at.unwrap_or_default());
                    engine
                        .deployments
                        .insert(deployment.id, Arc::new(deployment));
                }
                ["environments", environment, model] => {
                    let environment = environment.parse().map_err(|_| unknown(key))?;
                    let model = model.parse().map_err(|_| unknown(key))?;
                    let live: EnvironmentRecord = decode(key, value)?;
                    engine.environments.insert((environment, model), live);
                }
                ["merges", _] => engine.remember_merge(decode(key, value)?),
                ["untold", subject] => {
                    engine.untold.insert((*subject).to_owned());
                }
                ["tokens", name] => {
                    let name = name.parse().map_err(|_| unknown(key))?;
                    let record = decode(key, value)?;
                    let access = Arc::make_mut(&mut engine.access);
                    access.tokens.insert(name, record);
                }
                ["credentials", worker] => {
                    let worker = worker.parse().map_err(|_| unknown(key))?;
                    let record = decode(key, value)?;
                    let access = Arc::make_mut(&mut engine.access);
                    access.credentials.insert(worker, record);
                }
                ["poison", run] => {
                    let run = RunId::new(run).map_err(|_| unknown(key))?;
                    let record: PoisonRecord = decode(key, value)?;
                    engine.poison.insert(run, record.deaths);
                }
                _ => return Err(unknown(key)),
            }
        }
        // The old leader's clock may have been ahead of this one's.
        engine.ahead = latest.since(now);
        engine.set_time(now);
        cache.sort_by_key(|(key, record)| (record.created_at, *key));
        for (key, record) in cache {
            engine.cache.insert(key, record);
        }
        // In the order in which they were accepted, as live.
        runs.sort_by(|a, b| (a.resumed_at, &a.run).cmp(&(b.resumed_at, &b.run)));
        let mut seqs = Vec::with_capacity(runs.len());
        for record in runs {
            let id = record.run.clone();
            let missing = || LoadError::MissingSpec {
                run: id.clone(),
                spec: record.spec,
            };
            let spec = specs(&id, &record.spec).ok_or_else(missing)?;
            let run = Run::new(record, spec).map_err(|refusal| LoadError::Run {
                run: id.clone(),
                why: refusal.to_string(),
            })?;
            let seq = engine.insert(run);
            engine.take_over(seq, tasks.remove(&id).unwrap_or_default())?;
            seqs.push(seq);
        }
        engine.loading = false;
        engine.go_on_rolling();
        if !engine.unclaimed.is_empty() {
            let until = engine.now.after(engine.config.adoption_window);
            engine.deadlines.add(until, Due::Adoption);
        }
        for seq in seqs {
            engine.go_on(seq);
        }
        engine.run_due();
        engine.serve();
        engine.deciding = None;
        let decision = engine.take_decision(Ok(Outcome::Done));
        Ok((engine, decision))
    }

    /// What was coming into service still is. Workers that serve come back first.
    fn go_on_rolling(&mut self) {
        self.serving.complete_at = self.now.after(self.config.adoption_window);
        let rolling = self.deployments.values().filter(|d| {
            let phase = d.rollout.as_ref().map(|rollout| rollout.phase);
            phase.is_some_and(|phase| phase != RolloutPhase::Settled)
        });
        let rolling: Vec<_> = rolling
            .map(|d| ((d.environment.clone(), d.model.clone()), d.id))
            .collect();
        for (place, id) in rolling {
            self.serving.rolling.insert(place, id);
            self.begin_phase(id);
        }
    }

    /// Puts a run's tasks where their records say, and derives the rest.
    fn take_over(
        &mut self,
        seq: RunSeq,
        records: Vec<(TaskName, TaskRecord)>,
    ) -> Result<(), LoadError> {
        let Some(run) = self.runs.get_mut(&seq) else {
            return Ok(());
        };
        let id = run.record.run.clone();
        let mut places = Vec::new();
        for (name, record) in records {
            let Some(task) = run.find(&name) else {
                return Err(LoadError::Run {
                    run: id,
                    why: format!("its pipeline has no task `{name}`"),
                });
            };
            places.push((task, record.written, record.retry_at));
            let found = &mut run.tasks[task as usize];
            found.stored = true;
            found.note.clone_from(&record.note);
            found.ready_at = record.ready_at;
            found.ended_at = record.finished_at.unwrap_or_default();
            found.record = Some(Box::new(record));
        }
        for (task, written, retry_at) in places {
            let at = TaskRef { run: seq, task };
            let Some(run) = self.runs.get_mut(&seq) else {
                return Ok(());
            };
            let Some(state) = written_state(written) else {
                continue;
            };
            let name = run.name_of(task);
            let found = &mut run.tasks[task as usize];
            let attempt = found.attempt();
            let stage = found.stage as usize;
            found.state = state;
            match state {
                TaskState::Running => {
                    run.active += 1;
                    let record = found.record.as_ref();
                    let worker = record.and_then(|r| r.worker.clone());
                    let limit = run.stage_spec(stage).timeout;
                    let attempts = AttemptId {
                        run: run.record.run.clone(),
                        task: name,
                        attempt,
                    };
                    let stop = run.record.stop.is_some();
                    if let Some(worker) = worker {
                        self.unclaimed.entry(worker).or_default().insert(attempts);
                    }
                    // Anew from here: its worker keeps the limit exactly, and must have the time
                    // to come and say how the attempt ended while nobody led.
                    if let Some(limit) = limit {
                        let until = self.now.after(limit.0).after(self.config.timeout_slack);
                        self.deadlines
                            .add(until, Due::Attempt { task: at, attempt });
                    }
                    if stop {
                        let until = self.now.after(self.config.stop_grace);
                        self.deadlines
                            .add(until, Due::StopGrace { task: at, attempt });
                    }
                }
                TaskState::Backoff => {
                    run.active += 1;
                    // The clock that this was written by may have been far ahead.
                    let retries = &run.stage_spec(stage).retries;
                    let longest = retries.max_backoff.0.max(retries.backoff.0);
                    let until = retry_at.unwrap_or(self.now).min(self.now.after(longest));
                    self.deadlines
                        .add(until, Due::Backoff { task: at, attempt });
                }
                _ => {
                    let when = found.ended_at;
                    found.benign = state == TaskState::Skipped;
                    let bad = !state.is_done() && !found.benign;
                    run.cached += usize::from(state == TaskState::Cached);
                    run.count_end(stage, when, bad);
                    self.live_tasks = self.live_tasks.saturating_sub(1);
                }
            }
        }
        self.derive(seq);
        Ok(())
    }

    /// Derives what the records of a run leave out, in the order in which it happened: the run goes
    /// its way, fails, and is stopped.
    fn derive(&mut self, seq: RunSeq) {
        if let Some(run) = self.runs.get_mut(&seq) {
            run.failure_known = false;
        }
        self.settle(seq);
        let stages = self.runs.get(&seq).map_or(0, |run| run.stages.len());
        for stopped in [false, true] {
            for stage in 0..stages {
                let run = self.runs.get(&seq);
                let cut = run.and_then(|run| run.cut(stage));
                if cut.is_some_and(|cut| matches!(cut, Cut::Stopped(_)) == stopped) {
                    self.sweep_stage(seq, stage);
                }
            }
            if let Some(run) = self.runs.get_mut(&seq)
                && !std::mem::replace(&mut run.failure_known, true)
                && run.record.failure.is_some()
            {
                let parked = std::mem::take(&mut run.parked);
                run.to_open.extend(parked);
            }
            self.settle(seq);
        }
    }

    /// What a new leader has to do about a run that it has taken over.
    fn go_on(&mut self, seq: RunSeq) {
        let Some(run) = self.runs.get(&seq) else {
            return;
        };
        let id = run.record.run.clone();
        self.deciding = Some(id.clone());
        // Observers of this term have not heard of it.
        self.touch_run(seq, false);
        let Some(run) = self.runs.get(&seq) else {
            return;
        };
        if run.record.ended.is_some() {
            let archived = Arc::new(run.archived());
            return self.effect(Effect::Archive(archived));
        }
        let deaths = self.poison.get(&id).copied().unwrap_or(0);
        if deaths > 0 && deaths >= self.config.poison_limit && run.record.stop.is_none() {
            let text = format!("{deaths} leaders died while deciding on this run: it is put aside");
            return self.stop_run(&id, Failure::new(Reason::System, text));
        }
        self.settle(seq);
    }
}
