//! Plays seeds. `EMBERLINE_SIM_SEEDS` says how many ([`SEEDS`] if it is not set),
//! `EMBERLINE_SIM_SEED` where to begin.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    env,
    panic::catch_unwind,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use super::*;

/// Without optimisation, what takes some 40 seconds of one core.
const SEEDS: u64 = if cfg!(debug_assertions) {
    2_000
} else {
    10_000
};

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Plays one seed; a panic is a finding like any other.
fn played(seed: u64, sabotage: Option<Sabotage>) -> Result<Played, String> {
    catch_unwind(|| simulate(seed, sabotage)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(format!(
            "seed {seed}: panicked: {}",
            text.unwrap_or_default()
        ))
    })
}

#[test]
fn no_seed_breaks_an_invariant() {
    let first = number("EMBERLINE_SIM_SEED", 1);
    let seeds = number("EMBERLINE_SIM_SEEDS", SEEDS);
    let next = AtomicU64::new(first);
    let all = Mutex::new((Played::default(), Vec::new()));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds || all.lock().unwrap().1.len() >= 5 {
                        break;
                    }
                    let one = played(seed, None);
                    let mut all = all.lock().unwrap();
                    match one {
                        Ok(one) => all.0.add(&one),
                        Err(what) => all.1.push((seed, what)),
                    }
                }
            });
        }
    });
    let (all, mut found) = all.into_inner().unwrap();
    println!("{seeds} seeds: {all:?}");
    found.sort_unstable();
    for (seed, what) in &found {
        println!(
            "{what}\n  replay: EMBERLINE_SIM_SEED={seed} EMBERLINE_SIM_SEEDS=1 cargo test -p emberline-coordinator no_seed_breaks"
        );
    }
    assert!(found.is_empty(), "{} seeds fail", found.len());
    if seeds >= 1000 {
        assert!(
            all.attempts > 5 * seeds && all.leaders > seeds,
            "hardly anything happens"
        );
        assert!(
            all.cached > 0 && all.retries > 0 && all.reloads > seeds / 2,
            "something never happens"
        );
        assert!(
            all.deployed > seeds / 4 && all.given_up > seeds / 10,
            "hardly anything is deployed, or given up"
        );
    }
}

impl Played {
    fn add(&mut self, one: &Self) {
        self.steps += one.steps;
        self.runs += one.runs;
        self.retries += one.retries;
        self.commits += one.commits;
        self.leaders += one.leaders;
        self.attempts += one.attempts;
        self.cached += one.cached;
        self.reloads += one.reloads;
        self.deployed += one.deployed;
        self.given_up += one.given_up;
    }
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 1..20 {
        assert_eq!(simulate(seed, None), simulate(seed, None));
    }
}

/// A check that cannot fail checks nothing: each of these bugs must be found by some seed.
#[test]
fn what_is_broken_on_purpose_is_found() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for sabotage in [
        Sabotage::EffectsBeforeCommit,
        Sabotage::EarlyAnswer,
        Sabotage::UnguardedStore,
        Sabotage::LostWrite,
        Sabotage::StaleAttempts,
        Sabotage::LeakedAttempts,
        Sabotage::NothingReserved,
        Sabotage::CreditsTwice,
        Sabotage::DeafToStop,
        Sabotage::EndlessRetries,
        Sabotage::AnyCacheEntry,
        Sabotage::NumbersAnew,
        Sabotage::LenientJudge,
    ] {
        let found = (1..500).find_map(|seed| played(seed, Some(sabotage)).err());
        let found = found.map(|what| what.chars().take(160).collect::<String>());
        println!("{sabotage:?}: {found:?}");
        if found.is_none() {
            missed.push(sabotage);
        }
    }
    std::panic::set_hook(hook);
    assert!(missed.is_empty(), "{missed:?} was not found");
}
