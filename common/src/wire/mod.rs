//! Between the wire's types and the program's own: every field is checked here, once.
//!
//! What comes off the wire may come from anywhere; after it has passed here, names are names and
//! digests are digests. Nothing here decides anything.

use emberline_proto::v1 as pb;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{
    access::Role,
    failure::{Failure, Reason},
    ids::{AttemptId, InvalidId},
    resources::Resources,
    run_view::{
        ArtifactRef, AttemptTiming, ModelRegistration, PastAttempt, Results, RunState, RunSummary,
        TaskState, TaskView,
    },
    time::Timestamp,
    trace::RunTrace,
};

mod delivery;
mod dora;
mod serving;

pub use delivery::{change, without_credentials};

/// The largest JSON text in one field.
pub const MAX_JSON_BYTES: usize = 1 << 20;

/// A field of a message that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("field `{field}`: {message}")]
pub struct WireError {
    /// Its name, with the names of the messages around it.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl WireError {
    /// Of that field.
    #[must_use]
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            message: message.into(),
        }
    }

    /// The same, seen from the message around.
    #[must_use]
    pub fn within(mut self, field: &str) -> Self {
        self.field = format!("{field}.{}", self.field);
        self
    }
}

/// Parses a text field that is an id or a digest.
///
/// # Errors
/// With the rule that it breaks.
pub fn id<T: std::str::FromStr<Err = InvalidId>>(field: &str, text: &str) -> Result<T, WireError> {
    text.parse()
        .map_err(|e: InvalidId| WireError::new(field, e.to_string()))
}

/// Parses a text field that may be empty.
///
/// # Errors
/// With the rule that it breaks.
pub fn optional_id<T: std::str::FromStr<Err = InvalidId>>(
    field: &str,
    text: &str,
) -> Result<Option<T>, WireError> {
    (!text.is_empty()).then(|| id(field, text)).transpose()
}

/// Takes a message that must be there.
///
/// # Errors
/// If it is not.
pub fn required<T>(field: &str, value: Option<T>) -> Result<T, WireError> {
    value.ok_or_else(|| WireError::new(field, "it is missing"))
}

/// Parses a field with any JSON; empty is null.
///
/// # Errors
/// If it is no JSON, or larger than [`MAX_JSON_BYTES`].
pub fn json(field: &str, text: &str) -> Result<Value, WireError> {
    if text.is_empty() {
        return Ok(Value::Null);
    }
    if text.len() > MAX_JSON_BYTES {
        return Err(WireError::new(
            field,
            format!("it has {} bytes, more than {MAX_JSON_BYTES}", text.len()),
        ));
    }
    serde_json::from_str(text).map_err(|e| WireError::new(field, format!("it is no JSON: {e}")))
}

/// Parses a field with a JSON object; empty is an empty one.
///
/// # Errors
/// If it is none, or larger than [`MAX_JSON_BYTES`].
pub fn json_object(field: &str, text: &str) -> Result<Map<String, Value>, WireError> {
    match json(field, text)? {
        Value::Null => Ok(Map::new()),
        Value::Object(map) => Ok(map),
        _ => Err(WireError::new(field, "it is no JSON object")),
    }
}

/// Writes an object for the wire; an empty one as an empty text.
#[must_use]
pub fn object_text(map: &Map<String, Value>) -> String {
    if map.is_empty() {
        return String::new();
    }
    // A map of JSON values always has a text.
    serde_json::to_string(map).unwrap_or_default()
}

impl From<&AttemptId> for pb::AttemptId {
    fn from(id: &AttemptId) -> Self {
        Self {
            run: id.run.to_string(),
            task: id.task.to_string(),
            attempt: id.attempt,
        }
    }
}

impl TryFrom<pb::AttemptId> for AttemptId {
    type Error = WireError;
    fn try_from(message: pb::AttemptId) -> Result<Self, WireError> {
        if message.attempt == 0 {
            return Err(WireError::new("attempt", "it counts from 1"));
        }
        Ok(Self {
            run: id("run", &message.run)?,
            task: id("task", &message.task)?,
            attempt: message.attempt,
        })
    }
}

impl From<&ArtifactRef> for pb::ArtifactRef {
    fn from(artifact: &ArtifactRef) -> Self {
        Self {
            name: artifact.name.to_string(),
            manifest: artifact.manifest.to_string(),
            bytes: artifact.bytes,
        }
    }
}

impl TryFrom<pb::ArtifactRef> for ArtifactRef {
    type Error = WireError;
    fn try_from(message: pb::ArtifactRef) -> Result<Self, WireError> {
        Ok(Self {
            name: id("name", &message.name)?,
            manifest: id("manifest", &message.manifest)?,
            bytes: message.bytes,
        })
    }
}

/// Parses a list of outputs: no name stands twice.
///
/// # Errors
/// The first thing that is wrong.
pub fn outputs(field: &str, messages: Vec<pb::ArtifactRef>) -> Result<Vec<ArtifactRef>, WireError> {
    let mut out: Vec<ArtifactRef> = Vec::with_capacity(messages.len());
    for message in messages {
        let artifact = ArtifactRef::try_from(message).map_err(|e| e.within(field))?;
        if out.iter().any(|other| other.name == artifact.name) {
            return Err(WireError::new(
                field,
                format!("`{}` stands twice", artifact.name),
            ));
        }
        out.push(artifact);
    }
    Ok(out)
}

impl From<Role> for pb::TokenRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Viewer => Self::Viewer,
            Role::Operator => Self::Operator,
            Role::Admin => Self::Admin,
            Role::Worker => Self::Worker,
        }
    }
}

impl From<Resources> for pb::Resources {
    fn from(resources: Resources) -> Self {
        Self {
            cpu_millis: resources.cpu_millis,
            memory_bytes: resources.memory_bytes,
            gpus: resources.gpus,
        }
    }
}

impl From<pb::Resources> for Resources {
    fn from(message: pb::Resources) -> Self {
        Self {
            cpu_millis: message.cpu_millis,
            memory_bytes: message.memory_bytes,
            gpus: message.gpus,
        }
    }
}

macro_rules! states {
    ($domain:ty, $wire:ty, $field:literal, $($name:ident),+) => {
        impl From<$domain> for $wire {
            fn from(value: $domain) -> Self {
                match value { $(<$domain>::$name => Self::$name),+ }
            }
        }
        impl TryFrom<$wire> for $domain {
            type Error = WireError;
            fn try_from(message: $wire) -> Result<Self, WireError> {
                match message {
                    $(<$wire>::$name => Ok(Self::$name),)+
                    <$wire>::Unspecified => Err(WireError::new($field, "it is not set")),
                }
            }
        }
        impl From<$domain> for i32 {
            fn from(value: $domain) -> Self { <$wire>::from(value) as Self }
        }
        impl TryFrom<i32> for $domain {
            type Error = WireError;
            fn try_from(number: i32) -> Result<Self, WireError> {
                <$wire>::try_from(number)
                    .map_err(|_| WireError::new($field, format!("{number} is not known")))?
                    .try_into()
            }
        }
    };
}

use states;

states!(
    RunState,
    pb::RunState,
    "state",
    Queued,
    Running,
    Cancelling,
    Succeeded,
    Failed,
    Cancelled
);
states!(
    TaskState,
    pb::TaskState,
    "state",
    Waiting,
    Queued,
    Running,
    Backoff,
    Succeeded,
    Cached,
    Failed,
    Skipped,
    Cancelled
);
states!(
    Reason,
    pb::Reason,
    "reason",
    UserError,
    Data,
    QualityGate,
    Oom,
    Timeout,
    Storage,
    WorkerLost,
    Preempted,
    Cancelled,
    System
);

impl From<&Failure> for pb::Failure {
    fn from(failure: &Failure) -> Self {
        Self {
            reason: failure.reason.into(),
            message: failure.message.clone(),
        }
    }
}

impl TryFrom<pb::Failure> for Failure {
    type Error = WireError;
    fn try_from(message: pb::Failure) -> Result<Self, WireError> {
        Ok(Self::new(message.reason.try_into()?, message.message))
    }
}

impl From<Timestamp> for prost_types::Timestamp {
    fn from(at: Timestamp) -> Self {
        Self {
            seconds: i64::try_from(at.0 / 1_000_000).unwrap_or(i64::MAX),
            nanos: i32::try_from(at.0 % 1_000_000 * 1000).unwrap_or(0),
        }
    }
}

impl TryFrom<prost_types::Timestamp> for Timestamp {
    type Error = WireError;
    fn try_from(message: prost_types::Timestamp) -> Result<Self, WireError> {
        let refused = || WireError::new("timestamp", "it is before 1970 or out of range");
        let seconds = u64::try_from(message.seconds).map_err(|_| refused())?;
        let nanos = u64::try_from(message.nanos).map_err(|_| refused())?;
        if nanos >= 1_000_000_000 {
            return Err(refused());
        }
        seconds
            .checked_mul(1_000_000)
            .and_then(|micros| micros.checked_add(nanos / 1000))
            .map(Self)
            .ok_or_else(refused)
    }
}

fn time(
    field: &str,
    message: Option<prost_types::Timestamp>,
) -> Result<Option<Timestamp>, WireError> {
    message
        .map(Timestamp::try_from)
        .transpose()
        .map_err(|e| e.within(field))
}

fn failure(message: Option<pb::Failure>) -> Result<Option<Failure>, WireError> {
    message
        .map(Failure::try_from)
        .transpose()
        .map_err(|e| e.within("failure"))
}

impl From<&RunSummary> for pb::RunSummary {
    fn from(run: &RunSummary) -> Self {
        Self {
            run: run.run.to_string(),
            pipeline: run.pipeline.to_string(),
            revision: run.revision.to_string(),
            state: run.state.into(),
            failure: run.failure.as_ref().map(Into::into),
            params_json: object_text(&run.params),
            priority: run.priority,
            created_at: Some(run.created_at.into()),
            started_at: run.started_at.map(Into::into),
            finished_at: run.finished_at.map(Into::into),
            tasks_total: run.tasks_total,
            tasks_done: run.tasks_done,
            tasks_cached: run.tasks_cached,
            trigger: run.trigger.clone(),
            traceparent: run.traceparent.clone(),
            trace_id: RunTrace::of(&run.run, &run.traceparent).trace.to_string(),
            resumed_at: run.resumed_at.map(Into::into),
            change: run.change.as_ref().map(Into::into),
            repairs: run.repairs.map(|id| id.to_string()).unwrap_or_default(),
        }
    }
}

impl TryFrom<pb::RunSummary> for RunSummary {
    type Error = WireError;
    fn try_from(message: pb::RunSummary) -> Result<Self, WireError> {
        Ok(Self {
            run: id("run", &message.run)?,
            pipeline: id("pipeline", &message.pipeline)?,
            revision: id("revision", &message.revision)?,
            state: message.state.try_into()?,
            failure: failure(message.failure)?,
            params: json_object("params_json", &message.params_json)?,
            priority: message.priority,
            created_at: required("created_at", time("created_at", message.created_at)?)?,
            started_at: time("started_at", message.started_at)?,
            finished_at: time("finished_at", message.finished_at)?,
            tasks_total: message.tasks_total,
            tasks_done: message.tasks_done,
            tasks_cached: message.tasks_cached,
            trigger: message.trigger,
            traceparent: message.traceparent,
            resumed_at: time("resumed_at", message.resumed_at)?,
            change: message.change.map(change).transpose()?,
            repairs: optional_id("repairs", &message.repairs)?,
        })
    }
}

impl From<&TaskView> for pb::TaskView {
    fn from(task: &TaskView) -> Self {
        Self {
            task: task.task.to_string(),
            stage: task.stage.to_string(),
            kind: task.kind.to_string(),
            state: task.state.into(),
            attempt: task.attempt,
            worker: task
                .worker
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            failure: task.failure.as_ref().map(Into::into),
            outputs: task.outputs.iter().map(Into::into).collect(),
            results_json: object_text(&task.results),
            note: task.note.clone(),
            matrix_json: object_text(&task.matrix),
            ready_at: task.ready_at.map(Into::into),
            started_at: task.started_at.map(Into::into),
            finished_at: task.finished_at.map(Into::into),
            needs: task.needs.iter().map(ToString::to_string).collect(),
            cached_from_run: task
                .cached_from
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            timing: Some(pb::AttemptTiming {
                fetch_micros: task.timing.fetch_micros,
                stage_micros: task.timing.stage_micros,
                store_micros: task.timing.store_micros,
            }),
            earlier: task.earlier.iter().map(Into::into).collect(),
            again_at: task.again_at.map(Into::into),
        }
    }
}

impl From<&PastAttempt> for pb::PastAttempt {
    fn from(past: &PastAttempt) -> Self {
        Self {
            attempt: past.attempt,
            worker: past
                .worker
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            ready_at: Some(past.ready_at.into()),
            started_at: Some(past.started_at.into()),
            finished_at: Some(past.finished_at.into()),
            reason: past.reason.into(),
        }
    }
}

impl TryFrom<pb::PastAttempt> for PastAttempt {
    type Error = WireError;
    fn try_from(message: pb::PastAttempt) -> Result<Self, WireError> {
        let at = |field, at| required(field, time(field, at)?);
        Ok(Self {
            attempt: message.attempt,
            worker: optional_id("worker", &message.worker)?,
            ready_at: at("ready_at", message.ready_at)?,
            started_at: at("started_at", message.started_at)?,
            finished_at: at("finished_at", message.finished_at)?,
            reason: message.reason.try_into()?,
        })
    }
}

/// A task of that run.
///
/// # Errors
/// The first field that is wrong.
pub fn task_view(run: &crate::ids::RunId, message: pb::TaskView) -> Result<TaskView, WireError> {
    let needs = message.needs.iter().map(|stage| id("needs", stage));
    Ok(TaskView {
        run: run.clone(),
        task: id("task", &message.task)?,
        stage: id("stage", &message.stage)?,
        kind: id("kind", &message.kind)?,
        needs: needs.collect::<Result<_, _>>()?,
        matrix: json_object("matrix_json", &message.matrix_json)?,
        state: message.state.try_into()?,
        attempt: message.attempt,
        worker: optional_id("worker", &message.worker)?,
        failure: failure(message.failure)?,
        outputs: outputs("outputs", message.outputs)?,
        results: json_object("results_json", &message.results_json)?,
        note: message.note,
        ready_at: time("ready_at", message.ready_at)?,
        started_at: time("started_at", message.started_at)?,
        finished_at: time("finished_at", message.finished_at)?,
        cached_from: optional_id("cached_from_run", &message.cached_from_run)?,
        timing: message
            .timing
            .map_or_else(AttemptTiming::default, |t| AttemptTiming {
                fetch_micros: t.fetch_micros,
                stage_micros: t.stage_micros,
                store_micros: t.store_micros,
            }),
        earlier: (message.earlier.into_iter())
            .map(PastAttempt::try_from)
            .collect::<Result<_, _>>()
            .map_err(|e| e.within("earlier"))?,
        again_at: time("again_at", message.again_at)?,
    })
}

impl From<&ModelRegistration> for pb::ModelRegistration {
    fn from(registration: &ModelRegistration) -> Self {
        Self {
            model: registration.model.to_string(),
            alias: registration
                .alias
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            artifact: Some((&registration.artifact).into()),
            metrics_json: object_text(&registration.metrics),
            schema_json: match &registration.schema {
                Value::Null => String::new(),
                schema => schema.to_string(),
            },
            notes: registration.notes.clone(),
        }
    }
}

impl TryFrom<pb::ModelRegistration> for ModelRegistration {
    type Error = WireError;
    fn try_from(message: pb::ModelRegistration) -> Result<Self, WireError> {
        let metrics: Results = json_object("metrics_json", &message.metrics_json)?;
        Ok(Self {
            model: id("model", &message.model)?,
            alias: optional_id("alias", &message.alias)?,
            artifact: required("artifact", message.artifact)?
                .try_into()
                .map_err(|e: WireError| e.within("artifact"))?,
            metrics,
            schema: json("schema_json", &message.schema_json)?,
            notes: message.notes,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;
    use crate::ids::{Digest, RunId};

    fn task() -> TaskView {
        TaskView {
            run: "r1".parse().unwrap(),
            task: "train.2".parse().unwrap(),
            stage: "train".parse().unwrap(),
            kind: "acme/train".parse().unwrap(),
            needs: vec!["raw".parse().unwrap()],
            matrix: json_object("", r#"{"lr":0.1}"#).unwrap(),
            state: TaskState::Cached,
            attempt: 3,
            worker: Some("w1".parse().unwrap()),
            failure: Some(Failure::new(Reason::Oom, "too much")),
            outputs: vec![ArtifactRef {
                name: "model".parse().unwrap(),
                manifest: Digest::of(b"m"),
                bytes: 7,
            }],
            results: json_object("", r#"{"f1":0.7}"#).unwrap(),
            note: "why".into(),
            ready_at: Some(Timestamp(1)),
            started_at: Some(Timestamp(1_700_000_000_123_456)),
            finished_at: None,
            cached_from: Some("r0".parse().unwrap()),
            timing: AttemptTiming {
                fetch_micros: 1,
                stage_micros: 2,
                store_micros: 3,
            },
            earlier: vec![PastAttempt {
                attempt: 1,
                worker: Some("w-1".parse().unwrap()),
                ready_at: Timestamp(1),
                started_at: Timestamp(2),
                finished_at: Timestamp(3),
                reason: Reason::WorkerLost,
            }],
            again_at: Some(Timestamp(4)),
        }
    }

    #[test]
    fn a_task_comes_back_as_it_was_sent() {
        let task = task();
        let run = RunId::new("r1").unwrap();
        assert_eq!(task_view(&run, (&task).into()).unwrap(), task);
    }

    #[test]
    fn every_wrong_field_of_a_task_is_named() {
        type Break = fn(&mut pb::TaskView);
        let cases: [(&str, Break); 9] = [
            ("task", |t| t.task = "../x".into()),
            ("stage", |t| t.stage = String::new()),
            ("kind", |t| t.kind = "a/b/c".into()),
            ("state", |t| t.state = 0),
            ("state", |t| t.state = 99),
            ("worker", |t| t.worker = "a\nb".into()),
            ("outputs.manifest", |t| t.outputs[0].manifest = "x".into()),
            ("outputs", |t| t.outputs.push(t.outputs[0].clone())),
            ("results_json", |t| t.results_json = "[1]".into()),
        ];
        let run = RunId::new("r1").unwrap();
        for (field, break_it) in cases {
            let mut message = pb::TaskView::from(&task());
            break_it(&mut message);
            assert_eq!(task_view(&run, message).unwrap_err().field, field);
        }
    }

    #[test]
    fn an_attempt_counts_from_one() {
        let message = pb::AttemptId {
            run: "r".into(),
            task: "t".into(),
            attempt: 0,
        };
        assert_eq!(AttemptId::try_from(message).unwrap_err().field, "attempt");
    }

    #[test]
    fn times_that_no_clock_shows_are_refused() {
        for (seconds, nanos) in [(-1, 0), (0, -1), (0, 1_000_000_000), (i64::MAX, 0)] {
            let message = prost_types::Timestamp { seconds, nanos };
            assert!(Timestamp::try_from(message).is_err(), "{seconds} {nanos}");
        }
    }

    #[test]
    fn a_registration_comes_back_as_it_was_sent() {
        let registration = ModelRegistration {
            model: "m".parse().unwrap(),
            alias: None,
            artifact: task().outputs[0].clone(),
            metrics: json_object("", r#"{"f1":0.7}"#).unwrap(),
            schema: serde_json::json!([{"name": "x"}]),
            notes: "n".into(),
        };
        let message = pb::ModelRegistration::from(&registration);
        assert_eq!(ModelRegistration::try_from(message).unwrap(), registration);
    }

    #[test]
    fn json_over_the_limit_is_refused_before_it_is_read() {
        let text = format!("[{}1]", "1,".repeat(MAX_JSON_BYTES));
        assert!(json("x", &text).unwrap_err().message.contains("more than"));
    }
}
