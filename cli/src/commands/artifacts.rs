//! `artifacts`: list, fetch, collect.

use std::path::Path;

use emberline_common::spec::DurationText;
use emberline_proto::v1::{
    CollectGarbageRequest, GetArtifactRequest, GetArtifactResponse, GetRunRequest,
};
use serde_json::json;

use crate::{
    args::{ArtifactsCommand, ClusterArguments, Format},
    client::Cluster,
    exit::Exit,
    fetch,
    output::{self, bytes, clean},
};

/// Does one of them.
pub async fn artifacts(
    arguments: &ClusterArguments,
    command: ArtifactsCommand,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = match command {
        ArtifactsCommand::Ls { what } => list(&cluster, &what, format).await,
        ArtifactsCommand::Get {
            artifact,
            directory,
        } => get(&cluster, artifact, &directory, quiet).await,
        ArtifactsCommand::Gc {
            dry_run,
            min_age,
            forget_older_than,
        } => match request(dry_run, &min_age, forget_older_than.as_deref()) {
            Ok(request) => collect(&cluster, request, format).await,
            Err(exit) => Err(exit.into()),
        },
    };
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn list(cluster: &Cluster, what: &str, format: Format) -> anyhow::Result<()> {
    let is_artifact = what.contains('/') || what.len() == 64;
    if is_artifact {
        let artifact = find(cluster, what.to_owned()).await?;
        if format == Format::Json {
            let files = artifact
                .files
                .iter()
                .map(|f| json!({"path": f.path, "sha256": f.sha256, "bytes": f.bytes}));
            return output::json(&json!({
                "manifest": artifact.manifest,
                "type": artifact.media_type,
                "metadata": serde_json::from_str::<serde_json::Value>(&artifact.metadata_json).unwrap_or_default(),
                "files": files.collect::<Vec<_>>(),
            }));
        }
        let rows: Vec<Vec<String>> = artifact
            .files
            .iter()
            .map(|f| vec![f.path.clone(), bytes(f.bytes), f.sha256.clone()])
            .collect();
        return Ok(output::table(&["FILE", "SIZE", "SHA-256"], &rows)?);
    }
    let run = cluster
        .runs()
        .get_run(GetRunRequest {
            run: what.to_owned(),
        })
        .await?
        .into_inner();
    let all = run
        .tasks
        .iter()
        .flat_map(|t| t.outputs.iter().map(move |o| (&t.task, o)));
    if format == Format::Json {
        let all = all.map(|(task, o)| json!({"task": task, "output": o.name, "manifest": o.manifest, "bytes": o.bytes}));
        return output::json(&all.collect::<Vec<_>>());
    }
    let rows: Vec<Vec<String>> = all
        .map(|(task, o)| {
            vec![
                format!("{task}/{}", o.name),
                bytes(o.bytes),
                o.manifest.clone(),
            ]
        })
        .collect();
    Ok(output::table(&["OUTPUT", "SIZE", "MANIFEST"], &rows)?)
}

async fn find(cluster: &Cluster, artifact: String) -> anyhow::Result<GetArtifactResponse> {
    Ok(cluster
        .artifacts()
        .get_artifact(GetArtifactRequest { artifact })
        .await?
        .into_inner())
}

async fn get(
    cluster: &Cluster,
    artifact: String,
    directory: &Path,
    quiet: bool,
) -> anyhow::Result<()> {
    let artifact = find(cluster, artifact).await?;
    for file in &artifact.files {
        let path = fetch::file(cluster, file, directory).await?;
        if !quiet {
            output::line(format!(
                "{} ({})",
                clean(&path.display().to_string()),
                bytes(file.bytes)
            ))?;
        }
    }
    Ok(())
}

fn request(
    dry_run: bool,
    min_age: &str,
    forget: Option<&str>,
) -> Result<CollectGarbageRequest, Exit> {
    let seconds = |flag: &str, text: &str| {
        text.parse::<DurationText>()
            .map(|d| d.0.as_secs())
            .map_err(|e| Exit::input(format!("{flag}: {e}")))
    };
    Ok(CollectGarbageRequest {
        dry_run,
        min_age_seconds: Some(seconds("--min-age", min_age)?),
        forget_runs_older_than_seconds: forget
            .map(|f| seconds("--forget-older-than", f))
            .transpose()?,
    })
}

async fn collect(
    cluster: &Cluster,
    request: CollectGarbageRequest,
    format: Format,
) -> anyhow::Result<()> {
    let done = cluster
        .artifacts()
        .collect_garbage(request)
        .await?
        .into_inner();
    if format == Format::Json {
        return output::json(&json!({
            "dry_run": request.dry_run,
            "kept_objects": done.kept_objects, "kept_bytes": done.kept_bytes,
            "removed_objects": done.removed_objects, "removed_bytes": done.removed_bytes,
            "young_objects": done.young_objects, "forgotten_runs": done.forgotten_runs,
            "removed": done.removed,
        }));
    }
    for key in &done.removed {
        output::line(format!("  {}", clean(key)))?;
    }
    let (verb, forgot) = if request.dry_run {
        ("would remove", "would forget")
    } else {
        ("removed", "forgot")
    };
    output::line(format!(
        "{verb} {} objects ({}), kept {} ({}) and {} that are younger; {forgot} {} runs",
        done.removed_objects,
        bytes(done.removed_bytes),
        done.kept_objects,
        bytes(done.kept_bytes),
        done.young_objects,
        done.forgotten_runs
    ))?;
    Ok(())
}
