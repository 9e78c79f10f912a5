//! How fast the stage `convert` turns CSV into Parquet, as it is and through a query:
//! `cargo bench -p emberline-data [-- --json] [--rounds N] [--rows N]`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a tool for this repository's own tables: what is wrong is to stop it"
)]

use std::{fmt::Write as _, time::Instant};

use emberline_common::spec::ArtifactType;
use emberline_data::Convert;
use emberline_worker::{stage::Stage as _, testing::TestContext};
use serde_json::json;

fn main() {
    let (mut rounds, mut rows, mut as_json) = (3_usize, 200_000_usize, false);
    let mut rest = std::env::args().skip(1);
    while let Some(flag) = rest.next() {
        let mut number = || rest.next().and_then(|n| n.parse().ok()).expect("a number");
        match flag.as_str() {
            "--rounds" => rounds = number(),
            "--rows" => rows = number(),
            "--json" => as_json = true,
            // cargo itself adds it.
            "--bench" => {}
            other => panic!("there is no flag `{other}`"),
        }
    }
    let mut text = "id,machine,temperature,speed,state\n".to_owned();
    for row in 0..rows {
        let (machine, speed) = (row % 97, 1000 + row * 7919 % 1000);
        let temperature = 290.0 + (row * 31 % 400) as f64 / 10.0;
        let state = if row % 29 == 0 { "worn" } else { "healthy" };
        writeln!(text, "{row},m-{machine},{temperature},{speed},{state}").unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("rows.csv"), &text).unwrap();
    let megabytes = text.len() as f64 / 1e6;
    let split = json!({"test": 0.2, "validation": 0.1, "stratify": "state"});
    let cases = [
        ("CSV to Parquet", json!({})),
        ("CSV to Parquet, in three parts", json!({ "split": split })),
        (
            "CSV through SQL to Parquet",
            json!({"sql": "SELECT *, temperature * speed AS load FROM data WHERE speed > 1010"}),
        ),
    ];
    for (name, spec) in cases {
        let mut seconds: Vec<f64> = (0..rounds.max(1))
            .map(|_| {
                let test = TestContext::builder()
                    .spec(spec.clone())
                    .input("data", ArtifactType::Files, dir.path())
                    .build();
                let started = Instant::now();
                Convert.run(&test.ctx).unwrap_or_else(|e| panic!("{e}"));
                started.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        let per_second = |seconds: f64| rows as f64 / seconds;
        let (low, high) = (
            per_second(seconds[seconds.len() - 1]),
            per_second(seconds[0]),
        );
        if as_json {
            let line = json!({
                "bench": "convert", "name": name, "unit": "rows/s", "rounds": rounds,
                "median": per_second(median), "min": low, "max": high,
                "megabytes_per_second": megabytes / median,
            });
            println!("{line}");
        } else {
            println!(
                "{name:<32} {:>10.0} rows/s {:>7.1} MB/s   {low:.0} to {high:.0} rows/s",
                per_second(median),
                megabytes / median
            );
        }
    }
}
