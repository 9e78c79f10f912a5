//! Same seed, same backend: the same weights, bit for bit, also when the training was stopped at
//! any step and resumed from its checkpoint.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};

use emberline_common::spec::kinds::train::TrainSpec;
use emberline_train::{
    TrainError,
    batches::Shift,
    checkpoint::Checkpoint,
    fit::{Fitted, Job, Watcher, fit},
    matrix::{Examples, Matrix, Targets},
    network::Shape,
    random::{Purpose, Random},
};
use emberline_worker::{documents::EpochMetrics, stage::StopReason};
use serde_json::json;

/// Preempts after a number of steps, and keeps the checkpoint as bytes.
#[derive(Default)]
struct Interrupter {
    steps_left: Cell<Option<u64>>,
    saved: RefCell<Option<Vec<u8>>>,
    epochs: RefCell<Vec<u32>>,
}

impl Watcher for Interrupter {
    fn stop(&self) -> Option<StopReason> {
        match self.steps_left.get() {
            Some(0) => Some(StopReason::Preempted),
            Some(n) => {
                self.steps_left.set(Some(n - 1));
                None
            }
            None => None,
        }
    }
    fn step(&self, _: f64, _: u32) {}
    fn epoch_begins(&self, _: u32) {}
    fn epoch(&self, metrics: &EpochMetrics, _: f64) {
        self.epochs.borrow_mut().push(metrics.epoch);
    }
    fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        *self.saved.borrow_mut() = Some(checkpoint.to_bytes("test").unwrap());
        Ok(())
    }
}

/// Two classes that a curve divides, or its value for regression.
fn rows(count: usize, cols: usize, seed: u64, classes: bool) -> Examples {
    let mut random = Random::new(seed, Purpose::Order, 9, 9);
    let data: Vec<f32> = (0..count * cols)
        .map(|_| random.unit() * 2.0 - 1.0)
        .collect();
    let value = |row: &[f32]| row[0] * row[1] + 0.3 * row[2];
    let values: Vec<f32> = data.chunks_exact(cols).map(value).collect();
    let targets = if classes {
        Targets::Classes {
            index: values.iter().map(|v| u32::from(*v > 0.0)).collect(),
            count: 2,
        }
    } else {
        Targets::Values(values)
    };
    Examples {
        inputs: Matrix {
            rows: count,
            cols,
            data,
        },
        targets,
    }
}

struct Case {
    spec: TrainSpec,
    train: Examples,
    validation: Examples,
    shift: Option<Shift>,
}

impl Case {
    fn mlp(settings: serde_json::Value, classes: bool) -> Self {
        let mut spec = json!({
            "task": if classes { "classification" } else { "regression" },
            "label": "y", "epochs": 4, "batch_size": 32, "seed": 5,
            "early_stopping": {"patience": 3},
        });
        for (key, value) in settings.as_object().unwrap() {
            spec[key] = value.clone();
        }
        Self {
            spec: serde_json::from_value(spec).unwrap(),
            train: rows(150, 6, 1, classes),
            validation: rows(60, 6, 2, classes),
            shift: None,
        }
    }

    fn cnn() -> Self {
        let mut case = Self::mlp(
            json!({
                "epochs": 2,
                "model": {
                    "family": "cnn", "image": {"height": 8, "width": 8},
                    "channels": [4, 8], "hidden": 16, "dropout": 0.3, "shift": 2
                },
                "optimizer": {"type": "adam_w", "weight_decay": 0.01, "clip_norm": 1.0},
            }),
            true,
        );
        case.train = rows(100, 64, 1, true);
        case.validation = rows(40, 64, 2, true);
        case.shift = Some(Shift {
            image: [1, 8, 8],
            pixels: 2,
        });
        case
    }

    fn run(&self, resume: Option<Checkpoint>, watcher: &Interrupter) -> Result<Fitted, TrainError> {
        let shape = Shape::new(
            &self.spec.model,
            self.train.inputs.cols,
            self.train.targets.width(),
        )?;
        let device = burn::tensor::Device::flex();
        let job = Job {
            spec: &self.spec,
            shape: &shape,
            train: &self.train,
            validation: Some(&self.validation),
            class_weights: &[1.0, 2.0],
            label_scale: 1.0,
            shift: self.shift,
            device: &device,
        };
        fit(&job, resume, watcher)
    }

    fn uninterrupted(&self) -> Fitted {
        self.run(None, &Interrupter::default()).unwrap()
    }

    /// Stops after every `steps` steps, each time going on from the bytes of the checkpoint.
    fn interrupted(&self, steps: u64) -> (Fitted, u32) {
        let mut saved: Option<Vec<u8>> = None;
        let mut stops = 0;
        loop {
            let watcher = Interrupter::default();
            watcher.steps_left.set(Some(steps));
            let resume = saved.map(|bytes| Checkpoint::from_bytes(&bytes, "test").unwrap());
            match self.run(resume, &watcher) {
                Ok(fitted) => return (fitted, stops),
                Err(TrainError::Stopped(StopReason::Preempted)) => {
                    stops += 1;
                    assert!(stops < 1000, "it never gets on");
                    saved = watcher.saved.into_inner();
                    assert!(saved.is_some(), "preempted without a checkpoint");
                }
                Err(other) => panic!("{other}"),
            }
        }
    }

    fn assert_exact(&self) {
        let whole = self.uninterrupted();
        assert_eq!(
            whole.weights,
            self.uninterrupted().weights,
            "two runs differ"
        );
        for steps in [1, 3, 5] {
            let (pieces, stops) = self.interrupted(steps);
            assert!(stops > 0);
            assert_eq!(
                pieces.history, whole.history,
                "the history differs, every {steps} steps"
            );
            assert_eq!(pieces.best_epoch, whole.best_epoch);
            assert!(
                pieces.weights == whole.weights,
                "the weights differ, every {steps} steps"
            );
        }
    }
}

#[test]
fn an_mlp_with_dropout_and_batch_norm_and_adam_w_resumes_exactly() {
    Case::mlp(
        json!({
            "model": {"family": "mlp", "hidden": [16, 8], "dropout": 0.25, "batch_norm": true},
            "optimizer": {"type": "adam_w", "learning_rate": 0.01, "weight_decay": 0.01},
            "schedule": {"type": "cosine", "warmup": 0.1},
        }),
        true,
    )
    .assert_exact();
}

#[test]
fn adam_and_sgd_with_momentum_resume_exactly() {
    for optimizer in [
        json!({"type": "adam", "learning_rate": 0.01, "weight_decay": 0.001}),
        json!({"type": "sgd", "learning_rate": 0.05, "momentum": 0.9, "clip_norm": 0.5}),
    ] {
        Case::mlp(
            json!({
                "model": {"family": "mlp", "hidden": [8], "activation": "gelu"},
                "optimizer": optimizer, "schedule": {"type": "step", "every": 1, "factor": 0.7},
            }),
            false,
        )
        .assert_exact();
    }
}

#[test]
fn a_cnn_with_shifts_and_dropout_resumes_exactly() {
    Case::cnn().assert_exact();
}

#[test]
fn another_seed_gives_other_weights() {
    let mut case = Case::mlp(json!({"model": {"family": "mlp", "hidden": [8]}}), true);
    let first = case.uninterrupted().weights;
    case.spec.seed += 1;
    assert_ne!(first, case.uninterrupted().weights);
}

#[test]
fn trainings_side_by_side_do_not_disturb_each_other() {
    let alone = Case::cnn().uninterrupted().weights;
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| Case::cnn().uninterrupted().weights))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(together.iter().all(|weights| *weights == alone));
}

#[test]
fn it_learns() {
    let case = Case::mlp(
        json!({
            "model": {"family": "mlp", "hidden": [32]}, "epochs": 60,
            "optimizer": {"learning_rate": 0.02}, "early_stopping": {"patience": 60, "metric": "accuracy"},
        }),
        true,
    );
    let fitted = case.uninterrupted();
    let last = fitted.history.last().unwrap();
    assert!(last.values["train_loss"] < 0.2, "{:?}", last.values);
    assert!(
        last.values["validation_accuracy"] > 0.8,
        "{:?}",
        last.values
    );
}

#[test]
fn a_loss_that_is_no_number_stops_the_training_at_that_step() {
    let case = Case::mlp(
        json!({
            "model": {"family": "mlp", "hidden": [8]},
            "optimizer": {"type": "sgd", "learning_rate": 1e30},
        }),
        false,
    );
    let error = case.run(None, &Interrupter::default()).unwrap_err();
    assert!(
        matches!(error, TrainError::Diverged { epoch: 1, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("learning_rate"), "{error}");
}

#[test]
fn early_stopping_keeps_the_best_epoch() {
    let case = Case::mlp(
        json!({
            "model": {"family": "mlp", "hidden": [64]}, "epochs": 200,
            "optimizer": {"learning_rate": 0.05}, "early_stopping": {"patience": 4},
        }),
        true,
    );
    let fitted = case.uninterrupted();
    assert!(fitted.stopped_early);
    let loss = |e: &EpochMetrics| e.values["validation_loss"];
    let best = fitted
        .history
        .iter()
        .map(loss)
        .fold(f64::INFINITY, f64::min);
    assert_eq!(loss(&fitted.history[fitted.best_epoch as usize - 1]), best);
    assert_eq!(fitted.history.len() as u32, fitted.best_epoch + 4);
}
