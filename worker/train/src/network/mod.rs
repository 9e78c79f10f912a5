//! Networks: the families, their first weights, and the one type that training knows.
//!
//! First weights come from the seed alone, and parameter ids from their position: the same spec and
//! seed give the same record, byte for byte. Nothing here may use burn's own random numbers.

mod cnn;
mod mlp;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId, RunningState},
    nn::{BatchNorm, BatchNormConfig, Linear},
    tensor::{Bytes, DType, Device, Tensor, TensorData},
};
use emberline_common::spec::kinds::train::ModelSpec;
use serde::{Deserialize, Serialize};

pub use cnn::{Cnn, CnnShape};
pub use mlp::{Mlp, MlpShape};

use crate::{
    error::TrainError,
    images,
    random::{Purpose, Random},
};

/// The shape of a network: all that is needed to build it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "snake_case")]
pub enum Shape {
    /// A multi-layer perceptron.
    Mlp(MlpShape),
    /// A convolutional network.
    Cnn(CnnShape),
}

/// The most parameters that a network may have: 1 GiB of weights, four times that in training.
const MAX_PARAMETERS: u64 = 1 << 28;

impl Shape {
    /// The shape that a spec asks for.
    ///
    /// # Errors
    /// If the image is too small for the blocks, a width is zero, a share is no share, or the
    /// network would have more than 2^28 parameters.
    pub fn new(spec: &ModelSpec, inputs: usize, outputs: usize) -> Result<Self, TrainError> {
        let share = |dropout: f64| {
            if (0.0..=0.95).contains(&dropout) {
                Ok(dropout)
            } else {
                Err(TrainError::Spec(format!(
                    "`model.dropout` is {dropout}: it is a share between 0 and 0.95"
                )))
            }
        };
        let widths = |name: &str, widths: &[u32]| {
            if widths.is_empty() || widths.contains(&0) {
                return Err(TrainError::Spec(format!(
                    "`model.{name}` is {widths:?}: give at least one width, none of them 0"
                )));
            }
            Ok(widths.iter().map(|w| *w as usize).collect::<Vec<_>>())
        };
        let shape = match spec {
            ModelSpec::Mlp {
                hidden,
                activation,
                dropout,
                batch_norm,
            } => Self::Mlp(MlpShape {
                inputs,
                hidden: widths("hidden", hidden)?,
                outputs,
                activation: *activation,
                dropout: share(*dropout)?,
                batch_norm: *batch_norm,
            }),
            ModelSpec::Cnn {
                image,
                channels,
                hidden,
                dropout,
                shift: _,
            } => {
                let blocks = widths("channels", channels)?;
                widths("hidden", &[*hidden])?;
                let smallest = image.height.min(image.width);
                if blocks.len() >= 32 || smallest >> blocks.len() == 0 {
                    return Err(TrainError::Spec(format!(
                        "images of {}×{} pixels are too small for {} blocks, each of which halves them: give `model.channels` fewer entries",
                        image.height,
                        image.width,
                        blocks.len()
                    )));
                }
                Self::Cnn(CnnShape {
                    image: [
                        image.channels as usize,
                        image.height as usize,
                        image.width as usize,
                    ],
                    channels: blocks,
                    hidden: *hidden as usize,
                    outputs,
                    dropout: share(*dropout)?,
                })
            }
        };
        let parameters = shape.parameters();
        if parameters > MAX_PARAMETERS {
            return Err(TrainError::Spec(format!(
                "the network would have {parameters} parameters, more than {MAX_PARAMETERS}: make `model` smaller"
            )));
        }
        Ok(shape)
    }

    /// Numbers a row that it takes.
    #[must_use]
    pub fn inputs(&self) -> usize {
        match self {
            Self::Mlp(shape) => shape.inputs,
            Self::Cnn(shape) => shape.image.iter().product(),
        }
    }

    /// Numbers it gives a row.
    #[must_use]
    pub const fn outputs(&self) -> usize {
        match self {
            Self::Mlp(shape) => shape.outputs,
            Self::Cnn(shape) => shape.outputs,
        }
    }

    /// Checks a shape that was read from somewhere: that it can be built, and has no more than 2^28
    /// parameters.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn check(&self) -> Result<(), String> {
        let (widths, image) = match self {
            Self::Mlp(shape) => (
                [&shape.hidden[..], &[shape.inputs, shape.outputs]].concat(),
                None,
            ),
            Self::Cnn(shape) => (
                [&shape.channels[..], &[shape.hidden, shape.outputs]].concat(),
                Some(shape.image),
            ),
        };
        let most = 1 << 28;
        if let Some(width) = widths.iter().find(|width| !(1..=most).contains(*width)) {
            return Err(format!("a layer of the network has the width {width}"));
        }
        if let Some(image) = image {
            images::check_shape(image)?;
            if let Self::Cnn(shape) = self
                && (shape.channels.len() >= 32
                    || image[1].min(image[2]) >> shape.channels.len() == 0)
            {
                return Err("the network's images are too small for its blocks".to_owned());
            }
        }
        let parameters = self.parameters();
        if parameters > MAX_PARAMETERS {
            return Err(format!(
                "the network has {parameters} parameters, more than {MAX_PARAMETERS}"
            ));
        }
        Ok(())
    }

    /// Numbers that training finds.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        match self {
            Self::Mlp(shape) => shape.parameters(),
            Self::Cnn(shape) => shape.parameters(),
        }
    }

    /// The network with its first weights, on the device.
    #[must_use]
    pub fn init(&self, seed: u64, device: &Device) -> Network {
        let mut first = FirstWeights::new(seed, device.clone());
        match self {
            Self::Mlp(shape) => Network::Mlp(shape.init(&mut first)),
            Self::Cnn(shape) => Network::Cnn(shape.init(&mut first)),
        }
    }

    /// The network with the weights of a record that [`Network::to_bytes`] made.
    ///
    /// # Errors
    /// If the record is damaged or of another shape.
    pub fn load(&self, record: Vec<u8>, device: &Device) -> Result<Network, TrainError> {
        let record = burn::store::ModuleRecord::from_bytes(Bytes::from_bytes_vec(record))
            .map_err(|e| TrainError::Model(e.to_string()))?;
        self.init(0, device)
            .try_load_record(record)
            .map_err(|e| TrainError::Model(e.to_string()))
    }
}

/// A network of either family.
#[derive(Module, Debug)]
pub enum Network {
    /// A multi-layer perceptron.
    Mlp(Mlp),
    /// A convolutional network.
    Cnn(Cnn),
}

impl Network {
    /// One row of outputs for each row of inputs: logits of the classes, or the value.
    ///
    /// `dropout`: in training, where its masks come from; in prediction, none.
    #[must_use]
    pub fn forward(&self, inputs: Tensor<2>, dropout: Option<&mut Random>) -> Tensor<2> {
        match self {
            Self::Mlp(net) => net.forward(inputs, dropout),
            Self::Cnn(net) => net.forward(inputs, dropout),
        }
    }

    /// Whether every weight is a finite number.
    ///
    /// # Errors
    /// If the backend cannot hand them out.
    pub fn is_finite(&self) -> Result<bool, TrainError> {
        Ok(self.weights()?.finite)
    }

    /// What is wrong with weights that came from outside: a record may have any numbers of any type.
    ///
    /// # Errors
    /// If the backend cannot hand them out.
    pub fn wrong_weights(&self) -> Result<Option<String>, TrainError> {
        let weights = self.weights()?;
        let wrong_type = weights
            .other_type
            .map(|found| format!("a weight of the type {found:?}, not F32"));
        let not_finite = (!weights.finite).then(|| "a weight that is no finite number".to_owned());
        Ok(wrong_type.or(not_finite))
    }

    fn weights(&self) -> Result<Weights, TrainError> {
        let mut weights = Weights {
            finite: true,
            other_type: None,
            failed: None,
        };
        self.visit(&mut weights);
        match weights.failed.take() {
            Some(e) => Err(e),
            None => Ok(weights),
        }
    }

    /// The weights as burn's record (burnpack): a pure function of their values.
    ///
    /// # Errors
    /// If the backend cannot hand them out.
    pub fn to_bytes(&self) -> Result<Vec<u8>, TrainError> {
        // `valid` first brings the running state of batch normalisation up to date.
        let bytes = self
            .valid()
            .into_record()
            .into_bytes()
            .map_err(TrainError::backend)?;
        Ok(bytes.to_vec())
    }
}

/// What can be said of all weights.
struct Weights {
    finite: bool,
    /// The type of one that is not of 32 bits.
    other_type: Option<DType>,
    failed: Option<TrainError>,
}

impl ModuleVisitor for Weights {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        match param.val().try_into_data() {
            Ok(data) => {
                if data.dtype() != DType::F32 {
                    self.other_type = Some(data.dtype());
                }
                self.finite &= data.iter::<f32>().all(f32::is_finite);
            }
            Err(e) => self.failed = Some(TrainError::backend(e)),
        }
    }
}

/// Parameters of a linear layer.
pub(crate) const fn linear_parameters(inputs: usize, outputs: usize) -> u64 {
    (inputs as u64 + 1).saturating_mul(outputs as u64)
}

/// Makes layers with their first weights, parameter after parameter.
pub(crate) struct FirstWeights {
    random: Random,
    next_id: u64,
    device: Device,
}

impl FirstWeights {
    const fn new(seed: u64, device: Device) -> Self {
        Self {
            random: Random::new(seed, Purpose::Weights, 0, 0),
            next_id: 1,
            device,
        }
    }

    fn id(&mut self) -> ParamId {
        let id = ParamId::from(self.next_id);
        self.next_id += 1;
        id
    }

    fn param<const D: usize>(&mut self, values: Vec<f32>, shape: [usize; D]) -> Param<Tensor<D>> {
        let tensor = Tensor::from_data(TensorData::new(values, shape), &self.device);
        // A plain device is for prediction: nothing there asks for a gradient.
        let tensor = if self.device.is_autodiff() {
            tensor.require_grad()
        } else {
            tensor
        };
        Param::initialized(self.id(), tensor)
    }

    #[allow(clippy::cast_precision_loss, reason = "a width is far below 2^24")]
    fn uniform<const D: usize>(&mut self, shape: [usize; D], bound: f32) -> Param<Tensor<D>> {
        let values = (0..shape.iter().product::<usize>())
            .map(|_| (self.random.unit() * 2.0 - 1.0) * bound)
            .collect();
        self.param(values, shape)
    }

    /// Uniform within ±√(6 / inputs) for a layer that a rectifier follows (He et al., "Delving deep
    /// into rectifiers", 2015), within ±√(3 / inputs) for the last one; biases start at zero.
    #[allow(clippy::cast_precision_loss, reason = "a width is far below 2^24")]
    pub(crate) fn linear(&mut self, inputs: usize, outputs: usize, last: bool) -> Linear {
        let bound = (if last { 3.0 } else { 6.0 } / inputs.max(1) as f32).sqrt();
        Linear {
            weight: self.uniform([inputs, outputs], bound),
            bias: Some(self.param(vec![0.0; outputs], [outputs])),
        }
    }

    /// The kernel of a 3×3 convolution, `[out, in, 3, 3]`, as for a rectified layer.
    #[allow(clippy::cast_precision_loss, reason = "a width is far below 2^24")]
    pub(crate) fn kernel(&mut self, inputs: usize, outputs: usize) -> Param<Tensor<4>> {
        let bound = (6.0 / (9 * inputs.max(1)) as f32).sqrt();
        self.uniform([outputs, inputs, 3, 3], bound)
    }

    /// Batch normalisation that changes nothing yet.
    pub(crate) fn batch_norm(&mut self, features: usize) -> BatchNorm {
        let mut norm = BatchNormConfig::new(features).init(&self.device);
        norm.gamma = self.param(vec![1.0; features], [features]);
        norm.beta = self.param(vec![0.0; features], [features]);
        norm.running_mean =
            RunningState::with_id(self.id(), Tensor::zeros([features], &self.device));
        norm.running_var = RunningState::with_id(self.id(), Tensor::ones([features], &self.device));
        norm
    }
}

/// Sets a share of the numbers to zero and scales the others up, so that their mean stays.
#[allow(clippy::cast_possible_truncation, reason = "a share")]
pub(crate) fn drop_out(x: Tensor<2>, share: f64, random: Option<&mut Random>) -> Tensor<2> {
    let Some(random) = random else { return x };
    if share <= 0.0 {
        return x;
    }
    let shape = x.dims();
    let share = share as f32;
    let keep = 1.0 / (1.0 - share);
    let mask: Vec<f32> = (0..shape[0] * shape[1])
        .map(|_| if random.unit() < share { 0.0 } else { keep })
        .collect();
    let device = x.device();
    x * Tensor::from_data(TensorData::new(mask, shape), &device)
}
