//! Weights that are none: other formats, other types, and numbers that are not finite. All digests
//! are right, as somebody would make them who wants his file to be loaded.

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Tensor},
};
use safetensors::{Dtype, tensor::TensorView};

use super::*;
use crate::network::Network;

/// An archive with these weights, in both forms.
fn with_weights(weights: Vec<u8>, tensors: Vec<u8>) -> Vec<u8> {
    let mut files = files(&bundle());
    let mut document: Value = serde_json::from_slice(&files[0]).unwrap();
    document["weights_sha256"] = json!(Digest::of(&weights));
    files[0] = serde_json::to_vec(&document).unwrap();
    (files[1], files[2]) = (weights, tensors);
    archive(files, |_| {})
}

fn network() -> Network {
    mlp().init(1, &Compute::cpu().device)
}

/// Changes one parameter after the other.
struct Change<F> {
    at: usize,
    seen: usize,
    change: F,
}

/// A change of a tensor, whatever its rank.
trait OfTensor {
    fn of<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D>;
}

impl<F: OfTensor> ModuleMapper for Change<F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.seen += 1;
        match self.seen == self.at + 1 {
            true => param.map(|tensor| self.change.of(tensor)),
            false => param,
        }
    }
}

/// The weights with one parameter changed; none when there are no more.
fn changed(at: usize, change: impl OfTensor) -> Option<Network> {
    let mut mapper = Change {
        at,
        seen: 0,
        change,
    };
    let network = network().map(&mut mapper);
    (at < mapper.seen).then_some(network)
}

#[test]
fn a_parameter_that_is_no_finite_number_is_refused_wherever_it_is() {
    struct Becomes(f32);
    impl OfTensor for Becomes {
        fn of<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
            tensor * self.0
        }
    }
    let mut parameters = 0;
    for bad in [f32::NAN, f32::INFINITY] {
        // Zero times infinity is none as well.
        for at in 0.. {
            let Some(network) = changed(at, Becomes(bad)) else {
                parameters = at;
                break;
            };
            let weights = network.to_bytes().unwrap();
            let tensors = tensors::write(&network).unwrap();
            refused(
                &with_weights(weights, tensors),
                "`weights.bpk` has a weight that is no finite number",
            );
        }
    }
    assert_eq!(parameters, 14, "the means and variances are among them");
}

#[test]
fn parameters_of_another_type_are_refused() {
    struct Cast(DType);
    impl OfTensor for Cast {
        fn of<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
            tensor.cast(self.0)
        }
    }
    for to in [DType::F64, DType::F16, DType::BF16] {
        let network = changed(0, Cast(to)).unwrap();
        let tensors = tensors::write(&network).unwrap();
        refused(
            &with_weights(network.to_bytes().unwrap(), tensors),
            &format!("`weights.bpk` has a weight of the type {to:?}, not F32"),
        );
    }
}

#[test]
fn a_pickle_or_an_archive_is_no_model() {
    let right = tensors::write(&network()).unwrap();
    let pickle = b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.";
    let zip = b"PK\x03\x04\x14\x00\x00\x00\x00\x00model/data.pkl";
    for begin in [
        &pickle[..],
        zip,
        b"",
        b"\x93NUMPY\x01\x00",
        b"GGUF\x03\x00\x00\x00",
    ] {
        // Long enough for the network, so that it is looked into.
        let mut weights = begin.to_vec();
        weights.resize(4096, b'.');
        refused(
            &with_weights(weights.clone(), right.clone()),
            "the model cannot be loaded: ",
        );
        let own = files(&bundle())[1].clone();
        refused(&with_weights(own, weights), "`weights.safetensors`: ");
    }
}

/// A file of safetensors with this header, and so many bytes behind it.
fn tensors_file(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.resize(out.len() + data, 0);
    out
}

#[test]
fn tensors_that_lie_about_themselves_are_refused() {
    let own = files(&bundle())[1].clone();
    let with = |tensors: Vec<u8>| with_weights(own.clone(), tensors);
    let mut endless = tensors_file("{}", 64);
    for length in [1_u64 << 63, u64::MAX, (1 << 32) + 1, 67] {
        endless[..8].copy_from_slice(&length.to_le_bytes());
        refused(&with(endless.clone()), "`weights.safetensors`: ");
    }
    let at = |from: u64, to: u64| json!({"dtype": "F32", "shape": [4], "data_offsets": [from, to]});
    let file = |entries: &[(&str, Value)], data| {
        let header: Map<_, _> = entries
            .iter()
            .map(|(name, entry)| ((*name).to_owned(), entry.clone()))
            .collect();
        tensors_file(&Value::Object(header).to_string(), data)
    };
    let bias = "hidden.0.bias";
    for tensors in [
        // Overlapping, with a gap, out of range, turned around, too far for a number.
        file(&[(bias, at(0, 16)), ("x", at(8, 24))], 24),
        file(&[(bias, at(0, 16)), ("x", at(0, 16))], 16),
        file(&[(bias, at(0, 16)), ("x", at(20, 36))], 36),
        file(&[(bias, at(0, 16))], 8),
        file(&[(bias, at(1 << 40, (1 << 40) + 16))], 16),
        file(&[(bias, at(16, 0))], 16),
        file(&[(bias, at(u64::MAX - 15, u64::MAX))], 16),
        // A shape that is larger than its bytes, and one that is larger than any number.
        file(
            &[(
                bias,
                json!({"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}),
            )],
            16,
        ),
        file(
            &[(
                bias,
                json!({"dtype": "F32", "shape": [u64::MAX, 4], "data_offsets": [0, 16]}),
            )],
            16,
        ),
        // A type that there is not, and no header at all.
        file(
            &[(
                bias,
                json!({"dtype": "PY", "shape": [4], "data_offsets": [0, 16]}),
            )],
            16,
        ),
        tensors_file("[]", 16),
        tensors_file("\u{feff}{}", 16),
        tensors_file(&"[".repeat(10_000), 0),
    ] {
        refused(&with(tensors), "`weights.safetensors`: ");
    }
}

#[test]
fn the_same_numbers_as_another_type_or_shape_are_other_tensors() {
    let whole = files(&bundle());
    let right = SafeTensors::deserialize(&whole[2]).unwrap();
    let name = "hidden.0.weight";
    for (dtype, shape) in [
        (Dtype::I32, vec![3, 4]),
        (Dtype::F32, vec![4, 3]),
        (Dtype::F64, vec![3, 2]),
        (Dtype::U8, vec![48]),
    ] {
        let forged = right.tensors().into_iter().map(|(n, tensor)| {
            let data = tensor.data();
            let forged = match n == name {
                true => TensorView::new(dtype, shape.clone(), data).unwrap(),
                false => TensorView::new(tensor.dtype(), tensor.shape().to_vec(), data).unwrap(),
            };
            (n, forged)
        });
        let forged = safetensors::serialize(forged, None).unwrap();
        refused(
            &with_weights(whole[1].clone(), forged),
            "`weights.safetensors`: `hidden.0.weight` is another one than in `weights.bpk`",
        );
    }
}
