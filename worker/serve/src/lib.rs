//! The inference server of a worker: models in service over the Open Inference Protocol (version 2),
//! by gRPC and REST on one port.
//!
//! Start with [`InferenceServer`]. What it is to serve comes as a plan
//! ([`Serving::apply`](emberline_worker::serving::Serving::apply)); `plan` makes it so, and leaves a
//! picture of who answers what (`routes`) that requests take as a whole, so that no change of plan
//! ever drops one. `infer` is the way of a request, whichever protocol it came by; `schema` checks it
//! column by column, `pool` makes batches and computes them on threads of their own.
//!
//! Nothing that a client sends makes it panic, take more than a bounded amount of memory, or wait
//! without an end.

mod access;
mod body;
mod codec;
mod columns;
mod config;
mod connections;
mod counters;
mod drift;
mod error;
mod feedback;
#[doc(hidden)]
pub mod fuzzing;
mod grpc;
mod http_service;
mod infer;
mod json;
mod log;
mod metrics;
mod parquet_log;
mod plan;
mod pool;
mod relay;
mod rest;
mod routes;
mod schema;
mod server;
mod tensor;
mod traces;
mod version;

pub use config::{ServeConfig, ServerLimits};
pub use server::{InferenceServer, StartError};
