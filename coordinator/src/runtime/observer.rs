//! Who is told of everything that was committed: traces, metrics, events.
//!
//! After each commit every observer gets what it changed, as one item of a bounded queue. An
//! observer never slows the leader: what finds its queue full is lost to it, and [`Observing::missed`]
//! says so. The records remain: an ended run carries all that was seen of it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use emberline_common::{
    delivery::Deployment,
    failure::Reason,
    run_view::{RunSummary, TaskView},
};
use tokio::sync::mpsc;

use crate::engine::api::ArchivedRun;

/// Commits whose changes wait for one observer.
const QUEUE: usize = 4096;

/// One thing that was committed.
#[derive(Debug, Clone)]
pub enum Observed {
    /// A run came into another state. All runs that a new leader took over are told at its start.
    Run(Arc<RunSummary>),
    /// A task has ended, or (with [`Observe::Starts`](crate::engine::api::Observe)) an attempt was
    /// assigned.
    Task(Arc<TaskView>),
    /// An attempt did not succeed, whether there is to be another one or not; or a task failed
    /// without one.
    AttemptFailed(Reason),
    /// A run has ended: all that is to be kept of it. May be told again by a next leader.
    Ended(Arc<ArchivedRun>),
    /// A deployment was made, or has changed.
    Deployment(Arc<Deployment>),
    /// An attempt was assigned: so long after it could have started.
    Assigned(Duration),
    /// A commit, and how long it took.
    Committed {
        /// Records that it wrote.
        records: usize,
        /// From its beginning to the store's answer.
        took: Duration,
    },
}

/// What one commit changed.
type Batch = Arc<Vec<Observed>>;

/// The receiving end of one observer.
pub struct Observing {
    batches: mpsc::Receiver<Batch>,
    missed: Arc<AtomicU64>,
}

impl Observing {
    /// What one commit changed; `None` when the term is over and all was told.
    pub async fn next(&mut self) -> Option<Arc<Vec<Observed>>> {
        self.batches.recv().await
    }

    /// What one more commit changed, if it is there already.
    pub fn next_now(&mut self) -> Option<Arc<Vec<Observed>>> {
        self.batches.try_recv().ok()
    }

    /// How much was lost to it since this was asked last.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed.swap(0, Relaxed)
    }
}

/// The observers of one term.
#[derive(Default)]
pub struct Observers {
    queues: Vec<(mpsc::Sender<Batch>, Arc<AtomicU64>)>,
}

impl Observers {
    /// One more observer.
    pub fn add(&mut self) -> Observing {
        let (queue, batches) = mpsc::channel(QUEUE);
        let missed = Arc::<AtomicU64>::default();
        self.queues.push((queue, Arc::clone(&missed)));
        Observing { batches, missed }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Tells each of them. Never waits.
    pub(super) fn tell(&self, batch: Vec<Observed>) {
        if batch.is_empty() || self.queues.is_empty() {
            return;
        }
        let batch = Arc::new(batch);
        for (queue, missed) in &self.queues {
            if queue.try_send(Arc::clone(&batch)).is_err() {
                missed.fetch_add(batch.len() as u64, Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit() -> Vec<Observed> {
        vec![Observed::Committed {
            records: 1,
            took: Duration::ZERO,
        }]
    }

    #[tokio::test]
    async fn each_observer_is_told_everything_until_the_end() {
        let mut observers = Observers::default();
        let (mut one, mut other) = (observers.add(), observers.add());
        observers.tell(commit());
        drop(observers);
        for observer in [&mut one, &mut other] {
            assert!(observer.next().await.is_some());
            assert!(observer.next().await.is_none());
            assert_eq!(observer.missed(), 0);
        }
    }

    #[test]
    fn an_observer_that_does_not_keep_up_is_told_how_much_it_missed() {
        let mut observers = Observers::default();
        let slow = observers.add();
        for _ in 0..QUEUE + 3 {
            observers.tell(commit());
        }
        assert_eq!(slow.missed(), 3);
        assert_eq!(slow.missed(), 0);
    }
}
