//! Where everything comes from: parameters, the pipeline's revision, and every artifact by digest.

use emberline_common::ids::Digest;

use crate::{
    format::{bytes, literal, plural},
    html::{
        Heading::{Number, Text},
        Html, cut,
    },
    material::Material,
};

/// The most artifacts in the table.
const MAX_ARTIFACTS: usize = 400;
/// The most parameters.
const MAX_PARAMS: usize = 100;

/// Writes the section.
pub fn write(h: &mut Html, material: &Material<'_>) {
    facts(h, material);
    artifacts(h, material);
}

fn facts(h: &mut Html, material: &Material<'_>) {
    let Some(run) = material.run else {
        return;
    };
    h.element("dl", &[("class", &"facts")], |h| {
        fact(h, "pipeline revision", |h| digest(h, &run.summary.revision));
        let trace = run.summary.trace().trace.to_string();
        let delivery = material.ctx.delivery.as_ref();
        let url = delivery.map_or("", |delivery| delivery.trace_url.as_str());
        fact(h, "trace", |h| super::delivery::trace(h, &trace, url));
        for (name, value) in run.summary.params.iter().take(MAX_PARAMS) {
            fact(h, &format!("parameter {name}"), |h| h.text(literal(value)));
        }
        for known in &material.models {
            let model = &known.document;
            let label = known.label();
            fact(h, &format!("{label}, computed on"), |h| {
                h.text(&model.backend)
            });
            if let Some(seed) = model.spec.get("seed") {
                fact(h, &format!("{label}, seed"), |h| h.text(literal(seed)));
            }
            if let Ok(weights) = model.weights_sha256.parse() {
                fact(h, &format!("{label}, weights"), |h| digest(h, &weights));
            }
        }
    });
}

fn fact(h: &mut Html, name: &str, value: impl FnOnce(&mut Html)) {
    h.element("div", &[], |h| {
        h.leaf("dt", &[], name);
        h.element("dd", &[], value);
    });
}

/// The first digits, the whole in the title.
pub fn digest(h: &mut Html, digest: &Digest) {
    h.leaf("code", &[("title", digest)], digest.short());
}

fn artifacts(h: &mut Html, material: &Material<'_>) {
    let rows = material.tasks().iter().flat_map(|task| {
        let outputs = task.outputs.iter();
        outputs.map(move |artifact| (task, artifact))
    });
    let total = rows.clone().count();
    if total == 0 {
        return;
    }
    let caption = "Artifacts by the task that produced them";
    let headings = [
        Text("task"),
        Text("made from"),
        Text("output"),
        Text("digest"),
        Number("size"),
    ];
    h.table(caption, &headings, |h| {
        for (task, artifact) in rows.take(MAX_ARTIFACTS) {
            h.row(|h| {
                h.row_head(&task.task);
                let needs: Vec<&str> = task.needs.iter().map(|need| need.as_str()).collect();
                h.cell(cut(&needs.join(", "), 120));
                h.cell(&artifact.name);
                h.element("td", &[], |h| digest(h, &artifact.manifest));
                h.number_cell(bytes(artifact.bytes));
            });
        }
    });
    if total > MAX_ARTIFACTS {
        let more = (total - MAX_ARTIFACTS) as u64;
        h.paragraph(
            "muted",
            format_args!("and {} more", plural(more, "artifact")),
        );
    }
}

/// Writes the page's end.
pub fn footer(h: &mut Html, material: &Material<'_>) {
    h.element("footer", &[], |h| {
        h.text(format_args!(
            "Written by the task {} of run {} with Emberline {}. It shows the run as it was when that task started.",
            material.ctx.attempt.task,
            material.ctx.attempt.run,
            env!("CARGO_PKG_VERSION")
        ));
    });
}
