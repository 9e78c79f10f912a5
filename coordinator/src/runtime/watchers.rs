//! Who watches which run, and what reaches them.
//!
//! Each watcher has a bounded queue. One that does not keep up is dropped and told so; it never
//! slows the leader. A released batch is one item for each watcher of a run, however many of its
//! tasks changed.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use emberline_common::{
    ids::{AttemptId, RunId},
    run_view::{RunSummary, TaskView},
};
use tokio::sync::mpsc;

/// Batches of changes that wait for one watcher.
const QUEUE_BATCHES: usize = 256;
/// Changes that wait for one watcher, over all batches.
const QUEUE_CHANGES: usize = 65_536;

/// One change of a watched run.
#[derive(Debug, Clone)]
pub enum Change {
    /// The run changed.
    Run(Arc<RunSummary>),
    /// A task changed.
    Task(Arc<TaskView>),
    /// A running attempt got on. Not durable, and may be skipped.
    Progress(Progress),
}

/// How far a running attempt is.
#[derive(Debug, Clone)]
pub struct Progress {
    /// Which.
    pub id: AttemptId,
    /// From 0 to 1; negative if unknown.
    pub fraction: f64,
    /// One line for people.
    pub message: String,
}

/// The receiving end of one watcher.
pub struct Watching {
    changes: mpsc::Receiver<Arc<Vec<Change>>>,
    waiting: Arc<AtomicUsize>,
    lagged: Arc<AtomicBool>,
}

/// Why a watcher gets no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchEnd {
    /// It did not keep up.
    TooSlow,
    /// The leader stops.
    Stopped,
}

impl Watching {
    /// The next changes, in order.
    ///
    /// # Errors
    /// [`WatchEnd`] once there will be no more.
    pub async fn next(&mut self) -> Result<Arc<Vec<Change>>, WatchEnd> {
        match self.changes.recv().await {
            Some(changes) => {
                self.waiting.fetch_sub(changes.len(), Ordering::Relaxed);
                Ok(changes)
            }
            None if self.lagged.load(Ordering::Acquire) => Err(WatchEnd::TooSlow),
            None => Err(WatchEnd::Stopped),
        }
    }
}

/// The sending end of one watcher.
pub(super) struct Watcher {
    run: RunId,
    changes: mpsc::Sender<Arc<Vec<Change>>>,
    waiting: Arc<AtomicUsize>,
    lagged: Arc<AtomicBool>,
}

impl Watcher {
    pub(super) fn new(run: RunId) -> (Self, Watching) {
        let (tx, rx) = mpsc::channel(QUEUE_BATCHES);
        let waiting = Arc::new(AtomicUsize::new(0));
        let lagged = Arc::default();
        let watcher = Self {
            run,
            changes: tx,
            waiting: Arc::clone(&waiting),
            lagged: Arc::clone(&lagged),
        };
        let watching = Watching {
            changes: rx,
            waiting,
            lagged,
        };
        (watcher, watching)
    }

    pub(super) fn run(&self) -> &RunId {
        &self.run
    }

    fn offer(&self, changes: &Arc<Vec<Change>>) -> Offered {
        let waiting = self.waiting.fetch_add(changes.len(), Ordering::Relaxed);
        let sent = if waiting + changes.len() > QUEUE_CHANGES && waiting > 0 {
            Offered::TooSlow
        } else {
            match self.changes.try_send(Arc::clone(changes)) {
                Ok(()) => return Offered::Taken,
                Err(mpsc::error::TrySendError::Full(_)) => Offered::TooSlow,
                Err(mpsc::error::TrySendError::Closed(_)) => Offered::Gone,
            }
        };
        if matches!(sent, Offered::TooSlow) {
            self.lagged.store(true, Ordering::Release);
        }
        sent
    }
}

enum Offered {
    Taken,
    TooSlow,
    Gone,
}

/// All watchers of this leader. Cheap to clone.
#[derive(Clone, Default)]
pub struct Watchers {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    runs: HashMap<RunId, Vec<Watcher>>,
}

/// What became of a publication.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Published {
    /// Watchers that were too slow, and are gone.
    pub(super) dropped: usize,
    /// Whether nobody watches the run any more.
    pub(super) unwatched: bool,
}

impl Watchers {
    pub(super) fn add(&self, watcher: Watcher) {
        let mut inner = self.lock();
        let run = watcher.run.clone();
        inner.runs.entry(run).or_default().push(watcher);
    }

    /// Hands changes of a run to those who watch it.
    pub(super) fn publish(&self, run: &RunId, changes: Vec<Change>) -> Published {
        let changes = Arc::new(changes);
        let mut inner = self.lock();
        let mut published = Published::default();
        let Some(watchers) = inner.runs.get_mut(run) else {
            published.unwatched = true;
            return published;
        };
        watchers.retain(|watcher| match watcher.offer(&changes) {
            Offered::Taken => true,
            Offered::Gone => false,
            Offered::TooSlow => {
                published.dropped += 1;
                false
            }
        });
        if watchers.is_empty() {
            inner.runs.remove(run);
            published.unwatched = true;
        }
        published
    }

    /// A running attempt got on, or has sealed a piece of its log.
    pub fn progress(&self, progress: Progress) {
        let mut inner = self.lock();
        if let Some(watchers) = inner.runs.get_mut(&progress.id.run) {
            let changes = Arc::new(vec![Change::Progress(progress)]);
            // Progress never costs a watcher its place: it is skipped while the queue is filling.
            watchers.retain(|w| {
                let room = w.changes.capacity() > QUEUE_BATCHES / 4;
                !room || !matches!(w.offer(&changes), Offered::Gone)
            });
        }
    }

    /// Ends every watch.
    pub(super) fn clear(&self) {
        let mut inner = self.lock();
        inner.runs.clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every change under the lock is whole at each step that could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn progress(run: &str) -> Progress {
        Progress {
            id: AttemptId {
                run: run.parse().unwrap(),
                task: "a".parse().unwrap(),
                attempt: 1,
            },
            fraction: 0.5,
            message: String::new(),
        }
    }

    fn change() -> Change {
        Change::Progress(progress("r"))
    }

    #[tokio::test]
    async fn a_watcher_that_does_not_keep_up_is_dropped_and_told_so() {
        let watchers = Watchers::default();
        let run: RunId = "r".parse().unwrap();
        let (slow, mut slow_end) = Watcher::new(run.clone());
        let (quick, mut quick_end) = Watcher::new(run.clone());
        watchers.add(slow);
        watchers.add(quick);
        let mut dropped = 0;
        for _ in 0..=QUEUE_BATCHES {
            dropped += watchers.publish(&run, vec![change()]).dropped;
            quick_end.next().await.unwrap();
        }
        assert_eq!(dropped, 1);
        let mut seen = 0;
        let end = loop {
            match slow_end.next().await {
                Ok(_) => seen += 1,
                Err(end) => break end,
            }
        };
        assert_eq!((seen, end), (QUEUE_BATCHES, WatchEnd::TooSlow));
        assert!(!watchers.publish(&run, vec![change()]).unwatched);
    }

    #[tokio::test]
    async fn a_run_whose_last_watcher_left_is_unwatched() {
        let watchers = Watchers::default();
        let run: RunId = "r".parse().unwrap();
        let (watcher, end) = Watcher::new(run.clone());
        watchers.add(watcher);
        drop(end);
        assert!(watchers.publish(&run, vec![change()]).unwatched);
    }

    #[tokio::test]
    async fn progress_never_costs_a_watcher_its_place() {
        let watchers = Watchers::default();
        let run: RunId = "r".parse().unwrap();
        let (watcher, mut end) = Watcher::new(run.clone());
        watchers.add(watcher);
        for _ in 0..QUEUE_BATCHES * 2 {
            watchers.progress(progress("r"));
        }
        assert_eq!(watchers.publish(&run, vec![change()]).dropped, 0);
        end.next().await.unwrap();
    }
}
