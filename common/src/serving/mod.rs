//! Models in service: what the leader wants of each serving worker, and what that worker says of it.
//!
//! The leader tells each serving worker the whole of what it is to serve, a [`ServingPlan`]; a newer
//! one replaces the one before. The worker makes it so, goes on with it while nobody leads, and says
//! by [`ServingStatus`] how far it is and what it has counted. What is counted is counted since the
//! worker loaded the version, and only grows: whoever wants to know of a time compares two readings.

mod split;
mod stats;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    access::TokenHash,
    ids::{DeploymentId, Digest, EnvironmentName, ModelName, TokenName},
    time::Timestamp,
};

pub use split::{SHARES, share_of};
pub use stats::{
    DriftedColumn, LATENCY_BOUNDS_MICROS, LatencyHistogram, MAX_DRIFTED_COLUMNS,
    MAX_QUALITY_CLASSES, PREDICTION_BINS, Quality, VersionStats, prediction_bin_of_class,
    prediction_bin_of_probability, prediction_bin_of_value, psi,
};

/// The most models of one plan.
pub const MAX_SERVED_MODELS: usize = 256;
/// The most versions of one model in a plan.
pub const MAX_SERVED_VERSIONS: usize = 8;

/// What a serving worker offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServingOffer {
    /// Where clients reach it, `host:port`, over gRPC and HTTP alike.
    pub address: String,
    /// The one environment whose models it serves.
    pub environment: EnvironmentName,
}

/// All that one worker is to serve.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ServingPlan {
    /// Counts up within the leader's term.
    pub revision: u64,
    /// The models, by name.
    pub models: Vec<ServedModel>,
    /// Say what was counted at least this often.
    pub report_every: Duration,
    /// Who may ask. `None`: everybody.
    pub access: Option<Vec<AllowedToken>>,
}

/// A token that may ask, by what is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedToken {
    /// Its name.
    pub name: TokenName,
    /// What is known of it.
    pub hash: TokenHash,
    /// Until when it is valid.
    pub expires_at: Option<Timestamp>,
}

/// A model that is to be served.
#[derive(Debug, Clone, PartialEq)]
pub struct ServedModel {
    /// Which.
    pub model: ModelName,
    /// How much it may take.
    pub limits: ServingLimits,
    /// Where the model's other replicas answer: what is told here of a request that one of them has
    /// answered is told on to them.
    pub peers: Vec<String>,
    /// Its versions. At most one is [`Traffic::Live`], at most one a canary, at most one a shadow.
    pub versions: Vec<ServedVersion>,
}

/// A version that is to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedVersion {
    /// From 1.
    pub version: u32,
    /// The deployment that brings it.
    pub deployment: DeploymentId,
    /// The manifest of its artifact.
    pub artifact: Digest,
    /// The requests that it gets.
    pub traffic: Traffic,
}

/// The requests that a version gets. Each is answered by whoever is named in it, whatever this says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Traffic {
    /// All that no canary takes.
    Live,
    /// So many of each [`SHARES`] requests, by a stable hash of the request's id.
    Canary {
        /// Of [`SHARES`].
        share: u16,
    },
    /// A copy of so many of each [`SHARES`] requests; what it answers goes to nobody.
    Shadow {
        /// Of [`SHARES`].
        share: u16,
    },
    /// None; it is loaded and warm, so that it can take over at once.
    Standby,
}

/// How much of a worker one model may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServingLimits {
    /// Rows that are computed together, at most.
    pub max_batch: u32,
    /// How long a request waits for others to be computed with, in microseconds. An idle model never
    /// waits.
    pub max_delay_micros: u64,
    /// Rows that wait, at most; what comes beyond it is refused at once.
    pub max_queue: u32,
    /// Rows of one request, at most.
    pub max_request_rows: u32,
    /// Of each million requests, so many are written to the log of predictions.
    pub log_per_million: u32,
}

impl Default for ServingLimits {
    fn default() -> Self {
        Self {
            max_batch: 64,
            max_delay_micros: 500,
            max_queue: 4096,
            max_request_rows: 1024,
            log_per_million: 10_000,
        }
    }
}

/// How far a worker is with its plan.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ServingStatus {
    /// The newest plan that it has taken over; 0 before the first.
    pub plan: u64,
    /// Whether it takes requests: not while it drains.
    pub ready: bool,
    /// All versions that it has or is about to have.
    pub versions: Vec<VersionStatus>,
}

/// How far a worker is with one version.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionStatus {
    /// The model.
    pub model: ModelName,
    /// The version.
    pub version: u32,
    /// The deployment that brought it.
    pub deployment: DeploymentId,
    /// How far it is.
    pub state: VersionState,
    /// The requests that it gets now, by the last plan that is in force for it.
    pub traffic: Traffic,
    /// What was counted since it was loaded.
    pub stats: VersionStats,
}

/// How far a version is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VersionState {
    /// It is fetched, loaded and warmed up.
    Loading,
    /// It answers.
    Ready,
    /// It cannot be loaded, in one line. The worker tries again by itself where that may help.
    Failed(String),
}
