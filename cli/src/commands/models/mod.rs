//! `models`: list and show, alias, tag, note and delete; [`diff`] and [`bundles`] beside.

mod bundles;
mod diff;
mod show;

use emberline_proto::v1::{
    AnnotateVersionRequest, DeleteVersionRequest, GetModelVersionRequest, ListModelsRequest,
    ModelVersionView, RemoveAliasRequest, SetAliasRequest,
};
use serde_json::json;

use crate::{
    args::{ClusterArguments, Format, ModelsCommand},
    client::Cluster,
    exit::Exit,
    output::{self, clean},
};

/// Does one of them.
pub async fn models(
    arguments: &ClusterArguments,
    command: ModelsCommand,
    format: Format,
) -> anyhow::Result<()> {
    // What is wrong with a file needs no cluster to be told.
    let bundle = match &command {
        ModelsCommand::Import { file, .. } => Some(bundles::open(file).await?),
        _ => None,
    };
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = dispatch(&cluster, command, bundle, format).await;
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn dispatch(
    cluster: &Cluster,
    command: ModelsCommand,
    bundle: Option<emberline_train::Bundle>,
    format: Format,
) -> anyhow::Result<()> {
    match command {
        ModelsCommand::List => list(cluster, format).await,
        ModelsCommand::Show {
            model,
            version: None,
        } => show::model(cluster, model, format).await,
        ModelsCommand::Show {
            model,
            version: Some(version),
        } => show::version(&find(cluster, model, version).await?, format),
        ModelsCommand::Diff { model, a, b } => diff::diff(cluster, model, a, b, format).await,
        ModelsCommand::Alias {
            model,
            alias,
            version,
            expected,
            remove: _,
        } => move_alias(cluster, model, alias, version, expected, format).await,
        ModelsCommand::Tag {
            model,
            version,
            tags,
            remove,
        } => {
            let request = AnnotateVersionRequest {
                model,
                version,
                set_tags: tags.iter().map(|tag| pair(tag)).collect::<Result<_, _>>()?,
                remove_tags: remove,
                notes: None,
            };
            annotate(cluster, request, format).await
        }
        ModelsCommand::Note {
            model,
            version,
            notes,
        } => {
            let request = AnnotateVersionRequest {
                model,
                version,
                notes: Some(notes),
                ..Default::default()
            };
            annotate(cluster, request, format).await
        }
        ModelsCommand::Delete { model, version } => {
            let request = DeleteVersionRequest { model, version };
            let deleted = cluster.models().delete_version(request).await?.into_inner();
            let deleted = deleted.version.unwrap_or_default();
            say(&deleted, format, |name| format!("deleted {name}"))
        }
        ModelsCommand::Export {
            model,
            version,
            file,
        } => {
            let version = find(cluster, model, version).await?;
            bundles::export(cluster, version, file, format).await
        }
        ModelsCommand::Import {
            file: _,
            name,
            alias,
            expected,
        } => match bundle {
            Some(bundle) => bundles::import(cluster, bundle, name, alias, expected, format).await,
            None => Ok(()),
        },
    }
}

/// `key=value`.
fn pair(text: &str) -> Result<(String, String), Exit> {
    let (key, value) = text.split_once('=').ok_or_else(|| {
        Exit::input(format!(
            "the tag `{text}` has no `=`: write `key=value`, or `--remove key`"
        ))
    })?;
    Ok((key.to_owned(), value.to_owned()))
}

/// A version by its number or an alias.
async fn find(
    cluster: &Cluster,
    model: String,
    version: String,
) -> anyhow::Result<ModelVersionView> {
    let request = GetModelVersionRequest { model, version };
    let found = cluster
        .models()
        .get_model_version(request)
        .await?
        .into_inner();
    Ok(found.version.unwrap_or_default())
}

/// Prints a version as JSON, or one line about it.
fn say(
    version: &ModelVersionView,
    format: Format,
    line: impl FnOnce(String) -> String,
) -> anyhow::Result<()> {
    match format {
        Format::Json => output::json(&show::json_of(version)),
        Format::Text => {
            let name = format!("{} version {}", clean(&version.model), version.version);
            Ok(output::line(line(name))?)
        }
    }
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
        let models = models.iter().map(|m| {
            json!({
                "model": m.model,
                "latest_version": m.latest_version,
                "versions": m.versions,
                "aliases": m.aliases,
            })
        });
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
                m.versions.to_string(),
                m.latest_version.to_string(),
                aliases.join(", "),
            ]
        })
        .collect();
    Ok(output::table(
        &["MODEL", "VERSIONS", "LATEST", "ALIASES"],
        &rows,
    )?)
}

async fn move_alias(
    cluster: &Cluster,
    model: String,
    alias: String,
    version: Option<String>,
    expected: Option<u32>,
    format: Format,
) -> anyhow::Result<()> {
    let shown = clean(&alias);
    let Some(version) = version else {
        let request = RemoveAliasRequest {
            model,
            alias,
            expected,
        };
        let removed = cluster.models().remove_alias(request).await?.into_inner();
        let version = removed.version.unwrap_or_default();
        return say(&version, format, |name| {
            format!("{shown} no longer names {name}")
        });
    };
    let request = SetAliasRequest {
        model,
        alias,
        version,
        expected,
    };
    let set = cluster.models().set_alias(request).await?.into_inner();
    let version = set.version.unwrap_or_default();
    say(&version, format, |name| format!("{shown} names {name}"))
}

async fn annotate(
    cluster: &Cluster,
    request: AnnotateVersionRequest,
    format: Format,
) -> anyhow::Result<()> {
    let changed = cluster
        .models()
        .annotate_version(request)
        .await?
        .into_inner();
    show::version(&changed.version.unwrap_or_default(), format)
}
