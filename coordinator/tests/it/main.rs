//! The coordinator as its clients and workers meet it: a real embedded store, real gRPC over
//! loopback, and workers of the tests' own that speak the protocol.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "these are tests"
)]

mod artifacts;
mod durability;
mod harness;
mod limits;
mod logs;
mod registry;
mod runs;
mod sessions;
