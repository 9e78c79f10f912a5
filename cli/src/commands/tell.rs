//! How a run ended: for people, for programs, and as an exit code.

use std::path::{Path, PathBuf};

use emberline_proto::v1::{
    DeploymentOutcome, GetArtifactRequest, GetModelRequest, GetRunResponse, ListDeploymentsRequest,
    LogStream, RunState, StreamLogsRequest, TaskState, TaskView, stream_logs_response::Entry,
};
use serde_json::{Map, Value};
use tokio_stream::StreamExt as _;

use super::{
    deployments::state,
    runs::{run_json, trace_link},
};
use crate::{
    args::Format,
    client::Cluster,
    exit::{self, Exit},
    fetch,
    output::{self, clean, duration},
    progress::{between, reason_name},
    telemetry,
};

/// Lines of a failed task's log that are shown.
const LAST_LINES: usize = 15;

/// Says how a run ended, and leaves with the right code.
pub async fn tell(
    cluster: &Cluster,
    run: &GetRunResponse,
    reports: Option<&Path>,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let summary = run.summary.clone().unwrap_or_default();
    let report = match reports {
        Some(directory) => save_report(cluster, run, directory).await?,
        None => None,
    };
    let succeeded = summary.state() == RunState::Succeeded;
    if format == Format::Json {
        let mut value = run_json(run);
        if let (Some(map), Some(path)) = (value.as_object_mut(), &report) {
            map.insert("report".to_owned(), Value::from(path.display().to_string()));
        }
        output::json(&value)?;
    } else if !quiet {
        tell_people(cluster, run, report.as_deref()).await?;
    }
    if succeeded {
        return Ok(());
    }
    if format == Format::Json {
        return Err(Exit::silent(exit::RUN_FAILED).into());
    }
    let failure = summary.failure.map_or_else(
        || "it was cancelled".to_owned(),
        |f| format!("{}: {}", reason_name(f.reason()), f.message),
    );
    Err(Exit::new(
        exit::RUN_FAILED,
        format!("run {} failed: {failure}", summary.run),
    )
    .into())
}

async fn tell_people(
    cluster: &Cluster,
    run: &GetRunResponse,
    report: Option<&Path>,
) -> anyhow::Result<()> {
    let summary = run.summary.clone().unwrap_or_default();
    let took = match (&summary.created_at, &summary.finished_at) {
        (Some(a), Some(b)) => format!(" in {}", duration(between(a, b))),
        _ => String::new(),
    };
    let word = match summary.state() {
        RunState::Succeeded => "succeeded",
        RunState::Cancelled => "was cancelled",
        _ => "failed",
    };
    let cached = if summary.tasks_cached > 0 {
        format!(", {} reused", summary.tasks_cached)
    } else {
        String::new()
    };
    output::line(format!(
        "\nrun {} {word}{took} ({} tasks{cached})",
        clean(&summary.run),
        summary.tasks_total
    ))?;
    for task in run.tasks.iter().filter(|t| t.kind == "evaluate") {
        let metrics = numbers(&task.results_json);
        if !metrics.is_empty() {
            output::line(format!("  {}: {}", clean(&task.task), metrics.join("  ")))?;
        }
    }
    for task in run
        .tasks
        .iter()
        .filter(|t| t.kind == "deploy" && t.state() == TaskState::Succeeded)
    {
        tell_model(cluster, &summary.run, task).await?;
    }
    if telemetry::trace_url().is_some() {
        output::line(format!("  trace: {}", trace_link(&summary.trace_id)))?;
    }
    if let Some(path) = report {
        output::line(format!("  report: {}", path.display()))?;
    }
    for task in run.tasks.iter().filter(|t| t.state() == TaskState::Failed) {
        last_log_lines(cluster, &summary.run, task).await?;
    }
    if summary.state() != RunState::Succeeded {
        output::line(format!(
            "  log: emberline runs logs {0}   again: emberline runs retry {0}",
            clean(&summary.run)
        ))?;
    }
    Ok(())
}

/// The numbers among a stage's results, e.g. `f1 0.7241`.
fn numbers(results: &str) -> Vec<String> {
    let results: Map<String, Value> = serde_json::from_str(results).unwrap_or_default();
    let numbers = results
        .iter()
        .filter_map(|(name, value)| Some((name, value.as_f64()?)));
    numbers
        .map(|(name, value)| format!("{} {}", clean(name), (value * 1e4).round() / 1e4))
        .collect()
}

async fn tell_model(cluster: &Cluster, run: &str, task: &TaskView) -> anyhow::Result<()> {
    let results: Map<String, Value> = serde_json::from_str(&task.results_json).unwrap_or_default();
    let Some(model) = results.get("model").and_then(Value::as_str) else {
        return Ok(());
    };
    let artifact = results
        .get("artifact")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let answer = cluster
        .models()
        .get_model(GetModelRequest {
            model: model.to_owned(),
        })
        .await?
        .into_inner();
    let found = answer
        .versions
        .iter()
        .find(|v| v.artifact.as_ref().is_some_and(|a| a.manifest == artifact));
    let version = found.or(answer.versions.first()).map_or(0, |v| v.version);
    let aliases: Vec<String> = answer
        .model
        .unwrap_or_default()
        .aliases
        .into_iter()
        .filter(|(_, to)| *to == version)
        .map(|(alias, _)| clean(&alias))
        .collect();
    let aliases = if aliases.is_empty() {
        String::new()
    } else {
        format!(" ({})", aliases.join(", "))
    };
    output::line(format!(
        "  model: {} version {version}{aliases}",
        clean(model)
    ))?;
    let newest = ListDeploymentsRequest {
        page_size: 10,
        model: model.to_owned(),
        ..Default::default()
    };
    let newest = cluster.deployments().list_deployments(newest).await?;
    let newest = newest.into_inner().deployments.into_iter();
    for deployment in newest.filter(|d| d.run == run && d.task == task.task) {
        let (environment, id) = (
            clean(&deployment.environment),
            clean(&deployment.deployment),
        );
        output::line(match deployment.outcome() {
            DeploymentOutcome::Live => format!("  deployed to {environment}: {id}"),
            _ => format!(
                "  on its way to {environment}: {id} ({})",
                state(&deployment)
            ),
        })?;
    }
    Ok(())
}

async fn last_log_lines(cluster: &Cluster, run: &str, task: &TaskView) -> anyhow::Result<()> {
    let request = StreamLogsRequest {
        run: run.to_owned(),
        task: task.task.clone(),
        stream: LogStream::Unspecified.into(),
        ..Default::default()
    };
    let Ok(answer) = cluster.runs().stream_logs(request).await else {
        return Ok(());
    };
    let mut answer = answer.into_inner();
    let mut last = std::collections::VecDeque::new();
    while let Some(Ok(entry)) = answer.next().await {
        if let Some(Entry::Line(line)) = entry.entry {
            if last.len() == LAST_LINES {
                last.pop_front();
            }
            last.push_back(line.text);
        }
    }
    if !last.is_empty() {
        output::line(format!("  the last lines of {}:", clean(&task.task)))?;
    }
    for line in last {
        output::line(format!("    {}", clean(&line)))?;
    }
    Ok(())
}

/// Writes the page of the first `report` task beside the state; says where.
async fn save_report(
    cluster: &Cluster,
    run: &GetRunResponse,
    directory: &Path,
) -> anyhow::Result<Option<PathBuf>> {
    let page = run
        .tasks
        .iter()
        .filter(|t| t.kind == "report")
        .find_map(|t| t.outputs.first());
    let Some(page) = page else { return Ok(None) };
    let request = GetArtifactRequest {
        artifact: page.manifest.clone(),
    };
    let artifact = cluster
        .artifacts()
        .get_artifact(request)
        .await?
        .into_inner();
    let Some(file) = artifact.files.first() else {
        return Ok(None);
    };
    let id = run
        .summary
        .as_ref()
        .map(|s| s.run.clone())
        .unwrap_or_default();
    let path = directory.join(format!("{id}.html"));
    fetch::to(cluster, file, &path).await?;
    Ok(Some(path))
}
