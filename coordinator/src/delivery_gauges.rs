//! DORA's metrics for dashboards: gauges over the last 30 days, for each pipeline and environment.
//!
//! They are computed by the leader and shown while it leads: a coordinator that follows shows none,
//! so that no figure is there twice or stays behind.

use std::sync::{Arc, Mutex, PoisonError};

use emberline_common::{
    dora::{DoraReport, PlaceMetrics, Times},
    telemetry::Telemetry,
};
use opentelemetry::{KeyValue, metrics::AsyncInstrument};

/// Says which quantile of several spans of time a gauge shows.
const QUANTILE: &str = "emberline.dora.quantile";

/// What the gauges show. Cheap to clone; made once for a process.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeliveryGauges {
    shown: Arc<Mutex<Option<DoraReport>>>,
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
        gauges
    }

    fn add(
        &self,
        telemetry: &Telemetry,
        (name, unit): (&'static str, &'static str),
        description: &'static str,
        tell: impl Fn(&PlaceMetrics) -> Told + Send + Sync + 'static,
    ) {
        let shown = Arc::clone(&self.shown);
        let observe = move |observer: &dyn AsyncInstrument<f64>| {
            let report = shown.lock().unwrap_or_else(PoisonError::into_inner);
            for place in report.iter().flat_map(|report| &report.places) {
                for (value, more) in tell(place) {
                    let mut attributes = vec![
                        KeyValue::new("cicd.pipeline.name", place.pipeline.to_string()),
                        KeyValue::new("deployment.environment.name", place.environment.to_string()),
                    ];
                    attributes.extend(more);
                    observer.observe(value, &attributes);
                }
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
    pub(crate) fn show(&self, report: Option<DoraReport>) {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = report;
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "far fewer microseconds than 2^53"
)]
fn times(times: Option<Times>) -> Told {
    let seconds = |micros: u64| micros as f64 / 1e6;
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
