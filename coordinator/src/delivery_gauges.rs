//! Delivery for dashboards, for each pipeline and environment: DORA's metrics over the last 30 days, how
//! deployments came out, and how those that are under way get on.
//!
//! They are computed by the leader and shown while it leads: a coordinator that follows shows none,
//! so that no figure is there twice or stays behind.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use emberline_common::{
    delivery::{Deployment, DeploymentKind, DeploymentOutcome},
    dora::{DoraReport, PlaceMetrics, Times},
    ids::{EnvironmentName, PipelineName},
    telemetry::Telemetry,
    time::Timestamp,
};
use opentelemetry::{KeyValue, metrics::AsyncInstrument};

/// Says which quantile of several spans of time a gauge shows.
const QUANTILE: &str = "emberline.dora.quantile";
/// Says whether a run brought a version, or what was live before was made live again.
const KIND: &str = "emberline.deployment.kind";

/// What a gauge is told of one thing.
type Tell<'a> = &'a mut dyn FnMut(f64, Vec<KeyValue>);
type Place = (PipelineName, EnvironmentName);

/// What is shown.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) report: DoraReport,
    pub(crate) progress: Progress,
}

/// How deployments came out, and how those that are under way get on.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Progress {
    /// Those that began in the window, by kind and outcome.
    counts: BTreeMap<Place, BTreeMap<(&'static str, &'static str), u64>>,
    /// When the last one became live, by kind.
    last: BTreeMap<Place, BTreeMap<&'static str, Timestamp>>,
    /// The phase of each that is under way, and since when.
    phases: BTreeMap<Place, Vec<(&'static str, Timestamp)>>,
}

impl Progress {
    /// Out of all deployments; `since` is where the window begins.
    pub(crate) fn of(deployments: &[Arc<Deployment>], since: Timestamp) -> Self {
        let mut progress = Self::default();
        for deployment in deployments {
            let place = (deployment.pipeline.clone(), deployment.environment.clone());
            let kind = deployment.kind.as_str();
            if deployment.started_at >= since {
                let counts = progress.counts.entry(place.clone()).or_default();
                // A kind that there is none of is told as 0, as soon as there is another.
                for kind in [DeploymentKind::Release, DeploymentKind::Rollback] {
                    let live = (kind.as_str(), DeploymentOutcome::Live.as_str());
                    counts.entry(live).or_default();
                }
                *counts
                    .entry((kind, deployment.outcome.as_str()))
                    .or_default() += 1;
            }
            if deployment.outcome == DeploymentOutcome::Live
                && let Some(finished) = deployment.finished_at
            {
                let last = progress.last.entry(place.clone()).or_default();
                let last = last.entry(kind).or_insert(finished);
                *last = finished.max(*last);
            }
            if deployment.outcome == DeploymentOutcome::InProgress
                && let Some(rollout) = &deployment.rollout
            {
                let phase = (rollout.phase.as_str(), rollout.since);
                progress.phases.entry(place).or_default().push(phase);
            }
        }
        progress
    }
}

/// What the gauges show. Cheap to clone; made once for a process.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeliveryGauges {
    shown: Arc<Mutex<Option<Shown>>>,
}

/// What one gauge tells of one place, each with more attributes.
type Told = Vec<(f64, Option<KeyValue>)>;

impl DeliveryGauges {
    /// Gauges that show nothing yet.
    pub(crate) fn new(telemetry: &Telemetry) -> Self {
        let gauges = Self::default();
        if !telemetry.measures() {
            return gauges;
        }
        let one = |value: Option<f64>| value.map(|v| (v, None)).into_iter().collect();
        gauges.add(
            telemetry,
            ("emberline.dora.deployment_frequency", "{deployment}/d"),
            "Successful deployments per day over the last 30 days",
            move |place| one(place.deployment_frequency.map(|f| f.per_day)),
        );
        gauges.add(
            telemetry,
            ("emberline.dora.change_lead_time", "s"),
            "From the commit of a change to its first being live, over the last 30 days",
            |place| times(place.change_lead_time),
        );
        gauges.add(
            telemetry,
            ("emberline.dora.data_lead_time", "s"),
            "From the arrival of data to its first being live in a model, over the last 30 days",
            |place| times(place.data_lead_time),
        );
        gauges.add(
            telemetry,
            ("emberline.dora.change_fail_rate", "1"),
            "Failed deployments of all deployments of the last 30 days",
            move |place| one(place.change_fail_rate.map(|rate| rate.ratio)),
        );
        gauges.add(
            telemetry,
            ("emberline.dora.recovery_time", "s"),
            "From the beginning of a failure to the next good version being live, over the last 30 days",
            |place| times(place.recovery_time),
        );
        gauges.add(
            telemetry,
            ("emberline.dora.rework_rate", "1"),
            "Repairs and rollbacks of all deployments and rollbacks of the last 30 days",
            move |place| one(place.rework_rate.map(|rate| rate.ratio)),
        );
        gauges.add_progress(telemetry);
        gauges
    }

    fn add_progress(&self, telemetry: &Telemetry) {
        self.gauge(
            telemetry,
            ("emberline.deployments", "{deployment}"),
            "Deployments that began within the last 30 days",
            |shown, tell| {
                for (place, counts) in &shown.progress.counts {
                    for ((kind, outcome), count) in counts {
                        let more = [
                            KeyValue::new(KIND, *kind),
                            KeyValue::new("emberline.deployment.outcome", *outcome),
                        ];
                        tell(as_f64(*count), of_place(&place.0, &place.1, more));
                    }
                }
            },
        );
        self.gauge(
            telemetry,
            ("emberline.deployment.last.timestamp", "s"),
            "When the last deployment became live, in seconds since 1970",
            |shown, tell| {
                for (place, last) in &shown.progress.last {
                    for (kind, at) in last {
                        let more = [KeyValue::new(KIND, *kind)];
                        tell(seconds(at.0), of_place(&place.0, &place.1, more));
                    }
                }
            },
        );
        self.gauge(
            telemetry,
            ("emberline.deployment.phase.age", "s"),
            "How long a deployment that is under way has been in its phase",
            |shown, tell| {
                let now = Timestamp::now();
                for (place, phases) in &shown.progress.phases {
                    for (phase, since) in phases {
                        let more = [KeyValue::new("emberline.deployment.phase", *phase)];
                        let age = now.since(*since).as_secs_f64();
                        tell(age, of_place(&place.0, &place.1, more));
                    }
                }
            },
        );
    }

    fn add(
        &self,
        telemetry: &Telemetry,
        named: (&'static str, &'static str),
        description: &'static str,
        told: impl Fn(&PlaceMetrics) -> Told + Send + Sync + 'static,
    ) {
        self.gauge(telemetry, named, description, move |shown, tell| {
            for place in &shown.report.places {
                for (value, more) in told(place) {
                    tell(value, of_place(&place.pipeline, &place.environment, more));
                }
            }
        });
    }

    fn gauge(
        &self,
        telemetry: &Telemetry,
        (name, unit): (&'static str, &'static str),
        description: &'static str,
        told: impl Fn(&Shown, Tell<'_>) + Send + Sync + 'static,
    ) {
        let shown = Arc::clone(&self.shown);
        let observe = move |observer: &dyn AsyncInstrument<f64>| {
            let shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(shown) = shown.as_ref() {
                told(shown, &mut |value, attributes| {
                    observer.observe(value, &attributes);
                });
            }
        };
        // The meter keeps the callback.
        let _ = telemetry
            .meter()
            .f64_observable_gauge(name)
            .with_unit(unit)
            .with_description(description)
            .with_callback(observe)
            .build();
    }

    /// From now on this is shown; nothing for none.
    pub(crate) fn show(&self, shown: Option<Shown>) {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = shown;
    }
}

fn of_place(
    pipeline: &PipelineName,
    environment: &EnvironmentName,
    more: impl IntoIterator<Item = KeyValue>,
) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("cicd.pipeline.name", pipeline.to_string()),
        KeyValue::new("deployment.environment.name", environment.to_string()),
    ];
    attributes.extend(more);
    attributes
}

#[allow(
    clippy::cast_precision_loss,
    reason = "far fewer deployments and microseconds than 2^53"
)]
fn as_f64(number: u64) -> f64 {
    number as f64
}

fn seconds(micros: u64) -> f64 {
    as_f64(micros) / 1e6
}

fn times(times: Option<Times>) -> Told {
    times.map_or_else(Vec::new, |times| {
        vec![
            (
                seconds(times.median_micros),
                Some(KeyValue::new(QUANTILE, "0.5")),
            ),
            (
                seconds(times.p95_micros),
                Some(KeyValue::new(QUANTILE, "0.95")),
            ),
        ]
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use emberline_common::{
        delivery::{Rollout, RolloutPhase},
        spec::DurationText,
    };

    use super::*;
    use crate::dora::tests::{at, outcome, release, rollback, shared};

    #[test]
    fn it_tells_how_deployments_came_out_and_how_long_those_under_way_have_been_so() {
        let mut waits = outcome(release(5, "2026-03-09"), DeploymentOutcome::InProgress);
        waits.finished_at = None;
        waits.rollout = Some(Rollout {
            replicas: 1,
            strategy: serde_json::from_str(r#"{"type": "all_at_once"}"#).unwrap(),
            limits: serde_json::from_str("{}").unwrap(),
            progress_deadline: DurationText(std::time::Duration::from_secs(1)),
            alias: None,
            phase: RolloutPhase::AwaitingApproval,
            since: at("2026-03-10"),
            past: Vec::new(),
            exposed_at: None,
            approved: false,
            note: String::new(),
        });
        let all = shared(vec![
            release(1, "2026-01-01"),
            release(2, "2026-03-02"),
            outcome(release(3, "2026-03-05"), DeploymentOutcome::Aborted),
            rollback(4, 2, "2026-03-07"),
            waits,
        ]);
        let progress = Progress::of(&all, at("2026-03-01"));
        let place = ("churn".parse().unwrap(), "production".parse().unwrap());
        let counts: Vec<_> = progress.counts[&place].clone().into_iter().collect();
        assert_eq!(
            counts,
            [
                (("release", "aborted"), 1),
                (("release", "in_progress"), 1),
                (("release", "live"), 1),
                (("rollback", "live"), 1),
            ]
        );
        let last: Vec<_> = progress.last[&place].clone().into_iter().collect();
        assert_eq!(
            last,
            [
                ("release", at("2026-03-02")),
                ("rollback", at("2026-03-07"))
            ]
        );
        assert_eq!(
            progress.phases[&place],
            [("awaiting_approval", at("2026-03-10"))]
        );
    }
}
