//! The collector: removes from the object store what nothing refers to.
//!
//! It lists first and marks after that, so that whatever was referred to while it listed is marked.
//! What is not marked and old enough goes. Two things are stored before anything refers to them:
//! what an attempt uploads (protected by its age: storing it again makes it young), and what a
//! submission or an archive is about to refer to (protected by [`Holds`] too, whatever its age).
//! When a mark cannot be read, nothing is removed at all.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use emberline_common::{
    artifact::{ArtifactError, ArtifactStore, explain},
    ids::{Digest, RunId},
    run_view::RunView,
    time::Timestamp,
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt as _};
use thiserror::Error;

use crate::{
    archive::{Archive, ArchiveError},
    engine::{
        api::{Command, StageFile},
        spec_blob,
    },
    holds::{Collection, Holds},
    runtime::{Runtime, RuntimeError},
};

/// Reads and removals under way at once.
const AT_ONCE: usize = 16;
/// Keys named in the answer.
const NAMED: usize = 100;

/// What to collect.
#[derive(Debug, Clone)]
pub struct Options {
    /// Remove nothing, only say what would be removed.
    pub dry_run: bool,
    /// Keep what is younger. Under an hour it is safe only while no attempt runs.
    pub min_age: Duration,
    /// Forget ended runs that ended longer ago, and logs of predictions that are older.
    pub forget_runs_older_than: Option<Duration>,
}

/// A number of objects, and their size altogether.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Amount {
    /// Objects.
    pub objects: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes += bytes;
    }
}

/// What was (or would be) removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Collected {
    /// Referred to.
    pub kept: Amount,
    /// Removed.
    pub removed: Amount,
    /// Not referred to, but young.
    pub young: Amount,
    /// Runs forgotten.
    pub forgotten_runs: u64,
    /// The first removed keys.
    pub first_removed: Vec<String>,
}

/// Why nothing, or not everything, was collected.
#[derive(Debug, Error)]
pub enum CollectError {
    /// One at a time.
    #[error("another collection is running; wait for its end")]
    Running,
    /// The engine could not be asked.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// What an ended run refers to cannot be read; so nothing is removed.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// What an artifact refers to cannot be read; so nothing is removed.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// The object store refused.
    #[error("cannot {what} in the object store: {}", explain(source))]
    Store {
        /// What.
        what: &'static str,
        /// Its error.
        source: object_store::Error,
    },
}

/// Collects. Cheap to clone.
#[derive(Clone)]
pub struct Collector {
    runtime: Runtime,
    artifacts: ArtifactStore,
    archive: Archive,
    holds: Holds,
}

/// What an object is for, by its key.
enum Purpose {
    /// Stored under its digest.
    Content(Digest),
    /// A log or metrics of a run.
    Log(RunId),
    /// A checkpoint of a run that goes on from it.
    Checkpoint(RunId),
    /// Left over from an upload.
    Staging,
    /// A log of predictions of served models, or of the labels that came back.
    Served,
    /// None of ours: never touched.
    Foreign,
}

/// What must stay.
struct Marks {
    content: HashSet<Digest>,
    live: HashSet<RunId>,
    known: HashSet<RunId>,
}

impl Collector {
    pub(crate) fn new(
        runtime: Runtime,
        artifacts: ArtifactStore,
        archive: Archive,
        holds: Holds,
    ) -> Self {
        Self {
            runtime,
            artifacts,
            archive,
            holds,
        }
    }

    /// Collects.
    ///
    /// # Errors
    /// [`CollectError`].
    pub async fn collect(&self, options: Options) -> Result<Collected, CollectError> {
        let collection = self.holds.begin_collection().ok_or(CollectError::Running)?;
        // Objects are dated by the wall's clock, so is what is too young.
        let now = Timestamp::now();
        let mut collected = Collected::default();
        let forgotten = self.forget(now, &options).await?;
        collected.forgotten_runs = forgotten.len() as u64;
        let objects: Vec<ObjectMeta> = self
            .artifacts
            .raw()
            .list(None)
            .try_collect()
            .await
            .map_err(|source| CollectError::Store {
                what: "list the objects",
                source,
            })?;
        let marks = self.mark(&forgotten).await?;
        let mut doomed = Vec::new();
        for object in objects {
            let purpose = purpose(&object);
            let kept = match &purpose {
                Purpose::Content(digest) => marks.content.contains(digest),
                Purpose::Log(run) => marks.known.contains(run),
                Purpose::Checkpoint(run) => marks.live.contains(run),
                Purpose::Staging => false,
                // Nobody refers to it: only its age tells whether it is still wanted.
                Purpose::Served => (options.forget_runs_older_than)
                    .is_none_or(|older_than| age(&object, now) < older_than),
                Purpose::Foreign => true,
            };
            if kept {
                collected.kept.add(object.size);
            } else if age(&object, now) < options.min_age {
                collected.young.add(object.size);
            } else {
                doomed.push((object, purpose));
            }
        }
        let store = self.artifacts.raw();
        let mut removals = stream::iter(doomed)
            .map(|(object, purpose)| {
                let (store, collection) = (Arc::clone(&store), &collection);
                async move {
                    let removed = remove(&*store, collection, &object, &purpose, options.dry_run);
                    removed.await.map(|removed| (object, removed))
                }
            })
            .buffer_unordered(AT_ONCE);
        while let Some((object, removed)) = removals.try_next().await? {
            if removed {
                collected.removed.add(object.size);
                if collected.first_removed.len() < NAMED {
                    collected.first_removed.push(object.location.to_string());
                }
            } else {
                collected.kept.add(object.size);
            }
        }
        collected.first_removed.sort();
        Ok(collected)
    }

    /// Forgets ended runs that are old enough; in a dry run only says which.
    async fn forget(
        &self,
        now: Timestamp,
        options: &Options,
    ) -> Result<HashSet<RunId>, CollectError> {
        let Some(older_than) = options.forget_runs_older_than else {
            return Ok(HashSet::new());
        };
        let runs: Vec<RunId> = self
            .runtime
            .read(move |engine| {
                engine
                    .ended_runs()
                    .filter(|e| {
                        let ended = e.summary.finished_at.unwrap_or(e.summary.created_at);
                        now.since(ended) >= older_than
                    })
                    .map(|e| e.summary.run.clone())
                    .collect()
            })
            .await?;
        if !options.dry_run {
            for some in runs.chunks(1000) {
                let runs = some.to_vec();
                self.runtime.own_command(Command::Forget { runs }).await?;
            }
        }
        Ok(runs.into_iter().collect())
    }

    /// Everything that something refers to, but for runs that are (or in a dry run would be)
    /// forgotten.
    async fn mark(&self, forgotten: &HashSet<RunId>) -> Result<Marks, CollectError> {
        let (manifests, blobs, live, ended) = self
            .runtime
            .read(|engine| {
                let manifests: Vec<Digest> = engine.referenced_manifests().collect();
                let blobs: Vec<Digest> = engine.referenced_blobs().collect();
                let live: HashSet<RunId> = engine.live_runs().map(|r| r.run).collect();
                let ended: HashMap<RunId, Digest> = engine
                    .ended_runs()
                    .map(|e| (e.summary.run.clone(), e.archive))
                    .collect();
                (manifests, blobs, live, ended)
            })
            .await?;
        let mut marks = Marks {
            content: blobs.into_iter().collect(),
            known: live.iter().chain(ended.keys()).cloned().collect(),
            live,
        };
        let mut manifests: HashSet<Digest> = manifests.into_iter().collect();
        let archives = ended
            .into_iter()
            .filter(|(run, _)| !forgotten.contains(run))
            .map(|(_, digest)| digest);
        for run in forgotten {
            marks.known.remove(run);
        }
        let mut archived = stream::iter(archives)
            .map(|digest| async move { (digest, self.archive.load(digest).await) })
            .buffer_unordered(AT_ONCE);
        while let Some((digest, run)) = archived.next().await {
            marks.content.insert(digest);
            let run = match run {
                Ok(run) => run,
                Err(ArchiveError::Artifact(ArtifactError::NotFound { .. })) => {
                    tracing::warn!(%digest, "the record of an ended run is gone");
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            marks.content.insert(run.view.summary.revision);
            marks.content.insert(Digest::of(&spec_blob(&run.spec)));
            mark_run(&run.view, &run.files, &mut marks.content, &mut manifests);
        }
        drop(archived);
        let mut read = stream::iter(manifests)
            .map(|digest| async move { (digest, self.artifacts.get_manifest(&digest).await) })
            .buffer_unordered(AT_ONCE);
        while let Some((digest, manifest)) = read.next().await {
            marks.content.insert(digest);
            match manifest {
                Ok(manifest) => marks
                    .content
                    .extend(manifest.files.iter().map(|f| f.sha256)),
                // There is nothing to protect.
                Err(ArtifactError::NotFound { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        drop(read);
        Ok(marks)
    }
}

fn mark_run(
    view: &RunView,
    files: &[StageFile],
    content: &mut HashSet<Digest>,
    manifests: &mut HashSet<Digest>,
) {
    content.extend(files.iter().map(|f| f.sha256));
    for task in &view.tasks {
        manifests.extend(task.outputs.iter().map(|o| o.manifest));
    }
}

async fn remove(
    store: &dyn ObjectStore,
    collection: &Collection,
    object: &ObjectMeta,
    purpose: &Purpose,
    dry_run: bool,
) -> Result<bool, CollectError> {
    let digest = match purpose {
        Purpose::Content(digest) => Some(digest),
        _ => None,
    };
    if let Some(digest) = digest
        && !collection.may_remove(digest)
    {
        return Ok(false);
    }
    let removed = if dry_run {
        Ok(())
    } else {
        store.delete(&object.location).await
    };
    if let Some(digest) = digest {
        collection.removed(digest);
    }
    match removed {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(true),
        Err(source) => Err(CollectError::Store {
            what: "remove an object",
            source,
        }),
    }
}

fn age(object: &ObjectMeta, now: Timestamp) -> Duration {
    let modified = object.last_modified.timestamp_micros();
    now.since(Timestamp(u64::try_from(modified).unwrap_or(0)))
}

fn purpose(object: &ObjectMeta) -> Purpose {
    let key = object.location.as_ref();
    let parts: Vec<&str> = key.split('/').collect();
    let run = |text: &str| RunId::new(text).ok();
    let purpose = match parts.as_slice() {
        ["cas", _, hex] => hex.parse().ok().map(Purpose::Content),
        ["logs" | "metrics", id, ..] => run(id).map(Purpose::Log),
        ["checkpoints", id, ..] => run(id).map(Purpose::Checkpoint),
        ["staging", ..] => Some(Purpose::Staging),
        ["predictions" | "labels", ..] => Some(Purpose::Served),
        _ => None,
    };
    purpose.unwrap_or(Purpose::Foreign)
}
