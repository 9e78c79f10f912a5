//! How a version comes into service: loaded, tried by a growing share of the requests, and live; or given
//! up as soon as a condition is broken.
//!
//! A rollout's phase stands in its deployment's record, so that the next leader goes on where this one was.
//! What is counted in a phase is the workers' and is not written: after a change of the leader a phase
//! is judged by what comes from then on, and by all that the new version has counted.

use std::time::Duration;

use emberline_common::{
    delivery::{
        Deployment, DeploymentFailure, DeploymentOutcome, FailureCause, Rollout, RolloutPhase,
    },
    ids::{Alias, DeploymentId, ModelName},
    spec::kinds::deploy::{Conditions, DeploySpec, Strategy},
    time::Timestamp,
};

use super::{
    Engine,
    api::{Outcome, Refusal},
    deadlines::Due,
    deployments::MAX_WHY_BYTES,
    judge::{Verdict, judge},
    serving::{Loaded, Place},
};

/// What becomes of a rollout next.
enum Next {
    /// It waits.
    Stays,
    /// The next phase begins.
    Phase(RolloutPhase),
    /// The version is live.
    Live,
    /// It is given up, or taken back.
    GivenUp(String),
}

fn holds_for(rollout: &Rollout) -> Duration {
    match (rollout.phase, &rollout.strategy) {
        (RolloutPhase::Step { step }, Strategy::Canary { steps, .. }) => steps
            .get(step as usize)
            .map_or(Duration::ZERO, |s| s.hold.0),
        (RolloutPhase::Shadowing, Strategy::Shadow { hold, .. }) => hold.0,
        (RolloutPhase::Watching, strategy) => strategy.watch_for(),
        _ => Duration::ZERO,
    }
}

/// When the phase's own time is over, and when it has taken too long.
fn times(rollout: &Rollout) -> (Timestamp, Timestamp) {
    let over = rollout.since.after(holds_for(rollout));
    (over, over.after(rollout.progress_deadline.0))
}

/// The phase that follows the one in which the version is tried.
fn after_trial(rollout: &Rollout, step: u32) -> Next {
    let more = match &rollout.strategy {
        Strategy::Canary { steps, .. } => (step as usize) + 1 < steps.len(),
        _ => false,
    };
    if more {
        Next::Phase(RolloutPhase::Step { step: step + 1 })
    } else if rollout.strategy.approval() && !rollout.approved {
        Next::Phase(RolloutPhase::AwaitingApproval)
    } else {
        Next::Live
    }
}

/// The phase that follows loading.
fn after_loading(rollout: &Rollout) -> Next {
    match &rollout.strategy {
        Strategy::AllAtOnce { .. } => Next::Live,
        Strategy::Canary { .. } => Next::Phase(RolloutPhase::Step { step: 0 }),
        Strategy::Shadow { .. } => Next::Phase(RolloutPhase::Shadowing),
    }
}

/// How a `deploy` stage's version is to come into service.
pub(super) fn rollout(spec: &DeploySpec, now: Timestamp) -> Rollout {
    Rollout {
        replicas: spec.replicas,
        strategy: spec.strategy.clone(),
        limits: spec.serving.limits(),
        progress_deadline: spec.progress_deadline,
        alias: spec.alias.clone(),
        phase: RolloutPhase::Preparing,
        since: now,
        past: Vec::new(),
        exposed_at: None,
        approved: false,
        note: String::new(),
    }
}

impl Engine {
    /// Begins a deployment: whatever is coming there already is given up for it.
    pub(super) fn begin_rollout(&mut self, deployment: Deployment) {
        let place = (deployment.environment.clone(), deployment.model.clone());
        let id = deployment.id;
        self.make_way(&place, id);
        self.keep_deployment(deployment);
        self.serving.rolling.insert(place, id);
        self.begin_phase(id);
    }

    /// What was under way in a place is so no more.
    fn make_way(&mut self, place: &Place, newer: DeploymentId) {
        let Some(older) = self.serving.rolling.remove(place) else {
            return;
        };
        self.serving.windows.remove(place);
        let now = self.now;
        self.change_deployment(older, |deployment| {
            if deployment.outcome == DeploymentOutcome::InProgress {
                deployment.outcome = DeploymentOutcome::Superseded;
                deployment.finished_at = Some(now);
            }
            settle(deployment, now, &format!("`{newer}` came after it"));
        });
    }

    /// The times of a phase, from the record.
    pub(super) fn begin_phase(&mut self, id: DeploymentId) {
        self.serving.dirty = true;
        let rollout = self.deployments.get(&id).and_then(|d| d.rollout.as_ref());
        let Some((over, late)) = rollout.map(times) else {
            return;
        };
        for at in [over, late, self.serving.complete_at] {
            if at > self.now {
                self.deadlines.add(at, Due::Rollout { deployment: id });
            }
        }
    }

    /// Goes on with what is coming in a place, as far as it can now.
    pub(super) fn advance(&mut self, place: &Place) {
        // Each turn is another phase; there are not many.
        for _ in 0..64 {
            let Some(id) = self.serving.rolling.get(place).copied() else {
                return;
            };
            let Some(deployment) = self.deployments.get(&id).cloned() else {
                self.serving.rolling.remove(place);
                return;
            };
            let Some(rollout) = &deployment.rollout else {
                self.serving.rolling.remove(place);
                return;
            };
            match self.next(place, &deployment, rollout) {
                Next::Stays => return,
                Next::Phase(phase) => self.enter_phase(place, id, phase),
                Next::Live => self.go_live(place, id),
                Next::GivenUp(why) if deployment.outcome == DeploymentOutcome::InProgress => {
                    self.give_up(id, FailureCause::CanaryAborted, why);
                }
                Next::GivenUp(why) => self.take_back(place, id, why),
            }
        }
    }

    fn next(&self, place: &Place, deployment: &Deployment, rollout: &Rollout) -> Next {
        let (over, late) = times(rollout);
        let first = !self.environments.contains_key(place);
        let is_over = self.now >= over;
        let step = match rollout.phase {
            RolloutPhase::Preparing => {
                return match self.loaded(place, deployment.version) {
                    Loaded::Failed(why) => Next::GivenUp(why),
                    // There is nobody whom the first version could harm.
                    Loaded::Everywhere if first => Next::Live,
                    Loaded::Everywhere => after_loading(rollout),
                    Loaded::NoReplica if self.now < self.serving.complete_at => Next::Stays,
                    Loaded::NoReplica if first => Next::Live,
                    Loaded::NoReplica if matches!(rollout.strategy, Strategy::AllAtOnce { .. }) => {
                        Next::Live
                    }
                    Loaded::NoReplica if self.now >= late => {
                        Next::GivenUp(format!("no worker serves `{}` to try it on", place.0))
                    }
                    Loaded::Partly(..) if self.now >= late => Next::GivenUp(format!(
                        "its replicas have not loaded it within {}",
                        rollout.progress_deadline
                    )),
                    Loaded::NoReplica | Loaded::Partly(..) => Next::Stays,
                };
            }
            RolloutPhase::Settled => return Next::Stays,
            RolloutPhase::AwaitingApproval if rollout.approved => return Next::Live,
            RolloutPhase::Step { step } => step,
            _ => 0,
        };
        match (self.judged(place, rollout), rollout.phase) {
            (Verdict::Broken(why), _) => Next::GivenUp(why),
            (_, RolloutPhase::AwaitingApproval) => Next::Stays,
            (_, RolloutPhase::Watching) if is_over => Next::Phase(RolloutPhase::Settled),
            (Verdict::Holds, _) if is_over => after_trial(rollout, step),
            (Verdict::Waits(why), phase) if self.now >= late && phase != RolloutPhase::Watching => {
                Next::GivenUp(format!("it cannot be judged in time: {why}"))
            }
            _ => Next::Stays,
        }
    }

    /// What the counts of the phase under way say.
    fn judged(&self, place: &Place, rollout: &Rollout) -> Verdict {
        #[cfg(test)]
        if self.sabotage == Some(super::sim::Sabotage::LenientJudge) {
            return Verdict::Holds;
        }
        let window = self.serving.windows.get(place).cloned().unwrap_or_default();
        let conditions = rollout.strategy.conditions();
        let least = rollout.strategy.min_requests();
        if rollout.phase == RolloutPhase::Watching {
            // There is no other version any more to compare with.
            let alone = Conditions {
                max_prediction_drift: None,
                quality: None,
                ..conditions.clone()
            };
            return judge(&alone, least, &window.new, None);
        }
        judge(conditions, least, &window.new, Some(&window.live))
    }

    /// One line about what a deployment that is under way waits for.
    #[must_use]
    pub fn waits_for(&self, deployment: &Deployment) -> Option<String> {
        let rollout = deployment.rollout.as_ref()?;
        let place = (deployment.environment.clone(), deployment.model.clone());
        if self.serving.rolling.get(&place) != Some(&deployment.id) {
            return None;
        }
        match rollout.phase {
            RolloutPhase::Preparing => match self.loaded(&place, deployment.version) {
                Loaded::NoReplica => Some(format!("no worker serves `{}`", place.0)),
                Loaded::Partly(ready, of) => {
                    Some(format!("{ready} of {of} replicas have it loaded"))
                }
                _ => None,
            },
            RolloutPhase::AwaitingApproval => Some(format!(
                "a person: `emberline deployments approve {}`",
                deployment.id
            )),
            _ => match self.judged(&place, rollout) {
                Verdict::Waits(why) => Some(why),
                _ => None,
            },
        }
    }

    fn enter_phase(&mut self, place: &Place, id: DeploymentId, phase: RolloutPhase) {
        let now = self.now;
        self.serving.windows.remove(place);
        self.change_deployment(id, |deployment| {
            if let Some(rollout) = &mut deployment.rollout {
                rollout.enter(phase, now);
            }
        });
        if phase == RolloutPhase::Settled {
            self.serving.rolling.remove(place);
        }
        self.begin_phase(id);
    }

    /// The version takes over.
    fn go_live(&mut self, place: &Place, id: DeploymentId) {
        let Some(deployment) = self.deployments.get(&id).cloned() else {
            return;
        };
        let mut live = deployment.as_ref().clone();
        live.outcome = DeploymentOutcome::Live;
        live.finished_at = Some(self.now);
        let alias = live.rollout.as_ref().and_then(|r| r.alias.clone());
        let watched = live.rollout.as_mut().is_some_and(|rollout| {
            let watched = !rollout.strategy.watch_for().is_zero()
                && !rollout.strategy.conditions().is_empty();
            let phase = if watched {
                RolloutPhase::Watching
            } else {
                RolloutPhase::Settled
            };
            rollout.enter(phase, self.now);
            watched
        });
        let version = live.version;
        self.serving.windows.remove(place);
        if !watched {
            self.serving.rolling.remove(place);
        }
        self.make_live(live);
        if let Some(alias) = alias {
            self.point(&place.1, &alias, version);
        }
        self.begin_phase(id);
    }

    /// Moves an alias to a version.
    pub(super) fn point(&mut self, model: &ModelName, alias: &Alias, version: u32) {
        self.models
            .set_alias(model, alias, Some(version), &mut self.out.writes);
    }

    /// It answered for someone for the first time.
    pub(super) fn note_exposure(&mut self, id: DeploymentId) {
        let now = self.now;
        let exposed = |d: &Deployment| d.rollout.as_ref().is_some_and(|r| r.exposed_at.is_some());
        if self.deployments.get(&id).is_none_or(|d| exposed(d)) {
            return;
        }
        self.change_deployment(id, |deployment| {
            if let Some(rollout) = &mut deployment.rollout {
                rollout.exposed_at = Some(now);
            }
        });
    }

    /// A version that is not live yet never will be by this deployment.
    pub(super) fn give_up(&mut self, id: DeploymentId, cause: FailureCause, mut why: String) {
        why.truncate(why.floor_char_boundary(MAX_WHY_BYTES));
        let now = self.now;
        let Some(deployment) = self.deployments.get(&id) else {
            return;
        };
        let place = (deployment.environment.clone(), deployment.model.clone());
        self.serving.rolling.remove(&place);
        self.serving.windows.remove(&place);
        self.serving.dirty = true;
        self.change_deployment(id, |deployment| {
            let exposed_at = deployment.rollout.as_ref().and_then(|r| r.exposed_at);
            deployment.finished_at = Some(now);
            deployment.outcome = match exposed_at {
                Some(began_at) => {
                    deployment.failure = Some(DeploymentFailure {
                        cause,
                        began_at,
                        noted_at: now,
                        why: why.clone(),
                        incident: String::new(),
                        resolved_at: None,
                    });
                    DeploymentOutcome::Aborted
                }
                None => DeploymentOutcome::CaughtBeforeExposure,
            };
            settle(deployment, now, &why);
        });
    }

    /// A version that is live is bad: what was live before takes over again.
    fn take_back(&mut self, place: &Place, id: DeploymentId, why: String) {
        let (environment, model) = place.clone();
        let cause = FailureCause::GateBreach;
        if let Err(refusal) = self.go_back(&environment, &model, id, cause, why.clone()) {
            let why = format!("{why}; {refusal}");
            self.note_failure(id, cause, None, why.clone(), String::new());
            self.settle_rollout(id, &why);
        }
    }

    /// Nothing more happens to it by itself.
    pub(super) fn settle_rollout(&mut self, id: DeploymentId, note: &str) {
        let Some(deployment) = self.deployments.get(&id) else {
            return;
        };
        let place = (deployment.environment.clone(), deployment.model.clone());
        if self.serving.rolling.get(&place) == Some(&id) {
            self.serving.rolling.remove(&place);
            self.serving.windows.remove(&place);
        }
        self.serving.dirty = true;
        let now = self.now;
        self.change_deployment(id, |deployment| settle(deployment, now, note));
    }

    /// A person says yes.
    pub(super) fn approve(&mut self, id: DeploymentId) -> Result<Outcome, Refusal> {
        let Some(deployment) = self.deployments.get(&id) else {
            return Err(Refusal::NoSuchDeployment(format!("there is no `{id}`")));
        };
        let wrong = |what: &str| Err(Refusal::WrongDeployment(format!("`{id}` {what}")));
        match &deployment.rollout {
            Some(rollout) if rollout.strategy.approval() && rollout.approved => {}
            _ if deployment.outcome != DeploymentOutcome::InProgress => {
                return wrong(&format!(
                    "is over ({}): nobody need approve it",
                    deployment.outcome
                ));
            }
            Some(rollout) if rollout.strategy.approval() => {
                self.change_deployment(id, |deployment| {
                    if let Some(rollout) = &mut deployment.rollout {
                        rollout.approved = true;
                    }
                });
                self.serving.dirty = true;
            }
            _ => return wrong("does not ask for approval: it goes live by itself"),
        }
        self.serve();
        self.deployment_outcome(id, None)
    }
}

fn settle(deployment: &mut Deployment, now: Timestamp, note: &str) {
    if let Some(rollout) = &mut deployment.rollout {
        if rollout.phase != RolloutPhase::Settled {
            rollout.enter(RolloutPhase::Settled, now);
        }
        let mut note = note.to_owned();
        note.truncate(note.floor_char_boundary(MAX_WHY_BYTES));
        rollout.note = note;
    }
}
