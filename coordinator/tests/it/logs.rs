//! Logs and metrics, as chunks that the worker seals while it works.

use bytes::Bytes;
use emberline_common::{
    attempt_log::{ChunkEncoder, LogEntry, LogRecord, LogSource, LogStream, chunk_key},
    ids::AttemptId,
    time::Timestamp,
};
use emberline_proto::v1::{
    self, AttemptUpdate, AttemptUpdates, StreamLogsRequest, StreamLogsResponse,
    stream_logs_response::Entry, worker_message::Message as FromWorker,
};
use object_store::ObjectStoreExt as _;
use tonic::{Code, Streaming};

use crate::harness::*;

async fn seal(cluster: &Cluster, id: &v1::AttemptId, chunk: Option<(u64, Bytes)>) {
    let (sequence, bytes) = chunk.unwrap();
    let id = AttemptId::try_from(id.clone()).unwrap();
    let key = chunk_key(LogStream::Log, &id, sequence);
    cluster
        .artifacts
        .raw()
        .put(&key, bytes.into())
        .await
        .unwrap();
}

fn line(text: &str) -> LogEntry {
    LogEntry::Line(LogRecord {
        at: Timestamp(1),
        source: LogSource::Stage,
        text: text.to_owned(),
    })
}

async fn open(cluster: &Cluster, request: StreamLogsRequest) -> Streaming<StreamLogsResponse> {
    let lines = cluster.runs().await.stream_logs(request).await;
    lines.unwrap().into_inner()
}

async fn next(lines: &mut Streaming<StreamLogsResponse>) -> Option<Entry> {
    let next = soon("the next line", lines.message()).await.unwrap();
    next.map(|l| l.entry.unwrap())
}

fn text(entry: Option<Entry>) -> String {
    match entry {
        Some(Entry::Line(line)) => line.text,
        other => panic!("a line was expected, not {other:?}"),
    }
}

#[tokio::test]
async fn a_followed_log_comes_as_it_is_sealed_and_ends_with_the_attempt() {
    let cluster = Cluster::start().await;
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    let run = cluster.submit(ONE).await;
    let id = worker.assignments().await.remove(0).id.unwrap();
    let follow = StreamLogsRequest {
        run: run.clone(),
        follow: true,
        ..Default::default()
    };
    let mut lines = open(&cluster, follow).await;
    let mut encoder = ChunkEncoder::new();
    encoder.push(&line("one"));
    seal(&cluster, &id, encoder.seal()).await;
    let update = AttemptUpdate {
        id: Some(id.clone()),
        log_chunks: 1,
        ..Default::default()
    };
    let updates = AttemptUpdates {
        updates: vec![update],
    };
    worker
        .say
        .send(message(FromWorker::Updates(updates)))
        .await
        .unwrap();
    assert_eq!(text(next(&mut lines).await), "one");
    encoder.push(&line("two"));
    seal(&cluster, &id, encoder.finish(0)).await;
    worker.report(vec![success(id)]).await;
    assert_eq!(text(next(&mut lines).await), "two");
    let end = v1::LogEnd {
        lines: 2,
        truncated: false,
    };
    assert_eq!(next(&mut lines).await, Some(Entry::End(end)));
    assert_eq!(next(&mut lines).await, None);

    // The log survives the worker, the run and the process.
    cluster.ends(&run).await;
    drop(worker);
    let cluster = cluster.restart().await;
    let again = StreamLogsRequest {
        run,
        ..Default::default()
    };
    let mut lines = open(&cluster, again).await;
    assert_eq!(text(next(&mut lines).await), "one");
    assert_eq!(text(next(&mut lines).await), "two");
    assert_eq!(next(&mut lines).await, Some(Entry::End(end)));
    assert_eq!(next(&mut lines).await, None);
}

#[tokio::test]
async fn the_log_of_a_lost_attempt_ends_as_truncated_and_the_next_one_follows() {
    let cluster = Cluster::start().await;
    let mut lost = FakeWorker::ready(&cluster, "lost", 1).await;
    let run = cluster.submit(ONE).await;
    let first = lost.assignments().await.remove(0).id.unwrap();
    let mut encoder = ChunkEncoder::new();
    encoder.push(&line("before the fall"));
    seal(&cluster, &first, encoder.seal()).await;
    let follow = StreamLogsRequest {
        run: run.clone(),
        follow: true,
        ..Default::default()
    };
    let mut lines = open(&cluster, follow).await;
    assert_eq!(text(next(&mut lines).await), "before the fall");
    drop(lost);
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    let second = worker.assignments().await.remove(0).id.unwrap();
    let end = v1::LogEnd {
        lines: 1,
        truncated: true,
    };
    assert_eq!(next(&mut lines).await, Some(Entry::End(end)));
    let mut encoder = ChunkEncoder::new();
    encoder.push(&line("again"));
    seal(&cluster, &second, encoder.finish(0)).await;
    worker.report(vec![success(second)]).await;
    assert_eq!(text(next(&mut lines).await), "again");
    let end = v1::LogEnd {
        lines: 1,
        truncated: false,
    };
    assert_eq!(next(&mut lines).await, Some(Entry::End(end)));
    assert_eq!(next(&mut lines).await, None);
    let old = StreamLogsRequest {
        run,
        task: "a".into(),
        attempt: 1,
        ..Default::default()
    };
    let mut lines = open(&cluster, old).await;
    assert_eq!(text(next(&mut lines).await), "before the fall");
}

#[tokio::test]
async fn logs_of_what_does_not_exist_are_refused() {
    let cluster = Cluster::start().await;
    let run = cluster.submit(ONE).await;
    let refused = async |request: StreamLogsRequest| {
        cluster
            .runs()
            .await
            .stream_logs(request)
            .await
            .unwrap_err()
            .code()
    };
    let task = StreamLogsRequest {
        run: run.clone(),
        task: "zzz".into(),
        ..Default::default()
    };
    assert_eq!(refused(task).await, Code::NotFound);
    let attempt = StreamLogsRequest {
        run: run.clone(),
        task: "a".into(),
        attempt: 9,
        ..Default::default()
    };
    assert_eq!(refused(attempt).await, Code::NotFound);
    let climbing = StreamLogsRequest {
        run,
        task: "../a".into(),
        ..Default::default()
    };
    assert_eq!(refused(climbing).await, Code::InvalidArgument);
}
