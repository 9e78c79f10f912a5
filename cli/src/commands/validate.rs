//! `validate` and `plan`: what is wrong with a pipeline, and what a run of it would do.

use std::path::Path;

use emberline_proto::v1::{PlanRunRequest, PlannedAction};
use serde_json::json;

use super::submission;
use crate::{
    args::{ClusterArguments, Format, SubmitArguments},
    client::Cluster,
    exit::Exit,
    output,
};

/// Checks a pipeline file.
pub fn validate(file: &Path, params: &[String], quiet: bool, format: Format) -> anyhow::Result<()> {
    let outcome = submission::read(file, params);
    match (format, outcome) {
        (Format::Json, Ok(_)) => output::json(&json!({ "valid": true, "mistakes": [] })),
        (Format::Json, Err(e)) => match e.downcast::<Exit>() {
            Ok(exit) => {
                output::json(&json!({ "valid": false, "mistakes": exit.lines }))?;
                Err(Exit::silent(exit.code).into())
            }
            Err(e) => Err(e),
        },
        (Format::Text, Err(e)) => Err(e),
        (Format::Text, Ok(_)) if quiet => Ok(()),
        (Format::Text, Ok(pipeline)) => {
            let stages = pipeline.checked.spec.stages.len();
            Ok(output::line(format!(
                "{}: no mistakes in {stages} stages",
                file.display()
            ))?)
        }
    }
}

/// Says what a run would do.
pub async fn plan(
    cluster: &ClusterArguments,
    arguments: &SubmitArguments,
    format: Format,
) -> anyhow::Result<()> {
    let pipeline = submission::read(&arguments.file, &arguments.params)?;
    let cluster = Cluster::connect(cluster, 0).await?;
    let outcome = ask(&cluster, &pipeline, arguments, format).await;
    cluster.close().await?;
    outcome
}

async fn ask(
    cluster: &Cluster,
    pipeline: &submission::Pipeline,
    arguments: &SubmitArguments,
    format: Format,
) -> anyhow::Result<()> {
    let submission =
        submission::prepare(cluster, pipeline, arguments, submission::request_id()).await?;
    let request = PlanRunRequest {
        submission: Some(submission),
    };
    let plan = cluster.runs().plan_run(request).await?.into_inner();
    let word = |action| match action {
        PlannedAction::Run => "run",
        PlannedAction::Reuse => "reuse",
        PlannedAction::Depends => "depends",
        PlannedAction::Unspecified => "?",
    };
    if format == Format::Json {
        let tasks: Vec<_> = plan
            .tasks
            .iter()
            .map(|t| json!({"task": t.task, "kind": t.kind, "action": word(t.action()), "why": t.why, "needs": t.needs}))
            .collect();
        return output::json(&json!({ "tasks": tasks }));
    }
    let rows: Vec<Vec<String>> = plan
        .tasks
        .iter()
        .map(|t| {
            vec![
                t.task.clone(),
                t.kind.clone(),
                word(t.action()).to_owned(),
                t.why.clone(),
            ]
        })
        .collect();
    Ok(output::table(&["TASK", "KIND", "WOULD", "WHY"], &rows)?)
}
