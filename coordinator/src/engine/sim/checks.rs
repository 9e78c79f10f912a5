//! The invariants, checked from the outside: on every write and on everything that is let out.
//!
//! - I3: a task is committed at most once (until its run is retried).
//! - I4: terms and attempt numbers of a key never go down; a deposed leader writes nothing.
//! - I5: a committed task names the outputs of its current attempt.
//! - I7: an attempt starts only on inputs that are committed.
//! - I2: a run that was acknowledged is in the store; so is every result that was acknowledged.
//! - I13: no value is over its bound.
//! - Nothing is let out before its commit: an assignment stands in the store when it goes out.

use std::collections::BTreeMap;

use emberline_common::ids::{AttemptId, Digest, RunId};

use crate::engine::{
    api::{Assignment, Write},
    records::{MAX_VALUE_BYTES, RunRecord, TaskRecord, Written, keys},
};

/// The store, and what the checks remember of its past.
#[derive(Debug, Default)]
pub(super) struct Store {
    pub records: BTreeMap<String, Vec<u8>>,
    /// Attempts that were committed, by task key.
    committed: BTreeMap<String, u32>,
}

/// What an attempt of the simulation produces.
pub(super) fn output_of(id: &AttemptId) -> Digest {
    Digest::of(id.to_string().as_bytes())
}

impl Store {
    pub fn task(&self, id: &AttemptId) -> Option<TaskRecord> {
        let value = self.records.get(&keys::task(&id.run, &id.task))?;
        serde_json::from_slice(value).ok()
    }

    pub fn knows(&self, run: &RunId) -> bool {
        self.records.contains_key(&keys::run(run)) || self.records.contains_key(&keys::ended(run))
    }

    /// Applies one decision's writes, as one transaction.
    pub fn apply(&mut self, writes: &[Write]) -> Result<(), String> {
        for write in writes {
            match write {
                Write::Put { key, value } => {
                    self.check_put(key, value)?;
                    self.records.insert(key.clone(), value.clone());
                }
                Write::Delete { key } => {
                    if key.starts_with("tasks/") {
                        self.committed.remove(key);
                    }
                    self.records.remove(key);
                }
            }
        }
        Ok(())
    }

    fn check_put(&self, key: &str, value: &[u8]) -> Result<(), String> {
        if value.len() > MAX_VALUE_BYTES || key.len() > 512 {
            return Err(format!("I13: {key} has {} bytes", value.len()));
        }
        let old = self.records.get(key);
        if key.starts_with("runs/") {
            let new: RunRecord = parse(key, value)?;
            if let Some(old) = old {
                let old: RunRecord = parse(key, old)?;
                if new.epoch < old.epoch {
                    return Err(format!("I4: {key}: term {} after {}", new.epoch, old.epoch));
                }
                if old.ended.is_some() && old.ended != new.ended {
                    return Err(format!("I3: {key} ended twice"));
                }
            }
        }
        if !key.starts_with("tasks/") {
            return Ok(());
        }
        let new: TaskRecord = parse(key, value)?;
        if let Some(old) = old {
            let old: TaskRecord = parse(key, old)?;
            if new.epoch < old.epoch || new.attempt < old.attempt {
                return Err(format!(
                    "I4: {key}: term {} attempt {} after term {} attempt {}",
                    new.epoch, new.attempt, old.epoch, old.attempt
                ));
            }
            let done = matches!(old.written, Written::Succeeded | Written::Cached);
            if done && new.written != old.written {
                return Err(format!("I3: {key} was committed, and is {:?} now", new.written));
            }
            if done && new.outputs != old.outputs {
                return Err(format!("I3: {key} was committed twice"));
            }
        }
        if new.written == Written::Succeeded {
            let mut parts = key.split('/').skip(1);
            let (run, task) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
            let text = format!("{run}/{task}/{}", new.attempt);
            let wanted = Digest::of(text.as_bytes());
            if new.outputs.iter().any(|output| output.manifest != wanted) {
                return Err(format!("I5: {key} names outputs of another attempt"));
            }
        }
        Ok(())
    }

    /// Checks an assignment that goes out.
    pub fn check_assignment(&self, assignment: &Assignment) -> Result<(), String> {
        let id = &assignment.id;
        let record = self.task(id).ok_or_else(|| format!("{id} goes out, but is not stored"))?;
        // A later decision may be committed already when this one's effects go out; never an
        // earlier one only.
        if record.attempt < id.attempt {
            return Err(format!("{id} goes out before its commit"));
        }
        if record.attempt == id.attempt && record.epoch < assignment.epoch {
            return Err(format!("{id} goes out before the commit of its term"));
        }
        for input in &assignment.inputs {
            let producer = AttemptId {
                run: id.run.clone(),
                task: input.producer.clone(),
                attempt: 0,
            };
            let stored = self.task(&producer);
            let named = stored.is_some_and(|r| r.outputs.contains(&input.artifact));
            if !named {
                return Err(format!("I7: {id} reads {} before its commit", input.producer));
            }
        }
        Ok(())
    }

    /// Checks that a report was taken before its worker is told so.
    pub fn check_ack(&self, id: &AttemptId) -> Result<(), String> {
        match self.task(id) {
            Some(record) if record.reported >= id.attempt => Ok(()),
            Some(_) => Err(format!("I2: {id} is acknowledged before its commit")),
            // Archived since.
            None => Ok(()),
        }
    }
}

fn parse<T: serde::de::DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, String> {
    serde_json::from_slice(value).map_err(|error| format!("{key} cannot be read: {error}"))
}
