//! Clients: they submit until they are answered, cancel, retry, forget, and watch.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use emberline_common::{
    ids::{Digest, Epoch, RunId, TaskName},
    run_view::{RunState, RunSummary, TaskState, TaskView},
    time::Timestamp,
};
use serde_json::Map;

use super::{
    leaders::{Asked, same},
    pipelines,
    world::{Event, World},
};
use crate::engine::{
    api::{ArchivedRun, Command, Outcome, Refusal, Submission},
    spec_blob,
};

/// All clients.
#[derive(Debug, Default)]
pub(super) struct Clients {
    submissions: Vec<Sent>,
    /// Runs that a client was told are accepted, but for those it asked to forget.
    pub acknowledged: BTreeSet<RunId>,
    watchers: BTreeMap<RunId, Watcher>,
    /// How the tasks of ended runs ended.
    ended: BTreeMap<RunId, BTreeMap<TaskName, (u32, TaskState)>>,
}

#[derive(Debug)]
struct Sent {
    submission: Submission,
    asked: u32,
    run: Option<RunId>,
}

/// What a client that watches a run has been told.
#[derive(Debug, Clone)]
pub(super) struct Watcher {
    epoch: Epoch,
    run: RunId,
    /// Tells a retried run from what it was before.
    resumed_at: Timestamp,
    state: RunState,
    tasks: BTreeMap<TaskName, (u32, TaskState)>,
}

/// An answer.
#[derive(Debug)]
pub(super) enum Told {
    Submit(usize, Result<Outcome, Refusal>),
    Cancel(RunId, Result<Outcome, Refusal>),
    Retry(RunId, Result<Outcome, Refusal>),
    Watch(Box<Watcher>),
}

impl Clients {
    pub fn all_answered(&self) -> bool {
        self.submissions.iter().all(|sent| sent.run.is_some())
    }

    pub fn watched(&self) -> Vec<RunId> {
        self.watchers.keys().cloned().collect()
    }
}

impl World {
    /// The leader that a client finds; now and then one that does not lead any more.
    fn some_leader(&mut self) -> Epoch {
        let number = self.below(self.leaders.len());
        if self.one_in(8) {
            self.leaders.get(number).map_or(self.epoch, |l| l.epoch)
        } else {
            self.epoch
        }
    }

    pub(super) fn client(&mut self) -> Result<(), String> {
        if self.calm {
            return Ok(());
        }
        self.within_ms(400, Event::Client);
        let epoch = self.some_leader();
        match self.rng.below(12) {
            0..=5 => self.submit()?,
            6 => {
                if let Some(run) = self.any_run() {
                    let asked = Some(Asked::Cancel(run.clone()));
                    let why = "simulated".to_owned();
                    self.decide(epoch, Command::Cancel { run, why }, asked)?;
                }
            }
            7 | 8 => {
                if let Some((run, archive)) = self.some_ended(epoch) {
                    // The archive is read, and the run may be another's meanwhile.
                    self.within_ms(300, Event::Retry(run.clone(), archive));
                    if self.one_in(4) {
                        self.within_ms(600, Event::Retry(run, archive));
                    }
                }
            }
            9 | 10 => {
                if let Some(run) = self.any_run() {
                    self.watch(&run)?;
                }
            }
            _ => {
                if let Some((run, _)) = self.some_ended(epoch).filter(|_| self.rng.below(3) == 0) {
                    self.clients.acknowledged.remove(&run);
                    self.store.forgettable.insert(run.clone());
                    self.decide(epoch, Command::Forget { runs: vec![run] }, None)?;
                }
            }
        }
        Ok(())
    }

    fn any_run(&mut self) -> Option<RunId> {
        let number = self.below(self.clients.acknowledged.len());
        self.clients.acknowledged.iter().nth(number).cloned()
    }

    fn some_ended(&mut self, epoch: Epoch) -> Option<(RunId, Digest)> {
        let run = self.any_run()?;
        let ended = self.leader(epoch)?.engine.ended_run(&run)?;
        Some((run, ended.archive))
    }

    fn submit(&mut self) -> Result<(), String> {
        let number = self.clients.submissions.len();
        let again = self.below(number + 1);
        // The same pipeline again, or a new one.
        let spec = match self.clients.submissions.get(again) {
            Some(sent) if self.rng.below(2) == 0 => sent.submission.spec.clone(),
            _ => Arc::new(pipelines::random(&mut self.rng)?),
        };
        let blob = Digest::of(&spec_blob(&spec));
        self.store.specs.insert(blob, spec.clone());
        let submission = Submission {
            run: RunId::new(format!("r{number}")).map_err(|error| error.to_string())?,
            request_id: Some(format!("q{number}")),
            spec,
            revision: blob,
            params: Map::new(),
            base_dir: "/".to_owned(),
            priority: None,
            no_cache: self.one_in(5),
            files: Vec::new(),
            trigger: "manual".to_owned(),
            traceparent: String::new(),
            change: None,
            repairs: None,
        };
        self.clients.submissions.push(Sent {
            submission,
            asked: 0,
            run: None,
        });
        self.ask(number)
    }

    /// Asks until there is an answer; each time the service gives it another run id.
    pub(super) fn ask(&mut self, number: usize) -> Result<(), String> {
        if self.clients.submissions[number].run.is_some() {
            return Ok(());
        }
        self.within_ms(500, Event::Ask(number));
        let epoch = self.some_leader();
        for _ in 0..1 + self.rng.below(2) {
            let sent = &mut self.clients.submissions[number];
            sent.asked += 1;
            let mut submission = sent.submission.clone();
            submission.run =
                RunId::new(format!("r{number}-{}", sent.asked)).map_err(|e| e.to_string())?;
            let command = Command::Submit(Box::new(submission));
            self.decide(epoch, command, Some(Asked::Submit(number)))?;
        }
        Ok(())
    }

    pub(super) fn retry(&mut self, run: &RunId, archive: Digest) -> Result<(), String> {
        let epoch = self.some_leader();
        let Some(archived) = self.archives.get(&archive).cloned() else {
            return Ok(());
        };
        let asked = Some(Asked::Retry(run.clone()));
        self.decide(epoch, Command::Retry(Box::new(archived)), asked)
    }

    pub(super) fn watch(&mut self, run: &RunId) -> Result<(), String> {
        let epoch = self.epoch;
        let Some(leader) = self.leader_mut(epoch) else {
            return Ok(());
        };
        let (Some(live), Some(view)) = (leader.engine.live(run), leader.engine.run_view(run))
        else {
            return Ok(());
        };
        let watcher = Watcher {
            epoch,
            run: run.clone(),
            resumed_at: live.record.resumed_at,
            state: view.summary.state,
            tasks: (view.tasks.into_iter())
                .map(|task| (task.task, (task.attempt, task.state)))
                .collect(),
        };
        leader.engine.set_watched(run, true);
        self.read(epoch, Asked::Watch(Box::new(watcher)))
    }

    pub(super) fn told(&mut self, epoch: Epoch, told: Told) -> Result<(), String> {
        match told {
            Told::Submit(number, outcome) => match outcome {
                Ok(Outcome::Submitted { run, .. }) => {
                    let sent = &mut self.clients.submissions[number];
                    match &sent.run {
                        Some(known)
                            if *known != run && self.clients.acknowledged.contains(known) =>
                        {
                            return Err(format!("I3: one request made {known} and {run}"));
                        }
                        Some(_) => {}
                        None => {
                            self.played.runs += 1;
                            sent.run = Some(run.clone());
                            self.clients.acknowledged.insert(run);
                        }
                    }
                }
                Err(Refusal::QueueFull { .. }) if self.weather.max_live_runs < 100 => {}
                other => return Err(format!("a submission was refused: {other:?}")),
            },
            Told::Cancel(run, outcome) => match outcome {
                Ok(_) | Err(Refusal::NoSuchRun(_) | Refusal::WrongState { .. }) => {}
                other => return Err(format!("{run} cannot be cancelled: {other:?}")),
            },
            Told::Retry(run, outcome) => match outcome {
                Ok(_) => {
                    self.played.retries += 1;
                    self.within_ms(50, Event::Watch(run));
                }
                Err(
                    Refusal::NoSuchRun(_) | Refusal::WrongState { .. } | Refusal::QueueFull { .. },
                ) => {}
                other => return Err(format!("{run} cannot be retried: {other:?}")),
            },
            Told::Watch(watcher) => {
                let seen = self.clients.watchers.get(&watcher.run);
                if let Some(seen) = seen.filter(|seen| seen.resumed_at == watcher.resumed_at)
                    && seen.epoch <= epoch
                {
                    for (name, &(attempt, state)) in &seen.tasks {
                        let told = watcher.tasks.get(name).copied();
                        let (new_attempt, new_state) = told.unwrap_or((0, TaskState::Waiting));
                        let lost = state.is_final() && new_state != state;
                        if new_attempt < attempt || lost {
                            return Err(format!(
                                "I2: {}/{name} was told to be {state}, attempt {attempt}, and is {new_state}, attempt {new_attempt}",
                                watcher.run
                            ));
                        }
                    }
                }
                if seen.is_none_or(|seen| seen.epoch <= epoch) {
                    self.clients.watchers.insert(watcher.run.clone(), *watcher);
                }
            }
        }
        Ok(())
    }

    pub(super) fn task_changed(&mut self, epoch: Epoch, task: &TaskView) -> Result<(), String> {
        let watcher = self.clients.watchers.get_mut(&task.run);
        let Some(watcher) = watcher.filter(|watcher| watcher.epoch == epoch) else {
            return Ok(());
        };
        let told = watcher.tasks.get_mut(&task.task);
        let told = told.ok_or_else(|| format!("{} has no task {}", task.run, task.task))?;
        let (attempt, state) = *told;
        let back = task.state == TaskState::Waiting && state != TaskState::Waiting;
        if task.attempt < attempt || back || state.is_final() && state != task.state {
            return Err(format!(
                "a watcher of {}/{} is told {} attempt {} after {state} attempt {attempt}",
                task.run, task.task, task.state, task.attempt
            ));
        }
        *told = (task.attempt, task.state);
        self.store.check_told(task)
    }

    pub(super) fn run_changed(&mut self, epoch: Epoch, run: &RunSummary) -> Result<(), String> {
        let watcher = self.clients.watchers.get_mut(&run.run);
        let Some(watcher) = watcher.filter(|watcher| watcher.epoch == epoch) else {
            return Ok(());
        };
        if watcher.state.is_final() && watcher.state != run.state {
            let (was, is) = (watcher.state, run.state);
            return Err(format!("a watcher of {} is told {is} after {was}", run.run));
        }
        watcher.state = run.state;
        if run.state.is_final() {
            // Who has watched a run to its end knows how each task ended.
            let (run, told) = (&run.run, watcher.tasks.clone());
            self.clients.watchers.remove(run);
            same(
                "what the watcher of an ended run knows",
                self.clients.ended.get(run),
                Some(&told),
            )?;
        }
        Ok(())
    }

    /// Remembers how the tasks of an ended run ended.
    pub(super) fn run_ended(&mut self, archived: &ArchivedRun) {
        let tasks = archived.view.tasks.iter();
        let tasks = tasks.map(|task| (task.task.clone(), (task.attempt, task.state)));
        let run = archived.view.summary.run.clone();
        self.clients.ended.insert(run, tasks.collect());
    }
}
