//! A disk that fills up: the run fails for that reason, in one clear line, and after room was made
//! the next one works.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, process::Command};

use emberline_tests::{Place, outside, place::task};
use serde_json::Value;

/// Set in the copy of the test that runs in a mount namespace of its own.
const INSIDE: &str = "EMBERLINE_TEST_INSIDE";

/// Runs the named test of this file once more, in a mount namespace of its own, where a small disk
/// can be mounted. Says whether this is that second run.
fn in_a_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let allowed = Command::new("unshare").args(["-m", "true"]).output();
    if !allowed.is_ok_and(|o| o.status.success()) {
        eprintln!("NOT CHECKED: a small disk can't be mounted here (`unshare -m` is not allowed)");
        return false;
    }
    let status = Command::new("unshare")
        .arg("-m")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "the test in the namespace failed");
    false
}

/// Mounts a disk of that size as the state directory.
fn small_disk(place: &Place, size: &str) {
    fs::create_dir(place.state()).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
        .arg(place.state())
        .status()
        .unwrap();
    assert!(mounted.success(), "a tmpfs can't be mounted");
}

fn write(place: &Place, megabytes: u32) -> Value {
    let text = format!(
        "pipeline: writes\nstages:\n  w: {{ kind: exec, outputs: {{ o: files }}, retries: {{ faults: 1, backoff: 10ms }}, with: {{ command: [sh, -c, 'head -c {megabytes}000000 /dev/urandom > $EMBERLINE_OUTPUT_O/x'] }} }}\n"
    );
    place.write("w.yaml", text);
    place.run("w.yaml")
}

#[test]
fn an_artifact_that_does_not_fit_fails_with_reason_storage_and_leaves_nothing() {
    if !in_a_namespace("an_artifact_that_does_not_fit_fails_with_reason_storage_and_leaves_nothing")
    {
        return;
    }
    let place = Place::new();
    small_disk(&place, "24m");
    let source = place.write("large.bin", vec![7; 40 << 20]);
    place.write(
        "c.yaml",
        "pipeline: c\nstages: { raw: { kind: collect, retries: { faults: 1, backoff: 10ms }, with: { sources: [ { url: 'file:large.bin' } ] } } }\n",
    );
    let failed = place.emberline(&["run", "c.yaml"]).run().expect_code(1);
    let last = failed.stderr.lines().last().unwrap();
    assert!(
        last.starts_with("error: run r-") && last.contains("storage"),
        "{failed}"
    );
    assert!(
        last.to_lowercase().contains("no space left") || last.contains("disk is full"),
        "{failed}"
    );
    outside::every_object_hashes_to_its_name(&place.state());
    let whole = outside::objects(&place.state());
    let largest = whole
        .iter()
        .map(|o| fs::metadata(o).unwrap().len())
        .max()
        .unwrap_or(0);
    assert!(largest < 1 << 20, "{largest} bytes of what failed are left");

    // What fits works at once, with no help; and so does the same when it fits.
    let run = write(&place, 2);
    assert_eq!(run["state"], "succeeded", "{run:#}");
    outside::run_is_whole(&place.state(), &run);
    fs::write(source, vec![7; 1 << 20]).unwrap();
    let run = place.run("c.yaml");
    assert_eq!(run["state"], "succeeded", "{run:#}");
    outside::run_is_whole(&place.state(), &run);
}

#[test]
fn a_disk_that_is_full_to_the_last_byte_is_told_and_after_room_is_made_all_works() {
    if !in_a_namespace(
        "a_disk_that_is_full_to_the_last_byte_is_told_and_after_room_is_made_all_works",
    ) {
        return;
    }
    let place = Place::new();
    small_disk(&place, "16m");
    let first = write(&place, 1);
    assert_eq!(first["state"], "succeeded", "{first:#}");
    // Somebody else fills what is left.
    let ballast = place.state().join("ballast");
    let _ = fs::write(&ballast, vec![1; 32 << 20]);
    let full = place.emberline(&["run", "w.yaml", "--no-cache"]).run();
    assert!(matches!(full.code, Some(1 | 3)), "{full}");
    let last = full.stderr.lines().last().unwrap();
    assert!(last.starts_with("error: "), "{full}");
    assert!(
        last.to_lowercase().contains("no space left") || last.contains("disk is full"),
        "{full}"
    );
    assert!(!full.stderr.contains("panicked"), "{full}");
    fs::remove_file(&ballast).unwrap();

    // Whatever was acknowledged is there, nothing is damaged, and the next run works.
    outside::every_object_hashes_to_its_name(&place.state());
    let again = write(&place, 1);
    assert_eq!(again["state"], "succeeded", "{again:#}");
    assert_eq!(task(&again, "w")["state"], "cached");
    outside::run_is_whole(&place.state(), &again);
    let next = write(&place, 2);
    assert_eq!(next["state"], "succeeded", "{next:#}");
    outside::run_is_whole(&place.state(), &next);
    for run in place.json(&["runs", "list"]).as_array().unwrap() {
        let state = run["state"].as_str().unwrap();
        assert!(["succeeded", "failed"].contains(&state), "{run:#}");
    }
}
