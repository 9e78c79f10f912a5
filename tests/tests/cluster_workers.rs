//! Workers that die, sleep, are cut off, drained or doubled: their work goes on elsewhere, and what
//! they say too late does not count.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{process::Command, time::Instant};

use emberline_proto::v1::RunState;
use emberline_tests::{
    TcpProxy,
    client::state_of,
    cluster::{Builder, Cluster},
    node::Node,
    processes, seconds,
    tcp_proxy::Way,
    wait_for,
};

/// With a grace that a test can wait for.
fn builder() -> Builder {
    Builder::new().coordinators(1).impatient()
}

/// A run whose task `wait` runs and waits at its gate `g`; the worker that runs it.
fn gated_run(cluster: &mut Cluster) -> (String, usize) {
    let run = cluster.gated_run();
    let worker = cluster.worker_of(&run, "wait");
    (run, worker)
}

#[test]
fn the_work_of_a_killed_worker_begins_anew_elsewhere() {
    let mut cluster = Builder::new().coordinators(1).start();
    let (run, worker) = gated_run(&mut cluster);
    let dir = cluster.workers[worker].dir().to_path_buf();
    assert!(!processes::of_attempts_below(&dir).is_empty());
    let start = Instant::now();
    cluster.workers[worker].kill();
    cluster.wait_for_begin(&run, "wait", 2);
    let took = start.elapsed();
    eprintln!("the second attempt after {took:?}");
    // Its connection is closed, so nobody waits as long as for one that is only silent.
    assert!(took < seconds(2), "{took:?}");
    wait_for("its commands die with it", seconds(5), || {
        processes::of_attempts_below(&dir).is_empty().then_some(())
    });
    cluster.journal.open("g");
    cluster.succeeds(&run);
    cluster.check();
    assert_eq!(cluster.history.attempts(&run, "wait"), 2);
    assert_eq!(cluster.history.attempts(&run, "first"), 1);
    assert_eq!(cluster.history.spent(&run, "wait").2, 1, "a lost worker");
}

#[test]
fn the_late_report_of_a_worker_that_slept_is_refused() {
    let mut cluster = builder().start();
    let (run, worker) = gated_run(&mut cluster);
    cluster.workers[worker].pause();
    cluster.wait_for_begin(&run, "wait", 2);
    // The command of the paused worker is not paused: both attempts end.
    cluster.journal.open("g");
    cluster.succeeds(&run);
    wait_for("the first attempt ends too", seconds(10), || {
        (cluster.journal.ended(&run, "wait") == 2).then_some(())
    });
    let before = sessions(&cluster, worker);
    cluster.workers[worker].go_on();
    wait_for("it has a session again", seconds(10), || {
        (sessions(&cluster, worker) > before).then_some(())
    });
    // It works again like any other.
    let pipeline = (cluster.journal).stage("a", &[], ":", ", labels: { name: w0 }");
    let pipeline = format!("pipeline: after\nstages:\n{pipeline}");
    let pipeline = pipeline.replace("w0", cluster.workers[worker].name());
    let after = cluster.submit(&pipeline);
    cluster.succeeds(&after);
    cluster.check();
    let last = cluster.history.task(&run, "wait").pop().unwrap();
    assert_eq!(
        (&last["attempt"], &last["reported"]),
        (&2.into(), &2.into())
    );
}

/// How many sessions a worker has had.
fn sessions(cluster: &Cluster, worker: usize) -> usize {
    let stdout = cluster.workers[worker].stdout();
    stdout.matches(" has a session with ").count()
}

fn partitioned(cut: impl Fn(&TcpProxy)) {
    let mut cluster = builder().workers(1).coordinators_by_proxies().prepare();
    // The network is broken for this worker only.
    cluster.to_coordinator[0].only_who_says("w0");
    cluster.coordinators[0].start();
    cluster.workers[0].start();
    cluster.wait_until_it_serves();
    let (run, _) = gated_run(&mut cluster);
    let other = cluster.add_worker();
    cluster.workers[other].start();
    cluster.workers[other].wait_for_line(" has a session with ");
    cut(&cluster.to_coordinator[0]);
    cluster.wait_for_begin(&run, "wait", 2);
    cluster.journal.open("g");
    cluster.succeeds(&run);
    let before = sessions(&cluster, 0);
    // What it said in the meantime arrives only now.
    cluster.to_coordinator[0].heal();
    wait_for("it has a session again", seconds(15), || {
        (sessions(&cluster, 0) > before).then_some(())
    });
    cluster.check();
    let last = cluster.history.task(&run, "wait").pop().unwrap();
    assert_eq!(
        (&last["attempt"], &last["reported"]),
        (&2.into(), &2.into())
    );
    assert_eq!(cluster.history.terms().len(), 1);
}

#[test]
fn a_worker_that_is_cut_off_both_ways_is_replaced() {
    partitioned(TcpProxy::partition);
}

#[test]
fn a_worker_that_is_not_heard_any_more_is_replaced() {
    partitioned(|proxy| proxy.drop_silently(Way::ToServer));
}

#[test]
fn a_worker_that_hears_nothing_any_more_gives_its_session_up() {
    let mut cluster = builder().workers(1).coordinators_by_proxies().start();
    let (run, _) = gated_run(&mut cluster);
    cluster.to_coordinator[0].drop_silently(Way::ToClient);
    // It must find out by itself, and ask for another session.
    wait_for("it gives the session up", seconds(15), || {
        let stderr = cluster.workers[0].stderr();
        stderr.contains("the session broke").then_some(())
    });
    cluster.journal.open("g");
    wait_for("its task ends", seconds(10), || {
        (cluster.journal.ended(&run, "wait") >= 1).then_some(())
    });
    cluster.to_coordinator[0].heal();
    cluster.succeeds(&run);
    cluster.check();
}

#[test]
fn a_cut_connection_alone_restarts_nothing() {
    let mut cluster = builder().workers(1).coordinators_by_proxies().start();
    let (run, _) = gated_run(&mut cluster);
    for cut in 2..5 {
        cluster.to_coordinator[0].cut();
        wait_for("it has a session again", seconds(10), || {
            (sessions(&cluster, 0) >= cut).then_some(())
        });
    }
    cluster.journal.open("g");
    cluster.succeeds(&run);
    cluster.check();
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_second_worker_under_one_name_waits_until_the_first_is_gone() {
    let mut cluster = builder().workers(1).start();
    let (run, _) = gated_run(&mut cluster);
    let second = cluster.add_worker();
    let nodes = cluster.root().join("nodes");
    let arguments = cluster.worker_arguments("w0", "twin");
    cluster.workers[second] = Node::new(&nodes, "twin", arguments);
    cluster.workers[second].start();
    wait_for("it is told why it gets no work", seconds(20), || {
        let stderr = cluster.workers[second].stderr();
        let told = "another process is connected as worker `w0`";
        stderr.contains(told).then_some(())
    });
    cluster.journal.open("g");
    cluster.succeeds(&run);
    let pipeline = cluster.journal.chains(3, 3);
    let more = cluster.submit(&pipeline);
    cluster.succeeds(&more);
    assert_eq!(cluster.workers[second].stdout(), "", "it has no session");
    cluster.workers[0].kill();
    cluster.workers[second].wait_for_line(" has a session with ");
    let more = cluster.submit(&pipeline);
    cluster.succeeds(&more);
    cluster.check();
    // Nothing was lost by it.
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_terminated_worker_gives_its_work_back_and_no_retry_is_spent() {
    let mut cluster = builder().start();
    let (run, worker) = gated_run(&mut cluster);
    cluster.workers[worker].terminate();
    assert_eq!(cluster.workers[worker].wait(seconds(15)), 0);
    cluster.wait_for_begin(&run, "wait", 2);
    cluster.journal.open("g");
    cluster.succeeds(&run);
    cluster.check();
    assert_eq!(cluster.history.attempts(&run, "wait"), 2);
    assert_eq!(cluster.history.spent(&run, "wait"), (0, 0, 0));
}

#[test]
fn a_worker_that_may_drain_ends_what_runs_and_takes_no_more() {
    let mut cluster = builder()
        .worker_arguments(&["--drain-timeout", "30s"])
        .start();
    let (run, worker) = gated_run(&mut cluster);
    cluster.workers[worker].terminate();
    // New work goes to the other one.
    let pipeline = cluster.journal.chains(4, 1);
    let more = cluster.submit(&pipeline);
    let ended = cluster.succeeds(&more);
    let other = cluster.workers[1 - worker].name().to_owned();
    // What was assigned before the leader knew is ended here all the same.
    let there = ended.tasks.iter().filter(|t| t.worker == other).count();
    assert!(there >= 3, "{ended:#?}");
    assert!(
        cluster.workers[worker].ended().is_none(),
        "it has work left"
    );
    cluster.journal.open("g");
    assert_eq!(cluster.workers[worker].wait(seconds(15)), 0);
    cluster.succeeds(&run);
    cluster.check();
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_rolling_restart_of_all_workers_loses_nothing_and_spends_nothing() {
    let mut cluster = builder()
        .workers(3)
        .worker_arguments(&["--drain-timeout", "30s"])
        .start();
    let pipeline = cluster.journal.chains(6, 10);
    let run = cluster.submit(&pipeline);
    for worker in 0..3 {
        let before = cluster.journal.entries().len();
        wait_for("progress", seconds(20), || {
            (cluster.journal.entries().len() > before + 4).then_some(())
        });
        cluster.workers[worker].terminate();
        assert_eq!(cluster.workers[worker].wait(seconds(20)), 0);
        cluster.workers[worker].start();
        cluster.workers[worker].wait_for_line(" has a session with ");
    }
    let ended = cluster.succeeds(&run);
    cluster.check();
    for task in &ended.tasks {
        let name = &task.task;
        assert_eq!(cluster.journal.begun(&run, name), 1, "{name}");
        assert_eq!(cluster.history.spent(&run, name), (0, 0, 0), "{name}");
    }
}

#[test]
fn workers_that_come_and_go_leave_nothing_behind() {
    let mut cluster = builder().workers(1).start();
    let leases = cluster.etcd.leases().unwrap();
    let guest = cluster.add_worker();
    for _ in 0..8 {
        cluster.workers[guest].start();
        cluster.workers[guest].wait_for_line(" has a session with ");
        cluster.workers[guest].kill();
    }
    let pipeline = cluster.journal.chains(2, 3);
    let run = cluster.submit(&pipeline);
    cluster.succeeds(&run);
    cluster.check();
    assert_eq!(cluster.etcd.leases().unwrap(), leases);
    assert_eq!(cluster.history.terms().len(), 1);
}

#[test]
fn a_full_disk_of_one_worker_is_told_and_the_others_work_on() {
    let allowed = Command::new("unshare").args(["-m", "true"]).status();
    if !allowed.is_ok_and(|status| status.success()) {
        eprintln!("NOT CHECKED: a small disk can't be mounted here (`unshare -m` is not allowed)");
        return;
    }
    let mut cluster = builder().workers(1).prepare();
    let nodes = cluster.root().join("nodes");
    let small = Node::new(&nodes, "w0", cluster.worker_arguments("w0", "w0"));
    cluster.workers[0] = small.with_small_disk(&nodes.join("w0/state"), "8m");
    cluster.coordinators[0].start();
    cluster.workers[0].start();
    cluster.wait_until_it_serves();
    let write = "head -c 20000000 /dev/zero > $EMBERLINE_OUTPUT_OUT/x || exit 28; rm $EMBERLINE_OUTPUT_OUT/x";
    let stage = |more: &str| {
        let stage = cluster.journal.stage("w", &[], write, more);
        format!("pipeline: writes\nstages:\n{stage}")
    };
    let (here, anywhere) = (
        stage(", labels: { name: w0 }"),
        stage(", labels: { name: w1 }"),
    );
    let full = cluster.submit(&here);
    let failed = wait_for("the run ends", seconds(20), || {
        let seen = cluster.run(&full);
        (state_of(&seen) == RunState::Failed).then_some(seen)
    });
    let failure = failed.tasks[0].failure.clone().unwrap();
    let why = &failure.message;
    assert!(why.contains("No space left on device"), "{why}");
    // It lives, and takes what fits.
    let small = cluster.journal.chains(1, 1);
    let fits = cluster.submit(&small);
    cluster.succeeds(&fits);
    let other = cluster.add_worker();
    cluster.workers[other].start();
    let room = cluster.submit(&anywhere);
    cluster.succeeds(&room);
    assert!(cluster.workers[0].ended().is_none());
    cluster.check();
}
