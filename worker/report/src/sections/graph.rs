//! The DAG of the run's stages. The tasks of a matrix are one box.

use std::{collections::BTreeMap, time::Duration};

use emberline_common::{
    ids::StageName,
    run_view::{TaskState, TaskView},
};

use super::task_look;
use crate::{
    chart::svg,
    dag::{self, Layout, NODE_HEIGHT, NODE_WIDTH},
    format::{duration, plural},
    html::{Attributes, Html, Px, cut},
    material::Material,
};

/// The most stages that are drawn.
const MAX_STAGES: usize = 150;
/// The most edges.
const MAX_EDGES: usize = 1500;

/// The tasks of one stage.
struct Node<'a> {
    tasks: Vec<&'a TaskView>,
}

impl Node<'_> {
    /// The state that matters most: one failed task is more than ten that succeeded.
    fn state(&self) -> TaskState {
        const BY_WEIGHT: [TaskState; 9] = [
            TaskState::Failed,
            TaskState::Running,
            TaskState::Backoff,
            TaskState::Queued,
            TaskState::Waiting,
            TaskState::Cancelled,
            TaskState::Succeeded,
            TaskState::Cached,
            TaskState::Skipped,
        ];
        let has = |state: &TaskState| self.tasks.iter().any(|task| task.state == *state);
        BY_WEIGHT
            .into_iter()
            .find(has)
            .unwrap_or(TaskState::Waiting)
    }

    /// From the first start to the last end.
    fn took(&self) -> Option<Duration> {
        let ran = || self.tasks.iter().filter(|task| task.attempt > 0);
        let from = ran().filter_map(|task| task.started_at).min()?;
        let to = ran().filter_map(|task| task.finished_at).max()?;
        Some(to.since(from))
    }

    /// What stands in the box, which is narrow: what the sign says already is left out.
    fn short(&self) -> String {
        let state = self.state();
        let (_, sign) = task_look(state);
        let took = self.took().filter(|_| state != TaskState::Cached);
        let mut parts = Vec::new();
        if let [_, _, ..] = self.tasks[..] {
            let alike = self.tasks.iter().filter(|task| task.state == state).count();
            parts.push(format!("{alike}/{}", self.tasks.len()));
        } else if took.is_none() || state != TaskState::Succeeded {
            parts.push(state.to_string());
        }
        parts.extend(took.map(duration));
        format!("{sign} {}", parts.join(" · "))
    }

    fn line(&self) -> String {
        let state = self.state();
        let (_, sign) = task_look(state);
        let mut text = if let [_] = self.tasks[..] {
            format!("{sign} {state}")
        } else {
            let alike = self.tasks.iter().filter(|task| task.state == state).count();
            format!("{sign} {alike}/{} {state}", self.tasks.len())
        };
        if let Some(took) = self.took().filter(|_| state != TaskState::Cached) {
            text.push_str(&format!(" · {}", duration(took)));
        }
        text
    }
}

/// Draws it, if it can be read at all.
pub fn write(h: &mut Html, material: &Material<'_>) {
    let mut names: Vec<&StageName> = Vec::new();
    let mut numbers: BTreeMap<&StageName, usize> = BTreeMap::new();
    let mut nodes: Vec<Node<'_>> = Vec::new();
    for task in material.tasks() {
        let number = *numbers.entry(&task.stage).or_insert_with(|| {
            names.push(&task.stage);
            nodes.push(Node { tasks: Vec::new() });
            nodes.len() - 1
        });
        nodes[number].tasks.push(task);
    }
    let before: Vec<Vec<usize>> = nodes
        .iter()
        .map(|node| {
            let needs = node.tasks.first().map_or(&[][..], |task| &task.needs);
            needs
                .iter()
                .filter_map(|need| numbers.get(need).copied())
                .collect()
        })
        .collect();
    let edges: usize = before.iter().map(Vec::len).sum();
    if nodes.len() > MAX_STAGES || edges > MAX_EDGES {
        h.paragraph(
            "muted",
            format_args!(
                "{} are too many for a readable drawing.",
                plural(nodes.len() as u64, "stage")
            ),
        );
        return;
    }
    let layout = dag::layout(&before);
    let description: Vec<String> = names
        .iter()
        .zip(&nodes)
        .map(|(name, node)| format!("{name}: {}", node.line()))
        .collect();
    // It shrinks a little to fit the page; what is wider still is scrolled.
    let width = format!("--width:{}px", Px(layout.width));
    h.element(
        "div",
        &[
            ("class", &"scroll graph"),
            ("style", &width),
            ("tabindex", &"0"),
        ],
        |h| {
            svg(
                h,
                "The stages of the run",
                &description.join("; "),
                layout.width,
                layout.height,
                |h| {
                    lines(h, &layout, &names);
                    for ((name, node), place) in names.iter().zip(&nodes).zip(&layout.nodes) {
                        draw(h, name, node, *place);
                    }
                },
            );
        },
    );
}

/// The edges that are implied first, so that they lie below the others.
fn lines(h: &mut Html, layout: &Layout, names: &[&StageName]) {
    let (below, above): (Vec<_>, Vec<_>) = layout.edges.iter().partition(|edge| edge.implied);
    for edge in below.into_iter().chain(above) {
        let class = if edge.implied { "edge faint" } else { "edge" };
        h.element(
            "path",
            &[("class", &class), ("d", &curve(&edge.points))],
            |h| {
                h.leaf(
                    "title",
                    &[],
                    format_args!("{} → {}", names[edge.from], names[edge.to]),
                );
            },
        );
    }
}

/// Through all points, level at each of them.
fn curve(points: &[(f64, f64)]) -> String {
    let mut path = String::new();
    let mut last: Option<(f64, f64)> = None;
    for (x, y) in points {
        match last {
            None => path.push_str(&format!("M{} {}", Px(*x), Px(*y))),
            Some((_, from)) if from == *y => path.push_str(&format!("H{}", Px(*x))),
            Some((from_x, from_y)) => {
                let middle = Px(f64::midpoint(from_x, *x));
                path.push_str(&format!(
                    "C{middle} {} {middle} {} {} {}",
                    Px(from_y),
                    Px(*y),
                    Px(*x),
                    Px(*y)
                ));
            }
        }
        last = Some((*x, *y));
    }
    path
}

fn draw(h: &mut Html, name: &StageName, node: &Node<'_>, (x, y): (f64, f64)) {
    let (class, _) = task_look(node.state());
    let class = format!("node {class}");
    h.element("g", &[("class", &class)], |h| {
        let kind = node.tasks.first().map_or("", |task| task.kind.as_str());
        let note = match node.tasks[..] {
            [only] if !only.note.is_empty() => format!("\n{}", cut(&only.note, 200)),
            _ => String::new(),
        };
        h.leaf(
            "title",
            &[],
            format_args!("{name} ({kind}): {}{note}", node.line()),
        );
        let attributes: Attributes<'_> = &[
            ("x", &Px(x)),
            ("y", &Px(y)),
            ("width", &Px(NODE_WIDTH)),
            ("height", &Px(NODE_HEIGHT)),
            ("rx", &"9"),
        ];
        h.empty("rect", attributes);
        let attributes: Attributes<'_> = &[
            ("class", &"stripe"),
            ("x", &Px(x)),
            ("y", &Px(y + 10.0)),
            ("width", &"4"),
            ("height", &Px(NODE_HEIGHT - 20.0)),
            ("rx", &"2"),
        ];
        h.empty("rect", attributes);
        let texts = [
            ("stage", 20.0, cut(name.as_str(), 17)),
            ("kind", 34.0, cut(kind, 22)),
            ("state", 48.0, node.short()),
        ];
        for (class, down, text) in texts {
            h.leaf(
                "text",
                &[
                    ("class", &class),
                    ("x", &Px(x + 13.0)),
                    ("y", &Px(y + down)),
                ],
                text,
            );
        }
    });
}
