//! Keeps the collector away from objects that are about to be referred to.
//!
//! A blob is stored first and referred to by a later commit; in between nothing refers to it, and it
//! may be an old one that was there already, so that its age protects nothing. Whoever stores a
//! blob for a later commit *holds* its digest until that commit has been answered. The collector
//! removes nothing that is held, or that was held at any time since it began to look.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use emberline_common::ids::Digest;
use tokio::sync::Notify;

/// The digests that are held. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Holds {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Told when an object that was being removed is gone.
    removed: Notify,
}

#[derive(Default)]
struct State {
    held: HashMap<Digest, usize>,
    /// While a collection runs: what was held since it began.
    touched: Option<HashSet<Digest>>,
    /// What the collection removes right now.
    dying: HashSet<Digest>,
}

/// Some held digests; dropping it lets them go.
pub(crate) struct Hold {
    holds: Holds,
    digests: Vec<Digest>,
}

impl Holds {
    /// Holds these. Waits while one of them is being removed: after that it has to be stored anew.
    pub(crate) async fn hold(&self, digests: Vec<Digest>) -> Hold {
        loop {
            let removed = self.shared.removed.notified();
            if self.try_hold(&digests) {
                return Hold {
                    holds: self.clone(),
                    digests,
                };
            }
            removed.await;
        }
    }

    fn try_hold(&self, digests: &[Digest]) -> bool {
        let mut state = self.lock();
        if digests.iter().any(|d| state.dying.contains(d)) {
            return false;
        }
        for digest in digests {
            *state.held.entry(*digest).or_default() += 1;
            if let Some(touched) = &mut state.touched {
                touched.insert(*digest);
            }
        }
        true
    }

    /// Begins a collection; `None` while another one runs.
    pub(crate) fn begin_collection(&self) -> Option<Collection> {
        let mut state = self.lock();
        if state.touched.is_some() {
            return None;
        }
        state.touched = Some(state.held.keys().copied().collect());
        Some(Collection {
            holds: self.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is whole at each step that could panic.
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.holds.lock();
        for digest in &self.digests {
            if let Some(count) = state.held.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    state.held.remove(digest);
                }
            }
        }
    }
}

/// The one collection that runs; dropping it ends it.
pub(crate) struct Collection {
    holds: Holds,
}

impl Collection {
    /// Whether the object may be removed now. If so, nobody can hold it until [`Self::removed`].
    pub(crate) fn may_remove(&self, digest: &Digest) -> bool {
        let mut state = self.holds.lock();
        let touched = state.touched.as_ref().is_some_and(|t| t.contains(digest));
        if !touched {
            state.dying.insert(*digest);
        }
        !touched
    }

    /// The removal has ended, whichever way.
    pub(crate) fn removed(&self, digest: &Digest) {
        self.holds.lock().dying.remove(digest);
        self.holds.shared.removed.notify_waiters();
    }
}

impl Drop for Collection {
    fn drop(&mut self) {
        let mut state = self.holds.lock();
        state.touched = None;
        state.dying.clear();
        drop(state);
        self.holds.shared.removed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_was_held_at_any_time_of_a_collection_is_not_removed() {
        let holds = Holds::default();
        let (before, during, never) = (Digest::of(b"1"), Digest::of(b"2"), Digest::of(b"3"));
        let hold = holds.hold(vec![before]).await;
        let collection = holds.begin_collection().unwrap();
        drop(hold);
        drop(holds.hold(vec![during]).await);
        assert!(!collection.may_remove(&before));
        assert!(!collection.may_remove(&during));
        assert!(collection.may_remove(&never));
    }

    #[tokio::test]
    async fn whoever_wants_an_object_that_is_being_removed_waits_for_its_end() {
        let holds = Holds::default();
        let digest = Digest::of(b"1");
        let collection = holds.begin_collection().unwrap();
        assert!(collection.may_remove(&digest));
        let waiter = tokio::spawn({
            let holds = holds.clone();
            async move { holds.hold(vec![digest]).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        collection.removed(&digest);
        let hold = tokio::time::timeout(Duration::from_secs(10), waiter).await;
        drop(hold.unwrap().unwrap());
    }

    #[tokio::test]
    async fn only_one_collection_runs_at_a_time() {
        let holds = Holds::default();
        let first = holds.begin_collection();
        assert!(holds.begin_collection().is_none());
        drop(first);
        assert!(holds.begin_collection().is_some());
    }
}
