//! Between the wire and the engine's own types, where `common` has no word for them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use emberline_common::{
    delivery::Deployment,
    dora::Delivery,
    failure::{Failure, Reason},
    ids::{AttemptId, Digest, StageKind},
    run_view::{AttemptTiming, MAX_RESULTS_BYTES, Origin, Results, RunView},
    spec::kinds::BuiltinKind,
    wire,
};
use emberline_proto::v1;
use tonic::Status;

use super::status;
use crate::engine::api::{
    Assignment, AttemptFailure, AttemptReport, AttemptSuccess, StageFile, VersionView,
};

pub(super) fn bad(e: wire::WireError) -> Status {
    status::bad_wire(&e)
}

/// Cuts a text to that many bytes, at a character's edge.
pub(super) fn cut(mut text: String, bytes: usize) -> String {
    text.truncate(text.floor_char_boundary(bytes));
    text
}

pub(super) fn attempts(ids: Vec<v1::AttemptId>) -> Result<Vec<AttemptId>, Status> {
    ids.into_iter()
        .map(|id| AttemptId::try_from(id).map_err(bad))
        .collect()
}

pub(super) fn digests(field: &str, texts: &[String]) -> Result<Vec<Digest>, Status> {
    texts
        .iter()
        .map(|text| wire::id(field, text).map_err(bad))
        .collect()
}

pub(super) fn kinds(kinds: HashMap<String, u32>) -> Result<BTreeMap<StageKind, u32>, Status> {
    kinds
        .into_iter()
        .map(|(kind, version)| Ok((wire::id("kinds", &kind).map_err(bad)?, version)))
        .collect()
}

pub(super) fn reports(reports: Vec<v1::AttemptReport>) -> Result<Vec<AttemptReport>, Status> {
    reports.into_iter().map(report).collect()
}

fn report(report: v1::AttemptReport) -> Result<AttemptReport, Status> {
    let id = wire::required("id", report.id).map_err(bad)?;
    let id = AttemptId::try_from(id).map_err(bad)?;
    let failure = report.failure.map(Failure::try_from).transpose();
    let mut failure = failure.map_err(bad)?;
    let results = wire::json_object("results_json", &report.results_json).map_err(bad)?;
    let too_large = report.results_json.len() > MAX_RESULTS_BYTES;
    if too_large && failure.is_none() {
        failure = Some(Failure::new(
            Reason::UserError,
            format!(
                "the stage's results have {} bytes as JSON, at most {MAX_RESULTS_BYTES} can be kept: return fewer or put them into an artifact",
                report.results_json.len()
            ),
        ));
    }
    let outputs = wire::outputs("outputs", report.outputs).map_err(bad)?;
    let registration = report.registration.map(TryInto::try_into).transpose();
    let registration = registration.map_err(bad)?;
    let bad_manifest = wire::optional_id("bad_manifest", &report.bad_manifest).map_err(bad)?;
    let timing = AttemptTiming {
        fetch_micros: report.fetch_micros,
        stage_micros: report.stage_micros,
        store_micros: report.store_micros,
    };
    let outcome = match failure {
        Some(failure) => Err(AttemptFailure {
            failure,
            bad_manifest,
            outputs,
            results: if too_large { Results::new() } else { results },
        }),
        None => Ok(AttemptSuccess {
            outputs,
            results,
            registration,
        }),
    };
    Ok(AttemptReport {
        id,
        outcome,
        timing,
    })
}

/// What an attempt is handed. `tell` says what its page tells of delivery, if it writes one.
pub(super) fn assignment(
    assignment: Assignment,
    tell: impl FnOnce(&RunView, &[Arc<Deployment>]) -> Delivery,
) -> Result<v1::Assignment, Status> {
    let json = |what: &str, e: serde_json::Error| {
        Status::internal(format!("the {what} of an assignment has no JSON: {e}"))
    };
    let spec_json = if assignment.spec.is_null() {
        String::new()
    } else {
        serde_json::to_string(&assignment.spec).map_err(|e| json("spec", e))?
    };
    let run_json = match &assignment.run_view {
        Some(view) => serde_json::to_string(view).map_err(|e| json("run", e))?,
        None => String::new(),
    };
    let delivery_json = match &assignment.run_view {
        Some(view) if assignment.kind.as_str() == BuiltinKind::Report.as_str() => {
            let delivery = tell(view, &assignment.deployments);
            serde_json::to_string(&delivery).map_err(|e| json("delivery", e))?
        }
        _ => String::new(),
    };
    let timeout_ms = assignment.timeout.map_or(0, |t| {
        // 0 means no limit, so the shortest limit is 1.
        u64::try_from(t.as_millis()).unwrap_or(u64::MAX).max(1)
    });
    Ok(v1::Assignment {
        id: Some((&assignment.id).into()),
        epoch: assignment.epoch.0,
        kind: assignment.kind.to_string(),
        spec_json,
        inputs: assignment
            .inputs
            .iter()
            .map(|input| v1::InputArtifact {
                name: input.name.to_string(),
                artifact: Some((&input.artifact).into()),
                producer: input.producer.to_string(),
            })
            .collect(),
        resources: Some(assignment.resources.into()),
        timeout_ms,
        base_dir: assignment.base_dir,
        files: assignment.files.iter().map(stage_file).collect(),
        pipeline: assignment.pipeline.to_string(),
        run_json,
        delivery_json,
        traceparent: assignment.traceparent,
        outputs: assignment
            .outputs
            .iter()
            .map(|(name, kind)| (name.to_string(), kind.as_str().to_owned()))
            .collect(),
    })
}

/// A version of a model, with what refers to it.
pub(super) fn model_version(view: &VersionView) -> v1::ModelVersionView {
    let VersionView { version, .. } = view;
    let registration = &version.registration;
    let made_by = version.origin.made_by();
    let imported = match &version.origin {
        Origin::Run(_) => None,
        Origin::Bundle { imported } => Some(v1::ImportedFrom {
            model: imported.model.to_string(),
            version: imported.version,
            created_at: Some(imported.created_at.into()),
        }),
    };
    let text = |text: Option<String>| text.unwrap_or_default();
    v1::ModelVersionView {
        model: registration.model.to_string(),
        version: version.version,
        artifact: Some((&registration.artifact).into()),
        metrics_json: wire::object_text(&registration.metrics),
        schema_json: if registration.schema.is_null() {
            String::new()
        } else {
            registration.schema.to_string()
        },
        run: text(made_by.map(|by| by.run.to_string())),
        task: text(made_by.map(|by| by.task.to_string())),
        pipeline: text(made_by.map(|by| by.pipeline.to_string())),
        pipeline_revision: text(made_by.map(|by| by.pipeline_revision.to_string())),
        lineage: version
            .lineage
            .iter()
            .map(|(name, digest)| (name.clone(), digest.to_string()))
            .collect(),
        notes: registration.notes.clone(),
        created_at: Some(version.created_at.into()),
        code: version.code.as_ref().map(|code| v1::CodeRevision {
            repository: code.repository.clone(),
            revision: code.revision.clone(),
            dirty: code.dirty,
        }),
        parent: version.parent.unwrap_or(0),
        tags: version.tags.clone().into_iter().collect(),
        imported,
        aliases: view.aliases.iter().map(ToString::to_string).collect(),
        live_in: view.live_in.iter().map(ToString::to_string).collect(),
    }
}

fn stage_file(file: &StageFile) -> v1::SubmittedStageFile {
    v1::SubmittedStageFile {
        path: file.path.clone(),
        sha256: file.sha256.to_string(),
        bytes: file.bytes,
        executable: file.executable,
    }
}

/// A run with its tasks.
pub(super) fn run(view: &RunView, pipeline_yaml: String) -> v1::GetRunResponse {
    v1::GetRunResponse {
        summary: Some((&view.summary).into()),
        tasks: view.tasks.iter().map(Into::into).collect(),
        pipeline_yaml,
    }
}

/// Runs in pages: how many, at most 1,000 and 50 if nothing is said.
pub(super) fn page_size(asked: u32) -> usize {
    match asked {
        0 => 50,
        n => usize::try_from(n.min(1000)).unwrap_or(1000),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn id() -> v1::AttemptId {
        v1::AttemptId {
            run: "r".to_owned(),
            task: "a".to_owned(),
            attempt: 1,
        }
    }

    #[test]
    fn a_report_without_an_id_is_refused_with_the_field_at_fault() {
        let status = report(v1::AttemptReport::default()).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().contains("id"), "{}", status.message());
    }

    #[test]
    fn results_that_do_not_fit_fail_the_attempt_and_not_the_session() {
        let text = "x".repeat(MAX_RESULTS_BYTES);
        let report = report(v1::AttemptReport {
            id: Some(id()),
            results_json: format!("{{\"text\":\"{text}\"}}"),
            ..Default::default()
        })
        .unwrap();
        let failure = report.outcome.unwrap_err().failure;
        assert_eq!(failure.reason, Reason::UserError);
    }

    #[test]
    fn a_text_is_cut_at_a_characters_edge() {
        assert_eq!(cut("aä".to_owned(), 2), "a");
        assert_eq!(cut("aä".to_owned(), 3), "aä");
    }
}
