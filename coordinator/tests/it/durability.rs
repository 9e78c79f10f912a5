//! Decide, persist, act: nothing is told to anyone that a restart would not find.

use std::time::Duration;

use emberline_coordinator::{CoordinatorError, store::StoreError};
use emberline_proto::v1::{ListRunsRequest, RunState, TaskState};
use tonic::Code;

use crate::harness::*;

/// For what must not happen: long enough that it would have, were it not for the gate.
const A_MOMENT: Duration = Duration::from_millis(150);

#[tokio::test]
async fn nothing_is_told_before_its_commit() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    cluster.store.close();
    let before = cluster.store.arrived();
    let mut runs = cluster.runs().await;
    let mut submit = tokio::spawn(async move { runs.submit_run(submission(ONE)).await });
    cluster.store.arrives(before + 1).await;
    let mut runs = cluster.runs().await;
    let mut list = tokio::spawn(async move { runs.list_runs(ListRunsRequest::default()).await });

    tokio::select! {
        answer = &mut submit => panic!("answered before the commit: {answer:?}"),
        answer = &mut list => panic!("shown before the commit: {answer:?}"),
        heard = worker.next() => panic!("assigned before the commit: {heard:?}"),
        () = tokio::time::sleep(A_MOMENT) => {}
    }
    cluster.store.open();
    let run = soon("the answer", submit).await.unwrap().unwrap();
    assert_eq!(worker.assignments().await.len(), 1);
    let listed = soon("the list", list).await.unwrap().unwrap().into_inner();
    assert_eq!(listed.runs[0].run, run.into_inner().run);
}

#[tokio::test]
async fn after_a_failed_commit_nothing_was_told_and_it_leads_no_more() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    cluster.store.fail();
    let refused = cluster.runs().await.submit_run(submission(ONE)).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
    let end = match worker.next().await {
        Ok(heard) => panic!("told after the failed commit: {heard:?}"),
        Err(end) => end,
    };
    assert_eq!(end.code(), Code::Unavailable, "{end:?}");
    let stopped = soon("the end", cluster.coordinator.stopped()).await;
    assert!(matches!(
        stopped,
        Err(CoordinatorError::Store(StoreError::Deposed { .. }))
    ));
    drop(worker);
    let (dir, ended) = cluster.stop().await;
    assert!(ended.is_err(), "the failure is not forgotten");
    let cluster = Cluster::on(dir, Default::default()).await;
    let listed = cluster
        .runs()
        .await
        .list_runs(ListRunsRequest::default())
        .await;
    assert!(listed.unwrap().into_inner().runs.is_empty());
}

#[tokio::test]
async fn decisions_made_during_a_commit_are_committed_together() {
    let cluster = Cluster::start().await;
    cluster.store.close();
    let before = cluster.store.arrived();
    let mut submits = Vec::new();
    for _ in 0..20 {
        let mut runs = cluster.runs().await;
        submits.push(tokio::spawn(async move {
            runs.submit_run(submission(ONE)).await
        }));
    }
    cluster.store.arrives(before + 1).await;
    // All are decided once the engine has answered for each; the reads wait behind them.
    soon("the decisions", async {
        while cluster.coordinator.counts().commands < 20 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    cluster.store.open();
    for submit in submits {
        soon("the answer", submit).await.unwrap().unwrap();
    }
    assert_eq!(
        cluster.store.arrived(),
        before + 2,
        "one under way, one for all the rest"
    );
}

#[tokio::test]
async fn a_restart_repeats_nothing_that_is_finished() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    let run = cluster.submit(TWO).await;
    let first = worker.assignments().await.remove(0).id.unwrap();
    assert_eq!(first.task, "a");
    worker.report(vec![success(first)]).await;
    soon("the success of a", async {
        while cluster.get(&run).await.tasks[0].state() != TaskState::Succeeded {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(worker);
    let cluster = cluster.restart().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    let second = worker.assignments().await;
    assert_eq!(second.len(), 1);
    let second = second[0].id.clone().unwrap();
    assert_eq!(
        (second.run.as_str(), second.task.as_str()),
        (run.as_str(), "b")
    );
    worker.report(vec![success(second)]).await;
    assert_eq!(cluster.ends(&run).await, RunState::Succeeded);
    let tasks = cluster.get(&run).await.tasks;
    assert_eq!(tasks[0].attempt, 1, "a was not run again");
}

#[tokio::test]
async fn an_attempt_that_goes_on_over_a_restart_is_adopted_and_its_report_taken() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    let run = cluster.submit(ONE).await;
    let id = worker.assignments().await.remove(0).id.unwrap();
    drop(worker);
    let cluster = cluster.restart().await;
    // It finished while no leader listened.
    let mut again = register("w", 0);
    again.unacknowledged = vec![success(id)];
    let _worker = FakeWorker::connect(&cluster, again).await;
    assert_eq!(cluster.ends(&run).await, RunState::Succeeded);
    assert_eq!(cluster.get(&run).await.tasks[0].attempt, 1);
}

#[tokio::test]
async fn a_repeated_submit_is_the_same_run_also_after_its_end_and_a_restart() {
    let cluster = Cluster::start().await;
    let mut request = submission(ONE);
    request.request_id = "again".to_owned();
    let submit = async |cluster: &Cluster| {
        let answer = cluster.runs().await.submit_run(request.clone()).await;
        answer.unwrap().into_inner()
    };
    let first = submit(&cluster).await;
    assert!(!first.already_existed);
    let second = submit(&cluster).await;
    assert_eq!(
        (second.run.as_str(), second.already_existed),
        (first.run.as_str(), true)
    );
    let work = FakeWorker::ready(&cluster, "w", 1).await.work();
    cluster.ends(&first.run).await;
    work.abort();
    let cluster = cluster.restart().await;
    let third = submit(&cluster).await;
    assert_eq!(
        (third.run.as_str(), third.already_existed),
        (first.run.as_str(), true)
    );
}

#[tokio::test]
async fn an_ended_run_is_archived_even_if_the_process_ended_before_it_was() {
    let cluster = Cluster::start().await;
    let worker = FakeWorker::ready(&cluster, "w", 1).await.work();
    let run = cluster.submit(ONE).await;
    assert_eq!(cluster.ends(&run).await, RunState::Succeeded);
    worker.abort();
    let cluster = cluster.restart().await;
    assert_eq!(
        cluster.get(&run).await.summary.unwrap().state(),
        RunState::Succeeded
    );
    soon("the archive", async {
        while cluster
            .cluster()
            .await
            .get_cluster_status(emberline_proto::v1::GetClusterStatusRequest {})
            .await
            .unwrap()
            .into_inner()
            .live_runs
            > 0
        {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let found = cluster.get(&run).await;
    assert_eq!(found.tasks.len(), 1);
    assert_eq!(found.pipeline_yaml, ONE);
}
