//! Whether a stage, and each of its tasks, may start: `run_if` and `when`.

use emberline_common::{run_view::TaskState, spec::RunIf};
use serde_json::Value;

use super::run::{Run, matrix_at};

/// What becomes of a stage whose upstream stages have ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Its tasks may start.
    Open,
    /// It waits for a failure somewhere in the run.
    Park,
    /// It is skipped; a benign skip fails nothing.
    Skip { benign: bool, why: String },
}

/// What `run_if` says.
pub(super) fn gate(run: &Run, stage: usize) -> Gate {
    let spec = run.stage_spec(stage);
    match spec.run_if {
        RunIf::Always => return Gate::Open,
        RunIf::Failure if run.record.failure.is_some() => return Gate::Open,
        RunIf::Failure => return Gate::Park,
        RunIf::Success => {}
    }
    let mut upstream = run.stages[stage].upstream.iter();
    if let Some(bad) = upstream.find(|up| run.stages[**up].bad > 0) {
        return Gate::Skip {
            benign: false,
            why: format!("`{}` did not succeed", run.stages[*bad].name),
        };
    }
    for (name, reference) in &spec.inputs {
        let from = run.spec.stages.get_index_of(&reference.stage);
        let gone = from.is_some_and(|up| {
            let up = &run.stages[up];
            let mut tasks = run.tasks[up.first..up.first + up.count].iter();
            tasks.all(|task| task.state == TaskState::Skipped)
        });
        if gone {
            return Gate::Skip {
                benign: true,
                why: format!(
                    "its input `{name}` comes from `{}`, which was skipped",
                    reference.stage
                ),
            };
        }
    }
    Gate::Open
}

/// What `when` says of one task: whether it may start, else why not.
///
/// # Errors
/// If the condition cannot be read, e.g. since the stage that it names gave no such result.
pub(super) fn when(run: &Run, stage: usize, index: u32) -> Result<Option<String>, String> {
    let Some(condition) = &run.stages[stage].when else {
        return Ok(None);
    };
    let spec = run.stage_spec(stage);
    let text = spec.when.as_deref().unwrap_or_default();
    for reference in condition.references() {
        let name = reference.first().map_or("", String::as_str);
        if let Some(up) = run.spec.stages.get_index_of(name)
            && !matches!(name, "params" | "matrix")
            && !run.tasks[run.stages[up].first].state.is_done()
        {
            return Ok(Some(format!("`when: {text}`: `{name}` has no result")));
        }
    }
    let matrix = matrix_at(spec, index);
    let lookup = |path: &[String]| -> Option<Value> {
        let (scope, rest) = path.split_first()?;
        let name = rest.join(".");
        match scope.as_str() {
            "params" => run.record.params.get(&name).cloned(),
            "matrix" => matrix.get(&name).cloned(),
            stage => {
                let up = run.spec.stages.get_index_of(stage)?;
                let task = run.tasks.get(run.stages[up].first)?;
                task.record.as_ref()?.results.get(&name).cloned()
            }
        }
    };
    match condition.eval(&lookup) {
        Ok(true) => Ok(None),
        Ok(false) => Ok(Some(format!("its condition is false: `{text}`"))),
        Err(what) => Err(format!("`when: {text}`: {what}")),
    }
}
