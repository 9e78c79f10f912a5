//! What is tried again, how often and when.

use super::*;
use crate::engine::api::{Disconnect, Observe};

fn retried(retries: Value) -> (Cluster, RunId) {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    let mut stage = convert(1);
    stage["retries"] = retries;
    let run = cluster.submit(single("p", stage));
    (cluster, run)
}

#[test]
fn an_error_of_the_stage_is_tried_again_after_a_growing_wait() {
    let (mut cluster, run) = retried(json!({"errors": 2, "backoff": "1s", "max_backoff": "1m"}));
    let mut waits = Vec::new();
    for attempt in 1..=3 {
        let started = cluster.took().remove(0);
        assert_eq!(started.1.id.attempt, attempt);
        cluster.fail(&started, Reason::UserError);
        if attempt < 3 {
            assert_eq!(cluster.task(&run, "work"), TaskState::Backoff);
            waits.push(cluster.next_deadline().as_secs_f64());
        }
    }
    // Up to half is taken off, so that many do not come back at one moment.
    assert!((0.5..=1.0).contains(&waits[0]), "{waits:?}");
    assert!((1.0..=2.0).contains(&waits[1]), "{waits:?}");
    assert_eq!(cluster.task(&run, "work"), TaskState::Failed);
    assert!(cluster.took().is_empty());
}

#[test]
fn observers_are_told_of_each_attempt_that_fails_when_it_does() {
    let mut cluster = Cluster::new();
    let config = EngineConfig {
        observe: Observe::Exceptions,
        ..EngineConfig::default()
    };
    cluster.engine = Engine::new(config, Epoch(1), 1);
    cluster.worker(1, 8, 8);
    let mut stage = convert(1);
    stage["retries"] = json!({"faults": 1, "errors": 0});
    cluster.submit(single("p", stage));
    let first = cluster.took().remove(0);
    cluster.fail(&first, Reason::Storage);
    assert_eq!(cluster.failed, [Reason::Storage]);
    cluster.next_deadline();
    let second = cluster.took().remove(0);
    cluster.fail(&second, Reason::Oom);
    assert_eq!(cluster.failed, [Reason::Storage, Reason::Oom]);
    // A late report of an attempt that is over is none.
    cluster.fail(&first, Reason::Storage);
    assert_eq!(cluster.failed.len(), 2);
}

#[test]
fn bad_data_and_a_gate_that_does_not_hold_are_never_tried_again() {
    for reason in [Reason::Data, Reason::QualityGate] {
        let (mut cluster, run) = retried(json!({"errors": 9, "faults": 9}));
        let started = cluster.took().remove(0);
        cluster.fail(&started, reason);
        assert_eq!(cluster.task(&run, "work"), TaskState::Failed);
    }
}

#[test]
fn a_lost_worker_spends_its_own_budget_and_waits_for_nothing() {
    let (mut cluster, run) = retried(json!({"errors": 0, "lost_workers": 1}));
    cluster.took();
    cluster.handle(Command::WorkerDisconnected {
        session: SessionId(1),
        how: Disconnect::Closed,
    });
    // It is waited for first.
    cluster.worker(2, 8, 8);
    assert!(cluster.took().is_empty());
    let waited = cluster.next_deadline().as_secs_f64();
    assert!((0.4..0.41).contains(&waited), "{waited}");
    let again = cluster.took().remove(0);
    assert_eq!((again.0, again.1.id.attempt), (SessionId(2), 2));
    cluster.handle(Command::WorkerDisconnected {
        session: SessionId(2),
        how: Disconnect::Closed,
    });
    cluster.next_deadline();
    assert_eq!(cluster.task(&run, "work"), TaskState::Failed);
    let failure = cluster.view(&run).summary.failure.unwrap();
    assert_eq!(failure.reason, Reason::WorkerLost);
}

#[test]
fn the_late_report_of_a_lost_attempt_changes_nothing() {
    let (mut cluster, run) = retried(json!({"lost_workers": 3}));
    let lost = cluster.took().remove(0);
    cluster.handle(Command::WorkerDisconnected {
        session: SessionId(1),
        how: Disconnect::Closed,
    });
    let other = cluster.worker(2, 8, 8);
    cluster.next_deadline();
    let current = cluster.took().remove(0);
    // The first worker comes back, and reports through its new session.
    let back = cluster.worker(3, 8, 0);
    cluster.succeed(&(back, lost.1), "late");
    assert_eq!(cluster.task(&run, "work"), TaskState::Running);
    cluster.succeed(&current, "current");
    let view = cluster.view(&run);
    assert_eq!(view.tasks[0].outputs[0].manifest, Digest::of(b"current"));
    assert_eq!(current.0, other);
}
