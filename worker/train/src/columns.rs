//! The columns of a table by name, as numbers, texts or bytes. Nulls and numbers that are not
//! finite are refused here, with column and row: no model learns from them in silence.

use std::collections::HashMap;

use emberline_common::spec::kinds::convert::ColumnType;
use emberline_data::{
    schema::type_name,
    table::{Column, ColumnValues, Table, missing_column},
};

use crate::error::TrainError;

/// The columns of a table.
#[derive(Debug, Clone)]
pub struct Columns<'a> {
    table: &'a Table,
    // A table may have 10,000 columns, and each is looked for several times.
    places: HashMap<&'a str, usize>,
}

impl<'a> Columns<'a> {
    /// Of a table.
    #[must_use]
    pub fn new(table: &'a Table) -> Self {
        let names = table.columns.iter().map(|c| c.name.as_str());
        Self {
            table,
            places: names.zip(0..).collect(),
        }
    }

    /// Its rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.table.rows
    }

    /// The columns' names in their order.
    #[must_use]
    pub fn names(&self) -> Vec<&'a str> {
        self.table.columns.iter().map(|c| c.name.as_str()).collect()
    }

    /// What a column holds.
    ///
    /// # Errors
    /// If there is no such column.
    pub fn kind(&self, name: &str) -> Result<ColumnType, TrainError> {
        self.find(name).map(Column::column_type)
    }

    /// The values of a numeric column; true is 1, false is 0.
    ///
    /// # Errors
    /// If it is not numeric, or a value is null, NaN or infinite.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>, TrainError> {
        let values: Vec<f64> = match &self.full(name)?.values {
            ColumnValues::Integer(a) => a.values().iter().map(|v| *v as f64).collect(),
            ColumnValues::Float(a) => a.values().to_vec(),
            ColumnValues::Boolean(a) => a.values().iter().map(f64::from).collect(),
            ColumnValues::Text(_) | ColumnValues::Bytes(_) => {
                return Err(TrainError::Data(format!(
                    "the column `{name}` holds {}, but numbers are needed here: cast it in `convert`",
                    type_name(self.kind(name)?)
                )));
            }
        };
        if let Some(row) = values.iter().position(|v| !v.is_finite()) {
            let bad = values.iter().filter(|v| !v.is_finite()).count();
            return Err(TrainError::Data(format!(
                "the column `{name}` has {} in row {row} (counted from 0; {bad} such values in all): a model takes finite numbers only; remove or replace them in `convert`",
                values[row]
            )));
        }
        Ok(values)
    }

    /// The values of a text column.
    ///
    /// # Errors
    /// If it is not text, or a value is null.
    pub fn texts(&self, name: &str) -> Result<Vec<&'a str>, TrainError> {
        match &self.full(name)?.values {
            ColumnValues::Text(a) => Ok(a.iter().flatten().collect()),
            _ => Err(TrainError::Data(format!(
                "the column `{name}` holds {}, but text is needed here: cast it in `convert`",
                type_name(self.kind(name)?)
            ))),
        }
    }

    /// The values of a column of bytes.
    ///
    /// # Errors
    /// If it is none, or a value is null.
    pub fn bytes(&self, name: &str) -> Result<Vec<&'a [u8]>, TrainError> {
        match &self.full(name)?.values {
            ColumnValues::Bytes(a) => Ok(a.iter().flatten().collect()),
            _ => Err(TrainError::Data(format!(
                "the column `{name}` holds {}, but bytes are needed here",
                type_name(self.kind(name)?)
            ))),
        }
    }

    fn find(&self, name: &str) -> Result<&'a Column, TrainError> {
        self.places
            .get(name)
            .map(|place| &self.table.columns[*place])
            .ok_or_else(|| TrainError::Data(missing_column(name, self.names().into_iter())))
    }

    /// A column without nulls.
    fn full(&self, name: &str) -> Result<&'a Column, TrainError> {
        let column = self.find(name)?;
        let nulls = column.null_count();
        if nulls == 0 {
            return Ok(column);
        }
        let row = (0..column.len())
            .find(|row| column.is_null(*row))
            .unwrap_or(0);
        Err(TrainError::Data(format!(
            "the column `{name}` is null in row {row} (counted from 0; {nulls} nulls in all): remove or fill them in `convert`, or leave the column out with `exclude`"
        )))
    }
}
