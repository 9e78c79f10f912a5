//! Which rows go into which step, and their numbers as tensors. The order is a pure function of
//! (seed, epoch).

use burn::tensor::{Device, Tensor, TensorData};

use crate::{
    images::shift_image,
    matrix::{Examples, Matrix, Targets},
    random::{Purpose, Random},
};

/// The rows of an epoch in their order.
#[must_use]
pub fn order(rows: usize, seed: u64, epoch: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..u32::try_from(rows).unwrap_or(u32::MAX)).collect();
    Random::new(seed, Purpose::Order, u64::from(epoch), 0).shuffle(&mut order);
    order
}

/// Random shifts of training images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shift {
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// Pixels each way.
    pub pixels: usize,
}

/// The inputs and weighted targets of one step.
#[derive(Debug)]
pub struct Batch {
    /// `[rows, inputs]`.
    pub inputs: Tensor<2>,
    /// `[rows, outputs]`: for classes, the weight of the row in the column of its class and 0
    /// elsewhere; for values, the value.
    pub targets: Tensor<2>,
    /// The sum of the rows' weights.
    pub weight: f64,
}

/// The tensors of one step. `weights`: how much each class counts.
#[must_use]
pub fn batch(
    examples: &Examples,
    rows: &[u32],
    weights: &[f32],
    shift: Option<(Shift, &mut Random)>,
    device: &Device,
) -> Batch {
    let cols = examples.inputs.cols;
    let mut inputs = Vec::with_capacity(rows.len() * cols);
    match shift {
        Some((shift, random)) => {
            for row in rows {
                let reach = 2 * shift.pixels + 1;
                let down = random.below(reach) as isize - shift.pixels as isize;
                let right = random.below(reach) as isize - shift.pixels as isize;
                let pixels = examples.inputs.row(*row as usize);
                shift_image(pixels, shift.image, down, right, &mut inputs);
            }
        }
        None => {
            for row in rows {
                inputs.extend_from_slice(examples.inputs.row(*row as usize));
            }
        }
    }
    let (targets, width, weight) = targets(&examples.targets, rows, weights);
    Batch {
        inputs: Tensor::from_data(TensorData::new(inputs, [rows.len(), cols]), device),
        targets: Tensor::from_data(TensorData::new(targets, [rows.len(), width]), device),
        weight,
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "rows of a batch are far below 2^52"
)]
fn targets(targets: &Targets, rows: &[u32], weights: &[f32]) -> (Vec<f32>, usize, f64) {
    match targets {
        Targets::Classes { index, count } => {
            let mut out = vec![0.0; rows.len() * count];
            let mut sum = 0.0;
            for (i, row) in rows.iter().enumerate() {
                let class = index[*row as usize] as usize;
                let weight = weights.get(class).copied().unwrap_or(1.0);
                out[i * count + class] = weight;
                sum += f64::from(weight);
            }
            (out, *count, sum)
        }
        Targets::Values(values) => {
            let out = rows.iter().map(|row| values[*row as usize]).collect();
            (out, 1, rows.len() as f64)
        }
    }
}

/// The rows from `start`, as many as `count`, as inputs for prediction.
#[must_use]
pub fn window(inputs: &Matrix, start: usize, count: usize, device: &Device) -> Tensor<2> {
    let end = (start + count).min(inputs.rows);
    let data = inputs.data[start * inputs.cols..end * inputs.cols].to_vec();
    Tensor::from_data(TensorData::new(data, [end - start, inputs.cols]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_epoch_has_every_row_once_in_an_order_of_its_own() {
        let (first, second) = (order(100, 1, 0), order(100, 1, 1));
        assert_ne!(first, second);
        assert_ne!(first, order(100, 2, 0));
        for mut epoch in [first, second] {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..100).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_class_weight_stands_in_the_column_of_the_class() {
        let classes = Targets::Classes {
            index: vec![1, 0, 1],
            count: 2,
        };
        let (out, width, sum) = targets(&classes, &[0, 1], &[1.0, 3.0]);
        assert_eq!((out, width), (vec![0.0, 3.0, 1.0, 0.0], 2));
        assert!((sum - 4.0).abs() < 1e-12);
    }
}
