//! Models in service at the wire. What a worker says of itself is bounded here.

use std::time::Duration;

use emberline_proto::v1 as pb;

use super::{WireError, id, required};
use crate::serving::{
    AllowedToken, DriftedColumn, LATENCY_BOUNDS_MICROS, LatencyHistogram, MAX_DRIFTED_COLUMNS,
    MAX_QUALITY_CLASSES, MAX_SERVED_MODELS, MAX_SERVED_VERSIONS, PREDICTION_BINS, Quality, SHARES,
    ServedModel, ServedVersion, ServingLimits, ServingOffer, ServingPlan, ServingStatus, Traffic,
    VersionState, VersionStats, VersionStatus,
};
use crate::time::Timestamp;

/// The most tokens that may ask.
const MAX_ALLOWED_TOKENS: usize = 20_000;
/// The longest line about what went wrong, in bytes.
const MAX_WHY_BYTES: usize = 512;
/// The longest address.
const MAX_ADDRESS_BYTES: usize = 256;

fn at_most<T>(field: &str, items: &[T], most: usize) -> Result<(), WireError> {
    if items.len() > most {
        let what = format!("has {} entries, at most {most} are taken", items.len());
        return Err(WireError::new(field, what));
    }
    Ok(())
}

impl From<&ServingOffer> for pb::ServingOffer {
    fn from(offer: &ServingOffer) -> Self {
        Self {
            address: offer.address.clone(),
            environment: offer.environment.to_string(),
        }
    }
}

impl TryFrom<pb::ServingOffer> for ServingOffer {
    type Error = WireError;

    fn try_from(message: pb::ServingOffer) -> Result<Self, WireError> {
        let address = message.address;
        if address.is_empty()
            || address.len() > MAX_ADDRESS_BYTES
            || !address.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(WireError::new("address", "say `host:port`"));
        }
        Ok(Self {
            address,
            environment: id("environment", &message.environment)?,
        })
    }
}

impl From<Traffic> for pb::Traffic {
    fn from(traffic: Traffic) -> Self {
        use pb::TrafficKind as Kind;
        let (kind, share) = match traffic {
            Traffic::Live => (Kind::Live, 0),
            Traffic::Canary { share } => (Kind::Canary, share),
            Traffic::Shadow { share } => (Kind::Shadow, share),
            Traffic::Standby => (Kind::Standby, 0),
        };
        Self {
            kind: kind.into(),
            share: share.into(),
        }
    }
}

impl TryFrom<pb::Traffic> for Traffic {
    type Error = WireError;

    fn try_from(message: pb::Traffic) -> Result<Self, WireError> {
        let share = u16::try_from(message.share).ok();
        let share = share.filter(|share| *share <= SHARES).ok_or_else(|| {
            WireError::new("share", format!("{} is more than {SHARES}", message.share))
        })?;
        match message.kind() {
            pb::TrafficKind::Live => Ok(Self::Live),
            pb::TrafficKind::Canary => Ok(Self::Canary { share }),
            pb::TrafficKind::Shadow => Ok(Self::Shadow { share }),
            pb::TrafficKind::Standby => Ok(Self::Standby),
            pb::TrafficKind::Unspecified => Err(WireError::new("kind", "it is not set")),
        }
    }
}

impl From<&ServingPlan> for pb::ServingPlan {
    fn from(plan: &ServingPlan) -> Self {
        Self {
            revision: plan.revision,
            models: plan.models.iter().map(Into::into).collect(),
            report_every_ms: u32::try_from(plan.report_every.as_millis()).unwrap_or(u32::MAX),
            access: plan.access.as_ref().map(|tokens| pb::ServingAccess {
                tokens: tokens.iter().map(Into::into).collect(),
            }),
        }
    }
}

impl From<&ServedModel> for pb::ServedModel {
    fn from(model: &ServedModel) -> Self {
        let limits = model.limits;
        let versions = model.versions.iter().map(|version| pb::ServedVersion {
            version: version.version,
            deployment: version.deployment.to_string(),
            artifact: version.artifact.to_string(),
            traffic: Some(version.traffic.into()),
        });
        Self {
            model: model.model.to_string(),
            max_batch: limits.max_batch,
            max_delay_micros: limits.max_delay_micros,
            max_queue: limits.max_queue,
            max_request_rows: limits.max_request_rows,
            log_per_million: limits.log_per_million,
            peers: model.peers.clone(),
            versions: versions.collect(),
        }
    }
}

impl TryFrom<pb::ServingPlan> for ServingPlan {
    type Error = WireError;

    fn try_from(message: pb::ServingPlan) -> Result<Self, WireError> {
        at_most("models", &message.models, MAX_SERVED_MODELS)?;
        let models = message.models.into_iter().map(TryInto::try_into);
        Ok(Self {
            revision: message.revision,
            models: models
                .collect::<Result<_, WireError>>()
                .map_err(|e| e.within("models"))?,
            report_every: Duration::from_millis(message.report_every_ms.max(20).into()),
            access: message.access.map(allowed).transpose()?,
        })
    }
}

impl From<&AllowedToken> for pb::AllowedToken {
    fn from(token: &AllowedToken) -> Self {
        Self {
            name: token.name.to_string(),
            hash: token.hash.to_string(),
            expires_at_micros: token.expires_at.map_or(0, |at| at.0),
        }
    }
}

fn allowed(message: pb::ServingAccess) -> Result<Vec<AllowedToken>, WireError> {
    at_most("access.tokens", &message.tokens, MAX_ALLOWED_TOKENS)?;
    let tokens = message.tokens.into_iter().map(|token| {
        let hash =
            (token.hash.parse()).map_err(|why: &str| WireError::new("access.tokens.hash", why))?;
        Ok(AllowedToken {
            name: id("access.tokens.name", &token.name)?,
            hash,
            expires_at: (token.expires_at_micros > 0).then_some(Timestamp(token.expires_at_micros)),
        })
    });
    tokens.collect()
}

impl TryFrom<pb::ServedModel> for ServedModel {
    type Error = WireError;

    fn try_from(message: pb::ServedModel) -> Result<Self, WireError> {
        at_most("versions", &message.versions, MAX_SERVED_VERSIONS)?;
        let versions = message.versions.into_iter().map(|version| {
            let traffic = required("traffic", version.traffic)?;
            Ok(ServedVersion {
                version: version.version,
                deployment: id("deployment", &version.deployment)?,
                artifact: id("artifact", &version.artifact)?,
                traffic: traffic.try_into()?,
            })
        });
        Ok(Self {
            model: id("model", &message.model)?,
            limits: ServingLimits {
                max_batch: message.max_batch.max(1),
                max_delay_micros: message.max_delay_micros,
                max_queue: message.max_queue.max(1),
                max_request_rows: message.max_request_rows.max(1),
                log_per_million: message.log_per_million,
            },
            peers: message.peers,
            versions: versions
                .collect::<Result<_, WireError>>()
                .map_err(|e| e.within("versions"))?,
        })
    }
}

impl From<&ServingStatus> for pb::ServingStatus {
    fn from(status: &ServingStatus) -> Self {
        Self {
            plan: status.plan,
            ready: status.ready,
            versions: status.versions.iter().map(Into::into).collect(),
        }
    }
}

impl From<&VersionStatus> for pb::VersionStatus {
    fn from(status: &VersionStatus) -> Self {
        let (state, why) = match &status.state {
            VersionState::Loading => (pb::VersionState::Loading, String::new()),
            VersionState::Ready => (pb::VersionState::Ready, String::new()),
            VersionState::Failed(why) => (pb::VersionState::Failed, why.clone()),
        };
        Self {
            model: status.model.to_string(),
            version: status.version,
            deployment: status.deployment.to_string(),
            state: state.into(),
            why,
            traffic: Some(status.traffic.into()),
            stats: Some((&status.stats).into()),
        }
    }
}

impl From<&VersionStats> for pb::VersionStats {
    fn from(stats: &VersionStats) -> Self {
        let drift = stats.input_drift.iter().map(|drift| pb::DriftedColumn {
            column: drift.column.clone(),
            psi: drift.psi,
            values: drift.values,
        });
        let quality = &stats.quality;
        Self {
            requests: stats.requests,
            rows: stats.rows,
            errors: stats.errors,
            rejected: stats.rejected,
            overloaded: stats.overloaded,
            latency_counts: stats.latency.counts.clone(),
            latency_sum_micros: stats.latency.sum_micros,
            predictions: stats.predictions.clone(),
            labels: quality.labels,
            correct: quality.correct,
            loss: quality.loss,
            hits: quality.hits.clone(),
            predicted: quality.predicted.clone(),
            actual: quality.actual.clone(),
            input_drift: drift.collect(),
            prediction_drift: stats.prediction_drift,
        }
    }
}

impl TryFrom<pb::ServingStatus> for ServingStatus {
    type Error = WireError;

    fn try_from(message: pb::ServingStatus) -> Result<Self, WireError> {
        let most = MAX_SERVED_MODELS * MAX_SERVED_VERSIONS;
        at_most("versions", &message.versions, most)?;
        let versions = message.versions.into_iter().map(TryInto::try_into);
        Ok(Self {
            plan: message.plan,
            ready: message.ready,
            versions: versions
                .collect::<Result<_, WireError>>()
                .map_err(|e| e.within("versions"))?,
        })
    }
}

impl TryFrom<pb::VersionStatus> for VersionStatus {
    type Error = WireError;

    fn try_from(message: pb::VersionStatus) -> Result<Self, WireError> {
        let state = match message.state() {
            pb::VersionState::Loading => VersionState::Loading,
            pb::VersionState::Ready => VersionState::Ready,
            pb::VersionState::Failed => {
                let mut why = message.why;
                why.truncate(why.floor_char_boundary(MAX_WHY_BYTES));
                VersionState::Failed(why)
            }
            pb::VersionState::Unspecified => {
                return Err(WireError::new("state", "it is not set"));
            }
        };
        Ok(Self {
            model: id("model", &message.model)?,
            version: message.version,
            deployment: id("deployment", &message.deployment)?,
            state,
            traffic: required("traffic", message.traffic)?.try_into()?,
            stats: message.stats.unwrap_or_default().try_into()?,
        })
    }
}

impl TryFrom<pb::VersionStats> for VersionStats {
    type Error = WireError;

    fn try_from(message: pb::VersionStats) -> Result<Self, WireError> {
        let buckets = LATENCY_BOUNDS_MICROS.len() + 1;
        at_most("latency_counts", &message.latency_counts, buckets)?;
        at_most("predictions", &message.predictions, PREDICTION_BINS)?;
        for (field, counts) in [
            ("hits", &message.hits),
            ("predicted", &message.predicted),
            ("actual", &message.actual),
        ] {
            at_most(field, counts, MAX_QUALITY_CLASSES)?;
        }
        at_most("input_drift", &message.input_drift, MAX_DRIFTED_COLUMNS)?;
        let drift = message.input_drift.into_iter().map(|drift| DriftedColumn {
            column: drift.column.chars().take(256).collect(),
            psi: drift.psi,
            values: drift.values,
        });
        let mut counts = message.latency_counts;
        if !counts.is_empty() {
            counts.resize(buckets, 0);
        }
        Ok(Self {
            requests: message.requests,
            rows: message.rows,
            errors: message.errors,
            rejected: message.rejected,
            overloaded: message.overloaded,
            latency: LatencyHistogram {
                counts,
                sum_micros: message.latency_sum_micros,
            },
            predictions: message.predictions,
            quality: Quality {
                labels: message.labels,
                correct: message.correct,
                loss: message.loss,
                hits: message.hits,
                predicted: message.predicted,
                actual: message.actual,
            },
            input_drift: drift.collect(),
            prediction_drift: message.prediction_drift,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::ids::{DeploymentId, Digest};

    #[test]
    fn a_plan_and_a_status_come_over_as_they_are() {
        let plan = ServingPlan {
            revision: 7,
            models: vec![ServedModel {
                model: "m".parse().unwrap(),
                limits: ServingLimits::default(),
                peers: vec!["h:1".to_owned()],
                versions: vec![ServedVersion {
                    version: 3,
                    deployment: DeploymentId(4),
                    artifact: Digest::of(b"x"),
                    traffic: Traffic::Canary { share: 500 },
                }],
            }],
            report_every: Duration::from_millis(250),
            access: Some(vec![AllowedToken {
                name: "eyes".parse().unwrap(),
                hash: format!("sha256:{}", "ab".repeat(32)).parse().unwrap(),
                expires_at: Some(Timestamp(9)),
            }]),
        };
        let sent = pb::ServingPlan::from(&plan);
        assert_eq!(ServingPlan::try_from(sent).unwrap(), plan);

        let mut stats = VersionStats {
            requests: 2,
            predictions: vec![0, 2],
            prediction_drift: Some(0.5),
            ..VersionStats::default()
        };
        stats.latency.count(123);
        stats.quality.count_class(1, Some(1), 0.9, 2);
        let status = ServingStatus {
            plan: 7,
            ready: true,
            versions: vec![VersionStatus {
                model: "m".parse().unwrap(),
                version: 3,
                deployment: DeploymentId(4),
                state: VersionState::Failed("no".to_owned()),
                traffic: Traffic::Live,
                stats,
            }],
        };
        let sent = pb::ServingStatus::from(&status);
        assert_eq!(ServingStatus::try_from(sent).unwrap(), status);
    }

    #[test]
    fn what_is_too_much_or_makes_no_sense_is_refused() {
        let traffic = pb::Traffic {
            kind: pb::TrafficKind::Canary.into(),
            share: 10_001,
        };
        assert!(Traffic::try_from(traffic).is_err());
        let stats = pb::VersionStats {
            predictions: vec![0; PREDICTION_BINS + 1],
            ..pb::VersionStats::default()
        };
        assert!(VersionStats::try_from(stats).is_err());
        for address in ["", "a b:1", "h:1\n"] {
            let offer = pb::ServingOffer {
                address: address.to_owned(),
                environment: "production".to_owned(),
            };
            assert!(ServingOffer::try_from(offer).is_err(), "{address:?}");
        }
    }
}
