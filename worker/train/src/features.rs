//! Preprocessing: raw columns, found by name, become the numbers that a network takes.
//!
//! Everything in it (which columns, which categories, means and deviations) is learned from the
//! train part only and stored with the model; applying it anywhere else gives the same numbers.
//!
//! What is refused, with column and row: nulls, NaN and infinities, in training and later. A
//! category that the train part did not have is no error later: all of its columns are 0, and the
//! rows are counted. A label that it did not have is counted too; the caller decides.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use emberline_common::spec::kinds::{
    convert::ColumnType,
    train::{ModelSpec, TrainSpec, TrainTask},
};
use emberline_data::schema::type_name;
use emberline_worker::documents::ModelInput;
use serde::{Deserialize, Serialize};

use crate::{
    columns::Columns,
    encode::{EncodeError, Encoder, derived_values},
    error::TrainError,
    expression::Expression,
    images,
    matrix::{Matrix, Targets},
};

/// The most categories of a text column.
const MAX_CATEGORIES: usize = 1000;
/// The most classes of a label.
const MAX_CLASSES: usize = 4096;

/// How rows become numbers, and the label targets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Preprocessing {
    /// What the network takes.
    pub features: Features,
    /// What it gives.
    pub label: Label,
}

/// What the network takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Features {
    /// Columns of a table, one after the other.
    Table {
        /// In their order.
        columns: Vec<Encoding>,
    },
    /// Images.
    Image {
        /// Channels, height and width.
        shape: [usize; 3],
        /// The value of a fully lit pixel.
        max_value: f64,
        /// The column of bytes, or all the pixels' columns.
        source: ImageSource,
    },
}

/// Where an image is in a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageSource {
    /// A column of bytes.
    Column(String),
    /// A column for each number.
    Pixels(Vec<String>),
}

/// How one column becomes numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Encoding {
    /// (value − mean) / deviation.
    Standardised {
        /// The column.
        column: String,
        /// The mean of the train part.
        mean: f64,
        /// Its standard deviation; 1 for a constant column.
        deviation: f64,
    },
    /// 1 in the place of the category, 0 elsewhere.
    OneHot {
        /// The column.
        column: String,
        /// The categories in their order.
        categories: Vec<String>,
    },
    /// An expression over numeric columns, standardised.
    Derived {
        /// Its name.
        name: String,
        /// As written.
        expression: String,
        /// The mean of the train part.
        mean: f64,
        /// Its standard deviation; 1 if it is constant.
        deviation: f64,
    },
}

/// How the label becomes targets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Label {
    /// A class.
    Classes {
        /// The column.
        column: String,
        /// The classes in the order of the outputs.
        classes: Vec<String>,
    },
    /// A number, standardised.
    Value {
        /// The column.
        column: String,
        /// The mean of the train part.
        mean: f64,
        /// Its standard deviation.
        deviation: f64,
    },
}

/// Rows as numbers, and what was met that the train part did not have.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    /// A row of numbers for each row of the table.
    pub matrix: Matrix,
    /// Rows with an unknown category, by column.
    pub unknown_categories: BTreeMap<String, u64>,
}

fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
    let deviation = variance.sqrt();
    // A constant column says nothing: it becomes 0. Rounding leaves it a trace of deviation.
    if deviation > mean.abs() * 1e-12 && deviation.is_normal() {
        (mean, deviation)
    } else {
        (mean, 1.0)
    }
}

impl Preprocessing {
    /// Learns from the train part.
    ///
    /// # Errors
    /// If the spec names columns that are not there or cannot be used, or the data cannot be learned from.
    pub fn learn(table: &Columns<'_>, spec: &TrainSpec) -> Result<Self, TrainError> {
        if table.rows() == 0 {
            return Err(TrainError::Data("the train part has no rows".to_owned()));
        }
        let label = Label::learn(table, spec)?;
        let names = feature_names(table, spec)?;
        let features = match &spec.model {
            ModelSpec::Mlp { .. } => Features::learn_table(table, spec, &names)?,
            ModelSpec::Cnn { image, .. } => {
                if !spec.derived.is_empty() {
                    return Err(TrainError::Spec(
                        "`derived` is not for images: remove it, or take the family `mlp`"
                            .to_owned(),
                    ));
                }
                let shape = images::image_shape(image)?;
                let numbers: usize = shape.iter().product();
                let source = match &image.column {
                    Some(column) => {
                        if table.kind(column)? != ColumnType::Bytes {
                            return Err(TrainError::Spec(format!(
                                "`model.image.column`: the column `{column}` does not hold bytes; without `column`, all feature columns are the pixels"
                            )));
                        }
                        ImageSource::Column(column.clone())
                    }
                    None if names.len() == numbers => ImageSource::Pixels(names),
                    None => {
                        return Err(TrainError::Spec(format!(
                            "`model.image` has {numbers} numbers an image, but there are {} feature columns: set `features` or `exclude`, or `model.image.column`",
                            names.len()
                        )));
                    }
                };
                Features::Image {
                    shape,
                    max_value: image.max_value,
                    source,
                }
            }
        };
        Ok(Self { features, label })
    }

    /// The rows as numbers.
    ///
    /// # Errors
    /// If a column is missing, of another type, or has a value that cannot be used.
    pub fn apply(&self, table: &Columns<'_>) -> Result<Applied, TrainError> {
        Ok(Encoder::new(&self.features)?.encode(table)?)
    }

    /// Checks what was read from somewhere.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn check(&self) -> Result<(), String> {
        match &self.features {
            Features::Table { .. } => Ok(()),
            Features::Image { shape, .. } => images::check_shape(*shape),
        }
    }

    /// Numbers a row.
    #[must_use]
    pub fn width(&self) -> usize {
        match &self.features {
            Features::Table { columns } => columns
                .iter()
                .map(|c| match c {
                    Encoding::OneHot { categories, .. } => categories.len(),
                    _ => 1,
                })
                .sum(),
            Features::Image { shape, .. } => shape.iter().product(),
        }
    }

    /// The raw columns that it takes, described as in the table that it learned from.
    ///
    /// # Errors
    /// If the table lacks one.
    pub fn inputs(&self, table: &Columns<'_>) -> Result<Vec<ModelInput>, TrainError> {
        let mut names: Vec<String> = Vec::new();
        let mut seen = HashSet::new();
        let mut add = |name: &String| {
            if seen.insert(name.clone()) {
                names.push(name.clone());
            }
        };
        let mut categories: HashMap<&str, &[String]> = HashMap::new();
        match &self.features {
            Features::Table { columns } => {
                for encoding in columns {
                    match encoding {
                        Encoding::Standardised { column, .. } => add(column),
                        Encoding::OneHot {
                            column,
                            categories: known,
                        } => {
                            categories.insert(column, known);
                            add(column);
                        }
                        Encoding::Derived { expression, .. } => {
                            parse_derived("", expression)?
                                .columns()
                                .iter()
                                .for_each(&mut add);
                        }
                    }
                }
            }
            Features::Image { source, .. } => match source {
                ImageSource::Column(column) => add(column),
                ImageSource::Pixels(columns) => columns.iter().for_each(add),
            },
        }
        names
            .into_iter()
            .map(|name| {
                let kind = table.kind(&name)?;
                let range = if matches!(kind, ColumnType::Integer | ColumnType::Float) {
                    table.numbers(&name)?
                } else {
                    Vec::new()
                };
                Ok(ModelInput {
                    column_type: type_name(kind).to_owned(),
                    categories: categories
                        .get(name.as_str())
                        .map_or_else(Vec::new, |c| c.to_vec()),
                    min: range.iter().copied().reduce(f64::min),
                    max: range.iter().copied().reduce(f64::max),
                    name,
                })
            })
            .collect()
    }
}

/// The columns to learn from, in their order.
fn feature_names(table: &Columns<'_>, spec: &TrainSpec) -> Result<Vec<String>, TrainError> {
    for (setting, names) in [("features", &spec.features), ("exclude", &spec.exclude)] {
        for name in names {
            table
                .kind(name)
                .map_err(|e| TrainError::Spec(format!("`{setting}`: {e}")))?;
        }
    }
    if spec.features.contains(&spec.label) {
        return Err(TrainError::Spec(format!(
            "`features` has the label `{}`: a model must not see what it is to predict",
            spec.label
        )));
    }
    let candidates: Vec<String> = if spec.features.is_empty() {
        table.names().into_iter().map(str::to_owned).collect()
    } else {
        spec.features.clone()
    };
    // The names that are not wanted, or not again.
    let mut out: HashSet<&str> = spec.exclude.iter().map(String::as_str).collect();
    out.insert(&spec.label);
    let names: Vec<String> = candidates
        .iter()
        .filter(|name| out.insert(name))
        .cloned()
        .collect();
    Ok(names)
}

pub(crate) fn parse_derived(name: &str, text: &str) -> Result<Expression, TrainError> {
    Expression::parse(text).map_err(|e| TrainError::Spec(format!("`derived.{name}` {e}")))
}

impl Features {
    fn learn_table(
        table: &Columns<'_>,
        spec: &TrainSpec,
        names: &[String],
    ) -> Result<Self, TrainError> {
        let mut columns = Vec::with_capacity(names.len() + spec.derived.len());
        for column in names {
            let kind = table.kind(column)?;
            columns.push(if kind == ColumnType::Bytes {
                return Err(TrainError::Spec(format!(
                    "the column `{column}` holds bytes, which the family `mlp` cannot take: leave it out with `exclude`, or take the family `cnn`"
                )));
            } else if kind == ColumnType::Text {
                let categories: BTreeSet<&str> = table.texts(column)?.into_iter().collect();
                if categories.len() > MAX_CATEGORIES {
                    return Err(TrainError::Spec(format!(
                        "the text column `{column}` has {} different values, more than {MAX_CATEGORIES}: leave it out with `exclude`, or group its values in `convert`",
                        categories.len()
                    )));
                }
                Encoding::OneHot {
                    column: column.clone(),
                    categories: categories.into_iter().map(str::to_owned).collect(),
                }
            } else {
                let (mean, deviation) = mean_and_deviation(&table.numbers(column)?);
                Encoding::Standardised {
                    column: column.clone(),
                    mean,
                    deviation,
                }
            });
        }
        for (name, expression) in &spec.derived {
            let parsed = parse_derived(name, expression)?;
            if parsed.columns().contains(&spec.label) {
                return Err(TrainError::Spec(format!(
                    "`derived.{name}` uses the label `{}`: a model must not see what it is to predict",
                    spec.label
                )));
            }
            let values = derived_values(name, expression, &parsed, table)?;
            let (mean, deviation) = mean_and_deviation(&values);
            columns.push(Encoding::Derived {
                name: name.clone(),
                expression: expression.clone(),
                mean,
                deviation,
            });
        }
        if columns.is_empty() {
            return Err(TrainError::Spec(
                "there is no column to learn from: see `features` and `exclude`".to_owned(),
            ));
        }
        Ok(Self::Table { columns })
    }
}

/// The classes of a label column as text, row by row.
fn class_texts(table: &Columns<'_>, column: &str) -> Result<Vec<String>, TrainError> {
    match table.kind(column)? {
        ColumnType::Text => Ok(table.texts(column)?.into_iter().map(str::to_owned).collect()),
        ColumnType::Boolean => {
            let numbers = table.numbers(column)?;
            Ok(numbers.iter().map(|n| (*n > 0.5).to_string()).collect())
        }
        ColumnType::Integer | ColumnType::Float => table
            .numbers(column)?
            .into_iter()
            .enumerate()
            .map(|(row, n)| {
                if n.fract() == 0.0 && n.abs() < 9e15 {
                    Ok(format!("{}", n as i64))
                } else {
                    Err(TrainError::Data(format!(
                        "the label `{column}` is {n} in row {row}: a class is an integer, a text or a boolean; for numbers set `task: regression`"
                    )))
                }
            })
            .collect(),
        ColumnType::Bytes => Err(TrainError::Spec(format!(
            "the label `{column}` holds bytes: it must be text, boolean or a number"
        ))),
    }
}

impl Label {
    fn learn(table: &Columns<'_>, spec: &TrainSpec) -> Result<Self, TrainError> {
        let column = spec.label.clone();
        table
            .kind(&column)
            .map_err(|e| TrainError::Spec(format!("`label`: {e}")))?;
        match spec.task {
            TrainTask::Regression => {
                let (mean, deviation) = mean_and_deviation(&table.numbers(&column)?);
                Ok(Self::Value {
                    column,
                    mean,
                    deviation,
                })
            }
            TrainTask::Classification => {
                let different: BTreeSet<String> =
                    class_texts(table, &column)?.into_iter().collect();
                if different.len() < 2 {
                    let only = different.first().cloned().unwrap_or_default();
                    return Err(TrainError::Data(format!(
                        "the label `{column}` is `{only}` in all rows of the train part: with one class there is nothing to learn"
                    )));
                }
                if different.len() > MAX_CLASSES {
                    return Err(TrainError::Spec(format!(
                        "the label `{column}` has {} classes, more than {MAX_CLASSES}: is it a number to predict (`task: regression`)?",
                        different.len()
                    )));
                }
                let mut classes: Vec<String> = different.into_iter().collect();
                if let Ok(mut numbers) = classes
                    .iter()
                    .map(|c| c.parse::<i64>())
                    .collect::<Result<Vec<_>, _>>()
                {
                    numbers.sort_unstable();
                    let sorted: Vec<String> = numbers.iter().map(i64::to_string).collect();
                    // Texts such as `01` must keep their form.
                    if sorted.iter().all(|c| classes.contains(c)) {
                        classes = sorted;
                    }
                }
                Ok(Self::Classes { column, classes })
            }
        }
    }

    /// The column.
    #[must_use]
    pub fn column(&self) -> &str {
        match self {
            Self::Classes { column, .. } | Self::Value { column, .. } => column,
        }
    }

    /// The classes; none for regression.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        match self {
            Self::Classes { classes, .. } => classes,
            Self::Value { .. } => &[],
        }
    }

    /// The same label with other classes.
    pub(crate) fn with_classes(&self, classes: &[String]) -> Self {
        Self::Classes {
            column: self.column().to_owned(),
            classes: classes.to_vec(),
        }
    }

    /// Units of the label to one unit of the network's output; 1 for classes.
    #[must_use]
    pub const fn scale(&self) -> f64 {
        match self {
            Self::Classes { .. } => 1.0,
            Self::Value { deviation, .. } => *deviation,
        }
    }

    /// The number of the class of each row, `None` for one that the train part did not have; those
    /// are counted by their text.
    ///
    /// # Errors
    /// If the column is missing or has values that are no classes, or the label is a number.
    #[allow(clippy::type_complexity, reason = "two parallel answers")]
    pub fn class_indices(
        &self,
        table: &Columns<'_>,
    ) -> Result<(Vec<Option<u32>>, BTreeMap<String, u64>), TrainError> {
        let Self::Classes { column, classes } = self else {
            return Err(TrainError::Spec(
                "the model predicts a number, not a class".to_owned(),
            ));
        };
        let places: HashMap<&str, u32> = classes
            .iter()
            .zip(0u32..)
            .map(|(c, i)| (c.as_str(), i))
            .collect();
        let mut unknown = BTreeMap::new();
        let indices = class_texts(table, column)?
            .into_iter()
            .map(|text| {
                let place = places.get(text.as_str()).copied();
                if place.is_none() {
                    *unknown.entry(text).or_insert(0) += 1;
                }
                place
            })
            .collect();
        Ok((indices, unknown))
    }

    /// The targets of the rows of `part`, all of which must be known.
    ///
    /// # Errors
    /// As above, and if a class is unknown.
    pub fn targets(&self, table: &Columns<'_>, part: &str) -> Result<Targets, TrainError> {
        match self {
            Self::Classes { column, classes } => {
                let (indices, unknown) = self.class_indices(table)?;
                if !unknown.is_empty() {
                    return Err(TrainError::Data(unknown_labels(column, part, &unknown)));
                }
                Ok(Targets::Classes {
                    index: indices.into_iter().flatten().collect(),
                    count: classes.len(),
                })
            }
            Self::Value {
                column,
                mean,
                deviation,
            } => {
                let values = table.numbers(column)?;
                let scaled: Vec<f32> = values
                    .iter()
                    .map(|v| ((v - mean) / deviation) as f32)
                    .collect();
                match scaled.iter().position(|v| !v.is_finite()) {
                    None => Ok(Targets::Values(scaled)),
                    Some(row) => Err(TrainError::from(EncodeError::TooLarge {
                        name: column.clone(),
                        value: values[row],
                        row,
                    })),
                }
            }
        }
    }
}

/// One line about labels that the train part did not have.
pub(crate) fn unknown_labels(column: &str, part: &str, unknown: &BTreeMap<String, u64>) -> String {
    let rows: u64 = unknown.values().sum();
    let some: Vec<String> = unknown
        .iter()
        .take(5)
        .map(|(label, rows)| format!("`{}` ({rows})", label.escape_debug()))
        .collect();
    let more = if unknown.len() > 5 { ", …" } else { "" };
    format!(
        "the label `{column}` has classes in the {part} part that the train part does not have, in {rows} rows: {}{more}; split with `stratify: {column}`, or remove those rows",
        some.join(", ")
    )
}
