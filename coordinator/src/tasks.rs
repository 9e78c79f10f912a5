//! The coordinator's tasks: each has a name, an owner and an end that is seen.
//!
//! A task that panics or fails ends the coordinator: half of it alive would be worse than none.

use std::{future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt as _;
use tokio::{runtime::Handle, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::CoordinatorError;

/// Owns tasks. Cheap to clone; the clones own the same ones.
#[derive(Clone)]
pub(crate) struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
    failed: Arc<watch::Sender<Option<CoordinatorError>>>,
}

impl Tasks {
    pub(crate) fn new() -> Self {
        Self {
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
            failed: Arc::new(watch::Sender::new(None)),
        }
    }

    /// Cancelled when the coordinator stops, whatever the reason.
    pub(crate) fn stopping(&self) -> &CancellationToken {
        &self.stop
    }

    /// Starts a task. It must end soon after [`Self::stopping`] is cancelled.
    pub(crate) fn spawn(
        &self,
        name: &'static str,
        task: impl Future<Output = Result<(), CoordinatorError>> + Send + 'static,
    ) {
        self.tracker.spawn(self.clone().watched(name, task));
    }

    /// The same on another runtime.
    pub(crate) fn spawn_on(
        &self,
        runtime: &Handle,
        name: &'static str,
        task: impl Future<Output = Result<(), CoordinatorError>> + Send + 'static,
    ) {
        self.tracker
            .spawn_on(self.clone().watched(name, task), runtime);
    }

    async fn watched(
        self,
        name: &'static str,
        task: impl Future<Output = Result<(), CoordinatorError>>,
    ) {
        let ended = AssertUnwindSafe(task).catch_unwind().await;
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(e)) => self.fail(e),
            Err(_) => self.fail(CoordinatorError::Panicked { task: name }),
        }
    }

    /// Stops everything for this reason. Only the first reason is kept.
    pub(crate) fn fail(&self, why: CoordinatorError) {
        tracing::error!(error = %why, "the coordinator stops");
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            if first {
                *failed = Some(why);
            }
            first
        });
        self.stop.cancel();
    }

    /// Why it failed, if it did.
    pub(crate) fn failure(&self) -> Option<CoordinatorError> {
        self.failed.borrow().clone()
    }

    /// Resolves when the coordinator stops.
    pub(crate) async fn stopped(&self) -> Result<(), CoordinatorError> {
        self.stop.cancelled().await;
        self.failure().map_or(Ok(()), Err)
    }

    /// Waits until every task has ended. Says whether they did within that time.
    pub(crate) async fn join(&self, within: Duration) -> bool {
        self.tracker.close();
        tokio::time::timeout(within, self.tracker.wait())
            .await
            .is_ok()
    }
}
