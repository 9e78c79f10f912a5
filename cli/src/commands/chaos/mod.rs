//! `chaos`: a local cluster under load, whose parts are killed and paused at random; and what became
//! of the runs.
//!
//! The judgement does not trust the cluster: [`judge`] reads every version of every record from etcd
//! and compares it with what clients were told ([`load`]) and what was done to whom ([`faults`]). The
//! same seed makes the same plan of faults; when exactly they hit differs from run to run.

mod faults;
mod judge;
mod load;

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use emberline_coordinator::store::StateStore as _;
use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use self::{faults::Faults, judge::Report, load::Load};
use crate::{
    args::{ChaosArguments, ClusterArguments, Format},
    exit::{self, Exit},
    local_cluster::{LocalCluster, Shape},
    output::{self, duration},
};

/// How long the last runs may take to end after the last fault.
const QUIET_WITHIN: Duration = Duration::from_secs(60);
/// How long the records of ended runs may take to be stored after that.
const STORED_WITHIN: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Does all of it.
pub async fn chaos(
    cluster: &ClusterArguments,
    arguments: &ChaosArguments,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    if arguments.etcd == 0 || arguments.coordinators == 0 || arguments.workers == 0 {
        return Err(Exit::input("a cluster needs at least one of each part").into());
    }
    let seed = match arguments.seed {
        Some(seed) => seed,
        None => emberline_common::time::Timestamp::now().0,
    };
    let directory = cluster
        .state_dir
        .join(format!("chaos-{}", std::process::id()));
    std::fs::create_dir_all(&directory)
        .map_err(|e| Exit::input(format!("cannot make `{}`: {e}", directory.display())))?;
    let directory = directory.canonicalize()?;
    let say = |line: String| {
        if !quiet && format == Format::Text {
            eprintln!("{line}");
        }
    };
    say(format!(
        "seed {seed}: {} etcd members, {} coordinators, {} workers in {}",
        arguments.etcd,
        arguments.coordinators,
        arguments.workers,
        directory.display()
    ));
    let local = LocalCluster::start(&Shape {
        etcd: arguments.etcd,
        coordinators: arguments.coordinators,
        workers: arguments.workers,
        worker_cpu: 4,
        directory: directory.clone(),
    })
    .await?;
    let journal = directory.join("journal");
    std::fs::create_dir_all(&journal)?;
    let report = harm(local, seed, arguments, &journal, &say).await?;
    print(&report, seed, format)?;
    if report.is_clean() {
        std::fs::remove_dir_all(&directory)?;
        return Ok(());
    }
    Err(Exit::new(
        exit::RUN_FAILED,
        format!(
            "a promise was broken; logs and state are in {}",
            directory.display()
        ),
    )
    .into())
}

async fn harm(
    local: LocalCluster,
    seed: u64,
    arguments: &ChaosArguments,
    journal: &Path,
    say: &impl Fn(String),
) -> anyhow::Result<Report> {
    let begun = Instant::now();
    let observer = local.observer().await?;
    let stop = CancellationToken::new();
    let load = Arc::new(Load::new(&local.server(), seed, journal.to_owned())?);
    let working = tokio::spawn(Arc::clone(&load).run(arguments.clients, stop.clone()));
    let mut faults = Faults::new(local, seed);
    let end = begun + arguments.duration.0;
    while Instant::now() < end {
        let line = faults.next(&observer).await?;
        say(format!("{:>7} {line}", duration(begun.elapsed())));
    }
    say("the faults are over; all runs must end now".to_owned());
    faults.heal().await?;
    stop.cancel();
    let ended = tokio::time::timeout(QUIET_WITHIN, working).await;
    if ended.is_err() {
        say(format!("not all runs have ended after {QUIET_WITHIN:?}"));
    }
    // A run has ended before its record is stored; it leaves the state with that.
    let stored = async {
        while !observer.load("runs/").await?.is_empty() {
            sleep(LOOK_AGAIN).await;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(STORED_WITHIN, stored).await {
        Ok(stored) => stored?,
        Err(_) => say(format!("not all runs are stored after {STORED_WITHIN:?}")),
    }
    let history = observer.history().await?;
    let report = judge::judge(&history, &load.told(), faults.done(), &read(journal)?);
    faults.end().await;
    Ok(report)
}

/// How often each attempt of a command has begun, by `run.task.attempt`.
fn read(journal: &Path) -> anyhow::Result<HashMap<String, usize>> {
    let mut begun = HashMap::new();
    for entry in std::fs::read_dir(journal)? {
        let entry = entry?;
        let lines = std::fs::read_to_string(entry.path())?.lines().count();
        begun.insert(entry.file_name().to_string_lossy().into_owned(), lines);
    }
    Ok(begun)
}

fn print(report: &Report, seed: u64, format: Format) -> anyhow::Result<()> {
    let promises = [
        ("lost runs", &report.lost_runs),
        ("double commits", &report.double_commits),
        ("attempts restarted needlessly", &report.needless),
        ("terms that went back", &report.stale),
    ];
    if format == Format::Json {
        let recoveries = report.recoveries.iter().map(|r| {
            json!({"fault": r.fault, "count": r.count, "p50_ms": r.p50, "p95_ms": r.p95, "max_ms": r.max})
        });
        let mut value = json!({
            "seed": seed,
            "runs": report.runs,
            "tasks": report.tasks,
            "attempts": report.attempts,
            "faults": report.faults,
            "recoveries": recoveries.collect::<Vec<_>>(),
        });
        for (name, broken) in promises {
            value[name.replace(' ', "_")] = json!(broken);
        }
        return output::json(&value);
    }
    output::line(format!(
        "\n{} faults; {} runs, {} tasks, {} attempts",
        report.faults, report.runs, report.tasks, report.attempts
    ))?;
    output::line("\ntime from a fault to the next assignment:")?;
    let head = ["FAULT", "COUNT", "P50", "P95", "MAX"];
    let rows: Vec<Vec<String>> = report
        .recoveries
        .iter()
        .map(|r| {
            let ms = |v: f64| format!("{v:.0}ms");
            vec![
                r.fault.to_owned(),
                r.count.to_string(),
                ms(r.p50),
                ms(r.p95),
                ms(r.max),
            ]
        })
        .collect();
    output::table(&head, &rows)?;
    output::line("")?;
    for (name, broken) in promises {
        output::line(format!("{name:<30} {}", broken.len()))?;
        for what in broken.iter().take(10) {
            output::line(format!("  {what}"))?;
        }
    }
    Ok(())
}

/// A generator that is the same everywhere (SplitMix64; Steele, Lea, Flood 2014).
pub(super) struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 up to, but without, `end`.
    fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end.max(1)).unwrap_or(1);
        usize::try_from(self.next() % end).unwrap_or(0)
    }

    fn between(&mut self, least: Duration, most: Duration) -> Duration {
        let span = u64::try_from((most - least).as_millis()).unwrap_or(0);
        least + Duration::from_millis(self.next() % (span + 1))
    }
}
