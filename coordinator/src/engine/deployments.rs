//! Deployments: one model version becoming, or failing to become, live in one environment.
//!
//! A deployment is made in the commit of its `deploy` task, so that it happens once or not at all; how
//! it goes on from there is [`rollouts`](super::rollouts)' part.
//! What the metrics of delivery are computed from is kept here, up to [`MAX_DEPLOYMENTS`].

use std::sync::Arc;

use emberline_common::{
    delivery::{
        DataChange, Deployment, DeploymentFailure, DeploymentKind, DeploymentOutcome, FailureCause,
        Rollout, RolloutPhase,
    },
    ids::{Alias, DeploymentId, EnvironmentName, ModelName},
    run_view::ModelRegistration,
    spec::kinds::{BuiltinKind, DeploySpec, deploy::Strategy},
    time::Timestamp,
    trace::RunTrace,
};

use super::{
    Engine,
    api::{Effect, Outcome, Refusal, Write},
    compatibility,
    outside::pushed,
    records::{EnvironmentRecord, encode, keys},
    rollouts::rollout,
    run::{Run, TaskRef},
};

/// The most deployments that are remembered; the oldest are forgotten first.
pub const MAX_DEPLOYMENTS: usize = 20_000;
/// The longest reason that is kept, in bytes.
pub(super) const MAX_WHY_BYTES: usize = 512;

impl Engine {
    /// All deployments that are remembered, in the order of their ids.
    pub fn deployments(&self) -> impl DoubleEndedIterator<Item = &Arc<Deployment>> {
        self.deployments.values()
    }

    /// One of them.
    #[must_use]
    pub fn deployment(&self, id: DeploymentId) -> Option<&Arc<Deployment>> {
        self.deployments.get(&id)
    }

    /// What is live where.
    pub fn environments(
        &self,
    ) -> impl Iterator<Item = (&EnvironmentName, &ModelName, &EnvironmentRecord)> {
        (self.environments.iter()).map(|((environment, model), live)| (environment, model, live))
    }

    /// A task has registered a version: it comes into service, if that is what its stage is for. The
    /// alias moves when it is live.
    pub(super) fn deploy(
        &mut self,
        at: TaskRef,
        model: &ModelName,
        version: u32,
        alias: Option<&Alias>,
    ) {
        let run = self.runs.get(&at.run);
        let Some(spec) = run.and_then(|run| deploy_spec(run, at)) else {
            if let Some(alias) = alias {
                self.point(model, alias, version);
            }
            return;
        };
        let place = (spec.environment.clone(), model.clone());
        let is_coming = |d: &Deployment| d.version == version;
        if self.coming(&place).is_some_and(is_coming) {
            return;
        }
        if (self.environments.get(&place)).is_some_and(|live| live.version == version) {
            // It is live there already: nothing becomes live, and nothing else is to.
            if let Some(coming) = self.coming(&place).map(|d| d.id) {
                let why = format!("version {version}, which is live, was deployed again");
                self.give_up(coming, FailureCause::CanaryAborted, why);
            }
            if let Some(alias) = alias {
                self.point(model, alias, version);
            }
            return;
        }
        let in_progress = DeploymentOutcome::InProgress;
        if let Some(made) = self.new_deployment(at, place, version, in_progress) {
            let rollout = Rollout {
                alias: alias.cloned(),
                ..rollout(&spec, self.now)
            };
            self.begin_rollout(Deployment {
                finished_at: None,
                rollout: Some(rollout),
                ..made
            });
            // Where nobody serves it is live now: what else is decided together finds it so.
            self.serve();
        }
    }

    /// Why what a task registers must not come into service, if so.
    pub(super) fn refuses_clients(
        &self,
        at: TaskRef,
        registration: &ModelRegistration,
    ) -> Option<String> {
        let spec = deploy_spec(self.runs.get(&at.run)?, at)?;
        if spec.allow_schema_change {
            return None;
        }
        let place = (spec.environment, registration.model.clone());
        let live = self.environments.get(&place)?;
        let version = self.models.version(&place.1, live.version)?;
        let live = compatibility::Live {
            environment: &place.0,
            model: &place.1,
            version: live.version,
            schema: &version.registration.schema,
        };
        compatibility::refused_by(&registration.schema, &live)
    }

    /// A `deploy` task has failed for good, before its version was live.
    pub(super) fn deploy_failed(&mut self, at: TaskRef) {
        let (Some(environment), Some(run)) = (self.target_of(at), self.runs.get(&at.run)) else {
            return;
        };
        let Some(spec) = deploy_spec(run, at) else {
            return;
        };
        let place = (environment, spec.model);
        let caught = DeploymentOutcome::CaughtBeforeExposure;
        if let Some(made) = self.new_deployment(at, place, 0, caught) {
            self.keep_deployment(made);
        }
    }

    /// Where a task deploys to, if it is one that does.
    pub(super) fn target_of(&self, at: TaskRef) -> Option<EnvironmentName> {
        let run = self.runs.get(&at.run)?;
        deploy_spec(run, at).map(|spec| spec.environment)
    }

    fn new_deployment(
        &self,
        at: TaskRef,
        (environment, model): (EnvironmentName, ModelName),
        version: u32,
        outcome: DeploymentOutcome,
    ) -> Option<Deployment> {
        let run = self.runs.get(&at.run)?;
        let record = &run.record;
        let started = (run.tasks[at.task as usize].record.as_ref()).and_then(|r| r.started_at);
        let mut change = record.change.clone();
        if let Some(change) = &mut change {
            change.note_pushes(|revision| pushed(&self.merges, revision));
        }
        let live = self.environments.get(&(environment.clone(), model.clone()));
        Some(Deployment {
            id: self.next_deployment(),
            kind: DeploymentKind::Release,
            previous: live.map(|live| live.deployment),
            environment,
            pipeline: record.pipeline.clone(),
            model,
            version,
            run: record.run.clone(),
            task: run.name_of(at.task),
            repairs: record.repairs,
            outcome,
            accepted_at: record.created_at,
            started_at: started.unwrap_or(self.now),
            finished_at: Some(self.now),
            failure: None,
            change,
            data: data_of(run, run.tasks[at.task as usize].stage as usize),
            trace: RunTrace::of(&record.run, &record.traceparent).trace,
            rollout: None,
        })
    }

    fn next_deployment(&self) -> DeploymentId {
        DeploymentId(
            self.deployments
                .keys()
                .next_back()
                .map_or(1, |last| last.0 + 1),
        )
    }

    /// Keeps a deployment and makes its version what is live.
    pub(super) fn make_live(&mut self, deployment: Deployment) {
        let live = EnvironmentRecord {
            deployment: deployment.id,
            version: deployment.version,
            since: deployment.finished_at.unwrap_or(self.now),
        };
        let place = (deployment.environment.clone(), deployment.model.clone());
        self.out.writes.push(Write::Put {
            key: keys::environment(&place.0, &place.1),
            value: encode(&live),
        });
        self.environments.insert(place, live);
        self.serving.dirty = true;
        self.keep_deployment(deployment);
    }

    pub(super) fn keep_deployment(&mut self, deployment: Deployment) {
        let id = deployment.id;
        self.deployments.insert(id, Arc::new(deployment));
        self.out.deployments.insert(id);
        while self.deployments.len() > MAX_DEPLOYMENTS {
            let Some((oldest, _)) = self.deployments.pop_first() else {
                break;
            };
            self.out.writes.push(Write::Delete {
                key: keys::deployment(oldest),
            });
            self.never_tell(&oldest.to_string());
        }
    }

    /// Writes and tells of the deployments that a decision made or changed, each once.
    pub(super) fn write_deployments(&mut self) {
        for id in std::mem::take(&mut self.out.deployments) {
            let Some(deployment) = self.deployments.get(&id) else {
                continue;
            };
            self.out.writes.push(Write::Put {
                key: keys::deployment(id),
                value: encode(deployment.as_ref()),
            });
            self.out
                .effects
                .push(Effect::Deployed(Arc::clone(deployment)));
            self.untell(id.to_string());
        }
    }

    /// Changes a deployment's record. Whether it is another one then.
    pub(super) fn change_deployment(
        &mut self,
        id: DeploymentId,
        change: impl FnOnce(&mut Deployment),
    ) -> bool {
        let Some(before) = self.deployments.get(&id).cloned() else {
            return false;
        };
        let mut after = before.as_ref().clone();
        change(&mut after);
        if after == *before {
            return false;
        }
        self.deployments.insert(id, Arc::new(after));
        self.out.deployments.insert(id);
        true
    }

    /// A person says that a deployment has failed.
    pub(super) fn mark_failed(
        &mut self,
        id: DeploymentId,
        began_at: Option<Timestamp>,
        why: String,
    ) -> Result<Outcome, Refusal> {
        let Some(deployment) = self.deployments.get(&id) else {
            return Err(Refusal::NoSuchDeployment(format!("there is no `{id}`")));
        };
        if deployment.outcome == DeploymentOutcome::InProgress {
            self.give_up(id, FailureCause::Marked, why);
            return self.deployment_outcome(id, None);
        }
        let exposed = [DeploymentOutcome::Live, DeploymentOutcome::Aborted];
        if !exposed.contains(&deployment.outcome) {
            return Err(Refusal::WrongDeployment(format!(
                "`{id}` has never answered for anyone ({}): it cannot have failed",
                deployment.outcome
            )));
        }
        self.note_failure(id, FailureCause::Marked, began_at, why, String::new());
        self.deployment_outcome(id, None)
    }

    /// Notes that a deployment has failed. What was noted first stays; an incident's name is added.
    /// Whether anything has changed.
    pub(super) fn note_failure(
        &mut self,
        id: DeploymentId,
        cause: FailureCause,
        began_at: Option<Timestamp>,
        mut why: String,
        incident: String,
    ) -> bool {
        why.truncate(why.floor_char_boundary(MAX_WHY_BYTES));
        let now = self.now;
        self.change_deployment(id, |deployment| match &mut deployment.failure {
            Some(failure) if failure.incident.is_empty() => failure.incident = incident,
            Some(_) => {}
            None => {
                // It cannot have done harm before it was there, nor after it was noted.
                let live = deployment.finished_at.unwrap_or(deployment.started_at);
                let began_at = began_at.unwrap_or(live).max(live).min(now.max(live));
                deployment.failure = Some(DeploymentFailure {
                    cause,
                    began_at,
                    noted_at: now,
                    why,
                    incident,
                    resolved_at: None,
                });
            }
        })
    }

    /// An outside system says that a deployment's incident is over. Whether that is new.
    pub(super) fn resolve(&mut self, id: DeploymentId, resolved_at: Timestamp) -> bool {
        self.change_deployment(id, |deployment| {
            if let Some(failure) = &mut deployment.failure
                && failure.resolved_at.is_none()
            {
                failure.resolved_at = Some(resolved_at.max(failure.began_at));
            }
        })
    }

    /// Makes live again what was live before, and notes that what is live now has failed.
    pub(super) fn roll_back(
        &mut self,
        environment: EnvironmentName,
        model: Option<ModelName>,
        expected: Option<DeploymentId>,
        why: String,
    ) -> Result<Outcome, Refusal> {
        let there = self.environments.iter().filter(|((e, m), _)| {
            *e == environment && model.as_ref().is_none_or(|model| m == model)
        });
        let there: Vec<_> = there
            .map(|((_, m), live)| (m.clone(), live.clone()))
            .collect();
        let (model, live) = match there.as_slice() {
            [one] => one.clone(),
            [] => {
                return Err(Refusal::NoSuchDeployment(match model {
                    Some(model) => format!("no `{model}` is live in `{environment}`"),
                    None => format!("nothing is live in `{environment}`"),
                }));
            }
            many => {
                let names: Vec<&str> = many.iter().map(|(m, _)| m.as_str()).collect();
                return Err(Refusal::WrongDeployment(format!(
                    "{} models are live in `{environment}`: say which of {}",
                    many.len(),
                    names.join(", ")
                )));
            }
        };
        let place = (environment.clone(), model.clone());
        // What is coming is what goes first: what is live is not what is wrong then.
        let coming = self.coming(&place).map(|d| d.id);
        let undone = coming.unwrap_or(live.deployment);
        if let Some(expected) = expected.filter(|expected| *expected != undone) {
            let state = if coming.is_some() {
                "coming to"
            } else {
                "live in"
            };
            return Err(Refusal::WrongDeployment(format!(
                "`{undone}` is {state} `{environment}`, not `{expected}`"
            )));
        }
        if let Some(coming) = coming {
            self.give_up(coming, FailureCause::Rollback, why);
            return self.deployment_outcome(live.deployment, Some(coming));
        }
        self.go_back(
            &environment,
            &model,
            live.deployment,
            FailureCause::Rollback,
            why,
        )
    }

    /// Makes live what was live before this deployment, and notes why.
    pub(super) fn go_back(
        &mut self,
        environment: &EnvironmentName,
        model: &ModelName,
        from: DeploymentId,
        cause: FailureCause,
        why: String,
    ) -> Result<Outcome, Refusal> {
        let nowhere = || {
            Refusal::WrongDeployment(format!(
                "there is no good version of `{model}` to go back to in `{environment}`"
            ))
        };
        let bad = self.deployments.get(&from).cloned().ok_or_else(nowhere)?;
        let here: Vec<_> = (self.deployments.values())
            .filter(|d| (&d.environment, &d.model) == (environment, model))
            .collect();
        // A version is as bad as its worst time here. What was gone back from once is no way out;
        // what only was said to be bad is one if there is nothing better: who asks knows why.
        let harm = |version: u32| {
            let failures = here.iter().filter(|d| d.version == version);
            let harm = failures.map(|d| match d.failure.as_ref().map(|f| f.cause) {
                None => 0,
                Some(FailureCause::Marked | FailureCause::Incident) => 1,
                Some(_) => 2,
            });
            harm.max().unwrap_or(0)
        };
        let before = here.iter().rev().filter(|d| {
            d.id < from
                && d.outcome == DeploymentOutcome::Live
                && d.version != bad.version
                && self.models.version(model, d.version).is_some()
        });
        let ways: Vec<_> = before.map(|d| (harm(d.version), Arc::clone(d))).collect();
        let way = |worst| ways.iter().find(|(harm, _)| *harm <= worst);
        let good = way(0).or_else(|| way(1)).map(|(_, d)| Arc::clone(d));
        let good = good.ok_or_else(nowhere)?;
        self.note_failure(from, cause, None, why.clone(), String::new());
        self.settle_rollout(from, &why);
        self.models
            .move_back(model, bad.version, good.version, &mut self.out.writes);
        let now = self.now;
        self.make_live(Deployment {
            id: self.next_deployment(),
            kind: DeploymentKind::Rollback,
            repairs: Some(from),
            previous: Some(from),
            outcome: DeploymentOutcome::Live,
            accepted_at: now,
            started_at: now,
            finished_at: Some(now),
            failure: None,
            change: None,
            data: Vec::new(),
            trace: bad.trace,
            rollout: good.rollout.clone().map(|rollout| Rollout {
                strategy: Strategy::default(),
                phase: RolloutPhase::Settled,
                since: now,
                past: Vec::new(),
                exposed_at: None,
                approved: false,
                note: String::new(),
                ..rollout
            }),
            ..good.as_ref().clone()
        });
        let rollback = DeploymentId(self.next_deployment().0 - 1);
        self.deployment_outcome(rollback, Some(from))
    }

    pub(super) fn deployment_outcome(
        &self,
        id: DeploymentId,
        failed: Option<DeploymentId>,
    ) -> Result<Outcome, Refusal> {
        let find = |id: DeploymentId| {
            let found = self.deployments.get(&id).cloned();
            found.ok_or_else(|| Refusal::NoSuchDeployment(format!("there is no `{id}`")))
        };
        Ok(Outcome::Deployment {
            deployment: find(id)?,
            failed: failed.map(find).transpose()?,
        })
    }
}

/// What a `deploy` task is to do. A pipeline's own kinds deploy nothing.
fn deploy_spec(run: &Run, at: TaskRef) -> Option<DeploySpec> {
    let task = &run.tasks[at.task as usize];
    let stage = run.stage_spec(task.stage as usize);
    if stage.kind.as_str() != BuiltinKind::Deploy.as_str() {
        return None;
    }
    let values = super::run::matrix_at(stage, task.index);
    let with = emberline_common::spec::expand::fill(&stage.with, &values).ok()?;
    serde_json::from_value(with).ok()
}

/// The data that a stage's outputs descend from.
fn data_of(run: &Run, stage: usize) -> Vec<DataChange> {
    let collected = run.ancestors(stage).into_iter();
    let collected =
        collected.filter(|up| run.stage_spec(*up).kind.as_str() == BuiltinKind::Collect.as_str());
    let mut data = Vec::new();
    for up in collected.map(|up| &run.stages[up]) {
        for number in up.first..up.first + up.count {
            let Some(record) = &run.tasks[number].record else {
                continue;
            };
            let modified = record.results.get("modified_at").and_then(|v| v.as_str());
            let arrived_at = modified.and_then(Timestamp::parse);
            for output in &record.outputs {
                data.push(DataChange {
                    task: run.name_of(u32::try_from(number).unwrap_or(u32::MAX)),
                    revision: output.manifest,
                    arrived_at: arrived_at.or(record.finished_at).unwrap_or_default(),
                });
            }
        }
    }
    data.truncate(64);
    data
}
