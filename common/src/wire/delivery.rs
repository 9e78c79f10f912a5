//! Changes and deployments at the wire.

use emberline_proto::v1 as pb;

use super::{WireError, required, states, time};
use crate::{
    delivery::{
        Change, ChangeKind, Commit, DataChange, Deployment, DeploymentFailure, DeploymentKind,
        DeploymentOutcome, FailureCause, MAX_CHANGE_TEXT_BYTES, MAX_COMMITS, Rollout, RolloutPhase,
    },
    ids::DeploymentId,
    spec::kinds::deploy::Strategy,
};

states!(ChangeKind, pb::ChangeKind, "kind", Code, Pipeline);
states!(
    DeploymentKind,
    pb::DeploymentKind,
    "kind",
    Release,
    Rollback
);
states!(
    DeploymentOutcome,
    pb::DeploymentOutcome,
    "outcome",
    InProgress,
    Live,
    CaughtBeforeExposure,
    Aborted,
    Superseded
);
states!(
    FailureCause,
    pb::FailureCause,
    "cause",
    Rollback,
    CanaryAborted,
    GateBreach,
    Marked,
    Incident
);

impl From<&Change> for pb::Change {
    fn from(change: &Change) -> Self {
        Self {
            kind: change.kind.into(),
            repository: change.repository.clone(),
            branch: change.branch.clone(),
            revision: change.revision.clone(),
            id: change.id.clone(),
            committed_at: Some(change.committed_at.into()),
            authored_at: change.authored_at.map(Into::into),
            pushed_at: change.pushed_at.map(Into::into),
            dirty: change.dirty,
            commits: change.commits.iter().map(Into::into).collect(),
            left_out: change.left_out,
        }
    }
}

impl From<&Commit> for pb::Commit {
    fn from(commit: &Commit) -> Self {
        Self {
            revision: commit.revision.clone(),
            committed_at: Some(commit.committed_at.into()),
            pushed_at: commit.pushed_at.map(Into::into),
        }
    }
}

/// A change, checked.
///
/// # Errors
/// The first field that is wrong.
pub fn change(message: pb::Change) -> Result<Change, WireError> {
    let text = |field: &str, text: String| {
        if text.len() > MAX_CHANGE_TEXT_BYTES || text.chars().any(char::is_control) {
            return Err(WireError::new(
                format!("change.{field}"),
                format!("use at most {MAX_CHANGE_TEXT_BYTES} bytes and no control characters"),
            ));
        }
        Ok(text)
    };
    let kind = match message.kind {
        0 => ChangeKind::Code,
        kind => kind.try_into()?,
    };
    if message.commits.len() > MAX_COMMITS {
        return Err(WireError::new(
            "change.commits",
            format!(
                "{} commits, at most {MAX_COMMITS} are taken",
                message.commits.len()
            ),
        ));
    }
    let mut commits = Vec::with_capacity(message.commits.len());
    for commit in message.commits {
        commits.push(Commit {
            revision: revision("change.commits.revision", commit.revision)?,
            committed_at: required(
                "change.commits.committed_at",
                time("change.commits.committed_at", commit.committed_at)?,
            )?,
            pushed_at: time("change.commits.pushed_at", commit.pushed_at)?,
        });
    }
    Ok(Change {
        kind,
        repository: text("repository", without_credentials(message.repository))?,
        branch: text("branch", message.branch)?,
        revision: revision("change.revision", message.revision)?,
        id: text("id", message.id)?,
        committed_at: required(
            "change.committed_at",
            time("change.committed_at", message.committed_at)?,
        )?,
        authored_at: time("change.authored_at", message.authored_at)?,
        pushed_at: time("change.pushed_at", message.pushed_at)?,
        dirty: message.dirty,
        commits,
        left_out: message.left_out,
    })
}

/// A revision as any version control system writes it.
fn revision(field: &str, text: String) -> Result<String, WireError> {
    let plain = text.bytes().all(|b| b.is_ascii_graphic());
    if text.is_empty() || text.len() > 64 || !plain {
        return Err(WireError::new(
            field,
            "use 1 to 64 letters, digits and signs, without blanks",
        ));
    }
    Ok(text)
}

/// A repository's address without the user and the password in it. It is kept, shown and exported.
#[must_use]
pub fn without_credentials(repository: String) -> String {
    let Ok(mut url) = url::Url::parse(&repository) else {
        return repository;
    };
    // `git@host` is how everybody writes ssh, and is no secret.
    let ssh = url.scheme() == "ssh" && url.password().is_none();
    if ssh || (url.username().is_empty() && url.password().is_none()) {
        return repository;
    }
    let cleared = url.set_username("").is_ok() && url.set_password(None).is_ok();
    if cleared {
        url.to_string()
    } else {
        String::new()
    }
}

impl From<&DeploymentFailure> for pb::DeploymentFailure {
    fn from(failure: &DeploymentFailure) -> Self {
        Self {
            cause: failure.cause.into(),
            began_at: Some(failure.began_at.into()),
            noted_at: Some(failure.noted_at.into()),
            why: failure.why.clone(),
            incident: failure.incident.clone(),
            resolved_at: failure.resolved_at.map(Into::into),
        }
    }
}

impl From<&DataChange> for pb::DataChange {
    fn from(data: &DataChange) -> Self {
        Self {
            task: data.task.to_string(),
            revision: data.revision.to_string(),
            arrived_at: Some(data.arrived_at.into()),
        }
    }
}

fn shown(deployment: Option<DeploymentId>) -> String {
    deployment.map(|id| id.to_string()).unwrap_or_default()
}

impl From<&Deployment> for pb::DeploymentView {
    fn from(deployment: &Deployment) -> Self {
        Self {
            deployment: deployment.id.to_string(),
            kind: deployment.kind.into(),
            environment: deployment.environment.to_string(),
            pipeline: deployment.pipeline.to_string(),
            model: deployment.model.to_string(),
            version: deployment.version,
            run: deployment.run.to_string(),
            task: deployment.task.to_string(),
            repairs: shown(deployment.repairs),
            previous: shown(deployment.previous),
            outcome: deployment.outcome.into(),
            accepted_at: Some(deployment.accepted_at.into()),
            started_at: Some(deployment.started_at.into()),
            finished_at: deployment.finished_at.map(Into::into),
            failure: deployment.failure.as_ref().map(Into::into),
            change: deployment.change.as_ref().map(Into::into),
            data: deployment.data.iter().map(Into::into).collect(),
            trace_id: deployment.trace.to_string(),
            live: false,
            rollout: deployment.rollout.as_ref().map(Into::into),
            serving: None,
        }
    }
}

impl From<&Rollout> for pb::RolloutView {
    fn from(rollout: &Rollout) -> Self {
        let (step, steps) = match (rollout.phase, &rollout.strategy) {
            (RolloutPhase::Step { step }, Strategy::Canary { steps, .. }) => {
                (step + 1, steps.len())
            }
            (_, Strategy::Canary { steps, .. }) => (0, steps.len()),
            _ => (0, 0),
        };
        Self {
            strategy: rollout.strategy.as_str().to_owned(),
            strategy_json: serde_json::to_string(&rollout.strategy).unwrap_or_default(),
            replicas: rollout.replicas,
            phase: rollout.phase.as_str().to_owned(),
            step,
            steps: u32::try_from(steps).unwrap_or(u32::MAX),
            traffic: Some(rollout.traffic().into()),
            since: Some(rollout.since.into()),
            exposed_at: rollout.exposed_at.map(Into::into),
            approved: rollout.approved,
            note: rollout.note.clone(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::time::Timestamp;

    fn a_change() -> Change {
        Change {
            kind: ChangeKind::Code,
            repository: "https://example.org/models.git".into(),
            branch: "main".into(),
            revision: "4f2a".repeat(10),
            id: "17".into(),
            committed_at: Timestamp(5),
            authored_at: Some(Timestamp(4)),
            pushed_at: Some(Timestamp(6)),
            dirty: true,
            commits: vec![Commit {
                revision: "4f2a".repeat(10),
                committed_at: Timestamp(5),
                pushed_at: Some(Timestamp(6)),
            }],
            left_out: 3,
        }
    }

    #[test]
    fn a_change_comes_back_as_it_was_sent() {
        let sent = a_change();
        assert_eq!(change(pb::Change::from(&sent)).unwrap(), sent);
    }

    #[test]
    fn credentials_are_taken_out_of_a_repository() {
        for (given, kept) in [
            (
                "https://me:secret@example.org/a.git",
                "https://example.org/a.git",
            ),
            (
                "https://token@example.org/a.git",
                "https://example.org/a.git",
            ),
            ("ssh://git@example.org/a.git", "ssh://git@example.org/a.git"),
            ("git@example.org:a.git", "git@example.org:a.git"),
            ("https://example.org/a.git", "https://example.org/a.git"),
        ] {
            assert_eq!(without_credentials(given.to_owned()), kept);
        }
    }

    #[test]
    fn what_no_revision_can_be_is_refused() {
        for bad in ["", "a b", "a\nb", &"a".repeat(65)] {
            let message = pb::Change {
                revision: bad.to_owned(),
                ..pb::Change::from(&a_change())
            };
            assert!(change(message).is_err(), "{bad:?} was taken");
        }
    }
}
