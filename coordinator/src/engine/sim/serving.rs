//! Workers that serve: they take over plans, load what they are told to, count requests, and say so.
//! Some artifacts cannot be loaded, and some answer nothing but errors; which ones is in their digests.

use emberline_common::{
    ids::{Digest, ModelName},
    serving::{
        ServingOffer, ServingPlan, ServingStatus, Traffic, VersionState, VersionStats,
        VersionStatus,
    },
};

use super::world::{Event, World};
use crate::engine::api::{Command, SessionId};

/// Whether a version's every request fails.
pub(super) fn is_bad(artifact: &Digest) -> bool {
    first_byte(artifact).is_multiple_of(4)
}

/// Whether no worker can load it.
fn is_broken(artifact: &Digest) -> bool {
    first_byte(artifact) % 16 == 1
}

fn first_byte(artifact: &Digest) -> u8 {
    let text = artifact.to_string();
    u8::from_str_radix(text.get(..2).unwrap_or("0"), 16).unwrap_or(0)
}

/// What one process serves.
#[derive(Debug, Default)]
pub(super) struct Served {
    plan: Option<ServingPlan>,
    versions: Vec<VersionStatus>,
    /// Whether an [`Event::Serves`] is on its way.
    ticking: bool,
}

impl Served {
    fn status(&self) -> ServingStatus {
        ServingStatus {
            plan: self.plan.as_ref().map_or(0, |plan| plan.revision),
            ready: true,
            versions: self.versions.clone(),
        }
    }

    fn find(&mut self, model: &ModelName, version: u32) -> Option<&mut VersionStatus> {
        let mut versions = self.versions.iter_mut();
        versions.find(|v| v.model == *model && v.version == version)
    }

    /// Loads what is new in the plan, forgets what is not in it, and answers some requests.
    fn work(&mut self) {
        let Some(plan) = self.plan.clone() else {
            return;
        };
        let planned = |v: &VersionStatus| {
            let mut models = plan.models.iter().filter(|m| m.model == v.model);
            models.any(|m| m.versions.iter().any(|p| p.version == v.version))
        };
        self.versions.retain(planned);
        for model in &plan.models {
            for version in &model.versions {
                let broken = is_broken(&version.artifact);
                let bad = is_bad(&version.artifact);
                let Some(found) = self.find(&model.model, version.version) else {
                    self.versions.push(VersionStatus {
                        model: model.model.clone(),
                        version: version.version,
                        deployment: version.deployment,
                        state: VersionState::Loading,
                        traffic: version.traffic,
                        stats: VersionStats::default(),
                    });
                    continue;
                };
                found.traffic = version.traffic;
                if broken {
                    found.state = VersionState::Failed("it is broken".to_owned());
                    continue;
                }
                found.state = VersionState::Ready;
                let requests = u64::from(version.traffic != Traffic::Standby);
                found.stats.requests += requests;
                found.stats.errors += if bad { requests } else { 0 };
            }
        }
    }
}

impl World {
    /// What a worker says of what it serves when it connects. One of two serves.
    pub(super) fn offer(&self, number: usize) -> Option<(ServingOffer, ServingStatus)> {
        let process = &self.processes[number];
        if !process.worker.is_multiple_of(2) {
            return None;
        }
        let offer = ServingOffer {
            address: format!("{}:1", process.name),
            environment: "production".parse().ok()?,
        };
        Some((offer, process.served.status()))
    }

    pub(super) fn plan_arrives(&mut self, number: usize, plan: ServingPlan) {
        let served = &mut self.processes[number].served;
        served.plan = Some(plan);
        if !std::mem::replace(&mut served.ticking, true) {
            self.within_ms(10, Event::Serves(number));
        }
    }

    /// A worker goes on serving, and says how far it is.
    pub(super) fn serves(&mut self, number: usize) {
        let process = &mut self.processes[number];
        if !process.alive {
            return;
        }
        if process.paused_until > self.now {
            let until = process.paused_until;
            return self.at(until, Event::Serves(number));
        }
        process.served.work();
        let status = Box::new(process.served.status());
        if let Some(link) = process.link {
            let session = SessionId(link as u64);
            self.send_up(link, Command::Serving { session, status });
        }
        self.within_ms(60, Event::Serves(number));
    }
}
