//! The metrics of delivery, out of the records of deployments.
//!
//! Pure: what counts as now comes in, and nothing is read or written. [`measure`] computes DORA's five
//! metrics; [`explain`] cuts one deployment's lead time into segments. [`quick_check`] has the
//! buckets and levels.

mod explain;
mod measure;
pub mod quick_check;
#[cfg(test)]
mod tests;

pub use explain::explain;
pub use measure::{first_carried, measure};
