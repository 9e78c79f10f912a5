//! `train`: a model from a table.
//!
//! In: `train` (table), optionally `validation` (table). Out: `model`.
//! Results: the last and best metrics, e.g. `best_epoch`, `validation_loss`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::convert::SeedValue;
use crate::spec::{DurationText, Ordered};

/// Trains one model. The same spec, data, seed and backend give the same weights, bit for bit, also when the training was interrupted and resumed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainSpec {
    /// What to predict.
    pub task: TrainTask,
    /// The column to predict.
    pub label: String,
    /// The columns to learn from; by default all but the label. Text columns are one-hot encoded, numeric ones standardised, both as learned from the train part and stored with the model. Not for images.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
    /// Columns not to learn from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Further features computed from numeric columns before standardisation, by name, e.g. `power: torque * speed`. Arithmetic with `+ - * / ( )`, numbers and column names; quote a name with other characters as `"Torque [Nm]"`. They are stored with the model.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub derived: Ordered<String, String>,
    /// The model's family and shape.
    pub model: ModelSpec,
    /// The optimizer.
    #[serde(default)]
    pub optimizer: OptimizerSpec,
    /// How the learning rate changes.
    #[serde(default)]
    pub schedule: ScheduleSpec,
    /// Passes over the train part.
    #[serde(default = "epochs")]
    #[schemars(range(min = 1, max = 100_000))]
    pub epochs: u32,
    /// Rows a step.
    #[serde(default = "batch")]
    #[schemars(range(min = 1, max = 65_536))]
    pub batch_size: u32,
    /// The seed of the weights, the batch order, dropout and augmentation.
    #[serde(default)]
    pub seed: SeedValue,
    /// How much each class counts in the loss.
    #[serde(default)]
    pub class_weights: ClassWeights,
    /// Stop when the validation part no longer gets better. Needs the input `validation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
    /// Save a checkpoint at the end of an epoch when this long has passed since the last one.
    #[serde(default = "checkpoint")]
    pub checkpoint_every: DurationText,
    /// Where to compute.
    #[serde(default)]
    pub backend: Backend,
}

const fn epochs() -> u32 {
    20
}
const fn batch() -> u32 {
    64
}
const fn checkpoint() -> DurationText {
    DurationText(std::time::Duration::from_secs(30))
}

/// What to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainTask {
    /// One of two or more classes.
    Classification,
    /// A number.
    Regression,
}

/// A model's family and shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "family", rename_all = "snake_case", deny_unknown_fields)]
pub enum ModelSpec {
    /// A multi-layer perceptron for tables.
    Mlp {
        /// The width of each hidden layer.
        #[serde(default = "hidden")]
        #[schemars(length(min = 1, max = 32))]
        hidden: Vec<u32>,
        /// What follows each hidden layer.
        #[serde(default)]
        activation: Activation,
        /// The share of a hidden layer's outputs that training sets to zero.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 0.95))]
        dropout: f64,
        /// Normalise each hidden layer over the batch.
        #[serde(default)]
        batch_norm: bool,
    },
    /// A convolutional network for images: for each entry of `channels` two 3×3 convolutions with batch normalisation and a 2×2 pooling, then one hidden layer.
    Cnn {
        /// Where the image is in a row.
        image: ImageSpec,
        /// The channels of each block.
        #[serde(default = "channels")]
        #[schemars(length(min = 1, max = 6))]
        channels: Vec<u32>,
        /// The width of the hidden layer.
        #[serde(default = "cnn_hidden")]
        hidden: u32,
        /// The share of the hidden layer's outputs that training sets to zero.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 0.95))]
        dropout: f64,
        /// Shift each training image at random by up to this many pixels each way.
        #[serde(default)]
        #[schemars(range(max = 64))]
        shift: u32,
    },
}

fn hidden() -> Vec<u32> {
    vec![64, 32]
}
fn channels() -> Vec<u32> {
    vec![32, 64]
}
const fn cnn_hidden() -> u32 {
    128
}

/// What follows a hidden layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// max(0, x).
    #[default]
    Relu,
    /// x · Φ(x).
    Gelu,
    /// Hyperbolic tangent.
    Tanh,
}

/// Where the image is in a row, and its size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// The column of bytes that holds it, row by row, channels last. Without it, all feature columns in their order are its pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// Pixels from top to bottom.
    #[schemars(range(min = 1, max = 4096))]
    pub height: u32,
    /// Pixels from left to right.
    #[schemars(range(min = 1, max = 4096))]
    pub width: u32,
    /// Colours: 1 for grey, 3 for RGB.
    #[serde(default = "grey")]
    #[schemars(range(min = 1, max = 16))]
    pub channels: u32,
    /// The value of a fully lit pixel; values are divided by it.
    #[serde(default = "byte")]
    pub max_value: f64,
}

const fn grey() -> u32 {
    1
}
const fn byte() -> f64 {
    255.0
}

/// The optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSpec {
    /// Which.
    #[serde(default, rename = "type")]
    pub optimizer_type: OptimizerType,
    /// The learning rate at the beginning of the schedule.
    #[serde(default = "learning_rate")]
    #[schemars(range(min = 0.0))]
    pub learning_rate: f64,
    /// Weight decay; decoupled for `adam_w`, L2 for the others.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub weight_decay: f64,
    /// Momentum of `sgd`.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub momentum: f64,
    /// Scale gradients down so that their norm is at most this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
}

const fn learning_rate() -> f64 {
    1e-3
}

impl Default for OptimizerSpec {
    fn default() -> Self {
        Self {
            optimizer_type: OptimizerType::default(),
            learning_rate: learning_rate(),
            weight_decay: 0.0,
            momentum: 0.0,
            clip_norm: None,
        }
    }
}

/// Which optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerType {
    /// Adam.
    Adam,
    /// Adam with decoupled weight decay.
    #[default]
    AdamW,
    /// Stochastic gradient descent.
    Sgd,
}

/// How the learning rate changes from step to step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ScheduleSpec {
    /// It stays.
    #[default]
    Constant,
    /// It falls along half a cosine over all steps.
    Cosine {
        /// The share of all steps in which it first rises from zero.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        warmup: f64,
        /// The share of the learning rate that is left at the end.
        #[serde(default)]
        #[schemars(range(min = 0.0, max = 1.0))]
        floor: f64,
    },
    /// It is multiplied by `factor` after each `every` epochs.
    Step {
        /// Epochs between changes.
        #[schemars(range(min = 1))]
        every: u32,
        /// The factor.
        #[schemars(range(min = 0.0, max = 1.0))]
        factor: f64,
    },
}

/// How much each class counts in the loss.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ClassWeights {
    /// A rule.
    Rule(ClassWeightRule),
    /// Weights by class; a class that is not named has 1.
    Given(Ordered<String, f64>),
    /// All the same.
    #[default]
    #[schemars(skip)]
    None,
}

/// A rule for class weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClassWeightRule {
    /// All the same.
    Equal,
    /// Each class counts as rows / (classes × rows of the class).
    Balanced,
    /// The square root of `balanced`.
    SqrtBalanced,
}

/// When to stop early.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopping {
    /// What to watch on the validation part.
    #[serde(default)]
    pub metric: WatchedMetric,
    /// Epochs without getting better before it stops.
    #[serde(default = "patience")]
    #[schemars(range(min = 1))]
    pub patience: u32,
    /// What counts as better.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub min_delta: f64,
}

const fn patience() -> u32 {
    10
}

/// What early stopping watches. The model keeps the weights of the best epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WatchedMetric {
    /// The loss; lower is better.
    #[default]
    Loss,
    /// The share of right answers.
    Accuracy,
    /// F1 at the best threshold (two classes), or the mean F1 of the classes.
    F1,
    /// Average precision (two classes).
    AveragePrecision,
    /// Root mean squared error; lower is better.
    Rmse,
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// A GPU if the task has reserved one and the worker's program has a GPU backend, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU; without one the stage fails.
    Gpu,
}
