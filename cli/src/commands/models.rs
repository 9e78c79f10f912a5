//! `models`: list and show.

use emberline_proto::v1::{GetModelRequest, ListModelsRequest};
use serde_json::{Value, json};

use super::runs::time;
use crate::{
    args::{ClusterArguments, Format, ModelsCommand},
    client::Cluster,
    output::{self, clean},
};

/// Does one of them.
pub async fn models(
    arguments: &ClusterArguments,
    command: ModelsCommand,
    format: Format,
) -> anyhow::Result<()> {
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = match command {
        ModelsCommand::List => list(&cluster, format).await,
        ModelsCommand::Show { model } => show(&cluster, model, format).await,
    };
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn list(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let mut models = Vec::new();
    let mut page_token = String::new();
    loop {
        let page = cluster
            .models()
            .list_models(ListModelsRequest {
                page_size: 1000,
                page_token,
            })
            .await?
            .into_inner();
        models.extend(page.models);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if format == Format::Json {
        let models = models.iter().map(
            |m| json!({"model": m.model, "latest_version": m.latest_version, "aliases": m.aliases}),
        );
        return output::json(&models.collect::<Vec<_>>());
    }
    let rows: Vec<Vec<String>> = models
        .iter()
        .map(|m| {
            let mut aliases: Vec<String> = m
                .aliases
                .iter()
                .map(|(alias, v)| format!("{alias} → {v}"))
                .collect();
            aliases.sort();
            vec![
                m.model.clone(),
                m.latest_version.to_string(),
                aliases.join(", "),
            ]
        })
        .collect();
    Ok(output::table(&["MODEL", "LATEST", "ALIASES"], &rows)?)
}

async fn show(cluster: &Cluster, model: String, format: Format) -> anyhow::Result<()> {
    let answer = cluster
        .models()
        .get_model(GetModelRequest { model })
        .await?
        .into_inner();
    let model = answer.model.unwrap_or_default();
    let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    if format == Format::Json {
        let versions = answer.versions.iter().map(|v| {
            json!({
                "version": v.version,
                "artifact": v.artifact.as_ref().map(|a| json!({"manifest": a.manifest, "bytes": a.bytes})),
                "metrics": parsed(&v.metrics_json),
                "schema": parsed(&v.schema_json),
                "run": v.run, "task": v.task,
                "pipeline": v.pipeline, "pipeline_revision": v.pipeline_revision,
                "lineage": v.lineage,
                "notes": v.notes,
                "created_at": v.created_at.as_ref().map(time),
            })
        });
        return output::json(&json!({
            "model": model.model,
            "latest_version": model.latest_version,
            "aliases": model.aliases,
            "versions": versions.collect::<Vec<_>>(),
        }));
    }
    let rows: Vec<Vec<String>> = answer
        .versions
        .iter()
        .map(|v| {
            let aliases: Vec<&str> = model
                .aliases
                .iter()
                .filter(|(_, to)| **to == v.version)
                .map(|(a, _)| a.as_str())
                .collect();
            let metrics = parsed(&v.metrics_json);
            let metrics = metrics.as_object().into_iter().flatten();
            let metrics = metrics
                .filter_map(|(k, n)| Some(format!("{k} {}", (n.as_f64()? * 1e4).round() / 1e4)));
            vec![
                v.version.to_string(),
                aliases.join(", "),
                v.run.clone(),
                v.created_at.as_ref().map(time).unwrap_or_default(),
                v.artifact
                    .as_ref()
                    .map(|a| a.manifest.chars().take(12).collect())
                    .unwrap_or_default(),
                metrics.take(4).collect::<Vec<_>>().join(", "),
            ]
        })
        .collect();
    output::line(format!("model {}", clean(&model.model)))?;
    Ok(output::table(
        &[
            "VERSION", "ALIASES", "RUN", "CREATED", "ARTIFACT", "METRICS",
        ],
        &rows,
    )?)
}
