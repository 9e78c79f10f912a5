//! `deployments`: list, show, mark as failed.

use emberline_common::time::Timestamp;
use emberline_proto::v1::{
    Change, ChangeKind, DeploymentFailure, DeploymentKind, DeploymentOutcome, DeploymentView,
    FailureCause, GetDeploymentRequest, ListDeploymentsRequest, MarkDeploymentFailedRequest,
};
use serde_json::{Value, json};

use super::{
    rollouts,
    runs::{time, trace_link},
};
use crate::{
    args::{ClusterArguments, DeploymentsCommand, Format},
    client::Cluster,
    moment::moment,
    output::{self, clean},
};

/// Commits that are shown to people.
const SHOWN_COMMITS: usize = 20;

/// Does one of them.
pub async fn deployments(
    arguments: &ClusterArguments,
    command: DeploymentsCommand,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    // What is wrong is told before anything is started.
    let began_at = match &command {
        DeploymentsCommand::MarkFailed { since, .. } => {
            let now = Timestamp::now();
            let began = since.as_deref().map(|text| moment("--since", text, now));
            began.transpose()?
        }
        _ => None,
    };
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = match command {
        DeploymentsCommand::List {
            pipeline,
            environment,
            model,
            limit,
        } => {
            let request = ListDeploymentsRequest {
                page_size: 0,
                page_token: String::new(),
                pipeline: pipeline.unwrap_or_default(),
                environment: environment.unwrap_or_default(),
                model: model.unwrap_or_default(),
            };
            list(&cluster, request, limit, format).await
        }
        DeploymentsCommand::Show { deployment } => show(&cluster, deployment, format).await,
        DeploymentsCommand::Watch { deployment } => {
            rollouts::watch(&cluster, deployment, quiet, format).await
        }
        DeploymentsCommand::Approve { deployment } => {
            rollouts::approve(&cluster, deployment, quiet, format).await
        }
        DeploymentsCommand::MarkFailed {
            deployment, why, ..
        } => {
            let request = MarkDeploymentFailedRequest {
                deployment,
                why,
                began_at: began_at.map(Into::into),
            };
            mark_failed(&cluster, request, quiet, format).await
        }
    };
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn list(
    cluster: &Cluster,
    mut request: ListDeploymentsRequest,
    limit: u32,
    format: Format,
) -> anyhow::Result<()> {
    let mut found: Vec<DeploymentView> = Vec::new();
    loop {
        let left = limit.saturating_sub(u32::try_from(found.len()).unwrap_or(u32::MAX));
        if left == 0 {
            break;
        }
        request.page_size = left.min(1000);
        let mut deployments = cluster.deployments();
        let page = deployments.list_deployments(request.clone()).await?;
        let page = page.into_inner();
        found.extend(page.deployments);
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    if format == Format::Json {
        return output::json(&found.iter().map(deployment_json).collect::<Vec<_>>());
    }
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|d| {
            vec![
                d.deployment.clone(),
                kind(d.kind()).to_owned(),
                d.environment.clone(),
                format!("{} {}", d.model, d.version),
                state(d),
                d.finished_at.as_ref().map(time).unwrap_or_default(),
                d.change.as_ref().map(short).unwrap_or_default(),
                d.run.clone(),
            ]
        })
        .collect();
    let head = [
        "DEPLOYMENT",
        "KIND",
        "ENVIRONMENT",
        "MODEL",
        "STATE",
        "SINCE",
        "REVISION",
        "RUN",
    ];
    Ok(output::table(&head, &rows)?)
}

async fn show(cluster: &Cluster, deployment: String, format: Format) -> anyhow::Result<()> {
    let request = GetDeploymentRequest { deployment };
    let answer = cluster.deployments().get_deployment(request).await?;
    let deployment = answer.into_inner().deployment.unwrap_or_default();
    if format == Format::Json {
        return output::json(&deployment_json(&deployment));
    }
    Ok(tell(&deployment)?)
}

async fn mark_failed(
    cluster: &Cluster,
    request: MarkDeploymentFailedRequest,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let answer = cluster.deployments().mark_deployment_failed(request).await;
    let deployment = answer?.into_inner().deployment.unwrap_or_default();
    if format == Format::Json {
        return output::json(&deployment_json(&deployment));
    }
    if quiet {
        return Ok(());
    }
    let Some(failure) = deployment.failure.clone() else {
        return Ok(output::line(format!(
            "{} is given up; it had answered for nobody",
            clean(&deployment.deployment)
        ))?);
    };
    Ok(output::line(format!(
        "{} has failed since {} ({})",
        clean(&deployment.deployment),
        failure.began_at.as_ref().map(time).unwrap_or_default(),
        because(&failure)
    ))?)
}

fn tell(d: &DeploymentView) -> std::io::Result<()> {
    let line = |name: &str, text: String| output::line(format!("{name:<12} {text}"));
    line(
        "deployment",
        format!("{} ({})", clean(&d.deployment), kind(d.kind())),
    )?;
    line("environment", clean(&d.environment))?;
    line(
        "model",
        format!("{} version {}", clean(&d.model), d.version),
    )?;
    line("pipeline", clean(&d.pipeline))?;
    line("run", format!("{} task {}", clean(&d.run), clean(&d.task)))?;
    line("state", state(d))?;
    for (name, text) in rollouts::lines(d) {
        line(name, text)?;
    }
    if let Some(failure) = &d.failure {
        let began = failure.began_at.as_ref().map(time).unwrap_or_default();
        line("failed", format!("since {began}: {}", because(failure)))?;
        if let Some(at) = &failure.resolved_at {
            line("resolved", time(at))?;
        }
    }
    for (name, other) in [("previous", &d.previous), ("repairs", &d.repairs)] {
        if !other.is_empty() {
            line(name, clean(other))?;
        }
    }
    for (name, at) in [
        ("accepted", &d.accepted_at),
        ("started", &d.started_at),
        ("finished", &d.finished_at),
    ] {
        if let Some(at) = at {
            line(name, time(at))?;
        }
    }
    line("trace", trace_link(&d.trace_id))?;
    if let Some(change) = &d.change {
        line("change", describe(change))?;
        for commit in change.commits.iter().take(SHOWN_COMMITS) {
            let at = commit.committed_at.as_ref().map(time).unwrap_or_default();
            line("  commit", format!("{} of {at}", clean(&commit.revision)))?;
        }
        let more = change.commits.len().saturating_sub(SHOWN_COMMITS);
        let more = u64::try_from(more).unwrap_or(u64::MAX) + u64::from(change.left_out);
        if more > 0 {
            line("", format!("and {more} more"))?;
        }
    }
    for data in &d.data {
        let at = data.arrived_at.as_ref().map(time).unwrap_or_default();
        let short = data.revision.get(..12).unwrap_or(&data.revision);
        line(
            "data",
            format!("{} {}, arrived {at}", clean(&data.task), clean(short)),
        )?;
    }
    Ok(())
}

/// A change on one line.
pub fn describe(change: &Change) -> String {
    let mut text = match change.kind() {
        ChangeKind::Pipeline => format!("pipeline {}", clean(&short(change))),
        _ => clean(&change.revision),
    };
    if !change.repository.is_empty() {
        text += &format!(" of {}", clean(&change.repository));
    }
    if !change.branch.is_empty() {
        text += &format!(" ({})", clean(&change.branch));
    }
    if !change.id.is_empty() {
        text += &format!(", change {}", clean(&change.id));
    }
    if let Some(at) = &change.committed_at {
        text += &format!(", committed {}", time(at));
    }
    if change.dirty {
        text += ", with changes that were not committed";
    }
    text
}

fn short(change: &Change) -> String {
    let revision = &change.revision;
    let mut short = revision.get(..12).unwrap_or(revision).to_owned();
    if change.dirty {
        short.push('+');
    }
    short
}

fn kind(kind: DeploymentKind) -> &'static str {
    match kind {
        DeploymentKind::Unspecified => "unknown",
        DeploymentKind::Release => "release",
        DeploymentKind::Rollback => "rollback",
    }
}

fn outcome(outcome: DeploymentOutcome) -> &'static str {
    match outcome {
        DeploymentOutcome::Unspecified => "unknown",
        DeploymentOutcome::InProgress => "in_progress",
        DeploymentOutcome::Live => "live",
        DeploymentOutcome::CaughtBeforeExposure => "caught_before_exposure",
        DeploymentOutcome::Aborted => "aborted",
        DeploymentOutcome::Superseded => "superseded",
    }
}

fn cause(cause: FailureCause) -> &'static str {
    match cause {
        FailureCause::Unspecified => "unknown",
        FailureCause::Rollback => "rollback",
        FailureCause::CanaryAborted => "canary_aborted",
        FailureCause::GateBreach => "gate_breach",
        FailureCause::Marked => "marked",
        FailureCause::Incident => "incident",
    }
}

fn because(failure: &DeploymentFailure) -> String {
    let mut text = cause(failure.cause()).replace('_', " ");
    if !failure.incident.is_empty() {
        text += &format!(" {}", clean(&failure.incident));
    }
    if !failure.why.is_empty() {
        text += &format!(": {}", clean(&failure.why));
    }
    text
}

/// What a person asks first: does it answer now, and was it any good?
pub fn state(d: &DeploymentView) -> String {
    let state = match d.outcome() {
        DeploymentOutcome::Live if !d.live => "was live".to_owned(),
        DeploymentOutcome::InProgress => rollouts::progress(d),
        other => outcome(other).replace('_', " "),
    };
    if d.failure.is_some() {
        return format!("{state}, failed");
    }
    state
}

/// A change for programs.
pub fn change_json(change: &Change) -> Value {
    let kind = match change.kind() {
        ChangeKind::Unspecified => "unknown",
        ChangeKind::Code => "code",
        ChangeKind::Pipeline => "pipeline",
    };
    json!({
        "kind": kind,
        "repository": change.repository,
        "branch": change.branch,
        "revision": change.revision,
        "id": change.id,
        "committed_at": change.committed_at.as_ref().map(time),
        "authored_at": change.authored_at.as_ref().map(time),
        "pushed_at": change.pushed_at.as_ref().map(time),
        "dirty": change.dirty,
        "commits": change.commits.iter().map(|c| json!({
            "revision": c.revision,
            "committed_at": c.committed_at.as_ref().map(time),
            "pushed_at": c.pushed_at.as_ref().map(time),
        })).collect::<Vec<_>>(),
        "left_out": change.left_out,
    })
}

/// A deployment for programs.
pub fn deployment_json(d: &DeploymentView) -> Value {
    json!({
        "deployment": d.deployment,
        "kind": kind(d.kind()),
        "environment": d.environment,
        "pipeline": d.pipeline,
        "model": d.model,
        "version": d.version,
        "run": d.run,
        "task": d.task,
        "repairs": d.repairs,
        "previous": d.previous,
        "outcome": outcome(d.outcome()),
        "live": d.live,
        "accepted_at": d.accepted_at.as_ref().map(time),
        "started_at": d.started_at.as_ref().map(time),
        "finished_at": d.finished_at.as_ref().map(time),
        "failure": d.failure.as_ref().map(|f| json!({
            "cause": cause(f.cause()),
            "began_at": f.began_at.as_ref().map(time),
            "noted_at": f.noted_at.as_ref().map(time),
            "why": f.why,
            "incident": f.incident,
            "resolved_at": f.resolved_at.as_ref().map(time),
        })),
        "change": d.change.as_ref().map(change_json),
        "data": d.data.iter().map(|c| json!({
            "task": c.task,
            "revision": c.revision,
            "arrived_at": c.arrived_at.as_ref().map(time),
        })).collect::<Vec<_>>(),
        "trace_id": d.trace_id,
        "rollout": d.rollout.as_ref().map(rollouts::rollout_json),
        "serving": d.serving.as_ref().map(rollouts::serving_json),
    })
}
