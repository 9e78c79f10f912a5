//! Buckets and levels at their bounds.

use emberline_common::dora::{
    DurationBucket::{self, *},
    FrequencyBucket::{self, *},
    LevelName::{self, *},
};

use super::{DAY, HOUR};
use crate::dora::quick_check as quick;

#[test]
fn a_span_on_a_bound_belongs_to_the_longer_side() {
    let cases: [(u64, DurationBucket, Option<LevelName>, Option<LevelName>); 10] = [
        (0, UnderAnHour, Some(Elite), Some(Elite)),
        (HOUR - 1, UnderAnHour, Some(Elite), Some(Elite)),
        (HOUR, UnderADay, Some(Elite), Some(High)),
        (DAY - 1, UnderADay, Some(Elite), Some(High)),
        (DAY, DayToWeek, Some(High), Some(Medium)),
        (7 * DAY - 1, DayToWeek, Some(High), Some(Medium)),
        (7 * DAY, WeekToMonth, Some(Medium), None),
        (30 * DAY, OneToSixMonths, None, None),
        (180 * DAY - 1, OneToSixMonths, None, None),
        (180 * DAY, More, None, None),
    ];
    for (micros, bucket, lead_time, recovery) in cases {
        assert_eq!(quick::duration(micros), bucket, "{micros}");
        let name = |level: Option<emberline_common::dora::Level>| level.map(|l| (l.year, l.name));
        let of_2023 = |name: Option<LevelName>| name.map(|name| (2023, name));
        assert_eq!(name(quick::lead_time_level(micros)), of_2023(lead_time));
        assert_eq!(name(quick::recovery_level(micros)), of_2023(recovery));
    }
}

#[test]
fn a_frequency_has_its_bucket_and_level() {
    let cases: [(u64, u64, FrequencyBucket, Option<LevelName>); 9] = [
        (25, DAY, OnDemand, Some(Elite)),
        (24, DAY, HourlyToDaily, Some(Elite)),
        (31, 30 * DAY, HourlyToDaily, Some(Elite)),
        (30, 30 * DAY, DailyToWeekly, Some(High)),
        (2, 13 * DAY, DailyToWeekly, Some(High)),
        (1, 7 * DAY, WeeklyToMonthly, Some(Medium)),
        (1, 30 * DAY, MonthlyToHalfYearly, None),
        (2, 359 * DAY, MonthlyToHalfYearly, None),
        (2, 360 * DAY, Less, None),
    ];
    for (number, window, bucket, level) in cases {
        assert_eq!(quick::frequency(number, window), Some(bucket));
        assert_eq!(quick::frequency_level(bucket).map(|l| l.name), level);
    }
    assert_eq!(quick::frequency(0, DAY), None);
    assert_eq!(quick::frequency(u64::MAX, u64::MAX), Some(OnDemand));
}

#[test]
fn a_fail_rate_has_a_level_up_to_15_percent() {
    let level = |part, whole| quick::fail_rate_level(part, whole).map(|l| l.name);
    assert_eq!(level(0, 1), Some(Elite));
    assert_eq!(level(1, 20), Some(Elite));
    assert_eq!(level(1, 10), Some(High));
    assert_eq!(level(3, 20), Some(Medium));
    assert_eq!(level(16, 100), None);
    assert_eq!(level(0, 0), None);
}
