//! Numbers, times and sizes as people read them. Everything here takes any value, NaN included.

use std::time::Duration;

use serde_json::Value;

use crate::html::cut;

/// The longest text of a value in a table.
const MAX_VALUE_CHARACTERS: usize = 80;

/// A number with 4 significant digits; whole numbers in full, in groups of three.
pub fn number(value: f64) -> String {
    if value.is_nan() {
        return "n/a".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "∞" } else { "-∞" }.to_owned();
    }
    let size = value.abs();
    if size == 0.0 {
        return "0".to_owned();
    }
    if size < 1e9 && size.fract() == 0.0 {
        return group(&format!("{value:.0}"));
    }
    // Rounding first, so that 9.99996 has the digits of 10.
    let scientific = format!("{value:.3e}");
    let exponent = scientific
        .split_once('e')
        .and_then(|(_, e)| e.parse::<i32>().ok())
        .unwrap_or(0);
    if !(-4..9).contains(&exponent) {
        let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        return format!("{}e{exponent}", trim(digits));
    }
    let decimals = usize::try_from(3 - exponent).unwrap_or(0);
    group(trim(&format!("{value:.decimals$}")))
}

/// A number with its sign.
pub fn signed(value: f64) -> String {
    let text = number(value);
    if value > 0.0 {
        format!("+{text}")
    } else {
        text
    }
}

/// A count in groups of three.
pub fn count(value: u64) -> String {
    group(&value.to_string())
}

/// `1 row`, `2 rows`.
pub fn plural(value: u64, one: &str) -> String {
    format!(
        "{} {one}{}",
        count(value),
        if value == 1 { "" } else { "s" }
    )
}

/// A part of a whole in percent; empty without a whole.
pub fn percent(part: f64, whole: f64) -> String {
    if whole > 0.0 && part.is_finite() {
        format!("{} %", round(100.0 * part / whole))
    } else {
        String::new()
    }
}

/// A time with the unit that suits it: `850 µs`, `12 ms`, `1.2 s`, `2 min 5 s`, `3 h 20 min`, `2 d 4 h`.
pub fn duration(time: Duration) -> String {
    let micros = time.as_micros();
    let seconds = time.as_secs_f64().round() as u64;
    match micros {
        0 => "0 s".to_owned(),
        1..1_000 => format!("{micros} µs"),
        1_000..10_000 => format!("{} ms", trim(&format!("{:.1}", micros as f64 / 1e3))),
        10_000..999_500 => format!("{:.0} ms", micros as f64 / 1e3),
        999_500..9_950_000 => format!("{} s", trim(&format!("{:.1}", micros as f64 / 1e6))),
        _ if seconds < 60 => format!("{seconds} s"),
        _ if seconds < 3_600 => two(seconds, 60, "min", "s"),
        _ if seconds < 86_400 => two(seconds / 60, 60, "h", "min"),
        _ => two(seconds / 3_600, 24, "d", "h"),
    }
}

fn two(value: u64, base: u64, large: &str, small: &str) -> String {
    match (value / base, value % base) {
        (whole, 0) => format!("{whole} {large}"),
        (whole, rest) => format!("{whole} {large} {rest} {small}"),
    }
}

/// A size in bytes with the unit that suits it.
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if value < 1024 {
        return format!("{value} B");
    }
    let mut size = value as f64;
    let mut unit = "B";
    for next in UNITS {
        // What would be shown as 1024 is one of the next unit.
        if size < 1023.5 {
            break;
        }
        size /= 1024.0;
        unit = next;
    }
    format!("{} {unit}", round(size))
}

/// A JSON value in one short line: texts without quotes, numbers as numbers.
pub fn value(value: &Value) -> String {
    match value {
        Value::Null => "–".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(n) => match (n.as_u64(), n.as_f64()) {
            // A year or a seed is no amount: only long numbers are grouped.
            (Some(whole), _) if whole < 10_000 => whole.to_string(),
            (_, Some(n)) => number(n),
            _ => n.to_string(),
        },
        Value::String(text) => cut(text, MAX_VALUE_CHARACTERS),
        other => cut(&other.to_string(), MAX_VALUE_CHARACTERS),
    }
}

/// A JSON value as it was written, for settings, where `10000` must not become `10,000`.
pub fn literal(value: &Value) -> String {
    match value {
        Value::String(text) => cut(text, MAX_VALUE_CHARACTERS),
        other => cut(&other.to_string(), MAX_VALUE_CHARACTERS),
    }
}

/// Names such as `roc_auc` as words.
pub fn words(name: &str) -> String {
    match name {
        "f1" => "F1".to_owned(),
        "roc_auc" => "ROC AUC".to_owned(),
        "r2" => "R²".to_owned(),
        "mae" | "mse" | "rmse" | "mape" => name.to_uppercase(),
        name => name.replace('_', " "),
    }
}

fn round(value: f64) -> String {
    let decimals = if value.abs() < 9.95 {
        2
    } else {
        usize::from(value.abs() < 99.5)
    };
    trim(&format!("{value:.decimals$}")).to_owned()
}

fn trim(digits: &str) -> &str {
    if digits.contains('.') {
        digits.trim_end_matches('0').trim_end_matches('.')
    } else {
        digits
    }
}

/// Commas between groups of three digits of the whole part.
fn group(text: &str) -> String {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text),
    };
    let (whole, rest) = digits.split_at(digits.find('.').unwrap_or(digits.len()));
    let mut out = String::from(sign);
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_have_four_significant_digits() {
        let all = [
            (0.0, "0"),
            (0.963, "0.963"),
            (0.123_456, "0.1235"),
            (9.999_96, "10"),
            (1538.776, "1,539"),
            (-12_345_678.0, "-12,345,678"),
            (0.000_012_345, "1.234e-5"),
            (1.5e12, "1.5e12"),
            (f64::NAN, "n/a"),
            (f64::NEG_INFINITY, "-∞"),
            (f64::MAX, "1.798e308"),
        ];
        for (value, text) in all {
            assert_eq!(number(value), text, "{value:?}");
        }
        assert_eq!(signed(0.02), "+0.02");
        assert_eq!(signed(-0.02), "-0.02");
    }

    #[test]
    fn times_have_the_unit_that_suits_them() {
        let all = [
            (0, "0 s"),
            (850, "850 µs"),
            (1_240, "1.2 ms"),
            (12_400, "12 ms"),
            (999_600, "1 s"),
            (1_234_000, "1.2 s"),
            (59_700_000, "1 min"),
            (125_000_000, "2 min 5 s"),
            (12_000_000_000, "3 h 20 min"),
            (187_200_000_000, "2 d 4 h"),
        ];
        for (micros, text) in all {
            assert_eq!(duration(Duration::from_micros(micros)), text, "{micros}");
        }
        assert!(!duration(Duration::MAX).is_empty());
    }

    #[test]
    fn sizes_have_the_unit_that_suits_them() {
        let all = [
            (512, "512 B"),
            (1536, "1.5 KiB"),
            (1_048_570, "1 MiB"),
            (52_428_800, "50 MiB"),
        ];
        for (size, text) in all {
            assert_eq!(bytes(size), text);
        }
        assert_eq!(bytes(u64::MAX), "16384 PiB");
    }

    #[test]
    fn values_are_short_texts() {
        assert_eq!(value(&json!(2026)), "2026");
        assert_eq!(value(&json!(-0.25)), "-0.25");
        assert_eq!(value(&json!("x".repeat(200))).chars().count(), 80);
        assert_eq!(literal(&json!(100_000)), "100000");
        assert_eq!(percent(1.0, 0.0), "");
        assert_eq!(percent(1.0, 8.0), "12.5 %");
    }
}
