//! The stage kind `evaluate`: which of the models, how good it is on rows that it has not seen,
//! whether that is good enough, and whether it is better than the champion.
//!
//! The test part decides nothing but the verdict: the model and the threshold are chosen on the
//! validation part.

use std::collections::BTreeMap;

use emberline_common::{
    failure::Reason,
    ids::StageKind,
    spec::{
        ArtifactType,
        kinds::{
            BuiltinKind,
            evaluate::{CompareSpec, EvaluateSpec, Threshold},
        },
    },
};
use emberline_data::table::Table;
use emberline_worker::{
    documents::{Candidate, ClassMetrics, Comparison, EVALUATION_FILE, EpochMetrics, Evaluation},
    stage::{
        Input, Produced, ProducedContent, Stage, StageContext, StageError, StageOutput, StopReason,
    },
};
use serde_json::{Map, json};

use crate::{
    checkpoint::Checkpoint,
    columns::Columns,
    error::TrainError,
    features::unknown_labels,
    fit::{self, Watcher},
    gates,
    metrics::{self, higher_is_better},
    model::{Model, Predictions},
    train::{artifact_name, kind},
};

/// The stage kind `evaluate`.
#[derive(Debug, Clone, Copy)]
pub struct Evaluate;

/// Points of truth and prediction that a regression shows.
const MAX_SCATTER: usize = 1000;
/// The threshold without a validation part.
const HALF: f64 = 0.5;

impl Stage for Evaluate {
    fn kind(&self) -> StageKind {
        kind(BuiltinKind::Evaluate)
    }

    fn version(&self) -> u32 {
        BuiltinKind::Evaluate.version()
    }

    fn run(&self, ctx: &StageContext) -> Result<StageOutput, StageError> {
        let spec: EvaluateSpec = ctx.spec()?;
        if let Threshold::Fixed(value) = spec.threshold
            && !(0.0..=1.0).contains(&value)
        {
            return Err(StageError::user(format!(
                "`threshold` is {value}: it is a probability between 0 and 1, or `best_f1`"
            )));
        }
        let inputs: Vec<&Input> = ctx.inputs_named("model").collect();
        if inputs.is_empty() {
            return Err(StageError::user(
                "the stage has no input `model`: add it under `inputs`",
            ));
        }
        let test = part(ctx.input("test")?, "test")?;
        let validation = match ctx.optional_input("validation")? {
            Some(input) => Some(part(input, "validation")?),
            None => None,
        };
        let judge = Judge {
            ctx,
            spec: &spec,
            test: &test,
            validation: validation.as_ref(),
        };
        let (chosen, model, candidates) = judge.choose(&inputs)?;
        let mut evaluation = judge.measure_test(&model)?;
        evaluation.candidates = candidates;
        if !evaluation.unknown_labels.is_empty() {
            let text = unknown_labels(model.label().column(), "test", &evaluation.unknown_labels);
            let kept = write(ctx, &evaluation)?;
            return Err(StageError::data(text).with_outputs(vec![kept]));
        }
        evaluation.gates = gates::check_all(&spec.gates, &evaluation.metrics)?;
        if let Some(compare) = &spec.compare {
            evaluation.comparison = Some(judge.compare(compare, &evaluation)?);
        }
        finish(ctx, &evaluation, chosen, inputs.len())
    }
}

/// Writes what was measured, and says no if it is not good enough.
fn finish(
    ctx: &StageContext,
    evaluation: &Evaluation,
    chosen: &Input,
    models: usize,
) -> Result<StageOutput, StageError> {
    let mut results = Map::new();
    for (name, value) in &evaluation.metrics {
        ctx.log(format!("{name} = {value:.5}"));
        ctx.metric(name, 1, *value);
        results.insert(name.clone(), json!(value));
    }
    results.insert("rows".to_owned(), json!(evaluation.rows));
    if models > 1 {
        ctx.log(format!(
            "of {models} models, `{}` is taken",
            chosen.producer
        ));
        results.insert("model".to_owned(), json!(chosen.producer));
    }
    let written = write(ctx, evaluation)?;
    let mut complaints: Vec<String> = gates::failure(&evaluation.gates).into_iter().collect();
    if let Some(c) = evaluation.comparison.as_ref().filter(|c| !c.passed) {
        complaints.push(format!(
            "{} is {:.4}, the version `{}` has {:.4} on the same rows: not good enough to follow it",
            c.metric,
            c.value,
            c.alias,
            c.other.unwrap_or_default()
        ));
    }
    if !complaints.is_empty() {
        return Err(
            StageError::new(Reason::QualityGate, complaints.join("; ")).with_outputs(vec![written])
        );
    }
    Ok(StageOutput {
        artifacts: vec![
            written,
            Produced {
                name: artifact_name("model")?,
                content: ProducedContent::Input(chosen.artifact.clone()),
            },
        ],
        results,
        registration: None,
    })
}

fn write(ctx: &StageContext, evaluation: &Evaluation) -> Result<Produced, StageError> {
    let name = artifact_name("evaluation")?;
    let dir = ctx.output_dir(&name)?;
    let path = dir.join(EVALUATION_FILE);
    let json = serde_json::to_vec_pretty(evaluation)
        .map_err(|e| StageError::system(format!("the evaluation's document: {e}")))?;
    std::fs::write(&path, json).map_err(|e| StageError::io("write", &path, e))?;
    Ok(Produced {
        name,
        content: ProducedContent::Directory {
            dir,
            artifact_type: ArtifactType::Evaluation,
            metadata: Map::from_iter([
                ("task".to_owned(), json!(evaluation.task)),
                ("rows".to_owned(), json!(evaluation.rows)),
            ]),
        },
    })
}

fn part(input: &Input, name: &str) -> Result<Table, StageError> {
    let table = Table::read(input)?;
    if table.rows == 0 {
        return Err(StageError::data(format!("the {name} part has no rows")));
    }
    Ok(table)
}

fn in_part(part: &str, error: TrainError) -> TrainError {
    match error {
        TrainError::Data(text) => TrainError::Data(format!("in the {part} part, {text}")),
        other => other,
    }
}

/// What the models are judged on.
struct Judge<'a> {
    ctx: &'a StageContext,
    spec: &'a EvaluateSpec,
    test: &'a Table,
    validation: Option<&'a Table>,
}

impl Judge<'_> {
    /// The best model on the validation part.
    fn choose<'i>(
        &self,
        inputs: &[&'i Input],
    ) -> Result<(&'i Input, Model, Vec<Candidate>), TrainError> {
        if let [only] = inputs {
            return Ok((only, Model::load(&only.dir)?, Vec::new()));
        }
        let Some(validation) = self.validation else {
            return Err(TrainError::Spec(format!(
                "{} models come in, and the best is chosen on the validation part: add the input `validation`",
                inputs.len()
            )));
        };
        let mut candidates = Vec::with_capacity(inputs.len());
        let mut best: Option<(usize, f64, Model)> = None;
        for (i, input) in inputs.iter().enumerate() {
            let model = Model::load(&input.dir)?;
            let metric = self.spec.select_by.clone().unwrap_or_else(|| {
                let classes = model.label().classes();
                if classes.is_empty() { "rmse" } else { "f1" }.to_owned()
            });
            let measured = self
                .measure(&model, validation)
                .map_err(|e| in_part("validation", e))?;
            let score = gates::measured(&measured.metrics, &metric, "select_by")?;
            let better = best.as_ref().is_none_or(|(_, so_far, _)| {
                if higher_is_better(&metric) {
                    score > *so_far
                } else {
                    score < *so_far
                }
            });
            if better {
                best = Some((i, score, model));
            }
            candidates.push(Candidate {
                producer: input.producer.to_string(),
                score,
                chosen: false,
            });
        }
        let (chosen, _, model) = best.ok_or_else(|| {
            TrainError::Spec("the stage has no input `model`: add it under `inputs`".to_owned())
        })?;
        candidates[chosen].chosen = true;
        Ok((inputs[chosen], model, candidates))
    }

    fn measure_test(&self, model: &Model) -> Result<Evaluation, TrainError> {
        self.measure(model, self.test)
            .map_err(|e| in_part("test", e))
    }

    fn compare(
        &self,
        compare: &CompareSpec,
        evaluation: &Evaluation,
    ) -> Result<Comparison, StageError> {
        let metric = &compare.metric;
        let value = gates::measured(&evaluation.metrics, metric, "compare.metric")?;
        let mut comparison = Comparison {
            metric: metric.clone(),
            value,
            other: None,
            alias: compare.alias.to_string(),
            passed: true,
        };
        let Some(input) = self.ctx.optional_input("champion")? else {
            self.ctx.log(format!(
                "there is no version `{}` of `{}` yet: nothing to compare with",
                compare.alias, compare.model
            ));
            return Ok(comparison);
        };
        let of_champion = |e: TrainError| match e {
            TrainError::Stopped(why) => TrainError::Stopped(why),
            e => TrainError::Spec(format!(
                "the version `{}` of `{}` cannot be measured on these rows: {e}",
                compare.alias, compare.model
            )),
        };
        let champion = Model::load(&input.dir).map_err(of_champion)?;
        let measured = self.measure(&champion, self.test).map_err(of_champion)?;
        let other =
            gates::measured(&measured.metrics, metric, "compare.metric").map_err(of_champion)?;
        comparison.other = Some(other);
        comparison.passed = if higher_is_better(metric) {
            value >= other - compare.tolerance
        } else {
            value <= other + compare.tolerance
        };
        self.ctx.log(format!(
            "{metric} {value:.5} against {other:.5} of the version `{}`",
            compare.alias
        ));
        Ok(comparison)
    }

    /// Everything about a model on the rows of a table.
    fn measure(&self, model: &Model, table: &Table) -> Result<Evaluation, TrainError> {
        let watcher = Stop(self.ctx);
        let predicted = model.predict_watched(table, &watcher)?;
        for (column, rows) in &predicted.unknown_categories {
            self.ctx.log(format!(
                "the column `{column}` has a value that the model does not know in {rows} rows"
            ));
        }
        match predicted.predictions {
            Predictions::Values(values) => measure_values(model, table, &values),
            Predictions::Probabilities { classes, values } => {
                self.measure_classes(model, table, classes, values, &watcher)
            }
        }
    }

    fn measure_classes(
        &self,
        model: &Model,
        table: &Table,
        known: usize,
        mut probabilities: Vec<f64>,
        watcher: &Stop<'_>,
    ) -> Result<Evaluation, TrainError> {
        let (truth, unknown) = model.label().class_indices(&Columns::new(table))?;
        let mut classes = model.label().classes().to_vec();
        // A class that the model does not know is one that it gives no chance.
        if !unknown.is_empty() {
            classes.extend(unknown.keys().cloned());
            probabilities = probabilities
                .chunks_exact(known)
                .flat_map(|row| {
                    let none = std::iter::repeat_n(0.0, unknown.len());
                    row.iter().copied().chain(none).collect::<Vec<_>>()
                })
                .collect();
        }
        let truth = number_unknown(model, table, truth, &classes)?;
        let mut evaluation = Evaluation {
            rows: truth.len() as u64,
            unknown_labels: unknown,
            ..empty("classification")
        };
        let predicted = if classes.len() == 2 {
            let positive = self.positive(&classes)?;
            let scores: Vec<f64> = column(&probabilities, 2, positive);
            let threshold = self.threshold(model, positive, watcher)?;
            let is_positive: Vec<bool> = truth.iter().map(|t| *t as usize == positive).collect();
            evaluation.positive = Some(classes[positive].clone());
            evaluation.threshold = Some(threshold);
            evaluation.roc = metrics::roc_curve(&is_positive, &scores);
            evaluation.precision_recall = metrics::precision_recall_curve(&is_positive, &scores);
            evaluation.metrics.insert("threshold".to_owned(), threshold);
            let yes = |score: &f64| {
                if *score >= threshold {
                    positive
                } else {
                    1 - positive
                }
            };
            scores.iter().map(|s| yes(s) as u32).collect()
        } else {
            if let Some(positive) = &self.spec.positive {
                return Err(TrainError::Spec(format!(
                    "`positive` is `{positive}`, but the label has {} classes: it is for two",
                    classes.len()
                )));
            }
            fit::most_probable(&probabilities, classes.len())
        };
        evaluation.confusion = metrics::confusion(&truth, &predicted, classes.len());
        classification_metrics(&mut evaluation, &classes, &truth, &probabilities);
        evaluation.classes = classes;
        Ok(evaluation)
    }

    fn positive(&self, classes: &[String]) -> Result<usize, TrainError> {
        match &self.spec.positive {
            None => Ok(1),
            Some(name) => classes.iter().position(|c| c == name).ok_or_else(|| {
                TrainError::Spec(format!(
                    "`positive` is `{}`, but the classes are {}",
                    name.escape_debug(),
                    classes.join(", ")
                ))
            }),
        }
    }

    /// Where a probability becomes a yes, chosen without a look at the test part.
    fn threshold(
        &self,
        model: &Model,
        positive: usize,
        watcher: &Stop<'_>,
    ) -> Result<f64, TrainError> {
        if let Threshold::Fixed(value) = self.spec.threshold {
            return Ok(value);
        }
        let Some(validation) = self.validation else {
            return Ok(HALF);
        };
        let of_validation = |e| in_part("validation", e);
        let (truth, _) = model
            .label()
            .class_indices(&Columns::new(validation))
            .map_err(of_validation)?;
        let predicted = model
            .predict_watched(validation, watcher)
            .map_err(of_validation)?;
        let Predictions::Probabilities { classes, values } = predicted.predictions else {
            return Ok(HALF);
        };
        let scores = column(&values, classes, positive);
        let is_positive: Vec<bool> = truth
            .iter()
            .map(|t| t.is_some_and(|t| t as usize == positive))
            .collect();
        Ok(metrics::best_f1_threshold(&is_positive, &scores).map_or(HALF, |(at, _)| at))
    }
}

/// The places of the true classes in `classes`, of which the model knows the first ones.
fn number_unknown(
    model: &Model,
    table: &Table,
    truth: Vec<Option<u32>>,
    classes: &[String],
) -> Result<Vec<u32>, TrainError> {
    if truth.iter().all(Option::is_some) {
        return Ok(truth.into_iter().flatten().collect());
    }
    let label = model.label().with_classes(classes);
    let (all, _) = label.class_indices(&Columns::new(table))?;
    Ok(all.into_iter().flatten().collect())
}

fn column(values: &[f64], width: usize, index: usize) -> Vec<f64> {
    values.chunks_exact(width).map(|row| row[index]).collect()
}

fn empty(task: &str) -> Evaluation {
    Evaluation {
        task: task.to_owned(),
        rows: 0,
        metrics: BTreeMap::new(),
        classes: Vec::new(),
        confusion: Vec::new(),
        positive: None,
        threshold: None,
        roc: Vec::new(),
        precision_recall: Vec::new(),
        per_class: Vec::new(),
        scatter: Vec::new(),
        unknown_labels: BTreeMap::new(),
        gates: Vec::new(),
        comparison: None,
        candidates: Vec::new(),
    }
}

/// The metrics of the positive class of two, or the means over the classes that occur.
fn classification_metrics(
    evaluation: &mut Evaluation,
    classes: &[String],
    truth: &[u32],
    probabilities: &[f64],
) {
    let count = classes.len();
    let positive = evaluation
        .positive
        .as_ref()
        .and_then(|name| classes.iter().position(|c| c == name));
    let scores = match positive {
        Some(class) => metrics::class_scores(&evaluation.confusion, class),
        None => metrics::mean_scores(&evaluation.confusion),
    };
    let ranked: Vec<usize> = positive.map_or_else(|| (0..count).collect(), |class| vec![class]);
    // One class against the rest; classes without rows have no value and are left out of the mean.
    let mean_over = |metric: fn(&[bool], &[f64]) -> Option<f64>| {
        let values: Vec<f64> = ranked
            .iter()
            .filter_map(|class| {
                let is: Vec<bool> = truth.iter().map(|t| *t as usize == *class).collect();
                metric(&is, &column(probabilities, count, *class))
            })
            .collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let mut insert = |name: &str, value: Option<f64>| {
        if let Some(value) = value {
            evaluation.metrics.insert(name.to_owned(), value);
        }
    };
    insert("accuracy", Some(metrics::accuracy(&evaluation.confusion)));
    insert("precision", Some(scores.precision));
    insert("recall", Some(scores.recall));
    insert("f1", Some(scores.f1));
    insert("roc_auc", mean_over(metrics::roc_auc));
    insert("average_precision", mean_over(metrics::average_precision));
    insert(
        "log_loss",
        Some(metrics::log_loss(truth, probabilities, count)),
    );
    evaluation.per_class = (0..count)
        .map(|class| {
            let scores = metrics::class_scores(&evaluation.confusion, class);
            ClassMetrics {
                class: classes[class].clone(),
                precision: scores.precision,
                recall: scores.recall,
                f1: scores.f1,
                rows: scores.rows,
            }
        })
        .collect();
}

fn measure_values(model: &Model, table: &Table, values: &[f64]) -> Result<Evaluation, TrainError> {
    let truth = Columns::new(table).numbers(model.label().column())?;
    let scores = metrics::regression_scores(&truth, values);
    let mut evaluation = Evaluation {
        rows: truth.len() as u64,
        ..empty("regression")
    };
    let all = [
        ("mae", Some(scores.mae)),
        ("mse", Some(scores.mse)),
        ("rmse", Some(scores.rmse)),
        ("r2", scores.r2),
        ("mape", scores.mape),
    ];
    for (name, value) in all {
        if let Some(value) = value {
            evaluation.metrics.insert(name.to_owned(), value);
        }
    }
    let every = truth.len().div_ceil(MAX_SCATTER).max(1);
    evaluation.scatter = truth
        .iter()
        .zip(values)
        .step_by(every)
        .map(|(t, p)| [*t, *p])
        .collect();
    Ok(evaluation)
}

/// Lets a prediction be stopped.
struct Stop<'a>(&'a StageContext);

impl Watcher for Stop<'_> {
    fn stop(&self) -> Option<StopReason> {
        self.0.stop_reason()
    }
    fn step(&self, _: f64, _: u32) {}
    fn epoch_begins(&self, _: u32) {}
    fn epoch(&self, _: &EpochMetrics, _: f64) {}
    fn checkpoint(&self, _: &Checkpoint) -> Result<(), TrainError> {
        Ok(())
    }
}
