//! The columns of a table and their form in memory: names, the five types, and builders of batches.

use std::{fmt, sync::Arc};

use arrow_array::{
    ArrayRef, RecordBatch, RecordBatchOptions,
    builder::{BinaryBuilder, BooleanBuilder, Float64Builder, Int64Builder, StringBuilder},
};
use arrow_schema::{DataType, Field, Schema as ArrowSchema, SchemaRef};
pub use emberline_common::spec::kinds::convert::ColumnType;

/// The most columns that a table may have. Wider data belongs into one column of bytes (images) or
/// into rows.
pub const MAX_COLUMNS: usize = 4096;
/// Rows in a batch at most.
pub const BATCH_ROWS: usize = 8192;
/// Bytes of text and bytes columns after which a batch is closed.
pub const BATCH_BYTES: usize = 16 << 20;

/// A column's name and type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnDef {
    /// The name; unique in the table.
    pub name: String,
    /// The type.
    pub column_type: ColumnType,
}

/// The columns of a table in their order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Schema {
    /// The columns.
    pub columns: Vec<ColumnDef>,
}

impl Schema {
    /// Where a column stands.
    #[must_use]
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    /// The names, for messages.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.name.as_str())
    }

    /// As an arrow schema of nullable fields: `Int64`, `Float64`, `Boolean`, `Utf8`, `Binary`.
    #[must_use]
    pub fn to_arrow(&self) -> SchemaRef {
        Arc::new(ArrowSchema::new(
            self.columns
                .iter()
                .map(|c| Field::new(&c.name, arrow_type(c.column_type), true))
                .collect::<Vec<_>>(),
        ))
    }

    /// From the arrow schema of a table; `Err` names the column whose type is none of the five.
    ///
    /// # Errors
    /// The column's name and type.
    pub fn from_arrow(schema: &ArrowSchema) -> Result<Self, String> {
        let mut columns = Vec::with_capacity(schema.fields().len());
        for field in schema.fields() {
            let column_type = match field.data_type() {
                DataType::Int64 => ColumnType::Integer,
                DataType::Float64 => ColumnType::Float,
                DataType::Boolean => ColumnType::Boolean,
                DataType::Utf8 => ColumnType::Text,
                DataType::Binary => ColumnType::Bytes,
                other => {
                    return Err(format!(
                        "the column `{}` has the type {other}, which no table has",
                        field.name()
                    ));
                }
            };
            columns.push(ColumnDef {
                name: field.name().clone(),
                column_type,
            });
        }
        Ok(Self { columns })
    }
}

/// The name of a type as in `cast`.
#[must_use]
pub const fn type_name(column_type: ColumnType) -> &'static str {
    match column_type {
        ColumnType::Integer => "integer",
        ColumnType::Float => "float",
        ColumnType::Boolean => "boolean",
        ColumnType::Text => "text",
        ColumnType::Bytes => "bytes",
    }
}

const fn arrow_type(column_type: ColumnType) -> DataType {
    match column_type {
        ColumnType::Integer => DataType::Int64,
        ColumnType::Float => DataType::Float64,
        ColumnType::Boolean => DataType::Boolean,
        ColumnType::Text => DataType::Utf8,
        ColumnType::Bytes => DataType::Binary,
    }
}

/// One value of a table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// No value.
    Null,
    /// An integer.
    Integer(i64),
    /// A floating point number; may be NaN or infinite.
    Float(f64),
    /// True or false.
    Boolean(bool),
    /// Text.
    Text(&'a str),
    /// Bytes.
    Bytes(&'a [u8]),
}

impl Value<'_> {
    /// What it is, for messages.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Integer(_) => "integer",
            Self::Float(_) => "float",
            Self::Boolean(_) => "boolean",
            Self::Text(_) => "text",
            Self::Bytes(_) => "bytes",
        }
    }

    /// As JSON, texts cut to 100 characters, bytes as their number, NaN and infinities as text.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Null => serde_json::Value::Null,
            Self::Integer(v) => (*v).into(),
            Self::Float(v) if v.is_finite() => (*v).into(),
            Self::Boolean(v) => (*v).into(),
            Self::Text(v) => cut(v, 100).into(),
            Self::Float(_) | Self::Bytes(_) => self.to_string().into(),
        }
    }
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Integer(v) => write!(f, "{v}"),
            Self::Float(v) => write!(f, "{v}"),
            Self::Boolean(v) => write!(f, "{v}"),
            Self::Text(v) => f.write_str(v),
            Self::Bytes(v) => write!(f, "{} bytes", v.len()),
        }
    }
}

/// The first `max` characters, with `…` if something was cut off.
#[must_use]
pub fn cut(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// A text as it may stand in a message: on one line, quoted, cut.
#[must_use]
pub fn quoted(text: &str) -> String {
    let text: String = cut(text, 60)
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    format!("`{text}`")
}

/// Builds batches of one schema, row by row.
pub struct BatchBuilder {
    schema: SchemaRef,
    columns: Vec<ColumnBuilder>,
    rows: usize,
    bytes: usize,
}

enum ColumnBuilder {
    Integer(Int64Builder),
    Float(Float64Builder),
    Boolean(BooleanBuilder),
    Text(StringBuilder),
    Bytes(BinaryBuilder),
}

impl BatchBuilder {
    /// An empty one.
    #[must_use]
    pub fn new(schema: &Schema) -> Self {
        Self {
            schema: schema.to_arrow(),
            columns: schema
                .columns
                .iter()
                .map(|c| match c.column_type {
                    ColumnType::Integer => ColumnBuilder::Integer(Int64Builder::new()),
                    ColumnType::Float => ColumnBuilder::Float(Float64Builder::new()),
                    ColumnType::Boolean => ColumnBuilder::Boolean(BooleanBuilder::new()),
                    ColumnType::Text => ColumnBuilder::Text(StringBuilder::new()),
                    ColumnType::Bytes => ColumnBuilder::Bytes(BinaryBuilder::new()),
                })
                .collect(),
            rows: 0,
            bytes: 0,
        }
    }

    /// Appends the value of one column. Every column is to get one before [`Self::end_row`]. A value
    /// of another type than the column's becomes null: callers convert first.
    pub fn push(&mut self, column: usize, value: Value<'_>) {
        match (&mut self.columns[column], value) {
            (ColumnBuilder::Integer(b), Value::Integer(v)) => b.append_value(v),
            (ColumnBuilder::Float(b), Value::Float(v)) => b.append_value(v),
            (ColumnBuilder::Boolean(b), Value::Boolean(v)) => b.append_value(v),
            (ColumnBuilder::Text(b), Value::Text(v)) => {
                self.bytes += v.len();
                b.append_value(v);
            }
            (ColumnBuilder::Bytes(b), Value::Bytes(v)) => {
                self.bytes += v.len();
                b.append_value(v);
            }
            (ColumnBuilder::Integer(b), _) => b.append_null(),
            (ColumnBuilder::Float(b), _) => b.append_null(),
            (ColumnBuilder::Boolean(b), _) => b.append_null(),
            (ColumnBuilder::Text(b), _) => b.append_null(),
            (ColumnBuilder::Bytes(b), _) => b.append_null(),
        }
    }

    /// Ends a row; true if the batch is full.
    pub fn end_row(&mut self) -> bool {
        self.rows += 1;
        self.rows >= BATCH_ROWS || self.bytes >= BATCH_BYTES
    }

    /// The batch so far; the builder starts a new one.
    ///
    /// # Errors
    /// If a column did not get a value in each row.
    pub fn take(&mut self) -> Result<RecordBatch, arrow_schema::ArrowError> {
        let arrays: Vec<ArrayRef> = self
            .columns
            .iter_mut()
            .map(|column| -> ArrayRef {
                match column {
                    ColumnBuilder::Integer(b) => Arc::new(b.finish()),
                    ColumnBuilder::Float(b) => Arc::new(b.finish()),
                    ColumnBuilder::Boolean(b) => Arc::new(b.finish()),
                    ColumnBuilder::Text(b) => Arc::new(b.finish()),
                    ColumnBuilder::Bytes(b) => Arc::new(b.finish()),
                }
            })
            .collect();
        let options = RecordBatchOptions::new().with_row_count(Some(self.rows));
        (self.rows, self.bytes) = (0, 0);
        RecordBatch::try_new_with_options(self.schema.clone(), arrays, &options)
    }
}
