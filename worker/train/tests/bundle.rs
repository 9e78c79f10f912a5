//! Bundles of models that were trained on real rows, as programs outside of the cluster read them: one
//! in Rust (the example), and one in Python that has never heard of burn.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use emberline_common::{
    artifact::{Manifest, ManifestFile},
    ids::Digest,
    spec::{ArtifactType, PipelineSpec, parse_pipeline},
    time::Timestamp,
};
use emberline_data::table::Table;
use emberline_train::{Bundle, Model, bundle::About, model::Predictions};
use emberline_worker::{
    documents::{MODEL_FILE, WEIGHTS_FILE},
    stage::Stage,
    testing::TestContext,
};
use serde_json::{Map, Value as Json, json};
use tempfile::TempDir;

#[allow(dead_code, reason = "its `main` is not called here")]
#[path = "../examples/load_bundle.rs"]
mod load_bundle;

/// Rows that are predicted.
const ROWS: usize = 400;

fn repository() -> PathBuf {
    Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap())
        .ancestors()
        .nth(2)
        .unwrap()
        .to_path_buf()
}

fn example() -> PipelineSpec {
    let file = repository().join("examples/predictive-maintenance/pipeline.yaml");
    let text = fs::read_to_string(file).unwrap();
    parse_pipeline("pipeline.yaml", &text, &Map::new())
        .unwrap()
        .spec
}

/// A stage's settings in the example, with these fields in the place of its own.
fn settings(stage: &str, changes: Json) -> Json {
    let spec = example();
    let (_, found) = spec
        .stages
        .iter()
        .find(|(name, _)| name.as_str() == stage)
        .unwrap();
    let mut with = found.with.clone();
    for (field, value) in changes.as_object().unwrap() {
        with[field] = value.clone();
    }
    with
}

fn run(kind: &str, context: &TestContext) -> Vec<emberline_worker::stage::Produced> {
    let mut stages = emberline_data::stages()
        .into_iter()
        .chain(emberline_train::stages());
    let stage = stages.find(|stage| stage.kind().as_str() == kind).unwrap();
    Stage::run(stage.as_ref(), &context.ctx).unwrap().artifacts
}

/// A model of the example, trained shortly, as a bundle beside the rows that it is to predict.
struct Trained {
    dir: TempDir,
    table: Table,
    bundle: PathBuf,
    csv: PathBuf,
}

fn trained(changes: Json) -> Trained {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    fs::create_dir(&raw).unwrap();
    let data = repository().join("examples/predictive-maintenance/data/ai4i2020.csv");
    fs::copy(data, raw.join("ai4i2020.csv")).unwrap();
    let parts = TestContext::builder()
        .spec(settings("parts", json!({})))
        .input("raw", ArtifactType::Files, &raw)
        .build();
    let made = run("convert", &parts);
    let part = |name: &str| parts.output(&made, name).to_path_buf();
    let train = TestContext::builder()
        .spec(settings("train", changes))
        .input("train", ArtifactType::Table, part("train"))
        .input("validation", ArtifactType::Table, part("validation"))
        .build();
    let model = run("train", &train);
    let model = train.output(&model, "model");
    let bundle = dir.path().join("m-1.bundle");
    let made = make(model);
    made.write(&mut fs::File::create(&bundle).unwrap()).unwrap();

    let mut table = Table::read_dir(&part("test")).unwrap();
    let csv = dir.path().join("rows.csv");
    fs::write(&csv, csv_of(&table)).unwrap();
    table = load_bundle::read_csv(&csv, &made.model().unwrap().document().inputs).unwrap();
    assert_eq!(table.rows, ROWS);
    // What was stored and what came back say the same.
    let stored = Model::load(model).unwrap().predict(&table).unwrap();
    let opened = Bundle::open(&bundle).unwrap().model().unwrap();
    assert_eq!(opened.predict(&table).unwrap(), stored);
    Trained {
        dir,
        table,
        bundle,
        csv,
    }
}

fn make(model: &Path) -> Bundle {
    let [document, weights] = [MODEL_FILE, WEIGHTS_FILE].map(|f| fs::read(model.join(f)).unwrap());
    let file = |path: &str, content: &[u8]| ManifestFile {
        path: path.to_owned(),
        sha256: Digest::of(content),
        bytes: content.len() as u64,
    };
    let files = vec![file(MODEL_FILE, &document), file(WEIGHTS_FILE, &weights)];
    let manifest = Manifest::new(ArtifactType::Model, files, Map::new());
    let about = About {
        model: "m".parse().unwrap(),
        version: 1,
        created_at: Timestamp(1),
        metrics: Map::new(),
        notes: String::new(),
        tags: Default::default(),
        lineage: Default::default(),
        code: None,
        parent: None,
        made_by: None,
    };
    let manifest = serde_json::to_vec(&manifest).unwrap();
    Bundle::new(about, &manifest, document, weights).unwrap()
}

/// The first rows, with every column.
fn csv_of(table: &Table) -> String {
    let names: Vec<&str> = table.columns.iter().map(|c| c.name.as_str()).collect();
    let mut text = names.join(",") + "\n";
    for row in 0..ROWS {
        let cells = table.columns.iter().map(|column| match column.text(row) {
            Some(cell) => cell.into_owned(),
            None => column.number(row).unwrap().to_string(),
        });
        writeln!(text, "{}", cells.collect::<Vec<_>>().join(",")).unwrap();
    }
    text
}

/// The numbers of each row, as Rust computes them.
fn predicted(trained: &Trained) -> Vec<Vec<f64>> {
    let model = Bundle::open(&trained.bundle).unwrap().model().unwrap();
    match model.predict(&trained.table).unwrap().predictions {
        Predictions::Probabilities { classes, values } => {
            values.chunks(classes).map(<[f64]>::to_vec).collect()
        }
        Predictions::Values(values) => values.iter().map(|value| vec![*value]).collect(),
    }
}

#[test]
fn the_example_predicts_from_a_bundle() {
    let trained = trained(json!({"epochs": 1}));
    let model = Bundle::open(&trained.bundle).unwrap().model().unwrap();
    let lines = load_bundle::predict(&model, &trained.table).unwrap();
    let expected = predicted(&trained);
    assert_eq!(lines.len(), ROWS);
    for (line, row) in lines.iter().zip(expected) {
        assert_eq!(*line, format!("0 {}  1 {}", row[0], row[1]));
    }
    let bad = trained.dir.path().join("bad.csv");
    fs::write(&bad, "type,torque\nL,1\n").unwrap();
    let told = load_bundle::read_csv(&bad, &model.document().inputs).unwrap_err();
    assert!(
        told.to_string().starts_with("there is no column `"),
        "{told}"
    );
}

/// The interpreter of the environment, which is made if it is not there. `None`, with a line that
/// says so, where it cannot be made: without Python, or without its package index.
fn python() -> Option<String> {
    let setup = Command::new(repository().join("tests/python/setup.sh"))
        .output()
        .unwrap();
    if setup.status.success() {
        return Some(String::from_utf8(setup.stdout).unwrap().trim().to_owned());
    }
    let why = String::from_utf8_lossy(&setup.stderr).into_owned();
    assert!(
        std::env::var_os("CI").is_none(),
        "Python must read bundles in CI: {why}"
    );
    eprintln!("NOT CHECKED: the Python environment cannot be made: {why}");
    None
}

#[test]
fn python_predicts_the_same_from_safetensors_and_preprocessing() {
    let Some(python) = python() else { return };
    for changes in [
        json!({"epochs": 2}),
        json!({"epochs": 2, "model":
            {"family": "mlp", "hidden": [16, 8], "activation": "gelu", "batch_norm": true}}),
        json!({"epochs": 2, "task": "regression", "label": "torque", "derived": {},
            "early_stopping": null, "model": {"family": "mlp", "hidden": [8], "activation": "tanh"}}),
    ] {
        let trained = trained(changes.clone());
        let output = Command::new(&python)
            .arg(repository().join("tests/python/bundle.py"))
            .args([&trained.bundle, &trained.csv])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let theirs: Vec<Vec<f64>> = serde_json::from_slice(&output.stdout).unwrap();
        let ours = predicted(&trained);
        assert_eq!(theirs.len(), ours.len());
        let scale = ours
            .iter()
            .flatten()
            .fold(1.0_f64, |most, n| most.max(n.abs()));
        let worst = ours.iter().flatten().zip(theirs.iter().flatten());
        let worst = worst
            .map(|(a, b)| (a - b).abs() / scale)
            .fold(0.0, f64::max);
        println!("{changes}: differs by {worst:e}");
        assert!(worst <= 1e-5, "{changes}: differs by {worst:e}");
    }
}
