//! A way in for what feeds this crate with anything; for nobody else.

use emberline_proto::v1::WorkerMessage;

/// Translates what a worker says; whether it can be translated.
#[must_use]
pub fn worker_message(message: WorkerMessage) -> bool {
    crate::services::workers::translated(message).is_ok()
}
