//! What happens is told to others as CDEvents: all of it, at least once, in the form that the
//! specification asks for; and a place that is dead, slow or gone holds up nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::Instant,
};

use emberline_tests::{
    Dev, Place,
    cdevents::{ARRIVES, kind, kinds, told, wait_for_runs},
    http::Sink,
    seconds,
    team::{Team, ago},
    wait_for,
};
use serde_json::{Value, json};

/// What the specification asks of the content of each type (CDEvents 0.5).
const TYPES: [(&str, &[&str]); 12] = [
    ("pipelinerun.queued", &["pipelineName", "uri"]),
    ("pipelinerun.started", &["pipelineName", "uri"]),
    ("pipelinerun.finished", &["pipelineName", "uri", "outcome"]),
    ("taskrun.started", &["taskName", "uri", "pipelineRun"]),
    (
        "taskrun.finished",
        &["taskName", "uri", "pipelineRun", "outcome"],
    ),
    ("artifact.packaged", &["change"]),
    ("artifact.published", &[]),
    ("service.deployed", &["environment", "artifactId"]),
    ("service.upgraded", &["environment", "artifactId"]),
    ("service.rolledback", &["environment", "artifactId"]),
    (
        "incident.detected",
        &["environment", "service", "artifactId"],
    ),
    (
        "incident.resolved",
        &["environment", "service", "artifactId"],
    ),
];

/// An event is as the specification asks.
#[track_caller]
fn is_well_formed(event: &Value, source: &str) {
    let context = event["context"].as_object().unwrap();
    let names: BTreeSet<_> = context.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        BTreeSet::from([
            "specversion",
            "id",
            "chainId",
            "source",
            "type",
            "timestamp"
        ])
    );
    assert_eq!(context["specversion"], "0.5.1");
    assert_eq!(context["source"], source);
    for name in ["id", "chainId"] {
        let id = context[name].as_str().unwrap();
        let parts: Vec<_> = id.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12], "{name} {id}");
    }
    let at: Result<jiff::Timestamp, _> = context["timestamp"].as_str().unwrap().parse();
    at.unwrap();
    let subject = &event["subject"];
    assert!(
        subject["id"].as_str().is_some_and(|id| !id.is_empty()),
        "{event:#}"
    );
    let known = TYPES.iter().find(|(name, _)| *name == kind(event));
    let (_, fields) = known.unwrap_or_else(|| panic!("{event:#}"));
    for field in *fields {
        assert!(
            !subject["content"][field].is_null(),
            "`{field}` of {event:#}"
        );
    }
}

fn lines(place: &Place, file: &str) -> Vec<Value> {
    let text = fs::read_to_string(place.path(file)).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

/// A team that tells a file.
fn telling() -> Team {
    let team = Team::new();
    team.tree.commit("One", ago(60));
    team
}

#[test]
fn a_file_has_every_step_from_the_run_to_the_end_of_an_incident() {
    let team = telling();
    let to = [
        "--events-file",
        "events.jsonl",
        "--events-source",
        "/ember/a",
    ];
    let first = team.run(1, &to);
    team.run(2, &to);
    team.json(
        &[
            &[
                "rollback",
                "production",
                "--why",
                "see https://tickets.example.org/7",
            ],
            &to[..],
        ]
        .concat(),
    );
    let events = lines(&team.place, "events.jsonl");
    for event in &events {
        is_well_formed_or_reported(event, "/ember/a");
    }
    let found = kinds(&events);
    let expected = [
        ("artifact.packaged", 2),
        ("artifact.published", 2),
        ("incident.detected", 1),
        ("incident.reported", 1),
        ("incident.resolved", 1),
        ("pipelinerun.finished", 2),
        ("pipelinerun.queued", 2),
        ("pipelinerun.started", 2),
        ("service.deployed", 1),
        ("service.rolledback", 1),
        ("service.upgraded", 1),
        // The table is reused by the second run.
        ("taskrun.finished", 7),
        ("taskrun.started", 7),
    ];
    assert_eq!(found, BTreeMap::from(expected));
    // All of one run is one chain, and says which trace that is.
    let run = first["run"].as_str().unwrap();
    let of_run: Vec<_> = events
        .iter()
        .filter(|e| {
            e["subject"]["id"]
                .as_str()
                .is_some_and(|id| id == run || id.starts_with(&format!("{run}/")))
        })
        .collect();
    let chains: BTreeSet<_> = of_run
        .iter()
        .map(|e| e["context"]["chainId"].as_str().unwrap())
        .collect();
    assert!(of_run.len() >= 11 && chains.len() == 1, "{of_run:#?}");
    let queued = events
        .iter()
        .find(|e| kind(e) == "pipelinerun.queued")
        .unwrap();
    assert_eq!(queued["customData"]["traceId"], first["trace_id"]);
    let packaged = events
        .iter()
        .find(|e| kind(e) == "artifact.packaged")
        .unwrap();
    assert_eq!(
        packaged["subject"]["content"]["change"]["source"],
        "https://git.example.org/pumps.git"
    );
    let text = fs::read_to_string(team.place.path("events.jsonl")).unwrap();
    assert!(!text.contains("planted-git-token"));
}

/// The same; an incident that names a ticket is reported, too.
#[track_caller]
fn is_well_formed_or_reported(event: &Value, source: &str) {
    if kind(event) == "incident.reported" {
        assert_eq!(
            event["subject"]["content"]["ticketURI"],
            "https://tickets.example.org/7"
        );
    } else {
        is_well_formed(event, source);
    }
}

#[test]
fn a_sink_that_is_gone_for_a_while_misses_nothing_and_holds_up_no_run() {
    let team = telling();
    let mut sink = Sink::start();
    let url = sink.url();
    let dev = Dev::start_with(&team.place, &["--events-sink", &url]);
    team.run(1, &[]);
    wait_for_runs(&sink, 1);
    for (number, hangs) in [(2, false), (3, true)] {
        if hangs {
            sink.hang(true);
        } else {
            sink.stop();
        }
        let begun = Instant::now();
        team.run(number, &[]);
        assert!(begun.elapsed() < seconds(10), "{:?}", begun.elapsed());
        if hangs {
            sink.hang(false);
        } else {
            sink.start_again();
        }
        wait_for_runs(&sink, number as usize);
    }
    // What a run has deployed is told by itself, and may come after the run.
    let upgrades = |events: &[Value]| kinds(events).get("service.upgraded").copied();
    wait_for("both upgrades", seconds(20), || {
        (upgrades(&told(&sink.posted())) == Some(2)).then_some(())
    });
    let events = told(&sink.posted());
    for event in &events {
        is_well_formed(event, "/emberline");
    }
    assert_eq!(upgrades(&events), Some(2));
    assert_eq!(dev.stop().code, Some(0));
}

#[test]
fn what_was_not_told_before_a_kill_is_told_by_the_next_process() {
    let team = telling();
    let mut sink = Sink::prepare();
    let url = sink.url();
    let arguments = ["--events-sink", url.as_str()];
    let dev = Dev::start_with(&team.place, &arguments);
    team.run(1, &[]);
    team.run(2, &[]);
    dev.kill();
    sink.start_again();
    let dev = Dev::start_with(&team.place, &arguments);
    wait_for_runs(&sink, 2);
    let found = sink.wait_for("the deployments", ARRIVES, |posted| {
        let events = told(posted);
        let found: BTreeMap<_, _> = kinds(&events)
            .into_iter()
            .map(|(k, n)| (k.to_owned(), n))
            .collect();
        match found.get("service.upgraded") {
            Some(1) => Ok(found),
            _ => Err(format!("{found:?}")),
        }
    });
    assert_eq!(
        (found["service.deployed"], found["artifact.packaged"]),
        (1, 2),
        "{found:?}"
    );
    assert_eq!(dev.stop().code, Some(0));
}

#[test]
fn a_run_of_its_own_process_does_not_wait_for_a_sink_that_hangs() {
    let team = telling();
    let sink = Sink::start();
    sink.hang(true);
    let begun = Instant::now();
    team.run(1, &["--events-sink", &sink.url()]);
    assert!(begun.elapsed() < seconds(10), "{:?}", begun.elapsed());
}

#[test]
fn a_place_that_cannot_be_meant_is_one_line_and_nothing_is_started() {
    let place = Place::new();
    place.write("p.yaml", "pipeline: p\nstages:\n  s: { kind: noop }\n");
    let cases: [(&[&str], &str); 4] = [
        (
            &["--events-sink", "ftp://user:planted@example.org/x"],
            "not by `ftp`",
        ),
        (&["--events-sink", "nonsense"], "--events-sink"),
        (&["--events-file", "none/events.jsonl"], "none/events.jsonl"),
        (
            &["--events-source", "two words"],
            "--events-source two words",
        ),
    ];
    for (arguments, part) in cases {
        let output = place
            .emberline(&[&["run", "p.yaml"], arguments].concat())
            .run()
            .expect_code(2);
        let errors = output.errors();
        assert!(errors.len() == 1 && errors[0].contains(part), "{output}");
        assert!(!errors[0].contains("planted"), "{output}");
    }
    assert!(!place.state().exists());
}

#[test]
fn what_fails_and_what_is_cancelled_say_so() {
    let place = Place::new();
    let pipeline = json!({
        "pipeline": "fails",
        "stages": { "s": { "kind": "exec", "cache": false, "with": { "command": ["sh", "-c", "exit 3"] } } },
    });
    place.write("fails.yaml", pipeline.to_string());
    place
        .emberline(&["run", "fails.yaml", "-q", "--events-file", "e.jsonl"])
        .run()
        .expect_code(1);
    let events = lines(&place, "e.jsonl");
    for kind_of in ["taskrun.finished", "pipelinerun.finished"] {
        let event = events.iter().find(|e| kind(e) == kind_of).unwrap();
        assert_eq!(
            event["subject"]["content"]["outcome"], "failure",
            "{event:#}"
        );
        let errors = event["subject"]["content"]["errors"].as_str().unwrap();
        assert!(errors.contains('3'), "{errors}");
    }
}
