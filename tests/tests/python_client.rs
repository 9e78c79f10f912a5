//! A client in another language that has never seen the protos: Python's grpcio with reflection.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use emberline_tests::{Dev, Place, outside, place::repository};
use serde_json::Value;

/// The interpreter of the environment, which is made if it is not there. `None`, with a line that
/// says so, where it cannot be made: without Python, or without its package index.
fn python() -> Option<String> {
    let setup = Command::new(repository().join("tests/python/setup.sh"))
        .output()
        .unwrap();
    if setup.status.success() {
        return Some(String::from_utf8(setup.stdout).unwrap().trim().to_owned());
    }
    let why = String::from_utf8_lossy(&setup.stderr).into_owned();
    assert!(
        std::env::var_os("CI").is_none(),
        "the Python client must be checked in CI: {why}"
    );
    eprintln!("NOT CHECKED: the Python environment cannot be made: {why}");
    None
}

#[test]
fn a_client_that_knows_only_the_address_submits_and_watches_a_pipeline() {
    let Some(python) = python() else { return };
    let place = Place::new();
    let dev = Dev::start(&place);
    let pipeline = "pipeline: from-python\nstages:\n  a: { kind: exec, outputs: { o: files }, with: { command: [sh, -c, 'echo hello > $EMBERLINE_OUTPUT_O/x'] } }\n  b: { kind: noop, needs: [a] }\n";
    let mut client = Command::new(python)
        .arg(repository().join("tests/python/client.py"))
        .arg(&dev.address)
        .arg(place.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    client
        .stdin
        .take()
        .unwrap()
        .write_all(pipeline.as_bytes())
        .unwrap();
    let output = client.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let seen: Value = serde_json::from_slice(&output.stdout).unwrap();

    assert_eq!(seen["health"], "SERVING");
    for service in [
        "emberline.v1.ArtifactService",
        "emberline.v1.ClusterService",
        "emberline.v1.ModelService",
        "emberline.v1.RunService",
        "emberline.v1.WorkerService",
        "grpc.health.v1.Health",
    ] {
        let services = seen["services"].as_array().unwrap();
        assert!(
            services.iter().any(|s| s == service),
            "no {service} in {services:?}"
        );
    }
    let methods = seen["methods"].as_array().unwrap();
    assert!(
        methods.iter().any(|m| m == "SubmitRun") && methods.len() >= 9,
        "{methods:?}"
    );
    assert_eq!(
        seen["refused"]["code"], "INVALID_ARGUMENT",
        "{:#}",
        seen["refused"]
    );
    assert_eq!(seen["refused"]["has_details"], true);
    assert!(
        seen["refused"]["message"]
            .as_str()
            .unwrap()
            .starts_with("bad.yaml:2:")
    );
    assert_eq!(seen["same_run"], true);
    let events = seen["events"].as_array().unwrap();
    assert!(events[0].get("snapshot").is_some(), "{events:#?}");
    let last = events.last().unwrap();
    let state = last
        .pointer("/run/state")
        .or(last.pointer("/snapshot/summary/state"));
    assert_eq!(state.unwrap(), "RUN_STATE_SUCCEEDED", "{last:#}");

    // What it saw is what the command line shows, and what lies on the disk.
    let id = seen["run"].as_str().unwrap();
    let run = place.json(&["runs", "show", id]);
    assert_eq!(run["state"], "succeeded");
    assert_eq!(seen["final"]["pipelineYaml"], pipeline);
    outside::run_is_whole(&place.state(), &run);
    dev.stop().expect_code(0);
}
