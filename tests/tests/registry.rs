//! The registry from outside: aliases, tags, deletions, and versions that go from one cluster to
//! another as files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;

use emberline_tests::{
    Place, outside,
    place::{Output, task},
};
use serde_json::{Value, json};

const MODEL: &str = "pumps";

/// A state with two versions of the starter's model; the second is live, and the champion.
fn two_versions() -> Place {
    let place = Place::new();
    place.emberline(&["init", "."]).run().expect_code(0);
    for seed in ["seed=1", "seed=2"] {
        let run = ["run", "pipeline.yaml", "--param", seed, "-q"];
        place.emberline(&run).run().expect_code(0);
    }
    place
}

fn models(place: &Place, arguments: &[&str]) -> Output {
    let all: Vec<&str> = ["models"].iter().chain(arguments).copied().collect();
    place.emberline(&all).run()
}

fn models_json(place: &Place, arguments: &[&str]) -> Value {
    let all: Vec<&str> = ["models"].iter().chain(arguments).copied().collect();
    place.json(&all)
}

/// The command must be refused as wrong input, with this one line.
#[track_caller]
fn refused(place: &Place, arguments: &[&str], part: &str) {
    let output = models(place, arguments).expect_code(2);
    let errors = output.errors();
    assert!(errors.len() == 1 && errors[0].contains(part), "{output}");
}

#[test]
fn versions_are_named_noted_compared_and_deleted() {
    let place = two_versions();
    let listed = models_json(&place, &["list"]);
    let expected = json!([{
        "model": MODEL, "latest_version": 2, "versions": 2, "aliases": {"champion": 2},
    }]);
    assert_eq!(listed, expected);

    // An alias moves only from what was expected.
    models(
        &place,
        &["alias", MODEL, "challenger", "1", "--expected", "0"],
    )
    .expect_code(0);
    let moved = ["alias", MODEL, "challenger", "champion", "--expected", "1"];
    assert_eq!(models_json(&place, &moved)["version"], 2);
    let part = "the alias `challenger` of `pumps` names version 2, not 1 as was expected";
    let late = ["alias", MODEL, "challenger", "1", "--expected", "1"];
    refused(&place, &late, part);
    models(&place, &["alias", MODEL, "challenger", "--remove"]).expect_code(0);

    // A version is shown with where it comes from.
    models(&place, &["tag", MODEL, "1", "team=floor", "stage=old"]).expect_code(0);
    models(&place, &["tag", MODEL, "1", "--remove", "stage"]).expect_code(0);
    models(&place, &["note", MODEL, "1", "kept for comparison"]).expect_code(0);
    let first = models_json(&place, &["show", MODEL, "1"]);
    assert_eq!(first["tags"], json!({"team": "floor"}));
    assert_eq!(first["notes"], "kept for comparison");
    let second = models_json(&place, &["show", MODEL, "champion"]);
    assert_eq!(
        (&second["version"], &second["parent"]),
        (&json!(2), &json!(1))
    );
    assert_eq!(second["live_in"], json!(["production"]));
    let text = models(&place, &["show", MODEL, "1"]).expect_code(0).stdout;
    assert!(
        text.contains("kept for comparison") && text.contains("team=floor"),
        "{text}"
    );

    // The seeds differ, and what follows from them; the snapshot of the data does not.
    let diff = models_json(&place, &["diff", MODEL, "1", "champion"]);
    let differences = diff["differences"].as_array().unwrap();
    let field = |section: &str, field: &str| {
        let mut all = differences.iter();
        all.find(|d| d["section"] == section && d["field"] == field)
    };
    let seed = field("training", "seed").unwrap();
    assert_eq!((&seed["a"], &seed["b"]), (&json!(1), &json!(2)));
    assert!(field("lineage", "parts/train").is_some(), "{diff:#}");
    assert!(field("lineage", "raw/data").is_none(), "{diff:#}");
    assert!(
        field("preprocessing", "features.columns.pressure.mean").is_some(),
        "{diff:#}"
    );
    let same = models(&place, &["diff", MODEL, "2", "champion"]).expect_code(0);
    assert_eq!(same.stdout, "versions 2 and 2 of pumps do not differ\n");

    // What is in service stays; what is not goes, and its number with it.
    refused(
        &place,
        &["delete", MODEL, "2"],
        "version 2 of `pumps` is live in `production`",
    );
    models(&place, &["alias", MODEL, "kept", "1"]).expect_code(0);
    refused(
        &place,
        &["delete", MODEL, "1"],
        "is named by the alias `kept`",
    );
    models(&place, &["alias", MODEL, "kept", "--remove"]).expect_code(0);
    let deleted = models(&place, &["delete", MODEL, "1"]).expect_code(0);
    assert_eq!(deleted.stdout, "deleted pumps version 1\n");
    refused(
        &place,
        &["show", MODEL, "1"],
        "the model `pumps` has no version `1`",
    );
    let rollback = ["rollback", "production", "--why", "a test"];
    let none = place.emberline(&rollback).run().expect_code(2);
    assert!(none.stderr.contains("there is no good version"), "{none}");
    // The same model again is a new version.
    let run = ["run", "pipeline.yaml", "--param", "seed=1", "-q"];
    place.emberline(&run).run().expect_code(0);
    let third = models_json(&place, &["show", MODEL, "champion"]);
    assert_eq!(
        (&third["version"], &third["parent"]),
        (&json!(3), &json!(2))
    );
    assert_eq!(third["artifact"], first["artifact"]);
}

#[test]
fn what_is_wrong_is_told_in_one_line() {
    let place = Place::new();
    refused(&place, &["show", "none"], "there is no model `none`");
    refused(&place, &["show", "none", "1"], "there is no model `none`");
    refused(&place, &["show", "../x", "1"], "`../x` is no model name");
    refused(
        &place,
        &["alias", "m", "champion", "0"],
        "`0` is no version",
    );
    refused(
        &place,
        &["tag", "m", "1", "team"],
        "the tag `team` has no `=`",
    );
    refused(
        &place,
        &["import", "none.bundle"],
        "`none.bundle`: the bundle cannot be read",
    );
    place.write("bad.bundle", "x".repeat(4000));
    let part = "`bad.bundle`: it is no bundle, or a damaged one: the header of `bundle.json`";
    refused(&place, &["import", "bad.bundle"], part);
    fs::create_dir(place.path("dir.bundle")).unwrap();
    refused(&place, &["import", "dir.bundle"], "it is no regular file");
    // What clap refuses has its usage below.
    let usage: [&[&str]; 3] = [
        &["alias", "m", "champion"],
        &["tag", "m", "1"],
        &["import", "m.bundle", "--expected", "1"],
    ];
    for arguments in usage {
        models(&place, arguments).expect_code(2);
    }
}

#[test]
fn a_version_goes_to_another_cluster_as_a_file_and_is_the_same_there() {
    let here = two_versions();
    models(&here, &["tag", MODEL, "1", "team=floor"]).expect_code(0);
    let told = models_json(&here, &["export", MODEL, "1"]);
    assert_eq!(told["file"], "pumps-1.bundle");
    let bundle = fs::read(here.path("pumps-1.bundle")).unwrap();
    assert_eq!(told["bytes"], bundle.len());
    models(&here, &["export", MODEL, "1", "again.bundle"]).expect_code(0);
    assert_eq!(
        fs::read(here.path("again.bundle")).unwrap(),
        bundle,
        "always the same bytes"
    );
    refused(
        &here,
        &["export", MODEL, "1", "none/x.bundle"],
        "cannot write `none/x.bundle`",
    );
    assert!(!here.path("x.bundle.partial").exists());
    let original = models_json(&here, &["show", MODEL, "1"]);

    let there = Place::new();
    there.emberline(&["init", "."]).run().expect_code(0);
    // A byte that was lost on the way.
    let mut damaged = bundle.clone();
    let at = damaged.len() / 2;
    damaged[at] ^= 1;
    there.write("damaged.bundle", &damaged);
    let part = "`damaged.bundle`: it is no bundle, or a damaged one: ";
    refused(&there, &["import", "damaged.bundle"], part);
    assert_eq!(models_json(&there, &["list"]), json!([]));

    there.write("m.bundle", &bundle);
    let import = [
        "import",
        "m.bundle",
        "--alias",
        "champion",
        "--expected",
        "0",
    ];
    let imported = models_json(&there, &import);
    for field in [
        "version", "artifact", "metrics", "schema", "lineage", "run", "task", "tags",
    ] {
        assert_eq!(imported[field], original[field], "{field}");
    }
    assert_eq!(imported["imported"]["created_at"], original["created_at"]);
    assert_eq!(imported["aliases"], json!(["champion"]));
    let again = models_json(&there, &import);
    assert_eq!(again, imported, "the same artifact is the same version");
    let other = models_json(&there, &["import", "m.bundle", "--name", "other"]);
    assert_eq!(
        (&other["model"], &other["version"]),
        (&json!("other"), &json!(1))
    );
    outside::every_object_hashes_to_its_name(&there.state());

    // And back again: it is the version that it was.
    models(&there, &["export", MODEL, "champion", "back.bundle"]).expect_code(0);
    here.write("back.bundle", fs::read(there.path("back.bundle")).unwrap());
    assert_eq!(models_json(&here, &["import", "back.bundle"]), original);
    let state = [here.state(), there.state()];
    let manifest = original["artifact"]["manifest"].as_str().unwrap();
    let files = state.map(|state| outside::artifact(&state, manifest));
    assert_eq!(files[0], files[1]);

    // It predicts the same: measured there on the same rows it is as good as it was here.
    let text = fs::read_to_string(there.path("pipeline.yaml")).unwrap();
    let text = text.replace("epochs: 30", "epochs: 3").replace(
        "gates: { f1: \">= 0.75\" }",
        "compare: { model: pumps, metric: log_loss, tolerance: 100 }",
    );
    there.write("pipeline.yaml", text);
    let run = there.run("pipeline.yaml");
    assert_eq!(run["state"], "succeeded", "{run:#}");
    let evaluation = task(&run, "evaluate")["outputs"].as_array().unwrap();
    let evaluation = evaluation.iter().find(|o| o["name"] == "evaluation");
    let manifest = evaluation.unwrap()["manifest"].as_str().unwrap();
    let (_, document) = outside::artifact(&there.state(), manifest).remove(0);
    let document: Value = serde_json::from_slice(&document).unwrap();
    let champion = &document["comparison"]["other"];
    assert_eq!(*champion, original["metrics"]["log_loss"], "{document:#}");
}
