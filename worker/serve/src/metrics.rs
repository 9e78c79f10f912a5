//! The metrics of serving: their names, and how they come from what is counted.
//!
//! Only what has no count of ours, the two histograms, is recorded as it happens. All else is read
//! from the counts of the versions when somebody collects it.

use std::{sync::Weak, time::Duration};

use emberline_common::telemetry::Telemetry;
use opentelemetry::{
    KeyValue,
    metrics::{Histogram, Meter},
};

use crate::server::Inner;

/// Bounds of the histogram of durations, in seconds.
const SECONDS: [f64; 15] = [
    0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.5, 1.0, 5.0,
];
/// Bounds of the histogram of batches, in rows.
const ROWS: [f64; 11] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
];

/// What is recorded as it happens.
#[derive(Debug)]
pub(crate) struct Instruments {
    measured: bool,
    duration: Histogram<f64>,
    batch: Histogram<u64>,
}

impl Instruments {
    pub fn new(telemetry: &Telemetry) -> Self {
        let meter = telemetry.meter();
        Self {
            measured: telemetry.measures(),
            duration: meter
                .f64_histogram("emberline.serving.request.duration")
                .with_unit("s")
                .with_description("How long requests took that were answered")
                .with_boundaries(SECONDS.to_vec())
                .build(),
            batch: meter
                .u64_histogram("emberline.serving.batch.size")
                .with_unit("{row}")
                .with_description("Rows that were computed together")
                .with_boundaries(ROWS.to_vec())
                .build(),
        }
    }

    pub fn answered(&self, took: Duration, attributes: &[KeyValue]) {
        if self.measured {
            self.duration.record(took.as_secs_f64(), attributes);
        }
    }

    pub fn batch(&self, rows: usize, attributes: &[KeyValue]) {
        if self.measured {
            self.batch.record(rows as u64, attributes);
        }
    }
}

/// Tells the counts of all versions of this server, for as long as it is there.
pub(crate) fn observe(meter: &Meter, server: &Weak<Inner>) {
    let versions = |server: &Weak<Inner>| server.upgrade().map(|s| s.loaded()).unwrap_or_default();
    let of = server.clone();
    meter
        .u64_observable_counter("emberline.serving.requests")
        .with_unit("{request}")
        .with_description("Requests by what became of them")
        .with_callback(move |observer| {
            for version in versions(&of) {
                for (outcome, count) in version.counters.outcomes() {
                    let [model, number] = version.attributes.clone();
                    let outcome = KeyValue::new("emberline.outcome", outcome);
                    observer.observe(count, &[model, number, outcome]);
                }
            }
        })
        .build();
    let of = server.clone();
    meter
        .u64_observable_gauge("emberline.serving.queue.rows")
        .with_unit("{row}")
        .with_description("Rows that wait to be computed")
        .with_callback(move |observer| {
            for version in versions(&of) {
                observer.observe(version.slot.waiting() as u64, &version.attributes);
            }
        })
        .build();
    let of = server.clone();
    meter
        .f64_observable_gauge("emberline.serving.drift")
        .with_unit("1")
        .with_description(
            "How far what is asked is from what was learned from (population stability index)",
        )
        .with_callback(move |observer| {
            for version in versions(&of) {
                for drifted in version.counters.drift.of_inputs() {
                    let [model, number] = version.attributes.clone();
                    let column = KeyValue::new("emberline.column", drifted.column);
                    observer.observe(drifted.psi, &[model, number, column]);
                }
            }
        })
        .build();
    let of = server.clone();
    meter
        .f64_observable_gauge("emberline.serving.prediction.drift")
        .with_unit("1")
        .with_description("How far predictions are from those at the training's end (PSI)")
        .with_callback(move |observer| {
            for version in versions(&of) {
                if let Some(psi) = version.counters.read().prediction_drift {
                    observer.observe(psi, &version.attributes);
                }
            }
        })
        .build();
    let of = server.clone();
    meter
        .u64_observable_counter("emberline.serving.labels")
        .with_unit("{row}")
        .with_description("Rows whose label came back")
        .with_callback(move |observer| {
            for version in versions(&of) {
                observer.observe(version.counters.read().quality.labels, &version.attributes);
            }
        })
        .build();
    let of = server.clone();
    meter
        .f64_observable_gauge("emberline.serving.quality")
        .with_unit("1")
        .with_description("What labels said of predictions since the version was loaded")
        .with_callback(move |observer| {
            for version in versions(&of) {
                let quality = version.counters.read().quality;
                let classes = !version.schema.classes.is_empty();
                let all = [
                    ("accuracy", quality.accuracy().filter(|_| classes)),
                    ("f1", quality.f1().filter(|_| classes)),
                    ("loss", quality.mean_loss()),
                ];
                for (metric, value) in all {
                    let Some(value) = value else { continue };
                    let [model, number] = version.attributes.clone();
                    let metric = KeyValue::new("emberline.metric", metric);
                    observer.observe(value, &[model, number, metric]);
                }
            }
        })
        .build();
    let of = server.clone();
    meter
        .u64_observable_counter("emberline.serving.log.dropped")
        .with_unit("{request}")
        .with_description(
            "Sampled requests and labels that did not get into the log of predictions",
        )
        .with_callback(move |observer| {
            if let Some(server) = of.upgrade() {
                observer.observe(server.log.dropped(), &[]);
            }
        })
        .build();
}
