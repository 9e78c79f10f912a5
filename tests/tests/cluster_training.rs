//! A training outlives its worker and its leader: it goes on from its checkpoint, to the same
//! weights bit for bit.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use emberline_proto::v1::GetRunResponse;
use emberline_tests::{
    Place,
    cluster::{Builder, Cluster},
    outside, seconds, wait_for,
};

/// The pipeline of `init`, with a training that takes long enough to be disturbed in.
fn pipeline(cluster: &Cluster, epochs: u32) -> String {
    let place = Place::new();
    place.emberline(&["init", "."]).run().expect_code(0);
    for entry in fs::read_dir(place.dir()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let name = path.file_name().unwrap();
            fs::copy(&path, cluster.root().join(name)).unwrap();
        }
    }
    copy_dir(&place.path("data"), &cluster.root().join("data"));
    let text = fs::read_to_string(place.path("pipeline.yaml")).unwrap();
    let settings = format!("epochs: {epochs}\n      checkpoint_every: 100ms");
    let changed = text.replace("epochs: 30", &settings);
    assert_ne!(text, changed);
    changed
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    let Ok(entries) = fs::read_dir(from) else {
        return;
    };
    fs::create_dir_all(to).unwrap();
    for entry in entries {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn submit(cluster: &mut Cluster, pipeline: &str) -> String {
    let mut request = cluster.request(pipeline);
    request.no_cache = true;
    let run = cluster.client.submit(&request, seconds(20)).unwrap();
    cluster.acknowledged(&run);
    run
}

fn model(run: &GetRunResponse) -> String {
    let train = run.tasks.iter().find(|t| t.task == "train").unwrap();
    train.outputs[0].manifest.clone()
}

/// Waits until the training has a checkpoint, and gives its worker.
fn trains(cluster: &Cluster, run: &str) -> usize {
    let checkpoint = cluster
        .root()
        .join(format!("objects/checkpoints/{run}/train"));
    wait_for("a checkpoint", seconds(30), || {
        checkpoint.exists().then_some(())
    });
    cluster.worker_of(run, "train")
}

/// The second attempt went on from a checkpoint.
#[track_caller]
fn went_on_from_a_checkpoint(cluster: &Cluster, run: &str) {
    let log = outside::log(&cluster.artifacts(), run, "train", 2).unwrap();
    assert!(log.is_sealed);
    let first = log.lines.iter().find(|l| l.starts_with("epoch")).unwrap();
    assert!(!first.starts_with("epoch 1/"), "{first}");
}

fn builder() -> Builder {
    Builder::new().impatient()
}

#[test]
fn a_training_goes_on_elsewhere_from_its_checkpoint_to_the_same_weights() {
    let mut cluster = builder().coordinators(1).start();
    let pipeline = pipeline(&cluster, 400);
    let undisturbed = submit(&mut cluster, &pipeline);
    let expected = model(&cluster.succeeds(&undisturbed));

    let killed = submit(&mut cluster, &pipeline);
    let worker = trains(&cluster, &killed);
    cluster.workers[worker].kill();
    let ended = cluster.succeeds(&killed);
    assert_eq!(model(&ended), expected, "after kill -9");
    went_on_from_a_checkpoint(&cluster, &killed);
    cluster.workers[worker].start();
    cluster.workers[worker].wait_for_line(" has a session with ");

    let terminated = submit(&mut cluster, &pipeline);
    let worker = trains(&cluster, &terminated);
    cluster.workers[worker].terminate();
    assert_eq!(cluster.workers[worker].wait(seconds(15)), 0);
    let ended = cluster.succeeds(&terminated);
    assert_eq!(model(&ended), expected, "after SIGTERM");
    went_on_from_a_checkpoint(&cluster, &terminated);

    cluster.check();
    assert_eq!(cluster.history.attempts(&killed, "train"), 2);
    assert_eq!(cluster.history.spent(&killed, "train").2, 1);
    assert_eq!(cluster.history.attempts(&terminated, "train"), 2);
    assert_eq!(cluster.history.spent(&terminated, "train"), (0, 0, 0));
}

#[test]
fn a_training_does_not_notice_that_another_coordinator_leads() {
    let mut cluster = builder().start();
    let pipeline = pipeline(&cluster, 400);
    let undisturbed = submit(&mut cluster, &pipeline);
    let expected = model(&cluster.succeeds(&undisturbed));
    let run = submit(&mut cluster, &pipeline);
    trains(&cluster, &run);
    let leader = cluster.wait_for_leader();
    cluster.coordinators[leader.index].kill();
    let new = cluster.wait_for_leader_after(leader.epoch);
    assert_ne!(new.index, leader.index);
    let ended = cluster.succeeds(&run);
    assert_eq!(model(&ended), expected);
    cluster.check();
    assert_eq!(
        cluster.history.attempts(&run, "train"),
        1,
        "it was restarted"
    );
}
