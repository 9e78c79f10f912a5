//! Tables written: Parquet files with one summary, made while the rows go by.

use std::{
    collections::HashSet,
    fs::File,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

use arrow_array::{Array, RecordBatch};
use emberline_common::failure::Reason;
use emberline_worker::{
    documents::{ColumnSummary, TABLE_EXTENSION, TableSummary},
    stage::StageError,
};
use parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};

use crate::{
    schema::{ColumnType, Schema, Value, type_name},
    table::value_at,
};

/// Different values that a summary counts at most; a column with more has no count.
pub const MAX_DISTINCT: usize = 1000;

/// Writes one table into one Parquet file. The same rows in the same batches give the same bytes.
pub struct TableWriter {
    path: PathBuf,
    writer: ArrowWriter<File>,
    summary: Summary,
}

impl TableWriter {
    /// Starts the file `part-0.parquet` in a directory.
    ///
    /// # Errors
    /// Reason `storage` if it cannot be created.
    pub fn create(dir: &Path, schema: &Schema) -> Result<Self, StageError> {
        let path = dir.join(format!("part-0.{TABLE_EXTENSION}"));
        let file = File::create(&path).map_err(|e| StageError::io("create", &path, e))?;
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_created_by("emberline".to_owned())
            .build();
        let writer = ArrowWriter::try_new(file, schema.to_arrow(), Some(properties))
            .map_err(|e| failed(&path, &e))?;
        Ok(Self {
            path,
            writer,
            summary: Summary::new(schema),
        })
    }

    /// Appends rows.
    ///
    /// # Errors
    /// Reason `storage`, e.g. if the disk is full.
    pub fn push(&mut self, batch: &RecordBatch) -> Result<(), StageError> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        self.summary.add(batch);
        self.writer.write(batch).map_err(|e| failed(&self.path, &e))
    }

    /// Rows so far.
    #[must_use]
    pub const fn rows(&self) -> u64 {
        self.summary.rows
    }

    /// Writes the end of the file.
    ///
    /// # Errors
    /// Reason `storage`.
    pub fn finish(self) -> Result<TableSummary, StageError> {
        self.writer.close().map_err(|e| failed(&self.path, &e))?;
        Ok(self.summary.finish())
    }
}

fn failed(path: &Path, error: &dyn std::fmt::Display) -> StageError {
    StageError::new(
        Reason::Storage,
        format!("cannot write `{}`: {error}", path.display()),
    )
}

/// Counts what a [`TableSummary`] says while batches go by.
pub struct Summary {
    rows: u64,
    columns: Vec<ColumnStats>,
}

struct ColumnStats {
    name: String,
    column_type: ColumnType,
    nulls: u64,
    /// Hashes of the values; none once there are too many.
    distinct: Option<HashSet<u64>>,
    finite: u64,
    min: f64,
    max: f64,
    /// Running mean (Welford), which does not overflow as a sum would.
    mean: f64,
}

impl Summary {
    /// Of no rows.
    #[must_use]
    pub fn new(schema: &Schema) -> Self {
        Self {
            rows: 0,
            columns: schema
                .columns
                .iter()
                .map(|c| ColumnStats {
                    name: c.name.clone(),
                    column_type: c.column_type,
                    nulls: 0,
                    distinct: Some(HashSet::new()),
                    finite: 0,
                    min: f64::INFINITY,
                    max: f64::NEG_INFINITY,
                    mean: 0.0,
                })
                .collect(),
        }
    }

    /// Counts a batch of the same schema.
    pub fn add(&mut self, batch: &RecordBatch) {
        self.rows += batch.num_rows() as u64;
        for (stats, array) in self.columns.iter_mut().zip(batch.columns()) {
            stats.nulls += array.null_count() as u64;
            for row in 0..array.len() {
                stats.add(value_at(array.as_ref(), row));
            }
        }
    }

    /// What was counted. Minimum, maximum and mean are of the finite values.
    #[must_use]
    pub fn finish(self) -> TableSummary {
        TableSummary {
            rows: self.rows,
            columns: self
                .columns
                .into_iter()
                .map(|c| {
                    let numeric = c.finite > 0;
                    ColumnSummary {
                        name: c.name,
                        column_type: type_name(c.column_type).to_owned(),
                        nulls: c.nulls,
                        distinct: c.distinct.map(|d| d.len() as u64),
                        min: numeric.then_some(c.min),
                        max: numeric.then_some(c.max),
                        mean: numeric.then_some(c.mean),
                    }
                })
                .collect(),
        }
    }
}

impl ColumnStats {
    fn add(&mut self, value: Value<'_>) {
        #[allow(clippy::cast_precision_loss, reason = "a mean is approximate")]
        let number = match value {
            Value::Null => return,
            Value::Integer(v) => Some(v as f64),
            Value::Float(v) => Some(v),
            Value::Boolean(_) | Value::Text(_) | Value::Bytes(_) => None,
        };
        if let Some(number) = number.filter(|n| n.is_finite()) {
            self.finite += 1;
            self.min = self.min.min(number);
            self.max = self.max.max(number);
            #[allow(clippy::cast_precision_loss, reason = "a mean is approximate")]
            let weight = 1.0 / self.finite as f64;
            self.mean += number * weight - self.mean * weight;
        }
        if let Some(distinct) = &mut self.distinct {
            distinct.insert(hash_of(value));
            if distinct.len() > MAX_DISTINCT {
                self.distinct = None;
            }
        }
    }
}

/// A hash to count different values by; `DefaultHasher::new` has fixed keys. With at most a few
/// thousand values, a collision of 64 bits is not to be expected.
fn hash_of(value: Value<'_>) -> u64 {
    let mut hasher = DefaultHasher::new();
    match value {
        Value::Null => 0u8.hash(&mut hasher),
        Value::Integer(v) => v.hash(&mut hasher),
        // 0.0 and -0.0 are one value.
        Value::Float(v) => (v + 0.0).to_bits().hash(&mut hasher),
        Value::Boolean(v) => v.hash(&mut hasher),
        Value::Text(v) => v.hash(&mut hasher),
        Value::Bytes(v) => v.hash(&mut hasher),
    }
    hasher.finish()
}
