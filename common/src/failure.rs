//! Why something did not succeed: one closed list of reasons, and a text for people.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::clean;

/// The longest failure text that the state keeps, in bytes; the log has the whole.
pub const MAX_MESSAGE_BYTES: usize = 2048;

/// Why an attempt, task or run did not succeed. The list is closed (design, "Scheduling").
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The stage's own error: a wrong spec, a command that exits non-zero.
    UserError,
    /// The data is not what the stage was promised. Never retried.
    Data,
    /// A quality gate was not met. Never retried.
    QualityGate,
    /// The attempt went over its memory limit.
    Oom,
    /// The attempt or the run went over its time limit.
    Timeout,
    /// The object store or the disk refused, or an artifact is missing or corrupted.
    Storage,
    /// The worker died or was cut off.
    WorkerLost,
    /// The worker gave the task back (drain, spot reclaim). Spends no retry.
    Preempted,
    /// Stopped on request.
    Cancelled,
    /// Emberline's own fault.
    System,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::UserError,
        Self::Data,
        Self::QualityGate,
        Self::Oom,
        Self::Timeout,
        Self::Storage,
        Self::WorkerLost,
        Self::Preempted,
        Self::Cancelled,
        Self::System,
    ];

    /// The name as shown and stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UserError => "user_error",
            Self::Data => "data",
            Self::QualityGate => "quality_gate",
            Self::Oom => "oom",
            Self::Timeout => "timeout",
            Self::Storage => "storage",
            Self::WorkerLost => "worker_lost",
            Self::Preempted => "preempted",
            Self::Cancelled => "cancelled",
            Self::System => "system",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A failure: its reason, and a text for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The reason.
    pub reason: Reason,
    /// What failed, where, and what to do. One line, at most [`MAX_MESSAGE_BYTES`].
    pub message: String,
}

impl Failure {
    /// Makes the message one line, for it may repeat names and words of strangers, and cuts it to
    /// [`MAX_MESSAGE_BYTES`] at a character's edge.
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        let mut message = clean(&message.into());
        if message.len() > MAX_MESSAGE_BYTES {
            let mut end = MAX_MESSAGE_BYTES - '…'.len_utf8();
            while !message.is_char_boundary(end) {
                end -= 1;
            }
            message.truncate(end);
            message.push('…');
        }
        Self { reason, message }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let failure = Failure::new(Reason::UserError, "ä".repeat(5000));
        assert!(failure.message.len() <= MAX_MESSAGE_BYTES);
        assert!(failure.message.ends_with('…'));
    }

    #[test]
    fn a_message_is_one_line_whatever_it_repeats() {
        let failure = Failure::new(Reason::Data, "the column `a\r\n\u{1b}[2Jb` is none");
        assert_eq!(failure.message, r"the column `a\r\n\u{1b}[2Jb` is none");
    }
}
