//! The records of ended runs: gzipped JSON in the object store, named by digest in the state.
//!
//! A run stays in the state until its archive is stored, and the engine is told so. After a crash in
//! between, the next leader's engine asks for the archive again; the same bytes have the same name,
//! so that doing it twice does no harm.

use std::{
    collections::VecDeque,
    io::{Read as _, Write as _},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use emberline_common::{
    artifact::{ArtifactError, ArtifactStore},
    ids::Digest,
};
use flate2::{Compression, GzBuilder, read::GzDecoder};
use futures::stream::{FuturesUnordered, StreamExt as _};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    engine::api::{ArchivedRun, Command},
    holds::Holds,
    runtime::{Runtime, RuntimeError},
};

/// The largest archive that is read, packed and unpacked.
const MAX_PACKED_BYTES: u64 = 256 << 20;
const MAX_JSON_BYTES: u64 = 1 << 30;
/// Unpacked runs that are kept in memory, and their JSON's size altogether.
const CACHE_RUNS: usize = 64;
const CACHE_BYTES: usize = 32 << 20;
/// Runs that are being archived at once.
const AT_ONCE: usize = 4;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// Why a record could not be stored or read.
#[derive(Debug, Error)]
pub enum ArchiveError {
    /// The object store's error.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// What lies there is no record of a run.
    #[error("the record {digest} of an ended run cannot be read: {why}")]
    Unreadable {
        /// Which.
        digest: Digest,
        /// What does not fit.
        why: String,
    },
    /// The run's record could not be made.
    #[error("the record of an ended run cannot be written: {0}")]
    Unwritable(String),
}

/// Stores and reads records of ended runs. Cheap to clone.
#[derive(Clone)]
pub struct Archive {
    artifacts: ArtifactStore,
    cache: Arc<Mutex<Cache>>,
}

#[derive(Default)]
struct Cache {
    /// The most recently used last.
    runs: VecDeque<(Digest, usize, Arc<ArchivedRun>)>,
    bytes: usize,
}

impl Archive {
    /// In this object store.
    #[must_use]
    pub fn new(artifacts: ArtifactStore) -> Self {
        Self {
            artifacts,
            cache: Arc::default(),
        }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`ArchiveError`].
    pub async fn load(&self, digest: Digest) -> Result<Arc<ArchivedRun>, ArchiveError> {
        if let Some(run) = self.lock().get(&digest) {
            return Ok(run);
        }
        let packed = self.artifacts.get_bytes(&digest, MAX_PACKED_BYTES).await?;
        let unpacked = tokio::task::spawn_blocking(move || unpack(&packed)).await;
        let (run, bytes) = unpacked
            .map_err(|e| e.to_string())
            .flatten()
            .map_err(|why| ArchiveError::Unreadable { digest, why })?;
        let run = Arc::new(run);
        self.lock().insert(digest, bytes, Arc::clone(&run));
        Ok(run)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache {
    fn get(&mut self, digest: &Digest) -> Option<Arc<ArchivedRun>> {
        let at = self.runs.iter().position(|(d, ..)| d == digest)?;
        let entry = self.runs.remove(at)?;
        let run = Arc::clone(&entry.2);
        self.runs.push_back(entry);
        Some(run)
    }

    fn insert(&mut self, digest: Digest, bytes: usize, run: Arc<ArchivedRun>) {
        if bytes > CACHE_BYTES || self.runs.iter().any(|(d, ..)| *d == digest) {
            return;
        }
        self.bytes += bytes;
        self.runs.push_back((digest, bytes, run));
        while self.runs.len() > CACHE_RUNS || self.bytes > CACHE_BYTES {
            let Some((_, bytes, _)) = self.runs.pop_front() else {
                return;
            };
            self.bytes -= bytes;
        }
    }
}

fn pack(run: &ArchivedRun) -> Result<Vec<u8>, String> {
    let json = serde_json::to_vec(run).map_err(|e| e.to_string())?;
    // No time and no name in the header: the same run has the same bytes.
    let mut gzip = GzBuilder::new().write(Vec::new(), Compression::default());
    gzip.write_all(&json).map_err(|e| e.to_string())?;
    gzip.finish().map_err(|e| e.to_string())
}

fn unpack(packed: &[u8]) -> Result<(ArchivedRun, usize), String> {
    let mut json = Vec::new();
    GzDecoder::new(packed)
        .take(MAX_JSON_BYTES)
        .read_to_end(&mut json)
        .map_err(|e| e.to_string())?;
    let run = serde_json::from_slice(&json).map_err(|e| e.to_string())?;
    Ok((run, json.len()))
}

/// Stores what the engine wants archived, and tells it so. Goes on trying while the object store
/// fails: the run stays in the state for as long.
pub(crate) async fn archive_runs(
    archive: Archive,
    holds: Holds,
    runtime: Runtime,
    mut ended: mpsc::Receiver<Arc<ArchivedRun>>,
    stop: CancellationToken,
) {
    let mut under_way = FuturesUnordered::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(run) = ended.recv(), if under_way.len() < AT_ONCE => {
                under_way.push(archive_one(&archive, &holds, &runtime, run));
            }
            Some(()) = under_way.next(), if !under_way.is_empty() => {}
            else => return,
        }
    }
}

async fn archive_one(archive: &Archive, holds: &Holds, runtime: &Runtime, run: Arc<ArchivedRun>) {
    let id = run.view.summary.run.clone();
    let mut wait = FIRST_RETRY;
    loop {
        match store_one(archive, holds, runtime, &run).await {
            Ok(()) => return,
            Err(e) => {
                tracing::warn!(run = %id, error = %e, "an ended run is not archived yet");
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LAST_RETRY);
    }
}

async fn store_one(
    archive: &Archive,
    holds: &Holds,
    runtime: &Runtime,
    run: &Arc<ArchivedRun>,
) -> Result<(), ArchiveError> {
    let packed = tokio::task::spawn_blocking({
        let run = Arc::clone(run);
        move || pack(&run)
    });
    let packed = packed
        .await
        .map_err(|e| e.to_string())
        .flatten()
        .map_err(ArchiveError::Unwritable)?;
    let _hold = holds.hold(vec![Digest::of(&packed)]).await;
    let digest = archive.artifacts.put_bytes(packed.into()).await?;
    let command = Command::RunArchived {
        run: run.view.summary.run.clone(),
        archive: digest,
    };
    match runtime.own_command(command).await {
        // Refused: it is not live any more, so it needs no archive. Stopped: the next leader's
        // engine asks again. The others are what only clients are told.
        Ok(_)
        | Err(
            RuntimeError::Refused(_)
            | RuntimeError::Stopped
            | RuntimeError::Busy
            | RuntimeError::ReadOnly(_),
        ) => Ok(()),
    }
}
