//! Models in service, as far as the session and the cache are concerned: what a worker that serves
//! needs beside its stages. The server itself lives in a crate of its own, so that a worker of your
//! own need not build it.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use emberline_common::{
    artifact::{ArtifactError, ArtifactStore},
    ids::Digest,
    serving::{ServingOffer, ServingPlan, ServingStatus, Traffic},
};
use emberline_proto::v1 as pb;
use futures::future::BoxFuture;
use object_store::{ObjectStoreExt as _, path::Path as Key};
use prost::Message as _;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout_at},
};

use crate::cache::{Cache, Pinned};

/// Serves models. One for each worker; it outlives every session.
pub trait Serving: Send + Sync + 'static {
    /// What the leader is told when a session opens.
    fn offer(&self) -> ServingOffer;

    /// Takes over a plan. Returns at once: what has to be fetched and loaded is done by the server's own
    /// tasks, and told by [`Self::status`]. A plan of a newer leader may have a smaller revision; the one
    /// that comes last counts.
    fn apply(&self, plan: ServingPlan, artifacts: ServingArtifacts);

    /// How far it is, and what it has counted.
    fn status(&self) -> ServingStatus;

    /// Notified (one waiter) when something has changed that the leader is to hear of at once: a plan
    /// was taken over, a version is ready or failed, requests begin to fail.
    fn changed(&self) -> &Notify;

    /// Says from now on that it is not ready, and goes on answering.
    fn drain(&self);

    /// Takes no more connections, answers what it has taken, writes what it has logged, and ends;
    /// within some seconds.
    fn stop(&self) -> BoxFuture<'_, ()>;
}

/// How long a leader may take to put what a draining worker serves somewhere else.
const HAND_OVER: Duration = Duration::from_secs(10);
/// How long it may take to say that there is somewhere else.
const SAYS_SO: Duration = Duration::from_millis(300);
/// How often is told what was counted, before a plan says so.
const REPORT: Duration = Duration::from_secs(1);

/// The server, and what the session has to remember of its plan.
pub(crate) struct Served {
    pub server: Arc<dyn Serving>,
    plan: watch::Sender<Told>,
    draining: AtomicBool,
    kept: Arc<Kept>,
}

/// The file that the plan is kept in, and the newest plan that is to be in it.
#[derive(Debug)]
struct Kept {
    file: PathBuf,
    is_there: AtomicBool,
    newest: Mutex<Option<Vec<u8>>>,
    writing: Mutex<()>,
}

impl Kept {
    /// Writes the newest plan, if nobody else has. To be called off the async threads.
    fn write(&self) {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = self
            .newest
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(bytes) = newest else {
            return;
        };
        let partial = self.file.with_extension("partial");
        let written =
            std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, &self.file));
        if let Err(error) = written {
            tracing::warn!(%error, "the plan of what is served cannot be kept");
        }
    }
}

/// What a plan means for the session.
#[derive(Debug, Clone, Copy)]
struct Told {
    report_every: Duration,
    /// Models that are to be served here, and of them those that others serve, too.
    models: usize,
    shared: usize,
}

impl Served {
    /// `kept` is the file that the plan is kept in.
    pub fn new(server: Arc<dyn Serving>, kept: PathBuf) -> Self {
        let (plan, _) = watch::channel(Told {
            report_every: REPORT,
            models: 0,
            shared: 0,
        });
        Self {
            server,
            plan,
            draining: AtomicBool::new(false),
            kept: Arc::new(Kept {
                is_there: AtomicBool::new(kept.exists()),
                file: kept,
                newest: Mutex::default(),
                writing: Mutex::default(),
            }),
        }
    }

    /// Serves again what an earlier life of this worker served, from its cache where the store cannot be
    /// reached: nobody may lead for a while. What was only tried is not: nobody would take it back.
    pub fn restore(&self, cache: &Arc<Cache>) {
        let kept = match std::fs::read(&self.kept.file) {
            Ok(bytes) => pb::KeptPlan::decode(bytes.as_slice()).map_err(|e| e.to_string()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return,
            Err(e) => Err(e.to_string()),
        };
        let plan = kept.and_then(|kept| {
            let plan = ServingPlan::try_from(kept.plan.unwrap_or_default());
            let mut plan = plan.map_err(|e| e.to_string())?;
            let store = ArtifactStore::open(&kept.object_store_url).map_err(|e| e.to_string())?;
            for version in plan.models.iter_mut().flat_map(|model| &mut model.versions) {
                if version.traffic != Traffic::Live {
                    version.traffic = Traffic::Standby;
                }
            }
            // Plans of leaders count from 1.
            plan.revision = 0;
            Ok((plan, ServingArtifacts::new(Arc::clone(cache), store)))
        });
        match plan {
            Ok((plan, artifacts)) => self.server.apply(plan, artifacts),
            Err(why) => {
                let file = self.kept.file.display();
                tracing::warn!(%file, %why, "what was served before cannot be read: a leader says it anew");
            }
        }
    }

    /// Keeps a plan for the next life. One that cannot be kept is served all the same.
    fn keep(&self, plan: &ServingPlan, store: &ArtifactStore) {
        let kept = pb::KeptPlan {
            object_store_url: store.url().to_owned(),
            plan: Some(plan.into()),
        };
        let newest = Some(kept.encode_to_vec());
        *self
            .kept
            .newest
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = newest;
        let kept = Arc::clone(&self.kept);
        // It says itself what went wrong.
        drop(tokio::task::spawn_blocking(move || kept.write()));
    }

    /// Takes no new clients, and answers those that are there.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.server.drain();
    }

    /// Takes over a plan.
    pub fn apply(&self, plan: ServingPlan, artifacts: ServingArtifacts) {
        self.plan.send_replace(Told {
            report_every: plan.report_every,
            models: plan.models.len(),
            shared: plan.models.iter().filter(|m| !m.peers.is_empty()).count(),
        });
        // Others serve it now; whoever still asks here is answered until the end.
        if plan.models.is_empty() && self.draining.load(Ordering::Relaxed) {
            return;
        }
        // Where nothing is served and nothing was, there is nothing to keep.
        if !plan.models.is_empty() || self.kept.is_there.load(Ordering::Relaxed) {
            self.kept.is_there.store(true, Ordering::Relaxed);
            self.keep(&plan, &artifacts.store);
        }
        self.server.apply(plan, artifacts);
    }

    /// How often is to be told what was counted.
    pub fn report_every(&self) -> Duration {
        self.plan.borrow().report_every
    }

    /// Resolves when others serve what was served here; soon, if there are no others.
    pub async fn handed_over(&self) {
        let mut plan = self.plan.subscribe();
        let began = Instant::now();
        let alone = plan.wait_for(|told| told.models == 0 || told.shared > 0);
        if timeout_at(began + SAYS_SO, alone).await.is_err() {
            return;
        }
        let moved = plan.wait_for(|told| told.models == 0);
        if timeout_at(began + HAND_OVER, moved).await.is_err() {
            tracing::warn!("nobody took over in time what was served here");
        }
    }
}

/// Where a server gets models from and keeps its logs: the worker's cache and the cluster's store.
#[derive(Debug, Clone)]
pub struct ServingArtifacts {
    cache: Arc<Cache>,
    store: ArtifactStore,
}

/// The files of an artifact. They stay in the cache for as long as this lives.
#[derive(Debug)]
pub struct FetchedArtifact {
    files: Vec<(String, Pinned)>,
}

impl FetchedArtifact {
    /// The read-only file that the artifact has under this name.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<&Path> {
        let found = self.files.iter().find(|(path, _)| path == name);
        found.map(|(_, pinned)| pinned.path())
    }
}

impl ServingArtifacts {
    pub(crate) const fn new(cache: Arc<Cache>, store: ArtifactStore) -> Self {
        Self { cache, store }
    }

    /// Without a leader: from a store, through a cache of its own in `dir` of at most so many bytes.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub fn open(dir: &Path, max_bytes: u64, store: ArtifactStore) -> std::io::Result<Self> {
        Ok(Self::new(Cache::open(dir, max_bytes)?, store))
    }

    /// Fetches an artifact, digests checked.
    ///
    /// # Errors
    /// If it is missing, damaged, or cannot be reached.
    pub async fn fetch(&self, manifest: &Digest) -> Result<FetchedArtifact, ArtifactError> {
        let manifest = self.cache.manifest(&self.store, manifest).await?;
        let mut files = Vec::with_capacity(manifest.files.len());
        for file in manifest.files {
            let pinned = self.cache.get(&self.store, &file.sha256, file.bytes);
            files.push((file.path, pinned.await?));
        }
        Ok(FetchedArtifact { files })
    }

    /// Keeps a piece of a log under a key of its own, e.g. `predictions/…`.
    ///
    /// # Errors
    /// The store's, in one line.
    pub async fn keep_log(&self, key: &str, bytes: Bytes) -> Result<(), String> {
        let put = self.store.logs();
        let put = put.put(&Key::from(key), bytes.into()).await;
        put.map(|_| ()).map_err(|e| e.to_string())
    }
}
