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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use opentelemetry::KeyValue;

    use super::*;
    use crate::telemetry::Setup;

    fn measuring() -> Telemetry {
        let instance = "test".to_owned();
        let service = "emberline-test";
        Telemetry::start(&Setup { service, instance }).unwrap()
    }

    /// The page's lines of one metric.
    fn lines(telemetry: &Telemetry, name: &str) -> Vec<String> {
        let page = metrics_page(telemetry, &Method::GET).into_body();
        let all = page.lines().filter(|line| line.starts_with(name));
        all.map(str::to_owned).collect()
    }

    #[tokio::test]
    async fn names_without_number_become_no_series_without_number() {
        let telemetry = measuring();
        let meter = telemetry.meter();
        let counter = meter.u64_counter("many").build();
        let gauge = meter.u64_gauge("gauges").build();
        let names = || (0..20_000_u32).map(|n| [KeyValue::new("pipeline", format!("p-{n}"))]);
        let observed = names().collect::<Vec<_>>();
        let _seen = meter
            .u64_observable_gauge("seen")
            .with_callback(move |to| observed.iter().for_each(|name| to.observe(1, name)))
            .build();
        for name in names() {
            counter.add(1, &name);
            gauge.record(1, &name);
        }
        for metric in ["many_total{", "gauges{", "seen{"] {
            let lines = lines(&telemetry, metric);
            assert!(lines.len() <= 2001, "{} of {metric}", lines.len());
            let rest = lines.iter().find(|line| line.contains("overflow"));
            assert!(rest.is_some(), "what is left out of {metric} is one series");
        }
        // Nothing that was counted is lost.
        let values = lines(&telemetry, "many_total{");
        let values = values
            .iter()
            .map(|l| l.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap());
        assert_eq!(values.sum::<u64>(), 20_000);
    }

    #[tokio::test]
    async fn a_name_cannot_leave_its_label() {
        let telemetry = measuring();
        let counter = telemetry.meter().u64_counter("evil").build();
        let name = "a\"} 1\nforged_total{x=\"\\";
        counter.add(7, &[KeyValue::new("column", name)]);
        assert_eq!(lines(&telemetry, "forged").len(), 0);
        let told = lines(&telemetry, "evil_total");
        assert_eq!(told.len(), 1);
        let escaped = r#"column="a\"} 1\nforged_total{x=\"\\""#;
        assert!(told[0].contains(escaped), "{told:?}");
    }
}
