//! What is reused, and what is not.

use super::*;

fn two_stages(x: u64, y: u64) -> Value {
    json!({"pipeline": "p", "stages": {
        "make": convert(x),
        "take": {"kind": "convert", "inputs": {"in": "make.data"}, "with": {"y": y}},
    }})
}

fn finish(cluster: &mut Cluster, contents: &[&str]) -> usize {
    let mut ran = 0;
    while let Some(attempt) = (!cluster.assigned.is_empty()).then(|| cluster.assigned.remove(0)) {
        cluster.succeed(&attempt, contents[ran]);
        ran += 1;
    }
    ran
}

#[test]
fn the_same_spec_and_inputs_are_reused_and_shown_as_cached() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    cluster.submit(two_stages(1, 1));
    assert_eq!(finish(&mut cluster, &["a", "b"]), 2);
    let again = cluster.submit(two_stages(1, 1));
    assert_eq!(finish(&mut cluster, &[]), 0);
    assert_eq!(cluster.task(&again, "make"), TaskState::Cached);
    assert_eq!(cluster.task(&again, "take"), TaskState::Cached);
    assert_eq!(
        cluster.view(&again).tasks[1].outputs[0].manifest,
        Digest::of(b"b")
    );
}

#[test]
fn another_spec_runs_and_what_follows_is_reused_if_its_input_is_the_same() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    cluster.submit(two_stages(1, 1));
    finish(&mut cluster, &["a", "b"]);
    let other = cluster.submit(two_stages(2, 1));
    // It gives the same bytes, so the second stage has the same input.
    assert_eq!(finish(&mut cluster, &["a"]), 1);
    assert_eq!(cluster.task(&other, "take"), TaskState::Cached);
    let third = cluster.submit(two_stages(3, 1));
    assert_eq!(finish(&mut cluster, &["c", "d"]), 2);
    let note = &cluster.view(&third).tasks[1].note;
    assert!(note.contains("`in`"), "it says what has changed: {note}");
}

#[test]
fn a_failed_attempt_is_never_reused_and_a_stage_can_ask_not_to_be() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    cluster.submit(single("p", convert(1)));
    let started = cluster.took().remove(0);
    cluster.fail(&started, Reason::Data);
    cluster.submit(single("p", convert(1)));
    assert_eq!(finish(&mut cluster, &["a"]), 1);
    let mut never = convert(1);
    never["cache"] = json!(false);
    cluster.submit(single("p", never));
    assert_eq!(finish(&mut cluster, &["a"]), 1);
}
