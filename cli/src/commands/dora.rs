//! `dora`: the metrics of delivery, and where a lead time went.

use std::time::Duration;

use emberline_common::{
    delivery::MAX_COMMITS,
    dora::{Counts, DoraReport, Figures, LeadTimeExplanation, PlaceMetrics, Segment},
    time::Timestamp,
};
use emberline_proto::v1::{ExplainDeploymentRequest, GetMetricsRequest};

use super::runs::trace_link;
use crate::{
    args::{ClusterArguments, DoraArguments, DoraCommand, Format},
    client::Cluster,
    exit::Exit,
    moment::moment,
    output::{self, clean},
};

/// Changes that are shown to people.
const SHOWN_CHANGES: usize = 20;
/// Signs of the longest bar.
const BAR: usize = 24;

/// Shows the metrics, or explains one lead time.
pub async fn dora(
    arguments: &ClusterArguments,
    what: DoraArguments,
    format: Format,
) -> anyhow::Result<()> {
    // What is wrong is told before anything is started.
    let now = Timestamp::now();
    let at =
        |flag, text: &Option<String>| text.as_deref().map(|t| moment(flag, t, now)).transpose();
    let (since, until) = (at("--since", &what.since)?, at("--until", &what.until)?);
    let failure_window = what
        .failure_window
        .map_or(Duration::ZERO, |window| window.0);
    let request = GetMetricsRequest {
        since: since.map(Into::into),
        until: until.map(Into::into),
        pipeline: what.pipeline.unwrap_or_default(),
        environment: what.environment.unwrap_or_default(),
        include_rollbacks: what.include_rollbacks,
        failure_window_micros: u64::try_from(failure_window.as_micros()).unwrap_or(u64::MAX),
    };
    let cluster = Cluster::connect(arguments, 0).await?;
    let outcome = match what.command {
        Some(DoraCommand::Explain { deployment }) => explain(&cluster, deployment, format).await,
        None => metrics(&cluster, request, format).await,
    };
    let closed = cluster.close().await;
    outcome.and(closed)
}

async fn metrics(
    cluster: &Cluster,
    request: GetMetricsRequest,
    format: Format,
) -> anyhow::Result<()> {
    let asked = [request.pipeline.clone(), request.environment.clone()];
    let answer = cluster.dora().get_metrics(request).await?.into_inner();
    let report: DoraReport = answer.report.unwrap_or_default().try_into().map_err(odd)?;
    if format == Format::Json {
        return output::json(&report);
    }
    Ok(tell(&report, &asked)?)
}

/// What a server of another release may say.
fn odd(e: emberline_common::wire::WireError) -> Exit {
    Exit::cluster(format!("the cluster's answer cannot be read: {e}"))
}

async fn explain(cluster: &Cluster, deployment: String, format: Format) -> anyhow::Result<()> {
    let request = ExplainDeploymentRequest { deployment };
    let answer = cluster
        .dora()
        .explain_deployment(request)
        .await?
        .into_inner();
    let explanation = answer.explanation.unwrap_or_default();
    let explanation: LeadTimeExplanation = explanation.try_into().map_err(odd)?;
    if format == Format::Json {
        return output::json(&explanation);
    }
    Ok(tell_explanation(&explanation)?)
}

fn tell(report: &DoraReport, asked: &[String]) -> std::io::Result<()> {
    const DAY: u64 = 86_400_000_000;
    let window = micros(report.until.since(report.since));
    let window = match window % DAY {
        0 => Terminal.plural(window / DAY, "day"),
        _ => span(window),
    };
    output::line(format!("{} to {} ({window})", report.since, report.until))?;
    if report.places.is_empty() {
        let what: Vec<_> = asked.iter().filter(|name| !name.is_empty()).collect();
        let of = match what.as_slice() {
            [] => String::new(),
            names => {
                let names: Vec<_> = names.iter().map(|name| clean(name)).collect();
                format!(" of {}", names.join(" in "))
            }
        };
        output::line(format!("no deployments{of}"))?;
    }
    for place in &report.places {
        output::line("")?;
        output::line(format!("{} in {}", place.pipeline, place.environment))?;
        tell_place(place, report)?;
    }
    if let Some(at) = report.forgotten_before {
        output::line("")?;
        output::line(format!("deployments before {at} were forgotten"))?;
    }
    Ok(())
}

fn tell_place(place: &PlaceMetrics, report: &DoraReport) -> std::io::Result<()> {
    if place.is_empty() {
        return output::line("no deployments");
    }
    let rows = place.rows(&Terminal);
    let rows = rows.map(|row| {
        let name = row.name.to_owned();
        vec![name, row.value, row.detail, row.bucket, row.level]
    });
    output::table(
        &["METRIC", "VALUE", "DETAIL", "QUICK CHECK", "LEVEL"],
        &rows,
    )?;
    for note in notes(&place.counts, report) {
        output::line(format!("  {note}"))?;
    }
    Ok(())
}

/// Figures as a terminal shows them.
struct Terminal;

impl Figures for Terminal {
    fn span(&self, micros: u64) -> String {
        span(micros)
    }

    fn number(&self, number: f64) -> String {
        decimal(number)
    }

    fn percent(&self, ratio: f64) -> String {
        format!("{} %", decimal(ratio * 100.0))
    }

    fn count(&self, count: u64) -> String {
        count.to_string()
    }
}

/// What a reader has to know beside the figures.
fn notes(counts: &Counts, report: &DoraReport) -> Vec<String> {
    let window = span(report.failure_window_micros);
    let rollbacks = match report.include_rollbacks {
        true => "rework, and counted as deployments too",
        false => "rework, and no deployments",
    };
    let unsettled = format!("live for less than {window}: they may still count as failed");
    let all = [
        (
            "caught before exposure",
            counts.caught_before_exposure,
            "neither deployments nor failures",
        ),
        ("rollbacks", counts.rollbacks, rollbacks),
        ("under way", counts.in_progress, ""),
        ("failed and not recovered", counts.not_recovered, ""),
        ("not settled", counts.unsettled, &unsettled),
        (
            "found by time",
            counts.found_by_time,
            "said to have failed because they were live when an incident began",
        ),
        (
            "skewed clocks",
            counts.skewed,
            "times that would be negative, counted as zero",
        ),
        (
            "changes left out",
            counts.changes_left_out,
            "older commits that were not named, and are in no lead time",
        ),
    ];
    let notes = all.into_iter().filter(|(_, number, _)| *number > 0);
    notes
        .map(|(name, number, why)| match why {
            "" => format!("{name}: {number}"),
            why => format!("{name}: {number} ({why})"),
        })
        .collect()
}

fn tell_explanation(e: &LeadTimeExplanation) -> std::io::Result<()> {
    let line = |name: &str, text: String| output::line(format!("{name:<12} {text}"));
    line(
        "deployment",
        format!("{} in {}", e.deployment, e.environment),
    )?;
    line("model", format!("{} version {}", e.model, e.version))?;
    line("run", format!("{} of {}", e.run, e.pipeline))?;
    if let Some(revision) = &e.revision {
        line("change", clean(revision))?;
    }
    line("trace", trace_link(&e.trace_id.to_string()))?;
    line("from", e.began_at.to_string())?;
    line("live", e.finished_at.to_string())?;
    line("lead time", span(e.total_micros))?;
    if !e.note.is_empty() {
        line("note", clean(&e.note))?;
    }
    if e.skewed {
        line(
            "note",
            "clocks differ: what would go back in time was cut".to_owned(),
        )?;
    }
    output::line("")?;
    let longest = e.segments.iter().map(|s| s.micros).max().unwrap_or(0);
    let rows: Vec<_> = e
        .segments
        .iter()
        .map(|s| row(s, e.total_micros, longest))
        .collect();
    output::table(&["SEGMENT", "TASK", "TOOK", "SHARE", ""], &rows)?;
    output::line("")?;
    if e.changes.is_empty() {
        return output::line("no change is carried here for the first time");
    }
    let rows: Vec<_> = e
        .changes
        .iter()
        .take(SHOWN_CHANGES)
        .map(|c| {
            vec![
                c.revision.clone(),
                c.committed_at.to_string(),
                span(c.lead_micros),
            ]
        })
        .collect();
    output::table(&["FIRST CARRIED HERE", "COMMITTED", "LEAD TIME"], &rows)?;
    let more = e.changes.len().saturating_sub(SHOWN_CHANGES);
    match more {
        0 => Ok(()),
        more if e.changes.len() == MAX_COMMITS => {
            output::line(format!("and {more} or more others"))
        }
        more => output::line(format!("and {more} more")),
    }
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share of the whole, from 0 to 1"
)]
fn row(segment: &Segment, total: u64, longest: u64) -> Vec<String> {
    let of = |whole: u64| segment.micros as f64 / whole.max(1) as f64;
    vec![
        segment.kind.to_string(),
        segment.about(),
        span(segment.micros),
        format!("{} %", decimal(of(total) * 100.0)),
        "▇".repeat((of(longest) * BAR as f64).round() as usize),
    ]
}

/// Two digits after the point where there is nothing before it, else one.
fn decimal(number: f64) -> String {
    match number {
        0.0 => "0".to_owned(),
        n if n < 0.01 => "< 0.01".to_owned(),
        n if n < 1.0 => format!("{n:.2}"),
        n => format!("{n:.1}"),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Like [`output::duration`], but for the milliseconds that tasks take.
fn span(micros: u64) -> String {
    match micros {
        0 => "0s".to_owned(),
        1..1_000 => "< 1ms".to_owned(),
        1_000..1_000_000 => format!("{}ms", micros / 1_000),
        _ => output::duration(Duration::from_micros(micros)),
    }
}
