//! Whether a new version is good enough, by what was counted of it: a pure function of counts.

use emberline_common::{
    serving::{Quality, VersionStats, psi},
    spec::kinds::deploy::{Conditions, QualityCondition, QualityMetric},
};

/// What the counts say.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    /// A condition is broken: which, in one line.
    Broken(String),
    /// It cannot be said yet: what is missing, in one line.
    Waits(String),
    /// Every condition holds.
    Holds,
}

/// Judges a version by what was counted of it and, where there is one, of the live version over the same
/// time. A condition that cannot hold any more, whatever comes, is broken before `min_requests`.
pub(super) fn judge(
    conditions: &Conditions,
    min_requests: u64,
    new: &VersionStats,
    live: Option<&VersionStats>,
) -> Verdict {
    if let Some(most) = conditions.max_error_rate
        && let Some(why) = too_many_errors(most, min_requests, new)
    {
        return Verdict::Broken(why);
    }
    if new.requests < min_requests {
        return Verdict::Waits(format!(
            "{} of {min_requests} requests are answered",
            new.requests
        ));
    }
    if let Some(latency) = &conditions.max_latency
        && let Some(micros) = new.latency.quantile_micros(latency.quantile)
        && u128::from(micros) > latency.limit.0.as_micros()
    {
        return Verdict::Broken(format!(
            "`max_latency`: the {} quantile is {}, more than {}",
            latency.quantile,
            millis(micros),
            latency.limit
        ));
    }
    let Some(live) = live else {
        return Verdict::Holds;
    };
    if let Some(most) = conditions.max_prediction_drift {
        let seen: u64 = live.predictions.iter().sum();
        if seen < min_requests {
            return Verdict::Waits(format!(
                "{seen} of {min_requests} predictions of the live version to compare with are there"
            ));
        }
        if let Some(drift) = psi(&live.predictions, &new.predictions)
            && drift > most
        {
            return Verdict::Broken(format!(
                "`max_prediction_drift`: its predictions are {drift:.3} from those of the live version, more than {most}"
            ));
        }
    }
    match &conditions.quality {
        Some(quality) => judge_quality(quality, &new.quality, &live.quality),
        None => Verdict::Holds,
    }
}

/// Errors count from the first one that cannot be made good by as many requests as are waited for.
#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn too_many_errors(most: f64, min_requests: u64, new: &VersionStats) -> Option<String> {
    let of = new.requests.max(min_requests).max(1);
    let rate = new.errors as f64 / of as f64;
    (new.errors > 0 && rate > most).then(|| {
        format!(
            "`max_error_rate`: {} of {} requests failed, more than {most} of them",
            new.errors, new.requests
        )
    })
}

fn judge_quality(wanted: &QualityCondition, new: &Quality, live: &Quality) -> Verdict {
    for (labels, of) in [(new.labels, "new"), (live.labels, "live")] {
        if labels < wanted.min_labels {
            return Verdict::Waits(format!(
                "{labels} of {} labels of the {of} version have come back",
                wanted.min_labels
            ));
        }
    }
    let of = |quality: &Quality| match wanted.metric {
        QualityMetric::Accuracy => quality.accuracy(),
        QualityMetric::F1 => quality.f1(),
        QualityMetric::LogLoss => quality.mean_loss(),
        QualityMetric::Rmse => quality.mean_loss().map(f64::sqrt),
    };
    let (Some(new), Some(live)) = (of(new), of(live)) else {
        return Verdict::Waits("no label has come back".to_owned());
    };
    let worse = match wanted.metric {
        QualityMetric::Accuracy | QualityMetric::F1 => live - new,
        QualityMetric::LogLoss | QualityMetric::Rmse => new - live,
    };
    // What is no number is not good enough.
    if worse <= wanted.tolerance {
        return Verdict::Holds;
    }
    Verdict::Broken(format!(
        "`quality`: {} is {new:.4}, that of the live version {live:.4}; it may be worse by {}",
        wanted.metric.as_str(),
        wanted.tolerance
    ))
}

#[allow(clippy::cast_precision_loss, reason = "times of requests")]
fn millis(micros: u64) -> String {
    format!("{:.1} ms", micros as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use emberline_common::spec::kinds::deploy::LatencyCondition;

    use super::*;

    fn stats(requests: u64, errors: u64) -> VersionStats {
        VersionStats {
            requests,
            errors,
            ..VersionStats::default()
        }
    }

    fn errors(most: f64) -> Conditions {
        Conditions {
            max_error_rate: Some(most),
            ..Conditions::default()
        }
    }

    #[test]
    fn errors_that_cannot_be_made_good_break_at_once() {
        let conditions = errors(0.05);
        let judged = |requests, errors| judge(&conditions, 100, &stats(requests, errors), None);
        assert!(matches!(judged(3, 3), Verdict::Waits(_)));
        assert!(matches!(judged(5, 5), Verdict::Waits(_)));
        assert!(matches!(judged(6, 6), Verdict::Broken(_)));
        assert!(matches!(judged(100, 5), Verdict::Holds));
        assert!(matches!(judged(1000, 51), Verdict::Broken(_)));
        assert!(matches!(
            judge(&errors(0.0), 0, &stats(1, 1), None),
            Verdict::Broken(_)
        ));
        assert!(matches!(
            judge(&errors(0.0), 0, &stats(0, 0), None),
            Verdict::Holds
        ));
    }

    #[test]
    fn latency_is_judged_when_enough_were_answered() {
        let conditions = Conditions {
            max_latency: Some(LatencyCondition {
                quantile: 0.5,
                limit: "10ms".parse().unwrap(),
            }),
            ..Conditions::default()
        };
        let mut new = stats(10, 0);
        for _ in 0..10 {
            new.latency.count(50_000);
        }
        assert!(matches!(
            judge(&conditions, 11, &new, None),
            Verdict::Waits(_)
        ));
        let Verdict::Broken(why) = judge(&conditions, 10, &new, None) else {
            panic!("it holds");
        };
        assert!(why.contains("max_latency"), "{why}");
    }

    #[test]
    fn drift_is_judged_against_as_many_of_the_live_version() {
        let conditions = Conditions {
            max_prediction_drift: Some(0.25),
            ..Conditions::default()
        };
        let of = |predictions: Vec<u64>| VersionStats {
            predictions,
            ..stats(100, 0)
        };
        let judged = |live, new| judge(&conditions, 100, &of(new), Some(&of(live)));
        assert!(matches!(judged(vec![50], vec![100]), Verdict::Waits(_)));
        assert_eq!(judged(vec![90, 10], vec![88, 12]), Verdict::Holds);
        assert!(matches!(
            judged(vec![90, 10], vec![50, 50]),
            Verdict::Broken(_)
        ));
    }

    #[test]
    fn quality_waits_for_labels_of_both_and_may_be_a_little_worse() {
        let quality = |right: u64, labels: u64| Quality {
            labels,
            correct: right,
            ..Quality::default()
        };
        let wanted = QualityCondition {
            metric: QualityMetric::Accuracy,
            tolerance: 0.05,
            min_labels: 50,
        };
        let judged = |new: Quality, live: Quality| judge_quality(&wanted, &new, &live);
        assert!(matches!(
            judged(quality(10, 49), quality(50, 50)),
            Verdict::Waits(_)
        ));
        assert!(matches!(
            judged(quality(50, 50), quality(9, 9)),
            Verdict::Waits(_)
        ));
        assert_eq!(judged(quality(86, 100), quality(90, 100)), Verdict::Holds);
        assert!(matches!(
            judged(quality(80, 100), quality(90, 100)),
            Verdict::Broken(_)
        ));
    }
}
