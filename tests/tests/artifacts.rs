//! Artifacts as they lie on the disk: damaged, deleted, collected, larger than the cache.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use emberline_tests::{Dev, Place, outside, place::task, seconds, wait_for};
use serde_json::Value;

/// `make` is reused by the second run; `use` depends on a parameter, so it reads the artifact again.
const PIPELINE: &str = "\
pipeline: chain
params: { n: 1 }
stages:
  make: { kind: exec, outputs: { o: files }, with: { command: [sh, -c, 'seq 1 1000 > $EMBERLINE_OUTPUT_O/numbers'] } }
  use: { kind: exec, inputs: { i: make.o }, outputs: { o: files }, retries: { faults: 1, backoff: 10ms }, with: { command: [sh, -c, 'tail -n ${params.n} $EMBERLINE_INPUT_I/numbers > $EMBERLINE_OUTPUT_O/last'] } }
";

fn place_with_a_run() -> (Place, Value) {
    let place = Place::new();
    place.write("chain.yaml", PIPELINE);
    let run = place.run("chain.yaml");
    assert_eq!(run["state"], "succeeded", "{run:#}");
    (place, run)
}

fn again(place: &Place, n: u32) -> Value {
    let param = format!("n={n}");
    let output = place
        .emberline(&["run", "chain.yaml", "-q", "-o", "json", "--param", &param])
        .run();
    assert!(matches!(output.code, Some(0 | 1)), "{output}");
    output.json()
}

/// The manifest of a task's only output, and the object of the only file in it.
fn output_of<'a>(place: &Place, run: &'a Value, name: &str) -> (&'a str, std::path::PathBuf) {
    let manifest = task(run, name)["outputs"][0]["manifest"].as_str().unwrap();
    let text = fs::read(outside::object(&place.state(), manifest)).unwrap();
    let parsed: Value = serde_json::from_slice(&text).unwrap();
    let file = parsed["files"][0]["sha256"].as_str().unwrap();
    (manifest, outside::object(&place.state(), file))
}

fn clear_caches(place: &Place) {
    fs::remove_dir_all(place.state().join("workers")).unwrap();
}

fn flip_a_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The run fails for the artifact's sake and says which it is; wrong bytes are never used.
#[track_caller]
fn is_refused(run: &Value, digest: &str) {
    assert_eq!(run["state"], "failed", "{run:#}");
    let failure = &task(run, "use")["failure"];
    assert_eq!(failure["reason"], "storage", "{run:#}");
    let message = failure["message"].as_str().unwrap();
    assert!(message.contains(digest), "{message}");
    assert!(
        message.contains("the input `i` (output `o` of `make`)"),
        "{message}"
    );
    assert_eq!(task(run, "use")["outputs"], Value::Array(Vec::new()));
}

#[test]
fn a_damaged_artifact_is_refused_by_name_and_then_made_anew() {
    let (place, run) = place_with_a_run();
    let (_, object) = output_of(&place, &run, "make");
    let digest = object.file_name().unwrap().to_str().unwrap().to_owned();
    flip_a_byte(&object);
    clear_caches(&place);

    let reference = format!("{}/make/o", run["run"].as_str().unwrap());
    let get = place
        .emberline(&["artifacts", "get", &reference, "out"])
        .run();
    assert_eq!(get.code, Some(3), "{get}");
    assert_eq!(get.errors().len(), 1, "{get}");
    assert!(get.stderr.contains(&digest), "{get}");
    // Nothing half-fetched is left under any name.
    let left = fs::read_dir(place.path("out"))
        .map(Iterator::count)
        .unwrap_or(0);
    assert_eq!(left, 0);

    is_refused(&again(&place, 2), &digest);
    // From then on it is known: what follows has good bytes again.
    let healed = again(&place, 3);
    assert_eq!(healed["state"], "succeeded", "{healed:#}");
    outside::run_is_whole(&place.state(), &healed);
    let last = outside::artifact(&place.state(), output_of(&place, &healed, "use").0);
    assert_eq!(last, [("last".to_owned(), b"998\n999\n1000\n".to_vec())]);
}

#[test]
fn a_deleted_artifact_is_told_by_name_and_then_made_anew() {
    let (place, run) = place_with_a_run();
    let (manifest, object) = output_of(&place, &run, "make");
    let digest = object.file_name().unwrap().to_str().unwrap().to_owned();
    fs::remove_file(&object).unwrap();
    clear_caches(&place);
    let get = place
        .emberline(&["artifacts", "get", manifest, "out"])
        .run();
    assert!(matches!(get.code, Some(2 | 3)), "{get}");
    assert!(get.errors()[0].contains(&digest), "{get}");
    is_refused(&again(&place, 2), &digest);
    let healed = again(&place, 3);
    assert_eq!(healed["state"], "succeeded", "{healed:#}");
    outside::run_is_whole(&place.state(), &healed);

    // The manifest itself, and the bytes of a run's record.
    let (manifest, _) = output_of(&place, &healed, "use");
    fs::remove_file(outside::object(&place.state(), manifest)).unwrap();
    let ls = place
        .emberline(&["artifacts", "ls", manifest])
        .run()
        .expect_code(2);
    assert!(ls.errors()[0].contains(manifest), "{ls}");
}

#[test]
fn a_damaged_cache_of_a_worker_is_fetched_again() {
    let (place, _) = place_with_a_run();
    for worker in fs::read_dir(place.state().join("workers")).unwrap() {
        let mut below = vec![worker.unwrap().path()];
        while let Some(dir) = below.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name();
                match entry.file_type().unwrap() {
                    kind if kind.is_dir() => below.push(entry.path()),
                    // A cached blob is a second name of the stored object: a file of its own first.
                    _ if name.len() == 64 => {
                        let bytes = fs::read(entry.path()).unwrap();
                        fs::remove_file(entry.path()).unwrap();
                        fs::write(entry.path(), bytes).unwrap();
                        flip_a_byte(&entry.path());
                    }
                    _ => {}
                }
            }
        }
    }
    let run = again(&place, 2);
    assert_eq!(run["state"], "succeeded", "{run:#}");
    let last = outside::artifact(&place.state(), output_of(&place, &run, "use").0);
    assert_eq!(last, [("last".to_owned(), b"999\n1000\n".to_vec())]);
    outside::run_is_whole(&place.state(), &run);
}

#[test]
fn collection_removes_what_nothing_refers_to_and_nothing_else() {
    let (place, run) = place_with_a_run();
    let before = outside::objects(&place.state());
    let nothing = place.json(&["artifacts", "gc", "--min-age", "0s"]);
    assert_eq!(nothing["removed_objects"], 0, "{nothing:#}");
    assert_eq!(outside::objects(&place.state()), before);

    // Bytes that nobody refers to: at first too young, then only told, then removed.
    let stray = b"nobody needs me";
    let digest = outside::sha256(stray);
    let object = outside::object(&place.state(), &digest);
    fs::create_dir_all(object.parent().unwrap()).unwrap();
    fs::write(&object, stray).unwrap();
    let young = place.json(&["artifacts", "gc"]);
    assert_eq!(
        (&young["removed_objects"], &young["young_objects"]),
        (&0.into(), &1.into())
    );
    let dry = place.json(&["artifacts", "gc", "--min-age", "0s", "--dry-run"]);
    assert_eq!(dry["removed_objects"], 1);
    assert!(
        dry["removed"][0].as_str().unwrap().ends_with(&digest),
        "{dry:#}"
    );
    assert!(object.exists(), "a dry run removed something");
    let told = place
        .emberline(&["artifacts", "gc", "--min-age", "0s"])
        .run()
        .expect_code(0);
    assert!(told.stdout.contains("removed 1 objects"), "{told}");
    assert!(!object.exists());
    assert_eq!(outside::objects(&place.state()), before);
    outside::run_is_whole(&place.state(), &run);

    // A run that is forgotten takes its logs and artifacts with it; a model's would stay.
    let forgot = place.json(&[
        "artifacts",
        "gc",
        "--min-age",
        "0s",
        "--forget-older-than",
        "0s",
    ]);
    assert_eq!(forgot["forgotten_runs"], 1, "{forgot:#}");
    assert_eq!(place.json(&["runs", "list"]), Value::Array(Vec::new()));
    let id = run["run"].as_str().unwrap();
    place.emberline(&["runs", "show", id]).run().expect_code(2);
    assert!(
        !place
            .state()
            .join(format!("objects/logs/{id}"))
            .join("make/1/00000000")
            .exists()
    );
    let run = again(&place, 1);
    assert_eq!(run["state"], "succeeded");
    outside::run_is_whole(&place.state(), &run);
}

#[test]
fn a_registered_model_survives_its_run() {
    let place = Place::new();
    place.emberline(&["init", "."]).run().expect_code(0);
    let run = place.run("pipeline.yaml");
    let model = task(&run, "train")["outputs"][0]["manifest"]
        .as_str()
        .unwrap();
    place.json(&[
        "artifacts",
        "gc",
        "--min-age",
        "0s",
        "--forget-older-than",
        "0s",
    ]);
    assert!(!outside::artifact(&place.state(), model).is_empty());
    place
        .emberline(&["artifacts", "get", model, "model"])
        .run()
        .expect_code(0);
}

#[test]
fn what_a_running_run_needs_survives_a_collection() {
    let place = Place::new();
    let gate = place.path("gate");
    let text = format!(
        "pipeline: live\nstages:\n  make: {{ kind: exec, cache: false, outputs: {{ o: files }}, with: {{ command: [sh, -c, 'echo precious > $EMBERLINE_OUTPUT_O/x'] }} }}\n  wait: {{ kind: exec, needs: [make], with: {{ command: [sh, -c, 'until [ -e {} ]; do sleep 0.02; done'] }} }}\n  use: {{ kind: exec, needs: [wait], inputs: {{ i: make.o }}, with: {{ command: [cmp, $EMBERLINE_INPUT_I/x, x] , files: [x] }} }}\n",
        gate.display()
    );
    let text = text.replace(
        "[cmp, $EMBERLINE_INPUT_I/x, x]",
        "[sh, -c, 'cmp $EMBERLINE_INPUT_I/x x']",
    );
    place.write("live.yaml", text);
    place.write("x", "precious\n");
    let dev = Dev::start(&place);
    let id = place
        .emberline(&["run", "live.yaml", "--detach"])
        .run()
        .expect_code(0);
    let id = id.stdout.trim();
    wait_for("the gate", seconds(20), || {
        let run = place.json(&["runs", "show", id]);
        (task(&run, "wait")["state"] == "running").then_some(())
    });
    place.json(&[
        "artifacts",
        "gc",
        "--min-age",
        "0s",
        "--forget-older-than",
        "0s",
    ]);
    fs::write(&gate, "").unwrap();
    place.emberline(&["runs", "watch", id]).run().expect_code(0);
    let run = place.json(&["runs", "show", id]);
    assert_eq!(run["state"], "succeeded", "{run:#}");
    outside::run_is_whole(&place.state(), &run);
    dev.stop().expect_code(0);
}

#[test]
fn a_cache_that_is_smaller_than_the_artifacts_still_works() {
    let place = Place::new();
    let mut text = String::from(
        "pipeline: big\nstages:\n  s0: { kind: exec, outputs: { o: files }, with: { command: [sh, -c, 'head -c 3000000 /dev/urandom > $EMBERLINE_OUTPUT_O/x'] } }\n",
    );
    for n in 1..6 {
        text += &format!(
            "  s{n}: {{ kind: exec, inputs: {{ i: s{}.o }}, outputs: {{ o: files }}, with: {{ command: [sh, -c, 'cat $EMBERLINE_INPUT_I/x > $EMBERLINE_OUTPUT_O/x; echo {n} >> $EMBERLINE_OUTPUT_O/x'] }} }}\n",
            n - 1
        );
    }
    place.write("big.yaml", text);
    let call = place.emberline(&[
        "run",
        "big.yaml",
        "--cache-size",
        "1MiB",
        "-q",
        "-o",
        "json",
    ]);
    let run = call.run().expect_code(0).json();
    outside::run_is_whole(&place.state(), &run);
    let last = outside::artifact(&place.state(), output_of(&place, &run, "s5").0);
    assert!(last[0].1.ends_with(b"1\n2\n3\n4\n5\n") && last[0].1.len() == 3_000_010);
    let cached = fs::read_dir(place.state().join("workers")).unwrap();
    for worker in cached {
        let mut below = vec![worker.unwrap().path()];
        while let Some(dir) = below.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                let meta = entry.metadata().unwrap();
                if meta.is_dir() {
                    below.push(entry.path());
                } else {
                    assert!(
                        meta.len() <= 1 << 20,
                        "{} is still there",
                        entry.path().display()
                    );
                }
            }
        }
    }
    let wrong = place
        .emberline(&["runs", "list", "--cache-size", "much"])
        .run()
        .expect_code(2);
    assert!(wrong.stderr.contains("is no size"), "{wrong}");
}
