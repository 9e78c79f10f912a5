//! How a run looks while it goes on: bars on a terminal, plain lines elsewhere, nothing when quiet.

use std::{
    collections::{BTreeMap, HashMap},
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use emberline_proto::v1::{AttemptProgress, Reason, RunSummary, TaskState, TaskView};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output::{clean, colours, duration};

/// Tasks of one stage that are shown one by one; of larger ones only failures.
const SHOWN_TASKS_OF_A_STAGE: usize = 20;

/// Shows a run.
pub struct Progress {
    mode: Mode,
    colour: bool,
    states: HashMap<String, (TaskState, u32)>,
    told_run: bool,
    stages: BTreeMap<String, usize>,
}

enum Mode {
    Bars {
        bars: MultiProgress,
        running: HashMap<String, ProgressBar>,
    },
    Lines,
    Quiet,
}

impl Progress {
    /// As standard error is: the run's lines are not the command's output.
    pub fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let mode = if quiet {
            Mode::Quiet
        } else if terminal {
            Mode::Bars {
                bars: MultiProgress::new(),
                running: HashMap::new(),
            }
        } else {
            Mode::Lines
        };
        Self {
            mode,
            colour: colours(terminal),
            states: HashMap::new(),
            told_run: false,
            stages: BTreeMap::new(),
        }
    }

    /// The tasks as they are at first, or when the watch begins anew. What has ended before is told
    /// too, but nothing is told twice.
    pub fn snapshot(&mut self, run: &RunSummary, tasks: &[TaskView]) {
        self.stages.clear();
        for task in tasks {
            *self.stages.entry(task.stage.clone()).or_default() += 1;
        }
        if !std::mem::replace(&mut self.told_run, true) {
            self.line(&format!(
                "run {} of {} (revision {})",
                clean(&run.run),
                clean(&run.pipeline),
                run.revision.get(..12).unwrap_or_default()
            ));
        }
        for task in tasks {
            self.task(task);
        }
    }

    /// A task changed.
    pub fn task(&mut self, task: &TaskView) {
        let state = task.state();
        let before = self.states.insert(task.task.clone(), (state, task.attempt));
        if before == Some((state, task.attempt)) {
            return;
        }
        let many = self
            .stages
            .get(&task.stage)
            .is_some_and(|n| *n > SHOWN_TASKS_OF_A_STAGE);
        if state != TaskState::Running {
            self.remove_bar(&task.task);
        }
        let failed = matches!(state, TaskState::Failed | TaskState::Backoff);
        if many && !failed {
            return;
        }
        match state {
            TaskState::Running => self.started(task),
            TaskState::Succeeded
            | TaskState::Cached
            | TaskState::Failed
            | TaskState::Skipped
            | TaskState::Cancelled
            | TaskState::Backoff => {
                let text = self.ended(task, state);
                self.line(&text);
            }
            TaskState::Unspecified | TaskState::Waiting | TaskState::Queued => {}
        }
    }

    fn started(&mut self, task: &TaskView) {
        let again = if task.attempt > 1 {
            format!(" (attempt {})", task.attempt)
        } else {
            String::new()
        };
        if let Mode::Bars { bars, running } = &mut self.mode {
            let bar = bars.add(ProgressBar::new(1000));
            let style =
                ProgressStyle::with_template("  {spinner} {prefix:<16} {elapsed:>4} {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.set_prefix(clean(&task.task));
            bar.set_message(format!("{}{again}", clean(&task.kind)));
            bar.enable_steady_tick(Duration::from_millis(120));
            running.insert(task.task.clone(), bar);
        } else if task.attempt > 1 {
            self.line(&format!(
                "  > {:<16} started again on {}{again}",
                clean(&task.task),
                clean(&task.worker)
            ));
        }
    }

    fn ended(&self, task: &TaskView, state: TaskState) -> String {
        let took = match (&task.started_at, &task.finished_at) {
            (Some(a), Some(b)) => duration(between(a, b)),
            _ => String::new(),
        };
        let (mark, code) = match state {
            TaskState::Succeeded => ("+", "32"),
            TaskState::Cached => ("=", "36"),
            TaskState::Skipped => ("-", "2"),
            TaskState::Backoff => ("~", "33"),
            _ => ("x", "31"),
        };
        let mark = if self.colour {
            format!("\x1b[{code}m{mark}\x1b[0m")
        } else {
            mark.to_owned()
        };
        let word = match state {
            TaskState::Succeeded => took,
            TaskState::Cached => "cached".to_owned(),
            TaskState::Skipped => "skipped".to_owned(),
            TaskState::Backoff => "will be tried again".to_owned(),
            TaskState::Cancelled => "cancelled".to_owned(),
            _ => "failed".to_owned(),
        };
        let why = match &task.failure {
            Some(f) if state != TaskState::Succeeded => {
                format!("{}: {}", reason_name(f.reason()), clean(&f.message))
            }
            _ => clean(&task.note),
        };
        format!(
            "  {mark} {:<16} {:<9} {word:<8} {why}",
            clean(&task.task),
            clean(&task.kind)
        )
        .trim_end()
        .to_owned()
    }

    /// A running attempt got on.
    pub fn progress(&mut self, progress: &AttemptProgress) {
        if let Mode::Bars { running, .. } = &self.mode
            && let Some(bar) = running.get(&progress.task)
        {
            let percent = if progress.fraction >= 0.0 {
                format!("{:>3.0}% ", progress.fraction * 100.0)
            } else {
                String::new()
            };
            bar.set_message(format!("{percent}{}", clean(&progress.message)));
        }
    }

    fn remove_bar(&mut self, task: &str) {
        if let Mode::Bars { bars, running } = &mut self.mode
            && let Some(bar) = running.remove(task)
        {
            bar.finish_and_clear();
            bars.remove(&bar);
        }
    }

    /// A line of its own above the bars.
    pub fn line(&self, text: &str) {
        match &self.mode {
            Mode::Bars { bars, .. } => {
                // A terminal that went away is seen by the next command that needs it.
                let _ = bars.println(text);
            }
            Mode::Lines => {
                let _ = writeln!(std::io::stderr(), "{text}");
            }
            Mode::Quiet => {}
        }
    }

    /// Takes the bars away.
    pub fn finish(&mut self) {
        if let Mode::Bars { bars, running } = &mut self.mode {
            for (_, bar) in running.drain() {
                bar.finish_and_clear();
            }
            let _ = bars.clear();
        }
    }
}

/// The time from one wire timestamp to another; zero if it is negative.
pub fn between(a: &prost_types::Timestamp, b: &prost_types::Timestamp) -> Duration {
    let nanos =
        |t: &prost_types::Timestamp| i128::from(t.seconds) * 1_000_000_000 + i128::from(t.nanos);
    Duration::from_nanos(u64::try_from(nanos(b) - nanos(a)).unwrap_or(0))
}

/// The reason as shown and stored.
pub fn reason_name(reason: Reason) -> &'static str {
    reason
        .as_str_name()
        .strip_prefix("REASON_")
        .map_or("unknown", |name| match name {
            "USER_ERROR" => "user_error",
            "DATA" => "data",
            "QUALITY_GATE" => "quality_gate",
            "OOM" => "oom",
            "TIMEOUT" => "timeout",
            "STORAGE" => "storage",
            "WORKER_LOST" => "worker_lost",
            "PREEMPTED" => "preempted",
            "CANCELLED" => "cancelled",
            "SYSTEM" => "system",
            _ => "unknown",
        })
}
