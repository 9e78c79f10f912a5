//! `workers`: list them, and let one end.

use emberline_proto::v1::{DrainWorkerRequest, GetClusterStatusRequest, WorkerState, WorkerView};
use serde_json::{Value, json};

use crate::{
    args::{ClusterArguments, Format, WorkersCommand},
    client::Cluster,
    output::{self, clean},
};

/// Does one of them.
pub async fn workers(
    arguments: &ClusterArguments,
    command: WorkersCommand,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = match command {
        WorkersCommand::List => list(&cluster, format).await,
        WorkersCommand::Drain { worker } => drain(&cluster, worker, quiet, format).await,
    };
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn list(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let status = cluster
        .status()
        .get_cluster_status(GetClusterStatusRequest {})
        .await?;
    let workers = status.into_inner().workers;
    if format == Format::Json {
        return output::json(&workers.iter().map(worker_json).collect::<Vec<_>>());
    }
    table(&workers)
}

async fn drain(
    cluster: &Cluster,
    worker: String,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    let request = DrainWorkerRequest {
        worker: worker.clone(),
    };
    let answer = cluster.status().drain_worker(request).await?.into_inner();
    if format == Format::Json {
        output::json(&json!({"worker": worker, "running": answer.running}))
    } else if quiet {
        Ok(())
    } else {
        Ok(output::line(format!(
            "worker {} takes no more work; it still runs {} attempt{}",
            clean(&worker),
            answer.running,
            if answer.running == 1 { "" } else { "s" }
        ))?)
    }
}

/// Workers as a table.
pub fn table(workers: &[WorkerView]) -> anyhow::Result<()> {
    let rows: Vec<Vec<String>> = workers
        .iter()
        .map(|w| {
            let (total, free) = (w.total.unwrap_or_default(), w.free.unwrap_or_default());
            let cpu = |millis: u32| f64::from(millis) / 1000.0;
            let mut labels: Vec<String> =
                (w.labels.iter()).map(|(k, v)| format!("{k}={v}")).collect();
            labels.sort();
            vec![
                w.worker.clone(),
                state(w.state()).to_owned(),
                w.running.to_string(),
                format!("{}/{}", cpu(free.cpu_millis), cpu(total.cpu_millis)),
                format!("{}/{}", free.memory_bytes >> 20, total.memory_bytes >> 20),
                format!("{}/{}", free.gpus, total.gpus),
                labels.join(","),
                w.version.clone(),
            ]
        })
        .collect();
    Ok(output::table(
        &[
            "WORKER", "STATE", "RUNNING", "FREE CPU", "FREE MIB", "FREE GPU", "LABELS", "VERSION",
        ],
        &rows,
    )?)
}

/// A worker, for programs.
pub fn worker_json(w: &WorkerView) -> Value {
    let (total, free) = (w.total.unwrap_or_default(), w.free.unwrap_or_default());
    json!({
        "worker": w.worker,
        "state": state(w.state()),
        "running": w.running,
        "cpu_millis": {"total": total.cpu_millis, "free": free.cpu_millis},
        "memory_bytes": {"total": total.memory_bytes, "free": free.memory_bytes},
        "gpus": {"total": total.gpus, "free": free.gpus},
        "kinds": w.kinds,
        "labels": w.labels,
        "version": w.version,
    })
}

fn state(state: WorkerState) -> &'static str {
    match state {
        WorkerState::Unspecified => "unknown",
        WorkerState::Connected => "connected",
        WorkerState::Suspect => "suspect",
        WorkerState::Draining => "draining",
    }
}
