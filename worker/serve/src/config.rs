//! How the server is set up.

use std::time::Duration;

use emberline_common::{
    ids::{EnvironmentName, WorkerName},
    telemetry::Telemetry,
    tls::Dialer,
};

/// How the server is set up.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Where it listens, `host:port`; port 0 is any free one.
    pub listen: String,
    /// Where clients and other replicas reach it, `host:port`; by default where it listens.
    pub advertise: Option<String>,
    /// The one environment whose models it serves.
    pub environment: EnvironmentName,
    /// The worker, for the names of its logs.
    pub worker: WorkerName,
    /// Its certificates: with them its port speaks TLS, and so do the other replicas.
    pub dialer: Dialer,
    /// Whether nobody may ask before a leader has said who may.
    pub asks_for_tokens: bool,
    /// Where metrics and spans go.
    pub telemetry: Telemetry,
    /// How much anybody may take of it.
    pub limits: ServerLimits,
}

impl ServeConfig {
    /// With the default limits, and without telemetry.
    #[must_use]
    pub fn new(listen: &str, environment: EnvironmentName, worker: WorkerName) -> Self {
        Self {
            listen: listen.to_owned(),
            advertise: None,
            environment,
            worker,
            dialer: Dialer::default(),
            asks_for_tokens: false,
            telemetry: Telemetry::default(),
            limits: ServerLimits::default(),
        }
    }
}

/// How much anybody may take of a server. What one model may take is in its plan.
#[derive(Debug, Clone)]
pub struct ServerLimits {
    /// Threads that compute; 0 is one for each core, at most 8.
    pub compute_threads: usize,
    /// Connections at once; more wait to be accepted.
    pub max_connections: usize,
    /// Streams of one HTTP/2 connection at once.
    pub max_streams: u32,
    /// Bytes of one request, at most.
    pub max_request_bytes: usize,
    /// Bytes of all requests that are being received, at most.
    pub max_receiving_bytes: usize,
    /// How long a request's headers may take, and a connection may be idle over HTTP/1.1.
    pub head_within: Duration,
    /// How long a request's body may take, and how long nothing of an answer may be taken.
    pub body_within: Duration,
    /// How long what was taken may be answered after the stop.
    pub stop_within: Duration,
    /// How long sampled predictions may wait until they are written.
    pub log_every: Duration,
    /// Root spans a second, of requests that belong to no trace yet.
    pub root_spans_per_second: u32,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            compute_threads: 0,
            max_connections: 4096,
            max_streams: 256,
            max_request_bytes: 8 << 20,
            max_receiving_bytes: 64 << 20,
            head_within: Duration::from_secs(20),
            body_within: Duration::from_secs(20),
            stop_within: Duration::from_secs(5),
            log_every: Duration::from_secs(60),
            root_spans_per_second: 5,
        }
    }
}
