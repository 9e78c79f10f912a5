//! What outside systems tell: from a CDEvent to what the engine is to note.
//!
//! Three types are understood, in any version: `change.merged`, `incident.detected`,
//! `incident.resolved`. An event comes bare, or as the `data` of a CloudEvent. All others are heard
//! and mean nothing here: an event bus delivers what it has to everybody.

use emberline_common::{ids::ModelName, time::Timestamp, wire::without_credentials};
use serde_json::Value;
use thiserror::Error;

use crate::engine::api::{Merge, OutsideEvent};

/// The largest event that is taken, in bytes.
pub const MAX_EVENT_BYTES: usize = 256 << 10;
/// The longest text of an event that is kept, in bytes.
const MAX_TEXT_BYTES: usize = 512;
/// What every type of CDEvents begins with.
const PREFIX: &str = "dev.cdevents.";

/// What an event means here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// The engine is to note this.
    Told(OutsideEvent),
    /// Nothing, and why.
    Nothing(String),
}

/// An event that cannot be read, in words for whoever sends it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EventError {
    /// It is too large.
    #[error("the event has {0} bytes, at most {MAX_EVENT_BYTES} are taken")]
    TooLarge(usize),
    /// It is no JSON.
    #[error("the event is no JSON: {0}")]
    Json(String),
    /// A field is missing or wrong.
    #[error("`{field}` {why}")]
    Field {
        /// Where.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

fn wrong(field: &'static str, why: impl Into<String>) -> EventError {
    let why = why.into();
    EventError::Field { field, why }
}

/// Reads an event. `own` is the source of our own events, which we hear when they come back.
///
/// # Errors
/// [`EventError`], if it is one of the three types and breaks their rules, or no event at all.
pub fn heard(event: &[u8], own: &str) -> Result<Heard, EventError> {
    if event.len() > MAX_EVENT_BYTES {
        return Err(EventError::TooLarge(event.len()));
    }
    let event: Value =
        serde_json::from_slice(event).map_err(|e| EventError::Json(e.to_string()))?;
    // A CloudEvent has its attributes at the top, and the CDEvent within.
    let event = match &event["data"] {
        data @ Value::Object(_) if event["context"].is_null() => data,
        _ => &event,
    };
    let context = &event["context"];
    let kind = text(&context["type"]).ok_or_else(|| wrong("context.type", "is missing"))?;
    let Some(name) = kind.strip_prefix(PREFIX) else {
        let why = format!("is `{}`, no type of CDEvents", kind.escape_debug());
        return Err(wrong("context.type", why));
    };
    // `subject.predicate.1.2.3`
    let mut words = name.splitn(3, '.');
    let name = (words.next().unwrap_or_default(), words.next());
    if !matches!(
        name,
        ("change", Some("merged")) | ("incident", Some("detected" | "resolved"))
    ) {
        let why = format!("nothing here depends on `{}`", kind.escape_debug());
        return Ok(Heard::Nothing(why));
    }
    if text(&context["source"]) == Some(own) {
        return Ok(Heard::Nothing("it is an event of our own".to_owned()));
    }
    let at = text(&context["timestamp"]).and_then(Timestamp::parse);
    let at = at.ok_or_else(|| wrong("context.timestamp", "is no time as in RFC 3339"))?;
    let subject = &event["subject"];
    let id = kept("subject.id", &subject["id"])?;
    let id = id.ok_or_else(|| wrong("subject.id", "is missing"))?;
    let content = &subject["content"];
    Ok(Heard::Told(match name.0 {
        "change" => OutsideEvent::ChangeMerged(Merge {
            repository: repository(&content["repository"])?,
            revision: revision(&event["customData"], content, id)?,
            merged_at: at,
        }),
        _ if name.1 == Some("resolved") => OutsideEvent::IncidentResolved {
            incident: id,
            resolved_at: at,
        },
        _ => {
            let environment = text(&content["environment"]["id"]);
            let environment =
                environment.ok_or_else(|| wrong("subject.content.environment.id", "is missing"))?;
            OutsideEvent::IncidentDetected {
                incident: id,
                environment: environment
                    .parse()
                    .map_err(|e| wrong("subject.content.environment.id", format!("{e}")))?,
                model: model(content, environment),
                detected_at: at,
                why: one_line(text(&content["description"]).unwrap_or_default()),
            }
        }
    }))
}

fn text(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| !text.is_empty())
}

/// A text that is kept as it is.
fn kept(field: &'static str, value: &Value) -> Result<Option<String>, EventError> {
    let Some(text) = text(value) else {
        return Ok(None);
    };
    if text.len() > MAX_TEXT_BYTES || text.chars().any(char::is_control) {
        let why = format!("has more than {MAX_TEXT_BYTES} bytes, or control characters");
        return Err(wrong(field, why));
    }
    Ok(Some(text.to_owned()))
}

/// A text for people, on one line.
fn one_line(text: &str) -> String {
    let mut line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    line.truncate(line.floor_char_boundary(MAX_TEXT_BYTES));
    line
}

fn repository(repository: &Value) -> Result<String, EventError> {
    const FIELD: &str = "subject.content.repository";
    let id = kept(FIELD, &repository["id"])?.unwrap_or_default();
    Ok(match kept(FIELD, &repository["source"])? {
        Some(source) if !id.contains(&source) => {
            without_credentials(format!("{}/{id}", source.trim_end_matches('/')))
        }
        _ => without_credentials(id),
    })
}

/// The commit that the merge made. CDEvents has no field for it: it is looked for where senders put
/// it, and the change itself may be named by it.
fn revision(custom: &Value, content: &Value, id: String) -> Result<String, EventError> {
    let named = ["revision", "commit", "sha", "merge_commit_sha"];
    let places = [custom, content];
    let found = places
        .iter()
        .flat_map(|place| named.iter().find_map(|name| text(&place[*name])))
        .next();
    let revision = found.map_or(id, str::to_owned);
    let is_commit =
        matches!(revision.len(), 40 | 64) && revision.bytes().all(|b| b.is_ascii_hexdigit());
    if is_commit {
        return Ok(revision.to_ascii_lowercase());
    }
    Err(wrong(
        "customData.revision",
        "must name the commit, with all of its 40 (or 64) hex digits; `subject.id` may be that commit, too",
    ))
}

/// The model that an incident is about, if it says so: by our own name for a service
/// (`environment/model`), by the model's name, or by the artifact (`pkg:generic/model@version`).
fn model(content: &Value, environment: &str) -> Option<ModelName> {
    let service = text(&content["service"]["id"]);
    let service = service.map(|id| {
        let own = id.strip_prefix(environment);
        own.and_then(|rest| rest.strip_prefix('/')).unwrap_or(id)
    });
    let artifact = text(&content["artifactId"]).and_then(|id| {
        let id = id.strip_prefix("pkg:")?.split_once('/')?.1;
        id.split(['@', '?', '#']).next()
    });
    [service, artifact]
        .into_iter()
        .flatten()
        .find_map(|name| name.parse().ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use serde_json::json;

    use super::*;

    const COMMIT: &str = "4f2a4f2a4f2a4f2a4f2a4f2a4f2a4f2a4f2a4f2a";

    fn event(kind: &str, id: &str, content: Value) -> Value {
        json!({
            "context": {
                "specversion": "0.5.1",
                "id": "1",
                "source": "/forge",
                "type": format!("dev.cdevents.{kind}.0.3.0"),
                "timestamp": "2026-11-23T10:00:00.5+01:00",
            },
            "subject": { "id": id, "content": content },
        })
    }

    fn hear(event: &Value) -> Result<Heard, EventError> {
        heard(event.to_string().as_bytes(), "/emberline")
    }

    fn told(event: &Value) -> OutsideEvent {
        match hear(event).unwrap() {
            Heard::Told(told) => told,
            Heard::Nothing(why) => panic!("it means nothing: {why}"),
        }
    }

    fn at() -> Timestamp {
        Timestamp::parse("2026-11-23T09:00:00.5Z").unwrap()
    }

    #[test]
    fn a_merge_names_its_commit_in_custom_data_or_by_its_own_id() {
        let repository = json!({ "id": "models", "source": "https://me:secret@example.org/team/" });
        let mut merged = event("change.merged", "17", json!({ "repository": repository }));
        merged["customData"] = json!({ "revision": COMMIT.to_uppercase() });
        let merge = Merge {
            repository: "https://example.org/team/models".to_owned(),
            revision: COMMIT.to_owned(),
            merged_at: at(),
        };
        assert_eq!(told(&merged), OutsideEvent::ChangeMerged(merge.clone()));
        let by_id = told(&event("change.merged", COMMIT, json!({})));
        let repository = String::new();
        let merge = Merge {
            repository,
            ..merge
        };
        assert_eq!(by_id, OutsideEvent::ChangeMerged(merge));
        let unnamed = hear(&event("change.merged", "17", json!({}))).unwrap_err();
        assert!(
            unnamed.to_string().contains("customData.revision"),
            "{unnamed}"
        );
    }

    #[test]
    fn an_incident_names_its_place_and_perhaps_its_model() {
        let about = |content: Value| {
            let mut all =
                json!({ "environment": { "id": "production" }, "description": "it\nis slow" });
            for (name, value) in content.as_object().unwrap() {
                all[name] = value.clone();
            }
            told(&event("incident.detected", "INC-7", all))
        };
        for (content, model) in [
            (json!({}), None),
            (
                json!({ "service": { "id": "production/pumps" } }),
                Some("pumps"),
            ),
            (json!({ "service": { "id": "pumps" } }), Some("pumps")),
            (json!({ "service": { "id": "The Shop!" } }), None),
            (
                json!({ "artifactId": "pkg:generic/pumps@3?checksum=sha256:00" }),
                Some("pumps"),
            ),
        ] {
            let expected = OutsideEvent::IncidentDetected {
                incident: "INC-7".to_owned(),
                environment: "production".parse().unwrap(),
                model: model.map(|model| model.parse().unwrap()),
                detected_at: at(),
                why: "it is slow".to_owned(),
            };
            assert_eq!(about(content), expected);
        }
        let resolved = told(&event("incident.resolved", "INC-7", json!({})));
        let expected = OutsideEvent::IncidentResolved {
            incident: "INC-7".to_owned(),
            resolved_at: at(),
        };
        assert_eq!(resolved, expected);
    }

    #[test]
    fn an_event_within_a_cloud_event_is_the_same() {
        let bare = event("incident.resolved", "INC-7", json!({}));
        let carried = json!({ "specversion": "1.0", "type": "x", "id": "1", "data": bare });
        assert_eq!(hear(&carried), hear(&bare));
    }

    #[test]
    fn what_nothing_depends_on_and_what_we_said_ourselves_means_nothing() {
        let other = hear(&event("build.finished", "b", json!({}))).unwrap();
        assert!(matches!(other, Heard::Nothing(_)), "{other:?}");
        let mut own = event("incident.detected", "incident/d1", json!({}));
        own["context"]["source"] = json!("/emberline");
        assert!(matches!(hear(&own).unwrap(), Heard::Nothing(_)));
    }

    #[test]
    fn what_breaks_a_rule_is_told_with_the_field_at_fault() {
        let detected = |content| event("incident.detected", "INC-7", content);
        let mut no_time = detected(json!({ "environment": { "id": "production" } }));
        no_time["context"]["timestamp"] = json!("yesterday");
        let mut no_type = no_time.clone();
        no_type["context"]["type"] = json!("com.example.something");
        let long = "x".repeat(600);
        for (event, field) in [
            (no_time, "context.timestamp"),
            (no_type, "context.type"),
            (json!({}), "context.type"),
            (json!([1]), "context.type"),
            (detected(json!({})), "subject.content.environment.id"),
            (
                detected(json!({ "environment": { "id": "../x" } })),
                "subject.content.environment.id",
            ),
            (event("incident.resolved", "", json!({})), "subject.id"),
            (event("incident.resolved", &long, json!({})), "subject.id"),
            (event("incident.resolved", "a\nb", json!({})), "subject.id"),
        ] {
            let error = hear(&event).unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{field}` ")), "{error}");
        }
        let broken = heard(b"{", "/emberline").unwrap_err();
        assert!(matches!(broken, EventError::Json(_)), "{broken}");
        let large = vec![b' '; MAX_EVENT_BYTES + 1];
        let large = heard(&large, "/emberline").unwrap_err();
        assert!(matches!(large, EventError::TooLarge(_)), "{large}");
    }
}
