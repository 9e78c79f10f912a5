//! What is answered over plain HTTP, whoever leads.

use emberline_common::telemetry::{Telemetry, metrics_page};
use http::{Method, Response};
use tonic::body::Body;

/// Where Prometheus finds the metrics of this process.
pub(super) use emberline_common::telemetry::METRICS_PATH as METRICS;

/// The metrics of this process, in Prometheus' text format.
pub(super) fn metrics(telemetry: &Telemetry, method: &Method) -> Response<Body> {
    metrics_page(telemetry, method).map(Body::new)
}
