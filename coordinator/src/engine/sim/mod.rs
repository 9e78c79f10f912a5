//! A seeded world around the engine: a store, leaders, workers and clients, with a bad network
//! between them, on simulated time.
//!
//! [`simulate`] plays one seed. Random pipelines are submitted, cancelled, retried, watched and
//! forgotten; workers die, pause, drain, come back, or come back twice under one name; connections
//! break and lose their tail; leaders crash with decisions uncommitted or with commits untold, go
//! on after they were deposed, and read clocks that jump. Each seed has a weather of its own, so
//! that some worlds see one fault often and others all of them. After every commit and on every
//! message the invariants of [`store`] are checked from the outside: on the records written and on
//! what workers, clients and watchers are told, never by asking the engine whether it is well.
//! Besides, now and then a new leader is loaded from the records alone, and must know what the
//! leader knows. Then the faults stop, and every acknowledged run must end (I1) and leave nothing
//! behind (I8).
//!
//! What is played here is the engine and its order of decide, persist, act; not the runtime, the
//! wire, a real store or the bytes of artifacts and logs.
//!
//! The same seed plays the same world. Start with [`world::World::step`]; then `leaders` (decide,
//! persist, act), `network`, `workers`, `clients`, `faults`.

mod clients;
mod faults;
mod leaders;
mod network;
mod pipelines;
mod serving;
mod store;
mod tests;
mod workers;
mod world;

use world::World;

/// Something to break on purpose, to show that the checks see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sabotage {
    /// The leader lets effects out before their commit.
    EffectsBeforeCommit,
    /// The leader answers a client before the commit.
    EarlyAnswer,
    /// The store takes writes of deposed leaders.
    UnguardedStore,
    /// A commit drops its last write.
    LostWrite,
    /// The engine takes reports of attempts that are no longer current.
    StaleAttempts,
    /// The engine forgets to free what an attempt held.
    LeakedAttempts,
    /// The engine reserves nothing on workers.
    NothingReserved,
    /// The engine counts every credit twice.
    CreditsTwice,
    /// The engine lets queued tasks of a stopped run start.
    DeafToStop,
    /// The engine counts no spent retry.
    EndlessRetries,
    /// The engine reuses whatever is in the cache.
    AnyCacheEntry,
    /// The engine starts counting attempts anew when a run is retried.
    NumbersAnew,
    /// The engine lets every version pass its trial.
    LenientJudge,
}

/// What one seed came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Played {
    steps: u64,
    /// Runs that were acknowledged.
    runs: u64,
    /// Runs that were started again.
    retries: u64,
    commits: u64,
    leaders: u64,
    attempts: u64,
    cached: u64,
    /// Comparisons with what a new leader would know.
    reloads: u64,
    /// Deployments that became live, and those that were given up.
    deployed: u64,
    given_up: u64,
}

/// Plays one seed; says what was violated, and at which step.
fn simulate(seed: u64, sabotage: Option<Sabotage>) -> Result<Played, String> {
    let mut world = World::new(seed, sabotage);
    let played = world.play();
    played.map_err(|what| format!("seed {seed}, step {}: {what}", world.played.steps))
}
