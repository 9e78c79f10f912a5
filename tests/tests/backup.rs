//! A cluster that is lost as a whole and made again from a backup, as docs/operations.md says: a
//! snapshot of etcd, then a copy of the bucket.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use emberline_proto::v1::RunState;
use emberline_tests::{
    Etcd, Fleet, S3Server, Traffic,
    client::state_of,
    cluster::{Builder, Cluster, PREFIX},
    node::Node,
    outside,
    pipelines::LINES,
    processes,
    s3::files_below,
    seconds, wait_for,
};
use serde_json::Value;

/// Copies what is not there yet, as any tool that synchronizes buckets does.
fn copy_bucket(from: &S3Server, to: &S3Server) {
    for file in files_below(&from.bucket()) {
        let target = to.bucket().join(file.strip_prefix(from.bucket()).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(&file, &target).unwrap();
    }
}

fn on(server: &S3Server) -> Builder {
    Builder::new()
        .coordinators(2)
        .impatient()
        .on_s3(server, &server.address())
        .worker_arguments(&["--serve", "127.0.0.1:0"])
}

/// Ends everything at once, as a fire would.
fn destroy(cluster: &mut Cluster) {
    for node in cluster.coordinators.iter_mut().chain(&mut cluster.workers) {
        node.kill();
    }
    for member in 0..cluster.etcd.members() {
        cluster.etcd.kill(member);
    }
}

fn live_version(fleet: &Fleet) -> Value {
    fleet.live()["version"].clone()
}

#[test]
fn a_cluster_that_is_lost_goes_on_from_its_backup() {
    let (mut bucket, copy) = (S3Server::start(), S3Server::start());
    let mut lost = on(&bucket).start();
    let fleet = Fleet::new().on(lost.servers());
    let first = fleet.deliver("good", 1, "");
    fleet.wait_for_outcome(&first, "live", seconds(20));
    let chains = lost.journal.chains(2, 3);
    let ended = lost.submit(&chains);
    lost.succeeds(&ended);
    let running = lost.gated_run();

    // The backup: etcd first, then the bucket. The cluster goes on meanwhile.
    let snapshot = lost.root().join("etcd.snapshot");
    lost.etcd.snapshot(&snapshot);
    let chains = lost.journal.chains(1, 2);
    let later = lost.submit(&chains);
    lost.succeeds(&later);
    let second = fleet.deliver("bad", 2, "");
    fleet.wait_for_outcome(&second, "live", seconds(20));
    copy_bucket(&bucket, &copy);

    destroy(&mut lost);
    bucket.kill();
    fs::remove_dir_all(bucket.bucket()).unwrap();

    let etcd = Etcd::restored(&snapshot, 3);
    let mut cluster = on(&copy).on_etcd(etcd).start();
    let fleet = Fleet::new().on(cluster.servers());
    // What had ended is there, with what it has logged.
    cluster.succeeds(&ended);
    let logs = fleet.call(&["runs", "logs", &ended, "--task", "c0-0"]);
    assert!(logs.stdout.contains("line 1 of"), "{logs}");
    // What ran has lost its worker, is begun again, and ends.
    assert_eq!(state_of(&cluster.run(&running)), RunState::Running);
    lost.wait_for_begin(&running, "wait", 2);
    lost.journal.open("g");
    let done = cluster.succeeds(&running);
    let attempts = |task: &str| {
        let mut tasks = done.tasks.iter();
        tasks.find(|t| t.task == task).unwrap().attempt
    };
    assert_eq!((attempts("first"), attempts("wait")), (1, 2));
    assert_eq!(lost.journal.begun(&running, "first"), 1);
    // What was live is live again, and is served.
    let live = wait_for("it is served", seconds(30), || {
        fleet.addresses().into_iter().next()
    });
    assert_eq!(live_version(&fleet), 1);
    let traffic = Traffic::start(&live, "pumps", 1);
    wait_for("it answers", seconds(20), || {
        (traffic.answered_by(1) > 20).then_some(())
    });
    assert_eq!(traffic.stop().failures, Vec::<String>::new());
    // What came after the snapshot is gone, and nothing is in the way of the next one.
    assert!(cluster.client.run(&later, seconds(5)).is_err());
    let next = fleet.deliver("good", 3, "");
    fleet.wait_for_outcome(&next, "live", seconds(20));
    assert_eq!(live_version(&fleet), 2);

    let delivered = fleet.runs();
    let before = fleet_runs_before(&cluster, &[&ended, &running], &delivered);
    for run in [ended, running].iter().chain(&delivered).chain(&before) {
        cluster.acknowledged(run);
    }
    copy.every_object_hashes_to_its_name("objects");
    cluster.check();
}

#[test]
fn a_run_that_went_on_after_the_snapshot_goes_another_way_to_its_end() {
    let (bucket, copy) = (S3Server::start(), S3Server::start());
    let mut lost = on(&bucket).workers(1).start();
    let run = lost.gated_run();
    let snapshot = lost.root().join("etcd.snapshot");
    lost.etcd.snapshot(&snapshot);
    // Its second attempt, which the snapshot does not know, logs in several pieces and ends.
    lost.workers[0].kill();
    lost.workers[0].start();
    lost.wait_for_begin(&run, "wait", 2);
    let log = bucket.bucket().join(format!("objects/logs/{run}/wait/2"));
    wait_for("its first half is logged", seconds(20), || {
        (!files_below(&log).is_empty()).then_some(())
    });
    lost.journal.open("g");
    lost.succeeds(&run);
    copy_bucket(&bucket, &copy);
    destroy(&mut lost);

    let mut cluster = on(&copy)
        .workers(1)
        .on_etcd(Etcd::restored(&snapshot, 1))
        .start();
    // Again a second attempt. In the bucket lies what the first one of that number has logged: where the
    // new one has ended, nobody reads on.
    let ended = cluster.succeeds(&run);
    let wait = ended.tasks.iter().find(|t| t.task == "wait").unwrap();
    assert_eq!(wait.attempt, 2);
    let fleet = Fleet::new().on(cluster.servers());
    let logs = fleet.call(&["runs", "logs", &run, "--task", "wait", "--attempt", "2"]);
    let last = logs.stdout.lines().filter(|line| line.contains("line "));
    assert_eq!(last.count(), LINES, "{logs}");
    copy.every_object_hashes_to_its_name("objects");
    let violations = cluster.read_history().violations();
    assert!(violations.is_empty(), "{violations:#?}");
}

/// The runs that the cluster knows beside these: the first delivery.
fn fleet_runs_before(cluster: &Cluster, known: &[&String], delivered: &[String]) -> Vec<String> {
    let keys = cluster.etcd.keys("emberline/state/ended/").unwrap();
    let runs = keys.iter().map(|key| key.rsplit('/').next().unwrap());
    let others = runs.filter(|run| {
        !known.iter().any(|k| k.as_str() == *run) && !delivered.iter().any(|d| d == run)
    });
    let others: Vec<String> = others.map(str::to_owned).collect();
    assert_eq!(others.len(), 1, "{keys:?}");
    others
}

/// Runs a coordinator until it refuses, and gives what it says.
fn refusal(node: &mut Node) -> String {
    assert_eq!(node.wait(seconds(30)), 3, "{}", node.stderr());
    node.stderr()
}

#[test]
fn an_etcd_that_is_older_than_its_bucket_is_not_led_until_somebody_says_so() {
    let bucket = S3Server::start();
    let mut lost = on(&bucket).workers(1).start();
    let chains = lost.journal.chains(1, 2);
    let kept = lost.submit(&chains);
    lost.succeeds(&kept);
    let snapshot = lost.root().join("etcd.snapshot");
    lost.etcd.snapshot(&snapshot);
    // A later run, and a later term, which is noted beside the artifacts.
    let chains = lost.journal.chains(4, 4);
    let later = lost.submit(&chains);
    lost.succeeds(&later);
    let before = lost.wait_for_leader();
    lost.coordinators[before.index].kill();
    let after = lost.wait_for_leader_after(before.epoch);
    let noted = bucket.bucket().join("objects/cluster/highest-term");
    wait_for("the term is noted", seconds(20), || {
        (read(&noted)? == after.epoch.to_string()).then_some(())
    });
    destroy(&mut lost);

    let etcd = Etcd::restored(&snapshot, 1);
    let mut cluster = on(&bucket).workers(1).on_etcd(etcd).prepare();
    cluster.coordinators[0].start();
    let why = refusal(&mut cluster.coordinators[0]);
    assert!(
        why.contains("its etcd was restored from an old copy"),
        "{why}"
    );
    let object = "s3://emberline/objects/cluster/highest-term";
    assert!(
        why.contains(&format!("remove the object {object} and start again")),
        "{why}"
    );
    // Nothing was changed, and it refuses again.
    cluster.coordinators[1].start();
    refusal(&mut cluster.coordinators[1]);
    assert_eq!(read(&noted).unwrap(), after.epoch.to_string());

    fs::remove_file(&noted).unwrap();
    for node in cluster.coordinators.iter_mut().chain(&mut cluster.workers) {
        node.start();
    }
    cluster.wait_until_it_serves();
    cluster.succeeds(&kept);
    assert!(cluster.client.run(&later, seconds(5)).is_err());
    let chains = cluster.journal.chains(1, 2);
    let run = cluster.submit(&chains);
    cluster.succeeds(&run);
    cluster.acknowledged(&kept);
    cluster.check();
    let leader = cluster.wait_for_leader();
    assert_eq!(read(&noted).unwrap(), leader.epoch.to_string());
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

#[test]
fn a_bucket_under_another_name_is_another_cluster_until_somebody_says_so() {
    let (bucket, copy) = (S3Server::start(), S3Server::start());
    let mut lost = on(&bucket).workers(1).start();
    let chains = lost.journal.chains(1, 2);
    let kept = lost.submit(&chains);
    lost.succeeds(&kept);
    let snapshot = lost.root().join("etcd.snapshot");
    lost.etcd.snapshot(&snapshot);
    copy_bucket(&bucket, &copy);
    destroy(&mut lost);
    fs::rename(
        copy.bucket().join("objects"),
        copy.bucket().join("elsewhere"),
    )
    .unwrap();

    let etcd = Etcd::restored(&snapshot, 1);
    let mut cluster = on(&copy)
        .workers(1)
        .prefix("elsewhere")
        .on_etcd(etcd)
        .prepare();
    cluster.coordinators[0].start();
    let why = refusal(&mut cluster.coordinators[0]);
    assert!(
        why.contains("keeps its artifacts in s3://emberline/objects"),
        "{why}"
    );
    let note = r#"{"artifacts":"s3://emberline/elsewhere"}"#;
    cluster.etcd.put("emberline/cluster", note).unwrap();
    for node in cluster.coordinators.iter_mut().chain(&mut cluster.workers) {
        node.start();
    }
    cluster.wait_until_it_serves();
    cluster.succeeds(&kept);
    let fleet = Fleet::new().on(cluster.servers());
    let out = fleet.call(&["artifacts", "ls", &kept]);
    assert_eq!(out.code, Some(0), "{out}");
    let logs = fleet.call(&["runs", "logs", &kept, "--task", "c0-0"]);
    assert!(logs.stdout.contains("line 1 of"), "{logs}");
}

#[test]
fn an_etcd_of_which_one_member_is_left_goes_on_alone() {
    let mut cluster = Builder::new().members(3).impatient().start();
    let run = cluster.gated_run();
    for member in [0, 2] {
        cluster.etcd.kill(member);
    }
    let refused = wait_for("clients are told why", seconds(30), || {
        let leads = |server: &String| {
            let asked = cluster.client.ask(server, async |mut client| {
                client.submit_run(cluster.request("pipeline: p\n")).await
            });
            asked.err().filter(|e| e.message().contains("read-only"))
        };
        cluster.servers().iter().find_map(leads)
    });
    assert!(refused.message().contains("etcd"), "{refused}");
    cluster.etcd.go_on_alone(1);
    // Coordinators that name all three find the one that is left.
    cluster.wait_for_leader();
    let chains = cluster.journal.chains(1, 2);
    let other = cluster.submit(&chains);
    cluster.succeeds(&other);
    cluster.journal.open("g");
    cluster.ends_without_a_restart(&run);
}

#[test]
fn a_live_run_whose_pipeline_is_lost_is_named_and_can_be_given_up() {
    let mut cluster = Builder::new().coordinators(1).impatient().start();
    let chains = cluster.journal.chains(1, 2);
    let ended = cluster.submit(&chains);
    cluster.succeeds(&ended);
    let lost = cluster.gated_run();
    let key = format!("emberline/state/runs/{lost}");
    let record: Value = serde_json::from_slice(cluster.etcd.get(&key).unwrap().value()).unwrap();
    let spec = record["spec"].as_str().unwrap();
    cluster.coordinators[0].kill();
    fs::remove_file(outside::object(&cluster.artifacts(), spec)).unwrap();
    cluster.coordinators[0].start();
    let why = refusal(&mut cluster.coordinators[0]);
    let expected = format!("the pipeline {spec} of run `{lost}` is missing in the object store");
    assert!(why.contains(&expected), "{why}");

    cluster.etcd.delete(&key);
    cluster
        .etcd
        .delete(&format!("emberline/state/tasks/{lost}/"));
    cluster.coordinators[0].start();
    cluster.wait_until_it_serves();
    cluster.succeeds(&ended);
    let chains = cluster.journal.chains(1, 2);
    let next = cluster.submit(&chains);
    cluster.succeeds(&next);
    assert!(cluster.client.run(&lost, seconds(5)).is_err());
    // Its command was ended with it.
    wait_for("nothing of it runs", seconds(20), || {
        processes::of_attempts_below(cluster.root())
            .is_empty()
            .then_some(())
    });
}

#[test]
fn models_in_service_outlive_their_bucket_and_a_copy_makes_it_good_again() {
    let mut cluster = Builder::new()
        .coordinators(1)
        .workers(1)
        .impatient()
        .worker_arguments(&["--serve", "127.0.0.1:0"])
        .start();
    let fleet = Fleet::new().on(cluster.servers());
    let first = fleet.deliver("good", 1, "");
    fleet.wait_for_outcome(&first, "live", seconds(20));
    let objects = cluster.artifacts().join("objects");
    let backup = cluster.artifacts().join("backup");
    // Until then the leader knows the run by itself.
    wait_for("the run's archive", seconds(20), || {
        let ended = cluster.etcd.keys(&format!("{PREFIX}/state/ended/"))?;
        (ended.len() == 1).then_some(())
    });
    fs::rename(&objects, &backup).unwrap();
    fs::create_dir(&objects).unwrap();

    let traffic = Traffic::start(&fleet.addresses()[0], "pumps", 1);
    wait_for("it answers", seconds(20), || {
        (traffic.answered_by(1) > 20).then_some(())
    });
    assert_eq!(traffic.stop().failures, Vec::<String>::new());
    // So does a worker that is started now, from its cache.
    cluster.workers[0].kill();
    cluster.workers[0].start();
    let line = cluster.workers[0].wait_for_line(" serves models of ");
    let address = line.rsplit_once("http://").unwrap().1.to_owned();
    wait_for("the leader knows of it", seconds(30), || {
        fleet.addresses().contains(&address).then_some(())
    });
    let traffic = Traffic::start(&address, "pumps", 1);
    wait_for("it answers again", seconds(20), || {
        (traffic.answered_by(1) > 20).then_some(())
    });
    assert_eq!(traffic.stop().failures, Vec::<String>::new());
    let run = &fleet.runs()[0];
    let shown = fleet.call(&["runs", "show", run]);
    assert!(shown.stderr.contains("is not in the store"), "{shown}");

    for file in files_below(&backup) {
        let target = objects.join(file.strip_prefix(&backup).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::rename(&file, &target).unwrap();
    }
    let shown = fleet.json(&["runs", "show", run]);
    assert_eq!(shown["state"], "succeeded", "{shown:#}");
    let second = fleet.deliver("good", 2, "");
    fleet.wait_for_outcome(&second, "live", seconds(20));
    for run in fleet.runs() {
        cluster.acknowledged(&run);
    }
    cluster.check();
}
