//! Storing a stream: small ones in one request, large ones in parts, never whole in memory.

use bytes::{Bytes, BytesMut};
use object_store::{ObjectStoreExt, WriteMultipart, path::Path};
use sha2::Digest as _;

use super::{
    ArtifactError, ArtifactStore,
    store::{PART_BYTES, PARTS_AT_ONCE},
};
use crate::ids::Digest;

/// A stream on its way into the store. Nothing is visible under a digest before
/// [`finish`](Self::finish) has returned; dropped before, it leaves at most unreferenced bytes for
/// the collector.
pub struct BlobWriter {
    store: ArtifactStore,
    /// Where large streams go: the final key if the digest is known, else a staging key.
    target: Path,
    staged: bool,
    hasher: sha2::Sha256,
    bytes: u64,
    buffer: BytesMut,
    upload: Option<WriteMultipart>,
}

impl BlobWriter {
    pub(super) fn to_key(store: ArtifactStore, key: Path) -> Self {
        Self::new(store, key, false)
    }

    pub(super) fn to_staging(store: ArtifactStore, key: Path) -> Self {
        Self::new(store, key, true)
    }

    fn new(store: ArtifactStore, target: Path, staged: bool) -> Self {
        Self {
            store,
            target,
            staged,
            hasher: sha2::Sha256::new(),
            bytes: 0,
            buffer: BytesMut::new(),
            upload: None,
        }
    }

    /// Takes the next piece; waits while too many parts are under way.
    ///
    /// # Errors
    /// [`ArtifactError::Store`], [`ArtifactError::DiskFull`].
    pub async fn write(&mut self, piece: Bytes) -> Result<(), ArtifactError> {
        self.hasher.update(&piece);
        self.bytes += piece.len() as u64;
        if let Some(upload) = &mut self.upload {
            let ready = upload.wait_for_capacity(PARTS_AT_ONCE).await;
            ready.map_err(|e| self.store.failed("upload a part", e))?;
            upload.put(piece);
            return Ok(());
        }
        self.buffer.extend_from_slice(&piece);
        if self.buffer.len() > PART_BYTES {
            let multipart = self.store.store.put_multipart(&self.target).await;
            let multipart = multipart.map_err(|e| self.store.failed("begin an upload", e))?;
            let mut upload = WriteMultipart::new_with_chunk_size(multipart, PART_BYTES);
            upload.put(std::mem::take(&mut self.buffer).freeze());
            self.upload = Some(upload);
        }
        Ok(())
    }

    /// Ends the stream. Durable under its digest when it returns.
    ///
    /// # Errors
    /// [`ArtifactError::Mismatch`] if the digest is not the expected one: nothing is stored then.
    /// [`ArtifactError::Store`], [`ArtifactError::DiskFull`].
    pub async fn finish(self, expected: Option<Digest>) -> Result<(Digest, u64), ArtifactError> {
        let digest = Digest::from_hasher(self.hasher);
        let mismatch = expected.filter(|expected| *expected != digest);
        if let Some(expected) = mismatch {
            if let Some(upload) = self.upload {
                let aborted = upload.abort().await;
                aborted.map_err(|e| self.store.failed("abort an upload", e))?;
            }
            return Err(ArtifactError::Mismatch {
                expected,
                actual: digest,
            });
        }
        let key = ArtifactStore::key(&digest);
        let Some(upload) = self.upload else {
            let whole = self.buffer.freeze();
            let put = self.store.store.put(&key, whole.into()).await;
            put.map_err(|e| self.store.failed(format!("store the object {digest}"), e))?;
            return Ok((digest, self.bytes));
        };
        let finished = upload.finish().await;
        finished.map_err(|e| self.store.failed(format!("store the object {digest}"), e))?;
        if self.staged {
            let moved = self.store.store.rename(&self.target, &key).await;
            moved.map_err(|e| self.store.failed(format!("store the object {digest}"), e))?;
        }
        Ok((digest, self.bytes))
    }
}
