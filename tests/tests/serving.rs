//! Models in service on one machine: versions that take over under load, that are tried, promoted and taken
//! back.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Instant;

use emberline_tests::{Dev, Fleet, Traffic, seconds, traffic, wait_for};
use serde_json::json;

/// A served model with one live version.
fn served() -> (Fleet, Dev, String) {
    let fleet = Fleet::new();
    let dev = Dev::start_with(&fleet.place, &["--workers", "1"]);
    let first = fleet.deliver("good", 1, "");
    fleet.wait_for_outcome(&first, "live", seconds(20));
    let address = fleet.addresses().remove(0);
    (fleet, dev, address)
}

/// A canary of 20 % for a while, then of 60 %.
fn canary(hold: &str, more: &str) -> String {
    format!(
        ", strategy: {{ type: canary, steps: [ {{ weight: 20, for: {hold} }}, {{ weight: 60, for: {hold} }} ], min_requests: 30{more} }}"
    )
}

#[test]
fn versions_take_over_and_come_back_under_load_without_one_failed_request() {
    let (fleet, _dev, address) = served();
    let traffic = Traffic::start(&address, "pumps", 8);
    let all = |version: u32, at_least: u64| {
        let before = traffic.answered_by(version);
        wait_for("the version answers", seconds(10), || {
            (traffic.answered_by(version) > before + at_least).then_some(())
        });
    };
    all(1, 50);
    let second = fleet.deliver("good", 2, "");
    fleet.wait_for_outcome(&second, "live", seconds(20));
    all(2, 50);
    let back = fleet.json(&["rollback", "production"]);
    assert_eq!(
        (&back["deployment"]["version"], &back["failed"]["version"]),
        (&json!(1), &json!(2))
    );
    let asked = Instant::now();
    all(1, 20);
    let newest = |version| traffic.answered_by(version);
    let (one, two) = (newest(1), newest(2));
    all(1, 100);
    // What was on its way when it was told is all that the bad version still answered.
    assert!(
        newest(2) - two <= 8,
        "{} after {one} of the good one",
        newest(2) - two
    );
    eprintln!("the good version answers again after {:?}", asked.elapsed());
    let answers = traffic.stop();
    assert_eq!(answers.failures, Vec::<String>::new());
    assert_eq!(fleet.live()["version"], 1);
}

#[test]
fn a_good_canary_gets_its_share_by_a_stable_hash_and_is_promoted() {
    let (fleet, _dev, address) = served();
    let traffic = Traffic::start(&address, "pumps", 4);
    let second = fleet.deliver(
        "good",
        2,
        &canary(
            "1s",
            ", conditions: { max_error_rate: 0, max_latency: { limit: 5s } }",
        ),
    );
    assert_eq!(fleet.live()["coming"], second.as_str());
    let done = fleet.wait_for_outcome(&second, "live", seconds(60));
    assert_eq!(done["failure"], json!(null));
    assert!(done["rollout"]["exposed_at"].is_string(), "{done:#}");
    let models = fleet.json(&["models", "list"]);
    assert_eq!(models[0]["aliases"]["champion"], 2);
    let answers = traffic.stop();
    assert_eq!(answers.failures, Vec::<String>::new());
    // Whoever was in the canary of 20 % is there by the function that every replica shares.
    let first = answers.ids.iter().filter(|(_, version)| *version == "2");
    let in_canary = first.filter(|(id, _)| emberline_common::serving::share_of("pumps", id) < 6000);
    assert!(in_canary.count() > 30);
    let never = answers
        .ids
        .iter()
        .filter(|(id, _)| emberline_common::serving::share_of("pumps", id) >= 6000);
    assert!(never.clone().any(|(_, version)| version == "1"));
    let watch = fleet.call(&["deployments", "watch", &second]);
    assert_eq!(watch.code, Some(0), "{}", watch.stderr);
}

#[test]
fn a_bad_canary_is_taken_back_by_itself_and_counts_as_a_failed_deployment() {
    let (fleet, _dev, address) = served();
    let traffic = Traffic::start(&address, "pumps", 4);
    let bad = fleet.deliver(
        "bad",
        1,
        &canary("60s", ", conditions: { max_prediction_drift: 0.25 }"),
    );
    let done = fleet.wait_for_outcome(&bad, "aborted", seconds(60));
    let failure = &done["failure"];
    assert_eq!(failure["cause"], "canary_aborted");
    let why = failure["why"].as_str().unwrap();
    assert!(why.contains("max_prediction_drift"), "{why}");
    // From then on nobody is answered by it.
    wait_for("the old version answers all", seconds(2), || {
        let live = fleet.deployment("d1");
        let versions = &live["serving"]["replicas"][0]["versions"];
        (versions.as_array()?.len() == 1).then_some(())
    });
    let seen = traffic.answered_by(2);
    let others = traffic.answered_by(1);
    wait_for("more requests", seconds(10), || {
        (traffic.answered_by(1) > others + 200).then_some(())
    });
    assert_eq!(traffic.answered_by(2), seen);
    assert!(seen >= 30);
    let answers = traffic.stop();
    assert_eq!(answers.failures, Vec::<String>::new());
    assert_eq!(fleet.live()["version"], 1);
    let watch = fleet.call(&["deployments", "watch", &bad]);
    assert_eq!(watch.code, Some(1));
    assert!(watch.stderr.contains("aborted, failed"), "{}", watch.stderr);
    let dora = fleet.json(&["dora"]);
    let place = &dora["places"][0];
    assert_eq!(place["change_fail_rate"]["part"], 1, "{dora:#}");
    assert_eq!(place["change_fail_rate"]["whole"], 2);
}

#[test]
fn a_canary_waits_for_a_person_and_can_be_given_up_by_one() {
    let (fleet, _dev, address) = served();
    let _traffic = Traffic::start(&address, "pumps", 4);
    let asks = canary("10ms", ", approval: true");
    let second = fleet.deliver("good", 2, &asks);
    let waits = fleet.wait_for_phase(&second, "awaiting_approval");
    let note = waits["rollout"]["note"].as_str().unwrap();
    assert!(note.contains("deployments approve"), "{note}");
    let approved = fleet.json(&["deployments", "approve", &second]);
    assert_eq!(approved["outcome"], "live");
    let again = fleet.call(&["deployments", "approve", "d1"]);
    assert_eq!(again.code, Some(2));
    assert!(again.stderr.contains("`d1`"), "{}", again.stderr);

    let third = fleet.deliver("good", 3, &asks);
    fleet.wait_for_phase(&third, "awaiting_approval");
    let back = fleet.json(&["rollback", "production", "--why", "not today"]);
    assert_eq!(back["failed"]["deployment"], third.as_str());
    assert_eq!(back["failed"]["outcome"], "aborted");
    assert_eq!(fleet.live()["version"], 2);
}

#[test]
fn a_version_that_would_refuse_what_clients_send_never_takes_over() {
    let (fleet, _dev, _) = served();
    let good = std::fs::read_to_string(fleet.place.path("good.csv")).unwrap();
    fleet
        .place
        .write("wide.csv", good.replace("pressure", "bar"));
    let refused = {
        let before = fleet.place.path("pumps.yaml");
        let text = std::fs::read_to_string(before)
            .unwrap()
            .replace("good.csv", "wide.csv");
        fleet.place.write("wide.yaml", text);
        fleet.call(&["run", "wide.yaml", "-q"])
    };
    assert_eq!(refused.code, Some(1));
    for part in ["`pressure`", "`bar`", "allow_schema_change"] {
        assert!(refused.stderr.contains(part), "{part}: {}", refused.stderr);
    }
    let newest = fleet.json(&["deployments", "list", "--limit", "1"]);
    assert_eq!(newest[0]["outcome"], "caught_before_exposure");
    assert_eq!(fleet.live()["version"], 1);
    let allowed = fleet.deliver("wide", 1, ", allow_schema_change: true");
    fleet.wait_for_outcome(&allowed, "live", seconds(20));
}

#[test]
fn a_killed_process_serves_again_what_was_live() {
    let (fleet, dev, _) = served();
    dev.kill();
    let _dev = Dev::start_with(&fleet.place, &["--workers", "1"]);
    let address = wait_for("it is served again", seconds(20), || {
        let live = fleet.live();
        let versions = live["replicas"][0]["versions"].as_array()?;
        (versions.first()?["state"] == "ready").then(|| fleet.addresses().remove(0))
    });
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let answer = runtime.block_on(async {
        let mut client = traffic::connect(&address).await;
        client.model_infer(traffic::request("pumps", "x", 60)).await
    });
    assert_eq!(answer.unwrap().into_inner().model_version, "1");
}

#[test]
fn labels_come_back_by_request_id_and_are_seen_of_each_version() {
    let (fleet, _dev, address) = served();
    let traffic = Traffic::start(&address, "pumps", 2);
    wait_for("enough requests", seconds(20), || {
        (traffic.answered_by(1) >= 64).then_some(())
    });
    let answers = traffic.stop();
    let truth = |n: u64| {
        if n % traffic::PRESSURES > 31 {
            "worn"
        } else {
            "healthy"
        }
    };
    let mut lines: Vec<String> = (0..64)
        .map(|n| json!({"id": format!("r-{n}"), "row": 0, "label": truth(n)}).to_string())
        .collect();
    assert!(answers.ids.contains_key("r-63"));
    // Told twice, too late or never answered, and what no label can be.
    lines.extend([
        lines[0].clone(),
        json!({"id": "r-x", "label": "worn"}).to_string(),
    ]);
    fleet.place.write("labels.jsonl", lines.join("\n"));
    let told = fleet.call(&["feedback", "pumps", "labels.jsonl"]);
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    assert_eq!(
        told.stdout.trim(),
        "64 counted, 1 repeated, 1 unknown, 0 refused"
    );
    let counted = wait_for("the leader has heard of it", seconds(10), || {
        let counted = fleet.deployment("d1")["serving"]["version"].clone();
        (counted["labels"] == 64).then_some(counted)
    });
    assert!(counted["accuracy"].as_f64().unwrap() > 0.9, "{counted:#}");
    let wrong = json!({"id": "r-5", "row": 7, "label": "worn"}).to_string();
    fleet.place.write("wrong.jsonl", wrong);
    for (arguments, part) in [
        (&["feedback", "pumps", "wrong.jsonl"][..], "row 7"),
        (&["feedback", "pump", "labels.jsonl"], "no `pump` is live"),
        (&["feedback", "pumps", "none.jsonl"], "none.jsonl"),
        (&["feedback", "pumps", "pumps.yaml"], "pumps.yaml:1:1"),
    ] {
        let told = fleet.call(arguments);
        assert_eq!(told.code, Some(2), "{arguments:?}");
        assert!(told.stderr.contains(part), "{arguments:?}: {}", told.stderr);
    }
}

#[test]
fn a_version_that_labels_show_to_be_worse_is_taken_back() {
    let (fleet, _dev, address) = served();
    let traffic = Traffic::start(&address, "pumps", 4);
    let bad = fleet.deliver(
        "bad",
        1,
        ", strategy: { type: canary, steps: [ { weight: 50, for: 60s } ], min_requests: 20, conditions: { quality: { metric: accuracy, tolerance: 0.1, min_labels: 20 } } }",
    );
    let mut told = 0;
    let done = wait_for("it is given up", seconds(60), || {
        let answers = traffic.so_far();
        let labels: Vec<String> = (answers.ids.keys())
            .filter_map(|id| id.strip_prefix("r-")?.parse::<u64>().ok())
            .filter(|n| *n >= told)
            .map(|n| {
                let truth = if n % traffic::PRESSURES > 31 {
                    "worn"
                } else {
                    "healthy"
                };
                json!({"id": format!("r-{n}"), "label": truth}).to_string()
            })
            .collect();
        told += labels.len() as u64;
        if !labels.is_empty() {
            fleet.place.write("labels.jsonl", labels.join("\n"));
            let call = fleet.call(&["feedback", "pumps", "labels.jsonl", "-q"]);
            assert_eq!(call.code, Some(0), "{}", call.stderr);
        }
        let now = fleet.deployment(&bad);
        (now["outcome"] != "in_progress").then_some(now)
    });
    assert_eq!(done["outcome"], "aborted");
    let why = done["failure"]["why"].as_str().unwrap();
    assert!(why.contains("`quality`: accuracy"), "{why}");
    assert_eq!(traffic.stop().failures, Vec::<String>::new());
}
