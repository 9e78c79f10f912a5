//! From records to spans. Names and attributes are those of OpenTelemetry's semantic conventions for
//! CI/CD, VCS and deployment (docs/guide/telemetry.md lists them); what they do not know is below
//! `emberline.`.
//!
//! Pure: the same record gives the same spans, whoever makes them and how often.

use emberline_common::{
    delivery::{ChangeKind, Deployment, DeploymentOutcome, RolloutPhase},
    failure::{Failure, Reason},
    ids::{Epoch, WorkerName},
    run_view::{PastAttempt, RunState, RunSummary, TaskState, TaskView},
    serving::Traffic,
    spec::kinds::BuiltinKind,
    telemetry::{Span, SpanKind},
    time::Timestamp,
    trace::{self, RunTrace, SpanId},
};
use opentelemetry::KeyValue;

/// What spans are made with.
#[derive(Debug, Clone)]
pub struct Spans {
    /// Where a run can be looked at, with `{run}`.
    run_url: String,
}

impl Default for Spans {
    fn default() -> Self {
        Self::new("emberline:///runs/{run}")
    }
}

impl Spans {
    /// Runs can be looked at there; `{run}` stands for the run's id.
    #[must_use]
    pub fn new(run_url: impl Into<String>) -> Self {
        Self {
            run_url: run_url.into(),
        }
    }

    /// Where a run can be looked at.
    pub(crate) fn url(&self, run: &RunSummary) -> String {
        self.run_url.replace("{run}", run.run.as_str())
    }

    /// The span of a run that has ended.
    #[must_use]
    pub fn run(&self, run: &RunSummary) -> Span {
        let trace = run.trace();
        let start = resumed(run);
        let end = run.finished_at.unwrap_or(start);
        let name = format!("RUN {}", run.pipeline);
        let root = trace.root(start);
        let mut span = Span::new(trace.trace, root, trace.parent, name, start, end);
        span.parent_is_remote = trace.parent.is_some();
        span.kind = SpanKind::Server;
        let result = run_result(run);
        span.attributes = vec![
            KeyValue::new("cicd.pipeline.name", run.pipeline.to_string()),
            KeyValue::new("cicd.pipeline.run.id", run.run.to_string()),
            KeyValue::new("cicd.pipeline.action.name", "RUN"),
            KeyValue::new("cicd.pipeline.result", result),
            KeyValue::new("cicd.pipeline.run.url.full", self.url(run)),
            KeyValue::new("emberline.trigger", run.trigger.clone()),
        ];
        if let Some(failure) = &run.failure {
            fail(&mut span, failure);
        }
        if let Some(change) = &run.change {
            let code = change.kind == ChangeKind::Code;
            let known = |name: &'static str, value: &str| {
                (!value.is_empty()).then(|| KeyValue::new(name, value.to_owned()))
            };
            span.attributes.extend(
                [
                    known("vcs.repository.url.full", &change.repository),
                    known("vcs.ref.head.name", &change.branch),
                    code.then(|| known("vcs.ref.head.revision", &change.revision))
                        .flatten(),
                    known("vcs.change.id", &change.id),
                ]
                .into_iter()
                .flatten(),
            );
        }
        span
    }

    /// The spans of a task that has ended: its waits and its attempts.
    #[must_use]
    pub fn task(&self, run: &RunSummary, task: &TaskView) -> Vec<Span> {
        let trace = run.trace();
        let root = trace.root(resumed(run));
        let made = Made {
            spans: self,
            run,
            task,
            trace,
            root,
        };
        let mut spans = Vec::with_capacity(3);
        let mut before: Option<&PastAttempt> = None;
        for past in &task.earlier {
            let wait = (past.ready_at, past.started_at);
            made.waits(&mut spans, past.attempt, before, wait);
            let ran = (past.started_at, past.finished_at);
            let worker = past.worker.as_ref();
            let mut span = made.attempt(past.attempt, before, worker, ran);
            span.attributes.push(result_of(past.reason));
            let text = format!("attempt {} ended: {}", past.attempt, past.reason);
            fail(&mut span, &Failure::new(past.reason, text));
            spans.push(span);
            before = Some(past);
        }
        let ended = task.finished_at.unwrap_or_default();
        let past = before.is_some_and(|past| past.attempt == task.attempt);
        match (task.state, task.started_at) {
            (TaskState::Cached | TaskState::Skipped, _) => {
                spans.push(made.unstarted(ended));
            }
            (_, Some(started)) if !past => {
                let ready = again_at(task, before);
                made.waits(&mut spans, task.attempt, before, (ready, started));
                let worker = task.worker.as_ref();
                let mut span = made.attempt(task.attempt, before, worker, (started, ended));
                span.attributes.push(match (&task.failure, task.state) {
                    (_, TaskState::Succeeded) => {
                        KeyValue::new("cicd.pipeline.task.run.result", "success")
                    }
                    (_, TaskState::Cancelled) | (None, _) => {
                        KeyValue::new("cicd.pipeline.task.run.result", "cancellation")
                    }
                    (Some(failure), _) => result_of(failure.reason),
                });
                if let Some(failure) = &task.failure {
                    fail(&mut span, failure);
                }
                spans.push(span);
            }
            _ => {}
        }
        spans
    }

    /// The span of a deployment, once it is over. `parent` is its run's span; a rollback is part of
    /// the deployment that it repairs.
    #[must_use]
    pub fn deployment(&self, deployment: &Deployment, parent: Option<SpanId>) -> Option<Span> {
        let end = deployment.finished_at?;
        let repaired = deployment
            .repairs
            .map(|bad| trace::deployment(deployment.trace, bad));
        let id = trace::deployment(deployment.trace, deployment.id);
        let name = format!("deploy {}", deployment.model);
        let start = deployment.started_at;
        let parent = parent.or(repaired);
        let mut span = Span::new(deployment.trace, id, parent, name, start, end);
        let live = deployment.outcome == DeploymentOutcome::Live;
        let status = if live { "succeeded" } else { "failed" };
        span.attributes = vec![
            KeyValue::new("deployment.id", deployment.id.to_string()),
            KeyValue::new("deployment.name", deployment.model.to_string()),
            KeyValue::new(
                "deployment.environment.name",
                deployment.environment.to_string(),
            ),
            KeyValue::new("deployment.status", status),
            KeyValue::new("emberline.model.version", i64::from(deployment.version)),
        ];
        if !live {
            span.attributes
                .push(KeyValue::new("error.type", deployment.outcome.as_str()));
            span.error = Some(format!(
                "the version did not become live: {}",
                deployment.outcome
            ));
        }
        Some(span)
    }

    /// The spans of a deployment's phases, once it is over: loading, each step of a canary, a shadow, the
    /// wait for a person. Those that took no time are left out.
    #[must_use]
    pub fn phases(&self, deployment: &Deployment) -> Vec<Span> {
        let Some(rollout) = deployment
            .rollout
            .as_ref()
            .filter(|_| deployment.finished_at.is_some())
        else {
            return Vec::new();
        };
        let parent = trace::deployment(deployment.trace, deployment.id);
        let mut spans = Vec::new();
        for (number, past) in rollout
            .past
            .iter()
            .enumerate()
            .filter(|(_, p)| p.to > p.from)
        {
            let name = match past.phase {
                RolloutPhase::Preparing => "load",
                RolloutPhase::Shadowing => "shadow",
                RolloutPhase::Step { .. } => "canary",
                RolloutPhase::AwaitingApproval => "await approval",
                RolloutPhase::Watching | RolloutPhase::Settled => continue,
            };
            let id = trace::deployment_phase(deployment.trace, deployment.id, number);
            let (from, to) = (past.from, past.to);
            let mut span = Span::new(deployment.trace, id, Some(parent), name, from, to);
            span.attributes = vec![KeyValue::new("deployment.id", deployment.id.to_string())];
            if let Traffic::Canary { share } | Traffic::Shadow { share } =
                rollout.traffic_in(past.phase)
            {
                let percent = f64::from(share) / 100.0;
                span.attributes
                    .push(KeyValue::new("emberline.canary.percent", percent));
            }
            spans.push(span);
        }
        spans
    }

    /// The span of a leader's term; `lost` if that leader did not end it itself.
    #[must_use]
    pub fn term(cluster: &str, epoch: Epoch, start: Timestamp, end: Timestamp, lost: bool) -> Span {
        let (trace, id) = trace::term(cluster, epoch);
        let mut span = Span::new(trace, id, None, "lead", start, end);
        span.attributes = vec![
            KeyValue::new("cicd.system.component", "coordinator"),
            KeyValue::new(
                "emberline.epoch",
                i64::try_from(epoch.0).unwrap_or(i64::MAX),
            ),
        ];
        if lost {
            span.attributes
                .push(KeyValue::new("error.type", "leader_lost"));
            span.error = Some("the leader was lost; the next one closes its term".to_owned());
        }
        span
    }
}

/// What all spans of one task have in common.
struct Made<'a> {
    spans: &'a Spans,
    run: &'a RunSummary,
    task: &'a TaskView,
    trace: RunTrace,
    root: SpanId,
}

impl Made<'_> {
    /// Waiting for inputs (or for the backoff), then for a worker.
    fn waits(
        &self,
        spans: &mut Vec<Span>,
        attempt: u32,
        before: Option<&PastAttempt>,
        (ready, started): (Timestamp, Timestamp),
    ) {
        let (reason, from) = match before {
            None => ("inputs", resumed(self.run)),
            Some(past) => ("backoff", past.finished_at),
        };
        for (reason, from, to) in [(reason, from, ready), ("capacity", ready, started)] {
            if to <= from {
                continue;
            }
            let id = self.trace.wait(&self.task.task, attempt, reason);
            let name = format!("queue {}", self.task.task);
            let mut span = Span::new(self.trace.trace, id, Some(self.root), name, from, to);
            span.attributes = vec![
                KeyValue::new("cicd.pipeline.run.state", "pending"),
                KeyValue::new("emberline.wait.reason", reason),
                KeyValue::new("cicd.pipeline.task.name", self.task.task.shared()),
                KeyValue::new("emberline.attempt", i64::from(attempt)),
            ];
            spans.push(span);
        }
    }

    fn attempt(
        &self,
        attempt: u32,
        before: Option<&PastAttempt>,
        worker: Option<&WorkerName>,
        (started, ended): (Timestamp, Timestamp),
    ) -> Span {
        let (task, trace) = (&self.task.task, &self.trace);
        let id = trace.attempt(task, attempt);
        let name = self.task.stage.to_string();
        let mut span = Span::new(trace.trace, id, Some(self.root), name, started, ended);
        let task_run = format!("{}/{task}/{attempt}", self.run.run);
        let url = format!("{}/tasks/{task}/{attempt}", self.spans.url(self.run));
        span.attributes = vec![
            KeyValue::new("cicd.pipeline.task.name", task.shared()),
            KeyValue::new("cicd.pipeline.task.run.id", task_run),
            KeyValue::new("cicd.pipeline.task.run.url.full", url),
            KeyValue::new("emberline.attempt", i64::from(attempt)),
            KeyValue::new("emberline.stage.kind", self.task.kind.shared()),
        ];
        if let Some(kind) = task_type(self.task.kind.as_str()) {
            span.attributes
                .push(KeyValue::new("cicd.pipeline.task.type", kind));
        }
        if let Some(worker) = worker {
            span.attributes.extend([
                KeyValue::new("cicd.worker.id", worker.shared()),
                KeyValue::new("cicd.worker.name", worker.shared()),
            ]);
        }
        if let Some(past) = before {
            span.links
                .push((trace.trace, trace.attempt(task, past.attempt)));
        }
        span
    }

    /// Of a task that did not run: it was reused or skipped.
    fn unstarted(&self, at: Timestamp) -> Span {
        let mut span = self.attempt(0, None, None, (at, at));
        span.attributes
            .push(KeyValue::new("cicd.pipeline.task.run.result", "skip"));
        let hit = self.task.state == TaskState::Cached;
        span.attributes
            .push(KeyValue::new("emberline.cache.hit", hit));
        span
    }
}

/// When a run was accepted, or retried.
pub(crate) fn resumed(run: &RunSummary) -> Timestamp {
    run.resumed_at.unwrap_or(run.created_at)
}

/// When the current attempt could have started. The record says it of past attempts only; a backoff
/// ended at the latest when this one was assigned.
fn again_at(task: &TaskView, before: Option<&PastAttempt>) -> Timestamp {
    match before {
        None => task.ready_at.unwrap_or_default(),
        Some(past) => task.again_at.unwrap_or(past.finished_at),
    }
}

fn fail(span: &mut Span, failure: &Failure) {
    span.attributes
        .push(KeyValue::new("error.type", failure.reason.as_str()));
    span.error = Some(failure.message.clone());
}

/// What the conventions call the end of a run.
pub(crate) fn run_result(run: &RunSummary) -> &'static str {
    match (run.state, &run.failure) {
        (RunState::Succeeded, _) => "success",
        (RunState::Cancelled, _) | (_, None) => "cancellation",
        (_, Some(failure)) => result(failure.reason),
    }
}

/// What the conventions call it: `failure` is the stage's own, `error` the system's.
pub(crate) const fn result(reason: Reason) -> &'static str {
    match reason {
        Reason::Timeout => "timeout",
        Reason::Cancelled => "cancellation",
        Reason::WorkerLost | Reason::Preempted | Reason::Storage | Reason::System => "error",
        Reason::UserError | Reason::Data | Reason::QualityGate | Reason::Oom => "failure",
    }
}

fn result_of(reason: Reason) -> KeyValue {
    KeyValue::new("cicd.pipeline.task.run.result", result(reason))
}

/// What the conventions call a kind of stage, where they have a word for it.
fn task_type(kind: &str) -> Option<&'static str> {
    match BuiltinKind::from_name(kind)? {
        BuiltinKind::Train => Some("build"),
        BuiltinKind::Validate | BuiltinKind::Evaluate => Some("test"),
        BuiltinKind::Deploy => Some("deploy"),
        _ => None,
    }
}
