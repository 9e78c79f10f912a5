//! The tellers: from what was committed to the places that events go to.
//!
//! A teller is two tasks. One takes what is observed off the leader's hands and never waits: what
//! finds the other one busy is dropped there, since it is recorded. The other one tells, and looks
//! at the engine's records of what is untold whenever something may have been missed.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{AcqRel, Acquire, Release},
        },
    },
    time::Duration,
};

use emberline_common::{
    artifact::ArtifactError,
    delivery::Deployment,
    ids::{DeploymentId, RunId},
    run_view::RunSummary,
    time::Timestamp,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    EventsConfig, Outlet,
    event::{Event, EventId},
    outlets::NotTaken,
    records::{Delivered, Events},
};
use crate::{
    archive::{Archive, ArchiveError},
    engine::{
        Engine,
        api::{ArchivedRun, Command, EndedRun},
    },
    runtime::{
        Runtime,
        observer::{Observed, Observing},
    },
    tasks::Tasks,
    traces::Spans,
};

/// What waits for one teller, at most.
const QUEUE: usize = 1024;
/// Of those, whole runs.
const WHOLE_RUNS: usize = 4;
/// Events told lately that are remembered, so that they are not told again at once.
const REMEMBERED: usize = 16_384;
/// Runs that were told whole, and whose record has still to come.
const RUNS_TOLD: usize = 1024;
/// Records that are told in one go.
const RECORDS: usize = 32;
/// Events that are handed over in one go.
const LINES: usize = 256;
/// How soon what is not taken is tried again: at first, and at last.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// How soon the records are looked at after something was told: at first, and at last.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_secs(5);
/// How long it may go on telling when the term is over.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How often it is asked whether all is told.
const ASK_EVERY: Duration = Duration::from_millis(10);

/// The tellers of one term.
pub(crate) struct Tellers {
    runtime: Runtime,
    shared: Arc<[Shared]>,
}

/// What a teller lets others know.
#[derive(Debug, Default)]
struct Shared {
    /// All up to this mark is told.
    told: AtomicU64,
    /// Whether its place takes nothing.
    is_stuck: AtomicBool,
    /// Whether something was dropped since the records were looked at.
    has_missed: AtomicBool,
    /// Whether it has nothing at hand.
    is_idle: AtomicBool,
}

impl Tellers {
    /// Starts one for each place. There is an observer for each.
    pub(crate) fn start(
        config: &EventsConfig,
        spans: Spans,
        runtime: &Runtime,
        archive: &Archive,
        observing: Vec<Observing>,
        tasks: &Tasks,
    ) -> Self {
        let events = Events {
            source: config.source.clone(),
            spans,
        };
        let shared: Arc<[Shared]> = config.outlets.iter().map(|_| Shared::default()).collect();
        let places = config.outlets.iter().zip(observing);
        for (number, (outlet, observing)) in places.enumerate() {
            let (queue, items) = mpsc::channel(QUEUE);
            let listener = Listener {
                events: events.clone(),
                shared: Arc::clone(&shared),
                number,
                queue,
                whole_runs: Arc::new(Semaphore::new(WHOLE_RUNS)),
                live: HashMap::new(),
            };
            tasks.spawn("events observed", async move {
                listener.run(observing).await;
                Ok(())
            });
            let teller = Teller {
                outlet: outlet.clone(),
                events: events.clone(),
                runtime: runtime.clone(),
                archive: archive.clone(),
                shared: Arc::clone(&shared),
                number,
                stopping: tasks.stopping().clone(),
                told: Remembered::default(),
                runs_told: HashSet::new(),
                done: 0,
            };
            tasks.spawn("events", async move {
                teller.run(items).await;
                Ok(())
            });
        }
        Self {
            runtime: runtime.clone(),
            shared,
        }
    }

    /// Waits until all that can be told is told, but not for a place that takes nothing, and not
    /// longer than that.
    pub(crate) async fn settled(&self, within: Duration) {
        let shared = &self.shared;
        let settle = async {
            while !shared.iter().any(|teller| teller.is_stuck.load(Acquire)) {
                let idle = shared.iter().all(|teller| teller.is_idle.load(Acquire));
                let left = self.runtime.read(|engine| engine.untold(0).count()).await;
                if left.is_err() || (idle && left.is_ok_and(|left| left == 0)) {
                    return;
                }
                sleep(ASK_EVERY).await;
            }
        };
        if !shared.is_empty() {
            // If it takes longer, the next term tells the rest.
            let _ = tokio::time::timeout(within, settle).await;
        }
    }
}

/// What a teller is given.
enum Item {
    Events(Vec<Event>),
    Deployment(Arc<Deployment>),
    Ended(Arc<ArchivedRun>, OwnedSemaphorePermit),
}

/// Takes what is observed, and never waits.
struct Listener {
    events: Events,
    shared: Arc<[Shared]>,
    number: usize,
    queue: mpsc::Sender<Item>,
    whole_runs: Arc<Semaphore>,
    live: HashMap<RunId, Arc<RunSummary>>,
}

impl Listener {
    async fn run(mut self, mut observing: Observing) {
        while let Some(batch) = observing.next().await {
            if observing.missed() > 0 {
                self.miss();
            }
            for observed in batch.iter() {
                self.observe(observed);
            }
        }
    }

    fn observe(&mut self, observed: &Observed) {
        let stuck = self.shared[self.number].is_stuck.load(Acquire);
        let item = match observed {
            Observed::Run(run) => {
                self.live.insert(run.run.clone(), Arc::clone(run));
                if run.state.is_final() {
                    return;
                }
                (!stuck).then(|| Item::Events(self.events.run(run)))
            }
            Observed::Task(task) => {
                let run = self.live.get(&task.run).filter(|_| !stuck);
                run.map(|run| Item::Events(self.events.task(run, task)))
            }
            Observed::Ended(archived) => {
                self.live.remove(&archived.view.summary.run);
                let room = Arc::clone(&self.whole_runs).try_acquire_owned();
                room.ok()
                    .map(|room| Item::Ended(Arc::clone(archived), room))
            }
            Observed::Deployment(deployment) => Some(Item::Deployment(Arc::clone(deployment))),
            Observed::Assigned(_) | Observed::AttemptFailed(_) | Observed::Committed { .. } => {
                return;
            }
        };
        if let Some(Item::Events(events)) = &item
            && events.is_empty()
        {
            return;
        }
        let is_sent = item.is_some_and(|item| self.queue.try_send(item).is_ok());
        if !is_sent {
            self.miss();
        }
    }

    fn miss(&self) {
        self.shared[self.number].has_missed.store(true, Release);
    }
}

/// Tells, for as long as it takes.
struct Teller {
    outlet: Outlet,
    events: Events,
    runtime: Runtime,
    archive: Archive,
    shared: Arc<[Shared]>,
    number: usize,
    stopping: CancellationToken,
    told: Remembered,
    /// Runs that were told whole, with the time of their end.
    runs_told: HashSet<(RunId, Option<Timestamp>)>,
    /// All records up to this mark are told.
    done: u64,
}

/// The term is over, and the place takes nothing.
struct Over;

/// A record of what is untold.
enum Recorded {
    Run(Box<EndedRun>),
    Deployment(Delivered),
    /// It was forgotten.
    Nothing,
}

impl Recorded {
    fn of(engine: &Engine, subject: &str) -> Self {
        let run = RunId::new(subject).ok();
        if let Some(run) = run.and_then(|run| engine.ended_run(&run)) {
            return Self::Run(Box::new(run.clone()));
        }
        let id: Option<DeploymentId> = subject.parse().ok();
        match id.and_then(|id| engine.deployment(id)) {
            Some(deployment) => Self::Deployment(Delivered::of(engine, deployment)),
            None => Self::Nothing,
        }
    }
}

impl Teller {
    async fn run(mut self, items: mpsc::Receiver<Item>) {
        let stopping = self.stopping.clone();
        let cut_off = async {
            stopping.cancelled().await;
            sleep(LAST_WORDS).await;
        };
        tokio::select! {
            // What is left is in the records.
            Ok(()) | Err(Over) = self.go_on(items) => {}
            () = cut_off => {}
        }
    }

    async fn go_on(&mut self, mut items: mpsc::Receiver<Item>) -> Result<(), Over> {
        // What earlier leaders have not told.
        let mut pause = FIRST_LOOK;
        let mut look_at = Instant::now();
        loop {
            if Instant::now() >= look_at {
                let found = self.look().await?;
                let busy = found || !self.runs_told.is_empty();
                pause = match found {
                    true => FIRST_LOOK,
                    false => (pause * 2).min(LAST_LOOK),
                };
                look_at = Instant::now() + pause;
                self.shared()
                    .is_idle
                    .store(!busy && items.is_empty(), Release);
            }
            let item = tokio::select! {
                item = items.recv() => item,
                () = sleep_until(look_at) => continue,
            };
            self.shared().is_idle.store(false, Release);
            let recorded = match item {
                None => return Ok(()),
                Some(Item::Events(events)) => {
                    self.tell(events).await?;
                    false
                }
                Some(Item::Ended(archived, room)) => {
                    self.tell(self.events.ended(&archived)).await?;
                    drop(room);
                    let summary = &archived.view.summary;
                    if self.runs_told.len() < RUNS_TOLD {
                        self.runs_told
                            .insert((summary.run.clone(), summary.finished_at));
                    }
                    true
                }
                Some(Item::Deployment(deployment)) => {
                    let of = move |engine: &Engine| Delivered::of(engine, &deployment);
                    // If it cannot be read now, it is told from its record.
                    if let Ok(delivered) = self.runtime.read(of).await {
                        self.tell(self.events.deployment(&delivered)).await?;
                    }
                    true
                }
            };
            if recorded | self.shared().has_missed.swap(false, AcqRel) {
                pause = FIRST_LOOK;
                look_at = look_at.min(Instant::now() + pause);
            }
        }
    }

    /// Tells what the engine has recorded as untold, the oldest first. Whether there was something.
    async fn look(&mut self) -> Result<bool, Over> {
        let after = self.done;
        let untold = self.runtime.read(move |engine| {
            let untold = engine.untold(after).take(RECORDS);
            let untold = untold.map(|(mark, subject)| (mark, Recorded::of(engine, subject)));
            untold.collect::<Vec<_>>()
        });
        // The leader has other things to do, or is none any more.
        let untold = untold.await.unwrap_or_default();
        for (mark, record) in untold {
            match record {
                Recorded::Nothing => {}
                Recorded::Deployment(delivered) => {
                    self.tell(self.events.deployment(&delivered)).await?;
                }
                Recorded::Run(ended) => {
                    let run = (ended.summary.run.clone(), ended.summary.finished_at);
                    if !self.runs_told.remove(&run) && !self.tell_archived(&ended).await? {
                        break;
                    }
                }
            }
            self.done = mark;
        }
        if self.done == after {
            return Ok(false);
        }
        self.patiently(Act::Settle).await?;
        self.shared().told.store(self.done, Release);
        let told = self.shared.iter().map(|teller| teller.told.load(Acquire));
        let up_to = told.min().unwrap_or_default();
        // If nobody leads any more, the next leader's tellers tell it again.
        let _ = self.runtime.tell(Command::Told { up_to }).await;
        Ok(true)
    }

    /// Tells a run from the archive. `false` if it cannot be read at the moment.
    async fn tell_archived(&mut self, ended: &EndedRun) -> Result<bool, Over> {
        let run = &ended.summary.run;
        match self.archive.load(ended.archive).await {
            Ok(archived) => self.tell(self.events.ended(&archived)).await?,
            Err(
                e @ (ArchiveError::Unreadable { .. }
                | ArchiveError::Artifact(ArtifactError::NotFound { .. })),
            ) => tracing::warn!(%run, error = %e, "an ended run is not told to others"),
            Err(e) => {
                tracing::warn!(%run, error = %e, "an ended run is told to others later");
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tells what was not told yet, in order.
    async fn tell(&mut self, mut events: Vec<Event>) -> Result<(), Over> {
        events.retain(|event| !self.told.has(&event.id));
        let mut left = events.as_slice();
        while !left.is_empty() {
            let taken = self
                .patiently(Act::Tell(&left[..left.len().min(LINES)]))
                .await?;
            let (taken, rest) = left.split_at(taken);
            taken.iter().for_each(|event| self.told.add(event.id));
            left = rest;
        }
        Ok(())
    }

    /// Tries until it is done. Gives how many events were taken.
    async fn patiently(&self, act: Act<'_>) -> Result<usize, Over> {
        let mut wait = FIRST_RETRY;
        loop {
            let tried = match act {
                Act::Tell(events) => self.outlet.tell(events).await,
                Act::Settle => self.outlet.settle().await.map(|()| 0),
            };
            let place = self.outlet.name();
            match tried {
                Ok(taken) => {
                    if self.shared().is_stuck.swap(false, AcqRel) {
                        tracing::info!(%place, "events are taken again");
                    }
                    return Ok(taken);
                }
                Err(NotTaken::Never(status)) => {
                    let kind = match act {
                        Act::Tell([first, ..]) => first.kind(),
                        _ => "",
                    };
                    tracing::warn!(%place, %status, kind, "an event was refused as wrong, and is not told there again");
                    return Ok(1);
                }
                Err(NotTaken::Yet { why, wait: asked }) => {
                    if !self.shared().is_stuck.swap(true, AcqRel) {
                        tracing::warn!(%place, %why, "events are not taken: they are kept, and told later");
                    }
                    if self.stopping.is_cancelled() {
                        return Err(Over);
                    }
                    // Once the term is over there is one more try.
                    tokio::select! {
                        () = sleep(asked.unwrap_or(wait)) => {}
                        () = self.stopping.cancelled() => {}
                    }
                    wait = (wait * 2).min(LAST_RETRY);
                }
            }
        }
    }

    fn shared(&self) -> &Shared {
        &self.shared[self.number]
    }
}

/// What is tried until it is done.
#[derive(Clone, Copy)]
enum Act<'a> {
    Tell(&'a [Event]),
    Settle,
}

/// The events that were told lately.
#[derive(Default)]
struct Remembered {
    ids: HashSet<EventId>,
    order: VecDeque<EventId>,
}

impl Remembered {
    fn has(&self, id: &EventId) -> bool {
        self.ids.contains(id)
    }

    fn add(&mut self, id: EventId) {
        if self.ids.insert(id) {
            self.order.push_back(id);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }
}
