//! The open sessions: what a released batch says to each worker leaves through here.

use std::collections::HashMap;

use emberline_common::{ids::AttemptId, serving::ServingPlan};
use tokio::sync::mpsc;

use crate::engine::api::{Assignment, SessionId};

/// Items that wait for one worker. Each is all that one commit had for it.
const QUEUE: usize = 1024;

/// All that one commit had to say to one worker, in the order in which it is to be said.
#[derive(Debug, Default)]
pub struct Outgoing {
    /// The answer to its registration: attempts that it should abandon.
    pub registered: Option<Vec<AttemptId>>,
    /// What became of its reports.
    pub acks: Vec<(AttemptId, bool)>,
    /// Work for it.
    pub assignments: Vec<Assignment>,
    /// Attempts to stop.
    pub stop: Vec<AttemptId>,
    /// What it is to serve.
    pub serving: Option<ServingPlan>,
    /// Whether it is to take no more work and to end.
    pub drain: bool,
    /// Why its session ends here, if it does.
    pub close: Option<String>,
}

/// The open sessions by id.
#[derive(Default)]
pub(super) struct Sessions {
    open: HashMap<SessionId, mpsc::Sender<Outgoing>>,
}

/// A queue for one session.
pub(super) fn channel() -> (mpsc::Sender<Outgoing>, mpsc::Receiver<Outgoing>) {
    mpsc::channel(QUEUE)
}

impl Sessions {
    pub(super) fn open(&mut self, session: SessionId, queue: mpsc::Sender<Outgoing>) {
        self.open.insert(session, queue);
    }

    pub(super) fn close(&mut self, session: SessionId) {
        self.open.remove(&session);
    }

    /// Sends what one commit had for a worker. A session that is gone gets nothing: the engine
    /// learns of its end from the session itself.
    pub(super) fn send(&mut self, session: SessionId, outgoing: Outgoing) {
        let Some(queue) = self.open.get(&session) else {
            return;
        };
        let closes = outgoing.close.is_some();
        let sent = queue.try_send(outgoing);
        if sent.is_err() {
            // It does not read what we send. Dropping the queue ends its stream.
            tracing::warn!(
                session = session.0,
                "a worker does not keep up: its session is closed"
            );
        }
        if closes || sent.is_err() {
            self.open.remove(&session);
        }
    }
}
