//! What is answered over plain HTTP, whoever leads.

use emberline_common::telemetry::Telemetry;
use http::{Method, Response, StatusCode, header};
use tonic::body::Body;

/// Where Prometheus finds the metrics of this process.
pub(super) const METRICS: &str = "/metrics";

/// The metrics of this process, in Prometheus' text format.
pub(super) fn metrics(telemetry: &Telemetry, method: &Method) -> Response<Body> {
    if method != Method::GET && method != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "use GET\n".to_owned());
    }
    match telemetry.prometheus() {
        Ok(page) => text(StatusCode::OK, page),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")),
    }
}

fn text(status: StatusCode, page: String) -> Response<Body> {
    let mut response = Response::new(Body::new(page));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
