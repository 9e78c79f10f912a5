//! `feedback`: labels of requests that a served model has answered, told to whoever answered them.

use std::time::Duration;

use emberline_proto::v1::{
    FeedbackLabel, FeedbackOutcome, FeedbackResult, ListEnvironmentsRequest, SubmitFeedbackRequest,
    feedback_label::Truth, feedback_service_client::FeedbackServiceClient,
};
use serde_json::{Value, json};

use super::events::objects;
use crate::{
    args::{ClusterArguments, FeedbackArguments, Format},
    client::Cluster,
    exit::Exit,
    output::{self, clean},
    security::Security,
};

/// Labels of one call.
const AT_ONCE: usize = 1000;
/// How long a replica may take to be reached.
const CONNECTS_WITHIN: Duration = Duration::from_secs(5);
/// Labels that were not counted, of which each is told to people.
const SHOWN: usize = 20;

/// Tells them.
pub async fn feedback(
    arguments: &ClusterArguments,
    what: &FeedbackArguments,
    quiet: bool,
    format: Format,
) -> anyhow::Result<()> {
    // What is wrong is told before anything is started.
    let labels = labels(what)?;
    let security = arguments.security.read()?;
    let cluster = Cluster::connect(arguments, 0).await?;
    let replicas = replicas(&cluster, what).await;
    cluster.close().await?;
    let outcomes = send(&replicas?, what, labels, &security).await?;
    tell(&outcomes, quiet, format)
}

/// The labels in the file.
fn labels(what: &FeedbackArguments) -> Result<Vec<FeedbackLabel>, Exit> {
    let values = objects(&what.file)?;
    if values.is_empty() {
        let line = format!("`{}` holds no label", what.file.display());
        return Err(Exit::input(line));
    }
    let each = (1..).zip(&values).map(|(number, value)| {
        label(value).map_err(|why| {
            let file = what.file.display();
            Exit::input(format!("{file}: label {number}: {why}"))
        })
    });
    each.collect()
}

fn label(value: &Value) -> Result<FeedbackLabel, String> {
    let map = value
        .as_object()
        .ok_or("it is no object: write `{\"id\": …, \"row\": 0, \"label\": …}`")?;
    if let Some(other) = map
        .keys()
        .find(|k| !["id", "row", "label"].contains(&k.as_str()))
    {
        return Err(format!("unknown field `{}`", clean(other)));
    }
    let request_id = map.get("id").and_then(Value::as_str);
    let row = match map.get("row") {
        None => Some(0),
        Some(row) => row.as_u64().and_then(|row| u32::try_from(row).ok()),
    };
    let truth = match map.get("label") {
        Some(Value::String(class)) => Truth::Class(class.clone()),
        Some(Value::Bool(class)) => Truth::Class(class.to_string()),
        // A class may be a number; which of the two it is, the model knows.
        Some(Value::Number(number)) => match number.as_f64() {
            Some(value) => Truth::Value(value),
            None => return Err("`label` is too large".to_owned()),
        },
        _ => return Err("`label` is missing, or no text, number or boolean".to_owned()),
    };
    Ok(FeedbackLabel {
        request_id: request_id.ok_or("`id` is missing, or no text")?.to_owned(),
        row: row.ok_or("`row` is no row: count from 0")?,
        truth: Some(truth),
    })
}

/// Where the model's replicas answer.
async fn replicas(cluster: &Cluster, what: &FeedbackArguments) -> anyhow::Result<Vec<String>> {
    let mut deployments = cluster.deployments();
    let all = deployments.list_environments(ListEnvironmentsRequest {});
    let mut all = all.await?.into_inner().environments.into_iter();
    let found = all.find(|e| e.environment == what.environment && e.model == what.model);
    let Some(found) = found else {
        let line = format!(
            "no `{}` is live in `{}`: see `emberline environments`",
            clean(&what.model),
            clean(&what.environment)
        );
        return Err(Exit::input(line).into());
    };
    let replicas = found.replicas.into_iter().map(|replica| replica.address);
    let replicas: Vec<String> = replicas.collect();
    if replicas.is_empty() {
        let line = format!(
            "nobody serves `{}` in `{}`: start a worker with `--serve`",
            clean(&what.model),
            clean(&what.environment)
        );
        return Err(Exit::input(line).into());
    }
    Ok(replicas)
}

/// Sends them to the first replica that can be reached: it hands on what others have answered.
async fn send(
    replicas: &[String],
    what: &FeedbackArguments,
    labels: Vec<FeedbackLabel>,
    security: &Security,
) -> anyhow::Result<Vec<FeedbackOutcome>> {
    let mut last = None;
    for address in replicas {
        let endpoint = (security.dialer.endpoint(address)).map_err(Exit::cluster)?;
        let endpoint = endpoint.connect_timeout(CONNECTS_WITHIN);
        let channel = match security.dialer.connect(&endpoint).await {
            Ok(channel) => channel,
            Err(e) => {
                last = Some(format!(
                    "the replica at {} cannot be reached: {e}",
                    clean(address)
                ));
                continue;
            }
        };
        let mut client = FeedbackServiceClient::new(channel);
        let mut outcomes = Vec::with_capacity(labels.len());
        for part in labels.chunks(AT_ONCE) {
            let request = SubmitFeedbackRequest {
                model: what.model.clone(),
                labels: part.to_vec(),
                relayed: false,
            };
            outcomes.extend(
                client
                    .submit_feedback(security.request(request))
                    .await?
                    .into_inner()
                    .outcomes,
            );
        }
        return Ok(outcomes);
    }
    Err(Exit::cluster(last.unwrap_or_default()).into())
}

fn name(result: FeedbackResult) -> &'static str {
    match result {
        FeedbackResult::Unspecified => "unspecified",
        FeedbackResult::Counted => "counted",
        FeedbackResult::Repeated => "repeated",
        FeedbackResult::Unknown => "unknown",
        FeedbackResult::Refused => "refused",
    }
}

/// What became of them. What was refused is a mistake; what came twice or too late is none.
fn tell(outcomes: &[FeedbackOutcome], quiet: bool, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        let each = outcomes.iter().map(|o| {
            json!({
                "id": o.request_id,
                "row": o.row,
                "result": name(o.result()),
                "why": o.why,
                "version": o.version,
            })
        });
        output::json(&each.collect::<Vec<_>>())?;
    } else if !quiet {
        let count = |result| outcomes.iter().filter(|o| o.result() == result).count();
        output::line(format!(
            "{} counted, {} repeated, {} unknown, {} refused",
            count(FeedbackResult::Counted),
            count(FeedbackResult::Repeated),
            count(FeedbackResult::Unknown),
            count(FeedbackResult::Refused)
        ))?;
    }
    let refused = outcomes
        .iter()
        .filter(|o| o.result() == FeedbackResult::Refused);
    let mut lines: Vec<String> = refused
        .map(|o| format!("{} row {}: {}", clean(&o.request_id), o.row, clean(&o.why)))
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    let more = lines.len().saturating_sub(SHOWN);
    lines.truncate(SHOWN);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    Err(Exit {
        code: crate::exit::WRONG_INPUT,
        lines,
    }
    .into())
}
