//! What has been decided and is not committed yet: writes, and what may be told after them.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
};

use crate::{
    engine::api::{Effect, Write},
    store::BatchLimits,
};

/// Something that leaves the runtime once the writes decided before it are durable.
pub(super) enum Out {
    /// The engine's.
    Effect(Effect),
    /// An answer to whoever asked. It only hands a value over.
    Answer(Box<dyn FnOnce() + Send>),
    /// A watcher to add: it sees what comes after this, not what came before.
    Subscribe(super::watchers::Watcher),
}

/// The decisions that will be committed together.
#[derive(Default)]
pub(super) struct Batch {
    writes: Vec<Write>,
    /// Where a key stands in `writes`: only its last value is written.
    place: HashMap<String, usize>,
    /// Prefixes that it removes: no key below them may be written after that in the same batch.
    removed: Vec<String>,
    bytes: usize,
    outs: Vec<Out>,
}

/// What waits for one commit, at most.
const MAX_OUTS: usize = 10_000;

impl Batch {
    /// Whether these writes of one decision go into it. An empty one takes any, however many.
    pub(super) fn takes(&self, writes: &[Write], limits: BatchLimits) -> bool {
        if self.writes.is_empty() {
            return true;
        }
        let bytes: usize = writes.iter().map(size).sum();
        let under = |key: &str| self.removed.iter().any(|p| key.starts_with(p.as_str()));
        self.writes.len() + writes.len() <= limits.records
            && self.bytes + bytes <= limits.bytes
            && !writes.iter().any(|write| under(key(write)))
    }

    /// Whether so much waits for it that nothing more should be decided before its commit.
    pub(super) fn is_full(&self) -> bool {
        self.outs.len() >= MAX_OUTS
    }

    pub(super) fn write(&mut self, write: Write) {
        if let Write::DeletePrefix { prefix } = &write {
            self.remove(prefix);
            self.bytes += prefix.len();
            self.writes.push(write);
            return;
        }
        let size = size(&write);
        match self.place.entry(key(&write).to_owned()) {
            Entry::Occupied(place) => {
                if let Some(slot) = self.writes.get_mut(*place.get()) {
                    self.bytes = (self.bytes + size).saturating_sub(self::size(slot));
                    *slot = write;
                }
            }
            Entry::Vacant(place) => {
                place.insert(self.writes.len());
                self.bytes += size;
                self.writes.push(write);
            }
        }
    }

    /// What was written below the prefix before need not be written any more.
    fn remove(&mut self, prefix: &str) {
        self.removed.push(prefix.to_owned());
        let undone = |write: &Write| key(write).starts_with(prefix);
        if !self.writes.iter().any(undone) {
            return;
        }
        self.writes.retain(|write| !undone(write));
        self.place.clear();
        for (at, write) in self.writes.iter().enumerate() {
            if !matches!(write, Write::DeletePrefix { .. }) {
                self.place.insert(key(write).to_owned(), at);
            }
        }
        self.bytes = self.writes.iter().map(size).sum();
    }

    pub(super) fn out(&mut self, out: Out) {
        self.outs.push(out);
    }

    /// The writes, each key once, and what waits for them.
    pub(super) fn into_parts(self) -> (Vec<Write>, Vec<Out>) {
        (self.writes, self.outs)
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} writes, {} outs", self.writes.len(), self.outs.len())
    }
}

fn key(write: &Write) -> &str {
    match write {
        Write::Put { key, .. } | Write::Delete { key } | Write::DeletePrefix { prefix: key } => key,
    }
}

fn size(write: &Write) -> usize {
    match write {
        Write::Put { key, value } => key.len() + value.len(),
        Write::Delete { key } | Write::DeletePrefix { prefix: key } => key.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str) -> Write {
        Write::Put {
            key: key.to_owned(),
            value: value.as_bytes().to_vec(),
        }
    }

    #[test]
    fn a_key_that_several_decisions_write_is_written_once() {
        let mut batch = Batch::default();
        batch.write(put("a", "1"));
        batch.write(put("b", "1"));
        batch.write(put("a", "22"));
        batch.write(Write::Delete { key: "b".into() });
        assert_eq!(batch.bytes, 1 + 2 + 1);
        let (writes, _) = batch.into_parts();
        assert_eq!(writes, [put("a", "22"), Write::Delete { key: "b".into() }]);
    }

    #[test]
    fn a_batch_takes_a_decision_whole_or_not_at_all() {
        let limits = BatchLimits {
            records: 2,
            bytes: 10,
        };
        let mut batch = Batch::default();
        let large = [put("a", "1"), put("b", "1"), put("c", "1")];
        assert!(batch.takes(&large, limits), "alone it is one commit");
        batch.write(put("a", "1"));
        assert!(batch.takes(&[put("b", "1")], limits));
        assert!(!batch.takes(&large[1..], limits), "too many");
        assert!(!batch.takes(&[put("b", "123456789")], limits), "too large");
    }

    #[test]
    fn what_waits_for_a_batch_is_bounded_although_nothing_is_written() {
        let mut batch = Batch::default();
        for _ in 0..MAX_OUTS {
            assert!(!batch.is_full());
            batch.out(Out::Answer(Box::new(|| ())));
        }
        assert!(batch.is_full());
    }

    #[test]
    fn a_prefix_that_is_removed_undoes_what_was_written_below_it() {
        let limits = BatchLimits {
            records: 10,
            bytes: 1000,
        };
        let mut batch = Batch::default();
        batch.write(put("x", "1"));
        batch.write(put("t/1", "1"));
        batch.write(put("y", "1"));
        let none = Write::DeletePrefix {
            prefix: "t/".into(),
        };
        batch.write(none.clone());
        assert!(!batch.takes(&[put("t/2", "1")], limits), "not in the same");
        assert!(batch.takes(&[put("u", "1")], limits));
        batch.write(put("y", "2"));
        let (writes, _) = batch.into_parts();
        assert_eq!(writes, [put("x", "1"), put("y", "2"), none]);
    }
}
