//! How far what clients send is from what the model was trained on: counts in the bins of the model's
//! reference, and their population stability index when somebody reads.

use std::collections::HashMap;

use emberline_common::serving::{DriftedColumn, MAX_DRIFTED_COLUMNS, psi};
use emberline_train::{
    encode::Source as _,
    features::{Features, ImageSource},
    reference::{bin_count, bin_of_number, image_means},
};
use emberline_worker::documents::{Reference, ReferenceBins, ReferenceColumn};
use std::sync::atomic::Ordering::Relaxed;

use crate::{columns::Named, counters::Sharded};

/// The reference of a model, and what was seen since.
#[derive(Debug, Default)]
pub(crate) struct Drift {
    columns: Vec<Column>,
    predictions: Vec<u64>,
    seen: Option<Sharded>,
    image: Option<ImageSource>,
}

#[derive(Debug)]
struct Column {
    reference: ReferenceColumn,
    /// For texts: the bin of each.
    texts: HashMap<String, usize>,
    /// Where its counts begin.
    start: usize,
}

impl Drift {
    /// From a model's reference; without one nothing is counted. A reference whose parts do not belong
    /// together is none.
    pub fn new(reference: Option<Reference>, features: &Features) -> Self {
        let whole = |r: &Reference| {
            let bins = |c: &ReferenceColumn| bin_count(&c.bins) == c.counts.len();
            r.columns.iter().all(bins)
        };
        let Some(reference) = reference.filter(whole) else {
            return Self::default();
        };
        let mut start = 0;
        let mut columns = Vec::with_capacity(reference.columns.len());
        for reference in reference.columns {
            let bins = reference.counts.len();
            let texts = match &reference.bins {
                ReferenceBins::Texts(texts) => texts.iter().cloned().zip(0..).collect(),
                ReferenceBins::Edges(_) => HashMap::new(),
            };
            columns.push(Column {
                reference,
                texts,
                start,
            });
            start += bins;
        }
        Self {
            columns,
            predictions: reference.predictions,
            seen: Some(Sharded::new(start)),
            image: match features {
                Features::Image { source, .. } => Some(source.clone()),
                Features::Table { .. } => None,
            },
        }
    }

    /// Counts the rows of an answered request.
    pub fn count(&self, inputs: &Named<'_>) {
        let Some(seen) = &self.seen else { return };
        let seen = seen.mine();
        let numbers = |column: &Column, values: &[f64]| {
            for value in values {
                let bin = bin_of_number(&column.reference.bins, *value);
                seen[column.start + bin].fetch_add(1, Relaxed);
            }
        };
        for column in &self.columns {
            match (&column.reference.bins, &self.image) {
                (ReferenceBins::Edges(_), Some(source)) => {
                    if let Ok(means) = image_means(source, inputs) {
                        numbers(column, &means);
                    }
                }
                (ReferenceBins::Edges(_), None) => {
                    if let Ok(values) = inputs.numbers(&column.reference.name) {
                        numbers(column, &values);
                    }
                }
                (ReferenceBins::Texts(all), _) => {
                    for text in inputs.texts(&column.reference.name).unwrap_or_default() {
                        let bin = column.texts.get(text).copied().unwrap_or(all.len());
                        seen[column.start + bin].fetch_add(1, Relaxed);
                    }
                }
            }
        }
    }

    /// The columns, worst first; none before there was a request.
    pub fn of_inputs(&self) -> Vec<DriftedColumn> {
        let Some(seen) = &self.seen else {
            return Vec::new();
        };
        let seen = seen.sum();
        let of = |column: &Column| {
            let counts = &column.reference.counts;
            let seen = seen.get(column.start..column.start + counts.len())?;
            Some(DriftedColumn {
                column: column.reference.name.clone(),
                psi: psi(counts, seen)?,
                values: seen.iter().sum(),
            })
        };
        let mut all: Vec<DriftedColumn> = self.columns.iter().filter_map(of).collect();
        all.sort_by(|a, b| b.psi.total_cmp(&a.psi));
        all.truncate(MAX_DRIFTED_COLUMNS);
        all
    }

    /// Of the predictions.
    pub fn of_predictions(&self, seen: &[u64]) -> Option<f64> {
        psi(&self.predictions, seen)
    }
}
