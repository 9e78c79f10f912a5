//! What Emberline's coordinator and workers must agree on: ids, the pipeline's spec and its checks,
//! artifacts, and logs. What only one side uses lives on that side.

pub mod access;
pub mod address;
pub mod artifact;
pub mod attempt_log;
pub mod delivery;
pub mod dora;
pub mod failure;
pub mod finding;
pub mod grpc;
pub mod ids;
pub mod labels;
pub mod redirect;
pub mod reload;
pub mod resources;
pub mod run_view;
pub mod serving;
pub mod spec;
pub mod telemetry;
pub mod text;
pub mod time;
pub mod tls;
pub mod trace;
pub mod wire;
