//! `run`: submit a pipeline and follow it to its end.

use emberline_proto::v1::{
    CancelRunRequest, GetRunRequest, GetRunResponse, ListRunsRequest, RunState, SubmitRunResponse,
    watch_run_response::Event,
};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};

use super::{change, rollouts, submission, tell::tell};
use crate::{
    args::{
        CauseArguments, ClusterArguments, Format, LeaveArguments, RunArguments, SubmitArguments,
    },
    client::Cluster,
    exit::{self, Exit},
    output::{self, clean},
    progress::Progress,
    reopen,
};

/// How often a run is followed on a cluster of another process, before we give up.
const TURNS: u32 = 5;

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
    if run.detach {
        stays_up(cluster, "`--detach`")?;
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
            let submitted = send(cluster, pipeline, &run.submit, &run.cause, id).await?;
            if run.detach {
                return tell_submitted(&submitted, format);
            }
            submitted.run
        }
    };
    let followed = follow(cluster, &id, quiet).await?;
    let state = followed.summary.as_ref().map(|s| s.state());
    if state == Some(RunState::Succeeded) && !cluster.is_ours() {
        rollouts::until_begun(cluster, &id, quiet || format == Format::Json).await?;
    }
    let reports = arguments.state_dir.join("reports");
    let outcome = tell(cluster, &followed, Some(&reports), quiet, format).await;
    if cluster.is_ours() {
        finish_others(cluster, &id, quiet).await?;
    }
    outcome
}

/// Submits and leaves.
pub async fn submit(
    arguments: &ClusterArguments,
    what: &LeaveArguments,
    format: Format,
) -> anyhow::Result<()> {
    let pipeline = submission::read(&what.submit.file, &what.submit.params)?;
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = async {
        stays_up(&cluster, "`submit`")?;
        let id = submission::request_id();
        let submitted = send(&cluster, &pipeline, &what.submit, &what.cause, id).await?;
        tell_submitted(&submitted, format)
    };
    let outcome = outcome.await;
    let closed = cluster.close().await;
    outcome.and(closed)
}

fn stays_up(cluster: &Cluster, what: &str) -> Result<(), Exit> {
    if cluster.is_ours() {
        return Err(Exit::input(format!(
            "{what} needs a cluster that stays up: start `emberline dev`, or name one with `--server`"
        )));
    }
    Ok(())
}

async fn send(
    cluster: &Cluster,
    pipeline: &submission::Pipeline,
    what: &SubmitArguments,
    cause: &CauseArguments,
    request_id: String,
) -> anyhow::Result<SubmitRunResponse> {
    let mut request = submission::prepare(cluster, pipeline, what, request_id).await?;
    change::describe(cluster, &mut request, pipeline, &what.file, cause).await?;
    Ok(cluster.runs().submit_run(request).await?.into_inner())
}

fn tell_submitted(submitted: &SubmitRunResponse, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        return output::json(&json!({"run": submitted.run, "trace_id": submitted.trace_id}));
    }
    Ok(output::line(&submitted.run)?)
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
