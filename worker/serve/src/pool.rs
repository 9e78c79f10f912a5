//! Where forwards are computed: a few threads for all versions together, and the rule by which waiting
//! requests of one version become a batch.
//!
//! A version that is idle computes a request at once. While it computes, others gather; what has
//! gathered by the end is the next batch. If that is fewer rows than the last batch had, more are
//! likely on their way, and it waits for them, but no longer than `max_delay` from when its first one
//! came. So a single caller never waits, and many callers are computed together.
//!
//! A version computes one batch at a time; versions take turns. Copies for a shadow wait in a queue of
//! their own, are computed only where nobody else waits, and never on all threads at once.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use emberline_common::serving::ServingLimits;
use emberline_train::matrix::Matrix;
use tokio::sync::oneshot;

/// What computes for one version.
pub(crate) trait Forward: Send + Sync + 'static {
    /// The outputs of these rows, one for each.
    fn forward(&self, rows: &Matrix) -> Result<Matrix, String>;
    /// So many rows were computed together.
    fn computed(&self, rows: usize);
}

/// Why rows have no outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NotComputed {
    /// The forward failed.
    Failed(String),
    /// Its time was over before it was its turn.
    Expired,
}

/// Who waits for the outputs.
pub(crate) enum Reply {
    /// A caller, who may be gone.
    Caller(oneshot::Sender<Result<Matrix, NotComputed>>),
    /// Nobody: it is a copy for a shadow.
    Shadow(Box<dyn FnOnce(Result<Matrix, NotComputed>) + Send>),
}

impl Reply {
    fn is_gone(&self) -> bool {
        matches!(self, Self::Caller(sender) if sender.is_closed())
    }

    fn send(self, result: Result<Matrix, NotComputed>) {
        match self {
            // Who is gone needs no answer.
            Self::Caller(sender) => drop(sender.send(result)),
            Self::Shadow(take) => take(result),
        }
    }
}

/// Rows that are to be computed.
pub(crate) struct Job {
    pub rows: Matrix,
    pub reply: Reply,
    pub deadline: Option<Instant>,
    /// When it came.
    pub at: Instant,
}

/// There is no room: so many rows wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full(pub usize);

/// Where a version stands with the threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Idle,
    Ready,
    ReadyLow,
    Delayed,
    Running,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    rows: usize,
}

impl Queue {
    fn push(&mut self, job: Job, max_rows: usize) -> Result<(), Full> {
        // A request that is larger than the queue is taken while nothing waits: else it never would be.
        if self.rows > 0 && self.rows + job.rows.rows > max_rows {
            return Err(Full(self.rows));
        }
        self.rows += job.rows.rows;
        self.jobs.push_back(job);
        Ok(())
    }

    fn pop(&mut self) -> Option<Job> {
        let job = self.jobs.pop_front()?;
        self.rows -= job.rows.rows;
        Some(job)
    }

    /// The jobs of the next batch. What nobody waits for any more is let go of.
    fn batch(&mut self, max_batch: usize, now: Instant) -> Vec<Job> {
        let mut batch: Vec<Job> = Vec::new();
        let mut rows = 0;
        while let Some(next) = self.jobs.front() {
            let expired = next.deadline.is_some_and(|deadline| deadline <= now);
            if expired || next.reply.is_gone() {
                if let Some(job) = self.pop() {
                    job.reply.send(Err(NotComputed::Expired));
                }
                continue;
            }
            if !batch.is_empty() && rows + next.rows.rows > max_batch {
                break;
            }
            if let Some(job) = self.pop() {
                rows += job.rows.rows;
                batch.push(job);
            }
        }
        batch
    }
}

struct SlotState {
    place: Place,
    normal: Queue,
    low: Queue,
    last_batch: usize,
    max_batch: usize,
    max_delay: Duration,
    max_queue: usize,
}

/// One version's queues.
pub(crate) struct Slot {
    forward: Arc<dyn Forward>,
    state: Mutex<SlotState>,
    shared: Arc<Shared>,
    waiting: AtomicUsize,
}

struct Ready {
    normal: VecDeque<Arc<Slot>>,
    low: VecDeque<Arc<Slot>>,
    delayed: Vec<(Instant, Arc<Slot>)>,
    low_running: usize,
    stopped: bool,
}

struct Shared {
    ready: Mutex<Ready>,
    wake: Condvar,
    /// Threads that may compute for shadows at once.
    most_low: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The threads.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Pool {
    pub fn start(threads: usize) -> io::Result<Self> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared {
            ready: Mutex::new(Ready {
                normal: VecDeque::new(),
                low: VecDeque::new(),
                delayed: Vec::new(),
                low_running: 0,
                stopped: false,
            }),
            wake: Condvar::new(),
            most_low: (threads - 1).max(1),
        });
        let pool = Self {
            shared: Arc::clone(&shared),
            threads: Mutex::default(),
        };
        for n in 0..threads {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("infer-{n}"));
            let thread = thread.spawn(move || shared.work())?;
            lock(&pool.threads).push(thread);
        }
        Ok(pool)
    }

    /// A place for one more version.
    pub fn slot(&self, forward: Arc<dyn Forward>, limits: &ServingLimits) -> Arc<Slot> {
        let slot = Slot {
            forward,
            state: Mutex::new(SlotState {
                place: Place::Idle,
                normal: Queue::default(),
                low: Queue::default(),
                last_batch: 1,
                max_batch: 1,
                max_delay: Duration::ZERO,
                max_queue: 1,
            }),
            shared: Arc::clone(&self.shared),
            waiting: AtomicUsize::new(0),
        };
        slot.limit(limits);
        Arc::new(slot)
    }

    /// Ends the threads, once they have computed what waits. Blocks until then.
    pub fn stop(&self) {
        lock(&self.shared.ready).stopped = true;
        self.shared.wake.notify_all();
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            if thread.join().is_err() {
                tracing::error!("a thread that computes had panicked");
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.ready).stopped = true;
        self.shared.wake.notify_all();
    }
}

impl Slot {
    /// From now on within these limits.
    pub fn limit(&self, limits: &ServingLimits) {
        let mut state = lock(&self.state);
        state.max_batch = (limits.max_batch as usize).max(1);
        state.max_delay = Duration::from_micros(limits.max_delay_micros);
        state.max_queue = (limits.max_queue as usize).max(1);
    }

    /// Rows of callers that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// Queues rows of a caller.
    pub fn push(self: &Arc<Self>, job: Job) -> Result<(), Full> {
        let mut state = lock(&self.state);
        let room = state.max_queue;
        state.normal.push(job, room)?;
        self.waiting.store(state.normal.rows, Relaxed);
        let enough = state.normal.rows >= state.last_batch.min(state.max_batch);
        match state.place {
            Place::Idle => {}
            Place::ReadyLow | Place::Delayed if state.place == Place::ReadyLow || enough => {
                let mut ready = lock(&self.shared.ready);
                let me = |slot: &Arc<Self>| Arc::ptr_eq(slot, self);
                if let Some(at) = ready.low.iter().position(me) {
                    ready.low.remove(at);
                } else if let Some(at) = ready.delayed.iter().position(|(_, slot)| me(slot)) {
                    ready.delayed.swap_remove(at);
                } else {
                    // A thread has just taken it.
                    return Ok(());
                }
                state.place = Place::Ready;
                ready.normal.push_back(Arc::clone(self));
                drop(ready);
                drop(state);
                self.shared.wake.notify_one();
                return Ok(());
            }
            _ => return Ok(()),
        }
        state.place = Place::Ready;
        lock(&self.shared.ready).normal.push_back(Arc::clone(self));
        drop(state);
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Queues a copy for a shadow.
    pub fn push_low(self: &Arc<Self>, job: Job) -> Result<(), Full> {
        let mut state = lock(&self.state);
        let room = state.max_queue;
        state.low.push(job, room)?;
        if state.place == Place::Idle {
            state.place = Place::ReadyLow;
            lock(&self.shared.ready).low.push_back(Arc::clone(self));
            drop(state);
            self.shared.wake.notify_one();
        }
        Ok(())
    }

    /// Computes one batch, and says what is next.
    fn turn(self: &Arc<Self>) {
        let (batch, max_batch) = {
            let mut state = lock(&self.state);
            state.place = Place::Running;
            let max_batch = state.max_batch;
            let now = Instant::now();
            let mut batch = state.normal.batch(max_batch, now);
            self.waiting.store(state.normal.rows, Relaxed);
            if batch.is_empty() {
                batch = state.low.batch(max_batch, now);
            } else {
                state.last_batch = batch.iter().map(|job| job.rows.rows).sum();
            }
            (batch, max_batch)
        };
        if !batch.is_empty() {
            self.compute(batch);
        }
        let mut state = lock(&self.state);
        let mut ready = lock(&self.shared.ready);
        if let Some(first) = state.normal.jobs.front() {
            let due = first.at + state.max_delay;
            let enough = state.normal.rows >= state.last_batch.min(max_batch);
            if enough || ready.stopped || due <= Instant::now() {
                state.place = Place::Ready;
                ready.normal.push_back(Arc::clone(self));
            } else {
                state.place = Place::Delayed;
                ready.delayed.push((due, Arc::clone(self)));
            }
        } else if state.low.jobs.is_empty() {
            state.place = Place::Idle;
        } else {
            state.place = Place::ReadyLow;
            ready.low.push_back(Arc::clone(self));
        }
    }

    fn compute(&self, mut batch: Vec<Job>) {
        let joined = match batch.as_mut_slice() {
            [only] => std::mem::take(&mut only.rows),
            _ => {
                let mut joined = Matrix::default();
                for job in &batch {
                    joined.cols = job.rows.cols;
                    joined.rows += job.rows.rows;
                    joined.data.extend_from_slice(&job.rows.data);
                }
                joined
            }
        };
        self.forward.computed(joined.rows);
        let outputs = catch_unwind(AssertUnwindSafe(|| self.forward.forward(&joined)));
        let outputs = outputs.unwrap_or_else(|_| Err("the forward panicked".to_owned()));
        let outputs = outputs.and_then(|outputs| {
            let whole =
                outputs.rows == joined.rows && outputs.rows * outputs.cols == outputs.data.len();
            whole
                .then_some(outputs)
                .ok_or_else(|| "the network gave outputs of another size".to_owned())
        });
        match (outputs, batch.len()) {
            (Ok(outputs), 1) => {
                if let Some(job) = batch.pop() {
                    job.reply.send(Ok(outputs));
                }
            }
            (Ok(outputs), _) => {
                let mut start = 0;
                for job in batch {
                    let end = start + job.rows.rows;
                    let own = Matrix {
                        rows: job.rows.rows,
                        cols: outputs.cols,
                        data: outputs.data[start * outputs.cols..end * outputs.cols].to_vec(),
                    };
                    start = end;
                    job.reply.send(Ok(own));
                }
            }
            (Err(why), _) => {
                for job in batch {
                    job.reply.send(Err(NotComputed::Failed(why.clone())));
                }
            }
        }
    }
}

impl Shared {
    /// One thread, until the pool is stopped and nothing waits.
    fn work(&self) {
        loop {
            let mut ready = lock(&self.ready);
            let (slot, low) = loop {
                let now = Instant::now();
                let mut next_due: Option<Instant> = None;
                let mut at = 0;
                while let Some((due, _)) = ready.delayed.get(at) {
                    if *due <= now || ready.stopped {
                        let (_, slot) = ready.delayed.swap_remove(at);
                        ready.normal.push_back(slot);
                    } else {
                        next_due = Some(next_due.map_or(*due, |next| next.min(*due)));
                        at += 1;
                    }
                }
                if let Some(slot) = ready.normal.pop_front() {
                    break (slot, false);
                }
                if ready.low_running < self.most_low
                    && let Some(slot) = ready.low.pop_front()
                {
                    ready.low_running += 1;
                    break (slot, true);
                }
                if ready.stopped {
                    return;
                }
                ready = match next_due {
                    None => self
                        .wake
                        .wait(ready)
                        .unwrap_or_else(PoisonError::into_inner),
                    Some(due) => {
                        let left = due.saturating_duration_since(now);
                        let waited = self.wake.wait_timeout(ready, left);
                        waited.unwrap_or_else(PoisonError::into_inner).0
                    }
                };
            };
            // Whoever was woken for what is left may have found nothing when it looked.
            let more =
                !(ready.normal.is_empty() && ready.low.is_empty() && ready.delayed.is_empty());
            drop(ready);
            if more {
                self.wake.notify_one();
            }
            slot.turn();
            if low {
                lock(&self.ready).low_running -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests;
