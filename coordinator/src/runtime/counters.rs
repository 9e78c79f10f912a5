//! What the runtime counts. The names that metrics carry are made from these fields.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counts since the start of the process.
#[derive(Debug, Default)]
pub struct Counters {
    commits: AtomicU64,
    records: AtomicU64,
    largest_batch: AtomicU64,
    commands: AtomicU64,
    dropped_watchers: AtomicU64,
}

/// The counts at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Commits that the store has confirmed.
    pub commits: u64,
    /// Records written by them.
    pub records: u64,
    /// The most records in one commit.
    pub largest_batch: u64,
    /// Commands that the engine has decided on.
    pub commands: u64,
    /// Watchers that were dropped since they did not keep up.
    pub dropped_watchers: u64,
}

impl Counters {
    /// The counts now.
    #[must_use]
    pub fn get(&self) -> Counts {
        Counts {
            commits: self.commits.load(Relaxed),
            records: self.records.load(Relaxed),
            largest_batch: self.largest_batch.load(Relaxed),
            commands: self.commands.load(Relaxed),
            dropped_watchers: self.dropped_watchers.load(Relaxed),
        }
    }

    pub(super) fn committed(&self, records: usize) {
        self.commits.fetch_add(1, Relaxed);
        self.records.fetch_add(records as u64, Relaxed);
        self.largest_batch.fetch_max(records as u64, Relaxed);
    }

    pub(super) fn decided(&self) {
        self.commands.fetch_add(1, Relaxed);
    }

    pub(super) fn dropped_watchers(&self, number: usize) {
        self.dropped_watchers.fetch_add(number as u64, Relaxed);
    }
}
