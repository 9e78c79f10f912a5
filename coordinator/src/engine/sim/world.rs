//! The world: one event after the other, in the order of simulated time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    sync::Arc,
    time::Duration,
};

use emberline_common::{
    failure::{Failure, Reason},
    ids::{ArtifactName, AttemptId, Digest, Epoch, Incarnation, RunId, WorkerName},
    resources::Resources,
    run_view::{ArtifactRef, RunState, RunView, TaskState},
    spec::PipelineSpec,
    time::Timestamp,
};
use serde_json::{Map, json};

use super::{
    Played, Sabotage,
    checks::{Store, output_of},
    pipelines::{self, index},
};
use crate::engine::{
    Engine,
    api::{
        ArchivedRun, Assignment, AttemptFailure, AttemptReport, AttemptSuccess, Command, Decision,
        Effect, EngineConfig, Outcome, SessionId, Submission, WorkerHello,
    },
    retries::Random,
};

/// How long the faults last.
const CHAOS: Duration = Duration::from_secs(20);
/// How long everything may take to end afterwards, on simulated time.
const CALM: Duration = Duration::from_secs(600);
const MAX_STEPS: u64 = 300_000;

#[derive(Debug, Clone)]
enum Event {
    /// A message reaches the leader of a term.
    ToLeader(Epoch, Command),
    /// A message reaches a worker by a session.
    ToWorker(usize, SessionId, ToWorker),
    /// The transaction of a leader's oldest decision is over.
    Committed(Epoch),
    /// A leader's deadline.
    Deadline(Epoch),
    /// An attempt ends on its worker.
    AttemptEnds(usize, u64, AttemptId),
    /// A worker connects to the leader.
    Connect(usize),
    /// A client or a fault does something.
    Chaos,
}

#[derive(Debug, Clone)]
enum ToWorker {
    Registered(Vec<AttemptId>),
    Assign(Box<Assignment>),
    Stop(AttemptId),
    Ack(AttemptId),
    Close,
}

/// A decision that waits for its commit, and who asked.
#[derive(Debug)]
struct Waiting {
    decision: Decision,
    submitted: Option<RunId>,
}

#[derive(Debug)]
struct Leader {
    epoch: Epoch,
    engine: Engine,
    waiting: VecDeque<Waiting>,
    deadline: Option<Timestamp>,
}

#[derive(Debug)]
struct SimWorker {
    name: WorkerName,
    life: u64,
    alive: bool,
    session: Option<(Epoch, SessionId)>,
    total: Resources,
    zone: bool,
    slots: u32,
    credits: i64,
    running: BTreeMap<AttemptId, Resources>,
    unacknowledged: BTreeMap<AttemptId, AttemptReport>,
    paused_until: Timestamp,
    draining: bool,
}

/// The whole of it.
#[derive(Debug)]
pub struct World {
    rng: Random,
    sabotage: Option<Sabotage>,
    now: Timestamp,
    calm: bool,
    events: BinaryHeap<Reverse<(Timestamp, u64)>>,
    what: BTreeMap<u64, Event>,
    next: u64,
    store: Store,
    epoch: Epoch,
    leaders: Vec<Leader>,
    workers: Vec<SimWorker>,
    sessions: u64,
    runs: u64,
    specs: BTreeMap<Digest, Arc<PipelineSpec>>,
    archive: BTreeMap<RunId, (Digest, ArchivedRun)>,
    acknowledged: BTreeSet<RunId>,
    forgotten: BTreeSet<RunId>,
    played: Played,
}

impl World {
    /// A world with one leader and up to four workers.
    ///
    /// # Errors
    /// If the first leader cannot load an empty state.
    pub fn new(seed: u64, sabotage: Option<Sabotage>) -> Result<Self, String> {
        let mut world = Self {
            rng: Random::new(seed),
            sabotage,
            now: Timestamp(1_000_000_000),
            calm: false,
            events: BinaryHeap::new(),
            what: BTreeMap::new(),
            next: 0,
            store: Store::default(),
            epoch: Epoch(0),
            leaders: Vec::new(),
            workers: Vec::new(),
            sessions: 0,
            runs: 0,
            specs: BTreeMap::new(),
            archive: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            played: Played::default(),
        };
        world.lead()?;
        for number in 0..1 + world.rng.below(4) {
            let name = format!("w{number}");
            let cpu = [1000, 2000, 4000][index(world.rng.below(3))];
            world.workers.push(SimWorker {
                name: WorkerName::new(name).map_err(|e| e.to_string())?,
                life: 0,
                alive: true,
                session: None,
                // One worker can run everything, so that every run can end.
                total: Resources {
                    cpu_millis: if number == 0 { 4000 } else { cpu },
                    ..Resources::default()
                },
                zone: number == 0,
                slots: 1 + u32::try_from(world.rng.below(4)).unwrap_or(0),
                credits: 0,
                running: BTreeMap::new(),
                unacknowledged: BTreeMap::new(),
                paused_until: Timestamp(0),
                draining: false,
            });
            world.after_ms(20, Event::Connect(index(number)));
        }
        world.after_ms(5, Event::Chaos);
        Ok(world)
    }

    /// What has been played so far.
    #[must_use]
    pub const fn played(&self) -> Played {
        self.played
    }

    /// Plays until every acknowledged run has ended.
    ///
    /// # Errors
    /// What was violated.
    pub fn play(&mut self) -> Result<Played, String> {
        let start = self.now;
        let mut calm_since = None;
        loop {
            if !self.calm && self.now >= start.after(CHAOS) {
                self.calm_down();
                calm_since = Some(self.now);
            }
            if self.calm && self.all_ended() {
                break;
            }
            if calm_since.is_some_and(|since| self.now > since.after(CALM))
                || self.played.steps > MAX_STEPS
            {
                return Err(format!("I1: not all runs have ended: {}", self.open_runs()));
            }
            if !self.step()? {
                return Err(format!(
                    "I1: nothing happens any more: {}",
                    self.open_runs()
                ));
            }
        }
        self.check_end()?;
        Ok(self.played)
    }

    /// Plays one event; `false` if there is none.
    ///
    /// # Errors
    /// What was violated.
    pub fn step(&mut self) -> Result<bool, String> {
        let Some(Reverse((at, number))) = self.events.pop() else {
            return Ok(false);
        };
        self.now = self.now.max(at);
        self.played.steps += 1;
        let Some(event) = self.what.remove(&number) else {
            return Ok(true);
        };
        match event {
            Event::ToLeader(epoch, command) => self.command(epoch, command, None)?,
            Event::ToWorker(worker, session, message) => {
                self.worker_gets(worker, session, message);
                if self.workers[worker].overloaded() {
                    return Err(format!(
                        "worker {} got more than it granted credits for",
                        self.workers[worker].name
                    ));
                }
            }
            Event::Committed(epoch) => self.committed(epoch)?,
            Event::Deadline(epoch) => {
                if let Some(leader) = self.leaders.iter_mut().find(|l| l.epoch == epoch) {
                    leader.deadline = None;
                }
                self.command(epoch, Command::Tick, None)?;
            }
            Event::AttemptEnds(worker, life, id) => self.attempt_ends(worker, life, id),
            Event::Connect(worker) => self.connect(worker),
            Event::Chaos => self.chaos()?,
        }
        Ok(true)
    }

    fn after_ms(&mut self, at_most_ms: u64, event: Event) {
        let micros = 1 + self.rng.below(at_most_ms * 1000);
        let at = self.now.after(Duration::from_micros(micros));
        self.at(at, event);
    }

    fn at(&mut self, at: Timestamp, event: Event) {
        self.events.push(Reverse((at, self.next)));
        self.what.insert(self.next, event);
        self.next += 1;
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.rng.below(n) == 0
    }

    /// A new leader takes over what is stored.
    fn lead(&mut self) -> Result<(), String> {
        self.epoch = Epoch(self.epoch.0 + 1 + self.rng.below(3));
        self.played.leaders += 1;
        let (epoch, seed) = (self.epoch, self.rng.next());
        let (engine, decision) = self.load(epoch, seed)?;
        self.leaders.push(Leader {
            epoch,
            engine,
            waiting: VecDeque::new(),
            deadline: None,
        });
        self.decided(epoch, decision, None)?;
        for worker in 0..self.workers.len() {
            if self.one_in(2) {
                self.cut(worker);
            }
            self.after_ms(1500, Event::Connect(worker));
        }
        Ok(())
    }

    fn load(&self, epoch: Epoch, seed: u64) -> Result<(Engine, Decision), String> {
        let config = EngineConfig {
            worker_grace: Duration::from_millis(300),
            adoption_window: Duration::from_millis(800),
            max_cache_entries: 5,
            stop_grace: Duration::from_millis(400),
            timeout_slack: Duration::from_millis(100),
            max_ended_runs: 1000,
            ..EngineConfig::default()
        };
        let records = self.store.records.clone().into_iter().collect();
        let specs = |_: &RunId, digest: &Digest| self.specs.get(digest).cloned();
        let loaded = Engine::load(config, epoch, seed, self.now, records, &specs);
        let (engine, decision) = loaded.map_err(|error| format!("load: {error}"))?;
        #[cfg(test)]
        let engine = Engine {
            sabotage: self.sabotage,
            ..engine
        };
        Ok((engine, decision))
    }

    fn command(
        &mut self,
        epoch: Epoch,
        command: Command,
        submitted: Option<RunId>,
    ) -> Result<(), String> {
        let now = self.now;
        let Some(leader) = self.leaders.iter_mut().find(|l| l.epoch == epoch) else {
            return Ok(());
        };
        let decision = leader.engine.handle(now, command);
        self.decided(epoch, decision, submitted)
    }

    fn decided(
        &mut self,
        epoch: Epoch,
        mut decision: Decision,
        submitted: Option<RunId>,
    ) -> Result<(), String> {
        if self.sabotage == Some(Sabotage::EffectsBeforeCommit) {
            for effect in std::mem::take(&mut decision.effects) {
                self.let_out(epoch, effect)?;
            }
        }
        if self.sabotage == Some(Sabotage::EarlyAnswer)
            && submitted.is_some()
            && let Ok(Outcome::Submitted { run, .. }) = &decision.outcome
        {
            self.acknowledged.insert(run.clone());
        }
        if self.sabotage == Some(Sabotage::LostWrite) && self.one_in(50) {
            decision.writes.pop();
        }
        let Some(leader) = self.leaders.iter_mut().find(|l| l.epoch == epoch) else {
            return Ok(());
        };
        let deadline = leader.engine.next_deadline();
        let wake = deadline.filter(|at| leader.deadline.is_none_or(|set| *at < set));
        if wake.is_some() {
            leader.deadline = wake;
        }
        leader.waiting.push_back(Waiting {
            decision,
            submitted,
        });
        let first = leader.waiting.len() == 1;
        if let Some(at) = wake {
            self.at(at.max(self.now), Event::Deadline(epoch));
        }
        if first {
            let slow = if self.one_in(20) { 200 } else { 3 };
            self.after_ms(slow, Event::Committed(epoch));
        }
        Ok(())
    }

    fn committed(&mut self, epoch: Epoch) -> Result<(), String> {
        let guarded = self.sabotage != Some(Sabotage::UnguardedStore);
        if epoch != self.epoch && guarded {
            // The guard fails: the deposed leader stops, and nothing of it gets out.
            self.leaders.retain(|leader| leader.epoch != epoch);
            return Ok(());
        }
        // Group commit: whatever has been decided by now may go along.
        let batch = 1 + self.rng.below(4);
        for _ in 0..batch {
            let Some(leader) = self.leaders.iter_mut().find(|l| l.epoch == epoch) else {
                return Ok(());
            };
            let Some(waiting) = leader.waiting.pop_front() else {
                break;
            };
            self.played.commits += 1;
            self.store.apply(&waiting.decision.writes)?;
            for effect in waiting.decision.effects {
                self.let_out(epoch, effect)?;
            }
            if let (Some(_), Ok(Outcome::Submitted { run, .. })) =
                (&waiting.submitted, &waiting.decision.outcome)
            {
                self.acknowledged.insert(run.clone());
                self.played.runs += 1;
            }
        }
        self.check_acknowledged()?;
        let more = (self.leaders.iter()).any(|l| l.epoch == epoch && !l.waiting.is_empty());
        if more {
            self.after_ms(3, Event::Committed(epoch));
        } else if self.one_in(16) {
            self.check_reload(epoch)?;
        }
        Ok(())
    }

    fn let_out(&mut self, epoch: Epoch, effect: Effect) -> Result<(), String> {
        let (session, message) = match effect {
            Effect::Registered { session, abandon } => (session, ToWorker::Registered(abandon)),
            Effect::CloseSession { session, .. } => (session, ToWorker::Close),
            Effect::Assign {
                session,
                assignment,
            } => {
                self.store.check_assignment(&assignment)?;
                self.played.attempts += 1;
                (session, ToWorker::Assign(assignment))
            }
            Effect::Stop { session, attempt } => (session, ToWorker::Stop(attempt)),
            Effect::Ack {
                session,
                attempt,
                committed,
            } => {
                if committed {
                    self.store.check_ack(&attempt)?;
                }
                (session, ToWorker::Ack(attempt))
            }
            Effect::Archive(archived) => {
                let run = archived.view.summary.run.clone();
                let archive = Digest::of(run.as_str().as_bytes());
                self.archive.insert(run.clone(), (archive, *archived));
                self.after_ms(
                    200,
                    Event::ToLeader(epoch, Command::RunArchived { run, archive }),
                );
                return Ok(());
            }
            Effect::RunChanged(_) | Effect::TaskChanged(_) => return Ok(()),
        };
        let worker = (self.workers.iter()).position(|w| w.session == Some((epoch, session)));
        if let Some(worker) = worker {
            // A stream keeps its order.
            let at = self.now.after(Duration::from_micros(200));
            self.at(at, Event::ToWorker(worker, session, message));
        }
        Ok(())
    }

    // Workers.

    fn connect(&mut self, number: usize) {
        let epoch = self.epoch;
        self.sessions += 1;
        let session = SessionId(self.sessions);
        let worker = &mut self.workers[number];
        if !worker.alive || worker.session.is_some() && worker.session.map(|s| s.0) == Some(epoch) {
            return;
        }
        let old = worker.session.replace((epoch, session));
        let free = i64::from(worker.slots) - i64::try_from(worker.running.len()).unwrap_or(0);
        worker.credits = free.max(0);
        let Ok(incarnation) = Incarnation::new(format!("i{}", worker.life)) else {
            return;
        };
        let kinds = ["noop", "convert", "deploy"];
        let hello = WorkerHello {
            session,
            worker: worker.name.clone(),
            incarnation,
            version: String::new(),
            resources: worker.total,
            labels: if worker.zone {
                BTreeMap::from([("zone".to_owned(), "a".to_owned())])
            } else {
                BTreeMap::new()
            },
            kinds: kinds
                .iter()
                .filter_map(|kind| Some((kind.parse().ok()?, 1)))
                .collect(),
            cached: Vec::new(),
            running: (worker.running.keys())
                .chain(worker.unacknowledged.keys())
                .cloned()
                .collect(),
            credits: u32::try_from(worker.credits).unwrap_or(0),
        };
        let reports: Vec<_> = worker.unacknowledged.values().cloned().collect();
        if let Some((epoch, session)) = old {
            let gone = Command::WorkerDisconnected { session };
            self.after_ms(50, Event::ToLeader(epoch, gone));
        }
        let delay = Duration::from_micros(1 + self.rng.below(5000));
        let at = self.now.after(delay);
        let hello = Command::WorkerRegistered(Box::new(hello));
        self.at(at, Event::ToLeader(epoch, hello));
        if !reports.is_empty() {
            let reports = Command::Reports { session, reports };
            self.at(at.after(delay), Event::ToLeader(epoch, reports));
        }
    }

    /// The connection of a worker breaks: messages under way are lost or come too late.
    fn cut(&mut self, number: usize) {
        if let Some((epoch, session)) = self.workers[number].session.take() {
            let gone = Command::WorkerDisconnected { session };
            self.after_ms(30, Event::ToLeader(epoch, gone));
            self.after_ms(600, Event::Connect(number));
        }
    }

    fn worker_gets(&mut self, number: usize, session: SessionId, message: ToWorker) {
        let now = self.now;
        let worker = &mut self.workers[number];
        if !worker.alive || worker.session.map(|s| s.1) != Some(session) {
            return;
        }
        if worker.paused_until > now {
            let at = worker.paused_until;
            return self.at(at, Event::ToWorker(number, session, message));
        }
        let mut freed = 0;
        match message {
            ToWorker::Registered(abandon) => {
                for id in abandon {
                    worker.unacknowledged.remove(&id);
                    freed += u32::from(worker.running.remove(&id).is_some());
                }
            }
            ToWorker::Assign(assignment) => {
                worker.credits -= 1;
                let id = assignment.id.clone();
                worker.running.insert(id.clone(), assignment.resources);
                let life = worker.life;
                let long = if self.one_in(10) { 800 } else { 40 };
                self.after_ms(long, Event::AttemptEnds(number, life, id));
                return;
            }
            ToWorker::Stop(id) => {
                let deaf = self.one_in(5);
                if self.workers[number].running.contains_key(&id) && !deaf {
                    let life = self.workers[number].life;
                    self.after_ms(5, Event::AttemptEnds(number, life, id));
                }
                return;
            }
            ToWorker::Ack(id) => {
                worker.unacknowledged.remove(&id);
            }
            ToWorker::Close => self.cut(number),
        }
        if freed > 0 {
            self.grant(number, freed);
        }
    }

    fn grant(&mut self, number: usize, credits: u32) {
        self.workers[number].credits += i64::from(credits);
        if let Some((epoch, session)) = self.workers[number].session {
            let grant = Command::Credits { session, credits };
            self.after_ms(2, Event::ToLeader(epoch, grant));
        }
    }

    fn attempt_ends(&mut self, number: usize, life: u64, id: AttemptId) {
        let worker = &mut self.workers[number];
        if !worker.alive || worker.life != life || worker.running.remove(&id).is_none() {
            return;
        }
        let draining = worker.draining;
        let failure = |reason, bad_manifest| AttemptFailure {
            failure: Failure::new(reason, "simulated"),
            bad_manifest,
            outputs: Vec::new(),
            results: Map::new(),
        };
        let luck = if self.calm { 0 } else { self.rng.below(20) };
        let outcome = match luck {
            0..=13 if !(draining && self.one_in(2)) => {
                let mut results = Map::new();
                let score = [0.1, 0.5, 0.9][index(self.rng.below(3))];
                results.insert("score".to_owned(), json!(score));
                let out = ArtifactName::new("out").ok();
                let outputs = out.into_iter().map(|name| ArtifactRef {
                    name,
                    manifest: output_of(&id),
                    bytes: 10,
                });
                Ok(AttemptSuccess {
                    outputs: outputs.collect(),
                    results,
                    registration: None,
                })
            }
            14 | 15 => Err(failure(Reason::UserError, None)),
            16 => Err(failure(Reason::Storage, Some(output_of(&id)))),
            17 => Err(failure(Reason::Data, None)),
            18 => Err(failure(Reason::Oom, None)),
            _ => Err(failure(Reason::Preempted, None)),
        };
        let report = AttemptReport {
            id: id.clone(),
            outcome,
            timing: emberline_common::run_view::AttemptTiming::default(),
        };
        let copies = if self.one_in(10) { 2 } else { 1 };
        self.workers[number]
            .unacknowledged
            .insert(id, report.clone());
        if let Some((epoch, session)) = self.workers[number].session {
            for _ in 0..copies {
                let reports = Command::Reports {
                    session,
                    reports: vec![report.clone()],
                };
                let late = if self.one_in(20) { 700 } else { 3 };
                self.after_ms(late, Event::ToLeader(epoch, reports));
            }
        }
        self.grant(number, 1);
    }

    // Clients and faults.

    fn chaos(&mut self) -> Result<(), String> {
        if self.calm {
            return Ok(());
        }
        self.after_ms(900, Event::Chaos);
        let worker = index(self.rng.below(self.workers.len() as u64));
        match self.rng.below(16) {
            0..=5 => self.submit()?,
            6 => {
                if let Some(run) = self.any_run() {
                    let why = "simulated".to_owned();
                    self.command(self.epoch, Command::Cancel { run, why }, None)?;
                }
            }
            7 | 8 => self.retry()?,
            9 => self.cut(worker),
            10 => {
                // Dies with all it had, and starts again.
                self.cut(worker);
                let worker = &mut self.workers[worker];
                worker.life += 1;
                worker.running.clear();
                worker.unacknowledged.clear();
                worker.draining = false;
            }
            11 => {
                let pause = Duration::from_micros(self.rng.below(2_000_000));
                self.workers[worker].paused_until = self.now.after(pause);
                if self.one_in(2) {
                    self.cut(worker);
                }
            }
            12 if worker > 0 => {
                self.workers[worker].draining = true;
                if let Some((epoch, session)) = self.workers[worker].session {
                    self.command(epoch, Command::WorkerDraining { session }, None)?;
                }
            }
            13 => {
                if let Some(run) = self.ended_run() {
                    self.forgotten.insert(run.clone());
                    self.command(self.epoch, Command::Forget { runs: vec![run] }, None)?;
                }
            }
            14 => {
                // The leader dies; what was not committed is gone.
                let epoch = self.epoch;
                self.leaders.retain(|leader| leader.epoch != epoch);
                self.lead()?;
            }
            15 => self.lead()?, // The old leader does not know it yet.
            _ => {}
        }
        Ok(())
    }

    fn submit(&mut self) -> Result<(), String> {
        let spec = Arc::new(pipelines::random(&mut self.rng)?);
        let blob = Digest::of(&crate::engine::spec_blob(&spec));
        self.specs.insert(blob, spec.clone());
        self.runs += 1;
        let run = RunId::new(format!("r{}", self.runs)).map_err(|e| e.to_string())?;
        let submission = Submission {
            run: run.clone(),
            request_id: Some(format!("q{}", self.runs)),
            spec,
            revision: blob,
            params: Map::new(),
            base_dir: "/".to_owned(),
            priority: None,
            no_cache: self.one_in(5),
            files: Vec::new(),
            trigger: "manual".to_owned(),
            traceparent: String::new(),
        };
        // A client that got no answer asks again, maybe another leader.
        for _ in 0..1 + self.rng.below(2) {
            let command = Command::Submit(Box::new(submission.clone()));
            self.command(self.epoch, command, Some(run.clone()))?;
        }
        Ok(())
    }

    fn any_run(&mut self) -> Option<RunId> {
        let number = 1 + self.rng.below(self.runs.max(1));
        RunId::new(format!("r{number}")).ok()
    }

    fn ended_run(&mut self) -> Option<RunId> {
        let run = self.any_run()?;
        let leader = self.leaders.iter().find(|l| l.epoch == self.epoch)?;
        leader.engine.ended_run(&run).map(|_| run)
    }

    fn retry(&mut self) -> Result<(), String> {
        let Some(run) = self.ended_run() else {
            return Ok(());
        };
        let Some((_, archived)) = self.archive.get(&run).cloned() else {
            return Ok(());
        };
        if self.forgotten.contains(&run) {
            return Ok(());
        }
        self.command(self.epoch, Command::Retry(Box::new(archived)), None)
    }

    /// The faults stop.
    fn calm_down(&mut self) {
        self.calm = true;
        let epoch = self.epoch;
        self.leaders.retain(|leader| leader.epoch == epoch);
        for number in 0..self.workers.len() {
            let worker = &mut self.workers[number];
            worker.paused_until = Timestamp(0);
            if worker.draining {
                worker.draining = false;
                self.cut(number);
            }
            self.after_ms(2000, Event::Connect(number));
        }
    }

    // What is checked of the whole.

    fn check_acknowledged(&self) -> Result<(), String> {
        let mut kept = self.acknowledged.difference(&self.forgotten);
        match kept.find(|run| !self.store.knows(run)) {
            None => Ok(()),
            Some(run) => Err(format!("I2: the acknowledged run {run} is lost")),
        }
    }

    fn all_ended(&self) -> bool {
        let prefix = |key: &String| key.starts_with("runs/") || key.starts_with("tasks/");
        !self.store.records.keys().any(prefix)
            && self.leaders.iter().all(|leader| leader.waiting.is_empty())
    }

    fn open_runs(&self) -> String {
        let leader = self.leaders.iter().find(|l| l.epoch == self.epoch);
        let runs = leader.into_iter().flat_map(|l| l.engine.live_runs());
        let runs: Vec<_> = runs
            .map(|run| {
                let view = leader.and_then(|l| l.engine.run_view(&run.run));
                let tasks = view.into_iter().flat_map(|view| view.tasks);
                let open: Vec<_> = tasks
                    .filter(|task| !task.state.is_final())
                    .map(|task| format!("{} {} ({})", task.task, task.state, task.note))
                    .collect();
                format!("{} {} {open:?}", run.run, run.state)
            })
            .collect();
        runs.join("; ")
    }

    /// What a new leader would know is what this one knows.
    fn check_reload(&self, epoch: Epoch) -> Result<(), String> {
        let Some(leader) = self.leaders.iter().find(|l| l.epoch == epoch) else {
            return Ok(());
        };
        if epoch != self.epoch {
            return Ok(());
        }
        let (loaded, _) = self.load(Epoch(epoch.0 + 1), 0)?;
        let live: Vec<_> = leader.engine.live_runs().map(|run| run.run).collect();
        let known: Vec<_> = loaded.live_runs().map(|run| run.run).collect();
        if live != known {
            return Err(format!("reload: {known:?} are live, not {live:?}"));
        }
        for run in live {
            let (Some(here), Some(there)) = (leader.engine.run_view(&run), loaded.run_view(&run))
            else {
                continue;
            };
            let (here, there) = (comparable(here), comparable(there));
            if here != there {
                return Err(format!("reload of {run}: {there:?} is not {here:?}"));
            }
        }
        Ok(())
    }

    fn check_end(&self) -> Result<(), String> {
        self.check_acknowledged()?;
        for key in self.store.records.keys() {
            if !["ended", "cache", "models"].iter().any(|p| key.starts_with(p)) {
                return Err(format!("I8: {key} is left over"));
            }
        }
        let ended = self.store.records.iter();
        for (key, value) in ended.filter(|(key, _)| key.starts_with("ended/")) {
            let ended: crate::engine::api::EndedRun =
                serde_json::from_slice(value).map_err(|error| format!("{key}: {error}"))?;
            let state = ended.summary.state;
            if !state.is_final() || (state == RunState::Succeeded) != ended.summary.failure.is_none()
            {
                return Err(format!("I1: {key} is {state}"));
            }
        }
        let Some(leader) = self.leaders.first() else {
            return Ok(());
        };
        let stats = leader.engine.queue_stats();
        if stats.live_tasks + stats.queued_tasks > 0 {
            return Err(format!("I8: {stats:?} is left over"));
        }
        for worker in leader.engine.workers() {
            if worker.running == 0 && worker.free != worker.total {
                return Err(format!("I8: {} runs nothing, but is not free", worker.worker));
            }
        }
        Ok(())
    }
}

impl SimWorker {
    /// Whether the leader has kept to what this worker granted.
    fn overloaded(&self) -> bool {
        self.credits < 0
    }
}

/// What of a run must be the same for the next leader.
fn comparable(view: RunView) -> Vec<(String, TaskState, u32, usize)> {
    let mut out = vec![(
        format!("{:?} {:?}", view.summary.state, view.summary.failure),
        TaskState::Waiting,
        view.summary.tasks_done,
        0,
    )];
    out.extend(view.tasks.into_iter().map(|task| {
        // The end of a backoff is not written.
        let state = match task.state {
            TaskState::Backoff => TaskState::Queued,
            other => other,
        };
        (task.task.to_string(), state, task.attempt, task.outputs.len())
    }));
    out
}
