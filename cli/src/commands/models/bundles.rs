//! `models export` and `models import`: versions as files.

use std::path::{Path, PathBuf};

use emberline_common::{
    artifact::MAX_MANIFEST_BYTES,
    run_view::{CodeRevision, MadeBy},
    wire,
};
use emberline_proto::v1::{
    self, GetArtifactRequest, ImportVersionRequest, ImportedFrom, ModelVersionView,
};
use emberline_train::{Bundle, BundleError, bundle::About};
use emberline_worker::documents::{MODEL_FILE, WEIGHTS_FILE};
use serde_json::json;

use super::say;
use crate::{
    args::Format,
    client::Cluster,
    exit::Exit,
    fetch,
    output::{self, bytes, clean},
    upload,
};

/// The largest file of a model that a bundle has room for.
const MAX_FILE_BYTES: u64 = 2 << 30;

/// Runs what computes for a while off the threads that wait.
async fn compute<T: Send + 'static>(
    what: impl FnOnce() -> Result<T, BundleError> + Send + 'static,
) -> anyhow::Result<Result<T, BundleError>> {
    Ok(tokio::task::spawn_blocking(what).await?)
}

/// Reads and checks a bundle.
pub async fn open(file: &Path) -> anyhow::Result<Bundle> {
    let path = file.to_owned();
    let opened = compute(move || Bundle::open(&path)).await?;
    Ok(opened.map_err(|e| Exit::input(format!("`{}`: {e}", file.display())))?)
}

/// Writes a version as a bundle.
pub async fn export(
    cluster: &Cluster,
    version: ModelVersionView,
    file: Option<PathBuf>,
    format: Format,
) -> anyhow::Result<()> {
    let name = format!("{} version {}", clean(&version.model), version.version);
    let manifest = version.artifact.clone().unwrap_or_default().manifest;
    let request = GetArtifactRequest {
        artifact: manifest.clone(),
    };
    let artifact = cluster
        .artifacts()
        .get_artifact(request)
        .await?
        .into_inner();
    let manifest = fetch::bytes(cluster, &manifest, MAX_MANIFEST_BYTES).await?;
    let mut parts = Vec::new();
    for path in [MODEL_FILE, WEIGHTS_FILE] {
        let found = artifact.files.iter().find(|file| file.path == path);
        let found = found.ok_or_else(|| {
            Exit::input(format!(
                "{name} has no `{path}`: it is no model of a `train` stage"
            ))
        })?;
        parts.push(fetch::bytes(cluster, &found.sha256, MAX_FILE_BYTES).await?);
    }
    let about = about(&version).map_err(|e| Exit::cluster(format!("{name}: {e}")))?;
    let file =
        file.unwrap_or_else(|| PathBuf::from(format!("{}-{}.bundle", about.model, about.version)));
    let path = file.clone();
    let written = compute(move || {
        let [document, weights] = <[Vec<u8>; 2]>::try_from(parts).unwrap_or_default();
        let bundle = Bundle::new(about, &manifest, document, weights)?;
        write(&bundle, &path).map_err(BundleError::Write)
    });
    let size = written.await?.map_err(|e| match e {
        BundleError::Write(e) => Exit::input(format!("cannot write `{}`: {e}", file.display())),
        e => Exit::input(format!("{name} cannot become a bundle: {e}")),
    })?;
    if format == Format::Json {
        return output::json(&json!({
            "model": version.model, "version": version.version,
            "file": file.display().to_string(), "bytes": size,
        }));
    }
    let shown = clean(&file.display().to_string());
    Ok(output::line(format!(
        "wrote {name} to {shown} ({})",
        bytes(size)
    ))?)
}

/// Whole or not at all: under its name only when it is complete.
fn write(bundle: &Bundle, path: &Path) -> std::io::Result<u64> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let all = || {
        let file = std::fs::File::create(&partial)?;
        let mut out = std::io::BufWriter::new(file);
        bundle.write(&mut out).map_err(std::io::Error::other)?;
        let file = out
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)?;
        file.sync_all()?;
        std::fs::rename(&partial, path)?;
        Ok(file.metadata()?.len())
    };
    let written = all();
    if written.is_err() {
        // What could not be written is no use to anyone; the first error is what counts.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

fn about(version: &ModelVersionView) -> Result<About, wire::WireError> {
    let made_by = match version.run.as_str() {
        "" => None,
        run => Some(MadeBy {
            run: wire::id("run", run)?,
            task: wire::id("task", &version.task)?,
            pipeline: wire::id("pipeline", &version.pipeline)?,
            pipeline_revision: wire::id("pipeline_revision", &version.pipeline_revision)?,
        }),
    };
    let lineage = version.lineage.iter();
    let lineage = lineage.map(|(name, digest)| Ok((name.clone(), wire::id("lineage", digest)?)));
    Ok(About {
        model: wire::id("model", &version.model)?,
        version: version.version,
        created_at: wire::required("created_at", version.created_at)?.try_into()?,
        metrics: wire::json_object("metrics_json", &version.metrics_json)?,
        notes: version.notes.clone(),
        tags: version.tags.clone().into_iter().collect(),
        lineage: lineage.collect::<Result<_, wire::WireError>>()?,
        code: version.code.as_ref().map(|code| CodeRevision {
            repository: code.repository.clone(),
            revision: code.revision.clone(),
            dirty: code.dirty,
        }),
        parent: (version.parent > 0).then_some(version.parent),
        made_by,
    })
}

/// Registers the version in a bundle: its files first, then what refers to them.
pub async fn import(
    cluster: &Cluster,
    bundle: Bundle,
    name: Option<String>,
    alias: Option<String>,
    expected: Option<u32>,
    format: Format,
) -> anyhow::Result<()> {
    for file in bundle.artifact_files() {
        upload::blob(cluster, file.to_vec()).await?;
    }
    let manifest = upload::blob(cluster, bundle.manifest().to_vec()).await?;
    let about = bundle.about().clone();
    let text = |of: fn(&MadeBy) -> String| about.made_by.as_ref().map(of).unwrap_or_default();
    let request = ImportVersionRequest {
        model: name.unwrap_or_else(|| about.model.to_string()),
        manifest: manifest.to_string(),
        metrics_json: wire::object_text(&about.metrics),
        schema_json: bundle.schema().to_string(),
        run: text(|by| by.run.to_string()),
        task: text(|by| by.task.to_string()),
        pipeline: text(|by| by.pipeline.to_string()),
        pipeline_revision: text(|by| by.pipeline_revision.to_string()),
        alias: alias.unwrap_or_default(),
        expected,
        imported: Some(ImportedFrom {
            model: about.model.to_string(),
            version: about.version,
            created_at: Some(about.created_at.into()),
        }),
        lineage: (about.lineage.into_iter())
            .map(|(name, digest)| (name, digest.to_string()))
            .collect(),
        code: about.code.map(|code| v1::CodeRevision {
            repository: code.repository,
            revision: code.revision,
            dirty: code.dirty,
        }),
        notes: about.notes,
        tags: about.tags.into_iter().collect(),
    };
    let imported = cluster.models().import_version(request).await?.into_inner();
    let version = imported.version.unwrap_or_default();
    say(&version, format, |name| match version.aliases.join(", ") {
        aliases if aliases.is_empty() => format!("imported {name}"),
        aliases => format!("imported {name} ({})", clean(&aliases)),
    })
}
