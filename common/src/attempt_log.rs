//! The log and the metrics of an attempt, as chunks in the object store.
//!
//! A chunk is a run of JSON lines, one record each, and is never changed once it is there. Chunks
//! are numbered from 0 without a gap, so a reader lists nothing: it reads the next number until it
//! is missing or the chunk with the end record has come. The end record has the number of records
//! and a SHA-256 over all their lines, so that a missing or changed chunk shows. An attempt that
//! logs nothing has no chunk at all.
//!
//! The worker writes with [`ChunkEncoder`], the coordinator reads with [`AttemptLogReader`].

use std::fmt;

use bytes::Bytes;
use object_store::{ObjectStoreExt, path::Path};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::{
    artifact::{ArtifactStore, explain},
    ids::{AttemptId, Digest},
    time::Timestamp,
};

/// The largest chunk that a reader takes.
pub const MAX_CHUNK_BYTES: u64 = 4 << 20;

/// The two streams that an attempt writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LogStream {
    /// Lines.
    Log,
    /// Points of series.
    Metrics,
}

impl LogStream {
    /// The first part of its keys.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Log => "logs",
            Self::Metrics => "metrics",
        }
    }
}

/// Who wrote a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogSource {
    /// A command's standard output.
    Stdout,
    /// A command's standard error.
    Stderr,
    /// The stage itself.
    Stage,
}

impl LogSource {
    /// The name as stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Stage => "stage",
        }
    }
}

impl fmt::Display for LogSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogRecord {
    /// When.
    pub at: Timestamp,
    /// Who wrote it.
    pub source: LogSource,
    /// The line, without its end.
    pub text: String,
}

/// One point of a series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricRecord {
    /// When.
    pub at: Timestamp,
    /// The series, e.g. `validation.loss`.
    pub name: String,
    /// The position, e.g. the epoch from 1.
    pub step: u64,
    /// The value; always finite.
    pub value: f64,
}

/// What stands in a chunk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LogEntry {
    /// A line.
    Line(LogRecord),
    /// A point.
    Point(MetricRecord),
}

/// The last record of the last chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogEnd {
    /// Records in all.
    pub lines: u64,
    /// SHA-256 over the lines of all records, each with its line feed.
    pub sha256: Digest,
    /// Records that could not be kept.
    #[serde(default)]
    pub dropped: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndRecord {
    end: LogEnd,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AnyRecord {
    End(EndRecord),
    Entry(LogEntry),
}

/// The key of one chunk: `logs/{run}/{task}/{attempt}/{sequence}`, or `metrics/…`.
#[must_use]
pub fn chunk_key(stream: LogStream, id: &AttemptId, sequence: u64) -> Path {
    Path::from_iter([
        stream.as_str(),
        id.run.as_str(),
        id.task.as_str(),
        &id.attempt.to_string(),
        &format!("{sequence:08}"),
    ])
}

/// Makes the chunks of one stream of one attempt.
#[derive(Debug, Default)]
pub struct ChunkEncoder {
    pending: Vec<u8>,
    sequence: u64,
    lines: u64,
    hasher: Sha256,
}

impl ChunkEncoder {
    /// With nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a record to the chunk that is being made.
    pub fn push(&mut self, entry: &LogEntry) {
        let start = self.pending.len();
        // Plain data: writing it into memory does not fail; a record that did is left out whole.
        if serde_json::to_writer(&mut self.pending, entry).is_err() {
            self.pending.truncate(start);
            return;
        }
        self.pending.push(b'\n');
        self.hasher.update(&self.pending[start..]);
        self.lines += 1;
    }

    /// Bytes that wait to be sealed.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    /// Chunks sealed so far.
    #[must_use]
    pub const fn sealed(&self) -> u64 {
        self.sequence
    }

    /// Closes the chunk: its number and its bytes. `None` if there is nothing in it.
    pub fn seal(&mut self) -> Option<(u64, Bytes)> {
        if self.pending.is_empty() {
            return None;
        }
        let sequence = self.sequence;
        self.sequence += 1;
        Some((sequence, std::mem::take(&mut self.pending).into()))
    }

    /// Closes the last chunk, with the end record. `None` if there never was a record, nor one
    /// that could not be kept.
    #[must_use]
    pub fn finish(mut self, dropped: u64) -> Option<(u64, Bytes)> {
        if self.lines == 0 && dropped == 0 {
            return None;
        }
        let end = EndRecord {
            end: LogEnd {
                lines: self.lines,
                sha256: Digest::from_hasher(std::mem::take(&mut self.hasher)),
                dropped,
            },
        };
        serde_json::to_writer(&mut self.pending, &end).ok()?;
        self.pending.push(b'\n');
        self.seal()
    }
}

/// Why a log could not be read.
#[derive(Debug, Error)]
pub enum AttemptLogError {
    /// A chunk is not what was written.
    #[error("chunk {sequence} of the {what} of {id} is damaged: {message}")]
    Damaged {
        /// `logs` or `metrics`.
        what: &'static str,
        /// The attempt.
        id: AttemptId,
        /// The chunk's number.
        sequence: u64,
        /// What is wrong.
        message: String,
    },
    /// The object store refused.
    #[error(
        "cannot read chunk {sequence} of the {what} of {id}: {}",
        explain(source)
    )]
    Store {
        /// `logs` or `metrics`.
        what: &'static str,
        /// The attempt.
        id: AttemptId,
        /// The chunk's number.
        sequence: u64,
        /// The error below.
        source: Box<object_store::Error>,
    },
}

/// What was read of one chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Its records.
    pub entries: Vec<LogEntry>,
    /// Set in the last chunk.
    pub end: Option<LogEnd>,
}

/// Reads one stream of one attempt, chunk by chunk.
#[derive(Debug)]
pub struct AttemptLogReader {
    artifacts: ArtifactStore,
    stream: LogStream,
    id: AttemptId,
    next: u64,
    lines: u64,
    hasher: Sha256,
    end: Option<LogEnd>,
}

impl AttemptLogReader {
    /// From the beginning.
    #[must_use]
    pub fn new(artifacts: ArtifactStore, stream: LogStream, id: AttemptId) -> Self {
        Self {
            artifacts,
            stream,
            id,
            next: 0,
            lines: 0,
            hasher: Sha256::new(),
            end: None,
        }
    }

    /// The next chunk. `None` if it is not there (yet), or the end has been read: see
    /// [`end`](Self::end). May be called again later; it goes on where it was.
    ///
    /// # Errors
    /// [`AttemptLogError`].
    pub async fn next_chunk(&mut self) -> Result<Option<Chunk>, AttemptLogError> {
        if self.end.is_some() {
            return Ok(None);
        }
        let store = self.artifacts.raw();
        let key = chunk_key(self.stream, &self.id, self.next);
        let result = match store.get(&key).await {
            Ok(result) if result.meta.size > MAX_CHUNK_BYTES => {
                return Err(self.damaged(format!("it has {} bytes", result.meta.size)));
            }
            Ok(result) => result.bytes().await,
            Err(e) => Err(e),
        };
        let bytes = match result {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(source) => {
                return Err(AttemptLogError::Store {
                    what: self.stream.as_str(),
                    id: self.id.clone(),
                    sequence: self.next,
                    source: Box::new(source),
                });
            }
        };
        let chunk = self.decode(&bytes)?;
        self.next += 1;
        self.end.clone_from(&chunk.end);
        Ok(Some(chunk))
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<Chunk, AttemptLogError> {
        let mut hasher = self.hasher.clone();
        let mut chunk = Chunk {
            entries: Vec::new(),
            end: None,
        };
        for line in bytes.split_inclusive(|b| *b == b'\n') {
            if chunk.end.is_some() {
                return Err(self.damaged("there are records after its end".to_owned()));
            }
            match serde_json::from_slice(line) {
                Ok(AnyRecord::Entry(entry)) => {
                    hasher.update(line);
                    chunk.entries.push(entry);
                }
                Ok(AnyRecord::End(record)) => chunk.end = Some(record.end),
                Err(e) => return Err(self.damaged(format!("a line is no record: {e}"))),
            }
        }
        let lines = self.lines + chunk.entries.len() as u64;
        if let Some(end) = &chunk.end
            && (end.lines != lines || end.sha256 != Digest::from_hasher(hasher.clone()))
        {
            return Err(self.damaged(format!(
                "{lines} records were read, and they are not the {} that were written",
                end.lines
            )));
        }
        self.lines = lines;
        self.hasher = hasher;
        Ok(chunk)
    }

    fn damaged(&self, message: String) -> AttemptLogError {
        AttemptLogError::Damaged {
            what: self.stream.as_str(),
            id: self.id.clone(),
            sequence: self.next,
            message,
        }
    }

    /// The end record, once it has been read and everything before it was right.
    #[must_use]
    pub const fn end(&self) -> Option<&LogEnd> {
        self.end.as_ref()
    }

    /// Records read so far.
    #[must_use]
    pub const fn lines(&self) -> u64 {
        self.lines
    }

    /// For an attempt that has ended: whether the worker was lost before it could seal the log.
    #[must_use]
    pub const fn is_truncated(&self) -> bool {
        self.end.is_none() && self.next > 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use object_store::PutPayload;

    use super::*;
    use crate::ids::{RunId, TaskName};

    fn attempt() -> AttemptId {
        AttemptId {
            run: RunId::new("r1").unwrap(),
            task: TaskName::new("train.3").unwrap(),
            attempt: 2,
        }
    }

    fn line(text: &str) -> LogEntry {
        LogEntry::Line(LogRecord {
            at: Timestamp(7),
            source: LogSource::Stderr,
            text: text.to_owned(),
        })
    }

    async fn put(store: &ArtifactStore, (sequence, bytes): (u64, Bytes)) {
        let key = chunk_key(LogStream::Log, &attempt(), sequence);
        store
            .raw()
            .put(&key, PutPayload::from_bytes(bytes))
            .await
            .unwrap();
    }

    fn reader(store: &ArtifactStore) -> AttemptLogReader {
        AttemptLogReader::new(store.clone(), LogStream::Log, attempt())
    }

    #[tokio::test]
    async fn what_was_written_is_read_as_it_comes_and_ends_with_its_end() {
        let store = ArtifactStore::open("memory:").unwrap();
        let mut encoder = ChunkEncoder::new();
        let mut reader = reader(&store);
        assert_eq!(reader.next_chunk().await.unwrap(), None);
        assert!(!reader.is_truncated(), "no chunk at all is an empty log");

        let hard = "quotes \" \\ \u{1b}[31m \u{2028} {\"end\":1}\r";
        encoder.push(&line("one"));
        encoder.push(&line(hard));
        put(&store, encoder.seal().unwrap()).await;
        assert_eq!(encoder.seal(), None, "nothing is sealed twice");
        let chunk = reader.next_chunk().await.unwrap().unwrap();
        assert_eq!(chunk.entries, [line("one"), line(hard)]);
        assert_eq!(reader.next_chunk().await.unwrap(), None);
        assert!(reader.is_truncated());

        encoder.push(&line("two"));
        put(&store, encoder.finish(5).unwrap()).await;
        let chunk = reader.next_chunk().await.unwrap().unwrap();
        assert_eq!(chunk.entries, [line("two")]);
        let end = reader.end().unwrap();
        assert_eq!((end.lines, end.dropped), (3, 5));
        assert!(!reader.is_truncated());
        assert_eq!(reader.next_chunk().await.unwrap(), None);
    }

    #[tokio::test]
    async fn points_keep_their_values() {
        let point = LogEntry::Point(MetricRecord {
            at: Timestamp(1),
            name: "loss".to_owned(),
            step: 3,
            value: 0.1 + 0.2,
        });
        let mut encoder = ChunkEncoder::new();
        encoder.push(&point);
        let (_, bytes) = encoder.finish(0).unwrap();
        let store = ArtifactStore::open("memory:").unwrap();
        let mut reader = AttemptLogReader::new(store, LogStream::Metrics, attempt());
        assert_eq!(reader.decode(&bytes).unwrap().entries, [point]);
    }

    #[tokio::test]
    async fn a_changed_or_replaced_chunk_is_told() {
        let store = ArtifactStore::open("memory:").unwrap();
        let mut encoder = ChunkEncoder::new();
        encoder.push(&line("one"));
        encoder.seal().unwrap();
        let mut other = ChunkEncoder::new();
        other.push(&line("eno"));
        put(&store, other.seal().unwrap()).await;
        encoder.push(&line("two"));
        put(&store, encoder.finish(0).unwrap()).await;
        let mut reader = reader(&store);
        reader.next_chunk().await.unwrap().unwrap();
        let error = reader.next_chunk().await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("chunk 1 of the logs of r1/train.3/2")
        );
        assert!(reader.is_truncated());
    }

    #[tokio::test]
    async fn a_chunk_cut_in_the_middle_of_a_record_is_told() {
        let store = ArtifactStore::open("memory:").unwrap();
        let mut encoder = ChunkEncoder::new();
        encoder.push(&line("one"));
        let (sequence, bytes) = encoder.seal().unwrap();
        put(&store, (sequence, bytes.slice(..10))).await;
        assert!(reader(&store).next_chunk().await.is_err());
    }

    #[test]
    fn an_attempt_that_logged_nothing_has_no_chunk() {
        assert_eq!(ChunkEncoder::new().finish(0), None);
        assert!(ChunkEncoder::new().finish(1).is_some());
    }
}
