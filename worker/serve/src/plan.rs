//! A plan becomes what is served: what is new is fetched, loaded and warmed up by tasks of its own;
//! what is no longer wanted is let go of; and after each step a new picture of who answers what is
//! put in place.
//!
//! A live version that is not ready does not take over: the one before it stays, even where the plan
//! has it no more, until the new one is. What is only about traffic takes effect at once.

use std::{collections::HashMap, sync::Arc, time::Duration};

use emberline_common::{
    artifact::ArtifactError,
    ids::{Digest, ModelName},
    serving::{
        ServedModel, ServedVersion, ServingLimits, ServingPlan, ServingStatus, Traffic,
        VersionState, VersionStats, VersionStatus,
    },
};
use emberline_worker::{
    documents::{MODEL_FILE, WEIGHTS_FILE},
    serving::ServingArtifacts,
};
use tokio_util::sync::CancellationToken;

use crate::{
    feedback::Answered,
    routes::{Route, Routes},
    server::Inner,
    version::Version,
};

/// After a failure that may pass, first and at most.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// One version with one content.
type Key = (ModelName, u32, Digest);

#[derive(Debug)]
struct Entry {
    served: ServedVersion,
    state: State,
    /// Ends its loading.
    cancel: CancellationToken,
}

#[derive(Debug)]
enum State {
    Loading,
    Ready(Arc<Version>),
    Failed(String),
}

impl Entry {
    const fn version(&self) -> Option<&Arc<Version>> {
        match &self.state {
            State::Ready(version) => Some(version),
            State::Loading | State::Failed(_) => None,
        }
    }

    /// Why it does not answer.
    fn why(&self) -> String {
        match &self.state {
            State::Loading => "is being loaded".to_owned(),
            State::Failed(why) => format!("cannot be loaded: {why}"),
            State::Ready(_) => "is ready".to_owned(),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// What is wanted, and how far it is.
#[derive(Debug, Default)]
pub(crate) struct Planned {
    plan: ServingPlan,
    entries: HashMap<Key, Entry>,
    /// Who answers for each model now.
    live: HashMap<ModelName, Key>,
    answered: HashMap<ModelName, Arc<Answered>>,
}

/// What has to be loaded.
pub(crate) struct Load {
    key: Key,
    served: ServedVersion,
    limits: ServingLimits,
    cancel: CancellationToken,
}

fn live_of(model: &ServedModel) -> Option<&ServedVersion> {
    model.versions.iter().find(|v| v.traffic == Traffic::Live)
}

fn key_of(model: &ServedModel, version: &ServedVersion) -> Key {
    (model.model.clone(), version.version, version.artifact)
}

impl Planned {
    /// Takes over a plan; what has to be loaded for it comes back.
    pub fn apply(&mut self, plan: ServingPlan) -> (Routes, Vec<Load>) {
        let mut loads = Vec::new();
        for model in &plan.models {
            for served in &model.versions {
                let key = key_of(model, served);
                if let Some(entry) = self.entries.get_mut(&key) {
                    // Another deployment of what could not be loaded is reason to try again.
                    let again = entry.served.deployment != served.deployment
                        && matches!(entry.state, State::Failed(_));
                    entry.served = served.clone();
                    if !again {
                        continue;
                    }
                }
                let cancel = CancellationToken::new();
                loads.push(Load {
                    key: key.clone(),
                    served: served.clone(),
                    limits: model.limits,
                    cancel: cancel.clone(),
                });
                let entry = Entry {
                    served: served.clone(),
                    state: State::Loading,
                    cancel,
                };
                self.entries.insert(key, entry);
            }
        }
        self.plan = plan;
        (self.settle(), loads)
    }

    /// Loading one version has come to this. None if it is not wanted any more.
    fn loaded(&mut self, load: &Load, state: State) -> Option<Routes> {
        let entry = self.entries.get_mut(&load.key)?;
        if load.cancel.is_cancelled() {
            return None;
        }
        entry.state = state;
        Some(self.settle())
    }

    /// Lets go of what is not wanted, and says who answers what.
    fn settle(&mut self) -> Routes {
        let mut live = HashMap::new();
        for model in &self.plan.models {
            // Without a live version in the plan nobody is live.
            let Some(wanted) = live_of(model) else {
                continue;
            };
            let wanted = key_of(model, wanted);
            let is_ready = |key: &Key| self.entries.get(key).is_some_and(|e| e.version().is_some());
            let before = self.live.get(&model.model).filter(|key| is_ready(key));
            if is_ready(&wanted) {
                live.insert(model.model.clone(), wanted);
            } else if let Some(before) = before {
                live.insert(model.model.clone(), before.clone());
            }
        }
        self.live = live;
        let wanted: std::collections::HashSet<Key> = (self.plan.models.iter())
            .flat_map(|model| model.versions.iter().map(|v| key_of(model, v)))
            .collect();
        self.entries.retain(|key, _| {
            wanted.contains(key) || self.live.get(&key.0).is_some_and(|live| live == key)
        });
        let plan = &self.plan;
        (self.answered).retain(|name, _| plan.models.iter().any(|m| m.model == *name));
        let mut routes = Routes::default();
        for model in &self.plan.models {
            let answered = self.answered.entry(model.model.clone()).or_default();
            let mut route = Route {
                model: model.model.clone(),
                limits: model.limits,
                peers: model.peers.clone(),
                live: None,
                canary: None,
                shadow: None,
                ready: Vec::new(),
                waiting: Vec::new(),
                answered: Arc::clone(answered),
            };
            for served in &model.versions {
                let Some(entry) = self.entries.get(&key_of(model, served)) else {
                    continue;
                };
                let Some(version) = entry.version() else {
                    route.waiting.push((served.version, entry.why()));
                    continue;
                };
                version.slot.limit(&model.limits);
                route.ready.push(Arc::clone(version));
                match served.traffic {
                    Traffic::Canary { share } => route.canary = Some((share, Arc::clone(version))),
                    Traffic::Shadow { share } => route.shadow = Some((share, Arc::clone(version))),
                    Traffic::Live | Traffic::Standby => {}
                }
            }
            if let Some(key) = self.live.get(&model.model) {
                let entry = self.entries.get(key);
                route.live = entry.and_then(Entry::version).cloned();
                let kept = route.live.iter();
                let kept = kept.filter(|live| route.ready.iter().all(|v| v.number != live.number));
                let kept: Vec<_> = kept.cloned().collect();
                route.ready.extend(kept);
            }
            routes.models.insert(model.model.clone(), Arc::new(route));
        }
        routes
    }

    /// Whether every model that is to have a live version has one.
    pub fn is_complete(&self) -> bool {
        let models = self.plan.models.iter();
        let mut wanted = models.filter(|model| live_of(model).is_some());
        self.plan.revision > 0 && wanted.all(|model| self.live.contains_key(&model.model))
    }

    /// How far all of it is.
    pub fn status(&self, ready: bool) -> ServingStatus {
        let versions = self.entries.iter().map(|(key, entry)| {
            let is_live = self.live.get(&key.0).is_some_and(|live| live == key);
            let (state, stats) = match &entry.state {
                State::Loading => (VersionState::Loading, VersionStats::default()),
                State::Failed(why) => (VersionState::Failed(why.clone()), VersionStats::default()),
                State::Ready(version) => (VersionState::Ready, version.counters.read()),
            };
            // What is not ready gets nothing yet, and who was live before goes on.
            let traffic = match (&entry.state, entry.served.traffic) {
                _ if is_live => Traffic::Live,
                (State::Ready(_), Traffic::Live) | (State::Loading | State::Failed(_), _) => {
                    Traffic::Standby
                }
                (State::Ready(_), traffic) => traffic,
            };
            VersionStatus {
                model: key.0.clone(),
                version: key.1,
                deployment: entry.served.deployment,
                state,
                traffic,
                stats,
            }
        });
        let mut versions: Vec<VersionStatus> = versions.collect();
        versions.sort_by(|a, b| (&a.model, a.version).cmp(&(&b.model, b.version)));
        ServingStatus {
            plan: self.plan.revision,
            ready,
            versions,
        }
    }

    /// All versions that are loaded.
    pub fn ready(&self) -> Vec<Arc<Version>> {
        self.entries
            .values()
            .filter_map(Entry::version)
            .cloned()
            .collect()
    }

    /// Ends all loading.
    pub fn cancel(&self) {
        self.entries
            .values()
            .for_each(|entry| entry.cancel.cancel());
    }
}

/// Why a version cannot be loaded.
struct LoadError {
    why: String,
    /// Whether it may go by itself.
    passes: bool,
}

impl Inner {
    /// Fetches, loads and warms up one version, and tries again for as long as that may help.
    pub async fn load(self: Arc<Self>, load: Load, artifacts: ServingArtifacts) {
        let mut pause = RETRY_FIRST;
        loop {
            let trying = self.try_load(&load, &artifacts);
            let tried = tokio::select! {
                tried = trying => tried,
                () = load.cancel.cancelled() => return,
            };
            let (model, version) = (load.key.0.as_str(), load.key.1);
            let (state, passes) = match tried {
                Ok(loaded) => {
                    tracing::info!(model, version, "a version is loaded");
                    (State::Ready(Arc::new(loaded)), false)
                }
                Err(LoadError { why, passes }) => {
                    tracing::warn!(model, version, %why, "a version cannot be loaded");
                    (State::Failed(why), passes)
                }
            };
            self.settled(|planned| planned.loaded(&load, state));
            if !passes {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = load.cancel.cancelled() => return,
            }
            pause = (pause * 2).min(RETRY_LAST);
        }
    }

    async fn try_load(
        self: &Arc<Self>,
        load: &Load,
        artifacts: &ServingArtifacts,
    ) -> Result<Version, LoadError> {
        // Few at once: loading takes memory twice, and cores from those who answer.
        let turn = self.loading.acquire().await;
        let _turn = turn.map_err(|_| LoadError {
            why: "this server is stopping".to_owned(),
            passes: false,
        })?;
        let fetched = artifacts.fetch(&load.served.artifact).await;
        let fetched = fetched.map_err(|e| LoadError {
            // A store that is not mounted looks as if nothing were in it.
            passes: !matches!(
                e,
                ArtifactError::Corrupted { .. }
                    | ArtifactError::TooLarge { .. }
                    | ArtifactError::Mismatch { .. }
                    | ArtifactError::Manifest { .. }
            ),
            why: e.to_string(),
        })?;
        let server = Arc::clone(self);
        let (model, served, limits) = (load.key.0.clone(), load.served.clone(), load.limits);
        let loading = tokio::task::spawn_blocking(move || {
            let read = |name: &str| {
                let path = fetched.file(name).ok_or_else(|| LoadError {
                    why: format!("the artifact is no model: it has no file `{name}`"),
                    passes: false,
                })?;
                std::fs::read(path).map_err(|e| LoadError {
                    why: format!("cannot read `{name}` from this worker's cache: {e}"),
                    passes: true,
                })
            };
            let (document, weights) = (read(MODEL_FILE)?, read(WEIGHTS_FILE)?);
            let files = (document.as_slice(), weights);
            let loaded = Version::load(
                &model,
                &served,
                files,
                &limits,
                &server.pool,
                &server.instruments,
            );
            loaded.map_err(|why| LoadError { why, passes: false })
        });
        loading.await.unwrap_or_else(|_| {
            Err(LoadError {
                why: "the model panics when it is loaded".to_owned(),
                passes: false,
            })
        })
    }
}
