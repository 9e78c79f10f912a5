//! From a submitted text to a command: checked, and everything large stored before it.

use std::collections::HashMap;

use emberline_common::{
    artifact::check_path,
    delivery::{Change, ChangeKind},
    ids::{Digest, RunId},
    spec::{CheckedPipeline, Diagnostic, parse_pipeline},
    time::Timestamp,
    trace::TraceContext,
    wire,
};
use emberline_proto::v1::{self, SubmitRunRequest};
use serde_json::{Map, Value};
use tonic::Status;

use super::{Context, status, translate};
use crate::{
    engine::{
        api::{StageFile, Submission},
        records::MAX_REQUEST_ID_BYTES,
        spec_blob,
    },
    holds::Hold,
};

const MAX_YAML_BYTES: usize = 1 << 20;
const MAX_FILES: usize = 1000;
const MAX_PATH_BYTES: usize = 1024;
const TRIGGERS: [&str; 4] = ["manual", "schedule", "data", "commit"];

/// Values of parameters, each a JSON value.
pub(super) fn params(texts: HashMap<String, String>) -> Result<Map<String, Value>, Status> {
    texts
        .into_iter()
        .map(|(name, text)| {
            let field = format!("params.{}", translate::cut(name.clone(), 80));
            if text.is_empty() {
                return Err(status::bad_field(&field, "it is empty: write a JSON value"));
            }
            let value = wire::json(&field, &text).map_err(translate::bad)?;
            Ok((name, value))
        })
        .collect()
}

/// Checks a pipeline's text off the async threads: it may be large.
pub(super) async fn check(
    file_name: String,
    text: String,
    params: Map<String, Value>,
) -> Result<Result<CheckedPipeline, Vec<Diagnostic>>, Status> {
    if text.len() > MAX_YAML_BYTES {
        return Err(status::bad_field(
            "pipeline_yaml",
            format!(
                "it has {} bytes, at most {MAX_YAML_BYTES} are taken",
                text.len()
            ),
        ));
    }
    let file_name = if file_name.is_empty() {
        "pipeline.yaml".to_owned()
    } else {
        translate::cut(file_name, MAX_PATH_BYTES)
    };
    tokio::task::spawn_blocking(move || parse_pipeline(&file_name, &text, &params))
        .await
        .map_err(|_| Status::internal("checking the pipeline failed: please report this"))
}

/// A diagnostic for the wire.
pub(super) fn diagnostic(diagnostic: Diagnostic) -> v1::Diagnostic {
    v1::Diagnostic {
        file: diagnostic.file,
        line: diagnostic.line,
        column: diagnostic.column,
        field: diagnostic.field,
        message: diagnostic.message,
        suggestion: diagnostic.suggestion.unwrap_or_default(),
    }
}

/// Checks everything about a submission.
pub(super) async fn submission(
    request: SubmitRunRequest,
    run: RunId,
    now: Timestamp,
) -> Result<(Submission, String), Status> {
    if request.request_id.len() > MAX_REQUEST_ID_BYTES
        || request.request_id.chars().any(char::is_control)
    {
        return Err(status::bad_field(
            "request_id",
            format!("use at most {MAX_REQUEST_ID_BYTES} bytes and no control characters"),
        ));
    }
    if !request.base_dir.is_empty() && !std::path::Path::new(&request.base_dir).is_absolute() {
        return Err(status::bad_field("base_dir", "it is no absolute directory"));
    }
    if request.base_dir.len() > MAX_PATH_BYTES * 4 || request.base_dir.contains('\0') {
        return Err(status::bad_field(
            "base_dir",
            "it is too long, or has a NUL",
        ));
    }
    let trigger = match request.trigger.as_str() {
        "" => "manual".to_owned(),
        known if TRIGGERS.contains(&known) => known.to_owned(),
        _ => {
            return Err(status::bad_field(
                "trigger",
                format!("use one of {}", TRIGGERS.join(", ")),
            ));
        }
    };
    let traceparent = request.traceparent;
    if !traceparent.is_empty() {
        traceparent
            .parse::<TraceContext>()
            .map_err(|why| status::bad_field("traceparent", why))?;
    }
    let given = request.change.map(wire::change).transpose();
    let given = given.map_err(translate::bad)?;
    let repairs = wire::optional_id("repairs", &request.repairs).map_err(translate::bad)?;
    if let Some(priority) = request.priority
        && !(-1000..=1000).contains(&priority)
    {
        return Err(status::bad_field("priority", "use -1000 to 1000"));
    }
    let files = files(request.files)?;
    let params = params(request.params)?;
    let text = request.pipeline_yaml;
    let checked = check(request.file_name, text.clone(), params)
        .await?
        .map_err(|diagnostics| status::bad_pipeline(&diagnostics))?;
    let change = match given {
        Some(change) if change.kind == ChangeKind::Code => change,
        // The pipeline itself is the change.
        given => Change {
            kind: ChangeKind::Pipeline,
            repository: String::new(),
            branch: String::new(),
            revision: checked.revision.to_string(),
            id: String::new(),
            committed_at: given.map_or(now, |change| change.committed_at.min(now)),
            authored_at: None,
            pushed_at: None,
            dirty: false,
            commits: Vec::new(),
            left_out: 0,
        },
    };
    let submission = Submission {
        run,
        request_id: (!request.request_id.is_empty()).then_some(request.request_id),
        spec: checked.spec.into(),
        revision: checked.revision,
        params: checked.params,
        base_dir: request.base_dir,
        priority: request.priority,
        no_cache: request.no_cache,
        files,
        trigger,
        traceparent,
        change: Some(change),
        repairs,
    };
    Ok((submission, text))
}

fn files(files: Vec<v1::SubmittedFile>) -> Result<Vec<StageFile>, Status> {
    if files.len() > MAX_FILES {
        return Err(status::bad_field(
            "files",
            format!("{} files, at most {MAX_FILES} are taken", files.len()),
        ));
    }
    let mut out: Vec<StageFile> = Vec::with_capacity(files.len());
    for file in files {
        check_path(&file.path).map_err(|why| status::bad_field("files.path", why))?;
        if out.iter().any(|other| other.path == file.path) {
            return Err(status::bad_field(
                "files.path",
                format!("`{}` stands twice", file.path),
            ));
        }
        out.push(StageFile {
            sha256: wire::id("files.sha256", &file.sha256).map_err(translate::bad)?,
            path: file.path,
            bytes: file.bytes,
            executable: file.executable,
        });
    }
    Ok(out)
}

/// Stores what the command will refer to, and holds it until the returned hold is dropped.
pub(super) async fn store(
    context: &Context,
    submission: &Submission,
    text: String,
) -> Result<Hold, Status> {
    let spec = spec_blob(&submission.spec);
    let mut digests = vec![Digest::of(&spec), submission.revision];
    digests.extend(submission.files.iter().map(|f| f.sha256));
    let hold = context.holds.hold(digests).await;
    for file in &submission.files {
        let there = context.artifacts.has(&file.sha256, file.bytes).await;
        if !there.map_err(|e| status::from_artifact(&e))? {
            return Err(status::failed_precondition(
                "FILE_NOT_STORED",
                format!(
                    "the file `{}` ({} bytes, SHA-256 {}) is not stored: send it with PutBlob first",
                    file.path, file.bytes, file.sha256
                ),
            ));
        }
    }
    for blob in [spec, text.into_bytes()] {
        let stored = context.artifacts.put_bytes(blob.into()).await;
        stored.map_err(|e| status::from_artifact(&e))?;
    }
    Ok(hold)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_leave_the_directory_are_refused() {
        let long = "n".repeat(10_000);
        for bad in [
            "/etc/passwd",
            "../x",
            "a/../../b",
            "",
            "a//b",
            "a\0b",
            "a\\..\\b",
            "a\nb",
            &long,
        ] {
            let file = v1::SubmittedFile {
                path: bad.to_owned(),
                sha256: Digest::of(b"").to_string(),
                bytes: 0,
                executable: false,
            };
            assert!(files(vec![file]).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_parameter_that_is_no_json_is_named() {
        let params = params(HashMap::from([("lr".to_owned(), "0.1x".to_owned())]));
        assert!(params.is_err_and(|s| s.message().contains("params.lr")));
    }
}
