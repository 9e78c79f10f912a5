//! The top of the page: which run, how it came out, and the few figures that everybody asks for.

use emberline_worker::documents::{Evaluation, GateResult};

use super::{badge, run_look};
use crate::{
    format::{count, duration, number, plural, signed, words},
    html::{Html, cut},
    material::Material,
};

/// The most figures of an evaluation that are shown here.
const MAX_METRICS: usize = 5;
/// What comes first, as far as it was measured; metrics with a gate come before.
const FIRST: [&str; 9] = [
    "f1",
    "average_precision",
    "roc_auc",
    "accuracy",
    "rmse",
    "mae",
    "r2",
    "precision",
    "recall",
];

/// Writes the page's header.
pub fn write(h: &mut Html, material: &Material<'_>) {
    h.element("header", &[], |h| {
        h.div("brand", |h| {
            mark(h);
            h.text("Emberline run report");
        });
        h.div("title", |h| {
            h.leaf("h1", &[], cut(&material.title, 200));
            if let Some(outcome) = material.outcome() {
                let (class, sign) = run_look(outcome);
                badge(h, class, sign, outcome.as_str());
            }
        });
        h.paragraph("facts", facts(material));
        h.element(
            "ul",
            &[("class", &"tiles"), ("aria-label", &"Key figures")],
            |h| {
                metrics(h, material);
                version(h, material);
                run(h, material);
            },
        );
    });
}

/// The sign of the house: a flame.
fn mark(h: &mut Html) {
    let attributes: crate::html::Attributes<'_> = &[
        ("viewBox", &"0 0 24 24"),
        ("width", &"20"),
        ("height", &"20"),
        ("aria-hidden", &"true"),
    ];
    h.element("svg", attributes, |h| {
        let outer = "M12 2c1 4 6 6.5 6 12a6 6 0 0 1-12 0c0-2.2 1-3.8 2.2-5 .2 1.6 1 2.6 2 3C9.8 8.5 10.5 5 12 2z";
        let inner = "M12 13c.6 1.6 2.3 2.4 2.3 4.4a2.3 2.3 0 0 1-4.6 0c0-1.8 1.7-2.6 2.3-4.4z";
        h.empty("path", &[("d", &outer), ("class", &"flame")]);
        h.empty("path", &[("d", &inner), ("class", &"spark")]);
    });
}

fn facts(material: &Material<'_>) -> String {
    let mut facts = vec![
        format!("pipeline {}", material.ctx.pipeline),
        format!("run {}", material.ctx.attempt.run),
    ];
    if let Some(run) = material.run {
        facts.push(format!("revision {}", run.summary.revision.short()));
        facts.push(format!("started {}", moment(run.summary.created_at)));
        facts.push(format!("trigger {}", cut(&run.summary.trigger, 40)));
    }
    facts.join("  ·  ")
}

/// To the second.
fn moment(at: emberline_common::time::Timestamp) -> String {
    let text = at.to_string();
    match (text.get(..10), text.get(11..19)) {
        (Some(day), Some(time)) => format!("{day} {time} UTC"),
        _ => text,
    }
}

fn tile(h: &mut Html, name: &str, value: &str, note: impl FnOnce(&mut Html)) {
    h.element("li", &[], |h| {
        h.span("name", name);
        h.span("value", value);
        h.element("span", &[("class", &"note")], note);
    });
}

fn metrics(h: &mut Html, material: &Material<'_>) {
    let Some(known) = material.evaluations.first() else {
        return;
    };
    let evaluation = &known.document;
    for name in headline_metrics(evaluation) {
        let Some(value) = evaluation.metrics.get(name) else {
            continue;
        };
        tile(h, &words(name), &number(*value), |h| {
            if let Some(gate) = evaluation.gates.iter().find(|gate| gate.metric == name) {
                self::gate(h, gate);
            } else {
                h.text(format_args!("{} tested", plural(evaluation.rows, "row")));
            }
        });
    }
}

fn headline_metrics(evaluation: &Evaluation) -> Vec<&str> {
    let gated = evaluation.gates.iter().map(|gate| gate.metric.as_str());
    let mut out: Vec<&str> = Vec::new();
    for name in gated.chain(FIRST) {
        if out.len() < MAX_METRICS && evaluation.metrics.contains_key(name) && !out.contains(&name)
        {
            out.push(name);
        }
    }
    out
}

fn gate(h: &mut Html, gate: &GateResult) {
    let (class, sign) = if gate.passed {
        ("ok", "✓")
    } else {
        ("bad", "✕")
    };
    h.span(class, format_args!("{sign} gate {}", cut(&gate.gate, 24)));
    h.text(format_args!(", margin {}", signed(gate.margin)));
}

fn version(h: &mut Html, material: &Material<'_>) {
    let Some(known) = material.versions.first() else {
        return;
    };
    let registration = &known.document.registration;
    let number = material
        .task(&known.input.producer)
        .and_then(|task| task.results.get("version"))
        .and_then(serde_json::Value::as_u64);
    let name = match number {
        Some(number) => format!("{} v{number}", registration.model),
        None => registration.model.to_string(),
    };
    h.element("li", &[("class", &"wide")], |h| {
        h.span("name", "registered model");
        h.span("value", name);
        h.element("span", &[("class", &"note")], |h| {
            match &registration.alias {
                Some(alias) => {
                    h.text("now ");
                    h.span("ok", alias);
                }
                None => h.text("no alias moved"),
            }
        });
    });
}

fn run(h: &mut Html, material: &Material<'_>) {
    let Some(run) = material.run else {
        return;
    };
    if let Some(took) = material.took() {
        tile(h, "duration", &duration(took), |h| {
            h.text("from submission to this page");
        });
    }
    let summary = &run.summary;
    tile(h, "tasks", &count(summary.tasks_total.into()), |h| {
        h.text(format_args!(
            "{} done, {} of them cached",
            count(summary.tasks_done.into()),
            count(summary.tasks_cached.into())
        ));
    });
}
