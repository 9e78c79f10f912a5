//! The multi-layer perceptron for tables.

use burn::{
    module::Module,
    nn::{BatchNorm, Linear},
    tensor::{
        Tensor,
        activation::{gelu, relu, tanh},
    },
};
use emberline_common::spec::kinds::train::Activation;

use serde::{Deserialize, Serialize};

use super::{FirstWeights, drop_out, linear_parameters};
use crate::random::Random;

/// Hidden layers, each with activation and dropout, then a linear one.
#[derive(Module, Debug)]
pub struct Mlp {
    hidden: Vec<Linear>,
    norms: Vec<BatchNorm>,
    output: Linear,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    dropout: f64,
}

/// The shape of a multi-layer perceptron.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MlpShape {
    /// Numbers a row.
    pub inputs: usize,
    /// The width of each hidden layer.
    pub hidden: Vec<usize>,
    /// Numbers it gives a row.
    pub outputs: usize,
    /// What follows each hidden layer.
    pub activation: Activation,
    /// Share of a hidden layer's outputs set to zero in training.
    pub dropout: f64,
    /// Whether each hidden layer is normalised over the batch.
    pub batch_norm: bool,
}

impl MlpShape {
    pub(super) fn parameters(&self) -> u64 {
        let mut total = 0u64;
        let mut last = self.inputs;
        for width in &self.hidden {
            let norm = if self.batch_norm {
                2 * *width as u64
            } else {
                0
            };
            total = total
                .saturating_add(linear_parameters(last, *width))
                .saturating_add(norm);
            last = *width;
        }
        total.saturating_add(linear_parameters(last, self.outputs))
    }

    pub(super) fn init(&self, first: &mut FirstWeights) -> Mlp {
        let mut hidden = Vec::with_capacity(self.hidden.len());
        let mut norms = Vec::new();
        let mut last = self.inputs;
        for width in &self.hidden {
            hidden.push(first.linear(last, *width, false));
            if self.batch_norm {
                norms.push(first.batch_norm(*width));
            }
            last = *width;
        }
        Mlp {
            hidden,
            norms,
            output: first.linear(last, self.outputs, true),
            activation: self.activation,
            dropout: self.dropout,
        }
    }
}

impl Mlp {
    pub(super) fn forward(&self, mut x: Tensor<2>, mut dropout: Option<&mut Random>) -> Tensor<2> {
        for (i, layer) in self.hidden.iter().enumerate() {
            x = layer.forward(x);
            if let Some(norm) = self.norms.get(i) {
                x = norm.forward(x);
            }
            x = match self.activation {
                Activation::Relu => relu(x),
                Activation::Gelu => gelu(x),
                Activation::Tanh => tanh(x),
            };
            x = drop_out(x, self.dropout, dropout.as_deref_mut());
        }
        self.output.forward(x)
    }
}
