//! Who serves what: replicas are placed on serving workers, and each worker has a plan, the whole of
//! what it is to serve.
//!
//! Nothing of this is written. What is live and what is coming stands in the records; where it is served
//! follows from them and from what the workers that are there have loaded, so that a new leader finds
//! replicas where they are. A replica is given up only when those that replace it answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use emberline_common::{
    delivery::{Deployment, DeploymentOutcome},
    ids::{DeploymentId, EnvironmentName, Incarnation, ModelName, WorkerName},
    serving::{
        ServedModel, ServedVersion, ServingLimits, ServingOffer, ServingPlan, ServingStatus,
        Traffic, VersionState, VersionStats, VersionStatus,
    },
    time::Timestamp,
};

use super::{
    Engine,
    api::{Effect, SessionId, WorkerHello},
};

/// How often a worker says what it has counted: often enough that a bad version is taken back within a
/// second, while one is coming.
const REPORT_WHILE_ROLLING: Duration = Duration::from_millis(200);
const REPORT: Duration = Duration::from_secs(1);

/// A model in an environment.
pub(super) type Place = (EnvironmentName, ModelName);

/// What is known of serving workers, and what they were told.
#[derive(Debug, Default)]
pub(super) struct Serving {
    workers: BTreeMap<WorkerName, ServingWorker>,
    placed: BTreeMap<Place, BTreeSet<WorkerName>>,
    /// Deployments of which something may happen by itself.
    pub rolling: BTreeMap<Place, DeploymentId>,
    /// What was counted in the phase under way.
    pub windows: BTreeMap<Place, Window>,
    revision: u64,
    /// Whether plans may have to change.
    pub dirty: bool,
    /// Until then workers of the leader before may still come.
    pub complete_at: Timestamp,
}

/// A worker that serves.
#[derive(Debug)]
struct ServingWorker {
    session: SessionId,
    incarnation: Incarnation,
    offer: ServingOffer,
    status: ServingStatus,
    told: Option<ServingPlan>,
}

/// What was counted over all replicas since a phase began.
#[derive(Debug, Default, Clone)]
pub(super) struct Window {
    pub new: VersionStats,
    pub live: VersionStats,
}

/// A serving worker as far as one model is concerned.
#[derive(Debug, Clone)]
pub struct Replica {
    /// The worker.
    pub worker: WorkerName,
    /// Where it answers.
    pub address: String,
    /// Whether it is one of the model's replicas, and not about to give it up.
    pub placed: bool,
    /// Whether it takes requests, as far as is known.
    pub ready: bool,
    /// The model's versions on it.
    pub versions: Vec<VersionStatus>,
}

/// How far the replicas of a place are with one version.
pub(super) enum Loaded {
    /// There is none.
    NoReplica,
    /// On so many of so many.
    Partly(usize, usize),
    /// One says that it cannot.
    Failed(String),
    /// On all of them.
    Everywhere,
}

impl ServingWorker {
    fn state(&self, model: &ModelName, version: u32) -> Option<&VersionState> {
        let mut versions = self.status.versions.iter();
        let found = versions.find(|v| v.model == *model && v.version == version);
        found.map(|found| &found.state)
    }

    fn has(&self, model: &ModelName, version: u32) -> bool {
        self.state(model, version) == Some(&VersionState::Ready)
    }
}

impl Engine {
    /// A worker opened a session: with what it serves, if it does.
    pub(super) fn serving_registered(&mut self, hello: &WorkerHello) {
        let Some((offer, status)) = hello.serving.clone() else {
            return self.serving_lost(&hello.worker);
        };
        let worker = ServingWorker {
            session: hello.session,
            incarnation: hello.incarnation.clone(),
            offer,
            status: ServingStatus::default(),
            told: None,
        };
        let before = self.serving.workers.insert(hello.worker.clone(), worker);
        if let Some(before) = before.filter(|b| b.incarnation == hello.incarnation)
            && let Some(worker) = self.serving.workers.get_mut(&hello.worker)
        {
            // The same life: its counts go on.
            worker.status = before.status;
        }
        self.take_status(&hello.worker, status);
        self.serving.dirty = true;
    }

    /// A worker is gone.
    pub(super) fn serving_lost(&mut self, worker: &WorkerName) {
        if self.serving.workers.remove(worker).is_some() {
            self.serving.dirty = true;
        }
    }

    /// A worker says how far it is.
    pub(super) fn serving_status(&mut self, session: SessionId, status: ServingStatus) {
        if let Some(worker) = self.fleet.name_of(session) {
            self.take_status(&worker, status);
        }
    }

    fn take_status(&mut self, name: &WorkerName, status: ServingStatus) {
        let Some(worker) = self.serving.workers.get_mut(name) else {
            return;
        };
        let before = std::mem::replace(&mut worker.status, status.clone());
        let environment = worker.offer.environment.clone();
        let mut changed = before.ready != status.ready || before.plan != status.plan;
        changed |= before.versions.len() != status.versions.len();
        for now in status.versions {
            let same = |v: &&VersionStatus| v.model == now.model && v.version == now.version;
            let before = before.versions.iter().find(same);
            changed |= before.is_none_or(|b| b.state != now.state || b.traffic != now.traffic);
            let place = (environment.clone(), now.model.clone());
            self.count(&place, &now, before.map(|before| &before.stats));
        }
        self.serving.dirty |= changed;
    }

    /// Adds what was counted since the reading before to the window of what is coming there.
    fn count(&mut self, place: &Place, now: &VersionStatus, before: Option<&VersionStats>) {
        let Some(id) = self.serving.rolling.get(place).copied() else {
            return;
        };
        let Some(deployment) = self.deployments.get(&id) else {
            return;
        };
        let is_new = now.version == deployment.version;
        let under_way = deployment.outcome == DeploymentOutcome::InProgress;
        let live = self.environments.get(place).map(|live| live.version);
        let since = match before {
            // It was loaded anew: it counts from the beginning.
            Some(before) if now.stats.requests < before.requests => now.stats.clone(),
            Some(before) => now.stats.since(before),
            // All that a new version has counted is its own; of the live one, who knows since when.
            None if is_new => now.stats.clone(),
            None => VersionStats::default(),
        };
        if is_new && under_way && since.requests > 0 && is_canary(deployment) {
            self.note_exposure(id);
        }
        // How far it has drifted is as it is now, and adds up to nothing.
        let since = VersionStats {
            input_drift: Vec::new(),
            prediction_drift: None,
            ..since
        };
        let window = self.serving.windows.entry(place.clone()).or_default();
        if is_new {
            window.new.add(&since);
        } else if live == Some(now.version) {
            window.live.add(&since);
        }
        self.serving.dirty = true;
    }

    /// Makes plans fit the records and the workers that are there; called at the end of each decision.
    pub(super) fn serve(&mut self) {
        if !std::mem::take(&mut self.serving.dirty) {
            return;
        }
        self.place_replicas();
        for place in self.serving.rolling.keys().cloned().collect::<Vec<_>>() {
            self.advance(&place);
        }
        // What has moved on may want other replicas.
        if std::mem::take(&mut self.serving.dirty) {
            self.place_replicas();
        }
        self.make_plans();
    }

    fn places(&self) -> BTreeSet<Place> {
        let live = self.environments.keys();
        live.chain(self.serving.rolling.keys()).cloned().collect()
    }

    /// The deployment that is under way there.
    pub(super) fn coming(&self, place: &Place) -> Option<&Deployment> {
        let id = self.serving.rolling.get(place)?;
        let found = self.deployments.get(id)?;
        (found.outcome == DeploymentOutcome::InProgress).then_some(found.as_ref())
    }

    /// The deployment of a model that is under way in an environment.
    #[must_use]
    pub fn coming_to(
        &self,
        environment: &EnvironmentName,
        model: &ModelName,
    ) -> Option<&Deployment> {
        self.coming(&(environment.clone(), model.clone()))
    }

    /// The deployment whose version is live there.
    fn live_deployment(&self, place: &Place) -> Option<&Deployment> {
        let live = self.environments.get(place)?;
        self.deployments.get(&live.deployment).map(AsRef::as_ref)
    }

    /// How many replicas there are to be.
    #[must_use]
    pub fn wanted_replicas(&self, environment: &EnvironmentName, model: &ModelName) -> u32 {
        let place = (environment.clone(), model.clone());
        let both = [self.live_deployment(&place), self.coming(&place)];
        let rollouts = both
            .into_iter()
            .flatten()
            .filter_map(|d| d.rollout.as_ref());
        rollouts.map(|r| r.replicas).max().unwrap_or(1).max(1)
    }

    /// Puts replicas where their versions are, then where they were, then where there is most room.
    fn place_replicas(&mut self) {
        let mut load: BTreeMap<WorkerName, usize> = BTreeMap::new();
        let mut placed = BTreeMap::new();
        for place in self.places() {
            let wanted = self.wanted_replicas(&place.0, &place.1) as usize;
            let live = self.environments.get(&place).map(|live| live.version);
            let version = live.or_else(|| self.coming(&place).map(|d| d.version));
            let before = self.serving.placed.get(&place);
            let is_there = |name: &WorkerName| before.is_some_and(|b| b.contains(name));
            let mut candidates: Vec<_> = (self.serving.workers.iter())
                .filter(|(name, worker)| {
                    let fleet = self.fleet.workers.get(*name);
                    worker.offer.environment == place.0
                        && fleet.is_some_and(|w| {
                            !w.draining && (w.suspect_since.is_none() || is_there(name))
                        })
                })
                .map(|(name, worker)| {
                    let has = version.is_some_and(|version| worker.has(&place.1, version));
                    let busy = load.get(name).copied().unwrap_or(0);
                    (!has, !is_there(name), busy, name.clone())
                })
                .collect();
            candidates.sort();
            let chosen: BTreeSet<WorkerName> =
                (candidates.into_iter().take(wanted)).map(|c| c.3).collect();
            for name in &chosen {
                *load.entry(name.clone()).or_default() += 1;
            }
            placed.insert(place, chosen);
        }
        self.serving.placed = placed;
    }

    /// How far the replicas of a place are with a version.
    pub(super) fn loaded(&self, place: &Place, version: u32) -> Loaded {
        let Some(placed) = self.serving.placed.get(place).filter(|p| !p.is_empty()) else {
            return Loaded::NoReplica;
        };
        let mut ready = 0;
        for name in placed {
            match self
                .serving
                .workers
                .get(name)
                .map(|w| (w, w.state(&place.1, version)))
            {
                Some((_, Some(VersionState::Ready))) => ready += 1,
                Some((_, Some(VersionState::Failed(why)))) => {
                    return Loaded::Failed(format!("worker `{name}` cannot load it: {why}"));
                }
                _ => {}
            }
        }
        if ready == placed.len() {
            Loaded::Everywhere
        } else {
            Loaded::Partly(ready, placed.len())
        }
    }

    /// The versions that each replica of a place has to have.
    fn versions(&self, place: &Place) -> Vec<ServedVersion> {
        let served = |number: u32, deployment: DeploymentId, traffic| {
            let version = self.models.version(&place.1, number)?;
            Some(ServedVersion {
                version: number,
                deployment,
                artifact: version.registration.artifact.manifest,
                traffic,
            })
        };
        let mut versions: Vec<ServedVersion> = Vec::new();
        if let Some(live) = self.environments.get(place) {
            versions.extend(served(live.version, live.deployment, Traffic::Live));
        }
        if let Some(coming) = self.coming(place)
            && let Some(rollout) = &coming.rollout
        {
            versions.extend(served(coming.version, coming.id, rollout.traffic()));
        }
        // What was live before stays warm, as long as it is a way back.
        let before = self.live_deployment(place);
        let before = before.and_then(|live| self.deployments.get(&live.previous?));
        if let Some(before) = before.filter(|before| before.failure.is_none())
            && versions.iter().all(|v| v.version != before.version)
        {
            versions.extend(served(before.version, before.id, Traffic::Standby));
        }
        versions
    }

    fn limits(&self, place: &Place) -> ServingLimits {
        let deployment = self.live_deployment(place).or_else(|| self.coming(place));
        let rollout = deployment.and_then(|d| d.rollout.as_ref());
        rollout.map_or_else(ServingLimits::default, |rollout| rollout.limits)
    }

    /// Tells each worker whose plan is another one now.
    fn make_plans(&mut self) {
        let mut plans: BTreeMap<WorkerName, Vec<ServedModel>> = BTreeMap::new();
        let mut rolling: BTreeSet<EnvironmentName> = BTreeSet::new();
        for place in self.places() {
            let versions = self.versions(&place);
            if versions.is_empty() {
                continue;
            }
            if self.serving.rolling.contains_key(&place) {
                rolling.insert(place.0.clone());
            }
            let none = BTreeSet::new();
            let placed = self.serving.placed.get(&place).unwrap_or(&none);
            let live = self.environments.get(&place).map(|live| live.version);
            let complete = match live {
                Some(version) => matches!(self.loaded(&place, version), Loaded::Everywhere),
                None => true,
            };
            // Where it still answers while the others are not ready.
            let leaving = self.serving.workers.iter().filter(|(name, worker)| {
                !complete
                    && !placed.contains(*name)
                    && worker.offer.environment == place.0
                    && live.is_some_and(|version| worker.has(&place.1, version))
            });
            let all: BTreeSet<&WorkerName> =
                placed.iter().chain(leaving.map(|(name, _)| name)).collect();
            for name in &all {
                let peers = all.iter().filter(|other| other != &name);
                let peers = peers.filter_map(|other| self.serving.workers.get(*other));
                plans.entry((*name).clone()).or_default().push(ServedModel {
                    model: place.1.clone(),
                    limits: self.limits(&place),
                    peers: peers.map(|peer| peer.offer.address.clone()).collect(),
                    versions: versions.clone(),
                });
            }
        }
        for (name, worker) in &mut self.serving.workers {
            let connected = self.fleet.workers.get(name);
            if connected.is_none_or(|w| w.suspect_since.is_some()) {
                continue;
            }
            let report_every = if rolling.contains(&worker.offer.environment) {
                REPORT_WHILE_ROLLING
            } else {
                REPORT
            };
            let mut plan = ServingPlan {
                revision: worker.told.as_ref().map_or(0, |told| told.revision),
                models: plans.remove(name).unwrap_or_default(),
                report_every,
                // The services say it: they know the coordinators' file, too.
                access: None,
            };
            if worker.told.as_ref() == Some(&plan) {
                continue;
            }
            self.serving.revision += 1;
            plan.revision = self.serving.revision;
            worker.told = Some(plan.clone());
            self.out.effects.push(Effect::Serve {
                session: worker.session,
                plan: Box::new(plan),
            });
        }
    }

    /// Who serves a model in an environment, by name.
    #[must_use]
    pub fn replicas(&self, environment: &EnvironmentName, model: &ModelName) -> Vec<Replica> {
        let place = (environment.clone(), model.clone());
        let placed = self.serving.placed.get(&place);
        let mut replicas = Vec::new();
        for (name, worker) in &self.serving.workers {
            let own = worker.status.versions.iter().filter(|v| v.model == *model);
            let versions: Vec<VersionStatus> = own.cloned().collect();
            let is_placed = placed.is_some_and(|placed| placed.contains(name));
            if worker.offer.environment != *environment || (versions.is_empty() && !is_placed) {
                continue;
            }
            let fleet = self.fleet.workers.get(name);
            replicas.push(Replica {
                worker: name.clone(),
                address: worker.offer.address.clone(),
                placed: is_placed,
                ready: worker.status.ready && fleet.is_some_and(|w| w.suspect_since.is_none()),
                versions,
            });
        }
        replicas
    }

    /// What was counted over all replicas in the phase under way: of the version of a deployment, and of
    /// the live one beside it. None if nothing of it may happen by itself any more.
    #[must_use]
    pub fn window(&self, deployment: &Deployment) -> Option<(VersionStats, VersionStats)> {
        let place = (deployment.environment.clone(), deployment.model.clone());
        if self.serving.rolling.get(&place) != Some(&deployment.id) {
            return None;
        }
        let window = self.serving.windows.get(&place);
        let Window { mut new, mut live } = window.cloned().unwrap_or_default();
        let live_version = self.environments.get(&place).map(|live| live.version);
        for replica in self.replicas(&place.0, &place.1) {
            for version in replica.versions {
                let drift = VersionStats {
                    input_drift: version.stats.input_drift,
                    prediction_drift: version.stats.prediction_drift,
                    ..VersionStats::default()
                };
                if version.version == deployment.version {
                    new.add(&drift);
                } else if Some(version.version) == live_version {
                    live.add(&drift);
                }
            }
        }
        Some((new, live))
    }
}

fn is_canary(deployment: &Deployment) -> bool {
    let traffic = deployment.rollout.as_ref().map(|rollout| rollout.traffic());
    matches!(traffic, Some(Traffic::Canary { .. }))
}
