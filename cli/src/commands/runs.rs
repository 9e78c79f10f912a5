//! `runs`: list, show, follow, stop, repeat, and read the logs.

use std::{collections::HashMap, time::Duration};

use emberline_proto::v1::{
    CancelRunRequest, GetRunRequest, GetRunResponse, ListRunsRequest, LogStream, RetryRunRequest,
    RunState, RunSummary, StreamLogsRequest, TaskState, TaskView, stream_logs_response::Entry,
};
use prost_types::Timestamp;
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::{
    deployments::{change_json, describe},
    run::follow,
    tell::tell,
};
use crate::{
    args::{ClusterArguments, Format, RunsCommand},
    client::Cluster,
    output::{self, clean, duration},
    progress::{between, reason_name},
    reopen::Reopen,
    telemetry,
};

/// Does one of them.
pub async fn runs(
    arguments: &ClusterArguments,
    command: RunsCommand,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    // Only a retry runs something by itself.
    let workers = if matches!(
        command,
        RunsCommand::Retry { .. } | RunsCommand::Watch { .. }
    ) {
        2
    } else {
        0
    };
    let cluster = Cluster::connect(arguments, workers).await?;
    let outcome = match command {
        RunsCommand::List { pipeline, limit } => list(&cluster, pipeline, limit, format).await,
        RunsCommand::Show { run } => show(&cluster, run, format).await,
        RunsCommand::Watch { run } => {
            follow_and_tell(&cluster, &run, arguments, quiet, format).await
        }
        RunsCommand::Cancel { run, why } => cancel(&cluster, run, why, quiet, format).await,
        RunsCommand::Retry { run } => match retry(&cluster, run).await {
            Ok(id) => follow_and_tell(&cluster, &id, arguments, quiet, format).await,
            Err(status) => Err(status.into()),
        },
        RunsCommand::Logs {
            run,
            task,
            attempt,
            follow,
            metrics,
        } => {
            let stream = if metrics {
                LogStream::Metrics
            } else {
                LogStream::Unspecified
            };
            let task = task.unwrap_or_default();
            let request = StreamLogsRequest {
                run,
                task,
                attempt,
                follow,
                stream: stream.into(),
            };
            logs(&cluster, request, format).await
        }
    };
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn follow_and_tell(
    cluster: &Cluster,
    run: &str,
    arguments: &ClusterArguments,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let followed = follow(cluster, run, quiet).await?;
    tell(
        cluster,
        &followed,
        Some(&arguments.state_dir.join("reports")),
        quiet,
        format,
    )
    .await
}

async fn list(
    cluster: &Cluster,
    pipeline: Option<String>,
    limit: u32,
    format: Format,
) -> anyhow::Result<()> {
    let mut runs: Vec<RunSummary> = Vec::new();
    let mut page_token = String::new();
    loop {
        let left = limit.saturating_sub(u32::try_from(runs.len()).unwrap_or(u32::MAX));
        if left == 0 {
            break;
        }
        let request = ListRunsRequest {
            page_size: left.min(1000),
            page_token,
            pipeline: pipeline.clone().unwrap_or_default(),
            states: Vec::new(),
        };
        let page = cluster.runs().list_runs(request).await?.into_inner();
        runs.extend(page.runs);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    if format == Format::Json {
        return output::json(&runs.iter().map(summary_json).collect::<Vec<_>>());
    }
    let rows: Vec<Vec<String>> = runs
        .iter()
        .map(|run| {
            let took = match (&run.created_at, &run.finished_at) {
                (Some(a), Some(b)) => duration(between(a, b)),
                _ => String::new(),
            };
            let reason = run.failure.as_ref().map_or("", |f| reason_name(f.reason()));
            vec![
                run.run.clone(),
                run.pipeline.clone(),
                run_state(run.state()).to_owned(),
                format!("{}/{}", run.tasks_done, run.tasks_total),
                run.created_at.as_ref().map(time).unwrap_or_default(),
                took,
                reason.to_owned(),
            ]
        })
        .collect();
    Ok(output::table(
        &[
            "RUN", "PIPELINE", "STATE", "TASKS", "CREATED", "TOOK", "REASON",
        ],
        &rows,
    )?)
}

async fn show(cluster: &Cluster, run: String, format: Format) -> anyhow::Result<()> {
    let run = cluster
        .runs()
        .get_run(GetRunRequest { run })
        .await?
        .into_inner();
    if format == Format::Json {
        return output::json(&run_json(&run));
    }
    let summary = run.summary.clone().unwrap_or_default();
    output::line(format!("run       {}", clean(&summary.run)))?;
    output::line(format!(
        "pipeline  {} (revision {})",
        clean(&summary.pipeline),
        clean(&summary.revision)
    ))?;
    output::line(format!("state     {}", run_state(summary.state())))?;
    if let Some(failure) = &summary.failure {
        output::line(format!(
            "failure   {}: {}",
            reason_name(failure.reason()),
            clean(&failure.message)
        ))?;
    }
    output::line(format!("params    {}", clean(&summary.params_json)))?;
    output::line(format!("trigger   {}", clean(&summary.trigger)))?;
    if let Some(change) = &summary.change {
        output::line(format!("change    {}", describe(change)))?;
    }
    if !summary.repairs.is_empty() {
        output::line(format!("repairs   {}", clean(&summary.repairs)))?;
    }
    output::line(format!("trace     {}", trace_link(&summary.trace_id)))?;
    for (name, at) in [
        ("created", &summary.created_at),
        ("started", &summary.started_at),
        ("finished", &summary.finished_at),
    ] {
        if let Some(at) = at {
            output::line(format!("{name:<9} {}", time(at)))?;
        }
    }
    output::line("")?;
    let rows: Vec<Vec<String>> = run.tasks.iter().map(task_row).collect();
    output::table(
        &["TASK", "KIND", "STATE", "ATTEMPT", "WORKER", "TOOK", "WHY"],
        &rows,
    )?;
    let earlier = run.tasks.iter().flat_map(earlier_rows);
    let earlier: Vec<Vec<String>> = earlier.collect();
    if earlier.is_empty() {
        return Ok(());
    }
    output::line("\nearlier attempts")?;
    let head = ["TASK", "ATTEMPT", "WORKER", "STARTED", "TOOK", "WHY"];
    Ok(output::table(&head, &earlier)?)
}

fn earlier_rows(task: &TaskView) -> impl Iterator<Item = Vec<String>> {
    task.earlier.iter().map(|past| {
        let took = match (&past.started_at, &past.finished_at) {
            (Some(a), Some(b)) => duration(between(a, b)),
            _ => String::new(),
        };
        vec![
            task.task.clone(),
            past.attempt.to_string(),
            past.worker.clone(),
            past.started_at.as_ref().map(time).unwrap_or_default(),
            took,
            reason_name(past.reason()).to_owned(),
        ]
    })
}

/// A trace's id, with where to look at it.
pub fn trace_link(trace: &str) -> String {
    let id = clean(trace);
    match telemetry::trace_url() {
        Some(template) => format!("{id}  {}", clean(&template.replace("{trace_id}", trace))),
        None => id,
    }
}

fn task_row(task: &TaskView) -> Vec<String> {
    let took = match (&task.started_at, &task.finished_at) {
        (Some(a), Some(b)) if task.state() != TaskState::Cached => duration(between(a, b)),
        _ => String::new(),
    };
    let why = task.failure.as_ref().map_or_else(
        || task.note.clone(),
        |f| format!("{}: {}", reason_name(f.reason()), f.message),
    );
    let attempt = if task.attempt == 0 {
        String::new()
    } else {
        task.attempt.to_string()
    };
    vec![
        task.task.clone(),
        task.kind.clone(),
        task_state(task.state()).to_owned(),
        attempt,
        task.worker.clone(),
        took,
        why,
    ]
}

/// Starts a run again; gives its id.
async fn retry(cluster: &Cluster, run: String) -> Result<String, Status> {
    let summary = async |run| {
        let found = cluster.runs().get_run(GetRunRequest { run }).await?;
        Ok::<_, Status>(found.into_inner().summary.unwrap_or_default())
    };
    let before = summary(run).await?;
    let run = before.run.clone();
    let asked = cluster.runs().retry_run(RetryRunRequest { run }).await;
    match asked {
        Ok(_) => Ok(before.run),
        // It was sent twice, since the first answer was lost with its leader: that one has counted.
        Err(status)
            if status.code() == Code::FailedPrecondition
                && before.finished_at.is_some()
                && summary(before.run.clone()).await?.finished_at != before.finished_at =>
        {
            Ok(before.run)
        }
        Err(status) => Err(status),
    }
}

async fn cancel(
    cluster: &Cluster,
    run: String,
    why: String,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let answer = cluster
        .runs()
        .cancel_run(CancelRunRequest { run, why })
        .await?
        .into_inner();
    let summary = answer.summary.unwrap_or_default();
    if format == Format::Json {
        output::json(&summary_json(&summary))
    } else if quiet {
        Ok(())
    } else {
        Ok(output::line(format!(
            "run {} is {}",
            clean(&summary.run),
            run_state(summary.state())
        ))?)
    }
}

async fn logs(cluster: &Cluster, request: StreamLogsRequest, format: Format) -> anyhow::Result<()> {
    let one_task = !request.task.is_empty();
    let mut entries = cluster
        .runs()
        .stream_logs(request.clone())
        .await?
        .into_inner();
    // Of each attempt, what was printed: a stream that broke begins anew at the next leader.
    let mut printed: HashMap<(String, u32), u64> = HashMap::new();
    let mut skip = printed.clone();
    let mut reopen = Reopen::default();
    loop {
        let entry = match entries.message().await {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(()),
            Err(status) => {
                reopen.after(status).await?;
                entries = cluster
                    .runs()
                    .stream_logs(request.clone())
                    .await?
                    .into_inner();
                skip.clone_from(&printed);
                continue;
            }
        };
        reopen.went_on();
        let attempt = (entry.task.clone(), entry.attempt);
        if let Some(left) = skip.get_mut(&attempt).filter(|left| **left > 0) {
            *left -= 1;
            continue;
        }
        *printed.entry(attempt).or_default() += 1;
        let at = entry.at.as_ref().map(time).unwrap_or_default();
        let name = clean(&entry.task);
        if format == Format::Json {
            let mut value = json!({"task": entry.task, "attempt": entry.attempt, "at": at});
            match &entry.entry {
                Some(Entry::Line(line)) => {
                    value["source"] = json!(line.source);
                    value["text"] = json!(line.text);
                }
                Some(Entry::Point(p)) => {
                    value["name"] = json!(p.name);
                    value["step"] = json!(p.step);
                    value["value"] = json!(p.value);
                }
                Some(Entry::End(end)) => {
                    value["end"] = json!({"lines": end.lines, "truncated": end.truncated});
                }
                None => continue,
            }
            output::line(value.to_string())?;
            continue;
        }
        let prefix = if one_task {
            String::new()
        } else {
            format!("{name}: ")
        };
        match entry.entry {
            Some(Entry::Line(line)) => output::line(format!("{at} {prefix}{}", clean(&line.text)))?,
            Some(Entry::Point(p)) => {
                output::line(format!(
                    "{at} {prefix}{} step {} = {}",
                    clean(&p.name),
                    p.step,
                    p.value
                ))?;
            }
            Some(Entry::End(end)) if end.truncated => {
                output::line(format!(
                    "{prefix}the log is truncated at line {}: the worker was lost",
                    end.lines
                ))?;
            }
            Some(Entry::End(_)) | None => {}
        }
    }
}

/// A wire timestamp as RFC 3339 in UTC, to the millisecond.
pub fn time(at: &Timestamp) -> String {
    let at = Duration::new(
        u64::try_from(at.seconds).unwrap_or(0),
        u32::try_from(at.nanos).unwrap_or(0),
    );
    let micros = u64::try_from(at.as_micros()).unwrap_or(u64::MAX);
    emberline_common::time::Timestamp(micros).to_string()
}

/// A run's state as shown.
pub fn run_state(state: RunState) -> &'static str {
    match state {
        RunState::Unspecified => "unknown",
        RunState::Queued => "queued",
        RunState::Running => "running",
        RunState::Cancelling => "cancelling",
        RunState::Succeeded => "succeeded",
        RunState::Failed => "failed",
        RunState::Cancelled => "cancelled",
    }
}

fn task_state(state: TaskState) -> &'static str {
    match state {
        TaskState::Unspecified => "unknown",
        TaskState::Waiting => "waiting",
        TaskState::Queued => "queued",
        TaskState::Running => "running",
        TaskState::Backoff => "backoff",
        TaskState::Succeeded => "succeeded",
        TaskState::Cached => "cached",
        TaskState::Failed => "failed",
        TaskState::Skipped => "skipped",
        TaskState::Cancelled => "cancelled",
    }
}

fn parsed(json: &str) -> Value {
    serde_json::from_str(json).unwrap_or(Value::Null)
}

/// A run without its tasks, for programs.
pub fn summary_json(run: &RunSummary) -> Value {
    json!({
        "run": run.run,
        "pipeline": run.pipeline,
        "revision": run.revision,
        "state": run_state(run.state()),
        "failure": run.failure.as_ref().map(|f| json!({"reason": reason_name(f.reason()), "message": f.message})),
        "params": parsed(&run.params_json),
        "priority": run.priority,
        "created_at": run.created_at.as_ref().map(time),
        "started_at": run.started_at.as_ref().map(time),
        "finished_at": run.finished_at.as_ref().map(time),
        "tasks_total": run.tasks_total,
        "tasks_done": run.tasks_done,
        "tasks_cached": run.tasks_cached,
        "trigger": run.trigger,
        "change": run.change.as_ref().map(change_json),
        "repairs": run.repairs,
        "trace_id": run.trace_id,
        "trace_url": telemetry::trace_url().map(|t| t.replace("{trace_id}", &run.trace_id)),
    })
}

/// A run with its tasks, for programs.
pub fn run_json(run: &GetRunResponse) -> Value {
    let mut value = run.summary.as_ref().map_or(json!({}), summary_json);
    let tasks = run.tasks.iter().map(|t| {
        json!({
            "task": t.task,
            "stage": t.stage,
            "kind": t.kind,
            "state": task_state(t.state()),
            "attempt": t.attempt,
            "worker": t.worker,
            "failure": t.failure.as_ref().map(|f| json!({"reason": reason_name(f.reason()), "message": f.message})),
            "outputs": t.outputs.iter().map(|o| json!({"name": o.name, "manifest": o.manifest, "bytes": o.bytes})).collect::<Vec<_>>(),
            "results": parsed(&t.results_json),
            "note": t.note,
            "matrix": parsed(&t.matrix_json),
            "needs": t.needs,
            "ready_at": t.ready_at.as_ref().map(time),
            "started_at": t.started_at.as_ref().map(time),
            "finished_at": t.finished_at.as_ref().map(time),
            "earlier": t.earlier.iter().map(|p| json!({
                "attempt": p.attempt,
                "worker": p.worker,
                "reason": reason_name(p.reason()),
                "started_at": p.started_at.as_ref().map(time),
                "finished_at": p.finished_at.as_ref().map(time),
            })).collect::<Vec<_>>(),
            "cached_from_run": t.cached_from_run,
            "timing": t.timing.as_ref().map(|t| json!({"fetch_micros": t.fetch_micros, "stage_micros": t.stage_micros, "store_micros": t.store_micros})),
        })
    });
    value["tasks"] = tasks.collect();
    value
}
