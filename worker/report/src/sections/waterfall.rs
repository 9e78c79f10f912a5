//! When each task waited and ran, one row each, on the run's own time.

use emberline_common::{
    run_view::{TaskState, TaskView},
    time::Timestamp,
};

use super::task_look;
use crate::{
    chart::{Figure, label, stroke, ticks::Scale},
    format::{duration, number, plural},
    html::{Attributes, Html, Px, cut},
    material::Material,
};

/// The most rows.
const MAX_ROWS: usize = 120;
const WIDTH: f64 = 1140.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 96.0;
const ROW: f64 = 24.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 40.0;

/// The time axis: from the run's beginning, in the unit that suits its length.
struct Axis {
    start: Timestamp,
    scale: Scale,
    /// Microseconds in a unit.
    unit: f64,
    name: &'static str,
}

impl Axis {
    fn of(start: Timestamp, end: Timestamp) -> Self {
        let micros = end.since(start).as_micros().max(1) as f64;
        let units = [
            (1e3, "ms"),
            (1e6, "s"),
            (6e7, "min"),
            (3.6e9, "h"),
            (8.64e10, "days"),
        ];
        let (unit, name) = units
            .into_iter()
            .rev()
            .find(|(unit, _)| micros >= 2.0 * unit)
            .unwrap_or((1e3, "ms"));
        Self {
            start,
            scale: Scale::exactly([0.0, micros / unit], 8),
            unit,
            name,
        }
    }

    fn x(&self, at: Timestamp) -> f64 {
        let value = at.since(self.start).as_micros() as f64 / self.unit;
        LEFT + self.scale.share(value) * (WIDTH - LEFT - RIGHT)
    }
}

/// Draws it. With more tasks than rows, the ones that took longest are shown.
pub fn write(h: &mut Html, material: &Material<'_>) {
    let (Some(run), Some(until)) = (material.run, material.until()) else {
        return;
    };
    let all: Vec<&TaskView> = material.tasks().iter().filter(|task| shown(task)).collect();
    let mut tasks = all.clone();
    if tasks.len() > MAX_ROWS {
        tasks.sort_by_key(|task| std::cmp::Reverse(length(task)));
        tasks.truncate(MAX_ROWS);
        h.paragraph(
            "muted",
            format_args!(
                "Of {}, the {MAX_ROWS} that took longest:",
                plural(all.len() as u64, "task")
            ),
        );
    }
    // By time, so that the rows run down like the run did.
    tasks.sort_by_key(|task| task.ready_at.or(task.started_at).or(task.finished_at));
    if tasks.is_empty() {
        return;
    }
    let axis = Axis::of(run.summary.created_at, until);
    let height = TOP + ROW * tasks.len() as f64 + BOTTOM;
    let figure = Figure {
        title: "When each task ran",
        description: "One row for each task: waiting for a worker, then running.",
        width: WIDTH,
        height,
        legend: &[
            (
                "waiting",
                "waiting for a worker (and earlier attempts)".to_owned(),
            ),
            ("running", "running".to_owned()),
            ("cached", "reused".to_owned()),
            ("bad", "failed".to_owned()),
        ],
    };
    figure.write(h, "chart waterfall", |h| {
        let floor = height - BOTTOM;
        for tick in &axis.scale.ticks {
            let x = LEFT + axis.scale.share(*tick) * (WIDTH - LEFT - RIGHT);
            stroke(h, "grid", (x, TOP), (x, floor));
            label(h, x, floor + 17.0, "middle", &axis.scale.label(*tick));
        }
        label(
            h,
            LEFT,
            height - 6.0,
            "start",
            &format!("{} since the run was submitted", axis.name),
        );
        for (i, task) in tasks.iter().enumerate() {
            row(h, task, &axis, until, TOP + ROW * i as f64);
        }
    });
}

/// Skipped tasks never were anywhere in time.
fn shown(task: &TaskView) -> bool {
    task.state != TaskState::Skipped && (task.ready_at.is_some() || task.started_at.is_some())
}

fn length(task: &TaskView) -> std::time::Duration {
    let from = task.ready_at.or(task.started_at);
    from.zip(task.finished_at)
        .map_or_else(Default::default, |(from, to)| to.since(from))
}

fn row(h: &mut Html, task: &TaskView, axis: &Axis, until: Timestamp, y: f64) {
    h.element("g", &[("class", &"row")], |h| {
        let started = task.started_at.filter(|_| task.attempt > 0);
        let end = task.finished_at.unwrap_or(until);
        let mut tooltip = format!("{}: {}", task.task, task.state);
        let waited = task.ready_at.zip(started).map(|(from, to)| to.since(from));
        if let Some(waited) = waited {
            tooltip.push_str(&format!(", waited {}", duration(waited)));
        }
        if let Some(started) = started {
            tooltip.push_str(&format!(", ran {}", duration(end.since(started))));
        }
        if task.attempt > 1 {
            tooltip.push_str(&format!(", attempt {}", number(task.attempt.into())));
        }
        h.leaf("title", &[], tooltip);
        // The whole row shows the tooltip.
        bar(h, "back", 0.0, WIDTH, y, ROW);
        label(
            h,
            LEFT - 10.0,
            y + 16.0,
            "end",
            &cut(task.task.as_str(), 26),
        );
        let mut right = LEFT;
        if task.state == TaskState::Cached {
            let x = axis.x(task.finished_at.or(task.ready_at).unwrap_or(until));
            bar(h, "cached", x, x + 7.0, y + 6.0, ROW - 12.0);
            right = x + 7.0;
        } else {
            if let Some(ready) = task.ready_at {
                let (from, to) = (axis.x(ready), axis.x(started.unwrap_or(end)));
                if to - from >= 0.5 {
                    bar(h, "waiting", from, to, y + 9.0, ROW - 18.0);
                }
                right = to;
            }
            if let Some(started) = started {
                let (class, _) = task_look(task.state);
                let class = if class == "ok" { "running" } else { class };
                let (from, to) = (axis.x(started), axis.x(end));
                bar(h, class, from, to.max(from + 2.0), y + 5.0, ROW - 10.0);
                right = to.max(from + 2.0);
            }
        }
        label(h, right + 7.0, y + 16.0, "start", &text(task));
    });
}

fn text(task: &TaskView) -> String {
    if task.state == TaskState::Cached {
        return "cached".to_owned();
    }
    let mut text = match task
        .started_at
        .zip(task.finished_at)
        .filter(|_| task.attempt > 0)
    {
        Some((from, to)) => duration(to.since(from)),
        None => task.state.to_string(),
    };
    if task.attempt > 1 {
        text.push_str(&format!(" ×{}", task.attempt));
    }
    text
}

fn bar(h: &mut Html, class: &'static str, from: f64, to: f64, y: f64, height: f64) {
    let attributes: Attributes<'_> = &[
        ("class", &class),
        ("x", &Px(from)),
        ("y", &Px(y)),
        ("width", &Px((to - from).max(0.0))),
        ("height", &Px(height)),
        ("rx", &"3"),
    ];
    h.empty("rect", attributes);
}
