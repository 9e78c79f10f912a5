//! What can go wrong in training and evaluation, and whose fault it is.

use emberline_common::failure::Reason;
use emberline_worker::stage::{StageError, StopReason};

/// A failure of training, evaluation, or of loading a model.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The stage's settings do not fit each other or the data.
    #[error("{0}")]
    Spec(String),
    /// The data cannot be learned from, or does not fit the model.
    #[error("{0}")]
    Data(String),
    /// The loss or a weight is no longer a finite number.
    #[error(
        "the loss became {loss} at step {step} of epoch {epoch}: lower `optimizer.learning_rate` or set `optimizer.clip_norm`; the last good checkpoint is kept"
    )]
    Diverged {
        /// The loss.
        loss: f64,
        /// The epoch, from 1.
        epoch: u32,
        /// The step in the epoch, from 1.
        step: u64,
    },
    /// A model's files are damaged or of another version.
    #[error("the model cannot be loaded: {0}")]
    Model(String),
    /// A file cannot be read or written.
    #[error("cannot {doing} `{path}`: {source}")]
    Io {
        /// What was done.
        doing: &'static str,
        /// The file.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The compute backend failed.
    #[error("the backend failed: {0}")]
    Backend(String),
    /// It was asked to stop.
    #[error("stopped")]
    Stopped(StopReason),
    /// A checkpoint could not be saved or loaded.
    #[error("{0}")]
    Checkpoint(StageError),
}

impl TrainError {
    pub(crate) fn io(doing: &'static str, path: &std::path::Path, source: std::io::Error) -> Self {
        Self::Io {
            doing,
            path: path.display().to_string(),
            source,
        }
    }

    pub(crate) fn backend(error: impl std::fmt::Display) -> Self {
        Self::Backend(error.to_string())
    }
}

impl From<TrainError> for StageError {
    fn from(error: TrainError) -> Self {
        let reason = match &error {
            TrainError::Spec(_) | TrainError::Diverged { .. } => Reason::UserError,
            TrainError::Data(_) => Reason::Data,
            TrainError::Model(_) | TrainError::Io { .. } => Reason::Storage,
            TrainError::Backend(_) => Reason::System,
            TrainError::Stopped(why) => {
                let text = match why {
                    StopReason::Cancelled => "stopped on request",
                    StopReason::Timeout => "went over its time limit",
                    StopReason::Preempted => "given back by its worker, with a checkpoint",
                };
                return Self::new(why.reason(), text);
            }
            TrainError::Checkpoint(_) => {
                let TrainError::Checkpoint(inner) = error else {
                    return Self::system("a checkpoint failed");
                };
                return inner;
            }
        };
        Self::new(reason, error.to_string())
    }
}
