//! From a pipeline file to a submission: read, check, and send the files that travel with it.

use std::path::Path;

use emberline_common::spec::{CheckedPipeline, exec_files, parse_pipeline, yaml};
use emberline_proto::v1::{SubmitRunRequest, SubmittedFile};
use serde_json::{Map, Value};

use crate::{args::SubmitArguments, client::Cluster, exit::Exit, upload};

/// A pipeline file that was read and has no mistake.
pub struct Pipeline {
    /// Its text.
    pub text: String,
    /// What the text means.
    pub checked: CheckedPipeline,
    /// The values that the command line sets.
    pub params: Map<String, Value>,
}

/// Reads and checks a pipeline file.
///
/// # Errors
/// An [`Exit`] with one line for each mistake.
pub fn read(file: &Path, params: &[String]) -> anyhow::Result<Pipeline> {
    let shown = file.display().to_string();
    let size = std::fs::metadata(file)
        .map_err(|e| Exit::input(format!("cannot read the pipeline file `{shown}`: {e}")))?;
    if size.is_dir() {
        return Err(Exit::input(format!(
            "`{shown}` is a directory: name the pipeline file in it"
        ))
        .into());
    }
    if !size.is_file() {
        return Err(Exit::input(format!(
            "`{shown}` is no regular file: a pipe or device may never end"
        ))
        .into());
    }
    if size.len() > yaml::MAX_BYTES as u64 {
        let line = format!(
            "{shown}:1:1: the file has {} bytes; at most {} are read",
            size.len(),
            yaml::MAX_BYTES
        );
        return Err(Exit::input(line).into());
    }
    let bytes = std::fs::read(file)
        .map_err(|e| Exit::input(format!("cannot read the pipeline file `{shown}`: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = e.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
        Exit::input(format!(
            "{shown}:{line}:1: the file is not UTF-8: byte {at} begins no character"
        ))
    })?;
    let params = parse_params(params)?;
    match parse_pipeline(&shown, &text, &params) {
        Ok(checked) => Ok(Pipeline {
            text,
            checked,
            params,
        }),
        Err(found) => {
            let lines = found.iter().map(ToString::to_string).collect();
            Err(Exit {
                code: crate::exit::WRONG_INPUT,
                lines,
            }
            .into())
        }
    }
}

/// `name=value`, where the value is what YAML would read.
fn parse_params(given: &[String]) -> anyhow::Result<Map<String, Value>> {
    let mut out = Map::new();
    for text in given {
        let (name, value) = text.split_once('=').ok_or_else(|| {
            Exit::input(format!(
                "`--param {text}` has no `=`: write `--param name=value`"
            ))
        })?;
        out.insert(name.to_owned(), yaml::scalar_from_text(value));
    }
    Ok(out)
}

/// Sends the files that travel with the pipeline, and makes the request; what the run is started
/// for is not in it yet.
///
/// # Errors
/// An [`Exit`] for a file that cannot be read; what the coordinator says.
pub async fn prepare(
    cluster: &Cluster,
    pipeline: &Pipeline,
    arguments: &SubmitArguments,
    request_id: String,
) -> anyhow::Result<SubmitRunRequest> {
    let parent = arguments
        .file
        .parent()
        .filter(|p| !p.as_os_str().is_empty());
    let base = parent
        .unwrap_or(Path::new("."))
        .canonicalize()
        .map_err(|e| {
            Exit::input(format!(
                "cannot resolve the directory of `{}`: {e}",
                arguments.file.display()
            ))
        })?;
    let mut files = Vec::new();
    for path in exec_files(&pipeline.checked.spec) {
        files.push(stage_file(cluster, &base, &path).await?);
    }
    let params = pipeline
        .params
        .iter()
        .map(|(k, v)| (k.clone(), v.to_string()))
        .collect();
    Ok(SubmitRunRequest {
        pipeline_yaml: pipeline.text.clone(),
        file_name: arguments.file.display().to_string(),
        base_dir: base.display().to_string(),
        params,
        request_id,
        priority: arguments.priority,
        no_cache: arguments.no_cache,
        files,
        trigger: "manual".to_owned(),
        traceparent: std::env::var("TRACEPARENT").unwrap_or_default(),
        change: None,
        repairs: String::new(),
    })
}

async fn stage_file(cluster: &Cluster, base: &Path, path: &str) -> anyhow::Result<SubmittedFile> {
    let full = base.join(path);
    let fail = |e: std::io::Error| {
        Exit::input(format!(
            "cannot read `{}`, which an `exec` stage names under `files`: {e}",
            full.display()
        ))
    };
    // Where it leads: somebody else's pipeline must not take along what is not of its directory.
    let real = tokio::fs::canonicalize(&full).await.map_err(fail)?;
    if !real.starts_with(base) {
        return Err(Exit::input(format!(
            "`{}`, which an `exec` stage names under `files`, leads out of the pipeline's directory, to `{}`",
            full.display(),
            real.display()
        ))
        .into());
    }
    let metadata = tokio::fs::metadata(&real).await.map_err(fail)?;
    if !metadata.is_file() {
        return Err(Exit::input(format!(
            "`{}`, which an `exec` stage names under `files`, is no regular file",
            full.display()
        ))
        .into());
    }
    let content = tokio::fs::read(&real).await.map_err(fail)?;
    let bytes = content.len() as u64;
    let digest = upload::blob(cluster, content).await?;
    Ok(SubmittedFile {
        path: path.to_owned(),
        sha256: digest.to_string(),
        bytes,
        executable: is_executable(&metadata),
    })
}

fn is_executable(metadata: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    metadata.permissions().mode() & 0o111 != 0
}

/// New for each submit, so that a submit repeated on a broken connection is still one run.
pub fn request_id() -> String {
    let now = emberline_common::time::Timestamp::now().0;
    format!("cli-{now:x}-{:x}", std::process::id())
}
