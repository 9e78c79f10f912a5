//! Whether and when a task gets another attempt, and the engine's only randomness.

use std::time::Duration;

use emberline_common::{failure::Reason, spec::RetrySpec};

use super::records::Spent;

/// A seeded generator (SplitMix64, Steele et al. 2014): enough for jitter, and it replays.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 for 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }
}

/// What follows a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Another attempt, after this long.
    Again(Duration),
    /// No further attempt; the text says why.
    Final(&'static str),
}

/// Decides on a failed attempt, and spends what it costs. `asked` says that the worker is draining:
/// what it hands back starts elsewhere at once.
pub fn judge(
    spec: &RetrySpec,
    spent: &mut Spent,
    reason: Reason,
    asked: bool,
    random: &mut Random,
) -> Verdict {
    let (used, allowed) = match reason {
        Reason::Data | Reason::QualityGate => {
            return Verdict::Final("the same data would fail again");
        }
        Reason::Cancelled => return Verdict::Final(""),
        // Spends nothing; but a worker that hands everything back must not spin.
        Reason::Preempted => {
            let wait = if asked {
                Duration::ZERO
            } else {
                spec.backoff.0
            };
            return Verdict::Again(wait);
        }
        Reason::WorkerLost => {
            if spent.lost >= spec.lost_workers {
                return Verdict::Final("no retries for lost workers are left");
            }
            spent.lost += 1;
            return Verdict::Again(Duration::ZERO);
        }
        Reason::Storage | Reason::System => (&mut spent.faults, spec.faults),
        Reason::UserError | Reason::Oom | Reason::Timeout => (&mut spent.errors, spec.errors),
    };
    if *used >= allowed {
        return Verdict::Final(if allowed == 0 {
            ""
        } else {
            "no retries are left"
        });
    }
    *used += 1;
    let tries = spent.errors + spent.faults;
    Verdict::Again(backoff(spec, tries, random))
}

/// `backoff · 2^(tries − 1)`, at most `max_backoff`, less a random part of up to half.
fn backoff(spec: &RetrySpec, tries: u32, random: &mut Random) -> Duration {
    let factor = 1_u32
        .checked_shl(tries.saturating_sub(1))
        .unwrap_or(u32::MAX);
    let whole = spec
        .backoff
        .0
        .saturating_mul(factor)
        .min(spec.max_backoff.0);
    let micros = u64::try_from(whole.as_micros()).unwrap_or(u64::MAX);
    Duration::from_micros(micros - random.below(micros / 2 + 1))
}

#[cfg(test)]
mod tests {
    use emberline_common::spec::DurationText;

    use super::*;

    fn spec() -> RetrySpec {
        RetrySpec {
            errors: 2,
            faults: 1,
            lost_workers: 1,
            backoff: DurationText(Duration::from_secs(1)),
            max_backoff: DurationText(Duration::from_secs(3)),
        }
    }

    #[test]
    fn each_budget_is_spent_on_its_own() {
        let (mut spent, mut random) = (Spent::default(), Random::new(1));
        let mut judge = |reason| judge(&spec(), &mut spent, reason, false, &mut random);
        assert!(matches!(judge(Reason::UserError), Verdict::Again(_)));
        assert!(matches!(judge(Reason::Storage), Verdict::Again(_)));
        assert!(matches!(judge(Reason::Storage), Verdict::Final(_)));
        assert_eq!(judge(Reason::WorkerLost), Verdict::Again(Duration::ZERO));
        assert!(matches!(judge(Reason::WorkerLost), Verdict::Final(_)));
        assert!(matches!(judge(Reason::Oom), Verdict::Again(_)));
        assert!(matches!(judge(Reason::Timeout), Verdict::Final(_)));
    }

    #[test]
    fn bad_data_and_missed_gates_are_never_tried_again() {
        let (mut spent, mut random) = (Spent::default(), Random::new(1));
        for reason in [Reason::Data, Reason::QualityGate, Reason::Cancelled] {
            let verdict = judge(&spec(), &mut spent, reason, false, &mut random);
            assert!(matches!(verdict, Verdict::Final(_)), "{reason}");
        }
        assert_eq!(spent, Spent::default());
    }

    #[test]
    fn preemption_spends_nothing() {
        let (mut spent, mut random) = (Spent::default(), Random::new(1));
        for _ in 0..100 {
            let verdict = judge(&spec(), &mut spent, Reason::Preempted, true, &mut random);
            assert_eq!(verdict, Verdict::Again(Duration::ZERO));
        }
        assert_eq!(spent, Spent::default());
    }

    #[test]
    fn the_wait_doubles_up_to_its_bound_less_at_most_half() {
        let mut random = Random::new(7);
        for (tries, whole) in [
            (1, 1000),
            (2, 2000),
            (3, 3000),
            (40, 3000),
            (u32::MAX, 3000),
        ] {
            for _ in 0..50 {
                let wait = backoff(&spec(), tries, &mut random).as_millis();
                assert!((whole / 2..=whole).contains(&wait), "{tries}: {wait}");
            }
        }
    }
}
