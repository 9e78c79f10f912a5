//! The weights once more, as safetensors: for programs that do not know burn.
//!
//! Names are the fields of the network's layers, joined by `.`, e.g. `hidden.0.weight`; numbers are
//! 32 bit floats, little endian, the last axis running fastest.

use std::borrow::Cow;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::Tensor,
};
use safetensors::{Dtype, SafeTensors, tensor::View};

use super::BundleError;
use crate::{error::TrainError, network::Network};

/// One tensor of a network.
struct Weights {
    name: String,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for &Weights {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Collects tensors with the names of the fields that lead to them.
#[derive(Default)]
struct Collector {
    path: Vec<String>,
    found: Vec<Weights>,
    failed: Option<TrainError>,
}

impl ModuleVisitor for Collector {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        match param.val().try_into_data() {
            Ok(data) => self.found.push(Weights {
                name: self.path.join("."),
                shape: data.shape().to_vec(),
                bytes: data.iter::<f32>().flat_map(f32::to_le_bytes).collect(),
            }),
            Err(e) => self.failed = Some(TrainError::backend(e)),
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

fn weights(network: &Network) -> Result<Vec<Weights>, TrainError> {
    let mut collector = Collector::default();
    // The family is no part of the names.
    match network {
        Network::Mlp(network) => network.visit(&mut collector),
        Network::Cnn(network) => network.visit(&mut collector),
    }
    match collector.failed {
        Some(e) => Err(e),
        None => Ok(collector.found),
    }
}

/// The weights as a file.
pub fn write(network: &Network) -> Result<Vec<u8>, BundleError> {
    let weights = weights(network)?;
    let named = weights.iter().map(|tensor| (tensor.name.as_str(), tensor));
    safetensors::serialize(named, None)
        .map_err(|e| TrainError::Model(format!("as safetensors: {e}")).into())
}

/// Checks that a file has the network's weights, bit for bit, and nothing else.
pub fn check(file: &[u8], network: &Network) -> Result<(), BundleError> {
    let wrong = |why: String| BundleError::Damaged(format!("`{}`: {why}", super::TENSORS_FILE));
    let read = SafeTensors::deserialize(file).map_err(|e| wrong(e.to_string()))?;
    let weights = weights(network)?;
    for tensor in &weights {
        let name = &tensor.name;
        let there = read.tensor(name);
        let there = there.map_err(|_| wrong(format!("it has no tensor `{name}`")))?;
        let same = (there.dtype(), there.shape(), there.data())
            == (Dtype::F32, tensor.shape.as_slice(), tensor.bytes.as_slice());
        if !same {
            let file = emberline_worker::documents::WEIGHTS_FILE;
            return Err(wrong(format!("`{name}` is another one than in `{file}`")));
        }
    }
    if read.len() != weights.len() {
        return Err(wrong(
            "it has tensors that the network does not have".to_owned(),
        ));
    }
    Ok(())
}
