//! Versions that are delivered: pipelines that run on the cluster, deployments that come into service, and
//! the way back.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use emberline_common::time::Timestamp;
use emberline_proto::v1::{
    DeploymentOutcome, DeploymentView, ListDeploymentsRequest, RollBackRequest, RunState,
    WatchDeploymentRequest,
};
use tokio::time::timeout;

use crate::{
    args::SubmitArguments,
    client::Cluster,
    commands::{run::follow, submission},
    exit::Exit,
};

/// The environment that is served.
const ENVIRONMENT: &str = "production";
/// How long a version may take into service.
const LIVE_WITHIN: Duration = Duration::from_secs(120);
/// Seeds that are tried until a run passes its own gates.
const TRIES: u32 = 10;

/// A version in service.
#[derive(Debug, Clone)]
pub(super) struct Delivered {
    pub model: String,
    pub version: u32,
    pub deployment: String,
    /// When the attempt of its `deploy` stage began, by the leader.
    pub began: Timestamp,
}

/// A pipeline that delivers a model, and the seed that comes next.
pub(super) struct Pipeline {
    file: PathBuf,
    seed: u32,
}

impl Pipeline {
    pub(super) const fn new(file: PathBuf) -> Self {
        Self { file, seed: 100 }
    }

    /// Runs it as it is.
    pub(super) async fn first(&self, cluster: &Cluster) -> anyhow::Result<Delivered> {
        // Known before minutes have passed.
        submission::read(&self.file, &["seed=1".to_owned()])?;
        match self.run(cluster, Vec::new()).await? {
            Ok(delivered) => Ok(delivered),
            Err(why) => {
                let shown = self.file.display();
                Err(Exit::input(format!("the run of `{shown}` did not succeed: {why}")).into())
            }
        }
    }

    /// Runs it with another seed, until one is good enough for its own gates.
    pub(super) async fn another(&mut self, cluster: &Cluster) -> anyhow::Result<Delivered> {
        let mut last = String::new();
        for _ in 0..TRIES {
            self.seed += 1;
            let params = vec![format!("seed={}", self.seed)];
            match self.run(cluster, params).await? {
                Ok(delivered) => return Ok(delivered),
                Err(why) => last = why,
            }
        }
        let shown = self.file.display();
        let why = format!("no run of `{shown}` with {TRIES} other seeds succeeded: {last}");
        Err(Exit::input(why).into())
    }

    async fn run(
        &self,
        cluster: &Cluster,
        params: Vec<String>,
    ) -> anyhow::Result<Result<Delivered, String>> {
        let read = submission::read(&self.file, &params)?;
        let arguments = SubmitArguments {
            file: self.file.clone(),
            params,
            no_cache: false,
            priority: None,
        };
        let request =
            submission::prepare(cluster, &read, &arguments, submission::request_id()).await?;
        let id = cluster.runs().submit_run(request).await?.into_inner().run;
        let run = follow(cluster, &id, true).await?;
        let summary = run.summary.unwrap_or_default();
        if summary.state() != RunState::Succeeded {
            let why = summary.failure.map(|failure| failure.message);
            return Ok(Err(why.unwrap_or_default()));
        }
        let newest = ListDeploymentsRequest {
            environment: ENVIRONMENT.to_owned(),
            ..ListDeploymentsRequest::default()
        };
        let newest = cluster.deployments().list_deployments(newest).await?;
        let newest = newest.into_inner().deployments;
        let Some(deployment) = newest.into_iter().find(|d| d.run == id) else {
            let shown = self.file.display();
            let why = format!("`{shown}` deploys nothing to the environment `{ENVIRONMENT}`");
            return Err(Exit::input(why).into());
        };
        let task = run.tasks.into_iter().find(|t| t.task == deployment.task);
        let began = task.and_then(|task| task.started_at);
        let began = began.context("the `deploy` stage has no beginning")?;
        let live = until_live(cluster, &deployment.deployment).await?;
        Ok(Ok(Delivered {
            model: live.model,
            version: live.version,
            deployment: live.deployment,
            began: began.try_into()?,
        }))
    }
}

/// Makes live again what was live before this.
pub(super) async fn roll_back(cluster: &Cluster, from: &Delivered) -> anyhow::Result<()> {
    let request = RollBackRequest {
        environment: ENVIRONMENT.to_owned(),
        model: from.model.clone(),
        why: "a benchmark".to_owned(),
        expected: from.deployment.clone(),
    };
    let back = cluster.deployments().roll_back(request).await?;
    let back = back.into_inner().deployment.unwrap_or_default();
    until_live(cluster, &back.deployment).await?;
    Ok(())
}

async fn until_live(cluster: &Cluster, deployment: &str) -> anyhow::Result<DeploymentView> {
    let request = WatchDeploymentRequest {
        deployment: deployment.to_owned(),
    };
    let watching = cluster.deployments().watch_deployment(request).await?;
    let mut changes = watching.into_inner();
    let ended = timeout(LIVE_WITHIN, async {
        while let Some(change) = changes.message().await? {
            let now = change.deployment.unwrap_or_default();
            match now.outcome() {
                DeploymentOutcome::InProgress => {}
                DeploymentOutcome::Live => return Ok(now),
                other => anyhow::bail!("the deployment `{deployment}` came to nothing: {other:?}"),
            }
        }
        anyhow::bail!("the deployment `{deployment}` went out of sight")
    });
    ended
        .await
        .with_context(|| format!("`{deployment}` is not live after {LIVE_WITHIN:?}"))?
}
