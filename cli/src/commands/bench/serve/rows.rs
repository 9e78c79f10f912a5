//! Rows like those that a model was trained on, made from what the registry has of its inputs: numbers
//! between the smallest and the largest value, texts out of the known ones. The same rows each time.

use std::ops::Range;

use emberline_data::table::{Column, ColumnValues, Table};
use emberline_train::{
    Model,
    features::{Features, ImageSource},
};
use emberline_worker::documents::ModelInput;
use serde_json::{Value, json};

/// Different rows that are asked for.
pub(super) const ROWS: usize = 256;
/// What images that come as one tensor of numbers are called.
const IMAGE: &str = "image";

/// Rows of a model.
#[derive(Debug)]
pub(super) struct Rows {
    columns: Vec<(String, Values)>,
    /// The tensor that has whole images, and the columns that it has, in order.
    image: Option<(String, Vec<String>)>,
}

#[derive(Debug)]
enum Values {
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Flags(Vec<bool>),
    Texts(Vec<String>),
    Images(Vec<Vec<u8>>),
}

impl Rows {
    /// Rows for this model.
    pub(super) fn of(model: &Model) -> Self {
        let mut random = Random(1);
        let (image, bytes) = match &model.preprocessing().features {
            Features::Table { .. } => (None, 0),
            Features::Image { shape, source, .. } => {
                let image = match source {
                    ImageSource::Column(column) => (column.clone(), vec![column.clone()]),
                    ImageSource::Pixels(pixels) => (IMAGE.to_owned(), pixels.clone()),
                };
                (Some(image), shape.iter().product())
            }
        };
        let inputs = model.document().inputs.iter();
        let columns = inputs.map(|input| (input.name.clone(), values(input, bytes, &mut random)));
        Self {
            columns: columns.collect(),
            image,
        }
    }

    /// The bodies of requests of one row each, as they are over REST. An image is one tensor.
    pub(super) fn requests(&self) -> Vec<Value> {
        let in_image = |name: &String| {
            let image = self.image.as_ref();
            image.is_some_and(|(_, columns)| columns.contains(name))
        };
        let alone: Vec<_> = (self.columns.iter())
            .filter(|(name, _)| !in_image(name))
            .collect();
        let request = |row: usize| {
            let mut inputs: Vec<Value> = (alone.iter())
                .map(|(name, values)| tensor(name, values.datatype(), &[1], &[values.json(row)]))
                .collect();
            if let Some((name, columns)) = &self.image {
                let (datatype, pixels) = self.pixels(columns, row);
                inputs.push(tensor(name, datatype, &[1, pixels.len()], &pixels));
            }
            json!({ "inputs": inputs })
        };
        (0..ROWS).map(request).collect()
    }

    /// One image.
    fn pixels(&self, columns: &[String], row: usize) -> (&'static str, Vec<Value>) {
        let find = |name: &String| self.columns.iter().find(|(column, _)| column == name);
        let found: Vec<&Values> = (columns.iter().filter_map(find))
            .map(|(_, values)| values)
            .collect();
        if let [Values::Images(images)] = found.as_slice() {
            return ("UINT8", images[row].iter().map(|p| json!(p)).collect());
        }
        let fits = found.iter().all(|values| values.fits_a_byte());
        let whole = found.iter().all(|v| matches!(v, Values::Integers(_)));
        let datatype = match (fits, whole) {
            (true, _) => "UINT8",
            (false, true) => "INT64",
            (false, false) => "FP64",
        };
        (datatype, found.iter().map(|v| v.json(row)).collect())
    }

    /// Some of the rows as a table.
    pub(super) fn table(&self, rows: Range<usize>) -> Table {
        let columns = self.columns.iter().map(|(name, values)| Column {
            name: name.clone(),
            values: values.column(rows.clone()),
        });
        Table {
            rows: rows.len(),
            columns: columns.collect(),
        }
    }
}

fn tensor(name: &str, datatype: &str, shape: &[usize], data: &[Value]) -> Value {
    json!({ "name": name, "datatype": datatype, "shape": shape, "data": data })
}

#[allow(clippy::cast_possible_truncation, reason = "between two integers")]
fn values(input: &ModelInput, bytes: usize, random: &mut Random) -> Values {
    let (min, max) = (input.min.unwrap_or(0.0), input.max.unwrap_or(1.0));
    let mut number = |_| min + (max - min) * random.unit();
    match input.column_type.as_str() {
        "integer" => Values::Integers((0..ROWS).map(|n| number(n).round() as i64).collect()),
        "boolean" => Values::Flags((0..ROWS).map(|_| random.below(2) == 1).collect()),
        "text" => {
            let mut text = || {
                let known = &input.categories;
                let known = known.get(random.below(known.len().max(1)));
                known.cloned().unwrap_or_default()
            };
            Values::Texts((0..ROWS).map(|_| text()).collect())
        }
        "bytes" => {
            let mut pixel = |_| u8::try_from(random.below(256)).unwrap_or(0);
            Values::Images(
                (0..ROWS)
                    .map(|_| (0..bytes).map(&mut pixel).collect())
                    .collect(),
            )
        }
        _ => Values::Floats((0..ROWS).map(number).collect()),
    }
}

impl Values {
    const fn datatype(&self) -> &'static str {
        match self {
            Self::Integers(_) => "INT64",
            Self::Floats(_) => "FP64",
            Self::Flags(_) => "BOOL",
            Self::Texts(_) => "BYTES",
            Self::Images(_) => "UINT8",
        }
    }

    fn json(&self, row: usize) -> Value {
        match self {
            Self::Integers(all) => json!(all[row]),
            Self::Floats(all) => json!(all[row]),
            Self::Flags(all) => json!(all[row]),
            Self::Texts(all) => json!(all[row]),
            Self::Images(all) => json!(all[row]),
        }
    }

    fn fits_a_byte(&self) -> bool {
        matches!(self, Self::Integers(all) if all.iter().all(|n| (0..=255).contains(n)))
    }

    fn column(&self, rows: Range<usize>) -> ColumnValues {
        match self {
            Self::Integers(all) => ColumnValues::Integer(all[rows].iter().copied().collect()),
            Self::Floats(all) => ColumnValues::Float(all[rows].iter().copied().collect()),
            Self::Flags(all) => ColumnValues::Boolean(all[rows].iter().map(|v| Some(*v)).collect()),
            Self::Texts(all) => ColumnValues::Text(all[rows].iter().map(Some).collect()),
            Self::Images(all) => ColumnValues::Bytes(all[rows].iter().map(Some).collect()),
        }
    }
}

/// The generator SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0, and below 1.
    #[allow(clippy::cast_precision_loss, reason = "53 bits")]
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap_or(0)
    }
}
