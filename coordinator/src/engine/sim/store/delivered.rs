//! What must hold of deployments, of what is live, and of what workers are told to serve.
//!
//! - S1: what is live in an environment was made so by a deployment that is live, of that version.
//! - S2: at most one deployment of a model is under way in an environment.
//! - S3: how a deployment came out never changes, nor when, nor of what it is.
//! - S4: a version that fails every request of its trial never becomes live.
//! - S5: a worker is told to serve only what was committed as live or as coming.

use std::collections::{BTreeMap, BTreeSet};

use emberline_common::{
    delivery::{Deployment, DeploymentKind, DeploymentOutcome, RolloutPhase},
    ids::DeploymentId,
    run_view::ModelVersion,
    serving::{ServingPlan, Traffic},
    spec::kinds::deploy::Strategy,
};

use super::{Store, parse};
use crate::engine::{
    records::{EnvironmentRecord, keys},
    sim::serving::is_bad,
};

/// What the checks remember of deployments.
#[derive(Debug, Default)]
pub(in crate::engine::sim) struct Delivered {
    all: BTreeMap<DeploymentId, Deployment>,
    /// Deployments that were ever what is live.
    lived: BTreeSet<DeploymentId>,
}

impl Store {
    pub(super) fn put_deployment(&mut self, key: &str, new: Deployment) -> Result<(), String> {
        if let Some(old) = self.delivered.all.get(&new.id) {
            let what = |d: &Deployment| {
                (
                    d.environment.clone(),
                    d.model.clone(),
                    d.version,
                    d.run.clone(),
                    d.kind,
                )
            };
            let settled = old.outcome != DeploymentOutcome::InProgress;
            let kept = (old.outcome, old.finished_at) == (new.outcome, new.finished_at);
            let cause = |d: &Deployment| d.failure.as_ref().map(|f| (f.cause, f.began_at));
            if what(old) != what(&new)
                || (settled && !kept)
                || (old.failure.is_some() && cause(old) != cause(&new))
            {
                return Err(format!("S3: {key} has changed what was settled"));
            }
        }
        let over = new.outcome != DeploymentOutcome::InProgress;
        if over != new.finished_at.is_some() {
            return Err(format!(
                "S3: {key} is {}, and {:?}",
                new.outcome, new.finished_at
            ));
        }
        let was_live = self.delivered.all.get(&new.id);
        let was_live = was_live.is_some_and(|old| old.outcome == DeploymentOutcome::Live);
        if new.outcome == DeploymentOutcome::Live && !was_live {
            self.check_tried(&new)?;
        }
        self.delivered.all.insert(new.id, new);
        Ok(())
    }

    fn check_tried(&self, new: &Deployment) -> Result<(), String> {
        let tried = new
            .rollout
            .as_ref()
            .is_some_and(|rollout| !matches!(rollout.strategy, Strategy::AllAtOnce { .. }));
        let is_first = new.previous.is_none();
        if !tried || is_first || new.kind == DeploymentKind::Rollback {
            return Ok(());
        }
        let key = keys::version(&new.model, new.version);
        let version = self.records.get(&key);
        let version: ModelVersion = parse(&key, version.map_or(b"", Vec::as_slice))?;
        if is_bad(&version.registration.artifact.manifest) {
            return Err(format!("S4: {} is live, and fails every request", new.id));
        }
        Ok(())
    }

    /// All that a transaction has left of deployments and environments.
    pub(super) fn check_delivered(&mut self) -> Result<(), String> {
        let mut coming = BTreeSet::new();
        for deployment in self.delivered.all.values() {
            let place = (&deployment.environment, &deployment.model);
            if deployment.outcome == DeploymentOutcome::InProgress && !coming.insert(place) {
                return Err(format!("S2: {place:?} has two deployments under way"));
            }
        }
        let environments = self.records.range("environments/".to_owned()..);
        let environments = environments.take_while(|(key, _)| key.starts_with("environments/"));
        for (key, value) in environments {
            let live: EnvironmentRecord = parse(key, value)?;
            let made = self.delivered.all.get(&live.deployment);
            let fits = made.is_some_and(|made| {
                made.outcome == DeploymentOutcome::Live && made.version == live.version
            });
            if !fits {
                return Err(format!("S1: {key} is {live:?}, by {made:?}"));
            }
            self.delivered.lived.insert(live.deployment);
        }
        Ok(())
    }

    /// A plan is let out: what is in it is committed.
    pub(in crate::engine::sim) fn check_plan(&self, plan: &ServingPlan) -> Result<(), String> {
        for model in &plan.models {
            let count = |kind: fn(&Traffic) -> bool| {
                let mut traffic = model.versions.iter().map(|v| &v.traffic);
                traffic.by_ref().filter(|t| kind(t)).count()
            };
            let live = count(|t| *t == Traffic::Live);
            let tried = count(|t| !matches!(t, Traffic::Live | Traffic::Standby));
            let numbers: BTreeSet<u32> = model.versions.iter().map(|v| v.version).collect();
            if live > 1 || tried > 1 || numbers.len() != model.versions.len() {
                return Err(format!(
                    "S5: {model:?} has a version twice, or two live ones"
                ));
            }
            for version in &model.versions {
                let known = self.delivered.all.get(&version.deployment);
                let fits = known.is_some_and(|d| d.version == version.version);
                let lived = self.delivered.lived.contains(&version.deployment);
                if !fits || (version.traffic == Traffic::Live && !lived) {
                    return Err(format!(
                        "S5: {version:?} of {} is not committed",
                        model.model
                    ));
                }
            }
        }
        Ok(())
    }

    /// Deployments of which something is still to happen.
    pub fn rolling(&self) -> Vec<DeploymentId> {
        let all = self.delivered.all.values().filter(|d| {
            let phase = d.rollout.as_ref().map(|r| r.phase);
            d.outcome == DeploymentOutcome::InProgress
                || phase.is_some_and(|phase| phase != RolloutPhase::Settled)
        });
        all.map(|d| d.id).collect()
    }

    /// How many deployments came out so.
    pub fn came_out(&self, outcome: DeploymentOutcome) -> u64 {
        let all = self.delivered.all.values();
        all.filter(|d| d.outcome == outcome).count() as u64
    }
}
