//! Raw columns become the numbers that a network takes: [`Preprocessing`](crate::features) as it was
//! learned, made ready once ([`Encoder`]) and then applied to a whole table or to one request.

use std::{borrow::Cow, collections::BTreeMap, collections::HashMap};

use crate::{
    columns::Columns,
    error::TrainError,
    expression::Expression,
    features::{Applied, Encoding, Features, ImageSource, parse_derived},
    images,
    matrix::Matrix,
};

/// Where raw columns come from. What it hands out has no nulls, no NaN and no infinities.
pub trait Source {
    /// Rows of each column.
    fn rows(&self) -> usize;

    /// The values of a numeric column; true is 1, false is 0.
    ///
    /// # Errors
    /// If there is no such column, or it holds something else.
    fn numbers(&self, column: &str) -> Result<Cow<'_, [f64]>, TrainError>;

    /// The values of a text column.
    ///
    /// # Errors
    /// As above.
    fn texts(&self, column: &str) -> Result<Vec<&str>, TrainError>;

    /// The values of a column of bytes.
    ///
    /// # Errors
    /// As above.
    fn bytes(&self, column: &str) -> Result<Vec<&[u8]>, TrainError>;
}

impl Source for Columns<'_> {
    fn rows(&self) -> usize {
        Columns::rows(self)
    }

    fn numbers(&self, column: &str) -> Result<Cow<'_, [f64]>, TrainError> {
        Columns::numbers(self, column).map(Cow::Owned)
    }

    fn texts(&self, column: &str) -> Result<Vec<&str>, TrainError> {
        Columns::texts(self, column)
    }

    fn bytes(&self, column: &str) -> Result<Vec<&[u8]>, TrainError> {
        Columns::bytes(self, column)
    }
}

/// A row that cannot be computed with.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// Networks compute in single precision, whose range is smaller than that of a column.
    #[error("`{name}` is {value:e} in row {row} (counted from 0): too large to compute with")]
    TooLarge {
        /// The column, or the derived feature.
        name: String,
        /// Its value.
        value: f64,
        /// Where.
        row: usize,
    },
    /// A derived feature is no number there, e.g. a division by zero.
    #[error(
        "the derived feature `{name}` ({expression}) is {value} in row {row}: a model takes finite numbers only"
    )]
    Derived {
        /// Its name.
        name: String,
        /// As written.
        expression: String,
        /// NaN or an infinity.
        value: f64,
        /// Where.
        row: usize,
    },
    /// An image has another size than those that the model has learned from.
    #[error(
        "the image in column `{column}`, row {row}, has {bytes} bytes, but {expected} are expected ({} channels × {} × {})",
        shape[0], shape[1], shape[2]
    )]
    ImageSize {
        /// The column.
        column: String,
        /// Where.
        row: usize,
        /// Its size.
        bytes: usize,
        /// As it should be.
        expected: usize,
        /// Channels, height and width.
        shape: [usize; 3],
    },
    /// A column is missing, or holds what it must not.
    #[error(transparent)]
    Column(#[from] TrainError),
}

impl From<EncodeError> for TrainError {
    fn from(error: EncodeError) -> Self {
        match error {
            EncodeError::Column(error) => error,
            EncodeError::TooLarge { .. } => {
                Self::Data(format!("{error}; remove or replace it in `convert`"))
            }
            EncodeError::Derived { .. } | EncodeError::ImageSize { .. } => {
                Self::Data(error.to_string())
            }
        }
    }
}

/// What makes numbers of raw columns, ready to be used again and again.
#[derive(Debug)]
pub struct Encoder {
    width: usize,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Table(Vec<Step>),
    Image {
        shape: [usize; 3],
        max_value: f64,
        source: ImageSource,
    },
}

/// What becomes of one column, or of a derived feature.
#[derive(Debug)]
enum Step {
    Standardised {
        column: String,
        mean: f64,
        deviation: f64,
    },
    OneHot {
        column: String,
        places: HashMap<String, usize>,
    },
    Derived {
        name: String,
        text: String,
        expression: Expression,
        mean: f64,
        deviation: f64,
    },
}

impl Step {
    fn of(encoding: &Encoding) -> Result<Self, TrainError> {
        Ok(match encoding.clone() {
            Encoding::Standardised {
                column,
                mean,
                deviation,
            } => Self::Standardised {
                column,
                mean,
                deviation,
            },
            Encoding::OneHot { column, categories } => Self::OneHot {
                column,
                places: categories.into_iter().zip(0..).collect(),
            },
            Encoding::Derived {
                name,
                expression: text,
                mean,
                deviation,
            } => Self::Derived {
                expression: parse_derived(&name, &text)?,
                name,
                text,
                mean,
                deviation,
            },
        })
    }

    fn width(&self) -> usize {
        match self {
            Self::OneHot { places, .. } => places.len(),
            Self::Standardised { .. } | Self::Derived { .. } => 1,
        }
    }
}

impl Encoder {
    /// Of what was learned.
    ///
    /// # Errors
    /// If an expression in it is none.
    pub fn new(features: &Features) -> Result<Self, TrainError> {
        Ok(match features {
            Features::Table { columns } => {
                let steps = columns.iter().map(Step::of);
                let steps = steps.collect::<Result<Vec<_>, _>>()?;
                Self {
                    width: steps.iter().map(Step::width).sum(),
                    kind: Kind::Table(steps),
                }
            }
            Features::Image {
                shape,
                max_value,
                source,
            } => Self {
                width: shape.iter().product(),
                kind: Kind::Image {
                    shape: *shape,
                    max_value: *max_value,
                    source: source.clone(),
                },
            },
        })
    }

    /// Numbers a row.
    #[must_use]
    pub const fn width(&self) -> usize {
        self.width
    }

    /// The rows as numbers.
    ///
    /// # Errors
    /// If a column is missing, of another type, or has a value that cannot be used.
    pub fn encode(&self, source: &impl Source) -> Result<Applied, EncodeError> {
        match &self.kind {
            Kind::Table(steps) => encode_table(steps, self.width, source),
            Kind::Image {
                shape,
                max_value,
                source: place,
            } => Ok(Applied {
                matrix: encode_image(*shape, *max_value, place, source)?,
                unknown_categories: BTreeMap::new(),
            }),
        }
    }
}

/// The values of a derived feature.
pub(crate) fn derived_values(
    name: &str,
    text: &str,
    expression: &Expression,
    source: &impl Source,
) -> Result<Vec<f64>, EncodeError> {
    let columns = expression.columns().iter();
    let columns = columns.map(|column| source.numbers(column));
    let columns = columns.collect::<Result<Vec<_>, _>>()?;
    let values = expression.evaluate(&columns, source.rows());
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(row) => Err(EncodeError::Derived {
            name: name.to_owned(),
            expression: text.to_owned(),
            value: values[row],
            row,
        }),
    }
}

fn encode_table(steps: &[Step], cols: usize, source: &impl Source) -> Result<Applied, EncodeError> {
    let rows = source.rows();
    let mut data = vec![0.0; rows * cols];
    let mut unknown_categories = BTreeMap::new();
    let mut offset = 0;
    for step in steps {
        let mut standardise = |name: &str, values: &[f64], mean: f64, deviation: f64| {
            for (row, value) in values.iter().enumerate() {
                let number = ((value - mean) / deviation) as f32;
                if !number.is_finite() {
                    return Err(EncodeError::TooLarge {
                        name: name.to_owned(),
                        value: *value,
                        row,
                    });
                }
                data[row * cols + offset] = number;
            }
            Ok(())
        };
        match step {
            Step::Standardised {
                column,
                mean,
                deviation,
            } => standardise(column, &source.numbers(column)?, *mean, *deviation)?,
            Step::Derived {
                name,
                text,
                expression,
                mean,
                deviation,
            } => {
                let values = derived_values(name, text, expression, source)?;
                standardise(name, &values, *mean, *deviation)?;
            }
            Step::OneHot { column, places } => {
                let mut unknown = 0;
                for (row, text) in source.texts(column)?.into_iter().enumerate() {
                    match places.get(text) {
                        Some(place) => data[row * cols + offset + place] = 1.0,
                        None => unknown += 1,
                    }
                }
                if unknown > 0 {
                    unknown_categories.insert(column.clone(), unknown);
                }
            }
        }
        offset += step.width();
    }
    Ok(Applied {
        matrix: Matrix { rows, cols, data },
        unknown_categories,
    })
}

fn encode_image(
    shape: [usize; 3],
    max_value: f64,
    place: &ImageSource,
    source: &impl Source,
) -> Result<Matrix, EncodeError> {
    let rows = source.rows();
    let cols: usize = shape.iter().product();
    let mut data = Vec::with_capacity(rows * cols);
    match place {
        ImageSource::Column(column) => {
            for (row, bytes) in source.bytes(column)?.into_iter().enumerate() {
                if bytes.len() != cols {
                    return Err(EncodeError::ImageSize {
                        column: column.clone(),
                        row,
                        bytes: bytes.len(),
                        expected: cols,
                        shape,
                    });
                }
                let pixels = bytes.iter().map(|b| f64::from(*b));
                images::append_image(pixels, shape, max_value, &mut data);
            }
        }
        ImageSource::Pixels(columns) => {
            let columns = columns.iter().map(|column| source.numbers(column));
            let columns = columns.collect::<Result<Vec<_>, _>>()?;
            for row in 0..rows {
                let pixels = columns.iter().map(|column| column[row]);
                images::append_image(pixels, shape, max_value, &mut data);
            }
            if let Some(at) = data.iter().position(|pixel| !pixel.is_finite()) {
                let row = at / cols;
                let largest = columns
                    .iter()
                    .map(|column| column[row])
                    .max_by(|a, b| a.abs().total_cmp(&b.abs()));
                return Err(EncodeError::TooLarge {
                    name: "a pixel".to_owned(),
                    value: largest.unwrap_or(f64::NAN),
                    row,
                });
            }
        }
    }
    Ok(Matrix { rows, cols, data })
}
