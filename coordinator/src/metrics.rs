//! The coordinator's metrics, by the names of OpenTelemetry's conventions for CI/CD; our own are
//! below `emberline.`. docs/guide/telemetry.md lists them.
//!
//! Only a leader has something to say: what it counted up for its term it takes back at its end, so
//! that the sum over all coordinators is right.

use std::{collections::HashMap, time::Duration};

use emberline_common::{
    dora::DoraQuery,
    failure::Reason,
    ids::RunId,
    run_view::{RunState, RunSummary, TaskState, TaskView},
    telemetry::cache_hits,
    time::Timestamp,
};
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Gauge, Histogram, Meter, UpDownCounter},
};
use tokio::time::Instant;

use crate::{
    delivery_gauges::{DeliveryGauges, Progress, Shown},
    dora,
    lookup::Lookup,
    runtime::{
        Runtime,
        observer::{Observed, Observing},
    },
    traces::run_result,
};

/// How often queue and workers are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often the metrics of delivery are computed although nothing was deployed: their window moves.
const MEASURE_EVERY: Duration = Duration::from_secs(60);
/// Bounds for what should take milliseconds, in seconds.
const FAST: [f64; 13] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0,
];
/// Bounds for what takes seconds to days, in seconds.
const SLOW: [f64; 14] = [
    0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 7200.0, 14400.0, 28800.0, 86400.0,
    604_800.0,
];

/// The instruments.
struct Instruments {
    duration: Histogram<f64>,
    active: UpDownCounter<i64>,
    run_errors: Counter<u64>,
    failures: Counter<u64>,
    system_errors: Counter<u64>,
    workers: UpDownCounter<i64>,
    dispatch: Histogram<f64>,
    commit: Histogram<f64>,
    queue: Gauge<u64>,
    oldest: Gauge<f64>,
    hits: Counter<u64>,
}

impl Instruments {
    fn new(meter: &Meter) -> Self {
        Self {
            duration: meter
                .f64_histogram("cicd.pipeline.run.duration")
                .with_unit("s")
                .with_description("How long runs were in a state")
                .with_boundaries(SLOW.to_vec())
                .build(),
            active: meter
                .i64_up_down_counter("cicd.pipeline.run.active")
                .with_unit("{run}")
                .with_description("Runs that have not ended, by state")
                .build(),
            run_errors: meter
                .u64_counter("cicd.pipeline.run.errors")
                .with_unit("{error}")
                .with_description("Runs that failed")
                .build(),
            failures: meter
                .u64_counter("emberline.attempt.failures")
                .with_unit("{attempt}")
                .with_description("Attempts that did not succeed, by reason")
                .build(),
            system_errors: meter
                .u64_counter("cicd.system.errors")
                .with_unit("{error}")
                .with_description("Attempts that failed through no fault of their own")
                .build(),
            workers: meter
                .i64_up_down_counter("cicd.worker.count")
                .with_unit("{count}")
                .with_description("Workers, by state")
                .build(),
            dispatch: meter
                .f64_histogram("emberline.dispatch.latency")
                .with_unit("s")
                .with_description("From when an attempt could start to its committed assignment")
                .with_boundaries(FAST.to_vec())
                .build(),
            commit: meter
                .f64_histogram("emberline.commit.latency")
                .with_unit("s")
                .with_description("How long a commit to the state store takes")
                .with_boundaries(FAST.to_vec())
                .build(),
            queue: meter
                .u64_gauge("emberline.queue.depth")
                .with_unit("{task}")
                .with_description("Tasks that wait for a worker")
                .build(),
            oldest: meter
                .f64_gauge("emberline.queue.oldest")
                .with_unit("s")
                .with_description("How long the task has waited for a worker that waits longest")
                .build(),
            hits: cache_hits(meter),
        }
    }
}

impl Instruments {
    fn attempt_failed(&self, reason: Reason, count: u64) {
        let error = KeyValue::new("error.type", reason.as_str());
        self.failures.add(count, std::slice::from_ref(&error));
        let component = match reason {
            Reason::WorkerLost => "worker",
            Reason::Storage => "object_store",
            Reason::System => "coordinator",
            _ => return,
        };
        let component = KeyValue::new("cicd.system.component", component);
        self.system_errors.add(count, &[component, error]);
    }
}

/// Feeds the metrics of one term.
pub(crate) struct Metrics {
    instruments: Instruments,
    runtime: Runtime,
    lookup: Lookup,
    /// Runs that have not ended, with their pipeline and state.
    live: HashMap<RunId, (String, RunState)>,
    /// Workers by state, as counted up last.
    workers: [i64; 3],
    delivery: DeliveryGauges,
    /// When the metrics of delivery are to be computed next.
    measure_at: Instant,
}

const WORKER_STATES: [&str; 3] = ["available", "busy", "offline"];

impl Metrics {
    pub(crate) fn new(
        meter: &Meter,
        delivery: DeliveryGauges,
        runtime: Runtime,
        lookup: Lookup,
    ) -> Self {
        let instruments = Instruments::new(meter);
        // Whoever looks at increases must have seen a zero before the first one.
        for reason in Reason::ALL {
            instruments.attempt_failed(reason, 0);
        }
        Self {
            instruments,
            runtime,
            lookup,
            live: HashMap::new(),
            workers: [0; 3],
            delivery,
            measure_at: Instant::now(),
        }
    }

    /// Until the term is over.
    pub(crate) async fn run(mut self, mut observing: Observing) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                batch = observing.next() => match batch {
                    Some(batch) => batch.iter().for_each(|observed| self.observe(observed)),
                    None => break,
                },
                _ = look.tick() => {
                    self.look().await;
                    if self.measure_at <= Instant::now() {
                        self.measure().await;
                    }
                }
            }
        }
        self.delivery.show(None);
        for (pipeline, state) in std::mem::take(&mut self.live).into_values() {
            self.instruments.active.add(-1, &of_run(&pipeline, state));
        }
        self.count_workers([0; 3]);
        self.instruments.queue.record(0, &[]);
        self.instruments.oldest.record(0.0, &[]);
    }

    async fn measure(&mut self) {
        self.measure_at = Instant::now() + MEASURE_EVERY;
        // What cannot be read now is read the next time, or never again.
        let Ok(deployments) = self.lookup.deployments().await else {
            return;
        };
        let measured = tokio::task::spawn_blocking(move || {
            let now = Timestamp::now();
            let query = DoraQuery::lately(now);
            Shown {
                report: dora::measure(&deployments, &query, now),
                progress: Progress::of(&deployments, query.since),
            }
        });
        if let Ok(shown) = measured.await {
            self.delivery.show(Some(shown));
        }
    }

    fn observe(&mut self, observed: &Observed) {
        let seconds = |duration: &Duration| duration.as_secs_f64();
        match observed {
            Observed::Assigned(waited) => self.instruments.dispatch.record(seconds(waited), &[]),
            Observed::Committed { took, .. } => self.instruments.commit.record(seconds(took), &[]),
            Observed::Run(run) => self.run_changed(run),
            Observed::Task(task) => self.task_ended(task),
            Observed::AttemptFailed(reason) => self.instruments.attempt_failed(*reason, 1),
            Observed::Deployment(_) => self.measure_at = Instant::now(),
            Observed::Ended(_) => {}
        }
    }

    fn run_changed(&mut self, run: &RunSummary) {
        let (pipeline, state) = (run.pipeline.to_string(), run.state);
        let before = if state.is_final() {
            self.live.remove(&run.run)
        } else {
            self.live.insert(run.run.clone(), (pipeline.clone(), state))
        };
        let active = &self.instruments.active;
        if let Some((_, before)) = before {
            active.add(-1, &of_run(&pipeline, before));
        }
        if !state.is_final() {
            return active.add(1, &of_run(&pipeline, state));
        }
        let begun = run.resumed_at.unwrap_or(run.created_at);
        // A retried run keeps the time of its first start.
        let started = run.started_at.map(|at| at.max(begun));
        let ended = run.finished_at.unwrap_or(begun);
        let mut phases = vec![("pending", begun, started.unwrap_or(ended))];
        phases.extend(started.map(|started| ("executing", started, ended)));
        let last = phases.len() - 1;
        for (number, (phase, from, to)) in phases.into_iter().enumerate() {
            let mut attributes = vec![
                KeyValue::new("cicd.pipeline.name", pipeline.clone()),
                KeyValue::new("cicd.pipeline.run.state", phase),
            ];
            // By the conventions a result belongs to the state in which it came out.
            if number == last {
                attributes.push(KeyValue::new("cicd.pipeline.result", run_result(run)));
                let failed = run.failure.as_ref();
                attributes.extend(failed.map(|f| KeyValue::new("error.type", f.reason.as_str())));
            }
            let took = to.since(from).as_secs_f64();
            self.instruments.duration.record(took, &attributes);
        }
        if let Some(failure) = run.failure.as_ref().filter(|_| state == RunState::Failed) {
            let attributes = [
                KeyValue::new("cicd.pipeline.name", pipeline),
                KeyValue::new("error.type", failure.reason.as_str()),
            ];
            self.instruments.run_errors.add(1, &attributes);
        }
    }

    fn task_ended(&self, task: &TaskView) {
        if task.state == TaskState::Cached {
            let cache = [KeyValue::new("emberline.cache", "task")];
            self.instruments.hits.add(1, &cache);
        }
    }

    async fn look(&mut self) {
        let seen = self
            .runtime
            .read(|engine| (engine.workers(), engine.queue_stats()));
        // What cannot be read now is read in a second, or never again.
        let Ok((workers, queue)) = seen.await else {
            return;
        };
        self.instruments
            .queue
            .record(queue.queued_tasks as u64, &[]);
        let now = Timestamp::now();
        let oldest = queue.queued_since.map(|since| now.since(since));
        let oldest = oldest.unwrap_or_default().as_secs_f64();
        self.instruments.oldest.record(oldest, &[]);
        let mut counts = [0; 3];
        for worker in workers {
            let state = match (worker.suspect_since, worker.running) {
                (Some(_), _) => 2,
                (None, 0) => 0,
                (None, _) => 1,
            };
            counts[state] += 1;
        }
        self.count_workers(counts);
    }

    fn count_workers(&mut self, counts: [i64; 3]) {
        for (state, name) in WORKER_STATES.into_iter().enumerate() {
            let attributes = [KeyValue::new("cicd.worker.state", name)];
            let change = counts[state] - self.workers[state];
            self.instruments.workers.add(change, &attributes);
        }
        self.workers = counts;
    }
}

fn of_run(pipeline: &str, state: RunState) -> [KeyValue; 2] {
    let state = match state {
        RunState::Queued => "pending",
        RunState::Cancelling => "finalizing",
        _ => "executing",
    };
    [
        KeyValue::new("cicd.pipeline.name", pipeline.to_owned()),
        KeyValue::new("cicd.pipeline.run.state", state),
    ]
}
