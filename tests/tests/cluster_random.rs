//! Faults of every kind in a random order, from a seed that is printed; and that the invariants, as
//! they are looked at, can fail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use emberline_tests::{
    cluster::{Builder, Cluster, PREFIX},
    outside, seconds, wait_for,
};

/// Random numbers that a seed determines (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % most as u64).unwrap()
    }
}

/// Kinds of harm that no attempt has to be begun again for; the rest is done to workers.
const HARMLESS_TO_ATTEMPTS: usize = 8;
const KINDS: usize = 11;

/// Does one kind of harm, and makes it good again.
fn harm(cluster: &mut Cluster, random: &mut Random, kinds: usize) {
    let leader = cluster.wait_for_leader();
    let worker = random.below(cluster.workers.len());
    let member = random.below(cluster.etcd.members());
    // How long a fault is: shorter or longer than leases and graces.
    let pause = Duration::from_millis([200, 1_200, 4_500][random.below(3)]);
    let kind = random.below(kinds);
    eprintln!("harm {kind}: {leader:?} w{worker} m{member} {pause:?}");
    match kind {
        0 | 1 => {
            cluster.coordinators[leader.index].kill();
            cluster.wait_for_leader_after(leader.epoch);
            cluster.coordinators[leader.index].start();
        }
        2 => {
            cluster.coordinators[leader.index].terminate();
            assert_eq!(cluster.coordinators[leader.index].wait(seconds(15)), 0);
            cluster.coordinators[leader.index].start();
        }
        3 => {
            cluster.coordinators[leader.index].pause();
            std::thread::sleep(pause);
            cluster.coordinators[leader.index].go_on();
        }
        4 => {
            for way in &cluster.to_etcd[leader.index] {
                way.partition();
            }
            std::thread::sleep(pause);
            for way in &cluster.to_etcd[leader.index] {
                way.heal();
            }
        }
        5 => {
            for way in cluster.to_etcd.iter().flatten() {
                way.cut();
            }
        }
        6 => {
            cluster.etcd.kill(member);
            std::thread::sleep(pause);
            cluster.etcd.restart(member);
        }
        7 => {
            cluster.etcd.pause(member);
            std::thread::sleep(pause);
            cluster.etcd.go_on(member);
        }
        8 => {
            cluster.workers[worker].kill();
            cluster.workers[worker].start();
        }
        9 => {
            cluster.workers[worker].pause();
            std::thread::sleep(pause);
            cluster.workers[worker].go_on();
        }
        _ => {
            cluster.workers[worker].terminate();
            assert_eq!(cluster.workers[worker].wait(seconds(15)), 0);
            cluster.workers[worker].start();
        }
    }
}

/// Runs under harm of the first so many kinds, to their end; gives them.
fn runs_under_harm(kinds: usize) -> (Cluster, Vec<String>) {
    let seed = std::env::var("EMBERLINE_FAULT_SEED").map_or(1, |text| text.parse().unwrap());
    let faults = std::env::var("EMBERLINE_FAULTS").map_or(6, |text| text.parse().unwrap());
    eprintln!("EMBERLINE_FAULT_SEED={seed} EMBERLINE_FAULTS={faults}");
    let mut random = Random(seed);
    let mut cluster = Builder::new().members(3).etcd_by_proxies().start();
    let mut runs = Vec::new();
    for _ in 0..faults {
        let (width, length) = (1 + random.below(4), 1 + random.below(5));
        // Some have work under way when the harm is done, some have much to assign and to report.
        let middle = [":", "sleep 0.1", "sleep 0.7"][random.below(3)];
        let pipeline = cluster.journal.chains_of(width, length, middle);
        // Many faults must not use up what a task may lose.
        let retries = "cache: false, retries: { lost_workers: 50 }";
        let run = cluster.submit(&pipeline.replace("cache: false", retries));
        let before = cluster.journal.entries().len();
        let steps = random.below(width * length);
        wait_for("progress", seconds(30), || {
            (cluster.journal.entries().len() >= before + steps).then_some(())
        });
        runs.push(run);
        harm(&mut cluster, &mut random, kinds);
    }
    cluster.etcd.wait_until_it_answers();
    for run in &runs {
        cluster.succeeds(run);
    }
    cluster.check();
    (cluster, runs)
}

#[test]
fn faults_in_any_order_lose_no_run_and_commit_no_task_twice() {
    let _ = runs_under_harm(KINDS);
}

#[test]
fn faults_of_coordinators_and_etcd_in_any_order_restart_nothing() {
    let (cluster, runs) = runs_under_harm(HARMLESS_TO_ATTEMPTS);
    for run in &runs {
        for task in cluster.run(run).tasks {
            let begun = cluster.journal.begun(run, &task.task);
            assert_eq!(begun, 1, "{run}/{} was restarted", task.task);
        }
    }
}

/// A run that is over, in a cluster that is small.
fn one_run() -> (Cluster, String) {
    let mut cluster = Builder::new().coordinators(1).workers(1).start();
    let pipeline = cluster.journal.chains(1, 1);
    let run = cluster.submit(&pipeline);
    cluster.succeeds(&run);
    cluster.check();
    (cluster, run)
}

/// What the check says.
#[track_caller]
fn found(cluster: &mut Cluster) -> String {
    let panic = catch_unwind(AssertUnwindSafe(|| cluster.check())).unwrap_err();
    panic.downcast_ref::<String>().unwrap().clone()
}

#[test]
fn what_is_damaged_lost_or_forged_is_found() {
    let (mut cluster, run) = one_run();
    // An acknowledgement that nobody remembers.
    cluster.acknowledged("r-lost");
    let lost = found(&mut cluster);
    assert!(lost.contains("r-lost"), "{lost}");

    let (mut cluster2, run2) = one_run();
    assert_ne!(run, run2);
    let archive = cluster2.archive(&run2);
    let manifest = archive["view"]["tasks"][0]["outputs"][0]["manifest"].clone();
    let object = outside::object(&cluster2.artifacts(), manifest.as_str().unwrap());
    let whole = fs::read(&object).unwrap();
    fs::write(&object, &whole[1..]).unwrap();
    let damaged = found(&mut cluster2);
    assert!(damaged.contains("is damaged"), "{damaged}");
    fs::write(&object, whole).unwrap();
    cluster2.check();

    let log = cluster2
        .root()
        .join(format!("objects/logs/{run2}/c0-0/1/00000000"));
    let whole = fs::read_to_string(&log).unwrap();
    let without = whole.split_inclusive('\n').skip(1).collect::<String>();
    fs::write(&log, without).unwrap();
    let cut = found(&mut cluster2);
    assert!(!cut.is_empty());
    fs::write(&log, whole).unwrap();
    cluster2.check();

    let key = format!("{PREFIX}/state/models/forged");
    cluster2.etcd.put(&key, "{}").unwrap();
    let forged = found(&mut cluster2);
    assert!(forged.contains("changed without a commit"), "{forged}");
}
