//! Training and evaluation with burn: the stage kinds `train` and `evaluate`, and the model format.
//!
//! Start with [`fit`], the training loop over plain numbers; [`features`] turns tables into them.
//! Burn's types stay inside this crate, and it never uses burn's global random numbers.

pub mod backend;
pub mod batches;
pub mod checkpoint;
pub mod error;
pub mod fit;
pub mod gates;
pub mod images;
pub mod matrix;
pub mod metrics;
pub mod network;
pub mod optimizer;
pub mod random;
pub mod schedule;

pub use error::TrainError;
