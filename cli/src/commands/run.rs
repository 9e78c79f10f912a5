//! `run`: submit a pipeline and follow it to its end.

use std::path::{Path, PathBuf};

use emberline_proto::v1::{
    CancelRunRequest, GetArtifactRequest, GetModelRequest, GetRunRequest, GetRunResponse,
    ListRunsRequest, LogStream, RunState, StreamLogsRequest, TaskState, TaskView,
    stream_logs_response::Entry, watch_run_response::Event,
};
use serde_json::{Map, Value};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};

use super::{runs::run_json, submission};
use crate::{
    args::{ClusterArguments, Format, RunArguments},
    client::Cluster,
    exit::{self, Exit},
    fetch,
    output::{self, clean, duration},
    progress::{Progress, between, reason_name},
    reopen,
};

/// How often a run is followed on a cluster of another process, before we give up.
const TURNS: u32 = 5;
/// Lines of a failed task's log that are shown.
const LAST_LINES: usize = 15;

/// Submits (or resumes) and follows.
pub async fn run(
    arguments: &ClusterArguments,
    run: &RunArguments,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let pipeline = submission::read(&run.submit.file, &run.submit.params)?;
    // One id for all tries, so that a submit whose answer was lost is still one run.
    let request_id = submission::request_id();
    for left in (0..TURNS).rev() {
        let cluster = Cluster::connect(arguments, run.workers).await?;
        let ours = cluster.is_ours();
        let asked = Asked {
            run,
            pipeline: &pipeline,
            request_id: &request_id,
        };
        let outcome = submit_and_follow(&cluster, arguments, &asked, quiet, format).await;
        let closed = cluster.close().await;
        let went_away = outcome.as_ref().is_err_and(|e| {
            let code = e.downcast_ref::<Status>().map(Status::code);
            code.is_some_and(|c| matches!(c, Code::Unavailable | Code::Unknown | Code::Cancelled))
        });
        if !went_away || ours || arguments.server.is_some() || left == 0 {
            return outcome.and(closed);
        }
        // The process whose cluster we used has ended: it is our turn, or another's.
        if !quiet {
            eprintln!(
                "the process that held `{}` has ended; going on",
                arguments.state_dir.display()
            );
        }
    }
    Ok(())
}

/// What is asked for.
struct Asked<'a> {
    run: &'a RunArguments,
    pipeline: &'a submission::Pipeline,
    request_id: &'a str,
}

async fn submit_and_follow(
    cluster: &Cluster,
    arguments: &ClusterArguments,
    asked: &Asked<'_>,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let Asked { run, pipeline, .. } = asked;
    if run.detach && cluster.is_ours() {
        let line = "`--detach` needs a cluster that stays up: start `emberline dev`, or name one with `--server`";
        return Err(Exit::input(line).into());
    }
    let id = match &run.resume {
        Some(id) => {
            let found = cluster
                .runs()
                .get_run(GetRunRequest { run: id.clone() })
                .await?
                .into_inner();
            let summary = found.summary.unwrap_or_default();
            if summary.pipeline != pipeline.checked.spec.pipeline.as_str() {
                let line = format!(
                    "run `{id}` is of pipeline `{}`, not of `{}`",
                    summary.pipeline, pipeline.checked.spec.pipeline
                );
                return Err(Exit::input(line).into());
            }
            summary.run
        }
        None => {
            let id = asked.request_id.to_owned();
            let request = submission::prepare(cluster, pipeline, &run.submit, id).await?;
            cluster.runs().submit_run(request).await?.into_inner().run
        }
    };
    if run.detach {
        return Ok(output::line(id)?);
    }
    let followed = follow(cluster, &id, quiet).await?;
    let reports = arguments.state_dir.join("reports");
    let outcome = tell(cluster, &followed, Some(&reports), quiet, format).await;
    if cluster.is_ours() {
        finish_others(cluster, &id, quiet).await?;
    }
    outcome
}

/// Follows a run to its end; the first Ctrl-C cancels it, the second leaves.
pub async fn follow(cluster: &Cluster, id: &str, quiet: bool) -> anyhow::Result<GetRunResponse> {
    let mut progress = Progress::new(quiet);
    let mut interrupted = false;
    // One listener for all of it: an interrupt that comes while we are busy with the first counts.
    let mut interrupts = signal(SignalKind::interrupt())?;
    let mut watching = std::pin::pin!(reopen::watch(cluster.runs(), id.to_owned()));
    loop {
        tokio::select! {
            event = watching.next() => match event {
                Some(Ok(event)) => {
                    if handle(&mut progress, event.event) {
                        break;
                    }
                }
                Some(Err(status)) => return Err(status.into()),
                None => break,
            },
            stopped = cluster.stopped() => return Err(stopped.into()),
            _ = interrupts.recv() => {
                if interrupted {
                    return Err(left(&mut progress, id));
                }
                interrupted = true;
                progress.line("stopping the run; press Ctrl-C again to leave at once");
                let cancel = CancelRunRequest { run: id.to_owned(), why: "interrupted by Ctrl-C".to_owned() };
                let mut runs = cluster.runs();
                // While nobody leads, this takes as long as it takes to find someone.
                tokio::select! {
                    asked = runs.cancel_run(cancel) => drop(asked?),
                    _ = interrupts.recv() => return Err(left(&mut progress, id)),
                }
            }
        }
    }
    progress.finish();
    let run = cluster
        .runs()
        .get_run(GetRunRequest { run: id.to_owned() })
        .await?
        .into_inner();
    if interrupted {
        let state = run
            .summary
            .as_ref()
            .map_or(RunState::Unspecified, |s| s.state());
        if state != RunState::Succeeded {
            return Err(Exit::new(exit::INTERRUPTED, format!("run `{id}` was cancelled")).into());
        }
    }
    Ok(run)
}

fn left(progress: &mut Progress, id: &str) -> anyhow::Error {
    progress.finish();
    Exit::new(
        exit::INTERRUPTED,
        format!("left; run `{id}` is not finished"),
    )
    .into()
}

/// Shows an event; says whether it was the last.
fn handle(progress: &mut Progress, event: Option<Event>) -> bool {
    let is_final = |state| {
        matches!(
            state,
            RunState::Succeeded | RunState::Failed | RunState::Cancelled
        )
    };
    match event {
        Some(Event::Snapshot(snapshot)) => {
            let summary = snapshot.summary.unwrap_or_default();
            progress.snapshot(&summary, &snapshot.tasks);
            is_final(summary.state())
        }
        Some(Event::Task(task)) => {
            progress.task(&task);
            false
        }
        Some(Event::Progress(attempt)) => {
            progress.progress(&attempt);
            false
        }
        Some(Event::Run(run)) => is_final(run.state()),
        None => false,
    }
}

/// Other runs of this cluster (submitted by other processes, or left over by a crash) are ours to
/// finish: an accepted run is never lost.
async fn finish_others(cluster: &Cluster, id: &str, quiet: bool) -> anyhow::Result<()> {
    loop {
        let states = [RunState::Queued, RunState::Running, RunState::Cancelling];
        let request = ListRunsRequest {
            page_size: 1,
            states: states.map(i32::from).to_vec(),
            ..Default::default()
        };
        let live = cluster.runs().list_runs(request).await?.into_inner().runs;
        let Some(other) = live.into_iter().find(|r| r.run != id) else {
            return Ok(());
        };
        if !quiet {
            eprintln!(
                "finishing run {} of {}, which is still under way",
                clean(&other.run),
                clean(&other.pipeline)
            );
        }
        follow(cluster, &other.run, quiet).await?;
    }
}

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
        tell_model(cluster, task).await?;
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

async fn tell_model(cluster: &Cluster, task: &TaskView) -> anyhow::Result<()> {
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
