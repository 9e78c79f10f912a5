//! Process tests of the real binary, as a user has it: what a test starts is `emberline` itself, in
//! a directory of its own, and what it looks at is exit codes, texts, JSON, files and gRPC.
//!
//! No test asks the system whether it is well: [`outside`] reads the state directory with code of
//! its own. No test sleeps to wait for something: [`wait_for`] looks until a deadline. Start with
//! [`Place`], then [`Dev`] for a cluster that stays up.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod cdevents;
pub mod client;
pub mod cluster;
pub mod containers;
pub mod dev;
pub mod etcd;
pub mod fleet;
pub mod git;
pub mod history;
pub mod http;
pub mod http_proxy;
pub mod node;
pub mod otlp;
pub mod outside;
pub mod pipelines;
pub mod place;
pub mod processes;
pub mod prometheus;
pub mod prometheus_server;
pub mod promql;
pub mod s3;
pub mod secured;
pub mod tcp_proxy;
pub mod team;
pub mod traffic;
pub mod watched;

use std::time::{Duration, Instant};

pub use dev::Dev;
pub use etcd::Etcd;
pub use fleet::Fleet;
pub use history::History;
pub use http_proxy::HttpProxy;
pub use otlp::OtlpReceiver;
pub use place::{Call, Output, Place, Running};
pub use prometheus_server::PrometheusServer;
pub use s3::S3Server;
pub use secured::Secured;
pub use tcp_proxy::TcpProxy;
pub use traffic::Traffic;

/// Looks again and again until there is something, at most for `within`.
///
/// # Panics
/// If there is nothing by then: `what` says what was waited for.
pub fn wait_for<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Seconds, for deadlines.
#[must_use]
pub const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
