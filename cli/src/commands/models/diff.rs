//! What differs between two versions.

use std::collections::BTreeMap;

use emberline_proto::v1::{GetArtifactRequest, ModelVersionView};
use emberline_worker::documents::MODEL_FILE;
use serde_json::{Value, json};

use super::{find, show};
use crate::{
    args::Format,
    client::Cluster,
    fetch,
    output::{self, clean},
};

const MAX_DOCUMENT_BYTES: u64 = 64 << 20;
/// The longest value that is printed for people, in characters.
const MAX_SHOWN: usize = 60;

/// Compares two versions of a model.
pub async fn diff(
    cluster: &Cluster,
    model: String,
    a: String,
    b: String,
    format: Format,
) -> anyhow::Result<()> {
    let a = find(cluster, model.clone(), a).await?;
    let b = find(cluster, model, b).await?;
    let (of_a, of_b) = (facts(cluster, &a).await?, facts(cluster, &b).await?);
    let mut fields: Vec<&(&str, String)> = of_a.keys().chain(of_b.keys()).collect();
    fields.sort();
    fields.dedup();
    fields.retain(|field| of_a.get(field) != of_b.get(field));
    if format == Format::Json {
        let differences = fields.iter().map(|field| {
            json!({
                "section": field.0, "field": field.1,
                "a": of_a.get(field), "b": of_b.get(field),
            })
        });
        return output::json(&json!({
            "model": a.model, "a": a.version, "b": b.version,
            "differences": differences.collect::<Vec<_>>(),
        }));
    }
    if fields.is_empty() {
        let name = clean(&a.model);
        output::line(format!(
            "versions {} and {} of {name} do not differ",
            a.version, b.version
        ))?;
        return Ok(());
    }
    let shown = |value: Option<&Value>| match value {
        None => "-".to_owned(),
        Some(Value::String(text)) => cut(text),
        Some(value) => cut(&value.to_string()),
    };
    let rows: Vec<Vec<String>> = fields
        .iter()
        .map(|field| {
            let name = format!("{}.{}", field.0, field.1);
            vec![name, shown(of_a.get(field)), shown(of_b.get(field))]
        })
        .collect();
    let heads = [a.version, b.version].map(|version| format!("VERSION {version}"));
    Ok(output::table(&["WHAT", &heads[0], &heads[1]], &rows)?)
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}…", &text[..at]),
    }
}

/// Everything that is compared, by section and field.
type Facts = BTreeMap<(&'static str, String), Value>;

async fn facts(cluster: &Cluster, version: &ModelVersionView) -> anyhow::Result<Facts> {
    let mut facts = Facts::new();
    flatten("metrics", &show::parsed(&version.metrics_json), &mut facts);
    flatten("schema", &show::parsed(&version.schema_json), &mut facts);
    let lineage = version.lineage.iter();
    facts.extend(lineage.map(|(name, digest)| (("lineage", name.clone()), json!(digest))));
    let mut text = |section, field: &str, text: &str| {
        if !text.is_empty() {
            facts.insert((section, field.to_owned()), json!(text));
        }
    };
    text("pipeline", "name", &version.pipeline);
    text("pipeline", "revision", &version.pipeline_revision);
    if let Some(code) = &version.code {
        text("code", "repository", &code.repository);
        text("code", "revision", &code.revision);
        text(
            "code",
            "state",
            if code.dirty {
                "with changes"
            } else {
                "committed"
            },
        );
    }
    if let Some(document) = document(cluster, version).await? {
        for (section, field) in [
            ("preprocessing", "preprocessing"),
            ("network", "network"),
            ("training", "spec"),
        ] {
            flatten(section, &document[field], &mut facts);
        }
    }
    Ok(facts)
}

/// The artifact's `model.json`, if it has one.
async fn document(cluster: &Cluster, version: &ModelVersionView) -> anyhow::Result<Option<Value>> {
    let artifact = version.artifact.clone().unwrap_or_default().manifest;
    let request = GetArtifactRequest { artifact };
    let artifact = cluster
        .artifacts()
        .get_artifact(request)
        .await?
        .into_inner();
    let Some(file) = artifact.files.iter().find(|file| file.path == MODEL_FILE) else {
        return Ok(None);
    };
    let text = fetch::bytes(cluster, &file.sha256, MAX_DOCUMENT_BYTES).await?;
    Ok(serde_json::from_slice(&text).ok())
}

/// A value's leaves, by the path to them; objects in a list go by their names.
fn flatten(section: &'static str, value: &Value, facts: &mut Facts) {
    fn go(section: &'static str, path: &str, value: &Value, facts: &mut Facts) {
        let below = |key: &str| match path {
            "" => key.to_owned(),
            path => format!("{path}.{key}"),
        };
        match value {
            Value::Null => {}
            Value::Object(fields) => {
                for (key, value) in fields {
                    go(section, &below(key), value, facts);
                }
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                for (number, item) in items.iter().enumerate() {
                    let name = item["name"].as_str().or_else(|| item["column"].as_str());
                    let key = name.map_or_else(|| number.to_string(), str::to_owned);
                    go(section, &below(&key), item, facts);
                }
            }
            leaf => {
                facts.insert((section, path.to_owned()), leaf.clone());
            }
        }
    }
    go(section, "", value, facts);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_have_paths_in_which_columns_go_by_their_names() {
        let mut facts = Facts::new();
        let value = json!({
            "features": {"columns": [{"column": "torque", "mean": 1.5}, {"name": "power"}, {"x": 1}]},
            "classes": ["no", "yes"], "none": null,
        });
        flatten("s", &value, &mut facts);
        let told: Vec<String> = facts.iter().map(|((_, k), v)| format!("{k}={v}")).collect();
        assert_eq!(
            told,
            [
                "classes=[\"no\",\"yes\"]",
                "features.columns.2.x=1",
                "features.columns.power.name=\"power\"",
                "features.columns.torque.column=\"torque\"",
                "features.columns.torque.mean=1.5",
            ]
        );
    }

    #[test]
    fn long_values_are_cut() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"ä".repeat(61)), format!("{}…", "ä".repeat(60)));
    }
}
