//! The stage kind `report`: one self-contained HTML page about a run.
//!
//! [`stages`] is all that others need. Inside: [`material`] reads what came in, [`page`] puts the
//! sections together, each section (in [`sections`]) tells of one thing and leaves itself out when
//! it has nothing to tell, [`dag`] lays
//! out the graph, [`chart`] draws. Text reaches the page only through [`html`], which
//! escapes it.
//!
//! A page never asks for anything over the network, runs no script, and is the same, byte for byte,
//! for the same run: there is no clock here but the times that the run view tells.

mod chart;
mod dag;
mod format;
mod html;
mod material;
mod page;
mod sections;
mod stage;

use std::sync::Arc;

pub use stage::Report;

/// The stage kinds of this crate.
#[must_use]
pub fn stages() -> Vec<Arc<dyn emberline_worker::stage::Stage>> {
    vec![Arc::new(Report)]
}
