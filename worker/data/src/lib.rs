//! Tables: how they are read from files, queried, cut into parts and checked.
//!
//! A table travels between stages as Parquet files whose columns have one of five types
//! ([`ColumnType`](emberline_common::spec::kinds::convert::ColumnType)). Everything streams in batches
//! of bounded size; only [`table::Table`], which training and drift ask for, holds a whole table.
//! Start with [`table`], then `convert` (files in, tables out) and `validate` (a table against rules).
//!
//! Nothing here guesses silently: what cannot be read, cast or kept as it is is an error that names
//! file, line and column.

mod convert;
pub mod drift;
pub mod read;
mod rules;
mod scalar;
pub mod schema;
mod split;
mod sql;
pub mod table;
mod validate;
pub mod write;

use std::sync::Arc;

pub use convert::Convert;
use emberline_worker::stage::Stage;
pub use validate::Validate;

/// The stage kinds of this crate.
#[must_use]
pub fn stages() -> Vec<Arc<dyn Stage>> {
    vec![Arc::new(Convert), Arc::new(Validate)]
}
