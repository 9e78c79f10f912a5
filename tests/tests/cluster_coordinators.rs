//! Several coordinators: one leads, and when it dies, sleeps, is cut off or goes, another one does,
//! and nothing that runs is restarted.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use emberline_proto::v1::{GetRunRequest, RunState};
use emberline_tests::{
    Place,
    client::{Client, leader_hint, state_of},
    cluster::{Builder, Cluster},
    seconds, wait_for,
};
use tonic::{Code, Status};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt as _;

/// The lease of the leader, as by default.
const LEASE: Duration = Duration::from_secs(3);

/// What one coordinator, and no other, answers to a reading.
fn ask(cluster: &Cluster, index: usize, run: &str) -> Result<(), Status> {
    let request = GetRunRequest {
        run: run.to_owned(),
    };
    let answer = cluster
        .client
        .ask(&cluster.servers()[index], async |mut client| {
            client.get_run(request).await
        });
    answer.map(drop)
}

#[test]
fn three_coordinators_run_a_pipeline() {
    let mut cluster = Builder::new().members(3).start();
    let pipeline = cluster.journal.chains(3, 3);
    let run = cluster.submit(&pipeline);
    cluster.ends_without_a_restart(&run);
    assert_eq!(cluster.history.terms().len(), 1, "it was led by one only");
    for name in ["c0-0", "c2-2"] {
        assert_eq!(cluster.history.attempts(&run, name), 1);
    }
}

#[test]
fn a_plain_client_is_told_by_a_follower_who_leads() {
    let mut cluster = Builder::new().workers(1).start();
    let pipeline = cluster.journal.chains(1, 1);
    let run = cluster.submit(&pipeline);
    cluster.succeeds(&run);
    let leader = cluster.wait_for_leader();
    for (index, server) in cluster.servers().iter().enumerate() {
        let answer = ask(&cluster, index, &run);
        let health = |service: &str| {
            let service = service.to_owned();
            cluster.client.block_on(async move {
                let channel = Client::connect(server).await.unwrap();
                let answer = HealthClient::new(channel)
                    .check(HealthCheckRequest { service })
                    .await;
                answer.unwrap().into_inner().status()
            })
        };
        assert_eq!(health(""), ServingStatus::Serving);
        if index == leader.index {
            answer.unwrap();
            assert_eq!(health("emberline.v1.RunService"), ServingStatus::Serving);
            continue;
        }
        let refused = answer.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        let hint = leader_hint(&refused).unwrap();
        assert_eq!(hint, (leader.address.clone(), leader.epoch.to_string()));
        assert!(refused.get_details_retry_info().is_some(), "{refused:?}");
        assert_eq!(health("emberline.v1.RunService"), ServingStatus::NotServing);
    }
    cluster.check();
}

#[test]
fn a_killed_leader_is_replaced_by_the_fast_path_and_what_runs_goes_on() {
    let mut cluster = Builder::new().start();
    let run = cluster.gated_run();
    let old = cluster.wait_for_leader();
    let start = Instant::now();
    cluster.coordinators[old.index].kill();
    let new = cluster.wait_for_leader_after(old.epoch);
    let took = start.elapsed();
    eprintln!("another leader after {took:?}");
    // Its connections are closed, so nobody has to wait for the end of its lease.
    assert!(took < LEASE / 2, "{took:?}");
    assert_ne!(new.index, old.index);
    cluster.journal.open("g");
    cluster.succeeds(&run);
    cluster.coordinators[old.index].start();
    cluster.ends_without_a_restart(&run);
    assert_eq!(cluster.history.terms().len(), 2);
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_terminated_leader_hands_over_at_once() {
    let mut cluster = Builder::new().start();
    let run = cluster.gated_run();
    let old = cluster.wait_for_leader();
    let start = Instant::now();
    cluster.coordinators[old.index].terminate();
    cluster.wait_for_leader_after(old.epoch);
    let took = start.elapsed();
    eprintln!("another leader after {took:?}");
    assert!(took < seconds(1), "{took:?}");
    assert_eq!(cluster.coordinators[old.index].wait(seconds(10)), 0);
    cluster.journal.open("g");
    cluster.ends_without_a_restart(&run);
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_leader_that_slept_through_its_lease_steps_down_and_writes_nothing() {
    let mut cluster = Builder::new().start();
    let run = cluster.gated_run();
    let old = cluster.wait_for_leader();
    let start = Instant::now();
    cluster.coordinators[old.index].pause();
    let new = cluster.wait_for_leader_after(old.epoch);
    let took = start.elapsed();
    eprintln!("another leader after {took:?}");
    assert!(took < LEASE + seconds(2), "{took:?}");
    cluster.journal.open("g");
    cluster.succeeds(&run);
    let later = cluster.journal.chains(2, 2);
    let later = cluster.submit(&later);
    cluster.succeeds(&later);
    cluster.coordinators[old.index].go_on();
    // From the first moment on it does not answer for its term that is over.
    let refused = wait_for("the old leader answers", seconds(10), || {
        let answer = ask(&cluster, old.index, &run);
        let refused = answer.expect_err("an answer of a term that is over");
        leader_hint(&refused).filter(|(address, _)| !address.is_empty())
    });
    assert_eq!(refused, (new.address, new.epoch.to_string()));
    cluster.ends_without_a_restart(&run);
    assert_eq!(cluster.history.terms().len(), 2);
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_leader_that_is_cut_from_etcd_but_not_from_workers_is_replaced() {
    let mut cluster = Builder::new().etcd_by_proxies().start();
    let run = cluster.gated_run();
    let old = cluster.wait_for_leader();
    let start = Instant::now();
    for way in &cluster.to_etcd[old.index] {
        way.partition();
    }
    let new = cluster.wait_for_leader_after(old.epoch);
    let took = start.elapsed();
    eprintln!("another leader after {took:?}");
    assert!(took < LEASE + seconds(2), "{took:?}");
    // By now the old one must have stopped to answer, without a word from etcd.
    let refused = ask(&cluster, old.index, &run).unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    cluster.journal.open("g");
    cluster.succeeds(&run);
    // What it had under way to etcd arrives only now.
    for way in &cluster.to_etcd[old.index] {
        way.heal();
    }
    let hint = wait_for("it knows who leads", seconds(15), || {
        let refused = ask(&cluster, old.index, &run).unwrap_err();
        leader_hint(&refused).filter(|(address, _)| !address.is_empty())
    });
    assert_eq!(hint, (new.address, new.epoch.to_string()));
    cluster.ends_without_a_restart(&run);
    assert_eq!(cluster.history.terms().len(), 2);
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_leader_that_only_workers_cannot_reach_goes_on_leading() {
    let mut cluster = Builder::new()
        .coordinators_by_proxies()
        .coordinator_arguments(&["--worker-grace", "1s", "--heartbeat-interval", "200ms"])
        .start();
    let run = cluster.gated_run();
    let leader = cluster.wait_for_leader();
    cluster.to_coordinator[leader.index].partition();
    // Both workers are lost after a while: the task is queued again, by the same leader.
    wait_for("the attempt is lost", seconds(15), || {
        let versions = cluster.read_history().task(&run, "wait");
        (versions.last()?["written"] != "running").then_some(())
    });
    assert_eq!(cluster.wait_for_leader(), leader);
    cluster.journal.open("g");
    cluster.to_coordinator[leader.index].heal();
    cluster.succeeds(&run);
    cluster.check();
    assert_eq!(cluster.history.terms().len(), 1);
    // The worker that is found lost last may have been given it a moment before.
    let attempts = cluster.history.attempts(&run, "wait");
    assert!((2..=3).contains(&attempts), "{attempts}");
}

#[test]
fn the_death_of_a_follower_is_not_noticed() {
    let mut cluster = Builder::new().start();
    let run = cluster.gated_run();
    let leader = cluster.wait_for_leader();
    let follower = cluster.a_follower();
    cluster.coordinators[follower].kill();
    cluster.journal.open("g");
    cluster.succeeds(&run);
    cluster.coordinators[follower].start();
    cluster.coordinators[follower].wait_for_line(" serves on ");
    cluster.ends_without_a_restart(&run);
    assert_eq!(cluster.wait_for_leader(), leader);
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn what_ends_while_no_coordinator_lives_counts_when_one_is_back() {
    let mut cluster = Builder::new().start();
    let run = cluster.gated_run();
    for coordinator in &mut cluster.coordinators {
        coordinator.kill();
    }
    cluster.journal.open("g");
    wait_for("the task ends without a coordinator", seconds(10), || {
        (cluster.journal.ended(&run, "wait") == 1).then_some(())
    });
    for coordinator in &mut cluster.coordinators {
        coordinator.start();
    }
    cluster.ends_without_a_restart(&run);
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn leaders_killed_at_any_moment_lose_no_run_and_restart_nothing() {
    let mut cluster = Builder::new()
        .coordinator_arguments(&["--adoption-window", "1s"])
        .start();
    let mut runs = Vec::new();
    let mut steps: usize = 3;
    let mut last_kill = None;
    for _ in 0..6 {
        let pipeline = cluster.journal.chains(3, 4);
        runs.push(cluster.submit(&pipeline));
        // At a moment that differs from kill to kill, counted in what has happened by then.
        steps = (steps * 7 + 5) % 11;
        let before = cluster.journal.entries().len();
        wait_for("progress", seconds(20), || {
            (cluster.journal.entries().len() >= before + steps).then_some(())
        });
        if let Some(killed) = last_kill.take() {
            let node: &mut emberline_tests::node::Node = &mut cluster.coordinators[killed];
            node.start();
        }
        let leader = cluster.wait_for_leader();
        cluster.coordinators[leader.index].kill();
        cluster.wait_for_leader_after(leader.epoch);
        last_kill = Some(leader.index);
    }
    for run in &runs {
        let ended = cluster.succeeds(run);
        for task in &ended.tasks {
            let begun = cluster.journal.begun(run, &task.task);
            assert_eq!(begun, 1, "{} was restarted", task.task);
        }
    }
    cluster.check();
    assert_eq!(cluster.history.terms().len(), 7);
}

#[test]
fn a_commit_whose_answer_is_lost_counts_once() {
    let mut cluster = Builder::new().etcd_by_proxies().workers(1).start();
    let leader = cluster.wait_for_leader();
    let moments = ["state/runs/", "\"written\":\"succeeded\"", "state/ended/"];
    for (lost, moment) in (1..).zip(moments) {
        let way = &cluster.to_etcd[leader.index][0];
        way.lose_answer_to(moment, Duration::from_millis(100));
        let pipeline = cluster.journal.chains(1, 2);
        let run = cluster.submit(&pipeline);
        cluster.succeeds(&run);
        let way = &cluster.to_etcd[leader.index][0];
        wait_for("the loss", seconds(10), || {
            (way.lost_answers() == lost).then_some(())
        });
    }
    cluster.check();
    assert_eq!(
        cluster.history.terms().len(),
        1,
        "a lost answer is no reason to step down"
    );
}

#[test]
fn a_slow_way_to_etcd_is_no_reason_for_another_leader() {
    let mut cluster = Builder::new().etcd_by_proxies().start();
    for way in cluster.to_etcd.iter().flatten() {
        way.delay(Duration::from_millis(50));
    }
    let pipeline = cluster.journal.chains(4, 3);
    let run = cluster.submit(&pipeline);
    cluster.ends_without_a_restart(&run);
    assert_eq!(cluster.history.terms().len(), 1);
}

#[test]
fn a_nap_that_is_shorter_than_the_lease_changes_nothing() {
    let mut cluster = Builder::new().start();
    let run = cluster.gated_run();
    let leader = cluster.wait_for_leader();
    cluster.coordinators[leader.index].pause();
    // This is the fault, and not a wait for something.
    std::thread::sleep(Duration::from_millis(1_500));
    cluster.coordinators[leader.index].go_on();
    cluster.journal.open("g");
    cluster.ends_without_a_restart(&run);
    assert_eq!(cluster.history.terms().len(), 1);
    assert_eq!(cluster.history.attempts(&run, "wait"), 1);
}

#[test]
fn a_request_that_is_repeated_to_the_next_leader_is_the_same_run() {
    let mut cluster = Builder::new().workers(1).start();
    let pipeline = cluster.journal.chains(1, 2);
    let request = cluster.request(&pipeline);
    let run = cluster.client.submit(&request, seconds(20)).unwrap();
    cluster.acknowledged(&run);
    let leader = cluster.wait_for_leader();
    cluster.coordinators[leader.index].kill();
    let live = cluster.client.submit(&request, seconds(20)).unwrap();
    assert_eq!(live, run);
    cluster.succeeds(&run);
    let ended = cluster.client.submit(&request, seconds(20)).unwrap();
    assert_eq!(ended, run);
    cluster.check();
}

#[test]
fn a_run_that_is_cancelled_in_the_middle_of_a_failover_is_cancelled() {
    let mut cluster = Builder::new().start();
    let run = cluster.gated_run();
    let leader = cluster.wait_for_leader();
    cluster.coordinators[leader.index].kill();
    cluster.client.cancel(&run, seconds(20)).unwrap();
    wait_for("it is cancelled", seconds(20), || {
        (state_of(&cluster.run(&run)) == RunState::Cancelled).then_some(())
    });
    cluster.check();
    assert_eq!(cluster.journal.ended(&run, "wait"), 0);
    assert_eq!(cluster.journal.begun(&run, "wait"), 1);
    assert_eq!(cluster.journal.begun(&run, "last"), 0);
}

#[test]
fn the_command_line_follows_a_run_through_a_failover() {
    let mut cluster = Builder::new().start();
    let place = Place::new();
    place.write("p.yaml", cluster.journal.gated("g", ""));
    let servers = cluster.servers().join(",");
    let arguments = ["run", "p.yaml", "-o", "json", "-q", "--server", &servers];
    let follows = place.emberline(&arguments).start();
    wait_for("it waits at the gate", seconds(20), || {
        let entries = cluster.journal.entries();
        entries.iter().any(|e| e.task == "wait").then_some(())
    });
    let leader = cluster.wait_for_leader();
    cluster.coordinators[leader.index].kill();
    cluster.wait_for_leader_after(leader.epoch);
    cluster.journal.open("g");
    let seen = follows.finish().expect_code(0).json();
    assert_eq!(seen["state"], "succeeded");
    let run = seen["run"].as_str().unwrap();
    cluster.acknowledged(run);
    cluster.ends_without_a_restart(run);
}
