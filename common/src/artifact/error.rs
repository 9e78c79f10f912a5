//! What can go wrong with stored bytes, and what to do about it.

use std::path::PathBuf;

use thiserror::Error;

use super::{StoreFault, explain};
use crate::ids::Digest;

/// What went wrong.
#[derive(Debug, Error)]
pub enum ArtifactError {
    /// The URL of the store is not one that can be used.
    #[error("cannot use the object store `{url}`: {why}")]
    Url {
        /// As given, without credentials.
        url: String,
        /// Why.
        why: String,
    },
    /// Nothing is stored under the digest: it was collected, or somebody deleted it.
    #[error("the object {digest} is not in the store {url}: it was deleted, or never stored")]
    NotFound {
        /// The digest.
        digest: Digest,
        /// The store.
        url: String,
    },
    /// The bytes do not hash to their name, also when read a second time.
    #[error(
        "the object {digest} in the store {url} is corrupted: its bytes hash to {actual}; delete it and run again"
    )]
    Corrupted {
        /// The digest that names it.
        digest: Digest,
        /// What its bytes hash to.
        actual: Digest,
        /// The store.
        url: String,
    },
    /// A part of it did not come in time.
    #[error(
        "the object store {url} is too slow: {bytes} bytes of the object {digest} did not come within {within:?}; look at its load and at the network"
    )]
    Slow {
        /// The digest.
        digest: Digest,
        /// The store.
        url: String,
        /// The size of the part.
        bytes: u64,
        /// How long it was waited for.
        within: std::time::Duration,
    },
    /// The object is larger than the caller can take.
    #[error("the object {digest} has {bytes} bytes, more than the {limit} allowed here")]
    TooLarge {
        /// The digest.
        digest: Digest,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The bytes that came do not hash to what was announced.
    #[error("the bytes hash to {actual}, not to {expected} as announced")]
    Mismatch {
        /// What was announced.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// A manifest is not well formed.
    #[error("the manifest {digest} is not well formed: {why}")]
    Manifest {
        /// Its digest.
        digest: Digest,
        /// Why.
        why: String,
    },
    /// The disk is full.
    #[error("the disk is full: cannot {what}; free some space and run again")]
    DiskFull {
        /// What was being done.
        what: String,
    },
    /// The local file system refused.
    #[error("cannot {what} `{path}`: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The object store refused.
    #[error("the object store {url} failed: cannot {what}: {}", explain(source))]
    Store {
        /// The store.
        url: String,
        /// What was being done.
        what: String,
        /// Why.
        source: object_store::Error,
    },
}

impl ArtifactError {
    /// An I/O error on a local file; a full disk is told as such.
    #[must_use]
    pub fn io(what: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let path = path.into();
        if is_full(source.kind()) {
            Self::DiskFull {
                what: format!("{what} `{}`", path.display()),
            }
        } else {
            Self::Io { what, path, source }
        }
    }

    /// An error of the object store; a full disk below it is told as such.
    #[must_use]
    pub fn store(url: &str, what: impl Into<String>, source: object_store::Error) -> Self {
        let what = what.into();
        if is_disk_full(&source) {
            Self::DiskFull { what }
        } else {
            Self::Store {
                url: url.to_owned(),
                what,
                source,
            }
        }
    }

    /// Why the object store failed, if that is what went wrong.
    #[must_use]
    pub fn store_fault(&self) -> Option<StoreFault> {
        match self {
            Self::Store { source, .. } => Some(explain(source).fault),
            Self::Slow { .. } => Some(StoreFault::Broken),
            _ => None,
        }
    }

    /// The digest of what is missing or corrupted, if that is what went wrong.
    #[must_use]
    pub const fn bad_digest(&self) -> Option<Digest> {
        match self {
            Self::NotFound { digest, .. }
            | Self::Corrupted { digest, .. }
            | Self::Manifest { digest, .. } => Some(*digest),
            _ => None,
        }
    }
}

fn is_disk_full(error: &object_store::Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|io| is_full(io.kind())) {
            return true;
        }
        next = error.source();
    }
    false
}

const fn is_full(kind: std::io::ErrorKind) -> bool {
    matches!(
        kind,
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
    )
}
