//! How a deployment comes into service: `deployments watch` and `approve`, and what `show` tells of it.

use std::time::Duration;

use emberline_common::serving::VersionStats;
use emberline_proto::v1::{
    ApproveDeploymentRequest, DeploymentOutcome, DeploymentView, ListDeploymentsRequest,
    ReplicaView, RolloutView, ServingView, Traffic, TrafficKind, VersionState,
    VersionStats as Counted, WatchDeploymentRequest,
};
use serde_json::{Value, json};

use super::{
    deployments::{deployment_json, state},
    runs::time,
};
use crate::{
    args::Format,
    client::Cluster,
    exit::{Exit, RUN_FAILED},
    output::{self, clean},
    reopen::Reopen,
};

/// How long a run waits for a deployment that it has begun.
const BEGINS_WITHIN: Duration = Duration::from_secs(20);
/// Columns whose drift is shown to people.
const SHOWN_COLUMNS: usize = 5;

/// Follows a deployment. What was given up is a failure.
pub async fn watch(
    cluster: &Cluster,
    deployment: String,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let request = WatchDeploymentRequest { deployment };
    let mut told: Option<String> = None;
    let mut last = DeploymentView::default();
    let mut reopen = Reopen::default();
    let mut deployments = cluster.deployments();
    'watch: loop {
        let mut changes = (deployments.watch_deployment(request.clone()).await?).into_inner();
        loop {
            let change = match changes.message().await {
                Ok(Some(change)) => change,
                // It ends when nothing more will happen.
                Ok(None) => break 'watch,
                Err(status) => {
                    // Another coordinator leads, and goes on with it.
                    reopen.after(status).await?;
                    continue 'watch;
                }
            };
            reopen.went_on();
            last = change.deployment.unwrap_or_default();
            if format == Format::Json {
                output::line(deployment_json(&last).to_string())?;
                continue;
            }
            let line = line(&last);
            if !quiet && told.as_ref() != Some(&line) {
                output::line(&line)?;
                told = Some(line);
            }
        }
    }
    match last.outcome() {
        DeploymentOutcome::Live if last.failure.is_none() => Ok(()),
        _ => {
            let text = format!("{} is {}", clean(&last.deployment), state(&last));
            Err(Exit::new(RUN_FAILED, text).into())
        }
    }
}

/// Waits until the deployments that a run has begun are loaded by whoever serves them, and says where
/// they are. Most are live by then; what is tried first goes on without anybody who waits.
pub async fn until_begun(cluster: &Cluster, run: &str, quiet: bool) -> anyhow::Result<()> {
    let request = ListDeploymentsRequest {
        page_size: 100,
        ..ListDeploymentsRequest::default()
    };
    let mut deployments = cluster.deployments();
    let newest = deployments.list_deployments(request).await?.into_inner();
    let coming = newest
        .deployments
        .into_iter()
        .filter(|d| d.run == run && d.outcome() == DeploymentOutcome::InProgress);
    for deployment in coming {
        let request = WatchDeploymentRequest {
            deployment: deployment.deployment.clone(),
        };
        let mut last = deployment;
        let watched = async {
            let mut changes = (deployments.watch_deployment(request).await?).into_inner();
            while let Some(change) = changes.message().await? {
                last = change.deployment.unwrap_or_default();
                let phase = last.rollout.as_ref().map(|rollout| rollout.phase.as_str());
                if phase != Some("preparing") {
                    break;
                }
            }
            Ok::<_, tonic::Status>(())
        };
        // It goes on by itself: whether anybody sees it is no matter of the run.
        if let Ok(Err(status)) = tokio::time::timeout(BEGINS_WITHIN, watched).await {
            tracing::debug!(%status, "a deployment could not be followed");
        }
        if !quiet {
            output::line(line(&last))?;
        }
    }
    Ok(())
}

/// Says yes.
pub async fn approve(
    cluster: &Cluster,
    deployment: String,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let request = ApproveDeploymentRequest { deployment };
    let answer = cluster.deployments().approve_deployment(request).await?;
    let approved = answer.into_inner().deployment.unwrap_or_default();
    if format == Format::Json {
        return output::json(&deployment_json(&approved));
    }
    if quiet {
        return Ok(());
    }
    Ok(output::line(format!(
        "{} is approved: {}",
        clean(&approved.deployment),
        state(&approved)
    ))?)
}

/// All that changes of a deployment, on one line.
fn line(d: &DeploymentView) -> String {
    let mut text = format!(
        "{} {} version {} in {}: {}",
        clean(&d.deployment),
        clean(&d.model),
        d.version,
        clean(&d.environment),
        state(d)
    );
    if let Some(serving) = &d.serving {
        let counted = serving.version.as_ref().map(counts).unwrap_or_default();
        text += &format!("; {counted}");
    }
    if let Some(note) = note(d) {
        text += &format!("; {note}");
    }
    text
}

/// What it waits for, or why it ended as it did.
fn note(d: &DeploymentView) -> Option<String> {
    let rollout = d.rollout.as_ref().filter(|r| !r.note.is_empty())?;
    let note = clean(&rollout.note);
    Some(match d.outcome() {
        DeploymentOutcome::InProgress => format!("waits for {note}"),
        _ => note,
    })
}

/// Where a deployment is that is under way.
pub fn progress(d: &DeploymentView) -> String {
    let Some(rollout) = &d.rollout else {
        return "in progress".to_owned();
    };
    let share = rollout.traffic.as_ref().map(percent).unwrap_or_default();
    match rollout.phase.as_str() {
        "step" => format!(
            "canary, step {} of {}: {share}",
            rollout.step, rollout.steps
        ),
        "shadowing" => format!("shadow: {share}"),
        "awaiting_approval" => format!("awaits approval: {share}"),
        other => clean(other).replace('_', " "),
    }
}

fn percent(traffic: &Traffic) -> String {
    format!("{} %", f64::from(traffic.share) / 100.0)
}

/// What `show` says of it.
pub fn lines(d: &DeploymentView) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    if let Some(rollout) = &d.rollout {
        let mut text = clean(&rollout.strategy).replace('_', " ");
        if rollout.phase == "watching" {
            let since = rollout.since.as_ref().map(time).unwrap_or_default();
            text += &format!(", watched since {since}");
        }
        if rollout.approved {
            text += ", approved";
        }
        lines.push(("strategy", text));
        if let Some(at) = &rollout.exposed_at {
            lines.push(("exposed", time(at)));
        }
    }
    if let Some(note) = note(d) {
        lines.push(("note", note));
    }
    let Some(serving) = &d.serving else {
        return lines;
    };
    for (name, counted) in [("version", &serving.version), ("live", &serving.live)] {
        if let Some(counted) = counted {
            lines.push((name, counts(counted)));
            lines.extend(drifted(counted).map(|drift| ("", drift)));
        }
    }
    for replica in &serving.replicas {
        lines.push(("replica", describe(replica)));
    }
    lines
}

/// What was counted, on one line.
fn counts(counted: &Counted) -> String {
    let Ok(stats) = VersionStats::try_from(counted.clone()) else {
        return "counts that are none".to_owned();
    };
    let mut text = format!("{} requests, {} errors", stats.requests, stats.errors);
    for (what, count) in [
        ("refused", stats.rejected),
        ("overloaded", stats.overloaded),
    ] {
        if count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    let quantile = |q| stats.latency.quantile_micros(q);
    if let (Some(p50), Some(p99)) = (quantile(0.5), quantile(0.99)) {
        text += &format!(", p50 {} p99 {}", millis(p50), millis(p99));
    }
    let quality = &stats.quality;
    if quality.labels > 0 {
        text += &format!(", {} labels", quality.labels);
        if !quality.predicted.is_empty() {
            let of = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.3}"));
            text += &format!(
                ", accuracy {}, f1 {}",
                of(quality.accuracy()),
                of(quality.f1())
            );
        } else if let Some(loss) = quality.mean_loss() {
            text += &format!(", rmse {:.4}", loss.sqrt());
        }
    }
    if let Some(drift) = stats.prediction_drift {
        text += &format!(", predictions {drift:.3} from training (PSI)");
    }
    text
}

fn drifted(counted: &Counted) -> Option<String> {
    let mut worst: Vec<_> = counted.input_drift.iter().collect();
    worst.sort_by(|a, b| b.psi.total_cmp(&a.psi));
    let shown = worst.iter().take(SHOWN_COLUMNS);
    let shown: Vec<String> = shown
        .map(|d| format!("{} {:.3}", clean(&d.column), d.psi))
        .collect();
    (!shown.is_empty()).then(|| format!("inputs from training (PSI): {}", shown.join(", ")))
}

#[allow(clippy::cast_precision_loss, reason = "times of requests")]
fn millis(micros: u64) -> String {
    format!("{:.1} ms", micros as f64 / 1000.0)
}

fn describe(replica: &ReplicaView) -> String {
    let mut text = format!("{} at {}", clean(&replica.worker), clean(&replica.address));
    if !replica.ready {
        text += ", not ready";
    }
    if !replica.placed {
        text += ", leaving";
    }
    let each = replica.versions.iter().map(|v| {
        let state = match v.state() {
            VersionState::Unspecified => "unknown".to_owned(),
            VersionState::Loading => "loading".to_owned(),
            VersionState::Failed => format!("failed ({})", clean(&v.why)),
            VersionState::Ready => v.traffic.as_ref().map(traffic).unwrap_or_default(),
        };
        format!("version {} {state}", v.version)
    });
    let each: Vec<String> = each.collect();
    if !each.is_empty() {
        text += &format!(": {}", each.join(", "));
    }
    text
}

fn traffic(traffic: &Traffic) -> String {
    match traffic.kind() {
        TrafficKind::Unspecified => "unknown".to_owned(),
        TrafficKind::Live => "live".to_owned(),
        TrafficKind::Canary => format!("canary {}", percent(traffic)),
        TrafficKind::Shadow => format!("shadow {}", percent(traffic)),
        TrafficKind::Standby => "standby".to_owned(),
    }
}

/// A rollout for programs.
pub fn rollout_json(r: &RolloutView) -> Value {
    json!({
        "strategy": serde_json::from_str::<Value>(&r.strategy_json).unwrap_or_default(),
        "replicas": r.replicas,
        "phase": r.phase,
        "step": r.step,
        "steps": r.steps,
        "traffic": r.traffic.as_ref().map(traffic_json),
        "since": r.since.as_ref().map(time),
        "exposed_at": r.exposed_at.as_ref().map(time),
        "approved": r.approved,
        "note": r.note,
    })
}

fn traffic_json(t: &Traffic) -> Value {
    let kind = match t.kind() {
        TrafficKind::Unspecified => "unknown",
        TrafficKind::Live => "live",
        TrafficKind::Canary => "canary",
        TrafficKind::Shadow => "shadow",
        TrafficKind::Standby => "standby",
    };
    json!({ "kind": kind, "percent": f64::from(t.share) / 100.0 })
}

/// What serves a version, for programs.
pub fn serving_json(s: &ServingView) -> Value {
    json!({
        "replicas": s.replicas.iter().map(replica_json).collect::<Vec<_>>(),
        "version": s.version.as_ref().map(stats_json),
        "live": s.live.as_ref().map(stats_json),
    })
}

fn stats_json(counted: &Counted) -> Value {
    let stats = VersionStats::try_from(counted.clone()).unwrap_or_default();
    let quantile = |q| stats.latency.quantile_micros(q);
    let quality = &stats.quality;
    json!({
        "requests": stats.requests,
        "rows": stats.rows,
        "errors": stats.errors,
        "rejected": stats.rejected,
        "overloaded": stats.overloaded,
        "latency_p50_micros": quantile(0.5),
        "latency_p99_micros": quantile(0.99),
        "labels": quality.labels,
        "accuracy": (!quality.predicted.is_empty()).then(|| quality.accuracy()).flatten(),
        "f1": quality.f1(),
        "mean_loss": quality.mean_loss(),
        "prediction_drift": stats.prediction_drift,
        "input_drift": stats.input_drift,
    })
}

/// A replica for programs.
pub fn replica_json(r: &ReplicaView) -> Value {
    json!({
        "worker": r.worker,
        "address": r.address,
        "placed": r.placed,
        "ready": r.ready,
        "versions": r.versions.iter().map(|v| json!({
            "version": v.version,
            "deployment": v.deployment,
            "state": match v.state() {
                VersionState::Unspecified => "unknown",
                VersionState::Loading => "loading",
                VersionState::Ready => "ready",
                VersionState::Failed => "failed",
            },
            "why": v.why,
            "traffic": v.traffic.as_ref().map(traffic_json),
        })).collect::<Vec<_>>(),
    })
}
