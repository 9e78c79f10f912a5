//! What a model takes and gives, and a request's tensors checked against it, column by column.
//!
//! One tensor is one raw column: its name is the column's, its shape is `[rows]` or `[rows, 1]`. A
//! datatype other than the column's own is taken where no value changes by it: smaller integers and
//! floats, and integers for a column of floats up to 2⁵³.
//!
//! A model of images may get its images as one tensor of numbers instead: named `image`, or as the
//! column of bytes. Its shape is `[rows, channels, height, width]`, `[rows, height, width]` where there
//! is one channel, or `[rows, numbers]` in the order of the columns (row by row, channels last).

use std::{collections::HashMap, sync::Arc};

use emberline_common::spec::kinds::convert::ColumnType;
use emberline_data::{schema::type_name, table::missing_column};
use emberline_train::{
    Model,
    features::{Features, ImageSource},
    reference::IMAGE,
};

use crate::{
    columns::{MAX_EXACT, RawColumns, Values, values_of},
    error::{InferError, cut, listed},
    tensor::Tensor,
};

/// One raw column.
#[derive(Debug, Clone)]
pub(crate) struct InputColumn {
    pub name: String,
    pub kind: ColumnType,
}

impl InputColumn {
    /// What its metadata says.
    pub const fn datatype(&self) -> &'static str {
        match self.kind {
            ColumnType::Integer => "INT64",
            ColumnType::Float => "FP64",
            ColumnType::Boolean => "BOOL",
            ColumnType::Text | ColumnType::Bytes => "BYTES",
        }
    }
}

/// The tensors that a model gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// Of a classifier: `[rows, classes]`, FP64.
    Probabilities,
    /// Of a classifier: the most probable class, `[rows]`, BYTES.
    Class,
    /// Of a model of values: `[rows]`, FP64.
    Value,
}

impl Output {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Probabilities => "probabilities",
            Self::Class => "class",
            Self::Value => "value",
        }
    }

    pub const fn datatype(self) -> &'static str {
        match self {
            Self::Probabilities | Self::Value => "FP64",
            Self::Class => "BYTES",
        }
    }
}

/// What a model takes and gives.
#[derive(Debug)]
pub(crate) struct Schema {
    pub inputs: Vec<InputColumn>,
    pub classes: Arc<[String]>,
    places: HashMap<String, usize>,
    image: Option<Images>,
}

/// Where images may come as one tensor.
#[derive(Debug)]
struct Images {
    name: String,
    /// Channels, height and width.
    shape: [usize; 3],
}

impl Schema {
    /// Of a model.
    ///
    /// # Errors
    /// If its document has a column of no known type, or one twice.
    pub fn of(model: &Model) -> Result<Self, String> {
        let mut inputs = Vec::new();
        let mut places = HashMap::new();
        for input in &model.document().inputs {
            let kind = [
                ColumnType::Integer,
                ColumnType::Float,
                ColumnType::Boolean,
                ColumnType::Text,
                ColumnType::Bytes,
            ];
            let kind = kind
                .into_iter()
                .find(|k| type_name(*k) == input.column_type);
            let name = &input.name;
            let kind = kind.ok_or_else(|| {
                let unknown = cut(&input.column_type);
                format!("the column `{name}` has the type `{unknown}`, which is not known")
            })?;
            if places.insert(name.clone(), inputs.len()).is_some() {
                return Err(format!("the column `{name}` is there twice"));
            }
            inputs.push(InputColumn {
                name: name.clone(),
                kind,
            });
        }
        let image = match &model.preprocessing().features {
            Features::Table { .. } => None,
            Features::Image { shape, source, .. } => {
                let name = match source {
                    ImageSource::Column(column) => column.as_str(),
                    ImageSource::Pixels(_) => IMAGE,
                };
                let taken = matches!(source, ImageSource::Pixels(_)) && places.contains_key(name);
                (!taken).then(|| Images {
                    name: name.to_owned(),
                    shape: *shape,
                })
            }
        };
        Ok(Self {
            inputs,
            classes: model.label().classes().into(),
            places,
            image,
        })
    }

    /// Where a column stands.
    pub fn place_of(&self, column: &str) -> Option<usize> {
        self.places.get(column).copied()
    }

    /// The tensors that it gives.
    pub fn outputs(&self) -> &'static [Output] {
        if self.classes.is_empty() {
            &[Output::Value]
        } else {
            &[Output::Probabilities, Output::Class]
        }
    }

    /// The shape of an output, as metadata has it.
    pub fn shape_of(&self, output: Output) -> Vec<i64> {
        match output {
            Output::Probabilities => {
                vec![-1, i64::try_from(self.classes.len()).unwrap_or(i64::MAX)]
            }
            Output::Class | Output::Value => vec![-1],
        }
    }

    /// The outputs that were asked for, by name; all of them if none was named.
    pub fn requested(&self, names: &[String]) -> Result<Vec<Output>, InferError> {
        if names.is_empty() {
            return Ok(self.outputs().to_vec());
        }
        let find = |name: &String| {
            let found = self.outputs().iter().find(|output| output.name() == name);
            found.copied().ok_or_else(|| {
                let there = listed(self.outputs().iter().map(|o| o.name()));
                let name = cut(name);
                InferError::bad(
                    format!("outputs.{name}"),
                    format!("there is no output `{name}`; there are {there}"),
                )
            })
        };
        names.iter().map(find).collect()
    }

    /// The raw columns of a request.
    pub fn columns(&self, tensors: Vec<Tensor>, max_rows: u32) -> Result<RawColumns, InferError> {
        let mut rows: Option<(usize, String)> = None;
        let mut values: Vec<Option<Values>> = Vec::new();
        values.resize_with(self.inputs.len(), || None);
        for mut tensor in tensors {
            let as_image = self.as_image(&tensor)?;
            let place = self.places.get(&tensor.name).copied();
            if as_image.is_none() && place.is_none() {
                return Err(self.unknown(&tensor.name));
            }
            let own_rows = match as_image {
                Some(images) => images.rows(&tensor)?,
                None => column_rows(&tensor)?,
            };
            match &rows {
                None if own_rows == 0 => return Err(tensor.error("has no rows")),
                None if own_rows > max_rows as usize => {
                    return Err(tensor.error(format!(
                        "has {own_rows} rows: a request has at most {max_rows} here; send several"
                    )));
                }
                None => rows = Some((own_rows, tensor.name.clone())),
                Some((rows, first)) if *rows != own_rows => {
                    let why = format!("has {own_rows} rows, but `{first}` has {rows}");
                    return Err(tensor.error(why));
                }
                Some(_) => {}
            }
            match (as_image, place) {
                (Some(images), _) => self.take_images(images, tensor, own_rows, &mut values)?,
                (None, Some(place)) => {
                    let datatype = tensor.datatype()?;
                    let kind = self.inputs[place].kind;
                    let plain = tensor.plain(datatype, own_rows)?;
                    let taken = values_of(&tensor, datatype.as_str(), kind, plain)?;
                    put(&mut values, place, &tensor.name, taken)?;
                }
                (None, None) => {}
            }
        }
        let missing: Vec<&str> = (self.inputs.iter().zip(&values))
            .filter(|(_, values)| values.is_none())
            .map(|(input, _)| input.name.as_str())
            .collect();
        match missing.as_slice() {
            [] => {}
            [name] => return Err(InferError::column(name, "is missing")),
            [first, ..] => {
                let instead = match &self.image {
                    Some(image) => format!("; or send all images as one tensor `{}`", image.name),
                    None => String::new(),
                };
                let all = listed(missing.iter().copied());
                return Err(InferError::bad(
                    format!("inputs.{}", cut(first)),
                    format!("the columns {all} are missing{instead}"),
                ));
            }
        }
        Ok(RawColumns {
            rows: rows.map_or(0, |(rows, _)| rows),
            values: values.into_iter().flatten().collect(),
        })
    }

    fn unknown(&self, name: &str) -> InferError {
        let why = missing_column(&cut(name), self.inputs.iter().map(|i| i.name.as_str()));
        InferError::bad(
            format!("inputs.{}", cut(name)),
            format!("{why} among the inputs of this model"),
        )
    }

    /// Whether the tensor has whole images as numbers.
    fn as_image(&self, tensor: &Tensor) -> Result<Option<&Images>, InferError> {
        let Some(images) = self.image.as_ref().filter(|i| i.name == tensor.name) else {
            return Ok(None);
        };
        // The column of bytes itself is no numbers.
        let bytes = tensor.datatype()? == crate::tensor::DataType::Bytes;
        Ok((!bytes || !self.places.contains_key(&tensor.name)).then_some(images))
    }

    /// Images as one tensor become what the model's columns would have been.
    fn take_images(
        &self,
        images: &Images,
        mut tensor: Tensor,
        rows: usize,
        values: &mut [Option<Values>],
    ) -> Result<(), InferError> {
        let datatype = tensor.datatype()?;
        let numbers: usize = images.shape.iter().product();
        let count = rows.checked_mul(numbers);
        let count = count.ok_or_else(|| tensor.error("is too large"))?;
        let plain = tensor.plain(datatype, count)?;
        let floats = values_of(&tensor, datatype.as_str(), ColumnType::Float, plain)?;
        let Values::Floats(mut pixels) = floats else {
            return Err(tensor.error("does not hold numbers"));
        };
        let [channels, height, width] = images.shape;
        if tensor.shape.len() == 4 && channels > 1 {
            let plane = height * width;
            let mut moved = Vec::with_capacity(pixels.len());
            for image in pixels.chunks_exact(numbers) {
                for at in 0..plane {
                    moved.extend((0..channels).map(|channel| image[channel * plane + at]));
                }
            }
            pixels = moved;
        }
        let whole =
            |value: f64, low: f64, high: f64| value.fract() == 0.0 && value >= low && value <= high;
        if let Some(place) = self.places.get(&images.name).copied() {
            // A column of bytes: a byte for each number.
            if let Some(at) = pixels.iter().position(|v| !whole(*v, 0.0, 255.0)) {
                return Err(tensor.error(format!(
                    "has {} in row {}: this model takes pixels as integers from 0 to 255",
                    pixels[at],
                    at / numbers
                )));
            }
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "checked above"
            )]
            let bytes: Vec<u8> = pixels.iter().map(|v| *v as u8).collect();
            let bytes = bytes::Bytes::from(bytes);
            let image = |row: usize| bytes.slice(row * numbers..(row + 1) * numbers);
            let images_of = Values::Bytes((0..rows).map(image).collect());
            return put(values, place, &tensor.name, images_of);
        }
        for (place, input) in self.inputs.iter().enumerate() {
            let column = pixels.iter().skip(place).step_by(numbers).copied();
            let column = match input.kind {
                ColumnType::Integer => {
                    #[allow(clippy::cast_precision_loss, reason = "2^53 is a float")]
                    let most = MAX_EXACT as f64;
                    let bad = (column.clone()).position(|v| !whole(v, -most, most));
                    if let Some(row) = bad {
                        return Err(tensor.error(format!(
                            "has a pixel that is no integer in row {row}: this model takes integers"
                        )));
                    }
                    #[allow(clippy::cast_possible_truncation, reason = "checked above")]
                    Values::Integers(column.map(|v| v as i64).collect())
                }
                ColumnType::Boolean => Values::Bools(column.map(|v| v > 0.5).collect()),
                _ => Values::Floats(column.collect()),
            };
            put(values, place, &input.name, column)?;
        }
        Ok(())
    }
}

impl Images {
    /// How many a tensor has, by its shape.
    fn rows(&self, tensor: &Tensor) -> Result<usize, InferError> {
        let dims: Option<Vec<usize>> = (tensor.shape.iter())
            .map(|dim| usize::try_from(*dim).ok())
            .collect();
        let [channels, height, width] = self.shape;
        match dims.as_deref() {
            Some([rows, c, h, w]) if [*c, *h, *w] == self.shape => Ok(*rows),
            Some([rows, h, w]) if channels == 1 && [*h, *w] == [height, width] => Ok(*rows),
            Some([rows, numbers]) if *numbers == channels * height * width => Ok(*rows),
            _ => Err(tensor.error(format!(
                "has the shape {:?}: images of this model come as [rows, {channels}, {height}, {width}] or [rows, {}]",
                tensor.shape,
                channels * height * width
            ))),
        }
    }
}

/// The rows of a tensor that is one column.
fn column_rows(tensor: &Tensor) -> Result<usize, InferError> {
    let rows = match tensor.shape.as_slice() {
        [rows] | [rows, 1] => usize::try_from(*rows).ok(),
        _ => None,
    };
    rows.ok_or_else(|| {
        tensor.error(format!(
            "has the shape {:?}: a column has the shape [rows] or [rows, 1]",
            tensor.shape
        ))
    })
}

fn put(
    all: &mut [Option<Values>],
    place: usize,
    name: &str,
    values: Values,
) -> Result<(), InferError> {
    match &mut all[place] {
        Some(_) => Err(InferError::column(name, "is there twice")),
        free => {
            *free = Some(values);
            Ok(())
        }
    }
}
