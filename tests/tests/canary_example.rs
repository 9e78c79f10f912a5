//! The example that ends in a canary, as its README says it: with real data, a good new version and a bad one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

use emberline_tests::{
    Place,
    place::{binary, repository},
};

#[test]
fn the_example_promotes_a_good_version_and_takes_back_a_bad_one() {
    let place = Place::new();
    let script = repository().join("examples/predictive-maintenance/canary.sh");
    let output = Command::new(script)
        .arg(place.state())
        .env("EMBERLINE", binary())
        .current_dir(place.dir())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{errors}");
    for part in [
        "; 0 failed",
        "version 2 in production: live",
        "version 3 in production: aborted, failed; `max_prediction_drift`",
        "change fail rate      33.3 %      1 of 3",
    ] {
        assert!(
            said.contains(part),
            "`{part}` is missing in {said}\n{errors}"
        );
    }
}
