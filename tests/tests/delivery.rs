//! What is delivered, as a team sees it: changes from its Git repository, deployments, rollbacks,
//! what outside systems tell, and DORA's metrics out of all that.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use emberline_proto::v1::{TakeEventRequest, dora_service_client::DoraServiceClient};
use emberline_tests::{
    Dev, Place,
    cdevents::event,
    http,
    place::millis,
    team::{PIPELINE, Team, ago},
};
use serde_json::{Value, json};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

fn seconds_of(micros: &Value) -> u64 {
    micros
        .as_u64()
        .unwrap_or_else(|| panic!("{micros} is no number"))
        / 1_000_000
}

/// The metrics of the only place that there is.
fn only_place(team: &Team, arguments: &[&str]) -> Value {
    let report = team.json(&[&["dora"], arguments].concat());
    let places = report["places"].as_array().unwrap();
    assert_eq!(places.len(), 1, "{report:#}");
    places[0].clone()
}

/// So long ago, give or take what the test itself takes.
#[track_caller]
fn about(seconds: u64, expected: u64) {
    assert!(
        (expected..expected + 120).contains(&seconds),
        "{seconds} s, not {expected}"
    );
}

#[test]
fn the_change_is_read_from_the_work_tree_with_the_commits_since_the_deployment_before() {
    let team = Team::new();
    let one = team.tree.commit("One", ago(3 * DAY));
    team.run(1, &["--change-id", "17", "--trigger", "commit"]);
    let two = team.tree.commit("Two", ago(2 * DAY));
    let three = team.tree.commit("Three", ago(DAY));
    // A file that Git follows is other than what was committed.
    team.place
        .write("tree/pumps.yaml", format!("{PIPELINE}# dirty\n"));
    let run = team.run(2, &[]);
    let deployments = team.deployments();
    let [first, second] = deployments.as_slice() else {
        panic!("{deployments:#?}");
    };
    let change = &first["change"];
    assert_eq!(change["revision"], one.as_str());
    assert_eq!(change["repository"], "https://git.example.org/pumps.git");
    assert_eq!(
        (&change["branch"], &change["id"]),
        (&json!("main"), &json!("17"))
    );
    assert_eq!(change["dirty"], false);
    // What was there before the first deployment is no change that it has brought.
    assert_eq!(change["commits"], json!([]));
    let change = &second["change"];
    assert_eq!(
        (&change["revision"], &change["dirty"]),
        (&json!(three), &json!(true))
    );
    let commits: Vec<_> = change["commits"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["revision"].as_str().unwrap())
        .collect();
    assert_eq!(commits, [three.as_str(), &two]);
    assert_eq!(second["trace_id"], run["trace_id"]);
    let place = only_place(&team, &[]);
    let lead = &place["change_lead_time"];
    assert_eq!(
        (&lead["count"], &lead["deployments"]),
        (&json!(3), &json!(2))
    );
    about(seconds_of(&lead["median_micros"]), 2 * DAY);
    about(seconds_of(&lead["p95_micros"]), 3 * DAY);
    assert_eq!(lead["bucket"], "day_to_week");
    assert_eq!(lead["level"], json!({ "year": 2023, "name": "high" }));
}

#[test]
fn without_a_repository_the_pipeline_and_the_data_are_the_change() {
    let place = Place::new();
    let rows: String = (1..=16)
        .map(|x| format!("{x},{}\n", if x % 2 == 0 { "worn" } else { "healthy" }))
        .collect();
    place.write("pumps.csv", format!("pressure,state\n{rows}"));
    place.write("pumps.yaml", PIPELINE);
    let day = std::time::SystemTime::now() - std::time::Duration::from_secs(DAY);
    for file in ["pumps.csv", "pumps.yaml"] {
        let file = std::fs::File::options()
            .append(true)
            .open(place.path(file))
            .unwrap();
        file.set_modified(day).unwrap();
    }
    let run = place.json(&["run", "pumps.yaml", "-q"]);
    let shown = place.json(&["deployments", "show", "d1"]);
    assert_eq!(shown["change"]["kind"], "pipeline");
    assert_eq!(shown["change"]["revision"], run["revision"]);
    assert_eq!(
        (&shown["change"]["repository"], &shown["change"]["commits"]),
        (&json!(""), &json!([]))
    );
    let report = place.json(&["dora"]);
    for metric in ["change_lead_time", "data_lead_time"] {
        about(
            seconds_of(&report["places"][0][metric]["median_micros"]),
            DAY,
        );
    }
    // The same pipeline and the same data once more are nothing new.
    place.json(&["run", "pumps.yaml", "-q", "-p", "seed=2"]);
    let report = place.json(&["dora"]);
    assert_eq!(report["places"][0]["counts"]["deployments"], 2);
    assert_eq!(report["places"][0]["change_lead_time"]["count"], 1);
    assert_eq!(report["places"][0]["data_lead_time"]["count"], 1);
}

#[test]
fn a_lead_time_is_cut_into_segments_that_add_up_to_it() {
    let team = Team::new();
    let revision = team.tree.commit("One", ago(5 * HOUR));
    let run = team.run(1, &[]);
    let explained = team.json(&["dora", "explain", "d1"]);
    assert_eq!(
        (&explained["run"], &explained["revision"]),
        (&run["run"], &json!(revision))
    );
    assert_eq!(explained["trace_id"], run["trace_id"]);
    let segments = explained["segments"].as_array().unwrap();
    let mut at = millis(&explained["began_at"]) * 1000;
    for segment in segments {
        let text: jiff::Timestamp = segment["from"].as_str().unwrap().parse().unwrap();
        let from = u64::try_from(text.as_microsecond()).unwrap();
        assert_eq!(from, at, "{explained:#}");
        at += segment["micros"].as_u64().unwrap();
    }
    assert_eq!(
        at / 1000,
        millis(&explained["finished_at"]),
        "{explained:#}"
    );
    let sum: u64 = segments.iter().map(|s| s["micros"].as_u64().unwrap()).sum();
    assert_eq!(explained["total_micros"], sum);
    about(seconds_of(&explained["total_micros"]), 5 * HOUR);
    assert_eq!(segments[0]["kind"], "commit_to_accepted");
    // All of the run's tasks lie on one path.
    let tasks: Vec<_> = segments
        .iter()
        .filter(|s| s["kind"] == "stage" || s["kind"] == "deploy")
        .map(|s| s["task"].as_str().unwrap())
        .collect();
    assert_eq!(tasks, ["raw", "table", "train", "deploy"]);
    assert_eq!(explained["changes"][0]["revision"], revision.as_str());
    let text = team
        .place
        .emberline(&["dora", "explain", "d1"])
        .run()
        .expect_code(0)
        .stdout;
    for part in [
        "commit → run accepted",
        "FIRST CARRIED HERE",
        &revision,
        run["trace_id"].as_str().unwrap(),
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn failures_repairs_and_rollbacks_count_as_they_are_defined() {
    let team = Team::new();
    team.tree.commit("One", ago(DAY));
    team.run(1, &[]);
    team.tree.commit("Two", ago(HOUR));
    team.run(2, &[]);
    let rolled = team.json(&["rollback", "production", "--why", "worse"]);
    assert_eq!(
        (
            &rolled["deployment"]["version"],
            &rolled["failed"]["deployment"]
        ),
        (&json!(1), &json!("d2"))
    );
    team.tree.commit("Three", ago(60));
    team.run(3, &["--repairs", "d2"]);
    let place = only_place(&team, &[]);
    let counts = &place["counts"];
    for (name, number) in [
        ("deployments", 3),
        ("successful", 3),
        ("failed", 1),
        ("repairs", 1),
        ("rollbacks", 1),
        ("unsettled", 2),
        ("not_recovered", 0),
    ] {
        assert_eq!(counts[name], number, "{name} in {place:#}");
    }
    assert_eq!(
        (
            &place["change_fail_rate"]["part"],
            &place["change_fail_rate"]["whole"]
        ),
        (&json!(1), &json!(3))
    );
    // The repair and the rollback, of three deployments and a rollback.
    assert_eq!(
        (
            &place["rework_rate"]["part"],
            &place["rework_rate"]["whole"]
        ),
        (&json!(2), &json!(4))
    );
    assert_eq!(place["recovery_time"]["count"], 1);
    assert_eq!(place["recovery_time"]["bucket"], "under_an_hour");
    let with = only_place(&team, &["--include-rollbacks"]);
    assert_eq!(with["counts"]["deployments"], 4);
    // A failure that comes later than it may does not count.
    let strict = only_place(&team, &["--failure-window", "1ms"]);
    assert_eq!(strict["counts"]["failed"], 0, "{strict:#}");
    // A window before all that is empty, and says so.
    let text = team
        .place
        .emberline(&["dora", "--since", "2020-01-01", "--until", "2020-02-01"])
        .run()
        .expect_code(0)
        .stdout;
    assert!(
        text.contains("no deployments") && !text.contains("NaN") && !text.contains(" 0 "),
        "{text}"
    );
    let text = team.place.emberline(&["dora"]).run().expect_code(0).stdout;
    for part in [
        "33.3 %",
        "1 of 3",
        "(2023)",
        "rollbacks: 1 (rework, and no deployments)",
        "under an hour",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn environments_are_apart_and_a_mark_makes_a_deployment_failed() {
    let team = Team::new();
    let staged = PIPELINE
        .replace(
            "alias: champion",
            "alias: champion, environment: \"${params.to}\"",
        )
        .replace("{ seed: 1 }", "{ seed: 1, to: staging }");
    team.place.write("tree/pumps.yaml", staged);
    team.tree.commit("One", ago(2 * HOUR));
    team.run(1, &["-p", "to=staging"]);
    team.run(1, &["-p", "to=production"]);
    let report = team.json(&["dora"]);
    let environments: Vec<_> = report["places"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["environment"].as_str().unwrap())
        .collect();
    assert_eq!(environments, ["production", "staging"]);
    for place in report["places"].as_array().unwrap() {
        // The change is new to each of them.
        assert_eq!(place["change_lead_time"]["count"], 1, "{report:#}");
    }
    let marked = team.json(&["deployments", "mark-failed", "d2", "--why", "too slow"]);
    assert_eq!(marked["failure"]["cause"], "marked");
    let place = only_place(&team, &["--environment", "production"]);
    assert_eq!(
        (
            &place["counts"]["failed"],
            &place["counts"]["not_recovered"]
        ),
        (&json!(1), &json!(1))
    );
    assert_eq!(place["recovery_time"], Value::Null);
    let place = only_place(&team, &["--environment", "staging"]);
    assert_eq!(place["counts"]["failed"], 0);
}

#[test]
fn merges_and_incidents_that_others_tell_feed_the_metrics() {
    let team = Team::new();
    let dev = Dev::start(&team.place);
    let revision = team.tree.commit("One", ago(4 * HOUR));
    // The merge is told before the deployment, the incident after it; by HTTP, file and gRPC.
    let mut merged = event(
        "change.merged",
        "17",
        ago(3 * HOUR),
        &json!({ "repository": { "id": "pumps" } }),
    );
    merged["customData"] = json!({ "revision": revision });
    let answer = http::post(&dev.address, "/events", &merged.to_string());
    assert_eq!(answer.expect_ok().trim(), r#"{"noted":true}"#);
    let again = http::post(&dev.address, "/events", &merged.to_string()).expect_ok();
    assert!(again.contains("\"noted\":false"), "{again}");
    team.run(1, &[]);
    let explained = team.json(&["dora", "explain", "d1"]);
    let kinds: Vec<_> = explained["segments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| (s["kind"].as_str().unwrap(), seconds_of(&s["micros"])))
        .collect();
    assert_eq!(kinds[0].0, "commit_to_push");
    about(kinds[0].1, HOUR);
    assert_eq!(kinds[1].0, "push_to_accepted");
    about(kinds[1].1, 3 * HOUR);

    let now = ago(0) + 1;
    let content = json!({ "environment": { "id": "production" }, "service": { "id": "production/pumps" }, "description": "slow" });
    let detected = event("incident.detected", "INC-7", now, &content);
    team.place.write(
        "incident.json",
        format!(
            "{detected}\n{}",
            event("build.finished", "b", now, &json!({}))
        ),
    );
    let told = team.json(&["events", "send", "incident.json"]);
    assert_eq!(
        (&told[0]["noted"], &told[1]["noted"]),
        (&json!(true), &json!(false))
    );
    let failed = team.deployment(&json!("d1"));
    assert_eq!(
        (&failed["failure"]["cause"], &failed["failure"]["incident"]),
        (&json!("incident"), &json!("INC-7"))
    );
    let place = only_place(&team, &[]);
    for (name, number) in [("failed", 1), ("found_by_time", 1), ("not_recovered", 1)] {
        assert_eq!(place["counts"][name], number, "{name} in {place:#}");
    }
    let resolved = event("incident.resolved", "INC-7", now + HOUR, &json!({}));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let answer = runtime.block_on(async {
        let mut client = DoraServiceClient::new(dev.channel().await);
        let event_json =
            json!({ "specversion": "1.0", "id": "2", "type": "x", "data": resolved }).to_string();
        client
            .take_event(TakeEventRequest { event_json })
            .await
            .unwrap()
            .into_inner()
    });
    assert!(answer.noted, "{answer:?}");
    let place = only_place(&team, &[]);
    assert_eq!(place["counts"]["not_recovered"], 0);
    assert_eq!(seconds_of(&place["recovery_time"]["median_micros"]), HOUR);
    assert_eq!(dev.stop().code, Some(0));
}

#[test]
fn wrong_events_are_refused_with_one_line_and_change_nothing() {
    let team = Team::new();
    let dev = Dev::start(&team.place);
    let post = |body: &str| http::post(&dev.address, "/events", body);
    let unknown = event("incident.resolved", "INC-9", ago(0), &json!({})).to_string();
    let nowhere = event(
        "incident.detected",
        "INC-9",
        ago(0),
        &json!({ "environment": { "id": "production" } }),
    )
    .to_string();
    let no_commit = event("change.merged", "17", ago(0), &json!({})).to_string();
    for (body, status, part) in [
        ("{", 400, "no JSON"),
        ("{}", 400, "context.type"),
        (no_commit.as_str(), 400, "customData.revision"),
        (unknown.as_str(), 404, "INC-9"),
        (nowhere.as_str(), 404, "nothing was live in `production`"),
    ] {
        let answer = post(body);
        assert_eq!(answer.status, status, "{answer:?}");
        let body: Value = serde_json::from_str(&answer.body).unwrap();
        assert!(body["error"].as_str().unwrap().contains(part), "{body}");
    }
    let large = post(&format!("\"{}\"", "x".repeat(300 << 10)));
    assert_eq!(large.status, 413);
    let get = http::get(&dev.address, "/events");
    assert_eq!((get.status, get.headers["allow"].as_str()), (405, "POST"));
    // What a page in somebody's browser can send without being asked is not taken.
    let plain = http::post_as(&dev.address, "/events", "text/plain", &no_commit);
    assert_eq!(plain.status, 415);
    team.place.write("bad.json", "{\n  \"a\": nonsense }");
    team.place.write("empty.json", " \n");
    team.place.write("half.json", format!("{no_commit}\n"));
    for (file, code, part) in [
        ("bad.json", 2, "bad.json:2:9: no JSON"),
        ("empty.json", 2, "holds no event"),
        ("none.json", 2, "cannot read `none.json`"),
        ("half.json", 2, "event 1: event_json: `customData.revision`"),
    ] {
        let output = team
            .place
            .emberline(&["events", "send", file])
            .run()
            .expect_code(code);
        let errors = output.errors();
        assert!(errors.len() == 1 && errors[0].contains(part), "{output}");
    }
    assert_eq!(dev.stop().code, Some(0));
}

#[test]
fn wrong_questions_are_one_line_each() {
    let team = Team::new();
    team.tree.commit("One", ago(60));
    team.run(1, &[]);
    let cases: [(&[&str], &str); 9] = [
        (&["dora", "--since", "soon"], "`--since soon` is no time"),
        (&["dora", "--since", "2999-01-01"], "the window is empty"),
        (&["dora", "--pipeline", "../x"], "pipeline"),
        (&["dora", "explain", "d99"], "no deployment `d99`"),
        (&["dora", "explain", "seventeen"], "e.g. `d17`"),
        (&["rollback", "production", "--why", "x"], "no good version"),
        (
            &["rollback", "nowhere", "--why", "x"],
            "nothing is live in `nowhere`",
        ),
        (
            &["deployments", "mark-failed", "d9", "--why", "x"],
            "there is no `d9`",
        ),
        (&["run", "tree/pumps.yaml", "-q", "--repairs", "d9"], "d9"),
    ];
    for (arguments, part) in cases {
        let output = team.place.emberline(arguments).run().expect_code(2);
        let errors = output.errors();
        assert!(errors.len() == 1 && errors[0].contains(part), "{output}");
    }
}

#[test]
fn a_clone_without_the_deployed_revision_warns_and_stops_no_run() {
    let team = Team::new();
    team.tree.commit("One", ago(DAY));
    team.run(1, &[]);
    // History was made anew, as in a shallow clone or after a rebase.
    std::fs::remove_dir_all(team.place.path("tree/.git")).unwrap();
    let tree = emberline_tests::git::WorkTree::new(&team.place.path("tree"));
    tree.set_origin("https://git.example.org/pumps.git");
    let revision = tree.commit("Anew", ago(HOUR));
    let output = team
        .place
        .emberline(&["run", "tree/pumps.yaml", "-q", "-p", "seed=2"])
        .run()
        .expect_code(0);
    assert!(output.stderr.contains("is not in this clone"), "{output}");
    let change = &team.deployment(&json!("d2"))["change"];
    assert_eq!(
        (&change["revision"], &change["commits"]),
        (&json!(revision), &json!([]))
    );
}
