//! A `table` artifact, read: by batches ([`TableReader`]) or whole ([`Table`]).

use std::{
    borrow::Cow,
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use arrow_array::{
    Array, BinaryArray, BooleanArray, Float64Array, Int64Array, LargeBinaryArray, LargeStringArray,
    RecordBatch, StringArray,
    builder::{
        BooleanBuilder, Float64Builder, Int64Builder, LargeBinaryBuilder, LargeStringBuilder,
    },
    cast::AsArray,
    types::{Float64Type, Int64Type},
};
use emberline_common::failure::Reason;
use emberline_worker::{
    documents::TABLE_EXTENSION,
    stage::{Input, StageError},
};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use crate::schema::{BATCH_ROWS, ColumnType, Schema, Value, type_name};

/// A table in memory, column by column.
#[derive(Debug, Clone)]
pub struct Table {
    /// Number of rows.
    pub rows: usize,
    /// The columns in their order.
    pub columns: Vec<Column>,
}

/// A column in memory.
#[derive(Debug, Clone)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its values, one for each row.
    pub values: ColumnValues,
}

/// The values of a column. Each array knows its nulls (`is_null(row)`) and iterates as options.
#[derive(Debug, Clone)]
pub enum ColumnValues {
    /// Integers.
    Integer(Int64Array),
    /// Floating point numbers; NaN and infinities are values, not nulls.
    Float(Float64Array),
    /// True or false.
    Boolean(BooleanArray),
    /// Texts.
    Text(LargeStringArray),
    /// Bytes, e.g. images.
    Bytes(LargeBinaryArray),
}

impl Table {
    /// Reads all rows of an input of type `table`.
    ///
    /// # Errors
    /// Reason `user_error` if the input is not a table, `storage` if its files cannot be read.
    pub fn read(input: &Input) -> Result<Self, StageError> {
        Self::collect(TableReader::open(input)?)
    }

    /// Reads all rows of the Parquet files in a directory, in the order of their names.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_dir(dir: &Path) -> Result<Self, StageError> {
        Self::collect(TableReader::open_dir(dir)?)
    }

    fn collect(reader: TableReader) -> Result<Self, StageError> {
        let schema = reader.schema().clone();
        let mut builders: Vec<Builder> = schema
            .columns
            .iter()
            .map(|c| Builder::new(c.column_type))
            .collect();
        let mut rows = 0;
        for batch in reader {
            let batch = batch?;
            rows += batch.num_rows();
            for (builder, array) in builders.iter_mut().zip(batch.columns()) {
                builder.append(array.as_ref());
            }
        }
        Ok(Self {
            rows,
            columns: schema
                .columns
                .into_iter()
                .zip(builders)
                .map(|(def, builder)| Column {
                    name: def.name,
                    values: builder.finish(),
                })
                .collect(),
        })
    }

    /// The column of that name.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// The column of that name, or an error that names it and the nearest one there is.
    ///
    /// # Errors
    /// Reason `data`.
    pub fn require(&self, name: &str) -> Result<&Column, StageError> {
        self.column(name).ok_or_else(|| {
            StageError::data(missing_column(
                name,
                self.columns.iter().map(|c| c.name.as_str()),
            ))
        })
    }
}

impl Column {
    /// Its type.
    #[must_use]
    pub const fn column_type(&self) -> ColumnType {
        match self.values {
            ColumnValues::Integer(_) => ColumnType::Integer,
            ColumnValues::Float(_) => ColumnType::Float,
            ColumnValues::Boolean(_) => ColumnType::Boolean,
            ColumnValues::Text(_) => ColumnType::Text,
            ColumnValues::Bytes(_) => ColumnType::Bytes,
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.array().len()
    }

    /// Whether it has no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of nulls.
    #[must_use]
    pub fn null_count(&self) -> usize {
        self.array().null_count()
    }

    /// Whether there is no value in that row.
    #[must_use]
    pub fn is_null(&self, row: usize) -> bool {
        self.array().is_null(row)
    }

    /// The value in a row. Panics if there is no such row.
    #[must_use]
    pub fn value(&self, row: usize) -> Value<'_> {
        if self.is_null(row) {
            return Value::Null;
        }
        match &self.values {
            ColumnValues::Integer(a) => Value::Integer(a.value(row)),
            ColumnValues::Float(a) => Value::Float(a.value(row)),
            ColumnValues::Boolean(a) => Value::Boolean(a.value(row)),
            ColumnValues::Text(a) => Value::Text(a.value(row)),
            ColumnValues::Bytes(a) => Value::Bytes(a.value(row)),
        }
    }

    /// The value in a row as a number: integers and floats as they are, booleans as 1 and 0; none for
    /// null, text and bytes.
    #[must_use]
    pub fn number(&self, row: usize) -> Option<f64> {
        #[allow(clippy::cast_precision_loss, reason = "a feature is a float")]
        match self.value(row) {
            Value::Integer(v) => Some(v as f64),
            Value::Float(v) => Some(v),
            Value::Boolean(v) => Some(f64::from(u8::from(v))),
            Value::Null | Value::Text(_) | Value::Bytes(_) => None,
        }
    }

    /// The value in a row as text, e.g. the name of a class; none for null and bytes.
    #[must_use]
    pub fn text(&self, row: usize) -> Option<Cow<'_, str>> {
        match self.value(row) {
            Value::Text(v) => Some(Cow::Borrowed(v)),
            Value::Null | Value::Bytes(_) => None,
            other => Some(Cow::Owned(other.to_string())),
        }
    }

    /// The bytes in a row; none for null and for other types.
    #[must_use]
    pub fn bytes(&self, row: usize) -> Option<&[u8]> {
        match self.value(row) {
            Value::Bytes(v) => Some(v),
            _ => None,
        }
    }

    fn array(&self) -> &dyn Array {
        match &self.values {
            ColumnValues::Integer(a) => a,
            ColumnValues::Float(a) => a,
            ColumnValues::Boolean(a) => a,
            ColumnValues::Text(a) => a,
            ColumnValues::Bytes(a) => a,
        }
    }
}

/// The batches of a table, file after file. After an error it ends.
pub struct TableReader {
    schema: Schema,
    rows: u64,
    files: std::vec::IntoIter<PathBuf>,
    current: Option<(PathBuf, ParquetRecordBatchReader)>,
}

impl TableReader {
    /// Opens an input of type `table`: the schemas of all its files are read and compared.
    ///
    /// # Errors
    /// Reason `user_error` if it has no Parquet file, `storage` if one cannot be read.
    pub fn open(input: &Input) -> Result<Self, StageError> {
        let files = input.files.iter().map(|file| input.dir.join(file));
        Self::from_files(files, &format!("the input `{}`", input.name))
    }

    /// Opens the Parquet files in a directory, in the order of their names.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_dir(dir: &Path) -> Result<Self, StageError> {
        let entries = std::fs::read_dir(dir).map_err(|e| StageError::io("read", dir, e))?;
        let mut files = Vec::new();
        for entry in entries {
            files.push(entry.map_err(|e| StageError::io("read", dir, e))?.path());
        }
        files.sort();
        Self::from_files(files.into_iter(), &format!("`{}`", dir.display()))
    }

    fn from_files(files: impl Iterator<Item = PathBuf>, whose: &str) -> Result<Self, StageError> {
        let files: Vec<PathBuf> = files
            .filter(|file| file.extension().is_some_and(|e| e == TABLE_EXTENSION))
            .collect();
        let mut schema: Option<Schema> = None;
        let mut rows = 0;
        for file in &files {
            let builder = guarded(file, || open_file(file))?;
            rows += builder.metadata().file_metadata().num_rows().unsigned_abs();
            let own = Schema::from_arrow(builder.schema()).map_err(|e| unreadable(file, &e))?;
            match &schema {
                None => schema = Some(own),
                Some(first) if *first == own => {}
                Some(_) => {
                    return Err(unreadable(
                        file,
                        &"its columns differ from the first file's",
                    ));
                }
            }
        }
        let schema = schema.ok_or_else(|| {
            StageError::user(format!(
                "{whose} is not a table: it has no `.{TABLE_EXTENSION}` file; make one with a `convert` stage"
            ))
        })?;
        Ok(Self {
            schema,
            rows,
            files: files.into_iter(),
            current: None,
        })
    }

    /// The columns.
    #[must_use]
    pub const fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The rows of all files together.
    #[must_use]
    pub const fn rows(&self) -> u64 {
        self.rows
    }

    fn next_batch(&mut self) -> Result<Option<RecordBatch>, StageError> {
        loop {
            if let Some((file, reader)) = &mut self.current {
                let next = || reader.next().transpose().map_err(|e| unreadable(file, &e));
                match guarded(file, next)? {
                    Some(batch) => return Ok(Some(batch)),
                    None => self.current = None,
                }
            }
            let Some(file) = self.files.next() else {
                return Ok(None);
            };
            let reader = guarded(&file, || {
                let reader = open_file(&file)?.with_batch_size(BATCH_ROWS).build();
                reader.map_err(|e| unreadable(&file, &e))
            })?;
            self.current = Some((file, reader));
        }
    }
}

impl Iterator for TableReader {
    type Item = Result<RecordBatch, StageError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_batch();
        if next.is_err() {
            self.current = None;
            self.files = Vec::new().into_iter();
        }
        next.transpose()
    }
}

fn open_file(file: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, StageError> {
    let handle = File::open(file).map_err(|e| StageError::io("open", file, e))?;
    ParquetRecordBatchReaderBuilder::try_new(handle).map_err(|e| unreadable(file, &e))
}

/// The parser has been seen to panic on damaged files, and a table may be a command's.
fn guarded<T>(file: &Path, read: impl FnOnce() -> Result<T, StageError>) -> Result<T, StageError> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(unreadable(file, &"its parts do not fit together")))
}

fn unreadable(file: &Path, error: &dyn std::fmt::Display) -> StageError {
    StageError::new(
        Reason::Storage,
        format!("cannot read the table's file `{}`: {error}", file.display()),
    )
}

/// The value of a column of a batch, as one of the five types.
#[must_use]
pub fn value_at(array: &dyn Array, row: usize) -> Value<'_> {
    if array.is_null(row) {
        return Value::Null;
    }
    if let Some(a) = array.as_primitive_opt::<Int64Type>() {
        Value::Integer(a.value(row))
    } else if let Some(a) = array.as_primitive_opt::<Float64Type>() {
        Value::Float(a.value(row))
    } else if let Some(a) = array.as_boolean_opt() {
        Value::Boolean(a.value(row))
    } else if let Some(a) = array.as_any().downcast_ref::<StringArray>() {
        Value::Text(a.value(row))
    } else if let Some(a) = array.as_any().downcast_ref::<BinaryArray>() {
        Value::Bytes(a.value(row))
    } else {
        Value::Null
    }
}

/// "There is no column `x`", with the nearest name there is or, if none is near, all of them.
#[must_use]
pub fn missing_column<'a>(name: &str, there: impl Iterator<Item = &'a str>) -> String {
    let there: Vec<&str> = there.collect();
    let nearest = there
        .iter()
        .map(|other| (distance(name, other), *other))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= name.chars().count().max(3) / 3);
    match nearest {
        Some((_, near)) => format!("there is no column `{name}`; did you mean `{near}`?"),
        None => {
            let shown: Vec<String> = there.iter().take(20).map(|n| format!("`{n}`")).collect();
            let more = if there.len() > 20 { ", …" } else { "" };
            format!(
                "there is no column `{name}`; there are {}{more}",
                shown.join(", ")
            )
        }
    }
}

/// Levenshtein's distance, ignoring case.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.to_lowercase().chars().take(200).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.to_lowercase().chars().take(200).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let change = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Name and type, for messages.
impl std::fmt::Display for Column {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` ({})", self.name, type_name(self.column_type()))
    }
}

enum Builder {
    Integer(Int64Builder),
    Float(Float64Builder),
    Boolean(BooleanBuilder),
    Text(LargeStringBuilder),
    Bytes(LargeBinaryBuilder),
}

impl Builder {
    fn new(column_type: ColumnType) -> Self {
        match column_type {
            ColumnType::Integer => Self::Integer(Int64Builder::new()),
            ColumnType::Float => Self::Float(Float64Builder::new()),
            ColumnType::Boolean => Self::Boolean(BooleanBuilder::new()),
            ColumnType::Text => Self::Text(LargeStringBuilder::new()),
            ColumnType::Bytes => Self::Bytes(LargeBinaryBuilder::new()),
        }
    }

    fn append(&mut self, array: &dyn Array) {
        match self {
            Self::Integer(b) => b.extend(array.as_primitive::<Int64Type>()),
            Self::Float(b) => b.extend(array.as_primitive::<Float64Type>()),
            Self::Boolean(b) => b.extend(array.as_boolean()),
            Self::Text(b) => b.extend(array.as_string::<i32>()),
            Self::Bytes(b) => b.extend(array.as_binary::<i32>()),
        }
    }

    fn finish(self) -> ColumnValues {
        match self {
            Self::Integer(mut b) => ColumnValues::Integer(b.finish()),
            Self::Float(mut b) => ColumnValues::Float(b.finish()),
            Self::Boolean(mut b) => ColumnValues::Boolean(b.finish()),
            Self::Text(mut b) => ColumnValues::Text(b.finish()),
            Self::Bytes(mut b) => ColumnValues::Bytes(b.finish()),
        }
    }
}
