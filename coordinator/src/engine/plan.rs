//! What a submit would do now, without doing it.

use emberline_common::ids::StageName;

use super::{
    Engine,
    api::{PlannedAction, PlannedTask, Submission},
    cache::never,
    records::{TaskRecord, Written},
    run::Run,
};

impl Engine {
    /// What a submit would do now, task by task, in an order in which they can start. Empty if the
    /// submission would be refused.
    #[must_use]
    pub fn plan(&self, submission: &Submission) -> Vec<PlannedTask> {
        let record = self.new_record(submission.clone(), self.now);
        let run = record.and_then(|record| Run::new(record, submission.spec.clone()));
        let Ok(mut run) = run else {
            return Vec::new();
        };
        let mut planned = Vec::with_capacity(run.tasks.len());
        for stage in run.order() {
            let (first, count) = (run.stages[stage].first, run.stages[stage].count);
            for number in first..first + count {
                let task = u32::try_from(number).unwrap_or(u32::MAX);
                let (action, why) = self.plan_task(&mut run, stage, number);
                planned.push(PlannedTask {
                    task: run.name_of(task),
                    kind: run.stage_spec(stage).kind.clone(),
                    action,
                    why,
                    needs: needs(&run, stage),
                });
            }
        }
        planned
    }

    fn plan_task(&self, run: &mut Run, stage: usize, number: usize) -> (PlannedAction, String) {
        let index = run.tasks[number].index;
        let spec = run.stage_spec(stage);
        if let Some(when) = &run.stages[stage].when {
            let known = when.references();
            let fixed = |path: &Vec<String>| {
                matches!(path.first().map(String::as_str), Some("params" | "matrix"))
            };
            if known.iter().all(fixed) {
                match super::conditions::when(run, stage, index) {
                    Ok(None) => {}
                    Ok(Some(why)) => return (PlannedAction::Depends, format!("skipped: {why}")),
                    Err(why) => return (PlannedAction::Run, why),
                }
            }
        }
        for (name, reference) in &spec.inputs {
            let up = run.spec.stages.get_index_of(&reference.stage);
            let known = up.is_some_and(|up| {
                let up = &run.stages[up];
                let mut tasks = run.tasks[up.first..up.first + up.count].iter();
                tasks.all(|task| task.record.is_some())
            });
            if !known {
                let why = format!("input `{name}` depends on what `{}` gives", reference.stage);
                return (PlannedAction::Depends, why);
            }
        }
        let prepared = match self.prepare(run, stage, index) {
            Ok(prepared) => prepared,
            Err(why) => return (PlannedAction::Run, format!("it would fail: {why}")),
        };
        if let Some(why) = never(spec, &prepared.with) {
            return (PlannedAction::Run, why.to_owned());
        }
        if run.record.no_cache {
            return (PlannedAction::Run, "--no-cache".to_owned());
        }
        let Some(version) = self.kind_version(spec.kind.as_str()) else {
            return (
                PlannedAction::Run,
                "no worker runs this kind yet".to_owned(),
            );
        };
        let fingerprint = prepared.fingerprint(run, stage, version);
        let Some(entry) = self.cache.peek(&fingerprint.key()) else {
            let task = run.name_of(u32::try_from(number).unwrap_or(u32::MAX));
            let why = self
                .cache
                .explain(&run.record.pipeline, &task, &fingerprint);
            return (PlannedAction::Run, why);
        };
        let why = format!("same spec and inputs as in run {}", entry.run);
        let record = TaskRecord {
            written: Written::Cached,
            outputs: entry.outputs.clone(),
            results: entry.results.clone(),
            ..TaskRecord::default()
        };
        let task = &mut run.tasks[number];
        task.state = emberline_common::run_view::TaskState::Cached;
        task.record = Some(Box::new(record));
        (PlannedAction::Reuse, why)
    }
}

fn needs(run: &Run, stage: usize) -> Vec<StageName> {
    let upstream = run.stages[stage].upstream.iter();
    upstream.map(|up| run.stages[*up].name.clone()).collect()
}
