//! A trained model: its document, its weights, and how it predicts from raw columns.
//!
//! A `model` artifact has two files, `model.json` ([`ModelDocument`]) and `weights.bpk` (burn's
//! record, burnpack). The document has the weights' digest: a model whose files do not belong
//! together is refused.

use std::{collections::BTreeMap, path::Path};

use burn::tensor::Device;
use emberline_common::ids::Digest;
use emberline_data::table::Table;
use emberline_worker::{
    documents::{EpochMetrics, MODEL_FILE, ModelDocument, WEIGHTS_FILE},
    stage::StopReason,
};

use crate::{
    backend::Compute,
    checkpoint::Checkpoint,
    columns::Columns,
    encode::Encoder,
    error::TrainError,
    features::{Label, Preprocessing},
    fit::{self, Watcher},
    matrix::Matrix,
    network::{Network, Shape},
};

/// The version of the documents that this crate writes and reads.
pub const FORMAT: u32 = 1;

/// A model, ready to predict.
#[derive(Debug)]
pub struct Model {
    document: ModelDocument,
    preprocessing: Preprocessing,
    encoder: Encoder,
    network: Network,
    device: Device,
}

/// What a model says about rows.
#[derive(Debug, Clone, PartialEq)]
pub enum Predictions {
    /// The probability of each class, row after row.
    Probabilities {
        /// Classes, and numbers a row.
        classes: usize,
        /// `rows × classes` numbers; each row's sum is 1.
        values: Vec<f64>,
    },
    /// The value of each row, in the label's units.
    Values(Vec<f64>),
}

/// Predictions, and what was met that the train part did not have.
#[derive(Debug, Clone, PartialEq)]
pub struct Predicted {
    /// One for each row.
    pub predictions: Predictions,
    /// Rows with a category that the model does not know, by column.
    pub unknown_categories: BTreeMap<String, u64>,
}

impl Label {
    /// What a network's outputs say of rows.
    #[must_use]
    pub fn predictions(&self, outputs: &Matrix) -> Predictions {
        match self {
            Self::Classes { classes, .. } => Predictions::Probabilities {
                classes: classes.len(),
                values: fit::softmax(outputs),
            },
            Self::Value {
                mean, deviation, ..
            } => Predictions::Values(
                outputs
                    .data
                    .iter()
                    .map(|v| f64::from(*v) * deviation + mean)
                    .collect(),
            ),
        }
    }
}

impl Model {
    /// Loads a model from a directory, on the CPU.
    ///
    /// # Errors
    /// If a file is missing, damaged, of another version, or the two do not belong together.
    pub fn load(dir: &Path) -> Result<Self, TrainError> {
        Self::load_on(dir, &Compute::cpu())
    }

    /// Loads a model from a directory, on a device.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_on(dir: &Path, compute: &Compute) -> Result<Self, TrainError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|e| TrainError::io("read", &path, e))
        };
        Self::from_parts(&read(MODEL_FILE)?, read(WEIGHTS_FILE)?, compute)
    }

    /// A model from what its two files hold, on a device.
    ///
    /// # Errors
    /// If one is damaged, of another version, or the two do not belong together.
    pub fn from_parts(
        document: &[u8],
        weights: Vec<u8>,
        compute: &Compute,
    ) -> Result<Self, TrainError> {
        let document: ModelDocument = serde_json::from_slice(document)
            .map_err(|e| TrainError::Model(format!("`{MODEL_FILE}`: {e}")))?;
        if document.format != FORMAT {
            return Err(TrainError::Model(format!(
                "`{MODEL_FILE}` has format {}, this program reads format {FORMAT}",
                document.format
            )));
        }
        let own = |what: &str, e: serde_json::Error| {
            TrainError::Model(format!("`{MODEL_FILE}`: {what}: {e}"))
        };
        let preprocessing: Preprocessing = serde_json::from_value(document.preprocessing.clone())
            .map_err(|e| own("preprocessing", e))?;
        let shape: Shape =
            serde_json::from_value(document.network.clone()).map_err(|e| own("network", e))?;
        // Before anything is computed or allocated by what the file says.
        let checked = shape.check().and_then(|()| preprocessing.check());
        checked.map_err(|why| TrainError::Model(format!("`{MODEL_FILE}`: {why}")))?;
        let outputs = preprocessing.label.classes().len().max(1);
        if shape.outputs() != outputs {
            return Err(TrainError::Model(format!(
                "`{MODEL_FILE}`: the label has {outputs} outputs, the network gives {}",
                shape.outputs()
            )));
        }
        let encoder = Encoder::new(&preprocessing.features)?;
        if shape.inputs() != encoder.width() {
            return Err(TrainError::Model(format!(
                "`{MODEL_FILE}`: the preprocessing gives {} numbers, the network takes {}",
                encoder.width(),
                shape.inputs()
            )));
        }
        // A small file must not make a large network.
        let least = shape.parameters().saturating_mul(4);
        if (weights.len() as u64) < least {
            return Err(TrainError::Model(format!(
                "`{WEIGHTS_FILE}` has {} bytes, the network's parameters alone take {least}",
                weights.len()
            )));
        }
        if Digest::of(&weights).to_string() != document.weights_sha256 {
            return Err(TrainError::Model(format!(
                "`{WEIGHTS_FILE}` is not the file that `{MODEL_FILE}` was written with"
            )));
        }
        let network = shape.load(weights, &compute.device)?;
        // Such a model answers nothing; whoever made it, it must not get to where one is asked.
        if let Some(what) = network.wrong_weights()? {
            return Err(TrainError::Model(format!("`{WEIGHTS_FILE}` has {what}")));
        }
        Ok(Self {
            network,
            document,
            preprocessing,
            encoder,
            device: compute.device.clone(),
        })
    }

    pub(crate) const fn network(&self) -> &Network {
        &self.network
    }

    /// Everything but the weights.
    #[must_use]
    pub const fn document(&self) -> &ModelDocument {
        &self.document
    }

    /// How raw columns become numbers, and the label targets.
    #[must_use]
    pub const fn preprocessing(&self) -> &Preprocessing {
        &self.preprocessing
    }

    /// How the label becomes targets.
    #[must_use]
    pub const fn label(&self) -> &Label {
        &self.preprocessing.label
    }

    /// Predicts all rows of a table that has the model's raw columns, in any order.
    ///
    /// # Errors
    /// If a column is missing, of another type, or has a null, NaN or infinity.
    pub fn predict(&self, table: &Table) -> Result<Predicted, TrainError> {
        self.predict_watched(table, &Unwatched)
    }

    pub(crate) fn predict_watched(
        &self,
        table: &Table,
        watcher: &dyn Watcher,
    ) -> Result<Predicted, TrainError> {
        let applied = self.encoder.encode(&Columns::new(table))?;
        let outputs = fit::predict(&self.network, &applied.matrix, &self.device, watcher)?;
        Ok(Predicted {
            predictions: self.preprocessing.label.predictions(&outputs),
            unknown_categories: applied.unknown_categories,
        })
    }

    /// What makes numbers of raw columns for it.
    #[must_use]
    pub const fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// What the network gives for rows that were encoded: computing only. What it means,
    /// [`Label::predictions`] knows.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn forward(&self, rows: &Matrix) -> Result<Matrix, TrainError> {
        fit::predict(&self.network, rows, &self.device, &Unwatched)
    }
}

/// Writes a model's two files.
///
/// # Errors
/// If they cannot be written.
pub fn save(dir: &Path, document: &ModelDocument, weights: &[u8]) -> Result<(), TrainError> {
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        std::fs::write(&path, bytes).map_err(|e| TrainError::io("write", &path, e))
    };
    write(WEIGHTS_FILE, weights)?;
    let json = serde_json::to_vec_pretty(document)
        .map_err(|e| TrainError::Model(format!("`{MODEL_FILE}`: {e}")))?;
    write(MODEL_FILE, &json)
}

/// Nobody asks it to stop.
pub(crate) struct Unwatched;

impl Watcher for Unwatched {
    fn stop(&self) -> Option<StopReason> {
        None
    }
    fn step(&self, _: f64, _: u32) {}
    fn epoch_begins(&self, _: u32) {}
    fn epoch(&self, _: &EpochMetrics, _: f64) {}
    fn checkpoint(&self, _: &Checkpoint) -> Result<(), TrainError> {
        Ok(())
    }
}
