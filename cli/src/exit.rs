//! Exit codes, and how an error is told: one line for each mistake, on standard error.

use std::{fmt, process::ExitCode};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::output::clean;

/// The run failed or was cancelled.
pub const RUN_FAILED: u8 = 1;
/// The input was wrong: the pipeline file, an argument, an unknown name.
pub const WRONG_INPUT: u8 = 2;
/// The cluster could not be reached, started, or did not answer.
pub const NO_CLUSTER: u8 = 3;
/// Interrupted by the user.
pub const INTERRUPTED: u8 = 130;

/// An end with a code and lines for people.
#[derive(Debug)]
pub struct Exit {
    /// The process's exit code.
    pub code: u8,
    /// One line for each mistake; none where all was said before.
    pub lines: Vec<String>,
}

impl Exit {
    /// With one line.
    pub fn new(code: u8, line: impl Into<String>) -> Self {
        Self {
            code,
            lines: vec![line.into()],
        }
    }

    /// The input was wrong.
    pub fn input(line: impl Into<String>) -> Self {
        Self::new(WRONG_INPUT, line)
    }

    /// The cluster could not be reached or started.
    pub fn cluster(line: impl Into<String>) -> Self {
        Self::new(NO_CLUSTER, line)
    }

    /// All was said before.
    pub const fn silent(code: u8) -> Self {
        Self {
            code,
            lines: Vec::new(),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines.join("\n"))
    }
}

impl std::error::Error for Exit {}

impl From<Status> for Exit {
    /// Each field violation is a line of its own; otherwise the message is the line.
    fn from(status: Status) -> Self {
        let code = match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::FailedPrecondition
            | Code::OutOfRange => WRONG_INPUT,
            Code::AlreadyExists | Code::PermissionDenied | Code::Unauthenticated => WRONG_INPUT,
            _ => NO_CLUSTER,
        };
        let violations: Vec<String> = status
            .get_details_bad_request()
            .map(|b| b.field_violations)
            .unwrap_or_default()
            .into_iter()
            .map(|v| match v.description.contains(&v.field) {
                // A mistake in a pipeline names its field itself.
                true => v.description,
                false => format!("{}: {}", v.field, v.description),
            })
            .collect();
        if !violations.is_empty() {
            return Self {
                code,
                lines: violations,
            };
        }
        let hint = match status.code() {
            Code::ResourceExhausted => {
                match status.get_details_retry_info().and_then(|r| r.retry_delay) {
                    Some(delay) => format!(" (try again in {:.1} s)", delay.as_secs_f64()),
                    None => " (try again later)".to_owned(),
                }
            }
            _ => String::new(),
        };
        Self::new(code, format!("{}{hint}", status.message()))
    }
}

/// Says what went wrong and gives the process's exit code.
pub fn leave(outcome: anyhow::Result<()>) -> ExitCode {
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    let closed_pipe = error.chain().any(|cause| {
        let plain = cause.downcast_ref::<std::io::Error>().map(|e| e.kind());
        let json = cause.downcast_ref::<serde_json::Error>();
        let kind = plain.or_else(|| json.and_then(serde_json::Error::io_error_kind));
        kind == Some(std::io::ErrorKind::BrokenPipe)
    });
    if closed_pipe {
        // The reader has seen enough, e.g. `emberline runs list | head`.
        return ExitCode::SUCCESS;
    }
    let exit = match error.downcast::<Exit>() {
        Ok(exit) => exit,
        Err(error) => match error.downcast::<Status>() {
            Ok(status) => Exit::from(status),
            Err(error) => Exit::new(RUN_FAILED, format!("{error:#}")),
        },
    };
    for line in &exit.lines {
        eprintln!("error: {}", clean(line));
    }
    ExitCode::from(exit.code)
}
