//! What the metrics of delivery cost with 100,000 deployments.
//!
//! `cargo bench -p emberline-coordinator --bench delivery -- [NUMBER]`
//!
//! Ten pipelines deploy to two environments each, with three commits and one version of the data a
//! time; one deployment in ten fails and is rolled back. The clock is that of the process, the
//! figures are medians of eleven rounds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a bench stops at what it did not expect"
)]

use std::{hint::black_box, sync::Arc, time::Instant};

use emberline_common::{
    delivery::{
        Change, ChangeKind, Commit, DataChange, Deployment, DeploymentFailure, DeploymentKind,
        DeploymentOutcome, FailureCause,
    },
    dora::DoraQuery,
    ids::{DeploymentId, Digest},
    time::Timestamp,
};
use emberline_coordinator::dora::{first_carried, measure};

const ROUNDS: usize = 11;
const PIPELINES: u64 = 10;
const ENVIRONMENTS: [&str; 2] = ["staging", "production"];
const MINUTE: u64 = 60_000_000;
/// 2023-11-14T22:13:20Z.
const BEGIN: u64 = 1_700_000_000_000_000;

fn deployment(id: u64) -> Deployment {
    let live = Timestamp(BEGIN + id * 5 * MINUTE);
    let before = |minutes: u64| Timestamp(live.0 - minutes * MINUTE);
    let is_rollback = id % 10 == 9;
    let commit = |number: u64| Commit {
        revision: format!("{:040x}", id * 3 + number),
        committed_at: before(30 + number * 60),
        pushed_at: None,
    };
    let change = Change {
        kind: ChangeKind::Code,
        repository: "https://example.org/models.git".to_owned(),
        branch: "main".to_owned(),
        revision: commit(0).revision,
        id: String::new(),
        committed_at: before(30),
        authored_at: None,
        pushed_at: None,
        dirty: false,
        commits: (0..3).map(commit).collect(),
        left_out: 0,
    };
    let place = id / 10;
    let name = format!("pipeline-{}", place % PIPELINES);
    let data = DataChange {
        task: "raw".parse().unwrap(),
        revision: Digest::of(&id.to_le_bytes()),
        arrived_at: before(600),
    };
    let failure = (id % 10 == 8).then(|| DeploymentFailure {
        cause: FailureCause::Rollback,
        began_at: live,
        noted_at: Timestamp(live.0 + MINUTE),
        why: String::new(),
        incident: String::new(),
        resolved_at: None,
    });
    Deployment {
        id: DeploymentId(id + 1),
        kind: match is_rollback {
            true => DeploymentKind::Rollback,
            false => DeploymentKind::Release,
        },
        environment: ENVIRONMENTS[usize::from(place / PIPELINES % 2 == 1)]
            .parse()
            .unwrap(),
        pipeline: name.parse().unwrap(),
        model: name.parse().unwrap(),
        version: 1,
        run: format!("r-{id}").parse().unwrap(),
        task: "deploy".parse().unwrap(),
        repairs: is_rollback.then_some(DeploymentId(id)),
        previous: None,
        outcome: DeploymentOutcome::Live,
        accepted_at: before(10),
        started_at: before(1),
        finished_at: Some(live),
        failure,
        change: (!is_rollback).then_some(change),
        rollout: None,
        data: if is_rollback { Vec::new() } else { vec![data] },
        trace: "0af7651916cd43dd8448eb211c80319c".parse().unwrap(),
    }
}

/// Milliseconds, the median of all rounds.
fn median(mut work: impl FnMut()) -> f64 {
    let mut took: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    took.sort_by(f64::total_cmp);
    took[ROUNDS / 2]
}

fn main() {
    // `cargo bench` hands on a flag of its own.
    let number = std::env::args().skip(1).find_map(|a| a.parse().ok());
    let number: u64 = number.unwrap_or(100_000);
    let deployments: Vec<_> = (0..number).map(|id| Arc::new(deployment(id))).collect();
    let end = Timestamp(BEGIN + (number + 1) * 5 * MINUTE);
    let all = DoraQuery::within(Timestamp(BEGIN), end);
    let month = DoraQuery::within(Timestamp(end.0.saturating_sub(30 * 24 * 60 * MINUTE)), end);
    let report = measure(&deployments, &all, end);
    let counted: u64 = report.places.iter().map(|p| p.counts.deployments).sum();
    assert_eq!(counted, number - number / 10, "each release counts once");
    println!("{number} deployments in {} places", report.places.len());
    let last = deployments.last().unwrap();
    for (name, took) in [
        (
            "measure, all of them",
            median(|| drop(black_box(measure(&deployments, &all, end)))),
        ),
        (
            "measure, the last 30 days",
            median(|| drop(black_box(measure(&deployments, &month, end)))),
        ),
        (
            "first carried by the last",
            median(|| drop(black_box(first_carried(&deployments, last)))),
        ),
    ] {
        println!("{name:<28} {took:>8.1} ms");
    }
}
