//! Random numbers that are a pure function of the seed and of where they are used. Burn's own
//! generator is one for the whole process: two attempts side by side would take numbers from each
//! other. Every use here starts a generator of its own from (seed, purpose, position), so that a
//! resumed training draws what an uninterrupted one would have drawn.

/// What random numbers are for; no two purposes share a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The first weights.
    Weights = 1,
    /// The order of the rows in an epoch.
    Order = 2,
    /// Dropout in a step.
    Dropout = 3,
    /// Shifts of the images of a step.
    Shift = 4,
}

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    /// A generator for one purpose at one position (epoch, step).
    #[must_use]
    pub const fn new(seed: u64, purpose: Purpose, epoch: u64, step: u64) -> Self {
        let mut state = mix(seed.wrapping_add(GOLDEN));
        state = mix(state ^ (purpose as u64).wrapping_mul(GOLDEN));
        state = mix(state.wrapping_add(epoch.wrapping_mul(GOLDEN)) ^ 0x5851_F42D_4C95_7F2D);
        state = mix(state.wrapping_add(step.wrapping_mul(GOLDEN)) ^ 0x1405_7B7E_F767_814F);
        Self { state }
    }

    /// The next 64 bits.
    pub const fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// Uniform in [0, 1), with 24 bits.
    #[allow(clippy::cast_precision_loss, reason = "24 bits fit")]
    pub fn unit(&mut self) -> f32 {
        (self.next_u64() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in 0..bound, without bias; 0 for a bound of 0.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "the remainder is below the bound"
    )]
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = bound as u64;
        if bound == 0 {
            return 0;
        }
        // Numbers in the incomplete last stretch of the range would favour small remainders.
        let limit = u64::MAX - u64::MAX % bound;
        loop {
            let value = self.next_u64();
            if value < limit {
                return (value % bound) as usize;
            }
        }
    }

    /// Puts the values in random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for i in (1..values.len()).rev() {
            values.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_by_purpose_epoch_and_step() {
        let first = |p, e, s| Random::new(7, p, e, s).next_u64();
        let all = [
            first(Purpose::Weights, 0, 0),
            first(Purpose::Order, 0, 0),
            first(Purpose::Order, 1, 0),
            first(Purpose::Order, 0, 1),
            Random::new(8, Purpose::Order, 0, 0).next_u64(),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(!all[..i].contains(a), "stream {i} repeats another one");
        }
    }

    #[test]
    fn a_shuffle_is_the_same_for_ever() {
        let mut values: Vec<u32> = (0..8).collect();
        Random::new(1, Purpose::Order, 3, 0).shuffle(&mut values);
        let mut sorted = values.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..8).collect::<Vec<_>>());
        // Written down once: a change here would give every user other weights for the same seed.
        assert_eq!(values, SHUFFLED);
    }
    const SHUFFLED: [u32; 8] = [5, 4, 6, 7, 2, 1, 0, 3];

    #[test]
    fn below_is_even() {
        let mut random = Random::new(3, Purpose::Shift, 0, 0);
        let mut counts = [0u32; 5];
        for _ in 0..50_000 {
            counts[random.below(5)] += 1;
        }
        assert!(
            counts.iter().all(|c| (9_600..10_400).contains(c)),
            "{counts:?}"
        );
        assert_eq!(random.below(0), 0);
    }
}
