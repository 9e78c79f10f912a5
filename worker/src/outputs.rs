//! From what a stage left in its directories to stored artifacts.
//!
//! Only regular files count. Anything else (a symbolic link, a FIFO, a device) is refused by name:
//! it could point out of the directory, or never end.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use emberline_common::{
    artifact::{
        ArtifactError, ArtifactStore, MAX_FILES, Manifest, ManifestFile, check_path, digest_of_file,
    },
    ids::{Digest, SecretName},
    run_view::ArtifactRef,
    spec::ArtifactType,
};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Map, Value};

use crate::{
    cache::Cache,
    secrets::Redactor,
    stage::{Produced, ProducedContent, StageError},
    telemetry::{AttemptTelemetry, Direction, Moved},
};

/// Outputs on their way into the store at a time.
const OUTPUTS_AT_A_TIME: usize = 4;
/// Files of one output on their way into the store at a time.
const FILES_AT_A_TIME: usize = 8;
const MAX_DEPTH: usize = 64;

/// Stores all outputs of an attempt; all are durable when it returns.
pub(crate) async fn store_all(
    store: &ArtifactStore,
    cache: &Arc<Cache>,
    telemetry: &AttemptTelemetry,
    redactor: &Redactor,
    produced: Vec<Produced>,
) -> Result<Vec<ArtifactRef>, StageError> {
    for (at, one) in produced.iter().enumerate() {
        if produced[..at].iter().any(|other| other.name == one.name) {
            return Err(StageError::system(format!(
                "the stage gave the output `{}` twice",
                one.name
            )));
        }
    }
    // Side by side: each wait is mostly for a disk or a server to say that the bytes are safe.
    let stored = produced.into_iter().map(|one| async {
        let name = one.name.clone();
        let stored = async {
            let (artifact, hit) = store_one(store, cache, redactor, one).await?;
            let moved = Moved {
                digest: artifact.manifest,
                bytes: artifact.bytes,
                hit,
            };
            Ok((artifact, moved))
        };
        telemetry
            .transfer(Direction::Put, &name, store, None, stored)
            .await
    });
    stream::iter(stored)
        .buffered(OUTPUTS_AT_A_TIME)
        .try_collect()
        .await
}

/// The artifact, and whether nothing of it had to be sent.
async fn store_one(
    store: &ArtifactStore,
    cache: &Arc<Cache>,
    redactor: &Redactor,
    Produced { name, content }: Produced,
) -> Result<(ArtifactRef, bool), StageError> {
    match content {
        ProducedContent::Input(artifact) => Ok((ArtifactRef { name, ..artifact }, true)),
        ProducedContent::Directory {
            dir,
            artifact_type,
            metadata,
        } => {
            let what = format!("the output `{name}`");
            let told = Value::Object(metadata);
            if let Some(secret) = redactor.find(&told.to_string()) {
                return Err(has_secret(
                    &format!("what the stage notes about {what}"),
                    secret,
                ));
            }
            let Value::Object(metadata) = told else {
                return Err(StageError::system("metadata is an object"));
            };
            let stored =
                store_directory(store, cache, redactor, &what, dir, artifact_type, metadata)
                    .await?;
            let (manifest, bytes, hit) = stored;
            let artifact = ArtifactRef {
                name,
                manifest,
                bytes,
            };
            Ok((artifact, hit))
        }
    }
}

/// The manifest's digest, the bytes of the files, and whether all of them were there already.
async fn store_directory(
    store: &ArtifactStore,
    cache: &Arc<Cache>,
    redactor: &Redactor,
    what: &str,
    dir: PathBuf,
    artifact_type: ArtifactType,
    metadata: Map<String, Value>,
) -> Result<(Digest, u64, bool), StageError> {
    let listed = {
        let (dir, what, redactor) = (dir.clone(), what.to_owned(), redactor.clone());
        tokio::task::spawn_blocking(move || {
            is_directory(&dir, &what)?;
            let paths = list(&dir, &what)?;
            no_secret(&dir, &what, &paths, &redactor)?;
            Ok(paths)
        })
        .await
    };
    let paths = listed.map_err(|e| StageError::system(format!("cannot list {what}: {e}")))??;
    let files = stream::iter(paths)
        .map(|path| {
            let file = dir.join(&path);
            async move {
                let (sha256, bytes) = digest_of_file(&file).await?;
                Ok::<_, ArtifactError>(ManifestFile {
                    path,
                    sha256,
                    bytes,
                })
            }
        })
        .buffered(FILES_AT_A_TIME)
        .try_collect()
        .await
        .map_err(|e| stage_error(what, e))?;
    let manifest = Manifest::new(artifact_type, files, metadata);
    let files = stream::iter(manifest.files.clone())
        .map(|file| {
            let path = dir.join(&file.path);
            async move {
                let sent = store.put_file_as(&path, file.sha256, file.bytes).await?;
                cache.keep(&file.sha256, file.bytes, &path).await;
                Ok::<_, ArtifactError>(sent)
            }
        })
        .buffer_unordered(FILES_AT_A_TIME)
        .try_fold(false, |any, sent| std::future::ready(Ok(any || sent)));
    // Nobody is told of the manifest before both are done.
    let stored = futures::try_join!(store.put_manifest(&manifest), files);
    let (digest, sent) = stored.map_err(|e| stage_error(what, e))?;
    Ok((digest, manifest.bytes(), !sent))
}

/// Refuses files with the value of a secret in them: an output is kept, and read by others. Only an
/// attempt with secrets reads its outputs once more for it.
fn no_secret(
    dir: &Path,
    what: &str,
    paths: &[String],
    redactor: &Redactor,
) -> Result<(), StageError> {
    if redactor.is_empty() {
        return Ok(());
    }
    for path in paths {
        let file = dir.join(path);
        let read = |e| StageError::io("read", &file, e);
        let found = match redactor.find(path) {
            Some(name) => Some(name.clone()),
            None => redactor
                .find_in(fs::File::open(&file).map_err(read)?)
                .map_err(read)?,
        };
        if let Some(secret) = found {
            return Err(has_secret(&format!("{what}: `{path}`"), &secret));
        }
    }
    Ok(())
}

fn has_secret(what: &str, secret: &SecretName) -> StageError {
    StageError::user(format!(
        "{what} has the value of the secret `{secret}` in it, which would be stored for others to read"
    ))
}

fn stage_error(what: &str, error: ArtifactError) -> StageError {
    let mut out = StageError::storage(format!("cannot store {what}: {error}"));
    out.source = Some(Box::new(error));
    out
}

/// The directory of an output must still be one: whatever stands behind a link in its place is not
/// the stage's.
fn is_directory(dir: &Path, what: &str) -> Result<(), StageError> {
    match fs::symlink_metadata(dir) {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(StageError::user(format!(
            "{what} is no directory any more: the command must write into it, not replace it"
        ))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(StageError::user(format!(
            "{what} is missing: the command removed its directory"
        ))),
        Err(e) => Err(StageError::io("look at", dir, e)),
    }
}

/// The regular files below a directory, as paths of an artifact.
pub(crate) fn list(dir: &Path, what: &str) -> Result<Vec<String>, StageError> {
    let mut out = Vec::new();
    let mut below = vec![(dir.to_path_buf(), String::new(), 0)];
    while let Some((dir, prefix, depth)) = below.pop() {
        if depth > MAX_DEPTH {
            return Err(StageError::user(format!(
                "{what} has directories more than {MAX_DEPTH} deep"
            )));
        }
        let entries = fs::read_dir(&dir).map_err(|e| StageError::io("list", &dir, e))?;
        for entry in entries {
            let entry = entry.map_err(|e| StageError::io("list", &dir, e))?;
            let name = entry.file_name();
            let name = name.to_str().ok_or_else(|| {
                StageError::user(format!(
                    "{what} has a file whose name is not UTF-8: `{}`",
                    name.to_string_lossy().escape_debug()
                ))
            })?;
            let path = format!("{prefix}{name}");
            check_path(&path).map_err(|why| StageError::user(format!("{what}: {why}")))?;
            // Of the entry itself, not of what a link points to.
            let kind = entry
                .file_type()
                .map_err(|e| StageError::io("look at", &entry.path(), e))?;
            if kind.is_dir() {
                below.push((entry.path(), format!("{path}/"), depth + 1));
            } else if kind.is_file() {
                out.push(path);
            } else {
                let kind = if kind.is_symlink() {
                    "a symbolic link"
                } else {
                    "neither a file nor a directory"
                };
                return Err(StageError::user(format!(
                    "{what}: `{path}` is {kind}; only regular files can be stored"
                )));
            }
            if out.len() > MAX_FILES {
                return Err(StageError::user(format!(
                    "{what} has more than {MAX_FILES} files"
                )));
            }
        }
    }
    out.sort_unstable();
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::secrets::{Secret, Secrets};

    #[test]
    fn only_regular_files_below_the_directory_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("b/c")).unwrap();
        fs::write(dir.path().join("b/c/x"), "1").unwrap();
        fs::write(dir.path().join("a"), "2").unwrap();
        assert_eq!(list(dir.path(), "it").unwrap(), ["a", "b/c/x"]);
    }

    #[test]
    fn a_link_out_of_the_directory_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("secret")).unwrap();
        let error = list(dir.path(), "the output `o`").unwrap_err();
        assert!(
            error.message.contains("`secret` is a symbolic link"),
            "{error}"
        );
    }

    #[test]
    fn a_directory_that_was_replaced_by_a_link_or_removed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (link, gone) = (dir.path().join("link"), dir.path().join("gone"));
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let error = is_directory(&link, "the output `o`").unwrap_err();
        assert!(
            error.message.contains("is no directory any more"),
            "{error}"
        );
        let error = is_directory(&gone, "the output `o`").unwrap_err();
        assert!(error.message.contains("is missing"), "{error}");
        assert!(is_directory(dir.path(), "it").is_ok());
    }

    #[test]
    fn a_socket_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        assert!(list(dir.path(), "it").is_err());
    }

    #[test]
    fn a_name_that_is_no_text_is_refused() {
        use std::os::unix::ffi::OsStrExt;
        let dir = tempfile::tempdir().unwrap();
        let name = std::ffi::OsStr::from_bytes(b"a\xff\n\x1b[2J");
        fs::write(dir.path().join(name), "").unwrap();
        let told = list(dir.path(), "it").unwrap_err().message;
        assert!(told.contains("not UTF-8"), "{told}");
        assert!(!told.contains(char::is_control), "{told:?}");
    }

    #[test]
    fn a_file_with_the_value_of_a_secret_in_it_is_refused_without_telling_it() {
        let dir = tempfile::tempdir().unwrap();
        let value = Secret::new("planted-canary".to_owned().into()).unwrap();
        let redactor = Secrets::new([("key".parse().unwrap(), value)].into()).redactor();
        let check = || {
            let paths = list(dir.path(), "it").unwrap();
            no_secret(dir.path(), "the output `o`", &paths, &redactor)
        };
        fs::write(dir.path().join("a"), "harmless").unwrap();
        assert!(check().is_ok());
        fs::write(dir.path().join("b"), "x planted-canary y").unwrap();
        let error = check().unwrap_err();
        assert_eq!(
            error.message,
            "the output `o`: `b` has the value of the secret `key` in it, which would be stored for others to read"
        );
        fs::remove_file(dir.path().join("b")).unwrap();
        fs::write(dir.path().join("x-planted-canary"), "").unwrap();
        assert!(check().is_err());
    }
}
