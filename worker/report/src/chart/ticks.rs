//! Scales with round ticks: 1, 2 or 5 times a power of ten.

use crate::format;

/// Values beyond this are drawn at the edge: differences of larger ones would not be numbers.
const LIMIT: f64 = 1e150;
/// Values closer together than this part of their size are one value.
const SAME: f64 = 1e-11;
/// No scale has more ticks, whatever is asked for.
const MAX_TICKS: usize = 24;

/// A range of values with round ticks in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Scale {
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
    /// In rising order, all within the range.
    pub ticks: Vec<f64>,
    decimals: Option<usize>,
}

impl Scale {
    /// Over all finite values, widened to round ends, with about `wanted` ticks.
    pub fn of(values: impl IntoIterator<Item = f64>, wanted: usize) -> Self {
        let (low, high) = range(values);
        let step = step(low, high, wanted);
        let (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        Self::with_step(low, high, step)
    }

    /// Over all finite values and no further.
    pub fn exactly(values: impl IntoIterator<Item = f64>, wanted: usize) -> Self {
        let (low, high) = range(values);
        Self::with_step(low, high, step(low, high, wanted))
    }

    /// Like [`exactly`](Self::exactly), for whole numbers: no ticks between them.
    pub fn whole(values: impl IntoIterator<Item = f64>, wanted: usize) -> Self {
        let (low, high) = range(values);
        Self::with_step(low, high, step(low, high, wanted).max(1.0))
    }

    fn with_step(low: f64, high: f64, step: f64) -> Self {
        // A little more than the range, since the ends are sums of rounded numbers.
        let slack = 1e-6;
        let first = (low / step - slack).ceil();
        let last = (high / step + slack).floor();
        let count = (last - first + 1.0).clamp(0.0, MAX_TICKS as f64) as usize;
        let ticks = (0..count)
            .map(|i| ((first + i as f64) * step).clamp(low, high))
            .collect();
        let exponent = step.log10().floor();
        let plain = (-5.0..7.0).contains(&exponent) && low.abs().max(high.abs()) < 1e7;
        Self {
            low,
            high,
            ticks,
            decimals: plain.then_some((-exponent).max(0.0) as usize),
        }
    }

    /// Where a value lies, from 0 to 1; what lies outside is at the edge.
    pub fn share(&self, value: f64) -> f64 {
        let share = (value.clamp(-LIMIT, LIMIT) - self.low) / (self.high - self.low);
        if share.is_nan() {
            0.0
        } else {
            share.clamp(0.0, 1.0)
        }
    }

    /// A tick as text, with the digits that tell it from its neighbours.
    pub fn label(&self, tick: f64) -> String {
        match self.decimals {
            Some(0) => format::number(tick.round()),
            Some(decimals) => {
                let text = format!("{tick:.decimals$}");
                // Not `-0.0`.
                if text.trim_start_matches(['-', '0', '.']).is_empty() {
                    "0".to_owned()
                } else {
                    text
                }
            }
            None => format::number(tick),
        }
    }
}

/// The range of the finite values, never empty.
fn range(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let finite = values.into_iter().filter(|v| v.is_finite());
    let (low, high) = finite
        .map(|v| v.clamp(-LIMIT, LIMIT))
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
            (low.min(v), high.max(v))
        });
    if low > high {
        return (0.0, 1.0);
    }
    let size = low.abs().max(high.abs());
    if high - low > size * SAME && high - low > f64::MIN_POSITIVE * 1e6 {
        return (low, high);
    }
    // One value: some room around it.
    let room = if size < 1e-200 { 1.0 } else { size * 0.1 };
    (low - room, high + room)
}

fn step(low: f64, high: f64, wanted: usize) -> f64 {
    let rough = (high - low) / wanted.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    steps
        .into_iter()
        .find(|step| *step >= rough * (1.0 - 1e-9))
        .unwrap_or(rough)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ticks_are_round_numbers_around_the_values() {
        let scale = Scale::of([0.03, 0.97], 5);
        assert_eq!((scale.low, scale.high), (0.0, 1.0));
        let labels: Vec<String> = scale.ticks.iter().map(|t| scale.label(*t)).collect();
        assert_eq!(labels, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
    }

    #[test]
    fn epochs_have_no_ticks_between_them() {
        assert_eq!(Scale::whole([1.0, 3.0], 6).ticks, [1.0, 2.0, 3.0]);
        assert_eq!(
            Scale::whole([1.0, 60.0], 6).ticks,
            [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
        );
    }

    #[test]
    fn one_value_and_none_have_a_range_as_well() {
        let one = Scale::of([0.5], 4);
        assert!(one.low < 0.5 && one.high > 0.5);
        let none = Scale::of([f64::NAN, f64::INFINITY], 4);
        assert_eq!((none.low, none.high), (0.0, 1.0));
        let zero = Scale::of([0.0, -0.0], 4);
        assert!(zero.low < 0.0 && zero.high > 0.0);
    }

    proptest! {
        #[test]
        fn ticks_rise_within_the_range_and_every_value_has_a_place(
            values in proptest::collection::vec(proptest::num::f64::ANY, 0..6),
            wanted in 1usize..10,
        ) {
            for scale in [Scale::of(values.clone(), wanted), Scale::exactly(values.clone(), wanted)] {
                prop_assert!(scale.low < scale.high, "{scale:?}");
                prop_assert!(scale.ticks.windows(2).all(|w| w[0] < w[1]), "{scale:?}");
                prop_assert!(scale.ticks.iter().all(|t| (scale.low..=scale.high).contains(t)));
                prop_assert!(scale.ticks.len() <= MAX_TICKS);
                for value in &values {
                    prop_assert!((0.0..=1.0).contains(&scale.share(*value)));
                }
            }
        }
    }
}
