//! Models in service on a cluster: leaders and replicas die in the middle of a canary, and clients notice
//! nothing of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use emberline_tests::{
    Fleet, Traffic,
    cluster::{Builder, Cluster},
    seconds, wait_for,
};
use serde_json::Value;

/// A cluster whose workers all serve, and on it a model with one live version on so many replicas.
fn served(coordinators: usize, workers: usize, replicas: u32) -> (Cluster, Fleet) {
    let cluster = Builder::new()
        .coordinators(coordinators)
        .workers(workers)
        .worker_arguments(&["--serve", "127.0.0.1:0"])
        .impatient()
        .start();
    let fleet = Fleet::new().on(cluster.servers());
    let first = fleet.deliver("good", 1, &format!(", replicas: {replicas}"));
    fleet.wait_for_outcome(&first, "live", seconds(20));
    (cluster, fleet)
}

/// The workers that are the model's replicas, and have these versions ready.
fn replicas(fleet: &Fleet, versions: &[u64]) -> Vec<String> {
    let live = fleet.live();
    let replicas = live["replicas"].as_array().unwrap().iter();
    let ready = replicas.filter(|replica| {
        let has = |version: &u64| {
            let mut all = replica["versions"].as_array().unwrap().iter();
            all.any(|v| v["version"] == *version && v["state"] == "ready")
        };
        replica["placed"] == true && replica["ready"] == true && versions.iter().all(has)
    });
    ready
        .map(|replica| replica["worker"].as_str().unwrap().to_owned())
        .collect()
}

fn address_of(fleet: &Fleet, worker: &str) -> String {
    let live = fleet.live();
    let mut replicas = live["replicas"].as_array().unwrap().iter();
    let found = replicas.find(|replica| replica["worker"] == worker);
    found.unwrap()["address"].as_str().unwrap().to_owned()
}

fn number_of(cluster: &Cluster, worker: &str) -> usize {
    let mut workers = cluster.workers.iter();
    workers.position(|node| node.name() == worker).unwrap()
}

/// The invariants, with all that was delivered.
fn check(cluster: &mut Cluster, fleet: &Fleet) {
    for run in fleet.runs() {
        cluster.acknowledged(&run);
    }
    cluster.check();
}

fn step(deployment: &Value) -> u64 {
    deployment["rollout"]["step"].as_u64().unwrap()
}

const CANARY: &str = ", strategy: { type: canary, steps: [ { weight: 20, for: 500ms }, { weight: 50, for: 4s } ], min_requests: 30, conditions: { max_error_rate: 0 } }";

#[test]
fn a_killed_leader_costs_a_canary_nothing() {
    let (mut cluster, fleet) = served(2, 1, 1);
    let worker = replicas(&fleet, &[1]).remove(0);
    let traffic = Traffic::start(&address_of(&fleet, &worker), "pumps", 4);
    let second = fleet.deliver("good", 2, CANARY);
    let before = wait_for("the second step", seconds(20), || {
        let now = fleet.deployment(&second);
        (step(&now) == 2).then_some(now)
    });
    let leader = cluster.wait_for_leader().index;
    cluster.coordinators[leader].kill();
    let after = fleet.deployment(&second);
    assert_eq!(step(&after), 2, "{after:#}");
    // The step began when it began, whoever leads.
    assert_eq!(after["rollout"]["since"], before["rollout"]["since"]);
    let done = fleet.wait_for_outcome(&second, "live", seconds(60));
    let answers = traffic.stop();
    assert_eq!(answers.failures, Vec::<String>::new());
    assert!(answers.by_version["2"] > 30, "{:?}", answers.by_version);
    let of = |value: &Value| emberline_common::time::Timestamp::parse(value.as_str().unwrap());
    let (began, live) = (of(&before["rollout"]["since"]), of(&done["finished_at"]));
    let took = live.unwrap().since(began.unwrap());
    assert!(took >= seconds(4) && took < seconds(20), "{took:?}");
    check(&mut cluster, &fleet);
}

#[test]
fn a_replica_that_dies_in_a_canary_is_replaced_with_both_versions() {
    let (mut cluster, fleet) = served(1, 3, 2);
    let both = replicas(&fleet, &[1]);
    assert_eq!(both.len(), 2);
    let kept = Traffic::start(&address_of(&fleet, &both[0]), "pumps", 2);
    let second = fleet.deliver(
        "good",
        2,
        &CANARY
            .replace("for: 4s", "for: 60s")
            .replace("type: canary", "type: canary, approval: false"),
    );
    wait_for("the canary is on both", seconds(20), || {
        (replicas(&fleet, &[1, 2]).len() == 2 && step(&fleet.deployment(&second)) == 2)
            .then_some(())
    });
    let dies = number_of(&cluster, &both[1]);
    let died = Instant::now();
    cluster.workers[dies].kill();
    let now = wait_for("the third worker has taken its place", seconds(20), || {
        let now = replicas(&fleet, &[1, 2]);
        (now.len() == 2 && !now.contains(&both[1])).then_some(now)
    });
    eprintln!(
        "both versions answer on another worker after {:?}",
        died.elapsed()
    );
    let came = now.iter().find(|worker| **worker != both[0]).unwrap();
    let traffic = Traffic::start(&address_of(&fleet, came), "pumps", 2);
    wait_for("the canary answers there", seconds(10), || {
        (traffic.answered_by(2) > 5).then_some(())
    });
    assert_eq!(fleet.deployment(&second)["outcome"], "in_progress");
    for traffic in [kept, traffic] {
        assert_eq!(traffic.stop().failures, Vec::<String>::new());
    }
    check(&mut cluster, &fleet);
}

#[test]
fn a_worker_that_drains_goes_when_another_one_answers() {
    let (mut cluster, fleet) = served(1, 2, 1);
    let old = replicas(&fleet, &[1]).remove(0);
    let traffic = Traffic::start(&address_of(&fleet, &old), "pumps", 2);
    wait_for("it answers", seconds(10), || {
        (traffic.answered_by(1) > 20).then_some(())
    });
    let number = number_of(&cluster, &old);
    cluster.workers[number].terminate();
    let new = wait_for("another one has it", seconds(20), || {
        replicas(&fleet, &[1])
            .into_iter()
            .find(|worker| *worker != old)
    });
    // Whoever had connections to the old one was answered until then.
    let answers = traffic.stop();
    let own = answers
        .failures
        .iter()
        .find(|f| !f.contains("Unavailable") && !f.contains("transport"));
    assert_eq!(own, None, "{:?}", answers.failures);
    let traffic = Traffic::start(&address_of(&fleet, &new), "pumps", 2);
    wait_for("the new one answers", seconds(10), || {
        (traffic.answered_by(1) > 20).then_some(())
    });
    assert_eq!(traffic.stop().failures, Vec::<String>::new());
    check(&mut cluster, &fleet);
}

#[test]
fn what_is_live_is_served_while_nobody_leads() {
    let (mut cluster, fleet) = served(2, 1, 1);
    let worker = replicas(&fleet, &[1]).remove(0);
    let address = address_of(&fleet, &worker);
    let traffic = Traffic::start(&address, "pumps", 4);
    for coordinator in &mut cluster.coordinators {
        coordinator.kill();
    }
    let before = traffic.answered_by(1);
    wait_for("it answers without a leader", seconds(20), || {
        (traffic.answered_by(1) > before + 200).then_some(())
    });
    for coordinator in &mut cluster.coordinators {
        coordinator.start();
    }
    cluster.wait_until_it_serves();
    // The new leader finds it where it is, and it has never stopped.
    wait_for("the leader knows of it", seconds(30), || {
        (replicas(&fleet, &[1]) == [worker.clone()]).then_some(())
    });
    assert_eq!(address_of(&fleet, &worker), address);
    assert_eq!(traffic.stop().failures, Vec::<String>::new());
    check(&mut cluster, &fleet);
}

#[test]
fn a_rollback_is_everywhere_within_a_second() {
    let (mut cluster, fleet) = served(1, 2, 2);
    let second = fleet.deliver("good", 2, ", replicas: 2");
    fleet.wait_for_outcome(&second, "live", seconds(20));
    let both = wait_for("both serve it", seconds(10), || {
        let both = replicas(&fleet, &[1, 2]);
        (both.len() == 2).then_some(both)
    });
    let streams: Vec<Traffic> = (both.iter())
        .map(|worker| Traffic::start(&address_of(&fleet, worker), "pumps", 2))
        .collect();
    for traffic in &streams {
        wait_for("it answers", seconds(10), || {
            (traffic.answered_by(2) > 20).then_some(())
        });
    }
    let asked = Instant::now();
    let _ = fleet.json(&["rollback", "production"]);
    for traffic in &streams {
        wait_for("the good one answers", seconds(5), || {
            (traffic.answered_by(1) > 0).then_some(())
        });
    }
    let took = asked.elapsed();
    eprintln!("rolled back on both replicas after {took:?}, the command included");
    assert!(took < Duration::from_secs(5), "{took:?}");
    for traffic in streams {
        assert_eq!(traffic.stop().failures, Vec::<String>::new());
    }
    check(&mut cluster, &fleet);
}

#[test]
fn a_worker_that_starts_while_nobody_leads_serves_what_it_served() {
    let (mut cluster, fleet) = served(1, 1, 1);
    let address = fleet.addresses().remove(0);
    cluster.coordinators[0].kill();
    cluster.workers[0].kill();
    let before = address.clone();
    cluster.workers[0].start();
    let address = wait_for("it says where it serves now", seconds(10), || {
        let stdout = cluster.workers[0].stdout();
        let mut lines = stdout.lines().rev();
        let line = lines.find(|line| line.contains(" serves models of "))?;
        let address = line.rsplit_once("http://")?.1.to_owned();
        (address != before).then_some(address)
    });
    let runtime = tokio::runtime::Runtime::new().unwrap();
    wait_for("it answers", seconds(10), || {
        runtime.block_on(async {
            let mut client = emberline_tests::traffic::connect(&address).await;
            let request = emberline_tests::traffic::request("pumps", "x", 60);
            let answer = client.model_infer(request).await.ok()?.into_inner();
            (answer.model_version == "1").then_some(())
        })
    });
    // The next leader finds it there.
    cluster.coordinators[0].start();
    cluster.wait_until_it_serves();
    wait_for("the leader knows of it", seconds(30), || {
        (replicas(&fleet, &[1]).len() == 1).then_some(())
    });
    check(&mut cluster, &fleet);
}
