//! Amounts as a person writes them: `90s`, `1h30m`, `512MiB`, `0.5` of a core.

use std::{borrow::Cow, fmt, str::FromStr, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A length of time, written as `250ms`, `90s`, `1h30m`, `7d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DurationText(pub Duration);

/// A number of bytes, written as `4096`, `512KiB`, `64MiB`, `2GiB` (or `KB`, `MB`, `GB` for powers of ten).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

const DURATION_RULE: &str = "write a duration as `250ms`, `90s`, `5m`, `1h30m` or `7d`";
const BYTES_RULE: &str = "write a size as `4096`, `512KiB`, `64MiB` or `2GiB`";

impl FromStr for DurationText {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || format!("`{}` is no duration: {DURATION_RULE}", text.escape_debug());
        let mut rest = text.trim();
        if rest.is_empty() {
            return Err(fail());
        }
        let mut total_ms: u64 = 0;
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, after) = rest.split_at(digits);
            let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
            let (unit, after) = after.split_at(letters);
            let factor_ms: u64 = match unit {
                "ms" => 1,
                "s" => 1000,
                "m" => 60_000,
                "h" => 3_600_000,
                "d" => 86_400_000,
                _ => return Err(fail()),
            };
            let part = number
                .parse::<u64>()
                .ok()
                .and_then(|n| n.checked_mul(factor_ms));
            total_ms = part
                .and_then(|p| total_ms.checked_add(p))
                .ok_or_else(fail)?;
            rest = after;
        }
        Ok(Self(Duration::from_millis(total_ms)))
    }
}

impl fmt::Display for DurationText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        if ms == 0 {
            return f.write_str("0s");
        }
        let mut rest = ms;
        for (unit, size) in [
            ("d", 86_400_000),
            ("h", 3_600_000),
            ("m", 60_000),
            ("s", 1000),
            ("ms", 1),
        ] {
            if rest >= size {
                write!(f, "{}{unit}", rest / size)?;
                rest %= size;
            }
        }
        Ok(())
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || format!("`{}` is no size: {BYTES_RULE}", text.escape_debug());
        let text = text.trim();
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let factor: u64 = match unit.trim() {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            "KB" => 1000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return Err(fail()),
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(factor))
            .map(Self)
            .ok_or_else(fail)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// YAML gives a number where a person wrote one without a unit; both are taken for sizes.
#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText<'a> {
    Number(u64),
    #[serde(borrow)]
    Text(Cow<'a, str>),
}

macro_rules! as_text {
    ($name:ident, $rule:expr, $pattern:expr, $number:expr) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let from_number: fn(u64) -> Result<Self, String> = $number;
                match NumberOrText::deserialize(d) {
                    Ok(NumberOrText::Number(n)) => from_number(n).map_err(D::Error::custom),
                    Ok(NumberOrText::Text(text)) => text.parse().map_err(D::Error::custom),
                    Err(_) => Err(D::Error::custom($rule)),
                }
            }
        }
        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                $pattern
            }
        }
    };
}

as_text!(
    DurationText,
    DURATION_RULE,
    json_schema!({ "type": "string", "format": "emberline duration", "pattern": "^([0-9]+(ms|s|m|h|d))+$" }),
    |n| Err(format!("`{n}` has no unit: {DURATION_RULE}"))
);
as_text!(
    ByteSize,
    BYTES_RULE,
    json_schema!({ "type": ["string", "integer"], "format": "emberline size", "minimum": 0, "pattern": "^[0-9]+ ?(B|[KMGT]i?B)?$" }),
    |n| Ok(ByteSize(n))
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_back_what_they_show() -> Result<(), String> {
        for (text, ms) in [
            ("250ms", 250),
            ("90s", 90_000),
            ("1h30m", 5_400_000),
            ("7d", 604_800_000),
        ] {
            let parsed: DurationText = text.parse()?;
            assert_eq!(parsed.0.as_millis(), ms);
            assert_eq!(parsed.to_string().parse::<DurationText>()?, parsed);
        }
        for bad in ["", "5", "s", "1y", "-1s", "1.5h", "99999999999999999999d"] {
            assert!(bad.parse::<DurationText>().is_err(), "{bad:?} was taken");
        }
        Ok(())
    }

    #[test]
    fn sizes_know_powers_of_two_and_of_ten() -> Result<(), String> {
        assert_eq!("64MiB".parse::<ByteSize>()?.0, 64 << 20);
        assert_eq!("64MB".parse::<ByteSize>()?.0, 64_000_000);
        assert_eq!("4096".parse::<ByteSize>()?.0, 4096);
        assert!("1.5GiB".parse::<ByteSize>().is_err());
        Ok(())
    }
}
