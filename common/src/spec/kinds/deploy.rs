//! `deploy`: a model into the registry, and into service in an environment.
//!
//! In: `model`, optionally `evaluation`. Out: `version`.
//! The leader registers the version in the commit of the task: it happens once, or not at all. From
//! then on the deployment goes its way by itself, whatever becomes of the run.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{Alias, EnvironmentName, ModelName},
    serving::{SHARES, ServingLimits},
    spec::DurationText,
};

/// Registers the input `model` as an immutable version, and puts it into service in an environment: serving workers load it, it takes over by the strategy, and the alias moves to it when it is live. The same model a second time is the same version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeploySpec {
    /// The name in the registry.
    pub model: ModelName,
    /// The alias to move to the version when it is live, e.g. `champion`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<Alias>,
    /// Where the version becomes live. Each deployment is recorded, and counts in the metrics of delivery.
    #[serde(default = "EnvironmentName::production")]
    pub environment: EnvironmentName,
    /// Notes for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub notes: Option<String>,
    /// Serving workers that load it; with fewer in the environment, all of them.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 256))]
    pub replicas: u32,
    /// How it takes over from the version that is live. The first version of an environment takes over at once. Where the environment has no serving worker, `all_at_once` makes it live as soon as it is registered; the others wait for one.
    #[serde(default, skip_serializing_if = "Strategy::is_plain")]
    pub strategy: Strategy,
    /// How much of a worker it may take.
    #[serde(default, skip_serializing_if = "ServingSpec::is_default")]
    pub serving: ServingSpec,
    /// Let it take over although it takes other columns than the live version, and so refuses what clients send now.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_schema_change: bool,
    /// How long it may take to be loaded, and each step to see enough requests; then it is given up.
    #[serde(default = "ten_minutes")]
    pub progress_deadline: DurationText,
}

const fn one() -> u32 {
    1
}
const fn ten_minutes() -> DurationText {
    DurationText(Duration::from_secs(600))
}

/// How a version takes over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Strategy {
    /// It takes all requests as soon as every replica has it loaded; what was live before stays loaded.
    AllAtOnce {
        /// Go back by itself when one of these is broken within `watch_for`.
        #[serde(default, skip_serializing_if = "Conditions::is_empty")]
        conditions: Conditions,
        /// How long to watch it after it is live.
        #[serde(default = "no_time")]
        watch_for: DurationText,
        /// Requests that have to be answered before a condition is judged.
        #[serde(default = "min_requests")]
        min_requests: u64,
    },
    /// It takes a growing share of the requests, and all of them after the last step; when a condition is broken it takes none any more.
    Canary {
        /// The shares, one after the other.
        #[schemars(length(min = 1, max = 20))]
        steps: Vec<CanaryStep>,
        /// Requests that the new version has to have answered in a step before conditions are judged and the step can end.
        #[serde(default = "min_requests")]
        min_requests: u64,
        /// What must hold.
        #[serde(default, skip_serializing_if = "Conditions::is_empty")]
        conditions: Conditions,
        /// A person has to say yes after the last step.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        approval: bool,
        /// How long to watch it after it is live.
        #[serde(default = "no_time")]
        watch_for: DurationText,
    },
    /// It gets a copy of requests, and its answers go to nobody; then it takes over at once.
    Shadow {
        /// Percent of the requests that are copied.
        #[serde(default = "all")]
        #[schemars(range(min = 0.01, max = 100.0))]
        weight: f64,
        /// How long.
        #[serde(rename = "for")]
        hold: DurationText,
        /// Requests that have to be copied before conditions are judged.
        #[serde(default = "min_requests")]
        min_requests: u64,
        /// What must hold.
        #[serde(default, skip_serializing_if = "Conditions::is_empty")]
        conditions: Conditions,
        /// A person has to say yes before it takes over.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        approval: bool,
        /// How long to watch it after it is live.
        #[serde(default = "no_time")]
        watch_for: DurationText,
    },
}

impl Default for Strategy {
    fn default() -> Self {
        Self::AllAtOnce {
            conditions: Conditions::default(),
            watch_for: no_time(),
            min_requests: min_requests(),
        }
    }
}

impl Strategy {
    /// Whether it is what is done if nothing is said.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// What must hold.
    #[must_use]
    pub const fn conditions(&self) -> &Conditions {
        match self {
            Self::AllAtOnce { conditions, .. }
            | Self::Canary { conditions, .. }
            | Self::Shadow { conditions, .. } => conditions,
        }
    }

    /// Requests before a condition is judged.
    #[must_use]
    pub const fn min_requests(&self) -> u64 {
        match self {
            Self::AllAtOnce { min_requests, .. }
            | Self::Canary { min_requests, .. }
            | Self::Shadow { min_requests, .. } => *min_requests,
        }
    }

    /// How long it is watched after it is live.
    #[must_use]
    pub const fn watch_for(&self) -> Duration {
        match self {
            Self::AllAtOnce { watch_for, .. }
            | Self::Canary { watch_for, .. }
            | Self::Shadow { watch_for, .. } => watch_for.0,
        }
    }

    /// Whether a person has to say yes.
    #[must_use]
    pub const fn approval(&self) -> bool {
        match self {
            Self::AllAtOnce { .. } => false,
            Self::Canary { approval, .. } | Self::Shadow { approval, .. } => *approval,
        }
    }

    /// The name as written.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::AllAtOnce { .. } => "all_at_once",
            Self::Canary { .. } => "canary",
            Self::Shadow { .. } => "shadow",
        }
    }
}

const fn no_time() -> DurationText {
    DurationText(Duration::ZERO)
}
const fn min_requests() -> u64 {
    100
}
const fn all() -> f64 {
    100.0
}

/// One share of the requests, for a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CanaryStep {
    /// Percent of the requests.
    #[schemars(range(min = 0.01, max = 100.0))]
    pub weight: f64,
    /// How long, at least.
    #[serde(rename = "for")]
    pub hold: DurationText,
}

/// What must hold of the new version. Each is judged over the step under way.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Conditions {
    /// Failed requests among all, e.g. `0.01`. Requests that are refused for what they hold do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub max_error_rate: Option<f64>,
    /// How long answers may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_latency: Option<LatencyCondition>,
    /// How far its predictions may be from those of the live version over the same time: the population stability index. 0.1 is a small shift, 0.25 a large one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub max_prediction_drift: Option<f64>,
    /// How good it must be, by the labels that come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<QualityCondition>,
}

impl Conditions {
    /// Whether nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// How long answers may take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LatencyCondition {
    /// Which quantile of all.
    #[serde(default = "p99")]
    #[schemars(range(min = 0.01, max = 0.9999))]
    pub quantile: f64,
    /// It may be this long, at most.
    pub limit: DurationText,
}

const fn p99() -> f64 {
    0.99
}

/// How good it must be, beside the live version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QualityCondition {
    /// By what.
    pub metric: QualityMetric,
    /// How much worse than the live version it may be, in the metric's own units.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub tolerance: f64,
    /// Labels of both versions that have to be there before it is judged; the new version waits for them.
    #[serde(default = "min_labels")]
    pub min_labels: u64,
}

const fn min_labels() -> u64 {
    50
}

/// What is measured by labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum QualityMetric {
    /// The share of right classes.
    Accuracy,
    /// The F1 of the second of two classes, else the mean of all classes' F1.
    F1,
    /// The mean of −ln of the probability of the truth; smaller is better.
    LogLoss,
    /// The root of the mean squared error; smaller is better.
    Rmse,
}

impl QualityMetric {
    /// The name as written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accuracy => "accuracy",
            Self::F1 => "f1",
            Self::LogLoss => "log_loss",
            Self::Rmse => "rmse",
        }
    }
}

/// How much of a worker a model may take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServingSpec {
    /// Rows that are computed together, at most.
    #[schemars(range(min = 1, max = 4096))]
    pub max_batch: u32,
    /// How long a request waits for others to be computed with; an idle model never waits.
    pub max_delay: DurationText,
    /// Rows that wait, at most; what comes beyond that is refused.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_queue: u32,
    /// Rows of one request, at most.
    #[schemars(range(min = 1, max = 65_536))]
    pub max_request_rows: u32,
    /// Percent of the requests that are written to the log of predictions.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub log_percent: f64,
}

impl Default for ServingSpec {
    fn default() -> Self {
        let limits = ServingLimits::default();
        Self {
            max_batch: limits.max_batch,
            max_delay: DurationText(Duration::ZERO),
            max_queue: limits.max_queue,
            max_request_rows: limits.max_request_rows,
            log_percent: 1.0,
        }
    }
}

impl ServingSpec {
    /// Whether nothing was said.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The same in the words of the plan.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a percentage that was checked"
    )]
    pub fn limits(&self) -> ServingLimits {
        ServingLimits {
            max_batch: self.max_batch,
            max_delay_micros: u64::try_from(self.max_delay.0.as_micros()).unwrap_or(u64::MAX),
            max_queue: self.max_queue,
            max_request_rows: self.max_request_rows,
            log_per_million: (self.log_percent.clamp(0.0, 100.0) * 10_000.0).round() as u32,
        }
    }
}

/// Percent as parts of [`SHARES`].
#[must_use]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "within the bounds"
)]
pub fn share(percent: f64) -> u16 {
    (percent * f64::from(SHARES) / 100.0)
        .round()
        .clamp(0.0, f64::from(SHARES)) as u16
}
