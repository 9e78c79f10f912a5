//! The coordinator: decides what runs where, keeps the state, serves the API.
//!
//! [`Coordinator`] is one coordinator in this process. Inside, `services` translate, [`runtime`]
//! orders, [`engine`] decides; [`store`] keeps the state. Nothing is told to anyone before it is
//! durable.

mod access;
pub mod archive;
mod attend;
mod audit;
mod coordinator;
mod delivery_gauges;
pub mod dora;
pub mod engine;
pub mod events;
#[doc(hidden)]
pub mod fuzzing;
pub mod gc;
mod high_water;
mod holds;
mod lookup;
mod metrics;
mod run_id;
pub mod runtime;
mod services;
mod standing;
pub mod store;
mod tasks;
mod tenure;
mod term;
pub mod traces;

pub use access::Gate;
pub use audit::Audit;
pub use coordinator::{Coordinator, CoordinatorConfig, CoordinatorError};
