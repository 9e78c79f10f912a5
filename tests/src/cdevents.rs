//! CDEvents as tests write and read them: one that an outside system tells, and those that a sink or
//! a file was told.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};

use crate::{
    http::{Posted, Sink},
    seconds,
};

/// How long what is told may take to arrive.
pub const ARRIVES: Duration = seconds(30);

/// An event that an outside system tells: its type without `dev.cdevents.` and its version, its
/// subject, when it happened in seconds since 1970, and what it says.
///
/// # Panics
/// If there is no such time.
#[must_use]
pub fn event(kind: &str, id: &str, at: u64, content: &Value) -> Value {
    let at = jiff::Timestamp::from_second(i64::try_from(at).unwrap()).unwrap();
    json!({
        "context": {
            "specversion": "0.5.1", "id": "e-1", "source": "/forge/ci",
            "type": format!("dev.cdevents.{kind}.0.3.0"), "timestamp": at.to_string(),
        },
        "subject": { "id": id, "content": content },
    })
}

/// The type of an event, without its beginning and its version.
///
/// # Panics
/// If it is none of CDEvents 0.5.
#[must_use]
#[track_caller]
pub fn kind(event: &Value) -> &str {
    let text = event["context"]["type"].as_str().unwrap();
    let name = text
        .strip_prefix("dev.cdevents.")
        .unwrap_or_else(|| panic!("{text}"));
    name.strip_suffix(".0.3.0")
        .unwrap_or_else(|| panic!("{text}"))
}

/// How often each type was told, each event once.
///
/// # Panics
/// If one is none.
#[must_use]
pub fn kinds(events: &[Value]) -> BTreeMap<&str, usize> {
    let once: BTreeMap<_, _> = events
        .iter()
        .map(|e| (e["context"]["id"].as_str().unwrap(), e))
        .collect();
    let mut out = BTreeMap::new();
    for event in once.into_values() {
        *out.entry(kind(event)).or_default() += 1;
    }
    out
}

/// The CDEvents in what was posted.
///
/// # Panics
/// If something else was posted.
#[must_use]
pub fn told(posted: &[Posted]) -> Vec<Value> {
    let events = posted.iter().map(|posted| {
        let kind = &posted.headers["content-type"];
        assert!(
            kind.starts_with("application/cloudevents+json"),
            "{posted:?}"
        );
        let cloud: Value = serde_json::from_str(&posted.body).unwrap();
        assert_eq!(cloud["specversion"], "1.0");
        for name in ["id", "source", "type"] {
            assert_eq!(cloud[name], cloud["data"]["context"][name], "{cloud:#}");
        }
        assert_eq!(cloud["subject"], cloud["data"]["subject"]["id"]);
        cloud["data"].clone()
    });
    events.collect()
}

/// Waits until the sink was told of so many runs that have ended, each with all of its tasks.
///
/// # Panics
/// If it is not.
#[track_caller]
pub fn wait_for_runs(sink: &Sink, runs: usize) {
    sink.wait_for(&format!("{runs} whole runs"), ARRIVES, |posted| {
        let events = told(posted);
        let found = kinds(&events);
        let number = |kind: &str| found.get(kind).copied().unwrap_or(0);
        let whole = number("pipelinerun.finished") == runs
            && number("pipelinerun.queued") == runs
            && number("pipelinerun.started") == runs
            && number("taskrun.finished") == number("taskrun.started");
        whole.then_some(()).ok_or_else(|| format!("{found:?}"))
    });
}
