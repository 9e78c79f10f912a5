//! The metrics of delivery, out of the records of deployments.
//!
//! Pure: what counts as now comes in, and nothing is read or written. [`measure`] computes DORA's five
//! metrics; [`explain`] cuts one deployment's lead time into segments; [`delivery`] puts together what
//! the page about a run tells. [`quick_check`] has the buckets and levels.

mod explain;
mod measure;
pub mod quick_check;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;

use emberline_common::{
    delivery::{Deployment, DeploymentKind},
    dora::{Delivery, DoraQuery},
    run_view::RunView,
    time::Timestamp,
};

pub use explain::explain;
pub use measure::{first_carried, measure};

/// What the page about a run tells: what it has deployed, and how delivery of its pipeline goes.
/// `trace_url` says where a trace can be looked at, with `{trace_id}`.
#[must_use]
pub fn delivery(
    run: &RunView,
    deployments: &[Arc<Deployment>],
    trace_url: Option<&str>,
    now: Timestamp,
) -> Delivery {
    let summary = &run.summary;
    let own = deployments
        .iter()
        .filter(|d| d.run == summary.run && d.kind == DeploymentKind::Release);
    let query = DoraQuery {
        pipeline: Some(summary.pipeline.clone()),
        ..DoraQuery::lately(now)
    };
    let trace = summary.trace().trace.to_string();
    Delivery {
        trace_url: trace_url.map_or_else(String::new, |url| url.replace("{trace_id}", &trace)),
        deployments: own
            .filter_map(|d| explain(d, Some(run), first_carried(deployments, d)))
            .collect(),
        metrics: measure(deployments, &query, now),
    }
}
