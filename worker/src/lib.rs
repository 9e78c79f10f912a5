//! The worker: runs stages. This crate has the session with the leader, the artifact cache, the
//! [`Stage`](stage::Stage) trait for kinds of your own, and the light kinds.
//!
//! Start with [`Worker::builder`]; a kind of your own begins with [`stage`], its tests with
//! [`testing`]. `examples/own_stage.rs` is a whole worker with one.
//! The guide has a page about it: `docs/guide/exec-and-own-stages.md`.

mod board;
mod cache;
mod checkpoints;
mod config;
pub mod documents;
#[doc(hidden)]
pub mod fuzzing;
pub mod kinds;
pub mod machine;
mod outputs;
mod pass;
mod runner;
mod scrape;
mod search;
pub mod secrets;
pub mod serving;
mod session;
mod sink;
pub mod stage;
mod telemetry;
pub mod testing;
mod worker;

pub use config::{WorkerConfig, WorkerError};
pub use kinds::builtin_stages;
pub use search::LeaderSeen;
pub use telemetry::{AttemptTelemetry, StageSpan};
pub use worker::{RunningWorker, Worker, WorkerBuilder};
