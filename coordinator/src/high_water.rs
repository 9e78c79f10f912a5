//! The highest term that ever led, kept beside the artifacts.
//!
//! Terms only rise, as long as the state is the same one. When a leader finds that a higher term has
//! been here, its state is older than the artifacts: etcd was restored from an old copy, or made anew.
//! To lead on that would lose acknowledged runs without a word; so it is refused, and a person decides.

use std::time::Duration;

use bytes::Bytes;
use emberline_common::{artifact::ArtifactStore, ids::Epoch};
use object_store::{ObjectStoreExt as _, path::Path};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::CoordinatorError;

/// How long the object store may take; if it does not answer, the leader does not wait for it.
const WITHIN: Duration = Duration::from_secs(2);
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// Where it stands.
fn key() -> Path {
    Path::from("cluster/highest-term")
}

/// Refuses to lead a term that is lower than one that has led.
///
/// # Errors
/// [`CoordinatorError::OldState`]. An object store that does not answer is no reason to refuse.
pub(crate) async fn check(artifacts: &ArtifactStore, epoch: Epoch) -> Result<(), CoordinatorError> {
    let store = artifacts.raw();
    let read = async { store.get(&key()).await?.bytes().await };
    let highest = match timeout(WITHIN, read).await {
        Ok(Ok(bytes)) => String::from_utf8_lossy(&bytes).trim().parse().ok(),
        Ok(Err(object_store::Error::NotFound { .. })) => None,
        Ok(Err(error)) => {
            tracing::warn!(%error, "whether the state is an old copy is not known");
            None
        }
        Err(_) => {
            tracing::warn!(
                "whether the state is an old copy is not known: no answer in {WITHIN:?}"
            );
            None
        }
    };
    match highest.map(Epoch) {
        Some(highest) if highest > epoch => Err(CoordinatorError::OldState {
            epoch,
            highest,
            object: format!("{}/{}", artifacts.url().trim_end_matches('/'), key()),
        }),
        _ => Ok(()),
    }
}

/// Notes that this term leads. Goes on until it is noted.
pub(crate) async fn note(artifacts: ArtifactStore, epoch: Epoch, stop: CancellationToken) {
    let store = artifacts.raw();
    loop {
        let text = Bytes::from(epoch.to_string());
        let Err(error) = store.put(&key(), text.into()).await else {
            return;
        };
        tracing::debug!(%error, "the term is not noted");
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(TRY_AGAIN) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn a_term_below_one_that_has_led_is_refused() {
        let artifacts = ArtifactStore::open("memory:").unwrap();
        check(&artifacts, Epoch(7)).await.unwrap();
        note(artifacts.clone(), Epoch(7), CancellationToken::new()).await;
        check(&artifacts, Epoch(7)).await.unwrap();
        check(&artifacts, Epoch(8)).await.unwrap();
        let refused = check(&artifacts, Epoch(6)).await.unwrap_err().to_string();
        assert!(refused.contains("restored from an old copy"), "{refused}");
        assert!(refused.contains("cluster/highest-term"), "{refused}");
    }
}
