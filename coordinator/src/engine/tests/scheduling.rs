//! Who is next, and where.

use super::*;

#[test]
fn a_higher_priority_goes_first() {
    let mut cluster = Cluster::new();
    for (name, priority) in [("low", 0), ("high", 5), ("middle", 3)] {
        let mut pipeline = single(name, convert(priority));
        pipeline["priority"] = json!(priority);
        cluster.submit(pipeline);
    }
    let worker = cluster.worker(1, 8, 1);
    cluster.credits(worker, 2);
    assert_eq!(cluster.names(), ["r2/work", "r3/work", "r1/work"]);
}

#[test]
fn the_longest_wait_is_known_whatever_goes_first() {
    let mut cluster = Cluster::new();
    let since = |cluster: &Cluster| cluster.engine.queue_stats().queued_since;
    assert_eq!(since(&cluster), None);
    let mut ready = Vec::new();
    for (name, priority) in [("low", 0), ("high", 5)] {
        let mut pipeline = single(name, convert(priority));
        pipeline["priority"] = json!(priority);
        cluster.submit(pipeline);
        ready.push(cluster.now);
    }
    assert_eq!(since(&cluster), Some(ready[0]));
    let worker = cluster.worker(1, 8, 1);
    assert_eq!(cluster.names(), ["r2/work"]);
    assert_eq!(since(&cluster), Some(ready[0]));
    cluster.credits(worker, 1);
    assert_eq!(since(&cluster), None);
}

#[test]
fn a_pipeline_with_many_tasks_does_not_starve_another() {
    let mut cluster = Cluster::new();
    let many: Vec<u64> = (0..20).collect();
    cluster.submit(single(
        "many",
        json!({"kind": "convert", "matrix": {"m": many}, "with": {"m": "${matrix.m}"}}),
    ));
    for x in 100..103 {
        cluster.submit(single("few", convert(x)));
    }
    cluster.worker(1, 8, 6);
    let names = cluster.names();
    let few = names.iter().filter(|n| !n.starts_with("r1/")).count();
    assert_eq!(few, 3, "{names:?}");
}

#[test]
fn of_one_pipeline_the_oldest_goes_first() {
    let mut cluster = Cluster::new();
    for x in 0..3 {
        cluster.submit(single("p", convert(x)));
    }
    cluster.worker(1, 8, 3);
    assert_eq!(cluster.names(), ["r1/work", "r2/work", "r3/work"]);
}

#[test]
fn no_worker_gets_more_than_its_cores_and_credits() {
    let mut cluster = Cluster::new();
    for x in 0..5 {
        let mut stage = convert(x);
        stage["resources"] = json!({"cpu": 2});
        cluster.submit(single("p", stage));
    }
    let worker = cluster.worker(1, 4, 9);
    let started = cluster.took();
    assert_eq!(started.len(), 2, "four cores for tasks of two");
    cluster.succeed(&started[0], "a");
    assert_eq!(cluster.took().len(), 1);
    let other = cluster.worker(2, 64, 1);
    let started = cluster.took();
    assert_eq!(started.len(), 1, "one credit");
    assert_eq!(started[0].0, other);
    assert_ne!(other, worker);
}

#[test]
fn a_task_goes_where_its_inputs_are() {
    let mut cluster = Cluster::new();
    let (first, second) = (cluster.worker(1, 2, 2), cluster.worker(2, 2, 2));
    for (x, content) in [(1, "a"), (2, "b")] {
        cluster.submit(json!({"pipeline": "p", "stages": {
            "make": convert(x),
            "take": {"kind": "convert", "inputs": {"in": "make.data"}, "with": {"x": x}},
        }}));
        let made = cluster.took().remove(0);
        cluster.succeed(&made, content);
        let taken = cluster.took().remove(0);
        assert_eq!(taken.0, made.0, "run {x}");
        assert!([first, second].contains(&taken.0));
        cluster.succeed(&taken, "c");
    }
}

#[test]
fn labels_are_needed_to_get_a_task_that_asks_for_them() {
    let mut cluster = Cluster::new();
    let mut stage = convert(1);
    stage["labels"] = json!({"gpu": "yes"});
    let run = cluster.submit(single("p", stage));
    cluster.worker(1, 8, 8);
    assert!(cluster.took().is_empty());
    assert_eq!(cluster.task(&run, "work"), TaskState::Queued);
}

#[test]
fn what_follows_a_failure_is_skipped_and_what_waits_for_one_runs() {
    let mut cluster = Cluster::new();
    cluster.worker(1, 8, 8);
    let run = cluster.submit(json!({"pipeline": "p", "stages": {
        "bad": convert(1),
        "after": {"kind": "convert", "needs": ["bad"]},
        "mend": {"kind": "convert", "needs": ["bad"], "run_if": "failure", "with": {"x": 3}},
    }}));
    let bad = cluster.took().remove(0);
    cluster.fail(&bad, Reason::Data);
    assert_eq!(cluster.task(&run, "after"), TaskState::Skipped);
    assert_eq!(cluster.names(), ["r1/mend"]);
}
