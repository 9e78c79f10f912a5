//! What users call.

use emberline_proto::v1::{
    CancelRunRequest, GetRunRequest, ListRunsRequest, PlanRunRequest, PlannedAction,
    RetryRunRequest, RunState, SubmitRunRequest, TaskState, ValidatePipelineRequest,
    WatchRunRequest, watch_run_response::Event,
};
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::*;

#[tokio::test]
async fn a_run_goes_from_submit_to_its_archived_end() {
    let cluster = Cluster::start().await;
    let _work = FakeWorker::ready(&cluster, "w", 2).await.work();
    let run = cluster.submit(TWO).await;
    assert_eq!(cluster.ends(&run).await, RunState::Succeeded);
    let found = cluster.get(&run).await;
    assert_eq!(found.pipeline_yaml, TWO);
    assert!(
        found
            .tasks
            .iter()
            .all(|t| t.state() == TaskState::Succeeded)
    );
}

#[tokio::test]
async fn every_mistake_of_a_pipeline_is_a_violation_that_names_its_field() {
    let cluster = Cluster::start().await;
    let yaml = "pipeline: x\nstages:\n  a:\n    kind: nop\n  b:\n    kind: noop\n    neds: [a]\n";
    let refused = cluster.runs().await.submit_run(submission(yaml)).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let details = refused.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    assert!(violations.len() >= 2, "{violations:?}");
    let all: Vec<String> = violations
        .iter()
        .map(|v| format!("{} {}", v.field, v.description))
        .collect();
    assert!(
        all.iter().any(|v| v.contains("pipeline.yaml:4:")),
        "{all:?}"
    );
    assert!(
        all.iter().any(|v| v.contains("pipeline.yaml:7:")),
        "{all:?}"
    );
    assert_eq!(details.error_info().unwrap().reason, "INVALID_PIPELINE");

    let checked = cluster
        .runs()
        .await
        .validate_pipeline(ValidatePipelineRequest {
            pipeline_yaml: yaml.to_owned(),
            ..Default::default()
        })
        .await;
    let diagnostics = checked.unwrap().into_inner().diagnostics;
    assert_eq!(diagnostics.len(), violations.len());
    assert!(diagnostics.iter().all(|d| d.line > 0 && d.column > 0));
}

#[tokio::test]
async fn fields_of_a_submission_are_checked_and_named() {
    let cluster = Cluster::start().await;
    let cases: Vec<(&str, SubmitRunRequest)> = vec![
        (
            "base_dir",
            SubmitRunRequest {
                base_dir: "relative".into(),
                ..submission(ONE)
            },
        ),
        (
            "trigger",
            SubmitRunRequest {
                trigger: "moon".into(),
                ..submission(ONE)
            },
        ),
        (
            "traceparent",
            SubmitRunRequest {
                traceparent: "x".into(),
                ..submission(ONE)
            },
        ),
        (
            "request_id",
            SubmitRunRequest {
                request_id: "x".repeat(500),
                ..submission(ONE)
            },
        ),
        (
            "priority",
            SubmitRunRequest {
                priority: Some(5000),
                ..submission(ONE)
            },
        ),
        (
            "params.lr",
            SubmitRunRequest {
                params: [("lr".into(), "{".into())].into(),
                ..submission(ONE)
            },
        ),
        (
            "pipeline_yaml",
            submission(&format!("{ONE}# {}", "x".repeat(1 << 20))),
        ),
    ];
    for (field, request) in cases {
        let refused = cluster.runs().await.submit_run(request).await.unwrap_err();
        assert_eq!(
            refused.code(),
            Code::InvalidArgument,
            "{field}: {refused:?}"
        );
        let details = refused.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
    }
    let listed = cluster
        .runs()
        .await
        .list_runs(ListRunsRequest::default())
        .await;
    assert!(
        listed.unwrap().into_inner().runs.is_empty(),
        "nothing was half-created"
    );
}

#[tokio::test]
async fn a_run_is_found_by_an_unambiguous_beginning_of_its_id() {
    let cluster = Cluster::start().await;
    let first = cluster.submit(ONE).await;
    let second = cluster.submit(ONE).await;
    assert!(second > first, "ids sort by time");
    assert_eq!(cluster.get(&first[..27]).await.summary.unwrap().run, first);
    let get = async |text: &str| {
        let request = GetRunRequest {
            run: text.to_owned(),
        };
        cluster.runs().await.get_run(request).await.unwrap_err()
    };
    let ambiguous = get("r").await;
    assert_eq!(ambiguous.code(), Code::InvalidArgument);
    assert!(ambiguous.message().contains("2 runs"), "{ambiguous:?}");
    assert_eq!(get("r-zzzz").await.code(), Code::NotFound);
    for bad in ["", "../../etc", "R", "a/b", "a\0"] {
        assert_eq!(get(bad).await.code(), Code::InvalidArgument, "{bad:?}");
    }
}

#[tokio::test]
async fn lists_come_in_pages_newest_first_with_live_and_ended_runs() {
    let cluster = Cluster::start().await;
    let mut all = Vec::new();
    for _ in 0..3 {
        all.push(cluster.submit(ONE).await);
    }
    let work = FakeWorker::ready(&cluster, "w", 8).await.work();
    for run in &all {
        cluster.ends(run).await;
    }
    work.abort();
    for _ in 0..4 {
        all.push(cluster.submit(TWO).await);
    }
    all.reverse();
    let list = async |request: ListRunsRequest| {
        let page = cluster.runs().await.list_runs(request).await;
        page.unwrap().into_inner()
    };
    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let page = list(ListRunsRequest {
            page_size: 3,
            page_token: token,
            ..Default::default()
        })
        .await;
        assert!(page.runs.len() <= 3);
        seen.extend(page.runs.into_iter().map(|r| r.run));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, all);
    let two = list(ListRunsRequest {
        pipeline: "two".into(),
        ..Default::default()
    })
    .await;
    assert_eq!(two.runs.len(), 4);
    let ended = list(ListRunsRequest {
        states: vec![RunState::Succeeded.into()],
        ..Default::default()
    })
    .await;
    assert_eq!(ended.runs.len(), 3);
    let bad = ListRunsRequest {
        page_token: "../x".into(),
        ..Default::default()
    };
    let bad = cluster.runs().await.list_runs(bad).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_cancelled_run_stays_cancelled_and_an_ended_one_cannot_be() {
    let cluster = Cluster::start().await;
    let run = cluster.submit(ONE).await;
    let cancel = async |run: &str| {
        let request = CancelRunRequest {
            run: run.to_owned(),
            why: "enough".to_owned(),
        };
        cluster.runs().await.cancel_run(request).await
    };
    cancel(&run).await.unwrap();
    assert_eq!(cluster.ends(&run).await, RunState::Cancelled);
    let again = cancel(&run).await.unwrap().into_inner().summary.unwrap();
    assert_eq!(again.state(), RunState::Cancelled);
    let _work = FakeWorker::ready(&cluster, "w", 1).await.work();
    let other = cluster.submit(ONE).await;
    cluster.ends(&other).await;
    let refused = soon("the refusal", async {
        loop {
            match cancel(&other).await {
                Err(refused) => return refused,
                Ok(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
}

#[tokio::test]
async fn a_failed_run_starts_again_from_what_failed() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 4).await;
    let run = cluster.submit(TWO).await;
    let a = worker.assignments().await.remove(0).id.unwrap();
    worker.report(vec![success(a)]).await;
    let b = worker.assignments().await.remove(0).id.unwrap();
    let mut failed = success(b);
    failed.failure = Some(emberline_proto::v1::Failure {
        reason: emberline_proto::v1::Reason::UserError.into(),
        message: "exit code 1".to_owned(),
    });
    worker.report(vec![failed]).await;
    assert_eq!(cluster.ends(&run).await, RunState::Failed);
    let request = RetryRunRequest { run: run.clone() };
    let again = cluster.runs().await.retry_run(request.clone()).await;
    let again = again.unwrap().into_inner().summary.unwrap();
    assert_eq!(again.run, run);
    let refused = cluster.runs().await.retry_run(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    let b = worker.assignments().await.remove(0).id.unwrap();
    assert_eq!(b.task, "b", "a succeeded before");
    worker.report(vec![success(b)]).await;
    assert_eq!(cluster.ends(&run).await, RunState::Succeeded);
}

#[tokio::test]
async fn a_plan_changes_nothing_and_says_what_would_run() {
    let cluster = Cluster::start().await;
    let request = PlanRunRequest {
        submission: Some(submission(TWO)),
    };
    let plan = cluster
        .runs()
        .await
        .plan_run(request)
        .await
        .unwrap()
        .into_inner();
    let tasks: Vec<&str> = plan.tasks.iter().map(|t| t.task.as_str()).collect();
    assert_eq!(tasks, ["a", "b"]);
    assert_eq!(plan.tasks[0].action(), PlannedAction::Run);
    let listed = cluster
        .runs()
        .await
        .list_runs(ListRunsRequest::default())
        .await;
    assert!(listed.unwrap().into_inner().runs.is_empty());
}

#[tokio::test]
async fn a_watch_tells_every_change_of_every_task() {
    let cluster = Cluster::start().await;
    let run = cluster.submit(&many(100)).await;
    let request = WatchRunRequest { run: run.clone() };
    let events = cluster.runs().await.watch_run(request.clone()).await;
    let mut events = events.unwrap().into_inner();
    let _work = FakeWorker::ready(&cluster, "w", 7).await.work();
    let mut done = std::collections::BTreeSet::new();
    let mut last = None;
    while let Some(event) = soon("an event", events.message()).await.unwrap() {
        match event.event.unwrap() {
            Event::Snapshot(snapshot) => assert_eq!(snapshot.tasks.len(), 100),
            Event::Task(task) if task.state() == TaskState::Succeeded => {
                done.insert(task.task);
            }
            Event::Run(summary) => last = Some(summary.state()),
            _ => {}
        }
    }
    assert_eq!((done.len(), last), (100, Some(RunState::Succeeded)));
    // Once it has ended, a watch is its snapshot.
    let events = cluster.runs().await.watch_run(request).await;
    let mut events = events.unwrap().into_inner();
    let only = soon("the snapshot", events.message())
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(only.event, Some(Event::Snapshot(_))));
    assert!(soon("the end", events.message()).await.unwrap().is_none());
}
