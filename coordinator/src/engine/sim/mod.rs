//! A seeded world around the engine: store, leaders, workers and a bad network on simulated time.
//!
//! [`simulate`] plays one seed: random pipelines, cancels and retries, workers that die, pause and
//! come back, messages that are late, doubled or lost with their connection, leaders that crash
//! with decisions uncommitted or go on after they were deposed. After every step the invariants of
//! [`checks`] are checked from the outside, on the store's writes and on what workers get. Then the
//! faults stop, and every acknowledged run must end. The same seed plays the same world.
//!
//! Nothing here is used by a coordinator at work. Start with [`World::step`].

mod checks;
mod pipelines;
mod world;

#[cfg(test)]
mod tests;

pub use world::World;

/// Something to break on purpose, to show that the checks see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// Effects are let out before their commit.
    EffectsBeforeCommit,
    /// The store takes writes of deposed leaders.
    UnguardedStore,
    /// A commit drops its last write.
    LostWrite,
    /// A client is told before the commit.
    EarlyAnswer,
    /// The engine takes reports of attempts that are no longer current.
    StaleAttempts,
    /// The engine forgets to free what a lost attempt held.
    LeakedAttempts,
}

/// What one seed came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Played {
    /// Events.
    pub steps: u64,
    /// Runs that were acknowledged.
    pub runs: u64,
    /// Commits.
    pub commits: u64,
    /// Leaders.
    pub leaders: u64,
    /// Attempts.
    pub attempts: u64,
}

/// Plays one seed.
///
/// # Errors
/// What was violated, and at which step.
pub fn simulate(seed: u64, sabotage: Option<Sabotage>) -> Result<Played, String> {
    let mut world = World::new(seed, sabotage)?;
    let played = world.play();
    played.map_err(|what| format!("seed {seed}, step {}: {what}", world.played().steps))
}
