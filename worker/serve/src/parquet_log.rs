//! Rows of the log of predictions as Parquet. The raw columns have their own names, so that such a
//! file can be learned from; ours begin with `_`.

use emberline_data::schema::{BatchBuilder, ColumnDef, ColumnType, Schema, Value};
use emberline_train::{fit::most_probable, model::Predictions};
use parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};

use crate::{
    columns::Values,
    feedback::Truth,
    log::{LabelRecord, Prediction},
};

/// Classes whose probabilities have a column each; of models with more only the class is kept.
const MAX_CLASSES: usize = 64;

fn column(name: impl Into<String>, column_type: ColumnType) -> ColumnDef {
    ColumnDef {
        name: name.into(),
        column_type,
    }
}

/// A name that no column has yet.
fn free(columns: &[ColumnDef], name: &str, column_type: ColumnType) -> ColumnDef {
    let mut name = name.to_owned();
    while columns.iter().any(|column| column.name == name) {
        name.insert(0, '_');
    }
    column(name, column_type)
}

fn written(schema: &Schema, mut rows: BatchBuilder) -> Result<Vec<u8>, String> {
    let batch = rows.take().map_err(|e| e.to_string())?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_created_by("emberline".to_owned())
        .build();
    let writer = ArrowWriter::try_new(Vec::new(), schema.to_arrow(), Some(properties));
    let mut writer = writer.map_err(|e| e.to_string())?;
    writer.write(&batch).map_err(|e| e.to_string())?;
    writer.into_inner().map_err(|e| e.to_string())
}

fn value_at(values: &Values, row: usize) -> Value<'_> {
    match values {
        Values::Integers(v) => v.get(row).map_or(Value::Null, |v| Value::Integer(*v)),
        Values::Floats(v) => v.get(row).map_or(Value::Null, |v| Value::Float(*v)),
        Values::Bools(v) => v.get(row).map_or(Value::Null, |v| Value::Boolean(*v)),
        Values::Texts(v) => v.get(row).map_or(Value::Null, |v| Value::Text(v)),
        Values::Bytes(v) => v.get(row).map_or(Value::Null, |v| Value::Bytes(v)),
    }
}

/// Requests of one version.
pub(crate) fn predictions(records: &[Prediction]) -> Result<Vec<u8>, String> {
    let Some(first) = records.first() else {
        return Err("there is nothing to write".to_owned());
    };
    let of = &first.version.schema;
    let mut columns: Vec<ColumnDef> = (of.inputs.iter())
        .map(|input| column(input.name.clone(), input.kind))
        .collect();
    let mut own = vec![
        ("_time".to_owned(), ColumnType::Text),
        ("_request_id".to_owned(), ColumnType::Text),
        ("_row".to_owned(), ColumnType::Integer),
    ];
    let shown = match of.classes.len() {
        0 => {
            own.push(("_value".to_owned(), ColumnType::Float));
            0
        }
        classes => {
            own.push(("_class".to_owned(), ColumnType::Text));
            let shown = if classes > MAX_CLASSES { 0 } else { classes };
            let probabilities = of.classes.iter().take(shown);
            own.extend(probabilities.map(|c| (format!("_probability_{c}"), ColumnType::Float)));
            shown
        }
    };
    for (name, kind) in own {
        columns.push(free(&columns, &name, kind));
    }
    let schema = Schema { columns };
    let mut rows = BatchBuilder::new(&schema);
    for record in records {
        let time = record.at.exact();
        let classes = match &*record.predictions {
            Predictions::Probabilities { classes, values } => most_probable(values, *classes),
            Predictions::Values(_) => Vec::new(),
        };
        for row in 0..record.columns.rows {
            let mut at = 0;
            let mut push = |value: Value<'_>| {
                rows.push(at, value);
                at += 1;
            };
            for values in &record.columns.values {
                push(value_at(values, row));
            }
            push(Value::Text(&time));
            push(Value::Text(&record.id));
            push(Value::Integer(i64::try_from(row).unwrap_or(i64::MAX)));
            match &*record.predictions {
                Predictions::Values(values) => {
                    push(values.get(row).map_or(Value::Null, |v| Value::Float(*v)));
                }
                Predictions::Probabilities { classes: n, values } => {
                    let class = classes.get(row).and_then(|c| of.classes.get(*c as usize));
                    push(class.map_or(Value::Null, |class| Value::Text(class)));
                    for place in 0..shown {
                        let p = values.get(row * n + place);
                        push(p.map_or(Value::Null, |p| Value::Float(*p)));
                    }
                }
            }
            rows.end_row();
        }
    }
    written(&schema, rows)
}

/// Labels of one version.
pub(crate) fn labels(records: &[LabelRecord]) -> Result<Vec<u8>, String> {
    let of_classes = matches!(records.first().map(|r| &r.truth), Some(Truth::Class(_)));
    let kind = match of_classes {
        true => ColumnType::Text,
        false => ColumnType::Float,
    };
    let schema = Schema {
        columns: vec![
            column("_time", ColumnType::Text),
            column("_request_id", ColumnType::Text),
            column("_row", ColumnType::Integer),
            column("_label", kind),
            column("_predicted", kind),
        ],
    };
    let mut rows = BatchBuilder::new(&schema);
    for record in records {
        rows.push(0, Value::Text(&record.at.exact()));
        rows.push(1, Value::Text(&record.id));
        rows.push(2, Value::Integer(record.row.into()));
        for (at, truth) in [(3, &record.truth), (4, &record.predicted)] {
            rows.push(
                at,
                match truth {
                    Truth::Class(class) => Value::Text(class),
                    Truth::Value(value) => Value::Float(*value),
                },
            );
        }
        rows.end_row();
    }
    written(&schema, rows)
}
