//! The metrics of delivery: DORA's five, computed for a pipeline, an environment and a window of
//! time; and one deployment's lead time, cut into segments.
//!
//! Only the words and figures are here, as the API, the command line and the report share them. The
//! coordinator computes them. Spans of time are whole microseconds; everything is in UTC, where a day
//! has 86,400 seconds on every date.
//!
//! The buckets are those of DORA's Quick Check (<https://dora.dev/quickcheck/>), the levels those of
//! the clusters in the *Accelerate State of DevOps Report 2023*. Later reports have other clusters or
//! none: a level is never shown without its year.

use std::{fmt, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    ids::{DeploymentId, EnvironmentName, ModelName, PipelineName, RunId, TaskName},
    time::{Timestamp, rfc3339},
    trace::TraceId,
};

/// How long after it became live a deployment can fail, if nothing else is asked for.
pub const FAILURE_WINDOW: Duration = Duration::from_secs(86_400);
/// How far back is looked, if nothing else is asked for.
pub const WINDOW: Duration = Duration::from_secs(30 * 86_400);

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoraQuery {
    /// The first instant that counts.
    pub since: Timestamp,
    /// The first instant that does not count any more.
    pub until: Timestamp,
    /// Only deployments of this pipeline.
    pub pipeline: Option<PipelineName>,
    /// Only deployments into this environment.
    pub environment: Option<EnvironmentName>,
    /// Whether rollbacks count as deployments too.
    pub include_rollbacks: bool,
    /// How long after it became live a deployment can fail.
    pub failure_window: Duration,
}

impl DoraQuery {
    /// Everything in the time that is looked back if nothing else is asked for.
    #[must_use]
    pub fn lately(now: Timestamp) -> Self {
        Self::within(now.before(WINDOW), now)
    }

    /// Everything in that window.
    #[must_use]
    pub const fn within(since: Timestamp, until: Timestamp) -> Self {
        Self {
            since,
            until,
            pipeline: None,
            environment: None,
            include_rollbacks: false,
            failure_window: FAILURE_WINDOW,
        }
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DoraReport {
    /// The first instant that counts.
    #[serde(with = "rfc3339")]
    pub since: Timestamp,
    /// The first instant that does not count any more; never in the future.
    #[serde(with = "rfc3339")]
    pub until: Timestamp,
    /// Whether rollbacks count as deployments too.
    pub include_rollbacks: bool,
    /// How long after it became live a deployment can fail, in microseconds.
    pub failure_window_micros: u64,
    /// Deployments before this were forgotten: the window reaches further back than the records.
    #[serde(
        default,
        with = "rfc3339::option",
        skip_serializing_if = "Option::is_none"
    )]
    pub forgotten_before: Option<Timestamp>,
    /// One for each pipeline and environment that fit and that ever had a deployment, in the order of
    /// their names.
    pub places: Vec<PlaceMetrics>,
}

/// The metrics of one pipeline in one environment. A metric that there is nothing to compute from is
/// `None`: it is not zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlaceMetrics {
    /// The pipeline.
    pub pipeline: PipelineName,
    /// The environment.
    pub environment: EnvironmentName,
    /// What was counted.
    pub counts: Counts,
    /// How often.
    pub deployment_frequency: Option<Frequency>,
    /// From the commit of a change to its first being live.
    pub change_lead_time: Option<Times>,
    /// From the arrival of data to its first being live, in a model.
    pub data_lead_time: Option<Times>,
    /// Failed deployments of all deployments.
    pub change_fail_rate: Option<Rate>,
    /// From the beginning of a failure to the next good version being live.
    pub recovery_time: Option<Times>,
    /// Repairs and rollbacks of all deployments and rollbacks.
    pub rework_rate: Option<Rate>,
}

impl PlaceMetrics {
    /// Whether the window holds nothing at all.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        let Counts {
            deployments,
            rollbacks,
            caught_before_exposure,
            in_progress,
            ..
        } = self.counts;
        deployments == 0 && rollbacks == 0 && caught_before_exposure == 0 && in_progress == 0
    }
}

/// How figures are written where metrics are shown: a terminal and a page differ.
pub trait Figures {
    /// A span of so many microseconds.
    fn span(&self, micros: u64) -> String;
    /// Any number.
    fn number(&self, number: f64) -> String;
    /// A ratio, in percent.
    fn percent(&self, ratio: f64) -> String;
    /// A count.
    fn count(&self, count: u64) -> String;
    /// How many of what.
    fn plural(&self, count: u64, one: &str) -> String {
        let ending = if count == 1 { "" } else { "s" };
        format!("{} {one}{ending}", self.count(count))
    }
}

/// One metric in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricRow {
    /// Which.
    pub name: &'static str,
    /// What it is, or why there is none.
    pub value: String,
    /// From what.
    pub detail: String,
    /// The answer of DORA's Quick Check.
    pub bucket: String,
    /// The level with its year.
    pub level: String,
}

impl MetricRow {
    fn none(name: &'static str, why: &str) -> Self {
        Self {
            name,
            value: why.to_owned(),
            detail: String::new(),
            bucket: String::new(),
            level: String::new(),
        }
    }
}

fn in_words(level: Option<Level>) -> String {
    level.map(|level| level.to_string()).unwrap_or_default()
}

impl PlaceMetrics {
    /// All metrics in words, in the order in which they are shown.
    #[must_use]
    pub fn rows(&self, figures: &impl Figures) -> [MetricRow; 6] {
        let times = |name, times: Option<Times>, one: &str, none: &str| {
            let Some(times) = times else {
                return MetricRow::none(name, none);
            };
            let (p95, count) = (
                figures.span(times.p95_micros),
                figures.plural(times.count, one),
            );
            MetricRow {
                name,
                value: figures.span(times.median_micros),
                detail: format!("p95 {p95}, {count}"),
                bucket: times.bucket.to_string(),
                level: in_words(times.level),
            }
        };
        let rate = |name, rate: Option<Rate>| {
            let Some(rate) = rate else {
                return MetricRow::none(name, "no deployments");
            };
            MetricRow {
                name,
                value: figures.percent(rate.ratio),
                detail: format!(
                    "{} of {}",
                    figures.count(rate.part),
                    figures.count(rate.whole)
                ),
                bucket: String::new(),
                level: in_words(rate.level),
            }
        };
        let recovery = match self.counts.not_recovered {
            0 => "no failure",
            _ => "not recovered",
        };
        [
            self.frequency_row(figures),
            times(
                "change lead time",
                self.change_lead_time,
                "change",
                "no change",
            ),
            times(
                "data lead time",
                self.data_lead_time,
                "data version",
                "no new data",
            ),
            rate("change fail rate", self.change_fail_rate),
            times("recovery time", self.recovery_time, "failure", recovery),
            rate("rework rate", self.rework_rate),
        ]
    }

    fn frequency_row(&self, figures: &impl Figures) -> MetricRow {
        const NAME: &str = "deployment frequency";
        let Some(frequency) = self.deployment_frequency else {
            return MetricRow::none(NAME, "no deployments");
        };
        let successful = figures.plural(frequency.successful, "deployment");
        MetricRow {
            name: NAME,
            value: format!("{} a day", figures.number(frequency.per_day)),
            detail: match frequency.median_between_micros {
                Some(between) => format!("{successful}, median {} apart", figures.span(between)),
                None => successful,
            },
            bucket: frequency.bucket.map(|b| b.to_string()).unwrap_or_default(),
            level: in_words(frequency.level),
        }
    }
}

/// What was counted in the window: each deployment by when it was live or given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Deployments that answered for someone. With rollbacks only where they were asked for.
    pub deployments: u64,
    /// Of those, the ones that became live.
    pub successful: u64,
    /// Of the deployments, the ones that failed within their failure window.
    pub failed: u64,
    /// Of the failed ones, those that are not over yet.
    pub not_recovered: u64,
    /// Of the failed ones, those that were found only by what was live at the time of an incident.
    pub found_by_time: u64,
    /// Deployments that were started to repair a failed one. Rollbacks are not among them.
    pub repairs: u64,
    /// Rollbacks.
    pub rollbacks: u64,
    /// Stopped before they had answered for anyone: neither deployments nor failures.
    pub caught_before_exposure: u64,
    /// Begun in the window, and still under way.
    pub in_progress: u64,
    /// Deployments whose failure window is not over yet: they may still fail.
    pub unsettled: u64,
    /// Spans of time that would have been negative, because clocks differ. They count as zero.
    pub skewed: u64,
    /// Older commits that the deployments carried but did not name. They are in no lead time.
    pub changes_left_out: u64,
}

/// How often something became live.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Frequency {
    /// How many became live.
    pub successful: u64,
    /// The window's length in microseconds.
    pub window_micros: u64,
    /// How many each day.
    pub per_day: f64,
    /// The median time between two that follow each other; `None` for fewer than two.
    pub median_between_micros: Option<u64>,
    /// DORA's bucket; `None` if nothing became live.
    pub bucket: Option<FrequencyBucket>,
    /// The level.
    pub level: Option<Level>,
}

/// Several spans of time, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// How many there are: changes, data versions or failures; at least one.
    pub count: u64,
    /// From how many deployments.
    pub deployments: u64,
    /// The median: of an even number, the mean of the two in the middle.
    pub median_micros: u64,
    /// The smallest span that at least 95 % are not longer than (nearest rank).
    pub p95_micros: u64,
    /// DORA's bucket of the median.
    pub bucket: DurationBucket,
    /// The level of the median, where one is defined.
    pub level: Option<Level>,
}

/// A part of a whole.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// How many of them.
    pub part: u64,
    /// How many in all; at least one.
    pub whole: u64,
    /// `part ÷ whole`, from 0 to 1.
    pub ratio: f64,
    /// The level, where one is defined.
    pub level: Option<Level>,
}

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident $id:literal $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $id)] $variant,)+
        }

        impl $name {
            /// The name as stored.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $id,)+ }
            }
        }

        impl fmt::Display for $name {
            /// The name for people.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$variant => $text,)+ })
            }
        }
    };
}

named!(
    /// Which answer of DORA's Quick Check a span of time is. A month has 30 days here.
    DurationBucket {
        /// Less than an hour.
        UnderAnHour "under_an_hour" "under an hour",
        /// Less than a day.
        UnderADay "under_a_day" "under a day",
        /// From a day to less than a week.
        DayToWeek "day_to_week" "a day to a week",
        /// From a week to less than a month.
        WeekToMonth "week_to_month" "a week to a month",
        /// From one month to less than six.
        OneToSixMonths "one_to_six_months" "one to six months",
        /// Six months or more.
        More "more" "more than six months",
    }
);

named!(
    /// Which answer of DORA's Quick Check a frequency is. A month has 30 days here.
    FrequencyBucket {
        /// More often than once an hour.
        OnDemand "on_demand" "on demand",
        /// More often than once a day.
        HourlyToDaily "hourly_to_daily" "hourly to daily",
        /// Once a day, down to more often than once a week.
        DailyToWeekly "daily_to_weekly" "daily to weekly",
        /// Once a week, down to more often than once a month.
        WeeklyToMonthly "weekly_to_monthly" "weekly to monthly",
        /// Once a month, down to more often than once in six months.
        MonthlyToHalfYearly "monthly_to_half_yearly" "monthly to half-yearly",
        /// Once in six months, or less often.
        Less "less" "less than half-yearly",
    }
);

named!(
    /// A cluster of DORA's report.
    LevelName {
        /// The best.
        Elite "elite" "elite",
        /// The second.
        High "high" "high",
        /// The third.
        Medium "medium" "medium",
    }
);

/// A performance level, with the year of the report that defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Level {
    /// The year.
    pub year: u16,
    /// The cluster.
    pub name: LevelName,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{} ({})", self.name, self.year))
    }
}

/// A change that a deployment was the first to carry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedChange {
    /// The commit's id, or the SHA-256 of the pipeline's text.
    pub revision: String,
    /// When it was committed.
    #[serde(with = "rfc3339")]
    pub committed_at: Timestamp,
    /// From then to its being live, in microseconds.
    pub lead_micros: u64,
}

/// Where the lead time of one deployment went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeadTimeExplanation {
    /// The deployment.
    #[serde(serialize_with = "shown", deserialize_with = "read")]
    pub deployment: DeploymentId,
    /// The pipeline.
    pub pipeline: PipelineName,
    /// The environment.
    pub environment: EnvironmentName,
    /// The model.
    pub model: ModelName,
    /// Its version; 0 if there was none.
    pub version: u32,
    /// The run that deployed it.
    pub run: RunId,
    /// The trace of all of it.
    pub trace_id: TraceId,
    /// What the run was started for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// When the first segment begins: the commit of `revision`, else when the run was accepted or the
    /// rollback asked for.
    #[serde(with = "rfc3339")]
    pub began_at: Timestamp,
    /// When the last segment ends: the version was live, or was given up.
    #[serde(with = "rfc3339")]
    pub finished_at: Timestamp,
    /// All of it, in microseconds: exactly the sum of the segments.
    pub total_micros: u64,
    /// The segments, without gap or overlap, in the order of time.
    pub segments: Vec<Segment>,
    /// The changes that this deployment is the first to carry here; of many, the newest 256.
    pub changes: Vec<CarriedChange>,
    /// Whether points in time were moved, because the clocks that told them differ.
    pub skewed: bool,
    /// One line for people: what is not known, or is not as usual.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

fn shown<S: Serializer>(id: &DeploymentId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DeploymentId, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
    text.parse().map_err(D::Error::custom)
}

/// A piece of a lead time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// What happened meanwhile.
    pub kind: SegmentKind,
    /// The task that it is about, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskName>,
    /// The attempt of that task, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// When it begins: where the segment before it ends.
    #[serde(with = "rfc3339")]
    pub from: Timestamp,
    /// How long it is, in microseconds.
    pub micros: u64,
}

/// What the page about a run tells of delivery.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Delivery {
    /// Where the run's trace can be looked at; empty if nobody has said where.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub trace_url: String,
    /// What the run has deployed so far, each with its lead time explained.
    pub deployments: Vec<LeadTimeExplanation>,
    /// The metrics of its pipeline.
    pub metrics: DoraReport,
}

impl Segment {
    /// What it is about, in words: the task, and which attempt if it was not the first. May be empty.
    #[must_use]
    pub fn about(&self) -> String {
        match (&self.task, self.attempt) {
            (Some(task), Some(attempt)) if attempt > 1 => format!("{task}, attempt {attempt}"),
            (Some(task), _) => task.to_string(),
            (None, _) => String::new(),
        }
    }
}

named!(
    /// What happened in a segment of the lead time.
    SegmentKind {
        /// The commit was not pushed (or merged) yet.
        CommitToPush "commit_to_push" "commit → push",
        /// Pushed, and no run was started for it yet.
        PushToAccepted "push_to_accepted" "push → run accepted",
        /// No run was started for it yet; when it was pushed is not known.
        CommitToAccepted "commit_to_accepted" "commit → run accepted",
        /// The run had ended without success, and waited for somebody to start it again.
        RetryWait "retry_wait" "waiting for a retry",
        /// A task waited for its inputs or its turn.
        InputsWait "inputs_wait" "waiting for inputs",
        /// A task waited for a worker.
        CapacityWait "capacity_wait" "waiting for capacity",
        /// A task waited for its next attempt, after one that did not succeed.
        BackoffWait "backoff_wait" "backoff",
        /// An attempt that did not succeed.
        LostAttempt "lost_attempt" "lost attempt",
        /// An attempt fetched its inputs.
        Fetch "fetch" "transfer in",
        /// The stage itself.
        Stage "stage" "stage",
        /// An attempt stored its outputs.
        Store "store" "transfer out",
        /// The rest of an attempt: on its way to the worker, and its report on the way back.
        Dispatch "dispatch" "dispatch and report",
        /// The deploy stage itself: the version was registered.
        Deploy "deploy" "deploy",
        /// From the end of the deploy task to the version being live, but for what follows: loading it,
        /// and letting it take over.
        Promotion "promotion" "promotion",
        /// The run; of its tasks nothing is known any more.
        Run "run" "run",
        /// The version was tried by a share of the requests, or by copies of them.
        Canary "canary" "canary",
        /// The version waited for a person to say yes.
        Approval "approval" "waiting for approval",
    }
);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_shown_with_its_year() {
        let level = Level {
            year: 2023,
            name: LevelName::Elite,
        };
        assert_eq!(format!("{level:>14}|"), "  elite (2023)|");
    }

    #[test]
    fn names_are_stored_as_they_are_told() {
        let stored = serde_json::to_string(&FrequencyBucket::MonthlyToHalfYearly).unwrap();
        assert_eq!(stored, r#""monthly_to_half_yearly""#);
        assert_eq!(
            FrequencyBucket::MonthlyToHalfYearly.as_str(),
            "monthly_to_half_yearly"
        );
        assert_eq!(
            FrequencyBucket::MonthlyToHalfYearly.to_string(),
            "monthly to half-yearly"
        );
    }
}
