//! DORA's Quick Check buckets, and the performance levels of the year 2023.
//!
//! Sources: <https://dora.dev/quickcheck/> for the buckets; the *Accelerate State of DevOps Report
//! 2023* for the levels (elite, high, medium: lead time under a day, a week, a month; frequency on
//! demand, daily to weekly, weekly to monthly; fail rate up to 5, 10, 15 %; recovery under an hour, a
//! day, a week). What is below them has no level.
//!
//! A month has 30 days here. A span that lies exactly on a bound belongs to the longer side of it.

use emberline_common::dora::{DurationBucket, FrequencyBucket, Level, LevelName};

/// The year whose levels these are.
pub const LEVELS_OF: u16 = 2023;

const HOUR: u64 = 3_600_000_000;
/// A day in microseconds: in UTC all of them are as long.
pub const DAY: u64 = 24 * HOUR;
const WEEK: u64 = 7 * DAY;
const MONTH: u64 = 30 * DAY;
const SIX_MONTHS: u64 = 6 * MONTH;

const fn level(name: LevelName) -> Option<Level> {
    Some(Level {
        year: LEVELS_OF,
        name,
    })
}

/// The bucket of a lead time or a recovery time, in microseconds.
#[must_use]
pub const fn duration(micros: u64) -> DurationBucket {
    match micros {
        ..HOUR => DurationBucket::UnderAnHour,
        HOUR..DAY => DurationBucket::UnderADay,
        DAY..WEEK => DurationBucket::DayToWeek,
        WEEK..MONTH => DurationBucket::WeekToMonth,
        MONTH..SIX_MONTHS => DurationBucket::OneToSixMonths,
        SIX_MONTHS.. => DurationBucket::More,
    }
}

/// The bucket of so many in a window of so many microseconds; `None` for none.
#[must_use]
pub const fn frequency(number: u64, window_micros: u64) -> Option<FrequencyBucket> {
    if number == 0 {
        return None;
    }
    // Whole numbers: `number` times the bound, so that nothing is rounded.
    let (number, window) = (number as u128, window_micros as u128);
    Some(if window < number * HOUR as u128 {
        FrequencyBucket::OnDemand
    } else if window < number * DAY as u128 {
        FrequencyBucket::HourlyToDaily
    } else if window < number * WEEK as u128 {
        FrequencyBucket::DailyToWeekly
    } else if window < number * MONTH as u128 {
        FrequencyBucket::WeeklyToMonthly
    } else if window < number * SIX_MONTHS as u128 {
        FrequencyBucket::MonthlyToHalfYearly
    } else {
        FrequencyBucket::Less
    })
}

/// The level of a frequency. DORA explains "on demand" as several deployments a day: so is what comes
/// more often than daily.
#[must_use]
pub const fn frequency_level(bucket: FrequencyBucket) -> Option<Level> {
    match bucket {
        FrequencyBucket::OnDemand | FrequencyBucket::HourlyToDaily => level(LevelName::Elite),
        FrequencyBucket::DailyToWeekly => level(LevelName::High),
        FrequencyBucket::WeeklyToMonthly => level(LevelName::Medium),
        FrequencyBucket::MonthlyToHalfYearly | FrequencyBucket::Less => None,
    }
}

/// The level of a change lead time, in microseconds.
#[must_use]
pub const fn lead_time_level(micros: u64) -> Option<Level> {
    match micros {
        ..DAY => level(LevelName::Elite),
        DAY..WEEK => level(LevelName::High),
        WEEK..MONTH => level(LevelName::Medium),
        MONTH.. => None,
    }
}

/// The level of a recovery time, in microseconds.
#[must_use]
pub const fn recovery_level(micros: u64) -> Option<Level> {
    match micros {
        ..HOUR => level(LevelName::Elite),
        HOUR..DAY => level(LevelName::High),
        DAY..WEEK => level(LevelName::Medium),
        WEEK.. => None,
    }
}

/// The level of so many failed ones of so many; `None` as well for none of none.
#[must_use]
pub const fn fail_rate_level(part: u64, whole: u64) -> Option<Level> {
    let (part, whole) = (part as u128 * 100, whole as u128);
    if whole == 0 {
        None
    } else if part <= 5 * whole {
        level(LevelName::Elite)
    } else if part <= 10 * whole {
        level(LevelName::High)
    } else if part <= 15 * whole {
        level(LevelName::Medium)
    } else {
        None
    }
}
