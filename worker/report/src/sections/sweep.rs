//! Sweeps: the tasks of each stage with a matrix side by side, with the score that decided.

use emberline_common::{
    ids::StageName,
    run_view::{TaskState, TaskView},
};
use emberline_worker::documents::Candidate;

use super::{badge, task_look};
use crate::{
    chart::bars,
    format::{literal, number, plural, value},
    html::{
        Heading::{Number, Text},
        Html, cut,
    },
    material::Material,
};

/// The most stages with a matrix that are shown.
const MAX_STAGES: usize = 8;
/// The most tasks of each.
const MAX_TASKS: usize = 100;
/// The most results of each task.
const MAX_RESULTS: usize = 6;

/// Writes the section.
pub fn write(h: &mut Html, material: &Material<'_>) {
    let mut stages: Vec<&StageName> = Vec::new();
    for task in material
        .tasks()
        .iter()
        .filter(|task| !task.matrix.is_empty())
    {
        if stages.last() != Some(&&task.stage) && !stages.contains(&&task.stage) {
            stages.push(&task.stage);
        }
    }
    for stage in stages.iter().take(MAX_STAGES) {
        sweep(h, material, stage);
    }
    if stages.len() > MAX_STAGES {
        let more = (stages.len() - MAX_STAGES) as u64;
        h.paragraph("muted", format_args!("and {}", plural(more, "more stage")));
    }
}

fn candidate<'a>(material: &'a Material<'_>, task: &TaskView) -> Option<&'a Candidate> {
    let all = material
        .evaluations
        .iter()
        .flat_map(|known| &known.document.candidates);
    all.into_iter()
        .find(|candidate| candidate.producer == task.task.as_str())
}

/// The one that was taken first, then by score as far as there is one, in the order of the matrix else.
fn sweep(h: &mut Html, material: &Material<'_>, stage: &StageName) {
    let tasks = material.tasks().iter().filter(|task| task.stage == *stage);
    let mut rows: Vec<(&TaskView, Option<&Candidate>)> = tasks
        .map(|task| (task, candidate(material, task)))
        .collect();
    let scored = rows.iter().any(|(_, candidate)| candidate.is_some());
    // Whether a high score is a good one is seen from the one that was taken.
    let scores: Vec<f64> = rows
        .iter()
        .filter_map(|(_, c)| Some(c.as_ref()?.score))
        .collect();
    let taken = rows
        .iter()
        .find_map(|(_, c)| c.filter(|c| c.chosen))
        .map(|c| c.score);
    let highest_first = taken.is_none_or(|taken| scores.iter().all(|score| *score <= taken));
    rows.sort_by(|(_, a), (_, b)| {
        let key =
            |c: &Option<&Candidate>| c.map(|c| if highest_first { -c.score } else { c.score });
        let taken = |c: &Option<&Candidate>| c.is_some_and(|c| c.chosen);
        taken(b)
            .cmp(&taken(a))
            .then_with(|| match (key(a), key(b)) {
                (Some(a), Some(b)) => a.total_cmp(&b),
                (a, b) => a.is_none().cmp(&b.is_none()),
            })
    });
    let most = scores
        .iter()
        .copied()
        .filter(|s| s.is_finite())
        .fold(0.0, f64::max);

    let params: Vec<&str> = rows.first().map_or_else(Vec::new, |(task, _)| {
        task.matrix.keys().take(8).map(String::as_str).collect()
    });
    let results = results(&rows);
    let names = |all: &[&str]| -> Vec<String> { all.iter().map(|name| cut(name, 40)).collect() };
    let (param_names, result_names) = (names(&params), names(&results));
    let mut headings = vec![Text("task"), Text("state")];
    headings.extend(param_names.iter().map(|name| Text(name)));
    if scored {
        headings.extend([Number("score"), Text("")]);
    }
    headings.extend(result_names.iter().map(|name| Number(name)));

    h.leaf("h3", &[], stage);
    let caption = format!(
        "{} by the values of the matrix",
        plural(rows.len() as u64, "task")
    );
    h.table(&caption, &headings, |h| {
        for (task, candidate) in rows.iter().take(MAX_TASKS) {
            let chosen = candidate.is_some_and(|candidate| candidate.chosen);
            h.element(
                "tr",
                &[("class", if chosen { &"chosen" } else { &"plain" })],
                |h| {
                    h.element("th", &[("scope", &"row")], |h| {
                        h.text(&task.task);
                        if chosen {
                            h.text(" ");
                            badge(h, "ok", "★", "taken");
                        }
                    });
                    h.element("td", &[], |h| {
                        let (class, sign) = task_look(task.state);
                        badge(h, class, sign, task.state.as_str());
                    });
                    for name in &params {
                        h.cell(task.matrix.get(*name).map_or_else(String::new, literal));
                    }
                    if scored {
                        h.number_cell(candidate.map_or_else(String::new, |c| number(c.score)));
                        h.element("td", &[], |h| {
                            if let Some(c) = candidate {
                                let what = format!("{}: score {}", task.task, number(c.score));
                                bars::amount(h, c.score, most, None, false, &what);
                            }
                        });
                    }
                    for name in &results {
                        h.number_cell(task.results.get(*name).map_or_else(String::new, value));
                    }
                },
            );
        }
    });
    if rows.len() > MAX_TASKS {
        let more = (rows.len() - MAX_TASKS) as u64;
        h.paragraph("muted", format_args!("and {}", plural(more, "more task")));
    }
}

/// The results that tell most: losses and validation metrics before the rest.
fn results<'a>(rows: &[(&'a TaskView, Option<&Candidate>)]) -> Vec<&'a str> {
    let done = rows.iter().find(|(task, _)| {
        matches!(task.state, TaskState::Succeeded | TaskState::Cached) && !task.results.is_empty()
    });
    let Some((task, _)) = done else {
        return Vec::new();
    };
    let mut names: Vec<&str> = task.results.keys().map(String::as_str).collect();
    names.sort_by_key(|name| !name.starts_with("validation_"));
    names.truncate(MAX_RESULTS);
    names
}
