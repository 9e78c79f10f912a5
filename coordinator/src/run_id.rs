//! Ids of new runs: `r-` and 26 characters that sort by time.

use std::sync::{Mutex, PoisonError};

use emberline_common::{
    ids::{InvalidId, RunId},
    time::Timestamp,
};

/// Crockford's base 32, lower case: no letter looks like a digit, and text order is number order.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const RANDOM_BITS: u32 = 80;

/// Makes ids: 48 bits of milliseconds since 1970, then 80 random bits. Within a process each is
/// higher than the one before, also when the wall clock goes back.
#[derive(Debug, Default)]
pub(crate) struct RunIds {
    last: Mutex<u128>,
}

impl RunIds {
    /// The next id. `random` are 80 random bits; what is above them is not looked at.
    pub(crate) fn next(&self, now: Timestamp, random: u128) -> Result<RunId, InvalidId> {
        let milliseconds = u128::from(now.0 / 1000) & ((1 << 48) - 1);
        let fresh = (milliseconds << RANDOM_BITS) | (random & ((1 << RANDOM_BITS) - 1));
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let id = if fresh > *last {
            fresh
        } else {
            last.wrapping_add(1)
        };
        *last = id;
        RunId::new(text(id))
    }
}

fn text(mut id: u128) -> String {
    let mut digits = [0_u8; 26];
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[usize::from(id as u8 & 31)];
        id >>= 5;
    }
    let digits: String = digits.iter().map(|b| char::from(*b)).collect();
    format!("r-{digits}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn later_ids_sort_behind_earlier_ones_even_if_the_clock_goes_back() {
        let ids = RunIds::default();
        let mut made = Vec::new();
        for (now, random) in [(2_000_000, 5), (2_000_000, 4), (1_000, 9), (3_000_000, 0)] {
            made.push(ids.next(Timestamp(now), random).unwrap());
        }
        let mut sorted = made.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(made, sorted);
        assert!(made.iter().all(|id| id.as_str().len() == 28));
    }

    #[test]
    fn ids_of_one_moment_differ_in_their_random_part() {
        let now = Timestamp(1_700_000_000_000_000);
        let a = RunIds::default().next(now, 1).unwrap();
        let b = RunIds::default().next(now, 2).unwrap();
        assert_ne!(a, b);
        assert_eq!(a.as_str()[..12], b.as_str()[..12]);
    }
}
