//! The task that owns the engine: decide, persist, act.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use emberline_common::ids::{Epoch, RunId};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Request,
    batch::{Batch, Out},
    clock::Clock,
    counters::Counters,
    observer::{Observed, Observers},
    sessions::{Outgoing, Sessions},
    watchers::{Change, Watcher, Watchers},
};
use crate::{
    engine::{
        Engine,
        api::{AccessTable, ArchivedRun, Command, Decision, Effect, Outcome, Refusal, SessionId},
    },
    store::{BatchLimits, StateStore, StoreError},
};

/// Batches that wait for their commit, at most: the engine decides no further ahead.
const AHEAD: usize = 4;
/// Requests decided in a row before the loop looks at the commit under way.
const AT_ONCE: usize = 256;

/// What the pump is made of.
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) store: Arc<dyn StateStore>,
    pub(crate) epoch: Epoch,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) requests: mpsc::Receiver<Request>,
    pub(crate) watchers: Watchers,
    pub(crate) counters: Arc<Counters>,
    /// Has room for every live run, so that handing one over never waits.
    pub(crate) archive: mpsc::Sender<Arc<ArchivedRun>>,
    pub(crate) observers: Observers,
    /// What calls are checked by.
    pub(crate) access: watch::Sender<Arc<AccessTable>>,
}

/// Owns the engine until it stops leading.
pub(crate) struct Pump {
    engine: Engine,
    store: Arc<dyn StateStore>,
    epoch: Epoch,
    clock: Arc<dyn Clock>,
    requests: mpsc::Receiver<Request>,
    watchers: Watchers,
    counters: Arc<Counters>,
    archive: mpsc::Sender<Arc<ArchivedRun>>,
    observers: Observers,
    access: watch::Sender<Arc<AccessTable>>,
    limits: BatchLimits,
    sessions: Sessions,
    /// Watchers that wait for a commit before they are added, by run.
    subscribing: HashMap<RunId, usize>,
    /// What is decided and not committed, in order; each batch is one commit.
    pending: VecDeque<Batch>,
    /// Set when the engine has panicked: on which run, if it was one's.
    panicked: Option<Option<RunId>>,
}

/// Why the pump ended on its own.
#[derive(Debug)]
pub(crate) enum PumpError {
    /// A commit failed.
    Store(StoreError),
    /// The engine panicked: a defect.
    Panicked,
}

impl From<StoreError> for PumpError {
    fn from(e: StoreError) -> Self {
        Self::Store(e)
    }
}

/// A commit under way, and what waits for it.
struct InFlight {
    commit: BoxFuture<'static, Result<(), StoreError>>,
    records: usize,
    began: Instant,
    outs: Vec<Out>,
}

impl Pump {
    /// `first` is what the engine decided when it was loaded; it is committed before anything else.
    pub(crate) fn new(parts: Parts, first: Option<Decision>) -> Self {
        let mut pump = Self {
            limits: parts.store.batch_limits(),
            engine: parts.engine,
            store: parts.store,
            epoch: parts.epoch,
            clock: parts.clock,
            requests: parts.requests,
            watchers: parts.watchers,
            counters: parts.counters,
            archive: parts.archive,
            observers: parts.observers,
            access: parts.access,
            sessions: Sessions::default(),
            subscribing: HashMap::new(),
            pending: VecDeque::new(),
            panicked: None,
        };
        if let Some(decision) = first {
            // Nobody waits for the outcome of loading.
            let _ = pump.gather(decision);
        }
        pump
    }

    /// Runs until `stop`, then commits what was decided and returns.
    ///
    /// # Errors
    /// The store's, as soon as a commit fails: from then on this process does not lead.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> Result<(), PumpError> {
        let result = self.lead(&stop).await;
        self.watchers.clear();
        result
    }

    async fn lead(&mut self, stop: &CancellationToken) -> Result<(), PumpError> {
        let mut in_flight: Option<InFlight> = None;
        let mut alarm: Option<(emberline_common::time::Timestamp, BoxFuture<'static, ()>)> = None;
        loop {
            if let Some(run) = self.panicked.take() {
                return self.give_up(in_flight, run).await;
            }
            if in_flight.is_none() {
                in_flight = self.begin_commit()?;
            }
            let stopping = stop.is_cancelled();
            if stopping && in_flight.is_none() && self.pending.is_empty() {
                return Ok(());
            }
            let deadline = self.engine.next_deadline();
            if alarm.as_ref().map(|(at, _)| *at) != deadline {
                alarm = deadline.map(|at| (at, self.clock.sleep_until(at)));
            }
            let room = !stopping && self.has_room();
            tokio::select! {
                biased;
                done = committed(&mut in_flight) => {
                    let done = done?;
                    self.counters.committed(done.records);
                    let (records, took) = (done.records, done.began.elapsed());
                    let commit = Observed::Committed { records, took };
                    self.release(done.outs, vec![commit]);
                }
                request = self.requests.recv(), if room => match request {
                    Some(request) => self.decide_all(request),
                    // Every handle is gone: nobody can ask for anything any more.
                    None => stop.cancel(),
                },
                () = rings(&mut alarm), if room => {
                    alarm = None;
                    let _ = self.handle(Command::Tick);
                }
                () = stop.cancelled(), if !stopping => {}
            }
        }
    }

    /// Starts the commit of what comes next. A batch that writes nothing is told at once: all that
    /// was decided before it is durable. But not by a leader that may not be one any more.
    ///
    /// # Errors
    /// [`StoreError::Deposed`].
    fn begin_commit(&mut self) -> Result<Option<InFlight>, StoreError> {
        while let Some(batch) = self.pending.pop_front() {
            let (writes, outs) = batch.into_parts();
            if writes.is_empty() {
                if !self.store.holds(self.epoch) {
                    return Err(StoreError::Deposed { epoch: self.epoch });
                }
                self.release(outs, Vec::new());
                continue;
            }
            let (store, epoch, records) = (Arc::clone(&self.store), self.epoch, writes.len());
            let commit = Box::pin(async move { store.commit(epoch, writes).await });
            return Ok(Some(InFlight {
                commit,
                records,
                began: Instant::now(),
                outs,
            }));
        }
        Ok(None)
    }

    fn has_room(&self) -> bool {
        self.pending.len() < AHEAD && !self.pending.back().is_some_and(Batch::is_full)
    }

    /// The batch that what is told next waits for.
    fn last(&mut self) -> &mut Batch {
        if self.pending.is_empty() {
            self.pending.push_back(Batch::default());
        }
        let last = self.pending.len() - 1;
        &mut self.pending[last]
    }

    /// Decides on this request and on those that wait behind it.
    fn decide_all(&mut self, first: Request) {
        self.decide(first);
        for _ in 1..AT_ONCE {
            if !self.has_room() || self.panicked.is_some() {
                return;
            }
            match self.requests.try_recv() {
                Ok(request) => self.decide(request),
                Err(_) => return,
            }
        }
    }

    fn decide(&mut self, request: Request) {
        match request {
            Request::Command { command, answer } => {
                if let Command::WorkerDisconnected { session, .. } = command {
                    self.sessions.close(session);
                }
                let outcome = self.handle(command);
                if let (Some(answer), Some(outcome)) = (answer, outcome) {
                    self.last().out(Out::Answer(Box::new(move || {
                        // Whoever asked may have left.
                        let _ = answer.send(outcome);
                    })));
                }
            }
            Request::Read(reader) => {
                let answer = reader(&mut self.engine);
                self.last().out(Out::Answer(answer));
            }
            Request::Watch { run, answer } => {
                let Some(view) = self.engine.run_view(&run) else {
                    self.last().out(Out::Answer(Box::new(move || {
                        let _ = answer.send(None);
                    })));
                    return;
                };
                self.engine.set_watched(&run, true);
                *self.subscribing.entry(run.clone()).or_default() += 1;
                let (watcher, watching) = Watcher::new(run);
                self.last().out(Out::Subscribe(watcher));
                self.last().out(Out::Answer(Box::new(move || {
                    let _ = answer.send(Some((view, watching)));
                })));
            }
            Request::OpenSession { hello, queue } => {
                self.sessions.open(hello.session, queue);
                let _ = self.handle(Command::WorkerRegistered(hello));
            }
        }
    }

    /// `None` if the engine panicked; then nothing more is decided.
    fn handle(&mut self, command: Command) -> Option<Result<Outcome, Refusal>> {
        let now = self.clock.now();
        let engine = &mut self.engine;
        let decided = catch_unwind(AssertUnwindSafe(|| engine.handle(now, command)));
        let Ok(decision) = decided else {
            self.panicked = Some(self.engine.deciding_on().cloned());
            return None;
        };
        self.counters.decided();
        Some(self.gather(decision))
    }

    /// After a panic of the engine: nothing that is not durable is told, and the run at which it
    /// happened is marked, so that it cannot bring down every leader to come.
    async fn give_up(
        &mut self,
        mut in_flight: Option<InFlight>,
        run: Option<RunId>,
    ) -> Result<(), PumpError> {
        if in_flight.is_some() {
            let done = committed(&mut in_flight).await?;
            self.counters.committed(done.records);
        }
        if let Some(run) = run {
            tracing::error!(%run, "the engine panicked while it decided on this run");
            let mark = self.engine.poison_mark(&run);
            self.store.commit(self.epoch, vec![mark]).await?;
        }
        Err(PumpError::Panicked)
    }

    fn gather(&mut self, decision: Decision) -> Result<Outcome, Refusal> {
        let limits = self.limits;
        if !self.last().takes(&decision.writes, limits) {
            self.pending.push_back(Batch::default());
        }
        let batch = self.last();
        for write in decision.writes {
            batch.write(write);
        }
        for effect in decision.effects {
            batch.out(Out::Effect(effect));
        }
        decision.outcome
    }

    /// Lets out what was decided. All of it is durable.
    fn release(&mut self, outs: Vec<Out>, mut observed: Vec<Observed>) {
        let mut sessions: HashMap<SessionId, Outgoing> = HashMap::new();
        let mut changes: HashMap<RunId, Vec<Change>> = HashMap::new();
        let now = self.clock.now();
        for out in outs {
            match out {
                Out::Answer(answer) => answer(),
                Out::Subscribe(watcher) => {
                    // What came before is in its snapshot.
                    if let Some(before) = changes.remove(watcher.run()) {
                        self.publish(watcher.run(), before);
                    }
                    if let Entry::Occupied(mut waiting) =
                        self.subscribing.entry(watcher.run().clone())
                    {
                        *waiting.get_mut() -= 1;
                        if *waiting.get() == 0 {
                            waiting.remove();
                        }
                    }
                    self.watchers.add(watcher);
                }
                Out::Effect(effect) => match effect {
                    Effect::Registered { session, abandon } => {
                        sessions.entry(session).or_default().registered = Some(abandon);
                    }
                    Effect::CloseSession { session, why } => {
                        sessions.entry(session).or_default().close = Some(why);
                    }
                    Effect::Assign {
                        session,
                        assignment,
                    } => {
                        if !self.observers.is_empty() {
                            observed.push(Observed::Assigned(now.since(assignment.ready_at)));
                        }
                        let outgoing = sessions.entry(session).or_default();
                        outgoing.assignments.push(*assignment);
                    }
                    Effect::Stop { session, attempt } => {
                        sessions.entry(session).or_default().stop.push(attempt);
                    }
                    Effect::Serve { session, plan } => {
                        sessions.entry(session).or_default().serving = Some(*plan);
                    }
                    Effect::Drain { session } => {
                        sessions.entry(session).or_default().drain = true;
                    }
                    Effect::Ack {
                        session,
                        attempt,
                        committed,
                    } => {
                        let outgoing = sessions.entry(session).or_default();
                        outgoing.acks.push((attempt, committed));
                    }
                    Effect::RunChanged(summary) => {
                        let changes = changes.entry(summary.run.clone()).or_default();
                        changes.push(Change::Run(summary));
                    }
                    Effect::TaskChanged(task) => {
                        let changes = changes.entry(task.run.clone()).or_default();
                        changes.push(Change::Task(task));
                    }
                    Effect::RunObserved(summary) => observed.push(Observed::Run(summary)),
                    Effect::TaskObserved(task) => observed.push(Observed::Task(task)),
                    Effect::AttemptFailed(reason) => {
                        observed.push(Observed::AttemptFailed(reason));
                    }
                    Effect::Deployed(deployment) => {
                        observed.push(Observed::Deployment(deployment));
                    }
                    Effect::Access(access) => {
                        self.access.send_replace(access);
                    }
                    Effect::Archive(run) => {
                        if !self.observers.is_empty() {
                            observed.push(Observed::Ended(Arc::clone(&run)));
                        }
                        // The queue has room for every live run; it is closed at shutdown only,
                        // and then the next leader finds the run ended and archives it.
                        let _ = self.archive.try_send(run);
                    }
                },
            }
        }
        for (session, outgoing) in sessions {
            self.sessions.send(session, outgoing);
        }
        for (run, changes) in changes {
            self.publish(&run, changes);
        }
        self.observers.tell(observed);
    }

    fn publish(&mut self, run: &RunId, changes: Vec<Change>) {
        let published = self.watchers.publish(run, changes);
        self.counters.dropped_watchers(published.dropped);
        if published.unwatched && !self.subscribing.contains_key(run) {
            self.engine.set_watched(run, false);
        }
    }
}

/// Resolves when the commit under way is durable; never, if there is none.
async fn committed(in_flight: &mut Option<InFlight>) -> Result<InFlight, StoreError> {
    match in_flight {
        Some(under_way) => {
            (&mut under_way.commit).await?;
            match in_flight.take() {
                Some(done) => Ok(done),
                None => std::future::pending().await,
            }
        }
        None => std::future::pending().await,
    }
}

/// Resolves at the alarm's time; never, if there is none.
async fn rings(alarm: &mut Option<(emberline_common::time::Timestamp, BoxFuture<'static, ()>)>) {
    match alarm {
        Some((_, sleep)) => sleep.await,
        None => std::future::pending().await,
    }
}
