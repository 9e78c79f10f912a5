//! The sections of the page. Each writes nothing at all when it has nothing to tell.

mod data;
mod delivery;
mod evaluation;
pub mod failure;
mod graph;
pub mod headline;
pub mod lineage;
mod sweep;
mod tasks;
mod training;
mod validation;
mod waterfall;

use emberline_common::run_view::{RunState, TaskState};

use crate::{html::Html, material::Material};

/// A section.
pub struct Section {
    /// Its place on the page.
    pub id: &'static str,
    /// Its heading.
    pub title: &'static str,
    /// Writes what is below the heading.
    pub write: fn(&mut Html, &Material<'_>),
}

/// In the order of the page.
pub static ALL: [Section; 8] = [
    Section {
        id: "tasks",
        title: "Tasks",
        write: tasks::write,
    },
    Section {
        id: "data",
        title: "Data",
        write: data::write,
    },
    Section {
        id: "validation",
        title: "Validation",
        write: validation::write,
    },
    Section {
        id: "training",
        title: "Training",
        write: training::write,
    },
    Section {
        id: "sweep",
        title: "Sweep",
        write: sweep::write,
    },
    Section {
        id: "evaluation",
        title: "Evaluation",
        write: evaluation::write,
    },
    Section {
        id: "delivery",
        title: "Delivery",
        write: delivery::write,
    },
    Section {
        id: "lineage",
        title: "Lineage",
        write: lineage::write,
    },
];

/// The class that colours a task's state, and the sign that says it without colour.
pub fn task_look(state: TaskState) -> (&'static str, &'static str) {
    match state {
        TaskState::Succeeded => ("ok", "✓"),
        TaskState::Cached => ("cached", "↺"),
        TaskState::Failed => ("bad", "✕"),
        TaskState::Skipped => ("off", "–"),
        TaskState::Cancelled => ("off", "■"),
        TaskState::Running => ("live", "▶"),
        TaskState::Waiting | TaskState::Queued | TaskState::Backoff => ("wait", "…"),
    }
}

/// The same for a run's state.
pub fn run_look(state: RunState) -> (&'static str, &'static str) {
    match state {
        RunState::Succeeded => ("ok", "✓"),
        RunState::Failed => ("bad", "✕"),
        RunState::Cancelled | RunState::Cancelling => ("off", "■"),
        RunState::Running => ("live", "▶"),
        RunState::Queued => ("wait", "…"),
    }
}

/// A state as a small coloured label.
pub fn badge(h: &mut Html, class: &'static str, sign: &str, text: &str) {
    let class = format!("badge {class}");
    h.element("span", &[("class", &class)], |h| {
        h.leaf("span", &[("aria-hidden", &"true")], sign);
        h.text(format_args!(" {text}"));
    });
}

/// `held` or `failed` as a label.
pub fn verdict(h: &mut Html, passed: bool) {
    if passed {
        badge(h, "ok", "✓", "passed");
    } else {
        badge(h, "bad", "✕", "failed");
    }
}
