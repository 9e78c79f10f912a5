//! What workers, clients and watchers are told: it must stand in the store.

use emberline_common::{
    ids::{AttemptId, WorkerName},
    run_view::{TaskState, TaskView},
};

use super::Store;
use crate::engine::{
    api::{ArchivedRun, Assignment, AttemptFailure, AttemptSuccess},
    records::Written,
    run::written_state,
};

impl Store {
    /// Takes down that an attempt has ended on its worker.
    pub fn attempt_ended(
        &mut self,
        id: &AttemptId,
        outcome: &Result<AttemptSuccess, AttemptFailure>,
    ) {
        self.ended.insert(id.clone(), outcome.is_ok());
        if let Err(AttemptFailure {
            bad_manifest: Some(bad),
            ..
        }) = outcome
        {
            self.bad.insert(id.clone(), *bad);
        }
    }

    /// An assignment goes out.
    pub fn check_assignment(&self, assignment: &Assignment) -> Result<(), String> {
        let id = &assignment.id;
        let given = self.started.get(id);
        let given = given.ok_or_else(|| format!("{id} goes out before its commit"))?;
        let inputs = assignment.inputs.iter();
        let inputs: Vec<_> = inputs
            .map(|input| {
                (
                    input.name.clone(),
                    input.artifact.manifest,
                    input.producer.clone(),
                )
            })
            .collect();
        if (&inputs, &assignment.spec) != (&given.inputs, &given.with) {
            return Err(format!("I7: {id} is given what is not committed"));
        }
        Ok(())
    }

    /// A worker is told what became of its report.
    pub fn check_ack(&self, id: &AttemptId, committed: bool) -> Result<(), String> {
        if committed && !self.reported.contains(id) {
            return Err(format!(
                "I2: the report of {id} is acknowledged before its commit"
            ));
        }
        Ok(())
    }

    /// A worker is told to abandon an attempt.
    pub fn check_abandon(&self, id: &AttemptId, worker: &WorkerName) -> Result<(), String> {
        let record = self.tasks.get(&(id.run.clone(), id.task.clone()));
        let current = record.is_some_and(|record| {
            record.written == Written::Running
                && record.attempt == id.attempt
                && record.worker.as_ref() == Some(worker)
        });
        if current {
            return Err(format!("{worker} is to abandon {id}, which is current"));
        }
        Ok(())
    }

    /// A watcher is told of a task.
    pub fn check_told(&self, told: &TaskView) -> Result<(), String> {
        let Some(record) = self.tasks.get(&(told.run.clone(), told.task.clone())) else {
            let needs_record = told.state.is_done() || told.state == TaskState::Running;
            let live = self.runs.contains_key(&told.run);
            return if live && needs_record {
                Err(format!(
                    "I2: {}/{} is told to be {}",
                    told.run, told.task, told.state
                ))
            } else {
                Ok(())
            };
        };
        let done = written_state(record.written).filter(|state| state.is_done());
        let ok =
            told.attempt <= record.attempt && (!told.state.is_done() || done == Some(told.state));
        if !ok {
            let (task, state, is) = (&told.task, told.state, record.written);
            return Err(format!(
                "I2: {}/{task} is told to be {state}, and is {is:?}",
                told.run
            ));
        }
        Ok(())
    }

    /// A run is archived: the archive says what the records say.
    pub fn check_archive(&self, archived: &ArchivedRun) -> Result<(), String> {
        let summary = &archived.view.summary;
        let Some(run) = self.runs.get(&summary.run) else {
            return Ok(());
        };
        let ended = run
            .ended
            .as_ref()
            .map(|ended| (ended.state, Some(ended.at)));
        if ended != Some((summary.state, summary.finished_at)) {
            return Err(format!("{} is archived before its end", summary.run));
        }
        for task in &archived.view.tasks {
            let record = self.tasks.get(&(summary.run.clone(), task.task.clone()));
            let written = record.and_then(|record| written_state(record.written));
            let ok = match written {
                Some(state) => state == task.state,
                None => matches!(task.state, TaskState::Skipped | TaskState::Cancelled),
            };
            if !ok {
                let (run, name, state) = (&summary.run, &task.task, task.state);
                return Err(format!(
                    "{run}/{name} is archived as {state}, and is {written:?}"
                ));
            }
        }
        Ok(())
    }
}
