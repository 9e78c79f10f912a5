//! What went wrong: the class, the message and the task of each failure, what was not run because
//! of it, and what this page could not read.

use emberline_common::{
    failure::Reason,
    run_view::{TaskState, TaskView},
};

use crate::{
    format::plural,
    html::{Html, clean},
    material::Material,
};

/// The most failures that are shown in full.
const MAX_FAILURES: usize = 20;
/// The most names in a list of tasks.
const MAX_NAMES: usize = 30;

/// Writes a box for the failures and one for the notices, as far as there are any.
pub fn write(h: &mut Html, material: &Material<'_>) {
    failures(h, material);
    if !material.notices.is_empty() {
        h.element("section", &[("class", &"card notice")], |h| {
            h.leaf("h2", &[], "Not on this page");
            h.element("ul", &[], |h| {
                for notice in material.notices.iter().take(MAX_NAMES) {
                    h.leaf("li", &[], notice);
                }
            });
        });
    }
}

fn failures(h: &mut Html, material: &Material<'_>) {
    let failed: Vec<&TaskView> = material
        .tasks()
        .iter()
        .filter(|task| task.state == TaskState::Failed && !material.is_own(task))
        .collect();
    let of_run = material.run.and_then(|run| run.summary.failure.as_ref());
    if failed.is_empty() && of_run.is_none() {
        return;
    }
    h.element(
        "section",
        &[("class", &"card failure"), ("id", &"failure")],
        |h| {
            h.leaf("h2", &[], "What went wrong");
            // The run's failure is mostly that of its first failed task; told once is enough.
            let told = |message: &str| {
                failed
                    .iter()
                    .filter_map(|task| task.failure.as_ref())
                    .any(|failure| message.ends_with(failure.message.as_str()))
            };
            if let Some(failure) = of_run.filter(|failure| !told(&failure.message)) {
                one(h, "the run", failure.reason, &failure.message, None);
            }
            for task in failed.iter().take(MAX_FAILURES) {
                let (reason, message) = match &task.failure {
                    Some(failure) => (failure.reason, failure.message.as_str()),
                    None => (Reason::System, "no reason is known"),
                };
                let where_from = format!("task {}", task.task);
                one(h, &where_from, reason, message, Some(task));
            }
            if failed.len() > MAX_FAILURES {
                let more = (failed.len() - MAX_FAILURES) as u64;
                h.paragraph(
                    "muted",
                    format_args!("and {} more", plural(more, "failed task")),
                );
            }
            not_run(h, material);
        },
    );
}

fn one(h: &mut Html, place: &str, reason: Reason, message: &str, task: Option<&TaskView>) {
    h.div("fault", |h| {
        h.element("p", &[("class", &"where")], |h| {
            h.span("badge bad", format_args!("✕ {reason}"));
            h.leaf("strong", &[], place);
            if let Some(task) = task {
                h.span("muted", attempts(task));
            }
        });
        h.leaf("pre", &[], clean(message).trim_end());
        h.paragraph("hint", hint(reason));
    });
}

fn attempts(task: &TaskView) -> String {
    let mut text = plural(task.attempt.into(), "attempt");
    if let Some(worker) = &task.worker {
        text.push_str(&format!(", last on {worker}"));
    }
    text
}

/// What a reason means for what to do next.
const fn hint(reason: Reason) -> &'static str {
    match reason {
        Reason::UserError => {
            "The stage itself failed: its settings or its command. Its log tells more."
        }
        Reason::Data => "The data is not what the stage was promised. It was not tried again.",
        Reason::QualityGate => "The model is not good enough to go on. It was not tried again.",
        Reason::Oom => "The attempt needed more memory than it was given.",
        Reason::Timeout => "The attempt took longer than it was given.",
        Reason::Storage => {
            "The object store or a disk refused, or an artifact is missing or damaged."
        }
        Reason::WorkerLost => "The worker died or could not be reached.",
        Reason::Preempted => "The worker gave the task back.",
        Reason::Cancelled => "Stopped on request.",
        Reason::System => "This is a fault of Emberline's own.",
    }
}

fn not_run(h: &mut Html, material: &Material<'_>) {
    let names: Vec<&str> = material
        .tasks()
        .iter()
        .filter(|task| matches!(task.state, TaskState::Skipped | TaskState::Cancelled))
        .map(|task| task.task.as_str())
        .collect();
    if names.is_empty() {
        return;
    }
    let shown = names.len().min(MAX_NAMES);
    let mut text = format!("Not run: {}", names[..shown].join(", "));
    if names.len() > shown {
        text.push_str(&format!(" and {} more", names.len() - shown));
    }
    h.paragraph("muted", text);
}
