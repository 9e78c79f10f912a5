//! The registry over gRPC: imports, aliases that several want to move, deletions.

use emberline_common::{
    artifact::{ArtifactStore, Manifest, ManifestFile},
    ids::Digest,
    spec::ArtifactType,
};
use emberline_proto::v1::{
    AnnotateVersionRequest, CollectGarbageRequest, DeleteVersionRequest, GetModelRequest,
    GetModelVersionRequest, ImportVersionRequest, ImportedFrom, ListModelsRequest,
    ModelVersionView, RemoveAliasRequest, SetAliasRequest,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::*;

/// Stores a model artifact of one file, and gives its manifest's digest and the file's.
async fn model(cluster: &Cluster, kind: ArtifactType, content: &str) -> (Digest, Digest) {
    let bytes = content.to_owned().into();
    let file = cluster.artifacts.put_bytes(bytes).await.unwrap();
    let files = vec![ManifestFile {
        path: "weights.bpk".to_owned(),
        sha256: file,
        bytes: content.len() as u64,
    }];
    let manifest = Manifest::new(kind, files, Default::default());
    let digest = cluster.artifacts.put_manifest(&manifest).await.unwrap();
    (digest, file)
}

fn request(manifest: &Digest) -> ImportVersionRequest {
    ImportVersionRequest {
        model: "m".to_owned(),
        manifest: manifest.to_string(),
        metrics_json: r#"{"f1":0.5}"#.to_owned(),
        imported: Some(ImportedFrom {
            model: "theirs".to_owned(),
            version: 4,
            created_at: Some(Default::default()),
        }),
        ..Default::default()
    }
}

async fn try_import(
    cluster: &Cluster,
    request: ImportVersionRequest,
) -> Result<ModelVersionView, Status> {
    let imported = cluster.models().await.import_version(request).await?;
    Ok(imported.into_inner().version.unwrap())
}

async fn import(cluster: &Cluster, content: &str, alias: &str) -> ModelVersionView {
    let (manifest, _) = model(cluster, ArtifactType::Model, content).await;
    let request = ImportVersionRequest {
        alias: alias.to_owned(),
        ..request(&manifest)
    };
    try_import(cluster, request).await.unwrap()
}

async fn set(cluster: &Cluster, version: &str, expected: Option<u32>) -> Result<u32, Status> {
    let request = SetAliasRequest {
        model: "m".to_owned(),
        alias: "champion".to_owned(),
        version: version.to_owned(),
        expected,
    };
    let set = cluster.models().await.set_alias(request).await?;
    Ok(set.into_inner().version.unwrap().version)
}

async fn delete(cluster: &Cluster, version: &str) -> Result<u32, Status> {
    let request = DeleteVersionRequest {
        model: "m".to_owned(),
        version: version.to_owned(),
    };
    let deleted = cluster.models().await.delete_version(request).await?;
    Ok(deleted.into_inner().version.unwrap().version)
}

async fn get(cluster: &Cluster, version: &str) -> Result<ModelVersionView, Status> {
    let request = GetModelVersionRequest {
        model: "m".to_owned(),
        version: version.to_owned(),
    };
    let found = cluster.models().await.get_model_version(request).await?;
    Ok(found.into_inner().version.unwrap())
}

#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: Result<T, Status>, code: Code, reason: &str, part: &str) {
    let status = outcome.unwrap_err();
    let info = status.get_details_error_info().unwrap();
    assert_eq!(
        (status.code(), info.reason.as_str()),
        (code, reason),
        "{status:?}"
    );
    assert!(status.message().contains(part), "{status:?}");
}

#[tokio::test]
async fn an_imported_version_is_found_by_number_and_alias_and_after_a_restart() {
    let cluster = Cluster::start().await;
    let first = import(&cluster, "a", "champion").await;
    assert_eq!(
        (first.version, first.aliases.as_slice()),
        (1, &["champion".to_owned()][..])
    );
    let again = import(&cluster, "a", "champion").await;
    assert_eq!(again, first, "the same artifact is the same version");
    import(&cluster, "b", "").await;
    let cluster = cluster.restart().await;
    assert_eq!(get(&cluster, "champion").await.unwrap(), first);
    assert_eq!(first.imported.as_ref().unwrap().version, 4);
    assert_eq!(
        get(&cluster, "2").await.unwrap().metrics_json,
        r#"{"f1":0.5}"#
    );
    let listed = cluster
        .models()
        .await
        .list_models(ListModelsRequest::default())
        .await;
    let listed = listed.unwrap().into_inner().models;
    assert_eq!((listed[0].latest_version, listed[0].versions), (2, 2));
    let missing = Code::NotFound;
    refused(
        get(&cluster, "3").await,
        missing,
        "NOT_FOUND",
        "has no version `3`",
    );
    refused(
        get(&cluster, "none").await,
        missing,
        "NOT_FOUND",
        "has no version `none`",
    );
    let invalid = Code::InvalidArgument;
    refused(
        get(&cluster, "0").await,
        invalid,
        "INVALID_FIELD",
        "numbered from 1",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_who_move_an_alias_at_once_exactly_one_wins() {
    let cluster = Cluster::start().await;
    for content in ["a", "b", "c"] {
        import(&cluster, content, "").await;
    }
    let mut now = 0;
    for _ in 0..8 {
        // Two that it does not name now: who moves it to where it is moves nothing.
        let others = (1..=3).filter(|version| *version != now);
        let others: Vec<String> = others.map(|version: u32| version.to_string()).collect();
        let (first, second) = tokio::join!(
            set(&cluster, &others[0], Some(now)),
            set(&cluster, &others[1], Some(now))
        );
        let (won, lost) = match (first, second) {
            (Ok(won), Err(lost)) | (Err(lost), Ok(won)) => (won, lost),
            other => panic!("one wins, and one does not: {other:?}"),
        };
        let part = format!("names version {won}");
        refused::<u32>(Err(lost), Code::FailedPrecondition, "ALIAS_MOVED", &part);
        assert_eq!(get(&cluster, "champion").await.unwrap().version, won);
        now = won;
    }
    let request = RemoveAliasRequest {
        model: "m".to_owned(),
        alias: "champion".to_owned(),
        expected: Some(now + 1),
    };
    let removed = cluster.models().await.remove_alias(request.clone()).await;
    refused(
        removed,
        Code::FailedPrecondition,
        "ALIAS_MOVED",
        "names version",
    );
    let request = RemoveAliasRequest {
        expected: Some(now),
        ..request
    };
    cluster.models().await.remove_alias(request).await.unwrap();
    refused(
        get(&cluster, "champion").await,
        Code::NotFound,
        "NOT_FOUND",
        "`champion`",
    );
}

#[tokio::test]
async fn what_is_not_stored_whole_or_no_model_is_not_imported() {
    let cluster = Cluster::start().await;
    let refuse = async |request, code, reason: &str, part: &str| {
        refused(try_import(&cluster, request).await, code, reason, part);
    };
    let never = request(&Digest::of(b"never"));
    refuse(never, Code::NotFound, "NOT_FOUND", "not").await;
    let (files, _) = model(&cluster, ArtifactType::Files, "files").await;
    let part = "of type `files`, not `model`";
    refuse(
        request(&files),
        Code::InvalidArgument,
        "INVALID_FIELD",
        part,
    )
    .await;
    let (manifest, file) = model(&cluster, ArtifactType::Model, "gone").await;
    std::fs::remove_file(cluster.object(ArtifactStore::key(&file).as_ref())).unwrap();
    let missing = Code::FailedPrecondition;
    refuse(
        request(&manifest),
        missing,
        "FILE_NOT_STORED",
        "`weights.bpk`",
    )
    .await;
    let (good, _) = model(&cluster, ArtifactType::Model, "good").await;
    let good = request(&good);
    let invalid = Code::InvalidArgument;
    for (request, field) in [
        (
            ImportVersionRequest {
                model: "../m".to_owned(),
                ..good.clone()
            },
            "model:",
        ),
        (
            ImportVersionRequest {
                metrics_json: "[]".to_owned(),
                ..good.clone()
            },
            "metrics_json:",
        ),
        (
            ImportVersionRequest {
                schema_json: "{".to_owned(),
                ..good.clone()
            },
            "schema_json:",
        ),
        (
            ImportVersionRequest {
                imported: None,
                ..good.clone()
            },
            "imported:",
        ),
        (
            ImportVersionRequest {
                run: "r".to_owned(),
                ..good.clone()
            },
            "task:",
        ),
        (
            ImportVersionRequest {
                notes: "\0".to_owned(),
                ..good.clone()
            },
            "notes:",
        ),
        (
            ImportVersionRequest {
                alias: "7".to_owned(),
                ..good.clone()
            },
            "alias:",
        ),
        (
            ImportVersionRequest {
                lineage: [("raw/data".to_owned(), "x".to_owned())].into(),
                ..good.clone()
            },
            "lineage:",
        ),
        (
            ImportVersionRequest {
                tags: [(String::new(), String::new())].into(),
                ..good.clone()
            },
            "tags:",
        ),
    ] {
        refuse(request, invalid, "INVALID_FIELD", field).await;
    }
    let request = GetModelRequest {
        model: "m".to_owned(),
    };
    let none = cluster.models().await.get_model(request).await;
    assert_eq!(
        none.unwrap_err().code(),
        Code::NotFound,
        "nothing was registered"
    );
}

#[tokio::test]
async fn a_version_is_annotated_and_deleted_when_no_alias_names_it() {
    let cluster = Cluster::start().await;
    let version = import(&cluster, "a", "champion").await;
    let request = AnnotateVersionRequest {
        model: "m".to_owned(),
        version: "champion".to_owned(),
        set_tags: [("team".to_owned(), "vision".to_owned())].into(),
        remove_tags: Vec::new(),
        notes: Some("good".to_owned()),
    };
    let noted = cluster.models().await.annotate_version(request).await;
    let noted = noted.unwrap().into_inner().version.unwrap();
    assert_eq!(
        (noted.notes.as_str(), noted.tags["team"].as_str()),
        ("good", "vision")
    );
    let in_service = Code::FailedPrecondition;
    refused(
        delete(&cluster, "1").await,
        in_service,
        "IN_SERVICE",
        "alias `champion`",
    );
    let second = import(&cluster, "b", "champion").await;
    assert_eq!(delete(&cluster, "1").await.unwrap(), 1);

    // What it kept alive is the collector's now, and the other's is not.
    let everything = CollectGarbageRequest {
        min_age_seconds: Some(0),
        ..Default::default()
    };
    let collected = cluster.blobs().await.collect_garbage(everything).await;
    assert_eq!(collected.unwrap().into_inner().removed_objects, 2);
    let is_stored = |version: ModelVersionView| {
        let manifest: Digest = version.artifact.unwrap().manifest.parse().unwrap();
        let key = ArtifactStore::key(&manifest);
        cluster.object(key.as_ref()).exists()
    };
    assert!(!is_stored(version) && is_stored(second));
}
