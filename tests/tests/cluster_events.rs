//! Events in a cluster: whoever is told of one sends it on to the leader, and what a dead leader has
//! not told, the next one does.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use emberline_tests::{
    cdevents::{ARRIVES, event, kind, told, wait_for_runs},
    cluster::{Builder, PREFIX},
    http::{self, Sink},
    seconds,
    team::ago,
    wait_for,
};
use serde_json::json;

#[test]
fn the_next_leader_tells_what_the_dead_one_has_not() {
    let mut sink = Sink::prepare();
    let url = sink.url();
    let builder = Builder::new().coordinators(2).impatient();
    let mut cluster = builder
        .coordinator_arguments(&["--events-sink", &url])
        .start();
    let run = cluster.gated_run();
    let before = cluster.wait_for_leader();
    cluster.journal.open("g");
    cluster.succeeds(&run);
    wait_for("the run is archived", ARRIVES, || {
        cluster
            .etcd
            .keys(&format!("{}/state/ended/", PREFIX))
            .filter(|keys| !keys.is_empty())
    });
    cluster.coordinators[before.index].kill();
    cluster.wait_for_leader_after(before.epoch);
    sink.start_again();
    wait_for_runs(&sink, 1);
    let events = told(&sink.posted());
    let finished: Vec<_> = events
        .iter()
        .filter(|e| kind(e) == "pipelinerun.finished")
        .collect();
    assert_eq!(finished[0]["subject"]["id"], run.as_str());
    assert_eq!(finished[0]["subject"]["content"]["outcome"], "success");
    cluster.check();
}

#[test]
fn a_follower_sends_events_on_to_the_leader() {
    let mut cluster = Builder::new().coordinators(2).workers(1).start();
    let follower = cluster.a_follower();
    let leader = cluster.wait_for_leader();
    let merged = event("change.merged", &"4f2a".repeat(10), ago(60), &json!({})).to_string();
    let servers = cluster.servers().to_vec();
    let answer = wait_for("the follower knows the leader", seconds(10), || {
        let answer = http::post(&servers[follower], "/events", &merged);
        (answer.status == 307).then_some(answer)
    });
    let location = &answer.headers["location"];
    assert_eq!(location, &format!("http://{}/events", leader.address));
    let (address, path) = location
        .strip_prefix("http://")
        .unwrap()
        .split_once('/')
        .unwrap();
    let taken = http::post(address, &format!("/{path}"), &merged).expect_ok();
    assert!(taken.contains("true"), "{taken}");
    cluster.check();
}
