//! Metrics and spans of requests, as those who watch get them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use emberline_common::{
    serving::Traffic,
    telemetry::{Setup, SpanKind, Telemetry},
};
use emberline_worker::serving::Serving as _;
use serde_json::json;
use support::*;

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// As Prometheus has them: docs/guide/telemetry.md lists the same.
const METRICS: [&str; 9] = [
    "emberline_serving_requests_total",
    "emberline_serving_request_duration_seconds",
    "emberline_serving_batch_size",
    "emberline_serving_queue_rows",
    "emberline_serving_drift_ratio",
    "emberline_serving_prediction_drift_ratio",
    "emberline_serving_labels_total",
    "emberline_serving_quality_ratio",
    "emberline_serving_log_dropped_total",
];

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_is_on_the_page_and_counts_right() {
    let mut config = config("w1");
    let setup = Setup {
        service: "emberline-worker",
        instance: "test".to_owned(),
    };
    config.telemetry = Telemetry::start(&setup).unwrap();
    let served = Served::start_with(config).await;
    served.serve_factory(limits()).await;
    let mut client = served.grpc().await;
    for n in 0..3 {
        let request = factory_request(&format!("r-{n}"), &[machine(n)]);
        client.model_infer(request).await.unwrap();
    }
    let mut bad = factory_request("", &[machine(1)]);
    bad.inputs.pop();
    client.model_infer(bad).await.unwrap_err();
    let body = json!({ "labels": [{ "id": "r-1", "label": "no" }] });
    served.post("/v2/models/factory/feedback", &body).await;
    let page = served.get("/metrics").await;
    assert_eq!(page.status, 200);
    let page = String::from_utf8(page.body).unwrap();
    for name in METRICS {
        assert!(
            page.contains(&format!("# TYPE {name} ")),
            "{name} is not on {page}"
        );
    }
    let value = |name: &str, with: &[&str]| -> f64 {
        let line = page.lines().find(|line| {
            line.starts_with(&format!("{name}{{")) && with.iter().all(|w| line.contains(w))
        });
        let line = line.unwrap_or_else(|| panic!("no {name} {with:?} on {page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let of = "emberline_model_name=\"factory\"";
    let requests = "emberline_serving_requests_total";
    assert_eq!(value(requests, &[of, "outcome=\"answered\""]), 3.0);
    assert_eq!(value(requests, &[of, "outcome=\"rejected\""]), 1.0);
    assert_eq!(
        value("emberline_serving_request_duration_seconds_count", &[of]),
        3.0
    );
    assert_eq!(value("emberline_serving_batch_size_sum", &[of]), 3.0);
    assert_eq!(value("emberline_serving_labels_total", &[of]), 1.0);
    assert_eq!(value("emberline_serving_queue_rows", &[of]), 0.0);
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_part_of_its_callers_trace() {
    let mut config = config("w1");
    let (telemetry, mut spans) = Telemetry::collecting(100);
    config.telemetry = telemetry;
    config.limits.root_spans_per_second = 1;
    let served = Served::start_with(config).await;
    served.serve_factory(limits()).await;
    let mut client = served.grpc().await;
    let mut request = tonic::Request::new(factory_request("r-1", &[machine(1), machine(2)]));
    let sampled = TRACEPARENT.parse().unwrap();
    request.metadata_mut().insert("traceparent", sampled);
    client.model_infer(request).await.unwrap();
    let span = spans.try_recv().unwrap();
    assert_eq!(
        (span.name.as_str(), span.kind),
        ("infer factory", SpanKind::Server)
    );
    assert_eq!(span.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(span.parent.unwrap().to_string(), "b7ad6b7169203331");
    assert!(span.parent_is_remote && span.end >= span.start && span.error.is_none());
    let attribute = |name: &str| {
        let found = span.attributes.iter().find(|a| a.key.as_str() == name);
        found
            .unwrap_or_else(|| panic!("no {name}"))
            .value
            .to_string()
    };
    assert_eq!(attribute("emberline.request.id"), "r-1");
    assert_eq!(attribute("emberline.request.rows"), "2");
    assert_eq!(attribute("emberline.model.name"), "factory");
    assert_eq!(attribute("emberline.model.version"), "1");

    // Over REST, and one that is refused.
    let body = factory_body("", &[machine(1)]).to_string();
    let header = format!("traceparent: {TRACEPARENT}\r\n");
    let path = "/v2/models/factory/versions/7/infer";
    served.post_bytes(path, body.as_bytes(), &header).await;
    let span = spans.try_recv().unwrap();
    assert!(span.error.unwrap().contains("has no version `7`"));

    // One whose caller does not record it, and of those without a caller as many as was said.
    let unsampled = TRACEPARENT.replace("-01", "-00");
    let header = format!("traceparent: {unsampled}\r\n");
    let path = "/v2/models/factory/infer";
    served.post_bytes(path, body.as_bytes(), &header).await;
    assert!(spans.try_recv().is_err());
    let began = std::time::Instant::now();
    for n in 0..20 {
        client
            .model_infer(factory_request("", &[machine(n)]))
            .await
            .unwrap();
    }
    let mut roots = 0;
    while let Ok(span) = spans.try_recv() {
        assert_eq!(span.parent, None);
        roots += 1;
    }
    assert!(
        roots >= 1 && roots <= 2 + began.elapsed().as_secs(),
        "{roots}"
    );
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_fails_is_told_at_once() {
    let served = Served::start().await;
    let mut broken = TRIPLE.clone();
    let mut document: serde_json::Value = serde_json::from_slice(&broken.document).unwrap();
    // What it gives for a large `x` is beyond all numbers.
    document["preprocessing"]["label"]["mean"] = json!(1e308);
    document["preprocessing"]["label"]["deviation"] = json!(1e308);
    broken.document = serde_json::to_vec(&document).unwrap();
    let artifact = served.place.put(&broken).await;
    let versions = vec![support::served(1, artifact, Traffic::Live)];
    served.apply(plan(1, vec![model("triple", versions)]));
    served.until_ready().await;
    // What was told so far has been heard.
    let heard = served.server.changed().notified();
    let _ = tokio::time::timeout(std::time::Duration::from_millis(1), heard).await;
    let told = served.server.changed().notified();
    let body = json!({ "inputs": [
        { "name": "x", "datatype": "FP64", "shape": [1], "data": [20.0] },
    ] });
    let answer = served.post("/v2/models/triple/infer", &body).await;
    assert_eq!(answer.status, 500);
    assert_eq!(
        answer.error(),
        "version 1 of the model `triple` gave an answer that is no finite number"
    );
    tokio::time::timeout(WITHIN, told).await.unwrap();
    let stats = served.version("triple", 1).unwrap().stats;
    assert_eq!(
        (stats.errors, stats.requests, stats.error_rate()),
        (1, 1, Some(1.0))
    );
    served.server.stop().await;
}
