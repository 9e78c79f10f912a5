//! Models in service, asked by a second process: how many requests are answered in a second and how soon,
//! beside the bare call of the model in the same minute; what the serving process holds in memory; how soon
//! a new version answers; and whether anybody notices when versions take over.

mod ask;
mod asking;
mod bare;
mod clients;
mod delivery;
mod rows;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use emberline_common::spec::ByteSize;
use emberline_train::Model;
use tokio::{process::Child, time::sleep};

use self::{
    asking::{Ask, Asking, Protocol, Told},
    bare::Bare,
    delivery::{Delivered, Pipeline, roll_back},
    rows::Rows,
};
use super::{
    FAILED, Figure,
    cluster::{mib, start_serving, stop},
};
use crate::{
    args::{BenchArguments, ClusterArguments, Template},
    client::Cluster,
    commands::{init, quantile},
    exit::Exit,
};

pub use ask::ask;

/// What is served where nothing else is named, if it is there.
const EXAMPLES: [&str; 2] = [
    "examples/predictive-maintenance/pipeline.yaml",
    "examples/digits/pipeline.yaml",
];
/// Clients that ask at the same time.
const CLIENTS: [usize; 3] = [1, 8, 64];
/// Asked before anything is measured.
const WARM: Duration = Duration::from_millis(500);
/// Versions that take over and are taken back in one round.
const SWAPS: usize = 3;
/// Clients that ask meanwhile, and how long each rests between two requests: the machine is also there
/// for the training.
const SWAP_CLIENTS: usize = 8;
const SWAP_REST: Duration = Duration::from_millis(1);
/// How long versions answer before the next one takes over.
const SETTLED: Duration = Duration::from_millis(200);

/// One round with a cluster of its own.
pub(super) async fn serve(
    directory: &Path,
    arguments: &BenchArguments,
) -> anyhow::Result<Vec<Figure>> {
    let files = pipelines(directory, &arguments.pipeline)?;
    // A process of its own, whose memory is that of a cluster alone.
    let (child, address) = start_serving(directory, arguments.workers, &[]).await?;
    let cache_size = ByteSize(1 << 30);
    let there = ClusterArguments::embedded(directory.join("state"), cache_size);
    let cluster = Cluster::connect(&there, 0).await?;
    let bench = Bench {
        cluster: &cluster,
        child: &child,
        address,
        lasts: Duration::from_secs(arguments.seconds.into()),
    };
    let measured = bench.measure(files).await;
    cluster.close().await?;
    // Also after a mistake: its directory is about to be removed.
    let stopped = stop(child).await;
    let figures = measured?;
    stopped?;
    Ok(figures)
}

fn pipelines(directory: &Path, named: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    if !named.is_empty() {
        return Ok(named.to_vec());
    }
    let examples = EXAMPLES.map(PathBuf::from).into_iter();
    let there: Vec<PathBuf> = examples.filter(|file| file.is_file()).collect();
    if !there.is_empty() {
        return Ok(there);
    }
    let starter = directory.join("starter");
    init::init(&starter, Template::Tabular, true)?;
    Ok(vec![starter.join("pipeline.yaml")])
}

/// A model in service.
struct Served {
    pipeline: Pipeline,
    now: Delivered,
    model: Arc<Model>,
    rows: Arc<Rows>,
}

struct Bench<'a> {
    cluster: &'a Cluster,
    child: &'a Child,
    address: SocketAddr,
    lasts: Duration,
}

impl Bench<'_> {
    async fn measure(&self, files: Vec<PathBuf>) -> anyhow::Result<Vec<Figure>> {
        let mut all: Vec<Served> = Vec::new();
        for file in files {
            let pipeline = Pipeline::new(file);
            let now = pipeline.first(self.cluster).await?;
            if all.iter().any(|served| served.now.model == now.model) {
                let why = format!("two of the pipelines deploy the model `{}`", now.model);
                return Err(Exit::input(why).into());
            }
            let model = bare::fetched(self.cluster, &now.model, now.version).await?;
            all.push(Served {
                pipeline,
                now,
                rows: Arc::new(Rows::of(&model)),
                model: Arc::new(model),
            });
        }
        let mut figures = Vec::new();
        let before = mib(self.child, "VmRSS:")?;
        for served in &all {
            figures.extend(self.load(served).await?);
        }
        let after = mib(self.child, "VmRSS:")?;
        figures.extend([
            Figure::new("resident before the load", "MiB", before),
            Figure::new("resident after the load", "MiB", after),
        ]);
        for served in &mut all {
            figures.extend(self.swaps(served).await?);
        }
        Ok(figures)
    }

    fn ask(&self, served: &Served, protocol: Protocol, clients: usize) -> Ask {
        Ask {
            address: self.address.to_string(),
            model: served.now.model.clone(),
            protocol,
            clients,
            rest_micros: 0,
            warm_millis: millis(WARM),
            millis: Some(millis(self.lasts)),
            requests: served.rows.requests(),
        }
    }

    /// What one model answers, beside what it does by itself.
    async fn load(&self, served: &Served) -> anyhow::Result<Vec<Figure>> {
        let before = Bare::measure(&served.model, &served.rows).await?;
        let mut told = Vec::new();
        for protocol in [Protocol::Grpc, Protocol::Rest] {
            for clients in CLIENTS {
                let asking = Asking::start(&self.ask(served, protocol, clients)).await?;
                let name = format!("{} {} {clients}", served.now.model, protocol.name());
                told.push((name, asking.end().await?));
            }
        }
        let bare = before.between(Bare::measure(&served.model, &served.rows).await?);
        let model = &served.now.model;
        let mut figures = vec![
            Figure::new(format!("{model} bare, rows of 1"), "rows/s", bare.one),
            Figure::new(format!("{model} bare, rows of 64"), "rows/s", bare.many),
        ];
        for (name, told) in told {
            figures.extend(answered(&name, &told, bare));
        }
        Ok(figures)
    }

    /// Versions that take over and are taken back while clients ask.
    async fn swaps(&self, served: &mut Served) -> anyhow::Result<Vec<Figure>> {
        let ask = Ask {
            rest_micros: u64::try_from(SWAP_REST.as_micros())?,
            millis: None,
            ..self.ask(served, Protocol::Grpc, SWAP_CLIENTS)
        };
        let asking = Asking::start(&ask).await?;
        let mut delivered = Vec::new();
        for _ in 0..SWAPS {
            let next = served.pipeline.another(self.cluster).await?;
            sleep(SETTLED).await;
            roll_back(self.cluster, &next).await?;
            sleep(SETTLED).await;
            delivered.push(next);
        }
        let told = asking.end().await?;
        let mut took = Vec::new();
        for next in &delivered {
            let version = next.version.to_string();
            let seen = told.versions.iter().find(|seen| seen.version == version);
            let seen = seen.with_context(|| format!("version {version} has never answered"))?;
            #[allow(clippy::cast_precision_loss, reason = "some milliseconds")]
            took.push(seen.first.saturating_sub(next.began.0) as f64 / 1e3);
        }
        took.sort_by(f64::total_cmp);
        let model = &served.now.model;
        Ok(vec![
            Figure::new(
                format!("{model} deploy to its first answer"),
                "ms",
                quantile(&took, 0.5),
            ),
            Figure::new(
                format!("{model} asked while versions took over"),
                "requests",
                count(told.answered),
            ),
            Figure::new(
                format!("{model} errors while versions took over"),
                FAILED,
                count(told.failed),
            ),
        ])
    }
}

fn answered(name: &str, told: &Told, bare: Bare) -> [Figure; 5] {
    let rate = count(told.answered) / told.seconds;
    let millis = |micros: Option<f64>| micros.map_or(f64::NAN, |micros| micros / 1e3);
    [
        Figure::new(format!("{name}: answered"), "requests/s", rate),
        Figure::new(format!("{name}: p50"), "ms", millis(told.p50_micros)),
        Figure::new(format!("{name}: p99"), "ms", millis(told.p99_micros)),
        Figure::new(format!("{name}: errors"), FAILED, count(told.failed)),
        Figure::new(
            format!("{name}: to bare rows of 1"),
            "ratio",
            rate / bare.one,
        ),
    ]
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[allow(clippy::cast_precision_loss, reason = "some hundred thousand")]
fn count(count: u64) -> f64 {
    count as f64
}
