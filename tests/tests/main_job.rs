//! The main job as the README tells it: one command, from raw data to a registered, reported model;
//! and what a user can look at afterwards.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::Path};

use emberline_tests::{
    Place, outside,
    place::{states, task},
    seconds,
};
use serde_json::Value;

const PIPELINE: &str = "predictive-maintenance/pipeline.yaml";

fn number(value: &Value, name: &str) -> f64 {
    value[name]
        .as_f64()
        .unwrap_or_else(|| panic!("no `{name}` in {value:#}"))
}

/// The page of a run: whole, and in need of nothing from outside.
fn page_is_self_contained(path: &Path) -> String {
    let page = fs::read_to_string(path).unwrap();
    assert!(page.starts_with("<!doctype html>") || page.starts_with("<!DOCTYPE html>"));
    assert!(page.trim_end().ends_with("</html>"));
    for outside in ["src=\"http", "href=\"http", "url(http", "@import", "<link"] {
        assert!(!page.contains(outside), "the page needs `{outside}`");
    }
    page
}

#[test]
fn one_command_goes_from_raw_data_to_a_registered_and_reported_model() {
    let place = Place::new();
    place.copy_example("predictive-maintenance");
    let first = place
        .emberline(&["run", PIPELINE])
        .within(seconds(120))
        .run()
        .expect_code(0);
    assert!(first.stdout.contains("succeeded in"), "{first}");
    let model = "model: predictive-maintenance version 1 (champion)";
    assert!(first.stdout.contains(model), "{first}");

    // The figures meet the gates of the pipeline, by the numbers that programs read.
    let runs = place.json(&["runs", "list"]);
    let id = runs[0]["run"].as_str().unwrap();
    let run = place.json(&["runs", "show", id]);
    assert_eq!(run["state"], "succeeded");
    for (name, state) in states(&run) {
        assert_eq!(state, "succeeded", "{name}");
    }
    let figures = &task(&run, "evaluate")["results"];
    assert!(number(figures, "f1") >= 0.65, "{figures}");
    assert!(number(figures, "average_precision") >= 0.72, "{figures}");
    outside::run_is_whole(&place.state(), &run);

    let page = page_is_self_contained(&place.state().join(format!("reports/{id}.html")));
    assert!(page.contains(id) && page.contains("predictive-maintenance"));

    // The registry says the same, with the way back to the data.
    let model = place.json(&["models", "show", "predictive-maintenance"]);
    assert_eq!(model["aliases"]["champion"], 1);
    let version = &model["versions"][0];
    assert_eq!(version["run"], id);
    assert_eq!(version["metrics"]["f1"], figures["f1"]);
    assert_eq!(version["pipeline_revision"], run["revision"]);
    let data = &task(&run, "raw")["outputs"][0]["manifest"];
    assert_eq!(&version["lineage"]["raw/data"], data);
    let snapshot = outside::artifact(&place.state(), data.as_str().unwrap());
    let given = fs::read(place.path("predictive-maintenance/data/ai4i2020.csv")).unwrap();
    assert_eq!(snapshot, [("ai4i2020.csv".to_owned(), given)]);

    // Again: what has not changed is reused, and each task says why, or why not.
    let second = place.run(PIPELINE);
    assert_eq!(second["state"], "succeeded");
    for name in ["parts", "check", "train"] {
        let (again, before) = (task(&second, name), task(&run, name));
        assert_eq!(again["state"], "cached", "{again:#}");
        assert_eq!(again["cached_from_run"], id);
        let note = again["note"].as_str().unwrap();
        assert!(note.starts_with("same spec and inputs as in run"), "{note}");
        assert_eq!(again["outputs"], before["outputs"]);
    }
    let note = &task(&second, "evaluate")["note"];
    assert!(note.as_str().unwrap().contains("champion"), "{note}");
    // The same artifact is the same version.
    let model = place.json(&["models", "show", "predictive-maintenance"]);
    assert_eq!(model["latest_version"], 1);
    outside::run_is_whole(&place.state(), &second);

    // A change of the training alone: data is reused, the rest runs.
    let text = fs::read_to_string(place.path(PIPELINE)).unwrap();
    let changed = text.replace("epochs: 60", "epochs: 50");
    assert_ne!(text, changed);
    place.write(PIPELINE, changed);
    let third = place.run(PIPELINE);
    assert_eq!(task(&third, "parts")["state"], "cached");
    assert_eq!(task(&third, "train")["state"], "succeeded");
    let note = task(&third, "train")["note"].as_str().unwrap();
    assert!(note.contains("changed"), "{note}");
}

#[test]
fn the_same_seed_gives_the_same_model_to_the_last_bit() {
    let manifest = || {
        let place = Place::new();
        place.emberline(&["init", "."]).run().expect_code(0);
        let run = place.run("pipeline.yaml");
        assert_eq!(run["state"], "succeeded", "{run:#}");
        task(&run, "train")["outputs"][0]["manifest"].clone()
    };
    assert_eq!(manifest(), manifest());
}

#[test]
fn digits_are_read_by_a_network_that_meets_its_gate() {
    let place = Place::new();
    place.copy_example("digits");
    let run = place.emberline(&["run", "digits/pipeline.yaml", "-o", "json", "-q"]);
    let run = run.within(seconds(200)).run().expect_code(0).json();
    let figures = &task(&run, "evaluate")["results"];
    assert!(number(figures, "accuracy") >= 0.975, "{figures}");
    let report = run["report"].as_str().unwrap();
    page_is_self_contained(&place.path(report));
    outside::run_is_whole(&place.state(), &run);
    let models = place.json(&["models", "list"]);
    assert_eq!(models[0]["model"], "digits");
    assert_eq!(models[0]["aliases"]["champion"], 1);
}

#[test]
fn what_was_run_can_be_listed_shown_and_fetched_as_text_and_as_json() {
    let place = Place::new();
    let init = place.emberline(&["init", "start"]).run().expect_code(0);
    assert!(
        init.stdout
            .contains("next: emberline run start/pipeline.yaml")
    );
    let again = place.emberline(&["init", "start"]).run().expect_code(2);
    assert!(again.errors()[0].contains("exists already"), "{again}");

    let file = "start/pipeline.yaml";
    let valid = place.emberline(&["validate", file]).run().expect_code(0);
    assert!(valid.stdout.contains("no mistakes in 7 stages"), "{valid}");
    let plan = place.json(&["plan", file]);
    let first = &plan["tasks"][0];
    assert_eq!(
        (&first["task"], &first["action"]),
        (&"raw".into(), &"run".into())
    );
    let plan = place.emberline(&["plan", file]).run().expect_code(0);
    assert!(plan.stdout.starts_with("TASK"), "{plan}");
    assert!(plan.stdout.contains("its sources can change"), "{plan}");

    let run = place.run(file);
    let id = run["run"].as_str().unwrap();
    let text = |arguments: &[&str]| place.emberline(arguments).run().expect_code(0).stdout;
    let list = text(&["runs", "list"]);
    assert!(list.contains(id) && list.contains("7/7"), "{list}");
    assert_eq!(
        place.json(&["runs", "list", "--pipeline", "other"]),
        Value::from(Vec::<Value>::new())
    );
    // Any beginning that is its alone names it.
    let shown = text(&["runs", "show", &id[..id.len() - 2]]);
    assert!(shown.contains(&format!("run       {id}")), "{shown}");
    assert!(shown.contains("state     succeeded"), "{shown}");
    let mut again = place.json(&["runs", "show", id]);
    again["report"] = run["report"].clone();
    assert_eq!(again, run);

    let log = text(&["runs", "logs", id, "--task", "train"]);
    assert!(log.contains("epoch"), "{log}");
    let stored = outside::log(&place.state(), id, "train", 1).unwrap();
    assert!(stored.is_sealed);
    assert_eq!(log.lines().count(), stored.lines.len());
    let points = text(&["runs", "logs", id, "--metrics", "-o", "json"]);
    let points: Vec<Value> = points
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let losses = points.iter().filter(|p| p["name"] == "train_loss");
    assert_eq!(losses.count(), 30, "one an epoch");

    let outputs = place.json(&["artifacts", "ls", id]);
    let outputs = outputs.as_array().unwrap();
    assert!(
        outputs
            .iter()
            .any(|o| o["task"] == "train" && o["output"] == "model")
    );
    let table = text(&["artifacts", "ls", id]);
    assert!(table.contains("train/model"), "{table}");
    let reference = format!("{id}/raw/data");
    let artifact = place.json(&["artifacts", "ls", &reference]);
    assert_eq!(artifact["files"][0]["path"], "data.csv");
    text(&["artifacts", "get", &reference, "fetched"]);
    let (fetched, given) = (place.path("fetched/data.csv"), place.path("start/data.csv"));
    assert_eq!(fs::read(fetched).unwrap(), fs::read(given).unwrap());

    let models = text(&["models", "list"]);
    assert!(
        models.contains("pumps") && models.contains("champion → 1"),
        "{models}"
    );
    let model = text(&["models", "show", "pumps"]);
    assert!(model.contains(id), "{model}");
    let status = place.json(&["cluster", "status"]);
    assert_eq!(status["live_runs"], 0);

    let unknown = place
        .emberline(&["models", "show", "nobody"])
        .run()
        .expect_code(2);
    assert_eq!(unknown.errors(), ["there is no model `nobody`"]);
    let unknown = place
        .emberline(&["runs", "show", "r-00"])
        .run()
        .expect_code(2);
    assert_eq!(unknown.errors(), ["there is no run `r-00`"]);
}

#[test]
fn init_writes_a_pipeline_of_commands_that_runs() {
    let place = Place::new();
    place
        .emberline(&["init", "--template", "exec"])
        .run()
        .expect_code(0);
    let run = place.run("pipeline.yaml");
    assert_eq!(run["state"], "succeeded", "{run:#}");
    assert_eq!(task(&run, "count")["results"]["lines"], 100);
    assert_eq!(task(&run, "large")["state"], "succeeded");
    outside::run_is_whole(&place.state(), &run);
}

#[test]
fn a_gate_that_is_not_met_fails_the_run_and_registers_nothing() {
    let place = Place::new();
    place.emberline(&["init", "."]).run().expect_code(0);
    let text = fs::read_to_string(place.path("pipeline.yaml")).unwrap();
    place.write(
        "pipeline.yaml",
        text.replace("f1: \">= 0.75\"", "f1: \">= 0.999\""),
    );
    let failed = place
        .emberline(&["run", "pipeline.yaml"])
        .run()
        .expect_code(1);
    let last = failed.stderr.lines().last().unwrap();
    assert!(
        last.starts_with("error: run r-") && last.contains("quality_gate"),
        "{failed}"
    );
    assert!(last.contains("0.999"), "{failed}");
    assert_eq!(
        place.json(&["models", "list"]),
        Value::from(Vec::<Value>::new())
    );
    // The report tells of it all the same.
    let run = place.json(&["runs", "list"]);
    let run = place.json(&["runs", "show", run[0]["run"].as_str().unwrap()]);
    assert_eq!(task(&run, "report")["state"], "succeeded");
    assert_eq!(task(&run, "deploy")["state"], "skipped");
    assert_eq!(run["failure"]["reason"], "quality_gate");
}
