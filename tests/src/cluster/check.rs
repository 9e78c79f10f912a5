//! The invariants of a whole cluster at rest, looked at from outside: etcd's history, the object store,
//! the logs, what the tasks themselves have written down, and the processes of this machine.

use std::{collections::BTreeSet, fs, io::Read as _};

use flate2::read::GzDecoder;
use serde_json::Value;

use super::{Cluster, END, PREFIX};
use crate::{outside, pipelines::LINES, processes, seconds, wait_for};

impl Cluster {
    /// All invariants. Every part that is to take part in the end must run by now.
    ///
    /// # Panics
    /// If one does not hold: the message says which and where.
    #[track_caller]
    pub fn check(&mut self) {
        // I1, I8: what was accepted ends, and leaves the live records.
        let live = |key: &String| {
            let key = &key[PREFIX.len()..];
            ["/state/runs/", "/state/tasks/", "/journal/"]
                .iter()
                .any(|kind| key.starts_with(kind))
        };
        let mut last = Vec::new();
        wait_for("nothing is live", END, || {
            last = self.etcd.keys(&format!("{PREFIX}/"))?;
            last.retain(live);
            last.is_empty().then_some(())
        });
        // I3, I4.
        self.history.read_on(&self.etcd);
        let violations = self.history.violations();
        assert!(violations.is_empty(), "{violations:#?}");
        // I2, and no run was made twice.
        let made: BTreeSet<_> = self
            .history
            .events()
            .iter()
            .filter_map(|e| e.key.strip_prefix("state/runs/"))
            .collect();
        let accepted: BTreeSet<_> = self.acknowledged.iter().map(String::as_str).collect();
        assert_eq!(made, accepted, "runs that were made, and acknowledged");
        // I5, I6, I9.
        outside::every_object_hashes_to_its_name(&self.artifacts());
        for run in &accepted {
            self.ended_run_is_whole(run);
        }
        self.journal_is_in_order();
        // I8.
        wait_for("no command is left", seconds(10), || {
            processes::of_attempts_below(self.root())
                .is_empty()
                .then_some(())
        });
    }

    /// The archive of a run that has ended, read from the object store.
    ///
    /// # Panics
    /// If it is not there, or not what its name says.
    #[track_caller]
    #[must_use]
    pub fn archive(&self, run: &str) -> Value {
        let ended = self.history.ended(run);
        let ended = ended.unwrap_or_else(|| panic!("{run} has not ended"));
        let digest = ended["archive"].as_str().unwrap();
        let packed = fs::read(outside::object(&self.artifacts(), digest)).unwrap();
        assert_eq!(outside::sha256(&packed), digest);
        let mut text = String::new();
        GzDecoder::new(&packed[..])
            .read_to_string(&mut text)
            .unwrap();
        let archive: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(archive["view"]["run"], run);
        assert_eq!(archive["view"]["state"], ended["summary"]["state"]);
        archive
    }

    #[track_caller]
    fn ended_run_is_whole(&self, run: &str) {
        let archive = self.archive(run);
        let view = &archive["view"];
        let state = view["state"].as_str().unwrap();
        assert!(["succeeded", "failed", "cancelled"].contains(&state));
        outside::run_is_whole(&self.artifacts(), view);
        for task in view["tasks"].as_array().unwrap() {
            let name = task["task"].as_str().unwrap();
            let attempts = task["attempt"].as_u64().unwrap();
            let known = self.history.attempts(run, name);
            // What a record says last is what is shown.
            assert!(attempts <= known, "{run}/{name}: {attempts} of {known}");
            for attempt in 1..=attempts {
                let is_done = attempt == attempts && task["state"] == "succeeded";
                self.log_is_whole(run, name, attempt, is_done);
            }
        }
    }

    /// Numbered lines are there from the first on without a gap; all of them if the attempt is done.
    #[track_caller]
    fn log_is_whole(&self, run: &str, task: &str, attempt: u64, is_done: bool) {
        let Some(log) = outside::log(&self.artifacts(), run, task, attempt) else {
            return;
        };
        let numbered = log.lines.iter().filter(|l| l.starts_with("line "));
        let expected = (1..=LINES).map(|n| format!("line {n} of {LINES}"));
        let found: Vec<_> = numbered.cloned().collect();
        let expected: Vec<_> = expected.take(found.len()).collect();
        let what = format!("the log of {run}/{task} attempt {attempt}");
        assert_eq!(found, expected, "{what}");
        if is_done && !found.is_empty() {
            assert_eq!(found.len(), LINES, "{what} is cut");
        }
    }

    /// No attempt began twice, and what a task is credited with was made by an attempt that came to
    /// its end.
    #[track_caller]
    fn journal_is_in_order(&self) {
        let entries = self.journal.entries();
        let mut seen = BTreeSet::new();
        for entry in &entries {
            assert!(seen.insert(entry), "{entry:?} is there twice");
        }
        for run in &self.acknowledged {
            let archive = self.archive(run);
            for task in archive["view"]["tasks"].as_array().unwrap() {
                let name = task["task"].as_str().unwrap();
                if self.journal.begun(run, name) == 0 || task["state"] != "succeeded" {
                    continue;
                }
                let manifest = task["outputs"][0]["manifest"].as_str().unwrap();
                let files = outside::artifact(&self.artifacts(), manifest);
                let who = String::from_utf8(files[0].1.clone()).unwrap();
                assert_eq!(who, format!("{name} {}\n", task["attempt"]), "{run}");
            }
        }
    }
}
