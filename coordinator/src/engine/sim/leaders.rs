//! Leaders: decide, persist, act, as the runtime does it, with a store that may be slow and leaders
//! that may die at any point of it.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use emberline_common::{
    ids::{Digest, Epoch, RunId},
    run_view::{RunView, TaskState},
    time::Timestamp,
};

use super::{
    Sabotage,
    clients::{Told, Watcher},
    network::Down,
    world::{Event, World},
};
use crate::engine::{
    Engine,
    api::{ArchivedRun, Command, Decision, Effect, EngineConfig, Outcome, Refusal, Write},
};

/// Whom a decision answers.
#[derive(Debug)]
pub(super) enum Asked {
    /// A client's submission.
    Submit(usize),
    Cancel(RunId),
    Retry(RunId),
    Watch(Box<Watcher>),
}

/// A decision that waits for its commit.
#[derive(Debug)]
struct Waiting {
    decision: Decision,
    asked: Option<Asked>,
}

#[derive(Debug)]
pub(super) struct Leader {
    pub epoch: Epoch,
    pub engine: Engine,
    /// How far its clock is off, in microseconds.
    pub clock: i64,
    pub paused_until: Timestamp,
    pub deadline: Option<Timestamp>,
    /// Decided; no transaction yet.
    pending: VecDeque<Waiting>,
    /// In the transaction under way.
    in_flight: Vec<Waiting>,
    /// Whether the store has taken that transaction.
    persisted: bool,
}

impl Leader {
    fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.in_flight.is_empty()
    }

    /// Whether it has nothing to do, and nothing to wait for.
    pub fn is_done(&self) -> bool {
        self.is_idle() && self.engine.unclaimed.is_empty()
    }

    fn reads(&self, now: Timestamp) -> Timestamp {
        Timestamp(now.0.saturating_add_signed(self.clock))
    }

    pub fn check_nothing_left(&self) -> Result<(), String> {
        let engine = &self.engine;
        let stats = engine.queue_stats();
        if stats.live_tasks + stats.queued_tasks + stats.live_runs > 0 {
            return Err(format!("I8: {stats:?} is left over"));
        }
        for worker in engine.workers() {
            if worker.running == 0 && worker.free != worker.total {
                return Err(format!(
                    "I8: {} runs nothing, but is not free",
                    worker.worker
                ));
            }
        }
        Ok(())
    }
}

impl World {
    pub(super) fn leader(&self, epoch: Epoch) -> Option<&Leader> {
        self.leaders.iter().find(|leader| leader.epoch == epoch)
    }

    pub(super) fn leader_mut(&mut self, epoch: Epoch) -> Option<&mut Leader> {
        (self.leaders.iter_mut()).find(|leader| leader.epoch == epoch)
    }

    /// A new leader takes over what is stored.
    pub(super) fn lead(&mut self) -> Result<(), String> {
        self.epoch = Epoch(self.epoch.0 + 1 + self.rng.below(3));
        self.played.leaders += 1;
        let (epoch, seed) = (self.epoch, self.rng.next());
        // A leader that cannot renew its lease stops, whether or not it has anything to write.
        let deposed: Vec<_> = self.leaders.iter().map(|leader| leader.epoch).collect();
        for old in deposed {
            self.within_ms(1500, Event::LeaseOver(old));
        }
        let differs = self.weather.clocks_differ && !self.calm;
        let clock = if differs { self.jump() } else { 0 };
        let now = Timestamp(self.now.0.saturating_add_signed(clock));
        let (engine, decision) = self.load(epoch, seed, now)?;
        self.check_acknowledged()?;
        self.leaders.push(Leader {
            epoch,
            engine,
            clock,
            paused_until: self.now,
            deadline: None,
            pending: VecDeque::new(),
            in_flight: Vec::new(),
            persisted: false,
        });
        let asked = None;
        self.decided(epoch, Waiting { decision, asked })?;
        for run in self.clients.watched() {
            self.within_ms(300, Event::Watch(run));
        }
        Ok(())
    }

    fn load(&self, epoch: Epoch, seed: u64, now: Timestamp) -> Result<(Engine, Decision), String> {
        let config = EngineConfig {
            worker_grace: Duration::from_millis(300),
            closed_grace: Duration::from_millis(200),
            adoption_window: Duration::from_millis(800),
            max_live_runs: self.weather.max_live_runs,
            max_cache_entries: 8,
            stop_grace: Duration::from_millis(400),
            timeout_slack: Duration::from_millis(100),
            ..EngineConfig::default()
        };
        let records = self.store.records.clone().into_iter().collect();
        let specs = |_: &RunId, digest: &Digest| self.store.specs.get(digest).cloned();
        let loaded = Engine::load(config, epoch, seed, now, records, &specs);
        let (mut engine, decision) = loaded.map_err(|error| format!("load: {error}"))?;
        engine.sabotage = self.sabotage;
        Ok((engine, decision))
    }

    /// A leader is gone: nothing more of it gets out, and its connections break.
    pub(super) fn step_down(&mut self, epoch: Epoch) {
        self.leaders.retain(|leader| leader.epoch != epoch);
        for link in 0..self.links.len() {
            if self.links[link].epoch == epoch {
                self.cut(link);
            }
        }
    }

    /// The leader dies. A transaction under way may still succeed.
    pub(super) fn crash(&mut self) -> Result<(), String> {
        let epoch = self.epoch;
        let late = self.one_in(2);
        let Some(leader) = self.leader_mut(epoch) else {
            return Ok(());
        };
        if !leader.persisted && late {
            for waiting in std::mem::take(&mut leader.in_flight) {
                self.store.apply(epoch, &waiting.decision.writes)?;
            }
        }
        self.step_down(epoch);
        self.within_ms(500, Event::Lead);
        Ok(())
    }

    pub(super) fn deadline(&mut self, epoch: Epoch) -> Result<(), String> {
        let now = self.now;
        let Some(leader) = self.leader_mut(epoch) else {
            return Ok(());
        };
        if leader.paused_until > now {
            let until = leader.paused_until;
            self.at(until, Event::Deadline(epoch));
            return Ok(());
        }
        leader.deadline = None;
        self.decide(epoch, Command::Tick, None)
    }

    pub(super) fn archived(
        &mut self,
        epoch: Epoch,
        run: RunId,
        archive: Digest,
    ) -> Result<(), String> {
        self.decide(epoch, Command::RunArchived { run, archive }, None)
    }

    /// A leader decides on one command.
    pub(super) fn decide(
        &mut self,
        epoch: Epoch,
        mut command: Command,
        asked: Option<Asked>,
    ) -> Result<(), String> {
        let now = self.now;
        if self.sabotage == Some(Sabotage::CreditsTwice)
            && let Command::Credits { credits, .. } = &mut command
        {
            *credits *= 2;
        }
        let trace = self.trace;
        let Some(leader) = self.leader_mut(epoch) else {
            return Ok(());
        };
        let said = trace.then(|| format!("{command:?}"));
        let decision = leader.engine.handle(leader.reads(now), command);
        if let Some(said) = said {
            println!("{} term {epoch} {said}\n  {:?}", now.0, decision.outcome);
            for write in &decision.writes {
                match write {
                    Write::Put { key, value } => {
                        println!("  {key}: {}", String::from_utf8_lossy(value));
                    }
                    Write::Delete { key } => println!("  no {key}"),
                    Write::DeletePrefix { prefix } => println!("  no {prefix}…"),
                }
            }
        }
        let limit = self.weather.max_live_runs;
        let live = (self.leader(epoch)).map_or(0, |l| l.engine.queue_stats().live_runs);
        if live > limit {
            return Err(format!("I13: {live} runs are live, {limit} are allowed"));
        }
        self.decided(epoch, Waiting { decision, asked })
    }

    /// A leader reads for a client, in the order of its decisions.
    pub(super) fn read(&mut self, epoch: Epoch, asked: Asked) -> Result<(), String> {
        let decision = Decision {
            writes: Vec::new(),
            effects: Vec::new(),
            outcome: Ok(Outcome::Done),
        };
        let asked = Some(asked);
        self.decided(epoch, Waiting { decision, asked })
    }

    fn decided(&mut self, epoch: Epoch, mut waiting: Waiting) -> Result<(), String> {
        if self.sabotage == Some(Sabotage::EffectsBeforeCommit) {
            for effect in std::mem::take(&mut waiting.decision.effects) {
                self.let_out(epoch, effect)?;
            }
        }
        if self.sabotage == Some(Sabotage::EarlyAnswer)
            && let Some(asked) = waiting.asked.take()
        {
            self.answer(epoch, asked, &waiting.decision.outcome)?;
        }
        if self.sabotage == Some(Sabotage::LostWrite) && self.one_in(50) {
            waiting.decision.writes.pop();
        }
        let now = self.now;
        let Some(leader) = self.leader_mut(epoch) else {
            return Ok(());
        };
        leader.pending.push_back(waiting);
        let wake = leader.engine.next_deadline();
        let wake = wake.map(|at| Timestamp(at.0.saturating_add_signed(-leader.clock)).max(now));
        let wake = wake.filter(|at| leader.deadline.is_none_or(|set| *at < set));
        if let Some(at) = wake {
            leader.deadline = wake;
            self.at(at, Event::Deadline(epoch));
        }
        self.begin_commit(epoch)
    }

    /// Starts the transaction of what has been decided, if none is under way (group commit). What
    /// writes nothing is told at once: all that was decided before it is durable.
    fn begin_commit(&mut self, epoch: Epoch) -> Result<(), String> {
        let most = 1 + self.below(6);
        let Some(leader) = self.leader_mut(epoch) else {
            return Ok(());
        };
        if !leader.in_flight.is_empty() || leader.pending.is_empty() {
            return Ok(());
        }
        let count = most.min(leader.pending.len());
        leader.in_flight = leader.pending.drain(..count).collect();
        leader.persisted = false;
        if leader
            .in_flight
            .iter()
            .all(|w| w.decision.writes.is_empty())
        {
            return self.act(epoch);
        }
        let slow = self.weather.slow_store && self.one_in(20);
        self.within_ms(if slow { 300 } else { 3 }, Event::Persist(epoch));
        Ok(())
    }

    /// A transaction reaches the store, which takes it only from the highest term.
    pub(super) fn persist(&mut self, epoch: Epoch) -> Result<(), String> {
        let now = self.now;
        let deposed = epoch != self.epoch && self.sabotage != Some(Sabotage::UnguardedStore);
        let Some(leader) = self.leader_mut(epoch) else {
            return Ok(());
        };
        if leader.paused_until > now {
            let until = leader.paused_until;
            self.at(until, Event::Persist(epoch));
            return Ok(());
        }
        if deposed {
            self.step_down(epoch);
            return Ok(());
        }
        leader.persisted = true;
        let in_flight = std::mem::take(&mut leader.in_flight);
        for waiting in &in_flight {
            self.played.commits += 1;
            self.store.apply(epoch, &waiting.decision.writes)?;
        }
        if let Some(leader) = self.leader_mut(epoch) {
            leader.in_flight = in_flight;
        }
        self.within_ms(1, Event::Act(epoch));
        Ok(())
    }

    /// A transaction has succeeded: what it holds back is let out.
    pub(super) fn act(&mut self, epoch: Epoch) -> Result<(), String> {
        let now = self.now;
        let Some(leader) = self.leader_mut(epoch) else {
            return Ok(());
        };
        if leader.paused_until > now {
            let until = leader.paused_until;
            self.at(until, Event::Act(epoch));
            return Ok(());
        }
        for waiting in std::mem::take(&mut leader.in_flight) {
            for effect in waiting.decision.effects {
                self.let_out(epoch, effect)?;
            }
            if let Some(asked) = waiting.asked {
                self.answer(epoch, asked, &waiting.decision.outcome)?;
            }
        }
        self.begin_commit(epoch)?;
        let idle = self.leader(epoch).is_some_and(Leader::is_idle);
        if idle && self.epoch == epoch && self.one_in(30) {
            self.check_reload(epoch)?;
        }
        Ok(())
    }

    fn answer(
        &mut self,
        epoch: Epoch,
        asked: Asked,
        outcome: &Result<Outcome, Refusal>,
    ) -> Result<(), String> {
        let told = match asked {
            Asked::Submit(number) => Told::Submit(number, outcome.clone()),
            Asked::Cancel(run) => Told::Cancel(run, outcome.clone()),
            Asked::Retry(run) => Told::Retry(run, outcome.clone()),
            Asked::Watch(watcher) => Told::Watch(watcher),
        };
        self.told(epoch, told)
    }

    fn let_out(&mut self, epoch: Epoch, effect: Effect) -> Result<(), String> {
        let (session, message) = match effect {
            Effect::Registered { session, abandon } => (session, Down::Registered(abandon)),
            Effect::CloseSession { session, .. } => (session, Down::Close),
            Effect::Assign {
                session,
                assignment,
            } => {
                self.store.check_assignment(&assignment)?;
                self.played.attempts += 1;
                (session, Down::Assign(assignment))
            }
            Effect::Stop { session, attempt } => (session, Down::Stop(attempt)),
            // No person does so in the simulation.
            Effect::Drain { .. } => return Ok(()),
            Effect::Serve { session, plan } => {
                self.store.check_plan(&plan)?;
                (session, Down::Serve(plan))
            }
            Effect::Ack {
                session,
                attempt,
                committed,
            } => {
                self.store.check_ack(&attempt, committed)?;
                (session, Down::Ack(attempt))
            }
            Effect::Archive(archived) => return self.archive(epoch, &archived),
            Effect::RunChanged(summary) => return self.run_changed(epoch, &summary),
            Effect::TaskChanged(task) => return self.task_changed(epoch, &task),
            // What observers are told is what watchers are told, too.
            Effect::RunObserved(_)
            | Effect::TaskObserved(_)
            | Effect::AttemptFailed(_)
            | Effect::Deployed(_)
            | Effect::Access(_) => return Ok(()),
        };
        let link = link(session);
        if self.links[link].epoch == epoch {
            self.send_down(link, message);
        }
        Ok(())
    }

    fn archive(&mut self, epoch: Epoch, archived: &ArchivedRun) -> Result<(), String> {
        self.store.check_archive(archived)?;
        self.run_ended(archived);
        let run = archived.view.summary.run.clone();
        if self.one_in(16) {
            let text = serde_json::to_vec(archived).map_err(|error| error.to_string())?;
            let read = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
            same("an archive, as it reads", archived, &read)?;
        }
        let end = archived.view.summary.finished_at;
        let archive = Digest::of(format!("{run} {end:?}").as_bytes());
        self.archives.insert(archive, archived.clone());
        self.within_ms(100, Event::Archived(epoch, run, archive));
        Ok(())
    }

    // What is checked of the whole.

    pub(super) fn check_acknowledged(&self) -> Result<(), String> {
        let mut acknowledged = self.clients.acknowledged.iter();
        match acknowledged.find(|run| !self.store.knows(run)) {
            None => Ok(()),
            Some(run) => Err(format!("I2: the acknowledged run {run} is lost")),
        }
    }

    /// What a new leader would know is what this one knows, and it would have nothing to catch up on.
    fn check_reload(&mut self, epoch: Epoch) -> Result<(), String> {
        self.played.reloads += 1;
        let Some(leader) = self.leader(epoch) else {
            return Ok(());
        };
        let old = &leader.engine;
        let (new, decision) = self.load(Epoch(epoch.0 + 1), 0, old.clock)?;
        if let Some(write) = decision.writes.first() {
            return Err(format!("reload: there is something to write: {write:?}"));
        }
        let views = |engine: &Engine| -> Vec<RunView> {
            let runs = engine.live_runs();
            runs.filter_map(|run| engine.run_view(&run.run))
                .map(comparable)
                .collect()
        };
        same("reload: runs", &views(old), &views(&new))?;
        same("reload: requests", &old.requests, &new.requests)?;
        same("reload: ended runs", &old.ended, &new.ended)?;
        same("reload: live tasks", &old.live_tasks, &new.live_tasks)?;
        let models = |engine: &Engine| -> Vec<_> { engine.models().collect() };
        same("reload: models", &models(old), &models(&new))?;
        same("reload: deployments", &old.deployments, &new.deployments)?;
        same("reload: environments", &old.environments, &new.environments)?;
        same(
            "reload: rollouts",
            &old.serving.rolling,
            &new.serving.rolling,
        )?;
        let roots = |engine: &Engine| {
            let mut roots: Vec<_> = engine.referenced_manifests().collect();
            roots.extend(engine.referenced_blobs());
            roots.sort_unstable();
            roots.dedup();
            roots
        };
        same("reload: referenced artifacts", &roots(old), &roots(&new))?;
        let running = |runs: Vec<RunView>| -> BTreeMap<String, u32> {
            let tasks = runs.into_iter().flat_map(|run| run.tasks);
            let running = tasks.filter(|task| task.state == TaskState::Running);
            running
                .map(|task| (format!("{}/{}", task.run, task.task), task.attempt))
                .collect()
        };
        let awaited: BTreeMap<String, u32> = (new.unclaimed.values().flatten())
            .map(|id| (format!("{}/{}", id.run, id.task), id.attempt))
            .collect();
        same(
            "reload: attempts that are awaited",
            &running(views(old)),
            &awaited,
        )
    }
}

fn link(session: crate::engine::api::SessionId) -> usize {
    usize::try_from(session.0).unwrap_or(0)
}

/// That two things are the same; else the first lines that differ.
pub(super) fn same<T: PartialEq + std::fmt::Debug>(
    what: &str,
    one: T,
    two: T,
) -> Result<(), String> {
    if one == two {
        return Ok(());
    }
    let (one, two) = (format!("{one:#?}"), format!("{two:#?}"));
    let same = one
        .lines()
        .zip(two.lines())
        .take_while(|(one, two)| one == two);
    let same = same.count().saturating_sub(20);
    let part = |text: &str| -> String {
        let lines = text.lines().skip(same).take(40);
        lines.collect::<Vec<_>>().join("\n")
    };
    Err(format!("{what}:\n{}\n  is not\n{}", part(&one), part(&two)))
}

/// What of a run must be the same for the next leader.
fn comparable(mut run: RunView) -> RunView {
    for task in &mut run.tasks {
        // The end of a backoff is not written, and why something is not reused is found again.
        if matches!(task.state, TaskState::Backoff | TaskState::Queued) {
            task.state = TaskState::Queued;
            task.note = String::new();
        }
    }
    run
}
