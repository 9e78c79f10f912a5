//! Parquet files of others, with their types mapped to the five of a table.
//!
//! Integers of all widths become `integer`, floats and decimals `float`, dates and timestamps `text`
//! in ISO 8601. Nested columns are refused by name.

use std::{
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::Arc,
};

use arrow_array::{
    Array, FixedSizeBinaryArray, RecordBatch,
    cast::AsArray,
    types::{
        Date32Type, Decimal128Type, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type,
        Int32Type, Int64Type, TimestampMicrosecondType, TimestampMillisecondType,
        TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type, UInt32Type,
        UInt64Type,
    },
};
use arrow_schema::{DataType, TimeUnit};
use emberline_common::spec::kinds::convert::ReadSpec;
use emberline_worker::stage::{StageContext, StageError};
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};

use super::{Emit, SourceFile, bytes, check_types, too_many_columns};
use crate::{
    scalar::push_cast,
    schema::{BATCH_ROWS, BatchBuilder, ColumnDef, ColumnType, MAX_COLUMNS, Schema, Value, quoted},
};

/// Parquet files with the same columns.
pub struct ParquetSource {
    files: Vec<SourceFile>,
    schema: Schema,
}

impl ParquetSource {
    pub(super) fn open(
        files: Vec<SourceFile>,
        spec: &ReadSpec,
        ctx: &StageContext,
    ) -> Result<Self, StageError> {
        let files = files
            .into_iter()
            .enumerate()
            .map(|(number, file)| unzip(file, number, ctx))
            .collect::<Result<Vec<_>, _>>()?;
        let mut schema: Option<Schema> = None;
        for file in &files {
            let own = guarded(file, || schema_of(file))?;
            match &schema {
                None => schema = Some(own),
                Some(first) if *first == own => {}
                Some(_) => {
                    return Err(StageError::data(format!(
                        "`{}` has other columns than `{}`",
                        file.label, files[0].label
                    )));
                }
            }
        }
        let mut schema = schema.unwrap_or_default();
        let names: Vec<String> = schema.names().map(str::to_owned).collect();
        check_types(spec, &names, &files[0].label)?;
        for column in &mut schema.columns {
            if let Some(given) = spec.types.get(&column.name) {
                column.column_type = *given;
            }
        }
        Ok(Self { files, schema })
    }

    pub(super) const fn schema(&self) -> &Schema {
        &self.schema
    }

    pub(super) fn read(&self, ctx: &StageContext, emit: &mut Emit<'_>) -> Result<(), StageError> {
        for file in &self.files {
            let mut reader = guarded(file, || {
                builder(file)?
                    .with_batch_size(BATCH_ROWS)
                    .build()
                    .map_err(|e| damaged(file, &e))
            })?;
            let mut row = 0;
            loop {
                ctx.check_cancelled()?;
                let batch = guarded(file, || {
                    reader.next().transpose().map_err(|e| damaged(file, &e))
                })?;
                let Some(batch) = batch else { break };
                self.convert(&batch, file, row, emit)?;
                row += batch.num_rows() as u64;
            }
        }
        Ok(())
    }

    fn convert(
        &self,
        batch: &RecordBatch,
        file: &SourceFile,
        first_row: u64,
        emit: &mut Emit<'_>,
    ) -> Result<(), StageError> {
        let mut builder = BatchBuilder::new(&self.schema);
        let take = |builder: &mut BatchBuilder| {
            builder
                .take()
                .map_err(|e| StageError::system(format!("cannot build a batch: {e}")))
        };
        for row in 0..batch.num_rows() {
            for (column, def) in self.schema.columns.iter().enumerate() {
                push(
                    &mut builder,
                    column,
                    def.column_type,
                    batch.column(column),
                    row,
                )
                .map_err(|e| {
                    StageError::data(format!(
                        "`{}` row {}, column {}: {e}",
                        file.label,
                        first_row + row as u64,
                        quoted(&def.name)
                    ))
                })?;
            }
            if builder.end_row() {
                emit(take(&mut builder)?)?;
            }
        }
        emit(take(&mut builder)?)
    }
}

/// Parquet is read from its end: a compressed file is unpacked first.
fn unzip(file: SourceFile, number: usize, ctx: &StageContext) -> Result<SourceFile, StageError> {
    let (mut reader, compressed) = bytes::open(&file)?;
    if !compressed {
        return Ok(file);
    }
    let path: PathBuf = ctx.work_dir.join(format!("unpacked-{number}.parquet"));
    let mut out = File::create(&path).map_err(|e| StageError::io("create", &path, e))?;
    std::io::copy(&mut reader, &mut out).map_err(|e| bytes::failed(&file, e))?;
    Ok(SourceFile {
        path,
        label: file.label,
    })
}

/// The parser has been seen to panic on damaged files: that is an error of the file too.
fn guarded<T>(
    file: &SourceFile,
    read: impl FnOnce() -> Result<T, StageError>,
) -> Result<T, StageError> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(damaged(file, &"its parts do not fit together")))
}

fn damaged(file: &SourceFile, error: &dyn std::fmt::Display) -> StageError {
    StageError::data(format!(
        "`{}` is not a sound Parquet file: {error}",
        file.label
    ))
}

fn builder(file: &SourceFile) -> Result<ParquetRecordBatchReaderBuilder<File>, StageError> {
    let handle = File::open(&file.path).map_err(|e| StageError::io("open", &file.path, e))?;
    // Without the writer's arrow schema, a dictionary is simply the text that it stands for.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    ParquetRecordBatchReaderBuilder::try_new_with_options(handle, options)
        .map_err(|e| damaged(file, &e))
}

fn schema_of(file: &SourceFile) -> Result<Schema, StageError> {
    let builder = builder(file)?;
    let fields = builder.schema().fields();
    if fields.len() > MAX_COLUMNS {
        return Err(too_many_columns(&file.label, fields.len()));
    }
    let mut columns: Vec<ColumnDef> = Vec::new();
    for field in fields {
        let column_type = match field.data_type() {
            DataType::Int8
            | DataType::Int16
            | DataType::Int32
            | DataType::Int64
            | DataType::UInt8
            | DataType::UInt16
            | DataType::UInt32
            | DataType::UInt64 => ColumnType::Integer,
            DataType::Float16
            | DataType::Float32
            | DataType::Float64
            | DataType::Decimal128(..) => ColumnType::Float,
            DataType::Boolean => ColumnType::Boolean,
            DataType::Utf8 | DataType::Date32 | DataType::Timestamp(..) => ColumnType::Text,
            DataType::Binary | DataType::FixedSizeBinary(_) => ColumnType::Bytes,
            other => {
                return Err(StageError::data(format!(
                    "`{}`: the column `{}` has the type {other}, which is not supported: flatten it or leave it out",
                    file.label,
                    field.name()
                )));
            }
        };
        if columns.iter().any(|c| c.name == *field.name()) {
            return Err(StageError::data(format!(
                "`{}`: the column name `{}` stands twice",
                file.label,
                field.name()
            )));
        }
        columns.push(ColumnDef {
            name: field.name().clone(),
            column_type,
        });
    }
    Ok(Schema { columns })
}

fn push(
    to: &mut BatchBuilder,
    column: usize,
    column_type: ColumnType,
    array: &Arc<dyn Array>,
    row: usize,
) -> Result<(), String> {
    if array.is_null(row) {
        to.push(column, Value::Null);
        return Ok(());
    }
    macro_rules! at {
        ($type:ty) => {
            array.as_primitive::<$type>().value(row)
        };
    }
    let text;
    #[allow(clippy::cast_precision_loss, reason = "a decimal becomes a float")]
    let value = match array.data_type() {
        DataType::Int8 => Value::Integer(at!(Int8Type).into()),
        DataType::Int16 => Value::Integer(at!(Int16Type).into()),
        DataType::Int32 => Value::Integer(at!(Int32Type).into()),
        DataType::Int64 => Value::Integer(at!(Int64Type)),
        DataType::UInt8 => Value::Integer(at!(UInt8Type).into()),
        DataType::UInt16 => Value::Integer(at!(UInt16Type).into()),
        DataType::UInt32 => Value::Integer(at!(UInt32Type).into()),
        DataType::UInt64 => {
            let value = at!(UInt64Type);
            match i64::try_from(value) {
                Ok(value) => Value::Integer(value),
                Err(_) if column_type == ColumnType::Text => {
                    text = value.to_string();
                    Value::Text(&text)
                }
                Err(_) => {
                    return Err(format!(
                        "{value} does not fit into 64 bits with a sign: give the column the type text under `types`"
                    ));
                }
            }
        }
        DataType::Float16 => Value::Float(at!(Float16Type).to_f64()),
        DataType::Float32 => Value::Float(at!(Float32Type).into()),
        DataType::Float64 => Value::Float(at!(Float64Type)),
        DataType::Decimal128(_, scale) => {
            Value::Float(at!(Decimal128Type) as f64 / 10f64.powi(i32::from(*scale)))
        }
        DataType::Boolean => Value::Boolean(array.as_boolean().value(row)),
        DataType::Utf8 => Value::Text(array.as_string::<i32>().value(row)),
        DataType::Binary => Value::Bytes(array.as_binary::<i32>().value(row)),
        DataType::FixedSizeBinary(_) => match array.as_any().downcast_ref::<FixedSizeBinaryArray>()
        {
            Some(array) => Value::Bytes(array.value(row)),
            None => return Err("its type is not what the file said".to_owned()),
        },
        DataType::Date32 => {
            text = date(at!(Date32Type))?;
            Value::Text(&text)
        }
        DataType::Timestamp(unit, zone) => {
            let nanos = match unit {
                TimeUnit::Second => i128::from(at!(TimestampSecondType)) * 1_000_000_000,
                TimeUnit::Millisecond => i128::from(at!(TimestampMillisecondType)) * 1_000_000,
                TimeUnit::Microsecond => i128::from(at!(TimestampMicrosecondType)) * 1_000,
                TimeUnit::Nanosecond => i128::from(at!(TimestampNanosecondType)),
            };
            text = timestamp(nanos, zone.is_some())?;
            Value::Text(&text)
        }
        other => return Err(format!("its type {other} is not supported")),
    };
    push_cast(to, column, column_type, value)
}

fn date(days: i32) -> Result<String, String> {
    timestamp(i128::from(days) * 86_400_000_000_000, true)
        .map(|text| text.split('T').next().unwrap_or_default().to_owned())
}

/// ISO 8601, with `Z` if it is an instant rather than a local time.
fn timestamp(nanos: i128, instant: bool) -> Result<String, String> {
    let time = jiff::Timestamp::from_nanosecond(nanos)
        .map_err(|_| "a point in time out of range".to_owned())?;
    let text = time.to_string();
    Ok(match (instant, text.strip_suffix('Z')) {
        (false, Some(local)) => local.to_owned(),
        _ => text,
    })
}
