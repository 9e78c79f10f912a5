//! Where the agreed state lives: keys with small JSON values, one leader, and guarded commits.
//!
//! [`StateStore`] is the whole contract. It has one implementation for one machine ([`embedded`]) and
//! one for a cluster ([`etcd`]); both are held to the same tests ([`conformance`]). A store never looks into a
//! value, and never decides: who may write is told by the *guard*, the epoch that each commit
//! compares in its own transaction. Start with [`StateStore::commit`].

pub mod conformance;
pub mod embedded;
pub mod etcd;

use std::sync::Arc;

use emberline_common::{ids::Epoch, time::Timestamp};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;

use crate::engine::api::Write;

/// The version of the state's layout that this build writes and reads.
pub const SCHEMA_VERSION: u32 = 4;

/// The key of the schema version. It is the store's own: the engine never sees it.
pub const SCHEMA_KEY: &str = "schema";

/// One key with its value.
pub type Record = (String, Vec<u8>);

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, Error)]
pub enum StoreError {
    /// The guard failed: another leader has been chosen. Nothing was written.
    #[error("term {epoch} is over: another coordinator leads now, nothing was written")]
    Deposed {
        /// The term that is over.
        epoch: Epoch,
    },
    /// Another process holds the state.
    #[error(
        "the state file {path} is in use by {holder}: stop that process, or choose another state directory"
    )]
    Held {
        /// The file.
        path: String,
        /// The process, as far as it is known.
        holder: String,
    },
    /// There is no room. Nothing of the commit was written.
    #[error("no space left for the state file {path}: free some space and start again")]
    Full {
        /// The file.
        path: String,
    },
    /// What lies there cannot be read.
    #[error(
        "the state file {path} is damaged or is none of ours ({what}): restore it from a copy, or move it away to start anew"
    )]
    Corrupted {
        /// The file.
        path: String,
        /// What does not fit.
        what: String,
    },
    /// A newer build has written the state.
    #[error(
        "the state has schema version {found}, this build knows {supported} at most: use a newer emberline"
    )]
    NewerSchema {
        /// What is there.
        found: u64,
        /// What this build knows.
        supported: u32,
    },
    /// Anything else, of which the store knows that nothing was written or that it cannot tell.
    #[error("the state store failed to {what}: {source}")]
    Failed {
        /// What it was about to do.
        what: &'static str,
        /// Why it failed.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The store was set up in a way that cannot be right.
    #[error("{0}")]
    Config(String),
    /// The prefix belongs to a cluster that keeps its artifacts elsewhere.
    #[error(
        "the etcd prefix `{prefix}` belongs to a cluster that keeps its artifacts in {theirs}, not in {ours}: choose another prefix for this one, or set the same object store"
    )]
    OtherCluster {
        /// The prefix.
        prefix: String,
        /// The other one's object store.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// The store has been closed, or has failed before.
    #[error("the state store is closed")]
    Closed,
}

impl StoreError {
    /// A failure of which there is only a text.
    pub(crate) fn failed(what: &'static str, text: String) -> Self {
        Self::Failed {
            what,
            source: Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(text)),
        }
    }
}

/// A coordinator that wants to lead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its name, for people.
    pub name: String,
    /// Where it serves, `host:port`.
    pub address: String,
}

/// The coordinator that leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    /// Its name.
    pub name: String,
    /// Where it serves, `host:port`.
    pub address: String,
    /// Its term.
    pub epoch: Epoch,
}

/// What kind of thing keeps a store from writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TroubleKind {
    /// Nothing of it can be reached.
    Unreachable,
    /// It answers, but too few of its members are there.
    NoQuorum,
    /// It is full.
    NoSpace,
    /// It refuses us: a wrong user, a missing permission, a bad certificate.
    Refused,
}

impl TroubleKind {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Unreachable,
        Self::NoQuorum,
        Self::NoSpace,
        Self::Refused,
    ];

    /// The name as metrics have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::NoQuorum => "no_quorum",
            Self::NoSpace => "no_space",
            Self::Refused => "refused",
        }
    }
}

/// What keeps a store from writing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What kind of thing it is.
    pub kind: TroubleKind,
    /// For people: what, and since when.
    pub text: String,
    /// Since when.
    pub since: Timestamp,
}

/// How much one commit should hold. A single decision may be larger, and is still one commit.
#[derive(Debug, Clone, Copy)]
pub struct BatchLimits {
    /// Records.
    pub records: usize,
    /// Bytes of keys and values.
    pub bytes: usize,
}

/// Keeps the agreed state.
///
/// Everything that is answered with `Ok` is durable: it survives a power cut.
pub trait StateStore: Send + Sync + 'static {
    /// Every record whose key begins with `prefix`, in the order of the keys' bytes.
    ///
    /// # Errors
    /// Any [`StoreError`] but [`StoreError::Deposed`].
    fn load(&self, prefix: &str) -> BoxFuture<'_, Result<Vec<Record>, StoreError>>;

    /// Writes all of `writes`, in their order, or nothing. The term `epoch` is compared with the
    /// leader's in the same transaction.
    ///
    /// # Errors
    /// [`StoreError::Deposed`] if `epoch` is not the leader's term; nothing was written.
    fn commit(&self, epoch: Epoch, writes: Vec<Write>) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Becomes the leader, waiting until that is possible. The term is higher than any before.
    ///
    /// # Errors
    /// Any [`StoreError`] but [`StoreError::Deposed`].
    fn campaign(&self, candidate: Candidate) -> BoxFuture<'_, Result<Epoch, StoreError>>;

    /// Stops leading, if `epoch` is still the leader's term; otherwise does nothing.
    ///
    /// # Errors
    /// Any [`StoreError`] but [`StoreError::Deposed`].
    fn resign(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Who leads now.
    ///
    /// # Errors
    /// Any [`StoreError`] but [`StoreError::Deposed`].
    fn leader(&self) -> BoxFuture<'_, Result<Option<Leader>, StoreError>>;

    /// Follows who leads. The value is what the store saw last.
    fn watch_leader(&self) -> watch::Receiver<Option<Leader>>;

    /// How much one commit should hold.
    fn batch_limits(&self) -> BatchLimits;

    /// Whether the term can't have ended yet, by this machine's own monotonic clock. Needs no I/O: it
    /// is asked before anything is told that was not committed just now.
    fn holds(&self, epoch: Epoch) -> bool {
        let _ = epoch;
        true
    }

    /// Resolves when the term is over, or may be. Where only a commit can tell, never.
    fn term_ended(&self, epoch: Epoch) -> BoxFuture<'static, ()> {
        let _ = epoch;
        Box::pin(std::future::pending())
    }

    /// What keeps the store from writing now, if anything does.
    fn trouble(&self) -> Option<Trouble> {
        None
    }

    /// Ends the term of a leader whose process is known to have ended, if it is still the leader's.
    /// If it is not dead after all, it loses nothing but the leadership: its commits are refused.
    ///
    /// # Errors
    /// Any [`StoreError`] but [`StoreError::Deposed`].
    fn depose(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        let _ = epoch;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Says that a coordinator is there, whether it leads or not, for as long as it is polled.
    fn announce(&self, candidate: Candidate) -> BoxFuture<'static, ()> {
        let _ = candidate;
        Box::pin(std::future::pending())
    }

    /// Coordinators that are there. Empty where there is no more than the leader.
    ///
    /// # Errors
    /// Any [`StoreError`] but [`StoreError::Deposed`].
    fn coordinators(&self) -> BoxFuture<'_, Result<Vec<Candidate>, StoreError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Makes sure that this state belongs to the cluster that keeps its artifacts there.
    ///
    /// # Errors
    /// [`StoreError::OtherCluster`], [`StoreError::Deposed`].
    fn claim(&self, epoch: Epoch, artifacts: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        let _ = (epoch, artifacts);
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Refuses a state that a newer build has written; notes our version in one that has none or an
/// older one.
///
/// # Errors
/// [`StoreError::NewerSchema`], or what the store says.
pub async fn check_schema(store: &dyn StateStore, epoch: Epoch) -> Result<(), StoreError> {
    let records = store.load(SCHEMA_KEY).await?;
    let found = records.iter().find(|(key, _)| key == SCHEMA_KEY);
    let found = found.map(|(_, value)| serde_json::from_slice::<u64>(value));
    let found = found.transpose().map_err(|e| StoreError::Corrupted {
        path: SCHEMA_KEY.to_owned(),
        what: format!("the schema version is no number: {e}"),
    })?;
    let ours = u64::from(SCHEMA_VERSION);
    match found {
        Some(found) if found > ours => Err(StoreError::NewerSchema {
            found,
            supported: SCHEMA_VERSION,
        }),
        Some(found) if found == ours => Ok(()),
        // From now on there may be records that an older build cannot read.
        _ => {
            let write = Write::Put {
                key: SCHEMA_KEY.to_owned(),
                value: SCHEMA_VERSION.to_string().into_bytes(),
            };
            store.commit(epoch, vec![write]).await
        }
    }
}
