//! A bounded queue, and the task that takes from it and exports.
//!
//! Whoever hands something over never waits. While the collector is down the batch under way is
//! tried again for a while, the queue fills, and what finds it full is dropped and counted.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::settings::Batching;

/// How long a batch is tried again before it is given up.
const TRY_FOR: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// How often it is said that something was dropped.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// How long somebody who has the time waits for room before it is taken that there will be none.
const WAIT_FOR_ROOM: Duration = Duration::from_secs(1);

/// Sends a batch somewhere.
pub(super) trait Export<T>: Send + 'static {
    /// Whether it has arrived; if not, why.
    fn export(&self, batch: &[T]) -> impl Future<Output = Result<(), String>> + Send;
}

/// The end that is handed items.
#[derive(Debug)]
pub(super) struct Inlet<T> {
    queue: mpsc::Sender<T>,
    pub dropped: Arc<AtomicU64>,
    /// Whether it is worth waiting for room: not while what was there last did not get out.
    moves: Arc<AtomicBool>,
}

impl<T> Inlet<T> {
    /// Never waits.
    pub fn put(&self, item: T) {
        if self.queue.try_send(item).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Waits until there is room for so many, if it may come to be: for whoever has the time.
    pub async fn room(&self, number: usize) {
        let number = number.min(self.queue.max_capacity());
        if self.queue.capacity() >= number || !self.moves.load(Relaxed) {
            return;
        }
        if timeout(WAIT_FOR_ROOM, self.queue.reserve_many(number))
            .await
            .is_err()
        {
            self.moves.store(false, Relaxed);
        }
    }

    /// Whether the next item would be dropped, and waiting is of no use.
    pub fn is_stuck(&self) -> bool {
        self.is_full() && !self.moves.load(Relaxed)
    }

    /// Whether the next item would be dropped; it is counted as if it had been made.
    pub fn is_full(&self) -> bool {
        self.queue.capacity() == 0
    }
}

/// A queue that hands its items to the receiver.
pub(super) fn inlet<T>(capacity: usize) -> (Inlet<T>, mpsc::Receiver<T>) {
    let (queue, received) = mpsc::channel(capacity);
    let inlet = Inlet {
        queue,
        dropped: Arc::default(),
        moves: Arc::new(AtomicBool::new(true)),
    };
    (inlet, received)
}

/// What the ends of a queue let each other know.
#[derive(Debug, Clone)]
pub(super) struct Signs {
    dropped: Arc<AtomicU64>,
    moves: Arc<AtomicBool>,
}

impl<T> Inlet<T> {
    /// For whoever takes the items out.
    pub fn signs(&self) -> Signs {
        Signs {
            dropped: Arc::clone(&self.dropped),
            moves: Arc::clone(&self.moves),
        }
    }
}

/// Exports until `stop`, and then what is left until `deadline` (which is set by then).
pub(super) async fn export_all<T: Send + Sync, E: Export<T>>(
    what: &'static str,
    mut queue: mpsc::Receiver<T>,
    exporter: E,
    batching: Batching,
    Signs { dropped, moves }: Signs,
    stop: CancellationToken,
) {
    let mut batch: Vec<T> = Vec::with_capacity(batching.batch);
    let mut said = Said::default();
    loop {
        // The first one begins a batch, the rest have a while to join it.
        let open = tokio::select! {
            taken = queue.recv_many(&mut batch, batching.batch) => taken > 0,
            () = stop.cancelled() => false,
        };
        let until = Instant::now() + batching.delay;
        while open && batch.len() < batching.batch {
            let room = batching.batch - batch.len();
            tokio::select! {
                taken = timeout_at(until, queue.recv_many(&mut batch, room)) => {
                    if !matches!(taken, Ok(1..)) {
                        break;
                    }
                }
                () = stop.cancelled() => break,
            }
        }
        while let Some(room) = batching
            .batch
            .checked_sub(batch.len())
            .filter(|room| *room > 0)
        {
            match queue.try_recv() {
                Ok(item) if room > 0 => batch.push(item),
                _ => break,
            }
        }
        if batch.is_empty() {
            if stop.is_cancelled() || !open {
                return;
            }
            continue;
        }
        // While it is tried again, others may find no room.
        let failed = |why: &str| {
            moves.store(false, Relaxed);
            said.failure = Some(why.to_owned());
            said.say(what, dropped.load(Relaxed));
        };
        let sent = send(&exporter, &batch, batching.timeout, &stop, failed).await;
        moves.store(sent.is_ok(), Relaxed);
        said.failure = sent.err();
        if said.failure.is_some() {
            dropped.fetch_add(batch.len() as u64, Relaxed);
        }
        batch.clear();
        said.say(what, dropped.load(Relaxed));
    }
}

async fn send<T, E: Export<T>>(
    exporter: &E,
    batch: &[T],
    each: Duration,
    stop: &CancellationToken,
    mut failed: impl FnMut(&str),
) -> Result<(), String> {
    let give_up = Instant::now() + TRY_FOR;
    let mut pause = FIRST_PAUSE;
    loop {
        let tried = timeout(each, exporter.export(batch)).await;
        let why = match tried {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => why,
            Err(_) => format!("no answer within {each:?}"),
        };
        failed(&why);
        if stop.is_cancelled() || Instant::now() + pause > give_up {
            return Err(why);
        }
        tokio::select! {
            () = sleep(pause) => {}
            // One last time.
            () = stop.cancelled() => {}
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Says now and then what was dropped.
#[derive(Default)]
struct Said {
    dropped: u64,
    at: Option<Instant>,
    failure: Option<String>,
}

impl Said {
    fn say(&mut self, what: &str, dropped: u64) {
        let due = self.at.is_none_or(|at| at.elapsed() >= SAY_EVERY);
        if dropped == self.dropped || !due {
            return;
        }
        let number = dropped - self.dropped;
        (self.dropped, self.at) = (dropped, Some(Instant::now()));
        match self.failure.take() {
            Some(why) => {
                tracing::warn!(number, %why, "{what} were dropped: the collector does not take them")
            }
            None => tracing::warn!(
                number,
                "{what} were dropped: more are made than the collector takes"
            ),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    const BATCHING: Batching = Batching {
        queue: 4,
        batch: 2,
        delay: Duration::from_millis(1),
        timeout: Duration::from_millis(50),
    };

    /// Keeps what it gets; refuses the first few times.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u32>>>, Arc<AtomicU64>);

    impl Export<u32> for Kept {
        async fn export(&self, batch: &[u32]) -> Result<(), String> {
            let refuse = |n: u64| n.checked_sub(1);
            if self.1.fetch_update(Relaxed, Relaxed, refuse).is_ok() {
                return Err("not now".into());
            }
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    /// Never answers.
    struct Hole;

    impl Export<u32> for Hole {
        async fn export(&self, _: &[u32]) -> Result<(), String> {
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn everything_arrives_in_order_although_the_collector_was_away() {
        let (inlet, queue) = inlet(BATCHING.queue);
        let kept = Kept(Arc::default(), Arc::new(AtomicU64::new(1)));
        let stop = CancellationToken::new();
        let signs = inlet.signs();
        let task = tokio::spawn(export_all(
            "spans",
            queue,
            kept.clone(),
            BATCHING,
            signs,
            stop.clone(),
        ));
        for number in 0..4 {
            inlet.put(number);
        }
        let arrived = async {
            while kept.0.lock().unwrap().len() < 4 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(20), arrived).await.unwrap();
        stop.cancel();
        task.await.unwrap();
        assert_eq!(*kept.0.lock().unwrap(), [0, 1, 2, 3]);
        assert_eq!(inlet.dropped.load(Relaxed), 0);
    }

    #[tokio::test]
    async fn what_there_is_no_room_for_is_counted_and_nobody_waits() {
        let (inlet, queue) = inlet(BATCHING.queue);
        let stop = CancellationToken::new();
        let signs = inlet.signs();
        for number in 0..10 {
            inlet.put(number);
        }
        assert_eq!(inlet.dropped.load(Relaxed), 6);
        assert!(inlet.is_full());
        let task = tokio::spawn(export_all(
            "spans",
            queue,
            Hole,
            BATCHING,
            signs,
            stop.clone(),
        ));
        stop.cancel();
        drop(inlet.queue);
        task.await.unwrap();
        assert_eq!(
            inlet.dropped.load(Relaxed),
            10,
            "all of it is lost, and counted"
        );
    }

    #[tokio::test]
    async fn what_is_left_at_the_end_is_still_sent() {
        let (inlet, queue) = inlet(BATCHING.queue);
        let kept = Kept::default();
        let stop = CancellationToken::new();
        for number in 0..3 {
            inlet.put(number);
        }
        stop.cancel();
        let signs = inlet.signs();
        export_all("spans", queue, kept.clone(), BATCHING, signs, stop).await;
        assert_eq!(*kept.0.lock().unwrap(), [0, 1, 2]);
    }

    #[tokio::test]
    async fn who_has_the_time_waits_for_room_but_not_for_a_collector_that_takes_nothing() {
        let (inlet, mut queue) = inlet(BATCHING.queue);
        for number in 0..4 {
            inlet.put(number);
        }
        let waits = async {
            inlet.room(2).await;
            inlet.put(4);
        };
        let takes = async {
            queue.recv().await;
            queue.recv().await;
        };
        tokio::join!(waits, takes);
        assert_eq!(inlet.dropped.load(Relaxed), 0);
        inlet.put(5);
        let begun = Instant::now();
        // Once for as long as it takes to know better, and then not any more.
        inlet.room(2).await;
        assert!(begun.elapsed() >= WAIT_FOR_ROOM);
        inlet.room(2).await;
        assert!(begun.elapsed() < WAIT_FOR_ROOM * 2);
        assert!(inlet.is_stuck());
        inlet.signs().moves.store(true, Relaxed);
        assert!(!inlet.is_stuck(), "it is only full");
        let (stop, signs) = (CancellationToken::new(), inlet.signs());
        let kept = Kept::default();
        let exporting = export_all("spans", queue, kept, BATCHING, signs, stop.clone());
        let exporting = tokio::spawn(exporting);
        inlet.room(BATCHING.queue + 1).await;
        stop.cancel();
        exporting.await.unwrap();
    }
}
