//! From an `ImportVersion` request to a command: every field checked, and the artifact looked at.

use std::collections::BTreeMap;

use emberline_common::{
    artifact::Manifest,
    ids::Digest,
    run_view::{ArtifactRef, CodeRevision, Imported, MadeBy, ModelRegistration},
    spec::ArtifactType,
    wire,
};
use emberline_proto::v1::{self, ImportVersionRequest};
use tonic::Status;

use super::{Context, status, translate};
use crate::{engine::api::ImportedVersion, holds::Hold};

/// The most files of an imported model; a bundle has two.
const MAX_FILES: usize = 1000;
/// The longest text that names a repository or a commit.
const MAX_CODE_BYTES: usize = 2048;

/// Checks a request, and that all of its artifact is stored. It is held until the returned hold is
/// dropped.
pub(super) async fn import(
    context: &Context,
    request: ImportVersionRequest,
) -> Result<(ImportedVersion, Hold), Status> {
    let digest: Digest = wire::id("manifest", &request.manifest).map_err(translate::bad)?;
    let hold = context.holds.hold(vec![digest]).await;
    let manifest = context.artifacts.get_manifest(&digest).await;
    let manifest = manifest.map_err(|e| status::from_artifact(&e))?;
    check(&manifest).map_err(|why| status::bad_field("manifest", why))?;
    let mut all: Vec<Digest> = manifest.files.iter().map(|file| file.sha256).collect();
    all.push(digest);
    let both = context.holds.hold(all).await;
    drop(hold);
    for file in &manifest.files {
        // Under its digest lies only what has that digest: `PutBlob` has seen to it.
        let there = context.artifacts.has(&file.sha256, file.bytes).await;
        if !there.map_err(|e| status::from_artifact(&e))? {
            return Err(status::failed_precondition(
                "FILE_NOT_STORED",
                format!(
                    "the file `{}` ({} bytes, SHA-256 {}) is not stored: send it with PutBlob first",
                    file.path, file.bytes, file.sha256
                ),
            ));
        }
    }
    let artifact = ArtifactRef {
        name: wire::id("manifest", "model").map_err(translate::bad)?,
        manifest: digest,
        bytes: manifest.bytes(),
    };
    Ok((version(request, artifact).map_err(translate::bad)?, both))
}

fn check(manifest: &Manifest) -> Result<(), String> {
    if manifest.artifact_type != ArtifactType::Model {
        return Err(format!(
            "the artifact is of type `{}`, not `model`",
            manifest.artifact_type.as_str()
        ));
    }
    if manifest.files.len() > MAX_FILES {
        return Err(format!(
            "the artifact has {} files, at most {MAX_FILES} are taken",
            manifest.files.len()
        ));
    }
    Ok(())
}

fn version(
    request: ImportVersionRequest,
    artifact: ArtifactRef,
) -> Result<ImportedVersion, wire::WireError> {
    let lineage = request.lineage.into_iter().map(|(name, manifest)| {
        let digest = wire::id("lineage", &manifest)?;
        check_text("lineage", &name)?;
        Ok((name, digest))
    });
    let made_by = match request.run.as_str() {
        "" => None,
        run => Some(MadeBy {
            run: wire::id("run", run)?,
            task: wire::id("task", &request.task)?,
            pipeline: wire::id("pipeline", &request.pipeline)?,
            pipeline_revision: wire::id("pipeline_revision", &request.pipeline_revision)?,
        }),
    };
    let imported = wire::required("imported", request.imported)?;
    Ok(ImportedVersion {
        lineage: lineage.collect::<Result<BTreeMap<_, _>, wire::WireError>>()?,
        imported: Imported {
            model: wire::id("imported.model", &imported.model)?,
            version: imported.version,
            created_at: wire::required("imported.created_at", imported.created_at)?
                .try_into()
                .map_err(|e: wire::WireError| e.within("imported.created_at"))?,
            made_by,
        },
        code: request.code.map(code).transpose()?,
        tags: request.tags.into_iter().collect(),
        expected: request.expected,
        registration: ModelRegistration {
            model: wire::id("model", &request.model)?,
            alias: wire::optional_id("alias", &request.alias)?,
            artifact,
            metrics: wire::json_object("metrics_json", &request.metrics_json)?,
            schema: wire::json("schema_json", &request.schema_json)?,
            notes: request.notes,
        },
    })
}

fn code(code: v1::CodeRevision) -> Result<CodeRevision, wire::WireError> {
    check_text("code.repository", &code.repository)?;
    check_text("code.revision", &code.revision)?;
    Ok(CodeRevision {
        repository: code.repository,
        revision: code.revision,
        dirty: code.dirty,
    })
}

fn check_text(field: &str, text: &str) -> Result<(), wire::WireError> {
    if text.len() > MAX_CODE_BYTES || text.chars().any(char::is_control) {
        return Err(wire::WireError::new(
            field,
            format!("use at most {MAX_CODE_BYTES} bytes and no control characters"),
        ));
    }
    Ok(())
}
