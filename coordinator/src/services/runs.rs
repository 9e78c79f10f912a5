//! What a user calls: check, plan, submit, look, follow, stop, start again.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use emberline_common::{
    ids::{Digest, PipelineName, RunId},
    run_view::RunState,
    trace::TraceContext,
    wire,
};
use emberline_proto::v1::{
    AttemptProgress, CancelRunRequest, CancelRunResponse, GetRunRequest, GetRunResponse,
    ListRunsRequest, ListRunsResponse, PlanRunRequest, PlanRunResponse, PlannedAction, PlannedTask,
    RetryRunRequest, RetryRunResponse, StreamLogsRequest, StreamLogsResponse, SubmitRunRequest,
    SubmitRunResponse, ValidatePipelineRequest, ValidatePipelineResponse, WatchRunRequest,
    WatchRunResponse, run_service_server::RunService, watch_run_response::Event,
};
use futures::{StreamExt as _, stream};
use tonic::{Request, Response, Status};

use super::{Answers, Context, access::Subject, in_time, status, submit, translate};
use crate::{
    engine::api::{self, Command, Outcome},
    runtime::{
        RuntimeError,
        watchers::{Change, Watching},
    },
};

const MAX_YAML_BYTES: u64 = 1 << 20;
/// How long a retry waits for the record of a run that has just ended.
const ARCHIVED_WITHIN: Duration = Duration::from_secs(5);
/// How long a view of a run waits for the pipeline's text.
const TEXT_WITHIN: Duration = Duration::from_millis(500);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

pub(crate) struct Runs(pub(crate) Arc<Context>);

impl Runs {
    async fn yaml(&self, revision: &Digest) -> String {
        let read = self.0.artifacts.get_bytes(revision, MAX_YAML_BYTES);
        // What is known of the run is worth more than an error about its text, or a wait for it.
        match tokio::time::timeout(TEXT_WITHIN, read).await {
            Ok(Ok(bytes)) => return String::from_utf8_lossy(&bytes).into_owned(),
            Ok(Err(e)) => tracing::warn!(%revision, error = %e, "a pipeline's text cannot be read"),
            Err(_) => tracing::warn!(%revision, "a pipeline's text does not come in time"),
        }
        String::new()
    }

    async fn submit(&self, request: SubmitRunRequest) -> Result<SubmitRunResponse, Status> {
        let run = self.new_run_id()?;
        let (submission, text) = submit::submission(request, run, self.0.clock.now()).await?;
        let _hold = submit::store(&self.0, &submission, text).await?;
        let command = Command::Submit(Box::new(submission));
        match self.0.runtime.command(command).await {
            Ok(Outcome::Submitted {
                run,
                trace,
                already_existed,
            }) => Ok(SubmitRunResponse {
                run: run.to_string(),
                already_existed,
                trace_id: trace.to_string(),
            }),
            Ok(other) => Err(unexpected(&other)),
            Err(e) => Err(status::from_runtime(e)),
        }
    }

    fn new_run_id(&self) -> Result<RunId, Status> {
        let mut random = [0; 16];
        getrandom::fill(&mut random)
            .map_err(|e| Status::internal(format!("the system has no random bytes: {e}")))?;
        self.0
            .run_ids
            .next(self.0.clock.now(), u128::from_be_bytes(random))
            .map_err(|e| Status::internal(e.to_string()))
    }

    async fn plan(&self, request: PlanRunRequest) -> Result<PlanRunResponse, Status> {
        let request = request
            .submission
            .ok_or_else(|| status::bad_field("submission", "it is missing"))?;
        let (submission, _) =
            submit::submission(request, self.new_run_id()?, self.0.clock.now()).await?;
        let tasks = self.0.runtime.read(move |engine| engine.plan(&submission));
        let tasks = tasks.await.map_err(status::from_runtime)?;
        Ok(PlanRunResponse {
            tasks: tasks.into_iter().map(planned).collect(),
        })
    }

    async fn cancel(&self, request: CancelRunRequest) -> Result<CancelRunResponse, Status> {
        let place = self.0.lookup.place(&request.run).await;
        let run = place.map_err(status::from_lookup)?.run().clone();
        let why = if request.why.is_empty() {
            "cancelled by a user".to_owned()
        } else {
            translate::cut(request.why, 1024)
        };
        let command = Command::Cancel {
            run: run.clone(),
            why,
        };
        match self.0.runtime.command(command).await {
            Ok(Outcome::Run(summary)) => Ok(CancelRunResponse {
                summary: Some(summary.as_ref().into()),
            }),
            Ok(other) => Err(unexpected(&other)),
            Err(RuntimeError::Refused(api::Refusal::NoSuchRun(_))) => {
                let view = self.0.lookup.view(run.as_str()).await;
                let summary = view.map_err(status::from_lookup)?.summary;
                if summary.state == RunState::Cancelled {
                    return Ok(CancelRunResponse {
                        summary: Some((&summary).into()),
                    });
                }
                Err(status::failed_precondition(
                    "WRONG_STATE",
                    format!(
                        "run `{run}` has {}: there is nothing to cancel",
                        summary.state
                    ),
                ))
            }
            Err(e) => Err(status::from_runtime(e)),
        }
    }

    async fn retry(&self, request: RetryRunRequest) -> Result<RetryRunResponse, Status> {
        let deadline = tokio::time::Instant::now() + ARCHIVED_WITHIN;
        let archived = loop {
            if let Some(run) = self
                .0
                .lookup
                .archived(&request.run)
                .await
                .map_err(status::from_lookup)?
            {
                break run;
            }
            let view = self.0.lookup.view(&request.run).await;
            let summary = view.map_err(status::from_lookup)?.summary;
            if !summary.state.is_final() {
                return Err(status::failed_precondition(
                    "WRONG_STATE",
                    format!(
                        "run `{}` is {}: cancel it, or wait for its end, before starting it again",
                        summary.run, summary.state
                    ),
                ));
            }
            // It has ended, and its record is being stored.
            if tokio::time::Instant::now() > deadline {
                return Err(status::not_archived(&summary.run));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        let command = Command::Retry(Box::new(archived.as_ref().clone()));
        match self.0.runtime.command(command).await {
            Ok(Outcome::Run(summary)) => Ok(RetryRunResponse {
                summary: Some(summary.as_ref().into()),
            }),
            Ok(other) => Err(unexpected(&other)),
            Err(e) => Err(status::from_runtime(e)),
        }
    }

    async fn list(&self, request: ListRunsRequest) -> Result<ListRunsResponse, Status> {
        let size = translate::page_size(request.page_size);
        let after: Option<RunId> =
            wire::optional_id("page_token", &request.page_token).map_err(translate::bad)?;
        let pipeline: Option<PipelineName> =
            wire::optional_id("pipeline", &request.pipeline).map_err(translate::bad)?;
        let states = request.states.into_iter().map(RunState::try_from);
        let states: BTreeSet<RunState> =
            states.collect::<Result<_, _>>().map_err(translate::bad)?;
        let page = self.0.lookup.page(after, size, move |run| {
            pipeline.as_ref().is_none_or(|p| run.pipeline == *p)
                && (states.is_empty() || states.contains(&run.state))
        });
        let (runs, more) = page.await.map_err(status::from_lookup)?;
        let next_page_token = match runs.last() {
            Some(last) if more => last.run.to_string(),
            _ => String::new(),
        };
        Ok(ListRunsResponse {
            runs: runs.iter().map(Into::into).collect(),
            next_page_token,
        })
    }

    async fn watch(&self, text: &str) -> Result<Answers<WatchRunResponse>, Status> {
        let place = self.0.lookup.place(text).await;
        let run = place.map_err(status::from_lookup)?.run().clone();
        let watched = self.0.runtime.watch(run.clone()).await;
        let (view, watching) = match watched.map_err(status::from_runtime)? {
            Some((view, watching)) => (view, Some(watching)),
            None => {
                let view = self.0.lookup.view(run.as_str()).await;
                (view.map_err(status::from_lookup)?, None)
            }
        };
        let yaml = self.yaml(&view.summary.revision).await;
        let snapshot = Event::Snapshot(translate::run(&view, yaml));
        let first = stream::once(async move { Ok(event(snapshot)) });
        match watching {
            Some(watching) if !view.summary.state.is_final() => {
                Ok(Box::pin(first.chain(changes(watching))))
            }
            _ => Ok(Box::pin(first)),
        }
    }
}

fn unexpected(outcome: &Outcome) -> Status {
    Status::internal(format!(
        "the engine answered {outcome:?}: please report this"
    ))
}

fn planned(task: api::PlannedTask) -> PlannedTask {
    let action = match task.action {
        api::PlannedAction::Run => PlannedAction::Run,
        api::PlannedAction::Reuse => PlannedAction::Reuse,
        api::PlannedAction::Depends => PlannedAction::Depends,
    };
    PlannedTask {
        task: task.task.to_string(),
        kind: task.kind.to_string(),
        action: action.into(),
        why: task.why,
        needs: task.needs.iter().map(ToString::to_string).collect(),
    }
}

fn event(event: Event) -> WatchRunResponse {
    WatchRunResponse { event: Some(event) }
}

/// The changes of a run until it ends.
fn changes(
    watching: Watching,
) -> impl futures::Stream<Item = Result<WatchRunResponse, Status>> + Send {
    stream::unfold(Some(watching), |watching| async move {
        let mut watching = watching?;
        match watching.next().await {
            Err(end) => Some((vec![Err(status::from_watch(end))], None)),
            Ok(changes) => {
                let ended = changes
                    .iter()
                    .any(|c| matches!(c, Change::Run(run) if run.state.is_final()));
                let events = changes.iter().map(|c| Ok(event(change(c)))).collect();
                Some((events, (!ended).then_some(watching)))
            }
        }
    })
    .flat_map(|events: Vec<_>| stream::iter(events))
}

fn change(change: &Change) -> Event {
    match change {
        Change::Run(run) => Event::Run(run.as_ref().into()),
        Change::Task(task) => Event::Task(task.as_ref().into()),
        Change::Progress(progress) => Event::Progress(AttemptProgress {
            run: progress.id.run.to_string(),
            task: progress.id.task.to_string(),
            attempt: progress.id.attempt,
            fraction: progress.fraction,
            message: progress.message.clone(),
        }),
    }
}

#[tonic::async_trait]
impl RunService for Runs {
    type WatchRunStream = Answers<WatchRunResponse>;
    type StreamLogsStream = Answers<StreamLogsResponse>;

    async fn validate_pipeline(
        &self,
        request: Request<ValidatePipelineRequest>,
    ) -> Result<Response<ValidatePipelineResponse>, Status> {
        in_time("the check", async {
            let request = request.into_inner();
            let params = submit::params(request.params)?;
            let checked = submit::check(request.file_name, request.pipeline_yaml, params).await?;
            let diagnostics = checked.err().unwrap_or_default();
            let diagnostics = diagnostics.into_iter().map(submit::diagnostic).collect();
            Ok(ValidatePipelineResponse { diagnostics })
        })
        .await
    }

    async fn plan_run(
        &self,
        request: Request<PlanRunRequest>,
    ) -> Result<Response<PlanRunResponse>, Status> {
        in_time("the plan", self.plan(request.into_inner())).await
    }

    async fn submit_run(
        &self,
        request: Request<SubmitRunRequest>,
    ) -> Result<Response<SubmitRunResponse>, Status> {
        // A caller that traces its calls says so in their metadata.
        let context = request.metadata().get("traceparent").cloned();
        let subject = Subject::of(&request);
        let mut request = request.into_inner();
        let context = context.as_ref().and_then(|value| value.to_str().ok());
        if let Some(context) = context.filter(|text| text.parse::<TraceContext>().is_ok())
            && request.traceparent.is_empty()
        {
            context.clone_into(&mut request.traceparent);
        }
        let submitted = in_time("the submission", self.submit(request)).await?;
        subject.is(submitted.get_ref().run.as_str());
        Ok(submitted)
    }

    async fn get_run(
        &self,
        request: Request<GetRunRequest>,
    ) -> Result<Response<GetRunResponse>, Status> {
        in_time("the answer", async {
            let view = self.0.lookup.view(&request.get_ref().run).await;
            let view = view.map_err(status::from_lookup)?;
            let yaml = self.yaml(&view.summary.revision).await;
            Ok(translate::run(&view, yaml))
        })
        .await
    }

    async fn list_runs(
        &self,
        request: Request<ListRunsRequest>,
    ) -> Result<Response<ListRunsResponse>, Status> {
        in_time("the list", self.list(request.into_inner())).await
    }

    async fn watch_run(
        &self,
        request: Request<WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        in_time("the snapshot", self.watch(&request.get_ref().run)).await
    }

    async fn cancel_run(
        &self,
        request: Request<CancelRunRequest>,
    ) -> Result<Response<CancelRunResponse>, Status> {
        Subject::of(&request).is(request.get_ref().run.as_str());
        in_time("the cancellation", self.cancel(request.into_inner())).await
    }

    async fn retry_run(
        &self,
        request: Request<RetryRunRequest>,
    ) -> Result<Response<RetryRunResponse>, Status> {
        Subject::of(&request).is(request.get_ref().run.as_str());
        in_time("the retry", self.retry(request.into_inner())).await
    }

    async fn stream_logs(
        &self,
        request: Request<StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let lines = super::logs::open(Arc::clone(&self.0), request.into_inner()).await?;
        Ok(Response::new(lines))
    }
}
