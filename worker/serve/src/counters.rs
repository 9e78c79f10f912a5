//! What is counted of a version while it answers. Many requests count at once: what each of them
//! touches is spread over several shards, which are only added up when somebody reads.

use std::{
    cell::Cell,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use emberline_common::serving::{
    LATENCY_BOUNDS_MICROS, LatencyHistogram, PREDICTION_BINS, Quality, VersionStats,
};
use emberline_train::{model::Predictions, reference::prediction_bins};

use crate::{columns::Named, drift::Drift};

/// Shards: more than cores that would contend are of no use.
const SHARDS: usize = 8;

/// The shard of this thread.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<usize> = Cell::new(NEXT.fetch_add(1, Relaxed) % SHARDS);
    }
    MINE.with(Cell::get)
}

/// Counts of several things, by place.
#[derive(Debug)]
pub(crate) struct Sharded {
    shards: Vec<Box<[AtomicU64]>>,
}

impl Sharded {
    pub fn new(places: usize) -> Self {
        let shard = |_| (0..places).map(|_| AtomicU64::new(0)).collect();
        Self {
            shards: (0..SHARDS).map(shard).collect(),
        }
    }

    /// The counts of this thread.
    pub fn mine(&self) -> &[AtomicU64] {
        &self.shards[shard()]
    }

    /// All of them together.
    pub fn sum(&self) -> Vec<u64> {
        let places = self.shards.first().map_or(0, |shard| shard.len());
        let at = |place: usize| self.shards.iter().map(|s| s[place].load(Relaxed)).sum();
        (0..places).map(at).collect()
    }
}

const REQUESTS: usize = 0;
const ROWS: usize = 1;
const LATENCY_SUM: usize = 2;
const LATENCY: usize = 3;
const PREDICTIONS: usize = LATENCY + LATENCY_BOUNDS_MICROS.len() + 1;
const PLACES: usize = PREDICTIONS + PREDICTION_BINS;

/// The counts of one version.
#[derive(Debug)]
pub(crate) struct Counters {
    hot: Sharded,
    // What should be rare needs no shards.
    errors: AtomicU64,
    rejected: AtomicU64,
    overloaded: AtomicU64,
    quality: Mutex<Quality>,
    pub drift: Drift,
}

impl Counters {
    pub fn new(drift: Drift) -> Self {
        Self {
            hot: Sharded::new(PLACES),
            errors: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            overloaded: AtomicU64::new(0),
            quality: Mutex::default(),
            drift,
        }
    }

    /// A request was answered.
    pub fn answered(&self, took: Duration, inputs: &Named<'_>, predictions: &Predictions) {
        let hot = self.hot.mine();
        let add = |place: usize, by: u64| {
            hot[place].fetch_add(by, Relaxed);
        };
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX >> 8);
        add(REQUESTS, 1);
        add(ROWS, inputs.columns.rows as u64);
        add(LATENCY_SUM, micros);
        let bucket = LATENCY_BOUNDS_MICROS.partition_point(|bound| *bound < micros);
        add(LATENCY + bucket, 1);
        prediction_bins(predictions, |bin| add(PREDICTIONS + bin, 1));
        self.drift.count(inputs);
    }

    /// A request failed by the version's or the worker's fault.
    pub fn failed(&self, rows: usize) {
        let hot = self.hot.mine();
        hot[REQUESTS].fetch_add(1, Relaxed);
        hot[ROWS].fetch_add(rows as u64, Relaxed);
        self.errors.fetch_add(1, Relaxed);
    }

    /// A request was refused for what it held.
    pub fn rejected(&self) {
        self.rejected.fetch_add(1, Relaxed);
    }

    /// A request was refused for lack of room.
    pub fn overloaded(&self) {
        self.overloaded.fetch_add(1, Relaxed);
    }

    /// Counts a label.
    pub fn quality(&self, count: impl FnOnce(&mut Quality)) {
        count(&mut self.quality.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// As they are now.
    pub fn read(&self) -> VersionStats {
        let mut hot = self.hot.sum();
        let mut predictions = hot.split_off(PREDICTIONS);
        let counts = hot.split_off(LATENCY);
        let latency = LatencyHistogram {
            counts: if counts.iter().all(|count| *count == 0) {
                Vec::new()
            } else {
                counts
            },
            sum_micros: hot[LATENCY_SUM],
        };
        let used = predictions.iter().rposition(|count| *count > 0);
        predictions.truncate(used.map_or(0, |last| last + 1));
        let quality = self.quality.lock().unwrap_or_else(PoisonError::into_inner);
        VersionStats {
            requests: hot[REQUESTS],
            rows: hot[ROWS],
            errors: self.errors.load(Relaxed),
            rejected: self.rejected.load(Relaxed),
            overloaded: self.overloaded.load(Relaxed),
            latency,
            prediction_drift: self.drift.of_predictions(&predictions),
            predictions,
            quality: quality.clone(),
            input_drift: self.drift.of_inputs(),
        }
    }

    /// Requests, errors, rejected, overloaded: for metrics, cheaper than all.
    pub fn outcomes(&self) -> [(&'static str, u64); 4] {
        let requests: u64 = self
            .hot
            .shards
            .iter()
            .map(|s| s[REQUESTS].load(Relaxed))
            .sum();
        let errors = self.errors.load(Relaxed);
        [
            ("answered", requests.saturating_sub(errors)),
            ("error", errors),
            ("rejected", self.rejected.load(Relaxed)),
            ("overloaded", self.overloaded.load(Relaxed)),
        ]
    }
}
