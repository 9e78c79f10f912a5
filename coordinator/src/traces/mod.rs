//! The coordinator's spans: runs, waits, attempts, deployments, terms.
//!
//! They are made from what was committed, when it has ended. Every process derives the same ids, so
//! a worker's spans are part of an attempt that is told later, and a leader that ends a run which an
//! earlier one had led tells again what that one may not have got out: at least once, and the same.

pub(crate) mod spans;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, time::Duration};

use emberline_common::{
    delivery::{Deployment, DeploymentKind, DeploymentOutcome},
    ids::RunId,
    run_view::RunSummary,
    telemetry::Telemetry,
    time::Timestamp,
    trace::RunTrace,
};

pub use spans::Spans;
pub(crate) use spans::run_result;

use crate::{
    engine::api::ArchivedRun,
    runtime::{
        Runtime,
        observer::{Observed, Observing},
    },
};

/// How long it rests when it has told all that there was.
const REST: Duration = Duration::from_millis(20);

/// Spans that there is to be room for before something is told: of most things there are fewer.
const ROOM: usize = 16;

/// Tells the spans of one term.
pub(crate) struct Tracer {
    telemetry: Telemetry,
    spans: Spans,
    runtime: Runtime,
    /// When the term began: what ended before may not have got out.
    since: Timestamp,
    live: HashMap<RunId, Live>,
}

/// A run that has not ended.
struct Live {
    summary: std::sync::Arc<RunSummary>,
    sampled: bool,
    /// Whether something of it may not have been seen here.
    gaps: bool,
}

impl Tracer {
    pub(crate) fn new(
        telemetry: Telemetry,
        spans: Spans,
        runtime: Runtime,
        since: Timestamp,
    ) -> Self {
        Self {
            telemetry,
            spans,
            runtime,
            since,
            live: HashMap::new(),
        }
    }

    /// Until the term is over.
    pub(crate) async fn run(mut self, mut observing: Observing) {
        while let Some(first) = observing.next().await {
            let mut batch = Some(first);
            while let Some(observed) = batch {
                if observing.missed() > 0 {
                    for run in self.live.values_mut() {
                        run.gaps = true;
                    }
                }
                for observed in observed.iter() {
                    self.telemetry.room(ROOM).await;
                    self.observe(observed).await;
                }
                batch = observing.next_now();
            }
            // Nobody waits for spans: waking up for each commit would cost more than the spans do.
            tokio::time::sleep(REST).await;
        }
    }

    async fn observe(&mut self, observed: &Observed) {
        match observed {
            Observed::Run(summary) => {
                let since = self.since;
                let sampled = self.telemetry.samples(&summary.trace());
                let live = self
                    .live
                    .entry(summary.run.clone())
                    .or_insert_with(|| Live {
                        summary: summary.clone(),
                        sampled,
                        gaps: summary.created_at < since,
                    });
                live.summary = summary.clone();
            }
            Observed::Task(task) => {
                let stuck = self.telemetry.is_stuck();
                if let Some(live) = self.live.get_mut(&task.run)
                    && live.sampled
                    && task.state.is_final()
                {
                    if stuck {
                        // Made good when the run ends, if somebody listens then.
                        live.gaps = true;
                        return;
                    }
                    for span in self.spans.task(&live.summary, task) {
                        self.telemetry.span(span);
                    }
                }
            }
            Observed::Deployment(deployment) => {
                // What is told of it later (that it has failed, that it is watched no more) changes
                // nothing of how it came about.
                let since = deployment.rollout.as_ref().map(|rollout| rollout.since);
                let later = since.is_some_and(|since| Some(since) > deployment.finished_at);
                let failed =
                    deployment.outcome == DeploymentOutcome::Live && deployment.failure.is_some();
                if later || failed {
                    return;
                }
                self.deployment(deployment).await;
            }
            Observed::Ended(archived) => self.ended(archived).await,
            Observed::Assigned(_) | Observed::AttemptFailed(_) | Observed::Committed { .. } => {}
        }
    }

    /// A deployment that is over, however it came out. It may have outlived its run.
    async fn deployment(&self, deployment: &Deployment) {
        let root = match self.live.get(&deployment.run) {
            _ if deployment.kind == DeploymentKind::Rollback => None,
            Some(live) => Some((
                live.sampled,
                live.summary.trace(),
                spans::resumed(&live.summary),
            )),
            None => {
                let run = deployment.run.clone();
                let ended = self.runtime.read(move |engine| {
                    let ended = engine.ended_run(&run)?;
                    Some(ended.summary.clone())
                });
                // If nobody leads any more, the next leader does not tell it either: it is lost.
                let ended = ended.await.ok().flatten();
                ended.map(|run| {
                    let trace = run.trace();
                    (self.telemetry.samples(&trace), trace, spans::resumed(&run))
                })
            }
        };
        let (sampled, root) = match root {
            Some((sampled, trace, resumed)) => (sampled, Some(trace.root(resumed))),
            None => {
                let trace = RunTrace::within(deployment.trace, &deployment.run);
                (self.telemetry.samples(&trace), None)
            }
        };
        if !sampled {
            return;
        }
        let own = self.spans.deployment(deployment, root);
        for span in own.into_iter().chain(self.spans.phases(deployment)) {
            self.telemetry.span(span);
        }
    }

    /// The run's own span, and all of it that may have got lost.
    async fn ended(&mut self, archived: &ArchivedRun) {
        let summary = &archived.view.summary;
        let live = self.live.remove(&summary.run);
        let sampled = match &live {
            Some(live) => live.sampled,
            None => self.telemetry.samples(&summary.trace()),
        };
        if !sampled {
            return;
        }
        if self.telemetry.is_stuck() {
            // Each task is a span at the least, and so is the run.
            self.telemetry.lost(archived.view.tasks.len() + 1);
            return;
        }
        if live.is_none_or(|live| live.gaps) {
            let began = spans::resumed(summary);
            for task in &archived.view.tasks {
                self.telemetry.room(ROOM).await;
                // What a retry kept is part of the run's earlier span.
                if task.finished_at.is_some_and(|at| at >= began) {
                    for span in self.spans.task(summary, task) {
                        self.telemetry.span(span);
                    }
                }
            }
            let run = summary.run.clone();
            let made = self.runtime.read(move |engine| {
                let own = engine.deployments().rev().filter(|d| d.run == run);
                own.filter(|d| d.change.is_some())
                    .take(64)
                    .cloned()
                    .collect::<Vec<_>>()
            });
            // If nobody leads any more, the next leader tells all of it again.
            for deployment in made.await.unwrap_or_default() {
                let root = summary.trace().root(began);
                if let Some(span) = self.spans.deployment(&deployment, Some(root)) {
                    self.telemetry.span(span);
                }
            }
        }
        self.telemetry.span(self.spans.run(summary));
    }
}
