//! Points in time as people write them on the command line.

use emberline_common::{spec::DurationText, time::Timestamp};

use crate::exit::Exit;

/// Reads what `flag` says: a time as in RFC 3339, a date (its beginning in UTC), or how long ago.
///
/// # Errors
/// One line, if it is none of these.
pub fn moment(flag: &str, text: &str, now: Timestamp) -> Result<Timestamp, Exit> {
    let text = text.trim();
    let at = Timestamp::parse(text).or_else(|| Timestamp::parse(&format!("{text}T00:00:00Z")));
    if let Some(at) = at {
        return Ok(at);
    }
    let ago: Result<DurationText, _> = text.parse();
    ago.map(|ago| now.before(ago.0)).map_err(|_| {
        Exit::input(format!(
            "`{flag} {}` is no time: write e.g. `2026-11-23T10:00:00Z`, `2026-11-23`, or `30d` for so long ago",
            text.escape_debug()
        ))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_time_a_date_and_how_long_ago_are_read() {
        let now = Timestamp::parse("2026-11-23T10:00:00Z").unwrap();
        for (text, at) in [
            ("2026-11-22T12:00:00+02:00", "2026-11-22T10:00:00Z"),
            ("2026-11-22", "2026-11-22T00:00:00Z"),
            ("1d2h", "2026-11-22T08:00:00Z"),
        ] {
            assert_eq!(
                moment("--since", text, now).unwrap(),
                Timestamp::parse(at).unwrap()
            );
        }
        let wrong = moment("--since", "last week", now).unwrap_err().to_string();
        assert!(
            wrong.starts_with("`--since last week` is no time"),
            "{wrong}"
        );
    }
}
