//! Blobs, artifacts, and the collector.

use emberline_common::{
    artifact::{ArtifactStore, Manifest, ManifestFile},
    ids::Digest,
    spec::ArtifactType,
};
use emberline_proto::v1::{
    ArtifactRef, CollectGarbageRequest, CollectGarbageResponse, GetArtifactRequest, PutBlobRequest,
    ReadBlobRequest, RunState, SubmittedFile,
};
use object_store::ObjectStoreExt as _;
use tonic::Code;

use crate::harness::*;

async fn put(cluster: &Cluster, digest: &Digest, pieces: &[&[u8]]) -> Result<u64, tonic::Status> {
    let mut sha256 = digest.to_string();
    let requests: Vec<PutBlobRequest> = pieces
        .iter()
        .map(|data| PutBlobRequest {
            sha256: std::mem::take(&mut sha256),
            data: data.to_vec(),
        })
        .collect();
    let mut blobs = cluster.blobs().await;
    let stored = blobs.put_blob(tokio_stream::iter(requests)).await?;
    Ok(stored.into_inner().bytes)
}

async fn read(cluster: &Cluster, digest: &Digest) -> Result<Vec<u8>, tonic::Status> {
    let request = ReadBlobRequest {
        sha256: digest.to_string(),
    };
    let mut pieces = cluster.blobs().await.read_blob(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.message().await? {
        assert!(piece.data.len() <= 256 << 10);
        bytes.extend_from_slice(&piece.data);
    }
    Ok(bytes)
}

async fn collect(cluster: &Cluster, dry_run: bool) -> CollectGarbageResponse {
    let request = CollectGarbageRequest {
        dry_run,
        min_age_seconds: Some(0),
        forget_runs_older_than_seconds: None,
    };
    let found = cluster.blobs().await.collect_garbage(request).await;
    found.unwrap().into_inner()
}

async fn artifact(cluster: &Cluster, content: &str) -> (ArtifactRef, Digest) {
    let file = cluster
        .artifacts
        .put_bytes(content.to_owned().into())
        .await
        .unwrap();
    let files = vec![ManifestFile {
        path: "data.txt".to_owned(),
        sha256: file,
        bytes: content.len() as u64,
    }];
    let manifest = Manifest::new(ArtifactType::Files, files, Default::default());
    let digest = cluster.artifacts.put_manifest(&manifest).await.unwrap();
    let reference = ArtifactRef {
        name: "out".to_owned(),
        manifest: digest.to_string(),
        bytes: content.len() as u64,
    };
    (reference, file)
}

fn is_stored(cluster: &Cluster, digest: &Digest) -> bool {
    cluster.object(ArtifactStore::key(digest).as_ref()).exists()
}

#[tokio::test]
async fn a_blob_is_read_as_it_was_stored() {
    let cluster = Cluster::start().await;
    let content = vec![7_u8; 700_000];
    let digest = Digest::of(&content);
    let stored = put(
        &cluster,
        &digest,
        &[&content[..300_000], &content[300_000..]],
    )
    .await;
    assert_eq!(stored.unwrap(), 700_000);
    assert_eq!(read(&cluster, &digest).await.unwrap(), content);
    let missing = read(&cluster, &Digest::of(b"never")).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
}

#[tokio::test]
async fn a_blob_that_is_not_what_was_announced_is_not_stored() {
    let cluster = Cluster::start().await;
    let announced = Digest::of(b"one");
    let refused = put(&cluster, &announced, &[b"two"]).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    assert!(!is_stored(&cluster, &announced) && !is_stored(&cluster, &Digest::of(b"two")));
}

#[tokio::test]
async fn a_corrupted_blob_is_data_loss() {
    let cluster = Cluster::start().await;
    let digest = cluster.artifacts.put_bytes("good".into()).await.unwrap();
    std::fs::write(cluster.object(ArtifactStore::key(&digest).as_ref()), "evil").unwrap();
    let refused = read(&cluster, &digest).await.unwrap_err();
    assert_eq!(refused.code(), Code::DataLoss, "{refused:?}");
}

#[tokio::test]
async fn a_submission_whose_file_is_not_stored_is_refused() {
    let cluster = Cluster::start().await;
    let file = SubmittedFile {
        path: "train.py".to_owned(),
        sha256: Digest::of(b"print()").to_string(),
        bytes: 7,
        executable: false,
    };
    let mut request = submission(ONE);
    request.files = vec![file];
    let refused = cluster.runs().await.submit_run(request.clone()).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains("train.py"), "{refused:?}");
    put(&cluster, &Digest::of(b"print()"), &[b"print()"])
        .await
        .unwrap();
    cluster.runs().await.submit_run(request).await.unwrap();
}

#[tokio::test]
async fn the_collector_keeps_what_is_referred_to_and_removes_the_rest() {
    let cluster = Cluster::start().await;
    let (kept, kept_file) = artifact(&cluster, "kept").await;
    let (lost, lost_file) = artifact(&cluster, "lost").await;
    let yaml = "pipeline: out\nstages:\n  a:\n    kind: noop\n";
    let mut worker = FakeWorker::ready(&cluster, "w", 1).await;
    let run = cluster.submit(yaml).await;
    let id = worker.assignments().await.remove(0).id.unwrap();
    let mut report = success(id);
    report.outputs = vec![kept.clone()];
    worker.report(vec![report]).await;
    assert_eq!(cluster.ends(&run).await, RunState::Succeeded);

    let would = collect(&cluster, true).await;
    assert_eq!(would.removed_objects, 2, "{would:?}");
    assert!(is_stored(&cluster, &lost_file), "a dry run removes nothing");
    let did = collect(&cluster, false).await;
    assert_eq!((did.removed_objects, did.removed.len()), (2, 2), "{did:?}");
    let lost: Digest = lost.manifest.parse().unwrap();
    assert!(!is_stored(&cluster, &lost_file) && !is_stored(&cluster, &lost));
    assert!(is_stored(&cluster, &kept_file));

    // It is still there for who asks by name, after a restart too.
    drop(worker);
    let cluster = cluster.restart().await;
    assert_eq!(collect(&cluster, false).await.removed_objects, 0);
    let request = GetArtifactRequest {
        artifact: format!("{run}/a/out"),
    };
    let found = cluster.blobs().await.get_artifact(request).await;
    let found = found.unwrap().into_inner();
    assert_eq!((found.manifest, found.files.len()), (kept.manifest, 1));
    assert_eq!(cluster.get(&run).await.pipeline_yaml, yaml);
}

#[tokio::test]
async fn what_is_young_is_kept() {
    let cluster = Cluster::start().await;
    artifact(&cluster, "young").await;
    let request = CollectGarbageRequest::default();
    let found = cluster.blobs().await.collect_garbage(request).await;
    let found = found.unwrap().into_inner();
    assert_eq!(
        (found.removed_objects, found.young_objects),
        (0, 2),
        "{found:?}"
    );
}

#[tokio::test]
async fn forgotten_runs_leave_nothing_behind() {
    let cluster = Cluster::start().await;
    let _work = FakeWorker::ready(&cluster, "w", 1).await.work();
    let run = cluster.submit(ONE).await;
    cluster.ends(&run).await;
    let log = object_store::path::Path::from("predictions/production/m/1/2026-11-26/w-1.parquet");
    let store = cluster.artifacts.raw();
    store.put(&log, "rows".into()).await.unwrap();
    collect(&cluster, false).await;
    store.head(&log).await.expect("logs of predictions stay");
    let request = CollectGarbageRequest {
        min_age_seconds: Some(0),
        forget_runs_older_than_seconds: Some(0),
        ..Default::default()
    };
    let found = soon("the archive", async {
        loop {
            let found = cluster.blobs().await.collect_garbage(request).await;
            let found = found.unwrap().into_inner();
            if found.forgotten_runs > 0 {
                return found;
            }
        }
    })
    .await;
    assert_eq!(found.forgotten_runs, 1, "{found:?}");
    // What the archive was about to refer to is held for a moment more.
    soon("an empty store", async {
        while collect(&cluster, false).await.kept_objects > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn names_of_artifacts_that_could_climb_are_refused() {
    let cluster = Cluster::start().await;
    for bad in [
        "",
        "x",
        "a/b",
        "../../etc/passwd",
        "r/../x",
        "a/b/c/d",
        "r/a/%2e%2e",
        "r/a/..\\x",
        "r/a/x#y",
        "r/a/x?y",
        "r/a/x\0",
        "file:///etc/passwd",
    ] {
        let request = GetArtifactRequest {
            artifact: bad.to_owned(),
        };
        let refused = cluster.blobs().await.get_artifact(request).await;
        assert_eq!(
            refused.unwrap_err().code(),
            Code::InvalidArgument,
            "{bad:?}"
        );
    }
}
