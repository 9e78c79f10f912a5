//! Where bytes are: a local directory, an S3-compatible bucket, or (for tests) memory.

use std::{
    collections::HashSet,
    fmt,
    path::Path as FilePath,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use object_store::{
    ObjectStore, ObjectStoreExt, aws::S3ConditionalPut, local::LocalFileSystem, memory::InMemory,
    path::Path, prefix::PrefixStore,
};
use sha2::Digest as _;
use tokio::io::AsyncReadExt as _;
use url::Url;

use super::{
    ArtifactError, BlobWriter, Environment, MAX_MANIFEST_BYTES, Manifest, Patience, explain,
    s3::open_bucket,
};
use crate::ids::Digest;

/// Bytes of one ranged read, and of one part of a multipart upload.
pub(super) const PART_BYTES: usize = 8 << 20;
/// Ranged reads or uploaded parts under way at once, for one object.
pub(super) const PARTS_AT_ONCE: usize = 4;

/// An object that was stored longer ago is stored again by a put, to count as young.
const REFRESH_AFTER: Duration = Duration::from_hours(1);
/// What is at most so large is put into a bucket without a look whether it is there: that costs as
/// much as the look, and heals.
const SMALL_BYTES: u64 = 256 << 10;
/// The largest object that S3 copies in one request.
const COPY_BYTES: u64 = 5 << 30;
/// Suspects that are remembered; beyond, all are forgotten, which costs only their healing.
const MOST_SUSPECTS: usize = 10_000;

/// A content-addressed store. Cheap to clone.
#[derive(Clone)]
pub struct ArtifactStore {
    pub(super) store: Arc<dyn ObjectStore>,
    logs: Arc<dyn ObjectStore>,
    pub(super) url: Arc<str>,
    /// The machine that it is on.
    address: Arc<str>,
    /// Names for uploads that do not know their digest yet; unique within the process.
    uploads: Arc<AtomicU64>,
    pub(super) patience: Patience,
    /// How the bucket was reached, if it is one.
    pub(super) s3: Option<Arc<Environment>>,
    /// What was found missing or damaged: the next put of it stores it, whatever the store says.
    suspects: Arc<Mutex<HashSet<Digest>>>,
}

impl fmt::Debug for ArtifactStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ArtifactStore").field(&self.url).finish()
    }
}

impl ArtifactStore {
    /// Opens `file:///directory` (made if it is not there), `s3://bucket/prefix` (region,
    /// endpoint and credentials from the usual `AWS_…` environment) or `memory:`.
    ///
    /// # Errors
    /// [`ArtifactError::Url`], [`ArtifactError::Io`].
    pub fn open(url: &str) -> Result<Self, ArtifactError> {
        Self::open_with(url, Environment::of_process(), Patience::default())
    }

    /// As [`Self::open`], with an environment and a patience of the caller's own.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(
        url: &str,
        environment: Environment,
        patience: Patience,
    ) -> Result<Self, ArtifactError> {
        let fail = |why: String| ArtifactError::Url {
            url: without_credentials(url),
            why,
        };
        let parsed = Url::parse(url).map_err(|e| {
            fail(format!(
                "{e}; write `file:///directory` or `s3://bucket/prefix`"
            ))
        })?;
        if parsed.fragment().is_some() || parsed.query().is_some() || parsed.password().is_some() {
            return Err(fail("it has a query, a fragment or a password".to_owned()));
        }
        let mut logs: Option<Arc<dyn ObjectStore>> = None;
        let mut s3 = None;
        let mut address = "localhost".to_owned();
        let store: Arc<dyn ObjectStore> = match parsed.scheme() {
            "file" => {
                let dir = parsed
                    .to_file_path()
                    .map_err(|()| fail("it names no absolute directory".to_owned()))?;
                make_directories(&dir)
                    .map_err(|e| ArtifactError::io("make the directory", &dir, e))?;
                let local = || {
                    LocalFileSystem::new_with_prefix(&dir)
                        .map(|local| local.with_automatic_cleanup(false))
                        .map_err(|e| fail(e.to_string()))
                };
                logs = Some(Arc::new(local()?));
                Arc::new(local()?.with_fsync(true))
            }
            "s3" => {
                if parsed.host_str().is_none_or(str::is_empty) {
                    return Err(fail("it names no bucket".to_owned()));
                }
                // No correctness rests on conditional writes, and some servers answer them wrongly.
                let bucket = open_bucket(url, &environment, patience, S3ConditionalPut::Disabled)
                    .map_err(fail)?;
                address = environment.address();
                s3 = Some(Arc::new(environment));
                Arc::new(PrefixStore::new(bucket.store, prefix_of(&parsed)))
            }
            "memory" => Arc::new(InMemory::new()),
            other => {
                return Err(fail(format!(
                    "`{other}:` is not known; use `file:` or `s3:`"
                )));
            }
        };
        Ok(Self {
            logs: logs.unwrap_or_else(|| Arc::clone(&store)),
            store,
            url: url.into(),
            address: address.into(),
            uploads: Arc::default(),
            patience,
            s3,
            suspects: Arc::default(),
        })
    }

    /// As it was opened.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The host that it is on, without a port; `localhost` if it is on this one.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The store below, for writing logs and metrics. What is put there outlives the process, but in a
    /// local directory it is not flushed to the disk at once: after a power failure the end of a log
    /// may be missing, and the log says so. Nothing that is referred to may be put there.
    #[must_use]
    pub fn logs(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.logs)
    }

    /// The store below, for checkpoints, reading logs and the collector; keys are relative to the URL.
    #[must_use]
    pub fn raw(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.store)
    }

    /// The key of a digest: `cas/ab/abcd…`.
    #[must_use]
    pub fn key(digest: &Digest) -> Path {
        let hex = digest.to_string();
        Path::from_iter(["cas", &hex[..2], &hex])
    }

    /// Whether bytes of that size are stored under the digest. They are not read.
    ///
    /// # Errors
    /// [`ArtifactError::Store`].
    pub async fn has(&self, digest: &Digest, bytes: u64) -> Result<bool, ArtifactError> {
        match self.store.head(&Self::key(digest)).await {
            Ok(meta) => Ok(meta.size == bytes),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(self.failed(format!("look up the object {digest}"), e)),
        }
    }

    /// Whether a put can be spared, since the right bytes are stored under the digest. Any doubt is a
    /// no, since a put is always right. An old object is a no: the put makes it young, so that the
    /// collector, which keeps what is young, leaves it to whoever is about to refer to it.
    ///
    /// In a local directory the bytes are read, so that the next put of the same bytes heals an object
    /// that was damaged. In a bucket only size and age are looked at, for it may be far away: there a
    /// put heals what this process has found missing or damaged, what is small, and what is old.
    async fn has_whole(&self, digest: &Digest, bytes: u64) -> bool {
        if self.suspects().contains(digest) || (self.s3.is_some() && bytes <= SMALL_BYTES) {
            return false;
        }
        let Ok(meta) = self.store.head(&Self::key(digest)).await else {
            return false;
        };
        let now = crate::time::Timestamp::now().0 / 1_000_000;
        let stored = u64::try_from(meta.last_modified.timestamp()).unwrap_or(0);
        if meta.size != bytes || now.saturating_sub(stored) > REFRESH_AFTER.as_secs() {
            return false;
        }
        if self.s3.is_some() {
            return true;
        }
        let mut pieces = std::pin::pin!(self.read(digest));
        while let Some(piece) = pieces.next().await {
            if piece.is_err() {
                return false;
            }
        }
        true
    }

    fn suspects(&self) -> std::sync::MutexGuard<'_, HashSet<Digest>> {
        // A set of digests is whole after any panic.
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers that the object is missing or damaged.
    pub(super) fn suspect(&self, digest: &Digest) {
        let mut suspects = self.suspects();
        if suspects.len() >= MOST_SUSPECTS {
            suspects.clear();
        }
        suspects.insert(*digest);
    }

    /// Remembers that the object has been stored.
    pub(super) fn is_stored(&self, digest: &Digest) {
        self.suspects().remove(digest);
    }

    /// Stores bytes. Durable when it returns.
    ///
    /// # Errors
    /// [`ArtifactError::Store`], [`ArtifactError::DiskFull`].
    pub async fn put_bytes(&self, bytes: Bytes) -> Result<Digest, ArtifactError> {
        let digest = Digest::of(&bytes);
        if !self.has_whole(&digest, bytes.len() as u64).await {
            self.put_whole(&digest, bytes).await?;
        }
        Ok(digest)
    }

    /// Stores bytes that have this digest, in one request.
    pub(super) async fn put_whole(
        &self,
        digest: &Digest,
        bytes: Bytes,
    ) -> Result<(), ArtifactError> {
        let (key, size) = (Self::key(digest), bytes.len() as u64);
        if let Err(e) = self.store.put(&key, bytes.into()).await {
            self.settle(&key, digest, size, e).await?;
        }
        self.is_stored(digest);
        Ok(())
    }

    /// After a write that failed: the answer may be what was lost, and not the write. The bytes that
    /// are stored decide; if they are the right ones, all is well.
    pub(super) async fn settle(
        &self,
        key: &Path,
        digest: &Digest,
        bytes: u64,
        error: object_store::Error,
    ) -> Result<(), ArtifactError> {
        let failed = self.failed(format!("store the object {digest}"), error);
        if self.s3.is_none() {
            return Err(failed);
        }
        let stored = async {
            let found = self.store.get(key).await?;
            if found.meta.size != bytes {
                return Ok(None);
            }
            let mut hasher = sha2::Sha256::new();
            let mut pieces = found.into_stream();
            while let Some(piece) = pieces.next().await {
                hasher.update(piece?);
            }
            Ok::<_, object_store::Error>(Some(Digest::from_hasher(hasher)))
        };
        match stored.await {
            Ok(Some(found)) if found == *digest => Ok(()),
            // The error at hand says more than one about the question would.
            _ => Err(failed),
        }
    }

    /// Moves what was uploaded without its digest to the key of its digest.
    pub(super) async fn rename(
        &self,
        from: &Path,
        digest: &Digest,
        bytes: u64,
    ) -> Result<(), ArtifactError> {
        let to = Self::key(digest);
        if self.s3.is_none() {
            let moved = self.store.rename(from, &to).await;
            return moved.map_err(|e| self.failed(format!("store the object {digest}"), e));
        }
        if bytes > COPY_BYTES {
            self.copy_through(from, digest, bytes).await?;
        } else if let Err(e) = self.store.copy(from, &to).await {
            self.settle(&to, digest, bytes, e).await?;
        }
        // The object is where it belongs; what is left in staging goes with the next collection.
        if let Err(e) = self.store.delete(from).await {
            tracing::warn!("cannot remove `{from}`: {}", explain(&e));
        }
        Ok(())
    }

    /// Copies an object by reading and writing it.
    async fn copy_through(
        &self,
        from: &Path,
        digest: &Digest,
        bytes: u64,
    ) -> Result<(), ArtifactError> {
        let failed = |e| self.failed(format!("store the object {digest}"), e);
        let mut pieces = self.store.get(from).await.map_err(failed)?.into_stream();
        let mut writer = BlobWriter::to_key(self.clone(), Self::key(digest), bytes);
        while let Some(piece) = pieces.next().await {
            writer.write(piece.map_err(failed)?).await?;
        }
        Box::pin(writer.finish(Some(*digest))).await.map(drop)
    }

    /// Stores a file, read twice: once for its digest, once to send it. Durable when it returns.
    ///
    /// # Errors
    /// [`ArtifactError::Io`], [`ArtifactError::Store`], [`ArtifactError::DiskFull`], and
    /// [`ArtifactError::Mismatch`] if the file changed in between.
    pub async fn put_file(&self, path: &FilePath) -> Result<(Digest, u64), ArtifactError> {
        let (digest, bytes) = digest_of_file(path).await?;
        self.put_file_as(path, digest, bytes).await?;
        Ok((digest, bytes))
    }

    /// Stores a file whose digest and size are known, as [`Self::put_file`] does. Says whether it had to
    /// be sent: not if it was there already.
    ///
    /// # Errors
    /// As [`Self::put_file`].
    pub async fn put_file_as(
        &self,
        path: &FilePath,
        digest: Digest,
        bytes: u64,
    ) -> Result<bool, ArtifactError> {
        if self.has_whole(&digest, bytes).await {
            return Ok(false);
        }
        let mut file = tokio::fs::File::open(path)
            .await
            .map_err(|e| ArtifactError::io("open", path, e))?;
        let mut writer = BlobWriter::to_key(self.clone(), Self::key(&digest), bytes);
        loop {
            let mut piece = bytes::BytesMut::with_capacity(256 << 10);
            let read = file
                .read_buf(&mut piece)
                .await
                .map_err(|e| ArtifactError::io("read", path, e))?;
            if read == 0 {
                break;
            }
            writer.write(piece.freeze()).await?;
        }
        writer.finish(Some(digest)).await.map(|_| true)
    }

    pub(super) fn next_number(&self) -> u64 {
        self.uploads.fetch_add(1, Ordering::Relaxed)
    }

    /// Stores a stream whose digest is not known before its end.
    #[must_use]
    pub fn writer(&self) -> BlobWriter {
        let number = self.next_number();
        let started = crate::time::Timestamp::now().0;
        let name = format!("{started:x}-{:x}-{number:x}", std::process::id());
        BlobWriter::to_staging(self.clone(), Path::from_iter(["staging", &name]))
    }

    /// Stores a manifest. It and its files must all be stored before anyone is told its digest.
    ///
    /// # Errors
    /// [`ArtifactError::Manifest`] if it breaks a rule, [`ArtifactError::Store`].
    pub async fn put_manifest(&self, manifest: &Manifest) -> Result<Digest, ArtifactError> {
        let bytes = serde_json::to_vec(manifest).unwrap_or_default();
        let checked = manifest.check().and_then(|()| {
            if bytes.len() as u64 > MAX_MANIFEST_BYTES {
                Err(format!(
                    "it has {} bytes, more than {MAX_MANIFEST_BYTES}",
                    bytes.len()
                ))
            } else {
                Ok(())
            }
        });
        if let Err(why) = checked {
            return Err(ArtifactError::Manifest {
                digest: Digest::of(&bytes),
                why,
            });
        }
        self.put_bytes(bytes.into()).await
    }

    pub(super) fn failed(
        &self,
        what: impl Into<String>,
        error: object_store::Error,
    ) -> ArtifactError {
        ArtifactError::store(&self.url, what, error)
    }
}

/// The directory, and one for each beginning of a digest, all on the disk: a put need not wait for a
/// new directory to be there for good.
fn make_directories(dir: &FilePath) -> std::io::Result<()> {
    let cas = dir.join("cas");
    std::fs::create_dir_all(&cas)?;
    if cas.join("ff").is_dir() {
        return Ok(());
    }
    for first in 0..=u8::MAX {
        std::fs::create_dir_all(cas.join(format!("{first:02x}")))?;
    }
    std::fs::File::open(&cas)?.sync_all()?;
    std::fs::File::open(dir)?.sync_all()
}

/// The SHA-256 and the size of a file.
///
/// # Errors
/// [`ArtifactError::Io`].
pub async fn digest_of_file(path: &FilePath) -> Result<(Digest, u64), ArtifactError> {
    let path = path.to_owned();
    let shown = path.clone();
    let hashed = tokio::task::spawn_blocking(move || {
        let mut file = std::fs::File::open(&path)?;
        let mut hasher = sha2::Sha256::new();
        let mut buffer = vec![0_u8; 256 << 10];
        let mut total = 0_u64;
        loop {
            let read = std::io::Read::read(&mut file, &mut buffer)?;
            if read == 0 {
                return Ok((Digest::from_hasher(hasher), total));
            }
            hasher.update(&buffer[..read]);
            total += read as u64;
        }
    });
    let hashed = hashed
        .await
        .unwrap_or_else(|e| Err(std::io::Error::other(e)));
    hashed.map_err(|e| ArtifactError::io("read", shown, e))
}

/// The prefix of all keys that a URL names.
pub(super) fn prefix_of(url: &Url) -> Path {
    Path::from(url.path().trim_matches('/'))
}

/// The URL as it may be shown: without user and password.
fn without_credentials(url: &str) -> String {
    match Url::parse(url) {
        Ok(mut parsed) => {
            let _ = parsed.set_username("");
            let _ = parsed.set_password(None);
            parsed.to_string()
        }
        Err(_) => url.chars().take(200).collect(),
    }
}
