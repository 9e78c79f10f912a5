//! The way of a task on a cluster of processes with etcd, beside what etcd itself does at that moment
//! on the same disk; and how long the cluster takes to go on after a part of it has died.

use std::path::Path;

use emberline_coordinator::{
    engine::api::Write,
    store::{Candidate, StateStore},
};
use tokio::time::Instant;

use super::{
    Figure, dispatch,
    dispatch::{HOPS, TASKS},
    quantile,
};
use crate::{
    client::Cluster,
    local_cluster::{LocalCluster, Shape},
};

/// Puts of one full transaction, beside the store's own.
const PUTS: usize = 119;
/// Bytes of one value.
const VALUE: usize = 256;
/// Full transactions that are measured.
const FULL: usize = 200;
/// Small transactions that are measured.
const SMALL: usize = 500;

/// With that many members of etcd, one coordinator and the workers.
pub(super) async fn etcd(
    directory: &Path,
    workers: u32,
    members: usize,
) -> anyhow::Result<Vec<Figure>> {
    let local = LocalCluster::start(&Shape {
        etcd: members,
        coordinators: 1,
        workers: workers as usize,
        worker_cpu: 64,
        directory: directory.canonicalize()?,
    })
    .await?;
    let measured = measure(&local, directory).await;
    local.end().await;
    measured
}

async fn measure(local: &LocalCluster, directory: &Path) -> anyhow::Result<Vec<Figure>> {
    let cluster = Cluster::to(&local.server()).await?;
    // Before and after, since the disk and the neighbours change.
    let before = raw(local, "before").await?;
    let (chain, _) = dispatch::run(&cluster, directory, &dispatch::chain_of(HOPS)?).await?;
    let (_, seconds) = dispatch::run(&cluster, directory, &dispatch::throughput_of()).await?;
    let after = raw(local, "after").await?;
    let puts = f64::midpoint(before.puts, after.puts);
    let commit = f64::midpoint(before.commit, after.commit);
    let hops = dispatch::hops(&chain);
    let (p50, p99) = (quantile(&hops, 0.5), quantile(&hops, 0.99));
    let tasks = f64::from(TASKS) / seconds;
    Ok(vec![
        Figure::new("hop p50", "ms", p50),
        Figure::new("hop p99", "ms", p99),
        Figure::new("etcd alone: commit p50", "ms", commit),
        Figure::new("hop p50 : commit p50", "", p50 / commit),
        Figure::new("10,000 tasks, seen by the client", "tasks/s", tasks),
        Figure::new("etcd alone: puts, 119 a transaction", "puts/s", puts),
        Figure::new("tasks : puts", "", tasks / puts),
    ])
}

/// What etcd does by itself.
struct Raw {
    /// Puts in a second, in full transactions one after the other.
    puts: f64,
    /// A transaction with one put, in milliseconds, the median.
    commit: f64,
}

/// The store's own guarded transactions below another prefix.
async fn raw(local: &LocalCluster, name: &str) -> anyhow::Result<Raw> {
    let store = local.beside(&format!("bench-{name}")).await?;
    let candidate = Candidate {
        name: "bench".to_owned(),
        address: "127.0.0.1:1".to_owned(),
    };
    let epoch = store.campaign(candidate).await?;
    let put = |n: usize| Write::Put {
        key: format!("tasks/bench/{n}"),
        value: vec![b'x'; VALUE],
    };
    let begun = Instant::now();
    for round in 0..FULL {
        let writes = (0..PUTS).map(|n| put(round % 10 * PUTS + n)).collect();
        store.commit(epoch, writes).await?;
    }
    #[allow(clippy::cast_precision_loss, reason = "some ten thousand")]
    let puts = (FULL * PUTS) as f64 / begun.elapsed().as_secs_f64();
    let mut times = Vec::with_capacity(SMALL);
    for n in 0..SMALL {
        let begun = Instant::now();
        store.commit(epoch, vec![put(n % 100)]).await?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    store.resign(epoch).await?;
    Ok(Raw {
        puts,
        commit: quantile(&times, 0.5),
    })
}
