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
    bytes: usize,
    outs: Vec<Out>,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.outs.is_empty()
    }

    /// Whether no further decision should be added. A single one may be larger than the limits.
    pub(super) fn is_full(&self, limits: BatchLimits) -> bool {
        self.writes.len() >= limits.records
            || self.bytes >= limits.bytes
            || self.outs.len() >= limits.records
    }

    pub(super) fn write(&mut self, write: Write) {
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
        Write::Put { key, .. } | Write::Delete { key } => key,
    }
}

fn size(write: &Write) -> usize {
    match write {
        Write::Put { key, value } => key.len() + value.len(),
        Write::Delete { key } => key.len(),
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
    fn a_batch_is_full_at_its_limits() {
        let limits = BatchLimits {
            records: 2,
            bytes: 10,
        };
        let mut batch = Batch::default();
        batch.write(put("a", "1"));
        assert!(!batch.is_full(limits));
        batch.write(put("b", "1"));
        assert!(batch.is_full(limits));
        let mut batch = Batch::default();
        batch.write(put("a", "123456789"));
        assert!(batch.is_full(limits));
    }
}
