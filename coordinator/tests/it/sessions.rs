//! Sessions: registration, credits, silence, replacement.

use emberline_proto::v1::{
    self, AttemptUpdate, AttemptUpdates, GetClusterStatusRequest, WatchRunRequest, WorkerState,
    leader_message::Message as FromLeader, watch_run_response::Event,
    worker_message::Message as FromWorker,
};
use tonic::Code;

use crate::harness::*;

async fn workers(cluster: &Cluster) -> Vec<v1::WorkerView> {
    let mut client = cluster.cluster().await;
    let status = client.get_cluster_status(GetClusterStatusRequest {}).await;
    status.unwrap().into_inner().workers
}

#[tokio::test]
async fn a_session_begins_with_a_registration() {
    let cluster = Cluster::start().await;
    let (say, said) = tokio::sync::mpsc::channel(4);
    let credits = v1::GrantCredits { credits: 1 };
    say.send(message(FromWorker::GrantCredits(credits)))
        .await
        .unwrap();
    let mut client = v1::worker_service_client::WorkerServiceClient::new(cluster.channel().await);
    let stream = tokio_stream::wrappers::ReceiverStream::new(said);
    let mut hear = client.session(stream).await.unwrap().into_inner();
    let end = soon("the refusal", hear.message()).await.unwrap_err();
    assert_eq!(end.code(), Code::InvalidArgument, "{end:?}");
}

#[tokio::test]
async fn a_worker_of_another_protocol_is_told_so() {
    let cluster = Cluster::start().await;
    let mut other = register("w", 1);
    other.protocol_version = 999;
    let mut worker = FakeWorker::connect(&cluster, other).await;
    let end = worker.next().await.unwrap_err();
    assert_eq!(end.code(), Code::FailedPrecondition, "{end:?}");
    assert!(end.message().contains("999"), "{end:?}");
}

#[tokio::test]
async fn a_worker_with_a_name_that_could_climb_is_refused() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::connect(&cluster, register("../w", 1)).await;
    let end = worker.next().await.unwrap_err();
    assert_eq!(end.code(), Code::InvalidArgument, "{end:?}");
    assert!(workers(&cluster).await.is_empty());
}

#[tokio::test]
async fn a_worker_with_labels_without_measure_is_refused() {
    let cluster = Cluster::start().await;
    let many = (0..100_000).map(|n| (n.to_string(), String::new()));
    for (labels, part) in [
        (
            [("zone".to_owned(), "x".repeat(1 << 20))].into(),
            "1048576 bytes",
        ),
        (
            [("x".repeat(1 << 20), String::new())].into(),
            "1048576 bytes",
        ),
        (
            [("zone".to_owned(), "a\n\u{1b}[31mb".to_owned())].into(),
            "control characters",
        ),
        (many.collect(), "100000 labels"),
    ] {
        let mut hello = register("w", 1);
        hello.labels = labels;
        let mut worker = FakeWorker::connect(&cluster, hello).await;
        let end = worker.next().await.unwrap_err();
        assert_eq!(end.code(), Code::InvalidArgument, "{part}");
        assert!(end.message().contains(part), "{end:?}");
        assert!(end.message().len() < 200, "{} bytes", end.message().len());
    }
    assert!(workers(&cluster).await.is_empty());
}

#[tokio::test]
async fn no_more_is_assigned_than_was_granted() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 3).await;
    cluster.submit(&many(10)).await;
    let mut got = 0;
    while got < 3 {
        got += worker.assignments().await.len();
    }
    assert_eq!(got, 3);
    worker.grant(2).await;
    while got < 5 {
        got += worker.assignments().await.len();
    }
    assert_eq!(got, 5);
    let running = workers(&cluster).await[0].running;
    assert_eq!(running, 5);
}

#[tokio::test]
async fn a_silent_worker_is_lost_and_its_work_goes_to_another() {
    let cluster = Cluster::start().await;
    let mut silent = FakeWorker::ready(&cluster, "silent", 1).await;
    let run = cluster.submit(ONE).await;
    let first = silent.assignments().await.remove(0).id.unwrap();
    silent.fall_silent();
    let mut other = FakeWorker::ready(&cluster, "other", 1).await;
    let second = other.assignments().await.remove(0).id.unwrap();
    assert_eq!((&second.run, &second.task), (&first.run, &first.task));
    assert!(second.attempt > first.attempt);
    other.report(vec![success(second)]).await;
    cluster.ends(&run).await;
    let end = loop {
        if let Err(end) = silent.next().await {
            break end;
        }
    };
    assert_eq!(end.code(), Code::DeadlineExceeded, "{end:?}");
}

#[tokio::test]
async fn a_late_report_is_acknowledged_as_refused() {
    let cluster = Cluster::start().await;
    let mut first = FakeWorker::ready(&cluster, "first", 1).await;
    let run = cluster.submit(ONE).await;
    let old = first.assignments().await.remove(0).id.unwrap();
    drop(first);
    let mut second = FakeWorker::ready(&cluster, "second", 1).await;
    let new = second.assignments().await.remove(0).id.unwrap();
    second
        .report(vec![success(old.clone()), success(new.clone())])
        .await;
    let mut acks = Vec::new();
    while acks.len() < 2 {
        if let FromLeader::Acks(some) = second.next().await.unwrap() {
            acks.extend(some.acks);
        }
    }
    let committed = |id: &v1::AttemptId| {
        let ack = acks.iter().find(|a| a.id.as_ref() == Some(id));
        ack.unwrap().committed
    };
    assert!(!committed(&old));
    assert!(committed(&new));
    cluster.ends(&run).await;
}

#[tokio::test]
async fn a_worker_that_leaves_is_suspect_at_once() {
    let cluster = Cluster::with(emberline_coordinator::engine::api::EngineConfig {
        closed_grace: std::time::Duration::from_secs(60),
        ..Default::default()
    })
    .await;
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    cluster.submit(ONE).await;
    worker.assignments().await;
    drop(worker);
    soon("the suspicion", async {
        loop {
            let workers = workers(&cluster).await;
            if workers.first().map(v1::WorkerView::state) == Some(WorkerState::Suspect) {
                return;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn progress_reaches_those_who_watch() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    let run = cluster.submit(ONE).await;
    let id = worker.assignments().await.remove(0).id.unwrap();
    let request = WatchRunRequest { run };
    let mut events = cluster
        .runs()
        .await
        .watch_run(request)
        .await
        .unwrap()
        .into_inner();
    let first = soon("the snapshot", events.message())
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(first.event, Some(Event::Snapshot(_))));
    let update = AttemptUpdate {
        id: Some(id.clone()),
        fraction: 0.5,
        message: "epoch 1/2".to_owned(),
        ..Default::default()
    };
    let updates = vec![update];
    worker
        .say
        .send(message(FromWorker::Updates(AttemptUpdates { updates })))
        .await
        .unwrap();
    let progress = soon("the progress", async {
        loop {
            let event = events.message().await.unwrap().unwrap().event;
            if let Some(Event::Progress(progress)) = event {
                return progress;
            }
        }
    })
    .await;
    assert_eq!(progress.message, "epoch 1/2");
    worker.report(vec![success(id)]).await;
    // The stream ends with the run.
    let mut last = None;
    while let Some(event) = soon("the end", events.message()).await.unwrap() {
        last = event.event;
    }
    assert!(matches!(last, Some(Event::Run(run)) if run.state() == v1::RunState::Succeeded));
}

#[tokio::test]
async fn a_worker_that_is_to_drain_is_told_and_gets_nothing_more() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 4).await;
    let run = cluster.submit(TWO).await;
    let first = worker.assignments().await.remove(0).id.unwrap();
    let drain = |worker: &str| v1::DrainWorkerRequest {
        worker: worker.to_owned(),
    };
    let mut client = cluster.cluster().await;
    let nobody = client.drain_worker(drain("x")).await.unwrap_err();
    assert_eq!(nobody.code(), tonic::Code::NotFound);
    let told = client.drain_worker(drain("w")).await.unwrap().into_inner();
    assert_eq!(told.running, 1);
    while !matches!(worker.next().await.unwrap(), FromLeader::Drain(_)) {}
    let seen = workers(&cluster).await;
    assert_eq!(seen[0].state(), WorkerState::Draining);
    // What runs still counts; what follows goes to another one.
    worker.report(vec![success(first)]).await;
    let mut other = FakeWorker::ready(&cluster, "other", 1).await;
    let next = other.assignments().await.remove(0).id.unwrap();
    assert_eq!(next.task, "b");
    other.report(vec![success(next)]).await;
    assert_eq!(cluster.ends(&run).await, v1::RunState::Succeeded);
}
