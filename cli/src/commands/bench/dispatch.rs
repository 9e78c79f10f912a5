//! The way of a task: a hop in a chain, many tasks side by side, and what a real pipeline pays for
//! being scheduled.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use emberline_common::spec::ByteSize;
use emberline_coordinator::events::EventsConfig;
use emberline_proto::v1::{GetRunResponse, RunState, SubmitRunRequest};
use tokio::time::Instant;

use super::{Figure, quantile};
use crate::{
    args::{ClusterArguments, SubmitArguments, Template},
    client::Cluster,
    commands::{init, run::follow, submission},
    embedded::{EmbeddedCluster, StartError},
    exit::Exit,
    progress::between,
};

/// What each worker may keep of artifacts.
const CACHE_SIZE: ByteSize = ByteSize(10 << 30);
/// Stages of the chain.
pub(super) const HOPS: usize = 1000;
/// Independent tasks.
pub(super) const TASKS: u32 = 10_000;

/// 1,000 tasks that do nothing, each waiting for the one before. A hop is the time from the end of
/// one to the end of the next: decided, durable, told, run, reported, decided, durable.
pub(super) async fn chain(directory: &Path, workers: u32) -> anyhow::Result<Vec<Figure>> {
    let (run, seconds) = run_once(directory, workers, &chain_of(HOPS)?).await?;
    let hops = hops(&run);
    #[allow(clippy::cast_precision_loss, reason = "1,000")]
    let mean = seconds * 1e3 / HOPS as f64;
    Ok(vec![
        Figure::new("hop p50", "ms", quantile(&hops, 0.5)),
        Figure::new("hop p99", "ms", quantile(&hops, 0.99)),
        Figure::new("hop mean, seen by the client", "ms", mean),
    ])
}

/// The pipeline of a chain.
pub(super) fn chain_of(hops: usize) -> Result<String, std::fmt::Error> {
    let mut yaml = String::from("pipeline: chain\nstages:\n");
    for hop in 0..hops {
        let needs = match hop {
            0 => String::new(),
            _ => format!(", needs: [t{}]", hop - 1),
        };
        writeln!(yaml, "  t{hop}: {{ kind: noop{needs} }}")?;
    }
    Ok(yaml)
}

/// The hops of a chain in milliseconds, sorted.
pub(super) fn hops(run: &GetRunResponse) -> Vec<f64> {
    let ends = run.tasks.iter().filter_map(|task| task.finished_at);
    let mut ends: Vec<_> = ends.collect();
    ends.sort_by_key(|at| (at.seconds, at.nanos));
    let mut hops: Vec<f64> = ends
        .windows(2)
        .map(|pair| between(&pair[0], &pair[1]).as_secs_f64() * 1e3)
        .collect();
    hops.sort_by(f64::total_cmp);
    hops
}

/// The pipeline of 10,000 tasks that wait for nothing.
pub(super) fn throughput_of() -> String {
    format!("pipeline: throughput\nstages:\n{}", many(""))
}

/// 10,000 tasks that wait for nothing.
pub(super) async fn throughput(directory: &Path, workers: u32) -> anyhow::Result<Vec<Figure>> {
    let (_, seconds) = run_once(directory, workers, &throughput_of()).await?;
    Ok(vec![Figure::new(
        "10,000 tasks, seen by the client",
        "tasks/s",
        f64::from(TASKS) / seconds,
    )])
}

/// One task, then 10,000, then one that waits for all of them.
pub(super) async fn fan(directory: &Path, workers: u32) -> anyhow::Result<Vec<Figure>> {
    let yaml = format!(
        "pipeline: fan\nstages:\n  first: {{ kind: noop }}\n{}  last: {{ kind: noop, needs: [many] }}\n",
        many("    needs: [first]\n")
    );
    let (_, seconds) = run_once(directory, workers, &yaml).await?;
    Ok(vec![Figure::new(
        "1, 10,000, 1 tasks, seen by the client",
        "tasks/s",
        f64::from(TASKS + 2) / seconds,
    )])
}

fn many(more: &str) -> String {
    let numbers: Vec<String> = (0..100).map(|n: u32| n.to_string()).collect();
    let numbers = numbers.join(", ");
    format!(
        "  many:\n    kind: noop\n{more}    matrix:\n      a: [{numbers}]\n      b: [{numbers}]\n"
    )
}

/// What a pipeline takes beyond its stages' own time, which their workers measure. The starter
/// pipeline if none is named; its stages run one after the other.
pub(super) async fn overhead(
    directory: &Path,
    workers: u32,
    pipeline: Option<&Path>,
) -> anyhow::Result<Vec<Figure>> {
    let file = if let Some(file) = pipeline {
        file.to_path_buf()
    } else {
        let starter = directory.join("starter");
        init::init(&starter, Template::Tabular, true)?;
        starter.join("pipeline.yaml")
    };
    let read = submission::read(&file, &[])?;
    let cluster = start(directory, workers).await?;
    let measured = async {
        let arguments = SubmitArguments {
            file,
            params: Vec::new(),
            no_cache: true,
            priority: None,
        };
        let request =
            submission::prepare(&cluster, &read, &arguments, submission::request_id()).await?;
        submit(&cluster, request).await
    };
    let measured = measured.await;
    cluster.close().await?;
    let (run, seconds) = measured?;
    let timings = run.tasks.iter().filter_map(|task| task.timing.as_ref());
    let mut own = 0;
    let mut moved = 0;
    for timing in timings {
        own += timing.stage_micros;
        moved += timing.fetch_micros + timing.store_micros;
    }
    #[allow(clippy::cast_precision_loss, reason = "microseconds of a run")]
    let (own, moved) = (own as f64 / 1e6, moved as f64 / 1e6);
    Ok(vec![
        Figure::new("whole run, seen by the client", "s", seconds),
        Figure::new("stages' own time", "s", own),
        Figure::new("artifacts in and out", "s", moved),
        Figure::new("overhead", "%", (seconds - own) / seconds * 100.0),
    ])
}

async fn start(directory: &Path, workers: u32) -> anyhow::Result<Cluster> {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let here = ClusterArguments::embedded(directory.join("state"), CACHE_SIZE);
    match EmbeddedCluster::start(&here, EventsConfig::default(), listen, workers, None).await {
        Ok(cluster) => Cluster::of(cluster).await,
        Err(StartError::Held(why)) => Err(Exit::cluster(why).into()),
        Err(StartError::Failed(e)) => Err(e),
    }
}

async fn run_once(
    directory: &Path,
    workers: u32,
    yaml: &str,
) -> anyhow::Result<(GetRunResponse, f64)> {
    let cluster = start(directory, workers).await?;
    let measured = run(&cluster, directory, yaml).await;
    cluster.close().await?;
    measured
}

/// Runs a pipeline on a cluster that is there; how it ended and after how many seconds.
pub(super) async fn run(
    cluster: &Cluster,
    directory: &Path,
    yaml: &str,
) -> anyhow::Result<(GetRunResponse, f64)> {
    let request = SubmitRunRequest {
        pipeline_yaml: yaml.to_owned(),
        file_name: "bench.yaml".to_owned(),
        base_dir: directory.display().to_string(),
        request_id: submission::request_id(),
        trigger: "manual".to_owned(),
        ..Default::default()
    };
    submit(cluster, request).await
}

/// From the submit to the news of the end, in seconds.
async fn submit(
    cluster: &Cluster,
    request: SubmitRunRequest,
) -> anyhow::Result<(GetRunResponse, f64)> {
    let begun = Instant::now();
    let id = cluster.runs().submit_run(request).await?.into_inner().run;
    let run = follow(cluster, &id, true).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let summary = run.summary.clone().unwrap_or_default();
    if summary.state() != RunState::Succeeded {
        let why = summary.failure.map(|f| f.message).unwrap_or_default();
        anyhow::bail!("run `{id}` of the benchmark did not succeed: {why}");
    }
    Ok((run, seconds))
}
