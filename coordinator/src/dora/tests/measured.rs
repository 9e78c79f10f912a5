//! The five metrics on histories that were computed by hand.

use emberline_common::dora::{DurationBucket, FrequencyBucket, Level, LevelName};

use super::*;

fn level(name: LevelName) -> Option<Level> {
    Some(Level { year: 2023, name })
}

/// Four releases and a rollback in March; what each figure is follows from the times alone.
fn a_month() -> Vec<Deployment> {
    vec![
        // Commits of 6 h and 30 h before.
        reading(
            carrying(
                1,
                "2026-03-02T12:00",
                &[("a2", "2026-03-02T06:00"), ("a1", "2026-03-01T06:00")],
            ),
            "monday",
            "2026-03-02T00:00",
        ),
        // 2 h. It failed at 20:00, and was rolled back at 22:00.
        failing(
            carrying(2, "2026-03-10T18:00", &[("b1", "2026-03-10T16:00")]),
            FailureCause::Rollback,
            "2026-03-10T20:00",
            "2026-03-10T22:00",
        ),
        rollback(3, 2, "2026-03-10T22:00"),
        // The repair, 10 h after its commit.
        Deployment {
            repairs: Some(DeploymentId(2)),
            ..carrying(4, "2026-03-11T12:00", &[("c1", "2026-03-11T02:00")])
        },
        // 4 h; with newer data, which waited for 36 h.
        reading(
            carrying(5, "2026-03-21T12:00", &[("d1", "2026-03-21T08:00")]),
            "friday",
            "2026-03-20T00:00",
        ),
    ]
}

#[test]
fn a_month_is_as_computed_by_hand() {
    let place = measured(&a_month(), &march());

    let frequency = place.deployment_frequency.unwrap();
    assert_eq!(frequency.successful, 4);
    assert_eq!(frequency.window_micros, 31 * DAY);
    assert_eq!(frequency.per_day, 4.0 / 31.0);
    // Gaps of 8 d 6 h, 18 h and 10 d.
    assert_eq!(frequency.median_between_micros, Some(8 * DAY + 6 * HOUR));
    assert_eq!(frequency.bucket, Some(FrequencyBucket::WeeklyToMonthly));
    assert_eq!(frequency.level, level(LevelName::Medium));

    // 2, 4, 6, 10 and 30 h.
    let lead = place.change_lead_time.unwrap();
    assert_eq!((lead.count, lead.deployments), (5, 4));
    assert_eq!(lead.median_micros, 6 * HOUR);
    assert_eq!(lead.p95_micros, 30 * HOUR);
    assert_eq!(lead.bucket, DurationBucket::UnderADay);
    assert_eq!(lead.level, level(LevelName::Elite));

    // 12 h and 36 h.
    let data = place.data_lead_time.unwrap();
    assert_eq!((data.count, data.median_micros), (2, DAY));
    assert_eq!((data.bucket, data.level), (DurationBucket::DayToWeek, None));

    let fail_rate = place.change_fail_rate.unwrap();
    assert_eq!((fail_rate.part, fail_rate.whole), (1, 4));
    assert_eq!((fail_rate.ratio, fail_rate.level), (0.25, None));

    let recovery = place.recovery_time.unwrap();
    assert_eq!((recovery.count, recovery.median_micros), (1, 2 * HOUR));
    assert_eq!(recovery.level, level(LevelName::High));

    let rework = place.rework_rate.unwrap();
    assert_eq!((rework.part, rework.whole), (2, 5));
    assert_eq!(rework.level, None);
    assert_eq!((place.counts.skewed, place.counts.not_recovered), (0, 0));
}

#[test]
fn the_order_in_which_records_come_changes_nothing() {
    let mut deployments = a_month();
    let told = report(&deployments, &march());
    deployments.reverse();
    assert_eq!(report(&deployments, &march()), told);
    deployments.swap(0, 3);
    assert_eq!(report(&deployments, &march()), told);
}

#[test]
fn a_change_belongs_to_what_was_live_first_not_to_what_was_begun_first() {
    // The later id was live earlier.
    let slow = carrying(1, "2026-03-05T00:00", &[("a", "2026-03-01T00:00")]);
    let fast = carrying(2, "2026-03-02T00:00", &[("a", "2026-03-01T00:00")]);
    let lead = measured(&[slow, fast], &march()).change_lead_time.unwrap();
    assert_eq!((lead.count, lead.median_micros), (1, DAY));
}

#[test]
fn rollbacks_count_as_deployments_only_where_asked_for() {
    let query = DoraQuery {
        include_rollbacks: true,
        ..march()
    };
    let place = measured(&a_month(), &query);
    assert_eq!(place.deployment_frequency.unwrap().successful, 5);
    let fail_rate = place.change_fail_rate.unwrap();
    assert_eq!((fail_rate.part, fail_rate.whole), (1, 5));
    // Rework counts them anyway, and once.
    let rework = place.rework_rate.unwrap();
    assert_eq!((rework.part, rework.whole), (2, 5));
    assert_eq!(place.change_lead_time.unwrap().count, 5);
}

#[test]
fn an_old_version_that_is_deployed_again_brings_no_change_again() {
    let old: &[(&str, &str)] = &[("a", "2026-03-01T00:00")];
    let place = measured(
        &[
            carrying(1, "2026-03-01T04:00", old),
            carrying(2, "2026-03-03T00:00", &[("b", "2026-03-02T22:00")]),
            carrying(3, "2026-03-30T00:00", old),
        ],
        &march(),
    );
    let lead = place.change_lead_time.unwrap();
    assert_eq!((lead.count, lead.deployments), (2, 2));
    assert_eq!(lead.p95_micros, 4 * HOUR);
    assert_eq!(place.counts.deployments, 3);
}

#[test]
fn a_change_that_was_live_before_the_window_is_not_new_in_it() {
    let commits: &[(&str, &str)] = &[("a", "2026-02-20T00:00")];
    let place = measured(
        &[
            carrying(1, "2026-02-27T00:00", commits),
            carrying(2, "2026-03-03T00:00", commits),
        ],
        &march(),
    );
    assert_eq!(place.counts.deployments, 1);
    assert_eq!(place.change_lead_time, None);
}

#[test]
fn each_environment_has_its_own_first_deployment_of_a_change() {
    let commits: &[(&str, &str)] = &[("a", "2026-03-01T00:00")];
    let staged = carrying(1, "2026-03-01T02:00", commits);
    let released = carrying(2, "2026-03-03T00:00", commits);
    let report = report(&[into_environment(staged, "staging"), released], &march());
    let leads: Vec<_> = (report.places.iter())
        .map(|p| {
            (
                p.environment.as_str(),
                p.change_lead_time.unwrap().median_micros,
            )
        })
        .collect();
    assert_eq!(leads, [("production", 2 * DAY), ("staging", 2 * HOUR)]);
}

#[test]
fn only_what_is_asked_for_is_told() {
    let other = Deployment {
        pipeline: "fraud".parse().unwrap(),
        ..release(2, "2026-03-02")
    };
    let staged = into_environment(release(3, "2026-03-02"), "staging");
    let all = [release(1, "2026-03-02"), other, staged];
    let query = DoraQuery {
        pipeline: Some("churn".parse().unwrap()),
        environment: Some("staging".parse().unwrap()),
        ..march()
    };
    let place = measured(&all, &query);
    assert_eq!(
        (place.pipeline.as_str(), place.environment.as_str()),
        ("churn", "staging")
    );
    assert_eq!(report(&all, &march()).places.len(), 3);
}

#[test]
fn a_change_that_never_became_live_is_in_no_lead_time() {
    let change = carrying(1, "2026-03-02", &[("a", "2026-03-01")]);
    let caught = outcome(change, DeploymentOutcome::CaughtBeforeExposure);
    let change = carrying(2, "2026-03-03", &[("a", "2026-03-01")]);
    let aborted = outcome(change, DeploymentOutcome::Aborted);
    let place = measured(&[caught.clone(), aborted.clone()], &march());
    assert_eq!(place.change_lead_time, None);
    // It counts where it becomes live at last.
    let live = carrying(3, "2026-03-04", &[("a", "2026-03-01")]);
    let place = measured(&[caught, aborted, live], &march());
    assert_eq!(place.change_lead_time.unwrap().median_micros, 3 * DAY);
}

#[test]
fn what_was_caught_before_exposure_is_no_deployment_and_no_failure() {
    let caught = outcome(
        release(1, "2026-03-02"),
        DeploymentOutcome::CaughtBeforeExposure,
    );
    let place = measured(&[caught, release(2, "2026-03-03")], &march());
    assert_eq!(place.counts.caught_before_exposure, 1);
    let fail_rate = place.change_fail_rate.unwrap();
    assert_eq!((fail_rate.part, fail_rate.whole), (0, 1));
}

#[test]
fn an_aborted_canary_has_failed_until_it_was_aborted() {
    let aborted = outcome(release(1, "2026-03-02T12:00"), DeploymentOutcome::Aborted);
    let cause = FailureCause::CanaryAborted;
    let aborted = failing(aborted, cause, "2026-03-02T11:30", "2026-03-02T12:00");
    let place = measured(&[aborted], &march());
    assert_eq!(place.change_fail_rate.unwrap().ratio, 1.0);
    assert_eq!(place.recovery_time.unwrap().median_micros, HOUR / 2);
    assert_eq!(place.deployment_frequency.unwrap().successful, 0);
    assert_eq!(place.deployment_frequency.unwrap().bucket, None);
}

#[test]
fn a_failure_counts_within_its_window_only() {
    let marked = |began| {
        let live = release(1, "2026-03-02T12:00");
        let failed = failing(live, FailureCause::Marked, began, "2026-03-20");
        measured(&[failed], &march()).counts.failed
    };
    assert_eq!(marked("2026-03-03T12:00"), 1);
    assert_eq!(marked("2026-03-03T12:00:00.000001Z"), 0);
    // Of a rollback it counts when it was done: since when it was needed nobody said.
    let rolled_back = |noted| {
        let live = release(1, "2026-03-02T12:00");
        let failed = failing(live, FailureCause::Rollback, "2026-03-02T12:00", noted);
        measured(&[failed], &march()).counts.failed
    };
    assert_eq!(rolled_back("2026-03-03T12:00"), 1);
    assert_eq!(rolled_back("2026-03-03T12:01"), 0);
    let query = DoraQuery {
        failure_window: std::time::Duration::from_secs(7 * 86_400),
        ..march()
    };
    let live = release(1, "2026-03-02T12:00");
    let failed = failing(
        live,
        FailureCause::Rollback,
        "2026-03-02T12:00",
        "2026-03-05",
    );
    assert_eq!(measured(&[failed], &query).counts.failed, 1);
}

#[test]
fn a_failure_belongs_to_the_window_of_its_deployment() {
    let live = release(1, "2026-03-31T20:00");
    let failed = failing(live, FailureCause::Marked, "2026-04-01T10:00", "2026-04-02");
    let all = [failed, release(2, "2026-04-01T13:00")];
    let place = measured(&all, &march());
    assert_eq!(place.recovery_time.unwrap().median_micros, 3 * HOUR);
    let april = DoraQuery::within(at("2026-04-01"), at("2026-05-01"));
    assert_eq!(measured(&all, &april).counts.failed, 0);
}

#[test]
fn only_a_good_version_ends_a_failure() {
    let bad = |id, live: &str| failing(release(id, live), FailureCause::Marked, live, "2026-03-09");
    let place = measured(
        &[
            bad(1, "2026-03-02T00:00"),
            bad(2, "2026-03-02T01:00"),
            release(3, "2026-03-02T05:00"),
        ],
        &march(),
    );
    let recovery = place.recovery_time.unwrap();
    // 5 h and 4 h.
    assert_eq!((recovery.count, recovery.median_micros), (2, 9 * HOUR / 2));
}

#[test]
fn another_model_or_environment_ends_no_failure_but_another_pipeline_may() {
    let live = "2026-03-02T00:00";
    let failed = failing(release(1, live), FailureCause::Marked, live, "2026-03-09");
    let other_model = Deployment {
        model: "fraud".parse().unwrap(),
        ..release(2, "2026-03-02T01:00")
    };
    let elsewhere = into_environment(release(3, "2026-03-02T02:00"), "staging");
    let query = DoraQuery {
        pipeline: Some("churn".parse().unwrap()),
        environment: Some("production".parse().unwrap()),
        ..march()
    };
    let mut all = vec![failed, other_model, elsewhere];
    let place = measured(&all, &query);
    assert_eq!((place.recovery_time, place.counts.not_recovered), (None, 1));
    all.push(Deployment {
        pipeline: "hotfix".parse().unwrap(),
        ..release(4, "2026-03-02T03:00")
    });
    let place = measured(&all, &query);
    assert_eq!(place.recovery_time.unwrap().median_micros, 3 * HOUR);
}

#[test]
fn an_incident_that_is_over_earlier_ends_the_failure_earlier() {
    let cause = FailureCause::Incident;
    let live = release(1, "2026-03-02T00:00");
    let mut failed = failing(live, cause, "2026-03-02T01:00", "2026-03-02T01:05");
    failed.failure.as_mut().unwrap().resolved_at = Some(at("2026-03-02T01:30"));
    let place = measured(&[failed, release(2, "2026-03-02T09:00")], &march());
    assert_eq!(place.recovery_time.unwrap().median_micros, HOUR / 2);
    assert_eq!(place.counts.found_by_time, 1);
}

#[test]
fn clocks_that_differ_make_no_negative_time() {
    // Committed an hour after it was live, says the committer's clock; and data from the future.
    let early = carrying(1, "2026-03-02T00:00", &[("a", "2026-03-02T01:00")]);
    let early = reading(early, "tomorrow", "2026-03-03T00:00");
    // Its failure began after the next version was live.
    let began = "2026-03-02T06:00";
    let early = failing(early, FailureCause::Marked, began, "2026-03-02T06:00");
    let place = measured(&[early, release(2, "2026-03-02T05:00")], &march());
    assert_eq!(place.change_lead_time.unwrap().median_micros, 0);
    assert_eq!(place.data_lead_time.unwrap().median_micros, 0);
    assert_eq!(place.recovery_time.unwrap().median_micros, 0);
    assert_eq!(place.counts.skewed, 3);
}

#[test]
fn an_empty_window_has_no_figures() {
    let place = measured(&[release(1, "2026-02-27")], &march());
    assert!(place.is_empty());
    assert_eq!(place.deployment_frequency, None);
    assert_eq!(place.change_lead_time, None);
    assert_eq!(place.data_lead_time, None);
    assert_eq!(place.change_fail_rate, None);
    assert_eq!(place.recovery_time, None);
    assert_eq!(place.rework_rate, None);
    assert!(report(&[], &march()).places.is_empty());
}

#[test]
fn a_window_begins_with_its_first_instant_and_ends_before_its_last() {
    let counted = |live| measured(&[release(1, live)], &march()).counts.deployments;
    assert_eq!(counted("2026-02-28T23:59:59.999999Z"), 0);
    assert_eq!(counted("2026-03-01T00:00"), 1);
    assert_eq!(counted("2026-03-31T23:59:59.999999Z"), 1);
    assert_eq!(counted("2026-04-01T00:00"), 0);
}

#[test]
fn a_window_never_ends_in_the_future() {
    let all = shared(vec![release(1, "2026-03-02"), release(2, "2026-03-20")]);
    let report = measure(&all, &march(), at("2026-03-11"));
    assert_eq!(report.until, at("2026-03-11"));
    let frequency = report.places[0].deployment_frequency.unwrap();
    assert_eq!((frequency.successful, frequency.per_day), (1, 0.1));
}

#[test]
fn what_may_still_fail_is_told() {
    let all = shared(vec![
        release(1, "2026-03-09"),
        release(2, "2026-03-10T01:00"),
    ]);
    let report = measure(&all, &march(), at("2026-03-11"));
    assert_eq!(report.places[0].counts.unsettled, 1);
}

#[test]
fn what_is_under_way_is_told_and_counts_for_nothing_yet() {
    let mut deploying = outcome(release(1, "2026-03-02"), DeploymentOutcome::InProgress);
    deploying.finished_at = None;
    let place = measured(&[deploying], &march());
    assert_eq!((place.counts.in_progress, place.counts.deployments), (1, 0));
    assert_eq!(place.deployment_frequency, None);
    assert!(!place.is_empty());
}

#[test]
fn days_are_as_long_when_clocks_are_put_forward() {
    // Summer time began in Europe on 29 March 2026, and in the United States on 8 March.
    for (commit, live) in [
        ("2026-03-29T00:30:00+01:00", "2026-03-30T00:30:00+02:00"),
        ("2026-03-08T01:00:00-05:00", "2026-03-09T01:00:00-04:00"),
    ] {
        let place = measured(&[carrying(1, live, &[("a", commit)])], &march());
        assert_eq!(place.change_lead_time.unwrap().median_micros, 23 * HOUR);
    }
    let since = at("2026-03-28");
    let query = DoraQuery::within(since, at("2026-03-31"));
    let place = measured(&[release(1, "2026-03-29T02:30")], &query);
    assert_eq!(place.deployment_frequency.unwrap().per_day, 1.0 / 3.0);
}

#[test]
fn the_29th_of_february_is_a_day() {
    let query = DoraQuery::within(at("2028-02-28"), at("2028-03-01"));
    let live = "2028-02-29T23:00";
    let leap = carrying(1, live, &[("a", "2028-02-28T23:00")]);
    let all = shared(vec![leap, release(2, "2028-03-01T00:00")]);
    let report = measure(&all, &query, at("2028-06-01"));
    let place = &report.places[0];
    let frequency = place.deployment_frequency.unwrap();
    assert_eq!((frequency.successful, frequency.per_day), (1, 0.5));
    assert_eq!(place.change_lead_time.unwrap().median_micros, DAY);
    let common = DoraQuery::within(at("2027-02-28"), at("2027-03-01"));
    assert_eq!(common.until.0 - common.since.0, DAY);
}

#[test]
fn half_of_an_even_number_is_between_the_two_in_the_middle() {
    let lives = ["2026-03-02T00:00", "2026-03-03T00:00", "2026-03-07T00:00"];
    let all: Vec<_> = (1..)
        .zip(lives)
        .map(|(id, live)| release(id, live))
        .collect();
    let frequency = measured(&all, &march()).deployment_frequency.unwrap();
    // Gaps of 1 and 4 days.
    assert_eq!(frequency.median_between_micros, Some(5 * DAY / 2));
}

#[test]
fn the_95th_percentile_is_the_nearest_rank() {
    let commits: Vec<String> = (1..=20).map(|n| format!("c{n}")).collect();
    let live = at("2026-03-10");
    let commits: Vec<(String, String)> = (1..)
        .zip(&commits)
        .map(|(hours, name)| (name.clone(), Timestamp(live.0 - hours * HOUR).to_string()))
        .collect();
    let commits: Vec<(&str, &str)> = commits
        .iter()
        .map(|(r, at)| (r.as_str(), at.as_str()))
        .collect();
    let lead = measured(&[carrying(1, "2026-03-10", &commits)], &march());
    let lead = lead.change_lead_time.unwrap();
    // 19 of 20 are 95 %.
    assert_eq!((lead.count, lead.p95_micros), (20, 19 * HOUR));
    assert_eq!(lead.median_micros, 21 * HOUR / 2);
}

#[test]
fn records_that_do_not_reach_back_far_enough_are_told() {
    let all = [release(7, "2026-03-05T00:10"), release(8, "2026-03-06")];
    let report = report(&all, &march());
    assert_eq!(report.forgotten_before, Some(at("2026-03-05")));
    let later = DoraQuery::within(at("2026-03-06"), at("2026-04-01"));
    assert_eq!(super::report(&all, &later).forgotten_before, None);
}

#[test]
fn the_rates_never_exceed_one() {
    let all: Vec<_> = (1..=5)
        .map(|id| {
            let live = release(id, "2026-03-05");
            let failed = failing(live, FailureCause::Marked, "2026-03-05", "2026-03-05");
            Deployment {
                repairs: Some(DeploymentId(1)),
                ..failed
            }
        })
        .chain((6..=9).map(|id| rollback(id, 1, "2026-03-06")))
        .collect();
    for include_rollbacks in [false, true] {
        let query = DoraQuery {
            include_rollbacks,
            ..march()
        };
        let place = measured(&all, &query);
        assert!(place.change_fail_rate.unwrap().ratio <= 1.0);
        assert_eq!(place.rework_rate.unwrap().ratio, 1.0);
    }
}

#[test]
fn a_deployment_names_the_changes_that_it_is_the_first_to_carry() {
    let one = carrying(1, "2026-03-02", &[("a", "2026-03-01")]);
    let commits: &[(&str, &str)] = &[
        ("c", "2026-03-02T20:00"),
        ("b", "2026-03-02T02:00"),
        ("a", "2026-03-01"),
    ];
    let two = carrying(2, "2026-03-03", commits);
    let all = shared(vec![two.clone(), one]);
    let carried: Vec<_> = (crate::dora::first_carried(&all, &two).into_iter())
        .map(|change| (change.revision, change.lead_micros))
        .collect();
    assert_eq!(
        carried,
        [("c".to_owned(), 4 * HOUR), ("b".to_owned(), 22 * HOUR)]
    );
}
