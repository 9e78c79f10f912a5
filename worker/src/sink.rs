//! Where an attempt's log, metrics and progress go: sealed chunks in the object store, as they
//! happen.
//!
//! The stage's thread only puts a record into a bounded queue; a task of its own seals and stores
//! chunks. If the store does not keep up, the stage waits a moment, then records are dropped and
//! counted. An attempt that says nothing costs nothing: no task, no object.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use emberline_common::{
    artifact::{ArtifactStore, explain},
    attempt_log::{ChunkEncoder, LogEntry, LogRecord, LogStream, MetricRecord, chunk_key},
    ids::AttemptId,
    telemetry::{current, within},
    time::Timestamp,
    trace::TraceContext,
};
use object_store::{ObjectStoreExt, PutPayload};
use tokio::{runtime::Handle, sync::Notify, task::JoinHandle};
use tracing::Instrument as _;

use crate::{
    board::Board,
    secrets::Redactor,
    stage::{AttemptSink, LogSource},
};

/// A chunk is sealed when it has this many bytes…
const CHUNK_BYTES: usize = 64 << 10;
/// … or when its first record is this old.
const CHUNK_AGE: Duration = Duration::from_millis(500);
/// The most that waits to be sealed.
const QUEUE_BYTES: usize = 4 << 20;
/// The longest that a stage waits for room in the queue.
const WAIT: Duration = Duration::from_millis(200);
/// The longest line; the rest of it is cut.
const LINE_BYTES: usize = 16 << 10;
/// The longest name of a series, and the longest message of progress.
const NAME_BYTES: usize = 200;
/// What attempts say, in the process's log.
const SAID: &str = "emberline_worker::attempt";
/// Tries to store a chunk, each of which the store itself repeats.
const TRIES: u32 = 4;
/// The longest wait for the last chunks when an attempt ends.
const FINISH: Duration = Duration::from_secs(30);

/// See the module.
pub(crate) struct LogSink {
    id: AttemptId,
    store: ArtifactStore,
    runtime: Handle,
    board: Arc<Board>,
    queue: Arc<Queue>,
    redactor: Redactor,
    /// Of `tracing`, and of the trace: what the attempt does is part of them.
    span: tracing::Span,
    context: Option<TraceContext>,
}

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    room: Condvar,
    wake: Notify,
}

#[derive(Default)]
struct State {
    entries: Vec<LogEntry>,
    bytes: usize,
    dropped_lines: u64,
    dropped_points: u64,
    /// No more records: seal the rest.
    closed: bool,
    writer: Option<JoinHandle<()>>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogSink {
    /// For the attempt that the present task works for.
    pub fn new(
        id: AttemptId,
        store: ArtifactStore,
        runtime: Handle,
        board: Arc<Board>,
        redactor: Redactor,
    ) -> Self {
        Self {
            redactor,
            id,
            store,
            runtime,
            board,
            queue: Arc::default(),
            span: tracing::Span::current(),
            context: current(),
        }
    }

    fn push(&self, entry: LogEntry, bytes: usize) {
        let mut state = self.queue.lock();
        if state.bytes + bytes > QUEUE_BYTES && !state.closed {
            let waited = self.queue.room.wait_timeout_while(state, WAIT, |state| {
                state.bytes + bytes > QUEUE_BYTES && !state.closed
            });
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.closed || state.bytes + bytes > QUEUE_BYTES {
            match entry {
                LogEntry::Line(_) => state.dropped_lines += 1,
                LogEntry::Point(_) => state.dropped_points += 1,
            }
            return;
        }
        let wake = state.entries.is_empty() || state.bytes + bytes >= CHUNK_BYTES;
        state.bytes += bytes;
        state.entries.push(entry);
        if state.writer.is_none() {
            let writer = Writer {
                id: self.id.clone(),
                store: self.store.clone(),
                board: self.board.clone(),
                queue: self.queue.clone(),
                log: Stream::new(LogStream::Log),
                metrics: Stream::new(LogStream::Metrics),
            };
            // As part of the attempt that it is of, wherever the first record came from.
            let run = within(self.context, writer.run()).instrument(self.span.clone());
            state.writer = Some(self.runtime.spawn(run));
        }
        drop(state);
        if wake {
            self.queue.wake.notify_one();
        }
    }

    /// A line of the attempt's own log, and of no other.
    pub fn keep(&self, source: LogSource, line: &str) {
        let text = cut(&self.redactor.text(line), LINE_BYTES);
        let bytes = text.len() + 64;
        let at = Timestamp::now();
        self.push(LogEntry::Line(LogRecord { at, source, text }), bytes);
    }

    /// Seals what is left, with the end record. Nothing is taken after this.
    pub async fn finish(&self) {
        let writer = {
            let mut state = self.queue.lock();
            state.closed = true;
            state.writer.take()
        };
        self.queue.wake.notify_one();
        if let Some(mut writer) = writer
            && tokio::time::timeout(FINISH, &mut writer).await.is_err()
        {
            writer.abort();
            tracing::warn!(attempt = %self.id, "the end of the log could not be stored in time");
        }
    }
}

impl AttemptSink for LogSink {
    fn log(&self, source: LogSource, line: &str) {
        let line = self.redactor.text(line.trim_end_matches(['\r', '\n']));
        let line: &str = &line;
        // The process's own log has what a stage says, too. What a command prints may be much, and is
        // there only for whoever asks for the finest level.
        match source {
            LogSource::Stage => {
                tracing::info!(target: SAID, parent: &self.span, "{}", Short(line));
            }
            LogSource::Stdout | LogSource::Stderr => {
                tracing::trace!(target: SAID, parent: &self.span, ?source, "{}", Short(line));
            }
        }
        self.keep(source, line);
    }

    fn metric(&self, name: &str, step: u64, value: f64) {
        if !value.is_finite() {
            self.queue.lock().dropped_points += 1;
            self.log(
                LogSource::Stage,
                &format!("metric {name} at step {step} is {value} and is not kept"),
            );
            return;
        }
        let record = MetricRecord {
            at: Timestamp::now(),
            name: cut(&self.redactor.text(name), NAME_BYTES),
            step,
            value,
        };
        self.push(LogEntry::Point(record), name.len() + 96);
    }

    fn progress(&self, fraction: f64, message: &str) {
        let fraction = if fraction.is_finite() && fraction >= 0.0 {
            fraction.min(1.0)
        } else {
            -1.0
        };
        let message = cut(&self.redactor.text(message), NAME_BYTES);
        self.board.update(&self.id, |update| {
            update.fraction = fraction;
            update.message = message;
        });
    }
}

/// A line as it goes into the process's log.
struct Short<'a>(&'a str);

impl std::fmt::Display for Short<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&cut(self.0, LINE_BYTES))
    }
}

/// At most that many bytes, cut at a character's edge and told so.
fn cut(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    let mut end = limit;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}… ({} more bytes)", &text[..end], text.len() - end)
}

struct Writer {
    id: AttemptId,
    store: ArtifactStore,
    board: Arc<Board>,
    queue: Arc<Queue>,
    log: Stream,
    metrics: Stream,
}

/// One of the two streams.
struct Stream {
    stream: LogStream,
    encoder: ChunkEncoder,
    /// When the first record came that is not sealed.
    since: Option<Instant>,
    /// A chunk could not be stored: there is no going on, and no end.
    broken: bool,
}

impl Stream {
    fn new(stream: LogStream) -> Self {
        Self {
            stream,
            encoder: ChunkEncoder::new(),
            since: None,
            broken: false,
        }
    }

    /// Whether what is there is to be sealed now; if not, how long that may wait.
    fn due(&self) -> Option<Duration> {
        let since = self.since?;
        if self.encoder.pending_bytes() >= CHUNK_BYTES {
            return Some(Duration::ZERO);
        }
        Some(CHUNK_AGE.saturating_sub(since.elapsed()))
    }
}

impl Writer {
    async fn run(mut self) {
        loop {
            let (entries, closed, dropped_lines, dropped_points) = {
                let mut state = self.queue.lock();
                state.bytes = 0;
                (
                    std::mem::take(&mut state.entries),
                    state.closed,
                    state.dropped_lines,
                    state.dropped_points,
                )
            };
            self.queue.room.notify_all();
            for entry in entries {
                let stream = match entry {
                    LogEntry::Line(_) => &mut self.log,
                    LogEntry::Point(_) => &mut self.metrics,
                };
                stream.encoder.push(&entry);
                stream.since.get_or_insert_with(Instant::now);
                if stream.encoder.pending_bytes() >= CHUNK_BYTES {
                    seal(&self.store, &self.board, &self.id, stream).await;
                }
            }
            if closed {
                futures::join!(
                    end(&self.store, &self.id, self.log, dropped_lines),
                    end(&self.store, &self.id, self.metrics, dropped_points),
                );
                return;
            }
            for stream in [&mut self.log, &mut self.metrics] {
                if stream.due() == Some(Duration::ZERO) {
                    seal(&self.store, &self.board, &self.id, stream).await;
                }
            }
            let next = [self.log.due(), self.metrics.due()]
                .into_iter()
                .flatten()
                .min();
            let woken = self.queue.wake.notified();
            match next {
                None => woken.await,
                // Woken or not: the loop looks again.
                Some(wait) => drop(tokio::time::timeout(wait, woken).await),
            }
        }
    }
}

async fn seal(store: &ArtifactStore, board: &Board, id: &AttemptId, stream: &mut Stream) {
    stream.since = None;
    let Some(chunk) = stream.encoder.seal() else {
        return;
    };
    if stream.broken || !put(store, id, stream.stream, chunk).await {
        stream.broken = true;
        return;
    }
    let sealed = stream.encoder.sealed();
    let which = stream.stream;
    board.update(id, |update| match which {
        LogStream::Log => update.log_chunks = sealed,
        LogStream::Metrics => update.metric_chunks = sealed,
    });
}

async fn end(store: &ArtifactStore, id: &AttemptId, stream: Stream, dropped: u64) {
    if let Some(chunk) = stream.encoder.finish(dropped)
        && !stream.broken
    {
        put(store, id, stream.stream, chunk).await;
    }
}

async fn put(
    store: &ArtifactStore,
    id: &AttemptId,
    stream: LogStream,
    (sequence, bytes): (u64, Bytes),
) -> bool {
    let key = chunk_key(stream, id, sequence);
    let mut wait = Duration::from_millis(200);
    for left in (0..TRIES).rev() {
        let payload = PutPayload::from_bytes(bytes.clone());
        let Err(error) = store.logs().put(&key, payload).await else {
            return true;
        };
        let error = explain(&error);
        tracing::warn!(attempt = %id, %key, %error, left, "a chunk of the log could not be stored");
        if left > 0 {
            tokio::time::sleep(wait).await;
            wait *= 2;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use emberline_common::attempt_log::AttemptLogReader;
    use futures::StreamExt;

    use super::*;

    fn attempt() -> AttemptId {
        AttemptId {
            run: "r".parse().unwrap(),
            task: "t".parse().unwrap(),
            attempt: 1,
        }
    }

    fn sink(store: &ArtifactStore) -> LogSink {
        let redactor = Redactor::default();
        LogSink::new(
            attempt(),
            store.clone(),
            Handle::current(),
            Arc::default(),
            redactor,
        )
    }

    async fn read(store: &ArtifactStore, stream: LogStream) -> (Vec<LogEntry>, AttemptLogReader) {
        let mut reader = AttemptLogReader::new(store.clone(), stream, attempt());
        let mut entries = Vec::new();
        while let Some(chunk) = reader.next_chunk().await.unwrap() {
            entries.extend(chunk.entries);
        }
        (entries, reader)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn every_line_is_there_in_order_and_the_log_is_sealed() {
        let store = ArtifactStore::open("memory:").unwrap();
        let sink = Arc::new(sink(&store));
        let writing = sink.clone();
        tokio::task::spawn_blocking(move || {
            for i in 0..20_000 {
                writing.log(LogSource::Stage, &format!("line {i}\n"));
            }
            writing.metric("loss", 1, 0.5);
            writing.metric("loss", 2, f64::NAN);
        })
        .await
        .unwrap();
        sink.finish().await;
        let (lines, reader) = read(&store, LogStream::Log).await;
        assert_eq!(lines.len(), 20_001, "and one about the NaN");
        for (i, entry) in lines.iter().take(20_000).enumerate() {
            let LogEntry::Line(record) = entry else {
                unreachable!("only lines are in a log")
            };
            assert_eq!(record.text, format!("line {i}"));
        }
        assert_eq!(reader.end().unwrap().dropped, 0);
        let (points, reader) = read(&store, LogStream::Metrics).await;
        assert_eq!(points.len(), 1);
        assert_eq!(reader.end().unwrap().dropped, 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn lines_can_be_read_while_the_attempt_goes_on() {
        let store = ArtifactStore::open("memory:").unwrap();
        let sink = sink(&store);
        let _stop = sink.board.begin(&attempt()).unwrap();
        sink.log(LogSource::Stdout, "now");
        let mut reader = AttemptLogReader::new(store.clone(), LogStream::Log, attempt());
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(chunk) = reader.next_chunk().await.unwrap() {
                assert_eq!(chunk.entries.len(), 1);
                assert_eq!(chunk.end, None);
                break;
            }
            assert!(Instant::now() < deadline, "no chunk came");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        sink.finish().await;
        let update = sink.board.take_updates().pop().unwrap();
        assert_eq!(update.log_chunks, 1, "of those before the end");
    }

    #[tokio::test]
    async fn an_attempt_that_says_nothing_leaves_nothing() {
        let store = ArtifactStore::open("memory:").unwrap();
        sink(&store).finish().await;
        assert_eq!(store.raw().list(None).count().await, 0);
    }

    #[test]
    fn a_long_line_is_cut_and_told_so() {
        let line = cut(&"ä".repeat(LINE_BYTES), LINE_BYTES);
        assert!(line.len() < LINE_BYTES + 40);
        assert!(
            line.ends_with(&format!("({LINE_BYTES} more bytes)")),
            "{line}"
        );
    }
}
