//! Trains an example's pipeline with several seeds and prints how good it gets: what the settings
//! in `examples/*/pipeline.yaml` were chosen with, and how the figures in their READMEs were made.
//!
//! ```text
//! cargo run --release -p emberline-train --example figures -- \
//!     examples/digits/pipeline.yaml --seeds 7,8,9 [--test] [--train '{"epochs": 40}']...
//! ```
//!
//! It runs the pipeline's own stages up to `evaluate` over plain directories. Settings are compared
//! on the validation part (each `--train` overrides fields of the stage `train`); the test part is
//! measured only with `--test`, for settings that are already chosen. It needs a pipeline that
//! takes its seeds from `${params.seed}` and `${params.split_seed}`, and names producers before their
//! consumers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a tool for this repository's own files: what is wrong is to stop it"
)]

use std::{collections::BTreeMap, path::Path, time::Instant};

use emberline_common::spec::{ArtifactType, PipelineSpec, parse_pipeline};
use emberline_worker::{
    stage::{ProducedContent, StageOutput},
    testing::TestContext,
};
use serde_json::{Map, Value, json};

struct Arguments {
    pipeline: String,
    seeds: Vec<u64>,
    test: bool,
    overrides: Vec<Map<String, Value>>,
}

fn arguments() -> Arguments {
    let mut rest = std::env::args().skip(1);
    let mut out = Arguments {
        pipeline: rest.next().expect("the first argument is a pipeline file"),
        seeds: vec![7, 8, 9],
        test: false,
        overrides: Vec::new(),
    };
    while let Some(flag) = rest.next() {
        let mut value = || rest.next().expect("the flag has a value");
        match flag.as_str() {
            "--seeds" => {
                let seeds = value();
                out.seeds = seeds.split(',').map(|s| s.parse().unwrap()).collect();
            }
            "--test" => out.test = true,
            "--train" => out.overrides.push(serde_json::from_str(&value()).unwrap()),
            other => panic!("there is no flag `{other}`"),
        }
    }
    if out.overrides.is_empty() {
        out.overrides.push(Map::new());
    }
    out
}

/// What the stages of one pipeline have made, by `stage.output`. The contexts own the directories.
struct Made<'a> {
    pipeline: &'a PipelineSpec,
    base: &'a Path,
    done: BTreeMap<String, (usize, StageOutput)>,
    contexts: Vec<TestContext>,
}

impl<'a> Made<'a> {
    fn new(pipeline: &'a PipelineSpec, base: &'a Path) -> Self {
        Self {
            pipeline,
            base,
            done: BTreeMap::new(),
            contexts: Vec::new(),
        }
    }

    /// Runs a stage; `swap`: inputs that come from elsewhere than the file says.
    fn run(&mut self, stage: &str, with: Value, swap: &[(&str, &str)]) -> &StageOutput {
        let (_, spec) = (self.pipeline.stages.iter())
            .find(|(name, _)| name.as_str() == stage)
            .expect("the stage is there");
        let mut builder = TestContext::builder().spec(with).base_dir(self.base);
        for (name, from) in &spec.inputs {
            let from = (swap.iter().find(|(n, _)| *n == name.as_str()))
                .map_or_else(|| from.to_string(), |(_, from)| (*from).to_owned());
            let (producer, output) = from.split_once('.').unwrap();
            let (context, made) = &self.done[producer];
            let produced = (made.artifacts.iter())
                .find(|p| p.name.as_str() == output)
                .expect("the input is made");
            let ProducedContent::Directory { artifact_type, .. } = &produced.content else {
                panic!("{from} is no directory");
            };
            let artifact_type: ArtifactType = *artifact_type;
            let dir = self.contexts[*context].output(&made.artifacts, output);
            builder = builder.input(name.as_str(), artifact_type, dir);
        }
        let context = builder.build();
        let kind = spec.kind.as_str();
        let runner = emberline_worker::builtin_stages(
            emberline_worker::kinds::collect::Reach::of_own_machine(),
        )
        .into_iter()
        .chain(emberline_data::stages())
        .chain(emberline_train::stages())
        .find(|s| s.kind().as_str() == kind)
        .expect("the kind is known");
        let output = (runner.run(&context.ctx)).unwrap_or_else(|e| panic!("{stage}: {e}"));
        let at = self.contexts.len();
        self.contexts.push(context);
        self.done.insert(stage.to_owned(), (at, output));
        &self.done[stage].1
    }
}

/// One row of figures: by metric.
type Figures = BTreeMap<String, f64>;

fn one(text: &str, arguments: &Arguments, seed: u64, changes: &Map<String, Value>) -> Figures {
    let seeds = ["seed", "split_seed"].map(|name| (name.to_owned(), json!(seed)));
    let params = Map::from_iter(seeds);
    let checked = parse_pipeline(&arguments.pipeline, text, &params)
        .unwrap_or_else(|e| panic!("{}", e.first().unwrap()));
    let base = Path::new(&arguments.pipeline).parent().unwrap();
    let mut made = Made::new(&checked.spec, base);
    let mut figures = Figures::new();
    for (name, stage) in &checked.spec.stages {
        let mut with = stage.with.clone();
        match stage.kind.as_str() {
            "train" => {
                for (field, value) in changes {
                    with[field] = value.clone();
                }
                let started = Instant::now();
                let results = &made.run(name.as_str(), with, &[]).results;
                figures.insert("train s".to_owned(), started.elapsed().as_secs_f64());
                figures.insert("epochs".to_owned(), results["epochs"].as_f64().unwrap());
            }
            "evaluate" => {
                // Figures, not verdicts.
                let with = with.as_object_mut().unwrap();
                with.shift_remove("gates");
                with.shift_remove("compare");
                let with = Value::Object(with.clone());
                let validation = (stage.inputs.iter())
                    .find(|(name, _)| name.as_str() == "validation")
                    .map(|(_, from)| from.to_string())
                    .expect("settings are chosen on the validation part");
                let swap = [("test", validation.as_str())];
                let swap: &[_] = if arguments.test { &[] } else { &swap };
                let results = &made.run(name.as_str(), with, swap).results;
                for metric in ["f1", "average_precision", "accuracy", "log_loss"] {
                    if let Some(value) = results.get(metric).and_then(Value::as_f64) {
                        figures.insert(metric.to_owned(), value);
                    }
                }
            }
            "collect" | "convert" => {
                made.run(name.as_str(), with, &[]);
            }
            _ => {}
        }
    }
    figures
}

fn main() {
    let arguments = arguments();
    let text = std::fs::read_to_string(&arguments.pipeline).expect("the pipeline can be read");
    let part = if arguments.test { "test" } else { "validation" };
    for changes in &arguments.overrides {
        println!("\n{} · {part} part", Value::Object(changes.clone()));
        let rows: Vec<Figures> = (arguments.seeds.iter())
            .map(|seed| one(&text, &arguments, *seed, changes))
            .collect();
        println!(
            "{:>18} {:>9} {:>9} {:>9}  by seed {:?}",
            "", "median", "mean", "worst", arguments.seeds
        );
        for metric in rows[0].keys() {
            let by_seed: Vec<f64> = rows.iter().map(|row| row[metric]).collect();
            let mut sorted = by_seed.clone();
            sorted.sort_by(f64::total_cmp);
            let mean = sorted.iter().sum::<f64>() / sorted.len() as f64;
            let lower_is_better = matches!(metric.as_str(), "log_loss" | "train s" | "epochs");
            let worst = sorted[if lower_is_better { sorted.len() - 1 } else { 0 }];
            let each: Vec<String> = by_seed.iter().map(|v| format!("{v:.4}")).collect();
            println!(
                "{metric:>18} {:>9.4} {mean:>9.4} {worst:>9.4}  {}",
                sorted[sorted.len() / 2],
                each.join(" ")
            );
        }
    }
}
