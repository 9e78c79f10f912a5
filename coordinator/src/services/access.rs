//! What each call needs, and the one place where it is asked for: a call that is not in the table is
//! refused. What changes something, and what was refused to somebody who is known, is noted.

use std::sync::{Arc, OnceLock};

use emberline_common::{
    access::{Role, Token},
    time::Timestamp,
    tls::Peer,
};
use http::{Response, header, request::Parts};
use tonic::{Code, Status, body::Body};

use super::{Context, status};
use crate::{
    access::{Caller, Denied, Known},
    audit::Entry,
};

/// The role that a call needs. `None`: there is no such call.
pub(super) fn needed(path: &str) -> Option<Role> {
    let call = path.strip_prefix("/emberline.v1.")?;
    Some(match call {
        "RunService/ValidatePipeline"
        | "RunService/PlanRun"
        | "RunService/GetRun"
        | "RunService/ListRuns"
        | "RunService/WatchRun"
        | "RunService/StreamLogs"
        | "ArtifactService/GetArtifact"
        | "ArtifactService/ReadBlob"
        | "ClusterService/GetClusterStatus"
        | "DeploymentService/ListDeployments"
        | "DeploymentService/GetDeployment"
        | "DeploymentService/WatchDeployment"
        | "DeploymentService/ListEnvironments"
        | "DoraService/GetMetrics"
        | "DoraService/ExplainDeployment"
        | "ModelService/ListModels"
        | "ModelService/GetModel"
        | "ModelService/GetModelVersion" => Role::Viewer,
        "RunService/SubmitRun"
        | "RunService/CancelRun"
        | "RunService/RetryRun"
        | "ArtifactService/PutBlob"
        | "DeploymentService/MarkDeploymentFailed"
        | "DeploymentService/RollBack"
        | "DeploymentService/ApproveDeployment"
        | "DoraService/TakeEvent"
        | "ModelService/SetAlias"
        | "ModelService/RemoveAlias"
        | "ModelService/AnnotateVersion"
        | "ModelService/ImportVersion" => Role::Operator,
        "ArtifactService/CollectGarbage"
        | "ClusterService/DrainWorker"
        | "ModelService/DeleteVersion"
        | "TokenService/CreateToken"
        | "TokenService/ListTokens"
        | "TokenService/RevokeToken" => Role::Admin,
        "WorkerService/Session" => Role::Worker,
        _ => return None,
    })
}

/// What a call is about, for the record; the handler says it.
#[derive(Debug, Clone, Default)]
pub(super) struct Subject(Arc<OnceLock<String>>);

impl Subject {
    /// Where it is said for this call.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get().cloned().unwrap_or_default()
    }

    /// It is the run, the model, … of that name.
    pub(super) fn is(&self, name: impl Into<String>) {
        // It is said once.
        let _ = self.0.set(super::translate::cut(name.into(), 256));
    }
}

/// Who calls. Every call has been asked.
pub(super) fn caller<T>(request: &tonic::Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::internal("a call that nobody has asked: please report this"))
}

/// What one call was let in as.
pub(super) struct Admitted {
    /// By what the caller must still be known while the answer goes on. A worker's session looks
    /// itself: what it rests on changes.
    pub(super) watched: Option<Known>,
    entry: Option<Entry>,
    subject: Subject,
}

/// Lets a call in or not.
///
/// # Errors
/// `UNAUTHENTICATED`, `PERMISSION_DENIED`, `UNIMPLEMENTED`.
pub(super) async fn admit(
    context: &Context,
    request: &mut Parts,
    needed: Option<Role>,
) -> Result<Admitted, Status> {
    let Some(needed) = needed else {
        return Err(Status::unimplemented("there is no such call"));
    };
    let now = Timestamp::now();
    let peer = request.extensions.get::<Peer>().cloned();
    let table = context.access.borrow().clone();
    let shown = Token::shown(&request.headers);
    request.headers.remove(header::AUTHORIZATION);
    let gate = &context.gate;
    let identified = gate
        .identify(&table, shown.as_ref(), peer.as_ref(), now)
        .await;
    let caller = match identified {
        Ok(caller) => caller,
        Err(denied) => {
            let from = peer.and_then(|peer| peer.address);
            context.refusals.tell(from, &"it has shown no valid token");
            return Err(status::denied(&denied));
        }
    };
    let call = request.uri.path().trim_start_matches("/emberline.v1.");
    let entry = entry(&caller, peer.as_ref(), call, now);
    if let Err(denied) = caller.may(needed) {
        return Err(refuse(context, entry, &denied).await);
    }
    let subject = Subject::default();
    let watched = (needed != Role::Worker).then(|| caller.by.clone());
    request.extensions.insert(caller);
    request.extensions.insert(subject.clone());
    Ok(Admitted {
        watched,
        // Bytes that nothing refers to yet change nothing.
        entry: (needed != Role::Viewer && entry.call != "ArtifactService/PutBlob").then_some(entry),
        subject,
    })
}

impl Admitted {
    /// What is to be noted of it, if it was to change something.
    pub(super) fn done(self, response: &Response<Body>) -> Option<Entry> {
        let mut entry = self.entry?;
        // An error of a handler stands in the headers.
        let status = Status::from_header_map(response.headers());
        if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
            entry.outcome = outcome(status.code());
            entry.why = Some(super::translate::cut(status.message().to_owned(), 512));
        } else if response.status().is_client_error() || response.status().is_server_error() {
            entry.outcome = "refused";
            entry.why = Some(response.status().to_string());
        }
        entry.on = self.subject.0.get().cloned();
        Some(entry)
    }
}

/// That somebody has called, and that it went well so far.
pub(super) fn entry(caller: &Caller, peer: Option<&Peer>, call: &str, at: Timestamp) -> Entry {
    Entry {
        at,
        who: caller.by.to_string(),
        certificate: caller.identity.as_ref().map(ToString::to_string),
        from: peer.and_then(|peer| peer.address).map(|at| at.to_string()),
        call: call.to_owned(),
        on: None,
        outcome: "ok",
        why: None,
    }
}

/// Notes that it was refused to somebody who is known, and gives the answer.
pub(super) async fn refuse(context: &Context, mut entry: Entry, denied: &Denied) -> Status {
    let status = status::denied(denied);
    entry.outcome = outcome(status.code());
    entry.why = Some(status.message().to_owned());
    note(context, &entry).await;
    status
}

/// Notes it, in the log and in the record.
pub(super) async fn note(context: &Context, entry: &Entry) {
    tracing::info!(
        target: "emberline::audit",
        who = entry.who, call = entry.call, on = entry.on, outcome = entry.outcome,
        "a change"
    );
    if let Some(audit) = context.gate.audit() {
        audit.note(entry).await;
    }
}

/// What a status is called in the record.
const fn outcome(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Unauthenticated => "unauthenticated",
        Code::PermissionDenied => "permission_denied",
        Code::InvalidArgument => "invalid_argument",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::FailedPrecondition => "failed_precondition",
        Code::ResourceExhausted => "resource_exhausted",
        Code::Unavailable => "unavailable",
        Code::Aborted => "aborted",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::Cancelled => "cancelled",
        Code::Unimplemented => "unimplemented",
        _ => "internal",
    }
}

impl Denied {
    /// The text for the caller.
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Unauthenticated => "a valid token is needed: give one by `--token-file`",
            Self::Forbidden(why) => why,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::services::role::LED;

    #[test]
    fn every_call_of_a_leader_needs_a_role_and_no_other_is_known() {
        let set = FileDescriptorSet::decode(emberline_proto::FILE_DESCRIPTOR_SET).unwrap();
        let mut calls = 0;
        for file in &set.file {
            for service in &file.service {
                let name = format!("{}.{}", file.package(), service.name());
                let led = LED.contains(&name.as_str());
                for method in &service.method {
                    let path = format!("/{name}/{}", method.name());
                    assert_eq!(needed(&path).is_some(), led, "{path}");
                    calls += usize::from(led);
                }
            }
        }
        assert!(calls >= 37, "{calls}");
        for unknown in [
            "",
            "/",
            "/emberline.v1.RunService/",
            "/emberline.v1.RunService/submitrun",
        ] {
            assert_eq!(needed(unknown), None);
        }
    }

    #[test]
    fn what_only_looks_needs_no_more_than_a_viewer() {
        let set = FileDescriptorSet::decode(emberline_proto::FILE_DESCRIPTOR_SET).unwrap();
        for file in set
            .file
            .iter()
            .filter(|file| file.package() == "emberline.v1")
        {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/emberline.v1.{}/{}", service.name(), method.name());
                    let looks = ["Get", "List", "Watch", "Read", "Explain", "Stream"];
                    let looks = looks.iter().any(|verb| method.name().starts_with(verb));
                    if let Some(needed) = needed(&path)
                        && service.name() != "TokenService"
                    {
                        let viewer = needed == Role::Viewer;
                        let checks = ["ValidatePipeline", "PlanRun"].contains(&method.name());
                        assert_eq!(viewer, looks || checks, "{path}");
                    }
                }
            }
        }
    }
}
