//! The tables: rows, and of each column its type, nulls, different values and range.

use std::collections::BTreeMap;

use emberline_worker::documents::{ColumnSummary, TableSummary};

use crate::{
    chart::bars,
    format::{bytes, count, number, percent, plural},
    html::{
        Heading::{Number, Text},
        Html, cut,
    },
    material::Material,
};

/// The most tables that are shown.
const MAX_TABLES: usize = 12;
/// The most columns of each.
const MAX_COLUMNS: usize = 150;

/// The range of each numeric column over all tables, so that their bars can be compared.
type Ranges<'a> = BTreeMap<&'a str, [f64; 2]>;

/// Writes the section.
pub fn write(h: &mut Html, material: &Material<'_>) {
    if material.tables.is_empty() {
        return;
    }
    let ranges = ranges(material.tables.iter().map(|known| &known.document));
    for known in material.tables.iter().take(MAX_TABLES) {
        h.leaf("h3", &[], known.label());
        let table = &known.document;
        h.paragraph(
            "muted",
            format_args!(
                "{}, {}, {}",
                plural(table.rows, "row"),
                plural(table.columns.len() as u64, "column"),
                bytes(known.input.artifact.bytes)
            ),
        );
        columns(h, table, &ranges, &known.label());
    }
    if material.tables.len() > MAX_TABLES {
        let more = (material.tables.len() - MAX_TABLES) as u64;
        h.paragraph("muted", format_args!("and {}", plural(more, "more table")));
    }
}

/// A table about a table; also for the one that a validation looked at.
pub fn summary(h: &mut Html, table: &TableSummary, name: &str) {
    columns(h, table, &ranges(std::iter::once(table)), name);
}

fn ranges<'a>(tables: impl Iterator<Item = &'a TableSummary>) -> Ranges<'a> {
    let mut out = Ranges::new();
    for column in tables.flat_map(|table| &table.columns) {
        let (Some(min), Some(max)) = (column.min, column.max) else {
            continue;
        };
        let range = out.entry(column.name.as_str()).or_insert([min, max]);
        *range = [range[0].min(min), range[1].max(max)];
    }
    out
}

fn columns(h: &mut Html, table: &TableSummary, ranges: &Ranges<'_>, name: &str) {
    if table.columns.is_empty() {
        return;
    }
    let caption = format!("Columns of {name}; the bar is the range, the dot the mean");
    let headings = [
        Text("column"),
        Text("type"),
        Number("nulls"),
        Number("distinct"),
        Number("min"),
        Number("mean"),
        Number("max"),
        Text("range"),
    ];
    h.table(&caption, &headings, |h| {
        for column in table.columns.iter().take(MAX_COLUMNS) {
            h.row(|h| row(h, column, table.rows, ranges));
        }
    });
    if table.columns.len() > MAX_COLUMNS {
        let more = (table.columns.len() - MAX_COLUMNS) as u64;
        h.paragraph("muted", format_args!("and {}", plural(more, "more column")));
    }
}

fn row(h: &mut Html, column: &ColumnSummary, rows: u64, ranges: &Ranges<'_>) {
    h.row_head(cut(&column.name, 80));
    h.cell(cut(&column.column_type, 20));
    h.element("td", &[("class", &"n")], |h| {
        h.text(count(column.nulls));
        if column.nulls > 0 {
            let share = percent(column.nulls as f64, rows as f64);
            h.span("muted", format_args!(" {share}"));
        }
    });
    h.number_cell(match column.distinct {
        // The count stops there.
        Some(distinct) if distinct >= 1000 => "1,000+".to_owned(),
        Some(distinct) => count(distinct),
        None => String::new(),
    });
    for value in [column.min, column.mean, column.max] {
        h.number_cell(value.map_or_else(String::new, number));
    }
    h.element("td", &[], |h| {
        let (Some(min), Some(max)) = (column.min, column.max) else {
            return;
        };
        let whole = ranges
            .get(column.name.as_str())
            .copied()
            .unwrap_or([min, max]);
        let mean = column
            .mean
            .map_or_else(String::new, |m| format!(", mean {}", number(m)));
        let what = format!(
            "{}: {} to {}{mean}",
            cut(&column.name, 80),
            number(min),
            number(max)
        );
        bars::range(h, whole, (min, max), column.mean, &what);
    });
}
