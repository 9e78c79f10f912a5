//! A model or a version, for people and for programs.

use std::collections::BTreeMap;

use emberline_proto::v1::{GetModelRequest, ModelVersionView};
use serde_json::{Value, json};

use crate::{
    args::Format,
    client::Cluster,
    commands::runs::time,
    output::{self, bytes, clean},
};

/// JSON of the coordinator's; null where it has none.
pub fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

fn some(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// A version for programs.
pub fn json_of(v: &ModelVersionView) -> Value {
    let sorted = |map: &std::collections::HashMap<String, String>| {
        let pairs = map.iter().map(|(k, v)| (k.clone(), v.clone()));
        pairs.collect::<BTreeMap<_, _>>()
    };
    json!({
        "model": v.model,
        "version": v.version,
        "aliases": v.aliases,
        "live_in": v.live_in,
        "artifact": v.artifact.as_ref().map(|a| json!({"manifest": a.manifest, "bytes": a.bytes})),
        "metrics": parsed(&v.metrics_json),
        "schema": parsed(&v.schema_json),
        "run": some(&v.run), "task": some(&v.task),
        "pipeline": some(&v.pipeline), "pipeline_revision": some(&v.pipeline_revision),
        "lineage": sorted(&v.lineage),
        "code": v.code.as_ref().map(|c| {
            json!({"repository": some(&c.repository), "revision": c.revision, "dirty": c.dirty})
        }),
        "parent": (v.parent > 0).then_some(v.parent),
        "imported": v.imported.as_ref().map(|i| {
            json!({"model": i.model, "version": i.version, "created_at": i.created_at.as_ref().map(time)})
        }),
        "tags": sorted(&v.tags),
        "notes": v.notes,
        "created_at": v.created_at.as_ref().map(time),
    })
}

/// Shows a model with its versions.
pub async fn model(cluster: &Cluster, model: String, format: Format) -> anyhow::Result<()> {
    let answer = cluster
        .models()
        .get_model(GetModelRequest { model })
        .await?
        .into_inner();
    let model = answer.model.unwrap_or_default();
    if format == Format::Json {
        return output::json(&json!({
            "model": model.model,
            "latest_version": model.latest_version,
            "aliases": model.aliases,
            "versions": answer.versions.iter().map(json_of).collect::<Vec<_>>(),
        }));
    }
    let rows: Vec<Vec<String>> = answer
        .versions
        .iter()
        .map(|v| {
            let metrics = parsed(&v.metrics_json);
            let metrics = metrics.as_object().into_iter().flatten();
            let metrics = metrics
                .filter_map(|(k, n)| Some(format!("{k} {}", (n.as_f64()? * 1e4).round() / 1e4)));
            vec![
                v.version.to_string(),
                v.aliases.join(", "),
                v.live_in.join(", "),
                made_by(v),
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
            "VERSION", "ALIASES", "LIVE IN", "RUN", "CREATED", "ARTIFACT", "METRICS",
        ],
        &rows,
    )?)
}

fn made_by(v: &ModelVersionView) -> String {
    match &v.imported {
        Some(from) => format!("imported: {} {}", from.model, from.version),
        None => v.run.clone(),
    }
}

/// Shows all of one version.
pub fn version(v: &ModelVersionView, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        return output::json(&json_of(v));
    }
    output::line(format!("{} version {}", clean(&v.model), v.version))?;
    let field = |name: &str, text: String| match text.is_empty() {
        true => Ok(()),
        false => output::line(format!("  {name:<9} {}", clean(&text))),
    };
    field("aliases", v.aliases.join(", "))?;
    field("live in", v.live_in.join(", "))?;
    field(
        "created",
        v.created_at.as_ref().map(time).unwrap_or_default(),
    )?;
    if let Some(artifact) = &v.artifact {
        let size = bytes(artifact.bytes);
        field("artifact", format!("{} ({size})", artifact.manifest))?;
    }
    if let Some(from) = &v.imported {
        let at = from.created_at.as_ref().map(time).unwrap_or_default();
        field(
            "imported",
            format!("{} version {}, registered {at}", from.model, from.version),
        )?;
    }
    if !v.run.is_empty() {
        field(
            "run",
            format!("{}, task {} of pipeline {}", v.run, v.task, v.pipeline),
        )?;
    }
    if let Some(code) = &v.code {
        let dirty = if code.dirty { " with changes" } else { "" };
        field(
            "code",
            format!("{} {}{dirty}", code.repository, code.revision)
                .trim()
                .to_owned(),
        )?;
    }
    if v.parent > 0 {
        field("after", format!("version {}", v.parent))?;
    }
    let mut tags: Vec<String> = v.tags.iter().map(|(k, v)| format!("{k}={v}")).collect();
    tags.sort();
    field("tags", tags.join(", "))?;
    for (number, line) in v.notes.lines().enumerate() {
        field(if number == 0 { "notes" } else { "" }, line.to_owned())?;
    }
    let metrics = parsed(&v.metrics_json);
    let metrics: Vec<Vec<String>> = metrics
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| vec![name.clone(), value.to_string()])
        .collect();
    if !metrics.is_empty() {
        output::table(&["METRIC", "VALUE"], &metrics)?;
    }
    let schema = parsed(&v.schema_json);
    let columns: Vec<Vec<String>> = schema
        .as_array()
        .into_iter()
        .flatten()
        .map(|column| {
            let text = |key: &str| column[key].as_str().unwrap_or_default().to_owned();
            vec![text("name"), text("type")]
        })
        .collect();
    if !columns.is_empty() {
        output::table(&["INPUT", "TYPE"], &columns)?;
    }
    let lineage: BTreeMap<&String, &String> = v.lineage.iter().collect();
    let lineage: Vec<Vec<String>> = lineage
        .into_iter()
        .map(|(name, digest)| vec![name.clone(), digest.clone()])
        .collect();
    if !lineage.is_empty() {
        output::table(&["LINEAGE", "MANIFEST"], &lineage)?;
    }
    Ok(())
}
