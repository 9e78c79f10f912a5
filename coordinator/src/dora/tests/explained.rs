//! Lead times, cut.

use emberline_common::{
    delivery::{PastPhase, Rollout, RolloutPhase},
    dora::{LeadTimeExplanation, SegmentKind},
    failure::Reason,
    run_view::{AttemptTiming, PastAttempt, RunState, RunSummary, RunView, TaskState, TaskView},
    serving::ServingLimits,
    spec::kinds::deploy::Strategy,
};
use proptest::prelude::*;
use serde_json::Map;

use super::*;
use crate::dora::explain;

const MINUTE: u64 = 60_000_000;

/// Noon, when the run was accepted.
fn noon() -> Timestamp {
    at("2026-03-02T12:00")
}

/// So many minutes after noon.
fn minute(minute: u64) -> Timestamp {
    later(noon(), minute * MINUTE)
}

fn run(tasks: Vec<TaskView>) -> RunView {
    let summary = RunSummary {
        run: "run-1".parse().unwrap(),
        pipeline: "churn".parse().unwrap(),
        revision: Digest::of(b"pipeline"),
        state: RunState::Succeeded,
        failure: None,
        params: Map::new(),
        priority: 0,
        created_at: noon(),
        started_at: None,
        finished_at: None,
        tasks_total: 0,
        tasks_done: 0,
        tasks_cached: 0,
        trigger: "manual".to_owned(),
        traceparent: String::new(),
        resumed_at: None,
        change: None,
        repairs: None,
    };
    RunView { summary, tasks }
}

/// A task that was ready, started and ended so many minutes after noon; its stage took all but one
/// minute before, one after and one to be told.
fn task(name: &str, needs: &[&str], ready: u64, started: u64, finished: u64) -> TaskView {
    let kind = if name == "deploy" { "deploy" } else { "exec" };
    TaskView {
        run: "run-1".parse().unwrap(),
        task: name.parse().unwrap(),
        stage: name.split('.').next().unwrap().parse().unwrap(),
        kind: kind.parse().unwrap(),
        needs: needs.iter().map(|n| n.parse().unwrap()).collect(),
        matrix: Map::new(),
        state: TaskState::Succeeded,
        attempt: 1,
        worker: None,
        failure: None,
        outputs: Vec::new(),
        results: Map::new(),
        note: String::new(),
        ready_at: Some(minute(ready)),
        started_at: Some(minute(started)),
        finished_at: Some(minute(finished)),
        cached_from: None,
        timing: AttemptTiming {
            fetch_micros: MINUTE,
            stage_micros: (finished - started - 3) * MINUTE,
            store_micros: MINUTE,
        },
        earlier: Vec::new(),
        again_at: None,
    }
}

/// A deployment that was live so many minutes after noon, of a commit of 11:00 that was pushed at
/// 11:30.
fn deployed(live: u64) -> Deployment {
    let mut deployment = carrying(1, "2026-03-02T12:00", &[("a", "2026-03-02T11:00")]);
    deployment.accepted_at = noon();
    deployment.finished_at = Some(minute(live));
    deployment.change.as_mut().unwrap().pushed_at = Some(at("2026-03-02T11:30"));
    deployment
}

/// Kind, task and minutes of each segment.
fn cut(explanation: &LeadTimeExplanation) -> Vec<(SegmentKind, String, u64)> {
    let told = explanation.segments.iter().map(|segment| {
        let task = segment.task.as_ref().map(ToString::to_string);
        (
            segment.kind,
            task.unwrap_or_default(),
            segment.micros / MINUTE,
        )
    });
    told.collect()
}

/// What holds of every explanation.
fn check(explanation: &LeadTimeExplanation) {
    let mut at = explanation.began_at;
    for segment in &explanation.segments {
        assert_eq!(segment.from, at, "no gap and no overlap");
        assert!(segment.micros > 0);
        at = later(at, segment.micros);
    }
    if !explanation.segments.is_empty() {
        assert_eq!(at, explanation.finished_at);
    }
    let sum: u64 = explanation.segments.iter().map(|s| s.micros).sum();
    assert_eq!(sum, explanation.total_micros);
}

fn explained(deployment: &Deployment, run: &RunView) -> LeadTimeExplanation {
    let explanation = explain(deployment, Some(run), Vec::new()).unwrap();
    check(&explanation);
    explanation
}

#[test]
fn a_lead_time_is_cut_along_the_critical_path() {
    use SegmentKind::*;
    let tasks = vec![
        task("raw", &[], 0, 2, 10),
        // Faster than the other one: it delays nothing.
        task("train.0", &["raw"], 10, 11, 20),
        task("train.1", &["raw"], 10, 14, 40),
        task("deploy", &["train"], 40, 41, 46),
    ];
    let explanation = explained(&deployed(46), &run(tasks));
    assert_eq!(explanation.total_micros, (60 + 46) * MINUTE);
    assert!(!explanation.skewed);
    let of = |kind, task: &str, minutes| (kind, task.to_owned(), minutes);
    assert_eq!(
        cut(&explanation),
        [
            of(CommitToPush, "", 30),
            of(PushToAccepted, "", 30),
            of(CapacityWait, "raw", 2),
            of(Fetch, "raw", 1),
            of(Stage, "raw", 5),
            of(Store, "raw", 1),
            of(Dispatch, "raw", 1),
            of(CapacityWait, "train.1", 4),
            of(Fetch, "train.1", 1),
            of(Stage, "train.1", 23),
            of(Store, "train.1", 1),
            of(Dispatch, "train.1", 1),
            of(CapacityWait, "deploy", 1),
            of(Fetch, "deploy", 1),
            of(Deploy, "deploy", 2),
            of(Store, "deploy", 1),
            of(Dispatch, "deploy", 1),
        ]
    );
}

#[test]
fn the_phases_of_a_canary_are_segments() {
    use SegmentKind::*;
    let tasks = vec![task("deploy", &[], 0, 1, 6)];
    let mut deployment = deployed(60);
    let past = |phase, from, to| PastPhase {
        phase,
        from: minute(from),
        to: minute(to),
    };
    deployment.rollout = Some(Rollout {
        replicas: 1,
        strategy: Strategy::default(),
        limits: ServingLimits::default(),
        progress_deadline: "10m".parse().unwrap(),
        alias: None,
        phase: RolloutPhase::Settled,
        since: minute(60),
        past: vec![
            past(RolloutPhase::Preparing, 6, 8),
            past(RolloutPhase::Step { step: 0 }, 8, 18),
            past(RolloutPhase::Step { step: 1 }, 18, 38),
            past(RolloutPhase::AwaitingApproval, 38, 60),
        ],
        exposed_at: Some(minute(9)),
        approved: true,
        note: String::new(),
    });
    let explanation = explained(&deployment, &run(tasks));
    let told: Vec<_> = (cut(&explanation).into_iter())
        .map(|(kind, _, minutes)| (kind, minutes))
        .collect();
    assert_eq!(
        told[told.len() - 4..],
        [(Promotion, 2), (Canary, 10), (Canary, 20), (Approval, 22)]
    );
}

#[test]
fn lost_attempts_and_their_backoff_are_segments() {
    use SegmentKind::*;
    let mut deploy = task("deploy", &[], 1, 20, 25);
    deploy.attempt = 2;
    deploy.again_at = Some(minute(18));
    deploy.earlier = vec![PastAttempt {
        attempt: 1,
        worker: None,
        ready_at: minute(1),
        started_at: minute(3),
        finished_at: minute(13),
        reason: Reason::WorkerLost,
    }];
    let explanation = explained(&deployed(25), &run(vec![deploy]));
    let told = cut(&explanation);
    let told: Vec<_> = told
        .iter()
        .map(|(kind, _, minutes)| (*kind, *minutes))
        .collect();
    assert_eq!(
        told[2..7],
        [
            (InputsWait, 1),
            (CapacityWait, 2),
            (LostAttempt, 10),
            (BackoffWait, 5),
            (CapacityWait, 2),
        ]
    );
    let attempts: Vec<_> = explanation.segments.iter().map(|s| s.attempt).collect();
    assert_eq!(attempts[4], Some(1));
    assert_eq!(attempts[8], Some(2));
}

#[test]
fn a_reused_task_takes_no_time_and_a_retried_run_waits() {
    use SegmentKind::*;
    let mut cached = task("train", &[], 0, 0, 3);
    cached.state = TaskState::Cached;
    cached.started_at = None;
    cached.finished_at = Some(minute(0));
    let mut view = run(vec![cached, task("deploy", &["train"], 100, 101, 105)]);
    view.summary.resumed_at = Some(minute(100));
    let explanation = explained(&deployed(105), &view);
    let told = cut(&explanation);
    assert_eq!(told[2], (RetryWait, String::new(), 100));
    assert_eq!(told[3].0, CapacityWait);
}

#[test]
fn what_comes_after_the_deploy_task_is_canary_and_promotion() {
    let explanation = explained(&deployed(90), &run(vec![task("deploy", &[], 0, 0, 10)]));
    let told = cut(&explanation);
    assert_eq!(
        told.last().unwrap(),
        &(SegmentKind::Promotion, String::new(), 80)
    );
}

#[test]
fn a_run_that_is_forgotten_is_one_segment() {
    use SegmentKind::*;
    let mut deployment = deployed(46);
    deployment.started_at = minute(41);
    deployment.change.as_mut().unwrap().pushed_at = None;
    let explanation = explain(&deployment, None, Vec::new()).unwrap();
    check(&explanation);
    let of = |kind, minutes| (kind, String::new(), minutes);
    let told = [of(CommitToAccepted, 60), of(Run, 41), of(Deploy, 5)];
    assert_eq!(cut(&explanation), told);
    assert!(explanation.note.contains("not known any more"));
}

#[test]
fn a_rollback_has_only_its_own_time() {
    let mut deployment = rollback(2, 1, "2026-03-02T12:00");
    deployment.finished_at = Some(minute(1));
    let explanation = explained(&deployment, &run(vec![task("deploy", &[], 0, 0, 10)]));
    let told = [(SegmentKind::Deploy, String::new(), 1)];
    assert_eq!(cut(&explanation), told);
    assert!(explanation.note.contains("rollback"));
}

#[test]
fn what_is_under_way_is_not_explained() {
    let mut deployment = outcome(deployed(1), DeploymentOutcome::InProgress);
    deployment.finished_at = None;
    assert_eq!(explain(&deployment, None, Vec::new()), None);
}

#[test]
fn a_commit_of_the_future_has_no_lead_time() {
    let mut deployment = deployed(46);
    deployment.change.as_mut().unwrap().committed_at = minute(500);
    let explanation = explained(&deployment, &run(vec![task("deploy", &[], 0, 0, 10)]));
    assert_eq!(explanation.total_micros, 0);
    assert!(explanation.skewed);
    assert!(explanation.segments.is_empty());
}

proptest! {
    #[test]
    fn the_segments_add_up_whatever_the_clocks_say(
        times in prop::collection::vec(0_u64..200, 14),
        needs in prop::collection::vec(0_usize..4, 3),
        attempt in 0_u32..3,
        timing in prop::collection::vec(0_u64..300 * MINUTE, 3),
    ) {
        let mut deployment = deployed(times[0]);
        let change = deployment.change.as_mut().unwrap();
        change.committed_at = minute(times[1]);
        change.pushed_at = (times[2] > 50).then(|| minute(times[2]));
        deployment.accepted_at = minute(times[3]);
        let names = ["raw", "train", "check", "deploy"];
        let mut tasks: Vec<TaskView> = (names.iter().enumerate())
            .map(|(n, name)| {
                let mut task = task(name, &[], 0, 0, 3);
                // Any needs, circles too.
                task.needs = needs.iter().map(|need| names[(need + n) % 4].parse().unwrap()).collect();
                task.ready_at = (times[4 + n] > 20).then(|| minute(times[4 + n]));
                task.started_at = (times[5 + n] > 20).then(|| minute(times[5 + n]));
                task.finished_at = (times[6 + n] > 20).then(|| minute(times[6 + n]));
                task.timing = AttemptTiming {
                    fetch_micros: timing[0],
                    stage_micros: timing[1],
                    store_micros: timing[2],
                };
                task
            })
            .collect();
        tasks[3].attempt = attempt;
        tasks[3].earlier = vec![PastAttempt {
            attempt: 1,
            worker: None,
            ready_at: minute(times[11]),
            started_at: minute(times[12]),
            finished_at: minute(times[13]),
            reason: Reason::Timeout,
        }];
        let mut view = run(tasks);
        view.summary.resumed_at = Some(minute(times[10]));
        explained(&deployment, &view);
        check(&explain(&deployment, None, Vec::new()).unwrap());
    }
}
