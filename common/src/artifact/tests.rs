#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use bytes::Bytes;
use futures::TryStreamExt as _;
use serde_json::Map;

use super::*;
use crate::{ids::Digest, spec::ArtifactType};

fn local() -> (tempfile::TempDir, ArtifactStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ArtifactStore::open(&format!("file://{}/objects", dir.path().display())).unwrap();
    (dir, store)
}

fn object(dir: &tempfile::TempDir, digest: &Digest) -> std::path::PathBuf {
    dir.path()
        .join("objects")
        .join(ArtifactStore::key(digest).to_string())
}

/// 20 MiB and a bit: several parts, several ranges.
fn large() -> Vec<u8> {
    (0..20_000_003_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

#[tokio::test]
async fn what_was_stored_is_read_back_by_every_way_of_reading() {
    let (dir, store) = local();
    let bytes = large();
    let source = dir.path().join("source");
    std::fs::write(&source, &bytes).unwrap();

    let (digest, size) = store.put_file(&source).await.unwrap();
    assert_eq!((digest, size), (Digest::of(&bytes), bytes.len() as u64));
    assert_eq!(store.get_bytes(&digest, size).await.unwrap(), bytes);
    let dest = dir.path().join("dest");
    store.get_file(&digest, size, &dest).await.unwrap();
    assert_eq!(std::fs::read(&dest).unwrap(), bytes);
    let pieces: Vec<Bytes> = store.read(&digest).try_collect().await.unwrap();
    assert_eq!(pieces.concat(), bytes);
}

#[tokio::test]
async fn a_stream_is_stored_under_the_digest_that_it_turns_out_to_have() {
    let (dir, store) = local();
    for bytes in [Vec::new(), b"small".to_vec(), large()] {
        let mut writer = store.writer();
        for piece in bytes.chunks(1 << 20) {
            writer.write(Bytes::copy_from_slice(piece)).await.unwrap();
        }
        let (digest, size) = writer.finish(None).await.unwrap();
        assert_eq!(store.get_bytes(&digest, size).await.unwrap(), bytes);
    }
    let staging = dir.path().join("objects/staging");
    let left = std::fs::read_dir(staging).map_or(0, std::iter::Iterator::count);
    assert_eq!(left, 0, "an upload was left in staging");
}

#[tokio::test]
async fn bytes_other_than_announced_are_not_stored() {
    let (_dir, store) = local();
    let mut writer = store.writer();
    writer.write(Bytes::from_static(b"one")).await.unwrap();
    let error = writer.finish(Some(Digest::of(b"other"))).await.unwrap_err();
    assert!(matches!(error, ArtifactError::Mismatch { .. }), "{error}");
    assert!(!store.has(&Digest::of(b"one"), 3).await.unwrap());
    assert!(!store.has(&Digest::of(b"other"), 3).await.unwrap());
}

#[tokio::test]
async fn a_corrupted_object_is_refused_by_every_way_of_reading() {
    let (dir, store) = local();
    let digest = store
        .put_bytes(Bytes::from_static(b"the truth"))
        .await
        .unwrap();
    std::fs::write(object(&dir, &digest), b"the lies!").unwrap();

    let is_corrupted = |e: &ArtifactError| matches!(e, ArtifactError::Corrupted { .. });
    assert!(is_corrupted(
        &store.get_bytes(&digest, 100).await.unwrap_err()
    ));
    let dest = dir.path().join("dest");
    assert!(is_corrupted(
        &store.get_file(&digest, 9, &dest).await.unwrap_err()
    ));
    let streamed = store.read(&digest).try_collect::<Vec<_>>().await;
    assert!(is_corrupted(&streamed.unwrap_err()));
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .collect();
    assert_eq!(
        left,
        [dir.path().join("objects")],
        "something half-written is visible"
    );
}

#[tokio::test]
async fn a_cut_object_is_refused() {
    let (dir, store) = local();
    let digest = store.put_bytes(Bytes::from_static(b"whole")).await.unwrap();
    std::fs::write(object(&dir, &digest), b"wh").unwrap();
    let error = store
        .get_file(&digest, 5, &dir.path().join("dest"))
        .await
        .unwrap_err();
    assert!(matches!(error, ArtifactError::Corrupted { .. }), "{error}");
}

#[tokio::test]
async fn a_missing_object_is_named() {
    let (dir, store) = local();
    let digest = Digest::of(b"never stored");
    let error = store.get_bytes(&digest, 10).await.unwrap_err();
    assert!(error.to_string().contains(&digest.to_string()), "{error}");
    assert_eq!(error.bad_digest(), Some(digest));
    let error = store
        .get_file(&digest, 1, &dir.path().join("dest"))
        .await
        .unwrap_err();
    assert!(matches!(error, ArtifactError::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn an_object_over_the_limit_is_not_read() {
    let store = ArtifactStore::open("memory:").unwrap();
    let digest = store.put_bytes(Bytes::from_static(b"12345")).await.unwrap();
    let error = store.get_bytes(&digest, 4).await.unwrap_err();
    assert!(
        matches!(
            error,
            ArtifactError::TooLarge {
                bytes: 5,
                limit: 4,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_manifest_that_climbs_out_is_refused_both_ways() {
    let store = ArtifactStore::open("memory:").unwrap();
    for path in [
        "../x",
        "/etc/passwd",
        "a//b",
        "a/./b",
        "a\\b",
        "a\nb",
        "",
        "a/..",
    ] {
        let file = ManifestFile {
            path: path.to_owned(),
            sha256: Digest::of(b""),
            bytes: 0,
        };
        let manifest = Manifest::new(ArtifactType::Files, vec![file], Map::new());
        let error = store.put_manifest(&manifest).await.unwrap_err();
        assert!(
            matches!(error, ArtifactError::Manifest { .. }),
            "{path:?}: {error}"
        );
        let digest = store
            .put_bytes(serde_json::to_vec(&manifest).unwrap().into())
            .await
            .unwrap();
        let error = store.get_manifest(&digest).await.unwrap_err();
        assert!(
            matches!(error, ArtifactError::Manifest { .. }),
            "{path:?}: {error}"
        );
    }
}

#[test]
fn an_unusable_url_is_named_without_its_password() {
    for url in [
        "objects",
        "ftp://host/x",
        "file:relative?x=1",
        "s3://user:secret@bucket/x",
    ] {
        let error = ArtifactStore::open(url).unwrap_err().to_string();
        assert!(error.contains("cannot use the object store"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[tokio::test]
async fn a_damaged_object_is_healed_by_the_next_put_of_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = ArtifactStore::open(&format!("file://{}", dir.path().display())).unwrap();
    let digest = store.put_bytes(Bytes::from_static(b"abc")).await.unwrap();
    let object = dir.path().join(ArtifactStore::key(&digest).as_ref());
    std::fs::write(&object, b"abd").unwrap();
    assert!(store.get_bytes(&digest, 3).await.is_err());
    store.put_bytes(Bytes::from_static(b"abc")).await.unwrap();
    assert_eq!(store.get_bytes(&digest, 3).await.unwrap(), "abc");
}

#[test]
fn a_path_that_is_both_a_file_and_a_directory_is_refused() {
    let file = |path: &str| ManifestFile {
        path: path.to_owned(),
        sha256: Digest::of(b"x"),
        bytes: 1,
    };
    let files = vec![file("a"), file("a.b"), file("a/b")];
    let manifest = Manifest::new(
        crate::spec::ArtifactType::Files,
        files,
        serde_json::Map::new(),
    );
    assert!(manifest.check().is_err());
}
