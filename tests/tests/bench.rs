//! Benchmarks work: what they measure is there, and nothing failed meanwhile. How fast it was is no matter of
//! a test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use emberline_tests::{Place, seconds};
use serde_json::Value;

#[test]
fn a_served_model_is_asked_in_every_way_and_versions_take_over_without_an_error() {
    let place = Place::new();
    let arguments = [
        "bench",
        "serve",
        "--seconds",
        "1",
        "--rounds",
        "1",
        "-o",
        "json",
    ];
    let bench = place.emberline(&arguments).within(seconds(180)).run();
    assert_eq!(bench.code, Some(0), "{}", bench.stderr);
    let told: Value = serde_json::from_str(&bench.stdout).unwrap();
    let figures: BTreeMap<&str, f64> = (told["figures"].as_array().unwrap().iter())
        .map(|figure| {
            let name = figure["figure"].as_str().unwrap();
            assert_eq!(figure["bench"], "serve");
            (name, figure["median"].as_f64().unwrap())
        })
        .collect();
    let figure = |name: &str| {
        let found = figures.get(name);
        *found.unwrap_or_else(|| panic!("no `{name}` in {figures:#?}"))
    };
    for protocol in ["grpc", "rest"] {
        for clients in [1, 8, 64] {
            let of = |what: &str| figure(&format!("pumps {protocol} {clients}: {what}"));
            assert!(of("answered") > 0.0);
            assert!(of("p50") > 0.0 && of("p50") <= of("p99"));
            assert!(of("to bare rows of 1") > 0.0);
            assert_eq!(of("errors"), 0.0);
        }
    }
    for name in [
        "pumps bare, rows of 1",
        "pumps bare, rows of 64",
        "resident before the load",
        "resident after the load",
        "pumps deploy to its first answer",
        "pumps asked while versions took over",
    ] {
        assert!(figure(name) > 0.0, "{name}");
    }
    assert_eq!(figure("pumps errors while versions took over"), 0.0);
    // Nothing of it is left.
    let left = std::fs::read_dir(place.state()).unwrap().count();
    assert_eq!(left, 0);
}

#[test]
fn what_cannot_be_served_is_told_in_one_line() {
    let place = Place::new();
    place.write(
        "no-model.yaml",
        "pipeline: p\nparams: { seed: 1 }\nstages:\n  a: { kind: noop }\n",
    );
    place.write(
        "no-seed.yaml",
        "pipeline: p\nstages:\n  a: { kind: noop }\n",
    );
    for (arguments, part) in [
        (&["--pipeline", "none.yaml"][..], "none.yaml"),
        (&["--pipeline", "no-seed.yaml"], "`seed`"),
        (
            &["--pipeline", "no-model.yaml"],
            "deploys nothing to the environment `production`",
        ),
        (&["--seconds", "0"], "`--seconds` is 0"),
    ] {
        let all: Vec<&str> = ["bench", "serve", "-q"]
            .iter()
            .chain(arguments)
            .copied()
            .collect();
        let told = place.emberline(&all).run();
        assert_eq!(told.code, Some(2), "{arguments:?}: {}", told.stderr);
        assert!(told.stderr.contains(part), "{arguments:?}: {}", told.stderr);
        assert_eq!(told.stderr.lines().count(), 1, "{}", told.stderr);
    }
}
