//! What `validate` found: rules that did not hold, with rows that break them, and drift.

use emberline_worker::documents::{ColumnDrift, RuleFailure, Validation};

use super::{data, verdict};
use crate::{
    chart::bars,
    format::{count, literal, number, plural},
    html::{
        Heading::{Number, Text},
        Html, cut,
    },
    material::Material,
};

/// The most validations that are shown.
const MAX_VALIDATIONS: usize = 12;
/// The most failed rules of each.
const MAX_FAILURES: usize = 100;
/// The most example rows of a rule, and columns of those.
const MAX_EXAMPLES: usize = 5;
const MAX_EXAMPLE_COLUMNS: usize = 16;
/// The most columns of the comparison with the reference.
const MAX_DRIFT: usize = 150;
/// By rule of thumb, a population stability index from here on is a large shift.
const LARGE_SHIFT: f64 = 0.25;

/// Writes the section.
pub fn write(h: &mut Html, material: &Material<'_>) {
    for known in material.validations.iter().take(MAX_VALIDATIONS) {
        let validation = &known.document;
        h.element("h3", &[], |h| {
            h.text(format_args!("{} ", known.label()));
            verdict(h, validation.passed);
        });
        let rules = validation
            .rules_passed
            .saturating_add(validation.failures.len() as u64);
        h.paragraph(
            "muted",
            format_args!(
                "{} of {} held on {}",
                count(validation.rules_passed),
                plural(rules, "rule"),
                plural(validation.rows, "row")
            ),
        );
        for failure in validation.failures.iter().take(MAX_FAILURES) {
            self::failure(h, failure, validation);
        }
        if validation.failures.len() > MAX_FAILURES {
            let more = (validation.failures.len() - MAX_FAILURES) as u64;
            h.paragraph(
                "muted",
                format_args!("and {}", plural(more, "more failed rule")),
            );
        }
        drift(h, &validation.drift);
        if !validation.table.columns.is_empty() {
            h.element("details", &[], |h| {
                h.leaf("summary", &[], "The table that was checked");
                data::summary(h, &validation.table, &known.label());
            });
        }
    }
}

fn failure(h: &mut Html, failure: &RuleFailure, validation: &Validation) {
    h.div("fault", |h| {
        h.element("p", &[("class", &"where")], |h| {
            h.span("bad", "✕");
            h.leaf("code", &[], cut(&failure.rule, 200));
            if failure.count > 0 {
                let rows = plural(failure.count, "row");
                h.span(
                    "muted",
                    format_args!("{rows} of {}", count(validation.rows)),
                );
            }
        });
        h.paragraph("message", cut(&failure.message, 1000));
        examples(h, failure);
    });
}

fn examples(h: &mut Html, failure: &RuleFailure) {
    let rows = &failure.examples[..failure.examples.len().min(MAX_EXAMPLES)];
    // The column at fault first.
    let mut columns: Vec<&str> = Vec::new();
    let all = rows
        .iter()
        .flat_map(|row| row.values.keys().map(String::as_str));
    for column in failure.column.as_deref().into_iter().chain(all) {
        let known = rows.iter().any(|row| row.values.contains_key(column));
        if known && !columns.contains(&column) && columns.len() < MAX_EXAMPLE_COLUMNS {
            columns.push(column);
        }
    }
    if columns.is_empty() {
        return;
    }
    let names: Vec<String> = columns.iter().map(|column| cut(column, 40)).collect();
    let mut headings = vec![Number("row")];
    headings.extend(names.iter().map(|name| Text(name)));
    h.table("First rows that break it", &headings, |h| {
        for row in rows {
            h.row(|h| {
                h.number_cell(count(row.row));
                for column in &columns {
                    let text = row.values.get(*column).map_or_else(String::new, literal);
                    if failure.column.as_deref() == Some(column) {
                        h.leaf("td", &[("class", &"culprit")], text);
                    } else {
                        h.cell(text);
                    }
                }
            });
        }
    });
}

/// The largest shift first.
fn drift(h: &mut Html, drift: &[ColumnDrift]) {
    if drift.is_empty() {
        return;
    }
    let mut columns: Vec<&ColumnDrift> = drift.iter().collect();
    columns.sort_by(|a, b| b.psi.total_cmp(&a.psi));
    let finite = columns
        .iter()
        .map(|column| column.psi)
        .filter(|psi| psi.is_finite());
    let most = finite.fold(LARGE_SHIFT * 1.2, f64::max);
    let caption = "Drift against the reference: population stability index (the line is at 0.25, by rule of thumb a large shift) and Kolmogorov-Smirnov statistic";
    let headings = [
        Text("column"),
        Number("PSI"),
        Text(""),
        Number("KS"),
        Text(""),
        Number("p-value"),
        Text("within limits"),
    ];
    h.table(caption, &headings, |h| {
        for column in columns.iter().take(MAX_DRIFT) {
            h.row(|h| {
                let name = cut(&column.column, 80);
                h.row_head(&name);
                h.number_cell(number(column.psi));
                h.element("td", &[], |h| {
                    let what = format!("{name}: PSI {}", number(column.psi));
                    bars::amount(
                        h,
                        column.psi,
                        most,
                        Some(LARGE_SHIFT),
                        !column.passed,
                        &what,
                    );
                });
                h.number_cell(column.ks.map_or_else(String::new, number));
                h.element("td", &[], |h| {
                    if let Some(ks) = column.ks {
                        let what = format!("{name}: KS {}", number(ks));
                        bars::amount(h, ks, 1.0, None, !column.passed, &what);
                    }
                });
                h.number_cell(column.ks_p.map_or_else(String::new, number));
                h.element("td", &[], |h| verdict(h, column.passed));
            });
        }
    });
    if drift.len() > MAX_DRIFT {
        let more = (drift.len() - MAX_DRIFT) as u64;
        h.paragraph("muted", format_args!("and {}", plural(more, "more column")));
    }
}
