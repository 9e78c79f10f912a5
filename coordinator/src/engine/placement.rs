//! The queue, and which worker a task goes to.
//!
//! Tasks wait by *shape* (what they ask of a worker), so that a dispatch looks only at the head of
//! each shape, however many wait behind it. Within a shape: priority, then the pipeline that has
//! been served least, then age. Served counts CPU reserved by started attempts; a pipeline that
//! comes back from an empty queue starts level with the others, so that idling earns no credit.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use emberline_common::{
    ids::{PipelineName, StageKind},
    resources::Resources,
    spec::{StageSpec, kinds::BuiltinKind},
    time::Timestamp,
};

use super::{
    run::{RunSeq, TaskRef},
    workers::Worker,
};

/// What a task asks of a worker.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Shape {
    pub resources: Resources,
    pub kind: StageKind,
    pub labels: BTreeMap<String, String>,
}

impl Shape {
    pub fn of(stage: &StageSpec) -> Self {
        Self {
            resources: stage.reserves(),
            kind: stage.kind.clone(),
            labels: stage.labels.clone(),
        }
    }

    /// What this worker lacks for good, if anything.
    pub fn lacks(&self, worker: &Worker) -> Option<String> {
        match worker.kinds.get(&self.kind) {
            None => return Some(format!("runs no `{}`", self.kind)),
            Some(&has) => {
                let needed = BuiltinKind::from_name(self.kind.as_str()).map(BuiltinKind::version);
                if needed.is_some_and(|version| version != has) {
                    return Some(format!("has another version ({has}) of `{}`", self.kind));
                }
            }
        }
        for (label, value) in &self.labels {
            if worker.labels.get(label) != Some(value) {
                return Some(format!("has no label `{label}: {value}`"));
            }
        }
        (!self.resources.fits_in(&worker.total))
            .then(|| format!("has {}, not {}", worker.total, self.resources))
    }
}

type Age = (Timestamp, RunSeq, u32);
type Level = Reverse<i32>;
/// How urgent a head is; the least goes first.
pub(super) type Urgency = (Level, u64, Age);

#[derive(Debug, Default)]
struct Lane {
    order: BTreeSet<(u64, PipelineName)>,
    queues: BTreeMap<PipelineName, BTreeSet<Age>>,
}

#[derive(Debug, Default)]
struct Share {
    served: u64,
    /// Where the pipeline has tasks queued.
    lanes: BTreeSet<(Arc<Shape>, Level)>,
    queued: usize,
}

/// Tasks that wait for a worker.
#[derive(Debug, Default)]
pub(super) struct Queue {
    shapes: BTreeMap<Arc<Shape>, BTreeMap<Level, Lane>>,
    shares: BTreeMap<PipelineName, Share>,
    /// The service of the pipeline that was served last.
    level: u64,
    len: usize,
}

impl Queue {
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Since when the task waits that waits longest. Looks at each pipeline of each shape once.
    pub fn oldest(&self) -> Option<Timestamp> {
        let lanes = self.shapes.values().flat_map(BTreeMap::values);
        let queues = lanes.flat_map(|lane| lane.queues.values());
        let heads = queues.filter_map(|queue| queue.first().map(|(since, ..)| *since));
        heads.min()
    }

    pub fn push(
        &mut self,
        shape: &Arc<Shape>,
        priority: i32,
        pipeline: &PipelineName,
        ready_at: Timestamp,
        task: TaskRef,
    ) {
        let level = self.level;
        let share = self.shares.entry(pipeline.clone()).or_default();
        if share.queued == 0 {
            share.served = share.served.max(level);
        }
        let lane = (self.shapes.entry(shape.clone()).or_default())
            .entry(Reverse(priority))
            .or_default();
        let queue = lane.queues.entry(pipeline.clone()).or_default();
        if queue.is_empty() {
            lane.order.insert((share.served, pipeline.clone()));
            share.lanes.insert((shape.clone(), Reverse(priority)));
        }
        if queue.insert((ready_at, task.run, task.task)) {
            share.queued += 1;
            self.len += 1;
        }
    }

    pub fn remove(
        &mut self,
        shape: &Arc<Shape>,
        priority: i32,
        pipeline: &PipelineName,
        ready_at: Timestamp,
        task: TaskRef,
    ) -> bool {
        let level = Reverse(priority);
        let Some(lanes) = self.shapes.get_mut(shape) else {
            return false;
        };
        let (Some(lane), Some(share)) = (lanes.get_mut(&level), self.shares.get_mut(pipeline))
        else {
            return false;
        };
        let Some(queue) = lane.queues.get_mut(pipeline) else {
            return false;
        };
        if !queue.remove(&(ready_at, task.run, task.task)) {
            return false;
        }
        self.len -= 1;
        share.queued -= 1;
        if queue.is_empty() {
            lane.queues.remove(pipeline);
            lane.order.remove(&(share.served, pipeline.clone()));
            share.lanes.remove(&(shape.clone(), level));
            if lane.queues.is_empty() {
                lanes.remove(&level);
                if lanes.is_empty() {
                    self.shapes.remove(shape);
                }
            }
        }
        if share.queued == 0 && share.served <= self.level {
            self.shares.remove(pipeline);
        }
        true
    }

    /// The most urgent task of a shape.
    pub fn head(&self, shape: &Arc<Shape>) -> Option<Urgency> {
        let (level, lane) = self.shapes.get(shape)?.first_key_value()?;
        let (served, pipeline) = lane.order.first()?;
        let age = lane.queues.get(pipeline)?.first()?;
        Some((*level, *served, *age))
    }

    /// The head of every shape, most urgent first.
    pub fn heads(&self) -> BTreeSet<(Urgency, Arc<Shape>)> {
        (self.shapes.keys())
            .filter_map(|shape| Some((self.head(shape)?, shape.clone())))
            .collect()
    }

    /// Counts an attempt that starts towards its pipeline's share.
    pub fn charge(&mut self, pipeline: &PipelineName, resources: &Resources) {
        let cost = u64::from(resources.cpu_millis.max(100));
        let share = self.shares.entry(pipeline.clone()).or_default();
        let before = share.served;
        let after = before.saturating_add(cost);
        self.level = self.level.max(before);
        for (shape, level) in &share.lanes {
            let lane = (self.shapes.get_mut(shape)).and_then(|lanes| lanes.get_mut(level));
            if let Some(lane) = lane
                && lane.order.remove(&(share.served, pipeline.clone()))
            {
                lane.order.insert((after, pipeline.clone()));
            }
        }
        share.served = after;
        // What nobody waits for need not be remembered for ever.
        if self.shares.len() > 10_000 {
            let level = self.level;
            self.shares
                .retain(|_, share| share.queued > 0 || share.served > level);
        }
    }
}
