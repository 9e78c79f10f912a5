//! `emberline worker` as a process: what it is told, how it starts, and how it ends.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, time::Instant};

use emberline_tests::{Dev, Output, Place, Running, processes, seconds, wait_for};
use rustix::process::Signal;
use serde_json::Value;

/// A leader without workers, and the worker's own directory.
fn leader() -> (Place, Dev, Place) {
    let place = Place::new();
    let dev = Dev::start_with(&place, &["--workers", "0"]);
    (place, dev, Place::new())
}

fn worker(place: &Place, dev: &Dev, more: &[&str]) -> Running {
    let mut arguments = vec!["worker", "--server", &dev.address, "--name", "w"];
    arguments.extend(more);
    place.emberline(&arguments).within(seconds(120)).start()
}

/// Waits until it says that it has a session; gives the line.
fn session(worker: &mut Running) -> String {
    wait_for("it has a session", seconds(30), || {
        assert!(!worker.has_ended(), "{}", worker.stderr());
        let stdout = worker.stdout();
        let line = stdout
            .lines()
            .find(|l| l.contains(" has a session with "))?;
        Some(line.to_owned())
    })
}

/// The worker as the cluster's status shows it.
fn seen(place: &Place, dev: &Dev) -> Option<Value> {
    let status = place.json(&["--server", &dev.address, "cluster", "status"]);
    status["workers"].as_array().unwrap().first().cloned()
}

#[track_caller]
fn one_error(output: &Output) -> String {
    let errors: Vec<_> = (output.stderr.lines())
        .filter_map(|l| l.strip_prefix("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{output}");
    assert!(output.stdout.is_empty(), "{output}");
    errors[0].to_owned()
}

/// Submits a run of one command; gives the run.
fn run(place: &Place, dev: &Dev, command: &str) -> String {
    let with = serde_json::json!({"command": ["sh", "-c", command]});
    place.write(
        "p.yaml",
        format!("pipeline: p\nstages:\n  a: {{ kind: exec, cache: false, with: {with} }}\n"),
    );
    let submit = ["--server", &dev.address, "run", "p.yaml", "--detach"];
    let output = place.emberline(&submit).run().expect_code(0);
    output.stdout.trim().to_owned()
}

#[test]
fn a_worker_says_who_it_is_and_what_it_has() {
    let (_place, dev, own) = leader();
    let mut worker = worker(
        &own,
        &dev,
        &[
            "--label",
            "zone=a",
            "--label",
            "disk=fast",
            "--cpus",
            "2.5",
            "--memory",
            "1GiB",
            "--gpus",
            "3",
        ],
    );
    let line = session(&mut worker);
    let expected = format!("worker w has a session with {} (term 1)", dev.address);
    assert_eq!(line, expected);
    let seen = seen(&own, &dev).unwrap();
    assert_eq!(seen["worker"], "w");
    assert_eq!(
        seen["labels"],
        serde_json::json!({"zone": "a", "disk": "fast"})
    );
    let kinds = seen["kinds"].as_array().unwrap();
    for kind in [
        "collect", "convert", "validate", "train", "evaluate", "deploy", "report", "exec",
    ] {
        assert!(kinds.iter().any(|k| k == kind), "{kind} is not in {seen:#}");
    }
    worker.signal(Signal::TERM);
    let output = worker.finish().expect_code(0);
    assert!(output.stdout.ends_with("worker w stops\n"), "{output}");
}

#[test]
fn what_cannot_be_right_is_told_in_one_line() {
    let place = Place::new();
    place.write("file", "");
    let server = ["--server", "127.0.0.1:1"];
    let cases: [(&[&str], i32, &str); 9] = [
        (&[], 2, "--server"),
        (&["--server", "127.0.0.1:1,"], 2, "host:port"),
        (&["--server", "https://a:1"], 2, "asks for TLS"),
        (&["--name", "a b"], 2, "a b"),
        (&["--label", "zone"], 2, "key=value"),
        (&["--label", "a=1", "--label", "a=2"], 2, "twice"),
        (&["--slots", "0"], 2, "slots"),
        (&["--cpu", "0"], 2, "--cpu"),
        (&["--state-dir", "file/state"], 3, "file/state"),
    ];
    for (arguments, code, part) in cases {
        let mut all = vec!["worker"];
        if !arguments.is_empty() && !arguments.contains(&"--server") {
            all.extend(server);
        }
        all.extend(arguments);
        let output = place.emberline(&all).within(seconds(20)).run();
        let line = one_error(&output.clone().expect_code(code));
        assert!(line.contains(part), "{arguments:?}: {line}");
    }
}

#[test]
fn two_workers_never_share_a_state_directory() {
    let (_place, dev, own) = leader();
    let mut first = worker(&own, &dev, &[]);
    session(&mut first);
    let second = worker(&own, &dev, &["--name", "x"]);
    let line = one_error(&second.finish().expect_code(2));
    assert!(line.contains("--name"), "given twice: {line}");
    let arguments = ["worker", "--server", &dev.address, "--name", "x"];
    let second = own.emberline(&arguments).run().expect_code(3);
    let line = one_error(&second);
    assert!(line.contains("another worker uses"), "{line}");
    assert!(line.contains("--state-dir"), "{line}");
    // It ended by a signal, or by a power cut: the next one takes it over.
    first.kill();
    let mut third = worker(&own, &dev, &[]);
    session(&mut third);
    third.signal(Signal::INT);
    let _ = third.finish().expect_code(0);
}

#[test]
fn a_second_signal_stops_a_worker_at_once() {
    let (_place, dev, own) = leader();
    let mut worker = worker(&own, &dev, &["--drain-timeout", "60s"]);
    session(&mut worker);
    let begun = own.path("begun");
    run(
        &own,
        &dev,
        &format!("trap '' TERM; touch {}; sleep 60", begun.display()),
    );
    wait_for("the command runs", seconds(20), || {
        begun.exists().then_some(())
    });
    worker.signal(Signal::TERM);
    wait_for("it says that it stops", seconds(10), || {
        worker.stdout().contains("worker w stops").then_some(())
    });
    let begun = Instant::now();
    worker.signal(Signal::TERM);
    let output = worker.finish().expect_code(130);
    assert!(begun.elapsed() < seconds(5), "{:?}", begun.elapsed());
    assert!(output.stderr.contains("stopped at once"), "{output}");
    wait_for("its command is gone", seconds(5), || {
        processes::of_attempts_below(&own.state())
            .is_empty()
            .then_some(())
    });
}

#[test]
fn a_worker_goes_on_when_its_leader_is_started_anew() {
    let (place, dev, own) = leader();
    let listen = dev.address.clone();
    let mut worker = worker(&own, &dev, &[]);
    session(&mut worker);
    let gate = own.path("gate");
    let begun = own.path("begun");
    let id = run(
        &own,
        &dev,
        &format!(
            "echo x >> {}; until [ -e {} ]; do sleep 0.02; done",
            begun.display(),
            gate.display()
        ),
    );
    wait_for("the command runs", seconds(20), || {
        begun.exists().then_some(())
    });
    dev.kill();
    let again = ["dev", "--workers", "0", "--listen", &listen];
    let leader = place.emberline(&again).within(seconds(120)).start();
    wait_for("a session in the next term", seconds(30), || {
        let stdout = worker.stdout();
        stdout.contains(&format!("{listen} (term 2)")).then_some(())
    });
    fs::write(gate, "").unwrap();
    let watch = ["--server", &listen, "runs", "watch", &id];
    let _ = own.emberline(&watch).run().expect_code(0);
    // The embedded cluster waits for nobody: what ran is lost to it, and runs a second time.
    let attempts = fs::read_to_string(&begun).unwrap().lines().count();
    assert!((1..=2).contains(&attempts), "{attempts}");
    worker.signal(Signal::TERM);
    let _ = worker.finish().expect_code(0);
    drop(leader);
}

#[test]
fn a_worker_that_is_drained_from_afar_ends_what_runs_and_leaves() {
    let (_place, dev, own) = leader();
    let mut worker = worker(&own, &dev, &[]);
    session(&mut worker);
    let (gate, begun) = (own.path("gate"), own.path("begun"));
    let wait = format!(
        "touch {}; until [ -e {} ]; do sleep 0.02; done",
        begun.display(),
        gate.display()
    );
    let id = run(&own, &dev, &wait);
    wait_for("the command runs", seconds(20), || {
        begun.exists().then_some(())
    });
    let server = ["--server", &dev.address, "workers"];
    let command = |more: &[&str]| own.emberline(&[&server[..], more].concat());
    let unknown = command(&["drain", "nobody"]).run().expect_code(2);
    assert!(one_error(&unknown).contains("nobody"), "{unknown}");
    let told = command(&["drain", "w", "-o", "json"]).run().expect_code(0);
    assert_eq!(told.json()["running"], 1, "{told}");
    let listed = command(&["list"]).run().expect_code(0);
    assert!(listed.stdout.contains("draining"), "{listed}");
    assert!(!worker.has_ended(), "it runs something");
    fs::write(gate, "").unwrap();
    let output = worker.finish().expect_code(0);
    assert!(output.stdout.contains("worker w drains"), "{output}");
    let show = ["--server", &dev.address, "runs", "show", &id, "-o", "json"];
    let ended = own.emberline(&show).run().expect_code(0).json();
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    assert_eq!(emberline_tests::place::task(&ended, "a")["attempt"], 1);
}

#[test]
fn a_drained_worker_hurries_at_a_signal() {
    let (_place, dev, own) = leader();
    let mut worker = worker(&own, &dev, &[]);
    session(&mut worker);
    let begun = own.path("begun");
    run(&own, &dev, &format!("touch {}; sleep 60", begun.display()));
    wait_for("the command runs", seconds(20), || {
        begun.exists().then_some(())
    });
    let drain = ["--server", &dev.address, "workers", "drain", "w"];
    let _ = own.emberline(&drain).run().expect_code(0);
    wait_for("it drains", seconds(10), || {
        worker.stdout().contains("worker w drains").then_some(())
    });
    worker.signal(Signal::TERM);
    let _ = worker.finish().expect_code(0);
    // Given back, not lost: it waits for another worker, and no retry is spent.
    fs::remove_file(&begun).unwrap();
    let mut next = self::worker(&own, &dev, &["--state-dir", "next"]);
    session(&mut next);
    wait_for("it runs again", seconds(20), || {
        begun.exists().then_some(())
    });
}
