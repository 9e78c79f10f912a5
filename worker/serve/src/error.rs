//! Why a request is not answered, and who is to do what about it.

use std::{collections::HashMap, time::Duration};

use emberline_common::redirect::DOMAIN;
use http::StatusCode;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// When to come again after a refusal for lack of room.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Who waits for less than this and gets no answer has asked for too much, not found a fault.
const FAIR_MILLIS: u128 = 1000;

/// Why a request is not answered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum InferError {
    /// The request itself is wrong; `field` says where.
    #[error("{message}")]
    BadInput { field: String, message: String },
    /// There is no such model or version.
    #[error("{0}")]
    NotFound(String),
    /// It is there, and does not answer yet or any more.
    #[error("{0}")]
    NotReady(String),
    /// No room at the moment.
    #[error("{0}")]
    Overloaded(String),
    /// The message is larger than anybody may send.
    #[error("{0}")]
    TooLarge(String),
    /// The answer was not there in time.
    #[error("the answer was not there within {} ms", .0.as_millis())]
    Deadline(Duration),
    /// What was asked is not offered.
    #[error("{0}")]
    Unsupported(String),
    /// Our own fault.
    #[error("{0}")]
    Failed(String),
}

impl InferError {
    pub fn bad(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::BadInput {
            field: field.into(),
            message: message.into(),
        }
    }

    /// About one column.
    pub fn column(name: &str, message: impl std::fmt::Display) -> Self {
        Self::bad(
            format!("inputs.{}", cut(name)),
            format!("the column `{}` {message}", cut(name)),
        )
    }

    /// As an HTTP answer has it.
    pub const fn http(&self) -> StatusCode {
        match self {
            Self::BadInput { .. } => StatusCode::BAD_REQUEST,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::NotReady(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Overloaded(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Deadline(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Unsupported(_) => StatusCode::NOT_IMPLEMENTED,
            Self::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The word for it in metrics and spans.
    pub const fn outcome(&self) -> &'static str {
        match self {
            Self::BadInput { .. }
            | Self::NotFound(_)
            | Self::TooLarge(_)
            | Self::Unsupported(_) => "rejected",
            Self::NotReady(_) | Self::Overloaded(_) => "overloaded",
            // A deadline that nobody could meet says nothing against the version.
            Self::Deadline(within) if within.as_millis() < FAIR_MILLIS => "overloaded",
            Self::Deadline(_) | Self::Failed(_) => "error",
        }
    }
}

/// A name that somebody else chose, as it may stand in a message: on one line, and not too long.
pub(crate) fn cut(name: &str) -> String {
    let mut out: String = name
        .chars()
        .take(100)
        .flat_map(char::escape_debug)
        .collect();
    if name.chars().nth(100).is_some() {
        out.push('…');
    }
    out
}

/// Some of many names, for a message.
pub(crate) fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names = names.peekable();
    let shown: Vec<String> = (names.by_ref().take(20))
        .map(|name| format!("`{}`", cut(name)))
        .collect();
    let more = if names.peek().is_some() { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

impl From<InferError> for Status {
    fn from(error: InferError) -> Self {
        let message = error.to_string();
        let mut details = ErrorDetails::new();
        let (code, reason) = match error {
            InferError::BadInput { field, .. } => {
                details.add_bad_request_violation(field, message.clone());
                (Code::InvalidArgument, "INVALID_FIELD")
            }
            InferError::NotFound(_) => (Code::NotFound, "NOT_FOUND"),
            InferError::NotReady(_) => {
                details.set_retry_info(Some(RETRY_AFTER));
                (Code::Unavailable, "NOT_READY")
            }
            InferError::Overloaded(_) => {
                details.set_retry_info(Some(RETRY_AFTER));
                (Code::ResourceExhausted, "OVERLOADED")
            }
            InferError::TooLarge(_) => (Code::ResourceExhausted, "TOO_LARGE"),
            InferError::Deadline(_) => (Code::DeadlineExceeded, "TOO_SLOW"),
            InferError::Unsupported(_) => (Code::Unimplemented, "UNSUPPORTED"),
            InferError::Failed(_) => (Code::Internal, "FAILED"),
        };
        details.set_error_info(reason, DOMAIN, HashMap::new());
        Self::with_error_details(code, message, details)
    }
}
