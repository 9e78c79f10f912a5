//! The fleet: who is connected, what each has free, what each runs.
//!
//! A worker is known by its name. Its newest session counts; what it held is kept, by name and
//! attempt number, only as far as the worker itself says that it still runs it.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use emberline_common::{
    ids::{AttemptId, Digest, Incarnation, StageKind, WorkerName},
    resources::Resources,
    run_view::ArtifactRef,
    time::Timestamp,
};

use super::{
    api::{AssignedInput, SessionId, WorkerHello, WorkerStatus},
    placement::Shape,
};

/// Credits above this are as good as this.
const MAX_CREDITS: u32 = 1 << 20;
/// Inputs that are looked at for locality.
const LOCALITY_INPUTS: usize = 64;
/// Cached manifests that are remembered of one worker.
const MAX_CACHED: usize = 10_000;

/// One worker.
#[derive(Debug)]
pub(super) struct Worker {
    pub session: SessionId,
    pub incarnation: Incarnation,
    pub version: String,
    pub total: Resources,
    pub free: Resources,
    pub labels: BTreeMap<String, String>,
    pub kinds: BTreeMap<StageKind, u32>,
    pub cached: HashSet<Digest>,
    pub credits: u32,
    pub draining: bool,
    pub suspect_since: Option<Timestamp>,
    /// What is reserved: current attempts, and those told to stop that have not said they have.
    pub attempts: BTreeMap<AttemptId, Resources>,
}

impl Worker {
    fn available(&self) -> bool {
        self.credits > 0 && !self.draining && self.suspect_since.is_none()
    }

    /// Remembers what lies in the worker's cache now.
    pub fn has(&mut self, manifests: impl IntoIterator<Item = Digest>) {
        for manifest in manifests {
            if self.cached.len() >= MAX_CACHED {
                self.cached.clear();
            }
            self.cached.insert(manifest);
        }
    }

    fn local_bytes(&self, inputs: &[ArtifactRef]) -> u64 {
        let local = inputs.iter().take(LOCALITY_INPUTS);
        let local = local.filter(|input| self.cached.contains(&input.manifest));
        local.fold(0, |sum, input| sum.saturating_add(input.bytes))
    }
}

/// All workers.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    pub workers: BTreeMap<WorkerName, Worker>,
    sessions: BTreeMap<SessionId, WorkerName>,
    available: BTreeSet<WorkerName>,
}

impl Fleet {
    /// Enters a worker with what it still runs; gives the session that it replaces. One that was to
    /// leave still is, unless its process was started anew: that one was meant to stay.
    pub fn enter(
        &mut self,
        hello: &WorkerHello,
        kept: BTreeMap<AttemptId, Resources>,
    ) -> Option<SessionId> {
        let mut draining = false;
        let replaced = self.workers.remove(&hello.worker).map(|old| {
            self.sessions.remove(&old.session);
            draining = old.draining && old.incarnation == hello.incarnation;
            (old.session, old.suspect_since)
        });
        let used = kept
            .values()
            .fold(Resources::default(), |sum, one| sum.with(one));
        let worker = Worker {
            session: hello.session,
            incarnation: hello.incarnation.clone(),
            version: hello.version.clone(),
            total: hello.resources,
            free: hello.resources.without(&used),
            labels: hello.labels.clone(),
            kinds: hello.kinds.clone(),
            cached: hello.cached.iter().take(MAX_CACHED).copied().collect(),
            credits: hello.credits.min(MAX_CREDITS),
            draining,
            suspect_since: None,
            attempts: kept,
        };
        self.sessions.insert(hello.session, hello.worker.clone());
        self.workers.insert(hello.worker.clone(), worker);
        self.refresh(&hello.worker);
        // Of a session that is gone already nobody need be told.
        replaced.and_then(|(session, suspect)| suspect.is_none().then_some(session))
    }

    /// The worker of a session that is in force.
    pub fn name_of(&self, session: SessionId) -> Option<WorkerName> {
        self.sessions.get(&session).cloned()
    }

    /// Takes a worker out, with all it held.
    pub fn leave(&mut self, name: &WorkerName) -> Option<Worker> {
        let worker = self.workers.remove(name)?;
        self.sessions.remove(&worker.session);
        self.available.remove(name);
        Some(worker)
    }

    pub fn credit(&mut self, session: SessionId, credits: u32) {
        if let Some(name) = self.name_of(session) {
            if let Some(worker) = self.workers.get_mut(&name) {
                worker.credits = worker.credits.saturating_add(credits).min(MAX_CREDITS);
            }
            self.refresh(&name);
        }
    }

    /// Marks a session's connection as broken; gives the worker.
    pub fn suspect(&mut self, session: SessionId, now: Timestamp) -> Option<WorkerName> {
        let name = self.sessions.remove(&session)?;
        let worker = self.workers.get_mut(&name)?;
        worker.suspect_since = Some(now);
        self.refresh(&name);
        Some(name)
    }

    /// Gives a worker no more work; gives it, if there is one.
    pub fn drain(&mut self, name: &WorkerName) -> Option<&Worker> {
        self.workers.get_mut(name)?.draining = true;
        self.refresh(name);
        self.workers.get(name)
    }

    /// Reserves for an attempt and takes one credit.
    pub fn reserve(&mut self, name: &WorkerName, attempt: AttemptId, resources: Resources) {
        if let Some(worker) = self.workers.get_mut(name) {
            debug_assert!(resources.fits_in(&worker.free) && worker.credits > 0);
            worker.free = worker.free.without(&resources);
            worker.credits = worker.credits.saturating_sub(1);
            worker.attempts.insert(attempt, resources);
        }
        self.refresh(name);
    }

    /// Frees what an attempt held.
    pub fn release(&mut self, name: &WorkerName, attempt: &AttemptId) {
        if let Some(worker) = self.workers.get_mut(name)
            && worker.attempts.remove(attempt).is_some()
        {
            // Summed anew: a worker may have come back with less than it was given work for.
            let used =
                (worker.attempts.values()).fold(Resources::default(), |sum, one| sum.with(one));
            worker.free = worker.total.without(&used);
        }
    }

    fn refresh(&mut self, name: &WorkerName) {
        if self.workers.get(name).is_some_and(Worker::available) {
            self.available.insert(name.clone());
        } else {
            self.available.remove(name);
        }
    }

    pub fn any_available(&self) -> bool {
        !self.available.is_empty()
    }

    /// Whether any worker could take this shape now.
    pub fn fits_any(&self, shape: &Shape) -> bool {
        (self.available.iter()).any(|name| self.fits(name, shape))
    }

    fn fits(&self, name: &WorkerName, shape: &Shape) -> bool {
        self.workers.get(name).is_some_and(|worker| {
            shape.resources.fits_in(&worker.free) && shape.lacks(worker).is_none()
        })
    }

    /// The worker for a task: the one that holds most of its inputs, then the one that it fills
    /// best, then by name.
    pub fn pick(&self, shape: &Shape, inputs: &[ArtifactRef]) -> Option<WorkerName> {
        let candidates = (self.available.iter()).filter(|name| self.fits(name, shape));
        let best = candidates.min_by_key(|name| {
            self.workers.get(*name).map(|worker| {
                let left = worker.free.without(&shape.resources);
                let local = std::cmp::Reverse(worker.local_bytes(inputs));
                (local, left.gpus, left.cpu_millis, left.memory_bytes)
            })
        });
        best.cloned()
    }

    /// What keeps every worker from ever running this shape; `None` if one could.
    pub fn missing(&self, shape: &Shape) -> Option<String> {
        let mut first = None;
        for (name, worker) in &self.workers {
            match shape.lacks(worker) {
                None => return None,
                Some(what) => first = first.or(Some(format!("`{name}` {what}"))),
            }
        }
        Some(match first {
            None => "no worker is connected".to_owned(),
            Some(one) if self.workers.len() == 1 => format!("no worker can run this: {one}"),
            Some(one) => format!("none of {} workers can run this: {one}", self.workers.len()),
        })
    }

    pub fn running(&self) -> usize {
        self.workers.values().map(|w| w.attempts.len()).sum()
    }

    pub fn status(&self) -> Vec<WorkerStatus> {
        let status = |(name, worker): (&WorkerName, &Worker)| WorkerStatus {
            worker: name.clone(),
            suspect_since: worker.suspect_since,
            draining: worker.draining,
            total: worker.total,
            free: worker.free,
            labels: worker.labels.clone(),
            kinds: worker.kinds.keys().cloned().collect(),
            running: worker.attempts.len(),
            version: worker.version.clone(),
        };
        self.workers.iter().map(status).collect()
    }
}

/// The artifacts of inputs, for locality.
pub(super) fn artifacts(inputs: &[AssignedInput]) -> Vec<ArtifactRef> {
    let artifacts = inputs.iter().take(LOCALITY_INPUTS);
    artifacts.map(|input| input.artifact.clone()).collect()
}
