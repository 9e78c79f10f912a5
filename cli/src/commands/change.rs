//! What a run is started for: the revision of the work tree with the commits since the previous
//! deployment, or the pipeline itself.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use emberline_common::{
    delivery::{Change, ChangeKind},
    spec::exec_files,
    time::Timestamp,
};
use emberline_proto::v1::{
    self, DeploymentKind, DeploymentOutcome, ListDeploymentsRequest, SubmitRunRequest,
};
use tonic::Status;

use super::submission::Pipeline;
use crate::{
    args::{CauseArguments, Trigger},
    client::Cluster,
    git::WorkTree,
    output::clean,
};

/// Deployments that are looked through for the previous one of each environment.
const LOOK_BACK: u32 = 1000;

/// Says in a request what the run is started for. What cannot be found out is told as a warning:
/// it stops no run.
///
/// # Errors
/// What the coordinator says.
pub async fn describe(
    cluster: &Cluster,
    request: &mut SubmitRunRequest,
    pipeline: &Pipeline,
    file: &Path,
    cause: &CauseArguments,
) -> Result<(), Status> {
    let trigger = match cause.trigger {
        Trigger::Manual => "manual",
        Trigger::Schedule => "schedule",
        Trigger::Data => "data",
        Trigger::Commit => "commit",
    };
    trigger.clone_into(&mut request.trigger);
    request.repairs = cause.repairs.clone().unwrap_or_default();
    let base = PathBuf::from(&request.base_dir);
    let mut files: Vec<PathBuf> = exec_files(&pipeline.checked.spec)
        .into_iter()
        .map(PathBuf::from)
        .collect();
    files.extend(file.file_name().map(PathBuf::from));
    let mut change = match in_work_tree(&base, &files).await {
        Ok(Some((tree, mut change))) => {
            let since = previous(cluster, pipeline, &change).await?;
            match tree.add_commits(&mut change, &since).await {
                Ok(unknown) => unknown.iter().for_each(|revision| {
                    warn(&format!(
                        "revision {revision} of the previous deployment is not in this clone: fetch its history, or only the newest commit counts as delivered"
                    ));
                }),
                Err(why) => warn(&format!("{why}; only the newest commit counts as delivered")),
            }
            change
        }
        Ok(None) => of_file(file),
        Err(why) => {
            warn(&format!("{why}; the pipeline itself counts as the change"));
            of_file(file)
        }
    };
    change.id = cause.change_id.clone().unwrap_or_default();
    request.change = Some(v1::Change::from(&change));
    Ok(())
}

fn warn(line: &str) {
    eprintln!("warning: {}", clean(line));
}

async fn in_work_tree(
    base: &Path,
    files: &[PathBuf],
) -> Result<Option<(WorkTree, Change)>, String> {
    let Some(tree) = WorkTree::of(base).await? else {
        return Ok(None);
    };
    let change = tree.change(files).await?;
    Ok(change.map(|change| (tree, change)))
}

/// The pipeline as the change: as old as its file. The server knows its revision.
fn of_file(file: &Path) -> Change {
    let modified = std::fs::metadata(file).and_then(|m| m.modified()).ok();
    let committed_at = modified.map_or_else(Timestamp::now, Timestamp::from);
    Change {
        kind: ChangeKind::Pipeline,
        repository: String::new(),
        branch: String::new(),
        // The wire wants one; the server puts the pipeline's own in its place.
        revision: "pipeline".to_owned(),
        id: String::new(),
        committed_at,
        authored_at: None,
        pushed_at: None,
        dirty: false,
        commits: Vec::new(),
        left_out: 0,
    }
}

/// The revisions of the same repository that this pipeline made live last, one for each
/// environment. Before the first deployment there is none: the whole history was not a change.
async fn previous(
    cluster: &Cluster,
    pipeline: &Pipeline,
    change: &Change,
) -> Result<Vec<String>, Status> {
    let request = ListDeploymentsRequest {
        page_size: LOOK_BACK,
        pipeline: pipeline.checked.spec.pipeline.to_string(),
        ..Default::default()
    };
    let mut deployments = cluster.deployments();
    let answer = deployments.list_deployments(request).await?.into_inner();
    let mut seen = HashSet::new();
    let mut revisions = Vec::new();
    for deployment in answer.deployments {
        let live = deployment.kind() == DeploymentKind::Release
            && deployment.outcome() == DeploymentOutcome::Live;
        let same = deployment.change.as_ref().filter(|before| {
            before.kind() == v1::ChangeKind::Code && before.repository == change.repository
        });
        let Some(before) = same.filter(|_| live) else {
            continue;
        };
        if seen.insert(deployment.environment.clone()) && !revisions.contains(&before.revision) {
            revisions.push(before.revision.clone());
        }
    }
    Ok(revisions)
}
