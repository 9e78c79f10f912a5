//! What a worker is told when it is started, and what can be wrong with it.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use emberline_common::{
    access::Token, artifact::ArtifactStore, ids::WorkerName, resources::Resources,
    telemetry::Telemetry, tls::Dialer,
};
use thiserror::Error;

/// How a worker is set up.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Its name, stable over restarts.
    pub name: WorkerName,
    /// Where leaders are: `host:port` or `http://host:port`; all are tried in turn.
    pub leaders: Vec<String>,
    /// Its certificates: with them it speaks TLS to leaders.
    pub dialer: Dialer,
    /// The token that it joins by, where one is asked for.
    pub token: Option<Token>,
    /// What it gives to tasks.
    pub resources: Resources,
    /// What tasks can ask for by `labels`.
    pub labels: BTreeMap<String, String>,
    /// Attempts at a time, at most; resources bound them as well.
    pub slots: u32,
    /// Where the cache and the work directories are.
    pub state_dir: PathBuf,
    /// The most bytes that the cache keeps.
    pub cache_bytes: u64,
    /// How long it goes on computing when no leader can be reached; then it stops and discards.
    pub orphan_grace: Duration,
    /// How long a stage that was asked to stop may take, before its attempt is reported without it;
    /// less than what the leader waits before it ends the task by itself.
    pub stop_grace: Duration,
    /// The object store to use instead of the one that the leader names.
    pub artifacts: Option<ArtifactStore>,
    /// Where spans, metrics and logs go.
    pub telemetry: Telemetry,
    /// Where its secrets are, one file each; what is not there is looked for in its environment.
    pub secrets_dir: Option<PathBuf>,
    /// Where Prometheus may take the metrics, as `host:port`; nowhere if it is not said.
    pub metrics_listen: Option<String>,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            name: default_name(),
            leaders: Vec::new(),
            dialer: Dialer::default(),
            token: None,
            resources: crate::machine::resources(),
            labels: BTreeMap::new(),
            slots: 64,
            state_dir: PathBuf::from(".emberline/workers/1"),
            cache_bytes: 10 << 30,
            orphan_grace: Duration::from_secs(600),
            stop_grace: Duration::from_secs(10),
            artifacts: None,
            telemetry: Telemetry::default(),
            secrets_dir: None,
            metrics_listen: None,
        }
    }
}

/// The machine's own name where it is one that a worker may have, else `worker`.
#[allow(clippy::expect_used, reason = "a constant that is a name")]
fn default_name() -> WorkerName {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .and_then(|name| WorkerName::new(name.trim()).ok())
        .unwrap_or_else(|| WorkerName::new("worker").expect("a name"))
}

/// Why a worker could not start.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The configuration cannot be used.
    #[error("the worker's configuration: `{field}` {message}")]
    Config {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The metrics cannot be shown.
    #[error("the worker's metrics cannot be served on `{listen}`: {source}")]
    Metrics {
        /// Where they were to be.
        listen: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The state directory cannot be used.
    #[error("the worker's state directory: cannot {what} `{}`: {source}", path.display())]
    StateDir {
        /// What was to be done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
}
