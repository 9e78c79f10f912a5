//! From records to events. Pure: the same record gives the same events, whoever makes them and how
//! often; so what is told as it happens and what is told once more from the archive agree.

use std::sync::Arc;

use emberline_common::{
    delivery::{Deployment, DeploymentKind, DeploymentOutcome, FailureCause},
    ids::{DeploymentId, Digest},
    run_view::{RunState, RunSummary, TaskState, TaskView},
    spec::kinds::BuiltinKind,
    time::Timestamp,
    trace::TraceId,
};
use serde_json::{Value, json};

use super::event::{Event, Kind, Said};
use crate::{
    engine::{Engine, api::ArchivedRun},
    traces::{
        Spans,
        spans::{result, resumed, run_result},
    },
};

/// The longest text of a failure, in bytes.
const MAX_ERROR_BYTES: usize = 1024;
/// The output of a `train` stage that is the model.
const MODEL: &str = "model";

/// What events are made with.
#[derive(Debug, Clone)]
pub(super) struct Events {
    /// Who tells: the events' `source`.
    pub(super) source: String,
    /// Says where a run can be looked at.
    pub(super) spans: Spans,
}

impl Events {
    /// How a run came into the state that it is in, but for its end.
    pub(super) fn run(&self, run: &RunSummary) -> Vec<Event> {
        let began = resumed(run);
        let of = self.of_run(run);
        let content = json!({ "pipelineName": run.pipeline.as_str(), "uri": self.spans.url(run) });
        let mut events = vec![of.event(Kind::RunQueued, began, content.clone())];
        if let Some(started) = run.started_at {
            // One that runs again had started before.
            events.push(of.event(Kind::RunStarted, started.max(began), content));
        }
        events
    }

    /// What an ended run was: everything since it was accepted, or retried.
    pub(super) fn ended(&self, archived: &ArchivedRun) -> Vec<Event> {
        let run = &archived.view.summary;
        let mut events = self.run(run);
        for task in &archived.view.tasks {
            events.extend(self.task(run, task));
        }
        let mut content = json!({
            "pipelineName": run.pipeline.as_str(),
            "uri": self.spans.url(run),
            "outcome": outcome(run_result(run)),
        });
        let failure = run.failure.as_ref();
        if let Some(failure) = failure.filter(|_| run.state != RunState::Succeeded) {
            content["errors"] = cut(&failure.message).into();
        }
        let ended = run.finished_at.unwrap_or_default();
        events.push(self.of_run(run).event(Kind::RunFinished, ended, content));
        events
    }

    /// The attempts of a task, as far as they belong to this turn of the run: each has begun, and
    /// all but one that is under way have ended.
    pub(super) fn task(&self, run: &RunSummary, task: &TaskView) -> Vec<Event> {
        let began = resumed(run);
        let mut events = Vec::new();
        for past in task.earlier.iter().filter(|p| p.started_at >= began) {
            let of = Attempt::of(self, run, task, past.attempt);
            events.push(of.started(past.started_at));
            let (how, why) = (result(past.reason), past.reason.as_str());
            events.push(of.finished(past.finished_at, how, Some(why)));
        }
        let last = task.earlier.last();
        let is_past = last.is_some_and(|past| past.attempt == task.attempt);
        let ran = !is_past && !matches!(task.state, TaskState::Cached | TaskState::Skipped);
        let Some(started) = task.started_at.filter(|at| ran && *at >= began) else {
            return events;
        };
        let of = Attempt::of(self, run, task, task.attempt);
        events.push(of.started(started));
        let Some(ended) = task.finished_at.filter(|_| task.state.is_final()) else {
            return events;
        };
        let how = match (&task.failure, task.state) {
            (_, TaskState::Succeeded) => "success",
            (_, TaskState::Cancelled) | (None, _) => "cancellation",
            (Some(failure), _) => result(failure.reason),
        };
        let why = task.failure.as_ref().filter(|_| how != "success");
        events.push(of.finished(ended, how, why.map(|why| why.message.as_str())));
        let trained = task.kind.as_str() == BuiltinKind::Train.as_str();
        if trained && task.state == TaskState::Succeeded {
            let models = task.outputs.iter().filter(|o| o.name.as_str() == MODEL);
            events.extend(models.map(|model| self.packaged(run, task, &model.manifest, ended)));
        }
        events
    }

    /// A model was trained.
    fn packaged(&self, run: &RunSummary, task: &TaskView, model: &Digest, at: Timestamp) -> Event {
        let change = match &run.change {
            Some(change) if change.repository.is_empty() => json!({ "id": change.revision }),
            Some(change) => json!({ "id": change.revision, "source": change.repository }),
            None => json!({ "id": run.revision.to_string() }),
        };
        let of = Subject {
            events: self,
            id: format!("pkg:generic/{}@sha256%3A{model}", run.pipeline),
            once: format!("{}/{}/{}", run.run, task.task, task.attempt),
            trace: run.trace().trace,
            more: json!({
                "pipeline": run.pipeline.as_str(),
                "run": run.run.as_str(),
                "artifact": format!("{}/{}/{MODEL}", run.run, task.task),
                "manifest": model.to_string(),
            }),
        };
        of.event(Kind::ArtifactPackaged, at, json!({ "change": change }))
    }

    /// What became of a deployment.
    pub(super) fn deployment(&self, told: &Delivered) -> Vec<Event> {
        let deployment = told.deployment.as_ref();
        let environment = json!({ "id": deployment.environment.as_str() });
        let service = format!("{}/{}", deployment.environment, deployment.model);
        let mut artifact = format!("pkg:generic/{}@{}", deployment.model, deployment.version);
        let mut more = json!({
            "deployment": deployment.id.to_string(),
            "pipeline": deployment.pipeline.as_str(),
            "run": deployment.run.as_str(),
            "model": deployment.model.as_str(),
            "version": deployment.version,
        });
        if let Some(manifest) = told.manifest {
            artifact += &format!("?checksum=sha256:{manifest}");
            more["manifest"] = manifest.to_string().into();
        }
        let of = |id: &str| Subject {
            events: self,
            id: id.to_owned(),
            // A run's id is nobody else's; a deployment's number alone is only its cluster's own.
            once: format!("{}/{}", deployment.run, deployment.id),
            trace: deployment.trace,
            more: more.clone(),
        };
        let mut events = Vec::new();
        let live = deployment.finished_at;
        let live = live.filter(|_| deployment.outcome == DeploymentOutcome::Live);
        if let Some(at) = live {
            let kind = match (deployment.kind, deployment.previous) {
                (DeploymentKind::Rollback, _) => Kind::ServiceRolledBack,
                (DeploymentKind::Release, Some(_)) => Kind::ServiceUpgraded,
                (DeploymentKind::Release, None) => Kind::ServiceDeployed,
            };
            if deployment.kind == DeploymentKind::Release {
                events.push(of(&artifact).event(Kind::ArtifactPublished, at, json!({})));
            }
            let content = json!({ "environment": environment, "artifactId": artifact });
            events.push(of(&service).event(kind, at, content));
        }
        let incident = |description: String| {
            json!({
                "description": description,
                "environment": environment,
                "service": { "id": service },
                "artifactId": artifact,
            })
        };
        if let (Some(at), Some(bad)) = (live, told.ends_incident_of) {
            let text = format!("`{}` {} is live", deployment.model, deployment.version);
            let of = of(&incident_id(bad));
            events.push(of.event(Kind::IncidentResolved, at, incident(text)));
        }
        let Some(failure) = &deployment.failure else {
            return events;
        };
        let text = match failure.why.as_str() {
            "" => format!(
                "`{}` {} failed: {}",
                deployment.model, deployment.version, failure.cause
            ),
            why => why.to_owned(),
        };
        let content = incident(text);
        let mut of = of(&incident_id(deployment.id));
        of.more["cause"] = failure.cause.as_str().into();
        // What others call it may be known only later, and must not change what was told.
        if failure.cause == FailureCause::Incident {
            of.more["incident"] = failure.incident.as_str().into();
        }
        events.push(of.event(Kind::IncidentDetected, failure.began_at, content.clone()));
        let ticket = [&failure.incident, &failure.why];
        if let Some(ticket) = ticket.into_iter().find_map(|text| url_in(text)) {
            let mut content = content.clone();
            content["ticketURI"] = ticket.into();
            events.push(of.event(Kind::IncidentReported, failure.noted_at, content));
        }
        if let Some(at) = failure.resolved_at {
            events.push(of.event(Kind::IncidentResolved, at, content));
        }
        events
    }

    fn of_run<'a>(&'a self, run: &RunSummary) -> Subject<'a> {
        Subject {
            events: self,
            id: run.run.to_string(),
            once: resumed(run).0.to_string(),
            trace: run.trace().trace,
            more: json!({ "trigger": run.trigger, "traceId": run.trace().trace.to_string() }),
        }
    }
}

/// A deployment, and what there is to know of it elsewhere.
#[derive(Debug, Clone)]
pub(super) struct Delivered {
    pub(super) deployment: Arc<Deployment>,
    /// Of the model version.
    pub(super) manifest: Option<Digest>,
    /// The failed deployment whose incident is over since this one is live.
    pub(super) ends_incident_of: Option<DeploymentId>,
}

impl Delivered {
    /// Looks up what is known of it.
    pub(super) fn of(engine: &Engine, deployment: &Arc<Deployment>) -> Self {
        let model = engine.model_version(&deployment.model, deployment.version);
        // An incident ends once: not again with a second repair, nor after others said that it is over.
        let ends = deployment.repairs.filter(|bad| {
            let over = engine
                .deployment(*bad)
                .and_then(|d| d.failure.as_ref()?.resolved_at);
            let over = over.is_some_and(|over| Some(over) <= deployment.finished_at);
            let mut before = engine.deployments().filter(|d| d.id < deployment.id);
            !over
                && !before.any(|d| d.repairs == Some(*bad) && d.outcome == DeploymentOutcome::Live)
        });
        Self {
            deployment: Arc::clone(deployment),
            manifest: model.map(|model| model.registration.artifact.manifest),
            ends_incident_of: ends,
        }
    }
}

/// What several events are about.
struct Subject<'a> {
    events: &'a Events,
    id: String,
    once: String,
    trace: TraceId,
    more: Value,
}

impl Subject<'_> {
    fn event(&self, kind: Kind, at: Timestamp, content: Value) -> Event {
        let said = Said {
            kind,
            source: &self.events.source,
            subject: self.id.clone(),
            once: self.once.clone(),
            at,
            trace: self.trace,
            content,
            more: self.more.clone(),
        };
        said.into()
    }
}

/// One attempt of a task.
struct Attempt<'a> {
    subject: Subject<'a>,
    /// What both of its events say.
    content: Value,
}

impl<'a> Attempt<'a> {
    fn of(events: &'a Events, run: &RunSummary, task: &TaskView, attempt: u32) -> Self {
        let uri = format!("{}/tasks/{}/{attempt}", events.spans.url(run), task.task);
        Self {
            subject: Subject {
                events,
                id: format!("{}/{}/{attempt}", run.run, task.task),
                once: String::new(),
                trace: run.trace().trace,
                more: json!({ "kind": task.kind.as_str(), "attempt": attempt }),
            },
            content: json!({
                "taskName": task.task.as_str(),
                "uri": uri,
                "pipelineRun": { "id": run.run.as_str(), "source": events.source },
            }),
        }
    }

    fn started(&self, at: Timestamp) -> Event {
        let content = self.content.clone();
        self.subject.event(Kind::TaskStarted, at, content)
    }

    fn finished(&self, at: Timestamp, how: &str, error: Option<&str>) -> Event {
        let mut content = self.content.clone();
        content["outcome"] = outcome(how).into();
        if let Some(error) = error {
            content["errors"] = cut(error).into();
        }
        self.subject.event(Kind::TaskFinished, at, content)
    }
}

/// The incident that a failed deployment is.
fn incident_id(deployment: DeploymentId) -> String {
    format!("incident/{deployment}")
}

/// What CDEvents calls an end, of what the conventions for traces call it.
fn outcome(result: &str) -> &'static str {
    match result {
        "success" => "success",
        "cancellation" => "cancel",
        "error" => "error",
        // Of the stage itself, its time limit included.
        _ => "failure",
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_ERROR_BYTES)]
}

/// The first web address in a text: where a ticket is.
fn url_in(text: &str) -> Option<&str> {
    let mut words = text.split(|c: char| c.is_whitespace() || "<>\"'()[]`,;".contains(c));
    words.find(|word| {
        let rest = word
            .strip_prefix("https://")
            .or(word.strip_prefix("http://"));
        rest.is_some_and(|rest| !rest.is_empty()) && word.is_ascii()
    })
}
