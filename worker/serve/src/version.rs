//! A version that is loaded: its model, what it takes and gives, its queues and its counts.

use std::{sync::Arc, time::Duration};

use emberline_common::{
    ids::ModelName,
    serving::{ServedVersion, ServingLimits},
};
use emberline_train::{
    Model, TrainError, backend::Compute, encode::EncodeError, features::Label, matrix::Matrix,
    model::Predictions,
};
use opentelemetry::KeyValue;

use crate::{
    columns::{Named, RawColumns},
    counters::Counters,
    drift::Drift,
    error::InferError,
    metrics::Instruments,
    pool::{Forward, Pool, Slot},
    schema::Schema,
    tensor::Tensor,
};

/// The network of a version, as the threads that compute know it.
struct Network {
    model: Model,
    instruments: Arc<Instruments>,
    attributes: [KeyValue; 2],
}

impl Forward for Network {
    fn forward(&self, rows: &Matrix) -> Result<Matrix, String> {
        self.model.forward(rows).map_err(|e| e.to_string())
    }

    fn computed(&self, rows: usize) {
        self.instruments.batch(rows, &self.attributes);
    }
}

/// A version that answers.
pub(crate) struct Version {
    pub model: ModelName,
    pub number: u32,
    /// As answers have it.
    pub text: String,
    /// `mlp` or `cnn`.
    pub family: String,
    pub schema: Schema,
    pub slot: Arc<Slot>,
    pub counters: Arc<Counters>,
    /// Which it is, for metrics.
    pub attributes: [KeyValue; 2],
    network: Arc<Network>,
    label: Label,
}

impl Version {
    /// From the two files of a model; warm, so that the first request is as fast as the others. Takes
    /// its time.
    pub fn load(
        model_name: &ModelName,
        wanted: &ServedVersion,
        files: (&[u8], Vec<u8>),
        limits: &ServingLimits,
        pool: &Pool,
        instruments: &Arc<Instruments>,
    ) -> Result<Self, String> {
        let told = |e: TrainError| e.to_string();
        let model = Model::from_parts(files.0, files.1, &Compute::cpu()).map_err(told)?;
        let schema = Schema::of(&model)?;
        let width = model.encoder().width();
        for rows in [1, limits.max_batch.max(1) as usize, 1] {
            let zeros = Matrix {
                rows,
                cols: width,
                data: vec![0.0; rows * width],
            };
            model.forward(&zeros).map_err(told)?;
        }
        let attributes = [
            KeyValue::new("emberline.model.name", model_name.to_string()),
            KeyValue::new("emberline.model.version", i64::from(wanted.version)),
        ];
        let document = model.document();
        let drift = Drift::new(document.reference.clone(), &model.preprocessing().features);
        let family = document.family.clone();
        let label = model.label().clone();
        let network = Arc::new(Network {
            model,
            instruments: Arc::clone(instruments),
            attributes: attributes.clone(),
        });
        Ok(Self {
            model: model_name.clone(),
            number: wanted.version,
            text: wanted.version.to_string(),
            family,
            schema,
            slot: pool.slot(Arc::clone(&network) as Arc<dyn Forward>, limits),
            counters: Arc::new(Counters::new(drift)),
            attributes,
            network,
            label,
        })
    }

    /// The raw columns by name.
    pub const fn named<'a>(&'a self, columns: &'a RawColumns) -> Named<'a> {
        Named {
            schema: &self.schema,
            columns,
        }
    }

    /// The numbers that the network takes for these rows.
    pub fn encode(&self, inputs: &Named<'_>) -> Result<Matrix, InferError> {
        let encoded = self.network.model.encoder().encode(inputs);
        encoded.map(|applied| applied.matrix).map_err(|e| {
            let field = match &e {
                EncodeError::TooLarge { name, .. } | EncodeError::Derived { name, .. } => {
                    format!("inputs.{name}")
                }
                EncodeError::ImageSize { column, .. } => format!("inputs.{column}"),
                EncodeError::Column(_) => "inputs".to_owned(),
            };
            InferError::bad(field, e.to_string())
        })
    }

    /// The columns of a request, checked, and the numbers that the network takes for them.
    pub fn read(
        &self,
        tensors: Vec<Tensor>,
        max_rows: u32,
    ) -> Result<(RawColumns, Matrix), InferError> {
        let columns = self.schema.columns(tensors, max_rows)?;
        let encoded = self.encode(&self.named(&columns))?;
        Ok((columns, encoded))
    }

    /// What the network's outputs say.
    pub fn predictions(&self, outputs: &Matrix) -> Result<Predictions, InferError> {
        let predictions = self.label.predictions(outputs);
        let (Predictions::Probabilities { values, .. } | Predictions::Values(values)) =
            &predictions;
        if values.iter().all(|value| value.is_finite()) {
            return Ok(predictions);
        }
        Err(InferError::Failed(format!(
            "version {} of the model `{}` gave an answer that is no finite number",
            self.number, self.model
        )))
    }

    /// An answer took so long.
    pub fn took(&self, took: Duration) {
        self.network.instruments.answered(took, &self.attributes);
    }
}

impl std::fmt::Debug for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Version({} {})", self.model, self.number)
    }
}
