#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    env,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use super::*;

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// `EMBERLINE_SIM_SEEDS` says how many, `EMBERLINE_SIM_SEED` where to begin.
#[test]
fn no_seed_breaks_an_invariant() {
    let first = number("EMBERLINE_SIM_SEED", 1);
    let seeds = number("EMBERLINE_SIM_SEEDS", 10_000);
    let next = AtomicU64::new(first);
    let (steps, attempts, runs) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds {
                        break;
                    }
                    let played = std::panic::catch_unwind(|| simulate(seed, None));
                    match played {
                        Ok(Ok(played)) => {
                            steps.fetch_add(played.steps, Ordering::Relaxed);
                            attempts.fetch_add(played.attempts, Ordering::Relaxed);
                            runs.fetch_add(played.runs, Ordering::Relaxed);
                        }
                        Ok(Err(what)) => panic!("{what}\nreplay: EMBERLINE_SIM_SEED={seed} EMBERLINE_SIM_SEEDS=1"),
                        Err(_) => panic!("seed {seed} panicked\nreplay: EMBERLINE_SIM_SEED={seed} EMBERLINE_SIM_SEEDS=1"),
                    }
                }
            });
        }
    });
    let (steps, attempts, runs) = (steps.into_inner(), attempts.into_inner(), runs.into_inner());
    println!("{seeds} seeds: {steps} steps, {runs} acknowledged runs, {attempts} attempts");
    assert!(attempts > seeds, "the simulation hardly does anything");
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
    std::panic::set_hook(Box::new(|_| {}));
    for sabotage in [
        Sabotage::EffectsBeforeCommit,
        Sabotage::UnguardedStore,
        Sabotage::LostWrite,
        Sabotage::EarlyAnswer,
        Sabotage::StaleAttempts,
        Sabotage::LeakedAttempts,
    ] {
        let found = (1..500).find_map(|seed| {
            let played = std::panic::catch_unwind(|| simulate(seed, Some(sabotage)));
            match played {
                Ok(Ok(_)) => None,
                Ok(Err(what)) => Some(what),
                Err(_) => Some(format!("seed {seed} panicked")),
            }
        });
        let found = found.map(|what| what.chars().take(160).collect::<String>());
        println!("{sabotage:?}: {found:?}");
        assert!(found.is_some(), "{sabotage:?} was not found");
    }
}
