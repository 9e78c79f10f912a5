//! From the queue to workers: assignments.

use std::collections::BTreeMap;

use emberline_common::{
    ids::{ArtifactName, AttemptId, TaskName, WorkerName},
    spec::{
        expand::fill,
        kinds::{BuiltinKind, EvaluateSpec},
    },
};
use serde_json::Value;

use super::{
    Engine,
    api::{AssignedInput, Assignment, Effect},
    cache::{self, Fingerprint},
    deadlines::Due,
    records::Written,
    run::{Run, TaskRef, matrix_at},
    workers::artifacts,
};

/// What a task would be given now.
#[derive(Debug)]
pub(super) struct Prepared {
    pub with: Value,
    pub inputs: Vec<AssignedInput>,
    pub files: Vec<super::api::StageFile>,
}

impl Prepared {
    pub fn fingerprint(&self, run: &Run, stage: usize, version: u32) -> Fingerprint {
        Fingerprint::of(
            run.stage_spec(stage),
            version,
            &self.with,
            &self.inputs,
            &self.files,
        )
    }
}

impl Engine {
    /// Hands out what is queued, most urgent first, as far as workers have room.
    pub(super) fn dispatch(&mut self) {
        let mut left = self.config.assignments_at_once;
        let mut again = true;
        while std::mem::take(&mut again) {
            if self.queue.len() == 0 || !self.fleet.any_available() {
                return;
            }
            let mut heads = self.queue.heads();
            while let Some((urgency, shape)) = heads.pop_first() {
                match self.queue.head(&shape) {
                    None => continue,
                    Some(head) if head != urgency => {
                        heads.insert((head, shape));
                        continue;
                    }
                    Some(_) => {}
                }
                // What does not fit now fits no later in this decision: room only shrinks.
                if !self.fleet.fits_any(&shape) {
                    continue;
                }
                if left == 0 {
                    self.deadlines.add(self.now, Due::Dispatch);
                    return;
                }
                left -= 1;
                let (_, run, task) = urgency.2;
                let at = TaskRef { run, task };
                if let Err(why) = self.assign(at) {
                    self.fail_unstarted(at, why);
                    self.settle(at.run);
                    again = true;
                }
                if let Some(head) = self.queue.head(&shape) {
                    heads.insert((head, shape));
                }
                if !self.fleet.any_available() {
                    return;
                }
            }
        }
    }

    /// The version of a kind, as far as it is known.
    pub(super) fn kind_version(&self, kind: &str) -> Option<u32> {
        BuiltinKind::from_name(kind)
            .map(BuiltinKind::version)
            .or_else(|| {
                let workers = self.fleet.workers.values();
                workers
                    .filter_map(|worker| worker.kinds.get(kind).copied())
                    .max()
            })
    }

    /// What a task would be given now.
    ///
    /// # Errors
    /// What is missing, for the person who wrote the pipeline.
    pub(super) fn prepare(&self, run: &Run, stage: usize, index: u32) -> Result<Prepared, String> {
        let spec = run.stage_spec(stage);
        let with = fill(&spec.with, &matrix_at(spec, index))?;
        let mut inputs = Vec::new();
        for (name, reference) in &spec.inputs {
            let Some(up) = run.spec.stages.get_index_of(&reference.stage) else {
                continue;
            };
            let up = &run.stages[up];
            let before = inputs.len();
            let mut done = 0;
            for number in up.first..up.first + up.count {
                let Some(record) = &run.tasks[number].record else {
                    continue;
                };
                done += usize::from(run.tasks[number].state.is_done());
                let found = record.outputs.iter().find(|o| o.name == reference.output);
                if let Some(artifact) = found {
                    inputs.push(AssignedInput {
                        name: name.clone(),
                        artifact: artifact.clone(),
                        producer: run.name_of(u32::try_from(number).unwrap_or(u32::MAX)),
                    });
                }
            }
            if inputs.len() - before < done {
                return Err(format!(
                    "input `{name}`: `{}` has produced no output `{}`",
                    reference.stage, reference.output
                ));
            }
        }
        if let Some(champion) = self.champion(spec.kind.as_str(), &with) {
            inputs.push(champion);
        }
        let files = cache::stage_files(spec, &with, &run.record.files)?;
        Ok(Prepared {
            with,
            inputs,
            files,
        })
    }

    /// The version that an `evaluate` stage compares with, if there is one yet.
    fn champion(&self, kind: &str, with: &Value) -> Option<AssignedInput> {
        if kind != BuiltinKind::Evaluate.as_str() || with.get("compare").is_none() {
            return None;
        }
        let compare = serde_json::from_value::<EvaluateSpec>(with.clone())
            .ok()?
            .compare?;
        let version = self.models.by_alias(&compare.model, &compare.alias)?;
        let producer = match version.origin.made_by() {
            Some(made_by) => made_by.task.clone(),
            None => TaskName::new("import").ok()?,
        };
        Some(AssignedInput {
            name: ArtifactName::new("champion").ok()?,
            artifact: version.registration.artifact.clone(),
            producer,
        })
    }

    fn assign(&mut self, at: TaskRef) -> Result<(), String> {
        let Some(run) = self.runs.get(&at.run) else {
            return Ok(());
        };
        self.deciding = Some(run.record.run.clone());
        let stage = run.tasks[at.task as usize].stage as usize;
        let index = run.tasks[at.task as usize].index;
        let shape = run.stages[stage].shape.clone();
        let prepared = self.prepare(run, stage, index)?;
        let Some(worker) = self.fleet.pick(&shape, &artifacts(&prepared.inputs)) else {
            return Ok(());
        };
        // While it is queued still: a pipeline that has nothing else queued is charged all the same.
        let pipeline = run.record.pipeline.clone();
        self.queue.charge(&pipeline, &shape.resources);
        self.unqueue(at);
        self.start(at, &worker, prepared);
        Ok(())
    }

    /// Makes a task's next attempt on a worker that has room for it.
    fn start(&mut self, at: TaskRef, worker: &WorkerName, prepared: Prepared) {
        let (now, epoch) = (self.now, self.epoch);
        let (Some(run), Some(target)) = (
            self.runs.get_mut(&at.run),
            self.fleet.workers.get_mut(worker),
        ) else {
            return;
        };
        let stage = run.tasks[at.task as usize].stage as usize;
        let spec = run.spec.clone();
        let spec = &spec.stages[stage];
        let kind = spec.kind.as_str();
        let version = target.kinds.get(kind).copied().unwrap_or(1);
        let key = (cache::never(spec, &prepared.with).is_none())
            .then(|| prepared.fingerprint(run, stage, version).key());
        target.has(prepared.inputs.iter().map(|input| input.artifact.manifest));
        let (session, incarnation) = (target.session, target.incarnation.clone());

        let task = &mut run.tasks[at.task as usize];
        task.state = emberline_common::run_view::TaskState::Running;
        let record = task.record();
        record.attempt += 1;
        record.written = Written::Running;
        record.worker = Some(worker.clone());
        record.incarnation = Some(incarnation);
        record.started_at = Some(now);
        record.finished_at = None;
        record.retry_at = None;
        record.key = key;
        let attempt = record.attempt;
        let again_at = record.again_at;
        let ready_at = again_at.unwrap_or(task.ready_at);
        run.active += 1;

        let first = run.record.started_at.is_none();
        if first {
            run.record.started_at = Some(now);
        }
        let id = AttemptId {
            run: run.record.run.clone(),
            task: run.name_of(at.task),
            attempt,
        };
        let sees_run = [BuiltinKind::Report, BuiltinKind::Deploy].map(BuiltinKind::as_str);
        let shape = run.stages[stage].shape.clone();
        let assignment = Assignment {
            id: id.clone(),
            epoch,
            pipeline: run.record.pipeline.clone(),
            kind: spec.kind.clone(),
            spec: prepared.with,
            inputs: prepared.inputs,
            resources: shape.resources,
            timeout: spec.timeout.map(|timeout| timeout.0),
            base_dir: run.record.base_dir.clone(),
            files: prepared.files,
            outputs: spec
                .outputs
                .iter()
                .map(|(name, kind)| (name.clone(), *kind))
                .collect(),
            run_view: sees_run.contains(&kind).then(|| Box::new(run.view())),
            deployments: match kind == BuiltinKind::Report.as_str() {
                true => self.deployments.values().cloned().collect(),
                false => Vec::new(),
            },
            traceparent: run.record.traceparent.clone(),
            ready_at,
        };
        let reserved = shape.resources;
        #[cfg(test)]
        let reserved = match self.sabotage {
            Some(super::sim::Sabotage::NothingReserved) => Default::default(),
            _ => reserved,
        };
        self.fleet.reserve(worker, id, reserved);
        if let Some(timeout) = spec.timeout {
            let due = Due::Attempt { task: at, attempt };
            let until = now.after(timeout.0).after(self.config.timeout_slack);
            self.deadlines.add(until, due);
        }
        self.effect(Effect::Assign {
            session,
            assignment: Box::new(assignment),
        });
        self.touch(at, true);
        self.touch_run(at.run, first);
    }

    /// Why a queued task waits, if no connected worker could ever run it.
    pub(super) fn missing_for(&self, run: &Run, task: u32) -> Option<String> {
        let stage = run.tasks[task as usize].stage as usize;
        self.fleet.missing(&run.stages[stage].shape)
    }

    /// Everything that a stage's outputs descend from: `task/output` to manifest, nearest first,
    /// at most 256 of them.
    pub(super) fn lineage(
        run: &Run,
        stage: usize,
    ) -> BTreeMap<String, emberline_common::ids::Digest> {
        let mut lineage = BTreeMap::new();
        for up in run.ancestors(stage) {
            let up = &run.stages[up];
            for number in up.first..up.first + up.count {
                let Some(record) = &run.tasks[number].record else {
                    continue;
                };
                let name: TaskName = run.name_of(u32::try_from(number).unwrap_or(u32::MAX));
                for output in &record.outputs {
                    if lineage.len() < 256 {
                        lineage.insert(format!("{name}/{}", output.name), output.manifest);
                    }
                }
            }
        }
        lineage
    }
}
