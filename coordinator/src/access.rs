//! Whether a caller may do what it asks for.
//!
//! Two things speak for a caller: its certificate, where the port speaks TLS, and its token. A
//! certificate that says what its owner is keeps it to that: a worker's opens sessions and does
//! nothing else. The token says what its role allows. Where no tokens are kept (on this machine alone,
//! or by `--insecure`) everybody may do everything that the certificate does not forbid.

use std::{fmt, sync::Arc};

use emberline_common::{
    access::{Role, StaticToken, Token, TokenHash, TokenKind},
    ids::{TokenName, WorkerName},
    reload::Reloaded,
    time::Timestamp,
    tls::{CertificateRole, Identity, Peer},
};

use crate::{audit::Audit, engine::api::AccessTable};

/// Who may call a coordinator, and where changes are noted. Cheap to clone.
#[derive(Clone, Default)]
pub struct Gate {
    tokens: Option<Arc<Reloaded<Vec<StaticToken>>>>,
    audit: Option<Audit>,
}

/// Who calls.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// By what it is known.
    pub(crate) by: Known,
    /// What its certificate says.
    pub(crate) identity: Option<Identity>,
}

/// By what a caller is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Known {
    /// By nothing, and nobody asks.
    Anyone,
    /// By a token.
    Token {
        /// Its name.
        name: TokenName,
        /// What it allows.
        role: Role,
        /// Whether the file has it.
        by_file: bool,
    },
    /// By the credential of a worker that has joined.
    Worker {
        /// The worker.
        worker: WorkerName,
        /// What it has shown, or been given since.
        hash: TokenHash,
        /// The token that it joined by.
        joined_by: TokenName,
        /// Whether the file has that.
        by_file: bool,
    },
}

/// Why a caller is turned away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Denied {
    /// It has shown nothing that is valid. The text is the same whatever it was.
    Unauthenticated,
    /// It is known, and may not do that.
    Forbidden(String),
}

impl Gate {
    /// Asks everybody for a token: one of these, or one that was made since.
    #[must_use]
    pub fn closed(tokens: Arc<Reloaded<Vec<StaticToken>>>) -> Self {
        Self {
            tokens: Some(tokens),
            audit: None,
        }
    }

    /// Notes changes there, too.
    #[must_use]
    pub fn with_audit(self, audit: Option<Audit>) -> Self {
        Self { audit, ..self }
    }

    /// Whether tokens are asked for.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.tokens.is_some()
    }

    /// Where changes are noted.
    pub(crate) const fn audit(&self) -> Option<&Audit> {
        self.audit.as_ref()
    }

    /// The tokens of the file.
    pub(crate) async fn in_file(&self) -> Arc<Vec<StaticToken>> {
        match &self.tokens {
            Some(tokens) => tokens.current().await,
            None => Arc::default(),
        }
    }

    /// Who it is that calls with that token, from there.
    pub(crate) async fn identify(
        &self,
        table: &AccessTable,
        shown: Option<&Token>,
        peer: Option<&Peer>,
        now: Timestamp,
    ) -> Result<Caller, Denied> {
        let identity = peer.and_then(|peer| peer.identity.clone());
        let by = if self.is_closed() {
            let in_file = self.in_file().await;
            let known = shown.and_then(|token| known(&in_file, table, token, now));
            known.ok_or(Denied::Unauthenticated)?
        } else {
            Known::Anyone
        };
        Ok(Caller { by, identity })
    }

    /// Whether a worker's session may go on that was opened by this.
    pub(crate) async fn still_knows(&self, table: &AccessTable, by: &Known) -> bool {
        match by {
            Known::Anyone => true,
            Known::Token { name, by_file, .. } => {
                if *by_file {
                    self.in_file().await.iter().any(|token| token.name == *name)
                } else {
                    // One that has merely expired was good when the session began.
                    table.tokens.contains_key(name)
                }
            }
            Known::Worker {
                worker,
                joined_by,
                by_file,
                ..
            } => {
                table.credentials.contains_key(worker)
                    && (!by_file || self.in_file().await.iter().any(|t| t.name == *joined_by))
            }
        }
    }
}

/// By what a token makes its owner known, if it is valid.
fn known(
    in_file: &[StaticToken],
    table: &AccessTable,
    token: &Token,
    now: Timestamp,
) -> Option<Known> {
    let shown = token.hash();
    match token.kind() {
        TokenKind::Named(name) => {
            let by_file = in_file.iter().find(|token| token.name == *name);
            let made = table.tokens.get(name);
            let (hash, role, valid) = match (by_file, made) {
                (Some(token), _) => (token.hash, token.role, true),
                (None, Some(record)) => (record.hash, record.role, record.is_valid(now)),
                (None, None) => (TokenHash::NOBODY, Role::Viewer, false),
            };
            (shown == hash && valid).then(|| Known::Token {
                name: name.clone(),
                role,
                by_file: by_file.is_some(),
            })
        }
        TokenKind::Worker(worker) => {
            let record = table.credentials.get(worker);
            let is_same = record.map_or(shown == TokenHash::NOBODY, |record| record.is(shown));
            let record = record.filter(|record| is_same && now < record.expires_at)?;
            // What a token of the file has let in goes with it.
            let joined = |token: &StaticToken| token.name == record.joined_by;
            if record.by_file && !in_file.iter().any(joined) {
                return None;
            }
            Some(Known::Worker {
                worker: worker.clone(),
                hash: shown,
                joined_by: record.joined_by.clone(),
                by_file: record.by_file,
            })
        }
    }
}

impl Caller {
    /// Whether it may do what needs that role.
    pub(crate) fn may(&self, needed: Role) -> Result<(), Denied> {
        let is_work = needed == Role::Worker;
        if let Some(identity) = &self.identity {
            let fits = match identity.role {
                CertificateRole::Coordinator => true,
                CertificateRole::Worker | CertificateRole::Workers => is_work,
                CertificateRole::Client => !is_work,
                CertificateRole::Server => false,
            };
            if !fits {
                return Err(Denied::Forbidden(format!(
                    "the certificate is {identity}'s, which may not do this"
                )));
            }
        }
        match &self.by {
            Known::Anyone => Ok(()),
            Known::Worker { worker, .. } => {
                if is_work {
                    return Ok(());
                }
                Err(Denied::Forbidden(format!(
                    "the token is that of worker `{worker}`, which may not do this"
                )))
            }
            Known::Token { name, role, .. } => {
                if role.allows(needed) {
                    return Ok(());
                }
                Err(Denied::Forbidden(format!(
                    "the token `{name}` has the role {role}; this needs {needed}"
                )))
            }
        }
    }

    /// Whether it may be the worker of that name.
    pub(crate) fn may_be(&self, name: &WorkerName) -> Result<(), Denied> {
        if let Some(identity) = &self.identity
            && identity.role == CertificateRole::Worker
            && identity.name != name.as_str()
        {
            return Err(Denied::Forbidden(format!(
                "the certificate is {identity}'s, not that of worker `{name}`"
            )));
        }
        match &self.by {
            Known::Worker { worker, .. } if worker != name => Err(Denied::Forbidden(format!(
                "the token is that of worker `{worker}`, not that of `{name}`"
            ))),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anyone => f.write_str("anyone"),
            Self::Token { name, .. } => name.fmt(f),
            Self::Worker { worker, .. } => write!(f, "worker {worker}"),
        }
    }
}

#[cfg(test)]
mod tests;
