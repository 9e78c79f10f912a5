//! Where bytes are: a local directory, an S3-compatible bucket, or (for tests) memory.

use std::{
    fmt,
    path::Path as FilePath,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use object_store::{
    ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig,
    aws::{AmazonS3Builder, S3ConditionalPut},
    local::LocalFileSystem,
    memory::InMemory,
    path::Path,
    prefix::PrefixStore,
};
use sha2::Digest as _;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};
use url::Url;

use super::{ArtifactError, BlobWriter, MAX_MANIFEST_BYTES, Manifest};
use crate::ids::Digest;

/// Bytes of one ranged read, and of one part of a multipart upload.
pub(super) const PART_BYTES: usize = 8 << 20;
/// Ranged reads or uploaded parts under way at once, for one object.
pub(super) const PARTS_AT_ONCE: usize = 4;

/// An object that was stored longer ago is stored again by a put, to count as young.
const REFRESH_AFTER: Duration = Duration::from_hours(1);

/// A content-addressed store. Cheap to clone.
#[derive(Clone)]
pub struct ArtifactStore {
    pub(super) store: Arc<dyn ObjectStore>,
    logs: Arc<dyn ObjectStore>,
    pub(super) url: Arc<str>,
    /// Names for uploads that do not know their digest yet; unique within the process.
    uploads: Arc<AtomicU64>,
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
                let s3 = open_s3(url).map_err(|e| fail(e.to_string()))?;
                let prefix = Path::from(parsed.path().trim_matches('/'));
                Arc::new(PrefixStore::new(s3, prefix))
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
            uploads: Arc::default(),
        })
    }

    /// As it was opened.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
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

    /// Whether the right bytes are stored under the digest. They are read: so the next put of the
    /// same bytes heals an object that was damaged. An old object is a no too: the put makes it
    /// young, so that the collector, which keeps what is young, leaves it to whoever is about to
    /// refer to it. Any doubt is a no, since a put is always right.
    async fn has_whole(&self, digest: &Digest, bytes: u64) -> bool {
        let Ok(meta) = self.store.head(&Self::key(digest)).await else {
            return false;
        };
        let now = crate::time::Timestamp::now().0 / 1_000_000;
        let stored = u64::try_from(meta.last_modified.timestamp()).unwrap_or(0);
        if meta.size != bytes || now.saturating_sub(stored) > REFRESH_AFTER.as_secs() {
            return false;
        }
        let mut pieces = std::pin::pin!(self.read(digest));
        while let Some(piece) = pieces.next().await {
            if piece.is_err() {
                return false;
            }
        }
        true
    }

    /// Stores bytes. Durable when it returns.
    ///
    /// # Errors
    /// [`ArtifactError::Store`], [`ArtifactError::DiskFull`].
    pub async fn put_bytes(&self, bytes: Bytes) -> Result<Digest, ArtifactError> {
        let digest = Digest::of(&bytes);
        if !self.has_whole(&digest, bytes.len() as u64).await {
            self.store
                .put(&Self::key(&digest), bytes.into())
                .await
                .map_err(|e| self.failed(format!("store the object {digest}"), e))?;
        }
        Ok(digest)
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

    /// Stores a file whose digest and size are known, as [`Self::put_file`] does.
    ///
    /// # Errors
    /// As [`Self::put_file`].
    pub async fn put_file_as(
        &self,
        path: &FilePath,
        digest: Digest,
        bytes: u64,
    ) -> Result<(), ArtifactError> {
        if self.has_whole(&digest, bytes).await {
            return Ok(());
        }
        let mut file = tokio::fs::File::open(path)
            .await
            .map_err(|e| ArtifactError::io("open", path, e))?;
        let mut writer = BlobWriter::to_key(self.clone(), Self::key(&digest));
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
        writer.finish(Some(digest)).await.map(drop)
    }

    /// Stores a stream whose digest is not known before its end.
    #[must_use]
    pub fn writer(&self) -> BlobWriter {
        let number = self.uploads.fetch_add(1, Ordering::Relaxed);
        let started = crate::time::Timestamp::now().0;
        let name = format!("{started:x}-{:x}-{number:x}", std::process::id());
        BlobWriter::to_staging(self.clone(), Path::from_iter(["staging", &name]))
    }

    /// Reads an object whole, checked.
    ///
    /// # Errors
    /// [`ArtifactError::NotFound`], [`ArtifactError::Corrupted`], [`ArtifactError::TooLarge`],
    /// [`ArtifactError::Store`].
    pub async fn get_bytes(&self, digest: &Digest, max_bytes: u64) -> Result<Bytes, ArtifactError> {
        let mut actual = *digest;
        // A second reading tells bytes that were cut on their way from bytes that are wrong at home.
        for _ in 0..2 {
            let found = self.get(digest).await?;
            if found.meta.size > max_bytes {
                let bytes = found.meta.size;
                return Err(ArtifactError::TooLarge {
                    digest: *digest,
                    bytes,
                    limit: max_bytes,
                });
            }
            let bytes = found
                .bytes()
                .await
                .map_err(|e| self.failed(format!("read the object {digest}"), e))?;
            actual = Digest::of(&bytes);
            if actual == *digest {
                return Ok(bytes);
            }
        }
        Err(self.corrupted(digest, actual))
    }

    /// Reads an object into a new file, in parallel ranges, checked; the file appears under its
    /// name only when it is whole.
    ///
    /// # Errors
    /// As [`Self::get_bytes`], and [`ArtifactError::Io`], [`ArtifactError::DiskFull`].
    pub async fn get_file(
        &self,
        digest: &Digest,
        bytes: u64,
        dest: &FilePath,
    ) -> Result<(), ArtifactError> {
        let mut partial = dest.as_os_str().to_owned();
        partial.push(format!(
            ".{:x}.partial",
            self.uploads.fetch_add(1, Ordering::Relaxed)
        ));
        let partial = std::path::PathBuf::from(partial);
        let outcome = self.get_checked(digest, bytes, &partial).await;
        let outcome = match outcome {
            Ok(()) => tokio::fs::rename(&partial, dest)
                .await
                .map_err(|e| ArtifactError::io("rename", &partial, e)),
            Err(e) => Err(e),
        };
        if outcome.is_err() {
            // The error at hand says more than one about the left-over would.
            let _ = tokio::fs::remove_file(&partial).await;
        }
        outcome
    }

    async fn get_checked(
        &self,
        digest: &Digest,
        bytes: u64,
        partial: &FilePath,
    ) -> Result<(), ArtifactError> {
        let mut actual = *digest;
        for _ in 0..2 {
            self.get_ranges(digest, bytes, partial).await?;
            (actual, _) = digest_of_file(partial).await?;
            if actual == *digest {
                return Ok(());
            }
        }
        Err(self.corrupted(digest, actual))
    }

    async fn get_ranges(
        &self,
        digest: &Digest,
        bytes: u64,
        partial: &FilePath,
    ) -> Result<(), ArtifactError> {
        let key = Self::key(digest);
        let size = match self.store.head(&key).await {
            Ok(meta) => meta.size,
            Err(e) => return Err(self.not_found(digest, e)),
        };
        if size != bytes {
            // Cut or padded: hash what is there, so that the error says what was found.
            let mut hasher = sha2::Sha256::new();
            let mut pieces = self.get(digest).await?.into_stream();
            while let Some(piece) = pieces.next().await {
                hasher.update(
                    piece.map_err(|e| self.failed(format!("read the object {digest}"), e))?,
                );
            }
            return Err(self.corrupted(digest, Digest::from_hasher(hasher)));
        }
        let mut file = tokio::fs::File::create(partial)
            .await
            .map_err(|e| ArtifactError::io("make", partial, e))?;
        let part = PART_BYTES as u64;
        let ranges = (0..bytes.div_ceil(part)).map(|i| i * part..((i + 1) * part).min(bytes));
        let mut pieces = stream::iter(ranges)
            .map(|range| {
                let (store, key) = (&self.store, &key);
                async move {
                    store
                        .get_range(key, range.clone())
                        .await
                        .map(|b| (range.start, b))
                }
            })
            .buffer_unordered(PARTS_AT_ONCE);
        while let Some((start, piece)) = pieces
            .try_next()
            .await
            .map_err(|e| self.failed(format!("read the object {digest}"), e))?
        {
            let written = async {
                file.seek(std::io::SeekFrom::Start(start)).await?;
                file.write_all(&piece).await
            };
            written
                .await
                .map_err(|e| ArtifactError::io("write", partial, e))?;
        }
        file.flush()
            .await
            .map_err(|e| ArtifactError::io("write", partial, e))
    }

    /// Reads an object as a stream; it ends with [`ArtifactError::Corrupted`] if the bytes do not
    /// hash to the digest, so nothing read is to be used before the end.
    pub fn read(
        &self,
        digest: &Digest,
    ) -> impl Stream<Item = Result<Bytes, ArtifactError>> + Send + 'static + use<> {
        let (this, digest) = (self.clone(), *digest);
        stream::once(async move {
            let pieces = this.get(&digest).await?.into_stream();
            let state = (pieces, sha2::Sha256::new(), false, this, digest);
            Ok(stream::try_unfold(
                state,
                |(mut pieces, mut hasher, ended, this, digest)| async move {
                    if ended {
                        return Ok(None);
                    }
                    let piece = pieces.next().await.transpose();
                    match piece.map_err(|e| this.failed(format!("read the object {digest}"), e))? {
                        Some(piece) => {
                            hasher.update(&piece);
                            Ok(Some((piece, (pieces, hasher, false, this, digest))))
                        }
                        None => {
                            let actual = Digest::from_hasher(std::mem::take(&mut hasher));
                            if actual == digest {
                                Ok(None)
                            } else {
                                Err(this.corrupted(&digest, actual))
                            }
                        }
                    }
                },
            ))
        })
        .try_flatten()
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

    /// Reads a manifest, checked.
    ///
    /// # Errors
    /// As [`Self::get_bytes`], and [`ArtifactError::Manifest`].
    pub async fn get_manifest(&self, digest: &Digest) -> Result<Manifest, ArtifactError> {
        let bytes = self.get_bytes(digest, MAX_MANIFEST_BYTES).await?;
        let manifest = serde_json::from_slice::<Manifest>(&bytes)
            .map_err(|e| e.to_string())
            .and_then(|manifest| manifest.check().map(|()| manifest));
        manifest.map_err(|why| ArtifactError::Manifest {
            digest: *digest,
            why,
        })
    }

    async fn get(&self, digest: &Digest) -> Result<object_store::GetResult, ArtifactError> {
        self.store
            .get(&Self::key(digest))
            .await
            .map_err(|e| self.not_found(digest, e))
    }

    fn not_found(&self, digest: &Digest, error: object_store::Error) -> ArtifactError {
        match error {
            object_store::Error::NotFound { .. } => ArtifactError::NotFound {
                digest: *digest,
                url: self.url.to_string(),
            },
            e => self.failed(format!("read the object {digest}"), e),
        }
    }

    fn corrupted(&self, digest: &Digest, actual: Digest) -> ArtifactError {
        ArtifactError::Corrupted {
            digest: *digest,
            actual,
            url: self.url.to_string(),
        }
    }

    pub(super) fn failed(
        &self,
        what: impl Into<String>,
        error: object_store::Error,
    ) -> ArtifactError {
        ArtifactError::store(&self.url, what, error)
    }
}

/// The SHA-256 and size of a local file.
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

/// The bucket that an `s3://bucket/…` URL names, whatever key comes after it; region, endpoint and
/// credentials come from the usual `AWS_…` environment.
///
/// # Errors
/// If the URL or the environment cannot be used.
pub fn open_s3(url: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
    crate::tls::install_crypto_provider();
    let retry = RetryConfig {
        max_retries: 10,
        retry_timeout: Duration::from_secs(120),
        ..RetryConfig::default()
    };
    let s3 = AmazonS3Builder::from_env()
        .with_url(url)
        .with_client_options(
            ClientOptions::new()
                .with_allow_http(endpoint_is_http())
                .with_connect_timeout(Duration::from_secs(5))
                .with_timeout(Duration::from_secs(120)),
        )
        .with_retry(retry)
        // No correctness rests on it, and some servers answer it wrongly.
        .with_conditional_put(S3ConditionalPut::Disabled)
        .build()?;
    Ok(Arc::new(s3))
}

/// Whether the environment names an S3 server without TLS, which object_store refuses otherwise.
fn endpoint_is_http() -> bool {
    ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .any(|endpoint| endpoint.starts_with("http://"))
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
