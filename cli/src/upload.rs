//! Bytes of this machine into the cluster's store.

use std::sync::Arc;

use emberline_common::ids::Digest;
use emberline_proto::v1::PutBlobRequest;

use crate::{client::Cluster, reopen::Reopen};

/// Bytes of one piece.
const PIECE: usize = 256 << 10;

/// Stores bytes under their digest. The coordinator checks it.
///
/// # Errors
/// What the coordinator says.
pub async fn blob(cluster: &Cluster, content: Vec<u8>) -> anyhow::Result<Digest> {
    let digest = Digest::of(&content);
    let content = Arc::new(content);
    let mut reopen = Reopen::default();
    while let Err(status) = cluster
        .artifacts()
        .put_blob(tokio_stream::iter(pieces(Arc::clone(&content), digest)))
        .await
    {
        reopen.after(status).await?;
    }
    Ok(digest)
}

/// The first piece names the whole.
fn pieces(content: Arc<Vec<u8>>, digest: Digest) -> impl Iterator<Item = PutBlobRequest> {
    // What is empty is one piece without data.
    let count = content.len().div_ceil(PIECE).max(1);
    (0..count).map(move |number| {
        let begin = number * PIECE;
        let end = content.len().min(begin + PIECE);
        PutBlobRequest {
            sha256: match number {
                0 => digest.to_string(),
                _ => String::new(),
            },
            data: content[begin..end].to_vec(),
        }
    })
}
