//! Who may do what, as far as the state says: tokens that people have made, and credentials of workers
//! that have joined. Only hashes are kept.
//!
//! Whoever checks a call looks at a picture of it all ([`AccessTable`]), which is let out when the
//! commit that changed it has succeeded. What has expired stays in it until something else is made;
//! whoever checks compares the times.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use emberline_common::{
    access::{Role, TokenHash},
    ids::{TokenName, WorkerName},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    Engine,
    api::{Effect, Outcome, Refusal, Write},
    records::{encode, keys},
};

/// Tokens at a time, at most.
const MAX_TOKENS: usize = 1000;
/// Workers with a credential, at most.
const MAX_CREDENTIALS: usize = 20_000;

/// A token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// What it allows.
    pub role: Role,
    /// What is known of it.
    pub hash: TokenHash,
    /// When it was made.
    pub created_at: Timestamp,
    /// Until when it is valid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// Who made it.
    pub made_by: String,
}

/// What a worker has that has joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialRecord {
    /// What is known of it.
    pub hash: TokenHash,
    /// The one before, which the worker goes on showing if it has not come to keep this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<TokenHash>,
    /// The token that the worker joined by.
    pub joined_by: TokenName,
    /// Whether that token is one of the file's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_file: bool,
    /// When it was issued.
    pub issued_at: Timestamp,
    /// Until when it is valid.
    pub expires_at: Timestamp,
}

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessTable {
    /// By name.
    pub tokens: BTreeMap<TokenName, TokenRecord>,
    /// By worker.
    pub credentials: BTreeMap<WorkerName, CredentialRecord>,
}

/// What is to become of it.
#[derive(Debug, Clone)]
pub enum TokenCommand {
    /// Make a token.
    Create {
        /// Its name.
        name: TokenName,
        /// What it allows.
        role: Role,
        /// What is known of it.
        hash: TokenHash,
        /// How long it is valid.
        ttl: Option<Duration>,
        /// Who makes it.
        made_by: String,
    },
    /// Revoke a token, and the credentials of workers that have joined by it.
    Revoke {
        /// Its name.
        name: TokenName,
    },
    /// Revoke a worker's credential.
    RevokeWorker {
        /// The worker.
        worker: WorkerName,
    },
    /// Give a worker a credential, which replaces the one that it has.
    Issue {
        /// The worker.
        worker: WorkerName,
        /// What is known of it.
        hash: TokenHash,
        /// The credential that the worker shows now.
        previous: Option<TokenHash>,
        /// The token that the worker joined by.
        joined_by: TokenName,
        /// Whether that token is one of the file's.
        by_file: bool,
        /// How long it is valid.
        ttl: Duration,
    },
}

/// Why that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokenRefusal {
    /// There is another one of that name.
    #[error("there is another token `{0}` already: revoke it first, or choose another name")]
    Exists(TokenName),
    /// There is none.
    #[error("there is no token `{0}` that could be revoked here")]
    NoSuchToken(TokenName),
    /// The worker has none.
    #[error("worker `{0}` has no credential")]
    NoSuchCredential(WorkerName),
    /// There are too many.
    #[error("there are {limit} {what} already: revoke some")]
    TooMany {
        /// The limit.
        limit: usize,
        /// Of what.
        what: &'static str,
    },
}

impl CredentialRecord {
    /// Whether it is this one, or the one before.
    #[must_use]
    pub fn is(&self, shown: TokenHash) -> bool {
        let is_previous = self.previous.is_some_and(|previous| previous == shown);
        self.hash == shown || is_previous
    }
}

impl TokenRecord {
    /// Whether it is still valid.
    #[must_use]
    pub fn is_valid(&self, now: Timestamp) -> bool {
        self.expires_at.is_none_or(|until| now < until)
    }
}

impl Engine {
    /// All tokens and credentials.
    #[must_use]
    pub fn access(&self) -> &Arc<AccessTable> {
        &self.access
    }

    pub(super) fn change_tokens(&mut self, command: TokenCommand) -> Result<Outcome, Refusal> {
        let revoked = match command {
            TokenCommand::Create {
                name,
                role,
                hash,
                ttl,
                made_by,
            } => {
                self.create_token(name, role, hash, ttl, made_by)?;
                0
            }
            TokenCommand::Revoke { name } => self.revoke_token(&name)?,
            TokenCommand::RevokeWorker { worker } => {
                if !self.access.credentials.contains_key(&worker) {
                    return Err(TokenRefusal::NoSuchCredential(worker).into());
                }
                self.drop_credential(&worker);
                1
            }
            TokenCommand::Issue {
                worker,
                hash,
                previous,
                joined_by,
                by_file,
                ttl,
            } => {
                let record = CredentialRecord {
                    hash,
                    previous,
                    joined_by,
                    by_file,
                    issued_at: self.now,
                    expires_at: self.now.after(ttl),
                };
                self.issue(worker, record)?;
                0
            }
        };
        self.effect(Effect::Access(Arc::clone(&self.access)));
        Ok(Outcome::Revoked {
            credentials: revoked,
        })
    }

    fn create_token(
        &mut self,
        name: TokenName,
        role: Role,
        hash: TokenHash,
        ttl: Option<Duration>,
        made_by: String,
    ) -> Result<(), TokenRefusal> {
        self.drop_expired();
        if let Some(known) = self.access.tokens.get(&name) {
            // Its answer was lost, and it is asked for again.
            return if (known.hash, known.role) == (hash, role) {
                Ok(())
            } else {
                Err(TokenRefusal::Exists(name))
            };
        }
        if self.access.tokens.len() >= MAX_TOKENS {
            return Err(TokenRefusal::TooMany {
                limit: MAX_TOKENS,
                what: "tokens",
            });
        }
        let record = TokenRecord {
            role,
            hash,
            created_at: self.now,
            expires_at: ttl.map(|ttl| self.now.after(ttl)),
            made_by,
        };
        self.out.writes.push(Write::Put {
            key: keys::token(&name),
            value: encode(&record),
        });
        Arc::make_mut(&mut self.access).tokens.insert(name, record);
        Ok(())
    }

    fn revoke_token(&mut self, name: &TokenName) -> Result<usize, TokenRefusal> {
        if !self.access.tokens.contains_key(name) {
            return Err(TokenRefusal::NoSuchToken(name.clone()));
        }
        self.drop_token(name);
        let joined = self.access.credentials.iter();
        let joined: Vec<_> = joined
            .filter(|(_, record)| record.joined_by == *name && !record.by_file)
            .map(|(worker, _)| worker.clone())
            .collect();
        for worker in &joined {
            self.drop_credential(worker);
        }
        Ok(joined.len())
    }

    fn issue(&mut self, worker: WorkerName, record: CredentialRecord) -> Result<(), TokenRefusal> {
        self.drop_expired();
        let credentials = &self.access.credentials;
        if credentials.len() >= MAX_CREDENTIALS && !credentials.contains_key(&worker) {
            return Err(TokenRefusal::TooMany {
                limit: MAX_CREDENTIALS,
                what: "workers with a credential",
            });
        }
        self.out.writes.push(Write::Put {
            key: keys::credential(&worker),
            value: encode(&record),
        });
        let access = Arc::make_mut(&mut self.access);
        access.credentials.insert(worker, record);
        Ok(())
    }

    /// A token that has expired takes nothing with it: whoever joined by it in time has joined.
    fn drop_expired(&mut self) {
        let now = self.now;
        let tokens = self.access.tokens.iter();
        let tokens = tokens.filter(|(_, record)| !record.is_valid(now));
        let tokens: Vec<_> = tokens.map(|(name, _)| name.clone()).collect();
        let credentials = self.access.credentials.iter();
        let credentials = credentials.filter(|(_, record)| now >= record.expires_at);
        let credentials: Vec<_> = credentials.map(|(worker, _)| worker.clone()).collect();
        for name in &tokens {
            self.drop_token(name);
        }
        for worker in &credentials {
            self.drop_credential(worker);
        }
    }

    fn drop_token(&mut self, name: &TokenName) {
        let key = keys::token(name);
        self.out.writes.push(Write::Delete { key });
        Arc::make_mut(&mut self.access).tokens.remove(name);
    }

    fn drop_credential(&mut self, worker: &WorkerName) {
        let key = keys::credential(worker);
        self.out.writes.push(Write::Delete { key });
        let access = Arc::make_mut(&mut self.access);
        access.credentials.remove(worker);
    }
}
