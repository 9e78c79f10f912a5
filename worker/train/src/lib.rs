//! Training and evaluation with burn: the stage kinds `train` and `evaluate`, the model format, and
//! [`bundle`], a model in one file for programs of one's own.
//!
//! Start with [`fit`], the training loop over plain numbers; [`features`] turns tables into them.
//! Burn's types stay inside this crate, and it never uses burn's global random numbers.

pub mod backend;
pub mod batches;
pub mod bundle;
pub mod checkpoint;
pub mod columns;
pub mod encode;
pub mod error;
pub mod evaluate;
pub mod expression;
pub mod features;
pub mod fit;
pub mod gates;
pub mod images;
pub mod matrix;
pub mod metrics;
pub mod model;
pub mod network;
pub mod optimizer;
pub mod random;
pub mod reference;
pub mod schedule;
pub mod train;

use std::sync::Arc;

use emberline_worker::stage::Stage;

pub use bundle::{Bundle, BundleError};
pub use error::TrainError;
pub use model::Model;

/// The stage kinds of this crate.
#[must_use]
pub fn stages() -> Vec<Arc<dyn Stage>> {
    vec![Arc::new(train::Train), Arc::new(evaluate::Evaluate)]
}
