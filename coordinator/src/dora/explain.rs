//! One deployment's lead time, cut into segments that follow each other without gap or overlap.
//!
//! They lie along the run's critical path: of what a task waited for, the task that ended last; from
//! the deploy task back to the run's beginning. Points in time come from several clocks. Each segment
//! begins where the one before it ends, and none goes back or beyond the end: so their sum is the
//! whole, whatever the clocks say.

use emberline_common::{
    delivery::{Deployment, DeploymentKind, DeploymentOutcome, RolloutPhase},
    dora::{CarriedChange, LeadTimeExplanation, Segment, SegmentKind},
    ids::TaskName,
    run_view::{PastAttempt, RunView, TaskView},
    spec::kinds::BuiltinKind,
    time::Timestamp,
};

/// Explains a deployment's lead time by the tasks of its run, as far as these are still known, and
/// with the changes that it was the first to carry. `None` while it is under way.
#[must_use]
pub fn explain(
    deployment: &Deployment,
    run: Option<&RunView>,
    changes: Vec<CarriedChange>,
) -> Option<LeadTimeExplanation> {
    let finished_at = deployment.finished_at?;
    let change = deployment.change.as_ref();
    let accepted_at = deployment.accepted_at;
    let began_at = change.map_or(accepted_at, |change| change.committed_at);
    // A commit of the future, by its clock, has no lead time.
    let mut cut = Cutter::new(began_at.min(finished_at), finished_at);
    cut.skewed = began_at > finished_at;
    match change.map(|change| change.pushed_at) {
        Some(Some(pushed_at)) => {
            cut.to(SegmentKind::CommitToPush, None, pushed_at);
            cut.to(SegmentKind::PushToAccepted, None, accepted_at);
        }
        Some(None) => cut.to(SegmentKind::CommitToAccepted, None, accepted_at),
        None => {}
    }
    let mut notes: Vec<&str> = Vec::new();
    let rollback = deployment.kind == DeploymentKind::Rollback;
    let path = run.filter(|_| !rollback).and_then(|run| {
        let path = critical_path(&run.tasks, &deployment.task);
        (!path.is_empty()).then_some((run, path))
    });
    if let Some((run, path)) = path {
        cut.resumed_at = run.summary.resumed_at.filter(|at| *at > accepted_at);
        for task in path {
            cut.task(task);
        }
    } else if rollback {
        notes.push("a rollback carries no change: this is the time from its request to its end");
    } else {
        notes.push("the run's tasks are not known any more");
        cut.to(SegmentKind::Run, None, deployment.started_at);
    }
    let last = match (rollback, run) {
        (false, Some(_)) => SegmentKind::Promotion,
        _ => SegmentKind::Deploy,
    };
    let past = deployment.rollout.iter().flat_map(|rollout| &rollout.past);
    for past in past {
        // What came after it was live is not part of how it came to be.
        if past.to > finished_at || past.to <= cut.at {
            continue;
        }
        let kind = match past.phase {
            RolloutPhase::Step { .. } | RolloutPhase::Shadowing => SegmentKind::Canary,
            RolloutPhase::AwaitingApproval => SegmentKind::Approval,
            _ => last,
        };
        cut.to(kind, None, past.to);
    }
    cut.to(last, None, finished_at);
    if change.is_none() && !rollback {
        notes.push("no change is known: the time begins when the run was accepted");
    }
    if deployment.outcome != DeploymentOutcome::Live {
        notes.push("the version did not become live");
    }
    if change.is_some_and(|change| change.dirty) {
        notes.push("the work tree held changes that were not committed");
    }
    Some(LeadTimeExplanation {
        deployment: deployment.id,
        pipeline: deployment.pipeline.clone(),
        environment: deployment.environment.clone(),
        model: deployment.model.clone(),
        version: deployment.version,
        run: deployment.run.clone(),
        trace_id: deployment.trace,
        revision: change.map(|change| change.revision.clone()),
        began_at: cut.began,
        finished_at,
        total_micros: finished_at.0 - cut.began.0,
        segments: cut.segments,
        changes,
        skewed: cut.skewed,
        note: notes.join("; "),
    })
}

/// The tasks that the deployment had to wait for, in the order of time; the deploy task is the last.
fn critical_path<'a>(tasks: &'a [TaskView], last: &TaskName) -> Vec<&'a TaskView> {
    let mut path: Vec<&TaskView> = tasks.iter().filter(|t| t.task == *last).take(1).collect();
    // A pipeline has no cycles; the bound holds whatever comes in.
    while let Some(task) = path.last().filter(|_| path.len() <= tasks.len()) {
        let before = tasks.iter().filter(|t| task.needs.contains(&t.stage));
        let before = before.max_by(|a, b| {
            let key = |t: &&TaskView| t.finished_at;
            key(a).cmp(&key(b)).then_with(|| b.task.cmp(&a.task))
        });
        let Some(before) = before else {
            break;
        };
        path.push(before);
    }
    path.reverse();
    path
}

/// Cuts one piece after the other.
struct Cutter {
    began: Timestamp,
    /// Where the last segment ends.
    at: Timestamp,
    end: Timestamp,
    /// When the run was started again, if it was.
    resumed_at: Option<Timestamp>,
    segments: Vec<Segment>,
    skewed: bool,
}

impl Cutter {
    const fn new(began: Timestamp, end: Timestamp) -> Self {
        Self {
            began,
            at: began,
            end,
            resumed_at: None,
            segments: Vec::new(),
            skewed: false,
        }
    }

    /// A segment from where the last one ends to there. Of no length it is left out.
    fn to(&mut self, kind: SegmentKind, of: Option<(&TaskName, u32)>, until: Timestamp) {
        self.skewed |= until < self.at || until > self.end;
        let until = until.clamp(self.at, self.end);
        if until > self.at {
            self.segments.push(Segment {
                kind,
                task: of.map(|(task, _)| task.clone()),
                attempt: of.map(|(_, attempt)| attempt).filter(|a| *a > 0),
                from: self.at,
                micros: until.0 - self.at.0,
            });
            self.at = until;
        }
    }

    /// A wait; what of it lies before the run was started again is another one.
    fn wait(&mut self, kind: SegmentKind, of: (&TaskName, u32), until: Timestamp) {
        if let Some(resumed_at) = self.resumed_at
            && self.at < resumed_at
            && resumed_at <= until
        {
            self.to(SegmentKind::RetryWait, None, resumed_at);
        }
        self.to(kind, Some(of), until);
    }

    /// All that happened of a task, from the end of the one before it.
    fn task(&mut self, task: &TaskView) {
        let name = &task.task;
        let mut waits_for = SegmentKind::InputsWait;
        for past in &task.earlier {
            let of = (name, past.attempt);
            self.attempt_waits(waits_for, of, past.ready_at, past.started_at);
            self.to(SegmentKind::LostAttempt, Some(of), past.finished_at);
            waits_for = SegmentKind::BackoffWait;
        }
        let of = (name, task.attempt);
        let before: Option<&PastAttempt> = task.earlier.last();
        let ready = match before {
            None => task.ready_at,
            Some(_) => task.again_at,
        };
        let counted = before.is_some_and(|past| past.attempt == task.attempt);
        match (task.started_at, task.finished_at) {
            (Some(started), Some(finished)) if !counted => {
                self.attempt_waits(waits_for, of, ready.unwrap_or(started), started);
                self.attempt(task, finished);
            }
            // It was reused or left out: it took its place in the order, and no time.
            (_, Some(finished)) => self.wait(waits_for, of, finished),
            (_, None) => {}
        }
    }

    fn attempt_waits(
        &mut self,
        kind: SegmentKind,
        of: (&TaskName, u32),
        ready: Timestamp,
        started: Timestamp,
    ) {
        // It could start before the one before it on this path had ended: a matter of clocks.
        self.wait(kind, of, ready);
        self.wait(SegmentKind::CapacityWait, of, started);
    }

    /// The attempt that counts: what the worker measured of it, and the rest.
    fn attempt(&mut self, task: &TaskView, finished: Timestamp) {
        let of = Some((&task.task, task.attempt));
        let timing = task.timing;
        let span = finished.0.saturating_sub(self.at.0);
        let measured = timing
            .fetch_micros
            .saturating_add(timing.stage_micros)
            .saturating_add(timing.store_micros);
        // A worker's clock may run faster than the leader's.
        self.skewed |= measured > span;
        let deploys = task.kind.as_str() == BuiltinKind::Deploy.as_str();
        let stage = if deploys {
            SegmentKind::Deploy
        } else {
            SegmentKind::Stage
        };
        for (kind, micros) in [
            (SegmentKind::Fetch, timing.fetch_micros),
            (stage, timing.stage_micros),
            (SegmentKind::Store, timing.store_micros),
        ] {
            let until = Timestamp(self.at.0.saturating_add(micros)).min(finished.max(self.at));
            self.to(kind, of, until);
        }
        self.to(SegmentKind::Dispatch, of, finished);
    }
}
