//! The engine: a pure state machine that decides everything and does nothing.
//!
//! [`Engine::handle`] takes one [`Command`](api::Command) and the time, and gives a
//! [`Decision`](api::Decision): records to write, effects to let out once they are committed, and
//! an answer. It knows no clock, no network, no disk and no thread, and its only randomness comes
//! from the seed that it is given: the same calls give the same decisions. It must never answer
//! from anything but its own state, and nothing that a client or worker sends may make it panic.
//!
//! The engine's own time never goes back, and each thing that happens has an instant of its own, so
//! that records tell what came first. Where the time handed in goes back (a new leader's clock is
//! behind the old one's), the engine goes on from the latest time that it knows, and every deadline
//! moves along: nothing waits for the clock to catch up.
//!
//! Start with [`Engine::handle`]; then `tasks` (what becomes of a task), `attempts` (what one try of
//! it comes to), `runs` (submit, cancel, retry, end), `dispatch` and `placement` (who runs what),
//! `load` (a new leader), `registry` (what people do to models).

pub mod api;
mod attempts;
mod cache;
mod compatibility;
mod conditions;
mod deadlines;
pub mod deployments;
mod dispatch;
mod judge;
mod load;
mod models;
mod outside;
mod placement;
mod plan;
pub mod records;
mod registry;
mod retries;
mod rollouts;
mod run;
mod runs;
pub mod serving;
mod sessions;
#[cfg(test)]
mod sim;
mod tasks;
#[cfg(test)]
mod tests;
pub mod tokens;
mod untold;
mod workers;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use emberline_common::{
    delivery::Deployment,
    ids::{AttemptId, DeploymentId, Digest, EnvironmentName, Epoch, ModelName, RunId, WorkerName},
    run_view::{ModelVersion, RunSummary, RunView, TaskState},
    spec::PipelineSpec,
    time::Timestamp,
};

use api::{
    Command, Decision, Effect, EndedRun, EngineConfig, ModelView, Observe, Outcome, QueueStats,
    Refusal, RegistryRefusal, VersionRef, VersionView, WorkerStatus, Write,
};
use cache::Cache;
use deadlines::{Deadlines, Due};
use models::Registry;
use outside::Merge;
use placement::Queue;
use records::{EnvironmentRecord, PoisonRecord, Written, encode, keys};
use retries::Random;
use run::{Run, RunSeq, TaskRef};
use serving::Serving;
use tokens::AccessTable;
use untold::Untold;
use workers::Fleet;

/// The bytes under which a run's filled-in pipeline is stored: put them into the artifact store
/// before the submit (or the retry) is handed to the engine.
#[must_use]
pub fn spec_blob(spec: &PipelineSpec) -> Vec<u8> {
    encode(spec)
}

/// Decides everything. See the module's text.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    epoch: Epoch,
    now: Timestamp,
    /// The time that was handed in last.
    clock: Timestamp,
    /// How far the engine's time is ahead of the time handed in.
    ahead: Duration,
    random: Random,
    runs: BTreeMap<RunSeq, Run>,
    run_ids: BTreeMap<RunId, RunSeq>,
    next_run: RunSeq,
    /// Request ids of live and ended runs.
    requests: BTreeMap<String, RunId>,
    ended: BTreeMap<RunId, EndedRun>,
    ended_order: BTreeSet<(Timestamp, RunId)>,
    live_tasks: usize,
    queue: Queue,
    fleet: Fleet,
    /// Running attempts of an earlier leader, by the worker that may still claim them.
    unclaimed: BTreeMap<WorkerName, BTreeSet<AttemptId>>,
    deadlines: Deadlines,
    cache: Cache,
    models: Registry,
    deployments: BTreeMap<DeploymentId, Arc<Deployment>>,
    environments: BTreeMap<(EnvironmentName, ModelName), EnvironmentRecord>,
    /// What outside systems said of merges, by [`outside`]'s key.
    merges: BTreeMap<String, Merge>,
    merge_order: BTreeSet<(Timestamp, String)>,
    /// Who serves what.
    serving: Serving,
    /// What outside systems have to be told of.
    untold: Untold,
    access: Arc<AccessTable>,
    poison: BTreeMap<RunId, u32>,
    deciding: Option<RunId>,
    /// Set while records of an earlier leader are taken over: times come from them.
    loading: bool,
    out: Draft,
    /// What the simulator's own tests break on purpose.
    #[cfg(test)]
    sabotage: Option<sim::Sabotage>,
}

/// The decision in the making.
#[derive(Debug, Default)]
struct Draft {
    writes: Vec<Write>,
    effects: Vec<Effect>,
    tasks: Vec<TaskRef>,
    runs: Vec<RunSeq>,
    deployments: BTreeSet<DeploymentId>,
}

impl Engine {
    /// An engine without any state.
    #[must_use]
    pub fn new(config: EngineConfig, epoch: Epoch, seed: u64) -> Self {
        Self {
            config,
            epoch,
            now: Timestamp(0),
            clock: Timestamp(0),
            ahead: Duration::ZERO,
            random: Random::new(seed),
            runs: BTreeMap::new(),
            run_ids: BTreeMap::new(),
            next_run: 0,
            requests: BTreeMap::new(),
            ended: BTreeMap::new(),
            ended_order: BTreeSet::new(),
            live_tasks: 0,
            queue: Queue::default(),
            fleet: Fleet::default(),
            unclaimed: BTreeMap::new(),
            deadlines: Deadlines::default(),
            cache: Cache::default(),
            models: Registry::default(),
            deployments: BTreeMap::new(),
            environments: BTreeMap::new(),
            merges: BTreeMap::new(),
            merge_order: BTreeSet::new(),
            serving: Serving::default(),
            untold: Untold::default(),
            access: Arc::default(),
            poison: BTreeMap::new(),
            deciding: None,
            loading: false,
            out: Draft::default(),
            #[cfg(test)]
            sabotage: None,
        }
    }

    /// Decides on one thing that happened. Nothing of the decision may be told to anyone before its
    /// writes are committed, and decisions must be committed in the order in which they were made.
    pub fn handle(&mut self, now: Timestamp, command: Command) -> Decision {
        self.set_time(now);
        let outcome = match command {
            Command::Submit(submission) => self.submit(*submission),
            Command::Cancel { run, why } => self.cancel(&run, &why),
            Command::Retry(archived) => self.retry(*archived),
            Command::WorkerRegistered(hello) => {
                self.register(&hello);
                Ok(Outcome::Done)
            }
            Command::Credits { session, credits } => {
                self.fleet.credit(session, credits);
                Ok(Outcome::Done)
            }
            Command::WorkerDisconnected { session, how } => {
                self.disconnected(session, how);
                Ok(Outcome::Done)
            }
            Command::DrainWorker { worker } => self.drain_worker(worker),
            Command::WorkerDraining { session } => {
                if let Some(name) = self.fleet.name_of(session) {
                    self.fleet.drain(&name);
                    self.serving.dirty = true;
                }
                Ok(Outcome::Done)
            }
            Command::Reports { session, reports } => {
                for report in reports {
                    self.report(session, report);
                }
                Ok(Outcome::Done)
            }
            Command::RunArchived { run, archive } => {
                self.archived(&run, archive);
                Ok(Outcome::Done)
            }
            Command::Forget { runs } => {
                self.forget(runs);
                Ok(Outcome::Done)
            }
            Command::MarkFailed {
                deployment,
                began_at,
                why,
            } => self.mark_failed(deployment, began_at, why),
            Command::RollBack {
                environment,
                model,
                expected,
                why,
            } => self.roll_back(environment, model, expected, why),
            Command::Approve { deployment } => self.approve(deployment),
            Command::Serving { session, status } => {
                self.serving_status(session, *status);
                Ok(Outcome::Done)
            }
            Command::Registry(command) => self.change_registry(command),
            Command::Tokens(command) => self.change_tokens(command),
            Command::Outside(event) => self.outside(event),
            Command::Told { up_to } => {
                self.told(up_to);
                Ok(Outcome::Done)
            }
            Command::Tick => Ok(Outcome::Done),
        };
        self.run_due();
        self.serve();
        self.dispatch();
        self.deciding = None;
        self.take_decision(outcome)
    }

    /// When [`Command::Tick`] is to be given next, if nothing else happens before.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        let at = self.deadlines.next()?;
        let ahead = u64::try_from(self.ahead.as_micros()).unwrap_or(u64::MAX);
        Some(Timestamp(at.0.saturating_sub(ahead)))
    }

    fn set_time(&mut self, now: Timestamp) {
        self.ahead += self.clock.since(now);
        self.clock = now;
        self.tick();
        self.now = now.after(self.ahead).max(self.now);
    }

    /// The next instant: what happens in one decision happens one after the other.
    fn tick(&mut self) {
        self.now = self.now.after(Duration::from_micros(1));
    }

    /// The run that a decision is being made on. Only to be asked after `handle` has panicked; then
    /// commit [`Self::poison_mark`] for it before the process ends, so that a run that kills every
    /// leader is put aside. Innocent runs are never marked, and no decision costs a write for it.
    #[must_use]
    pub fn deciding_on(&self) -> Option<&RunId> {
        self.deciding.as_ref()
    }

    /// The record that counts a leader's death at this run; [`Self::load`] quarantines the run when
    /// the count reaches `poison_limit`.
    #[must_use]
    pub fn poison_mark(&self, run: &RunId) -> Write {
        let deaths = self.poison.get(run).map_or(1, |deaths| deaths + 1);
        Write::Put {
            key: keys::poison(run),
            value: encode(&PoisonRecord { deaths }),
        }
    }

    /// Says whether anyone watches a live run; only then are its changes among the effects.
    pub fn set_watched(&mut self, run: &RunId, watched: bool) {
        if let Some(run) = self.run_ids.get(run).and_then(|seq| self.runs.get_mut(seq)) {
            run.watched = watched;
        }
    }

    /// A live run with its tasks.
    #[must_use]
    pub fn run_view(&self, run: &RunId) -> Option<RunView> {
        let run = self.live(run)?;
        let mut view = run.view();
        // Why something waits is asked of the fleet as it is now.
        for (number, task) in view.tasks.iter_mut().enumerate() {
            if task.state == TaskState::Queued
                && let Some(missing) = self.missing_for(run, u32::try_from(number).unwrap_or(0))
            {
                task.note = missing;
            }
        }
        Some(view)
    }

    /// A live run.
    #[must_use]
    pub fn run_summary(&self, run: &RunId) -> Option<RunSummary> {
        self.live(run).map(Run::summary)
    }

    /// All live runs, by id.
    pub fn live_runs(&self) -> impl Iterator<Item = RunSummary> + '_ {
        (self.run_ids.values()).filter_map(|seq| self.runs.get(seq).map(Run::summary))
    }

    /// The pipeline of a live run.
    #[must_use]
    pub fn run_spec(&self, run: &RunId) -> Option<Arc<PipelineSpec>> {
        self.live(run).map(|run| run.spec.clone())
    }

    /// An ended run.
    #[must_use]
    pub fn ended_run(&self, run: &RunId) -> Option<&EndedRun> {
        self.ended.get(run)
    }

    /// All ended runs that are remembered, the one that was accepted last first.
    pub fn ended_runs(&self) -> impl Iterator<Item = &EndedRun> {
        let order = self.ended_order.iter().rev();
        order.filter_map(|(_, run)| self.ended.get(run))
    }

    /// All models, by name.
    pub fn models(&self) -> impl Iterator<Item = ModelView> + '_ {
        self.models.views()
    }

    /// A model and its versions, newest first.
    #[must_use]
    pub fn model(&self, name: &ModelName) -> Option<(ModelView, Vec<VersionView>)> {
        let (model, numbers) = self.models.view(name)?;
        let versions = numbers.into_iter().rev();
        let versions = versions.filter_map(|number| self.view_of(name, number).ok());
        Some((model, versions.collect()))
    }

    /// One version of a model, by its number or by an alias, with what refers to it.
    ///
    /// # Errors
    /// If there is none.
    pub fn version_view(
        &self,
        name: &ModelName,
        version: &VersionRef,
    ) -> Result<VersionView, RegistryRefusal> {
        let number = self.models.resolve(name, version)?;
        self.view_of(name, number)
    }

    /// One version of a model.
    #[must_use]
    pub fn model_version(&self, name: &ModelName, version: u32) -> Option<&ModelVersion> {
        self.models.version(name, version)
    }

    /// All workers, by name.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerStatus> {
        self.fleet.status()
    }

    /// How much is queued and running.
    #[must_use]
    pub fn queue_stats(&self) -> QueueStats {
        QueueStats {
            live_runs: self.runs.len(),
            live_tasks: self.live_tasks,
            queued_tasks: self.queue.len(),
            queued_since: self.queue.oldest(),
            running_attempts: self.fleet.running(),
            cache_entries: self.cache.len(),
        }
    }

    /// Roots for the collection of artifacts: every manifest that a live run, a cache entry or a
    /// model version names. Those of ended runs stand in their archives.
    pub fn referenced_manifests(&self) -> impl Iterator<Item = Digest> + '_ {
        let live = self.runs.values().flat_map(|run| &run.tasks);
        let live = live.flat_map(|task| task.record.iter().flat_map(|r| &r.outputs));
        live.map(|output| output.manifest)
            .chain(self.cache.manifests())
            .chain(self.models.artifacts().map(|artifact| artifact.manifest))
    }

    /// Roots for the collection of single blobs: pipelines and submitted files of live runs, texts
    /// of pipelines that a model version or an ended run names, and archives.
    pub fn referenced_blobs(&self) -> impl Iterator<Item = Digest> + '_ {
        let live = self.runs.values().flat_map(|run| {
            let record = &run.record;
            let files = record.files.iter().map(|file| file.sha256);
            files.chain([record.spec, record.revision])
        });
        let ended = self.ended.values();
        live.chain(ended.flat_map(|ended| [ended.archive, ended.summary.revision]))
            .chain(self.models.revisions())
    }

    fn live(&self, run: &RunId) -> Option<&Run> {
        self.runs.get(self.run_ids.get(run)?)
    }

    /// Marks a task as changed, and with `write` its record as to be written.
    fn touch(&mut self, at: TaskRef, write: bool) {
        let epoch = self.epoch;
        let Some(run) = self.runs.get_mut(&at.run) else {
            return;
        };
        let task = &mut run.tasks[at.task as usize];
        if !task.dirty && !task.changed {
            self.out.tasks.push(at);
        }
        task.changed = true;
        if write {
            task.dirty = true;
            let (note, ready_at) = (task.note.clone(), task.ready_at);
            let record = task.record();
            (record.epoch, record.note, record.ready_at) = (epoch, note, ready_at);
        }
        self.touch_run(at.run, false);
    }

    fn touch_run(&mut self, seq: RunSeq, write: bool) {
        let Some(run) = self.runs.get_mut(&seq) else {
            return;
        };
        if !run.dirty && !run.changed {
            self.out.runs.push(seq);
        }
        run.changed = true;
        if write {
            run.dirty = true;
            run.record.epoch = self.epoch;
        }
    }

    fn effect(&mut self, effect: Effect) {
        self.out.effects.push(effect);
    }

    fn take_decision(&mut self, outcome: Result<Outcome, Refusal>) -> Decision {
        self.write_deployments();
        let mut out = std::mem::take(&mut self.out);
        let observe = self.config.observe;
        // A run is told before its tasks: they say little without it.
        for seq in out.runs.iter().filter(|_| observe > Observe::Nothing) {
            if let Some(run) = self.runs.get_mut(seq)
                && run.observed != Some(run.state())
            {
                run.observed = Some(run.state());
                let summary = Arc::new(run.summary());
                out.effects.push(Effect::RunObserved(summary));
            }
        }
        for at in out.tasks {
            let Some(run) = self.runs.get_mut(&at.run) else {
                continue;
            };
            let name = run.name_of(at.task);
            let task = &mut run.tasks[at.task as usize];
            task.changed = false;
            let state = task.state;
            if std::mem::take(&mut task.dirty) {
                task.stored = true;
                out.writes.push(Write::Put {
                    key: keys::task(&run.record.run, &name),
                    value: task.record.as_ref().map_or_else(Vec::new, encode),
                });
            }
            let observed = match observe {
                Observe::Nothing => false,
                Observe::Exceptions => {
                    let simple = state == TaskState::Succeeded;
                    let again = || (task.record.as_ref()).is_some_and(|r| !r.earlier.is_empty());
                    state.is_final() && (!simple || again())
                }
                Observe::Ends => state.is_final(),
                Observe::Starts => state.is_final() || state == TaskState::Running,
            };
            if run.watched || observed {
                let view = Arc::new(run.task_view(at.task));
                if observed {
                    out.effects.push(Effect::TaskObserved(Arc::clone(&view)));
                }
                if run.watched {
                    out.effects.push(Effect::TaskChanged(view));
                }
            }
        }
        for seq in out.runs {
            let Some(run) = self.runs.get_mut(&seq) else {
                continue;
            };
            run.changed = false;
            if std::mem::take(&mut run.dirty) {
                out.writes.push(Write::Put {
                    key: keys::run(&run.record.run),
                    value: encode(&run.record),
                });
            }
            if run.watched {
                let summary = Arc::new(run.summary());
                out.effects.push(Effect::RunChanged(summary));
            }
        }
        Decision {
            writes: out.writes,
            effects: out.effects,
            outcome,
        }
    }

    /// Does whatever is due by now, and forgets deadlines that have become void.
    fn run_due(&mut self) {
        if self.deadlines.is_crowded() {
            let mut deadlines = std::mem::take(&mut self.deadlines);
            deadlines.retain(|due| !self.is_void(due));
            self.deadlines = deadlines;
        }
        while let Some((at, due)) = self.deadlines.peek() {
            if at > self.now && !self.is_void(due) {
                break;
            }
            let Some((at, due)) = self.deadlines.pop() else {
                break;
            };
            if at <= self.now && !self.is_void(&due) {
                self.tick();
                self.act_on(due);
            }
        }
    }

    fn is_void(&self, due: &Due) -> bool {
        let task = |at: &TaskRef, attempt: &u32, written: Written| {
            let task = self.runs.get(&at.run).map(|r| &r.tasks[at.task as usize]);
            let record = task.and_then(|task| task.record.as_ref());
            record.is_none_or(|r| r.attempt != *attempt || r.written != written)
        };
        match due {
            Due::Attempt { task: at, attempt } | Due::StopGrace { task: at, attempt } => {
                task(at, attempt, Written::Running)
            }
            Due::Backoff { task: at, attempt } => task(at, attempt, Written::Backoff),
            Due::Run { run } => self
                .live(run)
                .is_none_or(|run| run.record.ended.is_some() || run.record.stop.is_some()),
            Due::Worker { worker, session } => (self.fleet.workers.get(worker))
                .is_none_or(|w| w.session != *session || w.suspect_since.is_none()),
            Due::Adoption => self.unclaimed.is_empty(),
            Due::Rollout { deployment } => {
                (self.serving.rolling.values()).all(|rolling| rolling != deployment)
            }
            Due::Dispatch => false,
        }
    }

    fn act_on(&mut self, due: Due) {
        match due {
            Due::Attempt { task, .. } => self.attempt_timed_out(task),
            Due::StopGrace { task, .. } => self.stop_grace_over(task),
            Due::Backoff { task, .. } => self.backoff_over(task),
            Due::Run { run } => self.run_timed_out(&run),
            Due::Worker { worker, .. } => self.worker_lost(&worker),
            Due::Adoption => self.adoption_over(),
            Due::Rollout { .. } => self.serving.dirty = true,
            Due::Dispatch => {}
        }
    }
}
