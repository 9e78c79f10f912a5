//! The API as any gRPC client sees it: codes, details, streams, pages.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;

use emberline_proto::v1::{
    CancelRunRequest, GetArtifactRequest, GetClusterStatusRequest, GetModelRequest, GetRunRequest,
    ListRunsRequest, PlanRunRequest, PutBlobRequest, ReadBlobRequest, RetryRunRequest, RunState,
    StreamLogsRequest, SubmitRunRequest, SubmittedFile, TaskState, ValidatePipelineRequest,
    WatchRunRequest, run_service_client::RunServiceClient, stream_logs_response::Entry,
    watch_run_response::Event,
};
use emberline_tests::{Dev, Place, outside};
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt as _;

fn submission(place: &Place, yaml: &str, request_id: &str) -> SubmitRunRequest {
    SubmitRunRequest {
        pipeline_yaml: yaml.to_owned(),
        file_name: "p.yaml".to_owned(),
        base_dir: place.dir().display().to_string(),
        request_id: request_id.to_owned(),
        trigger: "manual".to_owned(),
        ..Default::default()
    }
}

/// Submits, and follows to the end: every event.
async fn follow(runs: &mut RunServiceClient<Channel>, run: &str) -> Vec<Event> {
    let mut stream = runs
        .watch_run(WatchRunRequest {
            run: run.to_owned(),
        })
        .await
        .unwrap()
        .into_inner();
    let mut events = Vec::new();
    let all = async {
        while let Some(event) = stream.message().await.unwrap() {
            events.push(event.event.unwrap());
        }
    };
    let within = std::time::Duration::from_secs(60);
    tokio::time::timeout(within, all)
        .await
        .expect("the stream ends");
    events
}

/// The rules of a refusal: this code, this reason in the details, and this in the message.
#[track_caller]
fn refused(status: &Status, code: Code, reason: &str, part: &str) {
    assert_eq!(status.code(), code, "{status:?}");
    let info = status.get_details_error_info().expect("an ErrorInfo");
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        (reason, "emberline"),
        "{status:?}"
    );
    assert!(status.message().contains(part), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_serving_for_as_long_as_it_serves() {
    let place = Place::new();
    let dev = Dev::start(&place);
    let mut health = HealthClient::new(dev.channel().await);
    let request = HealthCheckRequest {
        service: String::new(),
    };
    let answer = health.check(request.clone()).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    let unknown = HealthCheckRequest {
        service: "nobody".to_owned(),
    };
    assert_eq!(
        health.check(unknown).await.unwrap_err().code(),
        Code::NotFound
    );
    let status = dev
        .cluster()
        .await
        .get_cluster_status(GetClusterStatusRequest {})
        .await
        .unwrap();
    assert_eq!(status.into_inner().workers.len(), 2);
    // Not asked anew: another process may have the port by then.
    let mut watch = health.watch(request).await.unwrap().into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);
    tokio::task::spawn_blocking(move || dev.stop())
        .await
        .unwrap()
        .expect_code(0);
    while let Ok(Some(later)) = watch.message().await {
        assert_ne!(later.status(), ServingStatus::Serving);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submit_that_is_sent_again_is_the_same_run() {
    let place = Place::new();
    let dev = Dev::start(&place);
    let mut runs = dev.runs().await;
    let request = submission(
        &place,
        "pipeline: p\nstages: { a: { kind: noop } }\n",
        "id-1",
    );
    let mut answers = Vec::new();
    for _ in 0..8 {
        let (mut runs, request) = (runs.clone(), request.clone());
        answers.push(tokio::spawn(async move {
            runs.submit_run(request).await.unwrap().into_inner()
        }));
    }
    let mut ids = Vec::new();
    let mut made = 0;
    for answer in answers {
        let answer = answer.await.unwrap();
        made += u32::from(!answer.already_existed);
        ids.push(answer.run);
    }
    ids.dedup();
    assert_eq!((ids.len(), made), (1, 1));
    follow(&mut runs, &ids[0]).await;
    // Also after its end, and after the death of the coordinator.
    let again = runs.submit_run(request.clone()).await.unwrap().into_inner();
    assert!(again.already_existed && again.run == ids[0]);
    dev.kill();
    let dev = Dev::start(&place);
    let again = dev
        .runs()
        .await
        .submit_run(request)
        .await
        .unwrap()
        .into_inner();
    assert!(again.already_existed && again.run == ids[0], "{again:?}");
    let other = submission(
        &place,
        "pipeline: p\nstages: { a: { kind: noop } }\n",
        "id-2",
    );
    let other = dev
        .runs()
        .await
        .submit_run(other)
        .await
        .unwrap()
        .into_inner();
    assert!(!other.already_existed && other.run != ids[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_refused_with_details_that_a_program_can_read() {
    let place = Place::new();
    let dev = Dev::start(&place);
    let mut runs = dev.runs().await;
    let good = "pipeline: p\nstages: { a: { kind: noop } }\n";

    let bad = "pipeline: p\nstages:\n  a: { kind: nope }\n  b: { kind: noop, needs: [c] }\n";
    let status = runs
        .submit_run(submission(&place, bad, "b"))
        .await
        .unwrap_err();
    refused(
        &status,
        Code::InvalidArgument,
        "INVALID_PIPELINE",
        "p.yaml:3:",
    );
    let violations = status.get_details_bad_request().unwrap().field_violations;
    assert_eq!(violations.len(), 2, "{violations:?}");
    assert_eq!(violations[0].field, "stages.a.kind");
    assert!(
        violations[0].description.starts_with("p.yaml:3:"),
        "{violations:?}"
    );

    // So many mistakes that no header could carry them: cut, and said so.
    let mut many = String::from("pipeline: p\nstages:\n");
    for n in 0..900 {
        many += &format!("  s{n}: {{ kind: nope-{n} }}\n");
    }
    let status = runs
        .submit_run(submission(&place, &many, "m"))
        .await
        .unwrap_err();
    refused(
        &status,
        Code::InvalidArgument,
        "INVALID_PIPELINE",
        "mistakes",
    );
    let violations = status.get_details_bad_request().unwrap().field_violations;
    assert!(violations.len() > 5);
    assert!(
        violations
            .last()
            .unwrap()
            .description
            .contains("more mistakes")
    );
    let all = ValidatePipelineRequest {
        pipeline_yaml: many,
        file_name: "p.yaml".into(),
        ..Default::default()
    };
    let all = runs.validate_pipeline(all).await.unwrap().into_inner();
    assert_eq!(all.diagnostics.len(), 101);

    let mut wrong_fields = Vec::new();
    let mut add = |field: &'static str, change: &dyn Fn(&mut SubmitRunRequest)| {
        let mut request = submission(&place, good, "x");
        change(&mut request);
        wrong_fields.push((field, request));
    };
    add("base_dir", &|r| r.base_dir = "relative".into());
    add("request_id", &|r| r.request_id = "x".repeat(200));
    add("trigger", &|r| r.trigger = "whim".into());
    add("traceparent", &|r| r.traceparent = "00-xyz".into());
    add("priority", &|r| r.priority = Some(100_000));
    add("params.q", &|r| {
        r.params = HashMap::from([("q".to_owned(), "no json".to_owned())])
    });
    add("files.path", &|r| {
        r.files = vec![SubmittedFile {
            path: "../x".into(),
            sha256: "0".repeat(64),
            ..Default::default()
        }];
    });
    add("files.sha256", &|r| {
        r.files = vec![SubmittedFile {
            path: "x".into(),
            sha256: "short".into(),
            ..Default::default()
        }];
    });
    for (field, request) in wrong_fields {
        let status = runs.submit_run(request).await.expect_err(field);
        refused(&status, Code::InvalidArgument, "INVALID_FIELD", field);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field, "{violations:?}");
    }
    let mut not_stored = submission(&place, good, "x");
    not_stored.files = vec![SubmittedFile {
        path: "x".into(),
        sha256: "0".repeat(64),
        bytes: 1,
        executable: false,
    }];
    let status = runs.submit_run(not_stored).await.unwrap_err();
    refused(&status, Code::FailedPrecondition, "FILE_NOT_STORED", "`x`");

    // Too large: the text, the message, the headers.
    let large = submission(&place, &format!("{good}#{}", "x".repeat(2 << 20)), "l");
    let status = runs.submit_run(large).await.unwrap_err();
    assert!(
        matches!(
            status.code(),
            Code::InvalidArgument | Code::ResourceExhausted
        ),
        "{status:?}"
    );
    let huge = submission(&place, &"x".repeat(5 << 20), "h");
    let status = runs.submit_run(huge).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    let planned = runs
        .plan_run(PlanRunRequest { submission: None })
        .await
        .unwrap_err();
    refused(
        &planned,
        Code::InvalidArgument,
        "INVALID_FIELD",
        "submission",
    );

    // Unknown, ambiguous, impossible.
    let unknown = || "r-00000000000000000000000000".to_owned();
    let status = runs
        .get_run(GetRunRequest { run: unknown() })
        .await
        .unwrap_err();
    refused(&status, Code::NotFound, "NOT_FOUND", "there is no run");
    let status = runs
        .watch_run(WatchRunRequest { run: unknown() })
        .await
        .unwrap_err();
    refused(&status, Code::NotFound, "NOT_FOUND", "there is no run");
    let status = runs
        .cancel_run(CancelRunRequest {
            run: unknown(),
            why: String::new(),
        })
        .await
        .unwrap_err();
    refused(&status, Code::NotFound, "NOT_FOUND", "there is no run");
    let status = runs
        .retry_run(RetryRunRequest { run: unknown() })
        .await
        .unwrap_err();
    refused(&status, Code::NotFound, "NOT_FOUND", "there is no run");
    let status = runs
        .stream_logs(StreamLogsRequest {
            run: unknown(),
            ..Default::default()
        })
        .await
        .unwrap_err();
    refused(&status, Code::NotFound, "NOT_FOUND", "there is no run");
    let status = runs
        .get_run(GetRunRequest { run: "../x".into() })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let status = dev
        .models()
        .await
        .get_model(GetModelRequest { model: "m".into() })
        .await
        .unwrap_err();
    refused(&status, Code::NotFound, "NOT_FOUND", "there is no model");
    let mut artifacts = dev.artifacts().await;
    let zero = "0".repeat(64);
    let status = artifacts
        .get_artifact(GetArtifactRequest {
            artifact: zero.clone(),
        })
        .await
        .unwrap_err();
    refused(&status, Code::NotFound, "NOT_FOUND", &zero);
    let read = artifacts
        .read_blob(ReadBlobRequest {
            sha256: zero.clone(),
        })
        .await;
    let status = match read {
        Err(status) => status,
        Ok(stream) => stream.into_inner().message().await.unwrap_err(),
    };
    refused(&status, Code::NotFound, "NOT_FOUND", &zero);
    // Bytes that are not what they are said to be are not stored.
    let put = tokio_stream::iter([PutBlobRequest {
        sha256: outside::sha256(b"a"),
        data: b"b".to_vec(),
    }]);
    let status = artifacts.put_blob(put).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(!outside::object(&place.state(), &outside::sha256(b"a")).exists());
    assert!(!outside::object(&place.state(), &outside::sha256(b"b")).exists());

    // After all that nothing was made, and it works.
    let none = runs
        .list_runs(ListRunsRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert!(none.runs.is_empty(), "{none:?}");
    let run = runs
        .submit_run(submission(&place, good, "x"))
        .await
        .unwrap()
        .into_inner()
        .run;
    follow(&mut runs, &run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_sees_every_state_in_order_and_then_the_end() {
    let place = Place::new();
    let dev = Dev::start(&place);
    let mut runs = dev.runs().await;
    let gate = place.path("gate");
    let yaml = format!(
        "pipeline: p\nstages:\n  a: {{ kind: exec, with: {{ command: [sh, -c, 'until [ -e {} ]; do sleep 0.02; done; echo hello'] }} }}\n  b: {{ kind: noop, needs: [a] }}\n",
        gate.display()
    );
    let run = runs
        .submit_run(submission(&place, &yaml, "w"))
        .await
        .unwrap()
        .into_inner()
        .run;
    let mut stream = runs
        .watch_run(WatchRunRequest { run: run.clone() })
        .await
        .unwrap()
        .into_inner();
    let mut run_states = Vec::new();
    let mut task_states: HashMap<String, Vec<TaskState>> = HashMap::new();
    let mut snapshots = 0;
    while let Some(event) = stream.message().await.unwrap() {
        match event.event.unwrap() {
            Event::Snapshot(snapshot) => {
                snapshots += 1;
                assert!(run_states.is_empty(), "the snapshot comes first");
                assert_eq!(snapshot.pipeline_yaml, yaml);
                run_states.push(snapshot.summary.unwrap().state());
                for task in snapshot.tasks {
                    task_states
                        .entry(task.task.clone())
                        .or_default()
                        .push(task.state());
                }
                std::fs::write(&gate, "").unwrap();
            }
            Event::Run(run) => run_states.push(run.state()),
            Event::Task(task) => task_states.get_mut(&task.task).unwrap().push(task.state()),
            Event::Progress(_) => {}
        }
    }
    assert_eq!(snapshots, 1);
    assert_eq!(*run_states.last().unwrap(), RunState::Succeeded);
    // Never backwards, and the end exactly once.
    let rank = |s: &RunState| i32::from(*s);
    assert!(
        run_states.windows(2).all(|w| rank(&w[0]) <= rank(&w[1])),
        "{run_states:?}"
    );
    assert_eq!(
        run_states
            .iter()
            .filter(|s| **s == RunState::Succeeded)
            .count(),
        1
    );
    for (name, states) in task_states {
        let ends = states
            .iter()
            .filter(|s| **s == TaskState::Succeeded)
            .count();
        assert_eq!(ends, 1, "{name} was committed {ends} times: {states:?}");
        assert_eq!(*states.last().unwrap(), TaskState::Succeeded, "{name}");
        let ranks: Vec<i32> = states.iter().map(|s| i32::from(*s)).collect();
        assert!(ranks.windows(2).all(|w| w[0] <= w[1]), "{name}: {states:?}");
    }
    // Who comes late gets the end at once, and the log whole.
    let late = follow(&mut runs, &run).await;
    assert!(
        matches!(&late[..], [Event::Snapshot(s)] if s.summary.as_ref().unwrap().state() == RunState::Succeeded),
        "{late:?}"
    );
    let request = StreamLogsRequest {
        run,
        task: "a".into(),
        follow: true,
        ..Default::default()
    };
    let mut log = runs.stream_logs(request).await.unwrap().into_inner();
    let mut entries = Vec::new();
    while let Some(entry) = log.message().await.unwrap() {
        entries.push(entry.entry.unwrap());
    }
    assert!(
        matches!(&entries[..], [Entry::Line(line), Entry::End(end)] if line.text == "hello" && line.source == "stdout" && end.lines == 1 && !end.truncated),
        "{entries:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_run_that_is_started_again_runs_only_what_failed() {
    let place = Place::new();
    let dev = Dev::start(&place);
    let mut runs = dev.runs().await;
    let (journal, flag) = (place.path("journal"), place.path("flag"));
    let yaml = format!(
        "pipeline: p\nstages:\n  a: {{ kind: exec, with: {{ command: [sh, -c, 'echo a >> {0}'] }} }}\n  b: {{ kind: exec, needs: [a], with: {{ command: [sh, -c, 'echo b >> {0}; [ -e {1} ]'] }} }}\n  c: {{ kind: exec, needs: [b], with: {{ command: [sh, -c, 'echo c >> {0}'] }} }}\n",
        journal.display(),
        flag.display()
    );
    let run = runs
        .submit_run(submission(&place, &yaml, "r"))
        .await
        .unwrap()
        .into_inner()
        .run;
    follow(&mut runs, &run).await;
    let failed = runs
        .get_run(GetRunRequest { run: run.clone() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(failed.summary.unwrap().state(), RunState::Failed);
    let cancel = CancelRunRequest {
        run: run.clone(),
        why: String::new(),
    };
    let status = runs.cancel_run(cancel).await.unwrap_err();
    refused(&status, Code::FailedPrecondition, "WRONG_STATE", "failed");
    std::fs::write(&flag, "").unwrap();
    runs.retry_run(RetryRunRequest { run: run.clone() })
        .await
        .unwrap();
    follow(&mut runs, &run).await;
    let done = runs
        .get_run(GetRunRequest { run: run.clone() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(done.summary.unwrap().state(), RunState::Succeeded);
    assert_eq!(std::fs::read_to_string(&journal).unwrap(), "a\nb\nb\nc\n");
    let attempts: Vec<u32> = done.tasks.iter().map(|t| t.attempt).collect();
    assert_eq!(attempts, [1, 2, 1]);
    let status = runs.retry_run(RetryRunRequest { run }).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_stays_cancelled_and_says_why() {
    let place = Place::new();
    let dev = Dev::start(&place);
    let mut runs = dev.runs().await;
    let yaml = "pipeline: p\nstages: { a: { kind: exec, with: { command: [sleep, '1000'] } } }\n";
    let run = runs
        .submit_run(submission(&place, yaml, "c"))
        .await
        .unwrap()
        .into_inner()
        .run;
    for why in ["first reason", "second reason"] {
        let request = CancelRunRequest {
            run: run.clone(),
            why: why.to_owned(),
        };
        runs.cancel_run(request).await.unwrap();
    }
    let events = follow(&mut runs, &run).await;
    let last = match events.last().unwrap() {
        Event::Run(run) => run.clone(),
        Event::Snapshot(snapshot) => snapshot.summary.clone().unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(last.state(), RunState::Cancelled);
    assert_eq!(last.failure.unwrap().message, "first reason");
    let request = CancelRunRequest {
        run,
        why: "late".to_owned(),
    };
    let again = runs.cancel_run(request).await.unwrap().into_inner();
    assert_eq!(again.summary.unwrap().state(), RunState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_runs_are_without_gaps_newest_first() {
    let place = Place::new();
    let dev = Dev::start(&place);
    let mut runs = dev.runs().await;
    let mut made = Vec::new();
    for n in 0..7 {
        let name = if n % 2 == 0 { "even" } else { "odd" };
        let yaml = format!("pipeline: {name}\nstages: {{ a: {{ kind: noop }} }}\n");
        let run = runs
            .submit_run(submission(&place, &yaml, &format!("p{n}")))
            .await
            .unwrap()
            .into_inner()
            .run;
        follow(&mut runs, &run).await;
        made.insert(0, run);
    }
    let mut pages = Vec::new();
    let (mut found, mut token) = (Vec::new(), String::new());
    loop {
        let request = ListRunsRequest {
            page_size: 3,
            page_token: token,
            ..Default::default()
        };
        let page = runs.list_runs(request).await.unwrap().into_inner();
        pages.push(page.runs.len());
        found.extend(page.runs.into_iter().map(|r| r.run));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(found, made);
    assert_eq!(pages, [3, 3, 1]);
    let request = ListRunsRequest {
        pipeline: "odd".into(),
        ..Default::default()
    };
    assert_eq!(
        runs.list_runs(request)
            .await
            .unwrap()
            .into_inner()
            .runs
            .len(),
        3
    );
    let request = ListRunsRequest {
        states: vec![RunState::Failed.into()],
        ..Default::default()
    };
    assert!(
        runs.list_runs(request)
            .await
            .unwrap()
            .into_inner()
            .runs
            .is_empty()
    );
    let request = ListRunsRequest {
        page_token: "../..".into(),
        ..Default::default()
    };
    let status = runs.list_runs(request).await.unwrap_err();
    refused(
        &status,
        Code::InvalidArgument,
        "INVALID_FIELD",
        "page_token",
    );
}
