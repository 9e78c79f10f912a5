//! How many samples a second the stage `train` learns from, forward and backward, validation and
//! checkpoints aside: `cargo bench -p emberline-train [-- --json] [--rounds N] [--rows N]`, and with
//! `--features gpu` also `[--gpu]`.
//!
//! The tables are made from a seed. Each figure is the median over the rounds; a round trains with
//! two numbers of epochs and divides the difference, so that reading and starting do not count.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a tool for this repository's own tables: what is wrong is to stop it"
)]

use std::{path::Path, time::Instant};

use emberline_common::{
    resources::Resources,
    spec::{ArtifactType, kinds::convert::ColumnType},
};
use emberline_data::{
    schema::{BatchBuilder, ColumnDef, Schema, Value},
    write::TableWriter,
};
use emberline_train::train::Train;
use emberline_worker::{stage::Stage as _, testing::TestContext};
use serde_json::{Value as Json, json};

/// Numbers that look random and are the same everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        self.0 >> 33
    }
}

fn write(dir: &Path, columns: Vec<ColumnDef>, rows: usize, mut row: impl FnMut(&mut BatchBuilder)) {
    let schema = Schema { columns };
    let mut builder = BatchBuilder::new(&schema);
    let mut writer = TableWriter::create(dir, &schema).unwrap();
    for _ in 0..rows {
        row(&mut builder);
        builder.end_row();
    }
    writer.push(&builder.take().unwrap()).unwrap();
    writer.finish().unwrap();
}

fn column(name: &str, column_type: ColumnType) -> ColumnDef {
    ColumnDef {
        name: name.to_owned(),
        column_type,
    }
}

/// 20 numbers and two classes.
fn table(dir: &Path, rows: usize) {
    let mut columns: Vec<_> = (0..20)
        .map(|i| column(&format!("x{i}"), ColumnType::Float))
        .collect();
    columns.push(column("label", ColumnType::Integer));
    let mut numbers = Numbers(1);
    write(dir, columns, rows, |builder| {
        let mut sum = 0.0;
        for place in 0..20 {
            let value = numbers.next() as f64 / f64::from(1 << 30) - 1.0;
            sum += value;
            builder.push(place, Value::Float(value));
        }
        builder.push(20, Value::Integer(i64::from(sum > 0.0)));
    });
}

/// Images of 28×28 pixels in ten classes: a bright row says which.
fn images(dir: &Path, rows: usize) {
    let columns = vec![
        column("image", ColumnType::Bytes),
        column("label", ColumnType::Integer),
    ];
    let mut numbers = Numbers(2);
    write(dir, columns, rows, |builder| {
        let label = (numbers.next() % 10) as usize;
        let pixel = |at: usize| {
            let noise = (numbers.next() % 64) as u8;
            if at / 28 == 2 * label + 4 {
                255 - noise
            } else {
                noise
            }
        };
        let image: Vec<u8> = (0..28 * 28).map(pixel).collect();
        builder.push(0, Value::Bytes(&image));
        builder.push(1, Value::Integer(label as i64));
    });
}

fn seconds(spec: &Json, dir: &Path, epochs: u64) -> f64 {
    let mut spec = spec.clone();
    spec["epochs"] = json!(epochs);
    let gpus = u32::from(spec["backend"] == "gpu");
    let context = TestContext::builder()
        .spec(spec)
        .input("train", ArtifactType::Table, dir)
        .resources(Resources {
            cpu_millis: 1000,
            memory_bytes: 0,
            gpus,
        })
        .build();
    let started = Instant::now();
    Train.run(&context.ctx).unwrap_or_else(|e| panic!("{e}"));
    started.elapsed().as_secs_f64()
}

fn main() {
    let (mut rounds, mut rows, mut as_json, mut backend) = (3_usize, 10_000_usize, false, "cpu");
    let mut rest = std::env::args().skip(1);
    while let Some(flag) = rest.next() {
        let mut number = || rest.next().and_then(|n| n.parse().ok()).expect("a number");
        match flag.as_str() {
            "--rounds" => rounds = number(),
            "--rows" => rows = number(),
            "--json" => as_json = true,
            "--gpu" => backend = "gpu",
            // cargo itself adds it.
            "--bench" => {}
            other => panic!("there is no flag `{other}`"),
        }
    }
    let image = json!({"height": 28, "width": 28, "column": "image"});
    let cases = [
        (
            "MLP 20-64-64-2, batch 256",
            rows * 4,
            (2_u64, 12_u64),
            table as fn(&Path, usize),
            json!({"family": "mlp", "hidden": [64, 64]}),
            256,
        ),
        (
            "CNN 28×28, 8 and 16 channels, batch 64",
            rows / 4,
            (1, 3),
            images,
            json!({"family": "cnn", "image": image, "channels": [8, 16]}),
            64,
        ),
        (
            "CNN 28×28, 32 and 64 channels, batch 256",
            rows / 4,
            (1, 3),
            images,
            json!({"family": "cnn", "image": image, "channels": [32, 64]}),
            256,
        ),
    ];
    for (name, rows, (few, many), make, model, batch) in cases {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), rows);
        let spec = json!({
            "task": "classification", "label": "label", "seed": 1,
            "batch_size": batch, "model": model, "backend": backend,
        });
        let mut figures: Vec<f64> = (0..rounds.max(1))
            .map(|_| {
                let took = seconds(&spec, dir.path(), many) - seconds(&spec, dir.path(), few);
                ((many - few) * rows as u64) as f64 / took
            })
            .collect();
        figures.sort_by(f64::total_cmp);
        let (low, high) = (figures[0], figures[figures.len() - 1]);
        let median = figures[figures.len() / 2];
        if as_json {
            let line = json!({
                "bench": "training", "name": name, "backend": backend, "unit": "samples/s",
                "median": median, "min": low, "max": high, "rounds": rounds,
            });
            println!("{line}");
        } else {
            println!("{name:<40} {median:>10.0} samples/s   {low:.0} to {high:.0}");
        }
    }
}
