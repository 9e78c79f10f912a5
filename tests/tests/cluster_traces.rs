//! One trace over many processes: it stays one, and whole, when the leader dies, when a worker dies,
//! and when the collector is gone for a while.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;

use emberline_tests::{
    OtlpReceiver,
    cluster::{Builder, Cluster},
    otlp::{Answer, Trace},
    seconds,
    team::{Team, ago},
    watched::ARRIVES,
};
use serde_json::Value;

fn watched(receiver: &OtlpReceiver, coordinators: usize) -> Cluster {
    let builder = Builder::new().coordinators(coordinators).impatient();
    builder.environment(&receiver.environment()).start()
}

/// The trace of a run, as soon as it is whole and has these spans.
#[track_caller]
fn trace_of(receiver: &OtlpReceiver, id: &str, names: &[(&str, usize)]) -> Trace {
    receiver.wait_for("the whole trace", ARRIVES, |received| {
        let trace = received.trace(id)?;
        trace.is_whole_with("", names)?;
        Ok(trace)
    })
}

fn trace_id(cluster: &Cluster, run: &str) -> String {
    cluster.run(run).summary.unwrap().trace_id
}

#[test]
fn a_trace_survives_the_leader_that_dies() {
    let receiver = OtlpReceiver::start();
    let mut cluster = watched(&receiver, 2);
    let run = cluster.gated_run();
    let id = trace_id(&cluster, &run);
    let before = cluster.wait_for_leader();
    cluster.coordinators[before.index].kill();
    let after = cluster.wait_for_leader_after(before.epoch);
    cluster.journal.open("g");
    cluster.ends_without_a_restart(&run);
    let trace = trace_of(
        &receiver,
        &id,
        &[("RUN gated", 1), ("first", 1), ("wait", 1), ("last", 1)],
    );
    let root = trace.one("RUN gated");
    assert!(root.is("cicd.pipeline.result", "success"));
    // The one that died had told of the first task; who leads now tells the rest, and the run.
    let telling: BTreeSet<_> = trace
        .spans
        .iter()
        .map(|s| s.resource["service.instance.id"].as_str().unwrap())
        .collect();
    let now = cluster.coordinators[after.index].name();
    assert!(telling.contains(now), "{telling:?}");
    assert_eq!(root.resource["service.instance.id"], now);
    assert_eq!(root.resource["service.name"], "emberline-coordinator");
    // The next leader closes the dead one's term.
    receiver.wait_for("the lost term", ARRIVES, |received| {
        let mut terms = received.spans.iter().filter(|span| span.name == "lead");
        let lost =
            terms.find(|span| span.attribute("emberline.epoch") == &Value::from(before.epoch));
        let lost = lost.ok_or("no such term")?;
        let well =
            lost.is("error.type", "leader_lost") && lost.is("cicd.system.component", "coordinator");
        well.then_some(()).ok_or_else(|| format!("{lost:#?}"))
    });
}

#[test]
fn a_lost_attempt_is_closed_with_an_error_and_the_next_one_is_linked_to_it() {
    let receiver = OtlpReceiver::start();
    let mut cluster = watched(&receiver, 1);
    let run = cluster.gated_run();
    let id = trace_id(&cluster, &run);
    let worker = cluster.worker_of(&run, "wait");
    let name = cluster.workers[worker].name().to_owned();
    cluster.workers[worker].kill();
    cluster.wait_for_begin(&run, "wait", 2);
    cluster.journal.open("g");
    cluster.succeeds(&run);
    let trace = trace_of(&receiver, &id, &[("RUN gated", 1), ("wait", 2)]);
    let attempts: Vec<_> = trace.named("wait").collect();
    let (lost, next) = (attempts[0], attempts[1]);
    assert!(lost.is("error.type", "worker_lost") && lost.is("cicd.worker.name", &name));
    assert!(lost.is("cicd.pipeline.task.run.result", "error") && lost.error.is_some());
    assert_eq!(lost.resource["service.name"], "emberline-coordinator");
    assert!(next.is("cicd.pipeline.task.run.result", "success") && next.error.is_none());
    assert_eq!(next.links, [(lost.trace.clone(), lost.id.clone())]);
    assert!(lost.end <= next.start);
    // What the workers told is part of it, by their own names.
    let puts: Vec<_> = trace
        .spans
        .iter()
        .filter(|s| s.name.starts_with("put "))
        .collect();
    for put in puts {
        assert_eq!(put.resource["service.name"], "emberline-worker");
    }
    cluster.check();
}

#[test]
fn a_collector_that_dies_in_the_middle_changes_no_run_and_hears_the_rest() {
    let mut receiver = OtlpReceiver::start();
    let mut cluster = watched(&receiver, 1);
    let run = cluster.gated_run();
    let id = trace_id(&cluster, &run);
    receiver.stop();
    cluster.journal.open("g");
    cluster.ends_without_a_restart(&run);
    // As long as there is room, it is told as soon as somebody listens again.
    receiver.start_again();
    trace_of(
        &receiver,
        &id,
        &[("RUN gated", 1), ("first", 1), ("wait", 1), ("last", 1)],
    );
    // One that takes the connection and never answers is no help either, and no harm.
    receiver.answer(Answer::Hangs);
    let run = cluster.gated_run();
    cluster.journal.open("g");
    cluster.ends_without_a_restart(&run);
}

#[test]
fn a_model_that_is_deployed_on_a_cluster_is_one_trace_over_a_failover() {
    let receiver = OtlpReceiver::start();
    let mut cluster = watched(&receiver, 2);
    let team = Team::new().on(cluster.servers());
    team.tree.commit("One", ago(3600));
    let first = team.run(1, &[]);
    cluster.acknowledged(first["run"].as_str().unwrap());
    let before = cluster.wait_for_leader();
    cluster.coordinators[before.index].kill();
    cluster.wait_for_leader_after(before.epoch);
    // The next leader knows what is live, and goes back to it.
    let revision = team.tree.commit("Two", ago(60));
    let second = team.run(2, &[]);
    cluster.acknowledged(second["run"].as_str().unwrap());
    let rolled = team.json(&["rollback", "production", "--why", "worse"]);
    assert_eq!(rolled["deployment"]["version"], 1);
    let id = second["trace_id"].as_str().unwrap();
    let trace = trace_of(
        &receiver,
        id,
        &[("RUN pumps", 1), ("train", 1), ("deploy pumps", 2)],
    );
    let root = trace.one("RUN pumps");
    assert!(root.is("vcs.ref.head.revision", &revision));
    let deployments: Vec<_> = trace.named("deploy pumps").collect();
    assert_eq!(deployments[0].parent, root.id);
    // The rollback is part of what it repairs.
    assert_eq!(deployments[1].parent, deployments[0].id);
    let dora = team.json(&["dora"]);
    let place = &dora["places"][0];
    assert_eq!(place["counts"]["deployments"], 2, "{dora:#}");
    assert_eq!(place["change_fail_rate"]["part"], 1);
    // Both changes are first carried by their own deployment.
    assert_eq!(place["change_lead_time"]["count"], 2);
    let explained = team.json(&["dora", "explain", "d2"]);
    let sum: u64 = explained["segments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["micros"].as_u64().unwrap())
        .sum();
    assert_eq!(explained["total_micros"], sum);
    assert_eq!(explained["trace_id"], id);
    cluster.wait_for_leader();
    assert!(seconds(sum / 1_000_000) >= seconds(59), "{explained:#}");
}
