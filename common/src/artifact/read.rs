//! Reading: streams that go on where they broke, files in parallel ranges, and the digest checked
//! each time.

use std::path::Path as FilePath;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt, stream, stream::BoxStream};
use object_store::{GetOptions, GetRange, ObjectStoreExt};
use sha2::Digest as _;
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

use super::{
    ArtifactError, ArtifactStore, MAX_MANIFEST_BYTES, Manifest, explain,
    store::{PART_BYTES, PARTS_AT_ONCE, digest_of_file},
};
use crate::ids::Digest;

/// The pieces of an object, from its beginning.
struct Pieces {
    store: ArtifactStore,
    digest: Digest,
    size: u64,
    /// How far it has been read.
    at: u64,
    /// Where the present request began.
    from: u64,
    incoming: BoxStream<'static, object_store::Result<Bytes>>,
}

impl Pieces {
    async fn open(store: &ArtifactStore, digest: &Digest) -> Result<Self, ArtifactError> {
        let found = store.store.get(&ArtifactStore::key(digest)).await;
        let found = found.map_err(|e| store.not_found(digest, e))?;
        Ok(Self {
            store: store.clone(),
            digest: *digest,
            size: found.meta.size,
            at: 0,
            from: 0,
            incoming: found.into_stream(),
        })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, ArtifactError> {
        loop {
            let error = match self.incoming.next().await {
                Some(Ok(piece)) => {
                    self.at += piece.len() as u64;
                    return Ok(Some(piece));
                }
                None => return Ok(None),
                Some(Err(e)) => e,
            };
            // The store below has tried for as long as it is told to, for the whole of the object.
            // What has moved since may be tried anew: so a long object survives many faults, and one
            // that stands still ends.
            if self.at == self.from || !explain(&error).fault.is_passing() {
                return Err(self.store.reading_failed(&self.digest, error));
            }
            self.from = self.at;
            let options = GetOptions {
                range: Some(GetRange::Bounded(self.at..self.size)),
                ..GetOptions::default()
            };
            let key = ArtifactStore::key(&self.digest);
            let found = self.store.store.get_opts(&key, options).await;
            let found = found.map_err(|e| self.store.not_found(&self.digest, e))?;
            self.incoming = found.into_stream();
        }
    }
}

impl ArtifactStore {
    /// Reads an object whole, checked.
    ///
    /// # Errors
    /// [`ArtifactError::NotFound`], [`ArtifactError::Corrupted`], [`ArtifactError::TooLarge`],
    /// [`ArtifactError::Store`].
    pub async fn get_bytes(&self, digest: &Digest, max_bytes: u64) -> Result<Bytes, ArtifactError> {
        let mut actual = *digest;
        // A second reading tells bytes that were cut on their way from bytes that are wrong at home.
        for _ in 0..2 {
            let mut pieces = Pieces::open(self, digest).await?;
            if pieces.size > max_bytes {
                return Err(ArtifactError::TooLarge {
                    digest: *digest,
                    bytes: pieces.size,
                    limit: max_bytes,
                });
            }
            let mut bytes = BytesMut::new();
            while let Some(piece) = pieces.next().await? {
                bytes.extend_from_slice(&piece);
            }
            actual = Digest::of(&bytes);
            if actual == *digest {
                return Ok(bytes.freeze());
            }
        }
        Err(self.corrupted(digest, actual))
    }

    /// Reads an object into a new file, in parallel ranges, checked; the file appears under its
    /// name only when it is whole.
    ///
    /// # Errors
    /// As [`Self::get_bytes`], and [`ArtifactError::Io`], [`ArtifactError::DiskFull`],
    /// [`ArtifactError::Slow`].
    pub async fn get_file(
        &self,
        digest: &Digest,
        bytes: u64,
        dest: &FilePath,
    ) -> Result<(), ArtifactError> {
        let mut partial = dest.as_os_str().to_owned();
        partial.push(format!(".{:x}.partial", self.next_number()));
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
            let mut pieces = Pieces::open(self, digest).await?;
            while let Some(piece) = pieces.next().await? {
                hasher.update(piece);
            }
            return Err(self.corrupted(digest, Digest::from_hasher(hasher)));
        }
        let mut file = tokio::fs::File::create(partial)
            .await
            .map_err(|e| ArtifactError::io("make", partial, e))?;
        let part = PART_BYTES as u64;
        let ranges = (0..bytes.div_ceil(part)).map(|i| i * part..((i + 1) * part).min(bytes));
        let mut pieces = stream::iter(ranges)
            .map(|range| self.get_range(digest, range))
            .buffer_unordered(PARTS_AT_ONCE);
        while let Some((start, piece)) = pieces.try_next().await? {
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

    async fn get_range(
        &self,
        digest: &Digest,
        range: std::ops::Range<u64>,
    ) -> Result<(u64, Bytes), ArtifactError> {
        let (start, length) = (range.start, range.end - range.start);
        let key = Self::key(digest);
        let read = self.store.get_range(&key, range);
        match tokio::time::timeout(self.patience.part, read).await {
            Ok(Ok(bytes)) => Ok((start, bytes)),
            Ok(Err(e)) => Err(self.not_found(digest, e)),
            Err(_) => Err(ArtifactError::Slow {
                digest: *digest,
                url: self.url.to_string(),
                bytes: length,
                within: self.patience.part,
            }),
        }
    }

    /// Reads an object as a stream; it ends with [`ArtifactError::Corrupted`] if the bytes do not
    /// hash to the digest, so nothing read is to be used before the end.
    pub fn read(
        &self,
        digest: &Digest,
    ) -> impl Stream<Item = Result<Bytes, ArtifactError>> + Send + 'static + use<> {
        let (this, digest) = (self.clone(), *digest);
        stream::once(async move {
            let pieces = Pieces::open(&this, &digest).await?;
            let state = (pieces, sha2::Sha256::new(), false);
            Ok(stream::try_unfold(
                state,
                |(mut pieces, mut hasher, ended)| async move {
                    if ended {
                        return Ok(None);
                    }
                    if let Some(piece) = pieces.next().await? {
                        hasher.update(&piece);
                        return Ok(Some((piece, (pieces, hasher, false))));
                    }
                    let actual = Digest::from_hasher(std::mem::take(&mut hasher));
                    if actual == pieces.digest {
                        Ok(None)
                    } else {
                        Err(pieces.store.corrupted(&pieces.digest, actual))
                    }
                },
            ))
        })
        .try_flatten()
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

    fn not_found(&self, digest: &Digest, error: object_store::Error) -> ArtifactError {
        match error {
            // S3 answers 404 for a missing bucket, too: that is no lost object.
            object_store::Error::NotFound { .. }
                if explain(&error).fault != super::StoreFault::Bucket =>
            {
                self.suspect(digest);
                ArtifactError::NotFound {
                    digest: *digest,
                    url: self.url.to_string(),
                }
            }
            e => self.reading_failed(digest, e),
        }
    }

    fn reading_failed(&self, digest: &Digest, error: object_store::Error) -> ArtifactError {
        self.failed(format!("read the object {digest}"), error)
    }

    fn corrupted(&self, digest: &Digest, actual: Digest) -> ArtifactError {
        self.suspect(digest);
        ArtifactError::Corrupted {
            digest: *digest,
            actual,
            url: self.url.to_string(),
        }
    }
}
