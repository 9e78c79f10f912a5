//! The raw columns of a request: typed values, found by name by whoever encodes or counts them.

use std::borrow::Cow;

use emberline_common::spec::kinds::convert::ColumnType;
use emberline_data::schema::type_name;
use emberline_train::{TrainError, encode::Source};

use crate::{
    error::InferError,
    schema::Schema,
    tensor::{Plain, Tensor},
};

/// Integers that every float of a column can hold.
pub(crate) const MAX_EXACT: u64 = 1 << 53;

/// The values of one column of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Values {
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
    Bytes(Vec<bytes::Bytes>),
}

/// The raw columns of a request, in the order of the schema, each of them whole.
#[derive(Debug, Default)]
pub(crate) struct RawColumns {
    pub rows: usize,
    pub values: Vec<Values>,
}

/// Raw columns by name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Named<'a> {
    pub schema: &'a Schema,
    pub columns: &'a RawColumns,
}

impl Named<'_> {
    fn find(&self, column: &str, needs: &str) -> Result<&Values, TrainError> {
        let place = self.schema.place_of(column);
        let values = place.and_then(|place| self.columns.values.get(place));
        values
            .ok_or_else(|| TrainError::Data(format!("the column `{column}` ({needs}) is missing")))
    }
}

fn mistyped(column: &str, needs: &str) -> TrainError {
    TrainError::Data(format!("the column `{column}` does not hold {needs}"))
}

impl Source for Named<'_> {
    fn rows(&self) -> usize {
        self.columns.rows
    }

    #[allow(clippy::cast_precision_loss, reason = "a feature is a float")]
    fn numbers(&self, column: &str) -> Result<Cow<'_, [f64]>, TrainError> {
        match self.find(column, "numbers")? {
            Values::Floats(values) => Ok(Cow::Borrowed(values)),
            Values::Integers(values) => Ok(values.iter().map(|v| *v as f64).collect()),
            Values::Bools(values) => Ok(values.iter().map(|v| f64::from(u8::from(*v))).collect()),
            Values::Texts(_) | Values::Bytes(_) => Err(mistyped(column, "numbers")),
        }
    }

    fn texts(&self, column: &str) -> Result<Vec<&str>, TrainError> {
        match self.find(column, "text")? {
            Values::Texts(values) => Ok(values.iter().map(String::as_str).collect()),
            _ => Err(mistyped(column, "text")),
        }
    }

    fn bytes(&self, column: &str) -> Result<Vec<&[u8]>, TrainError> {
        match self.find(column, "bytes")? {
            Values::Bytes(values) => Ok(values.iter().map(|v| v.as_ref()).collect()),
            _ => Err(mistyped(column, "bytes")),
        }
    }
}

/// Plain values as a column of that type, if none changes by it.
pub(crate) fn values_of(
    tensor: &Tensor,
    datatype: &str,
    kind: ColumnType,
    plain: Plain,
) -> Result<Values, InferError> {
    match (kind, plain) {
        (ColumnType::Integer, Plain::Integers(values)) => Ok(Values::Integers(values)),
        (ColumnType::Float, Plain::Floats(values)) => {
            match values.iter().position(|v| !v.is_finite()) {
                None => Ok(Values::Floats(values)),
                Some(row) => Err(tensor.error(format!(
                    "has {} in row {row} (counted from 0): a model takes finite numbers only",
                    values[row]
                ))),
            }
        }
        #[allow(clippy::cast_precision_loss, reason = "checked here")]
        (ColumnType::Float, Plain::Integers(values)) => {
            match values.iter().position(|v| v.unsigned_abs() > MAX_EXACT) {
                None => Ok(Values::Floats(
                    values.into_iter().map(|v| v as f64).collect(),
                )),
                Some(row) => Err(tensor.error(format!(
                    "has {} in row {row}, which no FP64 holds exactly: send FP64",
                    values[row]
                ))),
            }
        }
        (ColumnType::Boolean, Plain::Bools(values)) => Ok(Values::Bools(values)),
        (ColumnType::Bytes, Plain::Bytes(values)) => Ok(Values::Bytes(values)),
        (ColumnType::Text, Plain::Bytes(values)) => {
            let texts = values.iter().enumerate().map(|(row, value)| {
                let text = str::from_utf8(value);
                let text = text.map_err(|_| tensor.error(format!("is no UTF-8 in row {row}")))?;
                Ok(text.to_owned())
            });
            texts.collect::<Result<_, InferError>>().map(Values::Texts)
        }
        (kind, _) => {
            let send = match kind {
                ColumnType::Integer => "INT64 or a smaller integer type",
                ColumnType::Float => "FP64, FP32 or an integer type",
                ColumnType::Boolean => "BOOL",
                ColumnType::Text | ColumnType::Bytes => "BYTES",
            };
            Err(tensor.error(format!(
                "is of type {}, but comes as {datatype}: send {send}",
                type_name(kind)
            )))
        }
    }
}
