//! A client that knows nothing of us: NVIDIA's `tritonclient` in Python, over both protocols.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{path::Path, process::Command};

use emberline_worker::serving::Serving as _;
use serde_json::{Value, json};
use support::*;

/// The interpreter of the environment, which is made if it is not there. `None`, with a line that
/// says so, where it cannot be made: without Python, or without its package index.
fn python(scripts: &Path) -> Option<String> {
    let setup = Command::new(scripts.join("setup.sh")).output().unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_sees_the_same_over_both_protocols() {
    let scripts =
        Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../tests/python");
    let Some(python) = python(&scripts) else {
        return;
    };
    let served = Served::factory().await;
    let address = served.address.to_string();
    let output = tokio::task::spawn_blocking(move || {
        let mut client = Command::new(python);
        client.arg(scripts.join("inference.py")).arg(address);
        client.output().unwrap()
    });
    let output = output.await.unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let seen: Value = serde_json::from_slice(&output.stdout).unwrap();

    assert_eq!(
        seen["services"],
        json!([
            "emberline.v1.FeedbackService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
            "inference.GRPCInferenceService",
        ])
    );

    // What our own client gets is what it got.
    let machines: Vec<Machine> = (0..5).map(machine).collect();
    let answer = served
        .grpc()
        .await
        .model_infer(factory_request("", &machines))
        .await;
    let expected = probabilities(&answer.unwrap().into_inner());
    let rows: Vec<_> = expected.chunks(2).collect();
    let classes: Vec<_> = (rows.iter())
        .map(|p| if p[1] > p[0] { "yes" } else { "no" })
        .collect();
    for (protocol, codes) in [
        (
            "grpc",
            ["StatusCode.NOT_FOUND", "StatusCode.INVALID_ARGUMENT"],
        ),
        ("http", ["404", "400"]),
    ] {
        let seen = &seen[protocol];
        for yes in [
            "live",
            "ready",
            "model_ready",
            "version_ready",
            "only_what_was_asked",
        ] {
            assert_eq!(seen[yes], true, "{protocol}: {yes}");
        }
        assert_eq!(seen["raw"]["probabilities"], json!(rows), "{protocol}");
        assert_eq!(seen["raw"]["class"], json!(classes), "{protocol}");
        assert_eq!(seen["typed"], json!(classes), "{protocol}");
        let narrow: Vec<[f64; 2]> = serde_json::from_value(seen["narrow"].clone()).unwrap();
        for (narrow, exact) in narrow.iter().zip(&rows) {
            assert!((narrow[0] - exact[0]).abs() < 1e-5, "{protocol}");
        }
        assert_eq!(seen["server"], "emberline");
        assert_eq!(seen["index"], json!(["factory"]));
        assert_eq!(seen["answer"], json!(["py-2", "1"]));
        assert_eq!(
            seen["inputs"],
            json!([
                ["kind", "BYTES"],
                ["torque", "FP64"],
                ["speed", "INT64"],
                ["old", "BOOL"]
            ])
        );
        for (what, code, expected) in [
            ("model", codes[0], "there is no model `nobody` here"),
            (
                "version",
                codes[0],
                "the model `factory` has no version `9` here",
            ),
            ("missing", codes[1], "the column `torque` is missing"),
            (
                "mistyped",
                codes[1],
                "the column `speed` is of type integer, but comes as FP64",
            ),
            ("nan", codes[1], "the column `torque` has NaN in row 0"),
            (
                "rows",
                codes[1],
                "the column `old` has 1 rows, but `kind` has 2",
            ),
            ("output", codes[1], "there is no output `nothing`"),
        ] {
            let error = &seen["errors"][what];
            assert_eq!(error["code"], code, "{protocol} {what}: {error}");
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(expected), "{protocol} {what}: {message}");
        }
    }
    served.server.stop().await;
}
