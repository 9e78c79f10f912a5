//! The metrics of delivery, and what outside systems tell that feeds them.

use std::{sync::Arc, time::Duration};

use emberline_common::{
    dora::{DoraQuery, FAILURE_WINDOW, WINDOW},
    ids::DeploymentId,
    time::Timestamp,
    wire::{self, WireError},
};
use emberline_proto::v1::{
    ExplainDeploymentRequest, ExplainDeploymentResponse, GetMetricsRequest, GetMetricsResponse,
    TakeEventRequest, TakeEventResponse, dora_service_server::DoraService,
};
use tonic::{Request, Response, Status};

use super::{Context, in_time, status, translate};
use crate::{
    dora,
    engine::api::{Command, Outcome},
    events::{self, Heard},
};

pub(crate) struct Dora(pub(crate) Arc<Context>);

/// What is asked for; what is left out is filled in.
fn query(request: GetMetricsRequest, now: Timestamp) -> Result<DoraQuery, WireError> {
    let at = |field: &str, message: Option<prost_types::Timestamp>| {
        let at = message.map(Timestamp::try_from).transpose();
        at.map_err(|e| e.within(field))
    };
    let until = at("until", request.until)?.unwrap_or(now);
    let since = at("since", request.since)?.unwrap_or_else(|| until.min(now).before(WINDOW));
    if since >= until.min(now) {
        let message = "the window is empty: it must begin before it ends, and before now";
        return Err(WireError::new("since", message));
    }
    Ok(DoraQuery {
        pipeline: wire::optional_id("pipeline", &request.pipeline)?,
        environment: wire::optional_id("environment", &request.environment)?,
        include_rollbacks: request.include_rollbacks,
        failure_window: match request.failure_window_micros {
            0 => FAILURE_WINDOW,
            micros => Duration::from_micros(micros),
        },
        ..DoraQuery::within(since, until)
    })
}

impl Dora {
    /// Takes one event that an outside system tells. Whether it was news, and if not, why.
    ///
    /// # Errors
    /// If it cannot be read, or there is nothing that it could be about.
    pub(crate) async fn take(&self, event: &[u8]) -> Result<TakeEventResponse, Status> {
        let source = &self.0.events_source;
        let heard = events::heard(event, source);
        match heard.map_err(|e| status::bad_field("event_json", e.to_string()))? {
            Heard::Nothing(why) => Ok(TakeEventResponse { noted: false, why }),
            Heard::Told(event) => {
                let outcome = self.0.runtime.command(Command::Outside(event)).await;
                let outcome = outcome.map_err(status::from_runtime)?;
                let noted = matches!(outcome, Outcome::Noted { changed: true });
                let why = match noted {
                    true => String::new(),
                    false => "it is known already".to_owned(),
                };
                Ok(TakeEventResponse { noted, why })
            }
        }
    }
}

#[tonic::async_trait]
impl DoraService for Dora {
    async fn get_metrics(
        &self,
        request: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        in_time("the metrics", async {
            let now = self.0.clock.now();
            let query = query(request.into_inner(), now).map_err(translate::bad)?;
            let deployments = self.0.lookup.deployments().await;
            let deployments = deployments.map_err(status::from_runtime)?;
            // Of very many it takes a moment.
            let measured = tokio::task::spawn_blocking(move || {
                let report = dora::measure(&deployments, &query, now);
                (&report).into()
            });
            let report = measured.await.map_err(|_| status::stopping())?;
            Ok(GetMetricsResponse {
                report: Some(report),
            })
        })
        .await
    }

    async fn explain_deployment(
        &self,
        request: Request<ExplainDeploymentRequest>,
    ) -> Result<Response<ExplainDeploymentResponse>, Status> {
        in_time("the explanation", async {
            let id = &request.get_ref().deployment;
            let id: DeploymentId = wire::id("deployment", id).map_err(translate::bad)?;
            let deployments = self.0.lookup.deployments().await;
            let deployments = deployments.map_err(status::from_runtime)?;
            let found = deployments.iter().find(|d| d.id == id);
            let found = found.ok_or_else(|| status::not_found("deployment", &id.to_string()))?;
            // Without the run's tasks there is still something to tell.
            let run = self.0.lookup.view(found.run.as_str()).await;
            let run = run.inspect_err(|e| tracing::info!(%id, error = %e, "without its run"));
            let changes = dora::first_carried(&deployments, found);
            let explanation = dora::explain(found, run.ok().as_ref(), changes);
            let explanation = explanation.as_ref().ok_or_else(|| {
                status::failed_precondition("WRONG_STATE", format!("`{id}` is still under way"))
            })?;
            Ok(ExplainDeploymentResponse {
                explanation: Some(explanation.into()),
            })
        })
        .await
    }

    async fn take_event(
        &self,
        request: Request<TakeEventRequest>,
    ) -> Result<Response<TakeEventResponse>, Status> {
        in_time("the answer", async {
            self.take(request.get_ref().event_json.as_bytes()).await
        })
        .await
    }
}
