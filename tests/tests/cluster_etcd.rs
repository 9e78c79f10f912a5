//! etcd loses members, its quorum, its space: what runs goes on, what was accepted is kept, and all
//! goes on by itself when etcd is back.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use emberline_tests::{
    cluster::{Builder, Cluster},
    seconds, wait_for,
};
use tonic::Code;

/// It ends well, and no task of it was begun twice, nor was the one at the gate given out twice.
#[track_caller]
fn ends_without_a_restart(cluster: &mut Cluster, run: &str) {
    cluster.ends_without_a_restart(run);
    assert_eq!(cluster.history.attempts(run, "wait"), 1);
}

#[test]
fn a_killed_follower_of_etcd_is_not_noticed() {
    let mut cluster = Builder::new().members(3).coordinators(2).start();
    let run = cluster.gated_run();
    let leader = wait_for("a leader of etcd", seconds(10), || cluster.etcd.leader());
    cluster.etcd.kill((leader + 1) % 3);
    let pipeline = cluster.journal.chains(2, 3);
    let other = cluster.submit(&pipeline);
    cluster.succeeds(&other);
    cluster.etcd.restart((leader + 1) % 3);
    cluster.journal.open("g");
    ends_without_a_restart(&mut cluster, &run);
    assert_eq!(cluster.history.terms().len(), 1);
}

#[test]
fn a_killed_leader_of_etcd_is_no_reason_for_another_coordinator() {
    let mut cluster = Builder::new().members(3).coordinators(2).start();
    let run = cluster.gated_run();
    let leader = wait_for("a leader of etcd", seconds(10), || cluster.etcd.leader());
    cluster.etcd.kill(leader);
    let pipeline = cluster.journal.chains(2, 3);
    let other = cluster.submit(&pipeline);
    cluster.succeeds(&other);
    cluster.etcd.restart(leader);
    cluster.etcd.wait_until_it_answers();
    cluster.journal.open("g");
    ends_without_a_restart(&mut cluster, &run);
    assert_eq!(cluster.history.terms().len(), 1);
}

#[test]
fn a_leader_of_etcd_that_sleeps_is_left_for_another_member() {
    let mut cluster = Builder::new().members(3).coordinators(2).start();
    let run = cluster.gated_run();
    let leader = wait_for("a leader of etcd", seconds(10), || cluster.etcd.leader());
    cluster.etcd.pause(leader);
    let pipeline = cluster.journal.chains(2, 2);
    let other = cluster.submit(&pipeline);
    cluster.succeeds(&other);
    cluster.etcd.go_on(leader);
    cluster.etcd.wait_until_it_answers();
    cluster.journal.open("g");
    ends_without_a_restart(&mut cluster, &run);
}

#[test]
fn without_a_quorum_nothing_is_accepted_and_what_runs_counts_afterwards() {
    let mut cluster = Builder::new().members(3).coordinators(2).start();
    let run = cluster.gated_run();
    cluster.etcd.kill(0);
    cluster.etcd.kill(1);
    cluster.journal.open("g");
    wait_for("the task ends without etcd", seconds(10), || {
        (cluster.journal.ended(&run, "wait") == 1).then_some(())
    });
    // Who asks is told what is wrong, and that it may ask again.
    let pipeline = cluster.journal.chains(1, 1);
    let request = cluster.request(&pipeline);
    let told = wait_for("it says why", seconds(15), || {
        let refused = cluster.client.submit(&request, Duration::ZERO).unwrap_err();
        let code = refused.code();
        let is_plain = refused.message().contains("quorum");
        (code == Code::Unavailable && is_plain).then_some(refused)
    });
    eprintln!("{}", told.message());
    assert!(told.message().contains("since"), "{}", told.message());
    cluster.etcd.restart(0);
    cluster.etcd.restart(1);
    cluster.etcd.wait_until_it_answers();
    // The same request, which nobody has answered so far.
    let later = cluster.client.submit(&request, seconds(20)).unwrap();
    cluster.acknowledged(&later);
    cluster.succeeds(&later);
    ends_without_a_restart(&mut cluster, &run);
}

#[test]
fn a_full_etcd_takes_no_runs_until_there_is_room_and_loses_none() {
    let mut cluster = Builder::new().coordinators(2).quota(16 << 20).start();
    let run = cluster.gated_run();
    let leader = cluster.wait_for_leader().index;
    cluster.etcd.fill();
    let pipeline = cluster.journal.chains(1, 1);
    let request = cluster.request(&pipeline);
    let told = wait_for("it says why", seconds(15), || {
        let server = &cluster.servers()[leader];
        let request = request.clone();
        let refused = cluster
            .client
            .ask(server, async |mut client| client.submit_run(request).await)
            .unwrap_err();
        let is_plain = refused.message().contains("space");
        is_plain.then_some(refused)
    });
    eprintln!("{}", told.message());
    assert_eq!(told.code(), Code::Unavailable, "{told:?}");
    cluster.journal.open("g");
    wait_for("the task ends", seconds(10), || {
        (cluster.journal.ended(&run, "wait") == 1).then_some(())
    });
    let Cluster { etcd, history, .. } = &mut cluster;
    etcd.make_room(|_| history.read_on(etcd));
    let later = cluster.client.submit(&request, seconds(20)).unwrap();
    cluster.acknowledged(&later);
    cluster.succeeds(&later);
    ends_without_a_restart(&mut cluster, &run);
}

#[test]
fn a_history_that_was_compacted_is_no_loss() {
    let mut cluster = Builder::new().start();
    let run = cluster.gated_run();
    let pipeline = cluster.journal.chains(2, 3);
    let before = cluster.submit(&pipeline);
    cluster.succeeds(&before);
    let Cluster { etcd, history, .. } = &mut cluster;
    etcd.compact(|_| history.read_on(etcd));
    let leader = cluster.wait_for_leader();
    cluster.coordinators[leader.index].kill();
    cluster.wait_for_leader_after(leader.epoch);
    cluster.coordinators[leader.index].start();
    cluster.journal.open("g");
    ends_without_a_restart(&mut cluster, &run);
}

#[test]
fn a_coordinator_that_is_cut_from_one_member_asks_another() {
    let mut cluster = Builder::new()
        .members(3)
        .coordinators(2)
        .etcd_by_proxies()
        .start();
    let run = cluster.gated_run();
    let leader = cluster.wait_for_leader().index;
    for member in 0..3 {
        cluster.to_etcd[leader][member].partition();
        let pipeline = cluster.journal.chains(1, 2);
        let other = cluster.submit(&pipeline);
        cluster.succeeds(&other);
        cluster.to_etcd[leader][member].heal();
    }
    cluster.journal.open("g");
    ends_without_a_restart(&mut cluster, &run);
    assert_eq!(cluster.history.terms().len(), 1);
}
