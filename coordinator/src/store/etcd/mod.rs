//! The store for a cluster: keys in etcd, a leader under a lease, guarded transactions.
//!
//! Below the prefix stand `leader` (under the leader's lease; its create revision is the *epoch*),
//! `commit` (the last commit of the current term), `state/…` (the records), `journal/…` (commits too
//! large for one transaction, while they are applied), `coordinators/…` (those that are there, each
//! under a lease of its own) and `cluster` (whose prefix this is).
//!
//! Every transaction that writes compares the leader key's create revision and the revision of
//! `commit`. So a leader that was replaced writes nothing, and a commit whose answer was lost can be
//! sent again: it is applied once. Nothing here trusts a lease or a clock for that; leases only
//! decide how soon somebody else may lead. Start with [`EtcdStore`]; the transactions are in
//! [`commit`], the term in [`lease`], the connections in [`members`].

mod commit;
mod doctor;
mod history;
mod lease;
mod load;
mod members;
#[cfg(test)]
mod tests;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use emberline_common::{ids::Epoch, reload::Reloaded};
use etcd_client::{Certificate, Identity, TlsOptions};
use futures::future::BoxFuture;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::doctor::examine;
pub use self::history::Change;
use self::{
    lease::Term,
    members::{CallError, Members, Patience},
};
use super::{BatchLimits, Candidate, Leader, Record, StateStore, StoreError, Trouble};
use crate::engine::api::Write;

/// How long the first look at etcd may take before the start is reported as waiting.
const FIRST_LOOK: Duration = Duration::from_secs(5);

/// Operations of one transaction. etcd takes 128 by default; one is the store's own.
const MAX_OPS: usize = 120;
/// Bytes of one transaction. etcd takes 1.5 MiB by default.
const MAX_BYTES: usize = 1 << 20;

/// Where etcd is, and how to use it.
#[derive(Clone)]
pub struct EtcdConfig {
    /// URLs of its members.
    pub endpoints: Vec<String>,
    /// What every key begins with; one for each cluster of Emberline.
    pub prefix: String,
    /// User and password.
    pub user: Option<(String, String)>,
    /// Certificates, for `https:`.
    pub tls: Option<EtcdTls>,
    /// How long the leader's lease is: after so long without a word from it another one leads.
    pub lease_ttl: Duration,
    /// How often the leader lets etcd forget the history of the keys. `None`: never.
    pub compact_every: Option<Duration>,
}

/// Certificates: files that are read again when they have changed, for the connections from then on.
#[derive(Clone)]
pub struct EtcdTls {
    files: Arc<Reloaded<Certificates>>,
}

/// What the files say, in PEM.
struct Certificates {
    /// Of the authority that signed etcd's certificate.
    ca: Option<Vec<u8>>,
    /// Our own certificate and key.
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl EtcdTls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`StoreError::Config`] names the file.
    pub fn read(
        ca: Option<PathBuf>,
        certificate: Option<PathBuf>,
        key: Option<PathBuf>,
    ) -> Result<Option<Self>, StoreError> {
        let identity = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => {
                return Err(StoreError::Config(
                    "a certificate for etcd needs its key, and a key its certificate".into(),
                ));
            }
        };
        if ca.is_none() && identity.is_none() {
            return Ok(None);
        }
        let own = identity
            .iter()
            .flat_map(|(certificate, key)| [certificate, key]);
        let files = ca.iter().chain(own).cloned().collect();
        let read = |path: &PathBuf| {
            std::fs::read(path)
                .map_err(|e| StoreError::Config(format!("cannot read `{}`: {e}", path.display())))
        };
        let files = Reloaded::open("certificates for etcd", files, move || {
            let identity = match &identity {
                Some((certificate, key)) => Some((read(certificate)?, read(key)?)),
                None => None,
            };
            let ca = ca.as_ref().map(read).transpose()?;
            Ok::<_, StoreError>(Certificates { ca, identity })
        })?;
        Ok(Some(Self { files }))
    }
}

impl Certificates {
    fn options(&self) -> TlsOptions {
        let mut options = TlsOptions::new();
        if let Some(ca) = &self.ca {
            options = options.ca_certificate(Certificate::from_pem(ca));
        }
        if let Some((certificate, key)) = &self.identity {
            options = options.identity(Identity::from_pem(certificate, key));
        }
        options
    }
}

/// A [`StateStore`] in etcd. Dropping it stops its tasks and says no farewell: the lease ends by itself.
pub struct EtcdStore {
    inner: Arc<Inner>,
    leader: watch::Receiver<Option<Leader>>,
    _stop: DropGuard,
}

struct Inner {
    members: Members,
    /// Connections of their own for what is about the leadership: no large commit delays a renewal.
    pulse: Members,
    keys: Keys,
    lease_ttl: Duration,
    compact_every: Option<Duration>,
    term: Mutex<Option<Arc<Term>>>,
    stop: CancellationToken,
}

/// The store's own keys.
struct Keys {
    prefix: String,
    leader: String,
    commit: String,
    cluster: String,
}

impl Keys {
    fn new(prefix: &str) -> Self {
        Self {
            leader: format!("{prefix}/leader"),
            commit: format!("{prefix}/commit"),
            cluster: format!("{prefix}/cluster"),
            prefix: prefix.to_owned(),
        }
    }

    fn record(&self, key: &str) -> String {
        format!("{}/state/{key}", self.prefix)
    }

    fn coordinator(&self, address: &str) -> String {
        format!("{}/coordinators/{address}", self.prefix)
    }

    fn journal(&self) -> String {
        format!("{}/journal/", self.prefix)
    }
}

impl EtcdStore {
    /// Connects. If etcd cannot be reached, this is no error: calls wait for it, and
    /// [`StateStore::trouble`] says what they wait for.
    ///
    /// # Errors
    /// [`StoreError::Config`] if the configuration cannot be right, [`StoreError::Failed`] if etcd
    /// refuses (user, password, certificate).
    pub async fn open(config: EtcdConfig) -> Result<Self, StoreError> {
        let prefix = config.prefix.trim_matches('/').to_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        if prefix.is_empty() || prefix.len() > 200 || !prefix.chars().all(plain) {
            return Err(StoreError::Config(format!(
                "the etcd prefix `{}` must be 1 to 200 letters, digits and `-_./`",
                config.prefix.escape_debug()
            )));
        }
        if config.lease_ttl < Duration::from_secs(2) || config.lease_ttl > Duration::from_secs(60) {
            return Err(StoreError::Config(format!(
                "the lease of {:?} must be between 2 s (etcd's own minimum) and 60 s",
                config.lease_ttl
            )));
        }
        let members = Members::new(&config)?;
        let pulse = Members::new(&config)?;
        let stop = CancellationToken::new();
        let inner = Arc::new(Inner {
            members,
            pulse,
            keys: Keys::new(&prefix),
            lease_ttl: config.lease_ttl,
            compact_every: config.compact_every,
            term: Mutex::new(None),
            stop: stop.clone(),
        });
        let patience = Patience::Checking(Instant::now() + FIRST_LOOK);
        match inner.read_leader(patience).await {
            Ok(_) | Err(CallError::GaveUp(_)) => {}
            Err(e) => return Err(e.into_store("look at etcd")),
        }
        let (seen, leader) = watch::channel(None);
        // Ends with `stop`, which ends with the store.
        tokio::spawn(Arc::clone(&inner).follow(seen));
        Ok(Self {
            inner,
            leader,
            _stop: stop.drop_guard(),
        })
    }
}

impl Inner {
    fn term(&self, epoch: Epoch) -> Option<Arc<Term>> {
        let term = self.term.lock().unwrap_or_else(PoisonError::into_inner);
        term.as_ref().filter(|t| t.epoch == epoch).cloned()
    }

    fn set_term(&self, term: Option<Arc<Term>>) {
        *self.term.lock().unwrap_or_else(PoisonError::into_inner) = term;
    }
}

impl StateStore for EtcdStore {
    fn load(&self, prefix: &str) -> BoxFuture<'_, Result<Vec<Record>, StoreError>> {
        let prefix = prefix.to_owned();
        Box::pin(async move { self.inner.load(&prefix).await })
    }

    fn commit(&self, epoch: Epoch, writes: Vec<Write>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.inner.commit(epoch, writes))
    }

    fn campaign(&self, candidate: Candidate) -> BoxFuture<'_, Result<Epoch, StoreError>> {
        Box::pin(async move {
            let term = self.inner.campaign(candidate, self.leader.clone()).await?;
            // Ends with the term, which ends with the store.
            tokio::spawn(Arc::clone(&self.inner).keep(Arc::clone(&term)));
            self.inner.recover(&term).await?;
            Ok(term.epoch)
        })
    }

    fn resign(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.inner.resign(epoch))
    }

    fn leader(&self) -> BoxFuture<'_, Result<Option<Leader>, StoreError>> {
        Box::pin(async {
            let read = self.inner.read_leader(Patience::Endless).await;
            let read = read.map_err(|e| e.into_store("read who leads"))?;
            Ok(read.leader)
        })
    }

    fn watch_leader(&self) -> watch::Receiver<Option<Leader>> {
        self.leader.clone()
    }

    fn batch_limits(&self) -> BatchLimits {
        BatchLimits {
            records: MAX_OPS - 1,
            bytes: MAX_BYTES,
        }
    }

    fn holds(&self, epoch: Epoch) -> bool {
        self.inner.term(epoch).is_some_and(|term| term.holds())
    }

    fn term_ended(&self, epoch: Epoch) -> BoxFuture<'static, ()> {
        match self.inner.term(epoch) {
            Some(term) => Box::pin(async move { term.ended.cancelled().await }),
            None => Box::pin(std::future::ready(())),
        }
    }

    fn trouble(&self) -> Option<Trouble> {
        let pulse = || self.inner.pulse.trouble();
        let trouble = self.inner.members.trouble().or_else(pulse);
        trouble.map(|trouble| Trouble {
            kind: trouble.kind(),
            text: trouble.to_string(),
            since: trouble.since,
        })
    }

    fn depose(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.inner.depose(epoch))
    }

    fn announce(&self, candidate: Candidate) -> BoxFuture<'static, ()> {
        Box::pin(Arc::clone(&self.inner).announce(candidate))
    }

    fn coordinators(&self) -> BoxFuture<'_, Result<Vec<Candidate>, StoreError>> {
        Box::pin(self.inner.coordinators())
    }

    fn claim(&self, epoch: Epoch, artifacts: &str) -> BoxFuture<'_, Result<(), StoreError>> {
        let artifacts = artifacts.to_owned();
        Box::pin(async move { self.inner.claim(epoch, &artifacts).await })
    }
}
