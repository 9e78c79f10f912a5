//! Pipelines whose tasks write down what they do, outside of the system: in a journal that is one
//! file for the whole cluster, and as numbered lines of their logs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::json;

/// How many numbered lines each task logs.
pub const LINES: usize = 40;

/// What tasks have written down, and the gates that some of them wait at.
pub struct Journal {
    dir: PathBuf,
}

/// One line of the journal: one attempt.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// `begin` or `end`.
    pub what: String,
    /// The run.
    pub run: String,
    /// The task.
    pub task: String,
    /// The attempt.
    pub attempt: u64,
}

impl Journal {
    /// An empty one in this directory.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir).unwrap();
        Self {
            dir: dir.to_path_buf(),
        }
    }

    fn file(&self) -> PathBuf {
        self.dir.join("journal")
    }

    /// What has been written so far, in order.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let text = fs::read_to_string(self.file()).unwrap_or_default();
        let lines = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
        lines
            .map(|line| {
                let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
                let [what, run, task, attempt] = <[String; 4]>::try_from(words).unwrap();
                Entry {
                    what,
                    run,
                    task,
                    attempt: attempt.parse().unwrap(),
                }
            })
            .collect()
    }

    /// How many attempts of this task have begun.
    #[must_use]
    pub fn begun(&self, run: &str, task: &str) -> usize {
        self.count("begin", run, task)
    }

    /// How many attempts of this task have come to their end.
    #[must_use]
    pub fn ended(&self, run: &str, task: &str) -> usize {
        self.count("end", run, task)
    }

    fn count(&self, what: &str, run: &str, task: &str) -> usize {
        let entries = self.entries();
        let same = |e: &&Entry| e.what == what && e.run == run && e.task == task;
        entries.iter().filter(same).count()
    }

    /// The path of a gate, which is shut until it exists.
    #[must_use]
    pub fn gate(&self, name: &str) -> PathBuf {
        self.dir.join(format!("gate-{name}"))
    }

    /// Opens a gate.
    pub fn open(&self, name: &str) {
        fs::write(self.gate(name), "").unwrap();
    }

    /// The `with` of an `exec` stage that logs its numbered lines, half of them, does something in
    /// the middle, logs the rest and writes an output `out` that tells the attempt.
    fn with(&self, middle: &str) -> String {
        let journal = self.file();
        let journal = journal.display();
        let me = "$EMBERLINE_RUN $EMBERLINE_TASK $EMBERLINE_ATTEMPT";
        let half = LINES / 2;
        let script = format!(
            "echo \"begin {me}\" >> {journal}; \
             n=1; while [ $n -le {half} ]; do echo \"line $n of {LINES}\"; n=$((n+1)); done; \
             {middle}; \
             while [ $n -le {LINES} ]; do echo \"line $n of {LINES}\"; n=$((n+1)); done; \
             echo \"$EMBERLINE_TASK $EMBERLINE_ATTEMPT\" > \"$EMBERLINE_OUTPUT_OUT/who\"; \
             echo \"end {me}\" >> {journal}"
        );
        json!({"command": ["sh", "-c", script]}).to_string()
    }

    /// One stage of a pipeline text, as a line.
    #[must_use]
    pub fn stage(&self, name: &str, needs: &[&str], middle: &str, more: &str) -> String {
        let needs = needs.join(", ");
        let with = self.with(middle);
        format!(
            "  {name}: {{ kind: exec, cache: false, needs: [{needs}], outputs: {{ out: files }}, resources: {{ cpu: 0.1 }}{more}, with: {with} }}\n"
        )
    }

    /// `width` chains of `length` tasks, `c0-0` to `c{width-1}-{length-1}`.
    #[must_use]
    pub fn chains(&self, width: usize, length: usize) -> String {
        self.chains_of(width, length, ":")
    }

    /// The same, with something that each task does in its middle.
    #[must_use]
    pub fn chains_of(&self, width: usize, length: usize, middle: &str) -> String {
        let mut text = String::from("pipeline: chains\nstages:\n");
        for chain in 0..width {
            for step in 0..length {
                let before = format!("c{chain}-{}", step.wrapping_sub(1));
                let needs: &[&str] = if step == 0 { &[] } else { &[&before] };
                text += &self.stage(&format!("c{chain}-{step}"), needs, middle, "");
            }
        }
        text
    }

    /// `first`, then `wait`, which waits at its gate, then `last`. `more` is added to `wait`.
    #[must_use]
    pub fn gated(&self, gate: &str, more: &str) -> String {
        let wait = format!(
            "until [ -e {} ]; do sleep 0.02; done",
            self.gate(gate).display()
        );
        let mut text = String::from("pipeline: gated\nstages:\n");
        text += &self.stage("first", &[], ":", "");
        text += &self.stage("wait", &["first"], &wait, more);
        text += &self.stage("last", &["wait"], ":", "");
        text
    }
}
