//! Workers that come, go, come back, and are given up.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use emberline_common::{
    failure::{Failure, Reason},
    ids::{AttemptId, WorkerName},
    resources::Resources,
};

use super::{
    Engine,
    api::{Disconnect, Effect, Outcome, Refusal, SessionId, WorkerHello},
    deadlines::Due,
    run::TaskRef,
};

impl Engine {
    /// A worker opened a session. It keeps the attempts that it says it runs and that are current;
    /// it is told to abandon the rest; what it held and no longer has is lost.
    ///
    /// While a worker is connected, another process does not get its name: else the two would take
    /// it from each other without end, and each time all that runs would be lost.
    pub(super) fn register(&mut self, hello: &WorkerHello) {
        if self.fleet.name_of(hello.session).is_some() {
            return;
        }
        let name = &hello.worker;
        if let Some(first) = self.fleet.workers.get(name)
            && first.suspect_since.is_none()
            && first.incarnation != hello.incarnation
        {
            return self.effect(Effect::CloseSession {
                session: hello.session,
                why: format!(
                    "another process is connected as worker `{name}`: each needs a name of its own"
                ),
            });
        }
        let mut held: BTreeSet<AttemptId> = self.unclaimed.remove(name).unwrap_or_default();
        if let Some(old) = self.fleet.workers.get(name) {
            held.extend(old.attempts.keys().cloned());
        }
        let mut kept: BTreeMap<AttemptId, Resources> = BTreeMap::new();
        let mut abandon = Vec::new();
        let mut tasks = Vec::new();
        for id in &hello.running {
            let Some((at, resources)) = self.held_by(id, name) else {
                abandon.push(id.clone());
                continue;
            };
            if kept.insert(id.clone(), resources).is_none() {
                tasks.push(at);
            }
        }
        if let Some(replaced) = self.fleet.enter(hello, kept.clone()) {
            self.effect(Effect::CloseSession {
                session: replaced,
                why: format!("a newer session of worker `{name}` has taken its place"),
            });
        }
        self.effect(Effect::Registered {
            session: hello.session,
            abandon,
        });
        self.serving_registered(hello);
        // The session in which it was told may have broken before it heard.
        if self.fleet.workers.get(name).is_some_and(|w| w.draining) {
            self.effect(Effect::Drain {
                session: hello.session,
            });
        }
        for at in tasks {
            self.stop_again(at);
        }
        let lost = held.into_iter().filter(|id| !kept.contains_key(id));
        self.lose(lost.collect(), name, "came back without it");
    }

    /// The task and the reservation of an attempt that is current on this worker.
    fn held_by(&self, id: &AttemptId, worker: &WorkerName) -> Option<(TaskRef, Resources)> {
        let at = self.current(id)?;
        let run = self.runs.get(&at.run)?;
        let task = &run.tasks[at.task as usize];
        let on = task.record.as_ref()?.worker.as_ref()?;
        let resources = run.stages[task.stage as usize].shape.resources;
        (on == worker).then_some((at, resources))
    }

    fn lose(&mut self, attempts: Vec<AttemptId>, worker: &WorkerName, how: &str) {
        for id in attempts {
            // What was told to stop and is no longer current is just gone.
            let Some((at, _)) = self.held_by(&id, worker) else {
                continue;
            };
            self.deciding = Some(id.run.clone());
            let text = format!("worker `{worker}` {how}");
            let failure = Failure::new(Reason::WorkerLost, text);
            self.attempt_ended(at, failure, false, None);
            self.settle(at.run);
        }
    }

    /// A person wants it to end. The worker remembers it, whoever leads next; one that is away is
    /// told when it is back.
    pub(super) fn drain_worker(&mut self, name: WorkerName) -> Result<Outcome, Refusal> {
        let Some(worker) = self.fleet.drain(&name) else {
            return Err(Refusal::NoSuchWorker(name));
        };
        let (session, running) = (worker.session, worker.attempts.len());
        self.serving.dirty = true;
        if worker.suspect_since.is_none() {
            self.effect(Effect::Drain { session });
        }
        Ok(Outcome::Draining { running })
    }

    pub(super) fn disconnected(&mut self, session: SessionId, how: Disconnect) {
        if let Some(worker) = self.fleet.suspect(session, self.now) {
            let grace = match how {
                Disconnect::Closed => self.config.closed_grace,
                // It has had its grace.
                Disconnect::Silent => Duration::ZERO,
            };
            let until = self.now.after(grace);
            self.serving.dirty = true;
            self.deadlines.add(until, Due::Worker { worker, session });
        }
    }

    /// A worker has not come back in time.
    pub(super) fn worker_lost(&mut self, name: &WorkerName) {
        if let Some(worker) = self.fleet.leave(name) {
            self.serving_lost(name);
            let attempts = worker.attempts.into_keys().collect();
            self.lose(attempts, name, "was lost");
        }
    }

    /// Attempts of an earlier leader that no worker has claimed are lost.
    pub(super) fn adoption_over(&mut self) {
        for (worker, attempts) in std::mem::take(&mut self.unclaimed) {
            let how = "did not come to the new leader in time";
            self.lose(attempts.into_iter().collect(), &worker, how);
        }
    }
}
