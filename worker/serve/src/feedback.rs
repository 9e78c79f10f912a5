//! What was answered not long ago, so that a label that comes back by a request's id can be held
//! against the prediction. Bounded in number, in size and in time: the oldest are forgotten first.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use emberline_train::{fit::most_probable, model::Predictions};

use crate::{counters::Counters, error::cut};

/// Requests of one model that are remembered.
const MAX_REQUESTS: usize = 100_000;
/// Numbers of their predictions: 32 MiB.
const MAX_NUMBERS: usize = 4 << 20;
/// How long a label may take.
pub(crate) const REMEMBERED: Duration = Duration::from_secs(3600);
/// Parts, each with a lock of its own.
const SHARDS: usize = 8;

/// What one version said of a request.
#[derive(Debug, Clone)]
pub(crate) struct Given {
    pub version: u32,
    pub counters: Arc<Counters>,
    pub predictions: Arc<Predictions>,
    pub classes: Arc<[String]>,
}

/// What turned out to be true of a row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Truth {
    Class(String),
    Value(f64),
}

/// What became of a label.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Labelled {
    /// Counted for that version, which had predicted this; perhaps there is something to say of it.
    Counted {
        version: u32,
        predicted: Truth,
        note: Option<String>,
    },
    Repeated(u32),
    Unknown,
    Refused(String),
}

#[derive(Debug)]
struct Entry {
    at: Instant,
    rows: usize,
    /// The one that the caller got, and perhaps a shadow's.
    given: Vec<Given>,
    /// A bit for each row that has its label.
    labelled: Vec<u64>,
}

impl Entry {
    fn numbers(&self) -> usize {
        let of = |given: &Given| match &*given.predictions {
            Predictions::Probabilities { values, .. } | Predictions::Values(values) => values.len(),
        };
        self.given.iter().map(of).sum()
    }
}

#[derive(Debug, Default)]
struct Shard {
    entries: HashMap<Arc<str>, Entry>,
    /// By age; an id that came again is here again.
    order: VecDeque<(Arc<str>, Instant)>,
    numbers: usize,
}

impl Shard {
    fn forget(&mut self, id: &str) {
        if let Some(entry) = self.entries.remove(id) {
            self.numbers -= entry.numbers();
        }
    }

    fn make_room(&mut self, now: Instant) {
        while let Some((id, at)) = self.order.front() {
            let full =
                self.order.len() > MAX_REQUESTS / SHARDS || self.numbers > MAX_NUMBERS / SHARDS;
            if !full && now.duration_since(*at) < REMEMBERED {
                return;
            }
            let (id, at) = (Arc::clone(id), *at);
            self.order.pop_front();
            if self.entries.get(&*id).is_some_and(|entry| entry.at == at) {
                self.forget(&id);
            }
        }
    }
}

/// The requests of one model that were answered not long ago.
#[derive(Debug)]
pub(crate) struct Answered {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
}

impl Default for Answered {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::new(),
        }
    }
}

impl Answered {
    fn with<T>(&self, id: &str, work: impl FnOnce(&mut Shard) -> T) -> T {
        #[allow(clippy::cast_possible_truncation, reason = "a remainder")]
        let place = self.hasher.hash_one(id) as usize % SHARDS;
        work(
            &mut self.shards[place]
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// A request was answered.
    pub fn note(&self, id: &Arc<str>, rows: usize, given: Given, now: Instant) {
        self.with(id, |shard| {
            // An id that is used again means the newer one.
            shard.forget(id);
            let entry = Entry {
                at: now,
                rows,
                given: vec![given],
                labelled: Vec::new(),
            };
            shard.numbers += entry.numbers();
            shard.entries.insert(Arc::clone(id), entry);
            shard.order.push_back((Arc::clone(id), now));
            shard.make_room(now);
        });
    }

    /// A shadow has answered the same request, before a label came.
    pub fn note_shadow(&self, id: &str, rows: usize, given: Given) {
        self.with(id, |shard| {
            let Some(entry) = shard.entries.get_mut(id) else {
                return;
            };
            let fits = entry.rows == rows && entry.labelled.is_empty() && entry.given.len() == 1;
            if fits {
                let before = entry.numbers();
                entry.given.push(given);
                shard.numbers += entry.numbers() - before;
            }
        });
    }

    /// A label came back.
    pub fn label(&self, id: &str, row: u32, truth: &Truth, now: Instant) -> Labelled {
        self.with(id, |shard| {
            let entry = shard.entries.get_mut(id);
            let entry = entry.filter(|entry| now.duration_since(entry.at) < REMEMBERED);
            let Some(entry) = entry else {
                return Labelled::Unknown;
            };
            let at = row as usize;
            if at >= entry.rows {
                return Labelled::Refused(format!(
                    "the request had {} rows: there is no row {row} (counted from 0)",
                    entry.rows
                ));
            }
            let Some(first) = entry.given.first() else {
                return Labelled::Unknown;
            };
            let version = first.version;
            let (predicted, note) = match first.hold_against(at, truth) {
                Ok(seen) => seen,
                Err(why) => return Labelled::Refused(why),
            };
            if entry.labelled.is_empty() {
                entry.labelled = vec![0; entry.rows.div_ceil(64)];
            }
            let (word, bit) = (at / 64, 1u64 << (at % 64));
            if entry.labelled[word] & bit != 0 {
                return Labelled::Repeated(version);
            }
            entry.labelled[word] |= bit;
            for given in &entry.given {
                given.count(at, truth);
            }
            Labelled::Counted {
                version,
                predicted,
                note,
            }
        })
    }

    /// Requests that are remembered.
    #[cfg(test)]
    fn len(&self) -> usize {
        let of = |shard: &Mutex<Shard>| shard.lock().map_or(0, |s| s.entries.len());
        self.shards.iter().map(of).sum()
    }
}

/// Whether a number is as good as an integer.
fn is_whole(value: f64) -> bool {
    value.fract() == 0.0 && value.abs() < 9e15
}

impl Given {
    /// What was predicted of a row, if the truth is of its kind; and what is to be said of that.
    fn hold_against(&self, row: usize, truth: &Truth) -> Result<(Truth, Option<String>), String> {
        match (&*self.predictions, truth) {
            (Predictions::Values(values), Truth::Value(truth)) => match truth.is_finite() {
                true => Ok((
                    Truth::Value(values.get(row).copied().unwrap_or(f64::NAN)),
                    None,
                )),
                false => Err(format!("the label {truth} is no finite number")),
            },
            (Predictions::Values(_), Truth::Class(class)) => Err(format!(
                "the model predicts numbers: the label `{}` is none",
                cut(class)
            )),
            // A class that is written as a number.
            (Predictions::Probabilities { .. }, Truth::Value(value)) if is_whole(*value) => {
                self.hold_against(row, &Truth::Class(format!("{value:.0}")))
            }
            (Predictions::Probabilities { .. }, Truth::Value(value)) => Err(format!(
                "the model predicts classes: the label {value} is none"
            )),
            (Predictions::Probabilities { classes, values }, Truth::Class(class)) => {
                let of_row = values.get(row * classes..(row + 1) * classes);
                let predicted = most_probable(of_row.unwrap_or_default(), *classes);
                let predicted = predicted.first().map_or(0, |class| *class as usize);
                let known = self.classes.iter().any(|known| known == class);
                let note = (!known).then(|| {
                    let class = cut(class);
                    format!("the model does not know the class `{class}`: it counts as wrong")
                });
                let predicted = self.classes.get(predicted).cloned().unwrap_or_default();
                Ok((Truth::Class(predicted), note))
            }
        }
    }

    fn count(&self, row: usize, truth: &Truth) {
        match (&*self.predictions, truth) {
            (Predictions::Values(values), Truth::Value(truth)) => {
                if let Some(value) = values.get(row) {
                    self.counters.quality(|q| q.count_value(*value, *truth));
                }
            }
            (Predictions::Probabilities { classes, values }, Truth::Class(class)) => {
                let Some(of_row) = values.get(row * classes..(row + 1) * classes) else {
                    return;
                };
                let predicted = most_probable(of_row, *classes);
                let predicted = predicted.first().map_or(0, |class| *class as usize);
                let truth = self.classes.iter().position(|known| known == class);
                let probability = truth.and_then(|t| of_row.get(t)).copied().unwrap_or(0.0);
                self.counters
                    .quality(|q| q.count_class(predicted, truth, probability, *classes));
            }
            // A shadow of another kind than the version that answered.
            _ => {}
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::drift::Drift;

    fn given(counters: &Arc<Counters>, probability: f64) -> Given {
        Given {
            version: 3,
            counters: Arc::clone(counters),
            predictions: Arc::new(Predictions::Probabilities {
                classes: 2,
                values: vec![1.0 - probability, probability],
            }),
            classes: ["no".to_owned(), "yes".to_owned()].into(),
        }
    }

    fn class(name: &str) -> Truth {
        Truth::Class(name.to_owned())
    }

    #[test]
    fn a_row_is_counted_once_for_the_version_and_its_shadow() {
        let counters = [(); 2].map(|()| Arc::new(Counters::new(Drift::default())));
        let (answered, now) = (Answered::default(), Instant::now());
        let id: Arc<str> = "r".into();
        answered.note(&id, 1, given(&counters[0], 0.9), now);
        answered.note_shadow("r", 1, given(&counters[1], 0.2));
        let counted = answered.label("r", 0, &class("yes"), now);
        assert_eq!(
            counted,
            Labelled::Counted {
                version: 3,
                predicted: class("yes"),
                note: None
            }
        );
        let again = answered.label("r", 0, &class("no"), now);
        assert_eq!(again, Labelled::Repeated(3));
        let quality = counters.map(|c| c.read().quality);
        assert_eq!((quality[0].labels, quality[0].correct), (1, 1));
        assert_eq!((quality[1].labels, quality[1].correct), (1, 0));
    }

    #[test]
    fn labels_that_fit_nothing_are_told_apart() {
        let counters = Arc::new(Counters::new(Drift::default()));
        let (answered, now) = (Answered::default(), Instant::now());
        answered.note(&"r".into(), 1, given(&counters, 0.9), now);
        assert_eq!(
            answered.label("s", 0, &class("yes"), now),
            Labelled::Unknown
        );
        for (row, truth) in [(1, class("yes")), (0, Truth::Value(1.5))] {
            let refused = answered.label("r", row, &truth, now);
            assert!(matches!(refused, Labelled::Refused(_)), "{refused:?}");
        }
        let late = answered.label("r", 0, &class("yes"), now + REMEMBERED);
        assert_eq!(late, Labelled::Unknown);
        let unknown = answered.label("r", 0, &class("maybe"), now);
        assert!(matches!(unknown, Labelled::Counted { note: Some(_), .. }));
        assert_eq!(counters.read().quality.labels, 1);
    }

    #[test]
    fn the_oldest_are_forgotten_first() {
        let counters = Arc::new(Counters::new(Drift::default()));
        let (answered, now) = (Answered::default(), Instant::now());
        for n in 0..MAX_REQUESTS + 20_000 {
            answered.note(&n.to_string().into(), 1, given(&counters, 0.9), now);
        }
        assert!(answered.len() <= MAX_REQUESTS);
        assert_eq!(
            answered.label("0", 0, &class("yes"), now),
            Labelled::Unknown
        );
        let newest = (MAX_REQUESTS + 19_999).to_string();
        let newest = answered.label(&newest, 0, &class("yes"), now);
        assert!(matches!(newest, Labelled::Counted { .. }));
        // An id that is used again is not forgotten with its first use.
        let again = Answered::default();
        again.note(&"r".into(), 1, given(&counters, 0.9), now);
        again.note(&"r".into(), 1, given(&counters, 0.9), now + REMEMBERED / 2);
        again.note(&"s".into(), 1, given(&counters, 0.9), now + REMEMBERED);
        let label = again.label("r", 0, &class("yes"), now + REMEMBERED);
        assert!(matches!(label, Labelled::Counted { .. }));
    }
}
