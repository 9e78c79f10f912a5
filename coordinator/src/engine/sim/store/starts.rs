//! What starts, and what is reused instead: whether it may, and what it is to be given.

use std::sync::Arc;

use emberline_common::{
    failure::Reason,
    ids::WorkerName,
    resources::Resources,
    run_view::TaskState,
    spec::{
        PipelineSpec, RunIf,
        condition::Condition,
        expand::{fill, matrix_values},
    },
};

use super::{Given, Store, Task, attempt, output_of, place, tasks_of};
use crate::engine::{records::RunRecord, run::written_state};

impl Store {
    /// The spec and the record of a task's run.
    fn run_of(&self, task: &Task) -> Result<(&RunRecord, Arc<PipelineSpec>), String> {
        let run = self.runs.get(&task.0);
        let run = run.ok_or_else(|| format!("I8: {} has tasks, but is not live", task.0))?;
        let spec = self.specs.get(&run.spec).cloned();
        let spec = spec.ok_or_else(|| format!("the spec of {} is not stored", task.0))?;
        Ok((run, spec))
    }

    pub(super) fn check_started(&mut self, task: &Task) -> Result<(), String> {
        let record = &self.tasks[task];
        let id = attempt(task, record.attempt);
        let (run, spec) = self.run_of(task)?;
        let (name, _) = place(&task.1);
        let stage = &spec.stages[name];
        if run.stop.is_some() || run.ended.is_some() {
            return Err(format!("{id} starts in a run that is to stop"));
        }
        if run.failure.is_some() && spec.fail_fast && stage.run_if == RunIf::Success {
            return Err(format!("{id} starts in a run that has failed (fail_fast)"));
        }
        if run.failure.is_none() && stage.run_if == RunIf::Failure {
            return Err(format!("{id} starts, but nothing has failed"));
        }
        let given = self.given(task, record.worker.clone())?;

        // Budgets: each further attempt says why the one before was not the last.
        if let Some(failure) = &record.failure {
            let reason = failure.reason;
            let retries = &stage.retries;
            let spent = self.spent.entry(task.clone()).or_default();
            *spent.entry(reason).or_default() += 1;
            let of = |reasons: &[Reason]| -> u32 {
                let counts = reasons.iter().filter_map(|reason| spent.get(reason));
                counts.sum()
            };
            let ok = match reason {
                Reason::Preempted => true,
                Reason::WorkerLost => of(&[Reason::WorkerLost]) <= retries.lost_workers,
                Reason::Storage | Reason::System => {
                    of(&[Reason::Storage, Reason::System]) <= retries.faults
                }
                Reason::UserError | Reason::Oom | Reason::Timeout => {
                    of(&[Reason::UserError, Reason::Oom, Reason::Timeout]) <= retries.errors
                }
                Reason::Data | Reason::QualityGate | Reason::Cancelled => false,
            };
            if !ok {
                return Err(format!(
                    "I13: {id} follows {reason}, but no retries are left"
                ));
            }
        }

        let output = output_of(&id);
        self.made.insert(output, given.made_from(stage));
        if let Some(worker) = &given.worker {
            let running = self.on.entry(worker.clone()).or_default();
            running.insert(task.clone(), stage.reserves());
            let used = running
                .values()
                .fold(Resources::default(), |sum, one| sum.with(one));
            let total = self.workers.get(worker).copied().unwrap_or_default();
            if !used.fits_in(&total) {
                return Err(format!("I13: {worker} is given {used}, and has {total}"));
            }
        }
        self.started.insert(id, given);
        Ok(())
    }

    pub(super) fn check_cached(&self, task: &Task) -> Result<(), String> {
        let (run, spec) = self.run_of(task)?;
        let stage = &spec.stages[place(&task.1).0];
        let text = format!("{}/{}", task.0, task.1);
        if run.no_cache || !stage.cache || stage.kind.as_str() != "convert" {
            return Err(format!("{text} is reused, and must not be"));
        }
        let from = self.given(task, None)?.made_from(stage);
        for output in &self.tasks[task].outputs {
            if self.made.get(&output.manifest) != Some(&from) {
                return Err(format!(
                    "{text} is reused, but was made from something else"
                ));
            }
            if self.dropped.contains(&output.manifest) && run.resumed_at == run.created_at {
                return Err(format!("{text} is reused, but is known to be bad"));
            }
        }
        Ok(())
    }

    /// What a task is to be given by what stands in the store; refused if that is not settled yet.
    fn given(&self, task: &Task, worker: Option<WorkerName>) -> Result<Given, String> {
        let (run, spec) = self.run_of(task)?;
        let (name, index) = place(&task.1);
        let stage = &spec.stages[name];
        let text = format!("{}/{}", task.0, task.1);
        let needed = stage.inputs.values().map(|input| &input.stage);
        for up in needed.chain(&stage.needs) {
            for above in tasks_of(&spec, up.as_str()) {
                let record = self.tasks.get(&(task.0.clone(), above.clone()));
                let state = record.and_then(|record| written_state(record.written));
                let ok = match state {
                    Some(state) if stage.run_if == RunIf::Success => {
                        state.is_done() || state == TaskState::Skipped
                    }
                    Some(state) => state.is_final(),
                    // Skips are not written.
                    None => can_be_skipped(&spec, up.as_str()) || run.failure.is_some(),
                };
                if !ok {
                    return Err(format!("I7: {text} starts, but {above} is {state:?}"));
                }
            }
        }
        let mut inputs = Vec::new();
        for (name, from) in &stage.inputs {
            for above in tasks_of(&spec, from.stage.as_str()) {
                let record = self.tasks.get(&(task.0.clone(), above.clone()));
                let outputs = record.iter().flat_map(|record| &record.outputs);
                for output in outputs.filter(|output| output.name == from.output) {
                    inputs.push((name.clone(), output.manifest, above.clone()));
                }
            }
        }
        if let Some(when) = &stage.when {
            let when: Condition = when.parse()?;
            let lookup = |path: &[String]| {
                let [stage, result] = path else { return None };
                let above = tasks_of(&spec, stage).first().cloned()?;
                let record = self.tasks.get(&(task.0.clone(), above))?;
                record.results.get(result).cloned()
            };
            if when.eval(&lookup) != Ok(true) {
                return Err(format!("{text} starts, but its condition is false"));
            }
        }
        let matrix = matrix_values(stage).get(index).cloned().unwrap_or_default();
        let with = fill(&stage.with, &matrix)?;
        Ok(Given {
            worker,
            with,
            inputs,
        })
    }
}

/// Whether a stage may end without a record by the pipeline's own will.
fn can_be_skipped(spec: &PipelineSpec, stage: &str) -> bool {
    let Some(stage) = spec.stages.get(stage) else {
        return false;
    };
    let needed = stage.inputs.values().map(|input| &input.stage);
    stage.when.is_some()
        || stage.run_if == RunIf::Failure
        || (needed.chain(&stage.needs)).any(|up| can_be_skipped(spec, up.as_str()))
}
