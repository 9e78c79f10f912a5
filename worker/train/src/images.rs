//! Images: from bytes or pixel columns to numbers, channel after channel, and their random shifts.

use emberline_common::spec::kinds::train::ImageSpec;

use crate::error::TrainError;

/// Channels, height and width of the spec's images.
///
/// # Errors
/// If a size is 0, an image would have more than 2^24 numbers, or `max_value` is not positive.
pub fn image_shape(spec: &ImageSpec) -> Result<[usize; 3], TrainError> {
    let shape = [spec.channels, spec.height, spec.width].map(|n| n as usize);
    if check_shape(shape).is_err() {
        return Err(TrainError::Spec(format!(
            "`model.image` has {}×{} pixels of {} channels: each must be at least 1, and the image at most 16,777,216 numbers",
            spec.height, spec.width, spec.channels
        )));
    }
    if !(spec.max_value.is_finite() && spec.max_value > 0.0) {
        return Err(TrainError::Spec(format!(
            "`model.image.max_value` is {}: it must be above 0",
            spec.max_value
        )));
    }
    Ok(shape)
}

/// Checks channels, height and width that were read from somewhere.
///
/// # Errors
/// What is wrong, in one line.
pub fn check_shape(shape: [usize; 3]) -> Result<(), String> {
    let numbers = shape.iter().try_fold(1_usize, |all, n| all.checked_mul(*n));
    match numbers {
        Some(numbers) if (1..=1 << 24).contains(&numbers) => Ok(()),
        _ => Err(format!("an image has the shape {shape:?}")),
    }
}

/// Appends an image whose numbers come row by row with channels last, as channel after channel,
/// divided by `max_value`.
pub fn append_image(
    pixels: impl ExactSizeIterator<Item = f64>,
    [channels, height, width]: [usize; 3],
    max_value: f64,
    out: &mut Vec<f32>,
) {
    let start = out.len();
    let plane = height * width;
    out.resize(start + channels * plane, 0.0);
    for (i, value) in pixels.enumerate().take(channels * plane) {
        let (pixel, channel) = (i / channels, i % channels);
        out[start + channel * plane + pixel] = (value / max_value) as f32;
    }
}

/// Appends an image moved down and right by so many pixels; what comes in from outside is dark.
pub fn shift_image(
    image: &[f32],
    [channels, height, width]: [usize; 3],
    down: isize,
    right: isize,
    out: &mut Vec<f32>,
) {
    let start = out.len();
    out.resize(start + image.len(), 0.0);
    let moved = &mut out[start..];
    let span = |size: usize, by: isize| {
        let from = by.max(0).unsigned_abs().min(size);
        let until = size.saturating_sub((-by).max(0).unsigned_abs()).max(from);
        from..until
    };
    let columns = span(width, right);
    for channel in 0..channels {
        for y in span(height, down) {
            let source_y = y.wrapping_add_signed(-down);
            let target = (channel * height + y) * width;
            let source = (channel * height + source_y) * width;
            let from = source + columns.start.wrapping_add_signed(-right);
            moved[target + columns.start..target + columns.end]
                .copy_from_slice(&image[from..from + columns.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_last_becomes_channels_first() {
        let mut out = Vec::new();
        let bytes = [10.0, 20.0, 30.0, 40.0];
        append_image(bytes.into_iter(), [2, 1, 2], 10.0, &mut out);
        assert_eq!(out, [1.0, 3.0, 2.0, 4.0]);
    }

    #[test]
    fn a_shift_moves_every_pixel_and_lets_dark_ones_in() {
        let image: Vec<f32> = (1..=6).map(|v| v as f32).collect();
        let moved = |down, right| {
            let mut out = Vec::new();
            shift_image(&image, [1, 2, 3], down, right, &mut out);
            out
        };
        assert_eq!(moved(0, 0), image);
        assert_eq!(moved(1, 0), [0.0, 0.0, 0.0, 1.0, 2.0, 3.0]);
        assert_eq!(moved(0, -1), [2.0, 3.0, 0.0, 5.0, 6.0, 0.0]);
        assert_eq!(moved(-1, 2), [0.0, 0.0, 4.0, 0.0, 0.0, 0.0]);
        assert_eq!(moved(5, 5), [0.0; 6]);
        assert_eq!(moved(-5, -5), [0.0; 6]);
    }
}
