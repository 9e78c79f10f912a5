//! The stage kind `train`: tables in, a model out. It reads, calls [`fit`](crate::fit), and writes;
//! the loop itself knows nothing of stages.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use emberline_common::{
    ids::{ArtifactName, Digest, StageKind},
    spec::{
        ArtifactType,
        kinds::{
            BuiltinKind,
            train::{ClassWeightRule, ClassWeights, ModelSpec, TrainSpec},
        },
    },
};
use emberline_data::table::Table;
use emberline_worker::{
    StageSpan,
    documents::{EpochMetrics, ModelDocument, Reference, ReferenceColumn},
    stage::{
        Input, Produced, ProducedContent, Stage, StageContext, StageError, StageOutput, StopReason,
    },
};
use serde_json::{Map, Value, json};

use crate::{
    backend::Compute,
    batches::Shift,
    checkpoint::Checkpoint,
    columns::Columns,
    error::TrainError,
    features::{Features, Preprocessing},
    fit::{self, Fitted, Job, Watcher, fit},
    matrix::{Examples, Matrix, Targets},
    model::{self, Unwatched},
    network::Shape,
    reference,
};

/// The stage kind `train`.
#[derive(Debug, Clone, Copy)]
pub struct Train;

/// Progress is told at most this often.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

#[allow(clippy::expect_used, reason = "the built-in kinds' names are kinds")]
pub(crate) fn kind(kind: BuiltinKind) -> StageKind {
    StageKind::new(kind.as_str()).expect("a built-in kind's name is a kind")
}

pub(crate) fn artifact_name(name: &str) -> Result<ArtifactName, StageError> {
    ArtifactName::new(name).map_err(|e| StageError::system(e.to_string()))
}

impl Stage for Train {
    fn kind(&self) -> StageKind {
        kind(BuiltinKind::Train)
    }

    fn version(&self) -> u32 {
        BuiltinKind::Train.version()
    }

    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError> {
        let spec: TrainSpec = ctx.spec()?;
        let train_input = ctx.input("train")?;
        let validation_input = ctx.optional_input("validation")?;
        if spec.early_stopping.is_some() && validation_input.is_none() {
            return Err(StageError::user(
                "`early_stopping` needs the input `validation`: add it under `inputs`, or remove `early_stopping`",
            ));
        }
        let prepared = prepare(&spec, train_input, validation_input)?;
        ctx.check_cancelled()?;
        let compute = Compute::choose(spec.backend, ctx.resources.gpus)?;
        let shape = Shape::new(
            &spec.model,
            prepared.preprocessing.width(),
            prepared.train.targets.width(),
        )?;
        ctx.log(format!(
            "{} rows of {} numbers, {} parameters, on {}",
            prepared.train.inputs.rows,
            prepared.train.inputs.cols,
            shape.parameters(),
            compute.name
        ));
        let subject = subject(ctx, &compute)?;
        let watcher = StageWatcher::new(ctx, &spec, &subject);
        let job = Job {
            spec: &spec,
            shape: &shape,
            train: &prepared.train,
            validation: prepared.validation.as_ref(),
            class_weights: &prepared.class_weights,
            label_scale: prepared.preprocessing.label.scale(),
            shift: prepared.shift,
            device: &compute.device,
        };
        let fitted = fit(&job, resume(ctx, &subject)?, &watcher)?;
        let reference = reference(&prepared, &compute, &fitted)?;
        if fitted.stopped_early {
            ctx.log(format!(
                "stopped early after epoch {}: epoch {} was the best",
                fitted.history.len(),
                fitted.best_epoch
            ));
        }
        write(ctx, &prepared, &shape, &compute, &fitted, reference)
    }
}

/// The data as numbers.
struct Prepared {
    preprocessing: Preprocessing,
    inputs: Vec<emberline_worker::documents::ModelInput>,
    reference: Vec<ReferenceColumn>,
    train: Examples,
    validation: Option<Examples>,
    class_weights: Vec<f32>,
    shift: Option<Shift>,
}

fn prepare(
    spec: &TrainSpec,
    train_input: &Input,
    validation_input: Option<&Input>,
) -> Result<Prepared, StageError> {
    let table = Table::read(train_input)?;
    let columns = Columns::new(&table);
    let preprocessing = Preprocessing::learn(&columns, spec)?;
    let train = examples(&preprocessing, &table, "train")?;
    let inputs = preprocessing.inputs(&columns)?;
    let reference = reference::columns(&preprocessing, &columns)?;
    drop(table);
    let validation = match validation_input {
        None => None,
        Some(input) => {
            let table = Table::read(input)?;
            if table.rows == 0 {
                return Err(StageError::data("the validation part has no rows"));
            }
            Some(examples(&preprocessing, &table, "validation")?)
        }
    };
    let class_weights = class_weights(
        &spec.class_weights,
        &train.targets,
        preprocessing.label.classes(),
    )?;
    let shift = match (&spec.model, &preprocessing.features) {
        (ModelSpec::Cnn { shift, .. }, Features::Image { shape, .. }) if *shift > 0 => {
            Some(Shift {
                image: *shape,
                pixels: *shift as usize,
            })
        }
        _ => None,
    };
    Ok(Prepared {
        preprocessing,
        inputs,
        reference,
        train,
        validation,
        class_weights,
        shift,
    })
}

fn examples(
    preprocessing: &Preprocessing,
    table: &Table,
    part: &str,
) -> Result<Examples, TrainError> {
    let columns = Columns::new(table);
    let in_part = |e: TrainError| match e {
        TrainError::Data(text) => TrainError::Data(format!("in the {part} part, {text}")),
        other => other,
    };
    Ok(Examples {
        inputs: preprocessing.apply(&columns).map_err(in_part)?.matrix,
        targets: preprocessing.label.targets(&columns, part)?,
    })
}

/// How much each class counts.
fn class_weights(
    spec: &ClassWeights,
    targets: &Targets,
    classes: &[String],
) -> Result<Vec<f32>, TrainError> {
    let Targets::Classes { index, count } = targets else {
        return match spec {
            ClassWeights::None | ClassWeights::Rule(ClassWeightRule::Equal) => Ok(Vec::new()),
            _ => Err(TrainError::Spec(
                "`class_weights` is for classification only".to_owned(),
            )),
        };
    };
    let mut rows = vec![0u64; *count];
    for class in index {
        rows[*class as usize] += 1;
    }
    let balanced = |n: &u64| index.len() as f64 / (*count as f64 * (*n).max(1) as f64);
    match spec {
        ClassWeights::None | ClassWeights::Rule(ClassWeightRule::Equal) => Ok(vec![1.0; *count]),
        ClassWeights::Rule(ClassWeightRule::Balanced) => {
            Ok(rows.iter().map(|n| balanced(n) as f32).collect())
        }
        ClassWeights::Rule(ClassWeightRule::SqrtBalanced) => {
            Ok(rows.iter().map(|n| balanced(n).sqrt() as f32).collect())
        }
        ClassWeights::Given(given) => {
            for (class, weight) in given {
                if !classes.contains(class) {
                    return Err(TrainError::Spec(format!(
                        "`class_weights` names the class `{}`, which the label does not have: there are {}",
                        class.escape_debug(),
                        classes.join(", ")
                    )));
                }
                if !(weight.is_finite() && *weight >= 0.0) {
                    return Err(TrainError::Spec(format!(
                        "`class_weights.{class}` is {weight}: it must be a finite number, 0 or more"
                    )));
                }
            }
            let weights: Vec<f32> = classes
                .iter()
                .map(|class| given.get(class).map_or(1.0, |w| *w as f32))
                .collect();
            if weights.iter().all(|w| *w == 0.0) {
                return Err(TrainError::Spec(
                    "`class_weights` is 0 for every class: nothing would be learned".to_owned(),
                ));
            }
            Ok(weights)
        }
    }
}

/// The digest of everything that the weights depend on: a checkpoint of another one is not used.
fn subject(ctx: &StageContext, compute: &Compute) -> Result<String, StageError> {
    let inputs: Vec<_> = ctx
        .inputs
        .iter()
        .map(|input| json!([input.name, input.artifact.manifest]))
        .collect();
    let all = json!({
        "kind": BuiltinKind::Train.version(),
        "program": env!("CARGO_PKG_VERSION"),
        "spec": ctx.spec,
        "inputs": inputs,
        "backend": compute.name,
    });
    let bytes = serde_json::to_vec(&all).map_err(|e| StageError::system(e.to_string()))?;
    Ok(Digest::of(&bytes).to_string())
}

/// The checkpoint of an earlier attempt, if it is of this same training.
fn resume(ctx: &StageContext, subject: &str) -> Result<Option<Checkpoint>, StageError> {
    let Some(bytes) = ctx.checkpoints.load()? else {
        return Ok(None);
    };
    match Checkpoint::from_bytes(&bytes, subject) {
        Ok(checkpoint) => {
            ctx.log(format!(
                "resumed after {} epochs and {} steps",
                checkpoint.progress.epochs_done, checkpoint.progress.steps_done
            ));
            Ok(Some(checkpoint))
        }
        Err(e) => {
            ctx.log(format!("the saved checkpoint is not used: {e}"));
            Ok(None)
        }
    }
}

/// The most rows whose predictions are counted: a convolutional network takes its time for each.
const REFERENCE_ROWS: usize = 2000;

/// What the model was trained on looks like, and what it says of rows that it did not learn from, if
/// there are any.
fn reference(
    prepared: &Prepared,
    compute: &Compute,
    fitted: &Fitted,
) -> Result<Reference, StageError> {
    let examples = prepared.validation.as_ref().unwrap_or(&prepared.train);
    let all = &examples.inputs;
    let every = all.rows.div_ceil(REFERENCE_ROWS).max(1);
    let mut rows = Matrix {
        cols: all.cols,
        ..Matrix::default()
    };
    for row in (0..all.rows).step_by(every) {
        rows.data.extend_from_slice(all.row(row));
        rows.rows += 1;
    }
    // Not to be stopped: what was learned would be lost, and it takes less than an epoch.
    let outputs = fit::predict(&fitted.network, &rows, &compute.device, &Unwatched)?;
    let predictions = prepared.preprocessing.label.predictions(&outputs);
    Ok(reference::reference(
        prepared.reference.clone(),
        &predictions,
    ))
}

fn write(
    ctx: &StageContext,
    prepared: &Prepared,
    shape: &Shape,
    compute: &Compute,
    fitted: &Fitted,
    reference: Reference,
) -> Result<StageOutput, StageError> {
    let label = &prepared.preprocessing.label;
    let as_json = |value: Result<Value, serde_json::Error>| {
        value.map_err(|e| StageError::system(format!("the model's document: {e}")))
    };
    let family = match shape {
        Shape::Mlp(_) => "mlp",
        Shape::Cnn(_) => "cnn",
    };
    let task = if label.classes().is_empty() {
        "regression"
    } else {
        "classification"
    };
    let document = ModelDocument {
        format: model::FORMAT,
        spec: ctx.spec.clone(),
        family: family.to_owned(),
        task: task.to_owned(),
        label: label.column().to_owned(),
        classes: label.classes().to_vec(),
        inputs: prepared.inputs.clone(),
        preprocessing: as_json(serde_json::to_value(&prepared.preprocessing))?,
        network: as_json(serde_json::to_value(shape))?,
        parameters: shape.parameters(),
        train_rows: prepared.train.inputs.rows as u64,
        validation_rows: prepared
            .validation
            .as_ref()
            .map_or(0, |v| v.inputs.rows as u64),
        backend: compute.name.clone(),
        best_epoch: fitted.best_epoch,
        history: fitted.history.clone(),
        weights_sha256: Digest::of(&fitted.weights).to_string(),
        reference: Some(reference),
    };
    let name = artifact_name("model")?;
    let dir = ctx.output_dir(&name)?;
    model::save(&dir, &document, &fitted.weights)?;

    let mut results = Map::new();
    results.insert("best_epoch".to_owned(), json!(fitted.best_epoch));
    results.insert("epochs".to_owned(), json!(fitted.history.len()));
    results.insert("stopped_early".to_owned(), json!(fitted.stopped_early));
    results.insert("parameters".to_owned(), json!(document.parameters));
    let best = fitted.history.iter().find(|e| e.epoch == fitted.best_epoch);
    for (name, value) in best.iter().flat_map(|e| &e.values) {
        results.insert(name.clone(), json!(value));
    }
    let metadata = Map::from_iter([
        ("family".to_owned(), json!(document.family)),
        ("task".to_owned(), json!(document.task)),
        ("label".to_owned(), json!(document.label)),
        ("parameters".to_owned(), json!(document.parameters)),
    ]);
    Ok(StageOutput {
        artifacts: vec![Produced {
            name,
            content: ProducedContent::Directory {
                dir,
                artifact_type: ArtifactType::Model,
                metadata,
            },
        }],
        results,
        registration: None,
    })
}

/// Hands on to the attempt what the loop says.
struct StageWatcher<'a> {
    ctx: &'a StageContext,
    subject: &'a str,
    epochs: u32,
    told: Cell<Option<Instant>>,
    /// Of the epoch that is under way.
    span: RefCell<Option<StageSpan>>,
}

impl<'a> StageWatcher<'a> {
    const fn new(ctx: &'a StageContext, spec: &TrainSpec, subject: &'a str) -> Self {
        Self {
            ctx,
            subject,
            epochs: spec.epochs,
            told: Cell::new(None),
            span: RefCell::new(None),
        }
    }
}

impl Watcher for StageWatcher<'_> {
    fn stop(&self) -> Option<StopReason> {
        self.ctx.stop_reason()
    }

    fn step(&self, fraction: f64, epoch: u32) {
        let due = self
            .told
            .get()
            .is_none_or(|last| last.elapsed() >= PROGRESS_EVERY);
        if due {
            self.told.set(Some(Instant::now()));
            let text = format!("epoch {epoch} of {}", self.epochs);
            self.ctx.progress(fraction, &text);
        }
    }

    fn epoch_begins(&self, epoch: u32) {
        let mut span = self.ctx.span("epoch");
        span.set("emberline.epoch", i64::from(epoch));
        self.span.replace(Some(span));
    }

    fn epoch(&self, metrics: &EpochMetrics, samples_per_second: f64) {
        if let Some(mut span) = self.span.take() {
            let values = metrics.values.iter();
            let values = values.map(|(name, value)| (format!("emberline.{name}"), *value));
            span.event("metrics", values);
            span.end();
        }
        self.ctx.samples_per_second(samples_per_second);
        let mut line = format!("epoch {}/{}", metrics.epoch, self.epochs);
        for (name, value) in &metrics.values {
            self.ctx.metric(name, u64::from(metrics.epoch), *value);
            line.push_str(&format!(" {name}={value:.5}"));
        }
        self.ctx.log(line);
    }

    fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        let bytes = checkpoint
            .to_bytes(self.subject)
            .map_err(|e| TrainError::Checkpoint(StageError::system(e.to_string())))?;
        self.ctx
            .checkpoints
            .save(&bytes)
            .map_err(TrainError::Checkpoint)?;
        self.ctx.log(format!(
            "checkpoint after {} epochs and {} steps, {} bytes",
            checkpoint.progress.epochs_done,
            checkpoint.progress.steps_done,
            bytes.len()
        ));
        Ok(())
    }
}
