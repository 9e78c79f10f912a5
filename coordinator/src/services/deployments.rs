//! Deployments and environments: to read, to mark as failed, to roll back.

use std::{sync::Arc, time::Duration};

use emberline_common::{
    delivery::{Change, Deployment, DeploymentOutcome},
    ids::{DeploymentId, EnvironmentName, ModelName, PipelineName},
    serving::VersionStats,
    wire,
};
use emberline_proto::v1::{
    ApproveDeploymentRequest, ApproveDeploymentResponse, DeploymentView, EnvironmentView,
    GetDeploymentRequest, GetDeploymentResponse, ListDeploymentsRequest, ListDeploymentsResponse,
    ListEnvironmentsRequest, ListEnvironmentsResponse, MarkDeploymentFailedRequest,
    MarkDeploymentFailedResponse, ReplicaView, RollBackRequest, RollBackResponse, ServingView,
    WatchDeploymentRequest, WatchDeploymentResponse, deployment_service_server::DeploymentService,
};
use futures::StreamExt as _;
use tokio::time::{Interval, interval};
use tonic::{Request, Response, Status};

use super::{Answers, Context, access::Subject, in_time, status, translate};
use crate::engine::{
    Engine,
    api::{Command, Outcome},
    serving::Replica,
};

pub(crate) struct Deployments(pub(crate) Arc<Context>);

fn view(engine: &Engine, deployment: &Deployment) -> DeploymentView {
    let live = engine
        .environments()
        .any(|(_, _, live)| live.deployment == deployment.id);
    DeploymentView {
        live,
        ..deployment.into()
    }
}

fn replica(replica: &Replica) -> ReplicaView {
    ReplicaView {
        worker: replica.worker.to_string(),
        address: replica.address.clone(),
        placed: replica.placed,
        ready: replica.ready,
        versions: replica.versions.iter().map(Into::into).collect(),
    }
}

/// With what serves it and what was counted, while it is in service.
fn whole(engine: &Engine, deployment: &Deployment) -> DeploymentView {
    let mut view = view(engine, deployment);
    if let (Some(waits), Some(rollout)) = (engine.waits_for(deployment), &mut view.rollout) {
        rollout.note = waits;
    }
    let window = engine.window(deployment);
    if !view.live && window.is_none() {
        return view;
    }
    let mut replicas = engine.replicas(&deployment.environment, &deployment.model);
    let coming = deployment.outcome == DeploymentOutcome::InProgress;
    if replicas.is_empty() && !coming {
        return view;
    }
    let (new, live) = match window {
        Some((new, live)) => (new, coming.then_some(live)),
        // Nothing is judged any more: what was counted since it was loaded.
        None => {
            let mut all = VersionStats::default();
            let own = replicas.iter().flat_map(|r| &r.versions);
            for version in own.filter(|v| v.version == deployment.version) {
                all.add(&version.stats);
            }
            (all, None)
        }
    };
    // What each has counted is told in sum.
    for version in replicas.iter_mut().flat_map(|r| &mut r.versions) {
        version.stats = VersionStats::default();
    }
    view.serving = Some(ServingView {
        replicas: replicas.iter().map(replica).collect(),
        version: Some((&new).into()),
        live: live.as_ref().map(Into::into),
    });
    view
}

/// Without the commits, of which there may be many.
fn line(engine: &Engine, deployment: &Deployment) -> DeploymentView {
    let change = deployment.change.as_ref().map(|change| Change {
        commits: Vec::new(),
        ..change.clone()
    });
    let live = view(engine, deployment);
    DeploymentView {
        change: change.as_ref().map(Into::into),
        ..live
    }
}

impl Deployments {
    /// Gives a command whose outcome is a deployment.
    async fn command(
        &self,
        command: Command,
    ) -> Result<(DeploymentView, Option<DeploymentView>), Status> {
        let outcome = self.0.runtime.command(command).await;
        let Outcome::Deployment { deployment, failed } = outcome.map_err(status::from_runtime)?
        else {
            return Err(Status::internal(
                "an answer to something else: please report this",
            ));
        };
        let views = self.0.runtime.read(move |engine| {
            let failed = failed.map(|failed| view(engine, &failed));
            (view(engine, &deployment), failed)
        });
        views.await.map_err(status::from_runtime)
    }
}

/// How often a deployment is looked at for whoever watches it: what workers count changes all the time.
const LOOKS_EVERY: Duration = Duration::from_millis(250);

/// Tells of one deployment each time that it has changed.
struct Watch {
    context: Arc<Context>,
    id: DeploymentId,
    told: Option<DeploymentView>,
    every: Interval,
    over: bool,
}

impl Watch {
    async fn next(&mut self) -> Option<Result<WatchDeploymentResponse, Status>> {
        loop {
            if self.over {
                return None;
            }
            tokio::select! {
                _ = self.every.tick() => {}
                () = self.context.tasks.stopping().cancelled() => {
                    self.over = true;
                    return Some(Err(status::stopping()));
                }
            }
            let id = self.id;
            let found = self.context.runtime.read(move |engine| {
                let found = engine.deployment(id)?;
                Some((whole(engine, found), engine.window(found).is_none()))
            });
            let (view, settled) = match found.await {
                Ok(Some(found)) => found,
                Ok(None) => {
                    self.over = true;
                    return Some(Err(status::not_found("deployment", &id.to_string())));
                }
                Err(e) => {
                    self.over = true;
                    return Some(Err(status::from_runtime(e)));
                }
            };
            self.over = settled;
            if settled || self.told.as_ref() != Some(&view) {
                self.told = Some(view.clone());
                return Some(Ok(WatchDeploymentResponse {
                    deployment: Some(view),
                }));
            }
        }
    }
}

fn deployment_id(field: &str, text: &str) -> Result<DeploymentId, Status> {
    wire::id(field, text).map_err(translate::bad)
}

/// A text for people, on one line.
fn why(text: String) -> Result<String, Status> {
    if text.chars().any(char::is_control) {
        return Err(status::bad_field(
            "why",
            "write one line without control characters",
        ));
    }
    Ok(translate::cut(text, 512))
}

#[tonic::async_trait]
impl DeploymentService for Deployments {
    async fn list_deployments(
        &self,
        request: Request<ListDeploymentsRequest>,
    ) -> Result<Response<ListDeploymentsResponse>, Status> {
        in_time("the list", async {
            let request = request.into_inner();
            let size = translate::page_size(request.page_size);
            let bad = translate::bad;
            let before: Option<DeploymentId> =
                wire::optional_id("page_token", &request.page_token).map_err(bad)?;
            let pipeline: Option<PipelineName> =
                wire::optional_id("pipeline", &request.pipeline).map_err(bad)?;
            let environment: Option<EnvironmentName> =
                wire::optional_id("environment", &request.environment).map_err(bad)?;
            let model: Option<ModelName> =
                wire::optional_id("model", &request.model).map_err(bad)?;
            let page = self.0.runtime.read(move |engine| {
                let found = engine.deployments().rev().filter(|d| {
                    before.is_none_or(|before| d.id < before)
                        && pipeline.as_ref().is_none_or(|p| d.pipeline == *p)
                        && environment.as_ref().is_none_or(|e| d.environment == *e)
                        && model.as_ref().is_none_or(|m| d.model == *m)
                });
                let mut found: Vec<_> = found.take(size + 1).map(|d| line(engine, d)).collect();
                let more = found.len() > size;
                found.truncate(size);
                (found, more)
            });
            let (deployments, more) = page.await.map_err(status::from_runtime)?;
            let next_page_token = match deployments.last() {
                Some(last) if more => last.deployment.clone(),
                _ => String::new(),
            };
            Ok(ListDeploymentsResponse {
                deployments,
                next_page_token,
            })
        })
        .await
    }

    async fn get_deployment(
        &self,
        request: Request<GetDeploymentRequest>,
    ) -> Result<Response<GetDeploymentResponse>, Status> {
        in_time("the answer", async {
            let id = deployment_id("deployment", &request.get_ref().deployment)?;
            let found = self.0.runtime.read(move |engine| {
                let found = engine.deployment(id);
                found.map(|deployment| whole(engine, deployment))
            });
            let found = found.await.map_err(status::from_runtime)?;
            let found = found.ok_or_else(|| status::not_found("deployment", &id.to_string()))?;
            Ok(GetDeploymentResponse {
                deployment: Some(found),
            })
        })
        .await
    }

    async fn mark_deployment_failed(
        &self,
        request: Request<MarkDeploymentFailedRequest>,
    ) -> Result<Response<MarkDeploymentFailedResponse>, Status> {
        in_time("the answer", async {
            let subject = Subject::of(&request);
            let request = request.into_inner();
            subject.is(request.deployment.as_str());
            let began_at = request.began_at.map(TryInto::try_into).transpose();
            let command = Command::MarkFailed {
                deployment: deployment_id("deployment", &request.deployment)?,
                began_at: began_at
                    .map_err(|e: wire::WireError| translate::bad(e.within("began_at")))?,
                why: why(request.why)?,
            };
            let (deployment, _) = self.command(command).await?;
            Ok(MarkDeploymentFailedResponse {
                deployment: Some(deployment),
            })
        })
        .await
    }

    async fn roll_back(
        &self,
        request: Request<RollBackRequest>,
    ) -> Result<Response<RollBackResponse>, Status> {
        in_time("the answer", async {
            let subject = Subject::of(&request);
            let request = request.into_inner();
            subject.is(format!("{} {}", request.environment, request.model));
            let bad = translate::bad;
            let command = Command::RollBack {
                environment: wire::id("environment", &request.environment).map_err(bad)?,
                model: wire::optional_id("model", &request.model).map_err(bad)?,
                expected: wire::optional_id("expected", &request.expected).map_err(bad)?,
                why: why(request.why)?,
            };
            let (deployment, failed) = self.command(command).await?;
            Ok(RollBackResponse {
                deployment: Some(deployment),
                failed,
            })
        })
        .await
    }

    async fn approve_deployment(
        &self,
        request: Request<ApproveDeploymentRequest>,
    ) -> Result<Response<ApproveDeploymentResponse>, Status> {
        in_time("the answer", async {
            Subject::of(&request).is(request.get_ref().deployment.as_str());
            let deployment = deployment_id("deployment", &request.get_ref().deployment)?;
            let (deployment, _) = self.command(Command::Approve { deployment }).await?;
            Ok(ApproveDeploymentResponse {
                deployment: Some(deployment),
            })
        })
        .await
    }

    type WatchDeploymentStream = Answers<WatchDeploymentResponse>;

    async fn watch_deployment(
        &self,
        request: Request<WatchDeploymentRequest>,
    ) -> Result<Response<Self::WatchDeploymentStream>, Status> {
        let id = deployment_id("deployment", &request.get_ref().deployment)?;
        let mut watch = Watch {
            context: Arc::clone(&self.0),
            id,
            told: None,
            every: interval(LOOKS_EVERY),
            over: false,
        };
        // What is wrong is told at once, and not in the stream.
        let first = watch.next().await.transpose()?;
        let first = futures::stream::iter(first.map(Ok));
        let rest = futures::stream::unfold(watch, |mut watch| async move {
            let next = watch.next().await?;
            Some((next, watch))
        });
        Ok(Response::new(Box::pin(first.chain(rest))))
    }

    async fn list_environments(
        &self,
        _request: Request<ListEnvironmentsRequest>,
    ) -> Result<Response<ListEnvironmentsResponse>, Status> {
        in_time("the list", async {
            let found = self.0.runtime.read(|engine| {
                let all = engine.environments();
                all.map(|(environment, model, live)| {
                    let replicas = engine.replicas(environment, model);
                    let coming = engine.coming_to(environment, model);
                    EnvironmentView {
                        environment: environment.to_string(),
                        model: model.to_string(),
                        version: live.version,
                        deployment: live.deployment.to_string(),
                        since: Some(live.since.into()),
                        coming: coming.map(|d| d.id.to_string()).unwrap_or_default(),
                        replicas: replicas.iter().map(replica).collect(),
                        wanted_replicas: engine.wanted_replicas(environment, model),
                    }
                })
                .collect()
            });
            let environments = found.await.map_err(status::from_runtime)?;
            Ok(ListEnvironmentsResponse { environments })
        })
        .await
    }
}
