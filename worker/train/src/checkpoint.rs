//! The whole state of a training between two steps, as bytes.
//!
//! Layout, numbers little-endian: 8 bytes magic and version, the length of the header (8), the
//! header as JSON, then weights, optimizer state and best weights with the lengths that the header
//! gives. A checkpoint of another spec, of other inputs or of another version is not used.

use emberline_worker::documents::EpochMetrics;
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"EMBCKPT\x01";

/// The state of a training between two steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Where it is and what it has seen.
    pub progress: Progress,
    /// The weights, as burn's record.
    pub weights: Vec<u8>,
    /// The optimizer's state, as burn's record.
    pub optimizer: Vec<u8>,
    /// The weights of the best epoch, if one is being watched for.
    pub best_weights: Option<Vec<u8>>,
}

/// Where a training is and what it has seen.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Whole epochs done.
    pub epochs_done: u32,
    /// Steps done in the epoch after those.
    pub steps_done: u64,
    /// The sum of the weighted losses of those steps.
    pub loss_sum: f64,
    /// The sum of the weights of those steps.
    pub weight_sum: f64,
    /// The best epoch so far, from 1; 0 if none.
    pub best_epoch: u32,
    /// The watched metric in the best epoch.
    pub best_score: Option<f64>,
    /// Epochs since it got better.
    pub epochs_without_better: u32,
    /// The metrics of the epochs done.
    pub history: Vec<EpochMetrics>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    subject: String,
    weights: u64,
    optimizer: u64,
    best_weights: Option<u64>,
    progress: Progress,
}

/// Why bytes are no usable checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// The bytes are cut or not a checkpoint.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It belongs to another spec, other inputs or another version of the program.
    #[error("it belongs to another training (other settings, data or backend)")]
    OtherSubject,
}

impl Checkpoint {
    /// As bytes. `subject`: the digest of everything that the training depends on.
    ///
    /// # Errors
    /// If the header cannot be written as JSON.
    pub fn to_bytes(&self, subject: &str) -> Result<Vec<u8>, CheckpointError> {
        let header = Header {
            subject: subject.to_owned(),
            weights: self.weights.len() as u64,
            optimizer: self.optimizer.len() as u64,
            best_weights: self.best_weights.as_ref().map(|w| w.len() as u64),
            progress: self.progress.clone(),
        };
        let header =
            serde_json::to_vec(&header).map_err(|e| CheckpointError::Damaged(e.to_string()))?;
        let best = self.best_weights.as_deref().unwrap_or_default();
        let mut out = Vec::with_capacity(
            16 + header.len() + self.weights.len() + self.optimizer.len() + best.len(),
        );
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&(header.len() as u64).to_le_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(&self.weights);
        out.extend_from_slice(&self.optimizer);
        out.extend_from_slice(best);
        Ok(out)
    }

    /// From bytes.
    ///
    /// # Errors
    /// If they are damaged, or the checkpoint has another subject.
    pub fn from_bytes(bytes: &[u8], subject: &str) -> Result<Self, CheckpointError> {
        let cut = || CheckpointError::Damaged("it ends too early".to_owned());
        let mut rest = bytes;
        let mut take = |count: u64| {
            let count = usize::try_from(count).ok().filter(|c| *c <= rest.len())?;
            let (head, tail) = rest.split_at(count);
            rest = tail;
            Some(head)
        };
        if take(8).ok_or_else(cut)? != MAGIC {
            return Err(CheckpointError::Damaged(
                "it does not begin as one of this version".to_owned(),
            ));
        }
        let length = take(8)
            .and_then(|b| b.try_into().ok())
            .map(u64::from_le_bytes);
        let header = length.and_then(&mut take).ok_or_else(cut)?;
        let header: Header =
            serde_json::from_slice(header).map_err(|e| CheckpointError::Damaged(e.to_string()))?;
        if header.subject != subject {
            return Err(CheckpointError::OtherSubject);
        }
        let weights = take(header.weights).ok_or_else(cut)?.to_vec();
        let optimizer = take(header.optimizer).ok_or_else(cut)?.to_vec();
        let best_weights = match header.best_weights {
            Some(length) => Some(take(length).ok_or_else(cut)?.to_vec()),
            None => None,
        };
        if !rest.is_empty() {
            return Err(CheckpointError::Damaged("it has bytes too many".to_owned()));
        }
        Ok(Self {
            progress: header.progress,
            weights,
            optimizer,
            best_weights,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            progress: Progress {
                epochs_done: 3,
                loss_sum: 0.1 + 0.2,
                best_score: Some(1.0 / 3.0),
                ..Progress::default()
            },
            weights: vec![1; 100],
            optimizer: vec![2; 200],
            best_weights: Some(vec![3; 50]),
        }
    }

    #[test]
    fn it_reads_back_what_it_wrote_to_the_last_bit() {
        let bytes = checkpoint().to_bytes("a").unwrap();
        assert_eq!(Checkpoint::from_bytes(&bytes, "a").unwrap(), checkpoint());
    }

    #[test]
    fn one_of_another_training_is_refused() {
        let bytes = checkpoint().to_bytes("a").unwrap();
        let error = Checkpoint::from_bytes(&bytes, "b").unwrap_err();
        assert_eq!(error, CheckpointError::OtherSubject);
    }

    #[test]
    fn a_cut_or_hostile_one_is_refused_wherever_it_is_cut() {
        let mut bytes = checkpoint().to_bytes("a").unwrap();
        for end in 0..bytes.len() {
            let cut = Checkpoint::from_bytes(&bytes[..end], "a");
            assert!(matches!(cut, Err(CheckpointError::Damaged(_))), "at {end}");
        }
        bytes.push(0);
        assert!(Checkpoint::from_bytes(&bytes, "a").is_err());
        bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(Checkpoint::from_bytes(&bytes, "a").is_err());
    }
}
