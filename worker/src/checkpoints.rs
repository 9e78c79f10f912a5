//! A task's checkpoint in the object store: `checkpoints/{run}/{task}`, one object, replaced whole.
//!
//! It begins with a mark and the SHA-256 of the rest, so that a damaged or foreign one is never
//! resumed from.

use bytes::Bytes;
use emberline_common::{
    artifact::{ArtifactStore, explain},
    ids::{AttemptId, Digest},
    telemetry::within,
    trace::TraceContext,
};
use object_store::{ObjectStoreExt, PutPayload, path::Path};
use tokio::runtime::Handle;

use crate::stage::{CheckpointStore, StageError};

const MARK: &[u8; 8] = b"EMBCKPT1";
const HEADER_BYTES: usize = MARK.len() + 32;

/// The checkpoint of one task.
pub(crate) struct ObjectCheckpoints {
    pub store: ArtifactStore,
    pub id: AttemptId,
    pub runtime: Handle,
    /// The attempt's own span.
    pub context: Option<TraceContext>,
}

impl ObjectCheckpoints {
    fn key(&self) -> Path {
        Path::from_iter(["checkpoints", self.id.run.as_str(), self.id.task.as_str()])
    }
}

impl CheckpointStore for ObjectCheckpoints {
    fn save(&self, bytes: &[u8]) -> Result<(), StageError> {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend_from_slice(MARK);
        header.extend_from_slice(Digest::of(bytes).as_bytes());
        let payload = PutPayload::from_iter([Bytes::from(header), Bytes::copy_from_slice(bytes)]);
        let store = self.store.raw();
        self.runtime
            .block_on(within(self.context, store.put(&self.key(), payload)))
            .map(|_| ())
            .map_err(|e| {
                StageError::storage(format!("cannot save the checkpoint: {}", explain(&e)))
            })
    }

    fn load(&self) -> Result<Option<Vec<u8>>, StageError> {
        let store = self.store.raw();
        let key = self.key();
        let read = self.runtime.block_on(within(self.context, async {
            store.get(&key).await?.bytes().await
        }));
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(e) => {
                return Err(StageError::storage(format!(
                    "cannot read the checkpoint: {}",
                    explain(&e)
                )));
            }
        };
        let body = bytes.get(HEADER_BYTES..).filter(|body| {
            bytes.starts_with(MARK)
                && bytes[MARK.len()..HEADER_BYTES] == Digest::of(body).as_bytes()[..]
        });
        if body.is_none() {
            tracing::warn!(attempt = %self.id, "the checkpoint is damaged and is not used");
        }
        Ok(body.map(<[u8]>::to_vec))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_checkpoint_comes_back_and_a_damaged_one_is_not_used() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let store = ArtifactStore::open("memory:").unwrap();
        let checkpoints = ObjectCheckpoints {
            store: store.clone(),
            id: AttemptId {
                run: "r".parse().unwrap(),
                task: "t.1".parse().unwrap(),
                attempt: 1,
            },
            runtime: runtime.handle().clone(),
            context: None,
        };
        assert_eq!(checkpoints.load().unwrap(), None);
        checkpoints.save(b"one").unwrap();
        checkpoints.save(b"two").unwrap();
        assert_eq!(checkpoints.load().unwrap().unwrap(), b"two");
        let key = checkpoints.key();
        for damaged in [&b"EMBCKPT1"[..], b"", &[0; 100]] {
            let payload = PutPayload::from(damaged.to_vec());
            runtime.block_on(store.raw().put(&key, payload)).unwrap();
            assert_eq!(checkpoints.load().unwrap(), None);
        }
    }
}
