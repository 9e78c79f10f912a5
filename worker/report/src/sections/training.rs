//! The models: what each is, and how it learned.

use emberline_worker::documents::{EpochMetrics, ModelDocument};
use serde_json::Value;

use crate::{
    chart::line::{Axes, Lines, Mark, Series},
    format::{count, literal, number, plural, words},
    html::{
        Heading::{Number, Text},
        Html, cut,
    },
    material::{Known, Material},
};

/// The most models with curves of their own.
const MAX_MODELS: usize = 6;
/// The most rows of the table of all models.
const MAX_ROWS: usize = 200;
/// The most curves in one chart.
const MAX_SERIES: usize = 6;
/// The most charts of one model.
const MAX_CHARTS: usize = 8;
/// The most inputs that are listed.
const MAX_INPUTS: usize = 100;

/// Writes the section.
pub fn write(h: &mut Html, material: &Material<'_>) {
    let models = &material.models;
    if models.len() > 1 {
        together(h, models);
    }
    for known in models.iter().take(MAX_MODELS) {
        h.leaf("h3", &[], known.label());
        facts(h, &known.document);
        curves(h, &known.document);
        inputs(h, &known.document);
    }
    if models.len() > MAX_MODELS {
        let more = (models.len() - MAX_MODELS) as u64;
        h.paragraph(
            "muted",
            format_args!("The curves of {} are left out.", plural(more, "more model")),
        );
    }
}

fn facts(h: &mut Html, model: &ModelDocument) {
    let mut facts: Vec<(&str, String)> = vec![
        (
            "task",
            format!("{} of {}", model.task, cut(&model.label, 60)),
        ),
        ("network", network(model)),
        ("parameters", count(model.parameters)),
        ("trained on", plural(model.train_rows, "row")),
        ("watched on", plural(model.validation_rows, "row")),
        ("epochs", epochs(model)),
        ("computed on", cut(&model.backend, 60)),
    ];
    if !model.classes.is_empty() {
        facts.insert(1, ("classes", cut(&model.classes.join(", "), 80)));
    }
    let settings = [
        ("optimizer", "/optimizer/type"),
        ("learning rate", "/optimizer/learning_rate"),
        ("schedule", "/schedule/type"),
        ("batch size", "/batch_size"),
        ("seed", "/seed"),
    ];
    for (name, place) in settings {
        if let Some(value) = model.spec.pointer(place).filter(|value| !value.is_null()) {
            facts.push((name, literal(value)));
        }
    }
    h.element("dl", &[("class", &"facts")], |h| {
        for (name, value) in facts {
            h.element("div", &[], |h| {
                h.leaf("dt", &[], name);
                h.leaf("dd", &[], value);
            });
        }
    });
}

fn network(model: &ModelDocument) -> String {
    let hidden = model
        .spec
        .pointer("/model/hidden")
        .and_then(Value::as_array);
    match hidden {
        Some(layers) => {
            let layers: Vec<String> = layers.iter().map(literal).collect();
            cut(&format!("{} {}", model.family, layers.join(" → ")), 80)
        }
        None => cut(&model.family, 80),
    }
}

fn epochs(model: &ModelDocument) -> String {
    format!("{}, the best is {}", model.history.len(), model.best_epoch)
}

/// A chart for the loss, one for what lies between 0 and 1, one for each of the rest.
fn curves(h: &mut Html, model: &ModelDocument) {
    if model.history.is_empty() {
        return;
    }
    let mut names: Vec<&str> = Vec::new();
    for name in model.history.iter().flat_map(|epoch| epoch.values.keys()) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let is_loss = |name: &str| matches!(name, "train_loss" | "validation_loss");
    let (loss, rest): (Vec<&str>, Vec<&str>) = names.into_iter().partition(|name| is_loss(name));
    let is_share = |name: &str| {
        name != "learning_rate"
            && values(&model.history, name).all(|(_, v)| !v.is_finite() || (0.0..=1.0).contains(&v))
    };
    let (shares, rest): (Vec<&str>, Vec<&str>) = rest.into_iter().partition(|name| is_share(name));
    let mut charts: Vec<(String, Vec<&str>)> = Vec::new();
    if !loss.is_empty() {
        charts.push(("Loss".to_owned(), loss));
    }
    for part in shares.chunks(MAX_SERIES) {
        charts.push(("Metrics on the validation part".to_owned(), part.to_vec()));
    }
    charts.extend(
        rest.into_iter()
            .map(|name| (capital(&words(name)), vec![name])),
    );
    h.div("charts", |h| {
        for (title, names) in charts.iter().take(MAX_CHARTS) {
            chart(h, model, title, names);
        }
    });
}

fn values<'a>(history: &'a [EpochMetrics], name: &'a str) -> impl Iterator<Item = (u32, f64)> + 'a {
    history
        .iter()
        .filter_map(move |epoch| Some((epoch.epoch, *epoch.values.get(name)?)))
}

fn points(history: &[EpochMetrics], name: &str) -> Vec<[f64; 2]> {
    values(history, name)
        .map(|(epoch, value)| [f64::from(epoch), value])
        .collect()
}

fn chart(h: &mut Html, model: &ModelDocument, title: &str, names: &[&str]) {
    let shown: Vec<String> = names.iter().map(|name| words(name)).collect();
    let best: Vec<String> = names
        .iter()
        .filter_map(|name| {
            let (_, value) = values(&model.history, name).find(|(e, _)| *e == model.best_epoch)?;
            Some(format!("{} {}", words(name), number(value)))
        })
        .collect();
    let chart = Lines {
        title,
        description: format!(
            "{} by epoch. At the best epoch, {}: {}.",
            shown.join(", "),
            model.best_epoch,
            best.join(", ")
        ),
        axes: Axes::Epochs,
        names: ["epoch", if names.len() == 1 { &shown[0] } else { "" }],
        series: names
            .iter()
            .zip(&shown)
            .map(|(name, shown)| Series {
                name: shown,
                points: points(&model.history, name),
            })
            .collect(),
        mark: (model.best_epoch > 0).then(|| Mark {
            at: [f64::from(model.best_epoch), f64::NAN],
            label: format!("best: {}", model.best_epoch),
        }),
        guide: None,
        filled: false,
    };
    chart.write(h);
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(chars).collect()
    })
}

fn inputs(h: &mut Html, model: &ModelDocument) {
    if model.inputs.is_empty() {
        return;
    }
    h.element("details", &[], |h| {
        h.leaf(
            "summary",
            &[],
            plural(model.inputs.len() as u64, "input column"),
        );
        let headings = [
            Text("column"),
            Text("type"),
            Number("min"),
            Number("max"),
            Text("known values"),
        ];
        h.table("What the model takes", &headings, |h| {
            for input in model.inputs.iter().take(MAX_INPUTS) {
                h.row(|h| {
                    h.row_head(cut(&input.name, 80));
                    h.cell(cut(&input.column_type, 20));
                    h.number_cell(input.min.map_or_else(String::new, number));
                    h.number_cell(input.max.map_or_else(String::new, number));
                    let known: Vec<&str> = input
                        .categories
                        .iter()
                        .take(30)
                        .map(String::as_str)
                        .collect();
                    h.cell(cut(&known.join(", "), 120));
                });
            }
        });
        if model.inputs.len() > MAX_INPUTS {
            let more = (model.inputs.len() - MAX_INPUTS) as u64;
            h.paragraph("muted", format_args!("and {}", plural(more, "more column")));
        }
    });
}

/// Several models side by side: their curves of one metric, and a table.
fn together(h: &mut Html, models: &[Known<'_, ModelDocument>]) {
    let has = |name: &str| {
        models
            .iter()
            .any(|m| values(&m.document.history, name).next().is_some())
    };
    let metric = if has("validation_loss") {
        "validation_loss"
    } else {
        "train_loss"
    };
    let labels: Vec<String> = models.iter().map(Known::label).collect();
    h.div("charts", |h| {
        let title = if models.len() > MAX_SERIES {
            format!(
                "{} of the first {MAX_SERIES} models",
                capital(&words(metric))
            )
        } else {
            format!("{} of all models", capital(&words(metric)))
        };
        let chart = Lines {
            title: &title,
            description: format!("{} by epoch, one curve for each model.", words(metric)),
            axes: Axes::Epochs,
            names: ["epoch", ""],
            series: models
                .iter()
                .zip(&labels)
                .take(MAX_SERIES)
                .map(|(known, label)| Series {
                    name: label,
                    points: points(&known.document.history, metric),
                })
                .collect(),
            mark: None,
            guide: None,
            filled: false,
        };
        chart.write(h);
    });
    let best = capital(&format!("{} at best", words(metric)));
    let headings = [
        Text("model"),
        Text("network"),
        Number("parameters"),
        Number("epochs"),
        Number("best"),
        Number(&best),
        Text("computed on"),
    ];
    h.table("All models", &headings, |h| {
        for (known, label) in models.iter().zip(&labels).take(MAX_ROWS) {
            let model = &known.document;
            h.row(|h| {
                h.row_head(label);
                h.cell(network(model));
                h.number_cell(count(model.parameters));
                h.number_cell(count(model.history.len() as u64));
                h.number_cell(count(model.best_epoch.into()));
                let at_best = values(&model.history, metric).find(|(e, _)| *e == model.best_epoch);
                h.number_cell(at_best.map_or_else(String::new, |(_, value)| number(value)));
                h.cell(cut(&model.backend, 40));
            });
        }
    });
}
