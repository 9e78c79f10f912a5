//! The page from which Prometheus takes the metrics of a process, whoever serves it.

use http::{HeaderValue, Method, Response, StatusCode, header};

use super::Telemetry;

/// Where Prometheus finds the metrics of a process.
pub const METRICS_PATH: &str = "/metrics";

/// What is answered to a request for [`METRICS_PATH`].
#[must_use]
pub fn metrics_page(telemetry: &Telemetry, method: &Method) -> Response<String> {
    if method != Method::GET && method != Method::HEAD {
        let mut answer = text_page(StatusCode::METHOD_NOT_ALLOWED, "use GET\n");
        let allowed = HeaderValue::from_static("GET, HEAD");
        answer.headers_mut().insert(header::ALLOW, allowed);
        return answer;
    }
    match telemetry.prometheus() {
        Ok(page) => text_page(StatusCode::OK, page),
        Err(e) => text_page(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")),
    }
}

/// A page of plain text, as Prometheus reads it (text format 0.0.4).
#[must_use]
pub fn text_page(status: StatusCode, page: impl Into<String>) -> Response<String> {
    let mut answer = Response::new(page.into());
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}
