//! The run's tasks: how they hang together, when each ran, and a table of them all.

use emberline_common::run_view::{TaskState, TaskView};

use super::{badge, graph, task_look, waterfall};
use crate::{
    format::{count, duration, plural},
    html::{
        Heading::{Number, Text},
        Html, cut,
    },
    material::Material,
};

/// The most rows of the table.
const MAX_ROWS: usize = 300;

/// Writes the section.
pub fn write(h: &mut Html, material: &Material<'_>) {
    if material.tasks().is_empty() {
        return;
    }
    graph::write(h, material);
    waterfall::write(h, material);
    table(h, material);
}

/// Failed tasks first if not all fit.
fn table(h: &mut Html, material: &Material<'_>) {
    let mut tasks: Vec<&TaskView> = material.tasks().iter().collect();
    if tasks.len() > MAX_ROWS {
        tasks.sort_by_key(|task| task.state != TaskState::Failed);
    }
    let left_out = tasks.len().saturating_sub(MAX_ROWS);
    let headings = [
        Text("task"),
        Text("kind"),
        Text("state"),
        Number("waited"),
        Number("ran"),
        Number("fetch"),
        Number("stage"),
        Number("store"),
        Number("attempts"),
        Text("worker"),
        Text("note"),
    ];
    h.table("Tasks and where their time went", &headings, |h| {
        for task in tasks.iter().take(MAX_ROWS) {
            row(h, task, material);
        }
    });
    if left_out > 0 {
        h.paragraph(
            "muted",
            format_args!("and {} more", plural(left_out as u64, "task")),
        );
    }
}

fn row(h: &mut Html, task: &TaskView, material: &Material<'_>) {
    h.row(|h| {
        h.row_head(&task.task);
        h.cell(&task.kind);
        h.element("td", &[], |h| {
            let (class, sign) = task_look(task.state);
            badge(h, class, sign, task.state.as_str());
        });
        let waited = task
            .ready_at
            .zip(task.started_at)
            .filter(|_| task.attempt > 0);
        h.number_cell(waited.map_or_else(String::new, |(from, to)| duration(to.since(from))));
        let ran = task
            .started_at
            .zip(task.finished_at)
            .filter(|_| task.attempt > 0);
        h.number_cell(ran.map_or_else(String::new, |(from, to)| duration(to.since(from))));
        let timing = task.timing;
        for micros in [
            timing.fetch_micros,
            timing.stage_micros,
            timing.store_micros,
        ] {
            let shown = task.state == TaskState::Succeeded;
            let time = duration(std::time::Duration::from_micros(micros));
            h.number_cell(if shown { time } else { String::new() });
        }
        h.number_cell(if task.attempt > 0 {
            count(task.attempt.into())
        } else {
            String::new()
        });
        h.cell(task.worker.as_ref().map_or("", |worker| worker.as_str()));
        h.cell(if material.is_own(task) {
            "writes this page".to_owned()
        } else {
            cut(&task.note, 120)
        });
    });
}
