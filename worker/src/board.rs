//! What runs, what is to be told to the leader, and what it has not acknowledged yet.
//!
//! Everything is behind one lock that is only ever held for a moment, so that a slot is free, its
//! report is queued and its credit is granted in one step, whatever session there is at the time.
//! A report stays here until a leader has acknowledged it; an update may be dropped.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use emberline_common::ids::{AttemptId, RunId, TaskName};
use emberline_proto::v1 as pb;
use tokio::sync::{Notify, watch};

use crate::stage::StopReason;

/// Reports that travel in one message, at most.
const REPORTS_AT_A_TIME: usize = 256;

/// See the module.
#[derive(Default)]
pub(crate) struct Board {
    state: Mutex<State>,
    /// Something is to be told.
    pub wake: Notify,
    /// An attempt has ended, or a report was acknowledged.
    pub changed: Notify,
}

#[derive(Default)]
struct State {
    running: HashMap<AttemptId, watch::Sender<Option<StopReason>>>,
    unacknowledged: HashMap<AttemptId, pb::AttemptReport>,
    /// Of those, the ones that this session has not sent.
    unsent: VecDeque<AttemptId>,
    updates: HashMap<AttemptId, pb::AttemptUpdate>,
    dirty: HashSet<AttemptId>,
    credits: u32,
    draining: bool,
}

/// What goes out together.
#[derive(Default)]
pub(crate) struct Batch {
    pub reports: Vec<pb::AttemptReport>,
    pub credits: u32,
    /// Whether there is more.
    pub more: bool,
}

/// What a new session begins with.
pub(crate) struct Opening {
    pub running: Vec<AttemptId>,
    pub unacknowledged: Vec<pb::AttemptReport>,
    pub credits: u32,
    pub draining: bool,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an attempt on. `None` if it is known already: an assignment may come twice.
    pub fn begin(&self, id: &AttemptId) -> Option<watch::Receiver<Option<StopReason>>> {
        let mut state = self.lock();
        if state.running.contains_key(id) || state.unacknowledged.contains_key(id) {
            return None;
        }
        let (stop, stopped) = watch::channel(None);
        state.running.insert(id.clone(), stop);
        Some(stopped)
    }

    /// Older attempts of the same task are no longer current: their leader has said so by a newer one.
    pub fn stop_older(&self, run: &RunId, task: &TaskName, attempt: u32) {
        for (id, stop) in &self.lock().running {
            if id.run == *run && id.task == *task && id.attempt < attempt {
                set(stop, StopReason::Cancelled);
            }
        }
    }

    /// An attempt that took no time: reported without ever having been listed as running.
    pub fn done_at_once(&self, id: AttemptId, report: pb::AttemptReport) {
        let mut state = self.lock();
        if state.running.contains_key(&id) || state.unacknowledged.contains_key(&id) {
            return;
        }
        state.credits += u32::from(!state.draining);
        state.unsent.push_back(id.clone());
        state.unacknowledged.insert(id, report);
        drop(state);
        self.wake.notify_one();
    }

    /// Queues the report of an attempt. Its slot stays taken until [`Self::end`].
    pub fn report(&self, id: &AttemptId, report: pb::AttemptReport) {
        let mut state = self.lock();
        state.updates.remove(id);
        state.dirty.remove(id);
        state.unsent.push_back(id.clone());
        state.unacknowledged.insert(id.clone(), report);
        drop(state);
        self.wake.notify_one();
    }

    /// The attempt's slot is free again.
    pub fn end(&self, id: &AttemptId) {
        let mut state = self.lock();
        if state.running.remove(id).is_some() && !state.draining {
            state.credits += 1;
        }
        drop(state);
        self.wake.notify_one();
        self.changed.notify_waiters();
    }

    /// The leader has dealt with a report.
    pub fn acknowledge(&self, id: &AttemptId) -> Option<pb::AttemptReport> {
        let report = self.lock().unacknowledged.remove(id);
        self.changed.notify_waiters();
        report
    }

    /// Asks an attempt to stop.
    pub fn stop(&self, id: &AttemptId, why: StopReason) {
        if let Some(stop) = self.lock().running.get(id) {
            set(stop, why);
        }
    }

    /// Asks all attempts to stop.
    pub fn stop_all(&self, why: StopReason) {
        for stop in self.lock().running.values() {
            set(stop, why);
        }
    }

    /// Forgets what no leader has acknowledged.
    pub fn discard(&self) {
        let mut state = self.lock();
        state.unacknowledged.clear();
        state.unsent.clear();
    }

    /// No more credits.
    pub fn drain(&self) {
        let mut state = self.lock();
        state.draining = true;
        state.credits = 0;
        drop(state);
        self.wake.notify_one();
    }

    pub fn is_draining(&self) -> bool {
        self.lock().draining
    }

    /// Whether nothing runs and nothing waits for an acknowledgement.
    pub fn is_idle(&self) -> bool {
        let state = self.lock();
        state.running.is_empty() && state.unacknowledged.is_empty()
    }

    /// Whether nothing runs.
    pub fn is_empty(&self) -> bool {
        self.lock().running.is_empty()
    }

    /// Changes what is to be told of a running attempt.
    pub fn update(&self, id: &AttemptId, change: impl FnOnce(&mut pb::AttemptUpdate)) {
        let mut state = self.lock();
        if !state.running.contains_key(id) || state.unacknowledged.contains_key(id) {
            return;
        }
        let update = state
            .updates
            .entry(id.clone())
            .or_insert_with(|| pb::AttemptUpdate {
                id: Some(id.into()),
                fraction: -1.0,
                ..pb::AttemptUpdate::default()
            });
        change(update);
        state.dirty.insert(id.clone());
    }

    /// What has changed of running attempts since the last call.
    pub fn take_updates(&self) -> Vec<pb::AttemptUpdate> {
        let mut state = self.lock();
        let dirty = std::mem::take(&mut state.dirty);
        dirty
            .iter()
            .filter_map(|id| state.updates.get(id).cloned())
            .collect()
    }

    /// What a new session says first. From here on only what comes after is told as news.
    pub fn open(&self, slots: u32) -> Opening {
        let mut state = self.lock();
        let running: Vec<AttemptId> = state
            .running
            .keys()
            .filter(|id| !state.unacknowledged.contains_key(*id))
            .cloned()
            .collect();
        let taken = u32::try_from(state.running.len()).unwrap_or(u32::MAX);
        state.unsent.clear();
        state.credits = 0;
        state.dirty = state.updates.keys().cloned().collect();
        Opening {
            running,
            unacknowledged: state.unacknowledged.values().cloned().collect(),
            credits: if state.draining {
                0
            } else {
                slots.saturating_sub(taken)
            },
            draining: state.draining,
        }
    }

    /// What is to be told now.
    pub fn take(&self) -> Batch {
        let mut state = self.lock();
        let mut batch = Batch {
            credits: std::mem::take(&mut state.credits),
            ..Batch::default()
        };
        while batch.reports.len() < REPORTS_AT_A_TIME {
            let Some(id) = state.unsent.pop_front() else {
                break;
            };
            batch.reports.extend(state.unacknowledged.get(&id).cloned());
        }
        batch.more = !state.unsent.is_empty();
        batch
    }
}

/// The first reason to stop stays.
fn set(stop: &watch::Sender<Option<StopReason>>, why: StopReason) {
    stop.send_if_modified(|now| {
        let first = now.is_none();
        if first {
            *now = Some(why);
        }
        first
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn id(attempt: u32) -> AttemptId {
        AttemptId {
            run: RunId::new("r").unwrap(),
            task: TaskName::new("t").unwrap(),
            attempt,
        }
    }

    fn report(attempt: u32) -> pb::AttemptReport {
        pb::AttemptReport {
            id: Some((&id(attempt)).into()),
            ..pb::AttemptReport::default()
        }
    }

    #[test]
    fn an_assignment_that_comes_twice_is_taken_once() {
        let board = Board::default();
        assert!(board.begin(&id(1)).is_some());
        assert!(board.begin(&id(1)).is_none());
        board.report(&id(1), report(1));
        board.end(&id(1));
        assert!(board.begin(&id(1)).is_none(), "its report is under way");
    }

    #[test]
    fn a_report_is_told_again_to_the_next_leader_until_it_is_acknowledged() {
        let board = Board::default();
        board.begin(&id(1)).unwrap();
        board.report(&id(1), report(1));
        board.end(&id(1));
        let batch = board.take();
        assert_eq!((batch.reports.len(), batch.credits), (1, 1));
        assert!(board.take().reports.is_empty(), "once for each session");
        assert_eq!(board.open(4).unacknowledged.len(), 1);
        board.acknowledge(&id(1));
        assert!(board.open(4).unacknowledged.is_empty());
        assert!(board.is_idle());
    }

    #[test]
    fn a_new_session_is_granted_exactly_the_free_slots() {
        let board = Board::default();
        board.begin(&id(1)).unwrap();
        board.begin(&id(2)).unwrap();
        board.report(&id(1), report(1));
        board.end(&id(1));
        let opening = board.open(4);
        assert_eq!(opening.credits, 3);
        assert_eq!(opening.running, [id(2)]);
        assert_eq!(board.take().credits, 0, "not granted a second time");
    }

    #[test]
    fn a_draining_worker_grants_nothing() {
        let board = Board::default();
        board.begin(&id(1)).unwrap();
        board.drain();
        board.end(&id(1));
        assert_eq!(board.take().credits, 0);
        assert_eq!(board.open(4).credits, 0);
    }

    #[test]
    fn a_newer_attempt_stops_the_older_one_of_its_task() {
        let board = Board::default();
        let older = board.begin(&id(1)).unwrap();
        let newer = board.begin(&id(2)).unwrap();
        board.stop_older(&id(2).run, &id(2).task, 2);
        assert_eq!(*older.borrow(), Some(StopReason::Cancelled));
        assert_eq!(*newer.borrow(), None);
    }

    #[test]
    fn the_first_reason_to_stop_stays() {
        let board = Board::default();
        let stop = board.begin(&id(1)).unwrap();
        board.stop(&id(1), StopReason::Timeout);
        board.stop_all(StopReason::Preempted);
        assert_eq!(*stop.borrow(), Some(StopReason::Timeout));
    }
}
