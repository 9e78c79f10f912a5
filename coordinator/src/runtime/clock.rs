//! Where the time comes from. The engine is handed its time; only this file asks for it.

use std::time::{Duration, Instant};

use emberline_common::time::Timestamp;
use futures::future::BoxFuture;

/// Tells the time, and waits for it.
pub trait Clock: Send + Sync + 'static {
    /// Now. Never goes back.
    fn now(&self) -> Timestamp;

    /// Resolves when `at` has come, at once if it is past.
    fn sleep_until(&self, at: Timestamp) -> BoxFuture<'static, ()>;
}

/// The machine's clock: the wall's time when it was made, and the monotonic clock from then on, so
/// that a wall clock that jumps moves no deadline.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    wall: Timestamp,
    started: Instant,
}

impl SystemClock {
    /// Starts now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            wall: Timestamp::now(),
            started: Instant::now(),
        }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        self.wall.after(self.started.elapsed())
    }

    fn sleep_until(&self, at: Timestamp) -> BoxFuture<'static, ()> {
        // Timers count whole milliseconds; one more, so as not to wake before the deadline.
        let wait = at.since(self.now()) + Duration::from_micros(999);
        Box::pin(tokio::time::sleep(wait))
    }
}
