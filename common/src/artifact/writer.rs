//! Storing a stream: small ones in one request, large ones in parts, never whole in memory.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use object_store::{
    MultipartUpload, ObjectStoreExt, PutPayload, PutResult, UploadPart, WriteMultipart, path::Path,
};
use sha2::Digest as _;

use super::{
    ArtifactError, ArtifactStore,
    store::{PART_BYTES, PARTS_AT_ONCE},
};
use crate::{
    ids::Digest,
    telemetry::{current, within},
    trace::TraceContext,
};

/// S3 takes 10,000 parts.
const MOST_PARTS: u64 = 9_000;
/// How long the parts of an upload that was given up are asked to go.
const ABORT_WITHIN: Duration = Duration::from_secs(30);

/// A stream on its way into the store. Nothing is visible under a digest before
/// [`finish`](Self::finish) has returned. Dropped before, it takes back what it has sent, if the
/// store still answers; what then is left are unreferenced bytes, for the collector and the bucket's
/// lifecycle rule.
pub struct BlobWriter {
    store: ArtifactStore,
    /// Where large streams go: the final key if the digest is known, else a staging key.
    target: Path,
    staged: bool,
    hasher: sha2::Sha256,
    bytes: u64,
    buffer: BytesMut,
    part_bytes: usize,
    upload: Option<WriteMultipart>,
}

impl BlobWriter {
    /// To the final key, of so many bytes.
    pub(super) fn to_key(store: ArtifactStore, key: Path, bytes: u64) -> Self {
        let least = usize::try_from(bytes.div_ceil(MOST_PARTS)).unwrap_or(usize::MAX);
        Self::new(store, key, false, least.max(PART_BYTES))
    }

    /// By way of a staging key; at most some 70 GiB on S3, since the parts must be of one size.
    pub(super) fn to_staging(store: ArtifactStore, key: Path) -> Self {
        Self::new(store, key, true, PART_BYTES)
    }

    fn new(store: ArtifactStore, target: Path, staged: bool, part_bytes: usize) -> Self {
        Self {
            store,
            target,
            staged,
            hasher: sha2::Sha256::new(),
            bytes: 0,
            buffer: BytesMut::new(),
            part_bytes,
            upload: None,
        }
    }

    /// Takes the next piece; waits while too many parts are under way.
    ///
    /// # Errors
    /// [`ArtifactError::Store`], [`ArtifactError::DiskFull`]. Nothing can be written after one.
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
        if self.buffer.len() > self.part_bytes {
            let multipart = self.store.store.put_multipart(&self.target).await;
            let multipart = multipart.map_err(|e| self.store.failed("begin an upload", e))?;
            let multipart = Box::new(Traced {
                upload: multipart,
                context: current(),
            });
            let mut upload = WriteMultipart::new_with_chunk_size(multipart, self.part_bytes);
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
    pub async fn finish(
        mut self,
        expected: Option<Digest>,
    ) -> Result<(Digest, u64), ArtifactError> {
        let (bytes, hasher) = (self.bytes, std::mem::take(&mut self.hasher));
        let digest = Digest::from_hasher(hasher);
        let mismatch = expected.filter(|expected| *expected != digest);
        if let Some(expected) = mismatch {
            self.abort().await;
            return Err(ArtifactError::Mismatch {
                expected,
                actual: digest,
            });
        }
        let Some(upload) = self.upload.take() else {
            let whole = std::mem::take(&mut self.buffer).freeze();
            self.store.put_whole(&digest, whole).await?;
            return Ok((digest, bytes));
        };
        // It takes the parts back itself when one of them, or the completion, fails.
        if let Err(e) = upload.finish().await {
            self.store.settle(&self.target, &digest, bytes, e).await?;
        }
        if self.staged {
            self.store.rename(&self.target, &digest, bytes).await?;
        }
        self.store.is_stored(&digest);
        Ok((digest, bytes))
    }

    /// Gives it up: what was sent is taken back, if the store answers.
    pub async fn abort(mut self) {
        if let Some(upload) = self.upload.take() {
            take_back(upload).await;
        }
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        // A request that is cut off drops its writer. The task cannot be awaited from here, so it is
        // bounded in time instead; if the process ends before, the bucket's lifecycle rule is left.
        if let Some(upload) = self.upload.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(take_back(upload));
        }
    }
}

/// An upload whose parts, which are sent by tasks of their own, are part of the span of whoever began
/// it.
#[derive(Debug)]
struct Traced {
    upload: Box<dyn MultipartUpload>,
    context: Option<TraceContext>,
}

impl MultipartUpload for Traced {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        Box::pin(within(self.context, self.upload.put_part(data)))
    }

    fn complete<'a, 'b>(&'a mut self) -> BoxFuture<'b, object_store::Result<PutResult>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(within(self.context, self.upload.complete()))
    }

    fn abort<'a, 'b>(&'a mut self) -> BoxFuture<'b, object_store::Result<()>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(within(self.context, self.upload.abort()))
    }
}

async fn take_back(upload: WriteMultipart) {
    match tokio::time::timeout(ABORT_WITHIN, upload.abort()).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => tracing::warn!("the parts of an upload are left: {}", super::explain(&e)),
        Err(_) => tracing::warn!("the parts of an upload are left: no answer in {ABORT_WITHIN:?}"),
    }
}
