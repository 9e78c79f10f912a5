//! The columns of a table by name, as numbers, texts or bytes. Nulls and numbers that are not
//! finite are refused here, with column and row: no model learns from them in silence.

use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, FixedSizeBinaryArray, LargeBinaryArray,
    LargeStringArray, RecordBatch, StringArray, StringViewArray,
    cast::AsArray,
    types::{
        Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
        UInt32Type, UInt64Type,
    },
};
use arrow_schema::DataType;

use crate::error::TrainError;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnKind {
    /// Integers.
    Integer,
    /// Floating-point numbers.
    Float,
    /// True or false.
    Boolean,
    /// Text.
    Text,
    /// Bytes.
    Bytes,
}

impl ColumnKind {
    /// The name as in `cast`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::Float => "float",
            Self::Boolean => "boolean",
            Self::Text => "text",
            Self::Bytes => "bytes",
        }
    }

    /// Whether its values are numbers, true and false being 1 and 0.
    #[must_use]
    pub const fn is_numeric(self) -> bool {
        matches!(self, Self::Integer | Self::Float | Self::Boolean)
    }
}

/// The columns of a table.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    batches: &'a [RecordBatch],
}

impl<'a> Columns<'a> {
    /// Of batches of one schema.
    #[must_use]
    pub const fn new(batches: &'a [RecordBatch]) -> Self {
        Self { batches }
    }

    /// Rows in all batches.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }

    /// The columns' names in their order.
    #[must_use]
    pub fn names(&self) -> Vec<&'a str> {
        self.batches.first().map_or_else(Vec::new, |batch| {
            let schema = batch.schema_ref();
            schema.fields().iter().map(|f| f.name().as_str()).collect()
        })
    }

    /// What a column holds.
    ///
    /// # Errors
    /// If there is no such column, or its type is none that a model can take.
    pub fn kind(&self, name: &str) -> Result<ColumnKind, TrainError> {
        let field = self
            .batches
            .first()
            .and_then(|batch| batch.schema_ref().field_with_name(name).ok())
            .ok_or_else(|| {
                let mut names = self.names();
                let all = names.len();
                names.truncate(30);
                let more = if all > 30 { ", …" } else { "" };
                TrainError::Data(format!(
                    "the table has no column `{name}`; it has {}{more}",
                    names.join(", ")
                ))
            })?;
        match field.data_type() {
            t if t.is_integer() => Ok(ColumnKind::Integer),
            DataType::Float32 | DataType::Float64 => Ok(ColumnKind::Float),
            DataType::Boolean => Ok(ColumnKind::Boolean),
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Ok(ColumnKind::Text),
            DataType::Binary | DataType::LargeBinary | DataType::FixedSizeBinary(_) => {
                Ok(ColumnKind::Bytes)
            }
            other => Err(TrainError::Data(format!(
                "the column `{name}` has type {other}, which a model cannot take: cast it in `convert` to integer, float, boolean, text or bytes"
            ))),
        }
    }

    /// The values of a numeric column; true is 1, false is 0.
    ///
    /// # Errors
    /// If it is not numeric, or a value is null, NaN or infinite.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>, TrainError> {
        let kind = self.kind(name)?;
        if !kind.is_numeric() {
            return Err(TrainError::Data(format!(
                "the column `{name}` holds {}, but numbers are needed: cast it in `convert`",
                kind.as_str()
            )));
        }
        let mut out = Vec::with_capacity(self.rows());
        for array in self.arrays(name)? {
            push_numbers(array, &mut out);
        }
        if let Some(row) = out.iter().position(|v| !v.is_finite()) {
            let bad = out.iter().filter(|v| !v.is_finite()).count();
            return Err(TrainError::Data(format!(
                "the column `{name}` has {} in row {row} ({bad} such values in all): a model takes finite numbers only; remove or fill them in `convert`",
                out[row]
            )));
        }
        Ok(out)
    }

    /// The values of a text column.
    ///
    /// # Errors
    /// If it is not text, or a value is null.
    pub fn texts(&self, name: &str) -> Result<Vec<&'a str>, TrainError> {
        let mut out = Vec::with_capacity(self.rows());
        for array in self.arrays(name)? {
            let any = array.as_any();
            if let Some(a) = any.downcast_ref::<StringArray>() {
                out.extend(a.iter().flatten());
            } else if let Some(a) = any.downcast_ref::<LargeStringArray>() {
                out.extend(a.iter().flatten());
            } else if let Some(a) = any.downcast_ref::<StringViewArray>() {
                out.extend(a.iter().flatten());
            } else {
                return Err(TrainError::Data(format!("the column `{name}` is not text")));
            }
        }
        Ok(out)
    }

    /// The values of a column of bytes.
    ///
    /// # Errors
    /// If it is none, or a value is null.
    pub fn bytes(&self, name: &str) -> Result<Vec<&'a [u8]>, TrainError> {
        let mut out = Vec::with_capacity(self.rows());
        for array in self.arrays(name)? {
            let any = array.as_any();
            if let Some(a) = any.downcast_ref::<BinaryArray>() {
                out.extend(a.iter().flatten());
            } else if let Some(a) = any.downcast_ref::<LargeBinaryArray>() {
                out.extend(a.iter().flatten());
            } else if let Some(a) = any.downcast_ref::<FixedSizeBinaryArray>() {
                out.extend(a.iter().flatten());
            } else {
                return Err(TrainError::Data(format!(
                    "the column `{name}` does not hold bytes"
                )));
            }
        }
        Ok(out)
    }

    /// The arrays of a column, none of them with a null.
    fn arrays(&self, name: &str) -> Result<Vec<&'a ArrayRef>, TrainError> {
        self.kind(name)?;
        let mut out = Vec::with_capacity(self.batches.len());
        let mut before = 0;
        for batch in self.batches {
            let array = batch.column_by_name(name).ok_or_else(|| {
                TrainError::Data(format!("not all files of the table have a column `{name}`"))
            })?;
            if array.null_count() > 0 {
                let row = (0..array.len()).find(|i| array.is_null(*i)).unwrap_or(0) + before;
                let nulls: usize = self
                    .batches
                    .iter()
                    .filter_map(|b| b.column_by_name(name))
                    .map(|a| a.null_count())
                    .sum();
                return Err(TrainError::Data(format!(
                    "the column `{name}` is null in row {row} ({nulls} nulls in all): remove or fill them in `convert`, or leave the column out with `exclude`"
                )));
            }
            before += array.len();
            out.push(array);
        }
        Ok(out)
    }
}

fn push_numbers(array: &ArrayRef, out: &mut Vec<f64>) {
    macro_rules! push {
        ($type:ty) => {
            out.extend(
                array
                    .as_primitive::<$type>()
                    .values()
                    .iter()
                    .map(|v| *v as f64),
            )
        };
    }
    match array.data_type() {
        DataType::Int8 => push!(Int8Type),
        DataType::Int16 => push!(Int16Type),
        DataType::Int32 => push!(Int32Type),
        DataType::Int64 => push!(Int64Type),
        DataType::UInt8 => push!(UInt8Type),
        DataType::UInt16 => push!(UInt16Type),
        DataType::UInt32 => push!(UInt32Type),
        DataType::UInt64 => push!(UInt64Type),
        DataType::Float32 => push!(Float32Type),
        DataType::Float64 => push!(Float64Type),
        _ => {
            if let Some(a) = array.as_any().downcast_ref::<BooleanArray>() {
                out.extend(a.values().iter().map(f64::from));
            }
        }
    }
}
