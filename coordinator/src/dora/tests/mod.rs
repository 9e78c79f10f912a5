#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::float_cmp
)]

mod explained;
mod measured;
mod quick_check;

use std::sync::Arc;

use emberline_common::{
    delivery::{
        Change, ChangeKind, Commit, DataChange, Deployment, DeploymentFailure, DeploymentKind,
        DeploymentOutcome, FailureCause,
    },
    dora::{DoraQuery, DoraReport, PlaceMetrics},
    ids::{DeploymentId, Digest},
    time::Timestamp,
};

use super::measure;

const HOUR: u64 = 3_600_000_000;
const DAY: u64 = 24 * HOUR;

/// `2026-03-01T00:00` in UTC.
pub(crate) fn at(text: &str) -> Timestamp {
    let text = match text.len() {
        10 => format!("{text}T00:00:00Z"),
        16 => format!("{text}:00Z"),
        _ => text.to_owned(),
    };
    Timestamp::parse(&text).expect("a time")
}

fn later(from: Timestamp, micros: u64) -> Timestamp {
    Timestamp(from.0 + micros)
}

/// A deployment of a run that was accepted ten minutes before, without a change.
pub(crate) fn release(id: u64, live: &str) -> Deployment {
    let live = at(live);
    Deployment {
        id: DeploymentId(id),
        kind: DeploymentKind::Release,
        environment: "production".parse().unwrap(),
        pipeline: "churn".parse().unwrap(),
        model: "churn".parse().unwrap(),
        version: u32::try_from(id).unwrap(),
        run: format!("run-{id}").parse().unwrap(),
        task: "deploy".parse().unwrap(),
        repairs: None,
        previous: None,
        outcome: DeploymentOutcome::Live,
        accepted_at: Timestamp(live.0 - 10 * 60_000_000),
        started_at: Timestamp(live.0 - 60_000_000),
        finished_at: Some(live),
        failure: None,
        change: None,
        data: Vec::new(),
        rollout: None,
        trace: "0af7651916cd43dd8448eb211c80319c".parse().unwrap(),
    }
}

/// The same with a change; its commits, the newest first.
fn carrying(id: u64, live: &str, commits: &[(&str, &str)]) -> Deployment {
    let commits: Vec<Commit> = commits
        .iter()
        .map(|(revision, committed_at)| Commit {
            revision: (*revision).to_owned(),
            committed_at: at(committed_at),
            pushed_at: None,
        })
        .collect();
    let change = Change {
        kind: ChangeKind::Code,
        repository: "https://example.org/churn.git".to_owned(),
        branch: "main".to_owned(),
        revision: commits[0].revision.clone(),
        id: String::new(),
        committed_at: commits[0].committed_at,
        authored_at: None,
        pushed_at: None,
        dirty: false,
        commits,
        left_out: 0,
    };
    Deployment {
        change: Some(change),
        ..release(id, live)
    }
}

/// With data that arrived then.
fn reading(mut deployment: Deployment, data: &str, arrived_at: &str) -> Deployment {
    deployment.data.push(DataChange {
        task: "raw".parse().unwrap(),
        revision: Digest::of(data.as_bytes()),
        arrived_at: at(arrived_at),
    });
    deployment
}

fn failing(deployment: Deployment, cause: FailureCause, began: &str, noted: &str) -> Deployment {
    let failure = DeploymentFailure {
        cause,
        began_at: at(began),
        noted_at: at(noted),
        why: String::new(),
        incident: String::new(),
        resolved_at: None,
    };
    Deployment {
        failure: Some(failure),
        ..deployment
    }
}

pub(crate) fn rollback(id: u64, of: u64, live: &str) -> Deployment {
    let live = at(live);
    Deployment {
        kind: DeploymentKind::Rollback,
        repairs: Some(DeploymentId(of)),
        accepted_at: live,
        started_at: live,
        finished_at: Some(live),
        ..release(id, "2026-01-01")
    }
}

pub(crate) fn outcome(deployment: Deployment, outcome: DeploymentOutcome) -> Deployment {
    Deployment {
        outcome,
        ..deployment
    }
}

fn into_environment(deployment: Deployment, environment: &str) -> Deployment {
    Deployment {
        environment: environment.parse().unwrap(),
        ..deployment
    }
}

pub(crate) fn shared(deployments: Vec<Deployment>) -> Vec<Arc<Deployment>> {
    deployments.into_iter().map(Arc::new).collect()
}

/// March 2026, seen from long after.
fn march() -> DoraQuery {
    DoraQuery::within(at("2026-03-01"), at("2026-04-01"))
}

fn report(deployments: &[Deployment], query: &DoraQuery) -> DoraReport {
    measure(&shared(deployments.to_vec()), query, at("2027-01-01"))
}

/// The metrics of the only pipeline and environment that there is.
fn measured(deployments: &[Deployment], query: &DoraQuery) -> PlaceMetrics {
    let mut report = report(deployments, query);
    assert_eq!(report.places.len(), 1);
    report.places.remove(0)
}
