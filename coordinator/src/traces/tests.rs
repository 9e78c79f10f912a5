//! One run's spans, by hand.
#![allow(clippy::unwrap_used)]

use emberline_common::{
    delivery::{Change, ChangeKind, Deployment, DeploymentKind, DeploymentOutcome},
    failure::{Failure, Reason},
    ids::{DeploymentId, Digest},
    run_view::{AttemptTiming, PastAttempt, RunState, RunSummary, TaskState, TaskView},
    telemetry::{Span, SpanKind},
    time::Timestamp,
    trace,
};
use serde_json::Map;

use super::Spans;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn run(traceparent: &str) -> RunSummary {
    RunSummary {
        run: "r1".parse().unwrap(),
        pipeline: "digits".parse().unwrap(),
        revision: Digest::of(b"text"),
        state: RunState::Succeeded,
        failure: None,
        params: Map::new(),
        priority: 0,
        created_at: Timestamp(100),
        started_at: Some(Timestamp(120)),
        finished_at: Some(Timestamp(900)),
        tasks_total: 1,
        tasks_done: 1,
        tasks_cached: 0,
        trigger: "commit".into(),
        traceparent: traceparent.into(),
        resumed_at: Some(Timestamp(100)),
        change: Some(Change {
            kind: ChangeKind::Code,
            repository: "https://example.org/digits".into(),
            branch: "main".into(),
            revision: "4f2a".into(),
            id: "17".into(),
            committed_at: Timestamp(1),
            authored_at: None,
            pushed_at: None,
            dirty: false,
            commits: Vec::new(),
            left_out: 0,
        }),
        repairs: None,
    }
}

/// A training whose first worker was lost and whose second attempt failed.
fn task() -> TaskView {
    let past = |attempt, ready: u64, started: u64, finished: u64, reason| PastAttempt {
        attempt,
        worker: Some("w1".parse().unwrap()),
        ready_at: Timestamp(ready),
        started_at: Timestamp(started),
        finished_at: Timestamp(finished),
        reason,
    };
    TaskView {
        run: "r1".parse().unwrap(),
        task: "train".parse().unwrap(),
        stage: "train".parse().unwrap(),
        kind: "train".parse().unwrap(),
        needs: Vec::new(),
        matrix: Map::new(),
        state: TaskState::Succeeded,
        attempt: 3,
        worker: Some("w2".parse().unwrap()),
        failure: None,
        outputs: Vec::new(),
        results: Map::new(),
        note: String::new(),
        ready_at: Some(Timestamp(150)),
        started_at: Some(Timestamp(510)),
        finished_at: Some(Timestamp(880)),
        cached_from: None,
        timing: AttemptTiming::default(),
        earlier: vec![
            past(1, 150, 160, 300, Reason::WorkerLost),
            past(2, 300, 310, 400, Reason::UserError),
        ],
        again_at: Some(Timestamp(500)),
    }
}

fn text(span: &Span, name: &str) -> String {
    let found = span.attributes.iter().find(|a| a.key.as_str() == name);
    found.map(|a| a.value.to_string()).unwrap_or_default()
}

#[test]
fn a_run_is_the_answer_to_whoever_asked_for_it() {
    let span = Spans::default().run(&run(PARENT));
    assert_eq!(span.name, "RUN digits");
    assert_eq!(span.kind, SpanKind::Server);
    assert_eq!(span.parent.unwrap().to_string(), "b7ad6b7169203331");
    assert!(span.parent_is_remote);
    for (name, value) in [
        ("cicd.pipeline.name", "digits"),
        ("cicd.pipeline.run.id", "r1"),
        ("cicd.pipeline.action.name", "RUN"),
        ("cicd.pipeline.result", "success"),
        ("cicd.pipeline.run.url.full", "emberline:///runs/r1"),
        ("vcs.repository.url.full", "https://example.org/digits"),
        ("vcs.ref.head.name", "main"),
        ("vcs.ref.head.revision", "4f2a"),
        ("vcs.change.id", "17"),
        ("emberline.trigger", "commit"),
    ] {
        assert_eq!(text(&span, name), value, "{name}");
    }
    assert_eq!(Spans::default().run(&run("")).parent, None);
}

#[test]
fn waits_and_attempts_follow_each_other_without_a_gap() {
    let spans = Spans::default().task(&run(""), &task());
    let mut at = Timestamp(100);
    for span in &spans {
        assert_eq!(span.start, at, "{}", span.name);
        at = span.end;
    }
    assert_eq!(at, Timestamp(880));
    let reasons: Vec<String> = spans
        .iter()
        .map(|s| text(s, "emberline.wait.reason"))
        .collect();
    let expected = [
        "inputs", "capacity", "", "capacity", "", "backoff", "capacity", "",
    ];
    assert_eq!(reasons, expected);
}

#[test]
fn all_of_a_task_is_part_of_the_run_and_a_new_attempt_links_to_the_one_before() {
    let run = run("");
    let root = Spans::default().run(&run).id;
    let spans = Spans::default().task(&run, &task());
    assert!(spans.iter().all(|span| span.parent == Some(root)));
    let attempts: Vec<&Span> = spans.iter().filter(|s| s.name == "train").collect();
    let results = attempts
        .iter()
        .map(|s| text(s, "cicd.pipeline.task.run.result"));
    assert!(results.eq(["error", "failure", "success"]));
    let errors = attempts.iter().map(|s| text(s, "error.type"));
    assert!(errors.eq(["worker_lost", "user_error", ""]));
    assert_eq!(attempts[0].links, []);
    assert_eq!(attempts[1].links, [(run.trace().trace, attempts[0].id)]);
    assert_eq!(attempts[2].links, [(run.trace().trace, attempts[1].id)]);
    assert_eq!(text(attempts[2], "cicd.pipeline.task.type"), "build");
    assert_eq!(text(attempts[2], "cicd.worker.name"), "w2");
    assert_eq!(text(attempts[0], "cicd.pipeline.task.run.id"), "r1/train/1");
}

#[test]
fn the_same_record_gives_the_same_spans() {
    let spans = || Spans::default().task(&run(PARENT), &task());
    assert_eq!(spans(), spans());
    let ids: std::collections::BTreeSet<_> = spans().iter().map(|s| s.id).collect();
    assert_eq!(ids.len(), 8);
}

#[test]
fn a_task_that_was_tried_and_then_cut_off_has_no_attempt_that_never_was() {
    let mut cut = task();
    cut.attempt = 2;
    cut.started_at = Some(Timestamp(310));
    cut.state = TaskState::Cancelled;
    let spans = Spans::default().task(&run(""), &cut);
    assert_eq!(spans.iter().filter(|s| s.name == "train").count(), 2);
}

#[test]
fn what_did_not_run_is_a_moment_and_says_so() {
    let mut reused = task();
    reused.state = TaskState::Cached;
    (reused.attempt, reused.started_at) = (0, None);
    reused.earlier.clear();
    let spans = Spans::default().task(&run(""), &reused);
    assert_eq!(spans.len(), 1);
    assert_eq!(spans[0].start, spans[0].end);
    assert_eq!(text(&spans[0], "cicd.pipeline.task.run.result"), "skip");
    assert_eq!(text(&spans[0], "emberline.cache.hit"), "true");
}

#[test]
fn the_systems_faults_are_told_from_the_stages_own() {
    for (reason, result) in [
        (Reason::UserError, "failure"),
        (Reason::QualityGate, "failure"),
        (Reason::WorkerLost, "error"),
        (Reason::Storage, "error"),
        (Reason::Timeout, "timeout"),
    ] {
        let mut failed = run("");
        failed.state = RunState::Failed;
        failed.failure = Some(Failure::new(reason, "why"));
        let span = Spans::default().run(&failed);
        assert_eq!(text(&span, "cicd.pipeline.result"), result);
        assert_eq!(text(&span, "error.type"), reason.as_str());
        assert_eq!(span.error.as_deref(), Some("why"));
    }
}

#[test]
fn a_rollback_is_part_of_the_deployment_that_it_repairs() {
    let run = run("");
    let mut deployment = Deployment {
        id: DeploymentId(7),
        kind: DeploymentKind::Release,
        environment: "production".parse().unwrap(),
        pipeline: "digits".parse().unwrap(),
        model: "m".parse().unwrap(),
        version: 3,
        run: run.run.clone(),
        task: "deploy".parse().unwrap(),
        repairs: None,
        previous: None,
        outcome: DeploymentOutcome::Live,
        accepted_at: Timestamp(100),
        started_at: Timestamp(880),
        finished_at: Some(Timestamp(890)),
        failure: None,
        change: run.change.clone(),
        data: Vec::new(),
        rollout: None,
        trace: run.trace().trace,
    };
    let root = run.trace().root(Timestamp(100));
    let first = Spans::default()
        .deployment(&deployment, Some(root))
        .unwrap();
    assert_eq!(first.name, "deploy m");
    for (name, value) in [
        ("deployment.id", "d7"),
        ("deployment.name", "m"),
        ("deployment.environment.name", "production"),
        ("deployment.status", "succeeded"),
        ("emberline.model.version", "3"),
    ] {
        assert_eq!(text(&first, name), value, "{name}");
    }
    deployment.id = DeploymentId(8);
    deployment.repairs = Some(DeploymentId(7));
    let rollback = Spans::default().deployment(&deployment, None).unwrap();
    assert_eq!(rollback.parent, Some(first.id));
    assert_eq!(
        first.id,
        trace::deployment(deployment.trace, DeploymentId(7))
    );
}
