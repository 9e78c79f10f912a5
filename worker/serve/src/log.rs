//! The log of predictions: of each million requests so many, by a hash of their ids, with their raw
//! columns and what was answered, and all labels that came back; as Parquet in the object store.
//!
//! Nothing waits for it. What the store is too slow to take is dropped and counted.
//!
//! `predictions/{environment}/{model}/{version}/{yyyy-mm-dd}/{worker}-{start}-{n}.parquet`, and the
//! same below `labels/`.

use std::{
    collections::HashMap,
    future::Future,
    hash::{DefaultHasher, Hasher as _},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use emberline_common::{ids::ModelName, time::Timestamp};
use emberline_train::model::Predictions;
use emberline_worker::serving::ServingArtifacts;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    columns::{RawColumns, Values},
    config::ServeConfig,
    feedback::Truth,
    parquet_log,
    relay::Label,
    routes::Route,
    version::Version,
};

/// Records that wait to be sorted into chunks.
const MAX_WAITING: usize = 4096;
/// Bytes of all records that are kept in memory.
const MAX_BYTES: usize = 32 << 20;
/// Rows and bytes of one file.
const CHUNK_ROWS: usize = 8192;
const CHUNK_BYTES: usize = 4 << 20;
/// How long the store may take for one file.
const PUT_WITHIN: Duration = Duration::from_secs(10);

/// One request that was answered.
pub(crate) struct Prediction {
    pub at: Timestamp,
    pub version: Arc<Version>,
    pub id: Arc<str>,
    pub columns: Arc<RawColumns>,
    pub predictions: Arc<Predictions>,
}

/// One label that came back.
pub(crate) struct LabelRecord {
    pub at: Timestamp,
    pub id: String,
    pub row: u32,
    pub truth: Truth,
    pub predicted: Truth,
}

enum Record {
    Prediction(Prediction),
    Label(ModelName, u32, LabelRecord),
}

/// What goes into one file.
#[derive(Default)]
struct Chunk {
    predictions: Vec<Prediction>,
    labels: Vec<LabelRecord>,
    rows: usize,
    bytes: usize,
}

/// Which files it belongs into: predictions or labels, model, version.
type ChunkKey = (&'static str, ModelName, u32);

#[derive(Debug, Default)]
struct Counts {
    bytes: AtomicUsize,
    dropped: AtomicU64,
}

/// Where records are handed over.
pub(crate) struct Log {
    records: mpsc::Sender<(Record, usize)>,
    counts: Arc<Counts>,
    artifacts: watch::Sender<Option<ServingArtifacts>>,
    stop: CancellationToken,
}

/// Whether a request is in the sample: the same answer wherever it is asked.
fn is_sampled(id: &str, per_million: u32) -> bool {
    if per_million == 0 {
        return false;
    }
    // With fixed keys.
    let mut hasher = DefaultHasher::new();
    hasher.write(id.as_bytes());
    let place = (u128::from(hasher.finish()) * 1_000_000) >> 64;
    place < u128::from(per_million)
}

fn bytes_of(columns: &RawColumns) -> usize {
    let of = |values: &Values| match values {
        Values::Integers(v) => v.len() * 8,
        Values::Floats(v) => v.len() * 8,
        Values::Bools(v) => v.len(),
        Values::Texts(v) => v.iter().map(|t| t.len() + 24).sum(),
        Values::Bytes(v) => v.iter().map(|b| b.len() + 32).sum(),
    };
    columns.values.iter().map(of).sum::<usize>() + 256
}

impl Log {
    /// And what writes it, until it is stopped.
    pub fn new(config: &ServeConfig) -> (Self, impl Future<Output = ()> + Send + use<>) {
        let (records, received) = mpsc::channel(MAX_WAITING);
        let counts = Arc::new(Counts::default());
        let artifacts = watch::Sender::new(None);
        let stop = CancellationToken::new();
        let writer = Writer {
            counts: Arc::clone(&counts),
            artifacts: artifacts.subscribe(),
            environment: config.environment.to_string(),
            worker: config.worker.to_string(),
            every: config.limits.log_every,
            start: Timestamp::now(),
            files: 0,
            chunks: HashMap::new(),
            warned: false,
        };
        let writing = writer.write_all(received, stop.clone());
        let log = Self {
            records,
            counts,
            artifacts,
            stop,
        };
        (log, writing)
    }

    /// From now on it is kept there.
    pub fn keep_in(&self, artifacts: ServingArtifacts) {
        self.artifacts.send_replace(Some(artifacts));
    }

    /// Nothing comes any more: what is there is written, and the writer ends.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Records that were dropped.
    pub fn dropped(&self) -> u64 {
        self.counts.dropped.load(Relaxed)
    }

    fn put(&self, record: Record, bytes: usize) {
        let before = self.counts.bytes.fetch_add(bytes, Relaxed);
        let fits = before + bytes <= MAX_BYTES;
        if !fits || self.records.try_send((record, bytes)).is_err() {
            self.counts.bytes.fetch_sub(bytes, Relaxed);
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }

    /// A request was answered: it is kept if it is in the sample.
    pub fn answered(
        &self,
        route: &Route,
        version: &Arc<Version>,
        columns: &Arc<RawColumns>,
        predictions: &Arc<Predictions>,
        id: &Arc<str>,
    ) {
        if !is_sampled(id, route.limits.log_per_million) {
            return;
        }
        let record = Prediction {
            at: Timestamp::now(),
            version: Arc::clone(version),
            id: Arc::clone(id),
            columns: Arc::clone(columns),
            predictions: Arc::clone(predictions),
        };
        self.put(Record::Prediction(record), bytes_of(columns));
    }

    /// A label came back.
    pub fn labelled(&self, route: &Route, version: u32, label: &Label, predicted: &Truth) {
        let record = LabelRecord {
            at: Timestamp::now(),
            id: label.request_id.clone(),
            row: label.row,
            truth: label.truth.clone(),
            predicted: predicted.clone(),
        };
        let bytes = 256 + label.request_id.len();
        self.put(Record::Label(route.model.clone(), version, record), bytes);
    }
}

/// Sorts records into chunks, and writes each when it is full or old.
struct Writer {
    counts: Arc<Counts>,
    artifacts: watch::Receiver<Option<ServingArtifacts>>,
    environment: String,
    worker: String,
    every: Duration,
    start: Timestamp,
    files: u64,
    chunks: HashMap<ChunkKey, Chunk>,
    warned: bool,
}

impl Writer {
    async fn write_all(
        mut self,
        mut received: mpsc::Receiver<(Record, usize)>,
        stop: CancellationToken,
    ) {
        let mut due = Instant::now() + self.every;
        loop {
            tokio::select! {
                record = received.recv() => {
                    let Some((record, bytes)) = record else { break };
                    if let Some(full) = self.sort(record, bytes) {
                        self.write(&full).await;
                    }
                }
                () = tokio::time::sleep_until(due) => {
                    self.write_rest().await;
                    due = Instant::now() + self.every;
                }
                () = stop.cancelled() => break,
            }
        }
        received.close();
        while let Ok((record, bytes)) = received.try_recv() {
            if let Some(full) = self.sort(record, bytes) {
                self.write(&full).await;
            }
        }
        self.write_rest().await;
    }

    /// Puts a record where it belongs; that chunk, if it is full now.
    fn sort(&mut self, record: Record, bytes: usize) -> Option<ChunkKey> {
        let (key, rows) = match &record {
            Record::Prediction(p) => {
                let version = &p.version;
                let key = ("predictions", version.model.clone(), version.number);
                (key, p.columns.rows)
            }
            Record::Label(model, version, _) => (("labels", model.clone(), *version), 1),
        };
        let chunk = self.chunks.entry(key.clone()).or_default();
        match record {
            Record::Prediction(prediction) => chunk.predictions.push(prediction),
            Record::Label(_, _, label) => chunk.labels.push(label),
        }
        chunk.rows += rows;
        chunk.bytes += bytes;
        (chunk.rows >= CHUNK_ROWS || chunk.bytes >= CHUNK_BYTES).then_some(key)
    }

    async fn write_rest(&mut self) {
        let keys: Vec<ChunkKey> = self.chunks.keys().cloned().collect();
        for key in keys {
            self.write(&key).await;
        }
    }

    async fn write(&mut self, key: &ChunkKey) {
        let Some(chunk) = self.chunks.remove(key) else {
            return;
        };
        let bytes = chunk.bytes;
        let records = (chunk.predictions.len() + chunk.labels.len()) as u64;
        let written = self.try_write(key, chunk).await;
        self.counts.bytes.fetch_sub(bytes, Relaxed);
        match written {
            Ok(()) => self.warned = false,
            Err(why) => {
                self.counts.dropped.fetch_add(records, Relaxed);
                // Once, until it works again.
                if !std::mem::replace(&mut self.warned, true) {
                    tracing::warn!(%why, "predictions are not logged");
                }
            }
        }
    }

    async fn try_write(&mut self, key: &ChunkKey, chunk: Chunk) -> Result<(), String> {
        let artifacts = self.artifacts.borrow().clone();
        let artifacts = artifacts.ok_or("there is no store yet")?;
        let (kind, model, version) = key;
        let first = (chunk.predictions.first().map(|p| p.at))
            .or_else(|| chunk.labels.first().map(|l| l.at));
        let day = first.unwrap_or(self.start).to_string();
        let day = day.get(..10).unwrap_or("unknown").to_owned();
        let (environment, worker, start, n) =
            (&self.environment, &self.worker, self.start.0, self.files);
        self.files += 1;
        let key =
            format!("{kind}/{environment}/{model}/{version}/{day}/{worker}-{start}-{n}.parquet");
        let file = tokio::task::spawn_blocking(move || {
            if chunk.labels.is_empty() {
                parquet_log::predictions(&chunk.predictions)
            } else {
                parquet_log::labels(&chunk.labels)
            }
        });
        let file = file.await.map_err(|_| "writing Parquet panicked")??;
        let kept = tokio::time::timeout(PUT_WITHIN, artifacts.keep_log(&key, file.into()));
        let late = || format!("the store did not take a file within {PUT_WITHIN:?}");
        kept.await.map_err(|_| late())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_sampled_as_was_said() {
        let sampled = |per_million: u32| {
            let ids = (0..100_000).map(|n| format!("r-{n}"));
            ids.filter(|id| is_sampled(id, per_million)).count()
        };
        assert_eq!((sampled(0), sampled(1_000_000)), (0, 100_000));
        let some = sampled(10_000);
        assert!((850..1150).contains(&some), "{some}");
    }
}
