//! `rollback` and `environments`: what is live where, and the way back.

use emberline_proto::v1::{
    DeploymentKind, DeploymentOutcome, DeploymentView, EnvironmentView, GetDeploymentRequest,
    ListDeploymentsRequest, ListEnvironmentsRequest, RollBackRequest,
};
use serde_json::json;
use tonic::{Code, Status};

use super::{deployments::deployment_json, rollouts::replica_json, runs::time};
use crate::{
    args::{ClusterArguments, Format, RollbackArguments},
    client::Cluster,
    output::{self, clean},
};

/// Makes live again what was live before.
pub async fn rollback(
    arguments: &ClusterArguments,
    what: RollbackArguments,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let request = RollBackRequest {
        environment: what.environment,
        model: what.model.unwrap_or_default(),
        why: what.why,
        expected: what.expected.unwrap_or_default(),
    };
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = roll_back(&cluster, request, quiet, format).await;
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn roll_back(
    cluster: &Cluster,
    mut request: RollBackRequest,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    if request.expected.is_empty() {
        // A call whose answer was lost may be sent again, and must not go back twice.
        request.expected = undone(cluster, &request).await?;
    }
    let asked = cluster.deployments().roll_back(request.clone()).await;
    let (now, failed) = match asked {
        Ok(answer) => {
            let answer = answer.into_inner();
            (
                answer.deployment.unwrap_or_default(),
                answer.failed.unwrap_or_default(),
            )
        }
        Err(status) => match done_before(cluster, &request, &status).await? {
            Some(done) => done,
            None => return Err(status.into()),
        },
    };
    if format == Format::Json {
        let value =
            json!({"deployment": deployment_json(&now), "failed": deployment_json(&failed)});
        return output::json(&value);
    }
    if quiet {
        return Ok(());
    }
    if failed.outcome() != DeploymentOutcome::Live {
        // It never was live: nothing had to come back.
        return Ok(output::line(format!(
            "{}: {} with version {} of {} is given up; version {} stays live ({})",
            clean(&now.environment),
            clean(&failed.deployment),
            failed.version,
            clean(&now.model),
            now.version,
            clean(&now.deployment),
        ))?);
    }
    Ok(output::line(format!(
        "{}: {} version {} is live again ({}); {} with version {} has failed",
        clean(&now.environment),
        clean(&now.model),
        now.version,
        clean(&now.deployment),
        clean(&failed.deployment),
        failed.version
    ))?)
}

/// The rollback that was asked for, if it was refused because it is done already: the call was sent
/// twice since the first answer was lost with its leader, or somebody else was faster.
async fn done_before(
    cluster: &Cluster,
    request: &RollBackRequest,
    refused: &Status,
) -> anyhow::Result<Option<(DeploymentView, DeploymentView)>> {
    if refused.code() != Code::FailedPrecondition || request.expected.is_empty() {
        return Ok(None);
    }
    let mut deployments = cluster.deployments();
    let failed = GetDeploymentRequest {
        deployment: request.expected.clone(),
    };
    let failed = deployments.get_deployment(failed).await?.into_inner();
    let failed = failed.deployment.unwrap_or_default();
    let given_up = [
        DeploymentOutcome::Aborted,
        DeploymentOutcome::CaughtBeforeExposure,
    ];
    if given_up.contains(&failed.outcome()) {
        // It was under way; what was live stayed so.
        let live = there(cluster, request).await?;
        let live = GetDeploymentRequest {
            deployment: live.map(|live| live.deployment).unwrap_or_default(),
        };
        let live = deployments.get_deployment(live).await?.into_inner();
        return Ok(Some((live.deployment.unwrap_or_default(), failed)));
    }
    let list = ListDeploymentsRequest {
        page_size: 1,
        environment: request.environment.clone(),
        model: request.model.clone(),
        ..Default::default()
    };
    let newest = deployments.list_deployments(list).await?.into_inner();
    let newest = newest.deployments.into_iter().next();
    let is_it =
        |d: &DeploymentView| d.kind() == DeploymentKind::Rollback && d.previous == request.expected;
    let Some(now) = newest.filter(is_it) else {
        return Ok(None);
    };
    Ok(Some((now, failed)))
}

/// The deployment that would be undone, if that is one; else the server says what is wrong.
async fn undone(cluster: &Cluster, request: &RollBackRequest) -> anyhow::Result<String> {
    let there = there(cluster, request).await?;
    Ok(there.map_or_else(String::new, |there| {
        if there.coming.is_empty() {
            there.deployment
        } else {
            there.coming
        }
    }))
}

/// What is live there, if it is one.
async fn there(
    cluster: &Cluster,
    request: &RollBackRequest,
) -> anyhow::Result<Option<EnvironmentView>> {
    let mut deployments = cluster.deployments();
    let all = deployments.list_environments(ListEnvironmentsRequest {});
    let all = all.await?.into_inner().environments.into_iter();
    let mut there = all.filter(|e| {
        e.environment == request.environment
            && (request.model.is_empty() || e.model == request.model)
    });
    Ok(match (there.next(), there.next()) {
        (Some(only), None) => Some(only),
        _ => None,
    })
}

/// Says what is live where.
pub async fn environments(arguments: &ClusterArguments, format: Format) -> anyhow::Result<()> {
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = list(&cluster, format).await;
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn list(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let mut deployments = cluster.deployments();
    let all = deployments.list_environments(ListEnvironmentsRequest {});
    let all = all.await?.into_inner().environments;
    let since = |at: &Option<_>| at.as_ref().map(time);
    if format == Format::Json {
        let all = all.iter().map(|e| {
            json!({
                "environment": e.environment,
                "model": e.model,
                "version": e.version,
                "deployment": e.deployment,
                "since": since(&e.since),
                "coming": e.coming,
                "wanted_replicas": e.wanted_replicas,
                "replicas": e.replicas.iter().map(replica_json).collect::<Vec<_>>(),
            })
        });
        return output::json(&all.collect::<Vec<_>>());
    }
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|e| {
            vec![
                e.environment.clone(),
                e.model.clone(),
                e.version.to_string(),
                e.deployment.clone(),
                since(&e.since).unwrap_or_default(),
                e.coming.clone(),
                served_by(e),
            ]
        })
        .collect();
    let head = [
        "ENVIRONMENT",
        "MODEL",
        "VERSION",
        "DEPLOYMENT",
        "SINCE",
        "COMING",
        "SERVED BY",
    ];
    Ok(output::table(&head, &rows)?)
}

/// Where it answers: each replica's address, with what is not as it should be.
fn served_by(e: &EnvironmentView) -> String {
    if e.replicas.is_empty() {
        return "nobody".to_owned();
    }
    let each = e.replicas.iter().map(|r| {
        let address = clean(&r.address);
        match (r.ready, r.placed) {
            (false, _) => format!("{address} (not ready)"),
            (_, false) => format!("{address} (leaving)"),
            _ => address,
        }
    });
    each.collect::<Vec<_>>().join(", ")
}
