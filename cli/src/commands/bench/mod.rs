//! `bench`: what this machine does, measured on clusters of their own that start empty and are
//! removed afterwards.
//!
//! Every figure is measured in several rounds; the median is the figure, and the smallest and the
//! largest are told beside it. [`cluster`] measures a process from the outside, [`dispatch`] the way
//! of a task, [`artifacts`] the object store, [`serve`] models in service.

mod artifacts;
mod cluster;
mod dispatch;
mod etcd;
mod failover;
mod serve;
mod telemetry;

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use serde_json::json;

use super::quantile;
use crate::{
    args::{BenchArguments, BenchKind, ClusterArguments, Format},
    exit::{Exit, RUN_FAILED},
    output,
};

pub use serve::ask;

/// The unit of a figure that must be 0 in every round.
const FAILED: &str = "failed";

/// One figure of one round.
struct Figure {
    name: Cow<'static, str>,
    unit: &'static str,
    value: f64,
}

impl Figure {
    fn new(name: impl Into<Cow<'static, str>>, unit: &'static str, value: f64) -> Self {
        let name = name.into();
        Self { name, unit, value }
    }
}

/// One figure over all rounds.
struct Row {
    bench: &'static str,
    name: Cow<'static, str>,
    unit: &'static str,
    values: Vec<f64>,
}

impl Row {
    fn median(&self) -> f64 {
        let middle = self.values.len() / 2;
        let value = |at: usize| self.values.get(at).copied().unwrap_or(f64::NAN);
        if self.values.len() % 2 == 1 {
            value(middle)
        } else {
            f64::midpoint(value(middle.wrapping_sub(1)), value(middle))
        }
    }

    fn bounds(&self) -> (f64, f64) {
        let end = |value: Option<&f64>| value.copied().unwrap_or(f64::NAN);
        (end(self.values.first()), end(self.values.last()))
    }
}

/// What is measured if nothing is named; the others need etcd, or take minutes.
const ALL: [BenchKind; 8] = [
    BenchKind::Startup,
    BenchKind::Memory,
    BenchKind::Chain,
    BenchKind::Throughput,
    BenchKind::Fan,
    BenchKind::Artifacts,
    BenchKind::Overhead,
    BenchKind::Telemetry,
];

/// Measures and prints.
///
/// # Errors
/// What cannot be started or read.
pub async fn bench(
    cluster: &ClusterArguments,
    arguments: &BenchArguments,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    if arguments.rounds == 0 {
        return Err(Exit::input("`--rounds` is 0: at least one is needed").into());
    }
    if arguments.seconds == 0 {
        return Err(Exit::input("`--seconds` is 0: at least one is needed").into());
    }
    let asked: &[BenchKind] = if arguments.what.is_empty() {
        &ALL
    } else {
        &arguments.what
    };
    let scratch = Scratch::new(&cluster.state_dir)?;
    let mut rows: Vec<Row> = Vec::new();
    for kind in asked {
        for round in 1..=arguments.rounds {
            if !quiet && format == Format::Text {
                eprintln!("{} {round}/{}", name(*kind), arguments.rounds);
            }
            let directory = scratch.0.join(format!("{}-{round}", name(*kind)));
            let figures = measure(*kind, &directory, arguments).await?;
            // Free at once what the next round does not need.
            std::fs::remove_dir_all(&directory)?;
            for figure in figures {
                let of = |row: &&mut Row| row.bench == name(*kind) && row.name == figure.name;
                match rows.iter_mut().find(of) {
                    Some(row) => row.values.push(figure.value),
                    None => rows.push(Row {
                        bench: name(*kind),
                        name: figure.name,
                        unit: figure.unit,
                        values: vec![figure.value],
                    }),
                }
            }
        }
    }
    for row in &mut rows {
        row.values.sort_by(f64::total_cmp);
    }
    print(&rows, arguments, format)?;
    Ok(none_failed(&rows)?)
}

/// That no request failed in any round, whatever the median is.
fn none_failed(rows: &[Row]) -> Result<(), Exit> {
    let failed = rows.iter().filter(|row| row.unit == FAILED);
    let failed: f64 = failed.flat_map(|row| &row.values).sum();
    if failed > 0.0 {
        return Err(Exit::new(RUN_FAILED, format!("{failed} requests failed")));
    }
    Ok(())
}

async fn measure(
    kind: BenchKind,
    directory: &Path,
    arguments: &BenchArguments,
) -> anyhow::Result<Vec<Figure>> {
    std::fs::create_dir_all(directory)?;
    let workers = arguments.workers;
    match kind {
        BenchKind::Startup => cluster::startup(directory, workers).await,
        BenchKind::Memory => cluster::memory(directory, workers).await,
        BenchKind::Chain => dispatch::chain(directory, workers).await,
        BenchKind::Throughput => dispatch::throughput(directory, workers).await,
        BenchKind::Fan => dispatch::fan(directory, workers).await,
        BenchKind::Artifacts => artifacts::artifacts(directory).await,
        BenchKind::Overhead => {
            let pipeline = match arguments.pipeline.as_slice() {
                [] => None,
                [only] => Some(only.as_path()),
                _ => {
                    let why = "`overhead` runs one pipeline: give `--pipeline` once";
                    return Err(Exit::input(why).into());
                }
            };
            dispatch::overhead(directory, workers, pipeline).await
        }
        BenchKind::Telemetry => telemetry::telemetry(directory, workers).await,
        BenchKind::Serve => serve::serve(directory, arguments).await,
        BenchKind::Etcd => etcd::etcd(directory, workers, 1).await,
        BenchKind::Etcd3 => etcd::etcd(directory, workers, 3).await,
        BenchKind::Failover => failover::failover(directory).await,
        BenchKind::Takeover => failover::takeover(directory).await,
    }
}

const fn name(kind: BenchKind) -> &'static str {
    match kind {
        BenchKind::Startup => "startup",
        BenchKind::Memory => "memory",
        BenchKind::Chain => "chain",
        BenchKind::Throughput => "throughput",
        BenchKind::Fan => "fan",
        BenchKind::Artifacts => "artifacts",
        BenchKind::Overhead => "overhead",
        BenchKind::Telemetry => "telemetry",
        BenchKind::Serve => "serve",
        BenchKind::Etcd => "etcd",
        BenchKind::Etcd3 => "etcd3",
        BenchKind::Failover => "failover",
        BenchKind::Takeover => "takeover",
    }
}

fn print(rows: &[Row], arguments: &BenchArguments, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        let figures = rows.iter().map(|row| {
            json!({
                "bench": row.bench,
                "figure": row.name,
                "unit": row.unit,
                "median": row.median(),
                "min": row.bounds().0,
                "max": row.bounds().1,
                "rounds": row.values,
            })
        });
        return output::json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "workers": arguments.workers,
            "figures": figures.collect::<Vec<_>>(),
        }));
    }
    let head = ["BENCH", "FIGURE", "MEDIAN", "MIN", "MAX", "UNIT"];
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let (min, max) = row.bounds();
            vec![
                row.bench.to_owned(),
                row.name.to_string(),
                number(row.median()),
                number(min),
                number(max),
                row.unit.to_owned(),
            ]
        })
        .collect();
    Ok(output::table(&head, &cells)?)
}

/// About four digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A directory on the disk that the state would be on, removed in the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(state_dir: &Path) -> anyhow::Result<Self> {
        let path = state_dir.join(format!("bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|e| {
            Exit::input(format!(
                "cannot make the directory `{}`: {e}",
                path.display()
            ))
        })?;
        Ok(Self(path.canonicalize()?))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove `{}`: {e}", self.0.display());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert!((quantile(&values, 0.5) - 50.0).abs() < f64::EPSILON);
        assert!((quantile(&values, 0.99) - 99.0).abs() < f64::EPSILON);
        assert!((quantile(&[7.0], 0.01) - 7.0).abs() < f64::EPSILON);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        let row = |values: &[f64]| Row {
            bench: "b",
            name: "n".into(),
            unit: "u",
            values: values.to_vec(),
        };
        assert!((row(&[1.0, 2.0]).median() - 1.5).abs() < f64::EPSILON);
        assert!((row(&[1.0, 2.0, 9.0]).median() - 2.0).abs() < f64::EPSILON);
    }

    #[test]
    fn one_failed_request_in_one_round_is_a_failure() {
        let row = |unit, values: &[f64]| Row {
            bench: "b",
            name: "n".into(),
            unit,
            values: values.to_vec(),
        };
        let good = [row("ms", &[7.0]), row(FAILED, &[0.0, 0.0, 0.0])];
        assert!(none_failed(&good).is_ok());
        let bad = none_failed(&[row(FAILED, &[0.0, 0.0, 1.0])]).unwrap_err();
        assert_eq!((bad.code, bad.lines[0].as_str()), (1, "1 requests failed"));
    }
}
