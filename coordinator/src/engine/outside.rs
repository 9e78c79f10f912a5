//! What outside systems tell: changes that were merged, incidents that began and ended.
//!
//! The same thing told again changes nothing, in whatever order things are told.

use emberline_common::{
    delivery::{DeploymentOutcome, FailureCause},
    ids::{DeploymentId, EnvironmentName, ModelName},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{
    Engine,
    api::{Outcome, Refusal, Write},
    records::{encode, keys},
};

/// The most merges that are remembered; the oldest are forgotten first.
const MAX_MERGES: usize = 20_000;
/// Deployments that a merge that is told late is still noted at, newest first.
const LATE_MERGES: usize = 200;

/// Something that an outside system tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutsideEvent {
    /// A change came into its branch.
    ChangeMerged(Merge),
    /// Something is wrong with what is live.
    IncidentDetected {
        /// The outside system's id of it.
        incident: String,
        /// Where.
        environment: EnvironmentName,
        /// With which model; if it is not said, the environment's last deployment is meant.
        model: Option<ModelName>,
        /// Since when.
        detected_at: Timestamp,
        /// One line for people.
        why: String,
    },
    /// It is over.
    IncidentResolved {
        /// The outside system's id of it.
        incident: String,
        /// Since when.
        resolved_at: Timestamp,
    },
}

/// A change that came into its branch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merge {
    /// The repository, as changes name it; empty if the event did not say.
    pub repository: String,
    /// The commit's id.
    pub revision: String,
    /// When.
    pub merged_at: Timestamp,
}

impl Engine {
    /// Takes what an outside system tells.
    ///
    /// # Errors
    /// [`Refusal::NoSuchDeployment`] if there is nothing that an incident could be about.
    pub(super) fn outside(&mut self, event: OutsideEvent) -> Result<Outcome, Refusal> {
        let changed = match event {
            OutsideEvent::ChangeMerged(merge) => self.merged(merge),
            OutsideEvent::IncidentDetected {
                incident,
                environment,
                model,
                detected_at,
                why,
            } => {
                let known = self
                    .deployments
                    .values()
                    .rev()
                    .find(|d| d.failure.as_ref().is_some_and(|f| f.incident == incident));
                if known.is_some() {
                    false
                } else {
                    let live_at = self.live_at(&environment, model.as_ref(), detected_at);
                    let Some(id) = live_at else {
                        return Err(Refusal::NoSuchDeployment(format!(
                            "nothing was live in `{environment}` at {detected_at}"
                        )));
                    };
                    self.note_failure(id, FailureCause::Incident, Some(detected_at), why, incident)
                }
            }
            OutsideEvent::IncidentResolved {
                incident,
                resolved_at,
            } => {
                let of = self
                    .deployments
                    .values()
                    .rev()
                    .find(|d| d.failure.as_ref().is_some_and(|f| f.incident == incident));
                let Some(id) = of.map(|d| d.id) else {
                    return Err(Refusal::NoSuchDeployment(format!(
                        "no deployment has the incident `{incident}`"
                    )));
                };
                self.resolve(id, resolved_at)
            }
        };
        Ok(Outcome::Noted { changed })
    }

    fn merged(&mut self, merge: Merge) -> bool {
        let key = merge_key(&merge.revision);
        if self.merges.contains_key(&key) {
            return false;
        }
        self.out.writes.push(Write::Put {
            key: keys::merge(&key),
            value: encode(&merge),
        });
        let late: Vec<DeploymentId> = (self.deployments.values().rev().take(LATE_MERGES))
            .filter(|d| {
                d.change
                    .as_ref()
                    .is_some_and(|c| c.carries(&merge.revision))
            })
            .map(|d| d.id)
            .collect();
        self.remember_merge(merge);
        while self.merges.len() > MAX_MERGES {
            let Some((_, key)) = self.merge_order.pop_first() else {
                break;
            };
            self.merges.remove(&key);
            self.out.writes.push(Write::Delete {
                key: keys::merge(&key),
            });
        }
        for id in late {
            let merges = std::mem::take(&mut self.merges);
            self.change_deployment(id, |deployment| {
                if let Some(change) = &mut deployment.change {
                    change.note_pushes(|revision| pushed(&merges, revision));
                }
            });
            self.merges = merges;
        }
        true
    }

    pub(super) fn remember_merge(&mut self, merge: Merge) {
        let key = merge_key(&merge.revision);
        self.merge_order.insert((merge.merged_at, key.clone()));
        self.merges.insert(key, merge);
    }

    /// The deployment that was live in an environment at that time: of all models the one that went
    /// live last, if none is named.
    fn live_at(
        &self,
        environment: &EnvironmentName,
        model: Option<&ModelName>,
        at: Timestamp,
    ) -> Option<DeploymentId> {
        let there = self.deployments.values().rev().filter(|d| {
            d.environment == *environment
                && model.is_none_or(|model| d.model == *model)
                && d.outcome == DeploymentOutcome::Live
        });
        let there = there.filter(|d| d.finished_at.is_some_and(|live| live <= at));
        there.max_by_key(|d| (d.finished_at, d.id)).map(|d| d.id)
    }
}

/// When a revision was pushed, as far as anybody told.
pub(super) fn pushed(
    merges: &std::collections::BTreeMap<String, Merge>,
    revision: &str,
) -> Option<Timestamp> {
    merges
        .get(&merge_key(revision))
        .map(|merge| merge.merged_at)
}

/// A revision is the same in every repository that has it (it is a hash), so it alone is the key.
/// Made of a digest, since a revision may hold what no key may.
fn merge_key(revision: &str) -> String {
    emberline_common::ids::Digest::of(revision.as_bytes()).to_string()
}
