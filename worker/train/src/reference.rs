//! What a model was trained on, in counts small enough to travel with it: so whoever serves it can
//! tell how far from that is what it is asked.

use emberline_common::serving::{
    PREDICTION_BINS, prediction_bin_of_class, prediction_bin_of_probability,
    prediction_bin_of_value,
};
use emberline_worker::documents::{Reference, ReferenceBins, ReferenceColumn};

use crate::{
    columns::Columns,
    encode::Source,
    error::TrainError,
    features::{Encoding, Features, ImageSource, Preprocessing, parse_derived},
    fit,
    model::Predictions,
};

/// The column's name where an image is all the columns together.
pub const IMAGE: &str = "image";

/// The columns of a reference, and where each value of one belongs.
///
/// Of a table all raw columns that the model takes have one. Of images there is one for the mean of an
/// image's pixels: that of a single pixel says little, and there may be thousands.
///
/// # Errors
/// If the table lacks a column.
pub fn columns(
    preprocessing: &Preprocessing,
    table: &Columns<'_>,
) -> Result<Vec<ReferenceColumn>, TrainError> {
    let of_numbers = |name: &str, values: Vec<f64>| {
        let bins = ReferenceBins::Edges(edges(values.clone()));
        let mut counts = vec![0; bin_count(&bins)];
        for value in values {
            counts[bin_of_number(&bins, value)] += 1;
        }
        ReferenceColumn {
            name: name.to_owned(),
            bins,
            counts,
        }
    };
    match &preprocessing.features {
        Features::Image { source, .. } => {
            let name = match source {
                ImageSource::Column(column) => column,
                ImageSource::Pixels(_) => IMAGE,
            };
            Ok(vec![of_numbers(name, image_means(source, table)?)])
        }
        Features::Table { columns } => {
            let mut done: Vec<ReferenceColumn> = Vec::new();
            for encoding in columns {
                match encoding {
                    Encoding::OneHot { column, categories } => {
                        let bins = ReferenceBins::Texts(categories.clone());
                        let mut counts = vec![0; bin_count(&bins)];
                        for text in table.texts(column)? {
                            let at = categories.binary_search_by(|c| c.as_str().cmp(text));
                            counts[at.unwrap_or(categories.len())] += 1;
                        }
                        done.push(ReferenceColumn {
                            name: column.clone(),
                            bins,
                            counts,
                        });
                    }
                    Encoding::Standardised { column, .. } => {
                        done.push(of_numbers(column, table.numbers(column)?));
                    }
                    Encoding::Derived {
                        name, expression, ..
                    } => {
                        for column in parse_derived(name, expression)?.columns() {
                            if done.iter().all(|d| d.name != *column) {
                                done.push(of_numbers(column, table.numbers(column)?));
                            }
                        }
                    }
                }
            }
            let mut seen = std::collections::HashSet::new();
            done.retain(|column| seen.insert(column.name.clone()));
            Ok(done)
        }
    }
}

/// The mean of each image's pixels, as they come.
///
/// # Errors
/// If a column is missing.
pub fn image_means(source: &ImageSource, from: &impl Source) -> Result<Vec<f64>, TrainError> {
    match source {
        ImageSource::Column(column) => {
            let images = from.bytes(column)?.into_iter();
            let mean = |image: &[u8]| {
                let sum: u64 = image.iter().map(|pixel| u64::from(*pixel)).sum();
                sum as f64 / image.len().max(1) as f64
            };
            Ok(images.map(mean).collect())
        }
        ImageSource::Pixels(columns) => {
            let mut sums = vec![0.0; from.rows()];
            for column in columns {
                for (sum, pixel) in sums.iter_mut().zip(from.numbers(column)?.iter()) {
                    *sum += pixel;
                }
            }
            let pixels = columns.len().max(1) as f64;
            Ok(sums.into_iter().map(|sum| sum / pixels).collect())
        }
    }
}

/// The deciles of the values, equal ones once, and one below the smallest value if that is a decile:
/// else a constant that falls would not be seen.
fn edges(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let at = |k: usize| (k * values.len()).div_ceil(10).saturating_sub(1);
    let deciles = (1..10).filter_map(|k| values.get(at(k)));
    let mut edges: Vec<f64> = deciles.copied().collect();
    edges.dedup();
    if let (Some(lowest), Some(smallest)) = (edges.first(), values.first())
        && lowest == smallest
    {
        edges.insert(0, smallest.next_down());
    }
    edges
}

/// Bins of a column.
#[must_use]
pub const fn bin_count(bins: &ReferenceBins) -> usize {
    match bins {
        ReferenceBins::Edges(edges) => edges.len() + 1,
        ReferenceBins::Texts(texts) => texts.len() + 1,
    }
}

/// The bin of a number; the last one in a column of texts.
#[must_use]
pub fn bin_of_number(bins: &ReferenceBins, value: f64) -> usize {
    match bins {
        ReferenceBins::Edges(edges) => edges.partition_point(|edge| *edge < value),
        ReferenceBins::Texts(texts) => texts.len(),
    }
}

/// Calls back with the bin of each row's prediction.
pub fn prediction_bins(predictions: &Predictions, mut count: impl FnMut(usize)) {
    match predictions {
        Predictions::Values(values) => {
            for value in values {
                count(prediction_bin_of_value(*value));
            }
        }
        Predictions::Probabilities { classes: 2, values } => {
            for row in values.chunks_exact(2) {
                count(prediction_bin_of_probability(row[1]));
            }
        }
        Predictions::Probabilities { classes, values } => {
            for class in fit::most_probable(values, *classes) {
                count(prediction_bin_of_class(class as usize));
            }
        }
    }
}

/// A reference of these columns and predictions.
#[must_use]
pub fn reference(columns: Vec<ReferenceColumn>, predictions: &Predictions) -> Reference {
    let mut counts = vec![0; PREDICTION_BINS];
    prediction_bins(predictions, |bin| counts[bin] += 1);
    Reference {
        columns,
        predictions: counts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_of_the_values_is_in_each_bin() {
        let bins = ReferenceBins::Edges(edges((0..1000).map(f64::from).collect()));
        let mut counts = vec![0; bin_count(&bins)];
        for value in 0..1000 {
            counts[bin_of_number(&bins, f64::from(value))] += 1;
        }
        assert_eq!(counts, [100; 10]);
    }

    #[test]
    fn a_constant_has_a_bin_for_what_is_below_and_for_what_is_above() {
        let bins = ReferenceBins::Edges(edges(vec![3.0; 50]));
        let at = |value| bin_of_number(&bins, value);
        assert_eq!((at(2.9), at(3.0), at(3.1)), (0, 1, 2));
        assert_eq!(bin_count(&bins), 3);
    }
}
