//! Errors as gRPC statuses: canonical codes, with details that a program can read. All of them are
//! made here.

use std::collections::HashMap;

use emberline_common::{
    artifact::ArtifactError, attempt_log::AttemptLogError, ids::RunId, redirect, spec::Diagnostic,
    wire::WireError,
};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use super::translate;
use crate::{
    access::Denied,
    archive::ArchiveError,
    engine::api::{Refusal, RegistryRefusal, TokenRefusal},
    gc::CollectError,
    lookup::LookupError,
    runtime::{RETRY_HINT, RuntimeError, watchers::WatchEnd},
    store::Leader,
};

pub use emberline_common::redirect::DOMAIN;

fn with_reason(code: Code, reason: &str, message: String) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

fn try_again(code: Code, reason: &str, message: String) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, DOMAIN, HashMap::new());
    details.set_retry_info(Some(RETRY_HINT));
    Status::with_error_details(code, message, details)
}

/// A field of the request that breaks a rule.
pub(super) fn bad_field(field: &str, message: impl Into<String>) -> Status {
    let message = message.into();
    let mut details = ErrorDetails::new();
    details.add_bad_request_violation(field, message.clone());
    details.set_error_info("INVALID_FIELD", DOMAIN, HashMap::new());
    Status::with_error_details(
        Code::InvalidArgument,
        format!("{field}: {message}"),
        details,
    )
}

pub(super) fn bad_wire(e: &WireError) -> Status {
    bad_field(&e.field, e.message.clone())
}

/// Text of all violations together, in bytes. A status travels in the headers, and clients take 8 KiB
/// of them (in base64, and with the message beside it).
const MAX_VIOLATION_BYTES: usize = 4 << 10;

/// The mistakes of a pipeline, one violation each, that names the field, and the place in the text;
/// as many as a status can carry.
pub(super) fn bad_pipeline(diagnostics: &[Diagnostic]) -> Status {
    let mut violations: Vec<FieldViolation> = Vec::new();
    let mut bytes = 0;
    for d in diagnostics {
        let violation = FieldViolation::new(
            translate::cut(d.field.clone(), 200),
            translate::cut(d.to_string(), 1000),
        );
        bytes += violation.field.len() + violation.description.len();
        if bytes > MAX_VIOLATION_BYTES {
            let rest = diagnostics.len() - violations.len();
            let text = format!("{rest} more mistakes: `ValidatePipeline` answers with all of them");
            violations.push(FieldViolation::new("", text));
            break;
        }
        violations.push(violation);
    }
    let first = diagnostics.first();
    let first = first.map(|d| translate::cut(d.to_string(), 500));
    let message = match (diagnostics.len(), first) {
        (1, Some(first)) => first,
        (n, first) => format!(
            "the pipeline has {n} mistakes, the first: {}",
            first.unwrap_or_default()
        ),
    };
    let mut details = ErrorDetails::new();
    details.set_bad_request(violations);
    details.set_error_info("INVALID_PIPELINE", DOMAIN, HashMap::new());
    Status::with_error_details(Code::InvalidArgument, message, details)
}

pub(super) fn not_found(what: &str, name: &str) -> Status {
    with_reason(
        Code::NotFound,
        "NOT_FOUND",
        format!("there is no {what} `{}`", name.escape_debug()),
    )
}

pub(super) fn failed_precondition(reason: &str, message: impl Into<String>) -> Status {
    with_reason(Code::FailedPrecondition, reason, message.into())
}

/// Another coordinator leads, or none does; the details say where the leader is.
pub(super) fn not_leader(leader: Option<&Leader>, trouble: Option<&str>) -> Status {
    match (leader, trouble) {
        (_, Some(trouble)) => {
            redirect::not_leader(None, format!("nobody leads: {trouble}"), RETRY_HINT)
        }
        (None, None) => {
            let message = "nobody leads at the moment: try again".to_owned();
            redirect::not_leader(None, message, RETRY_HINT)
        }
        (Some(leader), None) => {
            let address = leader.address.as_str();
            let message = format!("this coordinator does not lead; {address} does");
            redirect::not_leader(Some((address, leader.epoch)), message, RETRY_HINT)
        }
    }
}

/// A caller that is turned away.
pub(super) fn denied(why: &Denied) -> Status {
    let (code, reason) = match why {
        Denied::Unauthenticated => (Code::Unauthenticated, "UNAUTHENTICATED"),
        Denied::Forbidden(_) => (Code::PermissionDenied, "PERMISSION_DENIED"),
    };
    with_reason(code, reason, why.text().to_owned())
}

pub(super) fn exists(message: String) -> Status {
    with_reason(Code::AlreadyExists, "EXISTS", message)
}

pub(super) fn stopping() -> Status {
    try_again(
        Code::Unavailable,
        "STOPPING",
        "this coordinator is stopping; connect again".to_owned(),
    )
}

pub(super) fn timed_out(what: &str) -> Status {
    with_reason(
        Code::DeadlineExceeded,
        "TOO_SLOW",
        format!("{what} took too long"),
    )
}

pub(super) fn session_closed(why: String) -> Status {
    with_reason(Code::Aborted, "SESSION_CLOSED", why)
}

pub(super) fn too_large(message: String) -> Status {
    with_reason(Code::ResourceExhausted, "TOO_LARGE", message)
}

pub(super) fn from_runtime(e: RuntimeError) -> Status {
    let message = e.to_string();
    match e {
        RuntimeError::Busy => try_again(Code::ResourceExhausted, "BUSY", message),
        RuntimeError::Stopped => try_again(Code::Unavailable, "NOT_LEADING", message),
        RuntimeError::ReadOnly(_) => try_again(Code::Unavailable, "READ_ONLY", message),
        RuntimeError::Refused(
            Refusal::NoSuchRun(_) | Refusal::NoSuchWorker(_) | Refusal::NoSuchDeployment(_),
        ) => with_reason(Code::NotFound, "NOT_FOUND", message),
        RuntimeError::Refused(Refusal::Registry(refusal)) => from_registry(&refusal),
        RuntimeError::Refused(Refusal::Tokens(refusal)) => match refusal {
            TokenRefusal::Exists(_) => exists(message),
            TokenRefusal::NoSuchToken(_) | TokenRefusal::NoSuchCredential(_) => {
                with_reason(Code::NotFound, "NOT_FOUND", message)
            }
            TokenRefusal::TooMany { .. } => {
                with_reason(Code::ResourceExhausted, "TOO_MANY", message)
            }
        },
        RuntimeError::Refused(Refusal::WrongState { .. } | Refusal::WrongDeployment(_)) => {
            with_reason(Code::FailedPrecondition, "WRONG_STATE", message)
        }
        RuntimeError::Refused(Refusal::QueueFull { .. }) => {
            try_again(Code::ResourceExhausted, "QUEUE_FULL", message)
        }
        RuntimeError::Refused(Refusal::TooLarge(_) | Refusal::Invalid(_)) => {
            let mut details = ErrorDetails::new();
            details.add_bad_request_violation("pipeline_yaml", message.clone());
            details.set_error_info("INVALID_PIPELINE", DOMAIN, HashMap::new());
            Status::with_error_details(Code::InvalidArgument, message, details)
        }
    }
}

pub(super) fn from_registry(e: &RegistryRefusal) -> Status {
    let message = e.to_string();
    match e {
        RegistryRefusal::NoSuchModel(_) | RegistryRefusal::NoSuchVersion { .. } => {
            with_reason(Code::NotFound, "NOT_FOUND", message)
        }
        RegistryRefusal::AliasMoved { .. } => {
            with_reason(Code::FailedPrecondition, "ALIAS_MOVED", message)
        }
        RegistryRefusal::InService { .. } => {
            with_reason(Code::FailedPrecondition, "IN_SERVICE", message)
        }
        RegistryRefusal::Invalid { field, .. } => bad_field(field, message),
    }
}

pub(super) fn from_lookup(e: LookupError) -> Status {
    let message = e.to_string();
    match e {
        LookupError::NoSuchRun(_) => with_reason(Code::NotFound, "NOT_FOUND", message),
        LookupError::Ambiguous { .. } => bad_field("run", message),
        LookupError::Id(e) => bad_field("run", e.to_string()),
        LookupError::Runtime(e) => from_runtime(e),
        LookupError::Archive(e) => from_archive(&e),
    }
}

/// A run has ended, but its record is not stored yet.
pub(super) fn not_archived(run: &RunId) -> Status {
    try_again(
        Code::Unavailable,
        "NOT_ARCHIVED",
        format!("the record of run `{run}` is not stored yet: the object store may be failing"),
    )
}

pub(super) fn from_artifact(e: &ArtifactError) -> Status {
    let message = e.to_string();
    match e {
        ArtifactError::NotFound { .. } => with_reason(Code::NotFound, "NOT_FOUND", message),
        ArtifactError::Corrupted { .. } => with_reason(Code::DataLoss, "CORRUPTED", message),
        ArtifactError::TooLarge { .. } => {
            with_reason(Code::FailedPrecondition, "TOO_LARGE", message)
        }
        ArtifactError::Mismatch { .. } => bad_field("sha256", message),
        ArtifactError::Manifest { .. } => {
            with_reason(Code::FailedPrecondition, "NO_MANIFEST", message)
        }
        ArtifactError::DiskFull { .. } => {
            with_reason(Code::ResourceExhausted, "DISK_FULL", message)
        }
        _ => try_again(Code::Unavailable, "STORAGE", message),
    }
}

pub(super) fn from_archive(e: &ArchiveError) -> Status {
    match e {
        ArchiveError::Artifact(ArtifactError::NotFound { .. })
        | ArchiveError::Unreadable { .. }
        | ArchiveError::Unwritable(_) => with_reason(Code::DataLoss, "ARCHIVE", e.to_string()),
        ArchiveError::Artifact(e) => from_artifact(e),
    }
}

pub(super) fn from_collection(e: &CollectError) -> Status {
    match e {
        CollectError::Running => with_reason(Code::FailedPrecondition, "RUNNING", e.to_string()),
        CollectError::Runtime(e) => from_runtime(e.clone()),
        CollectError::Archive(e) => from_archive(e),
        CollectError::Artifact(e) => from_artifact(e),
        CollectError::Store { .. } => try_again(Code::Unavailable, "STORAGE", e.to_string()),
    }
}

pub(super) fn from_log(e: &AttemptLogError) -> Status {
    match e {
        AttemptLogError::Damaged { .. } => with_reason(Code::DataLoss, "CORRUPTED", e.to_string()),
        _ => try_again(Code::Unavailable, "STORAGE", e.to_string()),
    }
}

pub(super) fn from_watch(end: WatchEnd) -> Status {
    match end {
        WatchEnd::TooSlow => try_again(
            Code::ResourceExhausted,
            "WATCHER_TOO_SLOW",
            "this watcher did not keep up and was dropped; watch again for a new snapshot"
                .to_owned(),
        ),
        WatchEnd::Stopped => stopping(),
    }
}
