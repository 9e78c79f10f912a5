//! Two releases in one cluster, as in every upgrade. The other release is the program that
//! `EMBERLINE_PREVIOUS` names, or else the newest tag `v…` before this commit, which is built first.
//! Where there is neither, nothing is checked, and that is said.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use emberline_tests::{
    cluster::{Builder, Cluster},
    place::{binary, repository},
    seconds, wait_for,
};

/// Runs a command, and gives its output if it succeeds.
fn output_of(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(text)
}

fn git(arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    output_of(command.arg("-C").arg(repository()).args(arguments))
}

/// Builds the program of a tag, or finds it built. It stays beside the program under test.
fn built(tag: &str) -> PathBuf {
    let place = binary().parent().unwrap().join("previous").join(tag);
    let (source, target) = (place.join("source"), place.join("target"));
    if !source.is_dir() {
        fs::create_dir_all(&place).unwrap();
        let fresh = tempfile::tempdir_in(&place).unwrap();
        let archive = fresh.path().join("source.tar");
        let to = archive.display().to_string();
        git(&["archive", "--prefix", "source/", "--output", &to, tag]).expect("the tag's source");
        let mut unpack = Command::new("tar");
        unpack.arg("-xf").arg(&archive).current_dir(fresh.path());
        output_of(&mut unpack).expect("the tag's source, unpacked");
        // Another test may have been faster.
        let _ = fs::rename(fresh.path().join("source"), &source);
    }
    // Of two that build at once one waits for the other, and finds all done.
    let mut build = Command::new(env!("CARGO"));
    build
        .args(["build", "--locked", "-p", "emberline-cli", "--target-dir"])
        .arg(&target)
        .current_dir(&source);
    output_of(&mut build)
        .unwrap_or_else(|| panic!("{tag} cannot be built in {}", source.display()));
    target.join("debug/emberline")
}

/// The program of the release before this one.
fn previous() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("EMBERLINE_PREVIOUS") {
        let path = PathBuf::from(path);
        assert!(path.is_file(), "EMBERLINE_PREVIOUS names no file: {path:?}");
        return Some(path);
    }
    let tag = git(&["describe", "--tags", "--abbrev=0", "--match", "v*", "HEAD^"]);
    if tag.is_none() {
        eprintln!(
            "NOT CHECKED: there is no tag `v…` and no EMBERLINE_PREVIOUS, so no release before this one"
        );
    }
    tag.map(|tag| built(&tag))
}

/// A cluster whose parts are all of one build, and serve.
fn all_of(program: &Path) -> Cluster {
    let mut cluster = Builder::new().impatient().prepare();
    for node in cluster.coordinators.iter_mut().chain(&mut cluster.workers) {
        node.set_program(program);
        node.start();
    }
    cluster.wait_until_it_serves();
    cluster
}

/// Restarts a coordinator as another build, and waits until somebody leads and it serves.
fn replace_coordinator(cluster: &mut Cluster, index: usize, program: &Path) {
    let node = &mut cluster.coordinators[index];
    node.terminate();
    assert_eq!(node.wait(seconds(20)), 0, "{}", node.stderr());
    node.set_program(program);
    node.start();
    node.wait_for_line(" serves on ");
    cluster.wait_for_leader();
}

fn replace_worker(cluster: &mut Cluster, index: usize, program: &Path) {
    let node = &mut cluster.workers[index];
    node.terminate();
    assert_eq!(node.wait(seconds(20)), 0, "{}", node.stderr());
    node.set_program(program);
    node.start();
    node.wait_for_line(" has a session with ");
}

/// A run of some tasks on each worker, from submit to its end.
fn works(cluster: &mut Cluster) {
    let chains = cluster.journal.chains(2, 2);
    let run = cluster.submit(&chains);
    cluster.succeeds(&run);
}

/// Followers first, the leader last, then workers: what docs/operations.md says.
fn upgrade(from: &Path, to: &Path) {
    let mut cluster = all_of(from);
    works(&mut cluster);
    let run = cluster.gated_run();
    let leader = cluster.wait_for_leader().index;
    let count = cluster.coordinators.len();
    let followers = (0..count).filter(|index| *index != leader);
    for index in followers.chain([leader]) {
        replace_coordinator(&mut cluster, index, to);
    }
    // Coordinators of one, workers of the other. What runs has noticed nothing.
    works(&mut cluster);
    cluster.journal.open("g");
    let ended = cluster.succeeds(&run);
    for task in &ended.tasks {
        assert_eq!(cluster.journal.begun(&run, &task.task), 1, "{}", task.task);
    }
    replace_worker(&mut cluster, 0, to);
    // Workers of both.
    works(&mut cluster);
    replace_worker(&mut cluster, 1, to);
    works(&mut cluster);
    cluster.check();
}

#[test]
fn a_cluster_is_upgraded_part_by_part_while_it_works() {
    let Some(previous) = previous() else { return };
    upgrade(&previous, &binary());
}

#[test]
fn a_cluster_is_taken_back_part_by_part_or_says_why_not() {
    let Some(previous) = previous() else { return };
    let mut cluster = all_of(&binary());
    works(&mut cluster);
    let follower = cluster.a_follower();
    let node = &mut cluster.coordinators[follower];
    node.terminate();
    node.wait(seconds(20));
    node.set_program(&previous);
    node.start();
    // An older build that cannot read the state says so at once, and ends.
    let refused = wait_for("it serves or refuses", seconds(20), || {
        if node.stdout().contains(" serves on ") {
            return Some(false);
        }
        node.ended().map(|_| true)
    });
    if refused {
        let why = node.stderr();
        assert!(why.contains("schema version"), "{why}");
        node.set_program(&binary());
        let _ = node.wait(seconds(1));
        node.start();
        works(&mut cluster);
        cluster.check();
    } else {
        drop(cluster);
        upgrade(&binary(), &previous);
    }
}
