//! What `evaluate` measured: metrics and gates, the comparison with the champion, and pictures of
//! where the model is right and where it is not.

use emberline_worker::documents::{Comparison, Evaluation};

use super::verdict;
use crate::{
    chart::{
        heat,
        line::{Axes, Lines, Mark, Series},
        scatter,
    },
    format::{count, number, percent, plural, signed, words},
    html::{
        Heading::{Number, Text},
        Html, cut,
    },
    material::Material,
};

/// The most evaluations that are shown.
const MAX_EVALUATIONS: usize = 8;
/// The most rows of any table here.
const MAX_ROWS: usize = 100;

/// Writes the section.
pub fn write(h: &mut Html, material: &Material<'_>) {
    for known in material.evaluations.iter().take(MAX_EVALUATIONS) {
        let evaluation = &known.document;
        h.leaf("h3", &[], known.label());
        h.paragraph("muted", subject(evaluation));
        unknown_labels(h, evaluation);
        metrics(h, evaluation);
        if let Some(comparison) = &evaluation.comparison {
            self::comparison(h, comparison);
        }
        pictures(h, evaluation);
        per_class(h, evaluation);
        confusions(h, evaluation);
    }
    if material.evaluations.len() > MAX_EVALUATIONS {
        let more = (material.evaluations.len() - MAX_EVALUATIONS) as u64;
        h.paragraph(
            "muted",
            format_args!("and {}", plural(more, "more evaluation")),
        );
    }
}

fn subject(evaluation: &Evaluation) -> String {
    let mut text = format!(
        "{} on {}",
        cut(&evaluation.task, 40),
        plural(evaluation.rows, "row")
    );
    if !evaluation.classes.is_empty() {
        text.push_str(&format!(", {} classes", evaluation.classes.len()));
    }
    if let Some(positive) = &evaluation.positive {
        text.push_str(&format!(", positive is {}", cut(positive, 60)));
    }
    if let Some(threshold) = evaluation.threshold {
        text.push_str(&format!(" from a probability of {}", number(threshold)));
    }
    text
}

fn unknown_labels(h: &mut Html, evaluation: &Evaluation) {
    if evaluation.unknown_labels.is_empty() {
        return;
    }
    let labels: Vec<String> = evaluation
        .unknown_labels
        .iter()
        .take(20)
        .map(|(label, rows)| format!("{} ({})", cut(label, 60), plural(*rows, "row")))
        .collect();
    h.element("p", &[], |h| {
        h.span("badge bad", "✕ unknown labels");
        h.text(format_args!(
            " The model has never seen {}",
            labels.join(", ")
        ));
    });
}

/// Gated metrics first, then the rest.
fn metrics(h: &mut Html, evaluation: &Evaluation) {
    let gated: Vec<&str> = evaluation.gates.iter().map(|g| g.metric.as_str()).collect();
    let rest = evaluation
        .metrics
        .iter()
        .filter(|(name, _)| !gated.contains(&name.as_str()));
    if gated.is_empty() && evaluation.metrics.is_empty() {
        return;
    }
    h.table(
        "Metrics and gates",
        &[
            Text("metric"),
            Number("value"),
            Text("gate"),
            Number("margin"),
            Text(""),
        ],
        |h| {
            for gate in evaluation.gates.iter().take(MAX_ROWS) {
                h.row(|h| {
                    h.row_head(words(&cut(&gate.metric, 60)));
                    h.number_cell(number(gate.value));
                    h.element("td", &[], |h| h.leaf("code", &[], cut(&gate.gate, 40)));
                    h.number_cell(signed(gate.margin));
                    h.element("td", &[], |h| verdict(h, gate.passed));
                });
            }
            for (name, value) in rest.take(MAX_ROWS) {
                h.row(|h| {
                    h.row_head(words(&cut(name, 60)));
                    h.number_cell(number(*value));
                    h.cell("");
                    h.cell("");
                    h.cell("");
                });
            }
        },
    );
}

fn comparison(h: &mut Html, comparison: &Comparison) {
    let metric = words(&cut(&comparison.metric, 60));
    let alias = cut(&comparison.alias, 63);
    h.element("p", &[("class", &"compare")], |h| {
        verdict(h, comparison.passed);
        match comparison.other {
            Some(other) => h.text(format_args!(
                " Against {alias}: {metric} {} now, {} then ({})",
                number(comparison.value),
                number(other),
                signed(comparison.value - other)
            )),
            None => h.text(format_args!(
                " {metric} is {}; no version was {alias} yet, so there was nothing to compare with",
                number(comparison.value)
            )),
        }
    });
}

fn pictures(h: &mut Html, evaluation: &Evaluation) {
    let drawable =
        !evaluation.confusion.is_empty() && evaluation.classes.len() <= heat::MAX_CLASSES;
    if !drawable
        && evaluation.roc.is_empty()
        && evaluation.precision_recall.is_empty()
        && evaluation.scatter.is_empty()
    {
        return;
    }
    h.div("charts", |h| {
        if drawable {
            heat::confusion(
                h,
                "Confusion matrix",
                &evaluation.classes,
                &evaluation.confusion,
            );
        }
        roc(h, evaluation);
        precision_recall(h, evaluation);
        if !evaluation.scatter.is_empty() {
            scatter::truth_and_prediction(h, &evaluation.scatter);
            scatter::errors(h, &evaluation.scatter);
        }
    });
}

/// Counts of the positive class at the threshold: right, wrong yes, wrong no, right no.
fn at_threshold(evaluation: &Evaluation) -> Option<[f64; 4]> {
    let positive = evaluation.positive.as_ref()?;
    let class = evaluation.classes.iter().position(|c| c == positive)?;
    let other = 1usize.checked_sub(class)?;
    let count = |truth: usize, predicted: usize| {
        Some(*evaluation.confusion.get(truth)?.get(predicted)? as f64)
    };
    Some([
        count(class, class)?,
        count(other, class)?,
        count(class, other)?,
        count(other, other)?,
    ])
}

fn threshold_mark(evaluation: &Evaluation, at: [f64; 2]) -> Option<Mark> {
    let label = match evaluation.threshold {
        Some(threshold) => format!("threshold {}", number(threshold)),
        None => "as chosen".to_owned(),
    };
    at.iter()
        .all(|v| v.is_finite())
        .then_some(Mark { at, label })
}

fn roc(h: &mut Html, evaluation: &Evaluation) {
    if evaluation.roc.is_empty() {
        return;
    }
    let auc = evaluation.metrics.get("roc_auc");
    let title = auc.map_or_else(
        || "ROC curve".to_owned(),
        |auc| format!("ROC curve, AUC {}", number(*auc)),
    );
    let chart = Lines {
        title: &title,
        description: "True positive rate over false positive rate; the dashed line is chance."
            .to_owned(),
        axes: Axes::Shares,
        names: ["false positive rate", "true positive rate"],
        series: vec![Series {
            name: "ROC",
            points: evaluation.roc.clone(),
        }],
        mark: at_threshold(evaluation).and_then(|[tp, fp, fneg, tn]| {
            threshold_mark(evaluation, [fp / (fp + tn), tp / (tp + fneg)])
        }),
        guide: Some([[0.0, 0.0], [1.0, 1.0]]),
        filled: true,
    };
    chart.write(h);
}

fn precision_recall(h: &mut Html, evaluation: &Evaluation) {
    if evaluation.precision_recall.is_empty() {
        return;
    }
    let ap = evaluation.metrics.get("average_precision");
    let title = ap.map_or_else(
        || "Precision and recall".to_owned(),
        |ap| format!("Precision and recall, AP {}", number(*ap)),
    );
    let counts = at_threshold(evaluation);
    let chance = counts
        .map(|[tp, fp, fneg, tn]| (tp + fneg) / (tp + fp + fneg + tn))
        .filter(|share| share.is_finite());
    let chart = Lines {
        title: &title,
        description:
            "Precision over recall; the dashed line is chance: the share of the positive class."
                .to_owned(),
        axes: Axes::Shares,
        names: ["recall", "precision"],
        series: vec![Series {
            name: "precision",
            points: evaluation.precision_recall.clone(),
        }],
        mark: counts.and_then(|[tp, fp, fneg, _]| {
            threshold_mark(evaluation, [tp / (tp + fneg), tp / (tp + fp)])
        }),
        guide: chance.map(|share| [[0.0, share], [1.0, share]]),
        filled: true,
    };
    chart.write(h);
}

/// For many classes the weakest are what matters.
fn per_class(h: &mut Html, evaluation: &Evaluation) {
    if evaluation.per_class.is_empty() {
        return;
    }
    let mut classes: Vec<_> = evaluation.per_class.iter().collect();
    let all = classes.len() <= MAX_ROWS;
    if !all {
        classes.sort_by(|a, b| a.f1.total_cmp(&b.f1));
    }
    let caption = if all {
        "By class".to_owned()
    } else {
        format!(
            "The {MAX_ROWS} classes with the lowest F1, of {}",
            classes.len()
        )
    };
    let headings = [
        Text("class"),
        Number("precision"),
        Number("recall"),
        Number("F1"),
        Text(""),
        Number("rows"),
    ];
    h.table(&caption, &headings, |h| {
        for class in classes.iter().take(MAX_ROWS) {
            h.row(|h| {
                let name = cut(&class.class, 80);
                h.row_head(&name);
                h.number_cell(number(class.precision));
                h.number_cell(number(class.recall));
                h.number_cell(number(class.f1));
                h.element("td", &[], |h| {
                    let what = format!("{name}: F1 {}", number(class.f1));
                    crate::chart::bars::amount(h, class.f1, 1.0, None, false, &what);
                });
                h.number_cell(count(class.rows));
            });
        }
    });
}

/// For more classes than can be drawn or read off: the pairs that are mixed up most.
fn confusions(h: &mut Html, evaluation: &Evaluation) {
    const MOST: usize = 20;
    if evaluation.classes.len() < 8 {
        return;
    }
    let mut pairs: Vec<(u64, usize, usize)> = Vec::new();
    for (truth, row) in evaluation.confusion.iter().enumerate() {
        for (predicted, rows) in row.iter().enumerate() {
            if truth != predicted && *rows > 0 {
                pairs.push((*rows, truth, predicted));
            }
        }
    }
    pairs.sort_by_key(|(rows, truth, predicted)| (std::cmp::Reverse(*rows), *truth, *predicted));
    if pairs.is_empty() {
        return;
    }
    let name = |class: usize| {
        evaluation
            .classes
            .get(class)
            .map_or_else(|| class.to_string(), |c| cut(c, 80))
    };
    h.element("details", &[], |h| {
        h.leaf("summary", &[], "What is mixed up most");
        let headings = [
            Text("truth"),
            Text("predicted as"),
            Number("rows"),
            Number("of the class"),
        ];
        h.table("Wrong predictions by pair", &headings, |h| {
            for (rows, truth, predicted) in pairs.iter().take(MOST) {
                let whole: u64 = evaluation.confusion[*truth].iter().sum();
                h.row(|h| {
                    h.row_head(name(*truth));
                    h.cell(name(*predicted));
                    h.number_cell(count(*rows));
                    h.number_cell(percent(*rows as f64, whole as f64));
                });
            }
        });
    });
}
