//! The training loop: steps, epochs, what is watched, and when it stops.
//!
//! It knows numbers only, neither tables nor files. Everything random in it is a function of the
//! seed and the position, and the whole state is in [`Checkpoint`]: a training that is stopped
//! after any step and resumed ends with the same weights, bit for bit on the same backend and
//! machine, as one that was never stopped.

use std::{collections::BTreeMap, time::Instant};

use burn::{
    module::Module,
    optim::{GradientsParams, ModuleOptimizer},
    tensor::{Bytes, Device, Tensor, activation::log_softmax},
};
use emberline_common::spec::kinds::train::{EarlyStopping, TrainSpec, WatchedMetric};
use emberline_worker::{documents::EpochMetrics, stage::StopReason};

use crate::{
    batches::{self, Batch, Shift},
    checkpoint::{Checkpoint, Progress},
    error::TrainError,
    matrix::{Examples, Matrix, Targets},
    metrics,
    network::{Network, Shape},
    optimizer,
    random::{Purpose, Random},
    schedule::Schedule,
};

/// Rows of one step of prediction.
const PREDICT_ROWS: usize = 512;

/// What the loop tells and asks while it runs.
pub trait Watcher {
    /// Why it shall stop, if it shall; asked before each step.
    fn stop(&self) -> Option<StopReason>;
    /// How far it is in all, from 0 to 1, in the given epoch (from 1).
    fn step(&self, fraction: f64, epoch: u32);
    /// An epoch (from 1) begins, or goes on where it was left.
    fn epoch_begins(&self, epoch: u32);
    /// It is done; so many samples were learned from in a second.
    fn epoch(&self, metrics: &EpochMetrics, samples_per_second: f64);
    /// Keeps a checkpoint.
    ///
    /// # Errors
    /// If it cannot be kept.
    fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), TrainError>;
}

/// What a training depends on.
#[derive(Debug)]
pub struct Job<'a> {
    /// The settings.
    pub spec: &'a TrainSpec,
    /// The network.
    pub shape: &'a Shape,
    /// Rows to learn from.
    pub train: &'a Examples,
    /// Rows to watch on.
    pub validation: Option<&'a Examples>,
    /// How much each class counts; empty for regression.
    pub class_weights: &'a [f32],
    /// For regression: units of the label to one unit of the network's output.
    pub label_scale: f64,
    /// Random shifts of the images.
    pub shift: Option<Shift>,
    /// Where to compute, without differentiation.
    pub device: &'a Device,
}

/// A finished training.
#[derive(Debug)]
pub struct Fitted {
    /// The weights to keep.
    pub network: Network,
    /// The same, as burn's record.
    pub weights: Vec<u8>,
    /// The epoch, from 1, whose weights these are.
    pub best_epoch: u32,
    /// The metrics by epoch.
    pub history: Vec<EpochMetrics>,
    /// Why it ended before its last epoch, if it did.
    pub stopped_early: bool,
}

/// Trains, from the beginning or from a checkpoint.
///
/// # Errors
/// If the settings do not fit, the loss is no longer finite, the backend fails, or it was asked to stop.
pub fn fit(
    job: &Job<'_>,
    resume: Option<Checkpoint>,
    watcher: &dyn Watcher,
) -> Result<Fitted, TrainError> {
    Loop::start(job, resume)?.run(watcher)
}

struct Loop<'a> {
    job: &'a Job<'a>,
    device: Device,
    schedule: Schedule,
    steps_per_epoch: u64,
    network: Network,
    optimizer: ModuleOptimizer,
    progress: Progress,
    best_weights: Option<Vec<u8>>,
}

impl<'a> Loop<'a> {
    fn start(job: &'a Job<'a>, resume: Option<Checkpoint>) -> Result<Self, TrainError> {
        let spec = job.spec;
        let rows = job.train.inputs.rows;
        if rows == 0 {
            return Err(TrainError::Data("the train part has no rows".to_owned()));
        }
        if spec.epochs == 0 || spec.batch_size == 0 {
            return Err(TrainError::Spec(
                "`epochs` and `batch_size` must be at least 1".to_owned(),
            ));
        }
        let steps_per_epoch = (rows as u64).div_ceil(u64::from(spec.batch_size));
        let schedule = Schedule::new(
            &spec.schedule,
            spec.optimizer.learning_rate,
            steps_per_epoch,
            spec.epochs,
        )?;
        let mut optimizer = optimizer::build(&spec.optimizer)?;
        let device = job.device.clone().autodiff();
        let (network, progress, best_weights) = match resume {
            None => (
                job.shape.init(spec.seed, &device),
                Progress::default(),
                None,
            ),
            Some(checkpoint) => {
                optimizer = optimizer
                    .from_bytes(Bytes::from_bytes_vec(checkpoint.optimizer))
                    .map_err(|e| TrainError::Model(e.to_string()))?;
                (
                    job.shape.load(checkpoint.weights, &device)?,
                    checkpoint.progress,
                    checkpoint.best_weights,
                )
            }
        };
        Ok(Self {
            job,
            device,
            schedule,
            steps_per_epoch,
            network,
            optimizer,
            progress,
            best_weights,
        })
    }

    fn run(mut self, watcher: &dyn Watcher) -> Result<Fitted, TrainError> {
        let spec = self.job.spec;
        let patience = spec.early_stopping.as_ref().map(|e| e.patience);
        let out_of_patience =
            |p: &Progress| patience.is_some_and(|limit| p.epochs_without_better >= limit);
        let mut saved = Instant::now();
        while self.progress.epochs_done < spec.epochs && !out_of_patience(&self.progress) {
            match self.epoch(watcher) {
                Err(TrainError::Stopped(StopReason::Preempted)) => {
                    watcher.checkpoint(&self.checkpoint()?)?;
                    return Err(TrainError::Stopped(StopReason::Preempted));
                }
                other => other?,
            }
            let more = self.progress.epochs_done < spec.epochs && !out_of_patience(&self.progress);
            if more && saved.elapsed() >= spec.checkpoint_every.0 {
                watcher.checkpoint(&self.checkpoint()?)?;
                saved = Instant::now();
            }
        }
        self.refuse_broken_weights()?;
        let weights = match self.best_weights.take() {
            Some(weights) => weights,
            None => self.network.to_bytes()?,
        };
        let best_epoch = if self.progress.best_epoch > 0 {
            self.progress.best_epoch
        } else {
            self.progress.epochs_done
        };
        Ok(Fitted {
            network: self.job.shape.load(weights.clone(), self.job.device)?,
            weights,
            best_epoch,
            stopped_early: self.progress.epochs_done < spec.epochs,
            history: self.progress.history,
        })
    }

    /// A step can give a finite loss and yet leave a weight that is none.
    fn refuse_broken_weights(&self) -> Result<(), TrainError> {
        if self.network.is_finite()? {
            return Ok(());
        }
        Err(TrainError::Diverged {
            loss: f64::NAN,
            epoch: self.progress.epochs_done + u32::from(self.progress.steps_done > 0),
            step: self.progress.steps_done.max(1),
        })
    }

    fn checkpoint(&self) -> Result<Checkpoint, TrainError> {
        self.refuse_broken_weights()?;
        let optimizer = self.optimizer.into_bytes().map_err(TrainError::backend)?;
        Ok(Checkpoint {
            progress: self.progress.clone(),
            weights: self.network.to_bytes()?,
            optimizer: optimizer.to_vec(),
            best_weights: self.best_weights.clone(),
        })
    }

    /// The rest of the current epoch.
    fn epoch(&mut self, watcher: &dyn Watcher) -> Result<(), TrainError> {
        let started = Instant::now();
        let spec = self.job.spec;
        let epoch = self.progress.epochs_done;
        let order = batches::order(self.job.train.inputs.rows, spec.seed, epoch);
        let skip = usize::try_from(self.progress.steps_done).unwrap_or(usize::MAX);
        watcher.epoch_begins(epoch + 1);
        let mut learned = 0;
        for rows in order.chunks(spec.batch_size as usize).skip(skip) {
            if let Some(why) = watcher.stop() {
                return Err(TrainError::Stopped(why));
            }
            self.step(epoch, rows)?;
            learned += rows.len();
            let all = self.steps_per_epoch * u64::from(spec.epochs);
            let done = u64::from(epoch) * self.steps_per_epoch + self.progress.steps_done;
            watcher.step(done as f64 / all as f64, epoch + 1);
        }
        let took = started.elapsed().as_secs_f64();
        self.end_epoch(epoch, learned as f64 / took.max(1e-9), watcher)
    }

    fn step(&mut self, epoch: u32, rows: &[u32]) -> Result<(), TrainError> {
        let spec = self.job.spec;
        let in_epoch = self.progress.steps_done;
        let at = |purpose| Random::new(spec.seed, purpose, u64::from(epoch), in_epoch);
        let mut shifts = at(Purpose::Shift);
        let batch = batches::batch(
            self.job.train,
            rows,
            self.job.class_weights,
            self.job.shift.map(|shift| (shift, &mut shifts)),
            &self.device,
        );
        let weight = batch.weight;
        let outputs = self
            .network
            .forward(batch.inputs.clone(), Some(&mut at(Purpose::Dropout)));
        let loss = self.loss(outputs, batch);
        let value = f64::from(
            loss.clone()
                .try_into_scalar::<f32>()
                .map_err(TrainError::backend)?,
        );
        if !value.is_finite() {
            return Err(TrainError::Diverged {
                loss: value,
                epoch: epoch + 1,
                step: in_epoch + 1,
            });
        }
        let mut grads = GradientsParams::from_grads(loss.backward(), &self.network);
        if let Some(limit) = spec.optimizer.clip_norm {
            grads = optimizer::clip_by_norm(&self.network, grads, limit)?;
        }
        let step = u64::from(epoch) * self.steps_per_epoch + in_epoch;
        let rate = self.schedule.at(step);
        self.network = self.optimizer.step(rate, self.network.clone(), grads);
        self.progress.steps_done += 1;
        self.progress.loss_sum += value * weight;
        self.progress.weight_sum += weight;
        Ok(())
    }

    /// Cross entropy of the classes, or the squared error of the value, as a weighted mean.
    fn loss(&self, outputs: Tensor<2>, batch: Batch) -> Tensor<1> {
        let sum = match &self.job.train.targets {
            Targets::Classes { .. } => (log_softmax(outputs, 1) * batch.targets).sum().neg(),
            Targets::Values(_) => (outputs - batch.targets).square().sum(),
        };
        // Weights of zero for all rows of a batch must not divide by zero.
        sum.div_scalar(batch.weight.max(1e-30))
    }

    fn end_epoch(
        &mut self,
        epoch: u32,
        samples_per_second: f64,
        watcher: &dyn Watcher,
    ) -> Result<(), TrainError> {
        let last_step = u64::from(epoch + 1) * self.steps_per_epoch - 1;
        let train_loss = self.progress.loss_sum / self.progress.weight_sum.max(1e-30);
        let mut values = BTreeMap::from([
            ("train_loss".to_owned(), train_loss),
            ("learning_rate".to_owned(), self.schedule.at(last_step)),
        ]);
        if let Some(validation) = self.job.validation {
            let outputs = predict(
                &self.network.valid(),
                &validation.inputs,
                self.job.device,
                watcher,
            )?;
            let measured = measure(&outputs, &validation.targets, self.job.label_scale);
            for (name, value) in measured {
                if !value.is_finite() {
                    return Err(TrainError::Diverged {
                        loss: value,
                        epoch: epoch + 1,
                        step: self.steps_per_epoch,
                    });
                }
                values.insert(format!("validation_{name}"), value);
            }
        }
        if let Some(early) = &self.job.spec.early_stopping {
            self.watch(early, epoch + 1, &values)?;
        }
        self.progress.epochs_done = epoch + 1;
        self.progress.steps_done = 0;
        self.progress.loss_sum = 0.0;
        self.progress.weight_sum = 0.0;
        let done = EpochMetrics {
            epoch: epoch + 1,
            values,
        };
        self.progress.history.push(done.clone());
        watcher.epoch(&done, samples_per_second);
        tracing::debug!(epoch = epoch + 1, samples_per_second, "epoch");
        Ok(())
    }

    /// Remembers the weights if the watched metric got better.
    fn watch(
        &mut self,
        early: &EarlyStopping,
        epoch: u32,
        values: &BTreeMap<String, f64>,
    ) -> Result<(), TrainError> {
        let (name, higher) = watched(early.metric);
        let score = *values.get(&format!("validation_{name}")).ok_or_else(|| {
            TrainError::Spec(format!(
                "`early_stopping.metric` is `{name}`, which has no value here: there is {}",
                values
                    .keys()
                    .filter_map(|k| k.strip_prefix("validation_"))
                    .collect::<Vec<_>>()
                    .join(", ")
            ))
        })?;
        let better = self.progress.best_score.is_none_or(|best| {
            if higher {
                score > best + early.min_delta
            } else {
                score < best - early.min_delta
            }
        });
        if better {
            self.progress.best_score = Some(score);
            self.progress.best_epoch = epoch;
            self.progress.epochs_without_better = 0;
            self.best_weights = Some(self.network.to_bytes()?);
        } else {
            self.progress.epochs_without_better += 1;
        }
        Ok(())
    }
}

const fn watched(metric: WatchedMetric) -> (&'static str, bool) {
    match metric {
        WatchedMetric::Loss => ("loss", false),
        WatchedMetric::Accuracy => ("accuracy", true),
        WatchedMetric::F1 => ("f1", true),
        WatchedMetric::AveragePrecision => ("average_precision", true),
        WatchedMetric::Rmse => ("rmse", false),
    }
}

/// The network's outputs for all rows: logits of the classes, or the scaled value.
///
/// # Errors
/// If the backend fails or the watcher asks to stop.
pub fn predict(
    network: &Network,
    inputs: &Matrix,
    device: &Device,
    watcher: &dyn Watcher,
) -> Result<Matrix, TrainError> {
    let mut out = Matrix {
        rows: inputs.rows,
        ..Matrix::default()
    };
    for start in (0..inputs.rows).step_by(PREDICT_ROWS) {
        if let Some(why) = watcher.stop() {
            return Err(TrainError::Stopped(why));
        }
        let outputs = network.forward(batches::window(inputs, start, PREDICT_ROWS, device), None);
        out.cols = outputs.dims()[1];
        let data = outputs
            .try_into_data_as::<f32>()
            .map_err(TrainError::backend)?
            .try_into_vec::<f32>()
            .map_err(|e| TrainError::Backend(format!("{e:?}")))?;
        out.data.extend(data);
    }
    Ok(out)
}

/// The probabilities of the classes from their logits, row after row.
#[must_use]
pub fn softmax(logits: &Matrix) -> Vec<f64> {
    let mut out = Vec::with_capacity(logits.data.len());
    for row in logits.data.chunks_exact(logits.cols.max(1)) {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers = row.iter().map(|l| f64::from(l - top).exp());
        let sum: f64 = powers.clone().sum();
        out.extend(powers.map(|p| p / sum));
    }
    out
}

/// The most probable class of each row; the first among equals.
#[must_use]
pub fn most_probable(probabilities: &[f64], classes: usize) -> Vec<u32> {
    probabilities
        .chunks_exact(classes.max(1))
        .map(|row| {
            let mut best = 0;
            for (class, p) in row.iter().enumerate() {
                if *p > row[best] {
                    best = class;
                }
            }
            best as u32
        })
        .collect()
}

/// The metrics of the validation part that a training shows.
fn measure(outputs: &Matrix, targets: &Targets, label_scale: f64) -> Vec<(&'static str, f64)> {
    match targets {
        Targets::Classes { index, count } => {
            let probabilities = softmax(outputs);
            let matrix = metrics::confusion(index, &most_probable(&probabilities, *count), *count);
            let mut out = vec![
                ("loss", metrics::log_loss(index, &probabilities, *count)),
                ("accuracy", metrics::accuracy(&matrix)),
            ];
            if *count == 2 {
                let positive: Vec<bool> = index.iter().map(|c| *c == 1).collect();
                let scores: Vec<f64> = probabilities.chunks_exact(2).map(|p| p[1]).collect();
                if let Some((_, f1)) = metrics::best_f1_threshold(&positive, &scores) {
                    out.push(("f1", f1));
                }
                if let Some(ap) = metrics::average_precision(&positive, &scores) {
                    out.push(("average_precision", ap));
                }
            } else {
                out.push(("f1", metrics::mean_scores(&matrix).f1));
            }
            out
        }
        Targets::Values(values) => {
            let as_f64 = |v: &[f32]| v.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let scores = metrics::regression_scores(&as_f64(values), &as_f64(&outputs.data));
            vec![
                ("loss", scores.mse),
                ("rmse", scores.rmse * label_scale),
                ("mae", scores.mae * label_scale),
            ]
        }
    }
}
