//! What the run has deployed, where its lead time went, and DORA's metrics of its pipeline.

use std::time::Duration;

use emberline_common::dora::{DoraReport, Figures, LeadTimeExplanation, PlaceMetrics};

use crate::{
    format::{count, duration, number, percent, plural},
    html::{
        Heading::{Number, Text},
        Html, Px, cut,
    },
    material::Material,
};

/// The most deployments that are explained.
const MAX_DEPLOYMENTS: usize = 8;
/// The most segments of one of them.
const MAX_SEGMENTS: usize = 200;
/// The width of a whole bar.
const BAR: f64 = 120.0;

/// Writes the section.
pub fn write(h: &mut Html, material: &Material<'_>) {
    let Some(delivery) = material.ctx.delivery.as_deref() else {
        return;
    };
    for explanation in delivery.deployments.iter().take(MAX_DEPLOYMENTS) {
        explain(h, explanation, &delivery.trace_url);
    }
    for place in &delivery.metrics.places {
        metrics(h, place, &delivery.metrics);
    }
}

/// A trace's id, and where to look at it if somebody has said where.
pub fn trace(h: &mut Html, id: &str, url: &str) {
    let web = ["http://", "https://"];
    if web.iter().any(|scheme| url.starts_with(scheme)) {
        h.element("a", &[("href", &url)], |h| h.leaf("code", &[], id));
    } else {
        h.leaf("code", &[], id);
    }
}

fn span(micros: u64) -> String {
    duration(Duration::from_micros(micros))
}

fn explain(h: &mut Html, explanation: &LeadTimeExplanation, trace_url: &str) {
    h.leaf(
        "h3",
        &[],
        format_args!(
            "{}: {} version {} in {}",
            explanation.deployment, explanation.model, explanation.version, explanation.environment
        ),
    );
    h.element("p", &[("class", &"muted")], |h| {
        h.text(format_args!("Lead time {}", span(explanation.total_micros)));
        if let Some(revision) = &explanation.revision {
            h.text(", from the commit of ");
            h.leaf("code", &[("title", revision)], cut(revision, 12));
        }
        h.text(format_args!(
            " to {}, first to carry {}, trace ",
            explanation.finished_at,
            plural(explanation.changes.len() as u64, "change")
        ));
        trace(h, &explanation.trace_id.to_string(), trace_url);
        h.text(". ");
        if !explanation.note.is_empty() {
            h.text(format_args!("Note: {}. ", explanation.note));
        }
        if explanation.skewed {
            h.text("Clocks differ: what would go back in time was cut.");
        }
    });
    let headings = [
        Text("segment"),
        Text("task"),
        Number("took"),
        Number("share"),
        Text(""),
    ];
    let caption = "Where the lead time went, along the critical path; the segments add up to it";
    let total = explanation.total_micros as f64;
    let longest = explanation.segments.iter().map(|s| s.micros).max();
    h.table(caption, &headings, |h| {
        for segment in explanation.segments.iter().take(MAX_SEGMENTS) {
            h.row(|h| {
                h.row_head(segment.kind);
                h.cell(segment.about());
                h.number_cell(span(segment.micros));
                h.number_cell(percent(segment.micros as f64, total));
                h.element("td", &[], |h| {
                    bar(
                        h,
                        segment.micros as f64 / longest.unwrap_or(0).max(1) as f64,
                    );
                });
            });
        }
    });
    let more = explanation.segments.len().saturating_sub(MAX_SEGMENTS) as u64;
    if more > 0 {
        h.paragraph(
            "muted",
            format_args!("and {} more", plural(more, "segment")),
        );
    }
}

fn bar(h: &mut Html, share: f64) {
    let view = format!("0 0 {BAR} 10");
    let attributes: crate::html::Attributes<'_> = &[
        ("class", &"bar"),
        ("viewBox", &view),
        ("width", &Px(BAR)),
        ("height", &"10"),
        ("aria-hidden", &"true"),
    ];
    h.element("svg", attributes, |h| {
        let width = (share * BAR).max(1.0);
        h.empty(
            "rect",
            &[
                ("class", &"fill"),
                ("width", &Px(width)),
                ("height", &"10"),
                ("rx", &"2"),
            ],
        );
    });
}

/// Figures as the page shows them.
struct Page;

impl Figures for Page {
    fn span(&self, micros: u64) -> String {
        span(micros)
    }

    fn number(&self, value: f64) -> String {
        number(value)
    }

    fn percent(&self, ratio: f64) -> String {
        percent(ratio, 1.0)
    }

    fn count(&self, value: u64) -> String {
        count(value)
    }
}

fn metrics(h: &mut Html, place: &PlaceMetrics, report: &DoraReport) {
    h.leaf(
        "h3",
        &[],
        format_args!("Delivery into {}", place.environment),
    );
    if place.is_empty() {
        h.paragraph("muted", "no deployments");
        return;
    }
    let caption = format!(
        "DORA's metrics of {}, {} to {}",
        place.pipeline, report.since, report.until
    );
    let headings = [
        Text("metric"),
        Text("value"),
        Text("detail"),
        Text("Quick Check"),
        Text("level"),
    ];
    h.table(&caption, &headings, |h| {
        for row in place.rows(&Page) {
            h.row(|h| {
                h.row_head(row.name);
                h.cell(row.value);
                h.cell(row.detail);
                h.cell(row.bucket);
                h.cell(row.level);
            });
        }
    });
}
