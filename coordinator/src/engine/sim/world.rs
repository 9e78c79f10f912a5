//! The world: one event after the other, in the order of simulated time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use emberline_common::{
    delivery::DeploymentOutcome,
    ids::{AttemptId, Digest, Epoch, RunId},
    time::Timestamp,
};

use super::{
    Played, Sabotage,
    clients::Clients,
    faults::Weather,
    leaders::Leader,
    network::{Connection, Link},
    store::Store,
    workers::Process,
};
use crate::engine::{
    api::{ArchivedRun, EndedRun},
    retries::Random,
};

/// How long everything may take to end after the last fault, on simulated time.
const CALM: Duration = Duration::from_secs(600);
const MAX_STEPS: u64 = 200_000;

/// What happens next. Numbers are those of connections, processes and submissions.
#[derive(Debug, Clone)]
pub(super) enum Event {
    /// A message reaches a leader.
    Up(Link),
    /// A message reaches a worker.
    Down(Link),
    /// A leader's transaction reaches the store.
    Persist(Epoch),
    /// A leader learns that its transaction has succeeded.
    Act(Epoch),
    /// A leader's deadline.
    Deadline(Epoch),
    /// The record of an ended run is in the object store.
    Archived(Epoch, RunId, Digest),
    /// The lease of a deposed leader is over.
    LeaseOver(Epoch),
    /// Nobody leads: somebody takes over.
    Lead,
    /// An attempt ends on its worker.
    AttemptEnds(usize, AttemptId),
    /// A worker connects.
    Connect(usize),
    /// A client does something new.
    Client,
    /// A client asks for its submission's run, again.
    Ask(usize),
    /// A client starts the run with this archive again.
    Retry(RunId, Digest),
    /// A client watches a run.
    Watch(RunId),
    /// A worker goes on serving.
    Serves(usize),
    /// Something breaks.
    Fault,
}

/// The whole of it.
#[derive(Debug)]
pub(super) struct World {
    pub rng: Random,
    pub sabotage: Option<Sabotage>,
    pub weather: Weather,
    pub now: Timestamp,
    /// The faults have stopped.
    pub calm: bool,
    events: BinaryHeap<Reverse<(Timestamp, u64)>>,
    what: BTreeMap<u64, Event>,
    next: u64,
    pub store: Store,
    /// The highest term: the store takes writes of no other.
    pub epoch: Epoch,
    pub leaders: Vec<Leader>,
    pub links: Vec<Connection>,
    pub processes: Vec<Process>,
    pub clients: Clients,
    /// The object store's archives.
    pub archives: BTreeMap<Digest, ArchivedRun>,
    pub played: Played,
    /// Prints every command and what is written (`EMBERLINE_SIM_TRACE`).
    pub trace: bool,
}

impl World {
    /// A world with one leader and up to four workers.
    pub fn new(seed: u64, sabotage: Option<Sabotage>) -> Self {
        let mut rng = Random::new(seed);
        let weather = Weather::random(&mut rng);
        let mut world = Self {
            rng,
            sabotage,
            weather,
            now: Timestamp(1_000_000_000_000),
            calm: false,
            events: BinaryHeap::new(),
            what: BTreeMap::new(),
            next: 0,
            store: Store::default(),
            epoch: Epoch(0),
            leaders: Vec::new(),
            links: Vec::new(),
            processes: Vec::new(),
            clients: Clients::default(),
            archives: BTreeMap::new(),
            played: Played::default(),
            trace: std::env::var_os("EMBERLINE_SIM_TRACE").is_some(),
        };
        world.at(world.now, Event::Lead);
        for name in 0..1 + world.below(4) {
            world.new_process(name);
        }
        world.within_ms(5, Event::Client);
        world.within_ms(300, Event::Fault);
        world
    }

    /// Plays until every acknowledged run has ended.
    pub fn play(&mut self) -> Result<Played, String> {
        let calm_from = self.now.after(self.weather.lasts);
        loop {
            if !self.calm && self.now >= calm_from {
                self.calm_down();
            }
            if self.calm && self.is_over() {
                break;
            }
            if self.now > calm_from.after(CALM) || self.played.steps > MAX_STEPS {
                return Err(format!("I1: not all runs have ended: {}", self.open_runs()));
            }
            if !self.step()? {
                let open = self.open_runs();
                return Err(format!("I1: nothing happens any more: {open}"));
            }
        }
        self.check_end()?;
        self.played.cached = self.store.reused;
        self.played.deployed = self.store.came_out(DeploymentOutcome::Live);
        self.played.given_up = self.store.came_out(DeploymentOutcome::Aborted)
            + self.store.came_out(DeploymentOutcome::CaughtBeforeExposure);
        Ok(self.played)
    }

    /// Plays one event; `false` if there is none.
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
            Event::Up(link) => self.up_arrives(link)?,
            Event::Down(link) => self.down_arrives(link)?,
            Event::Persist(epoch) => self.persist(epoch)?,
            Event::Act(epoch) => self.act(epoch)?,
            Event::Deadline(epoch) => self.deadline(epoch)?,
            Event::Archived(epoch, run, archive) => self.archived(epoch, run, archive)?,
            Event::LeaseOver(epoch) => self.step_down(epoch),
            Event::Lead => self.lead()?,
            Event::AttemptEnds(process, id) => self.attempt_ends(process, &id),
            Event::Connect(process) => self.connect(process),
            Event::Client => self.client()?,
            Event::Ask(number) => self.ask(number)?,
            Event::Retry(run, archive) => self.retry(&run, archive)?,
            Event::Watch(run) => self.watch(&run)?,
            Event::Serves(process) => self.serves(process),
            Event::Fault => self.fault()?,
        }
        Ok(true)
    }

    pub fn at(&mut self, at: Timestamp, event: Event) {
        self.events.push(Reverse((at, self.next)));
        self.what.insert(self.next, event);
        self.next += 1;
    }

    /// At a random time from now on, within so many milliseconds.
    pub fn within_ms(&mut self, ms: u64, event: Event) {
        let micros = 1 + self.rng.below(ms * 1000);
        self.at(self.now.after(Duration::from_micros(micros)), event);
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.rng.below(bound as u64)).unwrap_or(0)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.rng.below(n) == 0
    }

    /// The faults stop: whoever is away comes back, and only the last leader leads.
    fn calm_down(&mut self) {
        self.calm = true;
        let deposed = self.leaders.iter().map(|leader| leader.epoch);
        let deposed: Vec<_> = deposed.filter(|epoch| *epoch != self.epoch).collect();
        for epoch in deposed {
            self.step_down(epoch);
        }
        for leader in &mut self.leaders {
            leader.paused_until = self.now;
        }
        self.calm_workers();
    }

    fn is_over(&self) -> bool {
        let live = |prefix: &str| {
            let mut from = self.store.records.range(prefix.to_owned()..);
            from.next().is_some_and(|(key, _)| key.starts_with(prefix))
        };
        !live("runs/")
            && !live("tasks/")
            && self.store.rolling().is_empty()
            && self.clients.all_answered()
            && self.leader(self.epoch).is_some_and(Leader::is_done)
    }

    fn open_runs(&self) -> String {
        let leader = self.leader(self.epoch);
        let runs = leader.into_iter().flat_map(|l| l.engine.live_runs());
        let runs = runs.map(|run| {
            let view = leader.and_then(|l| l.engine.run_view(&run.run));
            let tasks = view.into_iter().flat_map(|view| view.tasks);
            let open = tasks.filter(|task| !task.state.is_final());
            let open = open.map(|task| format!("{} {} ({})", task.task, task.state, task.note));
            let open: Vec<_> = open.collect();
            format!("{} {} {open:?}", run.run, run.state)
        });
        let rolling = self.store.rolling();
        format!(
            "{}; {rolling:?} are under way",
            runs.collect::<Vec<_>>().join("; ")
        )
    }

    /// Nothing acknowledged is lost, and nothing is left over.
    fn check_end(&self) -> Result<(), String> {
        self.check_acknowledged()?;
        for (key, value) in &self.store.records {
            let kind = key.split('/').next().unwrap_or_default();
            match kind {
                "cache" | "models" | "deployments" | "environments" => {}
                "ended" => {
                    let ended: EndedRun =
                        serde_json::from_slice(value).map_err(|e| format!("{key}: {e}"))?;
                    let summary = &ended.summary;
                    let succeeded = summary.state.as_str() == "succeeded";
                    if !summary.state.is_final() || succeeded != summary.failure.is_none() {
                        return Err(format!("I1: {key} is {}", summary.state));
                    }
                }
                _ => return Err(format!("I8: {key} is left over")),
            }
        }
        let Some(leader) = self.leader(self.epoch) else {
            return Err("I1: nobody leads".to_owned());
        };
        leader.check_nothing_left()
    }
}
