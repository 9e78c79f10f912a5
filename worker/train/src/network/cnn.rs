//! The convolutional network for images.

use burn::{
    module::{Module, Param},
    nn::{BatchNorm, Linear},
    tensor::{
        Tensor,
        activation::relu,
        module::{conv2d, max_pool2d},
        ops::{ConvOptions, MaxPoolOptions},
    },
};

use serde::{Deserialize, Serialize};

use super::{FirstWeights, drop_out, linear_parameters};
use crate::random::Random;

/// Blocks of two convolutions and a pooling, then one hidden layer and a linear one.
#[derive(Module, Debug)]
pub struct Cnn {
    blocks: Vec<Block>,
    hidden: Linear,
    output: Linear,
    #[module(skip)]
    image: [usize; 3],
    #[module(skip)]
    dropout: f64,
}

/// Two 3×3 convolutions, each with batch normalisation and a rectifier, then 2×2 pooling.
#[derive(Module, Debug)]
pub struct Block {
    // No biases: batch normalisation would take them away again.
    first: Param<Tensor<4>>,
    first_norm: BatchNorm,
    second: Param<Tensor<4>>,
    second_norm: BatchNorm,
}

impl Block {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let convolve = |x: Tensor<4>, kernel: &Param<Tensor<4>>| {
            conv2d(
                x,
                kernel.val(),
                None,
                ConvOptions::new([1, 1], [1, 1], [1, 1], 1),
            )
        };
        let x = relu(self.first_norm.forward(convolve(x, &self.first)));
        let x = relu(self.second_norm.forward(convolve(x, &self.second)));
        max_pool2d(x, MaxPoolOptions::new([2, 2]))
    }
}

/// The shape of a convolutional network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CnnShape {
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// The channels of each block.
    pub channels: Vec<usize>,
    /// The width of the hidden layer.
    pub hidden: usize,
    /// Numbers it gives an image.
    pub outputs: usize,
    /// Share of the hidden layer's outputs set to zero in training.
    pub dropout: f64,
}

impl CnnShape {
    /// Numbers that the last block gives an image.
    fn flat(&self) -> usize {
        let [channels, height, width] = self.image;
        let halves = self.channels.len();
        self.channels.last().copied().unwrap_or(channels) * (height >> halves) * (width >> halves)
    }

    pub(super) fn parameters(&self) -> u64 {
        let convolution = |i: usize, o: usize| (9 * i as u64 + 2).saturating_mul(o as u64);
        let mut total = 0u64;
        let mut last = self.image[0];
        for width in &self.channels {
            total = total
                .saturating_add(convolution(last, *width))
                .saturating_add(convolution(*width, *width));
            last = *width;
        }
        total
            .saturating_add(linear_parameters(self.flat(), self.hidden))
            .saturating_add(linear_parameters(self.hidden, self.outputs))
    }

    pub(super) fn init(&self, first: &mut FirstWeights) -> Cnn {
        let mut blocks = Vec::with_capacity(self.channels.len());
        let mut last = self.image[0];
        for width in &self.channels {
            blocks.push(Block {
                first: first.kernel(last, *width),
                first_norm: first.batch_norm(*width),
                second: first.kernel(*width, *width),
                second_norm: first.batch_norm(*width),
            });
            last = *width;
        }
        Cnn {
            blocks,
            hidden: first.linear(self.flat(), self.hidden, false),
            output: first.linear(self.hidden, self.outputs, true),
            image: self.image,
            dropout: self.dropout,
        }
    }
}

impl Cnn {
    pub(super) fn forward(&self, x: Tensor<2>, dropout: Option<&mut Random>) -> Tensor<2> {
        let [rows, _] = x.dims();
        let [channels, height, width] = self.image;
        let mut x: Tensor<4> = x.reshape([rows, channels, height, width]);
        for block in &self.blocks {
            x = block.forward(x);
        }
        let x = relu(self.hidden.forward(x.flatten::<2>(1, 3)));
        let x = drop_out(x, self.dropout, dropout);
        self.output.forward(x)
    }
}
