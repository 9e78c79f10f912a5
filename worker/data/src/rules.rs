//! The rules of `validate` over a table in memory. Every rule is looked at, whatever the others say.

use std::collections::HashSet;

use emberline_common::spec::kinds::{
    ValidateSpec,
    convert::{ColumnType, Scalar},
    validate::{ColumnRules, DriftSpec},
};
use emberline_worker::documents::{ColumnDrift, ExampleRow, RuleFailure};
use serde_json::Map;

use crate::{
    drift,
    schema::{Value, cut, type_name},
    table::{Column, Table, missing_column},
};

/// The columns that an example row shows at most.
const EXAMPLE_COLUMNS: usize = 20;

/// What the rules found.
#[derive(Default)]
pub struct Findings {
    /// Rules that held.
    pub passed: u64,
    /// Rules that did not.
    pub failures: Vec<RuleFailure>,
    /// The comparison with the reference.
    pub drift: Vec<ColumnDrift>,
}

/// Looks at a table.
pub struct Checker<'a> {
    table: &'a Table,
    examples: usize,
    found: Findings,
}

impl<'a> Checker<'a> {
    /// Looks at all rules but the drift's.
    pub fn check(table: &'a Table, spec: &ValidateSpec) -> Self {
        let mut checker = Self {
            table,
            examples: spec.examples.min(100) as usize,
            found: Findings::default(),
        };
        checker.row_counts(spec);
        for (name, reason) in &spec.forbidden_columns {
            let message = table
                .column(name)
                .map(|_| format!("the column `{name}` must not be there: {reason}"));
            checker.whole(format!("forbidden_columns.{name}"), Some(name), message);
        }
        if !spec.allow_other_columns {
            checker.other_columns(spec);
        }
        for (name, rules) in &spec.columns {
            match table.column(name) {
                Some(column) => checker.column(name, column, rules),
                None => {
                    let names = table.columns.iter().map(|c| c.name.as_str());
                    let message = (!rules.optional).then(|| missing_column(name, names));
                    checker.whole(format!("columns.{name}"), Some(name), message);
                }
            }
        }
        for (number, columns) in spec.unique.iter().enumerate() {
            checker.unique_set(number, columns);
        }
        checker
    }

    /// What was found.
    pub fn finish(self) -> Findings {
        self.found
    }

    fn row_counts(&mut self, spec: &ValidateSpec) {
        let rows = self.table.rows as u64;
        let few = (rows < spec.min_rows)
            .then(|| format!("{rows} rows, at least {} are wanted", spec.min_rows));
        self.whole("min_rows".to_owned(), None, few);
        if let Some(max) = spec.max_rows {
            let many = (rows > max).then(|| format!("{rows} rows, at most {max} are wanted"));
            self.whole("max_rows".to_owned(), None, many);
        }
    }

    fn other_columns(&mut self, spec: &ValidateSpec) {
        let others: Vec<String> = self
            .table
            .columns
            .iter()
            .filter(|c| !spec.columns.contains_key(&c.name))
            .map(|c| format!("`{}`", cut(&c.name, 60)))
            .collect();
        let shown = others
            .iter()
            .take(10)
            .cloned()
            .collect::<Vec<_>>()
            .join(", ");
        let message = (!others.is_empty())
            .then(|| format!("{} columns have no rules: {shown}", others.len()));
        self.whole("allow_other_columns".to_owned(), None, message);
    }

    fn column(&mut self, name: &str, column: &Column, rules: &ColumnRules) {
        let rule = |field: &str| format!("columns.{name}.{field}");
        let total = column.len();
        if let Some(wanted) = rules.column_type {
            let found = column.column_type();
            let message = (found != wanted).then(|| {
                format!(
                    "`{name}` is {}, not {}",
                    type_name(found),
                    type_name(wanted)
                )
            });
            self.whole(rule("type"), Some(name), message);
        }
        self.nulls(name, column, rules.max_null_fraction);
        if column.column_type() == ColumnType::Float && !rules.allow_non_finite {
            let bad = rows_where(column, |v| matches!(v, Value::Float(v) if !v.is_finite()));
            self.rows(rule("allow_non_finite"), &[name], &bad, |count| {
                format!("`{name}`: {count} of {total} values are NaN or infinite")
            });
        }
        if let Some(min) = rules.min {
            self.bound(name, column, rule("min"), min, "below", |v| v < min);
        }
        if let Some(max) = rules.max {
            self.bound(name, column, rule("max"), max, "above", |v| v > max);
        }
        if !rules.allowed.is_empty() {
            let bad = rows_where(column, |v| {
                v != Value::Null && !rules.allowed.iter().any(|a| is_scalar(v, a))
            });
            let first = bad
                .first()
                .map(|row| cut(&column.value(*row).to_string(), 60));
            self.rows(rule("allowed"), &[name], &bad, |count| {
                format!(
                    "`{name}`: {count} of {total} values are not allowed, e.g. `{}`",
                    first
                        .as_deref()
                        .unwrap_or_default()
                        .replace(['\n', '\r'], " ")
                )
            });
        }
        if rules.unique {
            let bad = repeated(&[column], true);
            self.rows(rule("unique"), &[name], &bad, |count| {
                format!("`{name}`: {count} of {total} values stand there already")
            });
        }
        if rules.min_distinct > 0 {
            let nulls = column.null_count();
            let distinct = (total - repeated(&[column], true).len() - nulls) as u64;
            let message = (distinct < rules.min_distinct).then(|| {
                format!(
                    "`{name}` has {distinct} different values, at least {} are wanted",
                    rules.min_distinct
                )
            });
            self.whole(rule("min_distinct"), Some(name), message);
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "rows are far below 2^53")]
    fn nulls(&mut self, name: &str, column: &Column, max_fraction: f64) {
        let nulls = column.null_count();
        let fraction = nulls as f64 / column.len().max(1) as f64;
        let bad = if fraction > max_fraction {
            rows_where(column, |v| v == Value::Null)
        } else {
            Vec::new()
        };
        self.rows(
            format!("columns.{name}.max_null_fraction"),
            &[name],
            &bad,
            |count| {
                format!(
                    "`{name}`: {count} of {} values are null ({:.4}), at most a share of {max_fraction} is wanted",
                    column.len(),
                    fraction
                )
            },
        );
    }

    fn bound(
        &mut self,
        name: &str,
        column: &Column,
        rule: String,
        bound: f64,
        side: &str,
        breaks: impl Fn(f64) -> bool,
    ) {
        if matches!(
            column.column_type(),
            ColumnType::Text | ColumnType::Bytes | ColumnType::Boolean
        ) {
            let message = format!(
                "`{name}` is {}: it has no values {side} or not {side} {bound}",
                type_name(column.column_type())
            );
            self.whole(rule, Some(name), Some(message));
            return;
        }
        let bad: Vec<usize> = (0..column.len())
            .filter(|row| column.number(*row).is_some_and(&breaks))
            .collect();
        let worst = bad
            .iter()
            .filter_map(|row| column.number(*row))
            .max_by(|a, b| (a - bound).abs().total_cmp(&(b - bound).abs()));
        self.rows(rule, &[name], &bad, |count| {
            format!(
                "`{name}`: {count} of {} values are {side} {bound}, the farthest is {}",
                column.len(),
                worst.unwrap_or(bound)
            )
        });
    }

    /// Nulls count as a value here: two rows that are equal in all columns are twice the same.
    fn unique_set(&mut self, number: usize, names: &[String]) {
        let rule = format!("unique[{number}]");
        let mut columns = Vec::new();
        for name in names {
            match self.table.column(name) {
                Some(column) => columns.push(column),
                None => {
                    let there = self.table.columns.iter().map(|c| c.name.as_str());
                    let message = missing_column(name, there);
                    self.whole(rule, None, Some(message));
                    return;
                }
            }
        }
        let bad = repeated(&columns, false);
        let total = self.table.rows;
        let shown: Vec<&str> = names.iter().map(String::as_str).collect();
        self.rows(rule, &shown, &bad, |count| {
            format!(
                "{count} of {total} rows repeat the values of ({}) of an earlier row",
                shown.join(", ")
            )
        });
    }

    /// Compares with a reference.
    pub fn drift(&mut self, reference: &Table, spec: &DriftSpec) {
        let names: Vec<String> = if spec.columns.is_empty() {
            self.table
                .columns
                .iter()
                .filter(|c| c.column_type() != ColumnType::Bytes)
                .filter(|c| reference.column(&c.name).is_some())
                .map(|c| c.name.clone())
                .collect()
        } else {
            spec.columns.clone()
        };
        for name in &names {
            self.drift_of(name, reference, spec);
        }
    }

    fn drift_of(&mut self, name: &str, reference: &Table, spec: &DriftSpec) {
        let rule = format!("drift.columns.{name}");
        let (Some(data), Some(other)) = (self.table.column(name), reference.column(name)) else {
            let (whose, lacking) = match self.table.column(name) {
                Some(_) => ("the reference: ", reference),
                None => ("", self.table),
            };
            let there = lacking.columns.iter().map(|c| c.name.as_str());
            let message = format!("{whose}{}", missing_column(name, there));
            self.whole(rule, Some(name), Some(message));
            return;
        };
        let numbers = drift::sorted_numbers(data).zip(drift::sorted_numbers(other));
        let numeric =
            |c: &Column| matches!(c.column_type(), ColumnType::Integer | ColumnType::Float);
        let comparable = data.column_type() != ColumnType::Bytes
            && (numbers.is_some() || data.column_type() == other.column_type())
            && numeric(data) == numeric(other);
        if !comparable {
            let message = format!(
                "`{name}` is {} here and {} in the reference: they cannot be compared",
                type_name(data.column_type()),
                type_name(other.column_type())
            );
            self.whole(rule, Some(name), Some(message));
            return;
        }
        let empty = match &numbers {
            Some((a, b)) => a.is_empty() || b.is_empty(),
            None => data.null_count() == data.len() || other.null_count() == other.len(),
        };
        if empty {
            let message = format!("`{name}` has no values to compare, here or in the reference");
            self.whole(rule, Some(name), Some(message));
            return;
        }
        let (psi, ks, ks_p) = match &numbers {
            Some((a, b)) => {
                let ks = drift::ks_statistic(a, b);
                let p = drift::ks_p_value(ks, a.len(), b.len());
                (drift::psi_numbers(a, b), Some(ks), Some(p))
            }
            None => (drift::psi_values(data, other), None, None),
        };
        let moved = psi > spec.max_psi;
        let message = moved.then(|| {
            format!(
                "`{name}` has drifted: its stability index is {psi:.4}, at most {} is wanted",
                spec.max_psi
            )
        });
        self.whole(format!("drift.max_psi.{name}"), Some(name), message);
        let mut differs = false;
        if let (Some(ks), Some(p)) = (ks, ks_p)
            && spec.min_ks_p > 0.0
        {
            differs = p < spec.min_ks_p;
            let message = differs.then(|| {
                format!(
                    "`{name}` has drifted: Kolmogorov-Smirnov {ks:.4} with p = {p:.3e}, at least {} is wanted",
                    spec.min_ks_p
                )
            });
            self.whole(format!("drift.min_ks_p.{name}"), Some(name), message);
        }
        self.found.drift.push(ColumnDrift {
            column: name.to_owned(),
            psi,
            ks,
            ks_p,
            passed: !moved && !differs,
        });
    }

    /// A rule about the table or a column as a whole: it fails if there is a message.
    fn whole(&mut self, rule: String, column: Option<&str>, message: Option<String>) {
        match message {
            None => self.found.passed += 1,
            Some(message) => self.found.failures.push(RuleFailure {
                rule,
                column: column.map(str::to_owned),
                message,
                count: 0,
                examples: Vec::new(),
            }),
        }
    }

    /// A rule about rows: it fails if there are any that break it.
    fn rows(
        &mut self,
        rule: String,
        columns: &[&str],
        bad: &[usize],
        message: impl FnOnce(usize) -> String,
    ) {
        if bad.is_empty() {
            self.found.passed += 1;
            return;
        }
        let examples = bad
            .iter()
            .take(self.examples)
            .map(|row| self.example(*row, columns))
            .collect();
        self.found.failures.push(RuleFailure {
            rule,
            column: match columns {
                [one] => Some((*one).to_owned()),
                _ => None,
            },
            message: message(bad.len()),
            count: bad.len() as u64,
            examples,
        });
    }

    /// A row: the rule's columns first, then others up to a bound.
    fn example(&self, row: usize, columns: &[&str]) -> ExampleRow {
        let first = columns.iter().filter_map(|name| self.table.column(name));
        let mut values = Map::new();
        for column in first.chain(&self.table.columns) {
            if values.len() >= EXAMPLE_COLUMNS.max(columns.len()) {
                break;
            }
            values
                .entry(column.name.clone())
                .or_insert_with(|| column.value(row).to_json());
        }
        ExampleRow {
            row: row as u64,
            values,
        }
    }
}

fn rows_where(column: &Column, holds: impl Fn(Value<'_>) -> bool) -> Vec<usize> {
    (0..column.len())
        .filter(|row| holds(column.value(*row)))
        .collect()
}

/// Rows whose values stand in an earlier row; those with a null are passed over if `skip_nulls`.
fn repeated(columns: &[&Column], skip_nulls: bool) -> Vec<usize> {
    let rows = columns.first().map_or(0, |c| c.len());
    let mut seen: HashSet<Vec<u8>> = HashSet::new();
    let mut out = Vec::new();
    for row in 0..rows {
        if skip_nulls && columns.iter().any(|c| c.is_null(row)) {
            continue;
        }
        let mut key = Vec::new();
        for column in columns {
            push_key(&mut key, column.value(row));
        }
        if !seen.insert(key) {
            out.push(row);
        }
    }
    out
}

fn push_key(key: &mut Vec<u8>, value: Value<'_>) {
    let mut bytes = |tag: u8, bytes: &[u8]| {
        key.push(tag);
        key.extend((bytes.len() as u64).to_le_bytes());
        key.extend(bytes);
    };
    match value {
        Value::Null => bytes(0, &[]),
        Value::Integer(v) => bytes(1, &v.to_le_bytes()),
        // 0.0 and -0.0 are one value.
        Value::Float(v) => bytes(2, &(v + 0.0).to_le_bytes()),
        Value::Boolean(v) => bytes(3, &[u8::from(v)]),
        Value::Text(v) => bytes(4, v.as_bytes()),
        Value::Bytes(v) => bytes(5, v),
    }
}

/// Whether a value is a scalar of the spec; an integer is also a float without fraction.
fn is_scalar(value: Value<'_>, scalar: &Scalar) -> bool {
    match (value, scalar) {
        (Value::Integer(v), Scalar::Number(n)) => n.as_i64().map_or_else(
            || {
                n.as_f64()
                    .is_some_and(|f| f.fract() == 0.0 && f as i128 == i128::from(v))
            },
            |n| n == v,
        ),
        (Value::Float(v), Scalar::Number(n)) => n.as_f64() == Some(v),
        (Value::Boolean(v), Scalar::Bool(b)) => v == *b,
        (Value::Text(v), Scalar::String(s)) => v == s,
        _ => false,
    }
}
