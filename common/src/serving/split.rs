//! Which requests a canary gets: a stable function of the request's id, so that the same request goes
//! to the same version on every replica, whoever asks and however often.

/// Shares of traffic are counted in this many parts.
pub const SHARES: u16 = 10_000;

/// Where a request stands among [`SHARES`] equal parts: a canary with share `s` gets those below `s`.
/// So whoever is in a canary of 5 % is in that of 50 % as well.
///
/// FNV-1a over the model's name, a zero byte and the id (Fowler, Noll, Vo; 64 bits), then mixed as in
/// MurmurHash3's finaliser (Appleby), since FNV leaves the upper bits of short texts alike.
#[must_use]
pub fn share_of(model: &str, request_id: &str) -> u16 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in model.bytes().chain([0]).chain(request_id.bytes()) {
        hash ^= u64::from(byte);
        hash = hash.wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^= hash >> 33;
    // Scaled instead of divided: the upper bits decide, evenly.
    let scaled = (u128::from(hash) * u128::from(SHARES)) >> 64;
    u16::try_from(scaled).unwrap_or(SHARES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_and_nested() {
        let ids: Vec<String> = (0..100_000).map(|n| format!("request-{n}")).collect();
        let below = |share: u16| {
            let taken = ids.iter().filter(|id| share_of("m", id) < share);
            taken.count()
        };
        for share in [100, 1_000, 5_000, 9_900] {
            let expected = usize::from(share) * 10;
            let seen = below(share);
            // Some four standard deviations of the largest.
            assert!(seen.abs_diff(expected) < 700, "{share}: {seen}");
        }
        assert_eq!(below(0), 0);
        assert_eq!(below(SHARES), ids.len());
    }

    #[test]
    fn another_model_splits_another_way() {
        let both = (0..10_000).filter(|n| {
            let id = n.to_string();
            share_of("a", &id) < 1_000 && share_of("b", &id) < 1_000
        });
        let both = both.count();
        assert!((50..200).contains(&both), "{both}");
    }

    #[test]
    fn the_split_never_changes() {
        // Replicas of two releases must agree: these stay as they are.
        assert_eq!(share_of("predictive-maintenance", "r-1"), 4_588);
        assert_eq!(share_of("digits", ""), 2_391);
    }
}
