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
    /// - Fencing: every write below `state/` was made while somebody led, and a record that names
    ///   its term names the one of that moment. Terms never go down.
    /// - One commit: a task that has reached a final state stays as it is until the run ends, and
    ///   has been reported by the attempt that it names. Numbers of attempts never go down.
    /// - Nothing lost: a run leaves the live records in the same transaction in which it becomes
    ///   an ended one, and none of its tasks stays behind.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        let mut check = Check::default();
        let mut at = 0;
        while at < self.events.len() {
            let revision = self.events[at].revision;
            let rest = &self.events[at..];
            let length = rest.iter().take_while(|e| e.revision == revision).count();
            check.transaction(revision, &rest[..length]);
            at += length;
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
struct Check {
    found: Vec<String>,
    term: Option<i64>,
    highest_term: i64,
    /// The tasks of each live run.
    live: BTreeMap<String, BTreeMap<String, Task>>,
    /// The highest attempt of each task, over all lives of its run.
    attempts: BTreeMap<(String, String), u64>,
}

impl Check {
    fn transaction(&mut self, revision: i64, events: &[Event]) {
        for event in events {
            if event.key == "leader" {
                self.leader(event);
            } else if event.key.starts_with("state/") {
                self.fence(event);
            }
        }
        let mut left = Vec::new();
        let mut ended = BTreeSet::new();
        for event in events {
            match kind_of(&event.key) {
                Some(Kind::Run(run)) if event.value.is_none() => left.push(run),
                Some(Kind::Run(run)) => drop(self.live.entry(run.to_owned()).or_default()),
                Some(Kind::Ended(run)) if event.value.is_some() => drop(ended.insert(run)),
                _ => {}
            }
        }
        for event in events {
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

    fn fence(&mut self, event: &Event) {
        let key = &event.key;
        let Some(term) = self.term else {
            self.tell(event.revision, format!("`{key}` changed while nobody led"));
            return;
        };
        let has_term = matches!(kind_of(key), Some(Kind::Run(_) | Kind::Task(..)));
        if has_term && event.value.is_some() {
            let record = event.json().unwrap_or_default();
            if record["epoch"] != term {
                let named = &record["epoch"];
                let what = format!("`{key}` was written by term {named} while {term} led");
                self.tell(event.revision, what);
            }
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
            ["leader", "state/ended/r"]
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
        let stale = Hand::done()
            .write(&[("leader", Value::Null)])
            .write(&[("leader", json!({"name": "b"}))])
            .write(&[(T, done(1, 1, "x"))])
            .violation();
        assert_eq!(
            stale,
            "at revision 7: `state/tasks/r/t` was written by term 1 while 6 led"
        );
        let unfenced = Hand::done()
            .write(&[("leader", Value::Null)])
            .write(&[("state/models/m", json!({}))])
            .violation();
        assert!(unfenced.ends_with("`state/models/m` changed while nobody led"));
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
