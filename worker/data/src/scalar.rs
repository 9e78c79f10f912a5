//! Single values: read from text, guessed, cast. The same rules wherever a text becomes a number.

use crate::schema::{BatchBuilder, ColumnType, Value, quoted, type_name};

/// An integer, with or without sign, blanks around it ignored.
#[must_use]
pub fn parse_integer(text: &str) -> Option<i64> {
    text.trim().parse().ok()
}

/// A floating point number, blanks around it ignored: decimal, with exponent, `nan`, `inf` in any
/// case. A decimal number that is too large for a float is none, rather than infinite.
#[must_use]
pub fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim();
    let value: f64 = text.parse().ok()?;
    let overflow = value.is_infinite() && text.bytes().any(|b| b.is_ascii_digit());
    (!overflow).then_some(value)
}

/// `true` or `false` in any case, or 1 or 0, blanks around it ignored.
#[must_use]
pub fn parse_boolean(text: &str) -> Option<bool> {
    match text.trim() {
        t if t.eq_ignore_ascii_case("true") || t == "1" => Some(true),
        t if t.eq_ignore_ascii_case("false") || t == "0" => Some(false),
        _ => None,
    }
}

/// The narrowest type of a column of texts, found by looking at all of them.
///
/// Integer, then float, then boolean (`true`/`false`), then text. To lose nothing, some texts that
/// look like numbers are not taken for such: with leading zeros (`007`), or integers beyond 64 bits.
/// A column with no value at all is text, and so is one of nothing but `nan` and `inf`.
#[derive(Debug, Clone)]
pub struct Guess {
    seen: bool,
    finite: bool,
    integer: bool,
    float: bool,
    boolean: bool,
}

impl Default for Guess {
    fn default() -> Self {
        Self {
            seen: false,
            finite: false,
            integer: true,
            float: true,
            boolean: true,
        }
    }
}

impl Guess {
    /// Looks at one value that is not null.
    pub fn look_at(&mut self, text: &str) {
        self.seen = true;
        if !(self.integer || self.float || self.boolean) {
            return;
        }
        let text = text.trim();
        if self.boolean {
            self.boolean = text.eq_ignore_ascii_case("true") || text.eq_ignore_ascii_case("false");
        }
        if self.integer || self.float {
            let digits = text.trim_start_matches(['+', '-']);
            let padded = digits.len() > 1
                && digits.starts_with('0')
                && digits.as_bytes()[1].is_ascii_digit();
            let integer = !padded && parse_integer(text).is_some();
            let all_digits = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            let float = if padded || (all_digits && !integer) {
                None
            } else {
                parse_float(text)
            };
            self.integer &= integer;
            self.float &= float.is_some();
            self.finite |= float.is_some_and(f64::is_finite);
        }
    }

    /// What they all are.
    #[must_use]
    pub const fn column_type(&self) -> ColumnType {
        if !self.seen {
            ColumnType::Text
        } else if self.integer {
            ColumnType::Integer
        } else if self.float && self.finite {
            ColumnType::Float
        } else if self.boolean {
            ColumnType::Boolean
        } else {
            ColumnType::Text
        }
    }
}

/// Appends a value to a column of another type, or says why that cannot be.
///
/// Nothing is lost: a float becomes an integer only if it is whole, an integer a float only if that
/// is exact. Null stays null.
///
/// # Errors
/// One line without the place: `` `abc` is not an integer ``.
pub fn push_cast(
    to: &mut BatchBuilder,
    column: usize,
    column_type: ColumnType,
    value: Value<'_>,
) -> Result<(), String> {
    let refused = || {
        let shown = match value {
            Value::Text(text) => quoted(text),
            other => format!("{other}"),
        };
        let article = if column_type == ColumnType::Integer {
            "an"
        } else {
            "a"
        };
        let name = type_name(column_type);
        match column_type {
            ColumnType::Text | ColumnType::Bytes => format!("{shown} cannot be cast to {name}"),
            _ => format!("{shown} is not {article} {name}"),
        }
    };
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "checked"
    )]
    let cast = match (column_type, value) {
        (_, Value::Null) => Value::Null,
        (ColumnType::Integer, Value::Integer(_))
        | (ColumnType::Float, Value::Float(_))
        | (ColumnType::Boolean, Value::Boolean(_))
        | (ColumnType::Text, Value::Text(_))
        | (ColumnType::Bytes, Value::Bytes(_)) => value,
        (ColumnType::Integer, Value::Boolean(v)) => Value::Integer(i64::from(v)),
        (ColumnType::Integer, Value::Text(v)) => {
            Value::Integer(parse_integer(v).ok_or_else(refused)?)
        }
        (ColumnType::Integer, Value::Float(v)) => {
            // -2^63 is exact as a float, 2^63 is the first that no longer fits.
            let range = -9_223_372_036_854_775_808.0..9_223_372_036_854_775_808.0;
            if v.fract() != 0.0 || !range.contains(&v) {
                return Err(refused());
            }
            Value::Integer(v as i64)
        }
        (ColumnType::Float, Value::Integer(v)) => {
            let float = v as f64;
            if float as i128 != i128::from(v) {
                return Err(format!("{v} has more digits than a float can hold"));
            }
            Value::Float(float)
        }
        (ColumnType::Float, Value::Boolean(v)) => Value::Float(f64::from(u8::from(v))),
        (ColumnType::Float, Value::Text(v)) => Value::Float(parse_float(v).ok_or_else(refused)?),
        (ColumnType::Boolean, Value::Integer(v @ (0 | 1))) => Value::Boolean(v == 1),
        (ColumnType::Boolean, Value::Float(v)) if v == 0.0 || v == 1.0 => Value::Boolean(v == 1.0),
        (ColumnType::Boolean, Value::Text(v)) => {
            Value::Boolean(parse_boolean(v).ok_or_else(refused)?)
        }
        (ColumnType::Text, Value::Integer(_) | Value::Float(_) | Value::Boolean(_)) => {
            to.push(column, Value::Text(&value.to_string()));
            return Ok(());
        }
        (ColumnType::Text, Value::Bytes(v)) => {
            Value::Text(std::str::from_utf8(v).map_err(|_| refused())?)
        }
        (ColumnType::Bytes, Value::Text(v)) => Value::Bytes(v.as_bytes()),
        (ColumnType::Boolean, Value::Integer(_) | Value::Float(_) | Value::Bytes(_))
        | (ColumnType::Bytes, Value::Integer(_) | Value::Float(_) | Value::Boolean(_))
        | (ColumnType::Integer | ColumnType::Float, Value::Bytes(_)) => return Err(refused()),
    };
    to.push(column, cast);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(values: &[&str]) -> ColumnType {
        let mut guess = Guess::default();
        for value in values {
            guess.look_at(value);
        }
        guess.column_type()
    }

    #[test]
    fn a_guess_takes_the_narrowest_type_and_loses_nothing() {
        assert_eq!(guess(&["1", "-2", " 3 "]), ColumnType::Integer);
        assert_eq!(guess(&["1", "2.5", "nan"]), ColumnType::Float);
        assert_eq!(guess(&["True", "false"]), ColumnType::Boolean);
        assert_eq!(guess(&["1", "x"]), ColumnType::Text);
        assert_eq!(guess(&["007", "12"]), ColumnType::Text);
        assert_eq!(guess(&["12345678901234567890"]), ColumnType::Text);
        assert_eq!(guess(&["1e999", "1"]), ColumnType::Text);
        assert_eq!(guess(&["Nan", "Inf"]), ColumnType::Text);
        assert_eq!(guess(&["0.5", "0"]), ColumnType::Float);
        assert_eq!(guess(&["=SUM(A1)", "1"]), ColumnType::Text);
        assert_eq!(guess(&[]), ColumnType::Text);
    }
}
