//! A file of an artifact, onto this machine: whole and checked, or not there at all.

use std::path::{Path, PathBuf};

use emberline_common::{artifact::check_path, ids::Digest};
use emberline_proto::v1::{ArtifactFile, ReadBlobRequest};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;
use tonic::Status;

use crate::{client::Cluster, exit::Exit, reopen::Reopen};

/// Writes `file` below `directory`, and gives its place.
///
/// The bytes go into a file next to it, which takes the name only when the SHA-256 is right: a
/// stream that ended early, or a server that is wrong, leaves nothing that looks like the file.
///
/// # Errors
/// If the path leads out of the directory, a byte can't be read or written, or they are not the
/// ones that the artifact names.
pub async fn file(
    cluster: &Cluster,
    file: &ArtifactFile,
    directory: &Path,
) -> anyhow::Result<PathBuf> {
    check_path(&file.path).map_err(Exit::cluster)?;
    let path = directory.join(&file.path);
    to(cluster, file, &path).await?;
    Ok(path)
}

/// Writes `file` to `path`, like [`file()`].
///
/// # Errors
/// Like [`file()`].
pub async fn to(cluster: &Cluster, file: &ArtifactFile, path: &Path) -> anyhow::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let mut reopen = Reopen::default();
    let fetched = loop {
        let fetched = pieces(cluster, file, path, &partial).await;
        match fetched.map_err(|e| e.downcast::<Status>()) {
            Ok(()) => break Ok(()),
            // Another one leads now: from the beginning, since the digest is of the whole.
            Err(Ok(status)) => {
                if let Err(status) = reopen.after(status).await {
                    break Err(status.into());
                }
            }
            Err(Err(e)) => break Err(e),
        }
    };
    if fetched.is_err() {
        // What could not be written is no use to anyone; the first error is what counts.
        let _ = tokio::fs::remove_file(&partial).await;
    }
    fetched
}

/// All bytes of an object, of which there must be no more than so many.
///
/// # Errors
/// If there are more, they can't be read, or they are not the ones of that digest.
pub async fn bytes(cluster: &Cluster, sha256: &str, at_most: u64) -> anyhow::Result<Vec<u8>> {
    let mut reopen = Reopen::default();
    loop {
        let read = read(cluster, sha256, at_most).await;
        match read.map_err(|e| e.downcast::<Status>()) {
            Ok(bytes) => return Ok(bytes),
            Err(Ok(status)) => reopen.after(status).await?,
            Err(Err(e)) => return Err(e),
        }
    }
}

async fn read(cluster: &Cluster, sha256: &str, at_most: u64) -> anyhow::Result<Vec<u8>> {
    let request = ReadBlobRequest {
        sha256: sha256.to_owned(),
    };
    let mut pieces = cluster.artifacts().read_blob(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.message().await? {
        bytes.extend(piece.data);
        if bytes.len() as u64 > at_most {
            return Err(Exit::input(format!(
                "the object {sha256} has more than the {at_most} bytes that are read of it"
            ))
            .into());
        }
    }
    let digest = Digest::of(&bytes).to_string();
    if digest != sha256 {
        let line = format!("an object came with the SHA-256 {digest}, not {sha256}: try it again");
        return Err(Exit::cluster(line).into());
    }
    Ok(bytes)
}

async fn pieces(
    cluster: &Cluster,
    file: &ArtifactFile,
    path: &Path,
    partial: &Path,
) -> anyhow::Result<()> {
    let write =
        |e: std::io::Error| Exit::cluster(format!("cannot write `{}`: {e}", path.display()));
    if let Some(parent) = path.parent() {
        tokio::fs::create_dir_all(parent).await.map_err(write)?;
    }
    let mut out = tokio::fs::File::create(partial).await.map_err(write)?;
    let request = ReadBlobRequest {
        sha256: file.sha256.clone(),
    };
    let mut pieces = cluster.artifacts().read_blob(request).await?.into_inner();
    let mut hasher = Sha256::new();
    while let Some(piece) = pieces.message().await? {
        hasher.update(&piece.data);
        out.write_all(&piece.data).await.map_err(write)?;
    }
    out.flush().await.map_err(write)?;
    let digest = Digest::from_hasher(hasher).to_string();
    if digest != file.sha256 {
        return Err(Exit::cluster(format!(
            "`{}` came with the SHA-256 {digest}, not {}: fetch it again",
            file.path, file.sha256
        ))
        .into());
    }
    tokio::fs::rename(partial, path).await.map_err(write)?;
    Ok(())
}
