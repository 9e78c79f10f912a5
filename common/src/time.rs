//! Points in time as plain numbers, so that the engine can be driven without a clock.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// Microseconds since 1970-01-01T00:00:00Z.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// So much later.
    #[must_use]
    pub fn after(self, by: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(by.as_micros()).unwrap_or(u64::MAX)),
        )
    }

    /// So much earlier; 1970 at the earliest.
    #[must_use]
    pub fn before(self, by: Duration) -> Self {
        let by = u64::try_from(by.as_micros()).unwrap_or(u64::MAX);
        Self(self.0.saturating_sub(by))
    }

    /// The time from `earlier` to here; zero if `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }

    /// Reads RFC 3339, e.g. `2026-11-23T10:00:00Z`. Times before 1970 are none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let at: jiff::Timestamp = text.parse().ok()?;
        u64::try_from(at.as_microsecond()).ok().map(Self)
    }

    /// Reads a date as HTTP writes it, e.g. `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7; not its
    /// two obsolete forms). Times before 1970 are none.
    #[must_use]
    pub fn parse_http(text: &str) -> Option<Self> {
        let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text);
        u64::try_from(at.ok()?.as_microsecond()).ok().map(Self)
    }

    /// RFC 3339 in UTC, to the microsecond: [`Self::parse`] reads the same time from it.
    #[must_use]
    pub fn exact(self) -> String {
        let at = i64::try_from(self.0).ok();
        let at = at.and_then(|micros| jiff::Timestamp::from_microsecond(micros).ok());
        at.map_or_else(|| self.to_string(), |at| format!("{at:.6}"))
    }

    /// What the wall clock says now. Not for the engine: it is handed its time.
    #[must_use]
    pub fn now() -> Self {
        std::time::SystemTime::now().into()
    }
}

impl From<std::time::SystemTime> for Timestamp {
    /// A time before 1970 is 1970.
    fn from(at: std::time::SystemTime) -> Self {
        let since_epoch = at.duration_since(std::time::UNIX_EPOCH);
        Self(since_epoch.map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for Timestamp {
    /// RFC 3339 in UTC, to the millisecond.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = i64::try_from(self.0).unwrap_or(i64::MAX);
        match jiff::Timestamp::from_microsecond(micros) {
            Ok(at) => write!(f, "{at:.3}"),
            Err(_) => write!(f, "{}us", self.0),
        }
    }
}

/// For `#[serde(with)]`: a point in time as text that people and other programs read.
pub mod rfc3339 {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use super::Timestamp;

    /// Writes RFC 3339 to the microsecond.
    ///
    /// # Errors
    /// The serializer's.
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
    pub fn serialize<S: Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&at.exact())
    }

    /// Reads RFC 3339.
    ///
    /// # Errors
    /// If it is no time, or one before 1970.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Timestamp::parse(&text).ok_or_else(|| D::Error::custom("no time of RFC 3339"))
    }

    /// The same for what may be missing.
    pub mod option {
        use serde::{Deserialize, Deserializer, Serialize as _, Serializer};

        use super::Timestamp;

        #[derive(Deserialize)]
        struct At(#[serde(with = "super")] Timestamp);

        /// Writes RFC 3339 to the microsecond, or null.
        ///
        /// # Errors
        /// The serializer's.
        #[allow(clippy::ref_option, reason = "serde asks for it so")]
        pub fn serialize<S: Serializer>(
            at: &Option<Timestamp>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            at.map(Timestamp::exact).serialize(serializer)
        }

        /// Reads RFC 3339, or null.
        ///
        /// # Errors
        /// If it is no time, or one before 1970.
        pub fn deserialize<'de, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Option<Timestamp>, D::Error> {
            Ok(Option::<At>::deserialize(deserializer)?.map(|At(at)| at))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_http_are_read() {
        let at = Timestamp::parse("1994-11-06T08:49:37Z");
        assert!(at.is_some());
        assert_eq!(Timestamp::parse_http("Sun, 06 Nov 1994 08:49:37 GMT"), at);
        assert_eq!(Timestamp::parse_http("yesterday"), None);
    }
}
