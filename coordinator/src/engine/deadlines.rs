//! Points in time at which the engine wants to be called again.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use emberline_common::{
    ids::{DeploymentId, RunId, WorkerName},
    time::Timestamp,
};

use super::{api::SessionId, run::TaskRef};

/// What is due. Each is checked against the state when it comes: one that no longer holds is void.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// An attempt's time limit.
    Attempt { task: TaskRef, attempt: u32 },
    /// The end of a backoff.
    Backoff { task: TaskRef, attempt: u32 },
    /// An attempt that was told to stop has not.
    StopGrace { task: TaskRef, attempt: u32 },
    /// A run's time limit.
    Run { run: RunId },
    /// A worker has not come back.
    Worker {
        worker: WorkerName,
        session: SessionId,
    },
    /// Workers had time to claim what they run.
    Adoption,
    /// A rollout's phase may be over.
    Rollout { deployment: DeploymentId },
    /// There is more to assign than one decision should hold.
    Dispatch,
}

/// Below this many, nobody looks for void ones.
const FEW: usize = 1024;

/// A heap of them.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    heap: BinaryHeap<Reverse<(Timestamp, u64)>>,
    due: BTreeMap<u64, Due>,
    next: u64,
    /// How many were left when void ones were last taken out.
    kept: usize,
}

impl Deadlines {
    pub fn add(&mut self, at: Timestamp, due: Due) {
        self.heap.push(Reverse((at, self.next)));
        self.due.insert(self.next, due);
        self.next += 1;
    }

    pub fn next(&self) -> Option<Timestamp> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether so many have come that void ones may be most of them: limits of attempts that have
    /// long ended would otherwise lie here until their time has come.
    pub fn is_crowded(&self) -> bool {
        self.len() > FEW.max(2 * self.kept)
    }

    /// Keeps only these.
    pub fn retain(&mut self, keep: impl Fn(&Due) -> bool) {
        let due = &mut self.due;
        self.heap.retain(|Reverse((_, number))| {
            let kept = due.get(number).is_some_and(&keep);
            if !kept {
                due.remove(number);
            }
            kept
        });
        self.kept = self.len();
    }

    /// The next deadline and what it is for, in the heap still.
    pub fn peek(&self) -> Option<(Timestamp, &Due)> {
        let Reverse((at, number)) = self.heap.peek()?;
        Some((*at, self.due.get(number)?))
    }

    pub fn pop(&mut self) -> Option<(Timestamp, Due)> {
        let Reverse((at, number)) = self.heap.pop()?;
        Some((at, self.due.remove(&number)?))
    }
}
