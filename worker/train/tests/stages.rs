//! The stages `train` and `evaluate` as a worker runs them: tables in directories, models out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{path::Path, sync::Arc};

use emberline_common::{
    failure::Reason,
    spec::{ArtifactType, kinds::convert::ColumnType},
};
use emberline_data::{
    schema::{BatchBuilder, ColumnDef, Schema, Value},
    table::Table,
    write::TableWriter,
};
use emberline_train::{Model, evaluate::Evaluate, model::Predictions, train::Train};
use emberline_worker::{
    documents::{EVALUATION_FILE, Evaluation, MODEL_FILE, ModelDocument, WEIGHTS_FILE},
    stage::{Produced, ProducedContent, Stage, StageError, StageOutput, StopReason},
    testing::{MemoryCheckpoints, TestContext},
};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

/// Rows of a factory: type, two numbers, and whether the machine failed.
struct Row {
    kind: &'static str,
    torque: f64,
    speed: f64,
    failed: &'static str,
}

fn factory(count: usize, offset: usize) -> Vec<Row> {
    (offset..offset + count)
        .map(|i| {
            let torque = ((i * 37) % 101) as f64 / 10.0;
            let speed = ((i * 53) % 97) as f64 * 10.0;
            Row {
                kind: ["L", "M", "H"][i % 3],
                torque,
                speed,
                failed: if torque * speed > 3000.0 { "yes" } else { "no" },
            }
        })
        .collect()
}

fn column(name: &str, column_type: ColumnType) -> ColumnDef {
    ColumnDef {
        name: name.to_owned(),
        column_type,
    }
}

fn write(dir: &Path, schema: &Schema, rows: &[Vec<Value<'_>>]) {
    let mut builder = BatchBuilder::new(schema);
    let mut writer = TableWriter::create(dir, schema).unwrap();
    for row in rows {
        for (i, value) in row.iter().enumerate() {
            builder.push(i, *value);
        }
        builder.end_row();
    }
    writer.push(&builder.take().unwrap()).unwrap();
    writer.finish().unwrap();
}

fn table(rows: &[Row]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let schema = Schema {
        columns: vec![
            column("kind", ColumnType::Text),
            column("torque", ColumnType::Float),
            column("speed", ColumnType::Float),
            column("failed", ColumnType::Text),
        ],
    };
    let values: Vec<Vec<Value<'_>>> = rows
        .iter()
        .map(|r| {
            vec![
                Value::Text(r.kind),
                Value::Float(r.torque),
                Value::Float(r.speed),
                Value::Text(r.failed),
            ]
        })
        .collect();
    write(dir.path(), &schema, &values);
    dir
}

fn train_spec() -> Json {
    json!({
        "task": "classification", "label": "failed",
        "derived": {"power": "torque * speed"},
        "model": {"family": "mlp", "hidden": [16], "dropout": 0.1},
        "optimizer": {"learning_rate": 0.02},
        "early_stopping": {"metric": "average_precision", "patience": 20},
        "epochs": 30, "seed": 3, "class_weights": "sqrt_balanced",
    })
}

fn with(mut spec: Json, changes: Json) -> Json {
    for (key, value) in changes.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec
}

fn train_context(
    spec: Json,
    train: &Path,
    validation: &Path,
    checkpoints: &Arc<MemoryCheckpoints>,
) -> TestContext {
    TestContext::builder()
        .spec(spec)
        .input("train", ArtifactType::Table, train)
        .input("validation", ArtifactType::Table, validation)
        .checkpoints(checkpoints.clone())
        .build()
}

/// A trained model in a directory of its own.
fn trained(spec: Json) -> (TempDir, StageOutput) {
    let (train, validation) = (table(&factory(300, 0)), table(&factory(120, 300)));
    let context = train_context(spec, train.path(), validation.path(), &Arc::default());
    let output = Train.run(&context.ctx).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let from = context.output(&output.artifacts, "model");
    for file in [MODEL_FILE, WEIGHTS_FILE] {
        std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
    }
    (dir, output)
}

fn train_error(spec: Json, train: &[Row], validation: &[Row]) -> StageError {
    let (train, validation) = (table(train), table(validation));
    let context = train_context(spec, train.path(), validation.path(), &Arc::default());
    Train.run(&context.ctx).unwrap_err()
}

fn evaluation(context: &TestContext, outputs: &[Produced]) -> Evaluation {
    let dir = context.output(outputs, "evaluation");
    serde_json::from_slice(&std::fs::read(dir.join(EVALUATION_FILE)).unwrap()).unwrap()
}

#[test]
fn a_model_is_trained_saved_and_evaluated() {
    let (model, output) = trained(train_spec());
    assert!(
        output.results["validation_average_precision"]
            .as_f64()
            .unwrap()
            > 0.95
    );
    let document: ModelDocument =
        serde_json::from_slice(&std::fs::read(model.path().join(MODEL_FILE)).unwrap()).unwrap();
    assert_eq!(document.classes, ["no", "yes"]);
    let names: Vec<_> = document.inputs.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["kind", "torque", "speed"]);
    assert_eq!(document.inputs[0].categories, ["H", "L", "M"]);
    let reference = document.reference.as_ref().unwrap();
    let columns = reference.columns.iter();
    let columns = columns.map(|c| {
        (
            c.name.as_str(),
            c.counts.iter().sum::<u64>(),
            c.counts.len(),
        )
    });
    assert_eq!(
        columns.collect::<Vec<_>>(),
        [("kind", 300, 4), ("torque", 300, 10), ("speed", 300, 10)]
    );
    // Of the validation part.
    assert_eq!(reference.predictions.iter().sum::<u64>(), 120);
    assert_eq!(
        document.best_epoch,
        output.results["best_epoch"].as_u64().unwrap() as u32
    );

    let (test, validation) = (table(&factory(200, 500)), table(&factory(120, 300)));
    let context = TestContext::builder()
        .spec(json!({"gates": {"f1": ">= 0.8", "log_loss": "< 1"}, "positive": "yes"}))
        .input("model", ArtifactType::Model, model.path())
        .input("test", ArtifactType::Table, test.path())
        .input("validation", ArtifactType::Table, validation.path())
        .build();
    let output = Evaluate.run(&context.ctx).unwrap();
    let found = evaluation(&context, &output.artifacts);
    assert_eq!(found.rows, 200);
    assert_eq!(found.positive.as_deref(), Some("yes"));
    assert_eq!(found.confusion.iter().flatten().sum::<u64>(), 200);
    assert!(found.gates.iter().all(|g| g.passed && g.margin > 0.0));
    for metric in [
        "accuracy",
        "precision",
        "recall",
        "f1",
        "roc_auc",
        "average_precision",
        "log_loss",
        "threshold",
    ] {
        assert_eq!(
            output.results[metric].as_f64(),
            Some(found.metrics[metric]),
            "{metric}"
        );
    }
    let handed_on = output
        .artifacts
        .iter()
        .find(|p| p.name.as_str() == "model")
        .unwrap();
    let ProducedContent::Input(artifact) = &handed_on.content else {
        panic!("the model is handed on as it is");
    };
    assert_eq!(*artifact, context.ctx.input("model").unwrap().artifact);
}

#[test]
fn metrics_are_streamed_for_every_epoch() {
    let (train, validation) = (table(&factory(100, 0)), table(&factory(60, 300)));
    let spec = with(train_spec(), json!({"epochs": 3}));
    let context = train_context(spec, train.path(), validation.path(), &Arc::default());
    Train.run(&context.ctx).unwrap();
    for series in [
        "train_loss",
        "validation_loss",
        "validation_accuracy",
        "learning_rate",
    ] {
        assert_eq!(context.sink.series(series).len(), 3, "{series}");
    }
    assert!(context.sink.text().contains("epoch 3/3"));
    assert!(!context.sink.progress().is_empty());
}

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[test]
fn every_epoch_is_a_span_with_what_was_measured() {
    let (train, validation) = (table(&factory(100, 0)), table(&factory(60, 300)));
    let context = TestContext::builder()
        .spec(with(train_spec(), json!({"epochs": 3})))
        .input("train", ArtifactType::Table, train.path())
        .input("validation", ArtifactType::Table, validation.path())
        .traced(TRACEPARENT)
        .build();
    Train.run(&context.ctx).unwrap();
    let spans = context.spans();
    let mut before = 0;
    for (epoch, span) in (1..).zip(&spans) {
        assert_eq!((span.name.as_ref(), span.error.as_deref()), ("epoch", None));
        let number = span
            .attributes
            .iter()
            .find(|a| a.key.as_str() == "emberline.epoch");
        assert_eq!(number.unwrap().value, epoch.into());
        let [event] = span.events.as_slice() else {
            panic!("{} events", span.events.len());
        };
        let measured = |name: &str| event.attributes.iter().any(|a| a.key.as_str() == name);
        assert!(measured("emberline.train_loss") && measured("emberline.validation_f1"));
        assert!(before <= span.start.0 && span.start <= span.end);
        before = span.end.0;
    }
    assert_eq!(spans.len(), 3);
}

#[test]
fn the_epoch_that_a_stop_interrupts_has_failed_by_it() {
    let (train, validation) = (table(&factory(300, 0)), table(&factory(60, 300)));
    let context = TestContext::builder()
        .spec(with(
            train_spec(),
            json!({"epochs": 100_000, "early_stopping": null}),
        ))
        .input("train", ArtifactType::Table, train.path())
        .input("validation", ArtifactType::Table, validation.path())
        .traced(TRACEPARENT)
        .build();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| Train.run(&context.ctx));
        while context.sink.series("train_loss").is_empty() && !running.is_finished() {
            std::thread::yield_now();
        }
        context.stop(StopReason::Cancelled);
        assert_eq!(
            running.join().unwrap().unwrap_err().reason,
            Reason::Cancelled
        );
    });
    let spans = context.spans();
    let last = spans.last().unwrap();
    let reason = last
        .attributes
        .iter()
        .find(|a| a.key.as_str() == "error.type");
    assert_eq!(reason.unwrap().value, "cancelled".into());
    assert!(last.error.is_some());
    assert!(
        spans[..spans.len() - 1]
            .iter()
            .all(|span| span.error.is_none())
    );
}

#[test]
fn a_preempted_attempt_is_resumed_by_the_next_with_the_same_weights() {
    let (train, validation) = (table(&factory(300, 0)), table(&factory(120, 300)));
    let checkpoints = Arc::<MemoryCheckpoints>::default();
    let whole = train_context(
        train_spec(),
        train.path(),
        validation.path(),
        &Arc::default(),
    );
    let output = Train.run(&whole.ctx).unwrap();
    let weights = |context: &TestContext, output: &StageOutput| {
        let dir = context.output(&output.artifacts, "model");
        std::fs::read(dir.join(WEIGHTS_FILE)).unwrap()
    };
    let expected = weights(&whole, &output);

    let mut attempts = 0;
    loop {
        attempts += 1;
        let next = train_context(train_spec(), train.path(), validation.path(), &checkpoints);
        let result = std::thread::scope(|scope| {
            let before = checkpoints.saves();
            let running = scope.spawn(|| Train.run(&next.ctx));
            // Stop it once it has done two more epochs.
            while !running.is_finished() && next.sink.series("train_loss").len() < 2 {
                std::thread::yield_now();
            }
            next.stop(StopReason::Preempted);
            let result = running.join().unwrap();
            if result.is_err() {
                assert_eq!(checkpoints.saves(), before + 1, "no checkpoint at once");
            }
            result
        });
        match result {
            Ok(output) => {
                assert!(next.sink.text().contains("resumed after"));
                assert!(weights(&next, &output) == expected, "other weights");
                break;
            }
            Err(e) => assert_eq!(e.reason, Reason::Preempted, "{e}"),
        }
    }
    assert!(attempts > 3, "it was hardly ever interrupted");
}

#[test]
fn a_checkpoint_of_other_settings_is_not_used() {
    let (train, validation) = (table(&factory(100, 0)), table(&factory(60, 300)));
    let checkpoints = Arc::<MemoryCheckpoints>::default();
    let spec = with(train_spec(), json!({"epochs": 3, "checkpoint_every": "0s"}));
    let first = train_context(spec.clone(), train.path(), validation.path(), &checkpoints);
    Train.run(&first.ctx).unwrap();
    assert!(checkpoints.saves() > 0);

    let other = with(spec.clone(), json!({"seed": 4}));
    let second = train_context(other, train.path(), validation.path(), &checkpoints);
    Train.run(&second.ctx).unwrap();
    assert!(
        second
            .sink
            .text()
            .contains("not used: it belongs to another training")
    );

    checkpoints.replace(b"rubbish");
    let third = train_context(spec, train.path(), validation.path(), &checkpoints);
    Train.run(&third.ctx).unwrap();
    assert!(third.sink.text().contains("not used: it is damaged"));
}

#[test]
fn a_cancelled_training_stops_between_two_steps() {
    let (train, validation) = (table(&factory(300, 0)), table(&factory(60, 300)));
    let spec = with(
        train_spec(),
        json!({"epochs": 100_000, "early_stopping": {"patience": 100_000}}),
    );
    let context = train_context(spec, train.path(), validation.path(), &Arc::default());
    let error = std::thread::scope(|scope| {
        let running = scope.spawn(|| Train.run(&context.ctx));
        while !running.is_finished() && context.sink.series("train_loss").is_empty() {
            std::thread::yield_now();
        }
        context.stop(StopReason::Cancelled);
        running.join().unwrap().unwrap_err()
    });
    assert_eq!(error.reason, Reason::Cancelled);
    assert_eq!(context.checkpoints.saves(), 0);
}

#[test]
fn predictions_come_from_raw_columns_in_any_order() {
    let (model, _) = trained(train_spec());
    let model = Model::load(model.path()).unwrap();
    let dir = table(&factory(10, 900));
    let mut rows = Table::read_dir(dir.path()).unwrap();
    let Predictions::Probabilities { classes: 2, values } =
        model.predict(&rows).unwrap().predictions
    else {
        panic!("two classes");
    };
    assert!(
        values
            .chunks_exact(2)
            .all(|p| (p[0] + p[1] - 1.0).abs() < 1e-9)
    );
    rows.columns.reverse();
    rows.columns.retain(|c| c.name != "failed");
    let again = model.predict(&rows).unwrap().predictions;
    assert_eq!(again, Predictions::Probabilities { classes: 2, values });
}

#[test]
fn a_value_that_the_train_part_did_not_have_is_counted() {
    let (model, _) = trained(train_spec());
    let mut rows = factory(9, 900);
    rows[4].kind = "X";
    let dir = table(&rows);
    let predicted = Model::load(model.path())
        .unwrap()
        .predict(&Table::read_dir(dir.path()).unwrap())
        .unwrap();
    assert_eq!(predicted.unknown_categories["kind"], 1);
}

#[test]
fn weights_of_another_model_are_refused() {
    let (model, _) = trained(with(train_spec(), json!({"epochs": 1})));
    let (other, _) = trained(with(train_spec(), json!({"epochs": 1, "seed": 9})));
    std::fs::copy(
        other.path().join(WEIGHTS_FILE),
        model.path().join(WEIGHTS_FILE),
    )
    .unwrap();
    let error = Model::load(model.path()).unwrap_err().to_string();
    assert!(error.contains("is not the file"), "{error}");
}

#[test]
fn bad_numbers_are_refused_with_column_and_row() {
    for bad in [f64::NAN, f64::INFINITY] {
        let mut rows = factory(50, 0);
        rows[17].torque = bad;
        let error = train_error(train_spec(), &rows, &factory(20, 300));
        assert_eq!(error.reason, Reason::Data);
        assert!(
            error.message.contains("`torque`") && error.message.contains("row 17"),
            "{error}"
        );

        let error = train_error(train_spec(), &factory(50, 0), &rows);
        assert!(error.message.contains("validation part"), "{error}");
    }
}

#[test]
fn a_null_is_refused_with_column_and_row() {
    let dir = tempfile::tempdir().unwrap();
    let schema = Schema {
        columns: vec![
            column("x", ColumnType::Integer),
            column("y", ColumnType::Boolean),
        ],
    };
    write(
        dir.path(),
        &schema,
        &[
            vec![Value::Integer(1), Value::Boolean(true)],
            vec![Value::Null, Value::Boolean(false)],
        ],
    );
    let spec = json!({"task": "classification", "label": "y", "model": {"family": "mlp"}});
    let context = TestContext::builder()
        .spec(spec)
        .input("train", ArtifactType::Table, dir.path())
        .build();
    let error = Train.run(&context.ctx).unwrap_err();
    assert_eq!(error.reason, Reason::Data);
    assert!(error.message.contains("`x` is null in row 1"), "{error}");
}

#[test]
fn a_label_of_one_class_or_with_new_classes_is_refused() {
    let mut rows = factory(50, 0);
    rows.iter_mut().for_each(|r| r.failed = "no");
    let error = train_error(train_spec(), &rows, &factory(20, 300));
    assert_eq!(error.reason, Reason::Data);
    assert!(error.message.contains("`no` in all rows"), "{error}");

    let mut validation = factory(20, 300);
    validation[0].failed = "maybe";
    let error = train_error(train_spec(), &factory(50, 0), &validation);
    assert_eq!(error.reason, Reason::Data);
    assert!(error.message.contains("`maybe` (1)"), "{error}");
}

#[test]
fn empty_tables_are_refused() {
    let error = train_error(train_spec(), &[], &factory(20, 0));
    assert_eq!(error.reason, Reason::Data);
    assert!(error.message.contains("train part has no rows"), "{error}");
    let error = train_error(train_spec(), &factory(20, 0), &[]);
    assert!(
        error.message.contains("validation part has no rows"),
        "{error}"
    );
}

#[test]
fn mistakes_in_the_settings_are_named() {
    for (changes, expected) in [
        (json!({"label": "faild"}), "did you mean `failed`"),
        (json!({"features": ["torqe"]}), "did you mean `torque`"),
        (json!({"features": ["failed"]}), "must not see"),
        (
            json!({"derived": {"a": "torque *"}}),
            "`derived.a` at character 9",
        ),
        (json!({"derived": {"a": "failed * 2"}}), "must not see"),
        (
            json!({"exclude": ["kind", "torque", "speed"], "derived": {}}),
            "no column to learn from",
        ),
        (
            json!({"class_weights": {"perhaps": 2.0}}),
            "names the class `perhaps`",
        ),
        (
            json!({"model": {"family": "mlp", "hidden": [0]}}),
            "model.hidden",
        ),
        (
            json!({"model": {"family": "mlp", "dropout": 1.5}}),
            "model.dropout",
        ),
        (
            json!({"optimizer": {"learning_rate": -1.0}}),
            "optimizer.learning_rate",
        ),
        (
            json!({"early_stopping": {"metric": "rmse"}}),
            "early_stopping.metric",
        ),
        (
            json!({"model": {"family": "cnn", "image": {"height": 8, "width": 8}}, "derived": {}}),
            "64 numbers",
        ),
        (json!({"epoch": 3}), "unknown field `epoch`"),
    ] {
        let error = train_error(
            with(train_spec(), changes),
            &factory(60, 0),
            &factory(30, 300),
        );
        assert_eq!(error.reason, Reason::UserError, "{error}");
        assert!(
            error.message.contains(expected),
            "{expected:?} is not in {error}"
        );
    }
}

#[test]
fn early_stopping_without_a_validation_part_is_refused() {
    let train = table(&factory(60, 0));
    let context = TestContext::builder()
        .spec(train_spec())
        .input("train", ArtifactType::Table, train.path())
        .build();
    let error = Train.run(&context.ctx).unwrap_err();
    assert_eq!(error.reason, Reason::UserError);
    assert!(error.message.contains("input `validation`"), "{error}");
}

#[test]
fn a_failed_gate_says_by_how_much_and_keeps_the_evaluation() {
    let (model, _) = trained(with(train_spec(), json!({"epochs": 1})));
    let test = table(&factory(100, 500));
    let context = TestContext::builder()
        .spec(json!({"gates": {"f1": ">= 1.5", "accuracy": ">= 0"}}))
        .input("model", ArtifactType::Model, model.path())
        .input("test", ArtifactType::Table, test.path())
        .build();
    let error = Evaluate.run(&context.ctx).unwrap_err();
    assert_eq!(error.reason, Reason::QualityGate);
    let kept = evaluation(&context, &error.outputs);
    let gate = kept.gates.iter().find(|g| g.metric == "f1").unwrap();
    assert!(!gate.passed);
    let short = format!("short by {:.4}", 1.5 - kept.metrics["f1"]);
    assert!(error.message.contains(&short), "{error}");
    assert_eq!(kept.threshold, Some(0.5), "without a validation part");
}

#[test]
fn the_best_of_several_models_is_chosen_on_the_validation_part() {
    let (poor, _) = trained(with(
        train_spec(),
        json!({"epochs": 1, "optimizer": {"learning_rate": 1e-6}}),
    ));
    let (good, _) = trained(train_spec());
    let (test, validation) = (table(&factory(100, 500)), table(&factory(120, 300)));
    let builder = || {
        TestContext::builder()
            .spec(json!({"select_by": "average_precision"}))
            .input_from(
                "model",
                "train.0",
                ArtifactType::Model,
                poor.path(),
                Default::default(),
            )
            .input_from(
                "model",
                "train.1",
                ArtifactType::Model,
                good.path(),
                Default::default(),
            )
            .input("test", ArtifactType::Table, test.path())
    };
    let context = builder()
        .input("validation", ArtifactType::Table, validation.path())
        .build();
    let output = Evaluate.run(&context.ctx).unwrap();
    let found = evaluation(&context, &output.artifacts);
    let chosen: Vec<_> = found.candidates.iter().map(|c| c.chosen).collect();
    assert_eq!(chosen, [false, true]);
    assert!(found.candidates[1].score > found.candidates[0].score);
    assert_eq!(output.results["model"], "train.1");

    let error = Evaluate.run(&builder().build().ctx).unwrap_err();
    assert_eq!(error.reason, Reason::UserError);
    assert!(
        error.message.contains("add the input `validation`"),
        "{error}"
    );
}

#[test]
fn a_model_that_is_worse_than_the_champion_is_refused() {
    let (poor, _) = trained(with(
        train_spec(),
        json!({"epochs": 1, "optimizer": {"learning_rate": 1e-6}}),
    ));
    let (good, _) = trained(train_spec());
    let test = table(&factory(100, 500));
    let compare = |model: &TempDir, champion: Option<&TempDir>, tolerance: f64| {
        let compare = json!({"model": "m", "metric": "average_precision", "tolerance": tolerance});
        let mut builder = TestContext::builder()
            .spec(json!({"compare": compare}))
            .input("model", ArtifactType::Model, model.path())
            .input("test", ArtifactType::Table, test.path());
        if let Some(champion) = champion {
            builder = builder.input("champion", ArtifactType::Model, champion.path());
        }
        let context = builder.build();
        Evaluate
            .run(&context.ctx)
            .map(|output| evaluation(&context, &output.artifacts))
    };
    let first = compare(&good, None, 0.0).unwrap().comparison.unwrap();
    assert!(first.passed && first.other.is_none());
    let better = compare(&good, Some(&poor), 0.0)
        .unwrap()
        .comparison
        .unwrap();
    assert!(better.passed && better.value > better.other.unwrap());
    let error = compare(&poor, Some(&good), 0.0).unwrap_err();
    assert_eq!(error.reason, Reason::QualityGate);
    assert!(error.message.contains("`champion`"), "{error}");
    assert!(compare(&poor, Some(&good), 2.0).is_ok());
}

#[test]
fn a_label_of_the_test_part_that_training_never_saw_is_named() {
    let (model, _) = trained(with(train_spec(), json!({"epochs": 1})));
    let mut rows = factory(50, 500);
    rows[0].failed = "maybe";
    rows[7].failed = "maybe";
    let test = table(&rows);
    let context = TestContext::builder()
        .input("model", ArtifactType::Model, model.path())
        .input("test", ArtifactType::Table, test.path())
        .build();
    let error = Evaluate.run(&context.ctx).unwrap_err();
    assert_eq!(error.reason, Reason::Data);
    assert!(error.message.contains("`maybe` (2)"), "{error}");
    let kept = evaluation(&context, &error.outputs);
    assert_eq!(kept.unknown_labels["maybe"], 2);
    assert_eq!(kept.classes, ["no", "yes", "maybe"]);
    assert_eq!(kept.confusion.iter().flatten().sum::<u64>(), 50);
}

#[test]
fn a_test_part_of_one_class_has_no_roc_auc_and_a_gate_on_it_fails_clearly() {
    let (model, _) = trained(with(train_spec(), json!({"epochs": 1})));
    let mut rows = factory(50, 500);
    rows.iter_mut().for_each(|r| r.failed = "no");
    let test = table(&rows);
    let run = |spec: Json| {
        let context = TestContext::builder()
            .spec(spec)
            .input("model", ArtifactType::Model, model.path())
            .input("test", ArtifactType::Table, test.path())
            .build();
        Evaluate.run(&context.ctx)
    };
    let output = run(json!({})).unwrap();
    assert!(output.results.get("roc_auc").is_none());
    assert!(output.results.get("accuracy").is_some());
    let error = run(json!({"gates": {"roc_auc": ">= 0.5"}})).unwrap_err();
    assert_eq!(error.reason, Reason::Data);
    assert!(error.message.contains("rows of every class"), "{error}");
}

#[test]
fn a_regression_predicts_in_the_units_of_the_label() {
    let spec = json!({
        "task": "regression", "label": "speed", "features": ["torque", "kind"],
        "derived": {"double": "\"torque\" * 2"},
        "model": {"family": "mlp", "hidden": [8]}, "epochs": 5,
        "early_stopping": {"metric": "rmse"},
    });
    let (model, output) = trained(spec);
    let test = table(&factory(100, 500));
    let context = TestContext::builder()
        .spec(json!({"gates": {"rmse": "< 400"}}))
        .input("model", ArtifactType::Model, model.path())
        .input("test", ArtifactType::Table, test.path())
        .build();
    let result = Evaluate.run(&context.ctx).unwrap();
    let found = evaluation(&context, &result.artifacts);
    assert_eq!(found.scatter.len(), 100);
    assert!(found.metrics.contains_key("r2") && !found.metrics.contains_key("f1"));
    let watched = output.results["validation_rmse"].as_f64().unwrap();
    assert!(
        (100.0..400.0).contains(&watched),
        "{watched} is not in the label's units"
    );
}

#[test]
fn images_come_as_bytes_or_as_pixel_columns_and_give_the_same_weights() {
    let images: Vec<(Vec<u8>, i64)> = (0..40u8)
        .map(|i| {
            let lit = i64::from(i % 2);
            (
                (0..16)
                    .map(|p| {
                        if i64::from(p / 8) == lit {
                            16 - i % 5
                        } else {
                            i % 3
                        }
                    })
                    .collect(),
                lit,
            )
        })
        .collect();
    let bytes = tempfile::tempdir().unwrap();
    let schema = Schema {
        columns: vec![
            column("image", ColumnType::Bytes),
            column("digit", ColumnType::Integer),
        ],
    };
    let rows: Vec<Vec<Value<'_>>> = images
        .iter()
        .map(|(image, digit)| vec![Value::Bytes(image), Value::Integer(*digit)])
        .collect();
    write(bytes.path(), &schema, &rows);
    let pixels = tempfile::tempdir().unwrap();
    let mut columns: Vec<ColumnDef> = (0..16)
        .map(|i| column(&format!("p{i}"), ColumnType::Integer))
        .collect();
    columns.push(column("digit", ColumnType::Integer));
    let rows: Vec<Vec<Value<'_>>> = images
        .iter()
        .map(|(image, digit)| {
            let pixels = image.iter().map(|p| Value::Integer(i64::from(*p)));
            pixels.chain([Value::Integer(*digit)]).collect()
        })
        .collect();
    write(pixels.path(), &Schema { columns }, &rows);

    let run = |dir: &Path, image: Json| {
        let spec = json!({
            "task": "classification", "label": "digit", "epochs": 6, "batch_size": 8,
            "optimizer": {"learning_rate": 0.01},
            "model": {"family": "cnn", "image": image, "channels": [4], "hidden": 8, "shift": 1},
        });
        let context = TestContext::builder()
            .spec(spec)
            .input("train", ArtifactType::Table, dir)
            .build();
        let output = Train.run(&context.ctx).unwrap();
        let dir = context.output(&output.artifacts, "model");
        (
            std::fs::read(dir.join(WEIGHTS_FILE)).unwrap(),
            output.results["train_loss"].as_f64().unwrap(),
        )
    };
    let size = json!({"height": 4, "width": 4, "max_value": 16});
    let (from_pixels, loss) = run(pixels.path(), size.clone());
    let (from_bytes, _) = run(bytes.path(), with(size, json!({"column": "image"})));
    assert!(from_pixels == from_bytes);
    assert!(loss < 0.3, "the loss is still {loss}");
}
