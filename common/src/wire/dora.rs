//! The metrics of delivery at the wire.

use emberline_proto::v1 as pb;

use super::{WireError, id, optional_id, required, states, time};
use crate::{
    dora::{
        CarriedChange, Counts, DoraReport, DurationBucket, Frequency, FrequencyBucket,
        LeadTimeExplanation, Level, LevelName, PlaceMetrics, Rate, Segment, SegmentKind, Times,
    },
    time::Timestamp,
};

states!(
    DurationBucket,
    pb::DurationBucket,
    "bucket",
    UnderAnHour,
    UnderADay,
    DayToWeek,
    WeekToMonth,
    OneToSixMonths,
    More
);
states!(
    FrequencyBucket,
    pb::FrequencyBucket,
    "bucket",
    OnDemand,
    HourlyToDaily,
    DailyToWeekly,
    WeeklyToMonthly,
    MonthlyToHalfYearly,
    Less
);
states!(LevelName, pb::DoraLevelName, "name", Elite, High, Medium);
states!(
    SegmentKind,
    pb::LeadTimeSegmentKind,
    "kind",
    CommitToPush,
    PushToAccepted,
    CommitToAccepted,
    RetryWait,
    InputsWait,
    CapacityWait,
    BackoffWait,
    LostAttempt,
    Fetch,
    Stage,
    Store,
    Dispatch,
    Deploy,
    Promotion,
    Run,
    Canary,
    Approval
);

impl From<&DoraReport> for pb::DoraReport {
    fn from(report: &DoraReport) -> Self {
        Self {
            since: Some(report.since.into()),
            until: Some(report.until.into()),
            include_rollbacks: report.include_rollbacks,
            failure_window_micros: report.failure_window_micros,
            forgotten_before: report.forgotten_before.map(Into::into),
            places: report.places.iter().map(Into::into).collect(),
        }
    }
}

impl From<&PlaceMetrics> for pb::PlaceMetrics {
    fn from(place: &PlaceMetrics) -> Self {
        Self {
            pipeline: place.pipeline.to_string(),
            environment: place.environment.to_string(),
            counts: Some(place.counts.into()),
            deployment_frequency: place.deployment_frequency.map(Into::into),
            change_lead_time: place.change_lead_time.map(Into::into),
            data_lead_time: place.data_lead_time.map(Into::into),
            change_fail_rate: place.change_fail_rate.map(Into::into),
            recovery_time: place.recovery_time.map(Into::into),
            rework_rate: place.rework_rate.map(Into::into),
        }
    }
}

macro_rules! counts {
    ($($name:ident),+) => {
        impl From<Counts> for pb::DeploymentCounts {
            fn from(counts: Counts) -> Self {
                Self { $($name: counts.$name),+ }
            }
        }
        impl From<pb::DeploymentCounts> for Counts {
            fn from(message: pb::DeploymentCounts) -> Self {
                Self { $($name: message.$name),+ }
            }
        }
    };
}

counts!(
    deployments,
    successful,
    failed,
    not_recovered,
    found_by_time,
    repairs,
    rollbacks,
    caught_before_exposure,
    in_progress,
    unsettled,
    skewed,
    changes_left_out
);

impl From<Level> for pb::DoraLevel {
    fn from(level: Level) -> Self {
        Self {
            year: u32::from(level.year),
            name: level.name.into(),
        }
    }
}

impl TryFrom<pb::DoraLevel> for Level {
    type Error = WireError;
    fn try_from(message: pb::DoraLevel) -> Result<Self, WireError> {
        let year = u16::try_from(message.year);
        Ok(Self {
            year: year.map_err(|_| WireError::new("level.year", "it is no year"))?,
            name: message.name.try_into()?,
        })
    }
}

fn level(message: Option<pb::DoraLevel>) -> Result<Option<Level>, WireError> {
    message.map(Level::try_from).transpose()
}

impl From<Frequency> for pb::Frequency {
    fn from(frequency: Frequency) -> Self {
        Self {
            successful: frequency.successful,
            window_micros: frequency.window_micros,
            per_day: frequency.per_day,
            median_between_micros: frequency.median_between_micros,
            bucket: frequency.bucket.map_or(0, Into::into),
            level: frequency.level.map(Into::into),
        }
    }
}

impl TryFrom<pb::Frequency> for Frequency {
    type Error = WireError;
    fn try_from(message: pb::Frequency) -> Result<Self, WireError> {
        let bucket = (message.bucket != 0).then_some(message.bucket);
        Ok(Self {
            successful: message.successful,
            window_micros: message.window_micros,
            per_day: message.per_day,
            median_between_micros: message.median_between_micros,
            bucket: bucket.map(TryInto::try_into).transpose()?,
            level: level(message.level)?,
        })
    }
}

impl From<Times> for pb::Times {
    fn from(times: Times) -> Self {
        Self {
            count: times.count,
            deployments: times.deployments,
            median_micros: times.median_micros,
            p95_micros: times.p95_micros,
            bucket: times.bucket.into(),
            level: times.level.map(Into::into),
        }
    }
}

impl TryFrom<pb::Times> for Times {
    type Error = WireError;
    fn try_from(message: pb::Times) -> Result<Self, WireError> {
        Ok(Self {
            count: message.count,
            deployments: message.deployments,
            median_micros: message.median_micros,
            p95_micros: message.p95_micros,
            bucket: message.bucket.try_into()?,
            level: level(message.level)?,
        })
    }
}

impl From<Rate> for pb::Rate {
    fn from(rate: Rate) -> Self {
        Self {
            part: rate.part,
            whole: rate.whole,
            ratio: rate.ratio,
            level: rate.level.map(Into::into),
        }
    }
}

impl TryFrom<pb::Rate> for Rate {
    type Error = WireError;
    fn try_from(message: pb::Rate) -> Result<Self, WireError> {
        Ok(Self {
            part: message.part,
            whole: message.whole,
            ratio: message.ratio,
            level: level(message.level)?,
        })
    }
}

fn at(field: &str, message: Option<prost_types::Timestamp>) -> Result<Timestamp, WireError> {
    required(field, time(field, message)?)
}

impl TryFrom<pb::PlaceMetrics> for PlaceMetrics {
    type Error = WireError;
    fn try_from(message: pb::PlaceMetrics) -> Result<Self, WireError> {
        Ok(Self {
            pipeline: id("pipeline", &message.pipeline)?,
            environment: id("environment", &message.environment)?,
            counts: message.counts.unwrap_or_default().into(),
            deployment_frequency: message
                .deployment_frequency
                .map(TryInto::try_into)
                .transpose()?,
            change_lead_time: message
                .change_lead_time
                .map(TryInto::try_into)
                .transpose()?,
            data_lead_time: message.data_lead_time.map(TryInto::try_into).transpose()?,
            change_fail_rate: message
                .change_fail_rate
                .map(TryInto::try_into)
                .transpose()?,
            recovery_time: message.recovery_time.map(TryInto::try_into).transpose()?,
            rework_rate: message.rework_rate.map(TryInto::try_into).transpose()?,
        })
    }
}

impl TryFrom<pb::DoraReport> for DoraReport {
    type Error = WireError;
    fn try_from(message: pb::DoraReport) -> Result<Self, WireError> {
        let places = message.places.into_iter().map(TryInto::try_into);
        Ok(Self {
            since: at("since", message.since)?,
            until: at("until", message.until)?,
            include_rollbacks: message.include_rollbacks,
            failure_window_micros: message.failure_window_micros,
            forgotten_before: time("forgotten_before", message.forgotten_before)?,
            places: places.collect::<Result<_, WireError>>()?,
        })
    }
}

impl From<&LeadTimeExplanation> for pb::LeadTimeExplanation {
    fn from(explanation: &LeadTimeExplanation) -> Self {
        let segments = explanation.segments.iter().map(|s| pb::LeadTimeSegment {
            kind: s.kind.into(),
            task: s.task.as_ref().map(ToString::to_string).unwrap_or_default(),
            attempt: s.attempt.unwrap_or(0),
            from: Some(s.from.into()),
            micros: s.micros,
        });
        let changes = explanation.changes.iter().map(|c| pb::CarriedChange {
            revision: c.revision.clone(),
            committed_at: Some(c.committed_at.into()),
            lead_micros: c.lead_micros,
        });
        Self {
            deployment: explanation.deployment.to_string(),
            pipeline: explanation.pipeline.to_string(),
            environment: explanation.environment.to_string(),
            model: explanation.model.to_string(),
            version: explanation.version,
            run: explanation.run.to_string(),
            trace_id: explanation.trace_id.to_string(),
            revision: explanation.revision.clone().unwrap_or_default(),
            began_at: Some(explanation.began_at.into()),
            finished_at: Some(explanation.finished_at.into()),
            total_micros: explanation.total_micros,
            segments: segments.collect(),
            changes: changes.collect(),
            skewed: explanation.skewed,
            note: explanation.note.clone(),
        }
    }
}

impl TryFrom<pb::LeadTimeExplanation> for LeadTimeExplanation {
    type Error = WireError;
    fn try_from(message: pb::LeadTimeExplanation) -> Result<Self, WireError> {
        let segments = message.segments.into_iter().map(|s| {
            Ok(Segment {
                kind: s.kind.try_into()?,
                task: optional_id("segments.task", &s.task)?,
                attempt: (s.attempt > 0).then_some(s.attempt),
                from: at("segments.from", s.from)?,
                micros: s.micros,
            })
        });
        let changes = message.changes.into_iter().map(|c| {
            Ok(CarriedChange {
                revision: c.revision,
                committed_at: at("changes.committed_at", c.committed_at)?,
                lead_micros: c.lead_micros,
            })
        });
        let trace_id = message.trace_id.parse();
        Ok(Self {
            deployment: id("deployment", &message.deployment)?,
            pipeline: id("pipeline", &message.pipeline)?,
            environment: id("environment", &message.environment)?,
            model: id("model", &message.model)?,
            version: message.version,
            run: id("run", &message.run)?,
            trace_id: trace_id.map_err(|why: &str| WireError::new("trace_id", why))?,
            revision: Some(message.revision).filter(|revision| !revision.is_empty()),
            began_at: at("began_at", message.began_at)?,
            finished_at: at("finished_at", message.finished_at)?,
            total_micros: message.total_micros,
            segments: segments.collect::<Result<_, WireError>>()?,
            changes: changes.collect::<Result<_, WireError>>()?,
            skewed: message.skewed,
            note: message.note,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ids::DeploymentId;

    fn times(level: Option<Level>) -> Times {
        Times {
            count: 3,
            deployments: 2,
            median_micros: 10,
            p95_micros: 20,
            bucket: DurationBucket::WeekToMonth,
            level,
        }
    }

    #[test]
    fn a_report_comes_back_as_it_was_sent() {
        let level = Some(Level {
            year: 2023,
            name: LevelName::Medium,
        });
        let rate = |part| Rate {
            part,
            whole: 4,
            ratio: 0.25,
            level: None,
        };
        let sent = DoraReport {
            since: Timestamp(1),
            until: Timestamp(2),
            include_rollbacks: true,
            failure_window_micros: 3,
            forgotten_before: Some(Timestamp(4)),
            places: vec![
                PlaceMetrics {
                    pipeline: "p".parse().unwrap(),
                    environment: "production".parse().unwrap(),
                    counts: Counts {
                        deployments: 1,
                        successful: 2,
                        failed: 3,
                        not_recovered: 4,
                        found_by_time: 5,
                        repairs: 6,
                        rollbacks: 7,
                        caught_before_exposure: 8,
                        in_progress: 9,
                        unsettled: 10,
                        skewed: 11,
                        changes_left_out: 12,
                    },
                    deployment_frequency: Some(Frequency {
                        successful: 0,
                        window_micros: 5,
                        per_day: 0.5,
                        median_between_micros: Some(0),
                        bucket: None,
                        level,
                    }),
                    change_lead_time: Some(times(level)),
                    data_lead_time: Some(times(None)),
                    change_fail_rate: Some(rate(1)),
                    recovery_time: Some(times(None)),
                    rework_rate: Some(rate(2)),
                },
                PlaceMetrics {
                    pipeline: "p".parse().unwrap(),
                    environment: "staging".parse().unwrap(),
                    counts: Counts::default(),
                    deployment_frequency: None,
                    change_lead_time: None,
                    data_lead_time: None,
                    change_fail_rate: None,
                    recovery_time: None,
                    rework_rate: None,
                },
            ],
        };
        let came = DoraReport::try_from(pb::DoraReport::from(&sent)).unwrap();
        assert_eq!(came, sent);
        let stored = serde_json::to_string(&sent).unwrap();
        assert!(stored.contains(r#""since":"1970-01-01T00:00:00.000001Z""#));
        assert_eq!(serde_json::from_str::<DoraReport>(&stored).unwrap(), sent);
    }

    #[test]
    fn an_explanation_comes_back_as_it_was_sent() {
        let sent = LeadTimeExplanation {
            deployment: DeploymentId(17),
            pipeline: "p".parse().unwrap(),
            environment: "production".parse().unwrap(),
            model: "m".parse().unwrap(),
            version: 3,
            run: "r".parse().unwrap(),
            trace_id: "0af7651916cd43dd8448eb211c80319c".parse().unwrap(),
            revision: None,
            began_at: Timestamp(10),
            finished_at: Timestamp(30),
            total_micros: 20,
            segments: vec![
                Segment {
                    kind: SegmentKind::CommitToAccepted,
                    task: None,
                    attempt: None,
                    from: Timestamp(10),
                    micros: 15,
                },
                Segment {
                    kind: SegmentKind::Stage,
                    task: Some("train".parse().unwrap()),
                    attempt: Some(2),
                    from: Timestamp(25),
                    micros: 5,
                },
            ],
            changes: vec![CarriedChange {
                revision: "4f2a".to_owned(),
                committed_at: Timestamp(10),
                lead_micros: 20,
            }],
            skewed: true,
            note: "so".to_owned(),
        };
        let came = LeadTimeExplanation::try_from(pb::LeadTimeExplanation::from(&sent)).unwrap();
        assert_eq!(came, sent);
        let stored = serde_json::to_string(&sent).unwrap();
        let read: LeadTimeExplanation = serde_json::from_str(&stored).unwrap();
        assert_eq!(read, sent);
    }
}
