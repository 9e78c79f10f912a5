//! Workers: each life of one is a process of its own, so that an old life may meet a new one.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use emberline_common::{
    failure::{Failure, Reason},
    ids::{ArtifactName, AttemptId, Epoch, Incarnation, WorkerName},
    resources::Resources,
    run_view::{ArtifactRef, AttemptTiming, ModelRegistration},
    time::Timestamp,
};
use serde_json::{Map, Value, json};

use super::{
    network::{Down, Link},
    serving::Served,
    store::output_of,
    world::{Event, World},
};
use crate::engine::api::{
    Assignment, AttemptFailure, AttemptReport, AttemptSuccess, Command, SessionId, WorkerHello,
};

/// One life of a worker.
#[derive(Debug)]
pub(super) struct Process {
    pub name: WorkerName,
    /// The worker's number: 0 can run everything.
    pub worker: usize,
    life: usize,
    pub alive: bool,
    /// The highest term that it has heard of: it obeys no lower one.
    term: Epoch,
    pub link: Option<Link>,
    pub paused_until: Timestamp,
    draining: bool,
    since: Timestamp,
    total: Resources,
    slots: usize,
    /// What the leader may still assign.
    credits: usize,
    running: BTreeMap<AttemptId, Box<Assignment>>,
    /// Told to stop.
    stopping: BTreeSet<AttemptId>,
    /// Reports that no leader has answered.
    unanswered: BTreeMap<AttemptId, AttemptReport>,
    /// What it serves.
    pub served: Served,
}

impl Process {
    fn used(&self) -> Resources {
        let running = self.running.values();
        running.fold(Resources::default(), |sum, one| sum.with(&one.resources))
    }
}

impl World {
    /// Another life of a worker.
    pub(super) fn new_process(&mut self, worker: usize) {
        let mut lives = self.processes.iter().filter(|p| p.worker == worker);
        let (life, before) = (lives.clone().count(), lives.next_back());
        let (total, slots) = match before {
            Some(before) => (before.total, before.slots),
            None => {
                let cpu = [1000, 2000, 4000][self.below(3)];
                let total = Resources {
                    // One worker can run everything, so that every run can end.
                    cpu_millis: if worker == 0 { 4000 } else { cpu },
                    ..Resources::default()
                };
                (total, 1 + self.below(4))
            }
        };
        let Ok(name) = WorkerName::new(format!("w{worker}")) else {
            return;
        };
        self.store.workers.insert(name.clone(), total);
        self.processes.push(Process {
            name,
            worker,
            life,
            alive: true,
            term: Epoch(0),
            link: None,
            paused_until: self.now,
            draining: false,
            since: self.now,
            total,
            slots,
            credits: 0,
            running: BTreeMap::new(),
            stopping: BTreeSet::new(),
            unanswered: BTreeMap::new(),
            served: Served::default(),
        });
        let number = self.processes.len() - 1;
        self.within_ms(20, Event::Connect(number));
    }

    pub(super) fn connect(&mut self, number: usize) {
        let process = &mut self.processes[number];
        if !process.alive || process.link.is_some() {
            return;
        }
        if process.paused_until > self.now {
            let until = process.paused_until;
            return self.at(until, Event::Connect(number));
        }
        // Cut off for too long: what it runs is another's by now.
        if self.now.since(process.since) > Duration::from_millis(1500) {
            process.running.clear();
            process.unanswered.clear();
        }
        let epoch = if self.rng.below(8) == 0 {
            let any = self.below(self.leaders.len());
            self.leaders.get(any).map(|leader| leader.epoch)
        } else {
            self.leader(self.epoch).map(|leader| leader.epoch)
        };
        let Some(epoch) = epoch else {
            return self.within_ms(100, Event::Connect(number));
        };
        let link = self.open(epoch, number);
        let process = &mut self.processes[number];
        process.link = Some(link);
        process.credits = if process.draining {
            0
        } else {
            process.slots.saturating_sub(process.running.len())
        };
        let Ok(incarnation) = Incarnation::new(format!("i{}", process.life)) else {
            return;
        };
        let kinds = ["noop", "convert", "deploy"];
        let zone = ("zone".to_owned(), "a".to_owned());
        let running = process.running.keys().chain(process.unanswered.keys());
        let hello = WorkerHello {
            session: SessionId(link as u64),
            worker: process.name.clone(),
            incarnation,
            version: String::new(),
            resources: process.total,
            labels: (process.worker == 0).then_some(zone).into_iter().collect(),
            kinds: (kinds.iter())
                .filter_map(|kind| Some((kind.parse().ok()?, 1)))
                .collect(),
            cached: Vec::new(),
            running: running.cloned().collect(),
            credits: u32::try_from(process.credits).unwrap_or(0),
            serving: None,
        };
        let hello = WorkerHello {
            serving: self.offer(number),
            ..hello
        };
        let process = &self.processes[number];
        let reports: Vec<_> = process.unanswered.values().cloned().collect();
        self.send_up(link, Command::WorkerRegistered(Box::new(hello)));
        if !reports.is_empty() {
            let session = SessionId(link as u64);
            self.send_up(link, Command::Reports { session, reports });
        }
    }

    pub(super) fn worker_gets(
        &mut self,
        number: usize,
        link: Link,
        message: Down,
    ) -> Result<(), String> {
        let process = &mut self.processes[number];
        if !process.alive || process.link != Some(link) {
            return Ok(());
        }
        let term = self.links[link].epoch;
        if term < process.term {
            self.cut(link);
            self.disconnected(number);
            return Ok(());
        }
        process.term = term;
        match message {
            Down::Registered(abandon) => {
                let mut freed = 0;
                for id in abandon {
                    self.store.check_abandon(&id, &process.name)?;
                    process.unanswered.remove(&id);
                    freed += usize::from(process.running.remove(&id).is_some());
                }
                self.grant(number, freed);
            }
            Down::Assign(assignment) => return self.assigned(number, assignment),
            Down::Stop(id) => {
                if process.running.contains_key(&id) {
                    process.stopping.insert(id.clone());
                    // Some are deaf, and go on.
                    if self.rng.below(5) > 0 {
                        self.within_ms(5, Event::AttemptEnds(number, id));
                    }
                }
            }
            Down::Ack(id) => {
                process.unanswered.remove(&id);
            }
            Down::Serve(plan) => self.plan_arrives(number, *plan),
            Down::Close => {
                self.cut(link);
                self.disconnected(number);
            }
            Down::Gone => self.disconnected(number),
        }
        Ok(())
    }

    fn assigned(&mut self, number: usize, assignment: Box<Assignment>) -> Result<(), String> {
        let process = &mut self.processes[number];
        let (id, name) = (assignment.id.clone(), &process.name);
        if process.credits == 0 {
            return Err(format!(
                "{id} is assigned to {name}, which has granted no credit"
            ));
        }
        process.credits -= 1;
        if process.unanswered.contains_key(&id) {
            return Err(format!("I3: {id} is assigned to {name} again"));
        }
        if process.running.insert(id.clone(), assignment).is_some() {
            return Err(format!("I3: {id} is assigned to {name} twice"));
        }
        let used = process.used();
        if !used.fits_in(&process.total) || process.running.len() > process.slots {
            let running = process.running.len();
            return Err(format!(
                "{name} is to run {running} attempts, which take {used}"
            ));
        }
        let long = if self.rng.below(10) == 0 { 800 } else { 40 };
        self.within_ms(long, Event::AttemptEnds(number, id));
        Ok(())
    }

    fn disconnected(&mut self, number: usize) {
        let process = &mut self.processes[number];
        process.link = None;
        process.since = self.now;
        self.within_ms(400, Event::Connect(number));
    }

    fn grant(&mut self, number: usize, credits: usize) {
        let process = &mut self.processes[number];
        if process.draining || credits == 0 {
            return;
        }
        process.credits += credits;
        if let Some(link) = process.link {
            let session = SessionId(link as u64);
            let credits = u32::try_from(credits).unwrap_or(0);
            self.send_up(link, Command::Credits { session, credits });
        }
    }

    pub(super) fn attempt_ends(&mut self, number: usize, id: &AttemptId) {
        let process = &mut self.processes[number];
        if process.paused_until > self.now {
            let until = process.paused_until;
            return self.at(until, Event::AttemptEnds(number, id.clone()));
        }
        let Some(assignment) = process.running.remove(id).filter(|_| process.alive) else {
            return;
        };
        let stopped = process.stopping.remove(id);
        let outcome = self.outcome(number, stopped, &assignment);
        self.store.attempt_ended(id, &outcome);
        let report = AttemptReport {
            id: id.clone(),
            outcome,
            timing: AttemptTiming::default(),
        };
        let copies = if self.weather.repeats && self.one_in(5) {
            2
        } else {
            1
        };
        let process = &mut self.processes[number];
        process.unanswered.insert(id.clone(), report.clone());
        if let Some(link) = process.link {
            for _ in 0..copies {
                let (session, reports) = (SessionId(link as u64), vec![report.clone()]);
                self.send_up(link, Command::Reports { session, reports });
            }
        }
        self.grant(number, 1);
    }

    #[allow(clippy::result_large_err, reason = "as the engine takes it")]
    fn outcome(
        &mut self,
        number: usize,
        stopped: bool,
        assignment: &Assignment,
    ) -> Result<AttemptSuccess, AttemptFailure> {
        let artifact = ArtifactName::new("out").map(|name| ArtifactRef {
            name,
            manifest: output_of(&assignment.id),
            bytes: 10,
        });
        let outputs: Vec<_> = artifact.into_iter().collect();
        let mut results = Map::new();
        let score = [0.1, 0.5, 0.9][self.below(3)];
        results.insert("score".to_owned(), json!(score));
        let input = assignment
            .inputs
            .first()
            .map(|input| input.artifact.clone());
        let mut bad_manifest = None;
        let draining = self.processes[number].draining;
        let luck = if self.calm { 0 } else { self.rng.below(24) };
        let reason = match luck {
            _ if stopped && self.rng.below(4) > 0 => Reason::Cancelled,
            _ if draining && self.rng.below(2) == 0 => Reason::Preempted,
            0..=16 => {
                let deploys = assignment.kind.as_str() == "deploy";
                let model = format!("m{}", self.rng.below(2)).parse().ok();
                let registration = model.zip(input.filter(|_| deploys));
                let registration = registration.map(|(model, artifact)| ModelRegistration {
                    model,
                    alias: "champion".parse().ok(),
                    artifact,
                    metrics: results.clone(),
                    schema: Value::Null,
                    notes: String::new(),
                });
                return Ok(AttemptSuccess {
                    outputs,
                    results,
                    registration,
                });
            }
            17 | 18 => Reason::UserError,
            19 => {
                bad_manifest = input.map(|input| input.manifest);
                Reason::Storage
            }
            20 => Reason::Data,
            21 => Reason::Oom,
            22 => Reason::System,
            _ => Reason::Preempted,
        };
        let keeps = self.rng.below(3) == 0;
        Err(AttemptFailure {
            failure: Failure::new(reason, "simulated"),
            bad_manifest,
            outputs: if keeps { outputs } else { Vec::new() },
            results: if keeps { results } else { Map::new() },
        })
    }

    // What befalls workers.

    /// Another life of a worker starts; the old one is over, if it `dies`.
    pub(super) fn restart(&mut self, number: usize, dies: bool) {
        let process = &mut self.processes[number];
        if !process.alive {
            return;
        }
        let worker = process.worker;
        if dies {
            process.alive = false;
            if let Some(link) = process.link {
                self.cut(link);
            }
        }
        self.new_process(worker);
    }

    pub(super) fn pause(&mut self, number: usize) {
        let pause = Duration::from_micros(self.rng.below(2_000_000));
        self.processes[number].paused_until = self.now.after(pause);
        if let Some(link) = self.processes[number]
            .link
            .filter(|_| self.rng.below(2) == 0)
        {
            self.cut(link);
        }
    }

    pub(super) fn drain(&mut self, number: usize) {
        let process = &mut self.processes[number];
        // Somebody must be left to run things.
        if process.worker == 0 || !process.alive || process.draining {
            return;
        }
        process.draining = true;
        if let Some(link) = process.link {
            let session = SessionId(link as u64);
            self.send_up(link, Command::WorkerDraining { session });
        }
    }

    /// The faults stop: of each worker the newest life goes on, and takes work again.
    pub(super) fn calm_workers(&mut self) {
        for number in 0..self.processes.len() {
            let worker = self.processes[number].worker;
            let newer = |p: &Process| p.worker == worker && p.alive;
            let last = !self.processes[number + 1..].iter().any(newer);
            let process = &mut self.processes[number];
            process.paused_until = self.now;
            if process.alive && (!last || process.draining) {
                process.alive = false;
                if let Some(link) = process.link {
                    self.cut(link);
                }
                if last {
                    self.new_process(worker);
                }
            }
        }
    }
}
