//! `cluster status`: leader, workers, queue.

use emberline_proto::v1::GetClusterStatusRequest;
use serde_json::json;

use super::{runs::time, workers};
use crate::{
    args::{ClusterArguments, ClusterCommand, Format},
    client::Cluster,
    output::{self, clean},
};

/// Shows it.
pub async fn cluster(
    arguments: &ClusterArguments,
    command: &ClusterCommand,
    format: Format,
) -> anyhow::Result<()> {
    let ClusterCommand::Status = command;
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = status(&cluster, format).await;
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn status(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let status = cluster
        .status()
        .get_cluster_status(GetClusterStatusRequest {})
        .await?
        .into_inner();
    if format == Format::Json {
        let workers = status.workers.iter().map(workers::worker_json);
        return output::json(&json!({
            "leader": status.leader, "epoch": status.epoch, "version": status.version,
            "leader_since": status.leader_since.as_ref().map(time),
            "workers": workers.collect::<Vec<_>>(),
            "live_runs": status.live_runs, "queued_tasks": status.queued_tasks,
            "running_attempts": status.running_attempts,
            "commits": status.commits, "records": status.records,
            "coordinators": status.coordinators.iter().map(|c| {
                json!({"name": c.name, "address": c.address, "leads": c.leads})
            }).collect::<Vec<_>>(),
        }));
    }
    let since = status.leader_since.as_ref();
    let since = since.map(|since| format!(" since {}", time(since)));
    output::line(format!(
        "leader    {} (term {}{}, version {})",
        clean(&status.leader),
        status.epoch,
        since.unwrap_or_default(),
        clean(&status.version)
    ))?;
    output::line(format!(
        "live      {} runs, {} queued tasks, {} running attempts",
        status.live_runs, status.queued_tasks, status.running_attempts
    ))?;
    output::line(format!(
        "state     {} commits, {} records written",
        status.commits, status.records
    ))?;
    for there in &status.coordinators {
        let role = if there.leads { "leads" } else { "follows" };
        output::line(format!(
            "member    {} {} {role}",
            clean(&there.name),
            clean(&there.address)
        ))?;
    }
    workers::table(&status.workers)
}
