//! How long a cluster takes to go on after a part of it has died, from the fault to the next
//! assignment that etcd has; what a new leader takes to load; what ended runs leave behind.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use emberline_common::{ids::Epoch, time::Timestamp};
use emberline_coordinator::{
    engine::records::{TaskRecord, Written},
    store::{StateStore as _, etcd::EtcdStore},
};
use emberline_proto::v1::{GetClusterStatusRequest, GetRunRequest, RunState, SubmitRunRequest};
use rustix::process::Signal;
use tokio::time::{Instant, sleep, timeout};

use super::{Figure, dispatch};
use crate::{
    client::Cluster,
    commands::submission,
    local_cluster::{LocalCluster, Node, Shape},
};

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How long the chain runs before a fault.
const WARM: Duration = Duration::from_millis(200);
/// Hops of the chain that runs meanwhile; more than it gets through.
const HOPS: usize = 900;
/// Ended runs whose traces are weighed.
const ENDED: usize = 1000;
/// Runs of 10,000 tasks each that a new leader finds.
const LARGE_RUNS: usize = 10;

/// Three coordinators, two workers, one member of etcd.
pub(super) async fn failover(directory: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut local = start(directory).await?;
    let measured = faults(&mut local, directory).await;
    local.end().await;
    measured
}

/// What a new leader takes with 100,000 live tasks, and what 1,000 ended runs leave in the state.
pub(super) async fn takeover(directory: &Path) -> anyhow::Result<Vec<Figure>> {
    let mut local = start(directory).await?;
    let measured = large(&mut local, directory).await;
    local.end().await;
    measured
}

async fn start(directory: &Path) -> anyhow::Result<LocalCluster> {
    LocalCluster::start(&Shape {
        etcd: 1,
        coordinators: 3,
        workers: 2,
        worker_cpu: 64,
        directory: directory.canonicalize()?,
    })
    .await
}

async fn faults(local: &mut LocalCluster, directory: &Path) -> anyhow::Result<Vec<Figure>> {
    let cluster = Cluster::to(&local.server()).await?;
    let observer = local.observer().await?;
    let mut figures = Vec::new();
    for (name, signal) in [
        ("leader kill -9 to the next assignment", Signal::KILL),
        ("leader SIGTERM to the next assignment", Signal::TERM),
        ("leader SIGSTOP to the next assignment", Signal::STOP),
    ] {
        let run = submit(&cluster, directory, dispatch::chain_of(HOPS)?).await?;
        sleep(WARM).await;
        let (at, address) = leader(&observer).await?;
        let node = local.coordinators.iter_mut().find(|n| n.address == address);
        let node = node.context("the leader is none of ours")?;
        let begun = Timestamp::now();
        node.signal(signal)?;
        let next = assigned(&observer, &run, |record| record.epoch > at).await?;
        figures.push(Figure::new(name, "ms", millis(begun, next)));
        bring_back(node, signal).await?;
        ends(&cluster, &run).await?;
    }
    // A command that runs longer than it takes to lose its worker.
    let sleeper =
        "pipeline: sleeper\nstages:\n  s: { kind: exec, with: { command: [sleep, '5'] } }\n";
    for (name, signal) in [
        ("worker kill -9 to the attempt elsewhere", Signal::KILL),
        ("worker SIGSTOP to the attempt elsewhere", Signal::STOP),
    ] {
        let run = submit(&cluster, directory, sleeper.to_owned()).await?;
        let first = record(&observer, &run, |r| r.written == Written::Running).await?;
        sleep(WARM).await;
        let worker = first.worker.context("the attempt has a worker")?;
        let node = local.workers.iter_mut().find(|n| n.name == worker.as_str());
        let node = node.context("the worker is none of ours")?;
        let begun = Timestamp::now();
        node.signal(signal)?;
        let next = assigned(&observer, &run, |record| record.attempt > first.attempt).await?;
        figures.push(Figure::new(name, "ms", millis(begun, next)));
        bring_back(node, signal).await?;
        ends(&cluster, &run).await?;
    }
    Ok(figures)
}

async fn large(local: &mut LocalCluster, directory: &Path) -> anyhow::Result<Vec<Figure>> {
    let cluster = Cluster::to(&local.server()).await?;
    let observer = local.observer().await?;
    let one = "pipeline: one\nstages:\n  t: { kind: noop }\n";
    let mut runs = Vec::with_capacity(ENDED);
    for _ in 0..ENDED {
        runs.push(submit(&cluster, directory, one.to_owned()).await?);
    }
    for run in &runs {
        ends(&cluster, run).await?;
    }
    // Each leaves the state when its record is stored.
    let left = timeout(LIMIT, async {
        loop {
            let records = observer.load("").await?;
            if records.iter().all(|(key, _)| !key.starts_with("runs/")) {
                return anyhow::Ok(records);
            }
            sleep(LOOK_AGAIN).await;
        }
    });
    let left = left.await.context("the runs are not archived")??;
    let bytes: usize = left
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();

    // Nobody has this label: they wait.
    let waiting = dispatch::throughput_of().replace(
        "    kind: noop\n",
        "    kind: noop\n    labels: { nobody: has }\n",
    );
    for _ in 0..LARGE_RUNS {
        submit(&cluster, directory, waiting.clone()).await?;
    }
    let (term, address) = leader(&observer).await?;
    let node = local.coordinators.iter_mut().find(|n| n.address == address);
    let node = node.context("the leader is none of ours")?;
    let begun = Instant::now();
    node.signal(Signal::TERM)?;
    let status = timeout(LIMIT, async {
        loop {
            let mut client = cluster.status();
            let asked = client.get_cluster_status(GetClusterStatusRequest {}).await;
            if let Ok(status) = asked.map(tonic::Response::into_inner)
                && Epoch(status.epoch) > term
            {
                return status;
            }
            sleep(LOOK_AGAIN).await;
        }
    });
    let status = status.await.context("nobody leads")?;
    let took = begun.elapsed().as_secs_f64() * 1e3;
    #[allow(clippy::cast_precision_loss, reason = "some hundred thousand")]
    let (tasks, kib) = (status.queued_tasks as f64, bytes as f64 / 1024.0);
    Ok(vec![
        Figure::new("live tasks that the next leader finds", "tasks", tasks),
        Figure::new("leader SIGTERM to the next one's first answer", "ms", took),
        Figure::new("state after 1,000 ended runs", "KiB", kib),
    ])
}

fn millis(from: Timestamp, to: Timestamp) -> f64 {
    to.since(from).as_secs_f64() * 1e3
}

async fn bring_back(node: &mut Node, signal: Signal) -> anyhow::Result<()> {
    if signal == Signal::STOP {
        return node.signal(Signal::CONT);
    }
    node.kill().await?;
    node.start()
}

async fn leader(observer: &EtcdStore) -> anyhow::Result<(Epoch, String)> {
    let leader = observer.leader().await?.context("nobody leads")?;
    Ok((leader.epoch, leader.address))
}

async fn submit(cluster: &Cluster, directory: &Path, yaml: String) -> anyhow::Result<String> {
    let request = SubmitRunRequest {
        pipeline_yaml: yaml,
        file_name: "bench.yaml".to_owned(),
        base_dir: directory.display().to_string(),
        request_id: submission::request_id(),
        // Each must run, also the same one again.
        no_cache: true,
        trigger: "manual".to_owned(),
        ..Default::default()
    };
    Ok(cluster.runs().submit_run(request).await?.into_inner().run)
}

async fn ends(cluster: &Cluster, run: &str) -> anyhow::Result<()> {
    let ended = timeout(LIMIT, async {
        loop {
            let request = GetRunRequest {
                run: run.to_owned(),
            };
            let seen = cluster.runs().get_run(request).await?.into_inner();
            match seen.summary.unwrap_or_default().state() {
                RunState::Succeeded => return Ok(()),
                RunState::Failed | RunState::Cancelled => anyhow::bail!("run `{run}` failed"),
                _ => sleep(LOOK_AGAIN).await,
            }
        }
    });
    ended
        .await
        .with_context(|| format!("run `{run}` does not end"))?
}

/// When the first attempt of the run was assigned that is such a one.
async fn assigned(
    observer: &EtcdStore,
    run: &str,
    such: impl Fn(&TaskRecord) -> bool,
) -> anyhow::Result<Timestamp> {
    let started = |r: &TaskRecord| such(r) && r.started_at.is_some();
    record(observer, run, started).await?;
    // All of them, since the first one may be done already.
    let history = observer.history().await?;
    let prefix = format!("tasks/{run}/");
    let first = history
        .iter()
        .filter(|change| change.key.starts_with(&prefix));
    let first = first
        .filter_map(|change| serde_json::from_slice::<TaskRecord>(change.value.as_ref()?).ok())
        .find(|record| record.written == Written::Running && such(record))
        .and_then(|record| record.started_at);
    first.context("nothing was assigned")
}

async fn record(
    observer: &EtcdStore,
    run: &str,
    such: impl Fn(&TaskRecord) -> bool,
) -> anyhow::Result<TaskRecord> {
    let prefix = format!("tasks/{run}/");
    let found = timeout(LIMIT, async {
        loop {
            for (_, value) in observer.load(&prefix).await? {
                let record: TaskRecord = serde_json::from_slice(&value)?;
                if such(&record) {
                    return anyhow::Ok(record);
                }
            }
            sleep(LOOK_AGAIN).await;
        }
    });
    found.await.context("no such attempt came")?
}
