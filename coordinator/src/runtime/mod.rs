//! Decide, persist, act: the one place where decisions become durable and then known.
//!
//! One task ([`pump`]) owns the engine. It takes commands from a bounded queue, lets the engine
//! decide, and gathers what is to be written and what is to be told. While one commit is under way
//! it goes on deciding; all of that is the next commit (group commit). Nothing is told to anyone
//! before its commit has succeeded: not an answer, not an assignment, not a reading. When a commit
//! fails, the batch is forgotten and the process stops leading at once.
//!
//! Services hold a [`Runtime`] and know neither the engine's task nor the store.

mod batch;
pub mod clock;
pub mod counters;
pub mod observer;
pub(crate) mod pump;
pub mod sessions;
pub mod watchers;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use emberline_common::{
    ids::{Epoch, RunId},
    run_view::RunView,
    time::Timestamp,
};
use thiserror::Error;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

use self::{
    counters::{Counters, Counts},
    sessions::Outgoing,
    watchers::{Watchers, Watching},
};
use crate::{
    engine::{
        Engine,
        api::{Command, Outcome, Refusal, SessionId, WorkerHello},
    },
    store::StateStore,
};

/// Requests that wait for the engine, at most.
const QUEUE: usize = 8192;
/// Of those, requests of clients; the rest of the room is the workers' own, so that no client can
/// keep a worker's report from being heard.
const CLIENT_REQUESTS: usize = 1024;
/// A store that cannot write for longer than this is told to clients, who then need not wait.
const TROUBLE: Duration = Duration::from_secs(2);
/// How long a client is asked to wait when there is no room.
pub const RETRY_HINT: Duration = Duration::from_millis(200);

/// Why a request got no answer.
#[derive(Debug, Clone, Error)]
pub enum RuntimeError {
    /// The engine refused it; nothing has changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Too many requests are waiting.
    #[error("the leader has too many requests waiting; try again in a moment")]
    Busy,
    /// The store cannot write. Whether a command was carried out is not known if it had to wait.
    #[error("{0}")]
    ReadOnly(String),
    /// This process does not lead any more. Whether a command was carried out is not known.
    #[error(
        "this coordinator has stopped leading; ask again, the next leader knows what was committed"
    )]
    Stopped,
}

/// What the runtime is asked.
pub(crate) enum Request {
    Command {
        command: Command,
        answer: Option<oneshot::Sender<Result<Outcome, Refusal>>>,
    },
    Read(Reader),
    Watch {
        run: RunId,
        answer: oneshot::Sender<Option<(RunView, Watching)>>,
    },
    OpenSession {
        hello: Box<WorkerHello>,
        queue: mpsc::Sender<Outgoing>,
    },
}

/// Reads the engine, and gives back what hands the answer over once it may be known.
type Reader = Box<dyn FnOnce(&mut Engine) -> Box<dyn FnOnce() + Send> + Send>;

/// The way to the engine. Cheap to clone.
#[derive(Clone)]
pub struct Runtime {
    shared: Arc<Shared>,
}

struct Shared {
    requests: mpsc::Sender<Request>,
    clients: Semaphore,
    next_session: AtomicU64,
    watchers: Watchers,
    counters: Arc<Counters>,
    store: Arc<dyn StateStore>,
    epoch: Epoch,
}

impl Runtime {
    /// The handle, and the queue that the pump takes from.
    pub(crate) fn new(
        epoch: Epoch,
        store: Arc<dyn StateStore>,
        watchers: Watchers,
        counters: Arc<Counters>,
    ) -> (Self, mpsc::Receiver<Request>) {
        let (requests, queue) = mpsc::channel(QUEUE);
        let shared = Shared {
            requests,
            clients: Semaphore::new(CLIENT_REQUESTS),
            next_session: AtomicU64::new(1),
            watchers,
            counters,
            store,
            epoch,
        };
        let shared = Arc::new(shared);
        (Self { shared }, queue)
    }

    /// Gives a client's command and waits until what it came to is durable.
    ///
    /// # Errors
    /// [`RuntimeError`]. After `Stopped` the command may still have been carried out.
    pub async fn command(&self, command: Command) -> Result<Outcome, RuntimeError> {
        let _room = self.client_room()?;
        let (answer, answered) = oneshot::channel();
        let answer = Some(answer);
        self.send(Request::Command { command, answer }).await?;
        Ok(self.answered(answered).await??)
    }

    /// Gives a command whose outcome nobody waits for.
    ///
    /// # Errors
    /// [`RuntimeError::Stopped`].
    pub async fn tell(&self, command: Command) -> Result<(), RuntimeError> {
        let answer = None;
        self.send(Request::Command { command, answer }).await
    }

    /// Gives a command that is the system's own, and waits as [`Self::command`] does.
    ///
    /// # Errors
    /// [`RuntimeError::Refused`], [`RuntimeError::Stopped`].
    pub async fn own_command(&self, command: Command) -> Result<Outcome, RuntimeError> {
        let (answer, answered) = oneshot::channel();
        let answer = Some(answer);
        self.send(Request::Command { command, answer }).await?;
        Ok(answered.await.map_err(|_| RuntimeError::Stopped)??)
    }

    /// Looks at the engine. The answer comes once everything that it shows is durable.
    ///
    /// # Errors
    /// [`RuntimeError::Busy`], [`RuntimeError::Stopped`].
    pub async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Engine) -> T + Send + 'static,
    ) -> Result<T, RuntimeError> {
        let _room = self.client_room()?;
        let (answer, answered) = oneshot::channel();
        let reader: Reader = Box::new(move |engine| {
            let seen = look(engine);
            Box::new(move || {
                // Whoever asked may have left.
                let _ = answer.send(seen);
            })
        });
        self.send(Request::Read(reader)).await?;
        self.answered(answered).await
    }

    /// Watches a live run: how it is now, and every change after that. `None` if it is not live.
    ///
    /// # Errors
    /// [`RuntimeError::Busy`], [`RuntimeError::Stopped`].
    pub async fn watch(&self, run: RunId) -> Result<Option<(RunView, Watching)>, RuntimeError> {
        let _room = self.client_room()?;
        let (answer, answered) = oneshot::channel();
        self.send(Request::Watch { run, answer }).await?;
        self.answered(answered).await
    }

    /// An id for a new session.
    #[must_use]
    pub fn new_session(&self) -> SessionId {
        SessionId(self.shared.next_session.fetch_add(1, Ordering::Relaxed))
    }

    /// Opens a worker's session. What comes for it arrives in the queue, the answer to its
    /// registration first; the queue ends when the session is closed.
    ///
    /// # Errors
    /// [`RuntimeError::Stopped`].
    pub async fn open_session(
        &self,
        hello: WorkerHello,
    ) -> Result<mpsc::Receiver<Outgoing>, RuntimeError> {
        let (queue, outgoing) = sessions::channel();
        let hello = Box::new(hello);
        self.send(Request::OpenSession { hello, queue }).await?;
        Ok(outgoing)
    }

    /// Those who watch runs, for what is not durable: progress and the growth of logs.
    #[must_use]
    pub fn watchers(&self) -> &Watchers {
        &self.shared.watchers
    }

    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.counters.get()
    }

    /// The term of this leader.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.shared.epoch
    }

    /// Waits for an answer, but no longer than a while on a store that cannot write.
    async fn answered<T>(&self, mut answer: oneshot::Receiver<T>) -> Result<T, RuntimeError> {
        loop {
            match timeout(TROUBLE, &mut answer).await {
                Ok(answered) => return answered.map_err(|_| RuntimeError::Stopped),
                Err(_) => self.check_store()?,
            }
        }
    }

    /// # Errors
    /// [`RuntimeError::ReadOnly`] if the store has not been able to write for a while.
    fn check_store(&self) -> Result<(), RuntimeError> {
        match self.shared.store.trouble() {
            Some(trouble) if Timestamp::now().since(trouble.since) > TROUBLE => {
                Err(RuntimeError::ReadOnly(trouble.text))
            }
            _ => Ok(()),
        }
    }

    fn client_room(&self) -> Result<tokio::sync::SemaphorePermit<'_>, RuntimeError> {
        self.check_store()?;
        self.shared
            .clients
            .try_acquire()
            .map_err(|_| RuntimeError::Busy)
    }

    async fn send(&self, request: Request) -> Result<(), RuntimeError> {
        self.shared
            .requests
            .send(request)
            .await
            .map_err(|_| RuntimeError::Stopped)
    }
}
