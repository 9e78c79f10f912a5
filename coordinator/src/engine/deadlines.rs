//! Points in time at which the engine wants to be called again.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use emberline_common::{
    ids::{RunId, WorkerName},
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
    /// There is more to assign than one decision should hold.
    Dispatch,
}

/// A heap of them.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    heap: BinaryHeap<Reverse<(Timestamp, u64)>>,
    due: BTreeMap<u64, Due>,
    next: u64,
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
