//! One event as CDEvents v0.5 has it (<https://cdevents.dev>), and as HTTP carries it.

use std::fmt;

use emberline_common::{ids::Digest, time::Timestamp, trace::TraceId};
use serde_json::{Value, json};

/// The version of CDEvents that is spoken.
pub const SPEC_VERSION: &str = "0.5.1";
/// The version of each event type that is told; CDEvents 0.5 has the same for all of them.
const TYPE_VERSION: &str = "0.3.0";

/// What an event is about and what happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A run was accepted.
    RunQueued,
    /// The first task of a run was assigned.
    RunStarted,
    /// A run has ended.
    RunFinished,
    /// An attempt was assigned.
    TaskStarted,
    /// An attempt has ended.
    TaskFinished,
    /// A model was trained.
    ArtifactPackaged,
    /// A model version was registered.
    ArtifactPublished,
    /// The first version of a model is live in an environment.
    ServiceDeployed,
    /// The next version is.
    ServiceUpgraded,
    /// An earlier version is again.
    ServiceRolledBack,
    /// A deployment has failed.
    IncidentDetected,
    /// There is a ticket about it.
    IncidentReported,
    /// It is over.
    IncidentResolved,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::RunQueued => "pipelinerun.queued",
            Self::RunStarted => "pipelinerun.started",
            Self::RunFinished => "pipelinerun.finished",
            Self::TaskStarted => "taskrun.started",
            Self::TaskFinished => "taskrun.finished",
            Self::ArtifactPackaged => "artifact.packaged",
            Self::ArtifactPublished => "artifact.published",
            Self::ServiceDeployed => "service.deployed",
            Self::ServiceUpgraded => "service.upgraded",
            Self::ServiceRolledBack => "service.rolledback",
            Self::IncidentDetected => "incident.detected",
            Self::IncidentReported => "incident.reported",
            Self::IncidentResolved => "incident.resolved",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dev.cdevents.{}.{TYPE_VERSION}", self.as_str())
    }
}

/// The id of an event, as the 16 bytes of a UUID.
pub type EventId = [u8; 16];

/// An event to tell.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Derived from what has happened: told again, it is the same.
    pub id: EventId,
    /// All of it.
    pub json: Value,
}

/// What an event says.
pub(super) struct Said<'a> {
    /// What has happened.
    pub(super) kind: Kind,
    /// Who says so.
    pub(super) source: &'a str,
    /// To what, or whom.
    pub(super) subject: String,
    /// Tells it from the same thing that happened to the same subject at another time.
    pub(super) once: String,
    /// When.
    pub(super) at: Timestamp,
    /// The trace that it is part of.
    pub(super) trace: TraceId,
    /// What the event type asks for.
    pub(super) content: Value,
    /// What CDEvents has no word for.
    pub(super) more: Value,
}

impl From<Said<'_>> for Event {
    fn from(said: Said<'_>) -> Self {
        let kind = said.kind.to_string();
        // None of them has a line break in it, so no two lists of parts are one text.
        let parts = [said.source, &kind, &said.subject, &said.once].join("\n");
        let mut id = [0; 16];
        id.copy_from_slice(&Digest::of(parts.as_bytes()).as_bytes()[..16]);
        // RFC 9562: version 8, made as the one who makes it sees fit.
        let id = versioned(id, 8);
        let json = json!({
            "context": {
                "specversion": SPEC_VERSION,
                "id": uuid(id),
                "chainId": uuid(versioned(said.trace.to_bytes(), 4)),
                "source": said.source,
                "type": kind,
                "timestamp": said.at.to_string(),
            },
            "subject": {
                "id": said.subject,
                "source": said.source,
                "content": said.content,
            },
            "customData": said.more,
            "customDataContentType": "application/json",
        });
        Self { id, json }
    }
}

impl Event {
    /// The CloudEvent that carries it, in structured mode (the binding of CDEvents to CloudEvents
    /// 1.0): what a header could not hold without being encoded is then no matter.
    #[must_use]
    pub fn envelope(&self) -> Value {
        let context = &self.json["context"];
        json!({
            "specversion": "1.0",
            "id": context["id"],
            "source": context["source"],
            "type": context["type"],
            "subject": self.json["subject"]["id"],
            "time": context["timestamp"],
            "datacontenttype": "application/json",
            "data": self.json,
        })
    }

    /// Its type, for people.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.json["context"]["type"].as_str().unwrap_or_default()
    }
}

fn versioned(mut bytes: [u8; 16], version: u8) -> [u8; 16] {
    bytes[6] = bytes[6] & 0x0f | version << 4;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

fn uuid(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| &hex[part]);
    parts.join("-")
}
