//! Labels that come back, the log of predictions, and drift.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{collections::BTreeMap, time::Duration};

use emberline_common::serving::{ServingLimits, Traffic};
use emberline_data::{schema::Value, table::Table};
use emberline_proto::v1::{
    FeedbackLabel, FeedbackResult, SubmitFeedbackRequest, feedback_label::Truth,
    feedback_service_client::FeedbackServiceClient,
};
use emberline_worker::serving::Serving as _;
use futures::TryStreamExt as _;
use object_store::ObjectStoreExt as _;
use serde_json::json;
use support::*;

fn label(id: &str, row: u32, class: &str) -> FeedbackLabel {
    FeedbackLabel {
        request_id: id.to_owned(),
        row,
        truth: Some(Truth::Class(class.to_owned())),
    }
}

async fn submit(served: &Served, labels: Vec<FeedbackLabel>) -> Vec<(FeedbackResult, u32, String)> {
    let mut client = FeedbackServiceClient::new(served.channel().await);
    let request = SubmitFeedbackRequest {
        model: "factory".to_owned(),
        labels,
        relayed: false,
    };
    let outcomes = client
        .submit_feedback(request)
        .await
        .unwrap()
        .into_inner()
        .outcomes;
    let one = |o: emberline_proto::v1::FeedbackOutcome| (o.result(), o.version, o.why);
    outcomes.into_iter().map(one).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_are_held_against_what_was_predicted() {
    let served = Served::factory().await;
    let machines: Vec<Machine> = (0..4).map(machine).collect();
    let answer = served
        .grpc()
        .await
        .model_infer(factory_request("r", &machines))
        .await;
    let answer = answer.unwrap().into_inner();
    let said: Vec<String> = (answer.outputs[1]
        .contents
        .as_ref()
        .unwrap()
        .bytes_contents
        .iter())
    .map(|class| String::from_utf8(class.to_vec()).unwrap())
    .collect();
    let wrong = if said[1] == "yes" { "no" } else { "yes" };
    let outcomes = submit(
        &served,
        vec![
            label("r", 0, &said[0]),
            label("r", 1, wrong),
            label("r", 0, wrong),
            label("r", 4, "yes"),
            label("who", 0, "yes"),
            label("r", 2, "perhaps"),
            FeedbackLabel {
                truth: Some(Truth::Value(1.5)),
                ..label("r", 3, "")
            },
        ],
    )
    .await;
    use FeedbackResult::{Counted, Refused, Repeated, Unknown};
    let results: Vec<_> = outcomes.iter().map(|o| o.0).collect();
    assert_eq!(
        results,
        [
            Counted, Counted, Repeated, Refused, Unknown, Counted, Refused
        ]
    );
    assert_eq!((outcomes[0].1, outcomes[2].1), (1, 1));
    for (at, expected) in [
        (2, "had a label already"),
        (3, "the request had 4 rows: there is no row 4"),
        (
            4,
            "no request with this id was answered within the last 60 minutes",
        ),
        (5, "the model does not know the class `perhaps`"),
        (6, "the model predicts classes"),
    ] {
        assert!(outcomes[at].2.contains(expected), "{}", outcomes[at].2);
    }
    let quality = served.version("factory", 1).unwrap().stats.quality;
    assert_eq!((quality.labels, quality.correct), (3, 1));

    // Over REST, with what a label may look like there.
    let body = json!({ "labels": [
        { "id": "r", "row": 3, "label": said[3] },
        { "id": "r", "row": 3, "label": true },
    ] });
    let answer = served.post("/v2/models/factory/feedback", &body).await;
    assert_eq!(answer.status, 200);
    let results = answer.json()["results"].clone();
    assert_eq!(
        results[0],
        json!({"id": "r", "row": 3, "result": "counted", "model_version": "1"})
    );
    assert_eq!(results[1]["result"], "repeated");
    for (body, expected) in [
        (json!({}), "missing field `labels`"),
        (json!({"labels": [{"id": "r"}]}), "missing field `label`"),
        (
            json!({"labels": [{"id": "r", "label": [1]}]}),
            "the body is no feedback",
        ),
    ] {
        let answer = served.post("/v2/models/factory/feedback", &body).await;
        assert_eq!(answer.status, 400);
        assert!(answer.error().contains(expected), "{}", answer.error());
    }
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_is_also_held_against_what_a_shadow_said() {
    let served_by = Served::start().await;
    let one = served_by.place.put(&FACTORY).await;
    let two = served_by.place.put(&FACTORY_2).await;
    let shadow = Traffic::Shadow { share: 10_000 };
    let versions = vec![served(1, one, Traffic::Live), served(2, two, shadow)];
    served_by.apply(plan(1, vec![model("factory", versions)]));
    served_by.until_ready().await;
    let mut client = served_by.grpc().await;
    let stats = |version| served_by.version("factory", version).unwrap().stats;
    // A copy that was computed before the answer was noted is not remembered: rare, and no harm.
    let mut labelled = 0;
    while stats(2).quality.labels == 0 {
        let id = format!("r-{labelled}");
        client
            .model_infer(factory_request(&id, &[machine(7)]))
            .await
            .unwrap();
        labelled += 1;
        served_by
            .until("the shadow has seen it", || {
                (stats(2).requests + stats(2).overloaded == labelled).then_some(())
            })
            .await;
        submit(&served_by, vec![label(&id, 0, "yes")]).await;
        assert!(labelled < 100, "no label was held against the shadow");
    }
    assert_eq!(stats(1).quality.labels, labelled);
    served_by.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_finds_the_replica_that_had_answered() {
    let first = Served::factory().await;
    let second = Served::start_with(config("w2")).await;
    let artifact = second.place.put(&FACTORY).await;
    let mut with_peers = model("factory", vec![served(1, artifact, Traffic::Live)]);
    // One of them is not there.
    with_peers.peers = vec![first.address.to_string(), "127.0.0.1:1".to_owned()];
    second.apply(plan(1, vec![with_peers]));
    second.until_ready().await;
    first
        .grpc()
        .await
        .model_infer(factory_request("r", &[machine(1)]))
        .await
        .unwrap();
    let outcomes = submit(&second, vec![label("r", 0, "no"), label("s", 0, "no")]).await;
    let results: Vec<_> = outcomes.iter().map(|o| o.0).collect();
    assert_eq!(results, [FeedbackResult::Counted, FeedbackResult::Unknown]);
    let again = submit(&second, vec![label("r", 0, "no")]).await;
    assert_eq!(again[0].0, FeedbackResult::Repeated);
    let labels = |served: &Served| served.version("factory", 1).unwrap().stats.quality.labels;
    assert_eq!((labels(&first), labels(&second)), (1, 0));
    first.server.stop().await;
    second.server.stop().await;
}

/// All Parquet files below a prefix, by key.
async fn tables(served: &Served, prefix: &str) -> BTreeMap<String, Table> {
    let store = served.place.store.logs();
    let prefix = object_store::path::Path::from(prefix);
    let found: Vec<_> = store.list(Some(&prefix)).try_collect().await.unwrap();
    let mut tables = BTreeMap::new();
    for object in found {
        let bytes = store
            .get(&object.location)
            .await
            .unwrap()
            .bytes()
            .await
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("part-0.parquet"), bytes).unwrap();
        let table = Table::read_dir(dir.path()).unwrap();
        tables.insert(object.location.to_string(), table);
    }
    tables
}

#[tokio::test(flavor = "multi_thread")]
async fn predictions_and_labels_are_written_and_read_back() {
    let served = Served::start().await;
    served
        .serve_factory(ServingLimits {
            log_per_million: 1_000_000,
            ..limits()
        })
        .await;
    let mut client = served.grpc().await;
    let mut expected = BTreeMap::new();
    for n in 0..20 {
        let machines = [machine(n), machine(n + 100)];
        let id = format!("r-{n}");
        let answer = client
            .model_infer(factory_request(&id, &machines))
            .await
            .unwrap();
        expected.insert(id, probabilities(&answer.into_inner()));
    }
    submit(&served, vec![label("r-3", 1, "yes")]).await;
    served.server.stop().await;

    let logged = tables(&served, "predictions/production/factory/1").await;
    let (key, table) = logged.first_key_value().unwrap();
    let name = key.rsplit('/').next().unwrap();
    assert!(
        name.starts_with("w1-") && name.ends_with(".parquet"),
        "{key}"
    );
    let day: &str = key.split('/').nth(4).unwrap();
    assert_eq!((day.len(), logged.len(), table.rows), (10, 1, 40));
    let at = |column: &str, row: usize| table.require(column).unwrap().value(row);
    for row in 0..40 {
        let Value::Text(id) = at("_request_id", row) else {
            panic!()
        };
        let Value::Integer(of_request) = at("_row", row) else {
            panic!()
        };
        let n: usize = id[2..].parse().unwrap();
        let sent = machine(n + 100 * of_request as usize);
        assert_eq!(at("kind", row), Value::Text(sent.kind));
        assert_eq!(at("torque", row), Value::Float(sent.torque));
        assert_eq!(at("speed", row), Value::Integer(sent.speed));
        assert_eq!(at("old", row), Value::Boolean(sent.old));
        let of_row = &expected[id][2 * of_request as usize..][..2];
        assert_eq!(at("_probability_no", row), Value::Float(of_row[0]));
        assert_eq!(at("_probability_yes", row), Value::Float(of_row[1]));
        let class = if of_row[1] > of_row[0] { "yes" } else { "no" };
        assert_eq!(at("_class", row), Value::Text(class));
    }
    let labels = tables(&served, "labels/production/factory/1").await;
    let (_, table) = labels.first_key_value().unwrap();
    assert_eq!(table.rows, 1);
    assert_eq!(
        table.require("_label").unwrap().value(0),
        Value::Text("yes")
    );
    assert_eq!(table.require("_row").unwrap().value(0), Value::Integer(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_also_written_while_it_serves() {
    let served = Served::start_limited(|limits| limits.log_every = Duration::from_millis(20)).await;
    served
        .serve_factory(ServingLimits {
            log_per_million: 1_000_000,
            ..limits()
        })
        .await;
    served
        .grpc()
        .await
        .model_infer(factory_request("", &[machine(1)]))
        .await
        .unwrap();
    let deadline = std::time::Instant::now() + WITHIN;
    while tables(&served, "predictions").await.is_empty() {
        assert!(std::time::Instant::now() < deadline, "nothing was written");
        tokio::task::yield_now().await;
    }
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_unlike_those_of_the_training_are_seen() {
    let served = Served::factory().await;
    let mut client = served.grpc().await;
    let like: Vec<Machine> = (0..300).map(machine).collect();
    client
        .model_infer(factory_request("", &like))
        .await
        .unwrap();
    let stats = served.version("factory", 1).unwrap().stats;
    assert_eq!(stats.input_drift.len(), 4);
    for drifted in &stats.input_drift {
        assert!(drifted.psi < 0.01 && drifted.values == 300, "{drifted:?}");
    }
    assert!(
        stats.prediction_drift.unwrap() < 0.01,
        "{:?}",
        stats.prediction_drift
    );
    for _ in 0..5 {
        let moved = (0..300).map(|n| Machine {
            torque: machine(n).torque + 8.0,
            kind: "XXL",
            ..machine(n)
        });
        let moved: Vec<Machine> = moved.collect();
        client
            .model_infer(factory_request("", &moved))
            .await
            .unwrap();
    }
    let stats = served.version("factory", 1).unwrap().stats;
    let of = |name: &str| {
        let drifted = stats.input_drift.iter().find(|d| d.column == name);
        drifted.unwrap().psi
    };
    assert!(
        of("torque") > 0.5 && of("kind") > 0.5,
        "{:?}",
        stats.input_drift
    );
    assert!(
        of("speed") < 0.01 && of("old") < 0.01,
        "{:?}",
        stats.input_drift
    );
    assert!(stats.input_drift[0].psi >= stats.input_drift[1].psi);
    assert!(
        stats.prediction_drift.unwrap() > 0.1,
        "{:?}",
        stats.prediction_drift
    );
    served.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_of_before_references_is_served_without_drift() {
    let mut old = FACTORY.clone();
    let mut document: serde_json::Value = serde_json::from_slice(&old.document).unwrap();
    assert!(
        document
            .as_object_mut()
            .unwrap()
            .remove("reference")
            .is_some()
    );
    old.document = serde_json::to_vec(&document).unwrap();
    let served_by = Served::start().await;
    let artifact = served_by.place.put(&old).await;
    let versions = vec![served(1, artifact, Traffic::Live)];
    served_by.apply(plan(1, vec![model("factory", versions)]));
    served_by.until_ready().await;
    let request = factory_request("", &[machine(1)]);
    served_by.grpc().await.model_infer(request).await.unwrap();
    let stats = served_by.version("factory", 1).unwrap().stats;
    assert_eq!(
        (
            stats.requests,
            stats.input_drift.len(),
            stats.prediction_drift
        ),
        (1, 0, None)
    );
    served_by.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_store_does_not_take_is_dropped_and_counted() {
    let mut config = config("w1");
    let setup = emberline_common::telemetry::Setup {
        service: "emberline-worker",
        instance: "test".to_owned(),
    };
    config.telemetry = emberline_common::telemetry::Telemetry::start(&setup).unwrap();
    config.limits.log_every = Duration::from_millis(20);
    let served = Served::start_with(config).await;
    let limits = ServingLimits {
        log_per_million: 1_000_000,
        ..limits()
    };
    served.serve_factory(limits).await;
    // A file where the logs' directory would be.
    std::fs::write(served.place.path().join("store/predictions"), "").unwrap();
    served
        .grpc()
        .await
        .model_infer(factory_request("", &[machine(1)]))
        .await
        .unwrap();
    let deadline = std::time::Instant::now() + WITHIN;
    loop {
        let page = served.get("/metrics").await;
        let page = String::from_utf8(page.body).unwrap();
        let dropped = page
            .lines()
            .find(|l| l.starts_with("emberline_serving_log_dropped_total"));
        if dropped.is_some_and(|line| line.ends_with(" 1")) {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{page}");
    }
    served.server.stop().await;
}
