//! The optimizer of a spec, with gradients clipped by their norm over all parameters.

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::{
        AdamConfig, AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig,
        decay::WeightDecayConfig, momentum::MomentumConfig,
    },
    tensor::Tensor,
};
use emberline_common::spec::kinds::train::{OptimizerSpec, OptimizerType};

use crate::{error::TrainError, network::Network};

/// What keeps a division by a small second moment finite (Kingma and Ba, "Adam", 2015).
const EPSILON: f32 = 1e-8;

/// Builds the optimizer.
///
/// # Errors
/// If a number is negative or not finite.
#[allow(
    clippy::cast_possible_truncation,
    reason = "settings are of single precision"
)]
pub fn build(spec: &OptimizerSpec) -> Result<ModuleOptimizer, TrainError> {
    for (name, value) in [
        ("learning_rate", spec.learning_rate),
        ("weight_decay", spec.weight_decay),
        ("momentum", spec.momentum),
        ("clip_norm", spec.clip_norm.unwrap_or(1.0)),
    ] {
        if !value.is_finite() || value < 0.0 {
            return Err(TrainError::Spec(format!(
                "`optimizer.{name}` is {value}: it must be a finite number, 0 or more"
            )));
        }
    }
    let decay = (spec.weight_decay > 0.0).then(|| WeightDecayConfig::new(spec.weight_decay as f32));
    Ok(match spec.optimizer_type {
        OptimizerType::Adam => AdamConfig::new()
            .with_epsilon(EPSILON)
            .with_weight_decay(decay)
            .init(),
        OptimizerType::AdamW => AdamWConfig::new()
            .with_epsilon(EPSILON)
            .with_weight_decay(spec.weight_decay as f32)
            .init(),
        OptimizerType::Sgd => {
            let momentum = (spec.momentum > 0.0).then(|| {
                MomentumConfig::new()
                    .with_momentum(spec.momentum)
                    .with_dampening(0.0)
            });
            SgdConfig::new()
                .with_weight_decay(decay)
                .with_momentum(momentum)
                .init()
        }
    })
}

/// Scales all gradients down together so that their norm is at most `limit` (Pascanu, Mikolov,
/// Bengio: "On the difficulty of training recurrent neural networks", 2013).
///
/// # Errors
/// If the backend fails.
pub fn clip_by_norm(
    network: &Network,
    mut grads: GradientsParams,
    limit: f64,
) -> Result<GradientsParams, TrainError> {
    let mut squares = Squares {
        grads: &grads,
        sum: Ok(0.0),
    };
    network.visit(&mut squares);
    let norm = squares.sum?.sqrt();
    if norm > limit {
        network.visit(&mut Scale {
            grads: &mut grads,
            factor: limit / norm,
        });
    }
    Ok(grads)
}

struct Squares<'a> {
    grads: &'a GradientsParams,
    sum: Result<f64, TrainError>,
}

impl ModuleVisitor for Squares<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(grad) = self.grads.get::<D>(param.id) else {
            return;
        };
        let Ok(sum) = &mut self.sum else { return };
        match grad.square().sum().try_into_scalar::<f32>() {
            Ok(part) => *sum += f64::from(part),
            Err(e) => self.sum = Err(TrainError::backend(e)),
        }
    }
}

struct Scale<'a> {
    grads: &'a mut GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            self.grads.register(param.id, grad.mul_scalar(self.factor));
        }
    }
}
