//! Everything that was ever written below a prefix of etcd, and what must hold of it.
//!
//! It is read by a watch from the first revision on, so it has every version of every key and not
//! only the last; coordinators under test must not compact (`--etcd-compact-every 0`). The records
//! are parsed here as plain JSON: nothing of the coordinator's code is used, so that a mistake there
//! is none here too. Start with [`History::read_on`] and [`History::violations`].

use std::collections::{BTreeMap, BTreeSet};

use etcd_client::{Error, EventType, WatchOptions};
use serde_json::Value;

use crate::Etcd;

/// One write or removal.
#[derive(Debug, Clone)]
pub struct Event {
    /// The revision that it made.
    pub revision: i64,
    /// The revision that made the key, if it is a write.
    pub created: i64,
    /// The key, without the prefix and its slash.
    pub key: String,
    /// What was written; `None` if the key was removed.
    pub value: Option<Vec<u8>>,
}

impl Event {
    fn json(&self) -> Option<Value> {
        serde_json::from_slice(self.value.as_ref()?).ok()
    }
}

/// A key that a run's life is told by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind<'a> {
    Run(&'a str),
    Task(&'a str, &'a str),
    Ended(&'a str),
}

fn kind_of(key: &str) -> Option<Kind<'_>> {
    let (kind, rest) = key.strip_prefix("state/")?.split_once('/')?;
    match kind {
        "runs" => Some(Kind::Run(rest)),
        "tasks" => rest
            .split_once('/')
            .map(|(run, task)| Kind::Task(run, task)),
        "ended" => Some(Kind::Ended(rest)),
        _ => None,
    }
}

/// The history of a prefix.
#[derive(Debug, Default)]
pub struct History {
    prefix: String,
    events: Vec<Event>,
    /// The last revision that was read.
    seen: i64,
}

impl History {
    /// Of the keys `{prefix}/…`, with nothing read yet.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        Self {
            prefix: prefix.to_owned(),
            events: Vec::new(),
            seen: 0,
        }
    }

    /// Reads what was written since the last time.
    ///
    /// # Panics
    /// If etcd does not answer, or has compacted what was not read yet.
    pub fn read_on(&mut self, etcd: &Etcd) {
        let until = etcd.revision();
        let beginning = format!("{}/", self.prefix);
        // Every key, not only ours: so each revision up to `until` is seen, and none is missed.
        let from = self.seen + 1;
        let read = etcd.block_on(async |client| {
            let mut watching = client.watch_client().max_decoding_message_size(1 << 30);
            let options = WatchOptions::new()
                .with_all_keys()
                .with_start_revision(from);
            let mut stream = watching.watch("", Some(options)).await?;
            let (mut events, mut seen) = (Vec::new(), from - 1);
            // The first revision of an empty etcd is 1 and has no event.
            while seen < until && until > 1 {
                let message = stream.message().await?;
                let message = message.ok_or_else(|| Error::WatchError("it ended".to_owned()))?;
                assert!(!message.canceled(), "{}", message.cancel_reason());
                for event in message.events() {
                    let kv = event.kv().unwrap();
                    seen = seen.max(kv.mod_revision());
                    let key = String::from_utf8_lossy(kv.key()).into_owned();
                    let Some(key) = key.strip_prefix(&beginning) else {
                        continue;
                    };
                    let is_put = event.event_type() == EventType::Put;
                    events.push(Event {
                        revision: kv.mod_revision(),
                        created: kv.create_revision(),
                        key: key.to_owned(),
                        value: is_put.then(|| kv.value().to_vec()),
                    });
                }
            }
            Ok((events, seen))
        });
        let (events, seen) = read.unwrap();
        self.events.extend(events);
        self.seen = seen;
    }

    /// Everything that was written, in order.
    #[must_use]
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The terms of leaders so far: the revision that made the leader's key, and its value.
    #[must_use]
    pub fn terms(&self) -> Vec<(i64, Value)> {
        let keys = self.events.iter().filter(|e| e.key == "leader");
        let made = keys.filter(|e| e.created == e.revision);
        made.filter_map(|e| Some((e.created, e.json()?))).collect()
    }

    /// Every version of a task's record.
    #[must_use]
    pub fn task(&self, run: &str, task: &str) -> Vec<Value> {
        let key = format!("state/tasks/{run}/{task}");
        let versions = self.events.iter().filter(|e| e.key == key);
        versions.filter_map(Event::json).collect()
    }

    /// The number of the last attempt of a task.
    #[must_use]
    pub fn attempts(&self, run: &str, task: &str) -> u64 {
        let versions = self.task(run, task);
        let numbers = versions.iter().filter_map(|v| v["attempt"].as_u64());
        numbers.max().unwrap_or(0)
    }

    /// What the last version of a task's record says about retries that were spent:
    /// on errors, on faults, on lost workers.
    #[must_use]
    pub fn spent(&self, run: &str, task: &str) -> (u64, u64, u64) {
        let versions = self.task(run, task);
        let spent = versions.last().map_or(&Value::Null, |v| &v["spent"]);
        let number = |name: &str| spent[name].as_u64().unwrap_or(0);
        (number("errors"), number("faults"), number("lost"))
    }

    /// The record of a run that has ended.
    #[must_use]
    pub fn ended(&self, run: &str) -> Option<Value> {
        let key = format!("state/ended/{run}");
        let mut versions = self.events.iter().rev();
        versions.find(|e| e.key == key)?.json()
    }

    /// The keys that are there at the end.
    #[must_use]
    pub fn keys(&self) -> BTreeSet<&str> {
        let mut keys = BTreeSet::new();
        for event in &self.events {
            if event.value.is_some() {
                keys.insert(event.key.as_str());
            } else {
                keys.remove(event.key.as_str());
            }
        }
        keys
    }

    /// What does not hold of it, a line each:
    ///
    /// - Fencing: every change below `state/` was made in a transaction that also wrote `commit`,
    ///   by the one who led at that revision, and is the next one of that term. A record that names
    ///   its term names that one. Terms never go down.
    /// - One commit: a task that has reached a final state stays as it is until the run ends, and
    ///   has been reported by the attempt that it names. Numbers of attempts never go down.
    /// - Nothing lost: a run leaves the live records in the same commit in which it becomes an ended
    ///   one, and none of its tasks stays behind.
    ///
    /// A commit is one transaction, or one that went through the journal: then all of those up to
    /// the one that says that the journal is done, whoever led in the meantime.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        let mut check = Check::default();
        for transaction in self.events.chunk_by(|a, b| a.revision == b.revision) {
            check.transaction(transaction);
        }
        check.found
    }
}

/// A task's record, as far as it is looked at.
#[derive(Debug, Clone, PartialEq)]
struct Task {
    written: String,
    attempt: u64,
    reported: u64,
    outputs: Value,
}

impl Task {
    fn is_final(&self) -> bool {
        !matches!(self.written.as_str(), "pending" | "running" | "backoff")
    }
}

#[derive(Default)]
struct Check<'a> {
    found: Vec<String>,
    /// The term of the one who leads now.
    term: Option<i64>,
    highest_term: i64,
    /// The last commit: its term and number.
    last: (i64, u64),
    /// What the commit under way has changed so far, and the term that decided it.
    under_way: Vec<&'a Event>,
    decided_by: i64,
    /// The tasks of each live run.
    live: BTreeMap<String, BTreeMap<String, Task>>,
    /// The highest attempt of each task, over all lives of its run.
    attempts: BTreeMap<(String, String), u64>,
}

impl<'a> Check<'a> {
    fn transaction(&mut self, events: &'a [Event]) {
        let revision = events[0].revision;
        let changes = events.iter().filter(|e| e.key.starts_with("state/"));
        let changes: Vec<_> = changes.collect();
        let note = events.iter().find(|e| e.key == "commit");
        let Some(note) = note.and_then(Event::json) else {
            if let Some(change) = changes.first() {
                let what = format!("`{}` changed without a commit", change.key);
                self.tell(revision, what);
            }
            // Campaigns, farewells, leases that ran out.
            for event in events.iter().filter(|e| e.key == "leader") {
                self.leader(event);
            }
            return;
        };
        let (epoch, number) = (note["epoch"].as_i64().unwrap(), note["number"].as_u64());
        let number = number.unwrap();
        if self.term != Some(epoch) {
            let what = format!("a commit of term {epoch} while {:?} led", self.term);
            self.tell(revision, what);
        }
        let next = if self.last.0 == epoch {
            self.last.1 + 1
        } else {
            1
        };
        if number != next {
            let what = format!("commit {number} of term {epoch} came after {:?}", self.last);
            self.tell(revision, what);
        }
        self.last = (epoch, number);
        if self.under_way.is_empty() {
            self.decided_by = epoch;
        }
        self.under_way.extend(changes);
        if note["journal"].as_u64().unwrap_or(0) == 0 {
            let changes = std::mem::take(&mut self.under_way);
            self.commit(revision, &changes);
        }
    }

    fn commit(&mut self, revision: i64, changes: &[&'a Event]) {
        let mut left = Vec::new();
        let mut ended = BTreeSet::new();
        for event in changes {
            match kind_of(&event.key) {
                Some(Kind::Run(run)) if event.value.is_none() => left.push(run),
                Some(Kind::Run(run)) => {
                    self.names_its_term(event);
                    self.live.entry(run.to_owned()).or_default();
                }
                Some(Kind::Ended(run)) if event.value.is_some() => drop(ended.insert(run)),
                _ => {}
            }
        }
        for event in changes {
            if let Some(Kind::Task(run, task)) = kind_of(&event.key) {
                self.task(event, run, task);
            }
        }
        for run in left {
            let tasks = self.live.remove(run).unwrap_or_default();
            if !ended.contains(run) {
                self.tell(
                    revision,
                    format!("run {run} left without a record of its end"),
                );
            }
            let names: Vec<_> = tasks.keys().collect();
            if !names.is_empty() {
                self.tell(
                    revision,
                    format!("run {run} left its tasks {names:?} behind"),
                );
            }
        }
    }

    fn tell(&mut self, revision: i64, what: String) {
        self.found.push(format!("at revision {revision}: {what}"));
    }

    fn leader(&mut self, event: &Event) {
        if event.value.is_none() {
            self.term = None;
            return;
        }
        if event.created < self.highest_term {
            let what = format!("term {} after {}", event.created, self.highest_term);
            self.tell(event.revision, what);
        }
        self.highest_term = self.highest_term.max(event.created);
        self.term = Some(event.created);
    }

    fn names_its_term(&mut self, event: &Event) {
        let record = event.json().unwrap_or_default();
        let (named, term) = (&record["epoch"], self.decided_by);
        if *named != term {
            let what = format!(
                "`{}` was written by term {named} in a commit of {term}",
                event.key
            );
            self.tell(event.revision, what);
        }
    }

    fn task(&mut self, event: &Event, run: &str, name: &str) {
        let Some(record) = event.json() else {
            if event.value.is_some() {
                self.tell(event.revision, format!("`{}` is no JSON", event.key));
            } else if let Some(tasks) = self.live.get_mut(run) {
                tasks.remove(name);
            }
            return;
        };
        self.names_its_term(event);
        let task = Task {
            written: record["written"].as_str().unwrap_or_default().to_owned(),
            attempt: record["attempt"].as_u64().unwrap_or(0),
            reported: record["reported"].as_u64().unwrap_or(0),
            outputs: record["outputs"].clone(),
        };
        let id = (run.to_owned(), name.to_owned());
        let highest = self.attempts.entry(id).or_default();
        let before = *highest;
        *highest = before.max(task.attempt);
        if task.attempt < before {
            let what = format!(
                "{run}/{name} went from attempt {before} to {}",
                task.attempt
            );
            self.tell(event.revision, what);
        }
        if task.written == "succeeded" && task.reported != task.attempt {
            let what = format!(
                "{run}/{name} was done by attempt {}, and {} had reported",
                task.attempt, task.reported
            );
            self.tell(event.revision, what);
        }
        let Some(tasks) = self.live.get_mut(run) else {
            self.tell(event.revision, format!("{run}/{name} has no live run"));
            return;
        };
        let before = tasks.insert(name.to_owned(), task.clone());
        if let Some(before) = before
            && before.is_final()
            && before != task
        {
            let what = format!("{run}/{name} was {before:?} and became {task:?}");
            self.tell(event.revision, what);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A history that is written by hand: each call is one transaction.
    #[derive(Default)]
    struct Hand(History);

    impl Hand {
        fn write(mut self, writes: &[(&str, Value)]) -> Self {
            let changes_state = writes.iter().any(|(key, _)| key.starts_with("state/"));
            let has_note = writes.iter().any(|(key, _)| *key == "commit");
            if changes_state && !has_note {
                // By the one who leads, and the next one of its term.
                let (term, _) = self.0.terms().pop().unwrap();
                let notes = self.0.events.iter().filter(|e| e.key == "commit");
                let notes = notes.filter_map(Event::json).filter(|n| n["epoch"] == term);
                let note = json!({"epoch": term, "number": notes.count() + 1});
                return self.write(&[writes, &[("commit", note)]].concat());
            }
            self.0.seen += 1;
            let revision = self.0.seen;
            for (key, value) in writes {
                let is_new = !self.0.keys().contains(key);
                let last = self.0.events.iter().rev().find(|e| e.key == *key);
                let created = last.filter(|_| !is_new).map_or(revision, |e| e.created);
                self.0.events.push(Event {
                    revision,
                    created,
                    key: (*key).to_owned(),
                    value: (!value.is_null()).then(|| value.to_string().into_bytes()),
                });
            }
            self
        }

        /// Somebody leads from revision 1, a run is accepted and its task done.
        fn done() -> Self {
            Self::default()
                .write(&[("leader", json!({"name": "a"}))])
                .write(&[("state/runs/r", json!({"epoch": 1}))])
                .write(&[(T, json!({"epoch": 1, "written": "running", "attempt": 1}))])
                .write(&[(T, done(1, 1, "x"))])
        }

        fn violation(self) -> String {
            let found = self.0.violations();
            assert_eq!(found.len(), 1, "{found:?}");
            found[0].clone()
        }
    }

    const T: &str = "state/tasks/r/t";

    fn done(epoch: i64, attempt: u64, output: &str) -> Value {
        json!({"epoch": epoch, "written": "succeeded", "attempt": attempt, "reported": attempt, "outputs": [output]})
    }

    fn archived() -> [(&'static str, Value); 3] {
        let ended = json!({"archive": "d"});
        [
            ("state/ended/r", ended),
            ("state/runs/r", Value::Null),
            (T, Value::Null),
        ]
    }

    #[test]
    fn a_run_that_was_retried_by_another_leader_is_in_order() {
        let history = Hand::done()
            .write(&[(T, done(1, 1, "x"))])
            .write(&archived())
            .write(&[("leader", Value::Null)])
            .write(&[("leader", json!({"name": "b"}))])
            .write(&[
                ("state/runs/r", json!({"epoch": 8})),
                ("state/ended/r", Value::Null),
                (T, json!({"epoch": 8, "written": "pending", "attempt": 1})),
            ])
            .write(&[(T, done(8, 2, "y"))])
            .write(&archived())
            .0;
        assert_eq!(history.violations(), [""; 0]);
        assert_eq!(history.attempts("r", "t"), 2);
        assert_eq!(history.ended("r").unwrap()["archive"], "d");
        assert_eq!(
            history.keys().into_iter().collect::<Vec<_>>(),
            ["commit", "leader", "state/ended/r"]
        );
        let terms: Vec<_> = history.terms().iter().map(|(term, _)| *term).collect();
        assert_eq!(terms, [1, 8]);
    }

    #[test]
    fn a_second_commit_of_a_task_is_seen() {
        let found = Hand::done().write(&[(T, done(1, 2, "y"))]).violation();
        assert!(found.starts_with("at revision 5: r/t was Task"), "{found}");
        let undone = json!({"epoch": 1, "written": "running", "attempt": 2});
        let found = Hand::done().write(&[(T, undone)]).violation();
        assert!(found.contains("and became Task"), "{found}");
    }

    #[test]
    fn a_write_of_an_earlier_term_is_seen() {
        let replaced = || {
            Hand::done()
                .write(&[("leader", Value::Null)])
                .write(&[("leader", json!({"name": "b"}))])
        };
        let stale = replaced().write(&[(T, done(1, 1, "x"))]).violation();
        assert_eq!(
            stale,
            "at revision 7: `state/tasks/r/t` was written by term 1 in a commit of 6"
        );
        let note = json!({"epoch": 1, "number": 4});
        let stale = replaced().write(&[(T, done(1, 1, "x")), ("commit", note)]);
        assert_eq!(
            stale.violation(),
            "at revision 7: a commit of term 1 while Some(6) led"
        );
        let unfenced = Hand::done()
            .write(&[("leader", Value::Null)])
            .write(&[("state/models/m", json!({}))])
            .violation();
        assert!(unfenced.ends_with("a commit of term 1 while None led"));
        let mut bare = Hand::done();
        bare.0.events.push(Event {
            revision: 5,
            created: 5,
            key: "state/models/m".to_owned(),
            value: None,
        });
        let bare = bare.violation();
        assert!(bare.ends_with("`state/models/m` changed without a commit"));
    }

    #[test]
    fn a_commit_that_was_applied_twice_is_seen() {
        let note = json!({"epoch": 1, "number": 3});
        let found = Hand::done()
            .write(&[(T, done(1, 1, "x")), ("commit", note)])
            .violation();
        assert_eq!(found, "at revision 5: commit 3 of term 1 came after (1, 3)");
    }

    #[test]
    fn a_commit_that_the_next_leader_finishes_from_the_journal_is_one_commit() {
        let note = |epoch: u64, number: u64, journal: u64| {
            let note = json!({"epoch": epoch, "number": number, "journal": journal});
            ("commit", note)
        };
        let [ended, run, task] = archived();
        let history = Hand::done()
            .write(&[("journal/00000000", json!([])), note(1, 4, 1)])
            .write(&[run, note(1, 5, 1)])
            .write(&[("leader", Value::Null)])
            .write(&[("leader", json!({"name": "b"}))])
            .write(&[ended, note(8, 1, 1)])
            .write(&[task, note(8, 2, 1)])
            .write(&[("journal/00000000", Value::Null), note(8, 3, 0)])
            .0;
        assert_eq!(history.violations(), [""; 0]);
    }

    #[test]
    fn an_attempt_that_counts_back_is_seen() {
        let found = Hand::done()
            .write(&archived())
            .write(&[
                ("state/runs/r", json!({"epoch": 1})),
                (T, json!({"epoch": 1, "written": "pending", "attempt": 0})),
            ])
            .violation();
        assert!(found.ends_with("r/t went from attempt 1 to 0"), "{found}");
    }

    #[test]
    fn a_task_of_an_attempt_that_did_not_report_is_seen() {
        let record = json!({"epoch": 1, "written": "succeeded", "attempt": 2, "reported": 1});
        let found = Hand::default()
            .write(&[("leader", json!({}))])
            .write(&[("state/runs/r", json!({"epoch": 1})), (T, record)])
            .violation();
        assert!(found.ends_with("r/t was done by attempt 2, and 1 had reported"));
    }

    #[test]
    fn a_lost_run_and_a_task_left_behind_are_seen() {
        let lost = Hand::done()
            .write(&[("state/runs/r", Value::Null), (T, Value::Null)])
            .violation();
        assert!(lost.ends_with("run r left without a record of its end"));
        let behind = Hand::done().write(&archived()[..2]).violation();
        assert!(behind.ends_with("run r left its tasks [\"t\"] behind"));
        let orphan = Hand::done()
            .write(&archived())
            .write(&[(T, done(1, 1, "x"))])
            .violation();
        assert!(orphan.ends_with("r/t has no live run"), "{orphan}");
    }

    #[test]
    fn every_version_is_read_once_and_foreign_keys_are_left_out() {
        let etcd = Etcd::start(1);
        let mut history = History::new("a");
        history.read_on(&etcd);
        assert!(history.events().is_empty());
        for n in 0..3 {
            etcd.put("a/leader", format!("{{\"n\":{n}}}")).unwrap();
            etcd.put("b/leader", "{}").unwrap();
        }
        history.read_on(&etcd);
        etcd.put("a/state/schema", "1").unwrap();
        history.read_on(&etcd);
        history.read_on(&etcd);
        let read: Vec<_> = history
            .events()
            .iter()
            .map(|e| (e.revision, e.key.as_str()))
            .collect();
        assert_eq!(
            read,
            [
                (2, "leader"),
                (4, "leader"),
                (6, "leader"),
                (8, "state/schema")
            ]
        );
        assert_eq!(history.terms(), [(2, json!({"n": 0}))]);
    }
}
