//! Bad data and wrong settings: one clear error of the right class, and no model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use emberline_common::{
    failure::Reason,
    spec::{ArtifactType, kinds::convert::ColumnType},
};
use emberline_data::{
    schema::{BatchBuilder, ColumnDef, Schema, Value},
    write::TableWriter,
};
use emberline_train::{evaluate::Evaluate, train::Train};
use emberline_worker::{
    documents::{MODEL_FILE, WEIGHTS_FILE},
    stage::{Stage, StageError, StageOutput},
    testing::TestContext,
};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

/// A table of columns of numbers, and the label `y` in a column of its own type.
struct Rows {
    columns: Vec<(String, Vec<f64>)>,
    label: Vec<f64>,
    label_type: ColumnType,
}

impl Rows {
    /// Two numbers and two classes.
    fn new(count: usize) -> Self {
        let number = |i: usize, by: usize| ((i * by) % 101) as f64 / 10.0;
        let (a, b): (Vec<f64>, Vec<f64>) =
            (0..count).map(|i| (number(i, 37), number(i, 53))).unzip();
        let label = a.iter().zip(&b).map(|(a, b)| f64::from(u8::from(a > b)));
        Self {
            label: label.collect(),
            columns: vec![("a".to_owned(), a), ("b".to_owned(), b)],
            label_type: ColumnType::Integer,
        }
    }

    /// A number to predict.
    fn of_values(count: usize) -> Self {
        let mut rows = Self::new(count);
        rows.label = rows.columns[0].1.iter().map(|a| 3.0 * a).collect();
        rows.label_type = ColumnType::Float;
        rows
    }

    fn column(mut self, name: &str, values: Vec<f64>) -> Self {
        self.columns.push((name.to_owned(), values));
        self
    }

    fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let column = |name: &str, column_type| ColumnDef {
            name: name.to_owned(),
            column_type,
        };
        let mut columns: Vec<_> = (self.columns.iter())
            .map(|(name, _)| column(name, ColumnType::Float))
            .collect();
        columns.push(column("y", self.label_type));
        let schema = Schema { columns };
        let mut builder = BatchBuilder::new(&schema);
        let mut writer = TableWriter::create(dir.path(), &schema).unwrap();
        for (row, label) in self.label.iter().enumerate() {
            for (place, (_, values)) in self.columns.iter().enumerate() {
                builder.push(place, Value::Float(values[row]));
            }
            let label = match self.label_type {
                ColumnType::Integer => Value::Integer(*label as i64),
                _ => Value::Float(*label),
            };
            builder.push(self.columns.len(), label);
            builder.end_row();
        }
        writer.push(&builder.take().unwrap()).unwrap();
        writer.finish().unwrap();
        dir
    }
}

fn spec(changes: Json) -> Json {
    let mut spec = json!({
        "task": "classification", "label": "y", "epochs": 3, "seed": 1,
        "model": {"family": "mlp", "hidden": [8]},
    });
    for (field, value) in changes.as_object().unwrap() {
        spec[field] = value.clone();
    }
    spec
}

fn train_in(spec: Json, rows: &Rows, validation: Option<&Rows>) -> (TestContext, Outcome) {
    let dir = rows.write();
    let mut builder =
        TestContext::builder()
            .spec(spec)
            .input("train", ArtifactType::Table, dir.path());
    let validation = validation.map(Rows::write);
    if let Some(validation) = &validation {
        builder = builder.input("validation", ArtifactType::Table, validation.path());
    }
    let context = builder.build();
    let outcome = Train.run(&context.ctx);
    (context, outcome)
}

type Outcome = Result<StageOutput, StageError>;

fn refused(spec: Json, rows: &Rows) -> StageError {
    let (context, outcome) = train_in(spec, rows, None);
    let error = outcome.unwrap_err();
    assert!(error.outputs.is_empty(), "it must leave no model: {error}");
    assert!(!has_file(context.ctx.work_dir.as_path(), WEIGHTS_FILE));
    error
}

fn has_file(dir: &Path, name: &str) -> bool {
    std::fs::read_dir(dir).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        path.ends_with(name) || (path.is_dir() && has_file(&path, name))
    })
}

fn assert_data(error: &StageError, says: &[&str]) {
    assert_eq!(error.reason, Reason::Data, "{error}");
    for part in says {
        assert!(
            error.message.contains(part),
            "{part:?} is not said by: {error}"
        );
    }
    assert!(!error.message.contains('\n'), "more than one line: {error}");
}

/// A model for two numbers, in a directory of its own.
fn model(spec: Json, rows: &Rows) -> TempDir {
    let (context, outcome) = train_in(spec, rows, None);
    let from = context
        .output(&outcome.unwrap().artifacts, "model")
        .to_owned();
    let dir = tempfile::tempdir().unwrap();
    for file in [MODEL_FILE, WEIGHTS_FILE] {
        std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn evaluate(model: &TempDir, test: &Rows, spec: Json) -> Outcome {
    let test = test.write();
    let context = TestContext::builder()
        .spec(spec)
        .input("model", ArtifactType::Model, model.path())
        .input("test", ArtifactType::Table, test.path())
        .build();
    Evaluate.run(&context.ctx)
}

#[test]
fn a_label_that_is_no_finite_number_is_refused() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for task in ["regression", "classification"] {
            let mut rows = Rows::of_values(40);
            rows.label[5] = bad;
            let error = refused(spec(json!({"task": task})), &rows);
            assert_data(&error, &["`y`", "row 5"]);
        }
    }
}

#[test]
fn a_label_of_fractions_is_no_class() {
    let mut rows = Rows::of_values(40);
    rows.label[0] = 0.5;
    let error = refused(spec(json!({})), &rows);
    assert_data(&error, &["`y` is 0.5 in row 0", "task: regression"]);
}

#[test]
fn numbers_too_large_for_single_precision_are_refused_with_column_and_row() {
    let mut rows = Rows::new(40);
    rows.columns[1].1[7] = 1e308;
    rows.columns[1].1[8] = 1e308;
    let error = refused(spec(json!({})), &rows);
    assert_data(&error, &["`b` is", "too large"]);

    let whole = model(spec(json!({})), &Rows::new(40));
    let mut test = Rows::new(10);
    test.columns[0].1[3] = -1e300;
    let error = evaluate(&whole, &test, json!({})).unwrap_err();
    assert_data(
        &error,
        &["test part", "`a` is -1e300 in row 3", "too large"],
    );
}

#[test]
fn a_constant_column_is_learned_from_without_harm() {
    let rows = Rows::new(60).column("same", vec![0.1; 60]);
    let (context, outcome) = train_in(spec(json!({})), &rows, Some(&rows));
    let output = outcome.unwrap();
    assert!(output.results["train_loss"].as_f64().unwrap().is_finite());
    assert_eq!(context.sink.series("validation_loss").len(), 3);
    // Another value of it, met later, is no reason to fail.
    let dir = context.output(&output.artifacts, "model");
    let other = Rows::new(20).column("same", vec![5.0; 20]).write();
    let evaluation = TestContext::builder()
        .spec(json!({}))
        .input("model", ArtifactType::Model, dir)
        .input("test", ArtifactType::Table, other.path())
        .build();
    assert!(Evaluate.run(&evaluation.ctx).is_ok());
}

#[test]
fn numbers_next_to_zero_and_rows_that_stand_many_times_are_learned_from_without_harm() {
    let tiny = |row: usize| f64::from_bits(1 + row as u64 % 7);
    let subnormal = |row: usize| f64::from(f32::from_bits(1 + row as u32 % 7));
    let rows = Rows::new(60)
        .column("tiny", (0..60).map(tiny).collect())
        .column("subnormal", (0..60).map(subnormal).collect())
        .column(
            "once",
            (0..60)
                .map(|row| if row == 9 { tiny(3) } else { 0.0 })
                .collect(),
        );
    let mut values = Rows::of_values(60);
    values.label = (0..60).map(tiny).collect();
    let mut same = Rows::new(60);
    for (_, column) in &mut same.columns {
        *column = (0..60).map(|row| column[row % 2]).collect();
    }
    same.label = (0..60).map(|row| (row % 2) as f64).collect();
    for (spec, rows) in [
        (spec(json!({})), &rows),
        (spec(json!({"task": "regression"})), &values),
        (spec(json!({})), &same),
    ] {
        let (context, outcome) = train_in(spec, rows, Some(rows));
        let output = outcome.unwrap();
        assert!(output.results["train_loss"].as_f64().unwrap().is_finite());
        let dir = context.output(&output.artifacts, "model");
        let table = rows.write();
        let evaluation = TestContext::builder()
            .spec(json!({}))
            .input("model", ArtifactType::Model, dir)
            .input("test", ArtifactType::Table, table.path())
            .build();
        assert!(Evaluate.run(&evaluation.ctx).is_ok());
    }
}

#[test]
fn a_missing_or_mistyped_column_of_the_test_part_is_named() {
    let model = model(spec(json!({})), &Rows::new(40));
    let mut missing = Rows::new(10);
    missing.columns.remove(1);
    let error = evaluate(&model, &missing, json!({})).unwrap_err();
    assert_data(&error, &["test part", "no column `b`"]);

    let dir = tempfile::tempdir().unwrap();
    let names = ["a", "b", "y"].map(|name| ColumnDef {
        name: name.to_owned(),
        column_type: ColumnType::Text,
    });
    let schema = Schema {
        columns: names.to_vec(),
    };
    let mut builder = BatchBuilder::new(&schema);
    (0..3).for_each(|place| builder.push(place, Value::Text("1")));
    builder.end_row();
    let mut writer = TableWriter::create(dir.path(), &schema).unwrap();
    writer.push(&builder.take().unwrap()).unwrap();
    writer.finish().unwrap();
    let context = TestContext::builder()
        .spec(json!({}))
        .input("model", ArtifactType::Model, model.path())
        .input("test", ArtifactType::Table, dir.path())
        .build();
    let error = Evaluate.run(&context.ctx).unwrap_err();
    assert_data(
        &error,
        &["test part", "`a` holds text", "numbers are needed"],
    );
}

#[test]
fn an_empty_or_broken_test_part_is_refused() {
    let model = model(spec(json!({})), &Rows::new(40));
    let error = evaluate(&model, &Rows::new(0), json!({})).unwrap_err();
    assert_data(&error, &["the test part has no rows"]);

    let mut rows = Rows::new(10);
    rows.columns[1].1[4] = f64::NAN;
    let error = evaluate(&model, &rows, json!({})).unwrap_err();
    assert_data(&error, &["test part", "`b` has NaN in row 4"]);
}

#[test]
fn images_of_another_size_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let column = |name: &str, column_type| ColumnDef {
        name: name.to_owned(),
        column_type,
    };
    let schema = Schema {
        columns: vec![
            column("image", ColumnType::Bytes),
            column("y", ColumnType::Integer),
        ],
    };
    let mut builder = BatchBuilder::new(&schema);
    for (row, bytes) in [16, 16, 15, 16].into_iter().enumerate() {
        builder.push(0, Value::Bytes(&vec![1; bytes]));
        builder.push(1, Value::Integer(row as i64 % 2));
        builder.end_row();
    }
    let mut writer = TableWriter::create(dir.path(), &schema).unwrap();
    writer.push(&builder.take().unwrap()).unwrap();
    writer.finish().unwrap();
    let image = json!({"height": 4, "width": 4, "column": "image"});
    let context = TestContext::builder()
        .spec(spec(
            json!({"model": {"family": "cnn", "image": image, "channels": [2]}}),
        ))
        .input("train", ArtifactType::Table, dir.path())
        .build();
    let error = Train.run(&context.ctx).unwrap_err();
    assert_data(&error, &["row 2", "15 bytes, but 16 are expected"]);
}

#[test]
fn a_huge_learning_rate_stops_at_the_step_and_leaves_no_model() {
    let optimizer = json!({"type": "sgd", "learning_rate": 1e30});
    let spec = spec(json!({"task": "regression", "optimizer": optimizer, "batch_size": 8}));
    let (context, outcome) = train_in(spec, &Rows::of_values(64), None);
    let error = outcome.unwrap_err();
    assert_eq!(error.reason, Reason::UserError);
    assert!(error.message.contains("step 2 of epoch 1"), "{error}");
    assert!(error.message.contains("optimizer.learning_rate"), "{error}");
    assert!(error.outputs.is_empty());
    assert!(!has_file(&context.ctx.work_dir, WEIGHTS_FILE));
    assert_eq!(context.checkpoints.saves(), 0, "broken weights were kept");
}

#[test]
fn ten_thousand_columns_are_learned_from() {
    let mut rows = Rows::new(40);
    for i in 0..10_000 {
        let values = (0..40).map(|row| ((row * i) % 17) as f64).collect();
        rows = rows.column(&format!("column_{i}"), values);
    }
    let (_, outcome) = train_in(spec(json!({"epochs": 1})), &rows, Some(&rows));
    let parameters = outcome.unwrap().results["parameters"].as_u64().unwrap();
    assert_eq!(parameters, 10_003 * 8 + 9 * 2);
}
